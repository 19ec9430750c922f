//! Images that lie beside a disk and are none of its layers: overlays of others on its layers, gold images
//! under it, files that no process can read. Whatever domsnap does, they show what they showed; and every
//! point of the disk's own tree is what the model says.

use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};
use domsnap_tests::domain::{Domain, NAME, Shape};
use domsnap_tests::domsnap::{self, Outcome, status};
use domsnap_tests::model::Bytes;
use domsnap_tests::qemu::{self, Write};
use domsnap_tests::{report, verify};

fn line(kinds: &[&str]) -> Result<Domain> {
    let mut domain = Domain::new(&Shape::disks(1))?;
    for (index, kind) in kinds.iter().enumerate() {
        domain.create(&format!("s{}", index + 1), kind)?;
        domain.write_everywhere()?;
    }
    Ok(domain)
}

/// The file of a snapshot's only point.
fn layer_of(domain: &Domain, name: &str) -> Result<PathBuf> {
    let list = report::list(&domain.domsnap(), NAME)?;
    let snapshot =
        list.snapshots.iter().find(|snapshot| snapshot.name == name).context("no such snapshot")?;
    Ok(domain.disks().join(&snapshot.points[0].layer))
}

/// The other name of an active image: its layer's own.
fn own_name(image: &Path) -> Result<String> {
    use std::os::unix::fs::MetadataExt;
    let inode = std::fs::metadata(image)?.ino();
    for entry in std::fs::read_dir(image.parent().context("no directory")?)? {
        let entry = entry?;
        if entry.metadata()?.ino() == inode && entry.path() != image {
            return Ok(entry.file_name().to_string_lossy().into_owned());
        }
    }
    anyhow::bail!("{} has no other name", image.display())
}

/// Another domain's image on one of the disk's, with something of its own in it.
struct Overlay {
    path: PathBuf,
    /// What it shows.
    bytes: Bytes,
}

impl Overlay {
    /// Makes `path` depend on what the string `on` names, which shows `below`.
    fn new(path: &Path, on: &str, below: &Bytes) -> Result<Overlay> {
        let args = ["create", "-q", "-f", "qcow2", "-o", "cluster_size=4096", "-F", "qcow2", "-b", on];
        let args = args.iter().map(std::ffi::OsStr::new).chain([path.as_os_str()]);
        qemu::img(&args.collect::<Vec<_>>())?;
        qemu::write(path, &[Write { offset: 3 << 20, length: 8192, byte: Some(0xee) }])?;
        let mut bytes = below.to_vec();
        bytes[3 << 20..(3 << 20) + 8192].fill(0xee);
        Ok(Overlay { path: path.to_owned(), bytes: bytes.into() })
    }

    /// It still shows what it did.
    fn verify(&self) -> Result<()> {
        let shown = qemu::read(&self.path, None)?;
        let differs = shown.iter().zip(&*self.bytes).position(|(found, wanted)| found != wanted);
        ensure!(
            shown.len() == self.bytes.len() && differs.is_none(),
            "the overlay {} shows something else, from {differs:?} on",
            self.path.display()
        );
        Ok(())
    }
}

/// Does what a message advises: the command between the first quotes that begins with `program`.
fn obey(domain: &Domain, said: &str, program: &str) -> Result<()> {
    let (_, rest) =
        said.split_once(&format!("`{program} ")).with_context(|| format!("no {program} in {said}"))?;
    let (args, _) = rest.split_once('`').context("no end of the command")?;
    let args: Vec<&str> = args.split_whitespace().collect();
    let output = std::process::Command::new(program).args(&args).current_dir(domain.disks()).output()?;
    ensure!(output.status.success(), "{program} {args:?}: {}", String::from_utf8_lossy(&output.stderr));
    Ok(())
}

fn all_said(outcome: &Outcome) -> String {
    format!("{}{}", outcome.stdout, outcome.stderr)
}

mod overlays {
    use super::*;

    /// An overlay whose backing string is `string`, `LAYER` in it replaced by the layer's path: what `s1`
    /// holds is deleted, and the overlay keeps its layer as long as it is there.
    fn is_seen(string: &str) -> Result<()> {
        let mut domain = line(&["external", "external"])?;
        let layer = layer_of(&domain, "s1")?;
        let string = string.replace("LAYER", layer.to_str().context("no text")?);
        let below = domain.model.snapshots["s1"].disks["vda"].clone();
        let overlay = Overlay::new(&domain.disks().join("vm.qcow2"), &string, &below)?;
        let outcome = domain.domsnap().done(&["delete", NAME, "s1"])?;
        domain.model.delete(&["s1".into()]);
        ensure!(all_said(&outcome).contains("vm.qcow2"), "it is not said who needs the layer: {outcome}");
        overlay.verify()?;
        domain.verify_beside_others()?;
        domain.revert("s2")?;
        domain.write_everywhere()?;
        overlay.verify()?;
        domain.verify_beside_others()?;
        std::fs::remove_file(&overlay.path)?;
        domain.domsnap().done(&["recover", NAME])?;
        domain.verify()
    }

    #[test]
    fn one_with_a_plain_path_keeps_its_layer() -> Result<()> {
        is_seen("LAYER")
    }

    #[test]
    fn one_with_a_file_prefix_keeps_its_layer() -> Result<()> {
        is_seen("file:LAYER")
    }

    #[test]
    fn one_with_nested_options_keeps_its_layer() -> Result<()> {
        is_seen(r#"json:{"driver":"qcow2","file":{"driver":"file","filename":"LAYER"}}"#)
    }

    #[test]
    fn one_with_dotted_options_keeps_its_layer() -> Result<()> {
        is_seen(r#"json:{"driver":"qcow2","file.driver":"file","file.filename":"LAYER"}"#)
    }

    #[test]
    fn one_behind_a_symbolic_link_keeps_its_layer() -> Result<()> {
        let mut domain = line(&["external"])?;
        let (layer, elsewhere) = (layer_of(&domain, "s1")?, domain.root().join("elsewhere"));
        std::fs::create_dir(&elsewhere)?;
        let below = domain.model.snapshots["s1"].disks["vda"].clone();
        let on = format!("../disks/{}", layer.file_name().context("no name")?.to_string_lossy());
        let overlay = Overlay::new(&elsewhere.join("vm.qcow2"), &on, &below)?;
        std::os::unix::fs::symlink(&overlay.path, domain.disks().join("link.qcow2"))?;
        domain.delete(&["s1"])?;
        overlay.verify()?;
        domain.verify_beside_others()
    }

    /// One of a later version of the format keeps its layer.
    #[test]
    fn one_of_a_later_version_keeps_its_layer() -> Result<()> {
        let mut domain = line(&["external"])?;
        let layer = layer_of(&domain, "s1")?;
        let below = domain.model.snapshots["s1"].disks["vda"].clone();
        let path = domain.disks().join("vm.qcow2");
        let overlay = Overlay::new(&path, layer.to_str().context("no text")?, &below)?;
        let original = std::fs::read(&path)?;
        let mut newer = original.clone();
        newer[72] = 0x80; // an incompatible feature that is not known yet
        std::fs::write(&path, &newer)?;
        domain.delete(&["s1"])?;
        std::fs::write(&path, &original)?;
        overlay.verify()?;
        domain.verify_beside_others()
    }

    #[test]
    fn one_that_cannot_be_read_stops_what_could_harm_it() -> Result<()> {
        let root = std::process::Command::new("id").arg("-u").output().is_ok_and(|out| out.stdout == b"0\n");
        if !root {
            println!("SKIPPED: only root can change users");
            return Ok(());
        }
        let mut domain = line(&["external"])?;
        let layer = layer_of(&domain, "s1")?;
        let below = domain.model.snapshots["s1"].disks["vda"].clone();
        let overlay =
            Overlay::new(&domain.disks().join("vm.qcow2"), layer.to_str().context("no text")?, &below)?;
        let copy = domain.root().join("domsnap");
        std::fs::copy(domsnap::binary(), &copy)?;
        std::fs::set_permissions(domain.root(), std::fs::Permissions::from_mode(0o755))?;
        for place in [domain.state(), domain.disks(), copy.clone()] {
            qemu::run("chown", &["-R".as_ref(), "65534:65534".as_ref(), place.as_os_str()])?;
        }
        qemu::run("chown", &["0:0".as_ref(), overlay.path.as_os_str()])?;
        std::fs::set_permissions(&overlay.path, std::fs::Permissions::from_mode(0o600))?;
        let unprivileged = domain.domsnap().binary(&copy).through(&[
            "setpriv",
            "--reuid=65534",
            "--regid=65534",
            "--clear-groups",
        ]);
        for args in [["delete", NAME, "s1"], ["revert", NAME, "s1"]] {
            let outcome = unprivileged.run(&args)?.expect_status(status::REFUSED)?;
            ensure!(outcome.stderr.contains("vm.qcow2"), "it is not named: {outcome}");
            overlay.verify()?;
        }
        unprivileged.done(&["recover", NAME])?;
        std::fs::set_permissions(&overlay.path, std::fs::Permissions::from_mode(0o644))?;
        unprivileged.done(&["delete", NAME, "s1"])?;
        domain.model.delete(&["s1".into()]);
        overlay.verify()?;
        // Root does not believe a catalogue that is another user's.
        qemu::run("chown", &["-R".as_ref(), "0:0".as_ref(), domain.state().as_os_str()])?;
        domain.verify_beside_others()
    }

    /// One whose backing file cannot be determined stops merges and reverts alone.
    #[test]
    fn unknown_backing_stops_merges_and_reverts() -> Result<()> {
        for string in [
            "fat:/nowhere",
            r#"json:{"driver":"qcow2","file":"node0"}"#,
            r#"json:{"driver":"qcow2","file":{"driver":"file","filename":"somewhere/gold.qcow2"}}"#,
            "file:somewhere/gold.qcow2",
        ] {
            let mut domain = line(&["external"])?;
            let path = domain.disks().join("vm.qcow2");
            let args = ["create", "-q", "-f", "qcow2", "-u", "-F", "qcow2", "-b", string];
            let args = args.iter().map(std::ffi::OsStr::new).chain([path.as_os_str(), "4M".as_ref()]);
            qemu::img(&args.collect::<Vec<_>>())?;
            for args in [["delete", NAME, "s1"], ["revert", NAME, "s1"]] {
                let outcome = domain.declined(&args, status::REFUSED).context(string)?;
                ensure!(outcome.stderr.contains("vm.qcow2"), "it is not named: {outcome}");
            }
            domain.create("i1", "internal")?;
            domain.write_and_create("i2", "internal")?;
            domain.delete(&["i1"])?;
            domain.create("s2", "external")?;
            domain.domsnap().done(&["recover", NAME])?;
            domain.verify_beside_others()?;
            std::fs::remove_file(&path)?;
            domain.delete(&["s1"])?;
            domain.verify()?;
        }
        Ok(())
    }

    #[test]
    fn an_image_that_a_network_server_gives_stops_nothing() -> Result<()> {
        let mut domain = line(&["external"])?;
        let path = domain.disks().join("vm.qcow2");
        let args = ["create", "-q", "-f", "qcow2", "-u", "-F", "raw", "-b", "nbd://localhost/x"];
        let args = args.iter().map(std::ffi::OsStr::new).chain([path.as_os_str(), "4M".as_ref()]);
        qemu::img(&args.collect::<Vec<_>>())?;
        domain.revert("s1")?;
        domain.delete(&["s1"])?;
        std::fs::remove_file(&path)?;
        domain.verify()
    }
}

mod on_the_configured_path {
    use super::*;

    /// A revert is refused until the overlay depends on the layer.
    #[test]
    fn revert_waits_for_the_overlay() -> Result<()> {
        let mut domain = line(&["external", "external"])?;
        let below = domain.model.present["vda"].clone();
        let overlay = Overlay::new(&domain.disks().join("vm.qcow2"), "a.qcow2", &below)?;
        let outcome = domain.declined(&["revert", NAME, "s1"], status::REFUSED)?;
        ensure!(outcome.stderr.contains("vm.qcow2"), "it is not named: {outcome}");
        overlay.verify()?;
        obey(&domain, &outcome.stderr, "qemu-img")?;
        overlay.verify()?;
        domain.revert("s1")?;
        domain.write_everywhere()?;
        overlay.verify()?;
        domain.verify_beside_others()?;
        std::fs::remove_file(&overlay.path)?;
        domain.domsnap().done(&["recover", NAME])?;
        domain.verify()
    }

    /// An image of one file is first frozen and the create says how to go on.
    #[test]
    fn single_image_is_frozen_first() -> Result<()> {
        let mut domain = line(&["internal"])?;
        let below = domain.model.present["vda"].clone();
        let absolute = domain.path("vda").display().to_string();
        let overlay = Overlay::new(&domain.disks().join("vm.qcow2"), &absolute, &below)?;
        let outcome = domain.declined(&["revert", NAME, "s1"], status::REFUSED)?;
        ensure!(outcome.stderr.contains("external snapshot"), "no way out is named: {outcome}");
        let outcome = domain.domsnap().done(&domain.create_args("gold", "external"))?;
        domain.model.create("gold");
        obey(&domain, &all_said(&outcome), "qemu-img")?;
        domain.write_everywhere()?;
        overlay.verify()?;
        domain.revert("s1")?;
        domain.write_everywhere()?;
        overlay.verify()?;
        domain.verify_beside_others()
    }

    #[test]
    fn a_delete_leaves_what_the_overlay_shows() -> Result<()> {
        let mut domain = line(&["external", "external"])?;
        let below = domain.model.present["vda"].clone();
        let overlay = Overlay::new(&domain.disks().join("vm.qcow2"), "a.qcow2", &below)?;
        domain.delete(&["s2"])?;
        overlay.verify()?;
        domain.delete(&["s1"])?;
        overlay.verify()?;
        domain.verify_beside_others()
    }
}

mod files_of_others {
    use super::*;

    /// A disk on `gold.qcow2` and another on it in a directory of its own; the first is imported.
    fn on_gold() -> Result<(Domain, Overlay, Bytes)> {
        let mut domain = Domain::unregistered(&Shape::disks(1))?;
        domain.write_everywhere()?;
        let gold = domain.disks().join("gold.qcow2");
        std::fs::rename(domain.path("vda"), &gold)?;
        let args = ["create", "-q", "-f", "qcow2", "-b", "gold.qcow2", "-F", "qcow2"];
        let path = domain.path("vda");
        qemu::img(&args.iter().map(std::ffi::OsStr::new).chain([path.as_os_str()]).collect::<Vec<_>>())?;
        let below = domain.model.present["vda"].clone();
        let elsewhere = domain.root().join("elsewhere");
        std::fs::create_dir(&elsewhere)?;
        let other = Overlay::new(&elsewhere.join("vm.qcow2"), "../disks/gold.qcow2", &below)?;
        domain.model.create("gold");
        domain.write_everywhere()?;
        domain.domsnap().done(&["import", &domain.paths(), "--name", NAME])?;
        domain.verify_beside_others()?;
        Ok((domain, other, below))
    }

    /// A gold image that was imported is neither removed nor changed.
    #[test]
    fn imported_gold_image_is_unchanged() -> Result<()> {
        let (mut domain, other, below) = on_gold()?;
        let gold = domain.disks().join("gold.qcow2");
        let before = std::fs::read(&gold)?;
        domain.write_and_create("s1", "external")?;
        domain.write_everywhere()?;
        let outcome = domain.domsnap().done(&["delete", NAME, "gold"])?;
        domain.model.delete(&["gold".into()]);
        ensure!(all_said(&outcome).contains("gold.qcow2"), "it is not said that the file stays: {outcome}");
        ensure!(std::fs::read(&gold)? == before, "the gold image changed");
        verify::bytes(&gold, None, &below, &mut Default::default())?;
        other.verify()?;
        domain.verify_beside_others()?;
        domain.delete(&["s1"])?;
        other.verify()?;
        std::fs::remove_file(&gold)?;
        domain.verify()
    }

    #[test]
    fn bases_of_a_kept_file_are_kept() -> Result<()> {
        let mut domain = line(&["external"])?;
        let (path, mid) = (domain.path("vda"), domain.disks().join("mid.qcow2"));
        // A user puts an overlay of his own in the disk's place: what was active gets a name of his choice.
        let shown = domain.model.present["vda"].clone();
        std::fs::rename(&path, &mid)?;
        std::fs::remove_file(domain.disks().join(own_name(&mid)?))?;
        let args = ["create", "-q", "-f", "qcow2", "-b", "mid.qcow2", "-F", "qcow2"];
        qemu::img(&args.iter().map(std::ffi::OsStr::new).chain([path.as_os_str()]).collect::<Vec<_>>())?;
        domain.domsnap().done(&["import", NAME, "--replace"])?;
        let list = report::list(&domain.domsnap(), NAME)?;
        let names: Vec<_> = list.snapshots.iter().map(|snapshot| snapshot.name.as_str()).collect();
        ensure!(names == ["s1", "mid"], "{names:?}");
        domain.domsnap().done(&["delete", NAME, "s1", "mid"])?;
        for image in [&mid, &path] {
            verify::bytes(image, None, &shown, &mut Default::default())?;
        }
        domain.domsnap().done(&["check", NAME])?;
        domain.model.snapshots.clear();
        domain.model.current = None;
        domain.verify_beside_others()
    }
}

mod names {
    use super::*;

    /// Every operation on a disk whose file name is `prefix`, a letter, `suffix`.
    fn round(prefix: &str, suffix: &str) -> Result<()> {
        let mut domain = Domain::new(&Shape::disks(1).named(prefix, suffix))?;
        for (name, kind) in [("e1", "external"), ("i1", "internal"), ("e2", "external"), ("e3", "external")] {
            domain.write_and_create(name, kind)?;
        }
        domain.write_everywhere()?;
        domain.verify()?;
        for name in ["e2", "i1", "e1"] {
            domain.revert(name).context(name)?;
            domain.verify()?;
            domain.write_everywhere()?;
        }
        domain.write_and_create("side", "external")?;
        domain.delete(&["e2"])?;
        domain.verify()?;
        domain.delete(&["e1", "i1"])?;
        domain.verify()?;
        domain.delete(&["side", "e3"])?;
        domain.verify()
    }

    macro_rules! rounds {
        ($($test:ident $prefix:literal $suffix:literal)*) => {
            $(#[test] fn $test() -> Result<()> { round($prefix, $suffix) })*
        };
    }

    rounds! {
        with_a_colon "" ":b.qcow2"
        with_colons_that_look_like_options "json:{" "}.qcow2"
        with_a_protocol_of_qemu "nbd:" ".qcow2"
        with_spaces "my " " disk.qcow2"
        with_percent_and_comma "100%," ",file=x.qcow2"
        with_leading_digits "0123" ".qcow2"
        with_quotes_and_a_line_break "'\"\n" "$(x).qcow2"
    }

    /// Paths longer than an image has room for are written as seen from the disk.
    #[test]
    fn long_paths_are_written_relative() -> Result<()> {
        let mut domain = Domain::unregistered(&Shape::disks(1))?;
        // The catalogue's own path stays short.
        let deep = (0..6).fold(domain.root().to_owned(), |path, _| path.join("d".repeat(200)));
        let gold = deep.join("gold");
        std::fs::create_dir_all(&gold)?;
        std::fs::rename(domain.disks(), deep.join("own"))?;
        std::os::unix::fs::symlink(deep.join("own"), domain.disks())?;
        domain.write_everywhere()?;
        std::fs::rename(domain.path("vda"), gold.join("g.qcow2"))?;
        let mut create = std::process::Command::new("qemu-img");
        let args = ["create", "-q", "-f", "qcow2", "-F", "qcow2", "-b", "../gold/g.qcow2", "a.qcow2"];
        ensure!(create.current_dir(domain.disks()).args(args).status()?.success(), "qemu-img create");
        let before = std::fs::read(gold.join("g.qcow2"))?;
        let allow = gold.to_str().context("no text")?.to_owned();
        let run = |domain: &Domain, args: &[String]| {
            let args: Vec<String> = ["--allow-backing".to_owned(), allow.clone()]
                .into_iter()
                .chain(args.iter().cloned())
                .collect();
            domain.domsnap().done(&args)
        };
        run(&domain, &domain.register_args())?;
        for (size, name) in (1u64..).zip(["s1", "s2", "s3"]) {
            // More in each than in the one below: a merge goes up, and what receives it gets the long name.
            domain.fill(size << 20)?;
            run(&domain, &domain.create_args(name, "external"))?;
            domain.model.create(name);
        }
        domain.write_everywhere()?;
        for name in ["s1", "s3"] {
            run(&domain, &["delete".into(), NAME.into(), name.into()])?;
            domain.model.delete(&[name.into()]);
            let names = std::fs::read_dir(domain.disks())?.map(|entry| Ok(entry?.file_name()));
            let names = names.collect::<Result<Vec<_>>>()?;
            let layers = names.iter().filter(|name| name.to_string_lossy().contains(".ds-")).count();
            ensure!(layers == domain.model.snapshots.len() + 1, "{name} was not merged away: {names:?}");
            domain.verify_beside_others()?;
        }
        run(&domain, &["revert".into(), NAME.into(), "s2".into()])?;
        domain.model.revert("s2");
        domain.verify_beside_others()?;
        ensure!(std::fs::read(gold.join("g.qcow2"))? == before, "the gold image changed");
        Ok(())
    }
}

mod replaced {
    use super::*;

    #[test]
    fn under_an_old_catalogue_the_advice_loses_nothing() -> Result<()> {
        let mut domain = line(&["external"])?;
        let old = domain.root().join("old");
        domsnap_tests::domain::copy_tree(&domain.state(), &old)?;
        domain.create("s2", "external")?;
        domain.write_everywhere()?;
        std::fs::remove_dir_all(domain.state())?;
        std::fs::rename(&old, domain.state())?;
        let outcome = domain.declined(&["create", NAME, "s3", "--external"], status::REFUSED)?;
        ensure!(outcome.stderr.contains("import --replace"), "no way out is named: {outcome}");
        ensure!(
            !outcome.stderr.contains("'ln") && !outcome.stderr.contains("'mv"),
            "it loses data: {outcome}"
        );
        domain.domsnap().done(&["import", NAME, "--replace"])?;
        domain.verify()
    }

    /// By an overlay on the layer the advice loses nothing.
    #[test]
    fn advice_for_an_overlay_loses_nothing() -> Result<()> {
        let mut domain = line(&["external"])?;
        let path = domain.path("vda");
        let active = own_name(&path)?;
        std::fs::remove_file(&path)?;
        let args = ["create", "-q", "-f", "qcow2", "-F", "qcow2", "-b", &active];
        qemu::img(&args.iter().map(std::ffi::OsStr::new).chain([path.as_os_str()]).collect::<Vec<_>>())?;
        domain.write_everywhere()?;
        let outcome = domain.declined(&["create", NAME, "s3", "--external"], status::REFUSED)?;
        ensure!(outcome.stderr.contains("import --replace"), "no way out is named: {outcome}");
        ensure!(
            !outcome.stderr.contains("'ln") && !outcome.stderr.contains("'mv"),
            "it loses data: {outcome}"
        );
        verify::bytes(&path, None, &domain.model.present["vda"], &mut Default::default())
    }

    /// By another image the advice brings the layer back and keeps what was found.
    #[test]
    fn advice_for_another_image_restores_layer() -> Result<()> {
        let domain = line(&["external"])?;
        let (path, other) = (domain.path("vda"), domain.root().join("other"));
        qemu::img(&["create", "-q", "-f", "qcow2", other.to_str().context("no text")?, "4M"])?;
        let bytes = std::fs::read(&other)?;
        std::fs::rename(&other, &path)?;
        let outcome = domain.declined(&["create", NAME, "s2", "--external"], status::REFUSED)?;
        obey(&domain, &outcome.stderr, "mv")?;
        obey(&domain, &outcome.stderr, "ln")?;
        let found = domain.disks().join("a.qcow2.found");
        ensure!(std::fs::read(&found)? == bytes, "what was found is not kept");
        std::fs::remove_file(found)?;
        domain.verify()
    }
}

/// Overlays that lie in a subdirectory, or that other formats than qcow2 made, keep what they are backed by.
#[test]
fn overlays_below_and_of_other_formats_are_seen() -> Result<()> {
    let domain = line(&["external"])?;
    let layer = layer_of(&domain, "s1")?;
    let name = layer.file_name().context("no name")?.to_string_lossy().into_owned();
    let below = domain.disks().join("machines/web");
    std::fs::create_dir_all(&below)?;
    let make = |format: &str, file: &Path, on: &str| -> Result<()> {
        let args = ["create", "-q", "-f", format, "-F", "qcow2", "-b", on];
        qemu::img(&args.iter().map(std::ffi::OsStr::new).chain([file.as_os_str()]).collect::<Vec<_>>())
            .map(drop)
    };
    for seen in ["machines/web/a.qcow2", "b.qed", "c.vmdk"] {
        let file = domain.disks().join(seen);
        match seen {
            "b.qed" => make("qed", &file, &name)?,
            // QEMU makes a VMDK overlay on a VMDK alone; its descriptor may name anything.
            "c.vmdk" => std::fs::write(
                &file,
                format!("# Disk DescriptorFile\nversion=1\nparentFileNameHint=\"{name}\"\n"),
            )?,
            _ => make("qcow2", &file, &format!("../../{name}"))?,
        }
        let before = (seen != "c.vmdk").then(|| shown(&file)).transpose()?;
        let dry: &[&str] = if seen == "c.vmdk" { &[] } else { &["--dry-run"] };
        let said = domain.domsnap().done(&[&["delete", NAME, "s1"][..], dry].concat())?;
        ensure!(all_said(&said).contains(seen), "{seen} is not named: {said}");
        ensure!(layer.exists(), "the layer under {seen} is gone");
        if let Some(before) = before {
            ensure!(shown(&file)? == before, "{seen} shows something else");
        }
        std::fs::remove_file(&file)?;
    }
    // With the last of them the layer goes.
    domain.domsnap().done(&["recover"])?;
    ensure!(!layer.exists(), "the layer stays without a reason");
    Ok(())
}

/// What an image of whatever format shows.
fn shown(image: &Path) -> Result<Vec<u8>> {
    let raw = tempfile::NamedTempFile::new()?;
    let args = [std::ffi::OsStr::new("convert"), "-O".as_ref(), "raw".as_ref(), image.as_os_str()];
    qemu::img(&args.into_iter().chain([raw.path().as_os_str()]).collect::<Vec<_>>())?;
    Ok(std::fs::read(raw.path())?)
}

/// Domains of one catalogue in several directories, one of which is out of reach when another domain is
/// changed.
mod domains_out_of_reach {
    use super::*;

    /// A domain with the frozen layer of `s1`, and a directory for others.
    fn base() -> Result<(Domain, PathBuf, Bytes)> {
        let mut domain = line(&["external"])?;
        let below = domain.model.snapshots["s1"].disks["vda"].clone();
        let layer = layer_of(&domain, "s1")?;
        domain.write_everywhere()?;
        domain.create("s2", "internal")?;
        Ok((domain, layer, below))
    }

    fn directory(domain: &Domain, name: &str) -> Result<PathBuf> {
        let path = domain.root().join(name);
        std::fs::create_dir(&path)?;
        Ok(path)
    }

    fn add(domain: &Domain, name: &str, overlay: &Overlay) -> Result<()> {
        let disk = format!("vda={}", overlay.path.display());
        domain.domsnap().done(&["--allow-backing", "/", "domain", "add", name, "--disk", &disk])?;
        Ok(())
    }

    /// Deletes `s1` while `away` is not there; then all shows what it did.
    fn keeps_its_base(domain: &mut Domain, away: &Path, layer: &Path, overlay: &Overlay) -> Result<()> {
        let hidden = away.with_extension("away");
        std::fs::rename(away, &hidden)?;
        let deleted = domain.domsnap().run(&["delete", NAME, "s1"])?;
        std::fs::rename(&hidden, away)?;
        ensure!(layer.exists(), "the base of another domain was removed: {deleted}");
        overlay.verify()?;
        qemu::check(&overlay.path)
    }

    /// Its own directory is there, and that of an image in the middle of its chain is not.
    #[test]
    fn one_whose_middle_is_away_keeps_its_base() -> Result<()> {
        let (mut domain, layer, below) = base()?;
        let (middle, own) = (directory(&domain, "middle")?, directory(&domain, "own")?);
        let between = Overlay::new(&middle.join("m.qcow2"), &layer.to_string_lossy(), &below)?;
        let overlay = Overlay::new(&own.join("b.qcow2"), &between.path.to_string_lossy(), &between.bytes)?;
        add(&domain, "other", &overlay)?;
        keeps_its_base(&mut domain, &middle, &layer, &overlay)
    }

    /// It got this base from another tool after it was registered, and an operation of its own, or of the
    /// other domain, has seen it.
    #[test]
    fn one_that_was_rebased_since_keeps_its_base() -> Result<()> {
        for seen_by in [&["create", "other", "x", "--internal"][..], &["delete", NAME, "s2"]] {
            let (mut domain, layer, below) = base()?;
            let own = directory(&domain, "own")?;
            let path = own.join("b.qcow2");
            let size = below.len().to_string();
            let args = ["create", "-q", "-f", "qcow2", "-o", "cluster_size=4096"].map(std::ffi::OsStr::new);
            qemu::img(&[&args[..], &[path.as_os_str(), size.as_ref()]].concat())?;
            let mut overlay = Overlay { path, bytes: vec![0; below.len()].into() };
            add(&domain, "other", &overlay)?;
            let args = ["rebase", "-u", "-F", "qcow2", "-b"].map(std::ffi::OsStr::new);
            qemu::img(&[&args[..], &[layer.as_os_str(), overlay.path.as_os_str()]].concat())?;
            overlay.bytes = below;
            overlay.verify()?;
            domain.domsnap().done(&[&["--allow-backing", "/"][..], seen_by].concat())?;
            keeps_its_base(&mut domain, &own, &layer, &overlay)?;
        }
        Ok(())
    }
}
