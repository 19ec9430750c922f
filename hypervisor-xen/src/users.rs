//! The files that running domains have open. QEMU takes no locks on images that it serves to a guest of Xen,
//! nor does a loop device, so no other process would find one.

use std::{
    collections::{HashMap, HashSet},
    fs,
    path::Path,
};

use rustix::fs::makedev;
use snapcore::{FileIdentity, file_identity};

/// Returns those of the files that a QEMU of Xen or a loop device has open, each with the user's name.
pub(crate) fn open_without_lock(files: &HashSet<FileIdentity>) -> Vec<(FileIdentity, String)> {
    let mut found: HashMap<FileIdentity, String> = HashMap::new();
    for entry in fs::read_dir("/proc").into_iter().flatten().flatten() {
        let process = entry.path();
        let Some(name) = domain_of(&process) else { continue };
        for open in fs::read_dir(process.join("fd")).into_iter().flatten().flatten() {
            let Ok(about) = fs::metadata(open.path()) else { continue };
            let identity = file_identity(&about);
            if files.contains(&identity) {
                found.entry(identity).or_insert_with(|| name.clone());
            }
        }
    }
    for entry in fs::read_dir("/sys/block").into_iter().flatten().flatten() {
        let Ok(file) = fs::read_to_string(entry.path().join("loop/backing_file")) else { continue };
        let Ok(about) = fs::metadata(file.trim_end()) else { continue };
        let identity = file_identity(&about);
        if files.contains(&identity) {
            let device = entry.file_name().to_string_lossy().into_owned();
            found.entry(identity).or_insert_with(|| format!("/dev/{device}"));
        }
    }
    found.into_iter().collect()
}

/// Returns the numbers of the block devices that dom0's kernel serves to a domain.
pub(crate) fn served_devices(domid: u32) -> HashSet<u64> {
    let mut devices = HashSet::new();
    for entry in fs::read_dir("/sys/bus/xen-backend/devices").into_iter().flatten().flatten() {
        if !entry.file_name().to_string_lossy().starts_with(&format!("vbd-{domid}-")) {
            continue;
        }
        // Both numbers are hexadecimal.
        let text = fs::read_to_string(entry.path().join("physical_device")).unwrap_or_default();
        let Some((major, minor)) = text.trim().split_once(':') else { continue };
        let number = |text| u32::from_str_radix(text, 16).ok();
        devices.extend(number(major).zip(number(minor)).map(|(major, minor)| makedev(major, minor)));
    }
    devices
}

/// Returns the domain of a process, if it is the QEMU of one.
fn domain_of(process: &Path) -> Option<String> {
    let line = fs::read(process.join("cmdline")).ok()?;
    let args: Vec<String> =
        line.split(|byte| *byte == 0).map(|word| String::from_utf8_lossy(word).into_owned()).collect();
    let after = |option: &str| {
        args.iter().position(|word| word == option).and_then(|place| args.get(place + 1)).cloned()
    };
    let domid = after("-xen-domid")?;
    Some(after("-name").unwrap_or_else(|| format!("number {domid}")))
}

/// Returns true if the QEMU of a domain still runs.
pub(crate) fn has_qemu(domid: u32) -> bool {
    let wanted = domid.to_string();
    fs::read_dir("/proc").into_iter().flatten().flatten().any(|entry| {
        let line = fs::read(entry.path().join("cmdline")).unwrap_or_default();
        let mut args = line.split(|byte| *byte == 0);
        args.any(|word| word == b"-xen-domid") && args.next() == Some(wanted.as_bytes())
    })
}

/// Returns true if an `xl` that saves into a file still runs: it continues when its caller was killed.
pub(crate) fn is_being_saved(file: &str) -> bool {
    xls(&["save"]).iter().any(|args| args.iter().any(|word| word == file))
}

/// Owner of a save that runs.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Save {
    /// One of ours, into this file.
    Ours(String),
    /// Another program's.
    Foreign,
}

/// Finds the `xl` that saves, or migrates, a domain.
pub(crate) fn save_of(name: &str, domid: u32) -> Option<Save> {
    let number = domid.to_string();
    let of_it = xls(&["save", "migrate", "suspend"])
        .into_iter()
        .find(|args| args.iter().any(|word| word == name || *word == number))?;
    let is_ours = |word: &&String| word.ends_with(".memory.part") || word.ends_with(".domsnap-previous");
    Some(of_it.iter().find(is_ours).cloned().map_or(Save::Foreign, Save::Ours))
}

/// Returns true if an `xl` creates domains: which ones it does not show.
pub(crate) fn is_a_domain_being_created() -> bool {
    !xls(&["create", "restore", "migrate-receive"]).is_empty()
}

/// Returns the command lines of all `xl` processes that perform one of these commands. An `xl` that stays
/// with its domain, to see it end, has finished its command.
fn xls(commands: &[&str]) -> Vec<Vec<String>> {
    let mut found = Vec::new();
    for entry in fs::read_dir("/proc").into_iter().flatten().flatten() {
        let line = fs::read(entry.path().join("cmdline")).unwrap_or_default();
        let args: Vec<String> =
            line.split(|byte| *byte == 0).map(|word| String::from_utf8_lossy(word).into_owned()).collect();
        let is_xl = args.first().is_some_and(|word| word == "xl" || word.ends_with("/xl"));
        if is_xl && args.get(1).is_some_and(|word| commands.contains(&word.as_str())) && !stays(&entry.path())
        {
            found.push(args);
        }
    }
    found
}

/// Returns true if an `xl` is the one that waits for its domain's end: it writes into a log then.
fn stays(process: &Path) -> bool {
    fs::read_link(process.join("fd/1")).is_ok_and(|file| file.starts_with("/var/log/xen"))
}
