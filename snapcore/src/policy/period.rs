//! Calendar periods: the hour, day, week, month or year of an instant in a time zone, and parts of them.

use std::fmt;
use std::str::FromStr;

use jiff::Timestamp;
use jiff::tz::TimeZone;
use serde::{Deserialize, Serialize};

use crate::error::{Error, ErrorKind, Result};

/// How often a policy takes a snapshot: once in each period of the calendar.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize, schemars::JsonSchema)]
#[serde(try_from = "String", into = "String")]
#[schemars(with = "String")]
#[non_exhaustive]
pub enum Every {
    /// In each part of an hour with so many minutes: a divisor of 60, below 60.
    Minutes(u8),
    /// In each hour.
    Hourly,
    /// In each part of a day with so many hours: a divisor of 24, from 2 to 12.
    Hours(u8),
    /// On each day.
    Daily,
    /// In each ISO week, which begins on a Monday.
    Weekly,
    /// In each month.
    Monthly,
    /// In each year.
    Yearly,
}

/// A period, by numbers that no other period of its kind has.
pub(super) type Period = [i32; 5];

impl Every {
    /// The period that `moment` is in, in `zone`.
    ///
    /// An hour is an hour of the clock and its distance to UTC. So the hour that a clock shows twice, when it
    /// is set back, is two periods. A day with such an hour is one period.
    pub(super) fn period(self, moment: Timestamp, zone: &TimeZone) -> Period {
        let local = moment.to_zoned(zone.clone());
        let (year, month, day) = (i32::from(local.year()), i32::from(local.month()), i32::from(local.day()));
        let date = (year * 16 + month) * 32 + day;
        let (hour, minute) = (i32::from(local.hour()), i32::from(local.minute()));
        let offset = local.offset().seconds();
        match self {
            Self::Minutes(minutes) => [0, date, hour, minute / i32::from(minutes.max(1)), offset],
            Self::Hourly => [1, date, hour, offset, 0],
            Self::Hours(hours) => [2, date, hour / i32::from(hours.max(1)), 0, 0],
            Self::Daily => [3, date, 0, 0, 0],
            Self::Weekly => {
                let week = local.date().iso_week_date();
                [4, i32::from(week.year()), i32::from(week.week()), 0, 0]
            }
            Self::Monthly => [5, year, month, 0, 0],
            Self::Yearly => [6, year, 0, 0, 0],
        }
    }

    /// The period as a word for people: `hour`, `day`, `10 minutes`.
    pub fn noun(self) -> String {
        match self {
            Self::Minutes(1) => "minute".to_owned(),
            Self::Minutes(minutes) => format!("{minutes} minutes"),
            Self::Hourly => "hour".to_owned(),
            Self::Hours(hours) => format!("{hours} hours"),
            Self::Daily => "day".to_owned(),
            Self::Weekly => "week".to_owned(),
            Self::Monthly => "month".to_owned(),
            Self::Yearly => "year".to_owned(),
        }
    }

    /// The begin of each period, as a calendar expression of systemd (`man systemd.time`).
    pub fn on_calendar(self) -> String {
        match self {
            Self::Minutes(minutes) => format!("*-*-* *:00/{minutes}:00"),
            Self::Hourly => "*-*-* *:00:00".to_owned(),
            Self::Hours(hours) => format!("*-*-* 00/{hours}:00:00"),
            Self::Daily => "*-*-* 00:00:00".to_owned(),
            Self::Weekly => "Mon *-*-* 00:00:00".to_owned(),
            Self::Monthly => "*-*-01 00:00:00".to_owned(),
            Self::Yearly => "*-01-01 00:00:00".to_owned(),
        }
    }
}

impl fmt::Display for Every {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Minutes(minutes) => write!(f, "{minutes}m"),
            Self::Hours(hours) => write!(f, "{hours}h"),
            Self::Hourly => f.pad("hourly"),
            Self::Daily => f.pad("daily"),
            Self::Weekly => f.pad("weekly"),
            Self::Monthly => f.pad("monthly"),
            Self::Yearly => f.pad("yearly"),
        }
    }
}

impl FromStr for Every {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        let part = |unit: char, whole: u8, least: u8| {
            let number = text.strip_suffix(unit)?;
            let plain = number.bytes().all(|byte| byte.is_ascii_digit()) && !number.starts_with('0');
            let number: u8 = number.parse().ok().filter(|_| plain)?;
            (number >= least && number < whole && whole.is_multiple_of(number)).then_some(number)
        };
        match text {
            "hourly" | "1h" | "60m" => Ok(Self::Hourly),
            "daily" | "1d" | "24h" => Ok(Self::Daily),
            "weekly" => Ok(Self::Weekly),
            "monthly" => Ok(Self::Monthly),
            "yearly" => Ok(Self::Yearly),
            _ => part('m', 60, 1)
                .map(Self::Minutes)
                .or_else(|| part('h', 24, 2).map(Self::Hours))
                .ok_or_else(|| {
                    Error::new(ErrorKind::Usage, format!("{text:?} does not say how often")).advise(
                        "use hourly, daily, weekly, monthly, yearly, minutes that divide an hour (10m), or hours that \
                         divide a day (6h)",
                    )
                }),
        }
    }
}

impl TryFrom<String> for Every {
    type Error = Error;

    fn try_from(text: String) -> Result<Self> {
        text.parse()
    }
}

impl From<Every> for String {
    fn from(every: Every) -> Self {
        every.to_string()
    }
}

/// Returns true if the period of `now` has none of the snapshots that were made at the times `made`.
pub fn is_due(
    every: Every,
    zone: &TimeZone,
    now: Timestamp,
    made: impl IntoIterator<Item = Timestamp>,
) -> bool {
    let current = every.period(now, zone);
    !made.into_iter().any(|made| every.period(made, zone) == current)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(text: &str) -> Timestamp {
        text.parse().unwrap()
    }

    #[test]
    fn often_is_read_and_printed() {
        for (text, every) in [
            ("10m", Every::Minutes(10)),
            ("1m", Every::Minutes(1)),
            ("hourly", Every::Hourly),
            ("6h", Every::Hours(6)),
            ("daily", Every::Daily),
            ("weekly", Every::Weekly),
            ("monthly", Every::Monthly),
            ("yearly", Every::Yearly),
        ] {
            assert_eq!(text.parse::<Every>().unwrap(), every);
            assert_eq!(every.to_string(), text);
        }
        assert_eq!("60m".parse::<Every>().unwrap(), Every::Hourly);
        for bad in ["", "m", "0m", "7m", "010m", "+5m", "59m", "256m", "5h", "48h", "1.5h", "10 m", "Daily"] {
            assert_eq!(bad.parse::<Every>().unwrap_err().kind(), ErrorKind::Usage, "{bad:?}");
        }
    }

    /// A clock that is set back shows an hour twice: these are two hours of one day.
    #[test]
    fn repeated_hour_is_two_hours_of_a_day() {
        let berlin = TimeZone::get("Europe/Berlin").unwrap();
        let (first, second) = (at("2026-10-25T00:30:00Z"), at("2026-10-25T01:30:00Z"));
        assert!(is_due(Every::Hourly, &berlin, second, [first]));
        assert!(is_due(Every::Minutes(30), &berlin, second, [first]));
        assert!(!is_due(Every::Daily, &berlin, second, [first]));
        // A clock that is set back by half an hour.
        let island = TimeZone::get("Australia/Lord_Howe").unwrap();
        let (first, second) = (at("2026-04-04T14:45:00Z"), at("2026-04-04T15:15:00Z"));
        assert!(is_due(Every::Hourly, &island, second, [first]), "01:45 of two distances to UTC");
    }

    #[test]
    fn week_is_of_its_year() {
        let utc = TimeZone::UTC;
        assert!(!is_due(Every::Weekly, &utc, at("2027-01-02T00:00:00Z"), [at("2026-12-28T00:00:00Z")]));
        assert!(is_due(Every::Weekly, &utc, at("2027-01-04T00:00:00Z"), [at("2027-01-03T23:59:59Z")]));
        assert!(is_due(Every::Yearly, &utc, at("2027-01-01T00:00:00Z"), [at("2026-12-31T23:59:59Z")]));
    }
}
