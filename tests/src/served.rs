//! A `domsnap disk serve` or `domsnap serve` that runs, and a client of NBD that is nothing but bytes: it
//! flushes when the test says so, which no other program promises.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;

use crate::domsnap::Domsnap;

/// How long a server may take to begin and to end.
const PATIENCE: Duration = Duration::from_secs(240);

/// A server. It is killed when this is dropped.
pub struct Server {
    child: Child,
    socket: PathBuf,
}

impl Server {
    /// Starts `domsnap disk serve WORDS --socket SOCKET`, and waits until it answers.
    ///
    /// # Errors
    /// Its output, if it ends before.
    pub fn start(domsnap: &Domsnap, socket: &Path, args: &[&str]) -> Result<Self> {
        let command = domsnap.command(&["disk", "serve"]);
        Self::spawn(command, socket, args)
    }

    /// The same, of a binary in another place. The command ends with `disk serve`.
    ///
    /// # Errors
    /// As [`Server::start`].
    pub fn spawn(mut command: Command, socket: &Path, args: &[&str]) -> Result<Self> {
        command.args(args).arg("--socket").arg(socket);
        Self::begin(command, socket)
    }

    /// Starts `domsnap serve WORDS --dir DIRECTORY`, and waits until the disk `target` answers.
    ///
    /// # Errors
    /// As [`Server::start`].
    pub fn of_snapshot(domsnap: &Domsnap, args: &[&str], directory: &Path, target: &str) -> Result<Self> {
        let mut command = domsnap.command(&["serve"]);
        command.args(args).arg("--dir").arg(directory);
        Self::begin(command, &directory.join(format!("{target}.sock")))
    }

    fn begin(mut command: Command, socket: &Path) -> Result<Self> {
        let child = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn()?;
        let mut server = Self { child, socket: socket.to_owned() };
        let until = Instant::now() + PATIENCE;
        while server.ask(&serde_json::json!({ "do": "info" })).is_err() {
            if let Some(status) = server.child.try_wait()? {
                let mut said = String::new();
                server.child.stderr.take().context("stderr")?.read_to_string(&mut said)?;
                bail!("{command:?} ended with {status}: {said}");
            }
            ensure!(Instant::now() < until, "{command:?} does not answer");
            std::thread::sleep(Duration::from_millis(10));
        }
        Ok(server)
    }

    /// The address for programs that take one.
    pub fn uri(&self) -> String {
        format!("nbd+unix:///?socket={}", self.socket.display())
    }

    /// Copies a disk of the same server with nbdcopy, and returns its content.
    ///
    /// # Errors
    /// What nbdcopy says.
    pub fn copy(&self, target: &str, to: &Path) -> Result<Vec<u8>> {
        let socket = self.socket.with_file_name(format!("{target}.sock"));
        let uri = format!("nbd+unix:///?socket={}", socket.display());
        let output = Command::new("nbdcopy").arg(uri).arg(to).output()?;
        ensure!(output.status.success(), "nbdcopy: {}", String::from_utf8_lossy(&output.stderr));
        Ok(std::fs::read(to)?)
    }

    /// Asks its control socket.
    ///
    /// # Errors
    /// Its error, and those of the connection.
    pub fn ask(&self, request: &Value) -> Result<Value> {
        ask(&self.socket, request)
    }

    /// Kills it, as the kernel does when memory is short.
    ///
    /// # Errors
    /// The system's.
    pub fn kill(&mut self) -> Result<()> {
        self.child.kill()?;
        self.child.wait()?;
        Ok(())
    }

    /// Asks it to end, as systemd does. It must end well.
    ///
    /// # Errors
    /// If it does not.
    pub fn stop(&mut self) -> Result<()> {
        kill_process(Pid::from_child(&self.child), Signal::TERM)?;
        let until = Instant::now() + PATIENCE;
        loop {
            if let Some(status) = self.child.try_wait()? {
                ensure!(status.success(), "the server ended with {status}");
                return Ok(());
            }
            ensure!(Instant::now() < until, "the server does not end");
            std::thread::sleep(Duration::from_millis(10));
        }
    }
}

/// The servers of the disks of one guest, which can be killed and started again.
#[derive(Clone, Default)]
pub struct Servers(Arc<Mutex<Vec<Place>>>);

/// A server, and what it was started with.
struct Place {
    image: PathBuf,
    socket: PathBuf,
    server: Option<Server>,
}

impl Servers {
    /// Serves a VHD with the state directory `state` beside it, which is the one of [`crate::live::Live`].
    ///
    /// # Errors
    /// As [`Server::start`].
    pub fn serve(&self, image: &Path, socket: &Path) -> Result<()> {
        let server = Some(start(image, socket)?);
        self.all().push(Place { image: image.to_owned(), socket: socket.to_owned(), server });
        Ok(())
    }

    /// Kills all of them.
    ///
    /// # Errors
    /// The system's.
    pub fn kill(&self) -> Result<()> {
        let killed = |place: &mut Place| place.server.take().map_or(Ok(()), |mut server| server.kill());
        self.all().iter_mut().try_for_each(killed)
    }

    /// Starts those that were killed, as systemd does: again and again while another process has a lock.
    ///
    /// # Errors
    /// If one does not start within a minute.
    pub fn start(&self) -> Result<()> {
        let until = Instant::now() + PATIENCE;
        for place in self.all().iter_mut().filter(|place| place.server.is_none()) {
            loop {
                match start(&place.image, &place.socket) {
                    Ok(server) => {
                        place.server = Some(server);
                        break;
                    }
                    Err(error) if Instant::now() >= until => return Err(error),
                    Err(_) => std::thread::sleep(Duration::from_millis(100)),
                }
            }
        }
        Ok(())
    }

    fn all(&self) -> MutexGuard<'_, Vec<Place>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn start(image: &Path, socket: &Path) -> Result<Server> {
    let state = image.parent().context("an image without a directory")?.join("state");
    Server::start(&Domsnap::new(&state), socket, &[&format!("{},format=vhd", image.display())])
}

/// Asks the control socket of the server at `socket`.
///
/// # Errors
/// Its error, and those of the connection.
pub fn ask(socket: &Path, request: &Value) -> Result<Value> {
    let mut stream = UnixStream::connect(format!("{}.control", socket.display()))?;
    stream.set_read_timeout(Some(PATIENCE))?;
    stream.write_all(format!("{request}\n").as_bytes())?;
    stream.shutdown(std::net::Shutdown::Write)?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer)?;
    let answer: Value = serde_json::from_str(&answer)?;
    ensure!(answer["error"].is_null(), "{answer}");
    Ok(answer["ok"].clone())
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.kill();
    }
}

/// A client in the transmission, with simple replies.
pub struct Client(UnixStream);

impl Client {
    /// Connects, and asks for the disk. The error is the server's refusal.
    ///
    /// # Errors
    /// The refusal, and those of the connection.
    pub fn connect(socket: &Path) -> Result<Self> {
        let mut stream = UnixStream::connect(socket)?;
        stream.set_read_timeout(Some(PATIENCE))?;
        let mut client = Self(stream.try_clone()?);
        client.get(18)?;
        stream.write_all(
            &[&3u32.to_be_bytes()[..], b"IHAVEOPT", &[0, 0, 0, 7, 0, 0, 0, 6], &[0; 6]].concat(),
        )?;
        loop {
            let head = client.get(20)?;
            let number = |at: usize| u32::from_be_bytes([head[at], head[at + 1], head[at + 2], head[at + 3]]);
            let data = client.get(number(16) as usize)?;
            match number(12) {
                1 => return Ok(client),
                3 => {}
                kind => bail!("refused with {kind:#x}: {}", String::from_utf8_lossy(&data)),
            }
        }
    }

    fn get(&mut self, length: usize) -> Result<Vec<u8>> {
        let mut bytes = vec![0; length];
        self.0.read_exact(&mut bytes)?;
        Ok(bytes)
    }

    /// Gives a range back, which is not needed any more.
    ///
    /// # Errors
    /// As [`Client::write`].
    pub fn trim(&mut self, offset: u64, length: u32) -> Result<()> {
        self.request(4, offset, length as usize, b"")
    }

    /// Makes a range read as zeros.
    ///
    /// # Errors
    /// As [`Client::write`].
    pub fn zero(&mut self, offset: u64, length: u32) -> Result<()> {
        self.request(6, offset, length as usize, b"")
    }

    fn request(&mut self, kind: u16, offset: u64, length: usize, data: &[u8]) -> Result<()> {
        let head = [&0x2560_9513u32.to_be_bytes()[..], &[0, 0], &kind.to_be_bytes(), &[0; 8]].concat();
        let range = [&offset.to_be_bytes()[..], &(length as u32).to_be_bytes()].concat();
        self.0.write_all(&[&head, &range, data].concat())?;
        let reply = self.get(16)?;
        ensure!(reply[4..8] == [0; 4], "command {kind} failed: {reply:?}");
        Ok(())
    }

    /// Writes. The data is acknowledged when this returns, and nothing is flushed.
    ///
    /// # Errors
    /// The server's number, and those of the connection.
    pub fn write(&mut self, offset: u64, data: &[u8]) -> Result<()> {
        self.request(1, offset, data.len(), data)
    }

    /// Reads.
    ///
    /// # Errors
    /// As [`Client::write`].
    pub fn read(&mut self, offset: u64, length: usize) -> Result<Vec<u8>> {
        self.request(0, offset, length, b"")?;
        self.get(length)
    }

    /// Makes everything that was written durable.
    ///
    /// # Errors
    /// As [`Client::write`].
    pub fn flush(&mut self) -> Result<()> {
        self.request(3, 0, 0, b"")
    }
}
