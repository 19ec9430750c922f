//! What a domain writes between a crash and the healing, and where it is afterwards.

use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use anyhow::{Context, Result, bail, ensure};

use crate::domain::Domain;
use crate::domsnap::status;
use crate::model::{Bytes, Model};
use crate::qemu::{self, Write};

/// What is written to every disk: over what others wrote, in a place of its own, and zeros.
pub(crate) const ONCE: [Write; 3] = [
    Write { offset: 61_440, length: 12_288, byte: Some(0xee) },
    Write { offset: (3 << 20) + 512, length: 1024, byte: Some(0xef) },
    Write { offset: 1 << 20, length: 65_536, byte: None },
];

/// What is written the next time: over some of that, and elsewhere.
pub(crate) const TWICE: [Write; 2] = [
    Write { offset: 65_536, length: 4096, byte: Some(0xdd) },
    Write { offset: (2 << 20) + 8192, length: 8192, byte: Some(0xde) },
];

/// A disk that the domain wrote to.
pub(crate) struct Written {
    pub(crate) target: String,
    /// All its bytes before.
    pub(crate) shown: Bytes,
    /// All its bytes after.
    pub(crate) holds: Bytes,
}

/// The internal snapshots that hold what was saved.
#[derive(Default)]
pub(crate) struct Aside(Vec<(PathBuf, String, Bytes)>);

impl Aside {
    /// They hold it still.
    pub(crate) fn is_there_still(&self) -> Result<()> {
        for (image, tag, holds) in &self.0 {
            let found = qemu::read(image, Some(tag)).context("what was saved is gone")?;
            ensure!(found == **holds, "{tag} of {} no longer holds what was saved", image.display());
        }
        Ok(())
    }
}

/// The domain starts and does `writes` on each of its disks.
pub(crate) fn write(domain: &Domain, writes: &[Write]) -> Result<Vec<Written>> {
    let mut all = Vec::new();
    for target in domain.model.present.keys() {
        let path = domain.path(target);
        let shown = Arc::new(qemu::read(&path, None).context("the domain starts")?);
        let mut model = Model::default();
        model.present.insert(target.clone(), shown.clone());
        model.write(target, writes);
        qemu::write(&path, writes).context("the domain writes")?;
        all.push(Written { target: target.clone(), shown, holds: model.present[target].clone() });
    }
    Ok(all)
}

/// While a domain runs, nothing is healed and nothing is touched, whichever of its disks is looked at first.
pub(crate) fn nothing_is_healed_while_it_runs(domain: &Domain) -> Result<()> {
    let target = domain.model.present.keys().last().context("a domain without disks")?;
    let path = domain.path(target);
    let running = qemu::Running::on(&path)?;
    let refused = domain.declined(&["recover"], status::REFUSED).context("while the domain runs")?;
    ensure!(refused.stderr.contains(&*path.to_string_lossy()), "{} is not named: {refused}", path.display());
    running.stop()
}

/// After the healing: finds what was written. In the current state: then the models learn it. Or aside, where
/// the operation changes the current state: then it is checked, and files that were saved are removed, as a
/// user would.
pub(crate) fn kept(
    domain: &Domain,
    written: &[Written],
    before: &mut Model,
    after: &mut Model,
) -> Result<Aside> {
    let mut tags = Vec::new();
    for Written { target, shown, holds } in written {
        let path = domain.path(target);
        let (on_before, on_after) = (*shown == before.present[target], *shown == after.present[target]);
        ensure!(on_before || on_after, "{} was neither as before nor as after", path.display());
        if qemu::read(&path, None)? == **holds {
            for (model, on) in [(&mut *before, on_before), (&mut *after, on_after)] {
                if on {
                    model.present.insert(target.clone(), holds.clone());
                }
            }
            continue;
        }
        let lost = || format!("what the domain wrote to {target} is lost: it is not in the current state");
        ensure!(before.present[target] != after.present[target], "{}", lost());
        let (image, tag) = aside(domain, holds)?.with_context(|| format!("{}, nor aside", lost()))?;
        // Inside one image it cannot be known on which of the two current states it was written.
        let in_place = image.metadata()?.ino() == path.metadata()?.ino();
        ensure!(on_after || in_place, "what was written on the current state before the revert was saved");
        match tag {
            Some(tag) => tags.push((image, tag, holds.clone())),
            None => std::fs::remove_file(image)?,
        }
    }
    Ok(Aside(tags))
}

/// The rescued image, or the internal snapshot called so of another, that holds these bytes.
pub(crate) fn aside(domain: &Domain, holds: &Bytes) -> Result<Option<(PathBuf, Option<String>)>> {
    for entry in std::fs::read_dir(domain.disks())? {
        let path = entry?.path();
        let name = path.file_name().and_then(|name| name.to_str()).context("a name that is no text")?;
        if !path.is_file() || path.extension().is_some_and(|extension| extension == "crc32") {
            continue;
        }
        if name.starts_with("rescued-") && qemu::read(&path, None)? == **holds {
            return Ok(Some((path, None)));
        }
        for tag in rescued_tags(&path)? {
            if qemu::read(&path, Some(&tag))? == **holds {
                return Ok(Some((path, Some(tag))));
            }
        }
    }
    Ok(None)
}

fn rescued_tags(image: &Path) -> Result<Vec<String>> {
    let is_checksum = image.extension().is_some_and(|extension| extension == "crc32");
    if is_checksum || qemu::format(image) == "raw" {
        return Ok(Vec::new());
    }
    let args = ["info", "-U", "-f", "qcow2", "--output=json"].map(std::ffi::OsStr::new);
    let reported = qemu::img(&[&args[..], &[image.as_os_str()]].concat())?;
    let reported: serde_json::Value = serde_json::from_str(&reported)?;
    let Some(snapshots) = reported.get("snapshots") else { return Ok(Vec::new()) };
    let Some(snapshots) = snapshots.as_array() else { bail!("no list of snapshots: {reported}") };
    let names = snapshots.iter().filter_map(|snapshot| snapshot["name"].as_str());
    Ok(names.filter(|name| name.starts_with("rescued-")).map(str::to_owned).collect())
}

/// Removes the files that were saved, as a user would.
pub(crate) fn clear(domain: &Domain) -> Result<()> {
    for entry in std::fs::read_dir(domain.disks())? {
        let entry = entry?;
        if entry.file_name().to_str().is_some_and(|name| name.starts_with("rescued-")) {
            std::fs::remove_file(entry.path())?;
        }
    }
    Ok(())
}
