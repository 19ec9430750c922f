//! Files that were moved, copied or exchanged, through the command.

use anyhow::{Result, ensure};
use domsnap_tests::domsnap::status;

use crate::place::{Place, read, write};
use crate::support::{MIB, Maker};

/// Two files with one id: the check warns of the copy, and operations go by the locator (case 19).
#[test]
fn copied_parent_is_reported() -> Result<()> {
    let place = Place::new()?;
    let parent = Maker::new(3, 8 * MIB).put(0, &[1; 4096]);
    let child = Maker::child(&parent, "p.vhd").put(512, &[2; 512]);
    place.make("p.vhd", &parent);
    place.make("disk.vhd", &child);
    // The copy, in front of the parent in the directory, shows something else by now.
    place.make("a-copy.vhd", &parent.clone().put(0, &[9; 4096]));
    let shown = read(&place.file("disk.vhd"))?;
    ensure!(shown[0] == 1, "the copy was taken for the parent");
    let said = place.done(&["disk", "check", &place.text("disk.vhd")])?;
    ensure!(said.stdout.contains("a-copy.vhd has the unique id of"), "{said}");
    let disk = place.disk("disk.vhd");
    place.done(&["create", &disk, "one"])?;
    write(&place.file("disk.vhd"), 2 * MIB, &[3; 512])?;
    place.done(&["revert", &disk, "one"])?;
    place.done(&["delete", &disk, "one"])?;
    ensure!(read(&place.file("disk.vhd"))? == shown);
    std::fs::remove_file(place.file("a-copy.vhd"))?;
    let said = place.done(&["disk", "check", &place.text("disk.vhd")])?;
    ensure!(!said.stdout.contains("unique id"), "a second name is reported as a copy: {said}");
    Ok(())
}

/// A parent that was replaced by another image of its name: every command is refused with both ids, and
/// nothing is written (case 18).
#[test]
fn replaced_parent_is_refused() -> Result<()> {
    let place = Place::new()?;
    let parent = Maker::new(3, 8 * MIB).put(0, &[1; 4096]);
    place.make("p.vhd", &Maker { id: [9; 16], ..parent.clone() });
    place.make("disk.vhd", &Maker::child(&parent, "p.vhd").put(512, &[2; 512]));
    let (image, disk, socket) = (place.text("disk.vhd"), place.disk("disk.vhd"), place.text("s"));
    let other = place.text("p.vhd");
    for args in [
        &["create", &disk, "one"][..],
        &["disk", "serve", &disk, "--socket", &socket],
        &["disk", "relocate", &image, &other],
        &["disk", "materialise", &image, &socket],
    ] {
        let said = place.refused(args)?;
        ensure!(said.contains("09090909-") && said.contains("03030303-"), "{args:?}: {said}");
    }
    let checked = place.domsnap().run(&["disk", "check", &image])?;
    ensure!(checked.status == Some(status::FAILED) && checked.stdout.contains("09090909-"), "{checked}");
    Ok(())
}
