//! Images of many shapes, read by the engine, by the reference reader, by 7-Zip and by QEMU.

mod place;
mod support;

use backend_vhd::image::{Chain, ChainOptions, ErrorKind, OpenOptions, Vhd, find_parent};
use place::{Place, read};
use support::{Dice, Maker, Reference, Trailing, qemu_reads, relative, seven_zip_reads};

const MIB: u64 = 1 << 20;

fn assert_same(a: &[u8], b: &[u8], what: &str) {
    assert_eq!(a.len(), b.len(), "{what}: sizes differ");
    if let Some(at) = a.iter().zip(b).position(|(a, b)| a != b) {
        panic!("{what}: byte {at} differs: {} and {}", a[at], b[at]);
    }
}

fn base(dice: &mut Dice) -> Maker {
    Maker::new(3, 16 * MIB).put(0, &dice.bytes(2 << 20)).put(6 * MIB, &dice.bytes(2 << 20))
}

/// Children with any bits agree with the reference and with 7-Zip, byte for byte (cases 1 and 2 of VHD.md).
#[test]
fn sector_bits_decide() {
    let mut dice = Dice::new(1);
    for sectors in [vec![0], vec![7], vec![1, 3], vec![9, 40, 41, 100], (0..60).map(|n| n * n).collect()] {
        let place = Place::new();
        let parent = base(&mut dice);
        let mut child = Maker::child(&parent, "base.vhd");
        for sector in &sectors {
            child = child.put(sector * 512, &dice.bytes(512));
            child = child.put(4 * MIB + sector * 512, &dice.bytes(512));
        }
        let below = place.make("base.vhd", &parent);
        let top = place.make("child.vhd", &child);
        let mine = read(&top);
        assert_same(&mine, &Reference::open(&[&top, &below]).read(), "reference");
        assert_same(&mine, &seven_zip_reads(&top).unwrap(), "7-Zip");
    }
}

/// Images of other programs are read as their programs and QEMU read them (cases 7, 8, 12, 14 and 41).
#[test]
fn foreign_shapes_are_read() {
    let mut dice = Dice::new(2);
    let place = Place::new();
    let plain = base(&mut dice);
    let shapes: Vec<(&str, Maker)> = vec![
        ("hyperv", Maker { geometry: Some((65278, 16, 255)), ..plain.clone() }),
        ("disk2vhd", Maker { creator: *b"d2v\0", ..plain.clone() }),
        (
            "blktap",
            Maker {
                creator: *b"tap\0",
                creator_version: 0x0001_0003,
                batmap: true,
                padding: 0xFF,
                align: 4096,
                ..plain.clone()
            },
        ),
        ("resized", Maker { original: 8 * MIB, ..plain.clone() }),
        ("longer-bat", Maker { entries: Some(200), ..plain.clone() }),
        ("fixed", Maker { kind: 2, ..plain.clone() }),
    ];
    for (name, maker) in shapes {
        let path = place.make(&format!("{name}.vhd"), &maker);
        let mine = read(&path);
        assert_eq!(mine.len() as u64, maker.size, "{name}");
        assert_same(&mine, &Reference::open(&[&path]).read(), name);
        assert_same(&mine, &qemu_reads(&path, maker.size).unwrap(), name);
        if name != "longer-bat" {
            assert_same(&mine, &seven_zip_reads(&path).unwrap(), name);
        }
    }
    // A guest of a fixed image wrote a whole dynamic image over its start.
    let mut fake = plain.bytes();
    fake.truncate(4096);
    let fixed = Maker::new(2, 4 * MIB).under(0, &fake);
    let path = place.make("attacked.vhd", &fixed);
    assert_same(&read(&path), &Reference::open(&[&path]).read(), "fixed");
    assert_eq!(&read(&path)[..8], b"conectix");
}

/// Blocks from 512 bytes to 32 MiB are read, in every combination; other sizes are refused (case 14).
#[test]
fn block_sizes_are_read() {
    let mut dice = Dice::new(3);
    for (lower, upper) in
        [(512, 2 << 20), (512 << 10, 2 << 20), (2 << 20, 512 << 10), (4 << 20, 32 << 20), (32 << 20, 4096)]
    {
        let place = Place::new();
        let mut parent = Maker { block: lower, ..Maker::new(3, 5 * MIB + 512) };
        parent = parent.put(1024, &dice.bytes(4096)).put(4 * MIB, &dice.bytes(8192));
        let mut child = Maker { block: upper, ..Maker::child(&parent, "p.vhd") };
        child = child.put(2048, &dice.bytes(512)).put(4 * MIB + 4096, &dice.bytes(1024));
        let below = place.make("p.vhd", &parent);
        let top = place.make("c.vhd", &child);
        assert_same(&read(&top), &Reference::open(&[&top, &below]).read(), &format!("{lower} and {upper}"));
    }
    for block in [3 << 20, 64 << 20, 1 << 31, 0] {
        let place = Place::new();
        let mut bytes = Maker::new(3, 4 * MIB).bytes();
        bytes[512 + 32..512 + 36].copy_from_slice(&(block as u32).to_be_bytes());
        let path = place.at("x.vhd");
        std::fs::write(&path, bytes).unwrap();
        let error = Vhd::open(&path, &OpenOptions::read_only()).unwrap_err();
        assert!(error.to_string().contains("power"), "{error}");
    }
}

/// Footers that are missing, short or overwritten leave the disk readable and not writable, and a repair adds
/// one valid footer (cases 9 and 11).
#[test]
fn broken_ends_are_repaired() {
    let mut dice = Dice::new(4);
    for trailing in [Trailing::Short, Trailing::Nothing, Trailing::Tapdisk, Trailing::FooterAndZeros] {
        let place = Place::new();
        let maker = Maker { trailing, ..base(&mut dice) };
        let path = place.make("x.vhd", &maker);
        let whole = Maker { trailing: Trailing::Footer, ..maker.clone() };
        let expected = read(&place.make("whole.vhd", &whole));
        assert_same(&read(&path), &expected, "before the repair");
        let before = std::fs::read(&path).unwrap();
        let mut image = Vhd::open(&path, &OpenOptions::read_write()).unwrap();
        assert_eq!(image.write_at(&[1; 512], 0).unwrap_err().kind(), ErrorKind::Dirty);
        assert!(std::fs::read(&path).unwrap() == before, "written before the repair");
        assert_eq!(image.repair().unwrap().len(), 1);
        drop(image);
        let after = std::fs::read(&path).unwrap();
        let kept = maker.bytes().len().min(after.len()) - 512;
        assert!(before[..kept] == after[..kept], "the repair changed data");
        let mut image = Vhd::open(&path, &OpenOptions::read_write()).unwrap();
        assert_eq!(image.findings(), []);
        image.write_at(&[1; 512], 0).unwrap();
        image.flush().unwrap();
        drop(image);
        assert_same(&read(&path)[512..], &expected[512..], "after the repair");
        assert_same(&read(&path), &qemu_reads(&path, maker.size).unwrap(), "QEMU");
    }
    let mut bytes = base(&mut dice).bytes();
    let end = bytes.len() - 512;
    (bytes[64], bytes[end + 64]) = (bytes[64] ^ 1, bytes[end + 64] ^ 1);
    let place = Place::new();
    std::fs::write(place.at("x.vhd"), bytes).unwrap();
    let error = Vhd::open(&place.at("x.vhd"), &OpenOptions::read_only()).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Corrupt);
}

/// BAT entries that lead anywhere but to a place of their own are errors of the check, and keep the image
/// from being written (case 13).
#[test]
fn wrong_bat_entries_are_found() {
    let mut dice = Dice::new(5);
    let place = Place::new();
    let good = base(&mut dice);
    let first = u32::from_be_bytes(good.bytes()[1536..1540].try_into().unwrap());
    let end = (good.bytes().len() / 512) as u32;
    for sector in [first, first + 1, 0, 1, 3, end - 1, end - 4096, end + 100, u32::MAX - 1] {
        let mut wrong = good.clone();
        wrong.bat.insert(7, sector);
        let path = place.make("x.vhd", &wrong);
        let mut image = Vhd::open(&path, &OpenOptions::read_write()).unwrap();
        let found = image.check(true).unwrap();
        assert!(found[0].text.contains("block"), "{sector}: {found:?}");
        let before = std::fs::read(&path).unwrap();
        assert_eq!(image.write_at(&[1; 512], 9 * MIB).unwrap_err().kind(), ErrorKind::Corrupt);
        image.repair().unwrap_err();
        assert!(std::fs::read(&path).unwrap() == before);
        let _ = Chain::open(&path, &ChainOptions::read_only().unlocked())
            .unwrap()
            .read_at(&mut vec![0; 16 << 20], 0);
    }
}

/// Locators in every form lead to the parent, and none leads out of the directory (cases 16 to 18).
#[test]
fn locators_lead_to_the_parent() {
    let mut dice = Dice::new(6);
    let parent = base(&mut dice);
    let forms: Vec<(&str, Vec<u8>)> = vec![
        ("W2ru", relative(".\\p.vhd")),
        ("W2ru", relative("p.vhd\0")),
        ("W2ru", relative("./p.vhd")),
        ("W2ku", relative("D:\\elsewhere\\p.vhd")),
        ("W2ku", relative("\\\\server\\share\\p.vhd")),
        ("MacX", b"file:///elsewhere/p.vhd".to_vec()),
        ("MacX", b"file://./p.vhd".to_vec()),
        ("zzzz", b"?".to_vec()),
    ];
    for (code, text) in forms {
        for space in [1, 512, 513, 0] {
            let place = Place::new();
            let mut child = Maker::child(&parent, "p.vhd");
            child.locators = vec![(code.as_bytes().try_into().unwrap(), text.clone(), space)];
            if code != "zzzz" {
                child.parent_name = String::new();
            }
            place.make("p.vhd", &parent);
            let top = place.make("c.vhd", &child);
            let image = Vhd::open(&top, &OpenOptions::read_only()).unwrap();
            let found = find_parent(&image, &[]).unwrap().unwrap();
            assert_eq!(found.path, place.at("p.vhd").canonicalize().unwrap(), "{code} {text:?}");
        }
    }
    // Outside of the directory it is never looked at, not even by the right id.
    let (inside, outside) = (Place::new(), Place::new());
    outside.make("p.vhd", &parent);
    let mut child = Maker::child(&parent, "");
    let path = outside.at("p.vhd").to_str().unwrap().replace('/', "\\");
    child.locators = vec![(*b"W2ku", relative(&path), 512)];
    let top = inside.make("c.vhd", &child);
    let image = Vhd::open(&top, &OpenOptions::read_only().unlocked()).unwrap();
    let error = find_parent(&image, &[]).unwrap_err();
    assert!(error.to_string().contains("outside"), "{error}");
    find_parent(&image, &[outside.directory().to_owned()]).unwrap().unwrap();
    // Another image of the right name is refused, with both ids.
    let mut other = parent.clone();
    other.id = [9; 16];
    inside.make("p.vhd", &other);
    let error = find_parent(&image, &[]).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Corrupt, "{error}");
    assert!(error.to_string().contains("09090909-") && error.to_string().contains("03030303-"), "{error}");
    // The right one is found by its id under any name.
    inside.make("renamed.vhd", &parent);
    assert!(find_parent(&image, &[]).unwrap().unwrap().path.ends_with("renamed.vhd"));
}

/// Loops and chains that are too deep are refused at once (case 20).
#[test]
fn loops_and_depth_are_refused() {
    let place = Place::new();
    let mut a = Maker::child(&Maker::new(3, 4 * MIB), "b.vhd");
    (a.id, a.parent_id) = ([1; 16], [2; 16]);
    let mut b = Maker::child(&Maker::new(3, 4 * MIB), "a.vhd");
    (b.id, b.parent_id) = ([2; 16], [1; 16]);
    place.make("a.vhd", &a);
    place.make("b.vhd", &b);
    let error = Chain::open(&place.at("a.vhd"), &ChainOptions::read_only()).unwrap_err();
    assert!(error.to_string().contains("loop"), "{error}");
    let mut below = Maker::new(3, MIB);
    below.id = [0xFF; 16];
    place.make("0.vhd", &below);
    for n in 1..65u8 {
        let mut child = Maker::child(&below, &format!("{}.vhd", n - 1));
        child.id = [n; 16];
        place.make(&format!("{n}.vhd"), &child);
        below = child;
    }
    Chain::open(&place.at("63.vhd"), &ChainOptions::read_only()).unwrap();
    let error = Chain::open(&place.at("64.vhd"), &ChainOptions::read_only()).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::LimitExceeded);
}

/// Raw parents are read: equal, and shorter. Longer ones, and VHDs in their place, are refused (cases 21,
/// 22).
#[test]
fn raw_parents_are_read() {
    let mut dice = Dice::new(7);
    let place = Place::new();
    let mut child = Maker::child(&Maker::new(3, 4 * MIB), "disk.img");
    child.parent_id = [0; 16];
    child.locators = vec![(*b"W2ru", relative(".\\disk.img"), 512)];
    let child = child.put(MIB, &dice.bytes(512));
    let top = place.make("c.vhd", &child);
    for len in [4 * MIB, MIB, 512 + 100] {
        std::fs::write(place.at("disk.img"), dice.bytes(len as usize)).unwrap();
        let expected = Reference::open(&[&top, &place.at("disk.img")]).read();
        assert_same(&read(&top), &expected, &format!("raw parent of {len}"));
    }
    std::fs::write(place.at("disk.img"), dice.bytes(4 << 20 | 512)).unwrap();
    Chain::open(&top, &ChainOptions::read_only()).unwrap_err();
    place.make("disk.img", &Maker::new(3, 4 * MIB));
    Chain::open(&top, &ChainOptions::read_only()).unwrap_err();
    // A parent VHD that is larger than its child, and one that is smaller.
    let large = Maker::new(3, 8 * MIB);
    let small = Maker::new(3, MIB).put(0, &dice.bytes(4096));
    for (parent, fits) in [(large, false), (small, true)] {
        let mut child = Maker::child(&parent, "p.vhd");
        (child.size, child.original) = (5 * MIB + 512, 5 * MIB + 512);
        let below = place.make("p.vhd", &parent);
        let top = place.make("c.vhd", &child);
        let opened = Chain::open(&top, &ChainOptions::read_only());
        assert_eq!(opened.is_ok(), fits);
        if fits {
            assert_same(&read(&top), &Reference::open(&[&top, &below]).read(), "smaller parent");
        }
    }
}

/// Formats of similar names are refused by name (case 40).
#[test]
fn other_formats_are_refused() {
    let place = Place::new();
    for (name, content, word) in [
        ("a.vhdx", b"vhdxfile".to_vec(), "VHDX"),
        ("a.avhdx", b"vhdxfile".to_vec(), "VHDX"),
        ("a.vhds", vec![0; 4096], "VHD set"),
        ("a.vhd", vec![0; 4096], "no VHD footer"),
        ("dead.vhd", b"v_poison".to_vec(), "v_poison"),
    ] {
        let mut bytes = content;
        bytes.resize(4096, 0);
        std::fs::write(place.at(name), bytes).unwrap();
        let error = Vhd::open(&place.at(name), &OpenOptions::read_only()).unwrap_err();
        assert!(error.to_string().contains(word), "{error}");
    }
}
