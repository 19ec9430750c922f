//! The search for an image's parent, and the opening of whole chains.
//!
//! The parent is the file whose unique id the child states. Locators and the name only say where to look, in
//! this order: the relative path, the URL, the absolute path without its drive; for each also its last part,
//! in the child's directory and the allowed ones; the name in the header; any `.vhd` or `.avhd` (Hyper-V's
//! name of a checkpoint) in these directories. A path that leads out of them is not followed. A null id means
//! a raw file, which has no identity: only a locator or the name leads to it.

use std::collections::HashSet;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use super::chain::{Chain, Layer, RawLayer};
use super::error::{Context, Error, ErrorKind, Result};
use super::file::ImageFile;
use super::footer;
use super::open::{OpenOptions, Vhd};
use super::units::UniqueId;

/// The default limit of a chain's depth.
pub const DEFAULT_DEPTH: usize = 64;
/// Places that an error names.
const NAMED: usize = 8;
/// Files of one directory that are looked at in a search by id.
const MOST_FILES: usize = 4096;

/// Limits of the search for parents.
#[derive(Clone, Debug)]
pub struct ChainOptions {
    /// Directories besides the child's own in which parents may be.
    pub allowed: Vec<PathBuf>,
    /// The deepest chain that is opened.
    pub max_depth: usize,
    /// Options for opening the top.
    pub top: OpenOptions,
    /// Options for opening the other layers.
    pub below: OpenOptions,
}

impl ChainOptions {
    /// Reads a chain within the directories of its images; writers are refused meanwhile.
    pub fn read_only() -> Self {
        Self {
            allowed: Vec::new(),
            max_depth: DEFAULT_DEPTH,
            top: OpenOptions::read_only(),
            below: OpenOptions::read_only(),
        }
    }

    /// Takes no locks, because the caller has them.
    #[must_use]
    pub fn unlocked(mut self) -> Self {
        self.top = self.top.unlocked();
        self.below = self.below.unlocked();
        self
    }

    /// Writes the top of a chain; other users are refused meanwhile.
    pub fn read_write() -> Self {
        Self { top: OpenOptions::read_write(), ..Self::read_only() }
    }
}

/// How a parent was found.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum FoundBy {
    /// A locator or the name led to it.
    Locator,
    /// The first locators led elsewhere, and a later one or the name to it.
    LaterLocator,
    /// Only the search of directories by its id.
    Search,
}

/// A parent that was found.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Parent {
    /// Its file.
    pub path: PathBuf,
    /// True for a raw file.
    pub is_raw: bool,
    /// How it was found.
    pub by: FoundBy,
}

/// Finds the parent of a child; `None` for an image that has none.
///
/// # Errors
/// [`ErrorKind::FileNotFound`] with everything that was tried; [`ErrorKind::Corrupt`] with both ids if files
/// of the right name are other images; the system's.
pub fn find_parent(child: &Vhd, allowed: &[PathBuf]) -> Result<Option<Parent>> {
    let (Some(id), Some(header)) = (child.parent_id(), child.header()) else { return Ok(None) };
    let mut search = Search::new(child, id, allowed);
    let mut first = true;
    for locator in child.locators()? {
        let Ok(path) = locator.path else { continue };
        if let Some(found) = search.candidate(&path, first)? {
            return Ok(Some(found));
        }
        first = false;
    }
    if let Some(found) = search.candidate(&header.parent_name(), first)? {
        return Ok(Some(found));
    }
    if !id.is_null()
        && let Some(path) = search.search()?
    {
        return Ok(Some(Parent { path, is_raw: false, by: FoundBy::Search }));
    }
    Err(search.not_found())
}

struct Search<'a> {
    child: &'a Vhd,
    id: UniqueId,
    /// Where parents may be: the child's own directory first. Real paths.
    directories: Vec<PathBuf>,
    tried: Vec<String>,
    /// True once a locator or the name has stated a file.
    named: bool,
    /// A file where the parent should be, and its id.
    other: Option<(PathBuf, UniqueId)>,
    /// True while every file is looked at.
    by_id: bool,
}

impl<'a> Search<'a> {
    fn new(child: &'a Vhd, id: UniqueId, allowed: &[PathBuf]) -> Self {
        let directories = directories(child, allowed);
        Self { child, id, directories, tried: Vec::new(), named: false, other: None, by_id: false }
    }

    /// Tries a path that the image states, and its last part in each directory.
    fn candidate(&mut self, text: &str, first: bool) -> Result<Option<Parent>> {
        let stated = Path::new(text);
        let Some(name) = stated.file_name() else { return Ok(None) };
        let Some(own) = self.directories.first().cloned() else { return Ok(None) };
        self.named = true;
        let mut paths = vec![own.join(stated)];
        paths.extend(self.directories.iter().map(|directory| directory.join(name)));
        for (number, path) in paths.into_iter().enumerate() {
            let Some(path) = self.confined(&path) else { continue };
            if let Some(is_raw) = self.is_parent(&path)? {
                let by = if first && number == 0 { FoundBy::Locator } else { FoundBy::LaterLocator };
                return Ok(Some(Parent { path, is_raw, by }));
            }
        }
        Ok(None)
    }

    /// The real path, if it is in or below one of the directories.
    fn confined(&mut self, path: &Path) -> Option<PathBuf> {
        let (directory, name) = (path.parent()?, path.file_name()?);
        let real = directory.canonicalize().ok();
        let allowed = real
            .filter(|real| self.directories.iter().any(|allowed| real.starts_with(allowed)))
            .map(|real| real.join(name));
        if allowed.is_none() {
            self.tried.push(format!("{} (outside the allowed directories)", path.display()));
        }
        allowed
    }

    /// Returns `Some(is_raw)` if the file is the parent.
    fn is_parent(&mut self, path: &Path) -> Result<Option<bool>> {
        let shown = path.display().to_string();
        if self.tried.contains(&shown) {
            return Ok(None);
        }
        let file = match ImageFile::open(path, false) {
            Ok(file) => file,
            Err(_) => {
                self.tried.push(shown);
                return Ok(None);
            }
        };
        // The search meets the child itself, which is not its own parent.
        if self.by_id && identity(&file)? == identity(self.child.file())? {
            return Ok(None);
        }
        let len = file.len()?;
        match footer::find(&file, len) {
            Ok(found) if !self.id.is_null() => {
                if found.footer.id() == self.id {
                    return Ok(Some(false));
                }
                let id = found.footer.id();
                if !self.by_id {
                    self.other.get_or_insert((path.to_owned(), id));
                }
            }
            // A raw parent has no identity, and no footer: a VHD here is another file.
            Err(error) if self.id.is_null() && error.kind() == ErrorKind::WrongFormat => {
                if len <= self.child.size() {
                    return Ok(Some(true));
                }
                self.tried.push(format!("{shown} ({len} bytes, more than the child)"));
                return Ok(None);
            }
            _ => {}
        }
        self.tried.push(shown);
        Ok(None)
    }

    fn search(&mut self) -> Result<Option<PathBuf>> {
        self.by_id = true;
        for directory in self.directories.clone() {
            for path in vhd_files(&directory) {
                if self.is_parent(&path)? == Some(false) {
                    return Ok(Some(path));
                }
            }
        }
        Ok(None)
    }

    fn not_found(self) -> Error {
        let child = self.child.path();
        if let Some((path, id)) = &self.other {
            return Error::corrupt(format!(
                "its parent is the image with the id {}, and {} is another one, with the id {id}",
                self.id,
                path.display()
            ))
            .advise("put the parent back, or look for it and use `domsnap disk relocate`; no changes made")
            .on("follow the chain of", child);
        }
        let wanted = match self.id.is_null() {
            true => "its parent, a raw file,".to_owned(),
            false => format!("its parent, the image with the id {},", self.id),
        };
        let text = format!("{wanted} was not found: {}", self.looked_at());
        let advice = match self.id.is_null() {
            true => "bring the raw file back, or allow its directory with --allow-backing",
            false => {
                "bring the parent back, or allow its directory with --allow-backing; `domsnap disk relocate` \
                 writes where it is"
            }
        };
        Error::new(ErrorKind::FileNotFound, text).advise(advice).on("follow the chain of", child)
    }

    /// Says where the parent was looked for. Every file that the image states was tried.
    fn looked_at(&self) -> String {
        let unnamed = if self.named { "" } else { "the image names no file as its parent" };
        if self.tried.is_empty() {
            if self.id.is_null() {
                return unnamed.to_owned();
            }
            let directories: Vec<_> =
                self.directories.iter().map(|path| path.display().to_string()).collect();
            return format!("{unnamed}, and no .vhd file with this id is in {}", directories.join(", "));
        }
        let shown = self.tried.iter().take(NAMED).map(String::as_str).collect::<Vec<_>>().join(", ");
        let more = match self.tried.len().saturating_sub(NAMED) {
            0 => String::new(),
            more => format!(" and {more} other files"),
        };
        let separator = if unnamed.is_empty() { "" } else { "; " };
        format!("{unnamed}{separator}tried: {shown}{more}")
    }
}

/// The real directories in which an image's parent may be: the image's own first.
fn directories(image: &Vhd, allowed: &[PathBuf]) -> Vec<PathBuf> {
    let own = image.path().parent().filter(|own| !own.as_os_str().is_empty()).unwrap_or(Path::new("."));
    std::iter::once(own)
        .chain(allowed.iter().map(PathBuf::as_path))
        .filter_map(|directory| directory.canonicalize().ok())
        .collect()
}

/// The files of a directory that a search by id looks at, sorted.
fn vhd_files(directory: &Path) -> Vec<PathBuf> {
    let Ok(entries) = std::fs::read_dir(directory) else { return Vec::new() };
    let is_vhd = |path: &PathBuf| {
        path.extension().is_some_and(|e| e.eq_ignore_ascii_case("vhd") || e.eq_ignore_ascii_case("avhd"))
    };
    let mut paths: Vec<PathBuf> =
        entries.flatten().take(MOST_FILES).map(|entry| entry.path()).filter(is_vhd).collect();
    paths.sort();
    paths
}

/// Device and inode of an open file; `None` for one in memory.
fn identity(file: &ImageFile) -> Result<Option<(u64, u64)>> {
    let about = file.file().map(std::fs::File::metadata).transpose();
    let about = about.map_err(|error| Error::io("the file cannot be looked at", error))?;
    Ok(about.map(|about| (about.dev(), about.ino())))
}

/// Finds other files with the unique id of an image, in its directory and the allowed ones: copies that were
/// made without an id of their own. A second name of the image's own file is none.
///
/// # Errors
/// The system's.
pub fn find_copies(image: &Vhd, allowed: &[PathBuf]) -> Result<Vec<PathBuf>> {
    let (own, mut seen, mut found) = (identity(image.file())?, HashSet::new(), Vec::new());
    for path in directories(image, allowed).iter().flat_map(|directory| vhd_files(directory)) {
        let Ok(file) = ImageFile::open(&path, false) else { continue };
        let this = identity(&file)?;
        if this == own || !seen.insert(this) {
            continue;
        }
        if footer::find(&file, file.len()?).is_ok_and(|found| found.footer.id() == image.id()) {
            found.push(path);
        }
    }
    Ok(found)
}

impl Chain {
    /// Opens the chain whose top is at `path`.
    ///
    /// # Errors
    /// As [`Vhd::open`] and [`find_parent`]; [`ErrorKind::Corrupt`] for a loop, [`ErrorKind::LimitExceeded`]
    /// for a chain deeper than the limit.
    pub fn open(path: &Path, options: &ChainOptions) -> Result<Self> {
        let mut layers = Vec::new();
        let mut seen = HashSet::new();
        let mut next = Some((path.to_owned(), false));
        while let Some((path, is_raw)) = next.take() {
            if layers.len() == options.max_depth {
                return Err(Error::new(
                    ErrorKind::LimitExceeded,
                    format!("the chain is deeper than the limit of {} layers", options.max_depth),
                )
                .advise("delete snapshots that are not needed")
                .on("open", layers.first().map_or(path.as_path(), |top: &Layer| top.file().path())));
            }
            let layer = if is_raw {
                Layer::Raw(RawLayer::new(ImageFile::open(&path, false)?)?)
            } else {
                let opening = if layers.is_empty() { &options.top } else { &options.below };
                let image = Vhd::open(&path, opening)?;
                next = find_parent(&image, &options.allowed)?.map(|parent| (parent.path, parent.is_raw));
                Layer::Vhd(Box::new(image))
            };
            let identity = identity(layer.file()).context("open", &path)?;
            if identity.is_some_and(|identity| !seen.insert(identity)) {
                return Err(
                    Error::corrupt("the chain is a loop: the image is its own ancestor").on("open", &path)
                );
            }
            layers.push(layer);
        }
        layers.reverse();
        let chain = Self::new(layers)?;
        chain.require_growing()?;
        Ok(chain)
    }
}
