//! The contract of a catalogue, kept by the one in memory that tests of the engine use.

use std::process::ExitCode;
use std::sync::Arc;

mod fake;

use fake::FakeCatalogue;
use snapcore::catalogue::Catalogue;
use snapcore_testkit::catalogue::{TestCatalogue, run};

struct Memory(FakeCatalogue);

impl TestCatalogue for Memory {
    fn open(&self) -> Arc<dyn Catalogue> {
        Arc::new(self.0.again())
    }

    fn another(&self) -> Box<dyn TestCatalogue> {
        fresh()
    }
}

fn fresh() -> Box<dyn TestCatalogue> {
    Box::new(Memory(FakeCatalogue::default()))
}

fn main() -> ExitCode {
    run(fresh)
}
