//! The names of layers' files.

use camino::{Utf8Path, Utf8PathBuf};
use snapcore::{DiskAddress, LayerName};

/// The permanent name for a layer of the disk at `path`: `<stem>.ds-<8 hex>.<extension>`.
pub fn layer_name(path: &Utf8Path, stamp: u32) -> LayerName {
    let stem = unmarked_stem(path);
    LayerName(match path.extension() {
        Some(extension) => format!("{stem}.ds-{stamp:08x}.{extension}"),
        None => format!("{stem}.ds-{stamp:08x}"),
    })
}

/// Returns true if `name` is one that [`layer_name`] gives to layers of the disk at `path`. A layer with
/// another name got it from a user or from another tool, and may be used for something else too: it is never
/// removed.
pub fn is_layer_name(path: &Utf8Path, name: &str) -> bool {
    let stamp = name.rsplit_once(".ds-").and_then(|(_, rest)| rest.get(..8));
    stamp
        .and_then(|stamp| u32::from_str_radix(stamp, 16).ok())
        .is_some_and(|stamp| layer_name(path, stamp).as_str() == name)
}

/// The file name of the disk at `path` without the mark of a layer. It is the same for all its layers, also
/// if the configured path itself is one ([`snapcore::ActivePath::New`]).
pub fn disk_name(path: &Utf8Path) -> String {
    match path.extension() {
        Some(extension) => format!("{}.{extension}", unmarked_stem(path)),
        None => unmarked_stem(path).to_owned(),
    }
}

/// The configured address of the disk to whose layers this one belongs by its name. It does not look at the
/// files.
pub fn disk_of_layer(layer: &DiskAddress) -> Option<DiskAddress> {
    layer.local().map(|path| path.with_file_name(disk_name(path)).into())
}

fn unmarked_stem(path: &Utf8Path) -> &str {
    let stem = path.file_stem().unwrap_or("disk");
    match stem.rsplit_once(".ds-") {
        Some((before, mark)) if mark.len() == 8 && mark.bytes().all(|b| b.is_ascii_hexdigit()) => before,
        _ => stem,
    }
}

/// Returns the file of a layer's permanent name: beside the configured path, unless the name is absolute.
pub fn layer_path(disk_path: &Utf8Path, layer: &LayerName) -> Utf8PathBuf {
    match disk_path.parent() {
        Some(directory) => directory.join(layer.as_str()),
        None => Utf8PathBuf::from(layer.as_str()),
    }
}
