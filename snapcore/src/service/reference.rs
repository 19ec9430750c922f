//! How a user names a domain, and describes a new one.

use camino::{Utf8Path, Utf8PathBuf};
use serde::Deserialize;

use crate::{ActivePath, Control, Disk, DomainName, Error, ErrorKind, Hypervisor, Result, Target};

/// A domain as a user names it: a registered name, the images of disks at rest, or where a running one is reached.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub enum DomainRef {
    /// A domain that was registered.
    Name(DomainName),
    /// Images, in the order of their targets `vda`, `vdb`, ...
    Images {
        /// The configured paths, absolute.
        paths: Vec<Utf8PathBuf>,
        /// Their format; absent: the registry's default. Never guessed from content.
        format: Option<String>,
    },
    /// A running domain, whose disks it is asked for.
    Live {
        /// Who runs it.
        hypervisor: Hypervisor,
        /// Where it is reached: of QEMU the absolute path of its QMP socket.
        address: String,
    },
}

/// What a QEMU's address begins with.
const QEMU: &str = "qemu:";

impl DomainRef {
    /// Reads a command line's DOMAIN: `qemu:` and the path of a QMP socket is what runs there; text with a `/` or a `,` in it, or that names an existing file, is a list of
    /// image paths; anything else a name. Relative paths are taken from the current directory.
    ///
    /// # Errors
    /// [`ErrorKind::Usage`] where the text is neither.
    pub fn parse(text: &str) -> Result<Self> {
        if let Some(socket) = text.strip_prefix(QEMU) {
            let absolute = camino::absolute_utf8(socket).map_err(|cause| {
                Error::new(ErrorKind::Usage, format!("{text:?} names no socket"))
                    .because(cause)
                    .advise("give the path of a QMP socket after 'qemu:'")
            })?;
            return Ok(Self::Live { hypervisor: Hypervisor::Qemu, address: absolute.into() });
        }
        if text.contains(['/', ','])
            || Utf8Path::new(text).symlink_metadata().is_ok_and(|found| !found.is_dir())
        {
            return Self::images(text.split(','));
        }
        DomainName::new(text).map(Self::Name).map_err(|error| {
            error.advise(
                "DOMAIN is the name of a registered domain, image paths joined by commas, or qemu: and a QMP socket",
            )
        })
    }

    /// The domain whose disks are the images `paths`, in this order.
    ///
    /// # Errors
    /// [`ErrorKind::Usage`] for an empty path, no path, or one given twice.
    pub fn images<P: AsRef<Utf8Path>>(paths: impl IntoIterator<Item = P>) -> Result<Self> {
        let mut absolute: Vec<Utf8PathBuf> = Vec::new();
        for path in paths {
            let path = path.as_ref();
            if path.as_str().is_empty() {
                return Err(Error::new(ErrorKind::Usage, "an image path is empty")
                    .advise("join image paths by single commas"));
            }
            let path = camino::absolute_utf8(path).map_err(|cause| {
                Error::new(ErrorKind::Usage, format!("the image path {path} cannot be made absolute"))
                    .because(cause)
            })?;
            if absolute.contains(&path) {
                return Err(Error::new(ErrorKind::Usage, format!("the image {path} is given twice")));
            }
            absolute.push(path);
        }
        if absolute.is_empty() {
            return Err(Error::new(ErrorKind::Usage, "no image path is given"));
        }
        Ok(Self::Images { paths: absolute, format: None })
    }

    /// States the images' format. A registered domain has its own; there it changes nothing.
    #[must_use]
    pub fn format(self, stated: impl Into<String>) -> Self {
        match self {
            Self::Images { paths, .. } => Self::Images { paths, format: Some(stated.into()) },
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
            Self::Images { paths, .. } => {
                for (index, path) in paths.iter().enumerate() {
                    if index > 0 {
                        f.write_str(",")?;
                    }
                    f.write_str(path.as_str())?;
                }
                Ok(())
            }
        }
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

/// A domain to register.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct DomainSpec {
    /// Its name.
    pub name: DomainName,
    /// Who runs it.
    pub hypervisor: Hypervisor,
    /// How it is reached when it runs.
    pub control: Option<Control>,
    /// Where active images go.
    pub active_path: ActivePath,
    /// Its disks, in the order of its configuration. Relative paths are taken from the current directory.
    pub disks: Vec<Disk>,
}

impl DomainSpec {
    /// A domain at rest, without disks so far.
    pub fn new(name: DomainName) -> Self {
        Self {
            name,
            hypervisor: Hypervisor::None,
            control: None,
            active_path: ActivePath::Keep,
            disks: Vec::new(),
        }
    }

    /// Adds a disk.
    #[must_use]
    pub fn disk(mut self, target: Target, path: impl Into<Utf8PathBuf>, format: impl Into<String>) -> Self {
        self.disks.push(Disk { target, path: path.into(), format: format.into() });
        self
    }

    /// A domain that a hypervisor runs, and how it is reached.
    #[must_use]
    pub fn run_by(mut self, hypervisor: Hypervisor, control: Control) -> Self {
        self.hypervisor = hypervisor;
        self.control = Some(control);
        self
    }

    /// Says where active images go.
    #[must_use]
    pub fn active_path(mut self, active_path: ActivePath) -> Self {
        self.active_path = active_path;
        self
    }

    /// Reads a domain file: `name`, `hypervisor` (`"none"`, `"qemu"`), `active-path` (`"keep"`, `"new"`), for a
    /// hypervisor a `[control]` with `qmp`, `agent`, `memory-dir` and `start`, and a `[[disk]]` with `target`, `path` and
    /// `format` for each disk. Relative paths are taken from `directory`.
    ///
    /// # Errors
    /// [`ErrorKind::Usage`], with the line and what was expected there.
    pub fn from_toml(text: &str, directory: &Utf8Path) -> Result<Self> {
        #[derive(Deserialize)]
        #[serde(rename_all = "kebab-case", deny_unknown_fields)]
        struct File {
            name: DomainName,
            #[serde(default)]
            hypervisor: Hypervisor,
            control: Option<Reach>,
            #[serde(default)]
            active_path: ActivePath,
            #[serde(default)]
            disk: Vec<Disk>,
        }
        #[derive(Deserialize)]
        #[serde(rename_all = "kebab-case", deny_unknown_fields)]
        struct Reach {
            qmp: Utf8PathBuf,
            agent: Option<Utf8PathBuf>,
            memory_dir: Option<Utf8PathBuf>,
            #[serde(default)]
            start: Vec<String>,
        }
        let file: File = toml::from_str(text).map_err(|cause| {
            Error::new(ErrorKind::Usage, "the domain file is not understood").because(cause).advise(
                "it has name, hypervisor, active-path, for a hypervisor a [control] with qmp, agent, memory-dir and start, \
                 and one [[disk]] with target, path and format a disk",
            )
        })?;
        let mut spec = Self::new(file.name).active_path(file.active_path);
        spec.hypervisor = file.hypervisor;
        spec.control = match (file.hypervisor, file.control) {
            (Hypervisor::None, None) => None,
            (Hypervisor::None, Some(_)) => {
                return Err(Error::new(
                    ErrorKind::Usage,
                    "the domain file has a [control] and no hypervisor",
                )
                .advise("state it: hypervisor = \"qemu\""));
            }
            (hypervisor, None) => {
                return Err(Error::new(
                    ErrorKind::Usage,
                    format!("the domain file does not say how hypervisor {hypervisor} is reached"),
                )
                .advise("add a [control] with qmp = \"SOCKET\""));
            }
            (Hypervisor::Qemu, Some(reach)) => Some(Control {
                address: directory.join(reach.qmp).into(),
                agent: reach.agent.map(|agent| directory.join(agent)),
                memory_dir: reach.memory_dir.map(|memory| directory.join(memory)),
                start: reach.start,
            }),
        };
        for disk in file.disk {
            let path = directory.join(&disk.path);
            spec.disks.push(Disk { path, ..disk });
        }
        Ok(spec)
    }
}
