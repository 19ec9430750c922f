//! Plug-ins that hang, die, flood, lie and speak garbage: what they do ends as an error, and the journal
//! heals.
//!
//! Each is the good example with something else in it, as long as a file beside it says so.

use std::os::unix::fs::PermissionsExt;
use std::sync::Arc;
use std::time::Duration;

use backend_plugin::{Limits, Plugin};
use camino::{Utf8Path, Utf8PathBuf};
use catalogue_sqlite::SqliteCatalogue;
use snapcore::backend::Severity;
use snapcore::service::{CreateRequest, DomainRef, DomainSpec, Domsnap, RevertRequest};
use snapcore::{DomainName, Error, ErrorKind, Registry, SnapshotName, Target};
use tokio_util::sync::CancellationToken;

const EXAMPLES: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../examples");
const GOOD: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../examples/domsnap-backend-dir.py");

/// Time limit without news, for tests that wait for its end.
const SILENCE: Duration = Duration::from_secs(4);

struct Fixture {
    directory: tempfile::TempDir,
    limits: Limits,
}

fn name(text: &str) -> SnapshotName {
    SnapshotName::new(text).unwrap()
}

impl Fixture {
    /// Makes a disk with the points `one` and `two`, and a plug-in that behaves well until `otherwise` is
    /// enabled.
    async fn new(otherwise: &str) -> Self {
        let fixture =
            Self { directory: tempfile::tempdir().unwrap(), limits: Limits::default().frame(1 << 20) };
        let script = format!(
            "#!/usr/bin/env python3\n\
             import importlib.util, os, signal, sys, time\n\
             sys.path.append({EXAMPLES:?})\n\
             spec = importlib.util.spec_from_file_location('good', {GOOD:?})\n\
             good = importlib.util.module_from_spec(spec)\n\
             spec.loader.exec_module(good)\n\
             raw = lambda line: (sys.stdout.buffer.write(line), sys.stdout.buffer.flush())\n\
             def instead(method, does):\n\
             \x20   was = good.METHODS[method]\n\
             \x20   good.METHODS[method] = lambda params, call: does(was, params, call)\n\
             if os.path.exists({:?}):\n\
             \x20   {}\n\
             good.main()\n",
            fixture.path("otherwise"),
            otherwise.trim().replace('\n', "\n    ")
        );
        let program = fixture.path("domsnap-backend-dir");
        std::fs::write(&program, script).unwrap();
        std::fs::set_permissions(&program, std::fs::Permissions::from_mode(0o755)).unwrap();
        std::fs::write(fixture.path("disk"), b"first").unwrap();
        let service = fixture.service();
        let spec = DomainSpec::new(DomainName::new("web").unwrap()).disk(
            Target::new("vda").unwrap(),
            fixture.path("disk"),
            "dir",
        );
        service.domain_add(&spec).await.unwrap();
        for (point, next) in [("one", "second"), ("two", "third")] {
            service
                .create(&fixture.domain(), CreateRequest::new(name(point)), CancellationToken::new())
                .await
                .unwrap();
            std::fs::write(fixture.path("disk"), next).unwrap();
        }
        fixture
    }

    fn path(&self, name: &str) -> Utf8PathBuf {
        Utf8Path::from_path(self.directory.path()).unwrap().join(name)
    }

    fn domain(&self) -> DomainRef {
        DomainRef::Name(DomainName::new("web").unwrap())
    }

    fn service(&self) -> Domsnap {
        let plugin = Plugin::with_limits("dir", self.path("domsnap-backend-dir"), self.limits);
        let mut registry = Registry::new();
        registry.register(Arc::new(plugin)).unwrap();
        Domsnap::new(Arc::new(SqliteCatalogue::new(self.path("state"))), registry)
    }

    fn impatient(mut self) -> Self {
        self.limits = Limits::default().silence(SILENCE);
        self
    }

    /// A revert to `one` while the plug-in does otherwise.
    async fn reverted(&self) -> snapcore::Result<()> {
        std::fs::write(self.path("otherwise"), "").unwrap();
        let done = self
            .service()
            .revert(&self.domain(), RevertRequest::new(name("one")), CancellationToken::new())
            .await;
        std::fs::remove_file(self.path("otherwise")).unwrap();
        done.map(drop)
    }

    /// The error of that; and all is as it was, or is after a recovery by a plug-in that does as it should.
    async fn refused(&self) -> Error {
        let error = self.reverted().await.expect_err("it did otherwise, and no check saw it");
        let service = self.service();
        service.recover(Some(&self.domain()), CancellationToken::new()).await.unwrap();
        self.is_whole(&service, "third").await;
        error
    }

    /// Checks that the journal is empty, the disk has this content, and every point is unchanged.
    async fn is_whole(&self, service: &Domsnap, current: &str) {
        let listing = service.list(&self.domain()).await.unwrap();
        assert!(listing.unfinished.is_empty(), "{:?}", listing.unfinished);
        let names: Vec<_> = listing.snapshots.iter().map(|snapshot| snapshot.name.as_str()).collect();
        assert_eq!(names, ["one", "two"]);
        assert_eq!(std::fs::read_to_string(self.path("disk")).unwrap(), current);
        for (point, content) in [("one", "first"), ("two", "second")] {
            service
                .revert(&self.domain(), RevertRequest::new(name(point)), CancellationToken::new())
                .await
                .unwrap();
            assert_eq!(std::fs::read_to_string(self.path("disk")).unwrap(), content);
        }
        let findings = service.check(&self.domain()).await.unwrap();
        let bad: Vec<_> = findings.iter().filter(|found| found.severity > Severity::Note).collect();
        assert!(bad.is_empty(), "{bad:?}");
    }
}

async fn says(otherwise: &str, kind: ErrorKind, texts: &[&str]) {
    expects(Fixture::new(otherwise).await, kind, texts).await;
}

async fn expects(fixture: Fixture, kind: ErrorKind, texts: &[&str]) {
    let error = fixture.refused().await;
    let message = error.to_string();
    for text in texts {
        assert!(message.contains(text), "{text:?} is not in: {message}");
    }
    let fits = error.kind() == kind || error.kind() == ErrorKind::NeedsRecovery;
    assert!(fits, "{:?}: {message}", error.kind());
}

#[tokio::test(flavor = "multi_thread")]
async fn one_that_hangs_in_a_step_is_killed() {
    let fixture = Fixture::new("instead('apply', lambda was, p, c: time.sleep(3600))").await.impatient();
    expects(fixture, ErrorKind::Io, &["sent no answer to 'apply' and no progress for 4 seconds"]).await;
}

/// A plug-in that hangs before anything is recorded is killed.
#[tokio::test(flavor = "multi_thread")]
async fn plugin_that_hangs_is_killed() {
    let fixture = Fixture::new("instead('plan', lambda was, p, c: time.sleep(3600))").await.impatient();
    expects(fixture, ErrorKind::Io, &["sent no answer to 'plan'"]).await;
}

/// A plug-in that reports the same progress for ever hangs too.
#[tokio::test(flavor = "multi_thread")]
async fn repeated_progress_counts_as_a_hang() {
    let otherwise = "def on(was, p, c):\n    while True:\n        c.progress(1, 10)\n        time.sleep(0.1)\n\
                     instead('apply', on)";
    let fixture = Fixture::new(otherwise).await.impatient();
    expects(fixture, ErrorKind::Io, &["sent no answer to 'apply'"]).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn one_that_is_stopped_is_killed() {
    let fixture =
        Fixture::new("instead('apply', lambda was, p, c: os.kill(0, signal.SIGSTOP))").await.impatient();
    expects(fixture, ErrorKind::Io, &["sent no answer to '"]).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn one_that_never_says_who_it_is_is_killed() {
    let fixture = Fixture::new("time.sleep(3600)").await.impatient();
    expects(fixture, ErrorKind::Io, &["sent no answer to 'hello'"]).await;
}

/// The death of a plug-in in a step is reported with the end of its standard error.
#[tokio::test(flavor = "multi_thread")]
async fn death_in_a_step_is_reported_with_stderr() {
    let otherwise = "def die(was, p, c):\n    sys.stderr.write('the disk is on fire\\n')\n    sys.stderr.flush()\n    \
                     os._exit(3)\ninstead('apply', die)";
    says(
        otherwise,
        ErrorKind::Io,
        &["exit status: 3", "its last output on standard error: the disk is on fire"],
    )
    .await;
}

/// A plug-in that dies after a step leaves the rest to the recovery.
#[tokio::test(flavor = "multi_thread")]
async fn death_after_a_step_is_recovered_later() {
    let otherwise = "def die(was, p, c):\n    was(p, c)\n    os._exit(4)\ninstead('apply', die)";
    says(otherwise, ErrorKind::Io, &["exit status: 4"]).await;
}

/// A plug-in that dies in an undo leaves the rest to the recovery.
#[tokio::test(flavor = "multi_thread")]
async fn death_in_an_undo_is_recovered_later() {
    let otherwise = "def fail(was, p, c):\n    raise good.Failure('no-space', 'no room')\n\
                     instead('apply', fail)\ninstead('undo', lambda was, p, c: os._exit(5))";
    says(otherwise, ErrorKind::NeedsRecovery, &["no room", "exit status: 5", "domsnap recover"]).await;
}

/// A plug-in that is killed while it locks is reported.
#[tokio::test(flavor = "multi_thread")]
async fn death_in_hold_is_reported() {
    says(
        "instead('lock', lambda was, p, c: os.kill(os.getpid(), signal.SIGKILL))",
        ErrorKind::Io,
        &["signal: 9"],
    )
    .await;
}

/// A plug-in that cannot be run is reported.
#[tokio::test(flavor = "multi_thread")]
async fn program_that_cannot_be_run_is_reported() {
    let fixture = Fixture::new("pass").await;
    std::fs::write(fixture.path("domsnap-backend-dir"), "#!/no/such/interpreter\n").unwrap();
    let error = fixture.reverted().await.unwrap_err();
    assert!(error.to_string().contains("cannot be started"), "{error}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_frame_without_end_is_not_kept_for_ever() {
    let otherwise = "instead('apply', lambda was, p, c: [raw(b'x' * 65536) for _ in range(1000)])";
    says(otherwise, ErrorKind::Internal, &["more than 1048576 bytes without an end of line"]).await;
}

/// A flood of progress and of output on standard error does no harm.
#[tokio::test(flavor = "multi_thread")]
async fn flood_of_progress_and_stderr_is_handled() {
    let otherwise = "def flood(was, p, c):\n    for n in range(20000):\n        c.progress(n, 20000)\n    for _ in \
                     range(200):\n        sys.stderr.write('x' * 65536)\n    return was(p, c)\ninstead('apply', flood)";
    let fixture = Fixture::new(otherwise).await;
    fixture.reverted().await.unwrap();
    fixture.is_whole(&fixture.service(), "first").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn garbage_is_not_taken_for_an_answer() {
    for (line, text) in [
        ("b'Segmentation fault\\n'", "did not send JSON-RPC"),
        ("b'\\xff\\xfe\\x00\\n'", "did not send JSON-RPC"),
        ("b'[' * 200000 + b'\\n'", "did not send JSON-RPC"),
        ("b'{\"id\":1,\"result\":null}\\n'", "did not send JSON-RPC 2.0"),
        ("b'{\"jsonrpc\":\"2.0\",\"id\":\"x\",\"result\":null}\\n'", "without a number"),
        ("b'{\"jsonrpc\":\"2.0\",\"id\":%d}\\n' % c.number", "neither a result nor an error"),
        ("b'{\"jsonrpc\":\"2.0\",\"id\":%d,\"error\":7}\\n' % c.number", "sent an invalid error"),
        ("b'{\"jsonrpc\":\"2.0\",\"id\":1,\"method\":\"rm\",\"params\":[]}\\n'", "sent a request"),
    ] {
        let otherwise = format!("instead('apply', lambda was, p, c: raw({line}))");
        says(&otherwise, ErrorKind::Internal, &[text]).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn unrequested_answer_is_a_violation() {
    let answer = |id: &str| format!("raw(b'{{\"jsonrpc\":\"2.0\",\"id\":%d,\"result\":null}}\\n' % ({id}))");
    let wrong = format!("instead('apply', lambda was, p, c: {})", answer("c.number + 1000"));
    says(&wrong, ErrorKind::Internal, &["which was never sent"]).await;
    // Answered here, and once more when it is done.
    let twice = format!("instead('apply', lambda was, p, c: (was(p, c), {}) and None)", answer("c.number"));
    says(&twice, ErrorKind::Internal, &["which was never sent"]).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_answer_of_another_shape_is_a_lie() {
    for (method, result) in [
        ("apply", "[1]"),
        ("status", "'perhaps'"),
        ("plan", "{'steps': 7}"),
        ("inspect", "None"),
        ("lock", "{'lock': 5}"),
        ("lock", "{'lock': ''}"),
    ] {
        let otherwise = format!("instead({method:?}, lambda was, p, c: {result})");
        says(&otherwise, ErrorKind::Internal, &["answered", "with an invalid value"]).await;
    }
}

/// A step that is reported as done, and is not, is undone.
#[tokio::test(flavor = "multi_thread")]
async fn step_falsely_reported_as_done_is_undone() {
    says(
        "instead('apply', lambda was, p, c: None)",
        ErrorKind::Internal,
        &["it succeeded, and its status is NotDone"],
    )
    .await;
}

/// A plan that would change anything but its own disk is refused.
#[tokio::test(flavor = "multi_thread")]
async fn plan_that_changes_other_objects_is_refused() {
    let id = "00000000-0000-7000-8000-000000000000";
    for (change, text) in [
        ("plan['prepare'][0]['target'] = 'vdb'", "of another disk: vdb".to_owned()),
        ("plan['finish'][0]['target'] = 'vdb'", "of another disk: vdb".to_owned()),
        ("plan['steps'] = plan.pop('cut')", "unknown field `steps`".to_owned()),
        (
            &format!("plan['commit'] = [{{'edit': 'remove-snapshot', 'id': '{id}'}}]"),
            "not its disk's".to_owned(),
        ),
        ("plan['commit'] = [{'edit': 'set-current', 'id': None}]", "not its disk's".to_owned()),
        (
            "plan['commit'] = [{'edit': 'set-active', 'target': 'vdb', 'layer': 'x'}]",
            "another disk: vdb".to_owned(),
        ),
        (
            "plan['commit'] = [{'edit': 'set-path', 'target': 'vda', 'path': 'relative'}]",
            "not an absolute canonical path".to_owned(),
        ),
        (
            "plan['commit'] = [{'edit': 'set-path', 'target': 'vda', 'path': '/a/../etc/x'}]",
            "not an absolute canonical path".to_owned(),
        ),
        (
            "plan['commit'] = [{'edit': 'add-layer', 'target': 'vda', 'layer': '/etc/shadow'}]",
            "a layer's name cannot be a name".to_owned(),
        ),
        ("plan['point'] = {'layer': 'disk', 'tag': 'x'}", "a snapshot that was not requested".to_owned()),
        (
            "plan['instant'] = {'take': 'overlay', 'file': '/etc/shadow', 'format': 'raw'}",
            "takes a running domain's disk itself".to_owned(),
        ),
        (
            "plan['instant'] = {'take': 'by-backend', 'nested': plan.pop('cut')}",
            "an instant that there is not".to_owned(),
        ),
        ("plan['finish'][0]['nested'] = plan.pop('cut')", "which provides no moment".to_owned()),
        ("plan['prepare'][0]['action'] = 'x' * 100000", "longer than 65536 bytes".to_owned()),
        (
            "plan['commit'] = [{'edit': 'add-layer', 'target': 'vda', 'layer': 'x'}] * 10001",
            "more than a disk can have".to_owned(),
        ),
    ] {
        let otherwise = format!(
            "def lie(was, p, c):\n    plan = was(p, c)\n    {change}\n    return plan\ninstead('plan', lie)"
        );
        says(&otherwise, ErrorKind::Internal, &[&text]).await;
    }
}

/// An invalid state is refused.
#[tokio::test(flavor = "multi_thread")]
async fn invalid_state_is_refused() {
    for (change, text) in [
        ("state['target'] = 'vdb'", "another disk"),
        ("state['active'] = 'other'", "was asked for as disk"),
        ("state['layers'] = []", "is not there"),
        ("state['layers'] *= 2", "one name"),
        ("state['layers'][0]['backing'] = 'disk'", "a loop"),
        ("state['layers'][0]['backing'] = 'nowhere'", "which does not exist"),
        ("state['layers'][0]['file'] = 'etc/passwd'", "not an absolute canonical path"),
        ("state['layers'][0]['internal'] *= 2", "one tag"),
        ("state['layers'][0]['internal'][0]['tag'] = '../../etc/shadow'", "a tag cannot be a name"),
    ] {
        let otherwise = format!(
            "def lie(was, p, c):\n    state = was(p, c)\n    {change}\n    return state\ninstead('inspect', lie)"
        );
        says(&otherwise, ErrorKind::Internal, &[text]).await;
    }
}

/// A disk other than the requested one is not adopted.
#[tokio::test(flavor = "multi_thread")]
async fn wrong_disk_is_not_adopted() {
    let fixture =
        Fixture::new("instead('adopt', lambda was, p, c: {**was(p, c), 'path': '/etc/passwd'})").await;
    std::fs::write(fixture.path("otherwise"), "").unwrap();
    std::fs::write(fixture.path("other"), "x").unwrap();
    let spec = DomainSpec::new(DomainName::new("db").unwrap()).disk(
        Target::new("vda").unwrap(),
        fixture.path("other"),
        "dir",
    );
    let service = fixture.service();
    let error = service.domain_add(&spec).await.unwrap_err();
    assert!(error.to_string().contains("took in another disk"), "{error}");
    assert_eq!(service.domains().await.unwrap().len(), 1);
}

/// Manifests go to no directory that may belong to another program.
#[tokio::test(flavor = "multi_thread")]
async fn manifests_need_a_directory_of_their_own() {
    let fixture = Fixture::new(
        "instead('manifest_directory', lambda was, p, c: os.path.dirname(p['disk']['path']) + '/etc')",
    )
    .await;
    std::fs::create_dir(fixture.path("etc")).unwrap();
    std::fs::write(fixture.path("etc/domain.json"), "mine").unwrap();
    // It is killed for it; where the manifests are is known without it.
    let _ = fixture.reverted().await;
    assert_eq!(std::fs::read_dir(fixture.path("etc")).unwrap().count(), 1);
    assert_eq!(std::fs::read_to_string(fixture.path("etc/domain.json")).unwrap(), "mine");
    let service = fixture.service();
    service.recover(Some(&fixture.domain()), CancellationToken::new()).await.unwrap();
    let current = std::fs::read_to_string(fixture.path("disk")).unwrap();
    assert!(current == "first" || current == "third", "{current}");
    fixture.is_whole(&service, &current).await;
}

/// A plug-in whose greeting contradicts its file name is not used.
#[tokio::test(flavor = "multi_thread")]
async fn plugin_with_a_wrong_name_is_not_used() {
    for (change, text) in [
        ("hello['protocol'] = 99", "speaks the protocol 99"),
        ("hello['format'] = 'qcow2'", "serves the format \"qcow2\""),
        ("hello['capabilities']['internal'] = False", "can take no point"),
        ("hello['capabilities']['methods'] = ['internal']", "invalid or reserved names"),
        ("hello['capabilities']['max_depth'] = -1", "with an invalid value"),
    ] {
        let otherwise = format!(
            "def lie(was, p, c):\n    hello = was(p, c)\n    {change}\n    return hello\ninstead('hello', lie)"
        );
        says(&otherwise, ErrorKind::Internal, &[text]).await;
    }
}

/// A plug-in's error is reported unchanged, except for kinds that only domsnap can report.
#[tokio::test(flavor = "multi_thread")]
async fn error_kinds_of_domsnap_are_not_accepted() {
    for (kind, reported) in [
        ("no-space", ErrorKind::NoSpace),
        ("needs-recovery", ErrorKind::Io),
        ("cancelled", ErrorKind::Io),
        ("internal", ErrorKind::Internal),
    ] {
        let otherwise = format!(
            "def fail(was, p, c):\n    raise good.Failure('{kind}', 'it \\x1b[31mfailed', 'try\\nagain')\ninstead('apply', fail)"
        );
        let fixture = Fixture::new(&otherwise).await;
        let error = fixture.refused().await;
        assert_eq!(error.kind(), reported, "{error}");
        assert!(error.to_string().contains("the plug-in dir says: it  [31mfailed"), "{error}");
        assert!(error.to_string().contains("try again"), "{error}");
    }
}

/// A plug-in need not implement optional methods, and must implement all others.
#[tokio::test(flavor = "multi_thread")]
async fn only_optional_methods_may_be_unknown() {
    let fixture = Fixture::new("del good.METHODS['salvage']").await;
    fixture.reverted().await.unwrap();
    fixture.is_whole(&fixture.service(), "first").await;
    says(
        "del good.METHODS['undo']\ninstead('apply', lambda was, p, c: 1 / 0)",
        ErrorKind::NeedsRecovery,
        &["a method that every plug-in must"],
    )
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_a_plug_in_started_ends_with_it() {
    let otherwise = "import subprocess\ndef hang(was, p, c):\n    child = subprocess.Popen(['sleep', '3600'])\n    \
                     open(os.path.dirname(p['disk']['disk']['path'] if 'disk' in p['disk'] else p['disk']['path']) + \
                     '/child', 'w').write(str(child.pid))\n    time.sleep(3600)\ninstead('apply', hang)";
    let fixture = Fixture::new(otherwise).await.impatient();
    fixture.refused().await;
    let child = std::fs::read_to_string(fixture.path("child")).unwrap();
    let there = std::fs::read_to_string(format!("/proc/{child}/stat")).unwrap_or_default();
    let gone = there.is_empty() || there.contains(") Z ");
    assert!(gone, "the plug-in's child goes on: {there}");
}

/// A clean-up that cannot be done after the commit point does not lock the domain: it waits for the next one.
#[tokio::test(flavor = "multi_thread")]
async fn a_clean_up_that_fails_is_deferred_and_done_later() {
    let otherwise = "def no(was, p, c):\n    if p['step']['action']['do'] == 'drop':\n        raise \
                     good.Failure('io', 'not now')\n    return was(p, c)\ninstead('apply', no)";
    let fixture = Fixture::new(otherwise).await;
    let copies = || std::fs::read_dir(fixture.path("disk.points")).unwrap().count();
    fixture.reverted().await.unwrap();
    assert_eq!(copies(), 3);
    std::fs::write(fixture.path("otherwise"), "").unwrap();
    let request = snapcore::service::DeleteRequest::new(vec![name("one")]);
    let done = fixture.service().delete(&fixture.domain(), request, CancellationToken::new()).await.unwrap();
    std::fs::remove_file(fixture.path("otherwise")).unwrap();
    assert!(done.postponed.iter().any(|postponed| postponed.reason.contains("not now")), "{done:?}");
    assert_eq!(copies(), 3);
    let service = fixture.service();
    service.recover(Some(&fixture.domain()), CancellationToken::new()).await.unwrap();
    assert_eq!(copies(), 1);
    let listing = service.list(&fixture.domain()).await.unwrap();
    assert!(listing.unfinished.is_empty() && listing.snapshots.len() == 1);
}
