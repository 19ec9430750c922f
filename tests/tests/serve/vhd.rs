//! VHD chains that are served: snapshots of the server's own, the next image opened beforehand, every point
//! read-only, and the server killed at each write, flush and rename.

use std::os::unix::fs::FileExt;
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use backend_vhd::image::{Chain, ChainOptions, ErrorKind, NewImage, OpenOptions, Vhd};
use domsnap_tests::domsnap::status;
use domsnap_tests::served::{Client, Server};
use domsnap_tests::{qemu, shim};
use serde_json::json;

use super::{Place, bytes, text};

const ID: &str = "6ba7b810-9dad-11d1-80b4-00c04fd430c8";
/// Bytes of the disks.
const SIZE: u64 = 16 << 20;

/// What the chain of an image shows.
fn shown(image: &Path) -> Result<Vec<u8>> {
    let mut chain = Chain::open(image, &ChainOptions::read_only())?;
    let mut bytes = vec![0; SIZE as usize];
    chain.read_at(&mut bytes, 0)?;
    Ok(bytes)
}

/// A dynamic image of QEMU's, `base.vhd`, with data, and what it shows.
pub fn base(place: &Place) -> Result<Vec<u8>> {
    let base = text(&place.file("base.vhd"));
    qemu::img(&["create", "-q", "-f", "vpc", "-o", "force_size=on", &base, "16M"])?;
    qemu::run("qemu-io", &["-f", "vpc", "-c", "write -P 1 0 5M", &base])?;
    let mut model = vec![0; SIZE as usize];
    model[..5 << 20].fill(1);
    Ok(model)
}

/// Writes that are acknowledged and not flushed.
fn write_some(client: &mut Client, model: &mut [u8], salt: u8) -> Result<()> {
    for number in 0..20 {
        let (at, data) = (number * 7919 % 30000 * 512, [number as u8 ^ salt; 1024]);
        client.write(at, &data)?;
        model[at as usize..at as usize + 1024].copy_from_slice(&data);
    }
    Ok(())
}

/// A VHD that QEMU made is written; the server freezes it and goes on in a child while a client is connected;
/// it is killed with a thousand writes that were not flushed; and the next one has them all. QEMU reads the
/// parent as it was frozen, and 7-Zip reads the child.
#[test]
fn vhd_chain_survives_snapshot_and_sigkill() -> Result<()> {
    let place = Place::new()?;
    let (base, child) = (place.file("base.vhd"), place.file("child.vhd"));
    qemu::img(&["create", "-q", "-f", "vpc", "-o", "force_size=on", &text(&base), "16M"])?;
    qemu::run("qemu-io", &["-f", "vpc", "-c", "write -P 1 0 5M", &text(&base)])?;
    let mut model = vec![0u8; 16 << 20];
    model[..5 << 20].fill(1);
    let mut server = place.serve("base.vhd,format=vhd", &[])?;
    let mut client = Client::connect(&place.file("s"))?;
    let mut write = |client: &mut Client, number: u64, salt: u8| {
        let (at, data) = (number * 7919 % 30000 * 512, [number as u8 ^ salt; 1024]);
        model[at as usize..at as usize + 1024].copy_from_slice(&data);
        client.write(at, &data).map(|()| model.clone())
    };
    let mut frozen = Vec::new();
    for number in 0..100 {
        frozen = write(&mut client, number, 0x33)?;
    }
    let id = "6ba7b810-9dad-11d1-80b4-00c04fd430c8";
    let snapshot = json!({ "do": "snapshot", "child": text(&child), "id": id });
    for _ in 0..2 {
        ensure!(server.ask(&snapshot)?["generation"] == 2, "the repeated snapshot was not recognised");
    }
    let info = server.ask(&json!({ "do": "info" }))?;
    ensure!(info["image"] == text(&child) && info["layers"].as_array().map(Vec::len) == Some(2), "{info}");
    let mut current = Vec::new();
    for number in 0..1000 {
        current = write(&mut client, number, 0xa5)?;
    }
    server.kill()?;
    let refused = place.domsnap().run(&[
        "disk",
        "serve",
        &format!("{},format=vhd", text(&child)),
        "--read-only",
        "--socket",
        &text(&place.file("t")),
    ])?;
    ensure!(refused.stderr.contains("for writing once"), "{refused}");
    let refused = place.domsnap().run(&["create", &format!("{},format=vhd", text(&child)), "s1"])?;
    let refused = refused.expect_status(status::REFUSED)?;
    ensure!(refused.stderr.contains("a server of") && refused.stderr.contains("disk serve"), "{refused}");
    let mut server = place.serve("child.vhd,format=vhd", &[])?;
    let copy = place.file("copy.raw");
    qemu::run("nbdcopy", &[&server.uri(), &text(&copy)])?;
    ensure!(bytes(&copy)? == current, "acknowledged writes are lost");
    let job = format!("--uri={}", server.uri());
    let args = ["--name=v", "--ioengine=nbd", "--rw=randwrite", "--bs=4k", "--iodepth=32", "--size=16M"];
    let more = [job.as_str(), "--verify=crc32c", "--verify_state_save=0", "--output-format=terse"];
    qemu::run("fio", &[&args[..], &more].concat())?;
    qemu::run("nbdcopy", &[&server.uri(), &text(&copy)])?;
    server.stop()?;
    let parent = place.file("parent.raw");
    qemu::img(&["convert", "-f", "vpc", "-O", "raw", &text(&base), &text(&parent)])?;
    ensure!(bytes(&parent)? == frozen, "the frozen image changed");
    let read = Command::new("7zz").args(["x", "-so", "-tvhd"]).arg(&child).output().context("7zz")?;
    ensure!(
        read.stdout == bytes(&copy)?,
        "7-Zip reads something else: {}",
        String::from_utf8_lossy(&read.stderr)
    );
    Ok(())
}

/// The next image is opened, locked and checked while the client writes: when the exchange comes, the server
/// does not read it again. What was written meanwhile is read through it. One that is not used is given back.
#[test]
fn next_image_is_opened_before_the_exchange() -> Result<()> {
    let place = Place::new()?;
    let mut model = base(&place)?;
    let (base, child) = (place.file("base.vhd"), place.file("child.vhd"));
    let server = place.serve("base.vhd,format=vhd", &[])?;
    let mut client = Client::connect(&place.file("s"))?;
    {
        let (child, base) = (child.as_path().try_into()?, base.as_path().try_into()?);
        backend_vhd::write_child(
            child,
            base,
            &NewImage::new(SIZE).on(backend_vhd::parent_name_for(child, base)?),
        )?;
    }
    let is_free = |image: &Path| match Vhd::open(image, &OpenOptions::read_only()) {
        Err(error) if error.kind() == ErrorKind::Locked => false,
        opened => opened.is_ok(),
    };
    let prepare = json!({ "do": "prepare", "image": text(&child) });
    server.ask(&prepare)?;
    ensure!(server.ask(&json!({ "do": "info" }))?["prepared"] == text(&child));
    ensure!(!is_free(&child), "the image that is prepared is not locked");
    server.ask(&json!({ "do": "forget" }))?;
    ensure!(is_free(&child) && server.ask(&json!({ "do": "info" }))?["prepared"].is_null());
    server.ask(&prepare)?;
    write_some(&mut client, &mut model, 0x33)?;
    // A server that reads the header in the exchange fails.
    let file = std::fs::File::options().read(true).write(true).open(&child)?;
    let mut header = [0; 1024];
    file.read_exact_at(&mut header, 512)?;
    file.write_all_at(&[0; 1024], 512)?;
    let swapped = server.ask(&json!({ "do": "swap", "image": text(&child) }));
    file.write_all_at(&header, 512)?;
    drop(file);
    ensure!(swapped?["generation"] == 2);
    ensure!(is_free(&base) && !is_free(&child), "the frozen image is for readers, and the child is not");
    let frozen = shown(&base)?;
    ensure!(frozen == model, "what was written after the preparation is not in the frozen image");
    write_some(&mut client, &mut model, 0xa5)?;
    ensure!(client.read(0, SIZE as usize)? == model);
    drop((client, server));
    ensure!(shown(&base)? == frozen, "the frozen image changed");
    let mut server = place.serve("child.vhd,format=vhd", &[])?;
    ensure!(Client::connect(&place.file("s"))?.read(0, SIZE as usize)? == model, "writes are lost");
    server.stop()?;
    Ok(())
}

/// The server is killed before, and in the middle of, each write, flush and rename of its own `snapshot`: the
/// old image or the new one can be served, with everything that was acknowledged, and the request can be
/// repeated.
#[test]
fn killed_snapshot_leaves_one_of_two_images() -> Result<()> {
    let place = Place::new()?;
    let first = base(&place)?;
    let original = bytes(&place.file("base.vhd"))?;
    let (_kept, list) = shim::outputs()?;
    // Each run has a directory of its own.
    let run = |number: usize| -> Result<std::path::PathBuf> {
        let directory = place.file(&format!("run-{number}"));
        std::fs::create_dir(&directory)?;
        std::fs::write(directory.join("base.vhd"), &original)?;
        Ok(directory)
    };
    let serve = |directory: &Path, name: &str, domsnap| {
        let image = format!("{},format=vhd", directory.join(name).display());
        Server::start(&domsnap, &place.file("s"), &[&image])
    };
    let request =
        |directory: &Path| json!({ "do": "snapshot", "child": directory.join("child.vhd"), "id": ID });
    let directory = run(0)?;
    let watched = shim::counting(shim::watching(place.domsnap(), &directory)?, &list);
    let mut server = serve(&directory, "base.vhd", watched)?;
    write_some(&mut Client::connect(&place.file("s"))?, &mut first.clone(), 0x33)?;
    let before = shim::counted(&list)?.len();
    server.ask(&request(&directory))?;
    let steps = shim::counted(&list)?.split_off(before);
    server.stop()?;
    ensure!(steps.len() >= 6, "{steps:?}");
    let mut kinds = (0, 0);
    for (number, step) in steps.iter().enumerate() {
        for torn in [false, true] {
            if torn && !step.can_tear() {
                continue;
            }
            let context = || format!("killed at {step:?}, torn: {torn}");
            let directory = run(2 * number + 1 + usize::from(torn))?;
            let watched = shim::killing(shim::watching(place.domsnap(), &directory)?, step.number, torn);
            let mut server = serve(&directory, "base.vhd", watched)?;
            let mut model = first.clone();
            write_some(&mut Client::connect(&place.file("s"))?, &mut model, 0x33)?;
            ensure!(server.ask(&request(&directory)).is_err(), "{}: it was not killed", context());
            server.kill()?;
            let has_child = directory.join("child.vhd").exists();
            let name = if has_child { "child.vhd" } else { "base.vhd" };
            kinds = (kinds.0 + u32::from(!has_child), kinds.1 + u32::from(has_child));
            let mut server = serve(&directory, name, place.domsnap()).with_context(context)?;
            let mut client = Client::connect(&place.file("s"))?;
            ensure!(client.read(0, SIZE as usize)? == model, "{}: acknowledged writes are lost", context());
            server.ask(&request(&directory)).with_context(context)?;
            let info = server.ask(&json!({ "do": "info" }))?;
            ensure!(info["layers"].as_array().map(Vec::len) == Some(2), "{}: {info}", context());
            let frozen = model.clone();
            write_some(&mut client, &mut model, 0xa5)?;
            drop(client);
            server.stop()?;
            ensure!(shown(&directory.join("child.vhd"))? == model, "{}", context());
            ensure!(shown(&directory.join("base.vhd"))? == frozen, "{}", context());
            std::fs::remove_dir_all(&directory)?;
        }
    }
    ensure!(kinds.0 > 0 && kinds.1 > 0, "both images are to be left: {kinds:?}");
    Ok(())
}

/// Every snapshot of a VHD chain is served read-only, also while the current state is served for writing, and
/// after its deletion.
#[test]
fn any_snapshot_of_a_vhd_is_served() -> Result<()> {
    let place = Place::new()?;
    let mut model = base(&place)?;
    std::fs::rename(place.file("base.vhd"), place.file("disk.vhd"))?;
    let disk = format!("{},format=vhd", text(&place.file("disk.vhd")));
    let mut points = Vec::new();
    for (number, name) in ["s1", "s2", "s3"].into_iter().enumerate() {
        let mut server = place.serve("disk.vhd,format=vhd", &[])?;
        write_some(&mut Client::connect(&place.file("s"))?, &mut model, number as u8 * 16 + 7)?;
        server.stop()?;
        place.domsnap().done(&["create", &disk, name])?;
        points.push((name, model.clone()));
    }
    let current = place.serve("disk.vhd,format=vhd", &[])?;
    let mut writer = Client::connect(&place.file("s"))?;
    let at = |name: &str| Server::start(&place.domsnap(), &place.file("t"), &[&disk, "--at", name]);
    for (number, (name, content)) in points.iter().enumerate() {
        write_some(&mut writer, &mut model, number as u8 + 0x80)?;
        let mut server = at(name)?;
        let info = server.ask(&json!({ "do": "info" }))?;
        ensure!(info["read_only"] == true && info["snapshot"] == *name, "{info}");
        ensure!(info["layers"].as_array().map(Vec::len) == Some(number + 1), "{info}");
        let mut reader = Client::connect(&place.file("t"))?;
        ensure!(reader.read(0, SIZE as usize)? == *content, "{name} differs");
        ensure!(reader.write(0, &[1; 512]).is_err(), "{name} was written");
        server.stop()?;
    }
    ensure!(writer.read(0, SIZE as usize)? == model);
    drop((writer, current));
    // The current server was killed: it has to complete the image before anything else.
    place.domsnap().run(&["delete", &disk, "s2"])?.expect_status(status::REFUSED)?;
    place.serve("disk.vhd,format=vhd", &[])?.stop()?;
    let server = at("s2")?;
    let held = place.domsnap().run(&["delete", &disk, "s2"])?.expect_status(status::REFUSED)?;
    ensure!(held.stderr.contains("is held by serve:"), "{held}");
    place.domsnap().done(&["delete", &disk, "s2", "--defer"])?;
    let mut reader = Client::connect(&place.file("t"))?;
    ensure!(reader.read(0, SIZE as usize)? == points[1].1, "the served snapshot changed by its deletion");
    drop((reader, server));
    place.domsnap().done(&["recover", &disk])?;
    for (name, content) in [&points[0], &points[2]] {
        let _server = at(name)?;
        ensure!(Client::connect(&place.file("t"))?.read(0, SIZE as usize)? == *content, "{name} differs");
    }
    ensure!(shown(&place.file("disk.vhd"))? == model);
    // The current state is not served for a snapshot that does not exist, of a raw file neither.
    place.raw("a.raw", 1)?;
    for image in [disk, format!("{},format=raw", text(&place.file("a.raw")))] {
        let error = Server::start(&place.domsnap(), &place.file("t"), &[&image, "--at", "s9"]).err();
        let error = error.with_context(|| format!("{image} is served for s9"))?;
        ensure!(error.to_string().contains("has no snapshot s9"), "{error}");
    }
    Ok(())
}

/// Operations on a domain at rest borrow the disk from its server, which has no client: a create, a revert
/// and a delete go through, and the server serves the current image after each. With a client they are
/// refused. Killed anywhere, the server goes on by itself in a state that is before or after the operation.
#[test]
fn idle_disk_is_lent_to_operations() -> Result<()> {
    let place = Place::new()?;
    let mut model = base(&place)?;
    let image = format!("vda={},format=vhd", text(&place.file("base.vhd")));
    place.domsnap().done(&["domain", "add", "d", "--disk", &image])?;
    let server = place.serve("base.vhd,format=vhd", &[])?;
    let info = || server.ask(&json!({ "do": "info" }));
    let socket = place.file("s");
    let shows = |model: &[u8]| -> Result<bool> {
        // A client is refused while the disk is lent, and the kernel may still be ending a process.
        let until = Instant::now() + Duration::from_secs(20);
        loop {
            match Client::connect(&socket) {
                Ok(mut client) => return Ok(client.read(0, SIZE as usize)? == model),
                Err(error) if Instant::now() >= until => return Err(error.context("no client is admitted")),
                Err(_) => std::thread::sleep(Duration::from_millis(20)),
            }
        }
    };
    // Nothing is flushed: the server does that before it lends the disk.
    write_some(&mut Client::connect(&socket)?, &mut model, 0x11)?;
    let first = model.clone();
    place.domsnap().done(&["create", "d", "first", "--dry-run"])?;
    place.domsnap().done(&["create", "d", "first"])?;
    ensure!(info()?["layers"].as_array().map(Vec::len) == Some(2), "{}", info()?);
    let mut client = Client::connect(&socket)?;
    write_some(&mut client, &mut model, 0x22)?;
    let refused = place.domsnap().run(&["create", "d", "no"])?.expect_status(status::REFUSED)?;
    let who = format!("process {}", std::process::id());
    ensure!(refused.stderr.contains(&who) && refused.stderr.contains("no changes made"), "{refused}");
    drop(client);
    place.domsnap().done(&["create", "d", "second"])?;
    let second = model.clone();
    for (name, model) in [("first", &first), ("second", &second), ("first", &first)] {
        place.domsnap().done(&["revert", "d", name])?;
        ensure!(shows(model)?, "the server does not show {name} after the revert");
    }
    // Killed at some of the calls of a revert that alternates between the two.
    let directory = place.file(".");
    let (_kept, list) = shim::outputs()?;
    shim::counting(shim::watching(place.domsnap(), &directory)?, &list).done(&["revert", "d", "second"])?;
    let calls = shim::counted(&list)?.len() as u64;
    ensure!(calls > 20, "{calls} calls");
    let mut kills = 0;
    for at in (3..calls).step_by(7) {
        let wanted = if shows(&first)? { "second" } else { "first" };
        let killed = shim::killing(shim::watching(place.domsnap(), &directory)?, at, false);
        kills += u32::from(killed.run(&["revert", "d", wanted])?.status.is_none());
        ensure!(shows(&first)? || shows(&second)?, "killed at call {at}: the server shows something else");
        if (calls / 2..calls / 2 + 7).contains(&at) {
            // The next recovery may take the image away that is grown.
            let resize = ["disk", "resize", &text(&place.file("base.vhd")), "64MiB"];
            let refused = place.domsnap().run(&resize)?.expect_status(status::REFUSED)?;
            ensure!(refused.stderr.contains("`domsnap recover d`"), "{refused}");
        }
        place.domsnap().done(&["recover", "d"]).with_context(|| format!("killed at call {at}"))?;
        ensure!(shows(&first)? || shows(&second)?, "killed at call {at}: wrong after the recovery");
        place.domsnap().done(&["check", "d"])?;
    }
    ensure!(kills > 3, "it was killed {kills} times");
    let model = if shows(&first)? { &first } else { &second };
    place.domsnap().done(&["delete", "d", "first", "second"])?;
    ensure!(shows(model)? && info()?["layers"].as_array().map(Vec::len) == Some(1), "{}", info()?);
    // A domain that changes its paths is refused: the server would go on in the frozen image.
    place.domsnap().done(&["domain", "remove", "d"])?;
    place.domsnap().done(&["domain", "add", "new", "--disk", &image, "--active-path", "new"])?;
    place.domsnap().run(&["create", "new", "no"])?.expect_status(status::REFUSED)?;
    Ok(())
}

/// The tools for one image borrow it from a server without a client, and are refused while there is one. What
/// a killed server had acknowledged is not lost by any of them.
#[test]
fn idle_disk_is_lent_to_the_tools() -> Result<()> {
    let place = Place::new()?;
    let mut model = base(&place)?;
    let (base, child, socket) = (place.file("base.vhd"), place.file("child.vhd"), place.file("s"));
    let (base_text, child_text, copy) = (text(&base), text(&child), text(&place.file("copy.img")));
    let mut server = place.serve("base.vhd,format=vhd", &[])?;
    let mut client = Client::connect(&socket)?;
    // Nothing is flushed: the server does that before it lends the image.
    write_some(&mut client, &mut model, 0x11)?;
    let refused = |args: &[&str], why: &str| -> Result<()> {
        let before = bytes(&base)?;
        let outcome = place.domsnap().run(args)?.expect_status(status::REFUSED)?;
        ensure!(outcome.stderr.contains(why) && outcome.stderr.contains("no changes made"), "{outcome}");
        ensure!(bytes(&base)? == before, "a refused command changed the image: {outcome}");
        Ok(())
    };
    let who = format!("process {}", std::process::id());
    refused(&["disk", "resize", &base_text, "24MiB"], &who)?;
    refused(&["disk", "check", &base_text, "--repair"], &who)?;
    drop(client);
    place.domsnap().done(&["disk", "resize", &base_text, "24MiB"])?;
    place.domsnap().done(&["disk", "check", &base_text, "--repair"])?;
    model.resize(24 << 20, 0);
    let info = server.ask(&json!({ "do": "info" }))?;
    ensure!(info["size"] == 24 << 20 && info["image"] == base_text.as_str(), "{info}");
    let shows = |model: &[u8]| -> Result<bool> { Ok(Client::connect(&socket)?.read(0, 24 << 20)? == model) };
    ensure!(shows(&model)?, "after the resize");
    server.ask(&json!({ "do": "snapshot", "child": child_text, "id": ID }))?;
    place.domsnap().done(&["disk", "relocate", &child_text, &base_text])?;
    let info = server.ask(&json!({ "do": "info" }))?;
    ensure!(info["layers"].as_array().map(Vec::len) == Some(2), "{info}");
    ensure!(shows(&model)?, "after the relocation");
    // The parent is read by the server, and not lent.
    refused(&["disk", "check", &base_text, "--repair"], "process")?;
    write_some(&mut Client::connect(&socket)?, &mut model, 0x22)?;
    server.kill()?;
    let before = bytes(&child)?;
    let lost = "not in the image yet";
    refused(&["disk", "resize", &child_text, "32MiB"], lost)?;
    refused(&["disk", "check", &child_text, "--repair"], lost)?;
    refused(&["disk", "relocate", &child_text, &base_text], lost)?;
    refused(&["disk", "materialise", &child_text, &copy, "--format", "raw"], lost)?;
    ensure!(bytes(&child)? == before && !Path::new(&copy).exists());
    let checked = place.domsnap().run(&["disk", "check", &child_text])?.expect_status(status::FAILED)?;
    ensure!(checked.stdout.contains(lost) && checked.stdout.contains("disk serve"), "{checked}");
    server = place.serve("child.vhd,format=vhd", &[])?;
    ensure!(shows(&model)?, "what the killed server had acknowledged");
    server.stop()?;
    place.domsnap().done(&["disk", "materialise", &child_text, &copy, "--format", "raw"])?;
    ensure!(bytes(Path::new(&copy))? == model);
    Ok(())
}
