//! Sizes for people.

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
