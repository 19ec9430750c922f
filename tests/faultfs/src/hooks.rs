//! The functions that take libc's place.
//!
//! Each one is one operation: is the file watched? wait for the turn; judge; do; record. `open`, `openat`,
//! `ioctl` and `syscall` are variadic in C; on the calling conventions of Linux on x86-64 and aarch64 their
//! integer arguments arrive as in a function that names them all, which is how they are declared here.

use std::ffi::{CStr, OsStr, c_char, c_int, c_long, c_uint, c_ulong, c_void};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::{Path, PathBuf};

use libc::{iovec, mode_t, off_t, size_t, ssize_t};

use crate::real::real;
use crate::record::{Kind, Record};
use crate::session::{self, Config, Verdict};

/// A watched file behind a descriptor.
struct Watched {
    config: &'static Config,
    path: PathBuf,
    dev: u64,
    ino: u64,
    size: u64,
}

fn stat(fd: c_int) -> Option<libc::stat> {
    // SAFETY: all zeros is a valid `stat`, which fstat fills in.
    let mut stat: libc::stat = unsafe { std::mem::zeroed() };
    // SAFETY: the pointer is to `stat`.
    (unsafe { libc::fstat(fd, &mut stat) } == 0).then_some(stat)
}

fn stat_path(path: &Path) -> Option<libc::stat> {
    let path = std::ffi::CString::new(path.as_os_str().as_bytes()).ok()?;
    // SAFETY: as in `stat`; `path` is a C string.
    let mut stat: libc::stat = unsafe { std::mem::zeroed() };
    // SAFETY: as above.
    (unsafe { libc::lstat(path.as_ptr(), &mut stat) } == 0).then_some(stat)
}

/// The file behind `fd`, if it is watched.
fn watched(fd: c_int) -> Option<Watched> {
    let config = session::config()?;
    let mut path = std::fs::read_link(format!("/proc/self/fd/{fd}")).ok()?.into_os_string().into_vec();
    if path.ends_with(b" (deleted)") {
        path.truncate(path.len() - b" (deleted)".len());
    }
    let path = PathBuf::from(std::ffi::OsString::from_vec(path));
    if !config.watches(&path) {
        return None;
    }
    let stat = stat(fd)?;
    Some(Watched { config, path, dev: stat.st_dev, ino: stat.st_ino, size: stat.st_size as u64 })
}

/// `path` as seen from `dirfd`, absolute, its directory canonical; `None` where it is not watched.
fn named(dirfd: c_int, path: *const c_char) -> Option<(&'static Config, PathBuf)> {
    let config = session::config()?;
    if path.is_null() {
        return None;
    }
    // SAFETY: the caller hands libc a C string.
    let path = Path::new(OsStr::from_bytes(unsafe { CStr::from_ptr(path) }.to_bytes()));
    let path = if path.is_absolute() || dirfd == libc::AT_FDCWD {
        std::path::absolute(path).ok()?
    } else {
        std::fs::read_link(format!("/proc/self/fd/{dirfd}")).ok()?.join(path)
    };
    let path = match path.file_name() {
        Some(name) => path.parent()?.canonicalize().ok()?.join(name),
        None => path.canonicalize().ok()?,
    };
    config.watches(&path).then_some((config, path))
}

fn shown<'a>(config: &Config, path: &'a Path) -> std::path::Display<'a> {
    path.strip_prefix(&config.root).unwrap_or(path).display()
}

fn fail(errno: c_int) -> c_int {
    // SAFETY: libc's own thread-local.
    unsafe { *libc::__errno_location() = errno };
    -1
}

/// One operation that is not a write: judged, done, recorded.
fn operation(
    config: &'static Config,
    line: &str,
    needs_space: bool,
    real: impl FnOnce() -> c_int,
    record: impl FnOnce(c_int) -> Option<Record>,
) -> c_int {
    let mut turn = session::turn();
    match config.judge(&mut turn, line, false, needs_space) {
        Verdict::Do | Verdict::Tear => {}
        Verdict::Fail(errno) => return fail(errno),
    }
    let result = real();
    if result >= 0
        && config.records()
        && let Some(record) = record(result)
    {
        config.record(&record);
    }
    result
}

/// One write of `len` bytes at `at` (or at the descriptor's own position).
fn write_operation(
    fd: c_int,
    kind: &str,
    at: Option<off_t>,
    len: usize,
    data: impl FnOnce(usize) -> Vec<u8>,
    real: impl FnOnce() -> ssize_t,
) -> ssize_t {
    let Some(file) = watched(fd) else { return real() };
    let mut turn = session::turn();
    let offset = match at {
        Some(at) => at as u64,
        None => {
            // SAFETY: plain descriptor calls.
            let append = unsafe { libc::fcntl(fd, libc::F_GETFL) } & libc::O_APPEND != 0;
            // SAFETY: as above.
            if append { file.size } else { unsafe { libc::lseek64(fd, 0, libc::SEEK_CUR) as u64 } }
        }
    };
    let line = format!("{kind} {} at {offset} length {len}", shown(file.config, &file.path));
    match file.config.judge(&mut turn, &line, true, true) {
        Verdict::Do => {}
        Verdict::Tear => {
            let half = data(len / 2);
            real!(pwrite64: fn(c_int, *const c_void, size_t, off_t) -> ssize_t;
                fd, half.as_ptr().cast(), half.len(), offset as off_t);
            session::die()
        }
        Verdict::Fail(errno) => return fail(errno) as ssize_t,
    }
    let written = real();
    if written > 0 && file.config.records() {
        let mut record = Record::new(Kind::Write, file.dev, file.ino);
        record.offset = offset;
        record.length = written as u64;
        record.data = data(written as usize);
        file.config.record(&record);
    }
    written
}

fn bytes(pointer: *const c_void, len: usize) -> Vec<u8> {
    // SAFETY: the caller gave libc `len` readable bytes there or more.
    unsafe { std::slice::from_raw_parts(pointer.cast::<u8>(), len) }.to_vec()
}

fn vectors<'a>(iov: *const iovec, count: c_int) -> &'a [iovec] {
    // SAFETY: the caller gave libc `count` vectors there.
    if count > 0 { unsafe { std::slice::from_raw_parts(iov, count as usize) } } else { &[] }
}

fn gathered(vectors: &[iovec], len: usize) -> Vec<u8> {
    let mut all: Vec<u8> = vectors.iter().flat_map(|v| bytes(v.iov_base, v.iov_len)).collect();
    all.truncate(len);
    all
}

fn vectors_len(vectors: &[iovec]) -> usize {
    vectors.iter().map(|v| v.iov_len).sum()
}

/// What the file behind `fd` holds, read through a descriptor of our own: `fd` may be write-only.
fn read_back(fd: c_int, offset: u64, len: usize) -> Vec<u8> {
    use std::os::unix::fs::FileExt;
    let mut data = vec![0; len];
    let read =
        std::fs::File::open(format!("/proc/self/fd/{fd}")).and_then(|f| f.read_exact_at(&mut data, offset));
    if let Err(error) = read {
        session::abort(&format!("cannot read back what was copied: {error}"));
    }
    data
}

macro_rules! hook_pwrite {
    ($($name:ident)*) => {$(
        #[unsafe(no_mangle)]
        extern "C" fn $name(fd: c_int, data: *const c_void, len: size_t, at: off_t) -> ssize_t {
            write_operation(fd, "write", Some(at), len, |n| bytes(data, n), || {
                real!($name: fn(c_int, *const c_void, size_t, off_t) -> ssize_t; fd, data, len, at)
            })
        }
    )*};
}
hook_pwrite!(pwrite pwrite64);

macro_rules! hook_pwritev {
    ($($name:ident)*) => {$(
        #[unsafe(no_mangle)]
        extern "C" fn $name(fd: c_int, iov: *const iovec, count: c_int, at: off_t) -> ssize_t {
            let parts = vectors(iov, count);
            write_operation(fd, "write", Some(at), vectors_len(parts), |n| gathered(parts, n), || {
                real!($name: fn(c_int, *const iovec, c_int, off_t) -> ssize_t; fd, iov, count, at)
            })
        }
    )*};
}
hook_pwritev!(pwritev pwritev64);

macro_rules! hook_pwritev2 {
    ($($name:ident)*) => {$(
        #[unsafe(no_mangle)]
        extern "C" fn $name(fd: c_int, iov: *const iovec, count: c_int, at: off_t, flags: c_int) -> ssize_t {
            let parts = vectors(iov, count);
            let place = (at != -1).then_some(at);
            write_operation(fd, "write", place, vectors_len(parts), |n| gathered(parts, n), || {
                real!($name: fn(c_int, *const iovec, c_int, off_t, c_int) -> ssize_t; fd, iov, count, at, flags)
            })
        }
    )*};
}
hook_pwritev2!(pwritev2 pwritev64v2);

#[unsafe(no_mangle)]
extern "C" fn write(fd: c_int, data: *const c_void, len: size_t) -> ssize_t {
    write_operation(
        fd,
        "write",
        None,
        len,
        |n| bytes(data, n),
        || real!(write: fn(c_int, *const c_void, size_t) -> ssize_t; fd, data, len),
    )
}

#[unsafe(no_mangle)]
extern "C" fn writev(fd: c_int, iov: *const iovec, count: c_int) -> ssize_t {
    let parts = vectors(iov, count);
    write_operation(
        fd,
        "write",
        None,
        vectors_len(parts),
        |n| gathered(parts, n),
        || real!(writev: fn(c_int, *const iovec, c_int) -> ssize_t; fd, iov, count),
    )
}

/// A copy inside the kernel, recorded as the write that it amounts to.
fn copy_operation(
    fd: c_int,
    kind: &str,
    at: Option<u64>,
    len: usize,
    real: impl FnOnce() -> ssize_t,
) -> ssize_t {
    let Some(file) = watched(fd) else { return real() };
    let mut turn = session::turn();
    // SAFETY: a plain descriptor call.
    let offset = at.unwrap_or_else(|| unsafe { libc::lseek64(fd, 0, libc::SEEK_CUR) as u64 });
    let line = format!("{kind} {} at {offset} length {len}", shown(file.config, &file.path));
    match file.config.judge(&mut turn, &line, false, true) {
        Verdict::Do | Verdict::Tear => {}
        Verdict::Fail(errno) => return fail(errno) as ssize_t,
    }
    let copied = real();
    if copied > 0 && file.config.records() {
        let mut record = Record::new(Kind::Write, file.dev, file.ino);
        record.offset = offset;
        record.length = copied as u64;
        record.data = read_back(fd, offset, copied as usize);
        file.config.record(&record);
    }
    copied
}

/// Reads the offset that a copy will advance.
fn place(offset: *const off_t) -> Option<u64> {
    // SAFETY: null or the caller's offset.
    (!offset.is_null()).then(|| unsafe { *offset as u64 })
}

#[unsafe(no_mangle)]
extern "C" fn copy_file_range(
    from: c_int,
    from_at: *mut off_t,
    to: c_int,
    to_at: *mut off_t,
    len: size_t,
    flags: c_uint,
) -> ssize_t {
    copy_operation(to, "copy", place(to_at), len, || {
        real!(copy_file_range: fn(c_int, *mut off_t, c_int, *mut off_t, size_t, c_uint) -> ssize_t;
            from, from_at, to, to_at, len, flags)
    })
}

macro_rules! hook_sendfile {
    ($($name:ident)*) => {$(
        #[unsafe(no_mangle)]
        extern "C" fn $name(to: c_int, from: c_int, from_at: *mut off_t, len: size_t) -> ssize_t {
            copy_operation(to, "copy", None, len, || {
                real!($name: fn(c_int, c_int, *mut off_t, size_t) -> ssize_t; to, from, from_at, len)
            })
        }
    )*};
}
hook_sendfile!(sendfile sendfile64);

#[unsafe(no_mangle)]
extern "C" fn splice(
    from: c_int,
    from_at: *mut off_t,
    to: c_int,
    to_at: *mut off_t,
    len: size_t,
    flags: c_uint,
) -> ssize_t {
    copy_operation(to, "copy", place(to_at), len, || {
        real!(splice: fn(c_int, *mut off_t, c_int, *mut off_t, size_t, c_uint) -> ssize_t;
            from, from_at, to, to_at, len, flags)
    })
}

/// `struct file_clone_range` of linux/fs.h.
#[repr(C)]
struct CloneRange {
    from: i64,
    from_offset: u64,
    len: u64,
    to_offset: u64,
}

const FICLONE: c_ulong = 0x4004_9409;
const FICLONERANGE: c_ulong = 0x4020_940d;

#[unsafe(no_mangle)]
extern "C" fn ioctl(fd: c_int, request: c_ulong, argument: *mut c_void) -> c_int {
    let real = || real!(ioctl: fn(c_int, c_ulong, *mut c_void) -> c_int; fd, request, argument);
    let (from, from_offset, len, to_offset) = match request {
        FICLONE => (argument as c_int, 0, 0, 0),
        FICLONERANGE => {
            // SAFETY: this request's argument is this structure.
            let range = unsafe { &*argument.cast::<CloneRange>() };
            (range.from as c_int, range.from_offset, range.len, range.to_offset)
        }
        _ => return real(),
    };
    let Some(file) = watched(fd) else { return real() };
    let line = format!("clone {} at {to_offset} length {len}", shown(file.config, &file.path));
    operation(file.config, &line, true, real, |_| {
        let len = match len {
            0 => stat(from)?.st_size as u64 - from_offset,
            len => len,
        };
        let mut record = Record::new(Kind::Write, file.dev, file.ino);
        record.offset = to_offset;
        record.length = len;
        record.data = read_back(fd, to_offset, len as usize);
        Some(record)
    })
}

macro_rules! hook_ftruncate {
    ($($name:ident)*) => {$(
        #[unsafe(no_mangle)]
        extern "C" fn $name(fd: c_int, len: off_t) -> c_int {
            let real = || real!($name: fn(c_int, off_t) -> c_int; fd, len);
            let Some(file) = watched(fd) else { return real() };
            let line = format!("truncate {} from {} to {len}", shown(file.config, &file.path), file.size);
            operation(file.config, &line, len as u64 > file.size, real, |_| {
                let mut record = Record::new(Kind::SetLen, file.dev, file.ino);
                record.length = len as u64;
                Some(record)
            })
        }
    )*};
}
hook_ftruncate!(ftruncate ftruncate64);

macro_rules! hook_truncate {
    ($($name:ident)*) => {$(
        #[unsafe(no_mangle)]
        extern "C" fn $name(path: *const c_char, len: off_t) -> c_int {
            let real = || real!($name: fn(*const c_char, off_t) -> c_int; path, len);
            let Some((config, name)) = named(libc::AT_FDCWD, path) else { return real() };
            operation(config, &format!("truncate {} to {len}", shown(config, &name)), true, real, |_| {
                let stat = stat_path(&name)?;
                let mut record = Record::new(Kind::SetLen, stat.st_dev, stat.st_ino);
                record.length = len as u64;
                Some(record)
            })
        }
    )*};
}
hook_truncate!(truncate truncate64);

fn fallocate_operation(
    fd: c_int,
    mode: c_int,
    offset: off_t,
    len: off_t,
    real: impl FnOnce() -> c_int,
) -> c_int {
    let Some(file) = watched(fd) else { return real() };
    let zeroes = mode & (libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_ZERO_RANGE) != 0;
    if mode & (libc::FALLOC_FL_COLLAPSE_RANGE | libc::FALLOC_FL_INSERT_RANGE) != 0 {
        session::abort("fallocate that moves data is not modelled: teach the shim and the replayer");
    }
    let line =
        format!("fallocate {} mode {mode:#x} at {offset} length {len}", shown(file.config, &file.path));
    operation(file.config, &line, mode & libc::FALLOC_FL_PUNCH_HOLE == 0, real, |_| {
        if zeroes {
            let mut record = Record::new(Kind::Zero, file.dev, file.ino);
            record.offset = offset as u64;
            record.length = len as u64;
            file.config.record(&record);
        }
        let end = offset as u64 + len as u64;
        if mode & libc::FALLOC_FL_KEEP_SIZE != 0 || end <= file.size {
            return None;
        }
        let mut record = Record::new(Kind::SetLen, file.dev, file.ino);
        record.length = end;
        Some(record)
    })
}

macro_rules! hook_fallocate {
    ($($name:ident)*) => {$(
        #[unsafe(no_mangle)]
        extern "C" fn $name(fd: c_int, mode: c_int, offset: off_t, len: off_t) -> c_int {
            fallocate_operation(fd, mode, offset, len, || {
                real!($name: fn(c_int, c_int, off_t, off_t) -> c_int; fd, mode, offset, len)
            })
        }
    )*};
}
hook_fallocate!(fallocate fallocate64);

macro_rules! hook_posix_fallocate {
    ($($name:ident)*) => {$(
        #[unsafe(no_mangle)]
        extern "C" fn $name(fd: c_int, offset: off_t, len: off_t) -> c_int {
            let mut errno = 0;
            let result = fallocate_operation(fd, 0, offset, len, || {
                errno = real!($name: fn(c_int, off_t, off_t) -> c_int; fd, offset, len);
                if errno == 0 { 0 } else { -1 }
            });
            match (result, errno) {
                (0.., _) => 0,
                // SAFETY: libc's own thread-local, set by `fail`.
                (_, 0) => unsafe { *libc::__errno_location() },
                (_, errno) => errno,
            }
        }
    )*};
}
hook_posix_fallocate!(posix_fallocate posix_fallocate64);

macro_rules! hook_flush {
    ($($name:ident)*) => {$(
        #[unsafe(no_mangle)]
        extern "C" fn $name(fd: c_int) -> c_int {
            let real = || real!($name: fn(c_int) -> c_int; fd);
            let Some(file) = watched(fd) else { return real() };
            let line = format!("flush {}", shown(file.config, &file.path));
            operation(file.config, &line, false, real, |_| {
                (!file.config.forgets_flush(&file.path)).then(|| Record::new(Kind::Flush, file.dev, file.ino))
            })
        }
    )*};
}
hook_flush!(fsync fdatasync);

#[unsafe(no_mangle)]
extern "C" fn syncfs(fd: c_int) -> c_int {
    let real = || real!(syncfs: fn(c_int) -> c_int; fd);
    let Some(file) = watched(fd) else { return real() };
    operation(file.config, "flush the file system", false, real, |_| {
        Some(Record::new(Kind::FlushAll, file.dev, file.ino))
    })
}

/// Counted, but not a flush in the record: it promises neither metadata nor the drive's cache.
#[unsafe(no_mangle)]
extern "C" fn sync_file_range(fd: c_int, offset: off_t, len: off_t, flags: c_uint) -> c_int {
    let real = || real!(sync_file_range: fn(c_int, off_t, off_t, c_uint) -> c_int; fd, offset, len, flags);
    let Some(file) = watched(fd) else { return real() };
    operation(file.config, &format!("write back {}", shown(file.config, &file.path)), false, real, |_| None)
}

fn open_operation(dirfd: c_int, path: *const c_char, flags: c_int, real: impl FnOnce() -> c_int) -> c_int {
    let unnamed = flags & libc::O_TMPFILE == libc::O_TMPFILE;
    if flags & (libc::O_CREAT | libc::O_TRUNC) == 0 && !unnamed {
        return real();
    }
    let Some((config, name)) = named(dirfd, path) else { return real() };
    let present = if unnamed { None } else { stat_path(&name) };
    let (line, create) = match present {
        _ if unnamed => (format!("create a nameless file in {}", shown(config, &name)), true),
        None if flags & libc::O_CREAT != 0 => (format!("create {}", shown(config, &name)), true),
        Some(stat) if flags & libc::O_TRUNC != 0 && flags & libc::O_EXCL == 0 && stat.st_size > 0 => {
            (format!("truncate {} by opening it", shown(config, &name)), false)
        }
        _ => return real(),
    };
    operation(config, &line, create, real, |fd| {
        let stat = stat(fd)?;
        let kind = if create { Kind::Create } else { Kind::SetLen };
        let mut record = Record::new(kind, stat.st_dev, stat.st_ino);
        if create && !unnamed {
            record.path = name.into_os_string().into_vec();
        }
        Some(record)
    })
}

macro_rules! hook_open {
    ($($name:ident)*) => {$(
        #[unsafe(no_mangle)]
        extern "C" fn $name(path: *const c_char, flags: c_int, mode: mode_t) -> c_int {
            open_operation(libc::AT_FDCWD, path, flags, || {
                real!($name: fn(*const c_char, c_int, mode_t) -> c_int; path, flags, mode)
            })
        }
    )*};
}
hook_open!(open open64);

macro_rules! hook_openat {
    ($($name:ident)*) => {$(
        #[unsafe(no_mangle)]
        extern "C" fn $name(dirfd: c_int, path: *const c_char, flags: c_int, mode: mode_t) -> c_int {
            open_operation(dirfd, path, flags, || {
                real!($name: fn(c_int, *const c_char, c_int, mode_t) -> c_int; dirfd, path, flags, mode)
            })
        }
    )*};
}
hook_openat!(openat openat64);

macro_rules! hook_creat {
    ($($name:ident)*) => {$(
        #[unsafe(no_mangle)]
        extern "C" fn $name(path: *const c_char, mode: mode_t) -> c_int {
            open_operation(libc::AT_FDCWD, path, libc::O_CREAT | libc::O_TRUNC, || {
                real!($name: fn(*const c_char, mode_t) -> c_int; path, mode)
            })
        }
    )*};
}
hook_creat!(creat creat64);

/// An operation on one name. `after`: the file is looked up by its name once it is done.
fn name_operation(
    dirfd: c_int,
    path: *const c_char,
    line: &str,
    kind: Kind,
    after: bool,
    real: impl FnOnce() -> c_int,
) -> c_int {
    let Some((config, name)) = named(dirfd, path) else { return real() };
    let before = stat_path(&name);
    operation(config, &format!("{line} {}", shown(config, &name)), after, real, |_| {
        let stat = if after { stat_path(&name)? } else { before? };
        let mut record = Record::new(kind, stat.st_dev, stat.st_ino);
        record.path = name.into_os_string().into_vec();
        Some(record)
    })
}

#[unsafe(no_mangle)]
extern "C" fn mkdir(path: *const c_char, mode: mode_t) -> c_int {
    if named(libc::AT_FDCWD, path).is_some_and(|(_, name)| stat_path(&name).is_some()) {
        return real!(mkdir: fn(*const c_char, mode_t) -> c_int; path, mode);
    }
    name_operation(
        libc::AT_FDCWD,
        path,
        "make directory",
        Kind::MakeDir,
        true,
        || real!(mkdir: fn(*const c_char, mode_t) -> c_int; path, mode),
    )
}

#[unsafe(no_mangle)]
extern "C" fn mkdirat(dirfd: c_int, path: *const c_char, mode: mode_t) -> c_int {
    if named(dirfd, path).is_some_and(|(_, name)| stat_path(&name).is_some()) {
        return real!(mkdirat: fn(c_int, *const c_char, mode_t) -> c_int; dirfd, path, mode);
    }
    name_operation(
        dirfd,
        path,
        "make directory",
        Kind::MakeDir,
        true,
        || real!(mkdirat: fn(c_int, *const c_char, mode_t) -> c_int; dirfd, path, mode),
    )
}

#[unsafe(no_mangle)]
extern "C" fn rmdir(path: *const c_char) -> c_int {
    name_operation(
        libc::AT_FDCWD,
        path,
        "remove directory",
        Kind::Unlink,
        false,
        || real!(rmdir: fn(*const c_char) -> c_int; path),
    )
}

#[unsafe(no_mangle)]
extern "C" fn unlink(path: *const c_char) -> c_int {
    name_operation(
        libc::AT_FDCWD,
        path,
        "unlink",
        Kind::Unlink,
        false,
        || real!(unlink: fn(*const c_char) -> c_int; path),
    )
}

#[unsafe(no_mangle)]
extern "C" fn unlinkat(dirfd: c_int, path: *const c_char, flags: c_int) -> c_int {
    name_operation(
        dirfd,
        path,
        "unlink",
        Kind::Unlink,
        false,
        || real!(unlinkat: fn(c_int, *const c_char, c_int) -> c_int; dirfd, path, flags),
    )
}

#[unsafe(no_mangle)]
extern "C" fn link(old: *const c_char, new: *const c_char) -> c_int {
    name_operation(
        libc::AT_FDCWD,
        new,
        "link",
        Kind::Link,
        true,
        || real!(link: fn(*const c_char, *const c_char) -> c_int; old, new),
    )
}

#[unsafe(no_mangle)]
extern "C" fn linkat(
    old_dir: c_int,
    old: *const c_char,
    new_dir: c_int,
    new: *const c_char,
    flags: c_int,
) -> c_int {
    name_operation(new_dir, new, "link", Kind::Link, true, || {
        real!(linkat: fn(c_int, *const c_char, c_int, *const c_char, c_int) -> c_int;
            old_dir, old, new_dir, new, flags)
    })
}

/// A symbolic link is none of the product's means: to see one is to have something to learn.
#[unsafe(no_mangle)]
extern "C" fn symlink(target: *const c_char, path: *const c_char) -> c_int {
    if named(libc::AT_FDCWD, path).is_some() {
        session::abort("symbolic links are not modelled: teach the shim and the replayer");
    }
    real!(symlink: fn(*const c_char, *const c_char) -> c_int; target, path)
}

fn rename_operation(
    old_dir: c_int,
    old: *const c_char,
    new_dir: c_int,
    new: *const c_char,
    flags: c_uint,
    real: impl FnOnce() -> c_int,
) -> c_int {
    let (Some((config, from)), Some((_, to))) = (named(old_dir, old), named(new_dir, new)) else {
        return real();
    };
    let kind = if flags & libc::RENAME_EXCHANGE != 0 { Kind::Exchange } else { Kind::Rename };
    let line = format!("rename {} to {}", shown(config, &from), shown(config, &to));
    // rename(2) of two names of one file does nothing, and says that it worked.
    let same = match (stat_path(&from), stat_path(&to)) {
        (Some(a), Some(b)) => (a.st_dev, a.st_ino) == (b.st_dev, b.st_ino),
        _ => false,
    };
    operation(config, &line, true, real, |_| {
        if same {
            return None;
        }
        let stat = stat_path(&to)?;
        let mut record = Record::new(kind, stat.st_dev, stat.st_ino);
        record.path = from.into_os_string().into_vec();
        record.path2 = to.into_os_string().into_vec();
        Some(record)
    })
}

#[unsafe(no_mangle)]
extern "C" fn rename(old: *const c_char, new: *const c_char) -> c_int {
    rename_operation(
        libc::AT_FDCWD,
        old,
        libc::AT_FDCWD,
        new,
        0,
        || real!(rename: fn(*const c_char, *const c_char) -> c_int; old, new),
    )
}

#[unsafe(no_mangle)]
extern "C" fn renameat(old_dir: c_int, old: *const c_char, new_dir: c_int, new: *const c_char) -> c_int {
    rename_operation(
        old_dir,
        old,
        new_dir,
        new,
        0,
        || real!(renameat: fn(c_int, *const c_char, c_int, *const c_char) -> c_int; old_dir, old, new_dir, new),
    )
}

#[unsafe(no_mangle)]
extern "C" fn renameat2(
    old_dir: c_int,
    old: *const c_char,
    new_dir: c_int,
    new: *const c_char,
    flags: c_uint,
) -> c_int {
    rename_operation(old_dir, old, new_dir, new, flags, || {
        real!(renameat2: fn(c_int, *const c_char, c_int, *const c_char, c_uint) -> c_int;
            old_dir, old, new_dir, new, flags)
    })
}

/// Some callers reach newer system calls by number.
#[unsafe(no_mangle)]
extern "C" fn syscall(
    number: c_long,
    a: c_long,
    b: c_long,
    c: c_long,
    d: c_long,
    e: c_long,
    f: c_long,
) -> c_long {
    match number {
        libc::SYS_copy_file_range => copy_file_range(
            a as c_int,
            b as *mut off_t,
            c as c_int,
            d as *mut off_t,
            e as size_t,
            f as c_uint,
        ) as c_long,
        libc::SYS_renameat2 => {
            renameat2(a as c_int, b as *const c_char, c as c_int, d as *const c_char, e as c_uint) as c_long
        }
        _ => real!(syscall: fn(c_long, c_long, c_long, c_long, c_long, c_long, c_long) -> c_long;
            number, a, b, c, d, e, f),
    }
}
