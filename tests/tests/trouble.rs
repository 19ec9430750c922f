//! What goes wrong around domsnap: others who hold the images, full disks, closed doors, missing files. It
//! says so in a message, nothing is lost, nothing is left behind, and once the trouble is over everything
//! works.

use std::io::Write as _;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use anyhow::{Context, Result, ensure};
use domsnap_tests::domain::{Domain, NAME, Shape, images, same_images};
use domsnap_tests::domsnap::{self, Outcome, status};
use domsnap_tests::shim::{self, Often};
use domsnap_tests::{crash, qemu, report, scenario, verify};

fn line(disks: usize, kinds: &[&str]) -> Result<Domain> {
    let mut domain = Domain::new(&Shape::disks(disks))?;
    for (index, kind) in kinds.iter().enumerate() {
        domain.create(&format!("s{}", index + 1), kind)?;
        domain.write_everywhere()?;
    }
    Ok(domain)
}

/// Whether the test can go on; where it cannot, it says why.
fn as_root() -> bool {
    let root = Command::new("id").arg("-u").output().is_ok_and(|out| out.stdout == b"0\n");
    if !root {
        println!("SKIPPED: only root can mount and change users");
    }
    root
}

/// A mount that goes with the test.
struct Mount(PathBuf);

impl Mount {
    fn new(args: &[&str], at: &Path) -> Result<Mount> {
        let at_text = at.to_str().context("a path that is no text")?;
        qemu::run("mount", &[args, &[at_text]].concat())?;
        Ok(Mount(at.to_owned()))
    }
}

impl Drop for Mount {
    fn drop(&mut self) {
        let done = qemu::run("umount", &["-l".as_ref(), self.0.as_os_str()]);
        if let Err(error) = done {
            eprintln!("{} stays mounted: {error:#}", self.0.display());
        }
    }
}

/// A `domsnap` that was stopped in the middle of its work, and holds what it holds.
struct Stopped {
    child: Option<Child>,
}

impl Stopped {
    /// Stops `domsnap` before the operation that `choose` counts. A checkpoint of the catalogue may come
    /// earlier or later than in the run that was counted, and is many operations: where the domain is not
    /// locked then, it is tried again.
    fn amid(
        domain: &mut Domain,
        args: &[String],
        choose: impl Fn(&Domain, &[String]) -> Result<u64>,
    ) -> Result<Stopped> {
        let (outputs, _) = shim::outputs()?;
        let copy = outputs.path().join("whole");
        domain.save_to(&copy)?;
        for _ in 0..5 {
            let stopped = Stopped::before(domain, args, choose(domain, args)?)?;
            if stopped.has_lock()? {
                return Ok(stopped);
            }
            stopped.finish()?;
            domain.restore_from(&copy)?;
        }
        anyhow::bail!("it was never stopped with the domain's lock")
    }

    fn has_lock(&self) -> Result<bool> {
        let pid = self.child.as_ref().context("it was finished")?.id();
        let open = std::fs::read_dir(format!("/proc/{pid}/fd"))?;
        let mut files = open.flatten().filter_map(|entry| std::fs::read_link(entry.path()).ok());
        Ok(files.any(|file| file.ends_with("locks/guest.lock")))
    }

    /// Starts `domsnap` with `args` and waits until it is paused just before operation `number`.
    fn before(domain: &Domain, args: &[String], number: u64) -> Result<Stopped> {
        let domsnap = shim::stopping(shim::watching(domain.domsnap(), domain.root())?, number);
        let child = domsnap.command(args).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn()?;
        let mut stopped = Stopped { child: Some(child) };
        let child = stopped.child.as_mut().context("just started")?;
        for _ in 0..2000 {
            let stat = std::fs::read_to_string(format!("/proc/{}/stat", child.id()))?;
            if stat.rsplit(") ").next().is_some_and(|rest| rest.starts_with('T')) {
                return Ok(stopped);
            }
            ensure!(child.try_wait()?.is_none(), "it ended before operation {number}");
            std::thread::sleep(std::time::Duration::from_millis(5));
        }
        anyhow::bail!("it never came to operation {number}")
    }

    /// Lets it go on to its end.
    fn finish(mut self) -> Result<Outcome> {
        let child = self.child.take().context("already finished")?;
        qemu::run("kill", &["-CONT".to_owned(), child.id().to_string()])?;
        let output = child.wait_with_output()?;
        Ok(Outcome {
            command: "the domsnap that was stopped".into(),
            status: output.status.code(),
            stdout: String::from_utf8_lossy(&output.stdout).into_owned(),
            stderr: String::from_utf8_lossy(&output.stderr).into_owned(),
        })
    }
}

impl Drop for Stopped {
    fn drop(&mut self) {
        if let Some(child) = &mut self.child {
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

/// The number of the first operation of `args` whose line has one of `parts`, on a copy of the domain.
fn operation(domain: &Domain, args: &[String], part: &str) -> Result<u64> {
    let operations = counted(domain, args)?;
    let found = operations.iter().find(|operation| operation.line.contains(part));
    Ok(found.with_context(|| format!("no {part:?} in {operations:?}"))?.number)
}

/// The operation in the middle of the writes to images: threads may need an operation more or less before it
/// than in the run that was counted.
fn amid_writes(domain: &Domain, args: &[String]) -> Result<u64> {
    let operations = counted(domain, args)?;
    let is_of_image = |line: &str| line.starts_with("write disks/") && line.contains(".qcow2 at ");
    let writes: Vec<_> = operations.iter().filter(|operation| is_of_image(&operation.line)).collect();
    ensure!(writes.len() > 2, "{} writes to images in {operations:?}", writes.len());
    Ok(writes[writes.len() / 2].number)
}

fn counted(domain: &Domain, args: &[String]) -> Result<Vec<shim::Counted>> {
    let (outputs, file) = shim::outputs()?;
    let copy = outputs.path().join("copy");
    domain.save_to(&copy)?;
    shim::counting(shim::watching(domain.domsnap(), domain.root())?, &file).done(args)?;
    domain.restore_from(&copy)?;
    shim::counted(&file)
}

mod others {
    use super::*;

    /// A second domsnap on the same domain is refused and the first finishes.
    #[test]
    fn second_domsnap_is_refused() -> Result<()> {
        let mut domain = line(2, &["external"])?;
        let args = domain.create_args("first", "external");
        let stopped = Stopped::amid(&mut domain, &args, |domain, args| operation(domain, args, "disks/"))?;
        for second in
            [domain.create_args("second", "internal"), vec!["revert".into(), NAME.into(), "s1".into()]]
        {
            let outcome = domain.declined(&second, status::REFUSED)?;
            ensure!(outcome.stderr.contains(NAME), "the domain is not named: {outcome}");
        }
        stopped.finish()?.expect_status(status::DONE)?;
        domain.model.create("first");
        domain.verify()?;
        domain.create("second", "internal")?;
        domain.verify()
    }

    /// An image that a qemu writes is refused until it lets go.
    #[test]
    fn image_open_in_qemu_is_refused() -> Result<()> {
        let mut domain = line(2, &["external"])?;
        let running = qemu::Running::on(&domain.path("vdb"))?;
        let commands: [&[&str]; 4] = [
            &["create", NAME, "x", "--internal"],
            &["create", NAME, "x", "--external"],
            &["revert", NAME, "s1"],
            &["delete", NAME, "s1"],
        ];
        for args in commands {
            let outcome = domain.declined(args, status::REFUSED)?;
            ensure!(outcome.stderr.contains("/b.qcow2"), "the image is not named: {outcome}");
        }
        running.stop()?;
        domain.verify()?;
        domain.create("x", "external")?;
        domain.verify()
    }

    #[test]
    fn a_qemu_is_refused_while_we_hold_the_image() -> Result<()> {
        let mut domain = line(1, &[])?;
        let args = domain.create_args("s1", "internal");
        let stopped = Stopped::amid(&mut domain, &args, amid_writes)?;
        let refused = Command::new("qemu-io")
            .args(["-f", "qcow2", "-c", "write 0 512"])
            .arg(domain.path("vda"))
            .output()?;
        let args = String::from_utf8_lossy(&refused.stderr);
        ensure!(!refused.status.success() && args.contains("lock"), "qemu-io went through: {args}");
        stopped.finish()?.expect_status(status::DONE)?;
        domain.model.create("s1");
        domain.verify()
    }

    /// What a killed domsnap left is healed by the next command.
    #[test]
    fn next_command_heals_after_a_kill() -> Result<()> {
        let mut domain = line(2, &["external", "external", "external"])?;
        let args: Vec<String> = ["delete", NAME, "s2"].map(Into::into).into();
        let number = operation(&domain, &args, "unlink disks/")?;
        let outcome =
            shim::killing(shim::watching(domain.domsnap(), domain.root())?, number, false).run(&args)?;
        ensure!(outcome.status.is_none(), "it was not killed: {outcome}");
        domain.create("s4", "external")?;
        let list = report::list(&domain.domsnap(), NAME)?;
        if list.snapshots.iter().all(|snapshot| snapshot.name != "s2") {
            domain.model.delete(&["s2".into()]);
        }
        domain.verify()
    }
}

mod closed_doors {
    use super::*;

    /// Every change is declined with a message while the door is closed, and possible once it is open.
    fn declines_everything(
        domain: &mut Domain,
        close: impl FnOnce(&Path) -> Result<Box<dyn FnOnce()>>,
    ) -> Result<()> {
        let open = close(&domain.disks())?;
        let commands: [&[&str]; 4] = [
            &["create", NAME, "x", "--external"],
            &["revert", NAME, "s1"],
            &["delete", NAME, "s1"],
            &["create", NAME, "x", "--disk", "vda=internal", "--disk", "vdb=external"],
        ];
        let result = (|| -> Result<()> {
            for args in commands {
                let before = images(&domain.disks())?;
                let outcome = domain.domsnap().run(args)?;
                ensure!(matches!(outcome.status, Some(status::FAILED | status::REFUSED)), "{outcome}");
                ensure!(
                    !outcome.panicked() && outcome.stderr.contains("disks"),
                    "the place is not named: {outcome}"
                );
                same_images(&domain.disks(), &before).with_context(|| outcome.to_string())?;
            }
            Ok(())
        })();
        open();
        result?;
        domain.verify()?;
        domain.create("x", "external")?;
        domain.verify()
    }

    #[test]
    fn a_directory_mounted_read_only() -> Result<()> {
        if !as_root() {
            return Ok(());
        }
        declines_everything(&mut line(2, &["external", "external"])?, |disks| {
            let text = disks.to_str().context("a path that is no text")?;
            let mount = Mount::new(&["--bind", text], disks)?;
            qemu::run("mount", &["-o", "remount,bind,ro", text])?;
            Ok(Box::new(move || drop(mount)))
        })
    }

    /// A directory in which nothing can be made or removed.
    #[test]
    fn read_only_directory() -> Result<()> {
        if !as_root() {
            return Ok(());
        }
        let mut domain = line(2, &["external", "external"])?;
        if let Err(error) = qemu::run("chattr", &["+i".as_ref(), domain.disks().as_os_str()]) {
            println!("SKIPPED: this file system has no immutable directories: {error:#}");
            return Ok(());
        }
        declines_everything(&mut domain, |disks| {
            let disks = disks.to_owned();
            Ok(Box::new(move || {
                qemu::run("chattr", &["-i".as_ref(), disks.as_os_str()]).expect("make it mutable again");
            }))
        })
    }

    #[test]
    fn an_image_without_permission() -> Result<()> {
        if !as_root() {
            return Ok(());
        }
        let mut domain = line(1, &["external"])?;
        // Another user, who owns the state and the directory but not the image, with a copy of the binary in
        // reach.
        let copy = domain.root().join("domsnap");
        std::fs::copy(domsnap::binary(), &copy)?;
        std::fs::set_permissions(&copy, std::fs::Permissions::from_mode(0o755))?;
        std::fs::set_permissions(domain.root(), std::fs::Permissions::from_mode(0o755))?;
        qemu::run("chown", &["-R".as_ref(), "65534:65534".as_ref(), domain.state().as_os_str()])?;
        qemu::run("chown", &["65534:65534".as_ref(), domain.disks().as_os_str()])?;
        std::fs::set_permissions(domain.path("vda"), std::fs::Permissions::from_mode(0o600))?;
        let unprivileged = domain.domsnap().binary(&copy).through(&[
            "setpriv",
            "--reuid=65534",
            "--regid=65534",
            "--clear-groups",
        ]);
        let commands: [&[&str]; 3] = [
            &["create", NAME, "x", "--external"],
            &["create", NAME, "x", "--internal"],
            &["delete", NAME, "s1"],
        ];
        for args in commands {
            let before = images(&domain.disks())?;
            let outcome = unprivileged.run(args)?;
            ensure!(matches!(outcome.status, Some(status::FAILED | status::REFUSED)), "{outcome}");
            let said = outcome.stderr.to_lowercase();
            ensure!(
                said.contains("permission") && said.contains(".qcow2"),
                "not said which and why: {outcome}"
            );
            same_images(&domain.disks(), &before).with_context(|| outcome.to_string())?;
        }
        qemu::run("chown", &["-R".as_ref(), "0:0".as_ref(), domain.root().as_os_str()])?;
        domain.verify()?;
        domain.create("x", "internal")?;
        domain.verify()
    }

    /// A missing backing file is named and everything works once it is back.
    #[test]
    fn missing_backing_file_is_named() -> Result<()> {
        let mut domain = line(1, &["external", "external"])?;
        let list = report::list(&domain.domsnap(), NAME)?;
        let layer = domain.disks().join(&list.snapshots[0].points[0].layer);
        let name = layer.file_name().context("no name")?.to_string_lossy().into_owned();
        let aside = domain.root().join("aside");
        std::fs::rename(&layer, &aside)?;
        let commands: [&[&str]; 3] =
            [&["revert", NAME, "s1"], &["delete", NAME, "s1"], &["delete", NAME, "s2"]];
        for args in commands {
            let before = images(&domain.disks())?;
            let outcome = domain.domsnap().run(args)?;
            ensure!(matches!(outcome.status, Some(status::FAILED | status::REFUSED)), "{outcome}");
            ensure!(outcome.stderr.contains(&name), "{name} is not named: {outcome}");
            same_images(&domain.disks(), &before).with_context(|| outcome.to_string())?;
        }
        std::fs::rename(&aside, &layer)?;
        domain.verify()?;
        domain.delete(&["s1"])?;
        domain.verify()
    }
}

mod full_disks {
    use super::*;

    /// What a command does to the model, once it has happened.
    type Effect = fn(&mut domsnap_tests::model::Model);

    /// On a small file system nothing is lost however little is free.
    #[test]
    fn full_file_system_loses_nothing() -> Result<()> {
        if !as_root() {
            return Ok(());
        }
        let place = tempfile::tempdir()?;
        let _mount = Mount::new(&["-t", "tmpfs", "-o", "size=24M", "tmpfs"], place.path())?;
        let mut domain = Domain::new_in(place.path(), &Shape::disks(2))?;
        domain.fill(2 << 20)?;
        domain.create("s1", "external")?;
        domain.fill(1 << 20)?;
        domain.create("s2", "internal")?;
        domain.write_everywhere()?;
        let commands: [(&[&str], Effect); 4] = [
            (&["create", NAME, "x", "--external"], |model| model.create("x")),
            (&["create", NAME, "x", "--internal"], |model| model.create("x")),
            (&["revert", NAME, "s1"], |model| model.revert("s1")),
            (&["delete", NAME, "s1"], |model| model.delete(&["s1".into()])),
        ];
        let copies = tempfile::tempdir()?;
        let mut refused = 0;
        for (index, (args, effect)) in commands.into_iter().enumerate() {
            for free in [0, 4096, 16_384, 65_536, 262_144] {
                let copy = copies.path().join(format!("{index}-{free}"));
                domain.save_to(&copy)?;
                let filler = place.path().join("filler");
                fill_up(&filler, free)?;
                let outcome = domain.domsnap().run(args)?;
                std::fs::remove_file(&filler)?;
                let said = format!("with {free} bytes free: {outcome}");
                ensure!(!outcome.panicked(), "{said}");
                let mut model = domain.model.clone();
                match outcome.status {
                    Some(status::DONE) => effect(&mut model),
                    Some(status::FAILED | status::REFUSED) => {
                        refused += 1;
                        ensure!(!outcome.stderr.trim().is_empty(), "no args {said}");
                    }
                    Some(status::NEEDS_RECOVERY) => {
                        domain.domsnap().done(&["recover"]).context(said.clone())?;
                        let list = report::list(&domain.domsnap(), NAME)?;
                        if verify::tree(&list, &model).is_err() {
                            effect(&mut model);
                        }
                    }
                    _ => anyhow::bail!("{said}"),
                }
                verify::every_point(&domain, &model, NAME, &mut Default::default()).context(said)?;
                domain_restore(&domain, &copy)?;
            }
        }
        ensure!(refused > 0, "the file system was never full");
        domain.verify()
    }

    /// As [`Domain::restore_from`], for a domain whose root is a mount point.
    fn domain_restore(domain: &Domain, from: &Path) -> Result<()> {
        for part in ["disks", "state"] {
            std::fs::remove_dir_all(domain.root().join(part))?;
            domsnap_tests::domain::copy_tree(&from.join(part), &domain.root().join(part))?;
        }
        Ok(())
    }

    /// Leaves `free` bytes of the file system of `filler`.
    fn fill_up(filler: &Path, free: u64) -> Result<()> {
        let mut file = std::fs::File::create(filler)?;
        let block = vec![1; 4096];
        while file.write_all(&block).is_ok() {}
        let length = file.metadata()?.len() / 4096 * 4096;
        file.set_len(length.saturating_sub(free))?;
        Ok(())
    }
}

macro_rules! failures {
    ($($module:ident $errno:literal $often:ident { $($test:ident $scenario:ident)* })*) => {$(
        mod $module {
            use super::*;
            $(#[test]
            fn $test() {
                crash::fail_everywhere(scenario::$scenario, $errno, Often::$often)
                    .unwrap_or_else(|error| panic!("{error:#}"));
            })*
        }
    )*};
}

failures! {
    one_operation_fails_with_an_io_error_during "EIO" Once {
        clone_mixed CLONE_MIXED
        create_mixed CREATE_MIXED
        revert_materialised REVERT_INTERNAL_MATERIALISED
        delete_from_the_middle DELETE_MIDDLE_BIG_ABOVE
    }
    the_disk_is_full_from_some_operation_on_during "ENOSPC" FromThenOn {
        clone_external CLONE_EXTERNAL
        clone_full CLONE_FULL
        create_mixed CREATE_MIXED
        revert_saving_current REVERT_SAVING_CURRENT
        delete_from_the_middle DELETE_MIDDLE_BIG_ABOVE
        delete_internal DELETE_LEAF_INTERNAL
    }
}

mod an_interrupt_undoes_or_finishes {
    use super::*;

    fn anywhere(scenario: domsnap_tests::scenario::Scenario) -> usize {
        crash::interrupt_everywhere(scenario).unwrap_or_else(|error| panic!("{error:#}"))
    }

    #[test]
    fn a_create() {
        assert!(anywhere(scenario::CREATE_MIXED) > 0, "no interrupt was heard before the commit point");
    }

    #[test]
    fn a_clone() {
        assert!(anywhere(scenario::CLONE_FULL) > 0, "no interrupt was heard before the commit point");
    }

    #[test]
    fn a_revert() {
        assert!(
            anywhere(scenario::REVERT_INTERNAL_MATERIALISED) > 0,
            "none was heard before the commit point"
        );
    }

    /// Its commit point is its first record: what an interrupt stops after that is at most a merge.
    #[test]
    fn a_delete() {
        anywhere(scenario::DELETE_MIDDLE_BIG_ABOVE);
    }
}
