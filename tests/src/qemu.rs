//! The judge: `qemu-img` and `qemu-io`.

use std::ffi::OsStr;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::process::{Command, Stdio};

use anyhow::{Context, Result, bail};

/// How long any of these programs may take, in seconds: an image that lies can send `qemu-img` round for hours.
const LIMIT: &str = "60";

/// Runs `program` with `words`, which must succeed; gives its standard output.
///
/// # Errors
/// The command with both its outputs, if it fails, or is at work for more than a minute.
pub fn run<S: AsRef<OsStr>>(program: &str, words: &[S]) -> Result<String> {
    let mut command = Command::new("timeout");
    command.args([LIMIT, program]).args(words).env("LC_ALL", "C").stdin(Stdio::null());
    let output = command.output().with_context(|| format!("start {program}: is qemu-utils installed?"))?;
    let (out, err) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    if !output.status.success() {
        bail!("{command:?} failed with {}\n{out}{err}", output.status);
    }
    Ok(out.into_owned())
}

/// `qemu-img WORDS`.
///
/// # Errors
/// As [`run`].
pub fn img<S: AsRef<OsStr>>(words: &[S]) -> Result<String> {
    run("qemu-img", words)
}

/// The bytes of `image` (through its whole chain), or of the internal snapshot `tag` in it. Locks are not asked for.
///
/// # Errors
/// If QEMU cannot read it.
pub fn read(image: &Path, tag: Option<&str>) -> Result<Vec<u8>> {
    let dir = tempfile::tempdir()?;
    let raw = dir.path().join("raw");
    let mut words: Vec<std::ffi::OsString> =
        ["convert", "-U", "-f", "qcow2", "-O", "raw"].map(Into::into).into();
    if let Some(tag) = tag {
        words.extend(["-l".into(), format!("snapshot.name={tag}").into()]);
    }
    words.extend([image.into(), raw.as_os_str().to_owned()]);
    img(&words)?;
    let file = std::fs::File::open(&raw)?;
    let mut bytes = vec![0; file.metadata()?.len() as usize];
    file.read_exact_at(&mut bytes, 0)?;
    Ok(bytes)
}

/// `qemu-img check` of `image` finds nothing at all: no errors, no leaks.
///
/// # Errors
/// What it finds.
pub fn check(image: &Path) -> Result<()> {
    check_within(image, LIMIT)
}

/// As [`check`], within `limit` seconds.
///
/// # Errors
/// What it finds, or that it takes longer.
pub fn check_within(image: &Path, limit: &str) -> Result<()> {
    let output = Command::new("timeout")
        .args([limit, "qemu-img", "check", "-U", "-f", "qcow2"])
        .arg(image)
        .env("LC_ALL", "C")
        .output()
        .context("start qemu-img")?;
    if !output.status.success() {
        let (out, err) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
        bail!("qemu-img check {}: {}\n{out}{err}", image.display(), output.status);
    }
    Ok(())
}

/// A write of `length` bytes of `byte` at `offset`; `None` writes zeros as zero clusters, where they can be.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Write {
    /// Where, in bytes.
    pub offset: u64,
    /// How many bytes.
    pub length: u64,
    /// What; `None` is a zero write.
    pub byte: Option<u8>,
}

/// Does `writes` on `image` with one `qemu-io`.
///
/// # Errors
/// As [`run`]; also if `qemu-io` says that one of them failed, which its exit status does not always.
pub fn write(image: &Path, writes: &[Write]) -> Result<()> {
    let mut words: Vec<std::ffi::OsString> = vec!["-f".into(), "qcow2".into()];
    for Write { offset, length, byte } in writes {
        let command = match byte {
            Some(byte) => format!("write -P {byte} {offset} {length}"),
            None => format!("write -z {offset} {length}"),
        };
        words.extend(["-c".into(), command.into()]);
    }
    words.push(image.into());
    let out = run("qemu-io", &words)?;
    let wrote = out.lines().filter(|line| line.starts_with("wrote ")).count();
    if wrote != writes.len() {
        bail!("qemu-io did {wrote} of {} writes:\n{out}", writes.len());
    }
    Ok(())
}
