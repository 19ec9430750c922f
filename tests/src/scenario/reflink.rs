//! The operations on raw disks that share blocks, which are interrupted too.

use anyhow::Result;

use super::{Look, Scenario, args, clone_args, cloneable, strings};
use crate::domain::{Domain, NAME, Shape};

/// Two raw disks on a file system that shares blocks; snapshots by `methods`, called `s1`, `s2`, ..., with
/// writes between and after.
fn line(methods: &[&str]) -> Result<Domain> {
    let mut domain = Domain::new_on("xfs", &Shape::raw(2))?;
    for (index, method) in methods.iter().enumerate() {
        domain.create(&format!("s{}", index + 1), method)?;
        domain.write_everywhere()?;
    }
    Ok(domain)
}

scenarios! {
    /// The first snapshot.
    CREATE Tree on xfs { line(&[]), |d| d.create_args("new", "reflink"), |m| m.create("new") }
    /// One disk shares, one is copied.
    CREATE_BOTH_WAYS Tree on xfs { line(&["methods"]), |d| d.create_args("new", "methods"), |m| m.create("new") }
    /// The current state is replaced by what shares a point's blocks.
    REVERT Tree on xfs { line(&["reflink", "reflink"]), |_| args(&["revert", NAME, "s1"]), |m| m.revert("s1") }
    /// The current state gets a name first; the point of one disk was copied.
    REVERT_SAVING_CURRENT Tree on xfs {
        line(&["methods", "reflink"]),
        |_| args(&["revert", NAME, "s1", "--save-current=kept"]),
        |m| { m.create("kept"); m.revert("s1") }
    }
    /// Two clones, one disk of each shares blocks with a point that shares them, one with a copy.
    CLONE Tree on xfs {
        cloneable(line(&["methods"])), |d| clone_args(d, "s1", &["--count", "2"]),
        |m| m.clone_to(&["web-1", "web-2"], "s1")
    }
    /// In the middle: raw points depend on nothing.
    DELETE_MIDDLE Tree on xfs {
        line(&["reflink", "methods", "reflink"]),
        |_| args(&["delete", NAME, "s2"]), |m| m.delete(&strings(&["s2"]))
    }
}
