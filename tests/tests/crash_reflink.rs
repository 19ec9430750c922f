//! SIGKILL and power loss in every kind of command on raw disks that share blocks; then `recover`.

use domsnap_tests::crash;
use domsnap_tests::scenario::reflink as scenario;

macro_rules! scenarios {
    ($($test:ident $name:ident)*) => {
        mod a_kill_anywhere_heals_in {
            use super::*;
            $(#[test]
            fn $test() {
                crash::kill_everywhere(scenario::$name).unwrap_or_else(|error| panic!("{error:#}"));
            })*
        }

        mod power_loss_anywhere_heals_in {
            use super::*;
            $(#[test]
            fn $test() {
                crash::lose_power_everywhere(scenario::$name).unwrap_or_else(|error| panic!("{error:#}"));
            })*
        }

        #[test]
        fn every_scenario_has_its_tests() {
            let all: Vec<_> = scenario::ALL.iter().map(|scenario| scenario.name).collect();
            assert_eq!([$(stringify!($name)),*][..], all[..]);
        }
    };
}

scenarios! {
    create CREATE
    create_both_ways CREATE_BOTH_WAYS
    revert REVERT
    revert_saving_current REVERT_SAVING_CURRENT
    delete_middle DELETE_MIDDLE
}

/// Between the crash and the healing the domain runs and writes. What it wrote is in the present afterwards;
/// only of a revert that is undone it is put aside.
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
        create_both_ways CREATE_BOTH_WAYS
        revert REVERT
        revert_saving_current REVERT_SAVING_CURRENT
    }
}

/// The domain runs and writes after the crash, and once more after a crash of the recovery.
#[test]
fn what_a_domain_writes_is_kept_though_the_recovery_of_a_revert_is_killed_too() {
    crash::kill_twice_and_write(scenario::REVERT).unwrap_or_else(|error| panic!("{error:#}"));
}
