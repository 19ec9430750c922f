//! A QEMU that has its images open and cannot open them, or new ones, again: what needs that is refused
//! before anything is touched, and the rest works.

use std::fs;
use std::os::unix::fs::{PermissionsExt, chown};

use anyhow::{Context, Result, ensure};
use domsnap_tests::domsnap::{Domsnap, status};
use domsnap_tests::idle::{Boot, Idle, has_pattern};
use domsnap_tests::mounted::may_mount;
use domsnap_tests::qemu;
use testguest::Version;

/// The user without rights.
const UNPRIVILEGED: u32 = 65534;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum How {
    /// Runs as another user, who may only read the image.
    User,
    /// Runs as another user, who owns the image.
    Owner,
    /// Runs as another user, who may write the image, and cannot get into its directory.
    Directory,
    /// Lives in an empty root directory.
    Root,
    /// Lives in a mount namespace that has the image, and nothing else of its directory.
    OneFile,
    /// May do no more than QEMU's own sandbox permits, which is enough.
    Sandbox,
}

struct Words<'a> {
    domsnap: &'a Domsnap,
    qemu: &'a Idle,
}

impl Words<'_> {
    fn run(&self, args: &[&str], wanted: i32) -> Result<()> {
        let outcome = self.domsnap.run(args)?.expect_status(wanted)?;
        ensure!(
            wanted != status::REFUSED || outcome.stderr.contains("no changes made"),
            "what is the state now? {outcome}"
        );
        let state = self.qemu.state()?;
        ensure!(state == "running", "the guest is {state:?} after {outcome}");
        Ok(())
    }
}

fn try_one(how: How) -> Result<()> {
    let dir = tempfile::Builder::new().prefix("domsnap-confined-").tempdir()?;
    fs::set_permissions(dir.path(), fs::Permissions::from_mode(0o755))?;
    let images = dir.path().join("images");
    let jail = dir.path().join("jail");
    fs::create_dir(&images)?;
    fs::create_dir(&jail)?;
    let disk = images.join("d.qcow2");
    qemu::img(&["create", "-q", "-f", "qcow2", &disk.display().to_string(), "1M"])?;
    Boot::Idle.write(&disk)?;
    // A chain that was made while the domain was off.
    let domsnap = Domsnap::new(&dir.path().join("state"));
    let socket = dir.path().join("m.qmp");
    let named = format!("vda={}", disk.display());
    let socket_text = socket.display().to_string();
    domsnap.done(&["domain", "add", "m", "--qmp", &socket_text, "--disk", &named])?;
    domsnap.done(&["create", "m", "below", "--external"])?;
    for entry in fs::read_dir(&images)? {
        let path = entry?.path();
        if path.is_file() {
            match how {
                How::Owner | How::Directory => chown(&path, Some(UNPRIVILEGED), Some(UNPRIVILEGED))?,
                How::User | How::Root | How::OneFile | How::Sandbox => {}
            }
        }
    }
    match how {
        How::Owner => chown(&images, Some(UNPRIVILEGED), Some(UNPRIVILEGED))?,
        How::Directory => fs::set_permissions(&images, fs::Permissions::from_mode(0o700))?,
        How::User | How::Root | How::OneFile | How::Sandbox => {}
    }
    let mut args = vec![
        "-blockdev".to_owned(),
        format!("driver=qcow2,file.driver=file,file.filename={},node-name=d0", disk.display()),
        "-device".to_owned(),
        "virtio-blk-pci,drive=d0,id=vda,bootindex=1".to_owned(),
    ];
    let mut through: Vec<String> = Vec::new();
    match how {
        How::User | How::Owner | How::Directory => {
            args.extend(["-run-with".to_owned(), "user=nobody".to_owned()]);
        }
        How::Sandbox => {
            let all = "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny";
            args.extend(["-sandbox".to_owned(), all.to_owned()]);
        }
        How::Root => args.extend(["-run-with".to_owned(), format!("chroot={}", jail.display())]),
        How::OneFile => {
            let (images, jail) = (images.display(), jail.display());
            let script = format!(
                "mount --make-rprivate / && mount --bind {images} {jail} && mount -t tmpfs t {images} && \
                 for f in {jail}/*.qcow2; do touch {images}/${{f##*/}} && mount --bind $f {images}/${{f##*/}}; done && \
                 exec \"$@\""
            );
            through = ["unshare", "-m", "sh", "-c", &script, "sh"].map(str::to_owned).into();
        }
    }
    let args: Vec<&str> = args.iter().map(String::as_str).collect();
    let through: Vec<&str> = through.iter().map(String::as_str).collect();
    let qemu = Idle::start_through(&through, Version::New, dir.path(), "m", &args)?;
    let tried = Words { domsnap: &domsnap, qemu: &qemu };
    let whole = matches!(how, How::Owner | How::Sandbox);
    let if_whole = if whole { status::DONE } else { status::REFUSED };
    // Of one file, a tag is applied in place.
    let in_place = if whole || how == How::OneFile { status::DONE } else { status::REFUSED };

    qemu.write("vda", 1)?;
    tried.run(&["create", "m", "inside"], status::DONE)?;
    tried.run(&["create", "m", "disks", "--disk-only"], status::DONE)?;
    qemu.write("vda", 2)?;
    tried.run(&["revert", "m", "inside"], in_place)?;
    qemu.flush("vda")?;
    ensure!(has_pattern(&disk, if in_place == status::DONE { 1 } else { 2 })?, "the disk has something else");
    tried.run(&["revert", "m", "below", "--running"], if_whole)?;
    tried.run(&["create", "m", "out", "--external"], if_whole)?;
    tried.run(&["create", "m", "out2", "--external", "--disk-only"], if_whole)?;
    tried.run(&["delete", "m", "inside"], status::DONE)?;
    tried.run(&["delete", "m", "disks"], status::DONE)?;
    tried.run(&["recover", "m"], status::DONE)?;
    let left: Vec<_> = fs::read_dir(&images)?.flatten().map(|entry| entry.file_name()).collect();
    let probe = left.iter().find(|name| name.to_string_lossy().contains("probe"));
    ensure!(probe.is_none(), "{probe:?} is left");
    qemu.quit()?;
    domsnap.done(&["recover", "m"])?;
    domsnap.done(&["revert", "m", "below"])?;
    qemu::check(&disk)
}

#[test]
fn a_qemu_that_cannot_open_loses_nothing() -> Result<()> {
    if !may_mount("tmpfs") {
        return Ok(());
    }
    for how in [How::User, How::Owner, How::Directory, How::Root, How::OneFile, How::Sandbox] {
        try_one(how).with_context(|| format!("{how:?}"))?;
    }
    Ok(())
}
