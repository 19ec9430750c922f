//! The functions of the fuzz targets. They are plain functions, so that a test can run them without a fuzzer.
//!
//! A parser may refuse; it may not panic, and what it accepts must be written back to what it accepts alike.

use backend_qcow2::image as q;

/// One entry: takes any bytes.
type Entry = fn(&[u8]);

/// All entries, by the name of their target and of their seed directory.
#[allow(dead_code, reason = "a fuzz target uses one entry, the test uses the table")]
pub const ENTRIES: [(&str, Entry); 6] = [
    ("header", header),
    ("snapshot_table", snapshot_table),
    ("l2_table", l2_table),
    ("bitmap_directory", bitmap_directory),
    ("refcounts", refcounts),
    ("compressed_cluster", compressed_cluster),
];

/// The first cluster of an image.
pub fn header(bytes: &[u8]) {
    if let Ok(header) = q::Header::parse(bytes) {
        let _ = header.bitmaps();
        let _ = header.crypto_header();
        assert_eq!(header.summary().virtual_size, header.virtual_size);
    }
}

/// The first cluster of an image, 512 bytes of it, then a snapshot table.
pub fn snapshot_table(bytes: &[u8]) {
    let Some((head, table)) = bytes.split_at_checked(512) else { return };
    let Ok(header) = q::Header::parse(head) else { return };
    if let Ok((snapshots, _)) = q::parse_snapshot_table(&header, table) {
        let again = q::encode_snapshot_table(&snapshots)
            .expect("what was parsed is within the limits, or too long by little");
        let (parsed, _) = q::parse_snapshot_table(&header, &again).expect("what we wrote parses");
        assert_eq!(parsed, snapshots);
    }
}

/// One byte of cluster bits and kind, then an L2 table.
pub fn l2_table(bytes: &[u8]) {
    let Some((kind, table)) = bytes.split_first() else { return };
    let Some(cluster_bits) = q::ClusterBits::new(u32::from(kind & 0x1f)) else { return };
    let extended_l2 = kind & 0x40 != 0;
    let geometry = q::Geometry { cluster_bits, extended_l2, zero_flag: !extended_l2 && kind & 0x80 == 0 };
    for index in 0..=table.len() / geometry.l2_entry_size() {
        let entry = q::L2Entry::read(geometry, table, index);
        if let Ok(mapping) = entry.mapping(geometry) {
            let again = q::L2Entry::new(geometry, mapping, entry.is_copied());
            assert_eq!(again.mapping(geometry).expect("what we wrote parses"), mapping);
        }
    }
    let _ = q::L1Table::parse(geometry, table, 1 << 40);
}

/// One byte of count, then a bitmap directory.
pub fn bitmap_directory(bytes: &[u8]) {
    if let Some((count, directory)) = bytes.split_first() {
        let _ = q::parse_bitmap_directory(q::ClusterBits::DEFAULT, u32::from(*count), directory);
    }
}

/// One byte of width, then a refcount table or block.
pub fn refcounts(bytes: &[u8]) {
    let Some((order, block)) = bytes.split_first() else { return };
    let order = u32::from(order % 7);
    for index in 0..(block.len() * 8) >> order {
        let count = q::refcount_of_block(order, block, index);
        assert!(order == 6 || count < 1 << (1 << order));
    }
    let _ = q::parse_reftable(q::ClusterBits::DEFAULT, block, 1 << 40);
}

/// One byte of method, then a compressed cluster.
pub fn compressed_cluster(bytes: &[u8]) {
    let Some((method, packed)) = bytes.split_first() else { return };
    let method = if method & 1 == 0 { q::Compression::Deflate } else { q::Compression::Zstd };
    let mut out = vec![0; 65536];
    let _ = q::decompress(method, packed, &mut out);
}
