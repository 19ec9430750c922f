//! The policy of a domain, as its domain file has it and as the catalogue records it.

use std::fmt;
use std::str::FromStr;

use camino::Utf8PathBuf;
use jiff::tz::TimeZone;
use jiff::{SignedDuration, Timestamp};
use serde::{Deserialize, Serialize};
use uuid::Uuid;

use super::period::Every;
use super::retention::Rules;
use crate::error::{Error, ErrorKind, Result};
use crate::name::{SnapshotName, Target};
use crate::snapshot::PointKind;
use crate::zone::local_zone;

/// The greatest number of a rule.
const MOST: u32 = 100_000;

/// The most arguments of a hook, its program included, and their most bytes together.
const MAX_HOOK_ARGUMENTS: usize = 64;
const MAX_HOOK_BYTES: usize = 8192;

/// The longest name that begins the names of snapshots, in bytes: the time follows it, and perhaps a number.
const MAX_PREFIX: usize = 200;

/// The longest calendar expression, in bytes.
const MAX_CALENDAR: usize = 200;

/// The longest span: a hundred years of 365 days.
const MAX_SPAN: u64 = 100 * 365 * 86_400;

/// The longest time of a hook: a day.
const MAX_HOOK_LIMIT: u64 = 86_400;

/// The time of a hook where the policy does not say one.
const HOOK_LIMIT: Span = Span { seconds: 60 };

/// The identity of a policy. It stays the same when the policy is changed, and no other domain's has it.
#[derive(
    Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize, schemars::JsonSchema,
)]
#[serde(transparent)]
pub struct PolicyId(#[schemars(with = "String")] pub Uuid);

impl PolicyId {
    /// Makes a new identity.
    pub fn fresh() -> Self {
        Self(Uuid::now_v7())
    }
}

impl fmt::Display for PolicyId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// A length of time in seconds, written as a number and a unit: `90s`, `10m`, `36h`, `7d`, `2w`. A day has 24
/// hours.
#[derive(
    Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize, schemars::JsonSchema,
)]
#[serde(try_from = "String", into = "String")]
#[schemars(with = "String")]
pub struct Span {
    seconds: u64,
}

impl Span {
    /// So many seconds; a hundred years at most.
    pub fn of_seconds(seconds: u64) -> Self {
        Self { seconds: seconds.min(MAX_SPAN) }
    }

    /// Its seconds.
    pub fn seconds(self) -> u64 {
        self.seconds
    }

    /// The time that is so much later than `moment`, or the last one that there is.
    pub fn after(self, moment: Timestamp) -> Timestamp {
        moment.checked_add(self.signed()).unwrap_or(Timestamp::MAX)
    }

    /// The time that is so much earlier than `moment`, or the first one that there is.
    pub fn before(self, moment: Timestamp) -> Timestamp {
        moment.checked_sub(self.signed()).unwrap_or(Timestamp::MIN)
    }

    fn signed(self) -> SignedDuration {
        SignedDuration::from_secs(i64::try_from(self.seconds).unwrap_or(i64::MAX))
    }
}

const UNITS: [(char, u64); 5] = [('w', 604_800), ('d', 86_400), ('h', 3_600), ('m', 60), ('s', 1)];

impl FromStr for Span {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        let seconds = UNITS.iter().find_map(|(unit, seconds)| {
            let number = text.strip_suffix(*unit)?;
            let plain = !number.is_empty() && number.bytes().all(|byte| byte.is_ascii_digit());
            plain.then(|| number.parse::<u64>().ok()?.checked_mul(*seconds)).flatten()
        });
        match seconds.filter(|seconds| (1..=MAX_SPAN).contains(seconds)) {
            Some(seconds) => Ok(Self { seconds }),
            None => Err(Error::new(ErrorKind::Usage, format!("{text:?} is no length of time"))
                .advise("use a number and a unit: 90s, 10m, 36h, 7d, 2w; a hundred years at most")),
        }
    }
}

impl fmt::Display for Span {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let whole = UNITS.iter().find(|(_, seconds)| self.seconds.is_multiple_of(*seconds));
        let (unit, seconds) = whole.copied().unwrap_or(('s', 1));
        write!(f, "{}{unit}", self.seconds / seconds)
    }
}

impl TryFrom<String> for Span {
    type Error = Error;

    fn try_from(text: String) -> Result<Self> {
        text.parse()
    }
}

impl From<Span> for String {
    fn from(span: Span) -> Self {
        span.to_string()
    }
}

/// The kind of the points that a policy takes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, schemars::JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum Kind {
    /// Inside the images.
    Internal,
    /// Frozen layers under overlays.
    External,
}

impl From<Kind> for PointKind {
    fn from(kind: Kind) -> Self {
        match kind {
            Kind::Internal => Self::Internal,
            Kind::External => Self::External,
        }
    }
}

/// Whether the file systems of a running guest are frozen for a policy's snapshots.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, schemars::JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum Quiescing {
    /// They are not.
    #[default]
    No,
    /// They are, where that works.
    Try,
    /// They are, or no snapshot is taken.
    Require,
}

/// A policy as a domain file has it: `[policy]`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, schemars::JsonSchema)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
#[non_exhaustive]
pub struct PolicySpec {
    /// How often a snapshot is taken; absent: once in the shortest period that a rule names.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub every: Option<Every>,
    /// The calendar expression of the systemd timer; absent: the begin of each period.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub on_calendar: Option<String>,
    /// How many of the newest stay.
    #[serde(default)]
    pub last: u32,
    /// How many hours keep their newest.
    #[serde(default)]
    pub hourly: u32,
    /// How many days keep their newest.
    #[serde(default)]
    pub daily: u32,
    /// How many ISO weeks keep their newest.
    #[serde(default)]
    pub weekly: u32,
    /// How many months keep their newest.
    #[serde(default)]
    pub monthly: u32,
    /// How many years keep their newest.
    #[serde(default)]
    pub yearly: u32,
    /// The age before which none is pruned.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub min_age: Option<Span>,
    /// The time zone of the periods, by its IANA name; absent: the host's.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub zone: Option<String>,
    /// The beginning of the snapshots' names.
    #[serde(default = "automatic")]
    pub name: SnapshotName,
    /// True if the memory of a running guest is part of its snapshots.
    #[serde(default)]
    pub memory: bool,
    /// The kind of the points; absent: what each backend prefers.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub kind: Option<Kind>,
    /// Whether file systems of a running guest are frozen for a snapshot of its disks alone.
    #[serde(default)]
    pub quiesce: Quiescing,
    /// Disks that are left out.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub skip: Vec<Target>,
    /// The age at which the state that a revert replaced is given up. Until then a snapshot of the policy
    /// leaves it. Absent: the next snapshot gives it up, as every create does.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub keep_undo: Option<Span>,
    /// The command that is run before a snapshot is taken: the absolute path of a program, and its arguments.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub before: Vec<String>,
    /// The command that is run after it, whether it was taken or not.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub after: Vec<String>,
    /// The time after which a command is ended; absent: a minute.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub hook_limit: Option<Span>,
}

fn automatic() -> SnapshotName {
    SnapshotName::new("auto").unwrap_or_else(|_| unreachable!("a word of letters is a name"))
}

impl PolicySpec {
    /// The rules of retention.
    pub fn rules(&self) -> Rules {
        Rules {
            last: self.last,
            hourly: self.hourly,
            daily: self.daily,
            weekly: self.weekly,
            monthly: self.monthly,
            yearly: self.yearly,
            min_age: self.min_age,
        }
    }

    /// How often a snapshot is taken.
    ///
    /// # Errors
    /// [`ErrorKind::Usage`] where neither `every` nor a rule about periods says it.
    pub fn every(&self) -> Result<Every> {
        let shortest = self.rules().periods().into_iter().find(|(_, number)| *number > 0);
        self.every.or(shortest.map(|(every, _)| every)).ok_or_else(|| {
            Error::new(ErrorKind::Usage, "the policy does not say how often a snapshot is taken")
                .advise("add every = \"hourly\", or another period; or a rule such as daily = 7")
        })
    }

    /// The time zone of the periods.
    ///
    /// # Errors
    /// [`ErrorKind::Usage`] for a name that this machine has no zone of.
    pub fn zone(&self) -> Result<TimeZone> {
        let Some(name) = &self.zone else { return Ok(local_zone()) };
        let unknown = || {
            Error::new(ErrorKind::Usage, format!("{name:?} is no time zone that this machine knows"))
                .advise("use a name such as Europe/Berlin or UTC; the package tzdata has the zones")
        };
        // The name is part of a path below the directory of zones.
        let plain = |byte: u8| byte.is_ascii_alphanumeric() || b"_+-/".contains(&byte);
        if name.is_empty() || name.len() > 64 || !name.bytes().all(plain) || name.starts_with('/') {
            return Err(unknown());
        }
        TimeZone::get(name).map_err(|cause| unknown().because(cause))
    }

    /// The time that a command has.
    pub fn hook_limit(&self) -> Span {
        self.hook_limit.unwrap_or(HOOK_LIMIT)
    }

    /// Checks what the types do not.
    ///
    /// # Errors
    /// [`ErrorKind::Usage`], with the rule that is violated.
    pub fn check(&self) -> Result<()> {
        let wrong = |what: String, advice: &str| Err(Error::new(ErrorKind::Usage, what).advise(advice));
        let rules = self.rules();
        let numbers = rules.periods().map(|(_, number)| number);
        if let Some(number) = numbers.into_iter().chain([rules.last]).find(|number| *number > MOST) {
            return wrong(format!("the policy keeps {number}"), "keep 100000 at most");
        }
        self.every()?;
        self.zone()?;
        if self.name.as_str().len() > MAX_PREFIX || crate::request::is_reserved(&self.name) {
            return wrong(
                format!("the policy's snapshots cannot be called {}", self.name),
                "choose a name of 200 bytes at most that does not begin with undo:",
            );
        }
        if let Some(calendar) = &self.on_calendar {
            // It becomes a line of a unit file.
            let plain = |byte: u8| byte.is_ascii_alphanumeric() || b" *-:/.,~_+".contains(&byte);
            if calendar.trim().is_empty() || calendar.len() > MAX_CALENDAR || !calendar.bytes().all(plain) {
                return wrong(
                    format!("{calendar:?} is no calendar expression"),
                    "write it as `man systemd.time` says, for example \"*-*-* 02:30\"; `systemd-analyze calendar` shows \
                     what it means",
                );
            }
        }
        if self.memory && self.quiesce == Quiescing::Require {
            return wrong(
                "the policy requires frozen file systems for snapshots with memory".to_owned(),
                "leave quiesce out: memory has what the guest has not written yet",
            );
        }
        for (which, command) in [("before", &self.before), ("after", &self.after)] {
            check_hook(which, command)?;
        }
        if self.hook_limit().seconds > MAX_HOOK_LIMIT {
            return wrong(
                "a hook could run for more than a day".to_owned(),
                "give hook-limit = \"24h\" at most",
            );
        }
        Ok(())
    }
}

/// Checks the form of a command. Whether its program may be run is checked where it is run.
fn check_hook(which: &str, command: &[String]) -> Result<()> {
    let Some(program) = command.first() else { return Ok(()) };
    let bytes = command.iter().map(String::len).fold(0, usize::saturating_add);
    let path = Utf8PathBuf::from(program);
    let why = if !path.is_absolute() {
        format!("its program {program:?} is not an absolute path")
    } else if command.len() > MAX_HOOK_ARGUMENTS || bytes > MAX_HOOK_BYTES {
        format!("it has more than {MAX_HOOK_ARGUMENTS} arguments or {MAX_HOOK_BYTES} bytes")
    } else if command.iter().any(|word| word.contains('\0')) {
        "it has a NUL character".to_owned()
    } else {
        return Ok(());
    };
    Err(Error::new(ErrorKind::Usage, format!("the policy's command {which} cannot be run: {why}")).advise(
        format!("write it as {which} = [\"/usr/local/sbin/PROGRAM\", \"ARGUMENT\"]; no shell reads it"),
    ))
}

/// The policy of a domain.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, schemars::JsonSchema)]
#[non_exhaustive]
pub struct Policy {
    /// Its identity, which its snapshots have too.
    pub id: PolicyId,
    /// What it says.
    pub spec: PolicySpec,
}

impl Policy {
    /// The policy of an identity.
    pub fn new(id: PolicyId, spec: PolicySpec) -> Self {
        Self { id, spec }
    }

    /// The name of a snapshot that is taken at `moment`: the beginning that the policy says, and the second
    /// in its zone.
    ///
    /// # Errors
    /// The errors of [`PolicySpec::zone`].
    pub fn name_at(&self, moment: Timestamp) -> Result<SnapshotName> {
        let local = moment.to_zoned(self.spec.zone()?);
        SnapshotName::new(format!("{}-{}", self.spec.name, local.strftime("%Y-%m-%d-%H%M%S")))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(text: &str) -> std::result::Result<PolicySpec, String> {
        let value: serde_json::Value = serde_json::from_str(text).unwrap();
        let spec: PolicySpec = serde_json::from_value(value).map_err(|error| error.to_string())?;
        spec.check().map_err(|error| error.to_string())?;
        Ok(spec)
    }

    #[test]
    fn spans_are_read_and_printed() {
        for (text, seconds) in [("1s", 1), ("90s", 90), ("10m", 600), ("36h", 129_600), ("2w", 1_209_600)] {
            let span: Span = text.parse().unwrap();
            assert_eq!((span.seconds(), span.to_string().as_str()), (seconds, text));
        }
        assert_eq!("60s".parse::<Span>().unwrap().to_string(), "1m");
        for bad in ["", "s", "0s", "-1h", "1.5h", "1 h", "1y", "99999999999999999999d", "36501d", "+1h"] {
            assert_eq!(bad.parse::<Span>().unwrap_err().kind(), ErrorKind::Usage, "{bad:?}");
        }
        let end = Span::of_seconds(u64::MAX).after(Timestamp::MAX);
        assert_eq!(
            (end, Span::of_seconds(u64::MAX).before(Timestamp::MIN)),
            (Timestamp::MAX, Timestamp::MIN)
        );
    }

    /// The shortest period of a rule says how often, unless the policy says it.
    #[test]
    fn often_is_the_shortest_rule() {
        assert_eq!(read(r#"{"daily": 7, "yearly": 1}"#).unwrap().every().unwrap(), Every::Daily);
        assert_eq!(read(r#"{"daily": 7, "every": "6h"}"#).unwrap().every().unwrap(), Every::Hours(6));
        assert!(read(r#"{"last": 7}"#).unwrap_err().contains("how often"));
        assert!(read("{}").unwrap_err().contains("how often"));
    }

    /// What a file of someone else could say, and what is made of it.
    #[test]
    fn hostile_policies_are_refused() {
        for bad in [
            r#"{"daily": -1}"#,
            r#"{"daily": 4294967296}"#,
            r#"{"daily": 100001}"#,
            r#"{"daily": 1.5}"#,
            r#"{"daily": "7"}"#,
            r#"{"daily": 1, "dialy": 1}"#,
            r#"{"daily": 1, "min-age": "-1d"}"#,
            r#"{"daily": 1, "zone": "../../../etc/passwd"}"#,
            r#"{"daily": 1, "zone": "/etc/localtime"}"#,
            r#"{"daily": 1, "zone": "Europe/Berlin\nX"}"#,
            r#"{"daily": 1, "zone": "No/Where"}"#,
            r#"{"daily": 1, "name": "a b"}"#,
            r#"{"daily": 1, "name": "undo:x"}"#,
            r#"{"daily": 1, "on-calendar": "daily\n[Service]\nUser=root"}"#,
            r#"{"daily": 1, "on-calendar": "daily %n"}"#,
            r#"{"daily": 1, "on-calendar": "daily # x"}"#,
            r#"{"daily": 1, "on-calendar": " "}"#,
            r#"{"daily": 1, "before": ["sync"]}"#,
            r#"{"daily": 1, "before": "/bin/sync"}"#,
            r#"{"daily": 1, "before": ["/bin/a\u0000b"]}"#,
            r#"{"daily": 1, "hook-limit": "25h"}"#,
            r#"{"daily": 1, "memory": true, "quiesce": "require"}"#,
            r#"{"daily": 1, "skip": ["../vda"]}"#,
        ] {
            read(bad).expect_err(bad);
        }
        let long = format!(r#"{{"daily": 1, "name": "{}"}}"#, "a".repeat(201));
        assert!(read(&long).unwrap_err().contains("200 bytes"));
        let many = format!(r#"{{"daily": 1, "after": [{}"/b"]}}"#, r#""/a","#.repeat(64));
        assert!(read(&many).unwrap_err().contains("64 arguments"));
    }

    #[test]
    fn names_are_of_the_policys_zone() {
        let spec = read(r#"{"hourly": 1, "zone": "Asia/Kathmandu", "name": "h"}"#).unwrap();
        let policy = Policy::new(PolicyId::fresh(), spec);
        let moment = "2026-11-30T20:00:00Z".parse().unwrap();
        assert_eq!(policy.name_at(moment).unwrap().as_str(), "h-2026-12-01-014500");
    }
}
