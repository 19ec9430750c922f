//! The tables of the SQLite catalogue, and how older ones become them.

use rusqlite::Connection;

/// Migrations from version N to version N + 1, in order. Only ever appended to.
pub(crate) const MIGRATIONS: &[&str] = &["
-- The last revision that was given to any domain.
CREATE TABLE revision (
    only INTEGER PRIMARY KEY CHECK (only = 1),
    last INTEGER NOT NULL
) STRICT;
INSERT INTO revision VALUES (1, 0);

CREATE TABLE domains (
    id INTEGER PRIMARY KEY,
    name TEXT NOT NULL UNIQUE,
    unregistered INTEGER NOT NULL CHECK (unregistered IN (0, 1)),
    hypervisor TEXT NOT NULL,
    active_path TEXT NOT NULL,
    current TEXT,
    revision INTEGER NOT NULL
) STRICT;

CREATE TABLE disks (
    domain INTEGER NOT NULL REFERENCES domains(id) ON DELETE CASCADE,
    position INTEGER NOT NULL,
    target TEXT NOT NULL,
    path TEXT NOT NULL UNIQUE,
    format TEXT NOT NULL,
    active TEXT NOT NULL,
    PRIMARY KEY (domain, target)
) STRICT, WITHOUT ROWID;

CREATE TABLE layers (
    domain INTEGER NOT NULL,
    target TEXT NOT NULL,
    position INTEGER NOT NULL,
    name TEXT NOT NULL,
    PRIMARY KEY (domain, target, name),
    FOREIGN KEY (domain, target) REFERENCES disks(domain, target) ON DELETE CASCADE
) STRICT, WITHOUT ROWID;

CREATE TABLE snapshots (
    id TEXT PRIMARY KEY,
    domain INTEGER NOT NULL REFERENCES domains(id) ON DELETE CASCADE,
    name TEXT NOT NULL,
    parent TEXT,
    created TEXT NOT NULL,
    description TEXT NOT NULL,
    consistency TEXT NOT NULL,
    UNIQUE (domain, name)
) STRICT, WITHOUT ROWID;

CREATE TABLE points (
    snapshot TEXT NOT NULL REFERENCES snapshots(id) ON DELETE CASCADE,
    position INTEGER NOT NULL,
    target TEXT NOT NULL,
    layer TEXT NOT NULL,
    tag TEXT,
    virtual_size INTEGER NOT NULL,
    PRIMARY KEY (snapshot, target)
) STRICT, WITHOUT ROWID;

CREATE TABLE operations (
    id TEXT PRIMARY KEY,
    domain INTEGER NOT NULL REFERENCES domains(id) ON DELETE CASCADE,
    kind TEXT NOT NULL,
    state TEXT NOT NULL,
    started TEXT NOT NULL,
    snapshots TEXT NOT NULL,
    commit_edits TEXT NOT NULL,
    notes TEXT NOT NULL,
    errors TEXT NOT NULL
) STRICT, WITHOUT ROWID;
CREATE INDEX operations_of_domain ON operations(domain, state);

CREATE TABLE steps (
    operation TEXT NOT NULL REFERENCES operations(id) ON DELETE CASCADE,
    position INTEGER NOT NULL,
    grp TEXT NOT NULL,
    target TEXT NOT NULL,
    summary TEXT NOT NULL,
    bytes INTEGER NOT NULL,
    may_wait INTEGER NOT NULL CHECK (may_wait IN (0, 1)),
    action TEXT NOT NULL,
    edits TEXT NOT NULL,
    state TEXT NOT NULL,
    PRIMARY KEY (operation, position)
) STRICT, WITHOUT ROWID;
", "
-- Which catalogue this is: manifests are marked with it.
CREATE TABLE identity (
    only INTEGER PRIMARY KEY CHECK (only = 1),
    id TEXT NOT NULL
) STRICT;
INSERT INTO identity VALUES (1, lower(hex(randomblob(16))));

-- The manifests that a domain was taken from.
ALTER TABLE domains ADD COLUMN follows_catalogue TEXT;
ALTER TABLE domains ADD COLUMN follows_revision INTEGER;

-- An identity of a snapshot is a domain's own: what is written of one domain cannot reach another's.
CREATE TABLE snapshots_of_domains (
    domain INTEGER NOT NULL REFERENCES domains(id) ON DELETE CASCADE,
    id TEXT NOT NULL,
    name TEXT NOT NULL,
    parent TEXT,
    created TEXT NOT NULL,
    description TEXT NOT NULL,
    consistency TEXT NOT NULL,
    PRIMARY KEY (domain, id),
    UNIQUE (domain, name)
) STRICT, WITHOUT ROWID;
CREATE TABLE points_of_domains (
    domain INTEGER NOT NULL,
    snapshot TEXT NOT NULL,
    position INTEGER NOT NULL,
    target TEXT NOT NULL,
    layer TEXT NOT NULL,
    tag TEXT,
    virtual_size INTEGER NOT NULL,
    PRIMARY KEY (domain, snapshot, target),
    FOREIGN KEY (domain, snapshot) REFERENCES snapshots_of_domains(domain, id) ON DELETE CASCADE
) STRICT, WITHOUT ROWID;
INSERT INTO snapshots_of_domains SELECT domain, id, name, parent, created, description, consistency FROM snapshots;
INSERT INTO points_of_domains
    SELECT s.domain, p.snapshot, p.position, p.target, p.layer, p.tag, p.virtual_size
    FROM points p JOIN snapshots s ON s.id = p.snapshot;
DROP TABLE points;
DROP TABLE snapshots;
ALTER TABLE snapshots_of_domains RENAME TO snapshots;
ALTER TABLE points_of_domains RENAME TO points;
", "
-- Domains that run: how they are reached, what they are, their memory; and steps that run inside others.
ALTER TABLE domains ADD COLUMN control TEXT;
ALTER TABLE snapshots ADD COLUMN memory TEXT;
ALTER TABLE snapshots ADD COLUMN machine TEXT;
ALTER TABLE steps ADD COLUMN inside INTEGER NOT NULL DEFAULT 0 CHECK (inside IN (0, 1));
CREATE TABLE machines (
    domain INTEGER NOT NULL REFERENCES domains(id) ON DELETE CASCADE,
    id TEXT NOT NULL,
    summary TEXT NOT NULL,
    record TEXT NOT NULL,
    PRIMARY KEY (domain, id)
) STRICT, WITHOUT ROWID;
", "
-- The files that a domain's images are backed by and that are no layers of its own, as JSON; absent: not recorded.
ALTER TABLE domains ADD COLUMN bases TEXT;
", "
-- Disks that the user left out of a snapshot, as JSON.
ALTER TABLE snapshots ADD COLUMN skipped TEXT;
", "
-- Of a machine's environment only what another start needs is kept (`secrets::NEEDED`): the rest may be tokens and passwords. What is
-- overwritten is overwritten on the disk too. In the journal it is needed no more than that.
PRAGMA secure_delete = ON;
UPDATE machines SET record = json_set(record, '$.process.environment', json((
    SELECT coalesce(json_group_array(json(value)), '[]') FROM json_each(record, '$.process.environment')
    WHERE json_extract(value, '$[0]') IN (
     'PATH','HOME','LANG','LANGUAGE','TZ','TMPDIR','DISPLAY','WAYLAND_DISPLAY','XAUTHORITY','XDG_RUNTIME_DIR','LD_LIBRARY_PATH',
     'QEMU_MODULE_DIR','QEMU_AUDIO_DRV')
    OR substr(json_extract(value, '$[0]'), 1, 3) = 'LC_'
))) WHERE json_valid(record) AND json_type(record, '$.process.environment') = 'array';
UPDATE operations SET commit_edits = json_remove(commit_edits, '$[0].machine.record.process.environment',
    '$[1].machine.record.process.environment', '$[2].machine.record.process.environment',
    '$[3].machine.record.process.environment') WHERE json_valid(commit_edits) AND commit_edits LIKE '%environment%';
", "
-- Identity of an internal snapshot among those of its name, as JSON; absent: not recorded.
ALTER TABLE points ADD COLUMN identity TEXT;
", "
-- A step of the domain itself has no target; before, its target was the word 'domain', which no disk could be called.
-- The numbers of steps stay, and with them what is recorded of an operation that was interrupted.
CREATE TABLE steps_of_plans (
    operation TEXT NOT NULL REFERENCES operations(id) ON DELETE CASCADE,
    position INTEGER NOT NULL,
    grp TEXT NOT NULL,
    nested INTEGER NOT NULL CHECK (nested IN (0, 1)),
    target TEXT,
    summary TEXT NOT NULL,
    bytes INTEGER NOT NULL,
    may_wait INTEGER NOT NULL CHECK (may_wait IN (0, 1)),
    action TEXT NOT NULL,
    edits TEXT NOT NULL,
    state TEXT NOT NULL,
    PRIMARY KEY (operation, position)
) STRICT, WITHOUT ROWID;
INSERT INTO steps_of_plans
    SELECT operation, position, grp, inside, nullif(target, 'domain'), summary, bytes, may_wait, action, edits, state
    FROM steps;
DROP TABLE steps;
ALTER TABLE steps_of_plans RENAME TO steps;
", "
-- The machine that a domain runs on, as JSON; absent: not recorded.
ALTER TABLE domains ADD COLUMN host TEXT;
", "
-- The purpose of a snapshot's record (absent: a snapshot of the user's), its holds as JSON (absent: none), if it is deleted when the
-- last of them ends, and the time from which it may be deleted.
ALTER TABLE snapshots ADD COLUMN role TEXT;
ALTER TABLE snapshots ADD COLUMN holds TEXT;
ALTER TABLE snapshots ADD COLUMN deferred INTEGER NOT NULL DEFAULT 0 CHECK (deferred IN (0, 1));
ALTER TABLE snapshots ADD COLUMN expires TEXT;
", "
-- The policy of a domain, as JSON; and the one that took a snapshot (absent: a user, or another program).
ALTER TABLE domains ADD COLUMN policy TEXT;
ALTER TABLE snapshots ADD COLUMN policy TEXT;
", "
-- The group of an operation, and of a snapshot, with other domains, as JSON; absent: it has none.
ALTER TABLE operations ADD COLUMN of_group TEXT;
ALTER TABLE snapshots ADD COLUMN of_group TEXT;
"];

/// Meaning of a database's version to this program.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Version {
    /// It is this program's.
    Ours,
    /// It is older, and can be brought forward.
    Older,
    /// A newer domsnap wrote it.
    Newer(i64),
}

/// Reads the version of a database against `migrations`.
pub(crate) fn version(connection: &Connection, migrations: &[&str]) -> rusqlite::Result<Version> {
    let found: i64 = connection.query_row("PRAGMA user_version", [], |row| row.get(0))?;
    let ours = i64::try_from(migrations.len()).unwrap_or(i64::MAX);
    Ok(match found.cmp(&ours) {
        std::cmp::Ordering::Less => Version::Older,
        std::cmp::Ordering::Equal => Version::Ours,
        std::cmp::Ordering::Greater => Version::Newer(found),
    })
}

/// Brings a database forward to the last of `migrations`, in one transaction: a crash leaves the old or the
/// new.
pub(crate) fn migrate(connection: &mut Connection, migrations: &[&str]) -> rusqlite::Result<()> {
    let transaction = connection.transaction_with_behavior(rusqlite::TransactionBehavior::Immediate)?;
    // Read under the transaction's lock: another process may have done it meanwhile.
    let found: i64 = transaction.query_row("PRAGMA user_version", [], |row| row.get(0))?;
    for (number, migration) in (1_i64..).zip(migrations) {
        if number > found {
            transaction.execute_batch(migration)?;
            transaction.pragma_update(None, "user_version", number)?;
        }
    }
    transaction.commit()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// An older database is migrated and keeps its rows.
    #[test]
    fn older_database_is_migrated_with_its_rows() {
        let first = "CREATE TABLE a (x INTEGER) STRICT";
        let second = "ALTER TABLE a ADD COLUMN y INTEGER NOT NULL DEFAULT 7";
        let mut connection = Connection::open_in_memory().unwrap();
        migrate(&mut connection, &[first]).unwrap();
        connection.execute("INSERT INTO a VALUES (1)", []).unwrap();
        assert_eq!(version(&connection, &[first, second]).unwrap(), Version::Older);
        migrate(&mut connection, &[first, second]).unwrap();
        migrate(&mut connection, &[first, second]).unwrap();
        let row: (i64, i64) =
            connection.query_row("SELECT x, y FROM a", [], |row| Ok((row.get(0)?, row.get(1)?))).unwrap();
        assert_eq!(row, (1, 7));
        assert_eq!(version(&connection, &[first, second]).unwrap(), Version::Ours);
        assert_eq!(version(&connection, &[first]).unwrap(), Version::Newer(2));
    }

    /// A catalogue of the first version keeps snapshots and points, and gets an identity.
    #[test]
    fn first_version_keeps_snapshots_gets_identity() {
        let mut connection = Connection::open_in_memory().unwrap();
        connection.pragma_update(None, "foreign_keys", true).unwrap();
        migrate(&mut connection, &MIGRATIONS[..1]).unwrap();
        connection
            .execute_batch(
                "INSERT INTO domains VALUES (1, 'web', 0, 'none', 'keep', 'i1', 3), (2, 'db', 0, 'none', 'keep', NULL, 4);
                 INSERT INTO snapshots VALUES ('i1', 1, 's1', NULL, 't', '', 'clean'), ('i2', 2, 's1', NULL, 't', '', 'clean');
                 INSERT INTO points VALUES ('i1', 0, 'vda', 'L', NULL, 5), ('i1', 1, 'vdb', 'M', 'tag', 6), ('i2', 0, 'vda', 'N', NULL, 7);",
            )
            .unwrap();
        migrate(&mut connection, MIGRATIONS).unwrap();
        let count = |query: &str| connection.query_row(query, [], |row| row.get::<_, i64>(0)).unwrap();
        assert_eq!(count("SELECT count(*) FROM snapshots WHERE domain = 1 AND id = 'i1'"), 1);
        assert_eq!(count("SELECT sum(virtual_size) FROM points WHERE domain = 1 AND snapshot = 'i1'"), 11);
        assert_eq!(count("SELECT length(id) FROM identity"), 32);
        // One identity in two domains is two snapshots; what is deleted takes its own points along.
        connection
            .execute_batch(
                "INSERT INTO snapshots (domain, id, name, created, description, consistency)
                 VALUES (2, 'i1', 's2', 't', '', 'clean')",
            )
            .unwrap();
        connection.execute_batch("DELETE FROM snapshots WHERE domain = 1").unwrap();
        assert_eq!((count("SELECT count(*) FROM snapshots"), count("SELECT count(*) FROM points")), (2, 1));
        connection.execute_batch("DELETE FROM domains").unwrap();
        assert_eq!((count("SELECT count(*) FROM snapshots"), count("SELECT count(*) FROM points")), (0, 0));
    }

    #[test]
    fn old_records_of_machines_lose_their_environment() {
        let mut connection = Connection::open_in_memory().unwrap();
        connection.pragma_update(None, "foreign_keys", true).unwrap();
        migrate(&mut connection, &MIGRATIONS[..3]).unwrap();
        let record = |environment: &str| {
            format!(
                r#"{{"machine":"q35","process":{{"command_line":["qemu"],"environment":{environment}}}}}"#
            )
        };
        let old = record(r#"[["API_TOKEN","hush"],["PATH","/bin"],["LC_ALL","C"],["LCX","hush"]]"#);
        connection
            .execute_batch(&format!(
                r#"INSERT INTO domains (id, name, unregistered, hypervisor, active_path, current, revision)
                     VALUES (1, 'web', 0, 'qemu', 'keep', NULL, 3);
                 INSERT INTO machines VALUES (1, 'm1', '', '{old}'), (1, 'm2', '', '{{"xen":1}}'), (1, 'm3', '', '{}');
                 INSERT INTO operations VALUES ('o1', 1, 'create', 'done', 't', '[]',
                     '[{{"edit":"add-machine","machine":{{"id":"m1","record":{old}}}}}]', '[]', '[]');"#,
                record("[]")
            ))
            .unwrap();
        migrate(&mut connection, MIGRATIONS).unwrap();
        let text = |query: &str| connection.query_row(query, [], |row| row.get::<_, String>(0)).unwrap();
        assert_eq!(
            text("SELECT record FROM machines WHERE id = 'm1'"),
            record(r#"[["PATH","/bin"],["LC_ALL","C"]]"#)
        );
        assert_eq!(text("SELECT record FROM machines WHERE id = 'm2'"), r#"{"xen":1}"#);
        assert_eq!(text("SELECT record FROM machines WHERE id = 'm3'"), record("[]"));
        let edits = text("SELECT commit_edits FROM operations");
        assert!(!edits.contains("hush") && edits.contains("command_line"), "{edits}");
    }

    /// An operation that an older version has in flight is read with the shape that it had: what was nested
    /// is, the word `domain` is the domain, and each step keeps its number and its state. Rows that have no
    /// such shape are refused, with a way on.
    #[test]
    fn operation_in_flight_survives_the_upgrade() {
        use snapcore::catalogue::{OperationState, StepState};
        use snapcore::{CutUnit, FinishUnit, PlanStep};

        let old = |rows: &str| {
            let mut connection = Connection::open_in_memory().unwrap();
            connection.pragma_update(None, "foreign_keys", true).unwrap();
            migrate(&mut connection, &MIGRATIONS[..7]).unwrap();
            connection
                .execute_batch(&format!(
                    r#"INSERT INTO domains (id, name, unregistered, hypervisor, active_path, current, revision)
                         VALUES (1, 'web', 0, 'qemu', 'keep', NULL, 3);
                     INSERT INTO operations VALUES ('0190b3a0-0000-7000-8000-000000000001', 1, 'create',
                         'cutting', '2026-01-01T00:00:00Z', '["s1"]', '[]', '[]', '[]');
                     INSERT INTO steps SELECT '0190b3a0-0000-7000-8000-000000000001', column1, column2, column3,
                         'summary', 0, column5, column6, '[]', column7, column4 FROM (VALUES {rows});"#,
                ))
                .unwrap();
            migrate(&mut connection, MIGRATIONS).unwrap();
            crate::record::read_operations(&connection, 1, crate::record::Wanted::Unfinished)
        };
        // Number, part, target, nested, deferrable, action, state.
        let operation = old(r#"
            (0, 'prepare', 'vda', 0, 0, '{"do":"name-layer"}', 'done'),
            (1, 'cut', 'domain', 0, 0, '{"do":"attach","disks":[]}', 'started'),
            (2, 'cut', 'vda', 1, 0, '{"do":"switch"}', 'started'),
            (3, 'cut', 'vdb', 1, 0, '{"do":"switch"}', 'started'),
            (4, 'cut', 'vdb', 0, 0, '{"do":"publish"}', 'pending'),
            (5, 'finish', 'vda', 0, 1, '{"do":"merge"}', 'pending'),
            (6, 'finish', 'vda', 1, 0, '{"do":"switch"}', 'pending'),
            (7, 'finish', 'domain', 0, 0, '{"do":"remove-memory","file":"/m"}', 'pending')"#);
        let [operation] = &operation.unwrap()[..] else { panic!("there is one operation") };
        assert_eq!(operation.state, OperationState::Cutting);
        let plan = &operation.plan;
        assert!(matches!(&plan.prepare[..], [PlanStep::Disk(_)]));
        let [CutUnit::Domain { nested, .. }, CutUnit::Disk(publish)] = &plan.cut[..] else {
            panic!("{plan:?}")
        };
        assert_eq!((nested.len(), publish.target.as_str()), (2, "vdb"));
        let [FinishUnit::Disk(merge), FinishUnit::Domain(_)] = &plan.finish[..] else { panic!("{plan:?}") };
        assert!(merge.deferrable && merge.nested.len() == 1);
        let (done, started, pending) = (StepState::Done, StepState::Started, StepState::Pending);
        assert_eq!(
            operation.steps,
            [done, started, started, started, pending, pending, pending, pending],
            "a step's number is its place"
        );
        // In a form that no version wrote.
        let refused = old("(0, 'cut', 'vda', 1, 0, '{}', 'started')").expect_err("it is nested in nothing");
        let crate::record::Failure::Record(error) = refused else { panic!("{refused:?}") };
        assert!(error.to_string().contains("where no plan has one"), "{error}");
        assert!(error.advice().unwrap().contains("recover with that one"), "{error}");
    }

    #[test]
    fn a_migration_that_fails_changes_nothing() {
        let first = "CREATE TABLE a (x INTEGER) STRICT";
        let bad = "CREATE TABLE b (x INTEGER) STRICT; CREATE TABLE a (x INTEGER) STRICT";
        let mut connection = Connection::open_in_memory().unwrap();
        migrate(&mut connection, &[first]).unwrap();
        assert!(migrate(&mut connection, &[first, bad]).is_err());
        assert_eq!(version(&connection, &[first]).unwrap(), Version::Ours);
        assert!(connection.execute("INSERT INTO b VALUES (1)", []).is_err());
    }
}
