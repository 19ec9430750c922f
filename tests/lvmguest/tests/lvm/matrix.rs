//! What must work on thin and on thick volumes alike: create, revert to any point, delete any, keep the
//! present, several volumes.

use std::process::Command;

use anyhow::{Result, bail, ensure};
use lvmguest::TestCase;
use lvmguest::inside::{
    self, Volume, asked, domsnap, done, read_block, refused, run, snapshots, succeed, write_block,
};

/// Which sort of volume.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Sort {
    Thin,
    Thick,
}

/// A group "vg" over all disks; with a pool "tp" for thin volumes.
pub fn group(sort: Sort) -> Result<()> {
    let mut args = vec!["-q".to_owned(), "vg".to_owned()];
    args.extend(inside::disks()?);
    succeed(Command::new("vgcreate").args(&args))?;
    if sort == Sort::Thin {
        let args =
            ["-q", "-y", "--type", "thin-pool", "-n", "tp", "-L", "200M", "--poolmetadatasize", "4M", "vg"];
        succeed(Command::new("lvcreate").args(args))?;
    }
    Ok(())
}

/// A volume of 32 MiB in it.
pub fn volume(sort: Sort, name: &str) -> Result<Volume> {
    volume_of(sort, name, 32)
}

/// A volume of so many MiB in it.
pub fn volume_of(sort: Sort, name: &str, mib: u32) -> Result<Volume> {
    match sort {
        Sort::Thin => Volume::thin("vg", "tp", name, mib),
        Sort::Thick => Volume::thick("vg", name, mib),
    }
}

pub fn expect(path: &str, block: u64, letter: u8) -> Result<()> {
    let found = read_block(path, block)?;
    ensure!(
        found == letter,
        "block {block} of {path} should be {:?}, and is {:?}",
        letter as char,
        found as char
    );
    Ok(())
}

/// The names of the volumes of the group, without the pool, sorted.
pub fn volumes() -> Result<Vec<String>> {
    let listed = succeed(Command::new("lvs").args(["--noheadings", "-o", "lv_name", "vg"]))?;
    let mut names: Vec<String> =
        listed.stdout.split_whitespace().filter(|name| *name != "tp").map(str::to_owned).collect();
    names.sort();
    Ok(names)
}

/// One volume with snapshots of the states a, b and c, now at d.
fn three_points(sort: Sort) -> Result<(Volume, String)> {
    group(sort)?;
    let volume = volume(sort, "root")?;
    let path = volume.path();
    for letter in [b'a', b'b', b'c'] {
        write_block(&path, 0, letter)?;
        write_block(&path, u64::from(letter), letter)?;
        done(&["create", &path, &(letter as char).to_string()])?;
    }
    write_block(&path, 0, b'd')?;
    Ok((volume, path))
}

/// Three points of one volume: a dry run, a volume that is open and the clone of a thick one change nothing;
/// each point is reverted to, again and again; a revert keeps the current state; any point is deleted, and
/// the others stay.
fn points_are_reverted_to_and_deleted(sort: Sort) -> Result<()> {
    let (_, path) = three_points(sort)?;
    a_dry_run_does_nothing(&path)?;
    a_volume_that_is_open_is_refused(&path)?;
    if sort == Sort::Thick {
        let before = volumes()?;
        refused(&["clone", &path, "b", "web"], &["is no thin volume", "domsnap domain add"])?;
        ensure!(volumes()? == before, "{:?}", volumes()?);
    }
    every_point_can_be_reverted_to(&path, b"bacc")?;
    the_current_state_can_be_kept_by_a_revert(&path)?;
    any_point_can_be_deleted(&path)
}

fn every_point_can_be_reverted_to(path: &str, order: &[u8]) -> Result<()> {
    for letter in order {
        done(&["revert", path, &(*letter as char).to_string()])?;
        expect(path, 0, *letter)?;
        for other in [b'a', b'b', b'c'] {
            expect(path, u64::from(other), if other <= *letter { other } else { 0 })?;
        }
        // What is written on top of one is in no other.
        write_block(path, 0, b'x')?;
    }
    ensure!(snapshots(path)? == ["a", "b", "c"], "{:?}", snapshots(path)?);
    ensure!(volumes()?.len() == 4, "nothing but the volume and its points is left: {:?}", volumes()?);
    Ok(())
}

/// Under a real udev, whose links come and go with each change.
fn every_point_can_be_reverted_to_again_and_again(sort: Sort) -> Result<()> {
    let (_, path) = three_points(sort)?;
    every_point_can_be_reverted_to(&path, b"baccab")
}

/// Of the points a, b, c and e.
fn any_point_can_be_deleted(path: &str) -> Result<()> {
    done(&["delete", path, "b"])?;
    done(&["revert", path, "a"])?;
    expect(path, 0, b'a')?;
    done(&["revert", path, "c"])?;
    expect(path, 0, b'c')?;
    expect(path, u64::from(b'b'), b'b')?;
    done(&["delete", path, "c", "a", "e", "present"])?;
    expect(path, 0, b'c')?;
    ensure!(volumes()? == ["root"], "{:?}", volumes()?);
    Ok(())
}

/// Of the points a, b and c, of which c was reverted to and x written since.
fn the_current_state_can_be_kept_by_a_revert(path: &str) -> Result<()> {
    done(&["revert", path, "a", "--save-current=present"])?;
    expect(path, 0, b'a')?;
    write_block(path, 0, b'e')?;
    done(&["create", path, "e"])?;
    done(&["revert", path, "present"])?;
    expect(path, 0, b'x')?;
    expect(path, u64::from(b'c'), b'c')?;
    done(&["revert", path, "e"])?;
    expect(path, 0, b'e')?;
    expect(path, u64::from(b'c'), 0)?;
    let listed = asked(&["list", path])?;
    let parent = |name: &str| {
        listed["snapshots"]
            .as_array()
            .into_iter()
            .flatten()
            .find(|s| s["name"] == name)
            .map(|s| s["parent"].clone())
    };
    ensure!(parent("e") == parent("b"), "both derive from a: {listed}");
    Ok(())
}

fn an_undo_brings_the_replaced_state_back(sort: Sort) -> Result<()> {
    let (_, path) = three_points(sort)?;
    let keep = match sort {
        Sort::Thin => "--undo=free",
        // An area for the replaced state is reserved only if the user asks for it.
        Sort::Thick => {
            let reverted = done(&["revert", &path, "b", "--undo=free"])?;
            ensure!(
                reverted.stdout.contains("not kept") && reverted.stdout.contains("area of"),
                "{reverted}"
            );
            refused(&["undo", &path], &["no revert to undo"])?;
            write_block(&path, 0, b'd')?;
            write_block(&path, u64::from(b'c'), b'c')?;
            "--undo=disks"
        }
    };
    done(&["revert", &path, "a", keep])?;
    expect(&path, 0, b'a')?;
    for (letter, other) in [(b'd', b'c'), (b'a', 0), (b'd', b'c')] {
        done(&["undo", &path])?;
        expect(&path, 0, letter)?;
        expect(&path, u64::from(b'c'), other)?;
        ensure!(volumes()?.len() == 5, "nothing but the points and the kept state: {:?}", volumes()?);
    }
    done(&["undo", &path, "--forget"])?;
    ensure!(volumes()?.len() == 4, "{:?}", volumes()?);
    expect(&path, 0, b'd')?;
    // A held point is not taken up by a merge.
    done(&["hold", &path, "a", "--holder", "me"])?;
    refused(&["delete", &path, "a"], &["held by me"])?;
    match sort {
        Sort::Thick => drop(refused(&["revert", &path, "a"], &["held by me"])?),
        Sort::Thin => drop(done(&["revert", &path, "a"])?),
    }
    done(&["release", &path, "a", "--holder", "me"])?;
    done(&["revert", &path, "a"])?;
    expect(&path, 0, b'a')
}

fn several_volumes_are_one_domain(sort: Sort) -> Result<()> {
    group(sort)?;
    let volumes = [volume(sort, "root")?, volume(sort, "data-1")?, volume(sort, "data-2")?];
    let paths: Vec<String> = volumes.iter().map(Volume::path).collect();
    let domain = paths.join(",");
    for (number, path) in (0..).zip(&paths) {
        write_block(path, 0, b'a' + number)?;
    }
    done(&["create", &domain, "one"])?;
    for path in &paths {
        write_block(path, 0, b'z')?;
    }
    done(&["create", &domain, "two", "--disk", "vdb=skip"])?;
    done(&["revert", &domain, "one"])?;
    for (number, path) in (0..).zip(&paths) {
        expect(path, 0, b'a' + number)?;
    }
    done(&["revert", &domain, "two"])?;
    expect(&paths[0], 0, b'z')?;
    expect(&paths[1], 0, b'b')?;
    expect(&paths[2], 0, b'z')?;
    done(&["delete", &domain, "one", "two"])?;
    Ok(())
}

fn both_forms_of_a_path_are_understood_and_are_one_disk(sort: Sort) -> Result<()> {
    succeed(Command::new("vgcreate").args(["-q", "my-vg", &inside::disks()?[0]]))?;
    let volume = match sort {
        Sort::Thin => {
            let args = ["-q", "-y", "--type", "thin-pool", "-n", "t-p", "-L", "100M", "my-vg"];
            succeed(Command::new("lvcreate").args(args))?;
            Volume::thin("my-vg", "t-p", "a-b--c.d+e_f", 16)?
        }
        Sort::Thick => Volume::thick("my-vg", "a-b--c.d+e_f", 16)?,
    };
    write_block(&volume.path(), 0, b'a')?;
    done(&["create", &volume.mapper(), "s"])?;
    write_block(&volume.path(), 0, b'b')?;
    done(&["revert", &volume.mapper(), "s"])?;
    expect(&volume.path(), 0, b'a')?;
    // The other name leads to the same device, so it is the same domain or refused, and never a second one.
    let other = domsnap(&["create", &volume.path(), "t"])?;
    if other.status == Some(0) {
        ensure!(snapshots(&volume.mapper())? == ["s", "t"], "two domains have one volume: {other}");
    } else {
        ensure!(other.status == Some(3) && other.stderr.contains(&volume.mapper()), "{other}");
    }
    Ok(())
}

fn points_are_found_again_by_their_tags_alone(sort: Sort) -> Result<()> {
    let (_, path) = three_points(sort)?;
    done(&["revert", &path, "b"])?;
    write_block(&path, 0, b'e')?;
    done(&["create", &path, "e"])?;
    std::fs::remove_dir_all("/var/lib/domsnap")?;
    done(&["import", &path])?;
    ensure!(snapshots(&path)?.len() == 4, "{:?}", snapshots(&path)?);
    let listed = asked(&["list", &path])?;
    let parent = |name: &str| -> Option<String> {
        let all = listed["snapshots"].as_array()?;
        Some(all.iter().find(|s| s["name"] == name)?["parent"].as_str()?.to_owned())
    };
    let tree: Vec<Option<String>> = ["a", "b", "c", "e"].into_iter().map(parent).collect();
    ensure!(tree[0].is_none() && tree[1].is_some() && tree[2].is_some(), "{listed}");
    ensure!(tree[3] == tree[2], "both c and e derive from b: {listed}");
    for letter in [b'c', b'a', b'e', b'b'] {
        done(&["revert", &path, &(letter as char).to_string()])?;
        expect(&path, 0, letter)?;
    }
    Ok(())
}

fn a_snapshot_that_another_program_made_is_adopted(sort: Sort) -> Result<()> {
    group(sort)?;
    let volume = volume(sort, "root")?;
    let path = volume.path();
    write_block(&path, 0, b'a')?;
    let mut args = vec!["-q", "-s", "-n", "by_hand"];
    if sort == Sort::Thick {
        args.extend(["-L", "8M"]);
    }
    args.push("vg/root");
    succeed(Command::new("lvcreate").args(&args))?;
    write_block(&path, 0, b'b')?;
    done(&["import", &path])?;
    ensure!(snapshots(&path)? == ["by_hand"], "{:?}", snapshots(&path)?);
    done(&["revert", &path, "by_hand"])?;
    expect(&path, 0, b'a')?;
    write_block(&path, 0, b'c')?;
    done(&["revert", &path, "by_hand"])?;
    expect(&path, 0, b'a')
}

fn a_dry_run_does_nothing(path: &str) -> Result<()> {
    let before = volumes()?;
    for args in [
        ["create", path, "n", "--dry-run"],
        ["revert", path, "a", "--dry-run"],
        ["delete", path, "a", "--dry-run"],
    ] {
        let reported = done(&args)?;
        ensure!(reported.stdout.contains("root"), "{reported}");
    }
    ensure!(volumes()? == before, "{:?}", volumes()?);
    expect(path, 0, b'd')
}

fn a_volume_that_is_open_is_refused(path: &str) -> Result<()> {
    let open = std::fs::File::open(path)?;
    for args in [["create", path, "n"], ["revert", path, "a"]] {
        let output = domsnap(&args)?;
        ensure!(
            output.status != Some(0)
                && output.stderr.contains("is open")
                && output.stderr.contains("testcase"),
            "{output}"
        );
    }
    drop(open);
    expect(path, 0, b'd')
}

fn a_snapshot_of_a_thick_snapshot_is_refused() -> Result<()> {
    group(Sort::Thick)?;
    volume(Sort::Thick, "root")?;
    succeed(Command::new("lvcreate").args(["-q", "-s", "-n", "snap", "-L", "8M", "vg/root"]))?;
    refused(&["create", "/dev/vg/snap", "s"], &["thick snapshot", "lvm takes no snapshots"])?;
    Ok(())
}

fn mixed_volumes_are_one_domain() -> Result<()> {
    group(Sort::Thin)?;
    let paths = [volume(Sort::Thin, "thin")?.path(), volume(Sort::Thick, "thick")?.path()];
    let domain = paths.join(",");
    for path in &paths {
        write_block(path, 0, b'a')?;
    }
    done(&["create", &domain, "one"])?;
    for path in &paths {
        write_block(path, 0, b'b')?;
    }
    done(&["revert", &domain, "one", "--save-current=two"])?;
    for path in &paths {
        expect(path, 0, b'a')?;
    }
    done(&["revert", &domain, "two"])?;
    for path in &paths {
        expect(path, 0, b'b')?;
    }
    let backends = run(Command::new("/t/domsnap").args(["list", &domain, "--disks"]))?;
    if backends.status != Some(0) {
        bail!("{backends}");
    }
    Ok(())
}

/// Clones are thin snapshots of the point: each a domain of its own, and none needs the source.
fn clones_are_domains_of_their_own() -> Result<()> {
    let (_, path) = three_points(Sort::Thin)?;
    done(&["clone", &path, "b", "web", "--count", "2"])?;
    expect(&path, 0, b'd')?;
    for clone in ["/dev/vg/web-1-vda", "/dev/vg/web-2-vda"] {
        expect(clone, 0, b'b')?;
        expect(clone, u64::from(b'a'), b'a')?;
        expect(clone, u64::from(b'c'), 0)?;
    }
    refused(&["clone", &path, "a", "web-1"], &["there is a domain web-1 already"])?;
    write_block("/dev/vg/web-1-vda", 0, b'w')?;
    done(&["create", "web-1", "own"])?;
    write_block("/dev/vg/web-1-vda", 0, b'x')?;
    done(&["clone", "web-1", "own", "again"])?;
    expect("/dev/vg/again-vda", 0, b'w')?;
    done(&["revert", "web-1", "own"])?;
    expect("/dev/vg/web-1-vda", 0, b'w')?;
    done(&["delete", &path, "a", "b", "c"])?;
    expect(&path, 0, b'd')?;
    expect("/dev/vg/web-2-vda", 0, b'b')?;
    done(&["delete", "web-1", "own"])?;
    expect("/dev/vg/again-vda", 0, b'w')?;
    ensure!(volumes()? == ["again-vda", "root", "web-1-vda", "web-2-vda"], "{:?}", volumes()?);
    Ok(())
}

macro_rules! of_sort {
    ($sort:ident: $($name:literal => $body:expr),* $(,)?) => {
        &[$(($name, || ($body)(Sort::$sort))),*]
    };
}

/// For thin volumes.
pub static THIN: &[TestCase] = of_sort!(Thin:
    "points are reverted to, kept and deleted" => points_are_reverted_to_and_deleted,
    "an undo brings the replaced state back" => an_undo_brings_the_replaced_state_back,
    "several volumes are one domain" => several_volumes_are_one_domain,
    "both forms of a path are understood, and are one disk" => both_forms_of_a_path_are_understood_and_are_one_disk,
    "points are found again by their tags alone" => points_are_found_again_by_their_tags_alone,
    "a snapshot that another program made is adopted" => a_snapshot_that_another_program_made_is_adopted,
    "clones are domains of their own" => |_| clones_are_domains_of_their_own(),
);

/// For thick volumes.
pub static THICK: &[TestCase] = &[
    ("points are reverted to, kept and deleted", || points_are_reverted_to_and_deleted(Sort::Thick)),
    ("an undo brings the replaced state back", || an_undo_brings_the_replaced_state_back(Sort::Thick)),
    ("several volumes are one domain", || several_volumes_are_one_domain(Sort::Thick)),
    ("a snapshot that another program made is adopted", || {
        a_snapshot_that_another_program_made_is_adopted(Sort::Thick)
    }),
    ("a snapshot of a thick snapshot is refused", a_snapshot_of_a_thick_snapshot_is_refused),
];

/// Where thick volumes are as thin ones: names and tags.
pub static THICK_AS_THIN: &[TestCase] = &[
    ("both forms of a path are understood, and are one disk", || {
        both_forms_of_a_path_are_understood_and_are_one_disk(Sort::Thick)
    }),
    ("points are found again by their tags alone", || {
        points_are_found_again_by_their_tags_alone(Sort::Thick)
    }),
];

/// With a real udev, whose links come and go with devices.
pub static UDEV: &[TestCase] = &[("thin and thick volumes are one domain", mixed_volumes_are_one_domain)];

/// More of it.
pub static UDEV_EACH: &[TestCase] = &[
    ("every thin point can be reverted to, again and again", || {
        every_point_can_be_reverted_to_again_and_again(Sort::Thin)
    }),
    ("every thick point can be reverted to, again and again", || {
        every_point_can_be_reverted_to_again_and_again(Sort::Thick)
    }),
];
