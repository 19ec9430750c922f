//! A state of a disk that is only read: the current one, or a snapshot.

use std::io;
use std::sync::Arc;

use backend_qcow2::image::{self, BottomReader, Image as Qcow2Image, OpenOptions, PointReader, RunLayer};
use backend_vhd::VhdBase;
use camino::{Utf8Path, Utf8PathBuf};
use image_files::engine::file::ImageFile;
use image_files::{BaseFormat, BaseImage, LockMode, lock};
use nbd_server::{Content, Extent, Layer, Served};
use snapcore::backend::InspectDepth;
use snapcore::{ActivePath, Disk, DiskRecord, Error, ErrorKind, Point, Result, Target};

use super::read_only::{ReadOnly, Readable};
use super::vhd::VhdFormat;
use super::{layer, raw, served};
use crate::failure::Failure;
use crate::session::Session;

/// The current state of the image.
pub fn current(session: &Session, image: &Utf8Path, format: &str) -> Result<Served, Failure> {
    let record = alone(session, image, format)?;
    let active = Point::external(record.active.clone());
    Ok(open(chain(session, &record, &active)?, None, image)?)
}

/// The snapshot `name` of the image: of its domain, by the catalogue or the manifests beside the image, or
/// one in the image's own table.
pub fn at(session: &Session, image: &Utf8Path, format: &str, name: &str) -> Result<Served, Failure> {
    let owner = session.ask(session.service.belonging(image))?;
    let known = owner.as_ref().and_then(|owner| {
        let snapshot = owner.listing.snapshots.iter().find(|snapshot| snapshot.name.as_str() == name)?;
        let point = snapshot.point(&owner.target)?.point.clone();
        Some((owner.listing.domain.disk(&owner.target)?.clone(), point))
    });
    let (record, point) = match known {
        Some(known) => known,
        None => {
            let record = alone(session, image, format)?;
            let point = Point::internal(record.active.clone(), name);
            (record, point)
        }
    };
    let chain = chain(session, &record, &point)?;
    // Only qcow2 images have points inside of them: of the others, the current state would be served.
    let tagged = point.tag.as_deref();
    if let (Some(tag), Some((file, format))) = (tagged, chain.first())
        && format != "qcow2"
    {
        return Err(no_snapshot(file, tag, image).into());
    }
    let mut served = match chain.first() {
        Some((file, format)) if format == "vhd" => {
            let opened = VhdFormat::new(&session.global, true)?.open_chain(file)?;
            Served { path: image.to_owned(), ..opened }
        }
        _ => open(chain, tagged, image)?,
    };
    served.snapshot = Some(name.to_owned());
    Ok(served)
}

fn no_snapshot(file: &Utf8Path, name: &str, image: &Utf8Path) -> Error {
    Error::new(ErrorKind::NotFound, format!("{file} has no snapshot {name}"))
        .advise(format!("`domsnap disk list {image}` lists its snapshots"))
}

/// The image as a disk that the catalogue does not know.
fn alone(session: &Session, image: &Utf8Path, format: &str) -> Result<DiskRecord, Failure> {
    let backend = session.service.registry().get(format)?;
    let disk = Disk::new(Target::new("vda")?, image, format);
    session.ask(async { backend.adopt(&disk, ActivePath::Keep).await })
}

/// The files of the point's layer and of all below it, the top first, with their formats. The backend has
/// checked that none is outside of the directories that the user allows.
fn chain(
    session: &Session,
    record: &DiskRecord,
    point: &Point,
) -> Result<Vec<(Utf8PathBuf, String)>, Failure> {
    let backend = session.service.registry().serving(&record.disk)?;
    let state = session.ask(async { backend.inspect(record, InspectDepth::Layers, None).await })?;
    let mut chain = Vec::new();
    let mut next = Some(point.layer.clone());
    while let Some(name) = next {
        let found = state.layer(&name).filter(|_| chain.len() <= state.layers.len()).ok_or_else(|| {
            Error::new(ErrorKind::NotFound, format!("layer {name} of {} does not exist", record.disk.address))
        })?;
        chain.push((found.path().to_owned(), found.format.clone()));
        next = found.backing.clone();
    }
    Ok(chain)
}

/// Opens a chain, with a reader's lock on each of its files.
fn open(chain: Vec<(Utf8PathBuf, String)>, tag: Option<&str>, image: &Utf8Path) -> Result<Served> {
    let (mut run, mut bottom, mut layers) = (Vec::new(), None::<Box<dyn BottomReader>>, Vec::new());
    for (file, format) in &chain {
        match format.as_str() {
            "qcow2" => {
                let opened = Qcow2Image::open(file.as_std_path(), &OpenOptions::read_only())?;
                let state = match tag.filter(|_| run.is_empty()) {
                    None => RunLayer::active(&opened)?,
                    Some(tag) => {
                        let found =
                            opened.find_snapshot(tag)?.ok_or_else(|| no_snapshot(file, tag, image))?;
                        RunLayer::snapshot(&opened, found)?
                    }
                };
                layers.push(layer_of(file, opened.file())?);
                run.push(state);
            }
            "raw" if run.is_empty() => {
                let opened = raw::open(file, true)?;
                return Ok(Served { path: image.to_owned(), ..opened });
            }
            "raw" => {
                let opened = ImageFile::open(file.as_std_path(), false)?;
                if let Some(file) = opened.file() {
                    lock(file, LockMode::Read).map_err(image::Error::from)?;
                }
                layers.push(layer_of(file, &opened)?);
                bottom = Some(Box::new(opened));
            }
            other
                if !run.is_empty()
                    && let Some(base) = VhdBase.open(file, other, true)? =>
            {
                let shown = std::fs::File::open(file.as_std_path())
                    .map_err(|error| image_files::names::io_error(error, format!("cannot open {file}")))?;
                layers.push(layer(file, &shown)?);
                bottom = Some(Box::new(Base(base)));
            }
            other => {
                return Err(Error::new(ErrorKind::Unsupported, format!("{file} has the format {other}"))
                    .advise("chains of qcow2 images on a qcow2, raw or VHD (vpc) image can be served"));
            }
        }
    }
    run.reverse();
    let reader = ReadOnly(PointReader::new(run, bottom)?);
    Ok(served(Arc::new(reader), image, "qcow2", layers))
}

fn layer_of(path: &Utf8Path, file: &ImageFile) -> Result<Layer> {
    match file.file() {
        Some(file) => layer(path, file),
        None => Err(Error::new(ErrorKind::Unsupported, format!("{path} is no file"))),
    }
}

/// A base image that another backend reads.
struct Base(Arc<dyn BaseImage>);

impl BottomReader for Base {
    fn read_at(&self, buf: &mut [u8], offset: u64) -> image::Result<()> {
        let failed = |error: Error| image::Error::new(image::ErrorKind::InvalidInput, error.to_string());
        self.0.read_at(buf, offset).map_err(failed)
    }
}

impl Readable for PointReader {
    fn size(&self) -> u64 {
        PointReader::size(self)
    }

    fn read_at(&self, buf: &mut [u8], offset: u64) -> io::Result<()> {
        PointReader::read_at(self, buf, offset).map_err(io::Error::other)
    }

    fn map(&self, offset: u64, length: u64, limit: usize) -> io::Result<Vec<Extent>> {
        let end = offset.saturating_add(length).min(PointReader::size(self));
        let pieces = self.pieces(offset, end, limit).map_err(io::Error::other)?;
        let extents = pieces.into_iter().map(|piece| Extent {
            length: piece.end - piece.start,
            content: match piece.content {
                image::Content::Zero => Content::Zero,
                image::Content::PastEnd => Content::Hole,
                // The raw image below may have data there.
                _ => Content::Data,
            },
        });
        Ok(extents.collect())
    }
}
