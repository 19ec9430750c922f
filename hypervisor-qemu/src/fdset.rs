//! Descriptors that are lent to QEMU: it then opens `/dev/fdset/N`, and needs no right to the path, nor one at all.

use std::{
    fs::File,
    io,
    os::fd::{AsRawFd, OwnedFd},
};

use serde_json::{Value, json};

use crate::{
    error::{Error, Result},
    machine::Machine,
    name::PREFIX,
};

/// A set of descriptors in QEMU, of ours. [`FdSet::remove`] takes it away; a QEMU that still uses one keeps that one open.
#[derive(Debug)]
pub(crate) struct FdSet {
    id: i64,
}

impl FdSet {
    /// Lends QEMU some descriptors under one number. It picks the one whose access mode it needs.
    pub(crate) async fn add(machine: &Machine, what: &str, fds: &[&OwnedFd]) -> Result<Self> {
        let mut set: Option<i64> = None;
        for fd in fds {
            let opaque = if what.starts_with(PREFIX) { what.to_owned() } else { format!("{PREFIX}{what}") };
            let added = machine.qmp().add_fd(set, Some(&opaque), fd).await;
            match added {
                Ok(info) => set = Some(info.fdset_id),
                Err(error) => {
                    if let Some(id) = set {
                        Self { id }.remove(machine).await;
                    }
                    return Err(Error::qmp("lending QEMU a descriptor", what, error));
                }
            }
        }
        set.map(|id| Self { id }).ok_or_else(|| machine.odd("add-fd", &Value::Null))
    }

    /// A set that is there already.
    pub(crate) fn of(id: i64) -> Self {
        Self { id }
    }

    /// The name by which QEMU opens it.
    pub(crate) fn path(&self) -> String {
        format!("/dev/fdset/{}", self.id)
    }

    /// Takes the set away. What fails leaves a descriptor open in QEMU, and no more: [`crate::jobs::reconcile`] lists it.
    ///
    /// QEMU 7.2 lets go of it only while the guest runs: it is taken away again after the next resume.
    pub(crate) async fn remove(self, machine: &Machine) {
        if let Err(error) = machine.qmp().execute_raw("remove-fd", json!({ "fdset-id": self.id })).await {
            tracing::debug!(set = self.id, %error, "a descriptor set was not removed");
        }
        let sets = machine.qmp().execute_raw("query-fdsets", Value::Null).await.unwrap_or_default();
        if ours(&sets).iter().any(|(id, _)| *id == self.id) {
            machine.keep(self.id);
        }
    }
}

/// A second description of an open file, for reading only.
pub(crate) fn reopen_read_only(file: &impl AsRawFd) -> io::Result<OwnedFd> {
    Ok(File::open(format!("/proc/self/fd/{}", file.as_raw_fd()))?.into())
}

/// The sets that are ours, and what each is for, from `query-fdsets`.
pub(crate) fn ours(sets: &Value) -> Vec<(i64, String)> {
    let mut ours = Vec::new();
    for set in sets.as_array().into_iter().flatten() {
        let opaque = set["fds"].as_array().into_iter().flatten().find_map(|fd| fd["opaque"].as_str());
        if let (Some(id), Some(opaque)) =
            (set["fdset-id"].as_i64(), opaque.filter(|name| name.starts_with(PREFIX)))
        {
            ours.push((id, opaque.to_owned()));
        }
    }
    ours
}
