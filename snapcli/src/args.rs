//! The command line: its grammar alone. `commands` carries it out.

use camino::Utf8PathBuf;
use clap::builder::styling::{AnsiColor, Styles};
use clap::{Args, Parser, Subcommand, ValueEnum, ValueHint};
use clap_complete::Shell;
use jiff::Timestamp;
use snapcore::hypervisor::{Control, PowerAfter, Quiesce};
use snapcore::service::{CreateDisk, DomainRef, KeepPrevious};
use snapcore::{ActivePath, DiskAddress, DomainName, Holder, PointKind, SnapshotName, Target};

mod disk;
mod policy;
mod values;
mod xl;

pub use disk::{CopyFormat, Disk, Serve};
pub use policy::{Policy, PolicyInstall, PolicyRemove, PolicyRun, PolicyShow};
pub use values::{DiskPlace, Domains, Moment};
use values::{bytes, disk_choice, disk_place, skipped_disk, when, when_or_never};
pub use xl::{Xl, XlCommand, XlCreate, XlDelete, XlList, XlRevert};

const STYLES: Styles = Styles::styled()
    .header(AnsiColor::Green.on_default().bold())
    .usage(AnsiColor::Green.on_default().bold())
    .literal(AnsiColor::Cyan.on_default().bold())
    .placeholder(AnsiColor::Cyan.on_default());

const AFTER_HELP: &str = "\
DOMAIN is one of:
  NAME                      a registered domain
  PATH[,format=FORMAT],...  its images, joined by commas (write a comma in a path twice)
  qemu:SOCKET               a running QEMU, by its QMP socket or tcp:127.0.0.1:PORT
  xen:NAME                  a running Xen domain

Exit status:
  0  done
  1  failed and rolled back
  2  wrong usage
  3  refused; no changes were made
  4  incomplete; run `domsnap recover`";

/// Snapshots of whole virtual machines.
#[derive(Debug, Parser)]
#[command(name = "domsnap", version, styles = STYLES, after_help = AFTER_HELP)]
#[command(disable_help_subcommand = true, arg_required_else_help = true, max_term_width = 100)]
pub struct Cli {
    #[command(flatten)]
    pub global: Global,
    #[command(subcommand)]
    pub command: Command,
}

/// Options of every command.
#[derive(Debug, Clone, Args)]
#[command(next_help_heading = "Global options")]
pub struct Global {
    /// Directory of the catalogue and the journal [default: $DOMSNAP_STATE_DIR, else /var/lib/domsnap for
    /// root, else $XDG_STATE_HOME/domsnap]
    #[arg(long, value_name = "DIR", global = true, value_hint = ValueHint::DirPath)]
    pub state_dir: Option<Utf8PathBuf>,
    /// Directory of plug-ins: programs named domsnap-backend-NAME, each for disks of the format NAME
    /// [default: $DOMSNAP_BACKEND_DIR, else /usr/libexec/domsnap]
    #[arg(long, value_name = "DIR", global = true, value_hint = ValueHint::DirPath)]
    pub backend_dir: Option<Utf8PathBuf>,
    /// Follow backing files into this directory too, in addition to the disk's own
    #[arg(long, value_name = "DIR", global = true, value_hint = ValueHint::DirPath)]
    pub allow_backing: Vec<Utf8PathBuf>,
    /// Limit the length of a chain of layers [default: 200]
    #[arg(long, value_name = "LAYERS", global = true, value_parser = clap::value_parser!(u32).range(1..))]
    pub max_depth: Option<u32>,
    /// Keep the space of deleted internal snapshots in the image file instead of giving it back to the file
    /// system
    #[arg(long, global = true)]
    pub no_punch: bool,
    /// The area of a thick volume's snapshot, in percent of the volume [default: 20]
    #[arg(long, value_name = "PERCENT", global = true, value_parser = clap::value_parser!(u32).range(1..=200))]
    pub lvm_area: Option<u32>,
    /// Answer with one JSON document on standard output
    #[arg(long, global = true)]
    pub json: bool,
    /// Suppress informational output
    #[arg(short, long, global = true, conflicts_with = "verbose")]
    pub quiet: bool,
    /// Print each step
    #[arg(short, long, global = true)]
    pub verbose: bool,
}

#[derive(Debug, Subcommand)]
pub enum Command {
    /// Create a snapshot of a domain: its disks, and its memory if it runs
    Create(Create),
    /// Revert a domain to a snapshot; `undo` brings the replaced state back
    Revert(Revert),
    /// Delete snapshots; all others stay as they are
    Delete(Delete),
    /// Make new domains of a snapshot's disks; the domain may run, and its files stay as they are
    Clone(CloneDomain),
    /// Show which extents of the disks differ between two snapshots
    Diff(Diff),
    /// Copy a snapshot into a directory, from which any QEMU restores it; the domain may run
    Export(Export),
    /// Serve the disks of a snapshot over NBD, read-only, until SIGTERM or SIGINT; the domain may run
    Serve(ServeSnapshot),
    /// Mount the file systems of a snapshot, read-only, until it is stopped
    Mount(Mount),
    /// Bring back the state that the last revert replaced
    Undo(Undo),
    /// Hold a snapshot, so that it is not deleted
    Hold(Hold),
    /// End a hold
    Release(Release),
    /// Give a snapshot another name
    Rename(Rename),
    /// Give a snapshot another description
    Describe(Describe),
    /// Set the time from which a snapshot may be deleted
    Expire(Expire),
    /// Take snapshots by a schedule, and keep some of them
    #[command(subcommand)]
    Policy(Policy),
    /// List the last operations on a domain
    History(History),
    /// List snapshots
    List(List),
    /// Show one snapshot: its files, their sizes, what deleting it would free
    Show(Show),
    /// Show the space that snapshots take, and what deleting them would free
    Du(Du),
    /// Register, list and show domains
    #[command(subcommand)]
    Domain(Domain),
    /// Snapshots of one image, without a domain
    #[command(subcommand)]
    Disk(Disk),
    /// The snapshot commands that the design paper gave to `xl`
    Xl(Xl),
    /// Check images, catalogue and manifests for damage
    Check(Check),
    /// Complete or roll back interrupted operations; run deferred merges
    Recover(Recover),
    /// Rebuild a domain's catalogue from its manifests and images
    Import(Import),
    /// List the disk formats and hypervisors, and what each supports
    Backends,
    /// Print the JSON schema of everything that --json prints
    Schema,
    /// Print completions for a shell
    Completions {
        /// The shell
        shell: Shell,
    },
    /// Write the man pages to a directory
    Man {
        /// The directory; it is created if it does not exist
        #[arg(value_hint = ValueHint::DirPath)]
        dir: Utf8PathBuf,
    },
}

/// The kind of snapshot on each disk, if given.
#[derive(Debug, Clone, Copy, Args)]
pub struct Kind {
    /// Store the snapshot inside the images
    #[arg(long, conflicts_with = "external")]
    pub internal: bool,
    /// Freeze the images and write to overlays on them
    #[arg(long)]
    pub external: bool,
}

impl Kind {
    pub fn wanted(self) -> Option<PointKind> {
        match (self.internal, self.external) {
            (true, _) => Some(PointKind::Internal),
            (_, true) => Some(PointKind::External),
            (false, false) => None,
        }
    }
}

#[derive(Debug, Args)]
pub struct Create {
    /// The domain; with --group, two or more, joined by commas
    pub domain: Domains,
    /// The new snapshot's name [default: the local time]
    pub name: Option<SnapshotName>,
    /// Take the snapshot of several domains at one instant: of all of them, or of none
    #[arg(long, conflicts_with = "disks")]
    pub group: bool,
    #[command(flatten)]
    pub kind: Kind,
    /// Choose for one disk: TARGET=internal, TARGET=external[,path=FILE], TARGET=skip, or TARGET=METHOD with
    /// one of its format's own methods (see 'domsnap backends')
    #[arg(long = "disk", value_name = "TARGET=HOW", value_parser = disk_choice)]
    pub disks: Vec<(Target, CreateDisk)>,
    /// Describe the snapshot
    #[arg(long, value_name = "TEXT", default_value = "", hide_default_value = true)]
    pub description: String,
    /// Permit the deletion from this time on by `delete --expired`: 2026-12-31, 2026-12-31T18:00, or 7d from
    /// now
    #[arg(long, value_name = "TIME", value_parser = when)]
    pub expires: Option<Timestamp>,
    /// Print what would be done; make no changes
    #[arg(long)]
    pub dry_run: bool,
    #[command(flatten)]
    pub running: CreateRunning,
}

/// Options for a snapshot of a running domain.
#[derive(Debug, Clone, Default, Args)]
#[command(next_help_heading = "Running domains")]
pub struct CreateRunning {
    /// Include the guest's memory [default if the domain runs]
    #[arg(long, conflicts_with = "disk_only")]
    pub memory: bool,
    /// Snapshot the disks alone, atomically
    #[arg(long)]
    pub disk_only: bool,
    /// Let the guest run while its memory is written [default]
    #[arg(long, conflicts_with_all = ["no_live", "disk_only"])]
    pub live: bool,
    /// Pause the guest until its memory is written
    #[arg(long, conflicts_with = "disk_only")]
    pub no_live: bool,
    /// Pre-copy time limit (only without background snapshot) [default: 60]
    #[arg(long, value_name = "SECONDS", conflicts_with_all = ["no_live", "disk_only"])]
    #[arg(value_parser = clap::value_parser!(u64).range(1..=86400))]
    pub budget: Option<u64>,
    /// Compress the memory image: 1 (fast) to 19 (small); 0: not [default: the domain's setting] [default
    /// level: 1]
    #[arg(long, value_name = "LEVEL", num_args = 0..=1, require_equals = true, default_missing_value = "1")]
    #[arg(value_parser = clap::value_parser!(u8).range(0..=i64::from(Control::MAX_COMPRESSION)), conflicts_with = "disk_only")]
    pub compress: Option<u8>,
    /// Flush and freeze the guest's file systems for the snapshot: `require` or `try`
    #[arg(long, value_name = "HOW", num_args = 0..=1, require_equals = true, default_missing_value = "require")]
    pub quiesce: Option<Freeze>,
    /// Thaw the file systems after this time at the latest [default: 10]
    #[arg(long, value_name = "SECONDS", requires = "quiesce", value_parser = clap::value_parser!(u64).range(1..=600))]
    pub quiesce_limit: Option<u64>,
    /// State of the guest afterwards [default: keep]
    #[arg(long, value_name = "WHAT")]
    pub then: Option<Then>,
}

#[derive(Debug, Clone, Copy, ValueEnum)]
pub enum Freeze {
    Require,
    Try,
}

impl From<Freeze> for Quiesce {
    fn from(freeze: Freeze) -> Self {
        match freeze {
            Freeze::Require => Self::Require,
            Freeze::Try => Self::Try,
        }
    }
}

#[derive(Debug, Clone, Copy, ValueEnum)]
pub enum Then {
    Keep,
    Pause,
    Off,
}

impl Then {
    pub fn power(self) -> Option<PowerAfter> {
        match self {
            Self::Keep => None,
            Self::Pause => Some(PowerAfter::Paused),
            Self::Off => Some(PowerAfter::Off),
        }
    }
}

#[derive(Debug, Args)]
pub struct Revert {
    /// The domain; with --group, two or more, joined by commas
    pub domain: Domains,
    /// The snapshot
    pub name: SnapshotName,
    /// Revert several domains to the snapshot that was taken of them at one instant: all of them, or none
    #[arg(long, conflicts_with_all = ["save_current", "skip", "no_safety", "config"])]
    pub group: bool,
    /// Save the current state as a snapshot first [default name: the local time]
    #[arg(long, value_name = "NAME", num_args = 0..=1, require_equals = true)]
    pub save_current: Option<Option<SnapshotName>>,
    /// What `undo` can bring back afterwards [default: DOMSNAP_UNDO, else free]
    #[arg(long, value_name = "WHAT", conflicts_with = "save_current")]
    pub undo: Option<KeepForUndo>,
    #[command(flatten)]
    pub then: ThenPower,
    /// Leave this disk as it is; may be given several times. Not with memory that is restored
    #[arg(long = "disk", value_name = "TARGET=skip", value_parser = skipped_disk)]
    pub skip: Vec<Target>,
    /// Do not save the current memory first (Xen only, where the domain is destroyed for a revert): after a
    /// failure it is off
    #[arg(long)]
    pub no_safety: bool,
    /// Create the domain from this file, and not from its own (Xen only)
    #[arg(long, value_name = "FILE", value_hint = ValueHint::FilePath)]
    pub config: Option<Utf8PathBuf>,
    /// Print what would be done; make no changes
    #[arg(long)]
    pub dry_run: bool,
}

/// The power state after a revert or an undo.
#[derive(Debug, Args)]
pub struct ThenPower {
    /// Leave the guest running afterwards
    #[arg(long, conflicts_with_all = ["paused", "off"])]
    pub running: bool,
    /// Leave the guest paused afterwards
    #[arg(long, conflicts_with = "off")]
    pub paused: bool,
    /// Leave the domain off afterwards; no memory is restored
    #[arg(long)]
    pub off: bool,
}

impl ThenPower {
    /// What was asked for; absent: as the snapshot says.
    pub fn asked(&self) -> Option<PowerAfter> {
        match (self.running, self.paused, self.off) {
            (true, ..) => Some(PowerAfter::Running),
            (_, true, _) => Some(PowerAfter::Paused),
            (.., true) => Some(PowerAfter::Off),
            (false, false, false) => None,
        }
    }
}

/// The state that a revert keeps for an undo.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum KeepForUndo {
    /// Nothing
    No,
    /// The disks, where that reserves no space
    Free,
    /// The disks
    Disks,
    /// The disks, and the memory if the domain runs
    Memory,
}

impl From<KeepForUndo> for KeepPrevious {
    fn from(keep: KeepForUndo) -> Self {
        match keep {
            KeepForUndo::No => Self::No,
            KeepForUndo::Free => Self::IfFree,
            KeepForUndo::Disks => Self::Disks,
            KeepForUndo::Memory => Self::Memory,
        }
    }
}

#[derive(Debug, Args)]
pub struct CloneDomain {
    /// The domain
    pub domain: DomainRef,
    /// The snapshot
    pub name: SnapshotName,
    /// The name of the new domain; with --count the beginning of the names
    #[arg(value_name = "NEW")]
    pub new: DomainName,
    /// Make this many, NEW-1 to NEW-N: all of them, or none
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=10_000))]
    pub count: Option<u32>,
    /// Copy all data, so that the clones share none with the domain
    #[arg(long)]
    pub full: bool,
    /// Clone the disks alone, of a snapshot that has memory too
    #[arg(long)]
    pub disk_only: bool,
    /// Clone the memory too: each clone continues where the snapshot was taken
    #[arg(long, conflicts_with = "disk_only")]
    pub memory: bool,
    /// Start the clones
    #[arg(long, requires = "memory")]
    pub start: bool,
    /// The links of the clones' network devices: down, up with the snapshot's addresses, or up on devices
    /// with new MAC addresses
    #[arg(long, value_name = "off|same|swap", default_value = "off", requires = "start")]
    pub network: Network,
    /// Run this shell script once in each guest, by its agent, before its links go up
    #[arg(long, value_name = "FILE", value_hint = ValueHint::FilePath, requires = "start")]
    pub run: Option<Utf8PathBuf>,
    /// Make the directories of the clones in this one [default: that of the domain's first disk, or the
    /// one above if that has the domain's name]
    #[arg(long, value_name = "DIR", value_hint = ValueHint::DirPath)]
    pub to: Option<Utf8PathBuf>,
    /// Print what would be done; make no changes
    #[arg(long)]
    pub dry_run: bool,
}

/// The network of clones.
#[derive(Debug, Clone, Copy, clap::ValueEnum)]
pub enum Network {
    /// Links down
    Off,
    /// Links up
    Same,
    /// Links up, on devices with new MAC addresses
    Swap,
}

/// Forms in which differences are printed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum DiffFormat {
    /// A table, for people
    Table,
    /// The same document as --json
    Json,
    /// The form of `qemu-img map --output=json`, of one disk: depth 0 is what differs
    Map,
}

#[derive(Debug, Args)]
pub struct Diff {
    /// The domain
    pub domain: DomainRef,
    /// The first snapshot
    #[arg(value_name = "A")]
    pub from: SnapshotName,
    /// The second snapshot; without it the current state of a domain that does not run
    #[arg(value_name = "B")]
    pub to: Option<SnapshotName>,
    /// Compare this disk only; may be repeated
    #[arg(long = "disk", value_name = "TARGET")]
    pub disks: Vec<Target>,
    /// Compare the data where the metadata says that they may differ
    #[arg(long)]
    pub exact: bool,
    /// The form of the output [default: table]
    #[arg(long, value_enum, value_name = "FORMAT", conflicts_with = "json")]
    pub format: Option<DiffFormat>,
}

#[derive(Debug, Args)]
pub struct Export {
    /// The domain
    pub domain: DomainRef,
    /// The snapshot
    #[arg(required_unless_present = "all")]
    pub name: Option<SnapshotName>,
    /// The directory of exports; it is made if it does not exist. `-`: write one disk to standard output, raw
    #[arg(long, value_name = "DIR", value_hint = ValueHint::DirPath)]
    pub to: Utf8PathBuf,
    /// Export what changed since this snapshot, of which the directory has an export
    #[arg(long, value_name = "SNAPSHOT", conflicts_with = "all")]
    pub since: Option<SnapshotName>,
    /// Export all snapshots that the directory does not have, each as an increment to the one that it derives
    /// from
    #[arg(long, conflicts_with = "name")]
    pub all: bool,
    /// Export this disk only; may be repeated
    #[arg(long = "disk", value_name = "TARGET")]
    pub disks: Vec<Target>,
    /// Export the disks alone, of a snapshot that has memory too
    #[arg(long)]
    pub disk_only: bool,
    /// Print what would be done; make no changes
    #[arg(long)]
    pub dry_run: bool,
}

#[derive(Debug, Args)]
pub struct ServeSnapshot {
    /// The domain
    pub domain: DomainRef,
    /// The snapshot, which is held meanwhile
    pub name: SnapshotName,
    /// The directory of the sockets, TARGET.sock for each disk; it is made if it does not exist
    #[arg(long, value_name = "DIR", value_hint = ValueHint::DirPath)]
    pub dir: Utf8PathBuf,
    /// Serve this disk only; may be repeated
    #[arg(long = "disk", value_name = "TARGET")]
    pub disks: Vec<Target>,
}

#[derive(Debug, Args)]
pub struct Mount {
    /// The domain
    pub domain: DomainRef,
    /// The snapshot, which is held meanwhile
    pub name: SnapshotName,
    /// The directory; each file system of the disks gets one in it, such as vda1. It is made if it does not
    /// exist
    #[arg(value_hint = ValueHint::DirPath)]
    pub dir: Utf8PathBuf,
    /// Mount the file systems of this disk only; may be repeated
    #[arg(long = "disk", value_name = "TARGET")]
    pub disks: Vec<Target>,
}

#[derive(Debug, Args)]
pub struct Undo {
    /// The domain
    pub domain: DomainRef,
    /// Remove the replaced state instead
    #[arg(long, conflicts_with_all = ["running", "paused", "off"])]
    pub forget: bool,
    #[command(flatten)]
    pub then: ThenPower,
    /// Print what would be done; make no changes
    #[arg(long)]
    pub dry_run: bool,
}

#[derive(Debug, Args)]
pub struct Hold {
    /// The domain
    pub domain: DomainRef,
    /// The snapshot
    pub name: SnapshotName,
    /// The holder; several may hold one snapshot [default: your user name]
    #[arg(long, value_name = "NAME")]
    pub holder: Option<Holder>,
    /// The reason, for others
    #[arg(long, value_name = "TEXT", default_value = "", hide_default_value = true)]
    pub reason: String,
    /// End the hold at this time: 2026-12-31, 2026-12-31T18:00, or 7d from now
    #[arg(long, value_name = "TIME", value_parser = when)]
    pub until: Option<Timestamp>,
    /// Print what would be done; make no changes
    #[arg(long)]
    pub dry_run: bool,
}

#[derive(Debug, Args)]
pub struct Release {
    /// The domain
    pub domain: DomainRef,
    /// The snapshot
    pub name: SnapshotName,
    /// The holder [default: your user name]
    #[arg(long, value_name = "NAME")]
    pub holder: Option<Holder>,
    /// Also release a hold that domsnap itself gave (clone:, serve:, export:)
    #[arg(long)]
    pub force: bool,
    /// Print what would be done; make no changes
    #[arg(long)]
    pub dry_run: bool,
}

#[derive(Debug, Args)]
pub struct Rename {
    /// The domain
    pub domain: DomainRef,
    /// The snapshot
    pub name: SnapshotName,
    /// Its new name
    pub new: SnapshotName,
    /// Print what would be done; make no changes
    #[arg(long)]
    pub dry_run: bool,
}

#[derive(Debug, Args)]
pub struct Describe {
    /// The domain
    pub domain: DomainRef,
    /// The snapshot
    pub name: SnapshotName,
    /// The description; an empty one removes it
    pub text: String,
    /// Print what would be done; make no changes
    #[arg(long)]
    pub dry_run: bool,
}

#[derive(Debug, Args)]
pub struct Expire {
    /// The domain
    pub domain: DomainRef,
    /// The snapshot
    pub name: SnapshotName,
    /// The time: 2026-12-31, 2026-12-31T18:00, 7d from now, or `never`
    #[arg(value_name = "TIME", value_parser = when_or_never)]
    pub time: Moment,
    /// Print what would be done; make no changes
    #[arg(long)]
    pub dry_run: bool,
}

#[derive(Debug, Args)]
pub struct History {
    /// The domain
    pub domain: DomainRef,
}

#[derive(Debug, Args)]
pub struct Delete {
    /// The domain; with --group, two or more, joined by commas
    pub domain: Domains,
    /// The snapshots
    #[arg(required_unless_present = "expired", value_name = "NAME")]
    pub names: Vec<SnapshotName>,
    /// Delete snapshots that were taken of several domains at one instant: in all of them, or in none
    #[arg(long, conflicts_with_all = ["defer", "expired", "children", "children_only"])]
    pub group: bool,
    /// Delete held snapshots when their last hold ends, and the others now
    #[arg(long)]
    pub defer: bool,
    /// Delete all snapshots that have expired, except those that are held and the one that the current state
    /// is based on
    #[arg(long)]
    pub expired: bool,
    /// Delete all snapshots derived from them, too
    #[arg(long, conflicts_with = "children_only")]
    pub children: bool,
    /// Delete only the snapshots derived from them
    #[arg(long)]
    pub children_only: bool,
    /// Limit merges in a running domain to this many bytes a second; KiB, MiB and GiB are units
    #[arg(long, value_name = "BYTES", value_parser = bytes, default_value = "0", hide_default_value = true)]
    pub limit: u64,
    /// Also delete snapshots that are damaged inside their image: they are forgotten, and their space stays
    /// in use
    #[arg(long)]
    pub force: bool,
    /// Print what would be done; make no changes
    #[arg(long)]
    pub dry_run: bool,
}

#[derive(Debug, Args)]
pub struct List {
    /// The domain [default: all]
    pub domain: Option<DomainRef>,
    /// Draw the tree of snapshots
    #[arg(long)]
    pub tree: bool,
    /// Show the layers of each disk and their sizes
    #[arg(long)]
    pub disks: bool,
    /// List the snapshots of all registered domains
    #[arg(long, conflicts_with = "domain")]
    pub all: bool,
}

#[derive(Debug, Args)]
pub struct Show {
    /// The domain
    pub domain: DomainRef,
    /// The snapshot
    pub name: SnapshotName,
}

#[derive(Debug, Args)]
pub struct Du {
    /// The domain
    pub domain: DomainRef,
    /// The snapshots, which are looked at together [default: all]
    #[arg(value_name = "SNAPSHOT")]
    pub names: Vec<SnapshotName>,
}

#[derive(Debug, Subcommand)]
pub enum Domain {
    /// Register a domain, and adopt the snapshots that its images know
    Add(DomainAdd),
    /// Forget a domain; its images and snapshots stay
    Remove {
        /// The domain
        domain: DomainRef,
    },
    /// List the registered domains
    List,
    /// Show a domain: its disks, their layers, and problems
    Show {
        /// The domain
        domain: DomainRef,
    },
    /// Find the domains that run on this host, and the command that registers each
    Scan,
    /// Add a disk to a domain, or remove one
    #[command(subcommand)]
    Disk(DomainDisk),
}

#[derive(Debug, Subcommand)]
pub enum DomainDisk {
    /// Add a disk
    Add {
        /// The domain
        domain: DomainRef,
        /// The disk: TARGET=PATH[,format=FORMAT]
        #[arg(value_name = "TARGET=PATH", value_parser = disk_place)]
        disk: DiskPlace,
    },
    /// Remove a disk; its image stays, and the snapshots keep their other disks
    Remove {
        /// The domain
        domain: DomainRef,
        /// The disk
        target: Target,
    },
}

#[derive(Debug, Args)]
pub struct DomainAdd {
    /// Its name
    #[arg(required_unless_present = "file")]
    pub name: Option<DomainName>,
    /// A disk: TARGET=PATH[,format=FORMAT]
    #[arg(long = "disk", value_name = "TARGET=PATH", value_parser = disk_place)]
    #[arg(required_unless_present_any = ["file", "at", "qmp", "xen"])]
    pub disks: Vec<DiskPlace>,
    /// Hypervisor and address of the domain. Without --disk its hypervisor is asked for the disks
    #[arg(long, value_name = "HYPERVISOR:ADDRESS", group = "run-by")]
    pub at: Option<String>,
    /// QMP socket of its QEMU, or tcp:127.0.0.1:PORT. Short for --at qemu:SOCKET
    #[arg(long, value_name = "SOCKET", group = "run-by", value_hint = ValueHint::FilePath)]
    pub qmp: Option<String>,
    /// Name of the Xen domain. Short for --at xen:NAME
    #[arg(long, value_name = "NAME", group = "run-by")]
    pub xen: Option<String>,
    /// The file that Xen creates it from [default: the one it was created from, if known]
    #[arg(long, value_name = "FILE", requires = "run-by", value_hint = ValueHint::FilePath)]
    pub config: Option<Utf8PathBuf>,
    /// The guest agent's socket, or tcp:127.0.0.1:PORT [default: as QEMU reports]
    #[arg(long, value_name = "SOCKET", requires = "run-by", value_hint = ValueHint::FilePath)]
    pub agent: Option<String>,
    /// Directory of memory images [default: beside the first disk]
    #[arg(long, value_name = "DIR", requires = "run-by", value_hint = ValueHint::DirPath)]
    pub memory_dir: Option<DiskAddress>,
    /// Compress memory images: 1 (fast) to 19 (small) [default: not] [default level: 1]
    #[arg(long, value_name = "LEVEL", requires = "run-by", num_args = 0..=1, require_equals = true)]
    #[arg(default_missing_value = "1", value_parser = clap::value_parser!(u8).range(0..=i64::from(Control::MAX_COMPRESSION)))]
    pub compress: Option<u8>,
    /// The command that starts it: everything up to the end of the line [default: as it was started when the
    /// snapshot was created]
    #[arg(long, value_name = "COMMAND", requires = "run-by", num_args = 1.., allow_hyphen_values = true)]
    pub start: Vec<String>,
    /// Path of the active image: `keep` the configured path, or use a `new` one for each external snapshot
    #[arg(long, value_name = "HOW", default_value = "keep")]
    pub active_path: Active,
    /// Read the domain from a file of TOML
    #[arg(long, value_name = "FILE", conflicts_with_all = ["name", "disks", "active_path", "run-by"])]
    #[arg(value_hint = ValueHint::FilePath)]
    pub file: Option<Utf8PathBuf>,
}

impl DomainAdd {
    /// Returns the domain's `HYPERVISOR:ADDRESS`, if one was given.
    pub fn place(&self) -> Option<String> {
        let short = [("qemu", &self.qmp), ("xen", &self.xen)];
        let short = short.into_iter().find_map(|(hypervisor, address)| {
            address.as_ref().map(|address| format!("{hypervisor}:{address}"))
        });
        self.at.clone().or(short)
    }
}

#[derive(Debug, Clone, Copy, ValueEnum)]
pub enum Active {
    /// The configured path stays the active image
    Keep,
    /// The active image gets a new path; the domain's configuration must follow
    New,
}

impl From<Active> for ActivePath {
    fn from(active: Active) -> Self {
        match active {
            Active::Keep => Self::Keep,
            Active::New => Self::New,
        }
    }
}

#[derive(Debug, Args)]
pub struct Check {
    /// The domain [default: all]
    pub domain: Option<DomainRef>,
    /// Search for images that are gone near where they were, and record where they are now. Without it, no
    /// changes are made
    #[arg(long)]
    pub repair: bool,
}

#[derive(Debug, Args)]
pub struct Recover {
    /// The domain [default: all]
    pub domain: Option<DomainRef>,
    /// Close the domain's interrupted operations as they are, if recovery cannot continue; touches no file
    #[arg(long, requires = "domain")]
    pub abandon: bool,
    /// First record that the domain runs on this host from now on, if it was recorded for another one
    #[arg(long, requires = "domain", conflicts_with = "abandon")]
    pub take_over: bool,
}

#[derive(Debug, Args)]
pub struct Import {
    /// The images, joined by commas, or the name of a registered domain; with --to a directory of exports
    pub domain: DomainRef,
    /// Copy the exports of a directory, which `export` made, into this new directory, and register the copies
    /// as a domain
    #[arg(long, value_name = "DIR", value_hint = ValueHint::DirPath, conflicts_with_all = ["replace", "trust", "records"])]
    pub to: Option<Utf8PathBuf>,
    /// Register the domain under this name
    #[arg(long)]
    pub name: Option<DomainName>,
    /// Replace what the catalogue has of the domain
    #[arg(long)]
    pub replace: bool,
    /// Trust the commands, addresses and paths in the manifests beside the images. Anyone who can write to
    /// the images' directory can have written them, and domsnap will run them
    #[arg(long)]
    pub trust: bool,
    /// Name and describe the snapshots in the images as libvirt or the prototype of xl recorded them: a file,
    /// or a directory of such files
    #[arg(long, value_name = "PATH", value_hint = ValueHint::AnyPath)]
    pub records: Option<Utf8PathBuf>,
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use super::*;

    #[test]
    fn command_tree_is_consistent() {
        Cli::command().debug_assert();
    }
}
