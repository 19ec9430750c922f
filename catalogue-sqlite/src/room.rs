//! Room that the catalogue keeps for itself, so that what gives space back can be recorded on a full file
//! system.
//!
//! A commit writes to SQLite's log alone, and SQLite begins the log again from its start after each
//! checkpoint. So blocks are reserved behind the end of the log (`fallocate`, its size stays as it is) for a
//! checkpoint's pages and a transaction. A checkpoint writes to the database, which grows only where it has
//! no free pages: so it is given some, and new ones when they become few. Both are topped up when the file
//! system has room.
//!
//! **What is durable before what.** Nothing rests on the reserve: without it a commit fails as it does on any
//! full file system, before it is recorded. The order of log, database and flushes is SQLite's. Free pages
//! are made by a transaction of their own, before the one that may need them.
//!
//! SQLite's index of the log (`-shm`) is created by the first process that opens the database, and needs
//! blocks then. Where there are none, the database is opened by this process alone
//! (`locking_mode=EXCLUSIVE`), which needs no index.
//!
//! SQLite maps that index, and writes one byte of each of its pages in advance. Where the blocks of the file
//! system are smaller than a page, the kernel finds the rest missing only at the first store into the
//! mapping, and ends the process by SIGBUS. There the room is asked for before the database is opened. SQLite
//! stores into all pages when it creates the index, so none is missing later. (`fallocate` could not reserve
//! them: closing a second descriptor of the file would release SQLite's own locks on it.)

use camino::{Utf8Path, Utf8PathBuf};
use confined_files::Kind;
use rusqlite::{Connection, TransactionBehavior};
use rustix::fs::{FallocateFlags, fallocate, statvfs};
use std::os::unix::fs::MetadataExt;

/// Bytes of the log that are reserved: 200 pages, at which it is checkpointed, and a transaction of 100.
const LOG: u64 = 300 * (4096 + 24);

/// Free pages that are few for a database.
const FEW_PAGES: i64 = 48;

/// Bytes of free pages that a database with few is given.
const PAGES: u64 = 512 << 10;

/// Bytes that a file system must have free, for the database to take some of them in advance.
const PLENTY: u64 = 4 << 20;

/// Bytes by which SQLite makes its index longer: it writes one byte of each.
const INDEX_PAGE: u64 = 4096;

/// Bytes that must be free before SQLite makes its index, which has 32 KiB, in several processes at once.
const INDEX: u64 = 128 << 10;

/// Returns true if a block may be missing in the middle of a page of SQLite's index.
pub(crate) fn may_lack_index(database: &Utf8Path) -> bool {
    statvfs(database.as_std_path()).is_ok_and(|found| {
        found.f_frsize < INDEX_PAGE && found.f_bavail.saturating_mul(found.f_frsize) < INDEX
    })
}

/// Reserves blocks for the database's log. Only a favour: a file that is not there or not ours to write, or a
/// file system that cannot do it, is left as it is.
pub(crate) fn keep_in_log(database: &Utf8Path) {
    let log = Utf8PathBuf::from(format!("{database}-wal"));
    let Ok(log) = confined_files::open(log.as_std_path(), true, Kind::Regular) else { return };
    let Ok(found) = log.metadata() else { return };
    if found.blocks().saturating_mul(512) < LOG {
        let _ = fallocate(&log, FallocateFlags::KEEP_SIZE, 0, LOG);
    }
}

/// Gives the database free pages where it has few. They are in the file itself after this, not only in the
/// log.
pub(crate) fn keep_free_pages(connection: &mut Connection, database: &Utf8Path) -> rusqlite::Result<()> {
    let free: i64 = connection.query_row("PRAGMA freelist_count", [], |row| row.get(0))?;
    if free >= FEW_PAGES || !has_plenty(database) {
        return Ok(());
    }
    let transaction = connection.transaction_with_behavior(TransactionBehavior::Immediate)?;
    transaction.execute_batch(&format!(
        "CREATE TABLE room (bytes BLOB NOT NULL) STRICT; INSERT INTO room VALUES (zeroblob({PAGES})); DROP TABLE room;"
    ))?;
    transaction.commit()?;
    connection.query_row("PRAGMA wal_checkpoint(PASSIVE)", [], |_| Ok(()))
}

fn has_plenty(file: &Utf8Path) -> bool {
    statvfs(file.as_std_path()).is_ok_and(|found| found.f_bavail.saturating_mul(found.f_frsize) >= PLENTY)
}
