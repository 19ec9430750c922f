//! Programs that a policy runs: its hooks, and systemd's own. Each gets an empty input, a small environment
//! and a time limit, and its output is kept for the error.

use std::io::Read;
use std::os::unix::process::CommandExt;
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use camino::Utf8Path;
use rustix::process::{Pid, Signal, WaitId, WaitIdOptions, kill_process_group, waitid};
use snapcore::{Error, ErrorKind, Result, shell_command};
use tokio_util::sync::CancellationToken;

/// Time between two looks at a program that runs.
const LOOK_EVERY: Duration = Duration::from_millis(10);

/// Time that a program has between SIGTERM and SIGKILL.
const TO_END: Duration = Duration::from_secs(5);

/// Time for which the output of a program that has ended is waited for. A process that it started may keep
/// the output open for ever.
const TO_READ: Duration = Duration::from_millis(200);

/// The most bytes of a program's output that an error has: its last ones.
const MAX_OUTPUT: usize = 1024;

/// Directories of programs.
const PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

/// Variables of the caller's environment that a program gets too.
const PASSED_ON: [&str; 5] = ["HOME", "USER", "LOGNAME", "XDG_RUNTIME_DIR", "DBUS_SESSION_BUS_ADDRESS"];

/// A program to run.
pub struct Program<'a> {
    /// What it is, for errors: "the hook before".
    pub what: &'a str,
    /// Its absolute path, and its arguments. No shell reads them.
    pub command: &'a [String],
    /// Variables of its environment.
    pub variables: &'a [(&'a str, String)],
    /// The time after which it is ended.
    pub limit: Duration,
}

/// How a program ended, other than well.
enum End {
    Status(std::process::ExitStatus),
    Limit,
    Cancelled,
}

impl Program<'_> {
    /// Runs the program, and waits for its end. It is ended at its limit, and when `cancel` is cancelled:
    /// with SIGTERM and, 5 seconds later, SIGKILL, and all processes of its group with it.
    ///
    /// # Errors
    /// [`ErrorKind::Refused`] if it fails, with the end of its output; [`ErrorKind::Cancelled`].
    pub async fn run(&self, cancel: &CancellationToken) -> Result<()> {
        let shown = shell_command(self.command.iter().map(String::as_str));
        let Some((program, arguments)) = self.command.split_first() else {
            return Err(Error::new(ErrorKind::Internal, format!("{} has no program", self.what)));
        };
        let mut command = Command::new(program);
        command.args(arguments).env_clear().env("PATH", PATH).env("LC_ALL", "C.UTF-8").current_dir("/");
        command.envs(PASSED_ON.iter().filter_map(|name| Some((name, std::env::var_os(name)?))));
        command.envs(self.variables.iter().map(|(name, value)| (name, value)));
        // A group of its own: the terminal's interrupt ends domsnap, which then ends the program in order.
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped()).process_group(0);
        let failed = |cause: std::io::Error| {
            Error::new(ErrorKind::Refused, format!("{} cannot be run: {shown}", self.what)).because(cause)
        };
        let mut child = command.spawn().map_err(failed)?;
        let output = Output::of(&mut child);
        let end = self.wait(&mut child, cancel).await.map_err(failed)?;
        let last = match &end {
            Some(_) => output.last().await,
            None => return Ok(()),
        };
        let last = if last.is_empty() { String::new() } else { format!(": {last}") };
        let (kind, why) = match end {
            None => return Ok(()),
            Some(End::Status(status)) => (ErrorKind::Refused, format!("ended with {status}")),
            Some(End::Limit) => {
                let limit = self.limit.as_secs();
                (ErrorKind::Refused, format!("did not end within {limit} s, and was ended"))
            }
            Some(End::Cancelled) => {
                (ErrorKind::Cancelled, "was ended, because domsnap was interrupted".into())
            }
        };
        Err(Error::new(kind, format!("{} {why}: {shown}{last}", self.what)))
    }

    async fn wait(&self, child: &mut Child, cancel: &CancellationToken) -> std::io::Result<Option<End>> {
        let deadline = Instant::now() + self.limit;
        let why = loop {
            if let Some(status) = child.try_wait()? {
                return Ok((!status.success()).then_some(End::Status(status)));
            }
            tokio::select! {
                biased;
                () = cancel.cancelled() => break End::Cancelled,
                () = tokio::time::sleep(LOOK_EVERY) => {}
            }
            if Instant::now() >= deadline {
                break End::Limit;
            }
        };
        // Until it is waited for, no other process has its number. So it is looked at without that, and its
        // group gets the last signal before.
        let group = i32::try_from(child.id()).ok().and_then(Pid::from_raw);
        let Some(group) = group else { return Ok(Some(why)) };
        let _ = kill_process_group(group, Signal::TERM);
        let deadline = Instant::now() + TO_END;
        let looked = WaitIdOptions::EXITED | WaitIdOptions::NOHANG | WaitIdOptions::NOWAIT;
        while Instant::now() < deadline && matches!(waitid(WaitId::Pid(group), looked), Ok(None)) {
            tokio::time::sleep(LOOK_EVERY).await;
        }
        let _ = kill_process_group(group, Signal::KILL);
        child.wait()?;
        Ok(Some(why))
    }
}

/// The last bytes of both outputs of a program.
struct Output {
    last: Arc<Mutex<Vec<u8>>>,
    readers: Vec<std::thread::JoinHandle<()>>,
}

impl Output {
    /// Reads the outputs of `child`, on threads that end with them.
    fn of(child: &mut Child) -> Self {
        let last = Arc::new(Mutex::new(Vec::new()));
        let outputs: [Option<Box<dyn Read + Send>>; 2] = [
            child.stdout.take().map(|output| Box::new(output) as _),
            child.stderr.take().map(|output| Box::new(output) as _),
        ];
        let readers = outputs.into_iter().flatten().map(|mut output| {
            let last = Arc::clone(&last);
            std::thread::spawn(move || {
                let mut read = [0; 4096];
                while let Ok(count @ 1..) = output.read(&mut read) {
                    let mut last = last.lock().unwrap_or_else(PoisonError::into_inner);
                    last.extend_from_slice(read.get(..count).unwrap_or_default());
                    let surplus = last.len().saturating_sub(MAX_OUTPUT);
                    last.drain(..surplus);
                }
            })
        });
        let readers = readers.collect();
        Self { last, readers }
    }

    /// The last lines, joined, as far as they can be shown.
    async fn last(&self) -> String {
        let deadline = Instant::now() + TO_READ;
        while Instant::now() < deadline && !self.readers.iter().all(|reader| reader.is_finished()) {
            tokio::time::sleep(LOOK_EVERY).await;
        }
        let last = self.last.lock().unwrap_or_else(PoisonError::into_inner).clone();
        let text = String::from_utf8_lossy(&last);
        let lines: Vec<&str> = text.lines().map(str::trim).filter(|line| !line.is_empty()).collect();
        lines.join("; ").chars().map(|c| if c.is_control() { ' ' } else { c }).collect()
    }
}

/// The first of `places` that is a program: a tool that is not in the same place on all systems.
pub fn found(places: &[&str]) -> Option<String> {
    places.iter().find(|place| Utf8Path::new(place).is_file()).map(|place| (*place).to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn run(script: &str, limit: Duration, cancel: &CancellationToken) -> Result<()> {
        let command = ["/bin/sh", "-c", script].map(str::to_owned);
        let variables = [("DOMSNAP_DOMAIN", "web".to_owned())];
        let program = Program { what: "the hook before", command: &command, variables: &variables, limit };
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(program.run(cancel))
    }

    const LONG: Duration = Duration::from_secs(60);

    /// A program has the variables that it is given, no others of the caller's, no input, and `/`.
    #[test]
    fn environment_is_small() {
        let cancel = CancellationToken::new();
        let names =
            PASSED_ON.iter().chain(&["PATH", "LC_ALL", "DOMSNAP_DOMAIN", "PWD", "OLDPWD", "SHLVL", "_"]);
        let names: Vec<&str> = names.copied().collect();
        let check = format!(
            "test \"$DOMSNAP_DOMAIN\" = web && test \"$PWD\" = / && test -z \"$(cat)\" \
             && test \"$LC_ALL\" = C.UTF-8 && ! env | grep -vE '^({})='",
            names.join("|")
        );
        run(&check, LONG, &cancel).unwrap();
    }

    /// The error of a program that fails has the end of what it printed, fit for a terminal.
    #[test]
    fn failure_has_the_end_of_the_output() {
        let cancel = CancellationToken::new();
        let script = "yes | head -c 100000; printf 'no \\033[2Jdatabase\\n' >&2; exit 7";
        let error = run(script, LONG, &cancel).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Refused);
        let text = error.to_string();
        assert!(text.contains("exit status: 7") && text.contains("[2Jdatabase"), "{text}");
        assert!(!text.contains('\u{1b}') && text.len() < 4 * MAX_OUTPUT, "{text}");
        let missing = ["/nonexistent/program".to_owned()];
        let program = Program { what: "the hook before", command: &missing, variables: &[], limit: LONG };
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        let error = runtime.block_on(program.run(&cancel)).unwrap_err();
        assert!(error.to_string().contains("cannot be run"), "{error}");
    }

    /// At its limit a program is ended with all of its group. One that left its output open to another
    /// process is not waited for.
    #[test]
    fn limit_ends_the_group() {
        let place = tempfile::tempdir().unwrap();
        let (alive, begun) = (place.path().join("alive"), Instant::now());
        let (alive, cancel) = (alive.display(), CancellationToken::new());
        let script = format!("(sleep 1; touch {alive}) & sleep 60");
        let error = run(&script, Duration::from_millis(100), &cancel).unwrap_err();
        assert!(error.to_string().contains("did not end within"), "{error}");
        run("sleep 5 & exit 0", LONG, &cancel).unwrap();
        let failed = run("sleep 5 & exit 1", LONG, &cancel).unwrap_err();
        assert!(failed.to_string().contains("exit status: 1"), "{failed}");
        std::thread::sleep(Duration::from_millis(1200).saturating_sub(begun.elapsed()));
        assert!(!place.path().join("alive").exists(), "the child of the program was ended too");
    }

    /// An interrupt ends a program.
    #[test]
    fn interrupt_ends_the_program() {
        let cancel = CancellationToken::new();
        cancel.cancel();
        let error = run("sleep 60", LONG, &cancel).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Cancelled);
    }
}
