//! [`Guest`]: one that runs.

use std::{
    collections::BTreeSet,
    ffi::OsString,
    fs::{self, File},
    os::unix::ffi::OsStrExt,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    sync::{Mutex, PoisonError},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail, ensure};
use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;
use tempfile::TempDir;

use crate::{
    cache::Built,
    channel::{Channel, Status, field, number},
    generic, monitor,
    options::{GuestOptions, Vhd},
    process,
    qemu::{Qemu, targets},
    state,
};

const LOOK: Duration = Duration::from_millis(5);

/// How long a process that was killed may take to be gone.
const DEATH: Duration = Duration::from_secs(120);

/// What a command in the guest's shell did.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct ShellOutput {
    /// Its exit status; 128 and the signal where it was killed.
    pub status: i32,
    /// Its standard output, at most 96 KiB of it.
    pub stdout: Vec<u8>,
}

impl ShellOutput {
    /// Reads the answer of the guest's program.
    pub(crate) fn of(answer: &str) -> Result<Self> {
        let digits = field(answer, "output")?.as_bytes();
        let byte = |pair: &[u8]| u8::from_str_radix(std::str::from_utf8(pair).ok()?, 16).ok();
        let stdout: Option<Vec<u8>> = digits.chunks(2).map(byte).collect();
        let stdout = stdout.with_context(|| format!("the guest's shell answered {answer:?}"))?;
        Ok(Self { status: number(answer, "status")?.try_into()?, stdout })
    }
}

/// A guest that runs in a QEMU, with its sockets and disks in a directory of its own. Dropping it kills the
/// QEMU and removes the directory.
///
/// The guest belongs to the directory, not to the process: another QEMU that is started with the same sockets
/// (a cold start from a memory image, a restart by a supervisor) is heard, asked, and killed in the end just
/// as the first one.
pub struct Guest {
    // In this order: the reader ends, then what it reads.
    channel: Channel,
    child: Child,
    dir: TempDir,
    socket: PathBuf,
    agent: PathBuf,
    options: GuestOptions,
    line: Vec<OsString>,
    /// The processes that were found to be its own: one that is ending has no command line any more.
    seen: Mutex<BTreeSet<u32>>,
    _built: Built,
}

impl Guest {
    /// One with the default options: two disks of 64 MiB, QEMU 10.0.
    ///
    /// # Errors
    /// As [`GuestOptions::start`].
    pub fn new() -> Result<Self> {
        GuestOptions::default().start()
    }

    pub(crate) fn start(options: GuestOptions) -> Result<Self> {
        let built = Built::get()?;
        if options.generic {
            generic::get(&built)?;
        }
        let qemu = Qemu::find(options.version)?;
        // Before the guest's own directory is made: another guest may have to be booted for it.
        let state = match &options.kept {
            Some(kept) => Some(kept.clone()),
            None if options.boot => None,
            None if options.served.is_empty() && options.vhds.is_empty() => {
                Some(state::get(&options, &built)?)
            }
            None => Some(state::get(&options.of_files(), &built)?),
        };

        let parent = options.parent.clone().unwrap_or_else(std::env::temp_dir);
        let dir = tempfile::Builder::new().prefix("domsnap-guest-").tempdir_in(&parent);
        let dir = dir.with_context(|| format!("no directory can be made in {}", parent.display()))?;
        let text = dir.path().to_str().context("the directory for temporary files has no UTF-8 name")?;
        let line = qemu.command_line(&options, built.dir(), text)?;
        let (socket, agent) = (dir.path().join("qmp"), dir.path().join("agent"));
        for (number, (target, format, disk)) in options.formats(dir.path()).into_iter().enumerate() {
            let served = options.server(number);
            let vhd = options.vhd_of(number);
            let format = if served.is_some() || vhd.is_some() { "raw" } else { format };
            let image = match &state {
                Some(state) => state.join(format!("{target}.{format}")),
                None => blank(&built, options.disk_mib, format)?,
            };
            let subformat = match (served, vhd) {
                (None, None) => None,
                (None, Some(Vhd::Fixed)) => Some("fixed"),
                _ => Some("dynamic"),
            };
            match subformat {
                None => fill(&image, &disk)?,
                Some(kind) => {
                    let mut convert = Command::new("qemu-img");
                    convert.args(["convert", "-f", "raw", "-O", "vpc", "-o"]);
                    convert.arg(format!("force_size=on,subformat={kind}")).arg(&image).arg(&disk);
                    process::run(&mut convert, "run scripts/install-deps")?;
                }
            }
            if let Some(served) = served {
                (served.serve)(&disk, &disk.with_extension("sock"))?;
            }
        }

        for (name, content) in &options.files {
            fs::write(dir.path().join(name), content)?;
        }

        let more = state.iter().flat_map(|_| state::incoming()).collect::<Vec<_>>();
        let child = spawn(&line, &more, dir.path())?;
        let channel = Channel::open(&dir.path().join("witness"));
        let seen = Mutex::new(BTreeSet::from([child.id()]));
        let guest = Self { channel, child, dir, socket, agent, options, line, seen, _built: built };
        let ready = match &state {
            None => guest.await_boot(1),
            Some(state) => guest.go_on_from(state),
        };
        ready.with_context(|| guest.last_output())?;
        Ok(guest)
    }

    fn go_on_from(&self, state: &Path) -> Result<()> {
        let until = Instant::now() + self.options.deadline;
        state::restore(&self.options, &self.socket, state)?;
        self.channel.wait_connected(until).context("QEMU does not open the guest's port")?;
        self.qmp("cont", Value::Null)?;
        self.wait_ticks(1)
    }

    fn await_boot(&self, boots: u64) -> Result<()> {
        let until = Instant::now() + self.options.deadline;
        while self.channel.wait_boots(boots, until.min(Instant::now() + 20 * LOOK)).is_none() {
            ensure!(!self.processes().is_empty(), "QEMU has ended before the guest was ready");
            ensure!(Instant::now() < until, "the guest was not ready within {:?}", self.options.deadline);
        }
        self.wait_ticks(1)
    }

    /// What is there to read about a failure.
    fn last_output(&self) -> String {
        let tail = |text: String| text.lines().rev().take(12).map(str::to_owned).collect::<Vec<_>>();
        let lines = |text| tail(text).into_iter().rev().collect::<Vec<_>>().join("\n  ");
        let said = fs::read_to_string(self.dir.path().join("stderr")).unwrap_or_default();
        let bad = self.bad().join("\n  ");
        format!(
            "the test guest in {} failed\n its witness: {bad}\n QEMU said: {}\n its console:\n  {}",
            self.dir.path().display(),
            lines(said),
            lines(self.console())
        )
    }

    // What it is.

    /// The directory with its sockets and disks.
    pub fn dir(&self) -> &Path {
        self.dir.path()
    }

    /// The QMP socket. It is free between two calls of this type.
    pub fn qmp_socket(&self) -> &Path {
        &self.socket
    }

    /// The guest agent's socket.
    pub fn agent_socket(&self) -> &Path {
        &self.agent
    }

    /// The names of its disks: `vda`, `vdb`, ... These are also the ids of their devices, and the directories
    /// under which the guest has them mounted.
    pub fn targets(&self) -> Vec<String> {
        targets(self.options.disks).collect()
    }

    /// The configured paths of its disks, `DIR/vda.qcow2` (or `.raw`) and so on.
    pub fn disks(&self) -> Vec<PathBuf> {
        disks(self.dir.path(), &self.options)
    }

    /// The configured path of one disk, from 0.
    pub fn disk(&self, number: usize) -> PathBuf {
        self.disks().swap_remove(number)
    }

    /// The arguments that boot it, the program first. (The process itself has `-incoming defer` beside them,
    /// unless it was booted.)
    pub fn command_line(&self) -> &[OsString] {
        &self.line
    }

    /// The process that runs it: the one that was started here, or another QEMU that was started on the same
    /// directory.
    pub fn pid(&self) -> Option<u32> {
        self.processes().first().copied()
    }

    /// Every QEMU whose command line names this directory, until it has let go of its files.
    pub fn processes(&self) -> Vec<u32> {
        let mut seen = self.seen.lock().unwrap_or_else(PoisonError::into_inner);
        let mut found = qemus_of(self.dir.path(), &seen);
        seen.extend(&found);
        found.sort_by_key(|&pid| (pid != self.child.id(), pid));
        found
    }

    /// All that the guest's kernel and first process have said on the serial console.
    pub fn console(&self) -> String {
        String::from_utf8_lossy(&fs::read(self.dir.path().join("console")).unwrap_or_default()).into_owned()
    }

    // What it says.

    /// The counter, by the guest's own answer.
    ///
    /// # Errors
    /// When the guest does not answer within the deadline: it is paused, frozen, or gone.
    pub fn ticks(&self) -> Result<u64> {
        Ok(self.status()?.ticks)
    }

    /// Another deadline than [`GuestOptions::deadline`] from now on.
    pub fn set_deadline(&mut self, deadline: Duration) {
        self.options.deadline = deadline;
    }

    /// What the guest's program says of itself.
    ///
    /// # Errors
    /// As [`Guest::ticks`].
    pub fn status(&self) -> Result<Status> {
        self.channel.status(self.options.deadline)
    }

    /// The counter when it was last heard of, whether the guest runs or not.
    pub fn last_tick(&self) -> Option<u64> {
        self.channel.last_tick()
    }

    /// Waits until the guest has ticked so often from now on.
    ///
    /// # Errors
    /// As [`Guest::ticks`].
    pub fn wait_ticks(&self, ticks: u64) -> Result<()> {
        self.channel.wait_ticks(ticks, self.options.deadline)
    }

    /// The guest runs, has looked again (three ticks), and has not once found its memory and disks to be of
    /// different instants, nor met an I/O error, since it was started or [`Guest::forget_bad`] was called.
    ///
    /// # Errors
    /// With what it found; as [`Guest::ticks`].
    pub fn expect_no_bad(&self) -> Result<()> {
        self.wait_ticks(3)?;
        let bad = self.bad();
        match bad.len() {
            0 => Ok(()),
            count => bail!(
                "the guest found its memory and disks wrong {count} times: {}",
                bad[..count.min(8)].join("; ")
            ),
        }
    }

    /// Every line with which the guest said that something is wrong. Heard by this process, so no revert
    /// takes them back.
    pub fn bad(&self) -> Vec<String> {
        self.channel.bad()
    }

    /// For tests that break something on purpose.
    pub fn forget_bad(&self) {
        self.channel.forget_bad();
    }

    /// The longest time between two ticks since the start or the last [`Guest::forget_gap`], by the clock of
    /// this machine: the pause of the guest, the rest between ticks and the disks' flushes included.
    /// The time since the last tick counts too.
    pub fn largest_gap(&self) -> Duration {
        self.channel.gap()
    }

    /// Measures the longest time between two ticks from now on.
    pub fn forget_gap(&self) {
        self.channel.forget_gap();
    }

    /// How often the guest was heard to boot. A guest that was restored has not.
    pub fn boots(&self) -> u64 {
        self.channel.boots()
    }

    /// Waits for the guest's boot of that number, and for a tick after it.
    ///
    /// # Errors
    /// When QEMU ends or the deadline is over before.
    pub fn wait_boots(&self, boots: u64) -> Result<()> {
        self.await_boot(boots).with_context(|| self.last_output())
    }

    /// The counters that the guest found on its disks at its last boot; none for one that was not whole. (It
    /// says BAD itself when they cannot be of one instant.)
    pub fn counters_at_boot(&self) -> Vec<Option<u64>> {
        self.channel.counters()
    }

    // What it does.

    /// Gives the guest's program a command (`src-guest/witness.c` has them), and returns its answer without
    /// the "ok".
    ///
    /// # Errors
    /// What the guest answered instead; as [`Guest::ticks`].
    pub fn command(&self, command: &str) -> Result<String> {
        ensure!(!command.contains('\n'), "a command of the guest's is one line, not {command:?}");
        self.channel.ask(command, self.options.deadline)
    }

    /// Runs a line of shell in the guest.
    ///
    /// # Errors
    /// As [`Guest::command`]; a status that is not 0 is none.
    pub fn shell(&self, line: &str) -> Result<ShellOutput> {
        ShellOutput::of(&self.command(&format!("sh {line}"))?)
    }

    /// Memory load: so many MiB of its own are written at so many MiB a second, page after page; rate 0 is as
    /// fast as it can, 0 MiB ends it. The memory is filled before this returns.
    ///
    /// # Errors
    /// As [`Guest::command`].
    pub fn dirty(&self, mib: u64, mib_per_second: f64) -> Result<()> {
        self.command(&format!("dirty {mib} {mib_per_second}")).map(drop)
    }

    /// Disk load: random blocks of 4 KiB, among so many a disk, are written so often a second, each with a
    /// generation that the guest's memory knows and that is read back; rate 0 is as fast as it can, 0 blocks
    /// end it.
    ///
    /// # Errors
    /// As [`Guest::command`].
    pub fn blocks(&self, count: u64, per_second: f64) -> Result<()> {
        self.command(&format!("blocks {count} {per_second}")).map(drop)
    }

    /// Reads all blocks of the disk load and compares them with what the guest's memory knows; gives their
    /// number.
    ///
    /// # Errors
    /// When one is wrong; as [`Guest::command`].
    pub fn verify_blocks(&self) -> Result<u64> {
        let answer = self.command("verify")?;
        match number(&answer, "wrong")? {
            0 => number(&answer, "checked"),
            _ => bail!("blocks are not what the guest has written ({answer}): {}", self.bad().join("; ")),
        }
    }

    /// Stops ticking, between two ticks: memory and all disks have the counter that this gives, until
    /// [`Guest::go_on`]. The loads, if there are any, run on.
    ///
    /// # Errors
    /// As [`Guest::command`].
    pub fn hold(&self) -> Result<u64> {
        number(&self.command("hold")?, "ticks")
    }

    /// Ticks again.
    ///
    /// # Errors
    /// As [`Guest::command`].
    pub fn go_on(&self) -> Result<()> {
        self.command("go").map(drop)
    }

    /// Where on a disk its counter is, in bytes: with [`counter`](crate::counter) the counter of any image or
    /// snapshot of that disk can be read from outside.
    ///
    /// # Errors
    /// As [`Guest::command`].
    pub fn counter_offset(&self, disk: usize) -> Result<u64> {
        number(&self.command(&format!("offset {disk}"))?, "offset")
    }

    /// Flushes the guest's file systems.
    ///
    /// # Errors
    /// As [`Guest::command`].
    pub fn sync(&self) -> Result<()> {
        self.command("sync").map(drop)
    }

    /// Shuts the guest down; its QEMU ends.
    ///
    /// # Errors
    /// As [`Guest::command`]; when QEMU does not end.
    pub fn quit(&mut self) -> Result<()> {
        self.command("quit")?;
        self.wait_end()
    }

    // What is done to it.

    /// Runs one QMP command over a connection that is closed again.
    ///
    /// # Errors
    /// What QEMU said; or no process serves the socket, or another client holds it until the deadline.
    pub fn qmp(&self, name: &str, arguments: Value) -> Result<Value> {
        monitor::execute(&self.socket, self.options.deadline, name, arguments)
    }

    /// Runs one command of the guest agent's over a connection that is closed again.
    ///
    /// # Errors
    /// What the agent said; or it does not answer.
    pub fn agent(&self, name: &str, arguments: Value) -> Result<Value> {
        monitor::agent(&self.agent, self.options.deadline, name, arguments)
    }

    /// Waits until the guest agent answers: it starts a moment after the rest of a guest that was booted.
    ///
    /// # Errors
    /// When it does not within the deadline.
    pub fn await_agent(&self) -> Result<()> {
        monitor::await_agent(&self.agent, self.options.deadline)
    }

    /// Kills every QEMU of this directory, and waits until they are gone.
    ///
    /// # Errors
    /// When one does not go.
    pub fn kill(&mut self) -> Result<()> {
        let _ = self.child.kill();
        let until = Instant::now() + DEATH;
        loop {
            let _ = self.child.try_wait();
            let alive = self.processes();
            if alive.is_empty() {
                return Ok(());
            }
            ensure!(
                Instant::now() < until,
                "QEMU (process {alive:?}) was killed and is not gone after {DEATH:?}"
            );
            for pid in alive {
                if let Some(pid) = i32::try_from(pid).ok().and_then(Pid::from_raw) {
                    let _ = kill_process(pid, Signal::KILL);
                }
            }
            thread::sleep(LOOK);
        }
    }

    /// Waits until no QEMU of this directory is left.
    ///
    /// # Errors
    /// When one is, after the deadline.
    pub fn wait_end(&mut self) -> Result<()> {
        let until = Instant::now() + self.options.deadline;
        loop {
            let _ = self.child.try_wait();
            let alive = self.processes();
            if alive.is_empty() {
                return Ok(());
            }
            ensure!(
                Instant::now() < until,
                "QEMU (process {alive:?}) has not ended within {:?}",
                self.options.deadline
            );
            thread::sleep(LOOK);
        }
    }

    /// Kills what runs and boots the guest from its disks as they are, as its supervisor would.
    ///
    /// # Errors
    /// As [`GuestOptions::start`].
    pub fn restart(&mut self) -> Result<()> {
        self.kill()?;
        let boots = self.boots();
        self.child = spawn(&self.line, &[], self.dir.path())?;
        self.seen.get_mut().unwrap_or_else(PoisonError::into_inner).insert(self.child.id());
        self.wait_boots(boots + 1)
    }
}

impl Guest {
    /// Kills what runs and boots the guest from other images of its disks, as after a change of its
    /// configuration: each a disk's number, a format of QEMU's and a path.
    ///
    /// # Errors
    /// As [`GuestOptions::start`].
    pub fn restart_on(&mut self, images: &[(usize, &str, &Path)]) -> Result<()> {
        let mut place = 0;
        for word in &mut self.line {
            let Ok(mut node) = serde_json::from_str::<Value>(&word.to_string_lossy()) else { continue };
            let is = |kind: char, number: &usize| node["node-name"] == format!("{kind}{number}");
            if let Some((_, _, path)) = images.iter().find(|(number, ..)| is('f', number)) {
                node["filename"] = Value::from(path.to_string_lossy().into_owned());
            } else if let Some((_, format, _)) = images.iter().find(|(number, ..)| is('d', number)) {
                node["driver"] = Value::from(*format);
                node.as_object_mut().and_then(|node| node.remove("size"));
                place += 1;
            } else {
                continue;
            }
            *word = node.to_string().into();
        }
        ensure!(place == images.len(), "the command line has {place} of the disks {images:?}");
        self.restart()
    }
}

impl Drop for Guest {
    fn drop(&mut self) {
        if let Err(error) = self.kill() {
            eprintln!("testguest: {error}");
        }
    }
}

impl std::fmt::Debug for Guest {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Guest").field("dir", &self.dir.path()).field("processes", &self.processes()).finish()
    }
}

/// The QEMUs of a directory; of those that are ending, the ones that are known already.
fn qemus_of(dir: &Path, known: &BTreeSet<u32>) -> Vec<u32> {
    let dir = dir.as_os_str().as_bytes();
    let entries = fs::read_dir("/proc").into_iter().flatten().flatten();
    let pids = entries.filter_map(|entry| entry.file_name().to_str()?.parse::<u32>().ok());
    let ours = |&pid: &u32| {
        let read = |name| fs::read(format!("/proc/{pid}/{name}")).unwrap_or_default();
        let line = read("cmdline");
        let named = line.windows(dir.len()).any(|part| part == dir);
        read("comm").starts_with(b"qemu-system")
            && (named || line.is_empty() && known.contains(&pid))
            && !ended(pid)
    };
    pids.filter(ours).collect()
}

/// Whether a process has let go of its files, and only waits for its parent to hear of it: until the last of
/// its threads is gone it holds the locks of its images.
fn ended(pid: u32) -> bool {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    let state = stat.rsplit_once(") ").map_or("X", |(_, rest)| rest);
    let threads = fs::read_dir(format!("/proc/{pid}/task")).map_or(0, Iterator::count);
    state.starts_with(['Z', 'X']) && threads <= 1
}

fn disks(dir: &Path, options: &GuestOptions) -> Vec<PathBuf> {
    options.formats(dir).into_iter().map(|(_, _, path)| path).collect()
}

/// Copies an image over a disk, which may be a device.
fn fill(image: &Path, disk: &Path) -> Result<()> {
    let mut to = File::options().write(true).create(true).truncate(false).open(disk)?;
    std::io::copy(&mut File::open(image)?, &mut to)?;
    Ok(to.sync_all()?)
}

fn spawn(line: &[OsString], more: &[OsString], dir: &Path) -> Result<Child> {
    let said = File::options().create(true).append(true).open(dir.join("stderr"))?;
    let mut command = Command::new(&line[0]);
    command.args(&line[1..]).args(more).stdin(Stdio::null()).stdout(said.try_clone()?).stderr(said);
    command.spawn().with_context(|| format!("{} cannot be started", Path::new(&line[0]).display()))
}

/// An image with an empty ext4 file system.
fn blank(built: &Built, mib: u64, format: &str) -> Result<PathBuf> {
    let raw = built.once(&format!("blank-{mib}.raw"), |image| {
        File::create(image)?.set_len(mib << 20)?;
        let mut mkfs = Command::new("mkfs.ext4");
        // Blocks as large as the witness's: one that is written when QEMU is killed is written or is not, and
        // never half.
        mkfs.args(["-q", "-F", "-b", "4096", "-m", "0", "-E", "lazy_itable_init=0,nodiscard"]).arg(image);
        process::run(&mut mkfs, "run scripts/install-deps").map(drop)
    })?;
    if format == "raw" {
        return Ok(raw);
    }
    built.once(&format!("blank-{mib}.{format}"), |image| {
        let mut convert = Command::new("qemu-img");
        convert.args(["convert", "-f", "raw", "-O", format]).arg(&raw).arg(image);
        process::run(&mut convert, "run scripts/install-deps").map(drop)
    })
}
