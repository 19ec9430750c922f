//! The contract of a catalogue, kept by SQLite.

use std::process::ExitCode;
use std::sync::Arc;

use camino::Utf8PathBuf;
use catalogue_sqlite::SqliteCatalogue;
use snapcore::catalogue::Catalogue;
use snapcore_testkit::catalogue::{TestCatalogue, run};

struct Directory(tempfile::TempDir);

impl TestCatalogue for Directory {
    fn open(&self) -> Arc<dyn Catalogue> {
        let state = Utf8PathBuf::from_path_buf(self.0.path().join("state"));
        Arc::new(SqliteCatalogue::new(state.unwrap_or_else(|path| panic!("{} is not UTF-8", path.display()))))
    }

    fn another(&self) -> Box<dyn TestCatalogue> {
        fresh()
    }
}

fn fresh() -> Box<dyn TestCatalogue> {
    Box::new(Directory(tempfile::tempdir().expect("a directory for temporary files")))
}

fn main() -> ExitCode {
    run(fresh)
}
