//! `actor-vmm ctl`: asks a running machine something through its control socket.

use super::verbs::Verb;
use serde_json::{Value, json};
use std::io::{BufRead, BufReader, ErrorKind, Write};
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

/// Asks, and waits for the answer. `stop` waits until the machine has ended.
///
/// # Errors
/// See [`ClientError`].
pub fn ask(path: &Path, verb: Verb) -> Result<Value, ClientError> {
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
    let mut stream = UnixStream::connect(path).map_err(unreachable)?;
    stream.set_read_timeout(Some(ANSWER_LIMIT)).map_err(unreachable)?;
    let request = json!({"verb": verb.name()});
    writeln!(stream, "{request}").map_err(|_| ClientError::Gone)?;
    let mut reader = BufReader::new(stream);
    let mut line = String::new();
    match reader.read_line(&mut line) {
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
        let _ = reader.read_line(&mut line);
    }
    Ok(body)
}

/// An answer for a person.
pub fn in_words(verb: Verb, body: &Value) -> String {
    let text = |value: &Value| match value {
        Value::String(text) => text.clone(),
        other => other.to_string(),
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
            fields.iter().map(row).collect::<Vec<_>>().join("\n")
        }
        _ => text(body),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn answers_read_well() {
        assert_eq!(
            in_words(Verb::Status, &json!({"state": "paused", "vcpus": 2})),
            "state: paused\nvcpus: 2"
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
}
