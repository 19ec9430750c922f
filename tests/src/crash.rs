//! Interrupting an operation everywhere, healing it, and looking at what is left.
//!
//! Whatever happened, after `domsnap recover` the domain must be as before the operation or as after it:
//! every point of one of the two trees whole, the configured paths reading as that tree's present, and no
//! file left behind. What was undone must then be possible, and what was reported as done must have happened.
//! `qemu-img check` finds nothing in any image of a domain, not even a leaked cluster; one of no domain,
//! which nothing recovers, may have leaked clusters and COPIED bits that are clear though they might be set.

mod twice;

use std::path::PathBuf;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use anyhow::{Context, Result, bail, ensure};

use crate::domain::{Domain, NAME};
use crate::domsnap::{Outcome, status};
use crate::meanwhile::{self, Aside};
use crate::model::Model;
use crate::mounted;
use crate::place;
use crate::powerloss::Baseline;
use crate::record::Record;
use crate::report::{self, List};
use crate::scenario::{Look, Scenario};
use crate::seed::{self, Seed};
use crate::shim::{self, Often};
use crate::verify::{self, Memo};

pub use twice::kill_twice_and_write;

/// How many workers share a scenario's instants, each in a directory of its own.
const WORKERS: usize = 2;

/// A prepared domain, a copy to go back to, and what it may be afterwards.
struct Bench {
    scenario: Scenario,
    domain: Domain,
    before: Model,
    after: Model,
    copy: PathBuf,
    memo: Memo,
    _copies: tempfile::TempDir,
}

/// Which of the two it was.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Found {
    Before,
    After,
}

impl Bench {
    fn new(scenario: Scenario) -> Result<Bench> {
        let domain = (scenario.prepare)().context("prepare")?;
        let before = domain.model.clone();
        let mut after = before.clone();
        (scenario.effect)(&mut after);
        let copies = place::directory("domsnap-copy-")?;
        let copy = copies.path().join("before");
        domain.save_to(&copy)?;
        Ok(Bench { scenario, domain, before, after, copy, memo: Memo::default(), _copies: copies })
    }

    fn args(&self) -> Vec<String> {
        (self.scenario.args)(&self.domain)
    }

    fn list(&self) -> Result<List> {
        let domsnap = self.domain.domsnap();
        match self.scenario.look {
            Look::Image => report::disk_list(&domsnap, &self.domain.path("vda")),
            Look::Tree if self.domain.registered()? => report::list(&domsnap, NAME),
            Look::Tree => report::list(&domsnap, &self.domain.paths()),
        }
    }

    fn compare_tree(&self, list: &List, model: &Model) -> Result<()> {
        match self.scenario.look {
            Look::Tree => verify::tree(list, model),
            Look::Image => verify::names(list, model),
        }
    }

    /// Heals, then says which of the two models holds, in every byte.
    fn heal_and_look(&mut self) -> Result<Found> {
        let domsnap = self.domain.domsnap();
        domsnap.done(&["recover"]).context("recover")?;
        let list = self.list()?;
        let before = self.compare_tree(&list, &self.before);
        let after = self.compare_tree(&list, &self.after);
        let same = self.before == self.after;
        match (before, after) {
            (Err(before), Err(after)) => {
                bail!(
                    "the tree is neither that of before nor that of after\nbefore: {before:#}\nafter: {after:#}"
                )
            }
            // The trees differ in nothing that a list shows: the current state decides.
            (Ok(()), Ok(())) if !same => {
                match every_image(self.scenario.look, &self.domain, &list, &self.before, &mut self.memo) {
                    Ok(()) => Ok(Found::Before),
                    Err(before) => {
                        every_image(self.scenario.look, &self.domain, &list, &self.after, &mut self.memo)
                            .map(|()| Found::After)
                            .with_context(|| format!("and as before: {before:#}"))
                    }
                }
            }
            (Ok(()), _) => {
                every_image(self.scenario.look, &self.domain, &list, &self.before, &mut self.memo)
                    .context("the tree is that of before")?;
                Ok(Found::Before)
            }
            (_, Ok(())) => {
                every_image(self.scenario.look, &self.domain, &list, &self.after, &mut self.memo)
                    .context("the tree is that of after")?;
                Ok(Found::After)
            }
        }
    }

    /// What was undone can be done.
    fn do_again(&mut self) -> Result<()> {
        self.domain.domsnap().done(&self.args()).context("what was undone is done again")?;
        let found = self.heal_and_look().context("after doing it again")?;
        ensure!(found == Found::After || self.before == self.after, "done again, it had no effect");
        Ok(())
    }
}

/// Calls `instant` with every number below `instants` (found by `survey`, on the first worker's bench), over
/// all workers, until one fails.
fn everywhere<S: Send + Sync>(
    scenario: Scenario,
    survey: impl Fn(&mut Bench) -> Result<(usize, S)> + Sync,
    instant: impl Fn(&mut Bench, &S, usize) -> Result<()> + Sync,
) -> Result<()> {
    if scenario.mounts.is_some_and(|kind| !mounted::may_mount(kind)) {
        return Ok(());
    }
    let stop = AtomicBool::new(false);
    let looked_at = AtomicUsize::new(0);
    let failure = Mutex::new(None);
    std::thread::scope(|scope| {
        for worker in 0..WORKERS {
            let (stop, looked_at, failure, survey, instant) =
                (&stop, &looked_at, &failure, &survey, &instant);
            scope.spawn(move || {
                let work = || -> Result<()> {
                    let mut bench = Bench::new(scenario)?;
                    let (instants, survey) = survey(&mut bench).context("survey")?;
                    ensure!(instants > 0, "the operation changes nothing");
                    for number in (worker..instants).step_by(WORKERS) {
                        if stop.load(Ordering::Relaxed) {
                            return Ok(());
                        }
                        instant(&mut bench, &survey, number)?;
                        looked_at.fetch_add(1, Ordering::Relaxed);
                    }
                    Ok(())
                };
                let result = std::panic::catch_unwind(std::panic::AssertUnwindSafe(work));
                let error = match result {
                    Ok(Ok(())) => return,
                    Ok(Err(error)) => error,
                    Err(_) => anyhow::anyhow!("worker {worker} panicked (its args are above)"),
                };
                stop.store(true, Ordering::Relaxed);
                failure.lock().unwrap().get_or_insert(error);
            });
        }
    });
    println!("{}: {} instants", scenario.name, looked_at.load(Ordering::Relaxed));
    match failure.into_inner().unwrap() {
        Some(error) => Err(error.context(scenario.name)),
        None => Ok(()),
    }
}

/// The operations that the whole command makes, undisturbed. The bench is as before afterwards.
fn survey(bench: &mut Bench) -> Result<Vec<shim::Counted>> {
    let (_outputs, file) = shim::outputs()?;
    let domsnap = shim::counting(shim::watching(bench.domain.domsnap(), bench.domain.root())?, &file);
    domsnap.done(&bench.args())?;
    ensure!(bench.heal_and_look()? == Found::After || bench.before == bench.after, "it had no effect");
    bench.domain.restore_from(&bench.copy)?;
    shim::counted(&file)
}

fn nth(operations: &[shim::Counted], number: u64) -> &str {
    operations.iter().find(|o| o.number == number).map_or("beyond the last", |o| o.line.as_str())
}

/// SIGKILL before each operation; where it is a write, also in the middle of it.
///
/// # Errors
/// The first instant that does not heal, with the operation at which it was.
pub fn kill_everywhere(scenario: Scenario) -> Result<()> {
    kill(scenario, false)
}

/// SIGKILL before each operation; then, before anything is healed, the domain is started: its disks open by
/// their configured paths, and it writes. What it wrote must be there after `recover`: in the current state,
/// or saved under another name, if that is of a revert which was undone; and it stays there when the revert
/// is done again. One of [`sampled`] instants is tried: [`kill_everywhere`] has all of them.
///
/// # Errors
/// The first instant after which a disk does not open, or does not keep what was written.
pub fn kill_and_write_everywhere(scenario: Scenario) -> Result<()> {
    kill(scenario, true)
}

/// Whether a death just before this operation can leave something else than a death before the one before it.
/// Not so behind a flush, which changes nothing that outlives a process but not the power; nor between the
/// frames of one transaction in SQLite's log, none of which count before the last; nor between the pages of a
/// checkpoint, which are in the log until it has ended. With
/// `DOMSNAP_KILL_EVERY=1` all are tried. Of those after which a temporary file alone has less in it than at
/// the next, one of 4 is.
pub fn is_distinguished(operations: &[shim::Counted], index: usize) -> bool {
    let Some(before) = index.checked_sub(1) else { return true };
    let temporary = |index: usize| operations[index].is_within_a_temporary();
    let same = operations[before].line.starts_with("flush ") || is_within_a_transaction(operations, index);
    !same && (!(temporary(before) && temporary(index)) || index.is_multiple_of(4))
}

/// Of instants that another suite tries too, one of so many is tried: `DOMSNAP_STRIKES_EVERY`, by default 3.
pub fn sampled() -> usize {
    usize::try_from(seed::from_env("DOMSNAP_STRIKES_EVERY", 3)).unwrap_or(1).max(1)
}

/// Whether SQLite writes before it and after it too: frames of one transaction, or pages of one checkpoint.
fn is_within_a_transaction(operations: &[shim::Counted], index: usize) -> bool {
    let written = |index: usize| operations.get(index).is_some_and(shim::Counted::is_of_the_catalogue);
    index > 0 && written(index - 1) && written(index) && written(index + 1)
}

fn kill(scenario: Scenario, write: bool) -> Result<()> {
    let count = |bench: &mut Bench| {
        let operations = survey(bench)?;
        let every = seed::from_env("DOMSNAP_KILL_EVERY", 0) != 0;
        let distinguished = |index: &usize| every || is_distinguished(&operations, *index);
        let instants =
            (0..operations.len()).filter(distinguished).map(|index| (operations[index].number, false));
        // What is half written in SQLite's log fails its checksum: the same as not written; a page that is
        // half written by a checkpoint is in the log. A temporary file with half of a write is one with less
        // in it, as above.
        let torn = operations.iter().filter(|o| {
            let is_own =
                !o.is_of_the_catalogue() && (!o.is_within_a_temporary() || o.number.is_multiple_of(4));
            !write && o.can_tear() && (every || is_own)
        });
        let instants = instants.chain(torn.map(|o| (o.number, true)));
        let instants: Vec<_> = instants.step_by(if write { sampled() } else { 1 }).collect();
        Ok((instants.len(), instants))
    };
    let kill = |bench: &mut Bench, instants: &Vec<(u64, bool)>, index: usize| {
        let (number, torn) = instants[index];
        bench.domain.restore_from(&bench.copy)?;
        let (_outputs, file) = shim::outputs()?;
        let domsnap = shim::counting(shim::watching(bench.domain.domsnap(), bench.domain.root())?, &file);
        let outcome = shim::killing(domsnap, number, torn).run(&bench.args())?;
        let (before, after) = (bench.before.clone(), bench.after.clone());
        let mut look = || -> Result<()> {
            // Threads may need an operation less than last time: then it went through.
            ensure!(
                matches!(outcome.status, None | Some(status::DONE)),
                "not killed, and not done: {outcome}"
            );
            let mut aside = Aside::default();
            if write {
                let written = meanwhile::write(&bench.domain, &meanwhile::ONCE)?;
                // Clones are healed while it runs: its disks are only read.
                let makes_clones = before.clones != after.clones;
                if number % 4 == 0 && bench.scenario.look == Look::Tree && !makes_clones {
                    meanwhile::nothing_is_healed_while_it_runs(&bench.domain)?;
                }
                bench.domain.domsnap().done(&["recover"]).context("recover")?;
                aside = meanwhile::kept(&bench.domain, &written, &mut bench.before, &mut bench.after)?;
            }
            let found = bench.heal_and_look()?;
            if outcome.status.is_some() {
                ensure!(found == Found::After || before == after, "reported as done, and is not");
            }
            // Doing everything again everywhere would double the time and show little more. Where the domain
            // wrote, only a revert done again gives what the model says: the others are of a present that it
            // does not know.
            let drops_the_present =
                before.present != after.present && before.snapshots.keys().eq(after.snapshots.keys());
            let again = number % 8 == 1 && (!write || drops_the_present);
            if found == Found::Before && before != after && again {
                bench.do_again()?;
                aside.is_there_still()?;
            }
            Ok(())
        };
        let result = look();
        (bench.before, bench.after) = (before, after);
        result.with_context(|| {
            let operations = shim::counted(&file).unwrap_or_default();
            let how = if torn { "in the middle of" } else { "just before" };
            let so_far: Vec<_> =
                operations.iter().rev().take(8).map(|o| format!("{} {}", o.number, o.line)).collect();
            format!(
                "killed {how} operation {number}: {}; latest first: {}",
                nth(&operations, number),
                so_far.join(" | ")
            )
        })
    };
    everywhere(scenario, count, kill)
}

/// The power goes at each instant, with seeded losses. `DOMSNAP_POWER_SEED` moves the seeds,
/// `DOMSNAP_POWER_CASES` says how many there are, by default 40.
///
/// # Errors
/// The first case that does not heal, with its instant and seed.
pub fn lose_power_everywhere(scenario: Scenario) -> Result<()> {
    let base = seed::from_env("DOMSNAP_POWER_SEED", 1);
    let cases = seed::from_env("DOMSNAP_POWER_CASES", 40) as usize;
    let record = |bench: &mut Bench| {
        // The copy that comes back has other inodes than the one that is recorded: so this is read first.
        let baseline = Baseline::read(&bench.domain.root().canonicalize()?)?;
        let (_outputs, file) = shim::outputs()?;
        let domsnap = shim::recording(shim::watching(bench.domain.domsnap(), bench.domain.root())?, &file);
        domsnap.done(&bench.args())?;
        Ok((cases, (baseline, shim::recorded(&file)?)))
    };
    let lose = |bench: &mut Bench, (baseline, records): &(Baseline, Vec<Record>), case: usize| {
        // Every instant has its turn before one has its second.
        let seed = Seed::new(base).draw().wrapping_add(case as u64);
        let instants = records.len() + 1;
        let done = (case * instants.div_ceil(cases).max(1) + case / instants) % instants;
        std::fs::remove_dir_all(bench.domain.root())?;
        baseline.lose_power(records, done, seed, bench.domain.root())?;
        let found = bench.heal_and_look();
        let look = found.and_then(|found| {
            if done == records.len() {
                ensure!(found == Found::After || bench.before == bench.after, "reported as done, and is not");
            }
            Ok(())
        });
        look.with_context(|| {
            let last: Vec<_> = records[..done].iter().rev().take(6).map(|record| describe(record, records)).collect();
            format!(
                "power lost after {done} of {} operations, case {case}, DOMSNAP_POWER_SEED={base}; latest first: {}",
                records.len(),
                last.join(" | ")
            )
        })
    };
    everywhere(scenario, record, lose)
}

/// `record` as text; files by the last name that one of `records` gave them.
fn describe(record: &Record, records: &[Record]) -> String {
    let named = records.iter().rev().find(|other| other.ino == record.ino && !other.path.is_empty());
    let path = named.map(|named| if named.path2.is_empty() { &named.path } else { &named.path2 });
    let name = match path {
        Some(path) => String::from_utf8_lossy(path).rsplit('/').next().unwrap_or_default().to_owned(),
        None => format!("inode {}", record.ino),
    };
    format!("{:?} {name} at {} length {}", record.kind, record.offset, record.data.len())
}

/// Each operation fails once with `errno`; or, `often`, everything that needs space from then on. The command
/// says so, and heals by itself or asks for it; once the trouble is over, the domain is as before or as
/// after.
///
/// # Errors
/// The first operation whose failure does harm.
pub fn fail_everywhere(scenario: Scenario, errno: &'static str, often: Often) -> Result<()> {
    let count = |bench: &mut Bench| {
        let operations = survey(bench)?;
        // An error of one frame of SQLite is like that of another. Where space alone is missing, what needs
        // none goes on.
        let needs_space = |line: &str| !line.starts_with("unlink ") && !line.starts_with("flush ");
        let is_own = |index: &usize| {
            !is_within_a_transaction(&operations, *index)
                && (often == Often::Once || needs_space(&operations[*index].line))
        };
        let instants: Vec<_> = (0..operations.len()).filter(is_own).map(|at| operations[at].number).collect();
        Ok((instants.len(), (operations.clone(), instants)))
    };
    let fail = |bench: &mut Bench, (operations, instants): &(Vec<shim::Counted>, Vec<u64>), index: usize| {
        let number = instants[index];
        bench.domain.restore_from(&bench.copy)?;
        let domsnap = shim::watching(bench.domain.domsnap(), bench.domain.root())?;
        let outcome = shim::failing(domsnap, number, errno, often).run(&bench.args())?;
        let mut look = || -> Result<()> {
            ensure!(!outcome.panicked(), "it panicked: {outcome}");
            let found_at_once = matches!(outcome.status, Some(status::FAILED | status::REFUSED));
            if found_at_once {
                undone_without_recover(bench, &outcome)?;
            }
            let found = bench.heal_and_look().with_context(|| format!("{outcome}"))?;
            match outcome.status {
                Some(status::DONE) => {
                    ensure!(found == Found::After || bench.before == bench.after, "not done: {outcome}")
                }
                Some(status::FAILED | status::REFUSED) => {
                    ensure!(!outcome.stderr.trim().is_empty(), "it failed without a message: {outcome}");
                    ensure!(found == Found::Before, "says it was undone, and it was done: {outcome}");
                }
                Some(status::NEEDS_RECOVERY) => {
                    ensure!(!outcome.stderr.trim().is_empty(), "it failed without a message: {outcome}");
                }
                _ => bail!("an exit status that means nothing: {outcome}"),
            }
            Ok(())
        };
        look().with_context(|| format!("{errno} at operation {number}: {}", nth(operations, number)))
    };
    everywhere(scenario, count, fail)
}

/// SIGINT before each operation: the command ends by itself, what it says it undid is undone without
/// `recover`, and what it says it did is done. Gives how often it was undone.
///
/// # Errors
/// The first instant at which an interrupt does harm.
pub fn interrupt_everywhere(scenario: Scenario) -> Result<usize> {
    let count = |bench: &mut Bench| {
        let operations = survey(bench)?;
        let distinguished = (0..operations.len()).filter(|index| is_distinguished(&operations, *index));
        let instants: Vec<_> = distinguished.map(|index| operations[index].number).collect();
        Ok((instants.len(), (operations.clone(), instants)))
    };
    let undone = AtomicUsize::new(0);
    let interrupt =
        |bench: &mut Bench, (operations, instants): &(Vec<shim::Counted>, Vec<u64>), index: usize| {
            let number = instants[index];
            bench.domain.restore_from(&bench.copy)?;
            let domsnap = shim::watching(bench.domain.domsnap(), bench.domain.root())?;
            let outcome = shim::interrupting(domsnap, number).run(&bench.args())?;
            let mut look = || -> Result<()> {
                ensure!(!outcome.panicked(), "it panicked: {outcome}");
                match outcome.status {
                    Some(status::DONE) => {
                        let found = bench.heal_and_look().with_context(|| format!("{outcome}"))?;
                        ensure!(found == Found::After || bench.before == bench.after, "not done: {outcome}");
                    }
                    Some(status::FAILED) => {
                        ensure!(outcome.stderr.contains("cancelled"), "it does not say why: {outcome}");
                        undone_without_recover(bench, &outcome)?;
                        undone.fetch_add(1, Ordering::Relaxed);
                    }
                    _ => bail!("an interrupted command neither undid nor finished: {outcome}"),
                }
                Ok(())
            };
            look().with_context(|| format!("SIGINT at operation {number}: {}", nth(operations, number)))
        };
    everywhere(scenario, count, interrupt)?;
    Ok(undone.into_inner())
}

/// `recover` leaves nothing that `qemu-img check` finds. An image of no domain has no journal and is not
/// recovered: it may have what a check mends without touching data.
fn every_image(look: Look, domain: &Domain, list: &List, model: &Model, memo: &mut Memo) -> Result<()> {
    verify::clones(domain, model, memo)?;
    match look {
        Look::Tree => verify::every_image(domain, list, model, memo),
        Look::Image => verify::every_image_after_crash(domain, list, model, memo),
    }
}

/// An exit status that says "undone" is true already, without `recover`.
fn undone_without_recover(bench: &mut Bench, outcome: &Outcome) -> Result<()> {
    let list = bench.list()?;
    bench
        .compare_tree(&list, &bench.before)
        .and_then(|()| every_image(bench.scenario.look, &bench.domain, &list, &bench.before, &mut bench.memo))
        .with_context(|| format!("it says that it was undone: {outcome}"))
}
