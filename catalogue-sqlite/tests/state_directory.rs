//! Errors about a state directory that cannot be used.

use camino::Utf8PathBuf;
use catalogue_sqlite::SqliteCatalogue;
use snapcore::catalogue::{Catalogue, Change, Revision};
use snapcore::{DomainName, ErrorKind};

#[tokio::test]
async fn a_state_directory_that_cannot_be_made_is_named() {
    let place = tempfile::tempdir().unwrap();
    let path = Utf8PathBuf::from_path_buf(place.path().join("state")).unwrap();
    std::fs::write(&path, "a file in the way").unwrap();
    let web = DomainName::new("web").unwrap();
    let catalogue = SqliteCatalogue::new(path.clone());
    let error = catalogue.commit(&web, Revision::ABSENT, vec![Change::RemoveDomain]).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Io);
    assert!(error.to_string().contains(path.as_str()), "{error}");
    assert!(error.advice().unwrap().contains("--state-dir"), "{error}");
}
