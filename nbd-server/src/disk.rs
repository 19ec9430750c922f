//! The image that is served at this moment: the requests that use it, holds, exchanges, and the time without
//! an image.
//!
//! A request uses the image between two calls, after it was received and before it is answered. A hold lets
//! no further request begin and waits for those that use the image. It ends by itself after its time, so a
//! client of the control socket that dies never stops a guest for longer.
//!
//! A disk that is detached has no image: its files are closed and their locks given back, so that another
//! process can change them. Its client stays connected. Reads and writes wait for the image that is attached
//! next, without a limit: there is nothing that could answer them. A flush succeeds, because everything that
//! was acknowledged became durable before. So a QEMU whose guest is paused is never blocked.

use std::os::unix::net::UnixStream;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use camino::{Utf8Path, Utf8PathBuf};

use crate::error::{Error, ErrorKind, Result};
use crate::image::{Prepared, Served};
use crate::option::Export;

/// The longest time for which requests are held.
pub const MAX_HOLD: Duration = Duration::from_secs(10);
/// A new client waits so long for the previous one, whose connection has just ended.
const SEAT_WAIT: Duration = Duration::from_secs(2);

/// The disk of a server.
pub(crate) struct Disk {
    state: Mutex<State>,
    changed: Condvar,
}

struct State {
    /// The image; `None` while the disk is detached.
    served: Option<Arc<Served>>,
    /// The properties that the client knows.
    export: Export,
    /// What is served, or was served last.
    path: Utf8PathBuf,
    format: String,
    /// The name that the caller gave to the time without an image.
    detached: Option<String>,
    /// Counts exchanges.
    generation: u64,
    /// Requests that use the image.
    users: usize,
    hold: Option<Hold>,
    last_hold: u64,
    /// An exchange is on its way: no request begins, however long it takes.
    exchanging: bool,
    /// The image of the next exchange. It is of the image that is served now, and is dropped with it.
    prepared: Option<Ready>,
    client: Option<Client>,
}

/// An image that was prepared.
struct Ready {
    path: Utf8PathBuf,
    /// Device and inode. A name may lead to another file by now.
    file: (u64, u64),
    image: Box<dyn Prepared>,
}

struct Hold {
    number: u64,
    until: Instant,
}

/// The program that uses the disk.
struct Client {
    pid: Option<i32>,
    /// Its connection; `None` for a borrower, which is never disconnected: its end gives the disk back.
    stream: Option<UnixStream>,
}

/// The state of the disk, for reports.
pub(crate) struct Look {
    /// The image; `None` while the disk is detached.
    pub served: Option<Arc<Served>>,
    pub export: Export,
    pub path: Utf8PathBuf,
    pub format: String,
    /// The name of the time without an image.
    pub detached: Option<String>,
    pub generation: u64,
    pub is_held: bool,
    /// The image that is ready for the next exchange.
    pub prepared: Option<Utf8PathBuf>,
    /// The process of the client, if there is a client; 0 where it is not known.
    pub client: Option<i32>,
}

/// The right of one request to use the image.
pub(crate) struct Use<'a> {
    disk: &'a Disk,
    pub served: Arc<Served>,
}

/// The right of one client to send requests.
pub(crate) struct Seat<'a>(&'a Disk);

impl Disk {
    pub(crate) fn new(served: Served) -> Self {
        let state = State {
            export: export_of(&served),
            path: served.path.clone(),
            format: served.format.clone(),
            detached: None,
            served: Some(Arc::new(served)),
            generation: 1,
            users: 0,
            hold: None,
            last_hold: 0,
            exchanging: false,
            prepared: None,
            client: None,
        };
        Self { state: Mutex::new(state), changed: Condvar::new() }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn wait<'a>(&self, state: MutexGuard<'a, State>, until: Option<Instant>) -> MutexGuard<'a, State> {
        match until {
            None => self.changed.wait(state).unwrap_or_else(PoisonError::into_inner),
            Some(until) => {
                let left = until.saturating_duration_since(Instant::now());
                self.changed.wait_timeout(state, left).unwrap_or_else(PoisonError::into_inner).0
            }
        }
    }

    /// Begins a request: waits while the disk is held or detached.
    pub(crate) fn enter(&self) -> Use<'_> {
        let mut state = self.lock();
        loop {
            if state.exchanging {
                state = self.wait(state, None);
            } else if let Some(hold) = state.live_hold() {
                let until = hold.until;
                state = self.wait(state, Some(until));
            } else if let Some(served) = state.served.clone() {
                state.users += 1;
                return Use { disk: self, served };
            } else {
                state = self.wait(state, None);
            }
        }
    }

    /// Begins a flush of the client: as [`Disk::enter`], but `None` if the disk is detached. Then there is
    /// nothing to flush.
    pub(crate) fn enter_to_flush(&self) -> Option<Use<'_>> {
        let mut state = self.lock();
        while state.exchanging {
            state = self.wait(state, None);
        }
        state.served.as_ref()?;
        drop(state);
        Some(self.enter())
    }

    /// The export as the client knows it.
    pub(crate) fn export(&self) -> Export {
        self.lock().export
    }

    pub(crate) fn look(&self) -> Look {
        let mut state = self.lock();
        Look {
            is_held: state.live_hold().is_some(),
            served: state.served.clone(),
            export: state.export,
            path: state.path.clone(),
            format: state.format.clone(),
            detached: state.detached.clone(),
            generation: state.generation,
            prepared: state.prepared.as_ref().map(|ready| ready.path.clone()),
            client: state.client.as_ref().map(|client| client.pid.unwrap_or(0)),
        }
    }

    /// Makes a client the one that uses the disk.
    ///
    /// # Errors
    /// The message for the client, if another one uses it.
    pub(crate) fn admit(
        &self,
        pid: Option<i32>,
        stream: &UnixStream,
    ) -> std::result::Result<Seat<'_>, String> {
        let stream = stream.try_clone().map_err(|error| format!("the server has no resources: {error}"))?;
        self.seat(pid, Some(stream))
    }

    /// Takes the place of the client for a process that borrows the images, so that no client comes.
    ///
    /// # Errors
    /// [`ErrorKind::Busy`] if a client uses the disk.
    pub(crate) fn admit_borrower(&self, pid: Option<i32>) -> Result<Seat<'_>> {
        self.seat(pid, None).map_err(|why| Error::new(ErrorKind::Busy, why))
    }

    fn seat(&self, pid: Option<i32>, stream: Option<UnixStream>) -> std::result::Result<Seat<'_>, String> {
        let until = Instant::now() + SEAT_WAIT;
        let mut state = self.lock();
        while let Some(client) = &state.client {
            if Instant::now() >= until {
                let by = client.pid.map_or_else(String::new, |pid| format!(" (process {pid})"));
                return Err(format!("another client{by} uses this disk; a disk has one client at a time"));
            }
            state = self.wait(state, Some(until));
        }
        state.client = Some(Client { pid, stream });
        Ok(Seat(self))
    }

    /// Disconnects the client, if there is one. A client that reconnects learns the disk's properties again.
    pub(crate) fn disconnect(&self) {
        if let Some(stream) = self.lock().client.as_ref().and_then(|client| client.stream.as_ref()) {
            let _ = stream.shutdown(std::net::Shutdown::Both);
        }
    }

    /// Holds all requests, for `time` at most. Returns when none uses the image, with the hold's number.
    pub(crate) fn hold(&self, time: Duration) -> Result<u64> {
        let mut state = self.lock();
        if state.exchanging || state.live_hold().is_some() {
            return Err(Error::new(ErrorKind::Busy, "the disk is held already"));
        }
        state.last_hold += 1;
        let (number, until) = (state.last_hold, Instant::now() + time.min(MAX_HOLD));
        state.hold = Some(Hold { number, until });
        while state.users > 0 {
            if Instant::now() >= until {
                state.hold = None;
                self.changed.notify_all();
                return Err(Error::new(
                    ErrorKind::Expired,
                    "the requests on their way did not end in time; the disk goes on",
                ));
            }
            state = self.wait(state, Some(until));
        }
        Ok(number)
    }

    /// Ends a hold.
    ///
    /// # Errors
    /// [`ErrorKind::Expired`] if it was over before, so that requests have been carried out since.
    pub(crate) fn go(&self, number: u64) -> Result<()> {
        let mut state = self.lock();
        require_hold(&mut state, number)?;
        state.hold = None;
        self.changed.notify_all();
        Ok(())
    }

    /// Makes every acknowledged write durable.
    pub(crate) fn flush(&self) -> Result<()> {
        let mut state = self.lock();
        while state.exchanging {
            state = self.wait(state, None);
        }
        let served = state.served.clone();
        drop(state);
        served.map_or(Ok(()), |served| flush(&served))
    }

    /// Prepares the image at `path` for the next exchange, while requests use the disk; `open` does that, and
    /// returns `None` if there is nothing to prepare. An image that was prepared before is dropped. Then
    /// everything that was acknowledged is made durable, so that the exchange has little left to flush.
    pub(crate) fn prepare(
        &self,
        path: &Utf8Path,
        open: impl FnOnce(&Served) -> Result<Option<Box<dyn Prepared>>>,
    ) -> Result<()> {
        self.forget();
        let Look { served, generation, .. } = self.look();
        let Some(current) = served else { return Err(no_image()) };
        let Some(image) = open(&current)? else { return Ok(()) };
        let file = file_at(path).ok_or_else(|| {
            Error::new(ErrorKind::Refused, format!("{path} is another file than a moment before"))
        })?;
        flush(&current)?;
        let mut state = self.lock();
        // What it was prepared for must still be served.
        if state.generation != generation || state.served.is_none() || state.exchanging {
            drop(state);
            return Err(Error::new(ErrorKind::Busy, "another exchange is on its way"));
        }
        let previous = state.prepared.replace(Ready { path: path.to_owned(), file, image });
        drop(state);
        drop(previous);
        Ok(())
    }

    /// Drops the image that was prepared, if there is one: its locks are given back.
    pub(crate) fn forget(&self) {
        let prepared = self.lock().prepared.take();
        drop(prepared);
    }

    /// Takes the image that was prepared, if it is the one at `path`. Called in the exchange for it.
    pub(crate) fn take_prepared(&self, path: &Utf8Path) -> Option<Box<dyn Prepared>> {
        let prepared = self.lock().prepared.take();
        prepared.filter(|ready| file_at(path) == Some(ready.file)).map(|ready| ready.image)
    }

    /// Refuses an exchange that could not begin now.
    pub(crate) fn may_exchange(&self, hold: Option<u64>) -> Result<()> {
        self.lock().may_exchange(hold)
    }

    /// Replaces the image by the one that `open` returns, while no request uses it. `hold` is the number of
    /// the caller's own hold, which then goes on.
    ///
    /// The order: 1) no request uses the image; 2) all that it acknowledged is durable; 3) `open`; 4)
    /// requests use the new one. A failure of any leaves the previous image.
    pub(crate) fn exchange(
        &self,
        hold: Option<u64>,
        open: impl FnOnce(&Served) -> Result<Served>,
    ) -> Result<u64> {
        let (ours, current) = self.begin_exchange(hold)?;
        let Some(current) = current else { return Err(no_image()) };
        flush(&current)?;
        let new = open(&current)?;
        drop(current);
        Ok(self.end_exchange(ours, new))
    }

    /// Closes the image, and names the time without one `label`. A disk that is detached already keeps the
    /// first label. When this returns, the image's locks are given back.
    ///
    /// The order: 1) no request uses the image; 2) all that it acknowledged is durable; 3) `close` drops what
    /// the format still has of it. A failure leaves the image.
    pub(crate) fn detach(&self, label: &str, close: impl FnOnce()) -> Result<u64> {
        let (ours, current) = self.begin_exchange(None)?;
        let Some(mut current) = current else { return Ok(self.lock().generation) };
        flush(&current)?;
        self.forget();
        let mut state = self.lock();
        state.served = None;
        state.detached = Some(label.to_owned());
        let generation = state.generation;
        drop(state);
        close();
        // A report that is written at this moment may still have it.
        let until = Instant::now() + SEAT_WAIT;
        while let Err(shared) = Arc::try_unwrap(current) {
            if Instant::now() >= until {
                let mut state = self.lock();
                (state.served, state.detached) = (Some(shared), None);
                return Err(Error::new(ErrorKind::Busy, "the image is in use by a request; it stays"));
            }
            current = shared;
            std::thread::sleep(Duration::from_millis(1));
        }
        drop(ours);
        Ok(generation)
    }

    /// Gives a detached disk an image.
    ///
    /// # Errors
    /// [`ErrorKind::Refused`] if it has one; those of `open`: the disk stays detached.
    pub(crate) fn attach(&self, open: impl FnOnce() -> Result<Served>) -> Result<u64> {
        let (ours, current) = self.begin_exchange(None)?;
        if let Some(current) = current {
            return Err(Error::new(
                ErrorKind::Refused,
                format!("the disk is not detached: it serves {}", current.path),
            ));
        }
        let new = open()?;
        Ok(self.end_exchange(ours, new))
    }

    /// Does `work` while no request uses the image, and all that it acknowledged is durable. The image stays.
    pub(crate) fn at_rest<T>(&self, work: impl FnOnce(&Served) -> Result<T>) -> Result<T> {
        let (_ours, current) = self.begin_exchange(None)?;
        let Some(current) = current else {
            return Err(Error::new(ErrorKind::Refused, "the disk is detached: it has no image"));
        };
        flush(&current)?;
        // The work may change what the next image is backed by.
        self.forget();
        work(&current)
    }

    /// Waits until no request uses the image, and lets none begin before the exchange is over.
    fn begin_exchange(&self, hold: Option<u64>) -> Result<(Exchange<'_>, Option<Arc<Served>>)> {
        let mut state = self.lock();
        state.may_exchange(hold)?;
        let until = Instant::now() + MAX_HOLD;
        state.exchanging = true;
        let ours = Exchange(self);
        while state.users > 0 {
            if Instant::now() >= until {
                drop(state);
                return Err(Error::new(
                    ErrorKind::Expired,
                    "the requests on their way did not end in time; the disk goes on",
                ));
            }
            state = self.wait(state, Some(until));
        }
        let current = state.served.clone();
        drop(state);
        Ok((ours, current))
    }

    /// Serves `new` from now on. A client that knows other properties of the disk is disconnected, and learns
    /// them when it comes again.
    fn end_exchange(&self, ours: Exchange<'_>, new: Served) -> u64 {
        let mut state = self.lock();
        let has_changed = export_of(&new) != state.export;
        state.export = export_of(&new);
        state.path = new.path.clone();
        state.format = new.format.clone();
        state.detached = None;
        let previous = state.served.replace(Arc::new(new));
        state.generation += 1;
        let generation = state.generation;
        let prepared = state.prepared.take();
        drop(state);
        drop((previous, prepared));
        if has_changed {
            self.disconnect();
        }
        drop(ours);
        generation
    }
}

/// An exchange on its way; it ends in every case.
struct Exchange<'a>(&'a Disk);

impl Drop for Exchange<'_> {
    fn drop(&mut self) {
        self.0.lock().exchanging = false;
        self.0.changed.notify_all();
    }
}

impl State {
    /// The hold, if its time is not over. One that is over is forgotten.
    fn live_hold(&mut self) -> Option<&Hold> {
        if self.hold.as_ref().is_some_and(|hold| hold.until <= Instant::now()) {
            self.hold = None;
        }
        self.hold.as_ref()
    }

    fn may_exchange(&mut self, hold: Option<u64>) -> Result<()> {
        match hold {
            Some(number) => require_hold(self, number)?,
            None if self.live_hold().is_some() => {
                return Err(Error::new(ErrorKind::Busy, "the disk is held by another caller"));
            }
            None => {}
        }
        match self.exchanging {
            true => Err(Error::new(ErrorKind::Busy, "another exchange is on its way")),
            false => Ok(()),
        }
    }
}

fn require_hold(state: &mut State, number: u64) -> Result<()> {
    match state.live_hold() {
        Some(hold) if hold.number == number => Ok(()),
        _ => {
            Err(Error::new(ErrorKind::Expired, format!("hold {number} is over: the disk has gone on since")))
        }
    }
}

fn no_image() -> Error {
    Error::new(ErrorKind::Refused, "the disk is detached: it has no image")
        .advise("attach one; `domsnap recover` does that after an interrupted operation")
}

/// Device and inode of the file that has this name.
pub(crate) fn file_at(path: &Utf8Path) -> Option<(u64, u64)> {
    use std::os::unix::fs::MetadataExt;
    path.metadata().ok().map(|about| (about.dev(), about.ino()))
}

fn export_of(served: &Served) -> Export {
    let image = &served.image;
    Export { size: image.size(), alignment: image.alignment(), read_only: image.is_read_only() }
}

fn flush(served: &Served) -> Result<()> {
    if served.image.is_read_only() {
        return Ok(());
    }
    served.image.flush().map_err(|error| Error::io(format!("cannot flush {}", served.path), error))
}

impl Use<'_> {
    pub(crate) fn export(&self) -> Export {
        export_of(&self.served)
    }
}

impl Drop for Use<'_> {
    fn drop(&mut self) {
        let mut state = self.disk.lock();
        state.users -= 1;
        if state.users == 0 && (state.hold.is_some() || state.exchanging) {
            self.disk.changed.notify_all();
        }
    }
}

impl Drop for Seat<'_> {
    fn drop(&mut self) {
        self.0.lock().client = None;
        self.0.changed.notify_all();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::file::RawFile;

    fn served(size: u64) -> Served {
        let file = tempfile::tempfile().unwrap();
        file.set_len(size).unwrap();
        Served {
            image: Arc::new(RawFile::new(file, size, false)),
            path: "/x".into(),
            format: "raw".into(),
            snapshot: None,
            layers: Vec::new(),
        }
    }

    /// A request that comes during a hold is carried out after it, and the next hold has another number.
    #[test]
    fn request_waits_for_the_end_of_a_hold() {
        let disk = Disk::new(served(512));
        let number = disk.hold(MAX_HOLD).unwrap();
        assert_eq!(disk.hold(MAX_HOLD).unwrap_err().kind(), ErrorKind::Busy);
        std::thread::scope(|scope| {
            let waiting = scope.spawn(|| {
                drop(disk.enter());
                Instant::now()
            });
            std::thread::sleep(Duration::from_millis(100));
            assert!(!waiting.is_finished());
            let before = Instant::now();
            disk.go(number).unwrap();
            assert!(waiting.join().unwrap() >= before);
        });
        assert_eq!(disk.go(number).unwrap_err().kind(), ErrorKind::Expired);
        assert_ne!(disk.hold(MAX_HOLD).unwrap(), number);
    }

    /// A hold whose owner died ends by itself; its end is reported to an owner that comes late.
    #[test]
    fn hold_ends_after_its_time() {
        let disk = Disk::new(served(512));
        let number = disk.hold(Duration::from_millis(50)).unwrap();
        drop(disk.enter());
        assert_eq!(disk.go(number).unwrap_err().kind(), ErrorKind::Expired);
    }

    /// A hold waits for requests that use the image, and gives up after its time.
    #[test]
    fn hold_gives_up_when_a_request_does_not_end() {
        let disk = Disk::new(served(512));
        let request = disk.enter();
        assert_eq!(disk.hold(Duration::from_millis(50)).unwrap_err().kind(), ErrorKind::Expired);
        drop(request);
        disk.hold(Duration::from_millis(50)).unwrap();
    }

    /// An exchange inside of a hold leaves the hold, and a failed one leaves the image.
    #[test]
    fn exchange_works_inside_its_own_hold_alone() {
        let disk = Disk::new(served(512));
        let number = disk.hold(MAX_HOLD).unwrap();
        assert_eq!(disk.exchange(None, |_| Ok(served(1024))).unwrap_err().kind(), ErrorKind::Busy);
        let failed = disk.exchange(Some(number), |_| Err(Error::new(ErrorKind::Refused, "no")));
        assert_eq!(failed.unwrap_err().kind(), ErrorKind::Refused);
        assert_eq!(disk.export().size, 512);
        assert_eq!(disk.exchange(Some(number), |_| Ok(served(1024))).unwrap(), 2);
        assert!(disk.look().is_held);
        disk.go(number).unwrap();
        assert_eq!(disk.enter().export().size, 1024);
    }

    /// An image that is prepared. It counts its end, and fails to be served if the flag is set.
    struct Fake(Arc<std::sync::atomic::AtomicUsize>, bool);

    impl Drop for Fake {
        fn drop(&mut self) {
            self.0.fetch_add(1, std::sync::atomic::Ordering::SeqCst);
        }
    }

    impl Prepared for Fake {
        fn serve(self: Box<Self>) -> Result<Served> {
            match self.1 {
                true => Err(Error::new(ErrorKind::Refused, "no")),
                false => Ok(served(1024)),
            }
        }
    }

    /// A prepared image is served once, and only for the exchange that comes next: any other one, a detached
    /// section and a merge drop it, and its locks.
    #[test]
    fn prepared_image_is_of_the_next_exchange() {
        let directory = tempfile::tempdir_in("/var/tmp").unwrap();
        let path = Utf8PathBuf::from_path_buf(directory.path().join("next")).unwrap();
        std::fs::write(&path, "").unwrap();
        let dropped = Arc::new(std::sync::atomic::AtomicUsize::new(0));
        let count = || dropped.load(std::sync::atomic::Ordering::SeqCst);
        let prepare = |disk: &Disk, fails| {
            let fake = Fake(Arc::clone(&dropped), fails);
            disk.prepare(&path, |_| Ok(Some(Box::new(fake) as Box<dyn Prepared>))).unwrap();
            assert_eq!(disk.look().prepared.as_ref(), Some(&path));
        };
        let exchange = |disk: &Disk| {
            disk.exchange(None, |_| {
                disk.take_prepared(&path).map_or_else(|| Ok(served(2048)), Prepared::serve)
            })
        };
        let disk = Disk::new(served(512));
        prepare(&disk, false);
        exchange(&disk).unwrap();
        assert_eq!((disk.export().size, disk.look().prepared, count()), (1024, None, 1));
        exchange(&disk).unwrap();
        assert_eq!(disk.export().size, 2048);
        // One that cannot be served leaves the image that is.
        prepare(&disk, true);
        assert_eq!(exchange(&disk).unwrap_err().kind(), ErrorKind::Refused);
        assert_eq!((disk.export().size, count()), (2048, 2));
        // Another file has the name by now.
        prepare(&disk, false);
        std::fs::rename(&path, directory.path().join("other")).unwrap();
        std::fs::write(&path, "").unwrap();
        exchange(&disk).unwrap();
        assert_eq!((disk.export().size, count()), (2048, 3));
        prepare(&disk, false);
        disk.exchange(None, |_| Ok(served(512))).unwrap();
        assert_eq!(count(), 4);
        prepare(&disk, false);
        disk.at_rest(|_| Ok(())).unwrap();
        assert_eq!(count(), 5);
        prepare(&disk, false);
        prepare(&disk, false);
        assert_eq!(count(), 6);
        disk.detach("x", || assert_eq!(count(), 7)).unwrap();
        let refused = disk.prepare(&path, |_| unreachable!());
        assert_eq!(refused.unwrap_err().kind(), ErrorKind::Refused);
    }

    /// A detached disk has no image and no lock of it; reads wait for the next image, and a flush does not.
    #[test]
    fn detached_disk_waits_for_the_next_image() {
        let disk = Disk::new(served(512));
        let first = Arc::downgrade(disk.look().served.as_ref().unwrap());
        let mut closed = false;
        disk.detach("x", || closed = true).unwrap();
        assert!(closed && first.upgrade().is_none());
        assert_eq!((disk.look().detached.as_deref(), disk.export().size), (Some("x"), 512));
        disk.detach("y", || ()).unwrap();
        assert_eq!(disk.look().detached.as_deref(), Some("x"));
        assert_eq!(disk.exchange(None, |_| Ok(served(512))).unwrap_err().kind(), ErrorKind::Refused);
        disk.flush().unwrap();
        assert!(disk.enter_to_flush().is_none());
        std::thread::scope(|scope| {
            let waiting = scope.spawn(|| drop(disk.enter()));
            std::thread::sleep(Duration::from_millis(100));
            assert!(!waiting.is_finished());
            let failed = disk.attach(|| Err(Error::new(ErrorKind::Refused, "no")));
            assert!(failed.is_err() && !waiting.is_finished());
            assert_eq!(disk.attach(|| Ok(served(512))).unwrap(), 2);
            waiting.join().unwrap();
        });
        assert_eq!(disk.attach(|| Ok(served(512))).unwrap_err().kind(), ErrorKind::Refused);
        assert!(disk.look().detached.is_none() && disk.enter_to_flush().is_some());
    }

    /// The second client is refused with the first one's process, and admitted when that is gone.
    #[test]
    fn second_client_is_refused() {
        let disk = Disk::new(served(512));
        let (stream, _other) = UnixStream::pair().unwrap();
        let seat = disk.admit(Some(17), &stream).unwrap();
        assert!(disk.admit(Some(18), &stream).err().unwrap().contains("process 17"));
        drop(seat);
        disk.admit(Some(18), &stream).unwrap();
    }
}
