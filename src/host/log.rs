//! The log: one line a record on stderr, made by slog, never in the way of a vCPU.
//!
//! A record is formatted where it is made and goes through a bounded queue to a thread that writes it. If stderr
//! is a pipe that nobody reads, that thread waits, the queue fills, and further records are counted instead of
//! kept: the guest runs on.

use super::terminal;
use crossbeam_channel::{Receiver, Sender};
use slog::{Drain, KV, Key, Level, Logger, OwnedKVList, Record, o};
use std::fmt::{self, Write as _};
use std::io::Write as _;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

/// Records that wait for stderr. More than a start or a crash makes.
const QUEUE: usize = 256;

/// How long what was logged last may take to be written when the program ends.
pub const LAST_WORDS: Duration = Duration::from_millis(250);

enum Entry {
    Line(String),
    /// Everything before this is written; tell.
    Flush(Sender<()>),
}

/// Gives records to the writing thread.
struct Queue {
    lines: Sender<Entry>,
    lost: Arc<AtomicU64>,
    start: Instant,
}

/// To wait for what was logged.
pub struct LogHandle(Sender<Entry>);

impl LogHandle {
    /// Waits until everything logged so far is on stderr, or until `limit`.
    pub fn flush(&self, limit: Duration) {
        let until = Instant::now() + limit;
        let (done, wait) = crossbeam_channel::bounded(1);
        if self.0.send_deadline(Entry::Flush(done), until).is_ok() {
            let _ = wait.recv_deadline(until);
        }
    }
}

impl Drop for LogHandle {
    fn drop(&mut self) {
        self.flush(LAST_WORDS);
    }
}

/// Starts the log at `level`.
///
/// # Errors
/// When the host cannot start a thread.
pub fn start(level: Level) -> std::io::Result<(Logger, LogHandle)> {
    let (lines, queue) = crossbeam_channel::bounded(QUEUE);
    let lost = Arc::new(AtomicU64::new(0));
    let counted = lost.clone();
    crate::thread::spawn("log", move || write_lines(queue, &counted))?;
    let drain = Queue {
        lines: lines.clone(),
        lost,
        start: Instant::now(),
    };
    Ok((
        Logger::root(drain.filter_level(level).fuse(), o!()),
        LogHandle(lines),
    ))
}

fn write_lines(queue: Receiver<Entry>, lost: &AtomicU64) {
    for entry in queue {
        match entry {
            Entry::Line(line) => {
                let lost = lost.swap(0, Ordering::Relaxed);
                if lost > 0 {
                    print(&format!("{lost} log records lost: stderr was not read in time"));
                }
                print(&line);
            }
            Entry::Flush(done) => {
                let _ = done.send(());
            }
        }
    }
}

/// Writes text for a person to stderr, in one write, with the line ends that the terminal needs now.
pub fn print(text: &str) {
    let mut line = text.to_string();
    line.push('\n');
    if terminal::is_raw() {
        line = line.replace('\n', "\r\n");
    }
    // Nothing can be done about a stderr that cannot be written.
    let _ = std::io::stderr().write_all(line.as_bytes());
}

impl Drain for Queue {
    type Ok = ();
    type Err = slog::Never;

    fn log(&self, record: &Record<'_>, values: &OwnedKVList) -> Result<(), slog::Never> {
        let mut line = String::with_capacity(96);
        let level = record.level().as_str().to_ascii_lowercase();
        let _ = write!(
            line,
            "[{:9.3}] {level}: {}",
            self.start.elapsed().as_secs_f64(),
            record.msg()
        );
        let mut pairs = Pairs(Vec::with_capacity(4));
        let _ = values.serialize(record, &mut pairs);
        let _ = record.kv().serialize(record, &mut pairs);
        // slog hands them over last first.
        line.extend(pairs.0.into_iter().rev());
        if self.lines.try_send(Entry::Line(line)).is_err() {
            self.lost.fetch_add(1, Ordering::Relaxed);
        }
        Ok(())
    }
}

/// Each as ` key=value`.
struct Pairs(Vec<String>);

impl slog::Serializer for Pairs {
    fn emit_arguments(&mut self, key: Key, value: &fmt::Arguments<'_>) -> slog::Result {
        self.0.push(format!(" {key}={value}"));
        Ok(())
    }
}
