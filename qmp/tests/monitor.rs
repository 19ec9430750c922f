//! A misbehaving monitor. Time is paused: without input, the next deadline is reached at once.

mod script;

use std::time::Duration;

use qapi_qmp::{query_jobs, query_status};
use qmp::{ErrorKind, JobStatus, Notice, Options, Qmp};
use script::{Server, greeting};
use serde_json::{Value, json};

fn status() -> Value {
    json!({"running": true, "status": "running"})
}

/// Shows that the connection works: a command, and its reply.
async fn works(client: &mut script::Client, qmp: &Qmp) {
    let serve = async {
        let id = client.expect("query-status").await;
        client.reply(&id, status()).await;
    };
    let ((), reply) = tokio::join!(serve, qmp.execute(query_status {}));
    assert!(reply.expect("the connection is usable").running);
}

fn options(change: impl FnOnce(&mut Options)) -> Options {
    let mut options = Options::default();
    change(&mut options);
    options
}

#[tokio::test(start_paused = true)]
async fn messages_are_the_same_however_their_bytes_arrive() {
    let server = Server::new();
    let (mut client, qmp) = server.greeted(Options::default()).await;
    let mut events = qmp.events();
    let serve = async {
        let id = client.expect("query-status").await;
        let both = format!("{}\r\n\r\n{}\n", json!({"event": "ONE"}), json!({"return": status(), "id": id}));
        for byte in both.as_bytes() {
            client.send(&[*byte]).await;
            tokio::task::yield_now().await;
        }
        let id = client.expect("query-status").await;
        client.send(both.replace("ONE", "TWO").replace(r#""id":"#, r#""old":"#).as_bytes()).await;
        client.reply(&id, status()).await;
    };
    let commands = async {
        qmp.execute(query_status {}).await.expect("byte by byte");
        qmp.execute(query_status {}).await.expect("all in one");
    };
    tokio::join!(serve, commands);
    for name in ["ONE", "TWO"] {
        assert!(matches!(events.next().await, Ok(Notice::Event(event)) if event.name == name));
    }
}

/// A reply before its command, and replies without a caller, are dropped.
#[tokio::test(start_paused = true)]
async fn stray_replies_are_dropped() {
    let server = Server::new();
    let (mut client, qmp) = server.greeted(Options::default()).await;
    let serve = async {
        let id = client.expect("query-status").await;
        let text = id.as_str().expect("a string").to_owned();
        let (prefix, number) = text.rsplit_once('-').expect("a number at the end");
        let next = format!("{prefix}-{}", number.parse::<u64>().expect("a number") + 1);
        // A reply to the next command, to none, to another connection's, without an id, with an odd one; and
        // then twice.
        for wrong in
            [json!(next), json!("x"), json!("domsnap-0000000000000000-2"), json!(2), json!({"a": []})]
        {
            client.say(json!({"return": {"running": "wrong"}, "id": wrong})).await;
        }
        client.say(json!({"return": {"running": "wrong"}})).await;
        client.say(json!({"error": {"class": "GenericError", "desc": "JSON parse error"}})).await;
        client.reply(&id, status()).await;
        client.say(json!({"error": {"class": "GenericError", "desc": "again"}, "id": id})).await;
        let id = client.expect("query-status").await;
        assert_eq!(id, json!(next), "the guess was right");
        client.reply(&id, status()).await;
    };
    let commands = async {
        assert!(qmp.execute(query_status {}).await.expect("the first").running);
        assert!(qmp.execute(query_status {}).await.expect("the second").running);
    };
    tokio::join!(serve, commands);
}

/// Unknown messages are data or are skipped, and a timeout reports them.
#[tokio::test(start_paused = true)]
async fn unknown_messages_are_data_or_noise() {
    let server = Server::new();
    let (mut client, qmp) = server.greeted(Options::default()).await;
    let mut events = qmp.events();
    let serve = async {
        let id = client.expect("query-jobs").await;
        client.say(json!({"event": "CHRONOSYNCLASTIC", "data": {"x": [1]}, "timestamp": {"seconds": 1, "microseconds": 2}})).await;
        client.say(json!({"hello": 1})).await;
        client.say(json!([1, 2])).await;
        client.say(greeting()).await;
        client.send(b"garbage \xff\xfe\n{\"half\": \n\0\0\n").await;
        client.say(json!({"return": [], "id": id, "telemetry": {}})).await;
        client.expect("query-jobs").await;
        client.say(json!({"error": {"class": "GenericError", "desc": "who asked?"}})).await;
        client
    };
    let commands = async {
        assert!(qmp.execute(query_jobs {}).await.expect("the reply is found").is_empty());
        qmp.execute(query_jobs {}).await.expect_err("it is not answered")
    };
    let (mut client, error) = tokio::join!(serve, commands);
    assert_eq!((error.kind(), error.may_have_run()), (ErrorKind::Timeout, true));
    let text = error.to_string();
    assert!(
        text.contains("within 30 s; meanwhile 1 lines were not understood") && text.contains("who asked?"),
        "{text}"
    );
    let Ok(Notice::Event(event)) = events.next().await else { panic!("no event") };
    assert_eq!(
        (event.name.as_str(), event.time_us, &event.data),
        ("CHRONOSYNCLASTIC", Some(1_000_002), &json!({"x": [1]}))
    );
    works(&mut client, &qmp).await;
}

/// A late reply is dropped, and the next command gets its own.
#[tokio::test(start_paused = true)]
async fn late_reply_is_dropped() {
    let server = Server::new();
    let (mut client, qmp) = server.greeted(Options::default()).await;
    let error = qmp.within(Duration::from_secs(3)).execute_raw("snapshot-save", json!({"tag": "t"})).await;
    let error = error.expect_err("no reply");
    assert_eq!(
        (error.kind(), error.may_have_run(), error.attempted()),
        (ErrorKind::Timeout, true, "snapshot-save")
    );
    let late = client.expect("snapshot-save").await;
    let serve = async {
        let id = client.expect("query-status").await;
        client.reply(&late, json!({"running": "late"})).await;
        client.reply(&id, status()).await;
        client
    };
    let (mut client, reply) = tokio::join!(serve, qmp.execute(query_status {}));
    assert!(reply.expect("its own").running);
    works(&mut client, &qmp).await;
}

/// A dropped call leaves the connection usable, and a command that was not written is not sent.
#[tokio::test(start_paused = true)]
async fn dropped_call_leaves_the_connection_usable() {
    let server = Server::new();
    let (mut client, qmp) = server.greeted(Options::default()).await;
    // The server does not read: this line fills the socket, and is half written.
    let big = qmp.execute_raw("big", json!({"a": "x".repeat(8 << 20)}));
    tokio::time::timeout(Duration::from_secs(1), big).await.expect_err("it is dropped half written");
    let behind = qmp
        .within(Duration::from_secs(1))
        .execute_raw("never-sent", Value::Null)
        .await
        .expect_err("no reply");
    assert!(!behind.may_have_run() && behind.to_string().contains("could not be sent"), "{behind}");
    tokio::time::timeout(Duration::from_secs(1), qmp.execute_raw("dropped", Value::Null))
        .await
        .expect_err("dropped");
    // Now it reads: the first line is complete, and no part of the others is between it and the next.
    let id = client.expect("big").await;
    client.reply(&id, json!({"running": "dropped"})).await;
    works(&mut client, &qmp).await;
}

/// Replies out of order and out of band reach their callers.
#[tokio::test(start_paused = true)]
async fn replies_out_of_order_reach_their_callers() {
    let server = Server::new();
    let (mut client, qmp) = server.greeted(Options::default()).await;
    let serve = async {
        let mut ids = Vec::new();
        for name in ["a", "b", "c"] {
            ids.push((name, client.expect(name).await));
        }
        let oob = client.line().await.expect("a command");
        assert!(oob["exec-oob"] == "yank" && oob.get("execute").is_none(), "{oob}");
        client.reply(&oob["id"], json!("yank")).await;
        for (name, id) in ids.iter().rev() {
            client.reply(id, json!(name)).await;
        }
    };
    let raw = |name: &'static str| {
        let qmp = qmp.clone();
        async move { qmp.execute_raw(name, Value::Null).await.expect("a reply") }
    };
    let overtaking = async { qmp.execute_oob_raw("yank", Value::Null).await.expect("a reply") };
    let ((), a, b, c, oob) = tokio::join!(serve, raw("a"), raw("b"), raw("c"), overtaking);
    assert_eq!([a, b, c, oob], [json!("a"), json!("b"), json!("c"), json!("yank")]);
}

/// An oversized or broken reply fails its command at once, and no other.
#[tokio::test(start_paused = true)]
async fn bad_reply_fails_only_its_command() {
    let server = Server::new();
    let (mut client, qmp) = server.greeted(options(|options| options.line_cap = 10_000)).await;
    let serve = async {
        let id = client.expect("query-block").await;
        client.say(json!({"event": "BIG", "data": "x".repeat(20_000)})).await;
        client.say(json!({"return": "x".repeat(20_000), "id": id})).await;
        let id = client.expect("query-block").await;
        client.send(format!("{{\"return\": nonsense, \"id\": {id}}}\n").as_bytes()).await;
        let id = client.expect("query-block").await;
        client
            .send(&[b"{\"return\": \"\xff\xfe\", \"id\": ", id.to_string().as_bytes(), b"}\n"].concat())
            .await;
        let id = client.expect("query-block").await;
        client
            .send(
                format!("{{\"id\": {id}, \"return\": {}1{}}}\n", "[".repeat(600), "]".repeat(600)).as_bytes(),
            )
            .await;
        client
    };
    let commands = async {
        let mut kinds = Vec::new();
        for _ in 0..4 {
            let error = qmp.execute_raw("query-block", Value::Null).await.expect_err("it cannot be read");
            assert!(error.may_have_run() && error.to_string().contains("still usable"), "{error}");
            kinds.push(error.kind());
        }
        kinds
    };
    let (mut client, kinds) = tokio::join!(serve, commands);
    assert_eq!(kinds, [ErrorKind::TooLong, ErrorKind::Reply, ErrorKind::Reply, ErrorKind::Reply]);
    works(&mut client, &qmp).await;
}

/// A reply of another form than its type is an error, and the connection stays.
#[tokio::test(start_paused = true)]
async fn reply_of_another_form_is_an_error() {
    let server = Server::new();
    let (mut client, qmp) = server.greeted(Options::default()).await;
    let serve = async {
        let id = client.expect("query-status").await;
        client.reply(&id, json!({"running": true, "status": "levitating"})).await;
        client
    };
    let (mut client, reply) = tokio::join!(serve, qmp.execute(query_status {}));
    let error = reply.expect_err("an enum value that is not known");
    assert_eq!(error.kind(), ErrorKind::Reply);
    assert!(error.to_string().contains("levitating") && error.to_string().contains("execute_raw"), "{error}");
    works(&mut client, &qmp).await;
}

/// Arguments that are not an object are refused before they are sent.
#[tokio::test(start_paused = true)]
async fn arguments_must_be_an_object() {
    let server = Server::new();
    let (client, qmp) = server.greeted(Options::default()).await;
    let error = qmp.execute_raw("stop", json!([1])).await.expect_err("a list");
    assert_eq!((error.kind(), error.may_have_run()), (ErrorKind::Invalid, false));
    drop(qmp);
    assert_eq!(client.rest().await, b"", "nothing was sent");
}

/// A slow subscriber loses the oldest events, gets their number, and delays no other.
#[tokio::test(start_paused = true)]
async fn slow_subscriber_loses_the_oldest_events() {
    let server = Server::new();
    let (mut client, qmp) = server.greeted(options(|options| options.event_ring = 64)).await;
    let mut slow = qmp.events();
    let flood: String = (0..100_000).map(|n| format!("{}\n", json!({"event": "E", "data": n}))).collect();
    let serve = async {
        let id = client.expect("query-status").await;
        client.send(flood.as_bytes()).await;
        client.reply(&id, status()).await;
        client
    };
    let (mut client, reply) = tokio::join!(serve, qmp.execute(query_status {}));
    reply.expect("the reply comes through");
    let Ok(Notice::Missed(missed)) = slow.next().await else { panic!("nothing was missed") };
    for expected in missed..100_000 {
        let Ok(Notice::Event(event)) = slow.next().await else { panic!("the rest is there") };
        assert_eq!(event.data, json!(expected), "what is left is in order");
    }
    assert_eq!(missed, 100_000 - 64);
    works(&mut client, &qmp).await;
    drop(client);
    assert_eq!(slow.next().await.expect_err("the end").kind(), ErrorKind::Lost);
    assert_eq!(qmp.events().next().await.expect_err("a subscription after the end").kind(), ErrorKind::Lost);
}

/// A QEMU that hangs cannot make the number of waiting commands grow without limit.
#[tokio::test(start_paused = true)]
async fn waiting_commands_are_limited() {
    let server = Server::new();
    let (mut client, qmp) = server.greeted(Options::default()).await;
    let brief = qmp.within(Duration::from_millis(10));
    for _ in 0..256 {
        assert!(brief.execute_raw("poll", Value::Null).await.expect_err("it hangs").may_have_run());
    }
    let error = brief.execute_raw("poll", Value::Null).await.expect_err("no place");
    assert!(error.kind() == ErrorKind::Timeout && !error.may_have_run(), "{error}");
    for _ in 0..256 {
        let id = client.expect("poll").await;
        client.reply(&id, json!({})).await;
    }
    works(&mut client, &qmp).await;
}

#[tokio::test(start_paused = true)]
async fn other_socket_differs_from_silent_monitor() {
    let server = Server::new();
    let path = server.path();
    let cases: [(&[u8], bool, ErrorKind, &str); 6] = [
        (b"", false, ErrorKind::Timeout, "one client"),
        (b"", true, ErrorKind::Protocol, "closed the connection"),
        (b"{\"QMP\": {\"vers", true, ErrorKind::Protocol, "inside a line, after 14 bytes"),
        (
            b"QEMU 10.0.2 monitor - type 'help' for more information\r\n(qemu) ",
            false,
            ErrorKind::Protocol,
            "not a QMP greeting",
        ),
        (b"\xff\xff\x00\n", false, ErrorKind::Protocol, "\\xff\\xff"),
        (b"{\"return\": {}}\n{\"event\": \"X\"}\n", false, ErrorKind::Timeout, "1 lines were not understood"),
    ];
    for (bytes, close, kind, message) in cases {
        let serve = async {
            let mut client = server.accept().await;
            client.send(bytes).await;
            (!close).then_some(client)
        };
        let (_client, connected) = tokio::join!(serve, Qmp::connect(&path));
        let error = connected.expect_err("no monitor");
        assert!(error.kind() == kind && error.to_string().contains(message), "{error}");
    }
    let error = Qmp::connect(server.dir.path().join("nothing")).await.expect_err("no such file");
    assert!(error.kind() == ErrorKind::Connect && error.to_string().contains("check the path"), "{error}");
    drop(server);
}

#[tokio::test(start_paused = true)]
async fn a_greeting_of_another_form_is_a_greeting() {
    let server = Server::new();
    let serve = async {
        let mut client = server.accept().await;
        // A leftover of the previous client, and a greeting without the expected members.
        client.say(json!({"return": {}, "id": "libvirt-7"})).await;
        client.say(json!({"QMP": {"capabilities": "none", "version": {"qemu": "eleven"}}})).await;
        let command = client.line().await.expect("a command");
        assert!(command["execute"] == "qmp_capabilities" && command.get("arguments").is_none(), "{command}");
        client.reply(&command["id"], json!({})).await;
        client
    };
    let path = server.path();
    let (mut client, qmp) = tokio::join!(serve, Qmp::connect(&path));
    let qmp = qmp.expect("it connects");
    assert!(qmp.greeting().version.is_none() && qmp.greeting().capabilities.is_empty() && !qmp.has_oob());
    works(&mut client, &qmp).await;
}

/// A socket that closes after any byte is an error, and never a hang.
#[tokio::test(start_paused = true)]
async fn socket_closed_at_any_byte_is_an_error() {
    let server = Server::new();
    let path = server.path();
    let greeting = format!("{}\r\n", greeting());
    let mut kinds = std::collections::BTreeMap::<String, usize>::new();
    let mut cut = 0;
    let answered = loop {
        // Sends no more than `cut` bytes in all, then closes.
        let serve = async {
            let mut client = server.accept().await;
            let mut left = cut;
            let mut text = greeting.clone();
            loop {
                let part = &text.as_bytes()[..left.min(text.len())];
                client.send(part).await;
                left -= part.len();
                if part.len() < text.len() || left == 0 {
                    break;
                }
                let Some(command) = client.line().await else { break };
                let event = json!({"event": "E", "data": {}});
                text = format!("{event}\r\n{}\r\n", json!({"return": status(), "id": command["id"]}));
            }
        };
        let use_it = async {
            let qmp = Qmp::connect(&path).await.map_err(|error| ("connect", error))?;
            let status = qmp.execute(query_status {}).await.map_err(|error| ("execute", error))?;
            assert!(status.running);
            qmp.execute(query_status {}).await.map_err(|error| ("again", error))
        };
        let ((), outcome) = tokio::join!(serve, use_it);
        let (at, error) = outcome.expect_err("it closes before the last reply");
        let expected = matches!(error.kind(), ErrorKind::Lost | ErrorKind::Protocol);
        assert!(expected, "after {cut} bytes: {error}");
        *kinds.entry(format!("{at} {:?}", error.kind())).or_default() += 1;
        if at == "again" {
            break true;
        }
        cut += 1;
        assert!(cut < 1000, "{kinds:?}");
    };
    assert!(
        answered && kinds.contains_key("connect Protocol") && kinds.contains_key("connect Lost"),
        "{kinds:?}"
    );
    assert!(kinds.get("execute Lost").is_some_and(|&count| count > 50), "{kinds:?}");
}

/// Each waiting caller gets an error when the socket is lost, with the information if its command was sent.
#[tokio::test(start_paused = true)]
async fn all_callers_learn_of_a_lost_socket() {
    let server = Server::new();
    let (mut client, qmp) = server.greeted(Options::default()).await;
    let serve = async {
        client.expect("sent").await;
        // The next one is too big to be written completely.
        tokio::time::sleep(Duration::from_secs(1)).await;
        drop(client);
    };
    let sent = qmp.execute_raw("sent", Value::Null);
    let half = qmp.execute_raw("half", json!({"a": "x".repeat(8 << 20)}));
    let queued = qmp.execute_raw("queued", Value::Null);
    let ((), sent, half, queued) = tokio::join!(serve, sent, half, queued);
    for (outcome, may_have_run) in [(sent, Some(true)), (half, None), (queued, Some(false))] {
        let error = outcome.expect_err("the socket is lost");
        assert_eq!(error.kind(), ErrorKind::Lost, "{error}");
        assert!(may_have_run.is_none_or(|expected| error.may_have_run() == expected), "{error}");
        assert!(error.to_string().contains("reconnect, and reconcile"), "{error}");
    }
    qmp.closed().await;
    assert!(qmp.is_closed());
}

/// A reconnect waits for the socket and reads QEMU's current state.
#[tokio::test(start_paused = true)]
async fn reconnect_waits_and_reads_the_state() {
    let server = Server::new();
    let (client, qmp) = server.greeted(Options::default()).await;
    drop(client);
    qmp.closed().await;
    let serve = async {
        // The server accepts and ends, like a QEMU that is being stopped: the client tries again.
        drop(server.accept().await);
        let mut client = server.accept().await;
        client.greet().await;
        let id = client.expect("query-status").await;
        client.reply(&id, json!({"running": false, "status": "levitating"})).await;
        let id = client.expect("query-jobs").await;
        let job = json!({"id": "j", "type": "alchemy", "status": "pending", "current-progress": 3, "total-progress": -1});
        let odd = json!({"id": "k", "type": "commit", "status": "transcended", "current-progress": 0, "total-progress": 9, "error": "e"});
        client.reply(&id, json!([job, odd])).await;
        let id = client.expect("query-block").await;
        let node = json!({"node-name": "d0", "drv": "qcow2", "file": "/a", "ro": false, "backing_file": "/b", "new": 1});
        client
            .reply(&id, json!([{"device": "", "qdev": "vd0", "removable": false, "locked": false, "type": "unknown", "inserted": node}]))
            .await;
        client
    };
    let (mut client, again) = tokio::join!(serve, qmp.reconnect(Duration::from_secs(5)));
    let (again, now) = again.expect("it is served again");
    assert_eq!((now.same_process, now.running, now.run_state.as_str()), (Some(true), false, "levitating"));
    let job = now.job("j").expect("the job");
    assert_eq!(
        (&job.status, job.current, job.total, job.kind.as_str()),
        (&JobStatus::Pending, 3, 0, "alchemy")
    );
    assert_eq!(now.job("k").map(|job| &job.status), Some(&JobStatus::Other("transcended".to_owned())));
    let inserted = now.drives[0].inserted.as_ref().expect("a medium");
    assert_eq!((inserted.node.as_deref(), inserted.backing_file.as_deref()), (Some("d0"), Some("/b")));
    works(&mut client, &again).await;

    drop((server, client));
    let error = again.reconnect(Duration::from_millis(200)).await.expect_err("no server");
    assert_eq!(error.kind(), ErrorKind::Connect);
}

/// A reconciliation never skips a job that it cannot read.
#[tokio::test(start_paused = true)]
async fn unreadable_job_fails_a_reconciliation() {
    let server = Server::new();
    let (mut client, qmp) = server.greeted(Options::default()).await;
    let serve = async {
        let id = client.expect("query-status").await;
        client.reply(&id, status()).await;
        let id = client.expect("query-jobs").await;
        client.reply(&id, json!([{"id": 5, "type": "commit"}])).await;
        let id = client.expect("query-block").await;
        client.reply(&id, json!([])).await;
    };
    let ((), reconciled) = tokio::join!(serve, qmp.reconcile());
    let error = reconciled.expect_err("a job without a status");
    assert_eq!((error.kind(), error.attempted()), (ErrorKind::Reply, "query-jobs"));
}

/// A command with a descriptor waits until the previous one took its own.
#[tokio::test(start_paused = true)]
async fn descriptors_are_sent_one_at_a_time() {
    let server = Server::new();
    let (mut client, qmp) = server.greeted(Options::default()).await;
    let serve = async {
        let first = client.expect("getfd").await;
        let plain = client.expect("query-status").await;
        client.reply(&plain, status()).await;
        let second = tokio::time::timeout(Duration::from_secs(5), client.line()).await;
        second.expect_err("the second descriptor is held back");
        client.reply(&first, json!({})).await;
        let second = client.expect("getfd").await;
        client.reply(&second, json!({})).await;
    };
    let null = std::fs::File::open("/dev/null").expect("open");
    let plain = async {
        tokio::task::yield_now().await;
        qmp.execute(query_status {}).await
    };
    let ((), first, second, plain) =
        tokio::join!(serve, qmp.get_fd("a", &null), qmp.get_fd("b", &null), plain);
    first.and(second).expect("both are taken");
    plain.expect("a command without one does not wait");
}
