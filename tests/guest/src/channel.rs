//! What the guest's program says, and what it is asked (`src-guest/witness.c` has the lines).
//!
//! A thread reads the port as long as the [`Channel`] lives, from whichever QEMU serves its socket. Lines may
//! come again, or late, or by halves, after a machine was put back to an earlier instant: a line that is not
//! whole is not counted, and an answer is known by the id of its question, which is used once.

use std::{
    collections::HashMap,
    io::{ErrorKind, Read, Write},
    os::unix::net::UnixStream,
    path::{Path, PathBuf},
    process,
    sync::{
        Arc, Condvar, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    thread::{self, JoinHandle},
    time::{Duration, Instant, SystemTime},
};

use anyhow::{Context, Result, bail};

/// How often the thread looks whether it shall end, or whether there is a socket.
const LOOK: Duration = Duration::from_millis(100);
const RETRY: Duration = Duration::from_millis(5);

/// What the program says of itself.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub struct Status {
    /// The counter.
    pub ticks: u64,
    /// How often it found memory and disks to differ, by its own memory.
    pub bad: u64,
    /// The longest time between two ticks by the guest's own clock, which may stop while the machine
    /// does.
    pub gap: Duration,
    /// How many pages of 4 KiB [`Guest::dirty`](crate::Guest::dirty) has written.
    pub dirtied: u64,
    /// How many blocks [`Guest::blocks`](crate::Guest::blocks) has written.
    pub operations: u64,
    /// How long the guest has been up, by its own clock.
    pub up: Duration,
}

impl Status {
    fn from_answer(answer: &str) -> Result<Self> {
        let field = |name| number(answer, name);
        Ok(Self {
            ticks: field("ticks")?,
            bad: field("bad")?,
            gap: Duration::from_micros(field("gap_us")?),
            dirtied: field("dirtied")?,
            operations: field("operations")?,
            up: Duration::from_micros(field("up_us")?),
        })
    }
}

/// How many bytes of a disk hold its counter, from [`Guest::counter_offset`](crate::Guest::counter_offset)
/// on.
pub const COUNTER_BYTES: usize = SLOTS as usize * BLOCK;

const SLOTS: u64 = 8;
const BLOCK: usize = 4096;

/// The counter in the [`COUNTER_BYTES`] that hold it; none where they are not what one counter leaves.
pub fn counter(bytes: &[u8]) -> Option<u64> {
    let args = bytes.as_chunks::<8>().0.iter().map(|word| u64::from_le_bytes(*word)).collect::<Vec<_>>();
    let counter = *args.iter().max()?;
    let in_slot = |slot: u64| Some(counter - counter.checked_sub(slot)? % SLOTS);
    let whole = |(slot, block): (u64, &[u64])| block.iter().all(|&word| in_slot(slot) == Some(word));
    (bytes.len() == COUNTER_BYTES && (0..).zip(args.chunks(BLOCK / 8)).all(whole)).then_some(counter)
}

/// The value of a `name=` in an answer.
pub(crate) fn field<'a>(answer: &'a str, name: &str) -> Result<&'a str> {
    let found = answer.split(' ').find_map(|word| word.strip_prefix(name)?.strip_prefix('='));
    found.with_context(|| format!("the guest's answer has no {name}: {answer:?}"))
}

/// The same as a number.
pub(crate) fn number(answer: &str, name: &str) -> Result<u64> {
    let value = field(answer, name)?;
    value.parse().with_context(|| format!("the guest's {name} is no number: {value:?}"))
}

#[derive(Default)]
struct Heard {
    writer: Option<UnixStream>,
    tick: Option<u64>,
    /// How many ticks were heard.
    count: u64,
    heard_at: Option<Instant>,
    gap: Duration,
    bad: Vec<String>,
    boots: u64,
    counters: Vec<Option<u64>>,
    answers: HashMap<String, Option<String>>,
}

impl Heard {
    fn take(&mut self, line: &str, now: Instant) {
        match line.split_once(' ') {
            Some(("T", count)) => {
                let Ok(tick) = count.parse() else { return };
                if let Some(before) = self.heard_at {
                    self.gap = self.gap.max(now - before);
                }
                self.tick = Some(tick);
                self.count += 1;
                self.heard_at = Some(now);
            }
            Some(("BAD" | "ERR", _)) => self.bad.push(line.to_owned()),
            Some(("READY", rest)) => {
                let Ok(counters) = field(rest, "counters") else { return };
                self.counters = counters.split(',').map(|text| text.parse().ok()).collect();
                self.boots += 1;
            }
            Some(("R", rest)) => {
                // One that is not waited for any more is of an earlier instant.
                if let Some((id, answer)) = rest.split_once(' ')
                    && let Some(place) = self.answers.get_mut(id)
                {
                    *place = Some(answer.to_owned());
                }
            }
            _ => {}
        }
    }
}

struct Shared {
    socket: PathBuf,
    heard: Mutex<Heard>,
    changed: Condvar,
    end: AtomicBool,
}

pub(crate) struct Channel {
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
}

impl Channel {
    /// Reads whatever serves that socket from now on.
    pub(crate) fn open(socket: &Path) -> Self {
        let shared = Arc::new(Shared {
            socket: socket.to_owned(),
            heard: Mutex::default(),
            changed: Condvar::new(),
            end: AtomicBool::new(false),
        });
        let thread = thread::spawn({
            let shared = Arc::clone(&shared);
            move || shared.read()
        });
        Self { shared, thread: Some(thread) }
    }

    /// Asks the program, and waits for the answer, without its "ok".
    pub(crate) fn ask(&self, command: &str, deadline: Duration) -> Result<String> {
        let until = Instant::now() + deadline;
        let id = unique();
        self.shared.heard().answers.insert(id.clone(), None);
        let answer = self.send(&format!("\n{id} {command}\n"), until).and_then(|()| {
            self.wait(until, |heard| heard.answers.get(&id).cloned().flatten())
                .with_context(|| format!("the guest did not answer {command:?} within {deadline:?}"))
        });
        self.shared.heard().answers.remove(&id);
        let answer = answer?;
        match answer.split_once(' ') {
            None if answer == "ok" => Ok(String::new()),
            Some(("ok", rest)) => Ok(rest.to_owned()),
            _ => bail!("the guest answered {command:?} with {answer:?}"),
        }
    }

    pub(crate) fn status(&self, deadline: Duration) -> Result<Status> {
        Status::from_answer(&self.ask("status", deadline)?)
    }

    /// Waits until so many more ticks were heard.
    pub(crate) fn wait_ticks(&self, ticks: u64, deadline: Duration) -> Result<()> {
        // After an answer nothing is left of what was said before the question.
        self.status(deadline)?;
        let wanted = self.shared.heard().count + ticks;
        self.wait(Instant::now() + deadline, |heard| (heard.count >= wanted).then_some(()))
            .with_context(|| format!("the guest did not tick {ticks} times within {deadline:?}"))
    }

    /// Waits until the program has started so often, as far as this channel has heard.
    pub(crate) fn wait_boots(&self, boots: u64, until: Instant) -> Option<()> {
        self.wait(until, |heard| (heard.boots >= boots).then_some(()))
    }

    /// Whether this side of the port is open by now.
    pub(crate) fn wait_connected(&self, until: Instant) -> Option<()> {
        self.wait(until, |heard| heard.writer.is_some().then_some(()))
    }

    pub(crate) fn boots(&self) -> u64 {
        self.shared.heard().boots
    }

    pub(crate) fn counters(&self) -> Vec<Option<u64>> {
        self.shared.heard().counters.clone()
    }

    pub(crate) fn last_tick(&self) -> Option<u64> {
        self.shared.heard().tick
    }

    pub(crate) fn bad(&self) -> Vec<String> {
        self.shared.heard().bad.clone()
    }

    pub(crate) fn forget_bad(&self) {
        self.shared.heard().bad.clear();
    }

    /// The longest time between two ticks, the one since the last tick included.
    pub(crate) fn gap(&self) -> Duration {
        let heard = self.shared.heard();
        heard.gap.max(heard.heard_at.map_or(Duration::ZERO, |at| at.elapsed()))
    }

    pub(crate) fn forget_gap(&self) {
        let mut heard = self.shared.heard();
        heard.gap = Duration::ZERO;
        heard.heard_at = heard.heard_at.map(|_| Instant::now());
    }

    fn send(&self, line: &str, until: Instant) -> Result<()> {
        self.wait_connected(until).with_context(|| {
            format!("no QEMU serves {}: it has ended, or has not started", self.shared.socket.display())
        })?;
        let writer = self.shared.heard().writer.as_ref().map(UnixStream::try_clone).transpose()?;
        let Some(mut writer) = writer else { bail!("QEMU has just ended") };
        writer.write_all(line.as_bytes()).context("the guest's port does not take a command")
    }

    fn wait<T>(&self, until: Instant, mut found: impl FnMut(&Heard) -> Option<T>) -> Option<T> {
        let mut heard = self.shared.heard();
        loop {
            if let Some(found) = found(&heard) {
                return Some(found);
            }
            let left = until.checked_duration_since(Instant::now())?;
            heard = self.shared.changed.wait_timeout(heard, left).unwrap_or_else(PoisonError::into_inner).0;
        }
    }
}

impl Drop for Channel {
    fn drop(&mut self) {
        self.shared.end.store(true, Ordering::Relaxed);
        if let Some(writer) = &self.shared.heard().writer {
            let _ = writer.shutdown(std::net::Shutdown::Both);
        }
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

impl Shared {
    fn heard(&self) -> MutexGuard<'_, Heard> {
        self.heard.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn read(&self) {
        while !self.end.load(Ordering::Relaxed) {
            match self.connect() {
                Ok((reader, writer)) => {
                    self.heard().writer = Some(writer);
                    self.changed.notify_all();
                    self.read_lines(reader);
                    self.heard().writer = None;
                }
                Err(_) => thread::sleep(RETRY),
            }
        }
    }

    fn connect(&self) -> std::io::Result<(UnixStream, UnixStream)> {
        let stream = UnixStream::connect(&self.socket)?;
        stream.set_read_timeout(Some(LOOK))?;
        stream.set_write_timeout(Some(Duration::from_secs(10)))?;
        Ok((stream.try_clone()?, stream))
    }

    fn read_lines(&self, mut reader: UnixStream) {
        let (mut chunk, mut partial) = (vec![0; 65536], Vec::new());
        while !self.end.load(Ordering::Relaxed) {
            let size = match reader.read(&mut chunk) {
                Ok(0) => return,
                Ok(size) => size,
                Err(error) if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::Interrupted) => {
                    continue;
                }
                Err(_) => return,
            };
            let now = Instant::now();
            partial.extend_from_slice(&chunk[..size]);
            let Some(end) = partial.iter().rposition(|&byte| byte == b'\n') else { continue };
            let rest = partial.split_off(end + 1);
            {
                let mut heard = self.heard();
                for line in partial.split(|&byte| byte == b'\n') {
                    heard.take(&String::from_utf8_lossy(line), now);
                }
            }
            self.changed.notify_all();
            partial = rest;
        }
    }
}

/// A word that no question ever had.
fn unique() -> String {
    static NUMBER: AtomicU64 = AtomicU64::new(0);
    let time = SystemTime::UNIX_EPOCH.elapsed().unwrap_or_default().as_nanos();
    format!("{time:x}-{:x}-{:x}", process::id(), NUMBER.fetch_add(1, Ordering::Relaxed))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ring(counter: u64) -> Vec<u8> {
        let last = |slot| (1..=counter).rev().find(|value| value % 8 == slot).expect("it came by");
        (0..8).flat_map(|slot| last(slot).to_le_bytes().repeat(512)).collect()
    }

    /// A counter is read from its ring and not from a broken one.
    #[test]
    fn counter_is_read_from_an_intact_ring() {
        for value in [8, 9, 15, 16, 1001] {
            assert_eq!(counter(&ring(value)), Some(value));
        }
        let mut one_byte = ring(1001);
        one_byte[20000] ^= 1;
        assert_eq!(counter(&one_byte), None);
        let mut two_instants = ring(1001);
        two_instants[..4096].copy_from_slice(&ring(990)[..4096]);
        assert_eq!(counter(&two_instants), None);
        assert_eq!(counter(&ring(9)[4096..]), None);
        assert_eq!(counter(&[]), None);
    }

    /// An answer to a question of an earlier instant is not taken.
    #[test]
    fn answer_to_an_earlier_question_is_ignored() {
        let mut heard = Heard::default();
        heard.answers.insert("new".into(), None);
        let now = Instant::now();
        for line in ["R old ok ticks=1", "R new ok ticks=2"] {
            heard.take(line, now);
        }
        assert_eq!(heard.answers["new"].as_deref(), Some("ok ticks=2"));
        assert_eq!(heard.answers.len(), 1);
    }

    /// The longest time between two ticks is kept and halves of lines are not counted.
    #[test]
    fn longest_pause_is_kept() {
        let mut heard = Heard::default();
        let begin = Instant::now();
        for (line, ms) in [("T 7", 0), ("T 8", 30), ("T 3T 4", 35), ("T 9", 40), ("BAD memory=9 disks=8", 41)]
        {
            heard.take(line, begin + Duration::from_millis(ms));
        }
        assert_eq!((heard.tick, heard.count, heard.gap), (Some(9), 3, Duration::from_millis(30)));
        assert_eq!(heard.bad, ["BAD memory=9 disks=8"]);
    }
}
