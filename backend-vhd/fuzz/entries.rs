//! The functions of the fuzz targets. They are plain functions, so that a test can run them without a fuzzer.
//!
//! An image may be refused; it may not panic, and what is written to one that was accepted is read again.

use std::fs::File;
use std::io;
use std::path::Path;
use std::sync::{Arc, Mutex};

use backend_vhd::image::{BlockSize, Chain, ImageFile, Layer, Vhd};
use image_files::engine::file::Storage;

/// One entry: takes any bytes.
type Entry = fn(&[u8]);

/// All entries, by the name of their target.
#[allow(dead_code, reason = "a fuzz target uses one entry, the test uses the table")]
pub const ENTRIES: [(&str, Entry); 2] = [("image", image), ("resealed", resealed)];

/// Pieces of a disk that are looked at.
const PIECES: usize = 2000;

/// A file in memory.
#[derive(Clone)]
struct Bytes(Arc<Mutex<Vec<u8>>>);

impl Storage for Bytes {
    fn read_at(&self, buf: &mut [u8], offset: u64) -> io::Result<usize> {
        let bytes = self.0.lock().expect("no thread panics");
        let from = usize::try_from(offset).unwrap_or(usize::MAX).min(bytes.len());
        let n = buf.len().min(bytes.len() - from);
        buf[..n].copy_from_slice(&bytes[from..from + n]);
        Ok(n)
    }
    fn write_at(&self, buf: &[u8], offset: u64) -> io::Result<usize> {
        let mut bytes = self.0.lock().expect("no thread panics");
        let end = offset as usize + buf.len();
        assert!(end < 1 << 30, "a write far behind the end of the file");
        if bytes.len() < end {
            bytes.resize(end, 0);
        }
        bytes[offset as usize..end].copy_from_slice(buf);
        Ok(buf.len())
    }
    fn len(&self) -> io::Result<u64> {
        Ok(self.0.lock().expect("no thread panics").len() as u64)
    }
    fn set_len(&self, len: u64) -> io::Result<()> {
        self.0.lock().expect("no thread panics").resize(len as usize, 0);
        Ok(())
    }
    fn flush(&self) -> io::Result<()> {
        Ok(())
    }
    fn punch(&self, _offset: u64, _len: u64) -> io::Result<()> {
        Err(io::ErrorKind::Unsupported.into())
    }
    fn file(&self) -> Option<&File> {
        None
    }
}

fn open(bytes: &Bytes) -> Option<Vhd> {
    Vhd::from_file(ImageFile::new(Box::new(bytes.clone()), Path::new("/fuzzed.vhd"), true)).ok()
}

/// A whole file: footers, header, locators, BAT, batmap, bitmaps, data.
pub fn image(bytes: &[u8]) {
    let bytes = Bytes(Arc::new(Mutex::new(bytes.to_vec())));
    let Some(mut image) = open(&bytes) else { return };
    let _ = image.check(true);
    let _ = image.locators();
    if let Some(header) = image.header() {
        let _ = header.parent_name();
        assert!(BlockSize::new(header.block().bytes() as u32).is_some());
    }
    let size = image.size();
    let Ok(mut chain) = Chain::new(vec![Layer::Vhd(Box::new(image))]) else { return };
    let mut at = 0;
    for _ in 0..PIECES {
        match chain.piece(at) {
            Ok(Some(piece)) => {
                assert!(piece.end > at && piece.end <= size);
                at = piece.end;
            }
            Ok(None) | Err(_) => break,
        }
    }
    let mut buf = vec![0; size.min(1 << 20) as usize];
    let _ = chain.read_at(&mut buf, 0);
    let from = size - buf.len() as u64;
    let _ = chain.read_at(&mut buf, from);
    let last = (size - 1) / 512 * 512;
    let written = chain.write_at(&[0xA5; 512], last).is_ok() && chain.flush().is_ok();
    drop(chain);
    if written {
        let image = open(&bytes).expect("what was written opens");
        let mut chain = Chain::new(vec![Layer::Vhd(Box::new(image))]).expect("one layer");
        let mut sector = [0; 512];
        chain.read_at(&mut sector, last).expect("what was written is read");
        assert_eq!(sector, [0xA5; 512]);
    } else if let Some(mut image) = open(&bytes) {
        let _ = image.repair();
        let _ = open(&bytes).map(|mut image| image.grow(size + 512));
    }
}

/// The same, with right checksums in footers and header, which a mutation seldom keeps.
pub fn resealed(bytes: &[u8]) {
    let mut bytes = bytes.to_vec();
    let end = bytes.len().wrapping_sub(512);
    for (at, len, field) in [(0, 512, 64), (512, 1024, 36), (end, 512, 64)] {
        let Some(part) = bytes.get_mut(at..).and_then(|rest| rest.get_mut(..len)) else { continue };
        part[field..field + 4].fill(0);
        let sum = part.iter().fold(0u32, |sum, byte| sum.wrapping_add(u32::from(*byte)));
        part[field..field + 4].copy_from_slice(&(!sum).to_be_bytes());
    }
    image(&bytes);
}
