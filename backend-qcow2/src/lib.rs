//! The qcow2 backend of domsnap.
#![forbid(unsafe_code)]

pub mod image;
