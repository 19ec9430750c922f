//! The shim itself: what it counts, records, kills and fails, seen with programs that everybody knows.

use std::collections::BTreeMap;
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitStatus};

use domsnap_tests::domain::{Domain, NAME, Shape};
use domsnap_tests::domsnap::product;
use domsnap_tests::powerloss::Baseline;
use domsnap_tests::record::{Kind, Record};
use domsnap_tests::shim;

struct Watched {
    dir: tempfile::TempDir,
}

impl Watched {
    fn new() -> Watched {
        let dir = tempfile::tempdir().unwrap();
        std::fs::create_dir(dir.path().join("root")).unwrap();
        Watched { dir }
    }

    fn root(&self) -> PathBuf {
        self.dir.path().canonicalize().unwrap().join("root")
    }

    fn count(&self) -> PathBuf {
        self.dir.path().join("count")
    }

    fn log(&self) -> PathBuf {
        self.dir.path().join("log")
    }

    /// Runs a line of shell in the watched directory with one program of it preloaded.
    fn run(&self, program: &str, args: &[&str], more: &[(&str, &str)]) -> ExitStatus {
        Command::new(program)
            .args(args)
            .current_dir(self.root())
            .env("LD_PRELOAD", product("DOMSNAP_FAULTFS", "libfaultfs.so", "faultfs"))
            .env("FAULTFS_ROOT", self.root())
            .env("FAULTFS_COUNT", self.count())
            .env("FAULTFS_LOG", self.log())
            .envs(more.iter().copied())
            .stderr(std::process::Stdio::null())
            .status()
            .unwrap()
    }

    fn lines(&self) -> Vec<String> {
        shim::counted(&self.count()).unwrap().into_iter().map(|operation| operation.line).collect()
    }

    fn records(&self) -> Vec<Record> {
        shim::recorded(&self.log()).unwrap()
    }
}

/// Every kind of operation is counted and recorded in order.
#[test]
fn operations_are_recorded_in_order() {
    let watched = Watched::new();
    let script = r#"
import os
f = os.open("f", os.O_RDWR | os.O_CREAT, 0o600)
os.write(f, b"abc")
os.pwrite(f, b"defg", 512)
os.pwritev(f, [b"h", b"ij"], 1024)
os.ftruncate(f, 4096)
os.posix_fallocate(f, 0, 8192)
os.fsync(f)
os.fdatasync(f)
os.link("f", "g")
os.rename("g", "h")
os.mkdir("d")
d = os.open("d", os.O_RDONLY)
os.fsync(d)
g = os.open("copy", os.O_RDWR | os.O_CREAT, 0o600)
os.lseek(f, 0, 0)
os.copy_file_range(f, g, 600)
os.unlink("h")
os.rmdir("d")
os.open("f", os.O_RDWR | os.O_TRUNC)
os.open("f", os.O_RDWR | os.O_CREAT)
"#;
    assert!(watched.run("python3", &["-c", script], &[]).success());
    assert_eq!(
        watched.lines(),
        [
            "create f",
            "write f at 0 length 3",
            "write f at 512 length 4",
            "write f at 1024 length 3",
            "truncate f from 1027 to 4096",
            "fallocate f mode 0x0 at 0 length 8192",
            "flush f",
            "flush f",
            "link g",
            "rename g to h",
            "make directory d",
            "flush d",
            "create copy",
            "copy copy at 0 length 600",
            "unlink h",
            "remove directory d",
            "truncate f by opening it",
        ]
    );
    use Kind::*;
    let kinds: Vec<_> = watched.records().iter().map(|record| record.kind).collect();
    assert_eq!(
        kinds,
        [
            Create, Write, Write, Write, SetLen, SetLen, Flush, Flush, Link, Rename, MakeDir, Flush, Create,
            Write, Unlink, Unlink, SetLen
        ]
    );
    let copied = &watched.records()[13];
    assert_eq!(
        (&copied.data[..3], &copied.data[512..516], copied.data.len()),
        (&b"abc"[..], &b"defg"[..], 600)
    );
}

/// What is outside of the directory and shared memory are not counted.
#[test]
fn other_files_are_not_counted() {
    let watched = Watched::new();
    let script =
        r#"open("../outside", "wb").write(b"x"); open("db-shm", "wb").write(b"x"); open("in", "wb")"#;
    assert!(watched.run("python3", &["-c", script], &[]).success());
    assert_eq!(watched.lines(), ["create in"]);
}

/// The process dies just before the operation asked for.
#[test]
fn process_dies_before_the_operation() {
    let watched = Watched::new();
    let script = r#"
import os
f = os.open("f", os.O_RDWR | os.O_CREAT)
os.pwrite(f, b"first", 0)
os.pwrite(f, b"other", 0)
"#;
    let status = watched.run("python3", &["-c", script], &[("FAULTFS_KILL_AT", "3")]);
    assert_eq!(status.signal(), Some(9));
    assert_eq!(std::fs::read(watched.root().join("f")).unwrap(), b"first");
}

#[test]
fn a_torn_write_leaves_its_first_half() {
    let watched = Watched::new();
    let script = r#"import os; os.pwritev(os.open("f", os.O_RDWR | os.O_CREAT), [b"ab", b"cdef"], 0)"#;
    let torn = [("FAULTFS_KILL_AT", "2"), ("FAULTFS_KILL_MODE", "torn")];
    assert_eq!(watched.run("python3", &["-c", script], &torn).signal(), Some(9));
    assert_eq!(std::fs::read(watched.root().join("f")).unwrap(), b"abc");
}

#[test]
fn an_injected_error_happens_once_or_from_then_on() {
    let watched = Watched::new();
    let script = r#"
import os
f = os.open("f", os.O_RDWR | os.O_CREAT)
failed = []
for i in range(4):
    try:
        os.pwrite(f, b"x", i)
    except OSError as error:
        failed.append((i, error.errno))
os.ftruncate(f, 0)
import sys
sys.exit(len(failed) * 10 + failed[0][0])
"#;
    let once = [("FAULTFS_FAIL_AT", "3"), ("FAULTFS_ERRNO", "EIO")];
    assert_eq!(watched.run("python3", &["-c", script], &once).code(), Some(11));
    std::fs::remove_file(watched.root().join("f")).unwrap();
    let on = [("FAULTFS_FAIL_AT", "3"), ("FAULTFS_FAIL_MODE", "on")];
    assert_eq!(watched.run("python3", &["-c", script], &on).code(), Some(31));
}

#[test]
fn threads_are_recorded_one_operation_at_a_time() {
    let watched = Watched::new();
    let script = r#"
import os, threading
f = os.open("f", os.O_RDWR | os.O_CREAT)
def work(byte):
    for i in range(200):
        os.pwrite(f, bytes([byte]) * 100, 0)
threads = [threading.Thread(target=work, args=(n,)) for n in (1, 2, 3)]
[t.start() for t in threads]
[t.join() for t in threads]
"#;
    assert!(watched.run("python3", &["-c", script], &[]).success());
    let records = watched.records();
    assert_eq!(records.len(), 601);
    let last = records.last().unwrap();
    assert_eq!(
        std::fs::read(watched.root().join("f")).unwrap(),
        last.data,
        "the record's order is the true one"
    );
}

#[test]
fn a_record_replayed_without_loss_is_the_directory() {
    let watched = Watched::new();
    std::fs::write(watched.root().join("old"), vec![7; 5000]).unwrap();
    let baseline = Baseline::read(&watched.root()).unwrap();
    let script = r#"
import os
f = os.open("old", os.O_RDWR)
os.pwrite(f, b"new" * 400, 3000)
os.link("old", "tmp")
g = os.open("new", os.O_RDWR | os.O_CREAT)
os.copy_file_range(f, g, 4000, 100, 50)
os.rename("tmp", "new2")
os.fsync(f); os.fsync(g); os.fsync(os.open(".", os.O_RDONLY))
"#;
    assert!(watched.run("python3", &["-c", script], &[]).success());
    let (records, target) = (watched.records(), watched.dir.path().join("after"));
    baseline.lose_power(&records, records.len(), 3, &target).unwrap();
    let read = |dir: &Path, name: &str| std::fs::read(dir.join(name)).unwrap();
    for name in ["old", "new", "new2"] {
        assert_eq!(read(&target, name), read(&watched.root(), name), "{name}");
    }
    assert_eq!(std::fs::read_dir(&target).unwrap().count(), 3);
}

/// What one thread's file of `strace -y` says of the watched files, by kind of record.
fn seen_by_strace(text: &str, root: &str, seen: &mut BTreeMap<&'static str, usize>) {
    for line in text.lines().filter(|line| line.contains(root) && !line.contains("-shm")) {
        let Some((name, rest)) = line.split_once('(') else { continue };
        if rest.contains(" = -1 ") || rest.ends_with(" = ?") {
            continue;
        }
        let kind = match name {
            "write" | "writev" | "pwrite64" | "pwritev" | "pwritev2" | "copy_file_range" | "sendfile"
            | "splice" => "written",
            "ioctl" if rest.contains("FICLONE") => "written",
            "fsync" | "fdatasync" => "flushed",
            "ftruncate" | "truncate" => "length set",
            "rename" | "renameat" | "renameat2" => "renamed",
            "link" | "linkat" => "linked",
            "unlink" | "unlinkat" | "rmdir" => "unlinked",
            "mkdir" | "mkdirat" => "directory made",
            "mmap" if rest.contains("MAP_SHARED") && rest.contains("PROT_WRITE") => "mapped to be written",
            "io_uring_setup" => "io_uring",
            _ => continue,
        };
        *seen.entry(kind).or_default() += 1;
    }
}

/// Nothing that domsnap does to files escapes the shim.
#[test]
fn shim_sees_every_operation() {
    let mut domain = Domain::new(&Shape::disks(2)).unwrap();
    for (name, kind) in [("s1", "external"), ("s2", "mixed")] {
        domain.write_and_create(name, kind).unwrap();
    }
    domain.write_everywhere().unwrap();
    let root = domain.root().canonicalize().unwrap();
    let commands: [&[&str]; 4] = [
        &["create", NAME, "s3", "--external"],
        &["create", NAME, "s4", "--internal"],
        &["revert", NAME, "s2"],
        &["delete", NAME, "s1"],
    ];
    for args in commands {
        let (outputs, log) = shim::outputs().unwrap();
        let traces = outputs.path().join("traces");
        std::fs::create_dir(&traces).unwrap();
        // strace hands the variables on with -E, so that it is not itself under the shim.
        let library = product("DOMSNAP_FAULTFS", "libfaultfs.so", "faultfs");
        let wrapper = [
            "strace".to_owned(),
            "-ff".to_owned(),
            "-y".to_owned(),
            format!("-o{}", traces.join("thread").display()),
            format!("-ELD_PRELOAD={}", library.display()),
            format!("-EFAULTFS_ROOT={}", root.display()),
            format!("-EFAULTFS_LOG={}", log.display()),
        ];
        let wrapper: Vec<&str> = wrapper.iter().map(String::as_str).collect();
        domain.domsnap().through(&wrapper).done(args).unwrap();
        let mut strace = BTreeMap::new();
        for thread in std::fs::read_dir(&traces).unwrap() {
            let text = std::fs::read(thread.unwrap().path()).unwrap();
            seen_by_strace(&String::from_utf8_lossy(&text), root.to_str().unwrap(), &mut strace);
        }
        let mut recorded = BTreeMap::new();
        for record in shim::recorded(&log).unwrap() {
            let kind = match record.kind {
                Kind::Write => "written",
                Kind::Flush => "flushed",
                Kind::SetLen => "length set",
                Kind::Rename | Kind::Exchange => "renamed",
                Kind::Link => "linked",
                Kind::Unlink => "unlinked",
                Kind::MakeDir => "directory made",
                Kind::Zero | Kind::Create | Kind::FlushAll => continue,
            };
            *recorded.entry(kind).or_default() += 1;
        }
        assert_eq!(recorded, strace, "{args:?}: the shim's record against strace");
        assert!(recorded["written"] > 0 && recorded["flushed"] > 0, "{args:?} did nothing: {recorded:?}");
    }
}
