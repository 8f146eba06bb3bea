//! The lines that the agent in the emulated host sends over that host's second serial port.

use std::fmt::Write as _;

#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Event {
    /// Nothing but that the emulated host still runs; every few seconds.
    Alive,
    /// The agent runs, KVM is loaded; the text says what was found.
    Ready(String),
    /// A job begins; the host side may wait that many seconds for its end.
    Start { job: String, limit: u64 },
    /// What the guest printed, as it comes (only when asked for).
    Console(Vec<u8>),
    /// The job went well; the text may carry figures.
    Pass { job: String, millis: u64, note: String },
    /// The job failed; `Evidence` follows before the next `Start`.
    Fail {
        job: String,
        millis: u64,
        reason: String,
    },
    /// One thing worth reading after a failure.
    Evidence { title: String, text: Vec<u8> },
    /// One boot of a bench.
    Sample(Sample),
    /// All jobs are done.
    End,
}

/// One boot under one VMM.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Sample {
    pub vmm: String,
    pub exec_to_init_us: u64,
    /// Resident memory of the VMM process outside guest RAM.
    pub outside_kib: u64,
    /// The part of `outside_kib` that belongs to no file: heap, stacks, private data.
    pub anonymous_kib: u64,
    /// Resident guest RAM.
    pub guest_kib: u64,
}

impl Event {
    /// One line without its end.
    pub fn encode(&self) -> String {
        match self {
            Event::Alive => "alive".to_owned(),
            Event::Ready(what) => join(&["ready", &escape(what.as_bytes())]),
            Event::Start { job, limit } => join(&["start", &escape(job.as_bytes()), &limit.to_string()]),
            Event::Console(bytes) => join(&["console", &escape(bytes)]),
            Event::Pass { job, millis, note } => join(&[
                "pass",
                &escape(job.as_bytes()),
                &millis.to_string(),
                &escape(note.as_bytes()),
            ]),
            Event::Fail { job, millis, reason } => join(&[
                "fail",
                &escape(job.as_bytes()),
                &millis.to_string(),
                &escape(reason.as_bytes()),
            ]),
            Event::Evidence { title, text } => join(&["evidence", &escape(title.as_bytes()), &escape(text)]),
            Event::Sample(s) => join(&[
                "sample",
                &escape(s.vmm.as_bytes()),
                &s.exec_to_init_us.to_string(),
                &s.outside_kib.to_string(),
                &s.anonymous_kib.to_string(),
                &s.guest_kib.to_string(),
            ]),
            Event::End => "end".to_owned(),
        }
    }

    /// `None` for a line that is not part of the protocol (firmware chatter, a line cut short by a crash).
    pub fn decode(line: &str) -> Option<Event> {
        let mut fields = line.trim_end_matches(['\r', '\n']).split('\t');
        let kind = fields.next()?;
        let mut bytes = || fields.next().map(unescape);
        let event = match kind {
            "alive" => Event::Alive,
            "ready" => Event::Ready(text(bytes()?)),
            "start" => Event::Start {
                job: text(bytes()?),
                limit: number(bytes()?)?,
            },
            "console" => Event::Console(bytes()?),
            "pass" => Event::Pass {
                job: text(bytes()?),
                millis: number(bytes()?)?,
                note: text(bytes()?),
            },
            "fail" => Event::Fail {
                job: text(bytes()?),
                millis: number(bytes()?)?,
                reason: text(bytes()?),
            },
            "evidence" => Event::Evidence {
                title: text(bytes()?),
                text: bytes()?,
            },
            "sample" => Event::Sample(Sample {
                vmm: text(bytes()?),
                exec_to_init_us: number(bytes()?)?,
                outside_kib: number(bytes()?)?,
                anonymous_kib: number(bytes()?)?,
                guest_kib: number(bytes()?)?,
            }),
            "end" => Event::End,
            _ => return None,
        };
        Some(event)
    }
}

fn join(fields: &[&str]) -> String {
    fields.join("\t")
}

fn text(bytes: Vec<u8>) -> String {
    String::from_utf8_lossy(&bytes).into_owned()
}

fn number(bytes: Vec<u8>) -> Option<u64> {
    text(bytes).parse().ok()
}

fn escape(bytes: &[u8]) -> String {
    let mut out = String::with_capacity(bytes.len());
    for &byte in bytes {
        match byte {
            b'\\' => out.push_str("\\\\"),
            b'\n' => out.push_str("\\n"),
            b' '..=b'~' => out.push(byte as char),
            _ => write!(out, "\\x{byte:02x}").expect("a String takes everything"),
        }
    }
    out
}

fn unescape(text: &str) -> Vec<u8> {
    let mut out = Vec::with_capacity(text.len());
    let mut rest = text.as_bytes();
    while let [first, tail @ ..] = rest {
        rest = tail;
        if *first != b'\\' {
            out.push(*first);
            continue;
        }
        match rest {
            [b'n', tail @ ..] => {
                out.push(b'\n');
                rest = tail;
            }
            [b'x', high, low, tail @ ..] => {
                let digit = |d: &u8| (*d as char).to_digit(16).unwrap_or(0) as u8;
                out.push(digit(high) << 4 | digit(low));
                rest = tail;
            }
            [other, tail @ ..] => {
                out.push(*other);
                rest = tail;
            }
            [] => {}
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn events_survive_the_line() {
        let events = [
            Event::Ready("kvm 12\n".to_owned()),
            Event::Start {
                job: "boot/1 cpu".to_owned(),
                limit: 60,
            },
            Event::Console(b"a\tb\\x00\x00\xff\r\n".to_vec()),
            Event::Pass {
                job: "j".to_owned(),
                millis: 12,
                note: String::new(),
            },
            Event::Fail {
                job: "j".to_owned(),
                millis: 12,
                reason: "no\tline".to_owned(),
            },
            Event::Evidence {
                title: "t".to_owned(),
                text: vec![0, 1, 2, 255],
            },
            Event::Sample(Sample {
                vmm: "v".to_owned(),
                exec_to_init_us: 1,
                outside_kib: 2,
                anonymous_kib: 3,
                guest_kib: 4,
            }),
            Event::End,
        ];
        for event in events {
            let line = event.encode();
            assert!(!line.contains('\n'), "{line}");
            assert_eq!(Event::decode(&line), Some(event));
        }
        assert_eq!(Event::decode("SeaBIOS (version 1.16)"), None);
        assert_eq!(Event::decode("pass\tcut"), None);
    }
}
