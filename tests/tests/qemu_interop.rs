//! What qemu-img made is understood, and qemu-img understands what domsnap made.

use std::collections::BTreeMap;
use std::ffi::OsStr;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};
use domsnap_tests::domain::{Domain, NAME, Shape};
use domsnap_tests::domsnap::status;
use domsnap_tests::model::Bytes;
use domsnap_tests::report::{self, List};
use domsnap_tests::{qemu, verify};

fn img(args: &[&str], image: &Path) -> Result<String> {
    let args: Vec<&OsStr> = args.iter().map(OsStr::new).chain([image.as_os_str()]).collect();
    qemu::img(&args)
}

/// A disk as qemu-img makes it: `base` with the internal snapshot `i0`, an overlay `mid` on it, and on that
/// the active image with the internal snapshot `i1`; data written at each step.
struct Foreign {
    domain: Domain,
    /// What each point holds, by file name and tag.
    points: BTreeMap<(String, Option<String>), Bytes>,
}

impl Foreign {
    fn new() -> Result<Foreign> {
        let mut domain = Domain::unregistered(&Shape::disks(1))?;
        let mut points = BTreeMap::new();
        let path = domain.path("vda");
        domain.write_everywhere()?;
        img(&["snapshot", "-c", "i0"], &path)?;
        points.insert(("base.qcow2".into(), Some("i0".into())), domain.model.present["vda"].clone());
        domain.write_everywhere()?;
        for name in ["base.qcow2", "mid.qcow2"] {
            points.insert((name.into(), None), domain.model.present["vda"].clone());
            std::fs::rename(&path, domain.disks().join(name))?;
            img(
                &["create", "-q", "-f", "qcow2", "-o", "cluster_size=4096", "-b", name, "-F", "qcow2"],
                &path,
            )?;
            domain.write_everywhere()?;
        }
        img(&["snapshot", "-c", "i1"], &path)?;
        points.insert(("a.qcow2".into(), Some("i1".into())), domain.model.present["vda"].clone());
        domain.write_everywhere()?;
        Ok(Foreign { domain, points })
    }

    /// `domsnap import` of the chain, as the domain [`NAME`].
    fn import(&self) -> Result<()> {
        let path = self.domain.path("vda").display().to_string();
        self.domain.domsnap().done(&["import", &path, "--name", NAME])?;
        Ok(())
    }

    /// Every point of the model is listed, and reads as it should.
    fn compare(&self, list: &List) -> Result<BTreeMap<(String, Option<String>), String>> {
        let mut names = BTreeMap::new();
        for snapshot in &list.snapshots {
            for point in &snapshot.points {
                let file =
                    point.layer.file_name().context("a layer with no name")?.to_string_lossy().into_owned();
                names.insert((file, point.tag.clone()), snapshot.name.clone());
            }
        }
        for (point, bytes) in &self.points {
            ensure!(names.contains_key(point), "{point:?} was not adopted: {names:?}");
            let layer: PathBuf = self.domain.disks().join(&point.0);
            verify::bytes(&layer, point.1.as_deref(), bytes, &mut Default::default())?;
        }
        verify::bytes(
            &self.domain.path("vda"),
            None,
            &self.domain.model.present["vda"],
            &mut Default::default(),
        )?;
        Ok(names)
    }
}

/// A chain with internal snapshots made by qemu img is adopted when its domain is registered.
#[test]
fn qemu_img_chain_is_adopted() -> Result<()> {
    let foreign = Foreign::new()?;
    foreign.import()?;
    let names = foreign.compare(&report::list(&foreign.domain.domsnap(), NAME)?)?;
    for (point, name) in names.iter().filter(|(point, _)| point.1.is_some()) {
        ensure!(
            point.1.as_ref() == Some(name),
            "an internal snapshot keeps its name: {point:?} became {name}"
        );
    }
    Ok(())
}

#[test]
fn a_chain_made_by_qemu_img_is_imported_by_its_path() -> Result<()> {
    let foreign = Foreign::new()?;
    let path = foreign.domain.path("vda").display().to_string();
    foreign.domain.domsnap().done(&["import", &path, "--name", NAME])?;
    foreign.compare(&report::list(&foreign.domain.domsnap(), NAME)?)?;
    Ok(())
}

/// Every adopted point can be reverted to and none is harmed.
#[test]
fn adopted_points_revert() -> Result<()> {
    let mut foreign = Foreign::new()?;
    foreign.import()?;
    let names = foreign.compare(&report::list(&foreign.domain.domsnap(), NAME)?)?;
    // The active image may get a permanent name on the way: then its point is found by its tag.
    for (point, name) in names {
        let bytes = foreign.points[&point].clone();
        foreign.domain.domsnap().done(&["revert", NAME, &name])?;
        verify::bytes(&foreign.domain.path("vda"), None, &bytes, &mut Default::default())
            .with_context(|| format!("after revert to {name}"))?;
        foreign.domain.model.present.insert("vda".into(), bytes);
        foreign.domain.write_everywhere()?;
        let list = report::list(&foreign.domain.domsnap(), NAME)?;
        for snapshot in &list.snapshots {
            let point = &snapshot.points[0];
            let file = point.layer.file_name().context("no name")?.to_string_lossy().into_owned();
            let known = foreign
                .points
                .iter()
                .find(|((name, tag), _)| *tag == point.tag && (tag.is_some() || *name == file));
            let (_, bytes) = known.with_context(|| format!("{snapshot:?} is new"))?;
            verify::bytes(&point.layer, point.tag.as_deref(), bytes, &mut Default::default())
                .with_context(|| format!("{}, after revert to {name}", snapshot.name))?;
        }
    }
    Ok(())
}

/// What depends on a base that another domain uses too is never merged into it.
#[test]
fn shared_base_is_never_merged_into() -> Result<()> {
    let mut domain = Domain::unregistered(&Shape::disks(1))?;
    domain.write_everywhere()?;
    let (path, gold) = (domain.path("vda"), domain.disks().join("gold.qcow2"));
    std::fs::rename(&path, &gold)?;
    let golden = domain.model.present["vda"].clone();
    img(&["create", "-q", "-f", "qcow2", "-b", "gold.qcow2", "-F", "qcow2"], &path)?;
    let stranger = domain.root().join("stranger.qcow2");
    img(&["create", "-q", "-f", "qcow2", "-b", "disks/gold.qcow2", "-F", "qcow2"], &stranger)?;
    domain.register()?;
    domain.write_everywhere()?;
    let before = std::fs::read(&gold)?;
    domain.domsnap().done(&["create", NAME, "s1", "--external"])?;
    domain.write_everywhere()?;
    domain.domsnap().done(&["delete", NAME, "s1"])?;
    let list = report::list(&domain.domsnap(), NAME)?;
    for snapshot in list.snapshots {
        domain.domsnap().run(&["delete", NAME, &snapshot.name])?;
    }
    ensure!(std::fs::read(&gold)? == before, "the gold image changed, and a stranger depends on it");
    verify::bytes(&stranger, None, &golden, &mut Default::default())?;
    verify::bytes(&path, None, &domain.model.present["vda"], &mut Default::default())
}

/// Qemu img lists applies and deletes our internal snapshots.
#[test]
fn qemu_img_handles_our_internal_snapshots() -> Result<()> {
    let mut domain = Domain::new(&Shape::disks(1))?;
    for name in ["one", "two", "three"] {
        domain.write_and_create(name, "internal")?;
    }
    let path = domain.path("vda");
    let listed = img(&["snapshot", "-l"], &path)?;
    ensure!(["one", "two", "three"].iter().all(|name| listed.contains(name)), "{listed}");
    img(&["snapshot", "-a", "one"], &path)?;
    verify::bytes(&path, None, &domain.model.snapshots["one"].disks["vda"], &mut Default::default())?;
    img(&["snapshot", "-d", "two"], &path)?;
    qemu::check(&path)?;
    verify::bytes(
        &path,
        Some("three"),
        &domain.model.snapshots["three"].disks["vda"],
        &mut Default::default(),
    )
}

/// An internal snapshot that qemu img deleted behind our back is noticed.
#[test]
fn deletion_by_qemu_img_is_noticed() -> Result<()> {
    let mut domain = Domain::new(&Shape::disks(1))?;
    for name in ["one", "two"] {
        domain.write_and_create(name, "internal")?;
    }
    img(&["snapshot", "-d", "one"], &domain.path("vda"))?;
    let outcome = domain.domsnap().run(&["check", NAME])?;
    ensure!(outcome.status != Some(status::DONE), "check says that all is well: {outcome}");
    ensure!(format!("{}{}", outcome.stdout, outcome.stderr).contains("one"), "it is not named: {outcome}");
    domain.declined(&["revert", NAME, "one"], status::REFUSED)?;
    domain.revert("two")?;
    verify::bytes(&domain.path("vda"), None, &domain.model.present["vda"], &mut Default::default())
}

#[test]
fn qemu_img_flattens_and_rebases_our_chains() -> Result<()> {
    let mut domain = Domain::new(&Shape::disks(1))?;
    for name in ["one", "two", "three"] {
        domain.write_and_create(name, "external")?;
    }
    domain.write_everywhere()?;
    let flat = domain.root().join("flat.qcow2");
    qemu::img(&[
        OsStr::new("convert"),
        "-O".as_ref(),
        "qcow2".as_ref(),
        domain.path("vda").as_os_str(),
        flat.as_os_str(),
    ])?;
    verify::bytes(&flat, None, &domain.model.present["vda"], &mut Default::default())?;
    img(&["rebase", "-f", "qcow2", "-b", ""], &domain.path("vda"))?;
    verify::bytes(&domain.path("vda"), None, &domain.model.present["vda"], &mut Default::default())
}
