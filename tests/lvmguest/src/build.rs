//! The machine's kernel and its file system, which lies in memory, from Debian packages.

use std::{
    ffi::OsStr,
    fs,
    hash::{DefaultHasher, Hash, Hasher},
    path::{Path, PathBuf},
};

use anyhow::{Context, Result, bail, ensure};
use testguest::parts::{Archive, Built, Root, elf};

const INIT: &str = include_str!("../src-guest/init");

/// Everything here that decides what is built.
const SOURCES: [&str; 2] = [INIT, include_str!("build.rs")];

const KERNEL: &str = "linux-image-cloud-amd64";
const PACKAGES: [&str; 9] = [
    KERNEL,
    "lvm2",
    "thin-provisioning-tools",
    "e2fsprogs",
    "util-linux",
    "udev",
    "libgcc-s1",
    "busybox-static",
    "dash",
];

/// What comes with those and the tests never use.
const NOT_UNPACKED: [&str; 12] = [
    "perl-base",
    "initramfs-tools",
    "initramfs-tools-core",
    "klibc-utils",
    "libklibc",
    "linux-base",
    "debconf",
    "cpio",
    "tar",
    "dpkg",
    "gcc-12-base",
    "logsave",
];
const UNUSED: [&str; 12] = [
    "usr/share",
    "usr/lib/x86_64-linux-gnu/gconv",
    "usr/lib/x86_64-linux-gnu/perl-base",
    "usr/lib/x86_64-linux-gnu/security",
    "usr/lib/udev/hwdb.d",
    "usr/lib/udev/hwdb.bin",
    "usr/lib/systemd/system",
    "usr/lib/systemd/network",
    "usr/lib/modules",
    "usr/include",
    "var/cache",
    "etc/systemd",
];

/// In the order in which they load.
const MODULES: [&str; 22] = [
    "crc32c_generic",
    "libcrc32c",
    "virtio_ring",
    "virtio",
    "virtio_pci_modern_dev",
    "virtio_pci_legacy_dev",
    "virtio_pci",
    "virtio_blk",
    "dax",
    "dm-mod",
    "dm-bufio",
    "dm-snapshot",
    "dm-bio-prison",
    "dm-persistent-data",
    "dm-thin-pool",
    "dm-log",
    "dm-region-hash",
    "dm-mirror",
    "crc16",
    "mbcache",
    "jbd2",
    "ext4",
];

/// The machine that these sources stand for; it is built now if it is missing.
pub(crate) fn get() -> Result<Built> {
    let mut hasher = DefaultHasher::new();
    SOURCES.hash(&mut hasher);
    Built::of("lvm", &format!("{:016x}", hasher.finish()), build)
        .context("the machine with lvm2 cannot be built")
}

/// Its kernel.
pub(crate) fn kernel(dir: &Path) -> PathBuf {
    dir.join("kernel")
}

/// Its file system; the test's own programs are appended.
pub(crate) fn initrd(dir: &Path) -> PathBuf {
    dir.join("initrd")
}

fn build(dir: &Path, packages: &Path) -> Result<()> {
    ensure!(
        std::env::consts::ARCH == "x86_64",
        "the machine with lvm2 is x86-64, and its programs are those that were compiled here, on {}: run these tests on an \
         x86-64 machine",
        std::env::consts::ARCH
    );
    let downloaded = Root::download(&PACKAGES, packages)?;
    let work = tempfile::tempdir_in(dir)?;
    let root = work.path().join("root");
    let skipped = |name: &str| name.starts_with("linux-image-") || NOT_UNPACKED.contains(&name);
    downloaded.unpack_all(skipped, &root)?;
    for unused in UNUSED {
        let path = root.join(unused);
        if path.exists() {
            fs::remove_dir_all(&path).or_else(|_| fs::remove_file(&path))?;
        }
    }

    let is_kernel = |name: &&str| {
        name.strip_prefix("linux-image-").is_some_and(|rest| rest.starts_with(|c: char| c.is_ascii_digit()))
    };
    let package = downloaded.names().find(is_kernel).context("no kernel was downloaded")?;
    let linux = work.path().join("linux");
    downloaded.unpack(package, &linux)?;
    let release = package.trim_start_matches("linux-image-");
    let image = linux.join("boot").join(format!("vmlinuz-{release}"));
    let image = fs::read(&image).with_context(|| format!("{} cannot be read", image.display()))?;
    // Uncompressed it starts faster.
    fs::write(kernel(dir), elf(&image)?)?;

    let mut archive = Archive::new();
    for directory in
        ["dev", "mod", "mnt", "out", "proc", "root", "run", "sys", "t", "tmp", "var", "var/lib", "vm"]
    {
        archive.directory(directory);
    }
    archive.link("var/run", "/run");
    archive.link("var/lock", "/run/lock");
    archive.file("init", INIT.as_bytes(), true);
    let modules = linux.join("lib/modules").join(release);
    let built_in = fs::read_to_string(modules.join("modules.builtin")).unwrap_or_default();
    let mut order = String::new();
    for name in MODULES {
        // Files are named with either mark.
        let files = [format!("{name}.ko"), format!("{}.ko", name.replace('_', "-"))];
        if let Some(path) = find(&modules, &files)? {
            let file = path.file_name().and_then(OsStr::to_str).unwrap_or_default().to_owned();
            archive.file(&format!("mod/{file}"), &fs::read(&path)?, false);
            order += &format!("{file}\n");
        } else if !files.iter().any(|file| built_in.contains(&format!("/{file}"))) {
            bail!(
                "the package {package} has no module {name}, nor is it built in (compressed modules are not known here): \
                 another kernel is needed"
            );
        }
    }
    archive.file("mod/order", order.as_bytes(), false);
    tree(&mut archive, &root, "")?;
    fs::write(initrd(dir), archive.finish())?;
    Ok(())
}

/// Everything in a directory.
fn tree(archive: &mut Archive, dir: &Path, prefix: &str) -> Result<()> {
    let mut entries = fs::read_dir(dir)?.collect::<std::io::Result<Vec<_>>>()?;
    entries.sort_by_key(fs::DirEntry::file_name);
    for entry in entries {
        let name = format!("{prefix}{}", entry.file_name().to_string_lossy());
        let kind = entry.file_type()?;
        if kind.is_symlink() {
            archive.link(&name, &fs::read_link(entry.path())?.to_string_lossy());
        } else if kind.is_dir() {
            archive.directory(&name);
            tree(archive, &entry.path(), &format!("{name}/"))?;
        } else {
            use std::os::unix::fs::PermissionsExt;
            let program = entry.metadata()?.permissions().mode() & 0o100 != 0;
            archive.file(&name, &fs::read(entry.path())?, program);
        }
    }
    Ok(())
}

fn find(dir: &Path, names: &[String]) -> Result<Option<PathBuf>> {
    for entry in fs::read_dir(dir)? {
        let entry = entry?;
        if entry.file_type()?.is_dir() {
            if let Some(found) = find(&entry.path(), names)? {
                return Ok(Some(found));
            }
        } else if names.iter().any(|name| entry.file_name() == name.as_str()) {
            return Ok(Some(entry.path()));
        }
    }
    Ok(None)
}
