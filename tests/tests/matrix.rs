//! What a domain at rest must be able to do: each row of the proposal that domsnap started from, each thing
//! that other tools refuse or get wrong. Every test ends by comparing every point of the tree with the model.

use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::Path;

use anyhow::{Context, Result, ensure};
use domsnap_tests::domain::{Domain, NAME, Shape, contents, same_contents};
use domsnap_tests::domsnap::status;
use domsnap_tests::report::{self, Kind};
use domsnap_tests::{qemu, verify};

/// A domain of `disks` disks with the snapshots `kinds`, called `s1`, `s2`, ..., and writes between and
/// after.
fn line(disks: usize, kinds: &[&str]) -> Result<Domain> {
    let mut domain = Domain::new(&Shape::disks(disks))?;
    for (index, kind) in kinds.iter().enumerate() {
        domain.create(&format!("s{}", index + 1), kind)?;
        domain.write_everywhere()?;
    }
    Ok(domain)
}

mod create {
    use super::*;

    fn of_kind(disks: usize, kind: &str, kinds: &[Kind]) -> Result<()> {
        let mut domain = line(disks, &[kind, kind])?;
        let list = report::list(&domain.domsnap(), NAME)?;
        for snapshot in &list.snapshots {
            let found: Vec<_> = snapshot.points.iter().map(|point| point.kind).collect();
            ensure!(found == kinds, "{} is {found:?}", snapshot.name);
        }
        domain.verify()?;
        domain.write_everywhere()?;
        domain.verify()
    }

    #[test]
    fn an_internal_snapshot_of_all_disks() -> Result<()> {
        of_kind(2, "internal", &[Kind::Internal; 2])
    }

    #[test]
    fn an_external_snapshot_of_all_disks() -> Result<()> {
        of_kind(2, "external", &[Kind::External; 2])
    }

    #[test]
    fn a_mixed_snapshot_which_libvirt_refuses() -> Result<()> {
        of_kind(3, "mixed", &[Kind::Internal, Kind::External, Kind::Internal])
    }

    #[test]
    fn a_snapshot_without_a_name_gets_one() -> Result<()> {
        let mut domain = line(1, &[])?;
        domain.domsnap().done(&["create", NAME, "--external"])?;
        let list = report::list(&domain.domsnap(), NAME)?;
        let name = list.current.context("no current snapshot")?;
        domain.model.create(&name);
        domain.verify()
    }

    #[test]
    fn a_disk_that_is_skipped_is_not_in_the_snapshot() -> Result<()> {
        let mut domain = line(2, &[])?;
        domain.domsnap().done(&["create", NAME, "s1", "--external", "--disk", "vdb=skip"])?;
        domain.model.create_of("s1", &["vda".into()]);
        domain.write_everywhere()?;
        domain.verify()?;
        domain.revert("s1")?;
        domain.verify()
    }

    /// Disks are addressed by their paths with nothing registered.
    #[test]
    fn unregistered_disks_are_addressed_by_path() -> Result<()> {
        let mut domain = Domain::unregistered(&Shape::disks(2))?;
        domain.write_everywhere()?;
        let paths = domain.paths();
        for (name, kind) in [("one", "--internal"), ("two", "--external")] {
            domain.domsnap().done(&["create", &paths, name, kind])?;
            domain.model.create(name);
            domain.write_everywhere()?;
        }
        verify::every_point(&domain, &domain.model, &paths, &mut Default::default())
    }

    #[test]
    fn a_name_is_taken_once() -> Result<()> {
        let domain = line(1, &["internal"])?;
        for kind in ["--internal", "--external"] {
            let outcome = domain.declined(&["create", NAME, "s1", kind], status::REFUSED)?;
            ensure!(outcome.stderr.contains("s1"), "the name is not named: {outcome}");
        }
        domain.verify()
    }

    #[test]
    fn a_name_that_cannot_be_is_a_matter_of_usage() -> Result<()> {
        let domain = line(1, &[])?;
        let long = "x".repeat(256);
        for name in ["", ".hidden", "-dash", "a/b", "a b", "ü", "a\nb", &long] {
            let args = ["create", NAME, "--internal", "--", name];
            domain.declined(&args, status::USAGE).with_context(|| format!("name {name:?}"))?;
        }
        domain.verify()
    }

    #[test]
    fn every_name_that_may_be_works() -> Result<()> {
        let mut domain = line(1, &[])?;
        let long = "n".repeat(255);
        for name in ["A.b_c-d+e:f9", "0", &long] {
            domain.write_and_create(name, "external")?;
            domain.write_and_create(&format!("i{}", &name[..name.len() - 1]), "internal")?;
        }
        domain.verify()
    }
}

mod every_image_shape {
    use super::*;

    /// Internal, external, revert to each, delete the middle, on images made with `options`.
    fn round(options: &str) -> Result<()> {
        let mut domain = Domain::new(&Shape::disks(1).options(options))?;
        for (name, kind) in [("i1", "internal"), ("e1", "external"), ("i2", "internal"), ("e2", "external")] {
            domain.write_and_create(name, kind)?;
        }
        domain.write_everywhere()?;
        domain.verify()?;
        for name in ["i1", "e2", "e1", "i2"] {
            domain.revert(name).context(name.to_owned())?;
            domain.verify().with_context(|| format!("after revert to {name}"))?;
            domain.write_everywhere()?;
        }
        domain.delete(&["e1"])?;
        domain.verify()?;
        domain.delete(&["i2", "i1"])?;
        domain.verify()
    }

    macro_rules! shapes {
        ($($name:ident $options:literal)*) => { $(#[test] fn $name() -> Result<()> { round($options) })* };
    }

    shapes! {
        clusters_of_512_bytes "cluster_size=512"
        clusters_of_64_kib "cluster_size=65536"
        clusters_of_2_mib "cluster_size=2M"
        version_2 "compat=0.10,cluster_size=4096"
        extended_l2 "extended_l2=on,cluster_size=16384"
        lazy_refcounts "lazy_refcounts=on,cluster_size=4096"
        refcounts_of_8_bits "refcount_bits=8,cluster_size=4096"
        refcounts_of_64_bits "refcount_bits=64,cluster_size=4096"
        zstd_clusters "compression_type=zstd,cluster_size=65536"
        preallocated_metadata "preallocation=metadata,cluster_size=4096"
    }

    #[test]
    fn compressed_clusters_survive_every_way_of_moving() -> Result<()> {
        for kind in ["zlib", "zstd"] {
            let mut domain = Domain::new(&Shape::disks(1).options("cluster_size=65536"))?;
            domain.fill(1 << 20)?;
            let (path, packed) = (domain.path("vda"), domain.root().join("packed"));
            let option = format!("cluster_size=65536,compression_type={kind}");
            let args: [&std::ffi::OsStr; 8] = [
                "convert".as_ref(),
                "-c".as_ref(),
                "-O".as_ref(),
                "qcow2".as_ref(),
                "-o".as_ref(),
                option.as_ref(),
                path.as_ref(),
                packed.as_ref(),
            ];
            qemu::img(&args)?;
            std::fs::rename(&packed, &path)?;
            for (name, kind) in [("e1", "external"), ("i1", "internal"), ("e2", "external")] {
                domain.write_and_create(name, kind)?;
            }
            domain.revert("i1")?;
            domain.verify()?;
            domain.delete(&["e1"])?;
            domain.verify()?;
            domain.delete(&["e2", "i1"])?;
            domain.verify()?;
        }
        Ok(())
    }

    /// An image resized between snapshots has each size again.
    #[test]
    fn resized_image_reverts_to_each_size() -> Result<()> {
        for kind in ["internal", "external"] {
            let mut domain = line(1, &[kind])?;
            let path = domain.path("vda");
            qemu::img(&[
                "resize".as_ref(),
                "-q".as_ref(),
                "-f".as_ref(),
                "qcow2".as_ref(),
                path.as_os_str(),
                "6M".as_ref(),
            ])
            .context("qemu-img resize")?;
            std::sync::Arc::make_mut(domain.model.present.get_mut("vda").unwrap()).resize(6 << 20, 0);
            domain.write_and_create("big", kind)?;
            domain.verify()?;
            for name in ["s1", "big", "s1"] {
                domain.revert(name)?;
                domain.verify().with_context(|| format!("{kind}, {name}"))?;
            }
            domain.revert("big")?;
            domain.delete(&["s1"])?;
            domain.verify()?;
        }
        Ok(())
    }
}

mod revert {
    use super::*;

    fn there_and_back(kinds: &[&str]) -> Result<()> {
        let mut domain = line(2, kinds)?;
        let names: Vec<_> = domain.model.snapshots.keys().cloned().collect();
        for name in names.iter().chain(names.iter().rev()) {
            domain.revert(name)?;
            domain.verify().with_context(|| format!("after revert to {name}"))?;
            domain.write_everywhere()?;
        }
        domain.verify()
    }

    #[test]
    fn to_any_of_all_internal_snapshots() -> Result<()> {
        there_and_back(&["internal", "internal", "internal"])
    }

    #[test]
    fn to_any_of_all_external_snapshots() -> Result<()> {
        there_and_back(&["external", "external", "external"])
    }

    #[test]
    fn to_any_of_a_mixed_line() -> Result<()> {
        there_and_back(&["internal", "external", "mixed", "internal"])
    }

    #[test]
    fn to_one_gold_snapshot_again_and_again() -> Result<()> {
        for kind in ["internal", "external"] {
            let mut domain = line(1, &[kind])?;
            for _ in 0..4 {
                domain.write_everywhere()?;
                domain.revert("s1")?;
                domain.verify()?;
            }
        }
        Ok(())
    }

    #[test]
    fn newer_and_sibling_snapshots_stay_whole() -> Result<()> {
        for kind in ["internal", "external"] {
            let mut domain = line(2, &[kind, kind])?;
            domain.revert("s1")?;
            domain.write_and_create("sibling", kind)?;
            domain.write_everywhere()?;
            domain.revert("s2")?;
            domain.verify()?;
            domain.revert("sibling")?;
            domain.verify()?;
        }
        Ok(())
    }

    /// To an internal point under an overlay leaves what depends on the image whole.
    #[test]
    fn to_an_internal_point_under_an_overlay() -> Result<()> {
        // libvirt hands the guest the base that e1 and i2 depend on; after a write, i2 reads wrong.
        let mut domain = Domain::new(&Shape::disks(1))?;
        for (name, kind) in [("i1", "internal"), ("e1", "external"), ("i2", "internal")] {
            domain.write_and_create(name, kind)?;
        }
        domain.revert("i1")?;
        domain.write_everywhere()?;
        domain.verify()?;
        domain.revert("i2")?;
        domain.verify()
    }

    #[test]
    fn saving_the_present_under_a_name_first() -> Result<()> {
        for kinds in [["internal", "internal"], ["external", "external"], ["internal", "external"]] {
            let mut domain = line(2, &kinds)?;
            domain.domsnap().done(&["revert", NAME, "s1", "--save-current=kept"])?;
            domain.model.create("kept");
            domain.model.revert("s1");
            domain.verify().with_context(|| format!("{kinds:?}"))?;
            domain.revert("kept")?;
            domain.verify().with_context(|| format!("{kinds:?}, back"))?;
        }
        Ok(())
    }

    #[test]
    fn to_a_name_that_is_not_there_is_refused() -> Result<()> {
        let domain = line(1, &["external"])?;
        let outcome = domain.declined(&["revert", NAME, "nothing"], status::REFUSED)?;
        ensure!(outcome.stderr.contains("nothing"), "the name is not named: {outcome}");
        domain.verify()
    }
}

mod delete {
    use super::*;

    #[test]
    fn the_only_snapshot() -> Result<()> {
        for kind in ["internal", "external", "mixed"] {
            let mut domain = line(2, &[kind])?;
            domain.delete(&["s1"])?;
            domain.verify().with_context(|| kind.to_owned())?;
            domain.write_and_create("again", kind)?;
            domain.verify().with_context(|| kind.to_owned())?;
        }
        Ok(())
    }

    #[test]
    fn each_of_a_line_in_every_order() -> Result<()> {
        let orders = [
            ["s1", "s2", "s3"],
            ["s1", "s3", "s2"],
            ["s2", "s1", "s3"],
            ["s2", "s3", "s1"],
            ["s3", "s1", "s2"],
            ["s3", "s2", "s1"],
        ];
        for (index, order) in orders.iter().enumerate() {
            let kinds =
                [["external"; 3], ["external", "internal", "external"], ["internal", "external", "mixed"]]
                    [index % 3];
            let mut domain = line(1, &kinds)?;
            for name in order {
                domain.delete(&[name])?;
                domain.verify().with_context(|| format!("{kinds:?}, {order:?}, after {name}"))?;
            }
        }
        Ok(())
    }

    #[test]
    fn several_at_once() -> Result<()> {
        for kind in ["internal", "external", "mixed"] {
            let mut domain = line(2, &[kind, kind, kind, kind])?;
            domain.delete(&["s1", "s3", "s4"])?;
            domain.verify().with_context(|| kind.to_owned())?;
        }
        Ok(())
    }

    /// `s1` with the children `s2` and `side`, the current state on `side`.
    fn fork(kinds: [&str; 3]) -> Result<Domain> {
        let mut domain = line(2, &kinds[..2])?;
        domain.revert("s1")?;
        domain.write_and_create("side", kinds[2])?;
        domain.write_everywhere()?;
        Ok(domain)
    }

    /// An external one with several children which libvirt refuses.
    #[test]
    fn external_with_several_children() -> Result<()> {
        let mut domain = fork(["external"; 3])?;
        domain.delete(&["s1"])?;
        domain.verify()?;
        domain.revert("s2")?;
        domain.verify()?;
        domain.revert("side")?;
        domain.verify()
    }

    /// The layer that outlived its snapshot goes with the delete that frees it.
    #[test]
    fn orphan_layer_goes_with_its_last_user() -> Result<()> {
        let mut domain = fork(["external"; 3])?;
        domain.delete(&["s1"])?;
        domain.delete(&["s2"])?;
        domain.verify()?;
        let chain = verify::chain(&domain.path("vda"))?;
        ensure!(chain.len() == 2, "one frozen layer and the active one should be left: {chain:?}");
        domain.delete(&["side"])?;
        domain.verify()
    }

    /// An external one off the active chain in the middle which libvirt refuses.
    #[test]
    fn external_middle_off_the_active_chain() -> Result<()> {
        let mut domain = line(2, &["external", "external", "external"])?;
        domain.revert("s1")?;
        domain.write_everywhere()?;
        domain.delete(&["s2"])?;
        domain.verify()?;
        domain.revert("s3")?;
        domain.verify()
    }

    /// The current external one that is not a leaf which libvirt refuses.
    #[test]
    fn current_external_that_is_no_leaf() -> Result<()> {
        let mut domain = line(2, &["external", "external"])?;
        domain.revert("s1")?;
        domain.write_everywhere()?;
        domain.delete(&["s1"])?;
        domain.verify()?;
        domain.revert("s2")?;
        domain.verify()
    }

    #[test]
    fn a_subtree_of_any_mix_which_libvirt_refuses() -> Result<()> {
        for (option, keep) in [("--children", false), ("--children-only", true)] {
            let mut domain = line(2, &["external", "internal", "external", "mixed"])?;
            domain.revert("s3")?;
            domain.write_and_create("branch", "internal")?;
            domain.revert("s1")?;
            domain.write_everywhere()?;
            domain.domsnap().done(&["delete", NAME, "s2", option])?;
            let mut gone = domain.model.subtree("s2");
            if keep {
                gone.retain(|name| name != "s2");
            }
            domain.model.delete(&gone);
            domain.verify().context(option)?;
        }
        Ok(())
    }

    #[test]
    fn subtree_of_the_current_state() -> Result<()> {
        let mut domain = line(2, &["external", "internal", "external"])?;
        domain.domsnap().done(&["delete", NAME, "s1", "--children"])?;
        domain.model.delete(&domain.model.subtree("s1"));
        domain.verify()
    }

    /// An external one whose parent is internal which libvirt refuses.
    #[test]
    fn external_with_an_internal_parent() -> Result<()> {
        let mut domain = line(2, &["internal", "external"])?;
        domain.delete(&["s2"])?;
        domain.verify()?;
        domain.revert("s1")?;
        domain.verify()
    }

    #[test]
    fn an_internal_one_under_an_overlay() -> Result<()> {
        let mut domain = line(2, &["internal", "internal", "external"])?;
        domain.delete(&["s1"])?;
        domain.verify()?;
        domain.revert("s2")?;
        domain.verify()
    }

    /// An external one under an image that holds internal ones.
    #[test]
    fn external_under_an_image_with_internal() -> Result<()> {
        let mut domain = line(2, &["external", "internal", "internal"])?;
        domain.delete(&["s1"])?;
        domain.verify()?;
        domain.revert("s2")?;
        domain.verify()
    }

    /// An external one whose image holds internal ones keeps them.
    #[test]
    fn external_image_keeps_its_internal() -> Result<()> {
        let mut domain = line(2, &["internal", "external", "internal", "external"])?;
        domain.delete(&["s2"])?;
        domain.verify()?;
        domain.delete(&["s4"])?;
        domain.verify()?;
        for name in ["s1", "s3"] {
            domain.revert(name)?;
            domain.verify().with_context(|| name.to_owned())?;
        }
        Ok(())
    }

    #[test]
    fn a_chain_of_forty_from_the_middle() -> Result<()> {
        let mut domain = Domain::new(&Shape::disks(1))?;
        for number in 0..40 {
            if number % 10 == 0 {
                domain.write_everywhere()?;
            }
            domain.create(&format!("n{number}"), "external")?;
        }
        domain.write_everywhere()?;
        domain.delete(&["n20"])?;
        let middle: Vec<String> = (5..35).filter(|n| *n != 20).map(|n| format!("n{n}")).collect();
        domain.delete(&middle.iter().map(String::as_str).collect::<Vec<_>>())?;
        domain.verify()
    }

    /// A name that is not there is refused and the others stay.
    #[test]
    fn absent_name_is_refused() -> Result<()> {
        let domain = line(1, &["external", "internal"])?;
        domain.declined(&["delete", NAME, "s1", "nothing"], status::REFUSED)?;
        domain.verify()
    }
}

mod paths {
    use super::*;

    /// The configured path is always a name of the active layer.
    #[test]
    fn configured_path_names_the_active_layer() -> Result<()> {
        let mut domain = Domain::new(&Shape::disks(1))?;
        let active = |domain: &Domain| -> Result<u64> {
            let path = domain.path("vda");
            let meta = std::fs::metadata(&path)?;
            ensure!(std::fs::symlink_metadata(&path)?.is_file(), "it is no file");
            ensure!(
                meta.nlink() == 2,
                "it should have two names: its own and the configured one, has {}",
                meta.nlink()
            );
            let inode = meta.ino();
            let layers: Vec<_> = std::fs::read_dir(domain.disks())?
                .filter_map(|entry| entry.ok())
                .filter(|e| e.path() != path && e.metadata().is_ok_and(|m| m.ino() == inode))
                .map(|entry| entry.file_name().to_string_lossy().into_owned())
                .collect();
            ensure!(layers.len() == 1 && layers[0].starts_with("a.ds-"), "its own name is {layers:?}");
            Ok(inode)
        };
        domain.create("s1", "external")?;
        let first = active(&domain)?;
        domain.write_and_create("s2", "external")?;
        ensure!(active(&domain)? != first, "the second snapshot took no new layer");
        domain.revert("s1")?;
        active(&domain)?;
        domain.delete(&["s2"])?;
        active(&domain)?;
        domain.verify()
    }

    #[test]
    fn backing_strings_are_relative_and_name_the_format() -> Result<()> {
        let domain = line(2, &["external", "internal", "external"])?;
        for target in ["vda", "vdb"] {
            let info = qemu::img(&[
                "info".as_ref(),
                "--backing-chain".as_ref(),
                "--output=json".as_ref(),
                domain.path(target).as_os_str(),
            ])?;
            let info: Vec<serde_json::Value> = serde_json::from_str(&info)?;
            ensure!(info.len() == 3, "the chain should be three deep: {info:?}");
            for layer in &info[..2] {
                let name = layer["backing-filename"].as_str().context("no backing file")?;
                ensure!(!name.contains('/'), "{name} is not relative");
                ensure!(layer["backing-filename-format"] == "qcow2", "no format: {layer}");
            }
        }
        domain.verify()
    }

    #[test]
    fn the_directory_can_be_moved_and_used_by_path() -> Result<()> {
        let domain = line(2, &["external", "internal", "external"])?;
        let elsewhere = tempfile::tempdir()?;
        let moved = domain.at(&elsewhere.path().join("moved"));
        domain.save_to(moved.root())?;
        for (target, bytes) in &moved.model.present {
            verify::bytes(&moved.path(target), None, bytes, &mut Default::default())?;
        }
        domain.verify()
    }

    #[test]
    fn new_files_are_no_more_readable_than_the_image() -> Result<()> {
        let mut domain = Domain::new(&Shape::disks(1))?;
        std::fs::set_permissions(domain.path("vda"), std::fs::Permissions::from_mode(0o600))?;
        domain.write_and_create("s1", "external")?;
        domain.write_and_create("s2", "internal")?;
        domain.revert("s1")?;
        domain.revert("s2")?;
        for entry in std::fs::read_dir(domain.disks())? {
            let entry = entry?;
            let (path, meta) = (entry.path(), entry.metadata()?);
            if meta.is_file() {
                ensure!(meta.permissions().mode() & 0o077 == 0, "{} is {:o}", path.display(), meta.mode());
            }
        }
        domain.verify()
    }

    /// A frozen layer can be backed up while the domain goes on.
    #[test]
    fn frozen_layer_can_be_backed_up() -> Result<()> {
        let mut domain = line(1, &["external"])?;
        let list = report::list(&domain.domsnap(), NAME)?;
        let layer = domain.disks().join(&list.snapshots[0].points[0].layer);
        let before = std::fs::read(&layer)?;
        domain.write_and_create("s2", "external")?;
        domain.revert("s1")?;
        domain.write_everywhere()?;
        ensure!(std::fs::read(&layer)? == before, "the frozen layer changed");
        domain.verify()
    }

    /// An image that another program replaced is noticed and named.
    #[test]
    fn replaced_image_is_named() -> Result<()> {
        let domain = line(1, &["external"])?;
        let path = domain.path("vda");
        let other = domain.root().join("other");
        std::fs::copy(&path, &other)?;
        std::fs::rename(&other, &path)?;
        let outcome = domain.declined(&["create", NAME, "s2", "--external"], status::REFUSED)?;
        ensure!(outcome.stderr.contains("/a.qcow2"), "the path is not named: {outcome}");
        Ok(())
    }
}

mod list_and_plan {
    use super::*;

    #[test]
    fn one_domain_all_domains_and_details() -> Result<()> {
        let domain = line(2, &["internal", "external"])?;
        let domsnap = domain.domsnap();
        let table = domsnap.done(&["list", NAME])?.stdout;
        let tree = domsnap.done(&["list", NAME, "--tree"])?.stdout;
        let disks = domsnap.done(&["list", NAME, "--disks"])?.stdout;
        let all = domsnap.done(&["list", "--all"])?.stdout;
        let details = domsnap.done(&["show", NAME, "s2"])?.stdout;
        for (what, text) in [("table", &table), ("tree", &tree), ("disks", &disks), ("all", &all)] {
            ensure!(text.contains("s1") && text.contains("s2"), "{what} misses a snapshot:\n{text}");
        }
        ensure!(details.contains("vda") && details.contains("vdb"), "details miss a disk:\n{details}");
        domain.verify()
    }

    #[test]
    fn every_json_output_is_one_document() -> Result<()> {
        let domain = line(1, &["internal", "external"])?;
        let commands: [&[&str]; 8] = [
            &["list", NAME],
            &["list", NAME, "--tree"],
            &["list", "--all"],
            &["show", NAME, "s1"],
            &["domain", "list"],
            &["domain", "show", NAME],
            &["check", NAME],
            &["backends"],
        ];
        for args in commands {
            let outcome = domain.domsnap().done(&[args, &["--json"]].concat())?;
            outcome.json::<serde_json::Value>()?;
        }
        Ok(())
    }

    #[test]
    fn a_dry_run_prints_a_plan_and_touches_nothing() -> Result<()> {
        let domain = line(2, &["external", "internal", "external"])?;
        let commands: [&[&str]; 6] = [
            &["create", NAME, "x", "--internal"],
            &["create", NAME, "x", "--external"],
            &["revert", NAME, "s1"],
            &["revert", NAME, "s2", "--save-current=x"],
            &["delete", NAME, "s2"],
            &["delete", NAME, "s1", "--children"],
        ];
        let before = contents(&domain.disks())?;
        for args in commands {
            let outcome = domain.domsnap().done(&[args, &["--dry-run"]].concat())?;
            ensure!(!outcome.stdout.trim().is_empty(), "no plan: {outcome}");
            same_contents(&domain.disks(), &before).with_context(|| outcome.to_string())?;
        }
        domain.verify()
    }

    #[test]
    fn check_finds_a_healthy_domain_healthy() -> Result<()> {
        let domain = line(2, &["external", "internal", "external"])?;
        domain.domsnap().done(&["check", NAME])?;
        domain.verify()
    }

    #[test]
    fn recover_with_nothing_to_heal_does_nothing() -> Result<()> {
        let domain = line(2, &["external", "internal"])?;
        let before = contents(&domain.disks())?;
        domain.domsnap().done(&["recover"])?;
        domain.domsnap().done(&["recover", NAME])?;
        same_contents(&domain.disks(), &before)?;
        domain.verify()
    }
}

mod catalogue {
    use super::*;

    /// A tree of every kind with a branch, its catalogue and journal gone.
    fn lost() -> Result<Domain> {
        let mut domain = line(2, &["external", "internal", "mixed"])?;
        domain.revert("s1")?;
        domain.write_and_create("side", "external")?;
        domain.write_everywhere()?;
        std::fs::remove_dir_all(domain.state())?;
        std::fs::create_dir(domain.state())?;
        Ok(domain)
    }

    fn is_whole(mut domain: Domain) -> Result<()> {
        domain.verify()?;
        domain.revert("s3")?;
        domain.delete(&["s2"])?;
        domain.verify()
    }

    /// A lost one is rebuilt by import from what lies beside the images.
    #[test]
    fn import_rebuilds_a_lost_one() -> Result<()> {
        let domain = lost()?;
        domain.domsnap().done(&["import", &domain.paths(), "--name", NAME])?;
        is_whole(domain)
    }

    /// A lost one is rebuilt when the domain is registered again.
    #[test]
    fn registering_rebuilds_a_lost_one() -> Result<()> {
        let domain = lost()?;
        domain.register()?;
        is_whole(domain)
    }

    #[test]
    fn tree_is_read_from_images_and_manifests() -> Result<()> {
        let domain = lost()?;
        verify::every_point(&domain, &domain.model, &domain.paths(), &mut Default::default())
    }

    /// A domain removed and registered again has its snapshots.
    #[test]
    fn removed_domain_registers_with_snapshots() -> Result<()> {
        let domain = line(2, &["external", "mixed"])?;
        domain.domsnap().done(&["domain", "remove", NAME])?;
        ensure!(!domain.registered()?, "it is still registered");
        domain.register()?;
        domain.verify()
    }

    /// All of a tree can be deleted and one image a disk is left.
    #[test]
    fn deleting_all_leaves_one_image_a_disk() -> Result<()> {
        let mut domain = line(2, &["external", "internal", "mixed", "external"])?;
        domain.revert("s2")?;
        domain.write_and_create("side", "external")?;
        domain.domsnap().done(&["delete", NAME, "s1", "--children"])?;
        domain.model.delete(&domain.model.subtree("s1"));
        domain.verify()?;
        let left: Vec<_> = contents(&domain.disks())?.into_keys().collect();
        ensure!(left == [Path::new("a.qcow2"), Path::new("b.qcow2")], "as in the beginning, but {left:?}");
        Ok(())
    }
}
