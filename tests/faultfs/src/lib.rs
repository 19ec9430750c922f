//! A shim that the crash tests preload into the real `domsnap` with `LD_PRELOAD`.
//!
//! It stands between the program and libc's file operations, for files below one directory, and counts,
//! records, fails, or dies before, each of them. The product therefore has no crash hooks of its own: what is
//! tested is the binary that users run.
//!
//! | variable | meaning |
//! |---|---|
//! | `FAULTFS_ROOT` | the directory (canonical) whose files are watched; without it the shim does nothing |
//! | `FAULTFS_LEAVE` | a part of paths whose operations are done and not seen |
//! | `FAULTFS_PROGRAM` | the name of the only program that is meant; in others, which it starts, the shim does nothing |
//! | `FAULTFS_COUNT` | file that gets one line for each operation: its number, kind, path, offset and length |
//! | `FAULTFS_LOG` | file that gets one binary record (`record.rs`) for each operation that succeeded, with its data |
//! | `FAULTFS_KILL_AT` | number of the operation (from 1) just before which the process gets SIGKILL |
//! | `FAULTFS_KILL_MODE` | `torn`: if that operation is a write, its first half is written before the SIGKILL |
//! | `FAULTFS_STOP_AT` | number of the operation just before which the process gets SIGSTOP, holding what it holds |
//! | `FAULTFS_INTERRUPT_AT` | number of the operation just before which the process gets SIGINT, and time to hear it |
//! | `FAULTFS_FAIL_AT` | number of the operation that fails instead of being done |
//! | `FAULTFS_FAIL_MODE` | `on`: from that operation on, every one that needs space fails, as on a full disk |
//! | `FAULTFS_FAIL_KIND` | the kind of operations that all fail, as on a file system that does not have it: `link` |
//! | `FAULTFS_FAIL_PATH` | a part of the paths on which they fail; all where it is not given |
//! | `FAULTFS_FORGET_FLUSH` | a part of paths whose flushes are not recorded, as of a program that forgets to flush |
//! | `FAULTFS_CLOCK` | the time at which the program's clock begins, in seconds since 1970; it goes on from there |
//! | `FAULTFS_ERRNO` | with which error: `ENOSPC` (the default), `EIO`, `EDQUOT`, `EPERM` |
//!
//! `qmp.rs` has the same for the commands that the program sends to a QEMU.
//!
//! What counts as an operation: everything that changes what a file system holds, or asks it to make that
//! durable. Reads, locks, opens of what exists and mode changes do not. Operations are serialised by one
//! lock, so that the record's order is the order in which they were done, also between threads.
//!
//! Left out: SQLite's `-shm` file, which is shared memory with a name, rebuilt from the `-wal` file after a
//! crash.
//!
//! What the shim cannot see: system calls that do not go through libc (hence rustix's `use-libc` feature in
//! the workspace), stores to shared mappings, and io_uring. A test compares its count with strace's to
//! notice.

mod clock;
mod hooks;
mod qmp;
mod real;
#[allow(dead_code)] // the reading half is for the tests, which include this file
#[path = "../../../snapcore-testkit/src/record.rs"]
mod record;
mod session;
