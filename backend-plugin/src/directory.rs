//! The plug-ins of a directory.

use std::io::ErrorKind as Io;
use std::os::unix::fs::PermissionsExt;

use camino::{Utf8Path, Utf8PathBuf};
use snapcore::{Error, ErrorKind, Result, shell_command};

/// The beginning of a plug-in's file name.
pub const PREFIX: &str = "domsnap-backend-";

/// The longest name of a plug-in.
const MAX_NAME: usize = 32;

/// A program with the name of a plug-in.
#[derive(Debug)]
pub struct Found {
    /// The format that it should serve.
    pub name: String,
    /// The program.
    pub program: Utf8PathBuf,
    /// The reason for which it is not used, if it is not.
    pub problem: Option<Error>,
}

/// Lists the plug-ins of `directory`, by name. A missing directory has none.
///
/// # Errors
/// If the directory cannot be read, or other users may put programs into it.
pub fn found(directory: &Utf8Path) -> Result<Vec<Found>> {
    let entries = match directory.read_dir_utf8() {
        Ok(entries) => entries,
        Err(missing) if missing.kind() == Io::NotFound => return Ok(Vec::new()),
        Err(cause) => return Err(unreadable(directory, cause)),
    };
    trusted(directory)?;
    let mut all = Vec::new();
    for entry in entries {
        let entry = entry.map_err(|cause| unreadable(directory, cause))?;
        let Some(name) = entry.file_name().strip_prefix(PREFIX) else { continue };
        let program = entry.path().to_owned();
        let problem = named(name, &program).and_then(|()| runnable(&program)).err();
        all.push(Found { name: name.to_owned(), program, problem });
    }
    all.sort_by(|one, other| one.name.cmp(&other.name));
    Ok(all)
}

fn unreadable(directory: &Utf8Path, cause: std::io::Error) -> Error {
    Error::new(ErrorKind::Io, format!("the directory of plug-ins {directory} cannot be read")).because(cause)
}

/// Checks the name of a format, which configurations refer to.
fn named(name: &str, program: &Utf8Path) -> Result<()> {
    let plain = name.bytes().all(|byte| byte.is_ascii_lowercase() || byte.is_ascii_digit() || byte == b'-');
    if plain && !name.is_empty() && name.len() <= MAX_NAME && !name.starts_with('-') {
        return Ok(());
    }
    Err(Error::new(
        ErrorKind::Refused,
        format!("{program} is not a plug-in: {name:?} is not a valid name of a format"),
    )
    .advise(format!(
        "call it {PREFIX}NAME, with a NAME of at most {MAX_NAME} lower-case letters, digits and '-'"
    )))
}

fn runnable(program: &Utf8Path) -> Result<()> {
    let found = program.metadata().map_err(|cause| {
        Error::new(ErrorKind::Io, format!("the plug-in {program} cannot be looked at")).because(cause)
    })?;
    if !found.is_file() || found.permissions().mode() & 0o111 == 0 {
        return Err(Error::new(ErrorKind::Refused, format!("the plug-in {program} is not executable"))
            .advise(format!("make it executable: chmod +x {program}; or move it away")));
    }
    trusted(program)
}

/// Checks that no other user can put a plug-in there, or change it or a directory on its path. A plug-in can
/// do everything that domsnap can.
fn trusted(path: &Utf8Path) -> Result<()> {
    let found = confined_files::foreign_place(path.as_std_path())
        .map_err(|cause| Error::new(ErrorKind::Io, format!("{path} cannot be looked at")).because(cause))?;
    let Some((place, writers)) = found else { return Ok(()) };
    Err(Error::new(
        ErrorKind::Refused,
        format!("{} can be written by {writers}, who could have any program run by domsnap", place.display()),
    )
    .state("nothing there was run")
    .advise(format!(
        "{}: plug-ins are run only from places that no other user can write to",
        writers.advice(&shell_command([place.display().to_string().as_str()]))
    )))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn put(directory: &Utf8Path, name: &str, mode: u32) {
        let path = directory.join(name);
        std::fs::write(&path, "#!/bin/sh\n").unwrap();
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(mode)).unwrap();
    }

    /// Programs of the right name are found; others come with the reason against them.
    #[test]
    fn programs_of_the_right_name_are_found() {
        let place = tempfile::tempdir().unwrap();
        let directory = Utf8Path::from_path(place.path()).unwrap();
        for (name, mode) in [
            ("domsnap-backend-zfs", 0o755),
            ("domsnap-backend-a1-b", 0o700),
            ("domsnap-backend-.py", 0o755),
            ("domsnap-backend-data", 0o644),
            ("domsnap-backend-open", 0o757),
            ("something-else", 0o755),
        ] {
            put(directory, name, mode);
        }
        std::fs::create_dir(directory.join("domsnap-backend-dir")).unwrap();
        let all = found(directory).unwrap();
        let good: Vec<_> =
            all.iter().filter(|found| found.problem.is_none()).map(|found| found.name.as_str()).collect();
        assert_eq!(good, ["a1-b", "zfs"]);
        let problem = |name: &str| {
            all.iter().find(|found| found.name == name).unwrap().problem.as_ref().unwrap().to_string()
        };
        assert!(problem(".py").contains("is not a valid name of a format"));
        assert!(problem("data").contains("chmod +x"));
        assert!(problem("dir").contains("is not executable"));
        assert!(problem("open").contains("can be written by every user"));
    }

    /// Root does not run a program that a group may write.
    #[test]
    fn root_does_not_run_what_a_group_may_write() {
        if !rustix::process::geteuid().is_root() {
            return;
        }
        let place = tempfile::tempdir().unwrap();
        let directory = Utf8Path::from_path(place.path()).unwrap();
        put(directory, "domsnap-backend-a", 0o775);
        std::os::unix::fs::chown(directory.join("domsnap-backend-a"), None, Some(1234)).unwrap();
        let problem = found(directory).unwrap().remove(0).problem.unwrap();
        assert!(problem.to_string().contains("chmod g-w"), "{problem}");
        std::os::unix::fs::chown(directory, None, Some(1234)).unwrap();
        std::fs::set_permissions(directory, std::fs::Permissions::from_mode(0o770)).unwrap();
        assert_eq!(found(directory).unwrap_err().kind(), ErrorKind::Refused);
    }

    /// A missing directory has no plug-ins, and one that every user may write is refused.
    #[test]
    fn directory_missing_is_empty_writable_is_refused() {
        let place = tempfile::tempdir().unwrap();
        let directory = Utf8Path::from_path(place.path()).unwrap();
        assert!(found(&directory.join("nothing")).unwrap().is_empty());
        std::fs::set_permissions(directory, std::fs::Permissions::from_mode(0o777)).unwrap();
        let refused = found(directory).unwrap_err();
        assert_eq!(refused.kind(), ErrorKind::Refused);
        assert!(refused.to_string().contains("chmod o-w"), "{refused}");
    }
}
