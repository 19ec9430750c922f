//! Which trials a backend's capabilities call for.

use std::process::ExitCode;
use std::sync::Arc;

use anyhow::{Context, Result};
use libtest_mimic::{Arguments, Trial};
use snapcore::{Capabilities, PointKind};

use crate::child;
use crate::house::Way;
use crate::trials::{Statement, all};
use crate::workshop::Workshop;

/// Runs the suite on the backend that `shop` makes: the `main` of a test program.
pub fn run(shop: impl Workshop) -> ExitCode {
    let shop: Arc<dyn Workshop> = Arc::new(shop);
    if let Some(code) = child::run(&*shop) {
        return code;
    }
    let arguments = Arguments::from_args();
    let trials = match trials(&shop) {
        Ok(trials) => trials,
        Err(error) => {
            eprintln!("the backend cannot be tried: {error:#}");
            return ExitCode::FAILURE;
        }
    };
    if trials.is_empty() {
        eprintln!("no trial: the backend declares nothing that it can do");
        return ExitCode::FAILURE;
    }
    let conclusion = libtest_mimic::run(&arguments, trials);
    let filtered = arguments.filter.is_some() || !arguments.skip.is_empty() || arguments.list;
    if !filtered && conclusion.num_passed == 0 && conclusion.num_failed == 0 {
        eprintln!("no trial was run");
        return ExitCode::FAILURE;
    }
    conclusion.exit_code()
}

/// The ways of taking points that the backend declares, and the workshop's disks can have.
fn ways(can: &Capabilities, shop: &dyn Workshop) -> Vec<Way> {
    let kinds = [(can.internal, PointKind::Internal), (can.external, PointKind::External)];
    let kinds = kinds.into_iter().filter(|(able, _)| *able).map(|(_, kind)| Way::Kind(kind));
    let declared = kinds.chain(can.ways.iter().cloned().map(Way::Named));
    declared.filter(|way| shop.offers(&way.to_string())).collect()
}

fn trials(shop: &Arc<dyn Workshop>) -> Result<Vec<Trial>> {
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build()?;
    let entered = runtime.enter();
    let can = shop.backend().capabilities();
    drop(entered);
    drop(runtime);
    let mut trials = Vec::new();
    for way in ways(&can, &**shop) {
        for Statement { words, needs, tried } in all() {
            if !needs(&can, &**shop) {
                eprintln!("not tried ({way}), for want of a capability: {words}");
                continue;
            }
            let (shop, way) = (shop.clone(), way.clone());
            trials.push(Trial::test(format!("{way}: {words}"), move || {
                tried(&*shop, &way).with_context(|| words).map_err(|error| format!("{error:?}").into())
            }));
        }
    }
    Ok(trials)
}
