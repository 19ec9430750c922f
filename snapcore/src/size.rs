//! Sizes: as people read them, and of file systems.

use camino::Utf8Path;
use rustix::fs::{StatVfs, statvfs};

/// Bytes that this user may still write to the file system of a directory; `None` if it does not tell.
pub fn free_bytes(directory: &Utf8Path) -> Option<u64> {
    free_of(&statvfs(directory.as_std_path()).ok()?)
}

/// Bytes that this user may still write to a file system; `None` if it does not tell.
pub(crate) fn free_of(about: &StatVfs) -> Option<u64> {
    let blocks = if is_root() { about.f_bfree } else { about.f_bavail };
    (about.f_blocks > 0).then(|| blocks.saturating_mul(about.f_frsize))
}

/// Root may use the blocks and files that a file system reserves.
pub(crate) fn is_root() -> bool {
    rustix::process::geteuid().is_root()
}

/// Formats bytes with three significant digits: `0 B`, `512 B`, `1.50 KiB`, `12.3 MiB`, `100 GiB`.
pub fn shown_size(count: u64) -> String {
    const UNITS: [&str; 6] = ["KiB", "MiB", "GiB", "TiB", "PiB", "EiB"];
    if count < 1024 {
        return format!("{count} B");
    }
    let mut value = count as f64;
    let mut unit = "B";
    for next in UNITS {
        value /= 1024.0;
        unit = next;
        // A value that would round up to 1024 of this unit is shown in the next.
        if value < 999.5 {
            break;
        }
    }
    match value {
        v if v < 9.995 => format!("{v:.2} {unit}"),
        v if v < 99.95 => format!("{v:.1} {unit}"),
        v => format!("{v:.0} {unit}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_have_three_digits_that_count() {
        for (count, text) in [
            (0, "0 B"),
            (1023, "1023 B"),
            (1024, "1.00 KiB"),
            (1536, "1.50 KiB"),
            (10 << 20, "10.0 MiB"),
            (100 << 30, "100 GiB"),
            ((1 << 20) - 1, "1.00 MiB"),
            (1_047_527_424, "999 MiB"),
            (1_048_051_712, "0.98 GiB"),
            (u64::MAX, "16.0 EiB"),
        ] {
            assert_eq!(shown_size(count), text, "{count}");
        }
    }
}
