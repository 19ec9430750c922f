//! How the steps of a chain of files become operations on qcow2 images. Blocking; called on a blocking thread.
//!
//! | step | durable before what |
//! |---|---|
//! | name a layer | the second name, before any overlay names it |
//! | create an overlay, materialise | the whole file under a passing name, before it gets its own; that, before the switch |
//! | take, apply, drop a tag | see [`crate::image`] |
//! | switch | the new name in one rename; the former layer keeps its own name |
//! | merge | all data and metadata of the receiving layer, before anything else names it |
//! | repoint | one header write |
//! | remove, unname | nothing follows that depends on it |

use std::fs::File;
use std::sync::atomic::{AtomicU64, Ordering};

use camino::{Utf8Path, Utf8PathBuf};
use image_files::{Hold, names};
use jiff::Timestamp;
use snapcore::chain::{ChainStep, layer_path};
use snapcore::{DiskRecord, Error, ErrorKind, LayerName, Progress, Result, StepStatus, shell_command};
use tokio_util::sync::CancellationToken;

use crate::attached::FileIds;
use crate::backing_string::{backing_string, resolve_backing};
use crate::below::Below;
use crate::image::{self, Backing, Image, NewImage, NewSnapshot, OpenOptions, RunLayer};
use crate::layers::file_of;

/// What a step works with.
pub(crate) struct Workplace<'a> {
    pub(crate) record: &'a DiskRecord,
    pub(crate) hold: Option<&'a Hold>,
    /// What a hypervisor has open: its to lock and to write.
    pub(crate) open: FileIds,
    pub(crate) progress: &'a dyn Progress,
    pub(crate) cancel: &'a CancellationToken,
    /// Bytes that the step is to move, as it was planned.
    pub(crate) bytes: u64,
    pub(crate) max_depth: u32,
    /// Whether the room of freed clusters is given back to the file system.
    pub(crate) punch: bool,
    /// Whether the step may have been begun by a process that stopped.
    pub(crate) resumed: bool,
}

impl Workplace<'_> {
    /// Does `step`.
    pub(crate) fn apply(&self, step: &ChainStep) -> Result<()> {
        match step {
            ChainStep::NameLayer { layer } => names::add_name(&self.record.disk.path, &self.own_name(layer)),
            ChainStep::CreateOverlay { layer, on, on_format, virtual_size } => {
                self.create_overlay(layer, on, on_format, *virtual_size)
            }
            ChainStep::Materialise { from, tag, layer } => self.materialise(from, tag, layer),
            ChainStep::TakeInternal { layer, tag } => self.take(layer, tag),
            ChainStep::SwitchActive { from, to } => {
                self.refuse_replaced(from, to)?;
                let to = self.own_name(to);
                // A hypervisor that has the one open has the other next: a lock of ours would keep it out.
                if !self.is_open(&self.record.disk.path)? {
                    self.lock(&self.record.disk.path)?;
                    self.lock(&to)?;
                }
                names::move_name(&self.record.disk.path, &to)
            }
            ChainStep::ApplyInternal { layer, tag, .. } => self.apply_tag(layer, tag),
            ChainStep::DropInternal { layer, tags } => self.drop_tags(layer, tags, false),
            ChainStep::ForgetInternal { layer, tags } => self.drop_tags(layer, tags, true),
            ChainStep::Merge { run, into, .. } if self.has_pivoted(run, into)? => Ok(()),
            ChainStep::Merge { run, into, below } => self.merge(run, into, below.as_ref()),
            ChainStep::Repoint { child, to } => self.repoint(child, to),
            ChainStep::Remove { layers } => self.remove(layers),
            ChainStep::Unname { layer } => self.unname(layer),
        }
    }

    /// Takes `step` back.
    pub(crate) fn undo(&self, step: &ChainStep) -> Result<()> {
        let path = &self.record.disk.path;
        match step {
            // A hypervisor may know it by this name.
            ChainStep::NameLayer { layer } if self.is_open(&self.own_name(layer))? => Ok(()),
            ChainStep::NameLayer { layer } => self.unname(layer),
            ChainStep::CreateOverlay { layer, .. } | ChainStep::Materialise { layer, .. } => {
                let file = self.own_name(layer);
                names::remove_name(&names::unfinished_name(&file))?;
                // Where the switch to it had to stay, so has the layer.
                if self.is_made_by(step)? && !names::same_file(&file, path)? {
                    self.refuse_in_use(&file)?;
                    names::remove_name(&file)?;
                }
                names::flush_directory_of(&file)
            }
            ChainStep::TakeInternal { layer, tag } => self.drop_tags(layer, std::slice::from_ref(tag), false),
            ChainStep::SwitchActive { from, to } => {
                self.lock(path)?;
                // Undone before, and so perhaps was what had come before it: then `from` has no name of its own.
                match names::same_file(&self.own_name(to), path)? {
                    true => names::move_name(path, &self.own_name(from)),
                    false => names::clear_move(path),
                }
            }
            ChainStep::ApplyInternal { layer, safety: Some(safety), .. } => {
                match self.has_tag(layer, safety)? {
                    true => self.apply_tag(layer, safety),
                    false => Ok(()), // the copy comes first, so the apply never began
                }
            }
            // Without a safety copy nobody needs the state that was there before.
            ChainStep::ApplyInternal { layer, safety: None, .. } => {
                self.mend(layer);
                Ok(())
            }
            ChainStep::DropInternal { .. }
            | ChainStep::ForgetInternal { .. }
            | ChainStep::Merge { .. }
            | ChainStep::Repoint { .. }
            | ChainStep::Remove { .. }
            | ChainStep::Unname { .. } => Err(Error::new(
                ErrorKind::Internal,
                format!("the step {step:?} runs after the commit point only"),
            )),
        }
    }

    /// How far `step` got.
    pub(crate) fn status(&self, step: &ChainStep) -> Result<StepStatus> {
        let path = &self.record.disk.path;
        let done = match step {
            ChainStep::NameLayer { layer } => names::same_file(path, &self.own_name(layer))?,
            ChainStep::CreateOverlay { layer, .. } | ChainStep::Materialise { layer, .. } => {
                let unfinished = names::unfinished_name(&self.own_name(layer));
                if names::file_id(&unfinished)?.is_some() {
                    return Ok(StepStatus::Partly);
                }
                self.is_made_by(step)?
            }
            ChainStep::TakeInternal { layer, tag } => self.has_tag(layer, tag)?,
            ChainStep::SwitchActive { to, .. } => names::same_file(path, &self.own_name(to))?,
            ChainStep::ApplyInternal { layer, tag, .. } => {
                let image = self.reading(layer)?;
                image.find_snapshot(tag)?.is_some() && image.snapshot_matches_active(tag)?
            }
            ChainStep::DropInternal { layer, tags } | ChainStep::ForgetInternal { layer, tags } => {
                let mut left = 0;
                for tag in tags {
                    left += usize::from(self.has_tag(layer, tag)?);
                }
                match left {
                    0 => true,
                    left if left == tags.len() => false,
                    _ => return Ok(StepStatus::Partly),
                }
            }
            // Only a repetition can tell, and it is harmless.
            ChainStep::Merge { .. } => return Ok(StepStatus::Partly),
            ChainStep::Repoint { child, to } => {
                let file = file_of(self.record, child)?;
                match self.reading(child)?.header().backing.clone() {
                    Some(backing) => {
                        names::same_file(&resolve_backing(&file, &backing.file)?, &self.own_name(to))?
                    }
                    None => false,
                }
            }
            ChainStep::Remove { layers } => return self.removed(layers),
            ChainStep::Unname { layer } => names::file_id(&self.own_name(layer))?.is_none(),
        };
        Ok(if done { StepStatus::Done } else { StepStatus::NotDone })
    }

    pub(crate) fn own_name(&self, layer: &LayerName) -> Utf8PathBuf {
        layer_path(&self.record.disk.path, layer)
    }

    /// The backing string of an image that stands on `layer`.
    fn string(&self, layer: &LayerName) -> String {
        backing_string(&self.record.disk.path, layer)
    }

    pub(crate) fn lock(&self, file: &Utf8Path) -> Result<()> {
        match self.hold {
            Some(hold) if !self.is_open(file)? => hold.lock(file),
            _ => Ok(()),
        }
    }

    /// Whether a hypervisor has the file open.
    fn is_open(&self, file: &Utf8Path) -> Result<bool> {
        Ok(!self.open.is_empty() && names::file_id(file)?.is_some_and(|id| self.open.contains(&id)))
    }

    /// Whether the active layer was merged into a lower one by a hypervisor, and the path moved at the pivot, before a crash
    /// kept that from being recorded. Then the domain has written to that layer since, and to merge the former active one once
    /// more would bring its old data back. (At rest the path is moved by a step of its own, after the merge is recorded.)
    fn has_pivoted(&self, run: &[LayerName], into: &LayerName) -> Result<bool> {
        let merged_down = run.last().is_some_and(|top| *top == self.record.active && top != into);
        Ok(merged_down && names::same_file(&self.own_name(into), &self.record.disk.path)?)
    }

    pub(crate) fn reading(&self, layer: &LayerName) -> Result<Image> {
        let file = file_of(self.record, layer)?;
        Ok(Image::open(file.as_std_path(), &OpenOptions::read_only().unlocked())?)
    }

    fn writing(&self, layer: &LayerName) -> Result<Image> {
        let file = file_of(self.record, layer)?;
        self.refuse_open(&file)?;
        let options = writing(self.hold, &file)?;
        let options = if self.punch { options } else { options.without_punching() };
        Ok(Image::open(file.as_std_path(), &options)?)
    }

    pub(crate) fn has_tag(&self, layer: &LayerName, tag: &str) -> Result<bool> {
        Ok(self.reading(layer)?.find_snapshot(tag)?.is_some())
    }

    /// Whether the file of a new layer is what `step` makes, and not somebody else's of the same name.
    pub(crate) fn is_made_by(&self, step: &ChainStep) -> Result<bool> {
        let (layer, on) = match step {
            ChainStep::CreateOverlay { layer, on, .. } => (layer, Some(self.own_name(on))),
            ChainStep::Materialise { layer, from, .. } => (layer, self.below(from)?),
            _ => return Ok(false),
        };
        let file = self.own_name(layer);
        if names::file_id(&file)?.is_none() {
            return Ok(false);
        }
        let Some(header) = image::probe(file.as_std_path())? else { return Ok(false) };
        match (header.backing, on) {
            (Some(backing), Some(on)) => names::same_file(&resolve_backing(&file, &backing.file)?, &on),
            (None, None) => Ok(true),
            _ => Ok(false),
        }
    }

    /// The file that a layer stands on.
    pub(crate) fn below(&self, layer: &LayerName) -> Result<Option<Utf8PathBuf>> {
        let file = file_of(self.record, layer)?;
        match self.reading(layer)?.header().backing.clone() {
            Some(backing) => Ok(Some(resolve_backing(&file, &backing.file)?)),
            None => Ok(None),
        }
    }

    /// New files are made under a passing name and get their own when they are whole and durable.
    fn create_overlay(&self, layer: &LayerName, on: &LayerName, on_format: &str, size: u64) -> Result<()> {
        let file = self.own_name(layer);
        let unfinished = names::unfinished_name(&file);
        let base = self.own_name(on);
        let mut new =
            NewImage::new(size).on(Backing { file: self.string(on), format: Some(on_format.to_owned()) });
        if on_format == "qcow2" {
            let base = Image::open(base.as_std_path(), &OpenOptions::read_only().unlocked())?;
            new = new.like(base.header());
            // Only version 3 can say that a cluster above a backing file reads as zeros.
            new.version = 3;
        }
        // Who may use it is said before anything is in it, and before it has its name.
        let made = names::create_unfinished(&file, &names::open_image(&base, false)?, &base)?;
        let written = another(&made, &unfinished)
            .and_then(|into| Ok(image::write_into(into, unfinished.as_std_path(), &new)?));
        if let Err(error) = written {
            names::remove_name(&unfinished)?;
            return Err(error);
        }
        settle(&unfinished, &file, Some(&made))?;
        self.lock(&file)
    }

    fn materialise(&self, from: &LayerName, tag: &str, layer: &LayerName) -> Result<()> {
        let file = self.own_name(layer);
        let unfinished = names::unfinished_name(&file);
        names::remove_name(&unfinished)?;
        let source = file_of(self.record, from)?;
        let image = Image::open(source.as_std_path(), &OpenOptions::read_only().unlocked())?;
        self.moving(|moving| image::materialise(&image, tag, unfinished.as_std_path(), moving))?;
        settle(&unfinished, &file, None)?;
        self.lock(&file)
    }

    pub(crate) fn take(&self, layer: &LayerName, tag: &str) -> Result<()> {
        let mut image = self.writing(layer)?;
        if image.find_snapshot(tag)?.is_none() {
            let now = Timestamp::now();
            let seconds = u32::try_from(now.as_second()).unwrap_or(u32::MAX);
            let nanoseconds = u32::try_from(now.subsec_nanosecond()).unwrap_or(0);
            image.create_snapshot(&NewSnapshot::new(tag, seconds, nanoseconds))?;
        }
        Ok(())
    }

    fn apply_tag(&self, layer: &LayerName, tag: &str) -> Result<()> {
        self.refuse_open(&file_of(self.record, layer)?)?;
        if self.reading(layer)?.snapshot_matches_active(tag)? {
            self.mend(layer);
            return Ok(());
        }
        self.writing(layer)?.apply_snapshot(tag)?;
        self.mend_if_resumed(layer)
    }

    /// `forget`: without giving back what they refer to.
    fn drop_tags(&self, layer: &LayerName, tags: &[String], forget: bool) -> Result<()> {
        let image = self.reading(layer)?;
        let mut present = Vec::new();
        for tag in tags {
            if image.find_snapshot(tag)?.is_some() {
                present.push(tag.as_str());
            }
        }
        match (present.is_empty(), forget) {
            (true, _) => self.mend(layer),
            (false, false) => {
                self.writing(layer)?.delete_snapshots(&present)?;
                self.mend_if_resumed(layer)?;
            }
            (false, true) => drop(self.writing(layer)?.forget_snapshots(&present)?),
        }
        Ok(())
    }

    /// Gives back what a crash or a failed call may have left of a step that is done, or was never: leaked
    /// clusters, and COPIED bits that are clear. Only a favour, for an image that is whole without it: what
    /// hinders it is not this step's to report, and must not keep an undo from ending. One more failed call
    /// must not decide, so it is tried twice.
    fn mend(&self, layer: &LayerName) {
        for _ in 0..2 {
            match self.writing(layer).and_then(|mut image| Ok(image.repair()?)) {
                Ok(_) => return,
                Err(error) => tracing::warn!(%layer, %error, "what a stopped step left is not given back"),
            }
        }
    }

    /// After a crash: gives back what the stopped step allocated in `layer` and nothing refers to.
    fn mend_if_resumed(&self, layer: &LayerName) -> Result<()> {
        if self.resumed && !self.is_open(&file_of(self.record, layer)?)? {
            self.mend(layer);
        }
        Ok(())
    }

    fn merge(&self, run: &[LayerName], into: &LayerName, below: Option<&LayerName>) -> Result<()> {
        let mut files = Vec::new();
        for layer in run {
            files.push(file_of(self.record, layer)?);
        }
        let Some(index) = run.iter().position(|layer| layer == into) else {
            return Err(Error::new(
                ErrorKind::Internal,
                format!("{into} is not in the run that is merged into it"),
            ));
        };
        let Some(bottom) = run.first() else { return Ok(()) };
        // The format of what lies below is what the run's bottom states.
        let stated = self.reading(bottom)?.header().backing.clone();
        let mut lower = None;
        let backing = match (below, stated) {
            (Some(name), Some(Backing { format: Some(format), .. })) => {
                lower = Some(Below::new(self.own_name(name), format.clone(), self.max_depth));
                Some(Backing { file: self.string(name), format: Some(format) })
            }
            (None, None) => None,
            (expected, found) => {
                return Err(Error::new(
                    ErrorKind::Corrupt,
                    format!("{bottom} should stand on {expected:?}, and its header says {found:?}"),
                )
                .advise("run 'domsnap check'"));
            }
        };
        for file in &files {
            self.lock(file)?;
        }
        names::require_own_names(&file_of(self.record, into)?, &self.record.disk.path)?;
        // What a stopped merge allocated for data that no table refers to yet. First, because it may be the room
        // that this one needs.
        self.mend_if_resumed(into)?;
        let mut layers = Vec::new();
        for file in &files {
            let image = Image::open(file.as_std_path(), &OpenOptions::read_only().unlocked())?;
            layers.push(RunLayer::active(&image)?);
        }
        let over = layers.split_off(index + 1);
        layers.truncate(index);
        let mut target = self.writing(into)?;
        let lower =
            backing.zip(lower.as_mut()).map(|(backing, reader)| image::RunBacking { backing, reader });
        let merged = self.moving(|moving| image::merge(layers, &mut target, over, lower, moving));
        drop(target);
        if merged.is_err() {
            // What was allocated for data that no table refers to yet; the next attempt allocates its own.
            self.mend(into);
        }
        merged.map(drop)
    }

    /// Moves data, telling how much.
    fn moving<T>(&self, work: impl FnOnce(&image::Moving<'_>) -> image::Result<T>) -> Result<T> {
        let moved = AtomicU64::new(0);
        let tell = |bytes: u64| {
            let done = moved.fetch_add(bytes, Ordering::Relaxed).saturating_add(bytes);
            self.progress.bytes(done, self.bytes.max(done));
        };
        Ok(work(&image::Moving { progress: &tell, cancelled: &|| self.cancel.is_cancelled() })?)
    }

    fn repoint(&self, child: &LayerName, to: &LayerName) -> Result<()> {
        let backing = Backing { file: self.string(to), format: Some("qcow2".to_owned()) };
        Ok(self.writing(child)?.set_backing(Some(backing))?)
    }

    fn remove(&self, layers: &[LayerName]) -> Result<()> {
        let path = &self.record.disk.path;
        for layer in layers {
            let file = self.own_name(layer);
            if names::same_file(&file, path)? {
                return Err(Error::new(
                    ErrorKind::Internal,
                    format!("{file} was to be removed, and {path} still names it"),
                )
                .state("it was not removed"));
            }
            self.refuse_in_use(&file)?;
        }
        for layer in layers {
            names::remove_name(&self.own_name(layer))?;
        }
        names::flush_directory_of(path)
    }

    fn removed(&self, layers: &[LayerName]) -> Result<StepStatus> {
        let mut left = 0;
        for layer in layers {
            left += usize::from(names::file_id(&self.own_name(layer))?.is_some());
        }
        Ok(match left {
            0 => StepStatus::Done,
            left if left == layers.len() => StepStatus::NotDone,
            _ => StepStatus::Partly,
        })
    }

    /// Removing a file that somebody has open would leave him with data that no name leads to.
    fn refuse_in_use(&self, file: &Utf8Path) -> Result<()> {
        self.refuse_open(file)?;
        match names::file_id(file)? {
            Some(_) => self.lock(file),
            None => Ok(()),
        }
    }

    /// What a hypervisor has open is its to write, and it may open it by this name again.
    pub(crate) fn refuse_open(&self, file: &Utf8Path) -> Result<()> {
        match self.is_open(file)? {
            true => Err(Error::new(ErrorKind::Busy, format!("the running domain has {file} open"))
                .state("it was not touched")
                .advise("shut the domain down and run 'domsnap recover'")),
            false => Ok(()),
        }
    }

    /// Somebody may have put another file at the configured path since a crash: the switch would drop it.
    fn refuse_replaced(&self, from: &LayerName, to: &LayerName) -> Result<()> {
        let path = &self.record.disk.path;
        let (from, to) = (self.own_name(from), self.own_name(to));
        let Some(found) = names::file_id(path)? else { return Ok(()) };
        let (Some(former), next) = (names::file_id(&from)?, names::file_id(&to)?) else { return Ok(()) };
        if found == former || Some(found) == next {
            return Ok(());
        }
        Err(Error::new(
            ErrorKind::Refused,
            format!("{path} should be {from} or {to}, and is another file"),
        )
        .state("that file was not touched, and all layers are whole")
        .advise(format!(
            "move it away and put the layer back: `{}`; then run `domsnap recover`, and after that import the other file, if \
             it is wanted, with `domsnap import --replace`",
            shell_command(["ln", from.as_str(), path.as_str()])
        )))
    }

    fn unname(&self, layer: &LayerName) -> Result<()> {
        let file = self.own_name(layer);
        if names::file_id(&file)?.is_some() && names::same_file(&file, &self.record.disk.path)? {
            names::remove(&file)?;
        }
        Ok(())
    }
}

/// Gives a new image its own name. Where that is there already and is exactly the same image, the step was done before; what
/// else is there is somebody else's, or has been written to, and nothing is written over it.
fn settle(unfinished: &Utf8Path, file: &Utf8Path, made: Option<&File>) -> Result<()> {
    match names::settle(unfinished, file, made) {
        Err(error)
            if error.kind() == ErrorKind::Exists && is_same_image(unfinished, file).unwrap_or(false) =>
        {
            names::remove_name(unfinished)?;
            names::flush_directory_of(file)
        }
        settled => settled,
    }
}

fn another(file: &File, path: &Utf8Path) -> Result<File> {
    file.try_clone().map_err(|error| names::io_error(error, format!("cannot open {path} once more")))
}

fn is_same_image(one: &Utf8Path, other: &Utf8Path) -> Result<bool> {
    let open = |file: &Utf8Path| Image::open(file.as_std_path(), &OpenOptions::read_only().unlocked());
    let (one, other) = (open(one)?, open(other)?);
    let backing = one.header().backing.clone();
    if backing != other.header().backing || !one.snapshots()?.is_empty() || !other.snapshots()?.is_empty() {
        return Ok(false);
    }
    let (one, other) = (image::RunLayer::active(&one)?, image::RunLayer::active(&other)?);
    Ok(image::same_content(one, other, backing.is_some())?)
}

/// How to open the image at `file` for writing under `hold`, or with a lock of its own where there is none.
fn writing(hold: Option<&Hold>, file: &Utf8Path) -> Result<OpenOptions> {
    match hold {
        Some(hold) => {
            hold.lock(file)?;
            Ok(OpenOptions::read_write().unlocked())
        }
        None => Ok(OpenOptions::read_write()),
    }
}
