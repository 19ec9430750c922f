//! Between domsnap and a QMP socket: how long QEMU took to answer.

use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};

/// What was waited for.
#[derive(Debug, Default)]
struct Waited {
    /// Commands that are not answered yet.
    open: usize,
    since: Option<Instant>,
    all: Duration,
    commands: usize,
}

/// A socket in front of another, for one client at a time. Lines are passed on as they are; descriptors are not.
#[derive(Debug)]
pub struct Proxy {
    socket: PathBuf,
    waited: Arc<Mutex<Waited>>,
}

impl Proxy {
    /// Serves until the process ends.
    pub fn start(target: &Path) -> Result<Proxy> {
        let socket = target.with_extension("proxy");
        let listener = UnixListener::bind(&socket).with_context(|| socket.display().to_string())?;
        let waited = Arc::<Mutex<Waited>>::default();
        let (target, counted) = (target.to_owned(), waited.clone());
        thread::spawn(move || {
            for client in listener.incoming().flatten() {
                // A client that goes away ends its own pair; the next is served.
                let _ = serve(&client, &target, &counted);
            }
        });
        Ok(Proxy { socket, waited })
    }

    /// Where it listens.
    pub fn socket(&self) -> &Path {
        &self.socket
    }

    /// Counts from now on.
    pub fn forget(&self) {
        *self.waited.lock().unwrap_or_else(PoisonError::into_inner) = Waited::default();
    }

    /// How long at least one command was without its answer, and how many there were.
    pub fn answered(&self) -> (Duration, usize) {
        let waited = self.waited.lock().unwrap_or_else(PoisonError::into_inner);
        (waited.all, waited.commands)
    }
}

fn serve(client: &UnixStream, target: &Path, waited: &Arc<Mutex<Waited>>) -> std::io::Result<()> {
    let server = UnixStream::connect(target)?;
    let (mut to_server, from_client) = (server.try_clone()?, client.try_clone()?);
    let asked = waited.clone();
    let up = thread::spawn(move || -> std::io::Result<()> {
        for line in BufReader::new(from_client).split(b'\n') {
            let mut line = line?;
            line.push(b'\n');
            {
                let mut waited = asked.lock().unwrap_or_else(PoisonError::into_inner);
                waited.open += 1;
                waited.commands += 1;
                waited.since.get_or_insert_with(Instant::now);
            }
            to_server.write_all(&line)?;
        }
        to_server.shutdown(std::net::Shutdown::Both)
    });
    let mut to_client = client.try_clone()?;
    for line in BufReader::new(server).split(b'\n') {
        let mut line = line?;
        // Answers begin so; events and the greeting do not.
        if line.starts_with(b"{\"return\"") || line.starts_with(b"{\"error\"") || line.starts_with(b"{\"id\"")
        {
            let mut waited = waited.lock().unwrap_or_else(PoisonError::into_inner);
            waited.open = waited.open.saturating_sub(1);
            if waited.open == 0
                && let Some(since) = waited.since.take()
            {
                waited.all += since.elapsed();
            }
        }
        line.push(b'\n');
        if to_client.write_all(&line).is_err() {
            break;
        }
    }
    let _ = client.shutdown(std::net::Shutdown::Both);
    // Its own end is not of interest: the client is gone.
    let _ = up.join();
    Ok(())
}
