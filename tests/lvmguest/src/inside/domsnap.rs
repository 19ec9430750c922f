//! The program under test.

use std::process::Command;

use anyhow::{Context, Result, bail};
use serde_json::Value;

use super::program::{Output, run};

/// `domsnap` with these arguments.
///
/// # Errors
/// It cannot be started: it was not built (`cargo build -p snapcli`).
pub fn domsnap<S: AsRef<str>>(args: &[S]) -> Result<Output> {
    // Most test cases are about what a revert leaves without it; the others give --undo.
    run(Command::new("/t/domsnap").env("DOMSNAP_UNDO", "no").args(args.iter().map(AsRef::as_ref)))
        .context("domsnap is not in the machine: run `cargo build -p snapcli` first")
}

/// It must succeed.
///
/// # Errors
/// It does not.
pub fn done<S: AsRef<str>>(args: &[S]) -> Result<Output> {
    let output = domsnap(args)?;
    match output.status {
        Some(0) => Ok(output),
        _ => bail!("{output}"),
    }
}

/// It must refuse, for all these reasons. Returns its output.
///
/// # Errors
/// It does not, or says something else.
pub fn refused<S: AsRef<str>>(args: &[S], reasons: &[&str]) -> Result<Output> {
    let output = domsnap(args)?;
    if output.status != Some(3) {
        bail!("it should have refused: {output}");
    }
    match reasons.iter().find(|reason| !output.stderr.contains(**reason)) {
        Some(reason) => bail!("it does not say {reason:?}: {output}"),
        None => Ok(output),
    }
}

/// What it answers as JSON.
///
/// # Errors
/// It fails, or answers something else.
pub fn asked<S: AsRef<str>>(args: &[S]) -> Result<Value> {
    let mut all: Vec<String> = args.iter().map(|word| word.as_ref().to_owned()).collect();
    all.push("--json".to_owned());
    let output = done(&all)?;
    serde_json::from_str(&output.stdout).with_context(|| format!("no JSON: {output}"))
}

/// The names of a domain's snapshots, oldest first.
///
/// # Errors
/// As [`asked`].
pub fn snapshots(domain: &str) -> Result<Vec<String>> {
    let listed = asked(&["list", domain])?;
    let names = find_names(&listed);
    Ok(names)
}

fn find_names(value: &Value) -> Vec<String> {
    let snapshots = value.pointer("/snapshots").or_else(|| value.pointer("/domains/0/snapshots"));
    let listed = snapshots.and_then(Value::as_array).into_iter().flatten();
    listed
        .filter_map(|snapshot| {
            let name = snapshot.get("name").or_else(|| snapshot.pointer("/snapshot/name"))?;
            name.as_str().map(str::to_owned)
        })
        .collect()
}
