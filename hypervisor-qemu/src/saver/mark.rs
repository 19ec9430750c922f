//! That a window is open, and over what, kept in QEMU itself.
//!
//! A window outlives the process that opened it. Whoever ends it must know whether the guest ran before; and that it was not
//! ended already, because memory that is loaded twice does not fit disks that were written in between. So before the guest is
//! paused for it a mark is made: a node (of nothing) that nobody uses. It lasts as long as the window can: QEMU's life.

use serde_json::json;

use crate::{
    error::Result,
    machine::{Machine, Paused},
};

/// What a mark says.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Mark {
    /// A window is open over a guest that ran.
    WindowRan,
    /// A window is open over a guest that stood still.
    WindowStood,
}

impl Mark {
    const WINDOW: [Self; 2] = [Self::WindowRan, Self::WindowStood];

    fn name(self) -> String {
        let word = match self {
            Self::WindowRan => "window-ran",
            Self::WindowStood => "window-stood",
        };
        format!("{}{word}", crate::name::MARK)
    }

    async fn is_there(self, machine: &Machine) -> Result<bool> {
        Ok(machine.graph().await?.node(&self.name()).is_some())
    }

    /// Makes it. One that is there already is as good.
    pub(super) async fn make(self, machine: &Machine) -> Result<()> {
        if self.is_there(machine).await? {
            return Ok(());
        }
        let node = json!({ "driver": "null-co", "node-name": self.name(), "size": 512, "read-only": true });
        machine.run("noting who pauses the guest", &self.name(), "blockdev-add", node).await.map(drop)
    }

    /// Removes it; gives whether it was there.
    pub(super) async fn remove(self, machine: &Machine) -> Result<bool> {
        if !self.is_there(machine).await? {
            return Ok(false);
        }
        let node = json!({ "node-name": self.name() });
        machine.run("removing a note", &self.name(), "blockdev-del", node).await.map(|_| true)
    }

    /// The window that is open, if one is.
    pub(super) async fn window(machine: &Machine) -> Result<Option<Self>> {
        for mark in Self::WINDOW {
            if mark.is_there(machine).await? {
                return Ok(Some(mark));
            }
        }
        Ok(None)
    }

    /// Opens a window: the guest stands still afterwards. Where one is open already, that it ran before it was opened stays
    /// noted.
    pub(super) async fn open_window(machine: &Machine) -> Result<Paused> {
        let state = machine.run_state().await?;
        if let Err(refusal) = machine.permits(&state).await?.disks {
            return Err(machine.refused("pausing the guest", &state, refusal));
        }
        let runs = state.running;
        match Self::window(machine).await? {
            Some(Self::WindowStood) if runs => {
                Self::WindowRan.make(machine).await?;
                Self::WindowStood.remove(machine).await?;
            }
            Some(_) => {}
            None if runs => Self::WindowRan.make(machine).await?,
            None => Self::WindowStood.make(machine).await?,
        }
        machine.pause().await
    }

    /// Forgets the window.
    pub(super) async fn close_window(machine: &Machine) -> Result<()> {
        for mark in Self::WINDOW {
            mark.remove(machine).await?;
        }
        Ok(())
    }
}
