//! Each fuzz entry over seeds, and over the seeds with bytes changed, without a fuzzer.

#[path = "../../tests/fuzz/driver.rs"]
mod driver;

use nbd_server::fuzz;

fn option(number: u32, data: &[u8]) -> Vec<u8> {
    let length = (data.len() as u32).to_be_bytes();
    [&b"IHAVEOPT"[..], &number.to_be_bytes(), &length, data].concat()
}

fn request(flags: u16, kind: u16, offset: u64, length: u32) -> Vec<u8> {
    let head =
        [&0x2560_9513u32.to_be_bytes()[..], &flags.to_be_bytes(), &kind.to_be_bytes(), &[9; 8]].concat();
    [&head[..], &offset.to_be_bytes(), &length.to_be_bytes()].concat()
}

/// Every fuzz entry accepts its seeds, and what they turn into.
#[test]
fn fuzz_entries_accept_their_seeds_and_mutations() {
    let contexts = b"\0\0\0\0\0\0\0\x02\0\0\0\x0fbase:allocation\0\0\0\x05base:";
    let whole = [
        vec![0, 0, 0, 3],
        option(8, b""),
        option(9, contexts),
        option(10, contexts),
        option(6, b"\0\0\0\0\0\x02\0\x01\0\x03"),
        option(3, b""),
        option(7, &[0; 6]),
    ];
    let options = [
        whole.concat(),
        [vec![0, 0, 0, 1], option(1, b"")].concat(),
        [vec![0, 0, 0, 1], option(1, b"name")].concat(),
        [vec![0, 0, 0, 3], option(99, &[0; 5000]), option(2, b"")].concat(),
        [vec![0, 0, 0, 3], option(5, b""), option(7, b"\0\0\0\x01x\0\0")].concat(),
    ];
    let requests = [
        request(0, 0, 0, 512),
        request(1, 1, 4096, 1 << 20),
        request(0x1f, 6, u64::MAX, u32::MAX),
        request(8, 7, 512, 1 << 20),
        request(0, 3, 0, 0),
        request(1, 4, (1 << 20) - 512, 512),
    ];
    let controls = [
        r#"{"do":"info"}"#,
        r#"{"do":"hold","seconds":18446744073709551615}"#,
        r#"{"do":"go","hold":1}"#,
        r#"{"do":"swap","image":"/x","hold":null}"#,
        r#"{"do":"snapshot","child":"/x","id":"1"}"#,
    ]
    .map(|line| line.as_bytes().to_vec());
    let answers = [
        r#"{"version":1,"pid":7,"image":"/x","format":"vhd","snapshot":null,"layers":[{"file":"/x","device":1,
            "inode":2}],"size":512,"read_only":false,"generation":1,"held":false,"client":{"pid":-1}}"#,
    ]
    .map(|line| line.as_bytes().to_vec());
    let sessions = [
        [vec![3], request(0, 0, 0, 4096), request(8, 7, 0, 65536), request(0, 3, 0, 0)].concat(),
        [vec![1], request(1, 1, 512, 512), vec![5; 512], request(0, 0, 512, 512), request(0, 2, 0, 0)]
            .concat(),
        [vec![0], request(0, 6, 0, 65536), request(0x10, 6, 0, 512), request(0, 4, 512, 1024)].concat(),
        [vec![3], request(0, 0, 65536, 512), request(0, 1, 65024, 1024), vec![6; 1024]].concat(),
        [vec![3], request(0, 1, 0, u32::MAX), request(0, 7, 0, 0), request(0, 99, 0, 0)].concat(),
    ];
    driver::run("options", fuzz::options, &options, 10_000);
    driver::run("request", fuzz::request, &requests, 10_000);
    driver::run("control", fuzz::control, &[&controls[..], &answers].concat(), 10_000);
    driver::run("session", fuzz::session, &sessions, 500);
}
