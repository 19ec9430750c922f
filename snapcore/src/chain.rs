//! Chain planning.
