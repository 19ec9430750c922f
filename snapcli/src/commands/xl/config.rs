//! Configuration files of snapshots, in the syntax of `xl.cfg`.
//!
//! `KEY = VALUE` on a line, or several joined by `;`. A value is a number, a text in `'` or `"`, or a list
//! `[ ..., ... ]` of texts, which may go on over lines. `#` begins a comment.

use camino::{Utf8Path, Utf8PathBuf};
use snapcore::{Error, ErrorKind, PointKind, Result};

use crate::regular;

/// The longest file that is read, in bytes.
const MAX_BYTES: u64 = 1 << 20;

/// What a file says.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Config {
    /// The snapshot's name, as it is written there.
    pub name: Option<String>,
    pub description: Option<String>,
    /// True if memory is wanted; false where the file says nothing of it.
    pub memory: bool,
    /// The kind of snapshot of disks that do not say it themselves.
    pub kind: Option<PointKind>,
    /// The disks; absent: all.
    pub disks: Option<Vec<DiskLine>>,
    /// True if the file has a time of creation, which is domsnap's to say.
    pub has_time: bool,
}

/// One element of `disk` or `disks`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DiskLine {
    /// Its line in the file, from 1.
    pub line: usize,
    /// The device, as it is written there: `hda`, `xvda`, `vda`.
    pub vdev: String,
    pub how: How,
}

/// The snapshot of a disk.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum How {
    /// As [`Config::kind`] says; internal where it does not.
    Default,
    Internal,
    /// The file is the new overlay.
    External(Utf8PathBuf),
}

impl Config {
    /// Reads a file.
    pub fn read(path: &Utf8Path) -> Result<Self> {
        let Some(bytes) = regular::read(path, MAX_BYTES)? else {
            return Err(Error::new(ErrorKind::Usage, format!("{path} is not a regular file"))
                .advise("give the configuration file of the snapshot, then the domain"));
        };
        Self::parse(&bytes).map_err(|Wrong { line, why }| {
            Error::new(ErrorKind::Usage, format!("{path}, line {line}: {why}"))
                .state("no changes made")
                .advise("the keys are name, description, memory, type, and disk or disks (docs/xl.md)")
        })
    }

    /// Reads the content of a file.
    fn parse(bytes: &[u8]) -> std::result::Result<Self, Wrong> {
        if u64::try_from(bytes.len()).map_or(true, |length| length > MAX_BYTES) {
            return Err(Wrong::at(1, format!("the file is longer than {MAX_BYTES} bytes")));
        }
        let text = std::str::from_utf8(bytes).map_err(|cause| {
            let line = 1 + bytes[..cause.valid_up_to()].iter().filter(|byte| **byte == b'\n').count();
            Wrong::at(line, "it is not UTF-8")
        })?;
        let mut config = Self::default();
        let mut seen: Vec<String> = Vec::new();
        let mut tokens = Tokens { rest: text, line: 1 };
        while let Some((line, key)) = tokens.key()? {
            let value = tokens.value(line, &key)?;
            if seen.contains(&key) {
                return Err(Wrong::at(line, format!("{key} comes twice")));
            }
            config.set(line, &key, value)?;
            seen.push(key);
        }
        Ok(config)
    }

    fn set(&mut self, line: usize, key: &str, value: Value) -> std::result::Result<(), Wrong> {
        let wrong = |why: String| Err(Wrong::at(line, why));
        match (key, value) {
            ("name", Value::Text(text)) => self.name = Some(text),
            ("description", Value::Text(text)) => self.description = Some(text),
            ("creationtime" | "creation_time", Value::Text(_)) => self.has_time = true,
            ("memory", Value::Text(text)) => {
                self.memory = match text.as_str() {
                    "yes" => true,
                    "no" | "" => false,
                    path if path.starts_with('/') => {
                        return wrong(format!(
                            "memory = {path:?}: domsnap keeps memory images itself; write memory=\"yes\", and give the \
                             directory to the domain (`domsnap domain add --memory-dir`)"
                        ));
                    }
                    other => return wrong(format!("memory is {other:?}; expected yes or no")),
                }
            }
            ("type", Value::Text(text)) => {
                self.kind = Some(match text.as_str() {
                    "internal" => PointKind::Internal,
                    "external" => PointKind::External,
                    other => return wrong(format!("type is {other:?}; expected internal or external")),
                });
            }
            ("disk" | "disks", Value::List(items)) => {
                if self.disks.is_some() {
                    return wrong("disk and disks are the same list; give one of them".to_owned());
                }
                let read = items.into_iter().map(|(line, text)| {
                    disk(&text)
                        .map(|(vdev, how)| DiskLine { line, vdev, how })
                        .map_err(|why| Wrong::at(line, format!("the disk {text:?}: {why}")))
                });
                self.disks = Some(read.collect::<std::result::Result<_, _>>()?);
            }
            ("disk" | "disks", Value::Text(_)) => return wrong(format!("{key} is a list: [ '...' ]")),
            (_, Value::List(_)) if is_key(key) => return wrong(format!("{key} is a text and no list")),
            _ => return wrong(format!("the key {key:?} is not known")),
        }
        Ok(())
    }
}

fn is_key(key: &str) -> bool {
    ["name", "description", "creationtime", "creation_time", "memory", "type"].contains(&key)
}

/// Reads a disk: `vdev=hda,target=null`, `format=qcow2,vdev=hda,target=/path`, `/path,qcow2,hda`,
/// `hda=/path,type=qcow2`. As in the configuration of a domain, `target=` comes last and takes the rest, with
/// all commas.
fn disk(text: &str) -> std::result::Result<(String, How), String> {
    let (mut target, mut format, mut vdev) = (None, None, None);
    let set =
        |place: &mut Option<String>, what: &str, value: &str| match place.replace(value.trim().to_owned()) {
            Some(_) => Err(format!("{what} comes twice")),
            None => Ok(()),
        };
    let (mut rest, mut position) = (Some(text), 0);
    while let Some(now) = rest {
        let (part, after) = match now.split_once(',') {
            Some((part, after)) => (part, Some(after)),
            None => (now, None),
        };
        rest = after;
        match part.split_once('=').map(|(key, value)| (key.trim(), value)) {
            Some(("target", _)) => {
                let value = now.trim_start().trim_start_matches("target").trim_start();
                set(&mut target, "target", value.strip_prefix('=').unwrap_or(value))?;
                rest = None;
            }
            Some(("vdev", value)) => set(&mut vdev, "vdev", value)?,
            Some(("format" | "type", value)) => set(&mut format, "format", value)?,
            Some((key, value)) if device_number(key).is_some() => {
                set(&mut vdev, "vdev", key)?;
                set(&mut target, "target", value)?;
            }
            Some((key, _)) if !key.contains('/') => {
                return Err(format!("{key:?} is not known; expected vdev, format and target"));
            }
            _ if part.trim().is_empty() => position += 1,
            _ => {
                match position {
                    0 => set(&mut target, "target", part)?,
                    1 => set(&mut format, "format", part)?,
                    2 => set(&mut vdev, "vdev", part)?,
                    _ => return Err("it has more than target, format and vdev".to_owned()),
                }
                position += 1;
            }
        }
    }
    let vdev = vdev.filter(|vdev| !vdev.is_empty()).ok_or("it names no device (vdev=)")?;
    let how = match target.as_deref() {
        None | Some("") => How::Default,
        Some("null") => How::Internal,
        Some(path) if path.starts_with('/') => How::External(path.into()),
        Some(path) => return Err(format!("the target {path:?} is neither null nor an absolute path")),
    };
    match (&how, format.as_deref()) {
        (_, None | Some("" | "qcow2")) => Ok((vdev, how)),
        (How::External(_), Some(other)) => {
            Err(format!("the format {other:?}: an overlay that domsnap makes for Xen is qcow2"))
        }
        // The format of the disk itself, which domsnap knows.
        _ => Ok((vdev, how)),
    }
}

/// The place of a device among the disks: 0 for `hda`, `sda`, `vda`, `xvda`.
pub fn device_number(vdev: &str) -> Option<u64> {
    let letters = ["xvd", "hd", "sd", "vd"].iter().find_map(|prefix| vdev.strip_prefix(prefix))?;
    if letters.is_empty() || letters.len() > 4 || !letters.bytes().all(|byte| byte.is_ascii_lowercase()) {
        return None;
    }
    let number = letters.bytes().fold(0, |number, byte| number * 26 + u64::from(byte - b'a') + 1);
    Some(number - 1)
}

/// What is wrong with a file, and where.
#[derive(Debug, PartialEq, Eq)]
struct Wrong {
    line: usize,
    why: String,
}

impl Wrong {
    fn at(line: usize, why: impl Into<String>) -> Self {
        Self { line, why: why.into() }
    }
}

#[derive(Debug)]
enum Value {
    /// A text or a number.
    Text(String),
    /// Texts, each with its line.
    List(Vec<(usize, String)>),
}

/// The file, as far as it is not read.
struct Tokens<'a> {
    rest: &'a str,
    line: usize,
}

impl Tokens<'_> {
    /// Skips blanks and comments, and line ends where `lines`.
    fn skip(&mut self, lines: bool) {
        loop {
            match self.rest.chars().next() {
                Some(' ' | '\t' | '\r') => self.take(1),
                Some('\n') if lines => self.take(1),
                Some('#') => self.take(self.rest.find('\n').unwrap_or(self.rest.len())),
                _ => return,
            }
        }
    }

    /// Takes `bytes` away from the front.
    fn take(&mut self, bytes: usize) {
        let (taken, rest) = self.rest.split_at(bytes);
        self.line += taken.bytes().filter(|byte| *byte == b'\n').count();
        self.rest = rest;
    }

    fn accept(&mut self, sign: char) -> bool {
        let found = self.rest.starts_with(sign);
        if found {
            self.take(sign.len_utf8());
        }
        found
    }

    fn unexpected(&self, expected: &str) -> Wrong {
        let found = match self.rest.chars().next() {
            None => "the file ends".to_owned(),
            Some('\n') => "the line ends".to_owned(),
            Some(found) => format!("found {found:?}"),
        };
        Wrong::at(self.line, format!("{found}; expected {expected}"))
    }

    /// The next key, and its line; none at the end of the file.
    fn key(&mut self) -> Result<Option<(usize, String)>, Wrong> {
        loop {
            self.skip(true);
            if !self.accept(';') {
                break;
            }
        }
        if self.rest.is_empty() {
            return Ok(None);
        }
        let word = |c: char| c.is_ascii_alphanumeric() || "._".contains(c);
        let length = self.rest.find(|c| !word(c)).unwrap_or(self.rest.len());
        if length == 0 || !self.rest.starts_with(|c: char| c.is_ascii_alphabetic()) {
            return Err(self.unexpected("a key"));
        }
        let (line, key) = (self.line, self.rest[..length].to_owned());
        self.take(length);
        self.skip(false);
        match self.accept('=') {
            true => Ok(Some((line, key))),
            false => Err(self.unexpected(&format!("= after {key}"))),
        }
    }

    /// The value of a key, and the end of its line.
    fn value(&mut self, begun: usize, key: &str) -> Result<Value, Wrong> {
        self.skip(false);
        let value = match self.rest.chars().next() {
            Some('[') => Value::List(self.list(begun, key)?),
            Some('\'' | '"') => Value::Text(self.text()?),
            Some(digit) if digit.is_ascii_digit() => {
                let length = self.rest.find(|c: char| !c.is_ascii_alphanumeric()).unwrap_or(self.rest.len());
                let number = self.rest[..length].to_owned();
                self.take(length);
                Value::Text(number)
            }
            _ => return Err(self.unexpected("a text in quotes, a number, or a list")),
        };
        self.skip(false);
        match self.rest.is_empty() || self.accept('\n') || self.accept(';') {
            true => Ok(value),
            false => Err(self.unexpected(&format!("the end of the line after the value of {key}"))),
        }
    }

    fn list(&mut self, begun: usize, key: &str) -> Result<Vec<(usize, String)>, Wrong> {
        self.accept('[');
        let mut items = Vec::new();
        loop {
            self.skip(true);
            if self.accept(']') {
                return Ok(items);
            }
            if self.rest.is_empty() {
                return Err(Wrong::at(begun, format!("the list of {key} has no end")));
            }
            let line = self.line;
            if !self.rest.starts_with(['\'', '"']) {
                return Err(self.unexpected("a text in quotes, or ]"));
            }
            items.push((line, self.text()?));
            self.skip(true);
            if !self.accept(',') && !self.rest.starts_with(']') {
                return Err(self.unexpected("a comma, or ]"));
            }
        }
    }

    /// A text in quotes. A backslash at the end of a line joins it with the next, whose indentation counts as
    /// one blank.
    fn text(&mut self) -> Result<String, Wrong> {
        let line = self.line;
        let open = || Wrong::at(line, "a text has no closing quote on its line");
        let quote = self.rest.chars().next().ok_or_else(open)?;
        self.take(quote.len_utf8());
        let mut text = String::new();
        loop {
            let next = self.rest.chars().next().ok_or_else(open)?;
            match next {
                '\n' => return Err(open()),
                '\0' => return Err(Wrong::at(self.line, "a text has a NUL in it")),
                _ => self.take(next.len_utf8()),
            }
            match next {
                _ if next == quote => return Ok(text),
                '\\' => self.escape(&mut text)?,
                other => text.push(other),
            }
        }
    }

    /// What follows a backslash.
    fn escape(&mut self, text: &mut String) -> Result<(), Wrong> {
        let line = self.line;
        let after = self.rest.trim_start_matches('\r');
        if after.starts_with('\n') {
            self.take(self.rest.len() - after.len() + 1);
            let indentation = self.rest.len() - self.rest.trim_start_matches([' ', '\t']).len();
            self.take(indentation);
            if indentation > 0 {
                text.push(' ');
            }
            return Ok(());
        }
        let next =
            self.rest.chars().next().ok_or_else(|| Wrong::at(line, "the file ends after a backslash"))?;
        let mut digits = |from: usize, most: usize, base: u32| {
            let digits: String =
                self.rest.chars().skip(from).take(most).take_while(|c| c.is_digit(base)).collect();
            let read = u8::from_str_radix(&digits, base).ok().filter(|byte| byte.is_ascii() && *byte != 0);
            self.take(from + digits.len());
            read.map(char::from)
                .ok_or_else(|| Wrong::at(line, "a character by its number is ASCII, and not NUL"))
        };
        let read = match next {
            'x' => digits(1, 2, 16)?,
            '0'..='7' => digits(0, 3, 8)?,
            _ => {
                self.take(next.len_utf8());
                match next {
                    '"' | '\'' | '\\' => next,
                    'a' => '\x07',
                    'b' => '\x08',
                    'f' => '\x0c',
                    'n' => '\n',
                    'r' => '\r',
                    't' => '\t',
                    'v' => '\x0b',
                    _ => return Err(Wrong::at(line, format!("\\{next} is not known"))),
                }
            }
        };
        text.push(read);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn parse(text: &str) -> Config {
        Config::parse(text.as_bytes()).unwrap_or_else(|wrong| panic!("{wrong:?} in {text}"))
    }

    fn wrong(text: &str) -> (usize, String) {
        let wrong = Config::parse(text.as_bytes()).unwrap_err();
        (wrong.line, wrong.why)
    }

    /// The files of the prototype's HOWTO, as they are there.
    #[test]
    fn files_of_the_howto_are_read() {
        let internal = parse(
            "name = \"internal snapshot 20140710\"\ndescription=\"Internal snapshot test\"\nmemory=\"yes\"\n\
             disk=['vdev=hda,target=null',\n      'vdev=hdc,target=null']\n",
        );
        assert_eq!(internal.name.as_deref(), Some("internal snapshot 20140710"));
        assert_eq!(internal.description.as_deref(), Some("Internal snapshot test"));
        assert!(internal.memory);
        let line = |line, vdev: &str, how| DiskLine { line, vdev: vdev.to_owned(), how };
        assert_eq!(internal.disks, Some(vec![line(4, "hda", How::Internal), line(5, "hdc", How::Internal)]));

        let external = parse(
            "disk=['format=qcow2,vdev=hda,target=/var/lib/xen/snapshots/5c84/disk_hda.qcow2',\n\
             'format=qcow2,vdev=hdc,target=/var/lib/xen/snapshots/5c84/disk_hdc.qcow2']",
        );
        let file = |name: &str| How::External(format!("/var/lib/xen/snapshots/5c84/{name}").into());
        assert_eq!(
            external.disks,
            Some(vec![line(1, "hda", file("disk_hda.qcow2")), line(2, "hdc", file("disk_hdc.qcow2"))])
        );

        let disk_only = parse(
            "name = \"1397207577\"\ndescription=\"Snapshot after OS installation. External disk-only\\\n             \
                                 snapsot. Only care about the root file system\"\n\
             disk=['hda=/var/lib/xen/snapshots/uuid/disk_hda.qcow2,type=qcow2']\n",
        );
        assert_eq!(
            disk_only.description.as_deref(),
            Some(
                "Snapshot after OS installation. External disk-only snapsot. Only care about the root file system"
            )
        );
        let overlay = How::External("/var/lib/xen/snapshots/uuid/disk_hda.qcow2".into());
        assert_eq!(disk_only.disks, Some(vec![line(4, "hda", overlay)]));
        assert!(!disk_only.memory);
    }

    #[test]
    fn disks_have_two_syntaxes() {
        for (text, vdev, how) in [
            ("vdev=hda", "hda", How::Default),
            (",,hda", "hda", How::Default),
            ("/a.qcow2,qcow2,hda", "hda", How::External("/a.qcow2".into())),
            ("vdev=xvdb, target=/a,b=c.qcow2", "xvdb", How::External("/a,b=c.qcow2".into())),
            ("null,raw,hda", "hda", How::Internal),
        ] {
            assert_eq!(disk(text), Ok((vdev.to_owned(), how)), "{text}");
        }
        for (text, why) in [
            ("target=/a", "no device"),
            ("vdev=hda,vdev=hdb", "twice"),
            ("vdev=hda,format=raw,target=/a", "\"raw\""),
            ("vdev=hda,target=a.qcow2", "absolute"),
            ("vdev=hda,access=w", "not known"),
            ("/a,qcow2,hda,w", "more than"),
        ] {
            let error = disk(text).unwrap_err();
            assert!(error.contains(why), "{text}: {error}");
        }
    }

    #[test]
    fn devices_are_numbered() {
        for (vdev, number) in
            [("hda", Some(0)), ("xvdc", Some(2)), ("vdaa", Some(26)), ("sd", None), ("web", None)]
        {
            assert_eq!(device_number(vdev), number, "{vdev}");
        }
    }

    #[test]
    fn what_is_wrong_is_said_with_its_line() {
        for (text, line, why) in [
            ("name='a'\nnmae='b'", 2, "\"nmae\""),
            ("name='a'\n\nname='b'", 3, "twice"),
            ("disk=['vdev=hda']\ndisks=[',,hdb']", 2, "same list"),
            ("memory='maybe'", 1, "yes or no"),
            ("memory='/a.save'", 1, "keeps memory images itself"),
            ("type='both'", 1, "internal or external"),
            ("name='a", 1, "closing quote"),
            ("name='a'b", 1, "end of the line"),
            ("disk=['vdev=hda',\n", 1, "has no end"),
            ("disk=['vdev=hda'\n'vdev=hdb']", 2, "a comma"),
            ("disk='vdev=hda'", 1, "is a list"),
            ("name=['a']", 1, "no list"),
            ("name", 1, "expected ="),
            ("name=\n'a'", 1, "the line ends"),
            ("name='\\q'", 1, "\\q"),
            ("name='\\0'", 1, "not NUL"),
            ("name='a\0'", 1, "NUL"),
            ("disk=[\n'vdev=hda',\n'target=/x']", 3, "no device"),
        ] {
            let (at, said) = wrong(text);
            assert!(at == line && said.contains(why), "{text:?}: line {at}: {said}");
        }
        assert!(Config::parse(b"# a\nname='\xff'").is_err_and(|wrong| wrong.line == 2));
        assert!(Config::parse(&vec![b'\n'; (1 << 20) + 1]).is_err());
    }

    #[test]
    fn escapes_comments_and_semicolons_are_xls() {
        let config =
            parse("# a comment\nname='it\\'s \\x41\\102' ; memory=\"no\" # b\n;\ncreationtime=1397207577\n");
        assert_eq!((config.name.as_deref(), config.memory, config.has_time), (Some("it's AB"), false, true));
        assert_eq!(parse("disk=[]").disks, Some(Vec::new()));
        assert_eq!(parse("disk=[ # a\n'vdev=hda', # b\n]").disks.map(|disks| disks.len()), Some(1));
    }

    /// A list of a megabyte is read in the time of its length.
    #[test]
    fn long_list_is_read() {
        let text = format!("disk=[{}]", "'vdev=hda',".repeat((1 << 20) / 11 - 10));
        assert!(parse(&text).disks.is_some_and(|disks| disks.len() > 90_000));
    }

    proptest! {
        /// Nothing that a file has in it stops the parser, and a line that it names is one of the file.
        #[test]
        fn any_file_is_read_or_refused(text in r#"([a-z]{1,5}|[='"\[\],;#\\\n \x00]|name=|disk=\[|vdev=hda|target=|\\x4|é){0,40}"#) {
            if let Err(wrong) = Config::parse(text.as_bytes()) {
                prop_assert!((1..=1 + text.matches('\n').count()).contains(&wrong.line), "{wrong:?}");
            }
        }

        /// A text survives being written in quotes.
        #[test]
        fn texts_survive_their_quotes(name in r#"[^\x00\n\r\\'"]{0,30}(['"\\]?[^\x00\n\r\\'"]{0,10}){0,4}"#) {
            let quoted = name.replace('\\', "\\\\").replace('\'', "\\'");
            prop_assert_eq!(parse(&format!("name = '{quoted}'\n")).name, Some(name));
        }
    }
}
