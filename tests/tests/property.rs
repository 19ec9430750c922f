//! Random sequences of writes, creates, reverts, undos, deletes and clones, with the model beside them: after
//! each step, every point of the tree is what the model says, every layer is clean, and nothing is left
//! behind.
//!
//! `DOMSNAP_PROPERTY_SEED` and `DOMSNAP_PROPERTY_CASES` try others; a failure prints both and the shrunk
//! sequence.

use anyhow::{Context, Result};
use domsnap_tests::domain::{Domain, NAME, Shape};
use domsnap_tests::domsnap::status;
use domsnap_tests::qemu::Write;
use domsnap_tests::seed::from_env;
use domsnap_tests::verify::{self, Memo};
use proptest::prelude::*;
use proptest::test_runner::{Config, RngAlgorithm, TestCaseError, TestError, TestRng, TestRunner};

/// Numbers that choose among snapshots are taken modulo how many there are.
#[derive(Debug, Clone)]
enum Step {
    Write { disk: usize, offset: u64, length: u64, byte: Option<u8> },
    Create { kinds: Vec<bool> },
    Revert { of: usize, save: bool, keep: bool },
    Undo { twice: bool },
    Forget,
    Rename { of: usize },
    Delete { of: Vec<usize> },
    DeleteSubtree { of: usize, only: bool },
    Clone { of: usize, full: bool, many: bool },
    DropClone { of: usize },
}

/// As [`step`], with clones in between, which live on while their source changes.
fn step_or_clone() -> impl Strategy<Value = Step> {
    prop_oneof![
        10 => step(),
        2 => (0..1000usize, prop::bool::weighted(0.2), any::<bool>())
            .prop_map(|(of, full, many)| Step::Clone { of, full, many }),
        1 => (0..1000usize).prop_map(|of| Step::DropClone { of }),
    ]
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        4 => (0..3usize, 0..8000u64, 1..200u64, prop::option::weighted(0.85, 1..=255u8)).prop_map(
            |(disk, sector, sectors, byte)| Step::Write {
                disk,
                offset: sector * 512,
                length: sectors.min(8192 - sector) * 512,
                byte
            }
        ),
        4 => prop::collection::vec(any::<bool>(), 3).prop_map(|kinds| Step::Create { kinds }),
        3 => (any::<prop::sample::Index>(), prop::bool::weighted(0.25), any::<bool>())
            .prop_map(|(of, save, keep)| Step::Revert { of: of.index(1000), save, keep }),
        3 => any::<bool>().prop_map(|twice| Step::Undo { twice }),
        1 => Just(Step::Forget),
        1 => (0..1000usize).prop_map(|of| Step::Rename { of }),
        3 => prop::collection::vec(0..1000usize, 1..3).prop_map(|of| Step::Delete { of }),
        1 => (0..1000usize, any::<bool>()).prop_map(|(of, only)| Step::DeleteSubtree { of, only }),
    ]
}

fn apply(domain: &mut Domain, number: usize, step: &Step) -> Result<()> {
    let names: Vec<String> = domain.model.snapshots.keys().cloned().collect();
    let targets: Vec<String> = domain.model.present.keys().cloned().collect();
    match step {
        Step::Write { disk, offset, length, byte } => domain.write(
            &targets[disk % targets.len()],
            &[Write { offset: *offset, length: *length, byte: *byte }],
        ),
        Step::Create { kinds } => {
            let name = format!("n{number}");
            let mut args = vec!["create".to_owned(), NAME.to_owned(), name.clone()];
            for (target, internal) in targets.iter().zip(kinds) {
                args.push("--disk".to_owned());
                args.push(format!("{target}={}", if *internal { "internal" } else { "external" }));
            }
            domain.domsnap().done(&args)?;
            domain.model.create(&name);
            Ok(())
        }
        // Undone twice, all is as it was before: each time, every byte is compared with the model afterwards.
        Step::Undo { twice } => {
            if domain.model.previous.is_none() {
                domain.declined(&["undo", NAME], status::REFUSED)?;
                return Ok(());
            }
            domain.domsnap().done(&["undo", NAME])?;
            domain.model.undo();
            if *twice {
                domain.verify().context("undone once")?;
                domain.domsnap().done(&["undo", NAME])?;
                domain.model.undo();
            }
            Ok(())
        }
        Step::Forget => {
            domain.domsnap().done(&["undo", NAME, "--forget"])?;
            domain.model.previous = None;
            Ok(())
        }
        // What only the clone needed of its source is removed there by the recovery.
        Step::DropClone { of } => {
            let clones: Vec<String> = domain.model.clones.keys().cloned().collect();
            let Some(name) = clones.get(of % clones.len().max(1)) else { return Ok(()) };
            domain.domsnap().done(&["domain", "remove", name])?;
            std::fs::remove_dir_all(domain.clones().join(name))?;
            domain.model.clones.remove(name);
            domain.domsnap().done(&["recover"]).map(drop)
        }
        _ if names.is_empty() => Ok(()),
        Step::Clone { of, full, many } => {
            let (snapshot, new) = (&names[of % names.len()], format!("c{number}"));
            let place = domain.clones().display().to_string();
            let mut args = vec!["clone", NAME, snapshot, &new, "--to", &place];
            args.extend(full.then_some("--full"));
            args.extend(if *many { &["--count", "2"][..] } else { &[] });
            domain.domsnap().done(&args)?;
            let made = if *many { vec![format!("{new}-1"), format!("{new}-2")] } else { vec![new] };
            domain.model.clone_to(&made.iter().map(String::as_str).collect::<Vec<_>>(), snapshot);
            Ok(())
        }
        Step::Rename { of } => {
            let (name, new) = (&names[of % names.len()], format!("r{number}"));
            domain.domsnap().done(&["rename", NAME, name, &new])?;
            domain.model.rename(name, &new);
            Ok(())
        }
        Step::Revert { of, save: false, keep: true } => {
            let name = &names[of % names.len()];
            domain.domsnap().done(&["revert", NAME, name, "--undo=free"])?;
            domain.model.revert_and_keep(name);
            Ok(())
        }
        Step::Revert { of, save, .. } => {
            let name = &names[of % names.len()];
            if *save {
                let kept = format!("kept{number}");
                domain.domsnap().done(&["revert", NAME, name, &format!("--save-current={kept}")])?;
                domain.model.create(&kept);
                domain.model.revert(name);
                Ok(())
            } else {
                domain.revert(name)
            }
        }
        Step::Delete { of } => {
            let mut chosen: Vec<&str> = of.iter().map(|of| names[of % names.len()].as_str()).collect();
            chosen.sort_unstable();
            chosen.dedup();
            domain.delete(&chosen)
        }
        Step::DeleteSubtree { of, only } => {
            let name = &names[of % names.len()];
            let mut gone = domain.model.subtree(name);
            if *only {
                gone.retain(|other| other != name);
                if gone.is_empty() {
                    return Ok(());
                }
            }
            let option = if *only { "--children-only" } else { "--children" };
            domain.domsnap().done(&["delete", NAME, name, option])?;
            domain.model.delete(&gone);
            Ok(())
        }
    }
}

fn run(shape: &Shape, steps: &[Step], with_clones: bool) -> Result<()> {
    let (mut domain, mut memo) = (Domain::new(shape)?, Memo::default());
    if with_clones {
        std::fs::create_dir(domain.clones())?;
    }
    for (number, step) in steps.iter().enumerate() {
        let mut look = |domain: &mut Domain| -> Result<()> {
            apply(domain, number, step)?;
            verify::every_point(domain, &domain.model, NAME, &mut memo)?;
            verify::clones(domain, &domain.model, &mut memo)
        };
        look(&mut domain).with_context(|| format!("step {number}: {step:?}"))?;
    }
    Ok(())
}

/// Random sequences on images of `shape`.
fn any_sequence(shape: Shape) {
    sequences(shape, step(), false);
}

fn sequences(shape: Shape, step: impl Strategy<Value = Step>, with_clones: bool) {
    let (seed, cases) = (from_env("DOMSNAP_PROPERTY_SEED", 1), from_env("DOMSNAP_PROPERTY_CASES", 12) as u32);
    let mut bytes = [0; 32];
    bytes[..8].copy_from_slice(&seed.to_le_bytes());
    let rng = TestRng::from_seed(RngAlgorithm::ChaCha, &bytes);
    let config = Config { cases, failure_persistence: None, max_shrink_iters: 60, ..Config::default() };
    let result = TestRunner::new_with_rng(config, rng).run(&prop::collection::vec(step, 4..16), |steps| {
        run(&shape, &steps, with_clones).map_err(|error| TestCaseError::fail(format!("{error:?}")))
    });
    match result {
        Ok(()) => {}
        Err(TestError::Fail(why, steps)) => {
            panic!(
                "DOMSNAP_PROPERTY_SEED={seed} DOMSNAP_PROPERTY_CASES={cases}\n{shape:?}\n{steps:#?}\n{why}"
            )
        }
        Err(error) => panic!("DOMSNAP_PROPERTY_SEED={seed}: {error}"),
    }
}

/// Any sequence on one disk of 512 byte clusters keeps every point.
#[test]
fn one_disk_of_512_byte_clusters() {
    any_sequence(Shape::disks(1).options("cluster_size=512"));
}

/// Any sequence on two disks of 4 kib clusters keeps every point.
#[test]
fn two_disks_of_4_kib_clusters() {
    any_sequence(Shape::disks(2).options("cluster_size=4096"));
}

/// Any sequence on three disks of 64 kib clusters keeps every point.
#[test]
fn three_disks_of_64_kib_clusters() {
    any_sequence(Shape::disks(3).options("cluster_size=65536"));
}

/// Any sequence on extended l2 tables keeps every point.
#[test]
fn one_disk_of_extended_l2_tables() {
    any_sequence(Shape::disks(1).options("extended_l2=on,cluster_size=16384"));
}

/// Clones keep what they show while their source is changed in any way, and the source keeps its points.
#[test]
fn two_disks_with_clones() {
    sequences(Shape::disks(2), step_or_clone(), true);
}
