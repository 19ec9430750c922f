//! The contract of a hypervisor, kept by QEMU with a real guest.

use std::{process::ExitCode, sync::Arc};

use anyhow::{Context, Result};
use camino::{Utf8Path, Utf8PathBuf};
use hypervisor_qemu::Qemu;
use snapcore::Target;
use snapcore::hypervisor::{Control, VmStateSaver};
use snapcore_testkit::hypervisor::{TestMachine, run};
use testguest::{Guest, GuestOptions};

struct Running {
    guest: Guest,
    disks: Vec<(Target, Utf8PathBuf, String)>,
}

impl TestMachine for Running {
    fn saver(&self) -> Arc<dyn VmStateSaver> {
        Arc::new(Qemu::new())
    }

    fn control(&self) -> Control {
        Control::at(self.guest.qmp_socket().display().to_string())
    }

    fn disks(&self) -> Vec<(Target, Utf8PathBuf, String)> {
        self.disks.clone()
    }

    fn nowhere(&self) -> String {
        self.memory_dir().join("nowhere.qmp").into_string()
    }

    fn memory_dir(&self) -> &Utf8Path {
        Utf8Path::from_path(self.guest.dir()).expect("a directory of the tests is of UTF-8")
    }
}

fn running() -> Result<Running> {
    let guest = GuestOptions::new().start()?;
    guest.wait_ticks(2)?;
    let mut disks = Vec::new();
    for (path, target) in guest.disks().into_iter().zip(["vda", "vdb"]) {
        let path = Utf8PathBuf::from_path_buf(path).ok().context("a disk's path is of UTF-8")?;
        disks.push((Target::new(target)?, path, "qcow2".to_owned()));
    }
    Ok(Running { guest, disks })
}

fn main() -> ExitCode {
    run(running)
}
