//! A directory with a state directory and images, and what the test cases do with them.

use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, ensure};
use backend_vhd::image::{Chain, ChainOptions};
use domsnap_tests::domsnap::{Domsnap, Outcome, status};
use domsnap_tests::served::Server;

use crate::support::{Maker, seven_zip_reads};

/// Bytes of most disks.
pub const SIZE: usize = 8 << 20;

/// A directory with a state directory, and images.
pub struct Place {
    directory: PathBuf,
    _kept: Option<tempfile::TempDir>,
}

impl Place {
    /// A new one.
    pub fn new() -> Result<Self> {
        let kept = tempfile::Builder::new().prefix("domsnap-vhd-").tempdir()?;
        Ok(Self { directory: kept.path().to_owned(), _kept: Some(kept) })
    }

    /// A place at a directory that is created, and stays.
    pub fn at(directory: &Path) -> Result<Self> {
        std::fs::create_dir(directory)?;
        Ok(Self { directory: directory.to_owned(), _kept: None })
    }

    /// The directory.
    pub fn directory(&self) -> &Path {
        &self.directory
    }

    /// The path of a file in it.
    pub fn file(&self, name: &str) -> PathBuf {
        self.directory().join(name)
    }

    /// The same, as text.
    pub fn text(&self, name: &str) -> String {
        self.file(name).display().to_string()
    }

    /// The binary, with the state directory.
    pub fn domsnap(&self) -> Domsnap {
        Domsnap::new(&self.file("state"))
    }

    /// A dynamic image of QEMU's.
    pub fn vhd(&self, name: &str) -> Result<PathBuf> {
        self.vhd_of(name, SIZE as u64)
    }

    /// The same, of a disk of `size` bytes.
    pub fn vhd_of(&self, name: &str, size: u64) -> Result<PathBuf> {
        let size = size.to_string();
        run("qemu-img", &["create", "-q", "-f", "vpc", "-o", "force_size=on", &self.text(name), &size])?;
        Ok(self.file(name))
    }

    /// An image of any shape.
    pub fn make(&self, name: &str, maker: &Maker) -> PathBuf {
        let path = self.file(name);
        maker.write(&path);
        path
    }

    /// A command that must succeed.
    pub fn done<S: AsRef<std::ffi::OsStr>>(&self, args: &[S]) -> Result<Outcome> {
        self.domsnap().done(args)
    }

    /// A raw copy of what a VHD shows: a new file.
    pub fn raw_copy(&self, name: &str, copy: &str) -> Result<PathBuf> {
        self.done(&["disk", "materialise", &self.text(name), &self.text(copy), "--format", "raw"])?;
        Ok(self.file(copy))
    }

    /// A command that must be refused before anything is changed; what it said.
    pub fn refused(&self, args: &[&str]) -> Result<String> {
        let before = self.images()?;
        let outcome = self.domsnap().run(args)?.expect_status(status::REFUSED)?;
        ensure!(self.images()? == before, "a refused command changed a file: {outcome}");
        Ok(format!("{}{}", outcome.stdout, outcome.stderr))
    }

    /// The argument for a disk that is this VHD.
    pub fn disk(&self, name: &str) -> String {
        format!("{},format=vhd", self.text(name))
    }

    /// A server of an image of this directory.
    pub fn serve(&self, name: &str, more: &[&str]) -> Result<Server> {
        let image = self.disk(name);
        let args: Vec<&str> = std::iter::once(image.as_str()).chain(more.iter().copied()).collect();
        Server::start(&self.domsnap(), &self.file("s"), &args)
    }

    /// Name and content of every VHD, sorted.
    pub fn images(&self) -> Result<Vec<(String, Vec<u8>)>> {
        let mut images = Vec::new();
        for entry in std::fs::read_dir(self.directory())? {
            let entry = entry?;
            let name = entry.file_name().to_string_lossy().into_owned();
            if name.ends_with("vhd") && entry.file_type()?.is_file() {
                images.push((name, std::fs::read(entry.path())?));
            }
        }
        images.sort();
        Ok(images)
    }

    /// The layers below `stem.vhd`: permanent names that are not the current one.
    pub fn frozen(&self, stem: &str) -> Result<Vec<PathBuf>> {
        let current = std::fs::read(self.file(&format!("{stem}.vhd")))?;
        let images = self.images()?.into_iter();
        let others =
            images.filter(|(name, bytes)| name.starts_with(&format!("{stem}.ds-")) && *bytes != current);
        Ok(others.map(|(name, _)| self.file(&name)).collect())
    }
}

/// Runs a program, which must succeed.
pub fn run(program: &str, args: &[&str]) -> Result<Vec<u8>> {
    let output = Command::new(program).args(args).output().with_context(|| program.to_owned())?;
    ensure!(output.status.success(), "{program} {args:?}: {}", String::from_utf8_lossy(&output.stderr));
    Ok(output.stdout)
}

/// Writes to the top of a chain, durably.
pub fn write(image: &Path, at: u64, bytes: &[u8]) -> Result<()> {
    let mut chain = Chain::open(image, &ChainOptions::read_write())?;
    chain.write_at(bytes, at)?;
    Ok(chain.flush()?)
}

/// What a chain shows to the engine, for chains that no other program reads.
pub fn read_by_engine(image: &Path) -> Result<Vec<u8>> {
    let mut chain = Chain::open(image, &ChainOptions::read_only())?;
    let mut bytes = vec![0; chain.size() as usize];
    chain.read_at(&mut bytes, 0)?;
    Ok(bytes)
}

/// What a chain shows, to the engine and to 7-Zip.
pub fn read(image: &Path) -> Result<Vec<u8>> {
    let bytes = read_by_engine(image)?;
    // 7-Zip follows the chain by itself, and reads the same.
    let seen = seven_zip_reads(image).map_err(|error| anyhow::anyhow!("7-Zip: {error}"))?;
    ensure!(seen == bytes, "7-Zip reads something else from {}", image.display());
    Ok(bytes)
}
