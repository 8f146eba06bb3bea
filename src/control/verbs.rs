//! The verbs of the control plane, as JSON objects: one request a line, one answer a line. No transport in here.
//!
//! ```text
//!  {"verb": "pause", "id": 7}
//!  {"verb": "link", "device": "net0", "up": false}
//!  {"id": 7, "ok": {"state": "paused"}}
//!  {"id": 7, "error": {"kind": "refused", "text": "a machine that is paused cannot be paused"}}
//! ```
//!
//! `id` is the asker's own (a number or a string) and comes back; without one there is none in the answer. Answers come
//! in the order in which they are known: what only looks does not wait behind what changes something.

use super::observatory::Observatory;
use crate::actors::PlacementKind;
use crate::machine::holds::Holder;
use crate::machine::request::{Answer, Command};
use crate::vcpu::kick::KickHandle;
use crate::virtio::balloon;
use crate::virtio::balloon::state::Giver;
use crate::virtio::keys::KeyError;
use serde_json::{Map, Value, json};

/// The version of this protocol. Another number means that a client of this one may not be understood; new verbs and
/// new fields do not change it.
pub const PROTOCOL: u64 = 1;

/// What can be asked for.
#[derive(Clone, Copy, PartialEq, Eq, Debug, clap::ValueEnum)]
pub enum Verb {
    /// What the machine is doing
    Status,
    /// Guest and guest time stand still
    Pause,
    /// They go on
    Resume,
    /// Back to power-on, in place: the guest boots again
    Reset,
    /// The machine ends
    Stop,
    /// Makes each vCPU look into its mailbox
    Kick,
    /// Who waits for whom, on which message, for how long
    Why,
    /// All actors, and what is in their mailboxes
    Actors,
    /// Counters
    Metrics,
    /// Switches a network device's link: `link net0 down`, or up
    Link,
    /// The balloon: how large it is, and with a size (`balloon 256M`) another one
    Balloon,
}

/// What is to be done about a verb.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Class {
    /// The answer is read.
    Look,
    /// The machine actor is asked.
    Ask(Command),
}

impl Verb {
    /// All of them.
    pub const ALL: [Verb; 11] = [
        Verb::Status,
        Verb::Pause,
        Verb::Resume,
        Verb::Reset,
        Verb::Stop,
        Verb::Kick,
        Verb::Why,
        Verb::Actors,
        Verb::Metrics,
        Verb::Link,
        Verb::Balloon,
    ];

    /// As it is in a request.
    pub fn name(self) -> &'static str {
        match self {
            Verb::Status => "status",
            Verb::Pause => "pause",
            Verb::Resume => "resume",
            Verb::Reset => "reset",
            Verb::Stop => "stop",
            Verb::Kick => "kick",
            Verb::Why => "why",
            Verb::Actors => "actors",
            Verb::Metrics => "metrics",
            Verb::Link => "link",
            Verb::Balloon => "balloon",
        }
    }

    /// The verb of that name.
    fn named(name: &str) -> Option<Verb> {
        Verb::ALL.into_iter().find(|verb| verb.name() == name)
    }

    /// What is to be done about it. `fields`: the request, with what it is about. The error says what is wrong with it.
    fn class(self, fields: &Map<String, Value>) -> Result<Class, String> {
        Ok(match self {
            Verb::Pause => Class::Ask(Command::Pause),
            Verb::Resume => Class::Ask(Command::Resume),
            Verb::Reset => Class::Ask(Command::Reset),
            Verb::Stop => Class::Ask(Command::Stop),
            Verb::Link => {
                let net = fields.get("device").and_then(Value::as_str).and_then(net_number);
                let up = fields.get("up").and_then(Value::as_bool);
                let (net, up) = net
                    .zip(up)
                    .ok_or("link needs a \"device\", such as \"net0\", and \"up\", true or false")?;
                Class::Ask(Command::Link { net, up })
            }
            Verb::Balloon => match fields.get("size") {
                Some(size) => Class::Ask(Command::Balloon {
                    bytes: size_of(size)?,
                }),
                None => Class::Look,
            },
            Verb::Status | Verb::Kick | Verb::Why | Verb::Actors | Verb::Metrics => Class::Look,
        })
    }
}

/// Bytes, as a number or as `256M`.
fn size_of(value: &Value) -> Result<u64, String> {
    let text = match value {
        Value::String(text) => text.clone(),
        other => other.to_string(),
    };
    balloon::config::size(&text).map_err(|error| error.to_string())
}

/// The number of a network device, by its name.
fn net_number(name: &str) -> Option<usize> {
    let number = name.strip_prefix("net")?.parse().ok()?;
    (format!("net{number}") == name).then_some(number)
}

/// Words that are no request.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub enum WordsError {
    /// There is no such verb.
    #[error("there is no verb '{0}'; there are {all}", all = Verb::ALL.map(Verb::name).join(", "))]
    Unknown(String),
    /// It stands alone.
    #[error("nothing comes behind '{0}'")]
    Alone(&'static str),
    /// A link's words.
    #[error("link needs a device and how it is to be: link net0 down, or up")]
    Link,
    /// A balloon's.
    #[error("balloon {0}")]
    Balloon(#[from] KeyError),
}

/// The request that a person asks for in words: a verb, and what it is about.
///
/// # Errors
/// [`WordsError`].
pub fn from_words(words: &[&str]) -> Result<(Verb, Value), WordsError> {
    let (name, about) = words.split_first().unwrap_or((&"", &[]));
    let verb = Verb::named(name).ok_or_else(|| WordsError::Unknown(name.escape_debug().to_string()))?;
    let request = match (verb, about) {
        (Verb::Link, [device, state @ ("up" | "down")]) if net_number(device).is_some() => {
            json!({"verb": verb.name(), "device": device, "up": *state == "up"})
        }
        (Verb::Link, _) => return Err(WordsError::Link),
        (Verb::Balloon, [size]) => json!({"verb": verb.name(), "size": balloon::config::size(size)?}),
        (_, []) => json!({"verb": verb.name()}),
        _ => return Err(WordsError::Alone(verb.name())),
    };
    Ok((verb, request))
}

/// The asker's own name for a request; `None` if it gave none.
pub type Id = Option<Value>;

/// One line, as far as it can be understood.
///
/// # Errors
/// The answer to what cannot.
pub fn parse(line: &[u8]) -> Result<(Verb, Class, Id), Value> {
    let malformed = |id: Id, text: String| error(id, "malformed", text);
    let value: Value = serde_json::from_slice(line)
        .map_err(|why| malformed(None, format!("a line is one JSON object: {why}")))?;
    let Value::Object(mut fields) = value else {
        return Err(malformed(None, "a line is one JSON object".into()));
    };
    let id = fields.remove("id");
    if id
        .as_ref()
        .is_some_and(|id| !(id.is_number() || id.is_string() || id.is_null()))
    {
        return Err(malformed(None, "an id is a number or a string".into()));
    }
    let id = id.filter(|id| !id.is_null());
    let Some(Value::String(name)) = fields.get("verb") else {
        return Err(malformed(id, "there is no \"verb\", or it is no string".into()));
    };
    let Some(verb) = Verb::named(name) else {
        let all = Verb::ALL.map(Verb::name).join(", ");
        let text = format!("there is no such verb; there are {all}");
        return Err(error(id, "unknown-verb", text));
    };
    match verb.class(&fields) {
        Ok(class) => Ok((verb, class, id)),
        Err(text) => Err(malformed(id, text)),
    }
}

fn answer(id: Id, key: &str, body: Value) -> Value {
    let mut fields = Map::new();
    if let Some(id) = id {
        fields.insert("id".into(), id);
    }
    fields.insert(key.into(), body);
    Value::Object(fields)
}

/// It worked.
pub fn ok(id: Id, body: Value) -> Value {
    answer(id, "ok", body)
}

/// It did not. `kind` is for programs, `text` for people.
pub fn error(id: Id, kind: &str, text: String) -> Value {
    answer(id, "error", json!({"kind": kind, "text": text}))
}

/// What the machine actor said.
pub fn answered(id: Id, said: Answer) -> Value {
    let kind_of = |kind: &str, text: String| error(id.clone(), kind, text);
    match said {
        Answer::Done(state) => ok(id, json!({"state": state.to_string()})),
        Answer::Refused(refused) => kind_of("refused", refused.to_string()),
        Answer::Waits(state, whom) => {
            let text = format!("the machine is {state}; it waits for {}", whom.join(", "));
            let body = json!({"kind": "waits", "text": text, "state": state.to_string(), "waits": whom});
            answer(id, "error", body)
        }
        Answer::Overtaken(state) => kind_of(
            "overtaken",
            format!("somebody asked for something else before it was done; the machine was {state}"),
        ),
        Answer::Failed(why) => kind_of("failed", why),
        Answer::NoSuchDevice => no_such_device(id),
        Answer::Unfit(why) => kind_of("refused", why),
        Answer::Gone => kind_of(
            "gone",
            "the machine ends, or is too busy to take a request".into(),
        ),
    }
}

/// It would be about a device that is not there.
fn no_such_device(id: Id) -> Value {
    error(id, "no-such-device", "the machine has no such device".into())
}

/// The answer to a verb that only looks.
pub fn look(verb: Verb, id: Id, from: &mut Observatory, kicks: &[KickHandle]) -> Value {
    if verb == Verb::Balloon {
        return match &from.balloon {
            Some(balloon) => ok(id, size_and_figures(balloon)),
            None => no_such_device(id),
        };
    }
    ok(id, look_at(verb, from, kicks))
}

fn size_and_figures(balloon: &balloon::Balloon) -> Value {
    let mut fields = Map::new();
    let mut put = |name: &str, value: u64| drop(fields.insert(name.into(), value.into()));
    put("wanted_bytes", balloon.wanted_bytes());
    put("actual_bytes", balloon.actual_bytes());
    put("inflated_bytes_total", balloon.given_bytes(Giver::Inflate));
    put("reported_bytes_total", balloon.given_bytes(Giver::Report));
    for (name, value) in balloon.figures() {
        put(&format!("guest_{name}"), value);
    }
    Value::Object(fields)
}

fn look_at(verb: Verb, from: &mut Observatory, kicks: &[KickHandle]) -> Value {
    match verb {
        Verb::Why => serde_json::to_value(from.look().graph()).unwrap_or(Value::Null),
        Verb::Kick => {
            for kick in kicks {
                kick.kick();
            }
            json!({"vcpus": kicks.len()})
        }
        Verb::Actors => actors(from),
        Verb::Metrics => metrics(from),
        // What acts is answered elsewhere.
        _ => json!({
            "state": from.published.state().to_string(),
            "held_by": Holder::ALL
                .into_iter()
                .filter(|who| from.published.holds().has(*who))
                .map(Holder::name)
                .collect::<Vec<_>>(),
            "vcpus": from.vcpus.len(),
            "dispatch": from.dispatch.to_string(),
            "resets": from.published.resets(),
            "guest_time_ns": from.clock.now().0,
            "uptime_ms": from.begun.elapsed().as_millis() as u64,
            "pid": std::process::id(),
            "version": env!("CARGO_PKG_VERSION"),
            "protocol": PROTOCOL,
        }),
    }
}

fn actors(from: &mut Observatory) -> Value {
    let seen = from.look();
    let machine = json!({"name": "machine", "rank": "supervisor", "doing": seen.state.to_string()});
    let thread = |rank: &str, seen: &super::why::Seen| json!({"name": seen.name, "rank": rank, "doing": seen.doing.to_string()});
    let vcpus = seen.vcpus.iter().map(|seen| thread("vcpu", seen));
    let devices = seen.devices.iter().map(|device| match &device.mailbox {
        None => json!({"name": device.name, "rank": "device"}),
        Some(mailbox) => json!({
            "name": device.name,
            "rank": "device",
            "placement": match mailbox.placement {
                PlacementKind::Handoff => "handoff",
                PlacementKind::Thread => "thread",
                PlacementKind::Pool => "pool",
            },
            "held": mailbox.held,
            "asleep": mailbox.asleep,
            "closed": mailbox.closed,
            "calls": mailbox.lanes.iter().filter(|lane| lane.call != crate::actors::CallLook::Nothing).count(),
            "posts": mailbox.lanes.iter().map(|lane| lane.posts).sum::<u32>(),
        }),
    });
    let others = seen.others.iter().map(|seen| thread("backend", seen));
    let all: Vec<Value> = std::iter::once(machine)
        .chain(vcpus)
        .chain(devices)
        .chain(others)
        .collect();
    json!({"actors": all})
}

fn metrics(from: &mut Observatory) -> Value {
    let seen = from.look();
    let vcpus = seen.vcpus.iter();
    json!({
        "uptime_ms": from.begun.elapsed().as_millis() as u64,
        "guest_time_ns": from.clock.now().0,
        "resets": from.published.resets(),
        "exits": vcpus.clone().map(|vcpu| vcpu.exits).sum::<u64>(),
        "vcpus": vcpus
            .map(|vcpu| json!({"name": vcpu.name, "exits": vcpu.exits}))
            .collect::<Vec<_>>(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::machine::state::{Refused, State, Transition};

    #[test]
    fn requests_are_understood() {
        for verb in Verb::ALL {
            let name = verb.name();
            let line = format!(r#"{{"verb": "{name}", "device": "net3", "up": true, "id": 7, "later": []}}"#);
            let (parsed, _, id) = parse(line.as_bytes()).unwrap();
            assert_eq!((parsed, id), (verb, Some(json!(7))));
        }
        assert_eq!(parse(b"{\"verb\":\"why\"}"), Ok((Verb::Why, Class::Look, None)));
        assert_eq!(
            parse(b"{\"verb\":\"why\",\"id\":\"a\"}"),
            Ok((Verb::Why, Class::Look, Some(json!("a"))))
        );
        let link = |net, up| Class::Ask(Command::Link { net, up });
        assert_eq!(
            parse(br#"{"verb": "link", "device": "net12", "up": false}"#),
            Ok((Verb::Link, link(12, false), None))
        );
        for (size, bytes) in [("\"256M\"", 256 << 20), ("8192", 8192), ("0", 0)] {
            let line = format!("{{\"verb\":\"balloon\",\"size\":{size}}}");
            let class = Class::Ask(Command::Balloon { bytes });
            assert_eq!(parse(line.as_bytes()), Ok((Verb::Balloon, class, None)));
        }
    }

    #[test]
    fn words_become_the_request_that_is_understood() {
        for verb in Verb::ALL.into_iter().filter(|verb| *verb != Verb::Link) {
            let takes_one = verb == Verb::Balloon;
            let (said, request) = from_words(&[verb.name()]).unwrap();
            assert_eq!(said, verb);
            assert_eq!(parse(request.to_string().as_bytes()).unwrap().0, verb);
            let two = if takes_one { &["1M", "now"][..] } else { &["now"] };
            assert_eq!(
                from_words(&[&[verb.name()], two].concat()),
                Err(WordsError::Alone(verb.name()))
            );
        }
        for (word, up) in [("up", true), ("down", false)] {
            let (_, request) = from_words(&["link", "net1", word]).unwrap();
            let (_, class, _) = parse(request.to_string().as_bytes()).unwrap();
            assert_eq!(class, Class::Ask(Command::Link { net: 1, up }));
        }
        let (_, request) = from_words(&["balloon", "256M"]).unwrap();
        let (_, class, _) = parse(request.to_string().as_bytes()).unwrap();
        assert_eq!(class, Class::Ask(Command::Balloon { bytes: 256 << 20 }));
        let error = from_words(&["balloon", "now"]).unwrap_err();
        assert!(error.to_string().starts_with("balloon size=now: "), "{error}");
        for words in [
            &["link"][..],
            &["link", "net0"],
            &["link", "net0", "sideways"],
            &["link", "0", "up"],
            &["link", "net", "up"],
            &["link", "net00", "up"],
            &["link", "net0", "up", "now"],
        ] {
            assert_eq!(from_words(words), Err(WordsError::Link), "{words:?}");
        }
        for words in [&[][..], &["fly"], &["Pause"]] {
            assert!(
                matches!(from_words(words), Err(WordsError::Unknown(_))),
                "{words:?}"
            );
        }
    }

    #[test]
    fn what_is_not_a_request_is_told_what_is_wrong_and_gets_its_id_back() {
        for (line, kind, id) in [
            (&b""[..], "malformed", None),
            (b"pause", "malformed", None),
            (b"[]", "malformed", None),
            (b"{}", "malformed", None),
            (b"\xff\xfe", "malformed", None),
            (b"{\"verb\": 1, \"id\": 3}", "malformed", Some(json!(3))),
            (b"{\"verb\": \"pause\", \"id\": {}}", "malformed", None),
            (b"{\"verb\": \"fly\", \"id\": 3}", "unknown-verb", Some(json!(3))),
            (b"{\"verb\": \"link\", \"id\": 3}", "malformed", Some(json!(3))),
            (
                b"{\"verb\": \"balloon\", \"size\": 1, \"id\": 3}",
                "malformed",
                Some(json!(3)),
            ),
            (b"{\"verb\": \"balloon\", \"size\": {}}", "malformed", None),
            (
                b"{\"verb\": \"link\", \"device\": \"net0\", \"up\": 1}",
                "malformed",
                None,
            ),
            (
                b"{\"verb\": \"link\", \"device\": 0, \"up\": true}",
                "malformed",
                None,
            ),
            (
                b"{\"verb\": \"link\", \"device\": \"net-1\", \"up\": true}",
                "malformed",
                None,
            ),
        ] {
            let answer = parse(line).unwrap_err();
            assert_eq!(answer["error"]["kind"], kind, "{line:?}");
            assert_eq!(answer.get("id").cloned(), id, "{line:?}");
        }
        let deep = [b"[".repeat(4000), b"]".repeat(4000)].concat();
        assert_eq!(parse(&deep).unwrap_err()["error"]["kind"], "malformed");
    }

    #[test]
    fn answers_have_kinds() {
        let refused = Answer::Refused(Refused(State::Paused, Transition::Pause));
        for (said, kind) in [
            (refused, "refused"),
            (Answer::Waits(State::Pausing, vec!["vcpu0".into()]), "waits"),
            (Answer::Overtaken(State::Running), "overtaken"),
            (Answer::Failed("why".into()), "failed"),
            (Answer::Unfit("why".into()), "refused"),
            (Answer::NoSuchDevice, "no-such-device"),
            (Answer::Gone, "gone"),
        ] {
            assert_eq!(answered(None, said)["error"]["kind"], kind);
        }
        assert_eq!(
            answered(Some(json!(1)), Answer::Done(State::Paused)),
            json!({"id": 1, "ok": {"state": "paused"}})
        );
    }
}
