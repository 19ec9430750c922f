//! A file in memory that records every write and flush, for tests that crash between them.

use std::fs::File;
use std::io;
use std::path::Path;
use std::sync::{Arc, Mutex};

use super::file::{ImageFile, Storage};

/// One recorded call.
#[derive(Clone, Debug)]
pub enum Event {
    /// Bytes written at an offset. A hole is a write of zeros.
    Write(u64, Vec<u8>),
    /// A change of length.
    SetLen(u64),
    /// Everything before it is durable.
    Flush,
}

#[derive(Default)]
struct Inner {
    bytes: Vec<u8>,
    log: Vec<Event>,
    /// Number of calls before the one that fails without any effect.
    fail_at: Option<usize>,
}

impl Inner {
    /// Counts this call, and fails it if it is the chosen one.
    fn fails(&mut self) -> io::Result<()> {
        match self.fail_at {
            Some(0) => {
                self.fail_at = None;
                Err(io::Error::from_raw_os_error(rustix::io::Errno::IO.raw_os_error()))
            }
            Some(n) => {
                self.fail_at = Some(n - 1);
                Ok(())
            }
            None => Ok(()),
        }
    }
}

/// The recorder. Clones are the same file.
#[derive(Clone, Default)]
pub struct Recorder(Arc<Mutex<Inner>>);

impl Recorder {
    /// Makes a file with these bytes and an empty log.
    pub fn new(bytes: Vec<u8>) -> Self {
        Self(Arc::new(Mutex::new(Inner { bytes, log: Vec::new(), fail_at: None })))
    }

    /// Opens the file.
    pub fn open(&self, writable: bool) -> ImageFile {
        ImageFile::new(Box::new(self.clone()), Path::new("/memory.image"), writable)
    }

    /// Makes the write, change of length or flush after `calls` others fail, once.
    pub fn fail_after(&self, calls: usize) {
        self.0.lock().unwrap().fail_at = Some(calls);
    }

    /// Returns true if the chosen call has failed.
    pub fn has_failed(&self) -> bool {
        self.0.lock().unwrap().fail_at.is_none()
    }

    /// The bytes in the file now.
    pub fn bytes(&self) -> Vec<u8> {
        self.0.lock().unwrap().bytes.clone()
    }

    /// The calls so far.
    pub fn log(&self) -> Vec<Event> {
        self.0.lock().unwrap().log.clone()
    }
}

/// Performs a write on bytes.
pub fn put(bytes: &mut Vec<u8>, offset: u64, data: &[u8]) {
    let at = offset as usize;
    if bytes.len() < at + data.len() {
        bytes.resize(at + data.len(), 0);
    }
    bytes[at..at + data.len()].copy_from_slice(data);
}

impl Storage for Recorder {
    fn read_at(&self, buf: &mut [u8], offset: u64) -> io::Result<usize> {
        let inner = self.0.lock().unwrap();
        let from = (offset as usize).min(inner.bytes.len());
        let n = buf.len().min(inner.bytes.len() - from);
        buf[..n].copy_from_slice(&inner.bytes[from..from + n]);
        Ok(n)
    }
    fn write_at(&self, buf: &[u8], offset: u64) -> io::Result<usize> {
        let mut inner = self.0.lock().unwrap();
        inner.fails()?;
        put(&mut inner.bytes, offset, buf);
        inner.log.push(Event::Write(offset, buf.to_vec()));
        Ok(buf.len())
    }
    fn len(&self) -> io::Result<u64> {
        Ok(self.0.lock().unwrap().bytes.len() as u64)
    }
    fn set_len(&self, len: u64) -> io::Result<()> {
        let mut inner = self.0.lock().unwrap();
        inner.fails()?;
        inner.bytes.resize(len as usize, 0);
        inner.log.push(Event::SetLen(len));
        Ok(())
    }
    fn flush(&self) -> io::Result<()> {
        let mut inner = self.0.lock().unwrap();
        inner.fails()?;
        inner.log.push(Event::Flush);
        Ok(())
    }
    fn punch(&self, offset: u64, len: u64) -> io::Result<()> {
        let mut inner = self.0.lock().unwrap();
        inner.fails()?;
        // A hole reads as zeros. Like a write, it may or may not be durable before the next flush. It does
        // not make the file longer.
        let end = (offset + len).min(inner.bytes.len() as u64);
        let zeros = vec![0; end.saturating_sub(offset) as usize];
        put(&mut inner.bytes, offset, &zeros);
        inner.log.push(Event::Write(offset, zeros));
        Ok(())
    }
    fn file(&self) -> Option<&File> {
        None
    }
}

/// A small random generator that gives the same numbers every time.
pub struct Seeded(pub u64);

impl Seeded {
    /// The next number.
    #[expect(clippy::should_implement_trait, reason = "it never ends")]
    pub fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }
}

/// Returns the file after a crash before event `at`: everything that was flushed, and of the rest the sectors
/// that the seed selects.
pub fn crashed(base: &[u8], log: &[Event], at: usize, seed: u64) -> Vec<u8> {
    let flushed = log[..at].iter().rposition(|e| matches!(e, Event::Flush)).map_or(0, |n| n + 1);
    let mut bytes = base.to_vec();
    let mut random = Seeded(seed | 1);
    // Three kinds of loss: everything, nothing, and single sectors.
    for (n, event) in log[..at].iter().enumerate() {
        match event {
            Event::Flush => {}
            Event::SetLen(len) => bytes.resize(*len as usize, 0),
            Event::Write(offset, data) if n < flushed => put(&mut bytes, *offset, data),
            Event::Write(offset, data) => {
                // Sectors of the file, not of the write.
                let mut from = 0;
                while from < data.len() {
                    let sector_end = 512 - ((*offset as usize + from) % 512);
                    let to = data.len().min(from + sector_end);
                    let keep = match seed {
                        0 => false,
                        1 => true,
                        _ => random.next() % 8 < seed % 7 + 1,
                    };
                    if keep {
                        put(&mut bytes, offset + from as u64, &data[from..to]);
                    }
                    from = to;
                }
            }
        }
    }
    bytes
}
