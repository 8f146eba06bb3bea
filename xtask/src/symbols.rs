//! Names for a kernel that has none in its file: an ELF file with nothing in it but the symbols of a list as
//! `/proc/kallsyms` has it, for gdb.
//!
//! Debian's kernels are installed without symbols, but every running one has those of its own functions. What gdb knows by
//! such a file is which address belongs to which function: it can break by name, and name the places of a backtrace. It
//! knows no lines, no types and no variables.

use anyhow::{Context, Result, ensure};
use object::elf;
use object::write::elf::{FileHeader, SectionHeader, Sym, Writer};

/// A function of the list.
struct Function<'a> {
    address: u64,
    /// Whether only its own file can name it.
    local: bool,
    name: &'a str,
}

/// The ELF file for a list with lines `address kind name`, of which those with a kind of `t` or `T` count: functions. Those
/// of modules (`name [module]`) are left out, since modules come and go.
///
/// # Errors
/// A line that is none, a list without functions, and one whose addresses are hidden (`kptr_restrict`).
pub fn elf(list: &str) -> Result<Vec<u8>> {
    let mut functions = Vec::new();
    for (number, line) in list.lines().enumerate() {
        let words: Vec<&str> = line.split_ascii_whitespace().collect();
        let (&[address, kind, name] | &[address, kind, name, _]) = words.as_slice() else {
            ensure!(
                words.is_empty(),
                "line {}: not an address, a kind and a name",
                number + 1
            );
            continue;
        };
        let address = u64::from_str_radix(address, 16)
            .with_context(|| format!("line {}: '{address}' is not an address", number + 1))?;
        if words.len() == 3 && kind.eq_ignore_ascii_case("t") {
            let local = kind == "t";
            functions.push(Function { address, local, name });
        }
    }
    ensure!(!functions.is_empty(), "there is no function in the list");
    ensure!(
        functions.iter().any(|function| function.address != 0),
        "all addresses are 0: the list has to be read as root, with kernel.kptr_restrict at most 1"
    );
    functions.sort_by_key(|function| function.address);
    Ok(write(&functions))
}

/// `functions` are in order of their addresses.
fn write(functions: &[Function]) -> Vec<u8> {
    let first = functions[0].address;
    let last = functions[functions.len() - 1].address;
    // A function ends where the next one with another address begins.
    let ends = |at: usize| {
        let later = functions[at..].iter().map(|function| function.address);
        later
            .take(64)
            .find(|address| *address > functions[at].address)
            .unwrap_or(functions[at].address + 16)
    };
    let mut bytes = Vec::new();
    let mut file = Writer::new(object::Endianness::Little, true, &mut bytes);
    // First every part gets its place, then all are written in the same order.
    file.reserve_file_header();
    let text_name = file.add_section_name(b".text");
    let text = file.reserve_section_index();
    file.reserve_null_symbol_index();
    // Local symbols come first. [ELF: sh_info of SHT_SYMTAB]
    let in_order = || {
        let of = |local| (0..functions.len()).filter(move |at| functions[*at].local == local);
        of(true).chain(of(false))
    };
    let mut names = Vec::with_capacity(functions.len());
    for at in in_order() {
        file.reserve_symbol_index(Some(text));
        names.push(file.add_string(functions[at].name.as_bytes()));
    }
    file.reserve_symtab_section_index();
    file.reserve_symtab();
    file.reserve_strtab_section_index();
    file.reserve_strtab();
    file.reserve_shstrtab_section_index();
    file.reserve_shstrtab();
    file.reserve_section_headers();

    file.write_file_header(&FileHeader {
        os_abi: elf::ELFOSABI_NONE,
        abi_version: 0,
        e_type: elf::ET_EXEC,
        e_machine: elf::EM_X86_64,
        e_entry: first,
        e_flags: 0,
    })
    .expect("the vector has room");
    file.write_null_symbol();
    for (at, name) in in_order().zip(names) {
        let function = &functions[at];
        let binding = if function.local {
            elf::STB_LOCAL
        } else {
            elf::STB_GLOBAL
        };
        file.write_symbol(&Sym {
            name: Some(name),
            section: Some(text),
            st_info: binding << 4 | elf::STT_FUNC,
            st_other: elf::STV_DEFAULT,
            st_shndx: 0,
            st_value: function.address,
            st_size: ends(at) - function.address,
        });
    }
    file.write_strtab();
    file.write_shstrtab();
    file.write_null_section_header();
    // Its content is the guest's memory.
    file.write_section_header(&SectionHeader {
        name: Some(text_name),
        sh_type: elf::SHT_NOBITS,
        sh_flags: u64::from(elf::SHF_ALLOC | elf::SHF_EXECINSTR),
        sh_addr: first,
        sh_offset: 0,
        sh_size: last - first + 16,
        sh_link: 0,
        sh_info: 0,
        sh_addralign: 16,
        sh_entsize: 0,
    });
    let local = functions.iter().filter(|function| function.local).count();
    file.write_symtab_section_header(1 + local as u32);
    file.write_strtab_section_header();
    file.write_shstrtab_section_header();
    bytes
}

#[cfg(test)]
mod tests {
    use super::*;
    use object::{Object, ObjectSymbol};

    #[test]
    fn functions_come_out_as_they_go_in() {
        let list = "0000000000000000 A fixed\n\
            ffffffff81000000 T _stext\n\
            ffffffff81000000 T startup_64\n\
            ffffffff81000040 t helper\n\
            ffffffff82000000 D data\n\
            ffffffffc0000000 t of_a_module\t[ext4]\n\
            ffffffff81000020 T middle\n\n";
        let bytes = elf(list).unwrap();
        let file = object::File::parse(&*bytes).unwrap();
        let mut found: Vec<_> = file
            .symbols()
            .filter(|symbol| symbol.is_definition())
            .map(|symbol| {
                (
                    symbol.name().unwrap(),
                    symbol.address(),
                    symbol.size(),
                    symbol.is_local(),
                )
            })
            .collect();
        found.sort();
        const BASE: u64 = 0xffff_ffff_8100_0000;
        assert_eq!(
            found,
            [
                ("_stext", BASE, 0x20, false),
                ("helper", BASE + 0x40, 16, true),
                ("middle", BASE + 0x20, 0x20, false),
                ("startup_64", BASE, 0x20, false),
            ]
        );
    }

    #[test]
    fn what_is_no_list_is_told() {
        for (list, said) in [
            ("", "no function"),
            ("ffffffff81000000 D data\n", "no function"),
            ("ffffffff81000000 T\n", "line 1: not an address"),
            ("\nxyz T name\n", "line 2: 'xyz' is not an address"),
            ("0000000000000000 T _stext\n", "all addresses are 0"),
        ] {
            let error = elf(list).unwrap_err();
            assert!(error.to_string().contains(said), "{error}");
        }
    }
}
