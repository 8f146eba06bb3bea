//! The same program inside a guest, as `io-meter`: what a request to a disk or a network takes, by the guest's clock.
//!
//! | command | what it measures |
//! |---|---|
//! | `io-meter disk FILE` | reads of 4 KiB at random places, one at a time and 16 at once; reads and writes of 128 KiB in order, 4 at once; past the guest's cache (O_DIRECT) |
//! | `io-meter net ADDRESS` | 64 bytes there and back over TCP, one at a time; 128 KiB at a time one way and the other |
//!
//! A line `figure: NAME ns=N` for each: nanoseconds a request, or at a percentile of the requests. Less is better.

use std::fs::{File, OpenOptions};
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::net::TcpStream;
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::ptr;
use std::time::Instant;

use anyhow::{Context, Result, bail, ensure};
use harness::figures::{Cost, Spread};

/// Where the other end of a network is.
pub const PORT: u16 = 5010;
/// The first byte of a connection: so many bytes to the host, or from it, or pings.
pub const UPWARDS: u8 = b'u';
pub const DOWNWARDS: u8 = b'd';
const PINGS: u8 = b'p';
pub const STREAM_BYTES: usize = 32 << 20;
pub const PING_BYTES: usize = 64;

const SMALL_BYTES: usize = 4 << 10;
const LARGE_BYTES: usize = 128 << 10;
const ONE_BY_ONE: usize = 1500;
const MANY: usize = 4000;
const LARGE: usize = 512;
const DEPTH: usize = 16;
const LARGE_DEPTH: usize = 4;
/// [linux/aio_abi.h: IOCB_CMD_PREAD, IOCB_CMD_PWRITE]
const PREAD: u16 = 0;
const PWRITE: u16 = 1;
/// What has not settled yet is not measured.
const WARM_UP: usize = 100;

pub fn main() -> Result<()> {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let args: Vec<&str> = args.iter().map(String::as_str).collect();
    match args.as_slice() {
        ["disk", path] => disk(path),
        ["net", address] => net(address),
        _ => bail!("io-meter disk FILE | net ADDRESS"),
    }
}

fn tell(name: &str, nanos: u64) {
    let name = name.to_owned();
    println!("figure: {}", Cost { name, nanos });
}

fn tell_latencies(name: &str, times: &mut [u64]) {
    let spread = Spread::of(name, times);
    tell(&format!("{name}-p50"), spread.p50);
    tell(&format!("{name}-p99"), spread.p99);
}

/// The same places each time.
struct Places(u64);

impl Places {
    fn next(&mut self, blocks: u64) -> u64 {
        self.0 = self
            .0
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 33) % blocks
    }
}

fn disk(path: &str) -> Result<()> {
    let file = OpenOptions::new()
        .read(true)
        .write(true)
        .custom_flags(libc::O_DIRECT)
        .open(path)
        .with_context(|| format!("cannot open {path}"))?;
    // The length of a block device is not in its metadata.
    let bytes = (&file).seek(SeekFrom::End(0))?;
    ensure!(bytes >= (LARGE * LARGE_BYTES) as u64, "{path} has {bytes} bytes");
    let mut place = Places(1);
    let mut small = Aligned::new(SMALL_BYTES)?;
    let mut times = Vec::with_capacity(ONE_BY_ONE);
    for number in 0..WARM_UP + ONE_BY_ONE {
        let at = place.next(bytes / SMALL_BYTES as u64) * SMALL_BYTES as u64;
        let start = Instant::now();
        file.read_exact_at(small.bytes(), at)?;
        if number >= WARM_UP {
            times.push(start.elapsed().as_nanos() as u64);
        }
    }
    tell_latencies("randread-4k-1", &mut times);
    let mut places = || place.next(bytes / SMALL_BYTES as u64) * SMALL_BYTES as u64;
    let cost = at_once(&file, PREAD, DEPTH, SMALL_BYTES, MANY, &mut places)?;
    tell("randread-4k-16", cost);
    for (name, kind) in [("read-128k-4", PREAD), ("write-128k-4", PWRITE)] {
        let mut next = 0;
        let mut places = || {
            next += LARGE_BYTES as u64;
            next - LARGE_BYTES as u64
        };
        tell(
            name,
            at_once(&file, kind, LARGE_DEPTH, LARGE_BYTES, LARGE, &mut places)?,
        );
    }
    Ok(())
}

/// Keeps so many requests under way, and returns nanoseconds a request.
fn at_once(
    file: &File,
    kind: u16,
    depth: usize,
    block_bytes: usize,
    count: usize,
    place: &mut dyn FnMut() -> u64,
) -> Result<u64> {
    let ring = Aio::new(depth)?;
    let mut buffers = (0..depth)
        .map(|_| Aligned::new(block_bytes))
        .collect::<Result<Vec<_>>>()?;
    // SAFETY: all zero is a valid value of this structure of numbers.
    let mut blocks: Vec<libc::iocb> = (0..depth).map(|_| unsafe { std::mem::zeroed() }).collect();
    let mut free: Vec<usize> = (0..depth).collect();
    let (mut begun, mut done) = (0, 0);
    let start = Instant::now();
    while done < count {
        let mut batch: Vec<*mut libc::iocb> = Vec::with_capacity(depth);
        while begun < count
            && let Some(slot) = free.pop()
        {
            let block = &mut blocks[slot];
            block.aio_data = slot as u64;
            block.aio_lio_opcode = kind;
            block.aio_fildes = file.as_raw_fd() as u32;
            block.aio_buf = buffers[slot].bytes().as_mut_ptr() as u64;
            block.aio_nbytes = block_bytes as u64;
            block.aio_offset = place() as i64;
            batch.push(block);
            begun += 1;
        }
        ring.submit(&mut batch)?;
        for slot in ring.wait(block_bytes)? {
            free.push(slot);
            done += 1;
        }
    }
    Ok(start.elapsed().as_nanos() as u64 / count as u64)
}

/// Linux's own asynchronous I/O. [io_setup(2)]
struct Aio {
    context: libc::c_ulong,
    depth: usize,
}

/// `struct io_event` [io_getevents(2)]
#[repr(C)]
#[derive(Clone, Copy, Default)]
struct Completion {
    data: u64,
    block: u64,
    result: i64,
    more: i64,
}

impl Aio {
    fn new(depth: usize) -> Result<Self> {
        let mut context: libc::c_ulong = 0;
        // SAFETY: the context is written to, and is zero as it has to be.
        let result = unsafe { libc::syscall(libc::SYS_io_setup, depth, &mut context) };
        ensure!(result == 0, "io_setup: {}", io::Error::last_os_error());
        Ok(Self { context, depth })
    }

    fn submit(&self, batch: &mut [*mut libc::iocb]) -> Result<()> {
        let mut rest = batch;
        while !rest.is_empty() {
            // SAFETY: pointers to control blocks that live, with their buffers, until `wait` has told their end.
            let taken =
                unsafe { libc::syscall(libc::SYS_io_submit, self.context, rest.len(), rest.as_mut_ptr()) };
            ensure!(taken > 0, "io_submit: {}", io::Error::last_os_error());
            rest = &mut rest[taken as usize..];
        }
        Ok(())
    }

    /// Waits for one at least. Returns what they were called.
    fn wait(&self, block_bytes: usize) -> Result<Vec<usize>> {
        let mut ended = vec![Completion::default(); self.depth];
        // SAFETY: as many events as there is room for are written.
        let count = unsafe {
            libc::syscall(
                libc::SYS_io_getevents,
                self.context,
                1,
                self.depth,
                ended.as_mut_ptr(),
                ptr::null::<libc::timespec>(),
            )
        };
        ensure!(count > 0, "io_getevents: {}", io::Error::last_os_error());
        ended.truncate(count as usize);
        for event in &ended {
            ensure!(
                event.result == block_bytes as i64,
                "a request ended with {}",
                event.result
            );
        }
        Ok(ended.iter().map(|event| event.data as usize).collect())
    }
}

impl Drop for Aio {
    fn drop(&mut self) {
        // SAFETY: a context of our own; the call waits for what is under way.
        unsafe { libc::syscall(libc::SYS_io_destroy, self.context) };
    }
}

/// A buffer that O_DIRECT takes: whole pages.
struct Aligned {
    place: *mut libc::c_void,
    bytes: usize,
}

impl Aligned {
    fn new(bytes: usize) -> Result<Self> {
        // SAFETY: new pages, wherever the kernel likes.
        let place = unsafe {
            libc::mmap(
                ptr::null_mut(),
                bytes,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_POPULATE,
                -1,
                0,
            )
        };
        ensure!(
            place != libc::MAP_FAILED,
            "no memory: {}",
            io::Error::last_os_error()
        );
        Ok(Self { place, bytes })
    }

    fn bytes(&mut self) -> &mut [u8] {
        // SAFETY: so many bytes are mapped, and are ours alone while `self` is borrowed.
        unsafe { std::slice::from_raw_parts_mut(self.place.cast(), self.bytes) }
    }
}

impl Drop for Aligned {
    fn drop(&mut self) {
        // SAFETY: our own mapping, which nobody uses any more.
        unsafe { libc::munmap(self.place, self.bytes) };
    }
}

fn net(address: &str) -> Result<()> {
    let mut stream = connect(address, PINGS)?;
    let mut ping = [7; PING_BYTES];
    let mut times = Vec::with_capacity(ONE_BY_ONE);
    for number in 0..WARM_UP + ONE_BY_ONE {
        let start = Instant::now();
        stream.write_all(&ping)?;
        stream.read_exact(&mut ping)?;
        if number >= WARM_UP {
            times.push(start.elapsed().as_nanos() as u64);
        }
    }
    drop(stream);
    tell_latencies("ping-64", &mut times);

    let mut buffer = vec![0x5a; LARGE_BYTES];
    let pieces = STREAM_BYTES / LARGE_BYTES;
    let mut stream = connect(address, UPWARDS)?;
    let start = Instant::now();
    for _ in 0..pieces {
        stream.write_all(&buffer)?;
    }
    // The other end has it all.
    stream.read_exact(&mut ping[..1])?;
    tell("send-128k", start.elapsed().as_nanos() as u64 / pieces as u64);

    let mut stream = connect(address, DOWNWARDS)?;
    let start = Instant::now();
    for _ in 0..pieces {
        stream.read_exact(&mut buffer)?;
    }
    tell("receive-128k", start.elapsed().as_nanos() as u64 / pieces as u64);
    Ok(())
}

fn connect(address: &str, what: u8) -> Result<TcpStream> {
    let mut stream =
        TcpStream::connect((address, PORT)).with_context(|| format!("cannot reach {address}"))?;
    stream.set_nodelay(true)?;
    stream.write_all(&[what])?;
    Ok(stream)
}
