//! Cases of the format that the command itself must get right: sizes, directions, room, many children.

use std::path::Path;

use anyhow::{Context, Result, ensure};
use backend_vhd::image::{Chain, ChainOptions};
use domsnap_tests::domsnap::status;
use domsnap_tests::shim::{self, Often};

use crate::place::{Place, read, run, write};
use crate::support::{Dice, MIB, Maker};

/// Bytes written and flushes of VHD files in one command.
fn cost(place: &Place, args: &[&str]) -> Result<(u64, usize)> {
    let (_kept, list) = shim::outputs()?;
    shim::counting(shim::watching(place.domsnap(), place.directory())?, &list).done(args)?;
    let (mut bytes, mut flushes) = (0, 0);
    for call in shim::counted(&list)?.iter().filter(|call| is_of_an_image(&call.line)) {
        if call.line.starts_with("write ") {
            let length = call.line.rsplit_once(" length ").context("a write has a length")?.1;
            bytes += length.parse::<u64>()?;
        }
        flushes += usize::from(call.line.starts_with("flush "));
    }
    Ok((bytes, flushes))
}

/// Returns true for a call on an image; manifests are in a directory of its name.
fn is_of_an_image(line: &str) -> bool {
    line.contains(".vhd") && !line.contains(".domsnap")
}

/// A snapshot of a disk of 2040 GiB writes its own table and flushes the new file once, at any depth
/// (case 23).
#[test]
fn snapshot_of_the_largest_disk_is_one_flush() -> Result<()> {
    let place = Place::new()?;
    place.vhd("disk.vhd")?;
    place.done(&["disk", "resize", &place.text("disk.vhd"), "2040GiB"])?;
    let disk = place.disk("disk.vhd");
    for number in 0..3 {
        let (bytes, flushes) = cost(&place, &["create", &disk, &format!("s{number}")])?;
        ensure!(flushes <= 2, "snapshot {number} flushes {flushes} times");
        // Four bytes a block.
        ensure!(bytes <= (4 << 20) + 16384, "snapshot {number} writes {bytes} bytes");
    }
    Ok(())
}

/// A delete moves the smaller side: a megabyte into or out of a large layer (case 30); what is scattered into
/// an empty image costs its own bytes and little more (VHD.md 7).
#[test]
fn merge_writes_the_smaller_side() -> Result<()> {
    for (below, above) in [(32 << 20, 1 << 20), (1 << 20, 32 << 20)] {
        let place = Place::new()?;
        let image = place.vhd_of("disk.vhd", 96 << 20)?;
        write(&image, 0, &vec![9; 512])?;
        let disk = place.disk("disk.vhd");
        place.done(&["create", &disk, "one"])?;
        write(&image, 0, &vec![1; below])?;
        place.done(&["create", &disk, "two"])?;
        write(&image, 40 << 20, &vec![2; above])?;
        place.done(&["create", &disk, "three"])?;
        let (bytes, flushes) = cost(&place, &["delete", &disk, "two"])?;
        ensure!(bytes <= (1 << 20) + 32768, "{below} below {above}: {bytes} bytes written");
        ensure!(flushes <= 6, "{flushes} flushes");
        let shown = read(&image)?;
        ensure!(shown[0] == 1 && shown[(40 << 20)..(40 << 20) + above].iter().all(|byte| *byte == 2));
    }
    Ok(())
}

/// What `du` says that a delete frees is what the file system gets back, whichever layers are merged.
#[test]
fn deletes_free_what_du_says() -> Result<()> {
    use std::os::unix::fs::MetadataExt;
    let place = Place::new()?;
    let image = place.vhd_of("disk.vhd", 32 << 20)?;
    let disk = place.disk("disk.vhd");
    let mut dice = Dice::new(18);
    for number in 0..5 {
        for _ in 0..4 {
            // Parts of the system's blocks too.
            let (at, length) = (dice.below(60_000) * 512, (1 + dice.below(400)) * 512);
            write(&image, at, &vec![1 + dice.below(250) as u8; length as usize])?;
        }
        place.done(&["create", &disk, &format!("s{number}")])?;
    }
    write(&image, 3 << 20, &vec![7; 1 << 20])?;
    let room = || -> Result<i64> {
        let mut all = std::collections::BTreeMap::new();
        for (name, _) in place.images()? {
            let file = std::fs::File::open(place.file(&name))?;
            file.sync_all()?;
            let about = file.metadata()?;
            all.insert(about.ino(), about.blocks() as i64 * 512);
        }
        Ok(all.values().sum())
    };
    for set in [&["s2"][..], &["s0", "s3"], &["s1", "s4"]] {
        let args: Vec<&str> = ["du", &disk].iter().chain(set).chain(&["--json"]).copied().collect();
        let said: serde_json::Value = place.done(&args)?.json()?;
        let total = &said["together"]["total"];
        let frees = total["frees"].as_i64().context("freed bytes")?;
        let before = room()?;
        let args: Vec<&str> = ["delete", &disk].iter().chain(set).copied().collect();
        place.done(&args)?;
        let freed = before - room()?;
        // The file system has blocks of its own in a file of many pieces.
        ensure!((frees - freed).abs() <= 3 * 4096, "{set:?}: said {frees}, freed {freed}: {total}");
        ensure!(total["certainty"] == "exact", "{set:?}: {total}");
    }
    Ok(())
}

/// Sixty-four blocks that are merged into a sparse parent of 2040 GiB change some pages of its table, and not
/// the table (VHD.md 7: vhd-util writes 406 MB).
#[test]
fn merge_into_the_largest_disk_writes_little() -> Result<()> {
    let place = Place::new()?;
    let image = place.vhd("disk.vhd")?;
    place.done(&["disk", "resize", &place.text("disk.vhd"), "2040GiB"])?;
    let disk = place.disk("disk.vhd");
    place.done(&["create", &disk, "one"])?;
    let mut chain = Chain::open(&image, &ChainOptions::read_write())?;
    for number in 0..64 {
        chain.write_at(&[7; 65536], (number * 31) << 30)?;
    }
    chain.flush()?;
    drop(chain);
    let (bytes, flushes) = cost(&place, &["delete", &disk, "one"])?;
    ensure!(bytes <= 5_000_000, "{bytes} bytes written for 4.2 MB");
    ensure!(flushes <= 6, "{flushes} flushes");
    Ok(())
}

/// A chain of many layers is listed without one flush, and each of its files is read a little (VHD.md 7).
#[test]
fn list_of_a_deep_chain_flushes_nothing() -> Result<()> {
    let place = Place::new()?;
    place.vhd("disk.vhd")?;
    let disk = place.disk("disk.vhd");
    for number in 0..20 {
        place.done(&["create", &disk, &format!("s{number}")])?;
    }
    for args in [&["list", &disk][..], &["disk", "check", &place.text("disk.vhd")]] {
        let (bytes, flushes) = cost(&place, args)?;
        ensure!((bytes, flushes) == (0, 0), "{args:?}: {bytes} bytes and {flushes} flushes");
    }
    Ok(())
}

/// A file system that is full from any allocation on leaves every disk as it was or as it is to be, with its
/// footers, and the operation can be repeated (case 27).
#[test]
fn full_file_system_keeps_every_disk() -> Result<()> {
    let place = Place::new()?;
    let image = place.vhd("disk.vhd")?;
    let disk = place.disk("disk.vhd");
    write(&image, 0, &[1; 8192])?;
    place.done(&["create", &disk, "one"])?;
    write(&image, 4096, &[2; 8192])?;
    write(&image, 4 << 20, &[3; 512])?;
    let shown = read(&image)?;
    let saved = place.directory().with_extension("saved");
    let _remove = Remove(&saved);
    domsnap_tests::domain::copy_tree(place.directory(), &saved)?;
    for args in [&["create", &disk, "two"][..], &["delete", &disk, "one"]] {
        let (_kept, list) = shim::outputs()?;
        shim::counting(shim::watching(place.domsnap(), place.directory())?, &list).done(args)?;
        let calls = shim::counted(&list)?;
        let calls = calls.iter().filter(|call| call.line.starts_with("write ") && is_of_an_image(&call.line));
        for call in calls {
            std::fs::remove_dir_all(place.directory())?;
            domsnap_tests::domain::copy_tree(&saved, place.directory())?;
            let full = shim::watching(place.domsnap(), place.directory())?;
            let outcome = shim::failing(full, call.number, "ENOSPC", Often::FromThenOn).run(args)?;
            let what = format!("{} {}: {outcome}", call.number, call.line);
            ensure!(!outcome.panicked() && outcome.status != Some(status::DONE), "{what}");
            ensure!(outcome.stderr.contains("space"), "the reason is not said: {what}");
            ensure!(read(&image)? == shown, "the disk changed: {what}");
            place.done(&["recover"]).context(what.clone())?;
            ensure!(read(&image)? == shown, "the recovery changed the disk: {what}");
            for (name, bytes) in place.images()? {
                ensure!(bytes[bytes.len() - 512..] == bytes[..512], "{name}: footers of {what}");
            }
        }
        std::fs::remove_dir_all(place.directory())?;
        domsnap_tests::domain::copy_tree(&saved, place.directory())?;
    }
    Ok(())
}

/// Removes a directory at the end.
struct Remove<'a>(&'a Path);

impl Drop for Remove<'_> {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(self.0);
    }
}

/// A merge keeps what a child of another domain, which the catalogue does not know, shows of the parent: the
/// parent is kept, and the sibling's bytes are unchanged (case 28).
#[test]
fn foreign_child_keeps_its_parent() -> Result<()> {
    let place = Place::new()?;
    let image = place.vhd("disk.vhd")?;
    let disk = place.disk("disk.vhd");
    write(&image, 0, &Dice::new(1).bytes(65536))?;
    place.done(&["create", &disk, "one"])?;
    write(&image, 512, &[2; 4096])?;
    let frozen = place.frozen("disk")?.pop().context("no frozen layer")?;
    let name = frozen.file_name().context("no name")?.to_string_lossy().into_owned();
    let bytes = std::fs::read(&frozen)?;
    let mut stranger = Maker::child(&Maker::new(3, 8 * MIB), &name);
    stranger.parent_id = bytes[bytes.len() - 512 + 68..bytes.len() - 512 + 84].try_into()?;
    let stranger = place.make("stranger.vhd", &stranger.put(8192, &[5; 512]));
    let (ours, theirs) = (read(&image)?, read(&stranger)?);
    let before = std::fs::read(&stranger)?;
    let said = place.done(&["delete", &disk, "one"])?;
    ensure!(format!("{}{}", said.stdout, said.stderr).contains("stranger.vhd"), "{said}");
    ensure!(read(&image)? == ours && read(&stranger)? == theirs);
    ensure!(std::fs::read(&stranger)? == before, "the stranger's own file changed");
    Ok(())
}

/// A disk of a geometry that states another size has its own size everywhere: listed, served, copied
/// (cases 7 and 8).
#[test]
fn size_is_the_current_one_everywhere() -> Result<()> {
    let place = Place::new()?;
    let made = Maker {
        creator: *b"vpc ",
        geometry: Some((481, 4, 17)),
        original: 4 * MIB,
        ..Maker::new(3, 16 * MIB)
    };
    place.make("disk.vhd", &made.put(16 * MIB - 512, &[8; 512]));
    let image = place.text("disk.vhd");
    let said = place.done(&["disk", "check", &image])?;
    ensure!(said.stdout.contains("takes 16746496 bytes"), "{said}");
    let mut server = place.serve("disk.vhd", &[])?;
    let info = String::from_utf8(run("nbdinfo", &["--size", &server.uri()])?)?;
    ensure!(info.trim() == "16777216", "{info}");
    server.stop()?;
    ensure!(std::fs::metadata(place.raw_copy("disk.vhd", "copy.img")?)?.len() == 16 * MIB);
    let disk = place.disk("disk.vhd");
    place.done(&["create", &disk, "one"])?;
    ensure!(read(&place.file("disk.vhd"))?.ends_with(&[8; 512]), "the child has another size");
    Ok(())
}
