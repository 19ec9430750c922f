//! VHD through the command. The domain's writes are the image engine's, or a client's of the server; 7-Zip
//! and QEMU read.

#[path = "../../../backend-vhd/tests/support/mod.rs"]
mod support;

mod base;
mod cases;
mod crash;
mod domain;
mod guide;
mod identity;
mod place;
mod reports;
