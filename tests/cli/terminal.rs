//! The program on a terminal of its own: whatever ends it, the terminal is as it was.

use super::guest;
use super::kvm::have_kvm;
use super::process::{LIMIT, PROGRAM, PROMPT, Place, eventually, signal, stop, wait};
use nix::fcntl::OFlag;
use nix::pty::{grantpt, posix_openpt, ptsname_r, unlockpt};
use nix::sys::signal::{Signal, kill};
use nix::sys::termios::{LocalFlags, SetArg, Termios, tcgetattr, tcsetattr};
use nix::unistd::{Pid, tcgetpgrp};
use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::OpenOptionsExt;
use std::os::unix::process::CommandExt;
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::{Receiver, channel};
use std::time::{Duration, Instant};

/// The program in a session of its own, with a terminal as its stdin, stdout and stderr.
struct Session {
    child: Child,
    /// The person's side.
    master: File,
    /// The program's side, to look at.
    slave: OwnedFd,
    before: Termios,
    /// Pieces of what came out; none if nobody reads.
    pieces: Option<Receiver<Vec<u8>>>,
    text: String,
}

impl Session {
    fn start(place: &Place, words: &str) -> Session {
        Session::start_with(place, words, true)
    }

    /// A guest that has said that it is up, and has the terminal.
    #[track_caller]
    fn raw(place: &Place, words: &str) -> Session {
        let mut session = Session::start(place, words);
        session.expect("up\n");
        session.expect_raw();
        session
    }

    /// A guest as well, of a shell that has started it; and both processes.
    #[track_caller]
    fn in_a_shell(place: &Place) -> (Session, Pid, Pid) {
        let mut shell = Command::new("/bin/sh");
        shell.arg("-i").current_dir(place.path());
        let mut session = Session::start_command(shell, true);
        let shell = Pid::from_raw(session.child.id() as i32);
        session.type_in(format!("{PROGRAM} run --kernel k\n").as_bytes());
        session.expect("up\n");
        session.expect_raw();
        let program = session.foreground();
        (session, shell, program)
    }

    /// The program ends with this status, as the shell that has started it tells; and then the shell.
    #[track_caller]
    fn shell_tells(&mut self, shell: Pid, status: i32) {
        eventually("the program has ended", || self.foreground() == shell);
        self.assert_as_before();
        // The shell puts the words together only when it runs the line.
        self.type_in(b"echo sta''tus $?\n");
        self.expect(&format!("status {status}"));
        self.type_in(b"exit 3\n");
        assert_eq!(self.end(LIMIT), 3);
    }

    fn start_with(place: &Place, words: &str, read: bool) -> Session {
        Session::start_command(place.session_command(words), read)
    }

    fn start_command(mut command: Command, read: bool) -> Session {
        // Not openpty(3): its descriptors would be inherited by every program that is started meanwhile.
        let master = posix_openpt(OFlag::O_RDWR | OFlag::O_NOCTTY | OFlag::O_CLOEXEC).unwrap();
        grantpt(&master).unwrap();
        unlockpt(&master).unwrap();
        let name = ptsname_r(&master).unwrap();
        let open = || {
            File::options()
                .read(true)
                .write(true)
                .custom_flags(libc::O_NOCTTY)
                .open(&name)
        };
        let slave = OwnedFd::from(open().unwrap());
        let master = master.as_fd().try_clone_to_owned().map(File::from).unwrap();
        let before = tcgetattr(&slave).unwrap();
        let end = || Stdio::from(slave.try_clone().unwrap());
        command.stdin(end()).stdout(end()).stderr(end());
        // SAFETY: two system calls between fork and exec, both async-signal-safe.
        unsafe {
            command.pre_exec(|| {
                if libc::setsid() < 0 || libc::ioctl(0, libc::TIOCSCTTY, 0) < 0 {
                    return Err(std::io::Error::last_os_error());
                }
                Ok(())
            });
        }
        let child = command.spawn().unwrap();
        let pieces = read.then(|| {
            let (send, pieces) = channel();
            let mut master = master.try_clone().unwrap();
            std::thread::spawn(move || {
                let mut piece = [0; 4096];
                while let Ok(length @ 1..) = master.read(&mut piece) {
                    if send.send(piece[..length].to_vec()).is_err() {
                        break;
                    }
                }
            });
            pieces
        });
        Session {
            child,
            master,
            slave,
            before,
            pieces,
            text: String::new(),
        }
    }

    /// What came out so far.
    fn text(&mut self) -> &str {
        for piece in self.pieces.iter().flat_map(Receiver::try_iter) {
            self.text += &String::from_utf8_lossy(&piece);
        }
        &self.text
    }

    #[track_caller]
    fn expect(&mut self, needle: &str) {
        let deadline = Instant::now() + LIMIT;
        while !self.text().contains(needle) {
            assert!(Instant::now() < deadline, "no '{needle}' in: {}", self.text);
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    fn type_in(&mut self, keys: &[u8]) {
        self.master.write_all(keys).unwrap();
    }

    /// Waits until the guest has the terminal.
    #[track_caller]
    fn expect_raw(&mut self) {
        let slave = &self.slave;
        eventually("a raw terminal", || {
            !tcgetattr(slave)
                .unwrap()
                .local_flags
                .intersects(LocalFlags::ICANON | LocalFlags::ECHO)
        });
    }

    /// The group that the terminal belongs to now.
    fn foreground(&self) -> Pid {
        tcgetpgrp(&self.master).unwrap()
    }

    #[track_caller]
    fn assert_as_before(&mut self) {
        let settings = |terminal: Termios| {
            let all = libc::termios::from(terminal);
            (all.c_iflag, all.c_oflag, all.c_cflag, all.c_lflag, all.c_cc)
        };
        let now = settings(tcgetattr(&self.slave).unwrap());
        let before = settings(self.before.clone());
        assert_eq!(before, now, "the terminal is not as it was; {}", self.text());
    }

    /// Waits for the end within `limit`, and asserts the status and that the terminal is as it was.
    #[track_caller]
    fn end(&mut self, limit: Duration) -> i32 {
        let status = wait(&mut self.child, limit);
        self.assert_as_before();
        assert!(!self.text().contains("bug in"), "{}", self.text());
        status
    }
}

#[test]
fn the_terminal_is_raw_while_the_guest_runs_and_then_as_it_was() {
    if !have_kvm() {
        return;
    }
    let place = Place::with_kernel(guest::echo());
    let mut session = Session::raw(&place, "run --kernel k");
    // Keys that a cooked terminal would make something else of.
    session.type_in(b"a\rb\x03\x1a\x1c\x13\x11\x16z");
    session.expect("a\rb\x03\x1a\x1c\x13\x11\x16z");
    session.type_in(b"\x04");
    assert_eq!(session.end(LIMIT), 15);
    // A line of the log ends as the terminal needs it, raw or not.
    session.expect("cpus=1 memory=512 MiB\r\n");
    session.expect("the guest gave exit status 7 status=15\r\n");
}

#[test]
fn bad_input_leaves_the_terminal_alone() {
    let place = Place::with_kernel(guest::exit());
    for (words, status, said) in [
        ("run --kernel missing", 2, "no such file"),
        ("run --kernel k --cpus 0", 2, "--cpus must be 1 to 1024"),
        ("run --kernel k --memory 0", 2, "--memory"),
        ("run --kernel k --memory 16T", 18, "more than the host has"),
        ("run --kernel k --placement x=pool", 2, "names no device"),
        ("fly", 2, "fly"),
    ] {
        let mut session = Session::start(&place, words);
        session.expect(said);
        assert_eq!(session.end(LIMIT), status, "{words}");
    }
}

#[test]
fn trouble_after_the_start_leaves_the_terminal_as_it_was() {
    if !have_kvm() {
        return;
    }
    for (code, words, status, said) in [
        (guest::exit(), "", 11, "exit status 5"),
        (guest::broken(), "", 14, "what to do: "),
        (guest::triple_fault(), "", 12, "triple fault"),
        (guest::spin(), "--timeout 0.3", 16, "--timeout was over"),
        (guest::exit(), "--debug-console file:nowhere/x", 2, "nowhere/x"),
    ] {
        let place = Place::with_kernel(code);
        let mut session = Session::start(&place, &format!("run --kernel k {words}"));
        assert_eq!(session.end(LIMIT), status, "{said}");
        session.expect(said);
        // A line of the log may be on its way when the raw mode ends: then the terminal adds a \r of its own.
        let text = session.text().replace("\r\r\n", "").replace("\r\n", "");
        assert!(!text.contains('\r'), "{:?}", session.text);
    }
    let mut session = Session::start(&Place::new(), "run --demo");
    let status = session.end(LIMIT);
    assert!(status == 0 || status % 2 == 1, "{status}: {}", session.text());
}

#[test]
fn signals_leave_the_terminal_as_it_was() {
    if !have_kvm() {
        return;
    }
    for (code, end, status) in [
        (guest::spin(), Signal::SIGINT, 130),
        (guest::halt(), Signal::SIGTERM, 143),
        (guest::port_loop(), Signal::SIGHUP, 129),
        (guest::spin(), Signal::SIGQUIT, 131),
    ] {
        let place = Place::with_kernel(code);
        let mut session = Session::raw(&place, "run --kernel k");
        signal(&session.child, end);
        assert_eq!(session.end(PROMPT), status, "{end}");
    }
}

#[test]
fn the_escape_ends_a_guest_that_spins_sleeps_or_loops_on_a_port() {
    if !have_kvm() {
        return;
    }
    for code in [guest::spin(), guest::halt(), guest::port_loop()] {
        let place = Place::with_kernel(code);
        let mut session = Session::raw(&place, "run --kernel k --cpus 2");
        session.type_in(b"\x01x");
        assert_eq!(session.end(PROMPT), 130);
        session.expect("ended from the console");
    }
}

#[test]
fn a_shell_gets_its_terminal_back_while_the_program_is_stopped() {
    if !have_kvm() {
        return;
    }
    let place = Place::with_kernel(guest::echo());
    let (mut session, shell, program) = Session::in_a_shell(&place);
    assert_ne!(program, shell, "this shell has no job control");
    for round in ["<first>", "<second>"] {
        kill(program, Signal::SIGTSTP).unwrap();
        // The shell takes the terminal back when it is told that the program stopped.
        eventually("the shell has the terminal", || session.foreground() == shell);
        session.assert_as_before();
        session.type_in(b"fg\n");
        eventually("the program has the terminal", || session.foreground() == program);
        session.expect_raw();
        session.type_in(round.as_bytes());
        session.expect(round);
    }
    session.type_in(b"\x04");
    session.shell_tells(shell, 15);
}

#[test]
fn a_stop_that_nobody_can_refuse_costs_neither_the_terminal_nor_the_guest() {
    if !have_kvm() {
        return;
    }
    // Whoever stops it so puts the terminal right himself, and it finds its own way again.
    let place = Place::with_kernel(guest::echo());
    let mut session = Session::raw(&place, "run --kernel k");
    let program = Pid::from_raw(session.child.id() as i32);
    for round in ["<first>", "<second>"] {
        stop(program);
        tcsetattr(&session.slave, SetArg::TCSANOW, &session.before).unwrap();
        signal(&session.child, Signal::SIGCONT);
        session.expect_raw();
        session.type_in(round.as_bytes());
        session.expect(round);
    }
    session.type_in(b"\x04");
    assert_eq!(session.end(LIMIT), 15);

    // A shell in between, as with Ctrl-Z.
    let (mut session, shell, program) = Session::in_a_shell(&place);
    for round in ["<first>", "<second>"] {
        stop(program);
        eventually("the shell has the terminal", || session.foreground() == shell);
        tcsetattr(&session.slave, SetArg::TCSANOW, &session.before).unwrap();
        // Going on in the background it leaves the terminal alone: it is the shell's.
        kill(program, Signal::SIGCONT).unwrap();
        session.type_in(b"echo ba''ck\n");
        session.expect("back");
        session.assert_as_before();
        session.type_in(b"fg\n");
        eventually("the program has the terminal", || session.foreground() == program);
        session.expect_raw();
        session.type_in(round.as_bytes());
        session.expect(round);
        session.text.clear();
    }
    session.type_in(b"\x04");
    session.shell_tells(shell, 15);
}

#[test]
fn a_shell_gets_its_terminal_back_from_a_signal_that_nobody_expects() {
    if !have_kvm() {
        return;
    }
    for signal in [
        libc::SIGIO,
        libc::SIGPROF,
        libc::SIGPWR,
        libc::SIGUSR2,
        libc::SIGRTMIN() + 1,
        libc::SIGRTMAX(),
    ] {
        let place = Place::with_kernel(guest::spin());
        let (mut session, shell, program) = Session::in_a_shell(&place);
        // SAFETY: the program is alive: it has the terminal.
        assert_eq!(unsafe { libc::kill(program.as_raw(), signal) }, 0);
        session.shell_tells(shell, 128 + signal);
    }
}

#[test]
fn the_escape_shows_help_and_passes_itself_on() {
    if !have_kvm() {
        return;
    }
    let place = Place::with_kernel(guest::echo());
    let mut session = Session::raw(&place, "run --kernel k");
    session.type_in(b"\x01h");
    session.expect("Ctrl-A x       end the machine\r\n");
    session.expect("Ctrl-A Ctrl-A  send Ctrl-A to the guest\r\n");
    session.type_in(b"<\x01\x01>[\x01z]");
    session.expect("<\x01>[\x01z]");
    session.type_in(b"\x01X");
    assert_eq!(session.end(PROMPT), 130);
}

#[test]
fn the_escape_ends_a_machine_in_which_a_device_blocks_for_ever() {
    if !have_kvm() {
        return;
    }
    let mut best = Duration::MAX;
    // The best of some: the host may be busy.
    for _ in 0..5 {
        let place = Place::new();
        let words = "run --guest tarpit --test-tarpit --control c";
        let mut session = Session::start(&place, words);
        session.expect_raw();
        let stuck = || {
            let why = place.command("ctl c why").output().unwrap();
            String::from_utf8_lossy(&why.stdout).contains("tarpit's turn is run by vcpu0")
        };
        eventually("it is stuck", stuck);
        let begin = Instant::now();
        session.type_in(b"\x01x");
        assert_eq!(session.end(PROMPT), 130);
        best = best.min(begin.elapsed());
        session.expect("device tarpit is stuck in an access");
        if best < Duration::from_secs(2) {
            return;
        }
    }
    panic!("it takes {best:?}");
}

#[test]
fn a_terminal_that_nobody_reads_does_not_hold_up_the_end() {
    if !have_kvm() {
        return;
    }
    let place = Place::with_kernel(guest::flood());
    for end in [Signal::SIGTERM, Signal::SIGINT] {
        place.file("alive", b"");
        let mut session = Session::start_with(&place, "run --kernel k --debug-console file:alive", false);
        session.expect_raw();
        eventually("the guest goes on", || place.read("alive").len() > 500);
        signal(&session.child, end);
        assert_eq!(session.end(PROMPT), 128 + end as i32);
    }
}

#[test]
fn the_escape_works_on_a_terminal_that_nobody_reads() {
    if !have_kvm() {
        return;
    }
    let place = Place::with_kernel(guest::flood());
    let mut session = Session::start_with(&place, "run --kernel k --debug-console file:alive", false);
    session.expect_raw();
    eventually("the guest goes on", || place.read("alive").len() > 500);
    // The help cannot be shown; that must not hold up what comes after it.
    session.type_in(b"\x01h\x01x");
    assert_eq!(session.end(PROMPT), 130);
}

#[test]
fn a_terminal_that_goes_away_ends_the_machine() {
    if !have_kvm() {
        return;
    }
    let place = Place::with_kernel(guest::spin());
    let mut session = Session::start_with(&place, "run --kernel k --log-level error", false);
    session.expect_raw();
    drop(session.master);
    // The kernel sends SIGHUP to the session's leader.
    assert_eq!(wait(&mut session.child, PROMPT), 129);
}
