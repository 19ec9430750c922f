//! The picture in `docs/architecture.md` is that of the crates as they are.

use std::collections::{BTreeMap, BTreeSet};
use std::process::Command;

use anyhow::{Context, Result, ensure};
use serde_json::Value;

type Graph = BTreeMap<String, BTreeSet<String>>;

/// Arrows of the mermaid picture: `a & b --> c & d`.
fn drawn(document: &str) -> Result<Graph> {
    let picture = document.split("```mermaid").nth(1).and_then(|rest| rest.split("```").next());
    let mut graph = Graph::new();
    for line in picture.context("the document has no picture")?.lines() {
        let Some((from, to)) = line.split_once("-->") else { continue };
        let names = |side: &str| side.split('&').map(|name| name.trim().to_owned()).collect::<Vec<_>>();
        for from in names(from) {
            graph.entry(from).or_default().extend(names(to));
        }
    }
    Ok(graph)
}

/// Dependencies between the crates of the workspace, without those for tests.
fn built() -> Result<Graph> {
    let cargo = std::env::var("CARGO").unwrap_or_else(|_| "cargo".to_owned());
    let asked = Command::new(cargo)
        .args(["metadata", "--format-version=1", "--no-deps", "--offline"])
        .current_dir(env!("CARGO_MANIFEST_DIR"))
        .output()?;
    ensure!(asked.status.success(), "cargo metadata: {}", String::from_utf8_lossy(&asked.stderr));
    let metadata: Value = serde_json::from_slice(&asked.stdout)?;
    let packages = metadata["packages"].as_array().context("cargo names no packages")?;
    let name = |value: &Value| value["name"].as_str().unwrap_or_default().to_owned();
    let members: BTreeSet<String> = packages.iter().map(name).collect();
    let mut graph = Graph::new();
    for package in packages {
        let needed = package["dependencies"].as_array().into_iter().flatten();
        let needed = needed.filter(|needed| needed["kind"].is_null()).map(name);
        graph.insert(name(package), needed.filter(|needed| members.contains(needed)).collect());
    }
    Ok(graph)
}

/// Everything that `from` reaches in one step or more.
fn reached(graph: &Graph, from: &str) -> BTreeSet<String> {
    let mut found = BTreeSet::new();
    let mut open = vec![from.to_owned()];
    while let Some(name) = open.pop() {
        for next in graph.get(&name).into_iter().flatten() {
            if found.insert(next.clone()) {
                open.push(next.clone());
            }
        }
    }
    found
}

/// The picture's arrows and those that follow from them are the dependencies of the crates that it shows.
#[test]
fn picture_matches_the_crates() -> Result<()> {
    let document = concat!(env!("CARGO_MANIFEST_DIR"), "/../docs/architecture.md");
    let (drawn, built) = (drawn(&std::fs::read_to_string(document)?)?, built()?);
    let shown: BTreeSet<&String> =
        drawn.iter().flat_map(|(from, to)| std::iter::once(from).chain(to)).collect();
    ensure!(shown.len() > 5, "the picture shows {shown:?} alone");
    for name in shown {
        ensure!(built.contains_key(name), "the picture shows {name}, which is no crate");
        let (picture, crates) = (reached(&drawn, name), reached(&built, name));
        ensure!(picture == crates, "{name}: the picture leads to {picture:?}, the crates to {crates:?}");
    }
    // An arrow that follows from others hides the shape.
    for (from, to) in &drawn {
        for direct in to {
            let detour = to.iter().any(|other| other != direct && reached(&drawn, other).contains(direct));
            ensure!(!detour, "the arrow from {from} to {direct} follows from others");
        }
    }
    Ok(())
}
