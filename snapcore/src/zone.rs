//! The time zone for both times that are shown to people and automatic names.

use jiff::Timestamp;
use jiff::tz::TimeZone;

use crate::error::Result;
use crate::name::SnapshotName;

/// Returns the zone for times that are shown: that of `TZ`, or the machine's own.
///
/// The machine's own is read from its rules. Finding its name would search the whole time zone database,
/// which takes longer than any list.
pub fn local_zone() -> TimeZone {
    if std::env::var_os("TZ").is_some() {
        return TimeZone::system();
    }
    let own = std::fs::read("/etc/localtime").ok();
    own.and_then(|rules| TimeZone::tzif("local", &rules).ok()).unwrap_or(TimeZone::UTC)
}

impl SnapshotName {
    /// Returns the name of a snapshot without a given name: the second of `moment`, in the zone that lists
    /// show. It has no character with another use in a file name or a shell: `2026-11-22-100000`.
    ///
    /// # Errors
    /// Never: the characters are valid for a name.
    pub fn of_time(moment: Timestamp) -> Result<Self> {
        named(moment, local_zone())
    }
}

fn named(moment: Timestamp, zone: TimeZone) -> Result<SnapshotName> {
    SnapshotName::new(moment.to_zoned(zone).strftime("%Y-%m-%d-%H%M%S").to_string())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// An automatic name is the second that has begun, in the zone.
    #[test]
    fn automatic_name_is_the_current_second() {
        let moment: Timestamp = "2026-11-22T23:30:05.9Z".parse().unwrap();
        assert_eq!(named(moment, TimeZone::UTC).unwrap().as_str(), "2026-11-22-233005");
        let east = TimeZone::fixed(jiff::tz::offset(1));
        assert_eq!(named(moment, east).unwrap().as_str(), "2026-11-23-003005");
    }
}
