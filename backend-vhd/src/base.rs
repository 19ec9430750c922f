//! VHDs as base images of qcow2 chains, as QEMU reads them: a fixed one as `raw`, a dynamic one by its driver
//! `vpc`.
//!
//! | image | the overlay states | QEMU shows |
//! |---|---|---|
//! | fixed | `raw` | the bytes of the disk; the footer behind them is past the overlay's end |
//! | dynamic, at an end of a chain | `vpc` | whole blocks: it does not look at their bitmaps |
//! | differencing | none | zeros in place of the parent's data: refused |

use std::sync::{Arc, Mutex, PoisonError};

use camino::Utf8Path;
use image_files::{BaseFormat, BaseImage, size_at};
use snapcore::backend::Finding;
use snapcore::{Error, ErrorKind, Result};

use crate::backend::of_engine;
use crate::image::{Chain, Context, DiskType, FooterPlace, Layer, OpenOptions, SECTOR, Severity, Vhd};

/// QEMU's name of the format.
pub(crate) const VPC: &str = "vpc";

/// Reads VHDs under qcow2 overlays.
#[derive(Debug, Clone, Copy, Default)]
pub struct VhdBase;

impl BaseFormat for VhdBase {
    fn size(&self, file: &Utf8Path, format: &str, above: &[u64]) -> Result<Option<u64>> {
        match format {
            VPC => Ok(Some(size_in_qemu(&opened(file, false)?)?)),
            "raw" => fixed_size(file, above),
            _ => Ok(None),
        }
    }

    fn open(&self, file: &Utf8Path, format: &str, locked: bool) -> Result<Option<Arc<dyn BaseImage>>> {
        if format != VPC {
            return Ok(None);
        }
        let image = opened(file, locked)?;
        let size = size_in_qemu(&image)?;
        let image = Layer::Vhd(Box::new(image.by_blocks()));
        Ok(Some(Arc::new(OpenBase { size, chain: Mutex::new(Chain::new(vec![image])?) })))
    }

    fn check(&self, file: &Utf8Path, format: &str, above: &[u64]) -> Result<Vec<Finding>> {
        let is_vhd = format == VPC || (format == "raw" && fixed_size(file, above)?.is_some());
        if !is_vhd {
            return Ok(Vec::new());
        }
        let mut image = opened(file, false)?;
        Ok(image.check(false)?.into_iter().map(|finding| of_engine(file, finding)).collect())
    }
}

/// A dynamic VHD. It is read by one thread at a time: its table and bitmaps are read when they are needed.
struct OpenBase {
    size: u64,
    chain: Mutex<Chain>,
}

impl BaseImage for OpenBase {
    fn size(&self) -> u64 {
        self.size
    }

    fn read_at(&self, buf: &mut [u8], offset: u64) -> Result<()> {
        let mut chain = self.chain.lock().unwrap_or_else(PoisonError::into_inner);
        let end = self.size.min(chain.size());
        let inside = end.saturating_sub(offset).min(buf.len() as u64) as usize;
        let (data, past) = buf.split_at_mut(inside);
        past.fill(0);
        if data.is_empty() {
            return Ok(());
        }
        Ok(chain.read_at(data, offset)?)
    }
}

fn opened(file: &Utf8Path, locked: bool) -> Result<Vhd> {
    let options = OpenOptions::read_only();
    let options = if locked { options } else { options.unlocked() };
    Ok(Vhd::open(file.as_std_path(), &options)?)
}

/// Returns the bytes that a dynamic or fixed image shows by QEMU's driver `vpc`.
///
/// # Errors
/// [`ErrorKind::Refused`] if that is not what the image holds, or if QEMUs of different versions show
/// different disks.
pub(crate) fn size_in_qemu(image: &Vhd) -> Result<u64> {
    let file = image.path().display();
    let refused = |why: String| {
        Error::new(ErrorKind::Refused, format!("{file}: {why}")).state("no changes made").advise(format!(
            "serve it to QEMU instead (`domsnap disk serve {file},format=vhd --socket SOCKET`), or copy it with `domsnap \
             disk materialise`"
        ))
    };
    if image.disk_type() == DiskType::Differencing {
        return Err(refused(
            "it is a child of another VHD, and QEMU's driver vpc does not know parents: it reads zeros where only the \
             parent has data"
                .to_owned(),
        ));
    }
    if image.severity() == Some(Severity::Error) {
        let text: Vec<String> = image.findings().iter().map(ToString::to_string).collect();
        return Err(refused(text.join("; ")));
    }
    image.footer().size_in_qemu().filter(|size| *size > 0 && size % SECTOR == 0).ok_or_else(|| {
        refused(format!(
            "it was made by {:?}, and its geometry is another size than its {} bytes: some versions of QEMU go by the one, \
             and some by the other",
            image.footer().creator(),
            image.size()
        ))
    })
}

/// Returns the bytes of the disk of a fixed VHD that is a `raw` base, or nothing if the file is no such one.
///
/// The last sector of a raw disk is the guest's, who can write a footer there. So the sizes of the layers on
/// it decide: an overlay on a fixed VHD ends before the footer.
fn fixed_size(file: &Utf8Path, above: &[u64]) -> Result<Option<u64>> {
    let length = size_at(file)
        .map_err(|error| image_files::names::io_error(error, format!("cannot look at {file}")))?;
    if above.is_empty() || above.contains(&length) || !file.is_file() {
        return Ok(None);
    }
    let Ok(image) = opened(file, false) else { return Ok(None) };
    let is_fixed = image.disk_type() == DiskType::Fixed && image.footer_place() == FooterPlace::End;
    // Overlays that were resized are larger than what they are on.
    let fits = above.contains(&image.size()) || above.iter().all(|size| *size > length);
    Ok((is_fixed && fits && image.size().checked_add(SECTOR) == Some(length)).then(|| image.size()))
}

/// Returns the format that a qcow2 overlay on the image states, and the size of the disk that QEMU shows.
///
/// # Errors
/// [`ErrorKind::Refused`] for an image that QEMU does not show as it is; [`ErrorKind::Corrupt`] for one that
/// must not be frozen; the system's.
pub(crate) fn as_base(file: &Utf8Path) -> Result<(&'static str, u64)> {
    let mut image = opened(file, false)?;
    image.require_sound().context("use", file.as_std_path())?;
    // The geometry says nothing of a fixed one: its overlay states raw.
    if image.disk_type() != DiskType::Fixed {
        return Ok((VPC, size_in_qemu(&image)?));
    }
    let length = size_at(file)
        .map_err(|error| image_files::names::io_error(error, format!("cannot look at {file}")))?;
    if image.size().checked_add(SECTOR) != Some(length) {
        return Err(Error::new(
            ErrorKind::Refused,
            format!(
                "{file} has {length} bytes, and a disk of {}: no overlay would end where it does",
                image.size()
            ),
        )
        .state("no changes made")
        .advise("copy it with `domsnap disk materialise --format vhd-fixed`, and use the copy"));
    }
    Ok(("raw", image.size()))
}
