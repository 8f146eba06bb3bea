//! The built program as a user calls it: what can be wrong with the input and the host, where the console goes, how it
//! ends, and what it leaves behind.

#[path = "cli/config.rs"]
mod config;
#[path = "cli/console.rs"]
mod console;
#[path = "cli/ends.rs"]
mod ends;
#[path = "cli/guest.rs"]
mod guest;
#[path = "cli/host.rs"]
mod host;
#[path = "cli/input.rs"]
mod input;
#[path = "host/kvm.rs"]
mod kvm;
#[path = "cli/process.rs"]
mod process;
#[path = "cli/streams.rs"]
mod streams;
#[path = "cli/terminal.rs"]
mod terminal;
