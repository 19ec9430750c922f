//! An internal snapshot copied out into an image of its own.

use std::path::Path;

use image_files::inherit;

use super::create::{NewImage, create};
use super::error::{Context, Error, Result};
use super::merge::{MergeReport, Moving, fill};
use super::open::{Image, OpenOptions};
use super::view::Layer;

/// Makes a new image at `path` that reads as the internal snapshot `name` of `source` does, on the same backing file: only
/// what the snapshot's own tables map is copied. It is an image of the same kind: cluster size, version, refcounts,
/// extended L2, compression. VM state is not copied. Its backing string is the source's, so it must be made in the same
/// directory if that is relative.
///
/// The new file has the source's owner and mode as far as this process may give them, and less otherwise. It is durable
/// when this returns; its directory is the caller's to make durable. A crash before leaves no file or a part of one, which
/// nothing names yet.
///
/// # Errors
/// [`super::ErrorKind::SnapshotNotFound`]; [`super::ErrorKind::FileExists`]; [`super::ErrorKind::Unsupported`] for encrypted
/// images and external data files; [`super::ErrorKind::Cancelled`]; the system's. After an error the file is not there.
pub fn materialise(source: &Image, name: &str, path: &Path, moving: &Moving<'_>) -> Result<MergeReport> {
    let layer =
        Layer::snapshot(source, source.require_snapshot(name).context("copy a snapshot of", source.path())?)?;
    let mut new = NewImage::new(layer.size()).like(source.header());
    new.backing = source.header().backing.clone();
    create(path, &new)?;
    let filled = copy_out(source, layer, path, moving);
    if filled.is_err() {
        // It is ours, and nothing names it yet.
        let _ = std::fs::remove_file(path);
    }
    filled
}

fn copy_out(source: &Image, layer: Layer, path: &Path, moving: &Moving<'_>) -> Result<MergeReport> {
    let mut image = Image::open(path, &OpenOptions::read_write())?;
    if let Some(file) = image.file().file() {
        inherit(file, source.path()).map_err(|e| {
            Error::io("its owner and mode cannot be those of the image that it is made from", e)
                .on("create", path)
        })?;
    }
    let report = fill(&mut image, layer, moving)?;
    match image.file().file() {
        Some(file) => file
            .sync_all()
            .map_err(|e| Error::io("what was written cannot be made durable", e).on("flush", path))?,
        None => image.file().flush()?,
    }
    Ok(report)
}
