//! [`GuestOptions`]: which guest.

use std::{
    fs,
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use anyhow::Result;

use crate::{
    build,
    cache::Built,
    guest::Guest,
    qemu::{FIRMWARE, targets},
    state,
};

/// Which QEMU.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Version {
    /// 10.0, in PATH.
    New,
    /// 7.2, unpacked by `scripts/install-qemu`.
    Old,
}

impl Version {
    /// Both that are supported.
    pub const BOTH: [Self; 2] = [Self::New, Self::Old];
}

/// Which kind of VHD.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Vhd {
    /// A fixed one, which QEMU opens as `raw` with the size of the disk.
    Fixed,
    /// A dynamic one, which QEMU opens by its driver `vpc`.
    Dynamic,
}

/// Which guest; [`GuestOptions::start`] starts it.
#[derive(Debug, Clone)]
pub struct GuestOptions {
    pub(crate) version: Version,
    pub(crate) disks: usize,
    pub(crate) disk_mib: u64,
    pub(crate) memory_mib: u64,
    pub(crate) cpus: u32,
    pub(crate) tick_ms: u64,
    pub(crate) drive: bool,
    pub(crate) iothreads: usize,
    pub(crate) raw: Vec<usize>,
    pub(crate) devices: Vec<(usize, PathBuf)>,
    pub(crate) served: Vec<(usize, Served)>,
    pub(crate) vhds: Vec<(usize, Vhd)>,
    pub(crate) name: String,
    pub(crate) machine: String,
    pub(crate) cpu: String,
    pub(crate) more: Vec<String>,
    pub(crate) files: Vec<(String, Vec<u8>)>,
    pub(crate) boot: bool,
    pub(crate) generic: bool,
    pub(crate) kept: Option<PathBuf>,
    pub(crate) parent: Option<PathBuf>,
    pub(crate) deadline: Duration,
}

/// A disk that another program serves.
#[derive(Clone)]
pub(crate) struct Served {
    pub(crate) reconnect: u32,
    pub(crate) serve: Arc<Serve>,
}

/// Starts the program for an image and a socket.
type Serve = dyn Fn(&Path, &Path) -> Result<()> + Send + Sync;

impl std::fmt::Debug for Served {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Served").field("reconnect", &self.reconnect).finish_non_exhaustive()
    }
}

impl Default for GuestOptions {
    fn default() -> Self {
        Self {
            version: Version::New,
            disks: 2,
            disk_mib: 64,
            memory_mib: 128,
            cpus: 1,
            tick_ms: 50,
            drive: false,
            iothreads: 0,
            raw: Vec::new(),
            devices: Vec::new(),
            served: Vec::new(),
            vhds: Vec::new(),
            name: "guest".into(),
            machine: "q35".into(),
            cpu: "max".into(),
            more: Vec::new(),
            files: Vec::new(),
            boot: false,
            generic: false,
            kept: None,
            parent: None,
            deadline: Duration::from_secs(180),
        }
    }
}

impl GuestOptions {
    /// The most disks that a guest can have.
    pub const MAX_DISKS: usize = 8;

    /// Where the memory and the disks are in a guest's luggage.
    const KEPT: &'static str = "kept";

    /// Two disks of 64 MiB, 128 MiB of memory, QEMU 10.0, `-blockdev`.
    pub fn new() -> Self {
        Self::default()
    }

    /// Another QEMU than 10.0.
    pub fn version(mut self, version: Version) -> Self {
        self.version = version;
        self
    }

    /// How many disks, at most [`GuestOptions::MAX_DISKS`]. They are `vda`, `vdb` and so on.
    pub fn disks(mut self, disks: usize) -> Self {
        self.disks = disks;
        self
    }

    /// The virtual size of each disk, in MiB; at least 8.
    pub fn disk_mib(mut self, mib: u64) -> Self {
        self.disk_mib = mib;
        self
    }

    /// The guest's memory, in MiB; at least 96.
    pub fn memory_mib(mut self, mib: u64) -> Self {
        self.memory_mib = mib;
        self
    }

    /// How many processors. 1.
    pub fn cpus(mut self, cpus: u32) -> Self {
        self.cpus = cpus;
        self
    }

    /// How long the guest rests between two ticks, in milliseconds. 50: each tick takes 5 ms of a processor
    /// here, and a run of the suites has three guests alive at most times.
    pub fn tick_ms(mut self, ms: u64) -> Self {
        self.tick_ms = ms;
        self
    }

    /// Disks by `-drive` (ids `drive0`, `drive1`, ..., nodes without a name) and not by `-blockdev` (nodes
    /// `d0`, `d1`, ... over `f0`, `f1`, ...).
    pub fn drive(mut self) -> Self {
        self.drive = true;
        self
    }

    /// So many I/O threads, which serve the disks in turns. None: QEMU's main loop serves them.
    pub fn iothreads(mut self, threads: usize) -> Self {
        self.iothreads = threads;
        self
    }

    /// Makes these disks, by their numbers from 0, raw files and not qcow2: `DIR/vdb.raw`.
    pub fn raw(mut self, disks: &[usize]) -> Self {
        self.raw.extend(disks);
        self
    }

    /// Makes a disk, by its number from 0, this block device, which is there; what it holds is lost.
    pub fn device(mut self, disk: usize, path: impl Into<PathBuf>) -> Self {
        self.devices.push((disk, path.into()));
        self
    }

    /// Makes a disk, by its number from 0, one that another program serves to QEMU over NBD: its image is the
    /// dynamic VHD `DIR/vdb.vhd`, and `serve` starts the program for an image and a socket, `DIR/vdb.sock`,
    /// before QEMU starts. QEMU waits `reconnect` seconds for a server that is gone.
    pub fn served(
        mut self,
        disk: usize,
        reconnect: u32,
        serve: impl Fn(&Path, &Path) -> Result<()> + Send + Sync + 'static,
    ) -> Self {
        self.served.push((disk, Served { reconnect, serve: Arc::new(serve) }));
        self
    }

    /// Makes a disk, by its number from 0, a VHD that QEMU opens by itself: `DIR/vdb.vhd`. With a dynamic one
    /// QEMU saves no memory, so the guest is booted.
    pub fn vhd(mut self, disk: usize, kind: Vhd) -> Self {
        self.vhds.push((disk, kind));
        self.boot |= kind == Vhd::Dynamic;
        self
    }

    /// QEMU's `-name`. "guest".
    pub fn name(mut self, name: &str) -> Self {
        self.name = name.to_owned();
        self
    }

    /// QEMU's `-machine`. "q35".
    pub fn machine(mut self, machine: &str) -> Self {
        self.machine = machine.to_owned();
        self
    }

    /// QEMU's `-cpu`. "max".
    pub fn cpu(mut self, cpu: &str) -> Self {
        self.cpu = cpu.to_owned();
        self
    }

    /// More arguments of QEMU's command line. `DIR` in them stands for [`Guest::dir`]. A word that differs
    /// from run to run makes each run keep a memory of its own: give QEMU what it needs by
    /// [`GuestOptions::file`], or start by [`GuestOptions::from_boot`].
    pub fn more<S: AsRef<str>>(mut self, args: &[S]) -> Self {
        self.more.extend(args.iter().map(|word| word.as_ref().to_owned()));
        self
    }

    /// Puts a file into [`Guest::dir`] before QEMU starts, for [`GuestOptions::more`] to name: a cdrom's
    /// image, a second kind of disk. A guest that is restored has it as it was given, so the guest should not
    /// write it before it is ready.
    pub fn file(mut self, name: &str, content: impl Into<Vec<u8>>) -> Self {
        self.files.push((name.to_owned(), content.into()));
        self
    }

    /// Boots it, and does not start it from memory that was kept: for machines whose memory cannot be kept,
    /// and for tests of what a boot itself does. It takes seconds.
    pub fn from_boot(mut self) -> Self {
        self.boot = true;
        self
    }

    /// Runs Debian's generic kernel, which has drivers that the cloud kernel lacks: of the generation ID
    /// (`-device vmgenid`), of balloons. It needs 192 MiB of memory.
    pub fn generic_kernel(mut self) -> Self {
        self.generic = true;
        self.memory_mib = self.memory_mib.max(192);
        self
    }

    /// Makes the guest's directory inside this one, not in that for temporary files.
    pub fn inside(mut self, parent: impl Into<PathBuf>) -> Self {
        self.parent = Some(parent.into());
        self
    }

    /// Within which the guest must be ready, and answer each command. 180 s, because machines that run tests
    /// are slow.
    pub fn deadline(mut self, deadline: Duration) -> Self {
        self.deadline = deadline;
        self
    }

    /// Its disks: target, format, and path where its directory is this.
    pub(crate) fn formats(&self, dir: &Path) -> Vec<(String, &'static str, PathBuf)> {
        let disk = |(number, target): (usize, String)| {
            let format = match () {
                () if self.server(number).is_some() || self.vhd_of(number).is_some() => "vhd",
                () if self.raw.contains(&number) => "raw",
                () => "qcow2",
            };
            match self.devices.iter().find(|(disk, _)| *disk == number) {
                Some((_, device)) => (target, "raw", device.clone()),
                None => {
                    let file = dir.join(format!("{target}.{format}"));
                    (target, format, file)
                }
            }
        };
        targets(self.disks).enumerate().map(disk).collect()
    }

    /// Starts it from memory and disks that another machine kept: its [`GuestOptions::luggage`] is here, in
    /// this directory.
    pub fn kept(mut self, place: &Path) -> Self {
        self.kept = Some(place.join(Self::KEPT));
        self
    }

    /// What another machine needs so that this guest starts there from memory that is kept here: files, and
    /// where each belongs. Those with relative places belong below the directory that `DOMSNAP_TEST_GUEST`
    /// names there, where [`GuestOptions::kept`] looks; QEMU itself, 10.0, is wanted in PATH.
    ///
    /// # Errors
    /// What is missing on this machine and which script installs it.
    pub fn luggage(&self) -> Result<Vec<(PathBuf, PathBuf)>> {
        let built = Built::get()?;
        let state = state::get(&self.of_files(), &built)?;
        let mut files: Vec<(PathBuf, PathBuf)> = FIRMWARE.map(|file| (file.into(), file.into())).into();
        let place = Path::new(built.dir().file_name().unwrap_or_default());
        files.push((build::kernel(built.dir()), build::kernel(place)));
        files.push((build::initrd(built.dir()), build::initrd(place)));
        for entry in fs::read_dir(state)? {
            let entry = entry?;
            files.push((entry.path(), Path::new(Self::KEPT).join(entry.file_name())));
        }
        Ok(files)
    }

    /// The same guest, with raw files in the place of devices, VHDs and disks that are served.
    pub(crate) fn of_files(&self) -> Self {
        let others = self.devices.iter().map(|(disk, _)| *disk);
        let others = others.chain(self.served.iter().map(|(disk, _)| *disk));
        let others = others.chain(self.vhds.iter().map(|(disk, _)| *disk));
        Self {
            raw: self.raw.iter().copied().chain(others).collect(),
            devices: Vec::new(),
            served: Vec::new(),
            vhds: Vec::new(),
            ..self.clone()
        }
    }

    /// The program that serves a disk.
    pub(crate) fn server(&self, number: usize) -> Option<&Served> {
        self.served.iter().find(|(disk, _)| *disk == number).map(|(_, served)| served)
    }

    /// The kind of VHD that QEMU opens as the disk.
    pub(crate) fn vhd_of(&self, number: usize) -> Option<Vhd> {
        self.vhds.iter().find(|(disk, _)| *disk == number).map(|(_, kind)| *kind)
    }

    /// Starts it; it is ready, and has ticked, when this returns.
    ///
    /// # Errors
    /// What is missing on this machine and which script installs it; or what QEMU and the guest's console
    /// said.
    pub fn start(self) -> Result<Guest> {
        Guest::start(self)
    }
}
