//! `qemu-img` and `qemu-io` as judges: what they say of an image is right.
#![allow(dead_code, reason = "each suite uses its part")]

use std::path::{Path, PathBuf};
use std::process::Command;

/// Runs a tool, and returns its standard output or the reason for a failure.
pub fn run(tool: &str, args: &[&str]) -> String {
    let (ok, out) = try_run(tool, args);
    assert!(ok, "{tool} {args:?} failed:\n{out}");
    out
}

/// Runs a tool; whether it succeeded, and all that it said.
pub fn try_run(tool: &str, args: &[&str]) -> (bool, String) {
    let out = Command::new(tool).args(args).env("LC_ALL", "C").output().unwrap_or_else(|e| {
        panic!("these tests need {tool} (Debian: apt-get install qemu-utils), which does not start: {e}")
    });
    let said = format!("{}{}", String::from_utf8_lossy(&out.stdout), String::from_utf8_lossy(&out.stderr));
    (out.status.success(), said)
}

/// A directory of images that goes with the test.
pub struct Bench {
    dir: tempfile::TempDir,
}

impl Bench {
    pub fn new() -> Self {
        Self { dir: tempfile::tempdir().unwrap() }
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// An image made by `qemu-img create` with these `-o` options.
    pub fn qemu_image(&self, name: &str, options: &str, size: &str) -> PathBuf {
        let path = self.path(name);
        run("qemu-img", &["create", "-q", "-f", "qcow2", "-o", options, text(&path), size]);
        path
    }
}

pub fn text(path: &Path) -> &str {
    path.to_str().unwrap()
}

/// Runs `qemu-io` commands on an image.
pub fn io(path: &Path, commands: &[&str]) {
    let mut args = vec!["-f", "qcow2"];
    for c in commands {
        args.extend(["-c", c]);
    }
    args.push(text(path));
    let said = run("qemu-io", &args);
    assert!(!said.contains("Pattern verification failed"), "{commands:?} on {path:?}:\n{said}");
}

/// `qemu-img check` finds nothing: no errors, no leaks, no wrong COPIED bit.
pub fn clean(path: &Path) {
    let (ok, said) = try_run("qemu-img", &["check", "-f", "qcow2", text(path)]);
    assert!(ok && said.contains("No errors were found"), "qemu-img check of {path:?}:\n{said}");
}

/// The disk's content as qemu-img reads it: the active state, or that of a snapshot.
pub fn content(path: &Path, snapshot: Option<&str>) -> Vec<u8> {
    let out = path.with_extension("raw-content");
    let wanted = snapshot.map(|s| format!("snapshot.name={s}"));
    let mut args = vec!["convert", "-f", "qcow2", "-O", "raw"];
    if let Some(w) = &wanted {
        args.extend(["-l", w]);
    }
    args.extend([text(path), text(&out)]);
    run("qemu-img", &args);
    let bytes = std::fs::read(&out).unwrap();
    std::fs::remove_file(&out).unwrap();
    bytes
}

/// The names of the snapshots, in the table's order, by `qemu-img info`.
pub fn snapshot_names(path: &Path) -> Vec<String> {
    let info = run("qemu-img", &["info", "--output=json", "-U", text(path)]);
    let info: serde_json::Value = serde_json::from_str(&info).unwrap();
    let list = info.get("snapshots").and_then(|s| s.as_array()).cloned().unwrap_or_default();
    list.iter().map(|s| s["name"].as_str().unwrap().to_owned()).collect()
}

/// The output of `qemu-img info`.
pub fn info(path: &Path) -> serde_json::Value {
    serde_json::from_str(&run("qemu-img", &["info", "--output=json", "-U", text(path)])).unwrap()
}
