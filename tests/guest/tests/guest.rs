//! The guest itself: it ticks, it notices, it is restored, and it does what it must.

use std::{fs, thread, time::Duration};

use anyhow::{Context, Result};
use serde_json::{Value, json};
use testguest::{COUNTER_BYTES, Guest, GuestOptions, Version, counter};

/// Overwrites bytes of a disk behind the guest's back, between two ticks, through the QEMU that has it open.
fn tamper(guest: &Guest, target: &str, offset: u64, size: u64) -> Result<()> {
    guest.hold()?;
    let line =
        format!("qemu-io -d /machine/peripheral/{target}/virtio-backend \"write -P 0xdd {offset} {size}\"");
    let said = guest.qmp("human-monitor-command", json!({ "command-line": line }))?;
    anyhow::ensure!(said == "", "{said}");
    guest.go_on()?;
    guest.wait_ticks(3)
}

/// Runs a job of QEMU's to its end.
fn job(guest: &Guest, name: &str, arguments: Value) -> Result<()> {
    guest.qmp(name, arguments)?;
    loop {
        let jobs = guest.qmp("query-jobs", Value::Null)?;
        let job =
            jobs.as_array().and_then(|jobs| jobs.iter().find(|job| job["id"] == "job")).context("the job")?;
        if job["status"] == "concluded" {
            anyhow::ensure!(job["error"].is_null(), "{job}");
            return guest.qmp("job-dismiss", json!({ "id": "job" })).map(drop);
        }
        thread::sleep(Duration::from_millis(5));
    }
}

fn snapshot(guest: &Guest, name: &str, tag: &str, devices: &[&str]) -> Result<()> {
    guest.qmp("stop", Value::Null)?;
    job(guest, name, json!({ "job-id": "job", "tag": tag, "vmstate": "d0", "devices": devices }))?;
    guest.qmp("cont", Value::Null).map(drop)
}

#[test]
fn one_line_gives_a_guest_of_two_disks_that_ticks() -> Result<()> {
    let guest = Guest::new()?;
    let before = guest.ticks()?;
    guest.wait_ticks(5)?;
    assert!(guest.ticks()? >= before + 5);
    guest.expect_no_bad()?;
    assert_eq!(guest.targets(), ["vda", "vdb"]);
    assert!(guest.disks().iter().all(|disk| disk.is_file()), "{:?}", guest.disks());
    assert_eq!(guest.processes().len(), 1);
    Ok(())
}

/// A guest that is dropped leaves neither process nor directory.
#[test]
fn dropped_guest_leaves_nothing() -> Result<()> {
    let guest = Guest::new()?;
    let (pid, dir) = (guest.pid().context("it runs")?, guest.dir().to_owned());
    drop(guest);
    assert!(!dir.exists());
    let line = fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
    assert!(!String::from_utf8_lossy(&line).contains(&dir.display().to_string()));
    Ok(())
}

/// Guests are restored from one memory and go their own ways.
#[test]
fn guests_share_one_saved_memory() -> Result<()> {
    let (one, two) = (Guest::new()?, Guest::new()?);
    for guest in [&one, &two] {
        assert_eq!(guest.boots(), 0, "it was restored, not booted");
        guest.expect_no_bad()?;
    }
    one.shell("echo one > /vda/name")?;
    assert_eq!(two.shell("cat /vda/name")?.stdout, b"");
    assert_eq!(one.shell("cat /vda/name")?.stdout, b"one\n");
    Ok(())
}

/// A guest that boots says what was on its disks and goes on from there after a kill.
#[test]
fn booted_guest_reports_its_disks() -> Result<()> {
    let mut guest = GuestOptions::new().from_boot().start()?;
    assert_eq!((guest.boots(), guest.counters_at_boot()), (1, vec![Some(8), Some(8)]));
    guest.wait_ticks(20)?;
    let (before, pid) = (guest.ticks()?, guest.pid());
    guest.restart()?;
    assert_ne!(guest.pid(), pid);
    assert_eq!(guest.boots(), 2);
    let found = guest.counters_at_boot();
    assert!(
        found.iter().all(|counter| counter.is_some_and(|counter| counter >= before)),
        "{found:?}, not {before}"
    );
    guest.expect_no_bad()
}

/// A counter that is changed behind the guests back is bad.
#[test]
fn changed_counter_is_bad() -> Result<()> {
    let guest = Guest::new()?;
    let offset = guest.counter_offset(1)?;
    guest.expect_no_bad()?;
    tamper(&guest, "vdb", offset, 4096)?;
    let error = guest.expect_no_bad().expect_err("the counter was overwritten");
    assert!(error.to_string().contains("BAD memory="), "{error}");
    guest.forget_bad();
    guest.expect_no_bad()
}

#[test]
fn one_sector_of_a_counter_is_enough_to_be_bad() -> Result<()> {
    let guest = Guest::new()?;
    let offset = guest.counter_offset(0)?;
    tamper(&guest, "vda", offset + 20480, 512)?;
    assert_eq!(guest.bad().len(), 1, "{:?}", guest.bad());
    Ok(())
}

/// Memory and disks of one instant are not bad and of two they are.
#[test]
fn two_instants_are_bad() -> Result<()> {
    let guest = Guest::new()?;
    snapshot(&guest, "snapshot-save", "whole", &["d0", "d1"])?;
    snapshot(&guest, "snapshot-save", "part", &["d0"])?;
    let saved = guest.ticks()?;
    guest.wait_ticks(100)?;
    let before = guest.ticks()?;
    assert!(before >= saved + 100);

    snapshot(&guest, "snapshot-load", "whole", &["d0", "d1"])?;
    guest.expect_no_bad()?;
    let now = guest.ticks()?;
    assert!(now < before, "it is at {now}, was at {before}: it has not gone back");

    // Now vdb gets ahead of what the second snapshot remembers of it: they must not be equal by chance.
    guest.wait_ticks(saved.saturating_sub(now) + 20)?;
    snapshot(&guest, "snapshot-load", "part", &["d0"])?;
    guest.wait_ticks(3)?;
    let error = guest.expect_no_bad().expect_err("vdb was left in the current state");
    assert!(error.to_string().contains("BAD memory="), "{error}");
    Ok(())
}

/// A counter is found in the image where the guest says.
#[test]
fn counter_is_found_in_the_image() -> Result<()> {
    let mut guest = Guest::new()?;
    let offset = guest.counter_offset(1)?;
    let held = guest.hold()?;
    guest.kill()?;
    let raw = guest.dir().join("raw");
    let converted = std::process::Command::new("qemu-img")
        .args(["convert", "-f", "qcow2", "-O", "raw"])
        .args([&guest.disk(1), &raw])
        .status()?;
    assert!(converted.success());
    let bytes = fs::read(&raw)?;
    let ring = bytes.get(offset as usize..offset as usize + COUNTER_BYTES).context("it lies on the disk")?;
    assert_eq!(counter(ring), Some(held));
    Ok(())
}

#[test]
fn a_guest_has_eight_disks() -> Result<()> {
    let guest = GuestOptions::new().disks(8).start()?;
    assert_eq!(guest.disks().len(), 8);
    guest.expect_no_bad()?;
    let offset = guest.counter_offset(7)?;
    tamper(&guest, "vdh", offset, 4096)?;
    assert_eq!(guest.bad().len(), 1, "{:?}", guest.bad());
    Ok(())
}

#[test]
fn disks_by_drive_have_no_node_names() -> Result<()> {
    let guest = GuestOptions::new().drive().start()?;
    guest.expect_no_bad()?;
    let drives = guest.qmp("query-block", Value::Null)?;
    let names: Vec<_> =
        drives.as_array().context("a list")?.iter().map(|drive| drive["device"].clone()).collect();
    assert_eq!(names, ["drive0", "drive1"]);
    assert!(
        drives[0]["inserted"]["node-name"].as_str().is_some_and(|name| name.starts_with("#block")),
        "{drives}"
    );
    Ok(())
}

#[test]
fn the_older_qemu_boots_and_restores_the_guest() -> Result<()> {
    for boot in [true, false] {
        let options = GuestOptions::new().version(Version::Old);
        let guest = if boot { options.from_boot() } else { options }.start()?;
        assert_eq!(guest.boots(), u64::from(boot));
        let version = guest.qmp("query-version", Value::Null)?;
        assert_eq!((&version["qemu"]["major"], &version["qemu"]["minor"]), (&json!(7), &json!(2)));
        guest.expect_no_bad()?;
    }
    Ok(())
}

#[test]
fn the_guest_agent_answers_and_sets_the_clock() -> Result<()> {
    let guest = Guest::new()?;
    guest.agent("guest-ping", Value::Null)?;
    let systems = guest.agent("guest-get-fsinfo", Value::Null)?;
    let mounted: Vec<_> = systems
        .as_array()
        .context("a list")?
        .iter()
        .filter_map(|system| system["mountpoint"].as_str())
        .collect();
    assert!(mounted.contains(&"/vda") && mounted.contains(&"/vdb"), "{mounted:?}");
    guest.agent("guest-set-time", json!({ "time": 2_000_000_000_000_000_000_i64 }))?;
    let year = guest.shell("date -u +%Y")?;
    assert_eq!(String::from_utf8_lossy(&year.stdout), "2033\n");
    guest.expect_no_bad()
}

#[test]
fn memory_load_dirties_memory_at_about_the_rate() -> Result<()> {
    let guest = Guest::new()?;
    let measured = || -> Result<i64> {
        guest.qmp("calc-dirty-rate", json!({ "calc-time": 1, "sample-pages": 4096 }))?;
        loop {
            let rate = guest.qmp("query-dirty-rate", Value::Null)?;
            if rate["status"] == "measured" {
                return rate["dirty-rate"].as_i64().context("a number");
            }
            thread::sleep(Duration::from_millis(50));
        }
    };
    let idle = measured()?;
    guest.dirty(40, 20.0)?;
    let before = guest.status()?;
    let loaded = measured()?;
    let after = guest.status()?;
    // QEMU counts each page once in the time that it takes to look: enough to see that pages really change.
    assert!(loaded >= idle + 4, "QEMU measures {loaded} MiB/s, {idle} without the load");
    // By the guest's own clock it cannot be faster, but for the fifth of a second that it may make up for; on
    // a machine that is busy it may be slower.
    let (pages, seconds) = (after.dirtied - before.dirtied, (after.up - before.up).as_secs_f64());
    let rate = pages as f64 / 256.0 / seconds;
    let most = 20.0 * (seconds + 0.25) / seconds;
    assert!((5.0..=most).contains(&rate), "{rate} MiB/s over {seconds} s");

    guest.dirty(0, 0.0)?;
    let ended = guest.status()?.dirtied;
    guest.wait_ticks(20)?;
    assert_eq!(guest.status()?.dirtied, ended);
    guest.expect_no_bad()
}

#[test]
fn disk_load_writes_blocks_whose_content_is_known() -> Result<()> {
    let guest = Guest::new()?;
    guest.blocks(64, 0.0)?;
    while guest.status()?.operations < 400 {
        guest.wait_ticks(5)?;
    }
    assert_eq!(guest.verify_blocks()?, 128, "64 on each disk");
    guest.expect_no_bad()?;

    // A block that others wrote is no longer what memory knows, unless the load writes it again first: it is
    // slowed down to a block in hours.
    guest.blocks(64, 1e-4)?;
    assert_eq!(
        guest.shell("dd if=/dev/urandom of=/vdb/blocks bs=4096 count=1 conv=notrunc && sync")?.status,
        0
    );
    let error = guest.verify_blocks().map(|_| ()).and_then(|()| guest.expect_no_bad());
    assert!(
        error.is_err_and(|error| error.to_string().contains("BAD block disk=1 index=0")),
        "{:?}",
        guest.bad()
    );
    Ok(())
}

#[test]
fn a_guest_that_is_stopped_has_a_gap() -> Result<()> {
    let guest = Guest::new()?;
    guest.wait_ticks(5)?;
    guest.forget_gap();
    guest.wait_ticks(5)?;
    guest.qmp("stop", Value::Null)?;
    thread::sleep(Duration::from_millis(700));
    assert!(
        guest.largest_gap() >= Duration::from_millis(700),
        "{:?}, and it has not ended",
        guest.largest_gap()
    );
    guest.qmp("cont", Value::Null)?;
    guest.wait_ticks(3)?;
    assert!(guest.largest_gap() >= Duration::from_millis(700), "{:?}", guest.largest_gap());
    guest.forget_gap();
    assert!(
        guest.largest_gap() < Duration::from_millis(700),
        "{:?}, and it was forgotten",
        guest.largest_gap()
    );
    Ok(())
}

/// A guest that is stopped does not answer and the error says so.
#[test]
fn stopped_guest_is_an_error() -> Result<()> {
    let mut guest = Guest::new()?;
    guest.qmp("stop", Value::Null)?;
    guest.set_deadline(Duration::from_millis(300));
    let error = guest.ticks().expect_err("it is stopped");
    assert!(error.to_string().contains("the guest did not answer \"status\" within 300ms"), "{error}");
    guest.set_deadline(Duration::from_secs(180));
    guest.qmp("cont", Value::Null)?;
    guest.expect_no_bad()
}

#[test]
fn the_shell_gives_status_and_output() -> Result<()> {
    let guest = Guest::new()?;
    let output = guest.shell("printf 'a\\0b'; exit 3")?;
    assert_eq!((output.status, output.stdout.as_slice()), (3, b"a\0b".as_slice()));
    Ok(())
}

#[test]
fn a_command_that_is_not_known_is_an_error() -> Result<()> {
    let error = Guest::new()?.command("dance").expect_err("it cannot");
    assert!(error.to_string().contains("error not understood: dance"), "{error}");
    Ok(())
}

/// A qemu that another starts on the same directory is the guest too.
#[test]
fn restarted_qemu_is_the_same_guest() -> Result<()> {
    let mut guest = Guest::new()?;
    let (dir, first) = (guest.dir().to_owned(), guest.pid());
    guest.kill()?;
    assert_eq!(guest.pid(), None);
    let line = guest.command_line().to_owned();
    let mut another = std::process::Command::new(&line[0]).args(&line[1..]).spawn()?;
    guest.wait_boots(1)?;
    assert_eq!(guest.processes(), [another.id()]);
    assert_ne!(guest.pid(), first);
    guest.expect_no_bad()?;
    drop(guest);
    assert!(!another.wait()?.success(), "it was killed");
    assert!(!dir.exists());
    Ok(())
}

#[test]
fn a_guest_has_what_else_its_command_line_names() -> Result<()> {
    let drive = "file=DIR/seed.iso,format=raw,if=none,id=cd,media=cdrom,readonly=on";
    let options = GuestOptions::new().file("seed.iso", vec![7; 65536]).more(&["-drive", drive]);
    let guest = options.more(&["-device", "ide-cd,drive=cd,id=cd0"]).start()?;
    let drives = guest.qmp("query-block", Value::Null)?;
    let found = drives.as_array().context("a list")?.iter().find(|drive| drive["device"] == "cd");
    let file = found.context("the cdrom")?["inserted"]["file"].as_str().map(str::to_owned);
    assert_eq!(file, guest.dir().join("seed.iso").to_str().map(str::to_owned));
    guest.expect_no_bad()
}

/// More load than the guest has memory is an error and not its end.
#[test]
fn too_much_load_is_an_error() -> Result<()> {
    let guest = Guest::new()?;
    let error = guest.dirty(1000, 1.0).expect_err("it has 128");
    assert!(error.to_string().contains("has no 1000 MiB to spare"), "{error}");
    guest.expect_no_bad()
}

#[test]
fn a_reset_guest_boots_again_in_the_same_process() -> Result<()> {
    let guest = Guest::new()?;
    let (pid, before) = (guest.pid(), guest.ticks()?);
    guest.qmp("system_reset", Value::Null)?;
    guest.wait_boots(1)?;
    assert_eq!(guest.pid(), pid);
    assert!(guest.counters_at_boot()[0].is_some_and(|counter| counter >= before));
    guest.expect_no_bad()
}

#[test]
fn a_guest_that_shuts_down_ends_its_qemu() -> Result<()> {
    let mut guest = Guest::new()?;
    guest.blocks(64, 0.0)?;
    guest.quit()?;
    assert_eq!(guest.pid(), None);
    guest.restart()?;
    guest.expect_no_bad()?;
    // The way that the guest agent takes.
    guest.shell("/sbin/shutdown -h -P +0")?;
    guest.wait_end()?;
    assert_eq!(guest.bad(), [""; 0]);
    Ok(())
}

/// Too little memory is refused before anything is started.
#[test]
fn too_little_memory_is_refused() {
    let error = GuestOptions::new().memory_mib(32).start().expect_err("no Linux starts in it");
    assert!(format!("{error:#}").contains("96 at least"), "{error:#}");
}

#[tokio::test(flavor = "multi_thread")]
async fn it_can_be_used_inside_a_runtime() -> Result<()> {
    let guest = Guest::new()?;
    let qmp = qmp::Qmp::connect(guest.qmp_socket()).await?;
    qmp.execute_raw("stop", Value::Null).await?;
    qmp.execute_raw("cont", Value::Null).await?;
    drop(qmp);
    guest.expect_no_bad()?;
    guest.qmp("query-status", Value::Null)?;
    Ok(())
}

/// A frozen guest does not tick and goes on when it is thawed.
#[tokio::test(flavor = "multi_thread")]
async fn frozen_guest_does_not_tick() -> Result<()> {
    let mut guest = Guest::new()?;
    guest.set_deadline(Duration::from_secs(1));
    let agent = qmp::Agent::new(guest.agent_socket());
    let frozen = agent.freeze(qmp::Freeze::default()).await?;
    let before = guest.ticks()?;
    let error = guest.wait_ticks(3).expect_err("its counters cannot be written");
    assert!(error.to_string().contains("did not tick 3 times"), "{error}");
    assert!(guest.ticks()? <= before + 1, "it answers, it does not tick");
    frozen.thaw().await?;
    guest.set_deadline(Duration::from_secs(180));
    guest.expect_no_bad()
}
