//! Room for a memory image, looked at before a create begins.
//!
//! A memory image has the pages of the guest that are not zeros. How many these are is found by a sample:
//! pages at equal distances are read in QEMU's memory, which nothing notices. The least that the image needs
//! is the number that the sample makes certain, short of a chance of one in a thousand. Where QEMU's memory
//! cannot be read, nothing is refused.

use std::fs::File;
use std::os::unix::fs::FileExt;

use camino::Utf8Path;
use snapcore::hypervisor::DomainStep;
use snapcore::{Error, ErrorKind, Plan, Result, StepRef, free_bytes, shown_size};

use super::error::blocking;
use crate::gdb::monitor;
use crate::machine::Machine;

/// Pages that are read.
const SAMPLES: u64 = 1024;
/// Bytes of a page.
const PAGE: u64 = 4096;
/// The least memory that is looked at.
const LEAST: u64 = 16 << 20;

/// One block of the guest's memory in QEMU's address space.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Block {
    address: u64,
    bytes: u64,
}

/// Refuses a plan that saves memory where there is no room for it.
///
/// # Errors
/// [`ErrorKind::NoSpace`], with the numbers.
pub(super) async fn require(machine: &Machine, plan: &Plan) -> Result<()> {
    let images = plan.steps().find_map(|placed| match placed.step {
        StepRef::Domain(step) => match &step.action {
            DomainStep::SaveMemory { image, .. } => Some(image.clone()),
            _ => None,
        },
        StepRef::Disk(_) => None,
    });
    let Some(image) = images else { return Ok(()) };
    let (Some(path), Some(pid)) = (image.local().map(Utf8Path::to_owned), machine.pid()) else {
        return Ok(());
    };
    let Ok(text) = monitor(machine, "looking at the guest's memory", "info ramblock").await else {
        return Ok(());
    };
    blocking(move || {
        let Some(needed) = least_of(pid, &blocks(&text)) else { return Ok(Ok(())) };
        Ok(fits(&path, needed))
    })
    .await?
}

fn fits(image: &Utf8Path, needed: u64) -> Result<()> {
    let there = |above: &&Utf8Path| above.symlink_metadata().is_ok();
    let Some(directory) = image.ancestors().skip(1).find(there) else { return Ok(()) };
    let Some(free) = free_bytes(directory).filter(|free| *free < needed) else { return Ok(()) };
    let (needed, free) = (shown_size(needed), shown_size(free));
    Err(Error::new(
        ErrorKind::NoSpace,
        format!("the image of the guest's memory needs at least {needed}, and {directory} has {free} free"),
    )
    .state("no changes made")
    .advise("free space there, or take the disks alone with --disk-only"))
}

/// The blocks that QEMU's list has, by their addresses. QEMU 7.2 does not tell those.
fn blocks(text: &str) -> Vec<Block> {
    let mut lines = text.lines();
    let columns = lines.next().map_or(0, |head| usize::from(head.contains("HVA")));
    let parse = |word: &str| u64::from_str_radix(word.strip_prefix("0x")?, 16).ok();
    let block = |line: &str| {
        let numbers: Vec<u64> = line.split_whitespace().filter_map(parse).collect();
        // Offset, used, total, address.
        match numbers[..] {
            [_, bytes, _, address] if columns == 1 && bytes >= LEAST && address % PAGE == 0 => {
                Some(Block { address, bytes })
            }
            _ => None,
        }
    };
    lines.filter_map(block).collect()
}

/// The least bytes of pages that are not zeros; `None` if that cannot be found out.
fn least_of(pid: u32, blocks: &[Block]) -> Option<u64> {
    let memory = File::open(format!("/proc/{pid}/mem")).ok()?;
    let mut least = 0u64;
    for block in blocks {
        let pages = block.bytes / PAGE;
        let samples = SAMPLES.min(pages).max(1);
        let mut used = 0u64;
        let mut page = [0; PAGE as usize];
        for number in 0..samples {
            // A place of its own in each part, so that no regular structure of the guest is met.
            let part = pages / samples;
            let within = number.wrapping_mul(0x9e37_79b9_7f4a_7c15) % part.max(1);
            let at = block.address.checked_add((number * part + within) * PAGE)?;
            memory.read_exact_at(&mut page, at).ok()?;
            used += u64::from(page.iter().any(|byte| *byte != 0));
        }
        least = least.saturating_add(certain_part(used, samples, block.bytes));
    }
    Some(least)
}

/// The part of `bytes` of which it is certain that it is in use, if `used` of `samples` are.
fn certain_part(used: u64, samples: u64, bytes: u64) -> u64 {
    let share = used as f64 / samples as f64;
    // Three standard deviations of the share.
    let error = 3.0 * (share * (1.0 - share) / samples as f64).sqrt();
    ((share - error).max(0.0) * bytes as f64) as u64
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn blocks_are_read_from_both_forms_of_the_list() {
        let new = "              Block Name    PSize              Offset               Used              Total                HVA  RO\n\
                   \x20                 pc.ram    4 KiB  0x0000000000000000 0x0000000010000000 0x0000000010000000 0x00007f0a34000000  rw\n\
                   \x20              vga.vram    4 KiB  0x0000000010000000 0x0000000000010000 0x0000000001000000 0x00007f0a33000000  rw\n";
        assert_eq!(blocks(new), [Block { address: 0x7f0a_3400_0000, bytes: 256 << 20 }]);
        let old = "              Block Name    PSize              Offset               Used              Total\n\
                   \x20                 pc.ram    4 KiB  0x0000000000000000 0x0000000010000000 0x0000000010000000\n";
        assert_eq!(blocks(old), []);
        assert_eq!(blocks(""), []);
    }

    #[test]
    fn certain_part_is_below_the_share() {
        assert_eq!(certain_part(0, 1024, 1 << 30), 0);
        assert_eq!(certain_part(1024, 1024, 1 << 30), 1 << 30);
        let half = certain_part(512, 1024, 1 << 30);
        assert!(half < 1 << 29 && half > (1 << 29) - (64 << 20), "{half}");
    }

    /// The memory of a process is counted by its content.
    #[test]
    fn pages_with_content_are_counted() {
        let bytes = 32 << 20;
        let mut memory = vec![0u8; bytes + PAGE as usize];
        let address = (memory.as_ptr() as u64).next_multiple_of(PAGE);
        let start = (address - memory.as_ptr() as u64) as usize;
        memory[start..start + bytes / 2].fill(7);
        let block = Block { address, bytes: bytes as u64 };
        let least = least_of(std::process::id(), &[block]).unwrap();
        assert!(least <= 16 << 20 && least > 14 << 20, "{least}");
    }
}
