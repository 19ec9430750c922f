//! QEMU's migration stream: the content of a memory image.
//!
//! The guest decides many of its bytes. So nothing in it is trusted: lengths are bounded, numbers are
//! checked, and a form that is not known is refused.
//!
//! | module | subject |
//! |---|---|
//! | `places` | the places of the guest's generation ID, by the state of its device |
//! | `walk`, `input`, `refusal` | the strict reader: the pages of one block of memory, and all else |
//! | `split`, `half` | a memory image taken apart ([`Split`]) into the file of a block and the stream without it |

mod half;
mod input;
#[cfg(test)]
mod model;
mod places;
mod refusal;
mod split;
#[cfg(test)]
mod tests;
mod walk;

pub(crate) use places::generation_ids;
pub(crate) use split::BytesFrom;
pub use split::{Mapping, Split};

/// Entry for fuzzing: any bytes as a stream. What is accepted is accepted again without the block's pages.
#[doc(hidden)]
pub fn fuzz_stream(bytes: &[u8]) {
    #[derive(Default)]
    struct Kept {
        length: u64,
        pages: u64,
        rest: Vec<u8>,
    }
    impl walk::Parts for Kept {
        fn block(&mut self, length: u64) -> std::io::Result<()> {
            self.length = length;
            Ok(())
        }
        fn page(&mut self, address: u64, _: &[u8; walk::PAGE as usize]) -> std::io::Result<()> {
            self.zeros(address)
        }
        fn zeros(&mut self, address: u64) -> std::io::Result<()> {
            assert!(
                address.is_multiple_of(walk::PAGE) && address + walk::PAGE <= self.length,
                "outside of the block"
            );
            self.pages += 1;
            Ok(())
        }
        fn rest(&mut self, bytes: &[u8]) -> std::io::Result<()> {
            self.rest.extend(bytes);
            Ok(())
        }
    }
    let read = |bytes: &[u8]| {
        let mut kept = Kept::default();
        walk::separate(bytes, bytes.len() as u64, b"pc.ram", &mut kept).ok().map(|()| kept)
    };
    if let Some(kept) = read(bytes) {
        let again = read(&kept.rest).expect("the stream without the block's pages is one");
        assert!(again.pages == 0 && again.rest == kept.rest, "it is not the same without them");
    }
}

/// Entry for fuzzing: any bytes as the states of devices.
#[doc(hidden)]
pub fn fuzz_places(bytes: &[u8]) {
    for place in places::find(bytes) {
        assert!(place != 0 && u32::try_from(place).is_ok(), "a place that no firmware chooses");
    }
}
