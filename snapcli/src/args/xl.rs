//! The arguments of `domsnap xl`: those that the design paper and its prototype gave to `xl`.

use clap::{Args, Subcommand};

#[derive(Debug, Args)]
#[command(arg_required_else_help = true)]
pub struct Xl {
    /// Print the snapshot as JSON; make no changes
    #[arg(short = 'N')]
    pub dry_run: bool,
    #[command(subcommand)]
    pub command: XlCommand,
}

#[derive(Debug, Subcommand)]
pub enum XlCommand {
    /// Create a snapshot: of memory and all disks, or as a configuration file says
    #[command(name = "snapshot-create")]
    Create(XlCreate),
    /// List the snapshots of a domain
    #[command(name = "snapshot-list")]
    List(XlList),
    /// Revert a domain to a snapshot
    #[command(name = "snapshot-revert")]
    Revert(XlRevert),
    /// Delete a snapshot
    #[command(name = "snapshot-delete")]
    Delete(XlDelete),
}

#[derive(Debug, Args)]
#[command(override_usage = "domsnap xl [-N] snapshot-create [-n NAME] [-D] [CONFIGFILE] DOMAIN")]
pub struct XlCreate {
    /// A configuration file (xl.snapshot.cfg), if any, and the domain: its name or number in Xen, or any
    /// DOMAIN of domsnap
    #[arg(required = true, num_args = 1..=2, value_names = ["CONFIGFILE", "DOMAIN"])]
    pub arguments: Vec<String>,
    /// The new snapshot's name [default: seconds since 1970]
    #[arg(short = 'n', value_name = "NAME")]
    pub name: Option<String>,
    /// Snapshot the disks alone
    #[arg(short = 'D', long)]
    pub disk_only: bool,
}

#[derive(Debug, Args)]
pub struct XlList {
    /// The domain: its name or number in Xen, or any DOMAIN of domsnap
    pub domain: String,
    /// Only this snapshot
    #[arg(short = 'n', value_name = "NAME")]
    pub name: Option<String>,
    /// Also list descriptions and disks
    #[arg(short = 'l', long)]
    pub long: bool,
}

#[derive(Debug, Args)]
pub struct XlRevert {
    /// The domain: its name or number in Xen, or any DOMAIN of domsnap
    pub domain: String,
    /// The snapshot
    #[arg(short = 'n', value_name = "NAME")]
    pub name: String,
    /// Leave the guest paused
    #[arg(short = 'p')]
    pub paused: bool,
    /// Not used: domsnap never waits for the end of the domain
    #[arg(short = 'e')]
    pub no_wait: bool,
    /// Not used: `--verbose` shows each step
    #[arg(short = 'd')]
    pub debug: bool,
    /// Not used: domsnap never goes on in the background
    #[arg(short = 'F')]
    pub foreground: bool,
    /// Not used: `xl console` connects to the console
    #[arg(short = 'c')]
    pub console: bool,
    /// Not used: `xl vncviewer` shows the screen
    #[arg(short = 'V', long)]
    pub vncviewer: bool,
    /// Not used: `xl vncviewer --autopass` shows the screen
    #[arg(short = 'A', long)]
    pub vncviewer_autopass: bool,
}

impl XlRevert {
    /// The options that were given and are not used, each with what serves instead.
    pub fn unused(&self) -> Vec<&'static str> {
        let all = [
            (self.no_wait, "-e: domsnap never waits for the end of the domain"),
            (self.debug, "-d: `domsnap --verbose` shows each step"),
            (self.foreground, "-F: domsnap never goes on in the background"),
            (self.console, "-c: `xl console` connects to the console"),
            (self.vncviewer, "-V: `xl vncviewer` shows the screen"),
            (self.vncviewer_autopass, "-A: `xl vncviewer --autopass` shows the screen"),
        ];
        all.into_iter().filter(|(given, _)| *given).map(|(_, instead)| instead).collect()
    }
}

#[derive(Debug, Args)]
pub struct XlDelete {
    /// The domain: its name or number in Xen, or any DOMAIN of domsnap
    pub domain: String,
    /// The snapshot
    #[arg(short = 'n', value_name = "NAME")]
    pub name: String,
}
