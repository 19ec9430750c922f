//! The command line on a running domain as its users meet it: what it prints for people and for programs, and
//! its refusals. What the operations do to the guest is for `live.rs`.

use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixStream;
use std::path::Path;

use anyhow::{Context, Result, ensure};
use domsnap_tests::domsnap::{Domsnap, status};
use domsnap_tests::live::{Live, NAME};
use serde_json::Value;
use testguest::GuestOptions;

/// A guest of which domsnap knows nothing.
fn stranger() -> Result<Live> {
    Live::unregistered(GuestOptions::new())
}

fn says(text: &str, all: &[&str]) -> Result<()> {
    for part in all {
        ensure!(text.contains(part), "{part:?} is not said:\n{text}");
    }
    Ok(())
}

/// What a command prints for people.
fn reported(domsnap: &Domsnap, args: &[&str], all: &[&str]) -> Result<String> {
    let text = domsnap.done(args)?.stdout;
    says(&text, all)?;
    Ok(text)
}

/// What a command prints for programs.
fn document(domsnap: &Domsnap, args: &[&str]) -> Result<Value> {
    let document: Value = domsnap.done(&[args, &["--json"]].concat())?.json()?;
    ensure!(document["schema"] == 1, "{document}");
    Ok(document)
}

/// A refusal, for people and for programs.
fn refused(domsnap: &Domsnap, args: &[&str], all: &[&str]) -> Result<()> {
    let outcome = domsnap.run(args)?.expect_status(status::REFUSED)?;
    says(&outcome.stderr, all)?;
    let outcome = domsnap.run(&[args, &["--json"]].concat())?.expect_status(status::REFUSED)?;
    let error = &outcome.json::<Value>()?["error"];
    ensure!(error["exit"] == status::REFUSED && error["message"].is_string(), "{outcome}");
    Ok(())
}

fn text(path: &Path) -> Result<&str> {
    path.to_str().context("a path that is no text")
}

/// A running domain is registered by its socket alone and shown as what it is.
#[test]
fn socket_alone_registers_a_domain() -> Result<()> {
    let mut live = stranger()?;
    let (domsnap, socket) = (live.domsnap(), text(live.guest.qmp_socket())?.to_owned());
    reported(
        &domsnap,
        &["domain", "add", NAME, "--qmp", &socket],
        &["registered live: 2 disks", text(&live.guest.disk(0))?, text(&live.guest.disk(1))?],
    )?;
    let place = format!("qemu:{socket}");
    reported(&domsnap, &["domain", "list"], &["NOW", "running", &place])?;
    let agent = text(live.guest.agent_socket())?;
    reported(
        &domsnap,
        &["domain", "show", NAME],
        &["hypervisor   qemu at ", "now          running", "machine      QEMU ", "agent        ", agent],
    )?;
    let shown = document(&domsnap, &["domain", "show", NAME])?;
    ensure!(shown["power"] == "running" && shown["problem"].is_null(), "{shown}");
    ensure!(shown["machine"].as_str().is_some_and(|machine| machine.contains("128 MiB")), "{shown}");
    ensure!(shown["domain"]["control"]["address"] == socket.as_str(), "{shown}");

    live.guest.qmp("stop", Value::Null)?;
    ensure!(document(&domsnap, &["domain", "list"])?["domains"][0]["power"] == "paused");
    live.guest.qmp("cont", Value::Null)?;
    live.guest.quit()?;
    ensure!(document(&domsnap, &["domain", "list"])?["domains"][0]["power"] == "off");
    let shown = document(&domsnap, &["domain", "show", NAME])?;
    ensure!(shown["power"] == "off" && shown["machine"].is_null(), "{shown}");
    Ok(())
}

/// A create reports how long the guest was paused, by which method, and its state now.
#[test]
fn create_reports_pause_and_method() -> Result<()> {
    let mut live = Live::new()?;
    let domsnap = live.domsnap();
    let create = |args: &[&str], all: &[&str]| reported(&domsnap, &[&["create", NAME], args].concat(), all);
    create(
        &["ext", "--external"],
        &["created snapshot ext of live: vda external, vdb external, memory ", "iB; guest paused for "],
    )?;
    create(&["disks", "--disk-only", "--internal"], &["vda internal, vdb internal; guest paused for "])?;
    create(&["quiet", "--disk-only", "--quiesce"], &["; guest paused for "])?;
    let made = document(&domsnap, &["create", NAME, "json"])?;
    ensure!(made["power"] == "running" && made["outcome"]["downtime_us"].is_u64(), "{made}");
    ensure!(made["outcome"]["method"].is_string() && made["snapshot"]["memory"]["bytes"].is_u64(), "{made}");
    live.sound()?;
    create(&["still", "--then", "pause"], &["; guest is paused"])?;
    ensure!(document(&domsnap, &["create", NAME, "again", "--then=keep"])?["power"] == "paused");
    create(&["end", "--then", "off"], &["domain was ended and is off"])?;
    live.guest.wait_end()?;

    let list = reported(&domsnap, &["list", NAME], &["ext+mem", "memory", "filesystem", "crash"])?;
    ensure!(list.lines().count() == 8, "{list}");
    reported(&domsnap, &["list", NAME, "--tree"], &["ext+mem", "int+mem"])?;
    let images = reported(&domsnap, &["list", NAME, "--disks"], &["\nmemory\n", ".memory"])?;
    ensure!(images.matches(".memory").count() == 5, "{images}");
    let shown = document(&domsnap, &["show", NAME, "ext"])?;
    let file = shown["snapshot"]["memory"]["file"].as_str().context("no memory image")?.to_owned();
    let mode = std::fs::metadata(&file)?.permissions().mode() & 0o777;
    ensure!(mode == 0o600, "others may read the memory image: {mode:o}");
    reported(
        &domsnap,
        &["show", NAME, "ext"],
        &["of a guest that was running: ", &file, "consistency  memory: ", "machine      QEMU "],
    )?;
    std::fs::remove_file(&file)?;
    reported(&domsnap, &["show", NAME, "ext"], &["the file is gone"])?;
    Ok(())
}

/// A compressed memory image is reported with both its sizes and reverted to on and off.
#[test]
fn compressed_memory_shows_sizes_and_reverts() -> Result<()> {
    let mut live = Live::new()?;
    live.create("small", &["--compress=3"])?;
    let domsnap = live.domsnap();
    reported(&domsnap, &["show", NAME, "small"], &[" unpacked), of a guest that was running: "])?;
    reported(&domsnap, &["list", NAME, "--disks"], &[" unpacked)"])?;
    let memory = document(&domsnap, &["show", NAME, "small"])?["snapshot"]["memory"].clone();
    let sizes = memory["bytes"].as_u64().zip(memory["full"].as_u64());
    let (bytes, full) = sizes.with_context(|| format!("no sizes: {memory}"))?;
    ensure!(bytes < full / 2, "{memory}");
    ensure!(std::fs::metadata(memory["file"].as_str().context("no file")?)?.len() == bytes, "{memory}");
    live.revert("small", &[])?;
    reported(&domsnap, &["revert", NAME, "small", "--off"], &["domain was ended and is off"])?;
    reported(
        &domsnap,
        &["revert", NAME, "small"],
        &["; domain was started from the snapshot's memory (process "],
    )?;
    live.delete(&["small"], &[])?;
    live.sound()
}

#[test]
fn revert_reports_the_power_state() -> Result<()> {
    let mut live = Live::new()?;
    live.create("one", &[])?;
    let domsnap = live.domsnap();
    let revert =
        |args: &[&str], all: &[&str]| reported(&domsnap, &[&["revert", NAME, "one"], args].concat(), all);
    revert(&[], &["reverted live to one; memory restored, guest resumed (downtime "])?;
    let back = document(&domsnap, &["revert", NAME, "one"])?;
    ensure!(back["power"] == "running" && back["outcome"]["downtime_us"].is_u64(), "{back}");
    revert(&["--save-current=was"], &["; previous state saved as was; memory restored, guest resumed"])?;
    revert(&["--paused"], &["; memory restored, guest is paused"])?;
    ensure!(document(&domsnap, &["revert", NAME, "one", "--paused"])?["power"] == "paused");
    revert(&["--running"], &["; memory restored, guest resumed"])?;
    revert(&["--off"], &["; domain was ended and is off"])?;
    revert(&["--running"], &["; domain was started from the snapshot's memory (process ", "started by: "])?;
    reported(
        &domsnap,
        &["delete", NAME, "one", "was", "--limit", "64M"],
        &["deleted 2 snapshots of live: one, was"],
    )?;
    live.sound()
}

/// The commands that the design paper gave to `xl`: memory and all disks by a file, the table, the revert.
#[test]
fn commands_of_xl_save_and_restore_memory() -> Result<()> {
    let mut live = Live::new()?;
    let (domsnap, file) = (live.domsnap(), live.guest.dir().join("xl.cfg"));
    std::fs::write(&file, "name='paper' ; memory='yes'\ndisk=['vdev=hda,target=null',\n 'vdev=hdb']\n")?;
    let before = live.guest.last_tick().unwrap_or_default();
    live.run(&["xl", "snapshot-create", text(&file)?, NAME])?;
    let after = live.guest.last_tick().unwrap_or_default();
    std::fs::remove_file(file)?;
    live.remember("paper", (before, after))?;
    reported(&domsnap, &["xl", "snapshot-list", NAME], &["paper  ", " r----        No\n"])?;
    live.revert("paper", &[])?;
    reported(&domsnap, &["xl", "snapshot-revert", "-p", "-n", "paper", NAME], &["guest is paused"])?;
    ensure!(document(&domsnap, &["domain", "show", NAME])?["power"] == "paused");
    live.guest.qmp("cont", Value::Null)?;
    live.sound()?;
    live.forget("paper");
    live.run(&["xl", "snapshot-delete", "-n", "paper", NAME])?;
    live.names_true()
}

/// A dry run on a running domain prints its steps and does none.
#[test]
fn dry_run_lists_steps_and_does_none() -> Result<()> {
    let mut live = Live::new()?;
    live.create("one", &["--external"])?;
    let domsnap = live.domsnap();
    let before = domsnap.done(&["list", NAME, "--disks", "--json"])?.json::<Value>()?["snapshots"].clone();
    let steps: [(&[&str], &str); 3] = [
        (&["create", NAME, "two", "--external"], "domain  snapshot all disks and memory atomically"),
        (&["revert", NAME, "one"], "domain  pause the guest and detach vda, vdb"),
        (&["delete", NAME, "one"], "domain  remove the memory image "),
    ];
    for (args, step) in steps {
        let args = [args, &["--dry-run"]].concat();
        reported(&domsnap, &args, &[step, "no changes made"])?;
        let plan = document(&domsnap, &args)?;
        let has_steps = |part: &str| plan["plan"][part].as_array().is_some_and(|steps| !steps.is_empty());
        ensure!(has_steps("cut") || has_steps("finish"), "{plan}");
        live.sound()?;
    }
    let after = domsnap.done(&["list", NAME, "--disks", "--json"])?.json::<Value>()?["snapshots"].clone();
    ensure!(before == after, "a dry run changed {before} to {after}");
    live.verify()
}

/// What runs at a socket has snapshots with nothing registered and keeps them when it is.
#[test]
fn unregistered_snapshots_stay_when_registered() -> Result<()> {
    let live = stranger()?;
    let domsnap = live.domsnap();
    let place = format!("qemu:{}", text(live.guest.qmp_socket())?);
    ensure!(document(&domsnap, &["list", &place])?["snapshots"].as_array().is_some_and(Vec::is_empty));
    reported(&domsnap, &["create", &place, "one", "--external"], &["created snapshot one of ", "memory "])?;
    reported(&domsnap, &["revert", &place, "one"], &["; memory restored, guest resumed"])?;
    live.sound()?;
    // By its configured paths, although QEMU has layers open by their own names.
    let disk = live.guest.disk(0);
    reported(
        &domsnap,
        &["domain", "add", NAME, "--qmp", text(live.guest.qmp_socket())?],
        &[
            "registered live: 2 disks",
            &format!("vda  {} (", disk.display()),
            "1 snapshot from manifests: one",
        ],
    )?;
    reported(&domsnap, &["create", &place, "two"], &["created snapshot two of live: "])?;
    reported(&domsnap, &["delete", NAME, "one", "two"], &["deleted 2 snapshots of live"])?;
    live.sound()
}

/// A scan gives the command that registers what runs and knows it afterwards.
#[test]
fn scan_prints_the_command_that_registers() -> Result<()> {
    let options = GuestOptions::new().file("cd.iso", vec![0; 1 << 20]);
    let cd = ["-drive", "file=DIR/cd.iso,format=raw,if=none,id=cd0,readonly=on,media=cdrom"];
    let live = Live::unregistered(options.more(&cd).more(&["-device", "ide-cd,drive=cd0,id=cd"]))?;
    let (domsnap, socket) = (live.domsnap(), text(live.guest.qmp_socket())?.to_owned());
    // Other machines may run beside this one.
    let mine = || -> Result<Value> {
        let scan = document(&domsnap, &["domain", "scan"])?;
        let found = scan["found"].as_array().context("no list")?.iter();
        let mut mine = found.filter(|found| found["control"]["address"] == socket.as_str());
        mine.next().cloned().with_context(|| format!("{socket} was not found: {scan}"))
    };
    let found = mine()?;
    ensure!(
        found["registered"].is_null() && found["running"] == true && found["problem"].is_null(),
        "{found}"
    );
    let disks = found["disks"].as_array().context("no disks")?;
    let left_out: Vec<&Value> = disks.iter().filter(|disk| !disk["left_out"].is_null()).collect();
    ensure!(disks.len() == 3 && left_out.len() == 1 && left_out[0]["target"] == "cd", "{found}");
    let args: Vec<&str> =
        found["register"].as_array().context("no command")?.iter().filter_map(Value::as_str).collect();
    ensure!(args.first() == Some(&"domsnap"), "{args:?}");
    let added = domsnap.done(&args[1..])?;
    says(&added.stdout, &[": 2 disks", "note: cd (", "is left out: "])?;
    let found = mine()?;
    ensure!(
        found["registered"] == args[3] && found["register"].as_array().is_some_and(Vec::is_empty),
        "{found}"
    );
    reported(
        &domsnap,
        &["domain", "scan"],
        &[&format!("at qemu:{socket}\n"), &format!("registered as {}\n", args[3])],
    )?;
    live.sound()
}

/// What cannot be is refused with a message and the guest does not notice.
#[test]
fn impossible_requests_leave_the_guest_alone() -> Result<()> {
    let live = Live::new()?;
    let domsnap = live.domsnap();
    let unserved = live.guest.dir().join("unserved");
    let unserved = text(&unserved)?;
    refused(
        &domsnap,
        &["domain", "add", "x", "--qmp", unserved],
        &["no QEMU is listening on", unserved, "-qmp unix:"],
    )?;
    refused(
        &domsnap,
        &["create", &format!("qemu:{unserved}"), "x"],
        &["no QEMU is listening on", "no changes made"],
    )?;
    let socket = text(live.guest.qmp_socket())?;
    refused(
        &domsnap,
        &["domain", "add", "x", "--qmp", socket],
        &["belong to domain live already", "domain remove live"],
    )?;
    refused(&domsnap, &["revert", NAME, "x"], &["there is no snapshot x", "no changes made"])?;
    live.sound()?;

    // Another program at the socket: QEMU serves one at a time.
    let other = UnixStream::connect(live.guest.qmp_socket())?;
    refused(&domsnap, &["create", NAME, "x"], &["connecting to domain live", socket, "no changes made"])?;
    let list = domsnap.done(&["domain", "list", "--json"])?.json::<Value>()?;
    ensure!(list["domains"][0]["power"].is_null(), "{list}");
    reported(&domsnap, &["domain", "show", NAME], &["now          not known: "])?;
    drop(other);
    reported(&domsnap, &["create", NAME, "x"], &["created snapshot x of live"])?;
    live.sound()
}
