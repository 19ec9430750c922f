//! Whoever can die in the middle of an operation on a running domain dies, at each step of it; then
//! `recover`.
//!
//! A step begins where the journal is made durable, or a name of an image or memory image changes: just
//! before each such operation on files the shim kills. All instants of an operation are injected with faults
//! in one guest, one after the other, so that what a recovery leaves behind meets the next.

use std::fs;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};

use super::{Live, NAME};
use crate::domsnap::{Domsnap, status};
use crate::report;
use crate::seed;
use crate::shim::{self, Counted};

/// Who dies.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Victim {
    /// `domsnap`; the guest lives.
    Domsnap,
    /// QEMU, while `domsnap` is about to do the step; it is started again, as a supervisor would, before the
    /// recovery.
    Qemu,
    /// The servers of the guest's disks, while `domsnap` is about to do the step; they are started again at
    /// once, as systemd does.
    Server,
    /// `domsnap`, and then QEMU, which is started again before the recovery.
    Both,
}

/// An operation, and the way back to where it can be done again.
pub struct Operation {
    /// The arguments of the command.
    pub args: &'static [&'static str],
    /// The snapshot that it takes, where it takes one.
    pub takes: Option<&'static str>,
    /// The snapshot that it deletes.
    pub deletes: Option<&'static str>,
    /// Makes the state again in which it can be done.
    pub again: fn(&mut Live) -> Result<()>,
}

/// Kills at every `every`th step of `operation`, beginning with number `first`; at one of
/// `DOMSNAP_LIVE_EVERY` of these, by default of 4.
///
/// # Errors
/// What is not as before the operation, nor as after it.
pub fn inject(
    live: &mut Live,
    operation: &Operation,
    victim: Victim,
    first: usize,
    every: usize,
) -> Result<()> {
    let every = every * usize::try_from(seed::from_env("DOMSNAP_LIVE_EVERY", 4))?.max(1);
    let args = [&[operation.args[0], NAME], &operation.args[1..]].concat();
    (operation.again)(live).context("before the first")?;
    let (_outputs, file) = shim::outputs()?;
    let root = live.guest.dir().to_owned();
    let counting = shim::counting(shim::watching(live.domsnap(), &root)?, &file);
    let outcome = counting.done(&args)?;
    let steps: Vec<Counted> = shim::counted(&file)?.into_iter().filter(Counted::begins_a_step).collect();
    ensure!(steps.len() >= 3, "the shim saw {} steps: {outcome}", steps.len());
    check_and_prepare(live, operation, true).context("after the one that was counted")?;
    for step in steps.iter().skip(first).step_by(every) {
        let Counted { number, line } = step;
        (operation.again)(live).with_context(|| format!("before operation {number}"))?;
        once(live, operation, &args, victim, *number).with_context(|| {
            format!(
                "{victim:?} killed at operation {number} (`{line}` when they were counted) of domsnap {}",
                args.join(" ")
            )
        })?;
    }
    Ok(())
}

fn once(live: &mut Live, operation: &Operation, args: &[&str], victim: Victim, step: u64) -> Result<()> {
    let root = live.guest.dir().to_owned();
    let watched = shim::watching(live.domsnap(), &root)?;
    let boots = live.guest.boots();
    let happened = match victim {
        Victim::Domsnap => {
            let outcome = shim::killing(watched, step, false).run(args)?;
            ensure!(matches!(outcome.status, None | Some(status::DONE)), "{outcome}");
            outcome.status == Some(status::DONE)
        }
        Victim::Server => {
            let child = stopped_at(watched, args, step)?;
            live.servers.kill()?;
            go_on(&child)?;
            let servers = live.servers.clone();
            let started = std::thread::spawn(move || servers.start());
            let done = ended(child)?;
            match started.join() {
                Ok(started) => started.context("starting the server again")?,
                Err(_) => bail!("the thread that starts servers panicked"),
            }
            done
        }
        Victim::Both => {
            let outcome = shim::killing(watched, step, false).run(args)?;
            kill_qemu(live)?;
            start_qemu(live)?;
            live.guest.wait_boots(boots + 1)?;
            outcome.status == Some(status::DONE)
        }
        Victim::Qemu => {
            let child = stopped_at(watched, args, step)?;
            kill_qemu(live)?;
            // It is gone already where it was past the step.
            go_on(&child)?;
            let done = ended(child)?;
            start_qemu(live)?;
            live.guest.wait_boots(boots + 1)?;
            done
        }
    };
    live.domsnap().done(&["recover", NAME])?;
    if matches!(victim, Victim::Domsnap | Victim::Server) {
        // The guest ran on, and what it wrote is where it writes.
        let aside = fs::read_dir(&root)?
            .flatten()
            .find(|entry| entry.file_name().to_string_lossy().starts_with("rescued-"));
        ensure!(aside.is_none(), "something was saved that nothing lacks: {aside:?}");
    } else {
        live.wait_running()?;
        let to = match operation.args {
            ["revert", to, ..] => Some(*to),
            ["undo", ..] => Some("outside"),
            _ => None,
        };
        if let Some(to) = to {
            // Its supervisor started it before the recovery, on disks of which some were reverted and some
            // not, and it wrote to them: no recovery makes one instant of that. All snapshots are whole, and
            // it can be returned to each.
            live.guest.forget_bad();
            live.verify()?;
            live.revert(to, &[])?;
        }
        live.load()?;
    }
    check_and_prepare(live, operation, happened)
}

/// Looks whether all is as before the operation or as after it; a snapshot that was taken must be one that
/// can be returned to.
fn check_and_prepare(live: &mut Live, operation: &Operation, happened: bool) -> Result<()> {
    live.wait_running()?;
    live.sound()?;
    let found = report::list(&live.domsnap(), NAME)?;
    let there = |name: &str| found.snapshots.iter().any(|snapshot| snapshot.name == name);
    if let Some(name) = operation.takes {
        if happened {
            ensure!(there(name), "it said that {name} was taken, and there is none");
        }
        if there(name) {
            live.remember(name, (0, u64::MAX / 2))?;
            live.verify()?;
            return live.revert(name, &[]).map(drop);
        }
    }
    if let Some(name) = operation.deletes {
        ensure!(!happened || !there(name), "it said that {name} was deleted, and it is there");
        if !there(name) {
            live.forget(name);
        }
    }
    live.verify()
}

/// Starts domsnap, and returns when it is stopped just before a step, or has ended.
fn stopped_at(watched: Domsnap, args: &[&str], step: u64) -> Result<Child> {
    let mut child =
        shim::stopping(watched, step).command(args).stdout(Stdio::null()).stderr(Stdio::piped()).spawn()?;
    wait_stopped(&mut child)?;
    Ok(child)
}

/// Lets it go on. It may have ended.
fn go_on(child: &Child) -> Result<()> {
    Command::new("kill").args(["-CONT", &child.id().to_string()]).status()?;
    Ok(())
}

/// Waits for its end, which must not be a signal's or a panic's. Returns true if the operation was done.
fn ended(child: Child) -> Result<bool> {
    let output = child.wait_with_output()?;
    let text = String::from_utf8_lossy(&output.stderr);
    ensure!(
        output.status.code().is_some() && !text.contains("panicked"),
        "it ended with {}: {text}",
        output.status
    );
    Ok(output.status.code() == Some(status::DONE))
}

/// Returns true if the domain has a snapshot of this name.
///
/// # Errors
/// The list cannot be had.
pub fn there(live: &Live, name: &str) -> Result<bool> {
    let list = report::list(&live.domsnap(), NAME)?;
    Ok(list.snapshots.iter().any(|snapshot| snapshot.name == name))
}

/// For [`Operation::again`]: deletes the snapshot `x` if it is there.
///
/// # Errors
/// It cannot be deleted.
pub fn without_x(live: &mut Live) -> Result<()> {
    match there(live, "x")? {
        true => live.delete(&["x"], &[]),
        false => Ok(()),
    }
}

/// For [`Operation::again`]: the operation can be repeated as it is.
///
/// # Errors
/// None.
pub fn nothing(_: &mut Live) -> Result<()> {
    Ok(())
}

fn wait_stopped(child: &mut Child) -> Result<()> {
    let until = Instant::now() + Duration::from_secs(240);
    loop {
        if child.try_wait()?.is_some() {
            return Ok(());
        }
        let stat = std::fs::read_to_string(format!("/proc/{}/stat", child.id())).unwrap_or_default();
        let state = stat.rsplit(") ").next().and_then(|rest| rest.chars().next());
        if state == Some('T') {
            return Ok(());
        }
        if Instant::now() >= until {
            child.kill()?;
            bail!("domsnap did not reach the step within a minute");
        }
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// SIGKILL for the guest's QEMU.
///
/// # Errors
/// If it does not die.
pub fn kill_qemu(live: &Live) -> Result<()> {
    for pid in live.guest.processes() {
        Command::new("kill").args(["-KILL", &pid.to_string()]).status()?;
    }
    let until = Instant::now() + Duration::from_secs(20);
    while !live.guest.processes().is_empty() {
        ensure!(Instant::now() < until, "QEMU does not die");
        std::thread::sleep(Duration::from_millis(5));
    }
    Ok(())
}

/// Starts the guest as its supervisor would: by its own command line, on its configured paths.
///
/// # Errors
/// If it cannot be started.
pub fn start_qemu(live: &Live) -> Result<()> {
    let line = live.guest.command_line();
    let (program, args) = line.split_first().context("the guest has no command line")?;
    Command::new(program)
        .args(args)
        .current_dir(live.guest.dir())
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .map(drop)
        .context("starting QEMU again")
}
