//! The command line as its users meet it: what it prints, and the status it ends with.

use std::path::{Path, PathBuf};

use assert_cmd::Command;

fn domsnap(state: &Path) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_domsnap"));
    command.env("DOMSNAP_STATE_DIR", state).env("TZ", "UTC").env("NO_COLOR", "1");
    command
}

/// `qemu-img` makes the images that the transcripts work on.
fn qemu_img() -> PathBuf {
    let path = std::env::var_os("PATH").unwrap_or_default();
    std::env::split_paths(&path)
        .map(|directory| directory.join("qemu-img"))
        .find(|file| file.is_file())
        .expect("qemu-img is needed: run scripts/install-deps")
}

/// Transcripts: `tests/cmd/NAME.trycmd`. `TRYCMD=overwrite` writes what is printed now; look at the
/// difference.
#[test]
fn commands_print_what_the_transcripts_say() {
    let cases = trycmd::TestCases::new();
    cases
        .env("DOMSNAP_STATE_DIR", "state")
        .env("DOMSNAP_UNDO", "no")
        .env("TZ", "UTC")
        .env("LC_ALL", "C.UTF-8")
        .env("NO_COLOR", "1");
    cases.register_bin("qemu-img", qemu_img());
    cases.case("tests/cmd/*.trycmd");
}

#[test]
fn the_schema_that_is_checked_in_is_the_schema() {
    let state = tempfile::tempdir().unwrap();
    let printed = domsnap(state.path()).arg("schema").output().unwrap();
    assert!(printed.status.success());
    let file = Path::new(env!("CARGO_MANIFEST_DIR")).join("../docs/schema.json");
    let checked_in = std::fs::read(file).unwrap();
    assert!(
        printed.stdout == checked_in,
        "docs/schema.json is not what `domsnap schema` prints: write it again, and think of who reads the old shape"
    );
}

#[test]
fn exit_status_separates_usage_from_refusal() {
    let state = tempfile::tempdir().unwrap();
    let ends = |args: &[&str], status: i32| {
        domsnap(state.path()).args(args).assert().code(status);
    };
    ends(&["--version"], 0);
    ends(&["list"], 0);
    ends(&[], 2);
    ends(&["create"], 2);
    ends(&["create", "web", "a b"], 2);
    ends(&["create", "web", "--internal", "--external"], 2);
    ends(&["list", "web", "--all"], 2);
    ends(&["create", "web", "s1"], 3);
    ends(&["show", "web", "s1"], 3);
    ends(&["disk", "list", "/nonexistent/image"], 3);
    ends(&["check", "web"], 3);
}

/// A failure with `--json` is one document and nothing else.
#[test]
fn json_failure_is_one_document() {
    let state = tempfile::tempdir().unwrap();
    for args in [&["show", "web", "s1"][..], &["create", "web", "a b"], &["frobnicate"]] {
        let output = domsnap(state.path()).args(args).arg("--json").output().unwrap();
        let document: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
        assert_eq!(document["schema"], 1);
        assert_eq!(document["error"]["exit"].as_i64(), output.status.code().map(i64::from), "{args:?}");
        assert!(document["error"]["message"].is_string(), "{args:?}");
        assert_eq!(String::from_utf8_lossy(&output.stderr), "", "{args:?}");
    }
}

#[test]
fn commands_that_only_look_make_no_state_directory() {
    let parent = tempfile::tempdir().unwrap();
    let state = parent.path().join("state");
    for args in [&["list"][..], &["domain", "list"], &["check"], &["recover"], &["backends"]] {
        domsnap(&state).args(args).assert().success();
        assert!(!state.exists(), "{args:?} made it");
    }
}

#[test]
fn closed_pipe_is_no_failure() {
    use std::io::Read;
    let mut child = std::process::Command::new(env!("CARGO_BIN_EXE_domsnap"))
        .arg("schema")
        .stdout(std::process::Stdio::piped())
        .stderr(std::process::Stdio::piped())
        .spawn()
        .unwrap();
    drop(child.stdout.take());
    let mut said = String::new();
    child.stderr.take().unwrap().read_to_string(&mut said).unwrap();
    assert_eq!((child.wait().unwrap().code(), said.as_str()), (Some(0), ""));
}

#[test]
fn completions_and_man_pages_name_every_command() {
    let state = tempfile::tempdir().unwrap();
    for shell in ["bash", "zsh", "fish", "elvish", "powershell"] {
        let output = domsnap(state.path()).args(["completions", shell]).output().unwrap();
        let script = String::from_utf8(output.stdout).unwrap();
        for word in ["create", "revert", "delete", "recover", "save-current"] {
            assert!(script.contains(word), "{shell} misses {word}");
        }
    }
    let dir = state.path().join("man");
    domsnap(state.path()).arg("man").arg(&dir).assert().success();
    for page in ["domsnap.1", "domsnap-create.1", "domsnap-disk-delete.1", "domsnap-domain-add.1"] {
        let text = std::fs::read_to_string(dir.join(page)).unwrap();
        assert!(text.starts_with(".ie") || text.contains(".TH"), "{page} is no man page");
    }
}

/// A directory with the example of a plug-in, and with what cannot be one.
fn plug_ins() -> tempfile::TempDir {
    use std::os::unix::fs::PermissionsExt;
    let directory = tempfile::tempdir().unwrap();
    let example = Path::new(env!("CARGO_MANIFEST_DIR")).join("../examples/domsnap-backend-dir.py");
    let wire = example.with_file_name("domsnap_backend.py");
    std::fs::copy(wire, directory.path().join("domsnap_backend.py")).unwrap();
    std::fs::copy(&example, directory.path().join("domsnap-backend-dir")).unwrap();
    std::fs::copy(&example, directory.path().join("domsnap-backend-other")).unwrap();
    std::fs::copy(&example, directory.path().join("domsnap-backend-qcow2")).unwrap();
    let plain = directory.path().join("domsnap-backend-plain");
    std::fs::write(&plain, "no program").unwrap();
    std::fs::set_permissions(&plain, std::fs::Permissions::from_mode(0o644)).unwrap();
    directory
}

/// Plug-ins are listed, and those that cannot be used say why.
#[test]
fn unusable_plug_ins_say_why() {
    let (state, directory) = (tempfile::tempdir().unwrap(), plug_ins());
    let output = domsnap(state.path())
        .env("DOMSNAP_BACKEND_DIR", directory.path())
        .args(["backends", "--json"])
        .output()
        .unwrap();
    assert!(output.status.success());
    let document: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    let formats: Vec<_> =
        document["backends"].as_array().unwrap().iter().map(|backend| &backend["format"]).collect();
    assert!(formats.iter().any(|format| *format == "qcow2"), "{document}");
    let dir =
        document["backends"].as_array().unwrap().iter().find(|backend| backend["format"] == "dir").unwrap();
    assert_eq!(dir["capabilities"]["internal"], true);
    assert!(dir["plugin"].as_str().unwrap().ends_with("/domsnap-backend-dir"));
    let why = |name: &str| {
        let problems = document["problems"].as_array().unwrap();
        let of = |problem: &&serde_json::Value| problem["program"].as_str().unwrap().ends_with(name);
        problems.iter().find(of).unwrap()["message"].as_str().unwrap().to_owned()
    };
    assert!(why("-other").contains("serves the format \"dir\""), "{}", why("-other"));
    assert!(why("-qcow2").contains("registered already"), "{}", why("-qcow2"));
    assert!(why("-plain").contains("chmod +x"), "{}", why("-plain"));
}

#[test]
fn a_disk_of_a_plug_in_is_served_like_any_other() {
    let (state, directory) = (tempfile::tempdir().unwrap(), plug_ins());
    let disk = state.path().join("web.img");
    std::fs::write(&disk, "before").unwrap();
    let run = |args: &[&str]| {
        let mut command = domsnap(&state.path().join("state"));
        command.arg("--backend-dir").arg(directory.path()).args(args).assert().success();
    };
    run(&["domain", "add", "web", "--disk", &format!("vda={},format=dir", disk.display())]);
    run(&["create", "web", "s1"]);
    std::fs::write(&disk, "after").unwrap();
    run(&["revert", "web", "s1"]);
    assert_eq!(std::fs::read_to_string(&disk).unwrap(), "before");
    run(&["check", "web"]);
    run(&["delete", "web", "s1"]);
    // Without the plug-in nothing is touched, and the format is named.
    let lost = domsnap(&state.path().join("state")).args(["create", "web", "s2"]).output().unwrap();
    let said = String::from_utf8_lossy(&lost.stderr).into_owned();
    assert!(!lost.status.success() && said.contains("no backend serves the format \"dir\""), "{said}");
}

/// A plug-in directory that all users can write to is refused.
#[test]
fn world_writable_plug_in_directory_is_refused() {
    use std::os::unix::fs::PermissionsExt;
    let (state, directory) = (tempfile::tempdir().unwrap(), plug_ins());
    std::fs::set_permissions(directory.path(), std::fs::Permissions::from_mode(0o777)).unwrap();
    let refused =
        domsnap(state.path()).arg("--backend-dir").arg(directory.path()).arg("backends").output().unwrap();
    assert_eq!(refused.status.code(), Some(3));
    assert!(String::from_utf8_lossy(&refused.stderr).contains("chmod o-w"));
}
