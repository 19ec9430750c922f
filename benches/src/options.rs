//! The command line of the benches.

use std::path::PathBuf;

use anyhow::{Result, bail};
use clap::{Parser, Subcommand};

use crate::probe::Work;
use crate::rows::{self, Group};

/// Measures domsnap side by side with qemu-img.
#[derive(Debug, Parser)]
#[command(name = "domsnap-benches")]
pub struct Options {
    /// Measure in this directory [default: a new one in the system's temporary directory]
    #[arg(long, value_name = "DIR")]
    pub dir: Option<PathBuf>,
    /// Only this row, or all rows of this group; may be repeated
    #[arg(long, value_name = "NAME")]
    pub only: Vec<String>,
    /// Smaller images and fewer repetitions: whether all works, not how fast it is
    #[arg(long)]
    pub quick: bool,
    /// List groups and rows, and measure nothing
    #[arg(long)]
    pub list: bool,
    /// The domsnap to measure [default: $DOMSNAP_BIN, or the one beside this program]
    #[arg(long, value_name = "FILE")]
    pub domsnap: Option<PathBuf>,
    /// Write the results to this file too, as Markdown
    #[arg(long, value_name = "FILE")]
    pub markdown: Option<PathBuf>,
    #[command(subcommand)]
    pub probe: Option<Probe>,
}

/// What this program runs itself for.
#[derive(Debug, Subcommand)]
pub enum Probe {
    /// Does the least work that an operation can be
    #[command(subcommand, hide = true)]
    Probe(Work),
}

impl Options {
    /// The groups that hold what `--only` names, in their own order.
    pub fn groups(&self) -> Result<Vec<Group>> {
        for only in &self.only {
            if !rows::names().any(|(group, name)| group == only || name == only) {
                let known: Vec<_> = rows::names().map(|(_, name)| name).collect();
                bail!("--only {only} is neither a group nor a row; the rows are: {}", known.join(", "));
            }
        }
        Ok(rows::GROUPS
            .into_iter()
            .filter(|group| {
                self.only.is_empty()
                    || self.only.iter().any(|only| group.name == only || group.rows.contains(&only.as_str()))
            })
            .collect())
    }
}
