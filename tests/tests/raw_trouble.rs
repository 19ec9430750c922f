//! Raw disks in unfriendly surroundings: damage, full disks, interrupts, lost files and catalogues, other
//! names and other users of a file, content that pretends to be another format, sizes that change. Nothing is
//! lost, nothing is left behind.

use std::ffi::OsStr;
use std::os::unix::fs::{FileExt, MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, ensure};
use domsnap_tests::domain::{Domain, NAME, Shape, contents, images, same_contents, same_images};
use domsnap_tests::domsnap::{Domsnap, Outcome, status};
use domsnap_tests::mounted::{Mounted, may_mount};
use domsnap_tests::qemu::{self, Write};
use domsnap_tests::report;
use domsnap_tests::{crash, scenario, shim, verify};

/// Raw disks where temporary files are, with snapshots by `methods`, called `s1`, `s2`, ..., and writes
/// between and after.
fn line(disks: usize, methods: &[&str]) -> Result<Domain> {
    grown(Domain::new(&Shape::raw(disks))?, methods)
}

fn grown(mut domain: Domain, methods: &[&str]) -> Result<Domain> {
    for (index, method) in methods.iter().enumerate() {
        domain.create(&format!("s{}", index + 1), method)?;
        domain.write_everywhere()?;
    }
    Ok(domain)
}

/// The file that holds the point of `target` in the snapshot `name`.
fn point(domain: &Domain, name: &str, target: &str) -> Result<PathBuf> {
    let list = report::list(&domain.domsnap(), NAME)?;
    let snapshot =
        list.snapshots.iter().find(|snapshot| snapshot.name == name).context("no such snapshot")?;
    let point = snapshot.points.iter().find(|point| point.target == target).context("no such point")?;
    Ok(domain.disks().join(&point.layer))
}

fn says(outcome: &Outcome, all: &[&str]) -> Result<()> {
    for args in all {
        ensure!(outcome.stderr.contains(args), "it does not say {args:?}: {outcome}");
    }
    Ok(())
}

mod where_blocks_can_be_shared {
    use super::*;

    #[test]
    fn a_snapshot_and_a_revert_take_no_room() -> Result<()> {
        if !may_mount("xfs") {
            return Ok(());
        }
        let mut domain = Domain::new_on("xfs", &Shape { size: 64 << 20, ..Shape::raw(1) })?;
        domain.fill(64 << 20)?;
        let free = |domain: &Domain| -> Result<u64> {
            qemu::run("sync", &["-f".as_ref(), domain.root().as_os_str()])?;
            let reported = qemu::run(
                "stat",
                &["-f".as_ref(), "-c".as_ref(), "%f %S".as_ref(), domain.root().as_os_str()],
            )?;
            let (blocks, size) = reported.trim().split_once(' ').context("two numbers")?;
            Ok(blocks.parse::<u64>()? * size.parse::<u64>()?)
        };
        let before = free(&domain)?;
        for name in ["s1", "s2", "s3"] {
            domain.create(name, "reflink")?;
        }
        domain.revert("s1")?;
        let taken = before.saturating_sub(free(&domain)?);
        ensure!(taken < 8 << 20, "{taken} bytes were taken by snapshots of 64 MiB that share all of it");
        domain.verify()
    }

    /// A file that is written in place on btrfs is shared too.
    #[test]
    fn file_in_place_on_btrfs_is_shared() -> Result<()> {
        if !may_mount("btrfs") {
            return Ok(());
        }
        let mut domain = Domain::new_on("btrfs", &Shape::raw(1))?;
        // The attribute is given to an empty file alone.
        let (path, aside) = (domain.path("vda"), domain.disks().join("aside"));
        std::fs::rename(&path, &aside)?;
        std::fs::File::create(&path)?;
        qemu::run("chattr", &["+C".as_ref(), path.as_os_str()])?;
        std::fs::write(&path, std::fs::read(&aside)?)?;
        std::fs::remove_file(&aside)?;
        domain.create("s1", "reflink")?;
        domain.write_everywhere()?;
        domain.revert("s1")?;
        domain.verify()
    }

    /// A directory may hold copies and shared points of one domain.
    #[test]
    fn copies_and_shared_points_mix() -> Result<()> {
        if !may_mount("xfs") {
            return Ok(());
        }
        let mut domain = grown(Domain::new_on("xfs", &Shape::raw(2))?, &["methods", "reflink", "copy"])?;
        for name in ["s3", "s1", "s2"] {
            domain.revert(name)?;
            domain.verify().with_context(|| format!("after revert to {name}"))?;
            domain.write_everywhere()?;
        }
        domain.delete(&["s1", "s3"])?;
        domain.verify()
    }
}

mod a_copy {
    use super::*;

    #[test]
    fn of_a_sparse_disk_is_sparse() -> Result<()> {
        let mut domain = Domain::new(&Shape { size: 256 << 20, ..Shape::raw(1) })?;
        domain.create("s1", "copy")?;
        let taken = point(&domain, "s1", "vda")?.metadata()?.blocks() * 512;
        ensure!(taken < 2 << 20, "{taken} bytes on the disk for less than 100 KiB of data");
        domain.write_everywhere()?;
        domain.revert("s1")?;
        let taken = domain.path("vda").metadata()?.blocks() * 512;
        ensure!(taken < 2 << 20, "{taken} bytes on the disk after a revert");
        domain.verify()
    }

    /// Changes one byte of data in the copy `s1`.
    fn damaged() -> Result<(Domain, PathBuf)> {
        let domain = line(1, &["copy"])?;
        let copy = point(&domain, "s1", "vda")?;
        let file = std::fs::OpenOptions::new().read(true).write(true).open(&copy)?;
        let mut byte = [0];
        file.read_exact_at(&mut byte, 65_536)?;
        file.write_all_at(&[byte[0] ^ 1], 65_536)?;
        Ok((domain, copy))
    }

    #[test]
    fn that_was_damaged_is_not_reverted_to() -> Result<()> {
        let (mut domain, copy) = damaged()?;
        let before = images(&domain.disks())?;
        let outcome = domain.domsnap().run(&["revert", NAME, "s1"])?;
        ensure!(matches!(outcome.status, Some(status::REFUSED | status::FAILED)), "{outcome}");
        says(&outcome, &["checksum"])?;
        same_images(&domain.disks(), &before)?;
        // And it can be got rid of.
        domain.delete(&["s1"])?;
        ensure!(!copy.exists(), "{} is still there", copy.display());
        domain.verify()
    }

    /// That cannot be finished for want of room leaves nothing.
    #[test]
    fn without_room_leaves_nothing() -> Result<()> {
        crash::fail_everywhere(scenario::RAW_CREATE, "ENOSPC", domsnap_tests::shim::Often::FromThenOn)
    }

    #[test]
    fn that_is_interrupted_anywhere_ends_by_itself() -> Result<()> {
        let undone = crash::interrupt_everywhere(scenario::RAW_CREATE)?;
        ensure!(undone > 0, "no interrupt was heard");
        Ok(())
    }

    #[test]
    fn is_shown_and_listed_with_its_size() -> Result<()> {
        let domain = line(1, &["copy"])?;
        let copy = point(&domain, "s1", "vda")?;
        let name = copy.file_name().and_then(OsStr::to_str).context("no name")?;
        for args in [&["show", NAME, "s1"][..], &["list", NAME, "--disks"]] {
            let outcome = domain.domsnap().done(args)?;
            ensure!(outcome.stdout.contains(name), "{name} is not reported: {outcome}");
        }
        Ok(())
    }
}

mod any_input_or_output_error {
    use super::*;

    #[test]
    fn in_a_revert_to_shared_blocks_is_undone_or_healed() -> Result<()> {
        crash::fail_everywhere(scenario::reflink::REVERT, "EIO", domsnap_tests::shim::Often::Once)
    }

    #[test]
    fn in_a_delete_of_copies_is_undone_or_healed() -> Result<()> {
        crash::fail_everywhere(scenario::RAW_DELETE, "EIO", domsnap_tests::shim::Often::Once)
    }
}

mod an_overlay {
    use super::*;

    /// One raw disk registered with `--active-path=new`, and its snapshot `s1` as an overlay; and the path of
    /// the current state.
    fn taken() -> Result<(Domain, PathBuf)> {
        let mut domain = Domain::unregistered(&Shape::raw(1))?;
        domain.domsnap().done(&[domain.register_args(), vec!["--active-path=new".into()]].concat())?;
        domain.write_everywhere()?;
        let made = domain.domsnap().done(&domain.create_args("s1", "overlay"))?;
        domain.model.create("s1");
        let present = present(&domain)?;
        let said = format!("{}{}", made.stdout, made.stderr);
        let text = present.to_str().context("a path that is no text")?;
        ensure!(said.contains(text) && said.contains("qcow2"), "what to configure is not said: {made}");
        Ok((domain, present))
    }

    /// What the catalogue has as the path of the only disk.
    fn present(domain: &Domain) -> Result<PathBuf> {
        let shown: serde_json::Value = domain.domsnap().done(&["domain", "show", NAME, "--json"])?.json()?;
        let path = shown["domain"]["disks"][0]["path"].as_str();
        Ok(path.with_context(|| format!("no path in {shown}"))?.into())
    }

    fn same(image: &Path, bytes: &domsnap_tests::model::Bytes) -> Result<()> {
        verify::bytes(image, None, bytes, &mut Default::default())
    }

    /// Takes further snapshots of both kinds and goes back to the raw file.
    #[test]
    fn takes_snapshots_of_both_kinds() -> Result<()> {
        let (mut domain, first) = taken()?;
        let write = |domain: &mut Domain, image: &Path, byte| -> Result<()> {
            let writes = [Write { offset: 1 << 20, length: 8192, byte: Some(byte) }];
            qemu::write(image, &writes)?;
            domain.model.write("vda", &writes);
            Ok(())
        };
        write(&mut domain, &first, 0x61)?;
        domain.create("s2", "internal")?;
        write(&mut domain, &first, 0x62)?;
        domain.create("s3", "external")?;
        let second = present(&domain)?;
        write(&mut domain, &second, 0x63)?;
        domain.revert("s1")?;
        let back = present(&domain)?;
        same(&back, &domain.model.snapshots["s1"].disks["vda"]).context("back to the raw file")?;
        ensure!(back != domain.path("vda"), "a revert would write the point itself");
        same(&domain.path("vda"), &domain.model.snapshots["s1"].disks["vda"])?;
        domain.revert("s3")?;
        same(&present(&domain)?, &domain.model.snapshots["s3"].disks["vda"]).context("forth again")?;
        let list = report::list(&domain.domsnap(), NAME)?;
        verify::tree(&list, &domain.model)
    }

    /// Is the default where the path may change and no blocks are shared.
    #[test]
    fn is_the_default_without_reflink() -> Result<()> {
        if !may_mount("ext4") {
            return Ok(());
        }
        let mounted = Mounted::make("ext4", 64 << 20)?;
        let raw = mounted.path().join("a.raw");
        std::fs::File::create(&raw)?.set_len(1 << 20)?;
        let domsnap = Domsnap::new(&mounted.path().join("state"));
        let disk = format!("vda={},format=raw", raw.display());
        domsnap.done(&["domain", "add", NAME, "--active-path=new", "--disk", &disk])?;
        domsnap.done(&["create", NAME, "s1"])?;
        let shown: serde_json::Value = domsnap.done(&["domain", "show", NAME, "--json"])?.json()?;
        let disk = &shown["domain"]["disks"][0];
        let path = disk["path"].as_str().context("a disk without a path")?;
        ensure!(disk["format"] == "qcow2" && path.ends_with(".qcow2"), "{shown}");
        ensure!(
            verify::backing(Path::new(path))?.as_deref() == Some(&*raw),
            "{path} depends on another file"
        );
        Ok(())
    }

    /// Is merged away and the raw file is neither removed nor changed.
    #[test]
    fn is_merged_and_the_raw_file_stays() -> Result<()> {
        let (mut domain, first) = taken()?;
        let writes = [Write { offset: 2 << 20, length: 4096, byte: Some(0x71) }];
        qemu::write(&first, &writes)?;
        domain.model.write("vda", &writes);
        let raw = std::fs::read(domain.path("vda"))?;
        domain.delete(&["s1"])?;
        ensure!(std::fs::read(domain.path("vda"))? == raw, "the raw file changed");
        same(&present(&domain)?, &domain.model.present["vda"])
    }
}

mod what_a_raw_file_holds {
    use super::*;

    /// A guest that wrote a qcow2 header with a backing file into its raw disk.
    fn lying() -> Result<Domain> {
        let mut domain = line(1, &[])?;
        let secret = domain.root().join("secret");
        std::fs::write(&secret, vec![0x5a; 4 << 20])?;
        let fake = domain.root().join("fake.qcow2");
        let args = ["create", "-q", "-f", "qcow2", "-u", "-F", "raw", "-b"].map(OsStr::new);
        qemu::img(&[&args[..], &[secret.as_os_str(), fake.as_os_str(), "4M".as_ref()]].concat())?;
        let head = std::fs::read(&fake)?;
        std::fs::remove_file(&fake)?;
        let disk = std::fs::OpenOptions::new().write(true).open(domain.path("vda"))?;
        disk.write_all_at(&head, 0)?;
        let bytes = std::sync::Arc::make_mut(domain.model.present.get_mut("vda").context("no disk")?);
        bytes[..head.len()].copy_from_slice(&head);
        Ok(domain)
    }

    #[test]
    fn is_never_taken_for_another_format() -> Result<()> {
        let mut domain = lying()?;
        domain.create("s1", "copy")?;
        domain.write("vda", &[Write { offset: 3 << 20, length: 4096, byte: Some(7) }])?;
        domain.create("s2", "copy")?;
        domain.revert("s1")?;
        domain.verify()?;
        domain.delete(&["s1"])?;
        domain.revert("s2")?;
        domain.verify()
    }
}

mod the_configured_path {
    use super::*;

    /// That is a symbolic link is resolved when the domain is registered.
    #[test]
    fn that_is_a_symbolic_link_is_resolved() -> Result<()> {
        let domain = Domain::unregistered(&Shape::raw(1))?;
        let (path, real) = (domain.path("vda"), domain.disks().join("real.raw"));
        std::fs::rename(&path, &real)?;
        std::os::unix::fs::symlink("real.raw", &path)?;
        let reported = domain.domsnap().done(&domain.register_args())?;
        let real = real.display().to_string();
        ensure!(
            reported.stdout.contains("a.raw is a symbolic link") && reported.stdout.contains(&real),
            "{reported}"
        );
        Ok(())
    }

    #[test]
    fn that_became_a_symbolic_link_later_is_refused_too() -> Result<()> {
        let domain = line(1, &["copy"])?;
        let (path, real) = (domain.path("vda"), domain.disks().join("real.raw"));
        std::fs::rename(&path, &real)?;
        std::os::unix::fs::symlink("real.raw", &path)?;
        for args in [&["revert", NAME, "s1"][..], &["create", NAME, "x", "--disk", "vda=copy"]] {
            says(&domain.declined(args, status::REFUSED)?, &["symbolic link"])?;
        }
        std::fs::remove_file(&path)?;
        std::fs::rename(&real, &path)?;
        domain.verify()
    }

    /// Whose file has another name elsewhere is reverted with a word.
    #[test]
    fn with_another_name_elsewhere_is_reverted() -> Result<()> {
        let mut domain = line(1, &["copy"])?;
        let other = domain.root().join("other.raw");
        std::fs::hard_link(domain.path("vda"), &other)?;
        let before = std::fs::read(&other)?;
        let outcome = domain.domsnap().done(&["revert", NAME, "s1"])?;
        domain.model.revert("s1");
        let said = format!("{}{}", outcome.stdout, outcome.stderr);
        ensure!(said.contains("hard link"), "no word of the other name: {outcome}");
        ensure!(std::fs::read(&other)? == before, "what the other name leads to changed");
        domain.verify()
    }

    /// That is a block device is refused while this machine has it mounted.
    #[test]
    fn that_is_mounted_is_refused() -> Result<()> {
        if !may_mount("xfs") {
            return Ok(());
        }
        let place = Mounted::make("xfs", 512 << 20)?;
        let device = qemu::run(
            "findmnt",
            &["-n".as_ref(), "-o".as_ref(), "SOURCE".as_ref(), place.path().as_os_str()],
        )?;
        let state = tempfile::tempdir()?;
        let disk = format!("vda={},format=raw", device.trim());
        let domsnap = Domsnap::new(state.path());
        domsnap.done(&["domain", "add", NAME, "--disk", &disk, "--active-path", "new"])?;
        let overlay = state.path().join("vda.qcow2");
        let external = format!("vda=external,path={}", overlay.display());
        let outcome = domsnap.run(&["create", NAME, "s1", "--disk", &external])?;
        ensure!(outcome.status == Some(status::REFUSED), "{outcome}");
        ensure!(!overlay.exists(), "an overlay was made on it");
        says(&outcome, &[device.trim(), "this machine itself uses", "unmount it"])
    }

    #[test]
    fn keeps_its_owner_and_mode_over_a_revert() -> Result<()> {
        let mut domain = line(1, &[])?;
        std::fs::set_permissions(domain.path("vda"), std::fs::Permissions::from_mode(0o640))?;
        let root = domain.path("vda").metadata()?.uid() == 0;
        if root {
            std::os::unix::fs::chown(domain.path("vda"), Some(65_534), Some(65_534))?;
        }
        domain.write_and_create("s1", "copy")?;
        domain.write_everywhere()?;
        domain.revert("s1")?;
        for file in [domain.path("vda"), point(&domain, "s1", "vda")?] {
            let about = file.metadata()?;
            ensure!(about.mode() & 0o7777 == 0o640, "{} has mode {:o}", file.display(), about.mode());
            ensure!(!root || about.uid() == 65_534, "{} belongs to {}", file.display(), about.uid());
        }
        domain.verify()
    }

    #[test]
    fn may_be_of_any_name() -> Result<()> {
        for (prefix, suffix) in [
            ("with space ", ".raw"),
            ("co:lon-", ".raw"),
            ("%2f-", ".x.raw"),
            (".hid-", ".raw"),
            ("ü-", ".raw"),
        ] {
            let round = || -> Result<()> {
                let mut domain =
                    grown(Domain::new(&Shape::raw(1).named(prefix, suffix))?, &["copy", "copy"])?;
                domain.revert("s1")?;
                domain.verify()?;
                domain.delete(&["s2"])?;
                domain.verify()
            };
            round().with_context(|| format!("{prefix}a{suffix}"))?;
        }
        Ok(())
    }
}

mod a_disk_that_was_made {
    use super::*;

    /// Lengthens or shortens the current state of `vda`.
    fn resize(domain: &mut Domain, length: u64) -> Result<()> {
        std::fs::OpenOptions::new().write(true).open(domain.path("vda"))?.set_len(length)?;
        let bytes = domain.model.present.get_mut("vda").context("no disk")?;
        std::sync::Arc::make_mut(bytes).resize(length as usize, 0);
        Ok(())
    }

    /// Larger or smaller between snapshots has its size of then after a revert.
    #[test]
    fn resized_reverts_to_its_size() -> Result<()> {
        let mut domain = line(1, &["copy"])?;
        resize(&mut domain, 6 << 20)?;
        domain.create("large", "copy")?;
        // Not a multiple of any block's size either.
        resize(&mut domain, (4 << 20) + 1536)?;
        domain.create("odd", "copy")?;
        for name in ["large", "s1", "odd", "large"] {
            domain.revert(name)?;
            let length = domain.path("vda").metadata()?.len();
            ensure!(length == domain.model.present["vda"].len() as u64, "{length} after revert to {name}");
            domain.verify().with_context(|| format!("after revert to {name}"))?;
        }
        Ok(())
    }
}

mod others {
    use super::*;

    #[test]
    fn who_hold_the_file_are_left_in_peace() -> Result<()> {
        let mut domain = line(2, &["copy"])?;
        let running = qemu::Running::on(&domain.path("vdb"))?;
        let copy = domain.create_args("x", "copy");
        let copy: Vec<&str> = copy.iter().map(String::as_str).collect();
        for args in [&copy[..], &["revert", NAME, "s1"], &["delete", NAME, "s1"]] {
            let refused = domain.declined(args, status::REFUSED)?;
            says(&refused, &["b.raw"])?;
        }
        running.stop()?;
        domain.verify()?;
        domain.revert("s1")?;
        domain.verify()
    }

    /// A qcow2 overlay of another domain on `base`, by its file name.
    fn overlay(domain: &Domain, base: &Path) -> Result<PathBuf> {
        let overlay = domain.disks().join("theirs.qcow2");
        let args = ["create", "-q", "-f", "qcow2", "-F", "raw", "-b"].map(OsStr::new);
        qemu::img(&[&args[..], &[base.file_name().context("no name")?, overlay.as_os_str()]].concat())?;
        Ok(overlay)
    }

    #[test]
    fn dependents_keep_their_content() -> Result<()> {
        let domain = line(1, &["copy"])?;
        let theirs = overlay(&domain, &domain.path("vda"))?;
        let refused = domain.declined(&["revert", NAME, "s1"], status::REFUSED)?;
        says(&refused, &["theirs.qcow2"])?;
        std::fs::remove_file(theirs)?;
        domain.verify()
    }

    /// Who put another file in its place are not robbed of it.
    #[test]
    fn file_in_its_place_is_kept() -> Result<()> {
        let mut domain = line(1, &["copy"])?;
        let path = domain.path("vda");
        let bytes = vec![0x42; 4 << 20];
        std::fs::rename(&path, domain.root().join("previous"))?;
        std::fs::write(&path, &bytes)?;
        domain.model.present.insert("vda".into(), std::sync::Arc::new(bytes));
        // A raw file is what its path names: the next snapshot holds the new one.
        domain.create("s2", "copy")?;
        domain.revert("s1")?;
        domain.revert("s2")?;
        domain.verify()
    }
}

mod a_lost_point {
    use super::*;

    #[test]
    fn is_named_and_the_others_work_on() -> Result<()> {
        let mut domain = line(1, &["copy", "copy"])?;
        let (layer, aside) = (point(&domain, "s1", "vda")?, domain.root().join("aside"));
        std::fs::rename(&layer, &aside)?;
        let name = layer.file_name().and_then(OsStr::to_str).context("no name")?;
        let refused = domain.declined(&["revert", NAME, "s1"], status::REFUSED)?;
        says(&refused, &[name])?;
        let checked = domain.domsnap().run(&["check", NAME])?;
        ensure!(format!("{}{}", checked.stdout, checked.stderr).contains(name), "{checked}");
        domain.revert("s2")?;
        std::fs::rename(&aside, &layer)?;
        domain.revert("s1")?;
        domain.verify()
    }

    #[test]
    fn can_be_deleted() -> Result<()> {
        let mut domain = line(1, &["copy", "copy"])?;
        std::fs::remove_file(point(&domain, "s1", "vda")?)?;
        domain.delete(&["s1"])?;
        domain.verify()
    }
}

mod a_lost_catalogue {
    use super::*;

    #[test]
    fn comes_back_from_what_lies_beside_the_file() -> Result<()> {
        let mut domain = line(2, &["copy", "copy"])?;
        domain.revert("s1")?;
        domain.write_everywhere()?;
        std::fs::remove_dir_all(domain.state())?;
        std::fs::create_dir(domain.state())?;
        domain.register()?;
        domain.verify()?;
        domain.revert("s2")?;
        domain.verify()?;
        domain.delete(&["s1"])?;
        domain.verify()
    }

    /// And lost manifests leave the points to be found by their names.
    #[test]
    fn lost_manifests_leave_points_by_name() -> Result<()> {
        let domain = line(1, &["copy"])?;
        let copy = point(&domain, "s1", "vda")?;
        std::fs::remove_dir_all(domain.state())?;
        std::fs::create_dir(domain.state())?;
        let manifests = domain.disks().join("a.raw.domsnap");
        std::fs::remove_dir_all(&manifests).with_context(|| format!("remove {}", manifests.display()))?;
        domain.register()?;
        domain.domsnap().done(&["import", "--replace", NAME])?;
        let list = report::list(&domain.domsnap(), NAME)?;
        ensure!(list.snapshots.len() == 1, "{list:?}");
        ensure!(domain.disks().join(&list.snapshots[0].points[0].layer) == copy, "{list:?}");
        domain.domsnap().done(&["revert", NAME, &list.snapshots[0].name])?;
        ensure!(std::fs::read(domain.path("vda"))? == **domain.model.snapshots["s1"].disks["vda"]);
        Ok(())
    }
}

mod together_with_qcow2 {
    use super::*;

    /// A snapshot holds disks of both formats at one instant.
    #[test]
    fn snapshot_holds_both_formats() -> Result<()> {
        let mut domain = Domain::unregistered(&Shape::raw(2))?;
        // The second disk is a qcow2 image called so.
        let qcow2 = domain.disks().join("b.qcow2");
        qemu::img(&[
            "create".as_ref(),
            "-q".as_ref(),
            "-f".as_ref(),
            "qcow2".as_ref(),
            qcow2.as_os_str(),
            "4M".as_ref(),
        ])?;
        std::fs::remove_file(domain.path("vdb"))?;
        domain.model.present.remove("vdb");
        let args =
            [domain.register_args(), vec!["--disk".into(), format!("vdb={},format=qcow2", qcow2.display())]];
        domain.domsnap().done(&args.concat())?;
        let write = |domain: &mut Domain, byte| -> Result<()> {
            let writes = [Write { offset: 4096, length: 8192, byte: Some(byte) }];
            domain.write("vda", &writes)?;
            qemu::write(&qcow2, &writes)
        };
        write(&mut domain, 1)?;
        domain.domsnap().done(&["create", NAME, "one", "--disk", "vda=copy", "--disk", "vdb=internal"])?;
        write(&mut domain, 2)?;
        domain.domsnap().done(&["create", NAME, "two", "--disk", "vda=copy", "--disk", "vdb=external"])?;
        write(&mut domain, 3)?;
        for (name, byte) in [("one", 1), ("two", 2), ("one", 1)] {
            domain.domsnap().done(&["revert", NAME, name])?;
            for image in [&domain.path("vda"), &qcow2] {
                let bytes = qemu::read(image, None)?;
                ensure!(
                    bytes[4096..12_288].iter().all(|found| *found == byte),
                    "{} after {name}",
                    image.display()
                );
                qemu::check(image)?;
            }
        }
        domain.domsnap().done(&["delete", NAME, "one", "two"])?;
        Ok(())
    }
}

#[test]
fn the_ways_are_listed_with_the_backend() -> Result<()> {
    let state = tempfile::tempdir()?;
    let reported = Domsnap::new(state.path()).done(&["backends"])?;
    for word in ["raw", "reflink", "copy", "overlay"] {
        ensure!(reported.stdout.contains(word), "{word} is not reported: {reported}");
    }
    Ok(())
}

#[test]
fn unknown_method_is_refused_by_name() -> Result<()> {
    let domain = line(1, &[])?;
    for how in ["vda=teleport", "vda=internal"] {
        let before = contents(&domain.disks())?;
        let outcome = domain.domsnap().run(&["create", NAME, "x", "--disk", how])?;
        ensure!(matches!(outcome.status, Some(status::REFUSED | status::USAGE)), "{outcome}");
        same_contents(&domain.disks(), &before)?;
    }
    says(
        &domain.domsnap().run(&["create", NAME, "x", "--disk", "vda=teleport"])?,
        &["reflink", "copy", "overlay"],
    )
}

#[test]
fn two_domsnap_at_once_take_turns_or_one_is_reported() -> Result<()> {
    let mut domain = line(1, &[])?;
    let spawn = |name: &str| -> Result<std::process::Child> {
        let mut command: Command = domain.domsnap().command(&domain.create_args(name, "copy"));
        Ok(command.stdout(std::process::Stdio::piped()).stderr(std::process::Stdio::piped()).spawn()?)
    };
    let [one, two] = [spawn("one")?, spawn("two")?];
    // Both have ended before one that was refused is tried again.
    let outputs = [("one", one.wait_with_output()?), ("two", two.wait_with_output()?)];
    for (name, output) in outputs {
        match output.status.code() {
            Some(status::DONE) => {}
            Some(status::REFUSED) => {
                ensure!(!output.stderr.is_empty(), "{name} was refused without a message");
                domain.domsnap().done(&domain.create_args(name, "copy"))?;
            }
            other => {
                anyhow::bail!("{name} ended with {other:?}: {}", String::from_utf8_lossy(&output.stderr))
            }
        }
    }
    let list = report::list(&domain.domsnap(), NAME)?;
    let mut order: Vec<_> = list.snapshots.iter().collect();
    order.sort_by_key(|snapshot| snapshot.parent.is_some());
    for snapshot in order {
        domain.model.create(&snapshot.name);
    }
    domain.verify()
}

/// What cannot be removed after the commit point waits, locks nothing, and goes with the next operation.
#[test]
fn files_that_cannot_be_removed_are_deferred() -> Result<()> {
    let mut domain = line(1, &["copy", "copy"])?;
    let count = |domain: &Domain| -> Result<usize> {
        let names = std::fs::read_dir(domain.disks())?.flatten().map(|entry| entry.file_name());
        Ok(names.filter(|name| name.to_string_lossy().ends_with(".raw")).count())
    };
    let stuck = |domain: &Domain| -> Result<Domsnap> {
        let domsnap = shim::watching(domain.domsnap(), domain.root())?;
        let fails = domsnap.env("FAULTFS_FAIL_KIND", "unlink").env("FAULTFS_FAIL_PATH", ".ds-");
        Ok(fails.env("FAULTFS_ERRNO", "EPERM"))
    };
    let points = count(&domain)?;
    let said = stuck(&domain)?.done(&["revert", NAME, "s1"])?;
    ensure!(format!("{}{}", said.stdout, said.stderr).contains("deferred"), "{said}");
    ensure!(count(&domain)? == points + 2, "{said}");
    // Nothing is locked by it; what is done next does not trip over it.
    domain.domsnap().done(&["create", NAME, "s9", "--disk", "vda=copy"])?;
    let said = stuck(&domain)?.done(&["delete", NAME, "s9"])?;
    ensure!(format!("{}{}", said.stdout, said.stderr).contains("deferred"), "{said}");
    ensure!(!domain.domsnap().done(&["domain", "list"])?.stdout.contains("needs recovery"));
    domain.domsnap().done(&["recover", NAME])?;
    ensure!(count(&domain)? == points, "something is left: {said}");
    domain.domsnap().done(&["revert", NAME, "s2"])?;
    domain.domsnap().done(&["check", NAME])?;
    domain.delete(&["s1"])?;
    ensure!(count(&domain)? == points - 1);
    Ok(())
}
