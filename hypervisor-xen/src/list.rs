//! The existing domains: `xl list` for their states, `xl list -l` for their configurations.

use std::time::{Duration, Instant};

use serde_json::Value;
use snapcore::{Error, ErrorKind, Result};

use crate::{
    users,
    xl::{SOON, Xl},
};

/// State of a domain, from the flags of `xl list`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Flags {
    pub(crate) paused: bool,
    /// It has shut down, or is suspended for a save.
    pub(crate) shut: bool,
    pub(crate) crashed: bool,
    pub(crate) dying: bool,
}

/// A domain that `xl list` shows.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Row {
    pub(crate) name: String,
    pub(crate) domid: u32,
    pub(crate) flags: Flags,
    /// True if its processors ever ran: those of a domain that was created paused have not.
    pub(crate) has_run: bool,
}

/// Lists all domains but dom0.
pub(crate) async fn rows(xl: &Xl) -> Result<Vec<Row>> {
    let text = xl.must(&["list"], SOON).await?;
    Ok(text.lines().skip(1).filter_map(row).filter(|row| row.domid != 0).collect())
}

/// Finds a domain by its name.
pub(crate) async fn row_of(xl: &Xl, name: &str) -> Result<Option<Row>> {
    let all = rows(xl).await?;
    // A domain that is being migrated has a suffix after its name.
    for (word, doing) in [("incoming", "arriving by a migration"), ("migratedaway", "leaving by a migration")]
    {
        if all.iter().any(|row| row.name == format!("{name}--{word}")) {
            return Err(busy(name, doing));
        }
    }
    Ok(all.into_iter().find(|row| row.name == name))
}

/// The name of the domain that `xl` means by a word: its number, or its name. None where Xen has no such
/// domain, or this machine is no dom0.
///
/// # Errors
/// If `xl list` fails.
pub async fn domain_called(word: &str) -> Result<Option<String>> {
    let Some(xl) = Xl::find() else { return Ok(None) };
    let all = rows(&xl).await?;
    let numbered = word.parse::<u32>().ok().and_then(|domid| all.iter().find(|row| row.domid == domid));
    let found = numbered.or_else(|| all.iter().find(|row| row.name == word));
    Ok(found.map(|row| row.name.clone()))
}

/// Makes the error for a domain in a transition, on which no work is possible.
pub(crate) fn busy(name: &str, doing: &str) -> Error {
    Error::new(ErrorKind::Busy, format!("domain {name} of Xen is {doing}"))
        .state("no changes made")
        .advise("wait until that is over (`xl list` shows it), then try again")
}

/// Describes the state that forbids all work on a domain, if it is in one.
pub(crate) fn in_transition(row: &Row) -> Option<&'static str> {
    if row.flags.dying {
        return Some("dying");
    }
    if row.flags.crashed {
        return Some("crashed, and is kept for inspection");
    }
    row.flags.shut.then_some("shutting down, or being saved")
}

/// Parses a line of `xl list`: name, id, memory, processors, state, seconds. A name may contain blanks.
fn row(line: &str) -> Option<Row> {
    let fields: Vec<&str> = line.split_whitespace().collect();
    let at = fields.len().checked_sub(5)?;
    let [domid, _memory, _cpus, state, seconds] = fields.get(at..)? else { return None };
    let flag = |letter| state.contains(letter);
    Some(Row {
        name: fields.get(..at)?.join(" "),
        domid: domid.parse().ok()?,
        flags: Flags { paused: flag('p'), shut: flag('s'), crashed: flag('c'), dying: flag('d') },
        has_run: seconds.parse::<f64>().ok()? > 0.0,
    })
}

/// Returns true if a domain has shut down only for a save (`SHUTDOWN_suspend`), and not to end.
pub(crate) async fn is_suspended(xl: &Xl, row: &Row) -> Result<bool> {
    if !row.flags.shut {
        return Ok(false);
    }
    let text = xl.must(&["list", "-v", &row.domid.to_string()], SOON).await?;
    Ok(text.lines().nth(1).and_then(reason) == Some(SUSPEND))
}

const SUSPEND: u32 = 2;

/// Returns the reason of a domain's shutdown: the last field but one of a line of `xl list -v`, in
/// hexadecimal; `-` if there is none.
fn reason(line: &str) -> Option<u32> {
    u32::from_str_radix(line.split_whitespace().rev().nth(1)?, 16).ok()
}

/// Reads the configuration of a domain from libxl.
pub(crate) async fn config_of(xl: &Xl, domid: u32) -> Result<Value> {
    let id = domid.to_string();
    let args = ["list", "-l", id.as_str()];
    let mut failure = None;
    // xl sometimes prints half of it, if something changes meanwhile.
    for _ in 0..2 {
        let text = xl.must(&args, SOON).await?;
        match serde_json::from_str::<Value>(&text) {
            Ok(listed) => {
                let found = listed.as_array().into_iter().flatten().find(|found| found["domid"] == domid);
                return match found.map(|found| &found["config"]) {
                    Some(config) if config.is_object() => Ok(config.clone()),
                    _ => Err(Error::new(
                        ErrorKind::NotFound,
                        format!("`xl list -l` does not show domain {domid}"),
                    )),
                };
            }
            Err(error) => failure = Some(error),
        }
    }
    let mut error = Error::new(ErrorKind::Io, "the output of `xl list -l` is not understood");
    if let Some(cause) = failure {
        error = error.because(cause);
    }
    Err(error)
}

/// Time limit for a domain that is being created: the creator may be an xl of ours, of a domsnap that was
/// killed.
const CREATING: Duration = Duration::from_secs(300);

/// A domain that is half created has no configuration. It may still get one within this time after the last
/// creating xl has ended.
const IDLE_LIMIT: Duration = Duration::from_secs(3);

/// Reads the configuration of a domain; it has none while it is being created. `None` if no process continues
/// its creation.
pub(crate) async fn config_when_made(xl: &Xl, row: &Row) -> Result<Option<Value>> {
    let until = Instant::now() + CREATING;
    let mut idle_since = None;
    loop {
        match config_of(xl, row.domid).await {
            Err(error) if error.kind() == ErrorKind::NotFound => {}
            Err(error) => return Err(error),
            Ok(config) => return Ok(Some(config)),
        }
        if users::is_a_domain_being_created() {
            idle_since = None;
        } else if idle_since.get_or_insert_with(Instant::now).elapsed() > IDLE_LIMIT {
            return Ok(None);
        }
        if Instant::now() > until {
            return Err(busy(&row.name, "being created, or ended"));
        }
        tokio::time::sleep(Duration::from_millis(500)).await;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_of_xl_list_is_read_from_its_end() {
        let web =
            row("web                                          3    96     1     -b----       1.2").unwrap();
        assert_eq!((web.name.as_str(), web.domid, web.flags.paused, web.has_run), ("web", 3, false, true));
        let two = row("two names     12   128     2     --p-s-       0.0").unwrap();
        assert_eq!(two.name, "two names");
        assert!(two.flags.paused && two.flags.shut && !two.flags.dying && !two.has_run);
        assert_eq!(in_transition(&two), Some("shutting down, or being saved"));
        let killed =
            "web  3  96  1  ---s--  1.2 00000000-0000-0000-0000-000000000000        2                -";
        assert_eq!(reason(killed), Some(SUSPEND));
        assert_eq!(
            reason("web  3  96  1  -b----  1.2 00000000-0000-0000-0000-000000000000        -       -"),
            None
        );
        assert_eq!(row("nonsense"), None);
        assert_eq!(row(""), None);
    }
}
