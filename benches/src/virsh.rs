//! The same guest under libvirt, whose daemons end with the bench if the bench started them.

use std::ffi::OsStr;
use std::fs;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use testguest::{Guest, GuestOptions};

use crate::bench::Bench;
use crate::child::{self, Cost};
use crate::machine::TICK_MS;

const NAME: &str = "domsnap-bench";

/// A guest that libvirt runs.
pub struct Virsh {
    /// It, as the guest's own program shows it.
    pub guest: Guest,
    daemons: Vec<Child>,
}

/// Within which libvirt's daemons must answer.
const READY: Duration = Duration::from_secs(30);

impl Virsh {
    /// Starts one of these options, booted.
    ///
    /// # Errors
    /// What libvirt said; or it is not here: `scripts/install-libvirt` installs it.
    pub fn start(bench: &Bench, options: GuestOptions, memory_mib: u64) -> Result<Self> {
        let mut guest = options.tick_ms(TICK_MS).inside(bench.path()).start()?;
        // What is restored from memory is no libvirt's: its disks, kernel and sockets are taken over by a
        // boot.
        guest.kill()?;
        let boots = guest.boots();
        let description = guest.dir().join("domain.xml");
        fs::write(&description, describe(&guest, memory_mib)?)?;
        let virsh = Self { guest, daemons: daemons()? };
        virsh.forget();
        virsh.run(&["create".as_ref(), description.as_os_str()])?;
        virsh.guest.wait_boots(boots + 1)?;
        Ok(virsh)
    }

    fn run<S: AsRef<OsStr>>(&self, args: &[S]) -> Result<Cost> {
        child::run(&mut command(args))
    }

    /// Ends the domain, and removes what libvirt keeps of it: a revert makes it a lasting one. What is not
    /// there is no error.
    fn forget(&self) {
        for args in [&["destroy", NAME][..], &["undefine", NAME, "--snapshots-metadata"]] {
            let _ = command(args).output();
        }
    }

    /// What this side is.
    pub fn version(&self) -> Result<String> {
        Ok(child::output(&mut command(&["--version"]))?.trim().to_owned())
    }

    /// Takes a snapshot with memory.
    pub fn create(&self, name: &str) -> Result<Cost> {
        self.run(&["snapshot-create-as", NAME, name])
    }

    /// Reverts to one; the guest runs.
    pub fn revert(&self, name: &str) -> Result<Cost> {
        let cost = self.run(&["snapshot-revert", NAME, name, "--running"])?;
        self.guest.expect_no_bad().context("after virsh snapshot-revert")?;
        Ok(cost)
    }

    /// Deletes one.
    pub fn delete(&self, name: &str) -> Result<Cost> {
        self.run(&["snapshot-delete", NAME, name])
    }

    /// Pauses the guest while another is measured.
    pub fn suspend(&self) -> Result<Cost> {
        self.run(&["suspend", NAME])
    }

    /// Lets it go on.
    pub fn resume(&self) -> Result<Cost> {
        self.run(&["resume", NAME])
    }
}

impl Drop for Virsh {
    fn drop(&mut self) {
        self.forget();
        for daemon in self.daemons.iter_mut().rev() {
            let _ = daemon.kill();
            let _ = daemon.wait();
        }
    }
}

fn command<S: AsRef<OsStr>>(args: &[S]) -> Command {
    let mut command = child::command("virsh", &["-q", "-c", "qemu:///system"]);
    command.args(args);
    command
}

/// Starts libvirt's daemons, where none answer.
fn daemons() -> Result<Vec<Child>> {
    let answers = || command(&["list"]).output().is_ok_and(|output| output.status.success());
    let mut started = Vec::new();
    if answers() {
        return Ok(started);
    }
    for program in ["/usr/sbin/virtlogd", "/usr/sbin/libvirtd"] {
        let mut daemon = child::command::<&str>(program, &[]);
        daemon.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
        let daemon =
            daemon.spawn().with_context(|| format!("start {program}: run scripts/install-libvirt"))?;
        started.push(daemon);
    }
    let until = Instant::now() + READY;
    while !answers() {
        if Instant::now() > until {
            bail!("libvirtd does not answer within {READY:?}");
        }
        std::thread::sleep(Duration::from_millis(100));
    }
    Ok(started)
}

/// The guest as libvirt wants it described.
fn describe(guest: &Guest, memory_mib: u64) -> Result<String> {
    let args: Vec<String> =
        guest.command_line().iter().map(|word| word.to_string_lossy().into_owned()).collect();
    let after = |option: &str| {
        let place = args.iter().position(|word| word == option);
        let word = place.and_then(|place| args.get(place + 1));
        word.with_context(|| format!("the guest's command line has no {option}"))
    };
    let (kernel, initrd, append) = (after("-kernel")?, after("-initrd")?, after("-append")?);
    let (machine, emulator) = (after("-machine")?, args.first().context("the guest has a program")?);
    let dir = guest.dir().display();
    let disks: String = guest
        .targets()
        .iter()
        .zip(guest.disks())
        .map(|(target, path): (&String, PathBuf)| {
            format!(
                "<disk type='file' device='disk'><driver name='qemu' type='qcow2' discard='unmap'/>\
                 <source file='{}'/><target dev='{target}' bus='virtio'/></disk>",
                path.display()
            )
        })
        .collect();
    let channel = |name: &str, file: &str| {
        format!(
            "<channel type='unix'><source mode='bind' path='{dir}/{file}'/><target type='virtio' name='{name}'/></channel>"
        )
    };
    let (agent, witness) =
        (channel("org.qemu.guest_agent.0", "agent"), channel("domsnap.witness.0", "witness"));
    Ok(format!(
        "<domain type='qemu'><name>{NAME}</name><memory unit='MiB'>{memory_mib}</memory><vcpu>1</vcpu>\
         <os><type arch='x86_64' machine='{machine}'>hvm</type><kernel>{kernel}</kernel><initrd>{initrd}</initrd>\
         <cmdline>{append}</cmdline></os><features><acpi/></features><cpu mode='maximum'/>\
         <devices><emulator>{emulator}</emulator>{disks}\
         <serial type='file'><source path='{dir}/console' append='on'/></serial>{agent}{witness}\
         <memballoon model='none'/></devices>\
         <seclabel type='static' model='dac' relabel='no'><label>+0:+0</label></seclabel></domain>"
    ))
}
