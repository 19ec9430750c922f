//! `domsnap`.

#![forbid(unsafe_code)]

fn main() -> std::process::ExitCode {
    snapcli::run(|_| Ok(()))
}
