//! One image with very many internal snapshots.

use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::Result;

use crate::bench::Bench;
use crate::child::{self, Cost};
use crate::image::{self, Extent};
use crate::row::{OURS, Row, Target};

/// The rows of [`measure`].
pub const ROWS: &[&str] = &["many-create", "many-list", "many-delete", "many-delete-128", "many-delete-all"];

const SEPARATE: &str = "qemu-img snapshot -d, 128 times";

/// An image with 1,000 snapshots.
pub fn measure(bench: &Bench) -> Result<Vec<Row>> {
    let count = if bench.quick { 200 } else { 1000 };
    let place = bench.place("many")?;
    let (ours, theirs) = (place.path().join("ours.qcow2"), place.path().join("theirs.qcow2"));
    let half = place.path().join("half.qcow2");
    image::create(&ours, 1 << 30, "cluster_size=65536")?;
    image::write(&ours, &[Extent { offset: 0, length: 64 << 20 }], 5)?;
    let state = place.path().join("state");
    for number in 0..count {
        child::run(bench.domsnap(&state, &["disk", "create"]).arg(&ours).arg(tag(number)))?;
        if number == 127 {
            image::copy(&ours, &half)?;
        }
    }
    image::check(&ours)?;
    image::has_snapshots(&ours, count, None, None)?;
    image::copy(&ours, &theirs)?;

    let row = |name, verb: &str, targets: &[Target]| {
        Row::new(name, format!("{verb}: {count} internal snapshots of 1 GiB, 64 MiB allocated"), targets)
    };
    let mut create = row(ROWS[0], "create one", &[Target::Faster(50.0)]);
    let mut list = row(ROWS[1], "list", &[Target::Faster(50.0)]);
    let mut delete = row(ROWS[2], "delete one, in the middle", &[Target::Faster(50.0)]);
    let domsnap = |args: &[&str]| {
        let mut command = bench.domsnap(&state, &["disk", args[0]]);
        command.arg(&ours).args(&args[1..]);
        command
    };
    let qemu = |args: &[&str]| image::qemu_img(&[&["snapshot"], args].concat(), &theirs);
    bench.repeat(9, Duration::from_secs(30), |repetition| {
        let (new, old) = (format!("x{repetition}"), tag(count / 2 + repetition));
        let label = "qemu-img snapshot";
        bench.alternate(
            &mut create,
            repetition,
            [(OURS, domsnap(&["create", &new])), (label, qemu(&["-c", &new]))],
        )?;
        bench.alternate(&mut list, repetition, [(OURS, domsnap(&["list"])), (label, qemu(&["-l"]))])?;
        bench.alternate(
            &mut delete,
            repetition,
            [(OURS, domsnap(&["delete", &old])), (label, qemu(&["-d", &old]))],
        )?;
        if repetition == 0 {
            image::has_snapshots(&ours, count, Some(&new), Some(&old))?;
            image::check(&ours)?;
        }
        Ok(())
    })?;
    for (row, args, theirs) in [
        (&mut create, &["create", "y"][..], &["-c", "y"][..]),
        (&mut list, &["list"], &["-l"]),
        (&mut delete, &["delete", "y"], &["-d", "y"]),
    ] {
        row.flushes(OURS, child::flushes(&domsnap(args))?);
        row.flushes("qemu-img snapshot", child::flushes(&qemu(theirs))?);
    }
    bench.rewrite_limit(&mut create, 4 << 16, 3)?;
    bench.rewrite_limit(&mut delete, 4 << 16, 3)?;
    create.note("limit: read and rewrite of 256 KiB, 3 flushes");

    let mut some = Row::new(
        ROWS[3],
        "delete all of 128 in one pass: 1 GiB, 64 MiB allocated",
        &[Target::Faster(50.0), Target::Flushes(5)],
    );
    delete_some(bench, &mut some, &half)?;
    let mut all = row(ROWS[4], "delete all in one pass", &[Target::Flushes(5)]);
    all.note("qemu-img has no such command; one at a time takes it as often as many-delete says");
    let names = image::snapshots(&ours)?;
    bench.repeat(5, Duration::from_secs(20), |_| {
        let copy = place.path().join("all.qcow2");
        image::copy(&ours, &copy)?;
        let mut command = bench.domsnap(&state, &["disk", "delete"]);
        command.arg(&copy).args(&names);
        match all.ours().is_some_and(|ours| ours.flushes.is_none()) {
            true => all.flushes(OURS, child::flushes(&command)?),
            false => bench.time(&mut all, OURS, &mut command)?,
        }
        image::has_snapshots(&copy, 0, None, None)?;
        image::check(&copy)?;
        Ok(std::fs::remove_file(&copy)?)
    })?;
    bench.rewrite_limit(&mut all, (count as u64 + 4) << 16, 4)?;
    all.note("limit: read and rewrite of one cluster (its L1 table) a snapshot, 4 flushes");
    Ok(vec![create, list, delete, some, all])
}

/// The name of snapshot number `number`.
fn tag(number: usize) -> String {
    format!("n{number}")
}

fn delete_some(bench: &Bench, row: &mut Row, image: &Path) -> Result<()> {
    let names = image::snapshots(image)?;
    let state = image.with_extension("state");
    let (ours, theirs) = (image.with_extension("ours"), image.with_extension("theirs"));
    let all = |file: &Path| {
        let mut command = bench.domsnap(&state, &["disk", "delete"]);
        command.arg(file).args(&names);
        command
    };
    bench.repeat(3, Duration::from_secs(15), |_| {
        image::copy(image, &ours)?;
        image::copy(image, &theirs)?;
        bench.time(row, OURS, &mut all(&ours))?;
        let start = Instant::now();
        let (mut peak, mut cpu) = (0, Duration::ZERO);
        for name in &names {
            let cost = child::run(&mut image::qemu_img(&["snapshot", "-d", name], &theirs))?;
            (peak, cpu) = (cost.peak.max(peak), cpu + cost.cpu);
        }
        row.sample(SEPARATE, Cost { wall: start.elapsed(), peak, cpu });
        image::has_snapshots(&ours, 0, None, None)?;
        image::check(&ours)?;
        image::compare(&ours, &theirs)
    })?;
    image::copy(image, &ours)?;
    row.flushes(OURS, child::flushes(&all(&ours))?);
    Ok(())
}
