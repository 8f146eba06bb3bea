//! Why KVM_RUN came back, as a typed value, decoded by a pure function from the shared `kvm_run` page.
//!
//! [KVM api: "The kvm_run structure"]. Nothing here needs `/dev/kvm`: tests fill in a `kvm_run` and decode it.

use crate::devices::{Direction, Width};
use kvm_bindings as kvm;
use std::fmt;

/// Why a vCPU left the guest. Payloads that are larger than a few words (port data) stay in the mapping and are
/// reached through [`Backend`](super::backend::Backend).
#[derive(Clone, Copy, PartialEq, Debug)]
pub enum Exit {
    /// KVM_EXIT_IO: `count` elements of `width` at `data_offset` in the mapping. More than one for string forms.
    Pio(PioExit),
    /// KVM_EXIT_MMIO.
    Mmio(MmioExit),
    /// KVM_EXIT_HLT: the guest halted and there is no in-kernel interrupt controller to wake it.
    Hlt,
    /// KVM_EXIT_IRQ_WINDOW_OPEN: an interrupt could be injected now.
    IrqWindowOpen,
    /// KVM_EXIT_SHUTDOWN: triple fault.
    Shutdown,
    /// KVM_EXIT_SYSTEM_EVENT.
    SystemEvent(SystemEvent),
    /// KVM_EXIT_DEBUG.
    Debug {
        /// Exception vector: 1 for #DB, 3 for #BP.
        exception: u32,
        /// Guest linear address of the event.
        pc: u64,
        /// DR6 at the event.
        dr6: u64,
        /// DR7 at the event.
        dr7: u64,
    },
    /// KVM_EXIT_INTR: a signal came; the same as EINTR.
    Intr,
    /// KVM_EXIT_IOAPIC_EOI (split irqchip only).
    IoapicEoi {
        /// The vector that was ended.
        vector: u8,
    },
    /// KVM_EXIT_UNKNOWN.
    Unknown {
        /// The hardware's own reason.
        hardware_exit_reason: u64,
    },
    /// KVM_EXIT_FAIL_ENTRY: the processor refused to enter the guest with this state.
    FailEntry {
        /// The hardware's own reason.
        hardware_entry_failure_reason: u64,
        /// Host processor.
        cpu: u32,
    },
    /// KVM_EXIT_INTERNAL_ERROR.
    InternalError(InternalError),
    /// Any other exit, by its number.
    Other {
        /// `exit_reason`.
        reason: u32,
    },
    /// An exit whose fields contradict the API: KVM is broken, or not KVM.
    Malformed {
        /// `exit_reason`.
        reason: u32,
        /// Which field.
        what: &'static str,
    },
}

/// Fields of KVM_EXIT_IO.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct PioExit {
    /// `in` or `out`.
    pub direction: Direction,
    /// First, and for the string forms only, port.
    pub port: u16,
    /// Bytes an element: 1, 2 or 4.
    pub width: Width,
    /// How many elements.
    pub count: u32,
    /// Where in the mapping the elements are.
    pub data_offset: u64,
}

/// Fields of KVM_EXIT_MMIO.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct MmioExit {
    /// Load or store.
    pub direction: Direction,
    /// Guest physical address.
    pub address: u64,
    /// 1 to 8 bytes; an access that crosses a page comes in parts of any length.
    pub length: usize,
    /// What is stored (stores), little-endian.
    pub data: [u8; 8],
}

/// What KVM_EXIT_SYSTEM_EVENT says.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum SystemEvent {
    /// KVM_SYSTEM_EVENT_SHUTDOWN.
    Shutdown,
    /// KVM_SYSTEM_EVENT_RESET.
    Reset,
    /// KVM_SYSTEM_EVENT_CRASH.
    Crash,
    /// Any other, by its number.
    Other(u32),
}

/// Fields of KVM_EXIT_INTERNAL_ERROR.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct InternalError {
    /// KVM_INTERNAL_ERROR_EMULATION (1), _SIMUL_EX (2), _DELIVERY_EV (3), _UNEXPECTED_EXIT_REASON (4).
    pub suberror: u32,
    /// How many words of `data` are meant.
    pub ndata: u32,
    /// Whatever KVM thinks helps.
    pub data: [u64; 16],
}

impl InternalError {
    /// For an emulation failure: the bytes of the instruction that KVM could not interpret, if it says.
    /// [KVM api: KVM_INTERNAL_ERROR_EMULATION_FLAG_INSTRUCTION_BYTES]
    pub fn instruction_bytes(&self) -> Option<Vec<u8>> {
        // data[0] has the flags; then one byte of length and fifteen of code.
        if self.suberror != kvm::KVM_INTERNAL_ERROR_EMULATION || self.ndata < 3 || self.data[0] & 1 == 0 {
            return None;
        }
        let raw: Vec<u8> = self.data[1..3]
            .iter()
            .flat_map(|word| word.to_le_bytes())
            .collect();
        let length = usize::from(raw[0]).min(15);
        Some(raw[1..1 + length].to_vec())
    }
}

impl Exit {
    /// A short name, as in the API, for logs and counters.
    pub fn name(&self) -> &'static str {
        match self {
            Exit::Pio(_) => "IO",
            Exit::Mmio(_) => "MMIO",
            Exit::Hlt => "HLT",
            Exit::IrqWindowOpen => "IRQ_WINDOW_OPEN",
            Exit::Shutdown => "SHUTDOWN",
            Exit::SystemEvent(_) => "SYSTEM_EVENT",
            Exit::Debug { .. } => "DEBUG",
            Exit::Intr => "INTR",
            Exit::IoapicEoi { .. } => "IOAPIC_EOI",
            Exit::Unknown { .. } => "UNKNOWN",
            Exit::FailEntry { .. } => "FAIL_ENTRY",
            Exit::InternalError(_) => "INTERNAL_ERROR",
            Exit::Other { .. } => "other",
            Exit::Malformed { .. } => "malformed",
        }
    }
}

impl fmt::Display for Exit {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "KVM_EXIT_{}", self.name())?;
        match self {
            Exit::Unknown { hardware_exit_reason } => {
                write!(f, " (hardware reason {hardware_exit_reason:#x})")
            }
            Exit::FailEntry {
                hardware_entry_failure_reason,
                cpu,
            } => {
                write!(
                    f,
                    " (hardware reason {hardware_entry_failure_reason:#x} on host processor {cpu})"
                )
            }
            Exit::InternalError(error) => {
                let what = match error.suberror {
                    1 => ": KVM cannot emulate an instruction",
                    2 => ": unexpected exception while handling another",
                    3 => ": an event could not be delivered",
                    4 => ": unexpected hardware exit",
                    _ => "",
                };
                write!(f, " (suberror {}{what})", error.suberror)
            }
            Exit::Debug { exception, pc, .. } => write!(f, " (exception {exception} at {pc:#x})"),
            Exit::SystemEvent(event) => write!(f, " ({event:?})"),
            Exit::Other { reason } => write!(f, " (number {reason})"),
            Exit::Malformed { reason, what } => write!(f, " (number {reason}: {what})"),
            _ => Ok(()),
        }
    }
}

/// A guest's access: the exits that everything is made for.
#[derive(Clone, Copy, PartialEq, Debug)]
pub enum AccessExit {
    /// See [`Exit::Pio`].
    Pio(PioExit),
    /// See [`Exit::Mmio`].
    Mmio(MmioExit),
}

/// The widths of a port access, by its bytes: looked up, which is shorter than to compute it from any length.
static PORT_WIDTHS: [Option<Width>; 5] = [
    None,
    Some(Width::Byte),
    Some(Width::Word),
    None,
    Some(Width::Dword),
];

/// Decodes the access that a `kvm_run` page describes; `None`: it is another exit, or malformed, as [`decode`] tells. Apart,
/// so that what is known of an access stays in registers: an [`Exit`] is large, and goes through memory.
#[inline(always)]
pub fn decode_access(run: &kvm::kvm_run) -> Option<AccessExit> {
    let union = &run.__bindgen_anon_1;
    // SAFETY (of every union access below): each variant is plain old data for which any bits are valid, and the
    // page is initialised, so reading the wrong one could yield nonsense but nothing undefined. `exit_reason`
    // selects the one that the kernel filled in.
    match run.exit_reason {
        kvm::KVM_EXIT_IO => {
            // SAFETY: as above.
            let io = unsafe { union.io };
            let direction = match u32::from(io.direction) {
                kvm::KVM_EXIT_IO_IN => Direction::Read,
                kvm::KVM_EXIT_IO_OUT => Direction::Write,
                _ => return None,
            };
            let width = (*PORT_WIDTHS.get(usize::from(io.size))?)?;
            Some(AccessExit::Pio(PioExit {
                direction,
                port: io.port,
                width,
                count: io.count,
                data_offset: io.data_offset,
            }))
        }
        kvm::KVM_EXIT_MMIO => {
            // SAFETY: as above.
            let mmio = unsafe { union.mmio };
            (1..=8).contains(&mmio.len).then_some(AccessExit::Mmio(MmioExit {
                direction: if mmio.is_write == 0 {
                    Direction::Read
                } else {
                    Direction::Write
                },
                address: mmio.phys_addr,
                length: mmio.len as usize,
                data: mmio.data,
            }))
        }
        _ => None,
    }
}

/// Decodes the exit that a `kvm_run` page describes.
#[inline]
pub fn decode(run: &kvm::kvm_run) -> Exit {
    match decode_access(run) {
        Some(AccessExit::Pio(pio)) => Exit::Pio(pio),
        Some(AccessExit::Mmio(mmio)) => Exit::Mmio(mmio),
        None => decode_rare(run.exit_reason, run),
    }
}

/// The exits that are no accesses, or none that make sense.
#[cold]
#[inline(never)]
fn decode_rare(reason: u32, run: &kvm::kvm_run) -> Exit {
    let union = &run.__bindgen_anon_1;
    // SAFETY (of every union access below): as in `decode_access`.
    match reason {
        kvm::KVM_EXIT_IO => {
            // SAFETY: as above.
            let io = unsafe { union.io };
            let known = [kvm::KVM_EXIT_IO_IN, kvm::KVM_EXIT_IO_OUT].contains(&u32::from(io.direction));
            Exit::Malformed {
                reason,
                what: match known {
                    true => "a port access is 1, 2 or 4 bytes wide",
                    false => "the direction is neither in nor out",
                },
            }
        }
        kvm::KVM_EXIT_MMIO => Exit::Malformed {
            reason,
            what: "a memory access is 1 to 8 bytes long",
        },
        kvm::KVM_EXIT_HLT => Exit::Hlt,
        kvm::KVM_EXIT_IRQ_WINDOW_OPEN => Exit::IrqWindowOpen,
        kvm::KVM_EXIT_SHUTDOWN => Exit::Shutdown,
        kvm::KVM_EXIT_SYSTEM_EVENT => {
            // SAFETY: as above.
            let kind = unsafe { union.system_event }.type_;
            Exit::SystemEvent(match kind {
                kvm::KVM_SYSTEM_EVENT_SHUTDOWN => SystemEvent::Shutdown,
                kvm::KVM_SYSTEM_EVENT_RESET => SystemEvent::Reset,
                kvm::KVM_SYSTEM_EVENT_CRASH => SystemEvent::Crash,
                other => SystemEvent::Other(other),
            })
        }
        kvm::KVM_EXIT_DEBUG => {
            // SAFETY: as above.
            let debug = unsafe { union.debug }.arch;
            Exit::Debug {
                exception: debug.exception,
                pc: debug.pc,
                dr6: debug.dr6,
                dr7: debug.dr7,
            }
        }
        kvm::KVM_EXIT_INTR => Exit::Intr,
        kvm::KVM_EXIT_IOAPIC_EOI => {
            // SAFETY: as above.
            let eoi = unsafe { union.eoi };
            Exit::IoapicEoi { vector: eoi.vector }
        }
        kvm::KVM_EXIT_UNKNOWN => {
            // SAFETY: as above.
            let hw = unsafe { union.hw };
            Exit::Unknown {
                hardware_exit_reason: hw.hardware_exit_reason,
            }
        }
        kvm::KVM_EXIT_FAIL_ENTRY => {
            // SAFETY: as above.
            let fail = unsafe { union.fail_entry };
            Exit::FailEntry {
                hardware_entry_failure_reason: fail.hardware_entry_failure_reason,
                cpu: fail.cpu,
            }
        }
        kvm::KVM_EXIT_INTERNAL_ERROR => {
            // SAFETY: as above.
            let internal = unsafe { union.internal };
            Exit::InternalError(InternalError {
                suberror: internal.suberror,
                ndata: internal.ndata.min(16),
                data: internal.data,
            })
        }
        reason => Exit::Other { reason },
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn page(reason: u32) -> kvm::kvm_run {
        kvm::kvm_run {
            exit_reason: reason,
            ..Default::default()
        }
    }

    fn io(direction: u8, size: u8, count: u32) -> kvm::kvm_run {
        let mut run = page(kvm::KVM_EXIT_IO);
        run.__bindgen_anon_1.io = kvm::kvm_run__bindgen_ty_1__bindgen_ty_4 {
            direction,
            size,
            port: 0x3f8,
            count,
            data_offset: 0x1000,
        };
        run
    }

    #[test]
    fn pio_in_and_out_with_count() {
        let expected = PioExit {
            direction: Direction::Read,
            port: 0x3f8,
            width: Width::Byte,
            count: 1,
            data_offset: 0x1000,
        };
        assert_eq!(decode(&io(0, 1, 1)), Exit::Pio(expected));
        let string = PioExit {
            direction: Direction::Write,
            width: Width::Word,
            count: 9,
            ..expected
        };
        assert_eq!(decode(&io(1, 2, 9)), Exit::Pio(string));
        let dword = PioExit {
            direction: Direction::Write,
            width: Width::Dword,
            ..expected
        };
        assert_eq!(decode(&io(1, 4, 1)), Exit::Pio(dword));
    }

    #[test]
    fn pio_of_impossible_width_or_direction_is_malformed() {
        assert!(matches!(decode(&io(1, 8, 1)), Exit::Malformed { .. }));
        assert!(matches!(decode(&io(1, 3, 1)), Exit::Malformed { .. }));
        assert!(matches!(decode(&io(2, 1, 1)), Exit::Malformed { .. }));
    }

    #[test]
    fn mmio_read_and_write() {
        let mut run = page(kvm::KVM_EXIT_MMIO);
        run.__bindgen_anon_1.mmio = kvm::kvm_run__bindgen_ty_1__bindgen_ty_6 {
            phys_addr: 0xfed0_0000,
            data: [1, 2, 3, 4, 0, 0, 0, 0],
            len: 4,
            is_write: 1,
        };
        let Exit::Mmio(exit) = decode(&run) else { panic!() };
        assert_eq!(
            (exit.direction, exit.address, exit.length),
            (Direction::Write, 0xfed0_0000, 4)
        );
        assert_eq!(exit.data[..4], [1, 2, 3, 4]);

        run.__bindgen_anon_1.mmio.is_write = 0;
        assert!(matches!(
            decode(&run),
            Exit::Mmio(MmioExit {
                direction: Direction::Read,
                ..
            })
        ));
        for len in [0, 9, u32::MAX] {
            run.__bindgen_anon_1.mmio.len = len;
            assert!(matches!(decode(&run), Exit::Malformed { .. }), "{len}");
        }
    }

    #[test]
    fn exits_without_payload() {
        assert_eq!(decode(&page(kvm::KVM_EXIT_HLT)), Exit::Hlt);
        assert_eq!(decode(&page(kvm::KVM_EXIT_IRQ_WINDOW_OPEN)), Exit::IrqWindowOpen);
        assert_eq!(decode(&page(kvm::KVM_EXIT_SHUTDOWN)), Exit::Shutdown);
        assert_eq!(decode(&page(kvm::KVM_EXIT_INTR)), Exit::Intr);
    }

    #[test]
    fn system_events() {
        let mut run = page(kvm::KVM_EXIT_SYSTEM_EVENT);
        for (kind, expected) in [
            (kvm::KVM_SYSTEM_EVENT_SHUTDOWN, SystemEvent::Shutdown),
            (kvm::KVM_SYSTEM_EVENT_RESET, SystemEvent::Reset),
            (kvm::KVM_SYSTEM_EVENT_CRASH, SystemEvent::Crash),
            (77, SystemEvent::Other(77)),
        ] {
            run.__bindgen_anon_1.system_event.type_ = kind;
            assert_eq!(decode(&run), Exit::SystemEvent(expected));
        }
    }

    #[test]
    fn failures_carry_what_the_host_said() {
        let mut run = page(kvm::KVM_EXIT_UNKNOWN);
        run.__bindgen_anon_1.hw.hardware_exit_reason = 0x31;
        assert_eq!(
            decode(&run),
            Exit::Unknown {
                hardware_exit_reason: 0x31
            }
        );

        let mut run = page(kvm::KVM_EXIT_FAIL_ENTRY);
        run.__bindgen_anon_1.fail_entry = kvm::kvm_run__bindgen_ty_1__bindgen_ty_2 {
            hardware_entry_failure_reason: 0x8000_0021,
            cpu: 3,
        };
        assert_eq!(
            decode(&run),
            Exit::FailEntry {
                hardware_entry_failure_reason: 0x8000_0021,
                cpu: 3
            }
        );
    }

    #[test]
    fn an_emulation_failure_tells_the_instruction() {
        let internal = |suberror, ndata, first: u64| {
            let mut run = page(kvm::KVM_EXIT_INTERNAL_ERROR);
            let mut data = [0; 16];
            data[..2].copy_from_slice(&[1, first]);
            run.__bindgen_anon_1.internal = kvm::kvm_run__bindgen_ty_1__bindgen_ty_13 {
                suberror,
                ndata,
                data,
            };
            let Exit::InternalError(error) = decode(&run) else {
                panic!()
            };
            error
        };
        let told = internal(1, 4, u64::from_le_bytes([3, 0x0f, 0x01, 0xd0, 0, 0, 0, 0]));
        assert_eq!(told.instruction_bytes(), Some(vec![0x0f, 0x01, 0xd0]));
        let too_long = internal(1, 4, 0xff);
        assert_eq!(too_long.instruction_bytes().map(|bytes| bytes.len()), Some(15));
        let other = internal(3, u32::MAX, 0xff);
        assert_eq!((other.ndata, other.instruction_bytes()), (16, None));
    }

    #[test]
    fn debug_and_eoi_and_any_other() {
        let mut run = page(kvm::KVM_EXIT_DEBUG);
        run.__bindgen_anon_1.debug.arch.exception = 3;
        run.__bindgen_anon_1.debug.arch.pc = 0x1234;
        assert!(matches!(
            decode(&run),
            Exit::Debug {
                exception: 3,
                pc: 0x1234,
                ..
            }
        ));

        let mut run = page(kvm::KVM_EXIT_IOAPIC_EOI);
        run.__bindgen_anon_1.eoi.vector = 0x31;
        assert_eq!(decode(&run), Exit::IoapicEoi { vector: 0x31 });

        for reason in [kvm::KVM_EXIT_HYPERCALL, kvm::KVM_EXIT_S390_RESET, 9999, u32::MAX] {
            assert_eq!(decode(&page(reason)), Exit::Other { reason });
        }
    }
}
