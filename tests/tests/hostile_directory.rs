//! Directories that a tenant owns, in which root runs domsnap: a test for each line of `docs/security.md`.
//!
//! Whatever lies beside the images, nothing outside of the directory is read, written, made, removed or run,
//! nothing hangs, and what is refused is refused with a message.

use std::fs::{self, File};
use std::os::unix::fs::{MetadataExt, PermissionsExt, chown, symlink};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use domsnap_tests::domsnap::{Domsnap, Outcome, status};
use domsnap_tests::qemu::{self, Write};
use rustix::fs::{CWD, FileType, Mode, XattrFlags};
use serde_json::{Value, json};

/// The tenant: no user of the machine's.
const TENANT: u32 = 5000;

/// A file of another user: path, owner, mode, number of names, content.
type Foreign = (PathBuf, u32, u32, u64, Vec<u8>);

/// Changes the content of `domain.json` and of a snapshot's manifest; the text is the directory of another
/// user else.
type Forgery = dyn Fn(&mut Value, &mut Value, &str);

/// A tenant's directory with an image of his, root's state directory, and the files of another user.
struct Place {
    dir: tempfile::TempDir,
}

impl Place {
    /// `None` where this does not run as root: only root can give files away.
    fn new() -> Result<Option<Place>> {
        if !rustix::process::geteuid().is_root() {
            eprintln!("left out: only root works on the directories of others");
            return Ok(None);
        }
        let place = Place { dir: tempfile::tempdir()? };
        fs::set_permissions(place.dir.path(), fs::Permissions::from_mode(0o755))?;
        for name in ["tenant", "other", "state"] {
            fs::create_dir(place.path(name))?;
        }
        fs::set_permissions(place.path("state"), fs::Permissions::from_mode(0o700))?;
        image(&place.path("other/victim.qcow2"), 0x77)?;
        fs::write(place.path("other/passwd"), "root:x:0:0\n")?;
        image(&place.image(), 1)?;
        place.give_away()?;
        Ok(Some(place))
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn image(&self) -> PathBuf {
        self.path("tenant/a.qcow2")
    }

    fn manifests(&self) -> PathBuf {
        self.path("tenant/a.qcow2.domsnap")
    }

    /// All that is in the tenant's directory becomes his.
    fn give_away(&self) -> Result<()> {
        let mut all = vec![self.path("tenant")];
        while let Some(path) = all.pop() {
            std::os::unix::fs::lchown(&path, Some(TENANT), Some(TENANT))?;
            if path.symlink_metadata()?.is_dir() {
                for entry in fs::read_dir(&path)? {
                    all.push(entry?.path());
                }
            }
        }
        Ok(())
    }

    fn domsnap(&self) -> Domsnap {
        Domsnap::new(&self.path("state")).through(&["timeout", "-s", "KILL", "60"])
    }

    /// Runs a command, which must end by itself and with a message.
    fn run(&self, args: &[&str]) -> Result<Outcome> {
        let outcome = self.domsnap().run(args)?;
        ensure!(outcome.status.is_some() && outcome.status != Some(137), "it hangs: {outcome}");
        ensure!(!outcome.panicked(), "{outcome}");
        Ok(outcome)
    }

    fn on_image(&self, command: &str, more: &[&str]) -> Result<Outcome> {
        let image = self.image();
        let image = image.to_str().context("a path in UTF-8")?;
        self.run(&[&[command, image], more].concat())
    }

    fn done(&self, command: &str, more: &[&str]) -> Result<Outcome> {
        self.on_image(command, more)?.expect_status(status::DONE)
    }

    /// All of the other user, by content, owner and mode.
    fn others(&self) -> Result<Vec<Foreign>> {
        let mut all = Vec::new();
        for entry in fs::read_dir(self.path("other"))? {
            let path = entry?.path();
            let about = path.symlink_metadata()?;
            let bytes = if about.is_file() { fs::read(&path)? } else { Vec::new() };
            all.push((path, about.uid(), about.mode(), about.nlink(), bytes));
        }
        all.sort();
        Ok(all)
    }

    /// The files of permanent names that no other name shares: the layers but the active one.
    fn layers(&self) -> Result<Vec<PathBuf>> {
        let mut layers = Vec::new();
        for entry in fs::read_dir(self.path("tenant"))? {
            let path = entry?.path();
            if path.to_string_lossy().contains(".ds-") && path.symlink_metadata()?.nlink() == 1 {
                layers.push(path);
            }
        }
        layers.sort();
        Ok(layers)
    }
}

fn image(path: &Path, byte: u8) -> Result<()> {
    let make = ["create", "-q", "-f", "qcow2"].map(std::ffi::OsStr::new);
    qemu::img(&[&make[..], &[path.as_os_str(), "4M".as_ref()]].concat())?;
    qemu::write(path, &[Write { offset: 0, length: 65_536, byte: Some(byte) }])
}

fn content(path: &Path) -> Result<Value> {
    let envelope: Value = serde_json::from_slice(&fs::read(path)?)?;
    Ok(envelope["content"].clone())
}

fn forge(path: &Path, content: &Value) -> Result<()> {
    let text = content.to_string();
    let crc = crc32fast::hash(text.as_bytes());
    fs::write(path, format!("{{\"domsnap-manifest\":1,\"crc32\":\"{crc:08x}\",\"content\":{text}}}\n"))?;
    Ok(chown(path, Some(TENANT), Some(TENANT))?)
}

fn fifo(path: &Path) -> Result<()> {
    rustix::fs::mknodat(CWD, path, FileType::Fifo, Mode::RUSR | Mode::WUSR, 0)?;
    Ok(())
}

/// Puts something else in the place of a file.
fn replace(path: &Path, with: &str, place: &Place) -> Result<()> {
    match path.symlink_metadata() {
        Ok(about) if about.is_dir() => fs::remove_dir_all(path)?,
        Ok(_) => fs::remove_file(path)?,
        Err(_) => {}
    }
    match with {
        "link" => symlink(place.path("other/victim.qcow2"), path)?,
        "text" => symlink(place.path("other/passwd"), path)?,
        "directory" => symlink(place.path("other"), path)?,
        "dangling" => symlink(place.path("other/made"), path)?,
        "fifo" => fifo(path)?,
        "device" => symlink("/dev/zero", path)?,
        other => anyhow::bail!("{other} is none"),
    }
    Ok(std::os::unix::fs::lchown(path, Some(TENANT), Some(TENANT))?)
}

const KINDS: [&str; 6] = ["link", "text", "directory", "dangling", "fifo", "device"];

/// A frozen layer that became something else is not read, merged, written or waited for.
#[test]
fn a_layer_that_was_replaced_is_not_followed() -> Result<()> {
    for kind in KINDS {
        let Some(place) = Place::new()? else { return Ok(()) };
        for (name, byte) in [("s1", 2), ("s2", 3)] {
            place.done("create", &[name, "--external"])?;
            qemu::write(&place.image(), &[Write { offset: 4096, length: 4096, byte: Some(byte) }])?;
        }
        let layers = place.layers()?;
        ensure!(layers.len() == 2, "{layers:?}");
        let others = place.others()?;
        for layer in &layers {
            replace(layer, kind, &place)?;
        }
        for args in
            [&["revert", "s1"][..], &["delete", "s1"], &["delete", "s2"], &["create", "s9", "--internal"]]
        {
            let outcome = place.on_image(args[0], &args[1..])?;
            // What only concerns the active image needs no layer below it.
            let needs_layers = args[0] != "create";
            ensure!(outcome.status != Some(status::DONE) || !needs_layers, "{kind}: {outcome}");
            ensure!(place.others()? == others, "{kind}: another user's files were changed: {outcome}");
        }
        for command in ["list", "check"] {
            place.on_image(command, &[])?;
        }
        place.run(&["recover"])?;
        ensure!(place.others()? == others, "{kind}: another user's files were changed");
    }
    Ok(())
}

/// Manifests, their directory and their temporary names are not followed.
#[test]
fn a_manifest_that_was_replaced_is_not_followed() -> Result<()> {
    for kind in ["text", "directory", "dangling", "fifo"] {
        for name in ["", "domain.json", "domain.json.tmp", "SNAPSHOT"] {
            let Some(place) = Place::new()? else { return Ok(()) };
            place.done("create", &["s1", "--internal"])?;
            let path = match name {
                "" => place.manifests(),
                "SNAPSHOT" => {
                    let mut files = fs::read_dir(place.manifests())?.flatten().map(|entry| entry.path());
                    files.find(|path| !path.ends_with("domain.json")).context("a snapshot's manifest")?
                }
                name => place.manifests().join(name),
            };
            place.give_away()?;
            replace(&path, kind, &place)?;
            let others = place.others()?;
            for args in [&["list"][..], &["create", "s2", "--internal"], &["delete", "s1"], &["check"]] {
                let outcome = place.on_image(args[0], &args[1..])?;
                ensure!(place.others()? == others, "{kind} {name}: {outcome}");
            }
            // Neither does a catalogue that knows nothing of it.
            fs::remove_dir_all(place.path("state"))?;
            for args in [&["list"][..], &["create", "s3", "--internal"], &["import"]] {
                let outcome = place.on_image(args[0], &args[1..])?;
                ensure!(place.others()? == others, "{kind} {name}: {outcome}");
            }
        }
    }
    Ok(())
}

/// A manifest that is huge, nested deeply, or not ours is refused and not waited for.
#[test]
fn a_manifest_that_is_too_much_is_refused() -> Result<()> {
    let Some(place) = Place::new()? else { return Ok(()) };
    place.done("create", &["s1", "--internal"])?;
    fs::remove_dir_all(place.path("state"))?;
    let domain = place.manifests().join("domain.json");
    let good = fs::read(&domain)?;
    let begun = Instant::now();
    File::create(&domain)?.set_len(1 << 40)?;
    place.done("list", &[])?;
    let depth = 1_000_000;
    let deep = format!("{}{}", "[".repeat(depth), "]".repeat(depth));
    let crc = crc32fast::hash(deep.as_bytes());
    fs::write(&domain, format!("{{\"domsnap-manifest\":1,\"crc32\":\"{crc:08x}\",\"content\":{deep}}}"))?;
    place.done("list", &[])?;
    ensure!(begun.elapsed() < Duration::from_secs(120), "it takes too long");
    // In a directory where all users may make files, another user's manifests are ignored.
    fs::write(&domain, good)?;
    chown(place.path("tenant"), Some(0), Some(0))?;
    fs::set_permissions(place.path("tenant"), fs::Permissions::from_mode(0o1777))?;
    chown(place.image(), Some(0), Some(0))?;
    chown(place.manifests(), Some(TENANT), Some(TENANT))?;
    let outcome = place.on_image("import", &[])?;
    ensure!(outcome.stdout.contains("belongs to user 5000"), "{outcome}");
    Ok(())
}

/// Names and paths that lead out of the directory are refused, and files elsewhere are neither shown nor
/// removed.
#[test]
fn names_in_manifests_do_not_lead_out() -> Result<()> {
    const VICTIM: &str = "../other/victim.qcow2";
    let forgeries: [&Forgery; 6] = [
        &|domain, _, _| domain["disks"][0]["owned"] = json!(["a.qcow2", VICTIM]),
        &|domain, _, _| domain["disks"][0]["active"] = json!(VICTIM),
        &|_, snapshot, _| snapshot["disks"][0]["layer"] = json!(VICTIM),
        &|domain, snapshot, elsewhere| {
            let absolute = format!("{elsewhere}/victim.qcow2");
            domain["disks"][0]["owned"] = json!([domain["disks"][0]["active"], absolute]);
            snapshot["disks"][0]["layer"] = json!(absolute);
            snapshot["disks"][0]["tag"] = Value::Null;
        },
        &|_, snapshot, elsewhere| {
            snapshot["memory"] =
                json!({ "file": format!("{elsewhere}/passwd"), "bytes": 1, "running": true });
        },
        &|domain, _, elsewhere| {
            domain["disks"][0]["path"] = json!(format!("{elsewhere}/../other/victim.qcow2"))
        },
    ];
    for (number, forgery) in forgeries.iter().enumerate() {
        let Some(place) = Place::new()? else { return Ok(()) };
        place.done("create", &["s1", "--internal"])?;
        fs::remove_dir_all(place.path("state"))?;
        let mut files = fs::read_dir(place.manifests())?.flatten().map(|entry| entry.path());
        let file = files.find(|path| !path.ends_with("domain.json")).context("a snapshot's manifest")?;
        let domain_file = place.manifests().join("domain.json");
        let (mut domain, mut snapshot) = (content(&domain_file)?, content(&file)?);
        let elsewhere = place.path("other").display().to_string();
        forgery(&mut domain, &mut snapshot, &elsewhere);
        forge(&domain_file, &domain)?;
        forge(&file, &snapshot)?;
        let others = place.others()?;
        for args in [&["list"][..], &["revert", "s1"], &["delete", "s1"], &["import"], &["delete", "s1"]] {
            let outcome = place.on_image(args[0], &args[1..])?;
            ensure!(place.others()? == others, "{number}: {outcome}");
        }
        let shown = qemu::read(&place.image(), None)?;
        ensure!(shown.first() != Some(&0x77), "{number}: another user's image is shown");
    }
    Ok(())
}

/// An idle QEMU that ends with the test.
struct Qemu(Child);

impl Drop for Qemu {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn idle(place: &Place, environment: &[(&str, &str)]) -> Result<(Qemu, PathBuf)> {
    let socket = place.path("qmp");
    let drive = format!("file={},if=virtio,id=vda,format=qcow2", place.image().display());
    let child = Command::new("qemu-system-x86_64")
        .args(["-machine", "pc,accel=tcg", "-m", "32", "-display", "none", "-nodefaults", "-drive", &drive])
        .args(["-object", "secret,id=hidden,data=hush-object"])
        .args(["-qmp", &format!("unix:{},server=on,wait=off", socket.display())])
        .envs(environment.iter().copied())
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .spawn()
        .context("start QEMU")?;
    let qemu = Qemu(child);
    let until = Instant::now() + Duration::from_secs(120);
    while !socket.exists() {
        ensure!(Instant::now() < until, "QEMU makes no socket");
        std::thread::sleep(Duration::from_millis(20));
    }
    Ok((qemu, socket))
}

/// Commands in manifests run only where the user confirms them; the environment and secrets of a QEMU are
/// nowhere.
#[test]
fn commands_in_manifests_need_to_be_confirmed() -> Result<()> {
    let Some(place) = Place::new()? else { return Ok(()) };
    let (qemu, socket) = idle(&place, &[("API_TOKEN", "hush-variable"), ("LC_TIME", "C")])?;
    let socket = socket.display().to_string();
    place.run(&["domain", "add", "web", "--qmp", &socket])?.expect_status(status::DONE)?;
    let dry = place.run(&["create", "web", "good", "--dry-run", "--json"])?.expect_status(status::DONE)?;
    ensure!(!dry.stdout.contains("hush") && !dry.stdout.contains("LC_TIME"), "{dry}");
    place.run(&["create", "web", "good"])?.expect_status(status::DONE)?;
    drop(qemu);
    let mut files: Vec<PathBuf> = Vec::new();
    for directory in [place.path("state"), place.manifests()] {
        files.extend(fs::read_dir(directory)?.flatten().map(|entry| entry.path()));
    }
    for file in files.iter().filter(|file| file.is_file()) {
        let bytes = fs::read(file)?;
        let has = |word: &[u8]| bytes.windows(word.len()).any(|found| found == word);
        ensure!(!has(b"hush-variable"), "{} has the environment", file.display());
        let mode = fs::metadata(file)?.mode() & 0o077;
        ensure!(mode == 0, "{} can be used by others", file.display());
    }
    let domain_file = place.manifests().join("domain.json");
    let good = content(&domain_file)?;
    let snapshot_file = fs::read_dir(place.manifests())?
        .flatten()
        .map(|entry| entry.path())
        .find(|path| path.extension().is_some_and(|extension| extension == "json") && *path != domain_file);
    let snapshot_file = snapshot_file.context("a snapshot's manifest")?;
    let snapshot = content(&snapshot_file)?;
    let write = |domain: &Value| -> Result<()> {
        let _ = fs::remove_dir_all(place.path("state"));
        forge(&domain_file, domain)?;
        forge(&snapshot_file, &snapshot)
    };
    let ran = place.path("ran");
    let command = json!(["/bin/sh", "-c", format!("echo > {}; exit 1", ran.display())]);
    for number in 0..2 {
        let mut domain = good.clone();
        match number {
            0 => domain["control"]["start"] = command.clone(),
            _ => {
                let process = &mut domain["machines"][0]["record"]["process"];
                process["program"] = json!("/bin/sh");
                process["command_line"] = command.clone();
                process["uid"] = json!(0);
            }
        }
        write(&domain)?;
        place.on_image("revert", &["good"])?;
        ensure!(!ran.exists(), "{number}: a manifest's command was run");
        write(&domain)?;
        let path = place.image().display().to_string();
        place.run(&["domain", "add", "mine", "--qmp", &socket, "--disk", &format!("vda={path}")])?;
        place.run(&["revert", "mine", "good"])?;
        ensure!(!ran.exists(), "{number}: a manifest's command was run for a domain that root registered");
        // Confirmed, it is.
        write(&domain)?;
        place.done("import", &["--trust"])?;
        let outcome = place.run(&["revert", "web", "good"])?;
        ensure!(ran.exists(), "{number}: a confirmed command was not run: {outcome}");
        fs::remove_file(&ran)?;
    }
    Ok(())
}

/// Who may use the configured path stays so, whatever becomes its file.
#[test]
fn attributes_of_the_path_survive_every_operation() -> Result<()> {
    let mut list = 2u32.to_le_bytes().to_vec();
    for (kind, rights, id) in
        [(1u16, 6u16, u32::MAX), (2, 6, 64055), (4, 0, u32::MAX), (16, 6, u32::MAX), (32, 0, u32::MAX)]
    {
        list.extend(kind.to_le_bytes());
        list.extend(rights.to_le_bytes());
        list.extend(id.to_le_bytes());
    }
    for (format, kind) in [("qcow2", "external"), ("qcow2", "internal"), ("raw", "copy")] {
        let Some(place) = Place::new()? else { return Ok(()) };
        let image = place.path(&format!("tenant/d.{format}"));
        let make = ["create", "-q", "-f", format].map(std::ffi::OsStr::new);
        qemu::img(&[&make[..], &[image.as_os_str(), "4M".as_ref()]].concat())?;
        chown(&image, Some(TENANT), Some(100))?;
        fs::set_permissions(&image, fs::Permissions::from_mode(0o600))?;
        let set = |name: &str, value: &[u8]| rustix::fs::setxattr(&image, name, value, XattrFlags::empty());
        if set("system.posix_acl_access", &list).is_err() || set("user.note", b"kept").is_err() {
            eprintln!("left out: this file system has no access lists");
            return Ok(());
        }
        let state = || -> Result<_> {
            let get = |name: &str| {
                let mut value = vec![0; 256];
                let read = rustix::fs::getxattr(&image, name, &mut value[..]);
                value.truncate(*read.as_ref().unwrap_or(&0));
                (read.is_ok(), value)
            };
            let about = fs::metadata(&image)?;
            let attributes = (get("system.posix_acl_access"), get("user.note"));
            Ok((about.uid(), about.gid(), about.mode(), attributes))
        };
        let before = state()?;
        let disk = format!("vda={},format={format}", image.display());
        place.run(&["domain", "add", "d", "--disk", &disk])?.expect_status(status::DONE)?;
        let choice = format!("vda={kind}");
        for args in [
            &["create", "d", "s1", "--disk", &choice][..],
            &["create", "d", "s2", "--disk", &choice],
            &["revert", "d", "s1"],
            &["delete", "d", "s1"],
            &["revert", "d", "s2"],
            &["delete", "d", "s2"],
        ] {
            let outcome = place.run(args)?.expect_status(status::DONE)?;
            ensure!(state()? == before, "{format} {kind}: {:?} became {:?} by {outcome}", before, state()?);
        }
    }
    Ok(())
}

/// A frozen layer that has a name elsewhere is not written: what depends on that name reads the same.
#[test]
fn linked_layer_is_not_written() -> Result<()> {
    for doomed in [&["s1"][..], &["s2"], &["s1", "s2"], &["s2", "s1"], &["s1", "s2", "s3"]] {
        let Some(place) = Place::new()? else { return Ok(()) };
        for (name, byte) in [("s1", 2), ("s2", 3), ("s3", 4)] {
            place.done("create", &[name, "--external"])?;
            qemu::write(&place.image(), &[Write { offset: 4096, length: 8192, byte: Some(byte) }])?;
        }
        let kept = place.path("kept");
        fs::create_dir(&kept)?;
        let mut overlays = Vec::new();
        for layer in place.layers()? {
            let name = layer.file_name().context("a name")?.to_owned();
            fs::hard_link(&layer, kept.join(&name))?;
        }
        // What the layers depend on, by the same relative names.
        let mut links: Vec<_> = fs::read_dir(&kept)?.flatten().map(|entry| entry.path()).collect();
        links.sort();
        for link in links {
            let overlay = link.with_extension("overlay");
            let make = ["create", "-q", "-f", "qcow2", "-F", "qcow2", "-b"].map(std::ffi::OsStr::new);
            qemu::img(&[&make[..], &[link.as_os_str(), overlay.as_os_str()]].concat())?;
            overlays.push((qemu::read(&overlay, None)?, overlay));
        }
        ensure!(overlays.len() == 3, "{overlays:?}");
        let present = qemu::read(&place.image(), None)?;
        for name in doomed {
            place.on_image("delete", &[name])?;
        }
        place.run(&["recover"])?;
        for (before, overlay) in &overlays {
            ensure!(
                qemu::read(overlay, None)? == *before,
                "{doomed:?}: {} shows something else",
                overlay.display()
            );
        }
        ensure!(qemu::read(&place.image(), None)? == present, "{doomed:?}: the disk shows something else");
    }
    Ok(())
}

/// Where others can replace names, nothing is begun; ordinary set-ups are worked on.
#[test]
fn directories_that_others_write_are_refused() -> Result<()> {
    // Owner, group and mode of the directory, then of the image; whether a snapshot is taken.
    let cases = [
        ((TENANT, TENANT, 0o755), (TENANT, TENANT, 0o644), true),
        ((TENANT, TENANT, 0o775), (TENANT, TENANT, 0o600), true),
        ((0, 0, 0o711), (64_055, 64_055, 0o600), true),
        ((0, 0, 0o755), (0, 0, 0o600), true),
        ((0, 64_055, 0o770), (0, 64_055, 0o660), true),
        ((0, 0, 0o1777), (0, 0, 0o600), true),
        ((0, 0, 0o777), (0, 0, 0o600), false),
        ((0, 64_055, 0o775), (0, 0, 0o600), false),
        ((TENANT, TENANT, 0o755), (0, 0, 0o600), false),
        ((TENANT, TENANT, 0o1777), (0, 0, 0o600), false),
    ];
    for (directory, image, works) in cases {
        let Some(place) = Place::new()? else { return Ok(()) };
        for (path, (uid, gid, mode)) in [(place.path("tenant"), directory), (place.image(), image)] {
            chown(&path, Some(uid), Some(gid))?;
            fs::set_permissions(&path, fs::Permissions::from_mode(mode))?;
        }
        let outcome = place.on_image("create", &["s1", "--external"])?;
        let wanted = if works { status::DONE } else { status::REFUSED };
        ensure!(outcome.status == Some(wanted), "{directory:?} {image:?}: {outcome}");
        ensure!(works || outcome.stderr.contains("can be written by"), "{outcome}");
    }
    Ok(())
}

/// A plug-in gets the variables that it needs, and none of the tokens that its user has.
#[test]
fn a_plug_in_gets_no_environment_of_others() -> Result<()> {
    let dir = tempfile::tempdir()?;
    fs::set_permissions(dir.path(), fs::Permissions::from_mode(0o700))?;
    let (program, seen) = (dir.path().join("domsnap-backend-spy"), dir.path().join("seen"));
    fs::write(&program, format!("#!/bin/sh\nenv > {}\n", seen.display()))?;
    fs::set_permissions(&program, fs::Permissions::from_mode(0o755))?;
    Domsnap::new(&dir.path().join("state"))
        .env("DOMSNAP_BACKEND_DIR", dir.path())
        .env("CLOUD_TOKEN", "hush")
        .env("LD_BIND_NOW", "hush")
        .env("DOMSNAP_PLUGIN_OTHER_KEY", "hush")
        .env("DOMSNAP_PLUGIN_SPY_KEY", "spoken")
        .run(&["backends"])?;
    let seen = fs::read_to_string(&seen).context("the plug-in was not started")?;
    ensure!(!seen.contains("hush") && !seen.contains("DOMSNAP_BACKEND_DIR"), "{seen}");
    ensure!(seen.contains("DOMSNAP_PLUGIN_SPY_KEY=spoken") && seen.contains("\nPATH="), "{seen}");
    Ok(())
}

/// An access list that names a user or a group with these rights, below a mask.
fn naming(kind: u16, id: u32, rights: u16, mask: u16) -> Vec<u8> {
    let mut list = 2u32.to_le_bytes().to_vec();
    let none = u32::MAX;
    for (kind, rights, id) in
        [(1u16, 7u16, none), (4, 5, none), (kind, rights, id), (0x10, mask, none), (0x20, 5, none)]
    {
        list.extend(kind.to_le_bytes());
        list.extend(rights.to_le_bytes());
        list.extend(id.to_le_bytes());
    }
    // Users come before the owner's group.
    if kind == 2 {
        let (a, b) = (4 + 8, 4 + 16);
        let own = list[a..b].to_vec();
        list.copy_within(b..b + 8, a);
        list[b..b + 8].copy_from_slice(&own);
    }
    list
}

/// Access lists of directories count as their modes do: of images, of the state directory, and of plug-ins.
#[test]
fn access_lists_of_directories_count() -> Result<()> {
    const STRANGER: u32 = 5001;
    // Kind, number, rights and mask of an entry; whether a snapshot is taken.
    let cases = [
        (2, STRANGER, 7, 7, false),
        (8, STRANGER, 7, 7, false),
        (2, STRANGER, 7, 5, true),
        (2, STRANGER, 5, 7, true),
        (2, TENANT, 7, 7, true),
        (2, 0, 7, 7, true),
    ];
    for (kind, id, rights, mask, works) in cases {
        let Some(place) = Place::new()? else { return Ok(()) };
        let list = naming(kind, id, rights, mask);
        let give =
            |path: &Path| rustix::fs::setxattr(path, "system.posix_acl_access", &list, XattrFlags::empty());
        if let Err(errno) = give(&place.path("tenant")) {
            ensure!(errno == rustix::io::Errno::OPNOTSUPP, "the list is wrong: {errno}");
            eprintln!("left out: this file system has no access lists");
            return Ok(());
        }
        let outcome = place.on_image("create", &["s1", "--external"])?;
        let wanted = if works { status::DONE } else { status::REFUSED };
        ensure!(outcome.status == Some(wanted), "{kind} {id} {rights} {mask}: {outcome}");
        ensure!(works || outcome.stderr.contains("setfacl -x"), "{outcome}");
        if works || kind != 2 {
            continue;
        }
        give(&place.path("state"))?;
        let other = place.path("other/victim.qcow2").display().to_string();
        let outcome = place.run(&["create", &other, "s1"])?.expect_status(status::REFUSED)?;
        ensure!(outcome.stderr.contains("state directory"), "{outcome}");
        let plugins = place.path("plugins");
        fs::create_dir(&plugins)?;
        let (program, ran) = (plugins.join("domsnap-backend-spy"), place.path("ran"));
        fs::write(&program, format!("#!/bin/sh\n: > {}\n", ran.display()))?;
        fs::set_permissions(&program, fs::Permissions::from_mode(0o755))?;
        for refused in [&program, &plugins] {
            give(refused)?;
            let state = place.path("fresh");
            let outcome = Domsnap::new(&state).env("DOMSNAP_BACKEND_DIR", &plugins).run(&["backends"])?;
            ensure!(!ran.exists(), "{outcome}");
            ensure!(format!("{}{}", outcome.stdout, outcome.stderr).contains("setfacl -x"), "{outcome}");
            rustix::fs::removexattr(refused, "system.posix_acl_access")?;
        }
    }
    Ok(())
}

/// What a directory gives to new files gives no access to an overlay or a copy that the image does not give.
#[test]
fn default_acls_of_directories_grant_no_access() -> Result<()> {
    for (format, kind) in [("qcow2", "external"), ("raw", "copy")] {
        let Some(place) = Place::new()? else { return Ok(()) };
        let image = place.path(&format!("tenant/d.{format}"));
        let make = ["create", "-q", "-f", format].map(std::ffi::OsStr::new);
        qemu::img(&[&make[..], &[image.as_os_str(), "4M".as_ref()]].concat())?;
        chown(&image, Some(TENANT), Some(TENANT))?;
        fs::set_permissions(&image, fs::Permissions::from_mode(0o660))?;
        let list = naming(2, 5001, 7, 7);
        let directory = place.path("tenant");
        if rustix::fs::setxattr(&directory, "system.posix_acl_default", &list, XattrFlags::empty()).is_err() {
            eprintln!("left out: this file system has no access lists");
            return Ok(());
        }
        let disk = format!("vda={},format={format}", image.display());
        place.run(&["domain", "add", "d", "--disk", &disk])?.expect_status(status::DONE)?;
        let choice = format!("vda={kind}");
        for args in [&["create", "d", "s1", "--disk", &choice][..], &["revert", "d", "s1"]] {
            place.run(args)?.expect_status(status::DONE)?;
            for entry in fs::read_dir(&directory)? {
                let path = entry?.path();
                if path.file_name().is_some_and(|name| name.to_string_lossy().starts_with("d."))
                    && path.is_file()
                {
                    let mut value = [0; 256];
                    let read = rustix::fs::getxattr(&path, "system.posix_acl_access", &mut value[..]);
                    let closed =
                        read == Err(rustix::io::Errno::NODATA) || fs::metadata(&path)?.mode() & 0o070 == 0;
                    ensure!(closed, "{kind}: {} lets user 5001 in", path.display());
                }
            }
        }
    }
    Ok(())
}

/// The catalogue is believed, so it must lie where no other user can put another.
#[test]
fn a_state_directory_that_others_own_is_refused() -> Result<()> {
    for (directory, owner, mode) in
        [("state", TENANT, 0o700), ("state", 0, 0o1777), ("tenant", TENANT, 0o755), ("tenant", 0, 0o777)]
    {
        let Some(place) = Place::new()? else { return Ok(()) };
        chown(place.path(directory), Some(owner), Some(0))?;
        fs::set_permissions(place.path(directory), fs::Permissions::from_mode(mode))?;
        let state = match directory {
            "state" => place.path("state"),
            _ => place.path("tenant/state"),
        };
        let path = place.path("other/victim.qcow2").display().to_string();
        let outcome = Domsnap::new(&state).run(&["create", &path, "s1"])?;
        let outcome = outcome.expect_status(status::REFUSED)?;
        ensure!(outcome.stderr.contains("state directory"), "{outcome}");
    }
    Ok(())
}

/// A tenant who swaps names as fast as he can gets nothing of other users'.
#[test]
fn swapping_names_in_a_race_wins_nothing() -> Result<()> {
    let Some(place) = Place::new()? else { return Ok(()) };
    let others = place.others()?;
    let (tenant, victim) = (place.path("tenant"), place.path("other/passwd"));
    let stop = AtomicBool::new(false);
    std::thread::scope(|scope| -> Result<()> {
        scope.spawn(|| {
            while !stop.load(Ordering::Relaxed) {
                for entry in fs::read_dir(&tenant).into_iter().flatten().flatten() {
                    let name = entry.file_name().to_string_lossy().into_owned();
                    if name.ends_with(".domsnap-new") || name.ends_with(".domsnap-switch") {
                        let link = tenant.join("swap");
                        if symlink(&victim, &link).is_ok() {
                            let _ = fs::rename(&link, entry.path());
                        }
                    }
                }
            }
        });
        let work = || -> Result<()> {
            for number in 0..12 {
                let name = format!("s{number}");
                let outcome = place.on_image("create", &[&name, "--external"])?;
                ensure!(place.others()? == others, "{outcome}");
                let outcome = place.run(&["recover"])?;
                ensure!(place.others()? == others, "{outcome}");
            }
            Ok(())
        };
        let worked = work();
        stop.store(true, Ordering::Relaxed);
        worked
    })?;
    // With no process at it any more the domain is whole.
    for entry in fs::read_dir(&tenant)?.flatten() {
        if entry.path().symlink_metadata()?.is_symlink() {
            fs::remove_file(entry.path())?;
        }
    }
    if !place.image().exists() {
        // A link of his was renamed to the image's name before it was looked at. The image has another name,
        // and the refusal says how it gets its own back.
        let refused = place.run(&["recover"])?.expect_status(status::REFUSED)?;
        let advice = refused.stderr.split_once("(`ln ").and_then(|(_, rest)| rest.split_once("`)"));
        let (names, _) = advice.with_context(|| format!("no advice: {refused}"))?;
        let (layer, image) = names.split_once(' ').context("two names")?;
        fs::hard_link(layer, image)?;
    }
    place.run(&["recover"])?.expect_status(status::DONE)?;
    qemu::check(&place.image())
}
