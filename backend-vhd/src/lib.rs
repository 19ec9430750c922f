//! The VHD backend of domsnap, with an image engine of its own.
//!
//! [`image`] is the engine: it reads and writes images and chains of them, and knows nothing of domains.

#![forbid(unsafe_code)]

pub mod image;
