//! The last words of a program.

use std::collections::VecDeque;
use std::io::Read;
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::time::{Duration, Instant};

/// What is kept of a program's standard error: the end of it.
const KEPT: usize = 4096;

/// How long one waits for a dead program's last words.
const LAST: Duration = Duration::from_millis(500);

#[derive(Debug, Default)]
struct Tail {
    bytes: VecDeque<u8>,
    ended: bool,
}

/// The end of what a program writes to its standard error, as it is written.
#[derive(Debug, Default)]
pub(crate) struct LastWords {
    tail: Mutex<Tail>,
    ended: Condvar,
}

impl LastWords {
    /// Listens to `stderr` on a thread of its own, until it ends.
    pub(crate) fn of(mut stderr: impl Read + Send + 'static) -> std::io::Result<Arc<Self>> {
        let words = Arc::new(Self::default());
        let heard = words.clone();
        std::thread::Builder::new().name("plug-in's stderr".to_owned()).spawn(move || {
            let mut buffer = [0; 4096];
            while let Ok(count @ 1..) = stderr.read(&mut buffer) {
                let mut tail = heard.tail.lock().unwrap_or_else(PoisonError::into_inner);
                tail.bytes.extend(&buffer[..count]);
                let surplus = tail.bytes.len().saturating_sub(KEPT);
                tail.bytes.drain(..surplus);
            }
            heard.tail.lock().unwrap_or_else(PoisonError::into_inner).ended = true;
            heard.ended.notify_all();
        })?;
        Ok(words)
    }

    /// Them, on one line, of a program that has ended.
    pub(crate) fn told(&self) -> Option<String> {
        let begun = Instant::now();
        let mut tail = self.tail.lock().unwrap_or_else(PoisonError::into_inner);
        while !tail.ended && begun.elapsed() < LAST {
            let waited = self.ended.wait_timeout(tail, LAST.saturating_sub(begun.elapsed()));
            tail = waited.unwrap_or_else(PoisonError::into_inner).0;
        }
        let bytes: Vec<u8> = tail.bytes.iter().copied().collect();
        let text = String::from_utf8_lossy(&bytes);
        let lines: Vec<&str> = text.lines().map(str::trim).filter(|line| !line.is_empty()).collect();
        let words: String = lines.join(" | ").chars().map(|c| if c.is_control() { ' ' } else { c }).collect();
        (!words.is_empty()).then_some(words)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_end_is_kept_and_it_is_one_line_of_text() {
        let mut said = vec![b'x'; 3 * KEPT];
        said.extend(b"\nTraceback\n\n\x1b[31mboom\xff\n");
        let words = LastWords::of(std::io::Cursor::new(said)).unwrap().told().unwrap();
        assert!(words.len() <= KEPT + 16, "{} bytes", words.len());
        assert!(words.ends_with("x | Traceback |  [31mboom\u{fffd}"), "{words}");
        assert_eq!(LastWords::of(std::io::empty()).unwrap().told(), None);
    }
}
