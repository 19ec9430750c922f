//! QEMU's migration, the method to save memory: its settings are restored afterwards, the stream goes into a
//! draft.

use std::{
    os::fd::AsFd,
    time::{Duration, Instant},
};

use serde_json::{Map, Value, json};
use tokio::time::sleep;

use crate::{
    error::{Error, ErrorKind, Result},
    fdset::FdSet,
    machine::Machine,
    memory::Draft,
    qcow2::STREAM,
};

/// Bytes a second: no limit.
const BANDWIDTH: u64 = 64 << 30;

/// QEMU's default.
const USUAL_BANDWIDTH: u64 = 128 << 20;

/// Longest time from the request to end a migration to its end.
const ENDING: Duration = Duration::from_secs(60);

/// State of a migration, from `query-migrate`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct MigrationStatus {
    /// QEMU's status word; empty before the first migration.
    pub(crate) status: String,
    pub(crate) error: Option<String>,
    pub(crate) transferred: u64,
    pub(crate) remaining: u64,
    /// Pages that were written, or found to be zeros.
    pub(crate) pages: u64,
}

impl MigrationStatus {
    pub(crate) fn under_way(&self) -> bool {
        !matches!(self.status.as_str(), "" | "none" | "completed" | "failed" | "cancelled")
    }

    pub(crate) fn completed(&self) -> bool {
        self.status == "completed"
    }

    /// Returns an error if the migration failed or was cancelled.
    pub(crate) fn check(&self, attempted: &str, subject: &str) -> Result<()> {
        match self.status.as_str() {
            "failed" => {
                let detail = self.error.clone().unwrap_or_else(|| "QEMU gave no reason".to_owned());
                Err(Error::new(ErrorKind::Failed, attempted, subject, detail))
            }
            "cancelled" | "cancelling" => {
                Err(Error::new(ErrorKind::Cancelled, attempted, subject, "the migration was cancelled"))
            }
            _ => Ok(()),
        }
    }
}

pub(crate) async fn status(machine: &Machine) -> Result<MigrationStatus> {
    let reply = machine.query("query-migrate", Value::Null).await?;
    let ram = |key: &str| reply["ram"][key].as_u64().unwrap_or_default();
    Ok(MigrationStatus {
        status: reply["status"].as_str().unwrap_or_default().to_owned(),
        error: reply["error-desc"].as_str().map(str::to_owned),
        transferred: ram("transferred"),
        remaining: ram("remaining"),
        pages: ram("normal").saturating_add(ram("duplicate")),
    })
}

/// Returns true if a memory save of ours is under way, or its settings are still set. After a crash the save
/// may have ended by itself.
pub(crate) async fn is_left(machine: &Machine) -> Result<bool> {
    let capabilities = machine.query("query-migrate-capabilities", Value::Null).await?;
    let on = capabilities.as_array().into_iter().flatten().any(|capability| {
        let ours = ["background-snapshot", "pause-before-switchover"];
        capability["capability"].as_str().is_some_and(|name| ours.contains(&name))
            && capability["state"] == true
    });
    let parameters = machine.query("query-migrate-parameters", Value::Null).await?;
    let unlimited = parameters["max-bandwidth"].as_u64() == Some(BANDWIDTH);
    Ok(on || unlimited || status(machine).await?.under_way())
}

/// Ends any migration, and switches off the settings that a cut switches on. Used after a crash of ours.
pub(crate) async fn abandon(machine: &Machine) -> Result<()> {
    let attempted = "ending a saving of memory that was left";
    let subject = machine.qmp().socket().display().to_string();
    end(machine, attempted).await?;
    let off: Vec<_> = ["background-snapshot", "pause-before-switchover"]
        .map(|name| json!({ "capability": name, "state": false }))
        .into();
    machine.run(attempted, &subject, "migrate-set-capabilities", json!({ "capabilities": off })).await?;
    let arguments = json!({ "max-bandwidth": USUAL_BANDWIDTH });
    machine.run(attempted, &subject, "migrate-set-parameters", arguments).await.map(drop)
}

/// Cancels a migration that is under way, and waits until it has ended.
async fn end(machine: &Machine, attempted: &str) -> Result<()> {
    let subject = machine.qmp().socket().display().to_string();
    let until = Instant::now() + ENDING;
    if status(machine).await?.under_way() {
        machine.run(attempted, &subject, "migrate_cancel", Value::Null).await?;
    }
    while status(machine).await?.under_way() {
        if Instant::now() >= until {
            let detail = format!("it has not ended within {} s", ENDING.as_secs());
            return Err(Error::new(ErrorKind::Timeout, attempted, subject, detail));
        }
        sleep(Duration::from_millis(2)).await;
    }
    Ok(())
}

/// The form of a migration.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Form {
    Background,
    /// Waits before it ends.
    PreCopy,
    Plain,
}

/// Settings of QEMU that were changed, with their previous values.
#[derive(Debug)]
#[must_use = "the settings stay changed until `Settings::restore`"]
pub(crate) struct Settings {
    capabilities: Vec<(String, bool)>,
    bandwidth: Option<u64>,
}

impl Settings {
    /// Sets what a form needs, and switches off all other capabilities that would change the stream. After an
    /// error the previous settings are restored.
    pub(crate) async fn apply(machine: &Machine, form: Form) -> Result<Self> {
        let attempted = "preparing to save memory";
        let subject = machine.qmp().socket().display().to_string();
        let now = status(machine).await?;
        if now.under_way() {
            let detail = format!("a migration is running ({})", now.status);
            return Err(Error::new(ErrorKind::Invalid, attempted, subject, detail)
                .advise("wait for it, or cancel it (`migrate_cancel`)"));
        }
        let listed = machine.query("query-migrate-capabilities", Value::Null).await?;
        let read =
            |value: &Value| Some((value["capability"].as_str()?.to_owned(), value["state"].as_bool()?));
        let listed = crate::graph::all(&listed, read)
            .ok_or_else(|| machine.odd("query-migrate-capabilities", &listed))?;
        let wanted = |name: &str, before: bool| match name {
            "background-snapshot" => form == Form::Background,
            "pause-before-switchover" => form == Form::PreCopy,
            // They change nothing in the stream.
            "events" | "late-block-activate" => before,
            _ => false,
        };
        let mut changed: Vec<(String, bool)> = Vec::new();
        let mut set = Vec::new();
        // Off before on: some exclude each other.
        for on in [false, true] {
            for (name, before) in
                listed.iter().filter(|(name, before)| wanted(name, *before) == on && *before != on)
            {
                set.push(json!({ "capability": name, "state": on }));
                changed.push((name.clone(), *before));
            }
        }
        let parameters = machine.query("query-migrate-parameters", Value::Null).await?;
        let settings = Self { capabilities: changed, bandwidth: parameters["max-bandwidth"].as_u64() };
        let outcome = async {
            if !set.is_empty() {
                let arguments = json!({ "capabilities": set });
                machine.run(attempted, &subject, "migrate-set-capabilities", arguments).await?;
            }
            let arguments = json!({ "max-bandwidth": BANDWIDTH });
            machine.run(attempted, &subject, "migrate-set-parameters", arguments).await
        };
        match outcome.await {
            Ok(_) => Ok(settings),
            Err(error) => {
                let restored = settings.restore(machine).await;
                Err(match restored {
                    Ok(()) => error,
                    Err(second) => error.state(second.to_string()),
                })
            }
        }
    }

    /// Restores the previous values. No migration may be under way.
    pub(crate) async fn restore(&self, machine: &Machine) -> Result<()> {
        let attempted = "putting the settings of migration back";
        let subject = machine.qmp().socket().display().to_string();
        let mut capabilities: Vec<_> = self.capabilities.clone();
        // Switch off before switching on: some exclude each other.
        capabilities.sort_by_key(|(_, before)| *before);
        if !capabilities.is_empty() {
            let set: Vec<_> = capabilities
                .iter()
                .map(|(name, before)| json!({ "capability": name, "state": before }))
                .collect();
            let arguments = json!({ "capabilities": set });
            machine.run(attempted, &subject, "migrate-set-capabilities", arguments).await?;
        }
        let mut parameters = Map::new();
        if let Some(bandwidth) = self.bandwidth {
            parameters.insert("max-bandwidth".to_owned(), json!(bandwidth));
        }
        machine.run(attempted, &subject, "migrate-set-parameters", Value::Object(parameters)).await.map(drop)
    }
}

/// A migration into a draft.
#[derive(Debug)]
pub(crate) struct Writing {
    settings: Settings,
    lent: Option<FdSet>,
}

impl Writing {
    /// Starts a migration. The settings are those of [`Settings::apply`]; an error here does not restore
    /// them.
    pub(crate) async fn start(
        machine: &Machine,
        draft: &Draft,
        settings: Settings,
    ) -> std::result::Result<Self, (Error, Settings)> {
        match Self::begin(machine, draft).await {
            Ok(lent) => Ok(Self { settings, lent }),
            Err(error) => Err((error, settings)),
        }
    }

    async fn begin(machine: &Machine, draft: &Draft) -> Result<Option<FdSet>> {
        let attempted = "saving memory";
        let subject = draft.path().display().to_string();
        let descriptor = draft.writable()?;
        let files = machine.schema().await?.has_argument("migrate", "channels.addr.transport=file.offset");
        if files {
            let set = FdSet::for_now(machine, "memory", &[&descriptor]).await?;
            let uri = format!("file:{},offset={STREAM}", set.path());
            return match machine.run(attempted, &subject, "migrate", json!({ "uri": uri })).await {
                Ok(_) => Ok(Some(set)),
                Err(error) => {
                    set.remove(machine).await;
                    Err(error)
                }
            };
        }
        // A QEMU without file migration writes to any descriptor, from its current position: set to the
        // stream's offset.
        let name = "domsnap-memory";
        let lent = machine.qmp().get_fd(name, descriptor.as_fd()).await;
        lent.map_err(|error| Error::qmp(attempted, &subject, error))?;
        let started =
            machine.run(attempted, &subject, "migrate", json!({ "uri": format!("fd:{name}") })).await;
        if started.is_err() {
            // The failed attempt may have consumed the descriptor.
            let _ = machine.qmp().execute_raw("closefd", json!({ "fdname": name })).await;
        }
        started.map(|_| None)
    }

    /// Takes back the lent descriptor and restores the settings. Call it when the migration has ended.
    pub(crate) async fn tidy(self, machine: &Machine) -> Result<()> {
        if let Some(set) = self.lent {
            set.remove(machine).await;
        }
        self.settings.restore(machine).await
    }

    /// Ends the migration without its effect, and tidies up.
    pub(crate) async fn cancel(self, machine: &Machine) -> Result<()> {
        end(machine, "cancelling the saving of memory").await?;
        self.tidy(machine).await
    }
}
