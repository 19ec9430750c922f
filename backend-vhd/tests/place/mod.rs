//! A directory for the images of one test, and what the engine reads from a chain.

use std::path::{Path, PathBuf};

use backend_vhd::image::{Chain, ChainOptions};

use crate::support::Maker;

/// A directory that goes with this.
pub struct Place(tempfile::TempDir);

impl Place {
    pub fn new() -> Self {
        Self(tempfile::tempdir().unwrap())
    }

    pub fn directory(&self) -> &Path {
        self.0.path()
    }

    pub fn at(&self, name: &str) -> PathBuf {
        self.directory().join(name)
    }

    /// Writes an image of any shape.
    pub fn make(&self, name: &str, maker: &Maker) -> PathBuf {
        let path = self.at(name);
        maker.write(&path);
        path
    }
}

/// Everything that the chain shows.
pub fn read(path: &Path) -> Vec<u8> {
    let mut chain = Chain::open(path, &ChainOptions::read_only()).unwrap();
    let mut bytes = vec![0; chain.size() as usize];
    chain.read_at(&mut bytes, 0).unwrap();
    bytes
}
