//! Options with which the user opened an image, from the command line: QMP reports few of a node's options.

use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
};

use serde_json::{Map, Value};

use super::Process;
use crate::server::socket_of;

/// Options of a format node that another node of the same disk should have too.
const OF_FORMAT: [(&str, Kind); 15] = [
    ("discard", Kind::Word),
    ("cache-size", Kind::Number),
    ("l2-cache-size", Kind::Number),
    ("l2-cache-entry-size", Kind::Number),
    ("refcount-cache-size", Kind::Number),
    ("cache-clean-interval", Kind::Number),
    ("discard-no-unref", Kind::Switch),
    ("lazy-refcounts", Kind::Switch),
    ("pass-discard-request", Kind::Switch),
    ("pass-discard-snapshot", Kind::Switch),
    ("pass-discard-other", Kind::Switch),
    ("overlap-check", Kind::Word),
    ("overlap-check.template", Kind::Word),
    ("overlap-check.main-header", Kind::Switch),
    ("overlap-check.inactive-l2", Kind::Switch),
];

/// Options of the node of the file below.
const OF_FILE: [(&str, Kind); 3] =
    [("aio", Kind::Word), ("aio-max-batch", Kind::Number), ("locking", Kind::Word)];

#[derive(Debug, Clone, Copy)]
enum Kind {
    Word,
    Number,
    Switch,
}

/// Options that the command line gives for one image.
#[derive(Debug, Clone, PartialEq, Default)]
pub(crate) struct ImageOptions {
    /// Options of the format node, in QMP's form.
    pub(crate) format: Map<String, Value>,
    /// Options of the file node, in QMP's form.
    pub(crate) file: Map<String, Value>,
    /// Data read from below is written to the image.
    pub(crate) copy_on_read: bool,
}

/// One `-blockdev` or `-drive`: its options, with dotted keys for nested ones.
type Options = BTreeMap<String, Value>;

impl ImageOptions {
    /// Options of an image of which only one thing is known: its file is not locked.
    pub(crate) fn without_locks() -> Self {
        let file = Map::from_iter([("locking".to_owned(), Value::from("off"))]);
        Self { file, ..Self::default() }
    }

    /// Returns the options of the image that `is_it` recognises. `None` if the command line does not name it:
    /// it was hot-plugged, or opened by another method.
    pub(crate) fn of(process: &Process, is_it: impl Fn(&Path) -> bool) -> Option<Self> {
        let all = all_of(process);
        let named = |name: &str| {
            all.iter().map(|(_, options)| options).find(|options| text(options, "node-name") == Some(name))
        };
        let directory = process.directory.clone().unwrap_or_default();
        let found = |file: &str| is_it(&directory.join(file));
        for (drive, options) in &all {
            // The file node is a `-blockdev` of its own, or its options are among the format's.
            let file = match text(options, "file") {
                Some(file) if *drive => found(file).then(|| below(options)),
                Some(node) => {
                    let file = named(node).filter(|file| text(file, "filename").is_some_and(found));
                    file.cloned()
                }
                None => {
                    let inline = below(options);
                    let named = text(&inline, "filename").is_some_and(found);
                    let whole = || text(options, "filename").is_some_and(found);
                    if named { Some(inline) } else { whole().then(|| options.clone()) }
                }
            };
            let Some(mut file) = file else { continue };
            // A file node below a format node is handled in the format node's turn.
            let is_below = text(options, "filename").is_some()
                && text(options, "node-name")
                    .is_some_and(|name| all.iter().any(|(_, other)| text(other, "file") == Some(name)));
            if is_below {
                continue;
            }
            if *drive {
                for key in ["aio", "locking"] {
                    if let Some(value) = options.get(key) {
                        file.entry(key.to_owned()).or_insert_with(|| value.clone());
                    }
                }
            }
            let mut given = Self {
                format: chosen(options, &OF_FORMAT),
                file: chosen(&file, &OF_FILE),
                copy_on_read: *drive && options.get("copy-on-read").and_then(switch).unwrap_or(false),
            };
            // QEMU's default, set explicitly because our nodes have another one.
            given.format.entry("discard").or_insert_with(|| Value::from("ignore"));
            return Some(given);
        }
        None
    }
}

/// Lists the unix sockets of NBD servers that a command line names: QEMU cannot start without these servers.
pub(crate) fn nbd_sockets(process: &Process) -> Vec<PathBuf> {
    let directory = process.directory.clone().unwrap_or_default();
    let socket_in = |options: &Options| -> Option<String> {
        let server = match text(options, "driver") {
            Some("nbd") => text(options, "server.path").or_else(|| text(options, "path")),
            _ => None,
        };
        let named = ["filename", "file"].iter().find_map(|key| socket_of(text(options, key)?));
        server.map(str::to_owned).or(named)
    };
    let mut sockets: Vec<PathBuf> = (all_of(process).iter())
        .filter_map(|(_, options)| socket_in(options).or_else(|| socket_in(&below(options))))
        .map(|socket| directory.join(socket))
        .collect();
    sockets.sort();
    sockets.dedup();
    sockets
}

/// Returns the options of each `-blockdev` and, with true, of each `-drive`.
fn all_of(process: &Process) -> Vec<(bool, Options)> {
    let args = process.command_line.windows(2);
    args.filter_map(|pair| match pair {
        [option, value] => match option.trim_start_matches('-') {
            "blockdev" if option.starts_with('-') => Some((false, options(value))),
            "drive" if option.starts_with('-') => Some((true, options(value))),
            _ => None,
        },
        _ => None,
    })
    .collect()
}

/// Returns the options of the file below, from those that are prefixed with `file.`.
fn below(options: &Options) -> Options {
    let inside =
        |(key, value): (&String, &Value)| Some((key.strip_prefix("file.")?.to_owned(), value.clone()));
    options.iter().filter_map(inside).collect()
}

fn text<'a>(options: &'a Options, key: &str) -> Option<&'a str> {
    options.get(key)?.as_str()
}

fn chosen(options: &Options, known: &[(&str, Kind)]) -> Map<String, Value> {
    let mut chosen = Map::new();
    for (key, kind) in known {
        let Some(value) = options.get(*key) else { continue };
        let value = match kind {
            Kind::Word => value.as_str().map(|word| match (*key, word) {
                ("discard", "off") => Value::from("ignore"),
                ("discard", "on") => Value::from("unmap"),
                _ => Value::from(word),
            }),
            Kind::Number => number(value).map(Value::from),
            Kind::Switch => switch(value).map(Value::from),
        };
        let Some(value) = value else { continue };
        match key.split_once('.') {
            None => {
                chosen.insert((*key).to_owned(), value);
            }
            Some((outer, inner)) => {
                let outer = chosen.entry(outer).or_insert_with(|| Value::Object(Map::new()));
                if let Value::Object(inside) = outer {
                    inside.insert(inner.to_owned(), value);
                }
            }
        }
    }
    chosen
}

fn switch(value: &Value) -> Option<bool> {
    value.as_bool().or_else(|| match value.as_str()? {
        "on" | "yes" | "true" | "y" => Some(true),
        "off" | "no" | "false" | "n" => Some(false),
        _ => None,
    })
}

/// Parses a number with an optional unit, as QEMU's command line accepts it.
fn number(value: &Value) -> Option<u64> {
    if let Some(number) = value.as_u64() {
        return Some(number);
    }
    let text = value.as_str()?;
    let digits = text.trim_end_matches(|c: char| c.is_ascii_alphabetic());
    let shift = match text.get(digits.len()..)?.to_ascii_lowercase().as_str() {
        "" | "b" => 0,
        "k" => 10,
        "m" => 20,
        "g" => 30,
        "t" => 40,
        _ => return None,
    };
    digits.parse::<u64>().ok()?.checked_mul(1 << shift)
}

/// Parses the options of `-blockdev` or `-drive`: JSON, or `key=value` parts separated by commas. A doubled
/// comma belongs to a value.
fn options(value: &str) -> Options {
    let mut options = Options::new();
    if value.starts_with('{') {
        if let Ok(value) = serde_json::from_str::<Value>(value) {
            flatten("", &value, &mut options);
        }
        return options;
    }
    let value = value.replace(",,", "\u{0}");
    for (number, part) in value.split(',').enumerate() {
        let part = part.replace('\u{0}', ",");
        match part.split_once('=') {
            Some((key, value)) => {
                options.insert(key.to_owned(), Value::from(value));
            }
            // `-blockdev qcow2,...` names the driver; a switch without a value is on.
            None if number == 0 => {
                options.insert("driver".to_owned(), Value::from(part));
            }
            None => {
                options.insert(part, Value::from("on"));
            }
        }
    }
    options
}

fn flatten(prefix: &str, value: &Value, into: &mut Options) {
    match value {
        Value::Object(fields) => {
            for (key, value) in fields {
                let key = if prefix.is_empty() { key.clone() } else { format!("{prefix}.{key}") };
                flatten(&key, value, into);
            }
        }
        other => {
            into.insert(prefix.to_owned(), other.clone());
        }
    }
}

#[cfg(test)]
mod tests {
    use std::path::PathBuf;

    use serde_json::json;

    use super::*;

    fn of(args: &[&str]) -> Option<ImageOptions> {
        let command_line = args.iter().map(|word| (*word).to_owned()).collect();
        let directory = Some(PathBuf::from("/vm"));
        let process = Process { command_line, directory, ..Process::default() };
        ImageOptions::of(&process, |file| file == Path::new("/vm/a,b.qcow2"))
    }

    #[test]
    fn options_are_found_in_each_form_of_the_command_line() {
        let apart = [
            "qemu",
            "-blockdev",
            r#"{"driver":"file","filename":"/vm/a,b.qcow2","node-name":"f","locking":"off","aio":"native"}"#,
            "-blockdev",
            r#"{"driver":"qcow2","file":"f","node-name":"d","discard":"unmap","l2-cache-size":1048576,
                "overlap-check":{"template":"all","inactive-l2":false}}"#,
        ];
        let given = of(&apart).expect("given");
        assert_eq!(Value::from(given.file), json!({ "aio": "native", "locking": "off" }));
        let format = json!({ "discard": "unmap", "l2-cache-size": 1048576,
            "overlap-check": { "template": "all", "inactive-l2": false } });
        assert_eq!(Value::from(given.format), format);

        let inline = [
            "qemu",
            "--blockdev",
            "qcow2,node-name=d,file.driver=file,file.filename=a,,b.qcow2,\
            file.locking=off,discard-no-unref=on,cache-clean-interval=5",
        ];
        let given = of(&inline).expect("given");
        assert_eq!(Value::from(given.file), json!({ "locking": "off" }));
        let format = json!({ "discard": "ignore", "discard-no-unref": true, "cache-clean-interval": 5 });
        assert_eq!(Value::from(given.format), format);

        let drive = [
            "qemu",
            "-drive",
            "file=a,,b.qcow2,if=none,aio=io_uring,discard=on,l2-cache-size=2M,copy-on-read=on",
        ];
        let given = of(&drive).expect("given");
        assert!(given.copy_on_read);
        assert_eq!(Value::from(given.file), json!({ "aio": "io_uring" }));
        assert_eq!(Value::from(given.format), json!({ "discard": "unmap", "l2-cache-size": 2097152 }));

        assert_eq!(of(&["qemu", "-drive", "file=other.qcow2"]), None);
    }
}
