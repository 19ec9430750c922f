//! The zone in which times are shown to people and automatic names are made: one for both.

use jiff::Timestamp;
use jiff::tz::TimeZone;

use crate::{Result, SnapshotName};

/// The zone that times are shown in: what `TZ` says, or the machine's own.
///
/// The machine's own is read as it is: looking up what it is called would walk the whole time zone database, which takes
/// longer than any list.
pub fn local_zone() -> TimeZone {
    if std::env::var_os("TZ").is_some() {
        return TimeZone::system();
    }
    let own = std::fs::read("/etc/localtime").ok();
    own.and_then(|rules| TimeZone::tzif("local", &rules).ok()).unwrap_or(TimeZone::UTC)
}

/// The name of a snapshot that is given none: the time to the second that has begun, in the zone that lists show, without a
/// character that a file name or a shell has another use for: `2026-11-22-100000`.
///
/// # Errors
/// Never: the characters are those of a name.
pub fn time_name(moment: Timestamp) -> Result<SnapshotName> {
    named(moment, local_zone())
}

fn named(moment: Timestamp, zone: TimeZone) -> Result<SnapshotName> {
    SnapshotName::new(moment.to_zoned(zone).strftime("%Y-%m-%d-%H%M%S").to_string())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_automatic_name_is_the_second_that_has_begun_in_the_zone() {
        let moment: Timestamp = "2026-11-22T23:30:05.9Z".parse().unwrap();
        assert_eq!(named(moment, TimeZone::UTC).unwrap().as_str(), "2026-11-22-233005");
        let east = TimeZone::fixed(jiff::tz::offset(1));
        assert_eq!(named(moment, east).unwrap().as_str(), "2026-11-23-003005");
    }
}
