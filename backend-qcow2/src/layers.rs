//! qcow2 images as layers of a chain. [`crate::dependents`] reads which other images are backed by them.

use std::collections::HashMap;

use camino::{Utf8Path, Utf8PathBuf};
use image_files::layers::{ChainFormat, ImageFacts};
pub(crate) use image_files::layers::{Limits, file_of};
use image_files::names::FileId;
use image_files::{Bases, FileIds};
use jiff::Timestamp;
use snapcore::backend::{DiskState, InternalPoint};
use snapcore::{DiskRecord, Error, ErrorKind, LayerName, Result, shell_command};

use crate::backing_string::resolve_backing;
use crate::dependents;
use crate::image::{self, Backing, Image, OpenOptions};
use crate::tags::identity_of;

/// The qcow2 format, on images of other formats.
#[derive(Debug, Clone, Default)]
pub(crate) struct Qcow2Chain {
    pub(crate) bases: Bases,
}

impl ChainFormat for Qcow2Chain {
    fn name(&self) -> &str {
        "qcow2"
    }

    fn read(&self, file: &Utf8Path, _limits: &Limits, owned: bool) -> Result<ImageFacts> {
        let opened = Image::open(file.as_std_path(), &OpenOptions::read_only().unlocked())?;
        Ok(ImageFacts {
            virtual_size: opened.virtual_size(),
            internal: if owned { internal_points(&opened)? } else { Vec::new() },
            backing: opened.header().backing.as_ref().map(|backing| stated(file, backing)).transpose()?,
        })
    }

    fn backing_of(&self, file: &Utf8Path, _limits: &Limits) -> Option<Utf8PathBuf> {
        let backing = image::probe(file.as_std_path()).ok()??.backing?;
        resolve_backing(file, &backing.file).ok()
    }

    fn dependents(
        &self,
        record: &DiskRecord,
        limits: &Limits,
        state: &mut DiskState,
        seen: &HashMap<FileId, LayerName>,
        open: &FileIds,
    ) -> Result<()> {
        dependents::find(record, limits, state, seen, open)
    }

    fn base_size(&self, file: &Utf8Path, format: &str, above: &[u64]) -> Result<Option<u64>> {
        self.bases.size(file, format, above)
    }

    fn mend_backing(&self) -> &'static str {
        "one of its images names a wrong backing file: mend that with 'qemu-img rebase -u'"
    }

    fn rename_backing(&self, child: &Utf8Path, below: &Utf8Path, of: &str) -> String {
        // A name without a directory, so that the next move needs no such command.
        let name = below.file_name().unwrap_or(below.as_str());
        shell_command(["qemu-img", "rebase", "-u", "-F", of, "-b", name, child.as_str()])
    }
}

/// Returns the file that a backing string names, and its stated format.
fn stated(child: &Utf8Path, backing: &Backing) -> Result<(Utf8PathBuf, String)> {
    let format = backing.format.clone().ok_or_else(|| {
        Error::new(
            ErrorKind::Refused,
            format!(
                "{child} does not say of which format its backing file {} is, and that is never guessed",
                backing.file
            ),
        )
        .advise(format!(
            "state it: `{}`, with the format for FORMAT",
            shell_command(["qemu-img", "rebase", "-u", "-b", &backing.file, "-F", "FORMAT", child.as_str()])
        ))
    })?;
    Ok((resolve_backing(child, &backing.file)?, format))
}

/// The internal snapshots of an open image.
pub(crate) fn internal_points(image: &Image) -> Result<Vec<InternalPoint>> {
    let points = image.snapshots()?.iter().map(|snapshot| {
        InternalPoint::new(
            snapshot.name().into_owned(),
            snapshot.disk_size,
            Timestamp::new(i64::from(snapshot.date_seconds), 0).unwrap_or(Timestamp::UNIX_EPOCH),
        )
        .vm_state_size(snapshot.vm_state_size)
        .identity(Some(identity_of(snapshot)))
    });
    Ok(points.collect())
}
