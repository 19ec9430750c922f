//! What a running domain adds to a plan: the instant of a create, the window of a revert, memory.

use camino::{Utf8Path, Utf8PathBuf};

use super::{Merged, Planner};
use crate::{
    Anew, Beginning, Consistency, CreateRequest, DiskInstant, DomainStep, Edit, Error, ErrorKind, Group,
    Hypervisor, MAX_COMPRESSION, Machine, MemoryPlan, MemoryPoint, PlannedStep, PowerAfter, Quiesce, Result,
    RevertRequest, Seen, Snapshot, Step, Target,
};

/// A running domain as the planner sees it.
#[derive(Debug, Clone)]
pub struct Alive<'a> {
    /// What its hypervisor says.
    pub seen: &'a Seen,
    /// Of a revert to a snapshot with memory: what of the machine is not as it was then, each in words.
    pub differs: Vec<String>,
    /// Where memory images go.
    pub memory_dir: Utf8PathBuf,
    /// Why its memory cannot be saved, if so.
    pub cannot_save_memory: Option<String>,
    /// Why its disks cannot be detached, if so.
    pub cannot_detach: Option<String>,
}

/// What a snapshot's memory image is called.
pub(super) fn memory_file(directory: &Utf8Path, snapshot: &Snapshot) -> Utf8PathBuf {
    directory.join(format!("{}.memory", snapshot.id))
}

fn step(group: Group, step: &DomainStep, summary: impl Into<String>) -> PlannedStep {
    PlannedStep {
        group,
        step: Step {
            target: Target::of_domain(),
            action: serde_json::to_value(step).unwrap_or_default(),
            summary: summary.into(),
            bytes: 0,
        },
        edits: Vec::new(),
        deferrable: false,
        inside: false,
        window: false,
    }
}

impl Planner<'_> {
    /// Whether memory is taken.
    pub(super) fn with_memory(&self, request: &CreateRequest) -> Result<bool> {
        if let Some(level) = request.compress.filter(|level| *level > MAX_COMPRESSION) {
            return Err(Error::new(ErrorKind::Usage, format!("{level} is no level of compression"))
                .state("nothing was touched")
                .advise("levels are 1 (fast) to 19 (small); 0 does not compress"));
        }
        match (self.alive, request.memory) {
            (Some(_), wanted) => Ok(wanted.unwrap_or(true)),
            (None, Some(true)) => Err(self
                .off("it has no memory to be saved")
                .advise("leave --memory out: its disks are taken")),
            (None, _) => match (request.quiesce, request.then) {
                (Quiesce::Require, _) => Err(self
                    .off("nobody is in it who could freeze its file systems")
                    .advise("leave --quiesce out: what is shut down is clean")),
                (_, Some(PowerAfter::Running | PowerAfter::Paused)) => {
                    Err(self.off("it can neither run nor be paused afterwards").advise("leave --then out"))
                }
                (Quiesce::No | Quiesce::Try, Some(PowerAfter::Off) | None) => Ok(false),
            },
        }
    }

    fn off(&self, why: &str) -> Error {
        let how = match self.domain.hypervisor {
            Hypervisor::None => "is not known to run anywhere",
            Hypervisor::Qemu | Hypervisor::Xen => "does not run",
        };
        Error::new(ErrorKind::Refused, format!("domain {} {how}: {why}", self.domain.name))
            .state("nothing was touched")
    }

    /// Puts the instant around the disks of a create.
    pub(super) fn create_alive(
        &self,
        request: &CreateRequest,
        instants: Vec<(Target, DiskInstant)>,
        snapshot: &mut Snapshot,
        merged: &mut Merged,
    ) -> Result<()> {
        let memory = self.with_memory(request)?;
        let Some(alive) = self.alive else { return Ok(()) };
        if memory {
            require(
                &alive.cannot_save_memory,
                "memory cannot be saved",
                "or leave memory out with --disk-only",
            )?;
        }
        let live = request.live;
        snapshot.consistency = if memory { Consistency::Memory } else { Consistency::Crash };
        let machine = Machine::new(alive.seen.machine.clone(), &alive.seen.summary);
        snapshot.machine = Some(machine.id.clone());
        merged.commit.insert(0, Edit::AddMachine { machine: Box::new(machine) });
        let external: Vec<Target> = instants
            .iter()
            .filter(|(_, instant)| matches!(instant, DiskInstant::Overlay { .. }))
            .map(|(target, _)| target.clone())
            .collect();
        let file = memory_file(&alive.memory_dir, snapshot);
        let words = match (memory, live) {
            (true, true) => "cut all disks and memory at one instant, and write memory while the guest runs",
            (true, false) => {
                "cut all disks and memory at one instant; the guest stands still until memory is written"
            }
            (false, _) => "cut all disks at one instant",
        };
        let plan = MemoryPlan { file: file.clone(), live, budget_ms: millis(request.budget) };
        let instant = DomainStep::Instant {
            disks: instants,
            running: alive.seen.running,
            memory: memory.then_some(plan),
            quiesce: request.quiesce,
            quiesce_limit_ms: millis(request.quiesce_limit),
            then: request.then,
        };
        merged.first(step(Group::Cut, &instant, words));
        if memory {
            let tag = snapshot.name.as_str().to_owned();
            snapshot.memory =
                Some(MemoryPoint { file: file.clone(), bytes: 0, full: None, running: alive.seen.running });
            let of_domain = self.domain.control.as_ref().and_then(|control| control.compress);
            let compress = request.compress.or(of_domain).unwrap_or(0);
            let also = if compress > 0 { "compress it, " } else { "" };
            let words = format!("wait for the memory image {file}, {also}and make it durable");
            merged.last(step(Group::Cut, &DomainStep::SaveMemory { file, tag, compress }, words));
        }
        if !external.is_empty() {
            let rehome = DomainStep::Rehome { disks: external };
            merged.first(step(
                Group::Finish,
                &rehome,
                "make the hypervisor know frozen images by their own names",
            ));
        }
        if request.then == Some(PowerAfter::Off) {
            merged.last(go_on(None, false, Some(PowerAfter::Off)));
        }
        Ok(())
    }

    /// Puts the window, and memory, around the disks of a revert.
    pub(super) fn revert_alive(
        &self,
        wanted: &Snapshot,
        request: &RevertRequest,
        merged: &mut Merged,
    ) -> Result<()> {
        let off = request.power == Some(PowerAfter::Off);
        let memory = wanted.memory.as_ref().filter(|_| !off);
        let as_it_was = memory.map(|memory| match memory.running {
            true => PowerAfter::Running,
            false => PowerAfter::Paused,
        });
        let power = request.power.or(as_it_was);
        let file = memory.map(|memory| memory.file.clone());
        if let Some(file) = &file {
            if let Some(alive) = self.alive
                && !alive.differs.is_empty()
            {
                return Err(Error::new(
                    ErrorKind::Refused,
                    format!(
                        "the memory of snapshot {} was saved on another machine than domain {} is now: {}",
                        wanted.name,
                        self.domain.name,
                        alive.differs.join("; ")
                    ),
                )
                .state("nothing was touched")
                .advise(
                    "shut the domain down and revert then: it is started as it was recorded; or start it as it was, or \
                     revert its disks alone with --off",
                ));
            }
            let check = DomainStep::CheckMemory { file: file.clone() };
            merged.first(step(Group::Prepare, &check, format!("check the memory image {file}")));
        }
        let Some(alive) = self.alive else {
            return match (file, power) {
                (Some(file), power) => {
                    merged.last(go_on(Some(file), false, power));
                    Ok(())
                }
                (None, Some(PowerAfter::Running | PowerAfter::Paused)) => Err(self
                    .off(&format!("snapshot {} has no memory that it could be started from", wanted.name))
                    .advise(
                        "leave --running and --paused out, and start it afterwards as it is always started",
                    )),
                (None, Some(PowerAfter::Off) | None) => Ok(()),
            };
        };
        require(&alive.cannot_detach, DETACHED, "or shut the domain down and revert then")?;
        let disks: Vec<Target> = self
            .disks
            .iter()
            .filter(|disk| disk.state.attached && wanted.point(disk.target()).is_some())
            .map(|disk| disk.target().clone())
            .collect();
        let power = power.or(Some(as_now(alive)));
        let from = match (&file, off) {
            (_, true) => Beginning::Off,
            (Some(file), false) => Beginning::Memory(file.clone()),
            (None, false) => Beginning::Boot,
        };
        let anew = Some(Anew { from, safety: request.safety, config: request.config.clone() });
        merged.first(open_window(Group::Cut, &disks, alive, anew.clone()));
        merged.last(attach(Group::Cut, &disks, anew));
        if off {
            merged.last(go_on(None, false, power));
        } else {
            merged.first(go_on(file.clone(), file.is_none(), power));
        }
        Ok(())
    }

    /// Removes the memory of deleted snapshots, and puts a window around what changes frozen images of an open chain.
    ///
    /// # Errors
    /// [`ErrorKind::Unsupported`] where a window is needed and the hypervisor cannot let go of its disks.
    pub(super) fn delete_alive(&self, doomed: &[&Snapshot], merged: &mut Merged) -> Result<()> {
        if let Some(alive) = self.alive {
            let (in_window, others): (Vec<_>, Vec<_>) =
                std::mem::take(&mut merged.steps).into_iter().partition(|planned| planned.window);
            if !in_window.is_empty() {
                let instead = "or shut the domain down and delete then";
                require(&alive.cannot_detach, DETACHED, instead)?;
                let mut disks: Vec<Target> =
                    in_window.iter().map(|planned| planned.step.target.clone()).collect();
                disks.dedup();
                merged.steps.push(open_window(Group::Finish, &disks, alive, None));
                merged.steps.extend(in_window);
                merged.steps.push(attach(Group::Finish, &disks, None));
                merged.steps.push(go_on(None, false, Some(as_now(alive))));
            }
            merged.steps.extend(others);
        }
        for memory in doomed.iter().filter_map(|snapshot| snapshot.memory.as_ref()) {
            let words = format!("remove the memory image {}", memory.file);
            merged.last(step(Group::Finish, &DomainStep::RemoveMemory { file: memory.file.clone() }, words));
        }
        Ok(())
    }
}

const DETACHED: &str = "the disks of the running domain cannot be detached";

/// Refuses what cannot be done through the connection to the hypervisor.
fn require(cannot: &Option<String>, what: &str, instead: &str) -> Result<()> {
    match cannot {
        None => Ok(()),
        Some(why) => Err(Error::new(ErrorKind::Unsupported, format!("{what}: {why}"))
            .state("nothing was touched")
            .advise(format!(
                "give QEMU a Unix socket (-qmp unix:PATH,server=on,wait=off) and use that, {instead}"
            ))),
    }
}

/// What the guest does now.
fn as_now(alive: &Alive<'_>) -> PowerAfter {
    match alive.seen.running {
        true => PowerAfter::Running,
        false => PowerAfter::Paused,
    }
}

fn open_window(group: Group, disks: &[Target], alive: &Alive<'_>, anew: Option<Anew>) -> PlannedStep {
    let opening = DomainStep::OpenWindow { disks: disks.to_vec(), running: alive.seen.running, anew };
    step(group, &opening, format!("pause the guest and set the files of {} free", names(disks)))
}

fn attach(group: Group, disks: &[Target], anew: Option<Anew>) -> PlannedStep {
    let attach = DomainStep::Attach { disks: disks.to_vec(), anew };
    step(group, &attach, format!("give {} what the configured paths name now", names(disks)))
}

fn go_on(memory: Option<Utf8PathBuf>, reset: bool, power: Option<PowerAfter>) -> PlannedStep {
    let words = match (&memory, reset, power) {
        (_, _, Some(PowerAfter::Off)) => "end the domain's process".to_owned(),
        (Some(file), _, Some(PowerAfter::Paused)) => {
            format!("load the memory image {file}; the guest stays paused")
        }
        (Some(file), _, _) => format!("load the memory image {file} and let the guest go on"),
        (None, true, Some(PowerAfter::Paused)) => "reset the guest, which stays paused".to_owned(),
        (None, true, _) => "reset the guest".to_owned(),
        (None, false, _) => "let the guest go on".to_owned(),
    };
    step(Group::Finish, &DomainStep::Continue { memory, reset, power }, words)
}

fn names(disks: &[Target]) -> String {
    disks.iter().map(Target::as_str).collect::<Vec<_>>().join(", ")
}

fn millis(duration: std::time::Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)
}
