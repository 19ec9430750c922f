//! A domain at rest in a directory of its own: images, state directory, and the model beside them.

use std::collections::BTreeMap;
use std::ffi::OsStr;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use anyhow::{Context, Result};

use crate::domsnap::{Domsnap, Outcome, status};
use crate::model::Model;
use crate::mounted::Mounted;
use crate::place;
use crate::qemu::{self, Write};
use crate::verify;

/// The name under which a fixture's domain is registered.
pub const NAME: &str = "guest";

/// The name of the file in which swtpm has the state of a TPM.
const TPM: &str = "tpm2-00.permall";

/// How a fixture's images are made.
#[derive(Debug, Clone)]
pub struct Shape {
    /// How many disks, called `vda`, `vdb`, ...
    pub disks: usize,
    /// Their virtual size in bytes.
    pub size: u64,
    /// Further options of `qemu-img create -o`.
    pub options: String,
    /// What the images' file names begin and end with; between is a letter.
    pub naming: (String, String),
    /// The second and third "disk" are files of a machine's state: firmware variables, and a TPM's.
    pub machine: bool,
}

impl Default for Shape {
    fn default() -> Shape {
        let naming = (String::new(), ".qcow2".into());
        Shape { disks: 2, size: 4 << 20, options: "cluster_size=4096".into(), naming, machine: false }
    }
}

impl Shape {
    /// The default with this many disks.
    pub fn disks(disks: usize) -> Shape {
        Shape { disks, ..Shape::default() }
    }

    /// Raw files, of so many disks.
    pub fn raw(disks: usize) -> Shape {
        Shape { disks, options: String::new(), ..Shape::default() }.named("", ".raw")
    }

    /// A disk, firmware variables, and a TPM's state.
    pub fn machine() -> Shape {
        Shape { disks: 3, machine: true, ..Shape::default() }
    }

    /// This with file names that begin with `prefix` and end with `suffix`.
    pub fn named(self, prefix: &str, suffix: &str) -> Shape {
        Shape { naming: (prefix.into(), suffix.into()), ..self }
    }

    /// This with other options of `qemu-img create -o`.
    pub fn options(self, options: &str) -> Shape {
        Shape { options: options.into(), ..self }
    }
}

/// A domain at rest. Its directory holds `disks/` and `state/`.
#[derive(Debug)]
pub struct Domain {
    dir: Place,
    naming: (String, String),
    machine: bool,
    /// What it must hold.
    pub model: Model,
    stamp: u8,
}

/// Where a domain lives: a directory that goes with it, one that the caller cares for, or the root of a
/// file system that goes with it.
#[derive(Debug)]
enum Place {
    Own(tempfile::TempDir),
    Lent(PathBuf),
    Mounted(Mounted),
}

/// The target of disk number `index`.
pub fn target(index: usize) -> String {
    format!("vd{}", char::from(b'a' + index as u8))
}

impl Domain {
    /// Makes the images, writes to each, and registers the domain.
    ///
    /// # Errors
    /// What failed, as a message.
    pub fn new(shape: &Shape) -> Result<Domain> {
        let mut domain = Domain::unregistered(shape)?;
        domain.register()?;
        domain.write_everywhere()?;
        Ok(domain)
    }

    /// Makes the images and nothing more.
    ///
    /// # Errors
    /// What failed, as a message.
    pub fn unregistered(shape: &Shape) -> Result<Domain> {
        let dir = place::directory("domsnap-test-")?;
        Domain::make(Place::Own(dir), shape)
    }

    /// Makes the images in `dir`, which the caller cares for, and registers the domain.
    ///
    /// # Errors
    /// What failed, as a message.
    pub fn new_in(dir: &Path, shape: &Shape) -> Result<Domain> {
        let mut domain = Domain::make(Place::Lent(dir.to_owned()), shape)?;
        domain.register()?;
        domain.write_everywhere()?;
        Ok(domain)
    }

    /// Makes the images on a file system of `kind` of their own, and registers the domain.
    ///
    /// # Errors
    /// What failed, as a message.
    pub fn new_on(kind: &str, shape: &Shape) -> Result<Domain> {
        let mut domain = Domain::make(Place::Mounted(Mounted::make(kind, 512 << 20)?), shape)?;
        domain.register()?;
        domain.write_everywhere()?;
        Ok(domain)
    }

    fn make(dir: Place, shape: &Shape) -> Result<Domain> {
        let (naming, machine) = (shape.naming.clone(), shape.machine);
        let mut domain = Domain { dir, naming, machine, model: Model::default(), stamp: 0 };
        std::fs::create_dir_all(domain.disks())?;
        std::fs::create_dir_all(domain.state())?;
        for index in 0..shape.disks {
            let target = target(index);
            let (path, size) = (domain.path(&target), shape.size.to_string());
            let mut args = ["create", "-q", "-f", qemu::format(&path)].map(OsStr::new).to_vec();
            if !shape.options.is_empty() && qemu::format(&path) != "raw" {
                args.extend(["-o".as_ref(), OsStr::new(&shape.options)]);
            }
            args.extend([path.as_os_str(), size.as_ref()]);
            qemu::img(&args)?;
            domain.model.present.insert(target, Arc::new(vec![0; shape.size as usize]));
        }
        Ok(domain)
    }

    /// `domsnap domain add`.
    ///
    /// # Errors
    /// If it fails.
    pub fn register(&self) -> Result<Outcome> {
        self.domsnap().done(&self.register_args())
    }

    /// The arguments that register the domain.
    pub fn register_args(&self) -> Vec<String> {
        let mut args = vec!["domain".to_owned(), "add".to_owned(), NAME.to_owned()];
        for target in self.model.present.keys() {
            args.push("--disk".to_owned());
            let path = self.path(target);
            let format = match path.extension().and_then(OsStr::to_str) {
                Some("fd") => "nvram",
                Some("permall") => "tpm",
                _ => qemu::format(&path),
            };
            args.push(format!("{target}={},format={format}", path.display()));
        }
        args
    }

    /// Whether the domain is known by its name.
    ///
    /// # Errors
    /// If `domsnap` says neither yes nor no.
    pub fn registered(&self) -> Result<bool> {
        let outcome = self.domsnap().run(&["domain", "show", NAME])?;
        match outcome.status {
            Some(status::DONE) => Ok(true),
            Some(status::REFUSED) => Ok(false),
            _ => anyhow::bail!("{outcome}"),
        }
    }

    /// The directory of all of it.
    pub fn root(&self) -> &Path {
        match &self.dir {
            Place::Own(dir) => dir.path(),
            Place::Lent(dir) => dir,
            Place::Mounted(mounted) => mounted.domain(),
        }
    }

    /// The directory of the images.
    pub fn disks(&self) -> PathBuf {
        self.root().join("disks")
    }

    /// The directory of the clones, where a test makes them outside of the domain's own.
    pub fn clones(&self) -> PathBuf {
        self.root().join("clones")
    }

    /// The image of a disk of the clone `name`, in that directory.
    pub fn image_of_clone(&self, name: &str, target: &str) -> PathBuf {
        let image = match (self.machine, target) {
            (true, "vdb") => format!("{name}-vdb.fd"),
            (true, "vdc") => TPM.to_owned(),
            _ => format!("{name}-{target}{}", self.naming.1),
        };
        self.clones().join(name).join(image)
    }

    /// The state directory.
    pub fn state(&self) -> PathBuf {
        self.root().join("state")
    }

    /// The configured path of a disk.
    pub fn path(&self, target: &str) -> PathBuf {
        self.disks().join(match (self.machine, target) {
            (true, "vdb") => "vars.fd".to_owned(),
            (true, "vdc") => TPM.to_owned(),
            _ => format!("{}{}{}", self.naming.0, &target[2..], self.naming.1),
        })
    }

    /// The domain as image paths, with nothing registered.
    pub fn paths(&self) -> String {
        let paths: Vec<_> = self.model.present.keys().map(|t| self.path(t).display().to_string()).collect();
        paths.join(",")
    }

    /// `domsnap` with this domain's state directory.
    pub fn domsnap(&self) -> Domsnap {
        Domsnap::new(&self.state())
    }

    /// A copy of all of it, hard links kept, in `dir`, which must not exist. What is registered names the
    /// original, so the copy is used by path, or put back with [`Domain::restore_from`].
    ///
    /// # Errors
    /// If it cannot be copied.
    pub fn save_to(&self, dir: &Path) -> Result<()> {
        copy_tree(self.root(), dir)
    }

    /// Puts back what [`Domain::save_to`] kept in `dir`.
    ///
    /// # Errors
    /// If it cannot be copied.
    pub fn restore_from(&self, dir: &Path) -> Result<()> {
        std::fs::remove_dir_all(self.root()).with_context(|| format!("clear {}", self.root().display()))?;
        copy_tree(dir, self.root())
    }

    /// The fixture whose directory is `dir`, with the model of this one.
    pub fn at(&self, dir: &Path) -> Domain {
        let (naming, model) = (self.naming.clone(), self.model.clone());
        let (dir, machine) = (Place::Lent(dir.to_owned()), self.machine);
        Domain { dir, naming, machine, model, stamp: self.stamp }
    }

    /// Writes to `target`, here and in the model.
    ///
    /// # Errors
    /// If `qemu-io` fails.
    pub fn write(&mut self, target: &str, writes: &[Write]) -> Result<()> {
        qemu::write(&self.path(target), writes)?;
        self.model.write(target, writes);
        Ok(())
    }

    /// Writes a new pattern to every disk: one place that every call overwrites, one of its own, and some
    /// zeros.
    ///
    /// # Errors
    /// If `qemu-io` fails.
    pub fn write_everywhere(&mut self) -> Result<()> {
        for target in self.model.present.keys().cloned().collect::<Vec<_>>() {
            self.stamp = self.stamp % 250 + 1;
            let own = u64::from(self.stamp) * 37_888 % (3 << 20);
            self.write(
                &target,
                &[
                    Write { offset: 65_536 - 512, length: 12_288, byte: Some(self.stamp) },
                    Write { offset: own, length: 20_480, byte: Some(self.stamp) },
                    Write { offset: own + 8192, length: 4096, byte: None },
                ],
            )?;
        }
        Ok(())
    }

    /// Writes the first `length` bytes of every disk.
    ///
    /// # Errors
    /// If `qemu-io` fails.
    pub fn fill(&mut self, length: u64) -> Result<()> {
        self.stamp = self.stamp % 250 + 1;
        for target in self.model.present.keys().cloned().collect::<Vec<_>>() {
            self.write(&target, &[Write { offset: 0, length, byte: Some(self.stamp) }])?;
        }
        Ok(())
    }

    /// `domsnap create`, here and in the model.
    ///
    /// # Errors
    /// If it fails.
    pub fn create(&mut self, name: &str, kind: &str) -> Result<()> {
        self.domsnap().done(&self.create_args(name, kind))?;
        self.model.create(name);
        Ok(())
    }

    /// The arguments that create `name`: `kind` is `internal`, `external`, `mixed`, which takes turns over
    /// the disks, one of the format's own methods, or `methods`, which takes turns over those of raw disks
    /// that leave the path alone.
    pub fn create_args(&self, name: &str, kind: &str) -> Vec<String> {
        let mut args: Vec<String> = ["create", NAME, name].map(Into::into).into();
        match kind {
            "mixed" => {
                for (index, target) in self.model.present.keys().enumerate() {
                    args.push("--disk".into());
                    args.push(format!("{target}={}", ["internal", "external"][index % 2]));
                }
            }
            "internal" | "external" => args.push(format!("--{kind}")),
            method => {
                for (index, target) in self.model.present.keys().enumerate() {
                    let method = if method == "methods" { ["reflink", "copy"][index % 2] } else { method };
                    args.extend(["--disk".into(), format!("{target}={method}")]);
                }
            }
        }
        args
    }

    /// A snapshot of a new pattern.
    ///
    /// # Errors
    /// If it fails.
    pub fn write_and_create(&mut self, name: &str, kind: &str) -> Result<()> {
        self.write_everywhere()?;
        self.create(name, kind)
    }

    /// `domsnap revert`, here and in the model.
    ///
    /// # Errors
    /// If it fails.
    pub fn revert(&mut self, name: &str) -> Result<()> {
        self.domsnap().done(&["revert", NAME, name])?;
        self.model.revert(name);
        Ok(())
    }

    /// `domsnap delete` of `names`, here and in the model.
    ///
    /// # Errors
    /// If it fails.
    pub fn delete(&mut self, names: &[&str]) -> Result<()> {
        let mut args = vec!["delete", NAME];
        args.extend(names);
        self.domsnap().done(&args)?;
        self.model.delete(&names.iter().map(|name| (*name).to_owned()).collect::<Vec<_>>());
        Ok(())
    }

    /// `domsnap` with `args` must end with `status`, say why on standard error, and have touched nothing.
    ///
    /// # Errors
    /// If it is otherwise.
    pub fn declined<S: AsRef<std::ffi::OsStr>>(&self, args: &[S], status: i32) -> Result<Outcome> {
        let before = contents(&self.disks())?;
        let outcome = self.domsnap().run(args)?.expect_status(status)?;
        anyhow::ensure!(!outcome.stderr.trim().is_empty(), "no args: {outcome}");
        anyhow::ensure!(!outcome.panicked(), "it panicked: {outcome}");
        same_contents(&self.disks(), &before).with_context(|| outcome.to_string())?;
        Ok(outcome)
    }

    /// Every point of the tree is what the model says, whatever else lies beside it.
    ///
    /// # Errors
    /// The first difference.
    pub fn verify_beside_others(&self) -> Result<()> {
        verify::every_point_beside_others(self, &self.model, NAME)
    }

    /// Every point of the tree is what the model says, and nothing else is there.
    ///
    /// # Errors
    /// The first difference.
    pub fn verify(&self) -> Result<()> {
        verify::every_point(self, &self.model, NAME, &mut verify::Memo::default())
    }
}

/// Copies a tree: hard links, holes, times and modes kept, blocks shared where the file system can.
///
/// # Errors
/// If `cp` fails.
pub fn copy_tree(from: &Path, to: &Path) -> Result<()> {
    qemu::run(
        "cp",
        &[
            "-a".as_ref(),
            "--reflink=auto".as_ref(),
            "--sparse=auto".as_ref(),
            from.as_os_str(),
            to.as_os_str(),
        ],
    )
    .with_context(|| format!("copy {} to {}", from.display(), to.display()))?;
    Ok(())
}

/// Every file of a directory tree with its inode and all its bytes, by path below its root.
pub type Contents = BTreeMap<PathBuf, (u64, Vec<u8>)>;

/// The files below `root` are still those that they were.
///
/// # Errors
/// What changed.
pub fn same_contents(root: &Path, before: &Contents) -> Result<()> {
    same(before, &contents(root)?)
}

fn same(before: &Contents, now: &Contents) -> Result<()> {
    for path in before.keys().chain(now.keys()) {
        match (before.get(path), now.get(path)) {
            (Some(_), None) => anyhow::bail!("{} is gone", path.display()),
            (None, _) => anyhow::bail!("{} is new", path.display()),
            (Some(old), Some(new)) if old.0 != new.0 => anyhow::bail!("{} is another file", path.display()),
            (Some((_, old)), Some((_, new))) if old != new => {
                let at = old.iter().zip(new).position(|(old, new)| old != new);
                anyhow::bail!(
                    "{} changed: {} bytes long, were {}; the first difference at {at:?}",
                    path.display(),
                    new.len(),
                    old.len()
                );
            }
            _ => {}
        }
    }
    Ok(())
}

/// As [`contents`], without manifests: a command that fails may have noted beside an image what it found in
/// it.
///
/// # Errors
/// If it cannot be read.
pub fn images(root: &Path) -> Result<Contents> {
    let mut images = contents(root)?;
    images.retain(|path, _| path.components().count() == 1);
    Ok(images)
}

/// The images right in `root` are still those that they were.
///
/// # Errors
/// What changed.
pub fn same_images(root: &Path, before: &Contents) -> Result<()> {
    same(before, &images(root)?)
}

/// Every file of a directory tree with its inode and all its bytes.
///
/// # Errors
/// If it cannot be read.
pub fn contents(root: &Path) -> Result<Contents> {
    let files = files(root)?;
    files
        .into_iter()
        .map(|(path, inode)| Ok((path.clone(), (inode, std::fs::read(root.join(path))?))))
        .collect()
}

/// Every file of a directory tree with its inode, by path below `root`; directories are followed, not listed.
///
/// # Errors
/// If it cannot be read.
pub fn files(root: &Path) -> Result<BTreeMap<PathBuf, u64>> {
    use std::os::unix::fs::MetadataExt;
    let mut found = BTreeMap::new();
    let mut open = vec![root.to_owned()];
    while let Some(dir) = open.pop() {
        for entry in std::fs::read_dir(&dir).with_context(|| format!("list {}", dir.display()))? {
            let entry = entry?;
            let meta = entry.metadata()?;
            if meta.is_dir() {
                open.push(entry.path());
            } else {
                found.insert(entry.path().strip_prefix(root)?.to_owned(), meta.ino());
            }
        }
    }
    Ok(found)
}
