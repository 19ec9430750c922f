//! Domain planning.
