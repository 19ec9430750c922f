//! What is recorded of a QEMU's process, what of the record is shown, and what is taken from a manifest.
//!
//! An environment may contain tokens and passwords of the user who started the process. So only variables
//! that another start needs are recorded. A command line may contain secrets too. It is recorded, because the
//! domain is started with it, in files that only their owner can read. Its secrets are hidden wherever it is
//! shown.

use serde_json::{Value, json};

/// Variables that say where QEMU finds its programs, libraries and displays, and which language it
/// uses.
const NEEDED: [&str; 11] = [
    "PATH",
    "HOME",
    "LANG",
    "LANGUAGE",
    "TZ",
    "TMPDIR",
    "DISPLAY",
    "WAYLAND_DISPLAY",
    "XAUTHORITY",
    "XDG_RUNTIME_DIR",
    "LD_LIBRARY_PATH",
];

/// Placeholder for a hidden secret.
const HIDDEN: &str = "(hidden)";

/// Returns true for a variable of the environment that the next start of a QEMU needs. No other is recorded.
pub(crate) fn keeps_variable(name: &str) -> bool {
    NEEDED.contains(&name) || name.starts_with("LC_") || name.starts_with("QEMU_")
}

/// Returns what may be recorded of a machine's record that a manifest has: without the variables that are not
/// needed, which an older domsnap wrote, and if the manifest is not trusted, without all that a start would
/// run.
pub(super) fn kept_record(record: &Value, trusted: bool) -> Value {
    let mut kept = record.clone();
    let Some(process) = kept.get_mut("process") else { return kept };
    if !trusted {
        *process = json!({ "command_line": [], "environment": [] });
    } else if let Some(variables) = process.get_mut("environment").and_then(Value::as_array_mut) {
        variables.retain(|variable| variable.get(0).and_then(Value::as_str).is_some_and(keeps_variable));
    }
    kept
}

/// Returns a machine's record fit for display: without its environment and without the secrets of its command
/// line.
pub(super) fn shown_record(record: &Value) -> Value {
    let mut shown = record.clone();
    if let Some(process) = shown.get_mut("process").and_then(Value::as_object_mut) {
        process.remove("environment");
        for word in process.get_mut("command_line").and_then(Value::as_array_mut).into_iter().flatten() {
            if let Some(text) = word.as_str() {
                *word = Value::String(shown_word(text));
            }
        }
    }
    shown
}

/// Returns an argument of a command line fit for display: the values of passwords and of secret objects are
/// hidden.
pub(crate) fn shown_word(word: &str) -> String {
    if let Ok(mut object) = serde_json::from_str::<Value>(word)
        && object.is_object()
    {
        hide(&mut object);
        return object.to_string();
    }
    let is_secret = word == "secret" || word.starts_with("secret,") || word.contains("qom-type=secret");
    let part = |part: &str| match part.split_once('=') {
        Some((name, _)) if is_hidden(name, is_secret) => format!("{name}={HIDDEN}"),
        _ => part.to_owned(),
    };
    // A comma inside a value is doubled, so the text after it still belongs to the value.
    let mut shown: Vec<String> = Vec::new();
    let mut inside = false;
    let mut parts = word.split(',').peekable();
    while let Some(text) = parts.next() {
        if text.is_empty() && parts.peek().is_some() && !shown.is_empty() {
            inside = true;
            if !shown.last().is_some_and(|last| last.ends_with(HIDDEN)) {
                shown.push(String::new());
            }
            continue;
        }
        let follows = std::mem::take(&mut inside);
        if follows && shown.last().is_some_and(|last| last.ends_with(HIDDEN)) {
            continue;
        }
        shown.push(part(text));
    }
    shown.join(",")
}

fn is_hidden(name: &str, is_secret: bool) -> bool {
    let name = name.rsplit('.').next().unwrap_or(name);
    matches!(name, "password" | "passwd" | "passphrase") || (is_secret && name == "data")
}

fn hide(value: &mut Value) {
    match value {
        Value::Object(fields) => {
            let is_secret = fields.get("qom-type").and_then(Value::as_str) == Some("secret");
            for (name, field) in fields {
                match is_hidden(name, is_secret) && field.is_string() {
                    true => *field = Value::String(HIDDEN.to_owned()),
                    false => hide(field),
                }
            }
        }
        Value::Array(all) => all.iter_mut().for_each(hide),
        _ => {}
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn secrets_of_a_command_line_are_not_shown() {
        for (word, shown) in [
            ("secret,id=s,data=abc", "secret,id=s,data=(hidden)"),
            ("secret,id=s,data=a,,b,format=raw", "secret,id=s,data=(hidden),format=raw"),
            ("secret,id=s,file=/run/key", "secret,id=s,file=/run/key"),
            ("port=1,password=x", "port=1,password=(hidden)"),
            ("file.password=x,id=a", "file.password=(hidden),id=a"),
            ("a,,b", "a,,b"),
            ("password-secret=s,id=d", "password-secret=s,id=d"),
            ("file=/a.img,format=x", "file=/a.img,format=x"),
            (
                r#"{"qom-type":"secret","id":"s","data":"x"}"#,
                r#"{"data":"(hidden)","id":"s","qom-type":"secret"}"#,
            ),
        ] {
            assert_eq!(shown_word(word), shown);
        }
    }

    #[test]
    fn only_variables_that_a_start_needs_are_kept() {
        let variables = json!([
            ["PATH", "/bin"],
            ["API_TOKEN", "x"],
            ["LC_ALL", "C"],
            ["QEMU_AUDIO_DRV", "z"],
            ["QEMUX", "y"]
        ]);
        let record = json!({ "process": { "command_line": ["qemu"], "environment": variables } });
        let kept = kept_record(&record, true);
        assert_eq!(
            kept["process"]["environment"],
            json!([["PATH", "/bin"], ["LC_ALL", "C"], ["QEMU_AUDIO_DRV", "z"]])
        );
        assert_eq!(shown_record(&kept), json!({ "process": { "command_line": ["qemu"] } }));
    }

    /// Nothing that a start would run is taken from a manifest that is not trusted.
    #[test]
    fn untrusted_record_has_no_command() {
        let process = json!({ "program": "/bin/sh", "command_line": ["sh"], "environment": [["PATH", "/"]] });
        let kept = kept_record(&json!({ "machine": "q35", "process": process }), false);
        let none = json!({ "command_line": [], "environment": [] });
        assert_eq!(kept, json!({ "machine": "q35", "process": none }));
    }
}
