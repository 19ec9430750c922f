//! Drawing how snapshots derive from each other.
//!
//! The line that leads to the current state runs straight down, however long it is; only side branches are
//! indented:
//!
//! ```text
//! ○ base
//! ├─○ try-1
//! │ ○ try-2
//! ○ update
//! ● now
//! ```

use std::collections::{BTreeMap, BTreeSet};

/// The signs to draw with.
#[derive(Debug, Clone, Copy)]
pub struct Signs {
    /// A snapshot.
    pub snapshot: &'static str,
    /// The current state.
    pub present: &'static str,
    /// Start of a side branch.
    pub fork: &'static str,
    /// Line that passes a side branch.
    pub past: &'static str,
}

/// For terminals that can draw.
pub const UNICODE: Signs = Signs { snapshot: "○", present: "●", fork: "├─", past: "│ " };
/// For all others.
pub const ASCII: Signs = Signs { snapshot: "o", present: "@", fork: "|-", past: "| " };

impl Signs {
    /// Those that the environment can show: lines, unless its locale is plain ASCII.
    pub fn fitting() -> Self {
        let locale = ["LC_ALL", "LC_CTYPE", "LANG"]
            .into_iter()
            .find_map(|name| std::env::var(name).ok().filter(|value| !value.is_empty()));
        match locale.as_deref() {
            Some("C" | "POSIX") => ASCII,
            _ => UNICODE,
        }
    }
}

/// One line of the drawing.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Line {
    /// Drawing to the left of the name.
    pub graph: String,
    /// The snapshot's index; `None` for the current state.
    pub node: Option<usize>,
}

/// Draws `parents`: the index of each snapshot's parent, oldest first. The current state derives from
/// `current`.
pub fn draw(parents: &[Option<usize>], current: Option<usize>, signs: Signs) -> Vec<Line> {
    let mut children: BTreeMap<Option<usize>, Vec<usize>> = BTreeMap::new();
    for (index, parent) in parents.iter().enumerate() {
        // A parent that is no other snapshot would hang this one on nothing: it is drawn as a root.
        let parent = parent.filter(|parent| *parent < parents.len() && *parent != index);
        children.entry(parent).or_default().push(index);
    }
    let mut trunk = BTreeSet::new();
    let mut next = current.filter(|current| *current < parents.len());
    while let Some(index) = next {
        if !trunk.insert(index) {
            break; // a loop in the records
        }
        next = parents[index].filter(|parent| *parent < parents.len());
    }
    let mut lines = Vec::new();
    // A stack instead of recursion: chains are hundreds long. What is pushed last is drawn first.
    let mut open = vec![Open::Below { of: None, prefix: String::new() }];
    while let Some(step) = open.pop() {
        match step {
            Open::Draw { node, graph, prefix } => {
                lines.push(Line { graph, node });
                if node.is_some() {
                    open.push(Open::Below { of: node, prefix });
                }
            }
            Open::Below { of, prefix } => {
                let mut below: Vec<Option<usize>> =
                    children.remove(&of).unwrap_or_default().into_iter().map(Some).collect();
                // The current state's line goes straight on; where it is not here, the newest child's.
                if current == of {
                    below.push(None);
                } else if let Some(at) = below.iter().position(|c| c.is_some_and(|c| trunk.contains(&c))) {
                    let straight = below.remove(at);
                    below.push(straight);
                }
                let last = below.len().saturating_sub(1);
                for (at, node) in below.into_iter().enumerate().rev() {
                    let sign = if node.is_none() { signs.present } else { signs.snapshot };
                    open.push(if at == last {
                        Open::Draw { node, graph: format!("{prefix}{sign} "), prefix: prefix.clone() }
                    } else {
                        Open::Draw {
                            node,
                            graph: format!("{prefix}{}{sign} ", signs.fork),
                            prefix: format!("{prefix}{}", signs.past),
                        }
                    });
                }
            }
        }
    }
    lines
}

enum Open {
    Draw { node: Option<usize>, graph: String, prefix: String },
    Below { of: Option<usize>, prefix: String },
}

#[cfg(test)]
mod tests {
    use super::*;

    fn drawn(parents: &[Option<usize>], current: Option<usize>) -> String {
        draw(parents, current, UNICODE)
            .into_iter()
            .map(|line| {
                let name = line.node.map_or("now".to_owned(), |index| index.to_string());
                format!("{}{name}\n", line.graph)
            })
            .collect()
    }

    #[test]
    fn a_chain_is_straight() {
        assert_eq!(drawn(&[None, Some(0), Some(1)], Some(2)), "○ 0\n○ 1\n○ 2\n● now\n");
    }

    /// Side branches are indented; the line to the current state is not.
    #[test]
    fn only_side_branches_are_indented() {
        let parents = [None, Some(0), Some(1), Some(0), Some(3), Some(0)];
        assert_eq!(drawn(&parents, Some(4)), "○ 0\n├─○ 1\n│ ○ 2\n├─○ 5\n○ 3\n○ 4\n● now\n");
    }

    #[test]
    fn the_present_on_a_fork_stands_below_all_branches() {
        assert_eq!(drawn(&[None, Some(0), Some(0)], Some(0)), "○ 0\n├─○ 1\n├─○ 2\n● now\n");
    }

    #[test]
    fn branches_of_branches_nest() {
        let parents = [None, Some(0), Some(1), Some(1), Some(0)];
        assert_eq!(drawn(&parents, Some(4)), "○ 0\n├─○ 1\n│ ├─○ 2\n│ ○ 3\n○ 4\n● now\n");
    }

    #[test]
    fn a_present_that_derives_from_nothing_is_a_root() {
        assert_eq!(drawn(&[None, None], None), "├─○ 0\n├─○ 1\n● now\n");
        assert_eq!(drawn(&[], None), "● now\n");
    }

    #[test]
    fn a_long_chain_needs_no_stack() {
        let parents: Vec<Option<usize>> = (0..100_000usize).map(|index| index.checked_sub(1)).collect();
        assert_eq!(draw(&parents, Some(99_999), ASCII).len(), 100_001);
    }
}
