//! The commands that a policy runs before and after a snapshot.
//!
//! A command comes from the catalogue, where `domain add` or `policy install` put it: never from a manifest.
//! Its program is looked at before each run. If another user could replace it, or the way to it, nothing is
//! run: a policy usually runs as root.

use std::time::Duration;

use camino::Utf8Path;
use snapcore::policy::{Policy, PolicySpec};
use snapcore::{DomainName, Error, ErrorKind, Result, SnapshotName};
use std::os::unix::fs::PermissionsExt;

use super::program::Program;
use crate::failure::Failure;
use crate::session::{Session, state_dir};
use crate::trusted::require_own;

/// The two commands.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Which {
    /// Before a snapshot is taken.
    Before,
    /// After it was taken, or not.
    After {
        /// True if it was taken.
        taken: bool,
    },
}

impl Which {
    fn name(self) -> &'static str {
        match self {
            Self::Before => "before",
            Self::After { .. } => "after",
        }
    }

    fn command(self, spec: &PolicySpec) -> &[String] {
        match self {
            Self::Before => &spec.before,
            Self::After { .. } => &spec.after,
        }
    }
}

/// Checks the programs of both commands.
///
/// # Errors
/// [`ErrorKind::Refused`], [`ErrorKind::NotFound`]: nothing was run.
pub fn require_fit(spec: &PolicySpec) -> Result<()> {
    for which in [Which::Before, Which::After { taken: true }] {
        let Some(program) = which.command(spec).first() else { continue };
        let (program, what) = (Utf8Path::new(program), format!("the program of the hook {}", which.name()));
        require_own(program, &what, "have any program run")?;
        let about = program.metadata();
        let is_program = about.is_ok_and(|about| about.is_file() && about.permissions().mode() & 0o111 != 0);
        if !is_program {
            return Err(Error::new(ErrorKind::Refused, format!("{what} {program} is not executable"))
                .state("no changes made")
                .advise(format!("make it executable: chmod +x {program}")));
        }
    }
    Ok(())
}

/// Runs a command of `policy`, if it has that one, for the snapshot `snapshot` of `domain`.
///
/// # Errors
/// [`ErrorKind::Refused`] if it fails; [`ErrorKind::Cancelled`].
pub fn run(
    session: &Session,
    policy: &Policy,
    which: Which,
    domain: &DomainName,
    snapshot: &SnapshotName,
) -> std::result::Result<(), Failure> {
    let command = which.command(&policy.spec);
    if command.is_empty() {
        return Ok(());
    }
    // Again, and not only at the beginning: the snapshot may have taken long.
    require_fit(&policy.spec).map_err(|error| Failure::of(error, false))?;
    let mut variables = vec![
        ("DOMSNAP_HOOK", which.name().to_owned()),
        ("DOMSNAP_DOMAIN", domain.to_string()),
        ("DOMSNAP_SNAPSHOT", snapshot.to_string()),
        ("DOMSNAP_POLICY", policy.id.to_string()),
        ("DOMSNAP_STATE_DIR", state_dir(&session.global)?.into_string()),
    ];
    // What the first command froze is released by the second, also after an interrupt.
    let cancel = match which {
        Which::Before => session.cancel(),
        Which::After { taken } => {
            let result = if taken { "taken" } else { "failed" };
            variables.push(("DOMSNAP_RESULT", result.to_owned()));
            Default::default()
        }
    };
    let program = Program {
        what: &format!("the hook {}", which.name()),
        command,
        variables: &variables,
        limit: Duration::from_secs(policy.spec.hook_limit().seconds()),
    };
    session.change(program.run(&cancel))
}
