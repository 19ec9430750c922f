//! A domain is never locked for good: what is known to fail is refused before anything, a disk that went away
//! can be left out and taken out, a full disk prevents no delete, and an operation that cannot go on
//! can be abandoned.

use std::process::Command;

use anyhow::{Context, Result, ensure};
use domsnap_tests::domain::{Domain, NAME, Shape, images, same_images};
use domsnap_tests::domsnap::{Domsnap, status};
use domsnap_tests::mounted::{Mounted, may_mount};
use domsnap_tests::qemu::Write;
use domsnap_tests::{qemu, report, shim};

/// A name whose further names do not fit the file system is refused before anything, and an internal snapshot
/// needs none.
#[test]
fn names_that_would_not_fit_are_refused_before() -> Result<()> {
    let mut domain = Domain::new(&Shape::disks(1).named(&"x".repeat(230), ""))?;
    let before = images(&domain.disks())?;
    let said = domain.declined(&["create", NAME, "s1", "--external"], status::REFUSED)?;
    ensure!(said.stderr.contains("too long"), "{said}");
    same_images(&domain.disks(), &before)?;
    domain.create("s1", "internal")?;
    domain.verify()
}

/// Flags of files and directories are seen before, not after the commit point.
#[test]
fn immutable_images_are_refused_before() -> Result<()> {
    let mut domain = Domain::new(&Shape::disks(1))?;
    domain.create("s1", "external")?;
    domain.write_everywhere()?;
    domain.create("s2", "internal")?;
    let path = domain.path("vda");
    let flag = |how: &str| {
        let done = Command::new("chattr").arg(how).arg(&path).output();
        done.is_ok_and(|output| output.status.success())
    };
    if !flag("+i") {
        println!("SKIPPED: no immutable files to be had here");
        return Ok(());
    }
    let before = images(&domain.disks())?;
    let checked = || -> Result<()> {
        for args in [
            &["create", NAME, "n", "--internal"][..],
            &["create", NAME, "n", "--external"],
            &["revert", NAME, "s1"],
            &["delete", NAME, "s2"],
        ] {
            domain.declined(args, status::REFUSED)?;
        }
        same_images(&domain.disks(), &before)
    };
    let checked = checked();
    ensure!(flag("-i"), "the flag stays");
    checked?;
    domain.delete(&["s1"])?;
    domain.verify()
}

/// What stood for a new image when QEMU was asked whether it can open one goes with the next recovery, also
/// where that QEMU is gone.
#[test]
fn recover_removes_the_probes_of_a_dead_qemu() -> Result<()> {
    let place = tempfile::tempdir()?;
    let file = |name: &str| place.path().join(name).display().to_string();
    let domsnap = Domsnap::new(&place.path().join("state"));
    for (target, name) in [("vda", "root"), ("vdb", "data")] {
        qemu::img(&["create", "-q", "-f", "qcow2", &file(&format!("{name}.qcow2")), "1M"])?;
        std::fs::write(
            file(&format!("{name}.domsnap-probe.qcow2")),
            if target == "vda" { "" } else { "mine" },
        )?;
    }
    let disks = [format!("vda={}", file("root.qcow2")), format!("vdb={}", file("data.qcow2"))];
    let at = format!("qemu:{}", file("gone.qmp"));
    domsnap.done(&["domain", "add", "web", "--disk", &disks[0], "--disk", &disks[1], "--at", &at])?;
    domsnap.done(&["recover", "web"])?;
    ensure!(!place.path().join("root.domsnap-probe.qcow2").exists(), "the empty file is left");
    ensure!(
        std::fs::read(file("data.domsnap-probe.qcow2"))? == b"mine",
        "a file with something in it is a user's"
    );
    Ok(())
}

/// Two internal snapshots of one name: which is meant cannot be determined, so neither is touched.
#[test]
fn tags_of_one_name_are_refused_before() -> Result<()> {
    let domain = Domain::unregistered(&Shape::disks(1))?;
    let path = domain.path("vda");
    let image = path.to_string_lossy().into_owned();
    for _ in 0..2 {
        qemu::img(&["snapshot", "-c", "twice", &image])?;
    }
    domain.domsnap().done(&["import", &image])?;
    for args in [["delete", &image, "twice"], ["delete", &image, "twice-2"], ["revert", &image, "twice"]] {
        let said = domain.domsnap().run(&args)?.expect_status(status::REFUSED)?;
        ensure!(said.stderr.contains("2 internal snapshots called twice"), "{said}");
    }
    domain.domsnap().done(&["create", &image, "next"])?;
    Ok(())
}

/// A disk that is gone can be left out of a create and taken out of the domain; old snapshots can be deleted.
#[test]
fn a_disk_that_is_gone_locks_nothing() -> Result<()> {
    let mut domain = Domain::new(&Shape::disks(2))?;
    domain.create("s1", "internal")?;
    domain.write_everywhere()?;
    domain.create("s2", "internal")?;
    std::fs::remove_file(domain.path("vdb"))?;
    domain.declined(&["create", NAME, "s3"], status::REFUSED)?;
    domain.domsnap().done(&["create", NAME, "s3", "--disk", "vdb=skip"])?;
    let said = domain.domsnap().done(&["delete", NAME, "s1"])?;
    ensure!(said.stdout.contains("vdb"), "the disk that is gone is not named: {said}");
    domain.declined(&["revert", NAME, "s2"], status::REFUSED)?;
    domain.declined(&["revert", NAME, "s2", "--disk", "vdx=skip"], status::REFUSED)?;
    let dry = domain.domsnap().done(&["revert", NAME, "s2", "--disk", "vdb=skip", "--dry-run"])?;
    ensure!(dry.stdout.contains("vdb: skipped as asked"), "{dry}");
    let said = domain.domsnap().done(&["revert", NAME, "s2", "--disk", "vdb=skip", "--save-current=was"])?;
    ensure!(said.stdout.contains("vdb: skipped as asked"), "{said}");
    let shown = domain.domsnap().done(&["show", NAME, "was"])?;
    ensure!(shown.stdout.contains("vdb") && shown.stdout.contains("skipped"), "{shown}");
    domain.domsnap().done(&["domain", "disk", "remove", NAME, "vdb"])?;
    domain.domsnap().done(&["create", NAME, "s4"])?;
    domain.domsnap().done(&["revert", NAME, "s2"])?;
    domain.declined(&["domain", "disk", "remove", NAME, "vda"], status::REFUSED)?;
    let other = domain.disks().join("new.qcow2");
    qemu::img(&["create", "-q", "-f", "qcow2", &other.to_string_lossy(), "4M"])?;
    domain.domsnap().done(&["domain", "disk", "add", NAME, &format!("vdc={}", other.display())])?;
    domain.domsnap().done(&["create", NAME, "s5"])?;
    let list = report::list(&domain.domsnap(), NAME)?;
    let last = list.snapshots.iter().find(|snapshot| snapshot.name == "s5");
    ensure!(last.is_some_and(|snapshot| snapshot.points.len() == 2), "the new disk is not in s5");
    Ok(())
}

/// An operation that stopped half way can be closed as it is; no file is touched, and the domain can be used
/// again.
#[test]
fn an_operation_can_be_abandoned() -> Result<()> {
    let domain = Domain::new(&Shape::disks(1))?;
    domain.domsnap().done(&["create", NAME, "s1", "--internal"])?;
    let mut stopped = false;
    // The first operations are of the journal; somewhere after them the create is under way.
    for number in 4..60 {
        let killed = shim::killing(shim::watching(domain.domsnap(), domain.root())?, number, false);
        killed.run(&["create", NAME, &format!("n{number}"), "--external"])?;
        let shown = domain.domsnap().done(&["domain", "list"])?;
        if shown.stdout.contains("needs recovery") {
            stopped = true;
            break;
        }
    }
    ensure!(stopped, "no create stopped half way");
    let before = images(&domain.disks())?;
    let said = domain.domsnap().done(&["recover", NAME, "--abandon"])?;
    ensure!(said.stdout.contains("abandoned") && said.stdout.contains("not undone"), "{said}");
    same_images(&domain.disks(), &before)?;
    ensure!(domain.domsnap().done(&["recover", NAME, "--abandon"])?.stdout.contains("nothing to recover"));
    domain.domsnap().done(&["create", NAME, "after", "--internal"])?;
    domain.domsnap().run(&["recover", "--abandon"])?.expect_status(status::USAGE)?;
    Ok(())
}

/// Makes the snapshots that an operation is to work on.
type Prepare = fn(&mut Domain) -> Result<()>;

/// Each call on the disks' directory fails once, and `recover` ends what that left: every image is whole and
/// has no leaked clusters, the catalogue knows no file that is gone, and the domain can be worked on.
#[test]
fn what_one_failed_call_leaves_is_recovered() -> Result<()> {
    let two_layers_removed: Prepare = |domain| {
        domain.create("s1", "external")?;
        domain.write_and_create("s2", "external")?;
        domain.write_and_create("s3", "external")?;
        domain.revert("s1")
    };
    let merged_down_and_path_moved: Prepare = |domain| {
        domain.create("s1", "internal")?;
        domain.write_everywhere()?;
        domain.create("s2", "external")?;
        domain.write_everywhere()
    };
    for (prepare, args) in [
        (two_layers_removed, &["delete", NAME, "s2", "--children"][..]),
        (merged_down_and_path_moved, &["delete", NAME, "s2"]),
    ] {
        let mut domain = Domain::new(&Shape::disks(1))?;
        prepare(&mut domain)?;
        let copies = tempfile::tempdir()?;
        let copy = copies.path().join("before");
        domain.save_to(&copy)?;
        let (_outputs, file) = shim::outputs()?;
        shim::counting(shim::watching(domain.domsnap(), domain.root())?, &file).done(args)?;
        let operations = shim::counted(&file)?;
        let of_disks: Vec<_> =
            operations.iter().filter(|operation| !operation.line.contains(" state/")).collect();
        ensure!(of_disks.len() > 3, "what fails? {operations:?}");
        for operation in of_disks {
            domain.restore_from(&copy)?;
            let watched = shim::watching(domain.domsnap(), domain.root())?;
            let said = shim::failing(watched, operation.number, "EIO", shim::Often::Once).run(args)?;
            let look = || -> Result<()> {
                domain.domsnap().done(&["recover", NAME])?;
                let check = domain.domsnap().done(&["check", NAME])?;
                ensure!(check.stdout.contains("all is well"), "{check}");
                for entry in std::fs::read_dir(domain.disks())? {
                    let image = entry?.path();
                    if image.extension().is_some_and(|extension| extension == "qcow2") {
                        qemu::check(&image)?;
                    }
                }
                domain.domsnap().done(&["create", NAME, "next", "--external"])?;
                domain.domsnap().done(&["delete", NAME, "next"]).map(drop)
            };
            look().with_context(|| format!("EIO at {}: {said}", operation.line))?;
        }
    }
    Ok(())
}

/// A domain that is changed while it is checked is not damaged, and is not said to be.
#[test]
fn check_of_a_domain_in_change_finds_no_damage() -> Result<()> {
    let mut domain = Domain::new(&Shape::disks(2))?;
    domain.create("s0", "external")?;
    let done = std::sync::atomic::AtomicBool::new(false);
    std::thread::scope(|scope| {
        let changes = scope.spawn(|| -> Result<()> {
            let changed = (1..12).try_for_each(|number| {
                let name = format!("s{number}");
                domain.domsnap().done(&["create", NAME, &name, "--external"])?;
                domain.domsnap().done(&["delete", NAME, &name]).map(drop)
            });
            done.store(true, std::sync::atomic::Ordering::Relaxed);
            changed
        });
        while !done.load(std::sync::atomic::Ordering::Relaxed) {
            let check = domain.domsnap().run(&["check", NAME])?;
            // A step that takes longer than the check waits is reported.
            ensure!(check.status == Some(status::DONE) || check.stdout.contains("runs just now"), "{check}");
        }
        changes.join().map_err(|_| anyhow::anyhow!("the changes panicked"))?
    })
}

/// Manifests of deleted snapshots go before anything is destroyed. Where they cannot be removed, the delete
/// is refused before its commit point; where no manifest can be at all, nothing waits for one.
#[test]
fn manifests_that_cannot_go_lock_nothing() -> Result<()> {
    let domain = Domain::unregistered(&Shape::disks(1))?;
    let image = domain.path("vda").to_string_lossy().into_owned();
    let manifests = format!("{image}.domsnap");
    let run = |args: &[&str]| domain.domsnap().run(args);
    run(&["create", &image, "s1"])?.expect_status(status::DONE)?;
    let flag = |how: &str| {
        let done = Command::new("chattr").args([how, &manifests]).output();
        done.is_ok_and(|output| output.status.success())
    };
    for (on, off, word) in [("+i", "-i", "immutable"), ("+a", "-a", "append-only")] {
        if !flag(on) {
            println!("SKIPPED: no flags of files to be had here");
            break;
        }
        let (deleted, created) =
            (run(&["delete", &image, "s1"]), run(&["create", &image, &format!("made{on}")]));
        ensure!(flag(off), "the flag stays");
        let deleted = deleted?.expect_status(status::REFUSED)?;
        ensure!(deleted.stderr.contains(word) && deleted.stderr.contains("`chattr -"), "{deleted}");
        let created = created?.expect_status(status::DONE)?;
        ensure!(created.stdout.contains("cannot be written"), "{created}");
        run(&["delete", &image, &format!("made{on}")])?.expect_status(status::DONE)?;
    }
    // Something else has the name of their directory.
    std::fs::rename(&manifests, format!("{manifests}.away"))?;
    qemu::run("mkfifo", &[&manifests])?;
    for args in [&["create", &image, "s2", "--external"][..], &["delete", &image, "s1"], &["recover"]] {
        run(args)?.expect_status(status::DONE)?;
    }
    let said = run(&["delete", &image, "s2"])?.expect_status(status::DONE)?;
    ensure!(said.stdout.contains("is a FIFO") && said.stdout.contains("move "), "{said}");

    // A new domain beside which no manifest can be is not half registered by a refusal.
    let new = domain.path("vda").with_file_name("new.qcow2").to_string_lossy().into_owned();
    qemu::img(&["create", "-q", "-f", "qcow2", &new, "8M"])?;
    std::os::unix::fs::symlink("nowhere", format!("{new}.domsnap"))?;
    for args in [&["create", &new, "s1"][..], &["delete", &new, "s1"]] {
        run(args)?.expect_status(status::DONE)?;
    }

    // Nor is a name too long for them a lock.
    let long = domain.path("vda").with_file_name("x".repeat(250)).to_string_lossy().into_owned();
    qemu::img(&["create", "-q", "-f", "qcow2", &long, "8M"])?;
    for args in [&["create", &long, "s1"][..], &["create", &long, "s2"], &["delete", &long, "s1"]] {
        run(args)?.expect_status(status::DONE)?;
    }
    Ok(())
}

/// A limit on the size of files ends one write, not the process in the middle of an operation.
#[test]
fn a_limited_file_size_is_an_error_of_one_write() -> Result<()> {
    let domain = Domain::unregistered(&Shape::disks(1))?;
    let path = domain.path("vda").with_file_name("large.qcow2");
    let image = path.to_string_lossy().into_owned();
    qemu::img(&["create", "-q", "-f", "qcow2", &image, "8M"])?;
    qemu::write(&path, &[Write { offset: 0, length: 4 << 20, byte: Some(1) }])?;
    domain.domsnap().done(&["create", &image, "s1", "--internal"])?;
    let before = qemu::read(&path, None)?;
    for args in [["create", &image, "s2"], ["revert", &image, "s1"], ["delete", &image, "s1"]] {
        let domsnap = domain.domsnap().command(&args);
        // One mebibyte: the catalogue is smaller, the image is not.
        let mut command = Command::new("sh");
        command.args(["-c", "ulimit -f 2048; exec \"$@\"", "sh"]);
        command.arg(domsnap.get_program()).args(domsnap.get_args());
        let output = command.env_remove("DOMSNAP_STATE_DIR").output()?;
        output.status.code().with_context(|| format!("{args:?} ended by a signal: {}", output.status))?;
        domain.domsnap().done(&["recover"])?;
        ensure!(qemu::read(&path, None)? == before, "{args:?} changed what the disk shows");
        qemu::img(&["check", "-q", &image])?;
    }
    Ok(())
}

/// The catalogue's file system has no byte left: snapshots are deleted and recoveries run all the same, and a
/// create either happens or is rolled back.
#[test]
fn full_file_system_of_the_catalogue_locks_nothing() -> Result<()> {
    for kind in ["tmpfs", "ext4"] {
        if !may_mount(kind) {
            return Ok(());
        }
        let mounted = Mounted::make_small(kind, 12 << 20)?;
        let dir = tempfile::tempdir()?;
        let image = dir.path().join("a.qcow2").display().to_string();
        qemu::img(&["create", "-q", "-f", "qcow2", &image, "4M"])?;
        let domsnap = Domsnap::new(&mounted.path().join("state"));
        for name in ["s1", "s2", "s3", "s4", "s5", "s6"] {
            domsnap.done(&["create", &image, name])?;
        }
        let fill = || -> Result<()> {
            for number in 0.. {
                let mut file = std::fs::File::create(mounted.path().join(format!("full-{number}")))?;
                // Whole blocks first, then what is left.
                let whole = std::io::copy(&mut std::io::repeat(1), &mut file);
                ensure!(whole.is_err_and(|error| error.kind() == std::io::ErrorKind::StorageFull));
                if file.metadata()?.len() == 0 {
                    return Ok(());
                }
            }
            Ok(())
        };
        fill()?;
        let stopped = Stop::create(&domsnap, &image, dir.path())?;
        fill()?;
        let said = domsnap.done(&["recover"]).with_context(|| format!("{kind}, stopped: {stopped}"))?;
        ensure!(!stopped || said.stdout.contains("create"), "{kind}: {said}");
        // Nor is there a block for SQLite's index of its log.
        std::fs::remove_file(mounted.path().join("state/catalogue.db-shm"))?;
        for name in ["s1", "s3", "s2"] {
            fill()?;
            domsnap.done(&["delete", &image, name]).with_context(|| kind.to_owned())?;
        }
        // Many more changes than the log's reserved room holds without a checkpoint.
        let rounds = if kind == "tmpfs" { 16 } else { 3 };
        for number in 0..rounds {
            fill()?;
            let name = format!("n{number}");
            let created = domsnap.run(&["create", &image, &name])?;
            domsnap.done(&["recover"])?;
            if created.status == Some(status::DONE) {
                domsnap.done(&["delete", &image, &name]).with_context(|| format!("{kind}, {name}"))?;
            }
        }
        domsnap.done(&["delete", &image, "s4", "s5", "s6"])?;
        domsnap.done(&["list", &image])?;
        qemu::check(std::path::Path::new(&image))?;
    }
    Ok(())
}

/// A quota that is used up, on a file system that copies on write, where nothing at all can be written: what
/// changes something is refused or rolled back with a message about the quota, what reads goes on, and
/// nothing is lost.
#[test]
fn quota_that_is_used_up_is_named() -> Result<()> {
    if !may_mount("btrfs") {
        return Ok(());
    }
    let mounted = Mounted::make("btrfs", 256 << 20)?;
    let limited = mounted.path().join("limited");
    let btrfs = |args: &[&str]| -> Result<()> {
        let done = std::process::Command::new("btrfs").args(args).arg(&limited).output()?;
        ensure!(done.status.success(), "btrfs {args:?}: {}", String::from_utf8_lossy(&done.stderr));
        Ok(())
    };
    btrfs(&["subvolume", "create"])?;
    btrfs(&["quota", "enable"])?;
    btrfs(&["qgroup", "limit", "12M"])?;
    let image = limited.join("a.qcow2").display().to_string();
    qemu::img(&["create", "-q", "-f", "qcow2", &image, "4M"])?;
    let domsnap = Domsnap::new(&limited.join("state"));
    for (name, kind) in [("i", "--internal"), ("e", "--external")] {
        domsnap.done(&["create", &image, name, kind])?;
    }
    let whole = qemu::read(std::path::Path::new(&image), None)?;
    let sync = || std::process::Command::new("sync").arg("-f").arg(&limited).status();
    sync()?;
    let mut file = std::fs::File::create(limited.join("full"))?;
    let filled = std::io::copy(&mut std::io::repeat(1), &mut file);
    ensure!(filled.is_err_and(|error| error.kind() == std::io::ErrorKind::QuotaExceeded));
    drop(file);
    sync()?;
    let listed = domsnap.done(&["list", &image])?;
    ensure!(listed.stdout.contains(" i ") && listed.stdout.contains(" e "), "{listed}");
    for args in [
        &["create", &image, "x", "--external"][..],
        &["create", &image, "x", "--internal"],
        &["revert", &image, "i"],
        &["delete", &image, "e"],
    ] {
        let outcome = domsnap.run(args)?;
        ensure!(outcome.status.is_some_and(|status| status < 5), "{outcome}");
        ensure!(outcome.status == Some(status::DONE) || outcome.stderr.contains("quota"), "{outcome}");
        ensure!(qemu::read(std::path::Path::new(&image), None)? == whole, "{args:?} changed the disk");
    }
    std::fs::remove_file(limited.join("full"))?;
    sync()?;
    domsnap.done(&["recover"])?;
    domsnap.done(&["create", &image, "y"])?;
    domsnap.done(&["check", &image])?;
    qemu::check(std::path::Path::new(&image))
}

/// On a file system of blocks of 1 KiB that is almost full, SQLite's index of its log had holes in its pages,
/// and the kernel ended domsnap by SIGBUS when it wrote there.
#[test]
fn almost_full_catalogue_of_small_blocks_ends_nothing() -> Result<()> {
    if !may_mount("ext4") {
        return Ok(());
    }
    // So small that mkfs gives it blocks of 1 KiB.
    let mounted = Mounted::make("ext4", 6 << 20)?;
    let dir = tempfile::tempdir()?;
    let image = dir.path().join("a.qcow2").display().to_string();
    qemu::img(&["create", "-q", "-f", "qcow2", &image, "1M"])?;
    let domsnap = Domsnap::new(&mounted.path().join("state"));
    domsnap.done(&["create", &image, "s"])?;
    let full = mounted.path().join("full");
    for left in (0..=48).step_by(4) {
        for args in [&["list", &image][..], &["create", &image, "x"], &["check", &image]] {
            // The index is made again.
            let _ = std::fs::remove_file(mounted.path().join("state/catalogue.db-shm"));
            let mut file = std::fs::File::create(&full)?;
            let filled = std::io::copy(&mut std::io::repeat(1), &mut file);
            ensure!(filled.is_err_and(|error| error.kind() == std::io::ErrorKind::StorageFull));
            file.set_len(file.metadata()?.len().saturating_sub(left << 10))?;
            file.sync_all()?;
            let outcome = domsnap.run(args)?;
            ensure!(outcome.status.is_some(), "{left} KiB left: {outcome}");
            std::fs::remove_file(&full)?;
            domsnap.done(&["recover"])?;
            if args[0] == "create" && outcome.status == Some(status::DONE) {
                domsnap.done(&["delete", &image, "x"])?;
            }
        }
    }
    domsnap.done(&["delete", &image, "s"])?;
    qemu::check(std::path::Path::new(&image))
}

/// A create that is killed half way.
struct Stop;

impl Stop {
    /// Returns true if one was left in the journal.
    fn create(domsnap: &Domsnap, image: &str, root: &std::path::Path) -> Result<bool> {
        for number in 4..40 {
            let killed = shim::killing(shim::watching(domsnap.clone(), root)?, number, false);
            killed.run(&["create", image, &format!("k{number}")])?;
            if domsnap.done(&["list", image, "--json"])?.json::<serde_json::Value>()?["unfinished"]
                .as_array()
                .is_some_and(|all| !all.is_empty())
            {
                return Ok(true);
            }
        }
        Ok(false)
    }
}

/// All names in a domain's directory, with sizes: what lies there, whatever it is.
fn names(domain: &Domain) -> Result<Vec<String>> {
    let mut all = Vec::new();
    let mut below = vec![domain.disks()];
    while let Some(directory) = below.pop() {
        for entry in std::fs::read_dir(&directory)? {
            let entry = entry?;
            if entry.file_type()?.is_dir() {
                below.push(entry.path());
            }
            all.push(entry.path().to_string_lossy().into_owned());
        }
    }
    all.sort();
    Ok(all)
}

/// Expects that each command is refused before anything, with this message, and predicted by a dry run; and
/// that nothing is left.
fn refused_before(
    domain: &Domain,
    commands: &[&[&str]],
    says: &str,
    with: impl Fn() -> Result<Domsnap>,
) -> Result<()> {
    let (before, there) = (images(&domain.disks())?, names(domain)?);
    for args in commands {
        for args in [args.to_vec(), [args, &["--dry-run"][..]].concat()] {
            let said = with()?.run(&args)?.expect_status(status::REFUSED)?;
            ensure!(said.stderr.contains(says), "{args:?}: {said}");
            ensure!(said.stderr.contains("no changes made"), "{args:?}: {said}");
            same_images(&domain.disks(), &before)?;
            ensure!(names(domain)? == there, "{args:?} left something: {:?}", names(domain)?);
        }
    }
    Ok(())
}

/// A file system without hard links is known before anything, also in a dry run; what needs none is done
/// there.
#[test]
fn missing_hard_links_are_known_before() -> Result<()> {
    let without = |domain: &Domain, kind: &str| -> Result<Domsnap> {
        let domsnap = shim::watching_all(domain.domsnap(), domain.root())?;
        Ok(domsnap.env("FAULTFS_FAIL_KIND", kind).env("FAULTFS_ERRNO", "EPERM"))
    };
    let mut domain = Domain::new(&Shape::disks(1))?;
    domain.create("s1", "external")?;
    domain.write_everywhere()?;
    let commands: [&[&str]; 2] = [&["create", NAME, "n", "--external"], &["revert", NAME, "s1"]];
    refused_before(&domain, &commands, "a hard link", || without(&domain, "link"))?;
    // A directory that takes no names, or lets none be moved or removed.
    refused_before(&domain, &commands, "takes no new file", || without(&domain, "create"))?;
    refused_before(&domain, &commands, "lets no file be renamed", || without(&domain, "rename"))?;
    without(&domain, "link")?.done(&["create", NAME, "inside", "--internal"])?;
    domain.domsnap().done(&["delete", NAME, "inside"])?;
    domain.verify()?;

    let mut raw = Domain::new(&Shape::raw(1))?;
    raw.create("s1", "copy")?;
    raw.write_everywhere()?;
    refused_before(&raw, &[&["revert", NAME, "s1"]], "a hard link", || without(&raw, "link"))?;
    without(&raw, "link")?.done(&["create", NAME, "n", "--disk", "vda=copy"])?;
    raw.domsnap().done(&["delete", NAME, "n"])?;
    raw.verify()
}

/// Shared memory lies below `/dev`, and its files are files: they are asked for before anything, can be gone,
/// and have clones beside them.
#[test]
fn disk_in_shared_memory_is_a_file() -> Result<()> {
    let memory = tempfile::Builder::new().prefix("domsnap-test-").tempdir_in("/dev/shm")?;
    let mut domain = Domain::new_in(&memory.path().join("domain"), &Shape::disks(2))?;
    domain.create("s1", "external")?;
    let without = || {
        let domsnap = shim::watching_all(domain.domsnap(), domain.root())?;
        Ok(domsnap.env("FAULTFS_FAIL_KIND", "link").env("FAULTFS_ERRNO", "EPERM"))
    };
    refused_before(&domain, &[&["create", NAME, "n", "--external"]], "a hard link", without)?;
    domain.domsnap().done(&["clone", NAME, "s1", "copy"])?;
    ensure!(domain.disks().join("copy").is_dir(), "the clone is not beside the domain's disks");
    // Its image has another name since it was frozen; the refusal says how it gets its own back.
    let image = domain.path("vdb");
    std::fs::remove_file(&image)?;
    let outcome = domain.declined(&["create", NAME, "s2"], status::REFUSED)?;
    let advice = outcome.stderr.split_once("(`ln ").and_then(|(_, rest)| rest.split_once("`)"));
    let (layer, name) = advice.and_then(|(names, _)| names.split_once(' ')).context("no advice")?;
    ensure!(std::path::Path::new(name) == image, "{outcome}");
    std::fs::hard_link(layer, &image)?;
    domain.domsnap().done(&["create", NAME, "s2"])?;
    Ok(())
}

/// What a killed try has left goes with the next operation.
#[test]
fn a_killed_try_leaves_nothing_for_long() -> Result<()> {
    let mut domain = Domain::new(&Shape::disks(1))?;
    let (mut left, there) = (0, names(&domain)?.len());
    for number in 1..12 {
        let killed = shim::killing(shim::watching_all(domain.domsnap(), &domain.disks())?, number, false);
        killed.run(&["create", NAME, "n", "--external", "--dry-run"])?;
        left += usize::from(names(&domain)?.len() > there);
        domain.domsnap().done(&["recover", NAME])?;
        ensure!(names(&domain)?.len() == there, "{number}: {:?}", names(&domain)?);
    }
    ensure!(left > 0, "no try was ever killed half way");
    domain.create("s1", "external")?;
    domain.verify()
}

/// Makes a file of all the room that there is.
fn fill_up(file: &std::path::Path) -> Result<()> {
    let mut made = std::fs::File::create(file)?;
    let (mut offset, mut step) = (0, 256 << 20);
    while step >= 512 {
        match rustix::fs::fallocate(&made, rustix::fs::FallocateFlags::empty(), offset, step) {
            Ok(()) => offset += step,
            Err(_) => step /= 2,
        }
    }
    // What an allocation leaves, plain writes take.
    std::io::Seek::seek(&mut made, std::io::SeekFrom::End(0))?;
    while std::io::Write::write_all(&mut made, &[1; 4096]).is_ok() {}
    Ok(())
}

/// Room for metadata and manifests is asked for before anything.
#[test]
fn room_for_metadata_is_asked_for_before() -> Result<()> {
    if !may_mount("tmpfs") {
        return Ok(());
    }
    let mounted = Mounted::make_small("tmpfs", 32 << 20)?;
    for (name, shape) in [("qcow2", Shape::disks(1)), ("raw", Shape::raw(1))] {
        let mut domain = Domain::new_in(&mounted.path().join(name), &shape)?;
        let kind = if shape.naming.1 == ".raw" { "copy" } else { "external" };
        domain.create("s1", kind)?;
        domain.write_everywhere()?;
        let filler = domain.disks().join("filler");
        fill_up(&filler)?;
        let choice = format!("vda={kind}");
        let commands: [&[&str]; 2] = [&["create", NAME, "n", "--disk", &choice], &["revert", NAME, "s1"]];
        refused_before(&domain, &commands, "room for", || Ok(domain.domsnap()))?;
        std::fs::remove_file(&filler)?;
        domain.delete(&["s1"])?;
        domain.verify()?;
    }
    Ok(())
}

/// An append-only directory and a file that is mounted are known before too.
#[test]
fn directories_that_keep_names_are_known_before() -> Result<()> {
    let mut domain = Domain::new(&Shape::disks(1))?;
    domain.create("s1", "external")?;
    domain.write_everywhere()?;
    let run = |args: &[&std::ffi::OsStr]| {
        let done = Command::new(args[0]).args(&args[1..]).output();
        done.is_ok_and(|output| output.status.success())
    };
    let commands: [&[&str]; 2] = [&["create", NAME, "n", "--external"], &["revert", NAME, "s1"]];
    let directory = domain.disks();
    if !run(&["chattr".as_ref(), "+a".as_ref(), directory.as_ref()]) {
        println!("SKIPPED: no append-only directories to be had here");
        return Ok(());
    }
    let checked = refused_before(&domain, &commands[..1], "append-only", || Ok(domain.domsnap()));
    ensure!(run(&["chattr".as_ref(), "-a".as_ref(), directory.as_ref()]), "the flag stays");
    checked?;
    let path = domain.path("vda");
    if run(&["mount".as_ref(), "--bind".as_ref(), path.as_ref(), path.as_ref()]) {
        let checked = refused_before(&domain, &commands, "is a mount point", || Ok(domain.domsnap()));
        ensure!(run(&["umount".as_ref(), path.as_ref()]), "the mount stays");
        checked?;
    }
    domain.verify()
}

/// Manifests lie beside the first disk. When that is taken out of the domain, those of the next one are all
/// that is left, wherever it is killed.
#[test]
fn manifests_follow_the_first_disk() -> Result<()> {
    let remove = ["domain", "disk", "remove", NAME, "vda"];
    for number in (0..24).step_by(3) {
        let mut domain = Domain::new(&Shape::disks(2))?;
        domain.create("s1", "internal")?;
        let previous = domain.disks().join("a.qcow2.domsnap");
        ensure!(previous.join("domain.json").exists(), "manifests are elsewhere");
        let whole = match number {
            0 => domain.domsnap().run(&remove)?,
            number => {
                shim::killing(shim::watching(domain.domsnap(), domain.root())?, number, false).run(&remove)?
            }
        };
        let killed = whole.status != Some(status::DONE);
        if number == 0 {
            ensure!(!killed, "{whole}");
        }
        // Whatever came of it, the next change writes what is true, and nothing is where no command looks.
        domain.domsnap().done(&["create", NAME, "s2", "--internal"])?;
        let shown = domain.domsnap().done(&["domain", "show", NAME])?;
        let has_first = shown.stdout.contains("/a.qcow2");
        let (here, there) = (previous.exists(), domain.disks().join("b.qcow2.domsnap").exists());
        ensure!(here == has_first && there != here, "{number}: {here} {there}: {shown}");
        if number > 0 && !killed {
            break;
        }
    }
    Ok(())
}
