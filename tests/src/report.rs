//! The part of domsnap's JSON that the tests rely on. Unknown fields are let pass: the schema test looks at
//! all.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use serde::Deserialize;

use crate::domsnap::Domsnap;
use crate::verify;

/// `domsnap list DOMAIN --json`.
#[derive(Debug, Deserialize)]
pub struct List {
    /// Every snapshot.
    pub snapshots: Vec<Snapshot>,
    /// The one that the current state grew from.
    pub current: Option<String>,
    /// The state that the last revert replaced.
    #[serde(default)]
    pub previous: Option<Previous>,
}

/// The state that the last revert replaced.
#[derive(Debug, Deserialize)]
pub struct Previous {
    /// The name of the snapshot that it grew from.
    pub parent: Option<String>,
    /// What it holds of each disk.
    pub points: Vec<Point>,
    /// Its memory image.
    #[serde(default)]
    pub memory: Option<Memory>,
    /// Bytes that are freed when it is given up.
    pub frees: Option<u64>,
}

/// One snapshot.
#[derive(Debug, Deserialize)]
pub struct Snapshot {
    /// Its name.
    pub name: String,
    /// Its parent's name.
    pub parent: Option<String>,
    /// What it holds of each disk.
    pub points: Vec<Point>,
    /// Its memory image.
    #[serde(default)]
    pub memory: Option<Memory>,
}

/// A memory image.
#[derive(Debug, Deserialize)]
pub struct Memory {
    /// Its file.
    pub file: PathBuf,
}

/// One disk at one instant.
#[derive(Debug, Deserialize)]
pub struct Point {
    /// The disk.
    pub target: String,
    /// Where it lives.
    pub kind: Kind,
    /// The image file.
    pub layer: PathBuf,
    /// The internal snapshot's name in that image.
    #[serde(default)]
    pub tag: Option<String>,
}

/// Where a point lives.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Kind {
    /// In the image's snapshot table.
    Internal,
    /// As a frozen image.
    External,
}

/// The domain's snapshots as domsnap reports them.
///
/// # Errors
/// If `list` fails, or says something else.
pub fn list(domsnap: &Domsnap, domain: &str) -> Result<List> {
    domsnap.done(&["list", domain, "--json"])?.json()
}

/// `domsnap disk list IMAGE --json`.
#[derive(Debug, Deserialize)]
struct DiskList {
    snapshots: Vec<DiskSnapshot>,
}

#[derive(Debug, Deserialize)]
struct DiskSnapshot {
    name: String,
    kind: Kind,
}

/// The snapshots of one image, reported as those of the disk `vda`: no parents, no current one; what is
/// external is looked for in the layer right below.
///
/// # Errors
/// If `disk list` fails, or says something else.
pub fn disk_list(domsnap: &Domsnap, image: &Path) -> Result<List> {
    let args = ["disk".as_ref(), "list".as_ref(), image.as_os_str(), "--json".as_ref()];
    let list: DiskList = domsnap.done(&args)?.json()?;
    let snapshot = |snapshot: DiskSnapshot| -> Result<Snapshot> {
        let (layer, tag) = match snapshot.kind {
            Kind::Internal => (image.to_owned(), Some(snapshot.name.clone())),
            Kind::External => {
                (verify::backing(image)?.context("an external snapshot, and no backing file")?, None)
            }
        };
        let point = Point { target: "vda".into(), kind: snapshot.kind, layer, tag };
        Ok(Snapshot { name: snapshot.name, parent: None, points: vec![point], memory: None })
    };
    Ok(List {
        snapshots: list.snapshots.into_iter().map(snapshot).collect::<Result<_>>()?,
        current: None,
        previous: None,
    })
}
