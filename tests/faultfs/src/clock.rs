//! The program's clock: with `FAULTFS_CLOCK` it begins at that time, and goes on from there.

use std::sync::OnceLock;

use libc::{c_int, clockid_t, time_t, timespec};

use crate::real::real;

/// Seconds to add to what the system's clock shows; `None` where nothing was asked for.
fn offset(now: time_t) -> Option<time_t> {
    static OFFSET: OnceLock<Option<time_t>> = OnceLock::new();
    *OFFSET.get_or_init(|| {
        let wanted: time_t = std::env::var("FAULTFS_CLOCK").ok()?.parse().ok()?;
        Some(wanted - now)
    })
}

/// Takes the place of libc's function.
///
/// # Safety
/// `time` is a pointer that libc's function takes.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn clock_gettime(clock: clockid_t, time: *mut timespec) -> c_int {
    let result = real!(clock_gettime: fn(clockid_t, *mut timespec) -> c_int; clock, time);
    if result == 0 && clock == libc::CLOCK_REALTIME && !time.is_null() {
        // SAFETY: libc has just filled it in.
        let time = unsafe { &mut *time };
        time.tv_sec += offset(time.tv_sec).unwrap_or(0);
    }
    result
}
