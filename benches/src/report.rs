//! The report: for a reader at a terminal, and as Markdown.

use std::fmt::Write;

use crate::row::{OURS, Row, Series, mebibytes, seconds};

/// All rows as text.
pub fn text(rows: &[&Row]) -> String {
    let mut text = String::new();
    for row in rows {
        let _ = writeln!(text, "\n{}: {}", row.name(), row.what());
        for series in row.series() {
            let _ = writeln!(text, "  {:<34} {}", series.label, describe(series));
        }
        for verdict in row.verdicts() {
            let _ = writeln!(text, "  {:<12} {}; target: {}", verdict.word(), verdict.found, verdict.target);
        }
        if let Some(times) = from_limit(row) {
            let _ = writeln!(text, "  {times:.1} times the limit");
        }
        for note in row.notes() {
            let _ = writeln!(text, "  note: {note}");
        }
    }
    let verdicts: Vec<_> = rows.iter().flat_map(|row| row.verdicts()).collect();
    let count = |met| verdicts.iter().filter(|verdict| verdict.met == met).count();
    let _ = writeln!(
        text,
        "\n{} targets met, {} missed, {} not measured",
        count(Some(true)),
        count(Some(false)),
        count(None)
    );
    text
}

/// All rows as one Markdown table.
pub fn markdown(about: &str, rows: &[&Row]) -> String {
    let mut text = String::new();
    for line in about.lines() {
        let _ = writeln!(text, "- {line}");
    }
    let _ = writeln!(text, "\n| row | domsnap | compared with | limit | targets |\n|---|---|---|---|---|");
    for row in rows {
        let ours = row.ours().map_or("-".to_owned(), describe);
        let others: Vec<_> = row
            .series()
            .iter()
            .filter(|series| series.label != OURS && series.label != crate::row::LIMIT)
            .map(|series| format!("{}: {}", series.label, describe(series)))
            .collect();
        let limit = match (row.limit(), from_limit(row)) {
            (Some(limit), Some(times)) => format!("{} ({times:.1} times)", seconds(limit.median())),
            _ => "-".to_owned(),
        };
        let verdicts: Vec<_> = row
            .verdicts()
            .iter()
            .map(|verdict| format!("{}: {} ({})", verdict.word(), verdict.found, verdict.target))
            .collect();
        let _ = writeln!(
            text,
            "| **{}**: {} | {ours} | {} | {limit} | {} |",
            row.name(),
            row.what(),
            others.join("<br>"),
            verdicts.join("<br>")
        );
    }
    let notes = rows.iter().flat_map(|row| row.notes().iter().map(move |note| (row.name(), note)));
    for (number, (name, note)) in notes.enumerate() {
        let _ = writeln!(text, "{}- {name}: {note}", if number == 0 { "\n" } else { "" });
    }
    text
}

fn describe(series: &Series) -> String {
    let mut text = String::new();
    if !series.walls.is_empty() {
        let (fastest, slowest) = series.spread();
        text = format!(
            "{} ({} to {}, n={})",
            seconds(series.median()),
            seconds(fastest),
            seconds(slowest),
            series.walls.len(),
        );
    }
    // What is no process of its own has none.
    if series.peak > 0 {
        let _ = write!(text, ", {}", mebibytes(series.peak));
    }
    if let Some(flushes) = series.flushes {
        let _ = write!(text, ", {flushes} flushes");
    }
    if let Some(written) = series.written {
        let _ = write!(text, ", {} written", mebibytes(written));
    }
    text
}

/// How many times the least work we take.
fn from_limit(row: &Row) -> Option<f64> {
    Some(row.ours()?.median() / row.limit()?.median())
}
