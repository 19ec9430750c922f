//! Domain files: a domain and its disks, as a user writes them in TOML.

use camino::{Utf8Path, Utf8PathBuf};
use serde::Deserialize;
use snapcore::hypervisor::Control;
use snapcore::policy::PolicySpec;
use snapcore::service::DomainSpec;
use snapcore::{ActivePath, Disk, DiskAddress, DomainName, Error, ErrorKind, Hypervisor, Registry, Result};

/// Reads a domain file: `name`, `hypervisor` (`"none"`, `"qemu"`), `active-path` (`"keep"`, `"new"`), for a
/// hypervisor a `[control]` with the key of its address and what else applies to its domains, a `[[disk]]`
/// with `target`, `path` and `format` for each disk, and perhaps a `[policy]`. Relative paths are taken from
/// `directory`. With a `[control]` there may be no disk: then the running domain is to be asked for them
/// before it is registered.
///
/// # Errors
/// [`ErrorKind::Usage`], with the line and what was expected there.
pub fn read(text: &str, directory: &Utf8Path, registry: &Registry) -> Result<DomainSpec> {
    #[derive(Deserialize)]
    #[serde(rename_all = "kebab-case", deny_unknown_fields)]
    struct File {
        name: DomainName,
        #[serde(default)]
        hypervisor: Hypervisor,
        control: Option<toml::Table>,
        #[serde(default)]
        active_path: ActivePath,
        #[serde(default)]
        disk: Vec<Disk>,
        policy: Option<PolicySpec>,
    }
    #[derive(Deserialize)]
    #[serde(rename_all = "kebab-case", deny_unknown_fields)]
    struct Reach {
        agent: Option<Utf8PathBuf>,
        memory_dir: Option<DiskAddress>,
        #[serde(default)]
        start: Vec<String>,
        compress: Option<u8>,
        config: Option<Utf8PathBuf>,
    }
    let wrong = |cause: toml::de::Error| {
        Error::new(ErrorKind::Usage, "the domain file is not understood").because(fit_to_show(&cause)).advise(
            "it has name, hypervisor, active-path, for a hypervisor a [control], one [[disk]] with target, path \
             and format a disk, and perhaps a [policy]",
        )
    };
    let file: File = toml::from_str(text).map_err(wrong)?;
    let mut spec = DomainSpec::new(file.name).active_path(file.active_path);
    spec = match (file.hypervisor.is_none(), file.control) {
        (true, None) => spec,
        (true, Some(_)) => {
            return Err(Error::new(ErrorKind::Usage, "the domain file has a [control] and no hypervisor")
                .advise("state it: hypervisor = \"qemu\""));
        }
        (false, control) => {
            let saver = registry.hypervisor(&file.hypervisor)?;
            let (profile, mut said) = (saver.profile(), control.unwrap_or_default());
            let Some(toml::Value::String(address)) = said.remove(&profile.key) else {
                return Err(Error::new(
                    ErrorKind::Usage,
                    format!("the domain file does not say how hypervisor {} is reached", profile.name),
                )
                .advise(format!("add a [control] with {} = {:?}", profile.key, profile.address)));
            };
            let reach: Reach = said.try_into().map_err(|cause| {
                wrong(cause).advise(format!("its [control] may have {}", profile.keys().join(", ")))
            })?;
            if let Some(level) = reach.compress.filter(|level| *level > Control::MAX_COMPRESSION) {
                return Err(Error::new(
                    ErrorKind::Usage,
                    format!("the domain file has compress = {level}, which is no level of compression"),
                )
                .advise("levels are 1 (fast) to 19 (small); 0 does not compress"));
            }
            let control = Control::at(address)
                .agent(reach.agent)
                .memory_dir(reach.memory_dir)
                .start(reach.start)
                .compress(reach.compress)
                .config(reach.config);
            spec.run_by(file.hypervisor, saver.read_control(control, directory)?)
        }
    };
    for disk in file.disk {
        let address = match registry.of_scheme(&disk.address) {
            Some(_) => disk.address.clone(),
            None => directory.join(disk.address.as_str()).into(),
        };
        spec.disks.push(Disk::new(disk.target, address, disk.format));
    }
    if let Some(policy) = &file.policy {
        policy.check()?;
    }
    spec.policy = file.policy;
    Ok(spec)
}

/// The cause with the line that it is about, which may have control characters.
fn fit_to_show(cause: &toml::de::Error) -> String {
    let is_odd = |c: char| c.is_control() && c != '\n';
    cause.to_string().replace(is_odd, " ")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn usage(result: Result<DomainSpec>) -> Error {
        let error = result.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Usage, "{error}");
        error
    }

    fn read_in(text: &str, directory: &str) -> Result<DomainSpec> {
        let mut registry = Registry::new();
        hypervisor_qemu::register(&mut registry);
        hypervisor_xen::register(&mut registry);
        super::read(text, Utf8Path::new(directory), &registry)
    }

    fn read(text: &str) -> Result<DomainSpec> {
        read_in(text, "/srv/web")
    }

    /// Relative paths of `[control]` start at the file's directory.
    #[test]
    fn control_paths_start_at_the_file() {
        let spec = read(
            "name = 'web'\nhypervisor = 'qemu'\n[control]\nqmp = 'qmp'\nagent = '/run/agent'\nmemory-dir = 'memory'\ncompress = 3\n\
             start = ['qemu', '-m', '1G']\n[[disk]]\ntarget = 'vda'\npath = 'a.qcow2'\nformat = 'qcow2'\n",
        )
        .unwrap();
        let control = Control::at("/srv/web/qmp")
            .agent(Some("/run/agent".into()))
            .memory_dir(Some("/srv/web/memory".into()))
            .compress(Some(3))
            .start(["qemu", "-m", "1G"].map(str::to_owned).to_vec());
        assert_eq!((spec.hypervisor, spec.control), (hypervisor_qemu::NAME, Some(control)));
        assert_eq!(spec.disks[0].path(), "/srv/web/a.qcow2");
    }

    /// `hypervisor` and `[control]` are given together or not at all.
    #[test]
    fn hypervisor_and_control_come_together() {
        let error = usage(read("name = 'web'\n[control]\nqmp = 'qmp'\n"));
        assert!(error.to_string().contains("no hypervisor"), "{error}");
        let error = usage(read("name = 'web'\nhypervisor = 'qemu'\n"));
        assert!(error.to_string().contains("how hypervisor qemu is reached"), "{error}");
        usage(read("name = 'web'\nhypervisor = 'qemu'\n[control]\nagent = 'a'\n"));
        usage(read("name = 'web'\nhypervisor = 'qemu'\n[control]\nqmp = 'q'\nqpm = 'q'\n"));
        let error = usage(read("name = 'web'\nhypervisor = 'qemu'\n[control]\nqmp = 'q'\nxen = 'q'\n"));
        assert!(error.advice().unwrap().contains("qmp, agent"), "{error}");
        let spec =
            read("name = 'web'\nhypervisor = 'xen'\n[control]\nxen = 'web'\nconfig = 'web.cfg'\n").unwrap();
        assert_eq!(spec.control.unwrap().config.unwrap(), "/srv/web/web.cfg");
        assert_eq!(read("name = 'web'\n").unwrap().control, None);
    }

    #[test]
    fn domain_files_are_read_and_their_mistakes_named() {
        let text = "name = \"web\"\nhypervisor = \"none\"\nactive-path = \"new\"\n\
                    [[disk]]\ntarget = \"vda\"\npath = \"a.qcow2\"\nformat = \"qcow2\"\n";
        let spec = read_in(text, "/vm").unwrap();
        assert_eq!((spec.disks[0].address.as_str(), spec.active_path), ("/vm/a.qcow2", ActivePath::New));
        let error = read_in("name = \"web\"\ncolour = 1\n", "/vm").unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Usage);
        assert!(error.to_string().contains("colour"), "{error}");
    }

    /// A monitor over TCP must be on this host.
    #[test]
    fn tcp_monitor_is_local_only() {
        let file =
            "name = 'web'\nhypervisor = 'qemu'\n[control]\nqmp = 'tcp:localhost:1'\nagent = 'tcp:[::1]:2'\n";
        let control = read(file).unwrap().control.unwrap();
        assert_eq!(
            (control.address.as_str(), control.agent),
            ("tcp:127.0.0.1:1", Some("tcp:[::1]:2".into()))
        );
        usage(read("name = 'web'\nhypervisor = 'qemu'\n[control]\nqmp = 'tcp:192.0.2.1:1'\n"));
    }

    /// No word is reserved: a disk may be called `domain`.
    #[test]
    fn disk_may_be_called_domain() {
        let spec = read("name = 'web'\n[[disk]]\ntarget = 'domain'\npath = 'a'\nformat = 'qcow2'\n").unwrap();
        assert_eq!(spec.disks[0].target.as_str(), "domain");
    }
}
