//! Running the binary under test.

use std::ffi::{OsStr, OsString};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::OnceLock;

use anyhow::{Context, Result, bail};

/// The exit statuses that the command line promises.
pub mod status {
    /// Done.
    pub const DONE: i32 = 0;
    /// Failed and undone.
    pub const FAILED: i32 = 1;
    /// The command line itself is wrong.
    pub const USAGE: i32 = 2;
    /// Refused; no changes made.
    pub const REFUSED: i32 = 3;
    /// A journal must be healed first.
    pub const NEEDS_RECOVERY: i32 = 4;
}

/// Where cargo puts this profile's products.
fn target_dir() -> Result<PathBuf> {
    let own = std::env::current_exe()?;
    let deps = own.parent().context("the test executable is in no directory")?;
    Ok(deps.parent().context("target/PROFILE/deps has no parent")?.to_owned())
}

/// A product of this workspace: the file that the variable `variable` names, or `file` in the target
/// directory.
///
/// # Panics
/// If it was not built, with the command that builds it.
pub fn product(variable: &str, file: &str, package: &str) -> PathBuf {
    if let Some(path) = std::env::var_os(variable) {
        let path = PathBuf::from(path);
        assert!(path.is_file(), "{variable} names {}, which is no file", path.display());
        return path;
    }
    let path = target_dir().expect("the target directory").join(file);
    assert!(
        path.is_file(),
        "{} is not built: run `cargo build -p {package}` (with --release for a release test), or set {variable}",
        path.display()
    );
    path
}

/// The `domsnap` under test.
pub fn binary() -> &'static Path {
    static BINARY: OnceLock<PathBuf> = OnceLock::new();
    BINARY.get_or_init(|| product("DOMSNAP_BIN", "domsnap", "snapcli"))
}

/// What one run gave.
#[derive(Debug, Clone)]
pub struct Outcome {
    /// The command line, to be shown.
    pub command: String,
    /// The exit status; `None` if a signal ended it.
    pub status: Option<i32>,
    /// Standard output.
    pub stdout: String,
    /// Standard error.
    pub stderr: String,
}

impl Outcome {
    /// The one JSON document on standard output.
    ///
    /// # Errors
    /// If there is none, or more than one.
    pub fn json<T: serde::de::DeserializeOwned>(&self) -> Result<T> {
        serde_json::from_str(&self.stdout).with_context(|| format!("no JSON as expected from {self}"))
    }

    /// This outcome, if it is `wanted`.
    ///
    /// # Errors
    /// The whole outcome as text, if it is another.
    pub fn expect_status(self, wanted: i32) -> Result<Outcome> {
        if self.status != Some(wanted) {
            bail!("expected exit status {wanted}: {self}");
        }
        Ok(self)
    }

    /// Whether it panicked, which it must never do.
    pub fn panicked(&self) -> bool {
        self.status == Some(101) || self.stderr.contains("panicked at")
    }
}

impl std::fmt::Display for Outcome {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "`{}` ended with {:?}\n--- stdout\n{}", self.command, self.status, self.stdout)?;
        write!(f, "--- stderr\n{}---", self.stderr)
    }
}

/// A way of calling `domsnap`: one state directory, and what to wrap or preload.
#[derive(Debug, Clone)]
pub struct Domsnap {
    state: PathBuf,
    binary: PathBuf,
    wrapper: Vec<OsString>,
    environment: Vec<(OsString, OsString)>,
}

impl Domsnap {
    /// `domsnap --state-dir STATE`.
    pub fn new(state: &Path) -> Domsnap {
        Domsnap {
            state: state.to_owned(),
            binary: binary().to_owned(),
            wrapper: Vec::new(),
            environment: Vec::new(),
        }
    }

    /// Runs it through another program, as `prlimit --as=N`.
    pub fn through(mut self, args: &[&str]) -> Domsnap {
        self.wrapper = args.iter().map(OsString::from).collect();
        self
    }

    /// Runs a copy of the binary, which another user can reach.
    pub fn binary(mut self, copy: &Path) -> Domsnap {
        self.binary = copy.to_owned();
        self
    }

    /// Sets a variable of its environment.
    pub fn env(mut self, name: &str, value: impl AsRef<OsStr>) -> Domsnap {
        self.environment.push((name.into(), value.as_ref().to_owned()));
        self
    }

    /// The command with `args`, not started.
    pub fn command<S: AsRef<OsStr>>(&self, args: &[S]) -> Command {
        let mut line: Vec<&OsStr> = self.wrapper.iter().map(OsString::as_os_str).collect();
        line.push(self.binary.as_os_str());
        let mut command = Command::new(line[0]);
        command.args(&line[1..]).arg("--state-dir").arg(&self.state).args(args);
        command.env_remove("DOMSNAP_STATE_DIR").env("NO_COLOR", "1").env("RUST_BACKTRACE", "1");
        // Most suites are about what a revert leaves without it; those that are not say so.
        command.env("DOMSNAP_UNDO", "no");
        command.stdin(Stdio::null()).envs(self.environment.iter().map(|(k, v)| (k, v)));
        command
    }

    /// Runs it with `args` to its end.
    ///
    /// # Errors
    /// Only if it cannot be started.
    pub fn run<S: AsRef<OsStr>>(&self, args: &[S]) -> Result<Outcome> {
        let mut command = self.command(args);
        let output = command.output().with_context(|| format!("start {command:?}"))?;
        let shown: Vec<_> = args.iter().map(|word| word.as_ref().to_string_lossy()).collect();
        Ok(Outcome {
            command: format!("domsnap {}", shown.join(" ")),
            status: output.status.code(),
            stdout: String::from_utf8_lossy(&output.stdout).into_owned(),
            stderr: String::from_utf8_lossy(&output.stderr).into_owned(),
        })
    }

    /// Runs it with `args`, which must succeed.
    ///
    /// # Errors
    /// The outcome as text, if it is not [`status::DONE`].
    pub fn done<S: AsRef<OsStr>>(&self, args: &[S]) -> Result<Outcome> {
        self.run(args)?.expect_status(status::DONE)
    }
}
