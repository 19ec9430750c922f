//! Whatever dies in the middle of an operation on a running domain, `recover` heals it: the guest runs, memory and disks are of
//! one instant, every snapshot holds what it held, and what was begun has happened or has not.

use anyhow::Result;
use domsnap_tests::live::Live;
use domsnap_tests::live::crash::{Operation, Victim, strike};
use domsnap_tests::report;
use testguest::GuestOptions;

/// A tree: `outside` and `disks` are external, `inside` is internal, each with memory but `disks`.
fn tree() -> Result<Live> {
    let mut live = Live::of(GuestOptions::new().disk_mib(48))?;
    live.create("outside", &["--external"])?;
    live.create("inside", &["--internal"])?;
    live.create("disks", &["--disk-only", "--external"])?;
    Ok(live)
}

fn there(live: &Live, name: &str) -> Result<bool> {
    let list = report::list(&live.domsnap(), domsnap_tests::live::NAME)?;
    Ok(list.snapshots.iter().any(|snapshot| snapshot.name == name))
}

fn without_x(live: &mut Live) -> Result<()> {
    match there(live, "x")? {
        true => live.delete(&["x"], &[]),
        false => Ok(()),
    }
}

/// `x` is taken, so that the domain writes to an overlay on it.
fn on_x(live: &mut Live) -> Result<()> {
    match there(live, "x")? {
        true => Ok(()),
        false => live.create("x", &["--external", "--disk-only"]).map(drop),
    }
}

/// `x` is inside an image, and another snapshot stands on that.
fn under_y(live: &mut Live) -> Result<()> {
    if !there(live, "x")? {
        if there(live, "y")? {
            live.delete(&["y"], &[])?;
        }
        live.create("x", &["--internal", "--disk-only"])?;
        live.create("y", &["--external", "--disk-only"])?;
    }
    Ok(())
}

fn nothing(_: &mut Live) -> Result<()> {
    Ok(())
}

const CREATE_EXTERNAL: Operation =
    Operation { words: &["create", "x", "--external"], takes: Some("x"), deletes: None, again: without_x };
const CREATE_COMPRESSED: Operation = Operation {
    words: &["create", "x", "--external", "--compress"],
    takes: Some("x"),
    deletes: None,
    again: without_x,
};
const CREATE_MIXED: Operation = Operation {
    words: &["create", "x", "--disk", "vda=internal", "--disk", "vdb=external"],
    takes: Some("x"),
    deletes: None,
    again: without_x,
};
const REVERT_OUTSIDE: Operation =
    Operation { words: &["revert", "outside"], takes: None, deletes: None, again: nothing };
const REVERT_INSIDE: Operation =
    Operation { words: &["revert", "inside"], takes: None, deletes: None, again: nothing };
const REVERT_DISKS: Operation =
    Operation { words: &["revert", "disks"], takes: None, deletes: None, again: nothing };
const DELETE_ACTIVE: Operation =
    Operation { words: &["delete", "x"], takes: None, deletes: Some("x"), again: on_x };
const DELETE_FROZEN: Operation =
    Operation { words: &["delete", "x"], takes: None, deletes: Some("x"), again: under_y };

macro_rules! struck {
    ($($test:ident: $operation:ident, $victim:ident, $first:literal, $every:literal;)*) => {$(
        #[test]
        fn $test() -> Result<()> {
            let mut live = tree()?;
            strike(&mut live, &$operation, Victim::$victim, $first, $every)?;
            live.finish()
        }
    )*};
}

struck! {
    domsnap_dies_in_an_external_create: CREATE_EXTERNAL, Domsnap, 0, 1;
    domsnap_dies_in_a_create_that_compresses_memory: CREATE_COMPRESSED, Domsnap, 2, 4;
    domsnap_dies_in_a_mixed_create: CREATE_MIXED, Domsnap, 0, 2;
    domsnap_dies_in_a_revert_to_an_external_snapshot: REVERT_OUTSIDE, Domsnap, 0, 1;
    domsnap_dies_in_a_revert_to_an_internal_snapshot: REVERT_INSIDE, Domsnap, 0, 1;
    domsnap_dies_in_a_revert_without_memory: REVERT_DISKS, Domsnap, 1, 2;
    domsnap_dies_in_a_merge_of_the_active_image: DELETE_ACTIVE, Domsnap, 0, 1;
    domsnap_dies_in_a_delete_inside_a_frozen_image: DELETE_FROZEN, Domsnap, 0, 1;
    qemu_dies_in_a_create: CREATE_EXTERNAL, Qemu, 0, 2;
    qemu_dies_in_a_revert: REVERT_OUTSIDE, Qemu, 1, 2;
    qemu_dies_in_a_merge_of_the_active_image: DELETE_ACTIVE, Qemu, 0, 2;
    qemu_dies_in_a_delete_inside_a_frozen_image: DELETE_FROZEN, Qemu, 1, 2;
    both_die_in_a_create: CREATE_EXTERNAL, Both, 1, 2;
    both_die_in_a_revert: REVERT_INSIDE, Both, 0, 2;
    both_die_in_a_merge_of_the_active_image: DELETE_ACTIVE, Both, 1, 2;
}
