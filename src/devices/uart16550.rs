//! 16550A serial port: a UART with 16-byte FIFOs, as PCs have at COM1.
//!
//! Spec: National Semiconductor PC16550D data sheet (June 1995), section 8 "Registers"; the PC wires OUT2 to the gate
//! of the interrupt line. Software that this must satisfy: Linux `8250_port.c`, which probes for a 16550A (FIFO bits
//! of the IIR, loopback of the modem lines, IER with four bits), for a transmitter interrupt that is lost when it is
//! enabled late (`UART_BUG_TXEN`), and for one that is not repeated (`UART_BUG_THRE`).
//!
//! **The wire.** Sending has no baud rate: a byte is on the host when the guest's write is done. When the host has no
//! room, LSR.THRE and LSR.TEMT go clear until it has, and what the guest writes in between waits in the transmitter
//! FIFO: a full pipe looks to the guest like a slow wire, nothing is lost, and no vCPU waits.
//!
//! Receiving is paced, because guests need it: Linux reads the receiver from its interrupt handler for as long as
//! there is data, so a wire that is never idle would keep a CPU in that handler for ever. Bytes come in loads of one
//! FIFO; the next load comes into an empty FIFO only, one character time after the guest emptied it, or a quarter
//! of the time that the guest took for the load if that is longer. Without interrupts a byte waits in the host until the
//! guest listens (see `Uart16550::listening`): what is typed or piped in before a driver has set the port up is not
//! thrown away with the FIFO resets of that driver. RTS is honoured: a guest that has ever set it stops the wire by
//! clearing it.
//!
//! **Not emulated**: baud rates (the divisor is only stored), parity, framing and break errors, stick parity, the DMA
//! mode of FCR bit 3, the time of the character time-out (it is due at once when the FIFO holds less than its trigger
//! level). LSR bit 7 is always clear: no error can be in the FIFO.
//!
//! **A hostile guest** can write to a transmitter that is not empty (the byte is lost and counted, as on the chip),
//! fill the receiver in loopback (overrun, as on the chip), and switch modes at any time (FIFOs are cleared). At most
//! 16 bytes are held each way. It cannot make the host's side block.
//!
//! vm-superio's `Serial` was considered: it writes every byte to an `io::Write` at once and has no way to say that the
//! host has no room, so it would stall the vCPU or lose bytes.

use std::collections::VecDeque;

use super::{Access, Claim, Context, Device, Nanos, byte_lanes};

/// What to claim, as offsets from the base port.
pub const CLAIMS: &[Claim] = &[Claim::new(0, 8)];

// Offsets of the registers [PC16550D table II].
const RBR_THR_DLL: u64 = 0;
const IER_DLM: u64 = 1;
const IIR_FCR: u64 = 2;
const LCR: u64 = 3;
const MCR: u64 = 4;
const LSR: u64 = 5;
const MSR: u64 = 6;
const SCR: u64 = 7;

/// Interrupt Enable Register [PC16550D §8.7].
mod ier {
    pub const ERBFI: u8 = 1 << 0;
    pub const ETBEI: u8 = 1 << 1;
    pub const ELSI: u8 = 1 << 2;
    pub const EDSSI: u8 = 1 << 3;
    pub const MASK: u8 = ERBFI | ETBEI | ELSI | EDSSI;
}

/// Interrupt Identification Register [PC16550D §8.6, table IV], in falling priority.
mod iir {
    pub const RECEIVER_LINE_STATUS: u8 = 0b0110;
    pub const RECEIVED_DATA_AVAILABLE: u8 = 0b0100;
    pub const CHARACTER_TIMEOUT: u8 = 0b1100;
    pub const THR_EMPTY: u8 = 0b0010;
    pub const MODEM_STATUS: u8 = 0b0000;
    pub const NONE: u8 = 0b0001;
    pub const FIFOS_ENABLED: u8 = 0b1100_0000;
}

/// FIFO Control Register [PC16550D §8.5].
mod fcr {
    pub const ENABLE: u8 = 1 << 0;
    pub const RCVR_RESET: u8 = 1 << 1;
    pub const XMIT_RESET: u8 = 1 << 2;
    pub const TRIGGER_SHIFT: u8 = 6;
}

/// Line Control Register [PC16550D §8.1]: divisor latch access bit.
const LCR_DLAB: u8 = 1 << 7;

/// Modem Control Register [PC16550D §8.8].
mod mcr {
    pub const DTR: u8 = 1 << 0;
    pub const RTS: u8 = 1 << 1;
    pub const OUT1: u8 = 1 << 2;
    pub const OUT2: u8 = 1 << 3;
    pub const LOOP: u8 = 1 << 4;
    pub const MASK: u8 = DTR | RTS | OUT1 | OUT2 | LOOP;
}

/// Line Status Register [PC16550D §8.4].
mod lsr {
    pub const DR: u8 = 1 << 0;
    pub const OE: u8 = 1 << 1;
    pub const THRE: u8 = 1 << 5;
    pub const TEMT: u8 = 1 << 6;
}

/// Modem Status Register [PC16550D §8.9]; the low half are the deltas.
mod msr {
    pub const DCTS: u8 = 1 << 0;
    pub const DDSR: u8 = 1 << 1;
    pub const TERI: u8 = 1 << 2;
    pub const DDCD: u8 = 1 << 3;
    pub const CTS: u8 = 1 << 4;
    pub const DSR: u8 = 1 << 5;
    pub const RI: u8 = 1 << 6;
    pub const DCD: u8 = 1 << 7;
}

/// Depth of each FIFO in bytes.
const FIFO_DEPTH: usize = 16;
/// One character (10 bits) at 115200 baud, the least pause between two loads.
const CHARACTER_NS: u64 = 86_806;
/// How long the wire stays quiet after the guest started to listen or reset the receiver: drivers enable the receiver
/// interrupt first and switch the FIFO on, which clears it, a few accesses later (Linux `serial8250_do_set_termios`).
const SETTLE_NS: u64 = 10_000_000;
/// So many reads of an LSR that says "sent all, received nothing" in a row, and the guest is polling the receiver: who
/// waits for the transmitter goes on at the first.
const RECEIVER_POLLS: u8 = 16;

/// A 16550A.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Uart16550 {
    name: &'static str,
    ier: u8,
    lcr: u8,
    mcr: u8,
    scr: u8,
    /// DLM:DLL.
    divisor: u16,
    fifos_enabled: bool,
    /// Bytes in the receiver FIFO from which the interrupt is "data available": 1, 4, 8 or 14.
    trigger: usize,
    /// LSR.OE.
    overrun: bool,
    /// The low half of the MSR.
    modem_deltas: u8,
    /// The transmitter's interrupt is due: THR became empty, or the interrupt was enabled while it was. Implies an
    /// empty THR.
    thr_empty_due: bool,
    /// Received, not read by the guest. At most [`Uart16550::depth`].
    rx: VecDeque<u8>,
    /// Written by the guest while the host had no room. Empty unless `host_full`.
    tx: VecDeque<u8>,
    /// The host has no room for another byte until `output_ready`. Not the device's own: survives a reset.
    host_full: bool,
    /// The host had nothing more when last asked; `input_ready` ends that.
    host_empty: bool,
    /// When the current load was taken from the host.
    rx_loaded_at: Nanos,
    /// No load before.
    rx_not_before: Nanos,
    /// The guest has set RTS since the reset, so it means something when it is clear.
    rts_used: bool,
    /// Idle LSR reads since the guest last wrote any register; stops at [`RECEIVER_POLLS`].
    idle_polls: u8,
}

impl Uart16550 {
    /// A UART after power-on, with a host side that has room.
    pub fn new(name: &'static str) -> Uart16550 {
        Uart16550 {
            name,
            ier: 0,
            lcr: 0,
            mcr: 0,
            scr: 0,
            divisor: 1,
            fifos_enabled: false,
            trigger: 1,
            overrun: false,
            modem_deltas: 0,
            thr_empty_due: false,
            rx: VecDeque::with_capacity(FIFO_DEPTH),
            tx: VecDeque::with_capacity(FIFO_DEPTH),
            host_full: false,
            host_empty: false,
            rx_loaded_at: Nanos(0),
            rx_not_before: Nanos(0),
            rts_used: false,
            idle_polls: 0,
        }
    }
}

impl Device for Uart16550 {
    fn name(&self) -> &'static str {
        self.name
    }

    fn read(&mut self, cx: &mut dyn Context, access: Access) -> u64 {
        byte_lanes::read(access, |offset| self.read_register(cx, offset))
    }

    fn write(&mut self, cx: &mut dyn Context, access: Access, value: u64) {
        byte_lanes::write(access, value, |offset, byte| {
            self.write_register(cx, offset, byte)
        });
    }

    fn interrupt(&self) -> bool {
        // In loopback the pins of the modem outputs are inactive [PC16550D §8.8], so the PC's gate is shut.
        self.mcr & (mcr::OUT2 | mcr::LOOP) == mcr::OUT2 && self.interrupt_id() != iir::NONE
    }

    fn deadline(&self) -> Option<Nanos> {
        self.wants_load().then_some(self.rx_not_before)
    }

    fn tick(&mut self, cx: &mut dyn Context) {
        self.load_receiver(cx);
    }

    fn input_ready(&mut self, cx: &mut dyn Context) {
        self.host_empty = false;
        self.load_receiver(cx);
    }

    fn output_ready(&mut self, cx: &mut dyn Context) {
        let was_empty = self.thr_empty();
        self.host_full = false;
        while !self.host_full
            && let Some(byte) = self.tx.pop_front()
        {
            self.host_full = !cx.transmit(byte);
        }
        if !was_empty && self.thr_empty() {
            self.thr_empty_due = true;
        }
    }

    fn reset(&mut self, _cx: &mut dyn Context) {
        let host_full = self.host_full;
        *self = Uart16550 {
            host_full,
            ..Uart16550::new(self.name)
        };
    }
    // Every access is an ask. A byte for the THR would stand for itself within one vCPU, but guests take turns at the
    // transmitter under a lock of their own, and there is no order among the posts of different vCPUs.
}

impl Uart16550 {
    fn read_register(&mut self, cx: &mut dyn Context, offset: u64) -> u8 {
        // The timer may be late; a guest that looks shall see what is due.
        self.load_receiver(cx);
        match offset {
            RBR_THR_DLL if self.dlab() => self.divisor.to_le_bytes()[0],
            RBR_THR_DLL => self.read_rbr(cx),
            IER_DLM if self.dlab() => self.divisor.to_le_bytes()[1],
            IER_DLM => self.ier,
            IIR_FCR => self.read_iir(),
            LCR => self.lcr,
            MCR => self.mcr,
            LSR => self.read_lsr(),
            MSR => self.modem_lines() | std::mem::take(&mut self.modem_deltas),
            SCR => self.scr,
            _ => 0xff,
        }
    }

    fn write_register(&mut self, cx: &mut dyn Context, offset: u64, value: u8) {
        let was_listening = self.listening();
        self.idle_polls = 0;
        match offset {
            RBR_THR_DLL if self.dlab() => self.divisor = self.divisor & 0xff00 | u16::from(value),
            RBR_THR_DLL => self.write_thr(cx, value),
            IER_DLM if self.dlab() => self.divisor = self.divisor & 0x00ff | u16::from(value) << 8,
            IER_DLM => self.write_ier(value),
            IIR_FCR => self.write_fcr(cx, value),
            LCR => self.lcr = value,
            MCR => self.write_mcr(value),
            SCR => self.scr = value,
            // LSR is for factory tests only [PC16550D §8.4]; the MSR is read-only.
            _ => {}
        }
        if !was_listening && self.listening() {
            self.settle(cx);
        }
    }

    /// Pops the receiver; what an empty one gives is undefined, here 0.
    fn read_rbr(&mut self, cx: &mut dyn Context) -> u8 {
        let Some(byte) = self.rx.pop_front() else { return 0 };
        if self.rx.is_empty() {
            let now = cx.now();
            let taken_ns = now.0.saturating_sub(self.rx_loaded_at.0);
            self.rx_not_before = Nanos(now.0.saturating_add(CHARACTER_NS.max(taken_ns / 4)));
        }
        byte
    }

    /// Reading the IIR acknowledges the transmitter's interrupt if that is what it shows [PC16550D table IV].
    fn read_iir(&mut self) -> u8 {
        let id = self.interrupt_id();
        if id == iir::THR_EMPTY {
            self.thr_empty_due = false;
        }
        if self.fifos_enabled {
            id | iir::FIFOS_ENABLED
        } else {
            id
        }
    }

    /// Reading the LSR clears the overrun indication [PC16550D §8.4].
    fn read_lsr(&mut self) -> u8 {
        let mut value = 0;
        if !self.rx.is_empty() {
            value |= lsr::DR;
        }
        if std::mem::take(&mut self.overrun) {
            value |= lsr::OE;
        }
        if self.thr_empty() {
            value |= lsr::THRE | lsr::TEMT;
        }
        if value == lsr::THRE | lsr::TEMT && self.idle_polls < RECEIVER_POLLS {
            self.idle_polls += 1;
        }
        value
    }

    fn write_thr(&mut self, cx: &mut dyn Context, byte: u8) {
        if self.mcr & mcr::LOOP != 0 {
            if self.rx.len() < self.depth() {
                self.rx.push_back(byte);
            } else {
                // The character in the shift register is lost; the FIFO stays [PC16550D §8.4 bit 1].
                self.overrun = true;
            }
        } else if !self.host_full {
            self.host_full = !cx.transmit(byte);
        } else if self.tx.len() < self.depth() {
            self.tx.push_back(byte);
        } else {
            cx.lose();
        }
        // Writing clears the interrupt, becoming empty sets it again; without a baud rate that is the same instant.
        self.thr_empty_due = self.thr_empty();
    }

    fn write_ier(&mut self, value: u8) {
        let enabled = value & !self.ier;
        self.ier = value & ier::MASK;
        // Enabling the interrupt of a THR that is empty raises it: what Linux checks for UART_BUG_TXEN.
        if enabled & ier::ETBEI != 0 && self.thr_empty() {
            self.thr_empty_due = true;
        }
    }

    /// The other bits count only if bit 0 is set; changing bit 0 clears both FIFOs [PC16550D §8.5].
    fn write_fcr(&mut self, cx: &mut dyn Context, value: u8) {
        let enable = value & fcr::ENABLE != 0;
        let switched = enable != self.fifos_enabled;
        self.fifos_enabled = enable;
        if switched || enable && value & fcr::RCVR_RESET != 0 {
            self.rx.clear();
            self.settle(cx);
        }
        if switched || enable && value & fcr::XMIT_RESET != 0 {
            self.tx.clear();
        }
        if enable {
            self.trigger = match value >> fcr::TRIGGER_SHIFT {
                0 => 1,
                1 => 4,
                2 => 8,
                _ => 14,
            };
        }
    }

    fn write_mcr(&mut self, value: u8) {
        let before = self.modem_lines();
        self.mcr = value & mcr::MASK;
        self.rts_used |= self.mcr & mcr::RTS != 0;
        let after = self.modem_lines();
        let changed = before ^ after;
        for (line, delta) in [
            (msr::CTS, msr::DCTS),
            (msr::DSR, msr::DDSR),
            (msr::DCD, msr::DDCD),
        ] {
            if changed & line != 0 {
                self.modem_deltas |= delta;
            }
        }
        // The ring indicator counts on its trailing edge only.
        if changed & before & msr::RI != 0 {
            self.modem_deltas |= msr::TERI;
        }
    }

    /// The upper half of the MSR: carrier, data set ready and clear to send from a wire that is always there; in
    /// loopback the modem outputs [PC16550D §8.8 bit 4].
    fn modem_lines(&self) -> u8 {
        if self.mcr & mcr::LOOP == 0 {
            return msr::DCD | msr::DSR | msr::CTS;
        }
        [
            (mcr::RTS, msr::CTS),
            (mcr::DTR, msr::DSR),
            (mcr::OUT1, msr::RI),
            (mcr::OUT2, msr::DCD),
        ]
        .into_iter()
        .filter(|(output, _)| self.mcr & output != 0)
        .fold(0, |lines, (_, input)| lines | input)
    }

    /// What the IIR shows: the enabled cause of highest priority.
    fn interrupt_id(&self) -> u8 {
        if self.ier & ier::ELSI != 0 && self.overrun {
            iir::RECEIVER_LINE_STATUS
        } else if self.ier & ier::ERBFI != 0 && !self.rx.is_empty() {
            if self.fifos_enabled && self.rx.len() < self.trigger {
                iir::CHARACTER_TIMEOUT
            } else {
                iir::RECEIVED_DATA_AVAILABLE
            }
        } else if self.ier & ier::ETBEI != 0 && self.thr_empty_due {
            iir::THR_EMPTY
        } else if self.ier & ier::EDSSI != 0 && self.modem_deltas != 0 {
            iir::MODEM_STATUS
        } else {
            iir::NONE
        }
    }

    /// Divisor latch access: offsets 0 and 1 are the divisor.
    fn dlab(&self) -> bool {
        self.lcr & LCR_DLAB != 0
    }

    /// THR and shift register are empty; without a baud rate that is one condition.
    fn thr_empty(&self) -> bool {
        self.tx.is_empty() && !self.host_full
    }

    /// How many bytes each direction holds.
    fn depth(&self) -> usize {
        if self.fifos_enabled { FIFO_DEPTH } else { 1 }
    }

    /// The guest would notice a byte: it has the receiver's interrupt enabled or polls the LSR, and does not stop the
    /// wire with RTS. In loopback the wire is disconnected.
    fn listening(&self) -> bool {
        let connected = self.mcr & mcr::LOOP == 0;
        let clear_to_send = !self.rts_used || self.mcr & mcr::RTS != 0;
        let attentive = self.ier & ier::ERBFI != 0 || self.idle_polls >= RECEIVER_POLLS;
        connected && clear_to_send && attentive
    }

    /// A load would be taken if it were time.
    fn wants_load(&self) -> bool {
        self.rx.is_empty() && !self.host_empty && self.listening()
    }

    /// Keeps the wire quiet until the guest's driver has finished setting up.
    fn settle(&mut self, cx: &mut dyn Context) {
        self.rx_not_before = Nanos(cx.now().0.saturating_add(SETTLE_NS));
    }

    /// Takes the next load from the host if the guest wants one and it is time.
    fn load_receiver(&mut self, cx: &mut dyn Context) {
        if !self.wants_load() {
            return;
        }
        let now = cx.now();
        if now < self.rx_not_before {
            return;
        }
        self.rx_loaded_at = now;
        while self.rx.len() < self.depth() {
            match cx.receive() {
                Some(byte) => self.rx.push_back(byte),
                None => {
                    self.host_empty = true;
                    break;
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::devices::Width;
    use crate::devices::testing::Bench;

    const FIFO_ON: u8 = fcr::ENABLE;
    const SENT_ALL: u8 = lsr::THRE | lsr::TEMT;

    fn uart() -> Bench<Uart16550> {
        Bench::new(Uart16550::new("serial0"))
    }

    /// As a driver leaves it: FIFO on, trigger 8, DTR, RTS, OUT2, the given interrupts, and settled.
    fn open(ier: u8) -> Bench<Uart16550> {
        let mut uart = uart();
        uart.write(IIR_FCR, FIFO_ON | 2 << fcr::TRIGGER_SHIFT);
        uart.write(MCR, mcr::DTR | mcr::RTS | mcr::OUT2);
        uart.write(IER_DLM, ier);
        uart.run_for_ns(SETTLE_NS);
        uart
    }

    /// Reads as an interrupt handler does: while LSR.DR.
    fn drain(uart: &mut Bench<Uart16550>) -> Vec<u8> {
        let mut bytes = Vec::new();
        while uart.read(LSR) & lsr::DR != 0 {
            bytes.push(uart.read(RBR_THR_DLL));
        }
        bytes
    }

    #[test]
    fn registers_after_power_on() {
        let mut uart = uart();
        let registers: Vec<u8> = (1..8).map(|offset| uart.read(offset)).collect();
        // [PC16550D table III], with the modem lines of our wire.
        assert_eq!(
            registers,
            [0, iir::NONE, 0, 0, SENT_ALL, msr::DCD | msr::DSR | msr::CTS, 0]
        );
    }

    #[test]
    fn writable_bits_of_the_plain_registers() {
        for (register, mask) in [
            (IER_DLM, 0x0f),
            (LCR, 0xff),
            (MCR, 0x1f),
            (SCR, 0xff),
            (LSR, 0),
            (MSR, 0),
        ] {
            let mut uart = uart();
            let before = uart.read(register);
            uart.write(register, 0xff);
            let after = uart.read(register) & !if register == MSR { 0x0f } else { 0 };
            assert_eq!(after, before | mask, "register {register}");
        }
    }

    #[test]
    fn dlab_turns_offsets_0_and_1_into_the_divisor() {
        let mut uart = uart();
        uart.write(LCR, LCR_DLAB);
        uart.write(RBR_THR_DLL, 0x34);
        uart.write(IER_DLM, 0x12);
        assert_eq!((uart.read(RBR_THR_DLL), uart.read(IER_DLM)), (0x34, 0x12));
        uart.write(LCR, 0);
        assert_eq!((uart.read(RBR_THR_DLL), uart.read(IER_DLM)), (0, 0));
        assert!(uart.cx.sent.is_empty());
    }

    #[test]
    fn a_word_write_is_two_byte_writes() {
        let mut uart = uart();
        uart.write(LCR, LCR_DLAB);
        uart.write_wide(RBR_THR_DLL, Width::Word, 0x0180);
        assert_eq!(uart.read_wide(RBR_THR_DLL, Width::Word), 0x0180);
    }

    #[test]
    fn what_is_behind_the_registers_reads_all_ones() {
        assert_eq!(uart().read(8), 0xff);
    }

    // Sending.

    #[test]
    fn a_written_byte_goes_to_the_host_at_once() {
        let mut uart = uart();
        uart.write(RBR_THR_DLL, b'x');
        assert_eq!(uart.cx.sent, b"x");
        assert_eq!(uart.read(LSR), SENT_ALL);
    }

    #[test]
    fn a_full_host_clears_thre_and_temt_until_there_is_room() {
        let mut uart = uart();
        uart.cx.room = 1;
        uart.write(RBR_THR_DLL, b'x');
        assert_eq!(uart.read(LSR), 0);
        uart.make_room(1);
        assert_eq!(uart.read(LSR), SENT_ALL);
    }

    #[test]
    fn a_burst_of_one_fifo_into_a_full_host_loses_nothing() {
        let mut uart = open(0);
        uart.cx.room = 1;
        for byte in b'a'..=b'p' {
            uart.write(RBR_THR_DLL, byte);
        }
        assert_eq!(uart.cx.sent, b"a");
        uart.make_room(5);
        assert_eq!(uart.cx.sent, b"abcdef");
        assert_eq!(uart.read(LSR), 0);
        uart.make_room(100);
        assert_eq!(uart.cx.sent, b"abcdefghijklmnop");
        assert_eq!(uart.read(LSR), SENT_ALL);
        assert_eq!(uart.cx.lost, 0);
    }

    #[test]
    fn writing_to_a_full_transmitter_loses_the_byte_and_counts_it() {
        let mut uart = open(0);
        uart.cx.room = 1;
        for byte in 0..18 {
            uart.write(RBR_THR_DLL, byte);
        }
        uart.make_room(100);
        assert_eq!(uart.cx.sent, (0..17).collect::<Vec<u8>>());
        assert_eq!(uart.cx.lost, 1);
    }

    #[test]
    fn transmitter_reset_drops_what_waits() {
        let mut uart = open(0);
        uart.cx.room = 1;
        uart.write(RBR_THR_DLL, b'a');
        uart.write(RBR_THR_DLL, b'b');
        uart.write(IIR_FCR, FIFO_ON | fcr::XMIT_RESET);
        uart.make_room(100);
        assert_eq!(uart.cx.sent, b"a");
    }

    #[test]
    fn enabling_the_thre_interrupt_on_an_empty_thr_raises_it() {
        let mut uart = open(0);
        uart.write(IER_DLM, ier::ETBEI);
        assert!(uart.device.interrupt());
        assert_eq!(uart.read(IIR_FCR) & 0x0f, iir::THR_EMPTY);
    }

    #[test]
    fn reading_the_iir_acknowledges_thre() {
        let mut uart = open(ier::ETBEI);
        uart.read(IIR_FCR);
        assert!(!uart.device.interrupt());
        assert_eq!(uart.read(IIR_FCR) & 0x0f, iir::NONE);
    }

    #[test]
    fn enabling_thre_again_raises_it_again() {
        // Linux, UART_BUG_THRE.
        let mut uart = open(ier::ETBEI);
        uart.read(IIR_FCR);
        uart.write(IER_DLM, 0);
        uart.write(IER_DLM, ier::ETBEI);
        assert_eq!(uart.read(IIR_FCR) & 0x0f, iir::THR_EMPTY);
    }

    #[test]
    fn the_iir_acknowledges_thre_only_when_it_shows_it() {
        let mut uart = open(ier::ETBEI | ier::ERBFI);
        uart.type_bytes(b"x");
        assert_eq!(uart.read(IIR_FCR) & 0x0f, iir::CHARACTER_TIMEOUT);
        uart.read(RBR_THR_DLL);
        assert_eq!(uart.read(IIR_FCR) & 0x0f, iir::THR_EMPTY);
    }

    #[test]
    fn a_sent_byte_raises_thre_again() {
        let mut uart = open(ier::ETBEI);
        uart.read(IIR_FCR);
        uart.write(RBR_THR_DLL, b'x');
        assert!(uart.device.interrupt());
    }

    #[test]
    fn writing_into_a_full_host_clears_thre_until_there_is_room() {
        let mut uart = open(ier::ETBEI);
        uart.cx.room = 1;
        uart.write(RBR_THR_DLL, b'x');
        assert!(!uart.device.interrupt());
        uart.make_room(1);
        assert!(uart.device.interrupt());
    }

    #[test]
    fn room_that_was_there_already_raises_nothing() {
        let mut uart = open(ier::ETBEI);
        uart.read(IIR_FCR);
        uart.make_room(10);
        assert!(!uart.device.interrupt());
    }

    // Receiving.

    #[test]
    fn trigger_levels_choose_between_data_available_and_time_out() {
        for (setting, level) in [(0, 1), (1, 4), (2, 8), (3, 14)] {
            for count in [level - 1, level].into_iter().filter(|count| *count > 0) {
                let mut uart = open(ier::ERBFI);
                uart.write(IIR_FCR, FIFO_ON | setting << fcr::TRIGGER_SHIFT);
                uart.type_bytes(&vec![0; count]);
                let expected = if count < level {
                    iir::CHARACTER_TIMEOUT
                } else {
                    iir::RECEIVED_DATA_AVAILABLE
                };
                assert_eq!(
                    uart.read(IIR_FCR),
                    iir::FIFOS_ENABLED | expected,
                    "{count} bytes at {level}"
                );
            }
        }
    }

    #[test]
    fn without_fifos_one_byte_is_held_and_is_available() {
        let mut uart = uart();
        uart.write(IER_DLM, ier::ERBFI);
        uart.run_for_ns(SETTLE_NS);
        uart.type_bytes(b"ab");
        assert_eq!(
            (uart.read(IIR_FCR), uart.cx.typed.len()),
            (iir::RECEIVED_DATA_AVAILABLE, 1)
        );
    }

    #[test]
    fn the_receiver_interrupt_ends_with_the_last_byte() {
        let mut uart = open(ier::ERBFI);
        uart.type_bytes(b"ab");
        let levels: Vec<bool> = (0..3)
            .map(|_| {
                let level = uart.device.interrupt();
                uart.read(RBR_THR_DLL);
                level
            })
            .collect();
        assert_eq!(levels, [true, true, false]);
    }

    #[test]
    fn the_next_load_comes_a_character_time_after_the_fifo_was_emptied() {
        let mut uart = open(ier::ERBFI);
        uart.type_bytes(&[7; 20]);
        assert_eq!(drain(&mut uart).len(), 16);
        assert_eq!(uart.device.deadline(), Some(Nanos(uart.cx.now.0 + CHARACTER_NS)));
        uart.run_for_ns(CHARACTER_NS);
        assert!(uart.device.interrupt());
        assert_eq!(drain(&mut uart).len(), 4);
    }

    #[test]
    fn a_slow_reader_gets_a_longer_pause() {
        let mut uart = open(ier::ERBFI);
        uart.type_bytes(&[7; 20]);
        uart.run_for_ns(80_000_000);
        drain(&mut uart);
        assert_eq!(uart.device.deadline(), Some(Nanos(uart.cx.now.0 + 20_000_000)));
    }

    #[test]
    fn a_late_timer_does_not_hide_what_is_due_from_a_guest_that_looks() {
        let mut uart = open(ier::ERBFI);
        uart.type_bytes(&[7; 17]);
        drain(&mut uart);
        uart.cx.advance_ns(CHARACTER_NS);
        assert_eq!(uart.read(LSR) & lsr::DR, lsr::DR);
    }

    #[test]
    fn an_idle_receiver_has_no_deadline() {
        let mut uart = open(ier::ERBFI);
        uart.type_bytes(b"x");
        drain(&mut uart);
        uart.run_for_ns(CHARACTER_NS);
        assert_eq!(uart.device.deadline(), None);
    }

    #[test]
    fn a_paste_of_a_megabyte_arrives_complete_with_the_line_low_after_every_load() {
        let mut uart = open(ier::ERBFI);
        let paste: Vec<u8> = (0..1 << 20).map(|i: u32| (i % 251) as u8).collect();
        uart.type_bytes(&paste);
        let mut received = Vec::new();
        while uart.device.interrupt() {
            received.extend(drain(&mut uart));
            assert!(!uart.device.interrupt());
            uart.run_for_ns(CHARACTER_NS);
        }
        assert!(
            received == paste,
            "{} of {} bytes, or altered",
            received.len(),
            paste.len()
        );
    }

    #[test]
    fn what_is_typed_before_a_driver_opens_the_port_survives_linux_setting_it_up() {
        // The accesses of serial8250_do_startup and serial8250_do_set_termios that could lose input.
        let mut uart = uart();
        uart.type_bytes(b"piped in");
        for value in [FIFO_ON, FIFO_ON | fcr::RCVR_RESET | fcr::XMIT_RESET, 0] {
            uart.write(IIR_FCR, value);
        }
        for register in [LSR, RBR_THR_DLL, IIR_FCR, MSR] {
            uart.read(register);
        }
        uart.run_for_ns(SETTLE_NS);
        uart.write(MCR, mcr::OUT2 | mcr::DTR);
        uart.write(IER_DLM, ier::ERBFI | ier::ELSI);
        uart.run_for_ns(SETTLE_NS / 2);
        uart.write(IIR_FCR, FIFO_ON);
        uart.write(MCR, mcr::OUT2 | mcr::DTR | mcr::RTS);
        uart.run_for_ns(SETTLE_NS);
        assert_eq!(drain(&mut uart), b"piped in");
    }

    #[test]
    fn a_guest_that_polls_without_setting_anything_up_receives() {
        let mut uart = uart();
        uart.type_bytes(b"x");
        for _ in 0..RECEIVER_POLLS {
            assert_eq!(uart.read(LSR) & lsr::DR, 0);
        }
        assert_eq!(drain(&mut uart), b"x");
    }

    #[test]
    fn a_guest_that_only_sends_takes_nothing_from_the_host() {
        let mut uart = uart();
        uart.type_bytes(b"x");
        for _ in 0..100 {
            uart.read(LSR);
            uart.write(RBR_THR_DLL, b'.');
            uart.cx.advance_ns(SETTLE_NS);
        }
        assert_eq!(uart.cx.typed, b"x");
    }

    #[test]
    fn clearing_rts_stops_the_wire() {
        let mut uart = open(ier::ERBFI);
        uart.write(MCR, mcr::OUT2);
        uart.type_bytes(b"x");
        uart.run_for_ns(SETTLE_NS);
        assert_eq!(uart.cx.typed, b"x");
        uart.write(MCR, mcr::OUT2 | mcr::RTS);
        uart.run_for_ns(SETTLE_NS);
        assert_eq!(drain(&mut uart), b"x");
    }

    #[test]
    fn receiver_reset_empties_the_receiver() {
        let mut uart = open(ier::ERBFI);
        uart.type_bytes(b"x");
        uart.write(IIR_FCR, FIFO_ON | fcr::RCVR_RESET);
        assert_eq!(uart.read(LSR), SENT_ALL);
    }

    #[test]
    fn receiver_reset_keeps_the_wire_quiet_for_the_driver_to_finish() {
        let mut uart = open(ier::ERBFI);
        uart.write(IIR_FCR, FIFO_ON | fcr::RCVR_RESET);
        uart.type_bytes(b"x");
        uart.run_for_ns(SETTLE_NS - 1);
        assert_eq!(uart.cx.typed, b"x");
        uart.run_for_ns(1);
        assert_eq!(drain(&mut uart), b"x");
    }

    #[test]
    fn fcr_without_the_enable_bit_programs_nothing_else() {
        let mut uart = uart();
        uart.write(IIR_FCR, 3 << fcr::TRIGGER_SHIFT);
        assert_eq!((uart.device.fifos_enabled, uart.device.trigger), (false, 1));
    }

    #[test]
    fn switching_the_fifos_off_clears_them() {
        let mut uart = open(ier::ERBFI);
        uart.type_bytes(b"xyz");
        uart.write(IIR_FCR, 0);
        assert_eq!((uart.read(LSR), uart.read(IIR_FCR)), (SENT_ALL, iir::NONE));
    }

    // Loopback and modem lines.

    #[test]
    fn loopback_returns_what_is_sent_and_sends_nothing() {
        let mut uart = open(0);
        uart.write(MCR, mcr::LOOP);
        uart.write(RBR_THR_DLL, b'x');
        assert_eq!((uart.read(RBR_THR_DLL), uart.cx.sent.len()), (b'x', 0));
    }

    #[test]
    fn loopback_holds_16_bytes_and_reports_the_overrun_once() {
        let mut uart = open(0);
        uart.write(MCR, mcr::LOOP);
        for byte in 0..17 {
            uart.write(RBR_THR_DLL, byte);
        }
        assert_eq!(uart.read(LSR) & lsr::OE, lsr::OE);
        assert_eq!(uart.read(LSR) & lsr::OE, 0);
        assert_eq!(drain(&mut uart), (0..16).collect::<Vec<u8>>());
    }

    #[test]
    fn an_overrun_is_the_first_among_interrupts_until_the_lsr_is_read() {
        let mut uart = open(ier::ELSI | ier::ERBFI);
        uart.write(MCR, mcr::LOOP | mcr::RTS);
        for byte in 0..17 {
            uart.write(RBR_THR_DLL, byte);
        }
        assert_eq!(uart.read(IIR_FCR) & 0x0f, iir::RECEIVER_LINE_STATUS);
        uart.read(LSR);
        assert_eq!(uart.read(IIR_FCR) & 0x0f, iir::RECEIVED_DATA_AVAILABLE);
    }

    #[test]
    fn loopback_disconnects_the_wire() {
        let mut uart = open(ier::ERBFI);
        uart.write(MCR, mcr::LOOP | mcr::RTS);
        uart.type_bytes(b"x");
        uart.run_for_ns(SETTLE_NS);
        assert_eq!(uart.read(LSR) & lsr::DR, 0);
    }

    #[test]
    fn loopback_turns_modem_outputs_into_inputs() {
        let cases = [
            (mcr::DTR, msr::DSR),
            (mcr::RTS, msr::CTS),
            (mcr::OUT1, msr::RI),
            (mcr::OUT2, msr::DCD),
            // Linux autoconfig: LOOP | OUT2 | RTS must give 0x90.
            (mcr::OUT2 | mcr::RTS, 0x90),
        ];
        for (outputs, inputs) in cases {
            let mut uart = uart();
            uart.write(MCR, mcr::LOOP | outputs);
            assert_eq!(uart.read(MSR) & 0xf0, inputs, "MCR {outputs:#x}");
        }
    }

    #[test]
    fn modem_deltas_are_set_by_changes_and_cleared_by_reading() {
        let mut uart = uart();
        uart.write(MCR, mcr::LOOP | mcr::RTS);
        assert_eq!(uart.read(MSR), msr::CTS | msr::DDSR | msr::DDCD);
        assert_eq!(uart.read(MSR), msr::CTS);
    }

    #[test]
    fn the_ring_indicator_counts_on_its_trailing_edge() {
        let mut uart = uart();
        uart.write(MCR, mcr::LOOP | mcr::OUT1);
        assert_eq!(uart.read(MSR) & msr::TERI, 0);
        uart.write(MCR, mcr::LOOP);
        assert_eq!(uart.read(MSR) & msr::TERI, msr::TERI);
    }

    #[test]
    fn modem_status_interrupts_until_the_msr_is_read() {
        let mut uart = open(ier::EDSSI);
        uart.write(MCR, mcr::LOOP);
        uart.write(MCR, mcr::OUT2);
        assert!(uart.device.interrupt());
        assert_eq!(uart.read(IIR_FCR) & 0x0f, iir::MODEM_STATUS);
        uart.read(MSR);
        assert!(!uart.device.interrupt());
    }

    #[test]
    fn the_line_needs_out2_and_no_loopback() {
        for (mcr, level) in [(0, false), (mcr::OUT2, true), (mcr::OUT2 | mcr::LOOP, false)] {
            let mut uart = uart();
            uart.write(IER_DLM, ier::ETBEI);
            uart.write(MCR, mcr);
            assert_eq!(uart.device.interrupt(), level, "MCR {mcr:#x}");
        }
    }

    // Probing, reset, class.

    #[test]
    fn linux_finds_a_16550a_without_extensions() {
        let mut uart = uart();
        uart.write(IIR_FCR, FIFO_ON);
        assert_eq!(uart.read(IIR_FCR) >> 6, 3, "working FIFOs");
        for lcr in [0, LCR_DLAB, 0xbf, 0xe0] {
            uart.write(LCR, lcr);
            uart.write(IIR_FCR, FIFO_ON | 0x20);
            assert_eq!(
                uart.read(IIR_FCR),
                0xc1,
                "no EFR, no 64-byte FIFO, no EXCR at LCR {lcr:#x}"
            );
        }
    }

    #[test]
    fn reset_keeps_the_hosts_lack_of_room_in_mind() {
        let mut uart = uart();
        uart.cx.room = 1;
        uart.write(RBR_THR_DLL, b'x');
        uart.reset();
        // The fake context would fail the test if this went out.
        uart.write(RBR_THR_DLL, b'y');
        assert_eq!(uart.read(LSR), 0);
        uart.make_room(10);
        assert_eq!(uart.cx.sent, b"xy");
    }
}
