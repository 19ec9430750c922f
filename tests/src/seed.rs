//! Random choices that can be repeated, and the seed they start from.

pub use snapcore_testkit::seed::Seed;

/// The number in the environment variable `name`, or `default`: seeds and numbers of cases are fixed unless
/// asked.
///
/// # Panics
/// If the variable holds something else than a number.
pub fn from_env(name: &str, default: u64) -> u64 {
    match std::env::var(name) {
        Ok(text) => text.parse().unwrap_or_else(|_| panic!("{name} is {text:?}, which is not a number")),
        Err(_) => default,
    }
}

/// Whether the tests of running domains try everything (`DOMSNAP_LIVE_EVERY=1`), and not a sample.
///
/// # Panics
/// As [`from_env`].
pub fn tries_all_live() -> bool {
    from_env("DOMSNAP_LIVE_EVERY", 0) == 1
}
