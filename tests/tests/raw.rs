//! Raw disks: by reflink where the file system shares blocks, by copy anywhere, under a qcow2 overlay where
//! the path may change.

use anyhow::{Context, Result, ensure};
use domsnap_tests::domain::{Domain, NAME, Shape};
use domsnap_tests::domsnap::status;
use domsnap_tests::live::Live;
use domsnap_tests::mounted::Mounted;
use domsnap_tests::{qemu, verify};
use testguest::{GuestOptions, Version};

/// Creates, reverts and deletes over a tree of four snapshots.
fn tree(mut domain: Domain, method: &str) -> Result<()> {
    for name in ["s1", "s2", "s3"] {
        domain.write_and_create(name, method)?;
        domain.verify().with_context(|| name.to_owned())?;
    }
    domain.write_everywhere()?;
    for name in ["s1", "s3", "s2", "s1"] {
        domain.revert(name)?;
        domain.verify().with_context(|| format!("after the revert to {name}"))?;
        domain.write_everywhere()?;
    }
    domain.write_and_create("side", method)?;
    domain.write_everywhere()?;
    domain.domsnap().done(&["revert", NAME, "s2", "--save-current=kept"])?;
    domain.model.create("kept");
    domain.model.revert("s2");
    domain.verify()?;
    domain.delete(&["s2", "side"])?;
    domain.verify()?;
    domain.domsnap().done(&["check", NAME])?;
    domain.delete(&["s1", "s3", "kept"])?;
    domain.verify()
}

/// Points by reflink on btrfs and xfs are reverted to and deleted in any order.
#[test]
fn reflink_points_on_btrfs_and_xfs() -> Result<()> {
    for kind in ["btrfs", "xfs"] {
        let mounted = Mounted::make(kind, 512 << 20)?;
        tree(Domain::new_in(&mounted.path().join("domain"), &Shape::raw(2))?, "reflink").context(kind)?;
        // What the place can do is taken where nothing is said.
        tree(Domain::new_in(&mounted.path().join("unsaid"), &Shape::raw(1))?, "external").context(kind)?;
    }
    Ok(())
}

/// Points by copy are reverted to and deleted in any order.
#[test]
fn copied_points_in_any_order() -> Result<()> {
    let mounted = Mounted::make("ext4", 128 << 20)?;
    tree(Domain::new_in(&mounted.path().join("domain"), &Shape::raw(2))?, "copy")
}

#[test]
fn a_reflink_shares_the_blocks_of_the_disk() -> Result<()> {
    let mounted = Mounted::make("btrfs", 512 << 20)?;
    let mut domain =
        Domain::new_in(&mounted.path().join("domain"), &Shape { size: 128 << 20, ..Shape::raw(1) })?;
    domain.fill(100 << 20)?;
    // Four more copies would not have room.
    for name in ["s1", "s2", "s3", "s4"] {
        domain.create(name, "reflink")?;
    }
    domain.verify()
}

/// Where no blocks are shared a point is refused with what to do.
#[test]
fn no_reflink_is_refused_with_advice() -> Result<()> {
    let mounted = Mounted::make("ext4", 128 << 20)?;
    let domain = Domain::new_in(&mounted.path().join("domain"), &Shape::raw(1))?;
    let refused = domain.declined(&["create", NAME, "s1"], status::REFUSED)?;
    ensure!(refused.stderr.contains("--disk vda=copy"), "{refused}");
    let refused = domain.declined(&["create", NAME, "s1", "--disk", "vda=reflink"], status::REFUSED)?;
    ensure!(refused.stderr.contains("has no reflinks"), "{refused}");
    let refused = domain.declined(&["create", NAME, "s1", "--internal"], status::REFUSED)?;
    ensure!(refused.stderr.contains("raw has no internal snapshots"), "{refused}");
    let refused = domain.declined(&["create", NAME, "s1", "--disk", "vda=overlay"], status::REFUSED)?;
    ensure!(refused.stderr.contains("--active-path=new"), "{refused}");
    domain.verify()
}

/// A copy for which there is no room is refused before it begins.
#[test]
fn copy_without_room_is_refused() -> Result<()> {
    let mounted = Mounted::make("ext4", 64 << 20)?;
    let mut domain =
        Domain::new_in(&mounted.path().join("domain"), &Shape { size: 40 << 20, ..Shape::raw(1) })?;
    domain.fill(36 << 20)?;
    let refused = domain.declined(&["create", NAME, "s1", "--disk", "vda=copy"], status::REFUSED)?;
    ensure!(refused.stderr.contains("a copy needs 36.0 MiB"), "{refused}");
    domain.verify()
}

/// A copy that is damaged is found and never reverted to.
#[test]
fn damaged_copy_is_never_reverted_to() -> Result<()> {
    let mut domain = Domain::new(&Shape::raw(1))?;
    domain.write_and_create("s1", "copy")?;
    domain.write_everywhere()?;
    let point = point_of(&domain, "s1")?;
    let mut bytes = std::fs::read(&point)?;
    bytes[70_000] ^= 1;
    std::fs::write(&point, &bytes)?;
    let found = domain.domsnap().run(&["check", NAME])?;
    ensure!(found.stdout.contains("is not what was copied into it"), "{found}");
    let before = qemu::read(&domain.path("vda"), None)?;
    let failed = domain.domsnap().run(&["revert", NAME, "s1"])?.expect_status(status::FAILED)?;
    ensure!(failed.stderr.contains("checksum"), "{failed}");
    ensure!(qemu::read(&domain.path("vda"), None)? == before, "the current state was changed");
    Ok(())
}

fn point_of(domain: &Domain, name: &str) -> Result<std::path::PathBuf> {
    let list = domsnap_tests::report::list(&domain.domsnap(), NAME)?;
    let found = list.snapshots.into_iter().find(|snapshot| snapshot.name == name).context("it is listed")?;
    Ok(found.points.into_iter().next().context("it has a point")?.layer)
}

/// A point on which a foreign overlay stands is not removed.
#[test]
fn point_under_a_foreign_overlay_stays() -> Result<()> {
    let mut domain = Domain::new(&Shape::raw(1))?;
    domain.write_and_create("s1", "copy")?;
    let point = point_of(&domain, "s1")?;
    let overlay = domain.disks().join("mine.qcow2");
    let args = ["create", "-q", "-f", "qcow2", "-F", "raw", "-b"].map(std::ffi::OsStr::new);
    qemu::img(&[&args[..], &[point.as_os_str(), overlay.as_os_str()]].concat())?;
    let deleted = domain.domsnap().done(&["delete", NAME, "s1"])?;
    ensure!(format!("{deleted}").contains("mine.qcow2 is backed by it"), "{deleted}");
    ensure!(point.exists(), "what an overlay depends on was removed");
    std::fs::remove_file(&overlay)?;
    // The next delete tidies up.
    domain.model.delete(&["s1".to_owned()]);
    domain.write_and_create("s2", "copy")?;
    domain.delete(&["s2"])?;
    domain.verify()
}

/// Under a new path a raw disk goes on as a qcow2 overlay on a base that stays.
#[test]
fn new_path_is_an_overlay_on_the_raw_file() -> Result<()> {
    let mut domain = Domain::unregistered(&Shape::raw(1))?;
    let mut args = domain.register_args();
    args.push("--active-path=new".to_owned());
    domain.domsnap().done(&args)?;
    domain.write_everywhere()?;
    let base = qemu::read(&domain.path("vda"), None)?;
    let made = domain.domsnap().done(&["create", NAME, "s1", "--disk", "vda=overlay"])?;
    ensure!(
        made.stdout.contains("configuration must now name")
            || made.stderr.contains("configuration must now name"),
        "{made}"
    );
    let reported: serde_json::Value = domain.domsnap().done(&["domain", "show", NAME, "--json"])?.json()?;
    let path =
        reported.pointer("/domain/disks/0/path").or_else(|| reported.pointer("/disks/0/path")).cloned();
    let path = std::path::PathBuf::from(
        path.and_then(|path| path.as_str().map(str::to_owned)).context(format!("{reported}"))?,
    );
    ensure!(verify::backing(&path)?.as_deref() == Some(&*domain.path("vda")), "it depends on the raw file");
    let write = [qemu::Write { offset: 1 << 20, length: 4096, byte: Some(7) }];
    qemu::write(&path, &write)?;
    domain.domsnap().done(&["create", NAME, "s2", "--external"])?;
    domain.domsnap().done(&["revert", NAME, "s1"])?;
    let reported: serde_json::Value = domain.domsnap().done(&["domain", "show", NAME, "--json"])?.json()?;
    let path =
        reported.pointer("/domain/disks/0/path").or_else(|| reported.pointer("/disks/0/path")).cloned();
    let path = std::path::PathBuf::from(
        path.and_then(|path| path.as_str().map(str::to_owned)).context(format!("{reported}"))?,
    );
    ensure!(qemu::read(&path, None)? == base, "the revert shows the raw file as it was frozen");
    domain.domsnap().done(&["delete", NAME, "s1", "s2"])?;
    ensure!(qemu::read(&path, None)? == base, "the current state is as before the delete");
    ensure!(qemu::read(&domain.path("vda"), None)? == base, "nothing wrote the base");
    domain.domsnap().done(&["check", NAME])?;
    Ok(())
}

/// An overlay is refused as long as there are points that are raw files.
#[test]
fn overlay_is_refused_over_raw_points() -> Result<()> {
    let mut domain = Domain::unregistered(&Shape::raw(1))?;
    let mut args = domain.register_args();
    args.push("--active-path=new".to_owned());
    domain.domsnap().done(&args)?;
    domain.write_and_create("s1", "copy")?;
    let refused = domain.declined(&["create", NAME, "s2", "--disk", "vda=overlay"], status::REFUSED)?;
    ensure!(refused.stderr.contains("points that are raw files"), "{refused}");
    domain.write_everywhere()?;
    domain.revert("s1")?;
    domain.verify()?;
    domain.delete(&["s1"])?;
    domain.domsnap().done(&["create", NAME, "s2", "--disk", "vda=overlay"])?;
    domain.domsnap().done(&["check", NAME])?;
    Ok(())
}

/// A running guests raw disk is cut with its memory and its qcow2 disk and reverted in place.
#[test]
fn running_raw_disk_reverts_in_place() -> Result<()> {
    let mounted = Mounted::make("btrfs", 1 << 30)?;
    for version in [Version::New, Version::Old] {
        let options = GuestOptions::new().version(version).raw(&[1]).inside(mounted.path());
        let mut live = Live::of(options)?;
        live.create("memory", &[])?;
        live.create("disks", &["--disk-only"])?;
        live.create("mixed", &["--disk", "vda=external"])?;
        for name in ["memory", "mixed", "disks", "memory"] {
            live.revert(name, &[])?;
        }
        live.delete(&["disks"], &[])?;
        live.revert("mixed", &[])?;
        live.delete(&["memory", "mixed"], &[])?;
    }
    Ok(())
}
