//! A disk that is lent: an operation on images at rest, whose server runs and has no client.
//!
//! The server closes the images and gives their locks back. The loan lasts as long as the borrower's control
//! connection: `give-back`, or the connection's end, opens the image that the borrower named at the
//! beginning. That is the disk's configured path, which names a whole disk at every instant of an operation.
//! So a borrower that is killed leaves a server that goes on by itself, as one that is started again would.
//!
//! The borrower has the client's place meanwhile. A program that connects to the disk is refused, because it
//! would wait for an image without a limit.

use std::io::{BufRead, Read, Write};
use std::os::unix::fs::MetadataExt;
use std::os::unix::net::UnixStream;
use std::time::Duration;

use camino::{Utf8Path, Utf8PathBuf};
use serde_json::{Value, json};

use crate::control::{
    ControlInfo, ControlRequest, MAX_LINE, answer, ask, ask_on, connect, is_served, line, parse,
    require_absolute,
};
use crate::disk::{Disk, Seat};
use crate::error::{Error, ErrorKind, Result};
use crate::image::Format;
use crate::merge::Merges;

/// Time between two attempts to open the image after the borrower's death: its locks end with its process.
const AGAIN: Duration = Duration::from_millis(100);
/// A server that looks at its own state answers at once.
const SOON: Duration = Duration::from_secs(2);
/// A server waits for the requests on their way, and closes or opens images.
const PATIENCE: Duration = Duration::from_secs(60);

/// The disk while it is lent.
pub(crate) struct Lent<'a> {
    _seat: Seat<'a>,
    disk: &'a Disk,
    format: &'a dyn Format,
    image: Utf8PathBuf,
}

/// Closes the images for the process `borrower`, until `image` is to be opened.
///
/// # Errors
/// [`ErrorKind::Busy`] if a client uses the disk, or layers are being merged; [`ErrorKind::Refused`] if the
/// disk is detached.
pub(crate) fn lend<'a>(
    image: &Utf8Path,
    borrower: Option<i32>,
    disk: &'a Disk,
    merges: &Merges,
    format: &'a dyn Format,
) -> Result<Lent<'a>> {
    require_absolute(image)?;
    let seat = disk.admit_borrower(borrower)?;
    let _none = merges.none()?;
    if disk.look().served.is_none() {
        return Err(Error::new(ErrorKind::Refused, "the disk is detached: it has no image to lend"));
    }
    let to = borrower.map_or_else(String::new, |pid| format!(" to process {pid}"));
    disk.detach(&format!("lent{to}"), || format.close())?;
    Ok(Lent { _seat: seat, disk, format, image: image.to_owned() })
}

impl Lent<'_> {
    /// Answers the borrower until it gives the disk back; returns the answer to that. Then, or when the
    /// connection ends, the image is opened.
    ///
    /// # Errors
    /// The connection has ended. The image is open again.
    pub(crate) fn last(
        self,
        incoming: &mut impl BufRead,
        mut outgoing: &UnixStream,
    ) -> std::io::Result<Result<Value>> {
        let mut lasts = outgoing.write_all(&line(&answer(Ok(json!({})))));
        while lasts.is_ok() {
            let mut request = Vec::new();
            match incoming.take(MAX_LINE).read_until(b'\n', &mut request) {
                Ok(read) if read > 0 && request.pop() == Some(b'\n') => {}
                other => {
                    lasts = Err(other.err().unwrap_or_else(|| std::io::ErrorKind::UnexpectedEof.into()));
                    break;
                }
            }
            if let Ok(ControlRequest::GiveBack {}) = parse(&request) {
                // What cannot be opened is the borrower's to report, and this server's to try again when the
                // connection ends.
                match self.open() {
                    Ok(generation) => return Ok(Ok(json!({ "generation": generation }))),
                    Err(error) => lasts = outgoing.write_all(&line(&answer(Err(error)))),
                }
                continue;
            }
            let refused = Error::new(ErrorKind::Refused, "this connection has borrowed the disk");
            lasts = outgoing.write_all(&line(&answer(Err(refused))));
        }
        self.take_back();
        Err(lasts.err().unwrap_or_else(|| std::io::ErrorKind::UnexpectedEof.into()))
    }

    /// Opens the image; returns the number of exchanges. Another caller may have given the disk an image.
    fn open(&self) -> Result<u64> {
        let look = self.disk.look();
        match look.served.is_some_and(|served| is_served(&served, &self.image)) {
            true => Ok(look.generation),
            false => self.disk.attach(|| self.format.open(&self.image)),
        }
    }

    /// Opens the image after the borrower's end, however long its locks last.
    fn take_back(&self) {
        let mut reported = None;
        // Another caller may have attached an image: a recovery, or the user.
        while self.disk.look().served.is_none() {
            let Err(error) = self.open() else { return };
            let error = error.to_string();
            if reported.as_ref() != Some(&error) {
                tracing::warn!(image = %self.image, %error, "a disk that was lent cannot be opened yet");
                reported = Some(error);
            }
            std::thread::sleep(AGAIN);
        }
    }
}

/// A disk that this process has borrowed from its server. Dropped, it is given back.
#[derive(Debug)]
pub struct Loan {
    control: Utf8PathBuf,
    stream: Option<UnixStream>,
}

impl Loan {
    /// Asks the server at the control socket `control` to close its images, which are those of the disk whose
    /// configured path is `image`.
    ///
    /// # Errors
    /// The server's: [`ErrorKind::Busy`] if a client uses the disk. Those of [`ask`](crate::ask).
    pub fn ask(control: &Utf8Path, image: &Utf8Path) -> Result<Self> {
        let stream = connect(control, PATIENCE)?;
        ask_on(&stream, control, &json!({ "do": "lend", "image": image }))?;
        Ok(Self { control: control.to_owned(), stream: Some(stream) })
    }

    /// Gives the disk back, and waits until the server has opened it.
    ///
    /// # Errors
    /// The server cannot open it. It tries again until it can.
    pub fn give_back(mut self) -> Result<()> {
        self.end()
    }

    fn end(&mut self) -> Result<()> {
        let Some(stream) = self.stream.take() else { return Ok(()) };
        match ask_on(&stream, &self.control, &json!({ "do": "give-back" })) {
            // A server that has ended has nothing to be given back to; the next one opens the path itself.
            Err(error) if error.kind() == ErrorKind::Io || error.kind() == ErrorKind::Invalid => {
                match ask(&self.control, &json!({ "do": "info" }), SOON) {
                    Err(gone) if gone.kind() == ErrorKind::Io => Ok(()),
                    _ => Err(error),
                }
            }
            other => other.map(drop),
        }
    }
}

impl Drop for Loan {
    fn drop(&mut self) {
        if let Err(error) = self.end() {
            tracing::warn!(%error, "the server at {} does not go on yet", self.control);
        }
    }
}

/// Finds the server on this machine that has `file` (device and inode) open as the top of its chain, may
/// write it, and can lend it. Returns its control socket.
///
/// The kernel's list of listening sockets is read. Only a server of this user or of root is asked, at a
/// socket that has the name of a control socket, with the disk's socket beside it.
pub fn server_of(file: (u64, u64)) -> Option<Utf8PathBuf> {
    find(file).map(|(control, _)| control)
}

/// Borrows the image `file` (device and inode) from the server that [`server_of`] finds. Afterwards the
/// server opens the path at which it has the image now. It is `fallback` if another file is there.
///
/// This is for a change that keeps the names of files, by a caller who knows no configured path.
///
/// # Errors
/// As [`Loan::ask`].
pub fn borrow_file(file: (u64, u64), fallback: &Utf8Path) -> Result<Option<Loan>> {
    let Some((control, info)) = find(file) else { return Ok(None) };
    let is_there = info.image.symlink_metadata().is_ok_and(|about| (about.dev(), about.ino()) == file);
    let image = if is_there { info.image.as_path() } else { fallback };
    Loan::ask(&control, image).map(Some)
}

fn find(file: (u64, u64)) -> Option<(Utf8PathBuf, ControlInfo)> {
    let listening = std::fs::read_to_string("/proc/net/unix").ok()?;
    let paths: std::collections::BTreeSet<&str> = listening.lines().filter_map(listening_at).collect();
    let controls = paths.iter().filter(|path| {
        path.strip_suffix(".control").is_some_and(|socket| paths.contains(socket)) && path.starts_with('/')
    });
    controls.map(Utf8Path::new).find_map(|control| Some((control.to_owned(), served_at(control, file)?)))
}

/// What a server says of itself, if it can lend this file.
fn served_at(control: &Utf8Path, file: (u64, u64)) -> Option<ControlInfo> {
    let answer = ask(control, &json!({ "do": "info" }), SOON).ok()?;
    let info: ControlInfo = serde_json::from_value(answer).ok()?;
    let top = info.layers.first().map(|layer| (layer.device, layer.inode));
    (info.version == 1 && info.lends && !info.read_only && top == Some(file)).then_some(info)
}

/// Returns the path of a line of `/proc/net/unix`, if a process listens there.
fn listening_at(line: &str) -> Option<&str> {
    // Address, count of references, protocol, flags, type, state, inode, path, which may have spaces.
    const ACCEPTS: u32 = 0x1_0000;
    let mut rest = line;
    let mut flags = None;
    for field in 0..7 {
        let (word, after) = rest.trim_start().split_once(' ')?;
        if field == 3 {
            flags = u32::from_str_radix(word, 16).ok();
        }
        rest = after;
    }
    flags.filter(|flags| flags & ACCEPTS != 0).map(|_| rest)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Listening sockets are found by their flags; names may have spaces, and connections have none.
    #[test]
    fn listening_sockets_are_read_from_the_kernels_list() {
        for (line, path) in [
            ("ffff: 00000002 00000000 00010000 0001 01  4711 /run/a b.sock", Some("/run/a b.sock")),
            ("ffff: 00000003 00000000 00000000 0001 03  4711 /run/a.sock", None),
            ("ffff: 00000003 00000000 00010000 0001 01  4711", None),
            ("Num       RefCount Protocol Flags    Type St Inode Path", None),
            ("", None),
        ] {
            assert_eq!(listening_at(line), path, "{line}");
        }
    }
}
