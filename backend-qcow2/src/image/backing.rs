//! Changing the backing file that an image names.
//!
//! Name and format lie in the first cluster: the format in a header extension behind the header, the name at
//! the offset that the header gives. Only a sector is written atomically. So the order is:
//!
//! 1. Write what the new header needs outside of the first sector, to places that the old header does not
//!    use; flush.
//! 2. Write the first sector, which switches to it; flush.
//!
//! A crash before 2 leaves the old backing file, a crash after it the new one. At each point the image names
//! one of the two with the format that belongs to it.
//!
//! The extensions outside of the first sector might have to change in place. In that case the feature name
//! table is left out: it is optional and only serves messages. All other extensions then fit the first
//! sector.

use super::create::check_backing;
use super::error::{Context, Error, ErrorKind, Result};
use super::header::{AUTOCLEAR_RAW_EXTERNAL, Backing, EXT_FEATURE_NAMES, Header, SECTOR};
use super::open::Image;
use super::units::HostOffset;

/// Bytes of the first cluster that a header uses.
struct Used {
    extensions_end: usize,
    name: std::ops::Range<usize>,
}

impl Used {
    fn of(header: &Header) -> Self {
        let from = header.backing_offset as usize;
        let length = header.backing.as_ref().map_or(0, |b| b.file.len());
        Self { extensions_end: header.extensions_end, name: from..from + length }
    }

    fn overlaps(&self, range: &std::ops::Range<usize>) -> bool {
        let name = !self.name.is_empty() && range.start < self.name.end && self.name.start < range.end;
        !range.is_empty() && (range.start < self.extensions_end || name)
    }
}

impl Image {
    /// Gives the image another backing file, or none. Only the stored name changes. The caller must ensure
    /// that the image still reads the same where it has no data of its own. The backing file is not opened.
    ///
    /// Order: the module's.
    ///
    /// # Errors
    /// [`ErrorKind::InvalidInput`] for an invalid name, or one that does not fit the first cluster;
    /// [`ErrorKind::Unsupported`] for an image whose external data file is a raw disk; the system's.
    pub fn set_backing(&mut self, backing: Option<Backing>) -> Result<()> {
        if let Some(b) = &backing {
            check_backing(b).context("set the backing file of", self.path())?;
            if self.header.autoclear & AUTOCLEAR_RAW_EXTERNAL != 0 {
                return Err(Error::new(
                    ErrorKind::Unsupported,
                    "the image's external data file is a raw disk, which can have no backing file",
                )
                .on("set the backing file of", self.path()));
            }
        }
        if backing == self.header.backing {
            return Ok(());
        }
        let size = self.virtual_size();
        let check = |image: &mut Self| image.plan_head(backing.as_ref(), size).map(|_| ());
        self.checked("set the backing file of", check, |image| image.switch_to(backing.as_ref(), size))
    }

    /// Checks everything that [`Image::set_backing`] would touch, without a write.
    ///
    /// # Errors
    /// As [`Image::set_backing`].
    pub fn could_set_backing(&mut self, backing: &Backing) -> Result<()> {
        let size = self.virtual_size();
        self.rehearse("set the backing file of", |image| image.plan_head(Some(backing), size).map(|_| ()))
    }

    /// Returns the header with which the image has `backing` as its backing file and `size` bytes. Nothing is
    /// written.
    ///
    /// # Errors
    /// [`ErrorKind::InvalidInput`] for an invalid name, or one that does not fit.
    pub(super) fn plan_head(&self, backing: Option<&Backing>, size: u64) -> Result<Header> {
        if let Some(b) = backing {
            check_backing(b)?;
        }
        let mut target = self.header.clone();
        target.virtual_size = size;
        if self.header.backing.as_ref() == backing {
            return Ok(target);
        }
        target.backing = backing.cloned();
        if !self.place(&mut target)? {
            target.extensions.retain(|e| e.magic != EXT_FEATURE_NAMES);
            if !self.place(&mut target)? {
                return Err(no_room());
            }
        }
        Ok(target)
    }

    /// Switches backing file and size at once, in the module's order. The caller has made durable what both
    /// depend on.
    pub(super) fn switch_to(&mut self, backing: Option<&Backing>, size: u64) -> Result<()> {
        if self.header.backing.as_ref() != backing {
            let target = self.plan_head(backing, size)?;
            return self.switch_head(target);
        }
        if self.header.virtual_size != size {
            self.header.virtual_size = size;
            self.write_header_sector()?;
            self.file.flush()?;
        }
        Ok(())
    }

    /// Finds a place for the name in `target`. Returns `false` if there is none, or if extensions would
    /// change in place.
    fn place(&self, target: &mut Header) -> Result<bool> {
        let size = self.header.cluster_bits.bytes();
        let old = Used::of(&self.header);
        let end = target.encode(true).len();
        let length = target.backing.as_ref().map_or(0, |b| b.file.len());
        if end + length > size {
            return Ok(false);
        }
        let spill = SECTOR.min(end)..end;
        if old.overlaps(&spill) && self.tail_differs(target, &spill)? {
            return Ok(false);
        }
        let fits = |at: &usize| {
            let outside = (*at).max(SECTOR)..(at + length).max(SECTOR);
            *at >= end && at + length <= size && !old.overlaps(&outside)
        };
        let behind = old.name.end.max(old.extensions_end).max(end);
        let Some(at) = [end, behind, size - length].into_iter().find(fits) else { return Ok(false) };
        target.extensions_end = end;
        target.backing_offset = if length == 0 { 0 } else { at as u64 };
        Ok(true)
    }

    /// Returns true if the extensions behind the first sector would change.
    fn tail_differs(&self, target: &Header, spill: &std::ops::Range<usize>) -> Result<bool> {
        let mut now = vec![0; spill.len()];
        self.file.read_at(&mut now, HostOffset(spill.start as u64))?;
        Ok(target.encode(true).get(spill.clone()) != Some(&now[..]))
    }

    /// Switches to `header`, in the module's order.
    fn switch_head(&mut self, header: Header) -> Result<()> {
        let size = self.header.cluster_bits.bytes();
        let mut head = vec![
            0;
            size.min(
                header.extensions_end.max(header.backing_offset as usize + 1024).next_multiple_of(SECTOR)
            )
        ];
        self.file.read_at(&mut head, HostOffset(0))?;
        let before = head.clone();
        let area = header.encode(true);
        if let Some(at) = head.get_mut(..area.len()) {
            at.copy_from_slice(&area);
        }
        if let Some(b) = &header.backing {
            let from = header.backing_offset as usize;
            if let Some(at) = head.get_mut(from..from + b.file.len()) {
                at.copy_from_slice(b.file.as_bytes());
            }
        }
        header.write_fields(&mut head);
        // 1) What the new header needs outside of the first sector. The old header does not use these bytes,
        //    so a crash
        //    here leaves the old backing file, whole.
        let rest = SECTOR.min(head.len());
        if head.get(rest..) != before.get(rest..) {
            self.file.write_at(head.get(rest..).unwrap_or_default(), HostOffset(rest as u64))?;
            self.file.flush()?;
        }
        // 2) The first sector. It is written whole or not at all, and everything that it refers to is
        //    durable.
        if let Some(first) = head.get(..SECTOR) {
            self.sector.copy_from_slice(first);
        }
        self.file.write_at(&self.sector, HostOffset(0))?;
        self.file.flush()?;
        self.header = header;
        Ok(())
    }
}

fn no_room() -> Error {
    Error::new(
        ErrorKind::InvalidInput,
        "the first cluster has no room for the new backing file's name beside the old one and the header extensions",
    )
    .advise("use a shorter or relative path, or convert the image to larger clusters")
}
