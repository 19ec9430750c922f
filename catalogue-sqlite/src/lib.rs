//! The catalogue of one machine, in one SQLite database: [`SqliteCatalogue`] fulfils
//! [`snapcore::catalogue::Catalogue`].
//!
//! ```
//! use std::sync::Arc;
//!
//! use catalogue_sqlite::SqliteCatalogue;
//! use snapcore::Registry;
//! use snapcore::service::Domsnap;
//!
//! let domsnap = Domsnap::new(Arc::new(SqliteCatalogue::new("/var/lib/domsnap")), Registry::new());
//! ```
//!
//! | module | what it has |
//! |---|---|
//! | `catalogue` | the database: how it is opened, read, changed and watched; what is durable when |
//! | `record` | rows to types and back |
//! | `room` | what it keeps for itself on the file system, for when that is full |
//! | `schema` | the tables, and how those of older versions become them |
//! | `lock` | the state directory, and the lock files that are leases |

#![forbid(unsafe_code)]

mod catalogue;
mod lock;
mod record;
mod room;
mod schema;

pub use catalogue::SqliteCatalogue;
