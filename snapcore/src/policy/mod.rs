//! Policies: when snapshots of a domain are taken without a user, and which of these are kept.
//!
//! A domain has at most one policy ([`Policy`]). Its identity is recorded in each snapshot that it takes
//! ([`crate::Snapshot::policy`]). Only such snapshots are counted, and only such are ever pruned. All others
//! stay, whatever the rules say.
//!
//! What stays is decided by a pure function ([`decide`]) of the snapshots, the rules, the time and the time
//! zone. A snapshot is due where the current period has none yet ([`is_due`]). So a run of a policy keeps no
//! notes: it may be repeated, interrupted, and left out for weeks.
//!
//! ```
//! use jiff::tz::TimeZone;
//! use snapcore::SnapshotId;
//! use snapcore::policy::{Candidate, Rules, Verdict, decide};
//!
//! let at = |text: &str| text.parse::<jiff::Timestamp>();
//! let of = |text: &str| Ok::<_, jiff::Error>(Candidate::new(SnapshotId::fresh(), at(text)?).own(true));
//! let snapshots = [of("2026-11-01T10:00:00Z")?, of("2026-11-01T11:00:00Z")?, of("2026-11-02T10:00:00Z")?];
//! let rules = Rules::default().daily(7);
//! let verdicts = decide(&rules, &TimeZone::UTC, at("2026-11-02T12:00:00Z")?, &snapshots);
//! // The newest of each day stays.
//! let pruned: Vec<bool> = verdicts.iter().map(|verdict| matches!(verdict, Verdict::Prune(_))).collect();
//! assert_eq!(pruned, [true, false, false]);
//! # Ok::<(), jiff::Error>(())
//! ```

mod period;
mod retention;
mod review;
mod spec;

pub use period::{Every, is_due};
pub use retention::{Candidate, KeepReason, PruneReason, Rules, Verdict, decide};
pub use review::{PolicyReview, ReviewedSnapshot};
pub use spec::{Kind, Policy, PolicyId, PolicySpec, Quiescing, Span};

pub(crate) use review::{has_of_period, newest_of, policy_of, review};
