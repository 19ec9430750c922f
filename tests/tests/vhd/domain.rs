//! Snapshots of a domain with disks of three formats, and the tools for one image.

use std::path::Path;

use anyhow::{Context, Result, ensure};
use backend_vhd::image::{Chain, ChainOptions};

use crate::place::{Place, SIZE, read, run, write};

/// Snapshots of one instant over a VHD, a qcow2 and a raw disk: reverts show each, deletes in any order keep
/// the others.
#[test]
fn three_formats_in_one_domain() -> Result<()> {
    let place = Place::new()?;
    let vhd = place.vhd("a.vhd")?;
    run("qemu-img", &["create", "-q", "-f", "qcow2", &place.text("b.qcow2"), &SIZE.to_string()])?;
    std::fs::write(place.file("c.img"), vec![0; SIZE])?;
    let disks = [
        format!("vda={},format=vhd", place.text("a.vhd")),
        format!("vdb={},format=qcow2", place.text("b.qcow2")),
        format!("vdc={},format=raw", place.text("c.img")),
    ];
    let domsnap = place.domsnap();
    let mut args = vec!["domain", "add", "web", "--disk"];
    args.extend(["", "--disk", "", "--disk", ""]);
    for (number, disk) in disks.iter().enumerate() {
        args[4 + 2 * number] = disk;
    }
    domsnap.done(&args)?;
    let mut states = Vec::new();
    for (number, name) in ["s1", "s2", "s3", "s4"].into_iter().enumerate() {
        // Parts of sectors' blocks, so that each layer has sectors of its parents.
        write(&vhd, 1000 + 4096 * number as u64, &vec![number as u8 + 1; 3000])?;
        write(&vhd, (1 + number as u64) << 20, &vec![number as u8 + 1; 512])?;
        let io = format!("write -q -P {} {}M 64k", number + 1, number);
        run("qemu-io", &["-f", "qcow2", "-c", &io, &place.text("b.qcow2")])?;
        domsnap.done(&["create", "web", name, "--disk-only", "--disk", "vdc=copy"])?;
        states.push(read(&vhd)?);
    }
    write(&vhd, 0, &[9; 512])?;
    for number in [0, 2, 3, 1] {
        domsnap.done(&["revert", "web", &format!("s{}", number + 1)])?;
        ensure!(read(&vhd)? == states[number], "s{} shows something else", number + 1);
    }
    write(&vhd, 5 << 20, &[7; 8192])?;
    let current = read(&vhd)?;
    domsnap.done(&["delete", "web", "s2"])?;
    ensure!(read(&vhd)? == current, "after the first delete");
    domsnap.done(&["check", "web"])?;
    for number in [2, 0, 3] {
        domsnap.done(&["revert", "web", &format!("s{}", number + 1), "--save-current=kept"])?;
        ensure!(read(&vhd)? == states[number], "s{} after the delete", number + 1);
        domsnap.done(&["revert", "web", "kept"])?;
        ensure!(read(&vhd)? == current, "kept");
        domsnap.done(&["delete", "web", "kept"])?;
    }
    domsnap.done(&["delete", "web", "s1", "s3", "s4"])?;
    ensure!(read(&vhd)? == current, "after all deletes");
    domsnap.done(&["check", "web"])?;
    let left: Vec<_> = std::fs::read_dir(place.directory())?
        .filter_map(|entry| entry.ok()?.file_name().into_string().ok())
        .filter(|name| name.starts_with("a.") && name.ends_with(".vhd"))
        .collect();
    ensure!(left == ["a.vhd"], "{left:?}");
    Ok(())
}

/// What a revert replaced comes back, and an undo of the undo is the identity.
#[test]
fn undo_swaps_states_of_a_vhd() -> Result<()> {
    let place = Place::new()?;
    let vhd = place.vhd("a.vhd")?;
    let domsnap = place.domsnap();
    domsnap.done(&["domain", "add", "web", "--disk", &format!("vda={}", place.disk("a.vhd"))])?;
    write(&vhd, 0, &[1; 4096])?;
    domsnap.done(&["create", "web", "s1"])?;
    let first = read(&vhd)?;
    write(&vhd, 1000, &[2; 3000])?;
    write(&vhd, 4 << 20, &[3; 512])?;
    let second = read(&vhd)?;
    domsnap.done(&["revert", "web", "s1", "--undo=free"])?;
    ensure!(read(&vhd)? == first);
    for wanted in [&second, &first, &second] {
        domsnap.done(&["undo", "web"])?;
        ensure!(read(&vhd)? == *wanted, "another state came back");
        domsnap.done(&["check", "web"])?;
    }
    domsnap.done(&["undo", "web", "--forget"])?;
    domsnap.done(&["delete", "web", "s1"])?;
    ensure!(read(&vhd)? == second && place.frozen("a")?.is_empty());
    Ok(())
}

/// A chain that was moved and renamed is found by its ids; `relocate`, `check --repair`, `resize` and
/// `materialise` work on it; QEMU reads the copies.
#[test]
fn tools_for_one_image() -> Result<()> {
    let place = Place::new()?;
    let vhd = place.vhd("disk.vhd")?;
    write(&vhd, 0, &[1; 4096])?;
    let domsnap = place.domsnap();
    let image = format!("{},format=vhd", place.text("disk.vhd"));
    domsnap.done(&["create", &image, "one"])?;
    write(&vhd, 512, &[2; 512])?;
    let shown = read(&vhd)?;
    // The chain as another machine gets it: other names.
    std::fs::create_dir(place.file("moved"))?;
    let frozen = std::fs::read_dir(place.directory())?
        .filter_map(Result::ok)
        .map(|entry| entry.path())
        .find(|path| {
            let name = path.file_name().unwrap_or_default().to_string_lossy();
            let same =
                std::fs::read(path).is_ok_and(|bytes| std::fs::read(&vhd).is_ok_and(|top| top == bytes));
            name.contains(".ds-") && !same
        })
        .context("no frozen layer")?;
    std::fs::copy(&frozen, place.file("moved/parent.vhd"))?;
    std::fs::copy(&vhd, place.file("moved/child.vhd"))?;
    let (child, parent) = (place.text("moved/child.vhd"), place.text("moved/parent.vhd"));
    let reported = domsnap.done(&["disk", "check", &child])?;
    ensure!(format!("{reported:?}").contains("no locator leads to the parent"), "{reported:?}");
    let stranger = place.vhd("moved/stranger.vhd")?;
    let refused = domsnap.run(&["disk", "relocate", &child, &stranger.display().to_string()])?;
    ensure!(refused.status == Some(3), "another image was accepted as the parent");
    domsnap.done(&["disk", "relocate", &child, &parent])?;
    let reported = domsnap.done(&["disk", "check", &child])?;
    ensure!(!format!("{reported:?}").contains("no locator"), "{reported:?}");
    ensure!(read(&place.file("moved/child.vhd"))? == shown);
    // The end of the file is lost.
    let file = std::fs::File::options().write(true).open(&child)?;
    file.set_len(file.metadata()?.len() - 512)?;
    drop(file);
    ensure!(write(Path::new(&child), 0, &[3; 512]).is_err(), "written without a footer");
    domsnap.done(&["disk", "check", &child, "--repair"])?;
    ensure!(read(&place.file("moved/child.vhd"))? == shown);
    // A parent is not resized below its child.
    let refused = domsnap.run(&["disk", "resize", &parent, "16M"])?;
    ensure!(refused.status == Some(3), "the parent of a child was resized");
    domsnap.done(&["disk", "resize", &child, "16M"])?;
    let mut larger = shown;
    larger.resize(16 << 20, 0);
    let mut chain = Chain::open(Path::new(&child), &ChainOptions::read_only())?;
    let mut bytes = vec![0; chain.size() as usize];
    chain.read_at(&mut bytes, 0)?;
    drop(chain);
    ensure!(bytes == larger, "the larger disk shows something else");
    let (fixed, raw) = (place.text("fixed.vhd"), place.text("copy.img"));
    domsnap.done(&["disk", "materialise", &child, &fixed, "--align", "1MiB"])?;
    domsnap.done(&["disk", "materialise", &child, &raw, "--to", "raw"])?;
    ensure!(std::fs::read(&raw)? == larger, "the raw copy");
    run("qemu-img", &["compare", "-q", "-f", "vpc", "-F", "raw", &fixed, &raw])?;
    let refused = domsnap.run(&["disk", "materialise", &child, &raw, "--to", "raw"])?;
    ensure!(refused.status == Some(3), "an existing file was written over");
    Ok(())
}
