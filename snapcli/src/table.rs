//! Tables: columns apart by two blanks, no lines, numbers to the right.

use unicode_width::UnicodeWidthStr;

/// A table under its column names. A name that begins with `>` is a column of numbers.
///
/// Written for thousands of rows: one pass for the widths, one for the text. Control characters, which a name
/// in a foreign image may have, come out as blanks: a terminal is not theirs to steer.
pub fn table(columns: &[&str], rows: impl IntoIterator<Item = Vec<String>>) -> String {
    let header = columns.iter().map(|name| name.trim_start_matches('>').to_owned()).collect();
    let mut cells: Vec<Vec<String>> = vec![header];
    cells.extend(rows);
    for cell in cells.iter_mut().flatten() {
        if cell.contains(char::is_control) {
            *cell = cell.replace(char::is_control, " ");
        }
    }
    let width_of = |index: usize| {
        cells.iter().filter_map(|row| row.get(index)).map(|cell| cell.width()).max().unwrap_or(0)
    };
    let widths: Vec<usize> = (0..columns.len()).map(width_of).collect();
    let mut text = String::new();
    for row in &cells {
        let begin = text.len();
        for ((cell, width), name) in row.iter().zip(&widths).zip(columns) {
            let blanks = width - cell.width();
            let (before, after) = if name.starts_with('>') { (blanks, 0) } else { (0, blanks) };
            text.extend(std::iter::repeat_n(' ', before));
            text.push_str(cell);
            text.extend(std::iter::repeat_n(' ', after + 2));
        }
        // No blanks at the ends of lines: what is copied out of a terminal carries none along.
        let end = begin + text[begin..].trim_end().len();
        text.truncate(end);
        text.push('\n');
    }
    text
}

/// `text` with `by` in front of each line.
pub fn indent(text: &str, by: &str) -> String {
    text.lines().map(|line| format!("{by}{line}\n")).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_line_up_and_lines_end_with_their_text() {
        let rows =
            vec![vec!["a".into(), "1 B".into(), "x".into()], vec!["long".into(), "10 MiB".into(), "".into()]];
        assert_eq!(
            table(&["NAME", ">SIZE", "WHAT"], rows),
            "NAME    SIZE  WHAT\na        1 B  x\nlong  10 MiB\n"
        );
    }

    /// Wide letters take two columns; control characters are escaped.
    #[test]
    fn wide_and_control_characters_align() {
        let rows = vec![vec!["雪".into(), "x".into()], vec!["a\u{1b}[2Jb".into(), "y".into()]];
        assert_eq!(table(&["NAME", "WHAT"], rows), "NAME    WHAT\n雪      x\na [2Jb  y\n");
    }
}
