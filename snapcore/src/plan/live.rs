//! The part of a plan for a running domain: the instant of a create, the detached section of a revert,
//! memory.

use std::sync::Arc;

use super::Planner;
use super::merged::{Merged, of_domain};
use crate::address::DiskAddress;
use crate::domain::Machine;
use crate::error::{Error, ErrorKind, Result};
use crate::hypervisor::{
    Control, DiskInstant, DomainInfo, DomainStep, HypervisorProfile, Medium, MemoryPlan, MemoryStore,
    Obstacle, PowerAfter, Quiesce, Restart, RestartSource,
};
use crate::name::Target;
use crate::request::BUDGET;
use crate::request::{CreateRequest, RevertRequest};
use crate::shape::{CutUnit, FinishStep, FinishUnit, HypervisorStep, PlanStep};
use crate::snapshot::{Consistency, MemoryPoint, Snapshot};
use crate::step::Edit;

/// A running domain as the planner sees it.
#[derive(Debug, Clone)]
pub(crate) struct RunningDomain<'a> {
    /// The properties of its hypervisor.
    pub(crate) profile: HypervisorProfile,
    /// The domain's state, reported by its hypervisor.
    pub(crate) seen: &'a DomainInfo,
    /// For a revert to a snapshot with memory: the differences between the machine now and then, each as a
    /// message.
    pub(crate) differs: Vec<String>,
    /// For a revert to a snapshot with memory: the media that are in other drives than then, or in none.
    pub(crate) media: Vec<Medium>,
    /// The place of memory images; absent: its disks are no local files, and the user named none.
    pub(crate) memory: Option<Arc<dyn MemoryStore>>,
    /// The reason why its memory cannot be saved, if so.
    pub(crate) cannot_save_memory: Option<Obstacle>,
    /// The reason why its disks cannot be detached, if so.
    pub(crate) cannot_detach: Option<Obstacle>,
}

impl RunningDomain<'_> {
    /// Refuses methods of saving memory that its hypervisor does not have.
    fn require_ways_to_save(&self, request: &CreateRequest) -> Result<()> {
        let HypervisorProfile { title, saves_while_running, compress, .. } = &self.profile;
        let refused = |option: &str, why: String| {
            Err(Error::new(
                ErrorKind::Unsupported,
                format!("{option} does not apply to a domain of {title}: {why}"),
            )
            .state("no changes made")
            .advise(format!("leave {option} out")))
        };
        let paused = || format!("{title} saves memory only while the guest is paused");
        match (request.live, request.budget, request.compress) {
            (Some(true), ..) if !saves_while_running => refused("--live", paused()),
            (_, Some(_), _) if !saves_while_running => refused("--budget", paused()),
            (.., Some(1..)) if !compress => {
                refused("--compress", format!("memory images of {title} are not compressed"))
            }
            _ => Ok(()),
        }
    }
}

impl Planner<'_> {
    /// Returns true if the snapshot includes memory.
    pub(super) fn with_memory(&self, request: &CreateRequest) -> Result<bool> {
        if let Some(level) = request.compress.filter(|level| *level > Control::MAX_COMPRESSION) {
            return Err(Error::new(ErrorKind::Usage, format!("{level} is no level of compression"))
                .state("no changes made")
                .advise("levels are 1 (fast) to 19 (small); 0 does not compress"));
        }
        match (self.alive, request.memory) {
            (Some(_), Some(false))
                if request.live.is_some() || request.budget.is_some() || request.compress.is_some() =>
            {
                let detail = "how memory is saved is said of a snapshot without memory";
                Err(Error::new(ErrorKind::Usage, detail)
                    .state("no changes made")
                    .advise("leave --live, --no-live, --budget and --compress out"))
            }
            (Some(alive), wanted) => {
                let memory = wanted.unwrap_or(true);
                if memory {
                    alive.require_ways_to_save(request)?;
                }
                Ok(memory)
            }
            (None, Some(true)) => Err(self
                .off("it has no memory to be saved")
                .advise("leave --memory out: its disks are taken")),
            (None, _) if request.live == Some(false) => {
                Err(self.off("no memory is saved that a guest could wait for").advise("leave --no-live out"))
            }
            (None, _) if request.live.is_some() => {
                Err(self.off("no memory is saved while it runs").advise("leave --live out"))
            }
            (None, _) if request.budget.is_some() => {
                Err(self.off("no memory is copied while it runs").advise("leave --budget out"))
            }
            (None, _) if request.compress.is_some() => {
                Err(self.off("it has no memory to be compressed").advise("leave --compress out"))
            }
            (None, _) => match (request.quiesce, request.then) {
                (Quiesce::Require, _) => Err(self
                    .off("nothing to quiesce")
                    .advise("leave --quiesce out: the disks of a domain that was shut down are clean")),
                (_, Some(PowerAfter::Running | PowerAfter::Paused)) => {
                    Err(self.off("it can neither run nor be paused afterwards").advise("leave --then out"))
                }
                (Quiesce::No | Quiesce::Try, Some(PowerAfter::Off) | None) => Ok(false),
            },
        }
    }

    /// Refuses to quiesce a guest that has no means to be quiesced.
    fn require_agent(&self, alive: &RunningDomain<'_>) -> Result<()> {
        let known = self.domain.control.as_ref().and_then(|control| control.agent.as_ref());
        let known = known.or(alive.seen.agent.as_ref());
        let refused = |why: &str, advice: &str| {
            Err(Error::new(
                ErrorKind::Refused,
                format!("domain {} cannot be quiesced: {why}", self.domain.name),
            )
            .state("no changes made")
            .advise(advice))
        };
        match (alive.profile.agent, known, alive.seen.running) {
            (false, ..) => refused(
                &format!(
                    "{} has no guest agent that could freeze the guest's file systems",
                    alive.profile.title
                ),
                "take it with memory, which has all that the guest has not written yet; or without --quiesce",
            ),
            (true, None, _) => refused(
                "it has no guest agent that is known",
                "register the domain with the agent's socket, or take the snapshot without --quiesce",
            ),
            (true, Some(_), false) => refused(
                "the guest is paused, so its agent cannot answer",
                "resume the guest, or take the snapshot without --quiesce",
            ),
            (true, Some(_), true) => Ok(()),
        }
    }

    /// Refuses options of a revert that do not apply to it.
    pub(super) fn require_options(&self, request: &RevertRequest) -> Result<()> {
        let refused = |option: &str, why: &str| {
            Err(Error::new(ErrorKind::Refused, format!("{option} does not apply here: {why}"))
                .state("no changes made")
                .advise(format!("leave {option} out")))
        };
        let no_safety = !request.safety;
        let Some(profile) = self.alive.map(|alive| &alive.profile) else {
            return match &request.config {
                _ if no_safety => {
                    refused("--no-safety", "the domain does not run, so it has no memory that could be saved")
                }
                Some(_) => refused("--config", "the domain does not run, and is not made again"),
                None => Ok(()),
            };
        };
        let title = &profile.title;
        match &request.config {
            _ if no_safety && !profile.recreates => {
                refused("--no-safety", &format!("a domain of {title} is not ended for a revert"))
            }
            Some(_) if !profile.config => {
                refused("--config", &format!("a domain of {title} is not made from a file"))
            }
            Some(_) if request.power == Some(PowerAfter::Off) => {
                refused("--config", "the domain is to be off, and is not made again")
            }
            _ => Ok(()),
        }
    }

    fn no_memory_dir(&self) -> Error {
        Error::new(
            ErrorKind::Refused,
            format!(
                "domain {} has no directory for memory images: its disks are no local files",
                self.domain.name
            ),
        )
        .state("no changes made")
        .advise("register the domain with --memory-dir DIRECTORY, or take its disks alone with --disk-only")
    }

    fn off(&self, why: &str) -> Error {
        Error::new(ErrorKind::Refused, format!("domain {} is not running: {why}", self.domain.name))
            .state("no changes made")
    }

    /// Puts the instant at the head of the disk steps of a create, and the steps of its memory behind them.
    pub(super) fn create_alive(
        &self,
        request: &CreateRequest,
        instants: Vec<(Target, DiskInstant)>,
        snapshot: &mut Snapshot,
        merged: &mut Merged,
    ) -> Result<()> {
        let memory = self.with_memory(request)?;
        let Some(alive) = self.alive else { return Ok(()) };
        if memory && !alive.seen.memory_blockers.is_empty() {
            return Err(Error::new(
                ErrorKind::Refused,
                format!(
                    "the memory of domain {} cannot be saved: {}",
                    self.domain.name,
                    alive.seen.memory_blockers.join("; ")
                ),
            )
            .state("no changes made")
            .advise(
                "take its disks alone with --disk-only, or take the device that is named out of the machine",
            ));
        }
        if request.quiesce == Quiesce::Require && !memory {
            self.require_agent(alive)?;
        }
        if memory {
            require(
                &alive.cannot_save_memory,
                "memory cannot be saved",
                "or leave memory out with --disk-only",
            )?;
        }
        let live = request.live.unwrap_or(alive.profile.saves_while_running);
        snapshot.consistency = if memory { Consistency::Memory } else { Consistency::Crash };
        let machine = Machine::new(alive.seen.machine.clone(), &alive.seen.summary);
        snapshot.machine = Some(machine.id.clone());
        merged.commit.insert(0, Edit::AddMachine { machine: Box::new(machine) });
        let external: Vec<Target> = instants
            .iter()
            .filter(|(_, instant)| matches!(instant, DiskInstant::Overlay { .. }))
            .map(|(target, _)| target.clone())
            .collect();
        let image = match (memory, &alive.memory) {
            (false, _) => None,
            (true, Some(store)) => Some(store.address_of(snapshot.id)),
            (true, None) => return Err(self.no_memory_dir()),
        };
        let message = match (memory, live) {
            (true, true) => "snapshot all disks and memory atomically; write memory while the guest runs",
            (true, false) => {
                "snapshot all disks and memory atomically; the guest is paused until memory is written"
            }
            (false, _) => "snapshot all disks atomically",
        };
        let budget_ms = millis(request.budget.unwrap_or(BUDGET));
        let instant = DomainStep::Instant {
            disks: instants,
            running: alive.seen.running,
            memory: image.clone().map(|image| MemoryPlan { image, live, budget_ms }),
            quiesce: request.quiesce,
            quiesce_limit_ms: millis(request.quiesce_limit),
            then: request.then,
            for_revert: request.for_revert,
        };
        let nested = std::mem::take(&mut merged.nested);
        merged.cut.insert(0, CutUnit::Domain { step: of_domain(instant, message), nested });
        if let Some(image) = image {
            let tag = snapshot.name.as_str().to_owned();
            snapshot.memory =
                Some(MemoryPoint { image: image.clone(), bytes: 0, full: None, running: alive.seen.running });
            let configured = self.domain.control.as_ref().and_then(|control| control.compress);
            let compress = request.compress.or(configured).unwrap_or(0);
            let also = if compress > 0 { "compress it, " } else { "" };
            let message = format!("wait for the memory image {image}, {also}and make it durable");
            merged.cut.push(cut(of_domain(DomainStep::SaveMemory { image, tag, compress }, message)));
        }
        if !external.is_empty() {
            let message = "update the hypervisor's block graph to the new file names";
            let reopen = of_domain(DomainStep::ReopenByName { disks: external }, message);
            merged.finish.insert(0, FinishUnit::Domain(reopen));
        }
        if request.then == Some(PowerAfter::Off) {
            merged.finish.push(go_on(None, false, Some(PowerAfter::Off)));
        }
        Ok(())
    }

    /// Puts the detached section, and memory, around the disk steps of a revert.
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
        let image = memory.map(|memory| memory.image.clone());
        if let Some(image) = &image {
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
                .state("no changes made")
                .advise(
                    "shut the domain down and revert then: it is started as it was recorded; or start it as it was, or \
                     revert its disks alone with --off",
                ));
            }
            let message = format!("check the memory image {image}");
            let check = of_domain(DomainStep::CheckMemory { image: image.clone() }, message);
            merged.prepare.insert(0, PlanStep::Domain(check));
        }
        let Some(alive) = self.alive else {
            return match (image, power) {
                (Some(image), power) => {
                    merged.finish.push(go_on(Some(image), false, power));
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
            .filter(|disk| {
                disk.state.attached && !disk.is_machine_state() && wanted.point(disk.target()).is_some()
            })
            .map(|disk| disk.target().clone())
            .collect();
        let power = power.or(Some(as_now(alive)));
        let from = match (&image, off) {
            (_, true) => RestartSource::Off,
            (Some(image), false) => RestartSource::Memory(image.clone()),
            (None, false) => RestartSource::Boot,
        };
        let recreated = alive.profile.recreates;
        let before = request.state_before.as_ref();
        let before = before.and_then(|name| self.tree.iter().find(|snapshot| snapshot.name == *name));
        let kept = before.and_then(|snapshot| snapshot.memory.as_ref()).map(|memory| memory.image.clone());
        let kept = kept.filter(|_| recreated);
        let config = request.config.clone();
        let restart = Restart { from, safety: request.safety, config, recreated, kept };
        let (mut open, mut attach) =
            (detach(&disks, alive, Some(restart.clone())), attach(&disks, Some(restart.clone())));
        let mut end = match off {
            true => continuation(None, false, power),
            false => continuation(image.clone(), image.is_none(), power),
        };
        if restart.recreated {
            (open.summary, attach.summary, end.summary) = recreated_texts(&restart, power);
        }
        // The disks change in the detached section, between its two ends.
        merged.cut.insert(0, cut(open));
        merged.cut.push(cut(attach));
        let end = FinishUnit::Domain(end);
        if off {
            // A TPM may write until its machine has ended.
            let is_of_machine = |unit: &FinishUnit| match unit {
                FinishUnit::Disk(FinishStep { step, .. }) => {
                    let mut disks = self.disks.iter();
                    disks.any(|disk| disk.is_machine_state() && *disk.target() == step.target)
                }
                FinishUnit::Domain(_) => false,
            };
            let (of_machine, disks): (Vec<FinishUnit>, Vec<FinishUnit>) =
                std::mem::take(&mut merged.finish).into_iter().partition(is_of_machine);
            merged.finish = disks;
            merged.finish.push(end);
            merged.finish.extend(of_machine);
        } else {
            merged.finish.insert(0, end);
            // The media come before the memory: the drives' state is restored from memory, and says that this
            // medium is inserted.
            if image.is_some() && !alive.media.is_empty() {
                let message: Vec<String> = alive
                    .media
                    .iter()
                    .map(|medium| match &medium.address {
                        Some(address) => format!("insert the medium {address} into drive {}", medium.drive),
                        None => format!("take the medium out of drive {}", medium.drive),
                    })
                    .collect();
                let media = of_domain(DomainStep::Media { media: alive.media.clone() }, message.join("; "));
                merged.finish.insert(0, FinishUnit::Domain(media));
            }
        }
        Ok(())
    }

    /// Removes the memory of deleted snapshots, and puts a detached section around steps that change frozen
    /// images of an open chain.
    ///
    /// # Errors
    /// [`ErrorKind::Unsupported`] where the section is needed and the hypervisor cannot detach its disks.
    pub(super) fn delete_alive(&self, doomed: &[&Snapshot], merged: &mut Merged) -> Result<()> {
        let section = std::mem::take(&mut merged.detached);
        let section = match self.alive {
            Some(alive) if !section.is_empty() => {
                require(&alive.cannot_detach, DETACHED, "or shut the domain down and delete then")?;
                detached_section(section, alive)
            }
            Some(_) | None => section,
        };
        merged.finish.splice(0..0, section);
        for memory in doomed.iter().filter_map(|snapshot| snapshot.memory.as_ref()) {
            let message = format!("remove the memory image {}", memory.image);
            let remove = of_domain(DomainStep::RemoveMemory { image: memory.image.clone() }, message);
            merged.finish.push(FinishUnit::Domain(remove));
        }
        Ok(())
    }
}

/// Puts the two ends of a detached section around steps of a delete, and resumes the guest after it.
fn detached_section(steps: Vec<FinishUnit>, alive: &RunningDomain<'_>) -> Vec<FinishUnit> {
    let mut disks: Vec<Target> = Vec::new();
    for unit in &steps {
        if let FinishUnit::Disk(FinishStep { step, .. }) = unit
            && !disks.contains(&step.target)
        {
            disks.push(step.target.clone());
        }
    }
    let mut section = vec![FinishUnit::Domain(detach(&disks, alive, None))];
    section.extend(steps);
    section.push(FinishUnit::Domain(attach(&disks, None)));
    section.push(go_on(None, false, Some(as_now(alive))));
    section
}

const DETACHED: &str = "the disks of the running domain cannot be detached";

/// Refuses an action that the connection to the hypervisor cannot do.
fn require(cannot: &Option<Obstacle>, what: &str, instead: &str) -> Result<()> {
    match cannot {
        None => Ok(()),
        Some(Obstacle { why, advice }) => Err(Error::new(ErrorKind::Unsupported, format!("{what}: {why}"))
            .state("no changes made")
            .advise(format!("{advice}, {instead}"))),
    }
}

/// The guest's power state now.
fn as_now(alive: &RunningDomain<'_>) -> PowerAfter {
    match alive.seen.running {
        true => PowerAfter::Running,
        false => PowerAfter::Paused,
    }
}

/// Summaries of the steps of a detached section for which the hypervisor ends the domain and creates it
/// again.
fn recreated_texts(restart: &Restart, power: Option<PowerAfter>) -> (String, String, String) {
    let open = match restart.safety {
        true => "save the memory of the domain, for an undo, and destroy the domain",
        false => "destroy the domain; its memory is not saved",
    };
    let attach = match &restart.from {
        RestartSource::Off => "leave the domain destroyed".to_owned(),
        RestartSource::Memory(image) => {
            format!("restore the domain, paused, from the memory image {image}")
        }
        RestartSource::Boot => "create the domain again, paused".to_owned(),
    };
    let end = match (&restart.from, power) {
        (RestartSource::Off, _) => "leave the domain off",
        (_, Some(PowerAfter::Paused)) => "leave the domain paused",
        (RestartSource::Memory(_), _) => "unpause the domain",
        (RestartSource::Boot, _) => "unpause the domain, whose guest boots",
    };
    (open.to_owned(), attach, end.to_owned())
}

fn cut(step: HypervisorStep) -> CutUnit {
    CutUnit::Domain { step, nested: Vec::new() }
}

fn detach(disks: &[Target], alive: &RunningDomain<'_>, restart: Option<Restart>) -> HypervisorStep {
    let opening = DomainStep::Detach { disks: disks.to_vec(), running: alive.seen.running, restart };
    of_domain(opening, format!("pause the guest and detach {}", names(disks)))
}

fn attach(disks: &[Target], restart: Option<Restart>) -> HypervisorStep {
    of_domain(DomainStep::Attach { disks: disks.to_vec(), restart }, format!("reattach {}", names(disks)))
}

fn go_on(memory: Option<DiskAddress>, reset: bool, power: Option<PowerAfter>) -> FinishUnit {
    FinishUnit::Domain(continuation(memory, reset, power))
}

fn continuation(memory: Option<DiskAddress>, reset: bool, power: Option<PowerAfter>) -> HypervisorStep {
    let message = match (&memory, reset, power) {
        (_, _, Some(PowerAfter::Off)) => "end the domain's process".to_owned(),
        (Some(image), _, Some(PowerAfter::Paused)) => {
            format!("load the memory image {image}; the guest stays paused")
        }
        (Some(image), _, _) => format!("load the memory image {image} and resume the guest"),
        (None, true, Some(PowerAfter::Paused)) => "reset the guest, which stays paused".to_owned(),
        (None, true, _) => "reset the guest".to_owned(),
        (None, false, _) => "resume the guest".to_owned(),
    };
    of_domain(DomainStep::Continue { memory, reset, power }, message)
}

fn names(disks: &[Target]) -> String {
    disks.iter().map(Target::as_str).collect::<Vec<_>>().join(", ")
}

fn millis(duration: std::time::Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)
}
