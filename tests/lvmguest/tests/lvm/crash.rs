//! `domsnap` killed at every step and in the middle of each, and then recovered.

use std::io::{BufRead, BufReader};
use std::process::{Child, ChildStderr, Command, Stdio};
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use lvmguest::TestCase;
use lvmguest::inside::{done, read_block, snapshots, succeed, write_block};

use crate::matrix::{Sort, expect, group, volume, volumes};

/// The block that differs between the states.
const STATE: u64 = 0;

/// The block that is written between the crash and the recovery.
const MEANWHILE: u64 = 900;

/// Starts `domsnap -v`, and returns its output.
fn started(args: &[&str]) -> Result<(Child, BufReader<ChildStderr>)> {
    let mut child = Command::new("/t/domsnap")
        .env("DOMSNAP_UNDO", "no")
        .arg("-v")
        .args(args)
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()?;
    let reported = BufReader::new(child.stderr.take().context("no standard error")?);
    Ok((child, reported))
}

/// Runs `domsnap -v` and kills it some time after it has printed so many lines; gives whether it was killed
/// before its end.
fn killed(args: &[&str], lines: usize, after: Duration) -> Result<bool> {
    let (mut child, reported) = started(args)?;
    let mut heard = 0;
    for line in reported.lines() {
        line?;
        heard += 1;
        if heard == lines {
            thread::sleep(after);
            child.kill()?;
            break;
        }
    }
    let status = child.wait()?;
    Ok(status.code().is_none())
}

/// Runs `domsnap -v` and kills it as soon as it prints this text, which it must.
pub fn killed_at(args: &[&str], said: &str) -> Result<()> {
    let (mut child, reported) = started(args)?;
    let heard = reported.lines().map_while(Result::ok).any(|line| line.contains(said));
    child.kill()?;
    let status = child.wait()?;
    ensure!(heard && status.code().is_none(), "it ended with {status} before it was killed");
    Ok(())
}

/// The moments of an operation: after so many lines, and into what comes then.
fn moments() -> impl Iterator<Item = (usize, Duration)> {
    (1..).flat_map(|lines| [0, 250].into_iter().map(move |ms| (lines, Duration::from_millis(ms))))
}

/// Everything that the volume's points and its present show is as it should be, and nothing else is there.
fn all_is_well(path: &str, present: &[u8], points: &[&str]) -> Result<()> {
    let found = read_block(path, STATE)?;
    ensure!(
        present.contains(&found),
        "the current state is {:?}, and should be one of {present:?}",
        found as char
    );
    let known = snapshots(path)?;
    ensure!(points.iter().all(|name| known.iter().any(|k| k == name)), "{known:?} should have {points:?}");
    let there = volumes()?;
    ensure!(there.len() == 1 + known.len(), "{there:?} for {known:?}");
    Ok(())
}

fn prepared(sort: Sort) -> Result<String> {
    group(sort)?;
    let path = volume(sort, "root")?.path();
    write_block(&path, STATE, b'a')?;
    done(&["create", &path, "a"])?;
    write_block(&path, STATE, b'b')?;
    done(&["create", &path, "b"])?;
    write_block(&path, STATE, b'p')?;
    Ok(path)
}

fn a_killed_revert_is_recovered(sort: Sort) -> Result<()> {
    let path = prepared(sort)?;
    let mut times = 0;
    for (lines, after) in moments() {
        write_block(&path, STATE, b'p')?;
        let was_killed = killed(&["revert", &path, "a"], lines, after)?;
        let present = match was_killed {
            true => {
                done(&["recover"]).context("recovering")?;
                vec![b'p', b'a']
            }
            false => vec![b'a'],
        };
        all_is_well(&path, &present, &["a", "b"])
            .with_context(|| format!("killed {after:?} after line {lines}"))?;
        if !was_killed {
            break;
        }
        times += 1;
    }
    ensure!(times >= 4, "it was killed {times} times only");
    for letter in [b'b', b'a'] {
        done(&["revert", &path, &(letter as char).to_string()])?;
        expect(&path, STATE, letter)?;
    }
    Ok(())
}

fn a_killed_create_and_delete_are_recovered(sort: Sort) -> Result<()> {
    let path = prepared(sort)?;
    for (lines, after) in moments() {
        let was_killed = killed(&["create", &path, "n"], lines, after)?;
        if was_killed {
            done(&["recover"])?;
        }
        all_is_well(&path, b"p", &["a", "b"])
            .with_context(|| format!("create killed {after:?} after line {lines}"))?;
        if snapshots(&path)?.iter().any(|name| name == "n") {
            let deleted = killed(&["delete", &path, "n"], lines, after)?;
            if deleted {
                done(&["recover"])?;
            }
            all_is_well(&path, b"p", &["a", "b"])
                .with_context(|| format!("delete killed {after:?} after line {lines}"))?;
            if snapshots(&path)?.iter().any(|name| name == "n") {
                done(&["delete", &path, "n"])?;
            }
        }
        if !was_killed {
            break;
        }
    }
    done(&["revert", &path, "a"])?;
    expect(&path, STATE, b'a')?;
    done(&["revert", &path, "b"])?;
    expect(&path, STATE, b'b')
}

/// Where in the group a letter is at the block that was written after a crash.
fn is_kept(letter: u8) -> Result<bool> {
    for name in volumes()? {
        let full = format!("vg/{name}");
        succeed(Command::new("lvchange").args(["-q", "-ay", "-K", &full]))?;
        if read_block(&format!("/dev/{full}"), MEANWHILE)? == letter {
            return Ok(true);
        }
    }
    Ok(false)
}

fn what_a_domain_wrote_before_the_recovery_is_kept(sort: Sort) -> Result<()> {
    let path = prepared(sort)?;
    let mut letter = b'A';
    for (lines, after) in moments() {
        letter += 1;
        let was_killed = killed(&["revert", &path, "a"], lines, after)?;
        if !was_killed {
            break;
        }
        // What a killed one left comes to its end by itself.
        thread::sleep(Duration::from_secs(3));
        if std::fs::metadata(&path).is_err() {
            // The instant between two renames: no process can write.
            done(&["recover"])?;
            continue;
        }
        write_block(&path, MEANWHILE, letter)?;
        done(&["recover"])?;
        ensure!(
            is_kept(letter)?,
            "what was written after the kill {after:?} after line {lines} is lost: {:?}",
            volumes()?
        );
        for name in volumes()?.into_iter().filter(|name| name.ends_with("-kept")) {
            succeed(Command::new("lvremove").args(["-q", "-y", &format!("vg/{name}")]))?;
        }
    }
    done(&["revert", &path, "b"])?;
    expect(&path, STATE, b'b')
}

/// Killed at every step.
pub static CASES: &[TestCase] = &[
    ("a killed revert of a thin volume is recovered", || a_killed_revert_is_recovered(Sort::Thin)),
    ("a killed revert of a thick volume is recovered", || a_killed_revert_is_recovered(Sort::Thick)),
    ("a killed create and a killed delete of a thin volume are recovered", || {
        a_killed_create_and_delete_are_recovered(Sort::Thin)
    }),
    ("a killed create and a killed delete of a thick volume are recovered", || {
        a_killed_create_and_delete_are_recovered(Sort::Thick)
    }),
];

/// What was written in between.
pub static WRITTEN: &[TestCase] = &[
    ("what a domain wrote to a thin volume before the recovery is kept", || {
        what_a_domain_wrote_before_the_recovery_is_kept(Sort::Thin)
    }),
    ("what a domain wrote to a thick volume before the recovery is kept", || {
        what_a_domain_wrote_before_the_recovery_is_kept(Sort::Thick)
    }),
];
