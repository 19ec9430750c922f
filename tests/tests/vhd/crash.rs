//! The commands for one image, killed before and in the middle of each of their writes, and with a file
//! system that is full from each of them on. The operations of a domain are killed by the behaviour kit, and
//! power loss is in the engine's own tests.

use std::path::Path;

use anyhow::{Context, Result, ensure};
use backend_vhd::image::{Chain, ChainOptions};
use domsnap_tests::domsnap::{Outcome, status};
use domsnap_tests::shim::{self, Often};

use crate::place::{Place, read, write};
use crate::support::{Dice, MIB, Maker};

/// One command on an image.
struct Case {
    name: &'static str,
    /// Makes the images, and returns the command.
    prepare: fn(&Place) -> Result<Vec<String>>,
    /// Bytes of the disk after the command.
    size: u64,
    /// True if another program's layout keeps a torn header from being written again.
    may_tear: bool,
}

/// How the command is disturbed.
#[derive(Clone, Copy, PartialEq, Debug)]
enum Fault {
    Kill,
    Torn,
    Full,
}

/// Bytes of the disks before.
const BEFORE: u64 = 6 * MIB + 512;

fn args(args: &[&str]) -> Vec<String> {
    args.iter().map(|arg| (*arg).to_owned()).collect()
}

/// A parent and a child, the child as this engine lays it out or as Hyper-V does.
fn pair(place: &Place, ours: bool) -> Result<()> {
    let mut dice = Dice::new(7);
    let parent = Maker::new(3, BEFORE).put(0, &dice.bytes(8192)).put(4 * MIB, &dice.bytes(512));
    place.make("parent.vhd", &parent);
    let mut child =
        Maker::child(&parent, "elsewhere.vhd").put(512, &dice.bytes(1024)).put(6 * MIB, &dice.bytes(512));
    if ours {
        (child.creator, child.creator_version) = (*b"dsnp", 0x0001_0000);
        (child.table_at, child.align, child.padding) = (4096, 4096, 0xFF);
        child.locators.clear();
    }
    place.make("disk.vhd", &child);
    Ok(())
}

fn resize(place: &Place, ours: bool) -> Result<Vec<String>> {
    pair(place, ours)?;
    place.done(&["disk", "relocate", &place.text("disk.vhd"), &place.text("parent.vhd")])?;
    Ok(args(&["disk", "resize", &place.text("disk.vhd"), "4GiB"]))
}

fn repair(place: &Place, damage: fn(&mut Vec<u8>)) -> Result<Vec<String>> {
    pair(place, true)?;
    let mut bytes = std::fs::read(place.file("disk.vhd"))?;
    damage(&mut bytes);
    std::fs::write(place.file("disk.vhd"), bytes)?;
    Ok(args(&["disk", "check", "--repair", &place.text("disk.vhd")]))
}

fn relocate(place: &Place, ours: bool) -> Result<Vec<String>> {
    pair(place, ours)?;
    Ok(args(&["disk", "relocate", &place.text("disk.vhd"), &place.text("parent.vhd")]))
}

const CASES: [Case; 6] = [
    Case { name: "resize", prepare: |place| resize(place, true), size: 4 << 30, may_tear: true },
    Case {
        name: "repair of a lost footer",
        prepare: |place| repair(place, |bytes| bytes.truncate(bytes.len() - 512)),
        size: BEFORE,
        may_tear: true,
    },
    Case {
        name: "repair of a lost copy",
        prepare: |place| repair(place, |bytes| bytes[64] ^= 1),
        size: BEFORE,
        may_tear: true,
    },
    Case { name: "relocate", prepare: |place| relocate(place, true), size: BEFORE, may_tear: true },
    Case {
        name: "relocate of Hyper-V's",
        prepare: |place| relocate(place, false),
        size: BEFORE,
        may_tear: true,
    },
    Case {
        name: "resize of Hyper-V's",
        prepare: |place| resize(place, false),
        size: 4 << 30,
        may_tear: true,
    },
];

/// The first bytes of the disk, of the size before, and the size.
fn shown(image: &Path) -> Result<(Vec<u8>, u64)> {
    let mut chain = Chain::open(image, &ChainOptions::read_only())?;
    let mut bytes = vec![0; BEFORE as usize];
    chain.read_at(&mut bytes, 0)?;
    // What is behind is zeros.
    let size = chain.size();
    let mut at = BEFORE;
    while at < size
        && let Some(piece) = chain.piece(at)?
    {
        let mut last = vec![0; (piece.end - at).min(MIB) as usize];
        chain.read_at(&mut last, at)?;
        ensure!(last.iter().all(|byte| *byte == 0), "byte {at} and what follows are not zeros");
        at = piece.end;
    }
    Ok((bytes, size))
}

fn disturbed(place: &Place, args: &[String], number: u64, fault: Fault) -> Result<Outcome> {
    let watched = shim::watching(place.domsnap(), place.directory())?;
    let watched = match fault {
        Fault::Kill => shim::killing(watched, number, false),
        Fault::Torn => shim::killing(watched, number, true),
        Fault::Full => shim::failing(watched, number, "ENOSPC", Often::FromThenOn),
    };
    watched.run(args)
}

/// Whatever stops a resize, a repair or a relocation, the disk shows the same as before, and the command can
/// be repeated.
fn disturb_everywhere(case: &Case) -> Result<()> {
    let place = Place::new()?;
    let args = (case.prepare)(&place)?;
    let images = place.images()?;
    let (before, _) = shown(&place.file("disk.vhd"))?;
    let (_kept, list) = shim::outputs()?;
    shim::counting(shim::watching(place.domsnap(), place.directory())?, &list).done(&args)?;
    ensure!(shown(&place.file("disk.vhd"))? == (before.clone(), case.size), "{}: undisturbed", case.name);
    let calls: Vec<_> =
        shim::counted(&list)?.into_iter().filter(|call| call.line.contains("disk.vhd")).collect();
    ensure!(calls.len() >= 2, "{}: {calls:?}", case.name);
    for call in &calls {
        for fault in [Fault::Kill, Fault::Torn, Fault::Full] {
            if fault == Fault::Torn && !call.can_tear() {
                continue;
            }
            let what = format!("{}: {fault:?} at {} {}", case.name, call.number, call.line);
            for (name, bytes) in &images {
                std::fs::write(place.file(name), bytes)?;
            }
            let outcome = disturbed(&place, &args, call.number, fault)?;
            ensure!(
                !outcome.panicked() && outcome.status != Some(status::DONE) || fault == Fault::Full,
                "{what}: {outcome}"
            );
            let (now, size) = shown(&place.file("disk.vhd")).context(what.clone())?;
            ensure!(
                now == before && (size == BEFORE || size == case.size),
                "{what}: the disk shows something else"
            );
            let bytes = std::fs::read(place.file("disk.vhd"))?;
            let is_footer = |bytes: &[u8]| bytes.starts_with(b"conectix");
            ensure!(is_footer(&bytes) || is_footer(&bytes[bytes.len() - 512..]), "{what}: no footer");
            let mended = place.domsnap().run(&["disk", "check", "--repair", &place.text("disk.vhd")])?;
            if case.may_tear && fault == Fault::Torn && mended.stdout.contains("checksum") {
                // The header is torn between its two sectors: the disk is read, and copied.
                let copy = place.raw_copy("disk.vhd", "copy.img")?;
                ensure!(std::fs::read(&copy)? == before, "{what}: the copy");
                std::fs::remove_file(copy)?;
                continue;
            }
            ensure!(mended.status == Some(status::DONE), "{what}: {mended}");
            place.done(&args).context(what.clone())?;
            ensure!(shown(&place.file("disk.vhd"))? == (before.clone(), case.size), "{what}: repeated");
            place.done(&["disk", "check", &place.text("disk.vhd")]).context(what.clone())?;
            write(&place.file("disk.vhd"), 0, &[1; 512]).context(what)?;
        }
    }
    // 7-Zip, at the end.
    if case.size == BEFORE {
        read(&place.file("disk.vhd"))?;
    }
    Ok(())
}

/// A resize can be killed anywhere, and meet a full file system anywhere.
#[test]
fn disturbed_resize_keeps_the_disk() -> Result<()> {
    CASES.iter().filter(|case| case.name.starts_with("resize")).try_for_each(disturb_everywhere)
}

/// A repair can be killed anywhere, and meet a full file system anywhere.
#[test]
fn disturbed_repair_keeps_the_disk() -> Result<()> {
    CASES.iter().filter(|case| case.name.starts_with("repair")).try_for_each(disturb_everywhere)
}

/// A relocation can be killed anywhere, and meet a full file system anywhere.
#[test]
fn disturbed_relocation_keeps_the_disk() -> Result<()> {
    CASES.iter().filter(|case| case.name.starts_with("relocate")).try_for_each(disturb_everywhere)
}
