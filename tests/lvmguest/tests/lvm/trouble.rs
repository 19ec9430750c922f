//! What is full, overflowed or in the way: reported before it is needed, refused before anything is touched.

use std::fs::OpenOptions;
use std::io::{Read, Seek, SeekFrom};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::process::{Command, Stdio};

use anyhow::{Context, Result, ensure};
use lvmguest::TestCase;
use lvmguest::inside::{asked, domsnap, done, fill, refused, snapshots, succeed, write_block};
use rustix::fs::OFlags;

use crate::matrix::{Sort, expect, group, volume, volumes};

fn overflowed_snapshot_is_reported_early() -> Result<()> {
    group(Sort::Thick)?;
    let path = volume(Sort::Thick, "root")?.path();
    write_block(&path, 0, b'a')?;
    done(&["create", &path, "lost", "--lvm-area", "10"])?;
    fill(&path, 20)?;
    write_block(&path, 0, b'b')?;
    done(&["create", &path, "whole", "--lvm-area", "100"])?;
    let checked = domsnap(&["check", &path])?;
    let said = format!("{}{}", checked.stdout, checked.stderr);
    ensure!(said.contains("overflowed") && said.contains("lost"), "{checked}");
    refused(&["revert", &path, "lost"], &["overflowed", "no changes made"])?;
    expect(&path, 0, b'b')?;
    write_block(&path, 0, b'c')?;
    done(&["revert", &path, "whole"])?;
    expect(&path, 0, b'b')?;
    done(&["delete", &path, "lost"])?;
    ensure!(snapshots(&path)? == ["whole"], "{:?}", snapshots(&path)?);
    Ok(())
}

fn an_area_that_fills_up_is_warned_of_with_the_command_that_grows_it() -> Result<()> {
    group(Sort::Thick)?;
    let path = volume(Sort::Thick, "root")?.path();
    done(&["create", &path, "s", "--lvm-area", "30"])?;
    // 16 MiB of area: 32 MiB * 30 % in whole extents, and one more.
    fill(&path, 14)?;
    let checked = domsnap(&["check", &path])?;
    let said = format!("{}{}", checked.stdout, checked.stderr);
    ensure!(said.contains("lvextend -L+") && said.contains("%"), "{checked}");
    let reported = domsnap(&["create", &path, "t", "--lvm-area", "100"])?;
    ensure!(
        reported.status == Some(0) && format!("{}{}", reported.stdout, reported.stderr).contains("lvextend"),
        "{reported}"
    );
    Ok(())
}

fn a_group_without_room_is_refused_with_figures() -> Result<()> {
    group(Sort::Thick)?;
    let (one, two) = (volume(Sort::Thick, "one")?.path(), volume(Sort::Thick, "two")?.path());
    let before = volumes()?;
    succeed(Command::new("lvcreate").args(["-q", "-y", "-Wn", "-n", "filler", "-L", "900M", "vg"]))?;
    // Some 40 MiB are left: enough for each alone, and not for both.
    let domain = format!("{one},{two}");
    refused(
        &["create", &domain, "s", "--lvm-area", "100"],
        &["is free", "other disks of this operation", "vgextend"],
    )?;
    done(&["create", &domain, "s", "--lvm-area", "20"])?;
    refused(&["create", &domain, "t", "--lvm-area", "100"], &["is free"])?;
    ensure!(volumes()?.len() == before.len() + 3, "{:?}", volumes()?);
    Ok(())
}

fn a_pool_that_is_nearly_full_is_refused_with_figures() -> Result<()> {
    group(Sort::Thin)?;
    let path = volume(Sort::Thin, "root")?.path();
    done(&["create", &path, "s"])?;
    succeed(Command::new("lvcreate").args([
        "-q",
        "-y",
        "-Wn",
        "-n",
        "big",
        "-V",
        "256M",
        "--thinpool",
        "vg/tp",
    ]))?;
    fill("/dev/vg/big", 194)?;
    let before = volumes()?;
    refused(&["create", &path, "t"], &["vg/tp", "95 %", "lvextend -L+SIZE vg/tp", "is free in the group"])?;
    refused(&["revert", &path, "s"], &["vg/tp"])?;
    ensure!(volumes()? == before, "{:?}", volumes()?);
    let checked = domsnap(&["check", &path])?;
    ensure!(format!("{}{}", checked.stdout, checked.stderr).contains("vg/tp"), "{checked}");
    succeed(Command::new("lvextend").args(["-q", "-L", "+100M", "vg/tp"]))?;
    done(&["create", &path, "t"])?;
    Ok(())
}

fn a_merge_that_would_overflow_another_point_is_refused() -> Result<()> {
    group(Sort::Thick)?;
    let path = volume(Sort::Thick, "root")?.path();
    write_block(&path, 0, b'a')?;
    done(&["create", &path, "early", "--lvm-area", "100"])?;
    fill(&path, 16)?;
    write_block(&path, 0, b'b')?;
    done(&["create", &path, "late", "--lvm-area", "10"])?;
    refused(&["revert", &path, "early"], &["would overflow", "lvextend"])?;
    expect(&path, 0, b'b')?;
    done(&["delete", &path, "late"])?;
    done(&["revert", &path, "early"])?;
    expect(&path, 0, b'a')
}

fn a_snapshot_made_by_hand_is_not_overflown_by_a_merge() -> Result<()> {
    group(Sort::Thick)?;
    let path = volume(Sort::Thick, "root")?.path();
    write_block(&path, 0, b'a')?;
    done(&["create", &path, "early", "--lvm-area", "100"])?;
    fill(&path, 16)?;
    succeed(Command::new("lvcreate").args(["-q", "-y", "-s", "-n", "by_hand", "-L", "8M", "vg/root"]))?;
    refused(&["revert", &path, "early"], &["by_hand would overflow", "lvextend"])?;
    succeed(Command::new("lvremove").args(["-q", "-y", "vg/by_hand"]))?;
    done(&["revert", &path, "early"])?;
    expect(&path, 0, b'a')
}

fn a_point_that_another_process_has_open_is_not_merged_later() -> Result<()> {
    group(Sort::Thick)?;
    let path = volume(Sort::Thick, "root")?.path();
    write_block(&path, 0, b'a')?;
    done(&["create", &path, "s"])?;
    write_block(&path, 0, b'b')?;
    let before = volumes()?;
    let point = before.iter().find(|name| *name != "root").cloned().unwrap_or_default();
    let reader = std::fs::File::open(format!("/dev/vg/{point}"))?;
    let failed = domsnap(&["revert", &path, "s"])?;
    // Whatever it ended with, nothing is left that lvm does by itself at the next activation.
    ensure!(
        failed.status == Some(3) && failed.stderr.contains(&format!("vg/{point} is to be changed")),
        "{failed}"
    );
    ensure!(volumes()? == before, "{:?}", volumes()?);
    drop(reader);
    for args in [["-an", "vg/root"], ["-ay", "vg/root"]] {
        succeed(Command::new("lvchange").args(args))?;
    }
    expect(&path, 0, b'b')?;
    done(&["revert", &path, "s"])?;
    expect(&path, 0, b'a')
}

fn what_lvm_would_remove_along_is_kept() -> Result<()> {
    group(Sort::Thin)?;
    let path = volume(Sort::Thin, "root")?.path();
    write_block(&path, 0, b'a')?;
    done(&["create", &path, "s"])?;
    write_block(&path, 0, b'b')?;
    let thick = ["-q", "-y", "-s", "-L", "8M", "-n", "backup", "vg/root"];
    succeed(Command::new("lvcreate").args(thick))?;
    refused(&["revert", &path, "s"], &["would remove with it", "vg/backup", "no changes made"])?;
    expect(&path, 0, b'b')?;
    expect("/dev/vg/backup", 0, b'b')?;
    succeed(Command::new("lvremove").args(["-q", "-y", "vg/backup"]))?;
    done(&["revert", &path, "s"])?;
    expect(&path, 0, b'a')
}

/// lvm2 allows this (lvmteam/lvm2 #164), and the kernel finds it out when it reads.
fn a_point_that_was_made_smaller_is_not_merged() -> Result<()> {
    group(Sort::Thick)?;
    let path = volume(Sort::Thick, "root")?.path();
    done(&["create", &path, "s", "--lvm-area", "100"])?;
    fill(&path, 24)?;
    write_block(&path, 0, b'b')?;
    let point = volumes()?.into_iter().find(|name| name != "root").unwrap_or_default();
    succeed(Command::new("lvreduce").args(["-q", "-y", "-f", "-L", "8M", &format!("vg/{point}")]))?;
    refused(&["revert", &path, "s"], &["was made smaller than its data", "delete that snapshot"])?;
    expect(&path, 0, b'b')?;
    let checked = domsnap(&["check", &path])?;
    ensure!(format!("{}{}", checked.stdout, checked.stderr).contains("was made smaller"), "{checked}");
    done(&["delete", &path, "s"])?;
    ensure!(volumes()? == ["root"], "{:?}", volumes()?);
    Ok(())
}

/// As in lvmteam/lvm2 #49: no list here shows the mount, and lvremove says "contains a filesystem in use".
fn a_point_that_is_mounted_elsewhere_is_named() -> Result<()> {
    group(Sort::Thick)?;
    let path = volume(Sort::Thick, "root")?.path();
    succeed(Command::new("mke2fs").args(["-q", "-F", &path]))?;
    done(&["create", &path, "s"])?;
    let point = volumes()?.into_iter().find(|name| name != "root").unwrap_or_default();
    std::fs::create_dir_all("/tmp/elsewhere")?;
    let script =
        format!("/bin/busybox mount -o ro -t ext4 /dev/vg/{point} /tmp/elsewhere && echo ready && read end");
    let mut child = Command::new("unshare")
        .args(["--mount", "sh", "-c", &script])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()?;
    let mut said = [0; 6];
    child.stdout.as_mut().context("no output")?.read_exact(&mut said)?;
    let reasons = [point.as_str(), "mounted at /tmp/elsewhere in the mount namespace of process"];
    for args in [["delete", &path, "s"], ["revert", &path, "s"]] {
        refused(&args, &reasons)?;
    }
    drop(child.stdin.take());
    child.wait()?;
    done(&["delete", &path, "s"])?;
    Ok(())
}

fn a_point_that_another_program_removed_is_reported() -> Result<()> {
    group(Sort::Thin)?;
    let path = volume(Sort::Thin, "root")?.path();
    done(&["create", &path, "s"])?;
    let point = volumes()?.into_iter().find(|name| name != "root").unwrap_or_default();
    succeed(Command::new("lvremove").args(["-q", "-y", &format!("vg/{point}")]))?;
    let reverted = domsnap(&["revert", &path, "s"])?;
    ensure!(reverted.status != Some(0) && reverted.stderr.contains(&point), "{reverted}");
    let checked = domsnap(&["check", &path])?;
    ensure!(format!("{}{}", checked.stdout, checked.stderr).contains(&point), "{checked}");
    done(&["delete", &path, "s"])?;
    let listed = asked(&["list", &path])?;
    ensure!(listed["snapshots"].as_array().is_some_and(Vec::is_empty), "{listed}");
    Ok(())
}

fn a_name_that_leaves_no_room_for_points_is_refused() -> Result<()> {
    group(Sort::Thick)?;
    let name = "x".repeat(110);
    let path = volume(Sort::Thick, &name)?.path();
    refused(&["create", &path, "s"], &["127", "lvrename"])?;
    Ok(())
}

fn deferred_merge_is_reported_and_blocks() -> Result<()> {
    group(Sort::Thick)?;
    let path = volume(Sort::Thick, "root")?.path();
    succeed(Command::new("lvcreate").args(["-q", "-s", "-n", "by_hand", "-L", "8M", "vg/root"]))?;
    let open = std::fs::File::open(&path)?;
    succeed(Command::new("lvconvert").args(["-q", "-y", "--merge", "vg/by_hand"]))?;
    drop(open);
    refused(&["create", &path, "s"], &["merge", "next activation", "lvchange -an"])?;
    Ok(())
}

fn a_device_that_knows_no_snapshots_goes_on_under_an_overlay_elsewhere() -> Result<()> {
    group(Sort::Thick)?;
    // A block device as any other, because it is said to be raw.
    let device = volume(Sort::Thick, "plain")?.path();
    write_block(&device, 0, b'a')?;
    let disk = format!("vda={device},format=raw");
    done(&["domain", "add", "kept", "--disk", &disk])?;
    refused(&["create", "kept", "s"], &["never come to name a qcow2 overlay", "--active-path=new", "lvm"])?;
    done(&["domain", "remove", "kept"])?;
    done(&["domain", "add", "moved", "--disk", &disk, "--active-path", "new"])?;
    refused(&["create", "moved", "s"], &["no room for an overlay", "path=/DIRECTORY/vda.qcow2"])?;
    refused(&["create", "moved", "s", "--disk", "vda=copy"], &["nothing can be put beside it"])?;
    refused(&["create", "moved", "s", "--disk", "vda=external,path=vda.qcow2"], &["absolute path"])?;
    let directory = "/tmp/overlays";
    std::fs::create_dir_all(directory)?;
    let overlay = format!("{directory}/vda.qcow2");
    let create = ["create", "moved", "s1", "--disk", &format!("vda=external,path={overlay}")];
    let mounted =
        OpenOptions::new().read(true).custom_flags(OFlags::EXCL.bits().cast_signed()).open(&device)?;
    refused(&create, &["this machine itself uses", "no changes made"])?;
    drop(mounted);
    let reported = done(&create)?;
    ensure!(reported.stdout.contains(&overlay) && reported.stdout.contains("must now name"), "{reported}");
    ensure!(Path::new(&format!("{overlay}.domsnap/domain.json")).exists(), "no manifests beside the overlay");
    for name in ["s2", "s3"] {
        done(&["create", "moved", name])?;
    }
    done(&["revert", "moved", "s1"])?;
    done(&["revert", "moved", "s3"])?;
    done(&["delete", "moved", "s2"])?;
    done(&["check", "moved"])?;
    ensure!(snapshots("moved")? == ["s1", "s3"], "{:?}", snapshots("moved")?);
    done(&["delete", "moved", "s1", "s3"])?;
    // The device is its owner's, whatever is deleted: it is read, and nothing is merged into it.
    ensure!(volumes()? == ["plain"], "{:?}", volumes()?);
    expect(&device, 0, b'a')
}

fn lvm(args: &[&str]) -> Result<()> {
    let (program, args) = args.split_first().unwrap_or((&"lvm", &[]));
    succeed(Command::new(program).args(["-q", "-y"]).args(args)).map(drop)
}

fn volumes_of_other_kinds_and_states_are_refused() -> Result<()> {
    group(Sort::Thin)?;
    for (kind, name, more) in [("mirror", "m", &["-m1"][..]), ("error", "e", &[]), ("linear", "ro", &["-pr"])]
    {
        let args = ["lvcreate", "-Wn", "--type", kind, "-L", "8M", "-n", name];
        lvm(&[&args[..], more, &["vg"]].concat())?;
    }
    refused(&["create", "/dev/vg/m", "s"], &["of type mirror", "lvconvert -m0 vg/m", "format=raw"])?;
    refused(&["create", "/dev/vg/e", "s"], &["of type error", "format=raw"])?;
    refused(&["create", "/dev/vg/ro", "s"], &["vg/ro is read-only", "lvchange -prw"])?;
    lvm(&["lvcreate", "-Wn", "-i2", "-L", "32M", "-n", "striped", "vg"])?;
    let path = "/dev/vg/striped";
    write_block(path, 0, b'a')?;
    done(&["create", path, "one"])?;
    write_block(path, 0, b'b')?;
    done(&["create", path, "two"])?;
    done(&["revert", path, "one"])?;
    expect(path, 0, b'a')?;
    // lvm extends the volume and not its snapshots, and a merge leaves its size as it is.
    lvm(&["lvchange", "-an", "vg/striped"])?;
    refused(&["create", path, "s"], &["not active", "lvchange -ay vg/striped"])?;
    lvm(&["lvextend", "-L", "+16M", "vg/striped"])?;
    lvm(&["lvchange", "-ay", "vg/striped"])?;
    write_block(path, 0, b'c')?;
    let args = ["had 33554432 bytes", "50331648 now", "qemu-img convert"];
    refused(&["revert", path, "two"], &args)?;
    expect(path, 0, b'c')?;
    done(&["create", path, "large"])?;
    done(&["revert", path, "large"])?;
    // An inactive volume has no node: it is there, and so are its points.
    lvm(&["lvchange", "-an", "vg/striped"])?;
    let reported = done(&["delete", path, "one", "two", "large"])?;
    ensure!(volumes()? == ["e", "m", "ro", "striped"], "{:?}: {reported}", volumes()?);
    let path = volume(Sort::Thin, "thin")?.path();
    write_block(&path, 0, b'a')?;
    done(&["create", &path, "s"])?;
    lvm(&["lvextend", "-L", "48M", "vg/thin"])?;
    write_block(&path, 0, b'b')?;
    done(&["revert", &path, "s"])?;
    expect(&path, 0, b'a')?;
    let size = std::fs::File::open(&path).and_then(|mut disk| disk.seek(SeekFrom::End(0)))?;
    ensure!(size == 32 << 20, "the thin volume has {size} bytes");
    Ok(())
}

fn a_volume_that_the_machine_uses_is_refused() -> Result<()> {
    group(Sort::Thick)?;
    let path = volume(Sort::Thick, "root")?.path();
    let table = format!("0 8 linear {path} 0");
    succeed(Command::new("dmsetup").args(["create", "upper", "--table", &table]))?;
    refused(&["create", &path, "s"], &["part of the device upper"])?;
    succeed(Command::new("dmsetup").args(["remove", "upper"]))?;
    done(&["create", &path, "s"])?;
    Ok(())
}

/// Lets lvm change nothing: its commands report, and all others fail when they write their metadata.
struct NoChanges;

impl NoChanges {
    fn begin() -> Result<Self> {
        let this = Self;
        this.set("--setro")?;
        Ok(this)
    }

    fn set(&self, to: &str) -> Result<()> {
        for disk in lvmguest::inside::disks()? {
            succeed(Command::new("blockdev").args([to, &disk]))?;
        }
        Ok(())
    }
}

impl Drop for NoChanges {
    fn drop(&mut self) {
        let _ = self.set("--setrw");
    }
}

/// What lvm says then.
const NO_CHANGE: &str = "Failed to write VG";

fn what_cannot_be_removed_is_removed_later() -> Result<()> {
    group(Sort::Thin)?;
    let path = volume(Sort::Thin, "root")?.path();
    done(&["create", &path, "s"])?;
    let left = volumes()?.into_iter().find(|name| name != "root").unwrap_or_default();
    for name in ["t", "u"] {
        done(&["create", &path, name])?;
    }
    let full = volumes()?;
    // lvm's command fails after the commit point: the snapshot is gone, and its volume waits.
    let fixed = NoChanges::begin()?;
    let reported = done(&["delete", &path, "s"])?;
    ensure!(reported.stdout.contains("deferred") && reported.stdout.contains(NO_CHANGE), "{reported}");
    ensure!(snapshots(&path)? == ["t", "u"], "{:?}", snapshots(&path)?);
    // Nothing is locked by it: what fails before the commit point is rolled back.
    let failed = domsnap(&["create", &path, "v"])?;
    ensure!(failed.status == Some(1) && failed.stderr.contains(NO_CHANGE), "{failed}");
    ensure!(volumes()? == full, "{full:?} became {:?}", volumes()?);
    drop(fixed);
    // What is left and still used stays, and prevents no other delete.
    lvm(&["lvchange", "-ay", "-K", &format!("vg/{left}")])?;
    let reader = std::fs::File::open(format!("/dev/vg/{left}"))?;
    let reported = done(&["delete", &path, "t"])?;
    let said = format!("{}{}", reported.stdout, reported.stderr);
    ensure!(said.contains(&left) && said.contains("cannot be removed now: it is open"), "{reported}");
    ensure!(volumes()?.len() == 3 && volumes()?.contains(&left), "{:?}", volumes()?);
    drop(reader);
    done(&["recover", &path])?;
    ensure!(volumes()?.len() == 2 && snapshots(&path)? == ["u"], "{:?}", volumes()?);
    done(&["revert", &path, "u"])?;
    Ok(())
}

fn previous_volume_in_use_is_removed_later() -> Result<()> {
    group(Sort::Thin)?;
    let path = volume(Sort::Thin, "root")?.path();
    write_block(&path, 0, b'a')?;
    done(&["create", &path, "s"])?;
    write_block(&path, 0, b'b')?;
    // Whoever looks at new devices may have it open just when it is to be removed.
    let reader = std::thread::spawn(|| {
        let until = std::time::Instant::now() + std::time::Duration::from_secs(300);
        while std::time::Instant::now() < until {
            for entry in std::fs::read_dir("/dev/vg").into_iter().flatten().flatten() {
                if entry.file_name().to_string_lossy().ends_with("-old") {
                    return std::fs::File::open(entry.path()).ok();
                }
            }
            std::thread::sleep(std::time::Duration::from_millis(2));
        }
        None
    });
    let reported = done(&["revert", &path, "s"])?;
    let reader = reader.join().ok().flatten();
    ensure!(reader.is_some(), "the previous volume was never seen: {reported}");
    ensure!(reported.stdout.contains("deferred") && reported.stdout.contains("-old is open"), "{reported}");
    expect(&path, 0, b'a')?;
    done(&["create", &path, "t"])?;
    ensure!(volumes()?.iter().any(|name| name.ends_with("-old")), "{:?}", volumes()?);
    drop(reader);
    done(&["recover", &path])?;
    ensure!(volumes()?.len() == 3, "{:?}", volumes()?);
    Ok(())
}

fn an_undo_that_cannot_be_done_can_be_abandoned() -> Result<()> {
    group(Sort::Thin)?;
    let path = volume(Sort::Thin, "root")?.path();
    write_block(&path, 0, b'a')?;
    done(&["create", &path, "s"])?;
    write_block(&path, 0, b'b')?;
    crate::crash::killed_at(&["revert", &path, "s"], "rename root to")?;
    let fixed = NoChanges::begin()?;
    let stuck = domsnap(&["recover", &path])?;
    ensure!(stuck.status != Some(0) && stuck.stderr.contains(NO_CHANGE), "{stuck}");
    ensure!(stuck.stderr.contains("--abandon"), "it does not say the way on: {stuck}");
    let reported = done(&["recover", &path, "--abandon"])?;
    ensure!(reported.stdout.contains("abandoned"), "{reported}");
    drop(fixed);
    if !Path::new(&path).exists() {
        // It was killed between the two renames; the message says so.
        let said = domsnap(&["create", &path, "t"])?;
        ensure!(said.stderr.contains("lvrename vg"), "{said}");
        let previous = volumes()?.into_iter().find(|name| name.ends_with("-old")).unwrap_or_default();
        succeed(Command::new("lvrename").args(["-q", "-y", "vg", &previous, "root"]))?;
    }
    done(&["create", &path, "t"])?;
    done(&["revert", &path, "s"])?;
    expect(&path, 0, b'a')?;
    done(&["delete", &path, "s", "t"])?;
    ensure!(volumes()? == ["root"], "{:?}", volumes()?);
    Ok(())
}

/// All of them.
pub static CASES: &[TestCase] = &[
    ("a snapshot that overflowed is reported before it is needed", overflowed_snapshot_is_reported_early),
    (
        "an area that fills up is warned of, with the command that grows it",
        an_area_that_fills_up_is_warned_of_with_the_command_that_grows_it,
    ),
    ("a group without room is refused, with figures", a_group_without_room_is_refused_with_figures),
    (
        "a pool that is nearly full is refused, with figures",
        a_pool_that_is_nearly_full_is_refused_with_figures,
    ),
    (
        "a merge that would overflow another point is refused",
        a_merge_that_would_overflow_another_point_is_refused,
    ),
    (
        "a device that knows no snapshots goes on under an overlay elsewhere",
        a_device_that_knows_no_snapshots_goes_on_under_an_overlay_elsewhere,
    ),
    (
        "a snapshot made by hand is not overflown by a merge",
        a_snapshot_made_by_hand_is_not_overflown_by_a_merge,
    ),
    (
        "a point that another process has open is not merged later",
        a_point_that_another_process_has_open_is_not_merged_later,
    ),
    ("volumes of other kinds and states are refused", volumes_of_other_kinds_and_states_are_refused),
    ("a volume that the machine uses is refused", a_volume_that_the_machine_uses_is_refused),
    ("what cannot be removed is removed later", what_cannot_be_removed_is_removed_later),
    ("a previous volume that is used is removed later", previous_volume_in_use_is_removed_later),
    ("an undo that cannot be done can be abandoned", an_undo_that_cannot_be_done_can_be_abandoned),
    ("what lvm would remove along is kept", what_lvm_would_remove_along_is_kept),
    ("a point that was made smaller is not merged", a_point_that_was_made_smaller_is_not_merged),
    ("a point that is mounted elsewhere is named", a_point_that_is_mounted_elsewhere_is_named),
    ("a point that another program removed is reported", a_point_that_another_program_removed_is_reported),
    ("a name that leaves no room for points is refused", a_name_that_leaves_no_room_for_points_is_refused),
    ("a merge that is deferred is reported, and stops everything", deferred_merge_is_reported_and_blocks),
];
