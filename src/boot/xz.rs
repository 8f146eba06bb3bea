//! xz files as kernels use them: LZMA2, alone or behind the filter for x86 code, which lzma-rs does not have.
//!
//! [The .xz File Format 1.2.1]. The index at the end is not read: a kernel's payload states its size otherwise.

use std::io::{self, BufRead, Read, Write};

use flate2::Crc;

/// What an xz file starts with.
pub const MAGIC: [u8; 6] = [0xfd, b'7', b'z', b'X', b'Z', 0];

const FILTER_X86: u64 = 0x04;
const FILTER_LZMA2: u64 = 0x21;
const CHECK_CRC32: u8 = 1;
/// Bytes of the check behind a block, by its type [xz §2.1.1.2].
const CHECK_BYTES: [usize; 16] = [0, 4, 4, 4, 8, 8, 8, 16, 16, 16, 32, 32, 32, 64, 64, 64];

fn invalid(what: &str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, what)
}

/// Unpacks all blocks of `input` into `sink`.
pub fn decode(input: &mut impl BufRead, sink: &mut impl Write) -> io::Result<()> {
    let mut header = [0; 12];
    input.read_exact(&mut header)?;
    if header[..6] != MAGIC || header[6] != 0 || header[7] > 15 || crc32(&header[6..8]) != header[8..] {
        return Err(invalid("the stream header is damaged"));
    }
    let check = header[7];
    loop {
        let mut size = [0];
        input.read_exact(&mut size)?;
        if size[0] == 0 {
            return Ok(()); // the index
        }
        let mut block = vec![0; (usize::from(size[0]) + 1) * 4];
        block[0] = size[0];
        input.read_exact(&mut block[1..])?;
        let x86 = parse_block_header(&block)?;

        let mut counted = Counted {
            input: &mut *input,
            bytes: 0,
        };
        let mut output = Checked {
            sink: &mut *sink,
            crc: Crc::new(),
        };
        if x86 {
            let mut filter = X86Filter::new(&mut output);
            lzma2(&mut counted, &mut filter)?;
            filter.finish()?;
        } else {
            lzma2(&mut counted, &mut output)?;
        }
        let padding = (counted.bytes.next_multiple_of(4) - counted.bytes) as usize;
        let sum = output.crc.sum().to_le_bytes();
        let mut trailer = vec![0; padding + CHECK_BYTES[usize::from(check)]];
        input.read_exact(&mut trailer)?;
        if check == CHECK_CRC32 && trailer[padding..] != sum {
            return Err(invalid("the checksum is wrong"));
        }
    }
}

fn crc32(bytes: &[u8]) -> [u8; 4] {
    let mut crc = Crc::new();
    crc.update(bytes);
    crc.sum().to_le_bytes()
}

fn lzma2(input: &mut impl BufRead, output: &mut impl Write) -> io::Result<()> {
    lzma_rs::lzma2_decompress(input, output).map_err(|error| invalid(&error.to_string()))
}

/// Whether the block has the x86 filter. An error if it has any other but LZMA2.
fn parse_block_header(block: &[u8]) -> io::Result<bool> {
    let (content, sum) = block.split_at(block.len() - 4);
    if crc32(content) != sum {
        return Err(invalid("a block header is damaged"));
    }
    let flags = content[1];
    let mut rest = &content[2..];
    for present in [flags & 0x40, flags & 0x80] {
        if present != 0 {
            integer(&mut rest)?; // packed and unpacked size, which the data tells too
        }
    }
    let mut filters = Vec::new();
    for _ in 0..=flags & 3 {
        let filter = integer(&mut rest)?;
        let properties = integer(&mut rest)? as usize;
        let properties = rest
            .split_off(..properties)
            .ok_or_else(|| invalid("a block header is too short"))?;
        if filter == FILTER_X86 && properties.iter().any(|byte| *byte != 0) {
            return Err(invalid("the x86 filter has an offset"));
        }
        filters.push(filter);
    }
    match filters[..] {
        [FILTER_LZMA2] => Ok(false),
        [FILTER_X86, FILTER_LZMA2] => Ok(true),
        _ => Err(invalid("a filter is not supported")),
    }
}

/// A number of 7 bits a byte, least significant first.
fn integer(bytes: &mut &[u8]) -> io::Result<u64> {
    let mut value = 0;
    for shift in (0..63).step_by(7) {
        let byte = *bytes
            .split_off_first()
            .ok_or_else(|| invalid("a block header is too short"))?;
        value |= u64::from(byte & 0x7f) << shift;
        if byte & 0x80 == 0 {
            return Ok(value);
        }
    }
    Err(invalid("a number is too long"))
}

/// Counts what is read.
struct Counted<R> {
    input: R,
    bytes: u64,
}

impl<R: BufRead> Read for Counted<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let count = self.input.read(buffer)?;
        self.bytes += count as u64;
        Ok(count)
    }
}

impl<R: BufRead> BufRead for Counted<R> {
    fn fill_buf(&mut self) -> io::Result<&[u8]> {
        self.input.fill_buf()
    }

    fn consume(&mut self, count: usize) {
        self.bytes += count as u64;
        self.input.consume(count);
    }
}

/// Sums up what is written.
struct Checked<W> {
    sink: W,
    crc: Crc,
}

impl<W: Write> Write for Checked<W> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let count = self.sink.write(bytes)?;
        self.crc.update(&bytes[..count]);
        Ok(count)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.sink.flush()
    }
}

/// Undoes the filter for x86 code: the packer made the operands of CALL and JMP absolute, because the same target
/// then looks the same from everywhere. Here they become relative again.
///
/// Not every 0xe8 or 0xe9 is an opcode. Packer and unpacker agree on which are taken for one by looking at the
/// operand's highest byte, and at the unconverted candidates among the three bytes before.
struct X86Filter<W> {
    sink: W,
    /// Bytes that are not decided yet.
    pending: Vec<u8>,
    /// Where the first of them is in the stream, modulo 2^32.
    position: u32,
    /// Bit n: the byte n + 1 before the next one was a candidate and was left as it is.
    candidates: u8,
}

/// The highest byte of an operand that stays within 16 MiB, forward or backward.
fn is_near(byte: u8) -> bool {
    byte == 0 || byte == 0xff
}

/// A candidate's opcode and operand.
const INSTRUCTION_BYTES: usize = 5;

impl<W: Write> X86Filter<W> {
    /// How much is taken at a time.
    const PIECE_BYTES: usize = 64 << 10;

    fn new(sink: W) -> Self {
        X86Filter {
            sink,
            pending: Vec::new(),
            position: 0,
            candidates: 0,
        }
    }

    /// Converts what is complete and hands it on.
    fn convert(&mut self) -> io::Result<()> {
        let mut at = 0;
        while at + INSTRUCTION_BYTES <= self.pending.len() {
            let opcode = self.pending[at];
            let is_candidate = opcode & 0xfe == 0xe8;
            if is_candidate && let Some(operand) = self.relative(at) {
                self.pending[at + 1..at + INSTRUCTION_BYTES].copy_from_slice(&operand.to_le_bytes());
                self.candidates = 0;
                at += INSTRUCTION_BYTES;
            } else {
                self.candidates = (self.candidates << 1 | u8::from(is_candidate)) & 0b111;
                at += 1;
            }
        }
        self.sink.write_all(&self.pending[..at])?;
        self.pending.drain(..at);
        self.position = self.position.wrapping_add(at as u32);
        Ok(())
    }

    /// The relative operand of the instruction at `at`; `None` if it was not taken for one.
    fn relative(&self, at: usize) -> Option<u32> {
        let bytes = &self.pending[at..at + INSTRUCTION_BYTES];
        // How far before this one the earliest candidate was; 0 if there was none.
        let distance = 8 - self.candidates.leading_zeros();
        if !is_near(bytes[4]) {
            return None;
        }
        // If that candidate's operand ended in a near byte too, the two could not be told apart.
        if distance != 0 && (self.candidates.count_ones() > 1 || is_near(bytes[4 - distance as usize])) {
            return None;
        }
        let next = self.position.wrapping_add((at + INSTRUCTION_BYTES) as u32);
        let mut absolute = u32::from_le_bytes([bytes[1], bytes[2], bytes[3], bytes[4]]);
        let relative = loop {
            let relative = absolute.wrapping_sub(next);
            if distance == 0 {
                break relative;
            }
            // The packer converted again if a byte that decided above would have come out near.
            if !is_near((relative >> (24 - 8 * distance)) as u8) {
                break relative;
            }
            absolute = relative ^ ((1u32 << (32 - 8 * distance)) - 1);
        };
        // 25 bits with their sign count.
        Some(((relative << 7) as i32 >> 7) as u32)
    }

    /// What is left is too short for an instruction.
    fn finish(mut self) -> io::Result<()> {
        self.sink.write_all(&self.pending)
    }
}

impl<W: Write> Write for X86Filter<W> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        for piece in bytes.chunks(Self::PIECE_BYTES) {
            self.pending.extend_from_slice(piece);
            self.convert()?;
        }
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        self.sink.flush()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Bytes as in code: many opcodes, some near one another, with operands of every kind.
    fn code(length: usize) -> Vec<u8> {
        let mut state = 0x2545_f491_4f6c_dd1du64;
        let mut bytes = Vec::with_capacity(length);
        while bytes.len() < length {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            let choice = state.to_le_bytes();
            bytes.push(match choice[0] % 6 {
                0 => 0xe8,
                1 => 0xe9,
                2 => 0,
                3 => 0xff,
                _ => choice[1],
            });
        }
        bytes
    }

    /// Through the xz program, which is the reference; nearly every machine has it.
    fn xz(arguments: &[&str], content: &[u8]) -> Option<Vec<u8>> {
        let mut child = std::process::Command::new("xz")
            .args(arguments)
            .args(["--stdout", "--format=xz"])
            .stdin(std::process::Stdio::piped())
            .stdout(std::process::Stdio::piped())
            .spawn()
            .ok()?;
        let mut stdin = child.stdin.take().unwrap();
        let content = content.to_vec();
        let writer = std::thread::spawn(move || stdin.write_all(&content));
        let output = child.wait_with_output().unwrap();
        writer.join().unwrap().unwrap();
        Some(output.stdout)
    }

    #[test]
    fn as_the_xz_program_packs() {
        let content = code(300_000);
        for arguments in [
            &["--check=crc32", "--x86", "--lzma2=preset=1"][..],
            &["--check=crc32", "--lzma2=preset=0"],
            &["--check=crc64", "--x86", "--lzma2=preset=0", "--block-size=70000"],
        ] {
            let Some(packed) = xz(arguments, &content) else {
                eprintln!("SKIPPED: no xz program on this machine");
                return;
            };
            let mut unpacked = Vec::new();
            decode(&mut &packed[..], &mut unpacked).unwrap();
            assert!(unpacked == content, "{arguments:?}");
        }
    }

    #[test]
    fn damage_is_found() {
        let mut packed = Vec::new();
        lzma_rs::xz_compress(&mut &[1, 2, 3, 4, 5][..], &mut packed).unwrap();
        for offset in 0..packed.len().min(24) {
            let mut damaged = packed.clone();
            damaged[offset] ^= 0x10;
            let mut sink = Vec::new();
            if decode(&mut &damaged[..], &mut sink).is_ok() {
                assert_eq!(sink, [1, 2, 3, 4, 5], "at {offset}");
            }
        }
        assert!(decode(&mut &packed[..20], &mut Vec::new()).is_err());
    }
}
