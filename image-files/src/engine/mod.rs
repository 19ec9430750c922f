//! Parts that image engines share: the image as a file, errors, copies in large pieces, and the recorder of
//! crash tests.

pub mod error;
pub mod file;
mod offset;
#[cfg(feature = "recorder")]
pub mod recorder;
mod refusal;
pub mod transfer;

pub use offset::HostOffset;
