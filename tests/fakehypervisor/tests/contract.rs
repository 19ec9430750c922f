//! The contract of a hypervisor, kept by the fake one.

use std::{process::ExitCode, sync::Arc};

use anyhow::{Context, Result};
use camino::{Utf8Path, Utf8PathBuf};
use fakehypervisor::{Fake, FakeDisk, FakeMachine};
use snapcore::Target;
use snapcore::hypervisor::{Control, VmStateSaver};
use snapcore_testkit::hypervisor::{TestMachine, run};

struct Place {
    directory: tempfile::TempDir,
    disk: Utf8PathBuf,
}

impl TestMachine for Place {
    fn saver(&self) -> Arc<dyn VmStateSaver> {
        Arc::new(Fake::new(self.memory_dir()))
    }
    fn control(&self) -> Control {
        Control::at("web")
    }
    fn disks(&self) -> Vec<(Target, Utf8PathBuf, String)> {
        let target = Target::new("vda").expect("a target");
        vec![(target, self.disk.clone(), "raw".to_owned())]
    }
    fn nowhere(&self) -> String {
        "nowhere".to_owned()
    }
    fn memory_dir(&self) -> &Utf8Path {
        Utf8Path::from_path(self.directory.path()).expect("of UTF-8")
    }
}

fn place() -> Result<Place> {
    let directory = tempfile::tempdir()?;
    let disk = Utf8Path::from_path(directory.path()).context("of UTF-8")?.join("root.raw");
    let place = Place { directory, disk };
    std::fs::write(&place.disk, [1; 4096])?;
    let (target, open, format) = (Target::new("vda")?, vec![place.disk.clone()], "raw".to_owned());
    let disks = vec![FakeDisk { target, open, format }];
    Fake::new(place.memory_dir())
        .put("web", &FakeMachine { running: true, memory: 7, disks, section: None })?;
    Ok(place)
}

fn main() -> ExitCode {
    run(place)
}
