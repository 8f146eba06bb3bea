//! The command line: what a user types, turned into a [`MachineConfig`], and an exit status back.

pub mod bench;
mod config;
mod consoles;
mod ctl;
pub mod doctor;
mod stdout;

use self::consoles::{ConsoleChoice, Consoles};
use crate::actors::PlacementKind;
use crate::boot::{BootConfig, BootProtocol, Unpack};
use crate::devices::tarpit::Mire;
use crate::gdb::server::GdbConfig;
use crate::host::console::ConsoleKind;
use crate::host::{log as hostlog, terminal};
use crate::machine::dispatch::Dispatch;
use crate::machine::memory::{Backing, MemoryConfig, parse_size};
use crate::machine::outcome::status;
use crate::machine::supervisor::{self, Guest, MAX_CPUS, MachineConfig, OnReset};
use crate::virtio::balloon::BalloonConfig;
use crate::virtio::block::DiskConfig;
use crate::virtio::config::VirtioConfig;
use crate::virtio::console::ports::PortConfig;
use crate::virtio::net::NetConfig;
use crate::virtio::share::ShareConfig;
use crate::virtio::vsock::VsockConfig;
use crate::virtio::{Notify, Transport};
use clap::{Args, CommandFactory, FromArgMatches, Parser, Subcommand, ValueEnum};
use config::ConfigError;
use nix::sys::signal::{SigHandler, Signal};
use slog::{Level, info};
use std::error::Error;
use std::ffi::OsString;
use std::io::Write;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;
use stdout::Stdout;

/// A KVM virtual machine monitor made of actors.
#[derive(Parser, Debug)]
#[command(version, after_help = status::TABLE, max_term_width = 100)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand, Debug)]
enum Command {
    /// Boots a kernel and gives its console to the terminal (Ctrl-A h tells how to leave).
    #[command(after_help = status::TABLE)]
    Run(Box<Run>),
    /// Tells what this host's KVM can and cannot do.
    Doctor,
    /// Asks a running machine something, through the socket that its --control names
    Ctl(ctl::Ctl),
    /// Measures the disciplines of dispatch against each other, with scripted vCPUs: runs on any host.
    Bench(bench::Bench),
}

/// As typed by the user; [`Run::resolve`] makes a machine of it.
#[derive(Args, Debug)]
struct Run {
    /// Kernel: a bzImage (vmlinuz), or an ELF file with a PVH note or for the 64-bit Linux boot protocol
    #[arg(long, value_name = "FILE", required_unless_present_any = ["demo", "guest"])]
    kernel: Option<PathBuf>,
    /// Initial RAM disk
    #[arg(long, value_name = "FILE", requires = "kernel")]
    initrd: Option<PathBuf>,
    /// Kernel command line [default: the consoles and panic=-1, as in console=ttyS0 panic=-1]
    #[arg(long, value_name = "TEXT", requires = "kernel")]
    cmdline: Option<String>,
    /// Boots the guest that is carried in this program: it says hello, tries interrupts, SMP and the devices, and
    /// powers off
    #[arg(long, conflicts_with_all = ["kernel", "initrd", "cmdline", "boot", "unpack"])]
    demo: bool,
    /// Boots one of the test guests
    #[arg(long, value_name = "NAME", hide = true, value_parser = parse_guest)]
    #[arg(conflicts_with_all = ["kernel", "initrd", "cmdline", "boot", "unpack", "demo"])]
    guest: Option<Guest>,
    /// Number of vCPUs
    #[arg(long, value_name = "N", default_value_t = 1, allow_negative_numbers = true)]
    cpus: usize,
    /// Guest memory, as 512M, 4.5G or a number of bytes
    #[arg(long, value_name = "SIZE", default_value = "512M", value_parser = parse_memory, allow_negative_numbers = true)]
    memory: u64,
    /// What guest memory is made of
    #[arg(long, value_enum, value_name = "WHAT", default_value_t = MemoryBacking::Auto)]
    memory_backing: MemoryBacking,
    /// Protocol by which the kernel is entered
    #[arg(long, value_enum, default_value_t = Boot::Auto)]
    boot: Boot,
    /// Who unpacks a bzImage: host is faster, guest runs the kernel's own code (and its KASLR)
    #[arg(long, value_enum, default_value_t = Unpacking::Auto)]
    unpack: Unpacking,
    /// How vCPUs reach devices: actor (messages), or a baseline to compare with: channel, channel:spin, device-lock,
    /// device-lock:parking_lot, big-lock, big-lock:parking_lot
    #[arg(long, value_name = "DISCIPLINE", default_value = "actor")]
    dispatch: Dispatch,
    /// Where a device actor runs: handoff (on the vCPU that needs it), thread or pool; may be repeated
    #[arg(long, value_name = "DEVICE=PLACEMENT", value_parser = parse_placement)]
    placement: Vec<(String, PlacementKind)>,
    /// Where the first serial port goes: stdio, file:PATH, pty or off [default: stdio]; or virtio (a virtio console on
    /// stdio, in the serial port's place), or virtio:WHERE; once for each of the two
    #[arg(long, value_name = "[virtio:]WHERE")]
    console: Vec<ConsoleChoice>,
    /// Where bytes written to the debug console (port 0xe9) go: as for --console
    #[arg(long, value_name = "WHERE", default_value = "off")]
    debug_console: ConsoleKind,
    /// Adds a port (0xea0) whose accesses take so many seconds, to measure what a slow device does to the others
    #[arg(long, value_name = "SECS", hide = true, value_parser = parse_seconds)]
    delay_port: Option<Duration>,
    /// A disk: path=FILE, and what else of format=raw|qcow2, ro, queues=N, serial=TEXT, rate=SIZE (bytes a second),
    /// iops=N (requests a second); may be repeated (in the guest: vda, vdb, …)
    #[arg(long, value_name = "path=FILE,…")]
    disk: Vec<DiskConfig>,
    /// A network device: tap=NAME (an interface of the host) or user (without rights, through passt), and what else of
    /// mac=ADDRESS, mtu=N, queues=N, rate=SIZE, iops=N (frames), tcp=PORTS, udp=PORTS; may be repeated
    #[arg(long, value_name = "tap=NAME|user,…")]
    net: Vec<NetConfig>,
    /// An entropy device, fed from the host's /dev/urandom
    #[arg(long)]
    rng: bool,
    /// A socket device: cid=N (the guest's context identifier, from 3 on), uds=PATH (a Unix socket by which the host's
    /// programs reach the guest's; the guest reaches theirs at PATH_PORT)
    #[arg(long, value_name = "cid=N,uds=PATH")]
    vsock: Option<VsockConfig>,
    /// A balloon, by which the guest gives memory back: size=SIZE (what it has to do without at first), stats=SECS (how
    /// often it is asked for its figures); its size is changed by `actor-vmm ctl PATH balloon SIZE`
    #[arg(long, value_name = "size=SIZE,…", num_args = 0..=1, require_equals = false, default_missing_value = "")]
    balloon: Option<BalloonConfig>,
    /// A shared folder: tag=NAME (by which the guest mounts it, `mount -t virtiofs NAME /mnt`), path=DIR, and what else
    /// of sandbox=namespace|chroot (how virtiofsd is locked in), cache=auto|always|none; may be repeated
    #[arg(long, value_name = "tag=NAME,path=DIR,…")]
    share: Vec<ShareConfig>,
    /// A port between a program of the guest (/dev/virtio-ports/NAME) and the host: name=NAME, and uds=PATH (a Unix socket
    /// to which one program at a time connects) or file=PATH (which gets what the guest writes); may be repeated
    #[arg(long, value_name = "name=NAME,uds=PATH|file=PATH")]
    port: Vec<PortConfig>,
    /// How drivers find virtio devices: mmio (a page of registers each, described by ACPI), or pci (a bus)
    #[arg(long, value_name = "TRANSPORT", default_value = "mmio")]
    transport: Transport,
    /// How virtio devices and their drivers notify each other: eventfd (without leaving the kernel), or message
    #[arg(long, value_name = "WAY", default_value = "eventfd")]
    notify: Notify,
    /// How much is told on stderr
    #[arg(long, value_enum, default_value_t = LogLevel::Info)]
    log_level: LogLevel,
    /// Lets a gdb connect, at a port of the loopback interface (0: any that is free) or a Unix socket; with ,wait the
    /// machine stands before its first instruction until gdb lets it go
    #[arg(long, value_name = "PORT|PATH[,wait]")]
    gdb: Option<GdbConfig>,
    /// What becomes of the machine when the guest asks for a reset
    #[arg(long, value_enum, value_name = "WHAT", default_value_t = ResetBy::Exit)]
    on_reset: ResetBy,
    /// Makes a Unix socket by which the machine can be controlled; see `actor-vmm ctl`
    #[arg(long, value_name = "PATH")]
    control: Option<PathBuf>,
    /// A machine in a TOML file, whose keys are these flags without the dashes: [[disk]], [[net]], [[share]], [[port]], [vsock]
    /// and [balloon] are tables. What is there in a list is added to; all else may be in one of the two
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,
    /// Prints the machine as a file for --config, with all that is so by default, and starts nothing
    #[arg(long)]
    dry_run: bool,
    /// Adds a device at port 0xf6 whose reads do not return
    #[arg(long, hide = true)]
    test_tarpit: bool,
    /// Ends the machine after this many seconds
    #[arg(long, value_name = "SECS", value_parser = parse_seconds, allow_negative_numbers = true)]
    timeout: Option<Duration>,
}

#[derive(Clone, Copy, Debug, ValueEnum)]
enum Boot {
    /// What the file offers: bzImage and ELF by the 64-bit protocol, ELF with a PVH note by PVH
    Auto,
    /// The 64-bit Linux boot protocol
    Linux,
    /// PVH
    Pvh,
}

#[derive(Clone, Copy, Debug, ValueEnum)]
enum MemoryBacking {
    /// memfd where the host gives it transparent huge pages, else anonymous
    Auto,
    /// A shared file in memory, which other processes can be given
    Memfd,
    /// Private memory
    Anonymous,
    /// Pages of 2 MiB out of the host's pool (vm.nr_hugepages)
    Hugepages,
}

#[derive(Clone, Copy, Debug, ValueEnum)]
enum Unpacking {
    /// The host where it knows the format
    Auto,
    /// The host
    Host,
    /// The guest
    Guest,
}

#[derive(Clone, Copy, Debug, ValueEnum)]
enum ResetBy {
    /// The machine ends, with status 10
    Exit,
    /// It is reset in place: the guest boots again
    Reset,
}

#[derive(Clone, Copy, Debug, ValueEnum)]
enum LogLevel {
    Critical,
    Error,
    Warning,
    Info,
    Debug,
}

fn parse_memory(text: &str) -> Result<u64, String> {
    parse_size(text).map_err(|error| error.to_string())
}

fn parse_placement(text: &str) -> Result<(String, PlacementKind), String> {
    let (device, placement) = text
        .split_once('=')
        .ok_or("expected DEVICE=PLACEMENT, as serial0=thread")?;
    Ok((device.to_string(), placement.parse()?))
}

fn parse_guest(name: &str) -> Result<Guest, String> {
    crate::guests::cases::by_name(name).ok_or_else(|| "there is no such test guest".into())
}

fn parse_seconds(text: &str) -> Result<Duration, String> {
    let seconds: f64 = text
        .parse()
        .map_err(|_| "expected a number of seconds".to_string())?;
    match Duration::try_from_secs_f64(seconds) {
        Ok(duration) if !duration.is_zero() => Ok(duration),
        _ => Err("expected a number of seconds above 0, and at most 1e19".into()),
    }
}

impl Run {
    /// `consoles`: what all of `--console` say together.
    fn resolve(&self, consoles: Consoles) -> MachineConfig {
        let guest = match &self.kernel {
            Some(kernel) => Guest::Kernel(BootConfig {
                kernel: kernel.clone(),
                initrd: self.initrd.clone(),
                cmdline: self.cmdline.clone().unwrap_or_else(|| consoles.cmdline()),
                protocol: match self.boot {
                    Boot::Auto => BootProtocol::Auto,
                    Boot::Linux => BootProtocol::Linux,
                    Boot::Pvh => BootProtocol::Pvh,
                },
                unpack: match self.unpack {
                    Unpacking::Auto => Unpack::Auto,
                    Unpacking::Host => Unpack::Host,
                    Unpacking::Guest => Unpack::Guest,
                },
            }),
            None => self.guest.clone().unwrap_or_else(crate::guests::demo::guest),
        };
        MachineConfig {
            guest,
            cpus: self.cpus,
            memory: MemoryConfig {
                size_bytes: self.memory,
                backing: match self.memory_backing {
                    MemoryBacking::Auto => Backing::Auto,
                    MemoryBacking::Memfd => Backing::Memfd,
                    MemoryBacking::Anonymous => Backing::Anonymous,
                    MemoryBacking::Hugepages => Backing::Hugepages,
                },
            },
            dispatch: self.dispatch,
            placements: self.placement.clone(),
            console: consoles.serial,
            debug_console: self.debug_console.clone(),
            delay: self.delay_port,
            virtio: VirtioConfig {
                disks: self.disk.clone(),
                nets: self.net.clone(),
                rng: self.rng,
                vsock: self.vsock.clone(),
                balloon: self.balloon.clone(),
                shares: self.share.clone(),
                console: consoles.virtio,
                ports: self.port.clone(),
                transport: self.transport,
                notify: self.notify,
            },
            timeout: self.timeout,
            gdb: self.gdb.clone(),
            on_reset: match self.on_reset {
                ResetBy::Exit => OnReset::Exit,
                ResetBy::Reset => OnReset::Reset,
            },
            control: self.control.clone(),
            tarpit: self.test_tarpit.then(Mire::endless),
        }
    }

    fn run(&self) -> u8 {
        let level = match self.log_level {
            LogLevel::Critical => Level::Critical,
            LogLevel::Error => Level::Error,
            LogLevel::Warning => Level::Warning,
            LogLevel::Info => Level::Info,
            LogLevel::Debug => Level::Debug,
        };
        let consoles = match self.check() {
            Ok(consoles) => consoles,
            Err(problem) => return complain(&problem, status::BAD_INPUT),
        };
        let (log, log_handle) = match hostlog::start(level) {
            Ok(log) => log,
            Err(error) => return complain(&format!("cannot start the log: {error}"), status::HOST_TROUBLE),
        };
        let result = supervisor::run(&self.resolve(consoles), &log);
        terminal::restore();
        match result {
            Ok(outcome) => {
                info!(log, "{outcome}"; "status" => outcome.status());
                drop(log_handle);
                outcome.status()
            }
            Err(error) => {
                drop(log_handle);
                complain(&chain(&error), error.status())
            }
        }
    }

    /// What has keys.
    fn devices(&self) -> config::Devices<'static> {
        [
            ("disk", config::items_of(&self.disk)),
            ("net", config::items_of(&self.net)),
            ("vsock", config::items_of(&self.vsock)),
            ("balloon", config::items_of(&self.balloon)),
            ("share", config::items_of(&self.share)),
            ("port", config::items_of(&self.port)),
        ]
    }

    /// Prints what it would be.
    fn dry_run(&self, matches: &clap::ArgMatches) -> u8 {
        let machine = match self.check() {
            Ok(consoles) => self.resolve(consoles),
            Err(problem) => return complain(&problem, status::BAD_INPUT),
        };
        if let Err(error) = machine.check() {
            return complain(&chain(&error), error.status());
        }
        let text = match config::written(&Cli::command(), matches, &machine, &self.devices()) {
            Ok(text) => text,
            Err(error) => return complain(&error.to_string(), status::BAD_INPUT),
        };
        stdout::show(&text)
    }

    /// What clap cannot see.
    fn check(&self) -> Result<Consoles, String> {
        if !(1..=MAX_CPUS).contains(&self.cpus) {
            return Err(format!("--cpus must be 1 to {MAX_CPUS}, not {}", self.cpus));
        }
        Consoles::new(&self.console)
    }
}

/// An error and its causes on one line: none repeats another.
fn chain(error: &dyn Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        text = format!("{text}: {error}");
        cause = error.source();
    }
    text
}

fn complain(text: &str, status: u8) -> u8 {
    // One line, whatever the name of a file has in it.
    let line = text.replace(char::is_control, "\u{fffd}");
    hostlog::print(&format!("actor-vmm: {line}"));
    status
}

/// What cannot be understood.
#[derive(Debug, thiserror::Error)]
enum Mistyped {
    /// Of the command line, or of it with what a file says.
    #[error(transparent)]
    Line(#[from] clap::Error),
    /// Of a file.
    #[error(transparent)]
    File(#[from] ConfigError),
}

/// Parses a command line, with what the file adds to it that it may name. Returns also how `run` was parsed.
fn parse(arguments: Vec<OsString>) -> Result<(Cli, clap::ArgMatches), Mistyped> {
    let mut command = Cli::command();
    let arguments = config::expand(&command, arguments)?;
    let mut matches = command.try_get_matches_from_mut(arguments)?;
    let cli = Cli::from_arg_matches(&matches).map_err(|error| error.format(&mut command))?;
    let matches = matches.remove_subcommand().map(|(_, matches)| matches);
    Ok((cli, matches.unwrap_or_default()))
}

/// The program.
pub fn main() -> ExitCode {
    // A write beyond `ulimit -f` is an error of that write, as one on a full disk is.
    // SAFETY: no handler of ours is there to be replaced, and SIG_IGN runs no code.
    let _ = unsafe { nix::sys::signal::signal(Signal::SIGXFSZ, SigHandler::SigIgn) };
    // A panic is a bug of ours. It must not leave the terminal raw, and says so in one line.
    std::panic::set_hook(Box::new(|panic| {
        // Actors contain theirs; the terminal stays theirs then. Others end the program.
        let place = panic
            .location()
            .map_or_else(String::new, |at| format!(" at {}:{}", at.file(), at.line()));
        let thread = std::thread::current();
        if thread.name() == Some("main") {
            terminal::restore();
        }
        let text = panic.payload_as_str().unwrap_or("no text");
        hostlog::print(&format!(
            "actor-vmm: bug in thread {}{place}: {text}",
            thread.name().unwrap_or("?")
        ));
    }));
    let (cli, matches) = match parse(std::env::args_os().collect()) {
        Ok(parsed) => parsed,
        Err(Mistyped::Line(error)) => {
            // Help and version go to stdout with 0, mistakes to stderr with 2.
            let printed = error.print();
            if error.use_stderr() {
                return ExitCode::from(status::BAD_INPUT);
            }
            let mut stdout = Stdout::default();
            stdout.wrote(printed.and_then(|()| std::io::stdout().flush()));
            return ExitCode::from(stdout.status(0));
        }
        Err(Mistyped::File(error)) => return ExitCode::from(complain(&chain(&error), status::BAD_INPUT)),
    };
    // Nothing of it is used after a panic.
    let status = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| match cli.command {
        Command::Run(run) if run.dry_run => run.dry_run(&matches),
        Command::Run(run) => run.run(),
        Command::Doctor => doctor::run(),
        Command::Ctl(ctl) => ctl.run(),
        Command::Bench(bench) => bench.run(),
    }));
    // The hook has told what happened.
    ExitCode::from(status.unwrap_or(status::INTERNAL_ERROR))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(args: &[&str]) -> Result<Cli, clap::Error> {
        Cli::try_parse_from([&["actor-vmm"], args].concat())
    }

    #[test]
    fn the_definition_is_consistent() {
        Cli::command().debug_assert();
    }

    #[test]
    fn a_full_command_line_becomes_a_machine() {
        let args = "run --kernel k --initrd i --cmdline quiet --cpus 3 --memory 1.5G --placement rtc=pool \
                    --console file:/x --boot pvh --unpack guest --timeout 2.5 --transport pci";
        let cli = parse(&args.split_whitespace().collect::<Vec<_>>()).unwrap();
        let Command::Run(run) = cli.command else { panic!() };
        let config = run.resolve(run.check().unwrap());
        assert_eq!((config.cpus, config.memory.size_bytes), (3, 3 << 29));
        assert_eq!(config.placements, [("rtc".to_string(), PlacementKind::Pool)]);
        assert_eq!(config.console, ConsoleKind::File("/x".into()));
        assert_eq!(config.timeout, Some(Duration::from_millis(2500)));
        assert_eq!(config.virtio.transport, Transport::Pci);
        let Guest::Kernel(boot) = config.guest else {
            panic!()
        };
        assert_eq!(
            (boot.cmdline.as_str(), boot.protocol, boot.unpack),
            ("quiet", BootProtocol::Pvh, Unpack::Guest)
        );
    }

    #[test]
    fn mistakes_are_refused() {
        for args in [
            &["run"][..],
            &["run", "--kernel"],
            &["run", "--kernel", "k", "--memory", "lots"],
            &["run", "--kernel", "k", "--memory", "0"],
            &["run", "--kernel", "k", "--cpus", "-1"],
            &["run", "--kernel", "k", "--placement", "serial0"],
            &["run", "--kernel", "k", "--placement", "serial0=moon"],
            &["run", "--kernel", "k", "--console", "tcp:1"],
            &["run", "--kernel", "k", "--timeout", "0"],
            &["run", "--kernel", "k", "--timeout", "nan"],
            &["run", "--demo", "--gdb", "65536"],
            &["run", "--demo", "--gdb", ""],
            &["run", "--demo", "--transport", "isa"],
            &["run", "--kernel", "k", "--demo"],
            &["run", "--demo", "--initrd", "i"],
            &["fly"],
            &[],
        ] {
            let error = parse(args).unwrap_err();
            assert_eq!(error.exit_code(), 2, "{args:?}");
        }
    }
}
