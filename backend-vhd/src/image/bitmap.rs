//! Sector bitmaps: one bit for each sector of a block, the highest bit of a byte first. A set bit means that
//! the sector is in this image.

/// The bitmap of one block.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(super) enum Bitmap {
    /// All sectors are in this image.
    Full,
    /// The bits.
    Bits(Box<[u8]>),
}

impl Bitmap {
    /// Reads the bitmap of a block of `sectors`.
    pub(super) fn parse(bytes: &[u8], sectors: u64) -> Self {
        let used = sectors.div_ceil(8) as usize;
        let whole = &bytes[..used.min(bytes.len())];
        let is_full = match sectors % 8 {
            0 => whole.iter().all(|byte| *byte == 0xFF),
            _ => run(bytes, 0, sectors) == (true, sectors),
        };
        if is_full { Self::Full } else { Self::Bits(bytes.into()) }
    }

    /// Returns the state of the sector `from`, and the first sector after it that differs, at most `to`.
    pub(super) fn run(&self, from: u64, to: u64) -> (bool, u64) {
        match self {
            Self::Full => (true, to),
            Self::Bits(bits) => run(bits, from, to),
        }
    }

    /// Sets the bits of a range of sectors. Returns true if one of them was clear.
    pub(super) fn set(&mut self, from: u64, to: u64, sectors: u64) -> bool {
        let Self::Bits(bits) = self else { return false };
        if run(bits, from, to) == (true, to) {
            return false;
        }
        let mut at = from;
        while at < to {
            let Some(byte) = bits.get_mut((at / 8) as usize) else { break };
            if at.is_multiple_of(8) && to - at >= 8 {
                *byte = 0xFF;
                at += 8;
            } else {
                *byte |= 0x80 >> (at % 8);
                at += 1;
            }
        }
        if run(bits, 0, sectors) == (true, sectors) {
            *self = Self::Full;
        }
        true
    }

    /// The bytes in the file, `bytes` of them. Of a full bitmap all are ones, as other programs write it.
    pub(super) fn to_bytes(&self, bytes: u64) -> Vec<u8> {
        match self {
            Self::Full => vec![0xFF; bytes as usize],
            Self::Bits(bits) => bits.to_vec(),
        }
    }

    /// Number of set bits among the first `sectors`.
    pub(super) fn count(&self, sectors: u64) -> u64 {
        let Self::Bits(bits) = self else { return sectors };
        let whole = (sectors / 8) as usize;
        let ones: u64 = bits.iter().take(whole).map(|byte| u64::from(byte.count_ones())).sum();
        let rest = (whole as u64 * 8..sectors).filter(|at| bit(bits, *at)).count();
        ones + rest as u64
    }
}

fn bit(bits: &[u8], at: u64) -> bool {
    bits.get((at / 8) as usize).is_some_and(|byte| byte & (0x80 >> (at % 8)) != 0)
}

/// Returns the state of bit `from`, and the first bit after it that differs, at most `to`.
fn run(bits: &[u8], from: u64, to: u64) -> (bool, u64) {
    let set = bit(bits, from);
    let whole = if set { 0xFF } else { 0 };
    let mut at = from + 1;
    while at < to {
        if at.is_multiple_of(8) && to - at >= 8 && bits.get((at / 8) as usize) == Some(&whole) {
            at += 8;
        } else if bit(bits, at) == set {
            at += 1;
        } else {
            break;
        }
    }
    (set, at.min(to))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        /// Runs and counts agree with the bits taken one by one; setting sets exactly the range.
        #[test]
        fn runs_agree_with_single_bits(
            bytes in proptest::collection::vec(prop_oneof![Just(0), Just(0xFF), any::<u8>()], 64),
            sectors in 1..512u64, a in 0..512u64, b in 0..512u64,
        ) {
            let model: Vec<bool> = (0..sectors).map(|at| bit(&bytes, at)).collect();
            let mut bitmap = Bitmap::parse(&bytes, sectors);
            prop_assert_eq!(bitmap == Bitmap::Full, model.iter().all(|bit| *bit));
            prop_assert_eq!(bitmap.count(sectors), model.iter().filter(|bit| **bit).count() as u64);
            let mut at = 0;
            while at < sectors {
                let (set, end) = bitmap.run(at, sectors);
                prop_assert!(end > at && model[at as usize..end as usize].iter().all(|bit| *bit == set));
                prop_assert!(end == sectors || model[end as usize] != set);
                at = end;
            }
            let (from, to) = (a.min(b) % sectors, (a.max(b) % sectors).max(a.min(b) % sectors));
            bitmap.set(from, to, sectors);
            for at in 0..sectors {
                let expected = model[at as usize] || (from..to).contains(&at);
                prop_assert_eq!(bitmap.run(at, at + 1).0, expected);
            }
        }
    }
}
