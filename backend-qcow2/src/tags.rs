//! Internal snapshots by identity: the name alone may be that of another one, made since by another program.

use camino::Utf8Path;
use image_files::chain::Tag;
use snapcore::{DiskRecord, Error, ErrorKind, LayerName, Result, TagIdentity};

use crate::image::{self, Image, OpenOptions};
use crate::layers::file_of;

pub(crate) fn identity_of(snapshot: &image::Snapshot) -> TagIdentity {
    TagIdentity::new(
        snapshot.id().into_owned(),
        snapshot.date_seconds,
        snapshot.date_nanoseconds,
        snapshot.vm_clock_ns,
    )
}

/// Returns the identity of the internal snapshot `tag` of `layer`, to distinguish it from others of its name;
/// `None` if it is missing or duplicate.
pub(crate) fn identify(record: &DiskRecord, layer: &LayerName, tag: &str) -> Result<Option<TagIdentity>> {
    let file = file_of(record, layer)?;
    let image = Image::open(file.as_std_path(), &OpenOptions::read_only().unlocked())?;
    let mut same = image.snapshots()?.iter().filter(|snapshot| snapshot.name() == tag);
    match (same.next(), same.next()) {
        (Some(only), None) => Ok(Some(identity_of(only))),
        _ => Ok(None),
    }
}

/// Returns true if an open image has the internal snapshot, and not another of its name that was made since.
pub(crate) fn has_tag(image: &Image, tag: &Tag) -> Result<bool> {
    let planned = tag.identity.as_ref();
    Ok(image
        .find_snapshot(&tag.name)?
        .is_some_and(|found| planned.is_none_or(|planned| *planned == identity_of(found))))
}

/// Returns the names of the tags that an open image has.
pub(crate) fn present<'a>(image: &Image, tags: &'a [Tag]) -> Result<Vec<&'a str>> {
    let mut names = Vec::new();
    for tag in tags {
        if has_tag(image, tag)? {
            names.push(tag.name.as_str());
        }
    }
    Ok(names)
}

/// Refuses an internal snapshot that another program has deleted, and made again, since the plan.
pub(crate) fn require_tag(image: &Image, file: &Utf8Path, tag: &Tag) -> Result<()> {
    let (Some(found), Some(planned)) = (image.find_snapshot(&tag.name)?, &tag.identity) else {
        return Ok(()); // The step says that it is missing.
    };
    match identity_of(found) {
        found if found == *planned => Ok(()),
        found => Err(Error::new(
            ErrorKind::NotFound,
            format!(
                "internal snapshot {} in {file} is not the one of this operation: another program deleted that \
                 ({planned}) and made one of the same name ({found})",
                tag.name
            ),
        )
        .advise("`domsnap check` lists which snapshots have lost their data")),
    }
}
