//! Backing strings: how QEMU interprets them, and how domsnap writes them.
//!
//! QEMU's rules (`block.c`): a string that begins with `json:` is a tree of options. Otherwise, a word before
//! a colon that comes before any slash is a protocol. Everything else is a path, relative to the directory of
//! the image that has the string. A relative path inside of `json:` or behind a protocol is relative to the
//! directory in which QEMU was started.

use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use camino::{Utf8Path, Utf8PathBuf};
use serde_json::Value;
use snapcore::{Error, ErrorKind, LayerName, Result};

/// The largest number of bytes of a backing string.
const LONGEST: usize = 1023;

/// The deepest nesting of `json:` strings that is followed.
const DEEPEST: u32 = 4;

/// Protocols of QEMU that refer to no file of this machine. A server that offers one of our layers by them
/// has it open, and its lock shows that.
const NO_FILES: [&str; 20] = [
    "ftp",
    "ftps",
    "http",
    "https",
    "iscsi",
    "nbd",
    "nbd+tcp",
    "nbd+unix",
    "nfs",
    "null-aio",
    "null-co",
    "nvme",
    "rbd",
    "sheepdog",
    "ssh",
    "gluster",
    "gluster+tcp",
    "gluster+rdma",
    "gluster+unix",
    "vxhs",
];

/// Object of a backing string.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Named {
    /// One of these files.
    Files(Vec<PathBuf>),
    /// One of these files, or of the same names relative to an unknown directory.
    Perhaps(Vec<PathBuf>),
    /// No file of this machine.
    NoFile,
    /// Undetermined, with the reason.
    Unknown(String),
}

/// Returns the object of an image's backing string, for callers that must not miss a certain file.
/// `directories` are those in which QEMU may find the image: that of its name, and that of the file behind a
/// symbolic link.
pub(crate) fn named(directories: &[&Path], string: &[u8]) -> Named {
    meaning(directories, string, 0)
}

fn meaning(directories: &[&Path], string: &[u8], depth: u32) -> Named {
    if let Some(options) = string.strip_prefix(b"json:") {
        return from_options(directories, options, depth);
    }
    match protocol(string) {
        None => Named::Files(beside(directories, string)),
        Some(("file" | "host_device" | "host_cdrom", path)) if path.starts_with(b"/") => {
            Named::Files(beside(directories, path))
        }
        Some(("file" | "host_device" | "host_cdrom", path)) => Named::Perhaps(beside(directories, path)),
        Some((protocol, _)) if NO_FILES.contains(&protocol) => Named::NoFile,
        Some((protocol, _)) => Named::Unknown(format!(
            "its backing file is {:?}, and the protocol {protocol:?} is not one that domsnap knows",
            String::from_utf8_lossy(string)
        )),
    }
}

/// Splits off the word that QEMU interprets as a protocol, and the text behind its colon.
fn protocol(string: &[u8]) -> Option<(&str, &[u8])> {
    let at = string.iter().position(|byte| matches!(byte, b':' | b'/'))?;
    match string.split_at_checked(at)? {
        (word, [b':', rest @ ..]) => Some((std::str::from_utf8(word).unwrap_or("?"), rest)),
        _ => None,
    }
}

fn beside(directories: &[&Path], path: &[u8]) -> Vec<PathBuf> {
    directories.iter().map(|directory| directory.join(OsStr::from_bytes(path))).collect()
}

fn from_options(directories: &[&Path], options: &[u8], depth: u32) -> Named {
    let unknown = |why: String| Named::Unknown(format!("its backing string is a json: one {why}"));
    if depth == DEEPEST {
        return unknown("with too many others inside".to_owned());
    }
    let options: Value = match serde_json::from_slice(options) {
        Ok(options) => options,
        Err(error) => return unknown(format!("that is not JSON: {error}")),
    };
    let mut tree = OptionTree::default();
    tree.read(&options);
    if let Some(node) = tree.node {
        return unknown(format!("that names the block node {node:?} of a running QEMU"));
    }
    let mut files = Vec::new();
    let mut certain = true;
    for name in &tree.files {
        // With a stated driver the name is a plain path. Without one it may be any backing string.
        files.extend(beside(directories, name.as_bytes()));
        certain &= name.starts_with('/');
        if name.starts_with("json:") || protocol(name.as_bytes()).is_some() {
            match meaning(directories, name.as_bytes(), depth + 1) {
                Named::Files(more) => {
                    files.extend(more);
                    certain = true;
                }
                Named::Perhaps(more) => files.extend(more),
                Named::NoFile => certain = true,
                Named::Unknown(why) => return Named::Unknown(why),
            }
        }
    }
    match (files.is_empty(), certain) {
        (false, true) => Named::Files(files),
        (false, false) => Named::Perhaps(files),
        (true, _) if tree.no_file => Named::NoFile,
        (true, _) => unknown("that names no file".to_owned()),
    }
}

/// Content of a tree of block device options, which may be nested or have dots in its keys (`file.filename`).
#[derive(Default)]
struct OptionTree {
    files: Vec<String>,
    node: Option<String>,
    no_file: bool,
}

impl OptionTree {
    fn read(&mut self, value: &Value) {
        match value {
            Value::Object(options) => {
                for (key, value) in options {
                    match (key.rsplit('.').next().unwrap_or(key), value) {
                        ("filename", Value::String(name)) => self.files.push(name.clone()),
                        ("driver", Value::String(name)) => self.no_file |= NO_FILES.contains(&name.as_str()),
                        ("file" | "backing" | "image" | "data-file", Value::String(node))
                            if !node.is_empty() =>
                        {
                            self.node = Some(node.clone());
                        }
                        (_, inner) => self.read(inner),
                    }
                }
            }
            Value::Array(items) => items.iter().for_each(|item| self.read(item)),
            Value::Null | Value::Bool(_) | Value::Number(_) | Value::String(_) => {}
        }
    }
}

/// Returns the file of a backing string of `child` that is a plain path: beside the child, unless it is
/// absolute.
///
/// # Errors
/// [`ErrorKind::Refused`] for every other string: it could name anything on this machine.
pub(crate) fn resolve_backing(child: &Utf8Path, backing: &str) -> Result<Utf8PathBuf> {
    if protocol(backing.as_bytes()).is_some() {
        return Err(Error::new(
            ErrorKind::Refused,
            format!(
                "{child} names the backing file {backing:?}: not a plain path, but a URL or a json: string"
            ),
        )
        .advise(
            "domsnap follows plain paths alone, because such a string can name anything on this machine; where it means a \
             file, say so: 'qemu-img rebase -u -b PATH -F FORMAT IMAGE'; a file's name with a colon is written './NAME'",
        ));
    }
    let mut plain = backing;
    while let Some(rest) = plain.strip_prefix("./") {
        plain = rest.trim_start_matches('/');
    }
    Ok(match child.parent() {
        Some(directory) => directory.join(plain),
        None => Utf8PathBuf::from(plain),
    })
}

/// Returns the backing string by which an image in the directory of the disk at `path` names `layer`.
pub(crate) fn backing_string(path: &Utf8Path, layer: &LayerName) -> String {
    let name = layer.as_str();
    if protocol(name.as_bytes()).is_some() {
        return format!("./{name}");
    }
    if name.len() > LONGEST
        && let Some(directory) = path.parent()
    {
        return relative(directory, Utf8Path::new(name));
    }
    name.to_owned()
}

/// Checks that the result of [`backing_string`] fits an image.
///
/// # Errors
/// [`ErrorKind::Unsupported`] if it is longer than an image allows.
pub(crate) fn check_backing_string(path: &Utf8Path, layer: &LayerName) -> Result<()> {
    let length = backing_string(path, layer).len();
    if length <= LONGEST {
        return Ok(());
    }
    Err(Error::new(
        ErrorKind::Unsupported,
        format!("a qcow2 image has room for a backing file's name of {LONGEST} bytes, and this has {length}: {layer}"),
    )
    .state("no changes made")
    .advise("move the images to where their paths are shorter"))
}

/// Returns the path of `file` relative to `directory`. Both are absolute, and have no symbolic links in the
/// parts that they do not share.
fn relative(directory: &Utf8Path, file: &Utf8Path) -> String {
    let shared = directory.components().zip(file.components()).take_while(|(a, b)| a == b).count();
    let up = directory.components().skip(shared).map(|_| "..");
    let down = file.components().skip(shared).map(|part| part.as_str());
    up.chain(down).collect::<Vec<_>>().join("/")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(string: &str) -> Named {
        named(&[Path::new("/d")], string.as_bytes())
    }

    fn files(paths: &[&str]) -> Named {
        Named::Files(paths.iter().map(PathBuf::from).collect())
    }

    #[test]
    fn plain_paths_are_beside_the_image_or_absolute() {
        assert_eq!(of("a.qcow2"), files(&["/d/a.qcow2"]));
        assert_eq!(of("/e/a:b.qcow2"), files(&["/e/a:b.qcow2"]));
        assert_eq!(of("./a:b 100%.qcow2"), files(&["/d/./a:b 100%.qcow2"]));
        assert_eq!(of("100,a.qcow2"), files(&["/d/100,a.qcow2"]));
    }

    #[test]
    fn the_file_protocol_is_a_path() {
        assert_eq!(of("file:/e/a.qcow2"), files(&["/e/a.qcow2"]));
        assert_eq!(of("file:///e/a.qcow2"), files(&["///e/a.qcow2"]));
        assert_eq!(of("file:a.qcow2"), Named::Perhaps(vec!["/d/a.qcow2".into()]));
    }

    #[test]
    fn options_name_files_at_any_depth() {
        for options in [
            r#"json:{"driver":"qcow2","file":{"driver":"file","filename":"/e/a.qcow2"}}"#,
            r#"json:{"driver":"qcow2","file.driver":"file","file.filename":"/e/a.qcow2"}"#,
            r#"json:{"file.filename":"/e/a.qcow2"}"#,
            r#"json:{"driver":"qcow2","file":{"driver":"throttle","file":{"driver":"file","filename":"/e/a.qcow2"}}}"#,
            r#"json:{"driver":"quorum","children":[{"file":{"filename":"/e/a.qcow2"}}]}"#,
        ] {
            assert_eq!(of(options), files(&["/e/a.qcow2"]), "{options}");
        }
        let inner = r#"json:{\"file.filename\":\"/e/a.qcow2\"}"#;
        match of(&format!(r#"json:{{"file":{{"filename":"{inner}"}}}}"#)) {
            Named::Files(found) => assert!(found.contains(&"/e/a.qcow2".into()), "{found:?}"),
            other => panic!("{other:?}"),
        }
        let relative = r#"json:{"driver":"qcow2","file":{"driver":"file","filename":"a.qcow2"}}"#;
        assert_eq!(of(relative), Named::Perhaps(vec!["/d/a.qcow2".into()]));
    }

    /// A string with a protocol of a server names no file.
    #[test]
    fn network_protocols_name_no_file() {
        for string in [
            "nbd://localhost/x",
            "https://example.org/a.qcow2",
            r#"json:{"driver":"qcow2","file":{"driver":"nbd","server":{"type":"unix","path":"/s"}}}"#,
        ] {
            assert_eq!(of(string), Named::NoFile, "{string}");
        }
    }

    /// A string that cannot be interpreted is reported as undetermined.
    #[test]
    fn undetermined_strings_are_reported_so() {
        for string in [
            "a:b.qcow2",
            "fat:/e",
            "json:{'file.filename':'/e/a.qcow2'}",
            "json:{",
            r#"json:{"driver":"qcow2","file":"node0"}"#,
            r#"json:{"driver":"qcow2"}"#,
        ] {
            assert!(matches!(of(string), Named::Unknown(_)), "{string}: {:?}", of(string));
        }
    }

    /// A string that domsnap writes is read as the same file.
    #[test]
    fn written_strings_read_as_the_same_file() {
        let path = Utf8Path::new("/d/x.qcow2");
        for name in ["a.qcow2", "a:b.qcow2", "json:x", "1 %,.qcow2", "/e/f:g.qcow2"] {
            let string = backing_string(path, &LayerName(name.to_owned()));
            let expected = Utf8Path::new("/d").join(name);
            assert_eq!(resolve_backing(path, &string).unwrap(), expected, "{string}");
            assert_eq!(of(&string), files(&[Path::new("/d").join(&string).to_str().unwrap()]), "{string}");
        }
    }

    /// A name that is too long for an image is written relative to the disk.
    #[test]
    fn long_name_is_written_relative_to_the_disk() {
        let deep = format!("/{}", ["d"; 600].join("/"));
        let path = Utf8PathBuf::from(format!("{deep}/own/x.qcow2"));
        let gold = LayerName(format!("{deep}/gold/g.qcow2"));
        assert_eq!(backing_string(&path, &gold), "../gold/g.qcow2");
        check_backing_string(&path, &gold).unwrap();
        let dotted = LayerName(format!("{deep}/own/../gold/g.qcow2"));
        assert_eq!(backing_string(&path, &dotted), "../gold/g.qcow2");
        let far = LayerName(format!("/e{deep}/g.qcow2"));
        assert!(check_backing_string(&path, &far).is_err());
    }
}
