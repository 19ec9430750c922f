//! `domsnap serve`: the disks of a snapshot of a domain at rest, read-only, under its hold.

use std::collections::BTreeMap;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;

use anyhow::{Context, Result, ensure};
use domsnap_tests::domain::{Domain, NAME, Shape};
use domsnap_tests::domsnap::status;
use domsnap_tests::model::Bytes;
use domsnap_tests::qemu;
use domsnap_tests::served::{Client, Server};

/// Every disk of the server holds what the snapshot holds, by nbdcopy.
fn holds(server: &Server, domain: &Domain, disks: &BTreeMap<String, Bytes>) -> Result<()> {
    let raw = domain.root().join("copy.raw");
    for (target, bytes) in disks {
        ensure!(server.copy(target, &raw)? == **bytes, "{target} is served with other content");
    }
    Ok(std::fs::remove_file(raw)?)
}

fn refused(domain: &Domain, args: &[&str], why: &str) -> Result<()> {
    let outcome = domain.domsnap().run(args)?.expect_status(status::REFUSED)?;
    ensure!(outcome.stderr.contains(why), "{why}: {outcome}");
    Ok(())
}

/// The disks of an older snapshot are served while the domain is changed: by two servers, to clients that
/// cannot write, and it is held until the last one has ended, however that was.
fn serves(shape: &Shape, kind: &str) -> Result<()> {
    let mut domain = Domain::new(shape)?;
    domain.write_everywhere()?;
    for name in ["s1", "s2"] {
        domain.create(name, kind)?;
        domain.write_everywhere()?;
    }
    let disks = domain.model.snapshots["s1"].disks.clone();
    let (one, two) = (domain.root().join("one"), domain.root().join("two"));
    let domsnap = domain.domsnap();
    let mut first = Server::of_snapshot(&domsnap, &[NAME, "s1"], &one, "vda")?;
    holds(&first, &domain, &disks)?;
    for target in disks.keys() {
        let socket = one.join(format!("{target}.sock"));
        ensure!(std::fs::metadata(&socket)?.permissions().mode() & 0o777 == 0o600);
        ensure!(Client::connect(&socket)?.write(0, &[7; 4096]).is_err(), "a write is accepted");
        ensure!(Client::connect(&socket)?.zero(0, 4096).is_err(), "zeros are accepted");
    }
    let size = std::process::Command::new("nbdinfo").args(["--size", &first.uri()]).output()?;
    ensure!(String::from_utf8_lossy(&size.stdout).trim() == disks["vda"].len().to_string(), "{size:?}");
    refused(&domain, &["delete", NAME, "s1"], "serve:")?;
    refused(&domain, &["serve", NAME, "s1", "--dir", &one.display().to_string()], "another server answers")?;
    let mut second = Server::of_snapshot(&domsnap, &[NAME, "s1", "--disk", "vda"], &two, "vda")?;
    ensure!(std::fs::read_dir(&two)?.count() == 2, "a disk that was not asked for is served");

    // Other snapshots come and go, and the path of the image leads to another one.
    let more = if kind == "copy" { "copy" } else { "external" };
    domain.create("s3", more)?;
    domain.write_everywhere()?;
    domain.revert("s2")?;
    match kind {
        // It would be merged into the image that is read.
        "internal" => refused(&domain, &["delete", NAME, "s3"], "is being read by process")?,
        _ => domain.delete(&["s3"])?,
    }
    holds(&first, &domain, &disks)?;
    let raw = domain.root().join("two.raw");
    ensure!(second.copy("vda", &raw)? == *disks["vda"]);
    std::fs::remove_file(raw)?;

    first.stop()?;
    ensure!(!one.exists(), "the sockets are left");
    refused(&domain, &["delete", NAME, "s1"], "serve:")?;
    second.kill()?;
    domain.delete(&["s1"])?;
    // A killed server left its sockets, which the next one replaces.
    let mut third = Server::of_snapshot(&domsnap, &[NAME, "s2"], &two, "vda")?;
    holds(&third, &domain, &domain.model.snapshots["s2"].disks)?;
    third.stop()
}

#[test]
fn internal_snapshots_are_served() -> Result<()> {
    serves(&Shape::disks(2), "internal")
}

#[test]
fn external_snapshots_are_served() -> Result<()> {
    serves(&Shape::disks(2), "external")
}

#[test]
fn raw_snapshots_are_served() -> Result<()> {
    serves(&Shape::raw(1), "copy")
}

/// A frozen VHD is served while the domain's current image, a child of it, is written by a server of its own.
#[test]
fn vhd_snapshots_are_served() -> Result<()> {
    let place = super::Place::new()?;
    let model = super::vhd::base(&place)?;
    let image = super::text(&place.file("base.vhd"));
    let domsnap = place.domsnap();
    domsnap.done(&["domain", "add", "v", "--disk", &format!("vda={image},format=vhd")])?;
    domsnap.done(&["create", "v", "s1"])?;
    let dir = place.file("n");
    let mut server = Server::of_snapshot(&domsnap, &["v", "s1"], &dir, "vda")?;
    let mut writer = Server::start(&domsnap, &place.file("w"), &[&format!("{image},format=vhd")])?;
    Client::connect(&place.file("w"))?.write(0, &[9; 4096])?;
    ensure!(server.copy("vda", &place.file("raw"))? == model, "the frozen image shows something else");
    writer.stop()?;
    let outcome = domsnap.run(&["delete", "v", "s1"])?.expect_status(status::REFUSED)?;
    ensure!(outcome.stderr.contains("serve:"), "{outcome}");
    server.stop()?;
    domsnap.done(&["delete", "v", "s1"]).map(drop)
}

/// An internal snapshot that another program deletes is not served any more: a client gets an error, and not
/// what the clusters hold by now.
#[test]
fn deleted_snapshot_is_not_served() -> Result<()> {
    let mut domain = Domain::new(&Shape::disks(1))?;
    domain.write_and_create("s1", "internal")?;
    let dir = domain.root().join("n");
    let _server = Server::of_snapshot(&domain.domsnap(), &[NAME, "s1"], &dir, "vda")?;
    let mut client = Client::connect(&dir.join("vda.sock"))?;
    client.read(0, 4096)?;
    let path = domain.path("vda").display().to_string();
    let tags = qemu::img(&["snapshot", "-l", "-U", &path])?;
    let tag = tags.lines().find_map(|line| line.trim().strip_prefix("1 ")).context("a tag")?;
    let tag = tag.split_whitespace().next().context("a name")?.to_owned();
    qemu::img(&["snapshot", "-d", &tag, &path])?;
    ensure!(client.read(0, 4096).is_err(), "a snapshot that is gone is served");
    Ok(())
}

/// What cannot be served is refused, and leaves no hold and no socket.
#[test]
fn refused_servers_leave_nothing() -> Result<()> {
    let mut domain = Domain::new(&Shape::disks(1))?;
    domain.write_and_create("s1", "internal")?;
    let open = domain.root().join("open");
    std::fs::create_dir(&open)?;
    std::fs::set_permissions(&open, std::fs::Permissions::from_mode(0o777))?;
    let (open, file) = (open.display().to_string(), domain.path("vda").display().to_string());
    let nowhere = domain.root().join("no/where").display().to_string();
    for (args, why) in [
        (&["serve", NAME, "s2", "--dir", &nowhere][..], "s2"),
        (&["serve", NAME, "s1", "--dir", &open], "other users can change"),
        (&["serve", NAME, "s1", "--dir", &nowhere], "--dir"),
        (&["serve", NAME, "s1", "--dir", &file], &file),
        (&["serve", NAME, "s1", "--dir", &open, "--disk", "vdz"], "vdz"),
    ] {
        let outcome = domain.domsnap().run(args)?;
        ensure!(outcome.status != Some(status::DONE) && outcome.stderr.contains(why), "{why}: {outcome}");
        ensure!(std::fs::read_dir(&open)?.count() == 0, "a socket is left: {outcome}");
    }
    ensure!(!Path::new(&nowhere).exists());
    let held = domain.domsnap().done(&["list", NAME, "--json"])?;
    ensure!(!held.stdout.contains("serve:"), "a hold is left: {held}");
    domain.delete(&["s1"])
}
