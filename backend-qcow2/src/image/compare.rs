//! Comparison of two states of images.

use super::error::Result;
use super::view::{Content, Piece, RunLayer, View};

/// Bytes that are read at once from each of the two.
const STEP: u64 = 1 << 20;

/// Returns true if `one` and `other` show the same data over whatever they both have as backing file.
/// `backed` says if they have one. Parts that only one of them contains count as different, whatever the
/// backing file shows there: it is not read.
///
/// # Errors
/// [`super::ErrorKind::Corrupt`] for invalid tables or compressed clusters, and the system's.
pub fn same_content(one: RunLayer, other: RunLayer, backed: bool) -> Result<bool> {
    let (mut one, mut other) = (View::new(vec![one])?, View::new(vec![other])?);
    if one.size() != other.size() {
        return Ok(false);
    }
    let zeros = |piece: &Piece| match piece.content {
        Content::Zero | Content::PastEnd => true,
        Content::Unowned => !backed,
        Content::Data(_) | Content::Compressed { .. } => false,
    };
    let unowned = |piece: &Piece| backed && piece.content == Content::Unowned;
    let (mut ours, mut theirs) = (Vec::new(), Vec::new());
    let mut at = 0;
    while let (Some(a), Some(b)) = (one.piece(at)?, other.piece(at)?) {
        let end = a.end.min(b.end);
        if unowned(&a) != unowned(&b) {
            return Ok(false);
        }
        if unowned(&a) || (zeros(&a) && zeros(&b)) {
            at = end;
            continue;
        }
        let end = end.min(at.saturating_add(STEP));
        let length = usize::try_from(end - at).unwrap_or(0);
        for (view, piece, bytes) in [(&mut one, &a, &mut ours), (&mut other, &b, &mut theirs)] {
            bytes.clear();
            bytes.resize(length, 0);
            view.read_piece(piece, bytes, None)?;
        }
        if ours != theirs {
            return Ok(false);
        }
        at = end;
    }
    Ok(true)
}
