//! A memory image that was taken apart: QEMUs that start from it are the machine that was saved, share its
//! RAM, and never change it.

mod kit;

use std::{
    ffi::OsString,
    fs,
    io::Read,
    os::unix::net::UnixStream,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    time::{Duration, Instant},
};

use anyhow::{Context, Result, ensure};
use hypervisor_qemu::{
    Machine, clone,
    instant::SaveMode,
    memory::{Image, restore_deferred, restore_split},
    stream::{Mapping, Split},
};
use serde_json::{Value, json};
use testguest::{Guest, GuestOptions, Version};

const LOADING: Duration = Duration::from_secs(240);
const BLOCK: &str = "pc.ram";
const PAGE: usize = 4096;

/// A QEMU with sockets and disks of its own. Dropping it kills it.
struct Clone {
    dir: PathBuf,
    process: Child,
    machine: Machine,
    /// From its start until it was loaded, and from its monitor until it was loaded.
    took: (Duration, Duration),
}

impl Drop for Clone {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

/// What a clone starts from.
enum From<'a> {
    Stream(&'a Image),
    Split(&'a Split, Mapping),
}

impl Clone {
    /// Starts a clone of a guest, which is paused when this returns.
    async fn start(guest: &Guest, name: &str, frozen: &[PathBuf], from: From<'_>) -> Result<Self> {
        let dir = guest.dir().join(name);
        fs::create_dir(&dir)?;
        let before = guest.dir().display().to_string();
        let mut args: Vec<String> = Vec::new();
        for word in guest.command_line() {
            let word = word.to_string_lossy();
            args.push(word.replace(&format!("{before}/"), &format!("{}/", dir.display())));
        }
        for frozen in frozen {
            let file = dir.join(frozen.file_name().context("a disk has a name")?);
            kit::make_overlay(&file, frozen, 64)?;
        }
        args.extend(["-S", "-incoming", "defer"].map(str::to_owned));
        if let From::Split(split, mapping) = &from {
            args.extend(split.arguments(*mapping)?);
        }
        let args: Vec<OsString> = args.into_iter().map(OsString::from).collect();
        let said = fs::File::create(dir.join("stderr"))?;
        let begun = Instant::now();
        let mut command = Command::new(&args[0]);
        command.args(&args[1..]).stdin(Stdio::null()).stdout(said.try_clone()?).stderr(said);
        let process = command.spawn()?;
        let machine = kit::machine_at(&dir.join("qmp")).await;
        let answered = Instant::now();
        let said = || fs::read_to_string(dir.join("stderr")).unwrap_or_default();
        let machine = machine.with_context(said)?;
        let loaded = match from {
            From::Stream(image) => restore_deferred(&machine, image, LOADING).await,
            From::Split(split, _) => restore_split(&machine, split, LOADING).await,
        };
        ensure!(!loaded.with_context(said)?.running, "a clone runs before it may");
        Ok(Self { dir, process, machine, took: (begun.elapsed(), answered.elapsed()) })
    }

    async fn ask(&self, command: &str, arguments: Value) -> Result<Value> {
        Ok(self.machine.qmp().execute_raw(command, arguments).await?)
    }

    /// The bytes of its RAM.
    async fn ram(&self, length: u64) -> Result<Vec<u8>> {
        let file = self.dir.join("ram");
        self.ask("pmemsave", json!({ "val": 0, "size": length, "filename": file })).await?;
        let bytes = fs::read(&file)?;
        fs::remove_file(&file)?;
        Ok(bytes)
    }

    async fn registers(&self) -> Result<Value> {
        self.ask("human-monitor-command", json!({ "command-line": "info registers -a" })).await
    }

    /// Runs it until it has ticked 12 times, and never found its memory and disks to differ.
    async fn ticks(&self) -> Result<()> {
        ticks(&self.dir, &self.machine).await
    }

    /// Bytes that it does not share with others, and its part of those that it does (Pss), in MiB.
    fn share(&self) -> Result<u64> {
        let text = fs::read_to_string(format!("/proc/{}/smaps_rollup", self.process.id()))?;
        let line = text.lines().find_map(|line| line.strip_prefix("Pss:")).context("it has a Pss")?;
        Ok(line.trim().trim_end_matches(" kB").parse::<u64>()? >> 10)
    }
}

async fn ticks(dir: &Path, machine: &Machine) -> Result<()> {
    let mut port = UnixStream::connect(dir.join("witness"))?;
    port.set_read_timeout(Some(Duration::from_secs(240)))?;
    machine.cont().await?;
    let (mut heard, mut piece) = (String::new(), [0; 4096]);
    while heard.lines().filter(|line| line.starts_with("T ")).count() < 12 {
        let read = port.read(&mut piece)?;
        ensure!(read > 0, "the clone has ended: {heard}");
        heard.push_str(&String::from_utf8_lossy(&piece[..read]));
    }
    ensure!(!heard.contains("BAD") && !heard.contains("ERR"), "{heard}");
    kit::sound(machine).await
}

/// Fills memory with bytes that are not zero, and gives it free: so a balloon takes pages that have content.
fn used_memory(guest: &Guest) -> Result<()> {
    let done = guest.shell("head -c 60000000 /dev/urandom > /tmp/used && rm /tmp/used")?;
    ensure!(done.status == 0, "the guest has no room");
    Ok(())
}

/// A snapshot of a guest that writes, taken apart; the guest is killed.
async fn taken_apart(guest: &mut Guest) -> Result<(Image, Split)> {
    let machine = kit::machine(guest).await?;
    let live = SaveMode::Live { budget: kit::BUDGET };
    let (_, image, _) = kit::snapshot(&machine, guest, "s", &guest.disks(), live, true).await?;
    drop(machine);
    guest.kill()?;
    let begun = Instant::now();
    let (ram, devices) = (guest.dir().join("gold.ram"), guest.dir().join("gold.devices"));
    let split = Split::make(&image, BLOCK, &ram, &devices)?;
    println!(
        "taken apart in {:?}: {} MiB of stream to {} MiB of RAM in {} MiB on disk and {} KiB of devices",
        begun.elapsed(),
        image.stream_length() >> 20,
        split.length() >> 20,
        allocated(&ram)? >> 20,
        split.stream_length() >> 10
    );
    split.verify()?;
    Ok((image, split))
}

/// Only root opens a file for writing that has the mode 0400.
fn may_be_opened(split: &Split, mapping: Mapping) -> Result<()> {
    if mapping == Mapping::Private {
        fs::set_permissions(split.ram(), std::os::unix::fs::PermissionsExt::from_mode(0o600))?;
    }
    Ok(())
}

fn allocated(file: &Path) -> Result<u64> {
    use std::os::unix::fs::MetadataExt;
    Ok(512 * fs::metadata(file)?.blocks())
}

/// A clone that was started from the parts has the memory and registers of one that was started from the
/// whole, byte by byte.
#[tokio::test(flavor = "multi_thread")]
async fn split_is_the_same_machine() -> Result<()> {
    for version in kit::versions() {
        let mut guest = kit::loaded(GuestOptions::new().version(version))?;
        let frozen = guest.disks();
        let (image, split) = taken_apart(&mut guest).await?;
        let whole = Clone::start(&guest, "whole", &frozen, From::Stream(&image)).await?;
        let mapping = Mapping::of(whole.machine.abilities().await?);
        ensure!((mapping == Mapping::ReadOnly) == (version == Version::New), "{version:?}: {mapping:?}");
        may_be_opened(&split, mapping)?;
        let parts = Clone::start(&guest, "parts", &frozen, From::Split(&split, mapping)).await?;
        let (one, other) = (whole.ram(split.length()).await?, parts.ram(split.length()).await?);
        let differ = one.chunks(PAGE).zip(other.chunks(PAGE)).filter(|(one, other)| one != other).count();
        ensure!(one.len() == other.len() && differ == 0, "{version:?}: {differ} pages differ");
        ensure!(whole.registers().await? == parts.registers().await?, "{version:?}: registers differ");
        println!(
            "{version:?}: {} pages are equal; loaded after {:?} from the stream, {:?} from the parts (start, load)",
            one.len() / PAGE,
            whole.took,
            parts.took
        );
        parts.ticks().await?;
        whole.ticks().await?;
        split.verify()?;
    }
    Ok(())
}

/// Three clones tick at once, balloons too, and neither content nor holes of the RAM change.
#[tokio::test(flavor = "multi_thread")]
async fn clones_never_change_the_ram() -> Result<()> {
    for version in kit::versions() {
        let balloon = version == Version::New;
        let mut options = GuestOptions::new().version(version);
        if balloon {
            options = options.generic_kernel().more(&["-device", "virtio-balloon-pci,id=balloon"]);
        }
        let mut guest = kit::loaded(options)?;
        if balloon {
            used_memory(&guest)?;
        }
        let frozen = guest.disks();
        let (_, split) = taken_apart(&mut guest).await?;
        let before = (fs::read(split.ram())?, allocated(split.ram())?);
        let mapping = if balloon { Mapping::ReadOnly } else { Mapping::Private };
        may_be_opened(&split, mapping)?;
        let mut clones = Vec::new();
        for number in 0..3 {
            let name = format!("clone{number}");
            clones.push(Clone::start(&guest, &name, &frozen, From::Split(&split, mapping)).await?);
        }
        let shares: Vec<u64> = clones.iter().map(Clone::share).collect::<Result<_>>()?;
        let took: Vec<_> = clones.iter().map(|clone| clone.took).collect();
        println!("{version:?}: each loaded after (start, load) {took:?}, Pss {shares:?} MiB");
        for clone in &clones {
            clone.ticks().await?;
            if balloon {
                let size = split.length() - (48 << 20);
                clone.ask("balloon", json!({ "value": size })).await?;
                kit::until(async || {
                    let now = clone.ask("query-balloon", Value::Null).await?;
                    Ok(now["actual"].as_u64().is_some_and(|now| now <= size))
                })
                .await
                .context("the guest does not give memory back")?;
            }
        }
        for clone in &clones {
            clone.machine.pause().await.map(drop)?;
            clone.ticks().await?;
        }
        ensure!(fs::read(split.ram())? == before.0, "{version:?}: the RAM is another");
        ensure!(allocated(split.ram())? == before.1, "{version:?}: the RAM has other holes");
        split.verify()?;

        // Its names may go; the clones go on.
        Split::remove(split.ram(), split.devices())?;
        for clone in &clones {
            clone.machine.pause().await.map(drop)?;
            clone.ticks().await?;
        }
    }
    Ok(())
}

/// A clone by the library's own command has its own name, UUID, generation ID, sockets and disks; it starts
/// paused, and without a link. A command without one of its paths is refused, and nothing is started.
#[tokio::test(flavor = "multi_thread")]
async fn clone_has_its_own_identity() -> Result<()> {
    let id = "324e6eaf-d1d1-4bf6-bf41-b9bb6c91fb87";
    for version in kit::versions() {
        let network = ["-netdev", "user,id=n0,restrict=on", "-device", "virtio-net-pci,netdev=n0,romfile="];
        let device = format!("vmgenid,guid={id}");
        let options = GuestOptions::new().version(version).more(&network).more(&["-device", &device]);
        let mut guest = kit::loaded(options)?;
        let frozen = guest.disks();
        let (image, split) = taken_apart(&mut guest).await?;
        let line: Vec<String> =
            guest.command_line().iter().map(|word| word.to_string_lossy().into_owned()).collect();
        for (number, source) in
            [clone::Source::Image(&image), clone::Source::Split(&split, Mapping::ReadOnly)]
                .into_iter()
                .enumerate()
        {
            if version == Version::Old && matches!(source, clone::Source::Split(..)) {
                continue;
            }
            let dir = guest.dir().join(format!("clone{number}"));
            fs::create_dir(&dir)?;
            let uuid = uuid::Uuid::new_v4();
            let mut identity = clone::Identity::new("fork", uuid);
            let refused = clone::command(&line, &identity).expect_err("its sockets are the guest's");
            ensure!(refused.kind() == hypervisor_qemu::ErrorKind::Unsupported, "{refused}");
            let names = ["qmp", "agent", "witness", "console"].map(str::to_owned);
            let disks =
                frozen.iter().map(|disk| disk.file_name().expect("a name").to_string_lossy().into_owned());
            for name in names.into_iter().chain(disks) {
                identity = identity.path(guest.dir().join(&name), dir.join(&name));
            }
            for disk in &frozen {
                kit::make_overlay(&dir.join(disk.file_name().expect("a name")), disk, 64)?;
            }
            let command = clone::command(&line, &identity)?;
            let clone = clone::start(command, &dir.join("qmp"), source).await?;
            let ask = async |command: &str| clone.machine().qmp().execute_raw(command, Value::Null).await;
            ensure!(!clone.machine().run_state().await?.running, "it runs before it may");
            ensure!(ask("query-name").await?["name"] == "fork");
            ensure!(ask("query-uuid").await?["UUID"] == uuid.to_string());
            ensure!(ask("query-vm-generation-id").await?["guid"] != id);
            clone.set_links(true).await?;
            ticks(&dir, clone.machine()).await?;
            let pid = clone.machine().pid().context("it has a process")?;
            drop(clone);
            ensure!(!Path::new(&format!("/proc/{pid}")).exists(), "it did not end");
        }
    }
    Ok(())
}

/// The mapping that is not read only is as dangerous as its documentation says: a balloon changes the RAM of
/// all others. (So the test above can fail.)
#[tokio::test(flavor = "multi_thread")]
async fn balloon_changes_ram_that_is_writable() -> Result<()> {
    let options = GuestOptions::new().generic_kernel().more(&["-device", "virtio-balloon-pci,id=balloon"]);
    let mut guest = kit::loaded(options)?;
    used_memory(&guest)?;
    let frozen = guest.disks();
    let (_, split) = taken_apart(&mut guest).await?;
    may_be_opened(&split, Mapping::Private)?;
    let clone = Clone::start(&guest, "clone", &frozen, From::Split(&split, Mapping::Private)).await?;
    clone.ticks().await?;
    clone.ask("balloon", json!({ "value": split.length() - (48 << 20) })).await?;
    kit::until(async || Ok(split.verify().is_err())).await.context("the RAM is unchanged")
}

/// A stream that was cut off is refused by QEMU, and RAM that was is not opened.
#[tokio::test(flavor = "multi_thread")]
async fn cut_off_parts_are_refused() -> Result<()> {
    let mut guest = kit::loaded(GuestOptions::new())?;
    let frozen = guest.disks();
    let (_, split) = taken_apart(&mut guest).await?;
    let whole = fs::metadata(split.ram())?.len();
    let shorter = |file: &Path, length: u64| -> Result<()> {
        fs::set_permissions(file, std::os::unix::fs::PermissionsExt::from_mode(0o600))?;
        Ok(fs::File::options().write(true).open(file)?.set_len(length)?)
    };
    shorter(split.ram(), whole - 4096)?;
    ensure!(Split::open(split.ram(), split.devices()).is_err(), "RAM that was cut off is opened");
    shorter(split.ram(), whole)?;
    shorter(split.devices(), (2 << 20) + split.stream_length() / 2)?;
    ensure!(Split::open(split.ram(), split.devices()).is_err(), "devices that were cut off are opened");
    // The one that was opened before.
    let cut = Clone::start(&guest, "cut", &frozen, From::Split(&split, Mapping::ReadOnly)).await;
    ensure!(cut.is_err(), "QEMU loads half of the devices");
    Ok(())
}
