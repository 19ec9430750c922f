//! The rules of retention against a model that was written apart from them, over random calendars in several
//! time zones.
//!
//! The model asks another question than the rules do: it builds the set of what stays, period by period, from
//! the oldest snapshot to the newest. Its periods are texts that the time zone's own calendar prints.

use std::collections::{BTreeMap, BTreeSet};

use jiff::Timestamp;
use jiff::tz::TimeZone;
use proptest::prelude::*;
use snapcore::SnapshotId;
use snapcore::policy::{Candidate, KeepReason, Rules, Span, Verdict, decide};

/// Zones with hours that are not those of UTC, clocks that are set by half an hour, at midnight, and never.
const ZONES: [&str; 8] = [
    "UTC",
    "Europe/Berlin",
    "America/New_York",
    "America/St_Johns",
    "Asia/Kathmandu",
    "Australia/Lord_Howe",
    "Africa/Cairo",
    "Pacific/Apia",
];

/// Seconds since 1970 near which clocks are set, and others.
const NEAR: [&str; 8] = [
    "2026-03-29T00:00:00Z",
    "2026-10-25T00:00:00Z",
    "2026-11-01T04:00:00Z",
    "2026-04-04T14:00:00Z",
    "2006-10-29T02:00:00Z",
    "2026-12-31T20:00:00Z",
    "2011-12-30T09:00:00Z",
    "2026-06-15T12:00:00Z",
];

#[derive(Debug, Clone)]
struct Calendar {
    snapshots: Vec<Candidate>,
    rules: Rules,
    zone: TimeZone,
    now: Timestamp,
}

fn at(second: i64) -> Timestamp {
    Timestamp::from_second(second).unwrap()
}

/// Identities that sort like their numbers.
fn id(number: usize) -> SnapshotId {
    serde_json::from_value(serde_json::json!(format!("00000000-0000-7000-8000-{number:012x}"))).unwrap()
}

fn calendars() -> impl Strategy<Value = Calendar> {
    let number = || prop_oneof![2 => Just(0_u32), 1 => Just(1), 1 => Just(2), 1 => Just(5), 1 => Just(24)];
    let step = prop_oneof![
        Just(600_i64),
        Just(3_660),
        Just(18_000),
        Just(86_400),
        Just(9 * 86_400),
        Just(40 * 86_400)
    ];
    // Part of the step in percent; own, held, cloned; days until it expires; a long pause before it.
    let one = (
        0_i64..200,
        prop::bool::weighted(0.85),
        prop::bool::weighted(0.05),
        prop::bool::weighted(0.03),
        prop::option::weighted(0.1, -5_i64..60),
        prop::bool::weighted(0.05),
    );
    (
        0..ZONES.len(),
        0..NEAR.len(),
        step,
        prop::collection::vec(one, 0..60),
        (number(), number(), number(), number(), number(), number()),
        prop::option::weighted(0.3, prop_oneof![Just(3_600_u64), Just(3 * 86_400)]),
        prop_oneof![Just(0_i64), Just(3_600), Just(30 * 3_600), Just(1_000 * 3_600), Just(-100_000)],
        any::<prop::sample::Index>(),
    )
        .prop_map(
            |(zone, near, step, all, (last, hourly, daily, weekly, monthly, yearly), age, later, current)| {
                let mut second = NEAR[near].parse::<Timestamp>().unwrap().as_second();
                let mut snapshots = Vec::new();
                for (number, (part, own, held, cloned, expires, pause)) in all.into_iter().enumerate() {
                    second += if pause { step * 20 } else { step * part / 100 };
                    let expires = expires.map(|days| at(second + days * 86_400));
                    let one = Candidate::new(id(number), at(second)).own(own).held(held).cloned(cloned);
                    snapshots.push(one.expires(expires));
                }
                if !snapshots.is_empty() {
                    let current = current.index(snapshots.len());
                    snapshots[current].current = true;
                }
                let rules = Rules::default().last(last).hourly(hourly).daily(daily).weekly(weekly);
                let rules = rules.monthly(monthly).yearly(yearly).min_age(age.map(Span::of_seconds));
                Calendar {
                    snapshots,
                    rules,
                    zone: TimeZone::get(ZONES[zone]).unwrap(),
                    now: at(second + later),
                }
            },
        )
}

/// What the rules prune.
fn pruned(snapshots: &[Candidate], rules: &Rules, now: Timestamp, zone: &TimeZone) -> BTreeSet<SnapshotId> {
    let verdicts = decide(rules, zone, now, snapshots);
    let gone = snapshots.iter().zip(&verdicts).filter(|(_, verdict)| matches!(verdict, Verdict::Prune(_)));
    gone.map(|(one, _)| one.id).collect()
}

/// What the model prunes.
fn model(snapshots: &[Candidate], rules: &Rules, now: Timestamp, zone: &TimeZone) -> BTreeSet<SnapshotId> {
    let mut stay = BTreeSet::new();
    for one in snapshots {
        let age = now.as_second() - one.created.as_second();
        let least = rules.min_age.map_or(0, |span| i64::try_from(span.seconds()).unwrap());
        let lives = one.expires.is_some_and(|expires| expires > now);
        if !one.own || one.held || one.cloned || one.current || age < least || lives {
            stay.insert(one.id);
        }
    }
    let mut counted: Vec<&Candidate> = snapshots.iter().filter(|s| s.own && s.expires.is_none()).collect();
    counted.sort_by_key(|one| (one.created, one.id));
    stay.extend(counted.iter().rev().take(rules.last as usize).map(|one| one.id));
    for (pattern, number) in [
        ("%Y-%m-%d %H %z", rules.hourly),
        ("%Y-%m-%d", rules.daily),
        ("%G-%V", rules.weekly),
        ("%Y-%m", rules.monthly),
        ("%Y", rules.yearly),
    ] {
        // A later one takes the place of an earlier one of its period.
        let mut newest = BTreeMap::new();
        for one in &counted {
            newest.insert(one.created.to_zoned(zone.clone()).strftime(pattern).to_string(), *one);
        }
        let mut newest: Vec<&Candidate> = newest.into_values().collect();
        newest.sort_by_key(|one| (one.created, one.id));
        stay.extend(newest.iter().rev().take(number as usize).map(|one| one.id));
    }
    let sum = [rules.last, rules.hourly, rules.daily, rules.weekly, rules.monthly, rules.yearly];
    if sum == [0; 6] {
        stay.extend(counted.iter().map(|one| one.id));
    }
    stay.extend(
        snapshots.iter().filter(|one| one.own).max_by_key(|one| (one.created, one.id)).map(|one| one.id),
    );
    snapshots.iter().map(|one| one.id).filter(|id| !stay.contains(id)).collect()
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 1500, failure_persistence: None, ..ProptestConfig::default() })]

    /// The rules prune what the model prunes, and only what may be pruned.
    #[test]
    fn rules_agree_with_the_model(calendar in calendars()) {
        let Calendar { snapshots, rules, zone, now } = calendar;
        let gone = pruned(&snapshots, &rules, now, &zone);
        prop_assert_eq!(&gone, &model(&snapshots, &rules, now, &zone));
        let protected = |one: &Candidate| !one.own || one.held || one.cloned || one.current || one.created > now;
        prop_assert!(!snapshots.iter().any(|one| gone.contains(&one.id) && protected(one)));
        let newest = snapshots.iter().filter(|one| one.own).max_by_key(|one| (one.created, one.id));
        prop_assert!(newest.is_none_or(|newest| !gone.contains(&newest.id)));
        // Twice is once.
        let rest: Vec<Candidate> = snapshots.iter().filter(|one| !gone.contains(&one.id)).cloned().collect();
        prop_assert!(pruned(&rest, &rules, now, &zone).is_empty());
    }

    /// Greater numbers prune a part of it; the order of the list and snapshots of others change nothing.
    #[test]
    fn rules_are_monotone_and_blind(calendar in calendars(), turn in any::<prop::sample::Index>()) {
        let Calendar { mut snapshots, rules, zone, now } = calendar;
        let gone = pruned(&snapshots, &rules, now, &zone);
        let more = |number: u32| if number == 0 { 0 } else { number + 1 };
        let greater = Rules::default().last(more(rules.last)).hourly(more(rules.hourly));
        let greater = greater.daily(more(rules.daily)).weekly(more(rules.weekly)).monthly(more(rules.monthly));
        let greater = greater.yearly(more(rules.yearly)).min_age(rules.min_age);
        prop_assert!(pruned(&snapshots, &greater, now, &zone).is_subset(&gone));
        if !snapshots.is_empty() {
            let turn = turn.index(snapshots.len());
            snapshots.rotate_left(turn);
        }
        snapshots.push(Candidate::new(id(999), now));
        prop_assert_eq!(pruned(&snapshots, &rules, now, &zone), gone);
    }

    /// Pruning after each create leaves what pruning once at the end leaves, where the rules alone decide.
    #[test]
    fn pruning_often_is_pruning_once(calendar in calendars()) {
        let Calendar { mut snapshots, mut rules, zone, .. } = calendar;
        rules.min_age = None;
        for one in &mut snapshots {
            *one = Candidate::new(one.id, one.created).own(one.own);
        }
        let end = snapshots.last().map_or(Timestamp::UNIX_EPOCH, |one| one.created);
        let at_once = pruned(&snapshots, &rules, end, &zone);
        let mut kept: Vec<Candidate> = Vec::new();
        for one in &snapshots {
            kept.push(one.clone());
            let gone = pruned(&kept, &rules, one.created, &zone);
            kept.retain(|one| !gone.contains(&one.id));
        }
        let left: BTreeSet<SnapshotId> = kept.iter().map(|one| one.id).collect();
        let expected = snapshots.iter().map(|one| one.id).filter(|id| !at_once.contains(id)).collect();
        prop_assert_eq!(left, expected);
    }
}

/// After weeks without a run, as many stay as before: periods without a snapshot are not counted.
#[test]
fn pause_of_weeks_loses_nothing() {
    let start = "2026-09-01T00:00:00Z".parse::<Timestamp>().unwrap().as_second();
    let snapshots: Vec<Candidate> =
        (0..14).map(|day| Candidate::new(id(day), at(start + day as i64 * 86_400)).own(true)).collect();
    let rules = Rules::default().daily(14);
    let later = at(start + 100 * 86_400);
    assert!(pruned(&snapshots, &rules, later, &TimeZone::UTC).is_empty());
}

/// Sixty days at ten minutes under 3 last, 24 hours, 7 days, 4 weeks and 12 months: few stay at any time.
#[test]
fn number_of_kept_snapshots_is_bounded() {
    let start = "2026-01-30T00:00:00Z".parse::<Timestamp>().unwrap().as_second();
    let rules = Rules::default().last(3).hourly(24).daily(7).weekly(4).monthly(12);
    let (zone, mut kept, mut most) = (TimeZone::get("Europe/Berlin").unwrap(), Vec::new(), 0);
    for number in 0..8_376_usize {
        let now = at(start + i64::try_from(number).unwrap() * 600);
        kept.push(Candidate::new(id(number), now).own(true));
        let gone = pruned(&kept, &rules, now, &zone);
        kept.retain(|one| !gone.contains(&one.id));
        most = most.max(kept.len());
    }
    assert!((30..=40).contains(&most) && kept.len() <= most, "{most}, {} at the end", kept.len());
}

/// A rule that keeps a snapshot says which of its periods it is.
#[test]
fn reasons_number_the_periods() {
    let day = |day: i64| at("2026-11-01T12:00:00Z".parse::<Timestamp>().unwrap().as_second() + day * 86_400);
    let snapshots: Vec<Candidate> = (0..3).map(|n| Candidate::new(id(n), day(n as i64)).own(true)).collect();
    let verdicts = decide(&Rules::default().daily(2), &TimeZone::UTC, day(3), &snapshots);
    let Verdict::Keep(reasons) = &verdicts[1] else { panic!("{verdicts:?}") };
    assert!(matches!(reasons[..], [KeepReason::Period { nth: 2, of: 2, .. }]), "{reasons:?}");
    assert!(matches!(verdicts[0], Verdict::Prune(_)));
}

/// Runs at each hour of `hours`, each of which takes a snapshot and prunes. Returns the hours that are left.
fn hourly_runs(
    rules: &Rules,
    zone: &TimeZone,
    start: &str,
    hours: impl IntoIterator<Item = i64>,
) -> Vec<i64> {
    let start = start.parse::<Timestamp>().unwrap().as_second();
    let mut kept: Vec<(i64, Candidate)> = Vec::new();
    for (number, hour) in hours.into_iter().enumerate() {
        let now = at(start + hour * 3_600);
        kept.push((hour, Candidate::new(id(number), now).own(true)));
        let all: Vec<Candidate> = kept.iter().map(|(_, one)| one.clone()).collect();
        let gone = pruned(&all, rules, now, zone);
        kept.retain(|(_, one)| !gone.contains(&one.id));
    }
    kept.into_iter().map(|(hour, _)| hour).collect()
}

/// Patryk27/lxd-snapper 13: of daily runs under 7 days and 3 weeks, weekly snapshots were deleted when they
/// left the days, because the days had used them up. Each rule keeps its own here.
#[test]
fn report_weekly_ones_outlive_daily_ones() {
    let rules = Rules::default().daily(7).weekly(3).monthly(2);
    let zone = TimeZone::get("Europe/Zurich").unwrap();
    // Each run is at midnight of Zurich: day 0 is Sunday, 2 June; day 28 is the last of June.
    for newest in 40..58_i64 {
        let left = hourly_runs(&rules, &zone, "2024-06-01T22:00:00Z", (0..=newest).map(|day| day * 24));
        let monday = newest - (newest % 7 + 6) % 7;
        let mut expected: BTreeSet<i64> = (newest - 6..=newest).collect();
        expected.extend([monday - 1, monday - 8, 28]);
        let left: BTreeSet<i64> = left.into_iter().map(|hour| hour / 24).collect();
        assert_eq!(left, expected, "day {newest}");
    }
}

/// kopia 3758: a machine that was off for three weeks lost its 14 daily and 24 hourly snapshots at the first
/// run. Here the one that falls out is the oldest of each rule.
#[test]
fn report_pause_prunes_one_for_one() {
    let rules = Rules::default().hourly(24).daily(14);
    let zone = TimeZone::get("Europe/Berlin").unwrap();
    let before = hourly_runs(&rules, &zone, "2024-03-01T00:00:00Z", 0..14 * 24);
    let after = hourly_runs(&rules, &zone, "2024-03-01T00:00:00Z", (0..14 * 24).chain([35 * 24]));
    assert!(before.len() >= 36 && after.len() + 1 >= before.len(), "{before:?} {after:?}");
    let lost = before.iter().filter(|hour| !after.contains(hour)).count();
    assert!(lost <= 2, "{lost} were lost");
}

/// restic 2761, rustic 1032 and others: what a policy without numbers does. It prunes nothing.
#[test]
fn report_no_numbers_prune_nothing() {
    let left = hourly_runs(&Rules::default(), &TimeZone::UTC, "2024-03-01T00:00:00Z", 0..100);
    assert_eq!(left.len(), 100);
    // btrbk 402: without a least age, nothing was pruned, whatever the numbers said.
    let left = hourly_runs(&Rules::default().last(2), &TimeZone::UTC, "2024-03-01T00:00:00Z", 0..100);
    assert_eq!(left, [98, 99]);
}

/// borg 723 and 8221: which days stay under 2 days, 4 weeks and 2 months. Weeks are from Monday to Sunday,
/// and each rule counts for itself.
#[test]
fn report_calendar_of_kept_days() {
    let rules = Rules::default().daily(2).weekly(4).monthly(2);
    let left = hourly_runs(&rules, &TimeZone::UTC, "2024-04-01T02:34:00Z", (0..45).map(|day| day * 24));
    let days: Vec<i64> = left.iter().map(|hour| hour / 24).collect();
    // From 1 April on: 28 April, 30 April, 5, 12, 14 and 15 May.
    assert_eq!(days, [27, 29, 34, 41, 43, 44]);
}
