//! Moves data between qcow2 layers, for measurements and for looking at images: `move_data merge INTO
//! IMAGE...` makes layer number INTO of the run IMAGE... (the bottom first) show what the last shows;
//! `move_data materialise IMAGE TAG NEW` copies an internal snapshot out.

use std::path::Path;
use std::process::ExitCode;

use backend_qcow2::image::{
    Backing, ChainReader, Error, ErrorKind, Image, Moving, OpenOptions, Result, RunBacking, RunLayer,
    materialise, merge,
};

/// The backing file of the run is not opened here: clusters that would need it are an error.
struct Unread;

impl ChainReader for Unread {
    fn read_at(&mut self, _: &mut [u8], offset: u64) -> Result<()> {
        Err(Error::new(
            ErrorKind::Unsupported,
            format!("offset {offset:#x} of what is below the run is needed"),
        ))
    }
}

fn run(args: &[String]) -> Result<u64> {
    let usage =
        || Error::new(ErrorKind::InvalidInput, "usage: merge INTO IMAGE... | materialise IMAGE TAG NEW");
    let (command, args) = args.split_first().ok_or_else(usage)?;
    let reading = OpenOptions::read_only();
    match (command.as_str(), args) {
        ("merge", [into, images @ ..]) => {
            let into: usize = into.parse().map_err(|_| usage())?;
            let target = images.get(into).ok_or_else(usage)?;
            let layers = |part: &[String]| -> Result<Vec<RunLayer>> {
                part.iter().map(|path| RunLayer::active(&Image::open(Path::new(path), &reading)?)).collect()
            };
            let (under, over) = (layers(&images[..into])?, layers(&images[into + 1..])?);
            let lowest = Image::open(Path::new(&images[0]), &OpenOptions::read_only().unlocked())?;
            let backing: Option<Backing> = lowest.header().backing.clone();
            drop(lowest);
            let mut image = Image::open(Path::new(target), &OpenOptions::read_write())?;
            let mut reader = Unread;
            let below = backing.map(|backing| RunBacking { backing, reader: &mut reader });
            Ok(merge(under, &mut image, over, below, &Moving::quietly())?.bytes_moved)
        }
        ("materialise", [image, tag, new]) => {
            let image = Image::open(Path::new(image), &reading)?;
            Ok(materialise(&image, tag, Path::new(new), &Moving::quietly())?.bytes_moved)
        }
        _ => Err(usage()),
    }
}

fn main() -> ExitCode {
    let args: Vec<String> = std::env::args().skip(1).collect();
    match run(&args) {
        Ok(bytes) => {
            println!("{bytes} bytes moved");
            ExitCode::SUCCESS
        }
        Err(e) => {
            eprintln!("{e}");
            ExitCode::FAILURE
        }
    }
}
