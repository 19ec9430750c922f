//! The record of a memory image: the length of its stream, a checksum for each part of it, and the caller's
//! metadata.
//!
//! All numbers are big endian: magic (8 bytes), version, flags (4 bytes each; the flags are reserved, and 0),
//! length of the stream, bytes of a part (8 bytes each), number of parts, length of the metadata (4 bytes
//! each), the checksums (4 bytes each), the metadata, and a checksum of all before it. Checksums are CRC-32
//! (IEEE).

use crate::qcow2::{CLUSTER, LONGEST};

const MAGIC: &[u8; 8] = b"DOMSNAPM";
const VERSION: u32 = 1;
const HEAD: usize = 40;

/// Bytes of the stream that share a checksum.
pub(crate) const PART: u64 = 16 << 20;

/// Longest metadata of the caller: with the checksums of the longest stream the record still fits its
/// cluster.
pub(crate) const LONGEST_METADATA: usize = 1 << 20;

#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Record {
    pub(crate) stream: u64,
    pub(crate) checksums: Vec<u32>,
    pub(crate) metadata: Vec<u8>,
}

impl Record {
    pub(crate) fn bytes(&self) -> Vec<u8> {
        let mut bytes = Vec::with_capacity(HEAD + 4 * self.checksums.len() + self.metadata.len() + 4);
        bytes.extend(MAGIC);
        bytes.extend(VERSION.to_be_bytes());
        bytes.extend(0u32.to_be_bytes());
        bytes.extend(self.stream.to_be_bytes());
        bytes.extend(PART.to_be_bytes());
        bytes.extend(u32::try_from(self.checksums.len()).unwrap_or(u32::MAX).to_be_bytes());
        bytes.extend(u32::try_from(self.metadata.len()).unwrap_or(u32::MAX).to_be_bytes());
        for checksum in &self.checksums {
            bytes.extend(checksum.to_be_bytes());
        }
        bytes.extend(&self.metadata);
        bytes.extend(crc32fast::hash(&bytes).to_be_bytes());
        bytes
    }

    /// Parses a record; the error describes a damaged one.
    pub(crate) fn parse(bytes: &[u8]) -> Result<Self, String> {
        let word = |at: usize| -> Option<u32> {
            Some(u32::from_be_bytes(bytes.get(at..at.checked_add(4)?)?.try_into().ok()?))
        };
        let long = |at: usize| Some(u64::from(word(at)?) << 32 | u64::from(word(at + 4)?));
        let short = || "the record is cut off".to_owned();
        if bytes.get(..8) != Some(MAGIC) {
            return Err(
                "it has no record of domsnap's: domsnap did not write it, or did not finish".to_owned()
            );
        }
        match (word(8), word(12)) {
            (Some(VERSION), Some(0)) => {}
            (version, flags) => {
                return Err(format!(
                    "its record has the version {version:?} and the flags {flags:?}, which a later domsnap wrote"
                ));
            }
        }
        let (stream, part) = (long(16).ok_or_else(short)?, long(24).ok_or_else(short)?);
        let (parts, metadata) = (word(32).ok_or_else(short)?, word(36).ok_or_else(short)?);
        if stream == 0 || stream > LONGEST || part != PART || u64::from(parts) != stream.div_ceil(PART) {
            return Err(format!("its record counts {parts} parts of {part} bytes in a stream of {stream}"));
        }
        let parts = usize::try_from(parts).map_err(|_| short())?;
        let metadata = usize::try_from(metadata).map_err(|_| short())?;
        let body = HEAD + 4 * parts + metadata.min(usize::try_from(CLUSTER).unwrap_or(usize::MAX));
        let checked = bytes.get(..body).ok_or_else(short)?;
        if metadata > LONGEST_METADATA || word(body) != Some(crc32fast::hash(checked)) {
            return Err("its record does not match its own checksum".to_owned());
        }
        let checksums = checked.get(HEAD..HEAD + 4 * parts).ok_or_else(short)?;
        let checksums = checksums.as_chunks::<4>().0.iter().map(|bytes| u32::from_be_bytes(*bytes)).collect();
        let metadata = checked.get(HEAD + 4 * parts..).ok_or_else(short)?.to_vec();
        Ok(Self { stream, checksums, metadata })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A record is parsed as it was written; any flipped byte and any cut are detected.
    #[test]
    fn record_parses_until_changed() {
        let record = Record { stream: 3 * PART - 5, checksums: vec![1, 2, 3], metadata: b"{}".to_vec() };
        let bytes = record.bytes();
        assert_eq!(Record::parse(&bytes).expect("whole"), record);
        for at in 0..bytes.len() {
            let mut changed = bytes.clone();
            changed[at] ^= 0x40;
            Record::parse(&changed).expect_err("changed");
            Record::parse(&bytes[..at]).expect_err("cut off");
        }
    }

    #[test]
    fn the_record_of_the_longest_stream_fits_its_cluster() {
        let parts = usize::try_from(LONGEST.div_ceil(PART)).expect("small");
        let record =
            Record { stream: LONGEST, checksums: vec![7; parts], metadata: vec![0; LONGEST_METADATA] };
        assert!(record.bytes().len() as u64 <= CLUSTER);
        assert_eq!(Record::parse(&record.bytes()).expect("whole"), record);
    }
}
