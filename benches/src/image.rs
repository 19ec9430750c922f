//! Images made and judged by qemu-img and qemu-io.

use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Result, ensure};

use crate::child;

/// `qemu-img WORDS FILE`.
pub fn qemu_img(args: &[&str], file: &Path) -> Command {
    let mut command = child::command("qemu-img", args);
    command.arg(file);
    command
}

/// Makes an image of `bytes`, with these `-o` options.
pub fn create(file: &Path, bytes: u64, options: &str) -> Result<()> {
    let mut command = qemu_img(&["create", "-q", "-f", "qcow2", "-o", options], file);
    child::run(command.arg(bytes.to_string()))?;
    Ok(())
}

/// One run of bytes to be written.
#[derive(Debug, Clone, Copy)]
pub struct Extent {
    /// From where.
    pub offset: u64,
    /// How many.
    pub length: u64,
}

/// Writes `extents` to the image itself, each full of `pattern`; what is below it is not opened, so all must
/// be whole clusters. Durable.
pub fn write(file: &Path, extents: &[Extent], pattern: u8) -> Result<()> {
    let node = format!(
        r#"json:{{"driver":"qcow2","file":{{"driver":"file","filename":"{}"}},"backing":null}}"#,
        file.display()
    );
    for some in extents.chunks(256) {
        let mut command = Command::new("qemu-io");
        for extent in some {
            command.arg("-c").arg(format!("write -q -P {pattern} {} {}", extent.offset, extent.length));
        }
        child::run(command.arg("-c").arg("flush").arg(&node))?;
    }
    Ok(())
}

/// Fails if qemu-img finds anything wrong in an image, leaks too.
pub fn check(file: &Path) -> Result<()> {
    child::output(&mut qemu_img(&["check", "-q", "-f", "qcow2"], file))?;
    Ok(())
}

/// Fails if two images show different bytes.
pub fn compare(one: &Path, other: &Path) -> Result<()> {
    child::output(qemu_img(&["compare", "-q"], one).arg(other))?;
    Ok(())
}

/// The names of an image's internal snapshots, as qemu-img reads them.
pub fn snapshots(file: &Path) -> Result<Vec<String>> {
    let text = child::output(&mut qemu_img(&["snapshot", "-l"], file))?;
    // After two lines of headings: ID TAG SIZE DATE TIME ...
    Ok(text.lines().skip(2).filter_map(|line| line.split_whitespace().nth(1)).map(str::to_owned).collect())
}

/// Fails if the image has not exactly `count` internal snapshots, among them `with` and not `without`.
pub fn has_snapshots(file: &Path, count: usize, with: Option<&str>, without: Option<&str>) -> Result<()> {
    let names = snapshots(file)?;
    let has = |name: &str| names.iter().any(|other| other == name);
    ensure!(names.len() == count, "{} has {} snapshots, not {count}", file.display(), names.len());
    ensure!(with.is_none_or(has), "{} has no snapshot {with:?}", file.display());
    ensure!(!without.is_some_and(has), "{} still has snapshot {without:?}", file.display());
    Ok(())
}

/// The files of a backing chain, the top first.
pub fn chain(top: &Path) -> Result<Vec<PathBuf>> {
    let text = child::output(&mut qemu_img(&["info", "-U", "--backing-chain"], top))?;
    Ok(text.lines().filter_map(|line| line.strip_prefix("image: ")).map(PathBuf::from).collect())
}

/// Copies a file or a directory as it is: holes, hard links, and no shared blocks. Durable, so that what is
/// measured next does not wait for it.
pub fn copy(from: &Path, to: &Path) -> Result<()> {
    let options = ["-a", "--sparse=auto", "--reflink=never"];
    child::run(child::command("cp", &options).arg(from).arg(to))?;
    flush(to)
}

/// Waits until the file system that `place` is on has nothing left to write.
pub fn flush(place: &Path) -> Result<()> {
    child::run(child::command("sync", &["-f"]).arg(place))?;
    Ok(())
}
