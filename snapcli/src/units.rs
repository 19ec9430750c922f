//! Sizes and times as people read them.

use jiff::Timestamp;
use jiff::tz::TimeZone;
pub use snapcore::{local_zone as zone, shown_size as bytes};

/// Bytes, or a dash where they are not known.
pub fn bytes_or_dash(count: Option<u64>) -> String {
    count.map_or_else(|| "-".to_owned(), bytes)
}

/// A moment in the machine's own time zone, to the second.
pub fn time(moment: Timestamp, zone: &TimeZone) -> String {
    moment.to_zoned(zone.clone()).strftime("%Y-%m-%d %H:%M:%S").to_string()
}

/// A time of so many microseconds: `840 us`, `12 ms`, `1.4 s`.
pub fn duration_us(time: u64) -> String {
    match time {
        0..1_000 => format!("{time} us"),
        1_000..1_000_000 => format!("{} ms", time / 1_000),
        _ => format!("{}.{} s", time / 1_000_000, time % 1_000_000 / 100_000),
    }
}

/// The time from `then` to `now`, in its largest unit: `3 minutes ago`.
pub fn ago(then: Timestamp, now: Timestamp) -> String {
    let seconds = usize::try_from(now.as_second().saturating_sub(then.as_second())).unwrap_or(0);
    let (number, unit) = match seconds {
        0..60 => (seconds, "second"),
        60..3_600 => (seconds / 60, "minute"),
        3_600..86_400 => (seconds / 3_600, "hour"),
        _ => (seconds / 86_400, "day"),
    };
    format!("{} ago", count(number, unit))
}

/// `1 disk`, `2 disks`.
pub fn count(number: usize, what: &str) -> String {
    match number {
        1 => format!("1 {what}"),
        _ => format!("{number} {what}s"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn short_time_has_a_short_unit() {
        assert_eq!([999, 1_000, 999_999, 1_450_000].map(duration_us), ["999 us", "1 ms", "999 ms", "1.4 s"]);
    }

    #[test]
    fn age_has_its_largest_unit() {
        let now = Timestamp::from_second(10_000_000).unwrap();
        let shown = |seconds: i64| ago(Timestamp::from_second(10_000_000 - seconds).unwrap(), now);
        assert_eq!(
            [0, 59, 60, 7200, 86_400].map(shown),
            ["0 seconds ago", "59 seconds ago", "1 minute ago", "2 hours ago", "1 day ago"]
        );
        assert_eq!(shown(-5), "0 seconds ago");
    }

    #[test]
    fn times_are_of_the_zone() {
        let moment: Timestamp = "2026-11-22T23:30:05.9Z".parse().unwrap();
        assert_eq!(time(moment, &TimeZone::UTC), "2026-11-22 23:30:05");
        let east = TimeZone::fixed(jiff::tz::offset(1));
        assert_eq!(time(moment, &east), "2026-11-23 00:30:05");
    }
}
