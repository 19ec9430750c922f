//! Tests whose bodies run in dom0.

use std::{
    env, fs,
    path::{Path, PathBuf},
    process::ExitCode,
    time::Duration,
};

use anyhow::{Result, bail};
use libtest_mimic::{Arguments, Failed};

use crate::machine::Machine;

/// Set in dom0: which case's body is to be run.
const INSIDE: &str = "DOMSNAP_TEST_XEN_INSIDE";

/// The program under test, and what kills it where a test wants that.
const DOMSNAP: &str = "domsnap";
const SHIM: &str = "libfaultfs.so";

/// Within which a case must end: on a machine that has much else to do it takes many times as long as alone.
const DEADLINE: Duration = Duration::from_secs(1380);

/// A case, and what shows that it holds, in dom0.
pub struct TestCase {
    name: &'static str,
    body: fn() -> Result<()>,
}

impl TestCase {
    /// One of that name.
    pub const fn new(name: &'static str, body: fn() -> Result<()>) -> Self {
        Self { name, body }
    }
}

/// The whole program of a test with `harness = false`.
pub fn main(cases: &'static [TestCase]) -> ExitCode {
    if let Ok(name) = env::var(INSIDE) {
        return inside(cases, &name);
    }
    let cases = cases.iter().map(|case| {
        let name = case.name;
        libtest_mimic::Trial::test(name, move || {
            outside(name).map_err(|error| Failed::from(format!("{error:#}")))
        })
    });
    libtest_mimic::run(&Arguments::from_args(), cases.collect()).exit_code()
}

fn inside(cases: &[TestCase], name: &str) -> ExitCode {
    let Some(case) = cases.iter().find(|case| case.name == name) else {
        println!("this program has no case {name:?}");
        return ExitCode::from(2);
    };
    match (case.body)() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            println!("{error:?}");
            ExitCode::FAILURE
        }
    }
}

fn outside(name: &str) -> Result<()> {
    let machine = Machine::get()?;
    let this = env::current_exe()?;
    machine.put_program(&this, "testcase")?;
    for name in [DOMSNAP, SHIM] {
        if let Some(file) = beside(&this, name) {
            machine.put_program(&file, name)?;
        }
    }
    // A program runs better from a file system of dom0's own. One that is being replaced may be running.
    let line = format!(
        "cd /host/bin && for p in testcase {DOMSNAP} {SHIM}; do [ -e $p ] && ! cmp -s $p.from /usr/local/bin/$p.from || continue; \
         cp $p /usr/local/bin/$p.new && mv /usr/local/bin/$p.new /usr/local/bin/$p && cp $p.from /usr/local/bin/; done; \
         cd /vm; {INSIDE}={name:?} RUST_BACKTRACE=0 exec /usr/local/bin/testcase"
    );
    let ended = machine.shell(&line, DEADLINE)?;
    print!("{}", ended.output);
    match ended.status {
        0 => Ok(()),
        status => bail!("it ended with {status} in dom0:\n{}", ended.output),
    }
}

/// A product of the workspace, built beside this program.
fn beside(this: &Path, name: &str) -> Option<PathBuf> {
    this.ancestors()
        .map(|dir| dir.join(name))
        .find(|file| fs::metadata(file).is_ok_and(|about| about.is_file()))
}
