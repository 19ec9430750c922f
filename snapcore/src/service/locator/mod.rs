//! The locator: finds the domain that a user means, and connects to it where it runs. Reads only.
//!
//! The importer makes a domain that the catalogue does not have, from its images.

mod connect;
mod owner;

use std::borrow::Cow;
use std::sync::Arc;

use super::authority::Leftovers;
use super::images::{followed, known_address, real_images, require_files};
use super::importer::{ImportSource, Imported, Importer, name_of_images};
use super::records::Records;
use super::reference::{Chosen, choose_disks, target_at};
use super::{BoxFuture, DomainRef, GivenImage};
use crate::address::DiskAddress;
use crate::backend::DiskSnapshotter;
use crate::catalogue::Entry;
use crate::domain::{Disk, Hypervisor};
use crate::error::{Error, ErrorKind, Result};
use crate::host::Host;
use crate::hypervisor::Control;
use crate::name::DomainName;
use crate::registry::Registry;
use crate::shell::shell_word;

pub use connect::Scanned;
pub(super) use connect::{Live, attached};

/// A domain that was found.
pub(super) struct Located {
    /// The domain, from the catalogue or as it would enter it.
    pub entry: Entry,
    /// Set where the catalogue has exactly this.
    pub catalogued: bool,
    /// Manifests that it was imported from and that the caller must deal with.
    pub leftovers: Leftovers,
    /// Messages for the user.
    pub notes: Vec<String>,
    /// The same as [`Imported::unconfirmed`].
    pub unconfirmed: Option<Error>,
}

impl Located {
    fn known(entry: Entry) -> Self {
        Self {
            entry,
            catalogued: true,
            leftovers: Leftovers::default(),
            notes: Vec::new(),
            unconfirmed: None,
        }
    }

    fn of(imported: Imported) -> Self {
        let Imported { entry, leftovers, notes, unconfirmed, .. } = imported;
        Self { entry, catalogued: false, leftovers, notes, unconfirmed }
    }
}

/// Finds domains, and connects to those that run.
#[derive(Clone)]
pub(super) struct Locator {
    records: Records,
    registry: Arc<Registry>,
    importer: Importer,
    /// The machine that this service is on.
    host: Option<Host>,
}

impl Locator {
    /// The locator of a catalogue's service.
    pub(super) fn new(
        records: Records,
        registry: Arc<Registry>,
        importer: Importer,
        host: Option<Host>,
    ) -> Self {
        Self { records, registry, importer, host }
    }

    /// Finds the domain that a reference names.
    pub(super) fn locate<'a>(&'a self, reference: &'a DomainRef) -> BoxFuture<'a, Result<Located>> {
        Box::pin(async move {
            match &*self.understood(reference)? {
                DomainRef::Name(name) => self.refresh(self.records.load(name).await?).await,
                DomainRef::Live { hypervisor, address } => self.locate_running(hypervisor, address).await,
                DomainRef::Images(given) => self.locate_images(given).await,
            }
        })
    }

    /// The domain that runs at an address.
    async fn locate_running(&self, hypervisor: &Hypervisor, address: &str) -> Result<Located> {
        if let Some(name) = self.known_at(hypervisor, address).await?
            && let Some(entry) = self.records.find(&name).await?
        {
            return Ok(Located::known(entry));
        }
        let (source, followed) = self.source_of_running(hypervisor, address).await?;
        let paths: Vec<_> = source.disks.iter().map(|disk| disk.address.clone()).collect();
        if let Some(owner) = self.owner_of(&paths).await? {
            return reached(self.records.load(&owner).await?, hypervisor, address);
        }
        let mut imported = self.importer.import(source).await?;
        imported.notes.splice(0..0, followed);
        imported.entry.domain.unregistered = true;
        Ok(Located::of(imported))
    }

    /// The domain whose disks are these images.
    async fn locate_images(&self, given: &[GivenImage]) -> Result<Located> {
        let (images, followed) = real_images(&self.registry, given).await?;
        let paths: Vec<_> = images.iter().map(|image| image.address.clone()).collect();
        if let Some(owner) = self.owner_of(&paths).await? {
            let entry = self.records.load(&owner).await?;
            same_formats(&images, &entry)?;
            return self.refresh(entry).await;
        }
        require_files(&paths)?;
        let mut imported = self.importer.import(self.source_of_images(&images)?).await?;
        imported.notes.splice(0..0, followed);
        Ok(Located::of(imported))
    }

    /// Returns a reference as the hypervisors of this program read it. Text that begins like an address of a
    /// hypervisor that this program does not have is a name or a list of images.
    pub(in crate::service) fn understood<'r>(&self, reference: &'r DomainRef) -> Result<Cow<'r, DomainRef>> {
        let DomainRef::Live { hypervisor, address } = reference else { return Ok(Cow::Borrowed(reference)) };
        if self.registry.hypervisor(hypervisor).is_err() {
            let text = reference.to_string();
            let address = DiskAddress::from(text.as_str());
            if self.registry.of_scheme(&address).is_some() {
                return Ok(Cow::Owned(DomainRef::Images(vec![GivenImage { address, format: None }])));
            }
            return DomainRef::at_rest(&text).map(Cow::Owned);
        }
        let control = Control::at(address.clone());
        let address = self.read_control(hypervisor, &control)?.address;
        Ok(Cow::Owned(DomainRef::Live { hypervisor: hypervisor.clone(), address }))
    }

    /// Describes the domain that runs at an address, as it would be imported. Returns also a sentence for
    /// each image that it has open by a link.
    pub(in crate::service) async fn source_of_running(
        &self,
        hypervisor: &Hypervisor,
        address: &str,
    ) -> Result<(ImportSource, Vec<String>)> {
        let mut control = Control::at(address);
        let seen = self.look(hypervisor, &control).await?;
        control.agent = seen.agent.clone();
        control.config = seen.config.clone();
        let Chosen { mut disks, left_out: _ } = choose_disks(&seen)
            .map_err(|error| error.context(format!("looking at what runs at {address}")))?;
        let mut links = Vec::new();
        for disk in &mut disks {
            let real = known_address(&self.registry, &disk.address).await?;
            links.extend(followed(&disk.address, &real));
            disk.address = real;
        }
        let name = match seen.name.clone().and_then(|name| DomainName::new(name).ok()) {
            Some(name) if self.records.find(&name).await?.is_none() => name,
            _ => name_of_images(&disks)?,
        };
        let source = ImportSource {
            name: Some(name),
            hypervisor: hypervisor.clone(),
            control: Some(control),
            by_path: false,
            ..ImportSource::of_images(disks)
        };
        Ok((source, links))
    }

    pub(in crate::service) fn source_of_images(&self, images: &[GivenImage]) -> Result<ImportSource> {
        let default = self.registry.default_format()?;
        let disks = images
            .iter()
            .enumerate()
            .map(|(index, GivenImage { address, format })| {
                let format = format.as_deref();
                if let Some(format) = format {
                    self.registry.get(format)?;
                }
                let of_scheme = || self.registry.of_scheme(address).map(DiskSnapshotter::format);
                let format = format.or_else(of_scheme).or_else(|| self.registry.recognise(address, None));
                let format = format.unwrap_or(default);
                Ok(Disk::new(target_at(index)?, address.clone(), format))
            })
            .collect::<Result<Vec<_>>>()?;
        Ok(ImportSource::of_images(disks))
    }

    /// Brings a domain of the catalogue up to date with its images: another image may be at the path. It
    /// applies to domains that were never registered and have neither snapshots nor older layers.
    async fn refresh(&self, entry: Entry) -> Result<Located> {
        let bare = entry.domain.unregistered
            && entry.tree.is_empty()
            && entry.domain.disks.iter().all(|record| record.owned.len() <= 1);
        if !bare || !self.records.unfinished(&entry.domain.name).await?.is_empty() {
            return Ok(Located::known(entry));
        }
        let mut same = true;
        for record in &entry.domain.disks {
            let adopted =
                self.registry.serving(&record.disk)?.adopt(&record.disk, entry.domain.active_path).await?;
            same &= adopted.active == record.active;
        }
        if same {
            return Ok(Located::known(entry));
        }
        let revision = entry.revision;
        let source = ImportSource { by_path: true, known: None, ..ImportSource::of_entry(entry) };
        let mut imported = self.importer.import(source).await?;
        imported.entry.revision = revision;
        imported.entry.domain.unregistered = true;
        Ok(Located::of(imported))
    }
}

/// A domain of the catalogue that runs at an address.
fn reached(entry: Entry, hypervisor: &Hypervisor, address: &str) -> Result<Located> {
    let domain = &entry.domain;
    let known = domain.control.as_ref().map(|control| control.address.as_str());
    if domain.hypervisor == *hypervisor && known == Some(address) {
        return Ok(Located::known(entry));
    }
    let (name, known) = (&domain.name, known.unwrap_or("nowhere"));
    Err(Error::new(
        ErrorKind::Refused,
        format!(
            "what runs at {address} has the disks of domain {name}, which the catalogue knows to run at {known}"
        ),
    )
    .state("no changes made")
    .advise(format!(
        "name it {name}; or, where it is reached at {address} from now on: `domsnap domain remove {name}`, then \
         `domsnap domain add {name} --at {}`",
        shell_word(&format!("{hypervisor}:{address}"))
    )))
}

/// Refuses a stated format that is another than the catalogue's.
fn same_formats(images: &[GivenImage], entry: &Entry) -> Result<()> {
    for image in images {
        let disk =
            entry.domain.disks.iter().map(|record| &record.disk).find(|disk| disk.address == image.address);
        if let (Some(disk), Some(format)) = (disk, &image.format)
            && disk.format != *format
        {
            return Err(Error::new(
                ErrorKind::Refused,
                format!(
                    "{} is known as an image of format {}, and format={format} was given",
                    image.address, disk.format
                ),
            )
            .state("no changes made")
            .advise(format!(
                "leave the format out, or take the domain out with `domsnap domain remove {}`",
                entry.domain.name
            )));
        }
    }
    Ok(())
}
