//! `domsnap` with one hypervisor more.

use std::{process::ExitCode, sync::Arc};

use fakehypervisor::Fake;

fn main() -> ExitCode {
    snapcli::run(|registry| {
        let machines = std::env::var("FAKE_MACHINES").unwrap_or_default();
        registry.register_hypervisor(Arc::new(Fake::new(machines)));
        Ok(())
    })
}
