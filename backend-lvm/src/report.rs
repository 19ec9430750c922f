//! lvm's JSON reports, parsed once.

use serde::Deserialize;
use snapcore::{Error, ErrorKind, LayerName, Result};

use crate::names::Volume;
use crate::tags::ParsedTags;

/// The fields of the report, for all volumes of one group, hidden ones too. The group's fields come with
/// each.
pub(crate) const FIELDS: &str = "vg_name,vg_free,vg_extent_size,vg_missing_pv_count,lv_name,lv_uuid,lv_active,lv_size,origin,\
                                 origin_size,pool_lv,segtype,lv_role,data_percent,metadata_percent,lv_skip_activation,\
                                 lv_device_open,lv_merging,lv_snapshot_invalid,lv_merge_failed,lv_health_status,lv_time,\
                                 lv_tags,lv_metadata_size,lv_suspended,lv_permissions,lv_allocation_locked,lv_check_needed,\
                                 vg_permissions,vg_lock_type,chunk_size";

/// Segment types whose volumes have thick snapshots here: `lvcreate -s` and a merge of them are tested.
/// Nothing is known of any other type (a cache, a mirror, an array, a future one), so it is refused by name.
const PLAIN: [&str; 2] = ["linear", "striped"];

/// Bytes of a chunk's entry in the table of a thick snapshot's area.
const ENTRY: u64 = 16;

/// A share, in hundredths of a percent: lvm reports two digits.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Share(u32);

impl Share {
    const WHOLE: Self = Self(10_000);

    /// Returns so many percent.
    pub(crate) fn of_percent(percent: u32) -> Self {
        Self(percent.saturating_mul(100))
    }

    /// Returns the share that `part` is of `whole`, rounded up.
    pub(crate) fn of_part(part: u64, whole: u64) -> Self {
        let hundredths = (u128::from(part) * 10_000).div_ceil(u128::from(whole.max(1)));
        Self(u32::try_from(hundredths).unwrap_or(u32::MAX))
    }

    /// Returns the rest of the whole.
    pub(crate) fn rest(self) -> Self {
        Self(Self::WHOLE.0.saturating_sub(self.0))
    }

    /// Returns true if it is at least `percent` percent.
    pub(crate) fn reaches(self, percent: u32) -> bool {
        self.0 >= percent.saturating_mul(100)
    }

    /// Returns this share of a whole.
    pub(crate) fn of(self, whole: u64) -> u64 {
        u64::try_from(u128::from(whole) * u128::from(self.0) / 10_000).unwrap_or(u64::MAX)
    }
}

impl std::fmt::Display for Share {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}.{:02} %", self.0 / 100, self.0 % 100)
    }
}

/// VolumeKind of a volume, as far as it matters here.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum VolumeKind {
    /// In a thin pool: snapshots share its blocks.
    Thin,
    /// A snapshot with an area of its own.
    ThickSnapshot,
    /// A pool of thin volumes.
    Pool,
    /// A plain volume, linear or striped: its snapshots are thick.
    Thick,
    /// A part of another volume.
    Inner,
    /// A volume of another type: no operation of ours is known to be correct on it.
    Foreign,
}

/// Write access to a volume.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Access {
    /// Its users may write.
    Writable,
    /// Read-only, by the group's metadata.
    ReadOnly,
    /// Read-only on this machine, by its configuration (`read_only_volume_list`).
    ReadOnlyHere,
    /// lvm could not determine it.
    Unknown,
}

/// One volume.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Row {
    pub(crate) name: String,
    pub(crate) kind: VolumeKind,
    /// The types of its segments, in lvm's names.
    pub(crate) types: Vec<String>,
    pub(crate) access: Access,
    /// True while a command moves or converts it (`pvmove`): lvm permits no other change then.
    pub(crate) locked: bool,
    /// True for a thin pool whose metadata must be checked first.
    pub(crate) check_needed: bool,
    pub(crate) active: bool,
    pub(crate) suspended: bool,
    /// Its own size, in bytes; for a thick snapshot, that of its area.
    pub(crate) size: u64,
    /// For a thick snapshot: size of its origin when it was taken, in bytes. lvm extends an origin without
    /// its snapshots.
    pub(crate) origin_size: Option<u64>,
    /// For a thick snapshot: the unit in which data is copied to its area, in bytes.
    pub(crate) chunk: Option<u64>,
    pub(crate) origin: Option<String>,
    pub(crate) pool: Option<String>,
    /// Its fill level; known while it is active.
    pub(crate) data: Option<Share>,
    pub(crate) metadata: Option<Share>,
    pub(crate) metadata_size: Option<u64>,
    pub(crate) open: bool,
    pub(crate) merging: bool,
    pub(crate) merge_failed: bool,
    /// True for a thick snapshot that overflowed.
    pub(crate) invalid: bool,
    /// Empty if it is healthy.
    pub(crate) health: String,
    /// Creation time, in seconds since 1970; 0 if lvm does not know it.
    pub(crate) time: i64,
    pub(crate) tags: Vec<String>,
}

impl Row {
    /// Parses its tags.
    pub(crate) fn parsed_tags(&self) -> ParsedTags {
        ParsedTags::of(self.tags.iter().map(String::as_str))
    }

    /// Returns it as a layer.
    pub(crate) fn layer(&self) -> LayerName {
        LayerName(self.name.clone())
    }

    /// Returns the size that its user sees, in bytes.
    pub(crate) fn visible_size(&self) -> u64 {
        self.origin_size.filter(|_| self.kind == VolumeKind::ThickSnapshot).unwrap_or(self.size)
    }

    /// Returns its bytes on the disk, as far as lvm reports them.
    pub(crate) fn allocated(&self) -> u64 {
        match self.kind {
            VolumeKind::Thin => self.data.map_or(0, |share| share.of(self.size)),
            VolumeKind::Thick
            | VolumeKind::ThickSnapshot
            | VolumeKind::Pool
            | VolumeKind::Inner
            | VolumeKind::Foreign => self.size,
        }
    }

    /// Returns true for a thick snapshot whose area lacks some of the data in use, because it was made
    /// smaller.
    pub(crate) fn is_cut_off(&self) -> bool {
        self.kind == VolumeKind::ThickSnapshot && self.data.is_some_and(|data| data > Share::WHOLE)
    }

    /// Returns true for a thick snapshot whose area has room for every chunk of its origin: it cannot
    /// overflow, whatever is written. lvm makes no area larger than that.
    pub(crate) fn has_room_for_all(&self) -> bool {
        let (Some(origin), Some(chunk)) = (self.origin_size, self.chunk.filter(|chunk| *chunk >= ENTRY))
        else {
            return false;
        };
        let chunks = origin.div_ceil(chunk);
        // The kernel's layout (dm-snap-persistent.c): a header; tables, each of one chunk, the next of which
        // is begun when one is full; and it wants one chunk more than it uses.
        let tables = chunks / (chunk / ENTRY) + 1;
        chunks.saturating_add(tables).saturating_add(2).saturating_mul(chunk) <= self.size
    }

    /// Returns an upper bound of the used bytes of a thick snapshot's area: lvm rounds the share to the
    /// nearest hundredth of a percent.
    pub(crate) fn used(&self) -> u64 {
        let bound = |share: Share| Share(share.0.saturating_add(1)).of(self.size).min(self.size);
        self.data.map_or(self.size, bound)
    }
}

/// One volume group.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct VolumeGroup {
    pub(crate) name: String,
    /// Bytes that no volume uses.
    pub(crate) free: u64,
    /// The size of an extent, in bytes.
    pub(crate) extent: u64,
    /// Number of missing physical volumes.
    pub(crate) missing: u64,
    /// True if its metadata may be changed.
    pub(crate) writable: bool,
    /// The lock manager by which several machines share it; `None` for a group of one machine.
    pub(crate) shared: Option<String>,
    pub(crate) rows: Vec<Row>,
}

impl VolumeGroup {
    /// Finds a volume by its name.
    pub(crate) fn row(&self, name: &str) -> Option<&Row> {
        self.rows.iter().find(|row| row.name == name)
    }

    /// Returns true if a volume whose name and tags claim that it was made for another one can be that. A
    /// user who may write tags can make such a claim for a volume of their own, and volumes of ours are
    /// removed.
    pub(crate) fn is_made_for(&self, row: &Row, of: &Volume) -> bool {
        match row.kind {
            VolumeKind::ThickSnapshot => row.origin.as_deref() == Some(of.name.as_str()),
            // The volume may be absent, in the middle of a revert.
            VolumeKind::Thin => self.row(&of.name).is_none_or(|current| current.pool == row.pool),
            VolumeKind::Thick | VolumeKind::Pool | VolumeKind::Inner | VolumeKind::Foreign => false,
        }
    }

    /// Returns the points of a volume, the oldest first.
    pub(crate) fn points<'a>(&'a self, of: &'a Volume) -> Vec<&'a Row> {
        let mut points: Vec<&Row> = self
            .rows
            .iter()
            .filter(|row| of.is_point(&row.name) && row.parsed_tags().ours && self.is_made_for(row, of))
            .collect();
        sort_points(&mut points, |row| row.time);
        points
    }

    /// Returns the thick snapshots of a volume, whatever created them: a write to the volume goes into the
    /// area of each.
    pub(crate) fn snapshots<'a>(&'a self, of: &'a Volume) -> impl Iterator<Item = &'a Row> {
        let is_of = move |row: &&Row| row.origin.as_deref() == Some(of.name.as_str());
        self.rows.iter().filter(|row| row.kind == VolumeKind::ThickSnapshot).filter(is_of)
    }

    /// Returns the volumes that lvm would remove together with these, without a question if asked not to ask:
    /// their thick snapshots, and thin volumes in another pool that have one of them as their origin.
    pub(crate) fn removed_with(&self, removed: &[LayerName]) -> Vec<&Row> {
        let falls = |row: &&Row| {
            let Some(origin) = row.origin.as_deref().and_then(|origin| self.row(origin)) else {
                return false;
            };
            let stands = match row.kind {
                VolumeKind::ThickSnapshot => true,
                VolumeKind::Thin => origin.pool != row.pool,
                VolumeKind::Thick | VolumeKind::Pool | VolumeKind::Inner | VolumeKind::Foreign => false,
            };
            stands && removed.contains(&origin.layer()) && !removed.contains(&row.layer())
        };
        self.rows.iter().filter(falls).collect()
    }

    /// Returns the pool of a volume.
    pub(crate) fn pool_of(&self, row: &Row) -> Option<&Row> {
        self.row(row.pool.as_deref()?)
    }
}

#[derive(Deserialize)]
struct Document {
    report: Vec<Section>,
}

#[derive(Deserialize)]
struct Section {
    #[serde(default)]
    lv: Vec<Fields>,
}

#[derive(Deserialize)]
struct Fields {
    vg_name: String,
    vg_free: String,
    vg_extent_size: String,
    vg_missing_pv_count: String,
    lv_name: String,
    lv_active: String,
    lv_size: String,
    origin: String,
    origin_size: String,
    pool_lv: String,
    segtype: String,
    lv_role: String,
    data_percent: String,
    metadata_percent: String,
    lv_device_open: String,
    lv_merging: String,
    lv_snapshot_invalid: String,
    lv_merge_failed: String,
    lv_health_status: String,
    lv_time: String,
    lv_tags: String,
    lv_metadata_size: String,
    lv_suspended: String,
    lv_permissions: String,
    lv_allocation_locked: String,
    lv_check_needed: String,
    vg_permissions: String,
    vg_lock_type: String,
    #[serde(default)]
    chunk_size: String,
}

/// Parses the report of one group; `None` if it has no volumes.
///
/// # Errors
/// [`ErrorKind::Corrupt`]: it does not have the expected form.
pub(crate) fn parse(text: &str) -> Result<Option<VolumeGroup>> {
    let document: Document = serde_json::from_str(text).map_err(|error| {
        Error::new(ErrorKind::Corrupt, "lvm's report is not the JSON that was asked for")
            .because(error)
            .advise("domsnap needs lvm2 2.03 or later, with JSON reports")
    })?;
    let mut group: Option<VolumeGroup> = None;
    for fields in document.report.into_iter().flat_map(|section| section.lv) {
        let group = match &mut group {
            Some(group) => group,
            none => none.insert(VolumeGroup {
                name: fields.vg_name.clone(),
                free: number("vg_free", &fields.vg_free)?,
                extent: number("vg_extent_size", &fields.vg_extent_size)?,
                missing: number("vg_missing_pv_count", &fields.vg_missing_pv_count)?,
                writable: fields.vg_permissions == "writeable",
                shared: Some(fields.vg_lock_type.clone())
                    .filter(|kind| !matches!(kind.as_str(), "" | "none")),
                rows: Vec::new(),
            }),
        };
        // A volume of several segments appears once for each: the first segment that is not plain determines
        // its kind.
        let row = row(fields)?;
        match group.rows.iter_mut().find(|known| known.name == row.name) {
            Some(known) => {
                if known.kind == VolumeKind::Thick {
                    known.kind = row.kind;
                }
                for new in row.types {
                    if !known.types.contains(&new) {
                        known.types.push(new);
                    }
                }
            }
            None => group.rows.push(row),
        }
    }
    Ok(group)
}

/// Sorts points by `time`, in seconds. lvm2 counts whole seconds, so of those of one second a point comes
/// after its parent, if its tags say which that is.
pub(crate) fn sort_points(rows: &mut Vec<&Row>, time: impl Fn(&Row) -> i64) {
    rows.sort_by(|a, b| (time(a), &a.name).cmp(&(time(b), &b.name)));
    let mut sorted = Vec::with_capacity(rows.len());
    while let Some(second) = rows.first().map(|row| time(row)) {
        let same = rows.iter().take_while(|row| time(row) == second);
        let waits = |row: &Row| {
            let parent = row.parsed_tags().parent;
            parent.is_some()
                && same.clone().any(|other| other.name != row.name && Some(other.layer()) == parent)
        };
        // A loop of parents, which only another program can have written, is broken anywhere.
        let next = same.clone().position(|row| !waits(row)).unwrap_or(0);
        sorted.push(rows.remove(next));
    }
    *rows = sorted;
}

fn row(fields: Fields) -> Result<Row> {
    let some = |text: &str| (!text.is_empty()).then(|| unbracketed(text).to_owned());
    let bytes = |name, text: &str| match text.is_empty() {
        true => Ok(None),
        false => number(name, text).map(Some),
    };
    let roles: Vec<&str> = fields.lv_role.split(',').collect();
    let kind = match fields.segtype.as_str() {
        "thin" => VolumeKind::Thin,
        "thin-pool" => VolumeKind::Pool,
        _ if roles.contains(&"thicksnapshot") => VolumeKind::ThickSnapshot,
        // A snapshot that is being merged is hidden, but still a snapshot.
        _ if roles.contains(&"private") && fields.lv_merging != "1" => VolumeKind::Inner,
        _ if fields.lv_merging == "1" && !fields.origin.is_empty() => VolumeKind::ThickSnapshot,
        plain if PLAIN.contains(&plain) => VolumeKind::Thick,
        _ => VolumeKind::Foreign,
    };
    let access = match fields.lv_permissions.as_str() {
        "writeable" => Access::Writable,
        "read-only" => Access::ReadOnly,
        "read-only-override" => Access::ReadOnlyHere,
        _ => Access::Unknown,
    };
    Ok(Row {
        name: unbracketed(&fields.lv_name).to_owned(),
        kind,
        types: vec![fields.segtype],
        access,
        locked: fields.lv_allocation_locked == "1",
        check_needed: fields.lv_check_needed == "1",
        // In a shared group it may be "local exclusive".
        active: fields.lv_active == "active" || fields.lv_active.starts_with("local"),
        suspended: fields.lv_suspended == "1",
        size: number("lv_size", &fields.lv_size)?,
        origin_size: bytes("origin_size", &fields.origin_size)?,
        chunk: bytes("chunk_size", &fields.chunk_size)?,
        origin: some(&fields.origin),
        pool: some(&fields.pool_lv),
        data: share("data_percent", &fields.data_percent)?,
        metadata: share("metadata_percent", &fields.metadata_percent)?,
        metadata_size: bytes("lv_metadata_size", &fields.lv_metadata_size)?,
        open: fields.lv_device_open == "1",
        merging: fields.lv_merging == "1",
        merge_failed: fields.lv_merge_failed == "1",
        invalid: fields.lv_snapshot_invalid == "1",
        health: fields.lv_health_status,
        // Before 2.02.89 lvm did not record it.
        time: match fields.lv_time.as_str() {
            "" => 0,
            time => time.parse().map_err(|_| unreadable("lv_time", time))?,
        },
        tags: fields.lv_tags.split(',').filter(|tag| !tag.is_empty()).map(str::to_owned).collect(),
    })
}

/// Removes the brackets that lvm puts around names of hidden volumes.
fn unbracketed(name: &str) -> &str {
    name.strip_prefix('[').and_then(|name| name.strip_suffix(']')).unwrap_or(name)
}

fn number(name: &str, text: &str) -> Result<u64> {
    text.parse().map_err(|_| unreadable(name, text))
}

fn share(name: &str, text: &str) -> Result<Option<Share>> {
    if text.is_empty() {
        return Ok(None);
    }
    let (whole, part) = text.split_once('.').unwrap_or((text, "0"));
    let part: String = part.chars().chain("00".chars()).take(2).collect();
    match (whole.parse::<u32>(), part.parse::<u32>()) {
        (Ok(whole), Ok(part)) if whole <= 1000 => Ok(Some(Share(whole * 100 + part))),
        _ => Err(unreadable(name, text)),
    }
}

fn unreadable(name: &str, text: &str) -> Error {
    Error::new(
        ErrorKind::Corrupt,
        format!("lvm's report has {name} {text:?}, which is not what it should be"),
    )
    .advise("domsnap needs lvm2 2.03 or later")
}

#[cfg(test)]
mod tests {
    use super::*;

    /// lvm2 2.03.16: thin and thick volumes with points, one of which overflowed; a deferred merge.
    const RECORDED: &str = include_str!("../tests/recorded/group.json");

    fn recorded() -> VolumeGroup {
        parse(RECORDED).expect("a report").expect("a group")
    }

    #[test]
    fn a_real_report_is_read() {
        let group = recorded();
        assert_eq!(
            (group.name.as_str(), group.free, group.extent, group.missing),
            ("vg", 373_293_056, 4 << 20, 0)
        );
        let kind = |name: &str| group.row(name).map(|row| row.kind);
        assert_eq!(kind("thin"), Some(VolumeKind::Thin));
        assert_eq!(kind("thin.ds-00000001"), Some(VolumeKind::Thin));
        assert_eq!(kind("thick"), Some(VolumeKind::Thick));
        assert_eq!(kind("thick.ds-00000003"), Some(VolumeKind::ThickSnapshot));
        assert_eq!(kind("tp"), Some(VolumeKind::Pool));
        assert_eq!(kind("tp_tdata"), Some(VolumeKind::Inner));
        assert_eq!(kind("hand"), Some(VolumeKind::ThickSnapshot));
        let pool = group.row("thin").and_then(|row| group.pool_of(row)).expect("it is in a pool");
        assert!(
            pool.metadata.is_some_and(|share| share.reaches(10))
                && !pool.data.is_some_and(|share| share.reaches(50))
        );
    }

    /// Points of one second are sorted by their parents, whatever their names; a loop ends.
    #[test]
    fn points_of_one_second_follow_their_parents() {
        let group = recorded();
        let row = group.row("thick.ds-00000004").expect("it is there");
        let name = snapcore::SnapshotName::new("n").expect("a name");
        let point = |of: &str, parent: Option<&Row>, time: i64| Row {
            name: of.to_owned(),
            tags: crate::tags::of_point(&name, parent.map(Row::layer).as_ref()),
            time,
            ..row.clone()
        };
        let oldest = point("z", None, 6);
        let (first, later) = (point("y", Some(&oldest), 7), point("a", None, 8));
        let second = point("x", Some(&first), 7);
        let third = point("b", Some(&second), 7);
        let mut rows = vec![&later, &third, &second, &first, &oldest];
        sort_points(&mut rows, |row| row.time);
        let names: Vec<&str> = rows.iter().map(|row| row.name.as_str()).collect();
        assert_eq!(names, ["z", "y", "x", "b", "a"]);
        let (one, other) = (point("m", Some(&first), 7), point("n", None, 7));
        let (one, other) = (point("m", Some(&other), 7), point("n", Some(&one), 7));
        let mut rows = vec![&one, &other];
        sort_points(&mut rows, |row| row.time);
        assert_eq!(rows.len(), 2);
    }

    /// VolumeKind and fill level of a snapshot are read.
    #[test]
    fn kind_and_fill_level_are_read() {
        let group = recorded();
        let lost = group.row("thick.ds-00000003").expect("it is there");
        assert!(lost.invalid && lost.data.is_some_and(|share| share.reaches(100)));
        let good = group.row("thick.ds-00000004").expect("it is there");
        assert!(!good.invalid && good.active && !good.open);
        assert_eq!((good.size, good.visible_size()), (16 << 20, 32 << 20));
        assert!((3 << 20..4 << 20).contains(&good.used()), "{}", good.used());
        let hidden = group.row("hand").expect("it is there under its name without brackets");
        assert!(hidden.merging && group.row("other").is_some_and(|row| row.merging && row.open));
        let point = group.row("thin.ds-00000001").expect("it is there");
        assert!(!point.active && point.parsed_tags().name.as_deref() == Some("before"));
    }

    /// An area that can hold all of its origin is known as one, and one that is a chunk smaller is not.
    #[test]
    fn area_for_the_whole_origin_cannot_overflow() {
        let recorded = recorded();
        let mut row = recorded.row("thick.ds-00000004").expect("it is there").clone();
        // 32 MiB in chunks of 4 KiB: 8192 chunks, 33 tables, a header and one chunk more.
        (row.chunk, row.size) = (Some(4096), (8192 + 33 + 2) * 4096);
        assert!(row.has_room_for_all());
        row.size -= 4096;
        assert!(!row.has_room_for_all());
        (row.chunk, row.size) = (None, u64::MAX);
        assert!(!row.has_room_for_all(), "it is not known");
    }

    /// Points are recognised by their names and tags.
    #[test]
    fn points_are_recognised_by_name_and_tags() {
        let group = recorded();
        let volume = |name: &str| Volume { group: "vg".into(), name: name.into() };
        let names = |of: &str| -> Vec<String> {
            group.points(&volume(of)).into_iter().map(|row| row.name.clone()).collect()
        };
        assert_eq!(names("thin"), ["thin.ds-00000001"]);
        assert_eq!(names("thick"), ["thick.ds-00000003", "thick.ds-00000004"]);
        assert_eq!(names("other"), Vec::<String>::new());
    }

    /// Text that is not a report is an error, and never a panic.
    #[test]
    fn invalid_report_is_an_error() {
        assert_eq!(parse(r#"{"report":[{"lv":[]}]}"#).expect("an empty one"), None);
        for text in ["", "{}", "{\"report\":[{\"lv\":[{}]}]}", "No volume groups found"] {
            assert!(parse(text).is_err(), "{text}");
        }
        for (from, to) in [
            ("\"373293056\"", "\"-1\""),
            ("\"16777216\"", "\"99999999999999999999\""),
            ("\"100.00\"", "\"9e9\""),
            ("\"4194304\"", "\"\""),
        ] {
            let broken = RECORDED.replace(from, to);
            assert_ne!(broken, RECORDED, "{from} is in the recording");
            let error = parse(&broken).expect_err("it is inconsistent");
            assert_eq!(error.kind(), ErrorKind::Corrupt, "{to}: {error}");
        }
    }

    /// lvm rounds to the nearest hundredth of a percent, so the bound is the next one, and at most the area.
    #[test]
    fn used_bytes_are_an_upper_bound() {
        let recorded = recorded();
        let mut row = recorded.row("thick.ds-00000004").expect("it is there").clone();
        row.size = 1_000_000;
        for (share, used) in [("0.00", 100), ("18.87", 188_800), ("99.99", 1_000_000), ("100.00", 1_000_000)]
        {
            row.data = super::share("x", share).expect("a share");
            assert_eq!(row.used(), used, "{share}");
        }
        row.data = None;
        assert_eq!(row.used(), row.size, "it is not known");
    }

    /// The area of a point with `--lvm-area 100` has room for all, whatever the sizes.
    #[test]
    fn area_of_100_percent_cannot_overflow() {
        let rules = crate::rules::Rules { cow_percent: 100, ..Default::default() };
        let mut row = recorded().row("thick.ds-00000004").expect("it is there").clone();
        row.chunk = Some(4096);
        for size in [8 << 10, 1 << 20, 32 << 20, (32 << 20) + 8192, 10 << 30, 1 << 40] {
            for extent in [8 << 10, 128 << 10, 4 << 20] {
                row.origin_size = Some(size);
                row.size = rules.cow_bytes(size, extent);
                assert!(row.has_room_for_all(), "{size} in extents of {extent}");
                assert_eq!(row.size % extent, 0);
            }
        }
    }

    /// A volume without a creation time is the oldest, and no error.
    #[test]
    fn volume_without_a_time_is_read() {
        let report = RECORDED.replace("\"lv_time\":\"1795428137\"", "\"lv_time\":\"\"");
        assert_ne!(report, RECORDED);
        let group = parse(&report).expect("a report").expect("a group");
        assert_eq!(group.row("thick").map(|row| row.time), Some(0));
    }

    #[test]
    fn shares_are_exact() {
        let read = |text: &str| share("x", text).expect("a share");
        assert_eq!(read("12.34"), Some(Share(1234)));
        assert_eq!(read("100.00").map(|share| share.of(1 << 40)), Some(1 << 40));
        assert_eq!(read("0.5").map(|share| share.to_string()).as_deref(), Some("0.50 %"));
        assert_eq!(read(""), None);
    }
}
