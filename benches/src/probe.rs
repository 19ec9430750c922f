//! The least work that an operation can be: a process of its own that does so much I/O and nothing else.

use std::fs::{File, OpenOptions};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use clap::Subcommand;

/// The size of a probe's requests.
const REQUEST: usize = 1 << 20;

/// What a probe does.
#[derive(Debug, Clone, Subcommand)]
pub enum Work {
    /// Reads the first BYTES of a file, writes them back, and flushes so many times on the way
    Rewrite {
        /// A file that holds them
        file: PathBuf,
        /// How many
        bytes: u64,
        /// How often
        flushes: u32,
    },
    /// Reads the first 64 KiB of each file
    Heads {
        /// The files
        files: Vec<PathBuf>,
    },
    /// Makes a file that shares all blocks of another, and nothing more
    Clone {
        /// The other
        from: PathBuf,
        /// The new file
        to: PathBuf,
        /// Flush it and its directory too
        #[arg(long)]
        durable: bool,
    },
    /// Makes an overlay's worth of a file, names it, and moves a second name to it, each durable
    Overlay {
        /// An empty directory
        directory: PathBuf,
    },
}

impl Work {
    /// Does it.
    pub fn run(&self) -> Result<()> {
        match self {
            Work::Rewrite { file, bytes, flushes } => rewrite(file, *bytes, *flushes),
            Work::Heads { files } => files.iter().try_for_each(|file| {
                let file = File::open(file).with_context(|| format!("open {}", file.display()))?;
                file.read_at(&mut vec![0; 64 << 10], 0)?;
                Ok(())
            }),
            Work::Clone { from, to, durable } => clone(from, to, *durable),
            Work::Overlay { directory } => overlay(directory),
        }
    }
}

fn rewrite(file: &Path, bytes: u64, flushes: u32) -> Result<()> {
    let file = OpenOptions::new().read(true).write(true).open(file)?;
    let mut piece = vec![0; REQUEST];
    let mut at = 0;
    for flush in 1..=u64::from(flushes) {
        while at < bytes * flush / u64::from(flushes) {
            let length = usize::try_from(bytes - at).unwrap_or(REQUEST).min(REQUEST);
            file.read_exact_at(&mut piece[..length], at)?;
            file.write_all_at(&piece[..length], at)?;
            at += length as u64;
        }
        file.sync_data()?;
    }
    Ok(())
}

fn clone(from: &Path, to: &Path, durable: bool) -> Result<()> {
    let new = File::create_new(to)?;
    rustix::fs::ioctl_ficlone(&new, &File::open(from)?)?;
    if durable {
        new.sync_all()?;
        File::open(to.parent().context("a file in no directory")?)?.sync_all()?;
    }
    Ok(())
}

fn overlay(directory: &Path) -> Result<()> {
    let (layer, new, active) = (directory.join("layer"), directory.join("new"), directory.join("active"));
    let file = File::create_new(&layer)?;
    file.write_all_at(&[1; 4 << 16], 0)?;
    file.sync_all()?;
    std::fs::hard_link(&layer, &new)?;
    std::fs::rename(&new, &active)?;
    File::open(directory)?.sync_all()?;
    Ok(())
}
