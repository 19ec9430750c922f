//! The command of a clone.

use std::path::{Path, PathBuf};

use serde_json::{Map, Value};

use super::Identity;
use crate::{
    error::{Error, ErrorKind, Result},
    saver,
};

const ATTEMPTED: &str = "making the command of a clone";

/// Options without a value that a clone has too.
const ALONE: [&str; 10] = [
    "nodefaults",
    "no-user-config",
    "enable-kvm",
    "nographic",
    "no-reboot",
    "no-shutdown",
    "only-migratable",
    "no-hpet",
    "no-acpi",
    "no-fd-bootchk",
];

/// Options with a value that names no file that is written, and nothing that listens.
const HARMLESS: [&str; 31] = [
    "accel",
    "cpu",
    "m",
    "smp",
    "numa",
    "machine",
    "M",
    "kernel",
    "initrd",
    "append",
    "dtb",
    "bios",
    "L",
    "rtc",
    "global",
    "boot",
    "overcommit",
    "msg",
    "action",
    "watchdog-action",
    "sandbox",
    "vga",
    "k",
    "smbios",
    "icount",
    "seed",
    "compat",
    "audiodev",
    "acpitable",
    "fw_cfg",
    "runas",
];

/// Options that are checked word by word.
const CHECKED: [&str; 20] = [
    "blockdev",
    "drive",
    "hda",
    "hdb",
    "hdc",
    "hdd",
    "cdrom",
    "chardev",
    "qmp",
    "qmp-pretty",
    "monitor",
    "mon",
    "serial",
    "parallel",
    "device",
    "object",
    "netdev",
    "pidfile",
    "display",
    "tpmdev",
];

/// Drivers of `-device` that use something of the host that only one machine can have.
const OF_THE_HOST: [&str; 8] =
    ["vfio-", "usb-host", "vhost-", "ivshmem", "virtio-9p", "scsi-generic", "scsi-block", "nvdimm"];

/// Back ends of `-netdev` that are a clone's own: QEMU's helper makes a new tap for each `bridge`.
const OWN_NETWORKS: [&str; 3] = ["user", "hubport", "bridge"];

/// Back ends of `-chardev` that are a clone's own.
const OWN_DEVICES: [&str; 7] = ["null", "ringbuf", "pty", "stdio", "spicevmc", "msmouse", "testdev"];

/// Makes the command of a clone from the command of the machine whose memory was saved, the program first. It
/// has no `-incoming`, and ends with `-S`: the caller adds the source of the memory.
///
/// # Errors
/// [`ErrorKind::Unsupported`], naming the option: the clone would use something that is another machine's,
/// or domsnap does not know what it would use. [`ErrorKind::Invalid`] for an identity that cannot be in a
/// command.
pub fn command(of: &[String], identity: &Identity) -> Result<Vec<String>> {
    check(identity)?;
    let of = without_shared_memory(of);
    let mut rest = of.iter();
    let program = rest.next().ok_or_else(|| refused("the command", "it is empty"))?;
    let mut made = vec![program.clone()];
    let mut has_uuid = false;
    while let Some(word) = rest.next() {
        let name = word.strip_prefix("--").or_else(|| word.strip_prefix('-'));
        let Some(name) = name.filter(|name| !name.is_empty()) else {
            return Err(refused(word, "it is an image without an option"));
        };
        match name {
            "S" | "daemonize" => continue,
            alone if ALONE.contains(&alone) => {
                made.push(word.clone());
                continue;
            }
            _ => {}
        }
        let value =
            rest.next().ok_or_else(|| refused(word, "it has no value, or domsnap does not know it"))?;
        let shown = format!("{word} {}", saver::secrets::shown_word(value));
        let renewed = match name {
            "incoming" => continue,
            "name" => named(value, &identity.name),
            "uuid" => {
                has_uuid = true;
                identity.uuid.to_string()
            }
            harmless if HARMLESS.contains(&harmless) => value.clone(),
            checked if CHECKED.contains(&checked) => {
                let option = Rewritten { name: checked, identity };
                let renewed = option.renew(value).map_err(|why| refused(&shown, &why))?;
                option.check(&renewed).map_err(|why| refused(&shown, &why))?;
                renewed
            }
            _ => return Err(refused(&shown, "domsnap does not know what it uses")),
        };
        made.extend([word.clone(), renewed]);
    }
    if !has_uuid {
        made.extend(["-uuid".to_owned(), identity.uuid.to_string()]);
    }
    // A guest without the device, or whose QEMU makes an ID itself, needs none.
    let _ = saver::fresh_generation_id(&mut made);
    made.push("-S".to_owned());
    Ok(made)
}

/// The sockets, pipes, logs and other files of a command that a clone needs its own of, beside its disks.
/// Relative ones are not among them.
pub(crate) fn own_files(of: &[String]) -> Vec<PathBuf> {
    let mut found: Vec<PathBuf> = Vec::new();
    for pair in of.windows(2) {
        let [option, value] = pair else { continue };
        let Some(option) = option.strip_prefix("--").or_else(|| option.strip_prefix('-')) else { continue };
        let parts = parts(value);
        let text = |key: &str| parts.get(key).and_then(Value::as_str);
        let log = text("logfile");
        let files = match option {
            "qmp" | "qmp-pretty" | "monitor" | "serial" | "parallel" => {
                match split_scheme(text("").unwrap_or_default()) {
                    ("unix:" | "file:" | "pipe:", path) => [Some(path), log],
                    _ => [None, log],
                }
            }
            "chardev" => [text("path"), log],
            "pidfile" => [Some(value.as_str()), None],
            _ => continue,
        };
        for file in files.into_iter().flatten().map(Path::new) {
            if file.is_absolute() && !found.iter().any(|known| known == file) {
                found.push(file.to_owned());
            }
        }
    }
    found
}

/// A command without the options by which domsnap maps the memory of a clone: a clone of a clone has the
/// memory of its own snapshot.
fn without_shared_memory(of: &[String]) -> Vec<String> {
    let word = |at: usize| of.get(at).map(String::as_str).unwrap_or_default();
    let is = |at: usize, option: &str| word(at).trim_start_matches('-') == option;
    let shared = (1..of.len()).find_map(|at| {
        let object: Value = serde_json::from_str(word(at + 1)).ok().filter(|_| is(at, "object"))?;
        let is_ours = object["qom-type"] == "memory-backend-file"
            && object["share"] == false
            && object["readonly"] == true
            && object["rom"] == "off";
        let machine = format!("memory-backend={}", object["id"].as_str().filter(|_| is_ours)?);
        let machine = (1..of.len()).find(|at| is(*at, "machine") && word(*at + 1) == machine)?;
        Some([at, machine])
    });
    let Some(shared) = shared else { return of.to_vec() };
    let is_left = |at: &usize| !shared.iter().any(|from| (*from..*from + 2).contains(at));
    (0..of.len()).filter(is_left).map(|at| word(at).to_owned()).collect()
}

fn refused(option: &str, why: &str) -> Error {
    Error::new(ErrorKind::Unsupported, ATTEMPTED, option, why).advise(
        "clone the disks without memory, or start the machine without this option before its snapshot",
    )
}

/// Checks that an identity can be written into options.
fn check(identity: &Identity) -> Result<()> {
    let invalid = |what: &str| {
        Err(Error::new(ErrorKind::Invalid, ATTEMPTED, what, "it cannot be in a command of QEMU"))
    };
    let has_odd = |text: &str| text.is_empty() || text.contains([',', '\n', '\0']);
    if has_odd(&identity.name) || identity.name.contains('=') {
        return invalid(&identity.name);
    }
    for (from, to) in &identity.paths {
        for path in [from, to] {
            if !path.is_absolute() || path.to_str().is_none_or(has_odd) {
                return invalid(&path.display().to_string());
            }
        }
        if from == to {
            return invalid(&format!("{} (the path is the same)", to.display()));
        }
    }
    match identity.macs.iter().find(|(_, to)| !is_mac(to)) {
        Some((_, mac)) => invalid(mac),
        None => Ok(()),
    }
}

fn is_mac(text: &str) -> bool {
    let parts: Vec<&str> = text.split(':').collect();
    parts.len() == 6
        && parts.iter().all(|part| part.len() == 2 && part.bytes().all(|byte| byte.is_ascii_hexdigit()))
}

/// The value of `-name` with another name.
fn named(value: &str, name: &str) -> String {
    let others = value.split(',').enumerate();
    let others = others.filter(|(place, part)| {
        let is_name = part.starts_with("guest=") || *place == 0 && !part.contains('=');
        !is_name
    });
    let others = others.map(|(_, part)| part.to_owned());
    std::iter::once(format!("guest={name}")).chain(others).collect::<Vec<_>>().join(",")
}

/// One option while it is rewritten.
struct Rewritten<'a> {
    name: &'a str,
    identity: &'a Identity,
}

/// The parts of a value: keys and values, the first one perhaps without a key.
type Parts = Map<String, Value>;

impl Rewritten<'_> {
    /// Replaces paths and MAC addresses in a value.
    fn renew(&self, value: &str) -> std::result::Result<String, String> {
        if value.trim_start().starts_with('{') {
            let mut parsed: Value = serde_json::from_str(value).map_err(|error| error.to_string())?;
            self.renew_json(&mut parsed);
            return Ok(parsed.to_string());
        }
        if value.contains(",,") {
            return Err("it has a path with a comma".to_owned());
        }
        let parts = value.split(',').map(|part| match part.split_once('=') {
            Some((key, value)) => format!("{key}={}", self.renewed(value)),
            None => self.renewed(part),
        });
        Ok(parts.collect::<Vec<_>>().join(","))
    }

    fn renew_json(&self, value: &mut Value) {
        match value {
            Value::String(text) => *text = self.renewed(text),
            Value::Array(all) => all.iter_mut().for_each(|value| self.renew_json(value)),
            Value::Object(all) => all.values_mut().for_each(|value| self.renew_json(value)),
            Value::Null | Value::Bool(_) | Value::Number(_) => {}
        }
    }

    fn renewed(&self, text: &str) -> String {
        let (scheme, path) = split_scheme(text);
        let found = self.identity.paths.iter().find(|(from, _)| from == Path::new(path));
        if let Some(to) = found.and_then(|(_, to)| to.to_str()) {
            return format!("{scheme}{to}");
        }
        let mac = self.identity.macs.iter().find(|(from, _)| from.eq_ignore_ascii_case(text));
        mac.map_or_else(|| text.to_owned(), |(_, to)| to.clone())
    }

    /// Checks that nothing in a rewritten value is another machine's.
    fn check(&self, value: &str) -> std::result::Result<(), String> {
        let parts = parts(value);
        let text = |key: &str| parts.get(key).and_then(Value::as_str);
        let kind = text("").or(text("driver")).or(text("backend")).or(text("type")).or(text("qom-type"));
        let kind = kind.unwrap_or_default();
        if parts.keys().any(|key| key.ends_with("fd") || key.ends_with("fds")) {
            return Err("it names a descriptor, which only one process has".to_owned());
        }
        if let Some(log) = text("logfile")
            && !self.identity.paths.iter().any(|(_, to)| to == Path::new(log))
        {
            return Err(format!("{log} is another machine's log"));
        }
        let is_own_path = |path: &str| self.identity.paths.iter().any(|(_, to)| to == Path::new(path));
        let own = |path: &str| match is_own_path(split_scheme(path).1) {
            true => Ok(()),
            false => {
                Err(format!("{} is another machine's: the identity has no path for it", split_scheme(path).1))
            }
        };
        match self.name {
            "qmp" | "qmp-pretty" | "monitor" | "serial" | "parallel" => match split_scheme(kind) {
                ("unix:" | "file:", path) => own(path),
                _ if ["none", "null", "stdio", "pty", "vc"].contains(&kind)
                    || kind.starts_with("chardev:") =>
                {
                    Ok(())
                }
                _ => Err("it is an address that another machine has".to_owned()),
            },
            // By a character device, which is checked itself.
            "mon" => Ok(()),
            "tpmdev" if kind == "emulator" => Ok(()),
            "tpmdev" => Err("the device is the host's, and only one machine can have it".to_owned()),
            "pidfile" => own(value),
            "display" => match ["none", "egl-headless", "curses", "gtk", "sdl"].contains(&kind) {
                true => Ok(()),
                false => Err("it is an address that another machine has".to_owned()),
            },
            "chardev" => match (kind, text("path")) {
                ("socket" | "file" | "pipe", Some(path)) => own(path),
                (own, _) if OWN_DEVICES.contains(&own) => Ok(()),
                _ => Err("it is an address or a device that another machine has".to_owned()),
            },
            "netdev" => {
                let opens = ["hostfwd", "guestfwd", "smb", "tftp"].iter().any(|key| parts.contains_key(*key));
                match OWN_NETWORKS.contains(&kind) && !opens {
                    true => Ok(()),
                    false => {
                        Err("it is a network that another machine uses, or opens a port of the host"
                            .to_owned())
                    }
                }
            }
            "device" => match OF_THE_HOST.iter().find(|prefix| kind.starts_with(**prefix)) {
                Some(_) => Err("the device is the host's, and only one machine can have it".to_owned()),
                None => Ok(()),
            },
            "object" => match kind {
                "iothread" | "rng-random" | "rng-builtin" | "throttle-group" | "thread-context" => Ok(()),
                "secret" if text("file").is_none() => Ok(()),
                _ => Err("domsnap does not know what it shares (memory of a machine must be QEMU's default)"
                    .to_owned()),
            },
            // Disks.
            _ => {
                let read_only = ["readonly", "read-only"].iter().any(|key| {
                    parts.get(*key).is_some_and(|value| value == true || value == "on" || value == "true")
                });
                let files = files(&parts);
                if files.is_empty() && self.name == "blockdev" {
                    // A node on another node, which is checked itself.
                    let is_local = parts.contains_key("file") && !parts.contains_key("server");
                    return match is_local || kind == "null-co" {
                        true => Ok(()),
                        false => Err("domsnap does not know whose data it is".to_owned()),
                    };
                }
                if read_only || kind == "cdrom" || self.name == "cdrom" || text("media") == Some("cdrom") {
                    return Ok(());
                }
                files.iter().try_for_each(|file| own(file))
            }
        }
    }
}

/// Files of a disk.
fn files(parts: &Parts) -> Vec<&str> {
    let file = parts.get("filename").or_else(|| parts.get("file.filename"));
    let of_node = parts.get("file").and_then(|file| file.get("filename"));
    let drive = parts.get("file").filter(|file| file.as_str().is_some_and(|file| file.contains('/')));
    let image = parts.get("").filter(|file| file.as_str().is_some_and(|file| file.contains('/')));
    [file, of_node, drive, image].into_iter().flatten().filter_map(Value::as_str).collect()
}

/// Parses a value, in JSON or in parts; the part without a key has an empty one.
fn parts(value: &str) -> Parts {
    if let Ok(Value::Object(all)) = serde_json::from_str(value) {
        return all;
    }
    let parts = value.split(',').map(|part| part.split_once('=').unwrap_or(("", part)));
    parts.map(|(key, value)| (key.to_owned(), Value::from(value))).rev().collect()
}

/// Splits `unix:/path` into its two parts.
fn split_scheme(text: &str) -> (&str, &str) {
    for scheme in ["unix:", "file:", "pipe:"] {
        if let Some(path) = text.strip_prefix(scheme) {
            return (scheme, path);
        }
    }
    ("", text)
}

#[cfg(test)]
mod tests {
    use uuid::Uuid;

    use super::*;

    const UUID: &str = "11111111-2222-4333-8444-555555555555";

    fn identity() -> Identity {
        Identity::new("c1", Uuid::parse_str(UUID).expect("one"))
            .path("/vm/a.qcow2", "/c/a.qcow2")
            .path("/vm/qmp", "/c/qmp")
            .path("/vm/agent", "/c/agent")
            .path("/vm/log", "/c/log")
            .mac("52:54:00:00:00:0A", "52:54:00:00:00:0b")
    }

    fn made(line: &str) -> Result<String> {
        let line: Vec<String> = line.split_whitespace().map(str::to_owned).collect();
        command(&line, &identity()).map(|line| line.join(" "))
    }

    /// Each part of the identity is replaced in each form, and the rest stays.
    #[test]
    fn identity_is_replaced_in_each_form() {
        for (from, to) in [
            ("-name gold", "-name guest=c1"),
            ("-name guest=gold,debug-threads=on", "-name guest=c1,debug-threads=on"),
            ("-name gold,process=p", "-name guest=c1,process=p"),
            ("-qmp unix:/vm/qmp,server=on,wait=off", "-qmp unix:/c/qmp,server=on,wait=off"),
            ("-serial file:/vm/log", "-serial file:/c/log"),
            ("-chardev socket,id=a,path=/vm/agent,server=on", "-chardev socket,id=a,path=/c/agent,server=on"),
            ("-drive file=/vm/a.qcow2,if=none,id=d", "-drive file=/c/a.qcow2,if=none,id=d"),
            (
                r#"-blockdev {"driver":"file","filename":"/vm/a.qcow2"}"#,
                r#"-blockdev {"driver":"file","filename":"/c/a.qcow2"}"#,
            ),
            ("-blockdev driver=qcow2,file=f0,node-name=d0", "-blockdev driver=qcow2,file=f0,node-name=d0"),
            (
                "-blockdev driver=file,filename=/iso,node-name=i,read-only=on",
                "-blockdev driver=file,filename=/iso,node-name=i,read-only=on",
            ),
            ("-device virtio-net-pci,mac=52:54:00:00:00:0a", "-device virtio-net-pci,mac=52:54:00:00:00:0b"),
            ("-netdev user,id=n,restrict=on", "-netdev user,id=n,restrict=on"),
            ("-m 128 -nodefaults --machine q35 -smp 1", "-m 128 -nodefaults --machine q35 -smp 1"),
        ] {
            let expected = format!("qemu {to} -uuid {UUID} -S");
            assert_eq!(made(&format!("qemu {from}")).expect("it can be made"), expected);
        }
        let line = made("qemu -S -uuid 0 -daemonize -incoming defer -m 1").expect("it can be made");
        assert_eq!(line, format!("qemu -uuid {UUID} -m 1 -S"));
        let old = "324e6eaf-d1d1-4bf6-bf41-b9bb6c91fb87";
        let line = made(&format!("qemu -device vmgenid,guid={old}")).expect("it can be made");
        assert!(line.contains("vmgenid,guid=") && !line.contains(old), "{line}");
    }

    /// What another machine has, and what is not known, is refused by its name.
    #[test]
    fn what_is_another_machines_is_refused() {
        for line in [
            "-qmp unix:/vm/other,server=on",
            "-qmp tcp:127.0.0.1:4444,server=on",
            "-serial telnet::4444,server=on",
            "-chardev socket,id=a,path=/vm/other,server=on",
            "-chardev socket,id=a,host=0,port=1,server=on",
            "-chardev socket,id=a,fd=3",
            "-chardev file,id=a,path=/vm/other.log",
            "-drive file=/vm/b.qcow2,if=none",
            "-hda /vm/b.qcow2",
            "-blockdev driver=file,filename=/vm/b.qcow2,node-name=f",
            r#"-blockdev {"driver":"file","filename":"/vm/b.qcow2"}"#,
            r#"-blockdev {"driver":"qcow2","file":{"driver":"file","filename":"/vm/b.qcow2"}}"#,
            "-blockdev driver=nbd,server.type=unix,server.path=/s,node-name=n",
            "-netdev tap,id=n,ifname=tap0",
            "-netdev user,id=n,hostfwd=tcp::2222-:22",
            "-device vfio-pci,host=01:00.0",
            "-device vhost-user-fs-pci,chardev=a",
            "-object memory-backend-memfd,id=m,size=1G,share=on",
            "-object memory-backend-file,id=m,size=1G,mem-path=/m",
            "-vnc :1",
            "-spice port=1",
            "-display vnc=:1",
            "-pidfile /vm/pid",
            "-readconfig /vm/config",
            "-s",
            "-loadvm s",
            "-virtfs local,path=/,mount_tag=r",
            "/vm/a.qcow2",
            "-drive file=/vm/a,,b.qcow2",
        ] {
            let error = made(&format!("qemu {line} -m 1")).expect_err(line);
            assert_eq!(error.kind(), ErrorKind::Unsupported, "{line}: {error}");
        }
    }

    /// An identity that would be more than one option is refused.
    #[test]
    fn identity_cannot_add_options() {
        let line = ["qemu".to_owned()];
        let uuid = Uuid::nil();
        for identity in [
            Identity::new("a,debug-threads=on", uuid),
            Identity::new("", uuid),
            Identity::new("a", uuid).path("/a", "/b,readonly=on"),
            Identity::new("a", uuid).path("/a", "b"),
            Identity::new("a", uuid).path("/a", "/a"),
            Identity::new("a", uuid).mac("52:54:00:00:00:01", "x,y"),
        ] {
            let error = command(&line, &identity).expect_err("refused");
            assert_eq!(error.kind(), ErrorKind::Invalid, "{error}");
        }
    }

    /// The files that a clone needs its own of are found in each form; disks and relative names are not among
    /// them.
    #[test]
    fn own_files_are_found_in_each_form() {
        let line = "qemu -qmp unix:/vm/qmp,server=on -serial file:/vm/log -pidfile /vm/pid -monitor none \
                    -chardev socket,id=a,path=/vm/agent,logfile=/vm/chars -chardev null,id=b -serial file:relative \
                    -drive file=/vm/a.qcow2,if=none,id=d -mon chardev=a -chardev socket,id=c,path=/vm/agent";
        let line: Vec<String> = line.split_whitespace().map(str::to_owned).collect();
        let found: Vec<String> = own_files(&line).iter().map(|file| file.display().to_string()).collect();
        assert_eq!(found, ["/vm/qmp", "/vm/log", "/vm/pid", "/vm/agent", "/vm/chars"]);
    }

    /// A clone of a clone does not get its memory; another memory of the user's own is refused.
    #[test]
    fn memory_of_a_clone_is_left_out() {
        let ours = r#"{"qom-type":"memory-backend-file","id":"pc.ram","size":1,"share":false,"mem-path":"/c/m","readonly":true,"rom":"off"}"#;
        let made = made(&format!(
            "qemu -m 64 -S -incoming defer -object {ours} -machine memory-backend=pc.ram -smp 1"
        ));
        let made = made.expect("it is ours");
        assert!(made.starts_with("qemu -m 64 -smp 1"), "{made}");
        for other in [ours.replace("true", "false"), ours.replace(r#""off""#, r#""on""#)] {
            let line = format!("qemu -object {other} -machine memory-backend=pc.ram");
            assert!(super::tests::made(&line).is_err(), "{line}");
        }
    }

    /// A log of a character device is another machine's, too.
    #[test]
    fn logs_of_character_devices_are_replaced() {
        let line = "qemu -chardev socket,id=a,path=/vm/agent,logfile=/vm/log";
        assert!(made(line).expect("both are the clone's").contains("logfile=/c/log"));
        assert!(made("qemu -chardev null,id=a,logfile=/vm/other").is_err());
    }
}
