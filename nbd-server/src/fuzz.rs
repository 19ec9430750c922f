//! Entries for fuzzing: everything that reads bytes of a socket, without the socket.

use std::io::{self, Read, Write};
use std::time::Duration;

use crate::control;
use crate::option::{Agreed, Export, Timed, negotiate};
use crate::request::{HEAD, Request, refused, status};
use crate::wire::Errno;

/// A client that sends bytes and takes whatever comes.
struct Client<'a>(&'a [u8]);

impl Read for Client<'_> {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        self.0.read(buf)
    }
}

impl Write for Client<'_> {
    fn write(&mut self, buf: &[u8]) -> io::Result<usize> {
        Ok(buf.len())
    }
    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl Timed for Client<'_> {
    fn limit(&mut self, _: Option<Duration>) -> io::Result<()> {
        Ok(())
    }
}

/// A negotiation with a client that sends these bytes.
pub fn options(bytes: &[u8]) {
    let export = Export { size: 1 << 20, alignment: 512, read_only: false };
    let _ = negotiate(&mut Client(bytes), || export, || Ok(()));
}

/// A request's head, checked, and replied to. An accepted range is within the disk.
pub fn request(bytes: &[u8]) {
    let Some(head) = bytes.first_chunk::<HEAD>() else { return };
    let Some(request) = Request::parse(head) else { return };
    let agreed = Agreed { structured: true, allocation: true };
    for (size, alignment, read_only) in [(u64::MAX, 1, false), (1 << 20, 512, false), (0, 1, true)] {
        let export = Export { size, alignment, read_only };
        match request.check(agreed, export) {
            Ok(_) => {
                let end = request.offset.checked_add(request.length.into());
                assert!(end.is_some_and(|end| end <= size));
                assert_eq!(request.offset % u64::from(alignment), 0);
            }
            Err(refusal) => drop(refused(agreed, &request, refusal.0, refusal.1)),
        }
    }
    drop(refused(Agreed::default(), &request, Errno::Io, ""));
    drop(status(&request, &[], false));
}

/// A line of the control socket.
pub fn control(bytes: &[u8]) {
    let _ = control::parse(bytes);
}
