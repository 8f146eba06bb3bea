//! The state in which the boot processor enters a kernel: registers, and the tables in guest memory behind them.
//!
//! [Linux: Documentation/arch/x86/boot.rst, "64-bit BOOT PROTOCOL"; Xen: docs/misc/pvh.pandoc, "PVH Guest Boot"]

use kvm_bindings::{kvm_dtable, kvm_regs, kvm_segment, kvm_sregs};
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryError};

use super::layout;

/// Where and how the boot processor starts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum EntryPoint {
    /// The 64-bit Linux boot protocol: long mode, 4 GiB mapped to themselves, RSI has the zero page.
    Linux64 {
        /// Where.
        rip: u64,
        /// Address of the zero page.
        zero_page: u64,
    },
    /// PVH: protected mode without paging, EBX has the `hvm_start_info`.
    Pvh {
        /// Where.
        eip: u32,
        /// Address of the start info.
        start_info: u32,
    },
    /// Protected mode without paging, flat segments: for bare-metal guests.
    Flat32 {
        /// Where.
        eip: u32,
    },
    /// Long mode as for Linux, with nothing in RSI: for bare-metal guests.
    Flat64 {
        /// Where.
        rip: u64,
    },
    /// Real mode: for bare-metal guests. Data segments start at 0.
    RealMode {
        /// Code segment.
        cs: u16,
        /// Where in it.
        ip: u16,
    },
}

/// [boot.rst: __BOOT_CS and __BOOT_DS]
const CODE_SELECTOR: u16 = 0x10;
const DATA_SELECTOR: u16 = 0x18;
const TSS_SELECTOR: u16 = 0x20;

const CR0_PE: u64 = 1 << 0;
const CR0_ET: u64 = 1 << 4;
const CR0_PG: u64 = 1 << 31;
const CR4_PAE: u64 = 1 << 5;
const EFER_LME: u64 = 1 << 8;
const EFER_LMA: u64 = 1 << 10;
/// Bit 1 is always set.
const RFLAGS: u64 = 1 << 1;

const ENTRY_PRESENT_WRITABLE: u64 = 0b11;
const ENTRY_HUGE: u64 = 1 << 7;
const TABLE_BYTES: u64 = 4096;
const TABLE_ENTRIES: u64 = 512;

#[derive(Clone, Copy, PartialEq, Eq)]
enum Mode {
    Real,
    Protected,
    Long,
}

impl EntryPoint {
    fn mode(&self) -> Mode {
        match self {
            EntryPoint::RealMode { .. } => Mode::Real,
            EntryPoint::Pvh { .. } | EntryPoint::Flat32 { .. } => Mode::Protected,
            EntryPoint::Linux64 { .. } | EntryPoint::Flat64 { .. } => Mode::Long,
        }
    }

    /// The address of the first instruction.
    pub fn address(&self) -> u64 {
        match *self {
            EntryPoint::Linux64 { rip, .. } | EntryPoint::Flat64 { rip } => rip,
            EntryPoint::Pvh { eip, .. } | EntryPoint::Flat32 { eip } => u64::from(eip),
            EntryPoint::RealMode { cs, ip } => (u64::from(cs) << 4) + u64::from(ip),
        }
    }
}

fn code_segment(long: bool) -> kvm_segment {
    kvm_segment {
        base: 0,
        limit: u32::MAX,
        selector: CODE_SELECTOR,
        type_: 0xb, // execute, read, accessed
        present: 1,
        db: u8::from(!long),
        s: 1,
        l: u8::from(long),
        g: 1,
        ..Default::default()
    }
}

fn data_segment() -> kvm_segment {
    kvm_segment {
        limit: u32::MAX,
        selector: DATA_SELECTOR,
        type_: 0x3, // read, write, accessed
        present: 1,
        db: 1,
        s: 1,
        g: 1,
        ..Default::default()
    }
}

/// VMX wants a busy TSS of the mode's width [SDM 3C §27.3.1.2].
fn task_segment() -> kvm_segment {
    kvm_segment {
        limit: 0x67,
        selector: TSS_SELECTOR,
        type_: 0xb,
        present: 1,
        ..Default::default()
    }
}

fn real_segment(selector: u16, code: bool) -> kvm_segment {
    kvm_segment {
        base: u64::from(selector) << 4,
        limit: 0xffff,
        selector,
        type_: if code { 0xb } else { 0x3 },
        present: 1,
        s: 1,
        ..Default::default()
    }
}

/// A segment as the GDT has it [SDM 3A §3.4.5].
fn descriptor(segment: &kvm_segment) -> u64 {
    let limit = u64::from(if segment.g == 1 {
        segment.limit >> 12
    } else {
        segment.limit
    });
    let access = u64::from(segment.type_)
        | u64::from(segment.s) << 4
        | u64::from(segment.dpl) << 5
        | u64::from(segment.present) << 7;
    let flags = u64::from(segment.avl)
        | u64::from(segment.l) << 1
        | u64::from(segment.db) << 2
        | u64::from(segment.g) << 3;
    limit & 0xffff
        | (segment.base & 0xff_ffff) << 16
        | access << 40
        | (limit >> 16 & 0xf) << 48
        | flags << 52
        | (segment.base >> 24 & 0xff) << 56
}

/// The GDT of an entry: two empty slots, code, data, and a TSS, which has two slots in long mode.
fn gdt(long: bool) -> [u64; 6] {
    [
        0,
        0,
        descriptor(&code_segment(long)),
        descriptor(&data_segment()),
        descriptor(&task_segment()),
        0,
    ]
}

/// Writes what the entry needs in guest memory: its GDT, and for long mode the page tables.
pub fn write_tables<M: GuestMemoryBackend>(memory: &M, entry: &EntryPoint) -> Result<(), GuestMemoryError> {
    if entry.mode() == Mode::Real {
        return Ok(());
    }
    let long = entry.mode() == Mode::Long;
    for (index, descriptor) in gdt(long).into_iter().enumerate() {
        memory.write_obj(descriptor, GuestAddress(layout::GDT + 8 * index as u64))?;
    }
    if !long {
        return Ok(());
    }
    memory.write_obj(layout::PDPT | ENTRY_PRESENT_WRITABLE, GuestAddress(layout::PML4))?;
    for gib in 0..4u64 {
        let directory = layout::PAGE_DIRECTORIES + gib * TABLE_BYTES;
        memory.write_obj(
            directory | ENTRY_PRESENT_WRITABLE,
            GuestAddress(layout::PDPT + 8 * gib),
        )?;
        let mut table = [0u8; TABLE_BYTES as usize];
        for (index, entry) in (0..TABLE_ENTRIES).zip(table.chunks_exact_mut(8)) {
            let page = (gib << 30) + (index << 21);
            entry.copy_from_slice(&(page | ENTRY_HUGE | ENTRY_PRESENT_WRITABLE).to_le_bytes());
        }
        memory.write_slice(&table, GuestAddress(directory))?;
    }
    Ok(())
}

/// The registers of the boot processor: `base` is what KVM gives a new vCPU, and what an entry does not prescribe
/// stays as it is there.
pub fn apply(entry: &EntryPoint, base: kvm_sregs) -> (kvm_regs, kvm_sregs) {
    let mut regs = kvm_regs {
        rip: entry.address(),
        rflags: RFLAGS,
        ..Default::default()
    };
    let mut sregs = base;
    let long = entry.mode() == Mode::Long;
    match *entry {
        EntryPoint::RealMode { cs, ip } => {
            regs.rip = u64::from(ip);
            sregs.cs = real_segment(cs, true);
            let data = real_segment(0, false);
            for segment in data_segments(&mut sregs) {
                *segment = data;
            }
            sregs.cr0 = CR0_ET;
            return (regs, sregs);
        }
        EntryPoint::Linux64 { zero_page, .. } => regs.rsi = zero_page,
        EntryPoint::Pvh { start_info, .. } => regs.rbx = u64::from(start_info),
        EntryPoint::Flat32 { .. } | EntryPoint::Flat64 { .. } => {}
    }
    regs.rsp = layout::BOOT_STACK;
    regs.rbp = layout::BOOT_STACK;
    sregs.cs = code_segment(long);
    for segment in data_segments(&mut sregs) {
        *segment = data_segment();
    }
    sregs.tr = task_segment();
    sregs.gdt = kvm_dtable {
        base: layout::GDT,
        limit: (size_of_val(&gdt(long)) - 1) as u16,
        ..Default::default()
    };
    // No interrupt table: interrupts are off, and an exception is a triple fault.
    sregs.idt = kvm_dtable::default();
    (sregs.cr0, sregs.cr3, sregs.cr4, sregs.efer) = if long {
        (
            CR0_PE | CR0_ET | CR0_PG,
            layout::PML4,
            CR4_PAE,
            EFER_LME | EFER_LMA,
        )
    } else {
        (CR0_PE | CR0_ET, 0, 0, 0)
    };
    (regs, sregs)
}

fn data_segments(sregs: &mut kvm_sregs) -> [&mut kvm_segment; 5] {
    [
        &mut sregs.ds,
        &mut sregs.es,
        &mut sregs.fs,
        &mut sregs.gs,
        &mut sregs.ss,
    ]
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::gdb::walk::Paging;
    use vm_memory::GuestMemoryMmap;

    fn memory_for(entry: &EntryPoint) -> GuestMemoryMmap {
        let memory = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 1 << 20)]).unwrap();
        write_tables(&memory, entry).unwrap();
        memory
    }

    /// As the processor walks, by the control registers that it starts with.
    fn walk(memory: &GuestMemoryMmap, sregs: &kvm_sregs, address: u64) -> Option<u64> {
        let paging = Paging::of(sregs.cr0, sregs.cr3, sregs.cr4, sregs.efer);
        Some(paging.translate(memory, address)?.physical)
    }

    #[test]
    fn linux_is_entered_in_long_mode_with_4_gib_mapped_to_themselves() {
        let entry = EntryPoint::Linux64 {
            rip: 0x100_0200,
            zero_page: layout::ZERO_PAGE,
        };
        let memory = memory_for(&entry);
        let (regs, sregs) = apply(
            &entry,
            kvm_sregs {
                apic_base: 0xfee0_0900,
                ..Default::default()
            },
        );
        assert_eq!(
            (regs.rip, regs.rsi, regs.rflags),
            (0x100_0200, layout::ZERO_PAGE, 2)
        );
        assert_eq!((sregs.cs.selector, sregs.ds.selector), (0x10, 0x18));
        assert_eq!((sregs.cs.l, sregs.cs.db), (1, 0));
        assert_eq!(sregs.cr0 & (CR0_PE | CR0_PG), CR0_PE | CR0_PG);
        assert_eq!(
            sregs.apic_base, 0xfee0_0900,
            "what the entry does not prescribe stays"
        );
        for address in [0, 0x1234, 0x20_0000, 0x3fff_ffff, 0xc000_0000, 0xffff_ffff] {
            assert_eq!(walk(&memory, &sregs, address), Some(address), "{address:#x}");
        }
        assert_eq!(walk(&memory, &sregs, 1 << 32), None);
        // A kernel that reloads its segments gets the same.
        let code: u64 = memory.read_obj(GuestAddress(layout::GDT + 0x10)).unwrap();
        let data: u64 = memory.read_obj(GuestAddress(layout::GDT + 0x18)).unwrap();
        assert_eq!((code, data), (0x00af_9b00_0000_ffff, 0x00cf_9300_0000_ffff));
    }

    #[test]
    fn pvh_is_entered_flat_and_unpaged() {
        let entry = EntryPoint::Pvh {
            eip: 0x100_0400,
            start_info: layout::PVH_START_INFO as u32,
        };
        let memory = memory_for(&entry);
        let (regs, sregs) = apply(
            &entry,
            kvm_sregs {
                cr3: 1,
                efer: 0x500,
                ..Default::default()
            },
        );
        assert_eq!((regs.rip, regs.rbx), (0x100_0400, layout::PVH_START_INFO));
        assert_eq!(
            (sregs.cr0 & (CR0_PE | CR0_PG), sregs.cr4, sregs.efer),
            (CR0_PE, 0, 0)
        );
        assert_eq!(
            (sregs.cs.base, sregs.cs.limit, sregs.cs.db, sregs.cs.l),
            (0, u32::MAX, 1, 0)
        );
        let code: u64 = memory.read_obj(GuestAddress(layout::GDT + 0x10)).unwrap();
        assert_eq!(code, 0x00cf_9b00_0000_ffff);
        assert_eq!(memory.read_obj::<u64>(GuestAddress(layout::PML4)).unwrap(), 0);
    }

    #[test]
    fn real_mode_starts_at_segment_and_offset() {
        let entry = EntryPoint::RealMode { cs: 0x1000, ip: 0x20 };
        let (regs, sregs) = apply(&entry, kvm_sregs::default());
        assert_eq!(
            (regs.rip, sregs.cs.base, sregs.cs.selector),
            (0x20, 0x1_0000, 0x1000)
        );
        assert_eq!(
            (sregs.ds.base, sregs.ds.limit, sregs.cr0 & CR0_PE),
            (0, 0xffff, 0)
        );
        assert_eq!(entry.address(), 0x1_0020);
    }

    #[test]
    fn tables_stay_in_their_places() {
        const { assert!(layout::GDT + 48 <= layout::PVH_START_INFO) };
        const { assert!(layout::PAGE_DIRECTORIES + 4 * TABLE_BYTES <= layout::CMDLINE) };
        const { assert!(layout::CMDLINE + layout::CMDLINE_CAPACITY as u64 <= layout::LOW_RAM_END) };
        const { assert!(layout::BOOT_STACK < layout::PML4 && layout::BOOT_STACK > layout::ZERO_PAGE + 4096) };
    }
}
