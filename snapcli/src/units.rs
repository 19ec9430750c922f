//! Sizes and times as people read them.

use jiff::Timestamp;
use jiff::tz::TimeZone;

/// Bytes with three digits that count: `0 B`, `512 B`, `1.50 KiB`, `12.3 MiB`, `100 GiB`.
pub fn bytes(count: u64) -> String {
    const UNITS: [&str; 6] = ["KiB", "MiB", "GiB", "TiB", "PiB", "EiB"];
    if count < 1024 {
        return format!("{count} B");
    }
    let mut value = count as f64;
    let mut unit = "B";
    for next in UNITS {
        value /= 1024.0;
        unit = next;
        // What would round up to 1024 of this unit is one of the next.
        if value < 999.5 {
            break;
        }
    }
    match value {
        v if v < 9.995 => format!("{v:.2} {unit}"),
        v if v < 99.95 => format!("{v:.1} {unit}"),
        v => format!("{v:.0} {unit}"),
    }
}

/// Bytes, or a dash where they are not known.
pub fn bytes_or_dash(count: Option<u64>) -> String {
    count.map_or_else(|| "-".to_owned(), bytes)
}

/// The zone that times are shown in: what `TZ` says, or the machine's own.
///
/// The machine's own is read as it is: looking up what it is called would walk the whole time zone database, which takes
/// longer than any list.
pub fn zone() -> TimeZone {
    if std::env::var_os("TZ").is_some() {
        return TimeZone::system();
    }
    let own = std::fs::read("/etc/localtime").ok();
    own.and_then(|rules| TimeZone::tzif("local", &rules).ok()).unwrap_or(TimeZone::UTC)
}

/// A moment in the machine's own time zone, to the second.
pub fn time(moment: Timestamp, zone: &TimeZone) -> String {
    moment.to_zoned(zone.clone()).strftime("%Y-%m-%d %H:%M:%S").to_string()
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
    fn sizes_have_three_digits_that_count() {
        for (count, text) in [
            (0, "0 B"),
            (1023, "1023 B"),
            (1024, "1.00 KiB"),
            (1536, "1.50 KiB"),
            (10 << 20, "10.0 MiB"),
            (100 << 30, "100 GiB"),
            ((1 << 20) - 1, "1.00 MiB"),
            (1_047_527_424, "999 MiB"),
            (1_048_051_712, "0.98 GiB"),
            (u64::MAX, "16.0 EiB"),
        ] {
            assert_eq!(bytes(count), text, "{count}");
        }
    }

    #[test]
    fn times_are_told_in_the_zone() {
        let moment: Timestamp = "2026-11-22T23:30:05.9Z".parse().unwrap();
        assert_eq!(time(moment, &TimeZone::UTC), "2026-11-22 23:30:05");
        let east = TimeZone::fixed(jiff::tz::offset(1));
        assert_eq!(time(moment, &east), "2026-11-23 00:30:05");
    }
}
