//! The bytes on the wire, by a client that is nothing but bytes.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::time::{Duration, Instant};

use camino::{Utf8Path, Utf8PathBuf};
use nbd_server::{
    Content, ErrorKind, Extent, Format, Image, Layer, Loan, Place, RawFile, Result, Running, Served, Server,
    Zeroing, ask, control_path, server_of,
};
use serde_json::json;

const SIZE: u64 = 1 << 20;

/// An image that waits where the test says so.
struct Slow(RawFile, Duration);

impl Image for Slow {
    fn size(&self) -> u64 {
        self.0.size()
    }
    fn read_at(&self, buf: &mut [u8], offset: u64) -> std::io::Result<()> {
        std::thread::sleep(self.1);
        self.0.read_at(buf, offset)
    }
    fn write_at(&self, buf: &[u8], offset: u64) -> std::io::Result<()> {
        self.0.write_at(buf, offset)
    }
    fn zero(&self, offset: u64, length: u64, how: Zeroing) -> std::io::Result<()> {
        self.0.zero(offset, length, how)
    }
    fn trim(&self, offset: u64, length: u64) -> std::io::Result<()> {
        self.0.trim(offset, length)
    }
    fn flush(&self) -> std::io::Result<()> {
        self.0.flush()
    }
    fn map(&self, offset: u64, _: u64, _: usize) -> std::io::Result<Vec<Extent>> {
        let half = SIZE / 2;
        let content = if offset < half { Content::Data } else { Content::Hole };
        // More than was asked for: the server cuts it.
        Ok(vec![Extent { length: half, content }, Extent { length: half, content: Content::Zero }])
    }
}

struct Files;

impl Files {
    fn open_file(&self, path: &Utf8Path, pause: Duration, read_only: bool) -> Served {
        use std::os::unix::fs::MetadataExt;
        let file = std::fs::File::options().read(true).write(true).open(path).unwrap();
        let about = file.metadata().unwrap();
        let layer = Layer { file: path.to_owned(), device: about.dev(), inode: about.ino() };
        let raw = RawFile::new(file, about.len(), read_only);
        let image: Arc<dyn Image> = if pause.is_zero() { Arc::new(raw) } else { Arc::new(Slow(raw, pause)) };
        Served { image, path: path.to_owned(), format: "raw".into(), snapshot: None, layers: vec![layer] }
    }
}

impl Format for Files {
    fn open(&self, image: &Utf8Path) -> Result<Served> {
        Ok(self.open_file(image, Duration::ZERO, false))
    }
}

/// A server over a file, and a client's side of it.
struct Fixture {
    socket: Utf8PathBuf,
    directory: Utf8PathBuf,
    running: Option<Running>,
    _kept: tempfile::TempDir,
}

impl Fixture {
    fn new() -> Self {
        Self::with(Duration::ZERO, false)
    }

    fn with(pause: Duration, read_only: bool) -> Self {
        let kept = tempfile::tempdir_in("/var/tmp").unwrap();
        let directory = Utf8PathBuf::from_path_buf(kept.path().to_owned()).unwrap();
        let (image, socket) = (directory.join("a.raw"), directory.join("s"));
        std::fs::File::create(&image).unwrap().set_len(SIZE).unwrap();
        let server = Server::new(Files.open_file(&image, pause, read_only), Box::new(Files));
        let places = (Place::create(&socket).unwrap(), Place::create(&control_path(&socket)).unwrap());
        let running = Some(server.start(places.0, places.1).unwrap());
        Self { socket, directory, running, _kept: kept }
    }

    /// A client that has read the greeting and sent its flags.
    fn greeted(&self) -> Client {
        let mut client = Client(UnixStream::connect(&self.socket).unwrap());
        client.0.set_read_timeout(Some(Duration::from_secs(30))).unwrap();
        client.expect(b"NBDMAGICIHAVEOPT\0\x03");
        client.send(&[&3u32.to_be_bytes()]);
        client
    }

    /// A client in the transmission.
    fn client(&self, structured: bool) -> Client {
        let mut client = self.greeted();
        if structured {
            client.option(8, b"");
            assert_eq!(client.reply(), (8, 1, vec![]));
            let mut query = vec![0, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0, 15];
            query.extend(b"base:allocation");
            client.option(10, &query);
            assert_eq!(client.reply(), (10, 4, b"\0\0\0\x01base:allocation".to_vec()));
            assert_eq!(client.reply(), (10, 1, vec![]));
        }
        client.option(7, &[0; 6]);
        let (_, kind, export) = client.reply();
        assert_eq!((kind, export.len()), (3, 12));
        let (_, kind, blocks) = client.reply();
        assert_eq!((kind, blocks.len()), (3, 14));
        assert_eq!(client.reply(), (7, 1, vec![]));
        client
    }

    fn ask(&self, request: serde_json::Value) -> Result<serde_json::Value> {
        ask(&control_path(&self.socket), &request, Duration::from_secs(30))
    }
}

struct Client(UnixStream);

impl Client {
    fn send(&mut self, parts: &[&[u8]]) {
        self.0.write_all(&parts.concat()).unwrap();
    }

    fn get(&mut self, length: usize) -> Vec<u8> {
        let mut bytes = vec![0; length];
        self.0.read_exact(&mut bytes).unwrap();
        bytes
    }

    fn expect(&mut self, bytes: &[u8]) {
        assert_eq!(self.get(bytes.len()), bytes);
    }

    fn is_closed(&mut self) -> bool {
        matches!(self.0.read(&mut [0]), Ok(0) | Err(_))
    }

    fn option(&mut self, option: u32, data: &[u8]) {
        let length = (data.len() as u32).to_be_bytes();
        self.send(&[b"IHAVEOPT", &option.to_be_bytes(), &length, data]);
    }

    /// The option, the kind and the data of a reply.
    fn reply(&mut self) -> (u32, u32, Vec<u8>) {
        self.expect(&0x0003_e889_0455_65a9u64.to_be_bytes());
        let number = |bytes: Vec<u8>| u32::from_be_bytes(bytes.try_into().unwrap());
        let (option, kind) = (number(self.get(4)), number(self.get(4)));
        let length = number(self.get(4));
        (option, kind, self.get(length as usize))
    }

    fn request(&mut self, flags: u16, kind: u16, offset: u64, length: u32, data: &[u8]) {
        self.send(&[
            &0x2560_9513u32.to_be_bytes(),
            &flags.to_be_bytes(),
            &kind.to_be_bytes(),
            &7u64.to_be_bytes(),
            &offset.to_be_bytes(),
            &length.to_be_bytes(),
            data,
        ]);
    }

    /// The error number of a simple reply.
    fn simple(&mut self) -> u32 {
        self.expect(&0x6744_6698u32.to_be_bytes());
        let number = u32::from_be_bytes(self.get(4).try_into().unwrap());
        self.expect(&7u64.to_be_bytes());
        number
    }

    /// The kind and the data of a structured reply of one chunk.
    fn chunk(&mut self) -> (u16, Vec<u8>) {
        self.expect(&0x668e_33efu32.to_be_bytes());
        self.expect(&[0, 1]);
        let kind = u16::from_be_bytes(self.get(2).try_into().unwrap());
        self.expect(&7u64.to_be_bytes());
        let length = u32::from_be_bytes(self.get(4).try_into().unwrap());
        (kind, self.get(length as usize))
    }
}

/// Data that was written is read back, by simple and by structured replies.
#[test]
fn written_data_is_read_back() {
    let fixture = Fixture::new();
    let mut client = fixture.client(false);
    client.request(1, 1, 4096, 3, b"abc");
    assert_eq!(client.simple(), 0);
    client.request(0, 3, 0, 0, b"");
    assert_eq!(client.simple(), 0);
    client.request(0, 0, 4095, 5, b"");
    assert_eq!(client.simple(), 0);
    client.expect(b"\0abc\0");
    client.request(0, 2, 0, 0, b"");
    assert!(client.is_closed());
    let mut client = fixture.client(true);
    client.request(0, 0, 4096, 3, b"");
    assert_eq!(client.chunk(), (1, b"\0\0\0\0\0\0\x10\0abc".to_vec()));
    client.request(0, 6, 4096, 2, b"");
    assert_eq!(client.simple(), 0);
    client.request(0, 0, 4096, 3, b"");
    assert_eq!(client.chunk(), (1, b"\0\0\0\0\0\0\x10\0\0\0c".to_vec()));
}

/// Requests that are not valid are answered with the specification's numbers, and the next one is understood.
#[test]
fn invalid_requests_are_refused() {
    let fixture = Fixture::new();
    let mut client = fixture.client(false);
    let big = vec![1; (32 << 20) + 1];
    for (flags, kind, offset, length, data, number) in [
        (0, 0, SIZE, 1, &b""[..], 22),
        (0, 0, u64::MAX, 1, b"", 22),
        (0, 0, SIZE - 1, 2, b"", 22),
        (0, 1, SIZE - 1, 2, b"xy", 28),
        (0, 6, SIZE - 1, 2, b"", 28),
        (0, 4, SIZE - 1, 2, b"", 22),
        (0, 0, 0, 0, b"", 22),
        (0, 0, 0, (32 << 20) + 1, b"", 22),
        (0, 1, 0, (32 << 20) + 1, &big, 22),
        (0x80, 0, 0, 1, b"", 22),
        (0, 7, 0, 1, b"", 22),
        (0, 99, 0, 1, b"", 22),
        (0, 3, 0, 1, b"", 22),
    ] {
        client.request(flags, kind, offset, length, data);
        assert_eq!(client.simple(), number, "{flags} {kind} {offset} {length}");
    }
    client.request(0, 0, 0, 1, b"");
    assert_eq!(client.simple(), 0);
    client.expect(b"\0");
    client.send(&[b"this is no request at all...."]);
    assert!(client.is_closed());
}

/// A read-only disk refuses every write with "not permitted", and allows a flush.
#[test]
fn read_only_disk_refuses_writes() {
    let fixture = Fixture::with(Duration::ZERO, true);
    let mut client = fixture.client(true);
    for (kind, data) in [(1, &b"x"[..]), (4, b""), (6, b"")] {
        client.request(0, kind, 0, 1, data);
        let (kind, error) = client.chunk();
        assert_eq!((kind, &error[..4]), (0x8001, &[0, 0, 0, 1][..]));
        assert_eq!(&error[6..], b"the export is read-only");
    }
    client.request(0, 3, 0, 0, b"");
    assert_eq!(client.simple(), 0);
}

/// Allocation is cut at the request's end, and to one extent on request.
#[test]
fn allocation_is_cut_to_the_request() {
    let fixture = Fixture::with(Duration::from_millis(1), false);
    let mut client = fixture.client(true);
    let half = SIZE as u32 / 2;
    let reported = |parts: &[u32]| parts.iter().flat_map(|part| part.to_be_bytes()).collect::<Vec<_>>();
    client.request(0, 7, 0, 4096, b"");
    assert_eq!(client.chunk(), (5, reported(&[1, 4096, 0])));
    client.request(0, 7, 0, SIZE as u32, b"");
    assert_eq!(client.chunk(), (5, reported(&[1, half, 0, half, 2])));
    client.request(8, 7, 0, SIZE as u32, b"");
    assert_eq!(client.chunk(), (5, reported(&[1, half, 0])));
    client.request(0, 7, u64::from(half), half, b"");
    assert_eq!(client.chunk(), (5, reported(&[1, half, 3])));
}

/// The options: listed, unknown, wrong, too long.
#[test]
fn options_are_answered_and_limited() {
    let fixture = Fixture::new();
    let mut client = fixture.greeted();
    client.option(3, b"");
    assert_eq!(client.reply(), (3, 2, vec![0; 4]));
    assert_eq!(client.reply(), (3, 1, vec![]));
    for (option, data, kind) in [
        (3, &b"x"[..], 0x8000_0003),
        (5, b"", 0x8000_0001),
        (11, b"", 0x8000_0001),
        (7, b"", 0x8000_0003),
        (7, b"\xff\xff\xff\xff\0\0", 0x8000_0003),
        (7, b"\0\0\0\x01x\0\0", 0x8000_0006),
        (10, b"\0\0\0\0\0\0\0\0", 0x8000_0003),
        (99, &[0; 5000], 0x8000_0009),
    ] {
        client.option(option, data);
        let reply = client.reply();
        assert_eq!((reply.0, reply.1), (option, kind));
        assert!(!reply.2.is_empty());
    }
    client.option(8, b"");
    assert_eq!(client.reply(), (8, 1, vec![]));
    // Contexts that do not exist are left out.
    client.option(10, b"\0\0\0\0\0\0\0\x01\0\0\0\x03a:b");
    assert_eq!(client.reply(), (10, 1, vec![]));
    client.option(2, b"");
    assert_eq!(client.reply(), (2, 1, vec![]));
    assert!(client.is_closed());
    for nonsense in [&b"IHAVEOPT\0\0\0\x63\xff\xff\xff\xff"[..], b"IHAVENOT\0\0\0\x03\0\0\0\0"] {
        let mut client = fixture.greeted();
        client.send(&[nonsense]);
        assert!(client.is_closed());
    }
}

/// A client of the first newstyle gets the size, the flags and 124 zeros.
#[test]
fn export_name_begins_the_transmission() {
    let fixture = Fixture::new();
    let mut client = Client(UnixStream::connect(&fixture.socket).unwrap());
    client.expect(b"NBDMAGICIHAVEOPT\0\x03");
    client.send(&[&1u32.to_be_bytes()]);
    client.option(1, b"");
    client.expect(&SIZE.to_be_bytes());
    client.expect(&0x08edu16.to_be_bytes());
    client.expect(&[0; 124]);
    client.request(0, 0, 0, 1, b"");
    assert_eq!(client.simple(), 0);
}

/// A second client is refused with a message; it may look at the export all the same.
#[test]
fn second_client_is_refused_with_a_message() {
    let fixture = Fixture::new();
    let mut first = fixture.client(false);
    let mut second = fixture.greeted();
    second.option(6, &[0; 6]);
    assert_eq!(second.reply().1, 3);
    assert_eq!(second.reply().1, 3);
    assert_eq!(second.reply().1, 1);
    second.option(7, &[0; 6]);
    let (option, kind, message) = second.reply();
    assert_eq!((option, kind), (7, 0x8000_0002));
    let message = String::from_utf8(message).unwrap();
    assert!(message.contains(&format!("process {}", std::process::id())), "{message}");
    first.request(0, 2, 0, 0, b"");
    assert!(first.is_closed());
    second.option(7, &[0; 6]);
    assert_eq!(second.reply().1, 3);
}

/// Clients that say nothing, or do not take their replies, do not delay the control socket or a hold.
#[test]
fn slow_clients_do_not_delay_the_control_socket() {
    let fixture = Fixture::new();
    let silent = UnixStream::connect(&fixture.socket).unwrap();
    let _silent_control = UnixStream::connect(control_path(&fixture.socket)).unwrap();
    let mut client = fixture.client(false);
    // Replies of 256 MiB that the client does not read, and half a request.
    for _ in 0..256 {
        client.request(0, 0, 0, 1 << 20, b"");
    }
    std::thread::sleep(Duration::from_millis(200));
    let begun = Instant::now();
    let hold = fixture.ask(json!({"do": "hold", "seconds": 5})).unwrap()["hold"].as_u64().unwrap();
    let info = fixture.ask(json!({"do": "info"})).unwrap();
    assert_eq!((info["held"].as_bool(), info["size"].as_u64()), (Some(true), Some(SIZE)));
    fixture.ask(json!({"do": "go", "hold": hold})).unwrap();
    assert!(begun.elapsed() < Duration::from_secs(4), "{:?}", begun.elapsed());
    drop(silent);
}

/// A swap leaves the client connected if the new image has the same size, and repeats as a success.
#[test]
fn swap_exchanges_the_image() {
    let fixture = Fixture::new();
    let other = fixture.directory.join("b.raw");
    std::fs::write(&other, vec![b'B'; SIZE as usize]).unwrap();
    let mut client = fixture.client(false);
    client.request(0, 1, 0, 1, b"A");
    assert_eq!(client.simple(), 0);
    for generation in [2, 2] {
        let answer = fixture.ask(json!({"do": "swap", "image": other})).unwrap();
        assert_eq!(answer["generation"].as_u64(), Some(generation));
        client.request(0, 0, 0, 1, b"");
        assert_eq!(client.simple(), 0);
        client.expect(b"B");
    }
    assert_eq!(std::fs::read(fixture.directory.join("a.raw")).unwrap()[0], b'A');
    // A larger one ends the connection: the client learns the size when it comes again.
    let larger = fixture.directory.join("c.raw");
    std::fs::File::create(&larger).unwrap().set_len(2 * SIZE).unwrap();
    fixture.ask(json!({"do": "swap", "image": larger})).unwrap();
    assert!(client.is_closed());
    let mut client = fixture.client(false);
    client.request(0, 0, SIZE, 1, b"");
    assert_eq!(client.simple(), 0);
}

/// A disk without a client is lent: the image is closed, and no other client gets the disk. It is opened by
/// its name when it is given back, and when the borrower ends, however that happens.
#[test]
fn disk_is_lent_until_the_borrower_ends() {
    let fixture = Fixture::new();
    let (image, control) = (fixture.directory.join("a.raw"), control_path(&fixture.socket));
    let info = || fixture.ask(json!({"do": "info"})).unwrap();
    let about = std::fs::metadata(&image).unwrap();
    let file = (std::os::unix::fs::MetadataExt::dev(&about), std::os::unix::fs::MetadataExt::ino(&about));
    assert_eq!(server_of(file).as_ref(), Some(&control));
    assert_eq!(server_of((file.0, file.1 + 1)), None);
    let client = fixture.client(false);
    let refused = Loan::ask(&control, &image).unwrap_err();
    assert_eq!(refused.kind(), ErrorKind::Busy);
    assert!(refused.to_string().contains(&std::process::id().to_string()), "{refused}");
    drop(client);
    for (number, gives_back) in [true, false, true, false].into_iter().enumerate() {
        let loan = Loan::ask(&control, &image).unwrap();
        let lent = info();
        assert_eq!(lent["layers"], json!([]), "{lent}");
        assert!(lent["detached"].as_str().unwrap().contains("lent to process"), "{lent}");
        // Neither a client nor another borrower comes meanwhile. Each waits for two seconds.
        if number == 0 {
            let mut client = fixture.greeted();
            client.option(7, &[0; 6]);
            assert_ne!(client.reply().1, 1);
            assert_eq!(Loan::ask(&control, &image).unwrap_err().kind(), ErrorKind::Busy);
        }
        // The name leads to another file by the end, of another size.
        let size = SIZE * (number as u64 + 2);
        let next = fixture.directory.join("next.raw");
        std::fs::File::create(&next).unwrap().set_len(size).unwrap();
        std::fs::rename(&next, &image).unwrap();
        match gives_back {
            true => loan.give_back().unwrap(),
            false => drop(loan),
        }
        let now = info();
        assert_eq!((now["size"].as_u64(), &now["detached"]), (Some(size), &json!(null)), "{now}");
        drop(fixture.client(false));
    }
    // A borrower that is killed has its connection closed by the kernel. Until the image can be opened, the
    // server tries.
    let mut killed = UnixStream::connect(&control).unwrap();
    killed.write_all(format!("{}\n", json!({"do": "lend", "image": image})).as_bytes()).unwrap();
    let mut answer = [0; 3];
    killed.read_exact(&mut answer).unwrap();
    drop(killed);
    let until = Instant::now() + Duration::from_secs(10);
    while info()["layers"] == json!([]) || !info()["client"].is_null() {
        assert!(Instant::now() < until, "{}", info());
        std::thread::sleep(Duration::from_millis(10));
    }
    drop(fixture.client(false));
    let refused = fixture.ask(json!({"do": "give-back"})).unwrap_err();
    assert_eq!(refused.kind(), ErrorKind::Refused);
}

/// What a format does not have is refused with a message; nonsense and long lines are, too.
#[test]
fn control_refuses_what_it_cannot_do() {
    let fixture = Fixture::new();
    let child = fixture.directory.join("child");
    let error = fixture.ask(json!({"do": "snapshot", "child": child, "id": "1"})).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Unsupported);
    for nonsense in [json!({"do": "fly"}), json!({"do": "info", "x": 1}), json!([]), json!({"do": "go"})] {
        assert_eq!(fixture.ask(nonsense).unwrap_err().kind(), ErrorKind::Invalid);
    }
    assert_eq!(fixture.ask(json!({"do": "go", "hold": 1})).unwrap_err().kind(), ErrorKind::Expired);
    let relative = fixture.ask(json!({"do": "swap", "image": "b.raw"})).unwrap_err();
    assert_eq!(relative.kind(), ErrorKind::Invalid);
    let mut long = UnixStream::connect(control_path(&fixture.socket)).unwrap();
    long.write_all(&[b' '; 4096]).unwrap();
    let mut answer = String::new();
    long.read_to_string(&mut answer).unwrap();
    assert!(answer.contains("4096 bytes"), "{answer}");
}

/// The end of a server disconnects the client and removes both names.
#[test]
fn stopped_server_leaves_no_names() {
    let mut fixture = Fixture::new();
    let mut client = fixture.client(false);
    fixture.running.take().unwrap().stop().unwrap();
    assert!(client.is_closed());
    assert!(!fixture.socket.exists());
    assert!(!control_path(&fixture.socket).exists());
}
