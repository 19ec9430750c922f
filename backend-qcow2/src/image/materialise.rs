//! Copying of an internal snapshot into an image of its own.

use std::fs::File;
use std::path::Path;

use image_files::{Attributes, Directory};

use super::create::{NewImage, write_into};
use super::error::{Context, Error, Result};
use super::file::ImageFile;
use super::merge::{MergeReport, fill};
use super::open::Image;
use super::transfer::Moving;
use super::view::RunLayer;

/// Creates a new image at `path` that reads like the internal snapshot `name` of `source`, with the same
/// backing file. Only clusters that the snapshot's own tables map are copied. The new image has the same
/// cluster size, version, refcounts, extended L2 and compression. VM state is not copied. The backing string
/// is copied unchanged, so a relative one requires the same directory.
///
/// The new file gets the source's owner, mode and attributes as far as this process may set them, and
/// stricter ones otherwise. The file is durable when this returns; the caller makes its directory durable. A
/// crash before that leaves no file, or a part of one, and nothing refers to it yet.
///
/// # Errors
/// [`super::ErrorKind::SnapshotNotFound`]; [`super::ErrorKind::FileExists`];
/// [`super::ErrorKind::Unsupported`] for encrypted images and external data files;
/// [`super::ErrorKind::Cancelled`]; the system's. After an error the file does not exist.
pub fn materialise(source: &Image, name: &str, path: &Path, moving: &Moving<'_>) -> Result<MergeReport> {
    let layer = RunLayer::snapshot(
        source,
        source.require_snapshot(name).context("copy a snapshot of", source.path())?,
    )?;
    let mut new = NewImage::new(layer.size()).like(source.header());
    new.backing = source.header().backing.clone();
    let fail = |e| Error::io("it cannot be made with the attributes of the image that it is made from", e);
    let fail = |e| fail(e).on("create", path);
    let (directory, file) = Directory::of(path).map_err(fail)?;
    let made = match source.file().file() {
        Some(model) => Attributes::of(model).and_then(|like| directory.create_like(&file, &like)),
        None => directory.create_new(&file, 0o600),
    };
    let filled = copy_out(layer, &made.map_err(fail)?, path, &new, moving);
    if filled.is_err() {
        // The file is ours, and nothing refers to it yet.
        let _ = directory.remove(&file);
    }
    filled
}

fn copy_out(
    layer: RunLayer,
    file: &File,
    path: &Path,
    new: &NewImage,
    moving: &Moving<'_>,
) -> Result<MergeReport> {
    let another = || file.try_clone().map_err(|e| Error::io("no further descriptor", e).on("create", path));
    write_into(another()?, path, new)?;
    let mut image = Image::from_file(ImageFile::new(Box::new(another()?), path, true))?;
    let report = fill(&mut image, layer, moving)?;
    file.sync_all().map_err(|e| Error::io("what was written cannot be made durable", e).on("flush", path))?;
    Ok(report)
}
