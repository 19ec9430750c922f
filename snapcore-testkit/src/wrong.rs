//! Backends that break one promise each, to show that a test case finds it.

use std::sync::Arc;

use snapcore::backend::AnyDiskSnapshotter;

use crate::fault::{FaultInjector, FaultyBackend};

/// `inner`, of which `cost_of_delete` always reports that a delete frees and moves nothing.
pub fn free_deletes(inner: Arc<AnyDiskSnapshotter>) -> Arc<AnyDiskSnapshotter> {
    let faults = Arc::new(FaultInjector::default());
    faults.report_free_deletes();
    Arc::new(FaultyBackend { inner, faults })
}
