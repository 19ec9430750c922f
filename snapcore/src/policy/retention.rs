//! The rules of retention: which of a policy's snapshots stay, and which are pruned.

use std::collections::HashSet;
use std::fmt;

use jiff::Timestamp;
use jiff::tz::TimeZone;
use serde::{Deserialize, Serialize};

use super::period::Every;
use super::spec::Span;
use crate::snapshot::SnapshotId;

/// How many snapshots stay. A snapshot stays if any rule keeps it; no rule leaves out what another one keeps.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, schemars::JsonSchema)]
#[non_exhaustive]
pub struct Rules {
    /// The newest ones.
    pub last: u32,
    /// The newest one of each of so many hours: the newest hours that have a snapshot.
    pub hourly: u32,
    /// The same of days.
    pub daily: u32,
    /// The same of ISO weeks.
    pub weekly: u32,
    /// The same of months.
    pub monthly: u32,
    /// The same of years.
    pub yearly: u32,
    /// The age before which none is pruned.
    pub min_age: Option<Span>,
}

setters!(Rules {
    last: u32,
    hourly: u32,
    daily: u32,
    weekly: u32,
    monthly: u32,
    yearly: u32,
    min_age: Option<Span>,
});

impl Rules {
    /// The rules about periods, each with its number, from the shortest period to the longest.
    pub fn periods(&self) -> [(Every, u32); 5] {
        [
            (Every::Hourly, self.hourly),
            (Every::Daily, self.daily),
            (Every::Weekly, self.weekly),
            (Every::Monthly, self.monthly),
            (Every::Yearly, self.yearly),
        ]
    }

    /// Returns true if there is no rule. Then nothing is pruned but what expired.
    pub fn is_empty(&self) -> bool {
        self.last == 0 && self.periods().iter().all(|(_, number)| *number == 0)
    }
}

/// A snapshot as the rules see it.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct Candidate {
    /// Its identity. Of two snapshots of one time, the greater identity is the newer one.
    pub id: SnapshotId,
    /// Its time.
    pub created: Timestamp,
    /// True if the policy took it.
    pub own: bool,
    /// True if it is held.
    pub held: bool,
    /// True if images of other domains are backed by it.
    pub cloned: bool,
    /// True if the current state derives from it.
    pub current: bool,
    /// The time from which it may be deleted, where it has one of its own.
    pub expires: Option<Timestamp>,
}

impl Candidate {
    /// Makes a snapshot that the policy did not take, and that is nothing else.
    pub fn new(id: SnapshotId, created: Timestamp) -> Self {
        Self { id, created, own: false, held: false, cloned: false, current: false, expires: None }
    }
}

setters!(Candidate {
    own: bool,
    held: bool,
    cloned: bool,
    current: bool,
    expires: Option<Timestamp>,
});

/// Why a snapshot stays.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, schemars::JsonSchema)]
#[serde(tag = "reason", rename_all = "kebab-case")]
#[non_exhaustive]
pub enum KeepReason {
    /// The policy did not take it.
    Foreign,
    /// It is held.
    Held,
    /// Images of other domains are backed by it.
    Cloned,
    /// The current state derives from it.
    Current,
    /// Its time is not over yet: the clock was set back since.
    Future,
    /// It is younger than the rules' `min-age`.
    Young {
        /// The time at which it is old enough.
        #[schemars(with = "String")]
        until: Timestamp,
    },
    /// It has a time of expiry of its own, which is not over yet. The rules do not count it.
    NotExpired {
        /// That time.
        #[schemars(with = "String")]
        until: Timestamp,
    },
    /// It is one of the newest.
    Last {
        /// Its place, from 1 on: 1 is the newest.
        nth: u32,
        /// The number that stay.
        of: u32,
    },
    /// It is the newest of its period.
    Period {
        /// The length of the period.
        rule: Every,
        /// The place of its period among those that have a snapshot, from 1 on: 1 is the newest.
        nth: u32,
        /// The number of periods that keep one.
        of: u32,
    },
    /// It is the newest that the policy took: that one always stays.
    Newest,
    /// The policy has no rules.
    NoRules,
}

impl fmt::Display for KeepReason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Foreign => f.write_str("not made by this policy"),
            Self::Held => f.write_str("held"),
            Self::Cloned => f.write_str("other images are backed by it"),
            Self::Current => f.write_str("the current state derives from it"),
            Self::Future => f.write_str("dated in the future"),
            Self::Young { until } => write!(f, "younger than min-age until {}", shown(*until)),
            Self::NotExpired { until } => write!(f, "expires {}", shown(*until)),
            Self::Last { nth, of } => write!(f, "last {nth}/{of}"),
            Self::Period { rule, nth, of } => write!(f, "{rule} {nth}/{of}"),
            Self::Newest => f.write_str("the newest of this policy"),
            Self::NoRules => f.write_str("no rules"),
        }
    }
}

fn shown(moment: Timestamp) -> impl fmt::Display {
    moment.strftime("%Y-%m-%dT%H:%M:%SZ")
}

/// Why a snapshot is pruned.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, schemars::JsonSchema)]
#[serde(rename_all = "kebab-case")]
#[non_exhaustive]
pub enum PruneReason {
    /// Its own time of expiry is over.
    Expired,
    /// No rule keeps it.
    NoRuleKeepsIt,
}

impl fmt::Display for PruneReason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Expired => "expired",
            Self::NoRuleKeepsIt => "no rule keeps it",
        })
    }
}

/// What happens to a snapshot.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, schemars::JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum Verdict {
    /// It stays, for these reasons: at least one.
    Keep(Vec<KeepReason>),
    /// It is pruned.
    Prune(PruneReason),
}

/// Decides what happens to each of `snapshots`, at the time `now`. Their order does not matter; the verdicts
/// are in it.
///
/// 1. What the policy did not take stays, and is not counted.
/// 2. These stay: what is held, what other images are backed by, what the current state derives from, what
///    is younger than `min-age` or dated in the future, and the newest that the policy took.
/// 3. A snapshot with a time of expiry stays until then, and is pruned afterwards. It is not counted.
/// 4. Of the others, the `last` newest stay, and for each rule about periods the newest of each of the newest
///    periods that have one. A period without a snapshot is not counted.
/// 5. Without rules, nothing is pruned but what expired.
pub fn decide(rules: &Rules, zone: &TimeZone, now: Timestamp, snapshots: &[Candidate]) -> Vec<Verdict> {
    let mut reasons: Vec<Vec<KeepReason>> = snapshots.iter().map(|one| by_itself(rules, now, one)).collect();
    // Newest first. The identity decides between snapshots of one time.
    let mut own: Vec<usize> = (0..snapshots.len()).filter(|index| snapshots[*index].own).collect();
    own.sort_by_key(|index| std::cmp::Reverse((snapshots[*index].created, snapshots[*index].id)));
    let counted: Vec<usize> = own.iter().copied().filter(|i| snapshots[*i].expires.is_none()).collect();
    for (nth, index) in (1..=rules.last).zip(&counted) {
        reasons[*index].push(KeepReason::Last { nth, of: rules.last });
    }
    for (rule, of) in rules.periods() {
        let mut found = HashSet::new();
        let mut newest = counted.iter().filter(|i| found.insert(rule.period(snapshots[**i].created, zone)));
        for (nth, index) in (1..=of).zip(&mut newest) {
            reasons[*index].push(KeepReason::Period { rule, nth, of });
        }
    }
    if rules.is_empty() {
        for index in &counted {
            reasons[*index].push(KeepReason::NoRules);
        }
    }
    if let Some(newest) = own.first().filter(|newest| reasons[**newest].is_empty()) {
        reasons[*newest].push(KeepReason::Newest);
    }
    let verdict = |(reasons, one): (Vec<KeepReason>, &Candidate)| match (reasons.is_empty(), one.expires) {
        (false, _) => Verdict::Keep(reasons),
        (true, Some(_)) => Verdict::Prune(PruneReason::Expired),
        (true, None) => Verdict::Prune(PruneReason::NoRuleKeepsIt),
    };
    reasons.into_iter().zip(snapshots).map(verdict).collect()
}

/// The reasons for which a snapshot stays whatever other snapshots there are.
fn by_itself(rules: &Rules, now: Timestamp, one: &Candidate) -> Vec<KeepReason> {
    if !one.own {
        return vec![KeepReason::Foreign];
    }
    let old_enough = rules.min_age.map(|age| age.after(one.created));
    let young = match old_enough {
        _ if one.created > now => Some(KeepReason::Future),
        Some(until) if until > now => Some(KeepReason::Young { until }),
        _ => None,
    };
    let not_expired = one.expires.filter(|until| *until > now).map(|until| KeepReason::NotExpired { until });
    [
        one.held.then_some(KeepReason::Held),
        one.cloned.then_some(KeepReason::Cloned),
        one.current.then_some(KeepReason::Current),
        young,
        not_expired,
    ]
    .into_iter()
    .flatten()
    .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(text: &str) -> Timestamp {
        text.parse().unwrap()
    }

    fn own(text: &str) -> Candidate {
        Candidate::new(SnapshotId::fresh(), at(text)).own(true)
    }

    /// Every rule names its reason, and a snapshot can have several.
    #[test]
    fn reasons_are_those_of_the_rules() {
        let now = at("2026-11-30T12:00:00Z");
        let all = [
            own("2026-11-30T11:30:00Z"),
            own("2026-11-30T11:10:00Z"),
            own("2026-11-29T10:00:00Z").held(true),
            own("2026-11-01T10:00:00Z").expires(Some(at("2026-12-01T00:00:00Z"))),
            own("2026-11-02T10:00:00Z").expires(Some(at("2026-11-20T00:00:00Z"))),
            own("2026-11-03T10:00:00Z"),
            Candidate::new(SnapshotId::fresh(), at("2026-01-01T00:00:00Z")),
        ];
        let rules = Rules::default().last(1).daily(2);
        let daily = |nth| KeepReason::Period { rule: Every::Daily, nth, of: 2 };
        let verdicts = decide(&rules, &TimeZone::UTC, now, &all);
        assert_eq!(
            verdicts,
            [
                Verdict::Keep(vec![KeepReason::Last { nth: 1, of: 1 }, daily(1)]),
                Verdict::Prune(PruneReason::NoRuleKeepsIt),
                Verdict::Keep(vec![KeepReason::Held, daily(2)]),
                Verdict::Keep(vec![KeepReason::NotExpired { until: at("2026-12-01T00:00:00Z") }]),
                Verdict::Prune(PruneReason::Expired),
                Verdict::Prune(PruneReason::NoRuleKeepsIt),
                Verdict::Keep(vec![KeepReason::Foreign]),
            ]
        );
    }

    /// The last snapshot of a policy stays, even if it has expired.
    #[test]
    fn newest_is_never_pruned() {
        let now = at("2026-11-30T12:00:00Z");
        let old = own("2026-01-01T00:00:00Z").expires(Some(at("2026-01-02T00:00:00Z")));
        let verdicts = decide(&Rules::default().last(1), &TimeZone::UTC, now, &[old]);
        assert_eq!(verdicts, [Verdict::Keep(vec![KeepReason::Newest])]);
    }

    /// A snapshot of the future stays, whatever the rules say.
    #[test]
    fn future_snapshots_stay() {
        let all = [own("2099-01-01T00:00:00Z"), own("2099-01-01T00:00:00.001Z")];
        let verdicts = decide(&Rules::default().last(1), &TimeZone::UTC, at("2026-11-30T12:00:00Z"), &all);
        assert_eq!(verdicts[0], Verdict::Keep(vec![KeepReason::Future]));
    }
}
