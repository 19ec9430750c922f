//! `domsnap disk check, materialise, relocate, resize`: work on one VHD image, for which other programs have
//! no tool. Like internal snapshots, it goes past the service: the image engine makes each change whole or
//! not at all, and what only the service knows is asked of it first.

use backend_vhd::image::{
    Chain, ChainOptions, Finding, FoundBy, Layer, Materialised, Moving, OpenOptions, ParentName, Severity,
    Vhd, find_copies, find_parent, materialise, visible_bytes,
};
use camino::{Utf8Path, Utf8PathBuf};
use image_files::{DiskLoan, names};
use snapcore::service::GivenImage;
use snapcore::{Error, ErrorKind, Result};

use super::serve;
use crate::answer::Answer;
use crate::args::CopyFormat;
use crate::backends::absolute;
use crate::documents::DiskVhdDoc;
use crate::failure::Failure;
use crate::failure::exit;
use crate::session::Session;
use crate::units;

/// The format of the images that these commands work on.
const FORMAT: &str = "vhd";

/// The image that was given, absolute.
fn path_of(image: &GivenImage) -> Result<Utf8PathBuf> {
    if let Some(format) = image.format.as_deref().filter(|format| *format != FORMAT) {
        return Err(Error::new(
            ErrorKind::Unsupported,
            format!("{} was given as format {format}, and this command works on VHD images", image.address),
        )
        .advise("qemu-img has `check`, `convert`, `rebase` and `resize` for other formats"));
    }
    image.file()
}

fn options(session: &Session) -> Result<ChainOptions> {
    let mut options = ChainOptions::read_only();
    for directory in &session.global.allow_backing {
        options.allowed.push(absolute(directory)?.into_std_path_buf());
    }
    Ok(options)
}

/// Checks an image and its chain; with `repair`, corrects what can be corrected.
pub fn check(session: &Session, image: &GivenImage, repair: bool, data: bool) -> Result<Answer, Failure> {
    let path = path_of(image)?;
    let options = options(session)?;
    let mut done = Vec::new();
    // It lasts to the end: the image is read once more after the repair.
    let _loan = if repair { borrow(&path)? } else { None };
    if repair {
        session.ask(session.service.require_closed(&path))?;
        done = mend(&path, &options)?;
    }
    let mut opened = engine(Vhd::open(path.as_std_path(), &OpenOptions::read_only()))?;
    let mut findings = engine(opened.check(data))?;
    match find_parent(&opened, &options.allowed) {
        Ok(Some(parent)) if parent.by == FoundBy::Search => findings.push(
            Finding::warning(format!(
                "no locator leads to the parent: it is {}, by its id",
                parent.path.display()
            ))
            .repairable(),
        ),
        Ok(_) => {}
        Err(error) => findings.push(Finding::error(error.to_string())),
    }
    drop(opened);
    if let Err(error) = backend_vhd::require_complete(&path) {
        findings.push(Finding::error(error.to_string()));
    }
    match Chain::open(path.as_std_path(), &options) {
        Ok(chain) => findings.extend(copies(chain, &options)),
        Err(error) => {
            let text = error.to_string();
            if findings.iter().all(|finding| finding.text != text) {
                findings.push(Finding::error(text));
            }
        }
    }
    let worst = findings.iter().map(|finding| finding.severity).max();
    let findings = findings.into_iter().map(|finding| {
        snapcore::backend::Finding::new(
            severity(finding.severity),
            path.to_string(),
            match finding.repairable {
                true => format!("{} (--repair corrects it)", finding.text),
                false => finding.text,
            },
        )
    });
    let findings = findings.collect();
    let document = DiskVhdDoc { operation: "check".to_owned(), image: path, findings, done };
    let mut answer = match repair {
        true => session.changed(document, shown),
        false => session.reported(document, shown),
    };
    if worst == Some(Severity::Error) {
        answer.exit = exit::FAILED;
        answer.complaint = Some("the check found errors".to_owned());
    }
    Ok(answer)
}

/// Warns of other files that have the id of a layer: a child whose locators are lost may take the wrong one.
fn copies(chain: Chain, options: &ChainOptions) -> Vec<Finding> {
    let mut findings = Vec::new();
    for layer in chain.into_layers() {
        let Layer::Vhd(image) = layer else { continue };
        for copy in find_copies(&image, &options.allowed).unwrap_or_default() {
            findings.push(Finding::warning(format!(
                "{} has the unique id of {}: a copy needs an id of its own. The one that a locator names is used",
                copy.display(),
                image.path().display()
            )));
        }
    }
    findings
}

/// Borrows an image that is to be written from the server that has it open, if no client uses the disk. The
/// image must be closed before the loan ends: the server locks it again.
fn borrow(path: &Utf8Path) -> Result<Option<DiskLoan>, Failure> {
    Ok(image_files::borrow_image(path)?)
}

/// Opens an image to write it, which has all that a server of it had acknowledged.
fn open_to_write(path: &Utf8Path) -> Result<Vhd, Failure> {
    let opened = engine(Vhd::open(path.as_std_path(), &OpenOptions::read_write()))?;
    // Under the lock of the image, so that no server begins meanwhile.
    backend_vhd::require_complete(path)?;
    Ok(opened)
}

/// Repairs footers and batmap, and names a parent that only its id has led to.
fn mend(path: &Utf8Path, options: &ChainOptions) -> Result<Vec<String>, Failure> {
    let mut opened = open_to_write(path)?;
    let mut done = Vec::new();
    if engine(opened.can_be_repaired())?
        || opened.check(false).is_ok_and(|found| found.iter().any(|f| f.repairable))
    {
        done = engine(opened.repair())?;
        drop(opened);
        opened = engine(Vhd::open(path.as_std_path(), &OpenOptions::read_write()))?;
    }
    if let Ok(Some(parent)) = find_parent(&opened, &options.allowed)
        && parent.by == FoundBy::Search
        && let Ok(parent) = Utf8PathBuf::from_path_buf(parent.path)
    {
        let name = name_of(path, &parent)?;
        engine(opened.set_parent(&name))?;
        done.push(format!("named the parent {parent}"));
    }
    Ok(done)
}

/// Writes into a child where its parent is.
pub fn relocate(session: &Session, image: &GivenImage, parent: &Utf8Path) -> Result<Answer, Failure> {
    let path = path_of(image)?;
    let parent = GivenImage::known_path(&absolute(parent)?)?;
    let _loan = borrow(&path)?;
    session.ask(session.service.require_closed(&path))?;
    let mut opened = open_to_write(&path)?;
    let name = name_of(&path, &parent)?;
    if opened.parent_id() != Some(name.id) {
        let wanted = opened.parent_id().map_or("none".to_owned(), |id| id.to_string());
        let message = format!(
            "the parent of {path} is the image with the id {wanted}, and {parent} has the id {}",
            name.id
        );
        return Err(Error::new(ErrorKind::Refused, message)
            .state("no changes made")
            .advise("give the image with that id: a child shows wrong data on any other")
            .into());
    }
    engine(opened.set_parent(&name))?;
    let done = vec![format!("named the parent {parent}")];
    let document = DiskVhdDoc { operation: "relocate".to_owned(), image: path, findings: Vec::new(), done };
    Ok(session.changed(document, shown))
}

fn name_of(child: &Utf8Path, parent: &Utf8Path) -> Result<ParentName, Failure> {
    Ok(backend_vhd::parent_name_for(child, parent)?)
}

/// Makes the disk of an image larger.
pub fn resize(session: &Session, image: &GivenImage, size: u64) -> Result<Answer, Failure> {
    let path = path_of(image)?;
    let _loan = borrow(&path)?;
    serve::require_writable(session, &path)?;
    require_finished(session, &path)?;
    let children = backend_vhd::find_children(&path)?;
    if let Some(child) = children.first() {
        let message = format!("{child} is a child of {path}: it would be smaller than its parent");
        return Err(Error::new(ErrorKind::Refused, message)
            .state("no changes made")
            .advise("resize the top of the chain: its parents keep their sizes")
            .into());
    }
    let mut opened = open_to_write(&path)?;
    engine(opened.grow(size))?;
    let done = vec![format!("the disk has {} now", units::bytes(size))];
    let document = DiskVhdDoc { operation: "resize".to_owned(), image: path, findings: Vec::new(), done };
    Ok(session.changed(document, shown))
}

/// Refuses to resize a disk in the middle of an operation: a recovery may take the image away.
fn require_finished(session: &Session, path: &Utf8Path) -> Result<(), Failure> {
    match session.ask(session.service.belonging(path))? {
        Some(owner) if !owner.listing.unfinished.is_empty() => {
            let name = &owner.listing.domain.name;
            let message =
                format!("{path} is a disk of domain {name}, which has an operation that is not finished");
            Err(Error::new(ErrorKind::Refused, message)
                .advise(format!("run `domsnap recover {name}` first"))
                .into())
        }
        _ => Ok(()),
    }
}

/// Copies what an image shows to a new file.
pub fn copy(
    session: &Session,
    image: &GivenImage,
    to: &Utf8Path,
    format: CopyFormat,
    align: u64,
) -> Result<Answer, Failure> {
    let path = path_of(image)?;
    let to = GivenImage::known_path(&absolute(to)?)?;
    let mut chain = engine(Chain::open(path.as_std_path(), &options(session)?))?;
    backend_vhd::require_complete(&path)?;
    let kind = match format {
        CopyFormat::Raw => Materialised::Raw,
        CopyFormat::VhdFixed => Materialised::Fixed { align },
    };
    require_room(&mut chain, &to)?;
    let bytes = names::write_new(&to, &path, |into, passing| {
        engine(materialise(&mut chain, into, passing.as_std_path(), kind, &Moving::quietly()))
    })?;
    let done = vec![format!("copied {} of data to {to}", units::bytes(bytes))];
    let document =
        DiskVhdDoc { operation: "materialise".to_owned(), image: path, findings: Vec::new(), done };
    Ok(session.changed(document, shown))
}

/// Refuses a copy of what a chain shows for which there is no room.
fn require_room(chain: &mut Chain, to: &Utf8Path) -> Result<(), Failure> {
    let needed = engine(visible_bytes(chain))?.into_iter().fold(0, u64::saturating_add);
    let directory = to.parent().unwrap_or(Utf8Path::new("/"));
    let Ok(about) = rustix::fs::statvfs(directory.as_std_path()) else { return Ok(()) };
    let free = about.f_bavail.saturating_mul(about.f_frsize);
    if about.f_blocks == 0 || needed <= free {
        return Ok(());
    }
    let (needed, free) = (units::bytes(needed), units::bytes(free));
    let error = Error::new(
        ErrorKind::NoSpace,
        format!("the copy has {needed} of data, and {directory} has {free} free"),
    )
    .state("no changes made")
    .advise("free space there, or copy to another file system");
    Err(Failure::of(error, false))
}

/// Maps an error of the image engine: a refusal if it has written nothing.
fn engine<T>(done: backend_vhd::image::Result<T>) -> Result<T, Failure> {
    done.map_err(|error| {
        let started = error.is_half_done();
        Failure::of(error.into(), started)
    })
}

fn severity(severity: Severity) -> snapcore::backend::Severity {
    match severity {
        Severity::Note => snapcore::backend::Severity::Note,
        Severity::Warning => snapcore::backend::Severity::Warning,
        Severity::Error => snapcore::backend::Severity::Error,
    }
}

fn shown(document: &DiskVhdDoc) -> String {
    let word = |severity| match severity {
        snapcore::backend::Severity::Note => "note",
        snapcore::backend::Severity::Warning => "warning",
        snapcore::backend::Severity::Error => "error",
    };
    let mut text = String::new();
    for done in &document.done {
        text.push_str(&format!("{}: {done}\n", document.image));
    }
    for finding in &document.findings {
        text.push_str(&format!("{}: {}: {}\n", word(finding.severity), finding.subject, finding.message));
    }
    if text.is_empty() {
        text = format!("{}: nothing found\n", document.image);
    }
    text
}
