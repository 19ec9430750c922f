//! Sizes of points: what they refer to, and what their deletes free.

use camino::Utf8Path;
use image_files::chain::{Growth, Measure, Tag};
use snapcore::backend::{Certainty, DeleteCost, DiskState};
use snapcore::{Error, ErrorKind, LayerName, Point, Result};

use crate::image::{self, Image, MergeGrowth, OpenOptions, RunLayer};

/// How often an image that a hypervisor writes is read, if what was read does not fit together.
const READS: u32 = 3;

/// The images of a disk, as far as the cost of a delete depends on them.
pub(crate) struct Images<'a> {
    pub(crate) state: &'a DiskState,
    /// True if the space of freed clusters is returned to the file system.
    pub(crate) punch: bool,
}

fn open(state: &DiskState, name: &LayerName) -> Result<Image> {
    let layer = state.layer(name).ok_or_else(|| {
        Error::new(
            ErrorKind::Internal,
            format!("layer {name} is planned for, and is not among the disk's layers"),
        )
    })?;
    Ok(Image::open(layer.path().as_std_path(), &OpenOptions::read_only().unlocked())?)
}

impl Images<'_> {
    /// Returns true if a hypervisor writes the layer.
    fn is_written(&self, layer: &LayerName) -> bool {
        self.state.attached && *layer == self.state.active
    }
}

impl Measure for Images<'_> {
    fn dropped(&mut self, layer: &LayerName, tags: &[Tag], leaves: bool) -> Result<DeleteCost> {
        let tags: Vec<&str> = tags.iter().map(|tag| tag.name.as_str()).collect();
        let is_written = self.is_written(layer);
        let freed = repeated(is_written, || {
            let image = open(self.state, layer)?;
            let mut sizes = image.sizes()?;
            Ok(sizes.freed_by_deleting(&tags, leaves)?)
        })?;
        // A hypervisor that deletes it in the image it writes keeps the space for its next writes.
        let cost = match self.punch && !is_written {
            true => DeleteCost::new(freed.given_back, 0),
            false => DeleteCost::default().inside(freed.inside),
        };
        Ok(match (is_written, leaves) {
            (true, _) => cost.but(
                Certainty::Estimate,
                format!("a running machine writes {layer}, and has not written out all that it knows of it"),
            ),
            (false, true) => cost
                .but(Certainty::Estimate, format!("{layer} gives up its own state, and keeps its snapshots")),
            (false, false) => cost.exact(),
        })
    }

    fn merged(&mut self, run: &[LayerName], into: &LayerName, has_below: bool, moved: u64) -> Result<Growth> {
        let chain = self.state.chain(&self.state.active);
        if self.state.attached && run.iter().any(|name| chain.iter().any(|layer| layer.name == *name)) {
            // The machine merges them, and writes the uppermost meanwhile.
            let growth = self.growth(run, into, has_below).ok();
            let (more, less) = growth.map_or((moved, 0), |growth| (growth.more, growth.less));
            return Ok(Growth { more, less, certainty: Certainty::Estimate });
        }
        let growth = self.growth(run, into, has_below)?;
        let certainty = if growth.is_exact { Certainty::Exact } else { Certainty::Estimate };
        Ok(Growth { more: growth.more, less: if self.punch { growth.less } else { 0 }, certainty })
    }

    fn copied(&mut self, layer: &LayerName, tag: &Tag) -> Result<u64> {
        let image = open(self.state, layer)?;
        let mut sizes = image.sizes()?;
        Ok(sizes.referenced(&tag.name)?)
    }
}

impl Images<'_> {
    fn growth(&self, run: &[LayerName], into: &LayerName, has_below: bool) -> Result<MergeGrowth> {
        let (mut under, mut over, mut target) = (Vec::new(), Vec::new(), None);
        for name in run {
            let image = open(self.state, name)?;
            match &target {
                _ if name == into => target = Some(image),
                None => under.push(RunLayer::active(&image)?),
                Some(_) => over.push(RunLayer::active(&image)?),
            }
        }
        let target = target.ok_or_else(|| {
            Error::new(ErrorKind::Internal, format!("{into} is not among the layers that are merged into it"))
        })?;
        Ok(image::merge_growth(under, &target, over, has_below)?)
    }
}

/// Reads again what another program may have changed meanwhile.
fn repeated<T>(is_written: bool, read: impl Fn() -> Result<T>) -> Result<T> {
    let mut found = read();
    for _ in 1..if is_written { READS } else { 1 } {
        match &found {
            Err(error) if error.kind() == ErrorKind::Corrupt => found = read(),
            _ => break,
        }
    }
    found
}

/// Returns the bytes that a point refers to: those of its tag or layer, and of all layers below.
pub(crate) fn referenced(state: &DiskState, point: &Point) -> Result<Option<u64>> {
    let chain = state.chain(&point.layer);
    let Some((top, below)) = chain.split_first() else { return Ok(None) };
    let own = match &point.tag {
        None => top.allocated,
        Some(tag) => repeated(state.attached && top.name == state.active, || {
            let image = open(state, &top.name)?;
            let mut sizes = image.sizes()?;
            Ok(sizes.referenced(tag)?)
        })?,
    };
    Ok(Some(below.iter().map(|layer| layer.allocated).fold(own, u64::saturating_add)))
}

/// Returns the bytes of the tables of a new internal snapshot for which the file system has no room yet.
pub(crate) fn room_of_new_tag(file: &Utf8Path) -> Result<u64> {
    let image = Image::open(file.as_std_path(), &OpenOptions::read_only().unlocked())?;
    Ok(image.sizes()?.room_of_new_tables()?)
}
