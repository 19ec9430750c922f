//! Tests of the strict reader, and of the files that come of it.

use std::{fs, os::unix::fs::PermissionsExt, path::Path};

use proptest::prelude::*;

use super::{
    Split,
    model::{Kept, Stream, WANTED},
    refusal::Refusal,
    walk::{LONGEST_BLOCK, PAGE, separate},
};
use crate::{
    error::ErrorKind,
    memory::{Draft, Image},
    qcow2::STREAM,
};

fn read(stream: &Stream) -> Result<Kept, Refusal> {
    let mut kept = Kept::default();
    separate(&*stream.0, stream.0.len() as u64, WANTED.as_bytes(), &mut kept).map(|()| kept)
}

/// A whole stream of two blocks, with a page of each.
fn small() -> Stream {
    let mut stream = Stream::new();
    stream.blocks(&[(WANTED, 4 * PAGE), ("vga.vram", 2 * PAGE)]).end();
    stream.part(false).page(Some(WANTED), PAGE, Some(1)).page(Some("vga.vram"), 0, Some(2)).end();
    stream.part(true).end().devices();
    stream
}

fn wrong(stream: &Stream, text: &str) {
    match read(stream) {
        Err(Refusal::Wrong { what, .. }) if what.contains(text) => {}
        other => panic!("expected a wrong stream ({text}), found {other:?}"),
    }
}

fn unknown(stream: &Stream, text: &str) {
    match read(stream) {
        Err(Refusal::Unknown { what, .. }) if what.contains(text) => {}
        other => panic!("expected an unknown stream ({text}), found {other:?}"),
    }
}

/// The block's pages are separated, and the stream without them is itself whole.
#[test]
fn pages_of_one_block_are_separated() {
    let kept = read(&small()).expect("whole");
    assert_eq!(kept.length, 4 * PAGE);
    assert_eq!(kept.pages, [(PAGE, vec![1; PAGE as usize])].into());
    let mut without = Stream::new();
    without.blocks(&[(WANTED, 4 * PAGE), ("vga.vram", 2 * PAGE)]).end();
    without.part(false).page(Some("vga.vram"), 0, Some(2)).end().part(true).end().devices();
    assert!(kept.rest == without.0, "the rest is another stream");
    let again = read(&Stream(kept.rest.clone())).expect("whole");
    assert!(again.pages.is_empty() && again.rest == kept.rest);
}

/// The current block lasts across sections, and a later page of zeros is valid.
#[test]
fn current_block_lasts_and_last_page_is_valid() {
    let mut stream = Stream::new();
    stream.blocks(&[("vga.vram", PAGE), (WANTED, 4 * PAGE)]).end();
    stream.part(false).page(Some(WANTED), 0, Some(1)).page(None, PAGE, Some(2)).end();
    stream.part(false).page(None, 2 * PAGE, Some(3)).page(None, 0, None).end();
    stream.put(&[8, 0, 11, 0, 0]);
    stream.part(true).page(None, PAGE, None).page(None, PAGE, Some(9)).page(None, 3 * PAGE, None).end();
    stream.put(&[8, 0, 11, 0, 0]).devices();
    let kept = read(&stream).expect("whole");
    let full = |byte| vec![byte; PAGE as usize];
    assert_eq!(kept.pages, [(PAGE, full(9)), (2 * PAGE, full(3))].into());
    let commands = kept.rest.windows(5).filter(|part| *part == [8, 0, 11, 0, 0]).count();
    assert_eq!(commands, 2);
}

/// A background snapshot ends without a last part; pages behind the first device are left in the stream.
#[test]
fn stream_without_a_last_part_is_read() {
    let mut stream = Stream::new();
    stream.blocks(&[(WANTED, 4 * PAGE)]).end().part(false).page(Some(WANTED), 0, Some(1)).end().devices();
    let kept = read(&stream).expect("whole");
    assert_eq!(kept.pages.len(), 1);
    stream.part(true).page(Some(WANTED), PAGE, Some(2)).end();
    let kept = read(&stream).expect("whole");
    assert_eq!(kept.pages.len(), 1);
    assert!(kept.rest.len() > PAGE as usize, "the page is lost");
}

#[test]
fn continuation_without_a_block_is_refused() {
    let mut stream = Stream::new();
    stream.blocks(&[(WANTED, PAGE)]).page(None, 0, Some(1)).end().part(true).end().devices();
    wrong(&stream, "the first page has no block");
}

#[test]
fn page_outside_of_its_block_is_refused() {
    for (block, address) in [(WANTED, 4 * PAGE), ("vga.vram", 2 * PAGE), (WANTED, u64::MAX - 0xfff)] {
        let mut stream = Stream::new();
        stream.blocks(&[(WANTED, 4 * PAGE), ("vga.vram", 2 * PAGE)]).page(Some(block), address, Some(1));
        wrong(&stream, "a page at");
        let mut stream = Stream::new();
        stream.blocks(&[(WANTED, 4 * PAGE), ("vga.vram", 2 * PAGE)]).page(Some(block), address, None);
        wrong(&stream, "a page at");
    }
}

/// Names of 255 bytes are read, empty ones and blocks that are not listed are refused.
#[test]
fn names_are_checked() {
    let long = "x".repeat(255);
    let mut stream = Stream::new();
    stream.blocks(&[(&long, PAGE), (WANTED, PAGE)]).page(Some(&long), 0, Some(1)).end();
    stream.part(true).end().devices();
    read(&stream).expect("whole");
    let mut stream = Stream::new();
    stream.blocks(&[(WANTED, PAGE)]).page(Some(&long), 0, Some(1));
    wrong(&stream, "which is not listed");
    let mut stream = Stream::new();
    stream.blocks(&[("", PAGE), (WANTED, PAGE)]);
    wrong(&stream, "a name is empty");
    let mut stream = Stream::new();
    stream.blocks(&[(WANTED, PAGE), (WANTED, PAGE)]);
    wrong(&stream, "one too many");
    let mut stream = Stream::new();
    stream.blocks(&[("mem", PAGE)]);
    unknown(&stream, "no block");
}

/// Lengths that overflow, are no pages, or do not add up are refused before anything is made of them.
#[test]
fn lengths_of_blocks_are_checked() {
    for length in [1 << 63, u64::MAX, PAGE + 1, 0] {
        let mut stream = Stream::new();
        stream.put(&[1, 0, 0, 0, 2]).text("ram").put(&[0, 0, 0, 0, 0, 0, 0, 4]).word((4 * PAGE) | 4);
        stream.text(WANTED).word(length);
        wrong(&stream, "bytes");
    }
    let mut stream = Stream::new();
    stream.put(&[1, 0, 0, 0, 2]).text("ram").put(&[0, 0, 0, 0, 0, 0, 0, 4]).word(1 << 63 | 4);
    stream.text(WANTED).word(1 << 63);
    unknown(&stream, "at most");
    let mut stream = Stream::new();
    stream.blocks(&[(WANTED, LONGEST_BLOCK)]).end().part(true).end().devices();
    read(&stream).expect("a stream says so, and nothing is allocated for it");
    // More blocks than any machine has.
    let mut stream = Stream::new();
    stream.put(&[1, 0, 0, 0, 2]).text("ram").put(&[0, 0, 0, 0, 0, 0, 0, 4]).word((2000 * PAGE) | 4);
    for number in 0..2000 {
        stream.text(&format!("b{number}")).word(PAGE);
    }
    wrong(&stream, "one too many");
}

/// Forms that are not known here are refused as such: the image itself can be loaded.
#[test]
fn unknown_forms_are_refused_as_such() {
    for (flags, text) in
        [(0x40, "xbzrle"), (0x100, "compressed"), (0x80, "RDMA"), (1, "old"), (0x400, "flags")]
    {
        let mut stream = Stream::new();
        stream.blocks(&[(WANTED, PAGE)]).word(flags);
        unknown(&stream, text);
        let mut stream = Stream::new();
        stream.blocks(&[(WANTED, PAGE)]).word(flags | 8);
        unknown(&stream, text);
    }
    let begin = |more: &[u8]| {
        let mut stream = Stream::new();
        stream.put(more);
        stream
    };
    unknown(&begin(&[1, 0, 0, 0, 2, 4, b'v', b'f', b'i', b'o', 0, 0, 0, 0, 0, 0, 0, 1]), "vfio");
    unknown(&begin(&[1, 0, 0, 0, 2, 3, b'r', b'a', b'm', 0, 0, 0, 0, 0, 0, 0, 5]), "version 5");
    unknown(&begin(&[4, 0, 0, 0, 9]), "before the memory");
    unknown(&begin(&[8, 0, 3, 0, 0]), "the command 3");
    unknown(&begin(&[8, 0, 11, 0, 9]), "the command 11");
    unknown(&begin(&[5, 3, b'c', b'a', b'p']), "cap");
    unknown(&begin(&[7]), "type 7");
    unknown(&begin(&[0]), "type 0");
    let mut filled = Stream::new();
    filled.blocks(&[(WANTED, PAGE)]).word(2).text(WANTED).put(&[7]);
    unknown(&filled, "filled with 0x7");
}

/// Sections that do not fit each other are refused.
#[test]
fn order_of_sections_is_checked() {
    let begin = |more: &[u8]| {
        let mut stream = Stream::new();
        stream.blocks(&[(WANTED, PAGE)]).end().put(more);
        stream
    };
    wrong(&begin(&[2, 0, 0, 0, 3]), "has not begun");
    wrong(&begin(&[1, 0, 0, 0, 2, 3, b'r', b'a', b'm', 0, 0, 0, 0, 0, 0, 0, 4]), "begins twice");
    wrong(
        &begin(&[3, 0, 0, 0, 2, 0, 0, 0, 0, 0, 0, 0, 0x10, 0x7e, 0, 0, 0, 2, 2, 0, 0, 0, 2]),
        "or has ended",
    );
    let mut twice = Stream::new();
    twice.blocks(&[(WANTED, PAGE)]).word(PAGE | 4);
    wrong(&twice, "listed twice");
    let mut foot = Stream::new();
    foot.blocks(&[(WANTED, PAGE)]).word(0x10).put(&[0x7e, 0, 0, 0, 9]);
    wrong(&foot, "without its footer");
    let mut both = Stream::new();
    both.blocks(&[(WANTED, PAGE)]).word(0x30);
    wrong(&both, "flags");
    let mut none = Stream::new();
    none.put(&[1, 0, 0, 0, 2]).text("ram").put(&[0, 0, 0, 0, 0, 0, 0, 4]).end().part(true).end().devices();
    unknown(&none, "before the memory");
    let mut short = Stream::new();
    short.blocks(&[(WANTED, PAGE)]).end().part(true).end().put(&[4]);
    wrong(&short, "before the states of devices");
    assert!(matches!(read(&Stream(b"QEVM\0\0\0\x02 ".to_vec())), Err(Refusal::Wrong { at: 0, .. })));
}

/// A stream that was cut off before its devices is refused, wherever that is.
#[test]
fn stream_that_was_cut_off_is_refused() {
    let whole = small();
    let devices = whole.0.len() - {
        let mut only = Stream::default();
        only.devices();
        only.0.len()
    };
    for length in 0..=devices + 1 {
        read(&Stream(whole.0[..length].to_vec())).expect_err("it was cut off");
    }
}

/// A memory image with this stream.
fn image(dir: &Path, stream: &Stream) -> Image {
    let draft = Draft::create(dir.join("memory")).expect("a draft");
    let file = fs::File::from(draft.writable().expect("it opens"));
    std::os::unix::fs::FileExt::write_all_at(&file, &stream.0, STREAM).expect("written");
    draft.seal("s", b"{}").expect("sealed")
}

/// Both files are made, have their modes, are verified, and are not replaced; a changed byte is found.
#[test]
fn files_are_made_and_verified() {
    let dir = tempfile::tempdir().expect("a directory");
    let (ram, devices) = (dir.path().join("ram"), dir.path().join("devices"));
    let image = image(dir.path(), &small());
    // The remains of a killed process.
    fs::write(dir.path().join(".ram.part"), "remains").expect("written");
    let split = Split::make(&image, WANTED, &ram, &devices).expect("made");
    assert_eq!((split.block(), split.length()), (WANTED, 4 * PAGE));
    for file in [&ram, &devices] {
        assert_eq!(fs::metadata(file).expect("it is there").permissions().mode() & 0o7777, 0o400);
    }
    let expected: Vec<u8> = [0u8, 1, 0, 0].iter().flat_map(|byte| [*byte; PAGE as usize]).collect();
    assert!(fs::read(&ram).expect("read") == expected);
    split.verify().expect("right");
    assert_eq!(fs::read_dir(dir.path()).expect("read").count(), 3, "files are left");

    for existing in [&ram, &devices] {
        let other = dir.path().join("other");
        let (ram, devices) = if existing == &ram { (existing, &other) } else { (&other, existing) };
        let error = Split::make(&image, WANTED, ram, devices).expect_err("the file exists");
        assert_eq!(error.kind(), ErrorKind::Invalid, "{error}");
        assert!(!other.exists());
    }
    for (file, at) in [(&ram, 3 * PAGE), (&devices, (2 << 20) + 20)] {
        let mut bytes = fs::read(file).expect("read");
        fs::set_permissions(file, fs::Permissions::from_mode(0o600)).expect("writable");
        bytes[usize::try_from(at).expect("short")] ^= 1;
        fs::write(file, &bytes).expect("written");
        let error = Split::open(&ram, &devices).expect("it opens").verify().expect_err("changed");
        assert_eq!(error.kind(), ErrorKind::Damaged, "{error}");
        bytes[usize::try_from(at).expect("short")] ^= 1;
        fs::write(file, &bytes).expect("written");
        Split::open(&ram, &devices).expect("it opens").verify().expect("right");
        fs::write(file, &bytes[..bytes.len() - 1]).expect("written");
        assert_eq!(Split::open(&ram, &devices).expect_err("cut off").kind(), ErrorKind::Damaged);
        fs::write(file, &bytes).expect("written");
    }
    Split::remove(&ram, &devices).expect("removed");
    Split::remove(&ram, &devices).expect("removed already");
    assert_eq!(fs::read_dir(dir.path()).expect("read").count(), 1);
}

/// A stream that is refused leaves no file, and says what to do.
#[test]
fn refused_streams_leave_no_file() {
    let dir = tempfile::tempdir().expect("a directory");
    let (ram, devices) = (dir.path().join("ram"), dir.path().join("devices"));
    let mut stream = Stream::new();
    stream.blocks(&[(WANTED, 4 * PAGE)]).page(Some(WANTED), 0, Some(1)).word(0x40);
    let image = image(dir.path(), &stream);
    let error = Split::make(&image, WANTED, &ram, &devices).expect_err("refused");
    assert_eq!(error.kind(), ErrorKind::Unsupported, "{error}");
    assert!(error.advice().is_some_and(|advice| advice.contains("memory image itself")));
    let left: Vec<_> =
        fs::read_dir(dir.path()).expect("read").flatten().map(|entry| entry.file_name()).collect();
    assert_eq!(left, ["memory"]);
}

/// After a crash at any step, the files are refused, and can be removed and made again.
#[test]
fn what_a_crash_leaves_can_be_removed() {
    let dir = tempfile::tempdir().expect("a directory");
    let (ram, devices) = (dir.path().join("ram"), dir.path().join("devices"));
    let image = image(dir.path(), &small());
    let make = || Split::make(&image, WANTED, &ram, &devices);
    let parts = [dir.path().join(".ram.part"), dir.path().join(".devices.part")];
    // While both are written: they are replaced.
    for part in &parts {
        fs::write(part, "half").expect("written");
    }
    make().expect("made").verify().expect("right");
    assert!(!parts[0].exists() && !parts[1].exists());
    // Between the two names.
    fs::rename(&devices, &parts[1]).expect("renamed");
    Split::open(&ram, &devices).expect_err("there are no devices");
    let error = make().expect_err("the RAM exists");
    assert_eq!(error.kind(), ErrorKind::Invalid, "{error}");
    Split::remove(&ram, &devices).expect("removed");
    assert_eq!(fs::read_dir(dir.path()).expect("read").count(), 1);
    make().expect("made").verify().expect("right");
    // In the middle of a removal.
    fs::remove_file(&devices).expect("removed");
    Split::remove(&ram, &devices).expect("removed");
    make().expect("made").verify().expect("right");
}

/// A full file system is an error that says so, whichever file it meets, and leaves nothing.
#[test]
fn full_file_system_is_an_error() {
    if !rustix::process::geteuid().is_root() {
        println!("not run: only root can mount a small file system");
        return;
    }
    let dir = tempfile::tempdir().expect("a directory");
    let small = dir.path().join("small");
    fs::create_dir(&small).expect("made");
    let mount = |name: &str, args: &[&str]| {
        let status = std::process::Command::new(name).args(args).arg(&small).status().expect("it runs");
        assert!(status.success(), "{name} failed");
    };
    mount("mount", &["-t", "tmpfs", "-o", "size=64k", "domsnap-test"]);
    let many = |block: &str| {
        let mut stream = Stream::new();
        stream.blocks(&[(WANTED, 64 * PAGE), ("vga.vram", 64 * PAGE)]);
        (0..64).for_each(|page| {
            stream.page(Some(block), page * PAGE, Some(1));
        });
        stream.end().devices();
        stream
    };
    let results: Vec<_> = [WANTED, "vga.vram"]
        .into_iter()
        .map(|block| {
            let place = dir.path().join(block);
            fs::create_dir(&place).expect("made");
            let image = image(&place, &many(block));
            let result = Split::make(&image, WANTED, &small.join("ram"), &small.join("devices"));
            (block, result, fs::read_dir(&small).expect("read").count())
        })
        .collect();
    mount("umount", &[]);
    for (block, result, left) in results {
        let error = result.expect_err("it is full");
        let file = if block == WANTED { "small/ram" } else { "small/devices" };
        assert!(error.kind() == ErrorKind::Io && error.subject().ends_with(file), "{error}");
        assert!(error.detail().contains("No space left"), "{error}");
        assert_eq!(left, 0, "{block}: files are left");
    }
}

/// Of two that make the same files at once, one is refused, and the other's files are whole.
#[test]
fn two_at_once_are_not_mixed() {
    let dir = tempfile::tempdir().expect("a directory");
    let (ram, devices) = (dir.path().join("ram"), dir.path().join("devices"));
    let image = image(dir.path(), &small());
    let make = || Split::make(&image, WANTED, &ram, &devices);
    let results = std::thread::scope(|scope| {
        let threads: Vec<_> = (0..4).map(|_| scope.spawn(make)).collect();
        threads.into_iter().map(|thread| thread.join().expect("it ends")).collect::<Vec<_>>()
    });
    assert_eq!(results.iter().filter(|result| result.is_ok()).count(), 1, "{results:?}");
    for error in results.iter().filter_map(|result| result.as_ref().err()) {
        assert_eq!(error.kind(), ErrorKind::Invalid, "{error}");
    }
    Split::open(&ram, &devices).expect("it opens").verify().expect("right");
    assert_eq!(fs::read_dir(dir.path()).expect("read").count(), 3, "files are left");
}

#[derive(Debug, Clone)]
enum Entry {
    Page { wanted: bool, page: u64, fill: Option<u8> },
    Part,
    Flush,
    Command,
}

fn entry() -> impl Strategy<Value = Entry> {
    prop_oneof![
        8 => (any::<bool>(), 0..8u64, proptest::option::of(1..=255u8))
            .prop_map(|(wanted, page, fill)| Entry::Page { wanted, page, fill }),
        2 => Just(Entry::Part),
        1 => Just(Entry::Flush),
        1 => Just(Entry::Command),
    ]
}

proptest! {
    // Each case flushes files.
    #![proptest_config(ProptestConfig::with_cases(32))]

    /// Whatever the order of pages and parts, each block has the last page of each address.
    #[test]
    fn separated_pages_are_the_models(entries in proptest::collection::vec(entry(), 0..60)) {
        let other = "vga.vram";
        let (mut stream, mut rest) = (Stream::new(), Stream::new());
        let mut pages = std::collections::BTreeMap::new();
        let mut current = None;
        for to in [&mut stream, &mut rest] {
            to.blocks(&[(WANTED, 8 * PAGE), (other, 8 * PAGE)]);
        }
        for entry in entries {
            match entry {
                Entry::Page { wanted, page, fill } => {
                    let block = if wanted { WANTED } else { other };
                    let name = if current == Some(block) { None } else { Some(block) };
                    current = Some(block);
                    stream.page(name, page * PAGE, fill);
                    match (wanted, fill) {
                        (false, _) => {
                            rest.page(name, page * PAGE, fill);
                        }
                        (true, Some(byte)) => {
                            pages.insert(page * PAGE, vec![byte; PAGE as usize]);
                        }
                        (true, None) => {
                            pages.remove(&(page * PAGE));
                        }
                    }
                }
                Entry::Part | Entry::Flush | Entry::Command => {
                    for to in [&mut stream, &mut rest] {
                        match entry {
                            Entry::Flush => to.word(0x200),
                            Entry::Command => to.end().put(&[8, 0, 11, 0, 0]).part(false),
                            _ => to.end().part(false),
                        };
                    }
                }
            }
        }
        for to in [&mut stream, &mut rest] {
            to.end().part(true).end().devices();
        }
        let kept = read(&stream).expect("whole");
        prop_assert_eq!(&kept.pages, &pages);
        prop_assert!(kept.rest == rest.0, "the rest is another stream");

        // The same in files.
        let dir = tempfile::tempdir().expect("a directory");
        let (ram, devices) = (dir.path().join("ram"), dir.path().join("devices"));
        let split = Split::make(&image(dir.path(), &stream), WANTED, &ram, &devices).expect("made");
        split.verify().expect("right");
        let content = fs::read(&ram).expect("read");
        for (page, found) in content.chunks(PAGE as usize).enumerate() {
            let expected = pages.get(&(page as u64 * PAGE)).cloned().unwrap_or(vec![0; PAGE as usize]);
            prop_assert!(found == expected, "page {}", page);
        }
        prop_assert!(fs::read(&devices).expect("read")[2 << 20..] == rest.0);
    }

}

proptest! {
    /// Any byte changed: it is refused or read, and nothing panics or is outside of its block.
    #[test]
    fn changed_streams_do_not_panic(at in 0..8600usize, byte in any::<u8>()) {
        let mut stream = small();
        let at = at % stream.0.len();
        stream.0[at] = byte;
        super::fuzz_stream(&stream.0);
    }
}
