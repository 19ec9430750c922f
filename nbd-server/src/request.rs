//! One request, parsed and checked, and the bytes of replies.

use crate::image::{Content, Extent};
use crate::option::{Agreed, Export, MAX_REQUEST};
use crate::wire::*;

/// Bytes of a request's head.
pub(crate) const HEAD: usize = 28;
/// The most extents in one reply about allocation.
pub(crate) const MAX_EXTENTS: usize = 4096;

/// A request's head as it came.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct Request {
    pub flags: u16,
    pub kind: u16,
    /// The client's name of the request.
    pub cookie: u64,
    pub offset: u64,
    pub length: u32,
}

/// A request to carry out.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Command {
    Read,
    Write { fua: bool },
    Flush,
    Trim { fua: bool },
    Zero { fua: bool, may_free: bool, fast_only: bool },
    Status { one: bool },
}

/// A request that is answered with an error.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct Refusal(pub Errno, pub &'static str);

impl Request {
    /// Reads the head. `None` if it does not begin as one: then nothing that follows can be understood.
    pub(crate) fn parse(bytes: &[u8; HEAD]) -> Option<Self> {
        let mut fields = Fields(bytes);
        if fields.u32()? != REQUEST_MAGIC {
            return None;
        }
        let (flags, kind) = (fields.u16()?, fields.u16()?);
        Some(Self { flags, kind, cookie: fields.u64()?, offset: fields.u64()?, length: fields.u32()? })
    }

    /// Bytes of data that follow the head.
    pub(crate) fn payload(&self) -> u32 {
        if self.kind == CMD_WRITE { self.length } else { 0 }
    }

    /// Checks the request against what was agreed and the export as it is now.
    pub(crate) fn check(&self, agreed: Agreed, export: Export) -> Result<Command, Refusal> {
        let allowed = match self.kind {
            CMD_READ => CMD_FLAG_DF | CMD_FLAG_FUA,
            CMD_WRITE | CMD_TRIM | CMD_FLUSH => CMD_FLAG_FUA,
            CMD_WRITE_ZEROES => CMD_FLAG_FUA | CMD_FLAG_NO_HOLE | CMD_FLAG_FAST_ZERO,
            CMD_BLOCK_STATUS => CMD_FLAG_REQ_ONE | CMD_FLAG_FUA,
            _ => return Err(Refusal(Errno::Inval, "the server does not know the command")),
        };
        if self.flags & !allowed != 0 {
            return Err(Refusal(Errno::Inval, "the command does not have such a flag"));
        }
        let fua = self.flags & CMD_FLAG_FUA != 0;
        let command = match self.kind {
            CMD_READ => Command::Read,
            CMD_WRITE => Command::Write { fua },
            CMD_FLUSH => Command::Flush,
            CMD_TRIM => Command::Trim { fua },
            CMD_WRITE_ZEROES => Command::Zero {
                fua,
                may_free: self.flags & CMD_FLAG_NO_HOLE == 0,
                fast_only: self.flags & CMD_FLAG_FAST_ZERO != 0,
            },
            _ if !agreed.allocation => {
                return Err(Refusal(Errno::Inval, "no metadata context was agreed on"));
            }
            _ => Command::Status { one: self.flags & CMD_FLAG_REQ_ONE != 0 },
        };
        self.check_range(command, export)?;
        Ok(command)
    }

    fn check_range(&self, command: Command, export: Export) -> Result<(), Refusal> {
        if command == Command::Flush {
            return match (self.offset, self.length) {
                (0, 0) => Ok(()),
                _ => Err(Refusal(Errno::Inval, "a flush has no range")),
            };
        }
        let writes = matches!(command, Command::Write { .. } | Command::Zero { .. } | Command::Trim { .. });
        if writes && export.read_only {
            return Err(Refusal(Errno::Perm, "the export is read-only"));
        }
        if self.length == 0 {
            return Err(Refusal(Errno::Inval, "the range is empty"));
        }
        if matches!(command, Command::Read | Command::Write { .. }) && self.length > MAX_REQUEST {
            return Err(Refusal(Errno::Inval, "the range is longer than 32 MiB"));
        }
        let end = self.offset.checked_add(u64::from(self.length));
        if end.is_none_or(|end| end > export.size) {
            // As the specification asks and QEMU's server does: a write that does not fit finds no space.
            let number = match command {
                Command::Write { .. } | Command::Zero { .. } => Errno::NoSpace,
                _ => Errno::Inval,
            };
            return Err(Refusal(number, "the range ends past the disk's end"));
        }
        let unit = u64::from(export.alignment);
        if !self.offset.is_multiple_of(unit) || !u64::from(self.length).is_multiple_of(unit) {
            return Err(Refusal(Errno::Inval, "the range is not aligned to the smallest block size"));
        }
        Ok(())
    }
}

/// Puts the head of a successful read before the data. `bytes` begins with [`read_head`] free bytes.
pub(crate) fn fill_read_head(bytes: &mut [u8], agreed: Agreed, request: &Request) {
    let head = match agreed.structured {
        false => simple(request.cookie, 0).to_vec(),
        true => {
            let mut head = chunk(request.cookie, REPLY_OFFSET_DATA, request.length.saturating_add(8));
            head.extend(request.offset.to_be_bytes());
            head
        }
    };
    if let Some(place) = bytes.get_mut(..head.len()) {
        place.copy_from_slice(&head);
    }
}

/// Bytes before the data of a read.
pub(crate) fn read_head(agreed: Agreed) -> usize {
    if agreed.structured { 28 } else { 16 }
}

/// The reply to a command without data.
pub(crate) fn done(request: &Request) -> Vec<u8> {
    simple(request.cookie, 0).to_vec()
}

/// The reply that refuses a request.
pub(crate) fn refused(agreed: Agreed, request: &Request, number: Errno, message: &str) -> Vec<u8> {
    if !agreed.structured {
        return simple(request.cookie, number as u32).to_vec();
    }
    let message = message.as_bytes();
    // The specification's limit of a string.
    let message = message.get(..message.len().min(4096)).unwrap_or_default();
    let mut bytes = chunk(request.cookie, REPLY_ERROR, 6 + message.len() as u32);
    bytes.extend((number as u32).to_be_bytes());
    bytes.extend((message.len() as u16).to_be_bytes());
    bytes.extend(message);
    bytes
}

/// The reply about allocation. The extents are cut at the end of the request.
pub(crate) fn status(request: &Request, extents: &[Extent], one: bool) -> Vec<u8> {
    let mut reported: Vec<(u32, u32)> = Vec::new();
    let mut left = request.length;
    for extent in extents {
        let length = u32::try_from(extent.length).unwrap_or(u32::MAX).min(left);
        let flags = match extent.content {
            Content::Data => 0,
            Content::Zero => STATE_ZERO,
            Content::Hole => STATE_ZERO | STATE_HOLE,
        };
        left -= length;
        match reported.last_mut() {
            _ if length == 0 => {}
            Some(last) if last.1 == flags => last.0 += length,
            Some(_) if one => break,
            _ => reported.push((length, flags)),
        }
    }
    let mut bytes = chunk(request.cookie, REPLY_BLOCK_STATUS, 4 + 8 * reported.len() as u32);
    bytes.extend(ALLOCATION_ID.to_be_bytes());
    for (length, flags) in reported {
        bytes.extend(length.to_be_bytes());
        bytes.extend(flags.to_be_bytes());
    }
    bytes
}

fn simple(cookie: u64, number: u32) -> [u8; 16] {
    let mut bytes = [0; 16];
    bytes[..4].copy_from_slice(&SIMPLE_REPLY_MAGIC.to_be_bytes());
    bytes[4..8].copy_from_slice(&number.to_be_bytes());
    bytes[8..].copy_from_slice(&cookie.to_be_bytes());
    bytes
}

/// The head of a chunk that is the only one of its reply.
fn chunk(cookie: u64, kind: u16, length: u32) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(20 + length.min(64 << 10) as usize);
    bytes.extend(STRUCTURED_REPLY_MAGIC.to_be_bytes());
    bytes.extend(REPLY_FLAG_DONE.to_be_bytes());
    bytes.extend(kind.to_be_bytes());
    bytes.extend(cookie.to_be_bytes());
    bytes.extend(length.to_be_bytes());
    bytes
}
