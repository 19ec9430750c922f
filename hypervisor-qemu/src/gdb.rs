//! QEMU's gdb stub, as far as it is needed: it alone writes to a guest's physical memory.
//!
//! The stub talks to one end of a socket pair, and this process has the other. It has no name in a file
//! system, so no other process can reach it, and none can once this process has ended. The device that it
//! talks through stays in QEMU then; [`close`] removes it.
//!
//! A stub without a client stops no guest. The guest must be paused while it is opened, because
//! QEMU stops it otherwise.

use std::{
    io::{self, Read, Write},
    os::{fd::OwnedFd, unix::net::UnixStream},
    time::{Duration, Instant},
};

use serde_json::{Value, json};

use crate::{
    error::{Error, ErrorKind, Result},
    machine::Machine,
};

/// Name of the device that the stub talks through, and of the descriptor before that.
const DEVICE: &str = "domsnap-gdb";

/// Name of the device that QEMU makes for a stub of `-gdb` or of the monitor's `gdbserver`.
const OTHER: &str = "gdb";

/// Time limit of one exchange.
const ANSWER: Duration = Duration::from_secs(2);

/// Longest answer that is read, in bytes.
const LONGEST: usize = 4096;

/// An open stub of ours. Dropping it closes only our end; [`close`] closes QEMU's.
#[derive(Debug)]
pub(crate) struct Stub(UnixStream);

/// Returns true if another program may be debugging this guest: a second stub would end its connection.
pub(crate) async fn is_in_use(machine: &Machine) -> Result<bool> {
    let by_device = |process: &crate::discover::Process| {
        process.option("-gdb").is_some_and(|word| word.starts_with("chardev:"))
    };
    Ok(devices(machine).await?.iter().any(|label| label == OTHER)
        || by_device(&crate::discover::Process::read(machine)))
}

/// Closes a stub of ours, also one that a killed process left. Does nothing if there is none.
pub(crate) async fn close(machine: &Machine) -> Result<()> {
    if !devices(machine).await?.iter().any(|label| label == DEVICE) {
        return Ok(());
    }
    let attempted = "closing the gdb stub";
    // 1) The stub. It removes the device that it talks through. With a stub of another program in QEMU, the
    //    device that is left is not in use by any: a crash came between its making and the stub.
    if !is_in_use(machine).await? {
        monitor(machine, attempted, "gdbserver none").await?;
    }
    // 2) A device that no stub used.
    if devices(machine).await?.iter().any(|label| label == DEVICE) {
        machine.run(attempted, DEVICE, "chardev-remove", json!({ "id": DEVICE })).await?;
    }
    Ok(())
}

/// Runs one command of the human monitor, and returns its text.
pub(crate) async fn monitor(machine: &Machine, attempted: &str, command: &str) -> Result<String> {
    let arguments = json!({ "command-line": command });
    let reply = machine.run(attempted, command, "human-monitor-command", arguments).await?;
    let text = reply.as_str().ok_or_else(|| machine.odd("human-monitor-command", &reply))?;
    Ok(text.trim().to_owned())
}

/// The character devices of a QEMU, by their labels.
async fn devices(machine: &Machine) -> Result<Vec<String>> {
    let reply = machine.query("query-chardev", Value::Null).await?;
    let all = reply.as_array().ok_or_else(|| machine.odd("query-chardev", &reply))?;
    Ok(all.iter().filter_map(|device| device["label"].as_str()).map(str::to_owned).collect())
}

impl Stub {
    /// Opens a stub. The guest must be paused, and no other stub in use.
    ///
    /// After an error [`close`] removes what is left of it.
    pub(crate) async fn open(machine: &Machine) -> Result<Self> {
        let attempted = "opening a gdb stub";
        let pair = || -> io::Result<(UnixStream, OwnedFd)> {
            let (ours, theirs) = UnixStream::pair()?;
            ours.set_write_timeout(Some(ANSWER))?;
            Ok((ours, theirs.into()))
        };
        let (ours, theirs) =
            pair().map_err(|error| Error::io(attempted, std::path::Path::new(DEVICE), error))?;
        let lent = machine.qmp().get_fd(DEVICE, &theirs).await;
        lent.map_err(|error| Error::qmp(attempted, DEVICE, error))?;
        drop(theirs);
        let address = json!({ "type": "fd", "data": { "str": DEVICE } });
        let backend = json!({ "type": "socket", "data": { "addr": address, "server": false } });
        let added = json!({ "id": DEVICE, "backend": backend });
        if let Err(error) = machine.run(attempted, DEVICE, "chardev-add", added).await {
            // The failed attempt may have consumed the descriptor.
            let _ = machine.qmp().execute_raw("closefd", json!({ "fdname": DEVICE })).await;
            return Err(error);
        }
        let said = monitor(machine, attempted, &format!("gdbserver chardev:{DEVICE}")).await?;
        if !said.starts_with("Waiting for gdb connection") {
            return Err(Error::new(ErrorKind::Refused, attempted, DEVICE, said));
        }
        Ok(Self(ours))
    }

    /// Makes addresses those of the guest's physical memory. Blocks, as all that follows.
    pub(crate) fn use_physical_addresses(&mut self) -> io::Result<()> {
        self.expect_ok("Qqemu.PhyMemMode:1")
    }

    /// Reads memory.
    pub(crate) fn read<const N: usize>(&mut self, address: u64) -> io::Result<[u8; N]> {
        let answer = self.exchange(&format!("m{address:x},{N:x}"))?;
        let mut bytes = [0; N];
        let pairs = answer.as_chunks::<2>().0;
        if answer.len() != 2 * N || pairs.len() != N {
            return Err(unexpected(&answer));
        }
        for (byte, pair) in bytes.iter_mut().zip(pairs) {
            let text = std::str::from_utf8(pair).map_err(|_| unexpected(&answer))?;
            *byte = u8::from_str_radix(text, 16).map_err(|_| unexpected(&answer))?;
        }
        Ok(bytes)
    }

    /// Writes memory.
    pub(crate) fn write(&mut self, address: u64, bytes: &[u8]) -> io::Result<()> {
        let digits: String = bytes.iter().map(|byte| format!("{byte:02x}")).collect();
        self.expect_ok(&format!("M{address:x},{:x}:{digits}", bytes.len()))
    }

    fn expect_ok(&mut self, packet: &str) -> io::Result<()> {
        match &*self.exchange(packet)? {
            b"OK" => Ok(()),
            answer => Err(unexpected(answer)),
        }
    }

    /// Sends a packet, and returns the content of the answer.
    fn exchange(&mut self, packet: &str) -> io::Result<Vec<u8>> {
        let until = Instant::now() + ANSWER;
        let sum = packet.bytes().fold(0u8, u8::wrapping_add);
        self.0.write_all(format!("${packet}#{sum:02x}").as_bytes())?;
        let mut got = Vec::new();
        loop {
            if let Some(content) = content(&got) {
                let content = content.to_vec();
                self.0.write_all(b"+")?;
                return Ok(content);
            }
            if got.len() >= LONGEST {
                return Err(unexpected(&got));
            }
            let left = until.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Err(io::ErrorKind::TimedOut.into());
            }
            self.0.set_read_timeout(Some(left))?;
            let mut piece = [0; 1024];
            match self.0.read(&mut piece)? {
                0 => return Err(io::ErrorKind::UnexpectedEof.into()),
                read => got.extend(piece.get(..read).unwrap_or_default()),
            }
        }
    }
}

/// The content of the first whole packet: between `$` and `#`, which two digits of a checksum follow. The
/// connection loses nothing, so the checksum is not needed.
fn content(got: &[u8]) -> Option<&[u8]> {
    let begin = got.iter().position(|byte| *byte == b'$')? + 1;
    let rest = got.get(begin..)?;
    let end = rest.iter().position(|byte| *byte == b'#')?;
    (rest.len() >= end + 3).then(|| rest.get(..end)).flatten()
}

fn unexpected(answer: &[u8]) -> io::Error {
    let shown = answer.get(..answer.len().min(80)).unwrap_or_default();
    io::Error::new(
        io::ErrorKind::InvalidData,
        format!("the stub answered {:?}", shown.escape_ascii().to_string()),
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn packet_is_found_once_it_is_whole() {
        assert_eq!(content(b"+$OK#9a"), Some(&b"OK"[..]));
        assert_eq!(content(b"$#00"), Some(&b""[..]));
        for part in [&b""[..], b"+", b"+$", b"$OK", b"$OK#", b"$OK#9", b"OK#9a"] {
            assert_eq!(content(part), None, "{}", part.escape_ascii());
        }
    }

    /// A stub that answers too much, too little or wrongly is an error, not a hang.
    #[test]
    fn wrong_answers_are_errors() {
        for (answer, kind) in [
            (b"$E22#a9".to_vec(), io::ErrorKind::InvalidData),
            (b"$#00".to_vec(), io::ErrorKind::InvalidData),
            (b"$zz#00".to_vec(), io::ErrorKind::InvalidData),
            (vec![b'x'; 2 * LONGEST], io::ErrorKind::InvalidData),
            (b"$00".to_vec(), io::ErrorKind::UnexpectedEof),
        ] {
            let (ours, mut theirs) = UnixStream::pair().expect("a pair");
            theirs.write_all(&answer).expect("written");
            theirs.shutdown(std::net::Shutdown::Write).expect("shut");
            let error = Stub(ours).read::<1>(0).expect_err("refused");
            assert_eq!(error.kind(), kind, "{}", answer.escape_ascii());
        }
        let (ours, mut theirs) = UnixStream::pair().expect("a pair");
        theirs.write_all(b"+$00ff#00").expect("written");
        assert_eq!(Stub(ours).read::<2>(0x10).expect("an answer"), [0, 255]);
        let mut sent = [0; 10];
        theirs.read_exact(&mut sent).expect("sent");
        assert_eq!(&sent, b"$m10,2#2c+".get(..10).expect("ten"));
    }
}
