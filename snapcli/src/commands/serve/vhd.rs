//! VHD images and chains of them, read and written.

use std::io;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};

use backend_vhd::image::{self, Moving, NewImage, UniqueId, Vhd};
use backend_vhd::{
    ServedChain, ServedChild, ServedMerge, ServedOptions, notes_of, parent_name_for, write_child,
};
use camino::{Utf8Path, Utf8PathBuf};
use nbd_server::{
    Content, ErrorKind as Kind, Extent, Format, Image, Layer, MergeRequest, MergeWatch, Merging, Prepared,
    Served, Zeroing,
};
use snapcore::{Error, ErrorKind, Result};

use super::{layer, of_backend, served};
use crate::args::Global;
use crate::backends::absolute;

/// Opens VHD chains, for the command and for its control socket.
#[derive(Clone)]
pub struct VhdFormat {
    options: ServedOptions,
    /// The chain that is served. Its locks are shared with the next one.
    current: Arc<Mutex<Option<Arc<ServedChain>>>>,
}

impl VhdFormat {
    /// The format with the user's limits.
    pub fn new(global: &Global, read_only: bool) -> Result<Self> {
        let allowed = global.allow_backing.iter().map(|directory| absolute(directory).map(PathBuf::from));
        let user = rustix::process::geteuid().as_raw();
        let notes = notes_of(user);
        let options = ServedOptions { allowed: allowed.collect::<Result<_>>()?, writable: !read_only, notes };
        Ok(Self { options, current: Arc::default() })
    }

    /// Opens the chain whose top is at `path`.
    pub fn open_chain(&self, path: &Utf8Path) -> Result<Served> {
        let current = self.current();
        self.serve(path, ServedChain::open(path.as_std_path(), &self.options, current.as_deref())?)
    }

    /// Makes a chain the one that is served.
    fn serve(&self, path: &Utf8Path, chain: ServedChain) -> Result<Served> {
        let mut layers = Vec::new();
        for file in chain.files() {
            let shown = Utf8Path::from_path(file.path())
                .ok_or_else(|| Error::new(ErrorKind::Unsupported, "a layer's path is not UTF-8"))?;
            if let Some(opened) = file.file() {
                layers.push(layer(shown, opened)?);
            }
        }
        Ok(self.become_current(path, chain, layers))
    }

    fn become_current(&self, path: &Utf8Path, chain: ServedChain, layers: Vec<Layer>) -> Served {
        let chain = Arc::new(chain);
        *self.current.lock().unwrap_or_else(PoisonError::into_inner) = Some(Arc::clone(&chain));
        served(Arc::new(VhdImage(chain)), path, "vhd", layers)
    }

    fn current(&self) -> Option<Arc<ServedChain>> {
        self.current.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Opens, locks and checks `image`, if it is a child of the image that is served.
    fn prepared(&self, image: &Utf8Path) -> Result<Option<VhdChild>> {
        let Some(chain) = self.current() else { return Ok(None) };
        let Some(child) = chain.prepare_child(image.as_std_path(), &self.options)? else { return Ok(None) };
        let mut layers = Vec::new();
        for (path, file) in child.files_on(&chain) {
            let shown = Utf8Path::from_path(path)
                .ok_or_else(|| Error::new(ErrorKind::Unsupported, "a layer's path is not UTF-8"))?;
            if let Some(opened) = file.file() {
                layers.push(layer(shown, opened)?);
            }
        }
        Ok(Some(VhdChild { format: self.clone(), path: image.to_owned(), child, layers }))
    }

    /// Creates `child` on the image that is served, unless it exists.
    fn child_of(&self, current: &Served, child: &Utf8Path, id: &str) -> Result<VhdChild> {
        let parent = current.layers.first().map_or(current.path.as_path(), |top| top.file.as_path());
        let parent_id = self.current().and_then(|own| own.id()).ok_or_else(|| {
            Error::new(ErrorKind::Unsupported, format!("{parent} is no VHD that can be a parent"))
        })?;
        if parent.parent() != child.parent() {
            return Err(Error::new(
                ErrorKind::Refused,
                format!("{child} is not in the directory of its parent, {parent}"),
            ));
        }
        let wanted = unique_id(id)?;
        if !child.exists() {
            let parent_name = parent_name_for(child, parent)?;
            write_child(child, parent, &NewImage::new(current.image.size()).id(wanted).on(parent_name))?;
        }
        let found = Vhd::open(child.as_std_path(), &image::OpenOptions::read_only().unlocked())?;
        if (found.id(), found.parent_id()) != (wanted, Some(parent_id)) {
            return Err(Error::new(
                ErrorKind::Refused,
                format!(
                    "{child} exists, with the id {} and the parent {}; expected {wanted} and {parent_id}",
                    found.id(),
                    found.parent_id().map_or_else(|| "none".to_owned(), |id| id.to_string())
                ),
            ));
        }
        self.prepared(child)?.ok_or_else(|| {
            Error::new(
                ErrorKind::Refused,
                format!("{child} does not lead to {parent}, its parent, or is too small"),
            )
        })
    }
}

/// A child that is ready to be served.
struct VhdChild {
    format: VhdFormat,
    path: Utf8PathBuf,
    child: ServedChild,
    /// The files of its chain, which nothing can change before the exchange.
    layers: Vec<Layer>,
}

impl Prepared for VhdChild {
    fn serve(self: Box<Self>) -> nbd_server::Result<Served> {
        let Self { format, path, child, layers } = *self;
        let gone = || nbd_server::Error::new(Kind::Refused, "no chain of VHDs is served");
        let chain = format.current().ok_or_else(gone)?;
        let next = chain.put_on(child).map_err(|error| of_backend(&error.into()))?;
        Ok(format.become_current(&path, next, layers))
    }
}

/// Reads a unique id: 32 hexadecimal digits, with or without hyphens.
fn unique_id(text: &str) -> Result<UniqueId> {
    let digits: String = text.chars().filter(|c| *c != '-').collect();
    match u128::from_str_radix(&digits, 16) {
        Ok(id) if digits.len() == 32 && id != 0 && digits.bytes().all(|b| b.is_ascii_hexdigit()) => {
            Ok(UniqueId(id.to_be_bytes()))
        }
        _ => Err(Error::new(ErrorKind::Usage, format!("{text:?} is not the unique id of an image"))),
    }
}

impl Format for VhdFormat {
    fn open(&self, image: &Utf8Path) -> nbd_server::Result<Served> {
        self.open_chain(image).map_err(|error| of_backend(&error))
    }

    fn close(&self) {
        *self.current.lock().unwrap_or_else(PoisonError::into_inner) = None;
    }

    fn prepare(&self, _: &Served, image: &Utf8Path) -> nbd_server::Result<Option<Box<dyn Prepared>>> {
        let child = self.prepared(image).map_err(|error| of_backend(&error))?;
        Ok(child.map(|child| Box::new(child) as Box<dyn Prepared>))
    }

    fn prepare_child(
        &self,
        current: &Served,
        child: &Utf8Path,
        id: &str,
    ) -> nbd_server::Result<Box<dyn Prepared>> {
        if current.image.is_read_only() {
            let message = format!("{} is served read-only", current.path);
            return Err(nbd_server::Error::new(Kind::Refused, message));
        }
        let child = self.child_of(current, child, id).map_err(|error| of_backend(&error))?;
        Ok(Box::new(child))
    }

    fn merge(&self, current: &Served, request: &MergeRequest) -> nbd_server::Result<Box<dyn Merging>> {
        let chain = self.current().ok_or_else(|| {
            nbd_server::Error::new(Kind::Refused, format!("{} is not a chain of VHDs", current.path))
        })?;
        let run: Vec<PathBuf> = request.run.iter().map(PathBuf::from).collect();
        let merge = ServedMerge::new(&chain, &self.options, &run, request.into.as_std_path());
        let merge = merge.map_err(|error| of_backend(&error))?;
        Ok(Box::new(VhdMerge { format: self.clone(), merge }))
    }
}

/// Layers of the chain on their way to become one.
struct VhdMerge {
    format: VhdFormat,
    merge: ServedMerge,
}

impl Merging for VhdMerge {
    fn run(&mut self, watch: &MergeWatch) -> nbd_server::Result<()> {
        let moving = Moving { progress: &|bytes| watch.moved(bytes), cancelled: &|| watch.is_cancelled() };
        self.merge.run(&|total| watch.expect(total), &moving).map_err(|error| of_backend(&error))
    }

    fn pivots(&self) -> bool {
        self.merge.pivots()
    }

    fn finish(&mut self) -> nbd_server::Result<Served> {
        let chain = self.merge.finish().map_err(|error| of_backend(&error))?;
        let top =
            chain.files().first().and_then(|file| Utf8Path::from_path(file.path()).map(ToOwned::to_owned));
        self.format.serve(&top.unwrap_or_default(), chain).map_err(|error| of_backend(&error))
    }
}

/// A chain as an image.
struct VhdImage(Arc<ServedChain>);

/// Keeps the kind of the system's error: the client distinguishes "no space".
fn of_engine(error: image::Error) -> io::Error {
    let kind = match error.kind() {
        image::ErrorKind::NoSpace => io::ErrorKind::StorageFull,
        image::ErrorKind::ReadOnly => io::ErrorKind::ReadOnlyFilesystem,
        _ => io::ErrorKind::Other,
    };
    io::Error::new(kind, error)
}

impl Image for VhdImage {
    fn size(&self) -> u64 {
        self.0.size()
    }

    fn alignment(&self) -> u32 {
        // A bit stands for a sector. An odd size has parts of sectors, and is only read.
        if self.0.size().is_multiple_of(image::SECTOR) { image::SECTOR as u32 } else { 1 }
    }

    fn is_read_only(&self) -> bool {
        !self.0.is_writable()
    }

    fn read_at(&self, buf: &mut [u8], offset: u64) -> io::Result<()> {
        self.0.read_at(buf, offset).map_err(of_engine)
    }

    fn write_at(&self, buf: &[u8], offset: u64) -> io::Result<()> {
        self.0.write_at(buf, offset).map_err(of_engine)
    }

    fn zero(&self, offset: u64, length: u64, how: Zeroing) -> io::Result<()> {
        // Zeros of a stored block are written where the file system does not make them.
        if how.fast_only {
            return Err(io::ErrorKind::Unsupported.into());
        }
        self.0.zero(offset, length).map_err(of_engine)
    }

    fn trim(&self, offset: u64, length: u64) -> io::Result<()> {
        self.0.trim(offset, length).map_err(of_engine)
    }

    fn flush(&self) -> io::Result<()> {
        self.0.flush().map_err(of_engine)
    }

    fn map(&self, offset: u64, length: u64, limit: usize) -> io::Result<Vec<Extent>> {
        let end = offset.saturating_add(length).min(self.0.size());
        let pieces = self.0.pieces(offset, end, limit).map_err(of_engine)?;
        let content = |data| if data { Content::Data } else { Content::Hole };
        let extents = pieces
            .into_iter()
            .map(|piece| Extent { length: piece.end - piece.start, content: content(piece.data.is_some()) });
        Ok(extents.collect())
    }
}
