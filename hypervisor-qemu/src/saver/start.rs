//! Starts a QEMU from a memory image.

use std::{
    fs::File,
    io,
    os::unix::{fs::FileExt, net::UnixStream, process::CommandExt},
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    sync::Arc,
    time::{Duration, Instant},
};

use qmp::Agent;
use serde_json::Value;
use snapcore::hypervisor::{GuestChange, PowerAfter, StartFromMemory, StartedDomain, StepOutcome};
use snapcore::{ActivePath, Domain, Error, ErrorKind, Result};
use tokio::time::sleep;

use super::{
    clones::usable,
    cut::MemoryMetadata,
    describe::DESCRIPTOR,
    error::{blocking, to_engine},
    fresh,
    live::set_clock,
    media::put_back,
    reach, recorded,
    section::reset,
    starting::Starting,
    unpacked::Unpacked,
};
use crate::{
    discover::{Abilities, Discovery, Process, media, nbd_sockets},
    generation_id,
    machine::Machine,
    memory::{Image, Stored, restore_in_place},
    stream::{Mapping, Split},
};

/// Time limit until it answers.
const ANSWERING: Duration = Duration::from_secs(60);

/// Time limit until its memory is loaded.
const LOADING: Duration = Duration::from_secs(600);

/// Time limit until a QEMU that has closed its socket ends.
const ENDING: Duration = Duration::from_secs(2);

/// Time between two polls.
const LOOK: Duration = Duration::from_millis(20);

/// The command that starts a QEMU.
#[derive(Clone)]
struct Recipe {
    /// The program, if it is known apart from the first word.
    program: Option<PathBuf>,
    args: Vec<String>,
    environment: Option<Vec<(String, String)>>,
    directory: Option<PathBuf>,
    /// The reason why domsnap cannot run it.
    cannot: Option<String>,
    /// True if it is the recorded command, and not one that the user configured.
    is_recorded: bool,
    /// True if the generation ID that it gives the guest is another one than at any start before.
    is_fresh: bool,
}

impl Recipe {
    /// Returns the command for the user, who does not have the unpacked image: with `incoming` instead of
    /// that.
    fn printed(mut self, incoming: Option<String>) -> Vec<String> {
        let place = self.args.iter().position(|word| word == "-incoming").map(|at| at + 1);
        if let (Some(word), Some(incoming)) = (place.and_then(|at| self.args.get_mut(at)), incoming) {
            *word = incoming;
        }
        self.args
    }
}

/// Starts the domain from a memory image. Its disks are those of its command: the configured paths.
///
/// If domsnap cannot start it (another user's process, a missing program, a descriptor that only its
/// supervisor has), that is no error: the facts then have the command. If QEMU rejects the memory, that is an
/// error, and no process is left.
pub(super) async fn start(start: StartFromMemory<'_>, unpacked: &Unpacked) -> Result<StepOutcome> {
    let mut facts = StepOutcome::default();
    let file = start.image.require_path()?;
    let path = file.to_owned();
    let stored = blocking(move || Stored::open(path.as_std_path())).await?;
    // QEMU loads this image; it exists until this function returns.
    let image = unpacked.take(file).await?;
    let by_hand = match &stored {
        Stored::Packed(packed) => Some(packed.incoming().map_err(to_engine)?),
        Stored::Plain(_) => None,
    };
    let machine = start.machine.map(recorded).transpose()?;
    let abilities = machine.as_ref().map(|machine| machine.abilities.clone()).unwrap_or_default();
    let ran = serde_json::from_slice::<MemoryMetadata>(image.metadata()).ok().map(|about| about.running);
    let runs = match start.power {
        Some(PowerAfter::Running) => Some(true),
        Some(PowerAfter::Paused | PowerAfter::Off) => Some(false),
        None => ran,
    };
    let record = machine.clone();
    // A clone's memory may be taken apart, and its command is the one that its machine was planned with.
    let planned = record.as_ref().map(|record| record.process.command_line.as_slice()).unwrap_or_default();
    let is_planned = start.domain.control.as_ref().is_some_and(|control| control.start == planned);
    let split = match is_planned && abilities.read_only_ram {
        true => {
            let path = file.to_owned();
            blocking(move || Ok(usable(path.as_std_path()))).await?
        }
        false => None,
    };
    let process = machine.map(|machine| machine.process);
    let Some(recipe) = recipe(&start, runs, process, (&image, split.as_ref()), &abilities)? else {
        facts.notes.push(format!(
            "the command that starts the domain is not known: start it with `-incoming` and {}, or register the domain with its \
             command",
            by_hand.map_or_else(|| format!("the memory image {file}"), |word| format!("{word:?}"))
        ));
        return Ok(facts);
    };
    if start.domain.active_path == ActivePath::New {
        facts.notes.push(
            "its configuration must name the active images of its disks, which have new paths".to_owned(),
        );
    }
    let mut recipe = recipe;
    if recipe.is_recorded && recipe.cannot.is_none() {
        let missing = record.as_ref().map(|record| plugged_since(record, &recipe.args)).unwrap_or_default();
        if !missing.is_empty() {
            recipe.cannot = Some(format!(
                "devices that were plugged in after it was started are not in its command, and its memory needs them: {} (add \
                 them and their disks to the command)",
                missing.join(", ")
            ));
        }
    }
    if let Some(why) = &recipe.cannot {
        facts.notes.push(format!("the domain was not started: {why}; run the command to start it"));
        facts.start = recipe.printed(by_hand);
        return Ok(facts);
    }
    // Its command may name other media than its memory has: then the guest stays paused until they are
    // changed.
    let has_media =
        record.as_ref().is_some_and(|record| record.drives.iter().any(|drive| drive.medium.is_some()));
    // A command that domsnap cannot read, such as a script, may have a generation ID that is always the same.
    let places = match recipe.is_fresh {
        true => Vec::new(),
        false => {
            let image = Arc::clone(&image);
            blocking(move || image.generation_ids()).await?
        }
    };
    // The guest is resumed after the load, and does not run by itself: until then, what a crash leaves can be
    // ended. Its disks would be newer than the memory afterwards.
    let mut spawned = recipe.clone();
    if runs == Some(true) {
        spawned.args.push("-S".to_owned());
    }
    let address =
        start.domain.control.as_ref().map(|control| PathBuf::from(&control.address)).unwrap_or_default();
    let noted = address.clone();
    if blocking(move || Starting::has_run(&noted)).await? {
        facts.notes.push(
            "the domain was started before, by a command that was interrupted, and its guest may have run and written to its \
             disks: it is not started from the memory of the snapshot once more; it is off on these disks; revert again to \
             have exactly the snapshot"
                .to_owned(),
        );
        return Ok(facts);
    }
    // If it is not known whether the guest ran, QEMU decides when it does.
    let starting = match runs {
        Some(_) => {
            let address = address.clone();
            Some(blocking(move || Starting::begin(&address)).await?)
        }
        None => None,
    };
    let mut process = match Started::spawn(&spawned, starting) {
        Ok(process) => process,
        Err(error) => {
            facts.notes.push(format!("the domain was not started: {error}; run the command to start it"));
            facts.start = recipe.printed(by_hand);
            return Ok(facts);
        }
    };
    let loaded = async {
        let machine = process.answers(&address).await?;
        process.loads(&machine).await?;
        let state = machine.run_state().await.map_err(to_engine)?;
        if state.must_be_reset() {
            // QEMU takes over the state of a guest that had switched itself off from its memory, and resumes
            // it only after a reset. The reset clears that state, and the memory is loaded again without it.
            reset(&machine).await?;
            restore_in_place(&machine, &image, &[], LOADING).await.map_err(to_engine)?;
        }
        if let Some(record) = record.as_ref().filter(|_| has_media) {
            let now = Discovery::read(&machine).await.map_err(to_engine)?;
            let differing = media(record, &now);
            if !differing.is_empty() {
                put_back(&machine, &differing).await?;
            }
        }
        let mut note = None;
        if !places.is_empty() && !machine.run_state().await.map_err(to_engine)?.running {
            note =
                generation_id::renew(&machine, &places).await.err().map(|error| generation_id::note(&error));
        }
        if runs == Some(true) {
            process.ready()?;
        }
        Ok::<_, Error>((machine, note))
    };
    let machine = match loaded.await {
        Ok((machine, note)) => {
            facts.notes.extend(note);
            machine
        }
        Err(error) => {
            process.end();
            return Err(error.context(format!("starting domain {} from {file}", start.domain.name)));
        }
    };
    facts.guest = Some(GuestChange::Started);
    // The process that serves the socket: the started one may have made itself a daemon.
    facts.started = Some(StartedDomain::process(machine.pid(), recipe.args));
    let resumed = match runs {
        Some(true) => machine.cont().await,
        Some(false) | None => Ok(()),
    };
    process.leave();
    resumed.map_err(to_engine)?;
    if !machine.run_state().await.map_err(to_engine)?.running {
        machine.activate_disks().await.map_err(to_engine)?;
    }
    if machine.run_state().await.map_err(to_engine)?.running {
        let agent = start.domain.control.as_ref().and_then(|control| control.agent.as_ref());
        let agent = agent.map(|socket| Agent::new(socket.as_std_path()));
        facts.notes.extend(set_clock(&machine, agent.as_ref()).await);
    }
    Ok(facts)
}

/// Refuses a start by the recorded command if a server that serves one of its disks is down: QEMU would end
/// at once, after the disks were reverted.
pub(super) fn may_start(domain: &Domain, machine: Option<&Value>) -> Result<()> {
    let is_configured = domain.control.as_ref().is_some_and(|control| !control.start.is_empty());
    let Some(machine) = machine.filter(|_| !is_configured).map(recorded).transpose()? else { return Ok(()) };
    if machine.process.uid.is_some_and(|uid| uid != rustix::process::geteuid().as_raw()) {
        // The user starts it.
        return Ok(());
    }
    for socket in nbd_sockets(&machine.process) {
        // What cannot be looked at is QEMU's to report. A service manager's socket starts the server.
        let Err(error) = UnixStream::connect(&socket) else { continue };
        if matches!(error.kind(), io::ErrorKind::NotFound | io::ErrorKind::ConnectionRefused) {
            let socket = socket.display();
            let detail = format!(
                "the command of domain {} has a disk that is served at {socket}, and no server answers there",
                domain.name
            );
            return Err(Error::new(ErrorKind::Refused, detail)
                .state("no changes made")
                .advise(format!("start the server: domsnap disk serve IMAGE --socket {socket}")));
        }
    }
    Ok(())
}

/// Returns the command; `None` if it is not known.
fn recipe(
    start: &StartFromMemory<'_>,
    runs: Option<bool>,
    recorded: Option<Process>,
    (image, split): (&Image, Option<&Split>),
    abilities: &Abilities,
) -> Result<Option<Recipe>> {
    let configured = start.domain.control.as_ref().map(|control| control.start.clone()).unwrap_or_default();
    let mut recipe = match (configured.is_empty(), recorded) {
        (false, _) => Recipe {
            program: None,
            args: configured,
            environment: None,
            directory: None,
            cannot: None,
            is_recorded: false,
            is_fresh: false,
        },
        (true, Some(process)) if !process.command_line.is_empty() => {
            let own = rustix::process::geteuid().as_raw();
            let cannot = process.uid.filter(|uid| *uid != own).map(|uid| format!("it ran as the user {uid}"));
            Recipe {
                program: process.program,
                args: process.command_line,
                environment: Some(process.environment),
                directory: process.directory,
                cannot,
                is_recorded: true,
                is_fresh: false,
            }
        }
        (true, _) => return Ok(None),
    };
    if recipe.args.iter().any(|word| word.split(',').any(|part| part == DESCRIPTOR)) {
        recipe.cannot = Some("its command names descriptors, which only its supervisor can open".to_owned());
    }
    let incoming = match split {
        Some(split) => split.incoming(abilities),
        None => image.incoming(abilities),
    };
    let incoming = incoming.map_err(to_engine)?;
    let mut args = Vec::new();
    let mut skip = false;
    for word in recipe.args {
        if std::mem::take(&mut skip) {
            continue;
        }
        match word.strip_prefix("--").or_else(|| word.strip_prefix('-')) {
            Some("incoming") => skip = true,
            _ => args.push(word),
        }
    }
    if let Some(split) = split {
        args.extend(split.arguments(Mapping::ReadOnly).map_err(to_engine)?);
    }
    args.extend(["-incoming".to_owned(), incoming.argument().to_owned()]);
    if runs == Some(false) {
        args.push("-S".to_owned());
    }
    recipe.is_fresh = fresh::generation_id(&mut args);
    recipe.args = args;
    Ok(Some(recipe))
}

/// Lists the devices of a recorded machine that its command does not name, by their ids. A QEMU started by
/// that command lacks devices that the memory has, and refuses it.
pub(super) fn plugged_since(machine: &Discovery, args: &[String]) -> Vec<String> {
    if args.iter().any(|word| word.trim_start_matches('-') == "readconfig") {
        return Vec::new();
    }
    let ids = machine.devices.iter().filter_map(|device| device.path.strip_prefix("/machine/peripheral/"));
    let is_named = |id: &str| {
        let (plain, json) = (format!("id={id}"), format!("\"id\":\"{id}\""));
        args.iter().any(|word| {
            word.split(',').any(|part| part == plain) || word.replace(char::is_whitespace, "").contains(&json)
        })
    };
    ids.filter(|id| !is_named(id)).map(str::to_owned).collect()
}

/// The environment and the working directory of a QEMU. Absent: those of this process.
#[derive(Debug, Clone, Default)]
pub(crate) struct Surroundings {
    pub(crate) environment: Option<Vec<(String, String)>>,
    pub(crate) directory: Option<PathBuf>,
}

/// A QEMU that waits for its memory. Dropping it kills it.
pub(crate) struct Spawned(Option<Started>);

impl Spawned {
    /// Starts a command that has `-incoming defer`, and waits until it answers at its QMP socket. No process
    /// is left after an error.
    pub(crate) async fn start(
        command: Vec<String>,
        socket: &Path,
        surroundings: Surroundings,
    ) -> Result<(Self, Machine)> {
        let recipe = Recipe {
            program: None,
            args: command,
            environment: surroundings.environment,
            directory: surroundings.directory,
            cannot: None,
            is_recorded: false,
            is_fresh: true,
        };
        let address = socket.to_owned();
        let starting = blocking(move || Starting::begin(&address)).await?;
        let mut started = Started::spawn(&recipe, Some(starting))
            .map_err(|error| Error::new(ErrorKind::Io, format!("QEMU cannot be started: {error}")))?;
        match started.answers(socket).await {
            Ok(machine) => Ok((Self(Some(started)), machine)),
            Err(error) => {
                started.end();
                Err(error)
            }
        }
    }

    /// Returns the end of its error output.
    pub(crate) fn error_output(&self) -> String {
        self.0.as_ref().map(Started::error_output).unwrap_or_default()
    }

    /// Leaves it running.
    pub(crate) fn leave(mut self) {
        if let Some(started) = self.0.take() {
            started.leave();
        }
    }
}

impl Drop for Spawned {
    fn drop(&mut self) {
        if let Some(started) = &mut self.0 {
            started.end();
        }
    }
}

/// A QEMU that was started.
struct Started {
    child: Option<Child>,
    /// Its error output: a file without a name.
    stderr: File,
    pid: u32,
    /// What a recovery knows of it until it is handed over.
    starting: Option<Starting>,
}

impl Started {
    /// Starts it detached from this process: in its own process group, with none of our files open.
    fn spawn(recipe: &Recipe, starting: Option<Starting>) -> std::io::Result<Self> {
        let stderr = File::from(rustix::fs::memfd_create("domsnap-stderr", rustix::fs::MemfdFlags::CLOEXEC)?);
        let args = recipe.args.split_first();
        let (first, rest) = args.ok_or_else(|| std::io::Error::other("the command is empty"))?;
        let mut command = Command::new(recipe.program.as_deref().unwrap_or(Path::new(first)));
        command.arg0(first).args(rest).stdin(Stdio::null()).stdout(Stdio::null()).stderr(stderr.try_clone()?);
        command.process_group(0);
        if let Some(environment) = &recipe.environment {
            command.env_clear().envs(environment.iter().map(|(name, value)| (name, value)));
        }
        command.envs(starting.as_ref().map(Starting::variable));
        if let Some(directory) = &recipe.directory {
            command.current_dir(directory);
        }
        let child = command.spawn()?;
        let pid = child.id();
        Ok(Self { child: Some(child), stderr, pid, starting })
    }

    /// Waits until it answers at its QMP socket.
    async fn answers(&mut self, socket: &Path) -> Result<Machine> {
        let until = Instant::now() + ANSWERING;
        loop {
            // A socket that an earlier process left has no listener.
            match reach(socket, ANSWERING).await {
                Ok(Some(machine)) => return Ok(machine),
                Ok(None) => self.expect_alive()?,
                Err(error) => return Err(self.ended_or(error).await),
            }
            if Instant::now() >= until {
                let detail =
                    format!("it does not serve {} within {} s", socket.display(), ANSWERING.as_secs());
                return Err(Error::new(ErrorKind::Io, detail)
                    .advise("register the domain with the QMP socket that its command names"));
            }
            sleep(LOOK).await;
        }
    }

    /// Waits until its memory is loaded.
    async fn loads(&mut self, machine: &Machine) -> Result<()> {
        let until = Instant::now() + LOADING;
        loop {
            match machine.run_state().await {
                Ok(state) if state.word != "inmigrate" => return Ok(()),
                Ok(_) => {}
                Err(error) => return Err(self.ended_or(to_engine(error)).await),
            }
            self.expect_alive()?;
            if Instant::now() >= until {
                let detail = format!("its memory is not loaded within {} s", LOADING.as_secs());
                return Err(Error::new(ErrorKind::Io, detail));
            }
            sleep(LOOK).await;
        }
    }

    /// Returns the error for a QEMU that does not answer: if it has ended, that and the reason.
    async fn ended_or(&mut self, error: Error) -> Error {
        let until = Instant::now() + ENDING;
        while Instant::now() < until {
            if let Err(ended) = self.expect_alive() {
                return ended;
            }
            sleep(LOOK).await;
        }
        error.state(format!("QEMU said: {}", self.error_output()))
    }

    /// Fails if it has ended. (A QEMU that makes itself a daemon ends with success, and continues as another
    /// process.)
    fn expect_alive(&mut self) -> Result<()> {
        let ended = self.child.as_mut().and_then(|child| child.try_wait().ok().flatten());
        match ended {
            Some(status) if !status.success() => {
                self.child = None;
                let detail = format!("QEMU ended ({status}): {}", self.error_output());
                Err(Error::new(ErrorKind::Io, detail)
                    .advise("the disks are as at the snapshot; revert without memory to boot from them"))
            }
            _ => Ok(()),
        }
    }

    /// Returns the end of its error output.
    fn error_output(&self) -> String {
        let length = self.stderr.metadata().map(|about| about.len()).unwrap_or_default();
        let mut bytes = vec![0; usize::try_from(length.min(4096)).unwrap_or_default()];
        let read = self.stderr.read_at(&mut bytes, length.saturating_sub(4096)).unwrap_or_default();
        bytes.truncate(read);
        let text = String::from_utf8_lossy(&bytes).trim().replace('\n', "; ");
        if text.is_empty() { format!("process {} said nothing", self.pid) } else { text }
    }

    /// Notes that its guest may run from now on.
    fn ready(&mut self) -> Result<()> {
        match &mut self.starting {
            Some(starting) => starting.ready().map_err(to_engine),
            None => Ok(()),
        }
    }

    /// Kills it, and the process as which it continues if it has made itself a daemon.
    fn end(&mut self) {
        if let Some(child) = &mut self.child {
            let _ = child.kill();
            let _ = child.wait();
        }
        if let Some(starting) = &self.starting
            && let Err(error) = starting.end()
        {
            tracing::warn!(%error, "a QEMU that could not be started may be left");
        }
    }

    /// Hands it over and leaves it running; a thread waits for its end, so that it does not stay as a zombie.
    fn leave(mut self) {
        if let Some(mut child) = self.child.take() {
            std::thread::spawn(move || child.wait());
        }
    }
}
