//! The operations that the crash suites interrupt: how to get there, the command, and what it means to the
//! model.

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
    pub args: fn(&Domain) -> Vec<String>,
    /// What the operation does to the model, once it has happened.
    pub effect: fn(&mut Model),
    /// Where the snapshots are looked for.
    pub look: Look,
    /// The kind of file system that `prepare` mounts, which takes root.
    pub mounts: Option<&'static str>,
}

/// Where the snapshots are looked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Look {
    /// In the domain's list, with parents and the current one.
    Tree,
    /// In the list of the one image, which knows names alone.
    Image,
}

fn args(args: &[&str]) -> Vec<String> {
    args.iter().map(|word| (*word).to_owned()).collect()
}

fn strings(names: &[&str]) -> Vec<String> {
    args(names)
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

/// Two raw disks, copied for the snapshots `s1`, `s2`, ..., with writes between and after.
fn raw_line(snapshots: usize) -> Result<Domain> {
    let mut domain = Domain::new(&Shape::raw(2))?;
    for number in 1..=snapshots {
        domain.create(&format!("s{number}"), "copy")?;
        domain.write_everywhere()?;
    }
    Ok(domain)
}

/// A disk, firmware variables and a TPM, with the snapshots `s1`, `s2`, ..., and writes between and after.
fn machine_line(snapshots: usize) -> Result<Domain> {
    let mut domain = Domain::new(&Shape::machine())?;
    for number in 1..=snapshots {
        domain.create(&format!("s{number}"), "external")?;
        domain.write_everywhere()?;
    }
    Ok(domain)
}

/// Two snapshots and one beside them: `s1` with the children `s2` and `side`, all of `kind`, the current
/// state on `side`.
fn fork(kind: &str) -> Result<Domain> {
    let mut domain = line(&[kind, kind])?;
    domain.revert("s1")?;
    domain.write_and_create("side", kind)?;
    domain.write_everywhere()?;
    Ok(domain)
}

/// `domain` after a revert to `name` that kept what it replaced, with writes after it.
fn kept(domain: Result<Domain>, name: &str) -> Result<Domain> {
    let mut domain = domain?;
    domain.domsnap().done(&["revert", NAME, name, "--undo=free"])?;
    domain.model.revert_and_keep(name);
    domain.write_everywhere()?;
    Ok(domain)
}

/// `domain` with a directory for clones.
fn cloneable(domain: Result<Domain>) -> Result<Domain> {
    let domain = domain?;
    std::fs::create_dir(domain.clones())?;
    Ok(domain)
}

fn clone_args(domain: &Domain, snapshot: &str, rest: &[&str]) -> Vec<String> {
    let place = domain.clones().display().to_string();
    args(&[&["clone", NAME, snapshot, "web", "--to", &place], rest].concat())
}

/// One image that no domain has, with the internal snapshots `names`.
fn image(names: &[&str]) -> Result<Domain> {
    let mut domain = Domain::unregistered(&Shape::disks(1))?;
    domain.write_everywhere()?;
    for name in names {
        domain.domsnap().done(&disk(&domain, "create", &[name, "--internal"]))?;
        domain.model.create(name);
        domain.write_everywhere()?;
    }
    Ok(domain)
}

fn disk(domain: &Domain, operation: &str, rest: &[&str]) -> Vec<String> {
    let path = domain.path("vda").display().to_string();
    args(&[&["disk", operation, &path], rest].concat())
}

macro_rules! scenarios {
    ($($(#[$doc:meta])* $name:ident $look:ident $(on $mounts:ident)? { $prepare:expr, $args:expr, $effect:expr })*) => {
        $($(#[$doc])* pub const $name: Scenario = Scenario {
            name: stringify!($name),
            prepare: || $prepare,
            args: $args,
            effect: $effect,
            look: Look::$look,
            mounts: [$(Some(stringify!($mounts)),)? None][0],
        };)*

        /// All of them.
        pub const ALL: &[Scenario] = &[$($name),*];
    };
}

pub mod reflink;

scenarios! {
    /// The first snapshot: images that were never seen before, internal.
    CREATE_INTERNAL Tree { line(&[]), |d| d.create_args("new", "internal"), |m| m.create("new") }
    /// The first snapshot, external: the images get their permanent names.
    CREATE_EXTERNAL Tree { line(&[]), |d| d.create_args("new", "external"), |m| m.create("new") }
    /// One disk internal, one external.
    CREATE_MIXED Tree { line(&[]), |d| d.create_args("new", "mixed"), |m| m.create("new") }
    /// A further internal snapshot on top of external ones.
    CREATE_INTERNAL_ON_EXTERNAL Tree {
        line(&["external"]), |d| d.create_args("new", "internal"), |m| m.create("new")
    }
    /// A further external snapshot of images that hold internal ones.
    CREATE_EXTERNAL_ON_INTERNAL Tree {
        line(&["internal"]), |d| d.create_args("new", "external"), |m| m.create("new")
    }
    /// Internal points of the active images: applied in place.
    REVERT_INTERNAL_IN_PLACE Tree {
        line(&["internal", "internal"]), |_| args(&["revert", NAME, "s1"]), |m| m.revert("s1")
    }
    /// Internal points of images that other points depend on: copied out.
    REVERT_INTERNAL_MATERIALISED Tree {
        line(&["internal", "external"]), |_| args(&["revert", NAME, "s1"]), |m| m.revert("s1")
    }
    /// An internal point of a layer that nothing depends on and nothing writes: applied in it, and switched
    /// to.
    REVERT_INTERNAL_OF_A_FROZEN_LEAF Tree {
        {
            let mut domain = line(&["external", "internal"])?;
            domain.revert("s1")?;
            domain.write_everywhere()?;
            Ok(domain)
        },
        |_| args(&["revert", NAME, "s2"]), |m| m.revert("s2")
    }
    /// To a frozen layer.
    REVERT_EXTERNAL Tree {
        line(&["external", "external"]), |_| args(&["revert", NAME, "s1"]), |m| m.revert("s1")
    }
    /// The current state gets a name first.
    REVERT_SAVING_CURRENT Tree {
        line(&["external", "mixed"]),
        |_| args(&["revert", NAME, "s1", "--save-current=kept"]),
        |m| { m.create("kept"); m.revert("s1") }
    }
    /// Three clones of a chain of frozen layers.
    CLONE_EXTERNAL Tree {
        cloneable(line(&["external", "external"])), |d| clone_args(d, "s2", &["--count", "3"]),
        |m| m.clone_to(&["web-1", "web-2", "web-3"], "s2")
    }
    /// A clone of internal snapshots, which are copied out, and of a frozen layer.
    CLONE_MIXED Tree {
        cloneable(line(&["mixed", "mixed"])), |d| clone_args(d, "s1", &[]), |m| m.clone_to(&["web"], "s1")
    }
    /// Two clones that share nothing.
    CLONE_FULL Tree {
        cloneable(line(&["external", "mixed"])), |d| clone_args(d, "s2", &["--full", "--count", "2"]),
        |m| m.clone_to(&["web-1", "web-2"], "s2")
    }
    /// Two clones of copies of raw files.
    RAW_CLONE Tree {
        cloneable(raw_line(1)), |d| clone_args(d, "s1", &["--count", "2"]),
        |m| m.clone_to(&["web-1", "web-2"], "s1")
    }
    /// The only snapshot, external: the current state is merged down or takes its place.
    DELETE_LEAF_EXTERNAL Tree {
        line(&["external", "external"]), |_| args(&["delete", NAME, "s2"]), |m| m.delete(&strings(&["s2"]))
    }
    /// A leaf beside the current state: no merge at all.
    DELETE_LEAF_OFF_THE_ACTIVE_CHAIN Tree {
        fork("external"), |_| args(&["delete", NAME, "s2"]), |m| m.delete(&strings(&["s2"]))
    }
    /// An internal leaf.
    DELETE_LEAF_INTERNAL Tree {
        line(&["internal", "internal"]), |_| args(&["delete", NAME, "s2"]), |m| m.delete(&strings(&["s2"]))
    }
    /// In the middle, the child small: merged into its parent.
    DELETE_MIDDLE_BIG_BELOW Tree {
        {
            let mut domain = line(&["external"])?;
            domain.fill(2 << 20)?;
            domain.create("s2", "external")?;
            domain.write_and_create("s3", "external")?;
            domain.write_everywhere()?;
            Ok(domain)
        },
        |_| args(&["delete", NAME, "s2"]), |m| m.delete(&strings(&["s2"]))
    }
    /// In the middle, the child big: the parent's data move up.
    DELETE_MIDDLE_BIG_ABOVE Tree {
        {
            let mut domain = line(&["external", "external"])?;
            domain.fill(2 << 20)?;
            domain.create("s3", "external")?;
            domain.write_everywhere()?;
            Ok(domain)
        },
        |_| args(&["delete", NAME, "s2"]), |m| m.delete(&strings(&["s2"]))
    }
    /// The current state small: merged into the layer below, which the configured path then names.
    DELETE_CURRENT_BIG_BELOW Tree {
        {
            let mut domain = line(&["external"])?;
            domain.fill(2 << 20)?;
            domain.create("s2", "external")?;
            domain.write_everywhere()?;
            Ok(domain)
        },
        |_| args(&["delete", NAME, "s2"]), |m| m.delete(&strings(&["s2"]))
    }
    /// Several, the one between the biggest: what is below and the current state are merged into it.
    DELETE_SEVERAL_BIG_BETWEEN Tree {
        {
            let mut domain = line(&["external", "external"])?;
            domain.fill(2 << 20)?;
            domain.create("s3", "external")?;
            domain.write_everywhere()?;
            Ok(domain)
        },
        |_| args(&["delete", NAME, "s2", "s3"]), |m| m.delete(&strings(&["s2", "s3"]))
    }
    /// The only one, the current state small: one image without another name is left.
    DELETE_ONLY_BIG_BELOW Tree {
        {
            let mut domain = line(&[])?;
            domain.fill(2 << 20)?;
            domain.create("s1", "external")?;
            domain.write_everywhere()?;
            Ok(domain)
        },
        |_| args(&["delete", NAME, "s1"]), |m| m.delete(&strings(&["s1"]))
    }
    /// A frozen layer that two others depend on.
    DELETE_WITH_SEVERAL_CHILDREN Tree {
        fork("external"), |_| args(&["delete", NAME, "s1"]), |m| m.delete(&strings(&["s1"]))
    }
    /// A whole subtree, the current state on another branch.
    DELETE_SUBTREE Tree {
        {
            let mut domain = line(&["external", "mixed", "external"])?;
            domain.revert("s1")?;
            domain.write_everywhere()?;
            Ok(domain)
        },
        |_| args(&["delete", NAME, "s2", "--children"]),
        |m| m.delete(&m.subtree("s2"))
    }
    /// Several at once.
    DELETE_SEVERAL Tree {
        line(&["external", "internal", "external", "mixed"]),
        |_| args(&["delete", NAME, "s1", "s3"]),
        |m| m.delete(&strings(&["s1", "s3"]))
    }
    /// An internal point of a frozen layer.
    DELETE_INTERNAL_UNDER_EXTERNAL Tree {
        line(&["internal", "external"]), |_| args(&["delete", NAME, "s1"]), |m| m.delete(&strings(&["s1"]))
    }
    /// An external point whose child is internal in the layer above.
    DELETE_EXTERNAL_UNDER_INTERNAL Tree {
        line(&["external", "internal"]), |_| args(&["delete", NAME, "s1"]), |m| m.delete(&strings(&["s1"]))
    }
    /// A domain becomes known.
    DOMAIN_ADD Tree {
        {
            let mut domain = Domain::unregistered(&Shape::disks(2))?;
            domain.write_everywhere()?;
            Ok(domain)
        },
        |d| d.register_args(), |_| {}
    }
    /// A domain is forgotten.
    DOMAIN_REMOVE Tree { line(&[]), |_| args(&["domain", "remove", NAME]), |_| {} }
    /// A lost catalogue comes back from what lies beside the images.
    IMPORT Tree {
        {
            let domain = line(&["external", "mixed"])?;
            std::fs::remove_dir_all(domain.state())?;
            std::fs::create_dir(domain.state())?;
            Ok(domain)
        },
        |d| args(&["import", &d.paths(), "--name", NAME]), |_| {}
    }
    /// One image, no domain, internal.
    DISK_CREATE_INTERNAL Image { image(&[]), |d| disk(d, "create", &["new", "--internal"]), |m| m.create("new") }
    /// One image, no domain, external.
    DISK_CREATE_EXTERNAL Image { image(&[]), |d| disk(d, "create", &["new", "--external"]), |m| m.create("new") }
    /// One image, back to an internal snapshot.
    DISK_REVERT Image { image(&["one", "two"]), |d| disk(d, "revert", &["one"]), |m| m.revert("one") }
    /// One image, several internal snapshots in one pass.
    DISK_DELETE Image {
        image(&["one", "two", "three", "four"]),
        |d| disk(d, "delete", &["one", "three"]),
        |m| m.delete(&strings(&["one", "three"]))
    }
    /// A revert that keeps what it replaces, as a tag, and gives up what another one kept.
    REVERT_KEEPING_INTERNAL Tree {
        kept(line(&["internal", "internal"]), "s2"),
        |_| args(&["revert", NAME, "s1", "--undo=free"]), |m| m.revert_and_keep("s1")
    }
    /// As before, with layers.
    REVERT_KEEPING_EXTERNAL Tree {
        kept(line(&["external", "mixed"]), "s2"),
        |_| args(&["revert", NAME, "s1", "--undo=free"]), |m| m.revert_and_keep("s1")
    }
    /// Back to what a revert replaced: a tag.
    UNDO_INTERNAL Tree {
        kept(line(&["internal", "internal"]), "s1"), |_| args(&["undo", NAME]), |m| m.undo()
    }
    /// Back to what a revert replaced: a layer.
    UNDO_EXTERNAL Tree {
        kept(line(&["external", "mixed"]), "s1"), |_| args(&["undo", NAME]), |m| m.undo()
    }
    /// What a revert replaced is given up.
    UNDO_FORGET Tree {
        kept(line(&["external", "mixed"]), "s1"),
        |_| args(&["undo", NAME, "--forget"]), |m| m.previous = None
    }
    /// A snapshot after a revert: what that replaced is given up.
    CREATE_AFTER_REVERT Tree {
        kept(line(&["external", "mixed"]), "s1"), |d| d.create_args("new", "mixed"), |m| m.create("new")
    }
    /// Another name: records alone.
    RENAME Tree {
        line(&["internal", "external"]), |_| args(&["rename", NAME, "s1", "renamed"]), |m| m.rename("s1", "renamed")
    }
    /// The last hold of a snapshot ends, whose deletion waited for that.
    RELEASE_DEFERRED Tree {
        {
            let domain = line(&["external", "external"])?;
            domain.domsnap().done(&["hold", NAME, "s1", "--holder", "a"])?;
            domain.domsnap().done(&["delete", NAME, "s1", "--defer"])?;
            Ok(domain)
        },
        |_| args(&["release", NAME, "s1", "--holder", "a"]), |m| m.delete(&strings(&["s1"]))
    }
    /// Raw files, with what a revert replaces kept.
    RAW_REVERT_KEEPING Tree {
        kept(raw_line(2), "s2"), |_| args(&["revert", NAME, "s1", "--undo=free"]), |m| m.revert_and_keep("s1")
    }
    /// Raw files, back to what a revert replaced.
    RAW_UNDO Tree { kept(raw_line(2), "s1"), |_| args(&["undo", NAME]), |m| m.undo() }
    /// Raw files, copied.
    RAW_CREATE Tree { raw_line(1), |d| d.create_args("new", "copy"), |m| m.create("new") }
    /// Raw files, replaced by copies of a point.
    RAW_REVERT Tree { raw_line(2), |_| args(&["revert", NAME, "s1"]), |m| m.revert("s1") }
    /// Raw files, with the current state kept.
    RAW_REVERT_SAVING_CURRENT Tree {
        raw_line(2),
        |_| args(&["revert", NAME, "s1", "--save-current=kept"]),
        |m| { m.create("kept"); m.revert("s1"); }
    }
    /// Points of raw files.
    RAW_DELETE Tree {
        raw_line(3), |_| args(&["delete", NAME, "s1", "s3"]), |m| m.delete(&strings(&["s1", "s3"]))
    }
    /// A disk with the state of its machine, copied at the same instant.
    MACHINE_CREATE Tree { machine_line(1), |d| d.create_args("new", "external"), |m| m.create("new") }
    /// The state of the machine goes back with the disk, and what is replaced is kept.
    MACHINE_REVERT_KEEPING Tree {
        kept(machine_line(2), "s2"),
        |_| args(&["revert", NAME, "s1", "--undo=free"]), |m| m.revert_and_keep("s1")
    }
    /// Points of the state of a machine.
    MACHINE_DELETE Tree {
        machine_line(3), |_| args(&["delete", NAME, "s1", "s3"]), |m| m.delete(&strings(&["s1", "s3"]))
    }
    /// Two clones, each with firmware variables and a TPM of its own.
    MACHINE_CLONE Tree {
        cloneable(machine_line(1)), |d| clone_args(d, "s1", &["--count", "2"]),
        |m| m.clone_to(&["web-1", "web-2"], "s1")
    }
}

/// Makes a module with a test of each scenario of `$list` that is named. With `all`, the list must be whole.
#[macro_export]
macro_rules! scenario_tests {
    ($(#[$doc:meta])* mod $module:ident: $suite:ident::$attempt:ident, $list:ident, all; $($test:ident $name:ident)*) => {
        $(#[$doc])*
        mod $module {
            use super::*;

            $(#[test]
            fn $test() {
                $suite::$attempt($list::$name).unwrap_or_else(|error| panic!("{error:#}"));
            })*

            #[test]
            fn no_scenario_is_missing() {
                // Their order says nothing.
                let all: std::collections::BTreeSet<_> = $list::ALL.iter().map(|scenario| scenario.name).collect();
                assert_eq!(std::collections::BTreeSet::from([$(stringify!($name)),*]), all);
            }
        }
    };
    ($(#[$doc:meta])* mod $module:ident: $suite:ident::$attempt:ident, $list:ident; $($test:ident $name:ident)*) => {
        $(#[$doc])*
        mod $module {
            use super::*;

            $(#[test]
            fn $test() {
                $suite::$attempt($list::$name).unwrap_or_else(|error| panic!("{error:#}"));
            })*
        }
    };
}

/// Makes a module with a test of every scenario.
#[macro_export]
macro_rules! all_scenario_tests {
    ($(#[$doc:meta])* mod $module:ident: $suite:ident::$attempt:ident) => {
        use $crate::scenario as every;
        $crate::scenario_tests! {
            $(#[$doc])*
            mod $module: $suite::$attempt, every, all;
            create_internal CREATE_INTERNAL
            create_external CREATE_EXTERNAL
            create_mixed CREATE_MIXED
            create_internal_on_external CREATE_INTERNAL_ON_EXTERNAL
            create_external_on_internal CREATE_EXTERNAL_ON_INTERNAL
            revert_internal_in_place REVERT_INTERNAL_IN_PLACE
            revert_internal_materialised REVERT_INTERNAL_MATERIALISED
            revert_internal_of_a_frozen_leaf REVERT_INTERNAL_OF_A_FROZEN_LEAF
            revert_external REVERT_EXTERNAL
            revert_saving_current REVERT_SAVING_CURRENT
            delete_leaf_external DELETE_LEAF_EXTERNAL
            delete_leaf_off_the_active_chain DELETE_LEAF_OFF_THE_ACTIVE_CHAIN
            delete_leaf_internal DELETE_LEAF_INTERNAL
            delete_middle_big_below DELETE_MIDDLE_BIG_BELOW
            delete_middle_big_above DELETE_MIDDLE_BIG_ABOVE
            delete_current_big_below DELETE_CURRENT_BIG_BELOW
            delete_several_big_between DELETE_SEVERAL_BIG_BETWEEN
            delete_only_big_below DELETE_ONLY_BIG_BELOW
            delete_with_several_children DELETE_WITH_SEVERAL_CHILDREN
            delete_subtree DELETE_SUBTREE
            delete_several DELETE_SEVERAL
            delete_internal_under_external DELETE_INTERNAL_UNDER_EXTERNAL
            delete_external_under_internal DELETE_EXTERNAL_UNDER_INTERNAL
            domain_add DOMAIN_ADD
            domain_remove DOMAIN_REMOVE
            import IMPORT
            disk_create_internal DISK_CREATE_INTERNAL
            disk_create_external DISK_CREATE_EXTERNAL
            disk_revert DISK_REVERT
            disk_delete DISK_DELETE
            revert_keeping_internal REVERT_KEEPING_INTERNAL
            revert_keeping_external REVERT_KEEPING_EXTERNAL
            undo_internal UNDO_INTERNAL
            undo_external UNDO_EXTERNAL
            undo_forget UNDO_FORGET
            create_after_revert CREATE_AFTER_REVERT
            rename RENAME
            release_deferred RELEASE_DEFERRED
            clone_external CLONE_EXTERNAL
            clone_mixed CLONE_MIXED
            clone_full CLONE_FULL
            raw_clone RAW_CLONE
            raw_revert_keeping RAW_REVERT_KEEPING
            raw_undo RAW_UNDO
            raw_create RAW_CREATE
            raw_revert RAW_REVERT
            raw_revert_saving_current RAW_REVERT_SAVING_CURRENT
            raw_delete RAW_DELETE
            machine_create MACHINE_CREATE
            machine_revert_keeping MACHINE_REVERT_KEEPING
            machine_delete MACHINE_DELETE
            machine_clone MACHINE_CLONE
        }
    };
}
