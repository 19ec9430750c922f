//! Negotiation, before the disk is served.
//!
//! There is one export, with the empty name. A client that does not come to an end within [`PATIENCE`] is
//! disconnected, so that it does not hold a thread.

use std::io::{self, Read, Write};
use std::time::{Duration, Instant};

use crate::wire::*;

/// Bytes of an option's data.
pub(crate) const MAX_OPTION: usize = 4 << 10;
/// Bytes of an option's data that are read and dropped, so that the refusal reaches the client.
const MAX_DROPPED: u64 = 64 << 10;
/// Time for the whole negotiation.
pub(crate) const PATIENCE: Duration = Duration::from_secs(10);
/// Options of one negotiation.
const MAX_OPTIONS: usize = 256;
/// The largest request, which the client is sent.
pub(crate) const MAX_REQUEST: u32 = 32 << 20;

/// Properties of the export that the client is sent.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct Export {
    /// Bytes.
    pub size: u64,
    /// The smallest unit of requests.
    pub alignment: u32,
    pub read_only: bool,
}

impl Export {
    fn flags(self) -> u16 {
        let common = FLAG_HAS_FLAGS | FLAG_SEND_FLUSH | FLAG_SEND_DF;
        match self.read_only {
            true => common | FLAG_READ_ONLY,
            false => common | FLAG_SEND_FUA | FLAG_SEND_TRIM | FLAG_SEND_WRITE_ZEROES | FLAG_SEND_FAST_ZERO,
        }
    }
}

/// What both sides agreed on.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub(crate) struct Agreed {
    /// Replies to reads and errors are structured.
    pub structured: bool,
    /// The client may ask for `base:allocation`.
    pub allocation: bool,
}

/// One connection during the negotiation.
struct Negotiation<'a, S> {
    stream: &'a mut S,
    export: Export,
    agreed: Agreed,
    no_zeroes: bool,
    until: Instant,
}

/// A stream of which one read can be limited in time.
pub(crate) trait Timed: Read + Write {
    /// Limits the next reads and writes; `None`: no limit.
    fn limit(&mut self, time: Option<Duration>) -> io::Result<()>;
}

impl Timed for std::os::unix::net::UnixStream {
    fn limit(&mut self, time: Option<Duration>) -> io::Result<()> {
        self.set_read_timeout(time)?;
        self.set_write_timeout(time)
    }
}

/// Negotiates. Calls `admit` when the client wants the disk. Returns what it gave, `None` if the client went
/// away or was sent away.
///
/// # Errors
/// The system's; `InvalidData` where the client does not speak the protocol, and `TimedOut` where it is slow.
pub(crate) fn negotiate<S: Timed, T>(
    stream: &mut S,
    export: impl Fn() -> Export,
    mut admit: impl FnMut() -> Result<T, String>,
) -> io::Result<Option<(T, Agreed)>> {
    let until = Instant::now() + PATIENCE;
    let mut greeting = Vec::with_capacity(18);
    greeting.extend(SERVER_MAGIC.to_be_bytes());
    greeting.extend(OPTION_MAGIC.to_be_bytes());
    greeting.extend((HANDSHAKE_FIXED | HANDSHAKE_NO_ZEROES).to_be_bytes());
    let (agreed, no_zeroes) = (Agreed::default(), false);
    let mut talk = Negotiation { stream, export: export(), agreed, no_zeroes, until };
    talk.send(&greeting)?;
    let flags = talk.receive::<4>().map(u32::from_be_bytes)?;
    let known = u32::from(HANDSHAKE_FIXED | HANDSHAKE_NO_ZEROES);
    if flags & !known != 0 || flags & u32::from(HANDSHAKE_FIXED) == 0 {
        return Err(invalid("the client does not know the fixed newstyle handshake"));
    }
    talk.no_zeroes = flags & u32::from(HANDSHAKE_NO_ZEROES) != 0;
    for _ in 0..MAX_OPTIONS {
        let Some((option, data)) = talk.option()? else { continue };
        // The image may be exchanged during the negotiation.
        talk.export = export();
        match talk.answer(option, &data)? {
            Next::Option => {}
            Next::Close => return Ok(None),
            Next::Serve => match admit() {
                Ok(admitted) => {
                    talk.export = export();
                    talk.begin(option)?;
                    let agreed = talk.agreed;
                    stream.limit(None)?;
                    return Ok(Some((admitted, agreed)));
                }
                // `EXPORT_NAME` has no reply for an error.
                Err(_) if option == OPT_EXPORT_NAME => return Ok(None),
                Err(why) => talk.reply(option, REP_ERR_POLICY, why.as_bytes())?,
            },
        }
    }
    Err(invalid("the client sent too many options"))
}

/// What follows an option.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Next {
    Option,
    Serve,
    Close,
}

impl<S: Timed> Negotiation<'_, S> {
    fn left(&mut self) -> io::Result<()> {
        let left = self.until.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Err(io::Error::from(io::ErrorKind::TimedOut));
        }
        self.stream.limit(Some(left))
    }

    /// Reads all of `buf`. The limit is for the whole, not for each byte of it.
    fn fill(&mut self, mut buf: &mut [u8]) -> io::Result<()> {
        while !buf.is_empty() {
            self.left()?;
            match self.stream.read(buf) {
                Ok(0) => return Err(io::Error::from(io::ErrorKind::UnexpectedEof)),
                Ok(n) => buf = buf.get_mut(n..).unwrap_or_default(),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }

    fn receive<const N: usize>(&mut self) -> io::Result<[u8; N]> {
        let mut bytes = [0; N];
        self.fill(&mut bytes)?;
        Ok(bytes)
    }

    fn send(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.left()?;
        self.stream.write_all(bytes)
    }

    /// Receives an option. `None` if it was refused for its size.
    fn option(&mut self) -> io::Result<Option<(u32, Vec<u8>)>> {
        let head: [u8; 16] = self.receive()?;
        let mut fields = Fields(&head);
        let (Some(magic), Some(option), Some(length)) = (fields.u64(), fields.u32(), fields.u32()) else {
            return Err(invalid("an option's head is too short"));
        };
        if magic != OPTION_MAGIC {
            return Err(invalid("an option does not begin as one"));
        }
        let length = u64::from(length);
        if length > MAX_OPTION as u64 {
            if length > MAX_DROPPED {
                return Err(invalid("an option is too long"));
            }
            let mut left = length as usize;
            let mut dropped = [0; 4096];
            while left > 0 {
                let part = left.min(dropped.len());
                self.fill(dropped.get_mut(..part).unwrap_or_default())?;
                left -= part;
            }
            if option == OPT_EXPORT_NAME {
                return Err(invalid("an export name is too long"));
            }
            self.reply(option, REP_ERR_TOO_BIG, b"the option is longer than 4096 bytes")?;
            return Ok(None);
        }
        let mut data = vec![0; length as usize];
        self.fill(&mut data)?;
        Ok(Some((option, data)))
    }

    fn reply(&mut self, option: u32, kind: u32, data: &[u8]) -> io::Result<()> {
        let mut bytes = Vec::with_capacity(20 + data.len());
        bytes.extend(OPTION_REPLY_MAGIC.to_be_bytes());
        bytes.extend(option.to_be_bytes());
        bytes.extend(kind.to_be_bytes());
        bytes.extend(u32::try_from(data.len()).unwrap_or(u32::MAX).to_be_bytes());
        bytes.extend(data);
        self.send(&bytes)
    }

    fn answer(&mut self, option: u32, data: &[u8]) -> io::Result<Next> {
        match option {
            OPT_EXPORT_NAME => return Ok(if data.is_empty() { Next::Serve } else { Next::Close }),
            OPT_ABORT => {
                // A client may be gone without waiting for the reply.
                let _ = self.reply(option, REP_ACK, b"");
                return Ok(Next::Close);
            }
            OPT_LIST if data.is_empty() => {
                self.reply(option, REP_SERVER, &0u32.to_be_bytes())?;
                self.reply(option, REP_ACK, b"")?;
            }
            OPT_STRUCTURED_REPLY if data.is_empty() => {
                self.agreed.structured = true;
                self.reply(option, REP_ACK, b"")?;
            }
            OPT_INFO | OPT_GO => return self.describe(option, data),
            OPT_LIST_META_CONTEXT | OPT_SET_META_CONTEXT => self.contexts(option, data)?,
            OPT_LIST | OPT_STRUCTURED_REPLY => {
                self.reply(option, REP_ERR_INVALID, b"this option has no data")?;
            }
            _ => self.reply(option, REP_ERR_UNSUP, b"this server does not know the option")?,
        }
        Ok(Next::Option)
    }

    /// Answers `INFO` and `GO`: everything but the last word of `GO`.
    fn describe(&mut self, option: u32, data: &[u8]) -> io::Result<Next> {
        let Some((name, wanted)) = parse_info(data) else {
            self.reply(option, REP_ERR_INVALID, b"the option's data are not as long as they say")?;
            return Ok(Next::Option);
        };
        if !name.is_empty() {
            self.reply(option, REP_ERR_UNKNOWN, b"the only export has the empty name")?;
            return Ok(Next::Option);
        }
        if option == OPT_GO {
            if wanted.contains(&INFO_NAME) {
                self.reply(option, REP_INFO, &INFO_NAME.to_be_bytes())?;
            }
            return Ok(Next::Serve);
        }
        if wanted.contains(&INFO_NAME) {
            self.reply(option, REP_INFO, &INFO_NAME.to_be_bytes())?;
        }
        self.properties(option)?;
        self.reply(option, REP_ACK, b"")?;
        Ok(Next::Option)
    }

    fn properties(&mut self, option: u32) -> io::Result<()> {
        let Export { size, alignment, .. } = self.export;
        let mut export = Vec::with_capacity(12);
        export.extend(INFO_EXPORT.to_be_bytes());
        export.extend(size.to_be_bytes());
        export.extend(self.export.flags().to_be_bytes());
        self.reply(option, REP_INFO, &export)?;
        let mut block = Vec::with_capacity(14);
        block.extend(INFO_BLOCK_SIZE.to_be_bytes());
        for bytes in [alignment, alignment.max(4096), MAX_REQUEST] {
            block.extend(bytes.to_be_bytes());
        }
        self.reply(option, REP_INFO, &block)
    }

    /// Informs an admitted client that the transmission begins.
    fn begin(&mut self, option: u32) -> io::Result<()> {
        if option == OPT_GO {
            self.properties(option)?;
            return self.reply(option, REP_ACK, b"");
        }
        let mut bytes = Vec::with_capacity(134);
        bytes.extend(self.export.size.to_be_bytes());
        bytes.extend(self.export.flags().to_be_bytes());
        if !self.no_zeroes {
            bytes.extend([0; 124]);
        }
        self.send(&bytes)
    }

    fn contexts(&mut self, option: u32, data: &[u8]) -> io::Result<()> {
        if option == OPT_SET_META_CONTEXT {
            // A new choice replaces the previous one, also if it fails.
            self.agreed.allocation = false;
        }
        if !self.agreed.structured {
            return self.reply(option, REP_ERR_INVALID, b"structured replies must be agreed on first");
        }
        let Some((name, queries)) = parse_contexts(data) else {
            return self.reply(option, REP_ERR_INVALID, b"the option's data are not as long as they say");
        };
        if !name.is_empty() {
            return self.reply(option, REP_ERR_UNKNOWN, b"the only export has the empty name");
        }
        let listing = option == OPT_LIST_META_CONTEXT;
        let found = match queries.is_empty() {
            true => listing,
            false => queries
                .iter()
                .any(|query| *query == ALLOCATION.as_bytes() || (listing && *query == b"base:".as_slice())),
        };
        if found {
            let mut bytes = ALLOCATION_ID.to_be_bytes().to_vec();
            bytes.extend(ALLOCATION.as_bytes());
            self.reply(option, REP_META_CONTEXT, &bytes)?;
            self.agreed.allocation |= !listing;
        }
        self.reply(option, REP_ACK, b"")
    }
}

/// Reads the data of `INFO` and `GO`: the export's name, and the wanted kinds of information.
pub(crate) fn parse_info(data: &[u8]) -> Option<(&[u8], Vec<u16>)> {
    let mut fields = Fields(data);
    let name = fields.string()?;
    let count = fields.u16()?;
    let wanted = (0..count).map(|_| fields.u16()).collect::<Option<Vec<_>>>()?;
    fields.is_empty().then_some((name, wanted))
}

/// Reads the data of the options about metadata contexts: the export's name, and the queries.
pub(crate) fn parse_contexts(data: &[u8]) -> Option<(&[u8], Vec<&[u8]>)> {
    let mut fields = Fields(data);
    let name = fields.string()?;
    let count = fields.u32()?;
    // Each query has four bytes at least, so this ends before memory does.
    let mut queries = Vec::new();
    for _ in 0..count {
        queries.push(fields.string()?);
    }
    fields.is_empty().then_some((name, queries))
}

fn invalid(message: &'static str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, message)
}
