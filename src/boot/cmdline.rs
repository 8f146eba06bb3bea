//! The kernel command line: checked, and written to guest memory with its NUL.

use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryError};

use super::layout;

/// A command line that no kernel could be given.
#[derive(Debug, thiserror::Error)]
pub enum CmdlineError {
    /// Longer than the kernel takes.
    #[error("it has {length} bytes and this kernel takes {limit}; make it shorter")]
    TooLong {
        /// Its length in bytes.
        length: usize,
        /// The kernel's limit, without the NUL.
        limit: usize,
    },
    /// A character that would end or garble it.
    #[error("it has a control character (code {code:#04x}) at byte {position}; remove it")]
    Control {
        /// The character.
        code: u32,
        /// Where.
        position: usize,
    },
    /// Guest memory refused a write: our bug.
    #[error("guest memory cannot be written")]
    Memory(#[from] GuestMemoryError),
}

/// Checks the command line against the kernel's `limit` in bytes, without the NUL.
pub fn check(cmdline: &str, limit: usize) -> Result<(), CmdlineError> {
    if let Some((position, found)) = cmdline.char_indices().find(|(_, c)| c.is_control()) {
        return Err(CmdlineError::Control {
            code: found.into(),
            position,
        });
    }
    let limit = limit.min(layout::CMDLINE_CAPACITY - 1);
    if cmdline.len() > limit {
        return Err(CmdlineError::TooLong {
            length: cmdline.len(),
            limit,
        });
    }
    Ok(())
}

/// Checks the command line and writes it to its place.
pub fn write<M: GuestMemoryBackend>(memory: &M, cmdline: &str, limit: usize) -> Result<(), CmdlineError> {
    check(cmdline, limit)?;
    memory.write_slice(cmdline.as_bytes(), GuestAddress(layout::CMDLINE))?;
    memory.write_obj(0u8, GuestAddress(layout::CMDLINE + cmdline.len() as u64))?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use vm_memory::GuestMemoryMmap;

    #[test]
    fn it_is_written_with_its_nul() {
        let memory: GuestMemoryMmap = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 1 << 20)]).unwrap();
        memory
            .write_slice(&[0xff; 64], GuestAddress(layout::CMDLINE))
            .unwrap();
        write(&memory, "console=ttyS0 é", 2047).unwrap();
        let mut bytes = [0; 17];
        memory
            .read_slice(&mut bytes, GuestAddress(layout::CMDLINE))
            .unwrap();
        assert_eq!(&bytes, "console=ttyS0 é\0".as_bytes());
    }

    #[test]
    fn the_limit_is_the_kernels() {
        assert!(check(&"x".repeat(2047), 2047).is_ok());
        let error = check(&"x".repeat(2048), 2047).unwrap_err();
        assert_eq!(
            error.to_string(),
            "it has 2048 bytes and this kernel takes 2047; make it shorter"
        );
        assert!(check(&"x".repeat(layout::CMDLINE_CAPACITY), usize::MAX).is_err());
        assert!(check("x", 0).is_err());
    }

    #[test]
    fn control_characters_are_refused() {
        for bad in ["a\0b", "a\nb", "a\x1b[m", "a\x7f", "a\u{85}"] {
            assert!(
                matches!(check(bad, 100), Err(CmdlineError::Control { position: 1, .. })),
                "{bad:?}"
            );
        }
    }
}
