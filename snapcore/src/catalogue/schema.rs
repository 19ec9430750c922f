//! The tables of the SQLite catalogue, and how older ones become them.

use rusqlite::Connection;

/// What makes a database of version N one of version N + 1, in order. Only ever added to.
pub(super) const MIGRATIONS: &[&str] = &["
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
"];

/// What a database's version means to this program.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Version {
    /// It is this program's.
    Ours,
    /// It is older, and can be brought forward.
    Older,
    /// A newer domsnap wrote it.
    Newer(i64),
}

/// Reads the version of a database against `migrations`.
pub(super) fn version(connection: &Connection, migrations: &[&str]) -> rusqlite::Result<Version> {
    let found: i64 = connection.query_row("PRAGMA user_version", [], |row| row.get(0))?;
    let ours = i64::try_from(migrations.len()).unwrap_or(i64::MAX);
    Ok(match found.cmp(&ours) {
        std::cmp::Ordering::Less => Version::Older,
        std::cmp::Ordering::Equal => Version::Ours,
        std::cmp::Ordering::Greater => Version::Newer(found),
    })
}

/// Brings a database forward to the last of `migrations`, in one transaction: a crash leaves the old or the new.
pub(super) fn migrate(connection: &mut Connection, migrations: &[&str]) -> rusqlite::Result<()> {
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

    #[test]
    fn an_older_database_is_brought_forward_and_keeps_its_rows() {
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
