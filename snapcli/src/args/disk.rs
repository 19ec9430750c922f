//! The arguments of `domsnap disk`.

use camino::Utf8PathBuf;
use clap::{Args, Subcommand, ValueEnum, ValueHint};
use snapcore::SnapshotName;
use snapcore::service::GivenImage;

use super::Kind;
use super::values::bytes;

#[derive(Debug, Subcommand)]
pub enum Disk {
    /// Take a snapshot of an image [default: internal]
    Create {
        /// The image: PATH, or PATH,format=qcow2
        #[arg(value_hint = ValueHint::FilePath)]
        image: GivenImage,
        /// The new snapshot's name [default: the local time]
        name: Option<SnapshotName>,
        #[command(flatten)]
        kind: Kind,
    },
    /// Revert an image to a snapshot; the current state is discarded
    Revert {
        /// The image: PATH, or PATH,format=qcow2
        #[arg(value_hint = ValueHint::FilePath)]
        image: GivenImage,
        /// The snapshot
        name: String,
        #[command(flatten)]
        kind: Kind,
    },
    /// Delete snapshots of an image, many in one pass
    Delete {
        /// The image: PATH, or PATH,format=qcow2
        #[arg(value_hint = ValueHint::FilePath)]
        image: GivenImage,
        /// The snapshots
        #[arg(required = true, value_name = "NAME")]
        names: Vec<String>,
        #[command(flatten)]
        kind: Kind,
        /// Also delete snapshots that are damaged: they are forgotten, and their space stays in use
        #[arg(long)]
        force: bool,
    },
    /// List the snapshots of an image
    List {
        /// The image: PATH, or PATH,format=qcow2
        #[arg(value_hint = ValueHint::FilePath)]
        image: GivenImage,
    },
    /// Serve an image, or a snapshot of it, over NBD until the command is terminated
    Serve(Serve),
    /// Check a VHD image and its chain
    Check {
        /// The image: PATH
        #[arg(value_hint = ValueHint::FilePath)]
        image: GivenImage,
        /// Correct footers, batmap and the path of the parent; blocks and their table are never changed
        #[arg(long)]
        repair: bool,
        /// Also read the data, to find sectors that are not in use and not zeros
        #[arg(long)]
        data: bool,
    },
    /// Copy what a VHD image and its parents show to a new file
    Materialise {
        /// The image: PATH
        #[arg(value_hint = ValueHint::FilePath)]
        image: GivenImage,
        /// The new file
        #[arg(value_hint = ValueHint::FilePath)]
        copy: Utf8PathBuf,
        /// The format of the copy
        #[arg(long, value_enum, default_value = "vhd-fixed", alias = "to")]
        format: CopyFormat,
        /// Round the size of a fixed VHD up to a multiple of this; Azure needs 1MiB
        #[arg(long, value_name = "BYTES", value_parser = bytes, default_value = "1MiB")]
        align: u64,
    },
    /// Write into a VHD child where its parent is, after files were moved
    Relocate {
        /// The child: PATH
        #[arg(value_hint = ValueHint::FilePath)]
        image: GivenImage,
        /// Its parent, which must have the id that the child states
        #[arg(value_hint = ValueHint::FilePath)]
        parent: Utf8PathBuf,
    },
    /// Make the disk of a VHD image larger
    Resize {
        /// The image: PATH
        #[arg(value_hint = ValueHint::FilePath)]
        image: GivenImage,
        /// The new size in bytes, optionally followed by KiB, MiB or GiB (or K, M, G)
        #[arg(value_parser = bytes)]
        size: u64,
    },
}

#[derive(Debug, Clone, Copy, ValueEnum)]
pub enum CopyFormat {
    /// The bytes of the disk
    Raw,
    /// A fixed VHD
    VhdFixed,
}

#[derive(Debug, Args)]
pub struct Serve {
    /// The image: PATH, or PATH,format=FORMAT with raw, qcow2 or vhd
    #[arg(value_hint = ValueHint::FilePath)]
    pub image: GivenImage,
    /// The unix socket to create; the control socket gets this name with `.control` added
    #[arg(long, value_name = "SOCKET", value_hint = ValueHint::FilePath)]
    pub socket: Utf8PathBuf,
    /// Serve this snapshot, read-only, instead of the current state
    #[arg(long, value_name = "SNAPSHOT")]
    pub at: Option<String>,
    /// Refuse writes of the client
    #[arg(long)]
    pub read_only: bool,
}
