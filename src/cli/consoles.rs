//! What `--console` says: which device, and where it goes. It may be given once for each of the two.

use crate::host::console::ConsoleKind;
use std::str::FromStr;

/// One `--console`.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum ConsoleChoice {
    /// The first serial port.
    Serial(ConsoleKind),
    /// A virtio console.
    Virtio(ConsoleKind),
}

impl FromStr for ConsoleChoice {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let (device, place) = match text.split_once(':') {
            Some((device @ ("virtio" | "serial"), place)) => (device, place),
            _ if text == "virtio" || text == "serial" => (text, "stdio"),
            _ => ("serial", text),
        };
        let kind = place.parse()?;
        Ok(match device {
            "virtio" => ConsoleChoice::Virtio(kind),
            _ => ConsoleChoice::Serial(kind),
        })
    }
}

/// Where the guest's consoles go.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Consoles {
    /// The first serial port. Nowhere, if it is not mentioned and there is a virtio console.
    pub serial: ConsoleKind,
    /// The virtio console, if there is one.
    pub virtio: Option<ConsoleKind>,
}

impl Consoles {
    /// Of all that was said.
    ///
    /// # Errors
    /// When it was said twice of one device.
    pub fn new(choices: &[ConsoleChoice]) -> Result<Consoles, String> {
        let (mut serial, mut virtio) = (None, None);
        for choice in choices {
            let (place, kind, name) = match choice {
                ConsoleChoice::Serial(kind) => (&mut serial, kind, "the serial port"),
                ConsoleChoice::Virtio(kind) => (&mut virtio, kind, "the virtio console"),
            };
            if place.replace(kind.clone()).is_some() {
                return Err(format!(
                    "--console is given twice for {name}; it can go to one place"
                ));
            }
        }
        let otherwise = match virtio {
            Some(_) => ConsoleKind::Off,
            None => ConsoleKind::Stdio,
        };
        Ok(Consoles {
            serial: serial.unwrap_or(otherwise),
            virtio,
        })
    }

    /// The kernel command line when none is given: the consoles, the last of which is /dev/console, and a reset instead of a
    /// hang after a panic.
    pub fn cmdline(&self) -> String {
        let serial = (self.virtio.is_none() || self.serial != ConsoleKind::Off).then_some("console=ttyS0 ");
        let virtio = self.virtio.as_ref().map(|_| "console=hvc0 ");
        let consoles: String = [serial, virtio].into_iter().flatten().collect();
        format!("{consoles}panic=-1")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn consoles(said: &[&str]) -> Result<Consoles, String> {
        let choices: Result<Vec<_>, _> = said.iter().map(|text| text.parse()).collect();
        Consoles::new(&choices?)
    }

    #[test]
    fn a_virtio_console_takes_the_serial_ports_place_unless_that_has_one() {
        use ConsoleKind::{File, Off, Pty, Stdio};
        let file = || File("/x:y".into());
        for (said, serial, virtio, cmdline) in [
            (&[][..], Stdio, None, "console=ttyS0 panic=-1"),
            (&["off"], Off, None, "console=ttyS0 panic=-1"),
            (&["serial:pty"], Pty, None, "console=ttyS0 panic=-1"),
            (&["virtio"], Off, Some(Stdio), "console=hvc0 panic=-1"),
            (&["virtio:file:/x:y"], Off, Some(file()), "console=hvc0 panic=-1"),
            (
                &["virtio", "file:/x:y"],
                file(),
                Some(Stdio),
                "console=ttyS0 console=hvc0 panic=-1",
            ),
            (
                &["serial", "virtio:pty"],
                Stdio,
                Some(Pty),
                "console=ttyS0 console=hvc0 panic=-1",
            ),
        ] {
            let found = consoles(said).unwrap();
            assert_eq!(found.cmdline(), cmdline, "{said:?}");
            assert_eq!(found, Consoles { serial, virtio }, "{said:?}");
        }
    }

    #[test]
    fn mistakes_are_named() {
        for (said, named) in [
            (&["virtio", "virtio:pty"][..], "twice for the virtio console"),
            (&["pty", "serial:off"], "twice for the serial port"),
            (&["virtio:tcp"], "'tcp' is not a console"),
            (&["virtio:file:"], "a path behind the colon"),
            (&["hvc0"], "'hvc0' is not a console"),
        ] {
            let error = consoles(said).unwrap_err();
            assert!(error.contains(named), "{said:?}: {error}");
        }
    }
}
