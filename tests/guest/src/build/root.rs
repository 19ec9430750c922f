//! A whole root file system of Debian packages, for guests that need more than one program: what the packages depend on comes
//! with them. They are unpacked, not installed: no script of theirs runs.

use std::{
    ffi::OsStr,
    fs,
    os::unix::fs::symlink,
    path::{Path, PathBuf},
    process::{Command, Stdio},
};

use anyhow::{Context, Result, ensure};

use super::packages::ADVICE;
use crate::process::run;

/// Directories that are links into `usr` in Debian, whatever a package calls them.
const MERGED: [&str; 3] = ["bin", "sbin", "lib"];

/// Packages, with all that they depend on, downloaded.
pub struct Root {
    archives: Vec<PathBuf>,
}

impl Root {
    /// Downloads packages and what they depend on into `keep`, where those that are there already are taken from. Nothing of
    /// this machine's own packages counts as being there.
    ///
    /// # Errors
    /// apt knows one of them not, or the mirror cannot be reached.
    pub fn download(packages: &[&str], keep: &Path) -> Result<Self> {
        let keep = keep.join("closure");
        fs::create_dir_all(keep.join("partial"))?;
        let work = tempfile::tempdir_in(&keep)?;
        let nothing = work.path().join("status");
        fs::write(&nothing, "")?;
        let apt = |more: &[&str]| {
            let mut apt = Command::new("apt-get");
            apt.arg("-qq").arg("--no-install-recommends").arg("-y");
            apt.arg("-o").arg(option("Dir::State::status=", &nothing));
            apt.arg("-o").arg(option("Dir::Cache::archives=", &keep));
            // As whoever runs this; nothing of the system is changed, so its locks are not needed.
            apt.args(["-o", "APT::Sandbox::User=root", "-o", "Debug::NoLocking=1"]);
            apt.args(more).arg("install").args(packages);
            apt
        };
        run(&mut apt(&["--download-only"]), ADVICE)?;
        // Which of those that are kept these are: what it would install, by name and version.
        let plan = run(&mut apt(&["--simulate"]), ADVICE)?;
        let mut archives = Vec::new();
        for line in plan.lines() {
            // Inst NAME (VERSION SUITE [ARCHITECTURE])
            let Some((name, rest)) = line.strip_prefix("Inst ").and_then(|rest| rest.split_once(" (")) else {
                continue;
            };
            let version = rest.split(' ').next().unwrap_or_default().replace(':', "%3a");
            let begin = format!("{name}_{version}_");
            let archive = fs::read_dir(&keep)?
                .filter_map(std::result::Result::ok)
                .map(|entry| entry.path())
                .find(|path| {
                    path.file_name().and_then(OsStr::to_str).is_some_and(|file| file.starts_with(&begin))
                });
            archives.push(archive.with_context(|| format!("apt-get downloaded no {begin}*: {ADVICE}"))?);
        }
        ensure!(
            !archives.is_empty(),
            "apt-get does not say what {} are made of: {ADVICE}",
            packages.join(", ")
        );
        Ok(Self { archives })
    }

    /// The names of the packages, with what they depend on.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.archives.iter().filter_map(|archive| archive.file_name()?.to_str()?.split('_').next())
    }

    /// Unpacks one package into a directory.
    ///
    /// # Errors
    /// It is none of these, or cannot be unpacked.
    pub fn unpack(&self, package: &str, into: &Path) -> Result<()> {
        let begin = format!("{package}_");
        let archive = self.archives.iter().find(|archive| {
            archive.file_name().and_then(OsStr::to_str).is_some_and(|file| file.starts_with(&begin))
        });
        extract(archive.with_context(|| format!("the package {package} was not downloaded"))?, into)
    }

    /// Unpacks all packages but those into a directory, which becomes a root file system.
    ///
    /// # Errors
    /// One cannot be unpacked.
    pub fn unpack_all(&self, but: impl Fn(&str) -> bool, into: &Path) -> Result<()> {
        for name in MERGED {
            fs::create_dir_all(into.join("usr").join(name))?;
            symlink(format!("usr/{name}"), into.join(name))?;
        }
        fs::create_dir_all(into.join("usr/lib64"))?;
        symlink("usr/lib64", into.join("lib64"))?;
        for archive in &self.archives {
            let name = archive.file_name().and_then(OsStr::to_str).unwrap_or_default();
            if !but(name.split('_').next().unwrap_or_default()) {
                extract(archive, into)?;
            }
        }
        Ok(())
    }
}

fn option(name: &str, path: &Path) -> std::ffi::OsString {
    let mut text = std::ffi::OsString::from(name);
    text.push(path);
    text
}

/// dpkg's own way of unpacking would put directories in the place of the merged links.
fn extract(archive: &Path, into: &Path) -> Result<()> {
    fs::create_dir_all(into)?;
    let mut unpack = Command::new("dpkg-deb")
        .arg("--fsys-tarfile")
        .arg(archive)
        .stdout(Stdio::piped())
        .spawn()
        .context("dpkg-deb cannot be started: it is part of dpkg")?;
    let stdout = unpack.stdout.take().context("dpkg-deb has no standard output")?;
    let tar = Command::new("tar")
        .args(["--keep-directory-symlink", "--no-same-owner", "-x", "-p", "-C"])
        .arg(into)
        .stdin(stdout)
        .output()
        .context("tar cannot be started")?;
    let unpacked = unpack.wait()?;
    ensure!(
        unpacked.success() && tar.status.success(),
        "{} cannot be unpacked into {}: {}",
        archive.display(),
        into.display(),
        String::from_utf8_lossy(&tar.stderr).trim()
    );
    Ok(())
}
