//! The command line of `domsnap policy`.

use camino::Utf8PathBuf;
use clap::{Args, Subcommand, ValueHint};
use snapcore::service::DomainRef;

/// The commands of policies.
#[derive(Debug, Subcommand)]
pub enum Policy {
    /// Take the snapshot that is due, if one is, and prune what no rule keeps
    Run(PolicyRun),
    /// Record a domain's policy, and have systemd run it
    Install(PolicyInstall),
    /// Forget a domain's policy, and have systemd run it no more; its snapshots stay
    Remove(PolicyRemove),
    /// Show a domain's policy, and whether systemd runs it
    Show(PolicyShow),
}

#[derive(Debug, Args)]
pub struct PolicyRun {
    /// The domain
    pub domain: DomainRef,
    /// Print what would be done, and the reason for each snapshot; make no changes
    #[arg(long)]
    pub dry_run: bool,
}

#[derive(Debug, Args)]
pub struct PolicyInstall {
    /// The domain
    pub domain: DomainRef,
    /// Read the policy from this domain file [default: the policy that is recorded]
    #[arg(long, value_name = "FILE", value_hint = ValueHint::FilePath)]
    pub file: Option<Utf8PathBuf>,
    /// Count the snapshots of an earlier policy of the domain, which was removed, as this one's
    #[arg(long)]
    pub adopt: bool,
    /// Record the policy alone; something else than systemd runs it
    #[arg(long)]
    pub no_timer: bool,
    /// Write the units of systemd to this directory, and ask systemd for nothing
    #[arg(long, value_name = "DIR", value_hint = ValueHint::DirPath, conflicts_with = "no_timer")]
    pub units: Option<Utf8PathBuf>,
    /// Print what would be done; make no changes
    #[arg(long)]
    pub dry_run: bool,
}

#[derive(Debug, Args)]
pub struct PolicyRemove {
    /// The domain
    pub domain: DomainRef,
    /// The directory that the units were written to
    #[arg(long, value_name = "DIR", value_hint = ValueHint::DirPath)]
    pub units: Option<Utf8PathBuf>,
    /// Print what would be done; make no changes
    #[arg(long)]
    pub dry_run: bool,
}

#[derive(Debug, Args)]
pub struct PolicyShow {
    /// The domain
    pub domain: DomainRef,
    /// The directory that the units were written to
    #[arg(long, value_name = "DIR", value_hint = ValueHint::DirPath)]
    pub units: Option<Utf8PathBuf>,
}
