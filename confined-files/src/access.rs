//! Access lists (`acl(5)`) as the system gives them: a head of 4 bytes (version 2), then 8 bytes an entry:
//! kind, rights (2 bytes each, little endian), and the number of a user or group (`linux/posix_acl_xattr.h`).

use std::io;
use std::path::Path;

use rustix::fs::lgetxattr;
use rustix::io::Errno;

/// The access list of a file.
pub(crate) const ACCESS_LIST: &str = "system.posix_acl_access";

/// Kinds of entries.
const USER: u16 = 0x02;
pub(crate) const GROUP_OF_FILE: u16 = 0x04;
const GROUP: u16 = 0x08;
pub(crate) const MASK: u16 = 0x10;

const WRITE: u16 = 0o2;

/// The most bytes of one attribute (`XATTR_SIZE_MAX`).
const LONGEST: usize = 64 << 10;

/// Users and groups with write access to a file, other than its owner and everybody.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Writing {
    /// Users with an entry of their own.
    pub(crate) users: Vec<u32>,
    /// Groups with an entry of their own.
    pub(crate) groups: Vec<u32>,
    /// Returns true for the file's own group. The mode has the mask in that place, where there is a list.
    pub(crate) own_group: bool,
}

impl Writing {
    /// Of the file itself, of mode `mode`; a link is not followed.
    pub(crate) fn of(path: &Path, mode: u32) -> io::Result<Self> {
        let mut list = vec![0; LONGEST];
        match lgetxattr(path, ACCESS_LIST, &mut list[..]) {
            Ok(length) => {
                list.truncate(length);
                Self::read(&list)
            }
            Err(Errno::NODATA | Errno::OPNOTSUPP | Errno::NOSYS) => {
                Ok(Self { own_group: mode & 0o020 != 0, ..Self::default() })
            }
            Err(errno) => Err(errno.into()),
        }
    }

    fn read(list: &[u8]) -> io::Result<Self> {
        let Some((&[2, 0, 0, 0], entries)) = list.split_first_chunk::<4>() else {
            return Err(io::Error::new(io::ErrorKind::InvalidData, "an access list of an unknown version"));
        };
        let entries = entries.as_chunks::<8>().0;
        let all = entries.iter().map(|[k0, k1, r0, r1, id @ ..]| {
            (u16::from_le_bytes([*k0, *k1]), u16::from_le_bytes([*r0, *r1]), u32::from_le_bytes(*id))
        });
        let mask = all.clone().find(|(kind, ..)| *kind == MASK).map_or(0o7, |(_, rights, _)| rights);
        let mut writing = Self::default();
        for (kind, _, id) in all.filter(|(_, rights, _)| rights & mask & WRITE != 0) {
            match kind {
                USER => writing.users.push(id),
                GROUP => writing.groups.push(id),
                GROUP_OF_FILE => writing.own_group = true,
                _ => {}
            }
        }
        Ok(writing)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_mask_limits_all_but_owner_and_everybody() {
        let list = |mask: u16| {
            let mut list = 2u32.to_le_bytes().to_vec();
            for (kind, rights, id) in [
                (1, 7, u32::MAX),
                (2, 7, 1000),
                (2, 5, 1001),
                (4, 5, u32::MAX),
                (8, 6, 100),
                (16, mask, u32::MAX),
            ] {
                list.extend(u16::to_le_bytes(kind));
                list.extend(u16::to_le_bytes(rights));
                list.extend(u32::to_le_bytes(id));
            }
            Writing::read(&list).unwrap()
        };
        assert_eq!(list(7), Writing { users: vec![1000], groups: vec![100], own_group: false });
        assert_eq!(list(5), Writing::default());
        assert!(Writing::read(&[1, 0, 0, 0]).is_err());
        assert!(Writing::read(&[]).is_err());
    }
}
