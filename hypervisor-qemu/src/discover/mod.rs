//! The machine of a live QEMU: all that a snapshot records of it, and all that a memory image must find
//! again.

mod abilities;
mod compare;
mod devices;
mod image_options;
mod process;
mod shared;

use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

pub use abilities::Abilities;
pub(crate) use compare::media;
pub use compare::{Difference, compare};
pub use devices::{BlockDevice, ChainLayer, Device, Role};
pub(crate) use image_options::{ImageOptions, nbd_sockets};
pub use process::Process;
pub(crate) use shared::shared_by;

use crate::{
    error::{ErrorKind, Result},
    machine::Machine,
    run_state::RunState,
};

/// A live QEMU. Serialisable: each snapshot records it.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[non_exhaustive]
pub struct Discovery {
    /// `-name`, if it was given.
    pub name: Option<String>,
    /// The machine's UUID, if it has one.
    pub uuid: Option<String>,
    /// QEMU's version, for display only: `abilities` holds what it can do.
    pub version: Option<(u64, u64, u64)>,
    /// Run state of the guest. A snapshot does not record it.
    #[serde(default)]
    pub state: RunState,
    /// The machine type with its version: `pc-q35-10.0`, never `q35`.
    pub machine: String,
    /// The processors.
    pub cpu: Cpu,
    /// Memory.
    pub memory: Memory,
    /// The guest's devices from the command line or hot-plugged, in the order of their paths.
    pub devices: Vec<Device>,
    /// The drives: disks, CD-ROMs, firmware.
    pub drives: Vec<BlockDevice>,
    /// `query-tpm`: the ids of TPM devices; their state is not part of any image.
    pub tpms: Vec<String>,
    /// Writable parts of the host that no snapshot holds: shared directories, devices of the host. Each as a
    /// phrase.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub shared: Vec<String>,
    /// Files of the host that are memory to the guest, which writes them: only a snapshot's memory holds
    /// them.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub mapped: Vec<String>,
    /// The process, as far as the system reports it.
    pub process: Process,
    /// The abilities of this QEMU.
    pub abilities: Abilities,
}

/// The processors, as QEMU gives them to the guest.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[non_exhaustive]
pub struct Cpu {
    /// The model: `max`, `Skylake-Server-v4`, ...
    pub model: String,
    /// Number of processors.
    pub count: usize,
    /// `-cpu` as it was given. `None` if it was not, or if the command line cannot be read.
    pub option: Option<String>,
    /// Features visible to the guest: vendor, family, model, stepping and every feature word; empty on an
    /// architecture that does not report them.
    pub features: Vec<(String, Value)>,
}

/// The guest's memory, in bytes.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[non_exhaustive]
pub struct Memory {
    /// Size at the start.
    pub base: u64,
    /// Size hot-plugged since.
    pub plugged: u64,
}

impl Discovery {
    /// Reads it from a QEMU. Changes nothing.
    ///
    /// # Errors
    /// Errors of the connection; [`ErrorKind::Unsupported`] for a QEMU that is too old for the queries.
    /// Missing information about the process is no error: [`Process::unread`] lists what is missing and why.
    pub async fn read(machine: &Machine) -> Result<Self> {
        let state = machine.run_state().await?;
        let abilities = machine.abilities().await?.clone();
        let process = Process::read(machine);
        let graph = machine.graph().await?;
        // None depends on another's answer: QEMU has the next one when it has answered the last.
        let (name, uuid, memory, kind, cpu, devices, tpms) = tokio::try_join!(
            optional(machine, "query-name"),
            optional(machine, "query-uuid"),
            machine.query("query-memory-size-summary", Value::Null),
            property(machine, "/machine", "type"),
            cpu(machine, &process),
            devices::devices(machine),
            optional(machine, "query-tpm"),
        )?;
        let name = name["name"].as_str().map(str::to_owned);
        let uuid = uuid["UUID"].as_str().map(str::to_owned);
        let kind = kind.as_str().ok_or_else(|| machine.odd("qom-get", &kind))?;
        let mut drives = devices::drives(&graph);
        devices::ask_for_copies_on_read(machine, &graph, &process, &mut drives).await?;
        let shared = shared::shared(machine, &process, &devices).await?;
        Ok(Self {
            name,
            uuid: uuid.filter(|uuid| uuid.chars().any(|digit| !matches!(digit, '0' | '-'))),
            version: machine.qmp().greeting().version,
            state,
            machine: kind.strip_suffix("-machine").unwrap_or(kind).to_owned(),
            cpu,
            memory: Memory {
                base: memory["base-memory"]
                    .as_u64()
                    .ok_or_else(|| machine.odd("query-memory-size-summary", &memory))?,
                plugged: memory["plugged-memory"].as_u64().unwrap_or(0),
            },
            shared: shared.nowhere,
            mapped: shared.in_memory,
            devices,
            drives,
            tpms: self::tpms(&tpms),
            process,
            abilities,
        })
    }

    /// Finds the drive of a target: its device's id, its drive's name, or its path in QOM.
    pub fn drive(&self, target: &str) -> Option<&BlockDevice> {
        self.drives.iter().find(|drive| drive.names.iter().any(|name| name == target))
    }
}

/// Runs a query that not every QEMU has; null if it has not.
async fn optional(machine: &Machine, command: &str) -> Result<Value> {
    match machine.query(command, Value::Null).await {
        Err(error) if matches!(error.kind(), ErrorKind::Unsupported | ErrorKind::Refused) => Ok(Value::Null),
        other => other,
    }
}

async fn property(machine: &Machine, path: &str, property: &str) -> Result<Value> {
    machine.query("qom-get", json!({ "path": path, "property": property })).await
}

/// Reads a property that not every object has; null if it has not.
async fn optional_property(machine: &Machine, path: &str, name: &str) -> Result<Value> {
    match property(machine, path, name).await {
        Err(error) if matches!(error.kind(), ErrorKind::Unsupported | ErrorKind::Refused) => Ok(Value::Null),
        other => other,
    }
}

async fn cpu(machine: &Machine, process: &Process) -> Result<Cpu> {
    let cpus = machine.query("query-cpus-fast", Value::Null).await?;
    let cpus = cpus.as_array().ok_or_else(|| machine.odd("query-cpus-fast", &cpus))?;
    let option = process.option("-cpu").map(str::to_owned);
    let Some(first) = cpus.first() else {
        return Ok(Cpu { model: "none".to_owned(), count: 0, option, features: Vec::new() });
    };
    let path = first["qom-path"].as_str().ok_or_else(|| machine.odd("query-cpus-fast", first))?;
    let kind = property(machine, path, "type").await?;
    let kind = kind.as_str().ok_or_else(|| machine.odd("qom-get", &kind))?;
    let target = first["target"].as_str().unwrap_or_default();
    let model = kind.strip_suffix(&format!("-{target}-cpu")).or_else(|| kind.strip_suffix("-cpu"));
    let mut features = Vec::new();
    for name in ["vendor", "family", "model", "stepping"] {
        let value = optional_property(machine, path, name).await?;
        if !value.is_null() {
            features.push((name.to_owned(), value));
        }
    }
    let flags = optional_property(machine, path, "feature-words").await?;
    for word in flags.as_array().into_iter().flatten() {
        let part = |key: &str| word.get(key).and_then(Value::as_u64);
        let leaf = part("cpuid-input-eax").unwrap_or_default();
        let sub = part("cpuid-input-ecx").map(|sub| format!(".{sub}")).unwrap_or_default();
        let register = word["cpuid-register"].as_str().unwrap_or_default();
        features.push((format!("cpuid {leaf:#x}{sub} {register}"), word["features"].clone()));
    }
    features.sort_by(|a, b| a.0.cmp(&b.0));
    Ok(Cpu { model: model.unwrap_or(kind).to_owned(), count: cpus.len(), option, features })
}

fn tpms(reply: &Value) -> Vec<String> {
    let tpms = reply.as_array().map(Vec::as_slice).unwrap_or_default();
    tpms.iter().filter_map(|tpm| tpm["id"].as_str()).map(str::to_owned).collect()
}
