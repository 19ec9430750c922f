//! Tests with the supported QEMUs, which `scripts/install-qemu` installs.

mod machine;

use std::{
    io::{Read, Seek, Write},
    os::{fd::AsRawFd, unix::net::UnixListener},
    time::Duration,
};

use machine::{BOTH, Machine, Version};
use qapi_qmp::{query_kvm, query_status, query_version, quit};
use qmp::{ErrorKind, JobStatus, Notice, Options};
use serde_json::{Value, json};

/// Returns the next event of that name. The deadline is for a failing test.
async fn wait_for(events: &mut qmp::Events, name: &str) -> qmp::Event {
    let search = async {
        loop {
            match events.next().await.expect("the connection lives") {
                Notice::Event(event) if event.name == name => return event,
                _ => {}
            }
        }
    };
    tokio::time::timeout(Duration::from_secs(30), search).await.unwrap_or_else(|_| panic!("no event {name}"))
}

/// A socket that a supervisor opened and handed to QEMU is QEMU's, whether the supervisor lives or not.
#[tokio::test]
async fn handed_socket_is_served_by_qemu() {
    for version in BOTH {
        let dir = tempfile::tempdir().expect("a directory");
        let path = dir.path().join("a monitor");
        let listener = UnixListener::bind(&path).expect("a listener");
        rustix::io::fcntl_setfd(&listener, rustix::io::FdFlags::empty()).expect("it is inherited");
        let handed = format!("socket,id=handed,fd={},server=on,wait=off", listener.as_raw_fd());
        let machine = Machine::start(version, &["-chardev", &handed, "-mon", "chardev=handed,mode=control"]);
        let qmp = qmp::Qmp::connect(&path).await.expect("QEMU serves it");
        assert_eq!(
            qmp.peer().map(|peer| peer.pid),
            machine.process.id(),
            "{version:?}: the supervisor has it open"
        );
        drop((qmp, listener));
        let qmp = qmp::Qmp::connect(&path).await.expect("QEMU serves it");
        let peer = qmp.peer().expect("its process is known");
        assert_eq!(Some(peer.pid), machine.process.id(), "{version:?}: the supervisor has closed it");
        assert_eq!(peer.uid, rustix::process::getuid().as_raw());
        assert!(peer.start_ticks.is_some());
    }
}

/// A connection greets, runs typed and raw commands, and returns QEMU's refusals.
#[tokio::test]
async fn commands_run_typed_and_raw() {
    for version in BOTH {
        let machine = Machine::start(version, &[]);
        let qmp = machine.qmp().await;
        let major = qmp.execute(query_version {}).await.expect("a version").qemu.major;
        assert_eq!(major, if version == Version::New { 10 } else { 7 });
        assert_eq!(qmp.greeting().version.map(|version| version.0), u64::try_from(major).ok());
        assert!(qmp.has_oob(), "{version:?} offers out-of-band commands");
        assert_eq!(qmp.peer().map(|peer| peer.pid), machine.process.id());
        assert!(!qmp.execute(query_kvm {}).await.expect("a reply").enabled);
        qmp.execute(query_status {}).await.expect("a status");

        let error = qmp.execute_raw("no-such-command", Value::Null).await.expect_err("it does not exist");
        assert_eq!((error.kind(), error.class()), (ErrorKind::Unsupported, Some("CommandNotFound")));
        let error = qmp.execute_raw("blockdev-del", json!({"node-name": "x"})).await.expect_err("no node");
        assert_eq!((error.kind(), error.may_have_run()), (ErrorKind::Refused, false));
        assert!(
            error.to_string().contains("blockdev-del on ")
                && error.desc() == Some("Failed to find node with node-name='x'"),
            "{error}"
        );

        let mut events = qmp.events();
        qmp.execute(quit {}).await.expect("it quits");
        let shutdown = wait_for(&mut events, "SHUTDOWN").await;
        assert_eq!(shutdown.data["reason"], "host-qmp-quit");
        qmp.closed().await;
        assert_eq!(qmp.execute(query_status {}).await.expect_err("it is gone").kind(), ErrorKind::Lost);
    }
}

/// Abilities are read from the schema, and differ between versions.
#[tokio::test]
async fn schema_differs_between_versions() {
    let mut abilities = Vec::new();
    for version in BOTH {
        let machine = Machine::start(version, &[]);
        let qmp = machine.qmp().await;
        let schema = qmp.schema().await.expect("a schema");
        assert!(schema.has_command("transaction") && !schema.has_command("transmogrify"));
        assert!(schema.has_event("JOB_STATUS_CHANGE"));
        assert!(schema.has_argument("blockdev-add", "driver=qcow2.backing"));
        assert!(schema.has_argument("blockdev-reopen", "options.driver=qcow2.backing.driver"));
        assert!(!schema.has_argument("blockdev-add", "driver=raw.backing"));
        assert!(schema.has_argument("transaction", "actions.type=blockdev-snapshot.data.overlay"));
        assert!(schema.has_value("transaction", "actions.type", "blockdev-snapshot-internal-sync"));
        assert!(schema.has_value(
            "migrate-set-capabilities",
            "capabilities.capability",
            "background-snapshot"
        ));
        assert!(schema.has_reply("query-block", "inserted.image.backing-image.backing-image.filename"));
        let again = qmp.schema().await.expect("a schema");
        assert!(std::sync::Arc::ptr_eq(&schema, &again), "it is asked for once");
        abilities.push((
            schema.has_value("migrate-set-capabilities", "capabilities.capability", "mapped-ram"),
            schema.has_argument("migrate", "channels.addr.transport=file.offset"),
            schema.has_argument("migrate-set-parameters", "direct-io"),
        ));
    }
    assert_eq!(abilities, [(true, true, true), (false, false, false)]);
}

#[tokio::test]
async fn out_of_band_commands_are_agreed_on_and_run() {
    for version in BOTH {
        let machine = Machine::start(version, &[]);
        let qmp = machine.qmp().await;
        // Both are allowed out of band; without a migration to recover they are refused, each with its own
        // message.
        let error = qmp.execute_oob(qapi_qmp::migrate_pause {}).await.expect_err("no migration");
        assert!(
            error.kind() == ErrorKind::Refused && error.desc().unwrap_or_default().contains("migrat"),
            "{error}"
        );
        let error = qmp.execute_oob_raw("stop", Value::Null).await.expect_err("not out of band");
        assert!(error.desc().unwrap_or_default().contains("does not support OOB"), "{error}");
        drop(qmp);

        let mut options = Options::default();
        options.oob = false;
        let qmp = machine.qmp_with(options).await;
        assert!(!qmp.has_oob());
        let error = qmp.execute_oob(qapi_qmp::migrate_pause {}).await.expect_err("not agreed on");
        assert_eq!((error.kind(), error.may_have_run()), (ErrorKind::Unsupported, false));
        qmp.execute(query_status {}).await.expect("the connection is usable");
    }
}

/// Descriptors reach QEMU by `getfd` and `add-fd`, also many at once.
#[tokio::test]
async fn descriptors_reach_qemu() {
    for version in BOTH {
        let machine = Machine::start(version, &[]);
        let qmp = machine.qmp().await;
        qmp.get_fd("one", std::fs::File::open("/dev/null").expect("open")).await.expect("getfd");
        qmp.execute_raw("closefd", json!({"fdname": "one"})).await.expect("QEMU has it");

        // Eight files of different sizes, all at once: each set must have its own.
        let mut adding = tokio::task::JoinSet::new();
        for number in 1..=8i64 {
            let mut file = tempfile::tempfile_in(machine.dir.path()).expect("a file");
            file.set_len(u64::try_from(number).expect("small") * 65536).expect("a size");
            file.write_all(&[b'0' + u8::try_from(number).expect("small")]).expect("a mark");
            let qmp = qmp.clone();
            adding.spawn(async move {
                let info =
                    qmp.add_fd(Some(number), Some(&format!("file {number}")), &file).await.expect("add-fd");
                assert_eq!(info.fdset_id, number);
                (number, info.fd, file)
            });
        }
        let pid = machine.process.id().expect("it runs");
        while let Some(added) = adding.join_next().await {
            let (number, fd, mut ours) = added.expect("no panic");
            let mut theirs = std::fs::File::open(format!("/proc/{pid}/fd/{fd}")).expect("QEMU's descriptor");
            let (mut mark, mut expected) = ([0], [0]);
            theirs.read_exact(&mut mark).expect("a mark");
            ours.rewind().and_then(|()| ours.read_exact(&mut expected)).expect("a mark");
            assert_eq!(mark, expected, "set {number} has another's descriptor");
            assert_eq!(theirs.metadata().expect("stat").len(), u64::try_from(number).expect("small") * 65536);
        }
    }
}

/// A long job: a mirror at one byte a second.
async fn slow_job(machine: &Machine, qmp: &qmp::Qmp) {
    let base = machine.path("base.raw");
    std::fs::write(&base, vec![7; 1 << 20]).expect("a base");
    let overlay = machine.path("overlay.raw");
    std::fs::write(&overlay, vec![0; 1 << 20]).expect("a target");
    for (node, file) in [("source", &base), ("target", &overlay)] {
        qmp.execute_raw(
            "blockdev-add",
            json!({"driver": "raw", "node-name": node, "file": {"driver": "file", "filename": file}}),
        )
        .await
        .expect("a node");
    }
    qmp.execute_raw(
        "blockdev-mirror",
        json!({"job-id": "slow", "device": "source", "target": "target", "sync": "full", "speed": 1, "auto-dismiss": false}),
    )
    .await
    .expect("a job");
}

/// A second connection waits for the first, and then finds its jobs.
#[tokio::test]
async fn second_connection_waits_for_the_first() {
    for version in BOTH {
        let drive = ["-drive", "if=none,id=cd,media=cdrom"];
        let machine = Machine::start(version, &drive);
        let first = machine.qmp().await;
        slow_job(&machine, &first).await;
        // QEMU serves one client at a time.
        let mut options = Options::default();
        options.connect_deadline = Duration::from_millis(300);
        let error =
            qmp::Qmp::connect_with(machine.path("qmp"), options).await.expect_err("the first is served");
        assert!(error.kind() == ErrorKind::Timeout && error.to_string().contains("one client"), "{error}");
        drop(first);

        let again = machine.qmp().await;
        let now = again.reconcile().await.expect("reconciled");
        let job = now.job("slow").expect("the job goes on");
        assert_eq!((job.kind.as_str(), &job.status, job.total), ("mirror", &JobStatus::Running, 1 << 20));
        assert_eq!(now.drives.len(), 1);
        assert!(now.drives[0].removable && now.drives[0].device == "cd" && now.drives[0].inserted.is_none());
        let cancelled = again.execute_raw("job-cancel", json!({"id": "slow"})).await;
        cancelled.expect("the job is cancelled by the new connection");
    }
}

/// A QEMU that was restarted is distinguished from the previous one.
#[tokio::test]
async fn restarted_qemu_is_another_process() {
    for version in BOTH {
        let mut machine = Machine::start(version, &[]);
        let qmp = machine.qmp().await;
        slow_job(&machine, &qmp).await;
        machine.restart().await;
        qmp.closed().await;
        let error = qmp.execute(query_status {}).await.expect_err("it was killed");
        assert_eq!((error.kind(), error.may_have_run()), (ErrorKind::Lost, false));
        let (qmp, now) = qmp.reconnect(Duration::from_secs(30)).await.expect("the new one is served");
        assert_eq!((now.same_process, now.jobs.len()), (Some(false), 0));
        qmp.execute(query_status {}).await.expect("the new connection is usable");
    }
}

/// A command that was given up leaves the connection usable.
#[tokio::test]
async fn abandoned_command_keeps_the_connection() {
    for version in BOTH {
        let machine = Machine::start(version, &[]);
        let qmp = machine.qmp().await;
        for _ in 0..50 {
            let schema = qmp.execute_raw("query-qmp-schema", Value::Null);
            let given_up = tokio::time::timeout(Duration::from_micros(300), schema).await;
            drop(given_up);
            qmp.execute(query_status {}).await.expect("the next reply is the next command's");
        }
        qmp.execute(query_version {}).await.expect("a version");
    }
}

/// A chain deeper than the default limit of JSON parsers is read.
#[tokio::test]
async fn very_long_chain_is_read() {
    const LAYERS: usize = 140;
    for version in BOTH {
        let machine = Machine::start(version, &["-M", "pc", "-S"]);
        let qmp = machine.qmp().await;
        let image = machine.path("empty.qcow2");
        let made = std::process::Command::new("qemu-img")
            .args(["create", "-q", "-f", "qcow2"])
            .arg(&image)
            .arg("64K")
            .status();
        assert!(made.expect("qemu-img runs: scripts/install-deps").success());
        let base = json!({"driver": "null-co", "node-name": "n0", "size": 65536, "read-zeroes": true});
        qmp.execute_raw("blockdev-add", base).await.expect("the base");
        for layer in 1..=LAYERS {
            let copy = machine.path(&format!("{layer}.qcow2"));
            std::fs::copy(&image, &copy).expect("a copy");
            let node = json!({"driver": "qcow2", "node-name": format!("n{layer}"), "read-only": layer < LAYERS,
                "file": {"driver": "file", "filename": copy}, "backing": format!("n{}", layer - 1)});
            qmp.execute_raw("blockdev-add", node).await.expect("a layer");
        }
        let device = json!({"driver": "virtio-blk-pci", "id": "vd0", "drive": format!("n{LAYERS}")});
        qmp.execute_raw("device_add", device).await.expect("a device");
        let drives = qmp.reconcile().await.expect("it is read").drives;
        let drive =
            drives.iter().find(|drive| drive.qdev.as_deref().is_some_and(|qdev| qdev.contains("vd0")));
        let drive = drive.expect("the drive");
        let mut image = &drive.raw["inserted"]["image"];
        let mut depth = 0;
        while let Some(backing) = image.get("backing-image") {
            (image, depth) = (backing, depth + 1);
        }
        assert_eq!(depth, LAYERS);
        assert_eq!(
            drive.inserted.as_ref().and_then(|inserted| inserted.node.clone()),
            Some(format!("n{LAYERS}"))
        );
    }
}

/// The real guest agent is synced, answers, and survives garbage. It runs on this machine, so the test only
/// queries it.
#[tokio::test]
async fn real_guest_agent_answers() {
    let program = machine::old_root().join("usr/bin/qemu-ga");
    assert!(program.is_file(), "{} is missing: run scripts/install-qemu", program.display());
    let dir = tempfile::tempdir().expect("a directory");
    let socket = dir.path().join("ga");
    let mut process = tokio::process::Command::new(program)
        .args(["-m", "unix-listen", "-t"])
        .arg(dir.path())
        // All commands that could change this machine are disabled.
        .args(["-b", "guest-fsfreeze-freeze,guest-fsfreeze-freeze-list,guest-shutdown,guest-exec,guest-file-open,guest-set-time,guest-fstrim"])
        .arg("-p")
        .arg(&socket)
        .stdin(std::process::Stdio::null())
        .stderr(std::process::Stdio::null())
        .kill_on_drop(true)
        .spawn()
        .expect("qemu-ga starts");
    for _ in 0..1000 {
        if socket.exists() {
            break;
        }
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    {
        // A previous client left half a command. This agent listens itself, and may reset a connection that
        // waits while it closes one: so its end is awaited.
        use std::{io::Read, net::Shutdown, os::unix::net::UnixStream};
        let mut stream = UnixStream::connect(&socket).expect("it listens");
        stream.write_all(b"{\"execute\": \"guest-info\"}\n{\"execute\": \"gue").expect("it is written");
        stream.shutdown(Shutdown::Write).expect("it is closed");
        stream.set_read_timeout(Some(Duration::from_secs(60))).expect("a limit");
        let _ = stream.read_to_end(&mut Vec::new());
    }
    let agent = qmp::Agent::new(&socket);
    for _ in 0..20 {
        agent.execute(qmp::qapi_qga::guest_ping {}).await.expect("a reply");
    }
    let info = agent.execute(qmp::qapi_qga::guest_info {}).await.expect("a reply");
    assert!(info.version.starts_with("7.2") && info.supported_commands.len() > 20, "{}", info.version);
    let error = agent.execute_raw("guest-no-such", Value::Null).await.expect_err("no such command");
    assert_eq!(error.kind(), ErrorKind::Unsupported);
    process.kill().await.expect("it is killed");
    let error = agent.execute(qmp::qapi_qga::guest_ping {}).await.expect_err("it is gone");
    assert!(matches!(error.kind(), ErrorKind::Connect | ErrorKind::Lost), "{error}");
}
