//! The machine: QEMU, disks that become physical volumes, and one program that runs in it.

use std::{
    env, fs,
    io::Read,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail};
use testguest::parts::{Archive, preferred, run};

use crate::build;

const DEPS: &str = "run scripts/install-qemu";
const LOOK: Duration = Duration::from_millis(20);

/// Configures lvm2, except under a real udev, where the distribution's file stays. The defaults hold without
/// three things that double the time of a change in an emulated machine: copies of the metadata below /etc,
/// 16 MiB of memory that each command touches and locks, and a file of 100 KB that each command reads.
const LVM_CONF: &str =
    "backup { backup = 0 archive = 0 }\nactivation { reserved_memory = 0 reserved_stack = 0 }\n";

/// Room for the files that the program leaves.
const OUT_BYTES: u64 = 64 << 20;

/// A machine that is to be booted once.
#[derive(Debug, Clone)]
pub struct Machine {
    disks: Vec<u64>,
    memory_mib: u32,
    deadline: Duration,
    udev: bool,
    programs: Vec<(String, PathBuf)>,
    files: Vec<(String, PathBuf)>,
    variables: Vec<(String, String)>,
}

/// What came of it.
#[derive(Debug)]
pub struct Ended {
    /// The exit status of the program.
    pub status: i32,
    /// What it said, on both outputs.
    pub output: String,
    /// What the machine said.
    pub console: String,
    /// The files that it left in `/out`.
    pub files: tempfile::TempDir,
}

impl Default for Machine {
    fn default() -> Self {
        Self::new()
    }
}

impl Machine {
    /// With two blank disks of 512 MiB, without udev.
    pub fn new() -> Self {
        Self {
            disks: vec![512 << 20; 2],
            memory_mib: 1024,
            deadline: Duration::from_secs(1200),
            udev: false,
            programs: Vec::new(),
            files: Vec::new(),
            variables: Vec::new(),
        }
    }

    /// With disks of these sizes, in bytes; they are sparse.
    #[must_use]
    pub fn disks(mut self, sizes: impl IntoIterator<Item = u64>) -> Self {
        self.disks = sizes.into_iter().collect();
        self
    }

    /// With so much memory; what is put into the machine lies in it too.
    #[must_use]
    pub fn memory_mib(mut self, memory: u32) -> Self {
        self.memory_mib = memory;
        self
    }

    /// Within which the program must have ended.
    #[must_use]
    pub fn deadline(mut self, deadline: Duration) -> Self {
        self.deadline = deadline;
        self
    }

    /// With a real udev, which makes the links of volumes; otherwise lvm makes them itself.
    #[must_use]
    pub fn udev(mut self, udev: bool) -> Self {
        self.udev = udev;
        self
    }

    /// Puts a program into the machine, as `/t/NAME`, with the libraries that it is linked with.
    #[must_use]
    pub fn program(mut self, name: &str, program: &Path) -> Self {
        self.programs.push((name.to_owned(), program.to_owned()));
        self
    }

    /// Puts a file into the machine, by its absolute path there.
    #[must_use]
    pub fn file(mut self, at: &str, file: &Path) -> Self {
        self.files.push((at.trim_start_matches('/').to_owned(), file.to_owned()));
        self
    }

    /// Sets a variable of the program's environment.
    #[must_use]
    pub fn variable(mut self, name: &str, value: &str) -> Self {
        self.variables.push((name.to_owned(), value.to_owned()));
        self
    }

    /// Boots it, runs a line of shell in it, and gives what came of that.
    ///
    /// # Errors
    /// What is missing here and which script installs it; that it did not end in time, with what was said
    /// until then.
    pub fn run(&self, command: &str) -> Result<Ended> {
        let built = build::get()?;
        let work = tempfile::Builder::new().prefix("run-").tempdir_in(built.dir())?;
        let dir = work.path();
        self.write_initrd(&build::initrd(built.dir()), command, dir)?;
        for (number, size) in self.disks.iter().enumerate() {
            fs::File::create(dir.join(format!("pv{number}")))?.set_len(*size)?;
        }
        fs::File::create(dir.join("out"))?.set_len(OUT_BYTES)?;
        let mut qemu = Kill(
            self.qemu(&build::kernel(built.dir()), dir)
                .spawn()
                .with_context(|| format!("qemu-system-x86_64 cannot be started: {DEPS}"))?,
        );
        let until = Instant::now() + self.deadline;
        let read = |name: &str| -> String {
            fs::read(dir.join(name))
                .map(|bytes| String::from_utf8_lossy(&bytes).replace('\r', ""))
                .unwrap_or_default()
        };
        loop {
            if qemu.0.try_wait()?.is_some() {
                break;
            }
            if Instant::now() > until {
                bail!(
                    "the machine with lvm2 did not end within {:?}; its program said:\n{}\nits console:\n{}",
                    self.deadline,
                    read("output"),
                    read("console")
                );
            }
            thread::sleep(LOOK);
        }
        let console = read("console");
        let status = console
            .rsplit_once("LVMGUEST-DONE status=")
            .and_then(|(_, rest)| rest.split_whitespace().next()?.parse().ok());
        let Some(status) = status else {
            let mut said = String::new();
            if let Some(stderr) = &mut qemu.0.stderr {
                stderr.read_to_string(&mut said)?;
            }
            bail!(
                "the machine with lvm2 ended before its program did; QEMU said: {}\nits program:\n{}\nits console:\n{console}",
                said.trim(),
                read("output")
            );
        };
        let files = tempfile::tempdir()?;
        run(
            Command::new("tar").arg("-C").arg(files.path()).arg("-xf").arg(dir.join("out")),
            "the machine left no files",
        )?;
        Ok(Ended { status, output: read("output"), console, files })
    }

    /// The built file system, and behind it an archive with what this run has of its own: the kernel unpacks
    /// both.
    fn write_initrd(&self, built: &Path, command: &str, dir: &Path) -> Result<()> {
        let mut archive = Archive::new();
        let variables: String =
            self.variables.iter().map(|(name, value)| format!("export {name}='{value}'\n")).collect();
        if !self.udev {
            archive.file("etc/lvm/lvm.conf", LVM_CONF.as_bytes(), false);
        }
        archive.file("t/command", format!("cd /vm\n{variables}{command}\n").as_bytes(), false);
        for (name, program) in &self.programs {
            let stripped = dir.join("stripped");
            run(
                Command::new("strip").arg("-o").arg(&stripped).arg(program),
                "it is part of binutils: run scripts/install-deps",
            )?;
            archive.file(&format!("t/{name}"), &fs::read(&stripped)?, true);
            for library in libraries(program)? {
                let name = library.to_string_lossy().trim_start_matches('/').to_owned();
                // Debian's directories are links into usr, which the built file system has.
                let name = match name.starts_with("lib") {
                    true => format!("usr/{name}"),
                    false => name,
                };
                archive.file(&name, &fs::read(&library)?, true);
            }
        }
        for (at, file) in &self.files {
            let bytes = fs::read(file).with_context(|| format!("{} cannot be read", file.display()))?;
            archive.file(at, &bytes, false);
        }
        let mut all = fs::read(built).with_context(|| format!("{} cannot be read", built.display()))?;
        all.extend(archive.finish());
        Ok(fs::write(dir.join("initrd"), all)?)
    }

    fn qemu(&self, kernel: &Path, dir: &Path) -> Command {
        let path = env::var("PATH").unwrap_or_default();
        let mut qemu = preferred("qemu-system-x86_64");
        qemu.env("PATH", path).stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::piped());
        // One processor: with two, an emulated kernel spends a third of its time on their agreement. A plain
        // one: with all that QEMU can emulate (five levels of page tables, protection of pages from the
        // kernel, wide vectors) the same work takes an eighth longer.
        qemu.args(["-machine", "pc", "-accel", "tcg", "-cpu", "qemu64,+rdrand", "-smp", "1"]);
        qemu.arg("-m").arg(self.memory_mib.to_string());
        qemu.args(["-nodefaults", "-no-user-config", "-display", "none", "-no-reboot"]);
        qemu.arg("-kernel").arg(kernel).arg("-initrd").arg(dir.join("initrd"));
        let udev = u8::from(self.udev);
        qemu.arg("-append").arg(format!(
            "console=ttyS0 quiet panic=-1 mitigations=off random.trust_cpu=on no_timer_check init_on_alloc=0 \
             rcupdate.rcu_expedited=1 lvmguest.udev={udev}"
        ));
        for name in ["console", "output"] {
            qemu.arg("-serial").arg(format!("file:{}", dir.join(name).display()));
        }
        let disks = (0..self.disks.len()).map(|number| format!("pv{number}")).chain(["out".to_owned()]);
        for name in disks {
            let file = dir.join(&name);
            qemu.arg("-drive").arg(format!(
                "if=none,id={name},format=raw,file={},cache=unsafe,discard=unmap",
                file.display()
            ));
            qemu.arg("-device").arg(format!("virtio-blk-pci,drive={name},serial={name}"));
        }
        qemu
    }
}

/// A process that does not outlive this.
struct Kill(Child);

impl Drop for Kill {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// The libraries that a program of this machine's kind is linked with, by their paths here.
fn libraries(program: &Path) -> Result<Vec<PathBuf>> {
    let listed = run(Command::new("ldd").arg(program), "it is part of libc-bin")?;
    if let Some(missing) = listed.lines().find(|line| line.contains("not found")) {
        bail!("{} wants a library that is not here: {}", program.display(), missing.trim());
    }
    let path = |line: &str| line.split_whitespace().find(|word| word.starts_with('/')).map(PathBuf::from);
    Ok(listed.lines().filter_map(path).collect())
}
