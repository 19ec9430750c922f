//! Space that the removal of files frees, as far as the file system tells.
//!
//! Files may share blocks (reflinks). `FIEMAP` says of each extent whether any other file has it, but not
//! which. So the blocks that a file has alone are freed by its removal. Of the others, those that a kept file
//! has are not freed. The rest may be freed, if only removed files have them.

use std::fs::File;
use std::ops::Range;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::Path;

use rustix::fs::OFlags;
use snapcore::backend::{Certainty, DeleteCost};
use snapcore::shown_size;

use crate::extents::{Extents, extents_of};

/// Most extents of a file that are compared with those of others.
const MAX_EXTENTS: usize = 1 << 20;

/// `BTRFS_SUPER_MAGIC`.
const BTRFS: i64 = 0x9123_683e;

/// Returns the bytes that the removal of the files `gone` frees, all of them at once. Each comes with the
/// number of its names that are removed. `kept` are files that may share blocks with them. A file that cannot
/// be looked at counts for nothing, and is reported.
pub fn freed_by_removing<'a>(
    gone: impl IntoIterator<Item = (&'a Path, u64)>,
    kept: impl IntoIterator<Item = &'a Path>,
) -> DeleteCost {
    let mut sure = DeleteCost::default().exact();
    // Blocks of removed files that other files have too, by their place on the device.
    let mut shared: Vec<(u64, Range<u64>)> = Vec::new();
    let (mut on_btrfs, mut packed, mut devices, mut unlisted) = (false, false, Vec::new(), 0u64);
    let mut kept_by_name = None;
    for (path, names) in gone {
        let (about, extents) = match looked_at(path) {
            Ok(found) => found,
            Err(error) => {
                let why = format!("{} cannot be looked at: {error}", path.display());
                sure = DeleteCost::sum([sure, DeleteCost::default().but(Certainty::Unknown, why)]);
                continue;
            }
        };
        let allocated = about.blocks().saturating_mul(512);
        if about.nlink() > names {
            // Another name keeps the file, so nothing is freed.
            let why = format!("{} has further names, by which it stays", path.display());
            kept_by_name = Some(why);
            continue;
        }
        let Some(extents) = extents.filter(|extents| extents.shared_bytes() > 0 || extents.packed) else {
            // No block is shared, or the file system has no such thing.
            sure.frees = sure.frees.saturating_add(allocated);
            continue;
        };
        packed |= extents.packed;
        unlisted = unlisted.saturating_add(extents.beyond);
        let of_others = extents.shared_bytes();
        sure.frees = sure.frees.saturating_add(allocated.saturating_sub(of_others));
        if let Ok(file) = opened(path)
            && rustix::fs::fstatfs(&file).is_ok_and(|system| system.f_type == BTRFS)
        {
            on_btrfs = true;
        }
        devices.push(about.dev());
        shared.extend(extents.shared.into_iter().map(|range| (about.dev(), range)));
    }
    let open = unkept(shared, kept, &devices).saturating_add(unlisted);
    let sum = |why| {
        let mut all = sure.clone();
        all.frees = all.frees.saturating_add(open);
        all.but(Certainty::AtMost, why)
    };
    match (open, on_btrfs) {
        _ if sure.certainty == Certainty::Unknown => sure,
        _ if packed => {
            sum("the file system compresses the data, and does not tell how much room it takes".to_owned())
        }
        (0, false) => match kept_by_name {
            Some(why) => sure.but(Certainty::Exact, why),
            None => sure,
        },
        (0, true) => sure.but(
            Certainty::Estimate,
            "btrfs frees whole extents: it may be more, where only a part of one is in use",
        ),
        (open, _) => {
            let (open, certain) = (shown_size(open), shown_size(sure.frees));
            sum(format!(
                "{open} may be shared with other files too, which the file system does not name; {certain} are certain"
            ))
        }
    }
}

fn opened(path: &Path) -> std::io::Result<File> {
    let flags = OFlags::NONBLOCK | OFlags::NOFOLLOW;
    File::options().read(true).custom_flags(flags.bits().cast_signed()).open(path)
}

fn looked_at(path: &Path) -> std::io::Result<(std::fs::Metadata, Option<Extents>)> {
    let file = opened(path)?;
    let about = file.metadata()?;
    Ok((about, extents_of(&file, MAX_EXTENTS)?))
}

/// Returns the bytes of `shared` ranges that none of the `kept` files has.
fn unkept<'a>(
    mut shared: Vec<(u64, Range<u64>)>,
    kept: impl IntoIterator<Item = &'a Path>,
    devices: &[u64],
) -> u64 {
    if shared.is_empty() {
        return 0;
    }
    let mut of_kept: Vec<(u64, Range<u64>)> = Vec::new();
    for path in kept {
        let Ok((about, Some(extents))) = looked_at(path) else { continue };
        if devices.contains(&about.dev()) {
            of_kept.extend(extents.shared.into_iter().map(|range| (about.dev(), range)));
        }
    }
    let (shared, of_kept) = (joined(&mut shared), joined(&mut of_kept));
    let mut bytes = 0u64;
    let mut next = 0;
    for (device, range) in &shared {
        let mut at = range.start;
        while of_kept.get(next).is_some_and(|(other, kept)| (*other, kept.end) <= (*device, at)) {
            next += 1;
        }
        let over =
            of_kept.iter().skip(next).take_while(|(other, kept)| other == device && kept.start < range.end);
        for (_, kept) in over {
            bytes = bytes.saturating_add(kept.start.saturating_sub(at));
            at = at.max(kept.end);
        }
        bytes = bytes.saturating_add(range.end.saturating_sub(at));
    }
    bytes
}

/// Sorts ranges, and joins those that overlap.
fn joined(ranges: &mut [(u64, Range<u64>)]) -> Vec<(u64, Range<u64>)> {
    ranges.sort_unstable_by_key(|(device, range)| (*device, range.start));
    let mut all: Vec<(u64, Range<u64>)> = Vec::new();
    for (device, range) in ranges.iter() {
        match all.last_mut() {
            Some((last, joined)) if last == device && range.start <= joined.end => {
                joined.end = joined.end.max(range.end);
            }
            _ => all.push((*device, range.clone())),
        }
    }
    all
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn kept_ranges_are_taken_out_once() {
        let shared = vec![(1, 0..100), (1, 50..150), (2, 0..10), (1, 200..210)];
        let mut kept = vec![(1, 90..110), (1, 20..30), (2, 0..5), (1, 140..205)];
        let kept = joined(&mut kept);
        let mut shared = shared;
        let all = joined(&mut shared);
        assert_eq!(all, [(1, 0..150), (1, 200..210), (2, 0..10)]);
        assert_eq!(kept.len(), 4);
    }

    #[test]
    fn file_with_another_name_frees_nothing() {
        let dir = tempfile::tempdir().unwrap();
        let (one, two) = (dir.path().join("one"), dir.path().join("two"));
        std::fs::write(&one, vec![1; 65536]).unwrap();
        let freed = freed_by_removing([(one.as_path(), 1)], []);
        assert_eq!((freed.frees, freed.certainty), (65536, Certainty::Exact));
        std::fs::hard_link(&one, &two).unwrap();
        let freed = freed_by_removing([(one.as_path(), 1)], []);
        assert_eq!((freed.frees, freed.certainty), (0, Certainty::Exact));
        assert!(freed.why.unwrap().contains("further names"));
        assert_eq!(freed_by_removing([(one.as_path(), 2)], []).frees, 65536);
        let gone = dir.path().join("gone");
        assert_eq!(freed_by_removing([(gone.as_path(), 1)], []).certainty, Certainty::Unknown);
    }
}
