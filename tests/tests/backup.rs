//! Backup out of band: what differs between snapshots, and exports of them.

use std::collections::BTreeSet;
use std::ops::Range;
use std::path::Path;
use std::process::Stdio;

use anyhow::{Context, Result, ensure};
use domsnap_tests::domain::{Domain, NAME, Shape, copy_tree};
use domsnap_tests::domsnap::status;
use domsnap_tests::qemu::{self, Write};
use domsnap_tests::seed::{Seed, from_env};
use domsnap_tests::served::Server;
use domsnap_tests::shim;
use serde_json::Value;

/// Bytes that `--exact` compares at once.
const BLOCK: usize = 64 << 10;

/// A random tree: writes, snapshots, reverts and deletes.
fn tree(seed: &mut Seed, shape: &Shape, kinds: &[&str], steps: usize) -> Result<Domain> {
    let mut domain = Domain::new(shape)?;
    let mut made = 0;
    for step in 0..steps {
        domain.write_everywhere()?;
        let targets: Vec<String> = domain.model.present.keys().cloned().collect();
        for target in targets {
            let offset = seed.below((shape.size >> 12) - 16) << 12;
            let byte = (seed.below(3) > 0).then(|| 1 + seed.below(250) as u8);
            domain.write(&target, &[Write { offset, length: 4096 * (1 + seed.below(15)), byte }])?;
        }
        let names: Vec<String> = domain.model.snapshots.keys().cloned().collect();
        match seed.below(6) {
            0 if names.len() > 1 => domain.revert(&names[seed.below(names.len() as u64) as usize])?,
            1 if names.len() > 3 => domain.delete(&[&names[seed.below(names.len() as u64) as usize]])?,
            _ => {}
        }
        made += 1;
        domain.create(&format!("s{made}"), kinds[step % kinds.len()])?;
    }
    domain.write_everywhere()?;
    Ok(domain)
}

fn diff(domain: &Domain, args: &[&str]) -> Result<Value> {
    domain.domsnap().done(&[&["diff", NAME, "--json"], args].concat())?.json()
}

fn extents(disk: &Value) -> Vec<Range<usize>> {
    let number = |extent: &Value, name: &str| extent[name].as_u64().unwrap_or(u64::MAX) as usize;
    let extents = disk["extents"].as_array().into_iter().flatten();
    extents
        .map(|extent| number(extent, "start")..number(extent, "start") + number(extent, "length"))
        .collect()
}

/// Every difference is in an extent, and what is said to be zeros is.
fn covers(disk: &Value, from: &[u8], to: &[u8]) -> Result<()> {
    let mut outside: Vec<bool> = vec![true; to.len()];
    for extent in disk["extents"].as_array().into_iter().flatten() {
        let start = extent["start"].as_u64().context("a start")? as usize;
        let range = start..start + extent["length"].as_u64().context("a length")? as usize;
        ensure!(
            extent["zero"] != true || to[range.clone()].iter().all(|byte| *byte == 0),
            "{extent} is not zero"
        );
        outside[range].fill(false);
    }
    let same = |at: usize| from.get(at) == to.get(at);
    match (0..to.len()).find(|at| outside[*at] && !same(*at)) {
        Some(at) => anyhow::bail!("byte {at} differs and is in no extent: {disk}"),
        None => Ok(()),
    }
}

/// The extents are the blocks that differ, and nothing else.
fn exactly(disk: &Value, from: &[u8], to: &[u8]) -> Result<()> {
    covers(disk, from, to)?;
    for extent in extents(disk) {
        let mut at = extent.start;
        while at < extent.end {
            let end = ((at / BLOCK + 1) * BLOCK).min(extent.end);
            // A block may lie in two extents: of zeros and of data.
            let block = at / BLOCK * BLOCK..((at / BLOCK + 1) * BLOCK).min(to.len());
            ensure!(from[block.clone()] != to[block.clone()], "{block:?} does not differ: {disk}");
            at = end;
        }
    }
    Ok(())
}

fn diff_finds_all(shape: &Shape, kinds: &[&str], seed: u64) -> Result<()> {
    let mut seed = Seed::new(from_env("DOMSNAP_PROPERTY_SEED", seed));
    let domain = tree(&mut seed, shape, kinds, 7)?;
    let names: Vec<&String> = domain.model.snapshots.keys().collect();
    for (number, a) in names.iter().enumerate() {
        for b in names.iter().skip(number % 2).step_by(2).map(|b| b.as_str()).chain(["now"]) {
            let (from, args) =
                (&domain.model.snapshots[*a].disks, if b == "now" { vec![a.as_str()] } else { vec![a, b] });
            let to = if b == "now" { &domain.model.present } else { &domain.model.snapshots[b].disks };
            let report = diff(&domain, &args)?;
            for disk in report["disks"].as_array().into_iter().flatten() {
                let target = disk["target"].as_str().context("a target")?;
                covers(disk, &from[target], &to[target]).with_context(|| format!("{a} {b} {target}"))?;
                if *a == b {
                    ensure!(extents(disk).is_empty(), "{a} differs from itself: {disk}");
                }
            }
            let exact = diff(&domain, &[&args[..], &["--exact"]].concat())?;
            for disk in exact["disks"].as_array().into_iter().flatten() {
                let target = disk["target"].as_str().context("a target")?;
                exactly(disk, &from[target], &to[target]).with_context(|| format!("{a} {b} {target}"))?;
            }
        }
    }
    Ok(())
}

/// Internal and external snapshots, mixed over time and over disks.
#[test]
fn diff_finds_all_in_mixed_trees() -> Result<()> {
    diff_finds_all(&Shape::disks(2), &["internal", "external", "mixed", "internal"], 11)
}

/// Clusters of subclusters.
#[test]
fn diff_finds_all_with_subclusters() -> Result<()> {
    let shape = Shape::disks(1).options("cluster_size=65536,extended_l2=on");
    diff_finds_all(&shape, &["internal", "internal", "external"], 12)
}

/// Raw disks, by copy.
#[test]
fn diff_finds_all_of_raw_disks() -> Result<()> {
    diff_finds_all(&Shape::raw(1), &["copy"], 13)
}

/// Internal snapshots give the clusters that were written, exactly, in either order.
#[test]
fn diff_of_internal_is_exact() -> Result<()> {
    let mut domain = Domain::new(&Shape::disks(1))?;
    domain.fill(4 << 20)?;
    domain.create("s1", "internal")?;
    domain.write("vda", &[Write { offset: 4096 * 9, length: 8192, byte: Some(9) }])?;
    domain.write("vda", &[Write { offset: 4096 * 90, length: 4096, byte: Some(9) }])?;
    domain.create("s2", "internal")?;
    domain.write("vda", &[Write { offset: 4096 * 91, length: 4096, byte: Some(7) }])?;
    for args in [["s1", "s2"], ["s2", "s1"]] {
        let report = diff(&domain, &args)?;
        ensure!(extents(&report["disks"][0]) == [9 * 4096..11 * 4096, 90 * 4096..91 * 4096], "{report}");
    }
    let text = domain.domsnap().done(&["diff", NAME, "s1", "s2"])?.stdout;
    ensure!(text.contains("36864") && text.contains("vda: at most 12"), "{text}");
    // The form of qemu-img covers the whole disk, without gaps.
    let map: Value = domain.domsnap().done(&["diff", NAME, "s1", "s2", "--format", "map"])?.json()?;
    let mut at = 0;
    for extent in map.as_array().context("a list")? {
        ensure!(extent["start"] == at && extent["present"] == (extent["depth"] == 0), "{map}");
        at += extent["length"].as_u64().context("a length")?;
    }
    ensure!(at == 4 << 20, "{map}");
    Ok(())
}

/// What cannot be compared is refused, with advice, and nothing is changed.
#[test]
fn diff_refuses_with_words() -> Result<()> {
    let mut domain = Domain::new(&Shape::disks(2))?;
    domain.create("s1", "internal")?;
    let none = domain.declined(&["diff", NAME, "s1", "s7"], status::REFUSED)?;
    ensure!(none.stderr.contains("no snapshot s7"), "{none}");
    let several = domain.declined(&["diff", NAME, "s1", "--format", "map"], status::USAGE)?;
    ensure!(several.stderr.contains("--disk"), "{several}");
    let disk = domain.declined(&["diff", NAME, "s1", "--disk", "vdx"], status::REFUSED)?;
    ensure!(disk.stderr.contains("vda, vdb"), "{disk}");
    // Another program writes the current state.
    let running = qemu::Running::on(&domain.path("vda"))?;
    let busy = domain.domsnap().run(&["diff", NAME, "s1"])?.expect_status(status::REFUSED)?;
    ensure!(busy.stderr.contains("another process has the image open"), "{busy}");
    // An internal snapshot is read all the same.
    diff(&domain, &["s1", "s1"])?;
    running.stop()?;
    // Another program replaced the snapshot.
    let path = domain.path("vda").display().to_string();
    let tag = domain.domsnap().done(&["show", NAME, "s1", "--json"])?.json::<Value>()?;
    let tag = tag["snapshot"]["points"][0]["tag"].as_str().unwrap_or("s1").to_owned();
    qemu::img(&["snapshot", "-d", &tag, &path])?;
    let gone = domain.declined(&["diff", NAME, "s1"], status::REFUSED)?;
    ensure!(gone.stderr.contains("no internal snapshot"), "{gone}");
    qemu::img(&["snapshot", "-c", &tag, &path])?;
    let replaced = domain.declined(&["diff", NAME, "s1"], status::REFUSED)?;
    ensure!(replaced.stderr.contains("is not the one that was taken"), "{replaced}");
    Ok(())
}

/// The entries of a directory's manifest.
fn manifest(dir: &Path) -> Result<Vec<Value>> {
    let path = dir.join("manifest.json");
    if !path.exists() {
        return Ok(Vec::new());
    }
    let manifest: Value = serde_json::from_slice(&std::fs::read(path)?)?;
    Ok(manifest["content"]["exports"].as_array().context("a list of exports")?.clone())
}

/// Every export holds what the model says, by QEMU's own tools alone, and every file is the one that the
/// manifest describes.
fn whole(domain: &Domain, dir: &Path) -> Result<BTreeSet<String>> {
    let (mut names, mut sums) = (BTreeSet::new(), String::new());
    for export in manifest(dir)? {
        let name = export["snapshot"]["name"].as_str().context("a name")?.to_owned();
        let wanted =
            &domain.model.snapshots.get(&name).with_context(|| format!("no {name} in the model"))?.disks;
        for disk in export["disks"].as_array().into_iter().flatten() {
            let (target, file) =
                (disk["target"].as_str().context("a target")?, disk["file"].as_str().context("a file")?);
            let image = dir.join(file);
            ensure!(image.metadata()?.len() == disk["bytes"], "{disk}");
            sums.push_str(&format!("{}  {}\n", disk["sha256"].as_str().unwrap_or_default(), image.display()));
            qemu::check(&image)?;
            ensure!(
                qemu::read(&image, None)? == *wanted[target],
                "{name} {target} is not what the model says"
            );
        }
        names.insert(name);
    }
    let list = dir.with_extension("sums");
    std::fs::write(&list, sums)?;
    if !names.is_empty() {
        qemu::run("sha256sum", &["-c".as_ref(), "--quiet".as_ref(), list.as_os_str()])?;
    }
    Ok(names)
}

/// Nothing is in the directory but what its manifest names.
fn only_exports(dir: &Path) -> Result<()> {
    let mut known: BTreeSet<String> = ["manifest.json".to_owned()].into();
    for export in manifest(dir)? {
        known.extend(
            export["disks"]
                .as_array()
                .into_iter()
                .flatten()
                .filter_map(|d| Some(d["file"].as_str()?.to_owned())),
        );
    }
    let found = std::fs::read_dir(dir)?.map(|entry| Ok(entry?.file_name().to_string_lossy().into_owned()));
    let found = found.collect::<Result<BTreeSet<String>>>()?;
    ensure!(found == known, "{found:?} are there, and {known:?} are known");
    Ok(())
}

fn export<'a>(dir: &'a str, args: &[&'a str]) -> Vec<&'a str> {
    [&["export", NAME], args, &["--to", dir]].concat()
}

fn exports_restore(shape: &Shape, kinds: &[&str], seed: u64) -> Result<()> {
    let mut seed = Seed::new(from_env("DOMSNAP_PROPERTY_SEED", seed));
    let mut domain = tree(&mut seed, shape, kinds, 6)?;
    let (full, chain) = (domain.root().join("full"), domain.root().join("chain"));
    let (full_dir, chain_dir) = (full.display().to_string(), chain.display().to_string());
    let images = domsnap_tests::domain::images(&domain.disks())?;
    for name in domain.model.snapshots.keys() {
        domain.domsnap().done(&export(&full_dir, &[name]))?;
    }
    domain.domsnap().done(&export(&chain_dir, &["--all"]))?;
    ensure!(domsnap_tests::domain::images(&domain.disks())? == images, "the exports changed the images");
    for dir in [&full, &chain] {
        only_exports(dir)?;
        ensure!(whole(&domain, dir)?.len() == domain.model.snapshots.len());
    }
    // Later, also on another branch and after a delete.
    let names: Vec<String> = domain.model.snapshots.keys().cloned().collect();
    domain.revert(&names[seed.below(names.len() as u64) as usize])?;
    domain.write_and_create("late", kinds[0])?;
    let since = names[seed.below(names.len() as u64) as usize].clone();
    domain.domsnap().done(&export(&chain_dir, &["late", "--since", &since]))?;
    ensure!(whole(&domain, &chain)?.len() == domain.model.snapshots.len());
    let last = manifest(&chain)?.pop().context("an export")?;
    ensure!(last["disks"][0]["backing"] == format!("vda.{since}.qcow2"), "{last}");
    domain.verify_beside_others()
}

/// Every point of a random tree, in full and as increments.
#[test]
fn exports_restore_mixed_trees() -> Result<()> {
    exports_restore(&Shape::disks(2), &["internal", "external", "mixed"], 21)
}

/// The same of raw disks.
#[test]
fn exports_restore_raw_disks() -> Result<()> {
    exports_restore(&Shape::raw(1), &["copy"], 22)
}

/// An increment has what changed and no more, and a disk that was made larger or smaller is one.
#[test]
fn increment_has_what_changed() -> Result<()> {
    let mut domain = Domain::new(&Shape::disks(1).options("cluster_size=65536"))?;
    domain.fill(4 << 20)?;
    domain.create("s1", "internal")?;
    domain.write("vda", &[Write { offset: 1 << 20, length: 65536, byte: Some(9) }])?;
    domain.write("vda", &[Write { offset: 2 << 20, length: 65536, byte: None }])?;
    domain.create("s2", "internal")?;
    let dir = domain.root().join("exports");
    let to = dir.display().to_string();
    // What would be done is known before, and nothing is made.
    let dry: Value = domain.domsnap().done(&export(&to, &["s1", "--dry-run", "--json"]))?.json()?;
    ensure!(dry["dry_run"] == true && dry["exports"][0]["export"].is_null() && !dir.exists(), "{dry}");
    let first: Value = domain.domsnap().done(&export(&to, &["s1", "--json"]))?.json()?;
    ensure!(first["exports"][0]["bytes"] == dry["exports"][0]["bytes"], "{dry} {first}");
    let second: Value = domain.domsnap().done(&export(&to, &["s2", "--since", "s1", "--json"]))?.json()?;
    let bytes = second["exports"][0]["bytes"].as_u64().context("bytes")?;
    ensure!(bytes < 512 << 10, "one cluster changed: {second}");
    let map: Value =
        serde_json::from_str(&qemu::img(&["map", "--output=json", &format!("{to}/vda.s2.qcow2")])?)?;
    let own: u64 = map
        .as_array()
        .into_iter()
        .flatten()
        .filter(|e| e["depth"] == 0)
        .filter_map(|e| e["length"].as_u64())
        .sum();
    ensure!(own == 2 << 16, "{map}");
    whole(&domain, &dir)?;
    // Each export is a file of its own for other programs: none changes again.
    ensure!(domain.domsnap().done(&export(&to, &["--all"]))?.stdout.contains("has all snapshots"));
    // No hold is left.
    let list: Value = domain.domsnap().done(&["list", NAME, "--json"])?.json()?;
    ensure!(
        list["snapshots"].as_array().into_iter().flatten().all(|s| s["holds"] == serde_json::json!([])),
        "{list}"
    );
    // A raw stream.
    let out = domain.domsnap().command(&export("-", &["s2"])).output()?;
    ensure!(out.status.success() && out.stdout == **domain.model.snapshots["s2"].disks["vda"]);
    Ok(())
}

/// What cannot be exported is refused before anything is written.
#[test]
fn export_refuses_with_words() -> Result<()> {
    let mut domain = Domain::new(&Shape::disks(2))?;
    for name in ["s1", "s2", "s3"] {
        domain.write_and_create(name, "mixed")?;
    }
    let dir = domain.root().join("exports");
    let to = dir.display().to_string();
    let refused = |args: &[&str], status: i32, message: &str| -> Result<()> {
        let before = if dir.exists() { Some(domsnap_tests::domain::contents(&dir)?) } else { None };
        let outcome = domain.declined(&export(&to, args), status)?;
        ensure!(outcome.stderr.contains(message), "{message:?} is not said: {outcome}");
        let after = if dir.exists() { Some(domsnap_tests::domain::contents(&dir)?) } else { None };
        ensure!(before == after, "the directory changed: {outcome}");
        Ok(())
    };
    refused(&["s9"], status::REFUSED, "no snapshot s9")?;
    refused(&["s2", "--since", "s1"], status::REFUSED, "without --since")?;
    domain.domsnap().done(&export(&to, &["s1"]))?;
    refused(&["s1"], status::REFUSED, "has an export of snapshot s1 already")?;
    refused(&["s3", "--since", "s2"], status::REFUSED, "--since s1")?;
    domain.declined(&export("-", &["s1"]), status::USAGE)?;
    // A file of the name of the next one.
    let foreign = dir.join("vda.s2.qcow2");
    std::fs::write(&foreign, "mine")?;
    let outcome = domain.domsnap().run(&export(&to, &["s2"]))?;
    ensure!(outcome.status != Some(0) && outcome.stderr.contains("of no export"), "{outcome}");
    ensure!(std::fs::read(&foreign)? == b"mine");
    std::fs::remove_file(&foreign)?;
    // A directory that another export works on.
    let lock = std::fs::File::open(&dir)?;
    rustix::fs::flock(&lock, rustix::fs::FlockOperation::LockExclusive)?;
    refused(&["s2"], status::REFUSED, "another process works on the exports")?;
    drop(lock);
    // The file that an increment needs is another one, or gone.
    let base = dir.join("vda.s1.qcow2");
    let kept = std::fs::read(&base)?;
    std::fs::write(&base, &kept[..kept.len() - 1])?;
    let outcome = domain.domsnap().run(&export(&to, &["s2", "--since", "s1"]))?;
    ensure!(outcome.status != Some(0) && outcome.stderr.contains("is not the file of"), "{outcome}");
    std::fs::remove_file(&base)?;
    let outcome = domain.domsnap().run(&export(&to, &["s2", "--since", "s1"]))?;
    ensure!(outcome.status != Some(0) && outcome.stderr.contains("does not exist"), "{outcome}");
    std::fs::write(&base, &kept)?;
    only_exports(&dir)?;
    // A manifest that was changed by hand, in its text or with a right checksum.
    let path = dir.join("manifest.json");
    let text = std::fs::read_to_string(&path)?;
    std::fs::write(&path, text.replace("vda.s1.qcow2", "vda.s2.qcow2"))?;
    refused(&["s2"], status::REFUSED, "checksum")?;
    for (from, to) in [
        ("\"vda.s1.qcow2\"", "\"../../etc/passwd\""),
        ("\"name\": \"s1\"", "\"name\": \"../x\""),
        ("\"target\": \"vdb\"", "\"target\": \"vda\""),
    ] {
        std::fs::write(&path, forged(&text, from, to)?)?;
        refused(&["s2"], status::REFUSED, "manifest.json")?;
    }
    std::fs::remove_file(&path)?;
    std::os::unix::fs::symlink(domain.path("vda"), &path)?;
    refused(&["s2"], status::REFUSED, "symbolic link")?;
    std::fs::remove_file(&path)?;
    std::fs::write(&path, &text)?;
    domain.domsnap().done(&export(&to, &["s2", "--since", "s1"]))?;
    ensure!(whole(&domain, &dir)?.len() == 2);
    domain.verify_beside_others()
}

/// A manifest with a change, and with the checksum of that.
fn forged(text: &str, from: &str, to: &str) -> Result<String> {
    ensure!(text.contains(from), "{from} is not in {text}");
    let content = text.split_once("\"content\":").context("a content")?.1;
    let content = content.trim_end().strip_suffix('}').context("an end")?.replace(from, to);
    let crc = crc32fast::hash(content.as_bytes());
    Ok(format!("{{\"domsnap-export\":1,\"crc32\":\"{crc:08x}\",\"content\":{content}}}\n"))
}

/// A snapshot that is being exported cannot be deleted, and an export of one that another program deletes
/// fails.
#[test]
fn export_holds_its_snapshot() -> Result<()> {
    let mut domain = Domain::new(&Shape::disks(1))?;
    domain.write_and_create("s1", "internal")?;
    let dir = domain.root().join("exports");
    let to = dir.display().to_string();
    let (_outputs, file) = shim::outputs()?;
    shim::counting(shim::watching(domain.domsnap(), domain.root())?, &file).done(&export(&to, &["s1"]))?;
    std::fs::remove_dir_all(&dir)?;
    let operations = shim::counted(&file)?;
    let data = operations
        .iter()
        .rev()
        .find(|o| o.line.starts_with("write ") && o.line.contains(".domsnap-0.part"))
        .context("a write")?;
    for foreign in [false, true] {
        let stopped = shim::stopping(shim::watching(domain.domsnap(), domain.root())?, data.number);
        let mut child = stopped.command(&export(&to, &["s1"])).stderr(Stdio::piped()).spawn()?;
        let stat = format!("/proc/{}/stat", child.id());
        let began = std::time::Instant::now();
        while !std::fs::read_to_string(&stat)?.contains(") T ") {
            ensure!(began.elapsed().as_secs() < 30 && child.try_wait()?.is_none(), "it is not stopped");
            std::thread::sleep(std::time::Duration::from_millis(10));
        }
        let held = domain.domsnap().run(&["delete", NAME, "s1"])?.expect_status(status::REFUSED)?;
        ensure!(held.stderr.contains("export:"), "{held}");
        if foreign {
            let path = domain.path("vda").display().to_string();
            let tag = qemu::img(&["snapshot", "-l", "-U", &path])?;
            let tag =
                tag.lines().find_map(|line| line.trim().strip_prefix("1 ")).context("a tag")?.to_owned();
            let tag = tag.split_whitespace().next().context("a name")?.to_owned();
            qemu::img(&["snapshot", "-d", &tag, &path])?;
        }
        rustix::process::kill_process(
            rustix::process::Pid::from_child(&child),
            rustix::process::Signal::CONT,
        )?;
        let done = child.wait_with_output()?;
        let said = String::from_utf8_lossy(&done.stderr);
        ensure!(done.status.success() != foreign, "{said}");
        ensure!(!foreign || said.contains("no internal snapshot") || said.contains("deleted"), "{said}");
        if !foreign {
            whole(&domain, &dir)?;
            std::fs::remove_dir_all(&dir)?;
        }
    }
    ensure!(manifest(&dir)?.is_empty(), "an export is kept whose snapshot was deleted");
    Ok(())
}

/// A killed, failed or interrupted export leaves the directory's exports as they were, or is completed; the
/// next run clears what is left.
#[test]
fn killed_export_leaves_nothing_or_all() -> Result<()> {
    let mut domain = Domain::new(&Shape::disks(2))?;
    domain.create("s1", "mixed")?;
    domain.write_and_create("s2", "mixed")?;
    let dir = domain.root().join("exports");
    let (to, copy) = (dir.display().to_string(), domain.root().join("copy"));
    domain.domsnap().done(&export(&to, &["s1"]))?;
    copy_tree(&dir, &copy)?;
    let args = export(&to, &["s2", "--since", "s1"]);
    let (_outputs, file) = shim::outputs()?;
    shim::counting(shim::watching(domain.domsnap(), domain.root())?, &file).done(&args)?;
    let operations = shim::counted(&file)?;
    let of_exports = |operation: &shim::Counted| operation.line.contains(" exports");
    let every = from_env("DOMSNAP_KILL_EVERY", 0) != 0;
    let mut instants: Vec<(u64, &str)> = Vec::new();
    for (index, operation) in operations.iter().enumerate().filter(|(_, operation)| of_exports(operation)) {
        let is_name = ["rename ", "unlink ", "link "].iter().any(|kind| operation.line.starts_with(kind));
        if every || is_name || index % 5 == 0 {
            instants.push((operation.number, "kill"));
        }
        if operation.can_tear() && (every || index % 7 == 0) {
            instants.push((operation.number, "torn"));
        }
        if every || index % 5 == 1 {
            instants.push((operation.number, "full"));
        }
        if every || index % 9 == 2 {
            instants.push((operation.number, "interrupt"));
        }
    }
    ensure!(instants.len() > 12, "only {} instants of {}", instants.len(), operations.len());
    println!("{} instants of {} operations", instants.len(), operations.len());
    for (number, how) in instants {
        std::fs::remove_dir_all(&dir)?;
        copy_tree(&copy, &dir)?;
        let watched = shim::watching(domain.domsnap(), domain.root())?;
        let domsnap = match how {
            "full" => shim::failing(watched, number, "ENOSPC", shim::Often::FromThenOn),
            "interrupt" => shim::interrupting(watched, number),
            how => shim::killing(watched, number, how == "torn"),
        };
        let outcome = domsnap.run(&args)?;
        let look = || -> Result<()> {
            ensure!(!outcome.panicked(), "it panicked");
            // What it lists is whole; the first export was verified before.
            let listed = manifest(&dir)?.len();
            ensure!(listed == 2 || outcome.status != Some(status::DONE), "reported as done, and is not");
            if listed == 2 {
                whole(&domain, &dir)?;
            }
            let pending = dir.join(".domsnap-pending.json").exists();
            if outcome.status.is_some() && !pending {
                only_exports(&dir)?;
            }
            // The next run completes it, or does it.
            let again = domain.domsnap().run(&args)?;
            ensure!(
                again.status == Some(status::DONE)
                    || again.stderr.contains("has an export of snapshot s2 already"),
                "{again}"
            );
            ensure!(whole(&domain, &dir)?.len() == 2);
            only_exports(&dir)
        };
        look().with_context(|| {
            let line = operations.iter().find(|o| o.number == number).map_or("", |o| o.line.as_str());
            format!("{how} at {number} {line}: {outcome}")
        })?;
    }
    // Holds of killed exports have ended.
    domain.delete(&["s2"])?;
    domain.verify_beside_others()
}

/// All exports of a directory become a domain elsewhere: the same tree, each point as it was, and a domain
/// that can be worked on.
#[test]
fn import_gives_the_same_tree() -> Result<()> {
    let mut seed = Seed::new(from_env("DOMSNAP_PROPERTY_SEED", 31));
    let mut domain = tree(&mut seed, &Shape::disks(2), &["internal", "external", "mixed"], 6)?;
    domain.domsnap().done(&["describe", NAME, "s1", "as installed"])?;
    let (dir, new) = (domain.root().join("exports"), domain.root().join("again"));
    let (from, to) = (dir.display().to_string(), new.display().to_string());
    domain.domsnap().done(&export(&from, &["--all"]))?;
    let before = domsnap_tests::domain::contents(&dir)?;
    domain.domsnap().done(&["import", &from, "--to", &to, "--name", "again"])?;
    ensure!(domsnap_tests::domain::contents(&dir)? == before, "the import changed the exports");
    let list = |name: &str| -> Result<Vec<Value>> {
        let list: Value = domain.domsnap().done(&["list", name, "--json"])?.json()?;
        Ok(list["snapshots"].as_array().context("snapshots")?.clone())
    };
    let shown = |snapshot: &Value| {
        ["name", "parent", "created", "description"].map(|field| snapshot[field].to_string())
    };
    let (theirs, ours) = (list(NAME)?, list("again")?);
    let shown_of = |all: &[Value]| all.iter().map(shown).collect::<BTreeSet<_>>();
    ensure!(shown_of(&theirs) == shown_of(&ours), "{theirs:?} {ours:?}");
    for snapshot in &ours {
        let name = snapshot["name"].as_str().context("a name")?;
        for point in snapshot["points"].as_array().into_iter().flatten() {
            let target = point["target"].as_str().context("a target")?;
            let layer = Path::new(point["layer"].as_str().context("a layer")?);
            ensure!(layer.starts_with(&new), "{point}");
            ensure!(
                qemu::read(layer, None)? == *domain.model.snapshots[name].disks[target],
                "{name} {target}"
            );
            qemu::check(layer)?;
        }
    }
    // It is a domain like any other.
    let newest = ours.iter().max_by_key(|s| s["created"].to_string()).context("a snapshot")?;
    let newest = newest["name"].as_str().context("a name")?.to_owned();
    let image = new.join("vda.qcow2");
    ensure!(qemu::read(&image, None)? == *domain.model.snapshots[&newest].disks["vda"]);
    qemu::write(&image, &[Write { offset: 0, length: 4096, byte: Some(200) }])?;
    domain.domsnap().done(&["check", "again"])?;
    domain.domsnap().done(&["create", "again", "more", "--external"])?;
    for name in domain.model.snapshots.keys() {
        domain.domsnap().done(&["revert", "again", name])?;
        ensure!(qemu::read(&image, None)? == *domain.model.snapshots[name].disks["vda"], "{name}");
    }
    domain.domsnap().done(&["delete", "again", &newest])?;
    domain.domsnap().done(&["check", "again"])?;
    // The catalogue can be lost.
    let lost = domain.root().join("lost");
    let other = domsnap_tests::domsnap::Domsnap::new(&lost);
    other.done(&["import", &format!("{},{}", image.display(), new.join("vdb.qcow2").display())])?;
    domain.write_everywhere()?;
    domain.verify_beside_others()
}

/// A directory that lies is refused, and nothing is left.
#[test]
fn import_refuses_what_lies() -> Result<()> {
    let mut domain = Domain::new(&Shape::disks(1))?;
    domain.write_and_create("s1", "internal")?;
    domain.write_and_create("s2", "internal")?;
    let (dir, new) = (domain.root().join("exports"), domain.root().join("again"));
    let (from, to) = (dir.display().to_string(), new.display().to_string());
    domain.domsnap().done(&export(&from, &["--all"]))?;
    let copy = domain.root().join("copy");
    copy_tree(&dir, &copy)?;
    let args = ["import", &from, "--to", &to, "--name", "again"];
    let refused = |what: &str, message: &str| -> Result<()> {
        let outcome = domain.domsnap().run(&args)?;
        ensure!(matches!(outcome.status, Some(1 | 3)), "{what}: {outcome}");
        ensure!(outcome.stderr.contains(message), "{what}: {message:?} is not said: {outcome}");
        let left = std::fs::read_dir(domain.root())?.filter_map(|entry| Some(entry.ok()?.file_name()));
        let left: Vec<_> =
            left.filter(|name| name.to_string_lossy().contains("import") || name == "again").collect();
        ensure!(left.is_empty(), "{what}: {left:?} is left");
        std::fs::remove_dir_all(&dir)?;
        copy_tree(&copy, &dir)
    };
    let image = |name: &str| dir.join(format!("vda.{name}.qcow2"));
    // One byte of data.
    let mut bytes = std::fs::read(image("s1"))?;
    let last = bytes.len() - 1;
    bytes[last] ^= 1;
    std::fs::write(image("s1"), &bytes)?;
    refused("a byte", "SHA-256")?;
    std::fs::write(image("s1"), &bytes[..last])?;
    refused("a length", "bytes, and was exported with")?;
    std::fs::remove_file(image("s1"))?;
    refused("no file", "cannot open")?;
    std::fs::remove_file(image("s1"))?;
    std::os::unix::fs::symlink(copy.join("vda.s1.qcow2"), image("s1"))?;
    refused("a link", "symbolic link")?;
    // An image with another backing file, with right sums.
    let text = std::fs::read_to_string(dir.join("manifest.json"))?;
    let sum = |path: &Path| -> Result<String> {
        let out = qemu::run("sha256sum", &[path])?;
        Ok(out.split_whitespace().next().context("a sum")?.to_owned())
    };
    let before = sum(&image("s2"))?;
    let secret = domain.path("vda").display().to_string();
    qemu::img(&[
        "rebase",
        "-u",
        "-f",
        "qcow2",
        "-F",
        "qcow2",
        "-b",
        &secret,
        &image("s2").display().to_string(),
    ])?;
    std::fs::write(dir.join("manifest.json"), forged(&text, &before, &sum(&image("s2"))?)?)?;
    refused("another backing file", "names the backing file")?;
    std::fs::write(
        dir.join("manifest.json"),
        forged(&text, "\"backing\": \"vda.s1.qcow2\"", "\"backing\": \"/etc/passwd\"")?,
    )?;
    refused("another backing file in the manifest", "manifest.json")?;
    std::fs::write(dir.join("manifest.json"), "{}")?;
    refused("no manifest", "manifest.json")?;
    std::fs::create_dir(&new)?;
    let exists = domain.domsnap().run(&args)?.expect_status(status::REFUSED)?;
    ensure!(exists.stderr.contains("exists"), "{exists}");
    std::fs::remove_dir(&new)?;
    domain.domsnap().run(&["import", &from, "--to", &to])?.expect_status(status::REFUSED)?;
    domain.domsnap().done(&args)?;
    // A kill of the import leaves a hidden directory, or images that can be imported in place.
    let (_outputs, file) = shim::outputs()?;
    let third = domain.root().join("third").display().to_string();
    let args = ["import", &from, "--to", &third, "--name", "third"];
    shim::counting(shim::watching(domain.domsnap(), domain.root())?, &file).done(&args)?;
    let operations = shim::counted(&file)?;
    let names = operations.iter().filter(|o| o.line.starts_with("rename ") && !o.line.contains("-wal"));
    let numbers: Vec<u64> =
        names.map(|o| o.number).chain([operations[operations.len() / 2].number]).collect();
    for number in numbers {
        domain.domsnap().run(&["domain", "remove", "third"])?;
        std::fs::remove_dir_all(&third).ok();
        shim::killing(shim::watching(domain.domsnap(), domain.root())?, number, false).run(&args)?;
        let known = domain.domsnap().run(&["domain", "show", "third"])?.status == Some(status::DONE);
        if !known && Path::new(&third).exists() {
            domain.domsnap().done(&["import", &format!("{third}/vda.qcow2"), "--name", "third"])?;
        } else if !known {
            domain.domsnap().done(&args)?;
        }
        let list: Value = domain.domsnap().done(&["list", "third", "--json"])?.json()?;
        ensure!(list["snapshots"].as_array().map(Vec::len) == Some(2), "killed at {number}: {list}");
    }
    let hidden = std::fs::read_dir(domain.root())?.filter_map(|e| Some(e.ok()?.file_name()));
    let hidden: Vec<_> = hidden.filter(|name| name.to_string_lossy().contains("import")).collect();
    ensure!(hidden.is_empty(), "{hidden:?}");
    domain.verify_beside_others()
}

/// The commands of the guide's page, each run as it is written there.
#[test]
fn every_command_of_the_page_runs() -> Result<()> {
    let dir = tempfile::Builder::new().prefix("domsnap-test-").tempdir()?;
    let place = dir.path().join("backup");
    std::fs::create_dir(&place)?;
    let image = dir.path().join("root.qcow2");
    qemu::img(&["create", "-q", "-f", "qcow2", &image.display().to_string(), "4M"])?;
    let domsnap = domsnap_tests::domsnap::Domsnap::new(&dir.path().join("state"));
    domsnap.done(&["domain", "add", "shop", "--disk", &format!("vda={}", image.display())])?;
    for (name, byte) in [("monday", 1), ("tuesday", 2)] {
        qemu::write(&image, &[Write { offset: 1 << 20, length: 65536, byte: Some(byte) }])?;
        domsnap.done(&["create", "shop", name])?;
    }
    let page = Path::new(env!("CARGO_MANIFEST_DIR")).join("../docs/backup.md");
    let (mut is_code, mut run) = (false, 0);
    let mut server: Option<Server> = None;
    for line in std::fs::read_to_string(page)?.lines() {
        if line.starts_with("```") {
            is_code = !is_code;
            continue;
        }
        let here = line.replace("/srv/backup", &place.display().to_string()).replace('"', "");
        let Some(command) = here.split(" #").next().filter(|_| is_code).map(str::trim) else { continue };
        let (command, out) =
            command.split_once(" > ").map_or((command, None), |(command, out)| (command, Some(out)));
        let parts: Vec<&str> = command.split_whitespace().collect();
        match (&parts[..], out) {
            (["domsnap", "serve", args @ .., "--dir", dir, "&"], None) => {
                server = Some(Server::of_snapshot(&domsnap, args, Path::new(dir), "vda")?);
            }
            // `mount` runs these, on disks that have file systems.
            (["domsnap", "mount", ..], None) => continue,
            (["kill", _], None) if server.is_none() => continue,
            (["kill", _], None) => server.take().context("a server")?.stop().context(line.to_owned())?,
            (["nbdcopy", args @ ..], None) => {
                ensure!(std::process::Command::new("nbdcopy").args(args).status()?.success(), "{line}");
            }
            (["domsnap", args @ ..], None) => domsnap.done(args).map(drop).context(line.to_owned())?,
            (["domsnap", args @ ..], Some(out)) => {
                let status = domsnap.command(args).stdout(std::fs::File::create(out)?).status()?;
                ensure!(status.success(), "{line}");
                ensure!(std::fs::metadata(out)?.len() == 4 << 20, "{line}");
            }
            (["qemu-img", args @ ..], None) => qemu::img(args).map(drop).context(line.to_owned())?,
            _ => continue,
        }
        run += 1;
    }
    ensure!(run >= 18, "only {run} commands are left in the page");
    Ok(())
}
