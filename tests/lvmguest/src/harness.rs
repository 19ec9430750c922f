//! Tests whose bodies run in the machine.

use std::{
    env, fs,
    panic::{AssertUnwindSafe, catch_unwind},
    path::{Path, PathBuf},
    process::ExitCode,
    time::Instant,
};

use anyhow::{Context, Result, bail, ensure};
use libtest_mimic::{Arguments, Failed, Trial};

use crate::{inside, machine::Machine};

/// Set in the machine: which group's cases are to be run.
const INSIDE: &str = "DOMSNAP_TEST_LVM_INSIDE";

/// Of the cases, those alone whose name has this in it.
const ONLY: &str = "DOMSNAP_TEST_LVM_ONLY";

/// What holds, and the body that shows it, in the machine.
pub type TestCase = (&'static str, fn() -> Result<()>);

/// Test cases that are shown in one boot of one machine.
pub struct Group {
    name: &'static str,
    machine: fn() -> Machine,
    cases: &'static [TestCase],
}

impl Group {
    /// One of that name.
    pub const fn new(name: &'static str, machine: fn() -> Machine, cases: &'static [TestCase]) -> Self {
        Self { name, machine, cases }
    }
}

/// The whole program of a test with `harness = false`.
pub fn main(groups: &'static [Group]) -> ExitCode {
    if let Ok(name) = env::var(INSIDE) {
        return inside(groups, &name);
    }
    let cases = groups.iter().map(|group| {
        Trial::test(group.name, move || outside(group).map_err(|error| Failed::from(format!("{error:#}"))))
    });
    libtest_mimic::run(&Arguments::from_args(), cases.collect()).exit_code()
}

fn inside(groups: &[Group], name: &str) -> ExitCode {
    let Some(group) = groups.iter().find(|group| group.name == name) else {
        println!("this program has no group {name:?}");
        return ExitCode::from(2);
    };
    let only = env::var(ONLY).unwrap_or_default();
    let (mut run, mut failed) = (0, 0);
    for (case, body) in group.cases.iter().filter(|(case, _)| case.contains(&only)) {
        let begin = Instant::now();
        let held = inside::wipe().context("wiping the disks before the case").and_then(|()| {
            catch_unwind(AssertUnwindSafe(body))
                .unwrap_or_else(|_| bail!("it panicked; its message is above"))
        });
        run += 1;
        match held {
            Ok(()) => println!("ok      {case} ({:.1} s)", begin.elapsed().as_secs_f32()),
            Err(error) => {
                failed += 1;
                println!("FAILED  {case}: {error:?}");
            }
        }
    }
    println!("{run} cases, {failed} failed");
    if run > 0 && failed == 0 { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

fn outside(group: &Group) -> Result<()> {
    let this = env::current_exe()?;
    let mut machine = (group.machine)().program("testcase", &this);
    if let Some(domsnap) = domsnap(&this)? {
        machine = machine.program("domsnap", &domsnap);
    }
    let only = env::var(ONLY).unwrap_or_default();
    ensure!(!only.contains('\''), "{ONLY} has a quote in it");
    let ended =
        machine.run(&format!("{INSIDE}='{}' {ONLY}='{only}' RUST_BACKTRACE=0 /t/testcase", group.name))?;
    print!("{}", ended.output);
    match ended.status {
        0 => Ok(()),
        status => bail!("it ended with {status} in the machine:\n{}", ended.output),
    }
}

/// The program under test: the one that `DOMSNAP_BIN` names, or the one that was built beside this one.
fn domsnap(this: &Path) -> Result<Option<PathBuf>> {
    if let Some(named) = env::var_os("DOMSNAP_BIN") {
        let named = PathBuf::from(named);
        ensure!(named.is_file(), "DOMSNAP_BIN names {}, which is no file", named.display());
        return Ok(Some(named));
    }
    let beside = this.ancestors().map(|dir| dir.join("domsnap"));
    Ok(beside.into_iter().find(|file| fs::metadata(file).is_ok_and(|about| about.is_file())))
}
