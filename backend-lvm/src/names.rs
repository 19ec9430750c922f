//! Names of groups and volumes: as paths, as device-mapper names, and of volumes that this backend creates.

use std::fmt;

use camino::{Utf8Path, Utf8PathBuf};
use snapcore::{Error, ErrorKind, LayerName, Result};

/// Longest name of a volume (lvm2, `NAME_LEN`), and of a device-mapper device (`DM_NAME_LEN`), without the
/// terminator.
const MAX_NAME: usize = 127;

/// Longest suffix that lvm appends to a device's name for a part of a volume: `-real`.
const MAX_SUFFIX: usize = 5;

/// A logical volume, by its group and name.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(crate) struct Volume {
    pub(crate) group: String,
    pub(crate) name: String,
}

impl fmt::Display for Volume {
    /// Writes the form for lvm's commands.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.group, self.name)
    }
}

impl Volume {
    /// Parses a path of a volume: `/dev/GROUP/NAME`, or `/dev/mapper/GROUP-NAME` with hyphens in either
    /// doubled.
    ///
    /// # Errors
    /// [`ErrorKind::Unsupported`] for any other path.
    pub(crate) fn of_path(path: &Utf8Path) -> Result<Self> {
        let parts: Vec<&str> = path.as_str().split('/').collect();
        let found = match parts.as_slice() {
            ["", "dev", "mapper", name] => of_mapper(name),
            ["", "dev", group, name] => Some(Self { group: (*group).to_owned(), name: (*name).to_owned() }),
            _ => None,
        };
        found.filter(|volume| is_name(&volume.group) && is_name(&volume.name)).ok_or_else(|| {
            Error::new(ErrorKind::Unsupported, format!("{path} is no path of a logical volume"))
                .state("no changes made")
                .advise("give it as /dev/GROUP/VOLUME or /dev/mapper/GROUP-VOLUME: other names change from boot to boot")
        })
    }

    /// Returns another volume of the same group.
    pub(crate) fn beside(&self, name: impl Into<String>) -> Self {
        Self { group: self.group.clone(), name: name.into() }
    }

    /// Returns `/dev/GROUP/NAME`.
    pub(crate) fn path(&self) -> Utf8PathBuf {
        Utf8PathBuf::from(format!("/dev/{}/{}", self.group, self.name))
    }

    /// Returns the name of its device in device-mapper, which doubles hyphens.
    pub(crate) fn device(&self) -> String {
        format!("{}-{}", self.group.replace('-', "--"), self.name.replace('-', "--"))
    }

    /// Returns the volume that the domain writes, as a layer.
    pub(crate) fn layer(&self) -> LayerName {
        LayerName(self.name.clone())
    }

    /// Returns the permanent name of a new point.
    pub(crate) fn point(&self, stamp: u32) -> LayerName {
        LayerName(format!("{}.ds-{stamp:08x}", self.name))
    }

    /// Returns the name of the new volume that a revert prepares.
    pub(crate) fn replacement(&self, stamp: u32) -> LayerName {
        LayerName(format!("{}.ds-{stamp:08x}-new", self.name))
    }

    /// Returns the name of the previous volume after a revert.
    pub(crate) fn previous(&self, stamp: u32) -> LayerName {
        LayerName(format!("{}.ds-{stamp:08x}-old", self.name))
    }

    /// Returns the name for data of a domain that was started in the middle of a revert.
    pub(crate) fn salvaged(&self, stamp: u32) -> LayerName {
        LayerName(format!("{}.ds-{stamp:08x}-kept", self.name))
    }

    /// Returns true if `name` is one of a point of this volume.
    pub(crate) fn is_point(&self, name: &str) -> bool {
        self.suffix_of(name).is_some_and(|mark| mark.len() == 8)
    }

    /// Returns true if `name` is one that a revert gives to a volume temporarily.
    pub(crate) fn is_temporary(&self, name: &str) -> bool {
        self.suffix_of(name).is_some_and(|mark| mark.ends_with("-new") || mark.ends_with("-old"))
    }

    /// Returns true if `name` is one of saved data of a domain that was started in the middle of a revert.
    pub(crate) fn is_salvaged(&self, name: &str) -> bool {
        self.suffix_of(name).is_some_and(|mark| mark.ends_with("-kept"))
    }

    /// Returns true if `name` is one that this backend gives to volumes made of this one.
    pub(crate) fn is_made_of_it(&self, name: &str) -> bool {
        self.suffix_of(name).is_some()
    }

    /// Returns the part after `.ds-` in the name of a volume that was made of this one.
    fn suffix_of<'a>(&self, name: &'a str) -> Option<&'a str> {
        let mark = name.strip_prefix(self.name.as_str())?.strip_prefix(".ds-")?;
        let hex = mark.get(..8)?;
        let rest = mark.get(8..)?;
        let known = matches!(rest, "" | "-new" | "-old" | "-kept");
        (known && hex.bytes().all(|byte| matches!(byte, b'0'..=b'9' | b'a'..=b'f'))).then_some(mark)
    }

    /// Refuses a volume whose points would have too long names.
    pub(crate) fn require_room_for_names(&self) -> Result<()> {
        let longest = self.salvaged(0).0;
        let device = escaped(&self.group) + 1 + escaped(&longest) + MAX_SUFFIX;
        if longest.len() <= MAX_NAME && device <= MAX_NAME {
            return Ok(());
        }
        Err(Error::new(
            ErrorKind::Refused,
            format!(
                "{self}: a point of it would have a name of {} characters, {device} as a device, and {MAX_NAME} are allowed",
                longest.len()
            ),
        )
        .state("no changes made")
        .advise("give the volume or its group a shorter name: 'lvrename', 'vgrename'"))
    }
}

/// lvm2's rule for names of groups and volumes.
fn is_name(name: &str) -> bool {
    !name.is_empty()
        && name.len() <= MAX_NAME
        && !name.starts_with('-')
        && name != "."
        && name != ".."
        && name.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"+_.-".contains(&byte))
}

/// Returns the length of a name in device-mapper, which doubles hyphens.
fn escaped(name: &str) -> usize {
    name.len() + name.bytes().filter(|byte| *byte == b'-').count()
}

/// Splits a device-mapper name into group and volume, at the one hyphen that is not doubled.
fn of_mapper(name: &str) -> Option<Volume> {
    let bytes = name.as_bytes();
    let mut at = 0;
    let mut parted = None;
    while at < bytes.len() {
        match (bytes[at], bytes.get(at + 1)) {
            (b'-', Some(b'-')) => at += 2,
            (b'-', _) => {
                // A second single hyphen separates the suffix of an inner device of lvm.
                if parted.replace(at).is_some() {
                    return None;
                }
                at += 1;
            }
            _ => at += 1,
        }
    }
    let (group, volume) = name.split_at(parted?);
    let unescaped = |part: &str| part.replace("--", "-");
    Some(Volume { group: unescaped(group), name: unescaped(volume.get(1..)?) })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn volume(path: &str) -> Option<(String, String)> {
        Volume::of_path(path.into()).ok().map(|volume| (volume.group, volume.name))
    }

    #[test]
    fn both_forms_of_a_path_name_the_same_volume() {
        for (group, name, mapper) in [
            ("vg", "root", "/dev/mapper/vg-root"),
            ("my-vg", "a-b--c", "/dev/mapper/my--vg-a--b----c"),
            ("vg-", "x", "/dev/mapper/vg---x"),
            ("a+b", "c.d_e", "/dev/mapper/a+b-c.d_e"),
        ] {
            let expected = Some((group.to_owned(), name.to_owned()));
            assert_eq!(volume(&format!("/dev/{group}/{name}")), expected);
            assert_eq!(volume(mapper), expected, "{mapper}");
            let volume = Volume { group: group.into(), name: name.into() };
            assert_eq!(format!("/dev/mapper/{}", volume.device()), mapper);
        }
    }

    /// Paths that are not those of a volume are refused.
    #[test]
    fn paths_of_no_volume_are_refused() {
        for path in [
            "/dev/dm-3",
            "/dev/sda",
            "/dev/mapper/vg",
            "/dev/mapper/vg-lv-cow",
            "/vm/vg/lv",
            "/dev/vg/..",
            "/dev/vg/-lv",
            "/dev/vg/a b",
            "/dev/vg/a/b",
        ] {
            assert_eq!(volume(path), None, "{path}");
        }
    }

    /// Names that this backend makes are recognised, and no others.
    #[test]
    fn made_names_are_recognised_and_no_others() {
        let volume = Volume { group: "vg".into(), name: "root".into() };
        assert!(volume.is_point(volume.point(0x1a).as_str()));
        assert!(
            volume.is_temporary(volume.replacement(1).as_str())
                && volume.is_temporary(volume.previous(1).as_str())
        );
        assert!(
            volume.is_salvaged(volume.salvaged(1).as_str())
                && !volume.is_point(volume.salvaged(1).as_str())
                && !volume.is_temporary(volume.salvaged(1).as_str())
        );
        for other in [
            "root",
            "root.ds-1a",
            "root.ds-0000001G",
            "other.ds-0000001a",
            "root.ds-0000001a-x",
            "root.ds-0000001A",
        ] {
            assert!(!volume.is_point(other) && !volume.is_temporary(other), "{other}");
        }
    }

    /// A volume whose points would have too long names is refused.
    #[test]
    fn volume_with_too_long_names_is_refused() {
        let long = |name: String| Volume { group: "vg".into(), name }.require_room_for_names();
        long("x".repeat(100)).expect("there is room");
        let error = long("x".repeat(115)).expect_err("there is none");
        assert!(error.to_string().contains("127"), "{error}");
        assert!(long("-".repeat(60)).is_err());
    }
}
