#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| floe_agent::fuzz::pack(bytes));
