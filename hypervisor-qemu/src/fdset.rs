//! Descriptors lent to QEMU. QEMU then opens `/dev/fdset/N`, and needs neither rights to the path nor a path
//! at all.

use std::{
    fs::{self, File},
    io,
    os::fd::{AsRawFd, OwnedFd},
    path::Path,
};

use serde_json::{Value, json};

use crate::{
    error::{Error, ErrorKind, Result},
    machine::Machine,
    name::PREFIX,
};

/// Advice that makes it possible to lend descriptors.
pub(crate) const BY_UNIX: &str = "give QEMU a Unix socket (-qmp unix:PATH,server=on,wait=off), and use that";

/// Descriptors that QEMU may open. [`FdSet::remove`] takes them back; QEMU keeps open any that it still uses.
#[derive(Debug)]
pub(crate) struct FdSet(Lent);

#[derive(Debug)]
enum Lent {
    /// A set in QEMU, of ours.
    Set(i64),
    /// A descriptor of this process, which QEMU opens through `/proc`: used if none can be passed
    /// ([`refusal`]).
    Own(OwnedFd),
}

/// Returns the reason why no descriptor can be lent. `None`: they can be lent, by passing them or through
/// `/proc`.
///
/// QEMU can open a descriptor of this process through `/proc` only if it has the same user and group, and the
/// same view of processes and files.
pub(crate) fn refusal(machine: &Machine) -> Option<String> {
    if machine.qmp().passes_descriptors() {
        return None;
    }
    let over = "QEMU's monitor is reached by TCP, over which no descriptors can be passed";
    let Some(pid) = machine.pid() else {
        return Some(format!("{over}, and the process that serves it cannot be found in /proc"));
    };
    let same_link = |what: &str| {
        let of = |process: &str| fs::read_link(format!("/proc/{process}/{what}")).ok();
        of("self").is_some_and(|own| of(&pid.to_string()) == Some(own))
    };
    let ids = |process: &str| {
        let status = fs::read_to_string(format!("/proc/{process}/status")).ok()?;
        let of = |name: &str| status.lines().find(|line| line.starts_with(name)).map(str::to_owned);
        Some((of("Uid:")?, of("Gid:")?))
    };
    let own = ids("self");
    if own.is_none() || ids(&pid.to_string()) != own {
        return Some(format!("{over}, and process {pid} runs as another user"));
    }
    match ["ns/mnt", "ns/pid", "ns/user", "root"].iter().all(|what| same_link(what)) {
        true => None,
        false => Some(format!("{over}, and process {pid} has a file system or processes of its own")),
    }
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
                        Self::of(id).remove(machine).await;
                    }
                    return Err(Error::qmp("lending QEMU a descriptor", what, error));
                }
            }
        }
        set.map(Self::of).ok_or_else(|| machine.odd("add-fd", &Value::Null))
    }

    /// Like [`FdSet::add`], for a file that QEMU opens only while this process has it. If no descriptors can
    /// be passed, QEMU opens the first of them through `/proc`. QEMU then gets an open file description of
    /// its own, in the mode that it asks for.
    ///
    /// Never use it for a file that outlives this process: QEMU reopens a node's file by its name when the
    /// node is changed.
    pub(crate) async fn for_now(machine: &Machine, what: &str, fds: &[&OwnedFd]) -> Result<Self> {
        if machine.qmp().passes_descriptors() {
            return Self::add(machine, what, fds).await;
        }
        let attempted = "lending QEMU a descriptor";
        if let Some(why) = refusal(machine) {
            return Err(Error::new(ErrorKind::Unsupported, attempted, what, why).advise(BY_UNIX));
        }
        let first = fds.first().ok_or_else(|| machine.odd("add-fd", &Value::Null))?;
        let own = first.try_clone().map_err(|error| Error::io(attempted, Path::new(what), error))?;
        Ok(Self(Lent::Own(own)))
    }

    /// Wraps a set that exists already.
    pub(crate) fn of(id: i64) -> Self {
        Self(Lent::Set(id))
    }

    /// Returns the path by which QEMU opens it.
    pub(crate) fn path(&self) -> String {
        match &self.0 {
            Lent::Set(id) => format!("/dev/fdset/{id}"),
            Lent::Own(own) => format!("/proc/{}/fd/{}", std::process::id(), own.as_raw_fd()),
        }
    }

    /// Removes the set. A failure leaves a descriptor open in QEMU and nothing else;
    /// [`crate::jobs::reconcile`] lists it.
    ///
    /// QEMU 7.2 closes it only while the guest runs: such a set is removed again after the next resume.
    pub(crate) async fn remove(self, machine: &Machine) {
        let Lent::Set(set) = self.0 else { return };
        if let Err(error) = machine.qmp().execute_raw("remove-fd", json!({ "fdset-id": set })).await {
            tracing::debug!(set, %error, "a descriptor set was not removed");
        }
        let sets = machine.qmp().execute_raw("query-fdsets", Value::Null).await.unwrap_or_default();
        if ours(&sets).iter().any(|(id, _)| *id == set) {
            machine.keep(set);
        }
    }
}

/// Opens a second, read-only description of an open file.
pub(crate) fn reopen_read_only(file: &impl AsRawFd) -> io::Result<OwnedFd> {
    Ok(File::open(format!("/proc/self/fd/{}", file.as_raw_fd()))?.into())
}

/// Returns our sets and the purpose of each, from `query-fdsets`.
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
