//! The units of systemd that run a domain's policy: a service, and the timer that starts it.
//!
//! **Order.** The service is durable before the timer, and systemd reads them when both are. A crash in
//! between leaves a service that nothing starts, and the next `policy install` writes it again. A removal has
//! the other order: systemd forgets the timer, then the files go, the timer first.
//!
//! A file of the same name that `policy install` did not write is never overwritten or removed, nor is one of
//! another state directory's domain.

use std::fmt::Write as _;
use std::io::{Read, Write};
use std::time::Duration;

use camino::{Utf8Path, Utf8PathBuf};
use confined_files::{Directory, FileName};
use jiff::tz::TimeZone;
use snapcore::policy::{Every, Policy, PolicySpec};
use snapcore::{DomainName, Error, ErrorKind, Result};

use super::program::{Program, found};
use crate::failure::Failure;
use crate::session::{Session, state_dir};
use crate::trusted::require_own;

/// The beginning of the first line of each unit that is ours.
const MARK: &str = "# Made by `domsnap policy install ";

/// The longest name of a domain that is part of a unit's name; systemd's limit is 255 characters.
const MAX_NAME: usize = 180;

/// The most bytes of a unit that are read.
const MAX_UNIT: u64 = 65_536;

/// The time that each command of systemd has.
const LIMIT: Duration = Duration::from_secs(90);

/// Where units are, and whether systemd is asked to use them.
pub struct Place {
    directory: Utf8PathBuf,
    /// The program that speaks to systemd, and its first arguments; absent: only files are written.
    systemctl: Option<Vec<String>>,
    state_dir: Utf8PathBuf,
}

impl Place {
    /// The place that the user named, or that of this user's systemd.
    ///
    /// # Errors
    /// [`ErrorKind::Refused`] on a machine without systemd.
    pub fn of(session: &Session, named: Option<&Utf8Path>) -> Result<Self> {
        let state_dir = state_dir(&session.global)?;
        if let Some(named) = named {
            let directory = crate::backends::absolute(named)?;
            return Ok(Self { directory, systemctl: None, state_dir });
        }
        let is_root = rustix::process::geteuid().is_root();
        let directory = match is_root {
            true => Utf8PathBuf::from("/etc/systemd/system"),
            false => of_user()?,
        };
        let systemctl = found(&["/usr/bin/systemctl", "/bin/systemctl"]).ok_or_else(|| {
            Error::new(ErrorKind::Refused, "this machine has no systemctl, so systemd runs no timer")
                .state("no changes made")
                .advise(
                    "record the policy with --no-timer, and have cron or another scheduler run `domsnap policy run`",
                )
        })?;
        let mut systemctl = vec![systemctl];
        systemctl.extend((!is_root).then(|| "--user".to_owned()));
        Ok(Self { directory, systemctl: Some(systemctl), state_dir })
    }

    /// Returns true if systemd is asked to use the units.
    pub fn asks_systemd(&self) -> bool {
        self.systemctl.is_some()
    }

    /// The unit of `domain` with this ending.
    fn path(&self, domain: &DomainName, ending: &str) -> Utf8PathBuf {
        self.directory.join(format!("{}.{ending}", base(domain)))
    }

    /// The timer of `domain`, if it is there and ours.
    pub fn timer(&self, domain: &DomainName) -> Option<Utf8PathBuf> {
        let path = self.path(domain, "timer");
        matches!(self.look(&path), Ok(Found::Ours)).then_some(path)
    }

    /// The units of `domain` that are there and ours.
    ///
    /// # Errors
    /// [`ErrorKind::Refused`] for a file that is not ours.
    pub fn installed(&self, domain: &DomainName) -> Result<Vec<Utf8PathBuf>> {
        let mut all = Vec::new();
        for ending in ["timer", "service"] {
            let path = self.path(domain, ending);
            match self.look(&path)? {
                Found::Nothing => {}
                Found::Ours => all.push(path),
                Found::Other(why) => {
                    return Err(Error::new(ErrorKind::Refused, format!("{path} {why}"))
                        .state("no changes made")
                        .advise("move it away if nothing needs it"));
                }
            }
        }
        Ok(all)
    }

    fn look(&self, path: &Utf8Path) -> Result<Found> {
        let file = match confined_files::open_regular(path.as_std_path(), false) {
            Ok(file) => file,
            Err(cause) if cause.kind() == std::io::ErrorKind::NotFound => return Ok(Found::Nothing),
            Err(cause) => return Err(io(path, "read", cause)),
        };
        let mut text = String::new();
        if let Err(cause) = file.take(MAX_UNIT).read_to_string(&mut text) {
            return Err(io(path, "read", cause));
        }
        let mut lines = text.lines();
        let ours = lines.next().is_some_and(|line| line.starts_with(MARK));
        Ok(match (ours, lines.next()) {
            (false, _) => Found::Other("is not a unit that `domsnap policy install` wrote".to_owned()),
            (true, Some(line)) if line == self.state_line() => Found::Ours,
            (true, _) => {
                Found::Other("is a unit of a domain of the same name in another state directory".to_owned())
            }
        })
    }

    fn state_line(&self) -> String {
        format!("# State directory: {}", self.state_dir)
    }

    /// The units that run `policy` of `domain`: each path with its text, the service first.
    ///
    /// # Errors
    /// [`ErrorKind::Refused`] for paths that no unit can have, and for a program that others can replace.
    pub fn units(
        &self,
        session: &Session,
        domain: &DomainName,
        policy: &Policy,
    ) -> Result<Vec<(Utf8PathBuf, String)>> {
        let command = command(session, &self.state_dir, domain)?;
        let mut arguments = Vec::new();
        for word in &command {
            arguments.push(quoted(word)?);
        }
        let head =
            format!("{MARK}{domain}`; `domsnap policy remove {domain}` removes it.\n{}\n", self.state_line());
        let service = format!(
            "{head}[Unit]\n\
             Description=domsnap: the policy of domain {domain}\n\
             Documentation=man:domsnap-policy-run(1)\n\
             RequiresMountsFor={state}\n\
             \n\
             [Service]\n\
             Type=oneshot\n\
             ExecStart={arguments}\n\
             # An interrupted operation is rolled back: domsnap gets the signal, and time.\n\
             KillMode=mixed\n\
             TimeoutStopSec=15min\n\
             Nice=10\n\
             IOSchedulingClass=idle\n",
            state = quoted(self.state_dir.as_str())?,
            arguments = arguments.join(" "),
        );
        let every = policy.spec.every()?;
        let delay = match every {
            Every::Minutes(minutes) => u32::from(minutes) * 3,
            Every::Hourly => 120,
            _ => 300,
        };
        let mut timer = format!(
            "{head}[Unit]\n\
             Description=domsnap: the times of the policy of domain {domain}\n\
             \n\
             [Timer]\n\
             OnCalendar={}\n\
             # What was missed while the machine was off is run once, when it is on again.\n\
             Persistent=true\n\
             RandomizedDelaySec={delay}\n",
            on_calendar(&policy.spec)?,
        );
        if matches!(every, Every::Minutes(_)) {
            timer.push_str("AccuracySec=1s\n");
        }
        let _ = write!(timer, "\n[Install]\nWantedBy=timers.target\n");
        Ok(vec![(self.path(domain, "service"), service), (self.path(domain, "timer"), timer)])
    }

    /// Writes `units`, and has systemd use them.
    pub fn install(
        &self,
        session: &Session,
        units: &[(Utf8PathBuf, String)],
    ) -> std::result::Result<(), Failure> {
        self.write(units)?;
        let timer =
            units.iter().find_map(|(path, _)| path.file_name().filter(|name| name.ends_with(".timer")));
        let Some(timer) = timer else { return Ok(()) };
        self.ask(session, &["daemon-reload"])?;
        self.ask(session, &["enable", timer])?;
        // A timer that runs already does not take new times by itself.
        self.ask(session, &["restart", timer])
    }

    fn write(&self, units: &[(Utf8PathBuf, String)]) -> Result<()> {
        let directory = Directory::make_all(self.directory.as_std_path(), 0o755)
            .map_err(|cause| io(&self.directory, "made", cause))?;
        for (path, text) in units {
            let write = || {
                let name = FileName::new(path.file_name().unwrap_or_default())
                    .map_err(|bad| std::io::Error::other(bad.to_string()))?;
                let new = FileName::new(new_name(path.file_name().unwrap_or_default()))
                    .map_err(|bad| std::io::Error::other(bad.to_string()))?;
                // 1) The text is durable under another name, which systemd does not read. A crash leaves that
                //    file, and it is removed here.
                if directory.look(&new)?.is_some() {
                    directory.remove(&new)?;
                }
                let mut file = directory.create_new(&new, 0o644)?;
                file.write_all(text.as_bytes())?;
                file.sync_all()?;
                // 2) It gets its name: the old unit or the new one, and never a part of one.
                directory.rename(&new, &name, None)?;
                directory.sync()
            };
            write().map_err(|cause| io(path, "written", cause))?;
        }
        Ok(())
    }

    /// Has systemd forget the timer of `domain`, and removes its units. Returns those that were removed.
    pub fn remove(
        &self,
        session: &Session,
        domain: &DomainName,
    ) -> std::result::Result<Vec<Utf8PathBuf>, Failure> {
        let units = self.installed(domain)?;
        let timer = units.iter().find_map(|path| path.file_name().filter(|name| name.ends_with(".timer")));
        if let Some(timer) = timer {
            self.ask(session, &["disable", "--now", timer])?;
        }
        for path in &units {
            confined_files::remove(path.as_std_path()).map_err(|cause| io(path, "removed", cause))?;
            confined_files::sync_directory_of(path.as_std_path())
                .map_err(|cause| io(path, "removed", cause))?;
        }
        for ending in ["timer", "service"] {
            // What an interrupted installation may have left. No other program makes a file of this name.
            let new = self.directory.join(new_name(&format!("{}.{ending}", base(domain))));
            if new.is_file() && !new.is_symlink() {
                confined_files::remove(new.as_std_path()).map_err(|cause| io(&new, "removed", cause))?;
            }
        }
        if !units.is_empty() {
            self.ask(session, &["daemon-reload"])?;
        }
        Ok(units)
    }

    /// Runs a command of systemd.
    fn ask(&self, session: &Session, arguments: &[&str]) -> std::result::Result<(), Failure> {
        let Some(systemctl) = &self.systemctl else { return Ok(()) };
        let mut command = systemctl.clone();
        command.extend(arguments.iter().map(|word| (*word).to_owned()));
        let program = Program { what: "systemd's command", command: &command, variables: &[], limit: LIMIT };
        session.change(program.run(&session.cancel()))
    }

    /// Asks systemd if it understands the calendar expression of `spec`. Without the program that knows, the
    /// expression counts as understood.
    pub fn require_understood(
        &self,
        session: &Session,
        spec: &PolicySpec,
    ) -> std::result::Result<(), Failure> {
        let Some(analyze) = found(&["/usr/bin/systemd-analyze", "/bin/systemd-analyze"]) else {
            return Ok(());
        };
        if spec.on_calendar.is_none() {
            return Ok(());
        }
        let command = [analyze, "calendar".to_owned(), on_calendar(spec)?];
        let program = Program { what: "systemd's command", command: &command, variables: &[], limit: LIMIT };
        session.ask(program.run(&session.cancel())).map_err(|failure| {
            let text = format!("systemd does not understand the policy's on-calendar: {}", failure.message());
            Failure::from(Error::new(ErrorKind::Usage, text).advise("`man systemd.time` has the form"))
        })
    }
}

/// What is at a unit's path.
enum Found {
    Nothing,
    Ours,
    Other(String),
}

fn io(path: &Utf8Path, done: &str, cause: std::io::Error) -> Error {
    Error::new(ErrorKind::Io, format!("{path} cannot be {done}")).because(cause)
}

/// The name of a unit that is not complete. systemd does not read it.
fn new_name(unit: &str) -> String {
    format!(".{unit}.domsnap-new")
}

/// The directory of the units of a user who is not root.
fn of_user() -> Result<Utf8PathBuf> {
    let said = |name: &str| std::env::var(name).ok().map(Utf8PathBuf::from).filter(|path| path.is_absolute());
    said("XDG_CONFIG_HOME")
        .or_else(|| said("HOME").map(|home| home.join(".config")))
        .map(|config| config.join("systemd/user"))
        .ok_or_else(|| {
            Error::new(ErrorKind::Refused, "no place for units: neither XDG_CONFIG_HOME nor HOME is set")
                .state("no changes made")
                .advise("name one with --units DIR")
        })
}

/// The name of a domain's units, without the ending. Of the characters of a domain's name, `+` has no place
/// in a unit's name.
fn base(domain: &DomainName) -> String {
    let name = domain.as_str();
    // A name is ASCII, so it can be cut anywhere.
    let name = match name.get(..MAX_NAME) {
        Some(head) if name.len() > MAX_NAME => format!("{head}-{:016x}", fingerprint(name)),
        _ => name.to_owned(),
    };
    format!("domsnap-policy-{}", name.replace('+', "\\x2b"))
}

/// A number that differs between names, by FNV-1a.
fn fingerprint(name: &str) -> u64 {
    name.bytes().fold(0xcbf2_9ce4_8422_2325, |hash, byte| {
        (hash ^ u64::from(byte)).wrapping_mul(0x0000_0100_0000_01b3)
    })
}

/// The calendar expression of a policy's timer, with the time zone of its periods.
fn on_calendar(spec: &PolicySpec) -> Result<String> {
    let expression = match &spec.on_calendar {
        Some(expression) => expression.trim().to_owned(),
        None => spec.every()?.on_calendar(),
    };
    let has_zone = expression.split_whitespace().last().is_some_and(|last| {
        last == "UTC" || (last.starts_with(|c: char| c.is_ascii_alphabetic()) && TimeZone::get(last).is_ok())
    });
    Ok(match &spec.zone {
        Some(zone) if !has_zone => format!("{expression} {zone}"),
        _ => expression,
    })
}

/// The command that runs the policy, with the options that this command was called with.
fn command(session: &Session, state_dir: &Utf8Path, domain: &DomainName) -> Result<Vec<String>> {
    let program = std::env::current_exe()
        .map_err(|cause| Error::new(ErrorKind::Io, "the path of domsnap is not known").because(cause))?;
    let program = Utf8PathBuf::try_from(program)
        .map_err(|cause| Error::new(ErrorKind::Refused, "the path of domsnap is not UTF-8").because(cause))?;
    require_own(&program, "the program", "have any program run by systemd")?;
    let global = &session.global;
    let mut command = vec![program.into_string(), "--state-dir".to_owned(), state_dir.to_string()];
    if let Ok((directory, true)) = crate::backends::directory(global) {
        command.extend(["--backend-dir".to_owned(), directory.into_string()]);
    }
    for directory in &global.allow_backing {
        command.extend(["--allow-backing".to_owned(), crate::backends::absolute(directory)?.into_string()]);
    }
    for (option, number) in [("--max-depth", global.max_depth), ("--lvm-area", global.lvm_area)] {
        command.extend(number.into_iter().flat_map(|number| [option.to_owned(), number.to_string()]));
    }
    command.extend(global.no_punch.then(|| "--no-punch".to_owned()));
    command.extend(["policy", "run"].map(str::to_owned));
    command.push(domain.to_string());
    Ok(command)
}

/// A word of a unit's command line, in quotes, with all that systemd would read in it escaped
/// (`man systemd.service`).
fn quoted(word: &str) -> Result<String> {
    if word.contains(char::is_control) {
        return Err(Error::new(ErrorKind::Refused, format!("no unit of systemd can name {word:?}"))
            .state("no changes made")
            .advise("use a path without control characters, or --no-timer"));
    }
    let mut text = String::from("\"");
    for c in word.chars() {
        match c {
            '"' | '\\' => text.extend(['\\', c]),
            '%' | '$' => text.extend([c, c]),
            c => text.push(c),
        }
    }
    text.push('"');
    Ok(text)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn unit_has_a_name_that_systemd_takes() {
        let of = |name: &str| base(&DomainName::new(name).unwrap());
        assert_eq!(of("web"), "domsnap-policy-web");
        assert_eq!(of("a:b_c.d-e+f"), "domsnap-policy-a:b_c.d-e\\x2bf");
        let (one, other) = (of(&"a".repeat(255)), of(&format!("{}b", "a".repeat(254))));
        assert!(one != other && one.len() < 255 - ".service".len(), "{one}");
        assert_ne!(of(&"a".repeat(180)), of(&"a".repeat(181)));
    }

    #[test]
    fn words_of_a_command_are_escaped() {
        assert_eq!(quoted("/srv/a b").unwrap(), "\"/srv/a b\"");
        assert_eq!(quoted(r#"/srv/%i$HOME"\x"#).unwrap(), r#""/srv/%%i$$HOME\"\\x""#);
        assert_eq!(quoted("/srv/a\nUser=root").unwrap_err().kind(), ErrorKind::Refused);
    }

    #[test]
    fn calendar_has_the_policys_zone() {
        let of = |every: &str, calendar: Option<&str>, zone: Option<&str>| {
            let mut spec: PolicySpec = toml::from_str(&format!("every = '{every}'")).unwrap();
            spec.on_calendar = calendar.map(str::to_owned);
            spec.zone = zone.map(str::to_owned);
            on_calendar(&spec).unwrap()
        };
        assert_eq!(of("10m", None, None), "*-*-* *:00/10:00");
        assert_eq!(of("hourly", None, Some("Asia/Kathmandu")), "*-*-* *:00:00 Asia/Kathmandu");
        assert_eq!(of("daily", Some("*-*-* 02:30"), Some("Europe/Berlin")), "*-*-* 02:30 Europe/Berlin");
        assert_eq!(of("daily", Some("*-*-* 02:30 UTC"), Some("Europe/Berlin")), "*-*-* 02:30 UTC");
    }
}
