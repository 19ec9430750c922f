//! Trusted users, and other users who can write to a directory.

use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::OnceLock;

use crate::access::Writing;

/// Returns true for root, for the user who runs this process, and for the owner of `/`.
pub fn is_trusted(uid: u32) -> bool {
    static ROOT: OnceLock<u32> = OnceLock::new();
    // In a user namespace that does not map root, all that root owns has one other owner.
    let owner_of_all = *ROOT.get_or_init(|| std::fs::metadata("/").map_or(0, |about| about.uid()));
    uid == 0 || uid == owner_of_all || uid == rustix::process::geteuid().as_raw()
}

/// Users who can write a directory and are neither trusted nor the owner of a file in it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Writers {
    /// Its owner.
    Owner(u32),
    /// The members of its group.
    Group(u32),
    /// A user whom its access list names.
    NamedUser(u32),
    /// The members of a group that its access list names.
    NamedGroup(u32),
    /// Everybody.
    Everybody,
}

impl std::fmt::Display for Writers {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Owner(uid) => write!(f, "its owner, {}", named("/etc/passwd", "user", *uid)),
            Self::Group(gid) | Self::NamedGroup(gid) => {
                write!(f, "the members of {}", named("/etc/group", "group", *gid))
            }
            Self::NamedUser(uid) => f.write_str(&named("/etc/passwd", "user", *uid)),
            Self::Everybody => f.write_str("every user"),
        }
    }
}

/// A user or group by name, where the local files have one.
fn named(file: &str, what: &str, id: u32) -> String {
    let text = std::fs::read_to_string(file).unwrap_or_default();
    let id = id.to_string();
    let name = text.lines().find_map(|line| {
        let mut fields = line.split(':');
        let name = fields.next()?;
        (fields.nth(1)? == id).then(|| name.to_owned())
    });
    name.map_or_else(|| format!("{what} {id}"), |name| format!("{what} {name} ({id})"))
}

impl Writers {
    /// Command that removes their write access; `place` is its path, quoted for a shell.
    pub fn advice(&self, place: &str) -> String {
        match self {
            Self::Owner(_) => format!("give {place} to root, or to the user who runs domsnap"),
            Self::Group(_) => format!("`chmod g-w {place}`"),
            Self::NamedUser(uid) => format!("`setfacl -x u:{uid} {place}`"),
            Self::NamedGroup(gid) => format!("`setfacl -x g:{gid} {place}`"),
            Self::Everybody => format!("`chmod o-w {place}`"),
        }
    }
}

/// The users who can take away or replace the names of the file at `path` in `directory`, and who are neither
/// trusted, nor the file's owner, nor able to write the file itself. `None` where there are none.
///
/// In a directory with the sticky bit only its owner and a file's owner can do that. A user or a group that
/// can write the file too gains nothing by writing the directory. Neither does the group of one user, which
/// many systems give to each. Entries of access lists count as the mode's bits do.
///
/// # Errors
/// The system's.
pub fn foreign_writers(
    directory: &Path,
    path: &Path,
    file: &std::fs::Metadata,
) -> std::io::Result<Option<Writers>> {
    let about = std::fs::metadata(directory)?;
    let mode = about.mode();
    let is_known = |uid: u32| is_trusted(uid) || uid == file.uid();
    if !is_known(about.uid()) && !is_service(file.uid()) {
        return Ok(Some(Writers::Owner(about.uid())));
    }
    let sticky = mode & 0o1000 != 0;
    if sticky {
        return Ok(None);
    }
    if mode & 0o002 != 0 && file.mode() & 0o002 == 0 {
        return Ok(Some(Writers::Everybody));
    }
    // A link to a directory has no list of its own.
    let writing = Writing::of(&directory.canonicalize()?, mode)?;
    let of_file = Writing::of(path, file.mode())?;
    let group_gains = |gid: u32| {
        let writes_file = (of_file.own_group && file.gid() == gid) || of_file.groups.contains(&gid);
        !writes_file && !is_private(gid, &[about.uid(), file.uid()])
    };
    let user_gains = |uid: u32| !is_known(uid) && uid != about.uid() && !of_file.users.contains(&uid);
    Ok(beyond_the_owner(&writing, about.gid(), group_gains, user_gains))
}

/// Those whom a group's bits or an access list let write, and who are not to.
fn beyond_the_owner(
    writing: &Writing,
    group: u32,
    group_gains: impl Fn(u32) -> bool,
    user_gains: impl Fn(u32) -> bool,
) -> Option<Writers> {
    if writing.own_group && group_gains(group) {
        return Some(Writers::Group(group));
    }
    let groups = writing.groups.iter().copied().filter(|gid| group_gains(*gid)).map(Writers::NamedGroup);
    let users = writing.users.iter().copied().filter(|uid| user_gains(*uid)).map(Writers::NamedUser);
    groups.chain(users).next()
}

/// The first directory of `path` and those above it, or `path` itself where it is a file, that users who are
/// not trusted can write, and who they are: what is in it, or the way to it, is theirs to replace. Links are
/// resolved; what does not exist is passed over. `None` where all is trusted.
///
/// # Errors
/// The system's.
pub fn foreign_place(path: &Path) -> std::io::Result<Option<(PathBuf, Writers)>> {
    let real = path.ancestors().find_map(|above| {
        let above = if above.as_os_str().is_empty() { Path::new(".") } else { above };
        above.canonicalize().ok()
    });
    let itself = path.canonicalize().ok();
    for place in real.iter().flat_map(|real| real.ancestors()) {
        let about = std::fs::metadata(place)?;
        let (mode, owner) = (about.mode(), about.uid());
        // Whoever can make files in the place itself can make those that are looked for there.
        let is_sticky = mode & 0o1000 != 0 && itself.as_deref() != Some(place);
        let writers = if !is_trusted(owner) {
            Some(Writers::Owner(owner))
        } else if is_sticky {
            None
        } else if mode & 0o002 != 0 {
            Some(Writers::Everybody)
        } else {
            let writing = Writing::of(place, mode)?;
            let group_gains = |gid: u32| !is_private(gid, &[owner]);
            beyond_the_owner(&writing, about.gid(), group_gains, |uid| !is_trusted(uid))
        };
        if let Some(writers) = writers {
            return Ok(Some((place.to_owned(), writers)));
        }
    }
    Ok(None)
}

/// Returns true for the account of a service, such as the one that QEMU runs as. A hypervisor's manager gives
/// it the images of the user in whose directory they are, for as long as they are used.
fn is_service(uid: u32) -> bool {
    let text = std::fs::read_to_string("/etc/passwd").unwrap_or_default();
    let id = uid.to_string();
    uid != 0
        && text.lines().any(|line| {
            let fields: Vec<&str> = line.split(':').collect();
            fields.get(2) == Some(&id.as_str())
                && fields.get(6).is_some_and(|shell| shell.ends_with("/nologin") || shell.ends_with("/false"))
        })
}

/// Returns true where a group has no members but `users` and those that are trusted.
fn is_private(gid: u32, users: &[u32]) -> bool {
    if gid == 0 {
        return true;
    }
    let known = |uid: u32| is_trusted(uid) || users.contains(&uid);
    let passwd = std::fs::read_to_string("/etc/passwd").unwrap_or_default();
    let groups = std::fs::read_to_string("/etc/group").unwrap_or_default();
    let id = gid.to_string();
    let uid_of = |name: &str| {
        passwd.lines().find_map(|line| {
            let mut fields = line.split(':');
            (fields.next()? == name).then(|| fields.nth(1)?.parse::<u32>().ok()).flatten()
        })
    };
    let primary = passwd.lines().filter_map(|line| {
        let fields: Vec<&str> = line.split(':').collect();
        (fields.get(3) == Some(&id.as_str())).then(|| fields.get(2)?.parse::<u32>().ok()).flatten()
    });
    let mut found = false;
    for uid in primary {
        found = true;
        if !known(uid) {
            return false;
        }
    }
    for line in groups.lines() {
        let fields: Vec<&str> = line.split(':').collect();
        if fields.get(2) != Some(&id.as_str()) {
            continue;
        }
        found = true;
        for member in fields.get(3).into_iter().flat_map(|list| list.split(',')).filter(|m| !m.is_empty()) {
            if !uid_of(member).is_some_and(known) {
                return false;
            }
        }
    }
    // A group that no local file knows has the number of its user, where it is the group of one.
    found || users.contains(&gid)
}
