//! SIGKILL of the real binary at every operation on files that it makes, in every kind of command; then
//! `recover`.

use domsnap_tests::{crash, scenario};

macro_rules! scenarios {
    ($($test:ident $name:ident)*) => {
        mod a_kill_anywhere_heals_in {
            use super::*;
            $(#[test]
            fn $test() {
                crash::kill_everywhere(scenario::$name).unwrap_or_else(|error| panic!("{error:#}"));
            })*
        }

        #[test]
        fn every_scenario_has_its_test() {
            let all: Vec<_> = scenario::ALL.iter().map(|scenario| scenario.name).collect();
            assert_eq!([$(stringify!($name)),*][..], all[..]);
        }
    };
}

scenarios! {
    create_internal CREATE_INTERNAL
    create_external CREATE_EXTERNAL
    create_mixed CREATE_MIXED
    create_internal_on_external CREATE_INTERNAL_ON_EXTERNAL
    create_external_on_internal CREATE_EXTERNAL_ON_INTERNAL
    revert_internal_in_place REVERT_INTERNAL_IN_PLACE
    revert_internal_materialised REVERT_INTERNAL_MATERIALISED
    revert_internal_of_a_frozen_leaf REVERT_INTERNAL_OF_A_FROZEN_LEAF
    revert_external REVERT_EXTERNAL
    revert_saving_current REVERT_SAVING_CURRENT
    delete_leaf_external DELETE_LEAF_EXTERNAL
    delete_leaf_off_the_active_chain DELETE_LEAF_OFF_THE_ACTIVE_CHAIN
    delete_leaf_internal DELETE_LEAF_INTERNAL
    delete_middle_big_below DELETE_MIDDLE_BIG_BELOW
    delete_middle_big_above DELETE_MIDDLE_BIG_ABOVE
    delete_current_big_below DELETE_CURRENT_BIG_BELOW
    delete_several_big_between DELETE_SEVERAL_BIG_BETWEEN
    delete_only_big_below DELETE_ONLY_BIG_BELOW
    delete_with_several_children DELETE_WITH_SEVERAL_CHILDREN
    delete_subtree DELETE_SUBTREE
    delete_several DELETE_SEVERAL
    delete_internal_under_external DELETE_INTERNAL_UNDER_EXTERNAL
    delete_external_under_internal DELETE_EXTERNAL_UNDER_INTERNAL
    domain_add DOMAIN_ADD
    domain_remove DOMAIN_REMOVE
    import IMPORT
    disk_create_internal DISK_CREATE_INTERNAL
    disk_create_external DISK_CREATE_EXTERNAL
    disk_revert DISK_REVERT
    disk_delete DISK_DELETE
    raw_create RAW_CREATE
    raw_revert RAW_REVERT
    raw_revert_saving_current RAW_REVERT_SAVING_CURRENT
    raw_delete RAW_DELETE
}

/// Between the crash and the healing the domain runs and writes. What it wrote is in the present afterwards;
/// only of a revert that is undone it is put aside, because it belongs to the present that was not to be.
mod what_a_domain_writes_before_it_is_healed_is_kept_after_a_kill_in {
    use super::*;

    macro_rules! written_meanwhile {
        ($($test:ident $name:ident)*) => {$(
            #[test]
            fn $test() {
                crash::kill_and_write_everywhere(scenario::$name).unwrap_or_else(|error| panic!("{error:#}"));
            }
        )*};
    }

    written_meanwhile! {
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
}

/// The domain runs and writes after the crash, and once more after a crash of the recovery.
mod what_a_domain_writes_is_kept_though_the_recovery_is_killed_too_in {
    use super::*;

    macro_rules! killed_twice {
        ($($test:ident $name:ident)*) => {$(
            #[test]
            fn $test() {
                crash::kill_twice_and_write(scenario::$name).unwrap_or_else(|error| panic!("{error:#}"));
            }
        )*};
    }

    killed_twice! {
        create_external CREATE_EXTERNAL
        revert_internal_in_place REVERT_INTERNAL_IN_PLACE
        revert_internal_materialised REVERT_INTERNAL_MATERIALISED
        revert_internal_of_a_frozen_leaf REVERT_INTERNAL_OF_A_FROZEN_LEAF
        revert_external REVERT_EXTERNAL
        delete_current_big_below DELETE_CURRENT_BIG_BELOW
        delete_several_big_between DELETE_SEVERAL_BIG_BETWEEN
        raw_revert RAW_REVERT
    }
}
