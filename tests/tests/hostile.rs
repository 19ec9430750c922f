//! Images that lie. Whatever a header, a table or a snapshot table says: a clear error, no panic, no death,
//! little memory, an end within seconds, and not a byte of the image changed.

use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail, ensure};
use domsnap_tests::domain::{images, same_images};
use domsnap_tests::domsnap::{Domsnap, Outcome, status};
use domsnap_tests::qemu::{self, Write};

/// Address space a run may take; a lie must not make it ask for more.
const MEMORY: &str = "--as=1073741824";

struct Image {
    dir: tempfile::TempDir,
    path: PathBuf,
}

impl Image {
    /// A good image with data, two internal snapshots and more data.
    fn good() -> Result<Image> {
        let dir = tempfile::tempdir()?;
        std::fs::create_dir(dir.path().join("disks"))?;
        std::fs::create_dir(dir.path().join("state"))?;
        let path = dir.path().join("disks/a.qcow2");
        let create = ["create", "-q", "-f", "qcow2", "-o", "cluster_size=4096"].map(std::ffi::OsStr::new);
        qemu::img(&[&create[..], &[path.as_os_str(), "4M".as_ref()]].concat())?;
        for (byte, name) in [(1, "one"), (2, "two")] {
            qemu::write(&path, &[Write { offset: 0, length: 65_536, byte: Some(byte) }])?;
            qemu::img(&["snapshot".as_ref(), "-c".as_ref(), name.as_ref(), path.as_os_str()])?;
        }
        qemu::write(&path, &[Write { offset: 4096, length: 4096, byte: Some(3) }])?;
        Ok(Image { dir, path })
    }

    fn u64_at(&self, offset: u64) -> Result<u64> {
        let mut bytes = [0; 8];
        std::fs::File::open(&self.path)?.read_exact_at(&mut bytes, offset)?;
        Ok(u64::from_be_bytes(bytes))
    }

    fn put(&self, offset: u64, bytes: &[u8]) -> Result<()> {
        Ok(std::fs::OpenOptions::new().write(true).open(&self.path)?.write_all_at(bytes, offset)?)
    }

    fn put_u64(&self, offset: u64, value: u64) -> Result<()> {
        self.put(offset, &value.to_be_bytes())
    }

    fn put_u32(&self, offset: u64, value: u32) -> Result<()> {
        self.put(offset, &value.to_be_bytes())
    }

    fn domsnap(&self) -> Domsnap {
        Domsnap::new(&self.dir.path().join("state"))
            .through(&["timeout", "-s", "KILL", "30", "prlimit", MEMORY])
    }

    fn disks(&self) -> PathBuf {
        self.dir.path().join("disks")
    }
}

/// Every command that reads or changes an image.
fn commands(image: &Path) -> Vec<Vec<String>> {
    let path = image.display().to_string();
    let all: [&[&str]; 10] = [
        &["disk", "list", &path],
        &["du", &path],
        &["check", &path],
        &["list", &path],
        &["disk", "revert", &path, "one"],
        &["disk", "delete", &path, "one"],
        &["disk", "create", &path, "x", "--internal"],
        &["disk", "create", &path, "y", "--external"],
        &["create", &path, "z", "--internal"],
        &["create", &path, "w", "--external"],
    ];
    all.iter().map(|args| args.iter().map(|word| (*word).to_owned()).collect()).collect()
}

fn well_behaved(outcome: &Outcome) -> Result<()> {
    ensure!(!outcome.panicked(), "it panicked: {outcome}");
    match outcome.status {
        Some(status::DONE) => Ok(()),
        Some(status::FAILED | status::REFUSED) => {
            ensure!(!outcome.stderr.trim().is_empty(), "no args: {outcome}");
            Ok(())
        }
        _ => bail!("it died, hung, or ended with a status that means nothing here: {outcome}"),
    }
}

/// Tells the lie `lie`; then every command behaves, and what changes the image either refuses, changing
/// nothing, or leaves an image in which QEMU sees nothing worse than before.
fn lie(lie: impl Fn(&Image) -> Result<()>) -> Result<Vec<Outcome>> {
    let image = Image::good()?;
    lie(&image)?;
    let reported = images(&image.disks())?;
    let mut as_reported = reported.clone();
    let bad = qemu::check_within(&image.path, "2").is_err();
    let mut outcomes = Vec::new();
    for args in commands(&image.path) {
        let outcome = image.domsnap().run(&args)?;
        well_behaved(&outcome)?;
        if outcome.status != Some(status::DONE) {
            same_images(&image.disks(), &as_reported).with_context(|| outcome.to_string())?;
        } else {
            if !bad {
                qemu::check(&image.path)?;
            }
            // Each command meets the same lie.
            std::fs::remove_dir_all(image.disks())?;
            std::fs::create_dir(image.disks())?;
            for (path, (_, bytes)) in &reported {
                std::fs::write(image.disks().join(path), bytes)?;
            }
            std::fs::remove_dir_all(image.dir.path().join("state"))?;
            std::fs::create_dir(image.dir.path().join("state"))?;
            as_reported = images(&image.disks())?;
        }
        outcomes.push(outcome);
    }
    Ok(outcomes)
}

/// A lie that no command may believe.
fn is_not_believed(change: impl Fn(&Image) -> Result<()>) -> Result<()> {
    for outcome in lie(change)? {
        // `check` may also report it as a finding, with a status of its own kind; it is never "done".
        ensure!(outcome.status != Some(status::DONE), "it was believed: {outcome}");
    }
    Ok(())
}

// Offsets in the header, by the qcow2 specification.
const VERSION: u64 = 4;
const BACKING_OFFSET: u64 = 8;
const BACKING_SIZE: u64 = 16;
const CLUSTER_BITS: u64 = 20;
const SIZE: u64 = 24;
const CRYPT: u64 = 32;
const L1_SIZE: u64 = 36;
const L1_OFFSET: u64 = 40;
const REFCOUNT_OFFSET: u64 = 48;
const REFCOUNT_CLUSTERS: u64 = 56;
const SNAPSHOTS: u64 = 60;
const SNAPSHOTS_OFFSET: u64 = 64;
const INCOMPATIBLE: u64 = 72;
const REFCOUNT_ORDER: u64 = 96;
const HEADER_LENGTH: u64 = 100;

macro_rules! not_believed {
    ($($name:ident $change:expr;)*) => {$(
        #[test]
        fn $name() -> Result<()> {
            is_not_believed($change)
        }
    )*};
}

mod header {
    use super::*;

    /// Neither a list nor an overlay on top needs these tables; whatever does, does not believe in them.
    fn unread(change: impl Fn(&Image) -> Result<()>) -> Result<()> {
        for outcome in lie(change)? {
            let says_so = outcome.command.contains(" du ") && outcome.stdout.contains("unknown");
            let reads_none = outcome.command.contains(" list ") || outcome.command.contains("--external");
            let reads_none = reads_none || says_so;
            ensure!(reads_none || outcome.status != Some(status::DONE), "it was believed: {outcome}");
        }
        Ok(())
    }

    #[test]
    fn an_l1_table_past_the_end() -> Result<()> {
        unread(|image| image.put_u64(L1_OFFSET, 1 << 40))
    }

    #[test]
    fn a_refcount_table_past_the_end() -> Result<()> {
        unread(|image| image.put_u64(REFCOUNT_OFFSET, 1 << 40))
    }

    not_believed! {
        an_unknown_version |i| i.put_u32(VERSION, 4);
        clusters_of_1_byte |i| i.put_u32(CLUSTER_BITS, 0);
        clusters_of_2_to_the_63 |i| i.put_u32(CLUSTER_BITS, 63);
        clusters_beyond_any_shift |i| i.put_u32(CLUSTER_BITS, u32::MAX);
        a_size_of_2_to_the_63 |i| i.put_u64(SIZE, 1 << 63);
        a_size_beyond_its_l1_table |i| i.put_u64(SIZE, 1 << 50);
        an_unknown_encryption |i| i.put_u32(CRYPT, 7);
        an_l1_table_of_2_to_the_32_entries |i| i.put_u32(L1_SIZE, u32::MAX);
        an_l1_table_off_its_cluster |i| i.put_u64(L1_OFFSET, 12_345);
        an_l1_table_at_the_end_of_all_numbers |i| i.put_u64(L1_OFFSET, !4095);
        a_refcount_table_off_its_cluster |i| i.put_u64(REFCOUNT_OFFSET, 77);
        a_refcount_table_of_2_to_the_32_clusters |i| i.put_u32(REFCOUNT_CLUSTERS, u32::MAX);
        no_refcount_table |i| i.put_u32(REFCOUNT_CLUSTERS, 0);
        refcounts_of_2_to_the_255_bits |i| i.put_u32(REFCOUNT_ORDER, 255);
        an_unknown_incompatible_feature |i| i.put_u64(INCOMPATIBLE, 1 << 40);
        a_header_of_2_to_the_32_bytes |i| i.put_u32(HEADER_LENGTH, u32::MAX);
        a_header_of_3_bytes |i| i.put_u32(HEADER_LENGTH, 3);
        a_backing_name_of_2_to_the_32_bytes |i| { i.put_u64(BACKING_OFFSET, 200)?; i.put_u32(BACKING_SIZE, u32::MAX) };
        a_backing_name_past_the_end |i| { i.put_u64(BACKING_OFFSET, 1 << 62)?; i.put_u32(BACKING_SIZE, 10) };
        no_magic |i| i.put(0, b"QFI\0");
        a_file_of_no_bytes |i| Ok(std::fs::OpenOptions::new().write(true).open(&i.path)?.set_len(0)?);
        a_file_cut_in_the_header |i| Ok(std::fs::OpenOptions::new().write(true).open(&i.path)?.set_len(50)?);
    }
}

mod snapshot_table {
    use super::*;

    /// Offset of the snapshot table's first entry.
    fn first(image: &Image) -> Result<u64> {
        image.u64_at(SNAPSHOTS_OFFSET)
    }

    not_believed! {
        of_2_to_the_32_entries |i| i.put_u32(SNAPSHOTS, u32::MAX);
        of_65537_entries |i| i.put_u32(SNAPSHOTS, 65_537);
        past_the_end |i| i.put_u64(SNAPSHOTS_OFFSET, 1 << 45);
        off_its_cluster |i| i.put_u64(SNAPSHOTS_OFFSET, 4097);
        whose_entries_go_past_the_end |i| i.put_u32(SNAPSHOTS, 60_000);
        whose_extra_data_are_2_to_the_32_bytes |i| i.put_u32(first(i)? + 36, u32::MAX);
    }

    /// The table can be listed; the snapshot can be neither returned to nor deleted.
    fn not_used(change: impl Fn(&Image) -> Result<()>) -> Result<()> {
        for outcome in lie(change)? {
            let uses = outcome.command.contains("disk revert") || outcome.command.contains("disk delete");
            ensure!(!uses || outcome.status != Some(status::DONE), "it was believed: {outcome}");
        }
        Ok(())
    }

    #[test]
    fn whose_l1_table_is_past_the_end() -> Result<()> {
        not_used(|image| image.put_u64(first(image)?, 1 << 45))
    }

    #[test]
    fn whose_l1_table_is_off_its_cluster() -> Result<()> {
        not_used(|image| image.put_u64(first(image)?, 4097))
    }

    #[test]
    fn whose_l1_table_has_2_to_the_32_entries() -> Result<()> {
        not_used(|image| image.put_u32(first(image)? + 8, u32::MAX))
    }

    /// Of two entries of one name is reported and nothing is done by that name.
    #[test]
    fn with_two_entries_of_one_name_is_reported() -> Result<()> {
        let outcomes = lie(|image| {
            let bytes = std::fs::read(&image.path)?;
            let start = first(image)? as usize;
            let at = bytes[start..].windows(3).position(|w| w == b"two").map(|at| at + start);
            let Some(at) = at else { bail!("no entry `two`") };
            image.put(at as u64, b"one")
        })?;
        let refused = |outcome: &&Outcome| {
            outcome.command.contains("disk revert") || outcome.command.contains("disk delete")
        };
        for outcome in outcomes.iter().filter(refused) {
            ensure!(outcome.status == Some(status::REFUSED), "which of the two? {outcome}");
        }
        Ok(())
    }
}

mod tables {
    use super::*;

    fn l1(image: &Image) -> Result<u64> {
        image.u64_at(L1_OFFSET)
    }

    fn l2(image: &Image) -> Result<u64> {
        Ok(image.u64_at(l1(image)?)? & 0x00ff_ffff_ffff_fe00)
    }

    /// What reads no table may work; what does must not die, hang, or make it worse.
    macro_rules! survived {
        ($($name:ident $change:expr;)*) => {$(
            #[test]
            fn $name() -> Result<()> {
                lie($change).map(|_| ())
            }
        )*};
    }

    survived! {
        an_l2_table_past_the_end |i| i.put_u64(l1(i)?, 1 << 63 | 1 << 45);
        an_l2_table_off_its_cluster |i| i.put_u64(l1(i)?, 1 << 63 | 0x1200);
        an_l2_table_that_is_the_header |i| i.put_u64(l1(i)?, 1 << 63 | 4096);
        an_l2_table_that_is_the_l1_table |i| { let at = l1(i)?; i.put_u64(at, 1 << 63 | at) };
        an_l2_table_that_is_the_refcount_table |i| { let at = i.u64_at(REFCOUNT_OFFSET)?; i.put_u64(l1(i)?, 1 << 63 | at) };
        an_l1_table_that_is_the_header |i| i.put_u64(L1_OFFSET, 0);
        an_l1_table_that_is_the_refcount_table |i| { let at = i.u64_at(REFCOUNT_OFFSET)?; i.put_u64(L1_OFFSET, at) };
        a_refcount_table_that_is_the_l1_table |i| { let at = l1(i)?; i.put_u64(REFCOUNT_OFFSET, at) };
        a_data_cluster_past_the_end |i| i.put_u64(l2(i)?, 1 << 63 | 1 << 45);
        a_data_cluster_off_its_cluster |i| i.put_u64(l2(i)?, 1 << 63 | 0x1234);
        a_data_cluster_that_is_its_own_table |i| { let at = l2(i)?; i.put_u64(at, 1 << 63 | at) };
        a_compressed_cluster_of_nothing |i| i.put_u64(l2(i)?, 1 << 62 | 0x3fff_ffff_ffff_ffff);
        reserved_bits_everywhere |i| i.put_u64(l2(i)?, u64::MAX);
        a_refcount_block_past_the_end |i| { let at = i.u64_at(REFCOUNT_OFFSET)?; i.put_u64(at, 1 << 45) };
        a_refcount_block_off_its_cluster |i| { let at = i.u64_at(REFCOUNT_OFFSET)?; i.put_u64(at, 0x1200) };
        no_refcount_block |i| { let at = i.u64_at(REFCOUNT_OFFSET)?; i.put_u64(at, 0) };
        refcounts_of_zero_everywhere |i| {
            let block = i.u64_at(i.u64_at(REFCOUNT_OFFSET)?)?;
            i.put(block, &[0; 4096])
        };
        refcounts_that_cannot_grow |i| {
            let block = i.u64_at(i.u64_at(REFCOUNT_OFFSET)?)?;
            i.put(block, &[0xff; 4096])
        };
        a_file_cut_in_its_data |i| Ok(std::fs::OpenOptions::new().write(true).open(&i.path)?.set_len(20_480)?);
    }
}

mod chains {
    use super::*;

    fn with_backing(image: &Image, name: &str) -> Result<()> {
        // Behind the header, before the end of the first cluster.
        image.put(2048, name.as_bytes())?;
        image.put_u64(BACKING_OFFSET, 2048)?;
        image.put_u32(BACKING_SIZE, name.len() as u32)
    }

    /// `create --external` does not read what is below; everything that must, declines and says why.
    fn declined(name: &'static str, word: &str) -> Result<()> {
        let outcomes = lie(|image| with_backing(image, name))?;
        let list = outcomes.iter().find(|outcome| outcome.command.contains("check")).unwrap();
        ensure!(list.status != Some(status::DONE), "{name} was followed: {list}");
        ensure!(list.stderr.contains(word) || list.stdout.contains(word), "{word:?} is not said: {list}");
        Ok(())
    }

    #[test]
    fn image_that_backs_itself() -> Result<()> {
        declined("a.qcow2", "a.qcow2")
    }

    #[test]
    fn a_backing_name_that_is_json() -> Result<()> {
        declined("json:{\"driver\":\"nbd\",\"host\":\"example.invalid\"}", "json:")
    }

    #[test]
    fn a_backing_name_that_is_a_url() -> Result<()> {
        declined("nbd://example.invalid/x", "nbd:")
    }

    #[test]
    fn a_backing_name_outside_of_the_allowed_directories() -> Result<()> {
        declined("/etc/passwd", "/etc/passwd")
    }

    #[test]
    fn a_backing_name_that_climbs() -> Result<()> {
        declined("../../../../../etc/passwd", "etc/passwd")
    }

    #[test]
    fn images_that_back_each_other() -> Result<()> {
        let outcomes = lie(|image| {
            with_backing(image, "b.qcow2")?;
            let other = image.disks().join("b.qcow2");
            std::fs::copy(&image.path, &other)?;
            let other = std::fs::OpenOptions::new().write(true).open(other)?;
            Ok(other.write_all_at(b"a.qcow2", 2048)?)
        })?;
        ensure!(
            outcomes.iter().any(|outcome| outcome.status != Some(status::DONE)),
            "the loop was never seen"
        );
        Ok(())
    }
}
