//! Xen, dom0 and the guest's kernel and initial file system, of Debian packages and `src-guest`.

use std::{
    fs,
    hash::{DefaultHasher, Hash, Hasher},
    os::unix::fs::{PermissionsExt, symlink},
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context, Result, bail, ensure};
use testguest::parts::{self, Archive, Built, Root, run};

const BOOT_INIT: &str = include_str!("../../src-guest/boot-init");
const DOM0_INIT: &str = include_str!("../../src-guest/dom0-init");
const AGENT: &str = include_str!("../../src-guest/dom0-agent");
const DOMU_INIT: &str = include_str!("../../src-guest/domu-init");

/// Everything here that decides what is built.
const SOURCES: [&str; 6] = [parts::WITNESS, BOOT_INIT, DOM0_INIT, AGENT, DOMU_INIT, include_str!("mod.rs")];

const XEN: &str = "xen-hypervisor-4.17-amd64";
/// dom0 needs drivers that the cloud kernel has not.
const KERNEL: &str = "linux-image-amd64";
const GUEST_KERNEL: &str = "linux-image-cloud-amd64";

const PACKAGES: [&str; 28] = [
    KERNEL,
    GUEST_KERNEL,
    XEN,
    "xen-utils-4.17",
    "xen-utils-common",
    "xenstore-utils",
    "qemu-system-xen",
    // qemu-storage-daemon, which makes a file of a served disk.
    "qemu-system-common",
    "qemu-utils",
    "lvm2",
    "thin-provisioning-tools",
    "e2fsprogs",
    "udev",
    "util-linux",
    "mount",
    "kmod",
    "bash",
    "dash",
    "coreutils",
    "grep",
    "sed",
    "hostname",
    "procps",
    "iproute2",
    "libgcc-s1",
    "bsdutils",
    "diffutils",
    "busybox-static",
];

/// What the tests never use, and what is large.
const UNUSED: [&str; 20] = [
    "usr/share/doc",
    "usr/share/man",
    "usr/share/locale",
    "usr/share/zoneinfo",
    "usr/share/bash-completion",
    "usr/share/i18n",
    "usr/share/info",
    "usr/share/lintian",
    "usr/share/icons",
    "usr/share/iso-codes",
    "usr/share/xml",
    "usr/share/perl",
    "usr/share/common-licenses",
    "usr/lib/x86_64-linux-gnu/gconv",
    "usr/lib/x86_64-linux-gnu/perl",
    "usr/lib/x86_64-linux-gnu/gstreamer-1.0",
    "usr/lib/udev/hwdb.d",
    "usr/lib/udev/hwdb.bin",
    "usr/lib/python3",
    "var/cache",
];

/// Drivers of dom0's kernel that QEMU has no devices for.
const NO_DRIVERS: [&str; 17] = [
    "drivers/gpu",
    "drivers/media",
    "drivers/net",
    "drivers/infiniband",
    "drivers/staging",
    "drivers/iio",
    "drivers/input",
    "drivers/hwmon",
    "drivers/usb",
    "drivers/scsi",
    "drivers/isdn",
    "drivers/video",
    "sound",
    "net/wireless",
    "net/mac80211",
    "net/bluetooth",
    "arch/x86/kvm",
];

const DEPS: &str = "run scripts/install-deps";

/// The machine that these sources stand for; it is built now if it is missing.
pub(crate) fn get() -> Result<Built> {
    let mut hasher = DefaultHasher::new();
    SOURCES.hash(&mut hasher);
    Built::of("xen", &format!("{:016x}", hasher.finish()), build)
        .context("the machine with Xen cannot be built")
}

/// Xen itself.
pub(crate) fn xen(dir: &Path) -> PathBuf {
    dir.join("xen")
}

/// dom0's kernel.
pub(crate) fn kernel(dir: &Path) -> PathBuf {
    dir.join("dom0-kernel")
}

/// The file system in which dom0 begins.
pub(crate) fn initrd(dir: &Path) -> PathBuf {
    dir.join("dom0-initrd")
}

/// dom0's root file system, in a raw image that is never written.
pub(crate) fn root(dir: &Path) -> PathBuf {
    dir.join("root.ext4")
}

fn build(dir: &Path, packages: &Path) -> Result<()> {
    ensure!(
        std::env::consts::ARCH == "x86_64",
        "the machine with Xen is x86-64, and its programs are those that were compiled here, on {}: run these tests on an \
         x86-64 machine",
        std::env::consts::ARCH
    );
    let downloaded = Root::download(&PACKAGES, packages)?;
    let work = tempfile::tempdir_in(dir)?;
    let root_dir = work.path().join("root");
    let is_kernel = |name: &str| name.starts_with("linux-image-") || name == XEN;
    downloaded.unpack_all(is_kernel, &root_dir)?;
    trim(&root_dir)?;
    let busybox =
        fs::read(root_dir.join("bin/busybox")).context("the package busybox-static has no bin/busybox")?;

    // Xen, and the two kernels: uncompressed, because what QEMU runs without KVM takes its time.
    let unpacked = work.path().join("hypervisor");
    downloaded.unpack(XEN, &unpacked)?;
    let compressed = the_file(&unpacked.join("boot"), "xen-4.17-amd64.gz")?;
    run(Command::new("gzip").arg("-d").arg(&compressed), DEPS)?;
    fs::rename(compressed.with_extension(""), xen(dir))?;
    let linux = Linux::unpack(&downloaded, false, work.path())?;
    fs::write(kernel(dir), linux.elf()?)?;
    let cloud = Linux::unpack(&downloaded, true, work.path())?;

    // dom0.
    let modules = root_dir.join("lib/modules").join(&linux.release);
    fs::create_dir_all(root_dir.join("lib/modules"))?;
    fs::rename(linux.modules(), &modules)?;
    for unused in NO_DRIVERS {
        remove(&modules.join("kernel").join(unused))?;
    }
    run(
        Command::new("depmod").arg("-b").arg(&root_dir).arg(&linux.release),
        &format!("it is part of kmod: {DEPS}"),
    )?;
    let mut archive = Archive::new();
    for directory in ["proc", "sys", "dev", "mnt"] {
        archive.directory(directory);
    }
    archive.file("init", BOOT_INIT.as_bytes(), true);
    archive.file("bin/busybox", &busybox, true);
    archive.link("bin/sh", "/bin/busybox");
    let mut order = Vec::new();
    let dependencies = fs::read_to_string(modules.join("modules.dep"))?;
    for module in ["virtio_pci", "virtio_blk", "crc32c_generic", "ext4"] {
        needed(&dependencies, module, &mut order)?;
    }
    let mut names = String::new();
    for path in order {
        let name = path.rsplit('/').next().unwrap_or_default();
        archive.file(&format!("mod/{name}"), &fs::read(modules.join(path))?, false);
        names += &format!("{name}\n");
    }
    archive.file("mod/order", names.as_bytes(), false);
    fs::write(initrd(dir), archive.finish())?;

    // The guest.
    fs::create_dir_all(root_dir.join("guest"))?;
    fs::write(root_dir.join("guest/kernel"), cloud.elf()?)?;
    fs::write(root_dir.join("guest/initrd"), guest_initrd(&cloud, &busybox, work.path())?)?;

    write_program(&root_dir.join("init"), DOM0_INIT)?;
    write_program(&root_dir.join("agent"), AGENT)?;
    image(&root_dir, &root(dir))
}

/// The initial file system of a guest of Xen.
fn guest_initrd(linux: &Linux, busybox: &[u8], work: &Path) -> Result<Vec<u8>> {
    let mut archive = Archive::new();
    for directory in ["bin", "sbin", "dev", "mod", "proc", "run", "sys", "tmp"] {
        archive.directory(directory);
    }
    archive.file("init", DOMU_INIT.as_bytes(), true);
    archive.file("bin/busybox", busybox, true);
    let program = work.join("busybox");
    fs::write(&program, busybox)?;
    fs::set_permissions(&program, fs::Permissions::from_mode(0o755))?;
    for applet in run(Command::new(&program).arg("--list"), "it is a static x86-64 program")?.lines() {
        // busybox that links to itself would be no program at all.
        if applet != "busybox" {
            archive.link(&format!("bin/{applet}"), "/bin/busybox");
        }
    }
    archive.file("bin/witness", &fs::read(parts::compile(work)?)?, true);
    let module = the_file(&linux.modules(), "xen-blkfront.ko")?;
    archive.file("mod/xen-blkfront.ko", &fs::read(module)?, false);
    Ok(archive.finish())
}

/// A kernel that was unpacked.
struct Linux {
    tree: PathBuf,
    release: String,
}

impl Linux {
    fn unpack(from: &Root, cloud: bool, work: &Path) -> Result<Self> {
        let is_it = |name: &&str| {
            name.strip_prefix("linux-image-").is_some_and(|release| {
                release.starts_with(|first: char| first.is_ascii_digit())
                    && release.contains("-cloud-") == cloud
            })
        };
        let package = from.names().find(is_it).context("no kernel was downloaded")?;
        let tree = work.join(package);
        from.unpack(package, &tree)?;
        let release = package.trim_start_matches("linux-image-").to_owned();
        Ok(Self { tree, release })
    }

    fn modules(&self) -> PathBuf {
        self.tree.join("lib/modules").join(&self.release)
    }

    fn elf(&self) -> Result<Vec<u8>> {
        let image = self.tree.join("boot").join(format!("vmlinuz-{}", self.release));
        let image = fs::read(&image).with_context(|| format!("{} cannot be read", image.display()))?;
        parts::elf(&image)
    }
}

/// What `modules.dep` says must be loaded for a module, before it and with it.
fn needed<'a>(dependencies: &'a str, module: &str, order: &mut Vec<&'a str>) -> Result<()> {
    let end = format!("/{module}.ko:");
    let Some(line) = dependencies.lines().find(|line| line.contains(&end)) else {
        bail!(
            "dom0's kernel has no module {module} (compressed modules are not known here): another one is needed"
        );
    };
    let (itself, before) = line.split_once(':').unwrap_or((line, ""));
    // Each comes before what it needs.
    for path in before.split_whitespace().rev().chain([itself]) {
        if !order.contains(&path) {
            order.push(path);
        }
    }
    Ok(())
}

/// Makes the tree smaller, and gives it what packages leave to scripts.
fn trim(root: &Path) -> Result<()> {
    for unused in UNUSED {
        remove(&root.join(unused))?;
    }
    for directory in [
        "proc",
        "sys",
        "dev",
        "run",
        "tmp",
        "root",
        "mnt",
        "host",
        "vm",
        "var/lib/xen",
        "var/log/xen/console",
        "var/cache",
        "usr/local/bin",
    ] {
        fs::create_dir_all(root.join(directory))?;
    }
    for (link, to) in [("var/run", "/run"), ("var/lock", "/run/lock")] {
        remove(&root.join(link))?;
        symlink(to, root.join(link))?;
    }
    // Names that alternatives stand behind.
    for name in ["awk", "vi", "less", "sh"] {
        let path = root.join("bin").join(name);
        if !path.exists() {
            remove(&path)?;
            symlink("/bin/busybox", path)?;
        }
    }
    Ok(())
}

fn remove(path: &Path) -> Result<()> {
    let gone = match fs::symlink_metadata(path) {
        Ok(about) if about.is_dir() => fs::remove_dir_all(path),
        Ok(_) => fs::remove_file(path),
        Err(_) => Ok(()),
    };
    gone.with_context(|| format!("{} cannot be removed", path.display()))
}

fn write_program(path: &Path, text: &str) -> Result<()> {
    fs::write(path, text)?;
    Ok(fs::set_permissions(path, fs::Permissions::from_mode(0o755))?)
}

/// The file of that name, wherever it is below a directory.
fn the_file(dir: &Path, name: &str) -> Result<PathBuf> {
    let mut below = vec![dir.to_owned()];
    while let Some(dir) = below.pop() {
        for entry in fs::read_dir(&dir)? {
            let entry = entry?;
            if entry.file_type()?.is_dir() {
                below.push(entry.path());
            } else if entry.file_name() == name {
                return Ok(entry.path());
            }
        }
    }
    bail!("there is no {name} below {}", dir.display())
}

/// An ext4 image of a tree. It is sparse: what tests write goes elsewhere.
fn image(tree: &Path, image: &Path) -> Result<()> {
    fs::File::create(image)?.set_len(6 << 30)?;
    let mut mkfs = Command::new("mke2fs");
    mkfs.args(["-q", "-t", "ext4", "-O", "^has_journal", "-E", "lazy_itable_init=1,root_owner=0:0", "-d"]);
    run(mkfs.arg(tree).arg(image), &format!("it is part of e2fsprogs: {DEPS}"))?;
    Ok(())
}
