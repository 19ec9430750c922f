//! Parent locators: the paths by which an image names its parent.
//!
//! The text of a locator is data of whoever made the image. It only says where to look: the parent is the
//! file with the right unique id, and it is never looked for outside the allowed directories.

use image_files::engine::HostOffset;

use super::error::Result;
use super::file::ImageFile;
use super::header::Header;
use super::layout::RawLocator;
use super::units::SECTOR;

/// Code of a relative path for Windows.
pub(super) const RELATIVE: [u8; 4] = *b"W2ru";
/// Code of an absolute path for Windows.
const ABSOLUTE: [u8; 4] = *b"W2ku";
/// Code of a file URL.
const URL: [u8; 4] = *b"MacX";
/// Codes that the specification deprecates, of 8-bit text.
const OLD: [[u8; 4]; 2] = [*b"Wi2r", *b"Wi2k"];
/// The longest text that is read, in bytes.
const LONGEST: u32 = 64 << 10;

/// One locator.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Locator {
    /// Its code, as characters.
    pub code: String,
    /// Order of the search: lower is tried first.
    rank: u8,
    /// The path with slashes and without drive, or the reason why there is none.
    pub path: std::result::Result<String, String>,
    /// Place of its text in the file.
    pub(super) at: u64,
    /// Bytes of its text.
    pub(super) length: u64,
    /// Bytes that belong to it in the file.
    pub(super) space: u64,
}

impl Locator {
    /// Encodes a relative path: `.\name` or `..\directory\name`.
    pub(super) fn encode_relative(path: &str) -> Vec<u8> {
        let path = path.strip_prefix("./").unwrap_or(path);
        let prefix = if path.starts_with("../") { "" } else { ".\\" };
        let text = format!("{prefix}{}", path.replace('/', "\\"));
        text.encode_utf16().flat_map(u16::to_le_bytes).collect()
    }

    /// Reads the locators of a header from a file of `len` bytes, in the order of the search. Empty ones are
    /// left out.
    ///
    /// # Errors
    /// The system's.
    pub(super) fn read_all(file: &ImageFile, header: &Header, len: u64) -> Result<Vec<Self>> {
        let mut found = Vec::new();
        for raw in header.locators().iter().filter(|raw| raw.code != [0; 4]) {
            found.push(Self::read(file, raw, len)?);
        }
        found.sort_by_key(|locator| locator.rank);
        Ok(found)
    }

    fn read(file: &ImageFile, raw: &RawLocator, len: u64) -> Result<Self> {
        let (at, length) = (raw.data_offset.get(), raw.data_length.get());
        let mut locator = Self {
            code: super::error::shown(&raw.code),
            rank: match raw.code {
                RELATIVE => 0,
                URL => 1,
                ABSOLUTE => 2,
                _ => 3,
            },
            path: Err("it is empty".to_owned()),
            at,
            length: u64::from(length),
            space: space_of(raw),
        };
        if length == 0 {
            return Ok(locator);
        }
        if length > LONGEST || at.checked_add(u64::from(length)).is_none_or(|end| end > len) {
            locator.path =
                Err(format!("its text, {length} bytes at {at:#x}, is not in the file or too long"));
            return Ok(locator);
        }
        let mut text = vec![0; length as usize];
        file.read_at(&mut text, HostOffset(at))?;
        locator.path = decode(raw.code, &text);
        Ok(locator)
    }
}

/// Bytes that a locator's text has in the file. By the specification the field counts sectors. Microsoft,
/// VirtualBox and XenServer write bytes.
fn space_of(raw: &RawLocator) -> u64 {
    match u64::from(raw.data_space.get()) {
        sectors if sectors < SECTOR => sectors * SECTOR,
        bytes => bytes,
    }
    .max(u64::from(raw.data_length.get()))
}

/// Decodes the text of a locator to a path with slashes.
///
/// # Errors
/// The reason, for a message.
pub(super) fn decode(code: [u8; 4], text: &[u8]) -> std::result::Result<String, String> {
    let path = match code {
        RELATIVE | ABSOLUTE => windows_path(&utf16(text)?),
        URL => url_path(text)?,
        code if OLD.contains(&code) => windows_path(&utf8(text)?),
        code => return Err(format!("its code {:?} is unknown", super::error::shown(&code))),
    };
    match path.is_empty() || path.contains('\0') {
        true => Err("it has no path".to_owned()),
        false => Ok(path),
    }
}

fn utf16(text: &[u8]) -> std::result::Result<String, String> {
    let units: Vec<u16> = text.chunks_exact(2).map(|unit| u16::from_le_bytes([unit[0], unit[1]])).collect();
    let text = String::from_utf16(&units).map_err(|_| "its text is not UTF-16".to_owned())?;
    Ok(text.trim_end_matches('\0').to_owned())
}

fn utf8(text: &[u8]) -> std::result::Result<String, String> {
    let text = std::str::from_utf8(text).map_err(|_| "its text is not UTF-8".to_owned())?;
    Ok(text.trim_end_matches('\0').to_owned())
}

/// Replaces backslashes and removes the drive.
fn windows_path(text: &str) -> String {
    let path = text.replace('\\', "/");
    match path.as_bytes() {
        [drive, b':', ..] if drive.is_ascii_alphabetic() => path[2..].to_owned(),
        _ => path,
    }
}

/// Returns the path of a file URL: `file:///a%20b`, `file://localhost/a`, `file://./a`; spaces may be plain.
fn url_path(text: &[u8]) -> std::result::Result<String, String> {
    let text = utf8(text)?;
    let rest = text.strip_prefix("file://").unwrap_or(&text);
    let rest = rest.strip_prefix("localhost").filter(|rest| rest.starts_with('/')).unwrap_or(rest);
    let mut bytes = Vec::with_capacity(rest.len());
    let mut left = rest.as_bytes();
    while let Some((first, after)) = left.split_first() {
        let hex = after.get(..2).filter(|pair| *first == b'%' && pair.iter().all(u8::is_ascii_hexdigit));
        let hex = hex.and_then(|pair| std::str::from_utf8(pair).ok());
        let decoded = hex.and_then(|pair| u8::from_str_radix(pair, 16).ok());
        match decoded {
            Some(byte) => {
                bytes.push(byte);
                left = &after[2..];
            }
            None => {
                bytes.push(*first);
                left = after;
            }
        }
    }
    String::from_utf8(bytes).map_err(|_| "its text is not UTF-8".to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn le(text: &str) -> Vec<u8> {
        text.encode_utf16().flat_map(u16::to_le_bytes).collect()
    }

    /// Every form of a path that was seen in images is understood.
    #[test]
    fn locator_forms_are_understood() {
        let cases: [([u8; 4], Vec<u8>, &str); 11] = [
            (RELATIVE, le(".\\base.vhd"), "./base.vhd"),
            (RELATIVE, le("..\\a b\\base.vhd\0"), "../a b/base.vhd"),
            (RELATIVE, le("base.vhd"), "base.vhd"),
            (RELATIVE, le("./base.vhd"), "./base.vhd"),
            (ABSOLUTE, le("D:\\vm\\base.vhd"), "/vm/base.vhd"),
            (ABSOLUTE, le("\\\\srv\\share\\b.vhd"), "//srv/share/b.vhd"),
            (URL, b"file:///vm/a%20b%C3%A9.vhd".to_vec(), "/vm/a b\u{e9}.vhd"),
            (URL, b"file://localhost/vm/a b.vhd".to_vec(), "/vm/a b.vhd"),
            (URL, b"file://./a%2.vhd\0".to_vec(), "./a%2.vhd"),
            (*b"Wi2r", b".\\x.vhd\0".to_vec(), "./x.vhd"),
            (RELATIVE, le(".\\\u{1F600}\u{e9}.vhd"), "./\u{1F600}\u{e9}.vhd"),
        ];
        for (code, text, expected) in cases {
            assert_eq!(decode(code, &text).as_deref(), Ok(expected));
        }
    }

    /// Texts without a meaning have a reason, and none panics.
    #[test]
    fn broken_locators_have_a_reason() {
        let lone_surrogate = 0xD800u16.to_le_bytes().to_vec();
        for (code, text) in [
            (RELATIVE, lone_surrogate),
            (RELATIVE, vec![0, 0]),
            (URL, vec![0xFF, 0xFE]),
            (URL, b"%FF".to_vec()),
            (*b"zzzz", b"x".to_vec()),
            (RELATIVE, le("a\0b")),
        ] {
            decode(code, &text).unwrap_err();
        }
    }

    #[test]
    fn relative_path_is_encoded_for_windows() {
        assert_eq!(Locator::encode_relative("base.vhd"), le(".\\base.vhd"));
        assert_eq!(Locator::encode_relative("./base.vhd"), le(".\\base.vhd"));
        assert_eq!(Locator::encode_relative("../d/base.vhd"), le("..\\d\\base.vhd"));
    }
}
