//! Requests: copied, checked as a whole, then done, then answered. [VIRTIO 1.2 §5.2.6]
//!
//! What a hostile guest can try: types that do not exist, sectors and lengths beyond the disk or that overflow, buffers
//! outside memory, discards without end. It gets VIRTIO_BLK_S_IOERR or VIRTIO_BLK_S_UNSUPP in the status byte; a request
//! without a status byte or header makes the device need a reset. Nothing outside the image's sectors is touched.
//! What fails on the host is an I/O error to the guest and a line in the log at a bounded rate.

use super::disk::Disk;
use super::{MAX_DISCARD_SECTORS, MAX_RANGES, MAX_WRITE_ZEROES_SECTORS, SECTOR_BYTES};
use crate::virtio::CHUNK_BYTES;
use crate::virtio::block::config::SERIAL_BYTES;
use crate::virtio::chain::Malformed;
use crate::virtio::complaints::Complaints;
use crate::virtio::queue::{Handler, Interruption, Request};
use slog::Logger;
use std::io;
use virtio_bindings::virtio_blk as spec;

/// `struct virtio_blk_req` up to its data: type, reserved, sector.
const HEADER_BYTES: u64 = 16;
/// `struct virtio_blk_discard_write_zeroes`: sector, count, flags.
const RANGE_BYTES: u64 = 16;

/// The status byte.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[repr(u8)]
pub enum Status {
    /// Done.
    Ok = spec::VIRTIO_BLK_S_OK as u8,
    /// Not possible.
    IoError = spec::VIRTIO_BLK_S_IOERR as u8,
    /// Not a request of this device.
    Unsupported = spec::VIRTIO_BLK_S_UNSUPP as u8,
}

/// A request that makes sense for a disk of some size.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Command {
    /// Read so many bytes from a byte offset.
    Read(u64, u64),
    /// Write them.
    Write(u64, u64),
    /// What was written is to last.
    Flush,
    /// The serial number.
    GetId,
    /// So many ranges lose their content.
    Discard(u32),
    /// So many ranges become zeroes.
    WriteZeroes(u32),
}

/// What is checked against.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Limits {
    /// The disk's size.
    pub sectors: u64,
    /// Writes are refused.
    pub read_only: bool,
}

/// A byte offset and a length, if the range is within the disk.
fn range(limits: Limits, sector: u64, sectors: u64) -> Option<(u64, u64)> {
    let end = sector.checked_add(sectors)?;
    (end <= limits.sectors).then(|| (sector * SECTOR_BYTES, sectors * SECTOR_BYTES))
}

/// Decides what a request is, from its header and the bytes of data each way.
///
/// # Errors
/// What to answer instead.
pub fn parse(header: &[u8; 16], given: u64, room: u64, limits: Limits) -> Result<Command, Status> {
    let kind = u32::from_le_bytes(header[..4].try_into().expect("4 bytes"));
    let sector = u64::from_le_bytes(header[8..].try_into().expect("8 bytes"));
    let transfer = |bytes: u64| {
        let whole = bytes.is_multiple_of(SECTOR_BYTES).then_some(bytes / SECTOR_BYTES);
        whole
            .and_then(|sectors| range(limits, sector, sectors))
            .ok_or(Status::IoError)
    };
    let ranges = |command: fn(u32) -> Command| {
        let count = given / RANGE_BYTES;
        let fits = given.is_multiple_of(RANGE_BYTES) && (1..=u64::from(MAX_RANGES)).contains(&count);
        match (limits.read_only, fits) {
            // Not offered then.
            (true, _) => Err(Status::Unsupported),
            (false, false) => Err(Status::IoError),
            (false, true) => Ok(command(count as u32)),
        }
    };
    match kind {
        spec::VIRTIO_BLK_T_IN => transfer(room).map(|(offset, bytes)| Command::Read(offset, bytes)),
        spec::VIRTIO_BLK_T_OUT if limits.read_only => Err(Status::IoError),
        spec::VIRTIO_BLK_T_OUT => transfer(given).map(|(offset, bytes)| Command::Write(offset, bytes)),
        spec::VIRTIO_BLK_T_FLUSH => Ok(Command::Flush),
        spec::VIRTIO_BLK_T_GET_ID if room < SERIAL_BYTES as u64 => Err(Status::IoError),
        spec::VIRTIO_BLK_T_GET_ID => Ok(Command::GetId),
        spec::VIRTIO_BLK_T_DISCARD => ranges(Command::Discard),
        spec::VIRTIO_BLK_T_WRITE_ZEROES => ranges(Command::WriteZeroes),
        _ => Err(Status::Unsupported),
    }
}

/// One range of a discard or a write of zeroes.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
struct Range {
    offset: u64,
    bytes: u64,
    unmap: bool,
}

/// Decodes one range and checks it.
fn parse_range(
    bytes: &[u8],
    most_sectors: u32,
    unmap_allowed: bool,
    limits: Limits,
) -> Result<Range, Status> {
    let sector = u64::from_le_bytes(bytes[..8].try_into().expect("8 bytes"));
    let sectors = u32::from_le_bytes(bytes[8..12].try_into().expect("4 bytes"));
    let flags = u32::from_le_bytes(bytes[12..16].try_into().expect("4 bytes"));
    let unmap = flags == spec::VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP && unmap_allowed;
    // [VIRTIO 1.2 §5.2.6.2: unknown flags, and unmap in a discard]
    if flags != 0 && !unmap {
        return Err(Status::Unsupported);
    }
    match range(limits, sector, sectors.into()) {
        Some((offset, bytes)) if sectors <= most_sectors => Ok(Range { offset, bytes, unmap }),
        _ => Err(Status::IoError),
    }
}

/// Serves one queue of a disk.
pub struct Block {
    disk: Disk,
    serial: [u8; SERIAL_BYTES],
    complaints: Complaints,
    /// Bytes of zeroes that the last request has written.
    zeroed: u64,
}

impl Block {
    /// For one queue.
    pub fn new(disk: Disk, serial: &str, log: Logger) -> Block {
        // Without a NUL if it is as long as it may be.
        let mut padded = [0; SERIAL_BYTES];
        for (to, from) in padded.iter_mut().zip(serial.bytes()) {
            *to = from;
        }
        Block {
            disk,
            serial: padded,
            complaints: Complaints::new(log),
            zeroed: 0,
        }
    }

    fn limits(&self) -> Limits {
        Limits {
            sectors: self.disk.sectors(),
            read_only: self.disk.is_read_only(),
        }
    }

    /// What the host refused, for the guest and for the log.
    fn refused(&mut self, what: &str, error: &io::Error) -> Status {
        let remedy = match error.raw_os_error() {
            Some(libc::ENOSPC | libc::EDQUOT) => "; make room there",
            _ => "",
        };
        self.complaints.say(format_args!(
            "disk {}: the host cannot {what}, and the guest gets an I/O error: {error}{remedy}",
            self.disk.path().display()
        ));
        Status::IoError
    }

    /// Does a command. Returns the status, and how many bytes of data were written for the driver.
    fn perform(
        &mut self,
        command: Command,
        request: &mut Request<'_>,
    ) -> Result<(Status, u64), Interruption> {
        match command {
            Command::Read(offset, bytes) => self.read(offset, bytes, request),
            Command::Write(offset, bytes) => Ok((self.write(offset, bytes, request)?, 0)),
            Command::Flush => Ok(match self.disk.flush() {
                Ok(()) => (Status::Ok, 0),
                Err(error) => (self.refused("make sure that all is on its disk", &error), 0),
            }),
            Command::GetId => {
                request.buffer[..SERIAL_BYTES].copy_from_slice(&self.serial);
                Ok(match request.store(0, SERIAL_BYTES)? {
                    Ok(()) => (Status::Ok, SERIAL_BYTES as u64),
                    Err(_) => (Status::IoError, 0),
                })
            }
            Command::Discard(count) => Ok((self.ranges(count, MAX_DISCARD_SECTORS, false, request)?, 0)),
            Command::WriteZeroes(count) => {
                Ok((self.ranges(count, MAX_WRITE_ZEROES_SECTORS, true, request)?, 0))
            }
        }
    }

    fn read(
        &mut self,
        offset: u64,
        bytes: u64,
        request: &mut Request<'_>,
    ) -> Result<(Status, u64), Interruption> {
        let mut done = 0;
        while done < bytes {
            let part = (bytes - done).min(CHUNK_BYTES as u64) as usize;
            if let Some(image) = self.disk.at_once() {
                match request.give_straight(done, part, |room| image.read_now(offset + done, room))? {
                    Ok(0) => {}
                    Ok(read) => {
                        done += read as u64;
                        continue;
                    }
                    Err(_) => return Ok((Status::IoError, done)),
                }
            }
            if let Err(error) = self.disk.read(offset + done, &mut request.buffer[..part]) {
                return Ok((self.refused("read from it", &error), done));
            }
            if request.store(done, part)?.is_err() {
                return Ok((Status::IoError, done));
            }
            done += part as u64;
        }
        Ok((Status::Ok, done))
    }

    fn write(&mut self, offset: u64, bytes: u64, request: &mut Request<'_>) -> Result<Status, Interruption> {
        let mut done = 0;
        while done < bytes {
            let part = (bytes - done).min(CHUNK_BYTES as u64) as usize;
            if let Some(image) = self.disk.at_once() {
                let from = HEADER_BYTES + done;
                match request.take_straight(from, part, |given| image.write_now(offset + done, given))? {
                    Ok(0) => {}
                    Ok(written) => {
                        done += written as u64;
                        continue;
                    }
                    Err(_) => return Ok(Status::IoError),
                }
            }
            if request.load(HEADER_BYTES + done, part)?.is_err() {
                return Ok(Status::IoError);
            }
            if let Err(error) = self.disk.write(offset + done, &request.buffer[..part]) {
                return Ok(self.refused("write to it", &error));
            }
            done += part as u64;
        }
        Ok(Status::Ok)
    }

    /// Discards (or, if unmapping is a choice, zeroes) ranges. All are checked before the first is done.
    fn ranges(
        &mut self,
        count: u32,
        most_sectors: u32,
        zeroes: bool,
        request: &mut Request<'_>,
    ) -> Result<Status, Interruption> {
        let length = (u64::from(count) * RANGE_BYTES) as usize;
        if request.load(HEADER_BYTES, length)?.is_err() {
            return Ok(Status::IoError);
        }
        let mut checked = [Range {
            offset: 0,
            bytes: 0,
            unmap: false,
        }; MAX_RANGES as usize];
        let raw = request.buffer[..length].chunks_exact(RANGE_BYTES as usize);
        for (range, raw) in checked.iter_mut().zip(raw) {
            match parse_range(raw, most_sectors, zeroes, self.limits()) {
                Ok(parsed) => *range = parsed,
                Err(status) => return Ok(status),
            }
        }
        for Range { offset, bytes, unmap } in checked.into_iter().take(count as usize) {
            // fallocate knows no empty range.
            let result = match (bytes, zeroes) {
                (0, _) => Ok(()),
                (_, true) => {
                    self.zeroed += bytes;
                    self.disk.write_zeroes(offset, bytes, unmap)
                }
                (_, false) => self.disk.discard(offset, bytes),
            };
            if let Err(error) = result {
                return Ok(self.refused(if zeroes { "write zeroes to it" } else { "discard" }, &error));
            }
        }
        Ok(Status::Ok)
    }
}

impl Block {
    /// Nobody uses the disk for now, or ever: what only this program knows goes into the image.
    fn write_back(&mut self) {
        if let Err(error) = self.disk.write_back() {
            self.complaints.say(format_args!(
                "disk {}: its tables cannot be written, and what was not flushed is lost: {error}",
                self.disk.path().display()
            ));
        }
    }
}

impl Drop for Block {
    fn drop(&mut self) {
        self.write_back();
    }
}

impl Handler for Block {
    fn stopped(&mut self) {
        self.write_back();
    }

    fn beside(&self) -> u64 {
        self.zeroed
    }

    fn serve(&mut self, request: &mut Request<'_>) -> Result<u32, Interruption> {
        self.zeroed = 0;
        // The last byte is the status; what is before it is room for data.
        let room = request
            .writable_bytes()
            .checked_sub(1)
            .ok_or(Malformed::NoAnswer)?;
        let given = request
            .readable_bytes()
            .checked_sub(HEADER_BYTES)
            .ok_or(Malformed::NoRequest)?;
        request
            .load(0, HEADER_BYTES as usize)?
            .map_err(|_| Malformed::NoRequest)?;
        let header = request.buffer[..16].try_into().expect("16 bytes");
        let (status, written) = match parse(&header, given, room, self.limits()) {
            Ok(command) => self.perform(command, request)?,
            Err(status) => (status, 0),
        };
        request.buffer[0] = status as u8;
        request.store(room, 1)?.map_err(|_| Malformed::NoAnswer)?;
        // The used length must not count bytes that were not written before; the status is behind the room for data.
        Ok(match written == room {
            true => u32::try_from(written + 1).unwrap_or(u32::MAX),
            false => written as u32,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::virtio::block::DiskConfig;
    use crate::virtio::block::image::Image;
    use crate::virtio::block::testing::Scratch;
    use crate::virtio::straight::Ways;
    use crate::virtio::testing::{Outcome, R, Rig, W};
    use slog::o;
    use std::fs::File;
    use std::sync::Arc;

    fn open(config: &DiskConfig) -> Disk {
        Disk::open(config).unwrap().remove(0)
    }

    const LIMITS: Limits = Limits {
        sectors: 16,
        read_only: false,
    };

    fn header(kind: u32, sector: u64) -> [u8; 16] {
        let mut header = [0; 16];
        header[..4].copy_from_slice(&kind.to_le_bytes());
        header[8..].copy_from_slice(&sector.to_le_bytes());
        header
    }

    #[test]
    fn what_a_request_is() {
        use Status::{IoError, Unsupported};
        let read_only = Limits {
            read_only: true,
            ..LIMITS
        };
        let (input, output, id) = (
            spec::VIRTIO_BLK_T_IN,
            spec::VIRTIO_BLK_T_OUT,
            spec::VIRTIO_BLK_T_GET_ID,
        );
        let (discard, zeroes) = (spec::VIRTIO_BLK_T_DISCARD, spec::VIRTIO_BLK_T_WRITE_ZEROES);
        for (kind, sector, given, room, limits, expected) in [
            (input, 0, 0, 8192, LIMITS, Ok(Command::Read(0, 8192))),
            (input, 15, 0, 512, read_only, Ok(Command::Read(15 * 512, 512))),
            (input, 16, 0, 0, LIMITS, Ok(Command::Read(8192, 0))),
            (input, 15, 0, 1024, LIMITS, Err(IoError)),
            (input, u64::MAX, 0, 512, LIMITS, Err(IoError)),
            (input, 1 << 55, 0, 512, LIMITS, Err(IoError)),
            (input, 0, 0, 511, LIMITS, Err(IoError)),
            (output, 3, 1024, 0, LIMITS, Ok(Command::Write(1536, 1024))),
            (output, 3, 1024, 0, read_only, Err(IoError)),
            (output, 0, 513, 0, LIMITS, Err(IoError)),
            (output, 16, 512, 0, LIMITS, Err(IoError)),
            (spec::VIRTIO_BLK_T_FLUSH, 7, 0, 0, LIMITS, Ok(Command::Flush)),
            (id, 0, 0, 20, LIMITS, Ok(Command::GetId)),
            (id, 0, 0, 19, LIMITS, Err(IoError)),
            (discard, 0, 32, 0, LIMITS, Ok(Command::Discard(2))),
            (discard, 0, 0, 0, LIMITS, Err(IoError)),
            (discard, 0, 17, 0, LIMITS, Err(IoError)),
            (discard, 0, 16 * 17, 0, LIMITS, Err(IoError)),
            (discard, 0, 16, 0, read_only, Err(Unsupported)),
            (zeroes, 0, 16, 0, LIMITS, Ok(Command::WriteZeroes(1))),
            (2, 0, 0, 0, LIMITS, Err(Unsupported)),
            (u32::MAX, 0, 0, 0, LIMITS, Err(Unsupported)),
        ] {
            let parsed = parse(&header(kind, sector), given, room, limits);
            assert_eq!(parsed, expected, "type {kind} sector {sector} {given} {room}");
        }
    }

    #[test]
    fn which_ranges_are_taken() {
        let raw = |sector: u64, sectors: u32, flags: u32| {
            let mut raw = [0; 16];
            raw[..8].copy_from_slice(&sector.to_le_bytes());
            raw[8..12].copy_from_slice(&sectors.to_le_bytes());
            raw[12..].copy_from_slice(&flags.to_le_bytes());
            raw
        };
        let is = |raw: [u8; 16], most, unmap| parse_range(&raw, most, unmap, LIMITS);
        assert!(is(raw(0, 16, 0), 16, false).is_ok());
        assert!(is(raw(8, 8, 1), 16, true).unwrap().unmap);
        assert_eq!(is(raw(8, 9, 0), 16, false), Err(Status::IoError));
        assert_eq!(is(raw(u64::MAX, 1, 0), 16, false), Err(Status::IoError));
        assert_eq!(is(raw(0, 9, 0), 8, false), Err(Status::IoError));
        assert_eq!(is(raw(0, 1, 1), 8, false), Err(Status::Unsupported));
        assert_eq!(is(raw(0, 1, 2), 8, true), Err(Status::Unsupported));
    }

    /// A disk of 16 sectors with their number in each byte.
    fn disk(read_only: bool) -> (Rig, Scratch) {
        let content: Vec<u8> = (0..16u8).flat_map(|sector| [sector; 512]).collect();
        let file = Scratch::new(&content);
        let disk = open(&file.config(read_only));
        let log = Logger::root(slog::Discard, o!());
        (Rig::new(Box::new(Block::new(disk, "serial 7", log))), file)
    }

    const HEADER: u64 = 0x5000;
    const STATUS: u64 = 0x5100;
    const DATA: u64 = 0x8000;

    fn put(rig: &Rig, kind: u32, sector: u64) {
        rig.write(HEADER, &header(kind, sector));
        rig.write(STATUS, &[0xee]);
    }

    fn status(rig: &Rig) -> u8 {
        rig.read(STATUS, 1)[0]
    }

    #[test]
    fn sectors_are_read_into_scattered_buffers() {
        let (mut rig, _file) = disk(true);
        put(&rig, spec::VIRTIO_BLK_T_IN, 3);
        let outcome = rig.request(&[R(HEADER, 16), W(DATA, 100), W(DATA + 0x1000, 924), W(STATUS, 1)]);
        assert_eq!((outcome, status(&rig)), (Outcome::Used(1025), 0));
        assert_eq!(rig.read(DATA, 100), [3; 100]);
        assert_eq!(rig.read(DATA + 0x1000, 412), [3; 412]);
        assert_eq!(rig.read(DATA + 0x1000 + 412, 512), [4; 512]);
    }

    #[test]
    fn sectors_are_written_from_any_split_and_last() {
        let (mut rig, file) = disk(false);
        put(&rig, spec::VIRTIO_BLK_T_OUT, 5);
        rig.write(DATA, &[0xaa; 512]);
        // The header in two parts, the second with data behind it.
        let (part, rest) = (R(HEADER, 7), R(HEADER + 7, 9));
        let outcome = rig.request(&[part, rest, R(DATA, 512), W(STATUS, 1)]);
        assert_eq!((outcome, status(&rig)), (Outcome::Used(1), 0));
        put(&rig, spec::VIRTIO_BLK_T_FLUSH, 0);
        assert_eq!(rig.request(&[R(HEADER, 16), W(STATUS, 1)]), Outcome::Used(1));
        assert_eq!(status(&rig), 0);
        let content = std::fs::read(&file.0).unwrap();
        assert_eq!(content[5 * 512..6 * 512], [0xaa; 512]);
        assert_eq!((content[5 * 512 - 1], content[6 * 512]), (4, 6));
    }

    #[test]
    fn what_a_read_only_disk_refuses_leaves_it_as_it_was() {
        let (mut rig, file) = disk(true);
        let before = std::fs::read(&file.0).unwrap();
        put(&rig, spec::VIRTIO_BLK_T_OUT, 0);
        assert_eq!(
            rig.request(&[R(HEADER, 16), R(DATA, 512), W(STATUS, 1)]),
            Outcome::Used(1)
        );
        assert_eq!(status(&rig), Status::IoError as u8);
        put(&rig, spec::VIRTIO_BLK_T_DISCARD, 0);
        assert_eq!(
            rig.request(&[R(HEADER, 16), R(DATA, 16), W(STATUS, 1)]),
            Outcome::Used(1)
        );
        assert_eq!(status(&rig), Status::Unsupported as u8);
        assert_eq!(std::fs::read(&file.0).unwrap(), before);
    }

    #[test]
    fn zeroes_and_discards_stay_within_their_ranges() {
        let (mut rig, file) = disk(false);
        for (kind, first, count) in [
            (spec::VIRTIO_BLK_T_WRITE_ZEROES, 2u64, 3u32),
            (spec::VIRTIO_BLK_T_DISCARD, 8, 8),
        ] {
            put(&rig, kind, 0);
            rig.write(DATA, &first.to_le_bytes());
            rig.write(DATA + 8, &u64::from(count).to_le_bytes());
            assert_eq!(
                rig.request(&[R(HEADER, 16), R(DATA, 16), W(STATUS, 1)]),
                Outcome::Used(1)
            );
            assert_eq!(status(&rig), 0);
        }
        let content = std::fs::read(&file.0).unwrap();
        let expected: Vec<u8> = [0, 1, 0, 0, 0, 5, 6, 7]
            .into_iter()
            .flat_map(|byte| [byte; 512])
            .collect();
        assert_eq!(content.len(), 8192);
        assert_eq!(content[..4096], expected);
    }

    #[test]
    fn the_serial_number_is_padded() {
        let (mut rig, _file) = disk(true);
        put(&rig, spec::VIRTIO_BLK_T_GET_ID, 0);
        let outcome = rig.request(&[R(HEADER, 16), W(DATA, 20), W(STATUS, 1)]);
        assert_eq!((outcome, status(&rig)), (Outcome::Used(21), 0));
        assert_eq!(rig.read(DATA, 20), *b"serial 7\0\0\0\0\0\0\0\0\0\0\0\0");
    }

    #[test]
    fn buffers_outside_memory_are_io_errors_while_the_status_can_be_told() {
        let (mut rig, file) = disk(false);
        let before = std::fs::read(&file.0).unwrap();
        for (kind, buffer) in [
            (spec::VIRTIO_BLK_T_IN, W(u64::MAX - 100, 512)),
            (spec::VIRTIO_BLK_T_IN, W(1 << 40, 512)),
            (spec::VIRTIO_BLK_T_OUT, R(1 << 40, 512)),
        ] {
            put(&rig, kind, 0);
            assert!(matches!(
                rig.request(&[R(HEADER, 16), buffer, W(STATUS, 1)]),
                Outcome::Used(_)
            ));
            assert_eq!(status(&rig), Status::IoError as u8);
        }
        assert_eq!(std::fs::read(&file.0).unwrap(), before);
    }

    #[test]
    fn a_request_without_header_or_status_breaks_the_device() {
        let hopeless: [&[_]; 6] = [
            &[],
            &[R(HEADER, 16)],
            &[W(STATUS, 1)],
            &[R(HEADER, 15), W(STATUS, 1)],
            &[R(1 << 40, 16), W(STATUS, 1)],
            &[R(HEADER, 16), W(1 << 40, 1)],
        ];
        for buffers in hopeless {
            let (mut rig, _file) = disk(false);
            put(&rig, spec::VIRTIO_BLK_T_FLUSH, 0);
            assert_eq!(rig.request(buffers), Outcome::Broken, "{buffers:?}");
        }
    }

    const ALL_WAYS: [Ways; 2] = [Ways::None, Ways::All];

    /// A disk whose transfers go as said.
    fn rig(file: File, sectors: u64, ways: Ways, log: Logger) -> Rig {
        let image = Image::for_test(file, sectors, ways);
        Rig::new(Box::new(Block::new(Disk::Raw(Arc::new(image)), "", log)))
    }

    #[test]
    fn a_transfer_of_many_chunks_and_pieces_is_whole_by_any_way() {
        let bytes = CHUNK_BYTES * 2 + 4096;
        let before: Vec<u8> = (0..bytes).map(|at| (at / 512) as u8).collect();
        for ways in ALL_WAYS {
            let scratch = Scratch::new(&before);
            let file = File::options().read(true).write(true).open(&scratch.0).unwrap();
            let log = Logger::root(slog::Discard, o!());
            let mut rig = rig(file, bytes as u64 / 512, ways, log);
            put(&rig, spec::VIRTIO_BLK_T_IN, 0);
            let place = 0x1_0000;
            // More pieces than go straight at once, then a large one; one behind the other, so that they read as one.
            let (small, count) = (100, 90);
            let rest = (bytes - small * count) as u32;
            let pieces = |make: fn(u64, u32) -> crate::virtio::testing::Buffer| {
                let pieces = (0..count).map(move |n| make(place + (n * small) as u64, small as u32));
                pieces.chain([make(place + (count * small) as u64, rest)])
            };
            let room: Vec<_> = std::iter::once(R(HEADER, 16))
                .chain(pieces(W))
                .chain([W(STATUS, 1)])
                .collect();
            assert_eq!(rig.request(&room), Outcome::Used(bytes as u32 + 1), "{ways:?}");
            assert_eq!(status(&rig), 0);
            assert!(rig.read(place, bytes) == before, "{ways:?}");
            rig.write(place, &vec![0x5a; bytes]);
            put(&rig, spec::VIRTIO_BLK_T_OUT, 0);
            let given: Vec<_> = std::iter::once(R(HEADER, 16))
                .chain(pieces(R))
                .chain([W(STATUS, 1)])
                .collect();
            assert_eq!(rig.request(&given), Outcome::Used(1), "{ways:?}");
            assert_eq!(status(&rig), 0);
            assert!(
                std::fs::read(&scratch.0).unwrap() == vec![0x5a; bytes],
                "{ways:?}"
            );
        }
    }

    #[test]
    fn a_file_that_was_cut_short_is_an_io_error_by_any_way() {
        for ways in ALL_WAYS {
            let scratch = Scratch::new(&[1; 1024]);
            let file = File::options().read(true).write(true).open(&scratch.0).unwrap();
            let (log, lines) = crate::virtio::testing::kept_log();
            let mut rig = rig(file, 16, ways, log);
            put(&rig, spec::VIRTIO_BLK_T_IN, 1);
            let outcome = rig.request(&[R(HEADER, 16), W(DATA, 1024), W(STATUS, 1)]);
            assert!(matches!(outcome, Outcome::Used(_)), "{ways:?}");
            assert_eq!(status(&rig), Status::IoError as u8, "{ways:?}");
            assert!(lines.recv().unwrap().contains("cannot read from it"), "{ways:?}");
        }
    }

    #[test]
    fn after_a_flush_that_failed_none_succeeds() {
        // What cannot be synchronized at all stands for a disk that has lost something.
        let null = File::options().read(true).write(true).open("/dev/null").unwrap();
        let mut disk = Disk::Raw(Arc::new(Image::for_test(null, 16, Ways::None)));
        assert!(disk.flush().is_err());
        let (log, lines) = crate::virtio::testing::kept_log();
        let mut rig = Rig::new(Box::new(Block::new(disk, "", log)));
        put(&rig, spec::VIRTIO_BLK_T_FLUSH, 0);
        assert_eq!(rig.request(&[R(HEADER, 16), W(STATUS, 1)]), Outcome::Used(1));
        assert_eq!(status(&rig), Status::IoError as u8);
        assert!(lines.recv().unwrap().contains("an earlier flush failed"));
    }

    #[test]
    fn a_full_host_is_an_io_error_and_says_so() {
        // A device that is always full stands for the host's disk.
        let full = File::options().read(true).write(true).open("/dev/full").unwrap();
        let (log, lines) = crate::virtio::testing::kept_log();
        let mut rig = rig(full, 16, Ways::All, log);
        for _ in 0..20 {
            put(&rig, spec::VIRTIO_BLK_T_OUT, 0);
            assert_eq!(
                rig.request(&[R(HEADER, 16), R(DATA, 512), W(STATUS, 1)]),
                Outcome::Used(1)
            );
            assert_eq!(status(&rig), Status::IoError as u8);
        }
        let lines: Vec<String> = lines.try_iter().collect();
        assert!((1..10).contains(&lines.len()), "{lines:?}");
        assert!(
            lines[0].contains("No space left on device") && lines[0].contains("make room"),
            "{lines:?}"
        );
    }
}
