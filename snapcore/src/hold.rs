//! Holds: references that keep a snapshot from being deleted.
//!
//! A snapshot may have many holds, each by another holder. A hold ends when its holder releases it, when its
//! time is over, or when the process that it is of has ended. Holds are part of the snapshot's record, so
//! the catalogue and the manifests have them.

use std::fmt;

use jiff::Timestamp;
use serde::{Deserialize, Serialize};

use crate::error::{Error, ErrorKind, Result};
use crate::host::Host;
use crate::shell::shell_command;
use crate::snapshot::Snapshot;

/// Prefixes of holders that domsnap itself gives: a clone, a server, an export.
const AUTOMATIC: [&str; 3] = ["clone:", "serve:", "export:"];

/// The longest name of a holder, in bytes.
const MAX_HOLDER: usize = 255;

/// The longest reason, in bytes.
const MAX_REASON: usize = 4096;

/// The most holds of one snapshot.
const MAX_HOLDS: usize = 1024;

/// The name of a holder: 1 to 255 bytes without blanks and control characters. Names that begin with
/// `clone:`, `serve:` and `export:` are domsnap's own.
#[derive(
    Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize, schemars::JsonSchema,
)]
#[serde(try_from = "String", into = "String")]
#[schemars(with = "String")]
pub struct Holder(String);

impl Holder {
    /// The holder of this name.
    ///
    /// # Errors
    /// [`ErrorKind::Usage`] for another name.
    pub fn new(name: impl Into<String>) -> Result<Self> {
        let name = name.into();
        let plain = !name.contains(|c: char| c.is_control() || c.is_whitespace());
        match !name.is_empty() && name.len() <= MAX_HOLDER && plain && !name.starts_with('-') {
            true => Ok(Self(name)),
            false => Err(Error::new(ErrorKind::Usage, format!("{name:?} is not the name of a holder"))
                .advise("use 1 to 255 letters, digits and signs without blanks, not beginning with '-'")),
        }
    }

    /// The name as text.
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// Returns true for a holder that domsnap itself gives.
    pub fn is_automatic(&self) -> bool {
        AUTOMATIC.iter().any(|prefix| self.0.starts_with(prefix))
    }
}

impl TryFrom<String> for Holder {
    type Error = Error;

    fn try_from(name: String) -> Result<Self> {
        Self::new(name)
    }
}

impl From<Holder> for String {
    fn from(holder: Holder) -> Self {
        holder.0
    }
}

impl std::str::FromStr for Holder {
    type Err = Error;

    fn from_str(name: &str) -> Result<Self> {
        Self::new(name)
    }
}

impl fmt::Display for Holder {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(&self.0)
    }
}

/// A process whose end is the end of its hold.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, schemars::JsonSchema)]
#[non_exhaustive]
pub struct HoldingProcess {
    /// The machine that it runs on; absent: a machine without an ID.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub host: Option<Host>,
    /// Its number.
    pub pid: u32,
    /// The boot of the machine and the time of the process's start, which distinguish it from a later process
    /// of the same number.
    pub started: String,
}

impl HoldingProcess {
    /// The process that runs this program.
    ///
    /// # Errors
    /// [`ErrorKind::Io`] where `/proc` does not describe it.
    pub fn own() -> Result<Self> {
        let pid = std::process::id();
        let started = started(pid).map_err(|cause| {
            Error::new(ErrorKind::Io, format!("/proc does not say when process {pid} started")).because(cause)
        })?;
        Ok(Self { host: Host::local(), pid, started })
    }

    /// Returns true if it has certainly ended. Of a process of another machine nothing is known.
    fn is_gone(&self) -> bool {
        let here = match (&self.host, Host::local()) {
            (Some(there), Some(here)) => *there == here,
            (None, None) => true,
            (Some(_), None) | (None, Some(_)) => false,
        };
        here && match started(self.pid) {
            Ok(started) => started != self.started,
            Err(cause) => cause.kind() == std::io::ErrorKind::NotFound,
        }
    }
}

/// The boot of this machine, and the start of a process in clock ticks since then (`man 5 proc`, field 22 of
/// `stat`).
fn started(pid: u32) -> std::io::Result<String> {
    let boot = std::fs::read_to_string("/proc/sys/kernel/random/boot_id")?;
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat"))?;
    // The command, in parentheses, may have blanks and parentheses.
    let after = stat.rsplit_once(')').map(|(_, after)| after);
    let ticks = after.and_then(|after| after.split_whitespace().nth(19));
    let ticks = ticks.ok_or_else(|| std::io::Error::from(std::io::ErrorKind::InvalidData))?;
    Ok(format!("{}:{ticks}", boot.trim()))
}

/// A reference to a snapshot that keeps it from being deleted.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, schemars::JsonSchema)]
#[non_exhaustive]
pub struct Hold {
    /// The holder. A snapshot has at most one hold by each.
    pub holder: Holder,
    /// The user's reason.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub reason: String,
    /// The time since which it is held.
    #[schemars(with = "String")]
    pub since: Timestamp,
    /// The time at which the hold ends by itself.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(with = "Option<String>")]
    pub until: Option<Timestamp>,
    /// The process with which the hold ends.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub process: Option<HoldingProcess>,
}

impl Hold {
    /// Makes a hold that lasts until it is released.
    pub fn new(holder: Holder, since: Timestamp) -> Self {
        Self { holder, since, reason: String::new(), until: None, process: None }
    }

    /// Returns true if the hold keeps the snapshot at the time `now`. Where it is unknown if the process of
    /// the hold has ended, it does.
    pub fn is_active(&self, now: Timestamp) -> bool {
        let over = self.until.is_some_and(|until| until <= now);
        !over && !self.process.as_ref().is_some_and(HoldingProcess::is_gone)
    }
}

setters!(Hold {
    reason: String,
    until: Option<Timestamp>,
    process: Option<HoldingProcess>,
});

impl fmt::Display for Hold {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let until = self.until.map(|until| format!("until {}", until.strftime("%Y-%m-%dT%H:%M:%SZ")));
        let reason = (!self.reason.is_empty()).then(|| self.reason.clone());
        let details: Vec<String> = reason.into_iter().chain(until).collect();
        match details.is_empty() {
            true => write!(f, "{}", self.holder),
            false => write!(f, "{} ({})", self.holder, details.join(", ")),
        }
    }
}

/// Checks the reason of a hold, which is shown on terminals.
///
/// # Errors
/// The message: the violated rule.
fn check_reason(reason: &str) -> Result<(), String> {
    match reason.len() <= MAX_REASON && !reason.contains(char::is_control) {
        true => Ok(()),
        false => Err(format!("the reason of a hold has control characters or more than {MAX_REASON} bytes")),
    }
}

impl Snapshot {
    /// The holds that keep the snapshot at the time `now`.
    pub fn active_holds(&self, now: Timestamp) -> impl Iterator<Item = &Hold> {
        self.holds.iter().filter(move |hold| hold.is_active(now))
    }

    /// Checks its holds, as far as they come from a manifest or a user.
    ///
    /// # Errors
    /// The message: the violated rule.
    pub(crate) fn check_holds(&self) -> Result<(), String> {
        if self.holds.len() > MAX_HOLDS {
            return Err(format!("it has more than {MAX_HOLDS} holds"));
        }
        for (index, hold) in self.holds.iter().enumerate() {
            check_reason(&hold.reason)?;
            if self.holds.iter().take(index).any(|other| other.holder == hold.holder) {
                return Err(format!("it has two holds of {}", hold.holder));
            }
        }
        Ok(())
    }

    /// Refuses to remove the snapshot of `domain` while it is held at the time `now`.
    pub(crate) fn refuse_held(&self, domain: &str, attempted: &str, now: Timestamp) -> Result<()> {
        let holds: Vec<&Hold> = self.active_holds(now).collect();
        let Some(first) = holds.first() else { return Ok(()) };
        let by: Vec<String> = holds.iter().map(ToString::to_string).collect();
        let name = self.name.as_str();
        let release = ["domsnap", "release", domain, name, "--holder", first.holder.as_str()];
        let advice = match (&first.process, attempted) {
            (Some(process), _) => {
                format!("the hold of {} ends with process {}", first.holder, process.pid)
            }
            (None, _) => format!("`{}` releases it", shell_command(release)),
        };
        let deferred = match attempted {
            "delete" => format!(
                "; `{}` deletes it when the last hold ends",
                shell_command(["domsnap", "delete", domain, name, "--defer"])
            ),
            _ => String::new(),
        };
        Err(Error::new(
            ErrorKind::Refused,
            format!("snapshot {name} of domain {domain} is held by {}", by.join(", ")),
        )
        .state("no changes made")
        .advise(advice + &deferred))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(second: i64) -> Timestamp {
        Timestamp::from_second(second).unwrap()
    }

    #[test]
    fn names_of_holders_are_plain() {
        for good in ["backup", "me@host", "serve:12", "a/b", "ä"] {
            assert_eq!(Holder::new(good).unwrap().as_str(), good);
        }
        for bad in ["", "a b", "a\u{1b}[2J", "-x", &"x".repeat(256)] {
            assert_eq!(Holder::new(bad).unwrap_err().kind(), ErrorKind::Usage, "{bad:?}");
        }
        assert!(Holder::new("clone:web2").unwrap().is_automatic());
        assert!(!Holder::new("cloned").unwrap().is_automatic());
    }

    #[test]
    fn hold_ends_with_its_time() {
        let hold = Hold::new(Holder::new("a").unwrap(), at(1));
        assert!(hold.is_active(at(i64::from(u32::MAX))));
        let hold = hold.until(Some(at(10)));
        assert!(hold.is_active(at(9)) && !hold.is_active(at(10)));
    }

    /// The hold of a process ends with it, also if a later process has its number. Of a process of another
    /// machine nothing is known, so it holds.
    #[test]
    fn hold_ends_with_its_process() {
        let own = HoldingProcess::own().unwrap();
        let held = |process: &HoldingProcess| {
            Hold::new(Holder::new("serve:1").unwrap(), at(1)).process(Some(process.clone())).is_active(at(2))
        };
        assert!(held(&own));
        assert!(!held(&HoldingProcess { started: "another boot:1".to_owned(), ..own.clone() }));
        let mut child = std::process::Command::new("sleep").arg("60").spawn().unwrap();
        let other = HoldingProcess { pid: child.id(), started: started(child.id()).unwrap(), ..own.clone() };
        assert!(held(&other));
        child.kill().unwrap();
        child.wait().unwrap();
        assert!(!held(&other));
        let elsewhere = Some(Host::new("ffffffffffffffffffffffffffffffff", "elsewhere"));
        assert!(held(&HoldingProcess { host: elsewhere, ..other }));
    }
}
