//! Runs a file of shell commands in the machine with lvm2, with the programs that are named put into it:
//! `cargo run -p lvmguest --example machine -- FILE [PROGRAM...]`.

use std::process::ExitCode;

use anyhow::{Context, Result};

fn main() -> Result<ExitCode> {
    let file = std::env::args().nth(1).context("the file of commands is to be named")?;
    let commands = std::fs::read_to_string(&file).with_context(|| file.clone())?;
    let mut machine = lvmguest::Machine::new().udev(std::env::var_os("LVMGUEST_UDEV").is_some());
    for program in std::env::args().skip(2).map(std::path::PathBuf::from) {
        let name =
            program.file_name().and_then(|name| name.to_str()).context("a program has no name")?.to_owned();
        machine = machine.program(&name, &program);
    }
    let ended = machine.run(&commands)?;
    print!("{}", ended.output);
    Ok(ExitCode::from(u8::try_from(ended.status).unwrap_or(1)))
}
