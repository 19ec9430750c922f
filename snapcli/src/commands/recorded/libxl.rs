//! `snapshotdata-d.NAME.libxl-json`: what the prototype of xl's snapshots kept in
//! `/var/lib/xen/snapshots/UUID`.

use camino::Utf8PathBuf;
use jiff::Timestamp;
use serde::Deserialize;
use snapcore::service::RecordedSnapshot;

use super::Parsed;

#[derive(Deserialize)]
struct Record {
    name: String,
    #[serde(default)]
    description: Option<String>,
    #[serde(default)]
    creation_time: Option<Seconds>,
    #[serde(default)]
    memory: Option<String>,
    #[serde(default)]
    parent: Option<String>,
    #[serde(default)]
    disks: Vec<Disk>,
}

/// The prototype's versions wrote a number, or a text.
#[derive(Deserialize)]
#[serde(untagged)]
enum Seconds {
    Number(i64),
    Text(String),
}

#[derive(Deserialize)]
struct Disk {
    /// The name of the internal snapshot.
    #[serde(default)]
    name: Option<String>,
    /// The overlay of an external one.
    #[serde(default)]
    file: Option<Utf8PathBuf>,
}

pub(super) fn parse(text: &str) -> Parsed {
    let record: Record = serde_json::from_str(text).map_err(|error| error.to_string())?;
    let created = match &record.creation_time {
        None => None,
        Some(Seconds::Number(seconds)) => Some(*seconds),
        Some(Seconds::Text(text)) => {
            Some(text.trim().parse().map_err(|_| format!("its creation_time is {text:?}"))?)
        }
    };
    let created = created
        .map(|seconds| Timestamp::from_second(seconds).map_err(|_| format!("its creation_time is {seconds}")))
        .transpose()?;
    let memory = record.memory.filter(|memory| !memory.is_empty() && memory != "no");
    let tag = record.disks.iter().find_map(|disk| disk.name.clone().filter(|name| !name.is_empty()));
    let files = record.disks.into_iter().filter_map(|disk| disk.file);
    Ok(RecordedSnapshot::new(record.name.clone())
        .parent(record.parent.filter(|parent| !parent.is_empty()))
        .created(created)
        .description(record.description.filter(|text| !text.is_empty()))
        .tag(Some(tag.unwrap_or(record.name)))
        .overlays(files.filter(|file| !file.as_str().is_empty()).collect())
        .memory(memory.map(|file| {
            format!("`xl restore` reads {file}, and domsnap does not; the snapshot has its disks alone")
        })))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn record_is_read() {
        let text = r#"{ "name": "s1", "description": "", "creation_time": "1420070400",
            "memory": "/var/lib/xen/snapshots/0/s1.save", "type": "external", "running": true,
            "disks": [ { "device": "hda", "name": null, "file": "/srv/a.s1", "format": "qcow2", "type": "external" } ] }"#;
        let record = parse(text).unwrap();
        assert_eq!(record.created, Timestamp::from_second(1_420_070_400).ok());
        assert_eq!(record.overlays, [Utf8PathBuf::from("/srv/a.s1")]);
        assert_eq!((record.description, record.tag.as_deref()), (None, Some("s1")));
        assert!(record.memory.is_some_and(|memory| memory.contains("s1.save")));
    }

    #[test]
    fn damaged_record_is_an_error() {
        for text in ["{}", "{\"name\": 1}", "{\"name\": \"a\", \"creation_time\": \"x\"}", "{\"name\": \"a\""]
        {
            assert!(parse(text).is_err(), "{text}");
        }
    }
}
