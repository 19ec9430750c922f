//! Entries for fuzzing: everything that reads bytes of a socket, without the socket.

use std::io::{self, Read, Write};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use crate::control::{self, ControlInfo};
use crate::disk::Disk;
use crate::image::{Content, Extent, Image, Served, Zeroing};
use crate::option::{Agreed, Export, Timed, negotiate};
use crate::request::{HEAD, Request, refused, status};
use crate::transmission;
use crate::wire::{Errno, Fields, SIMPLE_REPLY_MAGIC, STRUCTURED_REPLY_MAGIC};

/// A client that sends bytes and takes whatever comes.
struct Client<'a>(&'a [u8]);

impl Read for Client<'_> {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        self.0.read(buf)
    }
}

impl Write for Client<'_> {
    fn write(&mut self, buf: &[u8]) -> io::Result<usize> {
        Ok(buf.len())
    }
    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl Timed for Client<'_> {
    fn limit(&mut self, _: Option<Duration>) -> io::Result<()> {
        Ok(())
    }
}

/// A negotiation with a client that sends these bytes.
pub fn options(bytes: &[u8]) {
    let export = Export { size: 1 << 20, alignment: 512, read_only: false };
    let _ = negotiate(&mut Client(bytes), || export, || Ok(()));
}

/// A request's head, checked, and replied to. An accepted range is within the disk.
pub fn request(bytes: &[u8]) {
    let Some(head) = bytes.first_chunk::<HEAD>() else { return };
    let Some(request) = Request::parse(head) else { return };
    let agreed = Agreed { structured: true, allocation: true };
    for (size, alignment, read_only) in [(u64::MAX, 1, false), (1 << 20, 512, false), (0, 1, true)] {
        let export = Export { size, alignment, read_only };
        match request.check(agreed, export) {
            Ok(_) => {
                let end = request.offset.checked_add(request.length.into());
                assert!(end.is_some_and(|end| end <= size));
                assert_eq!(request.offset % u64::from(alignment), 0);
            }
            Err(refusal) => drop(refused(agreed, &request, refusal.0, refusal.1)),
        }
    }
    drop(refused(Agreed::default(), &request, Errno::Io, ""));
    drop(status(&request, &[], false));
}

/// A line of the control socket: a request, or a server's answer about itself.
pub fn control(bytes: &[u8]) {
    let _ = control::parse(bytes);
    let _ = serde_json::from_slice::<ControlInfo>(bytes);
}

/// Bytes of the disk of [`session`].
const SIZE: u64 = 64 << 10;

/// A disk in memory. It is given nothing but sectors within itself.
struct Memory(Mutex<Vec<u8>>);

impl Memory {
    fn with<T>(&self, at: u64, length: u64, work: impl FnOnce(&mut [u8]) -> T) -> T {
        let end = at.saturating_add(length);
        assert!(end <= SIZE, "{length} bytes at {at} were let through");
        assert!(
            at.is_multiple_of(512) && length.is_multiple_of(512),
            "{length} bytes at {at} are no sectors"
        );
        let mut bytes = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        work(bytes.get_mut(at as usize..end as usize).unwrap_or_default())
    }
}

impl Image for Memory {
    fn size(&self) -> u64 {
        SIZE
    }
    fn alignment(&self) -> u32 {
        512
    }
    fn read_at(&self, buf: &mut [u8], offset: u64) -> io::Result<()> {
        self.with(offset, buf.len() as u64, |bytes| buf.copy_from_slice(bytes));
        Ok(())
    }
    fn write_at(&self, buf: &[u8], offset: u64) -> io::Result<()> {
        self.with(offset, buf.len() as u64, |bytes| bytes.copy_from_slice(buf));
        Ok(())
    }
    fn zero(&self, offset: u64, length: u64, how: Zeroing) -> io::Result<()> {
        if how.fast_only {
            return Err(io::ErrorKind::Unsupported.into());
        }
        self.with(offset, length, |bytes| bytes.fill(0));
        Ok(())
    }
    fn trim(&self, offset: u64, length: u64) -> io::Result<()> {
        self.with(offset, length, |bytes| bytes.fill(0));
        Ok(())
    }
    fn flush(&self) -> io::Result<()> {
        Ok(())
    }
    fn map(&self, offset: u64, length: u64, limit: usize) -> io::Result<Vec<Extent>> {
        self.with(offset, length, |_| ());
        assert!(limit > 0);
        // Too many and too long: the server cuts them.
        let of = |number| if number % 2 == 0 { Content::Data } else { Content::Hole };
        Ok((0..limit.min(8)).map(|number| Extent { length: 16 << 10, content: of(number) }).collect())
    }
}

/// A whole connection after the negotiation. The first byte says what was agreed, the others are what the
/// client sends. The server ends, and its replies are well formed.
pub fn session(bytes: &[u8]) {
    let Some((first, bytes)) = bytes.split_first() else { return };
    let agreed = Agreed { structured: first & 1 != 0, allocation: first & 3 == 3 };
    let image = Arc::new(Memory(Mutex::new(vec![7; SIZE as usize])));
    let (path, format) = ("/fuzzed".into(), "raw".to_owned());
    let disk = Disk::new(Served { image, path, format, snapshot: None, layers: Vec::new() });
    let Ok((mut client, server)) = UnixStream::pair() else { return };
    let mut replies = Vec::new();
    std::thread::scope(|scope| {
        let Ok(mut receiving) = client.try_clone() else { return };
        let received = scope.spawn(move || {
            let mut replies = Vec::new();
            let _ = receiving.read_to_end(&mut replies);
            replies
        });
        scope.spawn(move || {
            // The server may have ended already.
            let _ = client.write_all(bytes);
            let _ = client.shutdown(Shutdown::Write);
        });
        let _ = transmission::serve(server, &disk, agreed);
        replies = received.join().unwrap_or_default();
    });
    if agreed.structured {
        require_replies(&replies);
    }
}

/// Panics for anything but whole replies. Data follows structured replies alone, so their ends are known.
fn require_replies(replies: &[u8]) {
    let mut fields = Fields(replies);
    while let Some(magic) = fields.u32() {
        let rest = match magic {
            SIMPLE_REPLY_MAGIC => 12,
            STRUCTURED_REPLY_MAGIC => {
                let (_flags, _kind, _cookie) = (fields.u16(), fields.u16(), fields.u64());
                fields.u32().unwrap_or(u32::MAX)
            }
            other => panic!("{other:#x} does not begin a reply"),
        };
        assert!(fields.take(rest as usize).is_some(), "a reply of {rest} bytes is cut off");
    }
    assert!(fields.0.is_empty(), "{} bytes are no reply", fields.0.len());
}
