//! Sizes of snapshots: what `du` says that a delete frees is what the file system gets back, and what does
//! not fit is refused before anything, with the numbers.

use std::collections::{BTreeMap, BTreeSet};
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use domsnap_tests::domain::{Domain, NAME, Shape};
use domsnap_tests::domsnap::{Domsnap, status};
use domsnap_tests::idle::Idle;
use domsnap_tests::mounted::{Mounted, may_mount};
use domsnap_tests::qemu::{self, Write};
use domsnap_tests::seed::{Seed, from_env};
use serde_json::Value;
use testguest::Version;

const MIB: u64 = 1 << 20;

/// Bytes of the images and points in a directory, each file once. Manifests are no part of them.
fn images(directory: &Path) -> Result<u64> {
    let mut seen = BTreeMap::new();
    for entry in std::fs::read_dir(directory)? {
        let entry = entry?;
        if entry.file_type()?.is_file() {
            std::fs::File::open(entry.path())?.sync_all()?;
            let about = entry.metadata()?;
            seen.insert(about.ino(), about.blocks() * 512);
        }
    }
    Ok(seen.values().sum())
}

fn du(domsnap: &Domsnap, domain: &str, names: &[&str]) -> Result<Value> {
    let args: Vec<&str> = ["du", domain].iter().chain(names).chain(&["--json"]).copied().collect();
    domsnap.done(&args)?.json()
}

fn frees(report: &Value) -> Result<u64> {
    report["together"]["total"]["frees"].as_u64().with_context(|| report.to_string())
}

fn certainty(report: &Value) -> &str {
    report["together"]["total"]["certainty"].as_str().unwrap_or_default()
}

/// Deletes a set, and compares what that frees with what was said.
fn delete_as_said(domain: &mut Domain, set: &[&str], within: u64) -> Result<()> {
    let report = du(&domain.domsnap(), NAME, set)?;
    let said = frees(&report)?;
    let before = images(&domain.disks())?;
    domain.delete(set)?;
    let freed = before as i64 - images(&domain.disks())? as i64;
    let what = format!("{set:?}: said {said}, freed {freed}: {}", report["together"]);
    match certainty(&report) {
        // A file in many pieces has blocks of ext4's own, one for each file that was written.
        "exact" => ensure!((said as i64 - freed).abs() <= within as i64, "{what}"),
        "at-most" => ensure!(freed <= said as i64 + within as i64, "{what}"),
        "estimate" => ensure!((said as i64 - freed).abs() <= (MIB / 2) as i64, "{what}"),
        other => anyhow::bail!("{other}: {what}"),
    }
    Ok(())
}

/// A domain on a disk, wherever the temporary files of this run are: a file system in memory gives room back
/// by its own pages.
fn on_disk(shape: &Shape) -> Result<(Domain, tempfile::TempDir)> {
    let dir = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR"))?;
    Ok((Domain::new_in(&dir.path().join("domain"), shape)?, dir))
}

/// Random trees of internal and external snapshots: sets of them are deleted, and free what `du` said.
#[test]
fn deletes_free_what_du_says() -> Result<()> {
    for case in 0..from_env("DOMSNAP_PROPERTY_CASES", 3) {
        let mut seed = Seed::new(0xd0 + case);
        let options = seed.pick(&["cluster_size=64k", "cluster_size=4k"]);
        let shape = Shape { size: 16 * MIB, ..Shape::disks(1) }.options(options);
        let (mut domain, _disk) = on_disk(&shape)?;
        let mut names: Vec<String> = Vec::new();
        for number in 0..5 {
            let writes: Vec<Write> = (0..3)
                .map(|_| Write {
                    offset: seed.below(240) * 65_536,
                    length: (1 + seed.below(8)) * 65_536,
                    byte: (!seed.chance(20)).then(|| 1 + seed.below(250) as u8),
                })
                .collect();
            domain.write("vda", &writes)?;
            let name = format!("s{number}");
            domain.create(&name, seed.pick(&["internal", "external", "external"]))?;
            names.push(name);
            if number == 2 && seed.chance(50) {
                domain.revert("s1")?;
            }
        }
        domain.write_everywhere()?;
        let all = du(&domain.domsnap(), NAME, &[])?;
        ensure!(all["snapshots"].as_array().is_some_and(|all| all.len() == 5), "{all}");
        while !names.is_empty() {
            let count = 1 + seed.below(2.min(names.len() as u64)) as usize;
            let set: Vec<String> =
                (0..count).map(|_| names.remove(seed.below(names.len() as u64) as usize)).collect();
            let set: Vec<&str> = set.iter().map(String::as_str).collect();
            delete_as_said(&mut domain, &set, 3 * 4096).with_context(|| format!("case {case}, {options}"))?;
        }
        domain.verify()?;
    }
    Ok(())
}

/// Copies are counted by their blocks, and reflinks as far as the file system tells whom they are shared
/// with.
#[test]
fn raw_points_free_what_du_says() -> Result<()> {
    let (mut copies, _disk) = on_disk(&Shape::raw(1))?;
    for name in ["s1", "s2"] {
        copies.write_and_create(name, "copy")?;
    }
    delete_as_said(&mut copies, &["s1", "s2"], 0)?;
    if !may_mount("xfs") {
        return Ok(());
    }
    let mounted = Mounted::make("xfs", 512 << 20)?;
    let shape = Shape { size: 32 * MIB, ..Shape::raw(1) };
    let mut domain = Domain::new_in(mounted.domain(), &shape)?;
    domain.fill(16 * MIB)?;
    domain.create("s1", "reflink")?;
    domain.create("s2", "reflink")?;
    let said = du(&domain.domsnap(), NAME, &[])?;
    for size in said["snapshots"].as_array().context("snapshots")? {
        let (alone, shared) = (size["alone"]["total"]["frees"].as_u64(), size["shared"].as_u64());
        // A checksum is its own.
        ensure!(alone.is_some_and(|bytes| bytes <= 4096), "all is shared with the disk: {size}");
        ensure!(shared.is_some_and(|bytes| bytes >= 16 * MIB), "{size}");
    }
    domain.fill(8 * MIB)?;
    // Each has 8 MiB that the disk has no more, and shares them with the other alone.
    let alone = du(&domain.domsnap(), NAME, &["s1"])?;
    ensure!(frees(&alone)? <= 4096 && certainty(&alone) == "exact", "{alone}");
    let both = du(&domain.domsnap(), NAME, &["s1", "s2"])?;
    ensure!(frees(&both)?.abs_diff(8 * MIB) <= 65_536 && certainty(&both) == "at-most", "{both}");
    let why = both["together"]["disks"][0]["delete"]["why"].as_str().unwrap_or_default();
    ensure!(why.contains("may be shared with other files"), "{both}");
    let space = || -> Result<u64> {
        rustix::fs::sync();
        let about = rustix::fs::statvfs(mounted.path())?;
        Ok(about.f_bfree * about.f_frsize)
    };
    let before = space()?;
    domain.delete(&["s1", "s2"])?;
    // xfs gives the blocks of a removed file back a moment later.
    let until = Instant::now() + Duration::from_secs(60);
    while (space()?.saturating_sub(before)).abs_diff(8 * MIB) > 256 << 10 {
        ensure!(Instant::now() < until, "{} bytes came back", space()?.saturating_sub(before));
        std::thread::sleep(Duration::from_millis(20));
    }
    domain.verify()
}

/// Public reports of wrong sizes, each in small.
#[test]
fn public_reports_do_not_happen_here() -> Result<()> {
    let one = |domain: &Domain, name: &str| -> Result<Value> {
        Ok(du(&domain.domsnap(), NAME, &[name])?["snapshots"][0].clone())
    };
    let exclusive = |size: &Value| size["alone"]["total"]["frees"].as_u64().unwrap_or(u64::MAX);
    for kind in ["internal", "external"] {
        let shape = Shape { size: 32 * MIB, ..Shape::disks(1) }.options("cluster_size=64k");
        let (mut domain, _disk) = on_disk(&shape)?;
        domain.fill(8 * MIB)?;
        domain.create("s1", kind)?;
        // A snapshot after which nothing was written has no size of its own (rockstor 1376, vCheck 241,
        // cloudstack 485: the whole disk was shown).
        let size = one(&domain, "s1")?;
        ensure!(exclusive(&size) <= 4 * 65_536, "{kind}: {size}");
        ensure!(size["shared"].as_u64().is_some_and(|bytes| bytes >= 8 * MIB), "{kind}: {size}");
        // What was written after it is its size (xen-orchestra 4658: a snapshot has none).
        domain.fill(2 * MIB)?;
        let size = one(&domain, "s1")?;
        ensure!(exclusive(&size).abs_diff(2 * MIB) <= 5 * 65_536, "{kind}: {size}");
        // Two snapshots of one state free that together, and nothing alone (zfs 1393, btrfs-du 20).
        domain.create("s2", kind)?;
        domain.create("s3", kind)?;
        domain.fill(4 * MIB)?;
        for name in ["s2", "s3"] {
            let size = one(&domain, name)?;
            ensure!(exclusive(&size) <= 4 * 65_536, "{kind}: {name}: {size}");
        }
        let both = frees(&du(&domain.domsnap(), NAME, &["s2", "s3"])?)?;
        ensure!(both.abs_diff(2 * MIB) <= 8 * 65_536, "{kind}: {both}");
        // A resize changes no size of a snapshot (OpenNebula 6503: the current size of the disk was taken).
        let before = one(&domain, "s1")?;
        qemu::img(&["resize".as_ref(), "-q".as_ref(), domain.path("vda").as_os_str(), "4G".as_ref()])?;
        let after = one(&domain, "s1")?;
        ensure!(exclusive(&before).abs_diff(exclusive(&after)) <= 65_536, "{kind}: {before}, {after}");
    }
    // The file of an image does not become smaller by itself (virtual-dsm 807): it is said what is free
    // inside.
    let (mut domain, _disk) =
        on_disk(&Shape { size: 32 * MIB, ..Shape::disks(1) }.options("cluster_size=64k"))?;
    domain.fill(4 * MIB)?;
    domain.create("s1", "internal")?;
    domain.fill(4 * MIB)?;
    let said = domain.domsnap().done(&["du", NAME, "s1", "--no-punch"])?.stdout;
    ensure!(said.contains("inside the images, nothing on the disk"), "{said}");
    let before = images(&domain.disks())?;
    domain.domsnap().done(&["delete", NAME, "s1", "--no-punch"])?;
    ensure!(images(&domain.disks())? >= before, "the file is smaller");
    // A file with another name is kept by it (backintime 1080).
    let (mut domain, _disk) = on_disk(&Shape::raw(1))?;
    domain.write_and_create("s1", "copy")?;
    let point = std::fs::read_dir(domain.disks())?
        .flatten()
        .map(|entry| entry.path())
        .find(|path| path.to_string_lossy().contains(".ds-") && path.extension().is_some_and(|e| e == "raw"))
        .context("a point")?;
    let alone = exclusive(&one(&domain, "s1")?);
    std::fs::hard_link(&point, domain.root().join("another-name"))?;
    let linked = one(&domain, "s1")?;
    ensure!(alone > exclusive(&linked) && exclusive(&linked) <= 4096, "{alone}, {linked}");
    Ok(())
}

/// The state that a revert replaced has a size too, which `undo --forget` frees.
#[test]
fn replaced_state_has_its_size() -> Result<()> {
    let (mut domain, _disk) =
        on_disk(&Shape { size: 16 * MIB, ..Shape::disks(1) }.options("cluster_size=64k"))?;
    let domsnap = domain.domsnap().env("DOMSNAP_UNDO", "free");
    for kind in ["internal", "external"] {
        domain.write_and_create("s1", kind)?;
        domain.fill(4 * MIB)?;
        domsnap.done(&["revert", NAME, "s1"])?;
        domain.model.revert("s1");
        let said = du(&domsnap, NAME, &[])?;
        let bytes = said["previous"]["alone"]["total"]["frees"].as_u64().context("a size")?;
        ensure!(bytes >= 3 * MIB, "{kind}: {said}");
        let table = domsnap.done(&["du", NAME])?.stdout;
        ensure!(table.contains("(replaced state)") && table.contains("deleting s1 frees"), "{table}");
        let before = images(&domain.disks())?;
        domsnap.done(&["undo", NAME, "--forget"])?;
        let freed = before - images(&domain.disks())?;
        ensure!(freed.abs_diff(bytes) <= 3 * 4096, "{kind}: said {bytes}, freed {freed}");
        domain.delete(&["s1"])?;
    }
    domain.verify()
}

/// A merge, a copy of an internal snapshot and copies for clones that do not fit are refused before anything,
/// with the numbers; what fits is done.
#[test]
fn what_does_not_fit_is_refused() -> Result<()> {
    if !may_mount("tmpfs") {
        return Ok(());
    }
    let mounted = Mounted::make_small("tmpfs", 64 << 20)?;
    let shape = Shape { size: 32 * MIB, ..Shape::disks(2) }.options("cluster_size=64k");
    let mut domain = Domain::new_in(mounted.domain(), &shape)?;
    domain.fill(8 * MIB)?;
    domain.create("s1", "internal")?;
    domain.create("s2", "external")?;
    let far = |megabyte: u64, byte| Write { offset: megabyte * MIB, length: 4 * MIB, byte: Some(byte) };
    domain.write("vda", &[far(12, 7)])?;
    domain.create("s3", "external")?;
    domain.write("vda", &[far(20, 9)])?;
    let filler = mounted.path().join("filler");
    let fill = |left: u64| -> Result<()> {
        let about = rustix::fs::statvfs(mounted.path())?;
        let free = about.f_bfree * about.f_frsize;
        let file = std::fs::File::create(&filler)?;
        Ok(rustix::fs::fallocate(&file, rustix::fs::FallocateFlags::empty(), 0, free - left)?)
    };
    fill(2 * MIB)?;
    // Longhorn 2777, 8017: a merge filled the disk.
    let before = domsnap_tests::domain::images(&domain.disks())?;
    for (args, what) in [
        (&["delete", NAME, "s3"][..], "a merge adds 4."),
        (&["delete", NAME, "s3", "--dry-run"], "a merge adds 4."),
        // An image that others depend on is not changed: the snapshot in it is copied out.
        (&["revert", NAME, "s1"], "s1 is copied out of"),
        (&["clone", NAME, "s2", "copies", "--full"], "has room for"),
    ] {
        let outcome = domain.domsnap().run(args)?.expect_status(status::REFUSED)?;
        let free = [" 2.0", " 1.9"].iter().any(|free| outcome.stderr.contains(free));
        ensure!(outcome.stderr.contains(what) && free, "{outcome}");
        ensure!(outcome.stderr.contains("no changes made"), "{outcome}");
        domsnap_tests::domain::same_images(&domain.disks(), &before)?;
    }
    // With --force the snapshot goes, and the merge comes when there is room.
    domain.domsnap().done(&["delete", NAME, "s3", "--force"])?;
    domain.model.delete(&["s3".into()]);
    std::fs::remove_file(&filler)?;
    domain.domsnap().done(&["recover"])?;
    domain.verify()?;
    domain.revert("s1")?;
    domain.verify()
}

/// The memory of a guest that does not fit is refused before anything, with the numbers; where it fits, it is
/// saved. Zeros need no room.
#[test]
fn memory_that_does_not_fit_is_refused() -> Result<()> {
    if !may_mount("tmpfs") {
        return Ok(());
    }
    let mounted = Mounted::make_small("tmpfs", 40 << 20)?;
    let dir = tempfile::Builder::new().prefix("domsnap-test-").tempdir()?;
    let (disk, filling) = (dir.path().join("a.qcow2"), dir.path().join("filling"));
    qemu::img(&["create", "-q", "-f", "qcow2", &disk.display().to_string(), "4M"])?;
    std::fs::write(&filling, vec![7; 64 << 20])?;
    let drive = format!("driver=qcow2,file.driver=file,file.filename={},node-name=d0", disk.display());
    let loader = format!("loader,file={},addr=0x2000000,force-raw=on", filling.display());
    let args =
        ["-m", "256", "-blockdev", &drive, "-device", "virtio-blk-pci,drive=d0,id=vda", "-device", &loader];
    let machine = Idle::start(Version::New, dir.path(), "m", &args)?;
    let domsnap = Domsnap::new(&dir.path().join("state"));
    let memory = mounted.path().display().to_string();
    domsnap.done(&["domain", "add", "web", "--at", &machine.address(), "--memory-dir", &memory])?;
    let refused = domsnap.run(&["create", "web", "s1", "--memory"])?.expect_status(status::REFUSED)?;
    let said = &refused.stderr;
    ensure!(
        said.contains("the image of the guest's memory needs at least 5") && said.contains(" free"),
        "{said}"
    );
    ensure!(
        said.contains("no changes made") && std::fs::read_dir(mounted.path())?.next().is_none(),
        "{said}"
    );
    domsnap.done(&["create", "web", "s1", "--disk-only"])?;
    drop(machine);
    // The same memory, of zeros.
    let args = &args[..args.len() - 2];
    let machine = Idle::start(Version::New, dir.path(), "m", args)?;
    domsnap.done(&["create", "web", "s2", "--memory"])?;
    let said = du(&domsnap, "web", &["s2"])?;
    let image = said["together"]["memory"]["frees"].as_u64().context("the memory's size")?;
    let before = images(mounted.path())?;
    domsnap.done(&["delete", "web", "s2"])?;
    ensure!(image > 0 && before - images(mounted.path())? == image, "{said}");
    drop(machine);
    Ok(())
}

/// The commands of the guide's page, each run as it is written there; its tables are those that are printed.
#[test]
fn every_command_of_the_page_runs() -> Result<()> {
    let (mut domain, _disk) = on_disk(&Shape { size: 16 * MIB, ..Shape::disks(1) })?;
    domain.domsnap().done(&["domain", "remove", NAME])?;
    let disk = format!("vda={},format=qcow2", domain.path("vda").display());
    domain.domsnap().done(&["domain", "add", "shop", "--disk", &disk])?;
    for name in ["monday", "tuesday", "wednesday"] {
        domain.fill(MIB)?;
        domain.domsnap().done(&["create", "shop", name])?;
    }
    let page = Path::new(env!("CARGO_MANIFEST_DIR")).join("../docs/sizes.md");
    let page = std::fs::read_to_string(page)?;
    let (mut is_code, mut run, mut columns) = (false, 0, BTreeSet::new());
    for line in page.lines() {
        if line.starts_with("```") {
            is_code = !is_code;
            continue;
        }
        if is_code && line.starts_with("SNAPSHOT ") {
            columns.extend(line.split_whitespace().map(str::to_owned));
        }
        let Some(command) = line.split(" #").next().filter(|_| is_code).map(str::trim) else { continue };
        let Some(args) = command.strip_prefix("domsnap ") else { continue };
        domain.domsnap().done(&args.split_whitespace().collect::<Vec<_>>()).context(line.to_owned())?;
        run += 1;
    }
    ensure!(run >= 5, "only {run} commands are left in the page");
    let printed = domain.domsnap().done(&["du", "shop"])?.stdout;
    let head: BTreeSet<String> =
        printed.lines().next().unwrap_or_default().split_whitespace().map(str::to_owned).collect();
    ensure!(head == columns, "{printed}");
    Ok(())
}
