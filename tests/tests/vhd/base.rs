//! VHDs as bases of qcow2 overlays, at rest.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};
use backend_vhd::image::NewImage;
use domsnap_tests::idle::Idle;
use testguest::Version;

use crate::place::{Place, SIZE, run};
use crate::support::{Dice, MIB, Maker};

/// What QEMU shows of a qcow2 image.
fn shown(image: &Path) -> Result<Vec<u8>> {
    let raw = tempfile::NamedTempFile::new()?;
    let (image, copy) = (image.display().to_string(), raw.path().display().to_string());
    run("qemu-img", &["convert", "-U", "-f", "qcow2", "-O", "raw", &image, &copy])?;
    Ok(fs::read(copy)?)
}

fn write(image: &Path, byte: u8, at: u64, length: u64) -> Result<()> {
    let command = format!("write -q -P {byte} {at} {length}");
    run("qemu-io", &["-f", "qcow2", "-c", &command, &image.display().to_string()]).map(drop)
}

/// The path of the domain's one disk now.
fn path_of(place: &Place) -> Result<PathBuf> {
    let shown: serde_json::Value = place.done(&["domain", "show", "web", "--json"])?.json()?;
    let path = shown["domain"]["disks"][0]["path"].as_str().context("a path")?;
    Ok(path.into())
}

/// A domain with one VHD of this kind, with random data, and what it shows.
fn domain(place: &Place, kind: &str) -> Result<(PathBuf, Vec<u8>)> {
    let mut bytes = vec![0; SIZE];
    bytes[..MIB as usize].copy_from_slice(&Dice::new(5).bytes(MIB as usize));
    bytes[SIZE - 4096..].copy_from_slice(&Dice::new(6).bytes(4096));
    fs::write(place.file("content"), &bytes)?;
    let options = format!("force_size=on,subformat={kind}");
    let args = ["convert", "-f", "raw", "-O", "vpc", "-o", &options];
    run("qemu-img", &[&args[..], &[&place.text("content"), &place.text("disk.vhd")]].concat())?;
    fs::remove_file(place.file("content"))?;
    let disk = format!("vda={},format=vhd", place.text("disk.vhd"));
    place.done(&["domain", "add", "web", "--disk", &disk, "--active-path=new"])?;
    Ok((place.file("disk.vhd"), bytes))
}

/// The overlay has the size of the disk, also after reverts to the base and without a catalogue; the base
/// stays as it is; deletes merge.
#[test]
fn disk_goes_on_in_qcow2_overlays() -> Result<()> {
    for kind in ["fixed", "dynamic"] {
        let place = Place::new()?;
        let (vhd, first) = domain(&place, kind)?;
        let base = fs::read(&vhd)?;
        place.done(&["create", "web", "s1", "--disk", "vda=overlay"])?;
        let mut now = first.clone();
        let mut states = vec![first.clone()];
        for (number, name) in [(1_u8, "s2"), (2, "s3"), (3, "s4")] {
            let (path, at) = (path_of(&place)?, u64::from(number) * 300_000);
            let (at, length) = (at / 512 * 512, 70_144);
            write(&path, number, at, length)?;
            now[at as usize..(at + length) as usize].fill(number);
            states.push(now.clone());
            place.done(&["create", "web", name, "--external"])?;
        }
        for (number, name) in [(0, "s1"), (2, "s3"), (3, "s4"), (1, "s2")] {
            place.done(&["revert", "web", name])?;
            ensure!(shown(&path_of(&place)?)? == states[number], "{kind}: {name} shows something else");
        }
        // Above parts of clusters that only the base has.
        write(&path_of(&place)?, 9, 512, 512)?;
        let mut current = states[1].clone();
        current[512..1024].fill(9);
        place.done(&["delete", "web", "s2", "s4"])?;
        ensure!(shown(&path_of(&place)?)? == current, "{kind}: after the delete");
        place.done(&["check", "web"])?;
        // Without the catalogue: from the chain, and the manifests beside it.
        let path = path_of(&place)?;
        fs::rename(place.file("state"), place.file("lost"))?;
        place.done(&["import", &format!("{},format=qcow2", path.display())])?;
        place.done(&["check", "web"])?;
        place.done(&["revert", "web", "s1"])?;
        ensure!(shown(&path_of(&place)?)? == first, "{kind}: s1 at the end");
        place.done(&["delete", "web", "s1", "s3"])?;
        ensure!(shown(&path_of(&place)?)? == first, "{kind}: after all deletes");
        ensure!(fs::read(&vhd)? == base, "{kind}: the base was written");
    }
    Ok(())
}

/// Every point, also the base itself, is served and read-only.
#[test]
fn points_above_a_vhd_are_served() -> Result<()> {
    for kind in ["fixed", "dynamic"] {
        let place = Place::new()?;
        let (_, first) = domain(&place, kind)?;
        place.done(&["create", "web", "s1", "--disk", "vda=overlay"])?;
        write(&path_of(&place)?, 4, 4096, 65_536)?;
        place.done(&["create", "web", "s2", "--external"])?;
        let mut second = first.clone();
        second[4096..4096 + 65_536].fill(4);
        let path = format!("{},format=qcow2", path_of(&place)?.display());
        let server = domsnap_tests::served::Server::start(
            &place.domsnap(),
            &place.file("s.sock"),
            &[&path, "--at", "s2"],
        )?;
        run("nbdcopy", &[&server.uri(), &place.text("copy")])?;
        ensure!(fs::read(place.file("copy"))? == second, "{kind}: s2 is another");
    }
    Ok(())
}

/// What a guest writes to a raw disk does not make it a VHD: the size of the layers on it decides.
#[test]
fn footer_in_a_raw_disk_is_data() -> Result<()> {
    let place = Place::new()?;
    let (vhd, _) = domain(&place, "fixed")?;
    // The file, footer and all, is a raw disk with an overlay of its full length.
    let length = fs::metadata(&vhd)?.len();
    fs::copy(&vhd, place.file("raw.img"))?;
    place.done(&["domain", "remove", "web"])?;
    let disk = format!("vda={},format=raw", place.text("raw.img"));
    place.done(&["domain", "add", "web", "--disk", &disk, "--active-path=new"])?;
    let whole = fs::read(&vhd)?;
    place.done(&["create", "web", "s1", "--disk", "vda=overlay"])?;
    place.done(&["revert", "web", "s1"])?;
    let now = shown(&path_of(&place)?)?;
    ensure!(now.len() as u64 == length && now == whole, "the disk has {} bytes, not {length}", now.len());
    Ok(())
}

/// Refused before anything: a path that would come to name a qcow2 file, an image with children's data below
/// it, a size that versions of QEMU disagree on, a child as a base.
#[test]
fn what_qemu_would_not_show_is_refused() -> Result<()> {
    let place = Place::new()?;
    let image = format!("{},format=vhd", place.vhd("keep.vhd")?.display());
    let said = place.refused(&["create", &image, "s", "--disk", "vda=overlay"])?;
    ensure!(said.contains("--active-path=new"), "{said}");

    let odd = place.file("odd.vhd");
    let made = fs::File::options().read(true).write(true).create_new(true).open(&odd)?;
    backend_vhd::image::write_into(made, &odd, &NewImage::new(5 * MIB + 512))?;
    let disk = format!("vda={},format=vhd", odd.display());
    place.done(&["domain", "add", "odd", "--disk", &disk, "--active-path=new"])?;
    let said = place.refused(&["create", "odd", "s", "--disk", "vda=overlay"])?;
    ensure!(said.contains("versions of QEMU"), "{said}");

    let parent = Maker::new(3, 4 * MIB).put(0, &Dice::new(7).bytes(8192));
    place.make("parent.vhd", &parent);
    place.make("child.vhd", &Maker::child(&parent, "parent.vhd").put(512, &Dice::new(8).bytes(512)));
    let disk = format!("vda={},format=vhd", place.text("child.vhd"));
    place.done(&["domain", "add", "child", "--disk", &disk, "--active-path=new"])?;
    let said = place.refused(&["create", "child", "s", "--disk", "vda=overlay"])?;
    ensure!(said.contains("reads zeros"), "{said}");
    let args = ["create", "-q", "-u", "-f", "qcow2", "-F", "vpc", "-b", "child.vhd"];
    run("qemu-img", &[&args[..], &[&place.text("top.qcow2"), "4M"]].concat())?;
    let image = format!("{},format=qcow2", place.text("top.qcow2"));
    let said = place.refused(&["create", &image, "s", "--external"])?;
    ensure!(said.contains("reads zeros"), "{said}");
    Ok(())
}

/// The size that is said to be QEMU's is what both versions of QEMU show, for every program that makes VHDs.
#[test]
fn sizes_are_those_of_qemu() -> Result<()> {
    let place = Place::new()?;
    let creators = [
        *b"win ", *b"qem2", *b"d2v ", *b"CTXS", *b"tap\0", *b"wa\0\0", *b"vpc ", *b"qemu", *b"dsnp", *b"vbox",
    ];
    let mut images = Vec::new();
    for (number, creator) in creators.into_iter().enumerate() {
        let mut maker = Maker::new(3, 5 * MIB + 512).put(0, &[1; 512]);
        (maker.creator, maker.creator_version) = (creator, 0x0001_0000);
        images.push(place.make(&format!("{number}.vhd"), &maker));
    }
    let mut shown: Vec<Vec<u64>> = vec![Vec::new(); images.len()];
    for (version, name) in [(Version::New, "new"), (Version::Old, "old")] {
        let mut args = Vec::new();
        for (number, image) in images.iter().enumerate() {
            args.push("-blockdev".to_owned());
            let file = format!("file.driver=file,file.filename={}", image.display());
            args.push(format!("driver=vpc,read-only=on,node-name=v{number},{file}"));
        }
        let args: Vec<&str> = args.iter().map(String::as_str).collect();
        let machine = Idle::start(version, place.directory(), name, &args)?;
        let nodes = machine.qmp("query-named-block-nodes", serde_json::json!({ "flat": true }))?;
        for (number, seen) in shown.iter_mut().enumerate() {
            let mut all = nodes.as_array().into_iter().flatten();
            let node = all.find(|node| node["node-name"] == format!("v{number}")).context("no node")?;
            seen.push(node["image"]["virtual-size"].as_u64().context("a size")?);
        }
        machine.quit()?;
    }
    let options = backend_vhd::image::OpenOptions::read_only();
    for ((image, creator), seen) in images.iter().zip(creators).zip(shown) {
        let name = String::from_utf8_lossy(&creator).into_owned();
        let footer = backend_vhd::image::Vhd::open(image, &options)?.footer().clone();
        match footer.size_in_qemu() {
            Some(size) => ensure!(seen.iter().all(|seen| *seen == size), "{name}: {size}, and {seen:?}"),
            None => ensure!(seen[0] != seen[1], "{name}: both versions show {seen:?}"),
        }
    }
    Ok(())
}
