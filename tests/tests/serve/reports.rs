//! Public bug reports about NBD servers, each in small against this one.

use std::os::unix::net::UnixStream;

use anyhow::{Context, Result, ensure};
use domsnap_tests::qemu;
use domsnap_tests::served::Client;

use super::{Place, text};

/// Descriptors that a process has open.
fn descriptors(pid: &serde_json::Value) -> Result<usize> {
    Ok(std::fs::read_dir(format!("/proc/{pid}/fd"))?.count())
}

/// systemd#16242: `systemd-repart` discards a whole disk, and qemu-nbd failed at requests over 2 GiB.
#[test]
fn discard_of_almost_4_gib_succeeds() -> Result<()> {
    let place = Place::new()?;
    let most = u64::from(u32::MAX) / 512 * 512;
    for name in ["a.raw,format=raw", "a.vhd,format=vhd"] {
        let file = name.split(',').next().context("a name")?;
        if file == "a.raw" {
            std::fs::File::create(place.file(file))?.set_len(6 << 30)?;
        } else {
            let path = text(&place.file(file));
            qemu::img(&["create", "-q", "-f", "vpc", "-o", "force_size=on", &path, "6G"])?;
        }
        let mut server = place.serve(name, &[])?;
        let mut client = Client::connect(&place.file("s"))?;
        for at in [512, most - 512, most, most + 512] {
            client.write(at, &[7; 512])?;
        }
        client.zero(512, most as u32)?;
        for (at, byte) in [(512, 0), (most - 512, 0), (most, 0), (most + 512, 7)] {
            ensure!(client.read(at, 512)? == [byte; 512], "{name}: at {at}");
        }
        client.trim(0, most as u32)?;
        ensure!(client.read(most + 512, 512)? == [7; 512], "{name}: trim went too far");
        drop(client);
        server.stop()?;
    }
    Ok(())
}

/// hyperkit#187, nbd#64: a trim of one sector that is smaller than a block of the file system destroyed the
/// sectors around it, and a server computed a length wrong.
#[test]
fn trim_of_a_sector_keeps_its_neighbours() -> Result<()> {
    let place = Place::new()?;
    place.raw("a.raw", 4)?;
    let path = text(&place.file("a.vhd"));
    qemu::img(&["create", "-q", "-f", "vpc", "-o", "force_size=on", &path, "4M"])?;
    for name in ["a.raw,format=raw", "a.vhd,format=vhd"] {
        let mut server = place.serve(name, &[])?;
        let mut client = Client::connect(&place.file("s"))?;
        client.write(0, &[9; 32 << 10])?;
        for (at, length) in [(1024, 512), (3584, 1024), (8192, 4608), (20 << 10, 512)] {
            client.trim(at, length)?;
            let (found, end) = (client.read(0, 32 << 10)?, at as usize + length as usize);
            let around = found[..at as usize].iter().rev().take(512).chain(found[end..].iter().take(512));
            ensure!(around.copied().all(|byte| byte == 9), "{name}: a neighbour of {length} at {at} is lost");
            client.write(0, &[9; 32 << 10])?;
        }
        drop(client);
        server.stop()?;
    }
    Ok(())
}

/// blktap#402, nbd#59: clients that disconnect at once, or close one direction only, leave descriptors open
/// until the server has none, or block the next client.
#[test]
fn clients_that_leave_at_once_leave_nothing() -> Result<()> {
    let place = Place::new()?;
    place.raw("a.raw", 1)?;
    let mut server = place.serve("a.raw,format=raw", &[])?;
    let pid = server.ask(&serde_json::json!({ "do": "info" }))?["pid"].clone();
    let before = descriptors(&pid)?;
    for number in 0..300 {
        let stream = UnixStream::connect(place.file("s"))?;
        if number % 2 == 0 {
            stream.shutdown(std::net::Shutdown::Write)?;
        }
    }
    // 16 connections are served at once, and more are closed: a client comes in as soon as those have ended.
    let until = std::time::Instant::now() + std::time::Duration::from_secs(240);
    let connect = || loop {
        match Client::connect(&place.file("s")) {
            Err(_) if std::time::Instant::now() < until => {
                std::thread::sleep(std::time::Duration::from_millis(5));
            }
            ended => return ended,
        }
    };
    for _ in 0..20 {
        drop(connect()?);
    }
    let mut client = connect()?;
    ensure!(client.read(0, 512)? == [1; 512]);
    drop(client);
    // Threads that see the end of their connection at this moment close it soon.
    let until = std::time::Instant::now() + std::time::Duration::from_secs(240);
    while descriptors(&pid)? > before {
        ensure!(std::time::Instant::now() < until, "{} descriptors, {before} before", descriptors(&pid)?);
        std::thread::sleep(std::time::Duration::from_millis(20));
    }
    server.stop()
}

/// nbd#44, ceph#11741: disks over 1 and 2 TiB had a wrong size for the client. The largest VHD has 2040 GiB.
#[test]
fn size_of_the_largest_disk_is_right() -> Result<()> {
    let place = Place::new()?;
    let (size, path) = (2040u64 << 30, text(&place.file("a.vhd")));
    qemu::img(&["create", "-q", "-f", "vpc", "-o", "force_size=on", &path, &size.to_string()])?;
    let mut server = place.serve("a.vhd,format=vhd", &[])?;
    let shown = qemu::img(&["info", "--output=json", &server.uri()])?;
    let shown: serde_json::Value = serde_json::from_str(&shown)?;
    ensure!(shown["virtual-size"] == size, "{shown}");
    let mut client = Client::connect(&place.file("s"))?;
    client.write(size - 512, &[3; 512])?;
    ensure!(client.read(size - 1024, 1024)? == [[0; 512], [3; 512]].concat());
    ensure!(client.write(size, &[3; 512]).is_err() && client.read(size - 512, 1024).is_err());
    drop(client);
    server.stop()
}

/// benji#12, nbd#157: with a block size other than 512 the end of the disk is cut off.
#[test]
fn odd_end_of_a_disk_is_there() -> Result<()> {
    let place = Place::new()?;
    let (path, size) = (place.file("a.raw"), (1 << 20) + 1536);
    std::fs::write(&path, vec![4; size])?;
    let mut server = place.serve("a.raw,format=raw", &[])?;
    let shown = qemu::img(&["info", "--output=json", &server.uri()])?;
    ensure!(serde_json::from_str::<serde_json::Value>(&shown)?["virtual-size"] == size, "{shown}");
    let copy = place.file("copy.raw");
    qemu::run("nbdcopy", &[&server.uri(), &text(&copy)])?;
    ensure!(std::fs::read(copy)? == vec![4; size]);
    server.stop()
}
