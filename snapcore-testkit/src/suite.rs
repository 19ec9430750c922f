//! Selects the test cases that a backend's capabilities call for.

use std::process::ExitCode;
use std::sync::Arc;

use anyhow::{Context, Result};
use libtest_mimic::{Arguments, Trial};
use snapcore::PointKind;
use snapcore::backend::Capabilities;

use crate::cases::{DomainKind, TestCase, all};
use crate::child;
use crate::fixture::Method;
use crate::test_backend::TestBackend;

/// Runs the suite on the backend that `subject` makes: the `main` of a test program.
pub fn run(subject: impl TestBackend) -> ExitCode {
    let subject: Arc<dyn TestBackend> = Arc::new(subject);
    if let Some(code) = child::run(&*subject) {
        return code;
    }
    let arguments = Arguments::from_args();
    let cases = match cases(&subject) {
        Ok(cases) => cases,
        Err(error) => {
            eprintln!("the backend cannot be tested: {error:#}");
            return ExitCode::FAILURE;
        }
    };
    if cases.is_empty() {
        eprintln!("no test case: the backend declares no capability");
        return ExitCode::FAILURE;
    }
    let conclusion = libtest_mimic::run(&arguments, cases);
    let filtered = arguments.filter.is_some() || !arguments.skip.is_empty() || arguments.list;
    if !filtered && conclusion.num_passed == 0 && conclusion.num_failed == 0 {
        eprintln!("no test case was run");
        return ExitCode::FAILURE;
    }
    conclusion.exit_code()
}

/// The methods of taking points that the backend declares, and the test_backend's disks can have.
fn methods(can: &Capabilities, subject: &dyn TestBackend) -> Vec<Method> {
    let kinds = [(can.internal, PointKind::Internal), (can.external, PointKind::External)];
    let kinds = kinds.into_iter().filter(|(able, _)| *able).map(|(_, kind)| Method::Kind(kind));
    let declared = kinds.chain(can.methods.iter().cloned().map(Method::Named));
    declared.filter(|method| subject.offers(&method.to_string())).collect()
}

fn cases(subject: &Arc<dyn TestBackend>) -> Result<Vec<Trial>> {
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build()?;
    let entered = runtime.enter();
    let can = subject.backend().capabilities();
    drop(entered);
    drop(runtime);
    let mut cases = Vec::new();
    for method in methods(&can, &**subject) {
        for TestCase { name, promise, domain, needs, run } in all() {
            let reason = match (needs(&can, &**subject), domain.is_of(&**subject, &method)) {
                (false, _) => Some("the capabilities exclude it"),
                (true, false) if domain == DomainKind::Running => Some("a hypervisor takes the points"),
                (true, false) => Some("the backend takes the points"),
                (true, true) => None,
            };
            if let Some(reason) = reason {
                eprintln!("not run ({method}), {reason}: {name}: {promise}");
                continue;
            }
            let (subject, method) = (subject.clone(), method.clone());
            cases.push(Trial::test(format!("{method}::{name}"), move || {
                run(&*subject, &method).with_context(|| promise).map_err(|error| format!("{error:?}").into())
            }));
        }
    }
    Ok(cases)
}
