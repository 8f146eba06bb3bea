//! A tap interface of the host, and its queues. [Documentation/networking/tuntap.rst of Linux]
//!
//! The interface is there already, and stays: who makes it decides who may open it and what it is connected to. Each queue
//! pair of the device is a queue of the tap, with a descriptor of its own. A queue that the driver does not use is detached,
//! or the host would send flows there that nobody takes.
//!
//! # Queues that are not in use
//!
//! A read from a detached queue fails with EBADFD, as one from an interface that was deleted does. Which of the two it
//! is tells the word `used`: how many pairs are in use, and how often that has changed. It says that a queue is not in
//! use before it is detached, and that it is after it is attached. So a queue that was in use before the read and, with no
//! change, after it was attached all the time, and the interface is gone. `Release` on every change and `Acquire` on every
//! look order the word with the system calls.

use super::{HEADER_BYTES, Pair, Received, Sent, Sink, Source, offload};
use nix::errno::Errno;
use nix::net::if_::if_nametoindex;
use std::fs::{File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::os::unix::fs::OpenOptionsExt;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use vmm_sys_util::eventfd::EventFd;

const DEVICE: &str = "/dev/net/tun";

/// Why a tap cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum TapError {
    /// It is not there.
    #[error(
        "--net tap={0}: there is no such interface; `ip tuntap add dev {0} mode tap user $USER && ip link set {0} up` makes it"
    )]
    NoSuch(String),
    /// No tun driver.
    #[error("--net tap={0}: {DEVICE} cannot be opened; does this host have the module tun?")]
    NoDriver(String, #[source] io::Error),
    /// Not ours.
    #[error(
        "--net tap={0}: this user may not use it; `ip tuntap add dev {0} mode tap user $USER` makes one that may be"
    )]
    Denied(String),
    /// Somebody else has it.
    #[error("--net tap={0}: another program uses it")]
    Busy(String),
    /// Another kind of interface, or one with another number of queues.
    #[error("--net tap={0}: it is not a tap{more}", more = if *.1 { " with several queues, which queues= needs: `ip tuntap add dev NAME mode tap multi_queue` makes one" } else { "" })]
    Kind(String, bool),
    /// Anything else.
    #[error("--net tap={0}: the host does not let us use it")]
    Other(String, #[source] io::Error),
}

impl TapError {
    /// Whether the user can mend it with other input.
    pub fn is_bad_input(&self) -> bool {
        !matches!(self, TapError::NoDriver(..) | TapError::Other(..))
    }
}

struct Shared {
    files: Vec<File>,
    /// Of each queue: rings when it comes to be used.
    wakes: Vec<EventFd>,
    /// Low half: how many pairs are in use. High half: how often that has changed.
    used: AtomicU64,
}

fn pairs_of(used: u64) -> usize {
    used as u32 as usize
}

/// A tap that was opened.
#[derive(Clone)]
pub struct Tap(Arc<Shared>);

impl Tap {
    /// Opens so many queues of a tap, of which the first is in use.
    ///
    /// # Errors
    /// [`TapError`].
    pub fn open(name: &str, pairs: u16) -> Result<(Tap, Vec<TapQueue>), TapError> {
        let owned = || name.to_owned();
        // The driver would make one.
        if_nametoindex(name).map_err(|_| TapError::NoSuch(owned()))?;
        let several = pairs > 1;
        let mut files = Vec::new();
        for number in 0..pairs {
            let file = OpenOptions::new()
                .read(true)
                .write(true)
                .custom_flags(libc::O_NONBLOCK | libc::O_CLOEXEC)
                .open(DEVICE)
                .map_err(|error| TapError::NoDriver(owned(), error))?;
            let mut done = attach_to(&file, name, several);
            // One that has several queues can be used with one.
            if done == Err(Errno::EINVAL) && !several {
                done = attach_to(&file, name, true);
            }
            let queue = done.and_then(|()| match number {
                0 => prepare(&file),
                _ => use_queue(&file, false),
            });
            queue.map_err(|errno| match errno {
                Errno::EPERM | Errno::EACCES => TapError::Denied(owned()),
                Errno::EBUSY => TapError::Busy(owned()),
                Errno::EINVAL => TapError::Kind(owned(), several),
                errno => TapError::Other(owned(), errno.into()),
            })?;
            files.push(file);
        }
        let wakes = files.iter().map(|_| EventFd::new(libc::EFD_NONBLOCK));
        let shared = Arc::new(Shared {
            wakes: wakes
                .collect::<io::Result<_>>()
                .map_err(|error| TapError::Other(owned(), error))?,
            files,
            used: AtomicU64::new(1),
        });
        let queues = (0..usize::from(pairs)).map(|number| TapQueue {
            tap: shared.clone(),
            number,
        });
        let queues = queues.collect();
        Ok((Tap(shared), queues))
    }

    /// Uses so many queue pairs. Only one thread may call this.
    ///
    /// # Errors
    /// EINVAL: so many there are not. Else the host's; then as many are in use as before, or fewer.
    pub fn use_pairs(&self, pairs: u16) -> Result<(), Errno> {
        let Shared { files, wakes, used } = &*self.0;
        let pairs = usize::from(pairs);
        if !(1..=files.len()).contains(&pairs) {
            return Err(Errno::EINVAL);
        }
        let before = used.load(Ordering::Relaxed);
        let publish = |pairs: usize| {
            let changes = (before >> 32).wrapping_add(1);
            used.store(changes << 32 | pairs as u64, Ordering::Release);
        };
        let old = pairs_of(before);
        if pairs < old {
            publish(pairs);
            for file in &files[pairs..old] {
                use_queue(file, false)?;
            }
        } else if pairs > old {
            for (number, file) in files.iter().enumerate().take(pairs).skip(old) {
                if let Err(errno) = use_queue(file, true) {
                    for file in &files[old..number] {
                        let _ = use_queue(file, false);
                    }
                    return Err(errno);
                }
            }
            publish(pairs);
            for wake in &wakes[old..pairs] {
                // Fails only when the counter is full, and then it rings already.
                let _ = wake.write(1);
            }
        }
        Ok(())
    }
}

/// Makes a descriptor a queue of the tap.
fn attach_to(file: &File, name: &str, several: bool) -> Result<(), Errno> {
    let mut flags = libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR;
    if several {
        flags |= libc::IFF_MULTI_QUEUE;
    }
    let mut request = request(flags);
    // Shorter than the place, so a NUL stays behind it.
    for (to, from) in request.ifr_name.iter_mut().zip(name.bytes()) {
        *to = from as libc::c_char;
    }
    // SAFETY: TUNSETIFF reads and writes the structure, which is ours.
    let result = unsafe { libc::ioctl(file.as_raw_fd(), libc::TUNSETIFF, &mut request) };
    Errno::result(result).map(drop)
}

fn request(flags: libc::c_int) -> libc::ifreq {
    // SAFETY: all zero is a valid value of this structure of numbers.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    request.ifr_ifru.ifru_flags = flags as libc::c_short;
    request
}

/// Says how long the header is, and that nobody accepts offloads yet.
fn prepare(file: &File) -> Result<(), Errno> {
    let bytes = HEADER_BYTES as libc::c_int;
    // SAFETY: TUNSETVNETHDRSZ reads the number, which is ours.
    Errno::result(unsafe { libc::ioctl(file.as_raw_fd(), libc::TUNSETVNETHDRSZ, &bytes) })?;
    set_offload(file, 0)
}

fn set_offload(file: &File, offloads: libc::c_uint) -> Result<(), Errno> {
    // SAFETY: TUNSETOFFLOAD takes a number.
    let result = unsafe {
        libc::ioctl(
            file.as_raw_fd(),
            libc::TUNSETOFFLOAD,
            libc::c_ulong::from(offloads),
        )
    };
    Errno::result(result).map(drop)
}

/// Attaches a queue, or detaches it.
fn use_queue(file: &File, used: bool) -> Result<(), Errno> {
    let request = request(if used {
        libc::IFF_ATTACH_QUEUE
    } else {
        libc::IFF_DETACH_QUEUE
    });
    // SAFETY: TUNSETQUEUE reads the structure, which is ours.
    Errno::result(unsafe { libc::ioctl(file.as_raw_fd(), libc::TUNSETQUEUE, &request) }).map(drop)
}

/// One queue.
pub struct TapQueue {
    tap: Arc<Shared>,
    number: usize,
}

impl TapQueue {
    /// Its two directions.
    pub fn pair(self) -> Pair {
        let sink = End {
            tap: self.tap.clone(),
            number: self.number,
            unused: false,
        };
        let source = End {
            tap: self.tap,
            number: self.number,
            unused: false,
        };
        (Box::new(source), Box::new(sink))
    }
}

/// A direction of a queue.
struct End {
    tap: Arc<Shared>,
    number: usize,
    /// It waits for being used.
    unused: bool,
}

impl End {
    fn file(&self) -> &File {
        &self.tap.files[self.number]
    }

    fn used(&self) -> u64 {
        self.tap.used.load(Ordering::Acquire)
    }

    fn is_used(&self, used: u64) -> bool {
        self.number < pairs_of(used)
    }
}

impl Source for End {
    fn start(&mut self, features: u64) {
        // One for all queues: they begin with the same features. A tap that refuses is gone, which the next read finds.
        if self.number == 0 {
            let _ = set_offload(self.file(), offload::for_tap(features));
        }
    }

    fn receive(&mut self, packet: &mut [u8]) -> Received {
        loop {
            // Emptied before the look, so that a ring after it is heard.
            if std::mem::take(&mut self.unused) {
                let _ = self.tap.wakes[self.number].read();
            }
            let before = self.used();
            if !self.is_used(before) {
                self.unused = true;
                return Received::Nothing;
            }
            return match self.file().read(packet) {
                Ok(bytes) => Received::Packet(bytes),
                Err(error) => match error.raw_os_error() {
                    Some(libc::EAGAIN) => Received::Nothing,
                    Some(libc::EINTR) => continue,
                    Some(libc::EBADFD) if self.used() != before => continue,
                    Some(libc::EBADFD) => Received::Lost("somebody has deleted it".into()),
                    _ => Received::Lost(error.to_string()),
                },
            };
        }
    }

    fn fd(&self) -> BorrowedFd<'_> {
        if self.unused {
            let wake = &self.tap.wakes[self.number];
            // SAFETY: the descriptor belongs to the eventfd, which lives as long as what is returned.
            unsafe { BorrowedFd::borrow_raw(wake.as_raw_fd()) }
        } else {
            self.file().as_fd()
        }
    }
}

impl Sink for End {
    fn send(&mut self, packet: &mut [u8], _given: usize) -> Sent {
        loop {
            let before = self.used();
            if !self.is_used(before) {
                return Sent::Done;
            }
            return match self.file().write(packet) {
                Ok(_) => Sent::Done,
                Err(error) => match error.raw_os_error() {
                    Some(libc::EAGAIN) => Sent::Part(0),
                    Some(libc::EINTR) => continue,
                    Some(libc::EBADFD) if self.used() != before => continue,
                    Some(libc::EBADFD) => Sent::Lost("somebody has deleted it".into()),
                    // A header that makes no sense, an interface that is down, no memory: the frame is dropped.
                    _ => Sent::Done,
                },
            };
        }
    }

    fn fd(&self) -> BorrowedFd<'_> {
        self.file().as_fd()
    }
}

#[cfg(test)]
mod tests;
