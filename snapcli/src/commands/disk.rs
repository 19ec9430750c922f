//! `domsnap disk ...`: one image, no domain. It stands on the image engine's snapshots.

use snapcore::{Error, ErrorKind};

use crate::answer::Answer;
use crate::args::Disk;
use crate::failure::Failure;

/// Refuses: the image engine cannot take snapshots yet.
pub fn run(_disk: Disk) -> Result<Answer, Failure> {
    Err(Error::new(ErrorKind::Unsupported, "the image engine of this build takes no snapshots").into())
}
