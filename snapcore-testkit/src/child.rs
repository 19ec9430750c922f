//! A copy of the test program that does one operation and is killed in it.

use std::ffi::OsString;
use std::os::unix::process::ExitStatusExt;
use std::path::PathBuf;
use std::process::{Command, ExitCode, Output, Stdio};

use anyhow::{Context, Result, bail, ensure};
use serde::{Deserialize, Serialize};

use crate::fault::{Fault, FaultKind, Moment};
use crate::fixture::{Fixture, Op, Process, TestDomain};
use crate::record::Record;
use crate::test_backend::TestBackend;

/// The variable that gives a copy of the test program its job.
const CHILD_JOB: &str = "TESTKIT_CHILD";

/// The job of a child.
#[derive(Debug, Serialize, Deserialize)]
struct ChildJob {
    test_domain: TestDomain,
    op: Op,
    /// In the middle of steps; otherwise between them.
    inside: bool,
    /// 0: it is not killed.
    number: u64,
}

/// Does a child's job, if this process is one.
pub(crate) fn run(subject: &dyn TestBackend) -> Option<ExitCode> {
    let job = std::env::var(CHILD_JOB).ok()?;
    Some(match go(subject, &job) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("{error:#}");
            ExitCode::FAILURE
        }
    })
}

fn go(subject: &dyn TestBackend, job: &str) -> Result<()> {
    let ChildJob { test_domain, op, inside, number } = serde_json::from_str(job)?;
    let process = Process::new(subject, &test_domain)?;
    let moments: &[Moment] = if inside { &[Moment::Progress] } else { &Moment::BETWEEN };
    if number > 0 {
        process.faults.arm(vec![Fault::new(moments, number, FaultKind::Kill)]);
    }
    process.run_waiting(&op)??;
    Ok(())
}

impl Fixture<'_> {
    /// Lets a child do `op` and be killed at the `number`th moment; gives whether it was. The model does not
    /// learn of it.
    pub(crate) fn kill_child(&mut self, op: &Op, inside: bool, number: u64) -> Result<bool> {
        self.crash();
        let job = ChildJob { test_domain: self.test_domain.clone(), op: op.clone(), inside, number };
        let output = start(&job, &[])?;
        match (output.status.code(), output.status.signal()) {
            (Some(0), _) => Ok(false),
            (None, Some(9)) => Ok(true),
            _ => bail!("the copy ended with {}: {}", output.status, String::from_utf8_lossy(&output.stderr)),
        }
    }

    /// Lets a child do `op`, and returns the record of its file operations. The model does not learn of it.
    pub(crate) fn record_child(&mut self, op: &Op) -> Result<Vec<Record>> {
        self.crash();
        let job =
            ChildJob { test_domain: self.test_domain.clone(), op: op.clone(), inside: false, number: 0 };
        let outside = tempfile::tempdir()?;
        let log = outside.path().join("operations");
        let root = self.test_domain.root.as_os_str();
        let variables = [
            ("LD_PRELOAD", faultfs()?.into_os_string()),
            ("FAULTFS_ROOT", root.to_owned()),
            ("FAULTFS_LEAVE", "/.domsnap-probe-".into()),
            ("FAULTFS_LOG", log.clone().into_os_string()),
        ];
        let output = start(&job, &variables)?;
        ensure!(output.status.success(), "{op:?} failed: {}", String::from_utf8_lossy(&output.stderr));
        Record::decode_all(&std::fs::read(&log)?).map_err(anyhow::Error::msg)
    }
}

fn start(job: &ChildJob, variables: &[(&str, OsString)]) -> Result<Output> {
    Command::new(std::env::current_exe()?)
        .env(CHILD_JOB, serde_json::to_string(job)?)
        .envs(variables.iter().map(|(name, value)| (name, value)))
        .stdin(Stdio::null())
        .output()
        .context("starting a copy of the test program")
}

/// The library that records file operations.
fn faultfs() -> Result<PathBuf> {
    let named = std::env::var_os("TESTKIT_FAULTFS").map(PathBuf::from);
    let beside = || Some(std::env::current_exe().ok()?.parent()?.parent()?.join("libfaultfs.so"));
    let library = named.or_else(beside).filter(|library| library.is_file());
    library.context("no libfaultfs.so: run `cargo build -p faultfs`, or say in TESTKIT_FAULTFS where it is")
}
