//! The commands of the guide's page about VHD (`docs/vhd.md`), each run as it is written there. A command
//! that the page gains or changes runs too, or fails here.

use std::io::Write;
use std::process::{Command, Stdio};

use anyhow::{Context, Result, bail, ensure};
use domsnap_tests::domsnap::status;
use domsnap_tests::served::Server;

use crate::place::{Place, SIZE, read, run, write};
use crate::support::{MIB, Maker};

/// The lines of the page's code blocks, under the headings that they are below.
fn commands() -> Result<Vec<(String, String)>> {
    let page = concat!(env!("CARGO_MANIFEST_DIR"), "/../docs/vhd.md");
    let page = std::fs::read_to_string(page).context(page)?;
    let (mut heading, mut is_code, mut lines) = (String::new(), false, Vec::new());
    for line in page.lines() {
        match line.strip_prefix("## ") {
            Some(text) => heading = text.to_owned(),
            None if line.starts_with("```") => is_code = !is_code,
            None if is_code => lines.push((heading.clone(), line.to_owned())),
            None => {}
        }
    }
    Ok(lines)
}

/// Has QEMU open the node of a `-blockdev` line, and end.
fn open_in_qemu(place: &Place, line: &str) -> Result<()> {
    let mut qemu = Command::new("qemu-system-x86_64");
    qemu.args(["-M", "none", "-nodefaults", "-display", "none", "-monitor", "stdio"]);
    let mut child = qemu
        .args(line.split_whitespace())
        .current_dir(place.directory())
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()?;
    child.stdin.take().context("stdin")?.write_all(b"info block -n\nquit\n")?;
    let output = child.wait_with_output()?;
    let (out, err) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    let node =
        line.split("node-name=").nth(1).and_then(|rest| rest.split(',').next()).context("a node's name")?;
    ensure!(output.status.success() && out.contains(&format!("{node}:")), "{line}: {out}{err}");
    Ok(())
}

/// Every command of the page does what the page says.
#[test]
fn every_command_of_the_page_runs() -> Result<()> {
    let place = Place::new()?;
    let image = place.vhd("disk.vhd")?;
    place.vhd("web.vhd")?;
    write(&image, 0, &[1; 4096])?;
    run("qemu-img", &["create", "-q", "-f", "qcow2", &place.text("data.qcow2"), "8M"])?;
    // A chain that lay in another directory of another machine, under other names.
    let parent = Maker::new(3, 8 * MIB).put(0, &[3; 4096]);
    place.make("parent.vhd", &parent);
    place.make("child.vhd", &Maker::child(&parent, "elsewhere.vhd").put(512, &[4; 512]));
    let mut server: Option<Server> = None;
    let mut seen = Vec::new();
    for (heading, line) in commands()? {
        let line = line.replace("/vm/", &format!("{}/", place.directory().display()));
        if line.starts_with("-blockdev") {
            let size = std::fs::metadata(place.file("azure.vhd"))?.len() - 512;
            open_in_qemu(&place, &line.replace("SIZE", &size.to_string()))?;
        } else if let Some(args) = line.strip_prefix("domsnap disk serve ") {
            let args: Vec<&str> = args.split_whitespace().collect();
            let [image, "--socket", socket] = args[..] else { bail!("{line}") };
            let image = place.text(image);
            server = Some(Server::start(&place.domsnap(), &place.file(socket), &[&image])?);
        } else if let Some(args) = line.strip_prefix("domsnap ") {
            let args: Vec<&str> = args.split_whitespace().collect();
            let output = place.domsnap().command(&args).current_dir(place.directory()).output()?;
            let said = String::from_utf8_lossy(&output.stderr).into_owned();
            ensure!(output.status.code() == Some(status::DONE), "{heading}: {line}: {said}");
        } else {
            bail!("the page has a command that is not known here: {line}");
        }
        seen.push(heading);
    }
    for wanted in [
        "VHD by hand",
        "From Hyper-V, and chains from elsewhere",
        "Check and repair",
        "To Azure",
        "Under QEMU",
    ] {
        ensure!(seen.iter().any(|heading| heading == wanted), "no command is left under {wanted:?}");
    }
    if let Some(mut server) = server {
        server.stop()?;
    }
    let list = place.done(&["list", &place.disk("child.vhd")])?;
    ensure!(!list.stdout.trim().is_empty(), "nothing was imported: {list}");
    let mut shown = vec![0; SIZE];
    shown[..4096].fill(3);
    shown[512..1024].fill(4);
    ensure!(read(&place.file("child.vhd"))? == shown);
    // QEMU reads the copy for Azure as the raw one.
    run(
        "qemu-img",
        &["compare", "-q", "-f", "vpc", "-F", "raw", &place.text("azure.vhd"), &place.text("disk.img")],
    )?;
    Ok(())
}
