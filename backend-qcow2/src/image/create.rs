//! Creation of a new image: empty, or an overlay over a backing file that is not opened.
//!
//! All metadata of a new image (header, refcount table, first refcount blocks, L1 table) is written to the
//! start of a new file and made durable. The caller makes the directory durable. A crash before that leaves
//! no file, or a file that nothing refers to yet.

use std::fs::File;
use std::path::Path;

use image_files::Directory;

use super::error::{Error, ErrorKind, Result, shown};
use super::file::ImageFile;
use super::header::{
    Backing, COMPATIBLE_LAZY_REFCOUNTS, Compression, EXT_FEATURE_NAMES, Encryption, Extension, Header,
    INCOMPATIBLE_COMPRESSION, INCOMPATIBLE_EXTENDED_L2, MAX_BACKING_NAME, MAX_FORMAT_NAME, MAX_L1_BYTES,
};
use super::mapping::Geometry;
use super::units::{ClusterBits, HostOffset};

/// Properties of a new image.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct NewImage {
    /// Bytes of the guest's disk: a multiple of 512.
    pub virtual_size: u64,
    /// The cluster size.
    pub cluster_bits: ClusterBits,
    /// 2 or 3.
    pub version: u32,
    /// The backing file. The string is stored unchanged, and nothing is opened.
    pub backing: Option<Backing>,
    /// Width of refcounts: a power of two from 1 to 64. Version 2 has 16.
    pub refcount_bits: u32,
    /// L2 entries with subclusters.
    pub extended_l2: bool,
    /// Compression method of compressed clusters.
    pub compression: Compression,
    /// Lets QEMU update refcounts lazily.
    pub lazy_refcounts: bool,
    /// The file's mode.
    pub mode: u32,
}

impl NewImage {
    /// Takes the defaults of `qemu-img create`, but makes the file readable by its owner alone.
    pub fn new(virtual_size: u64) -> Self {
        Self {
            virtual_size,
            cluster_bits: ClusterBits::DEFAULT,
            version: 3,
            backing: None,
            refcount_bits: 16,
            extended_l2: false,
            compression: Compression::Deflate,
            lazy_refcounts: false,
            mode: 0o600,
        }
    }

    /// Sets the backing file.
    #[must_use]
    pub fn on(mut self, backing: Backing) -> Self {
        self.backing = Some(backing);
        self
    }

    /// Copies the format choices of another image: cluster size, version, refcounts, extended L2,
    /// compression, lazy refcounts.
    #[must_use]
    pub fn like(mut self, header: &Header) -> Self {
        self.cluster_bits = header.cluster_bits;
        self.version = header.version;
        self.refcount_bits = 1 << header.refcount_order;
        self.extended_l2 = header.has_extended_l2();
        self.compression = header.compression;
        self.lazy_refcounts = header.has_lazy_refcounts();
        self
    }
}

/// The names of all known features, for readers that do not know them (`docs/interop/qcow2.rst`).
const FEATURE_NAMES: [(u8, u8, &str); 8] = [
    (0, 0, "dirty bit"),
    (0, 1, "corrupt bit"),
    (0, 2, "external data file"),
    (0, 3, "compression type"),
    (0, 4, "extended L2 entries"),
    (1, 0, "lazy refcounts"),
    (2, 0, "bitmaps"),
    (2, 1, "raw external data"),
];

fn feature_names() -> Extension {
    let mut data = Vec::with_capacity(FEATURE_NAMES.len() * 48);
    for (kind, bit, name) in FEATURE_NAMES {
        let start = data.len();
        data.extend_from_slice(&[kind, bit]);
        data.extend_from_slice(name.as_bytes());
        data.resize(start + 48, 0);
    }
    Extension { magic: EXT_FEATURE_NAMES, data }
}

fn invalid(detail: String) -> Error {
    Error::new(ErrorKind::InvalidInput, detail)
}

/// Refuses a backing file's name or format that QEMU would refuse or truncate.
pub(crate) fn check_backing(backing: &Backing) -> Result<()> {
    if backing.file.is_empty()
        || backing.file.len() > MAX_BACKING_NAME as usize
        || backing.file.contains('\0')
    {
        return Err(invalid(format!(
            "the backing file's name (\"{}\") has {} bytes; 1 to {MAX_BACKING_NAME} without NUL may be",
            shown(backing.file.as_bytes()),
            backing.file.len()
        ))
        .advise("use a relative path, or one that is shorter"));
    }
    if let Some(format) = &backing.format
        && (format.is_empty() || format.len() > MAX_FORMAT_NAME || format.contains('\0'))
    {
        return Err(invalid(format!("\"{}\" is not a valid name of a format", shown(format.as_bytes()))));
    }
    Ok(())
}

/// Creates a new image at a path where no file is. It takes three writes and one flush, with any backing
/// file.
///
/// # Errors
/// [`ErrorKind::FileExists`]; [`ErrorKind::InvalidInput`] and [`ErrorKind::LimitExceeded`] for invalid
/// properties; the system's. After an error the file does not exist.
pub fn create(path: &Path, new: &NewImage) -> Result<()> {
    let fail = |e: Error| e.on("create", path);
    let (header, head) = plan(new).map_err(fail)?;
    let (directory, name) =
        Directory::of(path).map_err(|e| fail(Error::io("its directory does not open", e)))?;
    let file =
        directory.create_new(&name, new.mode).map_err(|e| fail(Error::io("the file cannot be made", e)))?;
    let file = ImageFile::new(Box::new(file), path, true);
    write_new(&file, &header, &head).map_err(|e| {
        // The file is ours, and nothing refers to it yet.
        let _ = directory.remove(&name);
        fail(e)
    })
}

/// Writes a new image into `file`, which is empty, new, and the caller's. `path` is for messages. It takes
/// three writes and one flush.
///
/// # Errors
/// As [`create`]. After an error the file contains a part of an image.
pub fn write_into(file: File, path: &Path, new: &NewImage) -> Result<()> {
    let fail = |e: Error| e.on("create", path);
    let (header, head) = plan(new).map_err(fail)?;
    write_new(&ImageFile::new(Box::new(file), path, true), &header, &head).map_err(fail)
}

/// Writes a new image to an empty file.
#[cfg(test)]
pub(crate) fn create_in(
    file: Box<dyn super::file::Storage>,
    path: &Path,
    new: &NewImage,
) -> Result<ImageFile> {
    let (header, head) = plan(new)?;
    let file = ImageFile::new(file, path, true);
    write_new(&file, &header, &head)?;
    Ok(file)
}

/// Returns the header, and the used bytes of the first cluster.
pub(super) fn plan(new: &NewImage) -> Result<(Header, Vec<u8>)> {
    let bits = new.cluster_bits;
    if !new.virtual_size.is_multiple_of(512) {
        return Err(invalid(format!("a disk of {} bytes is not whole sectors of 512", new.virtual_size)));
    }
    if !(new.refcount_bits.is_power_of_two() && new.refcount_bits <= 64) {
        return Err(invalid(format!(
            "refcounts of {} bits: 1, 2, 4, 8, 16, 32 and 64 may be",
            new.refcount_bits
        )));
    }
    let extras = new.refcount_bits != 16
        || new.extended_l2
        || new.compression != Compression::Deflate
        || new.lazy_refcounts;
    match new.version {
        3 => {}
        2 if !extras => {}
        2 => {
            return Err(invalid(
                "version 2 has refcounts of 16 bits, deflate, and no extended L2 entries".into(),
            ));
        }
        other => return Err(invalid(format!("version {other}: 2 and 3 may be"))),
    }
    if new.extended_l2 && bits.bits() < 14 {
        return Err(invalid(format!("extended L2 entries need clusters of 16 KiB, not {}", bits.size())));
    }
    if let Some(backing) = &new.backing {
        check_backing(backing)?;
    }
    let mut header = Header {
        version: new.version,
        cluster_bits: bits,
        virtual_size: new.virtual_size,
        encryption: Encryption::None,
        l1_entries: 0,
        l1_offset: HostOffset(0),
        reftable_offset: HostOffset(bits.size()),
        reftable_clusters: 1,
        snapshot_count: 0,
        snapshots_offset: HostOffset(0),
        incompatible: if new.extended_l2 { INCOMPATIBLE_EXTENDED_L2 } else { 0 },
        compatible: if new.lazy_refcounts { COMPATIBLE_LAZY_REFCOUNTS } else { 0 },
        autoclear: 0,
        refcount_order: new.refcount_bits.trailing_zeros(),
        compression: new.compression,
        backing: new.backing.clone(),
        extensions: if new.version == 3 { vec![feature_names()] } else { Vec::new() },
        additional: if new.version == 3 { vec![0; 8] } else { Vec::new() },
        backing_offset: 0,
        extensions_end: 0,
    };
    if new.compression == Compression::Zstd {
        header.incompatible |= INCOMPATIBLE_COMPRESSION;
        if let Some(kind) = header.additional.first_mut() {
            *kind = 1;
        }
    }
    let entries = Geometry::of(&header).l1_entries_for(new.virtual_size);
    if entries * 8 > MAX_L1_BYTES {
        return Err(Error::new(
            ErrorKind::LimitExceeded,
            format!("a disk of {} bytes is too large for clusters of {}", new.virtual_size, bits.size()),
        )
        .advise("use larger clusters"));
    }
    // QEMU always has an L1 table of at least one entry.
    header.l1_entries = entries.max(1) as u32;

    // With clusters of 512 bytes the feature names leave no space for a long backing name. They are optional.
    let name = new.backing.as_ref().map_or(&[][..], |b| b.file.as_bytes());
    let mut head = header.encode(true);
    if head.len() + name.len() > bits.bytes() {
        header.extensions.retain(|e| e.magic != EXT_FEATURE_NAMES);
        head = header.encode(true);
    }
    if head.len() + name.len() > bits.bytes() {
        return Err(invalid(format!(
            "the backing file's name of {} bytes does not fit a first cluster of {}",
            name.len(),
            bits.size()
        ))
        .advise("use larger clusters, or a shorter or relative path"));
    }
    header.extensions_end = head.len();
    if !name.is_empty() {
        header.backing_offset = head.len() as u64;
        head.extend_from_slice(name);
    }
    Ok((header, head))
}

/// Writes header, refcount table, refcount blocks and L1 table, one after the other.
fn write_new(file: &ImageFile, header: &Header, head: &[u8]) -> Result<()> {
    let bits = header.cluster_bits;
    let mut header = header.clone();
    let l1_clusters = bits.clusters_for(u64::from(header.l1_entries) * 8);
    let per_block = (bits.size() * 8) >> header.refcount_order;
    let per_table_cluster = bits.size() / 8;
    // The number of refcount blocks and table clusters that count everything, themselves included.
    let (mut blocks, mut table) = (1, 1);
    loop {
        let total = 1 + table + blocks + l1_clusters;
        let (b, t) = (total.div_ceil(per_block), total.div_ceil(per_block).div_ceil(per_table_cluster));
        if b <= blocks && t <= table {
            break;
        }
        (blocks, table) = (blocks.max(b), table.max(t));
    }
    let total = 1 + table + blocks + l1_clusters;
    header.reftable_clusters =
        u32::try_from(table).map_err(|_| invalid("the refcount table is too large".into()))?;
    let at = |cluster: u64| HostOffset(cluster << bits.bits());
    header.l1_offset = at(1 + table + blocks);

    let mut raw_table = vec![0; (table << bits.bits()) as usize];
    let mut raw_blocks = vec![0; (blocks << bits.bits()) as usize];
    for n in 0..blocks {
        if let Some(entry) = raw_table.get_mut(n as usize * 8..n as usize * 8 + 8) {
            entry.copy_from_slice(&at(1 + table + n).0.to_be_bytes());
        }
    }
    super::refcount::fill_ones(header.refcount_order, &mut raw_blocks, total as usize);
    let mut head = head.to_vec();
    header.write_fields(&mut head);
    raw_table.extend_from_slice(&raw_blocks);
    // The L1 table is all zeros, so the new length of the file is enough.
    file.set_len(total << bits.bits())?;
    file.write_at(&raw_table, at(1))?;
    file.write_at(&head, HostOffset(0))?;
    file.flush()
}
