//! CMOS real-time clock: an MC146818 with the PC's 128 bytes of memory, at ports 0x70 (index) and 0x71 (data).
//!
//! Spec: Motorola MC146818 data sheet (1988); the century at index 0x32 is what the FADT's
//! CENTURY field names [ACPI 6.4 §5.2.9]; the memory-size bytes are those of the PC/AT and of later BIOSes.
//!
//! The clock is the host's wall clock, UTC, plus an offset that changes when the guest sets the time. It goes on while
//! the machine is paused, as a clock with a battery does. What is due is found out at each access from the time of the
//! access before, so a clock whose interrupts are off needs no timer. Setting the time follows the chip: while B.SET is
//! set, or the divider is held in reset, the time registers keep what is written; the first second after the divider's
//! reset is half a second long, which Linux counts on when it writes the time at half past a second.
//!
//! **Not emulated**: daylight saving (B.DSE is only stored), the square wave, other time bases than 32.768 kHz (a
//! divider that is not in reset runs at the right speed), the undefined reads during an update (they give the time
//! before it), the counters' carry from invalid settings (a 31 April that is written counts as 1 May), a day of the week
//! that disagrees with the date (it is computed), and the battery: a machine reset is a new clock at the host's time
//! with the memory as at power-on. The NMI mask in bit 7 of the index is accepted and ignored. The index port is
//! write-only and reads all-ones.
//!
//! **A hostile guest** can set any time (years 0 to 25755, shown modulo 10000) and ask for 8192 interrupts a second; a
//! tick is wanted only after register C was read, so it gets no more than it takes care of.

use std::ops::Range;

use super::calendar::{DAY_S, DateTime};
use super::{Access, Claim, Context, Device, Nanos, byte_lanes};

/// What to claim, as offsets from the base port.
pub const CLAIMS: &[Claim] = &[Claim::new(0, 2)];

/// Offset of the index port.
const INDEX: u64 = 0;
/// Offset of the data port.
const DATA: u64 = 1;
/// Bit 7 of the index port masks the NMI.
const INDEX_MASK: u8 = 0x7f;

// Indexes of the clock's registers [MC146818 figure 9].
const SECONDS: u8 = 0x00;
const SECONDS_ALARM: u8 = 0x01;
const MINUTES: u8 = 0x02;
const MINUTES_ALARM: u8 = 0x03;
const HOURS: u8 = 0x04;
const HOURS_ALARM: u8 = 0x05;
const DAY_OF_WEEK: u8 = 0x06;
const DAY_OF_MONTH: u8 = 0x07;
const MONTH: u8 = 0x08;
const YEAR: u8 = 0x09;
const REGISTER_A: u8 = 0x0a;
const REGISTER_B: u8 = 0x0b;
const REGISTER_C: u8 = 0x0c;
const REGISTER_D: u8 = 0x0d;
/// Century; the index is for the FADT's CENTURY field.
pub const CENTURY: u8 = 0x32;
/// The registers that show the time.
const TIME_REGISTERS: [u8; 8] = [
    SECONDS,
    MINUTES,
    HOURS,
    DAY_OF_WEEK,
    DAY_OF_MONTH,
    MONTH,
    YEAR,
    CENTURY,
];

// Memory sizes as BIOSes leave them: low byte first.
/// KiB below 640 KiB.
const BASE_MEMORY: u8 = 0x15;
/// KiB above 1 MiB, at most 0xffff.
const EXTENDED_MEMORY: u8 = 0x17;
/// The same, as measured.
const EXTENDED_MEMORY_MEASURED: u8 = 0x30;
/// 64-KiB units from 16 MiB up to 4 GiB, at most 0xffff.
const MEMORY_ABOVE_16M: u8 = 0x34;
/// 64-KiB units above 4 GiB, 24 bits.
const MEMORY_ABOVE_4G: u8 = 0x5b;

/// Register A.
mod a {
    /// Update in progress; read-only.
    pub const UIP: u8 = 1 << 7;
    /// Divider control; 11x holds the divider in reset.
    pub const DIVIDER_RESET: u8 = 0b110 << 4;
    /// Rate select of the periodic interrupt.
    pub const RATE_SELECT: u8 = 0x0f;
    /// 32.768 kHz and 1024 Hz, as PC BIOSes set it.
    pub const POWER_ON: u8 = 0x26;
}

/// Register B. The three interrupt enables have the places that the flags have in register C.
mod b {
    pub const SET: u8 = 1 << 7;
    pub const UIE: u8 = 1 << 4;
    /// Data mode: binary, else BCD.
    pub const DM: u8 = 1 << 2;
    pub const HOURS_24: u8 = 1 << 1;
    pub const POWER_ON: u8 = HOURS_24;
}

/// Register C.
mod c {
    pub const IRQF: u8 = 1 << 7;
    pub const PF: u8 = 1 << 6;
    pub const AF: u8 = 1 << 5;
    pub const UF: u8 = 1 << 4;
    pub const FLAGS: u8 = PF | AF | UF;
}

/// Register D: valid RAM and time.
const VRT: u8 = 1 << 7;
/// In 12-hour mode bit 7 of the hours is "p.m.".
const PM: u8 = 1 << 7;
/// An alarm byte from 0xc0 up matches anything [MC146818, "Time, calendar and alarm locations"].
const DO_NOT_CARE: u8 = 0xc0;

const SECOND_NS: i128 = 1_000_000_000;
/// Frequency of the time base in Hz.
const BASE_HZ: i128 = 32_768;
/// UIP is set this long before the new second shows: t_BUC + t_UC [MC146818 table 6], 244 + 1984 µs.
const UPDATE_NS: i128 = 2_228_000;
/// An armed alarm is looked at again this often, for the case that the host's wall clock was set.
const ALARM_RECHECK_NS: i128 = 60 * SECOND_NS;

/// How much memory the machine has, for the memory-size bytes of the CMOS.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct MemorySize {
    /// End of RAM below 4 GiB, in bytes: an address.
    pub below_4g_bytes: u64,
    /// RAM above 4 GiB in bytes.
    pub above_4g_bytes: u64,
}

/// The clock and its memory.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Rtc {
    memory_size: MemorySize,
    /// Which register the data port shows, 0 to 0x7f.
    index: u8,
    /// The 128 bytes. Those of [`TIME_REGISTERS`] count only while the time is held; A to D are not kept here.
    cells: [u8; 128],
    /// Register A without UIP.
    a: u8,
    /// Register B.
    b: u8,
    /// PF, AF and UF of register C.
    flags: u8,
    /// What to add to the host's wall clock to get the guest's, in nanoseconds. Its phase is that of the divider.
    offset_ns: i128,
    /// The guest's time up to which `flags` accounts for what happened; none before the first access.
    seen_ns: Option<i128>,
    /// When an enabled interrupt that is not flagged yet is due.
    due: Option<Nanos>,
}

impl Rtc {
    /// A clock that shows the host's time.
    pub fn new(memory_size: MemorySize) -> Rtc {
        let mut rtc = Rtc {
            memory_size,
            index: 0,
            cells: [0; 128],
            a: a::POWER_ON,
            b: b::POWER_ON,
            flags: 0,
            offset_ns: 0,
            seen_ns: None,
            due: None,
        };
        let kib_above_1m = (memory_size.below_4g_bytes >> 10)
            .saturating_sub(1 << 10)
            .min(0xffff);
        let blocks_above_16m = (memory_size.below_4g_bytes >> 16)
            .saturating_sub(1 << 8)
            .min(0xffff);
        let blocks_above_4g = (memory_size.above_4g_bytes >> 16).min(0xff_ffff);
        rtc.store(BASE_MEMORY, 2, (memory_size.below_4g_bytes >> 10).min(640));
        rtc.store(EXTENDED_MEMORY, 2, kib_above_1m);
        rtc.store(EXTENDED_MEMORY_MEASURED, 2, kib_above_1m);
        rtc.store(MEMORY_ABOVE_16M, 2, blocks_above_16m);
        rtc.store(MEMORY_ABOVE_4G, 3, blocks_above_4g);
        rtc
    }
}

impl Device for Rtc {
    fn name(&self) -> &'static str {
        "rtc"
    }

    fn read(&mut self, cx: &mut dyn Context, access: Access) -> u64 {
        byte_lanes::read(access, |offset| match offset {
            DATA => self.read_data(cx),
            _ => 0xff,
        })
    }

    fn write(&mut self, cx: &mut dyn Context, access: Access, value: u64) {
        byte_lanes::write(access, value, |offset, byte| match offset {
            INDEX => self.index = byte & INDEX_MASK,
            DATA => self.write_data(cx, byte),
            _ => {}
        });
    }

    fn interrupt(&self) -> bool {
        self.flags & self.b & c::FLAGS != 0
    }

    fn deadline(&self) -> Option<Nanos> {
        self.due
    }

    fn tick(&mut self, cx: &mut dyn Context) {
        self.catch_up(cx);
        self.plan(cx);
    }

    fn reset(&mut self, _cx: &mut dyn Context) {
        *self = Rtc::new(self.memory_size);
    }
}

impl Rtc {
    fn read_data(&mut self, cx: &mut dyn Context) -> u8 {
        let now_ns = self.catch_up(cx);
        match self.index {
            REGISTER_A => self.a | if self.updating(now_ns) { a::UIP } else { 0 },
            REGISTER_B => self.b,
            REGISTER_C => {
                let irqf = if self.interrupt() { c::IRQF } else { 0 };
                let value = irqf | std::mem::take(&mut self.flags);
                self.plan(cx);
                value
            }
            REGISTER_D => VRT,
            index if TIME_REGISTERS.contains(&index) && !self.held() => {
                self.encode(DateTime::from_unix_s(seconds(now_ns)), index)
            }
            index => self.cell(index),
        }
    }

    fn write_data(&mut self, cx: &mut dyn Context, value: u8) {
        let now_ns = self.catch_up(cx);
        match self.index {
            REGISTER_A => self.write_control(cx, value & !a::UIP, self.b),
            // Setting SET clears UIE [MC146818, "Register B"].
            REGISTER_B if value & b::SET != 0 => self.write_control(cx, self.a, value & !b::UIE),
            REGISTER_B => self.write_control(cx, self.a, value),
            REGISTER_C | REGISTER_D => {}
            index if TIME_REGISTERS.contains(&index) && !self.held() => {
                self.show(now_ns);
                self.set_cell(index, value);
                self.set_clock(cx, self.shown_s() as i128 * SECOND_NS + phase(now_ns));
            }
            index => self.set_cell(index, value),
        }
        self.plan(cx);
    }

    /// New values for registers A and B, and what follows when they hold or release the time or the divider.
    fn write_control(&mut self, cx: &mut dyn Context, a: u8, b: u8) {
        let now_ns = self.now_ns(cx);
        let (was_held, was_in_reset) = (self.held(), self.divider_in_reset());
        (self.a, self.b) = (a, b);
        if !was_held && self.held() {
            self.show(now_ns);
        }
        let phase = if was_in_reset && !self.divider_in_reset() {
            // The first update comes half a second later [MC146818, "Divider stages"].
            SECOND_NS / 2
        } else {
            phase(now_ns)
        };
        if was_held && !self.held() {
            self.set_clock(cx, self.shown_s() as i128 * SECOND_NS + phase);
        } else if was_in_reset && !self.divider_in_reset() {
            self.set_clock(cx, phase);
        }
    }

    /// The guest's time in nanoseconds since 1970, whether or not the registers show it.
    fn now_ns(&self, cx: &dyn Context) -> i128 {
        i128::from(cx.wall_clock_ns()) + self.offset_ns
    }

    /// Sets the guest's time. A jump is not the passing of time: it flags nothing.
    fn set_clock(&mut self, cx: &dyn Context, time_ns: i128) {
        self.offset_ns = time_ns - i128::from(cx.wall_clock_ns());
        self.seen_ns = Some(time_ns);
    }

    /// Flags what happened since the last call. Returns the time now.
    fn catch_up(&mut self, cx: &dyn Context) -> i128 {
        let now_ns = self.now_ns(cx);
        let seen_ns = self.seen_ns.replace(now_ns).unwrap_or(now_ns);
        // The host's clock may have been set back.
        if now_ns <= seen_ns {
            return now_ns;
        }
        if let Some(period) = self.period_ticks()
            && periods(now_ns, period) != periods(seen_ns, period)
        {
            self.flags |= c::PF;
        }
        if !self.held() {
            if seconds(now_ns) != seconds(seen_ns) {
                self.flags |= c::UF;
            }
            if self
                .next_alarm_s(seconds(seen_ns))
                .is_some_and(|alarm_s| alarm_s <= seconds(now_ns))
            {
                self.flags |= c::AF;
            }
        }
        now_ns
    }

    /// Finds the first enabled interrupt to come. One that is flagged already needs no timer: its line is up.
    fn plan(&mut self, cx: &dyn Context) {
        let now_ns = self.now_ns(cx);
        let awaited = self.b & !self.flags;
        let running = !self.held();
        let periodic = self
            .period_ticks()
            .filter(|_| awaited & c::PF != 0)
            .map(|period| period_start_ns(periods(now_ns, period) + 1, period));
        let update = (running && awaited & c::UF != 0).then(|| (i128::from(seconds(now_ns)) + 1) * SECOND_NS);
        let alarm = self
            .next_alarm_s(seconds(now_ns))
            .filter(|_| running && awaited & c::AF != 0)
            .map(|alarm_s| (i128::from(alarm_s) * SECOND_NS).min(now_ns + ALARM_RECHECK_NS));
        self.due = [periodic, update, alarm]
            .into_iter()
            .flatten()
            .min()
            .map(|event_ns| {
                let wait_ns = u64::try_from(event_ns - now_ns).unwrap_or(0);
                Nanos(cx.now().0.saturating_add(wait_ns))
            });
    }

    /// Whether UIP is set: an update is near and nothing holds it.
    fn updating(&self, now_ns: i128) -> bool {
        !self.held() && phase(now_ns) >= SECOND_NS - UPDATE_NS
    }

    /// The time registers keep what they hold.
    fn held(&self) -> bool {
        self.b & b::SET != 0 || self.divider_in_reset()
    }

    fn divider_in_reset(&self) -> bool {
        self.a & a::DIVIDER_RESET == a::DIVIDER_RESET
    }

    /// Period of the periodic interrupt in ticks of the time base [MC146818 table 5], if there is one.
    fn period_ticks(&self) -> Option<i128> {
        if self.divider_in_reset() {
            return None;
        }
        match self.a & a::RATE_SELECT {
            0 => None,
            // The first two select 256 and 128 Hz, out of line with the rest.
            rate @ 1..=2 => Some(1 << (rate + 6)),
            rate => Some(1 << (rate - 1)),
        }
    }

    /// The first second after `after_s` at which the alarm matches; both in seconds since 1970.
    fn next_alarm_s(&self, after_s: i64) -> Option<i64> {
        let hour = self.alarm_field(HOURS_ALARM, 24)?;
        let minute = self.alarm_field(MINUTES_ALARM, 60)?;
        let second = self.alarm_field(SECONDS_ALARM, 60)?;
        let (day_s, time_s) = (
            (after_s + 1).div_euclid(DAY_S) * DAY_S,
            (after_s + 1).rem_euclid(DAY_S),
        );
        // The first match at or after a time of day.
        let first_from = |from_s: i64| {
            let hours = hour.clone().filter(|hour| hour * 3600 + 3599 >= from_s);
            hours
                .flat_map(|hour| minute.clone().map(move |minute| hour * 3600 + minute * 60))
                .filter(|minute_s| minute_s + 59 >= from_s)
                .flat_map(|minute_s| second.clone().map(move |second| minute_s + second))
                .find(|time_s| *time_s >= from_s)
        };
        first_from(time_s)
            .map(|match_s| day_s + match_s)
            .or_else(|| first_from(0).map(|match_s| day_s + DAY_S + match_s))
    }

    /// The values that an alarm byte matches, all below `limit`; none if it can never match.
    fn alarm_field(&self, index: u8, limit: i64) -> Option<Range<i64>> {
        let raw = self.cell(index);
        if raw >= DO_NOT_CARE {
            return Some(0..limit);
        }
        let value = if index == HOURS_ALARM {
            self.decode_hours(raw)
        } else {
            self.decode(raw)
        };
        (value < limit).then_some(value..value + 1)
    }

    /// Writes the time into the time registers.
    fn show(&mut self, time_ns: i128) {
        let date = DateTime::from_unix_s(seconds(time_ns));
        for index in TIME_REGISTERS {
            self.set_cell(index, self.encode(date, index));
        }
    }

    /// What the time registers hold, in seconds since 1970. Total: see [`DateTime::to_unix_s`].
    fn shown_s(&self) -> i64 {
        let value = |index| self.decode(self.cell(index));
        DateTime {
            year: value(CENTURY) * 100 + value(YEAR),
            month: value(MONTH),
            day: value(DAY_OF_MONTH),
            hour: self.decode_hours(self.cell(HOURS)),
            minute: value(MINUTES),
            second: value(SECONDS),
        }
        .to_unix_s()
    }

    /// One of [`TIME_REGISTERS`] for a date, in the guest's data and hour modes.
    fn encode(&self, date: DateTime, index: u8) -> u8 {
        let value = match index {
            SECONDS => date.second,
            MINUTES => date.minute,
            HOURS if self.b & b::HOURS_24 == 0 => (date.hour + 11) % 12 + 1,
            HOURS => date.hour,
            DAY_OF_WEEK => date.weekday() + 1,
            DAY_OF_MONTH => date.day,
            MONTH => date.month,
            YEAR => date.year.rem_euclid(100),
            _ => date.year.div_euclid(100).rem_euclid(100),
        };
        // Every value is in 0..100.
        let value = value as u8;
        let encoded = if self.b & b::DM != 0 {
            value
        } else {
            ((value / 10) << 4) | (value % 10)
        };
        let pm = index == HOURS && self.b & b::HOURS_24 == 0 && date.hour >= 12;
        if pm { encoded | PM } else { encoded }
    }

    /// Binary or BCD to a number; digits above 9 count as what they are.
    fn decode(&self, raw: u8) -> i64 {
        let raw = i64::from(raw);
        if self.b & b::DM != 0 {
            raw
        } else {
            (raw >> 4) * 10 + (raw & 0x0f)
        }
    }

    /// Hours in the guest's hour mode to 0..24.
    fn decode_hours(&self, raw: u8) -> i64 {
        if self.b & b::HOURS_24 != 0 {
            return self.decode(raw);
        }
        self.decode(raw & !PM) % 12 + if raw & PM != 0 { 12 } else { 0 }
    }

    fn cell(&self, index: u8) -> u8 {
        self.cells.get(usize::from(index)).copied().unwrap_or(0xff)
    }

    fn set_cell(&mut self, index: u8, value: u8) {
        if let Some(cell) = self.cells.get_mut(usize::from(index)) {
            *cell = value;
        }
    }

    /// Stores a number, low byte first.
    fn store(&mut self, index: u8, bytes: u8, value: u64) {
        for (index, byte) in (index..index + bytes).zip(value.to_le_bytes()) {
            self.set_cell(index, byte);
        }
    }
}

/// Whole seconds of a time. The clock's times are within a few ten thousand years of 1970, so they fit.
fn seconds(time_ns: i128) -> i64 {
    time_ns.div_euclid(SECOND_NS) as i64
}

/// Nanoseconds into the second.
fn phase(time_ns: i128) -> i128 {
    time_ns.rem_euclid(SECOND_NS)
}

/// How many periods of `ticks` of the time base have begun by a time.
fn periods(time_ns: i128, ticks: i128) -> i128 {
    (time_ns * BASE_HZ).div_euclid(SECOND_NS * ticks)
}

/// The first nanosecond of a period.
fn period_start_ns(period: i128, ticks: i128) -> i128 {
    (period * ticks * SECOND_NS + BASE_HZ - 1).div_euclid(BASE_HZ)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::devices::Width;
    use crate::devices::testing::Bench;

    const PIE: u8 = c::PF;
    const AIE: u8 = c::AF;
    const UIE: u8 = c::UF;
    const BINARY_24: u8 = b::DM | b::HOURS_24;
    const SECOND: u64 = SECOND_NS as u64;
    const NO_MEMORY: MemorySize = MemorySize {
        below_4g_bytes: 0,
        above_4g_bytes: 0,
    };

    /// A clock at 2001-09-09 01:46:40, a Sunday.
    fn rtc() -> Bench<Rtc> {
        Bench::new(Rtc::new(NO_MEMORY))
    }

    impl Bench<Rtc> {
        fn get(&mut self, index: u8) -> u8 {
            self.write(INDEX, index);
            self.read(DATA)
        }

        fn set(&mut self, index: u8, value: u8) {
            self.write(INDEX, index);
            self.write(DATA, value);
        }

        /// Century, year, month, day, weekday, hour, minute, second.
        fn time(&mut self) -> [u8; 8] {
            [
                CENTURY,
                YEAR,
                MONTH,
                DAY_OF_MONTH,
                DAY_OF_WEEK,
                HOURS,
                MINUTES,
                SECONDS,
            ]
            .map(|index| self.get(index))
        }

        /// As Linux does it in mc146818_set_time.
        fn set_time(&mut self, time: [u8; 7]) {
            let (a, b) = (self.get(REGISTER_A), self.get(REGISTER_B));
            self.set(REGISTER_B, b | b::SET);
            self.set(REGISTER_A, a | 0x70);
            for (index, value) in [CENTURY, YEAR, MONTH, DAY_OF_MONTH, HOURS, MINUTES, SECONDS]
                .into_iter()
                .zip(time)
            {
                self.set(index, value);
            }
            self.set(REGISTER_B, b);
            self.set(REGISTER_A, a & !a::UIP);
        }
    }

    #[test]
    fn shows_the_hosts_time_in_bcd_and_24_hours_after_power_on() {
        assert_eq!(rtc().time(), [0x20, 0x01, 0x09, 0x09, 1, 0x01, 0x46, 0x40]);
    }

    #[test]
    fn data_mode_chooses_binary() {
        let mut rtc = rtc();
        rtc.set(REGISTER_B, BINARY_24);
        assert_eq!(rtc.time(), [20, 1, 9, 9, 1, 1, 46, 40]);
    }

    #[test]
    fn hours_in_12_hour_mode() {
        let cases = [
            (0, 0x12),
            (1, 0x01),
            (11, 0x11),
            (12, 0x92),
            (13, 0x81),
            (23, 0x91),
        ];
        for (hour, expected) in cases {
            let mut rtc = rtc();
            rtc.cx.wall_clock_ns = hour * 3600 * SECOND as i64;
            rtc.set(REGISTER_B, 0);
            assert_eq!(rtc.get(HOURS), expected, "hour {hour}");
        }
    }

    #[test]
    fn bit_7_of_the_index_is_not_part_of_it() {
        let mut rtc = rtc();
        assert_eq!(rtc.get(0x80 | REGISTER_D), VRT);
    }

    #[test]
    fn the_index_port_reads_all_ones() {
        let mut rtc = rtc();
        rtc.write(INDEX, 5);
        assert_eq!(rtc.read(INDEX), 0xff);
    }

    #[test]
    fn a_word_write_sets_index_and_data() {
        let mut rtc = rtc();
        rtc.write_wide(INDEX, Width::Word, 0x5a40);
        assert_eq!(rtc.get(0x40), 0x5a);
    }

    #[test]
    fn memory_keeps_what_is_written() {
        let mut rtc = rtc();
        for index in (0x0e..0x80).filter(|index| *index != CENTURY) {
            rtc.set(index, !index);
        }
        for index in (0x0e..0x80).filter(|index| *index != CENTURY) {
            assert_eq!(rtc.get(index), !index, "index {index:#x}");
        }
    }

    #[test]
    fn memory_sizes_are_where_a_bios_leaves_them() {
        const MIB: u64 = 1 << 20;
        // (below 4G, above 4G) to [0x15, 0x17, 0x30, 0x34] as words and 0x5b as 24 bits.
        let cases = [
            (8 * MIB, 0, [640, 7 * 1024, 7 * 1024, 0], 0),
            (64 * MIB, 0, [640, 63 * 1024, 63 * 1024, 48 * 16], 0),
            (
                3072 * MIB,
                1536 * MIB,
                [640, 0xffff, 0xffff, (3072 - 16) * 16],
                1536 * 16,
            ),
        ];
        for (below_4g_bytes, above_4g_bytes, words, above) in cases {
            let mut rtc = Bench::new(Rtc::new(MemorySize {
                below_4g_bytes,
                above_4g_bytes,
            }));
            let word = |rtc: &mut Bench<Rtc>, index| u16::from_le_bytes([rtc.get(index), rtc.get(index + 1)]);
            assert_eq!([0x15, 0x17, 0x30, 0x34].map(|index| word(&mut rtc, index)), words);
            let found = u32::from_le_bytes([rtc.get(0x5b), rtc.get(0x5c), rtc.get(0x5d), 0]);
            assert_eq!(found, above);
        }
    }

    // Setting the time.

    #[test]
    fn a_time_set_as_linux_does_it_goes_on_from_there() {
        let mut rtc = rtc();
        rtc.set_time([0x19, 0x99, 0x12, 0x31, 0x23, 0x59, 0x58]);
        assert_eq!(rtc.time(), [0x19, 0x99, 0x12, 0x31, 6, 0x23, 0x59, 0x58]);
        rtc.run_for_ns(2 * SECOND);
        assert_eq!(rtc.time(), [0x20, 0x00, 0x01, 0x01, 7, 0x00, 0x00, 0x00]);
    }

    #[test]
    fn the_first_second_after_the_dividers_reset_is_half_a_second_long() {
        let mut rtc = rtc();
        rtc.cx.advance_ns(SECOND / 3);
        rtc.set_time([0x20, 0x24, 0x02, 0x29, 0, 0, 0]);
        rtc.cx.advance_ns(SECOND / 2 - 1);
        assert_eq!(rtc.get(SECONDS), 0);
        rtc.cx.advance_ns(1);
        assert_eq!(rtc.get(SECONDS), 1);
    }

    #[test]
    fn set_alone_keeps_the_phase_of_the_second() {
        let mut rtc = rtc();
        rtc.cx.advance_ns(SECOND / 4);
        rtc.set(REGISTER_B, b::POWER_ON | b::SET);
        rtc.set(SECONDS, 0x10);
        rtc.set(REGISTER_B, b::POWER_ON);
        rtc.cx.advance_ns(3 * SECOND / 4 - 1);
        assert_eq!(rtc.get(SECONDS), 0x10);
        rtc.cx.advance_ns(1);
        assert_eq!(rtc.get(SECONDS), 0x11);
    }

    #[test]
    fn while_set_is_set_the_time_stands() {
        let mut rtc = rtc();
        rtc.set(REGISTER_B, b::POWER_ON | b::SET);
        rtc.run_for_ns(10 * SECOND);
        assert_eq!(rtc.get(SECONDS), 0x40);
    }

    #[test]
    fn a_register_written_while_the_clock_runs_takes_effect_at_once() {
        let mut rtc = rtc();
        rtc.set(MINUTES, 0x59);
        rtc.run_for_ns(20 * SECOND);
        assert_eq!(rtc.time(), [0x20, 0x01, 0x09, 0x09, 1, 0x02, 0x00, 0x00]);
    }

    #[test]
    fn the_clock_follows_the_hosts() {
        let mut rtc = rtc();
        rtc.set(MINUTES, 0x00);
        rtc.cx.wall_clock_ns += 3600 * SECOND as i64;
        assert_eq!(rtc.time()[5..], [0x02, 0x00, 0x40]);
    }

    #[test]
    fn a_date_that_is_none_carries() {
        let mut rtc = rtc();
        rtc.set_time([0x20, 0x23, 0x02, 0x30, 0, 0, 0]);
        assert_eq!(rtc.time()[..4], [0x20, 0x23, 0x03, 0x02]);
    }

    // Register A and D.

    #[test]
    fn uip_is_set_in_the_last_2228_us_of_a_second() {
        for (phase_us, uip) in [(0, 0), (997_771, 0), (997_772, a::UIP), (999_999, a::UIP)] {
            let mut rtc = rtc();
            rtc.cx.advance_ns(phase_us * 1000);
            assert_eq!(rtc.get(REGISTER_A) & a::UIP, uip, "{phase_us} us");
        }
    }

    #[test]
    fn uip_is_clear_while_the_time_is_held() {
        let mut rtc = rtc();
        rtc.cx.advance_ns(999_999_000);
        rtc.set(REGISTER_B, b::POWER_ON | b::SET);
        assert_eq!(rtc.get(REGISTER_A) & a::UIP, 0);
    }

    #[test]
    fn registers_c_and_d_ignore_writes() {
        let mut rtc = rtc();
        rtc.set(REGISTER_C, 0xff);
        rtc.set(REGISTER_D, 0);
        assert_eq!((rtc.get(REGISTER_C), rtc.get(REGISTER_D)), (0, VRT));
    }

    // Interrupts.

    #[test]
    fn without_an_enabled_interrupt_there_is_no_deadline() {
        let mut rtc = rtc();
        rtc.get(REGISTER_C);
        rtc.set(REGISTER_A, 0x26);
        assert_eq!(rtc.device.deadline(), None);
    }

    #[test]
    fn flags_are_set_without_interrupts_too_and_reading_clears_them() {
        let mut rtc = rtc();
        rtc.get(REGISTER_C);
        rtc.cx.advance_ns(SECOND);
        assert_eq!(rtc.get(REGISTER_C), c::PF | c::UF);
        assert_eq!(rtc.get(REGISTER_C), 0);
    }

    #[test]
    fn update_ended_interrupts_at_the_second() {
        let mut rtc = rtc();
        rtc.cx.advance_ns(SECOND / 4);
        rtc.set(REGISTER_B, b::POWER_ON | UIE);
        rtc.run_for_ns(3 * SECOND / 4 - 1);
        assert!(!rtc.device.interrupt());
        rtc.run_for_ns(1);
        assert!(rtc.device.interrupt());
        assert_eq!(rtc.get(REGISTER_C) & (c::IRQF | c::UF), c::IRQF | c::UF);
        assert!(!rtc.device.interrupt());
        rtc.run_for_ns(SECOND);
        assert!(rtc.device.interrupt());
    }

    #[test]
    fn an_interrupt_that_nobody_takes_care_of_has_no_further_deadline() {
        let mut rtc = rtc();
        rtc.set(REGISTER_B, b::POWER_ON | PIE);
        rtc.run_for_ns(SECOND);
        assert_eq!((rtc.device.interrupt(), rtc.device.deadline()), (true, None));
    }

    #[test]
    fn setting_set_clears_uie() {
        let mut rtc = rtc();
        rtc.set(REGISTER_B, b::POWER_ON | UIE | b::SET);
        assert_eq!(rtc.get(REGISTER_B) & UIE, 0);
    }

    #[test]
    fn periodic_rates() {
        // Rate select to Hz [MC146818 table 5].
        let rates = [
            256, 128, 8192, 4096, 2048, 1024, 512, 256, 128, 64, 32, 16, 8, 4, 2,
        ];
        for (select, hz) in (1..).zip(rates) {
            let mut rtc = rtc();
            rtc.set(REGISTER_A, 0x20 | select);
            rtc.set(REGISTER_B, b::POWER_ON | PIE);
            let mut interrupts = 0;
            while let Some(Nanos(due)) = rtc.device.deadline().filter(|due| due.0 <= SECOND) {
                rtc.run_for_ns(due - rtc.cx.now.0);
                assert_eq!(rtc.get(REGISTER_C) & (c::IRQF | c::PF), c::IRQF | c::PF);
                interrupts += 1;
            }
            assert_eq!(interrupts, hz, "rate select {select}");
        }
    }

    #[test]
    fn rate_0_and_a_divider_in_reset_give_no_periodic_interrupt() {
        for a in [0x20, 0x76] {
            let mut rtc = rtc();
            rtc.set(REGISTER_A, a);
            rtc.set(REGISTER_B, b::POWER_ON | PIE);
            rtc.run_for_ns(2 * SECOND);
            assert_eq!(
                (rtc.device.interrupt(), rtc.device.deadline()),
                (false, None),
                "A {a:#x}"
            );
        }
    }

    #[test]
    fn the_alarm_goes_off_at_its_time() {
        // (hours, minutes, seconds) of the alarm to seconds from 01:46:40; none: not within two days.
        const ANY: u8 = 0xff;
        let cases = [
            ([0x01, 0x46, 0x41], Some(1)),
            ([0x01, 0x46, 0x40], Some(DAY_S)),
            ([0x01, 0x46, 0x39], Some(DAY_S - 1)),
            ([ANY, 0x46, 0x39], Some(3599)),
            ([ANY, ANY, 0x39], Some(59)),
            ([ANY, ANY, ANY], Some(1)),
            ([ANY, 0x00, 0x00], Some(13 * 60 + 20)),
            ([0x00, 0x00, 0x00], Some(DAY_S - 6400)),
            ([0xc0, ANY, 0x00], Some(20)),
            ([0x02, ANY, ANY], Some(13 * 60 + 20)),
            ([0x24, ANY, ANY], None),
            ([ANY, 0x60, ANY], None),
            ([ANY, ANY, 0x60], None),
        ];
        for (alarm, expected) in cases {
            let mut rtc = rtc();
            for (index, value) in [HOURS_ALARM, MINUTES_ALARM, SECONDS_ALARM].into_iter().zip(alarm) {
                rtc.set(index, value);
            }
            rtc.set(REGISTER_B, b::POWER_ON | AIE);
            while !rtc.device.interrupt()
                && let Some(Nanos(due)) = rtc
                    .device
                    .deadline()
                    .filter(|due| due.0 < 3 * DAY_S as u64 * SECOND)
            {
                rtc.run_for_ns(due - rtc.cx.now.0);
            }
            let after_s = rtc.device.interrupt().then_some((rtc.cx.now.0 / SECOND) as i64);
            assert_eq!(after_s, expected, "alarm {alarm:x?}");
            if expected.is_some() {
                assert_eq!(rtc.get(REGISTER_C) & (c::IRQF | c::AF), c::IRQF | c::AF);
            }
        }
    }

    #[test]
    fn the_alarm_understands_binary_and_12_hours() {
        for (mode, hour) in [(b::DM, PM | 1), (0, PM | 0x01), (BINARY_24, 13)] {
            let mut rtc = rtc();
            rtc.set(REGISTER_B, mode | AIE);
            rtc.set(HOURS_ALARM, hour);
            rtc.run_for_ns(12 * 3600 * SECOND);
            assert!(rtc.device.interrupt(), "mode {mode:#x}");
        }
    }

    #[test]
    fn setting_the_time_past_the_alarm_does_not_set_it_off() {
        let mut rtc = rtc();
        rtc.set(HOURS_ALARM, 0x03);
        rtc.set(REGISTER_B, b::POWER_ON | AIE);
        rtc.set(HOURS, 0x05);
        assert!(!rtc.device.interrupt());
        assert_eq!(rtc.get(REGISTER_C) & c::AF, 0);
    }

    #[test]
    fn a_host_clock_set_back_delays_the_update_interrupt_and_does_no_more() {
        let mut rtc = rtc();
        rtc.set(REGISTER_B, b::POWER_ON | UIE);
        rtc.cx.wall_clock_ns -= 10 * SECOND as i64 + 1;
        rtc.run_for_ns(SECOND);
        assert!(!rtc.device.interrupt());
        rtc.run_for_ns(1);
        assert!(rtc.device.interrupt());
    }

    #[test]
    fn a_host_clock_set_forward_past_the_alarm_sets_it_off_within_a_minute() {
        let mut rtc = rtc();
        rtc.set(HOURS_ALARM, 0x03);
        rtc.set(REGISTER_B, b::POWER_ON | AIE);
        rtc.cx.wall_clock_ns += 2 * 3600 * SECOND as i64;
        rtc.run_for_ns(60 * SECOND);
        assert!(rtc.device.interrupt());
    }

    #[test]
    fn reset_is_a_new_clock() {
        let mut rtc = rtc();
        rtc.set_time([0x19, 0x99, 0x12, 0x31, 0x23, 0x59, 0x58]);
        rtc.set(0x40, 0x5a);
        rtc.set(REGISTER_B, b::POWER_ON | PIE);
        rtc.reset();
        assert_eq!(rtc.device, Rtc::new(NO_MEMORY));
    }

    proptest! {
        #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]

        #[test]
        fn any_date_reads_back_as_it_was_set_in_any_mode(
            seconds in DateTime { year: 0, month: 1, day: 1, hour: 0, minute: 0, second: 0 }.to_unix_s()..253_402_300_800,
            mode in prop::sample::select(vec![0, b::DM, b::HOURS_24, BINARY_24]),
        ) {
            let mut rtc = rtc();
            rtc.set(REGISTER_B, mode);
            let date = DateTime::from_unix_s(seconds);
            let registers = [CENTURY, YEAR, MONTH, DAY_OF_MONTH, HOURS, MINUTES, SECONDS]
                .map(|index| rtc.device.encode(date, index));
            rtc.set_time(registers);
            prop_assert_eq!(&rtc.time()[..4], &registers[..4]);
            prop_assert_eq!(&rtc.time()[5..], &registers[4..]);
            let shown = rtc.device.now_ns(&rtc.cx);
            prop_assert_eq!(super::seconds(shown), seconds);
        }
    }
}
