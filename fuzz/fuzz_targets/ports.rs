#![no_main]

libfuzzer_sys::fuzz_target!(|input: &[u8]| actor_vmm::virtio::fuzz::ports(input));
