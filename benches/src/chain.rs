//! Domains of one disk whose chain of external snapshots domsnap made.

use std::collections::HashMap;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, ensure};

use crate::bench::Bench;
use crate::child;
use crate::image::{self, Extent};

/// The domain's name.
pub const GUEST: &str = "guest";

/// What each layer of a chain holds.
#[derive(Debug, Clone, Copy)]
pub struct Shape {
    /// How many external snapshots: one layer more than that.
    pub snapshots: u32,
    /// The disk's size in bytes.
    pub size: u64,
    /// How many runs of bytes each layer holds.
    pub extents: u32,
    /// How long each of them is.
    pub extent: u64,
    /// Whether each layer's runs follow each other, and no layer hides another's; else they are scattered,
    /// and do.
    pub orderly: bool,
}

/// A domain of one disk, in a directory of its own.
#[derive(Debug)]
pub struct Chain {
    root: PathBuf,
    snapshots: u32,
}

/// The name of snapshot number `number`, from 1.
pub fn name(number: u32) -> String {
    format!("s{number}")
}

impl Chain {
    /// Makes the disk, and a snapshot after each writing to it: the bottom layer stays empty.
    pub fn make(bench: &Bench, root: &Path, shape: Shape) -> Result<Chain> {
        let mut chain = Chain { root: root.to_owned(), snapshots: 0 };
        std::fs::create_dir_all(chain.images())?;
        image::create(&chain.disk(), shape.size, "cluster_size=65536")?;
        let disk = format!("vda={}", chain.disk().display());
        child::run(&mut chain.domsnap(bench, &["domain", "add", GUEST, "--disk", &disk]))?;
        let mut random = Scatter(0x9e37_79b9_7f4a_7c15);
        for number in 1..=shape.snapshots {
            child::run(&mut chain.create(bench, &name(number)))?;
            chain.snapshots = number;
            let extents: Vec<Extent> = (0..shape.extents)
                .map(|index| {
                    let slot = match shape.orderly {
                        true => u64::from((number - 1) * shape.extents + index),
                        false => random.next() % (shape.size / shape.extent),
                    };
                    Extent { offset: slot * shape.extent, length: shape.extent }
                })
                .collect();
            let pattern = u8::try_from(number % 255 + 1)?;
            image::write(&chain.disk(), &extents, pattern)?;
        }
        image::flush(root)?;
        Ok(chain)
    }

    /// The directory of its images alone.
    pub fn images(&self) -> PathBuf {
        self.root.join("images")
    }

    /// The configured path of its disk.
    pub fn disk(&self) -> PathBuf {
        self.images().join("disk.qcow2")
    }

    /// How many snapshots were made.
    pub fn snapshots(&self) -> u32 {
        self.snapshots
    }

    /// domsnap with its state directory.
    pub fn domsnap(&self, bench: &Bench, args: &[&str]) -> Command {
        bench.domsnap(&self.root.join("state"), args)
    }

    /// The command that takes an external snapshot.
    pub fn create(&self, bench: &Bench, name: &str) -> Command {
        self.domsnap(bench, &["create", GUEST, name, "--external"])
    }

    /// The command that deletes snapshots.
    pub fn delete(&self, bench: &Bench, names: &[String]) -> Command {
        let mut command = self.domsnap(bench, &["delete", GUEST]);
        command.args(names);
        command
    }

    /// Copies its images to `to`, for another program.
    pub fn copy_images(&self, to: &Path) -> Result<PathBuf> {
        image::copy(&self.images(), to)?;
        Ok(to.join("disk.qcow2"))
    }

    /// Fails if the chain is not so many layers, or if qemu-img finds anything wrong in the `first` from the
    /// top.
    pub fn check(&self, layers: usize, first: usize) -> Result<()> {
        let chain = image::chain(&self.disk())?;
        ensure!(chain.len() == layers, "{} has {} layers, not {layers}", self.disk().display(), chain.len());
        chain.iter().take(first).try_for_each(|layer| image::check(layer))
    }

    /// Bytes on the disk of each image file, by inode.
    pub fn allocated(&self) -> Result<HashMap<u64, u64>> {
        std::fs::read_dir(self.images())?
            .map(|entry| {
                let meta = entry?.metadata()?;
                Ok((meta.ino(), meta.blocks() * 512))
            })
            .collect()
    }

    /// How many bytes the active image has more than the same file had `before`: what was moved into it.
    pub fn moved(&self, before: &HashMap<u64, u64>) -> Result<u64> {
        let meta =
            std::fs::metadata(self.disk()).with_context(|| format!("look at {}", self.disk().display()))?;
        Ok((meta.blocks() * 512).saturating_sub(before.get(&meta.ino()).copied().unwrap_or(0)))
    }
}

/// Numbers without order, the same ones every time.
struct Scatter(u64);

impl Scatter {
    fn next(&mut self) -> u64 {
        // xorshift64: any full-period generator does.
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }
}
