//! Rows to types and back.

use rusqlite::{Connection, OptionalExtension, params};
use serde::Serialize;
use serde::de::DeserializeOwned;

use snapcore::catalogue::{CatalogueId, Entry, Revision, Stamp, StepRow};
use snapcore::catalogue::{Operation, OperationId, OperationState, StepState};
use snapcore::{
    Disk, DiskPoint, DiskRecord, Domain, DomainName, Group, LayerName, Machine, Plan, Point, Snapshot,
    SnapshotId, SnapshotRole, SnapshotTree, Target,
};

/// A row operation's failure.
#[derive(Debug)]
pub(crate) enum Failure {
    /// The database said it.
    Sqlite(rusqlite::Error),
    /// The rows contradict themselves or the program.
    Record(snapcore::Error),
}

impl From<rusqlite::Error> for Failure {
    fn from(error: rusqlite::Error) -> Self {
        Self::Sqlite(error)
    }
}

impl From<snapcore::Error> for Failure {
    fn from(error: snapcore::Error) -> Self {
        Self::Record(error)
    }
}

pub(crate) type Rows<T> = Result<T, Failure>;

fn corrupt(what: &str, found: &str) -> Failure {
    Failure::Record(
        snapcore::Error::new(snapcore::ErrorKind::Corrupt, format!("the catalogue has the {what} {found:?}"))
            .advise("move catalogue.db away and let `domsnap import` rebuild it from the manifests"),
    )
}

/// The word of a value without fields.
pub(crate) fn word<T: Serialize>(value: &T) -> Rows<String> {
    match serde_json::to_value(value) {
        Ok(serde_json::Value::String(word)) => Ok(word),
        other => Err(corrupt("value", &format!("{other:?}"))),
    }
}

fn from_word<T: DeserializeOwned>(what: &str, word: String) -> Rows<T> {
    let shown = word.clone();
    serde_json::from_value(serde_json::Value::String(word)).map_err(|_| corrupt(what, &shown))
}

pub(crate) fn json<T: Serialize>(value: &T) -> Rows<String> {
    serde_json::to_string(value).map_err(|cause| corrupt("value", &cause.to_string()))
}

pub(crate) fn from_json<T: DeserializeOwned>(what: &str, text: &str) -> Rows<T> {
    serde_json::from_str(text).map_err(|cause| corrupt(what, &cause.to_string()))
}

/// Sizes are below 2^63 in every format; what is not is an estimate, and is cut off.
pub(crate) fn integer(value: u64) -> i64 {
    i64::try_from(value).unwrap_or(i64::MAX)
}

fn unsigned(value: i64) -> u64 {
    u64::try_from(value).unwrap_or_default()
}

/// A domain's row number and revision.
pub(crate) fn find(connection: &Connection, name: &DomainName) -> Rows<Option<(i64, Revision)>> {
    Ok(connection
        .prepare_cached("SELECT id, revision FROM domains WHERE name = ?1")?
        .query_row([name.as_str()], |row| Ok((row.get(0)?, Revision(unsigned(row.get(1)?)))))
        .optional()?)
}

pub(crate) fn read_domain(connection: &Connection, id: i64) -> Rows<(Domain, Revision)> {
    let (name, unregistered, hypervisor, active_path, current, revision, control, host, policy) = connection
        .prepare_cached(
            "SELECT name, unregistered, hypervisor, active_path, current, revision, control, host, policy
             FROM domains WHERE id = ?1",
        )?
        .query_row([id], |row| {
            Ok((
                row.get::<_, String>(0)?,
                row.get::<_, bool>(1)?,
                row.get::<_, String>(2)?,
                row.get::<_, String>(3)?,
                row.get::<_, Option<String>>(4)?,
                row.get::<_, i64>(5)?,
                row.get::<_, Option<String>>(6)?,
                row.get::<_, Option<String>>(7)?,
                row.get::<_, Option<String>>(8)?,
            ))
        })?;
    let mut disks = Vec::new();
    let mut statement = connection.prepare_cached(
        "SELECT target, path, format, active FROM disks WHERE domain = ?1 ORDER BY position",
    )?;
    let mut rows = statement.query([id])?;
    while let Some(row) = rows.next()? {
        let target: String = row.get(0)?;
        let owned = connection
            .prepare_cached("SELECT name FROM layers WHERE domain = ?1 AND target = ?2 ORDER BY position")?
            .query_map(params![id, target], |row| row.get(0).map(LayerName))?
            .collect::<rusqlite::Result<_>>()?;
        disks.push(
            DiskRecord::new(
                Disk::new(Target::new(target)?, row.get::<_, String>(1)?, row.get::<_, String>(2)?),
                LayerName(row.get(3)?),
            )
            .owned(owned),
        );
    }
    let mut machines = Vec::new();
    let mut statement = connection
        .prepare_cached("SELECT id, summary, record FROM machines WHERE domain = ?1 ORDER BY id")?;
    let mut rows = statement.query([id])?;
    while let Some(row) = rows.next()? {
        machines.push(
            Machine::new(from_json("machine", &row.get::<_, String>(2)?)?, row.get::<_, String>(1)?)
                .id(row.get(0)?),
        );
    }
    let domain = Domain::new(DomainName::new(name)?, disks)
        .unregistered(unregistered)
        .hypervisor(from_word("hypervisor", hypervisor)?)
        .host(host.map(|text| from_json("host", &text)).transpose()?)
        .control(control.map(|text| from_json("control", &text)).transpose()?)
        .active_path(from_word("active path", active_path)?)
        .current(current.map(|id| from_word("snapshot identity", id)).transpose()?)
        .machines(machines)
        .policy(policy.map(|text| from_json("policy", &text)).transpose()?);
    Ok((domain, Revision(unsigned(revision))))
}

pub(crate) fn read_entry(connection: &Connection, id: i64) -> Rows<Entry> {
    let (domain, revision) = read_domain(connection, id)?;
    let mut snapshots: Vec<Snapshot> = Vec::new();
    // One pass over snapshots and points together: a list of thousands is one query.
    let mut statement = connection.prepare_cached(
        "SELECT s.id, s.name, s.parent, s.created, s.description, s.consistency,
                p.target, p.layer, p.tag, p.virtual_size, s.memory, s.machine, s.skipped, p.identity,
                s.role, s.holds, s.deferred, s.expires, s.policy, s.of_group
         FROM snapshots s LEFT JOIN points p ON p.domain = s.domain AND p.snapshot = s.id
         WHERE s.domain = ?1 ORDER BY s.id, p.position",
    )?;
    let mut rows = statement.query([id])?;
    while let Some(row) = rows.next()? {
        let id: SnapshotId = from_word("snapshot identity", row.get(0)?)?;
        if snapshots.last().is_none_or(|last| last.id != id) {
            let created: String = row.get(3)?;
            snapshots.push(
                Snapshot::new(
                    snapcore::SnapshotName::new(row.get::<_, String>(1)?)?,
                    created.parse().map_err(|_| corrupt("time", &created))?,
                    Vec::new(),
                )
                .id(id)
                .parent(
                    row.get::<_, Option<String>>(2)?
                        .map(|id| from_word("snapshot identity", id))
                        .transpose()?,
                )
                .description(row.get(4)?)
                .consistency(from_word("consistency", row.get(5)?)?)
                .memory(
                    row.get::<_, Option<String>>(10)?
                        .map(|text| from_json("memory image", &text))
                        .transpose()?,
                )
                .machine(row.get(11)?)
                .skipped(
                    row.get::<_, Option<String>>(12)?
                        .map(|text| from_json("skipped disks", &text))
                        .transpose()?
                        .unwrap_or_default(),
                )
                .role(
                    row.get::<_, Option<String>>(14)?
                        .map(|word| from_word("role", word))
                        .transpose()?
                        .unwrap_or_default(),
                )
                .holds(
                    row.get::<_, Option<String>>(15)?
                        .map(|text| from_json("holds", &text))
                        .transpose()?
                        .unwrap_or_default(),
                )
                .deferred(row.get(16)?)
                .expires(
                    row.get::<_, Option<String>>(17)?
                        .map(|time| time.parse().map_err(|_| corrupt("time", &time)))
                        .transpose()?,
                )
                .policy(
                    row.get::<_, Option<String>>(18)?
                        .map(|id| from_word("identity of a policy", id))
                        .transpose()?,
                )
                .group(row.get::<_, Option<String>>(19)?.map(|text| from_json("group", &text)).transpose()?),
            );
        }
        if let (Some(snapshot), Some(target)) = (snapshots.last_mut(), row.get::<_, Option<String>>(6)?) {
            let point = Point { layer: LayerName(row.get(7)?), tag: row.get(8)? };
            let mut member = DiskPoint::new(Target::new(target)?, point, unsigned(row.get(9)?));
            let identity = row.get::<_, Option<String>>(13)?;
            member.identity =
                identity.map(|text| from_json("identity of an internal snapshot", &text)).transpose()?;
            snapshot.disks.push(member);
        }
    }
    let follows = read_follows(connection, id)?;
    Ok(Entry::new(domain, SnapshotTree::new(snapshots), revision).follows(follows))
}

fn read_follows(connection: &Connection, id: i64) -> Rows<Option<Stamp>> {
    let (catalogue, revision) = connection
        .prepare_cached("SELECT follows_catalogue, follows_revision FROM domains WHERE id = ?1")?
        .query_row([id], |row| Ok((row.get::<_, Option<String>>(0)?, row.get::<_, Option<i64>>(1)?)))?;
    let Some(revision) = revision else { return Ok(None) };
    let catalogue = catalogue.map(|id| from_word("catalogue identity", id)).transpose()?;
    Ok(Some(Stamp::new(catalogue, Revision(unsigned(revision)))))
}

/// Identity of this catalogue.
pub(crate) fn read_identity(connection: &Connection) -> Rows<CatalogueId> {
    let id =
        connection.prepare_cached("SELECT id FROM identity")?.query_row([], |row| row.get::<_, String>(0))?;
    from_word("identity", id)
}

/// Records what a domain was taken from.
pub(crate) fn write_follows(connection: &Connection, id: i64, stamp: &Stamp) -> Rows<()> {
    connection.execute(
        "UPDATE domains SET follows_catalogue = ?2, follows_revision = ?3 WHERE id = ?1",
        params![id, stamp.catalogue.map(|catalogue| catalogue.to_string()), integer(stamp.revision.0)],
    )?;
    Ok(())
}

/// Makes the rows of domain `id` say `after` where they say `before`: only what differs is written.
pub(crate) fn write_difference(
    connection: &Connection,
    id: i64,
    before: (&Domain, &SnapshotTree),
    after: (&Domain, &SnapshotTree),
) -> Rows<()> {
    if before.0 != after.0 {
        let domain = after.0;
        connection.execute(
            "UPDATE domains SET unregistered = ?2, hypervisor = ?3, active_path = ?4, current = ?5, control = ?6,
             host = ?7, policy = ?8 WHERE id = ?1",
            params![
                id,
                domain.unregistered,
                word(&domain.hypervisor)?,
                word(&domain.active_path)?,
                domain.current.map(|id| id.to_string()),
                domain.control.as_ref().map(json).transpose()?,
                domain.host.as_ref().map(json).transpose()?,
                domain.policy.as_ref().map(json).transpose()?,
            ],
        )?;
        if before.0.machines != domain.machines {
            write_machines(connection, id, &domain.machines)?;
        }
        if before.0.disks != domain.disks {
            write_disks(connection, id, &domain.disks)?;
        }
    }
    for gone in before.1.iter().filter(|snapshot| after.1.get(snapshot.id).is_none()) {
        connection.execute(
            "DELETE FROM snapshots WHERE domain = ?1 AND id = ?2",
            params![id, gone.id.to_string()],
        )?;
    }
    for snapshot in after.1.iter() {
        if before.1.get(snapshot.id) != Some(snapshot) {
            write_snapshot(connection, id, snapshot)?;
        }
    }
    Ok(())
}

fn write_disks(connection: &Connection, id: i64, disks: &[DiskRecord]) -> Rows<()> {
    connection.execute("DELETE FROM disks WHERE domain = ?1", [id])?;
    for (position, record) in (0_i64..).zip(disks) {
        let Disk { target, address, format, .. } = &record.disk;
        connection.execute(
            "INSERT INTO disks (domain, position, target, path, format, active) VALUES (?1, ?2, ?3, ?4, ?5, ?6)",
            params![id, position, target.as_str(), address.as_str(), format, record.active.as_str()],
        )?;
        for (position, layer) in (0_i64..).zip(&record.owned) {
            connection.execute(
                "INSERT INTO layers (domain, target, position, name) VALUES (?1, ?2, ?3, ?4)",
                params![id, target.as_str(), position, layer.as_str()],
            )?;
        }
    }
    Ok(())
}

fn write_machines(connection: &Connection, id: i64, machines: &[Machine]) -> Rows<()> {
    connection.execute("DELETE FROM machines WHERE domain = ?1", [id])?;
    for machine in machines {
        connection.execute(
            "INSERT INTO machines (domain, id, summary, record) VALUES (?1, ?2, ?3, ?4)",
            params![id, machine.id, machine.summary, json(&machine.record)?],
        )?;
    }
    Ok(())
}

fn write_snapshot(connection: &Connection, id: i64, snapshot: &Snapshot) -> Rows<()> {
    let key = snapshot.id.to_string();
    connection
        .prepare_cached("DELETE FROM snapshots WHERE domain = ?1 AND id = ?2")?
        .execute(params![id, key])?;
    connection
        .prepare_cached(
            "INSERT INTO snapshots (id, domain, name, parent, created, description, consistency, memory, machine,
                 skipped, role, holds, deferred, expires, policy, of_group)
             VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8, ?9, ?10, ?11, ?12, ?13, ?14, ?15, ?16)",
        )?
        .execute(params![
            key,
            id,
            snapshot.name.as_str(),
            snapshot.parent.map(|parent| parent.to_string()),
            snapshot.created.to_string(),
            snapshot.description,
            word(&snapshot.consistency)?,
            snapshot.memory.as_ref().map(json).transpose()?,
            snapshot.machine,
            (!snapshot.skipped.is_empty()).then(|| json(&snapshot.skipped)).transpose()?,
            (snapshot.role != SnapshotRole::Snapshot).then(|| snapshot.role.as_str()),
            (!snapshot.holds.is_empty()).then(|| json(&snapshot.holds)).transpose()?,
            snapshot.deferred,
            snapshot.expires.map(|expires| expires.to_string()),
            snapshot.policy.map(|policy| policy.to_string()),
            snapshot.group.as_ref().map(json).transpose()?,
        ])?;
    let mut statement = connection.prepare_cached(
        "INSERT INTO points (domain, snapshot, position, target, layer, tag, virtual_size, identity)
         VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8)",
    )?;
    for (position, member) in (0_i64..).zip(&snapshot.disks) {
        statement.execute(params![
            id,
            key,
            position,
            member.target.as_str(),
            member.point.layer.as_str(),
            member.point.tag,
            integer(member.virtual_size),
            member.identity.as_ref().map(json).transpose()?,
        ])?;
    }
    Ok(())
}

pub(crate) fn write_operation(connection: &Connection, domain: i64, operation: &Operation) -> Rows<()> {
    let id = operation.id.to_string();
    let plan = &operation.plan;
    connection.execute(
        "INSERT INTO operations (id, domain, kind, state, started, snapshots, commit_edits, notes, errors, of_group)
         VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8, ?9, ?10)",
        params![
            id,
            domain,
            plan.operation,
            operation.state.as_str(),
            operation.started.to_string(),
            json(&plan.snapshots)?,
            json(&plan.commit)?,
            json(&plan.notes)?,
            json(&operation.errors)?,
            operation.group.as_ref().map(json).transpose()?,
        ],
    )?;
    let mut statement = connection.prepare_cached(
        "INSERT INTO steps (operation, position, grp, nested, target, summary, bytes, may_wait, action, edits, state)
         VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8, ?9, ?10, ?11)",
    )?;
    for (position, (row, state)) in (0_i64..).zip(plan.rows()?.iter().zip(&operation.steps)) {
        statement.execute(params![
            id,
            position,
            word(&row.group)?,
            row.nested,
            row.target.as_ref().map(Target::as_str),
            row.summary,
            integer(row.bytes),
            row.deferrable,
            json(&row.action)?,
            json(&row.edits)?,
            state.as_str(),
        ])?;
    }
    Ok(())
}

/// Choice among the operations of a domain.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Wanted {
    /// All that the journal has.
    All,
    /// Those that have not ended.
    Unfinished,
    /// One.
    One(OperationId),
}

/// The operations of a domain, oldest first.
pub(crate) fn read_operations(connection: &Connection, domain: i64, wanted: Wanted) -> Rows<Vec<Operation>> {
    let only = match wanted {
        Wanted::One(id) => Some(id.to_string()),
        Wanted::All | Wanted::Unfinished => None,
    };
    let mut statement = connection.prepare_cached(
        "SELECT id, kind, state, started, snapshots, commit_edits, notes, errors, of_group FROM operations
         WHERE domain = ?1 AND (id = ?2 OR (?2 IS NULL AND (?3 OR state NOT IN ('done', 'undone')))) ORDER BY id",
    )?;
    let mut rows = statement.query(params![domain, only, wanted == Wanted::All])?;
    let mut operations = Vec::new();
    while let Some(row) = rows.next()? {
        let key: String = row.get(0)?;
        let state: String = row.get(2)?;
        let started: String = row.get(3)?;
        let mut plan =
            Plan::new(row.get::<_, String>(1)?, from_json("snapshot names", &row.get::<_, String>(4)?)?)
                .commit(from_json("edit", &row.get::<_, String>(5)?)?)
                .notes(from_json("notes", &row.get::<_, String>(6)?)?);
        let steps = read_steps(connection, &key, &mut plan)?;
        operations.push(
            Operation::new(
                from_word("operation identity", key)?,
                started.parse().map_err(|_| corrupt("time", &started))?,
                plan,
            )
            .state(OperationState::from_word(&state).ok_or_else(|| corrupt("operation state", &state))?)
            .steps(steps)
            .errors(from_json("errors", &row.get::<_, String>(7)?)?)
            .group(row.get::<_, Option<String>>(8)?.map(|text| from_json("group", &text)).transpose()?),
        );
    }
    Ok(operations)
}

/// Adds the steps of an operation to its plan; returns their states.
fn read_steps(connection: &Connection, operation: &str, plan: &mut Plan) -> Rows<Vec<StepState>> {
    let mut states = Vec::new();
    let mut statement = connection.prepare_cached(
        "SELECT grp, nested, target, summary, bytes, may_wait, action, edits, state FROM steps
         WHERE operation = ?1 ORDER BY position",
    )?;
    let mut rows = statement.query([operation])?;
    while let Some(row) = rows.next()? {
        let state: String = row.get(8)?;
        states.push(StepState::from_word(&state).ok_or_else(|| corrupt("step state", &state))?);
        plan.push_row(
            StepRow::new(
                from_word::<Group>("step group", row.get(0)?)?,
                from_json("step", &row.get::<_, String>(6)?)?,
                row.get::<_, String>(3)?,
            )
            .nested(row.get(1)?)
            .target(row.get::<_, Option<String>>(2)?.map(Target::new).transpose()?)
            .bytes(unsigned(row.get(4)?))
            .deferrable(row.get(5)?)
            .edits(from_json("edit", &row.get::<_, String>(7)?)?),
        )?;
    }
    Ok(states)
}
