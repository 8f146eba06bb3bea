//! From files to guest memory: kernels, boot parameters, memory map, ACPI tables.
//!
//! [`load`] does all of it and says where the boot processor starts. What it needs is guest memory that nobody has
//! touched; it needs no KVM.

use std::path::{Path, PathBuf};

use vm_memory::{GuestMemoryBackend, GuestMemoryError};

pub mod acpi;
pub mod bzimage;
pub mod cmdline;
pub mod elf;
pub mod entry;
pub mod file;
pub mod initrd;
pub mod kernel;
pub mod layout;
pub mod params;
pub mod pvh;
pub mod unpack;
mod xz;

pub use acpi::AcpiConfig;
pub use entry::EntryPoint;
pub use initrd::Initrd;
pub use kernel::{BootProtocol, LoadedKernel, Unpack};

use crate::machine::memory::{memory_map, total_bytes};

/// What to boot, and how.
#[derive(Clone, Debug, Default)]
pub struct BootConfig {
    /// The kernel's file.
    pub kernel: PathBuf,
    /// The initrd's file.
    pub initrd: Option<PathBuf>,
    /// The kernel command line.
    pub cmdline: String,
    /// How the kernel is entered.
    pub protocol: BootProtocol,
    /// Who unpacks a bzImage.
    pub unpack: Unpack,
}

/// Everything is in guest memory.
#[derive(Clone, Debug)]
pub struct Loaded {
    /// Where the boot processor starts: [`entry::apply`] makes registers of it.
    pub entry: EntryPoint,
    /// The kernel, for the log.
    pub kernel: LoadedKernel,
    /// The initrd, for the log.
    pub initrd: Option<Initrd>,
    /// Bytes of ACPI tables, for the log.
    pub acpi_bytes: u64,
}

/// Why a machine cannot be booted.
#[derive(Debug, thiserror::Error)]
pub enum BootError {
    /// The kernel.
    #[error("cannot boot kernel {}", .path.display())]
    Kernel {
        /// Its file.
        path: PathBuf,
        /// Why.
        #[source]
        source: kernel::KernelError,
    },
    /// The initrd.
    #[error("cannot load initrd {}", .path.display())]
    Initrd {
        /// Its file.
        path: PathBuf,
        /// Why.
        #[source]
        source: initrd::InitrdError,
    },
    /// The command line.
    #[error("cannot pass on the command line (--cmdline)")]
    Cmdline(#[from] cmdline::CmdlineError),
    /// The ACPI tables.
    #[error("cannot describe the machine to its kernel")]
    Acpi(#[from] acpi::AcpiError),
    /// The boot parameters: our bug, because their places are fixed and in RAM.
    #[error("cannot write the boot parameters")]
    Params(#[from] linux_loader::configurator::Error),
    /// The tables behind the registers: our bug, as above.
    #[error("cannot write the processor's tables")]
    Tables(#[from] GuestMemoryError),
}

/// Loads kernel, initrd, command line and tables into `memory`, which must be fresh.
pub fn load<M: GuestMemoryBackend>(
    memory: &M,
    config: &BootConfig,
    acpi: &AcpiConfig,
) -> Result<Loaded, BootError> {
    let loaded = load_all(memory, config, acpi);
    release_heap();
    loaded
}

fn load_all<M: GuestMemoryBackend>(
    memory: &M,
    config: &BootConfig,
    acpi: &AcpiConfig,
) -> Result<Loaded, BootError> {
    let kernel_error = |source| BootError::Kernel {
        path: config.kernel.clone(),
        source,
    };
    let image = file::ImageFile::open(&config.kernel).map_err(|error| kernel_error(error.into()))?;
    let kernel = kernel::load(memory, &image, config.protocol, config.unpack).map_err(kernel_error)?;
    drop(image);
    let initrd = config
        .initrd
        .as_deref()
        .map(|path| load_initrd(memory, path, &kernel))
        .transpose()?;
    cmdline::write(memory, &config.cmdline, kernel.cmdline_max)?;
    let tables = acpi::write(memory, acpi)?;

    let told = params::Told {
        memory_map: &memory_map(total_bytes(memory)),
        initrd,
        rsdp: tables.rsdp(),
        kernel: kernel.start,
    };
    match kernel.entry {
        EntryPoint::Pvh { .. } => pvh::write(memory, &told)?,
        _ => params::write(memory, kernel.header, &told)?,
    }
    entry::write_tables(memory, &kernel.entry)?;
    Ok(Loaded {
        entry: kernel.entry,
        kernel,
        initrd,
        acpi_bytes: tables.total_bytes(),
    })
}

fn load_initrd<M: GuestMemoryBackend>(
    memory: &M,
    path: &Path,
    kernel: &LoadedKernel,
) -> Result<Initrd, BootError> {
    file::ImageFile::open(path)
        .map_err(Into::into)
        .and_then(|image| initrd::load(memory, &image, kernel.end, kernel.initrd_max))
        .map_err(|source| BootError::Initrd {
            path: path.to_owned(),
            source,
        })
}

/// Gives back to the host what decoders had on the heap: the machine runs for long and needs none of it.
fn release_heap() {
    #[cfg(target_env = "gnu")]
    // SAFETY: takes no pointer, and may be called at any time by any thread.
    unsafe {
        libc::malloc_trim(0);
    }
}

#[cfg(test)]
mod tests {
    use super::bzimage::tests::{Payload, bzimage};
    use super::elf::tests::{elf, memory};
    use super::*;
    use vm_memory::{Bytes, GuestAddress};

    /// A directory of this test, gone with the value.
    struct Files(PathBuf);

    impl Files {
        fn new(name: &str) -> Files {
            let path = std::env::temp_dir().join(format!("boot-{name}-{}", std::process::id()));
            std::fs::create_dir_all(&path).unwrap();
            Files(path)
        }

        fn file(&self, name: &str, content: &[u8]) -> PathBuf {
            let path = self.0.join(name);
            std::fs::write(&path, content).unwrap();
            path
        }
    }

    impl Drop for Files {
        fn drop(&mut self) {
            let _ = std::fs::remove_dir_all(&self.0);
        }
    }

    fn chain(error: &dyn std::error::Error) -> String {
        let mut text = error.to_string();
        let mut next = error.source();
        while let Some(source) = next {
            text = format!("{text}: {source}");
            next = source.source();
        }
        text
    }

    fn acpi() -> AcpiConfig {
        AcpiConfig::new(vec![0, 1])
    }

    #[test]
    fn a_bzimage_with_an_initrd_is_all_there() {
        let files = Files::new("linux");
        let config = BootConfig {
            kernel: files.file("vmlinuz", &bzimage(Payload::Lz4, &elf(None))),
            initrd: Some(files.file("initrd", b"070701 not really")),
            cmdline: "console=ttyS0".into(),
            ..Default::default()
        };
        let memory = memory();
        let loaded = load(&memory, &config, &acpi()).unwrap();
        let EntryPoint::Linux64 { zero_page, .. } = loaded.entry else {
            panic!("{:?}", loaded.entry)
        };
        let word = |offset: u64| memory.read_obj::<u32>(GuestAddress(zero_page + offset)).unwrap();
        let initrd = loaded.initrd.unwrap();
        assert_eq!((u64::from(word(0x218)), word(0x21c)), (initrd.address, 17));
        assert!(initrd.address >= loaded.kernel.end);
        assert_eq!(
            memory.read_obj::<[u8; 6]>(GuestAddress(initrd.address)).unwrap(),
            *b"070701"
        );
        assert_eq!(u64::from(word(0x70)), layout::ACPI_TABLES);
        assert_eq!(
            memory
                .read_obj::<[u8; 8]>(GuestAddress(layout::ACPI_TABLES))
                .unwrap(),
            *b"RSD PTR "
        );
        assert_ne!(memory.read_obj::<u64>(GuestAddress(layout::PML4)).unwrap(), 0);
    }

    #[test]
    fn a_pvh_kernel_gets_its_start_info() {
        let files = Files::new("pvh");
        let config = BootConfig {
            kernel: files.file("vmlinux", &elf(Some(0x10_0040))),
            ..Default::default()
        };
        let memory = memory();
        let loaded = load(&memory, &config, &acpi()).unwrap();
        let EntryPoint::Pvh { start_info, .. } = loaded.entry else {
            panic!("{:?}", loaded.entry)
        };
        let magic: u32 = memory.read_obj(GuestAddress(start_info.into())).unwrap();
        assert_eq!(magic, linux_loader::start_info::XEN_HVM_START_MAGIC_VALUE);
    }

    #[test]
    fn errors_name_the_file_and_say_each_thing_once() {
        let files = Files::new("errors");
        let good = files.file("vmlinuz", &bzimage(Payload::Lz4, &elf(None)));
        let script = files.file("boot.sh", b"#!/bin/sh\n");
        let cut = files.file("cut", &bzimage(Payload::Lz4, &elf(None))[..1200]);
        let empty = files.file("empty", b"");
        let large = files.file("large", b"");
        std::fs::File::options()
            .write(true)
            .open(&large)
            .unwrap()
            .set_len(64 << 20)
            .unwrap();
        let error = |config: BootConfig| chain(&load(&memory(), &config, &acpi()).unwrap_err());
        let kernel = |path: &Path| {
            error(BootConfig {
                kernel: path.into(),
                ..Default::default()
            })
        };
        let initrd = |path: &Path| {
            error(BootConfig {
                kernel: good.clone(),
                initrd: Some(path.into()),
                ..Default::default()
            })
        };
        assert_eq!(
            kernel(Path::new("/no/such")),
            "cannot boot kernel /no/such: there is no such file"
        );
        assert!(kernel(&script).contains("boot.sh: it is not a kernel for this machine but a script;"));
        assert!(kernel(&cut).contains("cut: it is cut short: by its own header it goes up to byte"));
        assert!(kernel(&empty).ends_with("empty: it is an empty file"));
        assert!(kernel(&files.0).ends_with("it is a directory, not a file"));
        assert!(initrd(Path::new("/no/such")).starts_with("cannot load initrd /no/such: there is no"));
        assert!(initrd(&empty).ends_with("it is an empty file"));
        let text = initrd(&large);
        assert!(
            text.contains("its 64 MiB do not fit") && text.contains("--memory"),
            "{text}"
        );
        let cmdline = "x".repeat(3000);
        let text = error(BootConfig {
            kernel: good.clone(),
            cmdline,
            ..Default::default()
        });
        assert!(
            text.ends_with("it has 3000 bytes and this kernel takes 2047; make it shorter"),
            "{text}"
        );
    }
}
