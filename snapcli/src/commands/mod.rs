//! The commands: each asks the service, and puts its answer into words or a document.

mod change;
mod disk;
mod domain;
mod generate;
mod health;
mod list;
mod power;
mod scan;
mod show;

use crate::answer::Answer;
use crate::args::{Cli, Command};
use crate::failure::Failure;
use crate::session::Session;

/// Does what the command line says.
pub fn run(cli: Cli) -> Result<Answer, Failure> {
    let global = cli.global;
    match cli.command {
        // These need no service.
        Command::Schema => Ok(generate::schema()),
        Command::Completions { shell } => Ok(generate::completions(shell)),
        Command::Man { dir } => generate::man(&dir),
        Command::Disk(disk) => disk::run(global, disk),
        Command::Create(create) => change::create(&Session::open(global)?, create),
        Command::Revert(revert) => change::revert(&Session::open(global)?, revert),
        Command::Delete(delete) => change::delete(&Session::open(global)?, delete),
        Command::List(list) => list::run(&Session::open(global)?, &list),
        Command::Show(show) => show::run(&Session::open(global)?, &show),
        Command::Domain(domain) => domain::run(&Session::open(global)?, domain),
        Command::Import(import) => domain::import(&Session::open(global)?, import),
        Command::Check(check) => health::check(&Session::open(global)?, check.domain),
        Command::Recover(recover) => {
            health::recover(&Session::open(global)?, recover.domain.as_ref(), recover.abandon)
        }
        Command::Backends => Ok(generate::backends(&Session::open(global)?)),
    }
}
