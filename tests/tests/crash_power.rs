//! Power loss during every kind of command, replayed from a record of the real binary with seeded losses;
//! then `recover`.

use domsnap_tests::{crash, scenario};

macro_rules! scenarios {
    ($($test:ident $name:ident)*) => {
        mod power_loss_anywhere_heals_in {
            use super::*;
            $(#[test]
            fn $test() {
                crash::lose_power_everywhere(scenario::$name).unwrap_or_else(|error| panic!("{error:#}"));
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
