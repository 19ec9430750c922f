//! The server of one disk: its two sockets and their threads.

use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use crate::control;
use crate::disk::Disk;
use crate::error::{Error, Result};
use crate::image::{Format, Served};
use crate::merge::Merges;
use crate::option::negotiate;
use crate::place::Place;
use crate::sys::peer_of;
use crate::transmission;

/// Connections of one socket at once. One of them has the disk; the others negotiate or are refused.
const MAX_CONNECTIONS: usize = 16;
/// A failing accept is repeated after this time: descriptors may be short for a moment.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// Connections that are closed at once are reported this often.
const REPORT_EVERY: Duration = Duration::from_secs(1);

/// Answers one connection.
type Answer = fn(&Server, UnixStream);

/// A disk that can be served.
pub struct Server {
    disk: Arc<Disk>,
    merges: Arc<Merges>,
    format: Box<dyn Format>,
    stopped: AtomicBool,
}

/// A server whose sockets are answered, until it is stopped.
pub struct Running {
    server: Arc<Server>,
    places: Vec<Arc<Place>>,
    threads: Vec<JoinHandle<()>>,
}

impl Server {
    /// Makes the server of an image. `format` opens others when the control socket asks for them.
    pub fn new(served: Served, format: Box<dyn Format>) -> Self {
        Self {
            disk: Arc::new(Disk::new(served)),
            merges: Arc::default(),
            format,
            stopped: AtomicBool::new(false),
        }
    }

    /// Begins to answer both sockets, in threads of their own.
    ///
    /// # Errors
    /// The system's.
    pub fn start(self, disk: Place, control: Place) -> Result<Running> {
        let server = Arc::new(self);
        let places = vec![Arc::new(disk), Arc::new(control)];
        let answers: [(&str, Answer); 2] =
            [("nbd-accept", Server::serve), ("control-accept", Server::control)];
        let mut threads = Vec::new();
        for (place, (name, answer)) in places.iter().zip(answers) {
            let (server, place) = (Arc::clone(&server), Arc::clone(place));
            let thread = std::thread::Builder::new()
                .name(name.to_owned())
                .spawn(move || accept(&server, &place, answer))
                .map_err(|error| Error::io("cannot start a thread", error))?;
            threads.push(thread);
        }
        Ok(Running { server, places, threads })
    }

    /// Serves one client of the disk.
    fn serve(&self, mut stream: UnixStream) {
        let pid = peer_of(stream.as_fd()).ok().and_then(|peer| peer.pid);
        let Ok(twin) = stream.try_clone() else { return };
        let agreed = negotiate(&mut stream, || self.disk.export(), || self.disk.admit(pid, &twin));
        drop(twin);
        match agreed {
            Ok(Some((seat, agreed))) => {
                tracing::info!(?pid, "a client uses the disk");
                if let Err(error) = transmission::serve(stream, &self.disk, agreed) {
                    tracing::error!(%error, "a client cannot be served");
                }
                // The next client comes after the last request of this one has ended.
                drop(seat);
                tracing::info!(?pid, "the client is gone");
            }
            Ok(None) => {}
            Err(error) => tracing::debug!(%error, "a client did not come to the disk"),
        }
    }

    fn control(&self, stream: UnixStream) {
        if let Err(error) = control::converse(&stream, &self.disk, &self.merges, self.format.as_ref()) {
            tracing::debug!(%error, "a control connection ended");
        }
    }
}

/// Accepts connections until the server is stopped.
fn accept(server: &Arc<Server>, place: &Place, answer: Answer) {
    let count = Arc::new(AtomicUsize::new(0));
    let mut refused = Seldom::default();
    loop {
        let accepted = place.listener().accept();
        if server.stopped.load(Ordering::Acquire) {
            return;
        }
        let stream = match accepted {
            Ok((stream, _)) => stream,
            Err(error) => {
                tracing::warn!(%error, "a connection cannot be accepted");
                std::thread::sleep(ACCEPT_PAUSE);
                continue;
            }
        };
        let taken = Taken::one_of(&count);
        let is_one_too_many = count.load(Ordering::Acquire) > MAX_CONNECTIONS;
        refused.happened += u64::from(is_one_too_many);
        if let Some(number) = refused.due(Instant::now()) {
            tracing::warn!(number, "connections were closed: more than {MAX_CONNECTIONS} at once");
        }
        if is_one_too_many {
            continue;
        }
        let server = Arc::clone(server);
        let thread = std::thread::Builder::new().name("connection".to_owned());
        let started = thread.spawn(move || {
            let _taken = taken;
            answer(&server, stream);
        });
        if let Err(error) = started {
            tracing::warn!(%error, "a connection was closed: no thread can be started");
        }
    }
}

/// Counts what may happen very often, so that it is reported once a second.
#[derive(Default)]
struct Seldom {
    happened: u64,
    reported: Option<Instant>,
}

impl Seldom {
    /// Returns how often it happened since the last report, if one is due.
    fn due(&mut self, now: Instant) -> Option<u64> {
        let is_due = self.reported.is_none_or(|last| now.duration_since(last) >= REPORT_EVERY);
        if self.happened == 0 || !is_due {
            return None;
        }
        self.reported = Some(now);
        Some(std::mem::take(&mut self.happened))
    }
}

/// One of the connections that are allowed.
struct Taken(Arc<AtomicUsize>);

impl Taken {
    fn one_of(count: &Arc<AtomicUsize>) -> Self {
        count.fetch_add(1, Ordering::AcqRel);
        Self(Arc::clone(count))
    }
}

impl Drop for Taken {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::AcqRel);
    }
}

impl Running {
    /// Ends the server: no further connection is accepted, the client is disconnected, everything that was
    /// acknowledged is made durable, and the names of the sockets are removed.
    ///
    /// # Errors
    /// The flush's.
    pub fn stop(self) -> Result<()> {
        self.server.stopped.store(true, Ordering::Release);
        for (place, thread) in self.places.iter().zip(self.threads) {
            // The thread waits for a connection. A socket that systemd keeps must not be shut down.
            if place.wake() {
                let _ = thread.join();
            }
        }
        self.server.disk.disconnect();
        self.server.disk.flush()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A flood is one line a second, and each line has the number since the last one.
    #[test]
    fn flood_is_reported_once_a_second() {
        let (mut refused, begin) = (Seldom::default(), Instant::now());
        let mut lines = Vec::new();
        for number in 0..300 {
            refused.happened += 1;
            lines.extend(refused.due(begin + Duration::from_millis(number * 10)));
        }
        assert_eq!(lines, [1, 100, 100]);
        assert_eq!(refused.due(begin + Duration::from_secs(3)), Some(99));
        assert_eq!(refused.due(begin + Duration::from_secs(9)), None);
    }
}
