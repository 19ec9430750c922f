//! Parses one line of QMP. Unknown content is no error: it is data.

use serde_json::{Map, Value};

use crate::{error::Reported, event::Event};

/// Deepest accepted JSON. QEMU's own parser stops at 1024; `query-block` nests once for each layer of a
/// backing chain.
pub(crate) const MAX_DEPTH: usize = 512;

/// Content of a line.
#[derive(Debug)]
pub(crate) enum Message {
    /// The value of `"QMP"`.
    Greeting(Value),
    /// An event of any name.
    Event(Event),
    /// A reply, with its id as it was received, if there was one.
    Reply { id: Option<Value>, outcome: Result<Value, Reported> },
    /// JSON, but none of the others.
    Other,
}

impl Message {
    pub(crate) fn from_value(value: Value) -> Self {
        let Value::Object(mut object) = value else { return Self::Other };
        if let Some(greeting) = object.remove("QMP") {
            return Self::Greeting(greeting);
        }
        if let Some(Value::String(name)) = object.get_mut("event") {
            let name = std::mem::take(name);
            object.remove("event");
            return Self::Event(Event::from_object(name, object));
        }
        let id = object.remove("id");
        if let Some(error) = object.remove("error") {
            return Self::Reply { id, outcome: Err(Reported::from_value(&error)) };
        }
        match object.remove("return") {
            Some(value) => Self::Reply { id, outcome: Ok(value) },
            None => Self::Other,
        }
    }
}

/// Parses one line of JSON that nests at most `max_depth` deep; the error describes the damage.
pub(crate) fn parse(line: &[u8], max_depth: usize) -> Result<Value, String> {
    let depth = depth(line);
    if depth > max_depth {
        return Err(format!("nests {depth} deep, at most {max_depth} is read"));
    }
    let mut deserializer = serde_json::Deserializer::from_slice(line);
    deserializer.disable_recursion_limit();
    let value = serde::Deserialize::deserialize(&mut deserializer)
        .and_then(|value| deserializer.end().map(|()| value))
        .map_err(|error| format!("is not JSON ({error})"))?;
    Ok(value)
}

/// Makes the line of a command. Empty or missing arguments are left out.
pub(crate) fn command(oob: bool, name: &str, arguments: Value, id: Option<&str>) -> Vec<u8> {
    let mut object = Map::new();
    object.insert(if oob { "exec-oob" } else { "execute" }.to_owned(), name.into());
    let empty = arguments.is_null() || arguments.as_object().is_some_and(Map::is_empty);
    if !empty {
        object.insert("arguments".to_owned(), arguments);
    }
    if let Some(id) = id {
        object.insert("id".to_owned(), id.into());
    }
    let mut line = Value::Object(object).to_string().into_bytes();
    line.push(b'\n');
    line
}

/// Returns the nesting depth of brackets outside strings.
fn depth(line: &[u8]) -> usize {
    let (mut now, mut most, mut in_string, mut escaped) = (0usize, 0, false, false);
    for &byte in line {
        if in_string {
            match byte {
                _ if escaped => escaped = false,
                b'\\' => escaped = true,
                b'"' => in_string = false,
                _ => {}
            }
            continue;
        }
        match byte {
            b'"' => in_string = true,
            b'{' | b'[' => {
                now += 1;
                most = most.max(now);
            }
            b'}' | b']' => now = now.saturating_sub(1),
            _ => {}
        }
    }
    most
}

/// The ids of one connection's commands. They have a part that is unique to the connection, because a QEMU
/// may answer a command of the previous client.
#[derive(Debug)]
pub(crate) struct Ids {
    prefix: String,
}

impl Ids {
    pub(crate) fn new() -> Self {
        use std::hash::{BuildHasher, Hasher, RandomState};
        Self { prefix: format!("domsnap-{:016x}-", RandomState::new().build_hasher().finish()) }
    }

    pub(crate) fn id(&self, number: u64) -> String {
        format!("{}{number}", self.prefix)
    }

    /// Returns the number of an id's command; `None` if it is not one of this connection.
    pub(crate) fn number(&self, id: &Value) -> Option<u64> {
        id.as_str()?.strip_prefix(&self.prefix)?.parse().ok()
    }

    /// Finds the number of a command by its id in bytes that cannot be parsed.
    pub(crate) fn find(&self, bytes: &[u8]) -> Option<u64> {
        let prefix = self.prefix.as_bytes();
        let at = bytes.windows(prefix.len()).position(|part| part == prefix)?;
        let rest = bytes.get(at + prefix.len()..)?;
        let digits = rest.iter().take_while(|byte| byte.is_ascii_digit()).count();
        match rest.get(digits) {
            // An id that is cut off after a digit could be another number.
            Some(b'"') => std::str::from_utf8(rest.get(..digits)?).ok()?.parse().ok(),
            _ => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn nested(depth: usize) -> Vec<u8> {
        format!("{}1{}", "{\"a\":".repeat(depth), "}".repeat(depth)).into_bytes()
    }

    /// JSON as deep as a long chain is read on a small stack, and deeper JSON is refused.
    #[test]
    fn deep_json_is_read_up_to_the_limit() {
        // The stack of a tokio worker.
        let thread = std::thread::Builder::new().stack_size(2 << 20).spawn(|| {
            let value = parse(&nested(MAX_DEPTH), MAX_DEPTH).expect("512 levels");
            assert_eq!(value.clone(), value);
            let error = parse(&nested(MAX_DEPTH + 1), MAX_DEPTH).expect_err("513 levels");
            assert!(error.contains("nests 513 deep"), "{error}");
            parse(&[b'['; 1 << 20], MAX_DEPTH).expect_err("a million levels");
        });
        thread.expect("spawn").join().expect("no overflow");
    }

    #[test]
    fn brackets_in_strings_do_not_count_as_depth() {
        let text = format!("{{\"a\": \"{}\\\"{}\"}}", "[".repeat(600), "{".repeat(600));
        assert_eq!(depth(text.as_bytes()), 1);
        parse(text.as_bytes(), 1).expect("it is flat");
    }

    /// Data after the value and invalid UTF-8 are refused.
    #[test]
    fn trailing_data_and_invalid_utf8_are_refused() {
        for line in [&b"{} {}"[..], b"{\"a\": \"\xff\"}", b"{", b"nonsense", b"{\"a\": 1e999}"] {
            parse(line, MAX_DEPTH).expect_err("not one JSON value");
        }
    }

    /// An id is found only if it is complete and of this connection.
    #[test]
    fn id_is_found_only_complete_and_own() {
        let (ids, other) = (Ids::new(), Ids::new());
        let line = format!("..., \"id\": \"{}\", garbage", ids.id(17));
        assert_eq!(ids.find(line.as_bytes()), Some(17));
        assert_eq!(other.find(line.as_bytes()), None);
        assert_eq!(ids.find(&line.as_bytes()[..line.len() - "7\", garbage".len()]), None);
        assert_eq!(ids.number(&json!(ids.id(3))), Some(3));
        for id in [json!(3), json!(null), json!(other.id(3)), json!(format!("{}x", ids.id(3)))] {
            assert_eq!(ids.number(&id), None, "{id}");
        }
    }

    #[test]
    fn empty_arguments_are_left_out() {
        let line = |arguments| String::from_utf8(command(false, "stop", arguments, Some("i"))).expect("text");
        assert_eq!(line(json!({})), "{\"execute\":\"stop\",\"id\":\"i\"}\n");
        assert_eq!(line(Value::Null), line(json!({})));
        assert_eq!(line(json!({"a": 1})), "{\"arguments\":{\"a\":1},\"execute\":\"stop\",\"id\":\"i\"}\n");
    }

    proptest::proptest! {
        /// Any bytes are split and parsed without a panic, and alike in any pieces.
        #[test]
        fn any_bytes_are_split_and_parsed_alike(
            bytes in proptest::collection::vec(
                proptest::prop_oneof![
                    3 => proptest::sample::select(&b"{}[]\",:\\\n01e-\xff \0"[..]),
                    1 => proptest::num::u8::ANY,
                ],
                0..300,
            ),
            cap in 1usize..80,
            piece in 1usize..40,
        ) {
            let split = |piece: usize| {
                let (mut splitter, mut lines) = (crate::line::LineSplitter::new(cap), Vec::new());
                for part in bytes.chunks(piece) {
                    splitter.push(part, |line| lines.push(line));
                }
                lines
            };
            let lines = split(piece);
            proptest::prop_assert_eq!(&lines, &split(bytes.len().max(1)));
            let ids = Ids::new();
            for line in lines {
                if let crate::line::Line::Whole(line) = line {
                    proptest::prop_assert!(line.len() <= cap);
                    proptest::prop_assert_eq!(ids.find(&line), None);
                    if let Ok(value) = parse(&line, 8) {
                        let _ = Message::from_value(value);
                    }
                }
            }
        }
    }
}
