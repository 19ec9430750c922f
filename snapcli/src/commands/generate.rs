//! Output about the program itself: backends, schema, completions, man pages.

use camino::Utf8Path;
use clap::CommandFactory;
use clap_complete::Shell;
use snapcore::backend::Capabilities;
use snapcore::{Error, ErrorKind, PointKind};

use crate::answer::{self, Answer};
use crate::args::Cli;
use crate::documents::{self, BackendDoc, BackendProblem, BackendsDoc};
use crate::failure::Failure;
use crate::session::Session;
use crate::table::table;

/// `domsnap schema`
pub fn schema() -> Answer {
    Answer::text(answer::json(&documents::schema()))
}

/// `domsnap completions SHELL`
pub fn completions(shell: Shell) -> Answer {
    let mut script = Vec::new();
    clap_complete::generate(shell, &mut Cli::command(), "domsnap", &mut script);
    Answer::text(String::from_utf8_lossy(&script))
}

/// `domsnap man DIR`
pub fn man(dir: &Utf8Path) -> Result<Answer, Failure> {
    let failed = |cause: std::io::Error| {
        Failure::from(
            Error::new(ErrorKind::Io, format!("the man pages cannot be written to {dir}")).because(cause),
        )
    };
    std::fs::create_dir_all(dir).map_err(failed)?;
    clap_mangen::generate_to(Cli::command(), dir).map_err(failed)?;
    Ok(Answer::text(format!("wrote the man pages to {dir}; try: man -l {}", dir.join("domsnap.1"))))
}

/// `domsnap backends`. Plug-ins are started and asked.
pub fn backends(session: &Session) -> Answer {
    let (mut backends, mut problems) = (Vec::new(), Vec::new());
    for (program, error) in &session.backends.problems {
        problems.push(BackendProblem { program: program.clone(), message: error.to_string() });
    }
    for backend in session.service.registry().iter() {
        let format = backend.format().to_owned();
        let (capabilities, plugin) = match session.backends.plugin(&format) {
            None => (Ok(backend.capabilities()), None),
            Some(plugin) => (plugin.greet(), Some(plugin.program().to_owned())),
        };
        match (capabilities, plugin) {
            (Ok(capabilities), plugin) => backends.push(BackendDoc { format, capabilities, plugin }),
            (Err(error), plugin) => problems
                .push(BackendProblem { program: plugin.unwrap_or_default(), message: error.to_string() }),
        }
    }
    let hypervisors = session.service.registry().hypervisors().map(|known| known.profile()).collect();
    session.reported(BackendsDoc { backends, problems, hypervisors }, backends_text)
}

fn backends_text(document: &BackendsDoc) -> String {
    let plugins = document.backends.iter().any(|backend| backend.plugin.is_some());
    let rows = document.backends.iter().map(|backend| {
        let can = &backend.capabilities;
        let mut row = vec![
            backend.format.clone(),
            kinds(can),
            match can.preferred {
                PointKind::Internal => "internal".to_owned(),
                PointKind::External => "external".to_owned(),
            },
            yes_or_no(can.live),
            yes_or_no(can.delete_in_chain),
            can.max_depth.to_string(),
        ];
        if plugins {
            row.push(backend.plugin.as_ref().map_or_else(|| "-".to_owned(), ToString::to_string));
        }
        row
    });
    let mut heads = vec!["FORMAT", "SNAPSHOTS", "DEFAULT", "LIVE", "DELETE IN CHAIN", ">LONGEST CHAIN"];
    if plugins {
        heads.push("PLUG-IN");
    }
    let mut text = table(&heads, rows);
    for problem in &document.problems {
        text.push_str(&format!("not used: {}: {}\n", problem.program, problem.message));
    }
    text.push('\n');
    let rows = document.hypervisors.iter().map(|hypervisor| {
        vec![
            hypervisor.title.clone(),
            format!("{}:{}", hypervisor.name, hypervisor.address),
            if hypervisor.saves_while_running { "while running" } else { "while paused" }.to_owned(),
            if hypervisor.recreates { "by a new domain" } else { "in place" }.to_owned(),
            yes_or_no(hypervisor.agent),
        ]
    });
    text.push_str(&table(&["HYPERVISOR", "DOMAINS AT", "MEMORY IS SAVED", "REVERTS", "QUIESCES"], rows));
    text
}

fn kinds(can: &Capabilities) -> String {
    let kinds = [(can.internal, "internal"), (can.external, "external")];
    let methods = kinds
        .iter()
        .filter(|(can, _)| *can)
        .map(|(_, kind)| *kind)
        .chain(can.methods.iter().map(String::as_str));
    match methods.collect::<Vec<_>>() {
        methods if methods.is_empty() => "none".to_owned(),
        methods => methods.join(", "),
    }
}

fn yes_or_no(yes: bool) -> String {
    if yes { "yes" } else { "no" }.to_owned()
}
