//! The formats that this program knows: its own backends, and the plug-ins of a directory. The one place that
//! names backends.

use std::sync::Arc;

use backend_lvm::Lvm;
use backend_plugin::Plugin;
use backend_qcow2::Qcow2;
use backend_vhd::{VhdBase, VhdFiles};
use camino::{Utf8Path, Utf8PathBuf};
use snapcore::{Error, ErrorKind, Registry, Result};

use crate::args::Global;

/// The default directory of plug-ins.
const DIRECTORY: &str = "/usr/libexec/domsnap";

/// The environment's word for it.
const VARIABLE: &str = "DOMSNAP_BACKEND_DIR";

/// Adds to the backends and hypervisors that this crate names.
pub type Register<'a> = &'a dyn Fn(&mut Registry) -> Result<()>;

/// The backends of this call.
pub struct Backends {
    /// All that can be used.
    pub registry: Registry,
    /// Those of them that are plug-ins.
    pub plugins: Vec<Plugin>,
    /// Programs that look like plug-ins and are not used, with the reason.
    pub problems: Vec<(Utf8PathBuf, Error)>,
}

impl Backends {
    /// Those that `global` says. No plug-in is started yet.
    ///
    /// # Errors
    /// If a directory of plug-ins was named and cannot be used.
    pub fn of(global: &Global, register: Register<'_>) -> Result<Self> {
        let mut registry = own(global)?;
        register(&mut registry)?;
        let mut all = Self { registry, plugins: Vec::new(), problems: Vec::new() };
        let (directory, said) = directory(global)?;
        let found = match backend_plugin::found(&directory) {
            Ok(found) => found,
            Err(error) if said => return Err(error),
            Err(error) => {
                all.problems.push((directory, error));
                return Ok(all);
            }
        };
        for plugin in found {
            if let Some(problem) = plugin.problem {
                all.problems.push((plugin.program, problem));
                continue;
            }
            let known = Plugin::new(plugin.name, plugin.program.clone());
            match all.registry.register(Arc::new(known.clone())) {
                Ok(()) => all.plugins.push(known),
                Err(error) => {
                    let error = error.state("the plug-in is not used").advise("give it another name");
                    all.problems.push((plugin.program, error));
                }
            }
        }
        Ok(all)
    }

    /// The plug-in that serves `format`.
    pub fn plugin(&self, format: &str) -> Option<&Plugin> {
        use snapcore::backend::DiskSnapshotter;
        self.plugins.iter().find(|plugin| plugin.format() == format)
    }
}

fn own(global: &Global) -> Result<Registry> {
    let (mut qcow2, mut vhd) = (Qcow2::new().on_base(Arc::new(VhdBase)), VhdFiles::new());
    if let Some(layers) = global.max_depth {
        qcow2 = qcow2.max_depth(layers);
        vhd = vhd.max_depth(layers);
    }
    if global.no_punch {
        qcow2 = qcow2.without_punching();
    }
    for directory in &global.allow_backing {
        qcow2 = qcow2.allow_backing(absolute(directory)?);
        vhd = vhd.allow_backing(absolute(directory)?);
    }
    let mut registry = Registry::new();
    registry.register(Arc::new(qcow2))?;
    registry.register(Arc::new(vhd))?;
    backend_raw::register(&mut registry)?;
    let mut lvm = Lvm::new();
    if let Some(percent) = global.lvm_area {
        lvm = lvm.area_percent(percent);
    }
    registry.register(Arc::new(lvm))?;
    hypervisor_qemu::register(&mut registry);
    hypervisor_xen::register(&mut registry);
    Ok(registry)
}

/// Returns the directory of plug-ins, and true if the user named it.
pub fn directory(global: &Global) -> Result<(Utf8PathBuf, bool)> {
    if let Some(said) = &global.backend_dir {
        return Ok((absolute(said)?, true));
    }
    match std::env::var_os(VARIABLE).filter(|said| !said.is_empty()) {
        None => Ok((DIRECTORY.into(), false)),
        Some(said) => {
            let said = Utf8PathBuf::try_from(std::path::PathBuf::from(said)).map_err(|cause| {
                Error::new(ErrorKind::Usage, format!("{VARIABLE} is not UTF-8")).because(cause)
            })?;
            Ok((absolute(&said)?, true))
        }
    }
}

/// A directory that was named, from the root on.
pub fn absolute(path: &Utf8Path) -> Result<Utf8PathBuf> {
    camino::absolute_utf8(path).map_err(|cause| {
        Error::new(ErrorKind::Usage, format!("the directory {path} cannot be made absolute")).because(cause)
    })
}
