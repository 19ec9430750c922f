#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| nbd_server::fuzz::session(bytes));
