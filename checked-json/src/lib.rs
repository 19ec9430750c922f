//! JSON files that say which kind and version they are, and show damage by a checksum.
//!
//! A file is an envelope around its content: `{"MARKER": VERSION, "crc32": "HEX", "content": ...}`. The
//! marker is the name of the kind, so that a file of another kind is not taken for one. The checksum is the
//! CRC-32 of the content's bytes, exactly as the file has them. It finds damage. It proves nothing about who
//! wrote the file: whoever may write there can write a checksum too.
//!
//! ```
//! use checked_json::Envelope;
//!
//! const NOTE: Envelope = Envelope::new("example-note", 1);
//! let text = NOTE.write(&["buy milk"])?;
//! assert_eq!(NOTE.read::<Vec<String>>(&text)?, ["buy milk"]);
//!
//! let damaged = String::from_utf8(text).unwrap().replace("milk", "silk");
//! assert!(NOTE.read::<Vec<String>>(damaged.as_bytes()).unwrap_err().to_string().contains("checksum"));
//! # Ok::<(), checked_json::Error>(())
//! ```

use std::collections::BTreeMap;

use serde::{Serialize, de::DeserializeOwned};
use serde_json::value::RawValue;

/// Why a file is not read, or not written.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// It is no JSON, or a part of the envelope is missing or of another type.
    #[error("it has no {part} of a {marker}: {cause}")]
    NoEnvelope {
        /// The kind of file that was expected.
        marker: &'static str,
        /// The part of the envelope.
        part: &'static str,
        /// What was found.
        cause: String,
    },
    /// A newer program wrote it.
    #[error("it is of version {found}, and this domsnap knows version {known}")]
    Version {
        /// The version of the file.
        found: u32,
        /// The version that is read.
        known: u32,
    },
    /// The content is not what was written.
    #[error("its content has the checksum {found:08x}, and it says {said}")]
    Checksum {
        /// The checksum of the content's bytes.
        found: u32,
        /// The checksum that the file has.
        said: String,
    },
    /// The content is whole, and of another shape.
    #[error("its content is not understood: {0}")]
    Content(#[source] serde_json::Error),
    /// The value has no JSON.
    #[error("it cannot be written as JSON: {0}")]
    NotWritten(#[source] serde_json::Error),
}

/// A kind of file.
#[derive(Debug, Clone, Copy)]
pub struct Envelope {
    marker: &'static str,
    version: u32,
}

impl Envelope {
    /// The kind of file that `marker` names, at a version of its content.
    pub const fn new(marker: &'static str, version: u32) -> Self {
        Self { marker, version }
    }

    /// The bytes of a file with this content: one line.
    ///
    /// # Errors
    /// [`Error::NotWritten`].
    pub fn write<T: Serialize + ?Sized>(&self, content: &T) -> Result<Vec<u8>, Error> {
        self.around(serde_json::to_string(content))
    }

    /// As [`Envelope::write`], with the content on lines of its own, for people who look into the file.
    ///
    /// # Errors
    /// [`Error::NotWritten`].
    pub fn write_in_lines<T: Serialize + ?Sized>(&self, content: &T) -> Result<Vec<u8>, Error> {
        self.around(serde_json::to_string_pretty(content))
    }

    fn around(&self, content: serde_json::Result<String>) -> Result<Vec<u8>, Error> {
        let content = content.map_err(Error::NotWritten)?;
        let marker = serde_json::to_string(self.marker).map_err(Error::NotWritten)?;
        let sum = crc32fast::hash(content.as_bytes());
        let text = format!("{{{marker}:{},\"crc32\":\"{sum:08x}\",\"content\":{content}}}\n", self.version);
        Ok(text.into_bytes())
    }

    /// The content of a file. Parts that an envelope of a newer program has beside ours are ignored.
    ///
    /// # Errors
    /// Each but [`Error::NotWritten`].
    pub fn read<T: DeserializeOwned>(&self, file: &[u8]) -> Result<T, Error> {
        let fail = |part, cause| Error::NoEnvelope { marker: self.marker, part, cause };
        let parts: BTreeMap<String, &RawValue> =
            serde_json::from_slice(file).map_err(|cause| fail("envelope", cause.to_string()))?;
        let part = |name| parts.get(name).map(|raw| raw.get());
        let missing = || "it is not there".to_owned();
        let version = part(self.marker).ok_or_else(|| fail("version", missing()))?;
        let found = serde_json::from_str(version).map_err(|cause| fail("version", cause.to_string()))?;
        if found != self.version {
            return Err(Error::Version { found, known: self.version });
        }
        let said = part("crc32").ok_or_else(|| fail("checksum", missing()))?;
        let said: String = serde_json::from_str(said).map_err(|cause| fail("checksum", cause.to_string()))?;
        let content = part("content").ok_or_else(|| fail("content", missing()))?;
        let found = crc32fast::hash(content.as_bytes());
        if format!("{found:08x}") != said {
            return Err(Error::Checksum { found, said });
        }
        serde_json::from_str(content).map_err(Error::Content)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const KIND: Envelope = Envelope::new("checked-json-test", 3);

    fn why(file: &str) -> String {
        KIND.read::<Vec<u32>>(file.as_bytes()).unwrap_err().to_string()
    }

    #[test]
    fn what_was_written_is_read() {
        for text in [KIND.write(&[1, 2]), KIND.write_in_lines(&[1, 2])] {
            assert_eq!(KIND.read::<Vec<u32>>(&text.unwrap()).unwrap(), [1, 2]);
        }
        // Fields of a newer program, spaces and another order change nothing.
        let sum = crc32fast::hash(b"[ 1,2]");
        let text =
            format!(r#"{{ "mood":[], "content":[ 1,2], "crc32":"{sum:08x}", "checked-json-test": 3}}"#);
        assert_eq!(KIND.read::<Vec<u32>>(text.as_bytes()).unwrap(), [1, 2]);
    }

    #[test]
    fn what_is_wrong_is_said() {
        let sum = crc32fast::hash(b"[1]");
        let text = |version: &str, content: &str| {
            format!(r#"{{"checked-json-test":{version},"crc32":"{sum:08x}","content":{content}}}"#)
        };
        assert!(KIND.read::<Vec<u32>>(text("3", "[1]").as_bytes()).is_ok());
        assert!(why(&text("4", "[1]")).contains("version 4, and this domsnap knows version 3"));
        assert!(why(&text("\"3\"", "[1]")).contains("no version of a checked-json-test"));
        assert!(why(&text("3", "[2]")).contains("checksum"));
        assert!(why(&text("3", "[1]")[1..]).contains("no envelope of a checked-json-test"));
        assert!(why(r#"{"other":1}"#).contains("no version of a checked-json-test: it is not there"));
        let sum = crc32fast::hash(b"{}");
        let other = format!(r#"{{"checked-json-test":3,"crc32":"{sum:08x}","content":{{}}}}"#);
        assert!(why(&other).contains("not understood"));
    }
}
