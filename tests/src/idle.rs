//! A QEMU whose guest is nothing but firmware, or one sector of code: it is there in a fraction of a second.
//! Its disks are written and read through its monitor.

use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::thread::sleep;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use serde_json::{Value, json};
use testguest::Version;

/// How long anything is waited for: a busy machine is no failure.
const PATIENCE: Duration = Duration::from_secs(240);

/// Returns true if an image has a pattern, which may be open in a QEMU and must be flushed.
///
/// # Errors
/// If it cannot be read.
pub fn has_pattern(image: &Path, pattern: u8) -> Result<bool> {
    let read = format!("read -P {pattern} {PATTERN_AT} 64k");
    let args = ["-U", "-r", "-f", "qcow2", "-c", &read, &image.display().to_string()];
    let output = Command::new("qemu-io").args(args).output()?;
    let said = String::from_utf8_lossy(&output.stdout);
    ensure!(
        said.contains("read 65536/65536"),
        "{}: {said}{}",
        image.display(),
        String::from_utf8_lossy(&output.stderr)
    );
    Ok(!said.contains("verification failed"))
}

/// Offset of the pattern from the start of a disk: behind what a boot sector is, and within the smallest
/// disk.
const PATTERN_AT: &str = "256k";

/// A boot sector.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Boot {
    /// Stops its processor for ever.
    Idle,
    /// Tells pvpanic that the guest has panicked.
    Panic,
    /// Switches the machine off, by q35's ACPI.
    PowerOff,
    /// Writes the first disk, from 1 MiB on, for ever.
    Fill,
    /// Sleeps (S3), by q35's ACPI.
    Sleep,
    /// Starts the watchdog `ib700`, which bites after two seconds.
    Watchdog,
    /// Writes to its memory for ever, until a key is pressed; then as [`Boot::Panic`].
    BusyThenPanic,
    /// Writes to its memory for ever, until a key is pressed; then as [`Boot::PowerOff`].
    BusyThenPowerOff,
}

/// The code of a guest that writes to 112 pages of its memory until a key is pressed; more follows.
macro_rules! busy_then {
    ($($byte:literal),*) => {
        // cli; again: mov ax, 0x1000; page: mov ds, ax; inc word [0]; add ax, 0x100; cmp ax, 0x8000; jb page;
        // in al, 0x64; test al, 1; jz again
        &[
            0xfa, 0xb8, 0x00, 0x10, 0x8e, 0xd8, 0xff, 0x06, 0x00, 0x00, 0x05, 0x00, 0x01, 0x3d, 0x00, 0x80, 0x72,
            0xf2, 0xe4, 0x64, 0xa8, 0x01, 0x74, 0xe9, $($byte),*
        ]
    };
}

impl Boot {
    /// Its code, in 16 bits: 0x7c00 is its place.
    fn code(self) -> &'static [u8] {
        match self {
            // cli; hlt; jmp -3
            Self::Idle => &[0xfa, 0xf4, 0xeb, 0xfd],
            // mov dx, 0x505; mov al, 1; out dx, al; cli; hlt; jmp -3
            Self::Panic => &[0xba, 0x05, 0x05, 0xb0, 0x01, 0xee, 0xfa, 0xf4, 0xeb, 0xfd],
            // mov dx, 0x604; mov ax, 0x2000; out dx, ax; cli; hlt; jmp -3
            Self::PowerOff => &[0xba, 0x04, 0x06, 0xb8, 0x00, 0x20, 0xef, 0xfa, 0xf4, 0xeb, 0xfd],
            // mov dx, 0x604; mov ax, 0x2400 (S3 of q35 is type 1); out dx, ax; cli; hlt; jmp -3
            Self::Sleep => &[0xba, 0x04, 0x06, 0xb8, 0x00, 0x24, 0xef, 0xfa, 0xf4, 0xeb, 0xfd],
            // mov dx, 0x443; mov al, 0x0e; out dx, al; cli; hlt; jmp -3
            Self::BusyThenPanic => busy_then![0xba, 0x05, 0x05, 0xb0, 0x01, 0xee, 0xfa, 0xf4, 0xeb, 0xfd],
            Self::BusyThenPowerOff => {
                busy_then![0xba, 0x04, 0x06, 0xb8, 0x00, 0x20, 0xef, 0xfa, 0xf4, 0xeb, 0xfd]
            }
            Self::Watchdog => &[0xba, 0x43, 0x04, 0xb0, 0x0e, 0xee, 0xfa, 0xf4, 0xeb, 0xfd],
            // xor ax, ax; mov ds, ax; again: mov ah, 0x43; mov al, 0; mov dl, 0x80; mov si, 0x7c40; int 0x13;
            // add dword [0x7c48], 0x200; jmp again
            Self::Fill => &[
                0x31, 0xc0, 0x8e, 0xd8, 0xb4, 0x43, 0xb0, 0x00, 0xb2, 0x80, 0xbe, 0x40, 0x7c, 0xcd, 0x13,
                0x66, 0x81, 0x06, 0x48, 0x7c, 0x00, 0x02, 0x00, 0x00, 0xeb, 0xea,
            ],
        }
    }

    /// Writes it to an image.
    ///
    /// # Errors
    /// What qemu-io says.
    pub fn write(self, image: &Path) -> Result<()> {
        let mut sector = [0_u8; 512];
        let code = self.code();
        sector[..code.len()].copy_from_slice(code);
        // What `Fill` writes: 127 sectors from 0x7c00, at sector 2048 and on.
        sector[0x40..0x50].copy_from_slice(&[0x10, 0, 0x7f, 0, 0, 0x7c, 0, 0, 0, 8, 0, 0, 0, 0, 0, 0]);
        sector[510..].copy_from_slice(&[0x55, 0xaa]);
        let mut file = tempfile::NamedTempFile::new()?;
        file.write_all(&sector)?;
        let write = format!("write -s {} 0 512", file.path().display());
        crate::qemu::run("qemu-io", &["-f", "qcow2", "-c", &write, &image.display().to_string()]).map(drop)
    }
}

/// A running QEMU; killed when dropped.
#[derive(Debug)]
pub struct Idle {
    child: Child,
    socket: PathBuf,
    said: PathBuf,
}

impl Idle {
    /// Starts one whose socket is `NAME.qmp` in `dir`.
    ///
    /// # Errors
    /// What it says, where it does not serve the socket.
    pub fn start(version: Version, dir: &Path, name: &str, args: &[&str]) -> Result<Self> {
        Self::start_through(&[], version, dir, name, args)
    }

    /// The same, started by a command which replaces itself by the one that follows its arguments.
    ///
    /// # Errors
    /// As [`Idle::start`].
    pub fn start_through(
        through: &[&str],
        version: Version,
        dir: &Path,
        name: &str,
        args: &[&str],
    ) -> Result<Self> {
        let (socket, said) = (dir.join(format!("{name}.qmp")), dir.join(format!("{name}.said")));
        let _ = fs::remove_file(&socket);
        let out = fs::File::create(&said)?;
        let mut command: Vec<_> = through.iter().map(std::ffi::OsString::from).collect();
        command.extend(testguest::qemu_command(version)?);
        let mut started = Command::new(&command[0]);
        started.args(&command[1..]).args([
            "-name",
            name,
            "-nodefaults",
            "-no-user-config",
            "-display",
            "none",
        ]);
        started.args(["-M", "q35", "-accel", "tcg", "-m", "32", "-qmp"]);
        started.arg(format!("unix:{},server=on,wait=off", socket.display())).args(args);
        let child = started.stdin(Stdio::null()).stdout(out.try_clone()?).stderr(out).spawn()?;
        let mut idle = Self { child, socket, said };
        let until = Instant::now() + PATIENCE;
        while !idle.socket.exists() {
            ensure!(idle.is_alive()? && Instant::now() < until, "QEMU does not start: {}", idle.said());
            sleep(Duration::from_millis(10));
        }
        Ok(idle)
    }

    /// The address that it is registered by: `qemu:SOCKET`.
    pub fn address(&self) -> String {
        format!("qemu:{}", self.socket.display())
    }

    /// Its QMP socket.
    pub fn socket(&self) -> &Path {
        &self.socket
    }

    /// What it wrote to its standard error.
    pub fn said(&self) -> String {
        fs::read_to_string(&self.said).unwrap_or_default()
    }

    /// Returns true if its process is there.
    ///
    /// # Errors
    /// If the system does not report it.
    pub fn is_alive(&mut self) -> Result<bool> {
        Ok(self.child.try_wait()?.is_none())
    }

    /// Returns true if a process serves its socket.
    pub fn answers(&self) -> bool {
        UnixStream::connect(&self.socket).is_ok()
    }

    /// One QMP command, over a connection of its own.
    ///
    /// # Errors
    /// What QEMU says, or that it is gone.
    pub fn qmp(&self, command: &str, arguments: Value) -> Result<Value> {
        self.qmp_at(&self.socket, command, arguments)
    }

    /// The same, over another socket of this QEMU's, which it serves too.
    ///
    /// # Errors
    /// As [`Idle::qmp`].
    pub fn qmp_at(&self, socket: &Path, command: &str, arguments: Value) -> Result<Value> {
        let until = Instant::now() + PATIENCE;
        let mut stream = loop {
            match UnixStream::connect(socket) {
                Ok(stream) => break stream,
                Err(error) if Instant::now() >= until => return Err(error).context("connecting to QEMU"),
                Err(_) => sleep(Duration::from_millis(10)),
            }
        };
        stream.set_read_timeout(Some(PATIENCE))?;
        let mut lines = BufReader::new(stream.try_clone()?).lines();
        let mut next = || -> Result<Value> {
            let line = lines.next().with_context(|| format!("QEMU is gone: {}", self.said()))??;
            Ok(serde_json::from_str(&line)?)
        };
        // An event that the last client did not take may come before the greeting.
        while next()?.get("QMP").is_none() {}
        let mut reply = Value::Null;
        for line in
            [json!({ "execute": "qmp_capabilities" }), json!({ "execute": command, "arguments": arguments })]
        {
            stream.write_all(format!("{line}\n").as_bytes())?;
            reply = loop {
                let reply = next()?;
                if reply.get("event").is_none() {
                    break reply;
                }
            };
        }
        match reply.get("return") {
            Some(value) => Ok(value.clone()),
            None => bail!("{command}: {reply}"),
        }
    }

    /// The word of its run state.
    ///
    /// # Errors
    /// If it does not answer.
    pub fn state(&self) -> Result<String> {
        let status = self.qmp("query-status", json!({}))?;
        Ok(status["status"].as_str().context("a status")?.to_owned())
    }

    /// Waits for a run state.
    ///
    /// # Errors
    /// Which one it is in after a minute.
    pub fn wait_state(&self, wanted: &str) -> Result<()> {
        let until = Instant::now() + PATIENCE;
        loop {
            let state = self.state()?;
            if state == wanted {
                return Ok(());
            }
            ensure!(Instant::now() < until, "it is {state:?}, and not {wanted:?}");
            sleep(Duration::from_millis(20));
        }
    }

    /// A line of the human monitor.
    ///
    /// # Errors
    /// If it does not answer.
    pub fn monitor(&self, line: &str) -> Result<String> {
        let said = self.qmp("human-monitor-command", json!({ "command-line": line }))?;
        Ok(said.as_str().unwrap_or_default().to_owned())
    }

    /// A command of qemu-io's to a device. (What it prints goes to QEMU's own standard output.)
    fn io(&self, device: &str, command: &str) -> Result<()> {
        let path = format!("/machine/peripheral/{device}/virtio-backend");
        let said = self.monitor(&format!("qemu-io -d {path} \"{command}\""))?;
        ensure!(said.trim().is_empty(), "{device}: {command}: {said}");
        Ok(())
    }

    /// Writes a pattern to a disk, as the guest would.
    ///
    /// # Errors
    /// What QEMU says.
    pub fn write(&self, device: &str, pattern: u8) -> Result<()> {
        self.io(device, &format!("write -P {pattern} {PATTERN_AT} 64k"))?;
        self.io(device, "flush")
    }

    /// Makes what the guest wrote to a disk readable in its image.
    ///
    /// # Errors
    /// What QEMU says.
    pub fn flush(&self, device: &str) -> Result<()> {
        self.io(device, "flush")
    }

    /// Kills it, as a crash would.
    ///
    /// # Errors
    /// If the system refuses.
    pub fn kill(&mut self) -> Result<()> {
        self.child.kill()?;
        self.child.wait()?;
        Ok(())
    }

    /// Ends it.
    ///
    /// # Errors
    /// If it does not end.
    pub fn quit(mut self) -> Result<()> {
        // It may be gone before it answers.
        let _ = self.qmp("quit", json!({}));
        let until = Instant::now() + PATIENCE;
        while self.is_alive()? {
            ensure!(Instant::now() < until, "QEMU does not end");
            sleep(Duration::from_millis(10));
        }
        Ok(())
    }
}

impl Drop for Idle {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
