//! The measuring guest of `actor-vmm bench`: its vCPUs access ports and take the time themselves, with the time-stamp
//! counter. The same image runs here and in any other VMM that boots ELF files by PVH.
//!
//! It is entered in protected mode without paging and stays there. What it shall do is patched into its head
//! ([`Order::image`]); what it found is left in memory ([`read_results`]) or printed on the first serial port
//! ([`parse_report`]), whichever the order says. It needs [`MEMORY_BYTES`] of RAM.
//!
//! Each measured vCPU does two things, all of them together: so many accesses in a row, without a look at the clock in
//! between; then so many of which each is timed. A slow one, if there is one, goes on until the others are done: half
//! of its time in its access, half not.

use super::{LOAD_ADDRESS, image};
use crate::boot::EntryPoint;
use vm_memory::{Bytes, GuestAddress, GuestMemoryError, GuestMemoryMmap};

/// Most vCPUs.
pub const MAX_VCPUS: usize = 16;
/// Most timed accesses of a vCPU: what its part of memory has room for.
pub const MAX_TIMED: usize = (RESULT_BYTES - RESULT_HEAD) / 4;
/// RAM that it needs.
pub const MEMORY_BYTES: u64 = 16 << 20;
/// The port that it writes to when everything is done, unless it printed its report: whoever reads that knows.
pub const END_PORT: u16 = crate::boot::layout::io::DEBUG_EXIT;

/// Where the order is in the image: behind a jump over it.
const ORDER: usize = 8;
const ORDER_PORTS: usize = ORDER + 24;
const RESULTS: u64 = 0x20_0000;
/// A vCPU's part of the results: two counts of the clock, then the timed accesses.
const RESULT_BYTES: usize = 0x1_0000;
const RESULT_HEAD: usize = 16;

/// Begins and ends a printed report.
const MARK: &str = "actor-vmm-meter<";
const END_MARK: char = '>';

image! {
    fn meter = "actor_vmm_meter";
    ".code32",
    "jmp .Lmeter_main",
    ".balign 8",
    // Here the order comes: vCPUs, those of them that are measured, accesses in a row, timed accesses, pace in ticks,
    // whether to print; then 8 bytes a vCPU: port (2 bytes), operation (1), slow (1).
    ".Lmeter_order: .fill 24 + 8 * {max_vcpus}, 1, 0",
    ".set METER_ORDER, LOAD_ADDRESS + 8",
    ".set METER_VCPUS, METER_ORDER",
    ".set METER_MEASURED, METER_ORDER + 4",
    ".set METER_IN_A_ROW, METER_ORDER + 8",
    ".set METER_TIMED, METER_ORDER + 12",
    ".set METER_PACE, METER_ORDER + 16",
    ".set METER_PRINT, METER_ORDER + 20",
    ".set METER_PORTS, METER_ORDER + 24",
    ".balign 8",
    ".Lmeter_gdt: .quad 0, 0x00cf9b000000ffff, 0x00cf93000000ffff",
    ".set METER_GDT, .Lmeter_gdt - actor_vmm_meter + LOAD_ADDRESS",
    // Variables, zero at the start: the image's own room.
    ".Lmeter_variables: .fill 8, 4, 0",
    ".set METER_VARIABLES, .Lmeter_variables - actor_vmm_meter + LOAD_ADDRESS",
    ".set METER_STARTED, METER_VARIABLES",
    ".set METER_UP, METER_VARIABLES + 4",
    ".set METER_READY, METER_VARIABLES + 8",
    ".set METER_FIRST, METER_VARIABLES + 12",
    ".set METER_DONE, METER_VARIABLES + 16",
    ".set METER_OVER, METER_VARIABLES + 20",
    ".set METER_GDTR, METER_VARIABLES + 24",
    ".set METER_TRAMPOLINE, 0x10000",
    ".set METER_RESULTS, {results}",
    ".set METER_STACKS, 0x600000",

    // A GDT of our own: PVH does not say which selectors there are [Xen: docs/misc/pvh.pandoc].
    ".Lmeter_main:",
    "cli",
    "cld",
    "mov word ptr [METER_GDTR], 23",
    "mov dword ptr [METER_GDTR + 2], offset METER_GDT",
    "lgdt [METER_GDTR]",
    // jmp far 0x8:flat
    ".set METER_FLAT, .Lmeter_flat - actor_vmm_meter + LOAD_ADDRESS",
    ".byte 0xea",
    ".long METER_FLAT",
    ".word 8",
    ".Lmeter_flat:",
    "mov eax, 0x10",
    "mov ds, eax",
    "mov es, eax",
    "mov ss, eax",
    "mov esp, METER_STACKS",
    // The RTC's index stays on a cell that is plain memory, the shutdown status, bit 7 (NMI off) clear.
    "mov al, 0xf",
    "out 0x70, al",
    "xor ebp, ebp",
    "cmp dword ptr [METER_VCPUS], 1",
    "jbe .Lmeter_vcpu",

    // INIT and two SIPIs to all others, with pauses in between [SDM 3A §9.4.4].
    "mov esi, offset METER_TRAMPOLINE_CODE",
    "mov edi, METER_TRAMPOLINE",
    "mov ecx, offset METER_TRAMPOLINE_BYTES",
    "rep movsb",
    "mov edi, LAPIC",
    "mov dword ptr [edi + 0xf0], 0x1ff",
    "mov dword ptr [edi + 0x300], 0xc4500",
    "call .Lmeter_pause",
    "mov dword ptr [edi + 0x300], 0xc4600 + (METER_TRAMPOLINE >> 12)",
    "call .Lmeter_pause",
    "mov dword ptr [edi + 0x300], 0xc4600 + (METER_TRAMPOLINE >> 12)",
    "mov ecx, [METER_VCPUS]",
    "dec ecx",
    "2: pause",
    "cmp [METER_UP], ecx",
    "jb 2b",
    "jmp .Lmeter_vcpu",

    // Ten million ticks: some milliseconds.
    ".Lmeter_pause:",
    "rdtsc",
    "mov ecx, eax",
    "2: pause",
    "rdtsc",
    "sub eax, ecx",
    "cmp eax, 10000000",
    "jb 2b",
    "ret",

    // Where the others begin, in real mode, with CS the trampoline's page.
    ".code16",
    ".Lmeter_trampoline:",
    "cli",
    "mov ax, cs",
    "mov ds, ax",
    ".set METER_TRAMPOLINE_GDTR, .Lmeter_trampoline_gdtr - .Lmeter_trampoline",
    "lgdt [METER_TRAMPOLINE_GDTR]",
    "mov eax, cr0",
    "or al, 1",
    "mov cr0, eax",
    ".set METER_OTHER, .Lmeter_other - actor_vmm_meter + LOAD_ADDRESS",
    ".byte 0x66, 0xea",
    ".long METER_OTHER",
    ".word 8",
    ".Lmeter_trampoline_gdtr:",
    ".word 23",
    ".long METER_GDT",
    ".Lmeter_trampoline_end:",
    ".set METER_TRAMPOLINE_CODE, .Lmeter_trampoline - actor_vmm_meter + LOAD_ADDRESS",
    ".set METER_TRAMPOLINE_BYTES, .Lmeter_trampoline_end - .Lmeter_trampoline",
    ".code32",
    ".Lmeter_other:",
    "mov eax, 0x10",
    "mov ds, eax",
    "mov es, eax",
    "mov ss, eax",
    // Numbers in the order in which they come.
    "mov eax, 1",
    "lock xadd [METER_STARTED], eax",
    "lea ebp, [eax + 1]",
    "mov esp, ebp",
    "shl esp, 10",
    "add esp, METER_STACKS",
    "lock inc dword ptr [METER_UP]",

    // EBP: number of this vCPU; EDX: its port; BL: what it does there; ESI: its results.
    ".Lmeter_vcpu:",
    "lea eax, [METER_PORTS + ebp * 8]",
    "movzx edx, word ptr [eax]",
    "mov bl, [eax + 2]",
    "mov bh, [eax + 3]",
    "mov esi, ebp",
    "shl esi, 16",
    "add esi, METER_RESULTS",
    // All begin together.
    "lock inc dword ptr [METER_READY]",
    "mov ecx, [METER_VCPUS]",
    "2: pause",
    "cmp [METER_READY], ecx",
    "jb 2b",
    "test bh, bh",
    "jnz .Lmeter_slow",

    // In a row. The counter's halves go to the results, EDX is the port again.
    "mov edi, edx",
    "rdtsc",
    "mov [esi], eax",
    "mov [esi + 4], edx",
    "mov edx, edi",
    "mov ecx, [METER_IN_A_ROW]",
    "jecxz .Lmeter_row_end",
    "cmp bl, {in8}",
    "je .Lmeter_in8",
    "cmp bl, {out8}",
    "je .Lmeter_out8",
    "cmp bl, {out32}",
    "je .Lmeter_out32",
    "2: in eax, dx",
    "dec ecx",
    "jnz 2b",
    "jmp .Lmeter_row_end",
    ".Lmeter_in8: in al, dx",
    "dec ecx",
    "jnz .Lmeter_in8",
    "jmp .Lmeter_row_end",
    ".Lmeter_out8: out dx, al",
    "dec ecx",
    "jnz .Lmeter_out8",
    "jmp .Lmeter_row_end",
    ".Lmeter_out32: out dx, eax",
    "dec ecx",
    "jnz .Lmeter_out32",
    ".Lmeter_row_end:",
    "rdtsc",
    "mov [esi + 8], eax",
    "mov [esi + 12], edx",
    "mov edx, edi",
    "lock inc dword ptr [METER_FIRST]",
    "mov ecx, [METER_MEASURED]",
    "2: pause",
    "cmp [METER_FIRST], ecx",
    "jb 2b",

    // Timed, in the counter's lower half. EDI: when the access is due; with a pace of 0 that is now.
    "push ebp",
    "mov ebp, edx",
    "add esi, {head}",
    "mov ecx, [METER_TIMED]",
    "jecxz .Lmeter_timed_end",
    "rdtsc",
    "mov edi, eax",
    ".Lmeter_next:",
    "cmp dword ptr [METER_PACE], 0",
    "jne 2f",
    "rdtsc",
    "mov edi, eax",
    "jmp 3f",
    "2: rdtsc",
    "sub eax, edi",
    "js 2b",
    "3: mov edx, ebp",
    "test bl, bl",
    "jnz 4f",
    "in al, dx",
    "jmp 6f",
    "4: cmp bl, {out8}",
    "je 5f",
    "cmp bl, {out32}",
    "je 4f",
    "in eax, dx",
    "jmp 6f",
    "4: out dx, eax",
    "jmp 6f",
    "5: out dx, al",
    "6: rdtsc",
    "sub eax, edi",
    "mov [esi], eax",
    "add esi, 4",
    "add edi, [METER_PACE]",
    "dec ecx",
    "jnz .Lmeter_next",
    ".Lmeter_timed_end:",
    "pop ebp",
    "lock inc dword ptr [METER_DONE]",
    "test ebp, ebp",
    "jnz .Lmeter_halt",
    "mov ecx, [METER_MEASURED]",
    "2: pause",
    "cmp [METER_DONE], ecx",
    "jb 2b",
    "mov dword ptr [METER_OVER], 1",
    "cmp dword ptr [METER_PRINT], 0",
    "je .Lmeter_end",
    "call .Lmeter_report",
    "jmp .Lmeter_halt",
    ".Lmeter_end: xor eax, eax",
    "out DEBUG_EXIT, al",
    ".Lmeter_halt: cli",
    "hlt",
    "jmp .Lmeter_halt",

    // The slow one: as long not in the access as in it.
    ".Lmeter_slow: mov ebp, edx",
    "2: cmp dword ptr [METER_OVER], 0",
    "jne .Lmeter_halt",
    "rdtsc",
    "mov esi, eax",
    "mov edx, ebp",
    "cmp bl, {out8}",
    "je 3f",
    "in al, dx",
    "jmp 4f",
    "3: out dx, al",
    "4: rdtsc",
    "mov ecx, eax",
    "sub eax, esi",
    "mov esi, eax",
    "5: pause",
    "rdtsc",
    "sub eax, ecx",
    "cmp eax, esi",
    "jb 5b",
    "jmp 2b",

    // 8 bits, no parity; FIFOs on [PC16550D §8.1, §8.5].
    ".Lmeter_report:",
    "mov dx, COM1 + 3",
    "mov al, 3",
    "out dx, al",
    "mov dx, COM1 + 2",
    "mov al, 7",
    "out dx, al",
    // EBP: bytes that the transmitter still takes.
    "xor ebp, ebp",
    "mov esi, offset METER_MARK",
    "2: mov al, [esi]",
    "test al, al",
    "jz 3f",
    "call .Lmeter_put",
    "inc esi",
    "jmp 2b",
    // ESI: what is printed, EDI: how many words of this vCPU are left, EBX: vCPUs left, the stack: the sum of all.
    "3: mov esi, METER_RESULTS",
    "mov ebx, [METER_MEASURED]",
    "push 0",
    "4: mov edi, [METER_TIMED]",
    "add edi, {head} / 4",
    "push esi",
    "5: mov eax, [esi]",
    "add [esp + 4], eax",
    "call .Lmeter_hex",
    "add esi, 4",
    "dec edi",
    "jnz 5b",
    "pop esi",
    "add esi, {result_bytes}",
    "dec ebx",
    "jnz 4b",
    "pop eax",
    "call .Lmeter_hex",
    "mov al, 0x3e",
    "call .Lmeter_put",
    "ret",
    ".Lmeter_hex: mov ecx, 8",
    "2: rol eax, 4",
    "push eax",
    "and al, 0xf",
    "add al, 0x30",
    "cmp al, 0x3a",
    "jb 3f",
    "add al, 0x27",
    "3: call .Lmeter_put",
    "pop eax",
    "dec ecx",
    "jnz 2b",
    "ret",
    // When the transmitter is empty (LSR.THRE) its FIFO takes 16 bytes [PC16550D §8.4].
    ".Lmeter_put: test ebp, ebp",
    "jnz 3f",
    "push eax",
    "mov dx, COM1 + 5",
    "2: in al, dx",
    "test al, 1 << 5",
    "jz 2b",
    "pop eax",
    "mov ebp, 16",
    "3: mov dx, COM1",
    "out dx, al",
    "dec ebp",
    "ret",
    ".Lmeter_mark: .asciz \"\\nactor-vmm-meter<\"",
    ".set METER_MARK, .Lmeter_mark - actor_vmm_meter + LOAD_ADDRESS"
    ; max_vcpus = const MAX_VCPUS, results = const RESULTS, head = const RESULT_HEAD,
      result_bytes = const RESULT_BYTES, in8 = const Operation::In8 as u8, out8 = const Operation::Out8 as u8,
      out32 = const Operation::Out32 as u8
}

/// What a vCPU does at its port.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[repr(u8)]
pub enum Operation {
    /// Reads a byte.
    In8 = 0,
    /// Writes a byte.
    Out8 = 1,
    /// Reads four bytes.
    In32 = 2,
    /// Writes four bytes.
    Out32 = 3,
}

/// What one vCPU does.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Target {
    /// Where.
    pub port: u16,
    /// What. A slow vCPU knows the byte operations only.
    pub operation: Operation,
}

/// What the guest shall do.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Order {
    /// One a measured vCPU, the boot processor's first: 1 to [`MAX_VCPUS`], with the slow one.
    pub measured: Vec<Target>,
    /// One more vCPU, not measured.
    pub slow: Option<Target>,
    /// Accesses without a look at the clock, of each.
    pub in_a_row: u32,
    /// Timed accesses of each, at most [`MAX_TIMED`].
    pub timed: u32,
    /// Ticks from when one is due to when the next is, below 2^31; 0: as soon as the last is done.
    pub pace: u32,
    /// Print the results on the first serial port.
    pub print: bool,
}

impl Order {
    /// How many vCPUs the guest starts.
    pub fn vcpus(&self) -> usize {
        self.measured.len() + usize::from(self.slow.is_some())
    }

    /// The guest, with this order in it. To be loaded at [`LOAD_ADDRESS`] and entered there.
    ///
    /// # Panics
    /// When there are more vCPUs or timed accesses than the guest has room for, or none to measure.
    pub fn image(&self) -> Vec<u8> {
        assert!(!self.measured.is_empty() && self.vcpus() <= MAX_VCPUS && self.timed as usize <= MAX_TIMED);
        let mut bytes = meter().to_vec();
        let words = [
            self.vcpus() as u32,
            self.measured.len() as u32,
            self.in_a_row,
            self.timed,
            self.pace,
            u32::from(self.print),
        ];
        for (slot, word) in bytes[ORDER..ORDER_PORTS].chunks_exact_mut(4).zip(words) {
            slot.copy_from_slice(&word.to_le_bytes());
        }
        let measured = self.measured.iter().map(|target| (target, 0));
        let targets = measured.chain(self.slow.iter().map(|target| (target, 1)));
        for (slot, (target, slow)) in bytes[ORDER_PORTS..].chunks_exact_mut(8).zip(targets) {
            slot[..2].copy_from_slice(&target.port.to_le_bytes());
            slot[2] = target.operation as u8;
            slot[3] = slow;
        }
        bytes
    }

    /// How the boot processor enters the image where nobody reads its ELF note.
    pub fn entry() -> EntryPoint {
        EntryPoint::Flat32 {
            eip: LOAD_ADDRESS as u32,
        }
    }

    fn words_each(&self) -> usize {
        RESULT_HEAD / 4 + self.timed as usize
    }
}

/// What one measured vCPU found, in ticks of the time-stamp counter.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Found {
    /// When the accesses in a row began.
    pub begin: u64,
    /// When they were done.
    pub end: u64,
    /// How long each of the timed ones took.
    pub timed: Vec<u32>,
}

fn found(words: &[u32]) -> Found {
    let long = |low: usize| u64::from(words[low + 1]) << 32 | u64::from(words[low]);
    Found {
        begin: long(0),
        end: long(2),
        timed: words[RESULT_HEAD / 4..].to_vec(),
    }
}

/// What a guest that has ended left in its memory, one a measured vCPU.
///
/// # Errors
/// When the memory is smaller than [`MEMORY_BYTES`].
pub fn read_results(memory: &GuestMemoryMmap, order: &Order) -> Result<Vec<Found>, GuestMemoryError> {
    (0..order.measured.len())
        .map(|vcpu| {
            let mut bytes = vec![0; 4 * order.words_each()];
            memory.read_slice(&mut bytes, GuestAddress(RESULTS + (vcpu * RESULT_BYTES) as u64))?;
            let words: Vec<u32> = bytes
                .chunks_exact(4)
                .map(|word| u32::from_le_bytes([word[0], word[1], word[2], word[3]]))
                .collect();
            Ok(found(&words))
        })
        .collect()
}

/// Why what a guest printed is not a report.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
pub enum ReportError {
    /// Not all is there yet: more may come.
    #[error("the guest's report is not complete")]
    Incomplete,
    /// It is not what the guest was asked for, or was damaged on its way.
    #[error("the guest's report is damaged")]
    Damaged,
}

/// What a guest printed on its serial port, firmware's text around it or not.
///
/// # Errors
/// See [`ReportError`].
pub fn parse_report(text: &[u8], order: &Order) -> Result<Vec<Found>, ReportError> {
    let text = String::from_utf8_lossy(text);
    let (_, rest) = text.split_once(MARK).ok_or(ReportError::Incomplete)?;
    let (body, _) = rest.split_once(END_MARK).ok_or(ReportError::Incomplete)?;
    // A serial port that is a terminal somewhere may have broken lines.
    let digits: Vec<u8> = body.bytes().filter(|byte| !byte.is_ascii_whitespace()).collect();
    let words: Option<Vec<u32>> = digits
        .chunks(8)
        .map(|word| u32::from_str_radix(std::str::from_utf8(word).ok()?, 16).ok())
        .collect();
    let words = words.ok_or(ReportError::Damaged)?;
    let (sum, words) = words.split_last().ok_or(ReportError::Damaged)?;
    let expected = order.words_each() * order.measured.len();
    if words.len() != expected || words.iter().fold(0u32, |a, word| a.wrapping_add(*word)) != *sum {
        return Err(ReportError::Damaged);
    }
    Ok(words.chunks_exact(order.words_each()).map(found).collect())
}

/// [Xen: public/elfnote.h]
const XEN_ELFNOTE_PHYS32_ENTRY: u32 = 18;

/// The guest as an ELF file with a PVH note: one segment to be loaded, and the note.
pub fn elf(order: &Order) -> Vec<u8> {
    const EHDR: u64 = 64;
    const PHDR: u64 = 56;
    let image = order.image();
    let mut note = Vec::new();
    for word in [4u32, 8, XEN_ELFNOTE_PHYS32_ENTRY] {
        note.extend(word.to_le_bytes());
    }
    note.extend(b"Xen\0");
    note.extend(LOAD_ADDRESS.to_le_bytes());
    let note_at = EHDR + 2 * PHDR;
    // Congruent to its address modulo a page, as p_align says.
    let image_at = 0x1000u64;
    let mut file = Vec::new();
    // Class 64, little endian, version 1, System V [System V ABI, "ELF Header"].
    file.extend(b"\x7fELF\x02\x01\x01");
    file.resize(16, 0);
    // ET_EXEC, EM_X86_64.
    file.extend([2u16, 62].map(u16::to_le_bytes).concat());
    file.extend(1u32.to_le_bytes());
    // Entry, program headers, no sections.
    file.extend([LOAD_ADDRESS, EHDR, 0].map(u64::to_le_bytes).concat());
    file.extend(0u32.to_le_bytes());
    file.extend(
        [EHDR as u16, PHDR as u16, 2, 64, 0, 0]
            .map(u16::to_le_bytes)
            .concat(),
    );
    let mut header = |kind: u32, offset: u64, address: u64, size: u64, align: u64| {
        file.extend([kind, 7].map(u32::to_le_bytes).concat());
        let words = [offset, address, address, size, size, align];
        file.extend(words.map(u64::to_le_bytes).concat());
    };
    header(1, image_at, LOAD_ADDRESS, image.len() as u64, 0x1000);
    header(4, note_at, 0, note.len() as u64, 4);
    file.extend(note);
    file.resize(image_at as usize, 0);
    file.extend(image);
    file
}

#[cfg(test)]
mod tests {
    use super::*;

    fn order(measured: usize, timed: u32) -> Order {
        let target = Target {
            port: 0x3ff,
            operation: Operation::In8,
        };
        Order {
            measured: vec![target; measured],
            slow: None,
            in_a_row: 1,
            timed,
            pace: 0,
            print: true,
        }
    }

    fn print(words: &[u32]) -> String {
        let sum = words.iter().fold(0u32, |a, word| a.wrapping_add(*word));
        let digits: String = words
            .iter()
            .chain([&sum])
            .map(|word| format!("{word:08x}"))
            .collect();
        format!("firmware says hello\r\n{MARK}{digits}{END_MARK}")
    }

    #[test]
    fn a_report_is_read_back_and_a_damaged_one_refused() {
        let order = order(2, 1);
        let words = [1, 2, 3, 4, 0xffff_ffff, 5, 6, 7, 8, 9];
        let text = print(&words);
        let found = parse_report(text.as_bytes(), &order).unwrap();
        assert_eq!(
            found[0],
            Found {
                begin: 2 << 32 | 1,
                end: 4 << 32 | 3,
                timed: vec![u32::MAX]
            }
        );
        assert_eq!(
            (found[1].begin, found[1].timed.as_slice()),
            (6 << 32 | 5, &[9][..])
        );
        for end in 0..text.len() {
            assert_eq!(
                parse_report(&text.as_bytes()[..end], &order),
                Err(ReportError::Incomplete)
            );
        }
        let damaged = text.replace("ffffffff", "fffffffe");
        assert_eq!(
            parse_report(damaged.as_bytes(), &order),
            Err(ReportError::Damaged)
        );
        assert_eq!(
            parse_report(print(&words[..5]).as_bytes(), &order),
            Err(ReportError::Damaged)
        );
        assert_eq!(
            parse_report(format!("{MARK}xyz{END_MARK}").as_bytes(), &order),
            Err(ReportError::Damaged)
        );
        let broken = text.replace("00000003", "0000\r\n0003");
        assert!(parse_report(broken.as_bytes(), &order).is_ok());
    }

    #[test]
    fn the_order_is_where_the_guest_looks_for_it() {
        let mut order = order(1, 3);
        order.slow = Some(Target {
            port: 0xe9,
            operation: Operation::Out8,
        });
        let image = order.image();
        let word = |at: usize| u32::from_le_bytes(image[at..at + 4].try_into().unwrap());
        assert_eq!([8, 12, 16, 20, 24, 28].map(word), [2, 1, 1, 3, 0, 1]);
        assert_eq!(&image[32..36], [0xff, 0x03, 0, 0]);
        assert_eq!(&image[40..44], [0xe9, 0x00, 1, 1]);
        // Behind the ports comes the GDT, and the null descriptor is null.
        let gdt = ORDER_PORTS + 8 * MAX_VCPUS;
        assert_eq!(&image[gdt..gdt + 8], [0; 8]);
        assert_ne!(&image[gdt + 8..gdt + 16], [0; 8]);
    }

    #[test]
    fn our_own_loader_takes_the_file_and_finds_the_entry() {
        use crate::boot::{BootProtocol, Unpack, file::ImageFile, kernel};
        let path = std::env::temp_dir().join(format!("actor-vmm-meter-{}.elf", std::process::id()));
        std::fs::write(&path, elf(&order(1, 1))).unwrap();
        let memory = GuestMemoryMmap::<()>::from_ranges(&[(GuestAddress(0), 16 << 20)]).unwrap();
        let image = ImageFile::open(&path).unwrap();
        let loaded = kernel::load(&memory, &image, BootProtocol::Auto, Unpack::Auto).unwrap();
        std::fs::remove_file(&path).unwrap();
        assert!(
            matches!(loaded.entry, EntryPoint::Pvh { eip, .. } if u64::from(eip) == LOAD_ADDRESS),
            "{:?}",
            loaded.entry
        );
        let mut head = [0; 16];
        memory.read_slice(&mut head, GuestAddress(LOAD_ADDRESS)).unwrap();
        assert_eq!(head, meter_head());
    }

    fn meter_head() -> [u8; 16] {
        order(1, 1).image()[..16].try_into().unwrap()
    }
}
