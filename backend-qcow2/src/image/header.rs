//! The image header: parsed once, checked, and written back field by field.
//!
//! All of it lies in the first cluster: the header proper, the header extensions, and the backing file's
//! name. The fields that an operation switches (L1, refcount table, snapshot table, size, feature bits) lie
//! in the first 112 bytes, so in one sector of 512. The write of that sector is atomic: it makes an operation
//! take effect, whole or not at all.

use zerocopy::{FromBytes, IntoBytes};

use super::error::{Error, ErrorKind, Result, shown};
use super::file::ImageFile;
use super::layout::{
    MAGIC, RawBitmapsExtension, RawCryptoPointer, RawExtension, RawHeaderV2, RawHeaderV3, V2_LENGTH,
    V3_LENGTH,
};
use super::mapping::Geometry;
use super::units::{ClusterBits, HostOffset};

/// QEMU's `QCOW_MAX_L1_SIZE`: bytes of an L1 table.
pub const MAX_L1_BYTES: u64 = 32 << 20;
/// QEMU's `QCOW_MAX_REFTABLE_SIZE`: bytes of a refcount table.
pub const MAX_REFTABLE_BYTES: u64 = 8 << 20;
/// QEMU's `QCOW_MAX_SNAPSHOTS`.
pub const MAX_SNAPSHOTS: u32 = 65536;
/// The specification's limit for a backing file's name, in bytes.
pub const MAX_BACKING_NAME: u32 = 1023;
/// QEMU's buffer for a format name has 15 bytes; longer ones are refused.
pub const MAX_FORMAT_NAME: usize = 15;
/// The largest unit that every disk writes atomically.
pub const SECTOR: usize = 512;

/// Incompatible feature: refcounts may be out of date.
pub const INCOMPATIBLE_DIRTY: u64 = 1;
/// Incompatible feature: any structure may be corrupt.
pub const INCOMPATIBLE_CORRUPT: u64 = 1 << 1;
/// Incompatible feature: guest data is in another file.
pub const INCOMPATIBLE_DATA_FILE: u64 = 1 << 2;
/// Incompatible feature: compressed clusters are not deflate.
pub const INCOMPATIBLE_COMPRESSION: u64 = 1 << 3;
/// Incompatible feature: L2 entries have subcluster bitmaps.
pub const INCOMPATIBLE_EXTENDED_L2: u64 = 1 << 4;
const INCOMPATIBLE_KNOWN: u64 = (1 << 5) - 1;
/// Autoclear feature: the bitmaps extension is consistent.
pub const AUTOCLEAR_BITMAPS: u64 = 1;
/// Autoclear feature: the external data file is a valid raw image.
pub const AUTOCLEAR_RAW_EXTERNAL: u64 = 1 << 1;
/// The autoclear features that this engine maintains. All others are cleared at the first write.
pub const AUTOCLEAR_KNOWN: u64 = AUTOCLEAR_BITMAPS | AUTOCLEAR_RAW_EXTERNAL;
/// Compatible feature: refcounts may be updated lazily.
pub const COMPATIBLE_LAZY_REFCOUNTS: u64 = 1;

/// Header extension: end of the extensions.
const EXT_END: u32 = 0;
/// Header extension: backing file format.
const EXT_BACKING_FORMAT: u32 = 0xe279_2aca;
/// Header extension: feature name table.
pub(crate) const EXT_FEATURE_NAMES: u32 = 0x6803_f857;
/// Header extension: persistent bitmaps.
pub(crate) const EXT_BITMAPS: u32 = 0x2385_2875;
/// Header extension: full disk encryption header pointer.
pub(crate) const EXT_CRYPTO: u32 = 0x0537_be77;
/// Header extension: external data file name.
const EXT_DATA_FILE: u32 = 0x4441_5441;
/// Bytes of an entry of the feature name table.
const FEATURE_NAME_ENTRY: usize = 48;

/// Encryption of guest data.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[non_exhaustive]
pub enum Encryption {
    /// No encryption.
    None,
    /// QEMU's legacy AES.
    Aes,
    /// LUKS.
    Luks,
}

/// Compression method of compressed clusters.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
#[non_exhaustive]
pub enum Compression {
    /// Raw deflate; QEMU calls it zlib.
    #[default]
    Deflate,
    /// Zstandard.
    Zstd,
}

/// The backing file of an image.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Backing {
    /// The file name as the image states it: absolute, or relative to the image's directory.
    pub file: String,
    /// The format that the image states. `None` if it states none; it must not be guessed then.
    pub format: Option<String>,
}

/// A header extension, as found.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Extension {
    /// Its type.
    pub magic: u32,
    /// Its data without padding.
    pub data: Vec<u8>,
}

/// The bitmaps extension's content.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct BitmapsPointer {
    /// Bitmaps in the directory.
    pub count: u32,
    /// Bytes of the directory.
    pub directory_size: u64,
    /// Offset of the directory.
    pub directory_offset: HostOffset,
}

/// A checked header.
#[derive(Clone, PartialEq, Eq, Debug)]
#[non_exhaustive]
pub struct Header {
    /// 2 or 3.
    pub version: u32,
    /// The cluster size.
    pub cluster_bits: ClusterBits,
    /// Bytes of the guest's disk.
    pub virtual_size: u64,
    /// Encryption of the data.
    pub encryption: Encryption,
    /// Entries of the active L1 table.
    pub l1_entries: u32,
    /// Offset of the active L1 table.
    pub l1_offset: HostOffset,
    /// Offset of the refcount table.
    pub reftable_offset: HostOffset,
    /// Clusters of the refcount table.
    pub reftable_clusters: u32,
    /// Snapshots in the image.
    pub snapshot_count: u32,
    /// Offset of the snapshot table; 0 without snapshots.
    pub snapshots_offset: HostOffset,
    /// Incompatible feature bits.
    pub incompatible: u64,
    /// Compatible feature bits.
    pub compatible: u64,
    /// Autoclear feature bits.
    pub autoclear: u64,
    /// Refcounts are `1 << refcount_order` bits wide.
    pub refcount_order: u32,
    /// Compression method of compressed clusters.
    pub compression: Compression,
    /// The backing file.
    pub backing: Option<Backing>,
    /// All extensions but the backing format, in their order, byte for byte.
    pub extensions: Vec<Extension>,
    /// Bytes 104 to the header's end as found (version 3), including the compression type.
    pub(crate) additional: Vec<u8>,
    /// Offset of the backing file's name in the first cluster.
    pub(crate) backing_offset: u64,
    /// First byte after the end marker of the extensions.
    pub(crate) extensions_end: usize,
}

/// Summary of the header alone, for scans of directories. No lock is needed and no table is read.
#[derive(Clone, PartialEq, Eq, Debug)]
#[non_exhaustive]
pub struct HeaderSummary {
    /// 2 or 3.
    pub version: u32,
    /// Bytes of the guest's disk.
    pub virtual_size: u64,
    /// The cluster size.
    pub cluster_bits: ClusterBits,
    /// Snapshots in the image.
    pub snapshot_count: u32,
    /// The backing file.
    pub backing: Option<Backing>,
    /// Encryption of the data.
    pub encryption: Encryption,
    /// The external data file's name, if the image uses one.
    pub data_file: Option<String>,
    /// True if the refcounts are marked as out of date.
    pub dirty: bool,
    /// True if the image is marked as corrupt.
    pub corrupt: bool,
}

/// Reasons for a header that does not parse.
enum Failure {
    /// The input is too short; with this many bytes the header may parse.
    Short(usize),
    Bad(Error),
}

impl From<Error> for Failure {
    fn from(e: Error) -> Self {
        Self::Bad(e)
    }
}

fn unsupported(detail: String) -> Error {
    Error::new(ErrorKind::Unsupported, detail)
}

impl Header {
    /// Parses the first bytes of an image. `head` is the first cluster, or the part of it that matters.
    ///
    /// # Errors
    /// [`ErrorKind::WrongFormat`] without the magic. [`ErrorKind::Unsupported`] for other versions, and for
    /// incompatible features that this engine does not know; the message uses their names where the image
    /// states them. [`ErrorKind::Corrupt`] or [`ErrorKind::LimitExceeded`] for invalid fields.
    pub fn parse(head: &[u8]) -> Result<Self> {
        Self::parse_some(head).map_err(|f| match f {
            Failure::Bad(e) => e,
            Failure::Short(n) => Error::corrupt(format!(
                "the header needs {n} bytes, and there are {} bytes of it",
                head.len()
            )),
        })
    }

    /// Reads and parses the header. One read of 4 KiB is enough for nearly every image.
    ///
    /// # Errors
    /// As [`Header::parse`], and the system's.
    pub fn read(file: &ImageFile) -> Result<(Self, Vec<u8>)> {
        let mut want = 4096;
        loop {
            let mut head = vec![0; want];
            file.read_at(&mut head, HostOffset(0))?;
            match Self::parse_some(&head) {
                Ok(header) => return Ok((header, head)),
                // The parser never asks for more than the largest cluster, nor for less than it was given.
                Err(Failure::Short(n)) if n > want && n <= 1 << super::units::MAX_CLUSTER_BITS => want = n,
                Err(Failure::Short(n)) => {
                    return Err(
                        Error::corrupt(format!("the header would need {n} bytes")).on("open", file.path())
                    );
                }
                Err(Failure::Bad(e)) => return Err(e.on("open", file.path())),
            }
        }
    }

    fn parse_some(head: &[u8]) -> std::result::Result<Self, Failure> {
        let Ok((v2, rest)) = RawHeaderV2::read_from_prefix(head) else {
            if head.get(..4) == Some(&MAGIC.to_be_bytes()) {
                return Err(Failure::Short(V2_LENGTH));
            }
            return Err(not_qcow2(head).into());
        };
        if v2.magic.get() != MAGIC {
            return Err(not_qcow2(head).into());
        }
        let version = v2.version.get();
        if version != 2 && version != 3 {
            return Err(unsupported(format!(
                "the image is of qcow version {version}; versions 2 and 3 are supported"
            ))
            .advise("convert it with `qemu-img convert -O qcow2`")
            .into());
        }
        let cluster_bits = ClusterBits::new(v2.cluster_bits.get()).ok_or_else(|| {
            Error::corrupt(format!("cluster_bits is {}, and must be 9 to 21", v2.cluster_bits.get()))
        })?;
        let (mut incompatible, mut compatible, mut autoclear, mut refcount_order) = (0, 0, 0, 4);
        let mut length = V2_LENGTH;
        let mut additional = Vec::new();
        if version == 3 {
            let Ok((v3, _)) = RawHeaderV3::read_from_prefix(rest) else {
                return Err(Failure::Short(V3_LENGTH));
            };
            incompatible = v3.incompatible_features.get();
            compatible = v3.compatible_features.get();
            autoclear = v3.autoclear_features.get();
            refcount_order = v3.refcount_order.get();
            length = v3.header_length.get() as usize;
            if length < V3_LENGTH || !length.is_multiple_of(8) || length > cluster_bits.bytes() {
                return Err(Error::corrupt(format!(
                    "the header says that it is {length} bytes long; it must be a multiple of 8 from 104 to the \
                     cluster size"
                ))
                .into());
            }
            additional = head.get(V3_LENGTH..length).ok_or(Failure::Short(length))?.to_vec();
        }

        let (mut extensions, extensions_end) = parse_extensions(head, length, cluster_bits)?;
        let backing_format = match extensions.iter().position(|e| e.magic == EXT_BACKING_FORMAT) {
            Some(at) => {
                Some(extension_string("backing format", &extensions.remove(at).data, MAX_FORMAT_NAME)?)
            }
            None => None,
        };
        if incompatible & !INCOMPATIBLE_KNOWN != 0 {
            return Err(unknown_features(incompatible & !INCOMPATIBLE_KNOWN, &extensions).into());
        }

        let compression =
            match (additional.first().copied().unwrap_or(0), incompatible & INCOMPATIBLE_COMPRESSION != 0) {
                (0, false) => Compression::Deflate,
                (1, true) => Compression::Zstd,
                (0, true) | (1, false) => {
                    return Err(Error::corrupt(
                        "the compression type and the compression feature bit contradict each other",
                    )
                    .into());
                }
                (other, _) => {
                    return Err(unsupported(format!("the image's compression type {other} is not known"))
                        .advise("convert it with a QEMU that knows it")
                        .into());
                }
            };
        let encryption = match v2.crypt_method.get() {
            0 => Encryption::None,
            1 => Encryption::Aes,
            2 => Encryption::Luks,
            other => {
                return Err(unsupported(format!("the image's encryption method {other} is not known")).into());
            }
        };
        if refcount_order > 6 {
            return Err(
                Error::corrupt(format!("refcount_order is {refcount_order}, and may be 6 at most")).into()
            );
        }
        if incompatible & INCOMPATIBLE_EXTENDED_L2 != 0 && cluster_bits.bits() < 14 {
            return Err(Error::corrupt("extended L2 entries need clusters of 16 KiB or more").into());
        }

        let backing_offset = v2.backing_file_offset.get();
        let backing = if backing_offset == 0 {
            None
        } else {
            let size = v2.backing_file_size.get();
            let end = backing_offset.checked_add(u64::from(size));
            if size > MAX_BACKING_NAME || end.is_none_or(|end| end > cluster_bits.size()) {
                return Err(Error::corrupt(format!(
                    "invalid name of the backing file: {size} bytes at offset {backing_offset}; it may be 1023 \
                     bytes and must lie in the first cluster"
                ))
                .into());
            }
            let (from, to) = (backing_offset as usize, backing_offset as usize + size as usize);
            let name = head.get(from..to).ok_or(Failure::Short(to))?;
            if name.is_empty() {
                None
            } else {
                let file = extension_string("backing file's name", name, MAX_BACKING_NAME as usize)?;
                Some(Backing { file, format: backing_format })
            }
        };

        let header = Self {
            version,
            cluster_bits,
            virtual_size: v2.size.get(),
            encryption,
            l1_entries: v2.l1_size.get(),
            l1_offset: HostOffset(v2.l1_table_offset.get()),
            reftable_offset: HostOffset(v2.refcount_table_offset.get()),
            reftable_clusters: v2.refcount_table_clusters.get(),
            snapshot_count: v2.nb_snapshots.get(),
            snapshots_offset: HostOffset(v2.snapshots_offset.get()),
            incompatible,
            compatible,
            autoclear,
            refcount_order,
            compression,
            backing,
            extensions,
            additional,
            backing_offset,
            extensions_end,
        };
        header.check_tables()?;
        Ok(header)
    }

    /// Checks the size and place of each table on its own.
    fn check_tables(&self) -> Result<()> {
        let l1_bytes = u64::from(self.l1_entries) * 8;
        if l1_bytes > MAX_L1_BYTES {
            return Err(Error::new(
                ErrorKind::LimitExceeded,
                format!(
                    "the L1 table has {} entries; QEMU and domsnap take 4194304 at most",
                    self.l1_entries
                ),
            ));
        }
        let needed = Geometry::of(self).l1_entries_for(self.virtual_size);
        if u64::from(self.l1_entries) < needed {
            return Err(Error::corrupt(format!(
                "the L1 table has {} entries, and a disk of {} bytes needs {needed}",
                self.l1_entries, self.virtual_size
            )));
        }
        self.check_extent("L1 table", self.l1_offset, l1_bytes)?;
        if self.reftable_clusters == 0 {
            return Err(Error::corrupt("the image has no refcount table"));
        }
        let reftable_bytes = u64::from(self.reftable_clusters) << self.cluster_bits.bits();
        if reftable_bytes > MAX_REFTABLE_BYTES {
            return Err(Error::new(
                ErrorKind::LimitExceeded,
                format!(
                    "the refcount table has {reftable_bytes} bytes; QEMU and domsnap take 8388608 at most"
                ),
            ));
        }
        self.check_extent("refcount table", self.reftable_offset, reftable_bytes)?;
        if self.snapshot_count > MAX_SNAPSHOTS {
            return Err(Error::new(
                ErrorKind::LimitExceeded,
                format!("the image says it has {} snapshots; 65536 is the limit", self.snapshot_count),
            ));
        }
        if self.snapshot_count > 0 {
            // A table entry has 40 bytes at least.
            self.check_extent("snapshot table", self.snapshots_offset, u64::from(self.snapshot_count) * 40)?;
        }
        if self.autoclear & AUTOCLEAR_BITMAPS != 0 {
            let Some(bitmaps) = self.bitmaps()? else {
                return Err(Error::corrupt(
                    "the bitmaps feature bit is set, and there is no bitmaps header extension",
                ));
            };
            self.check_extent("bitmap directory", bitmaps.directory_offset, bitmaps.directory_size)?;
        }
        Ok(())
    }

    /// Checks that a table starts at a cluster other than the first, and ends at an offset that a file can
    /// have.
    fn check_extent(&self, what: &str, offset: HostOffset, bytes: u64) -> Result<()> {
        if bytes == 0 {
            return Ok(());
        }
        let end = offset.0.checked_add(bytes).filter(|end| i64::try_from(*end).is_ok());
        if offset.0 == 0 || offset.0 & self.cluster_bits.mask() != 0 || end.is_none() {
            return Err(Error::corrupt(format!("invalid {what}: {bytes} bytes at offset {offset}")));
        }
        Ok(())
    }

    /// Returns true if L2 entries have subcluster bitmaps.
    pub fn has_extended_l2(&self) -> bool {
        self.incompatible & INCOMPATIBLE_EXTENDED_L2 != 0
    }

    /// Returns true if QEMU may update refcounts lazily.
    pub fn has_lazy_refcounts(&self) -> bool {
        self.compatible & COMPATIBLE_LAZY_REFCOUNTS != 0
    }

    /// Returns true if guest data is in another file.
    pub fn has_data_file(&self) -> bool {
        self.incompatible & INCOMPATIBLE_DATA_FILE != 0
    }

    /// Returns true if the refcounts are marked as out of date.
    pub fn is_dirty(&self) -> bool {
        self.incompatible & INCOMPATIBLE_DIRTY != 0
    }

    /// Returns true if the image is marked as corrupt.
    pub fn is_corrupt(&self) -> bool {
        self.incompatible & INCOMPATIBLE_CORRUPT != 0
    }

    /// The external data file's name, if the image states one.
    pub fn data_file(&self) -> Option<String> {
        let e = self.extensions.iter().find(|e| e.magic == EXT_DATA_FILE)?;
        Some(String::from_utf8_lossy(&e.data).into_owned())
    }

    /// The bitmaps extension, also if its feature bit does not mark it as consistent.
    ///
    /// # Errors
    /// [`ErrorKind::Corrupt`] for an invalid extension.
    pub fn bitmaps(&self) -> Result<Option<BitmapsPointer>> {
        let Some(e) = self.extensions.iter().find(|e| e.magic == EXT_BITMAPS) else { return Ok(None) };
        let raw = RawBitmapsExtension::read_from_bytes(&e.data).map_err(|_| {
            Error::corrupt(format!("the bitmaps extension has {} bytes instead of 24", e.data.len()))
        })?;
        Ok(Some(BitmapsPointer {
            count: raw.count.get(),
            directory_size: raw.directory_size.get(),
            directory_offset: HostOffset(raw.directory_offset.get()),
        }))
    }

    /// Offset and length of the LUKS header.
    ///
    /// # Errors
    /// [`ErrorKind::Corrupt`] for an invalid extension.
    pub fn crypto_header(&self) -> Result<Option<(HostOffset, u64)>> {
        let Some(e) = self.extensions.iter().find(|e| e.magic == EXT_CRYPTO) else { return Ok(None) };
        let raw = RawCryptoPointer::read_from_bytes(&e.data).map_err(|_| {
            Error::corrupt(format!("the encryption extension has {} bytes instead of 16", e.data.len()))
        })?;
        let (offset, length) = (HostOffset(raw.offset.get()), raw.length.get());
        self.check_extent("encryption header", offset, length)?;
        Ok(Some((offset, length)))
    }

    /// The summary of this header.
    pub fn summary(&self) -> HeaderSummary {
        HeaderSummary {
            version: self.version,
            virtual_size: self.virtual_size,
            cluster_bits: self.cluster_bits,
            snapshot_count: self.snapshot_count,
            backing: self.backing.clone(),
            encryption: self.encryption,
            data_file: if self.has_data_file() { self.data_file().or(Some(String::new())) } else { None },
            dirty: self.is_dirty(),
            corrupt: self.is_corrupt(),
        }
    }

    /// Bytes of the header proper.
    pub(crate) fn length(&self) -> usize {
        if self.version == 2 { V2_LENGTH } else { V3_LENGTH + self.additional.len() }
    }

    /// Overwrites the fixed fields in the first bytes of `head`, and leaves everything else.
    pub(crate) fn write_fields(&self, head: &mut [u8]) {
        let v2 = RawHeaderV2 {
            magic: MAGIC.into(),
            version: self.version.into(),
            backing_file_offset: self.backing_offset.into(),
            backing_file_size: self.backing.as_ref().map_or(0, |b| b.file.len() as u32).into(),
            cluster_bits: self.cluster_bits.bits().into(),
            size: self.virtual_size.into(),
            crypt_method: match self.encryption {
                Encryption::None => 0,
                Encryption::Aes => 1,
                Encryption::Luks => 2,
            }
            .into(),
            l1_size: self.l1_entries.into(),
            l1_table_offset: self.l1_offset.0.into(),
            refcount_table_offset: self.reftable_offset.0.into(),
            refcount_table_clusters: self.reftable_clusters.into(),
            nb_snapshots: self.snapshot_count.into(),
            snapshots_offset: self.snapshots_offset.0.into(),
        };
        let v3 = RawHeaderV3 {
            incompatible_features: self.incompatible.into(),
            compatible_features: self.compatible.into(),
            autoclear_features: self.autoclear.into(),
            refcount_order: self.refcount_order.into(),
            header_length: (self.length() as u32).into(),
        };
        if let Some(at) = head.get_mut(..V2_LENGTH) {
            at.copy_from_slice(v2.as_bytes());
        }
        if self.version >= 3 {
            if let Some(at) = head.get_mut(V2_LENGTH..V3_LENGTH) {
                at.copy_from_slice(v3.as_bytes());
            }
            if let Some(at) = head.get_mut(V3_LENGTH..V3_LENGTH + self.additional.len()) {
                at.copy_from_slice(&self.additional);
            }
        }
    }

    /// Encodes header and extensions as they should lie in the file, the backing format first and the feature
    /// names last. The backing file's name is not included.
    pub(crate) fn encode(&self, with_feature_names: bool) -> Vec<u8> {
        let mut out = vec![0; self.length()];
        self.write_fields(&mut out);
        let mut put = |magic: u32, data: &[u8]| {
            let head = RawExtension { magic: magic.into(), length: (data.len() as u32).into() };
            out.extend_from_slice(head.as_bytes());
            out.extend_from_slice(data);
            out.resize(out.len().next_multiple_of(8), 0);
        };
        if let Some(format) = self.backing.as_ref().and_then(|b| b.format.as_ref()) {
            put(EXT_BACKING_FORMAT, format.as_bytes());
        }
        let (last, first): (Vec<_>, Vec<_>) =
            self.extensions.iter().partition(|e| e.magic == EXT_FEATURE_NAMES);
        for e in first {
            put(e.magic, &e.data);
        }
        if with_feature_names {
            for e in last {
                put(e.magic, &e.data);
            }
        }
        put(EXT_END, &[]);
        out
    }
}

/// Walks the extensions from `at`. Returns them, and the offset behind the end marker.
fn parse_extensions(
    head: &[u8],
    mut at: usize,
    bits: ClusterBits,
) -> std::result::Result<(Vec<Extension>, usize), Failure> {
    let mut found: Vec<Extension> = Vec::new();
    loop {
        // The area ends with the first cluster, if no marker ends it.
        let body = at + size_of::<RawExtension>();
        if body > bits.bytes() {
            return Ok((found, at));
        }
        let bytes = head.get(at..body).ok_or(Failure::Short(body))?;
        let Ok(raw) = RawExtension::read_from_bytes(bytes) else { return Err(Failure::Short(body)) };
        let (magic, length) = (raw.magic.get(), raw.length.get() as usize);
        if magic == EXT_END {
            return Ok((found, body));
        }
        let end = body.checked_add(length).filter(|end| *end <= bits.bytes()).ok_or_else(|| {
            Error::corrupt(format!(
                "header extension {magic:#010x} of {length} bytes leaves the first cluster"
            ))
        })?;
        let data = head.get(body..end).ok_or(Failure::Short(end))?.to_vec();
        let known = [EXT_BACKING_FORMAT, EXT_BITMAPS, EXT_CRYPTO, EXT_DATA_FILE];
        if known.contains(&magic) && found.iter().any(|e| e.magic == magic) {
            return Err(Error::corrupt(format!("header extension {magic:#010x} is there twice")).into());
        }
        found.push(Extension { magic, data });
        at = end.next_multiple_of(8);
    }
}

fn extension_string(what: &str, bytes: &[u8], max: usize) -> Result<String> {
    if bytes.len() > max {
        return Err(Error::corrupt(format!("the {what} has {} bytes; {max} is the limit", bytes.len())));
    }
    if bytes.contains(&0) {
        return Err(Error::corrupt(format!("the {what} (\"{}\") has a NUL in it", shown(bytes))));
    }
    String::from_utf8(bytes.to_vec()).map_err(|_| {
        unsupported(format!("the {what} (\"{}\") is not UTF-8", shown(bytes)))
            .advise("rename the file, and set the new name with `qemu-img rebase -u`")
    })
}

fn unknown_features(bits: u64, extensions: &[Extension]) -> Error {
    let table = extensions.iter().find(|e| e.magic == EXT_FEATURE_NAMES);
    let name = |bit: u32| {
        table
            .and_then(|t| {
                t.data
                    .chunks_exact(FEATURE_NAME_ENTRY)
                    .find(|e| e.first() == Some(&0) && e.get(1).copied() == Some(bit as u8))
            })
            .and_then(|e| e.get(2..))
            .map(|name| name.split(|b| *b == 0).next().unwrap_or_default())
            .filter(|name| !name.is_empty())
            .map_or_else(|| format!("bit {bit}"), |name| format!("\"{}\" (bit {bit})", shown(name)))
    };
    let names: Vec<String> = (0..64).filter(|b| bits >> b & 1 == 1).map(name).collect();
    unsupported(format!("the image needs features that domsnap does not know: {}", names.join(", ")))
        .advise("convert it with a QEMU that knows them")
}

/// Formats that are known by their first bytes. They only make the advice: a guest can write such bytes to a
/// raw disk, so the format is what the user states.
const OTHERS: [(&[u8], &str); 4] = [
    (b"conectix", "it looks like a VHD: state that behind its path: PATH,format=vhd"),
    (b"vhdxfile", "it looks like a VHDX: convert it (`qemu-img convert -f vhdx -O qcow2`)"),
    (b"KDMV", "it looks like a VMDK: convert it (`qemu-img convert -f vmdk -O qcow2`)"),
    (b"QED\0", "it looks like a QED image: convert it (`qemu-img convert -f qed -O qcow2`)"),
];

fn not_qcow2(head: &[u8]) -> Error {
    let known = OTHERS.iter().find(|(magic, _)| head.starts_with(magic));
    Error::new(ErrorKind::WrongFormat, "the file does not start with a qcow2 header").advise(known.map_or(
        "if it is an image of another format, state that behind its path: PATH,format=raw, or format=vhd",
        |(_, advice)| *advice,
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn another_format_is_named() {
        for (head, advice) in [
            (&b"conectix and more"[..], "format=vhd"),
            (b"vhdxfile and more", "-f vhdx"),
            (b"KDMV and more", "-f vmdk"),
            (b"anything at all", "format=raw"),
        ] {
            let mut bytes = vec![0; 512];
            bytes[..head.len()].copy_from_slice(head);
            let Err(Failure::Bad(error)) = Header::parse_some(&bytes) else { panic!("it was read") };
            assert!(error.advice().is_some_and(|text| text.contains(advice)), "{error:?}");
        }
    }

    /// Makes a version 3 header of 64 KiB clusters with these extension bytes.
    fn sample(extensions: &[u8]) -> Vec<u8> {
        let mut head = vec![0; 65536];
        let header = Header {
            version: 3,
            cluster_bits: ClusterBits::DEFAULT,
            virtual_size: 1 << 30,
            encryption: Encryption::None,
            l1_entries: 2,
            l1_offset: HostOffset(0x30000),
            reftable_offset: HostOffset(0x10000),
            reftable_clusters: 1,
            snapshot_count: 0,
            snapshots_offset: HostOffset(0),
            incompatible: 0,
            compatible: 0,
            autoclear: 0,
            refcount_order: 4,
            compression: Compression::Deflate,
            backing: None,
            extensions: vec![],
            additional: vec![0; 8],
            backing_offset: 0,
            extensions_end: 0,
        };
        header.write_fields(&mut head);
        head[112..112 + extensions.len()].copy_from_slice(extensions);
        head
    }

    fn put32(head: &mut [u8], at: usize, value: u32) {
        head[at..at + 4].copy_from_slice(&value.to_be_bytes());
    }

    fn put64(head: &mut [u8], at: usize, value: u64) {
        head[at..at + 8].copy_from_slice(&value.to_be_bytes());
    }

    #[test]
    fn a_header_comes_back_as_it_was() {
        let head = sample(&[]);
        let header = Header::parse(&head).unwrap();
        assert_eq!(header.virtual_size, 1 << 30);
        assert_eq!(header.extensions_end, 120);
        assert_eq!(&head[..120], &header.encode(true)[..]);
    }

    #[test]
    fn unknown_extensions_are_kept_byte_for_byte() {
        let mut ext = vec![0x12, 0x34, 0x56, 0x78, 0, 0, 0, 5];
        ext.extend_from_slice(b"hello\0\0\0");
        let header = Header::parse(&sample(&ext)).unwrap();
        assert_eq!(header.extensions, [Extension { magic: 0x1234_5678, data: b"hello".to_vec() }]);
        assert_eq!(header.encode(true)[112..128], ext[..]);
    }

    /// Unknown incompatible features are refused by the name that the image gives them.
    #[test]
    fn unknown_features_are_refused_by_name() {
        let mut ext = EXT_FEATURE_NAMES.to_be_bytes().to_vec();
        ext.extend_from_slice(&48u32.to_be_bytes());
        ext.extend_from_slice(&[0, 17]);
        ext.extend_from_slice(b"time travel");
        ext.resize(8 + 48, 0);
        let mut head = sample(&ext);
        put64(&mut head, 72, 1 << 17 | 1 << 40);
        let e = Header::parse(&head).unwrap_err();
        assert_eq!(e.kind(), ErrorKind::Unsupported);
        assert!(e.to_string().contains("\"time travel\" (bit 17), bit 40"), "{e}");
    }

    /// Each field that lies is refused, and the message says why.
    #[test]
    fn lying_fields_are_refused_with_a_reason() {
        type Lie = fn(&mut [u8]);
        let lies: [(&str, Lie); 20] = [
            ("does not start", |h| h[0] = b'X'),
            ("qcow version 1", |h| put32(h, 4, 1)),
            ("qcow version 4", |h| put32(h, 4, 4)),
            ("cluster_bits is 8", |h| put32(h, 20, 8)),
            ("cluster_bits is 4294967295", |h| put32(h, 20, u32::MAX)),
            ("a disk of 9223372036854775808 bytes needs", |h| put64(h, 24, 1 << 63)),
            ("a disk of 18446744073709551615 bytes needs", |h| put64(h, 24, u64::MAX)),
            ("encryption method 3", |h| put32(h, 32, 3)),
            ("the L1 table has 4194305 entries", |h| put32(h, 36, 4_194_305)),
            ("the L1 table has 1 entries", |h| put32(h, 36, 1)),
            ("invalid L1 table: ", |h| put64(h, 40, 0x30200)),
            ("invalid L1 table: ", |h| put64(h, 40, 0)),
            ("invalid refcount table: ", |h| put64(h, 48, 0x7fff_ffff_ffff_0000)),
            ("no refcount table", |h| put32(h, 56, 0)),
            ("the refcount table has 8454144 bytes", |h| put32(h, 56, 129)),
            ("65537 snapshots", |h| put32(h, 60, 65537)),
            ("invalid snapshot table: ", |h| put32(h, 60, 1)),
            ("refcount_order is 7", |h| put32(h, 96, 7)),
            ("103 bytes long", |h| put32(h, 100, 103)),
            ("contradict each other", |h| h[104] = 1),
        ];
        for (reason, lie) in lies {
            let mut head = sample(&[]);
            lie(&mut head);
            let e = Header::parse(&head).unwrap_err().to_string();
            assert!(e.contains(reason), "expected {reason:?} in {e:?}");
        }
    }

    /// A backing file's name outside of the first cluster is refused.
    #[test]
    fn backing_name_outside_first_cluster_is_refused() {
        let mut head = sample(&[]);
        put64(&mut head, 8, 65536 - 4);
        put32(&mut head, 16, 5);
        assert!(Header::parse(&head).unwrap_err().to_string().contains("invalid name of the backing file"));
        put64(&mut head, 8, u64::MAX);
        assert!(Header::parse(&head).is_err());
    }

    #[test]
    fn an_extension_that_leaves_the_cluster_is_refused() {
        let mut head = sample(&[1, 2, 3, 4, 0xff, 0xff, 0xff, 0xff]);
        assert!(Header::parse(&head).unwrap_err().to_string().contains("leaves the first cluster"));
        head.truncate(80);
        assert!(Header::parse(&head).is_err());
    }
}
