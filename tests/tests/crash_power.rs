//! Power loss during every kind of command, replayed from a record of the real binary with seeded losses;
//! then `recover`.

use domsnap_tests::{all_scenario_tests, crash};

all_scenario_tests! {
    /// A power loss anywhere is healed.
    mod power_loss_heals: crash::lose_power_everywhere
}
