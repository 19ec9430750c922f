//! Log output of the crates on standard error: warnings, or more if `DOMSNAP_LOG` says so.

use tracing_subscriber::{
    filter::{LevelFilter, Targets},
    fmt,
    layer::SubscriberExt,
    util::SubscriberInitExt,
};

/// A level (`off`, `warn`, `info`, `debug`, `trace`), or levels of crates: `warn,qmp=debug`.
const VARIABLE: &str = "DOMSNAP_LOG";

/// Starts the log. A value that cannot be parsed counts as unset.
pub(crate) fn begin() {
    let said = std::env::var(VARIABLE).ok().and_then(|said| said.parse::<Targets>().ok());
    // With more than warnings, when is half of what one wants to know.
    let lines = fmt::layer().with_writer(std::io::stderr).with_ansi(false);
    let registry = tracing_subscriber::registry();
    // Whoever embeds these commands may have a subscriber of its own.
    let _ = match said {
        Some(levels) => registry.with(lines.with_timer(fmt::time::uptime())).with(levels).try_init(),
        None => {
            let levels = Targets::new().with_default(LevelFilter::WARN);
            registry.with(lines.without_time().with_target(false)).with(levels).try_init()
        }
    };
}
