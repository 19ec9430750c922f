//! `domsnap mount`: what is in a snapshot, as files, while the domain goes on.

use std::fs;
use std::io::{BufRead, BufReader};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use domsnap_tests::domsnap::{Domsnap, status};
use domsnap_tests::live::{Live, NAME};
use domsnap_tests::qemu;
use rustix::process::{Pid, Signal, kill_process};

/// Within which a mount must be there, or gone.
const SOON: Duration = Duration::from_secs(60);

/// A mount in a process of its own, which is killed if it is left.
struct Mount {
    child: Child,
    said: String,
    dir: PathBuf,
}

impl Mount {
    fn of(domsnap: &Domsnap, args: &[&str], dir: &Path) -> Result<Self> {
        let dir_arg = dir.display().to_string();
        let args = [&["mount"], args, &[&dir_arg]].concat();
        let mut child = domsnap.command(&args).stdout(Stdio::piped()).spawn()?;
        let (mut said, out) = (String::new(), child.stdout.take().context("stdout")?);
        for line in BufReader::new(out).lines() {
            let line = line?;
            said.push_str(&line);
            said.push('\n');
            if line.starts_with("it is unmounted") {
                return Ok(Self { child, said, dir: dir.to_owned() });
            }
        }
        bail!("`domsnap mount` ended with {}: {said}", child.wait()?)
    }

    /// Asks it to end. It must end well, and leave nothing.
    fn stop(mut self) -> Result<()> {
        kill_process(Pid::from_child(&self.child), Signal::TERM)?;
        let ended = self.wait()?;
        ensure!(ended == Some(0), "it ended with {ended:?}");
        ensure!(!self.dir.exists(), "its directory is left");
        nothing_left(&self.dir)
    }

    fn wait(&mut self) -> Result<Option<i32>> {
        let until = Instant::now() + SOON;
        loop {
            if let Some(status) = self.child.try_wait()? {
                return Ok(status.code());
            }
            ensure!(Instant::now() < until, "it does not end");
            std::thread::sleep(Duration::from_millis(10));
        }
    }
}

impl Drop for Mount {
    fn drop(&mut self) {
        if let Ok(None) = self.child.try_wait() {
            let _ = self.child.kill();
            let _ = self.child.wait();
        }
        let mounts = fs::read_to_string("/proc/self/mounts").unwrap_or_default();
        for place in mounts.lines().filter_map(|line| line.split(' ').nth(1)).rev_of(&self.dir) {
            let _ = Command::new("umount").args(["-l", &place]).status();
        }
    }
}

/// The mount points below a directory, the last first.
trait RevOf {
    fn rev_of(self, dir: &Path) -> Vec<String>;
}

impl<'a, I: Iterator<Item = &'a str>> RevOf for I {
    fn rev_of(self, dir: &Path) -> Vec<String> {
        let mut all: Vec<String> =
            self.filter(|place| Path::new(place).starts_with(dir)).map(str::to_owned).collect();
        all.reverse();
        all
    }
}

/// No mount and no loop device is left of a directory. A loop device ends a moment after its last user.
fn nothing_left(dir: &Path) -> Result<()> {
    let mounts = fs::read_to_string("/proc/self/mounts")?;
    let left = mounts.lines().filter_map(|line| line.split(' ').nth(1)).rev_of(dir);
    ensure!(left.is_empty(), "left mounted: {left:?}");
    let until = Instant::now() + SOON;
    loop {
        let loops = qemu::run("losetup", &["--list", "--noheadings", "--output", "BACK-FILE"])?;
        // One that is left after its directory was unmounted names the file by what is left of its path.
        let is_left =
            |file: &str| file.contains(&dir.display().to_string()) || file.trim().starts_with("/vd");
        if !loops.lines().any(is_left) {
            return Ok(());
        }
        ensure!(Instant::now() < until, "loop devices are left: {loops}");
        std::thread::sleep(Duration::from_millis(20));
    }
}

/// Makes an image of a file system with a file in it.
fn made(dir: &Path, name: &str, content: &str) -> Result<PathBuf> {
    let (tree, image) = (dir.join(format!("{name}.tree")), dir.join(format!("{name}.fs")));
    fs::create_dir(&tree)?;
    fs::write(tree.join("letter"), content)?;
    let (tree, path) = (tree.display().to_string(), image.display().to_string());
    qemu::run("mkfs.ext4", &["-q", "-F", "-L", name, "-d", &tree, &path, "8M"])?;
    Ok(image)
}

/// A domain of a disk with two partitions, one of them swap space, and one that a file system fills.
struct Place {
    dir: tempfile::TempDir,
}

impl Place {
    fn new() -> Result<Self> {
        // The scratch needs a file system with files that have no names; so has that of temporary files.
        let dir = tempfile::Builder::new().prefix("domsnap-mount-test-").tempdir()?;
        let place = Self { dir };
        let whole = made(place.dir.path(), "whole", "on monday")?;
        let part = made(place.dir.path(), "part", "in a partition")?;
        let disk = place.dir.path().join("disk.raw");
        fs::File::create(&disk)?.set_len(32 << 20)?;
        let table = place.dir.path().join("table");
        fs::write(
            &table,
            "label: gpt\nstart=2048, size=16384\nstart=20480, size=8192\nstart=30720, size=2048\n",
        )?;
        let shell = format!(
            "set -e; export PATH=$PATH:/usr/sbin:/sbin; sfdisk -q {disk} < {table}; \
             dd if={part} of={disk} bs=1M seek=1 conv=notrunc status=none; \
             truncate -s 4M {swap}; mkswap -q {swap} >/dev/null 2>&1; \
             dd if={swap} of={disk} bs=1M seek=10 conv=notrunc status=none",
            disk = disk.display(),
            table = table.display(),
            part = part.display(),
            swap = place.dir.path().join("swap").display(),
        );
        qemu::run("sh", &["-c", &shell])?;
        for (from, to) in [(&disk, "root"), (&whole, "data")] {
            let to = place.image(to);
            qemu::img(&[
                "convert",
                "-f",
                "raw",
                "-O",
                "qcow2",
                &from.display().to_string(),
                &to.display().to_string(),
            ])?;
        }
        let disks = [("vda", "root"), ("vdb", "data")]
            .map(|(target, name)| format!("{target}={},format=qcow2", place.image(name).display()));
        place.domsnap().done(&["domain", "add", "shop", "--disk", &disks[0], "--disk", &disks[1]])?;
        place.domsnap().done(&["create", "shop", "monday"])?;
        // What is written since is not shown.
        let now = place.image("data").display().to_string();
        qemu::run("qemu-io", &["-f", "qcow2", "-c", "write -q -P 0 0 4M", &now])?;
        Ok(place)
    }

    fn image(&self, name: &str) -> PathBuf {
        self.dir.path().join(format!("{name}.qcow2"))
    }

    fn domsnap(&self) -> Domsnap {
        Domsnap::new(&self.dir.path().join("state"))
    }
}

#[test]
fn file_systems_of_a_snapshot_are_mounted() -> Result<()> {
    let place = Place::new()?;
    let dir = place.dir.path().join("m");
    let before = [fs::read(place.image("root"))?, fs::read(place.image("data"))?];
    let mount = Mount::of(&place.domsnap(), &["shop", "monday"], &dir)?;
    ensure!(fs::read_to_string(dir.join("vda1/letter"))? == "in a partition", "{}", mount.said);
    ensure!(fs::read_to_string(dir.join("vdb/letter"))? == "on monday", "{}", mount.said);
    ensure!(mount.said.contains("vda2 is not mounted: swap"), "{}", mount.said);
    ensure!(mount.said.contains("vda3: no file system"), "{}", mount.said);
    ensure!(fs::write(dir.join("vdb/letter"), "x").is_err(), "it can be written");
    // Held meanwhile.
    let refused = place.domsnap().run(&["delete", "shop", "monday"])?.expect_status(status::REFUSED)?;
    ensure!(refused.stderr.contains("serve:"), "{refused}");
    // A second one at the same time, of one disk.
    let other = place.dir.path().join("o");
    let second = Mount::of(&place.domsnap(), &["shop", "monday", "--disk", "vdb"], &other)?;
    ensure!(other.join("vdb/letter").exists() && !other.join("vda1").exists(), "{}", second.said);
    second.stop()?;
    mount.stop()?;
    ensure!(
        before == [fs::read(place.image("root"))?, fs::read(place.image("data"))?],
        "an image has changed"
    );
    place.domsnap().done(&["delete", "shop", "monday"])?;
    Ok(())
}

/// What cannot be mounted is refused with the reason, and leaves nothing; a mount that was killed ends by
/// `umount`, and one that is in use when it ends fails.
#[test]
fn mounts_end_and_are_refused_with_a_reason() -> Result<()> {
    let place = Place::new()?;
    let full = place.dir.path().join("full");
    fs::create_dir(&full)?;
    fs::write(full.join("x"), "")?;
    let full_arg = full.display().to_string();
    let refused =
        place.domsnap().run(&["mount", "shop", "monday", &full_arg])?.expect_status(status::REFUSED)?;
    ensure!(refused.stderr.contains("not empty"), "{refused}");
    // In a directory that every user can write to, a link could be put in place of what is mounted.
    let open = place.dir.path().join("open");
    fs::create_dir(&open)?;
    fs::set_permissions(&open, fs::Permissions::from_mode(0o777))?;
    let inside = open.join("m");
    let inside_arg = inside.display().to_string();
    let refused =
        place.domsnap().run(&["mount", "shop", "monday", &inside_arg])?.expect_status(status::REFUSED)?;
    ensure!(refused.stderr.contains("every user") && !inside.exists(), "{refused}");
    // Neither file system nor partitions: what vdb has now was overwritten.
    place.domsnap().done(&["create", "shop", "tuesday"])?;
    let dir = place.dir.path().join("m");
    let dir_arg = dir.display().to_string();
    let refused = place
        .domsnap()
        .run(&["mount", "shop", "tuesday", &dir_arg, "--disk", "vdb"])?
        .expect_status(status::REFUSED)?;
    ensure!(refused.stderr.contains("no file system"), "{refused}");
    ensure!(!dir.exists(), "a refused mount left its directory");
    nothing_left(&dir)?;
    place.domsnap().done(&["delete", "shop", "tuesday"])?;

    // Killed: the hold has ended, and what is mounted goes by umount.
    let mut killed = Mount::of(&place.domsnap(), &["shop", "monday"], &dir)?;
    killed.child.kill()?;
    killed.child.wait()?;
    let refused =
        place.domsnap().run(&["mount", "shop", "monday", &dir_arg])?.expect_status(status::REFUSED)?;
    ensure!(refused.stderr.contains("umount"), "{refused}");
    for name in ["vda1", "vdb", ".disks"] {
        qemu::run("umount", &[&dir.join(name).display().to_string()])?;
    }
    nothing_left(&dir)?;
    drop(killed);
    fs::remove_dir_all(&dir)?;

    // In use when it ends.
    let mut used = Mount::of(&place.domsnap(), &["shop", "monday"], &dir)?;
    let open = fs::File::open(dir.join("vdb/letter"))?;
    kill_process(Pid::from_child(&used.child), Signal::TERM)?;
    ensure!(used.wait()? == Some(1), "an end in use is no failure");
    drop(open);
    drop(used);
    nothing_left(&dir)?;
    place.domsnap().done(&["delete", "shop", "monday"])?;
    Ok(())
}

/// A guest that runs and writes: its file system is that of the instant, with its journal replayed, and the
/// snapshot does not change.
#[test]
fn snapshots_of_a_running_guest_are_mounted() -> Result<()> {
    let mut live = Live::new()?;
    live.guest.shell("echo 'dear reader' > /vda/letter; sync")?;
    live.create("s1", &["--disk-only"])?;
    live.guest.shell("echo 'something else' > /vda/letter; sync")?;
    let dir = live.guest.dir().join("m");
    for _ in 0..2 {
        let mount = Mount::of(&live.domsnap(), &[NAME, "s1", "--disk", "vda"], &dir)?;
        let said = fs::read_to_string(dir.join("vda/letter")).with_context(|| mount.said.clone())?;
        ensure!(said == "dear reader\n", "{said}");
        live.guest.wait_ticks(3)?;
        mount.stop()?;
    }
    live.verify()?;
    live.delete(&["s1"], &[])?;
    live.finish()
}

/// The commands of the guide's page that mount; `backup` runs the others.
#[test]
fn every_command_of_the_page_runs() -> Result<()> {
    let place = Place::new()?;
    let page = Path::new(env!("CARGO_MANIFEST_DIR")).join("../docs/backup.md");
    let (mut mount, mut run) = (None, 0);
    for line in fs::read_to_string(page)?.lines() {
        let here = line.replace("/srv/backup", &place.dir.path().display().to_string());
        match &here.split_whitespace().collect::<Vec<_>>()[..] {
            ["domsnap", "mount", args @ .., dir, "&"] => {
                mount = Some(Mount::of(&place.domsnap(), args, Path::new(dir)).context(line.to_owned())?);
            }
            ["cp", file, _] if mount.is_some() => ensure!(Path::new(file).exists(), "{line}"),
            ["kill", _] if mount.is_some() => mount.take().context("a mount")?.stop()?,
            _ => continue,
        }
        run += 1;
    }
    ensure!(run >= 3, "only {run} commands are left in the page");
    Ok(())
}
