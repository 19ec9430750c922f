//! `xl`: found once, by its absolute path; run with an argument vector, no shell, the C locale, a deadline.
//!
//! xl runs in its own process group and writes into files, not pipes. An interrupt from the terminal, or the
//! death of this process, must not end a save half way, which would leave the guest suspended. Nor may it end
//! a restore, which would leave half a domain.

use std::{
    fs::File,
    io::{self, Read, Seek},
    os::unix::process::CommandExt,
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use snapcore::{Error, ErrorKind, Result, shell_command};

/// Paths where it is searched.
const PLACES: [&str; 4] = ["/usr/sbin/xl", "/usr/local/sbin/xl", "/sbin/xl", "/usr/bin/xl"];

/// Time limit for commands that only query or pause.
pub(crate) const SOON: Duration = Duration::from_secs(60);

/// Time limit for creating or destroying a domain.
pub(crate) const MAKING: Duration = Duration::from_secs(300);

/// The program.
#[derive(Debug, Clone)]
pub(crate) struct Xl {
    path: PathBuf,
}

/// Its output.
#[derive(Debug)]
pub(crate) struct Output {
    pub(crate) ok: bool,
    pub(crate) out: String,
    pub(crate) err: String,
}

impl Xl {
    /// Finds the xl of this machine.
    pub(crate) fn find() -> Option<Self> {
        let path = PLACES.iter().map(Path::new).find(|path| path.is_file())?;
        // Only a dom0 has it: an xl elsewhere would only fail.
        Path::new("/proc/xen/capabilities").exists().then(|| Self { path: path.to_owned() })
    }

    /// Finds the xl of this machine, or fails.
    ///
    /// # Errors
    /// [`ErrorKind::NotFound`] if there is none.
    pub(crate) fn expect() -> Result<Self> {
        Self::find().ok_or_else(|| {
            Error::new(ErrorKind::NotFound, "not a Xen dom0, or xl is not installed").advise(
                "run domsnap in dom0, and look whether xen-utils is installed and /proc/xen is mounted",
            )
        })
    }

    /// Runs it to its end, with any result.
    ///
    /// # Errors
    /// If it cannot be started; [`ErrorKind::Io`] if it has not ended within the deadline: then it was
    /// killed.
    pub(crate) async fn run(&self, args: &[&str], deadline: Duration) -> Result<Output> {
        let path = self.path.clone();
        let args: Vec<String> = args.iter().map(|word| (*word).to_owned()).collect();
        let (begun, asked) = (Instant::now(), args.join(" "));
        let work = tokio::task::spawn_blocking(move || run(&path, &args, deadline));
        let said = work.await.map_err(|cause| {
            Error::new(ErrorKind::Internal, "a thread that waits for xl ended").because(cause)
        })?;
        tracing::debug!(asked, took_us = micros(begun), "xl ended");
        said
    }

    /// Runs it and requires success. Returns its standard output.
    ///
    /// # Errors
    /// See [`Xl::run`]; also xl's error message.
    pub(crate) async fn must(&self, args: &[&str], deadline: Duration) -> Result<String> {
        let said = self.run(args, deadline).await?;
        match said.ok {
            true => Ok(said.out),
            false => Err(failed(args, &said)),
        }
    }
}

/// Makes the error of a failed run.
pub(crate) fn failed(args: &[&str], said: &Output) -> Error {
    let full = ["No space left", "Disk quota exceeded"].iter().any(|pattern| said.err.contains(pattern));
    let kind = if full { ErrorKind::NoSpace } else { ErrorKind::Io };
    Error::new(
        kind,
        format!("`xl {}` failed: {}", shell_command(args.iter().copied()), relevant_output(&said.err)),
    )
}

/// Returns the relevant part of its error output.
fn relevant_output(text: &str) -> String {
    let chatter = |line: &&str| {
        !line.trim().is_empty()
            && !line.contains("xc: info")
            && !line.contains("xc: progress")
            && !line.contains("Loading new save file")
    };
    let lines: Vec<&str> = text.lines().filter(chatter).collect();
    let lines = &lines[lines.len().saturating_sub(6)..];
    if lines.is_empty() { "it gave no reason".to_owned() } else { lines.join("; ") }
}

fn run(path: &Path, args: &[String], deadline: Duration) -> Result<Output> {
    let shown = || format!("`xl {}`", shell_command(args.iter().map(String::as_str)));
    let io = |attempted: &str, cause: io::Error| {
        Error::new(ErrorKind::Io, format!("{} {attempted}", shown())).because(cause)
    };
    let file = || tempfile::tempfile().map_err(|cause| io("has no place for its output", cause));
    let (out, err) = (file()?, file()?);
    let own = |file: &File| file.try_clone().map_err(|cause| io("has no place for its output", cause));
    let handle = duct::cmd(path, args)
        .env("LC_ALL", "C")
        .stdin_null()
        .stdout_file(own(&out)?)
        .stderr_file(own(&err)?)
        .unchecked()
        .before_spawn(|command| {
            command.process_group(0);
            Ok(())
        })
        .start()
        .map_err(|cause| io("cannot be started", cause))?;
    let ended = handle.wait_timeout(deadline).map_err(|cause| io("cannot be waited for", cause))?;
    let Some(output) = ended else {
        handle.kill().map_err(|cause| io("has not ended in time and cannot be killed", cause))?;
        return Err(Error::new(
            ErrorKind::Io,
            format!("{} has not ended within {} s and was killed", shown(), deadline.as_secs()),
        ));
    };
    let text = |file| text_of(file).map_err(|cause| io("ended, and its output cannot be read", cause));
    Ok(Output { ok: output.status.success(), out: text(out)?, err: text(err)? })
}

pub(crate) fn micros(since: Instant) -> u64 {
    u64::try_from(since.elapsed().as_micros()).unwrap_or(u64::MAX)
}

fn text_of(mut file: File) -> io::Result<String> {
    let mut bytes = Vec::new();
    file.rewind()?;
    file.read_to_end(&mut bytes)?;
    Ok(String::from_utf8_lossy(&bytes).into_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A program that hangs is killed at its deadline, and the output of one that ends is returned.
    #[test]
    fn hanging_xl_is_killed_at_its_deadline() {
        let args = ["-c".to_owned(), "echo out; echo err >&2; exit 3".to_owned()];
        let said = run(Path::new("/bin/sh"), &args, SOON).unwrap();
        assert_eq!((said.ok, said.out.as_str(), said.err.as_str()), (false, "out\n", "err\n"));
        let error =
            run(Path::new("/bin/sleep"), &["1000".to_owned()], Duration::from_millis(50)).unwrap_err();
        assert!(error.to_string().contains("was killed"), "{error}");
    }

    /// A full disk is recognised by its kind, and progress messages are left out.
    #[test]
    fn full_disk_has_its_error_kind() {
        let err = "xc: info: Saving domain 1\nxc: error: Write failed (28 = No space left on device)\n";
        let error = failed(&["save", "x"], &Output { ok: false, out: String::new(), err: err.to_owned() });
        assert_eq!(error.kind(), ErrorKind::NoSpace);
        assert!(!error.to_string().contains("info"), "{error}");
    }
}
