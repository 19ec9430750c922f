//! How long QEMU takes to answer: a socket between domsnap and QEMU, which forwards everything and looks at
//! the clock.
//!
//! QEMU's time is that in which at least one command is under way, from when the proxy has read it until the
//! proxy has read its reply, and the time from a connection to its greeting. The way to the proxy, and from
//! it, is not QEMU's.

use std::collections::BTreeMap;
use std::io::{self, IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::net::Shutdown;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer, SendAncillaryMessage,
    SendFlags, recvmsg, sendmsg,
};
use serde_json::Value;

/// The most descriptors that one message carries.
const DESCRIPTORS: usize = 64;

/// What QEMU was asked.
#[derive(Debug, Clone, Default)]
pub struct Asked {
    /// How long at least one command was under way.
    pub busy: Duration,
    /// How often each command was answered, and how long all of its answers took.
    pub commands: BTreeMap<String, (usize, Duration)>,
}

#[derive(Default)]
struct Watch {
    asked: Asked,
    /// Under way: id, name, since when.
    pending: Vec<(Value, String, Instant)>,
    busy_since: Option<Instant>,
}

impl Watch {
    fn request(&mut self, id: Value, name: &str) {
        let now = Instant::now();
        self.busy_since.get_or_insert(now);
        self.pending.push((id, name.to_owned(), now));
    }

    fn reply(&mut self, id: &Value) {
        // One without an id answers the oldest.
        let index = self.pending.iter().position(|(pending, ..)| pending == id || id.is_null());
        let Some(index) = index else { return };
        let (_, name, since) = self.pending.remove(index);
        let entry = self.asked.commands.entry(name).or_default();
        entry.0 += 1;
        entry.1 += since.elapsed();
        self.update();
    }

    fn update(&mut self) {
        if self.pending.is_empty()
            && let Some(since) = self.busy_since.take()
        {
            self.asked.busy += since.elapsed();
        }
    }

    fn see(&mut self, line: &[u8]) {
        let Ok(line) = serde_json::from_slice::<Value>(line) else { return };
        let id = &line["id"];
        if let Some(name) = line["execute"].as_str().or_else(|| line["exec-oob"].as_str()) {
            self.request(id.clone(), name);
        } else if !line["QMP"].is_null() || line.get("return").is_some() || !line["error"].is_null() {
            self.reply(id);
        }
    }
}

/// The socket; it is served until the process ends.
pub struct Proxy {
    socket: PathBuf,
    watch: Arc<Mutex<Watch>>,
}

impl Proxy {
    /// Listens at `socket` for QEMU's `behind`.
    pub fn open(socket: &Path, behind: &Path) -> Result<Proxy> {
        let listener =
            UnixListener::bind(socket).with_context(|| format!("listen at {}", socket.display()))?;
        let watch = Arc::new(Mutex::new(Watch::default()));
        let (seen, behind) = (Arc::clone(&watch), behind.to_owned());
        thread::spawn(move || {
            // As QEMU does: one client, then the next.
            for client in listener.incoming().flatten() {
                if let Err(error) = serve(&seen, client, &behind) {
                    eprintln!("bench: between domsnap and {}: {error}", behind.display());
                }
            }
        });
        Ok(Proxy { socket: socket.to_owned(), watch })
    }

    /// Where domsnap finds it.
    pub fn socket(&self) -> &Path {
        &self.socket
    }

    /// What QEMU was asked since the last time.
    pub fn take(&self) -> Asked {
        std::mem::take(&mut locked(&self.watch).asked)
    }
}

fn locked(watch: &Mutex<Watch>) -> MutexGuard<'_, Watch> {
    watch.lock().unwrap_or_else(PoisonError::into_inner)
}

fn serve(watch: &Mutex<Watch>, client: UnixStream, behind: &Path) -> io::Result<()> {
    locked(watch).request(Value::Null, "(greeting)");
    let qemu = UnixStream::connect(behind)?;
    thread::scope(|scope| {
        let answers = scope.spawn(|| {
            let forwarded = forward(&qemu, &client, watch);
            let _ = client.shutdown(Shutdown::Both);
            forwarded
        });
        let asked = forward(&client, &qemu, watch);
        let _ = qemu.shutdown(Shutdown::Both);
        let answered = answers.join().unwrap_or(Ok(()));
        let mut watch = locked(watch);
        watch.pending.clear();
        watch.update();
        // Who closes first leaves the other with a broken pipe.
        asked.and(answered).or_else(|error| match error.kind() {
            io::ErrorKind::BrokenPipe | io::ErrorKind::ConnectionReset => Ok(()),
            _ => Err(error),
        })
    })
}

/// Everything, descriptors too, until the end.
fn forward(from: &UnixStream, to: &UnixStream, watch: &Mutex<Watch>) -> io::Result<()> {
    let (mut buffer, mut line) = (vec![0; 1 << 16], Vec::new());
    loop {
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(DESCRIPTORS))];
        let mut control = RecvAncillaryBuffer::new(&mut space);
        let received =
            recvmsg(from, &mut [IoSliceMut::new(&mut buffer)], &mut control, RecvFlags::CMSG_CLOEXEC)?;
        if received.bytes == 0 {
            return Ok(());
        }
        let descriptors: Vec<OwnedFd> = control
            .drain()
            .filter_map(|message| match message {
                RecvAncillaryMessage::ScmRights(descriptors) => Some(descriptors),
                _ => None,
            })
            .flatten()
            .collect();
        let piece = &buffer[..received.bytes];
        for part in piece.split_inclusive(|&byte| byte == b'\n') {
            line.extend_from_slice(part);
            if line.ends_with(b"\n") {
                locked(watch).see(&line);
                line.clear();
            }
        }
        send(to, piece, &descriptors)?;
    }
}

fn send(to: &UnixStream, mut bytes: &[u8], descriptors: &[OwnedFd]) -> io::Result<()> {
    let borrowed: Vec<_> = descriptors.iter().map(AsFd::as_fd).collect();
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(DESCRIPTORS))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    if !borrowed.is_empty() && !control.push(SendAncillaryMessage::ScmRights(&borrowed)) {
        return Err(io::Error::other("too many descriptors in one message"));
    }
    while !bytes.is_empty() {
        let sent = sendmsg(to, &[IoSlice::new(bytes)], &mut control, SendFlags::NOSIGNAL)?;
        control.clear();
        bytes = &bytes[sent..];
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn watch(lines: &[&str]) -> Watch {
        let mut watch = Watch::default();
        lines.iter().for_each(|line| watch.see(line.as_bytes()));
        watch
    }

    #[test]
    fn a_command_is_under_way_until_its_own_reply() {
        let ask = [r#"{"execute":"a","id":1}"#, r#"{"exec-oob":"b","id":2}"#];
        let mut watch = watch(&[ask[0], ask[1], r#"{"event":"STOP","data":{}}"#, r#"{"return":{},"id":2}"#]);
        assert_eq!(watch.asked.commands.keys().collect::<Vec<_>>(), ["b"]);
        assert_eq!((watch.pending.len(), watch.asked.busy), (1, Duration::ZERO));
        watch.see(br#"{"error":{"class":"GenericError","desc":"no"},"id":1}"#);
        assert_eq!(watch.asked.commands["a"].0, 1);
        assert!(watch.pending.is_empty() && watch.busy_since.is_none());
        assert!(watch.asked.busy > Duration::ZERO);
    }

    #[test]
    fn replies_to_nothing_are_passed_over() {
        let watch = watch(&[r#"{"return":{},"id":7}"#, "not json", r#"{"QMP":{}}"#]);
        assert!(watch.asked.commands.is_empty() && watch.asked.busy == Duration::ZERO);
    }
}
