//! Who may read a new image: those who may read the one that it is made from, and nobody else.

use std::fs::{File, Permissions};
use std::io;
use std::os::unix::fs::{MetadataExt, PermissionsExt, fchown};
use std::path::Path;

/// Gives `file`, which its owner alone can read, the owner, group and mode of the image at `model`, as far as this process
/// may. Where the group cannot be given, it gets no more than everybody else has.
///
/// # Errors
/// The system's, when `model` cannot be looked at or the mode cannot be set.
pub fn inherit(file: &File, model: &Path) -> io::Result<()> {
    let like = std::fs::metadata(model)?;
    let is = file.metadata()?;
    // Not allowed to most: then the group alone may still be.
    if (is.uid() != like.uid() || is.gid() != like.gid())
        && fchown(file, Some(like.uid()), Some(like.gid())).is_err()
    {
        let _ = fchown(file, None, Some(like.gid()));
    }
    let is = file.metadata()?;
    let mode = granted(like.mode(), is.uid() == like.uid(), is.gid() == like.gid());
    if is.mode() & 0o7777 == mode {
        return Ok(());
    }
    file.set_permissions(Permissions::from_mode(mode))
}

/// The mode of a file made from one of mode `model`, with the same owner and group or not. The owner can always write: it
/// may be the active image next.
fn granted(model: u32, same_owner: bool, same_group: bool) -> u32 {
    let (owner, group, other) = (model & 0o600, model & 0o060, model & 0o006);
    // Who owned the model and not this file is one of the others now; whoever owns this file made it.
    let group = if same_group { group } else { group & (other << 3) };
    let owner = if same_owner { owner | 0o200 } else { 0o600 };
    owner | 0o400 | group | other
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nobody_gets_to_read_who_could_not_before() {
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
        inherit(&file, &model).unwrap();
        assert_eq!(std::fs::metadata(&path).unwrap().mode() & 0o7777, 0o640);
    }
}
