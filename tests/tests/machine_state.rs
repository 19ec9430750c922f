//! Firmware variables and the state of a TPM are parts of a domain's snapshots: in a running QEMU without a
//! guest system, whose flash the test writes as firmware would, beside a real swtpm; and at rest.

use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::os::unix::fs::{MetadataExt, PermissionsExt, symlink};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::thread::sleep;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use domsnap_tests::domsnap::{Domsnap, Outcome, status};
use domsnap_tests::idle::Idle;
use domsnap_tests::qemu;
use rustix::fs::{FlockOperation, fcntl_lock};
use testguest::Version;

const PATIENCE: Duration = Duration::from_secs(60);

/// What notes call the variables.
const NVRAM: &str = "firmware variables (NVRAM)";

/// Bytes of the variables. They are just below the code, which ends at 4 GiB.
const VARIABLES: u64 = 128 << 10;

/// A directory with a disk, variables, and the directory of a TPM.
struct Place {
    directory: tempfile::TempDir,
    domsnap: Domsnap,
}

impl Place {
    fn new() -> Result<Self> {
        let directory = tempfile::tempdir()?;
        let place = Self { domsnap: Domsnap::new(&directory.path().join("state")), directory };
        qemu::img(&["create", "-q", "-f", "qcow2", &place.text("a.qcow2"), "8M"])?;
        fs::write(place.path("vars.fd"), vec![0xff; VARIABLES as usize])?;
        fs::create_dir(place.path("tpm"))?;
        Ok(place)
    }

    fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    fn text(&self, name: &str) -> String {
        self.path(name).display().to_string()
    }

    fn says(&self, args: &[&str], all: &[&str]) -> Result<Outcome> {
        let outcome = self.domsnap.done(args)?;
        let said = format!("{}{}", outcome.stdout, outcome.stderr);
        for text in all {
            ensure!(said.contains(text), "it does not say {text:?}: {outcome}");
        }
        Ok(outcome)
    }

    fn refuses(&self, args: &[&str], all: &[&str]) -> Result<()> {
        let outcome = self.domsnap.run(args)?.expect_status(status::REFUSED)?;
        for text in all {
            ensure!(outcome.stderr.contains(text), "it does not say {text:?}: {outcome}");
        }
        ensure!(outcome.stderr.contains("no changes made"), "{outcome}");
        Ok(())
    }

    /// The first byte of the variables' file.
    fn variable(&self) -> Result<u8> {
        fs::read(self.path("vars.fd"))?.first().copied().context("an empty file")
    }

    fn tpm(&self) -> Result<Vec<u8>> {
        Ok(fs::read(self.path("tpm/tpm2-00.permall"))?)
    }

    /// Puts another state in the TPM's place, as swtpm does it.
    fn change_tpm(&self, content: &str) -> Result<()> {
        fs::write(self.path("tpm/TMP2-00.permall"), content)?;
        Ok(fs::rename(self.path("tpm/TMP2-00.permall"), self.path("tpm/tpm2-00.permall"))?)
    }

    fn swtpm(&self) -> Result<Swtpm> {
        let state = format!("dir={}", self.text("tpm"));
        let control = format!("type=unixio,path={}", self.text("tpm.sock"));
        let mut swtpm = Command::new("swtpm");
        swtpm.args(["socket", "--tpm2", "--ctrl", &control, "--tpmstate", &state]);
        swtpm.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
        let swtpm = Swtpm(swtpm.spawn().context("no swtpm: run scripts/install-deps")?);
        let until = Instant::now() + PATIENCE;
        while !self.path("tpm.sock").exists() {
            ensure!(Instant::now() < until, "swtpm does not start");
            sleep(Duration::from_millis(10));
        }
        Ok(swtpm)
    }

    fn start(&self) -> Result<(Swtpm, Idle)> {
        let swtpm = self.swtpm()?;
        let socket = self.text("tpm.sock");
        let disk =
            format!("driver=qcow2,node-name=d0,file.driver=file,file.filename={}", self.text("a.qcow2"));
        // Firmware that halts its processor at once, and sends the TPM no commands.
        fs::write(self.path("code.fd"), vec![0xf4; 256 << 10])?;
        let code = format!("if=pflash,format=raw,unit=0,readonly=on,file={}", self.text("code.fd"));
        let variables = format!("if=pflash,format=raw,unit=1,file={}", self.text("vars.fd"));
        let (tpm, bus) = (format!("socket,id=c0,path={socket}"), self.text("bus"));
        let bus = format!("unix:{bus},server=on,wait=off");
        let args = [
            ["-blockdev", &disk],
            ["-device", "virtio-blk-pci,drive=d0,id=vda"],
            ["-drive", &code],
            ["-drive", &variables],
            ["-chardev", &tpm],
            ["-tpmdev", "emulator,id=tpm0,chardev=c0"],
            ["-device", "tpm-crb,tpmdev=tpm0"],
            ["-qtest", &bus],
        ];
        Ok((swtpm, Idle::start(Version::New, self.directory.path(), "m", args.as_flattened())?))
    }

    /// One command on the machine's bus.
    fn bus(&self, command: &str) -> Result<String> {
        let until = Instant::now() + PATIENCE;
        let stream = loop {
            match UnixStream::connect(self.path("bus")) {
                Err(error) if Instant::now() >= until => return Err(error).context("connecting to the bus"),
                Err(_) => sleep(Duration::from_millis(10)),
                Ok(stream) => break stream,
            }
        };
        stream.set_read_timeout(Some(PATIENCE))?;
        (&stream).write_all(format!("{command}\n").as_bytes())?;
        let mut said = String::new();
        BufReader::new(&stream).read_line(&mut said)?;
        ensure!(said.starts_with("OK"), "{command}: {said}");
        Ok(said)
    }

    /// Programs the first byte of the variables, as firmware does.
    fn program(&self, byte: u8) -> Result<()> {
        let at = 0x1_0000_0000 - (256 << 10) - VARIABLES;
        for value in [0x40, byte, 0xff] {
            self.bus(&format!("writeb {at:#x} {value:#x}"))?;
        }
        ensure!(self.flash()? == byte && self.variable()? == byte, "the flash was not written");
        Ok(())
    }

    /// The byte that the guest reads.
    fn flash(&self) -> Result<u8> {
        let said = self.bus(&format!("readb {:#x}", 0x1_0000_0000_u64 - (256 << 10) - VARIABLES))?;
        let byte = said.trim().rsplit("0x").next().context("a number")?;
        Ok(u8::try_from(u64::from_str_radix(byte, 16)?)?)
    }
}

/// A TPM's process; killed when dropped.
struct Swtpm(Child);

impl Swtpm {
    /// Waits for the end that it comes to with its machine.
    fn ends(mut self) -> Result<()> {
        let until = Instant::now() + PATIENCE;
        while self.0.try_wait()?.is_none() {
            ensure!(Instant::now() < until, "it does not end");
            sleep(Duration::from_millis(10));
        }
        Ok(())
    }
}

impl Drop for Swtpm {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Live: copies of the instant, with memory and without; a revert in place gets the variables by the memory,
/// one without memory leaves them and says so, and `--off` brings the files back. Then at rest: undo, a start
/// from memory, by images alone.
#[test]
fn machine_state_goes_with_the_snapshots_of_a_running_machine() -> Result<()> {
    let place = Place::new()?;
    let (swtpm, idle) = place.start()?;
    let at = idle.address();
    let at = at.as_str();
    place.program(b'A')?;
    let first = place.tpm()?;
    let made = place.says(&["create", at, "all"], &["pflash1", "tpm0"])?;
    ensure!(!format!("{made}").contains(NVRAM), "{made}");
    place.says(&["create", at, "disks", "--disk-only"], &["pflash1", "tpm0"])?;
    let shown = place.says(&["show", at, "disks"], &["pflash1", "tpm0"])?;
    ensure!(!shown.stdout.contains(NVRAM), "{shown}");
    place.says(
        &["create", at, "without", "--disk", "pflash1=skip", "--disk-only"],
        &[NVRAM, "not in the snapshot"],
    )?;
    // It is one of a file of its own, of the owner's rights.
    let copies: Vec<PathBuf> = fs::read_dir(place.path("tpm"))?
        .filter_map(|entry| Some(entry.ok()?.path()))
        .filter(|path| path.extension().is_some_and(|extension| extension == "permall"))
        .filter(|path| path.file_name().is_some_and(|name| name != "tpm2-00.permall"))
        .collect();
    ensure!(copies.len() == 3, "{copies:?}");
    let original = fs::metadata(place.path("tpm/tpm2-00.permall"))?;
    for copy in &copies {
        ensure!(fs::read(copy)? == first, "{} is another state", copy.display());
        ensure!(fs::metadata(copy)?.mode() == original.mode(), "{} has other rights", copy.display());
    }

    // In place, with memory. What is replaced is kept, of the file too.
    place.program(b'B')?;
    let back = place.says(&["revert", at, "all", "--undo=free"], &[])?;
    ensure!(!format!("{back}").contains(NVRAM), "{back}");
    ensure!(place.flash()? == b'A' && place.variable()? == b'A', "the memory did not bring the variables");
    // Without memory the guest boots with the later ones.
    place.program(b'C')?;
    place.says(&["revert", at, "disks"], &[NVRAM, "later state"])?;
    ensure!(place.flash()? == b'C' && place.variable()? == b'C', "they are neither");
    place.says(&["create", at, "s2", "--disk-only"], &[])?;
    place.program(b'D')?;
    place.change_tpm("later")?;
    let off = place.says(&["revert", at, "s2", "--off", "--undo=free"], &[])?;
    ensure!(!format!("{off}").contains("later state"), "{off}");
    swtpm.ends()?;
    ensure!(place.variable()? == b'C' && place.tpm()? == first, "the files are not those of s2");

    // At rest, also by the disk alone.
    let image = place.text("a.qcow2");
    let image = image.as_str();
    place.says(&["undo", image], &[])?;
    ensure!(place.variable()? == b'D' && place.tpm()? == b"later", "what was replaced is not back");
    place.says(&["revert", image, "disks"], &[])?;
    ensure!(place.variable()? == b'A' && place.tpm()? == first, "the files are not those of the snapshot");
    place.says(&["check", image], &[])?;

    // From memory. The machine has a TPM of its own, which gets its state with the memory.
    let _ = fs::remove_file(place.path("tpm.sock"));
    let _ = fs::remove_file(place.path("bus"));
    place.change_tpm("later")?;
    fs::write(place.path("vars.fd"), vec![b'E'; VARIABLES as usize])?;
    let swtpm = place.swtpm()?;
    place.says(&["revert", image, "all"], &[])?;
    ensure!(place.flash()? == b'A' && place.variable()? == b'A', "the memory did not bring the variables");
    ensure!(place.tpm()?.len() > 100, "the TPM has no state");
    // While it runs, its files are not changed at rest, and a delete of snapshots takes the copies.
    place.says(&["delete", image, "all", "disks", "without", "s2"], &[])?;
    let left = fs::read_dir(place.path("tpm"))?.count();
    ensure!(left == 2, "{left} files are beside the TPM's state and its lock");
    let mut again = Command::new(domsnap_tests::domsnap::binary());
    again.arg("--state-dir").arg(place.path("state")).args(["revert", image, "all"]);
    ensure!(again.output()?.status.code() == Some(status::REFUSED), "a snapshot that was deleted");
    let quit = UnixStream::connect(place.path("m.qmp"))?;
    (&quit).write_all(b"{\"execute\":\"qmp_capabilities\"}\n{\"execute\":\"quit\"}\n")?;
    let mut lines = BufReader::new(quit).lines();
    while lines.next().is_some_and(|line| line.is_ok()) {}
    swtpm.ends()
}

/// A clone with memory has variables of its own, in its machine and in its snapshot, and the source's file
/// never changes.
#[test]
fn clones_with_memory_have_variables_of_their_own() -> Result<()> {
    let place = Place::new()?;
    let disk = format!("driver=qcow2,node-name=d0,file.driver=file,file.filename={}", place.text("a.qcow2"));
    let code = "if=pflash,format=raw,unit=0,readonly=on,file=/usr/share/seabios/bios-256k.bin";
    let variables = format!("if=pflash,format=raw,unit=1,file={}", place.text("vars.fd"));
    let device = "virtio-blk-pci,drive=d0,id=vda";
    let args = ["-blockdev", &disk, "-device", device, "-drive", code, "-drive", &variables];
    let idle = Idle::start(Version::New, place.directory.path(), "m", &args)?;
    let at = idle.address();
    place.says(&["create", &at, "all"], &["pflash1"])?;
    fs::create_dir(place.path("clones"))?;
    let to = place.text("clones");
    place.says(&["clone", &at, "all", "copy", "--memory", "--start", "--to", &to], &["copy"])?;
    let (source, own) = (place.path("vars.fd"), place.path("clones/copy/copy-pflash1.fd"));
    let before = fs::metadata(&source)?;
    ensure!(fs::read(&own)? == fs::read(&source)?, "other variables");
    ensure!(fs::metadata(&own)?.ino() != before.ino(), "the same file");
    // The machine wrote its flash to its own file when it went on.
    let after = fs::metadata(&source)?;
    ensure!((after.mtime(), after.mtime_nsec()) == (before.mtime(), before.mtime_nsec()), "it was written");
    place.says(&["show", "copy", "all"], &["pflash1"])?;
    idle.quit()?;
    place.says(&["revert", "copy", "all", "--off"], &[])?;
    fs::write(&own, "x")?;
    place.says(&["revert", "copy", "all", "--off"], &[])?;
    ensure!(fs::read(&own)? == fs::read(&source)?, "the clone's snapshot has other variables");
    Ok(())
}

/// At rest: a lost catalogue, clones, exports and the import of one; and what is refused.
#[test]
fn machine_state_at_rest() -> Result<()> {
    let place = Place::new()?;
    fs::write(place.path("tpm/tpm2-00.permall"), "first")?;
    fs::set_permissions(place.path("tpm/tpm2-00.permall"), fs::Permissions::from_mode(0o600))?;
    let disk =
        |target: &str, name: &str, format: &str| format!("{target}={},format={format}", place.text(name));
    let (vda, vars, tpm) = (
        disk("vda", "a.qcow2", "qcow2"),
        disk("pflash1", "vars.fd", "nvram"),
        disk("tpm0", "tpm/tpm2-00.permall", "tpm"),
    );
    let add = |disks: &[&str]| -> Vec<String> {
        let disks = disks.iter().flat_map(|disk| ["--disk", disk]);
        ["domain", "add", "web"].into_iter().chain(disks).map(str::to_owned).collect()
    };

    // What is no such file is refused before anything: by name, kind, size, place.
    fs::write(place.path("tpm/other"), "first")?;
    fs::create_dir(place.path("open"))?;
    fs::set_permissions(place.path("open"), fs::Permissions::from_mode(0o777))?;
    fs::write(place.path("open/vars.fd"), "first")?;
    fs::File::create(place.path("long.fd"))?.set_len(65 << 20)?;
    fs::write(place.path("empty.fd"), "")?;
    for (target, name, format, why) in [
        ("tpm0", "tpm/other", "tpm", "name"),
        ("pflash1", "open/vars.fd", "nvram", "can be written by"),
        ("pflash1", "long.fd", "nvram", "format=raw"),
        ("pflash1", "empty.fd", "nvram", "format=raw"),
    ] {
        let other = disk(target, name, format);
        let outcome = place.domsnap.run(&add(&[&vda, &other]))?.expect_status(status::REFUSED)?;
        ensure!(outcome.stderr.contains(why), "{name}: {outcome}");
    }

    place.domsnap.done(&add(&[&vda, &vars, &tpm]))?;
    // What is asked of the disks is not asked of them; and alone they are no snapshot.
    place.says(&["create", "web", "s1", "--internal"], &["pflash1", "tpm0"])?;
    place.refuses(&["create", "web", "s2", "--disk", "vda=skip"], &["every disk is left out"])?;
    place.refuses(&["create", "web", "s2", "--disk", "pflash1=overlay"], &["overlay"])?;
    fs::write(place.path("vars.fd"), vec![b'B'; VARIABLES as usize])?;
    place.change_tpm("second, and of another length")?;

    // A TPM that runs is not exchanged.
    let lock = fs::File::create(place.path("tpm/.lock"))?;
    fcntl_lock(&lock, FlockOperation::NonBlockingLockExclusive)?;
    for command in [&["revert", "web", "s1"][..], &["create", "web", "s2"]] {
        place.refuses(command, &["swtpm", "shut the domain down"])?;
    }
    drop(lock);
    ensure!(place.variable()? == b'B', "it was changed");

    // Clones have their own, of the point.
    fs::create_dir(place.path("clones"))?;
    place.domsnap.done(&["clone", "web", "s1", "copy", "--to", &place.text("clones")])?;
    ensure!(fs::read(place.path("clones/copy/tpm2-00.permall"))? == b"first", "another TPM");
    ensure!(fs::read(place.path("clones/copy/copy-pflash1.fd"))?[0] == 0xff, "other variables");
    let rights = fs::metadata(place.path("clones/copy/tpm2-00.permall"))?.mode() & 0o777;
    ensure!(rights == 0o600, "{rights:o}");
    place.says(&["create", "copy", "s1"], &["tpm0"])?;

    exports_have_machine_state(&place)?;

    // The manifests bring them back, and another program's damage is found by its checksum.
    fs::remove_dir_all(place.path("state"))?;
    place.domsnap.done(&["import", &place.text("a.qcow2"), "--name", "web"])?;
    place.domsnap.done(&["revert", "web", "s1"])?;
    ensure!(place.variable()? == 0xff && place.tpm()? == b"first", "another state");
    let rights = fs::metadata(place.path("tpm/tpm2-00.permall"))?.mode() & 0o777;
    ensure!(rights == 0o600, "{rights:o}");
    let copy = tree(&place.path("tpm"))?.into_iter().find(|name| name.contains(".ds-")).context("no copy")?;
    let copy = place.path("tpm").join(copy.replace(".crc32", ""));
    let whole = fs::read(&copy)?;
    fs::write(&copy, "worst")?;
    let outcome = place.domsnap.run(&["revert", "web", "s1"])?;
    ensure!(outcome.status != Some(status::DONE) && outcome.stderr.contains("checksum"), "{outcome}");
    ensure!(place.tpm()? == b"first", "a damaged copy was used");
    // A link in its place leads nowhere.
    fs::remove_file(&copy)?;
    symlink("/etc/hostname", &copy)?;
    let outcome = place.domsnap.run(&["revert", "web", "s1"])?;
    ensure!(
        outcome.status != Some(status::DONE) && place.tpm()? == b"first",
        "a link was followed: {outcome}"
    );
    fs::remove_file(&copy)?;
    fs::write(&copy, whole)?;
    place.domsnap.done(&["revert", "web", "s1"])?;
    Ok(())
}

/// An export has a copy of each, whole, also one that is an increment. The domain that is imported from it
/// has them in its snapshots, and goes on with the newest. What is damaged is not imported.
fn exports_have_machine_state(place: &Place) -> Result<()> {
    place.domsnap.done(&["create", "web", "s2", "--internal"])?;
    let to = place.text("export");
    let first = place.says(&["export", "web", "s1", "--to", &to], &["pflash1.s1.nvram", "tpm0.s1.tpm"])?;
    ensure!(!first.stdout.contains("note:"), "{first}");
    place.says(&["export", "web", "s2", "--since", "s1", "--to", &to], &["tpm0.s2.tpm"])?;
    ensure!(fs::read(place.path("export/tpm0.s1.tpm"))? == b"first", "another TPM");
    ensure!(fs::read(place.path("export/pflash1.s2.nvram"))? == vec![b'B'; VARIABLES as usize]);
    let stream = place.domsnap.done(&["export", "web", "s1", "--disk", "tpm0", "--to", "-"])?;
    ensure!(stream.stdout == "first", "{stream}");
    place.says(&["serve", "web", "s1", "--disk", "tpm0"], &[]).err().context("it was served as a disk")?;

    let moved = place.text("moved");
    place.domsnap.done(&["import", &to, "--to", &moved, "--name", "moved"])?;
    let second = b"second, and of another length";
    ensure!(fs::read(place.path("moved/pflash1.fd"))?[0] == b'B', "other variables");
    ensure!(fs::read(place.path("moved/tpm2-00.permall"))? == second, "another TPM");
    place.says(&["show", "moved", "s1"], &["pflash1", "tpm0"])?;
    place.says(&["check", "moved"], &[])?;
    place.domsnap.done(&["revert", "moved", "s1"])?;
    ensure!(fs::read(place.path("moved/pflash1.fd"))?[0] == 0xff, "the revert left the variables");
    ensure!(fs::read(place.path("moved/tpm2-00.permall"))? == b"first", "the revert left the TPM");
    place.domsnap.done(&["revert", "moved", "s2"])?;
    ensure!(fs::read(place.path("moved/tpm2-00.permall"))? == second, "the revert left the TPM");

    fs::write(place.path("export/tpm0.s1.tpm"), "worst")?;
    let damaged = place.domsnap.run(&["import", &to, "--to", &place.text("bad"), "--name", "bad"])?;
    ensure!(damaged.status != Some(status::DONE) && damaged.stderr.contains("tpm0.s1.tpm"), "{damaged}");
    ensure!(!place.path("bad").exists(), "a part of it was imported");
    place.domsnap.done(&["delete", "web", "s2"]).map(drop)
}

/// The names of the files below a directory.
fn tree(directory: &Path) -> Result<Vec<String>> {
    let mut names = Vec::new();
    for entry in fs::read_dir(directory)? {
        let entry = entry?;
        names.push(entry.file_name().to_string_lossy().into_owned());
        if entry.file_type()?.is_dir() {
            names.extend(tree(&entry.path())?);
        }
    }
    Ok(names)
}
