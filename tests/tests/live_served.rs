//! A running guest whose disk is a VHD that domsnap serves to QEMU: snapshots with memory, reverts in place,
//! deletes while it runs, and what a crash of either program leaves.

use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

use anyhow::{Context, Result, ensure};
use domsnap_tests::domsnap::Domsnap;
use domsnap_tests::live::{Live, NAME};
use domsnap_tests::served::Server;
use testguest::GuestOptions;

/// The servers of a guest, which can be killed and started again.
#[derive(Clone, Default)]
struct Servers(Arc<Mutex<Vec<(PathBuf, PathBuf, Server)>>>);

impl Servers {
    /// Serves an image with the state directory that [`Live`] uses.
    fn serve(&self, image: &Path, socket: &Path) -> Result<()> {
        let state = image.parent().context("no directory")?.join("state");
        let argument = format!("{},format=vhd", image.display());
        let server = Server::start(&Domsnap::new(&state), socket, &[&argument])?;
        let mut all = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        all.push((image.to_owned(), socket.to_owned(), server));
        Ok(())
    }

    /// Kills all of them.
    fn kill(&self) -> Result<Vec<(PathBuf, PathBuf)>> {
        let mut all = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let mut places = Vec::new();
        for (image, socket, mut server) in all.drain(..) {
            server.kill()?;
            places.push((image, socket));
        }
        Ok(places)
    }

    /// Kills and starts them, as systemd does.
    fn restart(&self) -> Result<()> {
        self.kill()?.iter().try_for_each(|(image, socket)| self.serve(image, socket))
    }
}

/// A guest whose disk `vda` is served, and whose `vdb` is a qcow2 image of QEMU's.
fn guest(reconnect: u32) -> Result<(Live, Servers)> {
    let servers = Servers::default();
    let theirs = servers.clone();
    let options = GuestOptions::new().served(0, reconnect, move |image, socket| theirs.serve(image, socket));
    Ok((Live::of(options)?, servers))
}

/// The disk is found as the VHD that is served; snapshots with memory and of the disks alone are taken at one
/// instant with a qcow2 disk, and reverted to in place; deletes merge while the guest runs.
#[test]
fn served_vhd_is_a_disk_of_a_running_domain() -> Result<()> {
    let (mut live, servers) = guest(30)?;
    let shown = live.domsnap().done(&["domain", "show", NAME])?.stdout;
    ensure!(shown.contains("vda.vhd") && shown.contains("vhd"), "{shown}");
    let first = live.create("first", &[])?;
    ensure!(first.downtime_us.is_some(), "{first:?}");
    live.create("second", &["--disk-only"])?;
    live.create("third", &[])?;
    live.revert("first", &[])?;
    live.verify()?;
    live.create("fourth", &[])?;
    live.revert("second", &[])?;
    live.revert("third", &[])?;
    live.verify()?;
    live.domsnap().done(&["check", NAME])?;
    live.delete(&["first"], &[])?;
    live.delete(&["fourth"], &[])?;
    live.revert("third", &[])?;
    live.delete(&["second", "third"], &[])?;
    live.sound()?;
    drop(servers);
    live.finish()
}
