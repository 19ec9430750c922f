//! Random chains of images, built by `qemu-img` and `qemu-io` and judged by them.
#![allow(dead_code)] // each suite uses its part

use std::path::{Path, PathBuf};
use std::process::Command;

/// A small generator of random numbers that is the same everywhere.
pub struct Dice(u64);

impl Dice {
    pub fn new(seed: u64) -> Self {
        Self(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1)
    }
    pub fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 16
    }
    pub fn below(&mut self, end: u64) -> u64 {
        self.next() % end
    }
    pub fn one_in(&mut self, n: u64) -> bool {
        self.below(n) == 0
    }
    pub fn pick<T: Copy>(&mut self, from: &[T]) -> T {
        from[self.below(from.len() as u64) as usize]
    }
}

/// Runs a program that must succeed; gives its standard output.
pub fn run(program: &str, args: &[&str]) -> String {
    let output =
        Command::new(program).args(args).env("LC_ALL", "C").output().expect("qemu-utils are installed");
    let (out, err) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert!(output.status.success(), "{program} {args:?} failed\n{out}{err}");
    out.into_owned()
}

/// One layer, as it was made.
#[derive(Debug, Clone)]
pub struct Made {
    pub path: PathBuf,
    pub cluster: u64,
    pub size: u64,
    pub version: u32,
    pub tags: Vec<String>,
}

/// The shape of the chains.
#[derive(Debug, Clone, Copy)]
pub struct Shape {
    pub depth: u64,
    pub cluster_bits: &'static [u32],
    pub resized: bool,
    pub snapshots: bool,
    pub writes: u64,
}

pub fn text(path: &Path) -> &str {
    path.to_str().unwrap()
}

/// Builds a chain, the bottom first.
pub fn build(dir: &Path, dice: &mut Dice, shape: Shape) -> Vec<Made> {
    let mut chain: Vec<Made> = Vec::new();
    let common = 512 * (200 + dice.below(1000));
    for n in 0..shape.depth {
        let bits = dice.pick(shape.cluster_bits);
        let version = if dice.one_in(3) { 2 } else { 3 };
        let extended = version == 3 && bits >= 14 && dice.one_in(2);
        let zstd = version == 3 && dice.one_in(3);
        let size = if shape.resized && dice.one_in(2) { 512 * (100 + dice.below(1200)) } else { common };
        let path = dir.join(format!("l{n}.qcow2"));
        let mut options =
            format!("cluster_size={},compat={}", 1u64 << bits, if version == 2 { "0.10" } else { "1.1" });
        if extended {
            options += ",extended_l2=on";
        }
        if zstd {
            options += ",compression_type=zstd";
        }
        let size_word = size.to_string();
        let mut args = vec!["create", "-q", "-f", "qcow2", "-o", &options];
        let backing = chain.last().map(|below| below.path.file_name().unwrap().to_str().unwrap().to_owned());
        if let Some(backing) = &backing {
            args.extend(["-b", backing, "-F", "qcow2"]);
        }
        args.extend([text(&path), &size_word]);
        run("qemu-img", &args);
        let mut made = Made { path, cluster: 1 << bits, size, version, tags: Vec::new() };
        if dice.one_in(2) {
            pack(&made, dice);
        }
        if shape.snapshots && dice.one_in(2) {
            scribble(&made, dice, shape.writes / 2);
            let tag = format!("t{n}");
            run("qemu-img", &["snapshot", "-c", &tag, text(&made.path)]);
            made.tags.push(tag);
        }
        scribble(&made, dice, shape.writes);
        chain.push(made);
    }
    chain
}

/// Writes at random: data, compressed data, zeros, discards.
pub fn scribble(layer: &Made, dice: &mut Dice, writes: u64) {
    let mut args: Vec<String> = ["-d", "unmap", "-f", "qcow2"].map(str::to_owned).to_vec();
    for _ in 0..1 + dice.below(writes) {
        let byte = 1 + dice.below(250);
        let span = dice.pick(&[512, 4096, 40 << 10, 200 << 10]).min(layer.size);
        let length = 512 * (1 + dice.below(span / 512));
        let at = 512 * dice.below((layer.size - length) / 512 + 1);
        let command = match dice.below(10) {
            0 | 1 => format!("write -z {at} {length}"),
            2 => format!("write -z -u {at} {length}"),
            3 => format!("discard {at} {length}"),
            _ => format!("write -P {byte} {at} {length}"),
        };
        args.extend(["-c".to_owned(), command]);
    }
    args.push(text(&layer.path).to_owned());
    let args: Vec<&str> = args.iter().map(String::as_str).collect();
    run("qemu-io", &args);
}

/// Writes compressed clusters into a layer that has nothing yet: over what is mapped, QEMU fails, and then
/// leaves refcounts that its own check complains of.
fn pack(layer: &Made, dice: &mut Dice) {
    let mut args: Vec<String> = ["-f", "qcow2"].map(str::to_owned).to_vec();
    let mut cluster = dice.below(8);
    for _ in 0..dice.below(5) {
        let count = 1 + dice.below(4);
        if (cluster + count) * layer.cluster > layer.size {
            break;
        }
        let (byte, at) = (1 + dice.below(250), cluster * layer.cluster);
        args.extend(["-c".to_owned(), format!("write -c -P {byte} {at} {}", count * layer.cluster)]);
        cluster += count + dice.below(8);
    }
    if args.len() > 2 {
        args.push(text(&layer.path).to_owned());
        let args: Vec<&str> = args.iter().map(String::as_str).collect();
        run("qemu-io", &args);
    }
}

/// The bytes of an image through its chain, or of a snapshot in it, as QEMU reads them.
pub fn read(image: &Path, tag: Option<&str>) -> Vec<u8> {
    let raw = tempfile::NamedTempFile::new_in(image.parent().unwrap()).unwrap();
    let selector = tag.map(|tag| format!("snapshot.name={tag}"));
    let mut args = vec!["convert", "-U", "-f", "qcow2", "-O", "raw"];
    if let Some(selector) = &selector {
        args.extend(["-l", selector]);
    }
    args.extend([text(image), text(raw.path())]);
    run("qemu-img", &args);
    std::fs::read(raw.path()).unwrap()
}

/// `qemu-img check` finds no error; nor a leak, unless they are allowed.
pub fn check(image: &Path, leaks_allowed: bool) {
    let output = Command::new("qemu-img").args(["check", "-U", "-f", "qcow2"]).arg(image).output().unwrap();
    let fine = match output.status.code() {
        Some(0) => true,
        Some(3) => leaks_allowed,
        _ => false,
    };
    assert!(
        fine,
        "{image:?}: {}{}",
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr)
    );
}

/// Checks that two byte strings are equal, and names the first difference.
pub fn assert_same(found: &[u8], expected: &[u8], what: &str) {
    assert_eq!(found.len(), expected.len(), "{what}: length");
    if let Some(at) = (0..found.len()).find(|n| found[*n] != expected[*n]) {
        panic!("{what}: byte {at:#x} is {:#x} instead of {:#x}", found[at], expected[at]);
    }
}
