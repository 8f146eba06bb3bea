//! The `actor-vmm` command; see [`actor_vmm::cli`].

use std::process::ExitCode;

fn main() -> ExitCode {
    actor_vmm::cli::main()
}
