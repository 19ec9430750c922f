//! The machine: QEMU with Xen and dom0 in it, one for all processes that use the same build of it.
//!
//! ```text
//! xen-KEY/              what was built (and the lock under which that happens)
//!     use.lock          held by who runs a job: one at a time
//!     run/              of the machine that runs now, or ran last
//!         share/        dom0's /host: jobs/, programs, `ready`, `idle`, `stop`
//!         console       what Xen and dom0 say
//!         pid
//! ```
//!
//! dom0 itself ends the machine when it had no job for a while (`src-guest/dom0-init`), so no test must.

use std::{
    env,
    fs::{self, File},
    io::Read,
    os::unix::process::CommandExt,
    path::{Path, PathBuf},
    process::{self, Command, Stdio},
    sync::atomic::{AtomicU64, Ordering},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail, ensure};
use testguest::parts::{Built, preferred, run};

use crate::build;

/// Within which dom0 must be ready. It is in less than half a minute; now and then it hangs at once, and is
/// booted again.
const BOOT: Duration = Duration::from_secs(150);
const BOOTS: usize = 3;

/// How long dom0 waits for a job before it powers off, in seconds; `DOMSNAP_TEST_XEN_IDLE` is another.
const IDLE: &str = "90";
const IDLE_VARIABLE: &str = "DOMSNAP_TEST_XEN_IDLE";

const LOOK: Duration = Duration::from_millis(20);

const DEPS: &str = "run scripts/install-qemu";

/// The machine, held by this process alone as long as this lives.
pub struct Machine {
    built: Built,
    _used: File,
}

/// How a job ended.
#[derive(Debug)]
pub struct Ended {
    /// Its exit status.
    pub status: i32,
    /// What it said, on both outputs.
    pub output: String,
}

impl Machine {
    /// The machine that runs; it is built and booted now where it is not there. Waits for its other users.
    ///
    /// # Errors
    /// What is missing here and which script installs it; or what the machine's console said.
    pub fn get() -> Result<Self> {
        let built = build::get()?;
        let lock = built.dir().join("use.lock");
        let used = File::options().create(true).append(true).open(&lock);
        let used = used.with_context(|| format!("{} cannot be opened", lock.display()))?;
        used.lock()?;
        let machine = Self { built, _used: used };
        if !machine.runs() {
            machine.boot()?;
        }
        Ok(machine)
    }

    fn run_dir(&self) -> PathBuf {
        self.built.dir().join("run")
    }

    /// What dom0 has as `/host`.
    pub fn share(&self) -> PathBuf {
        self.run_dir().join("share")
    }

    /// Whether the process of the last boot is there, and is it, and dom0 is not about to go.
    fn runs(&self) -> bool {
        let run = self.run_dir();
        self.process(&run).is_some()
            && self.share().join("ready").exists()
            && !self.share().join("stop").exists()
    }

    fn process(&self, run: &Path) -> Option<u32> {
        let pid: u32 = fs::read_to_string(run.join("pid")).ok()?.trim().parse().ok()?;
        let line = fs::read(format!("/proc/{pid}/cmdline")).ok()?;
        let needle = run.to_str()?.as_bytes();
        line.windows(needle.len()).any(|part| part == needle).then_some(pid)
    }

    fn boot(&self) -> Result<()> {
        let mut said = String::new();
        for attempt in 1..=BOOTS {
            match self.boot_once() {
                Ok(()) => return Ok(()),
                Err(error) => {
                    eprintln!("boot {attempt} of the machine with Xen failed: {error:#}");
                    said = format!("{error:#}");
                }
            }
        }
        bail!("the machine with Xen does not boot, tried {BOOTS} times: {said}")
    }

    fn boot_once(&self) -> Result<()> {
        let run = self.run_dir();
        if let Some(pid) = self.process(&run) {
            // It is ours, and powering off, or hung.
            kill(pid);
        }
        if run.exists() {
            fs::remove_dir_all(&run)?;
        }
        fs::create_dir_all(self.share().join("jobs"))?;
        let idle = env::var(IDLE_VARIABLE).unwrap_or_else(|_| IDLE.to_owned());
        fs::write(self.share().join("idle"), format!("{idle}\n"))?;
        let mut child = self
            .qemu(&run)?
            .spawn()
            .with_context(|| format!("qemu-system-x86_64 cannot be started: {DEPS}"))?;
        fs::write(run.join("pid"), child.id().to_string())?;
        let until = Instant::now() + BOOT;
        while !self.share().join("ready").exists() {
            if let Some(status) = child.try_wait()? {
                bail!("QEMU ended ({status}) before dom0 was ready{}", self.last_output());
            }
            if Instant::now() > until {
                child.kill()?;
                child.wait()?;
                bail!("dom0 was not ready within {BOOT:?}{}", self.last_output());
            }
            thread::sleep(LOOK);
        }
        Ok(())
    }

    fn qemu(&self, run: &Path) -> Result<Command> {
        let built = self.built.dir();
        let text = built.to_str().context("the directory of the machine with Xen has no UTF-8 name")?;
        ensure!(!text.contains([',', ' ']), "QEMU's options cannot name {text}: no commas or blanks, please");
        let mut qemu = preferred("qemu-system-x86_64");
        qemu.args([
            "-nodefaults",
            "-no-user-config",
            "-display",
            "none",
            "-no-reboot",
            "-name",
            "domsnap-test-xen",
        ]);
        qemu.args(["-machine", "pc", "-accel", "tcg", "-cpu", "qemu64,+svm", "-smp", "1", "-m", "3072"]);
        qemu.arg("-kernel").arg(build::xen(built));
        qemu.args([
            "-append",
            "console=com1 com1=115200,8n1 dom0_mem=1536M,max:1536M dom0_max_vcpus=1 noreboot=1 sched=credit \
             loglvl=warning guest_loglvl=warning xpti=0 spec-ctrl=0 bootscrub=0",
        ]);
        // Without the last two dom0 clears each page that it gives away, and a change of a volume waits for
        // ticks.
        let args = "console=hvc0 quiet panic=-1 mitigations=off random.trust_cpu=on init_on_alloc=0 \
                    rcupdate.rcu_expedited=1";
        let (kernel, initrd) = (build::kernel(built), build::initrd(built));
        qemu.arg("-initrd").arg(format!("{} {args},{}", kernel.display(), initrd.display()));
        // dom0 writes to its root file system, and all of that goes with the machine.
        let root = build::root(built);
        qemu.arg("-drive")
            .arg(format!("if=none,id=root,format=raw,file={},snapshot=on,cache=unsafe", root.display()));
        qemu.args(["-device", "virtio-blk-pci,drive=root"]);
        let volumes = run.join("volumes");
        File::create(&volumes)?.set_len(2 << 30)?;
        qemu.arg("-drive").arg(format!(
            "if=none,id=volumes,format=raw,file={},cache=unsafe,discard=unmap",
            volumes.display()
        ));
        qemu.args(["-device", "virtio-blk-pci,drive=volumes"]);
        qemu.arg("-fsdev")
            .arg(format!("local,id=share,security_model=none,path={}", run.join("share").display()));
        qemu.args(["-device", "virtio-9p-pci,fsdev=share,mount_tag=share"]);
        qemu.arg("-serial").arg(format!("file:{}", run.join("console").display()));
        // It outlives this process, and has a process group of its own: what ends this test does not end it.
        qemu.stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(File::create(run.join("stderr"))?)
            .process_group(0);
        qemu.env("TMPDIR", run);
        Ok(qemu)
    }

    fn last_output(&self) -> String {
        let read = |name: &str| {
            let mut bytes = Vec::new();
            let _ = File::open(self.run_dir().join(name)).and_then(|mut file| file.read_to_end(&mut bytes));
            let text = String::from_utf8_lossy(&bytes).into_owned();
            let lines: Vec<&str> = text.lines().rev().take(15).collect();
            lines.into_iter().rev().collect::<Vec<_>>().join("\n  ")
        };
        format!("\n QEMU said: {}\n its console:\n  {}", read("stderr"), read("console"))
    }

    /// Puts a program into the machine, as `/host/bin/NAME`, without what is only there for debuggers.
    ///
    /// # Errors
    /// It cannot be read; `strip` is missing.
    pub fn put_program(&self, program: &Path, name: &str) -> Result<()> {
        let bin = self.share().join("bin");
        fs::create_dir_all(&bin)?;
        let about = fs::metadata(program).with_context(|| format!("{} is not there", program.display()))?;
        let mark = format!("{} {} {:?}", program.display(), about.len(), about.modified()?);
        let mark_file = bin.join(format!("{name}.from"));
        if fs::read_to_string(&mark_file).is_ok_and(|before| before == mark) {
            return Ok(());
        }
        let new = bin.join(format!("{name}.new"));
        run(
            Command::new("strip").arg("-o").arg(&new).arg(program),
            "it is part of binutils: run scripts/install-deps",
        )?;
        fs::rename(new, bin.join(name))?;
        Ok(fs::write(mark_file, mark)?)
    }

    /// Runs a line of shell in dom0.
    ///
    /// # Errors
    /// The machine ended before, or the deadline is over: then the job runs on.
    pub fn shell(&self, line: &str, deadline: Duration) -> Result<Ended> {
        static NUMBER: AtomicU64 = AtomicU64::new(0);
        let number = NUMBER.fetch_add(1, Ordering::Relaxed);
        let jobs = self.share().join("jobs");
        let id = format!("{}-{number}-{:x}", process::id(), std::time::UNIX_EPOCH.elapsed()?.as_micros());
        let file = |end: &str| jobs.join(format!("{id}.{end}"));
        fs::write(file("new"), format!("#!/bin/bash\n{line}\n"))?;
        run(Command::new("chmod").arg("755").arg(file("new")), "it is part of coreutils")?;
        fs::rename(file("new"), file("sh"))?;
        let until = Instant::now() + deadline;
        while !file("rc").exists() {
            ensure!(
                self.process(&self.run_dir()).is_some(),
                "the machine with Xen ended{}",
                self.last_output()
            );
            if Instant::now() > until {
                let output = read_text(&file("out"));
                bail!(
                    "{line:?} has not ended within {deadline:?} in dom0; it said:\n{output}{}",
                    self.last_output()
                );
            }
            thread::sleep(LOOK);
        }
        let status = read_text(&file("rc")).trim().parse().context("dom0 gave no exit status")?;
        let output = read_text(&file("out"));
        for end in ["rc", "out"] {
            let _ = fs::remove_file(file(end));
        }
        Ok(Ended { status, output })
    }

    /// Powers the machine off.
    ///
    /// # Errors
    /// It does not go.
    pub fn stop(self) -> Result<()> {
        fs::write(self.share().join("stop"), "")?;
        let until = Instant::now() + Duration::from_secs(30);
        while let Some(pid) = self.process(&self.run_dir()) {
            if Instant::now() > until {
                kill(pid);
            }
            ensure!(
                Instant::now() < until + Duration::from_secs(5),
                "the machine with Xen, process {pid}, does not end"
            );
            thread::sleep(LOOK);
        }
        Ok(())
    }
}

fn read_text(path: &Path) -> String {
    String::from_utf8_lossy(&fs::read(path).unwrap_or_default()).into_owned()
}

fn kill(pid: u32) {
    if let Some(pid) = i32::try_from(pid).ok().and_then(rustix::process::Pid::from_raw) {
        let _ = rustix::process::kill_process(pid, rustix::process::Signal::KILL);
    }
}
