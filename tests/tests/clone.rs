//! Clones of domains at rest and of ones that run: their content, what they share, and that neither of the
//! two can harm the other.

use std::collections::BTreeMap;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use anyhow::{Context, Result, ensure};
use domsnap_tests::domain::{Domain, NAME, Shape, contents, same_contents};
use domsnap_tests::domsnap::{Outcome, status};
use domsnap_tests::qemu::{self, Running, Write};
use domsnap_tests::verify::{self, Memo};
use serde_json::Value;

/// Two disks, with the snapshots `s1` and `s2` and writes after them, and a directory for clones.
fn gold(kind: &str) -> Result<Domain> {
    let mut domain = Domain::new(&Shape::disks(2))?;
    for name in ["s1", "s2"] {
        domain.create(name, kind)?;
        domain.write_everywhere()?;
    }
    std::fs::create_dir(domain.clones())?;
    Ok(domain)
}

fn clone(domain: &mut Domain, snapshot: &str, names: &[&str], rest: &[&str]) -> Result<Outcome> {
    let place = domain.clones().display().to_string();
    let outcome =
        domain.domsnap().done(&[&["clone", NAME, snapshot, "web", "--to", &place], rest].concat())?;
    domain.model.clone_to(names, snapshot);
    Ok(outcome)
}

/// Gold and clones hold what the model says, and nothing else is there.
fn verify(domain: &Domain) -> Result<()> {
    domain.verify().context("the source")?;
    verify::clones(domain, &domain.model, &mut Memo::default())
}

/// The images of the source, without the manifests, whose revision each operation changes.
fn images(domain: &Domain) -> Result<BTreeMap<std::path::PathBuf, (u64, Vec<u8>)>> {
    let mut images = contents(&domain.disks())?;
    images.retain(|path, _| path.extension().is_some_and(|extension| extension != "json"));
    Ok(images)
}

/// A clone's images, as disks of a domain of `name`, by their paths.
fn read(domain: &Domain, name: &str, target: &str) -> Result<Vec<u8>> {
    qemu::read(&domain.image_of_clone(name, target), None)
}

/// A clone holds what the snapshot holds, the source's files stay byte for byte as they were, whatever is
/// done with the clone, and the clone is a domain like any other.
fn is_a_domain_of_its_own(kind: &str, rest: &[&str]) -> Result<()> {
    let mut domain = gold(kind)?;
    let before = images(&domain)?;
    clone(&mut domain, "s1", &["web"], rest)?;
    ensure!(images(&domain)? == before, "the clone changed the source");
    verify(&domain)?;
    let domsnap = domain.domsnap();
    let at_s1 = domain.model.snapshots["s1"].disks["vda"].clone();
    let image = domain.image_of_clone("web", "vda");
    domsnap.done(&["create", "web", "own", "--external"])?;
    qemu::write(&image, &[Write { offset: 0, length: 8192, byte: Some(77) }])?;
    domsnap.done(&["create", "web", "second", "--internal"])?;
    qemu::write(&image, &[Write { offset: 8192, length: 8192, byte: Some(78) }])?;
    ensure!(images(&domain)? == before, "a write to the clone changed the source");
    // A clone of the clone, of what was written there.
    let place = domain.clones().display().to_string();
    domsnap.done(&["clone", "web", "second", "third", "--to", &place])?;
    let mut wanted = (*at_s1).clone();
    wanted[..8192].fill(77);
    ensure!(read(&domain, "third", "vda")? == wanted, "the clone of the clone");
    domsnap.done(&["revert", "web", "own"])?;
    ensure!(read(&domain, "web", "vda")? == *at_s1, "the clone's revert");
    domsnap.done(&["delete", "web", "own", "second"])?;
    ensure!(read(&domain, "web", "vda")? == *at_s1, "the clone's delete");
    ensure!(read(&domain, "third", "vda")? == wanted, "the clone of the clone, after that delete");
    for name in ["web", "third"] {
        domsnap.done(&["check", name])?;
        qemu::check(&domain.image_of_clone(name, "vda"))?;
    }
    ensure!(images(&domain)? == before, "the clone's operations changed the source");
    domain.verify()
}

/// Frozen layers are shared.
#[test]
fn clone_of_external_snapshots() -> Result<()> {
    is_a_domain_of_its_own("external", &[])
}

/// Internal snapshots are copied out.
#[test]
fn clone_of_internal_snapshots() -> Result<()> {
    is_a_domain_of_its_own("internal", &[])
}

/// One disk of each kind.
#[test]
fn clone_of_mixed_snapshots() -> Result<()> {
    is_a_domain_of_its_own("mixed", &[])
}

/// All data is copied.
#[test]
fn full_clone_of_mixed_snapshots() -> Result<()> {
    is_a_domain_of_its_own("mixed", &["--full"])
}

/// An external clone has a name of its own for each layer, and takes no data; a full one has no backing file,
/// and no file of the source gets a name.
#[test]
fn clone_shares_by_further_names() -> Result<()> {
    let mut domain = gold("external")?;
    clone(&mut domain, "s2", &["web"], &[])?;
    let chain = verify::chain(&domain.image_of_clone("web", "vda"))?;
    ensure!(chain.len() == 3 && chain.iter().all(|layer| layer.parent() == chain[0].parent()), "{chain:?}");
    for layer in &chain[1..] {
        ensure!(layer.metadata()?.nlink() == 2, "{} is not pinned", layer.display());
    }
    ensure!(chain[0].metadata()?.blocks() * 512 < 256 << 10, "the overlay has data");
    let place = domain.clones().display().to_string();
    domain.domsnap().done(&["clone", NAME, "s2", "full", "--full", "--to", &place])?;
    let chain = verify::chain(&domain.image_of_clone("full", "vda"))?;
    ensure!(chain.len() == 1, "{chain:?}");
    ensure!(read(&domain, "full", "vda")? == *domain.model.snapshots["s2"].disks["vda"]);
    domain.verify()
}

/// The source may be deleted, moved and removed while clones of it exist.
#[test]
fn clones_outlive_their_source() -> Result<()> {
    let mut domain = gold("external")?;
    clone(&mut domain, "s1", &["web-1", "web-2"], &["--count", "2"])?;
    let wanted = domain.model.snapshots["s1"].disks.clone();
    let held = |domain: &Domain| {
        for (target, wanted) in &wanted {
            for name in ["web-1", "web-2"] {
                ensure!(read(domain, name, target)? == **wanted, "{name} {target} changed");
                qemu::check(&domain.image_of_clone(name, target))?;
            }
        }
        Ok(())
    };
    // The layer of s1 would be merged into, and removed, if no clone had a name of it.
    domain.fill(2 << 20)?;
    for names in [&["s1"][..], &["s2"]] {
        let mut args = vec!["delete", NAME];
        args.extend(names);
        domain.domsnap().done(&args)?;
        domain.model.delete(&names.iter().map(|name| (*name).to_owned()).collect::<Vec<_>>());
        held(&domain).context("after a delete")?;
        domain.verify_beside_others()?;
    }
    std::fs::rename(domain.disks(), domain.root().join("moved"))?;
    held(&domain).context("after the source was moved")?;
    domain.domsnap().done(&["create", "web-1", "own"])?;
    std::fs::remove_dir_all(domain.root().join("moved"))?;
    held(&domain).context("after the source was removed")?;
    domain.domsnap().done(&["domain", "remove", NAME])?;
    for command in
        [&["create", "web-2", "own", "--external"][..], &["revert", "web-2", "own"], &["check", "web-2"]]
    {
        domain.domsnap().done(command)?;
    }
    held(&domain)
}

/// A program that this catalogue does not know writes the source: clones are made all the same.
#[test]
fn clone_while_the_source_runs() -> Result<()> {
    for kind in ["external", "internal"] {
        let mut domain = gold(kind)?;
        let running = Running::on(&domain.path("vda"))?;
        clone(&mut domain, "s1", &["web-1", "web-2"], &["--count", "2"])?;
        domain.domsnap().run(&["create", NAME, "refused"])?.expect_status(status::REFUSED)?;
        running.stop()?;
        verify(&domain)?;
    }
    Ok(())
}

/// Without `--to`, a clone of a clone is beside it and not in its directory: what removes the first leaves
/// the second whole. A directory with another name than the domain's is no clone's, and gets the clones.
#[test]
fn clone_of_a_clone_is_beside_it() -> Result<()> {
    let mut domain = gold("external")?;
    clone(&mut domain, "s1", &["web"], &[])?;
    let domsnap = domain.domsnap();
    domsnap.done(&["create", "web", "w", "--external"])?;
    domsnap.done(&["clone", "web", "w", "next"])?;
    ensure!(domain.image_of_clone("next", "vda").exists() && !domain.clones().join("web/next").exists());
    let before = read(&domain, "next", "vda")?;
    ensure!(before == read(&domain, "web", "vda")?, "the clone holds something else");
    domsnap.done(&["domain", "remove", "web"])?;
    std::fs::remove_dir_all(domain.clones().join("web"))?;
    ensure!(read(&domain, "next", "vda")? == before);
    domsnap.done(&["check", "next"])?;
    domsnap.done(&["clone", NAME, "s1", "inside"])?;
    ensure!(domain.disks().join("inside").is_dir());
    Ok(())
}

/// The clones of one command are made all, or none: a refusal of one leaves nothing of the others.
#[test]
fn clones_are_made_all_or_none() -> Result<()> {
    let mut domain = gold("external")?;
    let place = domain.clones().display().to_string();
    let args = ["clone", NAME, "s1", "web", "--count", "3", "--to", &place];
    let refused = |domain: &Domain, why: &str| {
        let outcome = domain.declined(&args, status::REFUSED)?;
        ensure!(outcome.stderr.contains(why), "{outcome}");
        Ok(())
    };
    std::fs::create_dir(domain.clones().join("web-2"))?;
    refused(&domain, "exists, and a clone gets a new directory")?;
    std::fs::remove_dir(domain.clones().join("web-2"))?;
    verify(&domain)?;
    let disk = format!("vda={}", domain.root().join("other.qcow2").display());
    qemu::img(&["create", "-q", "-f", "qcow2", &disk[4..], "1M"])?;
    domain.domsnap().done(&["domain", "add", "web-3", "--disk", &disk])?;
    refused(&domain, "there is a domain web-3 already")?;
    domain.domsnap().done(&["domain", "remove", "web-3"])?;
    std::fs::remove_file(&disk[4..])?;
    let _ = std::fs::remove_dir_all(format!("{}.domsnap", &disk[4..]));
    verify(&domain)?;
    clone(&mut domain, "s1", &["web-1", "web-2", "web-3"], &["--count", "3"])?;
    verify(&domain)
}

/// What cannot be cloned is refused before anything is made, with what to do instead.
#[test]
fn refusals_say_what_to_do() -> Result<()> {
    let domain = gold("external")?;
    let place = domain.clones().display().to_string();
    let missing = domain.root().join("missing").display().to_string();
    for (args, advice) in [
        (&["clone", NAME, "s3", "web"][..], "s2"),
        (&["clone", NAME, "s1", NAME, "--to", &place], "choose another name"),
        (&["clone", NAME, "s1", "web", "--to", &missing], "--to"),
    ] {
        let outcome = domain.declined(args, status::REFUSED)?;
        ensure!(outcome.stderr.contains(advice), "{outcome}");
    }
    for args in [&["clone", NAME, "s1", "qemu:x"][..], &["clone", NAME, "s1", "a/b"]] {
        domain.declined(args, status::USAGE)?;
    }
    // Another file system has no further names of these layers.
    let elsewhere = Path::new("/dev/shm");
    if elsewhere.metadata()?.dev() == domain.disks().metadata()?.dev() {
        println!("skipped: /dev/shm is no other file system here");
        return verify(&domain);
    }
    let elsewhere = tempfile::Builder::new().prefix("domsnap-test-").tempdir_in(elsewhere)?;
    let to = elsewhere.path().display().to_string();
    let outcome = domain.declined(&["clone", NAME, "s1", "far", "--to", &to], status::REFUSED)?;
    ensure!(outcome.stderr.contains("--full") && outcome.stderr.contains("--to"), "{outcome}");
    ensure!(std::fs::read_dir(&to)?.count() == 0, "a refusal left something");
    domain.domsnap().done(&["clone", NAME, "s1", "far", "--full", "--to", &to])?;
    let far = elsewhere.path().join("far/far-vda.qcow2");
    ensure!(qemu::read(&far, None)? == *domain.model.snapshots["s1"].disks["vda"]);
    domain.verify()
}

/// A dry run shows the steps and the bytes that are copied, and changes nothing.
#[test]
fn dry_run_of_a_clone_changes_nothing() -> Result<()> {
    let domain = gold("mixed")?;
    let place = domain.clones().display().to_string();
    let before = contents(&domain.disks())?;
    let args = ["clone", NAME, "s1", "web", "--count", "2", "--to", &place, "--dry-run"];
    let said = domain.domsnap().done(&args)?.stdout;
    ensure!(
        said.contains("register 2 domains, web-1 to web-2") && said.contains("no changes made"),
        "{said}"
    );
    ensure!(said.contains("are copied for each clone"), "{said}");
    let plan: Value = domain.domsnap().done(&[&args[..], &["--json"]].concat())?.json()?;
    ensure!(plan["bytes"].as_u64().is_some_and(|bytes| bytes > 0), "{plan}");
    same_contents(&domain.disks(), &before)?;
    verify(&domain)
}

/// A clone is found again without the catalogue, by its own manifests.
#[test]
fn clone_survives_the_loss_of_the_catalogue() -> Result<()> {
    let mut domain = gold("external")?;
    clone(&mut domain, "s1", &["web"], &[])?;
    domain.domsnap().done(&["create", "web", "own", "--external"])?;
    std::fs::remove_dir_all(domain.state())?;
    let images = ["vda", "vdb"].map(|target| domain.image_of_clone("web", target).display().to_string());
    let said = domain.domsnap().done(&["import", &images.join(",")])?.stdout;
    ensure!(said.contains("web"), "{said}");
    let list = domsnap_tests::report::list(&domain.domsnap(), "web")?;
    ensure!(list.current.as_deref() == Some("own"), "{list:?}");
    let shown = domain.domsnap().done(&["check", "web"])?;
    ensure!(!shown.stdout.contains("error"), "{shown}");
    ensure!(read(&domain, "web", "vda")? == *domain.model.snapshots["s1"].disks["vda"]);
    Ok(())
}

/// Raw disks are copied, or share blocks where the file system can; the clone is raw too.
#[test]
fn clone_of_raw_copies() -> Result<()> {
    let mut domain = Domain::new(&Shape::raw(2))?;
    domain.create("s1", "copy")?;
    domain.write_everywhere()?;
    std::fs::create_dir(domain.clones())?;
    let before = images(&domain)?;
    clone(&mut domain, "s1", &["web-1", "web-2"], &["--count", "2"])?;
    ensure!(images(&domain)? == before, "the clone changed the source");
    verify(&domain)?;
    let domsnap = domain.domsnap();
    domsnap.done(&["create", "web-1", "own", "--disk", "vda=copy", "--disk", "vdb=copy"])?;
    qemu::write(&domain.image_of_clone("web-1", "vda"), &[Write { offset: 0, length: 4096, byte: Some(9) }])?;
    domsnap.done(&["revert", "web-1", "own"])?;
    ensure!(read(&domain, "web-1", "vda")? == *domain.model.snapshots["s1"].disks["vda"]);
    domain.verify()
}

/// VHD disks get differencing children of frozen layers; a full clone is a fixed VHD.
#[test]
fn clone_of_vhd_children() -> Result<()> {
    let dir = tempfile::Builder::new().prefix("domsnap-test-").tempdir()?;
    let (disks, image) = (dir.path().join("disks"), dir.path().join("disks/a.vhd"));
    std::fs::create_dir(&disks)?;
    std::fs::create_dir(dir.path().join("clones"))?;
    let place = dir.path().join("clones").display().to_string();
    qemu::img(&["create", "-q", "-f", "vpc", "-o", "force_size=on", &image.display().to_string(), "4M"])?;
    let domsnap = domsnap_tests::domsnap::Domsnap::new(&dir.path().join("state"));
    let disk = format!("vda={},format=vhd", image.display());
    domsnap.done(&["domain", "add", "gold", "--disk", &disk])?;
    let show = |image: &Path, snapshot: Option<&str>| -> Result<Vec<u8>> {
        let to = dir.path().join("shown.raw");
        let _ = std::fs::remove_file(&to);
        let (image, to_text) = (image.display().to_string(), to.display().to_string());
        ensure!(snapshot.is_none());
        domsnap.done(&["disk", "materialise", &image, &to_text, "--format", "raw"])?;
        Ok(std::fs::read(to)?)
    };
    domsnap.done(&["create", "gold", "s1"])?;
    let at_s1 = show(&image, None)?;
    domsnap.done(&["create", "gold", "s2"])?;
    let before = contents(&disks)?;
    domsnap.done(&["clone", "gold", "s2", "web", "--count", "2", "--to", &place])?;
    domsnap.done(&["clone", "gold", "s1", "full", "--full", "--to", &place])?;
    for (name, (inode, bytes)) in &before {
        if name.extension().is_some_and(|extension| extension == "vhd") {
            let now = disks.join(name);
            ensure!(
                now.metadata()?.ino() == *inode && std::fs::read(&now)? == *bytes,
                "{} changed",
                name.display()
            );
        }
    }
    for name in ["web-1", "web-2", "full"] {
        let image = dir.path().join(format!("clones/{name}/{name}-vda.vhd"));
        ensure!(show(&image, None)? == at_s1, "{name}");
        domsnap.done(&["create", name, "own"])?;
        domsnap.done(&["check", name])?;
    }
    domsnap.done(&["delete", "gold", "s1", "s2"])?;
    domsnap.done(&["check", "gold"])?;
    std::fs::remove_dir_all(&disks)?;
    ensure!(show(&dir.path().join("clones/web-1/web-1-vda.vhd"), None)? == at_s1, "after the source went");
    Ok(())
}

/// A hundred clones are one operation.
#[test]
fn hundred_clones_are_one_operation() -> Result<()> {
    let mut domain = gold("external")?;
    let names: Vec<String> = (1..=100).map(|number| format!("web-{number}")).collect();
    let names: Vec<&str> = names.iter().map(String::as_str).collect();
    let begun = std::time::Instant::now();
    clone(&mut domain, "s2", &names, &["--count", "100"])?;
    println!("100 clones of two disks: {:?}", begun.elapsed());
    let history: Value = domain.domsnap().done(&["history", NAME, "--json"])?.json()?;
    let clones = history["operations"].as_array().into_iter().flatten();
    let clones = clones.filter(|operation| operation["operation"] == "clone").count();
    ensure!(clones == 1, "{history}");
    verify(&domain)
}

/// The commands of the guide's page, each run as it is written there. What a host has in `/srv/vm` is in the
/// test's directory here.
#[test]
fn every_command_of_the_page_runs() -> Result<()> {
    let dir = tempfile::Builder::new().prefix("domsnap-test-").tempdir()?;
    let (gold, clones) = (dir.path().join("gold"), dir.path().join("clones"));
    std::fs::create_dir(&gold)?;
    std::fs::create_dir(&clones)?;
    let image = gold.join("root.qcow2");
    qemu::img(&["create", "-q", "-f", "qcow2", &image.display().to_string(), "4M"])?;
    let domsnap = domsnap_tests::domsnap::Domsnap::new(&dir.path().join("state"));
    domsnap.done(&["domain", "add", "gold", "--disk", &format!("vda={}", image.display())])?;
    domsnap.done(&["create", "gold", "installed", "--external"])?;
    let page = Path::new(env!("CARGO_MANIFEST_DIR")).join("../docs/clone.md");
    let (mut is_code, mut run) = (false, 0);
    for line in std::fs::read_to_string(page)?.lines() {
        if line.starts_with("```") {
            is_code = !is_code;
            continue;
        }
        let here = line.replace("/srv/vm", &dir.path().display().to_string());
        let Some(command) = here.split(" #").next().filter(|_| is_code).map(str::trim) else { continue };
        let parts: Vec<&str> = command.split_whitespace().collect();
        match parts[..] {
            ["domsnap", ref args @ ..] => domsnap.done(args).map(drop).context(line.to_owned())?,
            ["rm", "-r", path] => std::fs::remove_dir_all(path).context(line.to_owned())?,
            _ => continue,
        }
        run += 1;
    }
    ensure!(run >= 9, "only {run} commands are left in the page");
    Ok(())
}
