//! [`Starting`]: a QEMU between its start and the moment in which it is handed over.
//!
//! A QEMU that waits for a guest's memory is of no use to anyone but the process that started it. If that is
//! killed, the QEMU would wait for ever, paused and with the domain's files in its command. So a recovery
//! must find exactly this process, and end it.
//!
//! **What is known before what.**
//!
//! 1. A note, in a directory of this user alone that does not survive a reboot: the domain's address, and a
//!    random token. It is locked as long as the process that starts the QEMU lives.
//! 2. The QEMU is started with the token in its environment. Whatever it forks or executes keeps it.
//! 3. Before a guest that is reverted may run, the note says `ready`: from now on its disks may be written,
//!    and what was started must not be ended any more.
//! 4. The note is removed: the QEMU is handed over.
//!
//! The environment, because it is there from the first instruction on, survives a `-daemonize`, and is no
//! other process's: a process number may be another one's by now, and a name or a socket in a command can be
//! chosen by anyone. The lock, because a process that was forked and has not executed the program yet has
//! the note open, and the environment of the process that was killed. The signal goes through a descriptor of
//! the process, after its environment was read again.

use std::{
    fs::{self, File, TryLockError},
    io::{self, ErrorKind as Io, Read, Seek, Write},
    path::{Path, PathBuf},
    thread::sleep,
    time::{Duration, Instant},
};

use confined_files::{Directory, FileName, Kind};
use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};
use snapcore::Result;

use super::{
    GREETING,
    error::{blocking, to_engine},
    reach,
    section::{is_alive, quit, start_of},
};
use crate::error::{Error, ErrorKind};

/// The variable of the environment that has the token.
const VARIABLE: &str = "DOMSNAP_START";

/// The token of a load into a QEMU that runs: no process has it.
const IN_PLACE: &str = "in place";

/// Bytes of a note, at most: an address, a token, a word.
const LONGEST: u64 = 64 << 10;

/// Time limit of a lock of a process that was killed, and of the end of a process that was.
const ENDING: Duration = Duration::from_secs(10);

/// Time limit until a process that is executing its program shows its environment.
const EXECUTING: Duration = Duration::from_millis(200);

/// Time between two looks.
const LOOK: Duration = Duration::from_millis(5);

const ATTEMPTED: &str = "looking for an interrupted start";

/// A QEMU that is being started. Dropping it removes the note: the process was ended, or handed over. The
/// note of a load in place stays if that failed before the guest could run.
#[derive(Debug)]
pub(super) struct Starting {
    note: Note,
    token: String,
    stays: bool,
}

impl Starting {
    /// Notes that the domain at an address is about to be started. What an interrupted start has left of it
    /// is ended before.
    ///
    /// # Errors
    /// [`ErrorKind::Invalid`] if another process starts it at this moment; those of the system.
    pub(super) fn begin(address: &Path) -> crate::Result<Self> {
        let address = address.display().to_string();
        let mut note = Note::make(&address)?;
        if let Some(left) = note.read()?.filter(|left| !left.is_ready) {
            end_all(&left.token).map_err(|error| failed(&address, error))?;
        }
        let token = uuid::Uuid::new_v4().to_string();
        note.write(&token)?;
        Ok(Self { note, token, stays: false })
    }

    /// Returns true if a start of the domain at an address was interrupted when its guest could run. Its
    /// disks may be newer than the memory. Its note is removed.
    pub(super) fn has_run(address: &Path) -> crate::Result<bool> {
        let address = address.display().to_string();
        let Some(mut note) = Note::open(&address, false)? else { return Ok(false) };
        let has_run = note.read()?.is_some_and(|left| left.is_ready && left.token != IN_PLACE);
        if has_run {
            note.remove();
        }
        Ok(has_run)
    }

    /// Notes that memory is about to be loaded into a running QEMU at an address. [`Starting::ready`] notes
    /// that the guest may run.
    pub(super) fn in_place(address: &Path) -> crate::Result<Self> {
        let address = address.display().to_string();
        let mut note = Note::make(&address)?;
        note.write(IN_PLACE)?;
        Ok(Self { note, token: IN_PLACE.to_owned(), stays: true })
    }

    /// Returns true if a load into a QEMU at an address, which has ended since, was interrupted when the
    /// guest could run; `None` if there is no note of one. The note is removed.
    pub(super) fn may_have_run_in_place(address: &Path) -> crate::Result<Option<bool>> {
        let address = address.display().to_string();
        let Some(mut note) = Note::open(&address, false)? else { return Ok(None) };
        let may_have_run = note.read()?.filter(|left| left.token == IN_PLACE).map(|left| left.is_ready);
        note.remove();
        Ok(may_have_run)
    }

    /// The variable that its environment must have.
    pub(super) fn variable(&self) -> (&'static str, &str) {
        (VARIABLE, &self.token)
    }

    /// Notes that its guest may run from now on: a recovery leaves the process alone, and resumes the guest.
    pub(super) fn ready(&mut self) -> crate::Result<()> {
        self.stays = false;
        self.note.append(READY)
    }

    /// Ends every process of this start.
    pub(super) fn end(&self) -> io::Result<()> {
        end_all(&self.token).map(drop)
    }
}

impl Drop for Starting {
    fn drop(&mut self) {
        if !self.stays {
            self.note.remove();
        }
    }
}

/// Ends what an interrupted start of the domain at an address has left, or completes it if its guest may have
/// run. Returns a message.
pub(super) async fn recover(address: &Path) -> Result<Option<String>> {
    let shown = address.display().to_string();
    let named = shown.clone();
    let found = blocking(move || {
        let Some(mut note) = Note::open(&named, false)? else { return Ok(None) };
        let Some(left) = note.read()? else {
            // It was made, and nothing was started.
            note.remove();
            return Ok(None);
        };
        let ended = match left.is_ready || left.token == IN_PLACE {
            true => Vec::new(),
            false => end_all(&left.token).map_err(|error| failed(&named, error))?,
        };
        Ok(Some((note, left, ended)))
    });
    let Some((note, left, ended)) = found.await? else { return Ok(None) };
    if let [first, ..] = ended[..] {
        note.remove();
        return Ok(Some(format!(
            "a start of the domain was interrupted: its QEMU, process {first}, was ended"
        )));
    }
    // By a command of the user's own, another process may have started the QEMU, such as a service manager.
    let machine = reach(address, GREETING).await?;
    let Some(machine) = machine else {
        if left.token == IN_PLACE {
            // The recovery of the revert asks for it (`Starting::may_have_run_in_place`).
            return Ok(None);
        }
        if left.is_ready {
            // It stays: a start that is repeated must not load the memory again (`Starting::has_run`).
            return Ok(Some(format!(
                "a start of the domain was interrupted when its guest could run, and nothing answers at {shown} now"
            )));
        }
        note.remove();
        return Ok(None);
    };
    if left.token == IN_PLACE {
        // The marks in QEMU say how far it got.
        note.remove();
        return Ok(None);
    }
    let state = machine.run_state().await.map_err(to_engine)?;
    let message = match (left.is_ready, state.word.as_str()) {
        (false, "inmigrate") => {
            quit(&machine).await?;
            Some(format!(
                "a start of the domain was interrupted: the QEMU at {shown}, which waited for its memory, was ended"
            ))
        }
        (true, "paused" | "prelaunch") => {
            machine.cont().await.map_err(to_engine)?;
            Some("a start of the domain was interrupted: its guest was resumed".to_owned())
        }
        _ => None,
    };
    note.remove();
    Ok(message)
}

/// The last line of a note whose guest may run.
const READY: &str = "ready\n";

/// A note, open and locked.
#[derive(Debug)]
struct Note {
    directory: Directory,
    name: FileName,
    file: File,
    address: String,
}

/// The content of a note.
struct Left {
    token: String,
    is_ready: bool,
}

impl Note {
    /// Opens the note about an address, and waits for its lock; nothing if it does not exist and is not to be
    /// made.
    fn open(address: &str, make: bool) -> crate::Result<Option<Self>> {
        let failed = |error| failed(address, error);
        let Some(directory) = directory(make).map_err(failed)? else { return Ok(None) };
        let name = FileName::new(format!("start-{:016x}", fnv(address.as_bytes())))
            .map_err(|error| failed(io::Error::other(error)))?;
        let until = Instant::now() + ENDING;
        loop {
            let file = match directory.open_file(&name, true, Kind::Regular) {
                Ok(file) => file,
                Err(error) if error.kind() == Io::NotFound && !make => return Ok(None),
                Err(error) if error.kind() == Io::NotFound => match directory.create_new(&name, 0o600) {
                    Ok(file) => file,
                    // Another process has made it just now.
                    Err(error) if error.kind() == Io::AlreadyExists => continue,
                    Err(error) => return Err(failed(error)),
                },
                Err(error) => return Err(failed(error)),
            };
            match file.try_lock() {
                Ok(()) if is_named(&directory, &name, &file).map_err(failed)? => {
                    let address = address.to_owned();
                    return Ok(Some(Self { directory, name, file, address }));
                }
                // Its start has ended, and it lost its name.
                Ok(()) => {}
                // Of a process that starts the domain, or is about to execute the program.
                Err(TryLockError::WouldBlock) if Instant::now() < until => sleep(LOOK),
                Err(TryLockError::WouldBlock) => {
                    let detail = "another domsnap is starting the domain at this moment";
                    return Err(Error::new(ErrorKind::Invalid, ATTEMPTED, address, detail)
                        .advise("wait until it has ended, and run the command again"));
                }
                Err(TryLockError::Error(error)) => return Err(failed(error)),
            }
        }
    }

    /// The note of a domain, which is made if there is none.
    fn make(address: &str) -> crate::Result<Self> {
        Self::open(address, true)?.ok_or_else(|| failed(address, io::Error::from(Io::NotFound)))
    }

    /// Its content; nothing if it was not completed, so that nothing was started.
    fn read(&mut self) -> crate::Result<Option<Left>> {
        let mut text = String::new();
        let read = self.file.rewind().and_then(|()| (&self.file).take(LONGEST).read_to_string(&mut text));
        read.map_err(|error| failed(&self.address, error))?;
        let mut lines = text.split_inclusive('\n');
        let (Some(address), Some(token)) = (lines.next(), lines.next()) else { return Ok(None) };
        let (Some(address), Some(token)) = (address.strip_suffix('\n'), token.strip_suffix('\n')) else {
            return Ok(None);
        };
        if address != self.address {
            let detail = format!("the note {} is about {address}", self.path().display());
            return Err(failed(&self.address, io::Error::other(detail)));
        }
        // Half of the word is enough: it is written before the guest runs.
        Ok(Some(Left { token: token.to_owned(), is_ready: lines.next().is_some() }))
    }

    fn write(&mut self, token: &str) -> crate::Result<()> {
        let text = format!("{}\n{token}\n", self.address);
        let written = self.file.set_len(0).and_then(|()| self.file.rewind());
        let written = written.and_then(|()| self.file.write_all(text.as_bytes()));
        written.map_err(|error| failed(&self.address, error))
    }

    fn append(&mut self, word: &str) -> crate::Result<()> {
        let written = self.file.seek(io::SeekFrom::End(0));
        let written = written.and_then(|_| self.file.write_all(word.as_bytes()));
        written.map_err(|error| failed(&self.address, error))
    }

    /// Removes it, under its lock.
    fn remove(&self) {
        if let Err(error) = self.directory.remove(&self.name) {
            tracing::warn!(%error, note = %self.path().display(), "the note of a start was not removed");
        }
    }

    fn path(&self) -> PathBuf {
        self.directory.path().join(self.name.as_os_str())
    }
}

fn failed(address: &str, error: io::Error) -> Error {
    Error::new(ErrorKind::Io, ATTEMPTED, address, error.to_string()).because(error)
}

/// Returns true if a file still has its name.
fn is_named(directory: &Directory, name: &FileName, file: &File) -> io::Result<bool> {
    use std::os::unix::fs::MetadataExt;
    let about = file.metadata()?;
    Ok(directory.look(name)?.is_some_and(|found| found.identity == (about.dev(), about.ino())))
}

/// The directory of this user's notes, where possible below one in which no other user can make files: there
/// another one could take the name first, and no domain could be started. It is checked anyway.
fn directory(make: bool) -> io::Result<Option<Directory>> {
    let user = rustix::process::geteuid().as_raw();
    let own = if user == 0 { PathBuf::from("/run") } else { PathBuf::from(format!("/run/user/{user}")) };
    let above = [own, PathBuf::from("/dev/shm")].into_iter().find(|above| above.is_dir());
    let path = above.unwrap_or_else(std::env::temp_dir).join(format!("domsnap-{user}"));
    if !make && !path.exists() {
        return Ok(None);
    }
    let directory = Directory::make_all(&path, 0o700)?;
    let about = directory.about()?;
    match about.uid == user && about.mode & 0o077 == 0 {
        true => Ok(Some(directory)),
        false => Err(io::Error::other(format!("{} is not a directory for this user alone", path.display()))),
    }
}

/// A name for an address: FNV-1a of 64 bits. The note has the address itself.
fn fnv(bytes: &[u8]) -> u64 {
    let step = |hash: u64, byte: &u8| (hash ^ u64::from(*byte)).wrapping_mul(0x0000_0100_0000_01b3);
    bytes.iter().fold(0xcbf2_9ce4_8422_2325, step)
}

/// The environment of a process, as far as this user may see it.
enum Environment {
    HasToken,
    Other,
    /// It is executing a program just now.
    NotYet,
}

fn environment_of(pid: u32, wanted: &[u8]) -> Environment {
    match fs::read(format!("/proc/{pid}/environ")) {
        Ok(text) if text.split(|byte| *byte == 0).any(|variable| variable == wanted) => Environment::HasToken,
        // Threads of the kernel and ended processes have no program.
        Ok(text) if text.is_empty() && fs::read_link(format!("/proc/{pid}/exe")).is_ok() => {
            Environment::NotYet
        }
        _ => Environment::Other,
    }
}

/// Ends all processes that have a token in their environment, and waits until they are gone. Returns them.
fn end_all(token: &str) -> io::Result<Vec<u32>> {
    let wanted = format!("{VARIABLE}={token}").into_bytes();
    let own = std::process::id();
    let (begun, mut ended) = (Instant::now(), Vec::new());
    loop {
        let (mut executing, mut killed) = (false, Vec::new());
        for entry in fs::read_dir("/proc")?.flatten() {
            let Some(pid) = entry.file_name().to_str().and_then(|name| name.parse::<u32>().ok()) else {
                continue;
            };
            if pid == own {
                continue;
            }
            match environment_of(pid, &wanted) {
                Environment::Other => {}
                Environment::NotYet => executing = true,
                Environment::HasToken => killed.extend(kill(pid, &wanted)?.map(|start| (pid, start))),
            }
        }
        // One that was killed may have forked another one just before. A program may also have no environment
        // at all.
        let again = !killed.is_empty() || (executing && begun.elapsed() < EXECUTING);
        let until = Instant::now() + ENDING;
        for (pid, start) in killed {
            while is_alive(pid, start) {
                if Instant::now() >= until {
                    let detail = format!("process {pid}, a QEMU whose start was interrupted, does not end");
                    return Err(io::Error::new(Io::TimedOut, detail));
                }
                sleep(LOOK);
            }
            ended.push(pid);
        }
        if !again {
            return Ok(ended);
        }
        sleep(LOOK);
    }
}

/// Kills a process that has a token; returns its start time, or nothing if it has ended.
fn kill(pid: u32, wanted: &[u8]) -> io::Result<Option<Option<u64>>> {
    let Some(number) = i32::try_from(pid).ok().and_then(Pid::from_raw) else { return Ok(None) };
    let process = match pidfd_open(number, PidfdFlags::empty()) {
        Ok(process) => process,
        Err(rustix::io::Errno::SRCH) => return Ok(None),
        Err(error) => return Err(error.into()),
    };
    // The number may have become another process's between the look and the descriptor.
    if !matches!(environment_of(pid, wanted), Environment::HasToken) {
        return Ok(None);
    }
    let start = start_of(pid);
    match pidfd_send_signal(&process, Signal::KILL) {
        Ok(()) => Ok(Some(start)),
        Err(rustix::io::Errno::SRCH) => Ok(None),
        Err(error) => Err(error.into()),
    }
}

#[cfg(test)]
mod tests {
    use std::process::{Child, Command, Stdio};

    use super::*;

    fn child(variable: Option<(&str, &str)>) -> Child {
        let mut command = Command::new("sleep");
        command.arg("1000").envs(variable).stdin(Stdio::null()).spawn().expect("sleep is there")
    }

    fn address() -> PathBuf {
        PathBuf::from(format!("/nowhere/{}/qmp", uuid::Uuid::new_v4()))
    }

    /// Leaves a note as a process that is killed does: it stays, without its lock.
    fn interrupted(starting: Starting) {
        let mut starting = std::mem::ManuallyDrop::new(starting);
        let nothing = File::open("/dev/null").expect("it is there");
        drop(std::mem::replace(&mut starting.note.file, nothing));
    }

    fn is_running(child: &mut Child) -> bool {
        child.try_wait().expect("it is ours").is_none()
    }

    /// An interrupted start is ended, with what it has forked, and nothing else: not a process with another
    /// token, nor one that has the address in its command. Then the note is gone.
    #[tokio::test]
    async fn interrupted_start_is_ended_and_nothing_else() {
        let address = address();
        let starting = Starting::begin(&address).expect("a note");
        let other = uuid::Uuid::new_v4().to_string();
        let mut started = child(Some(starting.variable()));
        let mut foreign = [child(None), child(Some((VARIABLE, &other)))];
        let path = starting.note.path();
        assert!(path.exists());
        interrupted(starting);
        // The zombie is the test's own child: it is reaped here.
        let reaped = tokio::task::spawn_blocking(move || started.wait().expect("it was killed"));
        let message = recover(&address).await.expect("it can be ended").expect("a message");
        assert!(message.contains("was ended"), "{message}");
        assert!(!reaped.await.expect("it ends").success());
        assert!(!path.exists());
        for child in &mut foreign {
            assert!(is_running(child));
            child.kill().expect("it is ours");
            child.wait().expect("it is ours");
        }
        assert!(recover(&address).await.expect("nothing is left").is_none());
    }

    /// A start that is handed over, or whose guest may run, is never ended.
    #[tokio::test]
    async fn started_machine_is_never_ended() {
        for is_ready in [false, true] {
            let address = address();
            let mut starting = Starting::begin(&address).expect("a note");
            let mut started = child(Some(starting.variable()));
            match is_ready {
                true => {
                    starting.ready().expect("it can be written");
                    interrupted(starting);
                }
                false => drop(starting),
            }
            let message = recover(&address).await.expect("there is nothing to do");
            assert_eq!(message.is_some_and(|message| message.contains("could run")), is_ready);
            assert!(is_running(&mut started));
            // Its memory is not loaded again by the start that is repeated, and by the one after that it is.
            assert_eq!(Starting::has_run(&address).expect("a note"), is_ready);
            assert!(!Starting::has_run(&address).expect("no note"));
            drop(Starting::begin(&address).expect("the next start"));
            assert!(is_running(&mut started));
            started.kill().expect("it is ours");
            started.wait().expect("it is ours");
        }
    }

    /// Of an interrupted load in place it is known if the guest could run. Without a note it is not.
    #[tokio::test]
    async fn interrupted_load_in_place_is_known() {
        for is_ready in [false, true] {
            let address = address();
            let mut loading = Starting::in_place(&address).expect("a note");
            if is_ready {
                loading.ready().expect("it can be written");
            }
            interrupted(loading);
            assert!(recover(&address).await.expect("there is nothing to do").is_none());
            assert!(!Starting::has_run(&address).expect("it is no start"));
            assert_eq!(Starting::may_have_run_in_place(&address).expect("a note"), Some(is_ready));
            assert_eq!(Starting::may_have_run_in_place(&address).expect("no note"), None);
        }
    }

    /// The next start of the domain ends what an interrupted one has left.
    #[test]
    fn next_start_ends_the_interrupted_one() {
        let address = address();
        let starting = Starting::begin(&address).expect("a note");
        let mut started = child(Some(starting.variable()));
        interrupted(starting);
        let reaped = std::thread::spawn(move || started.wait().expect("it was killed"));
        let next = Starting::begin(&address).expect("a note");
        assert!(!reaped.join().expect("it ends").success());
        drop(next);
    }

    /// A note that was cut off says that nothing was started.
    #[tokio::test]
    async fn half_a_note_is_removed() {
        let address = address();
        let starting = Starting::begin(&address).expect("a note");
        starting.note.file.set_len(10).expect("it can be cut off");
        let path = starting.note.path();
        interrupted(starting);
        assert!(recover(&address).await.expect("there is nothing to do").is_none());
        assert!(!path.exists());
    }
}
