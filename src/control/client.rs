//! `actor-vmm ctl`: asks a running machine something through its control socket, or one thing after the other as a script
//! says.

use super::verbs::{self, Verb, WordsError};
use serde_json::Value;
use std::io::{BufRead, BufReader, ErrorKind, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

/// How long an answer may take: the machine names whom it waits for after 2 s, and a reset in place loads the guest
/// anew.
const ANSWER_LIMIT: Duration = Duration::from_secs(60);

/// Why there is no answer.
#[derive(Debug, thiserror::Error)]
pub enum ClientError {
    /// Nobody is there.
    #[error("no machine can be reached at {path}: {why}")]
    Unreachable {
        /// As given.
        path: String,
        /// What to do.
        why: &'static str,
        /// What the host says.
        source: std::io::Error,
    },
    /// The connection broke.
    #[error("the machine has gone away before it answered")]
    Gone,
    /// It took too long.
    #[error("the machine has not answered within {} s", ANSWER_LIMIT.as_secs())]
    Silent,
    /// The answer cannot be understood.
    #[error("what is at that socket does not answer as a machine does")]
    NotAMachine,
    /// The answer is that it cannot be done.
    #[error("{text}")]
    Refused {
        /// For programs.
        kind: String,
        /// For people.
        text: String,
    },
}

/// A machine that can be asked, one verb after the other.
pub struct Connection(BufReader<UnixStream>);

impl Connection {
    /// Connects.
    ///
    /// # Errors
    /// [`ClientError::Unreachable`].
    pub fn open(path: &Path) -> Result<Connection, ClientError> {
        let unreachable = |source: std::io::Error| ClientError::Unreachable {
            path: path.display().to_string(),
            why: match source.kind() {
                ErrorKind::NotFound => "there is no such socket; was it started with --control?",
                ErrorKind::ConnectionRefused => "nobody listens there; the machine has ended",
                ErrorKind::PermissionDenied => "it is another user's",
                _ => "it cannot be connected to",
            },
            source,
        };
        let stream = UnixStream::connect(path).map_err(unreachable)?;
        stream.set_read_timeout(Some(ANSWER_LIMIT)).map_err(unreachable)?;
        Ok(Connection(BufReader::new(stream)))
    }

    /// Asks, and waits for the answer. `stop` waits until the machine has ended. `request` is what
    /// [`verbs::from_words`] has made.
    ///
    /// # Errors
    /// All others of [`ClientError`].
    pub fn ask(&mut self, verb: Verb, request: &Value) -> Result<Value, ClientError> {
        // In one piece, so that it is one packet and one look of the machine's.
        let request = format!("{request}\n");
        self.0
            .get_mut()
            .write_all(request.as_bytes())
            .map_err(|_| ClientError::Gone)?;
        let mut line = String::new();
        match self.0.read_line(&mut line) {
            Ok(0) => return Err(ClientError::Gone),
            Ok(_) => {}
            Err(error) if error.kind() == ErrorKind::WouldBlock => return Err(ClientError::Silent),
            Err(_) => return Err(ClientError::Gone),
        }
        let mut answer: Value = serde_json::from_str(&line).map_err(|_| ClientError::NotAMachine)?;
        if let Some(error) = answer.get("error") {
            let text = |key| error.get(key).and_then(Value::as_str).unwrap_or("?").to_string();
            return Err(ClientError::Refused {
                kind: text("kind"),
                text: text("text"),
            });
        }
        let body = answer
            .get_mut("ok")
            .map(Value::take)
            .ok_or(ClientError::NotAMachine)?;
        if verb == Verb::Stop {
            // It closes its end when it is over.
            line.clear();
            let _ = self.0.read_line(&mut line);
        }
        Ok(body)
    }
}

/// Bytes of a line of a script: more than any verb, and room for a comment.
const SCRIPT_LINE_BYTES: u64 = 256;

/// Why a line of a script is no verb.
#[derive(Debug, thiserror::Error)]
pub enum ScriptError {
    /// No request.
    #[error("line {line}: {why}")]
    Words {
        /// The line's number, from 1.
        line: usize,
        /// What is wrong.
        why: WordsError,
    },
    /// Something without an end.
    #[error("line {line}: a line is one verb, and has less than {SCRIPT_LINE_BYTES} bytes")]
    TooLong {
        /// The line's number.
        line: usize,
    },
    /// The host.
    #[error("line {line} cannot be read")]
    Unreadable {
        /// The line's number.
        line: usize,
        /// What the host says.
        source: std::io::Error,
    },
}

/// Verbs, one a line, as they come. Blank lines and what is behind a `#` are nothing.
pub struct Script<R> {
    from: R,
    /// Of the last verb, from 1.
    line: usize,
}

impl<R: BufRead> Script<R> {
    /// From the first line on.
    pub fn new(from: R) -> Script<R> {
        Script { from, line: 0 }
    }

    /// Where the last verb was.
    pub fn line(&self) -> usize {
        self.line
    }
}

impl<R: BufRead> Iterator for Script<R> {
    type Item = Result<(Verb, Value), ScriptError>;

    fn next(&mut self) -> Option<Self::Item> {
        loop {
            self.line += 1;
            let line = self.line;
            let mut bytes = Vec::new();
            match (&mut self.from)
                .take(SCRIPT_LINE_BYTES)
                .read_until(b'\n', &mut bytes)
            {
                Ok(0) => return None,
                Ok(length) if length as u64 == SCRIPT_LINE_BYTES && bytes.last() != Some(&b'\n') => {
                    return Some(Err(ScriptError::TooLong { line }));
                }
                Ok(_) => {}
                Err(source) => return Some(Err(ScriptError::Unreadable { line, source })),
            }
            let text = String::from_utf8_lossy(&bytes);
            let said = text.split('#').next().unwrap_or_default();
            let words: Vec<&str> = said.split_whitespace().collect();
            if !words.is_empty() {
                return Some(verbs::from_words(&words).map_err(|why| ScriptError::Words { line, why }));
            }
        }
    }
}

/// An answer for a person.
pub fn in_words(verb: Verb, body: &Value) -> String {
    let word = |value: &Value| match value {
        Value::String(text) => text.clone(),
        other => other.to_string(),
    };
    let text = |value: &Value| match value {
        Value::Array(words) => words.iter().map(word).collect::<Vec<_>>().join(", "),
        other => word(other),
    };
    match (verb, body) {
        (Verb::Why, Value::Object(fields)) => {
            let lines = fields.get("lines").and_then(Value::as_array);
            let lines = lines.into_iter().flatten().map(text);
            lines.collect::<Vec<_>>().join("\n")
        }
        (Verb::Actors, Value::Object(fields)) => {
            let actors = fields.get("actors").and_then(Value::as_array);
            let row = |actor: &Value| {
                let Value::Object(fields) = actor else {
                    return text(actor);
                };
                let name = fields.get("name").map_or("?".into(), text);
                let rest = fields.iter().filter(|(key, _)| *key != "name");
                let rest: Vec<_> = rest
                    .map(|(key, value)| format!("{key}={}", text(value)))
                    .collect();
                format!("{name:14} {}", rest.join(" "))
            };
            let rows = actors.into_iter().flatten().map(row);
            rows.collect::<Vec<_>>().join("\n")
        }
        (_, Value::Object(fields)) => {
            let row = |(key, value): (&String, &Value)| format!("{key}: {}", text(value));
            let said = fields
                .iter()
                .filter(|(_, value)| value.as_array().is_none_or(|words| !words.is_empty()));
            said.map(row).collect::<Vec<_>>().join("\n")
        }
        _ => text(body),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn answers_read_well() {
        assert_eq!(
            in_words(
                Verb::Status,
                &json!({"held_by": ["control", "gdb"], "state": "paused", "vcpus": 2, "waits": []})
            ),
            "held_by: control, gdb\nstate: paused\nvcpus: 2"
        );
        assert_eq!(in_words(Verb::Why, &json!({"lines": ["a", "b"]})), "a\nb");
        assert_eq!(
            in_words(
                Verb::Actors,
                &json!({"actors": [{"name": "rtc", "rank": "device", "posts": 0}]})
            ),
            "rtc            posts=0 rank=device"
        );
    }

    #[test]
    fn a_script_is_verbs_and_comments() {
        let script = |text: &'static [u8]| {
            Script::new(text).map(|said| said.map(|(verb, _)| verb).map_err(|error| error.to_string()))
        };
        let verbs: Result<Vec<_>, _> =
            script(b"pause\n\n # nothing\n  resume # at last \r\nlink  net0\tdown\nstatus").collect();
        assert_eq!(
            verbs,
            Ok(vec![Verb::Pause, Verb::Resume, Verb::Link, Verb::Status])
        );
        assert_eq!(script(b"").count(), 0);
        let mut bad = script(b"pause\n\nfly\xff\x1b\n");
        assert_eq!(bad.next(), Some(Ok(Verb::Pause)));
        let said = bad.next().unwrap().unwrap_err();
        assert!(
            said.starts_with("line 3: there is no verb 'fly\u{fffd}\\u{1b}'; there are status, pause,"),
            "{said}"
        );
        let mut endless = Script::new(BufReader::new(std::io::repeat(b'x')));
        assert!(matches!(
            endless.next(),
            Some(Err(ScriptError::TooLong { line: 1 }))
        ));
    }
}
