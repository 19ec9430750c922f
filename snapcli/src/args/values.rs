//! The values of options: disks and how they are taken, sizes, times.

use camino::Utf8PathBuf;
use jiff::Timestamp;
use snapcore::service::{CreateDisk, DomainRef};
use snapcore::{LayerName, PointKind, Target, local_zone};

/// A disk of a domain to register.
#[derive(Debug, Clone)]
pub struct DiskPlace {
    pub target: Target,
    pub path: Utf8PathBuf,
    pub format: Option<String>,
}

/// The domain of a command; or, with `--group`, its domains.
#[derive(Debug, Clone)]
pub struct Domains {
    /// Absent: it is a list of domains alone.
    one: Option<DomainRef>,
    text: String,
}

impl Domains {
    /// The domain, without `--group`.
    ///
    /// # Errors
    /// Text that only a group can have.
    pub fn one(&self) -> snapcore::Result<DomainRef> {
        match &self.one {
            Some(one) => Ok(one.clone()),
            None => self.text.parse(),
        }
    }

    /// The domains, with `--group`.
    ///
    /// # Errors
    /// Text that is no list of domains.
    pub fn each(&self) -> snapcore::Result<Vec<DomainRef>> {
        DomainRef::parse_group(&self.text)
    }
}

impl From<DomainRef> for Domains {
    fn from(one: DomainRef) -> Self {
        Self { text: one.to_string(), one: Some(one) }
    }
}

impl std::str::FromStr for Domains {
    type Err = snapcore::Error;

    fn from_str(text: &str) -> snapcore::Result<Self> {
        let one = match text.parse() {
            Ok(one) => Some(one),
            Err(error) => match DomainRef::parse_group(text) {
                Ok(group) if group.len() > 1 => None,
                _ => return Err(error),
            },
        };
        Ok(Self { one, text: text.to_owned() })
    }
}

/// A time, or none.
#[derive(Debug, Clone, Copy)]
pub struct Moment(pub Option<Timestamp>);

pub(super) fn disk_choice(text: &str) -> Result<(Target, CreateDisk), String> {
    let rule = "expected TARGET=internal, TARGET=external[,path=FILE], TARGET=skip, or TARGET=METHOD with a method that \
                `domsnap backends` lists for the disk's format";
    let (target, how) = text.split_once('=').ok_or(rule)?;
    let target = Target::new(target).map_err(|error| error.to_string())?;
    let (how, option) = match how.split_once(',') {
        Some((how, option)) => (how, Some(option)),
        None => (how, None),
    };
    let path = match option.map(|option| option.split_once('=')) {
        None => None,
        Some(Some(("path", file))) if !file.is_empty() => Some(LayerName(file.to_owned())),
        Some(_) => return Err(rule.to_owned()),
    };
    match (how, path) {
        ("internal", None) => Ok((target, CreateDisk::Take(PointKind::Internal, None))),
        ("external", path) => Ok((target, CreateDisk::Take(PointKind::External, path))),
        ("skip", None) => Ok((target, CreateDisk::Skip)),
        (method, None) if is_word(method) => Ok((target, CreateDisk::Method(method.to_owned()))),
        _ => Err(rule.to_owned()),
    }
}

pub(super) fn skipped_disk(text: &str) -> Result<Target, String> {
    match disk_choice(text) {
        Ok((target, CreateDisk::Skip)) => Ok(target),
        _ => Err("expected TARGET=skip".to_owned()),
    }
}

/// Returns true if `text` can be the name of a backend's method.
fn is_word(text: &str) -> bool {
    !text.is_empty() && text.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-')
}

/// Reads a size. Units are powers of 1024, with or without `iB`.
pub(super) fn bytes(text: &str) -> Result<u64, String> {
    let rule = "expected a number of bytes, optionally followed by KiB, MiB or GiB (or K, M, G)";
    let end = text.find(|c: char| !c.is_ascii_digit()).unwrap_or(text.len());
    let (digits, unit) = text.split_at(end);
    let unit = match unit.to_ascii_lowercase().as_str() {
        "" => 1,
        "k" | "kib" => 1 << 10,
        "m" | "mib" => 1 << 20,
        "g" | "gib" => 1 << 30,
        _ => return Err(rule.to_owned()),
    };
    digits.parse::<u64>().ok().and_then(|number| number.checked_mul(unit)).ok_or_else(|| rule.to_owned())
}

/// Reads a time: of RFC 3339, of the local zone, or a span from now (`7d`, `36h`).
pub(super) fn when(text: &str) -> Result<Timestamp, String> {
    let now = Timestamp::now().to_zoned(local_zone());
    if let Ok(time) = text.parse::<Timestamp>() {
        return Ok(time);
    }
    if let Ok(local) = text.parse::<jiff::civil::DateTime>() {
        return local.to_zoned(local_zone()).map(|time| time.timestamp()).map_err(|error| error.to_string());
    }
    let rule =
        "expected a date (2026-12-31), a date and time (2026-12-31T18:00), or a span from now (7d, 36h)";
    let span = text.parse::<jiff::Span>().map_err(|_| rule)?;
    match now.checked_add(span) {
        Ok(time) if time > now => {
            Timestamp::from_second(time.timestamp().as_second()).map_err(|_| rule.to_owned())
        }
        _ => Err(rule.to_owned()),
    }
}

pub(super) fn when_or_never(text: &str) -> Result<Moment, String> {
    match text {
        "never" => Ok(Moment(None)),
        text => when(text).map(Some).map(Moment),
    }
}

pub(super) fn disk_place(text: &str) -> Result<DiskPlace, String> {
    let rule = "expected TARGET=PATH or TARGET=PATH,format=FORMAT";
    let (target, rest) = text.split_once('=').ok_or(rule)?;
    let target = Target::new(target).map_err(|error| error.to_string())?;
    let (path, format) = match rest.rsplit_once(",format=") {
        Some((path, format)) if !format.is_empty() => (path, Some(format.to_owned())),
        Some(_) => return Err(rule.to_owned()),
        None => (rest, None),
    };
    if path.is_empty() {
        return Err(rule.to_owned());
    }
    Ok(DiskPlace { target, path: path.into(), format })
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A time is a date, a date with a time of day, or a span from now.
    #[test]
    fn times_are_dates_or_spans() {
        assert_eq!(when("2026-12-31T18:00:00Z").unwrap().to_string(), "2026-12-31T18:00:00Z");
        let local = when("2026-12-31T18:00").unwrap().to_zoned(local_zone());
        assert_eq!(local.datetime().to_string(), "2026-12-31T18:00:00");
        assert_eq!(when("2026-12-31").unwrap().to_zoned(local_zone()).date().to_string(), "2026-12-31");
        let days = when("7d").unwrap().as_second() - Timestamp::now().as_second();
        assert!((6 * 86_400..8 * 86_400).contains(&days), "{days}");
        for bad in ["", "7", "-7d", "0s", "tomorrow", "2026-13-01", "99999999999999y"] {
            assert!(when(bad).unwrap_err().starts_with("expected a date"), "{bad}");
        }
        assert!(when_or_never("never").unwrap().0.is_none());
    }

    /// Units are powers of 1024; what is no size, or too large, is refused.
    #[test]
    fn sizes_have_binary_units() {
        for (text, size) in
            [("0", 0), ("512", 512), ("4K", 4096), ("1MiB", 1 << 20), ("1m", 1 << 20), ("1G", 1 << 30)]
        {
            assert_eq!(bytes(text), Ok(size), "{text}");
        }
        assert_eq!([bytes("2040GiB"), bytes("3kib")], [Ok(2040 << 30), Ok(3072)]);
        for text in [
            "",
            "M",
            "MiB",
            "1MB",
            "1 MiB",
            "-1",
            "1.5G",
            "1Mi",
            "1T",
            "99999999999G",
            "18446744073709551616",
        ] {
            assert!(bytes(text).unwrap_err().starts_with("expected a number"), "{text}");
        }
    }

    #[test]
    fn create_disk_choices_are_parsed() {
        let vda = Target::new("vda").unwrap();
        let take = |kind, path: Option<&str>| CreateDisk::Take(kind, path.map(|p| LayerName(p.into())));
        for (text, how) in [
            ("vda=internal", take(PointKind::Internal, None)),
            ("vda=external", take(PointKind::External, None)),
            ("vda=external,path=top.qcow2", take(PointKind::External, Some("top.qcow2"))),
            ("vda=skip", CreateDisk::Skip),
            ("vda=reflink", CreateDisk::Method("reflink".to_owned())),
        ] {
            assert_eq!(disk_choice(text).unwrap(), (vda.clone(), how), "{text}");
        }
    }

    #[test]
    fn wrong_disk_choices_name_the_rule() {
        for text in [
            "vda",
            "vda=",
            "vda=Both!",
            "vda=reflink,path=x",
            "vda=internal,path=x",
            "vda=external,path=",
            "vda=skip,x=y",
        ] {
            assert!(disk_choice(text).unwrap_err().starts_with("expected TARGET="), "{text}");
        }
        assert!(disk_choice("a b=skip").unwrap_err().contains("letters, digits"));
    }

    #[test]
    fn format_is_the_last_option() {
        let place = disk_place("vda=/a,b=c.img,format=qcow2").unwrap();
        assert_eq!((place.path.as_str(), place.format.as_deref()), ("/a,b=c.img", Some("qcow2")));
        assert!(disk_place("vda=").is_err());
        assert!(disk_place("vda=/x,format=").is_err());
    }

    /// No word is reserved: a disk may be called `domain`.
    #[test]
    fn disk_may_be_called_domain() {
        assert_eq!(disk_place("domain=/x").unwrap().target.as_str(), "domain");
    }
}
