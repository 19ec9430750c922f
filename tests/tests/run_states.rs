//! Every run state of QEMU that can be reached here: what is done in it, and that QEMU lives and the guest is
//! as it was.

use std::io::Write;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};
use domsnap_tests::domsnap::{Domsnap, Outcome, status};
use domsnap_tests::idle::{Boot, Idle, has_pattern};
use domsnap_tests::mounted::{Mounted, may_mount};
use domsnap_tests::{qemu, seed};
use serde_json::{Value, json};
use testguest::Version;

/// What the disk has when a snapshot is taken, and after it.
const THEN: u8 = 0x33;
const NOW: u8 = 0x44;

struct Domain {
    qemu: Idle,
    dir: tempfile::TempDir,
    disk: PathBuf,
    version: Version,
}

impl Domain {
    /// A machine whose one disk begins with `boot`, and has `THEN`.
    fn start(version: Version, boot: Boot, more: &[&str]) -> Result<Self> {
        let dir = tempfile::Builder::new().prefix("domsnap-states-").tempdir()?;
        let disk = dir.path().join("d.qcow2");
        qemu::img(&["create", "-q", "-f", "qcow2", &disk.display().to_string(), "1M"])?;
        boot.write(&disk)?;
        let args = [
            "-blockdev".to_owned(),
            format!("driver=qcow2,file.driver=file,file.filename={},node-name=d0", disk.display()),
            "-device".to_owned(),
            "virtio-blk-pci,drive=d0,id=vda,bootindex=1".to_owned(),
        ];
        let args: Vec<&str> = args.iter().map(String::as_str).chain(more.iter().copied()).collect();
        let qemu = Idle::start(version, dir.path(), "m", &args)?;
        Ok(Self { qemu, dir, disk, version })
    }

    fn domsnap(&self) -> Domsnap {
        Domsnap::new(&self.dir.path().join("state"))
    }

    fn run(&self, args: &[&str]) -> Result<Outcome> {
        let address = self.qemu.address();
        self.domsnap().run(&[&[args[0], &address], &args[1..]].concat())
    }

    fn done(&self, args: &[&str]) -> Result<()> {
        self.run(args)?.expect_status(status::DONE).map(drop)
    }

    /// How each snapshot is reverted to. With the old QEMU in one way, or in all with `DOMSNAP_LIVE_EVERY=1`:
    /// what follows the revert itself does not depend on it.
    fn powers(&self) -> &'static [&'static [&'static str]] {
        let all: &[&[&str]] = &[&[], &["--running"], &["--paused"]];
        let every = self.version == Version::New || seed::tries_all_live();
        if every { all } else { &all[..1] }
    }

    fn has(&self, pattern: u8) -> Result<bool> {
        self.qemu.flush("vda")?;
        has_pattern(&self.disk, pattern)
    }

    /// Everything that can be done with a guest that is paused, which is in the state `word`, and comes to
    /// it each time that `reach` is called.
    fn all_in_state(&mut self, word: &str, reach: impl Fn(&mut Self) -> Result<()>) -> Result<()> {
        // Not while the firmware is at its first instructions: it does not survive a reset then.
        self.qemu.wait_state(word)?;
        for (name, more) in [
            ("disks-in", &["--disk-only", "--internal"][..]),
            ("disks-out", &["--disk-only", "--external"]),
            ("live", &["--internal"]),
            ("live-out", &["--external"]),
            ("still", &["--no-live"]),
        ] {
            let at = || format!("{word}: create {name}");
            reach(self).with_context(at)?;
            self.qemu.wait_state(word).with_context(at)?;
            self.qemu.write("vda", THEN)?;
            self.done(&[&["create", name], more].concat()).with_context(at)?;
            self.lives(word).with_context(at)?;
            for &power in self.powers() {
                let at = || format!("{word}: revert to {name} {power:?}");
                reach(self).with_context(at)?;
                self.qemu.wait_state(word).with_context(at)?;
                self.qemu.write("vda", NOW)?;
                self.done(&[&["revert", name][..], power].concat()).with_context(at)?;
                ensure!(self.qemu.is_alive()?, "{}: {}", at(), self.qemu.said());
                ensure!(self.has(THEN)?, "{}: the disk is not as it was", at());
                // A guest that was let go on may meet the same again.
                let state = self.qemu.state()?;
                let stands =
                    ["paused", "prelaunch"].contains(&state.as_str()) || (word == "debug" && state == word);
                let runs = state == "running" || state == word;
                let right = if power == ["--running"] { runs } else { stands };
                ensure!(right, "{}: the guest is {state:?}", at());
                let stands = stands && power != ["--running"];
                if stands {
                    self.done(&["create", "again", "--internal"]).with_context(at)?;
                    self.lives(&state).with_context(at)?;
                    self.done(&["delete", "again"]).with_context(at)?;
                }
            }
        }
        reach(self)?;
        self.qemu.wait_state(word)?;
        for name in ["live", "disks-in", "still", "disks-out", "live-out"] {
            self.done(&["delete", name]).with_context(|| format!("{word}: delete {name}"))?;
            self.lives(word)?;
        }
        Ok(())
    }

    /// Switched off with its memory saved in the state `word`, then started from that by domsnap.
    fn cold(&mut self, word: &str) -> Result<()> {
        self.lives(word)?;
        self.qemu.write("vda", THEN)?;
        self.done(&["create", "cold", "--then", "off"])?;
        for (power, right) in [("--paused", &["paused", "prelaunch", word][..]), ("--running", &["running"])]
        {
            let tried = (|| {
                self.done(&["revert", "cold", power])?;
                let state = self.qemu.state()?;
                // A QEMU that cannot be made to make its disks usable lets a guest run for a moment.
                ensure!(right.contains(&state.as_str()), "{power}: it is {state:?}");
                ensure!(self.has(THEN)?, "the disk is not as it was");
                Ok(())
            })();
            // It is no child of ours.
            let _ = self.qemu.qmp("quit", json!({}));
            while self.qemu.answers() {
                std::thread::sleep(std::time::Duration::from_millis(20));
            }
            tried?;
        }
        Ok(())
    }

    fn lives(&mut self, word: &str) -> Result<()> {
        ensure!(self.qemu.is_alive()?, "QEMU has ended: {}", self.qemu.said());
        let state = self.qemu.state()?;
        ensure!(state == word, "it was {word:?}, and is {state:?}");
        Ok(())
    }

    fn refuses(&mut self, word: &str, args: &[&str]) -> Result<()> {
        self.lives(word)?;
        let outcome = self.run(args)?.expect_status(status::REFUSED)?;
        ensure!(outcome.stderr.contains("no changes made"), "{outcome}");
        self.lives(word)
    }
}

/// The guest is reset and runs, so that it comes to its state again.
fn reset(domain: &mut Domain) -> Result<()> {
    let ran = domain.qemu.state()? == "running";
    domain.qemu.qmp("system_reset", json!({}))?;
    if !ran {
        // It is done a moment after the reply.
        domain.qemu.wait_state("prelaunch")?;
        domain.qemu.qmp("cont", json!({}))?;
    }
    Ok(())
}

fn stop(domain: &mut Domain) -> Result<()> {
    domain.qemu.qmp("cont", json!({}))?;
    domain.qemu.qmp("stop", json!({})).map(drop)
}

/// Stopped, then reset.
fn stop_and_reset(domain: &mut Domain) -> Result<()> {
    domain.qemu.qmp("stop", json!({}))?;
    domain.qemu.qmp("system_reset", json!({}))?;
    domain.qemu.wait_state("prelaunch")
}

#[test]
fn prelaunch_is_worked_in() -> Result<()> {
    for version in Version::BOTH {
        let mut domain = Domain::start(version, Boot::Idle, &["-S"])?;
        domain.lives("prelaunch")?;
        domain.done(&["create", "first"])?;
        domain.lives("prelaunch")?;
        domain.all_in_state("prelaunch", stop_and_reset).with_context(|| format!("{version:?}"))?;
    }
    Ok(())
}

#[test]
fn paused_is_worked_in() -> Result<()> {
    for version in Version::BOTH {
        let mut domain = Domain::start(version, Boot::Idle, &[])?;
        stop(&mut domain)?;
        domain.all_in_state("paused", stop).with_context(|| format!("{version:?}"))?;
    }
    Ok(())
}

#[test]
fn a_panicked_guest_is_worked_on() -> Result<()> {
    for version in Version::BOTH {
        let args = ["-device", "pvpanic", "-action", "panic=pause"];
        let mut domain = Domain::start(version, Boot::Panic, &args)?;
        domain.all_in_state("guest-panicked", reset).with_context(|| format!("{version:?}"))?;
        reset(&mut domain)?;
        domain.qemu.wait_state("guest-panicked")?;
        domain.cold("guest-panicked").with_context(|| format!("{version:?}, started from memory"))?;
    }
    Ok(())
}

#[test]
fn a_guest_that_is_off_is_worked_on() -> Result<()> {
    for version in Version::BOTH {
        let args = ["-action", "shutdown=pause"];
        let mut domain = Domain::start(version, Boot::PowerOff, &args)?;
        domain.all_in_state("shutdown", reset).with_context(|| format!("{version:?}"))?;
        reset(&mut domain)?;
        domain.qemu.wait_state("shutdown")?;
        domain.cold("shutdown").with_context(|| format!("{version:?}, started from memory"))?;
    }
    Ok(())
}

#[test]
fn a_watchdogs_pause_is_worked_in() -> Result<()> {
    let args = ["-device", "ib700", "-action", "watchdog=pause"];
    Domain::start(Version::New, Boot::Watchdog, &args)?.all_in_state("watchdog", reset)
}

/// A packet for QEMU's gdbstub.
fn packet(body: &str) -> String {
    let sum = body.bytes().fold(0_u8, u8::wrapping_add);
    format!("${body}#{sum:02x}")
}

#[test]
fn a_debuggers_stop_is_worked_in() -> Result<()> {
    let dir = tempfile::tempdir()?;
    let socket = dir.path().join("gdb");
    let gdb = format!("unix:{},server=on,wait=off", socket.display());
    let mut domain = Domain::start(Version::New, Boot::Idle, &["-gdb", &gdb])?;
    domain.qemu.wait_state("running")?;
    let mut debugger = UnixStream::connect(&socket)?;
    // A breakpoint at the boot sector; then it lets the guest go on. It is connected until the end.
    for body in ["?", "Z0,7c00,1", "c"] {
        debugger.write_all(packet(body).as_bytes())?;
        std::thread::sleep(std::time::Duration::from_millis(200));
        debugger.write_all(b"+")?;
    }
    reset(&mut domain)?;
    domain.all_in_state("debug", reset)
}

#[test]
fn disks_are_worked_on_after_a_load_that_failed() -> Result<()> {
    for version in Version::BOTH {
        let mut domain = Domain::start(version, Boot::Idle, &[])?;
        domain.qemu.write("vda", THEN)?;
        domain.done(&["create", "good"])?;
        let load = json!({ "job-id": "k", "tag": "none", "vmstate": "d0", "devices": ["d0"] });
        domain.qemu.qmp("snapshot-load", load)?;
        domain.qemu.wait_state("restore-vm")?;
        domain.qemu.qmp("job-dismiss", json!({ "id": "k" }))?;
        domain.refuses("restore-vm", &["create", "x"])?;
        domain.refuses("restore-vm", &["create", "x", "--no-live"])?;
        domain.done(&["create", "disks", "--disk-only", "--external"])?;
        domain.lives("restore-vm")?;
        domain.qemu.write("vda", NOW)?;
        domain.done(&["revert", "good"])?;
        domain.lives("running")?;
        ensure!(domain.has(THEN)?, "the disk is not as it was");
    }
    Ok(())
}

#[test]
fn a_qemu_that_ends_at_a_reboot_is_not_reset() -> Result<()> {
    let args = ["-action", "shutdown=pause,reboot=shutdown"];
    let mut domain = Domain::start(Version::New, Boot::Idle, &args)?;
    domain.qemu.write("vda", THEN)?;
    domain.done(&["create", "memory"])?;
    domain.done(&["create", "disks", "--disk-only"])?;
    domain.refuses("running", &["revert", "disks"])?;
    domain.refuses("running", &["revert", "disks", "--paused"])?;
    // Before memory is loaded over a guest that is off, a reset ends nothing.
    domain.qemu.qmp("system_reset", json!({}))?;
    domain.qemu.wait_state("shutdown")?;
    domain.qemu.write("vda", NOW)?;
    domain.done(&["revert", "memory"])?;
    domain.lives("running")?;
    ensure!(domain.has(THEN)?, "the disk is not as it was");
    // What the user demanded of it holds again.
    domain.qemu.qmp("system_reset", json!({}))?;
    domain.qemu.wait_state("shutdown")
}

#[test]
fn a_sleeping_guest_counts_as_running_and_sleeps_on() -> Result<()> {
    let mut domain = Domain::start(Version::New, Boot::Sleep, &[])?;
    domain.qemu.wait_state("suspended")?;
    for (name, more) in
        [("disks", &["--disk-only"][..]), ("live", &[]), ("still", &["--no-live", "--external"])]
    {
        domain.qemu.write("vda", THEN)?;
        domain.done(&[&["create", name], more].concat())?;
        domain.lives("suspended").context(name)?;
    }
    for name in ["live", "still"] {
        domain.qemu.write("vda", NOW)?;
        domain.done(&["revert", name])?;
        domain.lives("suspended").context(name)?;
        ensure!(domain.has(THEN)?, "the disk is not as it was");
    }
    domain.done(&["delete", "live"])?;
    domain.done(&["delete", "still"])?;
    domain.lives("suspended")?;
    // A guest without memory of its own boots again, and sleeps again.
    domain.done(&["revert", "disks"])?;
    domain.qemu.wait_state("suspended")?;
    domain.qemu.qmp("system_wakeup", json!({}))?;
    ensure!(domain.qemu.is_alive()?, "{}", domain.qemu.said());

    // An older QEMU cannot keep it asleep.
    let mut domain = Domain::start(Version::Old, Boot::Sleep, &[])?;
    domain.qemu.wait_state("suspended")?;
    for more in [&["--disk-only"][..], &[], &["--no-live"]] {
        domain.refuses("suspended", &[&["create", "x"], more].concat())?;
    }
    Ok(())
}

#[test]
fn states_of_a_migration_are_refused() -> Result<()> {
    for version in Version::BOTH {
        let mut domain = Domain::start(version, Boot::Idle, &["-incoming", "defer"])?;
        for args in [&["create", "x"][..], &["create", "x", "--disk-only"], &["create", "x", "--no-live"]] {
            domain.refuses("inmigrate", args)?;
        }
        let mut domain = Domain::start(version, Boot::Idle, &[])?;
        domain.done(&["create", "s"])?;
        domain.done(&["create", "d", "--disk-only", "--external"])?;
        let file = domain.dir.path().join("away");
        domain.qemu.qmp("migrate", json!({ "uri": format!("exec:cat > {}", file.display()) }))?;
        domain.qemu.wait_state("postmigrate")?;
        let operations = [
            &["create", "x"][..],
            &["create", "x", "--disk-only"],
            &["create", "x", "--no-live"],
            &["revert", "s"],
            &["revert", "d", "--off"],
            &["delete", "s"],
            &["delete", "d"],
        ];
        for args in operations {
            domain.refuses("postmigrate", args)?;
        }
        domain.qemu.qmp("cont", json!({}))?;
        domain.done(&["revert", "s"])?;
        domain.lives("running")?;
    }
    Ok(())
}

#[test]
fn a_guest_whose_disk_is_full_is_worked_on() -> Result<()> {
    if !may_mount("ext4") {
        return Ok(());
    }
    let small = Mounted::make("ext4", 12 << 20)?;
    let full = small.path().join("full.qcow2");
    qemu::img(&["create", "-q", "-f", "qcow2", &full.display().to_string(), "256M"])?;
    Boot::Fill.write(&full)?;
    let args = [
        "-blockdev".to_owned(),
        format!("driver=qcow2,file.driver=file,file.filename={},node-name=d1", full.display()),
        "-device".to_owned(),
        "virtio-blk-pci,drive=d1,id=vdb,bootindex=0".to_owned(),
    ];
    let args: Vec<&str> = args.iter().map(String::as_str).collect();
    let mut domain = Domain::start(Version::New, Boot::Idle, &args)?;
    domain.qemu.wait_state("io-error")?;
    for (name, more) in
        [("disks", &["--disk-only"][..]), ("live", &[]), ("still", &["--no-live", "--external"])]
    {
        domain.qemu.write("vda", THEN)?;
        domain.done(&[&["create", name, "--disk", "vdb=skip"], more].concat())?;
        domain.lives("io-error").context(name)?;
    }
    for name in ["live", "still"] {
        domain.qemu.write("vda", NOW)?;
        domain.done(&["revert", name])?;
        ensure!(domain.has(THEN)?, "the disk is not as it was");
        domain.lives("prelaunch").context(name)?;
    }
    domain.qemu.qmp("cont", json!({}))?;
    domain.qemu.wait_state("io-error")
}

/// A machine whose memory is saved by pre-copy alone, which comes to its end when the guest is paused: the
/// guest writes to its memory until a key is pressed. In the directory is the socket of another client.
fn busy(boot: Boot, more: &[&str]) -> Result<(Domain, tempfile::TempDir)> {
    let dir = tempfile::tempdir()?;
    let second = dir.path().join("second");
    let ram = dir.path().join("ram");
    let memory = format!("memory-backend-file,id=m,size=192M,mem-path={},share=on", ram.display());
    // Memory that is not zeros: QEMU asks how much there is left, and not whether it is done, from 100 ms on.
    let filling = dir.path().join("filling");
    std::fs::write(&filling, vec![b'x'; 128 << 20])?;
    let filled = format!("loader,file={},addr=0x2000000,force-raw=on", filling.display());
    let served = format!("unix:{},server=on,wait=off", second.display());
    // A background snapshot cannot be had of memory that is shared.
    let args = ["-m", "192", "-object", &memory, "-machine", "memory-backend=m", "-device", &filled];
    let args = [&args[..], &["-qmp", &served]].concat();
    let domain = Domain::start(Version::New, boot, &[&args[..], more].concat())?;
    let limits = json!({ "downtime-limit": 1, "avail-switchover-bandwidth": 1_000 });
    domain.qemu.qmp("migrate-set-parameters", limits)?;
    Ok((domain, dir))
}

/// Waits until the guest writes to its memory.
fn wait_busy(domain: &Domain) -> Result<()> {
    domain.qemu.wait_state("running")?;
    let counter = || domain.qemu.monitor("xp /1hx 0x10000");
    let until = std::time::Instant::now() + std::time::Duration::from_secs(240);
    // The firmware writes there too, but not all the time.
    let (mut before, mut changed) = (counter()?, 0);
    while changed < 10 {
        ensure!(std::time::Instant::now() < until, "it does not begin");
        std::thread::sleep(std::time::Duration::from_millis(20));
        let now = counter()?;
        changed = if now == before { 0 } else { changed + 1 };
        before = now;
    }
    Ok(())
}

/// Takes a snapshot, and does something over the other socket when its memory is being copied. None where it
/// ended before: on a busy machine the guest may get no time to write to its memory.
fn create_while(domain: &Domain, dir: &Path, args: &[&str], what: (&str, Value)) -> Result<Option<Outcome>> {
    let second = &dir.join("second");
    let copied = || -> Result<bool> {
        let now = domain.qemu.qmp_at(second, "query-migrate", json!({}))?;
        let passes = now["ram"]["dirty-sync-count"].as_u64().unwrap_or_default();
        Ok(now["status"] == "active" && passes > 2)
    };
    std::thread::scope(|scope| {
        let create = scope.spawn(|| domain.run(args));
        while !create.is_finished() && !copied()? {}
        let ended = create.is_finished();
        if !ended {
            domain.qemu.qmp_at(second, what.0, what.1)?;
        }
        let outcome = create.join().expect("the thread ends")?;
        Ok((!ended).then_some(outcome))
    })
}

/// How often an end is tried to be met: QEMU stops the guest's processor, and ends the copying, within a look
/// of ours.
const TRIES: usize = 40;

/// A guest that panics or switches itself off while its memory is copied, in the last moments too, is known:
/// the snapshot is rolled back, and the guest stays as it is.
#[test]
fn guest_that_stops_itself_ends_a_pre_copy() -> Result<()> {
    for (boot, word, event, more) in [
        (
            Boot::BusyThenPanic,
            "guest-panicked",
            "GUEST_PANICKED",
            &["-device", "pvpanic", "-action", "panic=pause"][..],
        ),
        (Boot::BusyThenPowerOff, "shutdown", "SHUTDOWN", &["-action", "shutdown=pause"]),
    ] {
        let (mut domain, dir) = busy(boot, more)?;
        let (mut before_the_end, mut at_the_end) = (0, 0);
        for number in 0..TRIES {
            wait_busy(&domain)?;
            let key = json!({ "keys": [{ "type": "qcode", "data": "a" }] });
            let how = if number % 2 == 0 { "--internal" } else { "--external" };
            let args = ["create", "x", how];
            let outcome = create_while(&domain, dir.path(), &args, ("send-key", key))?;
            let Some(outcome) = outcome.filter(|outcome| outcome.status != Some(status::DONE)) else {
                // The key came after the end: the guest stops when it goes on, if it was not stopped before.
                let key = json!({ "keys": [{ "type": "qcode", "data": "b" }] });
                if domain.qemu.state()? == "running" {
                    domain.qemu.qmp("send-key", key)?;
                }
                domain.qemu.wait_state(word)?;
                domain.done(&["delete", "x"])?;
                reset(&mut domain)?;
                continue;
            };
            ensure!(outcome.stderr.contains("stopped by itself"), "{outcome}");
            match outcome.stderr.contains(event) {
                true => at_the_end += 1,
                false => before_the_end += 1,
            }
            // Where QEMU's own stop came first, it does not know the reason any more.
            match outcome.stderr.contains(event) && domain.qemu.state()? == "paused" {
                true => at_the_end -= 1,
                false => domain.lives(word)?,
            }
            if at_the_end > 0 {
                break;
            }
            reset(&mut domain)?;
        }
        println!("{word}: {at_the_end} at the end, {before_the_end} before");
        ensure!(at_the_end > 0, "the end was never met");
        domain.done(&["create", "y"])?;
        domain.lives(word)?;
        domain.done(&["revert", "y"])?;
    }
    Ok(())
}

/// A guest that another client stops while its memory is copied stays paused, and is restored so.
#[test]
fn stop_by_another_client_outlasts_a_pre_copy() -> Result<()> {
    let (mut domain, dir) = busy(Boot::BusyThenPanic, &[])?;
    let (mut before_the_end, mut at_the_end) = (0, 0);
    for number in 0..TRIES {
        wait_busy(&domain)?;
        domain.qemu.write("vda", THEN)?;
        let how = if number % 2 == 0 { "--internal" } else { "--external" };
        let outcome = create_while(&domain, dir.path(), &["create", "x", how], ("stop", json!({})))?;
        if let Some(outcome) = outcome {
            let outcome = outcome.expect_status(status::DONE)?;
            // A `stop` that comes while the guest is paused for us has no effect in QEMU, and no client
            // hears of it.
            match (outcome.stdout.contains("another client"), outcome.stdout.contains("(pre-copy)")) {
                (true, true) => at_the_end += 1,
                (true, false) => before_the_end += 1,
                (false, _) => ensure!(outcome.stdout.contains("guest paused for"), "{outcome}"),
            }
            let stopped = outcome.stdout.contains("another client");
            if stopped {
                domain.lives("paused")?;
            }
            domain.qemu.write("vda", NOW)?;
            domain.done(&["revert", "x"])?;
            domain.lives(if stopped { "paused" } else { "running" })?;
            ensure!(domain.has(THEN)?, "the disk is not as it was");
        }
        domain.done(&["delete", "x"])?;
        domain.qemu.qmp("cont", json!({}))?;
        if at_the_end > 0 && before_the_end > 0 {
            break;
        }
    }
    println!("{at_the_end} at the end, {before_the_end} before");
    ensure!(at_the_end > 0 && before_the_end > 0, "an end was never met");
    Ok(())
}
