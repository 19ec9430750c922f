//! The image engine by itself, for measuring it against `qemu-img snapshot`.
//!
//! ```text
//! engine build IMAGE BYTES      a new image with every cluster allocated, sparsely: metadata but no data
//! engine list IMAGE
//! engine create|apply IMAGE NAME
//! engine delete IMAGE NAME...
//! engine check IMAGE
//! ```

use std::path::Path;
use std::time::{SystemTime, UNIX_EPOCH};

use backend_qcow2::image::{
    ActiveWriter, Error, GuestCluster, Image, InPlace, NewImage, NewSnapshot, OpenOptions, create,
};

fn build(path: &Path, bytes: u64) -> Result<(), Error> {
    create(path, &NewImage::new(bytes))?;
    let mut image = Image::open(path, &OpenOptions::read_write())?;
    let geometry = image.geometry();
    let (clusters, step) = (geometry.cluster_bits.clusters_for(bytes), geometry.l2_entries());
    let mut writer = ActiveWriter::new(&mut image, InPlace::Never)?;
    let mut end = 0;
    for first in (0..clusters).step_by(step as usize) {
        for (at, count) in writer.allocate_data(GuestCluster(first), step.min(clusters - first))? {
            end = end.max(at.0 + count * geometry.cluster_bits.size());
        }
    }
    writer.finish()?;
    let len = image.file().len()?;
    image.file().set_len(len.max(end))
}

fn run(args: &[&str]) -> Result<bool, Error> {
    let write = |image: &str| Image::open(Path::new(image), &OpenOptions::read_write());
    let read = |image: &str| Image::open(Path::new(image), &OpenOptions::read_only());
    match args {
        ["build", image, bytes] => match bytes.parse() {
            Ok(bytes) => build(Path::new(image), bytes)?,
            Err(_) => return Ok(false),
        },
        ["list", image] => {
            for s in read(image)?.snapshots()? {
                println!("{}\t{}\t{}\t{}", s.id(), s.name(), s.disk_size, s.date_seconds);
            }
        }
        ["create", image, name] => {
            let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
            let seconds = u32::try_from(now.as_secs()).unwrap_or(u32::MAX);
            write(image)?.create_snapshot(&NewSnapshot::new(*name, seconds, now.subsec_nanos()))?;
        }
        ["apply", image, name] => write(image)?.apply_snapshot(name)?,
        ["delete", image, names @ ..] => println!("{:?}", write(image)?.delete_snapshots(names)?),
        ["check", image] => println!("{:?}", read(image)?.check()?),
        _ => return Ok(false),
    }
    Ok(true)
}

fn main() -> std::process::ExitCode {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let args: Vec<&str> = args.iter().map(String::as_str).collect();
    match run(&args) {
        Ok(true) => std::process::ExitCode::SUCCESS,
        Ok(false) => {
            eprintln!("usage: engine build|list|create|apply|delete|check IMAGE [BYTES|NAME...]");
            std::process::ExitCode::from(2)
        }
        Err(e) => {
            eprintln!("engine: {e}");
            std::process::ExitCode::FAILURE
        }
    }
}
