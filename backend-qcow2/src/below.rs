//! The backing chain of a run of layers. It is opened only if a merge reads its data, which few do.

use std::collections::HashSet;

use camino::{Utf8Path, Utf8PathBuf};
use image_files::names::file_id;

use crate::backing_string::resolve_backing;
use crate::image::{ChainReader, Error, ErrorKind, Image, ImageFile, OpenOptions, Result, RunLayer, View};

/// The chain below a run.
pub(crate) struct Below {
    file: Utf8PathBuf,
    format: String,
    max_depth: u32,
    opened: Option<Chain>,
}

/// The opened layers. The bottom may be a file that is not qcow2 and is read as raw.
struct Chain {
    view: Option<View>,
    raw: Option<ImageFile>,
}

impl Below {
    /// Makes the chain whose top is `file`.
    pub(crate) fn new(file: Utf8PathBuf, format: String, max_depth: u32) -> Self {
        Self { file, format, max_depth, opened: None }
    }

    fn open(&self) -> Result<Chain> {
        let mut chain = Chain { view: None, raw: None };
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
                "raw" => chain.raw = Some(ImageFile::open(file.as_std_path(), false)?),
                other => {
                    return Err(Error::new(
                        ErrorKind::Unsupported,
                        format!("its format is stated as {other:?}"),
                    )
                    .advise("data can be merged on top of qcow2 and raw images: convert that one first")
                    .on("read", file.as_std_path()));
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
            Some(Chain { view: Some(view), raw: Some(raw) }) => view.read_at(buf, offset, Some(raw)),
            Some(Chain { view: Some(view), raw: None }) => view.read_at(buf, offset, None),
            Some(Chain { view: None, raw: Some(raw) }) => ChainReader::read_at(raw, buf, offset),
            Some(Chain { view: None, raw: None }) | None => {
                buf.fill(0);
                Ok(())
            }
        }
    }
}
