//! A virtiofsd for tests: the other side of vhost-user, in a thread, by hand rather than by the crate that the device uses, so
//! that a mistake of the one is not the other's too.

use super::queue::Keeper;
use super::session::ANSWER_LIMIT;
use super::{handlers, identity};
use crate::virtio::queue::Handler;
use crate::virtio::registers::Identity;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::socket::{ControlMessageOwned, MsgFlags, recvmsg};
use slog::Logger;
use std::fs::File;
use std::io::{IoSliceMut, Read, Write};
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::thread::JoinHandle;
use virtio_queue::{Queue, QueueT};
use vm_memory::{Bytes, FileOffset, GuestAddress, GuestMemoryMmap};

/// What is done with a request.
pub enum Does {
    /// It is answered.
    Answers(Vec<u8>),
    /// It is not.
    Nothing,
    /// The program ends.
    Ends,
    /// It says that an answer is in a descriptor that was not given.
    Lies,
}

struct Vring {
    queue: Queue,
    kick: Option<File>,
    call: Option<File>,
}

/// What it has been told.
struct Peer {
    socket: UnixStream,
    /// With where it is in the other's address space.
    memory: Option<(u64, GuestMemoryMmap)>,
    vrings: Vec<Vring>,
}

fn word(body: &[u8], at: usize) -> u64 {
    u64::from_le_bytes(body[at..at + 8].try_into().unwrap())
}

impl Peer {
    /// Takes one message; `false`: the other side has ended.
    fn message(&mut self) -> bool {
        let mut header = [0; 12];
        let mut fds = Vec::<OwnedFd>::new();
        {
            let mut pieces = [IoSliceMut::new(&mut header)];
            let mut space = nix::cmsg_space!([i32; 8]);
            let flags = MsgFlags::MSG_CMSG_CLOEXEC;
            let got = recvmsg::<()>(self.socket.as_raw_fd(), &mut pieces, Some(&mut space), flags).unwrap();
            if got.bytes == 0 {
                return false;
            }
            assert_eq!(got.bytes, 12);
            for message in got.cmsgs().unwrap() {
                if let ControlMessageOwned::ScmRights(list) = message {
                    // SAFETY: the kernel has just made these descriptors for this process, and nobody else has them.
                    fds.extend(list.into_iter().map(|fd| unsafe { OwnedFd::from_raw_fd(fd) }));
                }
            }
        }
        let part = |at: usize| u32::from_le_bytes(header[at..at + 4].try_into().unwrap());
        let (request, flags, bytes) = (part(0), part(4), part(8) as usize);
        let mut body = vec![0; bytes];
        self.socket.read_exact(&mut body).unwrap();
        let mut reply = None;
        // Requests by their numbers in the specification.
        match request {
            1 => reply = Some(1 << 32 | 1 << 30),
            2 => assert_eq!(word(&body, 0), 1 << 32 | 1 << 30),
            3 => {}
            5 => {
                assert_eq!((body[0], fds.len()), (1, 1), "one region");
                let [address, size, user, offset] = [8, 16, 24, 32].map(|at| word(&body, at));
                assert_eq!((address, offset), (0, 0));
                let file = FileOffset::new(File::from(fds.remove(0)), 0);
                let range = (GuestAddress(0), size as usize, Some(file));
                let memory = GuestMemoryMmap::from_ranges_with_files([range]).unwrap();
                self.memory = Some((user, memory));
            }
            8 => self.vring(&body).queue.set_size(body[4].into()),
            9 => {
                let base = self.memory.as_ref().unwrap().0;
                let [descriptors, used, available] =
                    [8, 16, 24].map(|at| GuestAddress(word(&body, at) - base));
                let queue = &mut self.vring(&body).queue;
                queue.try_set_desc_table_address(descriptors).unwrap();
                queue.try_set_avail_ring_address(available).unwrap();
                queue.try_set_used_ring_address(used).unwrap();
            }
            10 => assert_eq!(body[4..8], [0; 4]),
            12 => self.vring(&body).kick = Some(File::from(fds.remove(0))),
            13 => self.vring(&body).call = Some(File::from(fds.remove(0))),
            // Multiqueue, and an answer to each request that wants one.
            15 => reply = Some(1 | 1 << 3 | 1 << 9),
            16 => assert_eq!(word(&body, 0), 1 | 1 << 3),
            18 => self.vring(&body).queue.set_ready(body[4] == 1),
            other => panic!("request {other}"),
        }
        if flags & 8 != 0 && reply.is_none() {
            reply = Some(0);
        }
        if let Some(reply) = reply {
            let mut answer = Vec::new();
            for part in [request, 1 | 4, 8] {
                answer.extend(part.to_le_bytes());
            }
            answer.extend(u64::to_le_bytes(reply));
            self.socket.write_all(&answer).unwrap();
        }
        true
    }

    fn vring(&mut self, body: &[u8]) -> &mut Vring {
        let number = body[0] as usize;
        &mut self.vrings[number]
    }

    /// Serves what is in a queue. `false`: it ends.
    fn serve(&mut self, number: usize, does: &mut impl FnMut(&[u8]) -> Does) -> bool {
        let Vring { queue, call, .. } = &mut self.vrings[number];
        let memory = &self.memory.as_ref().unwrap().1;
        while let Some(chain) = queue.pop_descriptor_chain(memory) {
            let head = chain.head_index();
            let (mut request, mut room) = (Vec::new(), Vec::new());
            for descriptor in chain {
                if descriptor.is_write_only() {
                    room.push((descriptor.addr(), descriptor.len()));
                    continue;
                }
                let mut piece = vec![0; descriptor.len() as usize];
                memory.read_slice(&mut piece, descriptor.addr()).unwrap();
                request.extend(piece);
            }
            let mut head_said = head;
            let answer = match does(&request) {
                Does::Answers(answer) => answer,
                Does::Nothing => continue,
                Does::Ends => return false,
                Does::Lies => {
                    head_said = head + 1;
                    Vec::new()
                }
            };
            if let Some((address, bytes)) = room.first() {
                assert!(answer.len() <= *bytes as usize, "no room for the answer");
                memory.write_slice(&answer, *address).unwrap();
            }
            queue.add_used(memory, head_said, answer.len() as u32).unwrap();
            call.as_ref().unwrap().write_all(&1u64.to_ne_bytes()).unwrap();
        }
        true
    }
}

/// Serves at a socket until it ends, or `does` says so.
pub fn peer(socket: UnixStream, mut does: impl FnMut(&[u8]) -> Does + Send + 'static) -> JoinHandle<()> {
    std::thread::spawn(move || {
        let vring = || Vring {
            queue: Queue::new(256).unwrap(),
            kick: None,
            call: None,
        };
        let mut peer = Peer {
            socket,
            memory: None,
            vrings: vec![vring(), vring()],
        };
        loop {
            let mut polled = vec![PollFd::new(peer.socket.as_fd(), PollFlags::POLLIN)];
            let kicks = peer.vrings.iter().filter_map(|vring| vring.kick.as_ref());
            polled.extend(kicks.map(|kick| PollFd::new(kick.as_fd(), PollFlags::POLLIN)));
            poll(&mut polled, PollTimeout::NONE).unwrap();
            let ready: Vec<_> = polled.iter().map(|fd| fd.any() == Some(true)).collect();
            if ready[0] && !peer.message() {
                return;
            }
            for number in 0..ready.len() - 1 {
                if ready[number + 1] {
                    let mut count = [0; 8];
                    let mut kick = peer.vrings[number].kick.as_ref().unwrap();
                    kick.read_exact(&mut count).unwrap();
                    if !peer.serve(number, &mut does) {
                        return;
                    }
                }
            }
        }
    })
}

/// The handlers of a shared folder, first that of the queue for what does not wait, with such a peer.
pub fn opened(
    log: Logger,
    does: impl FnMut(&[u8]) -> Does + Send + 'static,
) -> (Identity, Vec<Box<dyn Handler>>, JoinHandle<()>) {
    let (ours, theirs) = UnixStream::pair().unwrap();
    let thread = peer(theirs, does);
    let keeper = Keeper {
        name: "share0 (tag test)".into(),
        program: None,
        log,
    };
    let handlers = handlers("test", ours, keeper, ANSWER_LIMIT).unwrap();
    (identity("test"), handlers, thread)
}

/// A request's header and some data.
pub fn request(unique: u64, data: &[u8]) -> Vec<u8> {
    let mut request = vec![0; super::fuse::REQUEST_HEADER_BYTES];
    request[..4].copy_from_slice(&(40 + data.len() as u32).to_le_bytes());
    request[8..16].copy_from_slice(&unique.to_le_bytes());
    request.extend(data);
    request
}

/// The answer to a request that repeats its data.
pub fn echo(request: &[u8]) -> Does {
    let mut answer = (16 + request.len() as u32 - 40).to_le_bytes().to_vec();
    answer.extend([0; 4]);
    answer.extend(&request[8..16]);
    answer.extend(&request[40..]);
    Does::Answers(answer)
}
