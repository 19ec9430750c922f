//! A misbehaving guest agent. Time is paused, except in tests of a runtime's end.

mod script;

use std::{
    io::{BufRead, BufReader, Write},
    time::Duration,
};

use qapi_qga::{guest_get_osinfo, guest_ping};
use qmp::{Agent, AgentOptions, ErrorKind, Freeze};
use script::{Client, Server};
use serde_json::{Value, json};

const FREEZE: &str = "guest-fsfreeze-freeze";
const THAW: &str = "guest-fsfreeze-thaw";
const STATUS: &str = "guest-fsfreeze-status";

/// Takes the next line, which must be a sync, and answers it.
async fn synced(client: &mut Client) -> Option<()> {
    let sync = client.line().await?;
    assert_eq!(sync["execute"], "guest-sync-delimited", "{sync}");
    answer_sync(client, &sync["arguments"]["id"]).await;
    Some(())
}

async fn answer_sync(client: &mut Client, id: &Value) {
    client.send(&[b"\xff", json!({ "return": id }).to_string().as_bytes(), b"\n"].concat()).await;
}

/// A well-behaved guest: serves one client until that closes, and returns the commands that it received.
async fn serve(client: &mut Client, guest: &mut Guest) {
    while let Some(command) = client.line().await {
        let name = command["execute"].as_str().expect("a name").to_owned();
        if name == "guest-sync-delimited" {
            answer_sync(client, &command["arguments"]["id"]).await;
            continue;
        }
        let value = guest.run(&name);
        guest.log.push(name);
        client.reply(&command["id"], value).await;
    }
}

#[derive(Debug, Default)]
struct Guest {
    frozen: bool,
    log: Vec<String>,
}

impl Guest {
    fn run(&mut self, name: &str) -> Value {
        match name {
            "guest-ping" => json!({}),
            STATUS => json!(if self.frozen { "frozen" } else { "thawed" }),
            FREEZE | "guest-fsfreeze-freeze-list" => {
                self.frozen = true;
                json!(2)
            }
            THAW => json!(if std::mem::take(&mut self.frozen) { 2 } else { 0 }),
            other => panic!("{other} was not expected"),
        }
    }
}

fn brief(change: impl FnOnce(&mut Freeze)) -> Freeze {
    let mut freeze = Freeze::default();
    change(&mut freeze);
    freeze
}

#[tokio::test(start_paused = true)]
async fn each_command_follows_a_sync_of_its_own() {
    let server = Server::new();
    let agent = Agent::new(server.path());
    let serve = async {
        let mut client = server.accept().await;
        for _ in 0..2 {
            synced(&mut client).await.expect("a sync");
            let id = client.expect("guest-ping").await;
            client.reply(&id, json!({})).await;
        }
    };
    let commands = async {
        agent.execute(guest_ping {}).await.expect("a reply");
        assert_eq!(agent.execute_raw("guest-ping", Value::Null).await.expect("a reply"), json!({}));
    };
    tokio::join!(serve, commands);
}

#[tokio::test(start_paused = true)]
async fn a_command_is_not_sent_to_an_agent_that_hangs() {
    let server = Server::new();
    let agent = Agent::new(server.path());
    let (client, error) = tokio::join!(server.accept(), agent.execute(guest_ping {}));
    let error = error.expect_err("no answer");
    assert_eq!((error.kind(), error.may_have_run()), (ErrorKind::Timeout, false));
    assert!(error.to_string().contains("frontend-open"), "{error}");
    let error = agent.freeze(Freeze::default()).await.expect_err("no answer");
    assert_eq!((error.kind(), error.may_have_run()), (ErrorKind::Timeout, false));
    agent.wait_for_thaw(Duration::ZERO).await.expect("no freeze was sent, no thaw is owed");
    drop(agent);
    let sent = String::from_utf8_lossy(&client.rest().await).into_owned();
    assert_eq!(sent.matches("guest-sync-delimited").count(), 2, "{sent}");
    assert_eq!(sent.matches("execute").count(), 2, "nothing but the syncs: {sent}");
}

/// Late replies and stale delimiters are not taken for the next reply.
#[tokio::test(start_paused = true)]
async fn late_replies_are_not_taken_for_the_next() {
    let server = Server::new();
    let agent = Agent::new(server.path());
    let serve = async {
        let mut client = server.accept().await;
        synced(&mut client).await.expect("a sync");
        let late = client.expect("guest-ping").await;
        // It hangs: this command times out, and the sync of the next one too.
        let first = client.line().await.expect("a sync");
        let second = client.line().await.expect("a sync");
        // Then it answers everything: the command, the first sync, half a line, delimiters, and the second
        // sync.
        client.reply(&late, json!({"running": "late"})).await;
        answer_sync(&mut client, &first["arguments"]["id"]).await;
        client.send(b"{\"return\": {\"ha").await;
        client.send(b"\xff\xff\xff").await;
        client.send(format!("{}\n", json!({"return": second["arguments"]["id"]})).as_bytes()).await;
        let id = client.expect("guest-ping").await;
        // A sync's reply, a reply to another, something else, and at last its own.
        answer_sync(&mut client, &first["arguments"]["id"]).await;
        client.reply(&late, json!({"late": 1})).await;
        client.say(json!({"event": "NEW"})).await;
        client.reply(&id, json!({"own": 1})).await;
    };
    let commands = async {
        let error = agent.execute(guest_ping {}).await.expect_err("it hangs");
        assert_eq!((error.kind(), error.may_have_run()), (ErrorKind::Timeout, true));
        let error = agent.execute(guest_ping {}).await.expect_err("it hangs");
        assert_eq!((error.kind(), error.may_have_run()), (ErrorKind::Timeout, false));
        assert_eq!(agent.execute_raw("guest-ping", Value::Null).await.expect("a reply"), json!({"own": 1}));
    };
    tokio::join!(serve, commands);
}

#[tokio::test(start_paused = true)]
async fn an_old_agent_that_sends_no_ids_is_understood() {
    let server = Server::new();
    let agent = Agent::new(server.path());
    let serve = async {
        let mut client = server.accept().await;
        synced(&mut client).await.expect("a sync");
        client.expect("guest-ping").await;
        client.say(json!({"return": {}})).await;
        synced(&mut client).await.expect("a sync");
        client.expect("guest-get-osinfo").await;
        client.say(json!({"error": {"class": "CommandNotFound", "desc": "has been disabled"}})).await;
    };
    let commands = async {
        agent.execute(guest_ping {}).await.expect("a reply");
        let error = agent.execute(guest_get_osinfo {}).await.expect_err("it is disabled");
        assert_eq!((error.kind(), error.desc()), (ErrorKind::Unsupported, Some("has been disabled")));
    };
    tokio::join!(serve, commands);
}

/// A hostile reply fails its command, and the next command works.
#[tokio::test(start_paused = true)]
async fn hostile_reply_fails_only_its_command() {
    let server = Server::new();
    let mut options = AgentOptions::default();
    options.line_cap = 4096;
    let agent = Agent::with(server.path(), options);
    let deep = format!("{{\"return\": {}{}}}\n", "[".repeat(100), "]".repeat(100));
    let hostile: [(&[u8], ErrorKind); 5] = [
        (&[&[b'x'; 1 << 20][..], b"\n"].concat(), ErrorKind::TooLong),
        (b"{\"return\": \"\xc3\x28\"}\n", ErrorKind::Reply),
        (b"not JSON\n", ErrorKind::Reply),
        (deep.as_bytes(), ErrorKind::Reply),
        (&[b'x'; 1 << 20], ErrorKind::Timeout),
    ];
    let serve = async {
        let mut client = server.accept().await;
        for (reply, _) in hostile {
            synced(&mut client).await.expect("a sync");
            client.expect("guest-ping").await;
            client.send(reply).await;
        }
        // The last reply was an unfinished line: the next try begins in the middle of it, and is lost with
        // it.
        let lost = client.line().await.expect("a sync");
        answer_sync(&mut client, &lost["arguments"]["id"]).await;
        synced(&mut client).await.expect("a sync");
        let id = client.expect("guest-ping").await;
        client.reply(&id, json!({})).await;
    };
    let commands = async {
        for (_, kind) in hostile {
            let error = agent.execute(guest_ping {}).await.expect_err("it cannot be used");
            assert!(error.kind() == kind && error.may_have_run(), "{error}");
        }
        agent.execute(guest_ping {}).await.expect_err("its sync was inside the endless line");
        agent.execute(guest_ping {}).await.expect("it works again");
    };
    tokio::join!(serve, commands);
}

#[tokio::test(start_paused = true)]
async fn a_socket_that_was_lost_is_opened_again() {
    let server = Server::new();
    let agent = Agent::new(server.path());
    let serving = async {
        for _ in 0..2 {
            let mut client = server.accept().await;
            synced(&mut client).await.expect("a sync");
            let id = client.expect("guest-ping").await;
            client.reply(&id, json!({})).await;
        }
        // Lost between a command and its reply.
        let mut client = server.accept().await;
        synced(&mut client).await.expect("a sync");
        client.expect("guest-ping").await;
    };
    let commands = async {
        agent.execute(guest_ping {}).await.expect("a reply");
        agent.execute(guest_ping {}).await.expect("over a new socket");
        let error = agent.execute(guest_ping {}).await.expect_err("it is lost");
        assert_eq!((error.kind(), error.may_have_run()), (ErrorKind::Lost, true));
    };
    tokio::join!(serving, commands);
    drop(server);
    let error = agent.execute(guest_ping {}).await.expect_err("no server");
    assert_eq!((error.kind(), error.may_have_run()), (ErrorKind::Connect, false));
}

#[tokio::test(start_paused = true)]
async fn a_freeze_is_held_until_its_thaw() {
    let server = Server::new();
    let agent = Agent::new(server.path());
    let mut guest = Guest::default();
    let serving = async { serve(&mut server.accept().await, &mut guest).await };
    let commands = async {
        let error = agent.execute_raw(FREEZE, Value::Null).await.expect_err("by its bare name");
        assert!(error.kind() == ErrorKind::Invalid && error.to_string().contains("Agent::freeze"), "{error}");
        let frozen = agent.freeze(Freeze::default()).await.expect("it freezes");
        assert_eq!(frozen.filesystems(), 2);
        let twice = agent.freeze(Freeze::default()).await.expect_err("it is frozen");
        assert_eq!(twice.kind(), ErrorKind::Invalid);
        agent.execute(guest_ping {}).await.expect("commands go on");
        agent.wait_for_thaw(Duration::ZERO).await.expect_err("a thaw is owed");
        let thaw = frozen.thaw().await.expect("it thaws");
        assert!(thaw.held && thaw.filesystems == 2, "{thaw:?}");
        agent.wait_for_thaw(Duration::ZERO).await.expect("nothing is owed");
        let some = agent.freeze(brief(|freeze| freeze.mountpoints = vec!["/d1".to_owned()])).await;
        assert!(some.expect("it freezes").thaw().await.expect("it thaws").held);
        drop(agent);
    };
    tokio::join!(serving, commands);
    let changes: Vec<&str> = guest.log.iter().map(String::as_str).filter(|name| *name != STATUS).collect();
    assert_eq!(changes, [FREEZE, "guest-ping", THAW, "guest-fsfreeze-freeze-list", THAW]);
}

#[tokio::test(start_paused = true)]
async fn a_freeze_that_is_dropped_in_any_state_is_thawed() {
    let server = Server::new();
    let agent = Agent::new(server.path());
    let mut guest = Guest::default();
    let serving = async { serve(&mut server.accept().await, &mut guest).await };
    let commands = async {
        // The guard.
        drop(agent.freeze(Freeze::default()).await.expect("it freezes"));
        agent.wait_for_thaw(Duration::from_secs(5)).await.expect("it is thawed");
        // The call, dropped after each number of polls, until it completes.
        for polls in 1.. {
            let mut freeze = Box::pin(agent.freeze(Freeze::default()));
            let mut left = polls;
            let done = std::future::poll_fn(|context| {
                use std::task::Poll;
                left -= 1;
                match freeze.as_mut().poll(context) {
                    Poll::Ready(frozen) => Poll::Ready(Some(frozen)),
                    Poll::Pending if left == 0 => Poll::Ready(None),
                    Poll::Pending => Poll::Pending,
                }
            })
            .await;
            let through = done.is_some();
            drop((freeze, done));
            agent.execute(guest_ping {}).await.expect("the task is through with it");
            agent.wait_for_thaw(Duration::from_secs(5)).await.expect("it is thawed");
            if through {
                break;
            }
        }
        // The thaw, and the agent's own handle while the guard still exists.
        let frozen = agent.freeze(Freeze::default()).await.expect("it freezes");
        tokio::time::timeout(Duration::ZERO, frozen.thaw()).await.expect_err("dropped");
        agent.wait_for_thaw(Duration::from_secs(5)).await.expect("it is thawed");
        let frozen = agent.freeze(Freeze::default()).await.expect("it freezes");
        drop(agent);
        drop(frozen);
    };
    tokio::join!(serving, commands);
    assert!(!guest.frozen, "{:?}", guest.log);
    let count = |name: &str| guest.log.iter().filter(|logged| *logged == name).count();
    assert!(count(FREEZE) >= 4 && count(FREEZE) == count(THAW), "{:?}", guest.log);
}

/// A freeze that is not answered is followed by thaws until one is answered.
#[tokio::test(start_paused = true)]
async fn unanswered_freeze_is_thawed_until_answered() {
    let server = Server::new();
    let agent = Agent::new(server.path());
    let mut guest = Guest::default();
    let serving = async {
        let mut client = server.accept().await;
        synced(&mut client).await.expect("a sync");
        let id = client.expect(STATUS).await;
        client.reply(&id, json!("thawed")).await;
        let freeze = client.expect(FREEZE).await;
        // It hangs for a minute, and then runs the queued commands in order: it freezes when no caller waits
        // any more.
        tokio::time::sleep(Duration::from_secs(60)).await;
        client.reply(&freeze, guest.run(FREEZE)).await;
        assert!(guest.frozen);
        serve(&mut client, &mut guest).await;
    };
    let commands = async {
        let error = agent.freeze(Freeze::default()).await.expect_err("no answer");
        assert_eq!((error.kind(), error.may_have_run()), (ErrorKind::Timeout, true));
        assert!(error.to_string().contains("being thawed"), "{error}");
        let error = agent.wait_for_thaw(Duration::from_secs(20)).await.expect_err("it hangs");
        assert!(
            error.kind() == ErrorKind::Timeout && error.to_string().contains("may still be frozen"),
            "{error}"
        );
        agent.wait_for_thaw(Duration::from_secs(60)).await.expect("it is thawed");
        drop(agent);
    };
    tokio::join!(serving, commands);
    assert!(!guest.frozen && guest.log.contains(&THAW.to_owned()), "{:?}", guest.log);
}

/// A thaw is tried again after an error, a false report and a lost socket.
#[tokio::test(start_paused = true)]
async fn thaw_is_retried_after_each_failure() {
    let server = Server::new();
    let agent = Agent::new(server.path());
    let mut guest = Guest::default();
    let serving = async {
        let mut client = server.accept().await;
        let mut thaws = 0;
        while let Some(command) = client.line().await {
            let (name, id) = (command["execute"].as_str().expect("a name").to_owned(), &command["id"]);
            match (name.as_str(), thaws) {
                ("guest-sync-delimited", _) => answer_sync(&mut client, &command["arguments"]["id"]).await,
                (THAW, 0) => {
                    client.say(json!({"error": {"class": "GenericError", "desc": "busy"}, "id": id})).await
                }
                // It reports a thaw, and its status contradicts.
                (THAW, 1) => client.reply(id, json!(2)).await,
                (THAW, _) => break,
                _ => client.reply(id, guest.run(&name)).await,
            }
            thaws += usize::from(name == THAW);
        }
        drop(client);
        assert!(guest.frozen && thaws == 2);
        serve(&mut server.accept().await, &mut guest).await;
    };
    let commands = async {
        let frozen = agent.freeze(Freeze::default()).await.expect("it freezes");
        let error = frozen.thaw().await.expect_err("refused at first");
        assert_eq!(error.desc(), Some("busy"));
        agent.wait_for_thaw(Duration::from_secs(30)).await.expect("it is thawed");
        drop(agent);
    };
    tokio::join!(serving, commands);
    assert!(!guest.frozen);
}

/// The host thaws when the limit is over, and the holder gets to know it.
#[tokio::test(start_paused = true)]
async fn host_thaws_at_the_limit() {
    let server = Server::new();
    let agent = Agent::new(server.path());
    let mut guest = Guest::default();
    let serving = async { serve(&mut server.accept().await, &mut guest).await };
    let commands = async {
        let frozen =
            agent.freeze(brief(|freeze| freeze.limit = Duration::from_secs(2))).await.expect("it freezes");
        agent.wait_for_thaw(Duration::from_secs(3)).await.expect("the host thawed");
        assert_eq!(frozen.left(), Duration::ZERO);
        let thaw = frozen.thaw().await.expect("that is no error");
        assert!(!thaw.held, "{thaw:?}");
        drop(agent);
    };
    tokio::join!(serving, commands);
    assert!(!guest.frozen);
}

/// A guest that thawed by itself is distinguished from one that stayed frozen.
#[tokio::test(start_paused = true)]
async fn early_thaw_of_the_guest_is_reported() {
    let server = Server::new();
    let agent = Agent::new(server.path());
    let serving = async {
        let mut client = server.accept().await;
        let mut guest = Guest::default();
        while let Some(command) = client.line().await {
            match command["execute"].as_str().expect("a name") {
                "guest-sync-delimited" => answer_sync(&mut client, &command["arguments"]["id"]).await,
                name => {
                    let value = guest.run(name);
                    client.reply(&command["id"], value).await;
                    // Windows does this when its time limit is over.
                    guest.frozen = false;
                }
            }
        }
    };
    let commands = async {
        let frozen = agent.freeze(Freeze::default()).await.expect("it freezes");
        assert!(!frozen.thaw().await.expect("it thaws").held);
        drop(agent);
    };
    tokio::join!(serving, commands);
}

/// A guest that another tool froze is left frozen until a thaw is requested.
#[tokio::test(start_paused = true)]
async fn foreign_freeze_is_left_until_a_thaw() {
    let server = Server::new();
    let agent = Agent::new(server.path());
    let mut guest = Guest { frozen: true, log: Vec::new() };
    let serving = async { serve(&mut server.accept().await, &mut guest).await };
    let commands = async {
        let error = agent.freeze(Freeze::default()).await.expect_err("it is frozen");
        assert!(error.kind() == ErrorKind::Invalid && error.to_string().contains("Agent::thaw"), "{error}");
        agent.wait_for_thaw(Duration::ZERO).await.expect("it is not ours to thaw");
        assert_eq!(agent.thaw().await.expect("it thaws"), 2);
        assert_eq!(agent.thaw().await.expect("harmless"), 0);
        drop(agent);
    };
    tokio::join!(serving, commands);
    assert_eq!(guest.log, [STATUS, STATUS, THAW, STATUS, STATUS, THAW, STATUS]);
}

#[test]
fn the_end_of_the_runtime_thaws_a_frozen_guest() {
    let dir = tempfile::tempdir().expect("a directory");
    let socket = dir.path().join("socket");
    let listener = std::os::unix::net::UnixListener::bind(&socket).expect("it binds");
    let agent = std::thread::spawn(move || {
        let (mut stream, _) = listener.accept().expect("a client");
        let mut guest = Guest::default();
        let mut lines = BufReader::new(stream.try_clone().expect("a clone"));
        let mut line = Vec::new();
        while lines.read_until(b'\n', &mut line).is_ok_and(|count| count > 0) {
            let command: Value =
                serde_json::from_slice(line.strip_prefix(b"\xff").unwrap_or(&line)).expect("JSON");
            line.clear();
            let reply = match command["execute"].as_str().expect("a name") {
                "guest-sync-delimited" => {
                    stream.write_all(b"\xff").expect("write");
                    command["arguments"]["id"].clone()
                }
                name => guest.run(name),
            };
            writeln!(stream, "{}", json!({"return": reply, "id": command["id"]})).expect("write");
        }
        guest.frozen
    });
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()
        .expect("a runtime");
    let frozen =
        runtime.block_on(async { Agent::new(&socket).freeze(Freeze::default()).await.expect("it freezes") });
    drop(runtime);
    assert!(!agent.join().expect("no panic"), "it is thawed when the runtime has ended");
    drop(frozen);
}
