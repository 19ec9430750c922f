//! Takes a kernel out of its bzImage, so that QEMU can start it directly (PVH) and the guest need not decompress it.

use std::{
    io::Write,
    process::{Command, Stdio},
    thread,
};

use anyhow::{Context, Result, ensure};

/// Legacy LZ4 frames begin so, little endian.
const LZ4: u32 = 0x184c_2102;

/// XZ streams begin so.
const XZ: &[u8] = b"\xfd7zXZ\0";

/// The kernel as an ELF file; none where the image is not LZ4, as Debian's cloud kernels are, or does not hold together.
pub fn uncompressed(image: &[u8]) -> Option<Vec<u8>> {
    let payload = payload(image)?;
    if number(payload, 0)? != LZ4 {
        return None;
    }
    let (mut kernel, mut at) = (Vec::new(), 4);
    // What follows the last block is the size of it all.
    while let Some(size) = number(payload, at) {
        let Some(block) = payload.get(at + 4..(at + 4).checked_add(size as usize)?) else { break };
        if size == 0 {
            break;
        }
        decompress(block, &mut kernel)?;
        at += 4 + size as usize;
    }
    kernel.starts_with(b"\x7fELF").then_some(kernel)
}

/// The kernel as an ELF file, where the image is LZ4 or, as Debian's full kernels are, XZ.
///
/// # Errors
/// `xz` is missing, or the image is neither.
pub fn elf(image: &[u8]) -> Result<Vec<u8>> {
    if let Some(kernel) = uncompressed(image) {
        return Ok(kernel);
    }
    let payload = payload(image).filter(|payload| payload.starts_with(XZ));
    let payload =
        payload.context("the kernel is compressed neither by LZ4 nor by XZ: another one is needed")?.to_vec();
    // The size of the kernel follows the stream.
    let mut child = Command::new("xz")
        .args(["--decompress", "--stdout", "--single-stream"])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .context("xz, which the kernel is compressed by, cannot be started: run scripts/install-deps")?;
    let mut stdin = child.stdin.take().context("xz has no standard input")?;
    let writer = thread::spawn(move || stdin.write_all(&payload));
    let output = child.wait_with_output()?;
    // It may end before it has read all.
    let _ = writer.join();
    ensure!(
        output.stdout.starts_with(b"\x7fELF"),
        "xz did not find a kernel in the image ({})",
        output.status
    );
    Ok(output.stdout)
}

/// Documentation/arch/x86/boot.rst: setup_sects, payload_offset and payload_length.
fn payload(image: &[u8]) -> Option<&[u8]> {
    let setup = match *image.get(0x1f1)? {
        0 => 4,
        sectors => usize::from(sectors),
    };
    let start = (setup + 1) * 512 + number(image, 0x248)? as usize;
    image.get(start..start.checked_add(number(image, 0x24c)? as usize)?)
}

fn number(bytes: &[u8], at: usize) -> Option<u32> {
    Some(u32::from_le_bytes(bytes.get(at..at + 4)?.try_into().ok()?))
}

/// One block: sequences of literals and of a copy from what is there already.
fn decompress(block: &[u8], out: &mut Vec<u8>) -> Option<()> {
    let mut at = 0;
    while let Some(&token) = block.get(at) {
        at += 1;
        let literals = length(block, &mut at, token >> 4)?;
        out.extend_from_slice(block.get(at..at + literals)?);
        at += literals;
        if at == block.len() {
            break;
        }
        let distance = usize::from(u16::from_le_bytes(block.get(at..at + 2)?.try_into().ok()?));
        at += 2;
        let size = length(block, &mut at, token & 15)? + 4;
        let from = out.len().checked_sub(distance).filter(|_| distance > 0)?;
        // It may reach into what it writes itself.
        for position in from..from + size {
            out.push(out[position]);
        }
    }
    Some(())
}

fn length(block: &[u8], at: &mut usize, nibble: u8) -> Option<usize> {
    let mut length = usize::from(nibble);
    if nibble == 15 {
        loop {
            let &more = block.get(*at)?;
            *at += 1;
            length += usize::from(more);
            if more != 255 {
                break;
            }
        }
    }
    Some(length)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn literals_and_copies_that_reach_into_themselves_are_decompressed() {
        // Three literals, a copy of 7 from 3 back, then two literals.
        let mut out = Vec::new();
        decompress(&[0x33, b'a', b'b', b'c', 3, 0, 0x20, b'x', b'y'], &mut out).expect("it holds together");
        assert_eq!(out, b"abcabcabcaxy");
    }

    #[test]
    fn a_copy_from_before_the_beginning_is_refused() {
        assert_eq!(decompress(&[0x10, b'a', 2, 0, 0], &mut Vec::new()), None);
    }

    #[test]
    fn another_compression_is_not_taken_apart() {
        let mut image = vec![0; 8192];
        image[0x1f1] = 1;
        image[0x24c] = 8;
        assert_eq!(uncompressed(&image), None);
    }
}
