//! The part of domsnap's JSON that the tests rely on. Unknown fields are let pass: the schema test looks at all.

use std::path::PathBuf;

use anyhow::Result;
use serde::Deserialize;

use crate::domsnap::Domsnap;

/// `domsnap list DOMAIN --json`.
#[derive(Debug, Deserialize)]
pub struct List {
    /// Every snapshot.
    pub snapshots: Vec<Snapshot>,
    /// The one that the present grew from.
    pub current: Option<String>,
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

/// The domain's snapshots as domsnap tells them.
///
/// # Errors
/// If `list` fails, or says something else.
pub fn list(domsnap: &Domsnap, domain: &str) -> Result<List> {
    domsnap.done(&["list", domain, "--json"])?.json()
}
