//! [`DomU`]: a guest of Xen whose program compares its memory with every disk at each tick.

use std::{
    fs,
    path::{Path, PathBuf},
    time::Duration,
};

use anyhow::{Context, Result, bail, ensure};
use serde_json::Value;

use super::{
    console::Console,
    program::{program, xl},
};

/// Within which a guest must boot, tick, answer.
const DEADLINE: Duration = Duration::from_secs(300);

const MEMORY_MIB: u32 = 96;

/// What a disk is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Backend {
    /// A qcow2 image, which QEMU serves.
    Qcow2,
    /// A raw file, which QEMU serves.
    RawQdisk,
    /// A raw file over a loop device, which dom0's kernel serves: what xl does with a raw file unless it is
    /// asked otherwise.
    RawLoop,
    /// A logical volume, which dom0's kernel serves.
    Lvm,
    /// One that a thin pool gives its room.
    LvmThin,
}

/// A guest of Xen. It is destroyed, and its files are removed, when this is dropped.
pub struct DomU {
    name: String,
    dir: PathBuf,
    disks: Vec<(Backend, PathBuf)>,
    console: Console,
    /// Where in the log the latest check begins.
    judged: u64,
}

impl DomU {
    /// Creates one, and waits until it ticks.
    ///
    /// # Errors
    /// What xl said, or what the guest said last.
    pub fn start(name: &str, disks: &[Backend]) -> Result<Self> {
        let mut guest = Self::defined(name, disks)?;
        guest.create()?;
        Ok(guest)
    }

    /// Makes its disks and its config, and does not start it.
    ///
    /// # Errors
    /// Its files cannot be made.
    pub fn defined(name: &str, backends: &[Backend]) -> Result<Self> {
        let dir = PathBuf::from("/vm").join(name);
        if program("/usr/sbin/xl", &["domid", name])?.status == 0 {
            // What a case that was killed left.
            xl(&["destroy", name])?;
        }
        if dir.exists() {
            fs::remove_dir_all(&dir)?;
        }
        fs::create_dir_all(&dir)?;
        let mut disks = Vec::new();
        for (backend, letter) in backends.iter().zip('a'..) {
            disks.push((*backend, make_disk(*backend, &dir, name, letter)?));
        }
        let console = Console::new(name);
        let judged = console.place();
        let guest = Self { name: name.to_owned(), dir, disks, console, judged };
        fs::write(guest.config(), guest.config_text())?;
        Ok(guest)
    }

    fn config_text(&self) -> String {
        let disks: Vec<String> = self
            .disks
            .iter()
            .zip('a'..)
            .map(|((backend, path), letter)| {
                let what = match backend {
                    Backend::Qcow2 => "format=qcow2",
                    Backend::RawQdisk => "format=raw,backendtype=qdisk",
                    Backend::RawLoop => "format=raw",
                    Backend::Lvm | Backend::LvmThin => "format=raw,backendtype=phy",
                };
                format!("\"{what},vdev=xvd{letter},access=rw,target={}\"", path.display())
            })
            .collect();
        format!(
            "name=\"{}\"\ntype=\"pv\"\nmemory={MEMORY_MIB}\nvcpus=1\nkernel=\"/guest/kernel\"\nramdisk=\"/guest/initrd\"\n\
             extra=\"console=hvc0 quiet panic=-1 mitigations=off random.trust_cpu=on init_on_alloc=0 \
             domsnap.disks={} domsnap.tick=500\"\n\
             disk=[ {} ]\non_reboot=\"restart\"\non_crash=\"preserve\"\n",
            self.name,
            self.disks.len(),
            disks.join(", ")
        )
    }

    /// `xl create`s it from its config, and waits until it ticks.
    ///
    /// # Errors
    /// As [`DomU::start`].
    pub fn create(&mut self) -> Result<()> {
        let from = self.console.place();
        let config = self.config();
        xl(&["create", "-q", &config.to_string_lossy()])?;
        self.await_boot(from)
    }

    fn await_boot(&self, from: u64) -> Result<()> {
        self.console.wait(from, DEADLINE, "the guest's boot", |text| {
            let ready = text.find("READY ")?;
            text[ready..].lines().any(|line| line.starts_with("T ")).then_some(())
        })
    }

    /// Waits for a boot that was or will be after a place of [`DomU::place`].
    ///
    /// # Errors
    /// There is none within the deadline.
    pub fn await_boot_since(&self, place: u64) -> Result<()> {
        self.await_boot(place)
    }

    /// How far the guest's console has come.
    pub fn place(&self) -> u64 {
        self.console.place()
    }

    /// Its name.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The directory of its files.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// Its config file.
    pub fn config(&self) -> PathBuf {
        self.dir.join("config")
    }

    /// How many disks it has.
    pub fn disks(&self) -> usize {
        self.disks.len()
    }

    /// What its config names as a disk, from 0.
    pub fn disk(&self, number: usize) -> &Path {
        &self.disks[number].1
    }

    /// Its number with Xen now; none where it does not run.
    ///
    /// # Errors
    /// xl cannot be started.
    pub fn domid(&self) -> Result<Option<u32>> {
        let said = program("/usr/sbin/xl", &["domid", &self.name])?;
        Ok((said.status == 0).then(|| said.out.trim().parse()).transpose()?)
    }

    /// What `xl list -l` reports of it.
    ///
    /// # Errors
    /// It does not run.
    pub fn described(&self) -> Result<Value> {
        let text = xl(&["list", "-l", &self.name])?;
        let all: Value = serde_json::from_str(&text)?;
        all.get(0).cloned().context("xl list -l gave nothing")
    }

    /// Whether xl shows it paused.
    ///
    /// # Errors
    /// It does not run.
    pub fn is_paused(&self) -> Result<bool> {
        let line = xl(&["list", &self.name])?;
        let state = line.lines().last().and_then(|line| line.split_whitespace().nth(4).map(str::to_owned));
        Ok(state.context("xl list gave no state")?.contains('p'))
    }

    /// Gives the guest's program a command, and returns its answer without the "ok".
    ///
    /// # Errors
    /// What it answered instead, or it did not.
    pub fn ask(&mut self, command: &str) -> Result<String> {
        self.console.ask(command, DEADLINE)
    }

    /// The counter, by the guest's own answer.
    ///
    /// # Errors
    /// As [`DomU::ask`].
    pub fn ticks(&mut self) -> Result<u64> {
        let answer = self.ask("status")?;
        let ticks = answer.split(' ').find_map(|word| word.strip_prefix("ticks="));
        ticks.with_context(|| format!("no ticks in {answer:?}"))?.parse().context("the ticks are no number")
    }

    /// The counter when it was last heard of, whether the guest runs or not.
    pub fn last_tick(&self) -> Option<u64> {
        self.console.text().lines().rev().find_map(|line| line.strip_prefix("T ")?.parse().ok())
    }

    /// The first counter that was heard after a place.
    ///
    /// # Errors
    /// None is within the deadline.
    pub fn first_tick_since(&self, place: u64) -> Result<u64> {
        self.console.wait(place, DEADLINE, "a tick", |text| {
            let (whole, _) = text.rsplit_once('\n')?;
            whole.lines().find_map(|line| line.strip_prefix("T ")?.parse().ok())
        })
    }

    /// Waits for something in what is said since a place.
    ///
    /// # Errors
    /// It is not within the deadline.
    pub fn wait_for<T>(&self, place: u64, what: &str, found: impl Fn(&str) -> Option<T>) -> Result<T> {
        self.console.wait(place, DEADLINE, what, |text| {
            let (whole, _) = text.rsplit_once('\n')?;
            found(whole)
        })
    }

    /// Stops ticking, between two ticks; gives the counter.
    ///
    /// # Errors
    /// As [`DomU::ask`].
    pub fn hold(&mut self) -> Result<u64> {
        let answer = self.ask("hold")?;
        answer
            .strip_prefix("ticks=")
            .context("no ticks in the answer")?
            .parse()
            .context("the ticks are no number")
    }

    /// Ticks again.
    ///
    /// # Errors
    /// As [`DomU::ask`].
    pub fn go_on(&mut self) -> Result<()> {
        self.ask("go").map(drop)
    }

    /// Waits until the guest has ticked so often from now on.
    ///
    /// # Errors
    /// It does not within the deadline.
    pub fn wait_ticks(&self, ticks: usize) -> Result<()> {
        self.console.wait(self.console.place(), DEADLINE, &format!("{ticks} ticks"), |text| {
            (text.lines().filter(|line| line.starts_with("T ")).count() > ticks).then_some(())
        })
    }

    /// The guest runs, has looked again, and has not once found its memory and disks to be of different
    /// instants since it was made or [`DomU::forget_bad`] was called.
    ///
    /// # Errors
    /// With what it found.
    pub fn expect_no_bad(&self) -> Result<()> {
        self.wait_ticks(3)?;
        let bad = self.bad();
        ensure!(bad.is_empty(), "the guest found its memory and disks wrong: {}", bad.join("; "));
        Ok(())
    }

    /// What the guest found wrong.
    pub fn bad(&self) -> Vec<String> {
        let text = self.console.text();
        let from = usize::try_from(self.judged - self.console.begin()).unwrap_or_default();
        let text = text.get(from.min(text.len())..).unwrap_or(&text);
        let is_bad = |line: &&str| line.starts_with("BAD ") || line.starts_with("ERR ");
        text.lines().filter(is_bad).map(str::to_owned).collect()
    }

    /// For cases that break something on purpose.
    pub fn forget_bad(&mut self) {
        self.judged = self.console.place();
    }
}

impl Drop for DomU {
    fn drop(&mut self) {
        if matches!(self.domid(), Ok(Some(_))) {
            let _ = xl(&["destroy", &self.name]);
        }
        if !std::thread::panicking() {
            let _ = fs::remove_dir_all(&self.dir);
        }
        let is_volume = |backend| matches!(backend, Backend::Lvm | Backend::LvmThin);
        for (_, volume) in self.disks.iter().filter(|(backend, _)| is_volume(*backend)) {
            let _ = program("/sbin/lvremove", &["-fq", &volume.to_string_lossy()]);
        }
    }
}

/// The volume group of the machine's second disk, and the thin pool in it.
const VOLUMES: &str = "domsnap";
const POOL: &str = "domsnap/pool";

/// A disk of 64 MiB with an empty ext4 file system.
fn make_disk(backend: Backend, dir: &Path, name: &str, letter: char) -> Result<PathBuf> {
    let (raw, qcow2) = (Path::new("/vm/blank.raw"), Path::new("/vm/blank.qcow2"));
    let text = |path: &Path| path.to_string_lossy().into_owned();
    if !qcow2.exists() {
        fs::File::create(raw)?.set_len(64 << 20)?;
        program("/sbin/mke2fs", &["-q", "-t", "ext4", "-b", "4096", &text(raw)])?.ok()?;
        let new = Path::new("/vm/blank.new");
        program("/usr/bin/qemu-img", &["convert", "-O", "qcow2", &text(raw), &text(new)])?.ok()?;
        fs::rename(new, qcow2)?;
    }
    match backend {
        Backend::Qcow2 => {
            let path = dir.join(format!("xvd{letter}.qcow2"));
            fs::copy(qcow2, &path)?;
            Ok(path)
        }
        Backend::RawQdisk | Backend::RawLoop => {
            let path = dir.join(format!("xvd{letter}.raw"));
            program("/bin/cp", &["--sparse=always", &text(raw), &text(&path)])?.ok()?;
            Ok(path)
        }
        Backend::Lvm | Backend::LvmThin => {
            if program("/sbin/vgs", &[VOLUMES])?.status != 0 {
                program("/sbin/pvcreate", &["-q", "/dev/vdb"])?.ok()?;
                program("/sbin/vgcreate", &["-q", VOLUMES, "/dev/vdb"])?.ok()?;
            }
            let volume = format!("{name}-{letter}");
            let path = PathBuf::from(format!("/dev/{VOLUMES}/{volume}"));
            let _ = program("/sbin/lvremove", &["-fq", &text(&path)])?;
            if backend == Backend::Lvm {
                program("/sbin/lvcreate", &["-qy", "-L", "64M", "-n", &volume, VOLUMES])?.ok()?;
            } else {
                if program("/sbin/lvs", &[POOL])?.status != 0 {
                    program("/sbin/lvcreate", &["-qy", "-L", "512M", "-T", POOL])?.ok()?;
                }
                program("/sbin/lvcreate", &["-qy", "-V", "64M", "-T", POOL, "-n", &volume])?.ok()?;
            }
            let (from, to) = (format!("if={}", text(raw)), format!("of={}", text(&path)));
            let mut args = vec![from.as_str(), to.as_str(), "bs=1M"];
            // A new thin volume is empty; in a thick one lvm leaves what another had there.
            if backend == Backend::LvmThin {
                args.push("conv=sparse");
            }
            program("/bin/dd", &args)?.ok()?;
            if !path.exists() {
                bail!("the volume {} has no device", path.display());
            }
            Ok(path)
        }
    }
}
