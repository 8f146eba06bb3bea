//! ACPI fixed hardware: PM1a event and control registers, the reset register, the power button; and the PM timer.
//!
//! Spec: ACPI 6.4 §4.8.3 (PM1 registers and the PM timer), §4.8.3.6 (reset register), §16.1 (sleeping). The interrupt
//! is the SCI: level, a function of status and enable.
//!
//! The PM timer ([`PmTimer`]) is not part of the device but a published read: it is a pure function of guest time and an
//! epoch, so vCPUs compute it in place and send no message. It raises no carry interrupt: TMR_STS is never set although
//! TMR_EN is kept; no operating system needs it with a 32-bit counter and 20 minutes between carries.
//!
//! **Not emulated**: sleep states other than S5 (the machine's tables offer none), the SMI command port and the legacy
//! mode (SCI_EN is always set and the FADT has no SMI_CMD), the bus master and global lock bits (kept, without effect),
//! sleep button and RTC wake.
//!
//! **A hostile guest** can end or reset its own machine.

use std::sync::atomic::{AtomicU64, Ordering};

use super::{Access, Claim, Context, Device, MachineRequest, Nanos, Published, byte_lanes};
use crate::boot::layout::io;
use crate::clock::Clock;

/// What to claim, as offsets from [`io::PM1A_EVENT`]: event and control block, and the reset register. The PM timer
/// between them is for [`PmTimer`].
pub const CLAIMS: &[Claim] = &[Claim::new(0, 6), Claim::new(RESET_REGISTER, 1)];
/// The value of SLP_TYP for S5, to be named by `\_S5` in the DSDT.
pub const SLP_TYP_S5: u8 = 5;
/// Frequency of the PM timer in Hz [ACPI 6.4 §4.8.3.3].
pub const PM_TIMER_HZ: u64 = 3_579_545;

// Offsets of the 16-bit registers' bytes, low byte first.
const PM1_STS: u64 = 0;
const PM1_STS_HIGH: u64 = PM1_STS + 1;
const PM1_EN: u64 = 2;
const PM1_EN_HIGH: u64 = PM1_EN + 1;
const PM1_CNT: u64 = (io::PM1A_CONTROL - io::PM1A_EVENT) as u64;
const PM1_CNT_HIGH: u64 = PM1_CNT + 1;
const RESET_REGISTER: u64 = (io::ACPI_RESET - io::PM1A_EVENT) as u64;

/// PM1 enable bits that exist: TMR, GBL, PWRBTN, SLPBTN, RTC [ACPI 6.4 table 4.14].
const PM1_EN_MASK: u16 = 1 << 0 | 1 << 5 | PWRBTN | 1 << 9 | 1 << 10;
/// PWRBTN_STS and PWRBTN_EN [ACPI 6.4 tables 4.13 and 4.14].
const PWRBTN: u16 = 1 << 8;
/// PM1 control [ACPI 6.4 table 4.15]: the SCI, not the SMI, is raised for events. Read-only.
const SCI_EN: u16 = 1 << 0;
/// Bus master wake from C3; kept.
const BM_RLD: u16 = 1 << 1;
const SLP_TYP_SHIFT: u32 = 10;
const SLP_TYP_MASK: u16 = 0b111 << SLP_TYP_SHIFT;
/// Write-only.
const SLP_EN: u16 = 1 << 13;

/// The PM1a register blocks and the reset register.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct AcpiPm {
    /// PM1_STS: events that happened and were not cleared.
    status: u16,
    /// PM1_EN: events that raise the SCI.
    enable: u16,
    /// PM1_CNT without SCI_EN.
    control: u16,
}

impl AcpiPm {
    /// The registers after power-on, in ACPI mode.
    pub fn new() -> AcpiPm {
        AcpiPm::default()
    }

    /// Somebody pressed the power button: an event for the guest, which may do as it likes.
    pub fn press_power_button(&mut self) {
        self.status |= PWRBTN;
    }
}

impl Device for AcpiPm {
    fn name(&self) -> &'static str {
        "acpi_pm"
    }

    fn read(&mut self, _cx: &mut dyn Context, access: Access) -> u64 {
        let [status, status_high] = self.status.to_le_bytes();
        let [enable, enable_high] = self.enable.to_le_bytes();
        let [control, control_high] = (self.control | SCI_EN).to_le_bytes();
        byte_lanes::read(access, |offset| match offset {
            PM1_STS => status,
            PM1_STS_HIGH => status_high,
            PM1_EN => enable,
            PM1_EN_HIGH => enable_high,
            PM1_CNT => control,
            PM1_CNT_HIGH => control_high,
            // The reset register is write-only, and the rest is not ours.
            _ => 0xff,
        })
    }

    fn write(&mut self, cx: &mut dyn Context, access: Access, value: u64) {
        byte_lanes::write(access, value, |offset, byte| match offset {
            // Writing a one clears the event [ACPI 6.4 §4.8.3.1.1].
            PM1_STS => self.status &= !u16::from(byte),
            PM1_STS_HIGH => self.status &= !(u16::from(byte) << 8),
            PM1_EN => self.enable = PM1_EN_MASK & (self.enable & 0xff00 | u16::from(byte)),
            PM1_EN_HIGH => self.enable = PM1_EN_MASK & (self.enable & 0x00ff | u16::from(byte) << 8),
            PM1_CNT => self.write_control(cx, self.control & 0xff00 | u16::from(byte)),
            PM1_CNT_HIGH => self.write_control(cx, self.control & 0x00ff | u16::from(byte) << 8),
            RESET_REGISTER if byte == io::ACPI_RESET_VALUE => cx.request(MachineRequest::Reset),
            _ => {}
        });
    }

    fn interrupt(&self) -> bool {
        self.status & self.enable != 0
    }

    fn reset(&mut self, _cx: &mut dyn Context) {
        *self = AcpiPm::new();
    }
}

impl AcpiPm {
    fn write_control(&mut self, cx: &mut dyn Context, value: u16) {
        self.control = value & (SLP_TYP_MASK | BM_RLD);
        let sleep_type = (value & SLP_TYP_MASK) >> SLP_TYP_SHIFT;
        if value & SLP_EN != 0 && sleep_type == u16::from(SLP_TYP_S5) {
            cx.request(MachineRequest::PowerOff);
        }
    }
}

/// The PM timer: 32 bits (the FADT says TMR_VAL_EXT) at 3.579545 MHz, read in place by any number of threads.
#[derive(Debug, Default)]
pub struct PmTimer {
    /// Guest time at which the count was 0, in nanoseconds. One word without relation to other memory: relaxed.
    epoch_ns: AtomicU64,
}

impl PmTimer {
    /// A timer that was 0 when guest time was.
    pub fn new() -> PmTimer {
        PmTimer::default()
    }

    /// Starts again from 0 at guest time `now`: for a machine reset, while the vCPUs are paused.
    pub fn restart(&self, now: Nanos) {
        self.epoch_ns.store(now.0, Ordering::Relaxed);
    }

    /// The count at guest time `now`. Monotonic in `now`, modulo 2^32.
    pub fn count(&self, now: Nanos) -> u32 {
        let elapsed_ns = now.0.saturating_sub(self.epoch_ns.load(Ordering::Relaxed));
        // Whole seconds apart: the product of all nanoseconds would not fit after 86 minutes.
        let (seconds, ns) = (elapsed_ns / 1_000_000_000, elapsed_ns % 1_000_000_000);
        // A 32-bit counter: the upper half is cut off on purpose.
        seconds
            .wrapping_mul(PM_TIMER_HZ)
            .wrapping_add(ns * PM_TIMER_HZ / 1_000_000_000) as u32
    }
}

impl Published for PmTimer {
    /// The offset is from [`io::PM_TIMER`]; bytes behind the register are all-ones.
    fn read(&self, access: Access, clock: &Clock) -> u64 {
        let count = self.count(clock.now()).to_le_bytes();
        byte_lanes::read(access, |offset| {
            usize::try_from(offset)
                .ok()
                .and_then(|byte| count.get(byte).copied())
                .unwrap_or(0xff)
        })
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::devices::Width;
    use crate::devices::testing::Bench;

    fn pm() -> Bench<AcpiPm> {
        Bench::new(AcpiPm::new())
    }

    fn sleep(pm: &mut Bench<AcpiPm>, sleep_type: u8) {
        let value = u64::from(SLP_EN) | u64::from(sleep_type) << SLP_TYP_SHIFT;
        pm.write_wide(PM1_CNT, Width::Word, value);
    }

    #[test]
    fn sci_en_is_always_set() {
        let mut pm = pm();
        pm.write_wide(PM1_CNT, Width::Word, 0);
        assert_eq!(pm.read_wide(PM1_CNT, Width::Word), u64::from(SCI_EN));
    }

    #[test]
    fn s5_powers_off_and_no_other_sleep_type_does() {
        for sleep_type in 0..8 {
            let mut pm = pm();
            sleep(&mut pm, sleep_type);
            let expected = if sleep_type == SLP_TYP_S5 {
                vec![MachineRequest::PowerOff]
            } else {
                vec![]
            };
            assert_eq!(pm.cx.requests, expected, "SLP_TYP {sleep_type}");
        }
    }

    #[test]
    fn sleep_type_without_sleep_enable_does_nothing_and_reads_back() {
        let mut pm = pm();
        let value = u64::from(SLP_TYP_S5) << SLP_TYP_SHIFT;
        pm.write_wide(PM1_CNT, Width::Word, value);
        assert_eq!(pm.cx.requests, []);
        assert_eq!(pm.read_wide(PM1_CNT, Width::Word), value | u64::from(SCI_EN));
    }

    #[test]
    fn sleep_enable_reads_zero() {
        let mut pm = pm();
        sleep(&mut pm, 0);
        assert_eq!(pm.read_wide(PM1_CNT, Width::Word) & u64::from(SLP_EN), 0);
    }

    #[test]
    fn power_off_by_byte_accesses() {
        let mut pm = pm();
        pm.write(PM1_CNT_HIGH, 0x20 | SLP_TYP_S5 << 2);
        assert_eq!(pm.cx.requests, [MachineRequest::PowerOff]);
    }

    #[test]
    fn the_reset_register_resets_on_its_value_only() {
        for (value, expected) in [
            (io::ACPI_RESET_VALUE, vec![MachineRequest::Reset]),
            (0, vec![]),
            (0xff, vec![]),
        ] {
            let mut pm = pm();
            pm.write(RESET_REGISTER, value);
            assert_eq!(pm.cx.requests, expected, "value {value:#x}");
        }
    }

    #[test]
    fn the_power_button_raises_the_sci_only_when_enabled() {
        let mut pm = pm();
        pm.device.press_power_button();
        assert!(!pm.device.interrupt());
        pm.write_wide(PM1_EN, Width::Word, u64::from(PWRBTN));
        assert!(pm.device.interrupt());
    }

    #[test]
    fn writing_ones_clears_the_status_and_the_sci() {
        let mut pm = pm();
        pm.write_wide(PM1_EN, Width::Word, u64::from(PWRBTN));
        pm.device.press_power_button();
        pm.write_wide(PM1_STS, Width::Word, u64::from(!PWRBTN));
        assert_eq!(
            pm.read_wide(PM1_STS, Width::Word),
            u64::from(PWRBTN),
            "zero keeps it"
        );
        pm.write_wide(PM1_STS, Width::Word, u64::from(PWRBTN));
        assert_eq!(pm.read_wide(PM1_STS, Width::Word), 0);
        assert!(!pm.device.interrupt());
    }

    #[test]
    fn enable_keeps_the_bits_that_exist() {
        let mut pm = pm();
        pm.write_wide(PM1_EN, Width::Word, 0xffff);
        assert_eq!(pm.read_wide(PM1_EN, Width::Word), u64::from(PM1_EN_MASK));
    }

    #[test]
    fn the_event_block_reads_as_one_dword() {
        let mut pm = pm();
        pm.write_wide(PM1_EN, Width::Word, 0x0521);
        pm.device.press_power_button();
        assert_eq!(pm.read_wide(PM1_STS, Width::Dword), 0x0521_0100);
    }

    #[test]
    fn the_timer_counts_at_its_frequency() {
        // Guest time to count; 2^32 counts take 20 minutes.
        let cases = [
            (0, 0),
            (279, 0),
            (280, 1),
            (1_000_000_000, 3_579_545),
            (86_400_000_000_000, (86_400 * 3_579_545u64 % (1 << 32)) as u32),
            (1_199_864_031_881, u32::MAX),
            (1_199_864_031_882, 0),
            (
                u64::MAX,
                ((u64::MAX as u128 * 3_579_545 / 1_000_000_000) % (1 << 32)) as u32,
            ),
        ];
        for (ns, count) in cases {
            assert_eq!(PmTimer::new().count(Nanos(ns)), count, "{ns} ns");
        }
    }

    #[test]
    fn the_timer_restarts_from_zero() {
        let timer = PmTimer::new();
        timer.restart(Nanos(5_000_000_000));
        assert_eq!(timer.count(Nanos(5_000_000_000)), 0);
        assert_eq!(timer.count(Nanos(6_000_000_000)), 3_579_545);
        assert_eq!(timer.count(Nanos(0)), 0, "a clock read before the restart");
    }

    #[test]
    fn the_timers_port_gives_any_bytes_of_it() {
        let timer = PmTimer::new();
        let now = Nanos(100_000_000_000);
        let count = u64::from(timer.count(now));
        let at = |offset, width| timer.read(Access { offset, width }, &Clock::frozen_at(now));
        assert_eq!(at(0, Width::Dword), count);
        assert_eq!(at(1, Width::Word), count >> 8 & 0xffff);
        assert_eq!(at(3, Width::Word), count >> 24 | 0xff00);
    }

    proptest! {
        #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]

        #[test]
        fn the_timer_agrees_with_wide_arithmetic(ns in any::<u64>()) {
            let expected = (u128::from(ns) * u128::from(PM_TIMER_HZ) / 1_000_000_000) as u32;
            prop_assert_eq!(PmTimer::new().count(Nanos(ns)), expected);
        }
    }
}
