//! Marks in QEMU that a detached section is open, and the previous run state of the guest.
//!
//! A detached section outlives the process that opened it. The process that ends it must know if the guest
//! ran before. It must also know that the section was not ended already, because memory that is loaded twice
//! does not fit disks that were written in between. So a mark is made before the guest is paused: a node (of
//! driver `null-co`) that nothing uses. It lasts as long as the section can: until QEMU ends.

use serde_json::json;

use crate::{
    error::Result,
    machine::{Machine, Paused},
};

/// The information of a mark.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Mark {
    /// A section is open; the guest ran before.
    SectionRan,
    /// A section is open; the guest was paused before.
    SectionPaused,
    /// The memory of a snapshot was loaded, or the guest was reset, and only its resume is left: what the
    /// guest does from here on must not be undone by another load.
    Loaded,
}

impl Mark {
    /// Those of an open section.
    const SECTIONS: [Self; 2] = [Self::SectionRan, Self::SectionPaused];

    fn name(self) -> String {
        let word = match self {
            Self::SectionRan => "section-ran",
            Self::SectionPaused => "section-paused",
            Self::Loaded => "section-loaded",
        };
        format!("{}{word}", crate::name::MARK)
    }

    pub(super) async fn is_there(self, machine: &Machine) -> Result<bool> {
        Ok(machine.graph().await?.node(&self.name()).is_some())
    }

    /// Makes the mark, unless it exists.
    pub(super) async fn make(self, machine: &Machine) -> Result<()> {
        if self.is_there(machine).await? {
            return Ok(());
        }
        let node = json!({ "driver": "null-co", "node-name": self.name(), "size": 512, "read-only": true });
        machine
            .run("recording the run state of the guest", &self.name(), "blockdev-add", node)
            .await
            .map(drop)
    }

    /// Removes the mark; returns true if it existed.
    pub(super) async fn remove(self, machine: &Machine) -> Result<bool> {
        if !self.is_there(machine).await? {
            return Ok(false);
        }
        let node = json!({ "node-name": self.name() });
        machine.run("removing a note", &self.name(), "blockdev-del", node).await.map(|_| true)
    }

    /// Returns the mark of the open section, if there is one.
    pub(super) async fn section(machine: &Machine) -> Result<Option<Self>> {
        for mark in Self::SECTIONS {
            if mark.is_there(machine).await? {
                return Ok(Some(mark));
            }
        }
        Ok(None)
    }

    /// Opens a section; the guest is paused afterwards. If one is open already, it keeps the record that the
    /// guest ran before.
    pub(super) async fn open_section(machine: &Machine) -> Result<Paused> {
        let state = machine.run_state().await?;
        if let Err(refusal) = machine.permits(&state).await?.disks {
            return Err(machine.refused("pausing the guest", &state, refusal));
        }
        // Nothing is loaded in a section that begins: the mark is of an earlier operation.
        Self::Loaded.remove(machine).await?;
        // 1) Mark first: a crash between the mark and the pause leaves a mark beside a running guest, which
        //    `tidy` removes. A pause without a mark would leave no record that the guest ran.
        let runs = state.running;
        match Self::section(machine).await? {
            Some(Self::SectionPaused) if runs => {
                // The new mark before the old one is removed: a crash between the two leaves both, and
                // `SECTIONS` prefers the one that says that the guest ran.
                Self::SectionRan.make(machine).await?;
                Self::SectionPaused.remove(machine).await?;
            }
            Some(_) => {}
            None if runs => Self::SectionRan.make(machine).await?,
            None => Self::SectionPaused.make(machine).await?,
        }
        // 2) Only then pause.
        let paused = machine.pause().await?;
        if runs && !paused.is_ours() {
            // Another client, or the guest itself, stopped it since the state was read: it is not ours to
            // resume.
            Self::SectionPaused.make(machine).await?;
            Self::SectionRan.remove(machine).await?;
        }
        Ok(paused)
    }

    /// Removes the marks of a section. The one of the load comes last: without it, a guest that ran and was
    /// paused since would look like one whose memory is not loaded yet.
    pub(super) async fn close_section(machine: &Machine) -> Result<()> {
        for mark in Self::SECTIONS {
            mark.remove(machine).await?;
        }
        Self::Loaded.remove(machine).await.map(drop)
    }
}
