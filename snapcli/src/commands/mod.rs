//! The commands: each calls the service and formats its answer as text or JSON.

mod change;
mod clone;
mod diff;
mod disk;
mod domain;
mod du;
mod export;
mod generate;
mod group;
mod health;
mod held;
mod list;
mod policy;
mod power;
mod recorded;
mod restore;
mod scan;
mod serve;
mod show;
mod vhd;
mod xl;

use crate::answer::Answer;
use crate::args::{Cli, Command};
use crate::backends::Register;
use crate::failure::Failure;
use crate::session::Session;

/// Does what the command line says; `register` adds to the backends and hypervisors.
pub fn run(cli: Cli, register: Register<'_>) -> Result<Answer, Failure> {
    let global = cli.global;
    let open = |global| Session::open(global, register);
    match cli.command {
        // These need no service.
        Command::Schema => Ok(generate::schema()),
        Command::Completions { shell } => Ok(generate::completions(shell)),
        Command::Man { dir } => generate::man(&dir),
        Command::Disk(disk) => disk::run(global, disk, register),
        Command::Create(create) => change::create(&open(global)?, create),
        Command::Revert(revert) => change::revert(&open(global)?, revert),
        Command::Delete(delete) => change::delete(&open(global)?, delete),
        Command::Clone(clone) => clone::run(&open(global)?, clone),
        Command::Diff(diff) => diff::run(&open(global)?, diff),
        Command::Export(export) => export::run(&open(global)?, export).map_err(Failure::of_plan),
        Command::Serve(serve) => serve::snapshot::run(&open(global)?, serve),
        Command::Mount(mount) => serve::mount::run(&open(global)?, mount),
        Command::Undo(undo) => held::undo(&open(global)?, undo),
        Command::Hold(hold) => held::hold(&open(global)?, hold),
        Command::Release(release) => held::release(&open(global)?, release),
        Command::Rename(rename) => held::rename(&open(global)?, rename),
        Command::Describe(describe) => held::describe(&open(global)?, describe),
        Command::Expire(expire) => held::expire(&open(global)?, expire),
        Command::History(history) => held::history(&open(global)?, &history),
        Command::Policy(policy) => policy::run(&open(global)?, policy),
        Command::List(list) => list::run(&open(global)?, &list),
        Command::Show(show) => show::run(&open(global)?, &show),
        Command::Du(du) => du::run(&open(global)?, &du),
        Command::Domain(domain) => domain::run(&open(global)?, domain),
        Command::Import(import) => domain::import(&open(global)?, import),
        Command::Xl(xl) => xl::run(&open(global)?, xl),
        Command::Check(check) => health::check(&open(global)?, check),
        Command::Recover(recover) => health::recover(&open(global)?, &recover),
        Command::Backends => Ok(generate::backends(&open(global)?)),
    }
}
