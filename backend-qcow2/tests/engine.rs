//! New images, backing files, locks, dirty images, bitmaps and the writer, judged by qemu-img and qemu-io.

mod judge;

use std::path::Path;
use std::process::{Command, Stdio};

use backend_qcow2::image::{
    ActiveWriter, Backing, ClusterBits, Compression, ErrorKind, GuestCluster, Image, InPlace, Mapping,
    NewImage, NewSnapshot, OpenOptions, compress, create, list_bitmaps, probe,
};
use judge::{Bench, clean, content, info, io, run, text, try_run};

fn open(path: &Path) -> Image {
    Image::open(path, &OpenOptions::read_write()).unwrap()
}

#[test]
fn new_images_of_every_kind_are_clean_and_take_writes() {
    let bench = Bench::new();
    let mut n = 0;
    let mut try_one = |new: NewImage| {
        n += 1;
        let path = bench.path(&format!("{n}.qcow2"));
        create(&path, &new).unwrap_or_else(|e| panic!("{new:?}: {e}"));
        clean(&path);
        assert_eq!(info(&path)["virtual-size"].as_u64(), Some(new.virtual_size), "{new:?}");
        io(&path, &["write -P 3 0 64k", "read -P 3 0 64k"]);
        clean(&path);
        assert!(Image::open(&path, &OpenOptions::read_only()).unwrap().check().unwrap().is_clean());
    };
    for bits in 9..=21 {
        let mut new = NewImage::new(100 << 20);
        new.cluster_bits = ClusterBits::new(bits).unwrap();
        try_one(new);
    }
    for order in 0..=6 {
        let mut new = NewImage::new(100 << 20);
        new.refcount_bits = 1 << order;
        new.cluster_bits = ClusterBits::new(9).unwrap();
        try_one(new);
    }
    let mut new = NewImage::new(100 << 20);
    new.version = 2;
    try_one(new);
    let mut new = NewImage::new(100 << 20);
    (new.extended_l2, new.compression, new.lazy_refcounts) = (true, Compression::Zstd, true);
    try_one(new);
    try_one(NewImage::new(1 << 50));
}

#[test]
fn what_cannot_be_made_is_refused_and_leaves_no_file() {
    let bench = Bench::new();
    let path = bench.path("a.qcow2");
    let mut odd = NewImage::new(1000);
    assert_eq!(create(&path, &odd).unwrap_err().kind(), ErrorKind::InvalidInput);
    odd.virtual_size = (1 << 63) - 512;
    assert_eq!(create(&path, &odd).unwrap_err().kind(), ErrorKind::LimitExceeded);
    odd = NewImage::new(1 << 20);
    (odd.version, odd.extended_l2) = (2, true);
    assert_eq!(create(&path, &odd).unwrap_err().kind(), ErrorKind::InvalidInput);
    odd = NewImage::new(1 << 20).on(Backing { file: "x".repeat(1024), format: None });
    assert_eq!(create(&path, &odd).unwrap_err().kind(), ErrorKind::InvalidInput);
    assert!(!path.exists());
    std::fs::write(&path, "mine").unwrap();
    assert_eq!(create(&path, &NewImage::new(512)).unwrap_err().kind(), ErrorKind::FileExists);
    assert_eq!(std::fs::read(&path).unwrap(), b"mine");
}

/// An overlay reads its backing file, and its mode is private.
#[test]
fn overlay_reads_its_backing_file_and_is_private() {
    use std::os::unix::fs::PermissionsExt;
    let bench = Bench::new();
    let base = bench.qemu_image("base.qcow2", "cluster_size=64k", "4M");
    io(&base, &["write -P 8 1M 1M"]);
    let path = bench.path("top.qcow2");
    let backing = Backing { file: "base.qcow2".into(), format: Some("qcow2".into()) };
    create(&path, &NewImage::new(4 << 20).on(backing.clone())).unwrap();
    clean(&path);
    io(&path, &["read -P 0 0 1M", "read -P 8 1M 1M", "write -P 9 1M 64k", "read -P 9 1M 64k"]);
    assert_eq!(std::fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
    let summary = probe(&path).unwrap().unwrap();
    assert_eq!((summary.virtual_size, summary.backing), (4 << 20, Some(backing)));
    assert!(probe(&bench.path("nothing")).is_err());
    std::fs::write(bench.path("raw"), [0; 4096]).unwrap();
    assert_eq!(probe(&bench.path("raw")).unwrap(), None);
}

/// The backing file can be changed back and forth in every kind of first cluster.
#[test]
fn backing_file_changes_in_any_first_cluster() {
    let bench = Bench::new();
    for options in ["cluster_size=512", "cluster_size=1k", "cluster_size=64k", "cluster_size=4k,compat=0.10"]
    {
        let tag = options.replace(['=', ','], "-");
        for name in ["a", "b-with-a-longer-name"] {
            let base = bench.path(name);
            if !base.exists() {
                run("qemu-img", &["create", "-q", "-f", "qcow2", text(&base), "1M"]);
            }
        }
        let path = bench.qemu_image(&format!("{tag}.qcow2"), options, "1M");
        io(&path, &["write -P 5 0 64k"]);
        let a = Backing { file: "a".into(), format: Some("qcow2".into()) };
        let b = Backing { file: "b-with-a-longer-name".into(), format: Some("qcow2".into()) };
        let plain = Backing { file: "a".into(), format: None };
        for want in
            [Some(a.clone()), Some(b.clone()), Some(a.clone()), None, Some(b), Some(plain), Some(a), None]
        {
            open(&path).set_backing(want.clone()).unwrap_or_else(|e| panic!("{options} to {want:?}: {e}"));
            assert_eq!(probe(&path).unwrap().unwrap().backing, want, "{options}");
            let reported = info(&path);
            assert_eq!(
                reported["backing-filename"].as_str(),
                want.as_ref().map(|b| b.file.as_str()),
                "{options}: {reported}"
            );
            let format = want.and_then(|b| b.format);
            assert_eq!(
                reported["backing-filename-format"].as_str(),
                format.as_deref(),
                "{options}: {reported}"
            );
            clean(&path);
            io(&path, &["read -P 5 0 64k"]);
        }
    }
}

#[test]
fn qemu_and_we_refuse_each_other_while_writing() {
    let bench = Bench::new();
    let path = bench.qemu_image("a.qcow2", "cluster_size=64k", "1M");
    let ours = open(&path);
    let (ok, said) = try_run("qemu-img", &["snapshot", "-c", "x", text(&path)]);
    assert!(!ok && said.contains("lock"), "{said}");
    let (ok, said) = try_run("qemu-img", &["info", text(&path)]);
    assert!(!ok && said.contains("lock"), "{said}");
    run("qemu-img", &["info", "-U", text(&path)]);
    drop(ours);
    // A reader of ours lets readers in, and no writer.
    let ours = Image::open(&path, &OpenOptions::read_only()).unwrap();
    run("qemu-img", &["info", text(&path)]);
    assert!(!try_run("qemu-img", &["snapshot", "-c", "x", text(&path)]).0);
    drop(ours);

    // qemu-io, waiting for commands, holds the image.
    let hold = |read_only: bool| {
        let mut c = Command::new("qemu-io");
        c.args(["-f", "qcow2"]).args(read_only.then_some("-r")).arg(&path);
        let mut child = c.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
        use std::io::{Read, Write};
        // Its answer to a command says that the image is open.
        child.stdin.as_mut().unwrap().write_all(b"length\n").unwrap();
        let mut seen = String::new();
        while !seen.contains("MiB") {
            let mut b = [0; 64];
            let n = child.stdout.as_mut().unwrap().read(&mut b).unwrap();
            assert!(n > 0, "qemu-io ended: {seen}");
            seen.push_str(&String::from_utf8_lossy(&b[..n]));
        }
        child
    };
    let mut qemu = hold(false);
    for options in [OpenOptions::read_write(), OpenOptions::read_only()] {
        let e = Image::open(&path, &options).unwrap_err();
        assert_eq!(e.kind(), ErrorKind::Locked, "{e}");
        assert!(e.to_string().contains("shut the domain down"), "{e}");
    }
    Image::open(&path, &OpenOptions::read_only().unlocked()).unwrap();
    drop(qemu.stdin.take());
    qemu.wait().unwrap();
    let mut qemu = hold(true);
    assert_eq!(Image::open(&path, &OpenOptions::read_write()).unwrap_err().kind(), ErrorKind::Locked);
    Image::open(&path, &OpenOptions::read_only()).unwrap();
    drop(qemu.stdin.take());
    qemu.wait().unwrap();
    open(&path);
}

/// A dirty image gets its refcounts rebuilt before the first write.
#[test]
fn dirty_image_is_rebuilt_before_the_first_write() {
    let bench = Bench::new();
    let path = bench.qemu_image("a.qcow2", "cluster_size=4k,lazy_refcounts=on", "64M");
    // Killed before it could write its refcounts.
    let _ = try_run(
        "qemu-io",
        &["-f", "qcow2", "-c", "write -P 6 0 20M", "-c", "flush", "-c", "sigraise 9", text(&path)],
    );
    assert!(probe(&path).unwrap().unwrap().dirty, "qemu-io left no dirty bit");
    let reader = Image::open(&path, &OpenOptions::read_only()).unwrap();
    assert!(!reader.check().unwrap().is_sound());
    drop(reader);
    open(&path).create_snapshot(&NewSnapshot::new("after", 1, 0)).unwrap();
    assert!(!probe(&path).unwrap().unwrap().dirty);
    clean(&path);
    io(&path, &["read -P 6 0 20M"]);
}

/// Corrupt and encrypted images, and those with external data, are refused with the reason.
#[test]
fn unsupported_images_are_refused_with_the_reason() {
    let bench = Bench::new();
    let path = bench.qemu_image("a.qcow2", "cluster_size=64k", "1M");
    let mut bytes = std::fs::read(&path).unwrap();
    bytes[79] |= 2;
    std::fs::write(&path, &bytes).unwrap();
    let e = Image::open(&path, &OpenOptions::read_write()).unwrap_err();
    assert!(e.kind() == ErrorKind::Corrupt && e.to_string().contains("marked as corrupt"), "{e}");

    let data = bench.path("data.raw");
    let path = bench.qemu_image("b.qcow2", &format!("data_file={}", text(&data)), "1M");
    let e = open(&path).create_snapshot(&NewSnapshot::new("s", 1, 0)).unwrap_err();
    assert!(e.kind() == ErrorKind::Unsupported && e.to_string().contains("external data file"), "{e}");
    clean(&path);

    let path = bench.path("c.qcow2");
    let secret = "secret,id=s,data=geheim";
    run(
        "qemu-img",
        &[
            "create",
            "-q",
            "-f",
            "qcow2",
            "--object",
            secret,
            "-o",
            "encrypt.format=luks,encrypt.key-secret=s,encrypt.iter-time=10",
            text(&path),
            "1M",
        ],
    );
    let mut image = open(&path);
    image.create_snapshot(&NewSnapshot::new("s", 1, 0)).unwrap();
    image.apply_snapshot("s").unwrap();
    assert!(image.check().unwrap().is_clean());
    let e = ActiveWriter::new(&mut image, InPlace::Never).unwrap_err();
    assert!(e.kind() == ErrorKind::Unsupported && e.to_string().contains("LUKS"), "{e}");
}

/// Persistent bitmaps stay valid through a snapshot, and are marked as in use after an apply.
#[test]
fn bitmaps_survive_a_snapshot_and_not_an_apply() {
    let bench = Bench::new();
    let path = bench.qemu_image("a.qcow2", "cluster_size=64k", "8M");
    run("qemu-img", &["bitmap", "--add", text(&path), "b0"]);
    run("qemu-img", &["bitmap", "--add", "-g", "128k", text(&path), "b1"]);
    io(&path, &["write -P 1 0 1M"]);
    let mut image = open(&path);
    image.create_snapshot(&NewSnapshot::new("s", 1, 0)).unwrap();
    let list = list_bitmaps(&image).unwrap();
    assert_eq!(
        list.iter().map(|b| (b.name.as_str(), b.in_use)).collect::<Vec<_>>(),
        [("b0", false), ("b1", false)]
    );
    drop(image);
    clean(&path);
    io(&path, &["write -P 2 0 1M"]);
    let mut image = open(&path);
    image.apply_snapshot("s").unwrap();
    assert!(list_bitmaps(&image).unwrap().iter().all(|b| b.in_use));
    assert!(image.check().unwrap().is_clean());
    drop(image);
    clean(&path);
    let reported = info(&path).to_string();
    assert!(reported.contains("in-use"), "{reported}");
    io(&path, &["read -P 1 0 1M"]);
    open(&path).set_virtual_size(16 << 20).unwrap();
    clean(&path);
    info(&path);
}

/// The writer writes every kind of cluster, and never one that a snapshot has.
#[test]
fn writer_never_overwrites_snapshot_data() {
    let bench = Bench::new();
    for (options, method) in [
        ("cluster_size=4k", Compression::Deflate),
        ("cluster_size=64k,compression_type=zstd", Compression::Zstd),
        ("cluster_size=16k,extended_l2=on", Compression::Deflate),
        ("cluster_size=512", Compression::Deflate),
        ("cluster_size=4k,compat=0.10", Compression::Deflate),
    ] {
        let path = bench.qemu_image(&format!("{}.qcow2", options.replace(['=', ','], "-")), options, "8M");
        io(&path, &["write -P 1 0 8M"]);
        let mut image = open(&path);
        let size = image.geometry().cluster_bits.size();
        image.create_snapshot(&NewSnapshot::new("s", 1, 0)).unwrap();
        drop(image);
        let before = content(&path, None);
        image = open(&path);
        for in_place in [InPlace::Never, InPlace::Allowed] {
            let mut w = ActiveWriter::new(&mut image, in_place).unwrap();
            w.write_data(GuestCluster(2), &vec![7; size as usize * 5]).unwrap();
            w.write_zeros(GuestCluster(8), 2).unwrap();
            for n in 10..14 {
                let packed = compress(method, &vec![n as u8; size as usize]).unwrap().unwrap();
                w.write_compressed(GuestCluster(n), &packed).unwrap();
            }
            w.discard(GuestCluster(14), 1).unwrap();
            assert!(matches!(w.mapping(GuestCluster(11)).unwrap(), Mapping::Compressed(_)));
            assert!(w.write_data(GuestCluster(u64::MAX), &vec![0; size as usize]).is_err());
            drop(w);
            drop(image);
            image = open(&path);
            let mut w = ActiveWriter::new(&mut image, in_place).unwrap();
            w.write_data(GuestCluster(2), &vec![7; size as usize * 5]).unwrap();
            w.write_zeros(GuestCluster(8), 2).unwrap();
            for n in 10..14 {
                let packed = compress(method, &vec![n as u8; size as usize]).unwrap().unwrap();
                w.write_compressed(GuestCluster(n), &packed).unwrap();
            }
            w.discard(GuestCluster(14), 1).unwrap();
            w.finish().unwrap();
            assert!(image.check().unwrap().is_clean(), "{options}: {:?}", image.check());
        }
        drop(image);
        clean(&path);
        let mut want = before.clone();
        let mut put = |from: u64, count: u64, byte: u8| {
            want[(from * size) as usize..((from + count) * size) as usize].fill(byte)
        };
        put(2, 5, 7);
        put(8, 2, 0);
        for n in 10..14 {
            put(n, 1, n as u8);
        }
        put(14, 1, 0);
        assert!(content(&path, None) == want, "{options}");
        assert!(content(&path, Some("s")) == before, "{options}");
    }
}
