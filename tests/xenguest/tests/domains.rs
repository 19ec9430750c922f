//! Domains of Xen under domsnap: each way to create, revert, delete and list, and what goes wrong on the way.
//! The guest's program itself says when its memory and its disks are not of one instant.
use std::{
    fs,
    os::unix::{
        fs::{MetadataExt, PermissionsExt},
        process::ExitStatusExt,
    },
    path::{Path, PathBuf},
    process::{Child, Command, ExitCode, Stdio},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail, ensure};
use domsnap_tests::served::Server;
use domsnap_tests::shim::{Counted, counted};
use serde_json::json;
use xenguest::{
    TestCase,
    inside::{Backend, DomU, Said, program, xl},
};

const DOMSNAP: &str = "/usr/local/bin/domsnap";
const SHIM: &str = "/usr/local/bin/libfaultfs.so";

const CASES: &[TestCase] = &[
    TestCase::new(
        // Images, internal and external, a volume and memory of one instant come back as they were,
        // repeatedly, and disks alone, with which it boots; snapshots are deleted while the guest runs; a
        // name that leads to another image or volume is refused.
        "memory_images_and_volumes_are_of_one_instant",
        mixed,
    ),
    // The same with a thick volume, whose revert is a merge.
    TestCase::new("memory_and_a_thick_volume_are_of_one_instant", thick),
    TestCase::new(
        // A revert whose domain cannot be made brings the previous guest back; who takes the name of a domain
        // that is reverted is not touched, and the previous guest waits; a domain that is off is started
        // where its snapshot was and its snapshots are deleted.
        "domain_that_is_not_made_comes_back_and_one_that_is_off_starts",
        away,
    ),
    TestCase::new(
        // One guest, to which nothing happens: an image that it has open is refused at rest; paused, its
        // disks are taken and its memory is not; a file that the kernel serves, a memory image that was cut
        // short, a config of another domain, a disk that is attached later are refused; a save that fills the
        // disk is undone.
        "what_cannot_be_done_is_refused_and_the_guest_goes_on",
        refusals,
    ),
    // A domsnap that is killed at any step of a create is recovered.
    TestCase::new("killed_at_any_step_of_a_create", killed_in_create),
    // A domsnap that is killed at any step of a revert is recovered.
    TestCase::new("killed_at_any_step_of_a_revert", killed_in_revert),
    TestCase::new(
        // An xl that is killed with its domsnap leaves nothing that recover cannot mend.
        "xl_killed_with_its_domsnap",
        killed_with_xl,
    ),
    // A served VHD is a disk of a guest, as docs/xen.md says, and a killed server costs it nothing.
    TestCase::new("served_vhd_is_a_disk_of_a_guest", served_vhd),
];

fn main() -> ExitCode {
    xenguest::main(CASES)
}

/// A guest, and a domsnap that knows nothing but it.
struct Run {
    guest: DomU,
    state: PathBuf,
    domain: String,
}

impl Run {
    fn start(name: &str, disks: &[Backend]) -> Result<Self> {
        let guest = DomU::start(name, disks)?;
        guest.expect_no_bad()?;
        Ok(Self { state: guest.dir().join("state"), domain: format!("xen:{name}"), guest })
    }

    fn command(&self, args: &[&str]) -> Command {
        let mut command = Command::new(DOMSNAP);
        command
            .args(args)
            .env("DOMSNAP_STATE_DIR", &self.state)
            .env("DOMSNAP_UNDO", "no")
            .env("NO_COLOR", "1")
            .stdin(Stdio::null());
        command
    }

    /// The arguments, with the guest's name where they say `DOMAIN`.
    fn named<'a>(&'a self, args: &[&'a str]) -> Vec<&'a str> {
        args.iter().map(|word| if *word == "DOMAIN" { self.domain.as_str() } else { word }).collect()
    }

    /// Runs domsnap; `DOMAIN` stands for the guest.
    fn domsnap(&self, args: &[&str]) -> Result<Said> {
        let args = self.named(args);
        let begun = Instant::now();
        let output = self.command(&args).output().context("domsnap is not in the machine: build it first")?;
        let said = Said {
            status: output.status.code().unwrap_or(255),
            out: String::from_utf8_lossy(&output.stdout).into_owned(),
            err: String::from_utf8_lossy(&output.stderr).into_owned(),
        };
        println!("{:>7} ms  domsnap {} -> {}", begun.elapsed().as_millis(), args.join(" "), said.status);
        print!("{}{}", said.out, said.err);
        Ok(said)
    }

    /// The same, with its log on standard error; it must succeed.
    fn logged(&self, args: &[&str]) -> Result<Said> {
        let args = self.named(args);
        let output = self.command(&args).env("DOMSNAP_LOG", "debug").output()?;
        let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
        let (out, err) = (text(&output.stdout), text(&output.stderr));
        ensure!(output.status.success(), "domsnap {}: {out}{err}", args.join(" "));
        Ok(Said { status: 0, out, err })
    }

    fn ok(&self, args: &[&str]) -> Result<String> {
        self.domsnap(args)?.ok().with_context(|| format!("domsnap {}", args.join(" ")))
    }

    /// It must be refused with this status and this message, and the guest must not have noticed.
    fn refused(&self, args: &[&str], status: i32, says: &str) -> Result<()> {
        let domid = self.guest.domid()?;
        let said = self.domsnap(args)?;
        ensure!(
            said.status == status,
            "it ended with {}, not {status}: {}{}",
            said.status,
            said.out,
            said.err
        );
        ensure!(said.err.contains(says), "it does not say {says:?}: {}", said.err);
        ensure!(self.guest.domid()? == domid, "the domain was made again");
        Ok(())
    }

    /// Reverts; the guest must go on between the counters of before and after the snapshot.
    fn revert_between(&self, name: &str, before: u64, after: u64) -> Result<()> {
        // Paused at first: what it says from then on, the reverted guest says.
        self.ok(&["revert", "DOMAIN", name, "--paused"])?;
        ensure!(self.guest.is_paused()?, "it runs, and was to be paused");
        let place = self.guest.place();
        xl(&["unpause", self.guest.name()])?;
        let first = self.guest.first_tick_since(place)?;
        ensure!(
            (before..=after + 1).contains(&first),
            "it goes on at {first}, and the snapshot was between {before} and {after}"
        );
        self.guest.expect_no_bad()
    }

    /// Writes another config of the guest, where `from` is `to`; gives its path.
    fn config_with(&self, from: &str, to: &str) -> Result<String> {
        let text = fs::read_to_string(self.guest.config())?;
        ensure!(text.contains(from), "the config has no {from:?}: {text}");
        let path = self.guest.dir().join("config.other");
        fs::write(&path, text.replace(from, to))?;
        Ok(path.to_string_lossy().into_owned())
    }

    /// The same as [`Run::command`], under the shim.
    fn under_shim(&self, args: &[&str], variable: &str, value: &str) -> Command {
        let args = self.named(args);
        let mut command = self.command(&args);
        command
            .env("LD_PRELOAD", SHIM)
            .env("FAULTFS_PROGRAM", "domsnap")
            .env("FAULTFS_ROOT", self.guest.dir());
        command.env(variable, value).stdout(Stdio::null()).stderr(Stdio::null());
        command
    }

    /// The operations on files at which its steps begin; it is done.
    fn steps(&self, args: &[&str]) -> Result<Vec<u64>> {
        let list = Path::new("/vm/operations");
        let _ = fs::remove_file(list);
        let status = self.under_shim(args, "FAULTFS_COUNT", &list.to_string_lossy()).status()?;
        ensure!(status.success(), "domsnap {} ended with {status}", args.join(" "));
        let counted: Vec<Counted> = counted(list)?.into_iter().filter(Counted::begins_a_step).collect();
        let steps: Vec<u64> = counted.iter().map(|done| done.number).collect();
        ensure!(steps.len() >= 3, "the shim saw {} steps", steps.len());
        println!("            {} steps: domsnap {}", steps.len(), args.join(" "));
        Ok(steps)
    }

    /// Kills it at one of them.
    fn inject(&self, args: &[&str], step: u64) -> Result<()> {
        let begun = Instant::now();
        let status = self.under_shim(args, "FAULTFS_KILL_AT", &step.to_string()).status()?;
        // It takes some steps in another order, or fewer of them, another time.
        ensure!(status.success() || status.signal() == Some(9), "killed at {step}, it ended with {status}");
        println!("{:>7} ms  killed at operation {step}: {status}", begun.elapsed().as_millis());
        Ok(())
    }

    fn names(&self) -> Result<Vec<String>> {
        let text = self.ok(&["list", "DOMAIN", "--json"])?;
        let document: serde_json::Value = serde_json::from_str(&text)?;
        let listed = document["snapshots"].as_array().context("no snapshots in the document")?;
        Ok(listed.iter().filter_map(|one| one["name"].as_str().map(str::to_owned)).collect())
    }

    /// Every file of the guest's directory but its own config. The name by which QEMU has an active image
    /// open, a second one of the same file, stays as long as the guest runs.
    fn files(&self) -> Result<Vec<String>> {
        let mut names = Vec::new();
        let mut active = Vec::new();
        for number in 0..self.guest.disks() {
            let disk = self.guest.disk(number);
            active.push((disk.to_owned(), fs::metadata(disk)?.ino()));
        }
        for entry in fs::read_dir(self.guest.dir())? {
            let entry = entry?;
            let inode = entry.metadata()?.ino();
            if active.iter().any(|(disk, ino)| *ino == inode && *disk != entry.path()) {
                continue;
            }
            let name = entry.file_name().to_string_lossy().into_owned();
            if !["config", "config.other", "state"].contains(&name.as_str()) && !name.ends_with(".domsnap") {
                names.push(name);
            }
        }
        names.sort();
        Ok(names)
    }
}

/// Of the guest's pause, what xl and QEMU took, and what is domsnap's own: reported, not judged, for machines
/// differ.
fn report_pause(log: &str) -> Result<()> {
    let (_, rest) = log.split_once("the pause begins").context("the log has no pause")?;
    let end =
        rest.lines().position(|line| line.contains("the pause ends")).context("the pause does not end")?;
    let took = |line: &str| line.split_once("took_us=")?.1.split_whitespace().next()?.parse::<u64>().ok();
    let lines: Vec<&str> = rest.lines().take(end + 1).collect();
    let all = lines.last().and_then(|line| took(line)).context("the pause has no length")?;
    // Requests for several disks overlap: time in which any of them waits for an answer counts once.
    let busy = |what: &[&str]| {
        let asked = lines.iter().filter(|line| what.iter().any(|what| line.contains(what)));
        let mut spans: Vec<(u64, u64)> = asked
            .filter_map(|line| {
                let ended = line.split_whitespace().next()?.strip_suffix('s')?.parse::<f64>().ok()? * 1e6;
                Some(((ended as u64).saturating_sub(took(line)?), ended as u64))
            })
            .collect();
        spans.sort_unstable();
        let mut until = 0;
        spans.iter().fold(0, |sum, (from, to)| {
            let added = to.saturating_sub(until.max(*from));
            until = until.max(*to);
            sum + added
        })
    };
    let (xl, qemu, both) =
        (busy(&["xl ended"]), busy(&["QEMU answered"]), busy(&["xl ended", "QEMU answered"]));
    ensure!(xl > 0 && qemu > 0 && all > both, "{all} us in all, {xl} of xl, {qemu} of QEMU: {rest}");
    println!("the pause: {all} us; xl {xl}, QEMU {qemu}, our own {}", all - both);
    Ok(())
}

fn mixed() -> Result<()> {
    let mut run = Run::start("mixed", &[Backend::Qcow2, Backend::Qcow2, Backend::LvmThin])?;
    let blank = volumes()?;
    refuses_replaced_images(&run)?;
    let mut ticks = vec![run.guest.ticks()?];
    let reported =
        run.logged(&["create", "DOMAIN", "s1", "--disk", "xvda=internal", "--disk", "xvdb=external"])?;
    ensure!(reported.out.contains("guest paused for"), "the pause is not reported: {}", reported.out);
    println!("LOG {}", reported.err);
    report_pause(&reported.err)?;
    ticks.push(run.guest.ticks()?);
    run.ok(&["create", "DOMAIN", "s2", "--external"])?;
    ticks.push(run.guest.ticks()?);
    run.guest.expect_no_bad()?;
    let domid = run.guest.domid()?;
    run.revert_between("s1", ticks[0], ticks[1])?;
    ensure!(run.guest.domid()? != domid, "the domain's number did not change, so this shows nothing");
    run.revert_between("s2", ticks[1], ticks[2])?;
    // A point that was reverted to before; then what xl does by itself, which knows of no snapshot.
    run.revert_between("s1", ticks[0], ticks[1])?;
    let save = run.guest.dir().join("plain");
    let save = save.to_string_lossy();
    xl(&["save", "mixed", &save])?;
    xl(&["restore", &save])?;
    fs::remove_file(&*save)?;
    run.guest.expect_no_bad()?;
    let shown = run.ok(&["show", "DOMAIN", "s1"])?;
    ensure!(shown.contains("memory"), "its memory is not shown: {shown}");
    disk_only(&mut run).context("disks alone")?;
    run.ok(&["delete", "DOMAIN", "s1", "s2"])?;
    run.guest.expect_no_bad()?;
    ensure!(run.files()? == ["xvda.qcow2", "xvdb.qcow2"], "left behind: {:?}", run.files()?);
    ensure!(volumes()? == blank, "left behind: {:?}", volumes()?);
    let place = run.guest.place();
    run.guest.ask("reboot")?;
    run.guest.await_boot_since(place)?;
    run.guest.expect_no_bad()
}

fn thick() -> Result<()> {
    let mut run = Run::start("thick", &[Backend::Qcow2, Backend::Lvm])?;
    let blank = volumes()?;
    let before = run.guest.ticks()?;
    run.ok(&["create", "DOMAIN", "s1"])?;
    let after = run.guest.ticks()?;
    run.revert_between("s1", before, after)?;
    run.ok(&["delete", "DOMAIN", "s1"])?;
    run.guest.expect_no_bad()?;
    ensure!(volumes()? == blank, "left behind: {:?}", volumes()?);
    Ok(())
}

/// What the names of two disks lead to is replaced, an image that QEMU serves and a volume that the kernel
/// serves: nothing is done by such a name.
fn refuses_replaced_images(run: &Run) -> Result<()> {
    let (image, away) = (run.guest.dir().join("xvda.qcow2"), run.guest.dir().join("away"));
    fs::rename(&image, &away)?;
    fs::copy(&away, &image)?;
    run.refused(&["create", "DOMAIN", "s1"], 3, "moved or replaced")?;
    fs::rename(&away, &image)?;

    let listed = volumes()?;
    let volume = listed.iter().find(|name| name.ends_with("-c")).context("no volume of the third disk")?;
    let lvm = |args: &[&str]| program(&format!("/sbin/{}", args[0]), &args[1..])?.ok();
    lvm(&["lvrename", "-q", "domsnap", volume, "away"])?;
    lvm(&["lvcreate", "-qy", "-L", "64M", "-n", volume, "domsnap"])?;
    run.refused(&["create", "DOMAIN", "s1"], 3, "another device than the one")?;
    lvm(&["lvremove", "-fq", &format!("domsnap/{volume}")])?;
    lvm(&["lvrename", "-q", "domsnap", "away", volume])?;
    Ok(())
}

fn volumes() -> Result<Vec<String>> {
    let listed = program("/sbin/lvs", &["--noheadings", "-o", "lv_name"])?.ok()?;
    Ok(listed.split_whitespace().map(str::to_owned).collect())
}

/// Disks alone, by the commands that the design paper gave to `xl`, with name, number and configuration file.
/// The third disk is a volume, for which the guest has the same.
fn disk_only(run: &mut Run) -> Result<()> {
    let (name, domid) =
        (run.guest.name().to_owned(), run.guest.domid()?.context("it has no number")?.to_string());
    let config = run.guest.dir().join("config.snapshot");
    std::fs::write(
        &config,
        "name = 'disks'  # external\ndisks = [ ',,hda',\n 'vdev=xvdb', ',,xvdc' ]; type = \"external\"\n",
    )?;
    let before = run.guest.ticks()?;
    run.ok(&["xl", "snapshot-create", &config.to_string_lossy(), &name])?;
    std::fs::remove_file(config)?;
    let after = run.guest.ticks()?;
    run.guest.expect_no_bad()?;
    let listed = run.ok(&["xl", "snapshot-list", "-l", &domid])?;
    let row = listed.lines().find(|line| line.contains(" disks ")).context("the snapshot is not listed")?;
    ensure!(
        row.ends_with("r----       Yes") && listed.contains("      xvdb             -     qcow2 /"),
        "{listed}"
    );
    let place = run.guest.place();
    run.ok(&["xl", "snapshot-revert", "-n", "disks", &name])?;
    run.guest.await_boot_since(place)?;
    let counters = run.guest.wait_for(place, "the counters at the boot", |text| {
        let line = text.lines().find(|line| line.starts_with("READY "))?;
        let counters = line.split_once("counters=")?.1;
        Some(counters.split(',').filter_map(|one| one.trim().parse::<u64>().ok()).collect::<Vec<_>>())
    })?;
    ensure!(counters.len() == 3, "its disks had {counters:?}");
    for counter in counters {
        ensure!(
            (before..=after).contains(&counter),
            "a disk was at {counter}, not between {before} and {after}"
        );
    }
    run.ok(&["xl", "snapshot-delete", "-n", "disks", &name])?;
    ensure!(run.names()? == ["s1", "s2"], "its snapshots are {:?}", run.names()?);
    run.guest.expect_no_bad()
}

fn away() -> Result<()> {
    let mut run = Run::start("away", &[Backend::Qcow2, Backend::Qcow2])?;
    let before = run.guest.ticks()?;
    run.ok(&["create", "DOMAIN", "s1", "--external"])?;
    let after = run.guest.ticks()?;
    previous_guest_comes_back(&mut run).context("a revert whose domain cannot be made")?;
    name_taken(&mut run).context("a name that another domain takes")?;
    run.ok(&["create", "DOMAIN", "s2", "--internal", "--disk-only"])?;
    xl(&["destroy", "away"])?;
    // It is known by now, also when nothing runs.
    run.ok(&["create", "DOMAIN", "s3", "--external"])?;
    run.revert_between("s1", before, after)?;
    xl(&["destroy", "away"])?;
    run.ok(&["delete", "DOMAIN", "s1", "s2", "s3"])?;
    ensure!(run.files()? == ["xvda.qcow2", "xvdb.qcow2"], "left behind: {:?}", run.files()?);
    run.guest.create()?;
    run.guest.expect_no_bad()
}

fn refusals() -> Result<()> {
    let mut run = Run::start("refused", &[Backend::Qcow2])?;
    // While nothing knows that the image is a domain's.
    open_elsewhere(&run).context("an image that is open elsewhere")?;
    plain_file(&run).context("a file that the kernel serves")?;
    full_disk(&mut run).context("a full disk")?;
    paused(&run).context("a paused guest")?;
    truncated(&run).context("a memory image that was cut short")?;
    other_config(&run).context("a config of another domain")?;
    attached_later(&run).context("a disk that is attached later")
}

fn paused(run: &Run) -> Result<()> {
    xl(&["pause", run.guest.name()])?;
    run.refused(&["create", "DOMAIN", "pm"], 3, "--disk-only")?;
    ensure!(run.guest.is_paused()?, "a guest that was paused runs");
    run.ok(&["create", "DOMAIN", "p", "--disk-only", "--external"])?;
    ensure!(run.guest.is_paused()?, "a guest that was paused runs");
    xl(&["unpause", run.guest.name()])?;
    run.guest.expect_no_bad()
}

fn full_disk(run: &mut Run) -> Result<()> {
    let small = Path::new(MEMORY);
    fs::create_dir_all(small)?;
    program("/bin/mount", &["-t", "tmpfs", "-o", "size=20m", "small", MEMORY])?.ok()?;
    let tried = (|| -> Result<()> {
        run.ok(&["domain", "add", "refused", "--xen", "refused", "--memory-dir", MEMORY])?;
        run.domain = "refused".to_owned();
        run.refused(&["create", "DOMAIN", "f", "--external"], 1, "No space left")?;
        run.guest.expect_no_bad()?;
        ensure!(run.files()? == ["xvda.qcow2"], "left behind: {:?}", run.files()?);
        let left: Vec<_> = fs::read_dir(small)?.filter_map(|entry| Some(entry.ok()?.file_name())).collect();
        ensure!(left.is_empty(), "left behind: {left:?}");
        // The previous domain's memory has no room either: nothing is touched.
        run.ok(&["create", "DOMAIN", "d", "--disk-only", "--external"])?;
        run.refused(&["revert", "DOMAIN", "d"], 1, "--no-safety")?;
        run.guest.expect_no_bad()
    })();
    // Then it is a directory like others.
    program("/bin/umount", &["-l", MEMORY])?.ok()?;
    tried
}

/// Where the memory of the guest to which nothing happens is saved.
const MEMORY: &str = "/vm/small";

fn memory_image() -> Result<PathBuf> {
    let mut below = vec![PathBuf::from(MEMORY)];
    while let Some(dir) = below.pop() {
        for entry in fs::read_dir(dir)? {
            let path = entry?.path();
            if path.is_dir() {
                below.push(path);
            } else if path.extension().is_some_and(|end| end == "memory") {
                return Ok(path);
            }
        }
    }
    bail!("there is no memory image")
}

fn truncated(run: &Run) -> Result<()> {
    run.ok(&["create", "DOMAIN", "m", "--external"])?;
    let image = memory_image()?;
    let files = run.files()?;
    let length = fs::metadata(&image)?.len();
    fs::File::options().write(true).open(&image)?.set_len(length / 2)?;
    run.refused(&["revert", "DOMAIN", "m"], 1, "was saved with")?;
    ensure!(run.files()? == files, "it changed files: {:?}", run.files()?);
    run.guest.expect_no_bad()
}

fn previous_guest_comes_back(run: &mut Run) -> Result<()> {
    let present = run.guest.ticks()?;
    // A config that Xen cannot make a domain from: one more disk, which is missing.
    let missing = "disk=[ \"format=qcow2,vdev=xvdz,access=rw,target=/vm/nowhere.qcow2\", ";
    let wrong = run.config_with("disk=[ ", missing)?;
    let domid = run.guest.domid()?;
    let place = run.guest.place();
    let said = run.domsnap(&["revert", "DOMAIN", "s1", "--config", &wrong])?;
    ensure!(said.status == 1, "it ended with {}", said.status);
    ensure!(run.guest.domid()?.is_some() && run.guest.domid()? != domid, "the previous domain is not back");
    let first = run.guest.first_tick_since(place)?;
    ensure!(first >= present, "it goes on at {first}, and was at {present}");
    run.guest.expect_no_bad()?;
    let left: Vec<_> = run.files()?.into_iter().filter(|name| name.contains("domsnap-")).collect();
    ensure!(left.is_empty(), "left behind: {left:?}");
    Ok(())
}

fn other_config(run: &Run) -> Result<()> {
    for (from, to, says) in [
        ("name=\"refused\"", "name=\"twin\"", "is that of a domain twin"),
        ("refused/xvda.qcow2", "blank.qcow2", "which is"),
        ("vdev=xvda", "vdev=xvdb", "has no disk xvda"),
        ("memory=", "memory=lots", "xl create"),
    ] {
        let config = run.config_with(from, to)?;
        run.refused(&["revert", "DOMAIN", "d", "--config", &config], 3, says)?;
    }
    run.refused(&["revert", "DOMAIN", "d", "--config", "/vm/nowhere"], 3, "no config file")?;
    run.guest.expect_no_bad()
}

fn name_taken(run: &mut Run) -> Result<()> {
    let present = run.guest.ticks()?;
    let all = fs::read_to_string(run.guest.config())?;
    let disks = all.lines().find(|line| line.starts_with("disk=")).context("the config has no disks")?;
    // A guest without disks, which looks for none.
    let other = run.config_with(disks, "disk=[]")?;
    let text = fs::read_to_string(&other)?;
    ensure!(text.contains("domsnap.disks=2"), "the guest is not informed of two disks: {text}");
    fs::write(&other, text.replace("domsnap.disks=2", "domsnap.disks=0"))?;
    let held = HeldXl::after("destroy", run.guest.dir())?;
    let mut revert = start(run, &["revert", "DOMAIN", "s1"])?;
    wait_until(&mut revert, "the domain is away", || held.is_reached())?;
    ensure!(is_away("away"), "xl destroy has ended, and the domain is there");
    // It has never run, as one that the revert itself created: only its disks distinguish them.
    xl(&["create", "-p", "-q", &other])?;
    let theirs = run.guest.domid()?;
    drop(held);
    let output = revert.wait_with_output()?;
    let said = String::from_utf8_lossy(&output.stderr);
    print!("{said}");
    ensure!(output.status.code() == Some(4), "it ended with {}", output.status);
    ensure!(said.contains("another domain away (number"), "it does not say so");
    run.refused(&["recover", "DOMAIN"], 3, "another domain away (number")?;
    xl(&["unpause", "away"])?;
    run.refused(&["recover", "DOMAIN"], 3, "another domain away (number")?;
    ensure!(run.guest.domid()? == theirs, "another's domain was destroyed");
    xl(&["destroy", "away"])?;
    let place = run.guest.place();
    run.ok(&["recover", "DOMAIN"])?;
    let first = run.guest.first_tick_since(place)?;
    ensure!(first >= present, "it goes on at {first}, and was at {present}: the revert was not undone");
    run.guest.expect_no_bad()
}

/// An `xl` that waits after one of its verbs until this is dropped. A domain is away for an instant that
/// differs from machine to machine: who looks for it may come too late.
struct HeldXl {
    hold: PathBuf,
    reached: PathBuf,
}

impl HeldXl {
    const XL: &str = "/usr/sbin/xl";
    const ASIDE: &str = "/usr/sbin/xl.aside";

    fn after(verb: &str, dir: &Path) -> Result<Self> {
        let program = fs::read_dir("/usr/lib")?
            .filter_map(|entry| Some(entry.ok()?.path().join("bin/xl")))
            .find(|path| path.is_file())
            .context("no directory of /usr/lib has a bin/xl")?;
        let held = Self { hold: dir.join("xl.hold"), reached: dir.join("xl.reached") };
        let script = format!(
            "#!/bin/sh\n[ \"$1\" = {verb} ] || exec {xl} \"$@\"\n{xl} \"$@\"\nstatus=$?\n: > {reached}\n\
             while [ -e {hold} ]; do /bin/busybox usleep 50000; done\nexit $status\n",
            xl = program.display(),
            reached = held.reached.display(),
            hold = held.hold.display(),
        );
        fs::write(&held.hold, "")?;
        fs::rename(Self::XL, Self::ASIDE)?;
        fs::write(Self::XL, script)?;
        fs::set_permissions(Self::XL, fs::Permissions::from_mode(0o755))?;
        Ok(held)
    }

    fn is_reached(&self) -> bool {
        self.reached.exists()
    }
}

impl Drop for HeldXl {
    fn drop(&mut self) {
        // The others of this machine's tests need the real one, also after a failure.
        fs::rename(Self::ASIDE, Self::XL).expect("/usr/sbin is in memory");
        for file in [&self.hold, &self.reached] {
            let _ = fs::remove_file(file);
        }
    }
}

/// Whether the domain of a name is not there.
fn is_away(name: &str) -> bool {
    program("/usr/sbin/xl", &["domid", name]).is_ok_and(|said| said.status != 0)
}

fn start(run: &Run, args: &[&str]) -> Result<Child> {
    let args = run.named(args);
    Ok(run.command(&args).stdout(Stdio::null()).stderr(Stdio::piped()).spawn()?)
}

fn wait_until(process: &mut Child, what: &str, happened: impl Fn() -> bool) -> Result<()> {
    let until = Instant::now() + Duration::from_secs(120);
    while !happened() {
        if let Some(status) = process.try_wait()? {
            bail!("the process ended ({status}) before {what}");
        }
        ensure!(Instant::now() < until, "the process did not get so far that {what}");
        thread::sleep(Duration::from_millis(10));
    }
    Ok(())
}

/// Starts domsnap, and kills it when something is so.
fn kill_when(run: &Run, args: &[&str], what: &str, happened: impl Fn() -> bool) -> Result<()> {
    let mut child = start(run, args)?;
    wait_until(&mut child, what, happened)?;
    child.kill()?;
    child.wait()?;
    println!("            killed domsnap {} when {what}", args.join(" "));
    Ok(())
}

/// Whether memory is being saved for a snapshot of the guest in this directory.
fn is_saving(guest: &Path) -> bool {
    let entries = fs::read_dir(guest.join("xvda.qcow2.domsnap")).into_iter().flatten().flatten();
    entries
        .filter(|entry| entry.file_name().to_string_lossy().ends_with(".part"))
        .any(|entry| entry.metadata().is_ok_and(|about| about.len() > 0))
}

fn killed_in_create() -> Result<()> {
    let run = Run::start("increate", &[Backend::Qcow2, Backend::Qcow2])?;
    let saves = || is_saving(run.guest.dir());
    // In the middle of the save: xl goes on alone, and leaves the guest paused.
    kill_when(&run, &["create", "DOMAIN", "k", "--external"], "memory is being saved", saves)?;
    run.ok(&["recover", "DOMAIN"])?;
    run.guest.expect_no_bad()?;
    ensure!(run.names()?.is_empty(), "a snapshot that did not happen is listed");
    let args = ["create", "DOMAIN", "k", "--disk-only", "--disk", "xvda=internal", "--disk", "xvdb=external"];
    for step in run.steps(&args)? {
        if !run.names()?.is_empty() {
            run.ok(&["delete", "DOMAIN", "k"])?;
        }
        run.inject(&args, step)?;
        run.ok(&["recover", "DOMAIN"]).with_context(|| format!("killed at {step}"))?;
        run.guest.expect_no_bad()?;
        ensure!(!run.guest.is_paused()?, "killed at {step}, it leaves the guest paused");
    }
    if !run.names()?.is_empty() {
        run.ok(&["delete", "DOMAIN", "k"])?;
    }
    ensure!(run.files()? == ["xvda.qcow2", "xvdb.qcow2"], "left behind: {:?}", run.files()?);
    Ok(())
}

fn killed_in_revert() -> Result<()> {
    let mut run = Run::start("inrevert", &[Backend::Qcow2, Backend::LvmThin])?;
    let before = run.guest.ticks()?;
    run.ok(&["create", "DOMAIN", "s1", "--external"])?;
    let after = run.guest.ticks()?;
    let places = ["revert", "previous"].map(|end| run.guest.dir().join(format!("inrevert.domsnap-{end}")));
    let args = ["revert", "DOMAIN", "s1"];
    let (mut started, mut went_on) = (false, false);
    for step in run.steps(&args)? {
        let present = run.guest.ticks()?;
        run.inject(&args, step)?;
        let note = fs::read_to_string(&places[0]).unwrap_or_default();
        if !started && note.contains("\"left\":[{") && is_away("inrevert") {
            // A user who does not know starts it and ends it. Its previous memory does not fit the
            // disks any more.
            run.guest.create()?;
            run.guest.ticks()?;
            xl(&["destroy", "inrevert"])?;
            run.ok(&["recover", "DOMAIN"])?;
            started = true;
            if is_away("inrevert") {
                fs::remove_file(&places[1])?;
                run.guest.create()?;
            }
        } else {
            let said = run.ok(&["recover", "DOMAIN"]).with_context(|| format!("killed at {step}"))?;
            if said.contains("undone: it did not happen") {
                let now = run.guest.ticks()?;
                ensure!(now >= present, "killed at {step} and undone, it goes on at {now}, from {present}");
                went_on = true;
            }
        }
        // The current state or the snapshot, and one of them wholly: the guest itself compares.
        run.guest.expect_no_bad().with_context(|| format!("killed at {step}"))?;
        ensure!(!run.guest.is_paused()?, "killed at {step}, it leaves the guest paused");
        for place in &places {
            ensure!(!place.exists(), "killed at {step}, it leaves {} behind", place.display());
        }
    }
    ensure!(started, "no step found the domain away");
    ensure!(went_on, "no step was undone");
    run.revert_between("s1", before, after)
}

/// SIGKILL for each `xl` with this word.
fn kill_xl(word: &str) -> Result<()> {
    let mut killed = 0;
    for entry in fs::read_dir("/proc")? {
        let entry = entry?;
        let line = fs::read(entry.path().join("cmdline")).unwrap_or_default();
        let args: Vec<&[u8]> = line.split(|byte| *byte == 0).collect();
        if args.first().is_some_and(|first| first.ends_with(b"/xl")) && args.get(1) == Some(&word.as_bytes())
        {
            program("/bin/kill", &["-9", &entry.file_name().to_string_lossy()])?.ok()?;
            killed += 1;
        }
    }
    ensure!(killed > 0, "no `xl {word}` was there to be killed");
    Ok(())
}

fn killed_with_xl() -> Result<()> {
    let mut run = Run::start("killedxl", &[Backend::Qcow2])?;
    let saves = || is_saving(run.guest.dir());
    kill_when(&run, &["create", "DOMAIN", "k1", "--external"], "memory is being saved", saves)?;
    kill_xl("save")?;
    // The guest is suspended, and all of it is there.
    run.ok(&["recover", "DOMAIN"])?;
    run.guest.expect_no_bad()?;
    ensure!(run.names()?.is_empty(), "a snapshot that did not happen is listed");
    ensure!(run.files()? == ["xvda.qcow2"], "left behind: {:?}", run.files()?);

    let before = run.guest.ticks()?;
    run.ok(&["create", "DOMAIN", "s1", "--external"])?;
    let after = run.guest.ticks()?;
    let note = run.guest.dir().join("killedxl.domsnap-revert");
    let (domid, present) = (run.guest.domid()?, run.guest.ticks()?);
    let is_half_made = || note.exists() && run.guest.domid().is_ok_and(|now| now.is_some() && now != domid);
    kill_when(&run, &["revert", "DOMAIN", "s1"], "the domain is half made", is_half_made)?;
    kill_xl("restore")?;
    let place = run.guest.place();
    run.ok(&["recover", "DOMAIN"])?;
    let first = run.guest.first_tick_since(place)?;
    ensure!(first >= present, "it goes on at {first}, and was at {present}: the revert was not undone");
    run.guest.expect_no_bad()?;
    run.revert_between("s1", before, after)?;
    // An xl that is killed alone: domsnap sees it end, and undoes what it did.
    let place = run.guest.place();
    let dir = run.guest.dir().to_owned();
    let killing = thread::spawn(move || {
        let until = Instant::now() + Duration::from_secs(120);
        while !is_saving(&dir) {
            ensure!(Instant::now() < until, "memory was not saved");
            thread::sleep(Duration::from_millis(10));
        }
        kill_xl("save")
    });
    let said = run.domsnap(&["create", "DOMAIN", "k2", "--external"])?;
    killing.join().map_err(|_| anyhow::anyhow!("the thread that kills xl panicked"))??;
    ensure!(said.status == 1, "it ended with {}", said.status);
    run.guest.first_tick_since(place)?;
    run.guest.expect_no_bad()?;
    ensure!(run.names()? == ["s1"], "its snapshots are {:?}", run.names()?);
    Ok(())
}

fn open_elsewhere(run: &Run) -> Result<()> {
    let image = run.guest.disk(0).to_string_lossy().into_owned();
    for args in [&["create", image.as_str(), "s1"][..], &["disk", "create", image.as_str(), "s1"]] {
        run.refused(args, 3, "is open in refused")?;
    }
    run.guest.expect_no_bad()?;
    let known = program("/usr/bin/qemu-img", &["snapshot", "-l", "-U", &image])?.ok()?;
    ensure!(!known.contains("s1"), "a snapshot was written into an image that is open: {known}");
    Ok(())
}

/// A plain file that the kernel serves, with advice on how to change that.
fn plain_file(run: &Run) -> Result<()> {
    let (file, name) = (run.guest.dir().join("plain.raw"), run.guest.name());
    fs::File::create(&file)?.set_len(16 << 20)?;
    xl(&["block-attach", name, &format!("format=raw,vdev=xvdd,access=rw,target={}", file.display())])?;
    run.refused(&["create", "DOMAIN", "s1"], 3, "backendtype=qdisk")?;
    let scanned = run.ok(&["domain", "scan"])?;
    ensure!(
        scanned.contains("left out") && scanned.contains("backendtype=qdisk"),
        "the scan does not say it: {scanned}"
    );
    ensure!(!scanned.contains("qemu:"), "the server of its disks is shown as a domain: {scanned}");
    ensure!(run.files()? == ["plain.raw", "xvda.qcow2"], "left behind: {:?}", run.files()?);
    xl(&["block-detach", name, "xvdd"])?;
    fs::remove_file(file)?;
    run.guest.expect_no_bad()
}

/// A disk that is attached to a running domain is in its snapshots, or they are refused by its name; one that
/// was detached is no hindrance.
fn attached_later(run: &Run) -> Result<()> {
    let (image, name) = (run.guest.dir().join("xvdc.qcow2"), run.guest.name());
    let image = image.to_string_lossy();
    program("/usr/bin/qemu-img", &["create", "-q", "-f", "qcow2", &image, "64M"])?;
    xl(&["block-attach", name, &format!("format=qcow2,vdev=xvdc,access=rw,target={image}")])?;
    run.refused(&["create", "DOMAIN", "s2"], 3, "xvdc")?;
    run.ok(&["create", "DOMAIN", "s2", "--disk-only", "--disk", "xvdc=skip"])?;
    let shown = run.ok(&["show", "DOMAIN", "s2"])?;
    ensure!(shown.contains("xvdc") && shown.contains("skipped"), "the record does not say it: {shown}");
    run.ok(&["domain", "disk", "add", "DOMAIN", &format!("xvdc={image},format=qcow2")])?;
    run.ok(&["create", "DOMAIN", "s3", "--disk-only", "--external"])?;
    let shown = run.ok(&["show", "DOMAIN", "s3", "--json"])?;
    ensure!(shown.contains("\"xvdc\""), "the disk is not in the snapshot: {shown}");
    xl(&["block-detach", name, "xvdc"])?;
    run.ok(&["delete", "DOMAIN", "s2"])?;
    run.ok(&["create", "DOMAIN", "s4", "--disk-only", "--external", "--disk", "xvdc=skip"])?;
    run.guest.expect_no_bad()
}

/// The daemon that makes a file of a served disk, killed when this is dropped.
struct FileOfDisk(Child);

impl FileOfDisk {
    /// The file at `point`, which exists and is empty, has the content of the served disk from then on.
    fn start(socket: &Path, point: &Path) -> Result<Self> {
        program("/sbin/modprobe", &["fuse"])?.ok()?;
        let daemon = Command::new("/usr/bin/qemu-storage-daemon")
            .arg("--blockdev")
            .arg(format!(
                "driver=nbd,node-name=disk,reconnect-delay=60,server.type=unix,server.path={}",
                socket.display()
            ))
            .arg("--export")
            .arg(format!("type=fuse,id=file,node-name=disk,writable=on,mountpoint={}", point.display()))
            .stdin(Stdio::null())
            .spawn()
            .context("qemu-storage-daemon")?;
        let mut daemon = Self(daemon);
        let has_content = || fs::metadata(point).is_ok_and(|about| about.len() > 0);
        wait_until(&mut daemon.0, "the file has the disk's size", has_content)?;
        Ok(daemon)
    }
}

impl Drop for FileOfDisk {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn serve_vhd(image: &Path, socket: &Path) -> Result<Server> {
    let mut command = Command::new(DOMSNAP);
    command.args(["disk", "serve"]).stdin(Stdio::null());
    Server::spawn(command, socket, &[&format!("{},format=vhd", image.display())])
}

fn served_vhd() -> Result<()> {
    let mut guest = DomU::defined("served", &[Backend::RawQdisk])?;
    let (dir, file) = (guest.dir().to_owned(), guest.disk(0).to_owned());
    let (base, child) = (dir.join("base.vhd"), dir.join("child.vhd"));
    program(
        "/usr/bin/qemu-img",
        &["convert", "-fraw", "-Ovpc", "-oforce_size=on", &file.to_string_lossy(), &base.to_string_lossy()],
    )?
    .ok()?;
    let content = fs::read(&file)?;
    // An empty file, so that nothing but the served disk can have the guest's file system.
    fs::File::create(&file)?;
    let socket = dir.join("disk.sock");
    let mut server = serve_vhd(&base, &socket)?;
    let exported = FileOfDisk::start(&socket, &file)?;
    ensure!(fs::read(&file)? == content, "the file does not read as the served disk");
    guest.create()?;
    guest.expect_no_bad()?;

    server.ask(&json!({ "do": "snapshot", "child": child, "id": "6ba7b810-9dad-11d1-80b4-00c04fd430c8" }))?;
    let frozen = fs::read(&base)?;
    guest.expect_no_bad()?;
    server.kill()?;
    let server = serve_vhd(&child, &socket)?;
    guest.expect_no_bad()?;
    ensure!(fs::read(&base)? == frozen, "the snapshot changes");
    ensure!(fs::metadata(&child)?.len() > 2 << 20, "the guest writes elsewhere");

    // What domsnap cannot do to such a disk it says before it begins.
    let run = Run { state: dir.join("state"), domain: "xen:served".to_owned(), guest };
    run.refused(&["create", "DOMAIN", "s1"], 3, "xvda")?;
    xl(&["destroy", "served"])?;
    drop(exported);
    drop(server);
    let read = dir.join("read.raw");
    let (child, read) = (child.to_string_lossy(), read.to_string_lossy());
    run.ok(&["disk", "materialise", &format!("{child},format=vhd"), &read, "--format", "raw"])?;
    program("/sbin/e2fsck", &["-fp", &read])?;
    ensure!(program("/sbin/e2fsck", &["-fn", &read])?.status == 0, "the disk is damaged");
    Ok(())
}
