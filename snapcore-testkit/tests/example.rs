//! The example of a third party's backend, which is no member of the workspace, builds and passes the kit.

use std::path::PathBuf;
use std::process::Command;

#[test]
fn example_backend_passes() {
    let root = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("..");
    let example = root.join("examples/backend-dir");
    // The versions that everything else was built with.
    std::fs::copy(root.join("Cargo.lock"), example.join("Cargo.lock")).unwrap();
    let target = std::env::var_os("CARGO_TARGET_DIR").map_or_else(|| root.join("target"), PathBuf::from);
    let output = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()))
        .args(["test", "--manifest-path"])
        .arg(example.join("Cargo.toml"))
        .env("CARGO_TARGET_DIR", target)
        // Cargo sets this for the test programs of this crate, and it is not that crate's.
        .env_remove("CARGO_MANIFEST_DIR")
        .output()
        .unwrap();
    let said = String::from_utf8_lossy(&output.stdout);
    let complaint = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{said}\n{complaint}");
    let tried = said.lines().filter(|line| line.starts_with("test ") && line.ends_with("... ok")).count();
    assert!(tried > 30, "only {tried} test cases were run:\n{said}");
}
