//! The two system interfaces without a safe wrapper among the dependencies.

#![allow(unsafe_code)]

use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};

use nix::libc;

/// The process at the other end of a unix socket.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct Peer {
    /// Its process; `None` if it is in another namespace of processes.
    pub pid: Option<i32>,
    /// Its user.
    pub uid: u32,
}

/// Asks the kernel for the peer, as it was when it connected.
pub(crate) fn peer_of(socket: BorrowedFd<'_>) -> std::io::Result<Peer> {
    let mut found = libc::ucred { pid: 0, uid: u32::MAX, gid: u32::MAX };
    let mut length = size_of::<libc::ucred>() as libc::socklen_t;
    // SAFETY: the descriptor is open; `found` is a `ucred` and `length` its size, as SO_PEERCRED wants.
    let answer = unsafe {
        libc::getsockopt(
            socket.as_raw_fd(),
            libc::SOL_SOCKET,
            libc::SO_PEERCRED,
            (&raw mut found).cast(),
            &raw mut length,
        )
    };
    if answer != 0 {
        return Err(std::io::Error::last_os_error());
    }
    Ok(Peer { pid: (found.pid > 0).then_some(found.pid), uid: found.uid })
}

/// Takes over a descriptor that this process was started with.
///
/// # Safety
/// Nothing else in this process may own the descriptor, now or later.
pub(crate) unsafe fn take_inherited(number: RawFd) -> std::io::Result<OwnedFd> {
    // SAFETY: F_GETFD changes nothing, whatever the number is.
    if unsafe { libc::fcntl(number, libc::F_GETFD) } < 0 {
        return Err(std::io::Error::last_os_error());
    }
    // SAFETY: the descriptor is open, and the caller promises that it has no other owner.
    let owned = unsafe { OwnedFd::from_raw_fd(number) };
    rustix::io::fcntl_setfd(&owned, rustix::io::FdFlags::CLOEXEC)?;
    Ok(owned)
}
