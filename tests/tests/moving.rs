//! Snapshots that other programs took and recorded, and domains that were moved to another directory.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};
use domsnap_tests::domsnap::{Domsnap, status};
use domsnap_tests::{qemu, shim};
use serde_json::{Value, json};

/// A directory with images, and a catalogue beside it.
struct Place {
    dir: tempfile::TempDir,
}

impl Place {
    fn new() -> Result<Self> {
        let place = Self { dir: tempfile::Builder::new().prefix("domsnap-moving-").tempdir()? };
        fs::create_dir_all(place.vm())?;
        for disk in ["root", "data"] {
            qemu::img(&["create", "-q", "-f", "qcow2", &text(&place.image(disk)), "1M"])?;
        }
        Ok(place)
    }

    /// With the domain `shop`: an external snapshot s1 of the pattern 1, an internal one s2 of 2, and now 3.
    fn with_domain() -> Result<Self> {
        let place = Self::new()?;
        place.write(1)?;
        let disks = [("vda", "root"), ("vdb", "data")]
            .map(|(target, disk)| format!("{target}={},format=qcow2", place.image(disk).display()));
        place.domsnap().done(&["domain", "add", "shop", "--disk", &disks[0], "--disk", &disks[1]])?;
        place.domsnap().done(&["create", "shop", "s1", "--external", "--description", "the first"])?;
        place.write(2)?;
        place.domsnap().done(&["create", "shop", "s2", "--internal"])?;
        place.domsnap().done(&["hold", "shop", "s1", "--holder", "audit"])?;
        place.write(3)?;
        Ok(place)
    }

    fn vm(&self) -> PathBuf {
        self.dir.path().join("srv/vm")
    }

    fn image(&self, disk: &str) -> PathBuf {
        self.vm().join(format!("{disk}.qcow2"))
    }

    fn domsnap(&self) -> Domsnap {
        Domsnap::new(&self.dir.path().join("state"))
    }

    fn write(&self, pattern: u8) -> Result<()> {
        ["root", "data"].iter().try_for_each(|disk| write(&self.image(disk), pattern))
    }

    /// The snapshots of `shop` by their names.
    fn snapshots(&self) -> Result<BTreeMap<String, Value>> {
        let list: Value = self.domsnap().done(&["list", "shop", "--json"])?.json()?;
        let all = list["snapshots"].as_array().context("snapshots")?;
        Ok(all.iter().map(|one| (one["name"].as_str().unwrap_or_default().to_owned(), one.clone())).collect())
    }

    /// Reverts to each snapshot and finds its pattern on the disks in `vm`; the domain is whole.
    fn proven(&self, vm: &Path) -> Result<()> {
        for (name, pattern) in [("s1", 1), ("s2", 2)] {
            self.domsnap().done(&["revert", "shop", name, "--undo=no"])?;
            for disk in ["root", "data"] {
                ensure!(
                    read(&vm.join(format!("{disk}.qcow2")))? == pattern,
                    "{disk} after a revert to {name}"
                );
            }
        }
        self.domsnap().done(&["check", "shop"])?;
        let held = self.domsnap().run(&["delete", "shop", "s1"])?.expect_status(status::REFUSED)?;
        ensure!(held.stderr.contains("audit"), "the hold is gone: {held}");
        Ok(())
    }
}

fn text(path: &Path) -> String {
    path.display().to_string()
}

fn write(image: &Path, pattern: u8) -> Result<()> {
    let command = format!("write -q -P {pattern} 0 64k");
    qemu::run("qemu-io", &["-f", "qcow2", "-c", &command, &text(image)]).map(drop)
}

/// The pattern that an image has throughout its first 64 KiB.
fn read(image: &Path) -> Result<u8> {
    let bytes = qemu::read(image, None)?;
    let first = bytes[0];
    ensure!(bytes[..65536].iter().all(|byte| *byte == first), "{} is mixed", image.display());
    Ok(first)
}

/// What libvirt 11.3 wrote of a snapshot of a domain that was off, without the domain's other devices.
fn record(
    name: &str,
    parent: Option<&str>,
    time: u64,
    more: &str,
    disks: &[(&str, Option<&Path>, &Path)],
) -> String {
    let parent = parent.map(|name| format!("  <parent>\n    <name>{name}</name>\n  </parent>\n"));
    let (mut points, mut before) = (String::new(), String::new());
    for (target, overlay, image) in disks {
        points.push_str(&match overlay {
            None => format!("    <disk name='{target}' snapshot='internal'/>\n"),
            Some(file) => format!(
                "    <disk name='{target}' snapshot='external' type='file'>\n      <driver type='qcow2'/>\n      \
                 <source file='{}'/>\n    </disk>\n",
                file.display()
            ),
        });
        before.push_str(&format!(
            "      <disk type='file' device='disk'>\n        <driver name='qemu' type='qcow2'/>\n        \
             <source file='{}'/>\n        <target dev='{target}' bus='virtio'/>\n      </disk>\n",
            image.display()
        ));
    }
    format!(
        "<!--\nWARNING: THIS IS AN AUTO-GENERATED FILE. CHANGES TO IT ARE LIKELY TO BE\nOVERWRITTEN AND LOST. Changes to \
         this xml configuration should be made using:\n  virsh snapshot-edit\nor other application using the libvirt \
         API.\n-->\n\n<domainsnapshot>\n  <name>{name}</name>\n{more}  <state>shutoff</state>\n{}  \
         <creationTime>{time}</creationTime>\n  <memory snapshot='no'/>\n  <disks>\n{points}  </disks>\n  \
         <domain type='qemu'>\n    <name>shop</name>\n    <devices>\n{before}    </devices>\n  </domain>\n  \
         <active>0</active>\n</domainsnapshot>\n",
        parent.unwrap_or_default()
    )
}

/// A tree as libvirt makes it: two branches of internal snapshots, and on one of them two external ones, of
/// which the second has one disk alone. Without the records, nothing says that the layers of two disks belong
/// together.
#[test]
fn snapshots_of_libvirt_are_named_and_described() -> Result<()> {
    let place = Place::new()?;
    let records = place.dir.path().join("records");
    fs::create_dir(&records)?;
    let (root, data) = (place.image("root"), place.image("data"));
    let tag = |name: &str| -> Result<()> {
        for image in [&root, &data] {
            qemu::img(&["snapshot", "-c", name, &text(image)])?;
        }
        Ok(())
    };
    place.write(1)?;
    tag("fresh install")?;
    place.write(2)?;
    tag("updated")?;
    place.write(3)?;
    tag("other")?;
    place.write(4)?;
    let [root1, data1, root2] = ["root.ext1", "data.ext1", "root.ext2"].map(|name| place.vm().join(name));
    let overlay = |image: &Path, below: &Path| {
        qemu::img(&["create", "-q", "-f", "qcow2", "-F", "qcow2", "-b", &text(below), &text(image)])
    };
    overlay(&root1, &root)?;
    overlay(&data1, &data)?;
    write(&root1, 5)?;
    overlay(&root2, &root1)?;
    write(&root2, 6)?;
    let internal = [("vda", None, &*root), ("vdb", None, &*data)];
    let description = "  <description>as installed &amp; clean</description>\n";
    for (name, text) in [
        ("fresh install", record("fresh install", None, 1_700_000_100, description, &internal)),
        ("updated", record("updated", Some("fresh install"), 1_700_000_200, "", &internal)),
        ("other", record("other", Some("fresh install"), 1_700_000_300, "", &internal)),
        (
            "ext1",
            record(
                "ext1",
                Some("other"),
                1_700_000_400,
                "",
                &[("vda", Some(&root1), &root), ("vdb", Some(&data1), &data)],
            ),
        ),
        ("ext2", record("ext2", Some("ext1"), 1_700_000_500, "", &[("vda", Some(&root2), &root1)])),
        // It was deleted behind libvirt's back.
        ("gone", record("gone", Some("ext2"), 1_700_000_600, "", &internal)),
    ] {
        fs::write(records.join(format!("{name}.xml")), text)?;
    }
    let images = format!("{},{}", root2.display(), data1.display());
    let outcome =
        place.domsnap().done(&["import", &images, "--name", "shop", "--records", &text(&records)])?;
    ensure!(outcome.stdout.contains("gone is recorded"), "{outcome}");
    let found = place.snapshots()?;
    let about = |name: &str| (found[name]["parent"].as_str(), found[name]["points"].as_array().map(Vec::len));
    ensure!(found.len() == 5, "{found:?}");
    ensure!(about("fresh_install") == (None, Some(2)), "{found:?}");
    ensure!(found["fresh_install"]["description"] == "as installed & clean", "{found:?}");
    ensure!(about("updated") == (Some("fresh_install"), Some(2)), "{found:?}");
    ensure!(about("other") == (Some("fresh_install"), Some(2)), "{found:?}");
    ensure!(about("ext1") == (Some("other"), Some(2)), "{found:?}");
    ensure!(about("ext2") == (Some("ext1"), Some(1)), "{found:?}");
    ensure!(found["ext1"]["created"] == "2023-11-14T22:20:00Z", "{found:?}");
    for (name, patterns) in
        [("fresh_install", [1, 1]), ("updated", [2, 2]), ("other", [3, 3]), ("ext1", [4, 4])]
    {
        place.domsnap().done(&["revert", "shop", name, "--undo=no"])?;
        ensure!([read(&root2)?, read(&data1)?] == patterns, "after a revert to {name}");
    }
    place.domsnap().done(&["revert", "shop", "ext2", "--undo=no"])?;
    ensure!(read(&root2)? == 5);
    place.domsnap().done(&["delete", "shop", "fresh_install", "--children"])?;
    ensure!(read(&root2)? == 5, "the current state went with the snapshots");
    place.domsnap().done(&["check", "shop"])?;
    Ok(())
}

/// The files of the prototype of xl; and files that are no records change nothing.
#[test]
fn records_are_read_and_never_trusted() -> Result<()> {
    let place = Place::new()?;
    let images = format!("{},{}", place.image("root").display(), place.image("data").display());
    for image in [place.image("root"), place.image("data")] {
        qemu::img(&["snapshot", "-c", "s1", &text(&image)])?;
    }
    let file = place.dir.path().join("snapshotdata-shop.s1.libxl-json");
    let import = |record: &str| {
        fs::write(&file, record)?;
        place.domsnap().run(&["import", &images, "--name", "shop", "--records", &text(&file)])
    };
    for (record, why) in [
        ("", "neither XML nor JSON"),
        ("<domain/>", "<domain>"),
        ("<domainsnapshot><name>s1</name>", "no record"),
        ("<!DOCTYPE x [<!ENTITY e 'x'>]><domainsnapshot><name>&e;</name></domainsnapshot>", "DTD"),
        ("{\"name\": 5}", "no record"),
        ("{\"name\": \"s1\", \"creation_time\": 99999999999999}", "creation_time"),
    ] {
        let outcome = import(record)?.expect_status(status::USAGE)?;
        ensure!(outcome.stderr.contains(why) && outcome.stderr.contains("no changes made"), "{outcome}");
        let listed = place.domsnap().done(&["domain", "list", "--json"])?;
        ensure!(!listed.stdout.contains("shop"), "a record that is refused left a domain: {listed}");
    }
    let empty = place.dir.path().join("empty");
    fs::create_dir(&empty)?;
    let refused = place.domsnap().run(&["import", &images, "--records", &text(&empty)])?;
    ensure!(refused.expect_status(status::USAGE)?.stderr.contains("no records"));
    // A name is only a name, wherever it would lead as a path.
    import("{\"name\": \"../../etc\", \"disks\": [{\"device\": \"hda\", \"name\": \"s1\"}], \"parent\": \"../../etc\"}")?
        .expect_status(status::DONE)?;
    let found = place.snapshots()?;
    ensure!(found.contains_key("_.._.._etc") && found.len() == 1, "{found:?}");
    place.domsnap().done(&["domain", "remove", "shop"])?;
    let record = json!({
        "name": "s1", "description": "by xl", "creation_time": "1420070400", "type": "internal", "running": true,
        "memory": "/var/lib/xen/snapshots/7/s1.save",
        "disks": [{ "device": "hda", "name": "s1", "file": "", "format": "qcow2", "type": "internal" }],
    });
    fs::write(&file, record.to_string())?;
    let outcome = place.domsnap().done(&[
        "import",
        &images,
        "--name",
        "shop",
        "--replace",
        "--records",
        &text(place.dir.path()),
    ])?;
    ensure!(outcome.stdout.contains("its memory is not imported"), "{outcome}");
    // What the first import called it is no name that a person gave.
    let found = place.snapshots()?;
    ensure!(found.len() == 1 && found["s1"]["description"] == "by xl", "{found:?}");
    Ok(())
}

/// A directory that was moved is found by `check` and followed by `check --repair`: the snapshots, holds and
/// descriptions are what they were, and no second domain is made.
#[test]
fn moved_directory_is_followed() -> Result<()> {
    let place = Place::with_domain()?;
    let now = place.dir.path().join("srv/machines/shop");
    fs::create_dir_all(now.parent().context("a parent")?)?;
    fs::rename(place.vm(), &now)?;
    let found = place.domsnap().run(&["check", "shop"])?.expect_status(status::FAILED)?;
    ensure!(
        found.stdout.contains(&text(&now.join("root.qcow2"))) && found.stdout.contains("--repair"),
        "{found}"
    );
    // An image is named alone; the manifests name the other.
    let refused = place.domsnap().run(&["import", &text(&now.join("root.qcow2"))])?;
    ensure!(refused.stderr.contains("--replace") && refused.stderr.contains("--name"), "{refused}");
    refused.expect_status(status::REFUSED)?;
    let done = place.domsnap().done(&["check", "shop", "--repair"])?;
    ensure!(done.stdout.contains("was moved") && done.stdout.contains("all is well"), "{done}");
    ensure!(place.snapshots()?["s1"]["description"] == "the first");
    let domains = place.domsnap().done(&["domain", "list"])?;
    ensure!(domains.stdout.lines().count() == 2, "{domains}");
    place.proven(&now)?;
    // Nothing more is to be done.
    ensure!(!place.domsnap().done(&["check", "shop", "--repair"])?.stdout.contains("was moved"));
    Ok(())
}

/// What is not the domain is not taken for it: a copy while the images are there, an older copy, a directory
/// of another catalogue; and of two places none is chosen.
#[test]
fn copies_are_not_taken_for_a_moved_domain() -> Result<()> {
    let place = Place::with_domain()?;
    let beside = |name: &str| place.dir.path().join("srv").join(name);
    let copy = |name: &str| domsnap_tests::domain::copy_tree(&place.vm(), &beside(name));
    copy("older")?;
    ensure!(
        !place.domsnap().done(&["check", "shop", "--repair"])?.stdout.contains("older"),
        "a copy was taken"
    );
    let other = Domsnap::new(&place.dir.path().join("state-2"));
    copy("others")?;
    other.done(&["import", &text(&beside("others").join("root.qcow2")), "--name", "shop"])?;
    let shown = other.done(&["domain", "show", "shop"])?;
    ensure!(!shown.stdout.contains("srv/vm"), "the copy's domain has a disk of the original: {shown}");
    other.done(&["create", "shop", "s3"])?;
    // From here on the copies are older than the catalogue.
    place.domsnap().done(&["create", "shop", "s3"])?;
    let away = beside("away");
    fs::rename(place.vm(), &away)?;
    let found = place.domsnap().run(&["check", "shop"])?.expect_status(status::FAILED)?;
    ensure!(!found.stdout.contains("srv/older") && !found.stdout.contains("srv/others"), "{found}");
    ensure!(found.stdout.contains("srv/away"), "{found}");
    // Nor is what another user could have written.
    let manifests = away.join("root.qcow2.domsnap");
    std::os::unix::fs::chown(&manifests, Some(12345), None)?;
    ensure!(!place.domsnap().run(&["check", "shop"])?.stdout.contains("srv/away"), "another user's is taken");
    std::os::unix::fs::chown(&manifests, Some(0), None)?;
    ensure!(place.domsnap().run(&["check", "shop"])?.stdout.contains("srv/away"));
    domsnap_tests::domain::copy_tree(&away, &beside("second"))?;
    domsnap_tests::domain::copy_tree(&away, &beside("third"))?;
    fs::remove_dir_all(&away)?;
    let refused = place.domsnap().run(&["check", "shop", "--repair"])?.expect_status(status::REFUSED)?;
    ensure!(refused.stderr.contains("second") && refused.stderr.contains("third"), "{refused}");
    // Told which, it follows; the other is a copy, which gets another name.
    place.domsnap().done(&["import", &text(&beside("second").join("root.qcow2")), "--replace"])?;
    place.proven(&beside("second"))?;
    place.domsnap().done(&["import", &text(&beside("third").join("root.qcow2"))])?;
    let domains = place.domsnap().done(&["domain", "list"])?;
    ensure!(domains.stdout.lines().count() == 3, "{domains}");
    Ok(())
}

/// Killed at any of its operations, the catalogue has the one place or the other, and the repair can be
/// repeated.
#[test]
fn killed_repair_can_be_repeated() -> Result<()> {
    let place = Place::with_domain()?;
    let (now, state) = (place.dir.path().join("srv/now"), place.dir.path().join("state"));
    fs::rename(place.vm(), &now)?;
    let kept = place.dir.path().join("kept");
    fs::create_dir(&kept)?;
    for part in [&now, &state] {
        domsnap_tests::domain::copy_tree(part, &kept.join(part.file_name().context("a name")?))?;
    }
    let again = || -> Result<()> {
        for part in [&now, &state] {
            fs::remove_dir_all(part)?;
            domsnap_tests::domain::copy_tree(&kept.join(part.file_name().context("a name")?), part)?;
        }
        Ok(())
    };
    let args = ["check", "shop", "--repair"];
    let (_outputs, file) = shim::outputs()?;
    let watching = || shim::watching(place.domsnap(), place.dir.path());
    shim::counting(watching()?, &file).done(&args)?;
    let operations = shim::counted(&file)?.len();
    ensure!(operations > 5, "a repair has {operations} operations");
    for number in (1..=operations).step_by(3) {
        again()?;
        let killed = shim::killing(watching()?, number as u64, number % 2 == 0).run(&args)?;
        ensure!(killed.status.is_none(), "{killed}");
        let context = || format!("killed at operation {number} of {operations}");
        place.domsnap().done(&args).with_context(context)?;
        place.proven(&now).with_context(context)?;
    }
    Ok(())
}

/// A chain of another program has the earlier path in its images: the error has the command that mends it.
#[test]
fn moved_chain_of_others_is_mended_by_the_command_of_the_error() -> Result<()> {
    let place = Place::new()?;
    let (base, top) = (place.image("root"), place.vm().join("top.qcow2"));
    place.write(7)?;
    qemu::img(&["create", "-q", "-f", "qcow2", "-F", "qcow2", "-b", &text(&base), &text(&top)])?;
    let now = place.dir.path().join("srv/other place");
    fs::rename(place.vm(), &now)?;
    let top = now.join("top.qcow2");
    let refused =
        place.domsnap().run(&["import", &text(&top), "--name", "shop"])?.expect_status(status::REFUSED)?;
    let command = refused.stderr.split('`').nth(1).context("a command")?.to_owned();
    qemu::run("sh", &["-c", &command]).with_context(|| refused.to_string())?;
    place.domsnap().done(&["import", &text(&top), "--name", "shop"])?;
    ensure!(read(&top)? == 7, "the image shows something else");
    Ok(())
}

/// The commands of the guide's page, each run as it is written there.
#[test]
fn every_command_of_the_page_runs() -> Result<()> {
    let place = Place::new()?;
    let root = place.dir.path().join("srv");
    for image in [place.image("root"), place.image("data")] {
        qemu::img(&["snapshot", "-c", "before update", &text(&image)])?;
    }
    fs::create_dir(place.vm().join("records"))?;
    fs::create_dir(root.join("backup"))?;
    let disks = [("vda", None, &*place.image("root")), ("vdb", None, &*place.image("data"))];
    let text = record("before update", None, 1_700_000_100, "", &disks);
    fs::write(place.vm().join("records/before update.xml"), text)?;
    let page = Path::new(env!("CARGO_MANIFEST_DIR")).join("../docs/moving.md");
    let (mut is_code, mut run) = (false, 0);
    for line in fs::read_to_string(page)?.lines() {
        if line.starts_with("```") {
            is_code = !is_code;
        }
        if !is_code {
            continue;
        }
        let here = line.replace("/srv/", &format!("{}/", root.display()));
        let parts: Vec<&str> = here.split_whitespace().collect();
        match parts.split_first() {
            Some((&"domsnap", args)) => {
                // The images are gone when this one looks.
                let wanted = if line.ends_with("check shop") { status::FAILED } else { status::DONE };
                place.domsnap().run(args)?.expect_status(wanted).context(line.to_owned())?;
                run += 1;
            }
            Some((&"mv", [from, to])) => fs::rename(from, to).context(line.to_owned())?,
            _ => {}
        }
    }
    ensure!(run >= 8, "only {run} commands are left in the page");
    Ok(())
}
