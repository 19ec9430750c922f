//! The catalogue of one machine, in one SQLite database.
//!
//! **What is durable before what.** The database is in WAL mode with `synchronous=FULL`: one flush of the log
//! a transaction, before [`Catalogue::commit`] returns. Directories that are made are flushed into their
//! parents first. The log is kept when the last process closes it, so that a command ends without a
//! checkpoint; SQLite checkpoints when the log has grown to 200 pages.
//!
//! Reading makes no directory and no database: a state directory that does not exist reads as empty.

use std::fs::OpenOptions;
use std::os::unix::fs::OpenOptionsExt;
use std::pin::Pin;
use std::sync::{Arc, Mutex};
use std::task::{Context, Poll};
use std::time::Duration;

use async_trait::async_trait;
use camino::{Utf8Path, Utf8PathBuf};
use futures_core::Stream;
use rusqlite::config::DbConfig;
use rusqlite::{Connection, MAIN_DB, OpenFlags, TransactionBehavior, params};
use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;

use snapcore::catalogue::{Catalogue, CatalogueId, Change, Entry, EntrySummary, Lease, Revision, Revisions};
use snapcore::catalogue::{Operation, OperationId, OperationState};
use snapcore::{DiskAddress, Domain, DomainName, Error, ErrorKind, Result, SnapshotTree};

use crate::lock;
use crate::record::{self, Failure, Rows, Wanted};
use crate::room;
use crate::schema::{self, MIGRATIONS, Version};

/// Time to wait for a transaction of another process.
const BUSY_TIMEOUT: Duration = Duration::from_secs(10);

/// Time to wait for another process, where the next try can do with it.
const BRIEF: Duration = Duration::from_millis(100);

/// At how many pages the log is checkpointed. Each process reads the log when it opens the database, so a
/// long one costs every command; a checkpoint costs two flushes now and then.
const CHECKPOINT_PAGES: u32 = 200;

/// Interval at which [`Catalogue::watch`] looks for changes.
const WATCH_INTERVAL: Duration = Duration::from_millis(200);

/// Number of ended operations of a domain that the journal keeps, for people who read it.
const KEPT_OPERATIONS: i64 = 32;

/// Advice for a catalogue that cannot be read.
const REBUILD: &str = "move it away with its -wal and -shm files, and run `domsnap import` on each domain's images: it \
                       rebuilds the catalogue from the manifests beside them";

/// Refuses anything but a regular file in the catalogue's place: a FIFO, a socket, a directory. SQLite's own
/// message names only an error code.
fn require_regular(database: &Utf8Path) -> Result<()> {
    match database.metadata() {
        Ok(found) if !found.is_file() => {
            Err(Error::new(ErrorKind::Refused, format!("the catalogue {database} is not a regular file"))
                .state("no changes made")
                .advise(REBUILD))
        }
        // A file that cannot be examined cannot be opened either, and that error says why.
        _ => Ok(()),
    }
}

/// Domains, snapshots and the journal in `catalogue.db` of a state directory; leases are lock files beside
/// it.
#[derive(Clone)]
pub struct SqliteCatalogue {
    shared: Arc<Shared>,
}

struct Shared {
    directory: Utf8PathBuf,
    connection: Mutex<Option<Open>>,
}

struct Open {
    connection: Connection,
    writable: bool,
}

/// Opens a database that exists, and reads with `first` what it is. Where the file system is full it is
/// opened for this process alone, see [`crate::room`].
fn opened<T>(path: &Utf8Path, mut first: impl FnMut(&mut Connection) -> Rows<T>) -> Rows<(Connection, T)> {
    let mut open = |alone: bool, patience: Duration| {
        let mut connection = connect(path, alone, patience)?;
        let found = first(&mut connection)?;
        Ok((connection, found))
    };
    let connection = match room::may_lack_index(path) {
        true => match open(true, BRIEF) {
            // Another process has it open, and has made the index.
            Err(Failure::Sqlite(cause)) if is_in_use(&cause) => open(false, BUSY_TIMEOUT)?,
            tried => tried?,
        },
        false => match open(false, BUSY_TIMEOUT) {
            Err(Failure::Sqlite(cause)) if lacks_index(&cause) => open(true, BUSY_TIMEOUT)?,
            tried => tried?,
        },
    };
    room::keep_in_log(path);
    Ok(connection)
}

/// Returns true if SQLite could not make its index of the log: the file system has no block for it, or the
/// quota is used up (a file system that copies on write then cannot even make the file shorter).
fn lacks_index(cause: &rusqlite::Error) -> bool {
    use rusqlite::ffi::{SQLITE_IOERR_SHMMAP, SQLITE_IOERR_SHMOPEN, SQLITE_IOERR_SHMSIZE};
    let codes = [SQLITE_IOERR_SHMMAP, SQLITE_IOERR_SHMOPEN, SQLITE_IOERR_SHMSIZE];
    cause.sqlite_error().is_some_and(|error| codes.contains(&error.extended_code))
}

fn is_in_use(cause: &rusqlite::Error) -> bool {
    matches!(
        cause.sqlite_error_code(),
        Some(rusqlite::ErrorCode::DatabaseBusy | rusqlite::ErrorCode::DatabaseLocked)
    )
}

/// Opens a database that exists, as this module's documentation promises; `alone` locks every other process
/// out.
fn connect(path: &Utf8Path, alone: bool, patience: Duration) -> Rows<Connection> {
    // One thread at a time uses it, under a lock of ours: SQLite needs none of its own.
    let flags = OpenFlags::SQLITE_OPEN_READ_WRITE | OpenFlags::SQLITE_OPEN_NO_MUTEX;
    let connection = Connection::open_with_flags(path, flags)?;
    connection.busy_timeout(patience)?;
    if alone {
        connection.pragma_update_and_check(None, "locking_mode", "EXCLUSIVE", |_| Ok(()))?;
    }
    connection.set_db_config(DbConfig::SQLITE_DBCONFIG_NO_CKPT_ON_CLOSE, true)?;
    connection.pragma_update(None, "synchronous", "FULL")?;
    connection.pragma_update(None, "foreign_keys", true)?;
    connection.pragma_update(None, "wal_autocheckpoint", CHECKPOINT_PAGES)?;
    Ok(connection)
}

impl SqliteCatalogue {
    /// The catalogue in `directory`. Opens nothing yet.
    pub fn new(directory: impl Into<Utf8PathBuf>) -> Self {
        Self { shared: Arc::new(Shared { directory: directory.into(), connection: Mutex::new(None) }) }
    }

    async fn blocking<T: Send + 'static>(
        &self,
        work: impl FnOnce(&Shared) -> Result<T> + Send + 'static,
    ) -> Result<T> {
        let shared = self.shared.clone();
        tokio::task::spawn_blocking(move || work(&shared)).await.map_err(|cause| {
            Error::new(ErrorKind::Internal, "the catalogue's thread ended before its work").because(cause)
        })?
    }

    /// Reads at one instant; `absent` where there is no database.
    async fn read<T: Send + 'static>(
        &self,
        absent: T,
        work: impl FnOnce(&Connection) -> Rows<T> + Send + 'static,
    ) -> Result<T> {
        self.blocking(move |shared| {
            let mut slot = shared.connection.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
            let Some(open) = shared.reader(&mut slot)? else { return Ok(absent) };
            let read = || {
                let transaction = open.connection.unchecked_transaction()?;
                let found = work(&transaction)?;
                transaction.finish()?;
                Ok(found)
            };
            read().map_err(|failure| shared.explain("reading the catalogue", failure))
        })
        .await
    }
}

impl Shared {
    fn database(&self) -> Utf8PathBuf {
        self.directory.join("catalogue.db")
    }

    fn reader<'a>(&self, slot: &'a mut Option<Open>) -> Result<Option<&'a mut Open>> {
        if slot.is_none() {
            let path = self.database();
            match path.try_exists() {
                Ok(true) => {
                    lock::require_own_place(&self.directory)?;
                    require_regular(&path)?;
                }
                Ok(false) => return Ok(None),
                Err(cause) => {
                    return Err(Error::new(
                        ErrorKind::Io,
                        format!("the catalogue {path} cannot be looked for"),
                    )
                    .because(cause)
                    .advise("give a state directory that you may read, with --state-dir"));
                }
            }
            // For writing where the file permits it, and only for reading where not: a command that goes on
            // to change something opens it once.
            let (connection, version) = match opened(&path, |new| Ok(schema::version(new, MIGRATIONS)?)) {
                Ok(opened) => opened,
                // A process died while it wrote: its journal must be rolled back first, which a reader may
                // not.
                Err(Failure::Sqlite(cause))
                    if cause.sqlite_error_code() == Some(rusqlite::ErrorCode::ReadOnly) =>
                {
                    return self.writer(slot).map(Some);
                }
                Err(failure) => return Err(self.explain("opening the catalogue", failure)),
            };
            match version {
                Version::Ours => {
                    let writable = !connection
                        .is_readonly(MAIN_DB)
                        .map_err(|cause| self.explain("opening the catalogue", Failure::Sqlite(cause)))?;
                    *slot = Some(Open { connection, writable });
                }
                Version::Older => {
                    drop(connection);
                    return self.writer(slot).map(Some);
                }
                Version::Newer(version) => return Err(self.newer(version)),
            }
        }
        Ok(slot.as_mut())
    }

    fn writer<'a>(&self, slot: &'a mut Option<Open>) -> Result<&'a mut Open> {
        if !slot.as_ref().is_some_and(|open| open.writable) {
            *slot = None;
            lock::make_private_directory(&self.directory)?;
            let path = self.database();
            // SQLite gives its log the permissions of the database: so this decides them all.
            let flags = (rustix::fs::OFlags::NOFOLLOW | rustix::fs::OFlags::NONBLOCK).bits().cast_signed();
            let mut options = OpenOptions::new();
            options.write(true).create(true).truncate(false).mode(0o600).custom_flags(flags);
            let made = options.open(&path);
            if let Err(cause) = made.map(drop) {
                return Err(Error::new(ErrorKind::Io, format!("the catalogue {path} cannot be written"))
                    .because(cause)
                    .advise("make the state directory writable, or give another one with --state-dir"));
            }
            let brought_forward = |connection: &mut Connection| {
                let version = schema::version(connection, MIGRATIONS)?;
                if version == Version::Older {
                    connection.pragma_update_and_check(None, "journal_mode", "WAL", |_| Ok(()))?;
                    schema::migrate(connection, MIGRATIONS)?;
                }
                Ok(version)
            };
            let (connection, version) = opened(&path, brought_forward)
                .map_err(|failure| self.explain("opening the catalogue", failure))?;
            match version {
                Version::Newer(version) => return Err(self.newer(version)),
                Version::Ours | Version::Older => *slot = Some(Open { connection, writable: true }),
            }
        }
        slot.as_mut()
            .ok_or_else(|| Error::new(ErrorKind::Internal, "the catalogue was opened and is not open"))
    }

    fn newer(&self, version: i64) -> Error {
        Error::new(
            ErrorKind::Unsupported,
            format!(
                "the catalogue {} is of version {version}, and this domsnap knows versions up to {}",
                self.database(),
                MIGRATIONS.len()
            ),
        )
        .state("no changes made")
        .advise("use the domsnap that wrote it, or give another state directory with --state-dir")
    }

    fn explain(&self, attempted: &str, failure: Failure) -> Error {
        use rusqlite::ErrorCode as Code;
        let database = self.database();
        let cause = match failure {
            Failure::Record(error) => return error.context(attempted.to_owned()),
            Failure::Sqlite(cause) => cause,
        };
        // Its own message alone: its source is the same text with a number.
        let say = |kind, message: String| Error::new(kind, message).context(attempted.to_owned());
        match cause.sqlite_error_code() {
            Some(Code::DatabaseCorrupt | Code::NotADatabase) => {
                say(ErrorKind::Corrupt, format!("the catalogue {database} is damaged"))
                    .because(cause.to_string())
                    .state("images and manifests are not touched")
                    .advise(REBUILD)
            }
            Some(Code::DatabaseBusy | Code::DatabaseLocked) => {
                say(ErrorKind::Busy, format!("another process keeps the catalogue {database} locked"))
                    .because(cause.to_string())
                    .advise("try again")
            }
            Some(Code::ReadOnly | Code::CannotOpen | Code::PermissionDenied) => {
                say(ErrorKind::Io, format!("the catalogue {database} cannot be opened as is needed"))
                    .because(cause.to_string())
                    .advise("make the state directory writable, or give another one with --state-dir")
            }
            Some(Code::DiskFull) => {
                say(ErrorKind::Io, format!("no space is left for the catalogue {database}"))
                    .because(cause.to_string())
                    .advise("free some space and try again")
            }
            // SQLite has no word for a quota.
            Some(Code::SystemIoFailure) => say(
                ErrorKind::Io,
                format!("the catalogue {database} cannot be read or written"),
            )
            .because(cause.to_string())
            .advise("look at that file system: it may be over its quota, full, or damaged; then try again"),
            Some(Code::ConstraintViolation) => say(
                ErrorKind::Exists,
                "the catalogue has a disk or a snapshot of this name already".to_owned(),
            )
            .because(cause.to_string())
            .advise("look at `domsnap domain list`: a disk belongs to one domain only"),
            // This error's own message repeats the whole SQL statement.
            _ => match cause {
                rusqlite::Error::SqlInputError { msg, .. } => say(
                    ErrorKind::Corrupt,
                    format!("the tables of the catalogue {database} are not as they should be: {msg}"),
                )
                .state("images and manifests are not touched")
                .advise(REBUILD),
                cause => {
                    say(ErrorKind::Io, format!("the catalogue {database} failed")).because(cause.to_string())
                }
            },
        }
    }

    fn commit(&self, name: &DomainName, expected: Revision, changes: Vec<Change>) -> Result<Revision> {
        let mut slot = self.connection.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
        let database = self.database();
        // Before the transaction that may need them. What hinders it is not this commit's to report.
        if room::keep_free_pages(&mut self.writer(&mut slot)?.connection, &database).is_err() {
            *slot = None;
        }
        let open = self.writer(&mut slot)?;
        let attempt = || -> Rows<Revision> {
            let transaction = open.connection.transaction_with_behavior(TransactionBehavior::Immediate)?;
            let found = record::find(&transaction, name)?;
            let present = found.map_or(Revision::ABSENT, |(_, revision)| revision);
            if present != expected {
                let error = Error::new(
                    ErrorKind::Busy,
                    format!(
                        "the records of domain {name} were changed by another process (revision {}, expected {})",
                        present.0, expected.0
                    ),
                )
                .state("nothing was changed")
                .advise("try again");
                return Err(error.into());
            }
            // Greater than all that was given, and than what the domain is taken from.
            let followed = changes.iter().filter_map(|change| match change {
                Change::Follow(stamp) => Some(record::integer(stamp.revision.0)),
                Change::PutDomain(..)
                | Change::Bases(_)
                | Change::RemoveDomain
                | Change::Edit(_)
                | Change::Begin(_)
                | Change::Operation(..)
                | Change::Ready(..)
                | Change::Step(..) => None,
            });
            transaction
                .prepare_cached("UPDATE revision SET last = max(last, ?1) + 1")?
                .execute([followed.max().unwrap_or_default()])?;
            let next: i64 =
                transaction.prepare_cached("SELECT last FROM revision")?.query_row([], |row| row.get(0))?;
            let mut id = found.map(|(id, _)| id);
            let mut edited: Option<Edited> = None;
            for change in changes {
                self.apply(&transaction, name, next, &mut id, &mut edited, change)?;
            }
            if let (Some(id), Some(edited)) = (id, edited) {
                edited.write(&transaction, id)?;
            }
            if let Some(id) = id {
                transaction
                    .prepare_cached("UPDATE domains SET revision = ?2 WHERE id = ?1")?
                    .execute(params![id, next])?;
            }
            transaction.commit()?;
            Ok(if id.is_some() {
                Revision(u64::try_from(next).unwrap_or_default())
            } else {
                Revision::ABSENT
            })
        };
        attempt().map_err(|failure| {
            // A flush that failed leaves a commit in the log that this connection does not believe in, and
            // the next process would. So this one looks again, and answers from now on what that process
            // would.
            if matches!(failure, Failure::Sqlite(_)) {
                *slot = None;
            }
            self.explain(&format!("recording in the catalogue for domain {name}"), failure)
        })
    }

    fn apply(
        &self,
        transaction: &Connection,
        name: &DomainName,
        revision: i64,
        id: &mut Option<i64>,
        edited: &mut Option<Edited>,
        change: Change,
    ) -> Rows<()> {
        if let Change::PutDomain(domain, snapshots) = change {
            let row = match *id {
                Some(row) => row,
                None => {
                    transaction.execute(
                        "INSERT INTO domains (name, unregistered, hypervisor, active_path, revision)
                         VALUES (?1, ?2, ?3, ?4, ?5)",
                        params![
                            name.as_str(),
                            domain.unregistered,
                            record::word(&domain.hypervisor)?,
                            record::word(&domain.active_path)?,
                            revision
                        ],
                    )?;
                    transaction.last_insert_rowid()
                }
            };
            *id = Some(row);
            let edited = Edited::load(transaction, row, edited)?;
            edited.domain = *domain;
            edited.tree = SnapshotTree::new(snapshots);
            return Ok(());
        }
        let row = id.ok_or_else(|| {
            Error::new(ErrorKind::NotFound, format!("the catalogue has no domain {name}"))
                .advise("`domsnap domain list` shows those that it has")
        })?;
        match change {
            Change::PutDomain(..) => {}
            Change::Follow(stamp) => record::write_follows(transaction, row, &stamp)?,
            Change::Bases(bases) => {
                let bases = record::json(&bases)?;
                transaction.execute("UPDATE domains SET bases = ?2 WHERE id = ?1", params![row, bases])?;
            }
            Change::RemoveDomain => {
                transaction.execute("DELETE FROM domains WHERE id = ?1", [row])?;
                *id = None;
                *edited = None;
            }
            Change::Edit(edit) => {
                let edited = Edited::load(transaction, row, edited)?;
                edit.apply(&mut edited.domain, &mut edited.tree)?;
            }
            Change::Begin(operation) => {
                transaction.execute(
                    "DELETE FROM operations WHERE domain = ?1 AND state IN ('done', 'undone') AND id NOT IN
                     (SELECT id FROM operations WHERE domain = ?1 ORDER BY id DESC LIMIT ?2)",
                    params![row, KEPT_OPERATIONS],
                )?;
                record::write_operation(transaction, row, &operation)?;
            }
            Change::Operation(operation, state, error) => {
                transaction
                    .prepare_cached("UPDATE operations SET state = ?2 WHERE id = ?1")?
                    .execute(params![operation.to_string(), state.as_str()])?;
                if let Some(error) = error {
                    transaction.execute(
                        "UPDATE operations SET errors = json_insert(errors, '$[#]', ?2) WHERE id = ?1",
                        params![operation.to_string(), error],
                    )?;
                }
            }
            Change::Ready(operation, edits) => {
                let changed = transaction
                    .prepare_cached(
                        "UPDATE operations SET state = ?3, commit_edits = ?4 WHERE id = ?1 AND domain = ?2",
                    )?
                    .execute(params![
                        operation.to_string(),
                        row,
                        OperationState::Ready.as_str(),
                        record::json(&edits)?
                    ])?;
                if changed != 1 {
                    let detail = format!("the journal has no operation {operation} of domain {name}");
                    return Err(Error::new(ErrorKind::Internal, detail).into());
                }
            }
            Change::Step(operation, index, state) => {
                let position = i64::try_from(index).unwrap_or(i64::MAX);
                let changed = transaction
                    .prepare_cached("UPDATE steps SET state = ?3 WHERE operation = ?1 AND position = ?2")?
                    .execute(params![operation.to_string(), position, state.as_str()])?;
                if changed != 1 {
                    return Err(Error::new(
                        ErrorKind::Internal,
                        format!("the journal has no step {index} of operation {operation}"),
                    )
                    .into());
                }
            }
        }
        Ok(())
    }
}

/// A domain before and after the edits of a transaction.
struct Edited {
    before: (Domain, SnapshotTree),
    domain: Domain,
    tree: SnapshotTree,
}

impl Edited {
    fn load<'a>(connection: &Connection, id: i64, slot: &'a mut Option<Self>) -> Rows<&'a mut Self> {
        if slot.is_none() {
            let Entry { domain, tree, .. } = record::read_entry(connection, id)?;
            *slot = Some(Self { before: (domain.clone(), tree.clone()), domain, tree });
        }
        slot.as_mut()
            .ok_or_else(|| Error::new(ErrorKind::Internal, "the edits of a transaction are lost").into())
    }

    fn write(&self, connection: &Connection, id: i64) -> Rows<()> {
        record::write_difference(connection, id, (&self.before.0, &self.before.1), (&self.domain, &self.tree))
    }
}

#[async_trait]
impl Catalogue for SqliteCatalogue {
    async fn identity(&self) -> Result<Option<CatalogueId>> {
        self.read(None, |connection| record::read_identity(connection).map(Some)).await
    }

    async fn domains(&self) -> Result<Vec<EntrySummary>> {
        self.read(Vec::new(), |connection| {
            let mut statement = connection.prepare(
                "SELECT id, (SELECT count(*) FROM snapshots WHERE domain = d.id AND role IS NULL),
                        EXISTS (SELECT 1 FROM operations
                                WHERE domain = d.id AND state NOT IN ('done', 'undone')), bases
                 FROM domains d ORDER BY name",
            )?;
            let rows = statement
                .query_map([], |row| Ok((row.get(0)?, row.get::<_, i64>(1)?, row.get(2)?, row.get(3)?)))?;
            let mut found = Vec::new();
            for row in rows {
                let (id, snapshots, unfinished, bases): (_, _, _, Option<String>) = row?;
                let (domain, _) = record::read_domain(connection, id)?;
                found.push(
                    EntrySummary::new(domain, u64::try_from(snapshots).unwrap_or_default())
                        .unfinished(unfinished)
                        .bases(bases.map(|bases| record::from_json("bases", &bases)).transpose()?),
                );
            }
            Ok(found)
        })
        .await
    }

    async fn load(&self, name: &DomainName) -> Result<Option<Entry>> {
        let name = name.clone();
        self.read(None, move |connection| {
            record::find(connection, &name)?.map(|(id, _)| record::read_entry(connection, id)).transpose()
        })
        .await
    }

    async fn owners(&self, disks: &[DiskAddress]) -> Result<Vec<(DiskAddress, DomainName)>> {
        let disks = disks.to_vec();
        self.read(Vec::new(), move |connection| {
            let mut statement = connection
                .prepare("SELECT d.name FROM disks k JOIN domains d ON d.id = k.domain WHERE k.path = ?1")?;
            let mut found = Vec::new();
            for address in disks {
                let mut rows = statement.query([address.as_str()])?;
                if let Some(row) = rows.next()? {
                    found.push((address, DomainName::new(row.get::<_, String>(0)?)?));
                }
            }
            Ok(found)
        })
        .await
    }

    async fn unfinished(&self, name: &DomainName) -> Result<Vec<Operation>> {
        let name = name.clone();
        self.read(Vec::new(), move |connection| match record::find(connection, &name)? {
            Some((id, _)) => record::read_operations(connection, id, Wanted::Unfinished),
            None => Ok(Vec::new()),
        })
        .await
    }

    async fn operations(&self, name: &DomainName) -> Result<Vec<Operation>> {
        let name = name.clone();
        self.read(Vec::new(), move |connection| match record::find(connection, &name)? {
            Some((id, _)) => record::read_operations(connection, id, Wanted::All),
            None => Ok(Vec::new()),
        })
        .await
    }

    async fn operation(&self, name: &DomainName, id: OperationId) -> Result<Option<Operation>> {
        let name = name.clone();
        self.read(None, move |connection| match record::find(connection, &name)? {
            Some((domain, _)) => Ok(record::read_operations(connection, domain, Wanted::One(id))?.pop()),
            None => Ok(None),
        })
        .await
    }

    async fn commit(&self, name: &DomainName, expected: Revision, changes: Vec<Change>) -> Result<Revision> {
        let name = name.clone();
        self.blocking(move |shared| shared.commit(&name, expected, changes)).await
    }

    async fn watch(&self, name: &DomainName) -> Result<Revisions> {
        let (sender, receiver) = mpsc::channel(1);
        let (catalogue, name) = (self.clone(), name.clone());
        tokio::spawn(async move {
            let mut last = None;
            loop {
                let name = name.clone();
                let revision = catalogue
                    .read(Revision::ABSENT, move |connection| {
                        Ok(record::find(connection, &name)?
                            .map_or(Revision::ABSENT, |(_, revision)| revision))
                    })
                    .await;
                match revision {
                    Ok(revision) if last != Some(revision) => {
                        last = Some(revision);
                        if sender.send(revision).await.is_err() {
                            return;
                        }
                    }
                    Ok(_) => {}
                    Err(error) => tracing::warn!(%error, "watching the catalogue"),
                }
                tokio::select! {
                    () = tokio::time::sleep(WATCH_INTERVAL) => {}
                    () = sender.closed() => return,
                }
            }
        });
        Ok(Box::pin(Watching { receiver }))
    }

    async fn lease(&self, name: &str, holder: &str, _time_to_live: Duration) -> Result<Lease> {
        let (name, holder) = (name.to_owned(), holder.to_owned());
        let file = self
            .blocking(move |shared| {
                lock::make_private_directory(&shared.directory)?;
                lock::lock(Utf8Path::new(&shared.directory.join("locks")), &name, &holder)
            })
            .await?;
        // The kernel keeps the lock for as long as the file is open: it cannot be lost.
        Ok(Lease::new(file, CancellationToken::new()))
    }
}

struct Watching {
    receiver: mpsc::Receiver<Revision>,
}

impl Stream for Watching {
    type Item = Revision;

    fn poll_next(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<Revision>> {
        self.receiver.poll_recv(context)
    }
}
