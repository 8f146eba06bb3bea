//! The developer's tool: `cargo xtask --help`.

mod bench;
mod boot;
mod build;
mod debugger;
mod emulated_host;
mod fuzz;
mod image;
mod initramfs;
mod kernel;
mod names;
mod package;
mod paths;
mod process;
mod setup;
mod test;

use std::process::ExitCode;

use anyhow::Result;
use clap::{Parser, Subcommand};

#[derive(Parser)]
#[command(
    name = "cargo xtask",
    about = "Set up, boot, test and measure actor-vmm",
    max_term_width = 100
)]
struct Cli {
    #[command(subcommand)]
    task: Task,
}

#[derive(Subcommand)]
enum Task {
    /// Install what the other tasks need from Debian packages, and fetch Debian's cloud kernel (not installed)
    Setup(setup::Args),
    /// Build actor-vmm and boot the stock Debian kernel to userspace with it
    Boot(boot::Args),
    /// Build a disk with a small Debian system on it: a shell, a network, fio
    Image(image::Args),
    /// Run every check and test, the last line being "N passed, N failed"
    Test(test::Args),
    /// Run scenarios with real guests in an emulated host (works without /dev/kvm)
    EmulatedHost(emulated_host::Args),
    /// Let hostile guests, led by coverage, at the virtio devices
    Fuzz(fuzz::Args),
    /// Make a symbol file for gdb of a guest's /proc/kallsyms
    Symbols(names::Args),
    /// Measure
    #[command(subcommand)]
    Bench(Bench),
}

#[derive(Subcommand)]
enum Bench {
    /// Time from exec to the guest's /init and memory outside guest RAM, against QEMU's microvm
    Boot(bench::Args),
    /// Requests to a disk, in Linux's own driver: under each discipline, and in QEMU over the same file
    Disk(bench::io::Args),
    /// The same of a network: over the same tap
    Net(bench::io::Args),
    /// A hundred million asks from many senders under every placement: none lost, none doubled
    Stress,
    /// Stock Linux on one device while its other CPU is on one that blocks, under each discipline of dispatch
    Victim(bench::victim::Args),
}

fn main() -> ExitCode {
    match run(Cli::parse().task) {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("xtask: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(task: Task) -> Result<bool> {
    match task {
        Task::Setup(args) => setup::run(&args).map(|()| true),
        Task::Boot(args) => boot::run(&args),
        Task::Image(args) => image::run(&args).map(|()| true),
        Task::Test(args) => test::run(&args),
        Task::EmulatedHost(args) => emulated_host::run(&args),
        Task::Fuzz(args) => fuzz::run(&args),
        Task::Symbols(args) => names::run(&args),
        Task::Bench(Bench::Boot(args)) => bench::run(&args),
        Task::Bench(Bench::Disk(args)) => bench::io::run(bench::io::Device::Disk, &args),
        Task::Bench(Bench::Net(args)) => bench::io::run(bench::io::Device::Net, &args),
        Task::Bench(Bench::Stress) => bench::stress(),
        Task::Bench(Bench::Victim(args)) => bench::victim::run(&args),
    }
}
