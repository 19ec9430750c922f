//! A file in memory that records every write and flush, for tests that crash between them.

use std::fs::File;
use std::io;
use std::path::Path;
use std::sync::{Arc, Mutex};

use super::file::{ImageFile, Storage};

/// One recorded call.
#[derive(Clone, Debug)]
pub(crate) enum Event {
    Write(u64, Vec<u8>),
    SetLen(u64),
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
pub(crate) struct Recorder(Arc<Mutex<Inner>>);

impl Recorder {
    pub(crate) fn new(bytes: Vec<u8>) -> Self {
        Self(Arc::new(Mutex::new(Inner { bytes, log: Vec::new(), fail_at: None })))
    }

    pub(crate) fn open(&self, writable: bool) -> ImageFile {
        ImageFile::new(Box::new(self.clone()), Path::new("/memory.qcow2"), writable)
    }

    /// Makes the write, change of length or flush after `calls` others fail, once.
    pub(crate) fn fail_after(&self, calls: usize) {
        self.0.lock().unwrap().fail_at = Some(calls);
    }

    /// Returns true if the chosen call has failed.
    pub(crate) fn has_failed(&self) -> bool {
        self.0.lock().unwrap().fail_at.is_none()
    }

    pub(crate) fn bytes(&self) -> Vec<u8> {
        self.0.lock().unwrap().bytes.clone()
    }

    pub(crate) fn log(&self) -> Vec<Event> {
        self.0.lock().unwrap().log.clone()
    }
}

/// Performs a write on bytes.
pub(crate) fn put(bytes: &mut Vec<u8>, offset: u64, data: &[u8]) {
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
