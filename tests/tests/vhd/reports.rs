//! What users of other programs met with VHD, each tried in small. A test's doc line ends with the public
//! report that it is about.

use std::os::unix::fs::FileExt;
use std::path::Path;

use anyhow::{Context, Result, ensure};
use domsnap_tests::domsnap::status;
use domsnap_tests::mounted::{Mounted, may_mount};
use domsnap_tests::qemu;
use domsnap_tests::served::Client;

use crate::place::{Place, SIZE, read, read_by_engine, write};
use crate::support::{Dice, MIB, Maker, relative};

/// An image of Hyper-V's shape with data in each of its blocks.
fn full(size: u64, seed: u64) -> Maker {
    let mut dice = Dice::new(seed);
    let mut made = Maker::new(3, size);
    let block = made.block;
    for number in 0..size / block {
        made = made.put(number * block, &dice.bytes(8192));
    }
    made
}

/// The disk's size, by the footer at the end of a file.
fn current_size(file: &Path) -> Result<u64> {
    let bytes = std::fs::read(file)?;
    let footer = bytes.len() - 512;
    Ok(u64::from_be_bytes(bytes[footer + 48..footer + 56].try_into()?))
}

/// A child that names no file is reported with the reason and what to do, and is refused (blktap 436).
#[test]
fn child_that_names_nothing_is_refused() -> Result<()> {
    let place = Place::new()?;
    let mut child = Maker::child(&Maker::new(3, SIZE as u64), "");
    child.locators.clear();
    place.make("c.avhd", &child);
    let checked = place.domsnap().run(&["disk", "check", &place.text("c.avhd")])?;
    ensure!(checked.status == Some(status::FAILED), "{checked}");
    let said = format!("{}{}", checked.stdout, checked.stderr);
    for message in ["names no file as its parent", "no .vhd file with this id is in", "03030303-"] {
        ensure!(said.contains(message), "{message:?} is not in {said}");
    }
    let said = place.refused(&["create", &place.disk("c.avhd"), "one"])?;
    ensure!(said.contains("names no file") && said.contains("domsnap disk relocate"), "{said}");
    Ok(())
}

/// Blocks that lie over each other, over other structures or outside of the file are refused by every
/// command that would freeze, write or move them, and nothing is changed (dosbox-x 4218).
#[test]
fn overlapping_blocks_are_refused() -> Result<()> {
    let good = full(4 * MIB, 1);
    let bytes = good.bytes();
    let entry = |block: usize| u32::from_be_bytes(bytes[1536 + 4 * block..][..4].try_into().unwrap());
    let (first, end) = (entry(0), (bytes.len() / 512) as u32);
    for sector in [first, first + 1, 0, 2, 3, end - 1, end - 4096, end + 100, u32::MAX - 1] {
        let place = Place::new()?;
        let mut wrong = good.clone();
        wrong.bat.insert(1, sector);
        place.make("disk.vhd", &wrong);
        let said = place.refused(&["create", &place.disk("disk.vhd"), "one"])?;
        ensure!(said.contains("block 1") || said.contains("block 0"), "{sector}: {said}");
    }
    // A frozen layer and the current one that were sound when they were frozen.
    let place = Place::new()?;
    place.make("disk.vhd", &good);
    let disk = place.disk("disk.vhd");
    place.done(&["create", &disk, "one"])?;
    write(&place.file("disk.vhd"), 0, &[1; 512])?;
    write(&place.file("disk.vhd"), 2 * MIB, &[2; 512])?;
    place.done(&["create", &disk, "two"])?;
    let overlap = |image: &Path| -> Result<()> {
        let file = std::fs::File::options().read(true).write(true).open(image)?;
        let mut header = [0; 1536];
        file.read_exact_at(&mut header, 0)?;
        let table = u64::from_be_bytes(header[512 + 16..512 + 24].try_into()?);
        let mut entry = [0; 4];
        file.read_exact_at(&mut entry, table)?;
        Ok(file.write_all_at(&entry, table + 4)?)
    };
    for layer in place.frozen("disk")? {
        overlap(&layer)?;
    }
    for args in [&["revert", &disk, "one"][..], &["delete", &disk, "one"], &["delete", &disk, "two"]] {
        let said = place.refused(args)?;
        ensure!(said.contains("lies over another block"), "{args:?}: {said}");
    }
    let socket = place.text("s");
    let said = place.refused(&["disk", "serve", &disk, "--socket", &socket])?;
    ensure!(said.contains("lies over another block"), "serve: {said}");
    let said = place.refused(&["disk", "resize", &place.text("disk.vhd"), "64MiB"]);
    ensure!(said.is_err(), "the top itself is sound");
    Ok(())
}

/// Copies for Azure have whole MiB and the exact size of the disk otherwise, also of images whose table has
/// an entry too many or whose size another program rounded by the geometry (azure-vhd-utils 39,
/// azure-xplat-cli 1600 and 1784, xmigrate 234, AzureStorageExplorer 3029); QEMU knows them as VHDs
/// (coreos-assembler 1091).
#[test]
fn azure_sizes_are_exact() -> Result<()> {
    let place = Place::new()?;
    let longer = Maker { entries: Some(4), ..full(6 * MIB, 2) };
    place.make("longer.vhd", &longer);
    // Without force_size, QEMU makes a size that the geometry can state.
    crate::place::run("qemu-img", &["create", "-q", "-f", "vpc", &place.text("chs.vhd"), "5M"])?;
    place.make("odd.vhd", &full(6 * MIB + 512, 3));
    for (name, size, whole) in
        [("longer", 6 * MIB, 6 * MIB), ("chs", 0, 6 * MIB), ("odd", 6 * MIB + 512, 7 * MIB)]
    {
        let image = place.text(&format!("{name}.vhd"));
        let (fixed, raw) = (place.text(&format!("{name}.azure.vhd")), place.text(&format!("{name}.raw")));
        place.done(&["disk", "materialise", &image, &fixed, "--format", "vhd-fixed", "--align", "1MiB"])?;
        place.done(&["disk", "materialise", &image, &raw, "--format", "raw"])?;
        let size = if size == 0 { current_size(Path::new(&image))? } else { size };
        let made = std::fs::read(&fixed)?;
        ensure!(made.len() as u64 == whole + 512, "{name}: a file of {} bytes", made.len());
        ensure!(current_size(Path::new(&fixed))? == whole, "{name}: {}", current_size(Path::new(&fixed))?);
        let plain = std::fs::read(&raw)?;
        ensure!(plain.len() as u64 == size, "{name}: {} bytes, not {size}", plain.len());
        ensure!(made[..plain.len()] == plain[..], "{name}: the copies differ");
        ensure!(made[plain.len()..whole as usize].iter().all(|byte| *byte == 0), "{name}: not zeros behind");
        qemu::img(&["compare", "-q", "-f", "raw", "-F", "vpc", &raw, &fixed]).context(name)?;
        let info = qemu::img(&["info", "-f", "vpc", "--output=json", &fixed])?;
        let info: serde_json::Value = serde_json::from_str(&info)?;
        ensure!(info["virtual-size"] == whole && info["format"] == "vpc", "{name}: {info}");
    }
    Ok(())
}

/// Zeros that a client writes over an ancestor's data are read as zeros, by every reader and after merges;
/// over nothing they take no space (dosbox-x 4545).
#[test]
fn zeros_hide_an_ancestors_data() -> Result<()> {
    let place = Place::new()?;
    let image = place.vhd("disk.vhd")?;
    write(&image, 2 * MIB, &[0xF6; 8192])?;
    let disk = place.disk("disk.vhd");
    place.done(&["create", &disk, "one"])?;
    let empty = std::fs::metadata(&image)?.len();
    let mut server = place.serve("disk.vhd", &[])?;
    let io = |commands: &[&str]| {
        let uri = server.uri();
        let args = commands.iter().flat_map(|command| ["-c", command]);
        qemu::run("qemu-io", &["-f", "raw"].into_iter().chain(args).chain([uri.as_str()]).collect::<Vec<_>>())
    };
    io(&["write -z 4M 1M", "write -z -u 6M 64k", "discard 5M 64k", "flush"])?;
    ensure!(std::fs::metadata(&image)?.len() == empty, "zeros over nothing were stored");
    io(&[
        "write -z 2M 4k",
        "write -z -u 2052k 512",
        "flush",
        "read -P 0 2M 4608",
        "read -P 0xF6 2101760 3584",
    ])?;
    server.stop()?;
    let mut expected = vec![0; SIZE];
    expected[2 << 20..(2 << 20) + 8192].fill(0xF6);
    expected[2 << 20..(2 << 20) + 4608].fill(0);
    ensure!(read(&image)? == expected, "before the merge");
    place.done(&["delete", &disk, "one"])?;
    ensure!(read(&image)? == expected, "after the merge");
    Ok(())
}

/// A merge for which there is no room is refused with the numbers, and changes nothing. Where it is made all
/// the same (--force), it leaves both images as they were, with their footers, says how much is missing, and
/// succeeds once there is room (sm 102).
#[test]
fn merge_without_room_changes_nothing() -> Result<()> {
    if !may_mount("tmpfs") {
        return Ok(());
    }
    let mounted = Mounted::make_small("tmpfs", 40 << 20)?;
    let place = Place::at(mounted.domain())?;
    let image = place.make("disk.vhd", &full(24 * MIB, 4));
    let disk = place.disk("disk.vhd");
    place.done(&["create", &disk, "one"])?;
    write(&image, 0, &vec![5; 4 << 20])?;
    place.done(&["create", &disk, "two"])?;
    write(&image, 8 << 20, &vec![6; 1 << 20])?;
    let shown = read(&image)?;
    let filler = place.file("filler");
    let mut file = std::fs::File::create(&filler)?;
    while std::io::Write::write_all(&mut file, &[1; 4096]).is_ok() {}
    drop(file);
    let said = place.refused(&["delete", &disk, "one"])?;
    ensure!(said.contains("a merge adds ") && said.contains(" 0 B free"), "{said}");
    let outcome = place.domsnap().run(&["delete", &disk, "one", "--force"])?;
    let said = format!("{}{}", outcome.stdout, outcome.stderr);
    ensure!(!outcome.panicked() && said.contains("No space left"), "{outcome}");
    ensure!(outcome.status != Some(status::DONE) || said.contains("deferred"), "{outcome}");
    ensure!(read(&image)? == shown, "the full file system changed the disk");
    for (name, bytes) in place.images()? {
        ensure!(bytes[bytes.len() - 512..].starts_with(b"conectix"), "{name} has no footer");
    }
    std::fs::remove_file(&filler)?;
    place.done(&["recover"])?;
    ensure!(read(&image)? == shown, "after the merge");
    ensure!(place.frozen("disk")?.len() == 1, "the merge was not made");
    place.done(&["disk", "check", &place.text("disk.vhd")])?;
    Ok(())
}

/// Requests outside of the disk are refused and change nothing, also those whose end wraps (86Box 4337).
#[test]
fn requests_outside_of_the_disk_are_refused() -> Result<()> {
    let place = Place::new()?;
    let image = place.make("disk.vhd", &full(4 * MIB + 512, 5));
    let before = std::fs::read(&image)?;
    let mut server = place.serve("disk.vhd", &[])?;
    for (at, length) in [(4 * MIB + 512, 512), (4 * MIB, 1024), (u64::MAX - 511, 512), (1 << 62, 512)] {
        let mut client = Client::connect(&place.file("s"))?;
        ensure!(client.write(at, &vec![1; length]).is_err(), "{length} bytes at {at} were written");
        ensure!(client.read(at, length).is_err(), "{length} bytes at {at} were read");
    }
    server.stop()?;
    ensure!(std::fs::read(&image)? == before, "the image changed");
    Ok(())
}

/// Data of blocks that are stored by us is aligned to 4 KiB, also in an image whose own blocks are not
/// (makevhdx 5).
#[test]
fn new_blocks_are_aligned() -> Result<()> {
    let place = Place::new()?;
    let image = place.make("disk.vhd", &Maker::new(3, 16 * MIB).put(0, &[1; 4096]));
    write(&image, 4 * MIB, &[2; 512])?;
    write(&image, 8 * MIB, &[3; 512])?;
    place.done(&["create", &place.disk("disk.vhd"), "one"])?;
    write(&image, 6 * MIB, &[4; 512])?;
    write(&image, 2 * MIB, &[5; 512])?;
    let mut blocks = 0;
    for (name, bytes) in place.images()? {
        let table = u64::from_be_bytes(bytes[528..536].try_into()?) as usize;
        for block in 0..8 {
            let sector = u32::from_be_bytes(bytes[table + 4 * block..][..4].try_into()?);
            if sector != u32::MAX && block != 0 {
                blocks += 1;
                ensure!((u64::from(sector) * 512 + 512) % 4096 == 0, "{name}: block {block} at {sector}");
            }
        }
    }
    // The current image has two names.
    ensure!(blocks >= 4, "{blocks} blocks");
    Ok(())
}

/// The last sector of a disk whose last block is cut is read and written, through snapshots, copies and a
/// resize (dissect.hypervisor 11, rufus 2468).
#[test]
fn last_sector_of_a_partial_block_is_kept() -> Result<()> {
    let place = Place::new()?;
    let size = 5 * MIB + 512;
    let image = place.make("disk.vhd", &Maker::new(3, size).put(5 * MIB, &[7; 512]));
    let disk = place.disk("disk.vhd");
    place.done(&["create", &disk, "one"])?;
    let mut server = place.serve("disk.vhd", &[])?;
    let mut client = Client::connect(&place.file("s"))?;
    ensure!(client.read(5 * MIB, 512)? == [7; 512]);
    client.write(5 * MIB - 512, &[8; 1024])?;
    client.flush()?;
    drop(client);
    server.stop()?;
    let shown = read(&image)?;
    ensure!(shown[(5 << 20) - 512..] == [8; 1024]);
    ensure!(std::fs::read(place.raw_copy("disk.vhd", "copy.img")?)? == shown);
    place.done(&["delete", &disk, "one"])?;
    ensure!(read(&image)? == shown, "after the merge");
    place.done(&["disk", "resize", &place.text("disk.vhd"), "6MiB"])?;
    let larger = read(&image)?;
    ensure!(larger[..shown.len()] == shown && larger[shown.len()..].iter().all(|byte| *byte == 0));
    Ok(())
}

/// A child of a raw file shows it, gets snapshots of its own, and the raw file is never written (blktap 321,
/// sm 559).
#[test]
fn raw_parent_is_never_written() -> Result<()> {
    let place = Place::new()?;
    std::fs::write(place.file("base.img"), Dice::new(6).bytes(SIZE))?;
    let mut child = Maker::child(&Maker::new(3, SIZE as u64), "base.img");
    child.parent_id = [0; 16];
    child.locators = vec![(*b"W2ru", relative(".\\base.img"), 512)];
    let image = place.make("disk.vhd", &child.put(4096, &[9; 512]));
    let raw = std::fs::read(place.file("base.img"))?;
    let shown = |extra: &[(usize, u8)]| {
        let mut bytes = raw.clone();
        bytes[4096..4608].fill(9);
        extra.iter().for_each(|(at, value)| bytes[*at..*at + 512].fill(*value));
        bytes
    };
    let disk = place.disk("disk.vhd");
    place.done(&["create", &disk, "one"])?;
    write(&image, 1 << 20, &[8; 512])?;
    // 7-Zip does not read raw parents: the engine alone does.
    ensure!(read_by_engine(&image)? == shown(&[(1 << 20, 8)]), "the current state");
    place.done(&["revert", &disk, "one"])?;
    ensure!(read_by_engine(&image)? == shown(&[]), "the snapshot");
    place.done(&["delete", &disk, "one"])?;
    ensure!(read_by_engine(&image)? == shown(&[]), "after the delete");
    ensure!(std::fs::read(place.file("base.img"))? == raw, "the raw parent was written");
    Ok(())
}

/// A merge of a child that was made larger makes the parent larger, with a longer table whose new entries are
/// free (blktap 23, xen-orchestra 1939 and 2690).
#[test]
fn merge_of_a_larger_child_grows_the_parent() -> Result<()> {
    let place = Place::new()?;
    let image = place.make("disk.vhd", &full(4 * MIB, 7));
    let disk = place.disk("disk.vhd");
    place.done(&["create", &disk, "one"])?;
    place.done(&["disk", "resize", &place.text("disk.vhd"), "1GiB"])?;
    write(&image, 512, &[1; 512])?;
    write(&image, (1 << 30) - 512, &[2; 512])?;
    place.done(&["create", &disk, "two"])?;
    place.done(&["delete", &disk, "one"])?;
    place.done(&["delete", &disk, "two"])?;
    let file = std::fs::File::open(place.raw_copy("disk.vhd", "copy.img")?)?;
    ensure!(file.metadata()?.len() == 1 << 30);
    let mut sector = [0; 512];
    for (at, value) in [(512, 1), ((1 << 30) - 512, 2), (512 << 20, 0)] {
        file.read_exact_at(&mut sector, at)?;
        ensure!(sector == [value; 512], "byte {at}");
    }
    let left = place.images()?;
    ensure!(left.len() == 1, "{:?}", left.iter().map(|(name, _)| name).collect::<Vec<_>>());
    place.done(&["disk", "check", &place.text("disk.vhd")])?;
    Ok(())
}

/// Sizes beyond 2040 GiB are refused; the largest disk takes its last sector (blktap 35).
#[test]
fn larger_than_2040_gib_is_refused() -> Result<()> {
    let place = Place::new()?;
    let image = place.vhd("disk.vhd")?;
    for size in ["2041GiB", "2190433321472", "18446744073709551104"] {
        let said = place.refused(&["disk", "resize", &place.text("disk.vhd"), size])?;
        ensure!(said.contains("2040 GiB"), "{said}");
    }
    place.done(&["disk", "resize", &place.text("disk.vhd"), "2040GiB"])?;
    let disk = place.disk("disk.vhd");
    place.done(&["create", &disk, "one"])?;
    write(&image, (2040 << 30) - 512, &[1; 512])?;
    ensure!(write(&image, 2040 << 30, &[1; 512]).is_err(), "a sector behind the end was written");
    let mut chain = backend_vhd::image::Chain::open(&image, &backend_vhd::image::ChainOptions::read_only())?;
    let mut sector = [0; 512];
    chain.read_at(&mut sector, (2040 << 30) - 512)?;
    ensure!(sector == [1; 512]);
    Ok(())
}

/// Bytes between the last block and the footer, and a table that is padded with zeros, keep nothing from
/// being written; the footer stays at the end (xen-orchestra 2690).
#[test]
fn longer_file_keeps_its_footer_at_the_end() -> Result<()> {
    let place = Place::new()?;
    let mut longer = full(8 * MIB, 8);
    longer.mangle = |bytes| {
        let at = bytes.len() - 512;
        bytes.splice(at..at, [0; 3 * 512]);
    };
    let image =
        place.make("disk.vhd", &Maker { data: longer.data.clone().into_iter().take(2).collect(), ..longer });
    let mut shown = read(&image)?;
    let disk = place.disk("disk.vhd");
    place.done(&["create", &disk, "one"])?;
    write(&image, 6 * MIB, &[1; 512])?;
    shown[6 << 20..(6 << 20) + 512].fill(1);
    place.done(&["delete", &disk, "one"])?;
    ensure!(read(&image)? == shown);
    let bytes = std::fs::read(&image)?;
    ensure!(bytes[bytes.len() - 512..] == bytes[..512], "the footer is not at the end");
    place.done(&["disk", "check", &place.text("disk.vhd")])?;
    Ok(())
}

/// Writes that cross blocks are read by QEMU as they were made, beyond 8 GiB and up to the end of a disk of
/// 127 GiB, in a chain too (86Box 1111 and 5044).
#[test]
fn writes_cross_blocks_far_into_the_disk() -> Result<()> {
    let place = Place::new()?;
    let size = 127u64 << 30;
    let image = place.vhd_of("disk.vhd", size)?;
    let disk = place.disk("disk.vhd");
    // The first lies across the border of two blocks, the second has a whole block between two parts.
    let pieces = [
        (2 * MIB - 512, 1024, 1u8),
        ((8 << 30) - 4096, (2 << 20) + 8192, 2),
        (size - 2 * MIB - 512, 4096, 3),
    ];
    let judged = || -> Result<()> {
        let mut args = vec!["-f".to_owned(), "vpc".to_owned()];
        for (at, length, value) in pieces {
            args.extend(["-c".to_owned(), format!("read -P {value} {at} {length}")]);
            args.extend(["-c".to_owned(), format!("read -P 0 {} 512", at - 512)]);
        }
        args.extend(["-c".to_owned(), format!("read -P 4 {} 512", size - 512), place.text("disk.vhd")]);
        let said = qemu::run("qemu-io", &args.iter().map(String::as_str).collect::<Vec<_>>())?;
        ensure!(!said.contains("failed"), "{said}");
        Ok(())
    };
    for (at, length, value) in pieces {
        write(&image, at, &vec![value; length])?;
    }
    write(&image, size - 512, &[4; 512])?;
    judged().context("one image")?;
    place.done(&["create", &disk, "one"])?;
    for (at, length, value) in pieces {
        write(&image, at, &vec![value | 0x80; length])?;
    }
    for (at, length, value) in pieces {
        write(&image, at, &vec![value; length])?;
    }
    place.done(&["delete", &disk, "one"])?;
    judged().context("after a merge")?;
    place.done(&["disk", "check", &place.text("disk.vhd"), "--data"])?;
    Ok(())
}

/// A damaged footer at the start keeps nothing else from being examined (blktap 10).
#[test]
fn damaged_copy_of_the_footer_hides_no_error() -> Result<()> {
    let place = Place::new()?;
    let good = full(4 * MIB, 9);
    let first = u32::from_be_bytes(good.bytes()[1536..1540].try_into()?);
    let mut wrong = good.clone();
    wrong.bat.insert(1, first + 1);
    wrong.mangle = |bytes| bytes[40..60].fill(0xee);
    place.make("disk.vhd", &wrong);
    let checked = place.domsnap().run(&["disk", "check", &place.text("disk.vhd")])?;
    let checked = checked.expect_status(status::FAILED)?;
    let said = format!("{}{}", checked.stdout, checked.stderr);
    for message in ["lies over another block", "footer"] {
        ensure!(said.contains(message), "{message:?} is not in {said}");
    }
    // The footer alone is repaired, and the disk shows what it showed.
    let only = Maker { mangle: wrong.mangle, ..good };
    let image = place.make("sound.vhd", &only);
    let shown = read_by_engine(&image)?;
    place.done(&["disk", "check", &place.text("sound.vhd"), "--repair"])?;
    ensure!(read(&image)? == shown, "the repair changed the disk");
    Ok(())
}
