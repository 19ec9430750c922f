//! Disks that a hypervisor has open. It is played here: it holds the images' locks as a QEMU does, says which
//! files it has open, and writes down what it was asked for.

mod judge;

use std::collections::HashSet;
use std::fs::File;
use std::os::unix::fs::MetadataExt;
use std::sync::{Mutex, MutexGuard};

use async_trait::async_trait;
use backend_qcow2::Qcow2;
use backend_qcow2::image::{self, Backing, Image, NewImage, NewSnapshot, OpenOptions};
use camino::{Utf8Path, Utf8PathBuf};
use image_files::chain::{ChainStep, Tag};
use image_files::layer_name::{layer_name, layer_path};
use image_files::{LockMode, lock};
use judge::{clean, content, io, run, snapshot_names};
use snapcore::backend::{
    Capabilities, DiskPlan, DiskRequest, DiskSnapshotter, Guard, InspectDepth, Progress, Salvage,
    StepContext, StepStatus,
};
use snapcore::hypervisor::{AttachedDisk, AttachedMerge, DiskInstant, Inside};
use snapcore::{
    ActivePath, Disk, DiskRecord, Error, ErrorKind, FileIdentity, LayerName, Point, PointKind, Result,
    SnapshotName, Step, Target,
};
use tokio_util::sync::CancellationToken;

struct Untold;

impl Progress for Untold {
    fn bytes(&self, _: u64, _: u64) {}
}

/// A disk of a hypervisor that is played.
#[derive(Default)]
struct FakeAttachedDisk {
    open: Mutex<Vec<(FileIdentity, File)>>,
    merges: Mutex<Vec<AttachedMerge>>,
    dropped: Mutex<Vec<String>>,
    /// True if the last merge could have been cancelled.
    heard_cancel: Mutex<bool>,
    /// True if a pivot fails, and the work nested in it is undone.
    stays: Mutex<bool>,
    /// The error of a merge after its pivot.
    fails: Mutex<Option<ErrorKind>>,
}

fn held<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap()
}

fn identity(file: &Utf8Path) -> FileIdentity {
    let about = std::fs::metadata(file).unwrap();
    (about.dev(), about.ino())
}

impl FakeAttachedDisk {
    /// Opens a chain, the active image first, as a QEMU does: with locks, which say that it writes the first
    /// of them.
    fn open(&self, chain: &[&Utf8Path]) {
        for (place, file) in chain.iter().enumerate() {
            let opened = File::open(file).unwrap();
            let mode = if place == 0 { LockMode::Write } else { LockMode::Read };
            lock(&opened, mode).unwrap_or_else(|error| panic!("QEMU could not open {file}: {error}"));
            held(&self.open).push((identity(file), opened));
        }
    }

    fn close(&self, file: &Utf8Path) {
        let closed = identity(file);
        held(&self.open).retain(|(id, _)| *id != closed);
    }

    fn close_all(&self) {
        held(&self.open).clear();
    }

    fn the_merge(&self) -> AttachedMerge {
        let merges = std::mem::take(&mut *held(&self.merges));
        let [merge] = &merges[..] else { panic!("one merge was to be asked for: {merges:?}") };
        merge.clone()
    }
}

#[async_trait]
impl AttachedDisk for FakeAttachedDisk {
    async fn open_files(&self) -> Result<HashSet<FileIdentity>> {
        Ok(held(&self.open).iter().map(|(id, _)| *id).collect())
    }

    async fn merge(
        &self,
        merge: &AttachedMerge,
        inside: &dyn Inside,
        _: &dyn Progress,
        cancel: &CancellationToken,
    ) -> Result<()> {
        held(&self.merges).push(merge.clone());
        *held(&self.heard_cancel) = cancel.is_cancelled();
        if cancel.is_cancelled() {
            return Err(Error::new(ErrorKind::Cancelled, "it was cancelled"));
        }
        inside.run(None).await?;
        if *held(&self.stays) {
            inside.back(None).await?;
            return Err(Error::new(ErrorKind::Io, "the pivot failed, and the job is gone"));
        }
        match held(&self.fails).take() {
            Some(kind) => Err(Error::new(kind, "the job failed")),
            None => Ok(()),
        }
    }

    async fn drop_internal(&self, tags: &[String]) -> Result<()> {
        held(&self.dropped).extend_from_slice(tags);
        Ok(())
    }
}

/// Fails, having done nothing.
struct FailingInside;

#[async_trait]
impl Inside for FailingInside {
    async fn run(&self, _: Option<&Target>) -> Result<()> {
        Err(Error::new(ErrorKind::NoSpace, "no room"))
    }

    async fn back(&self, _: Option<&Target>) -> Result<()> {
        Ok(())
    }
}

struct Fixture {
    directory: tempfile::TempDir,
    backend: Qcow2,
    record: DiskRecord,
    qemu: FakeAttachedDisk,
    cancel: CancellationToken,
}

impl Fixture {
    /// A disk of 4 MiB that was never frozen.
    async fn new() -> Self {
        let directory = tempfile::tempdir().unwrap();
        let path = Utf8PathBuf::from_path_buf(directory.path().join("disk.qcow2")).unwrap();
        run("qemu-img", &["create", "-q", "-f", "qcow2", path.as_str(), "4M"]);
        let backend = Qcow2::new();
        let disk = Disk::new(Target::new("vda").unwrap(), path, "qcow2");
        let record = backend.adopt(&disk, ActivePath::Keep).await.unwrap();
        Self {
            directory,
            backend,
            record,
            qemu: FakeAttachedDisk::default(),
            cancel: CancellationToken::new(),
        }
    }

    /// A chain of layers under their own names, the bottom first; the last is active. Layer n has n + 1 in
    /// all its own 64 KiB, of which the lowest has most.
    async fn with_layers(count: u8) -> (Self, Vec<LayerName>) {
        let mut fixture = Self::new().await;
        let path = fixture.path().to_owned();
        std::fs::remove_file(&path).unwrap();
        let layers: Vec<LayerName> = (0..count).map(|n| layer_name(&path, u32::from(n))).collect();
        for (n, layer) in layers.iter().enumerate() {
            let file = layer_path(&path, layer);
            let mut new = NewImage::new(4 << 20);
            if let Some(below) = n.checked_sub(1).map(|below| &layers[below]) {
                new = new.on(Backing { file: below.to_string(), format: Some("qcow2".to_owned()) });
            }
            image::create(file.as_std_path(), &new).unwrap();
            let upto = (usize::from(count) - n) * 64;
            io(file.as_std_path(), &[&format!("write -P {} 0 {upto}k", n + 1)]);
        }
        fixture.record.owned = layers.clone();
        fixture.record.active = layers.last().unwrap().clone();
        std::fs::hard_link(fixture.file(&fixture.record.active), &path).unwrap();
        (fixture, layers)
    }

    fn path(&self) -> &Utf8Path {
        self.record.disk.path()
    }

    fn file(&self, layer: &LayerName) -> Utf8PathBuf {
        layer_path(self.path(), layer)
    }

    /// QEMU opens the chain of the configured path.
    async fn start(&self) {
        let chain = self.backend.open_chain(&self.record).await.unwrap();
        let files: Vec<&Utf8Path> = chain.iter().map(|layer| layer.address.path()).collect();
        self.qemu.open(&files);
    }

    fn context<'a>(&'a self, inside: &'a dyn Inside) -> StepContext<'a> {
        StepContext::new(&self.record, &Untold, &self.cancel).attached(Some(&self.qemu)).inside(inside)
    }

    fn at_rest(&self) -> StepContext<'_> {
        self.context(&()).attached(None)
    }

    async fn apply(&self, action: ChainStep) -> Result<()> {
        self.backend.apply(&step(action), self.context(&())).await
    }

    async fn undo(&self, step: &Step<ChainStep>) -> Result<()> {
        self.backend.undo(step, self.context(&())).await
    }

    async fn lock(&self) -> Result<Guard> {
        self.backend.lock(&self.record, Some(&self.qemu)).await
    }

    async fn plan(&self, request: DiskRequest) -> Result<DiskPlan<ChainStep>> {
        let mut state = self.backend.inspect(&self.record, InspectDepth::Layers, Some(&self.qemu)).await?;
        state.attached = true;
        self.backend.plan(&self.record, &state, ActivePath::Keep, &request).await
    }

    fn byte(&self, file: &Utf8Path, at: usize) -> u8 {
        content(file.as_std_path(), None)[at]
    }
}

fn step(action: ChainStep) -> Step<ChainStep> {
    Step::new(Target::new("vda").unwrap(), action, "a step")
}

fn can_be_locked(file: &Utf8Path) -> bool {
    lock(&File::open(file).unwrap(), LockMode::Write).is_ok()
}

fn kind<T: std::fmt::Debug>(outcome: Result<T>) -> ErrorKind {
    outcome.unwrap_err().kind()
}

fn take(layer: &LayerName, tag: &str) -> ChainStep {
    ChainStep::TakeInternal { layer: layer.clone(), tag: tag.to_owned() }
}

fn create(kind: PointKind) -> DiskRequest {
    DiskRequest::Create {
        kind: Some(kind),
        method: None,
        name: SnapshotName::new("s").unwrap(),
        overlay: None,
        keep: vec![],
        stamp: 0x77,
    }
}

#[tokio::test]
async fn the_backend_says_that_it_can_do_running_domains() {
    let capabilities: Capabilities = Qcow2::new().capabilities();
    assert!(capabilities.live);
}

/// What a hypervisor has open is neither locked nor written, and in a detached section it is both.
#[tokio::test(flavor = "multi_thread")]
async fn open_images_are_only_used_when_detached() {
    let fixture = Fixture::new().await;
    let active = fixture.record.active.clone();
    fixture.start().await;
    assert_eq!(kind(fixture.backend.lock(&fixture.record, None).await.map(drop)), ErrorKind::Busy);
    let guard = fixture.lock().await.unwrap();
    assert_eq!(kind(fixture.lock().await.map(drop)), ErrorKind::Busy, "it is held against us all the same");

    let before = std::fs::read(fixture.path()).unwrap();
    for action in [
        take(&active, "t"),
        ChainStep::ApplyInternal { layer: active.clone(), tag: Tag::new("t"), safety: None },
    ] {
        let error = fixture.apply(action).await.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Busy);
        assert!(error.to_string().contains("the running domain has"), "{error}");
    }
    assert!(std::fs::read(fixture.path()).unwrap() == before);

    fixture.qemu.close_all();
    assert!(can_be_locked(fixture.path()), "nothing of it was locked while it was open");
    fixture.apply(take(&active, "t")).await.unwrap();
    assert!(!can_be_locked(fixture.path()), "in a detached section the lock is ours");
    assert_eq!(snapshot_names(fixture.path().as_std_path()), ["t"]);

    fixture.backend.yield_locks(&fixture.record).await.unwrap();
    assert!(can_be_locked(fixture.path()), "a hypervisor can open it");
    fixture.start().await;
    assert_eq!(kind(fixture.lock().await.map(drop)), ErrorKind::Busy, "the disk is held yet");
    drop(guard);
    drop(fixture.lock().await.unwrap());
}

/// Locks pass to a hypervisor only when they are released.
#[tokio::test(flavor = "multi_thread")]
async fn locks_pass_to_a_hypervisor_when_released() {
    let fixture = Fixture::new().await;
    let guard = fixture.lock().await.unwrap();
    assert!(!can_be_locked(fixture.path()), "in a detached section the disk is locked as at rest");
    fixture.backend.yield_locks(&fixture.record).await.unwrap();
    assert!(can_be_locked(fixture.path()));
    drop(guard);
    fixture.backend.yield_locks(&fixture.record).await.unwrap();
}

/// A create on an open disk is prepared, cut and undone without touching what is open.
#[tokio::test(flavor = "multi_thread")]
async fn create_on_an_open_disk_works_around_it() {
    let fixture = Fixture::new().await;
    let frozen = fixture.file(&fixture.record.active);
    io(fixture.path().as_std_path(), &["write -P 5 0 64k"]);
    fixture.start().await;
    let _guard = fixture.lock().await.unwrap();
    let plan = fixture.plan(create(PointKind::External)).await.unwrap();
    let overlay = fixture.file(&layer_name(fixture.path(), 0x77));
    let format = "qcow2".to_owned();
    let instant = plan.instant.as_ref().unwrap();
    assert_eq!(instant.take, DiskInstant::Overlay { address: overlay.as_path().into(), format });
    let ([name, make], [switch]) = (&plan.prepare[..], &instant.nested[..]) else { panic!("{plan:?}") };
    for step in [name, make] {
        fixture.backend.apply(step, fixture.context(&())).await.unwrap();
    }
    assert_eq!(identity(&frozen), identity(fixture.path()));

    // The instant: QEMU has the overlay on top, and the path is moved.
    fixture.backend.yield_locks(&fixture.record).await.unwrap();
    fixture.qemu.close(&frozen);
    fixture.qemu.open(&[&overlay, &frozen]);
    fixture.backend.apply(switch, fixture.context(&())).await.unwrap();
    assert_eq!(identity(&overlay), identity(fixture.path()));

    // The undo: what QEMU has open stays.
    let error = fixture.undo(make).await;
    error.expect("the path names it, so it is not removed");
    assert!(overlay.exists());
    fixture.undo(switch).await.unwrap();
    assert_eq!(identity(&frozen), identity(fixture.path()));
    let error = fixture.undo(make).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Busy);
    assert!(overlay.exists(), "{error}");
    fixture.qemu.close(&overlay);
    fixture.undo(make).await.unwrap();
    assert!(!overlay.exists());
    fixture.undo(name).await.unwrap();
    assert!(frozen.exists(), "QEMU may know it by this name");
    fixture.qemu.close_all();
    fixture.undo(name).await.unwrap();
    assert!(!frozen.exists());
    assert_eq!(fixture.byte(fixture.path(), 0), 5);
}

/// The lock of an image that QEMU opens next is not taken while it has the current one open.
#[tokio::test(flavor = "multi_thread")]
async fn next_image_is_not_locked_while_qemu_runs() {
    let (fixture, layers) = Fixture::with_layers(2).await;
    fixture.qemu.open(&[&fixture.file(&layers[1])]);
    let _guard = fixture.lock().await.unwrap();
    fixture.apply(ChainStep::SwitchActive { from: layers[1].clone(), to: layers[0].clone() }).await.unwrap();
    assert!(can_be_locked(&fixture.file(&layers[0])));
}

/// An internal create on an open disk is left to the cut.
#[tokio::test(flavor = "multi_thread")]
async fn internal_create_on_an_open_disk_is_the_cuts() {
    let fixture = Fixture::new().await;
    fixture.start().await;
    let plan = fixture.plan(create(PointKind::Internal)).await.unwrap();
    assert_eq!(plan.instant.as_ref().unwrap().take, DiskInstant::Internal { tag: "s".to_owned() });
    assert_eq!(plan.steps().count(), 0);
    assert_eq!(plan.point, Some(Point::internal(fixture.record.active.clone(), "s")));
}

/// The hypervisor merges open layers, with names and backing strings that last.
#[tokio::test(flavor = "multi_thread")]
async fn hypervisor_merges_open_layers_by_lasting_names() {
    let (fixture, layers) = Fixture::with_layers(4).await;
    fixture.start().await;
    let _guard = fixture.lock().await.unwrap();
    let files: Vec<Utf8PathBuf> = layers.iter().map(|layer| fixture.file(layer)).collect();
    let merge = |run: &[usize], into: usize, below: Option<usize>| ChainStep::Merge {
        run: run.iter().map(|n| layers[*n].clone()).collect(),
        into: layers[into].clone(),
        below: below.map(|n| layers[n].clone()),
    };
    let before: Vec<Vec<u8>> = files.iter().map(|file| std::fs::read(file).unwrap()).collect();

    fixture.apply(merge(&[1, 2], 1, Some(0))).await.unwrap();
    let run: Vec<snapcore::DiskAddress> = [1, 2].map(|n: usize| files[n].as_path().into()).to_vec();
    let into = |file: &Utf8PathBuf, string: &LayerName| {
        let merge = AttachedMerge::new(run.clone(), file).below(Some(files[0].as_path().into()));
        merge.string(Some(string.to_string()))
    };
    let expected = into(&files[1], &layers[1]);
    assert_eq!(fixture.qemu.the_merge(), expected, "the image above depends on what received the data");

    fixture.apply(merge(&[1, 2], 2, Some(0))).await.unwrap();
    let expected = into(&files[2], &layers[0]);
    assert_eq!(fixture.qemu.the_merge(), expected, "the uppermost depends on what lies below the run");

    fixture.apply(merge(&[0, 1, 2], 2, None)).await.unwrap();
    let upwards = fixture.qemu.the_merge();
    assert_eq!((upwards.below, upwards.string), (None, None), "it depends on nothing then");

    fixture.apply(merge(&[2, 3], 3, Some(1))).await.unwrap();
    assert_eq!(fixture.qemu.the_merge().string, Some(layers[1].to_string()));
    assert_eq!(identity(fixture.path()), identity(&files[3]), "what is merged upwards moves no path");
    let after: Vec<Vec<u8>> = files.iter().map(|file| std::fs::read(file).unwrap()).collect();
    assert!(before == after, "the backend itself wrote into an open image");
}

/// A merge that was done and not recorded is the hypervisor's too.
#[tokio::test(flavor = "multi_thread")]
async fn unrecorded_merge_is_the_hypervisors_too() {
    let (fixture, layers) = Fixture::with_layers(3).await;
    // It has the upper one closed already.
    fixture.qemu.open(&[fixture.path(), &fixture.file(&layers[0])]);
    let run = vec![layers[0].clone(), layers[1].clone()];
    fixture.apply(ChainStep::Merge { run, into: layers[0].clone(), below: None }).await.unwrap();
    assert_eq!(fixture.qemu.the_merge().into.path(), fixture.file(&layers[0]));
}

/// An active image without a name of its own is merged into by the configured path.
#[tokio::test(flavor = "multi_thread")]
async fn unnamed_active_image_merges_by_configured_path() {
    let mut fixture = Fixture::new().await;
    let below = layer_name(fixture.path(), 1);
    let file = fixture.file(&below);
    std::fs::rename(fixture.path(), &file).unwrap();
    let on = ["create", "-q", "-f", "qcow2", "-F", "qcow2", "-b", below.as_str(), fixture.path().as_str()];
    run("qemu-img", &on);
    // A tag that is not there is not asked for.
    let mut image = Image::open(fixture.path().as_std_path(), &OpenOptions::read_write()).unwrap();
    image.create_snapshot(&NewSnapshot::new("t", 1, 0)).unwrap();
    drop(image);
    fixture.record.owned.push(below.clone());
    let active = fixture.record.active.clone();
    assert!(!fixture.file(&active).exists());
    fixture.start().await;
    let merge =
        ChainStep::Merge { run: vec![below.clone(), active.clone()], into: active.clone(), below: None };
    fixture.apply(merge).await.unwrap();
    let asked = fixture.qemu.the_merge();
    assert_eq!((asked.run, asked.into), (vec![file.into(), fixture.path().into()], fixture.path().into()));
    fixture.apply(ChainStep::Repoint { child: active.clone(), to: below }).await.unwrap();
    fixture.apply(ChainStep::DropInternal { layer: active, tags: vec![Tag::new("t")] }).await.unwrap();
    assert_eq!(*held(&fixture.qemu.dropped), ["t"]);
}

#[tokio::test(flavor = "multi_thread")]
async fn unopened_layers_are_merged_as_at_rest() {
    let (mut fixture, layers) = Fixture::with_layers(3).await;
    // The current image is backed by the lowest only; the others are a side branch.
    let active = layer_name(fixture.path(), 9);
    let file = fixture.file(&active);
    let backing = Backing { file: layers[0].to_string(), format: Some("qcow2".to_owned()) };
    image::create(file.as_std_path(), &NewImage::new(4 << 20).on(backing)).unwrap();
    std::fs::remove_file(fixture.path()).unwrap();
    std::fs::hard_link(&file, fixture.path()).unwrap();
    fixture.record.active = active.clone();
    fixture.record.owned.push(active);
    fixture.start().await;
    let _guard = fixture.lock().await.unwrap();
    let merge = ChainStep::Merge {
        run: vec![layers[1].clone(), layers[2].clone()],
        into: layers[1].clone(),
        below: Some(layers[0].clone()),
    };
    let shown = content(fixture.file(&layers[2]).as_std_path(), None);
    fixture.apply(merge).await.unwrap();
    assert!(held(&fixture.qemu.merges).is_empty());
    fixture.backend.yield_locks(&fixture.record).await.unwrap();
    assert!(content(fixture.file(&layers[1]).as_std_path(), None) == shown);
    clean(fixture.file(&layers[1]).as_std_path());
}

fn merge_down(layers: &[LayerName]) -> ChainStep {
    ChainStep::Merge { run: layers.to_vec(), into: layers[0].clone(), below: None }
}

/// The path is moved at the pivot, also if that was planned for later.
#[tokio::test(flavor = "multi_thread")]
async fn path_moves_at_the_pivot_even_if_planned_later() {
    let (fixture, layers) = Fixture::with_layers(2).await;
    fixture.start().await;
    fixture.apply(merge_down(&layers)).await.unwrap();
    assert_eq!(identity(fixture.path()), identity(&fixture.file(&layers[0])));
    let switch = ChainStep::SwitchActive { from: layers[1].clone(), to: layers[0].clone() };
    fixture.apply(switch).await.unwrap();
    assert_eq!(identity(fixture.path()), identity(&fixture.file(&layers[0])));
}

/// A pivot that fails leaves the path with the image that the guest writes.
#[tokio::test(flavor = "multi_thread")]
async fn failed_pivot_leaves_the_path_unmoved() {
    let (fixture, layers) = Fixture::with_layers(2).await;
    fixture.start().await;
    let merge = step(merge_down(&layers));
    let refused = fixture.backend.apply(&merge, fixture.context(&FailingInside)).await;
    assert_eq!(kind(refused), ErrorKind::NoSpace);
    assert_eq!(identity(fixture.path()), identity(&fixture.file(&layers[1])));
    // Moved already, before a crash; the job waits at its pivot, and the move cannot be made durable.
    let lower = fixture.file(&layers[0]);
    std::fs::remove_file(fixture.path()).unwrap();
    std::fs::hard_link(&lower, fixture.path()).unwrap();
    let refused = fixture.backend.apply(&merge, fixture.context(&FailingInside)).await;
    assert_eq!(kind(refused), ErrorKind::NoSpace);
    assert_eq!(identity(fixture.path()), identity(&fixture.file(&layers[1])));
}

/// If the pivot fails after the path was moved, the path goes back to the image that the guest writes.
#[tokio::test(flavor = "multi_thread")]
async fn failed_pivot_moves_the_path_back() {
    let (fixture, layers) = Fixture::with_layers(2).await;
    fixture.start().await;
    *held(&fixture.qemu.stays) = true;
    let error = fixture.apply(merge_down(&layers)).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Io, "nothing keeps it from being deferred: {error}");
    assert_eq!(identity(fixture.path()), identity(&fixture.file(&layers[1])));
}

/// A merge is neither cancelled nor deferred once the path is moved.
#[tokio::test(flavor = "multi_thread")]
async fn merge_must_finish_once_the_path_is_moved() {
    let (fixture, layers) = Fixture::with_layers(2).await;
    fixture.start().await;
    let merge = step(merge_down(&layers));
    *held(&fixture.qemu.fails) = Some(ErrorKind::Io);
    let error = fixture.backend.apply(&merge, fixture.context(&())).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Internal, "the engine puts off what fails otherwise: {error}");
    assert_eq!(identity(fixture.path()), identity(&fixture.file(&layers[0])));
    fixture.cancel.cancel();
    fixture.backend.apply(&merge, fixture.context(&())).await.unwrap();
    assert!(!*held(&fixture.qemu.heard_cancel));

    let (fixture, layers) = Fixture::with_layers(2).await;
    fixture.start().await;
    fixture.cancel.cancel();
    assert_eq!(kind(fixture.apply(merge_down(&layers)).await), ErrorKind::Cancelled);
    assert_eq!(identity(fixture.path()), identity(&fixture.file(&layers[1])));
}

/// A path that is the layer's own name is not moved at the pivot.
#[tokio::test(flavor = "multi_thread")]
async fn path_that_is_a_layers_name_is_not_moved() {
    let (mut fixture, layers) = Fixture::with_layers(2).await;
    fixture.record.disk.address = fixture.file(&layers[1]).into();
    let top = identity(fixture.path());
    fixture.start().await;
    fixture.apply(merge_down(&layers)).await.unwrap();
    assert_eq!(identity(fixture.path()), top);
}

/// A merge whose pivot was done before a crash is not repeated at rest.
#[tokio::test(flavor = "multi_thread")]
async fn merge_after_its_pivot_is_not_repeated_at_rest() {
    let (fixture, layers) = Fixture::with_layers(2).await;
    let [lower, upper] = [0, 1].map(|n| fixture.file(&layers[n]));
    let merge = step(merge_down(&layers));
    // The hypervisor's merge, to the pivot: both show the same, and the path is moved. Then all die.
    fixture.backend.apply(&merge, fixture.at_rest()).await.unwrap();
    assert!(
        fixture.backend.is_superseded(&merge, fixture.at_rest()).await.unwrap(),
        "the path names the top yet"
    );
    std::fs::remove_file(fixture.path()).unwrap();
    std::fs::hard_link(&lower, fixture.path()).unwrap();
    // The domain is started, and writes; then it is shut down, and recovered.
    io(fixture.path().as_std_path(), &["write -P 99 0 64k"]);
    assert_eq!(fixture.byte(&upper, 0), 2);
    assert!(!fixture.backend.is_superseded(&merge, fixture.at_rest()).await.unwrap());
    fixture.backend.apply(&merge, fixture.at_rest()).await.unwrap();
    assert_eq!(fixture.byte(fixture.path(), 0), 99, "what the upper layer held came back");
    // The same in a detached section, and if the domain runs on the lower layer.
    fixture.backend.apply(&merge, fixture.context(&())).await.unwrap();
    fixture.start().await;
    fixture.backend.apply(&merge, fixture.context(&())).await.unwrap();
    fixture.qemu.close_all();
    assert_eq!(fixture.byte(fixture.path(), 0), 99);
    // While the path names the top, the merge is what makes the lower one right.
    std::fs::remove_file(fixture.path()).unwrap();
    std::fs::hard_link(&upper, fixture.path()).unwrap();
    fixture.backend.apply(&merge, fixture.at_rest()).await.unwrap();
    assert_eq!(fixture.byte(&lower, 0), 2);
}

#[tokio::test(flavor = "multi_thread")]
async fn an_open_layer_is_not_removed() {
    let (fixture, layers) = Fixture::with_layers(2).await;
    fixture.start().await;
    let _guard = fixture.lock().await.unwrap();
    let remove = ChainStep::Remove { layers: vec![layers[0].clone()] };
    let error = fixture.apply(remove.clone()).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Busy);
    assert!(error.to_string().contains("the running domain has"), "{error}");
    assert!(fixture.file(&layers[0]).exists());
    fixture.qemu.close(&fixture.file(&layers[0]));
    fixture.apply(remove).await.unwrap();
    assert!(!fixture.file(&layers[0]).exists());
}

/// Tags of the active image are the hypervisor's to delete; those of frozen ones wait for a detached section.
#[tokio::test(flavor = "multi_thread")]
async fn hypervisor_only_deletes_tags_of_the_active_image() {
    let (fixture, layers) = Fixture::with_layers(2).await;
    for layer in &layers {
        let options = OpenOptions::read_write();
        let mut image = Image::open(fixture.file(layer).as_std_path(), &options).unwrap();
        image.create_snapshot(&NewSnapshot::new("t", 1, 0)).unwrap();
    }
    let drop_of = |n: usize| ChainStep::DropInternal { layer: layers[n].clone(), tags: vec![Tag::new("t")] };
    fixture.start().await;
    fixture.apply(drop_of(1)).await.unwrap();
    assert_eq!(*held(&fixture.qemu.dropped), ["t"]);
    assert_eq!(kind(fixture.apply(drop_of(0)).await), ErrorKind::Busy);
    assert_eq!(snapshot_names(fixture.file(&layers[0]).as_std_path()), ["t"]);
    let status = fixture.backend.status(&step(drop_of(0)), fixture.context(&())).await.unwrap();
    assert_eq!(status, StepStatus::NotDone);

    let request = DiskRequest::Delete {
        drop: layers.iter().map(|layer| Point::internal(layer.clone(), "t")).collect(),
        keep: vec![Point::external(layers[0].clone())],
        force: false,
    };
    let plan = fixture.plan(request).await.unwrap();
    assert_eq!((plan.detached.len(), plan.finish.len()), (1, 1), "{plan:?}");

    fixture.qemu.close_all();
    for n in [0, 1] {
        fixture.apply(drop_of(n)).await.unwrap();
        assert_eq!(snapshot_names(fixture.file(&layers[n]).as_std_path()), [""; 0]);
    }
    assert_eq!(held(&fixture.qemu.dropped).len(), 1);
}

/// An open image already has its new backing file, or that is an error.
#[tokio::test(flavor = "multi_thread")]
async fn repoint_of_an_open_image_is_done_or_an_error() {
    let (fixture, layers) = Fixture::with_layers(3).await;
    let repoint = |to: usize| ChainStep::Repoint { child: layers[2].clone(), to: layers[to].clone() };
    fixture.start().await;
    fixture.apply(repoint(1)).await.unwrap();
    assert_eq!(kind(fixture.apply(repoint(0)).await), ErrorKind::Internal);
    fixture.qemu.close_all();
    fixture.apply(repoint(0)).await.unwrap();
    let chain = fixture.backend.open_chain(&fixture.record).await.unwrap();
    let files: Vec<Utf8PathBuf> = chain.into_iter().map(|layer| layer.address.path().to_owned()).collect();
    assert_eq!(files, [fixture.file(&layers[2]), fixture.file(&layers[0])]);
}

/// The layers that the path opens have their permanent names, whatever the record says.
#[tokio::test(flavor = "multi_thread")]
async fn open_chain_uses_permanent_names() {
    let mut fixture = Fixture::new().await;
    let chain = async |fixture: &Fixture| -> Vec<(Utf8PathBuf, String)> {
        let chain = fixture.backend.open_chain(&fixture.record).await.unwrap();
        chain.into_iter().map(|layer| (layer.address.path().to_owned(), layer.format)).collect()
    };
    let qcow2 = |file: &Utf8Path| (file.to_owned(), "qcow2".to_owned());
    // Never frozen, on a base of another kind.
    let base = fixture.path().with_file_name("base.raw");
    std::fs::write(&base, [7; 4096]).unwrap();
    std::fs::remove_file(fixture.path()).unwrap();
    let on = ["create", "-q", "-f", "qcow2", "-F", "raw", "-b", "base.raw", fixture.path().as_str(), "4M"];
    run("qemu-img", &on);
    fixture.record = fixture.backend.adopt(&fixture.record.disk, ActivePath::Keep).await.unwrap();
    assert_eq!(chain(&fixture).await, [qcow2(fixture.path()), (base.clone(), "raw".to_owned())]);
    // Named, and then under an overlay to which the path is moved, while the record has the previous one.
    let plan = fixture.plan(create(PointKind::External)).await.unwrap();
    let frozen = fixture.file(&fixture.record.active);
    let overlay = fixture.file(&layer_name(fixture.path(), 0x77));
    let base = (base, "raw".to_owned());
    let shown = [
        vec![qcow2(&frozen), base.clone()],
        vec![qcow2(&frozen), base.clone()],
        vec![qcow2(&overlay), qcow2(&frozen), base],
    ];
    let steps: Vec<_> = plan.steps().collect();
    assert_eq!(steps.len(), shown.len());
    for (step, expected) in steps.iter().zip(shown) {
        fixture.backend.apply(step, fixture.context(&())).await.unwrap();
        assert_eq!(chain(&fixture).await, expected, "after {:?}", step.action);
    }
    // And back.
    for step in steps.into_iter().rev() {
        fixture.undo(step).await.unwrap();
    }
    assert_eq!(chain(&fixture).await[0], qcow2(fixture.path()));
    std::fs::remove_file(fixture.path()).unwrap();
    assert_eq!(kind(fixture.backend.open_chain(&fixture.record).await), ErrorKind::NotFound);
}

/// Tables that are being written do not prevent the plan of a delete.
#[tokio::test(flavor = "multi_thread")]
async fn delete_is_planned_while_tables_are_written() {
    let (fixture, layers) = Fixture::with_layers(2).await;
    let top = fixture.file(&layers[1]);
    let mut bytes = std::fs::read(&top).unwrap();
    // The first entry of the L1 table, whose place is at 40 in the header: an L2 table is never at 0x200.
    let table = usize::try_from(u64::from_be_bytes(bytes[40..48].try_into().unwrap())).unwrap();
    bytes[table..table + 8].copy_from_slice(&0x8000_0000_0000_0200_u64.to_be_bytes());
    std::fs::write(&top, bytes).unwrap();
    let request =
        || DiskRequest::Delete { drop: vec![Point::external(layers[0].clone())], keep: vec![], force: false };
    let plan = fixture.plan(request()).await.unwrap();
    let merge = plan.finish[0].step.action.clone();
    let ChainStep::Merge { run, into, .. } = merge else { panic!("{plan:?}") };
    let other = run.iter().find(|layer| **layer != into).unwrap();
    let allocated = std::fs::metadata(fixture.file(other)).unwrap().blocks() * 512;
    assert_eq!(plan.finish[0].step.bytes, allocated);
    let mut state = fixture.backend.inspect(&fixture.record, InspectDepth::Layers, None).await.unwrap();
    state.attached = false;
    let at_rest = fixture.backend.plan(&fixture.record, &state, ActivePath::Keep, &request()).await;
    assert!(at_rest.is_err(), "at rest that is damage");
}

/// What a hypervisor has open keeps its name when data is saved under another one.
#[tokio::test(flavor = "multi_thread")]
async fn open_image_keeps_its_name_when_data_is_saved() {
    let (mut fixture, layers) = Fixture::with_layers(3).await;
    // A revert to the lowest made the second, which was active and written; the path is back at the third.
    let action = ChainStep::CreateOverlay {
        layer: layers[1].clone(),
        on: layers[0].clone(),
        on_format: "qcow2".to_owned(),
        virtual_size: 4 << 20,
        format: None,
    };
    fixture.record.owned.remove(1);
    let made = fixture.file(&layers[1]);
    fixture.qemu.open(&[&made]);
    let _guard = fixture.lock().await.unwrap();
    let salvage = fixture.backend.salvage(&step(action.clone()), true, fixture.context(&())).await;
    assert_eq!(kind(salvage), ErrorKind::Busy);
    assert!(made.exists());
    fixture.qemu.close_all();
    let salvage = fixture.backend.salvage(&step(action), true, fixture.context(&())).await.unwrap();
    assert!(matches!(salvage, Salvage::Saved(_)), "{salvage:?}");
    let aside = fixture.directory.path().join(format!("rescued-{}", layers[1]));
    assert!(!made.exists() && aside.exists());
}
