//! A backend without `/dev/kvm`: a stream of exits from code or from a text, with what the guest would have seen.
//!
//! A text has one step a line; `#` starts a comment:
//!
//! ```text
//! out 3f8 1 41        # port, width in bytes, value (hexadecimal)
//! in 3fd 1 60         # port, width, and optionally the value that must be read
//! outs 3f8 1 48 69    # string form: port, width, elements
//! ins 1f0 2 3         # port, width, how many elements
//! write fee00000 4 1  # address, length, value
//! read fee00000 4     # address, length, and optionally the value that must be read
//! hlt                 # halt for ever: only a kick ends it
//! shutdown | window | intr | eagain | eintr
//! other 42            # any exit by number
//! unknown 31 | fail-entry 21 | internal-error 1 | event shutdown
//! ```

use super::backend::{Backend, ResetError, RunError};
use super::exit::{Exit, InternalError, MmioExit, PioExit, SystemEvent};
use super::registers::Registers;
use crate::actors::park::Futex;
use crate::boot::EntryPoint;
use crate::devices::{Direction, Width};
use nix::errno::Errno;
use std::sync::atomic::Ordering;

/// One step of a script.
#[derive(Clone, Debug, PartialEq)]
pub enum Step {
    /// `out`, one element or many.
    Out {
        /// Port.
        port: u16,
        /// Bytes an element.
        width: Width,
        /// The elements.
        values: Vec<u32>,
    },
    /// `in`, `count` elements.
    In {
        /// Port.
        port: u16,
        /// Bytes an element.
        width: Width,
        /// How many.
        count: u32,
        /// What must come.
        expect: Option<u32>,
    },
    /// A store.
    Write {
        /// Guest physical address.
        address: u64,
        /// 1 to 8.
        length: u8,
        /// Little-endian in its first `length` bytes.
        value: u64,
    },
    /// A load.
    Read {
        /// Guest physical address.
        address: u64,
        /// 1 to 8.
        length: u8,
        /// What must come.
        expect: Option<u64>,
    },
    /// The guest sleeps until it is kicked; then the script goes on behind it only if the halt was `once`.
    Halt,
    /// Any exit without data.
    Exit(Exit),
    /// KVM_RUN fails.
    Fail(RunError),
}

/// Where a script's steps come from, and where what was read goes. Implemented by [`Script`]; benches bring their
/// own.
pub trait Source: Send {
    /// The next step; `None`: the script is over, and the guest halts for ever.
    fn next(&mut self) -> Option<Step>;
    /// What a read step got.
    fn seen(&mut self, step: &Step, value: u64);
    /// The machine is reset: the guest starts again.
    fn reset(&mut self) {}
    /// Guest time goes on after a pause; see [`Backend::take_time`].
    fn take_time(&mut self) {}
}

/// Offset of port data in the pretended mapping, as KVM has it on x86.
const PIO_OFFSET: u64 = 0x1000;

/// Runs a [`Source`].
pub struct ScriptedBackend<S: Source> {
    source: S,
    /// Also what a halted guest sleeps on: the kick's handler sets its first byte.
    immediate_exit: Box<Futex>,
    /// The step whose exit is being handled.
    pending: Option<Step>,
    pio: Vec<u8>,
    mmio: [u8; 8],
    halted: bool,
    exit: Exit,
}

impl<S: Source> ScriptedBackend<S> {
    /// A backend that plays `source`.
    pub fn new(source: S) -> Self {
        ScriptedBackend {
            source,
            immediate_exit: Box::new(Futex::new(0)),
            pending: None,
            pio: Vec::new(),
            mmio: [0; 8],
            halted: false,
            exit: Exit::Intr,
        }
    }

    /// Hands what the last exit read to the source.
    fn complete(&mut self) {
        let Some(step) = self.pending.take() else { return };
        let value = match &step {
            Step::In { width, count, .. } => {
                // The last element of a string form, as in the register that a loop would leave.
                let bytes = width.bytes();
                let last = &self.pio[bytes * (*count as usize - 1)..];
                let mut value = [0; 8];
                value[..bytes].copy_from_slice(&last[..bytes]);
                u64::from_le_bytes(value)
            }
            Step::Read { length, .. } => {
                u64::from_le_bytes(self.mmio) & (u64::MAX >> (64 - 8 * u32::from(*length)))
            }
            _ => return,
        };
        self.source.seen(&step, value);
    }
}

impl<S: Source> Backend for ScriptedBackend<S> {
    fn run(&mut self) -> Result<(), RunError> {
        self.complete();
        // Between the way in and the guest.
        crate::simulation::point();
        if self.immediate_exit.load(Ordering::Relaxed) != 0 {
            return Err(RunError::Interrupted);
        }
        if self.halted {
            while self.immediate_exit.load(Ordering::Relaxed) == 0 {
                self.immediate_exit.wait(0);
            }
            return Err(RunError::Interrupted);
        }
        let Some(step) = self.source.next() else {
            self.halted = true;
            return self.run();
        };
        self.exit = match &step {
            Step::Out { port, width, values } => {
                self.pio.clear();
                for value in values {
                    self.pio.extend_from_slice(&value.to_le_bytes()[..width.bytes()]);
                }
                Exit::Pio(PioExit {
                    direction: Direction::Write,
                    port: *port,
                    width: *width,
                    count: values.len() as u32,
                    data_offset: PIO_OFFSET,
                })
            }
            Step::In {
                port, width, count, ..
            } => {
                self.pio.clear();
                self.pio.resize(width.bytes() * *count as usize, 0);
                Exit::Pio(PioExit {
                    direction: Direction::Read,
                    port: *port,
                    width: *width,
                    count: *count,
                    data_offset: PIO_OFFSET,
                })
            }
            Step::Write {
                address,
                length,
                value,
            } => Exit::Mmio(MmioExit {
                direction: Direction::Write,
                address: *address,
                length: usize::from(*length),
                data: value.to_le_bytes(),
            }),
            Step::Read { address, length, .. } => Exit::Mmio(MmioExit {
                direction: Direction::Read,
                address: *address,
                length: usize::from(*length),
                data: [0; 8],
            }),
            Step::Halt => {
                self.halted = true;
                return self.run();
            }
            Step::Exit(exit) => *exit,
            Step::Fail(error) => return Err(*error),
        };
        self.pending = Some(step);
        Ok(())
    }

    fn exit(&mut self) -> Exit {
        self.exit
    }

    fn pio_data(&mut self, offset: u64, length: usize) -> Option<&mut [u8]> {
        let start = usize::try_from(offset.checked_sub(PIO_OFFSET)?).ok()?;
        self.pio.get_mut(start..start.checked_add(length)?)
    }

    fn mmio_data(&mut self) -> &mut [u8; 8] {
        &mut self.mmio
    }

    fn immediate_exit(&mut self) -> *mut u8 {
        self.immediate_exit.as_byte_ptr()
    }

    fn registers(&mut self) -> Option<Registers> {
        None
    }

    fn code_at(&mut self, _linear: u64) -> Option<Vec<u8>> {
        None
    }

    fn wakes_from_halt(&self) -> bool {
        true
    }

    fn take_time(&mut self) {
        self.source.take_time();
    }

    fn reset(&mut self, _entry: Option<&EntryPoint>) -> Result<(), ResetError> {
        self.source.reset();
        self.pending = None;
        self.halted = false;
        Ok(())
    }
}

/// A list of steps, and what its reads got.
pub struct Script {
    steps: Vec<Step>,
    /// The next of them.
    at: usize,
    seen: crossbeam_channel::Sender<Seen>,
}

/// What one read of a script got.
#[derive(Clone, Debug, PartialEq)]
pub struct Seen {
    /// The step that read.
    pub step: Step,
    /// What it got.
    pub value: u64,
}

impl Seen {
    /// Whether the step said what must come, and something else came.
    pub fn is_wrong(&self) -> bool {
        match self.step {
            Step::In {
                expect: Some(expect), ..
            } => u64::from(expect) != self.value,
            Step::Read {
                expect: Some(expect), ..
            } => expect != self.value,
            _ => false,
        }
    }
}

impl Script {
    /// A script, and where what it reads can be had.
    pub fn new(steps: Vec<Step>) -> (Script, crossbeam_channel::Receiver<Seen>) {
        // One entry a step at most, so the bound is never met.
        let (seen, results) = crossbeam_channel::bounded(steps.len().max(1));
        (Script { steps, at: 0, seen }, results)
    }

    /// Reads the steps of a text; see the module's documentation.
    ///
    /// # Errors
    /// The number of the first line that is not a step, and why.
    pub fn parse(text: &str) -> Result<Vec<Step>, String> {
        let mut steps = Vec::new();
        for (number, line) in text.lines().enumerate() {
            let line = line.split('#').next().unwrap_or_default().trim();
            if !line.is_empty() {
                let words: Vec<&str> = line.split_whitespace().collect();
                steps.push(parse_step(&words).map_err(|why| format!("line {}: {why}", number + 1))?);
            }
        }
        Ok(steps)
    }
}

impl Source for Script {
    fn next(&mut self) -> Option<Step> {
        let step = self.steps.get(self.at).cloned();
        self.at += usize::from(step.is_some());
        step
    }

    fn reset(&mut self) {
        self.at = 0;
    }

    fn seen(&mut self, step: &Step, value: u64) {
        let _ = self.seen.try_send(Seen {
            step: step.clone(),
            value,
        });
    }
}

fn parse_step(words: &[&str]) -> Result<Step, String> {
    let hex = |at: usize| -> Result<u64, String> {
        let word = words
            .get(at)
            .ok_or_else(|| format!("'{}' needs more", words[0]))?;
        u64::from_str_radix(word, 16).map_err(|_| format!("'{word}' is not a hexadecimal number"))
    };
    let port = |at| hex(at).and_then(|n| u16::try_from(n).map_err(|_| format!("{n:#x} is not a port")));
    let dword =
        |at| hex(at).and_then(|n| u32::try_from(n).map_err(|_| format!("{n:#x} has more than 32 bits")));
    let width = |at| match hex(at)? {
        n @ (1 | 2 | 4) => Ok(Width::from_bytes(n as usize).expect("1, 2 or 4")),
        n => Err(format!("a port is 1, 2 or 4 bytes wide, not {n}")),
    };
    let length = |at| match hex(at)? {
        n @ 1..=8 => Ok(n as u8),
        n => Err(format!("an access is 1 to 8 bytes long, not {n}")),
    };
    Ok(match words[0] {
        "out" => Step::Out {
            port: port(1)?,
            width: width(2)?,
            values: vec![dword(3)?],
        },
        "outs" => Step::Out {
            port: port(1)?,
            width: width(2)?,
            values: (3..words.len()).map(dword).collect::<Result<_, _>>()?,
        },
        "in" => Step::In {
            port: port(1)?,
            width: width(2)?,
            count: 1,
            expect: if words.len() > 3 { Some(dword(3)?) } else { None },
        },
        "ins" => match dword(3)? {
            0 => return Err("'ins' of no element".into()),
            count if count > 4096 => return Err("'ins' of more elements than a page holds".into()),
            count => Step::In {
                port: port(1)?,
                width: width(2)?,
                count,
                expect: None,
            },
        },
        "write" => Step::Write {
            address: hex(1)?,
            length: length(2)?,
            value: hex(3)?,
        },
        "read" => Step::Read {
            address: hex(1)?,
            length: length(2)?,
            expect: if words.len() > 3 { Some(hex(3)?) } else { None },
        },
        "hlt" => Step::Halt,
        "shutdown" => Step::Exit(Exit::Shutdown),
        "window" => Step::Exit(Exit::IrqWindowOpen),
        "intr" => Step::Exit(Exit::Intr),
        "eagain" => Step::Fail(RunError::Again),
        "eintr" => Step::Fail(RunError::Interrupted),
        "errno" => Step::Fail(RunError::Failed(Errno::from_raw(dword(1)? as i32))),
        "other" => Step::Exit(Exit::Other { reason: dword(1)? }),
        "unknown" => Step::Exit(Exit::Unknown {
            hardware_exit_reason: hex(1)?,
        }),
        "fail-entry" => Step::Exit(Exit::FailEntry {
            hardware_entry_failure_reason: hex(1)?,
            cpu: 0,
        }),
        "internal-error" => Step::Exit(Exit::InternalError(InternalError {
            suberror: dword(1)?,
            ndata: 0,
            data: [0; 16],
        })),
        "event" => Step::Exit(Exit::SystemEvent(match words.get(1) {
            Some(&"shutdown") => SystemEvent::Shutdown,
            Some(&"reset") => SystemEvent::Reset,
            Some(&"crash") => SystemEvent::Crash,
            other => {
                return Err(format!(
                    "'{}' is not shutdown, reset or crash",
                    other.unwrap_or(&"")
                ));
            }
        })),
        other => return Err(format!("'{other}' is not a step")),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_text_becomes_steps() {
        let steps =
            Script::parse("# a comment\nout 3f8 1 41 # A\n\nins 1f0 2 3\nread fee00000 4 12\nhlt\n").unwrap();
        assert_eq!(
            steps,
            [
                Step::Out {
                    port: 0x3f8,
                    width: Width::Byte,
                    values: vec![0x41]
                },
                Step::In {
                    port: 0x1f0,
                    width: Width::Word,
                    count: 3,
                    expect: None
                },
                Step::Read {
                    address: 0xfee0_0000,
                    length: 4,
                    expect: Some(0x12)
                },
                Step::Halt,
            ]
        );
    }

    #[test]
    fn a_bad_line_is_named() {
        for (text, said) in [
            ("hlt\nfly", "line 2: 'fly' is not a step"),
            ("out 3f8 3 1", "line 1: a port is 1, 2 or 4 bytes wide, not 3"),
            ("out 3f8 1", "line 1: 'out' needs more"),
            ("in 10000 1", "line 1: 0x10000 is not a port"),
            ("read 0 9", "line 1: an access is 1 to 8 bytes long, not 9"),
            ("read zz 1", "line 1: 'zz' is not a hexadecimal number"),
            ("ins 0 1 0", "line 1: 'ins' of no element"),
        ] {
            assert_eq!(Script::parse(text).unwrap_err(), said);
        }
    }

    #[test]
    fn reads_are_reported_and_checked() {
        let (script, seen) = Script::new(Script::parse("in 3f8 1 7\nread 0 2 9").unwrap());
        let mut backend = ScriptedBackend::new(script);
        backend.run().unwrap();
        let Exit::Pio(exit) = backend.exit() else { panic!() };
        backend.pio_data(exit.data_offset, 1).unwrap()[0] = 7;
        backend.run().unwrap();
        assert!(matches!(backend.exit(), Exit::Mmio(_)));
        *backend.mmio_data() = [8, 0, 0xff, 0, 0, 0, 0, 0];
        // SAFETY: the byte belongs to the backend, which lives.
        unsafe { *backend.immediate_exit() = 1 };
        assert_eq!(backend.run(), Err(RunError::Interrupted));
        let results: Vec<_> = seen
            .try_iter()
            .map(|seen| (seen.value, seen.is_wrong()))
            .collect();
        assert_eq!(results, [(7, false), (8, true)]);
    }
}
