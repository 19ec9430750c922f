//! Tables: columns apart by two blanks, no lines, numbers to the right.

use comfy_table::{Cell, CellAlignment, ContentArrangement, Table};

/// A table under its column names. A name that begins with `>` is a column of numbers.
pub fn table(columns: &[&str], rows: impl IntoIterator<Item = Vec<String>>) -> String {
    let mut table = Table::new();
    table.load_preset(comfy_table::presets::NOTHING).set_content_arrangement(ContentArrangement::Disabled);
    table.set_header(columns.iter().map(|name| Cell::new(name.trim_start_matches('>'))));
    for row in rows {
        table.add_row(row);
    }
    for (index, name) in columns.iter().enumerate() {
        if let Some(column) = table.column_mut(index) {
            column.set_padding((0, 2));
            if name.starts_with('>') {
                column.set_cell_alignment(CellAlignment::Right);
            }
        }
    }
    // No blanks at the ends of lines: what is copied out of a terminal carries none along.
    table.lines().map(|line| line.trim_end().to_owned() + "\n").collect()
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
}
