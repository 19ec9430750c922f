//! Whose snapshots they are: copies of directories, catalogues that are older than the images, two catalogues
//! on one domain, and layers that are taken for disks. Nothing may be lost on the word of a catalogue that
//! does not have the last one. Every test ends by comparing every point of each tree with the model.

use std::path::Path;

use anyhow::{Context, Result, ensure};
use domsnap_tests::domain::{Domain, NAME, Shape, contents, copy_tree, same_contents};
use domsnap_tests::domsnap::{Domsnap, status};
use domsnap_tests::{crash, qemu, report, seed, shim, verify};

/// A domain of two disks with the snapshots `kinds`, called `s1`, `s2`, ..., and writes between and after.
fn line(kinds: &[&str]) -> Result<Domain> {
    let mut domain = Domain::new(&Shape::disks(2))?;
    for (index, kind) in kinds.iter().enumerate() {
        domain.create(&format!("s{}", index + 1), kind)?;
        domain.write_everywhere()?;
    }
    Ok(domain)
}

fn whole(domain: &Domain, address: &str) -> Result<()> {
    verify::every_point(domain, &domain.model, address, &mut verify::Memo::default())
}

/// Puts the state directory `saved` in the place of the domain's.
fn put_back(domain: &Domain, saved: &Path) -> Result<()> {
    std::fs::remove_dir_all(domain.state())?;
    copy_tree(saved, &domain.state())
}

fn lose_the_catalogue(domain: &Domain) -> Result<()> {
    std::fs::remove_dir_all(domain.state())?;
    Ok(std::fs::create_dir(domain.state())?)
}

mod copies {
    use super::*;

    /// A copy of the images of `domain`, used with the same state directory.
    fn copy(domain: &Domain, how: &str, dir: &Path) -> Result<Domain> {
        let copy = domain.at(dir);
        std::fs::create_dir(dir)?;
        qemu::run("cp", &[how.as_ref(), domain.disks().as_os_str(), copy.disks().as_os_str()])?;
        std::os::unix::fs::symlink(domain.state(), copy.state())?;
        Ok(copy)
    }

    fn drop_tags_that_nothing_counts_on(copy: &Domain) -> Result<()> {
        for entry in std::fs::read_dir(copy.disks())? {
            let path = entry?.path();
            let args =
                |tag| ["disk".as_ref(), "delete".as_ref(), path.as_os_str(), std::ffi::OsStr::new(tag)];
            for tag in ["s1", "s2", "s3"] {
                if path.to_string_lossy().contains(".ds-") {
                    let outcome = copy.domsnap().run(&args(tag))?;
                    ensure!(matches!(outcome.status, Some(status::DONE | status::REFUSED)), "{outcome}");
                }
            }
        }
        Ok(())
    }

    fn both_live_on(kinds: &[&str], how: &str, first: &str) -> Result<()> {
        let mut domain = line(kinds)?;
        let elsewhere = tempfile::tempdir()?;
        let mut copy = copy(&domain, how, &elsewhere.path().join("copy"))?;
        let paths = copy.paths();
        whole(&copy, &paths).or_else(|error| if how == "-a" { Err(error) } else { Ok(()) })?;
        let args: &[&str] = match first {
            "create" => &["create", &paths, "new", "--external"],
            "revert" => &["revert", &paths, "s1"],
            "delete" => &["delete", &paths, "s1"],
            _ => &["import", &paths],
        };
        copy.domsnap().done(args)?;
        match first {
            "create" => copy.model.create("new"),
            "revert" => copy.model.revert("s1"),
            "delete" => copy.model.delete(&["s1".into()]),
            _ => {}
        }
        domain.verify().context("the original")?;
        if how == "-r" {
            // The layer that was active is another file than the configured path; what is tagged in it is
            // tagged there.
            drop_tags_that_nothing_counts_on(&copy)?;
        }
        domain.domsnap().done(&["recover"])?;
        domain.verify().context("the original, after recover")?;
        whole(&copy, &paths).context("the copy")?;
        copy.write_everywhere()?;
        domain.delete(&["s2"])?;
        domain.revert("s3")?;
        copy.domsnap().done(&["revert", &paths, "s2"])?;
        copy.model.revert("s2");
        whole(&copy, &paths).context("the copy, at s2")?;
        domain.verify().context("the original, without s2")?;
        for domain in [&domain, &copy] {
            lose_the_catalogue(domain)
                .or_else(|error| if domain.state().exists() { Ok(()) } else { Err(error) })?;
        }
        whole(&copy, &paths).context("the copy, by its manifests alone")?;
        whole(&domain, &domain.paths()).context("the original, by its manifests alone")
    }

    macro_rules! copies {
        ($($test:ident $how:literal $first:literal)*) => {$(
            #[test]
            fn $test() -> Result<()> {
                for kinds in [["external"; 3], ["internal"; 3], ["external", "mixed", "internal"]] {
                    both_live_on(&kinds, $how, $first).with_context(|| format!("{kinds:?}"))?;
                }
                Ok(())
            }
        )*};
    }

    copies! {
        a_copy_that_is_imported_leaves_the_original_its_snapshots "-a" "import"
        a_copy_that_is_snapshotted_leaves_the_original_its_snapshots "-a" "create"
        a_copy_that_is_reverted_leaves_the_original_its_snapshots "-a" "revert"
        a_copy_of_which_a_snapshot_is_deleted_leaves_the_original_its_snapshots "-a" "delete"
        a_copy_without_hard_links_is_a_domain_too_and_no_snapshot_comes_twice "-r" "import"
    }

    /// A copy over the images of another domain is noticed.
    #[test]
    fn copy_over_another_domain_is_noticed() -> Result<()> {
        let mut domain = line(&["external", "internal"])?;
        let elsewhere = tempfile::tempdir()?;
        let mut copy = copy(&domain, "-a", &elsewhere.path().join("copy"))?;
        let paths = copy.paths();
        copy.domsnap().done(&["create", &paths, "new", "--external"])?;
        domain.write_and_create("s3", "external")?;
        std::fs::remove_dir_all(copy.disks())?;
        qemu::run("cp", &["-a".as_ref(), domain.disks().as_os_str(), copy.disks().as_os_str()])?;
        copy.model = domain.model.clone();
        for args in [["delete", &paths, "s1"], ["create", &paths, "x"], ["revert", &paths, "new"]] {
            let outcome = copy.declined(&args, status::REFUSED)?;
            ensure!(outcome.stderr.contains("import --replace"), "no way out is named: {outcome}");
        }
        copy.domsnap().done(&["import", "--replace", &paths])?;
        whole(&copy, &paths)?;
        domain.verify()
    }
}

mod an_older_catalogue {
    use super::*;

    /// Everything that changes something is refused and changes nothing; what only looks works.
    fn is_refused(domain: &Domain) -> Result<()> {
        let all: [&[&str]; 9] = [
            &["create", NAME, "x", "--internal"],
            &["create", NAME, "x", "--external"],
            &["create", NAME, "x", "--dry-run"],
            &["revert", NAME, "s1"],
            &["revert", NAME, "s2"],
            &["delete", NAME, "s1"],
            &["delete", NAME, "s2"],
            &["delete", NAME, "s1", "--children"],
            &["recover", NAME],
        ];
        for args in all {
            let outcome = domain.declined(args, status::REFUSED)?;
            for word in ["import --replace", "a.qcow2", "no changes made"] {
                ensure!(outcome.stderr.contains(word), "{word:?} is not said: {outcome}");
            }
        }
        domain.domsnap().done(&["list", NAME])?;
        let check = domain.domsnap().run(&["check", NAME])?.expect_status(status::FAILED)?;
        ensure!(check.stdout.contains("import --replace"), "check does not say it: {check}");
        Ok(())
    }

    /// `later` happens after the state directory was saved, which is then put back.
    fn round(kinds: &[&str], later: impl Fn(&mut Domain) -> Result<()>) -> Result<()> {
        let mut domain = line(kinds)?;
        let saved = tempfile::tempdir()?;
        let saved = saved.path().join("state");
        copy_tree(&domain.state(), &saved)?;
        later(&mut domain)?;
        domain.write_everywhere()?;
        put_back(&domain, &saved)?;
        is_refused(&domain)?;
        domain.domsnap().done(&["import", "--replace", &domain.paths()])?;
        domain.verify().context("after the import")?;
        domain.write_and_create("after", "external")?;
        domain.write_and_create("after2", "internal")?;
        domain.revert("s3")?;
        domain.verify()?;
        domain.delete(&["s3"])?;
        domain.verify()?;
        // And what it was brought back from is not authoritative any more either.
        put_back(&domain, &saved)?;
        is_refused(&domain)?;
        domain.domsnap().done(&["import", "--replace", NAME])?;
        domain.verify()
    }

    #[test]
    fn from_before_a_delete_that_merged_is_refused() -> Result<()> {
        for kinds in [["external"; 3], ["internal", "external", "mixed"]] {
            round(&kinds, |domain| domain.delete(&["s2"])).with_context(|| format!("{kinds:?}"))?;
        }
        Ok(())
    }

    #[test]
    fn from_before_a_revert_and_a_snapshot_is_refused() -> Result<()> {
        round(&["external", "internal", "external"], |domain| {
            domain.revert("s1")?;
            domain.write_and_create("side", "external")
        })
    }

    /// From before an internal snapshot is refused and its manifest stays.
    #[test]
    fn from_before_an_internal_snapshot_is_refused() -> Result<()> {
        round(&["internal", "internal", "internal"], |domain| {
            let args = ["create", NAME, "s4", "--internal", "--description", "important"];
            domain.domsnap().done(&args)?;
            domain.model.create("s4");
            Ok(())
        })
    }

    /// With an operation in its journal that ended long since resumes nothing.
    #[test]
    fn with_an_ended_operation_resumes_nothing() -> Result<()> {
        let mut domain = line(&["external", "external", "external"])?;
        let saved = tempfile::tempdir()?;
        let (before, stale) = (saved.path().join("before"), saved.path().join("stale"));
        domain.save_to(&before)?;
        let count = {
            let (_kept, file) = shim::outputs()?;
            let domsnap = shim::watching(domain.domsnap(), domain.root())?;
            shim::counting(domsnap, &file).done(&["delete", NAME, "s2"])?;
            shim::counted(&file)?.len() as u64
        };
        domain.restore_from(&before)?;
        let domsnap = shim::watching(domain.domsnap(), domain.root())?;
        let outcome = shim::killing(domsnap, count / 2, false).run(&["delete", NAME, "s2"])?;
        ensure!(outcome.status.is_none(), "it was not killed: {outcome}");
        copy_tree(&domain.state(), &stale)?;
        let reports = domain.domsnap().done(&["recover", "--json"])?.stdout;
        ensure!(
            reports.contains("\"done\""),
            "it was not half way at operation {} of {count}: {reports}",
            count / 2
        );
        domain.model.delete(&["s2".into()]);
        domain.verify()?;
        domain.write_and_create("later", "external")?;
        domain.revert("s3")?;
        domain.write_everywhere()?;
        put_back(&domain, &stale)?;
        let outcome = domain.declined(&["recover"], status::REFUSED)?;
        ensure!(outcome.stderr.contains("import --replace"), "no way out is named: {outcome}");
        domain.domsnap().done(&["import", "--replace", &domain.paths()])?;
        domain.verify()?;
        domain.domsnap().done(&["recover"])?;
        domain.verify()
    }

    #[test]
    fn is_forgotten_without_a_loss() -> Result<()> {
        let mut domain = line(&["external", "external"])?;
        let saved = tempfile::tempdir()?;
        let saved = saved.path().join("state");
        copy_tree(&domain.state(), &saved)?;
        domain.write_and_create("s3", "mixed")?;
        domain.delete(&["s1"])?;
        put_back(&domain, &saved)?;
        let before = contents(&domain.disks())?;
        domain.domsnap().done(&["domain", "remove", NAME])?;
        same_contents(&domain.disks(), &before)?;
        domain.register()?;
        domain.verify()
    }

    #[test]
    fn finds_an_active_image_that_has_another_path_now() -> Result<()> {
        let mut domain = Domain::unregistered(&Shape::disks(1))?;
        domain.domsnap().done(&[domain.register_args(), vec!["--active-path=new".into()]].concat())?;
        let disk = domain.path("vda");
        domain.write_everywhere()?;
        domain.create("s1", "external")?;
        let saved = tempfile::tempdir()?;
        let saved = saved.path().join("state");
        copy_tree(&domain.state(), &saved)?;
        domain.create("s2", "external")?;
        let frozen = std::fs::read(&disk)?;
        put_back(&domain, &saved)?;
        domain.declined(&["create", NAME, "x"], status::REFUSED)?;
        domain.domsnap().done(&["import", "--replace", NAME])?;
        let list = report::list(&domain.domsnap(), NAME)?;
        verify::tree(&list, &domain.model)?;
        ensure!(std::fs::read(&disk)? == frozen, "a frozen layer changed");
        // The layer that was active is a frozen one now, by its own path too.
        let layer = domain.disks().join(&list.snapshots[1].points[0].layer);
        let active = domain.disks().join("a.qcow2");
        for path in [&layer, &active] {
            let args = ["create".as_ref(), path.as_os_str(), "x".as_ref()];
            domain.declined(&args, status::REFUSED)?;
        }
        for (snapshot, layer) in [("s1", &active), ("s2", &layer)] {
            let bytes = &domain.model.snapshots[snapshot].disks["vda"];
            verify::bytes(layer, None, bytes, &mut Default::default()).context(snapshot)?;
        }
        Ok(())
    }
}

mod two_catalogues {
    use super::*;

    #[test]
    fn take_turns_by_import_and_nothing_is_lost_between() -> Result<()> {
        for kinds in [["external"; 2], ["internal"; 2], ["mixed"; 2]] {
            let mut domain = line(&kinds)?;
            let second = Domsnap::new(&domain.root().join("second"));
            let paths = domain.paths();
            second.done(&["create", &paths, "theirs", "--external"])?;
            domain.model.create("theirs");
            domain.write_everywhere()?;
            second.done(&["delete", &paths, "s1"])?;
            domain.model.delete(&["s1".into()]);
            for args in [["revert", NAME, "s1"], ["delete", NAME, "s2"], ["create", NAME, "x"]] {
                let outcome = domain.declined(&args, status::REFUSED)?;
                ensure!(
                    outcome.stderr.contains("another state directory"),
                    "who else is not said: {outcome}"
                );
            }
            domain.domsnap().done(&["import", "--replace", &paths])?;
            domain.verify().with_context(|| format!("{kinds:?}"))?;
            domain.write_and_create("ours", "internal")?;
            let before = contents(&domain.disks())?;
            for args in [["revert", &paths, "theirs"], ["delete", &paths, "s2"]] {
                second.run(&args)?.expect_status(status::REFUSED)?;
                same_contents(&domain.disks(), &before)?;
            }
            domain.verify()?;
            second.done(&["import", "--replace", &paths])?;
            second.done(&["revert", &paths, "ours"])?;
            domain.model.revert("ours");
            domain.declined(&["create", NAME, "x"], status::REFUSED)?;
            domain.domsnap().done(&["import", "--replace", &paths])?;
            domain.verify()?;
        }
        Ok(())
    }

    /// Are distinguished from a crash between the catalogue and the manifests.
    #[test]
    fn are_distinguished_from_a_crash() -> Result<()> {
        // Manifests that are behind, or gone, are written again by the next change.
        let mut domain = line(&["external", "internal"])?;
        let manifests = domain.disks().join("a.qcow2.domsnap");
        let saved = tempfile::tempdir()?;
        let saved = saved.path().join("manifests");
        copy_tree(&manifests, &saved)?;
        domain.write_and_create("s3", "mixed")?;
        domain.delete(&["s1"])?;
        std::fs::remove_dir_all(&manifests)?;
        copy_tree(&saved, &manifests)?;
        domain.write_and_create("s4", "external")?;
        std::fs::remove_dir_all(&manifests)?;
        domain.write_and_create("s5", "internal")?;
        domain.verify()?;
        lose_the_catalogue(&domain)?;
        domain.register()?;
        domain.verify()
    }
}

mod layers_are_no_disks {
    use super::*;

    fn layers(domain: &Domain) -> Result<Vec<String>> {
        let mut found = Vec::new();
        for entry in std::fs::read_dir(domain.disks())? {
            let path = entry?.path().display().to_string();
            if path.contains(".ds-") {
                found.push(path);
            }
        }
        ensure!(found.len() > 4, "too few layers: {found:?}");
        Ok(found)
    }

    /// A tree with a branch: frozen layers that no path names, one of them a leaf with internal snapshots.
    fn tree() -> Result<Domain> {
        let mut domain = line(&["external", "external", "internal"])?;
        domain.revert("s1")?;
        domain.write_and_create("side", "mixed")?;
        domain.write_everywhere()?;
        Ok(domain)
    }

    fn are_refused(domain: &Domain) -> Result<()> {
        for layer in layers(domain)? {
            let all: [&[&str]; 6] = [
                &["create", &layer, "x", "--internal"],
                &["create", &layer, "x", "--external"],
                &["revert", &layer, "s3"],
                &["delete", &layer, "s3"],
                &["import", &layer],
                &["disk", "create", &layer, "x", "--external"],
            ];
            for args in all {
                let outcome = domain.declined(args, status::REFUSED)?;
                let named = ["a.qcow2", "b.qcow2"]
                    .iter()
                    .any(|image| outcome.stderr.contains(&format!("disks/{image}")));
                ensure!(named, "the domain's images are not named: {outcome}");
            }
            for args in [["disk", "revert", &layer, "s3"], ["disk", "delete", &layer, "s3"]] {
                domain.declined(&args, status::REFUSED)?;
            }
        }
        Ok(())
    }

    /// With the catalogue lost and the manifests stay what they are.
    #[test]
    fn with_the_catalogue_lost_keep_manifests() -> Result<()> {
        let mut domain = tree()?;
        lose_the_catalogue(&domain)?;
        are_refused(&domain)?;
        domain.domsnap().done(&["import", &domain.paths(), "--name", NAME])?;
        domain.verify()?;
        are_refused(&domain)?;
        domain.revert("s3")?;
        domain.verify()
    }

    /// Its path would move away under the layer, whose only name it is.
    #[test]
    fn nor_an_unknown_active_one_by_permanent_name() -> Result<()> {
        use std::os::unix::fs::MetadataExt;
        let domain = line(&["external"])?;
        lose_the_catalogue(&domain)?;
        for entry in std::fs::read_dir(domain.disks())? {
            let path = entry?.path();
            if path.is_dir() {
                std::fs::remove_dir_all(path)?;
            }
        }
        let inode = |path: &Path| std::fs::metadata(path).map(|about| about.ino());
        let active = inode(&domain.path("vda"))?;
        let mut found = 0;
        for entry in std::fs::read_dir(domain.disks())? {
            let path = entry?.path();
            if path.to_string_lossy().contains(".ds-") && inode(&path)? == active {
                found += 1;
                let path = path.display().to_string();
                for args in [["create", &path, "x", "--external"], ["disk", "create", &path, "x"]] {
                    let outcome = domain.domsnap().run(&args)?;
                    ensure!(args[0] == "disk" || outcome.status == Some(status::REFUSED), "{outcome}");
                }
            }
        }
        ensure!(found == 1, "{found} permanent names of the active layer");
        ensure!(inode(&domain.path("vda"))? == active, "the configured path was moved");
        Ok(())
    }

    #[test]
    fn of_a_domain_that_was_removed() -> Result<()> {
        let domain = tree()?;
        domain.domsnap().done(&["domain", "remove", NAME])?;
        are_refused(&domain)?;
        domain.register()?;
        domain.verify()
    }

    /// Nor are some of a domains disks or all in another order.
    #[test]
    fn nor_other_disks_or_another_order() -> Result<()> {
        let domain = tree()?;
        lose_the_catalogue(&domain)?;
        let (a, b) = (domain.path("vda").display().to_string(), domain.path("vdb").display().to_string());
        for images in [&a, &b, &format!("{b},{a}")] {
            for args in [["create", images, "x"], ["revert", images, "s1"], ["delete", images, "s1"]] {
                let outcome = domain.declined(&args, status::REFUSED)?;
                ensure!(
                    outcome.stderr.contains(&format!("{a},{b}")),
                    "the right args are not named: {outcome}"
                );
            }
        }
        domain.domsnap().done(&["import", &domain.paths(), "--name", NAME])?;
        domain.verify()
    }

    /// And internal snapshots of a domain are not the image alones.
    #[test]
    fn nor_internal_snapshots_of_a_domain() -> Result<()> {
        let domain = line(&["internal", "internal"])?;
        lose_the_catalogue(&domain)?;
        let image = domain.path("vda").display().to_string();
        for args in [["disk", "revert", &image, "s1"], ["disk", "delete", &image, "s1"]] {
            let outcome = domain.declined(&args, status::REFUSED)?;
            ensure!(outcome.stderr.contains("domsnap import"), "no way out is named: {outcome}");
        }
        domain.register()?;
        domain.verify()
    }
}

/// A domain that is imported from manifests, killed at operations on files: at each with
/// `DOMSNAP_STRIKES_EVERY=1`.
mod killed_anywhere {
    use super::*;

    /// Of so few instants, all are tried.
    const FEW: usize = 20;

    /// Runs `args` on what `prepare` made, killed before each of its operations in turn; `after` looks.
    fn everywhere(
        domain: &Domain,
        args: &[&str],
        mut after: impl FnMut(&mut Domain) -> Result<()>,
    ) -> Result<()> {
        let kept = tempfile::tempdir()?;
        let kept = kept.path().join("kept");
        domain.save_to(&kept)?;
        let (_outputs, file) = shim::outputs()?;
        let domsnap = shim::watching(domain.domsnap(), domain.root())?;
        shim::counting(domsnap, &file).done(args)?;
        let operations = shim::counted(&file)?;
        let distinguished: Vec<_> =
            (0..operations.len()).filter(|index| crash::is_distinguished(&operations, *index)).collect();
        let every = if distinguished.len() > FEW { crash::sampled() } else { 1 };
        let mut killed = 0;
        for operation in distinguished.into_iter().map(|index| &operations[index]).step_by(every) {
            domain.restore_from(&kept)?;
            let domsnap = shim::watching(domain.domsnap(), domain.root())?;
            let outcome = shim::killing(domsnap, operation.number, false).run(args)?;
            // Threads may need an operation less than last time: then it went through.
            killed += usize::from(outcome.status.is_none());
            after(&mut domain.at(domain.root())).with_context(|| format!("killed at {operation:?}"))?;
        }
        ensure!(killed > 5, "it was killed {killed} times alone: {operations:?}");
        Ok(())
    }

    /// As [`whole`], after a crash: clusters may have leaked.
    fn whole_after_crash(domain: &Domain, address: &str, memo: &mut verify::Memo) -> Result<()> {
        let list = report::list(&domain.domsnap(), address)?;
        verify::tree(&list, &domain.model)?;
        verify::every_image_after_crash(domain, &list, &domain.model, memo)
    }

    /// Deletes the internal snapshot `s1` of the disk, if it is there, and makes another of that name with
    /// other data, as any tool can. The active state stays as it is.
    fn replace_tag(image: &Path, theirs: &[u8]) -> Result<()> {
        let tag = |flag: &str, name: &str| {
            qemu::img(&["snapshot".as_ref(), flag.as_ref(), name.as_ref(), image.as_os_str()])
        };
        tag("-c", "present")?;
        qemu::write(image, &[qemu::Write { offset: 0, length: theirs.len() as u64, byte: Some(theirs[0]) }])?;
        if qemu::img(&["snapshot".as_ref(), "-l".as_ref(), image.as_os_str()])?.contains(" s1 ") {
            tag("-d", "s1")?;
        }
        tag("-c", "s1")?;
        tag("-a", "present")?;
        tag("-d", "present").map(drop)
    }

    /// A tag that another program replaced after the crash is neither applied nor deleted by the recovery.
    #[test]
    fn replaced_tag_is_left_alone_by_recovery() -> Result<()> {
        let mut domain = Domain::new(&Shape::disks(1))?;
        domain.write_everywhere()?;
        domain.create("s1", "internal")?;
        domain.write_everywhere()?;
        let image = domain.path("vda");
        let states = [qemu::read(&image, None)?, qemu::read(&image, Some("s1"))?];
        let theirs = vec![0xA7; 1 << 20];
        let kept = tempfile::tempdir()?;
        let kept = kept.path().join("kept");
        domain.save_to(&kept)?;
        for args in [["delete", NAME, "s1"], ["revert", NAME, "s1"]] {
            domain.restore_from(&kept)?;
            everywhere(&domain, &args, |domain| {
                replace_tag(&image, &theirs)?;
                let outcome = domain.domsnap().run(&["recover"])?;
                let found = qemu::read(&image, Some("s1"))?;
                ensure!(found.starts_with(&theirs), "{args:?}: their snapshot is gone: {outcome}");
                ensure!(states.contains(&qemu::read(&image, None)?), "{args:?}: another state: {outcome}");
                // The domain is not locked by it.
                domain.domsnap().done(&["create", NAME, "next", "--external"]).map(drop)
            })?;
        }
        Ok(())
    }

    /// An import over an older catalogue can be given again.
    #[test]
    fn import_over_an_older_catalogue_repeats() -> Result<()> {
        let mut domain = line(&["external", "mixed", "external"])?;
        let saved = tempfile::tempdir()?;
        let saved = saved.path().join("state");
        copy_tree(&domain.state(), &saved)?;
        domain.delete(&["s2"])?;
        domain.write_and_create("s4", "mixed")?;
        domain.write_everywhere()?;
        put_back(&domain, &saved)?;
        let (paths, mut memo) = (domain.paths(), verify::Memo::default());
        everywhere(&domain, &["import", "--replace", &paths], |domain| {
            // Either it has not happened, and a change is still refused, or it has, and the change is made.
            let outcome = domain.domsnap().run(&["revert", NAME, "s4"])?;
            match outcome.status {
                Some(status::REFUSED) => {
                    domain.domsnap().done(&["import", "--replace", &paths])?;
                }
                Some(status::DONE) => domain.model.revert("s4"),
                _ => anyhow::bail!("{outcome}"),
            }
            whole_after_crash(domain, NAME, &mut memo)
        })
    }

    /// A snapshot with the catalogue lost happened or did not.
    #[test]
    fn snapshot_without_catalogue_is_atomic() -> Result<()> {
        let domain = line(&["external", "mixed"])?;
        lose_the_catalogue(&domain)?;
        let (paths, mut memo, mut crashes) = (domain.paths(), verify::Memo::default(), 0);
        everywhere(&domain, &["create", &paths, "new", "--external"], |domain| {
            domain.domsnap().done(&["recover"])?;
            let list = report::list(&domain.domsnap(), &paths)?;
            if list.current.as_deref() == Some("new") {
                domain.model.create("new");
            }
            whole_after_crash(domain, &paths, &mut memo)?;
            // The next command finds one of the two states that were compared just now.
            crashes += 1;
            if crashes % seed::from_env("DOMSNAP_NEXT_EVERY", 2).max(1) != 0 {
                return Ok(());
            }
            domain.domsnap().done(&["delete", &paths, "s1"])?;
            domain.model.delete(&["s1".into()]);
            whole_after_crash(domain, &paths, &mut memo)?;
            lose_the_catalogue(domain)?;
            whole_after_crash(domain, &paths, &mut memo).context("by the manifests alone")
        })
    }

    /// A delete with the catalogue lost leaves no manifest of what is gone.
    #[test]
    fn delete_without_catalogue_leaves_no_manifest() -> Result<()> {
        let domain = line(&["external", "external"])?;
        lose_the_catalogue(&domain)?;
        let (paths, mut memo) = (domain.paths(), verify::Memo::default());
        everywhere(&domain, &["delete", &paths, "s1"], |domain| {
            domain.domsnap().done(&["recover"])?;
            let list = report::list(&domain.domsnap(), &paths)?;
            if list.snapshots.len() == 1 {
                domain.model.delete(&["s1".into()]);
            }
            whole_after_crash(domain, &paths, &mut memo)?;
            lose_the_catalogue(domain)?;
            whole_after_crash(domain, &paths, &mut memo).context("by the manifests alone")
        })
    }
}
