//! Random operations, 30 of them, on one guest under disk and memory load: snapshots of each kind, reverts to
//! anywhere, deletes of anything. Then every snapshot that is left is returned to.
//!
//! `DOMSNAP_LIVE_SEED` and `DOMSNAP_LIVE_OPERATIONS` try others; a failure prints what was done.

use anyhow::{Context, Result, ensure};
use domsnap_tests::live::{Live, NAME};
use domsnap_tests::report;
use domsnap_tests::seed::{Seed, from_env};
use testguest::GuestOptions;

/// More would be slow to look at.
const MOST_SNAPSHOTS: usize = 9;

const KINDS: [&[&str]; 4] = [
    &["--internal"],
    &["--external"],
    &["--disk", "vda=internal", "--disk", "vdb=external"],
    &["--disk", "vda=external", "--disk", "vdb=internal"],
];

const MEMORIES: [&[&str]; 5] =
    [&[], &[], &["--no-live"], &["--disk-only"], &["--disk-only", "--quiesce=try"]];

fn step(live: &mut Live, number: u64, seed: &mut Seed, done: &mut Vec<String>) -> Result<()> {
    let names: Vec<String> =
        report::list(&live.domsnap(), NAME)?.snapshots.into_iter().map(|snapshot| snapshot.name).collect();
    let any = |seed: &mut Seed| names[seed.below(names.len() as u64) as usize].clone();
    let choice = seed.below(10);
    if names.is_empty() || (choice < 4 && names.len() < MOST_SNAPSHOTS) {
        let name = format!("n{number}");
        let more = [seed.pick(&KINDS), seed.pick(&MEMORIES)].concat();
        done.push(format!("create {name} {}", more.join(" ")));
        live.create(&name, &more).map(drop)
    } else if choice < 7 {
        let name = any(seed);
        done.push(format!("revert {name}"));
        live.revert(&name, &[]).map(drop)
    } else {
        let mut doomed = vec![any(seed)];
        let second = any(seed);
        if seed.chance(30) && !doomed.contains(&second) {
            doomed.push(second);
        }
        let subtree = seed.chance(15);
        let doomed: Vec<&str> = doomed.iter().map(String::as_str).collect();
        done.push(format!("delete {}{}", doomed.join(" "), if subtree { " --children" } else { "" }));
        live.delete_unverified(&doomed, if subtree { &["--children"] } else { &[] })
    }
}

#[test]
fn random_operations_leave_every_snapshot_whole() -> Result<()> {
    let (number, operations) =
        (from_env("DOMSNAP_LIVE_SEED", 20_261_123), from_env("DOMSNAP_LIVE_OPERATIONS", 20));
    let mut seed = Seed::new(number);
    let mut done = Vec::new();
    let mut live = Live::of(GuestOptions::new().disk_mib(48))?;
    for operation in 1..=operations {
        step(&mut live, operation, &mut seed, &mut done)
            .with_context(|| format!("DOMSNAP_LIVE_SEED={number}, after:\n  {}", done.join("\n  ")))?;
        if operation % 15 == 0 {
            live.verify()
                .with_context(|| format!("DOMSNAP_LIVE_SEED={number}, after:\n  {}", done.join("\n  ")))?;
        }
    }
    live.verify()?;
    let all = report::list(&live.domsnap(), NAME)?.snapshots;
    for snapshot in &all {
        live.revert(&snapshot.name, &[])?;
    }
    let names: Vec<&str> = all.iter().map(|snapshot| snapshot.name.as_str()).collect();
    if !names.is_empty() {
        live.delete(&names, &[])?;
    }
    ensure!(live.layers()? <= 2, "{} layers are left when all snapshots are deleted", live.layers()?);
    live.finish()
}
