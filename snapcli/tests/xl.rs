//! `domsnap xl`: the examples of the prototype's HOWTO, on disks at rest.
//! (Memory: `live_cli` of the suites, under QEMU, and `xenguest` under Xen.)

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

struct Place {
    directory: tempfile::TempDir,
}

impl Place {
    /// `your_domain`, with the disks hda and hdc.
    fn new() -> Self {
        let place = Self { directory: tempfile::tempdir().unwrap() };
        for image in ["hda.qcow2", "hdc.qcow2"] {
            let args = ["create", "-q", "-f", "qcow2", image, "16M"];
            assert!(
                Command::new("qemu-img").args(args).current_dir(place.path()).status().unwrap().success()
            );
        }
        place.done(&["domain", "add", "your_domain", "--disk", "hda=hda.qcow2", "--disk", "hdc=hdc.qcow2"]);
        place
    }

    fn path(&self) -> &Path {
        self.directory.path()
    }

    fn domsnap(&self, args: &[&str]) -> Output {
        let mut command = Command::new(env!("CARGO_BIN_EXE_domsnap"));
        command.args(args).current_dir(self.path());
        command.env("DOMSNAP_STATE_DIR", self.path().join("state")).env("DOMSNAP_UNDO", "no");
        command.env("TZ", "UTC").env("NO_COLOR", "1").output().unwrap()
    }

    /// What a command prints that succeeds.
    fn done(&self, args: &[&str]) -> String {
        let output = self.domsnap(args);
        assert!(output.status.success(), "{args:?}: {output:?}");
        String::from_utf8(output.stdout).unwrap()
    }

    /// What a command says that fails, with the one status that all failures of `xl` have.
    fn fails(&self, args: &[&str]) -> String {
        let output = self.domsnap(args);
        assert_eq!(output.status.code(), Some(1), "{args:?}: {output:?}");
        assert!(output.stdout.is_empty(), "{output:?}");
        String::from_utf8(output.stderr).unwrap()
    }

    fn file(&self, name: &str, content: &str) -> PathBuf {
        let path = self.path().join(name);
        fs::write(&path, content).unwrap();
        path
    }

    fn names(&self) -> Vec<String> {
        let listed = self.done(&["list", "your_domain", "--json"]);
        let listed: serde_json::Value = serde_json::from_str(&listed).unwrap();
        let names = listed["snapshots"].as_array().unwrap().iter();
        names.map(|snapshot| snapshot["name"].as_str().unwrap().to_owned()).collect()
    }

    fn kinds(&self, snapshot: &str) -> Vec<(String, String)> {
        let shown = self.done(&["list", "your_domain", "--json"]);
        let shown: serde_json::Value = serde_json::from_str(&shown).unwrap();
        let all = shown["snapshots"].as_array().unwrap();
        let found = all.iter().find(|found| found["name"] == snapshot).unwrap();
        let points = found["points"].as_array().unwrap().iter();
        let word = |value: &serde_json::Value| value.as_str().unwrap().to_owned();
        points.map(|point| (word(&point["target"]), word(&point["kind"]))).collect()
    }
}

fn kinds(all: &[(&str, &str)]) -> Vec<(String, String)> {
    all.iter().map(|(target, kind)| ((*target).to_owned(), (*kind).to_owned())).collect()
}

/// Use cases 1 and 2: internal snapshots of all disks, with the time as the name or with one that is given.
#[test]
fn snapshots_are_created_by_options() {
    let place = Place::new();
    let now = || jiff::Timestamp::now().as_second();
    let before = now();
    place.done(&["xl", "snapshot-create", "your_domain"]);
    let seconds: i64 = place.names()[0].parse().unwrap();
    assert!((before..=now()).contains(&seconds), "{seconds}");
    place.done(&["xl", "snapshot-create", "-n", "domain_snapshot_name", "your_domain"]);
    assert_eq!(place.kinds("domain_snapshot_name"), kinds(&[("hda", "internal"), ("hdc", "internal")]));
    let said = place.fails(&["xl", "snapshot-create", "-n", "domain_snapshot_name", "your_domain"]);
    assert!(said.contains("no changes made"), "{said}");
    // Images are a domain too, and any DOMAIN of domsnap.
    place.done(&["xl", "snapshot-create", "-D", "-n", "images", "hda.qcow2,hdc.qcow2"]);
    assert!(place.names().contains(&"images".to_owned()));
}

/// Use cases 3 to 5: the files of the HOWTO, with its two orders of file and domain.
#[test]
fn snapshots_are_created_by_files() {
    let place = Place::new();
    let internal = "name = \"internal snapshot 20140710\"\ndescription=\"Internal snapshot test\"\nmemory=\"yes\"\n\
                    disk=['vdev=hda,target=null',\n      'vdev=hdc,target=null']\n";
    place.file("internal", internal);
    // The domain does not run.
    let said = place.fails(&["xl", "snapshot-create", "internal", "your_domain"]);
    assert!(said.contains("memory") && said.contains("no changes made"), "{said}");
    assert!(place.names().is_empty());
    place.file("internal", &internal.replace("memory=\"yes\"\n", ""));
    let output = place.domsnap(&["xl", "snapshot-create", "internal", "your_domain"]);
    assert!(output.status.success(), "{output:?}");
    let note = String::from_utf8(output.stderr).unwrap();
    assert!(note.contains("is called internal-snapshot-20140710"), "{note}");
    assert_eq!(place.kinds("internal-snapshot-20140710"), kinds(&[("hda", "internal"), ("hdc", "internal")]));

    let overlay = |name: &str| place.path().join(name).display().to_string();
    let (hda, hdc) = (overlay("disk_hda.qcow2"), overlay("disk_hdc.qcow2"));
    place.file(
        "external",
        &format!(
            "name = \"external snapshot 20140710\"\ndescription=\"External snapshot test\"\n\
             disk=['format=qcow2,vdev=hda,target={hda}',\n      'format=qcow2,vdev=hdc,target={hdc}']\n"
        ),
    );
    // The overlay becomes the active image there, so the domain's configuration has to follow.
    place.done(&["domain", "remove", "your_domain"]);
    let disks = ["--disk", "hda=hda.qcow2", "--disk", "hdc=hdc.qcow2"];
    place.done(&[&["domain", "add", "your_domain", "--active-path", "new"][..], &disks].concat());
    place.done(&["xl", "snapshot-create", "external", "your_domain"]);
    assert_eq!(place.kinds("external-snapshot-20140710"), kinds(&[("hda", "external"), ("hdc", "external")]));
    assert!(Path::new(&hda).exists() && Path::new(&hdc).exists());
    let said = place.fails(&["xl", "snapshot-create", "external", "-n", "again", "your_domain"]);
    assert!(said.contains("-n says \"again\""), "{said}");

    let again = overlay("again_hda.qcow2");
    place.file(
        "disk_only_config_file",
        &format!(
            "name = \"1397207577\"\ndescription=\"Snapshot after OS installation. External disk-only\\\n             \
             snapsot. Only care about the root file system\"\ndisk=['hda={again},type=qcow2']\n"
        ),
    );
    let output = place.domsnap(&["xl", "snapshot-create", "your_domain", "disk_only_config_file"]);
    assert!(output.status.success(), "{output:?}");
    let note = String::from_utf8(output.stderr).unwrap();
    assert!(note.contains("hdc is left out"), "{note}");
    assert_eq!(place.kinds("1397207577"), kinds(&[("hda", "external")]));
    let elsewhere = place.path().join("elsewhere");
    fs::create_dir(&elsewhere).unwrap();
    let target = elsewhere.join("x.qcow2");
    place.file("elsewhere.cfg", &format!("disk=['format=qcow2,vdev=hda,target={}']", target.display()));
    let said = place.fails(&["xl", "snapshot-create", "elsewhere.cfg", "your_domain"]);
    assert!(said.contains("is not in the directory of the disk's image"), "{said}");
    // Its target exists by now.
    place.file("taken", &format!("name='taken'\ndisk=['format=qcow2,vdev=hda,target={again}']"));
    let said = place.fails(&["xl", "snapshot-create", "taken", "your_domain"]);
    assert!(said.contains("again_hda.qcow2") && said.contains("no changes made"), "{said}");
}

/// The table, column by column; details; one snapshot alone.
#[test]
fn snapshots_are_listed_as_the_prototype_does() {
    let place = Place::new();
    place.file("config", "name='first' ; description='a\\nb'");
    place.done(&["xl", "snapshot-create", "config", "your_domain"]);
    place.done(&["create", "your_domain", "second", "--external"]);
    let listed = place.done(&["xl", "snapshot-list", "your_domain"]);
    let lines: Vec<&str> = listed.lines().collect();
    assert_eq!(lines[0], "-".repeat(69));
    assert_eq!(
        lines[1],
        "TAG           NAME                                                DATE STATE DISK ONLY"
    );
    let (tag, rest) = lines[2].split_at(14);
    let second: i64 = tag.trim_end().parse().unwrap();
    let date = jiff::Timestamp::from_second(second).unwrap().strftime("%Y-%m-%d %H:%M:%S").to_string();
    assert_eq!(rest, format!("{:<30}{:>26} -----{:>10}", "first", format!("{date} +0000"), "Yes"));
    assert!(lines[3].contains("second") && lines.len() == 4, "{listed}");

    let listed = place.done(&["xl", "snapshot-list", "-l", "-n", "first", "your_domain"]);
    let lines: Vec<&str> = listed.lines().skip(3).collect();
    assert_eq!(
        lines,
        [
            " DESCRIPTION",
            " a b",
            " DISK",
            "     DEVICE          NAME    FORMATFILE                          ",
            "        hda         first     qcow2 -                            ",
            "        hdc         first     qcow2 -                            ",
        ]
    );
    let listed = place.done(&["xl", "snapshot-list", "-l", "your_domain"]);
    let hda = fs::canonicalize(place.path()).unwrap().join("hda");
    assert!(listed.contains(&format!("       hda             -     qcow2 {}", hda.display())), "{listed}");
    let said = place.fails(&["xl", "snapshot-list", "-n", "third", "your_domain"]);
    assert!(said.contains("no snapshot third") && said.contains("xl snapshot-list your_domain"), "{said}");
}

/// Reverts and deletes, of both kinds; and options that have nothing to do here.
#[test]
fn snapshots_are_reverted_to_and_deleted() {
    let place = Place::new();
    let write = |pattern: &str| {
        let write = format!("write -P {pattern} 0 64k");
        let args = ["-c", write.as_str(), "hda.qcow2"];
        assert!(
            Command::new("qemu-io").args(args).current_dir(place.path()).output().unwrap().status.success()
        );
    };
    let reads = |pattern: &str| {
        let read = format!("read -P {pattern} 0 64k");
        let args = ["-c", read.as_str(), "hda.qcow2"];
        let output = Command::new("qemu-io").args(args).current_dir(place.path()).output().unwrap();
        let said = String::from_utf8_lossy(&output.stdout).into_owned();
        assert!(output.status.success() && !said.contains("failed"), "{said}");
    };
    write("1");
    place.done(&["xl", "snapshot-create", "-n", "one", "your_domain"]);
    write("2");
    place.file("config", "type='external'");
    place.done(&["xl", "snapshot-create", "-n", "two", "config", "your_domain"]);
    write("3");
    let planned = place.done(&["xl", "-N", "snapshot-revert", "-n", "one", "your_domain"]);
    let planned: serde_json::Value = serde_json::from_str(&planned).unwrap();
    assert_eq!(planned["snapshot"]["name"], "one");
    assert_eq!(planned["snapshot"]["disks"][0]["type"], "internal");
    reads("3");
    let output = place.domsnap(&["xl", "snapshot-revert", "-F", "-V", "-n", "one", "your_domain"]);
    assert!(output.status.success(), "{output:?}");
    let notes = String::from_utf8(output.stderr).unwrap();
    assert!(notes.contains("-F: ") && notes.contains("`xl vncviewer`") && !notes.contains("-c: "), "{notes}");
    reads("1");
    place.done(&["xl", "snapshot-revert", "-n", "two", "your_domain"]);
    reads("2");
    place.done(&["xl", "-N", "snapshot-delete", "-n", "two", "your_domain"]);
    place.done(&["xl", "snapshot-delete", "-n", "one", "your_domain"]);
    place.done(&["xl", "snapshot-delete", "-n", "two", "your_domain"]);
    assert!(place.names().is_empty());
    reads("2");
    // Usage has the same status here, as with xl.
    let said = place.fails(&["xl", "snapshot-delete", "your_domain"]);
    assert!(said.contains("-n <NAME>"), "{said}");
    let said = place.fails(&["xl", "snapshot-list", "unknown"]);
    assert!(said.contains("unknown"), "{said}");
}

/// A wrong file is refused with its line, and conflicts are, before anything is done; a dry run prints the
/// snapshot.
#[test]
fn wrong_requests_make_no_changes() {
    let place = Place::new();
    for (content, why) in [
        ("name='a'\nmemroy='yes'\n", "line 2: the key \"memroy\""),
        ("disk=['vdev=hdb']", "has no disk hdb, only hda, hdc"),
        ("disk=['vdev=hda','vdev=xvda']", "the disk hda comes twice"),
        ("memory='/var/lib/xen/a.save'", "--memory-dir"),
        ("disk=['vdev=hda,format=vhd,target=/x']", "\"vhd\""),
    ] {
        place.file("config", content);
        let said = place.fails(&["xl", "snapshot-create", "config", "your_domain"]);
        assert!(said.contains(why) && said.contains("no changes made"), "{content}: {said}");
    }
    place.file("config", "memory='yes'");
    let said = place.fails(&["xl", "snapshot-create", "-D", "config", "your_domain"]);
    assert!(said.contains("-D leaves memory out"), "{said}");
    let said = place.fails(&["xl", "snapshot-create", "overlays-nowhere", "your_domain"]);
    assert!(said.contains("cannot read overlays-nowhere"), "{said}");
    place.file("config", "name='dry'\ndisk=['vdev=xvdc']");
    let printed = place.done(&["xl", "-N", "snapshot-create", "config", "your_domain"]);
    let printed: serde_json::Value = serde_json::from_str(&printed).unwrap();
    assert_eq!(printed["snapshot"]["disks"].as_array().unwrap().len(), 1);
    assert_eq!(printed["snapshot"]["disks"][0]["device"], "hdc");
    assert!(place.names().is_empty());
}
