//! Starts a clone.

use std::{path::Path, time::Duration};

use serde_json::json;
use snapcore::{Error, Result};

use crate::{
    machine::Machine,
    memory::{Image, restore_deferred, restore_split},
    saver::{Spawned, Surroundings, to_engine},
    stream::{Mapping, Split},
};

/// Time limit until its memory is loaded.
const LOADING: Duration = Duration::from_secs(600);

/// The memory that a clone starts from.
#[derive(Debug, Clone, Copy)]
pub enum Source<'a> {
    /// A memory image, which is loaded whole.
    Image(&'a Image),
    /// One that was taken apart. The machine must have the memory that QEMU makes by default.
    Split(&'a Split, Mapping),
}

/// A clone that is loaded, and paused. Its network devices have no link. Dropping it ends it.
pub struct Clone {
    spawned: Spawned,
    machine: Machine,
    networks: Vec<String>,
}

/// Starts a clone by the command of [`super::command`]. `socket` is the QMP socket that the command names.
///
/// # Errors
/// QEMU's, with its error output. No process is left.
pub async fn start(command: Vec<String>, socket: &Path, source: Source<'_>) -> Result<Clone> {
    start_as(command, socket, source, Surroundings::default()).await
}

/// As [`start`], in the surroundings of the machine whose memory was saved.
pub(crate) async fn start_as(
    command: Vec<String>,
    socket: &Path,
    source: Source<'_>,
    surroundings: Surroundings,
) -> Result<Clone> {
    let networks = networks(&command);
    let mut command = command;
    command.extend(["-incoming".to_owned(), "defer".to_owned()]);
    if let Source::Split(split, mapping) = source {
        command.extend(split.arguments(mapping).map_err(to_engine)?);
    }
    let (spawned, machine) = Spawned::start(command, socket, surroundings).await?;
    let clone = Clone { spawned, machine, networks };
    let loaded = match source {
        Source::Image(image) => restore_deferred(&clone.machine, image, LOADING).await,
        Source::Split(split, _) => restore_split(&clone.machine, split, LOADING).await,
    };
    loaded.map_err(|error| clone.failed(error))?;
    // Before the guest runs, and after the load: the links of the stream win over those before it.
    clone.set_links(false).await?;
    Ok(clone)
}

impl Clone {
    /// Returns its QEMU. The guest runs after [`Machine::cont`].
    pub fn machine(&self) -> &Machine {
        &self.machine
    }

    /// Connects its network devices, or disconnects them.
    ///
    /// # Errors
    /// QEMU's.
    pub async fn set_links(&self, up: bool) -> Result<()> {
        for network in &self.networks {
            let arguments = json!({ "name": network, "up": up });
            let set = self.machine.run("setting a link", network, "set_link", arguments).await;
            set.map_err(to_engine)?;
        }
        Ok(())
    }

    /// Leaves it running: it does not end with this process.
    pub fn leave(self) -> Machine {
        self.spawned.leave();
        self.machine
    }

    fn failed(&self, error: crate::Error) -> Error {
        let said = self.spawned.error_output();
        to_engine(error).context("starting a clone").state(format!("QEMU said: {said}; it was ended"))
    }
}

/// The ids of the networks of a command.
fn networks(command: &[String]) -> Vec<String> {
    let pairs = command.windows(2).filter_map(|pair| match pair {
        [option, value] if option.trim_start_matches('-') == "netdev" => Some(value),
        _ => None,
    });
    let id = |value: &String| match serde_json::from_str::<serde_json::Value>(value) {
        Ok(network) => network["id"].as_str().map(str::to_owned),
        Err(_) => value.split(',').find_map(|part| part.strip_prefix("id=")).map(str::to_owned),
    };
    pairs.filter_map(id).collect()
}
