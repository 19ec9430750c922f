//! Runs a line of shell in the machine with Xen: `dom0 'xl list'`. `dom0 --put FILE` makes a program there
//! first, as `/host/bin/NAME`; `dom0 --stop` powers the machine off.

use std::{env, path::Path, process::ExitCode, time::Duration};

use xenguest::Machine;

fn main() -> anyhow::Result<ExitCode> {
    let mut args: Vec<String> = env::args().skip(1).collect();
    let machine = Machine::get()?;
    while args.first().is_some_and(|word| word == "--put") && args.len() > 1 {
        let file = args.drain(..2).nth(1).unwrap_or_default();
        let file = Path::new(&file);
        let name = file.file_name().and_then(|name| name.to_str()).unwrap_or("program");
        machine.put_program(file, name)?;
    }
    if args.first().is_some_and(|word| word == "--stop") {
        machine.stop()?;
        return Ok(ExitCode::SUCCESS);
    }
    let ended = machine.shell(&args.join(" "), Duration::from_secs(600))?;
    print!("{}", ended.output);
    Ok(ExitCode::from(u8::try_from(ended.status).unwrap_or(255)))
}
