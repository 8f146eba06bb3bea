//! The same program as `vsock-peer`, inside a guest and beside it: both ends of connections through virtio-vsock.
//!
//! | command | what |
//! |---|---|
//! | `vsock-peer echo ADDRESS` | listens for ever; what comes over a connection goes back over it, and its end too |
//! | `vsock-peer swarm ADDRESS COUNT KIB` | COUNT connections at once; each sends KIB KiB of its own, says that this was all, and reads until the other end does; what came back has to be what was sent |
//! | `vsock-peer bounce ADDRESS KIB` | one connection as of a swarm, whose other end does not say that this was all |
//! | `vsock-peer take ADDRESS BYTES` | connects and writes so much of what comes to stdout |
//! | `vsock-peer deaf ADDRESS` | connects and sends until it may not any more, for a second: how much that was |
//!
//! ADDRESS: `vsock:PORT` (in a guest; to connect, of the host), `unix:PATH`, or `unix:PATH@PORT`, a port of the guest behind
//! the VMM's socket.

use std::fs::File;
use std::io::{self, ErrorKind, Read, Write};
use std::mem;
use std::net::Shutdown;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::{Arc, Barrier};
use std::thread;

use anyhow::{Context, Result, anyhow, bail, ensure};

/// The host's context identifier, and any of one's own. [vsock(7)]
const HOST: u32 = 2;
const ANY: u32 = u32::MAX;
/// Threads need little.
const STACK_BYTES: usize = 64 << 10;
/// So long a connection that takes nothing more is tried.
static DEAF: libc::timeval = libc::timeval {
    tv_sec: 1,
    tv_usec: 0,
};

pub fn main() -> Result<()> {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let args: Vec<&str> = args.iter().map(String::as_str).collect();
    match args.as_slice() {
        ["echo", address] => echo(&Address::parse(address)?),
        ["swarm", address, count, kib] => {
            let count = count.parse().context("COUNT is a number")?;
            let kib: usize = kib.parse().context("KIB is a number")?;
            swarm(Address::parse(address)?, count, kib << 10)
        }
        ["bounce", address, kib] => {
            let kib: usize = kib.parse().context("KIB is a number")?;
            exchange(Address::parse(address)?.connect()?, 1, kib << 10, false)
        }
        ["take", address, bytes] => {
            let bytes = bytes.parse().context("BYTES is a number")?;
            let connection = Address::parse(address)?.connect()?;
            let taken = io::copy(&mut (&connection.0).take(bytes), &mut io::stdout())?;
            ensure!(taken == bytes, "the end came after {taken} bytes");
            Ok(())
        }
        ["deaf", address] => deaf(&Address::parse(address)?),
        _ => bail!(
            "vsock-peer echo ADDRESS | swarm ADDRESS COUNT KIB | bounce ADDRESS KIB | take ADDRESS BYTES | deaf ADDRESS"
        ),
    }
}

enum Address {
    Vsock(u32),
    Unix(String),
    Guest(String, u32),
}

impl Address {
    fn parse(text: &str) -> Result<Address> {
        let port = |text: &str| text.parse().context("a port is a number");
        Ok(match text.split_once(':') {
            Some(("vsock", rest)) => Address::Vsock(port(rest)?),
            Some(("unix", path)) => match path.split_once('@') {
                Some((path, rest)) => Address::Guest(path.to_owned(), port(rest)?),
                None => Address::Unix(path.to_owned()),
            },
            _ => bail!("{text} is no address"),
        })
    }

    fn connect(&self) -> Result<Connection> {
        match self {
            Address::Vsock(port) => {
                let (socket, address) = vsock(HOST, *port)?;
                // SAFETY: the address outlives the call, and its length is right.
                let result =
                    unsafe { libc::connect(socket.as_raw_fd(), (&raw const address).cast(), LENGTH) };
                ensure!(result == 0, "port {port}: {}", io::Error::last_os_error());
                Ok(Connection(File::from(socket)))
            }
            Address::Unix(path) => Ok(Connection(File::from(OwnedFd::from(UnixStream::connect(path)?)))),
            Address::Guest(path, port) => {
                let mut stream = UnixStream::connect(path)?;
                stream.write_all(format!("CONNECT {port}\n").as_bytes())?;
                let mut line = Vec::new();
                while line.last() != Some(&b'\n') {
                    let mut byte = [0];
                    stream.read_exact(&mut byte).context("the guest does not agree")?;
                    line.push(byte[0]);
                }
                ensure!(line.starts_with(b"OK "), "{}", String::from_utf8_lossy(&line));
                Ok(Connection(File::from(OwnedFd::from(stream))))
            }
        }
    }
}

const LENGTH: libc::socklen_t = size_of::<libc::sockaddr_vm>() as libc::socklen_t;

/// A socket, and an address for it.
fn vsock(cid: u32, port: u32) -> Result<(OwnedFd, libc::sockaddr_vm)> {
    // SAFETY: no memory is involved.
    let fd = unsafe { libc::socket(libc::AF_VSOCK, libc::SOCK_STREAM | libc::SOCK_CLOEXEC, 0) };
    ensure!(fd >= 0, "no socket: {}", io::Error::last_os_error());
    // SAFETY: it was made just now, and nobody else has it.
    let socket = unsafe { OwnedFd::from_raw_fd(fd) };
    // SAFETY: all zero is a valid value.
    let mut address: libc::sockaddr_vm = unsafe { mem::zeroed() };
    address.svm_family = libc::AF_VSOCK as libc::sa_family_t;
    address.svm_cid = cid;
    address.svm_port = port;
    Ok((socket, address))
}

/// A stream socket of either kind.
struct Connection(File);

impl Connection {
    fn shutdown(&self, how: Shutdown) {
        let how = match how {
            Shutdown::Read => libc::SHUT_RD,
            Shutdown::Write => libc::SHUT_WR,
            Shutdown::Both => libc::SHUT_RDWR,
        };
        // SAFETY: no memory is involved.
        unsafe { libc::shutdown(self.0.as_raw_fd(), how) };
    }
}

fn echo(address: &Address) -> Result<()> {
    match address {
        Address::Vsock(port) => {
            let (socket, address) = vsock(ANY, *port)?;
            let fd = socket.as_raw_fd();
            // SAFETY: the address outlives the call, and its length is right.
            let result = unsafe { libc::bind(fd, (&raw const address).cast(), LENGTH) };
            ensure!(result == 0, "port {port}: {}", io::Error::last_os_error());
            // SAFETY: no memory is involved.
            let result = unsafe { libc::listen(fd, 128) };
            ensure!(result == 0, "{}", io::Error::last_os_error());
            loop {
                // SAFETY: no address is asked for.
                let fd = unsafe { libc::accept(fd, std::ptr::null_mut(), std::ptr::null_mut()) };
                if fd >= 0 {
                    // SAFETY: it was made just now, and nobody else has it.
                    serve(Connection(unsafe { File::from_raw_fd(fd) }))?;
                }
            }
        }
        Address::Unix(path) => {
            for stream in UnixListener::bind(path)?.incoming() {
                serve(Connection(File::from(OwnedFd::from(stream?))))?;
            }
            Ok(())
        }
        Address::Guest(..) => bail!("only the guest can listen there"),
    }
}

fn serve(connection: Connection) -> Result<()> {
    thread::Builder::new().stack_size(STACK_BYTES).spawn(move || {
        let mut stream = &connection.0;
        let mut buffer = vec![0; 16 << 10];
        loop {
            match stream.read(&mut buffer) {
                Ok(bytes) if bytes > 0 => {
                    if stream.write_all(&buffer[..bytes]).is_err() {
                        break;
                    }
                }
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                _ => break,
            }
        }
        connection.shutdown(Shutdown::Write);
    })?;
    Ok(())
}

/// What a connection sends: nobody else's.
struct Noise(u64);

impl Noise {
    fn fill(&mut self, bytes: &mut [u8]) {
        for word in bytes.chunks_mut(8) {
            self.0 ^= self.0 << 13;
            self.0 ^= self.0 >> 7;
            self.0 ^= self.0 << 17;
            word.copy_from_slice(&self.0.to_le_bytes()[..word.len()]);
        }
    }
}

fn swarm(address: Address, count: usize, bytes: usize) -> Result<()> {
    let (address, all_there) = (Arc::new(address), Arc::new(Barrier::new(count)));
    let members = (0..count).map(|number| {
        let (address, all_there) = (address.clone(), all_there.clone());
        let member = move || {
            let connection = address.connect();
            // All are open before the first byte goes.
            all_there.wait();
            exchange(connection?, number as u64 + 1, bytes, true)
        };
        thread::Builder::new().stack_size(STACK_BYTES).spawn(member)
    });
    let members: Vec<_> = members.collect::<io::Result<_>>()?;
    let mut intact = 0;
    for (number, member) in members.into_iter().enumerate() {
        match member.join().map_err(|_| anyhow!("a panic"))? {
            Ok(()) => intact += 1,
            Err(error) => println!("swarm: connection {number}: {error:#}"),
        }
    }
    println!("swarm: {intact} of {count} intact");
    ensure!(intact == count, "not all are intact");
    Ok(())
}

fn exchange(connection: Connection, seed: u64, bytes: usize, ends: bool) -> Result<()> {
    let connection = Arc::new(connection);
    let theirs = connection.clone();
    let writer = thread::Builder::new().stack_size(STACK_BYTES).spawn(move || {
        let (mut noise, mut left, mut buffer) = (Noise(seed), bytes, vec![0; 8 << 10]);
        while left > 0 {
            let part = left.min(buffer.len());
            noise.fill(&mut buffer[..part]);
            (&theirs.0).write_all(&buffer[..part])?;
            left -= part;
        }
        theirs.shutdown(Shutdown::Write);
        io::Result::Ok(())
    })?;
    let (mut noise, mut got) = (Noise(seed), 0);
    let (mut expected, mut buffer) = (vec![0; 8 << 10], vec![0; 8 << 10]);
    while got < bytes {
        // In the writer's pieces, so that both have the same noise.
        let part = (bytes - got).min(buffer.len());
        (&connection.0)
            .read_exact(&mut buffer[..part])
            .with_context(|| format!("after {got} bytes"))?;
        noise.fill(&mut expected[..part]);
        ensure!(buffer[..part] == expected[..part], "byte {got} and on are others");
        got += part;
    }
    ensure!(
        !ends || (&connection.0).read(&mut buffer)? == 0,
        "more came back than was sent"
    );
    writer.join().map_err(|_| anyhow!("a panic"))??;
    Ok(())
}

fn deaf(address: &Address) -> Result<()> {
    let connection = address.connect()?;
    // SAFETY: the value outlives the call, and its length is right.
    unsafe {
        let length = size_of::<libc::timeval>() as libc::socklen_t;
        libc::setsockopt(
            connection.0.as_raw_fd(),
            libc::SOL_SOCKET,
            libc::SO_SNDTIMEO,
            (&raw const DEAF).cast(),
            length,
        );
    }
    let mut sent = 0;
    loop {
        match (&connection.0).write(&[0; 4096]) {
            Ok(bytes) => sent += bytes,
            Err(error) if error.kind() == ErrorKind::WouldBlock => break,
            Err(error) => bail!("after {sent} bytes: {error}"),
        }
        ensure!(sent < 64 << 20, "nothing stops it");
    }
    println!("deaf: stopped after {} KiB", sent >> 10);
    Ok(())
}
