//! Long chains: a layer more, a look at the tree, a layer less in the middle.

use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result};

use crate::bench::Bench;
use crate::chain::{self, Chain, Shape};
use crate::child;
use crate::image;
use crate::row::{LIMIT, OURS, Row, Target};

/// The rows of [`measure`].
pub const ROWS: &[&str] = &["chain-add", "chain-add-disk", "chain-tree", "chain-delete-middle"];

const BELOW: &str = "layers below the active one opened";

/// A chain of 128 snapshots.
pub fn measure(bench: &Bench) -> Result<Vec<Row>> {
    let snapshots = if bench.quick { 16 } else { 128 };
    let place = bench.place("chain")?;
    let shape = Shape { snapshots, size: 4 << 30, extents: 40, extent: 256 << 10, orderly: false };
    let chain = Chain::make(bench, &place.path().join("ours"), shape)?;
    let theirs = chain.copy_images(&place.path().join("theirs"))?;
    let what = format!("{snapshots} external snapshots of 4 GiB, 10 MiB in each layer");

    let targets = [Target::Under(Duration::from_millis(10)), Target::Count(BELOW, 0)];
    let mut add = Row::new(ROWS[0], format!("create of a domain on disks at rest: {what}"), &targets);
    let create = |name: &str| chain.create(bench, name);
    adding(bench, &mut add, &chain, &theirs, create)?;
    // The same chain, as an image that no domain was registered for.
    let loose = place.path().join("loose");
    let image = chain.copy_images(&loose)?;
    let mut add_disk = Row::new(ROWS[1], format!("disk create --external: {what}"), &targets);
    adding_loose(bench, &mut add_disk, &image, &place.path().join("loose-state"))?;

    let mut tree = Row::new(
        ROWS[2],
        format!("list --tree: {what}"),
        &[Target::Under(Duration::from_millis(20)), Target::Memory(64 << 20)],
    );
    let list = || chain.domsnap(bench, &["list", chain::GUEST, "--tree"]);
    bench.repeat(9, Duration::from_secs(10), |repetition| {
        let info = image::qemu_img(&["info", "--backing-chain"], &theirs);
        bench.alternate(&mut tree, repetition, [(OURS, list()), ("qemu-img info --backing-chain", info)])
    })?;
    let shown = child::output(&mut list())?;
    (1..=snapshots)
        .map(chain::name)
        .find(|name| !shown.contains(name.as_str()))
        .map_or(Ok(()), |name| anyhow::bail!("list --tree does not show {name}"))?;
    let layers = image::chain(&theirs)?;
    let mut heads = bench.probe(&["heads"])?;
    heads.args(&layers);
    bench.repeat(5, Duration::from_secs(5), |_| bench.time(&mut tree, LIMIT, &mut heads))?;
    tree.note("limit: a read of the first 64 KiB of each layer");

    let mut middle =
        Row::new(ROWS[3], format!("delete of a snapshot in the middle: {what}"), &[Target::Faster(5.0)]);
    delete_middle(bench, &mut middle, &chain, &theirs)?;
    Ok(vec![add, add_disk, tree, middle])
}

fn adding(
    bench: &Bench,
    row: &mut Row,
    chain: &Chain,
    theirs: &Path,
    create: impl Fn(&str) -> std::process::Command,
) -> Result<()> {
    let layers = image::chain(&chain.disk())?.len();
    let remove = |name: &str| child::run(&mut chain.delete(bench, &[name.to_owned()]));
    bench.repeat(9, Duration::from_secs(15), |repetition| {
        let sides = [
            (OURS, create("extra")),
            ("qemu-img create -b", overlay(theirs, false)),
            ("qemu-img create -u -b (backing file not looked at)", overlay(theirs, true)),
        ];
        bench.alternate(row, repetition, sides)?;
        if repetition == 0 {
            chain.check(layers + 1, 2)?;
        }
        remove("extra")?;
        Ok(())
    })?;
    let below = image::chain(&chain.disk())?.split_off(1);
    row.count(BELOW, child::opened(&create("extra"), &below)?);
    remove("extra")?;
    row.flushes(OURS, child::flushes(&create("extra"))?);
    remove("extra")?;
    row.flushes("qemu-img create -b", child::flushes(&overlay(theirs, false))?);
    overlay_limit(bench, row)
}

fn adding_loose(bench: &Bench, row: &mut Row, image: &Path, state: &Path) -> Result<()> {
    let create = |name: &str| {
        let mut command = bench.domsnap(state, &["disk", "create", "--external"]);
        command.arg(image).arg(name);
        command
    };
    let layers = image::chain(image)?;
    // The first one also registers what the image is.
    child::run(&mut create("first"))?;
    image::check(image)?;
    anyhow::ensure!(
        image::chain(image)?.len() == layers.len() + 1,
        "no layer was added to {}",
        image.display()
    );
    bench.repeat(9, Duration::from_secs(15), |repetition| {
        let sides = [
            (OURS, create(&format!("n{repetition}"))),
            ("qemu-img create -b", overlay(image, false)),
            ("qemu-img create -u -b (backing file not looked at)", overlay(image, true)),
        ];
        bench.alternate(row, repetition, sides)
    })?;
    let below = image::chain(image)?.split_off(1);
    row.count(BELOW, child::opened(&create("traced"), &below)?);
    row.flushes(OURS, child::flushes(&create("counted"))?);
    overlay_limit(bench, row)
}

/// Makes an overlay over `top` beside it, again and again the same.
fn overlay(top: &Path, unseen: bool) -> std::process::Command {
    let mut args = vec!["create", "-q", "-f", "qcow2", "-F", "qcow2"];
    if unseen {
        args.push("-u");
    }
    let mut command = child::command("qemu-img", &args);
    command.arg("-b").arg(top).arg(top.with_file_name("overlay"));
    if unseen {
        command.arg("4G");
    }
    command
}

fn overlay_limit(bench: &Bench, row: &mut Row) -> Result<()> {
    bench.repeat(5, Duration::from_secs(5), |_| {
        let place = bench.place("overlay")?;
        bench.time(row, LIMIT, bench.probe(&["overlay"])?.arg(place.path()))
    })?;
    row.note("limit: a file of 256 KiB made, flushed, linked, renamed, its directory flushed");
    Ok(())
}

/// Another snapshot each time, each with 10 MiB below it and 10 MiB above it.
fn delete_middle(bench: &Bench, row: &mut Row, chain: &Chain, theirs: &Path) -> Result<()> {
    const REBASE: &str = "qemu-img rebase (safe) and rm";
    let layers = image::chain(theirs)?;
    let middle = layers.len() / 2;
    let snapshot = |repetition: usize| {
        // Of layers, the top is the first; of snapshots, the bottom.
        let index = middle - 3 * repetition.min(middle / 3);
        (index, chain::name((layers.len() - index) as u32))
    };
    let mut done = 0;
    bench.repeat(5, Duration::from_secs(15), |repetition| {
        let (index, name) = snapshot(repetition);
        let (child, gone, parent) = (&layers[index - 1], &layers[index], &layers[index + 1]);
        let mut rebase = child::command("qemu-img", &["rebase", "-f", "qcow2", "-F", "qcow2", "-b"]);
        rebase.arg(parent.file_name().context("a layer has a name")?).arg(child);
        bench.alternate(row, repetition, [(OURS, chain.delete(bench, &[name])), (REBASE, rebase)])?;
        std::fs::remove_file(gone)?;
        done = repetition + 1;
        image::flush(theirs)
    })?;
    chain.check(layers.len() - done, usize::MAX)?;
    image::compare(&chain.disk(), theirs)?;
    let (_, name) = snapshot(done);
    row.flushes(OURS, child::flushes(&chain.delete(bench, &[name]))?);
    row.note("the layers are scattered: of 10 MiB in the deleted one, most is moved");
    Ok(())
}
