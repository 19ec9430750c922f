//! Snapshots as other programs recorded them, for an import.

use camino::Utf8PathBuf;
use jiff::Timestamp;

/// A snapshot as another program recorded it. Only the images say which snapshots there are: an import finds
/// the one that is meant among those, and gives it what is said here. Nothing in it is trusted beyond that.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct RecordedSnapshot {
    /// Its name, as it was recorded: characters that domsnap does not allow become `_`.
    pub name: String,
    /// The name of the snapshot that it derives from.
    pub parent: Option<String>,
    /// The time when it was taken.
    pub created: Option<Timestamp>,
    /// What a person wrote about it.
    pub description: Option<String>,
    /// True if the current state derives from it.
    pub current: bool,
    /// The name of its internal snapshots in the disks' images.
    pub tag: Option<String>,
    /// Images that were frozen by it.
    pub frozen: Vec<Utf8PathBuf>,
    /// Overlays that were made by it: their backing images have its state.
    pub overlays: Vec<Utf8PathBuf>,
    /// A saved memory, which is not imported: a note says so.
    pub memory: Option<String>,
}

setters!(RecordedSnapshot {
    parent: Option<String>,
    created: Option<Timestamp>,
    description: Option<String>,
    current: bool,
    tag: Option<String>,
    frozen: Vec<Utf8PathBuf>,
    overlays: Vec<Utf8PathBuf>,
    memory: Option<String>,
});

impl RecordedSnapshot {
    /// Makes the record of a snapshot of which nothing but its name is known.
    pub fn new(name: impl Into<String>) -> Self {
        Self {
            name: name.into(),
            parent: None,
            created: None,
            description: None,
            current: false,
            tag: None,
            frozen: Vec::new(),
            overlays: Vec::new(),
            memory: None,
        }
    }
}
