//! Splits bytes into lines of limited length: memory is bounded for any input.

/// Bytes kept of each end of a line over the limit: enough to find the id of a reply in it.
const KEPT: usize = 512;
/// One read of the socket.
pub(crate) const CHUNK: usize = 64 * 1024;

/// One line, without its end.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Line {
    /// A line within the limit. Never empty: blank lines are skipped.
    Whole(Vec<u8>),
    /// A line over the limit: its length in bytes, and its two ends.
    TooLong { length: u64, ends: Vec<u8> },
}

/// Splits the output of a QMP server into messages of at most `cap` bytes. A message is one line, or several
/// lines if its monitor prints prettily (`pretty=on`).
///
/// The first line decides: QEMU begins a pretty greeting with a line of `{` alone. From then on a message
/// reaches from such a line to the next line of `}` alone; nested braces are indented, and a string has no
/// line end. A line of `{` inside a message begins a new one, so that an unfinished message costs only one
/// message.
#[derive(Debug)]
pub(crate) struct MessageSplitter {
    lines: LineSplitter,
    messages: Messages,
}

#[derive(Debug)]
struct Messages {
    cap: usize,
    /// True if messages have several lines; `None` before the first line.
    pretty: Option<bool>,
    message: Vec<u8>,
    over: Option<Over>,
}

impl MessageSplitter {
    pub(crate) fn new(cap: usize) -> Self {
        let messages = Messages { cap, pretty: None, message: Vec::new(), over: None };
        Self { lines: LineSplitter::new(cap), messages }
    }

    /// Adds input, and passes the messages that it completes to `each`.
    pub(crate) fn push(&mut self, bytes: &[u8], mut each: impl FnMut(Line)) {
        let Self { lines, messages } = self;
        lines.push(bytes, |line| messages.line(line, &mut each));
    }

    /// Returns length and head of an unfinished message.
    pub(crate) fn unfinished(&self) -> (u64, &[u8]) {
        let Messages { message, over, .. } = &self.messages;
        match (over, message.is_empty()) {
            (Some(over), _) => (over.length, &over.head),
            (None, false) => (message.len() as u64, message),
            (None, true) => self.lines.unfinished(),
        }
    }
}

impl Messages {
    fn line(&mut self, line: Line, each: &mut impl FnMut(Line)) {
        let whole = match &line {
            Line::Whole(whole) => whole.as_slice(),
            Line::TooLong { ends, .. } => ends.as_slice(),
        };
        if !*self.pretty.get_or_insert(whole == b"{") {
            return each(line);
        }
        if whole == b"{" {
            // The previous message is unfinished.
            self.finish(each);
            self.message.push(b'{');
            return;
        }
        if self.message.is_empty() && self.over.is_none() {
            return each(line);
        }
        let is_end = whole == b"}";
        self.extend(b"\n");
        self.extend(whole);
        if let (Line::TooLong { length, ends }, Some(over)) = (&line, &mut self.over) {
            over.length += length.saturating_sub(ends.len() as u64);
        }
        if is_end {
            self.finish(each);
        }
    }

    fn extend(&mut self, part: &[u8]) {
        if let Some(over) = &mut self.over {
            over.extend(part);
        } else if self.message.len() + part.len() <= self.cap {
            self.message.extend_from_slice(part);
        } else {
            let message = std::mem::take(&mut self.message);
            let mut over = Over { length: 0, head: Vec::new(), tail: Vec::new() };
            over.extend(&message);
            over.extend(part);
            self.over = Some(over);
        }
    }

    fn finish(&mut self, each: &mut impl FnMut(Line)) {
        let message = std::mem::take(&mut self.message);
        match self.over.take() {
            Some(over) => each(over.line()),
            None if message.is_empty() => {}
            None => each(Line::Whole(message)),
        }
    }
}

/// Splits input into lines of at most `cap` bytes; of a longer one only the ends are kept.
#[derive(Debug)]
pub(crate) struct LineSplitter {
    cap: usize,
    line: Vec<u8>,
    over: Option<Over>,
}

#[derive(Debug)]
struct Over {
    length: u64,
    head: Vec<u8>,
    tail: Vec<u8>,
}

impl LineSplitter {
    pub(crate) fn new(cap: usize) -> Self {
        Self { cap, line: Vec::new(), over: None }
    }

    /// Adds input, and passes the lines that it completes to `each`.
    pub(crate) fn push(&mut self, mut bytes: &[u8], mut each: impl FnMut(Line)) {
        while let Some(end) = bytes.iter().position(|&byte| byte == b'\n') {
            let (part, rest) = bytes.split_at(end);
            self.extend(part);
            if let Some(line) = self.finish() {
                each(line);
            }
            bytes = rest.get(1..).unwrap_or_default();
        }
        self.extend(bytes);
    }

    /// Returns length and head of an unfinished line.
    pub(crate) fn unfinished(&self) -> (u64, &[u8]) {
        match &self.over {
            Some(over) => (over.length, &over.head),
            None => (self.line.len() as u64, &self.line),
        }
    }

    fn extend(&mut self, part: &[u8]) {
        if let Some(over) = &mut self.over {
            over.extend(part);
        } else if self.line.len() + part.len() <= self.cap {
            self.line.extend_from_slice(part);
        } else {
            let line = std::mem::take(&mut self.line);
            let mut over = Over { length: 0, head: Vec::new(), tail: Vec::new() };
            over.extend(&line);
            over.extend(part);
            self.over = Some(over);
        }
    }

    fn finish(&mut self) -> Option<Line> {
        if let Some(over) = self.over.take() {
            return Some(over.line());
        }
        let mut line = std::mem::take(&mut self.line);
        while line.last().is_some_and(u8::is_ascii_whitespace) {
            line.pop();
        }
        (!line.is_empty()).then_some(Line::Whole(line))
    }
}

impl Over {
    fn line(mut self) -> Line {
        self.head.push(b' ');
        self.head.append(&mut self.tail);
        Line::TooLong { length: self.length, ends: self.head }
    }

    fn extend(&mut self, part: &[u8]) {
        self.length += part.len() as u64;
        let room = KEPT.saturating_sub(self.head.len()).min(part.len());
        let (head, rest) = part.split_at(room);
        self.head.extend_from_slice(head);
        let rest = rest.get(rest.len().saturating_sub(KEPT)..).unwrap_or_default();
        self.tail.extend_from_slice(rest);
        let surplus = self.tail.len().saturating_sub(KEPT);
        self.tail.drain(..surplus);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn split(cap: usize, pieces: &[&[u8]]) -> Vec<Line> {
        let mut splitter = LineSplitter::new(cap);
        let mut lines = Vec::new();
        for piece in pieces {
            splitter.push(piece, |line| lines.push(line));
        }
        lines
    }

    #[test]
    fn lines_are_the_same_however_the_bytes_arrive() {
        let bytes = b"one\r\n\n two \nthree\nhalf";
        let whole = split(100, &[bytes]);
        assert_eq!(
            whole,
            [&b"one"[..], b" two", b"three"].map(|line| Line::Whole(line.to_vec())),
            "a blank line is none, a half line is none yet"
        );
        let single: Vec<&[u8]> = bytes.chunks(1).collect();
        assert_eq!(split(100, &single), whole);
    }

    fn messages(cap: usize, pieces: &[&[u8]]) -> Vec<Line> {
        let mut splitter = MessageSplitter::new(cap);
        let mut messages = Vec::new();
        for piece in pieces {
            splitter.push(piece, |message| messages.push(message));
        }
        messages
    }

    const PRETTY: &[u8] = b"{\n    \"QMP\": {\n    }\n}\n{\n    \"return\": [\n    ]\n}\n";

    #[test]
    fn a_pretty_message_goes_to_its_closing_brace() {
        let expected = ["{\n    \"QMP\": {\n    }\n}", "{\n    \"return\": [\n    ]\n}"];
        let expected = expected.map(|text| Line::Whole(text.into()));
        assert_eq!(messages(1000, &[PRETTY]), expected);
        let single: Vec<&[u8]> = PRETTY.chunks(1).collect();
        assert_eq!(messages(1000, &single), expected);
        let cut = [PRETTY, b"{\n    \"lost\": 1\n", PRETTY].concat();
        assert_eq!(messages(1000, &[&cut]).len(), 5, "one without end costs one message");
    }

    #[test]
    fn a_compact_stream_has_one_message_a_line() {
        let bytes = b"{\"QMP\": {}}\n{\nnoise\n{\"return\": 1}\n";
        let expected = ["{\"QMP\": {}}", "{", "noise", "{\"return\": 1}"];
        assert_eq!(messages(1000, &[bytes]), expected.map(|text| Line::Whole(text.into())));
    }

    #[test]
    fn a_pretty_message_over_the_cap_keeps_only_its_ends() {
        let long = [b"{\n", &b"    \"x\": 1,\n".repeat(1000)[..], b"}\n", PRETTY].concat();
        let all = messages(1000, &[&long]);
        assert!(
            matches!(&all[0], Line::TooLong { length: 12_003, ends } if ends.ends_with(b"\n}")),
            "{all:?}"
        );
        assert_eq!(all.len(), 3);
        let mut endless = MessageSplitter::new(1000);
        endless.push(b"{\n", |message| panic!("{message:?}"));
        for _ in 0..100_000 {
            endless.push(b"    \"x\": 1,\n", |message| panic!("{message:?}"));
        }
        assert_eq!(endless.unfinished().0, 1_200_001);
    }

    /// A line over the limit keeps only its ends, and the next line is complete.
    #[test]
    fn line_over_the_limit_keeps_its_ends() {
        let mut bytes = b"head".to_vec();
        bytes.extend(std::iter::repeat_n(b'x', 1 << 20));
        bytes.extend(b"tail\nnext\n");
        for chunk in [1 << 21, 1000, 7] {
            let pieces: Vec<&[u8]> = bytes.chunks(chunk).collect();
            let lines = split(1000, &pieces);
            let [Line::TooLong { length, ends }, Line::Whole(next)] = lines.as_slice() else {
                panic!("{lines:?}")
            };
            assert_eq!(*length, (1 << 20) + 8);
            assert!(ends.starts_with(b"headxx") && ends.ends_with(b"xxtail") && ends.len() == 2 * KEPT + 1);
            assert_eq!(next, b"next");
        }
    }

    #[test]
    fn a_line_of_exactly_the_cap_is_whole() {
        assert_eq!(split(3, &[b"abc\n"]), [Line::Whole(b"abc".to_vec())]);
        assert!(matches!(split(3, &[b"abcd\n"]).as_slice(), [Line::TooLong { length: 4, .. }]));
    }

    #[test]
    fn memory_stays_bounded_in_a_line_without_end() {
        let mut splitter = LineSplitter::new(1000);
        for _ in 0..1000 {
            splitter.push(&[b'x'; 1000], |line| panic!("{line:?}"));
        }
        assert_eq!(splitter.unfinished().0, 1_000_000);
        let over = splitter.over.expect("it is over the cap");
        assert!(over.head.capacity() + over.tail.capacity() + splitter.line.capacity() < 8 * 1024);
    }
}
