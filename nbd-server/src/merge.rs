//! Merges of layers of the image that is served, in a thread of their own, while the client uses the disk.
//!
//! A merge moves data first, which changes nothing that the disk shows. Then there are two endings:
//!
//! * The image that is served stays the top of its chain. The merge ends by itself: in an exchange, the chain
//!   without the merged layers is opened.
//! * The top itself is merged down. From the end of the move until the exchange, each write goes to both
//!   images. The caller moves the path that names the image meanwhile, and then asks for the pivot. Whichever
//!   of the two images the path names when this process dies, every acknowledged write is in it.
//!
//! A merge that ends in any other way has changed nothing that the chain shows, and can be repeated. At most
//! one is on its way, and no other exchange begins meanwhile.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};

use crate::disk::Disk;
use crate::error::{Error, ErrorKind, Result};
use crate::image::{Format, MergeRequest, Merging};

/// The caller of a pivot or a cancel waits so long for the merge's thread.
const PATIENCE: Duration = Duration::from_secs(50);
/// A limited merge sleeps no longer at once, so that it can be cancelled.
const NAP: Duration = Duration::from_millis(100);

/// How far a merge is.
#[derive(Serialize, Deserialize, Debug, Clone, Copy, PartialEq, Eq)]
#[serde(rename_all = "kebab-case")]
#[non_exhaustive]
pub enum MergePhase {
    /// Data is moved.
    Moving,
    /// Both images show the same, and each write goes to both: it waits for the pivot.
    Ready,
    /// It is done.
    Done,
    /// It failed or was cancelled.
    Failed,
}

/// A merge, for reports.
#[derive(Serialize, Deserialize, Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct MergeInfo {
    /// The request.
    pub request: MergeRequest,
    /// How far it is.
    pub phase: MergePhase,
    /// Bytes that were moved.
    pub done: u64,
    /// Bytes that are to be moved in all, as far as known.
    pub total: u64,
    /// The reason, if it failed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub error: Option<String>,
    /// Advice, if it failed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub advice: Option<String>,
}

/// The progress of a merge, and the wish that it ends. Given to [`Merging::run`].
#[derive(Debug, Default)]
pub struct MergeWatch {
    done: AtomicU64,
    total: AtomicU64,
    cancelled: AtomicBool,
    /// Bytes a second; 0 is no limit.
    rate: AtomicU64,
}

impl MergeWatch {
    /// Sets the bytes that are to be moved.
    pub fn expect(&self, total: u64) {
        self.total.store(total, Ordering::Relaxed);
    }

    /// Reports bytes that were moved. Sleeps if the rate is limited; another rate is obeyed at once.
    pub fn moved(&self, bytes: u64) {
        self.done.fetch_add(bytes, Ordering::Relaxed);
        let mut left = bytes as f64;
        while left > 0.0 && !self.is_cancelled() {
            let rate = match self.rate.load(Ordering::Relaxed) {
                0 => return,
                rate => rate as f64,
            };
            let nap = NAP.as_secs_f64().min(left / rate);
            std::thread::sleep(Duration::from_secs_f64(nap));
            left -= nap * rate;
            if nap < NAP.as_secs_f64() {
                return;
            }
        }
    }

    /// Returns true if the merge should end.
    pub fn is_cancelled(&self) -> bool {
        self.cancelled.load(Ordering::Relaxed)
    }
}

/// The merge of a server: the one that is on its way, or the last one.
#[derive(Default)]
pub(crate) struct Merges {
    state: Mutex<Option<Job>>,
    changed: Condvar,
}

struct Job {
    request: MergeRequest,
    watch: Arc<MergeWatch>,
    phase: MergePhase,
    /// True if the pivot is wanted.
    pivot: bool,
    error: Option<Error>,
}

impl Job {
    fn is_active(&self) -> bool {
        matches!(self.phase, MergePhase::Moving | MergePhase::Ready)
    }
}

/// No merge begins as long as it exists.
pub(crate) struct NoMerge<'a>(
    #[allow(dead_code, reason = "its life is its use")] MutexGuard<'a, Option<Job>>,
);

impl Merges {
    fn lock(&self) -> MutexGuard<'_, Option<Job>> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Refuses an exchange while a merge is on its way.
    pub(crate) fn none(&self) -> Result<NoMerge<'_>> {
        let state = self.lock();
        match state.as_ref().is_some_and(Job::is_active) {
            true => Err(Error::new(ErrorKind::Busy, "layers of the disk are being merged")
                .advise("wait for the merge, or cancel it with `cancel-merge`")),
            false => Ok(NoMerge(state)),
        }
    }

    pub(crate) fn info(&self) -> Option<MergeInfo> {
        self.lock().as_ref().map(|job| MergeInfo {
            request: job.request.clone(),
            phase: job.phase,
            done: job.watch.done.load(Ordering::Relaxed),
            total: job.watch.total.load(Ordering::Relaxed),
            error: job.error.as_ref().map(ToString::to_string),
            advice: job.error.as_ref().and_then(|error| error.advice().map(str::to_owned)),
        })
    }

    /// Begins a merge. If the same one is on its way, nothing happens.
    pub(crate) fn begin(
        self: &Arc<Self>,
        disk: &Arc<Disk>,
        format: &dyn Format,
        request: MergeRequest,
        rate: u64,
    ) -> Result<()> {
        let mut state = self.lock();
        if let Some(job) = state.as_ref().filter(|job| job.is_active()) {
            return match job.request == request {
                true => Ok(()),
                false => Err(Error::new(ErrorKind::Busy, "another merge is on its way")
                    .advise("wait for it, or cancel it with `cancel-merge`")),
            };
        }
        let merging = disk.at_rest(|current| format.merge(current, &request))?;
        let watch = Arc::new(MergeWatch { rate: rate.into(), ..MergeWatch::default() });
        *state = Some(Job {
            request,
            watch: Arc::clone(&watch),
            phase: MergePhase::Moving,
            pivot: false,
            error: None,
        });
        drop(state);
        let (merges, disk) = (Arc::clone(self), Arc::clone(disk));
        let started = std::thread::Builder::new().name("merge".to_owned()).spawn(move || {
            let ended = merges.carry_out(&disk, merging, &watch);
            merges.end(ended);
        });
        started.map(drop).map_err(|error| {
            let error = Error::io("cannot start a thread", error);
            self.end(Err(Error::new(error.kind(), error.to_string())));
            error
        })
    }

    fn end(&self, ended: Result<()>) {
        if let Some(job) = self.lock().as_mut() {
            match ended {
                Ok(()) => job.phase = MergePhase::Done,
                Err(error) => {
                    tracing::warn!(%error, "layers were not merged");
                    (job.phase, job.error) = (MergePhase::Failed, Some(error));
                }
            }
        }
        self.changed.notify_all();
    }

    fn carry_out(&self, disk: &Disk, mut merging: Box<dyn Merging>, watch: &MergeWatch) -> Result<()> {
        let cancelled = || Error::new(ErrorKind::Cancelled, "the merge was cancelled");
        merging.run(watch)?;
        if watch.is_cancelled() {
            return Err(cancelled());
        }
        if !merging.pivots() {
            return finish(disk, merging.as_mut());
        }
        let mut state = self.lock();
        loop {
            let Some(job) = state.as_mut() else { return Err(cancelled()) };
            if watch.is_cancelled() {
                return Err(cancelled());
            }
            job.phase = MergePhase::Ready;
            if !job.pivot {
                self.changed.notify_all();
                state = self.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
                continue;
            }
            drop(state);
            let Err(error) = finish(disk, merging.as_mut()) else { return Ok(()) };
            // The path may name the lower image by now. So writes go on to both, until the caller cancels or
            // asks again.
            tracing::error!(%error, "the merged image cannot be served");
            state = self.lock();
            if let Some(job) = state.as_mut() {
                (job.pivot, job.error) = (false, Some(error));
            }
        }
    }

    /// Ends a merge that is ready: the disk is served from the merged image when this returns.
    pub(crate) fn pivot(&self) -> Result<()> {
        let mut state = self.lock();
        match state.as_mut() {
            Some(job) if job.phase == MergePhase::Ready => (job.pivot, job.error) = (true, None),
            Some(job) if job.phase == MergePhase::Done => return Ok(()),
            _ => return Err(Error::new(ErrorKind::Refused, "no merge is ready for its pivot")),
        }
        self.changed.notify_all();
        let state = self.wait(state, |job| job.pivot)?;
        match state.as_ref().and_then(|job| job.error.as_ref()) {
            None => Ok(()),
            Some(error) => Err(Error::new(error.kind(), error.to_string())),
        }
    }

    /// Limits the merge that is on its way to so many bytes a second; 0 is no limit. Without one, nothing
    /// happens.
    pub(crate) fn limit(&self, rate: u64) {
        if let Some(job) = self.lock().as_ref() {
            job.watch.rate.store(rate, Ordering::Relaxed);
        }
    }

    /// Cancels a merge that is on its way, and waits for its end. A merge whose pivot was asked for goes on.
    pub(crate) fn cancel(&self) -> Result<()> {
        let state = self.lock();
        match state.as_ref() {
            Some(job) if job.is_active() && !job.pivot => job.watch.cancelled.store(true, Ordering::Relaxed),
            _ => return Ok(()),
        }
        self.changed.notify_all();
        self.wait(state, |_| true).map(drop)
    }

    /// Waits until no merge is on its way of which `goes_on` is true.
    fn wait<'a>(
        &self,
        mut state: MutexGuard<'a, Option<Job>>,
        goes_on: impl Fn(&Job) -> bool,
    ) -> Result<MutexGuard<'a, Option<Job>>> {
        let until = Instant::now() + PATIENCE;
        while state.as_ref().is_some_and(|job| job.is_active() && goes_on(job)) {
            let left = until.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Err(Error::new(ErrorKind::Expired, "the merge does not end in time; it goes on"));
            }
            state = self.changed.wait_timeout(state, left).unwrap_or_else(PoisonError::into_inner).0;
        }
        Ok(state)
    }
}

/// Ends a merge, in an exchange. Another one, or a hold, is waited for: each is over soon.
fn finish(disk: &Disk, merging: &mut dyn Merging) -> Result<()> {
    let until = Instant::now() + PATIENCE / 2;
    loop {
        match disk.exchange(None, |_| merging.finish()) {
            Err(error)
                if matches!(error.kind(), ErrorKind::Busy | ErrorKind::Expired) && Instant::now() < until =>
            {
                std::thread::sleep(NAP);
            }
            ended => return ended.map(drop),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::AtomicUsize;

    use super::*;
    use crate::file::RawFile;
    use crate::image::Served;

    fn served(path: &str) -> Served {
        let file = tempfile::tempfile().unwrap();
        file.set_len(512).unwrap();
        Served {
            image: Arc::new(RawFile::new(file, 512, false)),
            path: path.into(),
            format: "raw".into(),
            snapshot: None,
            layers: Vec::new(),
        }
    }

    /// A format whose merges run until they are cancelled, or pivot, or fail so many times at their end.
    struct Fake {
        endless: bool,
        pivots: bool,
        failures: Arc<AtomicUsize>,
    }

    struct FakeMerge(bool, bool, Arc<AtomicUsize>);

    impl Format for Fake {
        fn open(&self, _: &camino::Utf8Path) -> Result<Served> {
            Ok(served("/opened"))
        }

        fn merge(&self, _: &Served, _: &MergeRequest) -> Result<Box<dyn Merging>> {
            Ok(Box::new(FakeMerge(self.endless, self.pivots, Arc::clone(&self.failures))))
        }
    }

    impl Merging for FakeMerge {
        fn run(&mut self, watch: &MergeWatch) -> Result<()> {
            watch.expect(7);
            watch.moved(7);
            while self.0 && !watch.is_cancelled() {
                std::thread::sleep(Duration::from_millis(1));
            }
            Ok(())
        }

        fn pivots(&self) -> bool {
            self.1
        }

        fn finish(&mut self) -> Result<Served> {
            match self.2.fetch_update(Ordering::SeqCst, Ordering::SeqCst, |left| left.checked_sub(1)) {
                Ok(_) => Err(Error::new(ErrorKind::Io, "not yet")),
                Err(_) => Ok(served("/merged")),
            }
        }
    }

    fn begin(endless: bool, pivots: bool, failures: usize) -> (Arc<Merges>, Arc<Disk>, Fake, MergeRequest) {
        let fake = Fake { endless, pivots, failures: Arc::new(AtomicUsize::new(failures)) };
        let (merges, disk) = (Arc::<Merges>::default(), Arc::new(Disk::new(served("/first"))));
        let request = MergeRequest { run: vec!["/a".into(), "/b".into()], into: "/a".into() };
        merges.begin(&disk, &fake, request.clone(), 0).unwrap();
        (merges, disk, fake, request)
    }

    fn wait_for(merges: &Merges, phase: MergePhase) -> MergeInfo {
        loop {
            let info = merges.info().unwrap();
            if info.phase == phase {
                return info;
            }
            std::thread::sleep(Duration::from_millis(1));
        }
    }

    /// A merge below the top ends by itself, and no other exchange begins before.
    #[test]
    fn merge_ends_by_itself() {
        let (merges, disk, ..) = begin(false, false, 0);
        let info = wait_for(&merges, MergePhase::Done);
        assert_eq!((info.done, info.total), (7, 7));
        assert_eq!(disk.look().path, "/merged");
        merges.none().unwrap();
    }

    /// A merge of the top waits for its pivot. One that fails there is still ready, and can be repeated.
    #[test]
    fn failed_pivot_can_be_repeated() {
        let (merges, disk, fake, request) = begin(false, true, 1);
        wait_for(&merges, MergePhase::Ready);
        assert_eq!(merges.none().err().unwrap().kind(), ErrorKind::Busy);
        assert_eq!(merges.pivot().unwrap_err().kind(), ErrorKind::Io);
        assert_eq!(disk.look().path, "/first");
        // The same request joins it.
        merges.begin(&disk, &fake, request, 0).unwrap();
        wait_for(&merges, MergePhase::Ready);
        merges.pivot().unwrap();
        assert_eq!(disk.look().path, "/merged");
        merges.pivot().unwrap();
    }

    /// A merge is cancelled at each phase, and another one is refused meanwhile.
    #[test]
    fn merge_is_cancelled() {
        for endless in [true, false] {
            let (merges, disk, fake, request) = begin(endless, true, 0);
            if !endless {
                wait_for(&merges, MergePhase::Ready);
            }
            let other = MergeRequest { into: "/b".into(), ..request.clone() };
            assert_eq!(merges.begin(&disk, &fake, other, 0).unwrap_err().kind(), ErrorKind::Busy);
            merges.cancel().unwrap();
            let info = wait_for(&merges, MergePhase::Failed);
            assert!(info.error.unwrap().contains("cancelled"));
            assert_eq!(disk.look().path, "/first");
            assert_eq!(merges.pivot().unwrap_err().kind(), ErrorKind::Refused);
            merges.none().unwrap();
        }
    }

    /// A limited merge sleeps, and is cancelled all the same.
    #[test]
    fn limited_merge_sleeps() {
        let watch = MergeWatch { rate: 1000.into(), ..MergeWatch::default() };
        let before = Instant::now();
        watch.moved(50);
        assert!(before.elapsed() >= Duration::from_millis(50));
        // It would sleep for days. Another limit, and none, end that.
        std::thread::scope(|scope| {
            let moving = scope.spawn(|| watch.moved(1 << 40));
            std::thread::sleep(Duration::from_millis(300));
            assert!(!moving.is_finished());
            watch.rate.store(0, Ordering::Relaxed);
            moving.join().unwrap();
        });
        watch.rate.store(1000, Ordering::Relaxed);
        watch.cancelled.store(true, Ordering::Relaxed);
        watch.moved(1 << 40);
    }
}
