//! Serves one disk over NBD on a unix socket, with a control socket beside it.
//!
//! The crate knows no image format. Its caller opens an image as an [`Image`], and opens others of the same
//! format when the control socket asks for them ([`Format`]).
//!
//! # The protocol
//! The fixed newstyle handshake of the NBD specification (`doc/proto.md` of the NBD project), with
//! `INFO`, `GO`, `LIST`, `ABORT`, `STRUCTURED_REPLY` and the metadata context `base:allocation`. Commands:
//! read, write, flush, trim, write zeroes, block status. One client at a time: a second one is refused with a
//! message, so that two programs never write the same disk.
//!
//! # Layout
//!
//! | module | content |
//! |---|---|
//! | `wire` | numbers of the protocol, and a reader of untrusted bytes |
//! | `option` | negotiation, before the disk is served |
//! | `request` | one request, parsed and checked, and the bytes of replies |
//! | `transmission` | the threads that carry out the requests of a client |
//! | `disk` | the image that is served at this moment: who uses it, holds, exchanges, detached |
//! | `merge` | merges of layers while the disk is served |
//! | `loan` | a disk without a client, lent to an operation on its images |
//! | `image`, `file` | the contract of an image, and a raw file or device as one |
//! | `control` | the control socket: one JSON document a line |
//! | `place`, `activation`, `sys` | sockets: created, found stale, or passed by systemd |
//! | `server` | all of it together |
//!
//! # What is durable when
//! A write is in the kernel's page cache before it is acknowledged, so it survives the death of this process.
//! After a flush, and for a request with FUA, it is durable. After a flush that failed, every later flush of
//! that image fails too: the kernel may have dropped what it could not write.
//!
//! # What comes from a socket is an attack until checked
//! Lengths are limited before anything is allocated. A slow or silent client holds its own threads alone:
//! requests are received before, and answered after, the moment in which they use the image. So no client
//! delays the control socket.

#![deny(unsafe_code)]

mod activation;
mod control;
mod disk;
mod error;
mod file;
#[doc(hidden)]
pub mod fuzz;
mod image;
mod loan;
mod merge;
mod option;
mod place;
mod request;
mod server;
mod sys;
mod transmission;
mod wire;

pub use activation::{Activation, report_ready};
pub use control::{ClientInfo, ControlInfo, MAX_HOLD, ask};
pub use error::{Error, ErrorKind, Result};
pub use file::RawFile;
pub use image::{Content, Extent, Format, Image, Layer, MergeRequest, Merging, Prepared, Served, Zeroing};
pub use loan::{Loan, borrow_file, server_of};
pub use merge::{MergeInfo, MergePhase, MergeWatch};
pub use place::{Place, control_path};
pub use server::{Running, Server};
