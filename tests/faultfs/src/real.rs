//! The functions of libc that the shim stands in front of.

use std::ffi::{CStr, c_void};
use std::sync::atomic::{AtomicPtr, Ordering};

/// One function of the next library in the search order, looked up at its first use.
pub struct Real {
    name: &'static CStr,
    found: AtomicPtr<c_void>,
}

impl Real {
    /// The function called `name`.
    pub const fn new(name: &'static CStr) -> Real {
        Real { name, found: AtomicPtr::new(std::ptr::null_mut()) }
    }

    /// Its address. Ends the process if there is none: to go on would let an operation escape unseen.
    pub fn address(&self) -> *mut c_void {
        let known = self.found.load(Ordering::Acquire);
        if !known.is_null() {
            return known;
        }
        // SAFETY: the name is a C string; RTLD_NEXT needs nothing else.
        let found = unsafe { libc::dlsym(libc::RTLD_NEXT, self.name.as_ptr()) };
        if found.is_null() {
            crate::session::abort(&format!("libc has no {:?}", self.name));
        }
        self.found.store(found, Ordering::Release);
        found
    }
}

/// Calls the real function `$name` with its C signature.
macro_rules! real {
    ($name:ident : fn($($ty:ty),*) -> $ret:ty ; $($arg:expr),*) => {{
        const NAME: &std::ffi::CStr =
            match std::ffi::CStr::from_bytes_with_nul(concat!(stringify!($name), "\0").as_bytes()) {
                Ok(name) => name,
                Err(_) => panic!(),
            };
        static REAL: $crate::real::Real = $crate::real::Real::new(NAME);
        // SAFETY: the address is that of libc's function of this name, whose C signature this is.
        let function: unsafe extern "C" fn($($ty),*) -> $ret =
            unsafe { std::mem::transmute($crate::real::Real::address(&REAL)) };
        // SAFETY: the arguments are the caller's own, passed on unchanged or narrowed to a prefix.
        unsafe { function($($arg),*) }
    }};
}
pub(crate) use real;
