#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| hypervisor_qemu::stream::fuzz_places(bytes));
