//! The end of a program's standard error, for error messages.

use std::collections::VecDeque;
use std::io::Read;
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::time::{Duration, Instant};

/// Bytes that are kept, from the end.
const KEPT: usize = 4096;

/// Time limit for the rest of the output of a dead program.
const REST: Duration = Duration::from_millis(500);

#[derive(Debug, Default)]
struct Tail {
    bytes: VecDeque<u8>,
    ended: bool,
}

/// The end of a program's standard error, recorded as it is written.
#[derive(Debug, Default)]
pub(crate) struct StderrTail {
    tail: Mutex<Tail>,
    ended: Condvar,
}

impl StderrTail {
    /// Records `stderr` on a thread of its own, until it ends.
    pub(crate) fn of(mut stderr: impl Read + Send + 'static) -> std::io::Result<Arc<Self>> {
        let recorded = Arc::new(Self::default());
        let writer = recorded.clone();
        std::thread::Builder::new().name("plug-in's stderr".to_owned()).spawn(move || {
            let mut buffer = [0; 4096];
            while let Ok(count @ 1..) = stderr.read(&mut buffer) {
                let mut tail = writer.tail.lock().unwrap_or_else(PoisonError::into_inner);
                tail.bytes.extend(&buffer[..count]);
                let surplus = tail.bytes.len().saturating_sub(KEPT);
                tail.bytes.drain(..surplus);
            }
            writer.tail.lock().unwrap_or_else(PoisonError::into_inner).ended = true;
            writer.ended.notify_all();
        })?;
        Ok(recorded)
    }

    /// Returns the recorded output of an ended program, on one line.
    pub(crate) fn text(&self) -> Option<String> {
        let begun = Instant::now();
        let mut tail = self.tail.lock().unwrap_or_else(PoisonError::into_inner);
        while !tail.ended && begun.elapsed() < REST {
            let waited = self.ended.wait_timeout(tail, REST.saturating_sub(begun.elapsed()));
            tail = waited.unwrap_or_else(PoisonError::into_inner).0;
        }
        let bytes: Vec<u8> = tail.bytes.iter().copied().collect();
        let text = String::from_utf8_lossy(&bytes);
        let lines: Vec<&str> = text.lines().map(str::trim).filter(|line| !line.is_empty()).collect();
        let text: String = lines.join(" | ").chars().map(|c| if c.is_control() { ' ' } else { c }).collect();
        (!text.is_empty()).then_some(text)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Only the end is kept, as one line of text.
    #[test]
    fn only_the_end_is_kept_as_one_line() {
        let mut said = vec![b'x'; 3 * KEPT];
        said.extend(b"\nTraceback\n\n\x1b[31mboom\xff\n");
        let text = StderrTail::of(std::io::Cursor::new(said)).unwrap().text().unwrap();
        assert!(text.len() <= KEPT + 16, "{} bytes", text.len());
        assert!(text.ends_with("x | Traceback |  [31mboom\u{fffd}"), "{text}");
        assert_eq!(StderrTail::of(std::io::empty()).unwrap().text(), None);
    }
}
