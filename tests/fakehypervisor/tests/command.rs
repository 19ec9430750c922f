//! The command, with a hypervisor that it does not know: found, registered, snapshotted and reverted as any
//! other.

use std::process::Command;

use anyhow::{Context, Result, ensure};
use camino::{Utf8Path, Utf8PathBuf};
use catalogue_sqlite::SqliteCatalogue;
use fakehypervisor::{Fake, FakeDisk, FakeMachine};
use snapcore::catalogue::{Catalogue, Change, Entry};
use snapcore::{DomainName, Host, Target};

struct Place {
    _directory: tempfile::TempDir,
    root: Utf8PathBuf,
    fake: Fake,
}

impl Place {
    fn new() -> Result<Self> {
        let directory = tempfile::tempdir()?;
        let root = Utf8Path::from_path(directory.path()).context("of UTF-8")?.canonicalize_utf8()?;
        let fake = Fake::new(&root);
        let place = Self { _directory: directory, root, fake };
        std::fs::write(place.disk(), [1; 4096])?;
        let (target, open, format) = (Target::new("vda")?, vec![place.disk()], "raw".to_owned());
        let disks = vec![FakeDisk { target, open, format }];
        place.fake.put("web", &FakeMachine { running: true, memory: 7, disks, section: None })?;
        Ok(place)
    }

    /// Makes the catalogue's record of the domain one of another machine.
    async fn move_to_another_host(&self) -> Result<()> {
        let catalogue = SqliteCatalogue::new(self.root.join("state"));
        let name = DomainName::new("web")?;
        let Entry { mut domain, tree, revision, .. } = catalogue.load(&name).await?.context("it is known")?;
        domain.host = Some(Host::new("fedcba9876543210fedcba9876543210", "elsewhere"));
        let put = Change::PutDomain(Box::new(domain), tree.iter().cloned().collect());
        catalogue.commit(&name, revision, vec![put]).await?;
        Ok(())
    }

    fn disk(&self) -> Utf8PathBuf {
        self.root.join("root.raw")
    }

    /// Exit status, and what was said.
    fn domsnap(&self, args: &[&str]) -> Result<(i32, String)> {
        let output = Command::new(env!("CARGO_BIN_EXE_domsnap-fake"))
            .args(args)
            .env("FAKE_MACHINES", &self.root)
            .env("DOMSNAP_STATE_DIR", self.root.join("state"))
            .env("DOMSNAP_UNDO", "no")
            .output()?;
        let mut said = String::from_utf8(output.stdout)?;
        said.push_str(&String::from_utf8(output.stderr)?);
        Ok((output.status.code().context("it ends by itself")?, said))
    }

    fn done(&self, args: &[&str]) -> Result<String> {
        let (status, said) = self.domsnap(args)?;
        ensure!(status == 0, "{args:?} ends with {status}: {said}");
        Ok(said)
    }
}

/// A hypervisor that was added is listed scanned and called by its address.
#[test]
fn added_hypervisor_is_listed_and_addressed() -> Result<()> {
    let place = Place::new()?;
    let listed = place.done(&["backends"])?;
    ensure!(listed.contains("Fake") && listed.contains("fake:NAME"), "{listed}");
    let scanned = place.done(&["domain", "scan"])?;
    ensure!(scanned.contains("domsnap domain add web --at fake:web"), "{scanned}");
    let seen = place.done(&["domain", "show", "fake:web"])?;
    ensure!(seen.contains("fake at web"), "{seen}");
    let (status, said) = place.domsnap(&["domain", "add", "fake:web", "--at", "fake:web"])?;
    ensure!(status == 2 && said.contains("where a domain is reached"), "{status}: {said}");
    let (status, said) = place.domsnap(&["domain", "add", "web", "--at", "fake:web", "--agent", "/x"])?;
    ensure!(status == 2 && said.contains("agent does not apply to a domain of Fake"), "{status}: {said}");
    place.done(&["domain", "add", "web", "--at", "fake:web"])?;
    let toml = place.root.join("other.toml");
    std::fs::write(&toml, "name = 'other'\nhypervisor = 'fake'\n[control]\nfake = 'other'\n")?;
    let (status, said) = place.domsnap(&["domain", "add", "--file", toml.as_str()])?;
    ensure!(status == 3 && said.contains("no machine other runs"), "{status}: {said}");
    Ok(())
}

/// A running domain of it is snapshotted reverted and its snapshot deleted.
#[test]
fn added_hypervisor_takes_snapshots() -> Result<()> {
    let place = Place::new()?;
    place.done(&["domain", "add", "web", "--at", "fake:web"])?;
    for option in ["--live", "--budget=5", "--compress"] {
        let (status, said) = place.domsnap(&["create", "web", "no", option])?;
        ensure!(status == 3 && said.contains("does not apply to a domain of Fake"), "{status}: {said}");
    }
    place.done(&["create", "web", "good", "--disk", "vda=copy"])?;
    let machine = place.fake.machine("web")?;
    ensure!(machine.running && machine.memory == 7, "{machine:?}");
    place.fake.put("web", &FakeMachine { memory: 8, ..machine })?;
    std::fs::write(place.disk(), [2; 4096])?;
    place.done(&["revert", "web", "good"])?;
    let machine = place.fake.machine("web")?;
    ensure!(machine.running && machine.memory == 7 && machine.section.is_none(), "{machine:?}");
    ensure!(std::fs::read(place.disk())? == [1; 4096], "the disk is the snapshot's");
    place.done(&["delete", "web", "good"])?;
    place.done(&["check", "web"])?;
    Ok(())
}

/// A domain that runs on another host is only read, until it is taken over. A machine without another ID
/// takes domains of all hosts for its own.
#[tokio::test]
async fn domain_of_another_host_is_taken_over() -> Result<()> {
    let place = Place::new()?;
    place.done(&["domain", "add", "web", "--at", "fake:web"])?;
    place.done(&["create", "web", "here", "--disk", "vda=copy"])?;
    place.move_to_another_host().await?;
    for arguments in [&["create", "web", "no"][..], &["revert", "web", "here"], &["recover", "web"]] {
        let (status, message) = place.domsnap(arguments)?;
        let is_refused = status == 3 && message.contains("runs on host elsewhere (");
        ensure!(is_refused, "{arguments:?}: {status}: {message}");
        ensure!(message.contains("`domsnap recover --take-over web`"), "{message}");
    }
    let listed = place.done(&["list", "web"])?;
    ensure!(listed.contains("here"), "{listed}");
    place.done(&["recover", "--take-over", "web"])?;
    place.done(&["create", "web", "again", "--disk", "vda=copy"])?;
    place.done(&["revert", "web", "here"])?;
    Ok(())
}
