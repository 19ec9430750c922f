//! Steps on the files of one disk that are the same for every backend of image files. Blocking.
//!
//! | step | durable before what |
//! |---|---|
//! | name | the second name, before the configured path moves away from the file |
//! | switch | the new name, by one rename; the previous layer keeps its own name |
//! | keep as | the other name, before an undo removes the file's own |
//! | remove, unname | nothing that follows depends on it |

use std::collections::HashSet;

use camino::{Utf8Path, Utf8PathBuf};
use snapcore::backend::StepStatus;
use snapcore::hypervisor::AttachedDisk;
use snapcore::{DiskRecord, Error, ErrorKind, FileIdentity, LayerName, Result, shell_command};

use crate::ImageLocks;
use crate::layer_name::layer_path;
use crate::names;

/// Identities of files.
pub type FileIds = HashSet<FileIdentity>;

/// Returns the files of a disk that a hypervisor has open; none if the disk is not attached.
///
/// # Errors
/// The hypervisor's.
pub async fn open_files(attached: Option<&dyn AttachedDisk>) -> Result<FileIds> {
    match attached {
        Some(disk) => disk.open_files().await,
        None => Ok(FileIds::new()),
    }
}

/// Prefix of the names of files and tags that save what an undo would have lost.
pub const RESCUED: &str = "rescued-";

/// The context of steps on the files of one disk.
pub struct FileSteps<'a> {
    /// The disk.
    pub record: &'a DiskRecord,
    /// The locks of the operation that the step belongs to.
    pub locks: Option<&'a ImageLocks>,
    /// The files that a hypervisor has open: it locks and writes them.
    pub open: FileIds,
}

impl FileSteps<'_> {
    /// The configured path.
    pub fn path(&self) -> &Utf8Path {
        self.record.disk.path()
    }

    /// The file of a layer's permanent name.
    pub fn file(&self, layer: &LayerName) -> Utf8PathBuf {
        layer_path(self.path(), layer)
    }

    /// Returns true if there is a file of the layer's permanent name.
    pub fn is_there(&self, layer: &LayerName) -> Result<bool> {
        Ok(names::file_id(&self.file(layer))?.is_some())
    }

    /// Returns true if the configured path names this layer.
    pub fn is_named_by_path(&self, layer: &LayerName) -> Result<bool> {
        names::same_file(&self.file(layer), self.path())
    }

    /// Returns true if a hypervisor has the file open.
    pub fn is_open(&self, file: &Utf8Path) -> Result<bool> {
        Ok(!self.open.is_empty() && names::file_id(file)?.is_some_and(|id| self.open.contains(&id)))
    }

    /// Locks a file until the operation ends. A hypervisor locks the files that it has open itself.
    ///
    /// # Errors
    /// [`ErrorKind::Busy`] if another process has it locked.
    pub fn lock(&self, file: &Utf8Path) -> Result<()> {
        match self.locks {
            Some(locks) if !self.is_open(file)? => locks.lock(file),
            _ => Ok(()),
        }
    }

    /// Refuses a file that a hypervisor has open: it writes the file, and may open it by this name again.
    ///
    /// # Errors
    /// [`ErrorKind::Busy`].
    pub fn refuse_open(&self, file: &Utf8Path) -> Result<()> {
        match self.is_open(file)? {
            true => Err(Error::new(ErrorKind::Busy, format!("the running domain has {file} open"))
                .state("it was not touched")
                .advise("shut the domain down and run 'domsnap recover'")),
            false => Ok(()),
        }
    }

    /// Refuses and locks a file that is to lose its name. A process that has it open would be left with data
    /// that no name leads to.
    ///
    /// # Errors
    /// [`ErrorKind::Busy`].
    pub fn refuse_in_use(&self, file: &Utf8Path) -> Result<()> {
        self.refuse_open(file)?;
        match names::file_id(file)? {
            Some(_) => self.lock(file),
            None => Ok(()),
        }
    }

    /// Gives the file that the configured path names the layer's permanent name too.
    pub fn name(&self, layer: &LayerName) -> Result<()> {
        names::add_name(self.path(), &self.file(layer))
    }

    /// Removes the layer's permanent name if the configured path names the same file.
    pub fn unname(&self, layer: &LayerName) -> Result<()> {
        match self.is_there(layer)? && self.is_named_by_path(layer)? {
            true => names::remove(&self.file(layer)),
            false => Ok(()),
        }
    }

    /// Moves the configured path from one layer to another.
    pub fn switch(&self, from: &LayerName, to: &LayerName) -> Result<()> {
        self.refuse_replaced(from, to)?;
        let to = self.file(to);
        // If a hypervisor has the one file open, it opens the other next: a lock of ours would exclude it.
        if !self.is_open(self.path())? {
            self.lock(self.path())?;
            self.lock(&to)?;
        }
        names::move_name(self.path(), &to)
    }

    /// Moves the configured path back.
    pub fn undo_switch(&self, from: &LayerName, to: &LayerName) -> Result<()> {
        self.lock(self.path())?;
        // If the switch was undone before, earlier steps may have been undone too: then `from` has no name of
        // its own.
        match self.is_named_by_path(to)? {
            true => names::move_name(self.path(), &self.file(from)),
            false => names::clear_move(self.path()),
        }
    }

    /// Removes layers, and the file that `beside` returns for each. Either all are refused, or none is. The
    /// directory is flushed once, at the end.
    pub fn remove(
        &self,
        layers: &[LayerName],
        beside: impl Fn(&Utf8Path) -> Option<Utf8PathBuf>,
    ) -> Result<()> {
        for layer in layers {
            let file = self.file(layer);
            if names::same_file(&file, self.path())? {
                return Err(Error::new(
                    ErrorKind::Internal,
                    format!("{file} was to be removed, and {} still names it", self.path()),
                )
                .state("it was not removed"));
            }
            self.refuse_in_use(&file)?;
        }
        for layer in layers {
            let file = self.file(layer);
            names::remove_name(&file)?;
            if let Some(other) = beside(&file) {
                names::remove_name(&other)?;
            }
        }
        names::flush_directory_of(self.path())
    }

    /// Returns how far a removal of layers got.
    pub fn removed(&self, layers: &[LayerName]) -> Result<StepStatus> {
        let mut left = 0;
        for layer in layers {
            left += usize::from(self.is_there(layer)?);
        }
        Ok(match left {
            0 => StepStatus::Done,
            left if left == layers.len() => StepStatus::NotDone,
            _ => StepStatus::Partly,
        })
    }

    /// Gives the file of a layer that an undo would remove a name that no undo knows, durably; returns that
    /// name.
    pub fn keep_as(&self, layer: &LayerName) -> Result<Utf8PathBuf> {
        let file = self.file(layer);
        let kept = file.with_file_name(format!("{RESCUED}{}", file.file_name().unwrap_or_default()));
        self.refuse_in_use(&file)?;
        names::publish(&file, &kept, None)?;
        Ok(kept)
    }

    /// Refuses the switch if another process has put another file at the configured path since a crash: the
    /// switch would drop that file.
    fn refuse_replaced(&self, from: &LayerName, to: &LayerName) -> Result<()> {
        let (path, from, to) = (self.path(), self.file(from), self.file(to));
        let is_either = || Ok::<_, Error>(names::same_file(path, &from)? || names::same_file(path, &to)?);
        if names::file_id(path)?.is_none() || is_either()? {
            return Ok(());
        }
        Err(Error::new(ErrorKind::Refused, format!("{path} should be {from} or {to}, and is another file"))
            .state("that file was not touched, and all layers are whole")
            .advise(format!(
                "move it away and put the layer back: `{}`; then run `domsnap recover`, and after that import the \
                 other file, if it is wanted, with `domsnap import --replace`",
                shell_command(["ln", from.as_str(), path.as_str()])
            )))
    }
}

/// The message of a recovery that saves an overlay as `kept`. The guest wrote to it, in `format`, since the
/// instant of a create that was undone, and the disk continues on its base.
pub fn kept_overlay_message(record: &DiskRecord, file: &Utf8Path, kept: &Utf8Path, format: &str) -> String {
    let (target, base) = (&record.disk.target, record.disk.path());
    format!(
        "{target}: the domain wrote into {file}, the overlay of a snapshot that was not taken; what it wrote is kept as \
         {kept}, on {base}: where the domain should go on with that, do not start it on {base}, which would spoil the \
         overlay, but make its configuration name the overlay, with format {format}; else remove the overlay"
    )
}

/// The message of a recovery that saves a layer made by a revert as `kept`.
pub fn kept_layer_message(record: &DiskRecord, file: &Utf8Path, kept: &Utf8Path) -> String {
    format!(
        "{}: the domain ran after the crash and wrote into {file}; the revert was undone, and what it wrote is kept as \
         {kept}: remove it when it is of no use",
        record.disk.target
    )
}
