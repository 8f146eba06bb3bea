//! The one way to start a thread here.

use std::io;
use std::thread::{Builder, JoinHandle};

/// Stack of each thread, bytes. Ours are shallow; and a stack of the usual 2 MiB can be given one huge page at its
/// first touch, which would be most of the memory that this program needs.
const STACK_BYTES: usize = 256 << 10;

/// Starts a thread with a name, which `ps -L` and the log show.
///
/// # Errors
/// When the host gives no more threads.
pub fn spawn<T: Send + 'static>(
    name: impl Into<String>,
    body: impl FnOnce() -> T + Send + 'static,
) -> io::Result<JoinHandle<T>> {
    Builder::new()
        .name(name.into())
        .stack_size(STACK_BYTES)
        .spawn(crate::simulation::enrol(body))
}
