//! QEMU: where it is, and the command line of a guest.

use std::{
    env,
    ffi::OsString,
    fs,
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
};

use anyhow::{Context, Result, bail, ensure};
use serde_json::json;

use crate::{
    build, generic,
    options::{GuestOptions, Version, Vhd},
};

const DEPS: &str = "run scripts/install-qemu";

/// What a machine of the type pc or q35 loads when it starts a kernel by itself.
pub const FIRMWARE: [&str; 3] =
    ["/usr/share/seabios/bios-256k.bin", "/usr/share/qemu/kvmvapic.bin", "/usr/share/qemu/linuxboot_dma.bin"];

/// A program and the arguments that say where its firmware is.
pub(crate) struct Qemu {
    pub(crate) program: PathBuf,
    firmware: Vec<OsString>,
}

/// The program of a version of QEMU on this machine.
///
/// # Errors
/// Which script installs it.
pub fn program(version: Version) -> Result<PathBuf> {
    Qemu::find(version).map(|qemu| qemu.program)
}

/// The first arguments of a command that starts a version of QEMU: the program, and where its firmware is.
///
/// # Errors
/// Which script installs it.
pub fn command(version: Version) -> Result<Vec<OsString>> {
    let qemu = Qemu::find(version)?;
    Ok(std::iter::once(qemu.program.into_os_string()).chain(qemu.firmware).collect())
}

impl Qemu {
    /// The one of a version on this machine.
    pub(crate) fn find(version: Version) -> Result<Self> {
        match version {
            Version::New => {
                let path = env::var_os("PATH").unwrap_or_default();
                let found = env::split_paths(&path)
                    .map(|dir| dir.join("qemu-system-x86_64"))
                    .find(|file| file.is_file());
                let program = found.with_context(|| format!("no qemu-system-x86_64 in PATH: {DEPS}"))?;
                Ok(Self { program, firmware: Vec::new() })
            }
            Version::Old => {
                let root =
                    env::var_os("DOMSNAP_TEST_QEMU").unwrap_or_else(|| "/opt/domsnap-test-qemu".into());
                let root = Path::new(&root).join("7.2");
                let program = root.join("usr/bin/qemu-system-x86_64");
                ensure!(program.is_file(), "{} is missing: {DEPS}", program.display());
                let data = ["usr/share/qemu", "usr/share/seabios"].map(|dir| root.join(dir).into_os_string());
                Ok(Self { program, firmware: data.into_iter().flat_map(|dir| ["-L".into(), dir]).collect() })
            }
        }
    }

    /// Changes when the program does.
    pub(crate) fn identity(&self) -> Result<String> {
        let about = fs::metadata(&self.program)?;
        let (size, seconds, rest) = (about.len(), about.mtime(), about.mtime_nsec());
        Ok(format!("{} {size} {seconds}.{rest}", self.program.display()))
    }

    /// The arguments that boot a guest whose sockets and disks are in `dir`, the program first.
    pub(crate) fn command_line(
        &self,
        options: &GuestOptions,
        built: &Path,
        dir: &str,
    ) -> Result<Vec<OsString>> {
        let GuestOptions { disks, disk_mib, memory_mib, tick_ms, .. } = options;
        ensure!(
            *disks <= GuestOptions::MAX_DISKS,
            "a guest has {} disks at most, not {disks}",
            GuestOptions::MAX_DISKS
        );
        ensure!(
            *disk_mib >= 8,
            "a disk of {disk_mib} MiB is too small for a file system with a journal: 8 at least"
        );
        ensure!(*memory_mib >= 96, "the guest does not start in {memory_mib} MiB: 96 at least");
        if dir.contains(',') || built.to_string_lossy().contains([',', '\'']) {
            bail!("QEMU's options cannot name {dir} or {}: no commas or quotes, please", built.display());
        }

        let mut line = vec![self.program.clone().into_os_string()];
        line.extend(self.firmware.iter().cloned());
        let mut add = |args: &[&str]| line.extend(args.iter().map(OsString::from));
        add(&["-name", &options.name, "-nodefaults", "-no-user-config", "-display", "none"]);
        add(&["-machine", &options.machine, "-accel", "tcg,thread=multi", "-cpu", &options.cpu]);
        add(&["-m", &memory_mib.to_string(), "-smp", &options.cpus.to_string()]);
        let of = if options.generic { generic::place(built) } else { built.to_owned() };
        add(&["-kernel", &build::kernel(&of).to_string_lossy()]);
        add(&["-initrd", &build::initrd(&of).to_string_lossy()]);
        // Where other programs keep QEMU from its processors, the kernel's check of its timer fails, and it
        // waits for ever.
        let kernel = "console=ttyS0 quiet panic=-1 random.trust_cpu=on mitigations=off no_timer_check";
        add(&["-append", &format!("{kernel} domsnap.disks={disks} domsnap.tick={tick_ms}")]);
        add(&["-qmp", &format!("unix:{dir}/qmp,server=on,wait=off")]);
        add(&[
            "-chardev",
            &format!("file,id=console,path={dir}/console,append=on"),
            "-serial",
            "chardev:console",
        ]);
        add(&["-device", "virtio-serial-pci,id=ports"]);
        for (number, id, name) in
            [(1, "agent", "org.qemu.guest_agent.0"), (2, "witness", "domsnap.witness.0")]
        {
            add(&["-chardev", &format!("socket,id={id},path={dir}/{id},server=on,wait=off")]);
            let port =
                format!("virtserialport,bus=ports.0,nr={number},id={id}-port,chardev={id},name={name}");
            add(&["-device", &port]);
        }
        for thread in 0..options.iothreads {
            add(&["-object", &format!("iothread,id=io{thread}")]);
        }
        for (number, (target, format, file)) in options.formats(Path::new(dir)).into_iter().enumerate() {
            let is_device = options.devices.iter().any(|(disk, _)| *disk == number);
            let socket = file.with_extension("sock");
            let file = file.to_string_lossy();
            let thread = match options.iothreads {
                0 => String::new(),
                threads => format!(",iothread=io{}", number % threads),
            };
            if let Some(server) = options.server(number) {
                let address = json!({ "type": "unix", "path": socket });
                let node = json!({
                    "driver": "nbd", "server": address, "reconnect-delay": server.reconnect,
                    "node-name": format!("d{number}"), "discard": "unmap",
                });
                add(&["-blockdev", &node.to_string()]);
                add(&["-device", &format!("virtio-blk-pci,drive=d{number},id={target}{thread}")]);
            } else if options.drive {
                add(&["-drive", &format!("file={file},format={format},if=none,id=drive{number}")]);
                add(&["-device", &format!("virtio-blk-pci,drive=drive{number},id={target}{thread}")]);
            } else {
                let (below, node) = (format!("f{number}"), format!("d{number}"));
                let driver = if is_device { "host_device" } else { "file" };
                let protocol = json!({ "driver": driver, "filename": file, "node-name": below });
                let mut format =
                    json!({ "driver": format, "file": below, "node-name": node, "discard": "unmap" });
                match options.vhd_of(number) {
                    Some(Vhd::Fixed) => {
                        format["driver"] = json!("raw");
                        format["size"] = json!(disk_mib << 20);
                    }
                    Some(Vhd::Dynamic) => format["driver"] = json!("vpc"),
                    None => {}
                }
                add(&["-blockdev", &protocol.to_string(), "-blockdev", &format.to_string()]);
                add(&["-device", &format!("virtio-blk-pci,drive={node},id={target}{thread}")]);
            }
        }
        line.extend(options.more.iter().map(|word| word.replace("DIR", dir).into()));
        Ok(line)
    }
}

/// The names of so many disks.
pub(crate) fn targets(disks: usize) -> impl Iterator<Item = String> {
    ('a'..='z').take(disks).map(|letter| format!("vd{letter}"))
}
