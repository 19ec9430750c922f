//! lvm tags of our volumes: by them points are found again if catalogue and manifests are lost.

use snapcore::{LayerName, SnapshotName};

use crate::device::DeviceState;

/// The tag of every volume that this backend created.
pub(crate) const OURS: &str = "domsnap";

const NAME: &str = "domsnap.name=";
const PARENT: &str = "domsnap.parent=";
const FROM: &str = "domsnap.from=";
const WORK: &str = "domsnap.work=";
const TAKEN: &str = "domsnap.taken=";
const SINCE: &str = "domsnap.since=";

/// Parsed tags of a volume.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct ParsedTags {
    /// True if this backend created it.
    pub(crate) ours: bool,
    /// For a point: its snapshot's name.
    pub(crate) name: Option<String>,
    /// For a point: the point that was current when it was taken.
    pub(crate) parent: Option<LayerName>,
    /// For a current volume: the point from which a revert created it.
    pub(crate) from: Option<LayerName>,
    /// The operation that created it, or took it again.
    pub(crate) work: Option<String>,
    /// For a point that was taken again: its first time, in seconds since 1970.
    pub(crate) taken: Option<i64>,
    /// The state of its origin when it was taken.
    pub(crate) since: Option<DeviceState>,
}

impl ParsedTags {
    /// Parses the tags.
    pub(crate) fn of<'a>(tags: impl IntoIterator<Item = &'a str>) -> Self {
        let mut parsed = Self::default();
        let layer = |text: &str| (!text.is_empty()).then(|| LayerName(text.to_owned()));
        for tag in tags {
            if tag == OURS {
                parsed.ours = true;
            } else if let Some(name) = tag.strip_prefix(NAME) {
                parsed.name = Some(name.to_owned());
            } else if let Some(parent) = tag.strip_prefix(PARENT) {
                parsed.parent = layer(parent);
            } else if let Some(from) = tag.strip_prefix(FROM) {
                parsed.from = layer(from);
            } else if let Some(work) = tag.strip_prefix(WORK) {
                parsed.work = Some(work.to_owned());
            } else if let Some(taken) = tag.strip_prefix(TAKEN) {
                parsed.taken = taken.parse().ok();
            } else if let Some(since) = tag.strip_prefix(SINCE) {
                parsed.since = DeviceState::parse(since);
            }
        }
        parsed
    }
}

/// Returns the tags of a new point.
pub(crate) fn of_point(name: &SnapshotName, parent: Option<&LayerName>) -> Vec<String> {
    let mut tags = vec![OURS.to_owned(), format!("{NAME}{name}")];
    tags.extend(parent.map(|parent| format!("{PARENT}{parent}")));
    tags
}

/// Returns the tags of a volume that an operation uses temporarily.
pub(crate) fn of_work(work: &str, from: Option<&LayerName>) -> Vec<String> {
    let mut tags = vec![OURS.to_owned(), format!("{WORK}{work}")];
    tags.extend(from.map(|from| format!("{FROM}{from}")));
    tags
}

/// Returns the tags that are not this backend's.
pub(crate) fn of_others(tags: &[String]) -> impl Iterator<Item = &String> {
    tags.iter()
        .filter(|tag| tag.strip_prefix(OURS).is_none_or(|rest| !rest.is_empty() && !rest.starts_with('.')))
}

/// Returns the tag that says how often the origin had been written.
pub(crate) fn of_writes(state: &DeviceState) -> String {
    format!("{SINCE}{state}")
}

/// Returns the tags of a point that an operation takes again, from its previous tags.
pub(crate) fn retaken(previous: &[String], work: &str, taken: i64) -> Vec<String> {
    let is_kept = |tag: &&String| ![WORK, TAKEN, SINCE].iter().any(|prefix| tag.starts_with(prefix));
    let mut tags: Vec<String> = previous.iter().filter(is_kept).cloned().collect();
    let taken = ParsedTags::of(previous.iter().map(String::as_str)).taken.unwrap_or(taken);
    tags.push(format!("{WORK}{work}"));
    tags.push(format!("{TAKEN}{taken}"));
    tags
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Tags are parsed as they were written.
    #[test]
    fn tags_are_parsed_as_written() {
        let name = SnapshotName::new("v1:2026+x").expect("a name");
        let parent = LayerName("root.ds-00000001".into());
        let tags = of_point(&name, Some(&parent));
        // lvm2: letters, digits, and "_+.-/=!:&#".
        assert!(
            tags.iter()
                .flat_map(|tag| tag.bytes())
                .all(|b| b.is_ascii_alphanumeric() || b"_+.-/=!:&#".contains(&b))
        );
        let parsed = ParsedTags::of(tags.iter().map(String::as_str));
        assert_eq!(
            (parsed.ours, parsed.name.as_deref(), parsed.parent),
            (true, Some("v1:2026+x"), Some(parent))
        );
    }

    /// A state that was written to a tag is read from it, and lvm accepts its characters.
    #[test]
    fn state_of_the_origin_is_parsed_as_written() {
        let state = DeviceState::fresh();
        let tag = of_writes(&state);
        assert!(tag.bytes().all(|b| b.is_ascii_alphanumeric() || b"_+.-/=!:&#".contains(&b)), "{tag}");
        assert_eq!(ParsedTags::of([tag.as_str()]).since, Some(state));
        let tag = "domsnap.since=0c7c2c2e-7e0e-4b5e-8f6e-8f0e4a3b2c1d:17:42";
        let state = ParsedTags::of([tag]).since.expect("it has the device's sequence number");
        assert_eq!(of_writes(&state), tag);
        let earlier = "domsnap.since=0c7c2c2e-7e0e-4b5e-8f6e-8f0e4a3b2c1d:17";
        let state = ParsedTags::of([earlier]).since.expect("earlier versions wrote this");
        assert_eq!(of_writes(&state), earlier);
        assert_eq!(ParsedTags::of(["domsnap.since=x", "domsnap.since=:"]).since, None);
    }

    /// The tags of other programs are distinguished from ours, also those that begin alike.
    #[test]
    fn tags_of_others_are_known() {
        let tags = ["domsnap", "domsnap.work=1", "domsnap.name=x", "db", "domsnapper", "site.a"];
        let tags = tags.map(str::to_owned);
        assert_eq!(of_others(&tags).collect::<Vec<_>>(), ["db", "domsnapper", "site.a"]);
    }

    /// A point that was taken again twice keeps its first time.
    #[test]
    fn retaken_point_keeps_its_first_time() {
        let name = SnapshotName::new("a").expect("a name");
        let once = retaken(&of_point(&name, None), "1", 100);
        let twice = retaken(&once, "2", 200);
        let parsed = ParsedTags::of(twice.iter().map(String::as_str));
        assert_eq!(
            (parsed.taken, parsed.work.as_deref(), parsed.name.as_deref()),
            (Some(100), Some("2"), Some("a"))
        );
    }
}
