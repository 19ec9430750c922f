//! References to domains by a user, and descriptions of new domains.

use camino::Utf8Path;

use crate::address::DiskAddress;
use crate::domain::{ActivePath, Disk, Domain, Hypervisor};
use crate::error::{Error, ErrorKind, Result};
use crate::hypervisor::{Control, DomainInfo, FIRMWARE_VARIABLES, Obstacle, SeenDisk, TPM_STATE};
use crate::name::{DomainName, Target};
use crate::policy::PolicySpec;

/// A reference to a domain: a registered name, the images of disks at rest, or the address of a running one.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub enum DomainRef {
    /// A domain that was registered.
    Name(DomainName),
    /// Images, in the order of their targets `vda`, `vdb`, ...
    Images(Vec<GivenImage>),
    /// A running domain, whose hypervisor reports its disks.
    Live {
        /// The hypervisor that runs it.
        hypervisor: Hypervisor,
        /// Its address, as the user wrote it or as the hypervisor reads it.
        address: String,
    },
}

/// An image that a user names by its address.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct GivenImage {
    /// The configured address; a path is absolute.
    pub address: DiskAddress,
    /// Its format; absent: the registry's default. Never guessed from content.
    pub format: Option<String>,
}

impl std::str::FromStr for GivenImage {
    type Err = Error;

    /// Reads `PATH[,format=FORMAT]`, as in a list of images.
    fn from_str(text: &str) -> Result<Self> {
        let read = match Utf8Path::new(text).symlink_metadata() {
            Ok(_) => DomainRef::images([text])?,
            Err(_) => DomainRef::list_of_images(text)?,
        };
        match read {
            DomainRef::Images(mut images) if images.len() == 1 => Ok(images.remove(0)),
            _ => Err(Error::new(ErrorKind::Usage, format!("{text:?} is more than one image"))
                .advise("give one image; write a comma of its path twice")),
        }
    }
}

impl std::fmt::Display for GivenImage {
    /// Writes what [`DomainRef::parse`] reads; it is not quoted for a shell.
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.address.as_str().replace(',', ",,"))?;
        self.format.iter().try_for_each(|format| write!(f, ",{FORMAT}{format}"))
    }
}

/// The prefix that states the format of the preceding image in a list of images.
const FORMAT: &str = "format=";

impl DomainRef {
    /// Reads a command line's DOMAIN. `HYPERVISOR:ADDRESS` is the domain that runs there. Text with a `/` or
    /// a `,` in it, or that names an existing file, is a list of images. Anything else is a name. Relative
    /// paths are taken from the current directory.
    ///
    /// A list of images is `PATH[,format=FORMAT]`, joined by commas. A comma of a path is written twice.
    /// Text that is the path of an existing file is that file alone, with all its commas.
    ///
    /// Only the service knows which hypervisors exist, and what their addresses mean. Text that begins like
    /// an address and names no hypervisor of the service is read there as a name or as images.
    ///
    /// # Errors
    /// [`ErrorKind::Usage`] where the text is neither.
    pub fn parse(text: &str) -> Result<Self> {
        if let Some((hypervisor, address)) = text.split_once(':')
            && let Ok(hypervisor) = Hypervisor::new(hypervisor)
        {
            return Ok(Self::Live { hypervisor, address: address.to_owned() });
        }
        Self::at_rest(text)
    }

    /// Reads the domains of a group, joined by commas: each as [`DomainRef::parse`] reads it, an image with
    /// `,format=FORMAT` after it. A comma of a path is written twice. A domain of several images has to be
    /// registered first.
    ///
    /// ```
    /// use snapcore::service::DomainRef;
    ///
    /// let group = DomainRef::parse_group("web,qemu:/run/db.qmp,/vm/logs.qcow2")?;
    /// assert_eq!(group.len(), 3);
    /// # Ok::<(), snapcore::Error>(())
    /// ```
    ///
    /// # Errors
    /// [`ErrorKind::Usage`] where one of them is empty or cannot be read.
    pub fn parse_group(text: &str) -> Result<Vec<Self>> {
        let mut group: Vec<Self> = Vec::new();
        for part in split_commas(text) {
            match (part.strip_prefix(FORMAT), group.last_mut()) {
                (Some(format), Some(Self::Images(images))) if !format.is_empty() => {
                    images.iter_mut().for_each(|image| image.format = Some(format.to_owned()));
                }
                _ if part.is_empty() => {
                    return Err(Error::new(
                        ErrorKind::Usage,
                        format!("a domain of the group {text:?} has no name"),
                    )
                    .advise("join the domains by single commas"));
                }
                // The commas that are left are the path's own.
                _ if part.contains('/') && !part.contains(':') => group.push(Self::images([part])?),
                _ => group.push(Self::parse(&part)?),
            }
        }
        Ok(group)
    }

    /// Reads a name, or a list of images.
    pub(super) fn at_rest(text: &str) -> Result<Self> {
        if Utf8Path::new(text).symlink_metadata().is_ok_and(|found| !found.is_dir()) {
            return Self::images([text]);
        }
        if text.contains(['/', ',']) {
            return Self::list_of_images(text);
        }
        DomainName::new(text).map(Self::Name).map_err(|error| {
            error.advise(
                "DOMAIN is the name of a registered domain, image paths joined by commas, or where a running one is reached \
                 ('domsnap domain scan' shows it)",
            )
        })
    }

    /// Reads a list of images.
    fn list_of_images(text: &str) -> Result<Self> {
        let usage = |detail: String| {
            Error::new(ErrorKind::Usage, detail).advise(
                "join images by single commas: PATH[,format=FORMAT],...; write a comma of a path twice",
            )
        };
        let mut images: Vec<GivenImage> = Vec::new();
        for part in split_commas(text) {
            match (part.strip_prefix(FORMAT), images.last_mut()) {
                (Some(""), _) => return Err(usage("the format of an image is empty".to_owned())),
                (Some(format), Some(image)) if image.format.is_none() => {
                    image.format = Some(format.to_owned());
                }
                (Some(format), Some(image)) => {
                    return Err(usage(format!(
                        "two formats are given for the image {}: {} and {format}",
                        image.address,
                        image.format.as_deref().unwrap_or_default()
                    )));
                }
                (Some(format), None) => return Err(usage(format!("format={format} follows no image"))),
                (None, _) => add_image(&mut images, Utf8Path::new(&part))?,
            }
        }
        Ok(Self::Images(images))
    }

    /// The domain whose disks are the images `paths`, in this order.
    ///
    /// # Errors
    /// [`ErrorKind::Usage`] for an empty path, no path, or one given twice.
    pub fn images<P: AsRef<Utf8Path>>(paths: impl IntoIterator<Item = P>) -> Result<Self> {
        let mut images = Vec::new();
        for path in paths {
            add_image(&mut images, path.as_ref())?;
        }
        if images.is_empty() {
            return Err(Error::new(ErrorKind::Usage, "no image path is given"));
        }
        Ok(Self::Images(images))
    }

    /// The disks of a domain, as images without a stated format.
    pub fn disks_of(domain: &Domain) -> Self {
        let images = domain.disks.iter().map(|record| &record.disk.address);
        Self::Images(images.map(|address| GivenImage { address: address.clone(), format: None }).collect())
    }

    /// States the format of the images that have none stated. A registered domain has its own; there it
    /// changes nothing.
    #[must_use]
    pub fn format(self, stated: impl Into<String>) -> Self {
        match self {
            Self::Images(mut images) => {
                let stated = stated.into();
                for image in &mut images {
                    image.format.get_or_insert_with(|| stated.clone());
                }
                Self::Images(images)
            }
            other => other,
        }
    }
}

impl std::str::FromStr for DomainRef {
    type Err = Error;
    fn from_str(text: &str) -> Result<Self> {
        Self::parse(text)
    }
}

impl std::fmt::Display for DomainRef {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Name(name) => f.write_str(name.as_str()),
            Self::Live { hypervisor, address } => write!(f, "{hypervisor}:{address}"),
            Self::Images(images) => {
                let list: Vec<String> = images.iter().map(ToString::to_string).collect();
                f.write_str(&list.join(","))
            }
        }
    }
}

/// Adds an image of a list.
fn add_image(images: &mut Vec<GivenImage>, path: &Utf8Path) -> Result<()> {
    if path.as_str().is_empty() {
        return Err(Error::new(ErrorKind::Usage, "an image path is empty")
            .advise("join image paths by single commas; write a comma of a path twice"));
    }
    let path = camino::absolute_utf8(path).map_err(|cause| {
        Error::new(ErrorKind::Usage, format!("the image path {path} cannot be made absolute")).because(cause)
    })?;
    let address = DiskAddress::from(path);
    if images.iter().any(|image| image.address == address) {
        return Err(Error::new(ErrorKind::Usage, format!("the image {address} is given twice")));
    }
    images.push(GivenImage { address, format: None });
    Ok(())
}

/// Splits a list at its single commas: two together are one comma of a path.
fn split_commas(text: &str) -> Vec<String> {
    let mut parts = vec![String::new()];
    let mut characters = text.chars().peekable();
    while let Some(character) = characters.next() {
        if character == ',' && characters.next_if_eq(&',').is_none() {
            parts.push(String::new());
        } else if let Some(part) = parts.last_mut() {
            part.push(character);
        }
    }
    parts
}

/// Refuses an image that has another name here than in its hypervisor, or whose name leads to another file.
fn require_image(disk: &SeenDisk) -> Result<()> {
    if let Some(Obstacle { why, advice }) = &disk.replaced {
        let why = format!("disk {}: {why}", disk.target);
        return Err(Error::new(ErrorKind::Refused, why).state("no changes made").advise(advice.clone()));
    }
    let Some(path) = disk.address.local() else { return Ok(()) };
    match path.symlink_metadata() {
        Err(cause) if cause.kind() == std::io::ErrorKind::NotFound => {
            let (why, advice) = match &disk.if_missing {
                Some(known) => (known.why.clone(), known.advice.as_str()),
                None => (
                    format!(
                        "the running domain has {path} open as {}, and there is no such file",
                        disk.target
                    ),
                    "start it with absolute paths, and look whether it runs in a file system of its own",
                ),
            };
            Err(Error::new(ErrorKind::Refused, why).state("no changes made").advise(advice))
        }
        // Other problems of the file are reported when it is opened.
        Ok(_) | Err(_) => Ok(()),
    }
}

/// The target of the disk at `index` of images given by path: `vda` to `vdz`, `vdaa`, ...
pub(crate) fn target_at(mut index: usize) -> Result<Target> {
    let mut letters = Vec::new();
    loop {
        // The remainder of 26 always fits a byte.
        letters.push(b'a' + u8::try_from(index % 26).unwrap_or_default());
        match index / 26 {
            0 => break,
            more => index = more - 1,
        }
    }
    letters.reverse();
    Target::new(format!("vd{}", String::from_utf8_lossy(&letters)))
}

/// The drives of a running domain, sorted.
pub(super) struct Chosen {
    /// Those that take part in snapshots, each by its configured path.
    pub(super) disks: Vec<Disk>,
    /// The others, each with the reason.
    pub(super) left_out: Vec<String>,
}

/// Chooses the drives of a running domain that take part in its snapshots.
///
/// # Errors
/// [`ErrorKind::Refused`] where none does, or the image of one does not exist under the name that the
/// hypervisor has of it.
pub(super) fn choose_disks(seen: &DomainInfo) -> Result<Chosen> {
    let mut chosen = Chosen { disks: Vec::new(), left_out: Vec::new() };
    for disk in &seen.disks {
        let Some(why) = &disk.left_out else {
            require_image(disk)?;
            chosen.disks.push(Disk::new(disk.target.clone(), disk.address.clone(), disk.format.as_str()));
            continue;
        };
        chosen.left_out.push(format!("{} ({}) is left out: {why}", disk.target, disk.address));
    }
    // The manifests of a domain are beside its first disk.
    let is_of_machine = |disk: &Disk| [FIRMWARE_VARIABLES, TPM_STATE].contains(&disk.format.as_str());
    chosen.disks.sort_by_key(is_of_machine);
    if chosen.disks.iter().all(is_of_machine) {
        let why = match chosen.left_out.is_empty() {
            true => "it has no drives at all".to_owned(),
            false => chosen.left_out.join("; "),
        };
        let none = format!("the running domain has no disk of which a snapshot could be taken: {why}");
        return Err(Error::new(ErrorKind::Refused, none).state("no changes made"));
    }
    Ok(chosen)
}

/// A domain to register.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct DomainSpec {
    /// Its name.
    pub name: DomainName,
    /// The hypervisor that runs it.
    pub hypervisor: Hypervisor,
    /// The connection to it when it runs.
    pub control: Option<Control>,
    /// The placement of active images.
    pub active_path: ActivePath,
    /// Its disks, in the order of its configuration. Relative paths are taken from the current directory.
    pub disks: Vec<Disk>,
    /// Its policy.
    pub policy: Option<PolicySpec>,
}

impl DomainSpec {
    /// A domain at rest, without disks so far.
    pub fn new(name: DomainName) -> Self {
        Self {
            name,
            hypervisor: Hypervisor::NONE,
            control: None,
            active_path: ActivePath::Keep,
            disks: Vec::new(),
            policy: None,
        }
    }

    /// Adds a disk.
    #[must_use]
    pub fn disk(
        mut self,
        target: Target,
        address: impl Into<DiskAddress>,
        format: impl Into<String>,
    ) -> Self {
        self.disks.push(Disk::new(target, address, format));
        self
    }

    /// Sets the hypervisor that runs the domain, and its connection.
    #[must_use]
    pub fn run_by(mut self, hypervisor: Hypervisor, control: Control) -> Self {
        self.hypervisor = hypervisor;
        self.control = Some(control);
        self
    }

    /// Adds the disks that a running domain has, each by its configured path, and its guest agent where the
    /// caller named none. Returns the drives that are left out, each with the reason.
    ///
    /// # Errors
    /// [`ErrorKind::Refused`] where no disk is left, or the image of one does not exist under the name that
    /// the hypervisor has of it.
    pub fn disks_of(&mut self, seen: &DomainInfo) -> Result<Vec<String>> {
        let chosen =
            choose_disks(seen).map_err(|error| error.context(format!("registering domain {}", self.name)))?;
        self.disks.extend(chosen.disks);
        if let Some(control) = &mut self.control {
            control.agent = control.agent.take().or_else(|| seen.agent.clone());
            control.config = control.config.take().or_else(|| seen.config.clone());
        }
        Ok(chosen.left_out)
    }

    /// Sets the placement of active images.
    #[must_use]
    pub fn active_path(mut self, active_path: ActivePath) -> Self {
        self.active_path = active_path;
        self
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::hypervisor::Obstacle;
    use crate::hypervisor::SeenDisk;

    /// Text that begins like an address is read as one, until the hypervisors are known.
    #[test]
    fn address_is_read_by_its_beginning() {
        for (text, hypervisor, address) in
            [("fake:/run/a,b", "fake", "/run/a,b"), ("other:web", "other", "web"), ("fake:", "fake", "")]
        {
            let read: DomainRef = text.parse().unwrap();
            let hypervisor = Hypervisor::new(hypervisor).unwrap();
            assert_eq!(read, DomainRef::Live { hypervisor, address: address.to_owned() });
            assert_eq!(read.to_string(), text);
        }
        for text in ["Web:1", "_a:1", "/x/a:1"] {
            assert!(!matches!(DomainRef::parse(text), Ok(DomainRef::Live { .. })), "{text}");
        }
    }

    /// A list of images states formats and escapes commas.
    #[test]
    fn list_of_images_states_formats() {
        let read = |text: &str| match DomainRef::parse(text) {
            Ok(DomainRef::Images(images)) => images
                .into_iter()
                .map(|image| (image.address.to_string(), image.format.unwrap_or_default()))
                .collect::<Vec<_>>(),
            other => panic!("{text}: {other:?}"),
        };
        let own = |list: &[(&str, &str)]| -> Vec<(String, String)> {
            list.iter().map(|(path, format)| ((*path).to_owned(), (*format).to_owned())).collect()
        };
        for (text, images) in [
            ("/x/a", &[("/x/a", "")][..]),
            ("/x/a,format=raw", &[("/x/a", "raw")]),
            ("/x/a,format=raw,/x/b,/x/c,format=x", &[("/x/a", "raw"), ("/x/b", ""), ("/x/c", "x")]),
            ("/x/a,,b,/x/c", &[("/x/a,b", ""), ("/x/c", "")]),
            ("/x/a,,format=raw", &[("/x/a,format=raw", "")]),
        ] {
            assert_eq!(read(text), own(images), "{text}");
            let again = DomainRef::parse(text).unwrap().to_string();
            assert_eq!(read(&again), own(images), "{text} is shown as {again}");
        }
        for text in
            ["/x/a,", ",/x/a", "/x/a,format=", "format=raw,/x/a", "/x/a,format=raw,format=x", "/x/a,/x/a"]
        {
            assert_eq!(DomainRef::parse(text).unwrap_err().kind(), ErrorKind::Usage, "{text}");
        }
        let directory = tempfile::tempdir().unwrap();
        let file = Utf8Path::from_path(directory.path()).unwrap().join("a,b.img");
        std::fs::write(&file, "").unwrap();
        assert_eq!(read(file.as_str()), own(&[(file.as_str(), "")]), "one that is there is itself");
    }

    fn seen(disks: Vec<SeenDisk>) -> DomainInfo {
        let agent = Some("/run/agent".into());
        DomainInfo { disks, agent, ..DomainInfo::new(serde_json::Value::Null, true) }
    }

    fn drive(target: &str, path: &Utf8Path, left_out: Option<&str>) -> SeenDisk {
        SeenDisk::new(Target::new(target).unwrap(), path, "fake")
            .left_out(left_out.map(str::to_owned))
            .guest_writes(left_out.is_none())
    }

    /// A running domain's disks are taken, and its other drives are reported, each with the reason.
    #[test]
    fn drives_without_a_disk_are_left_out_with_reasons() {
        let directory = tempfile::tempdir().unwrap();
        let directory = Utf8Path::from_path(directory.path()).unwrap();
        let (path, other) = (directory.join("a.img"), directory.join("b.img"));
        std::fs::write(&path, "").unwrap();
        std::fs::write(&other, "").unwrap();
        let mut spec = DomainSpec::new(DomainName::new("web").unwrap())
            .run_by(Hypervisor::new("fake").unwrap(), Control::at("/nowhere/qmp"));
        let drives = vec![
            drive("vda", &path, None),
            drive("vdb", &other, None),
            drive("sr0", Utf8Path::new("/cd.iso"), Some("its medium can be taken out")),
        ];
        let left_out = spec.disks_of(&seen(drives)).unwrap();
        let taken: Vec<_> =
            spec.disks.iter().map(|disk| (disk.target.as_str(), disk.path().to_owned())).collect();
        assert_eq!(taken, [("vda", path), ("vdb", other)]);
        assert!(left_out[0].ends_with("its medium can be taken out"));
        assert_eq!(spec.control.unwrap().agent.unwrap(), "/run/agent");
    }

    /// A running domain without a usable disk is refused, with all reasons.
    #[test]
    fn domain_without_usable_disks_is_refused() {
        let mut spec = DomainSpec::new(DomainName::new("web").unwrap());
        let cd = drive("sr0", Utf8Path::new("/cd.iso"), Some("its medium can be taken out"));
        let error = spec.disks_of(&seen(vec![cd])).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Refused);
        assert!(error.to_string().contains("sr0 (/cd.iso) is left out: its medium"), "{error}");
        assert!(spec.disks_of(&seen(Vec::new())).unwrap_err().to_string().contains("no drives at all"));
    }

    /// An image that has another name here than in its hypervisor is refused.
    #[test]
    fn image_with_another_name_is_refused() {
        let mut spec = DomainSpec::new(DomainName::new("web").unwrap());
        let vda = drive("vda", Utf8Path::new("/nowhere/root.img"), None);
        let error = spec.disks_of(&seen(vec![vda])).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Refused);
        assert!(error.advice().unwrap().contains("absolute paths"), "{error}");
        let known = Obstacle::new("it is a temporary file", "start it without");
        let vda = drive("vda", Utf8Path::new("/nowhere/root.img"), None).if_missing(Some(known));
        let error = spec.disks_of(&seen(vec![vda])).unwrap_err();
        assert_eq!((error.message(), error.advice()), ("it is a temporary file", Some("start it without")));
        assert!(spec.disks.is_empty());
    }
}
