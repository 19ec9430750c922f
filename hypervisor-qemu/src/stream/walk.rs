//! Reads a stream and separates the pages of one block of memory from all else.
//!
//! ```text
//! "QEVM" 3                                          the head
//! 7  length (u32) machine, subsections              the configuration
//! 1  id (u32) name instance (u32) version (u32)     begin of a section that comes in parts: `ram` alone
//! 2, 3  id (u32)                                    a further part, the last part
//! 8  command (u16) length (u16)                     a command, without a footer
//! 4  ...                                            the state of a device: from here on all is copied
//! 7e id (u32)                                       the footer of each section
//! ```
//!
//! The content of a part of `ram` is numbers of 64 bits, an address and flags each:
//!
//! | flag | follows |
//! |---|---|
//! | 0x02 | a name, unless 0x20 is set, and a byte 0: the page has zeros |
//! | 0x04 | the address is the sum of all lengths: the blocks, a name and a length (u64) each |
//! | 0x08 | a name, unless 0x20 is set, and a page of 4096 bytes |
//! | 0x10 | nothing: the end of the part |
//! | 0x200 | nothing |
//!
//! With 0x20 the block is that of the page before, also if a section has ended in between. The page of one
//! address may come several times, and the last one is valid, whether it has bytes or zeros.
//!
//! A page without a name always follows one of the same block. So the stream stays right without the pages of
//! one block, and everything else is copied as it is.
//!
//! Sources: QEMU's `docs/devel/migration/main.rst`, `migration/ram.c`, `migration/savevm.c`, 7.2 and 10.0.

use std::{
    collections::HashMap,
    io::{self, Read},
};

use super::{
    input::{Input, Text},
    refusal::Refusal,
};

/// Bytes of a page: of x86, and of every other machine that has no subsection of its own for it.
pub(crate) const PAGE: u64 = 4096;

/// Longest block that is separated: 1 TiB.
pub(crate) const LONGEST_BLOCK: u64 = 1 << 40;

/// Maximum number of blocks.
const MOST_BLOCKS: usize = 1024;

/// Longest name of a machine.
const LONGEST_MACHINE: u32 = 255;

const HEAD: [u8; 8] = *b"QEVM\0\0\0\x03";

const START: u8 = 1;
const PART: u8 = 2;
const END: u8 = 3;
const FULL: u8 = 4;
const SUBSECTION: u8 = 5;
const CONFIGURATION: u8 = 7;
const COMMAND: u8 = 8;
const FOOTER: u8 = 0x7e;

/// The section of memory, and its version.
const RAM: &[u8] = b"ram";
const RAM_VERSION: u32 = 4;

/// A command that is sent when the guest has stopped. It has no content.
const SWITCHOVER_START: u16 = 11;

const ZERO: u64 = 0x02;
const BLOCKS: u64 = 0x04;
const DATA: u64 = 0x08;
const PART_END: u64 = 0x10;
const CONTINUE: u64 = 0x20;
const FLUSH: u64 = 0x200;

/// The flags that are known and refused, and their names for the user.
const REFUSED: [(u64, &str); 4] = [
    (0x01, "a page in a form of old QEMUs"),
    (0x40, "a page that is compressed by xbzrle"),
    (0x80, "a page of an RDMA migration"),
    (0x100, "a compressed page"),
];

/// Receives the parts of a stream.
pub(crate) trait Parts {
    /// The block and its length, once, before its first page.
    fn block(&mut self, length: u64) -> io::Result<()>;
    /// A page of the block. The address is a multiple of [`PAGE`], and the page is within the block.
    fn page(&mut self, address: u64, bytes: &[u8; PAGE as usize]) -> io::Result<()>;
    /// A page of zeros.
    fn zeros(&mut self, address: u64) -> io::Result<()>;
    /// Bytes of the stream without the block's pages.
    fn rest(&mut self, bytes: &[u8]) -> io::Result<()>;
}

/// Reads a stream of `length` bytes, and separates the pages of a block.
pub(crate) fn separate(
    reader: impl Read,
    length: u64,
    block: &[u8],
    parts: &mut impl Parts,
) -> Result<(), Refusal> {
    let walk = Walk {
        input: Input::new(reader, length),
        parts,
        wanted: block,
        section: None,
        has_ended: false,
        blocks: HashMap::new(),
        current: None,
    };
    walk.stream()
}

/// A block of memory.
#[derive(Clone, Copy)]
struct Block {
    length: u64,
    is_wanted: bool,
}

struct Walk<'a, R, P> {
    input: Input<R>,
    parts: &'a mut P,
    wanted: &'a [u8],
    /// The id of the section of memory, once it has begun.
    section: Option<u32>,
    /// True once the memory's last part was read.
    has_ended: bool,
    blocks: HashMap<Text, Block>,
    /// The block of the page before. It lasts across sections.
    current: Option<Block>,
}

impl<R: Read, P: Parts> Walk<'_, R, P> {
    fn stream(mut self) -> Result<(), Refusal> {
        let head: [u8; 8] = self.input.bytes()?;
        if head != HEAD {
            return Err(Refusal::wrong(0, format!("it begins with {}", head.escape_ascii())));
        }
        self.copy(&head)?;
        let mut is_first = true;
        loop {
            let at = self.input.at();
            let kind = self.input.byte()?;
            match kind {
                CONFIGURATION if is_first => self.configuration()?,
                START => self.start(at)?,
                PART | END => {
                    let id = self.input.u32()?;
                    if self.section != Some(id) || self.has_ended {
                        return Err(Refusal::wrong(at, format!("section {id} has not begun, or has ended")));
                    }
                    self.copy(&[kind])?;
                    self.copy(&id.to_be_bytes())?;
                    self.memory()?;
                    self.footer(id)?;
                    self.has_ended = kind == END;
                }
                COMMAND => self.command(at)?,
                // Each that is known changes the form of what follows (the size of a page, capabilities), or
                // ties the stream to one machine.
                SUBSECTION => {
                    let name = self.input.text()?;
                    return Err(Refusal::unknown(at, format!("its configuration has {name}")));
                }
                // A background snapshot has no last part. Pages behind the state of a device are copied too,
                // and are loaded over those in the file, as they would be after them.
                FULL if !self.blocks.is_empty() => return self.devices(),
                FULL => {
                    let what = "the state of a device comes before the memory";
                    return Err(Refusal::unknown(at, what));
                }
                kind => return Err(Refusal::unknown(at, format!("a section of the type {kind}"))),
            }
            is_first = false;
        }
    }

    /// Copies bytes to the stream of all else.
    fn copy(&mut self, bytes: &[u8]) -> Result<(), Refusal> {
        self.parts.rest(bytes).map_err(Refusal::Write)
    }

    fn copy_text(&mut self, text: &Text) -> Result<(), Refusal> {
        self.copy(&[u8::try_from(text.bytes().len()).unwrap_or(u8::MAX)])?;
        self.copy(text.bytes())
    }

    fn configuration(&mut self) -> Result<(), Refusal> {
        let at = self.input.at();
        let length = self.input.u32()?;
        if length > LONGEST_MACHINE {
            return Err(Refusal::wrong(at, format!("the machine's name has {length} bytes")));
        }
        let mut machine = vec![0; usize::try_from(length).unwrap_or_default()];
        self.input.fill(&mut machine)?;
        self.copy(&[CONFIGURATION])?;
        self.copy(&length.to_be_bytes())?;
        self.copy(&machine)
    }

    fn start(&mut self, at: u64) -> Result<(), Refusal> {
        let id = self.input.u32()?;
        let name = self.input.text()?;
        let (instance, version) = (self.input.u32()?, self.input.u32()?);
        if name.bytes() != RAM {
            let what = format!("the section {name} comes in parts, as memory does");
            return Err(Refusal::unknown(at, what));
        }
        if self.section.is_some() {
            return Err(Refusal::wrong(at, "the memory begins twice"));
        }
        if version != RAM_VERSION {
            return Err(Refusal::unknown(at, format!("the memory has the version {version}")));
        }
        self.section = Some(id);
        self.copy(&[START])?;
        self.copy(&id.to_be_bytes())?;
        self.copy_text(&name)?;
        self.copy(&instance.to_be_bytes())?;
        self.copy(&version.to_be_bytes())?;
        self.memory()?;
        self.footer(id)
    }

    fn footer(&mut self, id: u32) -> Result<(), Refusal> {
        let at = self.input.at();
        let (mark, found) = (self.input.byte()?, self.input.u32()?);
        if (mark, found) != (FOOTER, id) {
            return Err(Refusal::wrong(at, format!("section {id} ends without its footer")));
        }
        self.copy(&[mark])?;
        self.copy(&id.to_be_bytes())
    }

    fn command(&mut self, at: u64) -> Result<(), Refusal> {
        let (command, length) = (self.input.u16()?, self.input.u16()?);
        if (command, length) != (SWITCHOVER_START, 0) {
            return Err(Refusal::unknown(at, format!("the command {command} with {length} bytes")));
        }
        self.copy(&[COMMAND])?;
        self.copy(&command.to_be_bytes())?;
        self.copy(&length.to_be_bytes())
    }

    /// The content of a part of the memory.
    fn memory(&mut self) -> Result<(), Refusal> {
        loop {
            let at = self.input.at();
            let word = self.input.u64()?;
            let (address, flags) = (word & !(PAGE - 1), word & (PAGE - 1));
            match flags & !CONTINUE {
                PART_END | FLUSH | BLOCKS if flags & CONTINUE != 0 => {
                    return Err(Refusal::wrong(at, format!("the flags {flags:#x}")));
                }
                PART_END => return self.copy(&word.to_be_bytes()),
                FLUSH => self.copy(&word.to_be_bytes())?,
                BLOCKS => self.blocks(at, address)?,
                ZERO | DATA => self.page(at, address, flags)?,
                other => {
                    let named = REFUSED.iter().find(|(flag, _)| other & flag != 0);
                    let what = named.map_or_else(|| "a page".to_owned(), |(_, name)| (*name).to_owned());
                    return Err(Refusal::unknown(at, format!("{what} (flags {flags:#x})")));
                }
            }
        }
    }

    /// The list of blocks.
    fn blocks(&mut self, at: u64, total: u64) -> Result<(), Refusal> {
        if !self.blocks.is_empty() {
            return Err(Refusal::wrong(at, "the blocks of memory are listed twice"));
        }
        self.copy(&(total | BLOCKS).to_be_bytes())?;
        let mut left = total;
        while left > 0 {
            let at = self.input.at();
            let name = self.input.text()?;
            let length = self.input.u64()?;
            left = match left.checked_sub(length) {
                Some(rest) if length > 0 && length.is_multiple_of(PAGE) => rest,
                _ => return Err(Refusal::wrong(at, format!("the block {name} has {length} bytes"))),
            };
            let is_wanted = name.bytes() == self.wanted;
            if is_wanted && length > LONGEST_BLOCK {
                let what = format!("the block {name} has {length} bytes, {LONGEST_BLOCK} at most");
                return Err(Refusal::unknown(at, what));
            }
            self.copy_text(&name)?;
            self.copy(&length.to_be_bytes())?;
            let shown = name.to_string();
            if self.blocks.len() >= MOST_BLOCKS
                || self.blocks.insert(name, Block { length, is_wanted }).is_some()
            {
                return Err(Refusal::wrong(at, format!("the block {shown} is one too many")));
            }
            if is_wanted {
                self.parts.block(length).map_err(Refusal::Write)?;
            }
        }
        if self.blocks.values().any(|block| block.is_wanted) {
            return Ok(());
        }
        let what = format!("the memory has no block {:?}", self.wanted.escape_ascii().to_string());
        Err(Refusal::unknown(at, what))
    }

    fn page(&mut self, at: u64, address: u64, flags: u64) -> Result<(), Refusal> {
        let name = if flags & CONTINUE == 0 { Some(self.input.text()?) } else { None };
        let block = match &name {
            None => self.current.ok_or_else(|| Refusal::wrong(at, "the first page has no block"))?,
            Some(name) => match self.blocks.get(name) {
                Some(block) => *block,
                None => {
                    return Err(Refusal::wrong(
                        at,
                        format!("a page of the block {name}, which is not listed"),
                    ));
                }
            },
        };
        self.current = Some(block);
        if address.checked_add(PAGE).is_none_or(|end| end > block.length) {
            let what = format!("a page at {address:#x} of a block of {:#x} bytes", block.length);
            return Err(Refusal::wrong(at, what));
        }
        if !block.is_wanted {
            self.copy(&(address | flags).to_be_bytes())?;
            if let Some(name) = &name {
                self.copy_text(name)?;
            }
        }
        if flags & ZERO != 0 {
            let byte = self.input.byte()?;
            if byte != 0 {
                return Err(Refusal::unknown(at, format!("a page filled with {byte:#x}")));
            }
            return match block.is_wanted {
                true => self.parts.zeros(address).map_err(Refusal::Write),
                false => self.copy(&[byte]),
            };
        }
        let bytes: [u8; PAGE as usize] = self.input.bytes()?;
        match block.is_wanted {
            true => self.parts.page(address, &bytes).map_err(Refusal::Write),
            false => self.copy(&bytes),
        }
    }

    /// The states of devices, and all behind them. They have no lengths, and are not looked into.
    fn devices(mut self) -> Result<(), Refusal> {
        let at = self.input.at();
        self.copy(&[FULL])?;
        let parts = &mut *self.parts;
        let copied = self.input.rest(|bytes| parts.rest(bytes))?;
        match copied {
            0 => Err(Refusal::wrong(at, "it ends before the states of devices")),
            _ => Ok(()),
        }
    }
}
