//! Undo and holds at rest: what a revert replaced comes back, and what is held stays, also without the
//! catalogue and beside manifests that lie.

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use domsnap_tests::domain::{Domain, NAME, Shape};
use domsnap_tests::domsnap::{Domsnap, status};
use domsnap_tests::qemu::{self, Write};
use domsnap_tests::report;
use domsnap_tests::served::Server;
use serde_json::Value;

fn snapshot(domsnap: &Domsnap, address: &str, name: &str) -> Result<Value> {
    let list: Value = domsnap.done(&["list", address, "--json"])?.json()?;
    let found = list["snapshots"].as_array().into_iter().flatten().find(|found| found["name"] == name);
    found.cloned().with_context(|| format!("{name} is not in {list}"))
}

fn undo(domain: &mut Domain) -> Result<()> {
    domain.domsnap().done(&["undo", NAME])?;
    domain.model.undo();
    domain.verify()
}

/// Reverts between two snapshots, each undone once and twice.
fn there_and_back(mut domain: Domain, kind: &str) -> Result<()> {
    domain.create("s1", kind)?;
    domain.write_and_create("s2", kind)?;
    domain.write_everywhere()?;
    for name in ["s1", "s2", "s2"] {
        let outcome = domain.domsnap().done(&["revert", NAME, name, "--undo=free", "--json"])?;
        ensure!(outcome.json::<Value>()?["outcome"]["kept"] == true, "{outcome}");
        domain.model.revert_and_keep(name);
        domain.verify()?;
        undo(&mut domain)?;
        undo(&mut domain)?;
        domain.write_everywhere()?;
        undo(&mut domain)?;
        domain.write_everywhere()?;
    }
    // What the kept state needs is needed: its snapshot may go, and it still comes back.
    domain.delete(&["s2"])?;
    domain.verify()?;
    undo(&mut domain)?;
    let listed = domain.domsnap().done(&["list", NAME])?.stdout;
    ensure!(listed.contains("replaced") && listed.contains("`domsnap undo guest`"), "{listed}");
    // The next snapshot gives it up.
    domain.create("s3", kind)?;
    domain.verify()?;
    domain.declined(&["undo", NAME], status::REFUSED)?;
    domain.delete(&["s1", "s3"])?;
    domain.verify()
}

/// An undo of an undo is the identity, with internal snapshots.
#[test]
fn undo_with_internal_snapshots() -> Result<()> {
    there_and_back(Domain::new(&Shape::disks(2))?, "internal")
}

/// An undo of an undo is the identity, with external snapshots.
#[test]
fn undo_with_external_snapshots() -> Result<()> {
    there_and_back(Domain::new(&Shape::disks(2))?, "external")
}

/// An undo of an undo is the identity, with one disk of each kind.
#[test]
fn undo_with_mixed_snapshots() -> Result<()> {
    there_and_back(Domain::new(&Shape::disks(2))?, "mixed")
}

/// An undo of an undo is the identity, with copies of raw files.
#[test]
fn undo_with_raw_copies() -> Result<()> {
    there_and_back(Domain::new(&Shape::raw(2))?, "copy")
}

/// A revert that keeps nothing gives up what an earlier one kept: an undo never brings back an older state.
#[test]
fn revert_without_undo_keeps_nothing() -> Result<()> {
    let mut domain = Domain::new(&Shape::disks(2))?;
    domain.create("s1", "mixed")?;
    domain.write_everywhere()?;
    domain.domsnap().done(&["revert", NAME, "s1", "--undo=free"])?;
    domain.model.revert_and_keep("s1");
    domain.write_everywhere()?;
    domain.revert("s1")?;
    domain.verify()?;
    domain.declined(&["undo", NAME], status::REFUSED)?;
    // By the variable, too.
    domain.write_everywhere()?;
    domain.domsnap().env("DOMSNAP_UNDO", "disks").done(&["revert", NAME, "s1"])?;
    domain.model.revert_and_keep("s1");
    domain.verify()?;
    let wrong = domain.domsnap().env("DOMSNAP_UNDO", "perhaps").run(&["revert", NAME, "s1"])?;
    wrong.expect_status(status::USAGE)?;
    domain.verify()
}

/// A dry run of an undo, and of all that changes records, changes nothing.
#[test]
fn dry_runs_change_nothing() -> Result<()> {
    let mut domain = Domain::new(&Shape::disks(2))?;
    domain.create("s1", "mixed")?;
    domain.write_everywhere()?;
    domain.domsnap().done(&["revert", NAME, "s1", "--undo=free"])?;
    domain.model.revert_and_keep("s1");
    let history = || Ok::<_, anyhow::Error>(domain.domsnap().done(&["history", NAME])?.stdout);
    let before = history()?;
    for args in [
        &["undo", NAME][..],
        &["undo", NAME, "--forget"],
        &["hold", NAME, "s1"],
        &["rename", NAME, "s1", "s2"],
        &["describe", NAME, "s1", "text"],
        &["expire", NAME, "s1", "1d"],
    ] {
        let said = domain.domsnap().done(&[args, &["--dry-run"]].concat())?.stdout;
        ensure!(said.contains("no changes made"), "{args:?}: {said}");
        domain.domsnap().done(&[args, &["--dry-run", "--json"]].concat())?.json::<Value>()?;
    }
    ensure!(history()? == before, "{}", history()?);
    domain.verify()
}

/// A held snapshot is not deleted, whoever wants it; the refusal names the holders and the next command.
#[test]
fn held_snapshot_is_not_deleted() -> Result<()> {
    let mut domain = Domain::new(&Shape::disks(1))?;
    for name in ["s1", "s2", "s3"] {
        domain.write_and_create(name, "external")?;
    }
    let domsnap = domain.domsnap().env("LOGNAME", "me").env("SUDO_USER", "");
    domsnap.done(&["hold", NAME, "s2", "--reason", "a copy runs"])?;
    domsnap.done(&["hold", NAME, "s2", "--holder", "backup", "--until", "9999-01-01"])?;
    for args in
        [&["delete", NAME, "s2"][..], &["delete", NAME, "s3", "s2"], &["delete", NAME, "s1", "--children"]]
    {
        let said = domain.declined(args, status::REFUSED)?.stderr;
        for part in
            ["held by me (a copy runs), backup (until", "domsnap release guest s2 --holder me", "--defer"]
        {
            ensure!(said.contains(part), "{part} is not in {said}");
        }
    }
    domain.declined(&["hold", NAME, "s2", "--holder", "backup"], status::REFUSED)?;
    domain.declined(&["hold", NAME, "s2", "--holder", "serve:1"], status::USAGE)?;
    domain.declined(&["hold", NAME, "s2", "--holder", "late", "--until", "2001-01-01"], status::USAGE)?;
    let said = domain.declined(&["release", NAME, "s2", "--holder", "other"], status::REFUSED)?.stderr;
    ensure!(said.contains("held by me"), "{said}");
    // Others go, and are not kept by it.
    domsnap.done(&["delete", NAME, "s1", "s2", "--defer"])?;
    domain.model.delete(&["s1".into()]);
    domain.verify()?;
    let found = snapshot(&domsnap, NAME, "s2")?;
    ensure!(
        found["deferred"] == true && found["holds"].as_array().is_some_and(|all| all.len() == 2),
        "{found}"
    );
    domsnap.done(&["release", NAME, "s2"])?;
    domain.verify()?;
    domsnap.done(&["release", NAME, "s2", "--holder", "backup"])?;
    domain.model.delete(&["s2".into()]);
    domain.verify()
}

/// A hold ends by itself; then a deferred delete is done by the next `recover`.
#[test]
fn hold_ends_with_its_time() -> Result<()> {
    let mut domain = Domain::new(&Shape::disks(1))?;
    domain.write_and_create("s1", "external")?;
    domain.write_and_create("s2", "external")?;
    let held = Instant::now();
    domain.domsnap().done(&["hold", NAME, "s1", "--until", "4s"])?;
    domain.domsnap().done(&["delete", NAME, "s1", "--defer"])?;
    domain.domsnap().done(&["recover"])?;
    // On a machine that is busy for so long there is nothing to look at.
    if held.elapsed() < Duration::from_secs(3) {
        domain.verify()?;
    }
    std::thread::sleep(Duration::from_secs(5).saturating_sub(held.elapsed()));
    domain.domsnap().done(&["recover"])?;
    domain.model.delete(&["s1".into()]);
    domain.verify()
}

/// `delete --expired` deletes what has expired, except what is held and what the current state is based on.
#[test]
fn expired_snapshots_are_deleted_together() -> Result<()> {
    let mut domain = Domain::new(&Shape::disks(1))?;
    for name in ["s1", "s2", "s3", "s4"] {
        domain.write_and_create(name, "mixed")?;
    }
    for name in ["s1", "s2", "s4"] {
        domain.domsnap().done(&["expire", NAME, name, "2001-01-01"])?;
    }
    domain.domsnap().done(&["expire", NAME, "s3", "1d"])?;
    domain.domsnap().done(&["hold", NAME, "s2", "--holder", "me"])?;
    domain.domsnap().done(&["delete", NAME, "--expired"])?;
    domain.model.delete(&["s1".into()]);
    domain.verify()?;
    domain.domsnap().done(&["expire", NAME, "s3", "never"])?;
    ensure!(snapshot(&domain.domsnap(), NAME, "s3")?["expires"].is_null());
    Ok(())
}

/// A new name frees the old one, also for an internal snapshot, whose tag keeps it.
#[test]
fn renamed_snapshot_frees_its_name() -> Result<()> {
    let mut domain = Domain::new(&Shape::disks(1))?;
    domain.write_and_create("s1", "internal")?;
    for new in ["a", "b"] {
        domain.domsnap().done(&["rename", NAME, "s1", new])?;
        domain.model.rename("s1", new);
        domain.write_and_create("s1", "internal")?;
        domain.verify()?;
    }
    domain.declined(&["rename", NAME, "a", "b"], status::REFUSED)?;
    domain.declined(&["rename", NAME, "a", "undo:x"], status::USAGE)?;
    domain.revert("a")?;
    domain.delete(&["s1", "b"])?;
    domain.verify()?;
    // A tag that is not ours is never shared with.
    qemu::run("qemu-img", &["snapshot", "-c", "theirs", &domain.path("vda").display().to_string()])?;
    domain.declined(&["create", NAME, "theirs", "--internal"], status::REFUSED)?;
    Ok(())
}

/// Holds, names, descriptions, expiry and the replaced state survive the loss of the catalogue.
#[test]
fn records_survive_a_lost_catalogue() -> Result<()> {
    let mut domain = Domain::new(&Shape::disks(2))?;
    domain.write_and_create("s1", "mixed")?;
    domain.write_and_create("s2", "mixed")?;
    let domsnap = domain.domsnap();
    domsnap.done(&[
        "hold",
        NAME,
        "s1",
        "--holder",
        "backup",
        "--reason",
        "off-site",
        "--until",
        "9999-01-01",
    ])?;
    domsnap.done(&["delete", NAME, "s1", "--defer"])?;
    domsnap.done(&["rename", NAME, "s2", "monday"])?;
    domain.model.rename("s2", "monday");
    domsnap.done(&["describe", NAME, "monday", "before the update"])?;
    domsnap.done(&["expire", NAME, "monday", "9999-06-01"])?;
    domsnap.done(&["revert", NAME, "s1", "--undo=free"])?;
    domain.model.revert_and_keep("s1");
    domain.verify()?;
    let before = [snapshot(&domsnap, NAME, "s1")?, snapshot(&domsnap, NAME, "monday")?];
    std::fs::remove_dir_all(domain.state())?;
    domsnap.done(&["import", &domain.paths(), "--name", NAME])?;
    ensure!([snapshot(&domsnap, NAME, "s1")?, snapshot(&domsnap, NAME, "monday")?] == before);
    domain.verify()?;
    let said = domain.declined(&["delete", NAME, "s1"], status::REFUSED)?.stderr;
    ensure!(said.contains("backup (off-site, until"), "{said}");
    undo(&mut domain)
}

/// Replaces a text in the manifest of the snapshot `name`, with a checksum that is right.
fn forge(domain: &Domain, name: &str, change: impl Fn(&mut Value)) -> Result<PathBuf> {
    let directory = domain.path("vda").with_extension("qcow2.domsnap");
    for entry in std::fs::read_dir(&directory)? {
        let path = entry?.path();
        let mut envelope: Value = serde_json::from_slice(&std::fs::read(&path)?)?;
        if envelope["content"]["name"] != name || path.ends_with("domain.json") {
            continue;
        }
        change(&mut envelope["content"]);
        let content = serde_json::to_string(&envelope["content"])?;
        let crc = format!("{:08x}", crc32fast::hash(content.as_bytes()));
        let text = format!("{{\"domsnap-manifest\":1,\"crc32\":\"{crc}\",\"content\":{content}}}");
        std::fs::write(&path, text)?;
        return Ok(path);
    }
    anyhow::bail!("no manifest of {name} in {}", directory.display())
}

/// Holds in manifests are data of whoever owns the directory: what is no hold is not imported, and nothing
/// that steers a terminal is printed.
#[test]
fn forged_holds_are_refused() -> Result<()> {
    let hold = |holder: &str, reason: &str| serde_json::json!({ "holder": holder, "reason": reason, "since": "2026-01-01T00:00:00Z" });
    let many = |number: usize| (0..number).map(|n| hold(&format!("h{n}"), "")).collect::<Vec<_>>();
    for holds in [
        vec![hold("a\u{1b}[2J", "")],
        vec![hold("a b", "")],
        vec![hold("a", "x\u{1b}]0;y")],
        vec![hold("a", ""), hold("a", "")],
        vec![hold("a", &"x".repeat(5000))],
        many(2000),
    ] {
        let mut domain = Domain::new(&Shape::disks(1))?;
        domain.write_and_create("s1", "internal")?;
        domain.write_and_create("s2", "internal")?;
        forge(&domain, "s1", |content| content["holds"] = Value::Array(holds.clone()))?;
        std::fs::remove_dir_all(domain.state())?;
        let outcome = domain.domsnap().done(&["import", &domain.paths(), "--name", NAME])?;
        ensure!(!outcome.stdout.contains('\u{1b}') && !outcome.stderr.contains('\u{1b}'), "{outcome}");
        ensure!(outcome.stdout.contains("left out"), "{outcome}");
        let list = report::list(&domain.domsnap(), NAME)?;
        ensure!(list.snapshots.iter().any(|found| found.name == "s2"), "{list:?}");
    }
    Ok(())
}

/// A manifest cannot make a second replaced state, nor remove a file elsewhere by calling it one.
#[test]
fn forged_replaced_states_do_no_harm() -> Result<()> {
    let mut domain = Domain::new(&Shape::disks(1))?;
    domain.write_and_create("s1", "external")?;
    domain.write_and_create("s2", "external")?;
    let victim = domain.root().join("victim.qcow2");
    std::fs::write(&victim, "of another")?;
    let layer = victim.display().to_string();
    forge(&domain, "s2", |content| {
        content["role"] = "dropped".into();
        content["disks"][0]["layer"] = layer.clone().into();
    })?;
    std::fs::remove_dir_all(domain.state())?;
    domain.domsnap().done(&["import", &domain.paths(), "--name", NAME])?;
    domain.domsnap().run(&["recover"])?;
    ensure!(std::fs::read(&victim)? == b"of another", "a file outside was touched");
    let current = qemu::read(&domain.path("vda"), None)?;
    ensure!(current == *domain.model.present["vda"], "the current state changed");
    Ok(())
}

/// A snapshot that is served is held by the server, and no more when the server has ended, or was killed.
#[test]
fn served_snapshot_is_held() -> Result<()> {
    let mut domain = Domain::new(&Shape::disks(1))?;
    domain.write_and_create("s1", "external")?;
    domain.write_everywhere()?;
    let image = domain.path("vda").display().to_string();
    let socket = domain.root().join("s");
    let mut server = Server::start(&domain.domsnap(), &socket, &[&image, "--at", "s1"])?;
    let said = domain.declined(&["delete", NAME, "s1"], status::REFUSED)?.stderr;
    ensure!(said.contains("held by serve:") && said.contains("ends with process"), "{said}");
    let holder =
        snapshot(&domain.domsnap(), NAME, "s1")?["holds"][0]["holder"].as_str().unwrap_or("").to_owned();
    domain.declined(&["release", NAME, "s1", "--holder", &holder], status::REFUSED)?;
    server.stop()?;
    ensure!(snapshot(&domain.domsnap(), NAME, "s1")?["holds"].as_array().is_some_and(Vec::is_empty));
    let _ = std::fs::remove_file(&socket);
    let mut server = Server::start(&domain.domsnap(), &socket, &[&image, "--at", "s1"])?;
    ensure!(!snapshot(&domain.domsnap(), NAME, "s1")?["holds"].as_array().is_some_and(Vec::is_empty));
    server.kill()?;
    domain.delete(&["s1"])?;
    domain.verify()
}

/// The commands of the guide's page, each run as it is written there.
#[test]
fn every_command_of_the_page_runs() -> Result<()> {
    let mut domain = Domain::new(&Shape::disks(1))?;
    domain.domsnap().done(&["domain", "remove", NAME])?;
    let disk = format!("vda={},format=qcow2", domain.path("vda").display());
    domain.domsnap().done(&["domain", "add", "shop", "--disk", &disk])?;
    for name in ["monday", "tuesday", "wednesday"] {
        domain.write("vda", &[Write { offset: 0, length: 4096, byte: Some(name.len() as u8) }])?;
        domain.domsnap().done(&["create", "shop", name])?;
    }
    let page = Path::new(env!("CARGO_MANIFEST_DIR")).join("../docs/undo.md");
    let (mut is_code, mut run) = (false, 0);
    for line in std::fs::read_to_string(page)?.lines() {
        if line.starts_with("```") {
            is_code = !is_code;
            continue;
        }
        let Some(command) = line.split(" #").next().filter(|_| is_code).map(str::trim) else { continue };
        let Some(args) = command.strip_prefix("domsnap ") else { continue };
        // Quotes of a shell, as far as the page has them.
        let mut parts: Vec<String> = Vec::new();
        for (number, part) in args.split('\'').enumerate() {
            match number % 2 {
                0 => parts.extend(part.split_whitespace().map(str::to_owned)),
                _ => parts.push(part.to_owned()),
            }
        }
        domain
            .domsnap()
            .env("DOMSNAP_UNDO", "")
            .env("LOGNAME", "me")
            .done(&parts)
            .context(line.to_owned())?;
        run += 1;
    }
    ensure!(run >= 15, "only {run} commands are left in the page");
    Ok(())
}
