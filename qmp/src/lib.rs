//! A QMP and guest-agent connection that survives unknown input.
//!
//! [`Qmp`] connects to a QEMU, [`Agent`] to a guest agent, both over a Unix socket. An unknown event, field,
//! enum value or id ends neither: those are data. Only the end of its socket ends a [`Qmp`] connection.
//! [`Qmp::reconnect`] then makes a new one, and reads QEMU's current state ([`Reconciled`]).
//!
//! ```no_run
//! # async fn example() -> qmp::Result<()> {
//! use qapi_qmp::{cont, stop};
//! use qmp::{ErrorKind, Notice, Qmp};
//! use serde_json::json;
//! use std::time::Duration;
//!
//! let qmp = Qmp::connect("/run/vm1.qmp").await?;
//! let mut events = qmp.events();
//!
//! qmp.execute(stop {}).await?; // typed
//! let commit = json!({ "job-id": "j", "device": "d0", "auto-finalize": false });
//! match qmp.execute_raw("block-commit", commit).await {
//!     Err(error) if error.kind() == ErrorKind::Refused => println!("{}", error.desc().unwrap_or_default()),
//!     Err(error) if error.kind() == ErrorKind::Lost => {
//!         let (_qmp, now) = qmp.reconnect(Duration::from_secs(5)).await?;
//!         println!("the commit is {:?}", now.job("j")); // error.may_have_run()
//!     }
//!     other => drop(other?),
//! }
//! if qmp.schema().await?.has_value("migrate-set-capabilities", "capabilities.capability", "mapped-ram") {
//!     println!("this QEMU has mapped-ram");
//! }
//! qmp.within(Duration::from_secs(2)).execute(cont {}).await?;
//! while let Notice::Event(event) = events.next().await? {
//!     println!("{} {}", event.name, event.data);
//! }
//! # Ok(())
//! # }
//! ```
//!
//! # Guarantees
//!
//! * Every command has a deadline, and every call may be dropped at any point: the connection stays usable.
//! * The length of a line, the depth of JSON and the number of waiting commands are limited, also for a QEMU
//!   that hangs.
//! * Events reach every subscriber in order; one that does not read them loses the oldest, and gets their
//!   number.
//! * An error reports if the command may have run ([`Error::may_have_run`]).
//! * A frozen guest is thawed ([`Frozen`]): by the holder, by its drop, by a time limit of the host's, after
//!   a freeze that was not answered, and when the runtime ends.
#![forbid(unsafe_code)]

mod agent;
mod connection;
mod error;
mod event;
mod line;
mod message;
mod peer;
mod qmp;
mod reconcile;
mod schema;
mod socket;

pub use agent::{Agent, AgentOptions, Freeze, Frozen, Thaw};
pub use error::{Error, ErrorKind, Result};
pub use event::{Event, Events, Notice};
pub use peer::Peer;
pub use qmp::{Greeting, Options, Qmp};
pub use reconcile::{Drive, Inserted, Job, JobStatus, Reconciled};
pub use schema::Schema;

// The commands, replies and events as types.
pub use {qapi_qga, qapi_qmp};
