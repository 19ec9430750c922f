//! The judge: `qemu-img` and `qemu-io`.

use std::collections::HashMap;
use std::ffi::OsStr;
use std::io::{BufRead, BufReader, Write as _};
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::process::{Child, ChildStdin, Command, Stdio};

use anyhow::{Context, Result, bail};

/// Runs `program` with `args`, which must succeed; gives its standard output.
///
/// # Errors
/// The command with both its outputs, if it fails.
pub fn run<S: AsRef<OsStr>>(program: &str, args: &[S]) -> Result<String> {
    let mut command = Command::new(program);
    command.args(args).env("LC_ALL", "C").stdin(Stdio::null());
    let output = command.output().with_context(|| format!("start {program}: is qemu-utils installed?"))?;
    let (out, err) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    if !output.status.success() {
        bail!("{command:?} failed with {}\n{out}{err}", output.status);
    }
    Ok(out.into_owned())
}

/// The format of an image, as the tests name their files: `raw` by its extension, otherwise `qcow2`.
pub fn format(image: &Path) -> &'static str {
    match image.extension().and_then(OsStr::to_str) {
        Some("raw" | "fd" | "permall") => "raw",
        _ => "qcow2",
    }
}

/// `qemu-img WORDS`.
///
/// # Errors
/// As [`run`].
pub fn img<S: AsRef<OsStr>>(args: &[S]) -> Result<String> {
    run("qemu-img", args)
}

/// The bytes of `image` (through its whole chain), or of the internal snapshot `tag` in it. Locks are not
/// asked for.
///
/// # Errors
/// If QEMU cannot read it.
pub fn read(image: &Path, tag: Option<&str>) -> Result<Vec<u8>> {
    let dir = tempfile::tempdir()?;
    let raw = dir.path().join("raw");
    let mut args: Vec<std::ffi::OsString> =
        ["convert", "-U", "-f", format(image), "-O", "raw"].map(Into::into).into();
    if let Some(tag) = tag {
        args.extend(["-l".into(), format!("snapshot.name={tag}").into()]);
    }
    args.extend([image.into(), raw.as_os_str().to_owned()]);
    img(&args)?;
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
    check_by(&mut Command::new("qemu-img"), image)
}

/// As [`check`], within `limit` seconds: an image that lies can send `qemu-img` round for hours.
///
/// # Errors
/// What it finds, or that it takes longer.
pub fn check_within(image: &Path, limit: &str) -> Result<()> {
    check_by(Command::new("timeout").args([limit, "qemu-img"]), image)
}

fn check_by(qemu_img: &mut Command, image: &Path) -> Result<()> {
    if format(image) == "raw" {
        return Ok(()); // has no structure that could be wrong
    }
    let output = qemu_img
        .args(["check", "-U", "-f", "qcow2"])
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

/// As [`check`], but after a crash: what it finds is at worst what a check mends without touching data. Says
/// whether it found any. That is
///
/// - leaked clusters;
/// - a COPIED bit that is clear though it might be set;
/// - a COPIED bit over a cluster whose count is too high only because it is leaked: one reference is left, so
///   that nothing in the snapshot table needs what a write in place would change.
///
/// # Errors
/// Anything worse: a count too low, a COPIED bit over a cluster that is truly shared, a reference to nowhere.
pub fn check_after_crash(image: &Path) -> Result<bool> {
    let Err(error) = check(image) else { return Ok(false) };
    let mut cluster_bits = [0; 4];
    std::fs::File::open(image)?.read_exact_at(&mut cluster_bits, 20)?;
    let cluster_bits = u32::from_be_bytes(cluster_bits);
    let args = format!("{error:#}");
    let findings: Vec<&str> =
        args.lines().filter(|line| line.starts_with("ERROR") || line.starts_with("Leaked")).collect();
    let left_of: HashMap<u64, u64> = findings
        .iter()
        .filter(|line| line.starts_with("Leaked"))
        .filter_map(|line| Some((number(line, "Leaked cluster ", 10)?, number(line, "reference=", 10)?)))
        .collect();
    let harmless = |line: &str| -> bool {
        if line.starts_with("Leaked") {
            return number(line, "refcount=", 10) > number(line, "reference=", 10);
        }
        let (Some(count), Some(entry)) = (number(line, "refcount=", 10), number(line, "_entry=", 16)) else {
            return false;
        };
        let copied = entry >> 63 == 1;
        let cluster = (entry & 0x00ff_ffff_ffff_fe00) >> cluster_bits;
        line.starts_with("ERROR OFLAG_COPIED ")
            && if copied { left_of.get(&cluster) == Some(&1) } else { count == 1 }
    };
    if findings.is_empty() || !findings.iter().all(|line| harmless(line)) {
        return Err(error);
    }
    Ok(true)
}

/// The number behind `after` in a line of `qemu-img check`.
fn number(line: &str, after: &str, radix: u32) -> Option<u64> {
    let text = line.split_once(after)?.1.split(' ').next()?;
    u64::from_str_radix(text, radix).ok()
}

/// `qemu-img check -r all`.
///
/// # Errors
/// If something is left.
pub fn mend(image: &Path) -> Result<()> {
    img(&[
        "check".as_ref(),
        "-q".as_ref(),
        "-f".as_ref(),
        "qcow2".as_ref(),
        "-r".as_ref(),
        "all".as_ref(),
        image.as_os_str(),
    ])?;
    check(image)
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
    let mut args: Vec<std::ffi::OsString> = vec!["-f".into(), format(image).into()];
    for Write { offset, length, byte } in writes {
        let command = match byte {
            Some(byte) => format!("write -P {byte} {offset} {length}"),
            None => format!("write -z {offset} {length}"),
        };
        args.extend(["-c".into(), command.into()]);
    }
    args.push(image.into());
    let out = run("qemu-io", &args)?;
    let wrote = out.lines().filter(|line| line.starts_with("wrote ")).count();
    if wrote != writes.len() {
        bail!("qemu-io did {wrote} of {} writes:\n{out}", writes.len());
    }
    Ok(())
}

/// A `qemu-io` that has an image open for writing, and therefore locked, until it is stopped.
#[derive(Debug)]
pub struct Running {
    child: Child,
    input: ChildStdin,
}

impl Running {
    /// Opens `image`.
    ///
    /// # Errors
    /// If it cannot be opened.
    pub fn on(image: &Path) -> Result<Running> {
        let mut command = Command::new("qemu-io");
        command.args(["-f", format(image)]).arg(image);
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::null());
        let mut child = command.spawn().context("start qemu-io")?;
        let (mut input, output) =
            (child.stdin.take().context("stdin")?, child.stdout.take().context("stdout")?);
        writeln!(input, "length")?;
        // Its answer says that the image is open.
        let mut answer = String::new();
        BufReader::new(output).read_line(&mut answer)?;
        anyhow::ensure!(!answer.is_empty(), "qemu-io cannot open {}", image.display());
        Ok(Running { child, input })
    }

    /// Lets go.
    ///
    /// # Errors
    /// If it does not end well.
    pub fn stop(self) -> Result<()> {
        let Running { mut child, input } = self;
        drop(input);
        let status = child.wait()?;
        anyhow::ensure!(status.success(), "qemu-io ended with {status}");
        Ok(())
    }
}
