//! SIGKILL of the real binary at every operation on files that it makes, in every kind of command; then
//! `recover`.

use domsnap_tests::{all_scenario_tests, crash, scenario, scenario_tests};

all_scenario_tests! {
    /// A kill anywhere is healed.
    mod kill_heals: crash::kill_everywhere
}

scenario_tests! {
    /// Between the kill and the recovery the domain runs and writes. What it wrote is in its current state
    /// afterwards; only of a revert that is undone it is saved elsewhere, because that state is given up.
    mod writes_after_kill_kept: crash::kill_and_write_everywhere, scenario;
    clone_external CLONE_EXTERNAL
    clone_mixed CLONE_MIXED
    create_internal CREATE_INTERNAL
    create_external CREATE_EXTERNAL
    create_mixed CREATE_MIXED
    revert_internal_in_place REVERT_INTERNAL_IN_PLACE
    revert_internal_materialised REVERT_INTERNAL_MATERIALISED
    revert_internal_of_a_frozen_leaf REVERT_INTERNAL_OF_A_FROZEN_LEAF
    revert_external REVERT_EXTERNAL
    revert_saving_current REVERT_SAVING_CURRENT
    delete_leaf_external DELETE_LEAF_EXTERNAL
    delete_leaf_internal DELETE_LEAF_INTERNAL
    delete_middle_big_below DELETE_MIDDLE_BIG_BELOW
    delete_middle_big_above DELETE_MIDDLE_BIG_ABOVE
    delete_current_big_below DELETE_CURRENT_BIG_BELOW
    delete_several_big_between DELETE_SEVERAL_BIG_BETWEEN
    delete_only_big_below DELETE_ONLY_BIG_BELOW
    delete_subtree DELETE_SUBTREE
    delete_several DELETE_SEVERAL
    raw_create RAW_CREATE
    raw_revert RAW_REVERT
    raw_revert_saving_current RAW_REVERT_SAVING_CURRENT
    raw_delete RAW_DELETE
}

scenario_tests! {
    /// The domain runs and writes after the kill, and once more after a kill of the recovery.
    mod writes_after_two_kills_kept: crash::kill_twice_and_write, scenario;
    create_external CREATE_EXTERNAL
    revert_internal_in_place REVERT_INTERNAL_IN_PLACE
    revert_internal_materialised REVERT_INTERNAL_MATERIALISED
    revert_internal_of_a_frozen_leaf REVERT_INTERNAL_OF_A_FROZEN_LEAF
    revert_external REVERT_EXTERNAL
    delete_current_big_below DELETE_CURRENT_BIG_BELOW
    delete_several_big_between DELETE_SEVERAL_BIG_BETWEEN
    raw_revert RAW_REVERT
}
