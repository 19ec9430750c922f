//! libvirt's XML of a snapshot: what `virsh snapshot-dumpxml` prints, and what libvirt keeps in
//! `/var/lib/libvirt/qemu/snapshot/DOMAIN`.

use camino::Utf8PathBuf;
use jiff::Timestamp;
use roxmltree::{Document, Node};
use snapcore::service::RecordedSnapshot;

use super::Parsed;

pub(super) fn parse(text: &str) -> Parsed {
    // Documents with a DTD are refused, so nothing expands.
    let document = Document::parse(text).map_err(|error| error.to_string())?;
    let root = document.root_element();
    if !root.has_tag_name("domainsnapshot") {
        return Err(format!("it is <{}>, not <domainsnapshot>", root.tag_name().name()));
    }
    let name = text_of(root, &["name"]).ok_or("it has no <name>")?;
    let created = match text_of(root, &["creationTime"]) {
        None => None,
        Some(text) => {
            let seconds = text.parse().ok().and_then(|seconds| Timestamp::from_second(seconds).ok());
            Some(seconds.ok_or_else(|| format!("its creationTime is {text:?}"))?)
        }
    };
    let external: Vec<Node<'_, '_>> = elements(root, &["disks", "disk"])
        .filter(|disk| disk.attribute("snapshot") == Some("external"))
        .collect();
    // A tag of this name may be another program's, where this one made overlays alone. Old records list no
    // disks.
    let is_internal = external.is_empty()
        || elements(root, &["disks", "disk"]).any(|disk| disk.attribute("snapshot") == Some("internal"));
    let overlays = external.iter().filter_map(|disk| file_of(*disk)).collect();
    // The configuration is that of before the snapshot: its images are frozen now.
    let frozen = elements(root, &["domain", "devices", "disk"])
        .filter(|disk| {
            let target = child(*disk, "target").and_then(|target| target.attribute("dev"));
            let file = child(*disk, "source").and_then(|source| source.attribute("file"));
            external
                .iter()
                .filter_map(|disk| disk.attribute("name"))
                .any(|of| Some(of) == target || Some(of) == file)
        })
        .filter_map(file_of)
        .collect();
    let memory = child(root, "memory")
        .filter(|memory| matches!(memory.attribute("snapshot"), Some("internal" | "external")));
    let memory = memory.map(|memory| match memory.attribute("file") {
        Some(file) => format!("{file} has the form of `virsh save`; the snapshot has its disks alone"),
        None => "it is inside an image; the snapshot has its disks alone".to_owned(),
    });
    Ok(RecordedSnapshot::new(name)
        .parent(text_of(root, &["parent", "name"]).map(str::to_owned))
        .created(created)
        .description(text_of(root, &["description"]).map(str::to_owned))
        .current(text_of(root, &["active"]) == Some("1"))
        .tag(is_internal.then(|| name.to_owned()))
        .overlays(overlays)
        .frozen(frozen)
        .memory(memory))
}

fn child<'a, 'input>(node: Node<'a, 'input>, name: &str) -> Option<Node<'a, 'input>> {
    node.children().find(|child| child.has_tag_name(name))
}

/// The elements at a path below a node.
fn elements<'a, 'input>(
    node: Node<'a, 'input>,
    path: &'static [&'static str],
) -> Box<dyn Iterator<Item = Node<'a, 'input>> + 'a>
where
    'input: 'a,
{
    match path.split_first() {
        None => Box::new(std::iter::once(node)),
        Some((first, rest)) => Box::new(
            node.children()
                .filter(move |child| child.has_tag_name(*first))
                .flat_map(|child| elements(child, rest)),
        ),
    }
}

/// The text of the first element at a path, if it is not empty.
fn text_of<'a>(node: Node<'a, '_>, path: &'static [&'static str]) -> Option<&'a str> {
    elements(node, path).next()?.text().map(str::trim).filter(|text| !text.is_empty())
}

/// The file that a disk's `<source>` names. Other kinds of disks have no frozen layers.
fn file_of(disk: Node<'_, '_>) -> Option<Utf8PathBuf> {
    child(disk, "source")?.attribute("file").map(Utf8PathBuf::from)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// As libvirt 11 writes it, shortened.
    const EXTERNAL: &str = r#"<!--
WARNING: THIS IS AN AUTO-GENERATED FILE.
-->
<domainsnapshot>
  <name>before update</name>
  <description>two
lines</description>
  <state>disk-snapshot</state>
  <creationTime>1764500000</creationTime>
  <parent>
    <name>fresh</name>
  </parent>
  <memory snapshot='no'/>
  <disks>
    <disk name='vda' snapshot='external' type='file'>
      <driver type='qcow2'/>
      <source file='/srv/web.before'/>
    </disk>
    <disk name='vdb' snapshot='no'/>
  </disks>
  <domain type='kvm'>
    <name>web</name>
    <devices>
      <disk type='file' device='disk'><source file='/srv/web.qcow2'/><target dev='vda' bus='virtio'/></disk>
      <disk type='file' device='disk'><source file='/srv/data.raw'/><target dev='vdb' bus='virtio'/></disk>
    </devices>
  </domain>
  <active>1</active>
</domainsnapshot>"#;

    #[test]
    fn external_snapshot_is_read() {
        let record = parse(EXTERNAL).unwrap();
        let wanted = RecordedSnapshot::new("before update")
            .parent(Some("fresh".to_owned()))
            .created(Timestamp::from_second(1_764_500_000).ok())
            .description(Some("two\nlines".to_owned()))
            .current(true)
            .overlays(vec!["/srv/web.before".into()])
            .frozen(vec!["/srv/web.qcow2".into()]);
        assert_eq!(record, wanted);
    }

    #[test]
    fn memory_is_noted() {
        let text = "<domainsnapshot><name>a</name><state>running</state>\
                    <memory snapshot='external' file='/srv/a.mem'/></domainsnapshot>";
        assert!(parse(text).unwrap().memory.is_some_and(|memory| memory.contains("/srv/a.mem")));
    }

    #[test]
    fn what_is_no_snapshot_is_an_error() {
        for (text, why) in [
            ("<domain/>", "<domain>"),
            ("<domainsnapshot/>", "<name>"),
            ("<domainsnapshot><name>  </name></domainsnapshot>", "<name>"),
            ("<domainsnapshot><name>a</name><creationTime>soon</creationTime></domainsnapshot>", "soon"),
            ("<domainsnapshot><name>a</name>", "never closed"),
            ("<!DOCTYPE d [<!ENTITY a 'aaaa'>]><domainsnapshot><name>&a;</name></domainsnapshot>", "DTD"),
        ] {
            let error = parse(text).unwrap_err();
            assert!(error.contains(why), "{text}: {error}");
        }
    }
}
