//! A volume beside a disk that domsnap serves to the same QEMU: snapshots of both at one instant, while it
//! has them open. Its guest does not run: what is on the disks is written by QEMU itself.

use std::process::Command;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use lvmguest::TestCase;
use lvmguest::inside::{done, refused, snapshots, succeed};
use serde_json::{Value, json};

use crate::matrix::{Sort, group, volume, volumes};
use crate::users::{Running, SOCKET, qmp};

const NAME: &str = "beside";
const IMAGE: &str = "/vm/served.vhd";
const DISK: &str = "/run/served.sock";

/// The output of QEMU.
const SAID: &str = "/vm/qemu.out";

/// The nodes of the two disks.
const NODES: [&str; 2] = ["volume", "served"];

fn until(what: &str, mut done: impl FnMut() -> Result<bool>) -> Result<()> {
    let until = Instant::now() + Duration::from_secs(120);
    while !done()? {
        ensure!(Instant::now() < until, "{what}");
        thread::sleep(Duration::from_millis(50));
    }
    Ok(())
}

fn serve() -> Result<Running> {
    let image = format!("{IMAGE},format=vhd");
    let mut server = Command::new("/t/domsnap");
    server.args(["disk", "serve", &image, "--socket", DISK]);
    let mut server = Running(server.spawn().context("the server cannot be started")?);
    until("the server does not listen", || {
        if let Some(status) = server.0.try_wait()? {
            bail!("the server ended with {status}");
        }
        Ok(std::os::unix::net::UnixStream::connect(format!("{DISK}.control")).is_ok())
    })?;
    Ok(server)
}

/// Asks the server of the disk for its state.
fn server() -> Result<Value> {
    use std::io::{BufRead, BufReader, Write};
    let mut stream = std::os::unix::net::UnixStream::connect(format!("{DISK}.control"))?;
    stream.set_read_timeout(Some(Duration::from_secs(60)))?;
    stream.write_all(b"{\"do\":\"info\"}\n")?;
    let mut line = String::new();
    BufReader::new(stream).read_line(&mut line)?;
    Ok(serde_json::from_str::<Value>(&line)?["ok"].clone())
}

fn qemu(volume: &str) -> Result<Running> {
    let mut qemu = Command::new("/t/qemu-system-x86_64");
    qemu.args(["-S", "-machine", "pc", "-accel", "tcg", "-m", "16", "-nodefaults", "-no-user-config"]);
    qemu.args(["-display", "none", "-qmp"]).arg(format!("unix:{SOCKET},server=on,wait=off"));
    let [of_volume, of_server] = [
        format!("driver=raw,node-name=volume,file.driver=host_device,file.filename={volume}"),
        format!("driver=nbd,node-name=served,reconnect-delay=30,server.type=unix,server.path={DISK}"),
    ];
    for (node, options) in NODES.iter().zip([of_volume, of_server]) {
        qemu.args(["-blockdev", &options, "-device", &format!("virtio-blk-pci,drive={node},id={node}")]);
    }
    // What qemu-io finds is written there, and is no answer of the monitor.
    qemu.stdout(std::fs::File::create(SAID)?);
    let mut running = Running(qemu.spawn().context("QEMU cannot be started")?);
    until("QEMU does not listen", || {
        if let Some(status) = running.0.try_wait()? {
            bail!("QEMU ended with {status}");
        }
        Ok(std::os::unix::net::UnixStream::connect(SOCKET).is_ok())
    })?;
    Ok(running)
}

/// Runs a command of qemu-io on the disk of a device; returns its output.
fn io(device: &str, command: &str) -> Result<String> {
    let before = std::fs::read_to_string(SAID)?.len();
    let line = format!("qemu-io -d /machine/peripheral/{device}/virtio-backend \"{command}\"");
    let request = json!({ "execute": "human-monitor-command", "arguments": { "command-line": line } });
    let answer = qmp(&request.to_string())?;
    ensure!(answer.as_str().is_some_and(str::is_empty), "{line}: {answer}");
    let said = std::fs::read_to_string(SAID)?.split_off(before);
    // Each has the number of its bytes.
    ensure!(said.contains(" 65536/65536 bytes"), "{line}: {said}");
    Ok(said)
}

fn write(letter: u8) -> Result<()> {
    NODES.iter().try_for_each(|node| io(node, &format!("write -P {letter} 0 64k")).map(drop))
}

fn expect(letter: u8, when: &str) -> Result<()> {
    for node in NODES {
        let said = io(node, &format!("read -P {letter} 0 64k"))?;
        ensure!(!said.contains("verification failed"), "{when}: {node} does not have {letter}: {said}");
    }
    Ok(())
}

fn both_are_of_one_instant_and_come_back_in_place() -> Result<()> {
    group(Sort::Thin)?;
    let root = volume(Sort::Thin, "root")?.path();
    succeed(Command::new("/t/qemu-img").args([
        "create",
        "-q",
        "-f",
        "vpc",
        "-o",
        "force_size=on",
        IMAGE,
        "32M",
    ]))?;
    let mut serving = serve()?;
    let running = qemu(&root)?;
    let pid = server()?["pid"].clone();
    done(&["domain", "add", NAME, "--qmp", SOCKET, "--memory-dir", "/vm"])?;
    write(b'a')?;
    done(&["create", NAME, "disks", "--disk-only"])?;
    write(b'b')?;
    ensure!(expect(b'a', "").is_err(), "the check finds nothing");
    // It is paused: its firmware has not run, and needs not to.
    qmp("{\"execute\":\"cont\"}")?;
    qmp("{\"execute\":\"stop\"}")?;
    done(&["create", NAME, "memory"])?;
    write(b'c')?;
    for (name, letter) in [("disks", b'a'), ("memory", b'b'), ("disks", b'a')] {
        done(&["revert", NAME, name, "--paused"])?;
        expect(letter, name)?;
    }
    let now = server()?;
    ensure!(now["pid"] == pid && !now["client"].is_null(), "{now}");
    // Without its server, nothing of either disk is changed.
    let points = volumes()?;
    serving.0.kill()?;
    serving.0.wait()?;
    refused(&["create", NAME, "no", "--disk-only"], &["disk serve"])?;
    ensure!(volumes()? == points, "{points:?} became {:?}", volumes()?);
    drop(serving);
    let _serving = serve()?;
    // QEMU comes back when it has a request.
    expect(b'a', "with another server")?;
    done(&["create", NAME, "again", "--disk-only"])?;
    write(b'd')?;
    done(&["delete", NAME, "disks"])?;
    expect(b'd', "after a delete")?;
    done(&["revert", NAME, "memory", "--paused"])?;
    expect(b'b', "memory, again")?;
    done(&["delete", NAME, "memory", "again"])?;
    expect(b'b', "at the end")?;
    ensure!(snapshots(NAME)?.is_empty() && volumes()? == ["root"], "{:?}", volumes()?);
    ensure!(server()?["layers"].as_array().map(Vec::len) == Some(1), "{}", server()?);
    drop(running);
    Ok(())
}

pub const CASES: &[TestCase] = &[(
    "a served VHD and a thin volume are snapshot at one instant, reverted in place and deleted",
    both_are_of_one_instant_and_come_back_in_place,
)];
