//! The other side of a socket, played line by line by a test.

use std::path::PathBuf;

use qmp::{Options, Qmp};
use serde_json::{Value, json};
use tokio::{
    io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader},
    net::{UnixListener, UnixStream},
};

/// A socket in its own directory, served by a test.
pub struct Server {
    pub dir: tempfile::TempDir,
    listener: UnixListener,
}

/// One client of it.
pub struct Client(pub BufReader<UnixStream>);

impl Server {
    pub fn new() -> Self {
        let dir = tempfile::tempdir().expect("a directory");
        let listener = UnixListener::bind(dir.path().join("socket")).expect("it binds");
        Self { dir, listener }
    }

    pub fn path(&self) -> PathBuf {
        self.dir.path().join("socket")
    }

    pub async fn accept(&self) -> Client {
        Client(BufReader::new(self.listener.accept().await.expect("a client").0))
    }

    /// Makes both sides of a connection after the greeting.
    #[allow(dead_code, reason = "the agent's tests send no greeting")]
    pub async fn greeted(&self, options: Options) -> (Client, Qmp) {
        let serve = async {
            let mut client = self.accept().await;
            client.greet().await;
            client
        };
        let path = self.path();
        let (client, qmp) = tokio::join!(serve, Qmp::connect_with(&path, options));
        (client, qmp.expect("it connects"))
    }
}

pub fn greeting() -> Value {
    json!({"QMP": {"version": {"qemu": {"major": 10, "minor": 0, "micro": 2}, "package": ""}, "capabilities": ["oob", "telepathy"]}})
}

#[allow(dead_code, reason = "each test program uses a part")]
impl Client {
    pub async fn send(&mut self, bytes: &[u8]) {
        self.0.get_mut().write_all(bytes).await.expect("it is written");
    }

    pub async fn say(&mut self, value: Value) {
        self.send(format!("{value}\r\n").as_bytes()).await;
    }

    /// Returns the next line, without a leading delimiter of an agent's client; `None` at the end.
    pub async fn line(&mut self) -> Option<Value> {
        let mut line = Vec::new();
        self.0.read_until(b'\n', &mut line).await.expect("it reads");
        let text: &[u8] = line.strip_prefix(b"\xff").unwrap_or(&line);
        (!text.is_empty()).then(|| serde_json::from_slice(text).expect("we send JSON"))
    }

    /// Returns the id of the next command, which must have that name.
    pub async fn expect(&mut self, name: &str) -> Value {
        let command = self.line().await.unwrap_or_else(|| panic!("the end, not {name}"));
        let found = command.get("execute").or(command.get("exec-oob"));
        assert_eq!(found, Some(&json!(name)), "{command}");
        command["id"].clone()
    }

    pub async fn reply(&mut self, id: &Value, value: Value) {
        self.say(json!({"return": value, "id": id})).await;
    }

    pub async fn greet(&mut self) {
        self.say(greeting()).await;
        let command = self.line().await.expect("a command");
        assert_eq!(command["execute"], "qmp_capabilities");
        assert_eq!(command["arguments"], json!({"enable": ["oob"]}), "what is offered and known is enabled");
        self.reply(&command["id"], json!({})).await;
    }

    /// Returns all input until the client closes.
    pub async fn rest(mut self) -> Vec<u8> {
        let mut rest = Vec::new();
        let _ = self.0.read_to_end(&mut rest).await;
        rest
    }
}
