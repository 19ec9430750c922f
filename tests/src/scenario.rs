//! The operations that the crash suites interrupt: how to get there, the command, and what it means to the model.

use anyhow::Result;

use crate::domain::{Domain, NAME, Shape};
use crate::model::Model;

/// One operation on a prepared domain.
#[derive(Clone, Copy)]
pub struct Scenario {
    /// Its name: that of the test.
    pub name: &'static str,
    /// Makes the domain.
    pub prepare: fn() -> Result<Domain>,
    /// The command line.
    pub words: fn(&Domain) -> Vec<String>,
    /// What the operation does to the model, once it has happened.
    pub effect: fn(&mut Model),
}

fn words(words: &[&str]) -> Vec<String> {
    words.iter().map(|word| (*word).to_owned()).collect()
}

fn strings(names: &[&str]) -> Vec<String> {
    words(names)
}

/// Two disks; snapshots of `kinds`, called `s1`, `s2`, ..., with writes between and after.
fn line(kinds: &[&str]) -> Result<Domain> {
    let mut domain = Domain::new(&Shape::disks(2))?;
    for (index, kind) in kinds.iter().enumerate() {
        domain.create(&format!("s{}", index + 1), kind)?;
        domain.write_everywhere()?;
    }
    Ok(domain)
}

/// Two snapshots and one beside them: `s1` with the children `s2` and `side`, all of `kind`, the present on `side`.
fn fork(kind: &str) -> Result<Domain> {
    let mut domain = line(&[kind, kind])?;
    domain.revert("s1")?;
    domain.write_and_create("side", kind)?;
    domain.write_everywhere()?;
    Ok(domain)
}

macro_rules! scenarios {
    ($($(#[$doc:meta])* $name:ident { $prepare:expr, $words:expr, $effect:expr })*) => {
        $($(#[$doc])* pub const $name: Scenario = Scenario {
            name: stringify!($name),
            prepare: || $prepare,
            words: $words,
            effect: $effect,
        };)*

        /// All of them.
        pub const ALL: &[Scenario] = &[$($name),*];
    };
}

scenarios! {
    /// The first snapshot: images that were never seen before, internal.
    CREATE_INTERNAL { line(&[]), |d| d.create_words("new", "internal"), |m| m.create("new") }
    /// The first snapshot, external: the images get their permanent names.
    CREATE_EXTERNAL { line(&[]), |d| d.create_words("new", "external"), |m| m.create("new") }
    /// One disk internal, one external.
    CREATE_MIXED { line(&[]), |d| d.create_words("new", "mixed"), |m| m.create("new") }
    /// A further internal snapshot on top of external ones.
    CREATE_INTERNAL_ON_EXTERNAL {
        line(&["external"]), |d| d.create_words("new", "internal"), |m| m.create("new")
    }
    /// A further external snapshot of images that hold internal ones.
    CREATE_EXTERNAL_ON_INTERNAL {
        line(&["internal"]), |d| d.create_words("new", "external"), |m| m.create("new")
    }
    /// Internal points of the active images: applied in place.
    REVERT_INTERNAL_IN_PLACE {
        line(&["internal", "internal"]), |_| words(&["revert", NAME, "s1"]), |m| m.revert("s1")
    }
    /// Internal points of images that other points stand on: copied out.
    REVERT_INTERNAL_MATERIALISED {
        line(&["internal", "external"]), |_| words(&["revert", NAME, "s1"]), |m| m.revert("s1")
    }
    /// To a frozen layer.
    REVERT_EXTERNAL {
        line(&["external", "external"]), |_| words(&["revert", NAME, "s1"]), |m| m.revert("s1")
    }
    /// The present gets a name first.
    REVERT_SAVING_CURRENT {
        line(&["external", "mixed"]),
        |_| words(&["revert", NAME, "s1", "--save-current=kept"]),
        |m| { m.create("kept"); m.revert("s1") }
    }
    /// The only snapshot, external: the present is merged down or takes its place.
    DELETE_LEAF_EXTERNAL {
        line(&["external", "external"]), |_| words(&["delete", NAME, "s2"]), |m| m.delete(&strings(&["s2"]))
    }
    /// A leaf beside the present: no merge at all.
    DELETE_LEAF_OFF_THE_ACTIVE_CHAIN {
        fork("external"), |_| words(&["delete", NAME, "s2"]), |m| m.delete(&strings(&["s2"]))
    }
    /// An internal leaf.
    DELETE_LEAF_INTERNAL {
        line(&["internal", "internal"]), |_| words(&["delete", NAME, "s2"]), |m| m.delete(&strings(&["s2"]))
    }
    /// In the middle, the child small: merged into its parent.
    DELETE_MIDDLE_BIG_BELOW {
        {
            let mut domain = line(&["external"])?;
            domain.fill(2 << 20)?;
            domain.create("s2", "external")?;
            domain.write_and_create("s3", "external")?;
            domain.write_everywhere()?;
            Ok(domain)
        },
        |_| words(&["delete", NAME, "s2"]), |m| m.delete(&strings(&["s2"]))
    }
    /// In the middle, the child big: the parent's data move up.
    DELETE_MIDDLE_BIG_ABOVE {
        {
            let mut domain = line(&["external", "external"])?;
            domain.fill(2 << 20)?;
            domain.create("s3", "external")?;
            domain.write_everywhere()?;
            Ok(domain)
        },
        |_| words(&["delete", NAME, "s2"]), |m| m.delete(&strings(&["s2"]))
    }
    /// A frozen layer that two others stand on.
    DELETE_WITH_SEVERAL_CHILDREN {
        fork("external"), |_| words(&["delete", NAME, "s1"]), |m| m.delete(&strings(&["s1"]))
    }
    /// A whole subtree, the present on another branch.
    DELETE_SUBTREE {
        {
            let mut domain = line(&["external", "mixed", "external"])?;
            domain.revert("s1")?;
            domain.write_everywhere()?;
            Ok(domain)
        },
        |_| words(&["delete", NAME, "s2", "--children"]),
        |m| m.delete(&m.subtree("s2"))
    }
    /// Several at once.
    DELETE_SEVERAL {
        line(&["external", "internal", "external", "mixed"]),
        |_| words(&["delete", NAME, "s1", "s3"]),
        |m| m.delete(&strings(&["s1", "s3"]))
    }
    /// An internal point of a frozen layer.
    DELETE_INTERNAL_UNDER_EXTERNAL {
        line(&["internal", "external"]), |_| words(&["delete", NAME, "s1"]), |m| m.delete(&strings(&["s1"]))
    }
    /// An external point whose child is internal in the layer above.
    DELETE_EXTERNAL_UNDER_INTERNAL {
        line(&["external", "internal"]), |_| words(&["delete", NAME, "s1"]), |m| m.delete(&strings(&["s1"]))
    }
    /// A domain becomes known.
    DOMAIN_ADD {
        {
            let mut domain = Domain::unregistered(&Shape::disks(2))?;
            domain.write_everywhere()?;
            Ok(domain)
        },
        |d| d.register_words(), |_| {}
    }
    /// A domain is forgotten.
    DOMAIN_REMOVE { line(&[]), |_| words(&["domain", "remove", NAME]), |_| {} }
    /// A lost catalogue comes back from what lies beside the images.
    IMPORT {
        {
            let domain = line(&["external", "mixed"])?;
            std::fs::remove_dir_all(domain.state())?;
            std::fs::create_dir(domain.state())?;
            Ok(domain)
        },
        |d| words(&["import", &d.paths(), "--name", NAME]), |_| {}
    }
}
