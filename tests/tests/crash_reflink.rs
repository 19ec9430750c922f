//! SIGKILL and power loss in every kind of command on raw disks that share blocks; then `recover`.

use domsnap_tests::scenario::reflink;
use domsnap_tests::{crash, scenario_tests};

scenario_tests! {
    /// A kill anywhere is healed.
    mod kill_heals: crash::kill_everywhere, reflink, all;
    clone CLONE
    create CREATE
    create_both_ways CREATE_BOTH_WAYS
    revert REVERT
    revert_saving_current REVERT_SAVING_CURRENT
    delete_middle DELETE_MIDDLE
}

scenario_tests! {
    /// A power loss anywhere is healed.
    mod power_loss_heals: crash::lose_power_everywhere, reflink, all;
    clone CLONE
    create CREATE
    create_both_ways CREATE_BOTH_WAYS
    revert REVERT
    revert_saving_current REVERT_SAVING_CURRENT
    delete_middle DELETE_MIDDLE
}

scenario_tests! {
    /// Between the kill and the recovery the domain runs and writes. What it wrote is in its current state
    /// afterwards; only of a revert that is undone it is saved elsewhere.
    mod writes_after_kill_kept: crash::kill_and_write_everywhere, reflink;
    create_both_ways CREATE_BOTH_WAYS
    revert REVERT
    revert_saving_current REVERT_SAVING_CURRENT
}

scenario_tests! {
    /// The domain runs and writes after the kill, and once more after a kill of the recovery.
    mod writes_after_two_kills_kept: crash::kill_twice_and_write, reflink;
    revert REVERT
}
