//! What a case has in dom0: guests of Xen, and programs.

mod console;
mod domu;
mod program;

pub use domu::{Backend, DomU};
pub use program::{Said, program, xl};
