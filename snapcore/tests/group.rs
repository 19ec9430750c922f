//! Groups with a fake backend and a catalogue in memory: at every transaction of a group's operation the
//! process is killed, or the transaction fails, with and without effect. In the end it has happened in all
//! domains or in none, whichever of them is recovered first.

mod fake;

use std::collections::BTreeSet;
use std::sync::Arc;

use camino::{Utf8Path, Utf8PathBuf};
use fake::{FakeBackend, FakeCatalogue, FakeDisk, Fault, How, When};
use snapcore::service::*;
use snapcore::*;
use tokio_util::sync::CancellationToken;

const DOMAINS: [&str; 3] = ["a", "b", "c"];

/// Three domains with a disk each.
struct Place {
    directory: tempfile::TempDir,
    backend: FakeBackend,
    catalogue: Arc<FakeCatalogue>,
}

/// An operation of the group.
#[derive(Debug, Clone, Copy)]
enum Doing {
    Create,
    Revert,
    Delete,
}

fn name(text: &str) -> SnapshotName {
    SnapshotName::new(text).unwrap()
}

fn all() -> Vec<DomainRef> {
    // In another order than that of their names.
    ["c", "a", "b"].map(|name| DomainRef::parse(name).unwrap()).into()
}

fn go() -> CancellationToken {
    CancellationToken::new()
}

impl Place {
    async fn new(doing: Doing) -> Self {
        let place = Self {
            directory: tempfile::tempdir().unwrap(),
            backend: FakeBackend::default(),
            catalogue: Arc::default(),
        };
        for domain in DOMAINS {
            std::fs::write(place.image(domain), "").unwrap();
            place.backend.disks().insert(place.image(domain), FakeDisk { data: 1, ..FakeDisk::default() });
            let spec = DomainSpec::new(DomainName::new(domain).unwrap());
            let spec = spec.disk(Target::new("vda").unwrap(), place.image(domain), "fake");
            place.service().domain_add(&spec).await.unwrap();
        }
        if !matches!(doing, Doing::Create) {
            place.run(Doing::Create).await.unwrap();
        }
        for domain in DOMAINS {
            place.backend.write(&place.image(domain), 2);
        }
        place.catalogue.commits.set(Vec::new());
        place
    }

    fn image(&self, domain: &str) -> Utf8PathBuf {
        let root = Utf8Path::from_path(self.directory.path()).unwrap().canonicalize_utf8().unwrap();
        root.join(format!("{domain}.fake"))
    }

    fn service(&self) -> Domsnap {
        let mut registry = Registry::new();
        registry.register(Arc::new(self.backend.clone())).unwrap();
        Domsnap::new(self.catalogue.clone(), registry)
    }

    async fn run(&self, doing: Doing) -> Result<GroupOutcome> {
        let service = self.service();
        match doing {
            Doing::Create => service.create_group(&all(), CreateRequest::new(name("s1")), go()).await,
            Doing::Revert => service.revert_group(&all(), RevertRequest::new(name("s1")), go()).await,
            Doing::Delete => service.delete_group(&all(), DeleteRequest::new(vec![name("s1")]), go()).await,
        }
    }

    /// The next process.
    fn restart(&mut self) {
        self.backend = self.backend.after_a_crash();
        self.catalogue = Arc::new(self.catalogue.again());
    }

    /// Recovers the domains, beginning with the one of this number.
    async fn recover(&self, first: usize) {
        for place in 0..DOMAINS.len() {
            let domain = DomainRef::parse(DOMAINS[(first + place) % DOMAINS.len()]).unwrap();
            self.service().recover(Some(&domain), go()).await.unwrap();
        }
    }

    /// Returns true if the operation has happened in all domains, false if in none.
    async fn happened(&self, doing: Doing) -> bool {
        let mut found = BTreeSet::new();
        for domain in DOMAINS {
            let listing = self.service().list(&DomainRef::parse(domain).unwrap()).await.unwrap();
            assert_eq!(listing.unfinished, Vec::new(), "{domain}");
            let disk = self.backend.world()[&self.image(domain)].clone();
            let has = listing.snapshots.iter().any(|snapshot| snapshot.name == name("s1"));
            assert_eq!(disk.tags.len(), usize::from(has), "{domain}: {:?}", disk.tags);
            found.insert(match doing {
                Doing::Create => has,
                Doing::Revert => disk.data == 1,
                Doing::Delete => !has,
            });
        }
        assert_eq!(found.len(), 1, "it has happened in some domains and not in others");
        found.contains(&true)
    }
}

/// The number of transactions of an operation that is not disturbed.
async fn transactions(doing: Doing) -> usize {
    let place = Place::new(doing).await;
    let outcome = place.run(doing).await.unwrap();
    let domains: Vec<&str> = outcome.outcomes.iter().map(|outcome| outcome.domain.as_str()).collect();
    assert_eq!(domains, DOMAINS);
    assert!(place.happened(doing).await);
    place.catalogue.commits.count()
}

fn runtime() -> tokio::runtime::Runtime {
    tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap()
}

/// The process is killed before every transaction, and after the last one.
#[test]
fn killed_group_is_of_all_or_none() {
    for doing in [Doing::Create, Doing::Revert, Doing::Delete] {
        let count = runtime().block_on(transactions(doing));
        let (mut done, mut undone) = (0, 0);
        for number in 1..=count {
            for when in [When::Before, When::After] {
                // After one is before the next.
                if when == When::After && number < count {
                    continue;
                }
                let first = runtime();
                let mut place = first.block_on(Place::new(doing));
                place.catalogue.commits.set(vec![Fault { number, when, how: How::Stop }]);
                first.block_on(async {
                    tokio::select! {
                        outcome = place.run(doing) => panic!("{doing:?}, {number} {when:?}: {outcome:?}"),
                        () = place.catalogue.commits.stopped.notified() => {}
                    }
                });
                // The runtime is dropped in the middle of the operation, as a kill of the process would do.
                drop(first);
                place.restart();
                runtime().block_on(async {
                    place.recover(number).await;
                    match place.happened(doing).await {
                        true => done += 1,
                        false => {
                            undone += 1;
                            place.run(doing).await.unwrap();
                            assert!(place.happened(doing).await, "{doing:?}, {number} {when:?}: done again");
                        }
                    }
                });
            }
        }
        assert!(done > 0 && undone > 0, "{doing:?}: {done} have happened, {undone} have not");
    }
}

/// Every transaction fails once, with an effect that is not reported, and without one.
#[tokio::test]
async fn failed_transaction_is_of_all_or_none() {
    for doing in [Doing::Create, Doing::Revert, Doing::Delete] {
        for number in 1..=transactions(doing).await {
            for when in [When::Before, When::After] {
                let place = Place::new(doing).await;
                let how = How::Fail(ErrorKind::Io);
                place.catalogue.commits.set(vec![Fault { number, when, how }]);
                let outcome = place.run(doing).await;
                let needs = matches!(&outcome, Err(error) if error.kind() == ErrorKind::NeedsRecovery);
                place.catalogue.commits.set(Vec::new());
                if needs {
                    place.recover(number).await;
                }
                let happened = place.happened(doing).await;
                if !needs {
                    assert_eq!(happened, outcome.is_ok(), "{doing:?}, {number} {when:?}: {outcome:?}");
                }
            }
        }
    }
}

/// A step that fails in one domain is undone in all, and the error says which domain it was.
#[tokio::test]
async fn failed_step_undoes_the_group() {
    for number in 1..=3 {
        let place = Place::new(Doing::Create).await;
        let how = How::Fail(ErrorKind::NoSpace);
        place.backend.applies.set(vec![Fault { number, when: When::Before, how }]);
        let error = place.run(Doing::Create).await.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::NoSpace, "{error}");
        assert_eq!(error.state_now(), Some("rolled back in all 3 domains of the group"), "{error}");
        assert!(error.to_string().contains("of domain "), "{error}");
        assert!(!place.happened(Doing::Create).await);
        place.run(Doing::Create).await.unwrap();
        assert!(place.happened(Doing::Create).await);
    }
}

/// Cancelled before the commit point, it is undone in all domains.
#[tokio::test]
async fn cancelled_group_is_undone() {
    let place = Place::new(Doing::Create).await;
    let cancel = go();
    let how = How::Cancel(cancel.clone());
    place.backend.applies.set(vec![Fault { number: 2, when: When::After, how }]);
    let request = CreateRequest::new(name("s1"));
    let error = place.service().create_group(&all(), request, cancel).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Cancelled, "{error}");
    assert!(!place.happened(Doing::Create).await);
}

/// Two commands on overlapping groups do not wait for each other: one is refused, or they follow each other.
#[tokio::test]
async fn overlapping_groups_do_not_wait() {
    let place = Place::new(Doing::Create).await;
    let (one, two) = (place.service(), place.service());
    let group = all();
    let reversed: Vec<DomainRef> = group.iter().rev().cloned().collect();
    let (first, second) = tokio::join!(
        one.create_group(&group, CreateRequest::new(name("one")), go()),
        two.create_group(&reversed, CreateRequest::new(name("two")), go()),
    );
    assert!(first.is_ok() || second.is_ok(), "{first:?} {second:?}");
    for refused in [first, second].into_iter().filter_map(Result::err) {
        assert_eq!(refused.kind(), ErrorKind::Busy, "{refused}");
    }
}
