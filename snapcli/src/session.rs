//! One call of the command: the service, opened; its runtime; what is shown while it works; interrupts.

use std::cell::{OnceCell, RefCell};
use std::future::{Future, poll_fn};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::task::Poll;
use std::time::Duration;

use camino::Utf8PathBuf;
use catalogue_sqlite::SqliteCatalogue;
use snapcore::catalogue::OperationId;
use snapcore::service::{Domsnap, Event};
use snapcore::{DomainName, Error, ErrorKind, Result, SnapshotName, backend};
use tokio::runtime::{Builder, Runtime};
use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio_util::sync::CancellationToken;

use crate::answer::Answer;
use crate::args::Global;
use crate::backends::{Backends, Register, absolute};
use crate::failure::Failure;
use crate::progress::Progress;

/// Turns of the runtime in which tasks that were aborted end.
const ENDING_TURNS: usize = 8;

/// One call of the command.
pub struct Session {
    /// The options of every command.
    pub global: Global,
    /// The service.
    pub service: Domsnap,
    /// The backends by format.
    pub backends: Backends,
    cancel: CancellationToken,
    asking: OnceCell<Runtime>,
    warnings: RefCell<Vec<(DomainName, String)>>,
}

impl Session {
    /// Opens the service. Nothing is read yet.
    pub fn open(global: Global, register: Register<'_>) -> Result<Self> {
        let catalogue = Arc::new(SqliteCatalogue::new(state_dir(&global)?));
        let backends = Backends::of(&global, register)?;
        let service = Domsnap::new(catalogue, backends.registry.clone());
        let (cancel, asking, warnings) = Default::default();
        Ok(Self { global, service, backends, cancel, asking, warnings })
    }

    /// Token that cancels the work of this call.
    pub fn cancel(&self) -> CancellationToken {
        self.cancel.clone()
    }

    /// Warnings of changing work, each with its domain.
    pub fn warnings(&self) -> Vec<(DomainName, String)> {
        self.warnings.borrow().clone()
    }

    /// Runs `work` that makes no changes.
    pub fn ask<T>(&self, work: impl Future<Output = Result<T>>) -> Result<T, Failure> {
        let work = async {
            let done = work.await;
            // Connections that the work dropped are closed when their tasks have run once more, and between
            // two calls nothing lets them. A command may copy or serve for hours after this, and QEMU serves
            // one client of a socket at a time.
            for _ in 0..ENDING_TURNS {
                tokio::task::yield_now().await;
            }
            done
        };
        if let Some(runtime) = self.asking.get() {
            return Ok(runtime.block_on(work)?);
        }
        let runtime = Builder::new_current_thread().enable_all().build().map_err(no_runtime)?;
        Ok(self.asking.get_or_init(|| runtime).block_on(work)?)
    }

    /// Runs `work` that makes changes: shows its progress, and rolls it back at the first interrupt.
    pub fn change<T>(&self, work: impl Future<Output = Result<T>>) -> Result<T, Failure> {
        let mut progress = Progress::new(&self.global);
        // The work has a thread of its own, so that this one sees events and signals while an image is
        // written.
        let runtime =
            Builder::new_multi_thread().worker_threads(1).enable_all().build().map_err(no_runtime)?;
        let done = runtime.block_on(async {
            let mut events = self.service.events();
            let mut interrupted = Interrupts::listen()?;
            tokio::pin!(work);
            let done = loop {
                tokio::select! {
                    biased;
                    Some(event) = events.next() => progress.report(event),
                    () = interrupted.next() => progress.interrupted(&self.cancel),
                    done = &mut work => break done,
                }
            };
            while let Some(event) = events.try_next() {
                progress.report(event);
            }
            done
        });
        progress.end();
        let started = progress.started();
        self.warnings.borrow_mut().extend(progress.warnings());
        done.map_err(|error| Failure::of(error, started))
    }

    /// Runs `work`, which copies `bytes`, on a thread of its own: shows its progress, and stops it at the
    /// first interrupt.
    pub fn copy<T: Send>(
        &self,
        kind: &str,
        domain: &DomainName,
        snapshot: &SnapshotName,
        bytes: u64,
        work: impl FnOnce(&dyn backend::Progress, &(dyn Fn() -> bool + Sync)) -> Result<T> + Send,
    ) -> Result<T, Failure> {
        let mut progress = Progress::new(&self.global);
        let operation = OperationId::fresh();
        progress.report(Event::Started {
            operation,
            domain: domain.clone(),
            kind: kind.to_owned(),
            snapshots: vec![snapshot.clone()],
            steps: 1,
            bytes,
        });
        let runtime = Builder::new_current_thread().enable_all().build().map_err(no_runtime)?;
        let moved = Moved(AtomicU64::new(0));
        let cancel = self.cancel();
        let cancelled = || cancel.is_cancelled();
        let done = std::thread::scope(|threads| {
            let (moved, cancelled) = (&moved, &cancelled);
            let worker = threads.spawn(move || work(moved, cancelled));
            runtime.block_on(async {
                let mut interrupted = Interrupts::listen()?;
                let mut tick = tokio::time::interval(DRAWN_EVERY);
                while !worker.is_finished() {
                    tokio::select! {
                        _ = tick.tick() => {
                            let done = moved.0.load(Ordering::Relaxed);
                            progress.report(Event::Progress { operation, index: 0, done, total: bytes });
                        }
                        () = interrupted.next() => progress.interrupted(&self.cancel),
                    }
                }
                Ok::<_, Error>(())
            })?;
            worker.join().unwrap_or_else(|_| {
                Err(Error::new(ErrorKind::Internal, format!("the thread of the {kind} has ended")))
            })
        });
        progress.end();
        // What was found before the first write is a refusal.
        let is_begun = |error: &Error| error.state_now() != Some("no changes made");
        done.map_err(|error| {
            let started = is_begun(&error);
            Failure::of(error, started)
        })
    }

    /// Builds the answer of a changing command: empty with `--quiet`.
    pub fn changed<T: serde::Serialize>(&self, document: T, text: impl FnOnce(&T) -> String) -> Answer {
        let answer = match (self.global.json, self.global.quiet) {
            (true, _) => Answer::document(document),
            (false, true) => Answer::text(""),
            (false, false) => Answer::text(text(&document)),
        };
        Answer { changed: true, ..answer }
    }

    /// Builds the answer of a command whose output is its purpose.
    pub fn reported<T: serde::Serialize>(&self, document: T, text: impl FnOnce(&T) -> String) -> Answer {
        match self.global.json {
            true => Answer::document(document),
            false => Answer::text(text(&document)),
        }
    }
}

/// Time between two looks at the progress of a copy.
const DRAWN_EVERY: Duration = Duration::from_millis(20);

/// Bytes that a copy has moved.
struct Moved(AtomicU64);

impl backend::Progress for Moved {
    fn bytes(&self, done: u64, _total: u64) {
        self.0.store(done, Ordering::Relaxed);
    }
}

/// The signals that roll back the operation: SIGINT, SIGTERM, and SIGHUP, which a lost terminal or
/// session sends. One that was ignored when the command was started (`nohup`, a shell's background job) stays
/// so.
struct Interrupts {
    heard: Vec<Signal>,
    /// Heard and not acted upon: a limit on the size of files then fails one write, and does not kill this
    /// process in the middle of an operation.
    _too_large: Option<Signal>,
}

impl Interrupts {
    fn listen() -> Result<Self> {
        let ignored = ignored_signals();
        let kinds = [SignalKind::interrupt(), SignalKind::terminate(), SignalKind::hangup()];
        let heard = kinds.into_iter().filter(|kind| ignored >> (kind.as_raw_value() - 1) & 1 == 0);
        let listened = heard.map(signal).collect::<std::io::Result<_>>();
        let too_large = signal(SignalKind::from_raw(rustix::process::Signal::XFSZ.as_raw())).ok();
        listened
            .map(|heard| Self { heard, _too_large: too_large })
            .map_err(|cause| Error::new(ErrorKind::Io, "signals cannot be listened for").because(cause))
    }

    /// Waits for the next one, of whichever kind.
    async fn next(&mut self) {
        poll_fn(|context| {
            let came = self.heard.iter_mut().any(|signal| signal.poll_recv(context).is_ready());
            if came { Poll::Ready(()) } else { Poll::Pending }
        })
        .await;
    }
}

/// The signals that this process ignores, as the system has them: bit 0 is signal 1.
fn ignored_signals() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let mask = status.lines().find_map(|line| line.strip_prefix("SigIgn:"));
    mask.and_then(|mask| u64::from_str_radix(mask.trim(), 16).ok()).unwrap_or(0)
}

fn no_runtime(cause: std::io::Error) -> Error {
    Error::new(ErrorKind::Io, "the event loop cannot be started").because(cause)
}

/// Returns the directory of the catalogue and the journal.
pub fn state_dir(global: &Global) -> Result<Utf8PathBuf> {
    if let Some(said) = &global.state_dir {
        return absolute(said);
    }
    if let Some(said) = std::env::var_os("DOMSNAP_STATE_DIR").filter(|said| !said.is_empty()) {
        let said = Utf8PathBuf::try_from(std::path::PathBuf::from(said))
            .map_err(|cause| Error::new(ErrorKind::Usage, "DOMSNAP_STATE_DIR is not UTF-8").because(cause))?;
        return absolute(&said);
    }
    if rustix::process::geteuid().is_root() {
        return Ok("/var/lib/domsnap".into());
    }
    let said = |name: &str| std::env::var(name).ok().map(Utf8PathBuf::from).filter(|path| path.is_absolute());
    said("XDG_STATE_HOME")
        .or_else(|| said("HOME").map(|home| home.join(".local/state")))
        .map(|state| state.join("domsnap"))
        .ok_or_else(|| {
            Error::new(ErrorKind::Usage, "no place for the catalogue: neither XDG_STATE_HOME nor HOME is set")
                .advise("name one with --state-dir DIR or DOMSNAP_STATE_DIR")
        })
}
