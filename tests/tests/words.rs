//! What commands say that they did is what happened; options that do not apply are refused; monitors and
//! images as people have them are used. On idle QEMUs without a guest system, and on images at rest.

use std::net::TcpListener;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use domsnap_tests::domsnap::{Domsnap, binary, status};
use domsnap_tests::qemu;
use serde_json::Value;

/// How long a QEMU may take to listen. A busy machine is no failure.
const PATIENCE: Duration = Duration::from_secs(120);

/// A directory with images, a state directory, and the QEMUs that run on them.
struct Place {
    directory: tempfile::TempDir,
    domsnap: Domsnap,
    machines: Vec<Child>,
}

impl Place {
    fn new() -> Result<Self> {
        let directory = tempfile::tempdir()?;
        let domsnap = Domsnap::new(&directory.path().join("state"));
        Ok(Self { directory, domsnap, machines: Vec::new() })
    }

    fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    fn text(&self, name: &str) -> String {
        self.path(name).display().to_string()
    }

    fn image(&self, name: &str, format: &str) -> Result<String> {
        qemu::run("qemu-img", &["create", "-q", "-f", format, &self.text(name), "8M"])?;
        Ok(self.text(name))
    }

    /// Starts a QEMU without a guest on a qcow2 image, as the disk `vda`. `socket` is there when this
    /// returns.
    fn start(&mut self, image: &str, socket: &str, more: &[&str]) -> Result<u32> {
        let place = format!("driver=qcow2,node-name=d0,file.driver=file,file.filename={image}");
        let mut command = Command::new("qemu-system-x86_64");
        command
            .args(["-name", "idle", "-nodefaults", "-no-user-config", "-display", "none", "-M", "q35"])
            .args([
                "-accel",
                "tcg",
                "-m",
                "32",
                "-blockdev",
                &place,
                "-device",
                "virtio-blk-pci,drive=d0,id=vda",
            ])
            .args(more)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null());
        let machine = command.spawn().context("no qemu-system-x86_64 in PATH: run scripts/install-qemu")?;
        let pid = machine.id();
        self.machines.push(machine);
        let until = Instant::now() + PATIENCE;
        while !self.path(socket).exists() {
            ensure!(Instant::now() < until, "QEMU does not listen on {socket}");
            std::thread::sleep(Duration::from_millis(20));
        }
        Ok(pid)
    }

    /// A QEMU whose monitor is `m.qmp`; what it is named by.
    fn running(&mut self, image: &str) -> Result<String> {
        let socket = format!("unix:{},server=on,wait=off", self.text("m.qmp"));
        self.start(image, "m.qmp", &["-qmp", &socket])?;
        Ok(format!("qemu:{}", self.text("m.qmp")))
    }

    fn says(&self, args: &[&str], all: &[&str]) -> Result<String> {
        let text = self.domsnap.done(args)?.stdout;
        says(&text, all)?;
        Ok(text)
    }

    fn refuses(&self, args: &[&str], all: &[&str]) -> Result<String> {
        let text = self.domsnap.run(args)?.expect_status(status::REFUSED)?.stderr;
        says(&text, all)?;
        Ok(text)
    }

    fn json(&self, args: &[&str]) -> Result<Value> {
        self.domsnap.done(&[args, &["--json"]].concat())?.json()
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        for machine in &mut self.machines {
            let _ = machine.kill();
            let _ = machine.wait();
        }
    }
}

fn says(text: &str, all: &[&str]) -> Result<()> {
    for part in all {
        ensure!(text.contains(part), "{part:?} is not said:\n{text}");
    }
    Ok(())
}

/// Ends a process that a test's domsnap started.
fn end(pid: u64) -> Result<()> {
    ensure!(Command::new("kill").arg(pid.to_string()).status()?.success(), "process {pid} is not there");
    let until = Instant::now() + PATIENCE;
    while Path::new(&format!("/proc/{pid}/exe")).read_link().is_ok() {
        ensure!(Instant::now() < until, "process {pid} does not end");
        std::thread::sleep(Duration::from_millis(20));
    }
    Ok(())
}

/// What a revert did to the guest is said: in text, as JSON, and in a dry run.
#[test]
fn revert_says_what_became_of_the_guest() -> Result<()> {
    let mut place = Place::new()?;
    let image = place.image("a.qcow2", "qcow2")?;
    let at = place.running(&image)?;
    let at = at.as_str();
    place.says(&["create", at, "disks", "--disk-only"], &["created snapshot disks"])?;
    place.says(&["create", at, "all"], &["memory"])?;

    let dry = |args: &[&str]| place.json(&[args, &["--dry-run"]].concat());
    ensure!(dry(&["revert", at, "disks"])?["guest"] == "reset");
    place.says(&["revert", at, "disks", "--dry-run"], &["guest is reset", "no changes made"])?;
    place.says(&["revert", at, "disks"], &["guest was reset (downtime "])?;
    place.says(&["revert", at, "disks", "--paused"], &["guest was reset and is paused"])?;
    let reset = place.json(&["revert", at, "disks", "--running"])?;
    ensure!(reset["outcome"]["guest"] == "reset" && reset["power"] == "running", "{reset}");

    ensure!(dry(&["revert", at, "all"])?["guest"] == "restored");
    place.says(&["revert", at, "all"], &["memory restored, guest resumed (downtime "])?;
    place.says(&["revert", at, "all", "--paused"], &["memory restored, guest is paused"])?;

    // What saves the current state first is a part of the dry run, and of the answer.
    let both = dry(&["revert", at, "disks", "--save-current=before"])?;
    ensure!(both["first"]["operation"] == "create" && both["first"]["snapshots"][0] == "before", "{both}");
    ensure!(both["plan"]["operation"] == "revert" && both["guest"] == "reset", "{both}");
    let text = place.says(&["revert", at, "disks", "--save-current=before", "--dry-run"], &[])?;
    says(&text, &["would create before", "would revert disks"])?;
    ensure!(text.matches("no changes made").count() == 1, "{text}");
    place.says(
        &["revert", at, "disks", "--save-current=before"],
        &["previous state saved as before", "guest was reset"],
    )?;

    ensure!(dry(&["revert", at, "disks", "--off"])?["guest"] == "ended");
    place.says(&["revert", at, "disks", "--off"], &["domain was ended and is off"])?;
    place.says(&["revert", at, "disks"], &["reverted idle to disks; domain is off"])?;
    ensure!(dry(&["revert", at, "all"])?["guest"] == "started");
    let started = place.json(&["revert", at, "all"])?;
    let process = &started["outcome"]["started"];
    let pid = process["pid"].as_u64().context("the process is not reported")?;
    let ended = end(pid);
    ensure!(started["outcome"]["guest"] == "started" && started["power"] == "running", "{started}");
    ensure!(process["command"][0] == "qemu-system-x86_64", "{started}");
    ended?;
    let text =
        place.says(&["revert", at, "all"], &["domain was started from the snapshot's memory (process "])?;
    says(&text, &["started by: qemu-system-x86_64 -name idle "])?;
    let pid = text.split("(process ").nth(1).and_then(|rest| rest.split(')').next()).context("a process")?;
    end(pid.parse()?)
}

/// The command that is configured starts the domain, and not the one that was recorded.
#[test]
fn configured_start_is_preferred() -> Result<()> {
    let mut place = Place::new()?;
    let image = place.image("a.qcow2", "qcow2")?;
    place.running(&image)?;
    let socket = place.text("m.qmp");
    let drive = format!("driver=qcow2,node-name=d0,file.driver=file,file.filename={image}");
    let serve = format!("unix:{socket},server=on,wait=off");
    let start = [
        "qemu-system-x86_64",
        "-name",
        "a name",
        "-nodefaults",
        "-no-user-config",
        "-display",
        "none",
        "-M",
        "q35",
        "-accel",
        "tcg",
        "-m",
        "32",
        "-blockdev",
        &drive,
        "-device",
        "virtio-blk-pci,drive=d0,id=vda",
        "-qmp",
        &serve,
    ];
    place.says(
        &[&["domain", "add", "own", "--qmp", &socket, "--start"], &start[..]].concat(),
        &["registered own"],
    )?;
    place.says(&["create", "own", "s", "--then", "off"], &["created snapshot s"])?;
    let text = place.says(&["revert", "own", "s"], &["-name 'a name' -nodefaults"])?;
    let pid = text.split("(process ").nth(1).and_then(|rest| rest.split(')').next()).context("a process")?;
    end(pid.parse()?)
}

/// A monitor that prints prettily, and one on TCP: used; what TCP cannot do is refused before anything.
#[test]
fn pretty_and_tcp_monitors_are_used() -> Result<()> {
    let mut place = Place::new()?;
    let image = place.image("a.qcow2", "qcow2")?;
    // The port is free again when QEMU takes it.
    let port = TcpListener::bind("127.0.0.1:0")?.local_addr()?.port();
    let tcp = format!("tcp:127.0.0.1:{port}");
    let pretty = format!("socket,id=p,path={},server=on,wait=off", place.text("pretty.qmp"));
    let listen = format!("{tcp},server=on,wait=off");
    let more = ["-qmp", &listen, "-chardev", &pretty, "-mon", "chardev=p,mode=control,pretty=on"];
    place.start(&image, "pretty.qmp", &more)?;

    let at = format!("qemu:{}", place.text("pretty.qmp"));
    for args in [
        &["create", &at, "one"][..],
        &["create", &at, "two", "--external"],
        &["create", &at, "bare", "--disk-only"],
        &["revert", &at, "one"],
        &["revert", &at, "two"],
        &["revert", &at, "bare"],
        &["delete", &at, "bare"],
    ] {
        place.says(args, &[])?;
    }
    place.says(&["domain", "remove", "idle"], &["idle"])?;

    let at = format!("qemu:{tcp}");
    place.says(&["create", &at, "three"], &["memory"])?;
    place.says(&["create", &at, "four", "--disk-only", "--external"], &["vda external"])?;
    for args in [&["revert", &at, "four"][..], &["revert", &at, "three"], &["revert", &at, "three", "--off"]]
    {
        place.refuses(args, &["TCP", "-qmp unix:"])?;
    }
    place.says(&["domain", "list"], &["running", &tcp])?;
    let chain = place.json(&["list", &at])?;
    ensure!(chain["snapshots"].as_array().is_some_and(|all| all.len() == 4), "{chain}");
    // A guest of which no step was done still runs, on disks that are all there.
    place.says(&["delete", &at, "four"], &["deleted snapshot four"])?;

    for address in ["qemu:tcp:192.0.2.1:4444", "qemu:tcp:0.0.0.0:4444", "qemu:tcp:example.org:4444"] {
        let text = place.domsnap.run(&["create", address, "x"])?.expect_status(status::USAGE)?.stderr;
        says(&text, &["TCP", "unix:"])?;
    }
    let unserved = TcpListener::bind("127.0.0.1:0")?.local_addr()?.port();
    place.refuses(
        &["create", &format!("qemu:tcp:localhost:{unserved}"), "x"],
        &["no QEMU is listening on tcp:127.0.0.1"],
    )?;
    Ok(())
}

/// Images as people name them: by links, with their format, with commas, and those that are not there.
#[test]
fn images_are_named_as_people_do() -> Result<()> {
    let mut place = Place::new()?;
    std::fs::create_dir(place.path("real"))?;
    let image = place.image("real/a.qcow2", "qcow2")?;
    let link = place.text("a.qcow2");
    symlink(&image, &link)?;
    let real = std::fs::canonicalize(&image)?.display().to_string();
    place.says(&["create", &link, "s"], &["created snapshot s", "is a symbolic link", &real])?;
    place.says(&["domain", "add", "d", "--disk", &format!("vda={link}")], &[&real, "is a symbolic link"])?;
    place.says(&["list", &link], &["s "])?;
    place.says(&["disk", "list", &link], &["s "])?;
    ensure!(std::fs::symlink_metadata(&link)?.is_symlink());
    let shown = place.json(&["domain", "show", "d"])?;
    ensure!(shown["domain"]["disks"][0]["path"] == real.as_str(), "{shown}");
    place.says(&["domain", "remove", "d"], &[])?;
    let at = place.running(&link)?;
    place.says(&["create", &at, "live"], &["is a symbolic link", &real])?;
    place.says(&["create", &at, "over", "--external"], &["external"])?;
    place.says(&["revert", &at, "live"], &["memory restored"])?;
    ensure!(std::fs::symlink_metadata(&link)?.is_symlink());

    symlink("nowhere", place.path("dangling.qcow2"))?;
    for gone in [place.text("gone.qcow2"), place.text("no/gone.qcow2"), place.text("dangling.qcow2")] {
        for command in [
            &["create", &gone, "x"][..],
            &["list", &gone],
            &["disk", "create", &gone],
            &["disk", "list", &gone],
        ] {
            place.refuses(command, &["no such file", &gone])?;
        }
        place.refuses(&["domain", "add", "g", "--disk", &format!("vda={gone}")], &["no such file", "vda"])?;
    }

    let raw = place.image("r.raw", "raw")?;
    let as_raw = format!("{raw},format=raw");
    place.refuses(&["create", &raw, "x"], &["format=raw"])?;
    place.refuses(&["create", &raw, "x", "--dry-run"], &["format=raw"])?;
    let both = format!("{},{as_raw}", place.image("b,c.qcow2", "qcow2")?.replace(',', ",,"));
    place.says(&["create", &both, "x", "--disk", "vdb=copy"], &["vda internal", "vdb external"])?;
    place.says(&["list", &both], &["x "])?;
    place.refuses(&["disk", "create", &as_raw], &["domsnap create"])?;
    let text = place.refuses(&["list", &place.text("b,c.qcow2")], &["all its images: ", "b,,c.qcow2"])?;
    ensure!(text.contains(&both.replace(",format=raw", "")), "{text}");
    Ok(())
}

/// Options that do not apply are refused with exit status 3, and named.
#[test]
fn options_that_do_not_apply_are_refused() -> Result<()> {
    let mut place = Place::new()?;
    let (rest, live) = (place.image("a b.qcow2", "qcow2")?, place.image("c.qcow2", "qcow2")?);
    let at = place.running(&live)?;
    let (rest, at) = (rest.as_str(), at.as_str());
    place.says(&["create", rest, "s"], &[])?;
    place.says(&["create", at, "s", "--disk-only"], &[])?;
    for args in [
        &["create", rest, "x", "--memory"][..],
        &["create", rest, "x", "--live"],
        &["create", rest, "x", "--no-live"],
        &["create", rest, "x", "--budget", "5"],
        &["create", rest, "x", "--compress"],
        &["create", rest, "x", "--quiesce"],
        &["create", rest, "x", "--then", "pause"],
        &["revert", rest, "s", "--running"],
        &["revert", rest, "s", "--paused"],
        &["revert", rest, "s", "--no-safety"],
        &["revert", rest, "s", "--config", "x"],
        &["delete", rest, "s", "--limit", "1M"],
        &["create", at, "x", "--disk-only", "--quiesce"],
        &["revert", at, "s", "--no-safety"],
        &["revert", at, "s", "--config", "x"],
    ] {
        let option = args.iter().skip(3).find(|word| word.starts_with("--") && **word != "--disk-only");
        let option = option.copied().unwrap_or_default();
        let dry = [args, &["--dry-run"]].concat();
        for args in [args, &dry] {
            place.refuses(args, &[option])?;
        }
    }
    // A snapshot of the other kind is not the one that is meant.
    place.domsnap.done(&["disk", "create", rest, "e", "--external"])?;
    for (name, kind) in [("s", "--external"), ("e", "--internal")] {
        for command in ["revert", "delete"] {
            place.refuses(&["disk", command, rest, name, kind], &[kind, name])?;
        }
    }
    let twice = ["create", rest, "x", "--disk", "vda=skip", "--disk", "vda=internal"];
    place.domsnap.run(&twice)?.expect_status(status::USAGE)?;
    // A snapshot that is not there is named with its domain; nothing is said twice.
    for command in ["revert", "show", "delete"] {
        let outcome = place.domsnap.run(&[command, at, "nope"])?.expect_status(status::REFUSED)?;
        says(&outcome.stderr, &["domain idle: ", "nope"])?;
    }
    // An automatic name has no character that a file name or a shell has another use for, and is not in the
    // future.
    let made = place.json(&["create", rest])?;
    let name = made["snapshot"]["name"].as_str().context("a name")?;
    ensure!(name.len() == 17 && name.chars().all(|c| c.is_ascii_digit() || c == '-'), "{name}");
    Ok(())
}

/// A domain whose image is not there is not said to be well.
#[test]
fn domain_list_names_a_missing_image() -> Result<()> {
    let place = Place::new()?;
    let image = place.image("a.qcow2", "qcow2")?;
    place.says(&["domain", "add", "d", "--disk", &format!("vda={image}")], &[])?;
    place.says(&["domain", "list"], &["ok"])?;
    std::fs::rename(&image, place.path("elsewhere"))?;
    place.says(&["domain", "list"], &["image of vda missing"])?;
    let list = place.json(&["domain", "list"])?;
    ensure!(list["domains"][0]["missing"][0] == "vda", "{list}");
    Ok(())
}

/// Firmware variables in a file that is no raw one are in no snapshot but in its memory: create, show and
/// revert say so, live and at rest.
#[test]
fn nvram_is_said_to_be_left_out() -> Result<()> {
    let mut place = Place::new()?;
    let image = place.image("a.qcow2", "qcow2")?;
    let socket = format!("unix:{},server=on,wait=off", place.text("m.qmp"));
    let variables = place.text("vars.qcow2");
    qemu::run("qemu-img", &["create", "-q", "-f", "qcow2", &variables, "256K"])?;
    let flash = format!("if=pflash,format=qcow2,file={variables}");
    place.start(&image, "m.qmp", &["-qmp", &socket, "-drive", &flash])?;
    let at = format!("qemu:{}", place.text("m.qmp"));
    let at = at.as_str();
    let what = "firmware variables (NVRAM)";
    place.says(&["create", at, "disks", "--disk-only"], &[what, "not in the snapshot"])?;
    place.says(&["create", at, "all"], &[what, "only in the snapshot's memory"])?;
    place.says(&["show", at, "disks"], &["not included", what])?;
    place.says(&["revert", at, "disks"], &[what, "later state"])?;
    let with_memory = place.says(&["revert", at, "all"], &[])?;
    ensure!(!with_memory.contains(what), "{with_memory}");
    place.says(&["revert", at, "all", "--off"], &[what, "later state"])?;
    place.says(&["revert", at, "disks"], &[what, "later state"])?;
    place.says(&["create", at, "rest"], &[what, "not in the snapshot"])?;
    Ok(())
}

/// What was asked for and could not be written is a failure; what was changed stays changed.
#[test]
fn answers_that_cannot_be_written_fail() -> Result<()> {
    let place = Place::new()?;
    let image = place.image("a.qcow2", "qcow2")?;
    let to_a_full_device = |args: &[&str]| -> Result<Option<i32>> {
        let full = std::fs::OpenOptions::new().write(true).open("/dev/full")?;
        let mut command = place.domsnap.command(args);
        Ok(command.stdout(full).stderr(Stdio::null()).status()?.code())
    };
    ensure!(to_a_full_device(&["create", &image, "s1"])? == Some(status::DONE), "a create that was done");
    for args in [&["list", &image][..], &["list", &image, "--json"], &["schema"]] {
        ensure!(to_a_full_device(args)? == Some(status::FAILED), "{args:?}");
    }
    Ok(())
}

/// Files that are no image, no catalogue, or one and the same image are named as what they are.
#[test]
fn files_are_named_as_what_they_are() -> Result<()> {
    let place = Place::new()?;
    let (a, b) = (place.image("a.qcow2", "qcow2")?, place.text("b.qcow2"));
    std::fs::hard_link(&a, &b)?;
    let said = place.domsnap.run(&["create", &format!("{a},{b}"), "s1"])?.expect_status(status::USAGE)?;
    ensure!(said.stderr.contains("given twice"), "{said}");
    let (vda, vdb) = (format!("vda={a}"), format!("vdb={b}"));
    let said = place
        .domsnap
        .run(&["domain", "add", "d", "--disk", &vda, "--disk", &vdb])?
        .expect_status(status::USAGE)?;
    ensure!(said.stderr.contains("names a disk twice"), "{said}");

    // A state directory with something else in the catalogue's place: refused before anything, with what to
    // do.
    for state in ["fifo", "directory", "garbage"] {
        let domsnap = Domsnap::new(&place.path(state));
        domsnap.done(&["create", &a, "s1"])?;
        let database = place.path(state).join("catalogue.db");
        std::fs::remove_file(&database)?;
        std::fs::remove_file(database.with_extension("db-wal"))?;
        match state {
            "fifo" => drop(qemu::run("mkfifo", &[&database.display().to_string()])?),
            "directory" => std::fs::create_dir(&database)?,
            _ => std::fs::write(&database, [0xa5; 8192])?,
        }
        // Without a name the catalogue is read before the operation begins.
        for args in [&["create", &a, "s2"][..], &["create", &a], &["disk", "delete", &a, "s1"]] {
            let said = domsnap.run(args)?.expect_status(status::REFUSED)?;
            ensure!(said.stderr.contains("catalogue") && !said.stderr.contains("CREATE TABLE"), "{said}");
            let lines: Vec<&str> = said.stderr.lines().collect();
            ensure!(lines.len() == 3, "what is wrong, the state, what to do: {said}");
        }
        std::fs::remove_dir_all(place.path(state))?;
        std::fs::remove_dir_all(format!("{a}.domsnap"))?;
        qemu::run("qemu-img", &["snapshot", "-d", "s1", &a])?;
    }
    Ok(())
}

/// A QEMU that serves the disks of a Xen domain is no domain of its own: its snapshots would have no memory.
#[test]
fn disk_server_of_xen_is_refused() -> Result<()> {
    let mut place = Place::new()?;
    let image = place.image("a.qcow2", "qcow2")?;
    let socket = format!("unix:{},server=on,wait=off", place.text("m.qmp"));
    // The option says it; there is no Xen here.
    place.start(&image, "m.qmp", &["-qmp", &socket, "-xen-domid", "7"])?;
    let (at, why) = (format!("qemu:{}", place.text("m.qmp")), ["Xen's domain 7", "xen:NAME"]);
    place.refuses(&["create", &at, "s"], &why)?;
    place.refuses(&["create", &at, "s", "--disk-only"], &why)?;
    place.refuses(&["domain", "add", "disks", "--at", &at], &why)?;
    let scan = place.json(&["domain", "scan"])?;
    ensure!(!scan.to_string().contains(&place.text("m.qmp")), "it is offered as a domain: {scan}");
    Ok(())
}

/// What the README promises of `make demo`, as far as no guest is needed: it compares every content itself,
/// and nothing is left at its end.
#[test]
fn demo_of_the_readme_ends_well() -> Result<()> {
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("../scripts/demo");
    let output = Command::new(script).env("DOMSNAP_BIN", binary()).env_remove("DOMSNAP_UNDO").output()?;
    let said = String::from_utf8_lossy(&output.stdout);
    ensure!(output.status.success(), "{said}{}", String::from_utf8_lossy(&output.stderr));
    ensure!(said.contains("done: 8 contents proven by checksum"), "{said}");
    Ok(())
}
