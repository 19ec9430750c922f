//! Debian's generic kernel for the guest: it has drivers that the cloud kernel is built without, as the one
//! of the virtual machine generation ID.
//!
//! The initial file system is the guest's own, and behind it an archive with this kernel's modules in the
//! place of the cloud kernel's: Linux unpacks both.

use std::{
    fs,
    hash::{DefaultHasher, Hash, Hasher},
    path::{Path, PathBuf},
};

use anyhow::{Context, Result};

use crate::{
    build::{self, Archive, Root, elf},
    cache::Built,
};

/// What apt calls the newest generic kernel.
const PACKAGE: &str = "linux-image-amd64";

/// The kernel and the initial file system of a built guest; they are made if they are missing.
pub(crate) fn get(built: &Built) -> Result<PathBuf> {
    built.once(&name(), |dir| make(built, dir).context("the guest's generic kernel cannot be made"))
}

/// Where they are in the directory of a built guest.
pub(crate) fn place(built: &Path) -> PathBuf {
    built.join(name())
}

/// Changes when what would be made changes.
fn name() -> String {
    let mut hasher = DefaultHasher::new();
    include_str!("generic.rs").hash(&mut hasher);
    format!("generic-{:016x}", hasher.finish())
}

fn make(built: &Built, dir: &Path) -> Result<()> {
    fs::create_dir(dir)?;
    let packages = built.dir().parent().context("a built guest is in a cache")?.join("packages");
    let downloaded = Root::download(&[PACKAGE], &packages)?;
    let is_kernel = |name: &&str| {
        name.strip_prefix("linux-image-").is_some_and(|rest| rest.starts_with(|c: char| c.is_ascii_digit()))
    };
    let package = downloaded.names().find(is_kernel).context("no kernel was downloaded")?;
    let work = tempfile::tempdir_in(dir)?;
    downloaded.unpack(package, work.path())?;
    let release = package.trim_start_matches("linux-image-");
    let image = work.path().join("boot").join(format!("vmlinuz-{release}"));
    let image = fs::read(&image).with_context(|| format!("{} cannot be read", image.display()))?;
    fs::write(build::kernel(dir), elf(&image)?)?;

    let modules = work.path().join("lib/modules").join(release);
    // An ext4 that is a module needs three others, and each its own order.
    let more = ["virtio_balloon", "crc16", "mbcache", "jbd2", "crc32c_generic", "libcrc32c", "ext4"];
    let (mut archive, mut order) = (Archive::new(), String::new());
    for name in build::MODULES.into_iter().chain(more) {
        let files = [format!("{name}.ko"), format!("{}.ko", name.replace('_', "-"))];
        // What is no module is built in, or this kernel does not split it off.
        let Some(path) = find(&modules, &files)? else { continue };
        archive.file(&format!("mod/{name}.ko"), &fs::read(path)?, false);
        order += &format!("{name}.ko\n");
    }
    archive.file("mod/order", order.as_bytes(), false);
    let mut initrd = fs::read(build::initrd(built.dir())).context("the guest has no initial file system")?;
    initrd.extend(archive.finish());
    Ok(fs::write(build::initrd(dir), initrd)?)
}

fn find(dir: &Path, names: &[String]) -> Result<Option<PathBuf>> {
    for entry in fs::read_dir(dir)? {
        let entry = entry?;
        if entry.file_type()?.is_dir() {
            if let Some(found) = find(&entry.path(), names)? {
                return Ok(Some(found));
            }
        } else if names.iter().any(|name| entry.file_name() == **name) {
            return Ok(Some(entry.path()));
        }
    }
    Ok(None)
}
