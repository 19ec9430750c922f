//! Carries out the requests of one client.
//!
//! Some threads take turns: one receives a request while the others carry out and answer theirs. So a request
//! passes from no thread to another, and at most as many are in memory as there are threads. The rest waits
//! in the socket.

use std::io::{self, BufReader, Read, Write};
use std::os::unix::net::UnixStream;
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};

use crate::disk::{Disk, Use};
use crate::image::{Content, Extent, Zeroing};
use crate::option::{Agreed, MAX_REQUEST};
use crate::request::{
    Command, HEAD, MAX_EXTENTS, Refusal, Request, done, fill_read_head, read_head, refused, status,
};
use crate::wire::{CMD_DISC, Errno};

/// Threads of a client: the most requests that are carried out at once.
const THREADS: usize = 16;
/// Buffers up to this size are kept by their thread.
const SMALL: usize = 1 << 20;
/// The memory of all requests that are larger than that: two of the largest.
const LARGE_MEMORY: usize = 2 * MAX_REQUEST as usize;
/// Zeros and trims are done in steps, between which the disk can be held.
const STEP: u64 = 32 << 20;

/// The connection of a client.
struct Connection<'a> {
    disk: &'a Disk,
    agreed: Agreed,
    incoming: Mutex<Incoming>,
    outgoing: Mutex<UnixStream>,
    memory: Memory,
}

struct Incoming {
    stream: BufReader<UnixStream>,
    ended: bool,
}

/// Serves a client until it disconnects. All its requests have ended then.
pub(crate) fn serve(stream: UnixStream, disk: &Disk, agreed: Agreed) -> io::Result<()> {
    let incoming = BufReader::with_capacity(64 << 10, stream.try_clone()?);
    let connection = Connection {
        disk,
        agreed,
        incoming: Mutex::new(Incoming { stream: incoming, ended: false }),
        outgoing: Mutex::new(stream),
        memory: Memory { free: Mutex::new(LARGE_MEMORY), changed: Condvar::new() },
    };
    std::thread::scope(|scope| {
        let mut started = Ok(());
        for number in 0..THREADS {
            let thread = std::thread::Builder::new().name(format!("nbd-{number}"));
            match thread.spawn_scoped(scope, || connection.work()) {
                Ok(_) => {}
                // A client is served with fewer threads too.
                Err(error) if number == 0 => started = Err(error),
                Err(_) => break,
            }
        }
        started
    })
}

/// A request with its data, received.
struct Received<'a> {
    request: Request,
    /// The data of a write that can be carried out.
    data: Buffer<'a>,
    command: Result<Command, Refusal>,
}

impl Connection<'_> {
    fn work(&self) {
        let _ends = EndsOnPanic(self);
        let mut kept = Vec::new();
        loop {
            let received = match self.receive(&mut kept) {
                Ok(Some(received)) => received,
                Ok(None) => return,
                Err(error) => {
                    tracing::debug!(%error, "the client's connection ended");
                    return self.end();
                }
            };
            let sent = self.carry_out(received, &mut kept);
            if let Err(error) = sent {
                tracing::debug!(%error, "a reply was not sent");
                return self.end();
            }
        }
    }

    /// Lets every thread end.
    fn end(&self) {
        // The thread that receives waits in the socket, with the lock: only a shutdown wakes it.
        let stream = self.outgoing.lock().unwrap_or_else(PoisonError::into_inner);
        let _ = stream.shutdown(std::net::Shutdown::Both);
    }

    /// Receives the next request. `None` at the end of the connection.
    fn receive(&self, kept: &mut Vec<u8>) -> io::Result<Option<Received<'_>>> {
        let mut incoming = self.incoming.lock().unwrap_or_else(PoisonError::into_inner);
        if incoming.ended {
            return Ok(None);
        }
        // Whatever happens below, nothing after it can be understood.
        incoming.ended = true;
        let mut head = [0; HEAD];
        incoming.stream.read_exact(&mut head)?;
        let request = Request::parse(&head)
            .ok_or_else(|| io::Error::new(io::ErrorKind::InvalidData, "a request does not begin as one"))?;
        if request.kind == CMD_DISC {
            return Ok(None);
        }
        // The export may change until the request uses it: it is checked again then.
        let command = request.check(self.agreed, self.disk.export());
        let mut data = Buffer::default();
        match request.payload() {
            0 => {}
            length if command.is_err() => {
                let dropped = io::copy(&mut (&mut incoming.stream).take(length.into()), &mut io::sink())?;
                if dropped != u64::from(length) {
                    return Err(io::ErrorKind::UnexpectedEof.into());
                }
            }
            length => {
                data = self.memory.buffer(length as usize, kept);
                incoming.stream.read_exact(&mut data.bytes)?;
            }
        }
        incoming.ended = false;
        Ok(Some(Received { request, data, command }))
    }

    fn carry_out(&self, received: Received<'_>, kept: &mut Vec<u8>) -> io::Result<()> {
        let Received { request, data, command } = received;
        let outcome = match command {
            Ok(command) => self.apply(command, &request, data, kept),
            Err(refusal) => Err(Failure::from(refusal)),
        };
        match outcome {
            Ok(reply) => {
                self.send(&reply.bytes)?;
                reply.keep(kept);
                Ok(())
            }
            Err(Failure(number, message)) => self.send(&refused(self.agreed, &request, number, &message)),
        }
    }

    fn send(&self, bytes: &[u8]) -> io::Result<()> {
        self.outgoing.lock().unwrap_or_else(PoisonError::into_inner).write_all(bytes)
    }

    /// Uses the image, and returns the reply.
    fn apply(
        &self,
        command: Command,
        request: &Request,
        data: Buffer<'_>,
        kept: &mut Vec<u8>,
    ) -> Result<Buffer<'_>, Failure> {
        let (offset, length) = (request.offset, u64::from(request.length));
        match command {
            Command::Read => {
                let head = read_head(self.agreed);
                // Memory is waited for before the image is used: a hold must not wait for a slow client.
                let mut reply = self.memory.buffer(head + request.length as usize, kept);
                let used = self.disk.enter();
                self.check_again(request, &used)?;
                let place = reply.bytes.get_mut(head..).unwrap_or_default();
                used.served.image.read_at(place, offset).map_err(failed(&used, "read"))?;
                drop(used);
                fill_read_head(&mut reply.bytes, self.agreed, request);
                return Ok(reply);
            }
            Command::Write { fua } => {
                let used = self.disk.enter();
                self.check_again(request, &used)?;
                used.served.image.write_at(&data.bytes, offset).map_err(failed(&used, "write"))?;
                flush_if(fua, &used)?;
                drop(used);
                data.keep(kept);
            }
            Command::Flush => {
                if let Some(used) = self.disk.enter_to_flush() {
                    flush_if(!used.export().read_only, &used)?;
                }
            }
            Command::Trim { fua } => {
                self.in_steps(request, fua, "trim", |used, at, length| used.served.image.trim(at, length))?
            }
            Command::Zero { fua, may_free, fast_only } => {
                let how = Zeroing { may_free, fast_only };
                self.in_steps(request, fua, "zero", |used, at, length| {
                    used.served.image.zero(at, length, how)
                })?;
            }
            Command::Status { one } => {
                let used = self.disk.enter();
                self.check_again(request, &used)?;
                let limit = if one { 1 } else { MAX_EXTENTS };
                let found = used.served.image.map(offset, length, limit);
                let mut extents = found.map_err(failed(&used, "map"))?;
                if extents.first().is_none_or(|extent| extent.length == 0) {
                    // An image that says nothing has data.
                    extents = vec![Extent { length, content: Content::Data }];
                }
                return Ok(Buffer::of(status(request, &extents, one)));
            }
        }
        Ok(Buffer::of(done(request)))
    }

    /// Checks the request against the image that it uses: it may be another one than when it came.
    fn check_again(&self, request: &Request, used: &Use<'_>) -> Result<(), Failure> {
        request.check(self.agreed, used.export())?;
        Ok(())
    }

    fn in_steps(
        &self,
        request: &Request,
        fua: bool,
        doing: &'static str,
        step: impl Fn(&Use<'_>, u64, u64) -> io::Result<()>,
    ) -> Result<(), Failure> {
        let (mut at, end) = (request.offset, request.offset + u64::from(request.length));
        while at < end {
            let length = STEP.min(end - at);
            let used = self.disk.enter();
            self.check_again(request, &used)?;
            step(&used, at, length).map_err(failed(&used, doing))?;
            at += length;
            flush_if(fua && at == end, &used)?;
        }
        Ok(())
    }
}

fn flush_if(wanted: bool, used: &Use<'_>) -> Result<(), Failure> {
    match wanted {
        true => used.served.image.flush().map_err(failed(used, "flush")),
        false => Ok(()),
    }
}

/// The number and the message of an error, for the client.
struct Failure(Errno, String);

impl From<Refusal> for Failure {
    fn from(Refusal(number, message): Refusal) -> Self {
        Self(number, message.to_owned())
    }
}

fn failed<'a>(used: &'a Use<'_>, doing: &'static str) -> impl FnOnce(io::Error) -> Failure + use<'a> {
    let path = &used.served.path;
    move |error| {
        // A refusal of a fast method is an answer, not an error.
        if error.kind() != io::ErrorKind::Unsupported {
            tracing::error!(%path, %error, "cannot {doing}");
        }
        Failure(Errno::of(&error), format!("cannot {doing} {path}: {error}"))
    }
}

/// Ends the connection if a thread panics: a client must not wait for a reply that never comes.
struct EndsOnPanic<'a, 'b>(&'a Connection<'b>);

impl Drop for EndsOnPanic<'_, '_> {
    fn drop(&mut self) {
        if std::thread::panicking() {
            self.0.end();
        }
    }
}

/// The memory of large requests.
struct Memory {
    free: Mutex<usize>,
    changed: Condvar,
}

/// Bytes of a request or a reply, and their share of the memory.
#[derive(Default)]
struct Buffer<'a> {
    bytes: Vec<u8>,
    share: Option<(&'a Memory, usize)>,
}

impl Memory {
    /// Returns a buffer of `length` bytes, the thread's own if that is enough. Waits while there is no memory
    /// for it.
    fn buffer(&self, length: usize, kept: &mut Vec<u8>) -> Buffer<'_> {
        if length <= SMALL {
            let mut bytes = std::mem::take(kept);
            bytes.resize(length, 0);
            return Buffer { bytes, share: None };
        }
        // One of the largest always fits, with its head.
        let share = length.min(LARGE_MEMORY);
        let mut free = self.lock();
        while *free < share {
            free = self.changed.wait(free).unwrap_or_else(PoisonError::into_inner);
        }
        *free -= share;
        Buffer { bytes: vec![0; length], share: Some((self, share)) }
    }

    fn lock(&self) -> MutexGuard<'_, usize> {
        self.free.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Buffer<'_> {
    fn of(bytes: Vec<u8>) -> Self {
        Self { bytes, share: None }
    }

    /// Gives the memory of a small buffer back to its thread.
    fn keep(mut self, kept: &mut Vec<u8>) {
        if self.share.is_none() && self.bytes.capacity() > kept.capacity() {
            *kept = std::mem::take(&mut self.bytes);
        }
    }
}

impl Drop for Buffer<'_> {
    fn drop(&mut self) {
        if let Some((memory, share)) = self.share {
            *memory.lock() += share;
            memory.changed.notify_all();
        }
    }
}
