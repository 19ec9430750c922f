//! What the image engine refuses, keeps and gives back, by the command: damaged images, encryption, image
//! options, room on the file system, tags in lower layers.

use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};
use domsnap_tests::domsnap::{Domsnap, Outcome, status};
use domsnap_tests::qemu::{self, Write};
use serde_json::Value;

struct Place {
    dir: tempfile::TempDir,
    domsnap: Domsnap,
}

impl Place {
    fn new() -> Result<Self> {
        Self::made(tempfile::tempdir()?)
    }

    /// On a disk, wherever the temporary files of this run are: a file system in memory gives room back by
    /// its own pages.
    fn on_disk() -> Result<Self> {
        Self::made(tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR"))?)
    }

    fn made(dir: tempfile::TempDir) -> Result<Self> {
        let domsnap = Domsnap::new(&dir.path().join("state"));
        Ok(Self { dir, domsnap })
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn run(&self, line: &str, image: &Path) -> Result<Outcome> {
        let path = image.to_str().context("a path in UTF-8")?;
        let args: Vec<&str> = line.split(' ').map(|word| if word == "@" { path } else { word }).collect();
        self.domsnap.run(&args)
    }

    fn done(&self, line: &str, image: &Path) -> Result<Outcome> {
        self.run(line, image)?.expect_status(status::DONE)
    }

    fn refused(&self, line: &str, image: &Path) -> Result<Outcome> {
        self.run(line, image)?.expect_status(status::REFUSED)
    }
}

fn create(path: &Path, options: &str, size: &str) -> Result<()> {
    let options = if options.is_empty() { "cluster_size=64k" } else { options };
    let args = ["create", "-q", "-f", "qcow2", "-o", options].map(std::ffi::OsStr::new);
    qemu::img(&[&args[..], &[path.as_os_str(), size.as_ref()]].concat()).map(drop)
}

fn write(path: &Path, offset: u64, length: u64, byte: u8) -> Result<()> {
    qemu::write(path, &[Write { offset, length, byte: Some(byte) }])
}

/// An image of 4 KiB clusters with the snapshots s0 and s1, and data above them.
fn snapshots(path: &Path) -> Result<()> {
    create(path, "cluster_size=4k", "4M")?;
    for (byte, name) in [(1, "s0"), (2, "s1")] {
        write(path, 0, 400 << 10, byte)?;
        qemu::img(&["snapshot".as_ref(), "-c".as_ref(), name.as_ref(), path.as_os_str()])?;
    }
    write(path, 0, 64 << 10, 9)
}

/// Whether the image's first MiB is this byte.
fn shows(path: &Path, byte: u8) -> Result<bool> {
    Ok(qemu::read(path, None)?.iter().take(1 << 20).all(|found| *found == byte))
}

fn word_at(path: &Path, at: u64) -> Result<u64> {
    let mut bytes = [0; 8];
    std::fs::File::open(path)?.read_exact_at(&mut bytes, at)?;
    Ok(u64::from_be_bytes(bytes))
}

fn put_word(path: &Path, at: u64, word: u64) -> Result<()> {
    let file = std::fs::File::options().write(true).open(path)?;
    Ok(file.write_all_at(&word.to_be_bytes(), at)?)
}

fn taken(path: &Path) -> Result<u64> {
    std::fs::File::open(path)?.sync_all()?;
    Ok(std::fs::metadata(path)?.blocks() * 512)
}

/// QEMU has marked the image as corrupt: what would write it is refused before anything, and the domain is
/// not locked.
#[test]
fn image_marked_corrupt_is_refused_unchanged() -> Result<()> {
    for change in ["create @ n --internal", "revert @ s0", "delete @ s0"] {
        let place = Place::new()?;
        let image = place.path("a.qcow2");
        snapshots(&image)?;
        put_word(&image, 72, 2)?;
        let before = std::fs::read(&image)?;
        place.refused(change, &image)?;
        ensure!(std::fs::read(&image)? == before, "{change} changed the image");
        let list = place.done("list @ --json", &image)?.json::<Value>()?;
        ensure!(list["unfinished"].as_array().is_some_and(Vec::is_empty), "{change}: {list}");
        ensure!(list["snapshots"].as_array().is_some_and(|all| all.len() == 2), "{change}: {list}");
    }
    Ok(())
}

/// The L1 table of a snapshot is damaged: everything else goes on, its delete is refused before anything, and
/// with --force it is forgotten, by both verbs.
#[test]
fn damaged_snapshot_is_forgotten_with_force() -> Result<()> {
    for verb in ["delete", "disk delete"] {
        let place = Place::new()?;
        let image = place.path("a.qcow2");
        snapshots(&image)?;
        let table = word_at(&image, 64)?;
        let l1 = word_at(&image, table)?;
        put_word(&image, l1, 1 << 63 | 0x2000_0000_4000)?;
        let before = std::fs::read(&image)?;
        place.refused(&format!("{verb} @ s0"), &image)?;
        ensure!(std::fs::read(&image)? == before, "{verb} changed the image");
        place.done(&format!("{verb} @ s0 --force"), &image)?;
        let left = qemu::img(&["snapshot".as_ref(), "-l".as_ref(), image.as_os_str()])?;
        ensure!(!left.contains("s0") && left.contains("s1"), "{left}");
        place.done("create @ n --internal", &image)?;
        place.done("revert @ s1", &image)?;
        place.done("check @", &image)?;
    }
    Ok(())
}

/// Two snapshots have one name: a delete of either is refused, whatever the catalogue calls them.
#[test]
fn delete_of_an_ambiguous_tag_is_refused() -> Result<()> {
    let place = Place::new()?;
    let image = place.path("a.qcow2");
    create(&image, "", "16M")?;
    for byte in [1, 2] {
        write(&image, 0, 1 << 20, byte)?;
        qemu::img(&["snapshot".as_ref(), "-c".as_ref(), "dup".as_ref(), image.as_os_str()])?;
    }
    place.done("import @", &image)?;
    for change in ["delete @ dup", "delete @ dup-2", "revert @ dup", "disk delete @ dup"] {
        let before = std::fs::read(&image)?;
        place.refused(change, &image)?;
        ensure!(std::fs::read(&image)? == before, "{change} changed the image");
    }
    place.done("create @ next", &image).map(drop)
}

/// An overlay above an encrypted image would hold the guest's data in the clear: no operation makes one.
#[test]
fn encrypted_image_never_gets_a_clear_overlay() -> Result<()> {
    let place = Place::new()?;
    let image = place.path("e.qcow2");
    let secret = ["--object", "secret,id=s0,data=abc"];
    let luks = "encrypt.format=luks,encrypt.key-secret=s0,encrypt.iter-time=10";
    let args = [&["create", "-q"][..], &secret, &["-f", "qcow2", "-o", luks]].concat();
    let args: Vec<&std::ffi::OsStr> = args.into_iter().map(std::ffi::OsStr::new).collect();
    qemu::img(&[&args[..], &[image.as_os_str(), "16M".as_ref()]].concat())?;
    place.refused("create @ s --external", &image)?;
    // Internal snapshots need no key.
    place.done("create @ i --internal", &image)?;
    place.done("create @ j --internal", &image)?;
    place.done("revert @ i", &image)?;
    place.done("delete @ j", &image)?;
    ensure!(place.done("check @", &image)?.stdout.contains("all is well"));

    let over = place.path("over.qcow2");
    let args =
        ["create", "-q", "-f", "qcow2", "-u", "-F", "qcow2", "-b", "e.qcow2"].map(std::ffi::OsStr::new);
    qemu::img(&[&args[..], &[over.as_os_str(), "16M".as_ref()]].concat())?;
    place.refused("create @ s --external", &over)?;
    ensure!(std::fs::metadata(place.path("over.qcow2"))?.nlink() == 1, "a refusal left names behind");
    Ok(())
}

/// An overlay has the options of the image below it; what it has not is said.
#[test]
fn overlay_inherits_image_options() -> Result<()> {
    let place = Place::new()?;
    let image = place.path("o.qcow2");
    let options = "extended_l2=on,cluster_size=128k,compression_type=zstd,lazy_refcounts=on,refcount_bits=32";
    create(&image, options, "64M")?;
    place.done("create @ s --external", &image)?;
    let about = qemu::img(&["info".as_ref(), "--output=json".as_ref(), image.as_os_str()])?;
    let about: Value = serde_json::from_str(&about)?;
    let data = &about["format-specific"]["data"];
    ensure!(about["cluster-size"] == 131_072 && about["backing-filename"].is_string(), "{about}");
    for (option, wanted) in [
        ("extended-l2", Value::from(true)),
        ("compression-type", Value::from("zstd")),
        ("lazy-refcounts", Value::from(true)),
        ("refcount-bits", Value::from(32)),
    ] {
        ensure!(data[option] == wanted, "{option}: {data}");
    }
    let full = place.path("f.qcow2");
    create(&full, "preallocation=full", "8M")?;
    let said = place.done("create @ s --external", &full)?.stdout;
    ensure!(said.contains("allocated in full"), "{said}");
    Ok(())
}

/// What `show` says that a delete frees is what it frees, to the byte; with --no-punch nothing is.
#[test]
fn delete_frees_what_show_says() -> Result<()> {
    const EXTENT_BLOCK: u64 = 4096;
    for options in ["cluster_size=64k", "cluster_size=4k", "cluster_size=512", "cluster_size=2M"] {
        let place = Place::on_disk()?;
        let image = place.path("p.qcow2");
        create(&image, options, "32M")?;
        write(&image, 0, 4 << 20, 1)?;
        write(&image, 20 << 20, 4096, 7)?;
        place.done("create @ a --internal", &image)?;
        write(&image, 0, 4 << 20, 2)?;
        place.done("create @ b --internal", &image)?;
        write(&image, 1 << 20, 1 << 20, 3)?;
        write(&image, 21 << 20, 4096, 8)?;
        for name in ["a", "b"] {
            let shown = place.done(&format!("show @ {name} --json"), &image)?.json::<Value>()?;
            let said = shown["delete"][0]["cost"]["frees"].as_u64().context("what is freed")?;
            let before = taken(&image)?;
            place.done(&format!("delete @ {name}"), &image)?;
            let freed = before - taken(&image)?;
            // A file in many pieces has a block of ext4's own among those that are counted as its room. The
            // holes of a delete may be what makes it necessary.
            let is_exact = said == freed || said.abs_diff(freed) == EXTENT_BLOCK;
            ensure!(is_exact && freed > 512 << 10, "{options}: {name}: said {said}, freed {freed}");
        }
        qemu::img(&["check".as_ref(), "-q".as_ref(), image.as_os_str()])?;
    }
    let place = Place::on_disk()?;
    let image = place.path("n.qcow2");
    create(&image, "", "32M")?;
    write(&image, 0, 4 << 20, 1)?;
    place.done("create @ a --internal", &image)?;
    write(&image, 0, 4 << 20, 2)?;
    let before = taken(&image)?;
    place.done("delete @ a --no-punch", &image)?;
    ensure!(taken(&image)? == before, "--no-punch gave room back");
    Ok(())
}

/// A raw disk whose room is reserved has it after a revert.
#[test]
fn revert_keeps_the_room_of_a_reserved_raw_disk() -> Result<()> {
    let place = Place::new()?;
    let image = place.path("r.raw");
    let file = std::fs::File::create_new(&image)?;
    let reserved = std::process::Command::new("fallocate").args(["-l", "8M"]).arg(&image).status()?;
    ensure!(reserved.success(), "the room cannot be reserved");
    file.write_all_at(b"data", 4096)?;
    // As long as it is open for writing here, domsnap refuses it.
    drop(file);
    let disk = format!("vda={},format=raw", image.display());
    place.domsnap.done(&["domain", "add", "r", "--disk", &disk])?;
    place.domsnap.done(&["create", "r", "s", "--disk", "vda=copy"])?;
    let before = taken(&image)?;
    std::fs::File::options().write(true).open(&image)?.write_all_at(b"more", 4096)?;
    for _ in 0..2 {
        place.domsnap.done(&["revert", "r", "s"])?;
        ensure!(taken(&image)? >= before, "{before} bytes were reserved, {} are", taken(&image)?);
    }
    let mut found = [0; 4];
    std::fs::File::open(&image)?.read_exact_at(&mut found, 4096)?;
    ensure!(found == *b"data", "it is not what the snapshot holds");
    Ok(())
}

/// A raw point's checksum that is a FIFO, or is huge, is refused with a message.
#[test]
fn strange_checksum_file_of_a_raw_point_is_refused() -> Result<()> {
    let place = Place::new()?;
    let image = place.path("r.raw");
    std::fs::write(&image, vec![7; 1 << 20])?;
    let disk = format!("vda={},format=raw", image.display());
    place.domsnap.done(&["domain", "add", "r", "--disk", &disk])?;
    place.domsnap.done(&["create", "r", "s", "--disk", "vda=copy"])?;
    let sums = std::fs::read_dir(place.dir.path())?.flatten().map(|entry| entry.path());
    let sum =
        sums.into_iter().find(|path| path.extension().is_some_and(|e| e == "crc32")).context("a checksum")?;
    std::fs::File::options().write(true).open(&sum)?.set_len(20 << 30)?;
    let limited =
        place.domsnap.clone().through(&["timeout", "-s", "KILL", "60", "prlimit", "--as=1073741824"]);
    for args in [&["check", "r"][..], &["revert", "r", "s"]] {
        let outcome = limited.run(args)?;
        ensure!(matches!(outcome.status, Some(1 | 3)), "{outcome}");
    }
    std::fs::remove_file(&sum)?;
    ensure!(std::process::Command::new("mkfifo").arg(&sum).status()?.success(), "no FIFO can be made");
    for args in [&["check", "r"][..], &["revert", "r", "s"]] {
        let outcome = limited.run(args)?;
        ensure!(matches!(outcome.status, Some(1 | 3)), "{outcome}");
    }
    Ok(())
}

/// Tags in layers below are listed, and a revert leads to them, also after the layer was left.
#[test]
fn tags_in_lower_layers_are_listed_and_reached() -> Result<()> {
    let place = Place::new()?;
    let image = place.path("e.qcow2");
    create(&image, "", "16M")?;
    write(&image, 0, 1 << 20, 1)?;
    place.done("disk create @ a", &image)?;
    write(&image, 0, 1 << 20, 2)?;
    place.done("disk create @ b --external", &image)?;
    write(&image, 0, 1 << 20, 3)?;
    place.done("disk create @ t", &image)?;
    write(&image, 0, 1 << 20, 4)?;
    qemu::img(&["snapshot".as_ref(), "-c".as_ref(), "foreign".as_ref(), image.as_os_str()])?;
    place.done("disk revert @ b", &image)?;
    let listed = place.done("disk list @", &image)?.stdout;
    ensure!(["a ", "b ", "t ", "foreign "].iter().all(|name| listed.contains(name)), "{listed}");
    let checked = place.done("check @", &image)?.stdout;
    ensure!(!checked.contains("no snapshot needs"), "{checked}");
    for (name, byte) in [("t", 3), ("a", 1)] {
        place.done(&format!("disk revert @ {name}"), &image)?;
        ensure!(shows(&image, byte)?, "{name} is not what it was");
    }
    // One that another tool made in a layer that was left is adopted on request.
    place.refused("disk revert @ foreign", &image)?;
    place.done("import @ --replace", &image)?;
    place.done("disk revert @ foreign", &image)?;
    ensure!(shows(&image, 4)?, "foreign is not what it was");
    Ok(())
}

/// Whoever keeps dirty bitmaps for incremental backups is informed that they are of no use any more.
#[test]
fn changes_under_dirty_bitmaps_are_reported() -> Result<()> {
    let place = Place::new()?;
    let image = place.path("d.qcow2");
    create(&image, "", "16M")?;
    write(&image, 0, 1 << 20, 1)?;
    let bitmap = || qemu::img(&["bitmap".as_ref(), "--add".as_ref(), image.as_os_str(), "b0".as_ref()]);
    place.done("create @ i --internal", &image)?;
    bitmap()?;
    let said = place.done("create @ s --external", &image)?.stdout;
    ensure!(said.contains("full one"), "{said}");
    let said = place.done("delete @ s", &image)?.stdout;
    ensure!(said.contains("full one"), "{said}");
    Ok(())
}

/// Another program deletes an internal snapshot and makes one of the same name: it is not taken for the
/// recorded one.
#[test]
fn tag_made_again_is_not_reverted_to() -> Result<()> {
    let place = Place::new()?;
    let image = place.path("a.qcow2");
    create(&image, "", "4M")?;
    write(&image, 0, 1 << 20, 1)?;
    for name in ["old", "kept"] {
        place.done(&format!("create @ {name} --internal"), &image)?;
    }
    write(&image, 0, 1 << 20, 2)?;
    for word in ["-d", "-c"] {
        qemu::img(&["snapshot".as_ref(), word.as_ref(), "old".as_ref(), image.as_os_str()])?;
    }
    write(&image, 0, 1 << 20, 3)?;
    let before = std::fs::read(&image)?;
    let said = place.refused("revert @ old", &image)?.stderr;
    ensure!(said.contains("old") && said.contains("not the one that was taken"), "{said}");
    ensure!(std::fs::read(&image)? == before, "the refusal changed the image");
    let said = place.run("check @", &image)?.stdout;
    ensure!(said.contains("not the one that was taken"), "{said}");
    let said = place.done("create @ next --internal", &image)?.stdout;
    ensure!(said.contains("snapshot old: ") && said.contains("not the one that was taken"), "{said}");
    place.done("revert @ kept", &image)?;
    ensure!(shows(&image, 1)?, "the other snapshot is not what it was");
    // What the other program made is not ours to delete, and the domain is not locked by it.
    let said = place.done("delete @ old", &image)?.stdout;
    ensure!(said.contains("it stays in the image"), "{said}");
    let left = qemu::img(&["snapshot".as_ref(), "-l".as_ref(), image.as_os_str()])?;
    ensure!(left.contains("old") && left.contains("kept"), "{left}");
    place.done("import @ --replace", &image)?;
    place.done("revert @ old", &image)?;
    ensure!(shows(&image, 2)?, "the imported snapshot is not what the other program made");
    qemu::check(&image)?;
    // A catalogue that is lost finds the same in the manifests and images.
    for word in ["-d", "-c"] {
        qemu::img(&["snapshot".as_ref(), word.as_ref(), "kept".as_ref(), image.as_os_str()])?;
    }
    std::fs::remove_dir_all(place.path("state"))?;
    place.done("import @", &image)?;
    place.done("revert @ kept", &image)?;
    ensure!(shows(&image, 2)?, "what is called kept now is not what the image has");
    Ok(())
}
