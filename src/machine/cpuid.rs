//! What the guest's CPUID says: what KVM supports, with the topology and identity of each processor put in.
//!
//! A pure function from the entries of KVM_GET_SUPPORTED_CPUID, which describe the host's processor, its topology
//! included, to the entries of one vCPU. [SDM 2A CPUID; APM 3 appendix E; Linux: Documentation/virt/kvm/x86/cpuid.rst]

use kvm_bindings::{KVM_CPUID_FLAG_SIGNIFCANT_INDEX, kvm_cpuid_entry2};

/// How processors are arranged.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Topology {
    /// Packages.
    pub sockets: u32,
    /// Cores of a package.
    pub cores: u32,
    /// Threads of a core.
    pub threads: u32,
}

impl Topology {
    /// One package of `cpus` cores with one thread each.
    pub fn flat(cpus: u32) -> Topology {
        Topology {
            sockets: 1,
            cores: cpus.max(1),
            threads: 1,
        }
    }

    /// How many processors these are.
    pub fn cpus(&self) -> u32 {
        self.sockets * self.cores * self.threads
    }

    /// Logical processors of a package.
    fn per_package(&self) -> u32 {
        self.cores * self.threads
    }

    /// Bits of an APIC id that tell the threads of a core apart.
    fn thread_bits(&self) -> u32 {
        bits_for(self.threads)
    }

    /// Bits of an APIC id that tell the processors of a package apart.
    fn package_bits(&self) -> u32 {
        self.thread_bits() + bits_for(self.cores)
    }

    /// The APIC id of a processor: thread, core and package, each in its own bits. It is the vCPU's id for KVM and
    /// its id in the MADT too.
    pub fn apic_id(&self, index: u32) -> u32 {
        let thread = index % self.threads;
        let core = index / self.threads % self.cores;
        let package = index / self.per_package();
        package << self.package_bits() | core << self.thread_bits() | thread
    }

    /// The APIC ids of all processors.
    pub fn apic_ids(&self) -> Vec<u32> {
        (0..self.cpus()).map(|index| self.apic_id(index)).collect()
    }
}

/// Bits that number `count` things.
fn bits_for(count: u32) -> u32 {
    count.max(1).next_power_of_two().trailing_zeros()
}

/// What the host offers beside the entries.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Features {
    /// KVM_CAP_TSC_DEADLINE_TIMER, with the local APIC in the kernel. KVM leaves the bit to us.
    pub tsc_deadline: bool,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Vendor {
    Intel,
    /// Hygon too.
    Amd,
    Other,
}

// Leaf 1.
const ECX_X2APIC: u32 = 1 << 21;
const ECX_TSC_DEADLINE: u32 = 1 << 24;
const ECX_OSXSAVE: u32 = 1 << 27;
const ECX_HYPERVISOR: u32 = 1 << 31;
const EDX_HTT: u32 = 1 << 28;
// Leaf 0x80000001.
const ECX_CMP_LEGACY: u32 = 1 << 1;

const LEAF_TOPOLOGY: u32 = 0xb;
const LEAF_TOPOLOGY_V2: u32 = 0x1f;

fn vendor(entries: &[kvm_cpuid_entry2]) -> Vendor {
    let name = entries.iter().find(|entry| entry.function == 0).map(|leaf| {
        let mut name = [0; 12];
        for (bytes, register) in name.chunks_exact_mut(4).zip([leaf.ebx, leaf.edx, leaf.ecx]) {
            bytes.copy_from_slice(&register.to_le_bytes());
        }
        name
    });
    match name.as_ref() {
        Some(b"GenuineIntel") => Vendor::Intel,
        Some(b"AuthenticAMD" | b"HygonGenuine") => Vendor::Amd,
        _ => Vendor::Other,
    }
}

/// Replaces the low-aligned bits from `shift`, `width` of them. A value that is too large becomes all ones.
fn set_field(register: &mut u32, shift: u32, width: u32, value: u32) {
    let largest = (1u32 << width) - 1;
    *register = *register & !(largest << shift) | value.min(largest) << shift;
}

/// The entries of the processor with number `index`, for KVM_SET_CPUID2.
pub fn guest_entries(
    supported: &[kvm_cpuid_entry2],
    topology: &Topology,
    index: u32,
    features: &Features,
) -> Vec<kvm_cpuid_entry2> {
    let vendor = vendor(supported);
    let apic_id = topology.apic_id(index);
    let max_leaf = supported
        .iter()
        .find(|leaf| leaf.function == 0)
        .map_or(0, |leaf| leaf.eax);
    // Hosts that are old or emulated may not have the topology leaf. It needs nothing of the host.
    let max_leaf = max_leaf.max(LEAF_TOPOLOGY);
    let replaced = [LEAF_TOPOLOGY, LEAF_TOPOLOGY_V2, 0x8000_0026];

    let mut entries: Vec<_> = supported
        .iter()
        .filter(|entry| !replaced.contains(&entry.function))
        .copied()
        .collect();
    for entry in &mut entries {
        match entry.function {
            0 => entry.eax = max_leaf,
            1 => leaf_1(entry, topology, apic_id, features),
            4 if vendor != Vendor::Amd => leaf_4(entry, topology),
            // No performance counters: with what a host has of them, machines would differ.
            0xa => clear(entry),
            // The ratio of the host's TSC to its crystal would give a guest a wrong speed of its APIC timer, which counts
            // nanoseconds. No true ratio is stated: Linux multiplies it in 32 bits, too few for such a crystal, and
            // guests of KVM have the TSC's frequency from the KVM clock (leaf 0x40000001) anyway.
            0x15 => clear(entry),
            0x8000_0001 if vendor == Vendor::Amd => {
                set_field(
                    &mut entry.ecx,
                    ECX_CMP_LEGACY.trailing_zeros(),
                    1,
                    (topology.per_package() > 1).into(),
                );
            }
            0x8000_0008 if vendor == Vendor::Amd => {
                set_field(&mut entry.ecx, 0, 8, topology.per_package() - 1);
                set_field(&mut entry.ecx, 12, 4, topology.package_bits());
            }
            0x8000_001d if vendor == Vendor::Amd => {
                leaf_8000_001d(entry, topology);
            }
            0x8000_001e if vendor == Vendor::Amd => leaf_8000_001e(entry, topology, apic_id),
            _ => {}
        }
    }
    entries.extend(topology_entries(LEAF_TOPOLOGY, topology, apic_id));
    if max_leaf >= LEAF_TOPOLOGY_V2 {
        entries.extend(topology_entries(LEAF_TOPOLOGY_V2, topology, apic_id));
    }
    entries
}

fn clear(entry: &mut kvm_cpuid_entry2) {
    (entry.eax, entry.ebx, entry.ecx, entry.edx) = (0, 0, 0, 0);
}

fn leaf_1(entry: &mut kvm_cpuid_entry2, topology: &Topology, apic_id: u32, features: &Features) {
    set_field(&mut entry.ebx, 24, 8, apic_id & 0xff);
    set_field(&mut entry.ebx, 16, 8, topology.per_package());
    set_field(
        &mut entry.edx,
        EDX_HTT.trailing_zeros(),
        1,
        (topology.per_package() > 1).into(),
    );
    entry.ecx |= ECX_HYPERVISOR | ECX_X2APIC;
    // KVM sets it when the guest sets CR4.OSXSAVE.
    entry.ecx &= !ECX_OSXSAVE;
    set_field(
        &mut entry.ecx,
        ECX_TSC_DEADLINE.trailing_zeros(),
        1,
        features.tsc_deadline.into(),
    );
}

/// Intel: each subleaf is a cache.
fn leaf_4(entry: &mut kvm_cpuid_entry2, topology: &Topology) {
    let (kind, level) = (entry.eax & 0x1f, entry.eax >> 5 & 7);
    if kind == 0 {
        return;
    }
    // Addressable ids, which is to say whole bits.
    let sharing = if level >= 3 {
        topology.package_bits()
    } else {
        topology.thread_bits()
    };
    set_field(&mut entry.eax, 14, 12, (1 << sharing) - 1);
    set_field(&mut entry.eax, 26, 6, (1 << bits_for(topology.cores)) - 1);
}

/// AMD's of the same; TOPOEXT in leaf 0x80000001 says that it is there.
fn leaf_8000_001d(entry: &mut kvm_cpuid_entry2, topology: &Topology) {
    let (kind, level) = (entry.eax & 0x1f, entry.eax >> 5 & 7);
    if kind != 0 {
        let sharing = if level >= 3 {
            topology.per_package()
        } else {
            topology.threads
        };
        set_field(&mut entry.eax, 14, 12, sharing - 1);
    }
}

/// AMD: extended APIC id, core and node. A package is a node.
fn leaf_8000_001e(entry: &mut kvm_cpuid_entry2, topology: &Topology, apic_id: u32) {
    entry.eax = apic_id;
    entry.ebx = 0;
    set_field(
        &mut entry.ebx,
        0,
        8,
        apic_id >> topology.thread_bits() & ((1 << bits_for(topology.cores)) - 1),
    );
    set_field(&mut entry.ebx, 8, 8, topology.threads - 1);
    entry.ecx = 0;
    set_field(&mut entry.ecx, 0, 8, apic_id >> topology.package_bits());
    entry.edx = 0;
}

/// Threads, cores, and the end of the list.
fn topology_entries(function: u32, topology: &Topology, apic_id: u32) -> [kvm_cpuid_entry2; 3] {
    const LEVEL_THREAD: u32 = 1;
    const LEVEL_CORE: u32 = 2;
    let levels = [
        (topology.thread_bits(), topology.threads, LEVEL_THREAD),
        (topology.package_bits(), topology.per_package(), LEVEL_CORE),
        (0, 0, 0),
    ];
    let mut index = 0;
    levels.map(|(shift, count, level)| {
        let entry = kvm_cpuid_entry2 {
            function,
            index,
            flags: KVM_CPUID_FLAG_SIGNIFCANT_INDEX,
            eax: shift,
            ebx: count,
            ecx: level << 8 | index,
            edx: apic_id,
            ..Default::default()
        };
        index += 1;
        entry
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Leaf 0x80000001: leaves 0x8000001d and 0x8000001e are there.
    const ECX_TOPOEXT: u32 = 1 << 22;

    fn leaf(function: u32, index: u32, registers: [u32; 4]) -> kvm_cpuid_entry2 {
        let [eax, ebx, ecx, edx] = registers;
        kvm_cpuid_entry2 {
            function,
            index,
            eax,
            ebx,
            ecx,
            edx,
            ..Default::default()
        }
    }

    fn vendor_leaf(name: &[u8; 12], max: u32) -> kvm_cpuid_entry2 {
        let word = |at: usize| u32::from_le_bytes(name[at..at + 4].try_into().unwrap());
        leaf(0, 0, [max, word(0), word(8), word(4)])
    }

    /// A host with 8 cores of 2 threads, of which the guest must see nothing.
    fn intel() -> Vec<kvm_cpuid_entry2> {
        vec![
            vendor_leaf(b"GenuineIntel", 0x20),
            leaf(1, 0, [0x906ea, 0x0710_0800, 1 << 27 | 1, 1 << 28 | 1 << 9]),
            leaf(4, 0, [0x1c00_4121, 0x01c0_003f, 63, 0]),
            leaf(4, 2, [0x1c00_4143, 0x00c0_003f, 1023, 0]),
            leaf(4, 3, [0x1c03_c163, 0x03c0_003f, 0x2fff, 6]),
            leaf(4, 4, [0; 4]),
            leaf(0xa, 0, [0x0730_0404, 0, 0, 0x603]),
            leaf(0xb, 0, [1, 2, 0x100, 7]),
            leaf(0xb, 1, [4, 16, 0x201, 7]),
            leaf(0x15, 0, [2, 216, 0, 0]),
            leaf(0x1f, 0, [1, 2, 0x100, 7]),
            leaf(0x4000_0000, 0, [0x4000_0001, 0x4b4d_564b, 0x564b_4d56, 0x4d]),
            leaf(0x4000_0001, 0, [0x0100_7efb, 0, 0, 0]),
            leaf(0x8000_0008, 0, [0x3027, 0, 0, 0]),
        ]
    }

    fn amd() -> Vec<kvm_cpuid_entry2> {
        vec![
            vendor_leaf(b"AuthenticAMD", 0xd),
            leaf(1, 0, [0x00a2_0f10, 0x0b10_0800, 1, 1 << 28]),
            leaf(0x8000_0001, 0, [0, 0, ECX_TOPOEXT, 0]),
            leaf(0x8000_0008, 0, [0x3030, 0, 0x500f, 0]),
            leaf(0x8000_001d, 0, [0x0000_4121, 0x01c0_003f, 63, 0]),
            leaf(0x8000_001d, 3, [0x0003_c163, 0x03c0_003f, 0x7fff, 1]),
            leaf(0x8000_001e, 0, [11, 0x105, 0, 0]),
            leaf(0x8000_0026, 0, [1, 2, 0x100, 7]),
        ]
    }

    fn guest(host: &[kvm_cpuid_entry2], topology: Topology, index: u32) -> Vec<kvm_cpuid_entry2> {
        guest_entries(host, &topology, index, &Features::default())
    }

    fn find(entries: &[kvm_cpuid_entry2], function: u32, index: u32) -> kvm_cpuid_entry2 {
        let mut found = entries
            .iter()
            .filter(|e| e.function == function && e.index == index);
        let entry = *found
            .next()
            .unwrap_or_else(|| panic!("no leaf {function:#x}.{index}"));
        assert!(found.next().is_none(), "two of leaf {function:#x}.{index}");
        entry
    }

    fn field(register: u32, shift: u32, width: u32) -> u32 {
        register >> shift & ((1 << width) - 1)
    }

    #[test]
    fn each_processor_knows_itself_and_the_hypervisor() {
        for index in 0..64 {
            let entries = guest(&intel(), Topology::flat(64), index);
            let one = find(&entries, 1, 0);
            assert_eq!(
                (field(one.ebx, 24, 8), field(one.ebx, 16, 8), field(one.ebx, 8, 8)),
                (index, 64, 8)
            );
            assert_eq!(one.ecx & ECX_HYPERVISOR, ECX_HYPERVISOR);
            assert_eq!(one.ecx & ECX_X2APIC, ECX_X2APIC);
            assert_eq!(one.ecx & ECX_OSXSAVE, 0);
            assert_eq!(one.edx & (EDX_HTT | 1 << 9), EDX_HTT | 1 << 9);
            for function in [0xb, 0x1f] {
                let thread = find(&entries, function, 0);
                assert_eq!(
                    (thread.eax, thread.ebx, thread.ecx, thread.edx),
                    (0, 1, 0x100, index)
                );
                let core = find(&entries, function, 1);
                assert_eq!((core.eax, core.ebx, core.ecx, core.edx), (6, 64, 0x201, index));
                let end = find(&entries, function, 2);
                assert_eq!((end.eax, end.ebx, end.ecx, end.edx), (0, 0, 2, index));
                assert_eq!(end.flags, KVM_CPUID_FLAG_SIGNIFCANT_INDEX);
            }
        }
    }

    #[test]
    fn one_processor_is_alone() {
        let one = find(&guest(&intel(), Topology::flat(1), 0), 1, 0);
        assert_eq!((field(one.ebx, 16, 8), one.edx & EDX_HTT), (1, 0));
        let entries = guest(&amd(), Topology::flat(1), 0);
        assert_eq!(find(&entries, 0x8000_0008, 0).ecx, 0);
        assert_eq!(find(&entries, 0x8000_0001, 0).ecx & ECX_CMP_LEGACY, 0);
        assert_ne!(
            find(&entries, 0x8000_0001, 0).ecx & ECX_TOPOEXT,
            0,
            "what the host has stays"
        );
    }

    #[test]
    fn intel_caches_are_shared_as_the_topology_has_it() {
        let entries = guest(&intel(), Topology::flat(6), 0);
        let sharing = |index| {
            let eax = find(&entries, 4, index).eax;
            (field(eax, 14, 12), field(eax, 26, 6), eax & 0x3fff)
        };
        assert_eq!(sharing(0), (0, 7, 0x121));
        assert_eq!(sharing(2), (0, 7, 0x143));
        assert_eq!(sharing(3), (7, 7, 0x163));
        assert_eq!(find(&entries, 4, 4).eax, 0);
        let smt = guest(
            &intel(),
            Topology {
                sockets: 1,
                cores: 2,
                threads: 2,
            },
            3,
        );
        assert_eq!(field(find(&smt, 4, 0).eax, 14, 12), 1);
        assert_eq!(field(find(&smt, 4, 3).eax, 14, 12), 3);
    }

    #[test]
    fn amd_counts_and_ids_agree() {
        for (cores, bits) in [(2, 1), (3, 2), (4, 2), (6, 3), (64, 6)] {
            for index in 0..cores {
                let entries = guest(&amd(), Topology::flat(cores), index);
                let size = find(&entries, 0x8000_0008, 0);
                assert_eq!((field(size.ecx, 0, 8), field(size.ecx, 12, 4)), (cores - 1, bits));
                assert_eq!(size.eax, 0x3030, "address sizes stay");
                let core = find(&entries, 0x8000_001e, 0);
                assert_eq!((core.eax, core.ebx, core.ecx), (index, index, 0));
                assert_eq!(field(find(&entries, 0x8000_001d, 0).eax, 14, 12), 0);
                assert_eq!(field(find(&entries, 0x8000_001d, 3).eax, 14, 12), cores - 1);
                assert_ne!(find(&entries, 0x8000_0001, 0).ecx & ECX_CMP_LEGACY, 0);
                assert_eq!(find(&entries, 0xb, 1).eax, bits);
                assert!(
                    !entries
                        .iter()
                        .any(|entry| [0x1f, 0x8000_0026].contains(&entry.function))
                );
            }
        }
    }

    #[test]
    fn apic_ids_are_bit_fields() {
        let topology = Topology {
            sockets: 2,
            cores: 3,
            threads: 2,
        };
        assert_eq!(topology.apic_ids(), [0, 1, 2, 3, 4, 5, 8, 9, 10, 11, 12, 13]);
        assert_eq!(Topology::flat(5).apic_ids(), [0, 1, 2, 3, 4]);
        let entries = guest(&amd(), topology, 9);
        let core = find(&entries, 0x8000_001e, 0);
        assert_eq!(
            (core.eax, field(core.ebx, 0, 8), field(core.ebx, 8, 8), core.ecx),
            (11, 1, 1, 1)
        );
    }

    #[test]
    fn more_than_255_processors_use_x2apic_ids() {
        let entries = guest(&amd(), Topology::flat(300), 299);
        assert_eq!(find(&entries, 0xb, 0).edx, 299);
        assert_eq!(field(find(&entries, 1, 0).ebx, 24, 8), 299 & 0xff);
        assert_eq!(field(find(&entries, 1, 0).ebx, 16, 8), 0xff);
    }

    #[test]
    fn kvm_leaves_stay_counters_go_and_the_maximum_reaches_the_topology() {
        let entries = guest(&intel(), Topology::flat(2), 0);
        assert_eq!(find(&entries, 0x4000_0000, 0), find(&intel(), 0x4000_0000, 0));
        assert_eq!(find(&entries, 0x4000_0001, 0), find(&intel(), 0x4000_0001, 0));
        assert_eq!(find(&entries, 0xa, 0), leaf(0xa, 0, [0; 4]));
        assert_eq!(find(&entries, 0, 0).eax, 0x20);
        let old = [vendor_leaf(b"AuthenticAMD", 1)];
        assert_eq!(find(&guest(&old, Topology::flat(2), 1), 0, 0).eax, 0xb);
    }

    #[test]
    fn the_deadline_timer_is_stated_when_the_host_has_it_and_a_crystal_never() {
        let features = Features { tsc_deadline: true };
        let entries = guest_entries(&intel(), &Topology::flat(1), 0, &features);
        assert_ne!(find(&entries, 1, 0).ecx & ECX_TSC_DEADLINE, 0);
        assert_eq!(find(&entries, 0x15, 0), leaf(0x15, 0, [0; 4]));
        let without = guest(&intel(), Topology::flat(1), 0);
        assert_eq!(find(&without, 1, 0).ecx & ECX_TSC_DEADLINE, 0);
    }
}
