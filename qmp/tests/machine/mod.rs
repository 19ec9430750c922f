//! A real QEMU without a guest, of each supported version, and its directory.

use std::{
    path::{Path, PathBuf},
    process::Stdio,
    time::Duration,
};

use qmp::{Options, Qmp};
use tokio::process::{Child, Command};

/// A QEMU version of the tests.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Version {
    /// 10.0, in PATH.
    New,
    /// 7.2, unpacked by `scripts/install-qemu`.
    Old,
}

pub const BOTH: [Version; 2] = [Version::New, Version::Old];

/// Directory into which `scripts/install-qemu` installs QEMU 7.2.
pub fn old_root() -> PathBuf {
    let root = std::env::var_os("DOMSNAP_TEST_QEMU").unwrap_or_else(|| "/opt/domsnap-test-qemu".into());
    Path::new(&root).join("7.2")
}

fn program(version: Version) -> (PathBuf, Vec<String>) {
    match version {
        Version::New => {
            let path = std::env::var_os("PATH").unwrap_or_default();
            let found = std::env::split_paths(&path)
                .map(|dir| dir.join("qemu-system-x86_64"))
                .find(|file| file.is_file());
            (found.expect("no qemu-system-x86_64 in PATH: run scripts/install-qemu"), Vec::new())
        }
        Version::Old => {
            let root = old_root();
            let program = root.join("usr/bin/qemu-system-x86_64");
            assert!(program.is_file(), "{} is missing: run scripts/install-qemu", program.display());
            let data =
                ["usr/share/qemu", "usr/share/seabios"].map(|dir| root.join(dir).display().to_string());
            (program, data.into_iter().flat_map(|dir| ["-L".to_owned(), dir]).collect())
        }
    }
}

/// A QEMU that runs until this is dropped.
pub struct Machine {
    pub dir: tempfile::TempDir,
    pub process: Child,
    arguments: Vec<String>,
    version: Version,
}

impl Machine {
    /// Starts one without a machine: enough for the monitor, the block layer and jobs.
    pub fn start(version: Version, more: &[&str]) -> Self {
        let dir = tempfile::tempdir().expect("a directory");
        let arguments =
            more.iter().map(|argument| argument.replace("DIR", &dir.path().display().to_string())).collect();
        let process = Self::spawn(version, dir.path(), &arguments);
        Self { dir, process, arguments, version }
    }

    fn spawn(version: Version, dir: &Path, arguments: &Vec<String>) -> Child {
        let (program, data) = program(version);
        let socket = dir.join("qmp").display().to_string();
        let log = std::fs::File::create(dir.join("log")).expect("a log");
        Command::new(program)
            .args(data)
            .args(["-nodefaults", "-no-user-config", "-display", "none", "-M", "none", "-accel", "tcg"])
            .args(["-qmp", &format!("unix:{socket},server=on,wait=off")])
            .args(arguments)
            .stdin(Stdio::null())
            .stdout(log.try_clone().expect("a log"))
            .stderr(log)
            .kill_on_drop(true)
            .spawn()
            .expect("QEMU starts")
    }

    /// Starts it again, like a supervisor.
    pub async fn restart(&mut self) {
        self.process.kill().await.expect("it is killed");
        self.process = Self::spawn(self.version, self.dir.path(), &self.arguments);
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    pub async fn qmp(&self) -> Qmp {
        self.qmp_with(Options::default()).await
    }

    pub async fn qmp_with(&self, mut options: Options) -> Qmp {
        options.await_socket = true;
        options.connect_deadline = Duration::from_secs(60);
        Qmp::connect_with(self.path("qmp"), options).await.unwrap_or_else(|error| {
            let log = std::fs::read_to_string(self.path("log")).unwrap_or_default();
            panic!("{error}; QEMU says: {log}")
        })
    }
}
