//! Refcounts: the number of references to each cluster of the file, and the allocation of free clusters.
//!
//! Refcount blocks are read when first needed and changed in memory. Nothing is durable before
//! [`Refcounts::write_back`], and nothing that uses an allocated cluster may become visible before it. Its
//! order:
//!
//! 1. Write the blocks; flush.
//! 2. Write the table entries of new blocks, or a moved table, which the caller's header write switches to;
//!    flush.
//! 3. Blocks that other new blocks count come after those, with a flush between.
//!
//! So a table entry never refers to a block that is incomplete or not counted. A crash leaves refcounts that
//! are too high at worst. For that the caller must raise a refcount before it makes the reference, and lower
//! it only after the reference is durably gone.

use super::error::{Error, ErrorKind, Result};
use super::file::ImageFile;
use super::header::{Header, MAX_REFTABLE_BYTES, SECTOR};
use super::units::{ClusterBits, ClusterIndex, HostOffset};

/// Limit of refcount blocks in memory. Beyond it, changed blocks are written and all are dropped.
const MAX_LOADED_BYTES: usize = 160 << 20;
/// The same limit for an estimate, which must not write any: the blocks of 32 TiB in clusters of 64 KiB.
const MAX_ESTIMATE_BYTES: usize = 1 << 30;
/// Bytes of a file system block, the least that a write occupies.
pub(super) const FILE_BLOCK: u64 = 4096;
/// Adjacent changed blocks are written together up to this many bytes.
const WRITE_RUN: usize = 4 << 20;
/// Bits 9 to 63 of a table entry are the block's offset.
const BLOCK_OFFSET_MASK: u64 = !0x1ff;

/// Reads and writes one entry of a refcount block, for each width.
trait Width {
    const MAX: u64;
    fn get(block: &[u8], index: usize) -> u64;
    fn set(block: &mut [u8], index: usize, value: u64);
}

macro_rules! bit_width {
    ($name:ident, $bits:literal) => {
        struct $name;
        impl Width for $name {
            const MAX: u64 = (1 << $bits) - 1;
            #[inline(always)]
            fn get(block: &[u8], index: usize) -> u64 {
                let byte = block.get(index * $bits / 8).copied().unwrap_or(0);
                u64::from(byte) >> (index * $bits % 8) & Self::MAX
            }
            #[inline(always)]
            fn set(block: &mut [u8], index: usize, value: u64) {
                if let Some(byte) = block.get_mut(index * $bits / 8) {
                    let shift = index * $bits % 8;
                    *byte = *byte & !((Self::MAX as u8) << shift) | (value as u8) << shift;
                }
            }
        }
    };
}
macro_rules! byte_width {
    ($name:ident, $int:ty) => {
        struct $name;
        impl Width for $name {
            const MAX: u64 = <$int>::MAX as u64;
            #[inline(always)]
            fn get(block: &[u8], index: usize) -> u64 {
                const N: usize = size_of::<$int>();
                block
                    .get(index * N..index * N + N)
                    .and_then(|b| b.try_into().ok())
                    .map_or(0, |b| <$int>::from_be_bytes(b) as u64)
            }
            #[inline(always)]
            fn set(block: &mut [u8], index: usize, value: u64) {
                const N: usize = size_of::<$int>();
                if let Some(b) = block.get_mut(index * N..index * N + N) {
                    b.copy_from_slice(&(value as $int).to_be_bytes());
                }
            }
        }
    };
}
bit_width!(W1, 1);
bit_width!(W2, 2);
bit_width!(W4, 4);
byte_width!(W8, u8);
byte_width!(W16, u16);
byte_width!(W32, u32);
byte_width!(W64, u64);

/// Calls a generic function with the width of an order.
macro_rules! with_width {
    ($order:expr, $f:ident :: <_ $(, $g:ty)*> ($($arg:expr),*)) => {
        match $order {
            0 => $f::<W1 $(, $g)*>($($arg),*),
            1 => $f::<W2 $(, $g)*>($($arg),*),
            2 => $f::<W4 $(, $g)*>($($arg),*),
            3 => $f::<W8 $(, $g)*>($($arg),*),
            4 => $f::<W16 $(, $g)*>($($arg),*),
            5 => $f::<W32 $(, $g)*>($($arg),*),
            _ => $f::<W64 $(, $g)*>($($arg),*),
        }
    };
}

fn get_entry<W: Width>(block: &[u8], index: usize) -> u64 {
    W::get(block, index)
}
fn set_entry<W: Width>(block: &mut [u8], index: usize, value: u64) {
    W::set(block, index, value);
}
fn max_of<W: Width>() -> u64 {
    W::MAX
}
/// Finds the first entry that is free (`want_free`) or used, in `from..to`.
fn scan<W: Width>(block: &[u8], from: usize, to: usize, want_free: bool) -> Option<usize> {
    (from..to).find(|i| (W::get(block, *i) == 0) == want_free)
}

/// Reads one refcount from the bytes of a block, for checks and fuzzing.
pub fn entry_of_block(order: u32, block: &[u8], index: usize) -> u64 {
    with_width!(order, get_entry::<_>(block, index))
}

struct Block {
    data: Vec<u8>,
    /// Changed bytes; empty if from >= to.
    from: usize,
    to: usize,
}

impl Block {
    fn touch(&mut self, from: usize, to: usize) {
        self.from = self.from.min(from);
        self.to = self.to.max(to);
    }
    fn is_dirty(&self) -> bool {
        self.from < self.to
    }
}

/// Adds a cluster to runs, and joins it to the last run if it follows that.
fn extend_runs(runs: &mut Vec<std::ops::Range<u64>>, cluster: u64) {
    match runs.last_mut() {
        Some(last) if last.end == cluster => last.end += 1,
        Some(last) if last.contains(&cluster) => {}
        _ => runs.push(cluster..cluster + 1),
    }
}

/// Change of a refcount.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Change {
    /// Adds one or more references. The cluster must be in use.
    Up(u64),
    /// Removes one or more references.
    Down(u64),
    /// Changes nothing; only reads the counts.
    Keep,
    /// Changes nothing; only checks that the clusters are in use and could have one more reference.
    Used,
}

/// The refcounts of one image.
pub struct Refcounts {
    bits: ClusterBits,
    order: u32,
    /// log2 of the entries of a block.
    block_shift: u32,
    table_offset: HostOffset,
    table: Vec<u64>,
    blocks: Vec<Option<Box<Block>>>,
    loaded: usize,
    /// Blocks whose table entry is not on disk yet.
    unpublished: Vec<usize>,
    /// Old places of a moved table, to be freed once the header has switched.
    moved_from: Vec<(ClusterIndex, u64)>,
    table_moved: bool,
    /// No cluster below this one is free.
    hint: u64,
    /// True if changes must not reach the file.
    dry: bool,
    /// Limit of blocks in memory, in bytes, while changes do not reach the file.
    dry_limit: usize,
    /// Clusters whose refcount fell to zero since the last call of [`Refcounts::take_freed`].
    freed: u64,
    /// Runs of clusters whose refcount fell to zero, in that order; adjacent ones are one run.
    freed_runs: Vec<std::ops::Range<u64>>,
}

impl std::fmt::Debug for Refcounts {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Refcounts").field("order", &self.order).field("blocks", &self.table.len()).finish()
    }
}

impl Refcounts {
    /// Reads the refcount table.
    ///
    /// # Errors
    /// [`ErrorKind::Corrupt`] for entries that are unaligned, past the file's end, or duplicate.
    pub fn load(file: &ImageFile, header: &Header) -> Result<Self> {
        let bits = header.cluster_bits;
        let bytes = usize::try_from(u64::from(header.reftable_clusters) << bits.bits())
            .map_err(|_| Error::corrupt("the refcount table is too large"))?;
        let file_len = file.len()?;
        if header.reftable_offset.0 >= file_len {
            return Err(Error::corrupt(format!(
                "the refcount table is at offset {}, and the file ends at {file_len:#x}",
                header.reftable_offset
            )));
        }
        let mut raw = vec![0; bytes];
        file.read_at(&mut raw, header.reftable_offset)?;
        let table = parse_table(bits, &raw, file_len)?;
        let mut blocks = Vec::new();
        blocks.resize_with(table.len(), || None);
        Ok(Self {
            bits,
            order: header.refcount_order,
            block_shift: bits.bits() + 3 - header.refcount_order,
            table_offset: header.reftable_offset,
            table,
            blocks,
            loaded: 0,
            unpublished: Vec::new(),
            moved_from: Vec::new(),
            table_moved: false,
            hint: 0,
            dry: false,
            dry_limit: MAX_ESTIMATE_BYTES,
            freed: 0,
            freed_runs: Vec::new(),
        })
    }

    /// The largest refcount of this image's width.
    pub fn max(&self) -> u64 {
        with_width!(self.order, max_of::<_>())
    }

    /// Keeps all changes in memory from here on, for estimates. The value must not be used for writing
    /// afterwards.
    pub(crate) fn dry_run(&mut self) {
        self.dry = true;
    }

    /// Reads alone, so that few blocks need to be in memory. The value must not be changed afterwards.
    pub(crate) fn read_only(&mut self) {
        self.dry = true;
        self.dry_limit = MAX_LOADED_BYTES;
    }

    /// Returns the number of clusters of new refcount blocks, and of a moved table, that are not on disk yet.
    pub(crate) fn new_clusters(&self) -> u64 {
        let table =
            if self.table_moved { (self.table.len() as u64).div_ceil(self.bits.size() / 8) } else { 0 };
        table.saturating_add(self.unpublished.len() as u64)
    }

    /// Returns the first of `count` consecutive free clusters at or after `from`. From 0 it is what
    /// [`Refcounts::allocate`] finds in an image that was just opened.
    ///
    /// # Errors
    /// As [`Refcounts::allocate`].
    pub(crate) fn first_free_run(&mut self, file: &ImageFile, from: u64, count: u64) -> Result<u64> {
        self.find_free(file, from, count)
    }

    /// Returns the number of clusters that [`Refcounts::change`] freed since the last call.
    pub(crate) fn take_freed(&mut self) -> u64 {
        std::mem::take(&mut self.freed)
    }

    /// Returns the clusters that were freed since the last call and are still free, sorted.
    ///
    /// # Errors
    /// The system's.
    pub(crate) fn take_freed_runs(&mut self, file: &ImageFile) -> Result<Vec<std::ops::Range<u64>>> {
        let mut runs = std::mem::take(&mut self.freed_runs);
        runs.sort_unstable_by_key(|run| run.start);
        let mut free: Vec<std::ops::Range<u64>> = Vec::new();
        for cluster in runs.into_iter().flatten() {
            if self.get(file, ClusterIndex(cluster))? == 0 {
                extend_runs(&mut free, cluster);
            }
        }
        Ok(free)
    }

    /// Extends a run of free clusters by its free neighbours in the same blocks of the file system. Clusters
    /// smaller than such a block free no space by themselves. What `known` says of a cluster goes before its
    /// refcount: true is free.
    ///
    /// # Errors
    /// The system's.
    pub(crate) fn widened(
        &mut self,
        file: &ImageFile,
        mut run: std::ops::Range<u64>,
        known: impl Fn(u64) -> Option<bool>,
    ) -> Result<std::ops::Range<u64>> {
        let per_block = FILE_BLOCK / self.bits.size();
        if per_block < 2 {
            return Ok(run);
        }
        let mut is_free = |cluster: u64| -> Result<bool> {
            match known(cluster) {
                Some(free) => Ok(free),
                None => Ok(self.get(file, ClusterIndex(cluster))? == 0),
            }
        };
        while !run.start.is_multiple_of(per_block) && is_free(run.start - 1)? {
            run.start -= 1;
        }
        while !run.end.is_multiple_of(per_block) && is_free(run.end)? {
            run.end += 1;
        }
        Ok(run)
    }

    /// Forgets the clusters that became free.
    pub(crate) fn forget_freed(&mut self) {
        self.freed = 0;
        self.freed_runs.clear();
    }

    /// Offsets of the blocks, in the table's order.
    pub fn block_offsets(&self) -> impl Iterator<Item = HostOffset> + '_ {
        self.table.iter().filter(|e| **e != 0).map(|e| HostOffset(*e))
    }

    /// The clusters that existing blocks count, one range for each block.
    pub(crate) fn covered(&self) -> impl Iterator<Item = std::ops::Range<u64>> + '_ {
        let shift = self.block_shift;
        let numbers = self.table.iter().enumerate().filter(|(_, e)| **e != 0).map(|(n, _)| n as u64);
        numbers.map(move |n| n << shift..(n + 1) << shift)
    }

    /// Sets a refcount regardless of its old value, and makes the block that counts the cluster if there is
    /// none. Call it only after [`Refcounts::allocate_from`], because a cluster that seems free may be in
    /// use.
    pub(crate) fn force(&mut self, file: &ImageFile, cluster: ClusterIndex, value: u64) -> Result<()> {
        let floor = self.hint.max(cluster.0 + 1);
        self.ensure_block_at(file, cluster.0 >> self.block_shift, floor)?;
        let hint = self.hint;
        self.set(file, cluster, value)?;
        self.hint = hint;
        Ok(())
    }

    /// Makes the block of this number at or behind cluster `floor`, if there is none.
    fn ensure_block_at(&mut self, file: &ImageFile, number: u64, floor: u64) -> Result<()> {
        // A claim from the block's own range to the floor keeps the block out of this range.
        let start = number << self.block_shift;
        self.ensure_block(file, number, start..floor.max(start + (1 << self.block_shift)))
    }

    /// Prevents allocation below this cluster, while refcounts that cannot be trusted are rebuilt.
    pub(crate) fn allocate_from(&mut self, cluster: ClusterIndex) {
        self.hint = cluster.0;
    }

    /// Returns block number and entry of a cluster; `None` where no table can reach.
    #[inline(always)]
    fn position(&self, cluster: u64) -> Option<(usize, usize)> {
        let entry = (cluster & ((1 << self.block_shift) - 1)) as usize;
        Some((usize::try_from(cluster >> self.block_shift).ok()?, entry))
    }

    /// Reads a block if it is not loaded. Returns `false` if the image has no block of this number.
    fn ensure_loaded(&mut self, file: &ImageFile, number: usize) -> Result<bool> {
        if self.blocks.get(number).is_some_and(Option::is_some) {
            return Ok(true);
        }
        let Some(offset) = self.table.get(number).copied().filter(|o| *o != 0) else { return Ok(false) };
        if self.dry && self.loaded + self.bits.bytes() > self.dry_limit {
            // Unchanged blocks can be read again; blocks that an estimate has changed cannot be written.
            self.blocks.iter_mut().for_each(|b| *b = b.take().filter(|b| b.is_dirty()));
            self.loaded = self.blocks.iter().flatten().count() * self.bits.bytes();
            if self.loaded + self.bits.bytes() > self.dry_limit {
                return Err(Error::new(
                    ErrorKind::LimitExceeded,
                    format!("more than {} MiB of refcounts would have to be looked at", self.dry_limit >> 20),
                )
                .advise("delete fewer snapshots at once, or convert the image to larger clusters"));
            }
        }
        if self.loaded + self.bits.bytes() > MAX_LOADED_BYTES && !self.dry {
            self.write_blocks(file)?;
            self.blocks.iter_mut().for_each(|b| *b = None);
            self.loaded = 0;
        }
        let mut data = vec![0; self.bits.bytes()];
        file.read_at(&mut data, HostOffset(offset))?;
        if let Some(slot) = self.blocks.get_mut(number) {
            *slot = Some(Box::new(Block { data, from: usize::MAX, to: 0 }));
            self.loaded += self.bits.bytes();
        }
        Ok(true)
    }

    /// Returns the refcount of a cluster.
    ///
    /// # Errors
    /// The system's.
    pub fn get(&mut self, file: &ImageFile, cluster: ClusterIndex) -> Result<u64> {
        let Some((number, entry)) = self.position(cluster.0) else { return Ok(0) };
        if !self.ensure_loaded(file, number)? {
            return Ok(0);
        }
        let Some(Some(block)) = self.blocks.get(number) else { return Ok(0) };
        Ok(with_width!(self.order, get_entry::<_>(&block.data, entry)))
    }

    /// Returns the first free cluster at or after `from`, at most `end`.
    pub(crate) fn first_free(&mut self, file: &ImageFile, from: u64, end: u64) -> Result<u64> {
        self.first(file, from, end, true)
    }

    /// Returns the first cluster in use at or after `from`, at most `end`.
    pub(crate) fn first_used(&mut self, file: &ImageFile, from: u64, end: u64) -> Result<u64> {
        self.first(file, from, end, false)
    }

    fn first(&mut self, file: &ImageFile, from: u64, end: u64, want_free: bool) -> Result<u64> {
        let per_block = 1u64 << self.block_shift;
        let mut at = from;
        while at < end {
            let Some((number, entry)) = self.position(at) else { return Ok(end) };
            let next = (at | (per_block - 1)) + 1;
            if !self.ensure_loaded(file, number)? {
                // Clusters without a block are not counted, so they are free.
                if want_free {
                    return Ok(at);
                }
            } else if let Some(Some(block)) = self.blocks.get(number)
                && let Some(found) =
                    with_width!(self.order, scan::<_>(&block.data, entry, per_block as usize, want_free))
            {
                return Ok((next - per_block + found as u64).min(end));
            }
            at = next;
        }
        Ok(end)
    }

    /// Sets a refcount regardless of its old value. The cluster's block must exist.
    pub(crate) fn set(&mut self, file: &ImageFile, cluster: ClusterIndex, value: u64) -> Result<()> {
        if value > self.max() {
            return Err(self.overflow(cluster.0));
        }
        let missing = || Error::corrupt(format!("no refcount block covers cluster {cluster}"));
        let (number, entry) = self.position(cluster.0).ok_or_else(missing)?;
        if !self.ensure_loaded(file, number)? {
            return Err(missing());
        }
        let order = self.order;
        let Some(Some(block)) = self.blocks.get_mut(number) else { return Err(missing()) };
        if value == 0 && with_width!(order, get_entry::<_>(&block.data, entry)) != 0 {
            extend_runs(&mut self.freed_runs, cluster.0);
        }
        with_width!(order, set_entry::<_>(&mut block.data, entry, value));
        let at = (entry << order) / 8;
        block.touch(at, at + (1usize << order).div_ceil(8));
        if value == 0 {
            self.hint = self.hint.min(cluster.0);
        }
        Ok(())
    }

    /// Changes the refcounts of clusters that are in use. Calls `seen` with each cluster's position in the
    /// list and its new refcount. In memory only.
    ///
    /// # Errors
    /// [`ErrorKind::RefcountOverflow`]. [`ErrorKind::Corrupt`] if a cluster is not in use or has too few
    /// references. A part of the list is then changed, so the value must be thrown away.
    #[inline]
    pub fn change<F: FnMut(usize, u64)>(
        &mut self,
        file: &ImageFile,
        clusters: &[u64],
        change: Change,
        seen: F,
    ) -> Result<()> {
        match self.order {
            0 => self.change_as::<W1, F>(file, clusters, change, seen),
            1 => self.change_as::<W2, F>(file, clusters, change, seen),
            2 => self.change_as::<W4, F>(file, clusters, change, seen),
            3 => self.change_as::<W8, F>(file, clusters, change, seen),
            4 => self.change_as::<W16, F>(file, clusters, change, seen),
            5 => self.change_as::<W32, F>(file, clusters, change, seen),
            _ => self.change_as::<W64, F>(file, clusters, change, seen),
        }
    }

    fn change_as<W: Width, F: FnMut(usize, u64)>(
        &mut self,
        file: &ImageFile,
        clusters: &[u64],
        change: Change,
        mut seen: F,
    ) -> Result<()> {
        let mask = (1u64 << self.block_shift) - 1;
        let mut at = 0;
        while let Some(first) = clusters.get(at).copied() {
            let number = first >> self.block_shift;
            let slot = usize::try_from(number).map_err(|_| self.not_in_use(first))?;
            if !self.ensure_loaded(file, slot)? {
                return Err(self.not_in_use(first));
            }
            let (shift, order) = (self.block_shift, self.order);
            let Some(Some(block)) = self.blocks.get_mut(slot) else { return Err(self.not_in_use(first)) };
            let (mut low, mut high) = (usize::MAX, 0);
            let mut failed = None;
            let mut freed = 0;
            let mut lowest_free = u64::MAX;
            for cluster in clusters.get(at..).unwrap_or_default() {
                if cluster >> shift != number {
                    break;
                }
                let entry = (cluster & mask) as usize;
                let old = W::get(&block.data, entry);
                let new = match change {
                    Change::Up(by) if old != 0 => old.checked_add(by).filter(|new| *new <= W::MAX),
                    Change::Down(by) => old.checked_sub(by),
                    Change::Keep => Some(old),
                    Change::Used if old != 0 && old != W::MAX => Some(old),
                    Change::Up(_) | Change::Used => None,
                };
                let Some(new) = new else {
                    failed = Some((*cluster, old));
                    break;
                };
                if new != old {
                    W::set(&mut block.data, entry, new);
                }
                low = low.min(entry);
                high = high.max(entry);
                if new == 0 && old != 0 {
                    freed += 1;
                    extend_runs(&mut self.freed_runs, *cluster);
                    lowest_free = lowest_free.min(*cluster);
                }
                seen(at, new);
                at += 1;
            }
            if low <= high && !matches!(change, Change::Keep | Change::Used) {
                block.touch((low << order) / 8, ((high << order) / 8) + (1usize << order).div_ceil(8));
            }
            self.freed += freed;
            self.hint = self.hint.min(lowest_free);
            if let Some((cluster, old)) = failed {
                return Err(match change {
                    Change::Up(_) | Change::Used if old != 0 => self.overflow(cluster),
                    Change::Up(_) | Change::Used | Change::Keep => self.not_in_use(cluster),
                    Change::Down(by) => Error::corrupt(format!(
                        "cluster {cluster:#x} has a refcount of {old}, and {by} references to it would go"
                    )),
                });
            }
        }
        Ok(())
    }

    pub(crate) fn not_in_use(&self, cluster: u64) -> Error {
        Error::corrupt(format!("cluster {cluster:#x} is referred to, but its refcount is 0"))
    }

    fn overflow(&self, cluster: u64) -> Error {
        Error::new(
            ErrorKind::RefcountOverflow,
            format!(
                "cluster {cluster:#x} would have more references than the image's refcounts of {} bits can count ({})",
                1u32 << self.order,
                self.max()
            ),
        )
        .advise("delete snapshots, or convert the image with `qemu-img convert -o refcount_bits=16` or more")
    }

    /// Allocates `count` consecutive free clusters with a refcount of one. In memory only: see the module's
    /// order.
    ///
    /// # Errors
    /// [`ErrorKind::LimitExceeded`] if the refcount table cannot grow any more.
    pub fn allocate(&mut self, file: &ImageFile, count: u64) -> Result<ClusterIndex> {
        let first = self.find_free(file, self.hint, count)?;
        self.claim(file, first, count)?;
        if count == 1 || first == self.hint {
            self.hint = first + count;
        }
        Ok(ClusterIndex(first))
    }

    /// Finds `count` consecutive free clusters at or after `from`, and returns the first.
    fn find_free(&mut self, file: &ImageFile, from: u64, count: u64) -> Result<u64> {
        let per_block = 1u64 << self.block_shift;
        let limit = self.limit();
        let (mut start, mut at) = (from.max(1), from.max(1));
        // Cluster 0 is the header's, whatever its refcount says.
        while at < start.saturating_add(count) {
            if start.saturating_add(count) > limit {
                return Err(self.full());
            }
            let number = (at >> self.block_shift) as usize;
            let entry = (at & (per_block - 1)) as usize;
            let end = (at | (per_block - 1)) + 1;
            if !self.ensure_loaded(file, number)? {
                at = end;
                continue;
            }
            let Some(Some(block)) = self.blocks.get(number) else { continue };
            if start == at {
                // Search for the first free one.
                match with_width!(self.order, scan::<_>(&block.data, entry, per_block as usize, true)) {
                    None => {
                        start = end;
                        at = end;
                        continue;
                    }
                    Some(free) => start = end - per_block + free as u64,
                }
                at = start;
            }
            let entry = (at & (per_block - 1)) as usize;
            let to = (start + count - (end - per_block)).min(per_block) as usize;
            match with_width!(self.order, scan::<_>(&block.data, entry, to, false)) {
                None => at = end,
                Some(used) => {
                    start = end - per_block + used as u64 + 1;
                    at = start;
                }
            }
        }
        Ok(start)
    }

    /// Number of clusters that the largest refcount table can count and a mapping can refer to.
    fn limit(&self) -> u64 {
        ((MAX_REFTABLE_BYTES / 8) << self.block_shift).min(1 << (56 - self.bits.bits()))
    }

    fn full(&self) -> Error {
        Error::new(
            ErrorKind::LimitExceeded,
            format!("the image's refcounts cannot count more than {} clusters", self.limit()),
        )
        .advise("convert it to larger clusters or narrower refcounts")
    }

    /// Gives `count` free clusters a refcount of one, and makes the blocks for them.
    fn claim(&mut self, file: &ImageFile, first: u64, count: u64) -> Result<()> {
        let (from, to) = (first >> self.block_shift, (first + count - 1) >> self.block_shift);
        // A new block or a larger table must not use the clusters that are being claimed, so it goes behind
        // them.
        for number in from..=to {
            self.ensure_block(file, number, first..first + count)?;
        }
        for cluster in first..first + count {
            self.set(file, ClusterIndex(cluster), 1)?;
        }
        Ok(())
    }

    /// Makes the block of this number if there is none, from clusters that are not in `claimed`.
    fn ensure_block(&mut self, file: &ImageFile, number: u64, claimed: std::ops::Range<u64>) -> Result<()> {
        let slot = usize::try_from(number).map_err(|_| self.full())?;
        if slot >= self.table.len() {
            self.grow_table(file, number, claimed.clone())?;
        }
        if self.table.get(slot).is_some_and(|e| *e != 0) {
            return Ok(());
        }
        // Preferably in the block's own range, where it counts itself.
        let range = (number << self.block_shift)..((number + 1) << self.block_shift);
        let own = if claimed.end < range.end && claimed.end >= range.start {
            Some(claimed.end)
        } else if claimed.start > range.start {
            Some(range.start.max(1)).filter(|c| *c < claimed.start)
        } else {
            None
        };
        let at = match own {
            Some(at) => at,
            None => {
                // The claim fills the whole range. So the block goes behind the claim, where it may need
                // another block.
                let at = self.find_free(file, claimed.end, 1)?;
                let home = at >> self.block_shift;
                if home != number {
                    self.ensure_block(file, home, claimed.start..at + 1)?;
                }
                at
            }
        };
        let offset = self.bits.host_offset(ClusterIndex(at)).ok_or_else(|| self.full())?;
        let data = vec![0; self.bits.bytes()];
        let (Some(entry), Some(block)) = (self.table.get_mut(slot), self.blocks.get_mut(slot)) else {
            return Err(self.full());
        };
        *entry = offset.0;
        let to = data.len();
        *block = Some(Box::new(Block { data, from: 0, to }));
        self.loaded += self.bits.bytes();
        self.unpublished.push(slot);
        self.set(file, ClusterIndex(at), 1)
    }

    /// Moves the table to a larger place, so that it reaches block `number`.
    fn grow_table(&mut self, file: &ImageFile, number: u64, claimed: std::ops::Range<u64>) -> Result<()> {
        let per_cluster = self.bits.size() / 8;
        let old_clusters = (self.table.len() as u64).div_ceil(per_cluster);
        let most = MAX_REFTABLE_BYTES / 8;
        // Half as much again, and room for the blocks that count the table itself.
        let wanted = (number + 1 + number / 2 + 2).next_multiple_of(per_cluster).min(most);
        if number >= most {
            return Err(self.full());
        }
        let length = usize::try_from(wanted).map_err(|_| self.full())?;
        self.table.resize(length, 0);
        self.blocks.resize_with(length, || None);
        let clusters = wanted.div_ceil(per_cluster);
        let old_at = self.bits.host_cluster(self.table_offset);
        let first = self.find_free(file, claimed.end, clusters)?;
        let all = claimed.start..first + clusters;
        for block in (first >> self.block_shift)..=((first + clusters - 1) >> self.block_shift) {
            self.ensure_block(file, block, all.clone())?;
        }
        for cluster in first..first + clusters {
            self.set(file, ClusterIndex(cluster), 1)?;
        }
        self.table_offset = self.bits.host_offset(ClusterIndex(first)).ok_or_else(|| self.full())?;
        self.moved_from.push((old_at, old_clusters));
        self.table_moved = true;
        Ok(())
    }

    /// Writes changed blocks; adjacent ones together.
    fn write_blocks(&mut self, file: &ImageFile) -> Result<()> {
        let mut run: Vec<u8> = Vec::new();
        let mut run_at = 0u64;
        let mut dirty: Vec<usize> = (0..self.blocks.len())
            .filter(|n| self.blocks.get(*n).is_some_and(|b| b.as_ref().is_some_and(|b| b.is_dirty())))
            .collect();
        dirty.sort_unstable_by_key(|n| self.table.get(*n).copied());
        for number in dirty {
            let (Some(offset), Some(Some(block))) =
                (self.table.get(number).copied(), self.blocks.get_mut(number))
            else {
                continue;
            };
            let from = block.from / SECTOR * SECTOR;
            let to = block.to.next_multiple_of(SECTOR).min(block.data.len());
            let bytes = block.data.get(from..to).unwrap_or_default();
            let at = offset + from as u64;
            if run_at + run.len() as u64 != at || run.len() + bytes.len() > WRITE_RUN {
                if !run.is_empty() {
                    file.write_at(&run, HostOffset(run_at))?;
                    run.clear();
                }
                run_at = at;
            }
            run.extend_from_slice(bytes);
            (block.from, block.to) = (usize::MAX, 0);
        }
        if !run.is_empty() {
            file.write_at(&run, HostOffset(run_at))?;
        }
        Ok(())
    }

    /// Writes the changes and makes them durable, together with everything else written before.
    ///
    /// If the table has moved, `header` gets its new place and the result is `true`. The caller must then
    /// write the header sector, flush, and call [`Refcounts::free_old_tables`].
    ///
    /// # Errors
    /// The system's.
    pub fn write_back(&mut self, file: &ImageFile, header: &mut Header) -> Result<bool> {
        debug_assert!(!self.dry, "an estimate must not be written");
        // 1) Blocks first. The table on disk does not refer to the new ones yet, so a crash here leaks them.
        self.write_blocks(file)?;
        // 2) A moved table lies at a new place. Only the header, which the caller writes next, makes it
        //    visible.
        if self.table_moved {
            let raw: Vec<u8> = self.table.iter().flat_map(|e| e.to_be_bytes()).collect();
            file.write_at(&raw, self.table_offset)?;
            file.flush()?;
            self.unpublished.clear();
            self.table_moved = false;
            header.reftable_offset = self.table_offset;
            let clusters = self.bits.clusters_for(raw.len() as u64);
            header.reftable_clusters = u32::try_from(clusters).map_err(|_| self.full())?;
            return Ok(true);
        }
        // 3) The blocks are durable, so table entries may refer to them.
        file.flush()?;
        while !self.unpublished.is_empty() {
            for number in self.next_to_publish() {
                let entry = self.table.get(number).copied().unwrap_or(0);
                let at = self.table_offset.checked_add(number as u64 * 8).ok_or_else(|| self.full())?;
                file.write_at(&entry.to_be_bytes(), at)?;
            }
            file.flush()?;
        }
        Ok(false)
    }

    /// Takes the new blocks that table entries may refer to now. A block must be counted by itself, or by a
    /// block that an entry on disk refers to. Otherwise a crash would leave it in use with a refcount of 0.
    fn next_to_publish(&mut self) -> Vec<usize> {
        let all = std::mem::take(&mut self.unpublished);
        let home = |number: &usize| {
            let offset = self.table.get(*number).copied().unwrap_or(0);
            (self.bits.host_cluster(HostOffset(offset)).0 >> self.block_shift) as usize
        };
        let (now, later): (Vec<usize>, Vec<usize>) =
            all.iter().partition(|n| home(n) == **n || !all.contains(&home(n)));
        if now.is_empty() {
            return later;
        }
        self.unpublished = later;
        now
    }

    /// Frees the old places of the table, in memory. Call it only after the header that refers to the new one
    /// is durable.
    pub(crate) fn free_old_tables(&mut self, file: &ImageFile) -> Result<()> {
        for (first, count) in std::mem::take(&mut self.moved_from) {
            let clusters: Vec<u64> = (first.0..first.0 + count).collect();
            self.change(file, &clusters, Change::Down(1), |_, _| {})?;
        }
        Ok(())
    }
}

/// Parses a refcount table: host offsets of blocks, 0 for no block.
///
/// # Errors
/// [`ErrorKind::Corrupt`] for entries that are unaligned, past the file's end, in the header, or duplicate.
pub fn parse_table(bits: ClusterBits, raw: &[u8], file_len: u64) -> Result<Vec<u64>> {
    let mut table = Vec::with_capacity(raw.len() / 8);
    for (number, word) in raw.as_chunks::<8>().0.iter().enumerate() {
        let entry = u64::from_be_bytes(*word);
        let offset = entry & BLOCK_OFFSET_MASK;
        if entry != 0 && (offset != entry || offset == 0 || offset & bits.mask() != 0 || offset >= file_len) {
            return Err(Error::corrupt(format!(
                "entry {number} of the refcount table is {entry:#x}, which is not a valid offset of a refcount block in a file \
                 of {file_len:#x} bytes"
            )));
        }
        table.push(entry);
    }
    let mut seen: Vec<u64> = table.iter().copied().filter(|e| *e != 0).collect();
    seen.sort_unstable();
    if let Some(twice) = seen.windows(2).find(|w| w.first() == w.last()).and_then(<[u64]>::first) {
        return Err(Error::corrupt(format!(
            "the refcount block at {twice:#x} is in the refcount table twice"
        )));
    }
    Ok(table)
}

/// Sets the first `count` entries of adjacent blocks to a refcount of one.
pub(crate) fn fill_ones(order: u32, blocks: &mut [u8], count: usize) {
    for entry in 0..count {
        with_width!(order, set_entry::<_>(blocks, entry, 1));
    }
}
