//! Access to a file and its storage: owner, group, mode, access lists, extended attributes, copy-on-write.

use std::ffi::CString;
use std::fs::{File, Permissions};
use std::io;
use std::os::unix::fs::{MetadataExt, PermissionsExt, fchown};

use rustix::fs::{
    IFlags, XattrFlags, fgetxattr, flistxattr, fremovexattr, fsetxattr, ioctl_getflags, ioctl_setflags,
};
use rustix::io::Errno;

use crate::access::{ACCESS_LIST as ACCESS_LIST_NAME, GROUP_OF_FILE, MASK};

/// The access list that `acl(5)` describes.
const ACCESS_LIST: &[u8] = ACCESS_LIST_NAME.as_bytes();

/// The most bytes of one attribute (`XATTR_SIZE_MAX`), and of the list of their names (`XATTR_LIST_MAX`).
const LONGEST: usize = 64 << 10;

/// Attributes of a file that another is made from. Read once, from an open file, so that no other file can
/// come between the reading and the making.
#[derive(Debug, Clone)]
pub struct Attributes {
    uid: u32,
    gid: u32,
    mode: u32,
    extended: Vec<(CString, Vec<u8>)>,
    in_place: bool,
}

impl Attributes {
    /// Reads those of an open file.
    ///
    /// # Errors
    /// The system's.
    pub fn of(model: &File) -> io::Result<Self> {
        let about = model.metadata()?;
        let mut extended = Vec::new();
        for name in names(model)? {
            let mut value = vec![0; LONGEST];
            match fgetxattr(model, &name, &mut value[..]) {
                Ok(length) => {
                    value.truncate(length);
                    extended.push((name, value));
                }
                // One that this process may not read, or that went away.
                Err(Errno::NODATA | Errno::PERM | Errno::ACCESS | Errno::OPNOTSUPP) => {}
                Err(errno) => return Err(errno.into()),
            }
        }
        let in_place = ioctl_getflags(model).is_ok_and(|flags| flags.contains(IFlags::NOCOW));
        Ok(Self { uid: about.uid(), gid: about.gid(), mode: about.mode(), extended, in_place })
    }

    /// Gives them to `file`, which is new, empty, and open to its owner alone.
    ///
    /// The owner can write it whatever the model's mode says: it may be the active image next. Where the
    /// owner or the group cannot be given, no user gets more access than before: the group no more than
    /// everybody else. Where the access list cannot be given, the group gets its own entry's rights and not
    /// the mask's.
    ///
    /// # Errors
    /// The system's, where the mode or an attribute of the users' own cannot be set.
    pub fn give(&self, file: &File) -> io::Result<()> {
        if self.in_place
            && let Ok(flags) = ioctl_getflags(file)
            && !flags.contains(IFlags::NOCOW)
        {
            // On a file system that has no such thing the file is as any other there.
            let _ = ioctl_setflags(file, flags | IFlags::NOCOW);
        }
        let is = file.metadata()?;
        let has_list = self.extended.iter().any(|(name, _)| name.as_bytes() == ACCESS_LIST);
        if !has_list {
            // One that the file got from its directory's default: with the model's mode as its mask it would
            // let others in.
            match fremovexattr(file, ACCESS_LIST) {
                Ok(()) | Err(Errno::NODATA | Errno::OPNOTSUPP | Errno::NOSYS) => {}
                Err(errno) => return Err(errno.into()),
            }
        }
        // Not allowed to most: then the group alone may still be.
        if (is.uid() != self.uid || is.gid() != self.gid)
            && fchown(file, Some(self.uid), Some(self.gid)).is_err()
        {
            let _ = fchown(file, None, Some(self.gid));
        }
        let is = file.metadata()?;
        let (same_owner, same_group) = (is.uid() == self.uid, is.gid() == self.gid);
        let has_list = self.extended.iter().any(|(name, _)| name.as_bytes() == ACCESS_LIST);
        if !has_list {
            // What a directory gives to each new file (its default list) lets in users who may not use the
            // model: the mode below would let them in, because it sets the list's mask.
            match fremovexattr(file, ACCESS_LIST_NAME) {
                Ok(()) | Err(Errno::NODATA | Errno::OPNOTSUPP | Errno::NOSYS) => {}
                Err(errno) => return Err(errno.into()),
            }
        }
        let mut group_rights = None;
        for (name, value) in &self.extended {
            if !is_copied(name.as_bytes()) {
                continue;
            }
            let is_list = name.as_bytes() == ACCESS_LIST;
            let mut value = std::borrow::Cow::Borrowed(value.as_slice());
            if is_list {
                let others = self.mode & 0o007;
                if !same_group {
                    value = limited_group(&value, others).into();
                }
                group_rights = Some(group_of(&value).unwrap_or(0));
                // Until the list is set, only the owner may use the file.
                file.set_permissions(Permissions::from_mode(0o600))?;
            }
            match fsetxattr(file, name, &value, XattrFlags::empty()) {
                Ok(()) if is_list => group_rights = None,
                Ok(()) => {}
                // Attributes that only some processes, kernels or file systems can set. The rights are set
                // below.
                Err(Errno::PERM | Errno::ACCESS | Errno::OPNOTSUPP | Errno::INVAL) => {}
                Err(errno) => return Err(errno.into()),
            }
        }
        if has_list && group_rights.is_none() {
            // The list has set the mode's bits; the owner's write right is the only one that it may lack.
            let mode = file.metadata()?.mode() & 0o7777;
            return match mode | 0o600 {
                wanted if wanted == mode => Ok(()),
                wanted => file.set_permissions(Permissions::from_mode(wanted)),
            };
        }
        let model = match group_rights {
            Some(rights) => self.mode & !0o070 | rights << 3,
            None => self.mode,
        };
        let mode = granted(model, same_owner, same_group);
        if file.metadata()?.mode() & 0o7777 == mode {
            return Ok(());
        }
        file.set_permissions(Permissions::from_mode(mode))
    }
}

/// Gives `file` the attributes of `model`; see [`Attributes::give`].
///
/// # Errors
/// The system's.
pub fn copy_attributes(model: &File, file: &File) -> io::Result<()> {
    Attributes::of(model)?.give(file)
}

fn names(file: &File) -> io::Result<Vec<CString>> {
    let mut list = vec![0; LONGEST];
    let length = match flistxattr(file, &mut list[..]) {
        Ok(length) => length,
        Err(Errno::OPNOTSUPP | Errno::NOSYS) => 0,
        Err(errno) => return Err(errno.into()),
    };
    let list = list.get(..length).unwrap_or_default();
    Ok(list.split(|byte| *byte == 0).filter(|n| !n.is_empty()).filter_map(|n| CString::new(n).ok()).collect())
}

/// Returns true for an attribute that says who may use the file, or that its users gave it. Others belong to
/// the one file that they were made for: signatures, capabilities of programs, marks of a file system.
fn is_copied(name: &[u8]) -> bool {
    const OWN: [&[u8]; 6] = [
        b"security.capability",
        b"security.ima",
        b"security.evm",
        b"trusted.overlay.",
        b"system.posix_acl_default",
        b"btrfs.",
    ];
    !OWN.iter().any(|own| name.starts_with(own))
}

/// The mode of a file made from one of mode `model`, with the same owner and group or not. The owner can
/// always write: it may be the active image next.
fn granted(model: u32, same_owner: bool, same_group: bool) -> u32 {
    let (owner, group, other) = (model & 0o600, model & 0o060, model & 0o006);
    // Who owned the model and not this file is one of the others now; whoever owns this file made it.
    let group = if same_group { group } else { group & (other << 3) };
    let owner = if same_owner { owner | 0o200 } else { 0o600 };
    owner | 0o400 | group | other
}

/// Its entries: kind, rights and where the rights stand. The head has 4 bytes, an entry 8: kind, rights (2
/// bytes each, little endian), id.
fn entries(list: &[u8]) -> impl Iterator<Item = (u16, u16, usize)> + '_ {
    let all = list.get(4..).unwrap_or_default().as_chunks::<8>().0;
    all.iter().enumerate().map(|(number, [k0, k1, r0, r1, ..])| {
        (u16::from_le_bytes([*k0, *k1]), u16::from_le_bytes([*r0, *r1]), 4 + number * 8 + 2)
    })
}

/// The rights of the file's own group: those of its entry that the mask lets through.
fn group_of(list: &[u8]) -> Option<u32> {
    let of = |kind| entries(list).find(|(found, ..)| *found == kind).map(|(_, rights, _)| u32::from(rights));
    Some(of(GROUP_OF_FILE)? & of(MASK).unwrap_or(0o7) & 0o6)
}

/// The list with no more rights for the file's own group, which is another one now, than everybody has.
fn limited_group(list: &[u8], others: u32) -> Vec<u8> {
    let mut limited = list.to_vec();
    let group = entries(list).find(|(kind, ..)| *kind == GROUP_OF_FILE);
    if let Some((_, rights, at)) = group
        && let Some(place) = limited.get_mut(at..at + 2)
    {
        let allowed = rights & u16::try_from(others & 0o7).unwrap_or(0);
        place.copy_from_slice(&allowed.to_le_bytes());
    }
    limited
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_user_gains_read_access() {
        assert_eq!(granted(0o100644, true, true), 0o644);
        assert_eq!(granted(0o100660, true, true), 0o660);
        assert_eq!(granted(0o100660, true, false), 0o600);
        assert_eq!(granted(0o100664, false, false), 0o644);
        assert_eq!(granted(0o104755, true, true), 0o644);
        assert_eq!(granted(0o100400, true, true), 0o600);
    }

    #[test]
    fn a_new_file_gets_the_mode_of_its_model() {
        let dir = tempfile::tempdir().unwrap();
        let (model, path) = (dir.path().join("model"), dir.path().join("new"));
        std::fs::write(&model, b"").unwrap();
        std::fs::set_permissions(&model, Permissions::from_mode(0o640)).unwrap();
        let file = File::create(&path).unwrap();
        copy_attributes(&File::open(&model).unwrap(), &file).unwrap();
        assert_eq!(std::fs::metadata(&path).unwrap().mode() & 0o7777, 0o640);
    }

    /// user::rw-, user:64055:rw-, group::---, mask::rw-, other::---
    fn access_list() -> Vec<u8> {
        let mut list = 2u32.to_le_bytes().to_vec();
        for (kind, rights, id) in
            [(1u16, 6u16, u32::MAX), (2, 6, 64055), (4, 0, u32::MAX), (16, 6, u32::MAX), (32, 0, u32::MAX)]
        {
            list.extend(kind.to_le_bytes());
            list.extend(rights.to_le_bytes());
            list.extend(id.to_le_bytes());
        }
        list
    }

    #[test]
    fn the_group_has_its_own_rights_and_not_the_masks() {
        let list = access_list();
        assert_eq!(group_of(&list), Some(0));
        let mut open = list.clone();
        open[4 + 2 * 8 + 2] = 6;
        assert_eq!(group_of(&open), Some(6));
        assert_eq!(group_of(&limited_group(&open, 4)), Some(4));
        assert_eq!(limited_group(&list, 0), list);
    }

    /// A default access list of the directory is no right to what had none.
    #[test]
    fn no_list_is_taken_from_the_directory() {
        let dir = tempfile::tempdir().unwrap();
        let model = File::create(dir.path().join("model")).unwrap();
        model.set_permissions(Permissions::from_mode(0o640)).unwrap();
        let above = File::open(dir.path()).unwrap();
        if fsetxattr(&above, "system.posix_acl_default", &access_list(), XattrFlags::empty()).is_err() {
            eprintln!("left out: the file system of {} has no access lists", dir.path().display());
            return;
        }
        let file = File::create(dir.path().join("new")).unwrap();
        copy_attributes(&model, &file).unwrap();
        assert!(!names(&file).unwrap().iter().any(|name| name.as_bytes() == ACCESS_LIST));
        assert_eq!(file.metadata().unwrap().mode() & 0o7777, 0o640);
    }

    #[test]
    fn default_acl_grants_no_access() {
        let dir = tempfile::tempdir().unwrap();
        let model = File::create(dir.path().join("model")).unwrap();
        model.set_permissions(Permissions::from_mode(0o660)).unwrap();
        let default = "system.posix_acl_default";
        if rustix::fs::setxattr(dir.path(), default, &access_list(), XattrFlags::empty()).is_err() {
            eprintln!("left out: the file system of {} has no access lists", dir.path().display());
            return;
        }
        let file = File::create(dir.path().join("new")).unwrap();
        assert!(fgetxattr(&file, ACCESS_LIST_NAME, &mut [0; 256][..]).is_ok());
        copy_attributes(&model, &file).unwrap();
        assert_eq!(fgetxattr(&file, ACCESS_LIST_NAME, &mut [0; 256][..]), Err(Errno::NODATA));
        assert_eq!(file.metadata().unwrap().mode() & 0o7777, 0o660);
    }

    #[test]
    fn access_lists_and_attributes_of_users_are_copied() {
        let dir = tempfile::tempdir().unwrap();
        let model = File::create(dir.path().join("model")).unwrap();
        let list = fsetxattr(&model, ACCESS_LIST, &access_list(), XattrFlags::empty());
        let note = fsetxattr(&model, "user.note", b"kept", XattrFlags::empty());
        if list.is_err() || note.is_err() {
            eprintln!("left out: the file system of {} has no access lists", dir.path().display());
            return;
        }
        let file = File::create(dir.path().join("new")).unwrap();
        copy_attributes(&model, &file).unwrap();
        let read = |name: &[u8]| {
            let mut value = vec![0; 256];
            let length = fgetxattr(&file, name, &mut value[..]).unwrap();
            value.truncate(length);
            value
        };
        assert_eq!(read(ACCESS_LIST), access_list());
        assert_eq!(read(b"user.note"), b"kept");
        assert_eq!(file.metadata().unwrap().mode() & 0o7777, model.metadata().unwrap().mode() & 0o7777);
    }
}
