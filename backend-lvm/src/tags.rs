//! What volumes say of themselves, in lvm's tags: so that points are found again where catalogue and manifests are lost.

use snapcore::{LayerName, SnapshotName};

/// Every volume that this backend made has it.
pub(crate) const OURS: &str = "domsnap";

const NAME: &str = "domsnap.name=";
const PARENT: &str = "domsnap.parent=";
const FROM: &str = "domsnap.from=";
const WORK: &str = "domsnap.work=";
const TAKEN: &str = "domsnap.taken=";

/// What the tags of a volume say.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Told {
    /// It was made by this backend.
    pub(crate) ours: bool,
    /// Of a point: its snapshot's name.
    pub(crate) name: Option<String>,
    /// Of a point: the point that was current when it was taken.
    pub(crate) parent: Option<LayerName>,
    /// Of a present: the point that it was made from by a revert.
    pub(crate) from: Option<LayerName>,
    /// By which operation it was made, or made anew.
    pub(crate) work: Option<String>,
    /// Of a point that was made anew: when it was taken first, in seconds since 1970.
    pub(crate) taken: Option<i64>,
}

impl Told {
    /// Reads them.
    pub(crate) fn of<'a>(tags: impl IntoIterator<Item = &'a str>) -> Self {
        let mut told = Self::default();
        let layer = |text: &str| (!text.is_empty()).then(|| LayerName(text.to_owned()));
        for tag in tags {
            if tag == OURS {
                told.ours = true;
            } else if let Some(name) = tag.strip_prefix(NAME) {
                told.name = Some(name.to_owned());
            } else if let Some(parent) = tag.strip_prefix(PARENT) {
                told.parent = layer(parent);
            } else if let Some(from) = tag.strip_prefix(FROM) {
                told.from = layer(from);
            } else if let Some(work) = tag.strip_prefix(WORK) {
                told.work = Some(work.to_owned());
            } else if let Some(taken) = tag.strip_prefix(TAKEN) {
                told.taken = taken.parse().ok();
            }
        }
        told
    }
}

/// Those of a new point.
pub(crate) fn of_point(name: &SnapshotName, parent: Option<&LayerName>) -> Vec<String> {
    let mut tags = vec![OURS.to_owned(), format!("{NAME}{name}")];
    tags.extend(parent.map(|parent| format!("{PARENT}{parent}")));
    tags
}

/// Those of a volume that an operation needs for its own time.
pub(crate) fn of_work(work: &str, from: Option<&LayerName>) -> Vec<String> {
    let mut tags = vec![OURS.to_owned(), format!("{WORK}{work}")];
    tags.extend(from.map(|from| format!("{FROM}{from}")));
    tags
}

/// Those of a point that is made anew by an operation, from those that it had.
pub(crate) fn made_anew(former: &[String], work: &str, taken: i64) -> Vec<String> {
    let stays = |tag: &&String| !tag.starts_with(WORK) && !tag.starts_with(TAKEN);
    let mut tags: Vec<String> = former.iter().filter(stays).cloned().collect();
    let taken = Told::of(former.iter().map(String::as_str)).taken.unwrap_or(taken);
    tags.push(format!("{WORK}{work}"));
    tags.push(format!("{TAKEN}{taken}"));
    tags
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_written_is_read() {
        let name = SnapshotName::new("v1:2026+x").expect("a name");
        let parent = LayerName("root.ds-00000001".into());
        let tags = of_point(&name, Some(&parent));
        // lvm2: letters, digits, and "_+.-/=!:&#".
        assert!(
            tags.iter()
                .flat_map(|tag| tag.bytes())
                .all(|b| b.is_ascii_alphanumeric() || b"_+.-/=!:&#".contains(&b))
        );
        let told = Told::of(tags.iter().map(String::as_str));
        assert_eq!((told.ours, told.name.as_deref(), told.parent), (true, Some("v1:2026+x"), Some(parent)));
    }

    #[test]
    fn a_point_that_is_made_anew_twice_keeps_its_first_time() {
        let name = SnapshotName::new("a").expect("a name");
        let once = made_anew(&of_point(&name, None), "1", 100);
        let twice = made_anew(&once, "2", 200);
        let told = Told::of(twice.iter().map(String::as_str));
        assert_eq!(
            (told.taken, told.work.as_deref(), told.name.as_deref()),
            (Some(100), Some("2"), Some("a"))
        );
    }
}
