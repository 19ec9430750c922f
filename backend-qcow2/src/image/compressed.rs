//! Compressed clusters: raw deflate with a window of 4 KiB, or zstd, as QEMU writes them.

use flate2::{Compress, Decompress, FlushCompress, FlushDecompress, Status};

use super::error::{Error, ErrorKind, Result};
use super::header::Compression;

/// QEMU compresses with a window of 12 bits. Reading accepts any window: a larger one costs 32 KiB.
const DEFLATE_WINDOW: u8 = 12;

/// Decompresses one cluster. `compressed` may be longer than the compressed data, because the descriptor only
/// counts sectors. `out` is exactly one cluster; that bounds memory and work.
///
/// # Errors
/// [`ErrorKind::Corrupt`] if the bytes do not decompress to a whole cluster.
pub fn decompress(method: Compression, compressed: &[u8], out: &mut [u8]) -> Result<()> {
    let bad = |why: String| Error::corrupt(format!("a compressed cluster does not decompress: {why}"));
    match method {
        Compression::Deflate => {
            let mut d = Decompress::new(false);
            let status =
                d.decompress(compressed, out, FlushDecompress::Finish).map_err(|e| bad(e.to_string()))?;
            // Like QEMU: the stream may continue, but the cluster must be full.
            match status {
                Status::Ok | Status::StreamEnd | Status::BufError if d.total_out() == out.len() as u64 => {
                    Ok(())
                }
                _ => Err(bad(format!("{} of {} bytes came out", d.total_out(), out.len()))),
            }
        }
        Compression::Zstd => {
            let mut d = zstd::stream::raw::Decoder::new().map_err(|e| bad(e.to_string()))?;
            let (mut from, mut done) = (0, 0);
            while done < out.len() {
                use zstd::stream::raw::{InBuffer, Operation, OutBuffer};
                let mut input = InBuffer::around(compressed.get(from..).unwrap_or_default());
                let mut output = OutBuffer::around(out.get_mut(done..).unwrap_or_default());
                d.run(&mut input, &mut output).map_err(|e| bad(e.to_string()))?;
                let (read, wrote) = (input.pos(), output.pos());
                if read == 0 && wrote == 0 {
                    return Err(bad(format!("{done} of {} bytes came out", out.len())));
                }
                from += read;
                done += wrote;
            }
            Ok(())
        }
    }
}

/// Compresses one cluster. Returns `None` if that saves nothing; the cluster is then written uncompressed.
///
/// # Errors
/// [`ErrorKind::Io`] if the compressor fails.
pub fn compress(method: Compression, cluster: &[u8]) -> Result<Option<Vec<u8>>> {
    let fail = |why: String| Error::new(ErrorKind::Io, format!("a cluster cannot be compressed: {why}"));
    // Compressed data that is not smaller than a cluster saves nothing.
    let room = cluster.len().saturating_sub(1);
    match method {
        Compression::Deflate => {
            let level = flate2::Compression::default();
            let mut c = Compress::new_with_window_bits(level, false, DEFLATE_WINDOW);
            let mut out = vec![0; room];
            let status =
                c.compress(cluster, &mut out, FlushCompress::Finish).map_err(|e| fail(e.to_string()))?;
            if status != Status::StreamEnd {
                return Ok(None);
            }
            out.truncate(usize::try_from(c.total_out()).unwrap_or(0));
            Ok(Some(out))
        }
        Compression::Zstd => {
            let out = zstd::bulk::compress(cluster, 0).map_err(|e| fail(e.to_string()))?;
            Ok((out.len() <= room).then_some(out))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Both methods restore a cluster, and incompressible data is left alone.
    #[test]
    fn both_methods_come_back_and_noise_is_left_alone() {
        let cluster: Vec<u8> = (0..65536u32).map(|n| (n / 100) as u8).collect();
        let noise: Vec<u8> = (0..65536u64)
            .map(|n| {
                (n.wrapping_mul(0x9e37_79b9_7f4a_7c15).rotate_left(23) >> 40) as u8 ^ ((n * n) >> 3) as u8
            })
            .collect();
        for method in [Compression::Deflate, Compression::Zstd] {
            let mut small = compress(method, &cluster).unwrap().unwrap();
            small.resize(small.len().next_multiple_of(512), 0xaa);
            let mut out = vec![0; 65536];
            decompress(method, &small, &mut out).unwrap();
            assert!(out == cluster);
            if let Some(packed) = compress(method, &noise).unwrap() {
                assert!(packed.len() < noise.len());
            }
        }
    }

    /// Garbage and streams that are too short are refused.
    #[test]
    fn garbage_and_short_streams_are_refused() {
        let mut out = vec![0; 65536];
        for method in [Compression::Deflate, Compression::Zstd] {
            assert_eq!(decompress(method, &[0xff; 512], &mut out).unwrap_err().kind(), ErrorKind::Corrupt);
            assert_eq!(decompress(method, &[], &mut out).unwrap_err().kind(), ErrorKind::Corrupt);
            let small = compress(method, &[7; 4096]).unwrap().unwrap();
            assert_eq!(decompress(method, &small, &mut out).unwrap_err().kind(), ErrorKind::Corrupt);
        }
    }
}
