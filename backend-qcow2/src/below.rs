//! The backing chain of a run of layers. It is opened only if a merge reads its data, which few do.

use std::collections::HashSet;
use std::sync::Arc;

use camino::{Utf8Path, Utf8PathBuf};
use image_files::names::file_id;
use image_files::{BaseImage, Bases};

use crate::backing_string::resolve_backing;
use crate::image::{ChainReader, Error, ErrorKind, Image, ImageFile, OpenOptions, Result, RunLayer, View};

/// The chain below a run.
pub(crate) struct Below {
    file: Utf8PathBuf,
    format: String,
    max_depth: u32,
    bases: Bases,
    opened: Option<Chain>,
}

/// The opened layers. The bottom may be a base image of another format.
struct Chain {
    view: Option<View>,
    base: Option<Box<dyn ChainReader + Send>>,
}

/// A base image that another crate reads.
pub(crate) struct Base(pub(crate) Arc<dyn BaseImage>);

impl ChainReader for Base {
    fn read_at(&mut self, buf: &mut [u8], offset: u64) -> Result<()> {
        let failed = |error: snapcore::Error| Error::new(ErrorKind::InvalidInput, error.to_string());
        self.0.read_at(buf, offset).map_err(failed)
    }
}

impl Below {
    /// Makes the chain whose top is `file`.
    pub(crate) fn new(file: Utf8PathBuf, format: String, max_depth: u32, bases: Bases) -> Self {
        Self { file, format, max_depth, bases, opened: None }
    }

    fn open(&self) -> Result<Chain> {
        let mut chain = Chain { view: None, base: None };
        let mut layers = Vec::new();
        let mut seen = HashSet::new();
        let mut next = Some((self.file.clone(), self.format.clone()));
        while let Some((file, format)) = next.take() {
            let id = file_id(&file).map_err(|error| unusable(&file, &error))?;
            if !seen.insert(id) || seen.len() > self.max_depth as usize {
                return Err(Error::corrupt("the chain under it is a loop, or deeper than the limit")
                    .on("read", self.file.as_std_path()));
            }
            match format.as_str() {
                "qcow2" => {
                    let image = Image::open(file.as_std_path(), &OpenOptions::read_only().unlocked())?;
                    layers.push(RunLayer::active(&image)?);
                    if let Some(backing) = &image.header().backing {
                        let below = resolve_backing(&file, &backing.file).map_err(|e| unusable(&file, &e))?;
                        next = Some((below, backing.format.clone().unwrap_or_default()));
                    }
                }
                "raw" => chain.base = Some(Box::new(ImageFile::open(file.as_std_path(), false)?)),
                other => {
                    let base =
                        self.bases.open(&file, other, false).map_err(|error| unusable(&file, &error))?;
                    let Some(base) = base else {
                        return Err(Error::new(
                            ErrorKind::Unsupported,
                            format!("its format is stated as {other:?}"),
                        )
                        .advise("data can be merged on top of qcow2, raw and VHD (vpc) images: convert that one first")
                        .on("read", file.as_std_path()));
                    };
                    chain.base = Some(Box::new(Base(base)));
                }
            }
        }
        layers.reverse();
        if !layers.is_empty() {
            chain.view = Some(View::new(layers)?);
        }
        Ok(chain)
    }
}

fn unusable(file: &Utf8Path, error: &snapcore::Error) -> Error {
    Error::new(ErrorKind::InvalidInput, error.to_string()).on("read", file.as_std_path())
}

impl ChainReader for Below {
    fn read_at(&mut self, buf: &mut [u8], offset: u64) -> Result<()> {
        if self.opened.is_none() {
            self.opened = Some(self.open()?);
        }
        match &mut self.opened {
            Some(Chain { view: Some(view), base: Some(base) }) => {
                view.read_at(buf, offset, Some(&mut **base))
            }
            Some(Chain { view: Some(view), base: None }) => view.read_at(buf, offset, None),
            Some(Chain { view: None, base: Some(base) }) => base.read_at(buf, offset),
            Some(Chain { view: None, base: None }) | None => {
                buf.fill(0);
                Ok(())
            }
        }
    }
}
