//! Checks that find failures of a plan's steps before the first of them. A refusal here changes nothing.
//!
//! The checks read the images: encryption, damage that a step would meet. The steps check the same again
//! before they write, because a recovery repeats them without a plan.

use camino::{Utf8Path, Utf8PathBuf};
use image_files::chain::{ChainStep, Tag};
use snapcore::backend::{DiskPlan, DiskRequest, DiskState, InstantPlan};
use snapcore::hypervisor::DiskInstant;
use snapcore::{DiskRecord, Error, ErrorKind, FinishStep, LayerName, Result};

use crate::backing_string::{backing_string, resolve_backing};
use crate::image::{self, Backing, Encryption, Image, NewSnapshot, OpenOptions};
use crate::layers::file_of;

/// Refuses a plan with steps that would fail. With `force`, replaces them by steps that forget damaged
/// snapshots.
///
/// # Errors
/// [`ErrorKind::Unsupported`], [`ErrorKind::Refused`] or [`ErrorKind::Corrupt`], with advice.
pub(crate) fn check(
    record: &DiskRecord,
    state: &DiskState,
    request: &DiskRequest,
    plan: &mut DiskPlan<ChainStep>,
    max_depth: u32,
) -> Result<()> {
    let preflight = Preflight { record, state, max_depth };
    if let Some(InstantPlan { take: DiskInstant::Internal { tag }, .. }) = &plan.instant {
        preflight.writable(&state.active)?.could_take(&NewSnapshot::new(tag.as_str(), 0, 0))?;
    }
    let force = matches!(request, DiskRequest::Delete { force: true, .. });
    let (detached, finish) = (std::mem::take(&mut plan.detached), std::mem::take(&mut plan.finish));
    let mut notes = Vec::new();
    for step in plan.steps() {
        preflight.step(&step.action)?;
        preflight.losses(&step.action, &mut notes)?;
    }
    for planned in detached {
        if let ChainStep::DropInternal { layer, .. } = &planned.step.action {
            preflight.require_reopening(&preflight.reading(layer)?)?;
        }
        let checked = preflight.finish(planned, force, &mut notes)?;
        plan.detached.extend(checked.forget.into_iter().chain(checked.step));
    }
    for planned in finish {
        let checked = preflight.finish(planned, force, &mut notes)?;
        // A hypervisor that deletes a damaged snapshot would follow its tables. So its image is closed
        // meanwhile.
        let part = if checked.is_open { &mut plan.detached } else { &mut plan.finish };
        part.extend(checked.forget);
        plan.finish.extend(checked.step);
    }
    plan.notes.extend(notes);
    Ok(())
}

/// A finish step that can be done.
struct Checked {
    /// The step that forgets damaged snapshots, before it or in its place.
    forget: Option<FinishStep<ChainStep>>,
    /// True if a hypervisor has the image of `forget` open.
    is_open: bool,
    /// The step itself, if something is left to be done.
    step: Option<FinishStep<ChainStep>>,
}

struct Preflight<'a> {
    record: &'a DiskRecord,
    state: &'a DiskState,
    max_depth: u32,
}

impl Preflight<'_> {
    fn step(&self, step: &ChainStep) -> Result<()> {
        match step {
            ChainStep::CreateOverlay { on, on_format, .. } => {
                if on_format != "qcow2" {
                    return Ok(());
                }
                match encrypted_in(&file_of(self.record, on)?, self.max_depth)? {
                    None => Ok(()),
                    Some((file, how)) => Err(self.would_be_in_clear(&file, &how)),
                }
            }
            ChainStep::Materialise { from, tag, .. } => {
                match encrypted_in(&file_of(self.record, from)?, self.max_depth)? {
                    None => {
                        let image = self.reading(from)?;
                        image.require_plain_data()?;
                        // Reads the tables that the copy will read. An earlier step of the same plan may
                        // create the tag.
                        if let Some(snapshot) = image.find_snapshot(&tag.name)? {
                            image::visible_bytes(vec![image::RunLayer::snapshot(&image, snapshot)?])?;
                        }
                        Ok(())
                    }
                    Some((file, how)) => Err(self.would_be_in_clear(&file, &how)),
                }
            }
            // The file is incomplete while a hypervisor writes it: the step checks it in the detached
            // section.
            ChainStep::TakeInternal { layer, tag } if self.is_written(layer) => {
                Ok(self.writable(layer)?.could_take(&NewSnapshot::new(tag.as_str(), 0, 0))?)
            }
            ChainStep::TakeInternal { layer, tag } => {
                Ok(self.writable(layer)?.could_create(&NewSnapshot::new(tag.as_str(), 0, 0))?)
            }
            ChainStep::ApplyInternal { layer, tag, .. } => {
                let mut image = self.writable(layer)?;
                if self.is_open(layer) {
                    self.require_reopening(&image)?;
                }
                Ok(image.could_apply(&tag.name)?)
            }
            ChainStep::Merge { run, into, .. } => self.merge(run, into),
            ChainStep::Repoint { child, .. } if self.is_open(child) => self.writable(child).map(|_| ()),
            ChainStep::Repoint { child, to } => {
                let file = backing_string(self.record.disk.path(), to);
                let backing = Backing { file, format: Some("qcow2".to_owned()) };
                Ok(self.writable(child)?.could_set_backing(&backing)?)
            }
            ChainStep::NameLayer { .. }
            | ChainStep::SwitchActive { .. }
            | ChainStep::DropInternal { .. }
            | ChainStep::ForgetInternal { .. }
            | ChainStep::Remove { .. }
            | ChainStep::Unname { .. }
            | ChainStep::Clone { .. }
            | ChainStep::PublishClones { .. } => Ok(()),
        }
    }

    /// Adds notes about properties that the disk loses by a step, because the user may need them.
    fn losses(&self, step: &ChainStep, notes: &mut Vec<String>) -> Result<()> {
        let target = &self.record.disk.target;
        let (layer, bitmaps) = match step {
            ChainStep::CreateOverlay { on, .. } => (on, "stay in it, and the new overlay has none"),
            ChainStep::Materialise { from, .. } => (from, "stay in it, and the copy has none"),
            ChainStep::ApplyInternal { layer, .. } => {
                (layer, "do not know what changes, and are marked as invalid")
            }
            ChainStep::Merge { into, .. } => (into, "do not know what is merged, and are marked as invalid"),
            _ => return Ok(()),
        };
        let known = self.state.layer(layer);
        if known.is_some_and(|layer| layer.format != "qcow2") {
            return Ok(());
        }
        let file = file_of(self.record, layer)?;
        // An earlier step of the same plan creates some of the images.
        let Ok(image) = Image::open(file.as_std_path(), &OpenOptions::read_only().unlocked()) else {
            return Ok(());
        };
        let valid: Vec<String> = match image::list_bitmaps(&image) {
            Ok(list) => list.into_iter().filter(|bitmap| !bitmap.in_use).map(|bitmap| bitmap.name).collect(),
            Err(_) => Vec::new(),
        };
        if !valid.is_empty() {
            notes.push(format!(
                "{target}: the dirty bitmaps of {file} ({}) {bitmaps}: the next incremental backup of this disk must be a \
                 full one",
                valid.join(", ")
            ));
        }
        if let ChainStep::CreateOverlay { virtual_size, .. } = step {
            let mut not = Vec::new();
            if known.is_some_and(|layer| *virtual_size > 0 && layer.allocated >= *virtual_size) {
                not.push("is allocated in full");
            }
            if image.header().has_data_file() {
                not.push("keeps its data in a data file");
            }
            if image.header().version < 3 {
                not.push("is of version 2 (compat=0.10)");
            }
            if !not.is_empty() {
                notes
                    .push(format!("{target}: {file} {}; the new overlay is not made so", not.join(", and ")));
            }
        }
        Ok(())
    }

    /// Refuses to merge encrypted layers: only a program with the key can move their data, which must not be
    /// stored unencrypted.
    fn merge(&self, run: &[LayerName], into: &LayerName) -> Result<()> {
        let mut encrypted = None;
        let mut into_encrypted = false;
        for layer in run {
            let image = self.reading(layer)?;
            if image.header().has_data_file() || image.header().encryption != Encryption::None {
                let how = match image.header().encryption {
                    Encryption::None => "keeps its data in another file".to_owned(),
                    how => encryption_message(how),
                };
                encrypted = Some((layer, how));
                into_encrypted |= layer == into;
            }
        }
        // A hypervisor that has the images open has the key too.
        let by_hypervisor = self.state.attached && run.iter().all(|layer| self.is_open(layer));
        match encrypted {
            Some((layer, how)) if !(by_hypervisor && into_encrypted) => Err(Error::new(
                ErrorKind::Unsupported,
                format!(
                    "{}: the data of {} would have to be merged, which {how}: only a program that has the key can move it",
                    self.record.disk.target,
                    file_of(self.record, layer)?
                ),
            )
            .state("no changes made")
            .advise("merge by hand with `qemu-img commit` or `qemu-img rebase`, `--object secret,...` and `--image-opts`")),
            _ => Ok(()),
        }
    }

    fn would_be_in_clear(&self, file: &Utf8Path, how: &str) -> Error {
        let target = &self.record.disk.target;
        Error::new(
            ErrorKind::Unsupported,
            format!(
                "{target}: {file} {how}: a new image on it would hold what the guest writes from then on in the clear, and \
                 the domain's own options would not open it"
            ),
        )
        .state("no changes made")
        .advise(format!(
            "use internal snapshots for this disk (--disk {target}=internal), or leave it out (--disk {target}=skip)"
        ))
    }

    /// Refuses an encrypted image where a detached section is needed: it cannot be opened again without its
    /// key, which QEMU has.
    fn require_reopening(&self, image: &Image) -> Result<()> {
        if image.header().encryption == Encryption::None {
            return Ok(());
        }
        Err(Error::new(
            ErrorKind::Refused,
            format!(
                "{}: {} {}, so the running domain could not open it again after it",
                self.record.disk.target,
                image.path().display(),
                encryption_message(image.header().encryption)
            ),
        )
        .state("no changes made")
        .advise("shut the domain down, then run the same command again"))
    }

    /// Opens the layer's image, if it may be written at all.
    fn writable(&self, layer: &LayerName) -> Result<Image> {
        let image = self.reading(layer)?;
        image.require_writable()?;
        Ok(image)
    }

    fn reading(&self, layer: &LayerName) -> Result<Image> {
        let file = file_of(self.record, layer)?;
        Ok(Image::open(file.as_std_path(), &OpenOptions::read_only().unlocked())?)
    }

    fn is_open(&self, layer: &LayerName) -> bool {
        self.state.attached && self.state.chain(&self.state.active).iter().any(|open| open.name == *layer)
    }

    /// Returns true if a hypervisor writes the layer.
    fn is_written(&self, layer: &LayerName) -> bool {
        self.state.attached && *layer == self.state.active
    }

    /// Lists the snapshots that cannot be deleted, because their tables are inconsistent.
    fn damaged(&self, layer: &LayerName, tags: &[Tag], force: bool) -> Result<Vec<String>> {
        let image = self.writable(layer)?;
        let known = |tag: &&str| image.find_snapshot(tag).is_ok_and(|found| found.is_some());
        // An earlier step of the same plan creates some of the tags.
        let tags: Vec<&str> = tags.iter().map(|tag| tag.name.as_str()).filter(known).collect();
        if tags.is_empty() {
            return Ok(Vec::new());
        }
        let mut refusal = match self.could_delete(layer, &tags)? {
            None => return Ok(Vec::new()),
            Some(refusal) => refusal,
        };
        let mut damaged = Vec::new();
        for tag in &tags {
            if let Some(error) = self.could_delete(layer, &[tag])? {
                damaged.push((*tag).to_owned());
                refusal = error;
            }
        }
        if damaged.is_empty() {
            // Each can be deleted alone: what is inconsistent is the number of references that they share.
            damaged = tags.iter().map(|tag| (*tag).to_owned()).collect();
        }
        if force {
            return Ok(damaged);
        }
        let file = file_of(self.record, layer)?;
        Err(Error::from(refusal)
            .context(format!("{} inside {file} is damaged and cannot be deleted", damaged.join(", ")))
            .state("no changes made")
            .advise(format!(
                "`delete --force` forgets it and leaves its space in use, which `qemu-img check -r leaks {file}` gives back later"
            )))
    }

    /// Returns the damage that a delete would meet. A file that a hypervisor writes is read a second time
    /// before it counts as damaged.
    fn could_delete(&self, layer: &LayerName, tags: &[&str]) -> Result<Option<image::Error>> {
        let mut again = self.is_written(layer);
        loop {
            match self.reading(layer)?.could_delete(tags) {
                Ok(()) => return Ok(None),
                Err(error) if error.kind() != image::ErrorKind::Corrupt => return Err(error.into()),
                Err(_) if again => again = false,
                Err(error) => return Ok(Some(error)),
            }
        }
    }

    /// Checks a finish step, and what is nested in it.
    fn finish(
        &self,
        planned: FinishStep<ChainStep>,
        force: bool,
        notes: &mut Vec<String>,
    ) -> Result<Checked> {
        let ChainStep::DropInternal { layer, tags } = &planned.step.action else {
            let nested = planned.nested.iter().map(|nested| &nested.step.action);
            for action in std::iter::once(&planned.step.action).chain(nested) {
                self.step(action)?;
                self.losses(action, notes)?;
            }
            return Ok(Checked { forget: None, is_open: false, step: Some(planned) });
        };
        let damaged = self.damaged(layer, tags, force)?;
        self.forgetting(planned, damaged, notes)
    }

    /// Returns the step, and beside it or in its place one that forgets the damaged snapshots.
    fn forgetting(
        &self,
        mut planned: FinishStep<ChainStep>,
        damaged: Vec<String>,
        notes: &mut Vec<String>,
    ) -> Result<Checked> {
        let ChainStep::DropInternal { layer, tags } = planned.step.action.clone() else {
            return Ok(Checked { forget: None, is_open: false, step: Some(planned) });
        };
        if damaged.is_empty() {
            return Ok(Checked { forget: None, is_open: false, step: Some(planned) });
        }
        let (target, file) = (&self.record.disk.target, file_of(self.record, &layer)?);
        let is_open = self.is_open(&layer);
        if is_open {
            self.require_reopening(&self.reading(&layer)?)?;
        }
        notes.push(format!(
            "{target}: {} inside {file} is damaged: it is forgotten, and its space stays in use until \
             `qemu-img check -r leaks {file}` is run while the domain is off",
            damaged.join(", ")
        ));
        let (to_forget, whole): (Vec<Tag>, Vec<Tag>) =
            tags.into_iter().partition(|tag| damaged.contains(&tag.name));
        let mut forget = planned.clone();
        forget.step.summary = format!("forget {} inside {layer}", damaged.join(", "));
        forget.step.action = ChainStep::ForgetInternal { layer: layer.clone(), tags: to_forget };
        if whole.is_empty() {
            return Ok(Checked { forget: Some(forget), is_open, step: None });
        }
        forget.edits.clear();
        planned.step.summary = format!("delete {} inside {layer}", Tag::names(&whole));
        planned.step.action = ChainStep::DropInternal { layer, tags: whole };
        Ok(Checked { forget: Some(forget), is_open, step: Some(planned) })
    }
}

fn encryption_message(how: Encryption) -> String {
    match how {
        Encryption::None => "is not encrypted".to_owned(),
        Encryption::Aes => "is encrypted with AES".to_owned(),
        Encryption::Luks => "is encrypted with LUKS".to_owned(),
    }
}

/// Finds the first encrypted image of the chain whose top is `top`, and its method. An image that cannot be
/// followed ends the search: the code that reads the chain reports it.
pub(crate) fn encrypted_in(top: &Utf8Path, max_depth: u32) -> Result<Option<(Utf8PathBuf, String)>> {
    let mut file = top.to_owned();
    for _ in 0..max_depth {
        let Some(header) = image::probe(file.as_std_path())? else { return Ok(None) };
        if header.encryption != Encryption::None {
            return Ok(Some((file, encryption_message(header.encryption))));
        }
        if let Some(name) = header.data_file.filter(|name| !name.is_empty()) {
            let data = resolve_backing(&file, &name)?;
            if image_files::is_luks(&data).unwrap_or(false) {
                return Ok(Some((data, encryption_message(Encryption::Luks))));
            }
        }
        let Some(backing) = header.backing else { return Ok(None) };
        let next = resolve_backing(&file, &backing.file)?;
        match backing.format.as_deref() {
            Some("qcow2") => file = next,
            Some("luks") => return Ok(Some((next, encryption_message(Encryption::Luks)))),
            _ => return Ok(None),
        }
    }
    Ok(None)
}
