//! The guest's kernel and its initial file system, from Debian packages and `src-guest`.
//!
//! `packages` gets and unpacks Debian packages, `kernel` takes a kernel out of its compression, `initramfs` writes an archive,
//! `root` makes a whole file system of packages.

mod initramfs;
mod kernel;
mod packages;
mod root;

use std::{
    fs,
    hash::{DefaultHasher, Hash, Hasher},
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context, Result, bail};

use self::packages::Packages;
pub use self::{
    initramfs::Archive,
    kernel::{elf, uncompressed},
    root::Root,
};
use crate::process::run;

/// Everything here that decides what is built. The packages are those that the machine has got once.
const SOURCES: [&str; 7] = [
    WITNESS,
    INIT,
    SHUTDOWN,
    include_str!("mod.rs"),
    include_str!("initramfs.rs"),
    include_str!("kernel.rs"),
    include_str!("packages.rs"),
];
/// The source of the consistency program.
pub const WITNESS: &str = include_str!("../../src-guest/witness.c");
const INIT: &str = include_str!("../../src-guest/init");
const SHUTDOWN: &str = include_str!("../../src-guest/shutdown");

/// In the order in which they load.
pub(crate) const MODULES: [&str; 7] = [
    "virtio_ring",
    "virtio",
    "virtio_pci_modern_dev",
    "virtio_pci_legacy_dev",
    "virtio_pci",
    "virtio_blk",
    "virtio_console",
];

const DEPS: &str = "run scripts/install-deps";

/// Changes when what would be built changes.
pub(crate) fn key() -> String {
    let mut hasher = DefaultHasher::new();
    SOURCES.hash(&mut hasher);
    format!("{:016x}", hasher.finish())
}

/// The files of a guest that was built in `dir`.
pub(crate) fn kernel(dir: &Path) -> PathBuf {
    dir.join("kernel")
}

/// The other one.
pub(crate) fn initrd(dir: &Path) -> PathBuf {
    dir.join("initrd")
}

/// Builds the guest into `dir`, which is empty; packages are kept in another directory.
pub(crate) fn build(dir: &Path, packages: &Path) -> Result<()> {
    if std::env::consts::ARCH != "x86_64" {
        bail!(
            "the test guest is an x86-64 Linux, and its program is compiled here, on {}, which would need a cross compiler: \
             run the live tests on an x86-64 machine",
            std::env::consts::ARCH
        );
    }
    let packages = Packages::open(packages)?;
    let work = tempfile::tempdir_in(dir)?;

    let kernel_package = packages.kernel()?;
    let linux = packages.unpack(&kernel_package, work.path())?;
    let busybox = packages.unpack("busybox-static", work.path())?.join("bin/busybox");
    let agent = packages.unpack("qemu-guest-agent", work.path())?.join("usr/sbin/qemu-ga");

    let release = fs::read_dir(linux.join("lib/modules"))
        .and_then(|mut entries| entries.next().transpose())
        .ok()
        .flatten()
        .with_context(|| format!("the package {kernel_package} has no modules"))?
        .file_name();
    let release = release.to_string_lossy().into_owned();
    let image = linux.join("boot").join(format!("vmlinuz-{release}"));
    let image = fs::read(&image).with_context(|| format!("{} cannot be read", image.display()))?;
    // Uncompressed it starts faster; in a compression that is not known here it starts all the same.
    fs::write(kernel(dir), kernel::uncompressed(&image).unwrap_or(image))?;

    let witness = compile(work.path())?;
    let mut archive = Archive::new();
    for directory in ["bin", "sbin", "dev", "etc", "mod", "proc", "run", "sys", "tmp", "var"] {
        archive.directory(directory);
    }
    archive.link("var/run", "/run");
    archive.file("init", INIT.as_bytes(), true);
    archive.file("sbin/shutdown", SHUTDOWN.as_bytes(), true);
    archive.file("bin/witness", &fs::read(witness)?, true);
    archive.file("bin/busybox", &fs::read(&busybox)?, true);
    for applet in run(Command::new(&busybox).arg("--list"), "it is a static x86-64 program")?.lines() {
        // busybox that links to itself would be no program at all.
        if applet != "busybox" {
            archive.link(&format!("bin/{applet}"), "/bin/busybox");
        }
    }
    // The guest agent calls it by this path when it sets the clock.
    archive.link("sbin/hwclock", "/bin/busybox");
    archive.file("bin/qemu-ga", &fs::read(&agent)?, true);
    for library in libraries(&agent)? {
        let bytes = fs::read(&library).with_context(|| format!("{} cannot be read", library.display()))?;
        archive.file(library.to_string_lossy().trim_start_matches('/'), &bytes, true);
    }

    let modules = linux.join("lib/modules").join(&release);
    let built_in = fs::read_to_string(modules.join("modules.builtin")).unwrap_or_default();
    let mut order = String::new();
    for name in MODULES {
        let file = format!("{name}.ko");
        match find(&modules, &file)? {
            Some(path) => {
                archive.file(&format!("mod/{file}"), &fs::read(path)?, false);
                order += &format!("{file}\n");
            }
            None if built_in.contains(&format!("/{file}")) => {}
            // An older kernel has some of them in others.
            None if matches!(name, "virtio_pci_modern_dev" | "virtio_pci_legacy_dev") => {}
            None => bail!(
                "the package {kernel_package} has no module {file}, nor is it built in (compressed modules are not known \
                 here): another kernel is needed"
            ),
        }
    }
    archive.file("mod/order", order.as_bytes(), false);
    fs::write(initrd(dir), archive.finish())?;
    Ok(())
}

/// Compiles the consistency program in a directory, static: the guest has no C library of its own that would fit.
///
/// # Errors
/// A compiler or the static C library is missing.
pub fn compile(work: &Path) -> Result<PathBuf> {
    let (source, program) = (work.join("witness.c"), work.join("witness"));
    fs::write(&source, WITNESS)?;
    let mut compiler = Command::new("cc");
    compiler.args(["-O2", "-static", "-pthread", "-s", "-o"]).arg(&program).arg(&source);
    run(&mut compiler, &format!("a C compiler and the static C library are needed: {DEPS}"))?;
    Ok(program)
}

/// The libraries that a program of this machine's kind is linked with, by their paths here.
fn libraries(program: &Path) -> Result<Vec<PathBuf>> {
    let listed = run(Command::new("ldd").arg(program), "it is part of libc-bin")?;
    let mut found = Vec::new();
    for line in listed.lines() {
        if line.contains("not found") {
            bail!(
                "the guest agent wants a library that is not here ({}): run scripts/install-qemu",
                line.trim()
            );
        }
        if let Some(path) = line.split_whitespace().find(|word| word.starts_with('/')) {
            found.push(PathBuf::from(path));
        }
    }
    Ok(found)
}

fn find(dir: &Path, name: &str) -> Result<Option<PathBuf>> {
    for entry in fs::read_dir(dir)? {
        let entry = entry?;
        if entry.file_type()?.is_dir() {
            if let Some(found) = find(&entry.path(), name)? {
                return Ok(Some(found));
            }
        } else if entry.file_name() == name {
            return Ok(Some(entry.path()));
        }
    }
    Ok(None)
}
