//! The two qcow2 images that this crate writes itself, as bytes: an empty image, and the wrapper around a
//! memory image.
//!
//! The layout is that of the specification (`docs/interop/qcow2.rst` of QEMU), version 3. Nothing here reads
//! a guest's image.

use crate::error::{Error, ErrorKind, Result};

const MAGIC: u32 = 0x5146_49fb;
const HEADER_LENGTH: u32 = 104;
/// "COPIED": this table or cluster has exactly one user.
const COPIED: u64 = 1 << 63;

/// Bytes of one cluster of the wrapper: with 2 MiB, one table of each kind is enough for 512 GiB.
pub(crate) const CLUSTER: u64 = 2 << 20;
/// Entries of the one table of clusters.
const ENTRIES: u64 = CLUSTER / 8;

/// Offset of the stream in a wrapper: after eight clusters.
pub(crate) const STREAM: u64 = 8 * CLUSTER;
/// Offset of the record: the last of those clusters.
pub(crate) const RECORD: u64 = 7 * CLUSTER;
/// Longest possible stream: one entry of the table of clusters is the record's.
pub(crate) const LONGEST: u64 = (ENTRIES - 1) * CLUSTER;

/// Makes an image of the same size as a disk, with nothing in it. Clusters of 64 KiB.
pub(crate) fn empty(virtual_size: u64) -> Result<Vec<u8>> {
    const BITS: u32 = 16;
    const CLUSTER: usize = 1 << BITS;
    let too_large = || {
        let detail = format!("{virtual_size} bytes are more than an image can have");
        Error::new(ErrorKind::Invalid, "making an empty image", "a disk", detail)
    };
    let entries = virtual_size.div_ceil((CLUSTER as u64 / 8) << BITS).max(1);
    let entries = u32::try_from(entries).map_err(|_| too_large())?;
    let table = usize::try_from(entries).map_err(|_| too_large())?.checked_mul(8).ok_or_else(too_large)?;
    let clusters = 3 + table.div_ceil(CLUSTER);
    // One block of reference counts is enough.
    if clusters > CLUSTER / 2 {
        return Err(too_large());
    }
    let mut image = vec![0; clusters * CLUSTER];
    let head = Header {
        cluster_bits: BITS,
        virtual_size,
        l1_size: entries,
        l1_offset: 3 << BITS,
        refcount_table_offset: 1 << BITS,
        snapshots: 0,
        snapshots_offset: 0,
    };
    put(&mut image, 0, &head.bytes());
    put(&mut image, CLUSTER, &(2u64 << BITS).to_be_bytes());
    for cluster in 0..clusters {
        put(&mut image, 2 * CLUSTER + 2 * cluster, &1u16.to_be_bytes());
    }
    Ok(image)
}

/// The parts of the image format around a stream, each with its offset in the file.
#[derive(Debug)]
pub(crate) struct Wrapper {
    /// The tables. They must be durable before the header is written.
    pub(crate) tables: Vec<(u64, Vec<u8>)>,
    /// The header, at offset 0. Writing it makes the file an image.
    pub(crate) header: Vec<u8>,
    /// The file's length.
    pub(crate) length: u64,
}

/// Makes the wrapper around a stream of `stream` bytes: an image whose disk is one empty cluster, with one
/// internal snapshot whose VM state is the stream.
///
/// A VM state lies behind the end of the virtual disk, in clusters of the snapshot's own table. Here it is in
/// the second entry of its first-level table, because the first entry covers the disk. The record's cluster
/// is the last entry of the second-level table, far behind the VM state. So the cluster is in use, and no
/// check or writer treats it as free.
pub(crate) fn wrapper(stream: u64, tag: &str, seconds: u32) -> Result<Wrapper> {
    let clusters = stream.div_ceil(CLUSTER);
    if stream == 0 || stream > LONGEST {
        let detail = format!("it has {stream} bytes; 1 to {LONGEST} can be wrapped");
        return Err(Error::new(ErrorKind::Invalid, "wrapping a memory image", "its stream", detail));
    }
    let name = tag.as_bytes();
    let name_length = u16::try_from(name.len()).ok().filter(|&length| length > 0 && length < 256);
    let name_length = name_length.ok_or_else(|| {
        let detail = "a snapshot's name in an image has 1 to 255 bytes";
        Error::new(ErrorKind::Invalid, "wrapping a memory image", tag, detail)
    })?;
    // 0 header, 1 table of reference blocks, 2 reference block, 3 the disk's table, 4 and 5 the snapshot's, 6
    // snapshots, 7 record.
    let at = |cluster: u64| cluster * CLUSTER;
    let count = usize::try_from(clusters).unwrap_or(usize::MAX);
    let references = 1u16.to_be_bytes().repeat(count.saturating_add(8));
    let mut second = vec![0; usize::try_from(CLUSTER).unwrap_or_default()];
    for (index, entry) in second.chunks_exact_mut(8).enumerate() {
        let index = index as u64;
        if index < clusters {
            entry.copy_from_slice(&((STREAM + at(index)) | COPIED).to_be_bytes());
        } else if index == ENTRIES - 1 {
            entry.copy_from_slice(&(RECORD | COPIED).to_be_bytes());
        }
    }
    let mut first = vec![0; 8];
    first.extend((at(5) | COPIED).to_be_bytes());

    let id = b"1";
    let mut snapshot = Vec::new();
    snapshot.extend(at(4).to_be_bytes());
    snapshot.extend(2u32.to_be_bytes()); // entries of its first-level table
    snapshot.extend(1u16.to_be_bytes()); // length of its id
    snapshot.extend(name_length.to_be_bytes());
    snapshot.extend(seconds.to_be_bytes());
    snapshot.extend(0u32.to_be_bytes()); // nanoseconds
    snapshot.extend(0u64.to_be_bytes()); // the guest's clock
    snapshot.extend((stream as u32).to_be_bytes()); // its low half; the whole follows
    snapshot.extend(24u32.to_be_bytes()); // length of what follows
    snapshot.extend(stream.to_be_bytes());
    snapshot.extend(CLUSTER.to_be_bytes()); // size of the disk
    snapshot.extend(u64::MAX.to_be_bytes()); // no instruction count
    snapshot.extend(id);
    snapshot.extend(name);
    snapshot.resize(snapshot.len().next_multiple_of(8), 0);

    let head = Header {
        cluster_bits: CLUSTER.trailing_zeros(),
        virtual_size: CLUSTER,
        l1_size: 1,
        l1_offset: at(3),
        refcount_table_offset: at(1),
        snapshots: 1,
        snapshots_offset: at(6),
    };
    Ok(Wrapper {
        tables: vec![
            (at(1), at(2).to_be_bytes().to_vec()),
            (at(2), references),
            (at(3), vec![0; 8]),
            (at(4), first),
            (at(5), second),
            (at(6), snapshot),
        ],
        header: head.bytes(),
        length: STREAM + clusters * CLUSTER,
    })
}

struct Header {
    cluster_bits: u32,
    virtual_size: u64,
    l1_size: u32,
    l1_offset: u64,
    refcount_table_offset: u64,
    snapshots: u32,
    snapshots_offset: u64,
}

impl Header {
    fn bytes(&self) -> Vec<u8> {
        let mut bytes = Vec::with_capacity(112);
        bytes.extend(MAGIC.to_be_bytes());
        bytes.extend(3u32.to_be_bytes());
        bytes.extend(0u64.to_be_bytes()); // backing file's name: where
        bytes.extend(0u32.to_be_bytes()); // and how long
        bytes.extend(self.cluster_bits.to_be_bytes());
        bytes.extend(self.virtual_size.to_be_bytes());
        bytes.extend(0u32.to_be_bytes()); // not encrypted
        bytes.extend(self.l1_size.to_be_bytes());
        bytes.extend(self.l1_offset.to_be_bytes());
        bytes.extend(self.refcount_table_offset.to_be_bytes());
        bytes.extend(1u32.to_be_bytes()); // clusters of that table
        bytes.extend(self.snapshots.to_be_bytes());
        bytes.extend(self.snapshots_offset.to_be_bytes());
        bytes.extend([0; 24]); // no features
        bytes.extend(4u32.to_be_bytes()); // reference counts of 16 bits
        bytes.extend(HEADER_LENGTH.to_be_bytes());
        bytes.extend([0; 8]); // the end of the header's extensions
        bytes
    }
}

fn put(image: &mut [u8], at: usize, bytes: &[u8]) {
    if let Some(place) = at.checked_add(bytes.len()).and_then(|end| image.get_mut(at..end)) {
        place.copy_from_slice(bytes);
    }
}

#[cfg(test)]
mod tests {
    use std::{fs, process::Command};

    use super::*;

    fn check(path: &std::path::Path) -> String {
        let output = Command::new("qemu-img").args(["check", "-f", "qcow2"]).arg(path).output();
        let output = output.expect("qemu-img runs: scripts/install-deps");
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        assert!(output.status.success(), "{text}{}", String::from_utf8_lossy(&output.stderr));
        text
    }

    #[test]
    fn an_empty_image_of_any_size_is_whole() {
        let dir = tempfile::tempdir().expect("a directory");
        for size in [512, 64 << 20, (512 << 20) + 512, 8 << 40, 64 << 40] {
            let path = dir.path().join("empty.qcow2");
            fs::write(&path, empty(size).expect("it can be made")).expect("written");
            assert!(check(&path).contains("No errors"));
            let info = Command::new("qemu-img").args(["info", "--output=json"]).arg(&path).output();
            let info = String::from_utf8(info.expect("it runs").stdout).expect("text");
            assert!(info.contains(&format!("\"virtual-size\": {size},")), "{info}");
        }
        assert_eq!(empty(u64::MAX).expect_err("too large").kind(), ErrorKind::Invalid);
    }

    /// A wrapper is a valid image, and its snapshot has the size of the stream.
    #[test]
    fn wrapper_is_valid_and_has_the_stream_size() {
        let dir = tempfile::tempdir().expect("a directory");
        for stream in [1, CLUSTER, CLUSTER + 1, 77 << 20, 3 << 30] {
            let path = dir.path().join("memory.qcow2");
            let wrapper = wrapper(stream, "a tag", 1_700_000_000).expect("it can be wrapped");
            let file = fs::File::create(&path).expect("a file");
            file.set_len(wrapper.length).expect("a length");
            use std::os::unix::fs::FileExt;
            for (at, bytes) in wrapper.tables {
                file.write_all_at(&bytes, at).expect("written");
            }
            file.write_all_at(&wrapper.header, 0).expect("written");
            assert!(check(&path).contains("No errors"));
            let info = Command::new("qemu-img").args(["info", "--output=json"]).arg(&path).output();
            let info = String::from_utf8(info.expect("it runs").stdout).expect("text");
            assert!(info.contains(&format!("\"vm-state-size\": {stream}")), "{info}");
        }
        for (stream, tag) in [(0, "t"), (LONGEST + 1, "t"), (1, ""), (1, &*"x".repeat(256))] {
            assert_eq!(wrapper(stream, tag, 0).expect_err("refused").kind(), ErrorKind::Invalid);
        }
    }
}
