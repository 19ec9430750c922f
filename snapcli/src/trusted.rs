//! Files whose content is run, or says what is run: only such that no other user can replace or change.

use camino::{Utf8Path, Utf8PathBuf};
use snapcore::{Error, ErrorKind, Result, shell_command};

/// The most symbolic links that are followed.
const MOST_LINKS: usize = 40;

/// Refuses the file at `path` if a user other than root and the one who runs this program could replace it,
/// write it, or change the way to it. `what` names it: "the program of the hook". `danger` says what that
/// user could do: "have any program run".
///
/// # Errors
/// [`ErrorKind::Refused`], with the place and the command that closes it; [`ErrorKind::NotFound`] and
/// [`ErrorKind::Io`] where it cannot be looked at.
pub fn require_own(path: &Utf8Path, what: &str, danger: &str) -> Result<()> {
    let failed = |cause: std::io::Error| {
        let kind = match cause.kind() {
            std::io::ErrorKind::NotFound => ErrorKind::NotFound,
            _ => ErrorKind::Io,
        };
        Error::new(kind, format!("{what} {path} cannot be looked at")).because(cause)
    };
    // 1) Links: whoever can replace one decides what it leads to. 2) What they lead to.
    if let Some(link) = foreign_link(path, MOST_LINKS).map_err(failed)? {
        return Err(Error::new(
            ErrorKind::Refused,
            format!(
                "{what} {path} is reached by the link {link}, which others can replace: they could {danger}"
            ),
        )
        .state("no changes made")
        .advise("name the file itself, or move the link to a directory that only root can write"));
    }
    path.metadata().map_err(failed)?;
    let Some((place, writers)) = confined_files::foreign_place(path.as_std_path()).map_err(failed)? else {
        return Ok(());
    };
    Err(Error::new(
        ErrorKind::Refused,
        format!("{what} {path}: {} can be written by {writers}, who could {danger}", place.display()),
    )
    .state("no changes made")
    .advise(writers.advice(&shell_command([place.display().to_string().as_str()]))))
}

/// The first link on the way to `path` that other users can replace.
fn foreign_link(path: &Utf8Path, left: usize) -> std::io::Result<Option<Utf8PathBuf>> {
    let Some(left) = left.checked_sub(1) else {
        return Err(std::io::Error::other("it has too many symbolic links"));
    };
    let mut links = path.ancestors().filter(|place| place.is_symlink()).collect::<Vec<_>>();
    links.reverse();
    for link in links {
        if !confined_files::is_trusted_link(link.as_std_path())? {
            return Ok(Some(link.to_owned()));
        }
        let target = link.read_link_utf8()?;
        let target = link.parent().unwrap_or(Utf8Path::new("/")).join(target);
        if let Some(foreign) = foreign_link(&target, left)? {
            return Ok(Some(foreign));
        }
    }
    Ok(None)
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::{PermissionsExt, symlink};

    use super::*;

    fn refused(path: &Utf8Path) -> String {
        let error = require_own(path, "the program", "run anything").unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Refused, "{error}");
        error.to_string()
    }

    /// A file is trusted where only root and its user can write it, its directories and the links to it.
    #[test]
    fn file_of_others_is_refused() {
        let place = tempfile::tempdir().unwrap();
        let directory = Utf8Path::from_path(place.path()).unwrap();
        let allow = |path: &Utf8Path, mode| {
            std::fs::set_permissions(path, std::fs::Permissions::from_mode(mode)).unwrap();
        };
        let (file, below) = (directory.join("file"), directory.join("below"));
        std::fs::write(&file, "x").unwrap();
        std::fs::create_dir(&below).unwrap();
        allow(&file, 0o755);
        let require = |path: &Utf8Path| require_own(path, "the program", "run anything");
        require(&file).unwrap();
        symlink(&file, directory.join("link")).unwrap();
        require(&directory.join("link")).unwrap();
        // A chain of links, one of which lies where every user can replace it.
        allow(&below, 0o777);
        symlink(&file, below.join("link")).unwrap();
        symlink("below/link", directory.join("far")).unwrap();
        assert!(refused(&directory.join("far")).contains("below/link"), "by the second link");
        symlink(&below, directory.join("open")).unwrap();
        std::fs::write(below.join("file"), "x").unwrap();
        assert!(refused(&directory.join("open/file")).contains("every user"));
        symlink("loop", directory.join("loop")).unwrap();
        assert_eq!(require(&directory.join("loop")).unwrap_err().kind(), ErrorKind::Io);
        allow(&file, 0o757);
        assert!(refused(&file).contains("chmod o-w"));
        let missing = require(&directory.join("missing")).unwrap_err();
        assert_eq!(missing.kind(), ErrorKind::NotFound);
    }
}
