//! Lines in and out of one client, with bounds. Pure: bytes come and go, no descriptor.

/// Bytes of a request, its newline not counted.
pub const LINE_BYTES: usize = 4096;
/// Answers that wait to be read: at this many bytes no more requests are taken from the client. What is asked already
/// is answered beyond, so the memory for a client is this and [`IN_FLIGHT`] answers.
pub const OUTPUT_BYTES: usize = 64 << 10;
/// Requests of one client that are not answered yet.
pub const IN_FLIGHT: usize = 8;

/// A client's bytes.
#[derive(Default)]
pub struct Lines {
    input: Vec<u8>,
    output: Vec<u8>,
    in_flight: usize,
    /// Nothing more comes: what came is answered, then it is over.
    ended: bool,
    /// No more requests are taken.
    closing: bool,
}

/// What is next in the input.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Next {
    /// A whole line.
    Line(Vec<u8>),
    /// Nothing to do now.
    Nothing,
    /// A line longer than [`LINE_BYTES`].
    TooLong,
}

impl Lines {
    /// Whether to read from the client: not while it does not read, or has enough under way.
    pub fn wants_input(&self) -> bool {
        !self.ended && !self.closing && self.may_take()
    }

    fn may_take(&self) -> bool {
        self.output.len() < OUTPUT_BYTES && self.in_flight < IN_FLIGHT
    }

    /// Bytes came.
    pub fn push(&mut self, bytes: &[u8]) {
        self.input.extend_from_slice(bytes);
    }

    /// Whether there is a whole request, or too much for one.
    pub fn has_line(&self) -> bool {
        self.input.len() > LINE_BYTES || self.input.contains(&b'\n')
    }

    /// The next request. One that was taken is under way until [`Lines::answer`].
    pub fn take(&mut self) -> Next {
        if self.closing || !self.may_take() {
            return Next::Nothing;
        }
        match self.input.iter().position(|byte| *byte == b'\n') {
            Some(end) if end <= LINE_BYTES => {
                let mut line: Vec<u8> = self.input.drain(..=end).collect();
                line.pop();
                self.in_flight += 1;
                Next::Line(line)
            }
            // What was typed last need not have an end of its own.
            None if self.ended && (1..=LINE_BYTES).contains(&self.input.len()) => {
                self.in_flight += 1;
                Next::Line(std::mem::take(&mut self.input))
            }
            None if self.input.len() <= LINE_BYTES => Next::Nothing,
            _ => {
                self.input = Vec::new();
                Next::TooLong
            }
        }
    }

    /// The answer to a request that was taken.
    pub fn answer(&mut self, line: &str) {
        self.in_flight = self.in_flight.saturating_sub(1);
        self.say(line);
    }

    /// A line that answers nothing.
    pub fn say(&mut self, line: &str) {
        self.output.extend_from_slice(line.as_bytes());
        self.output.push(b'\n');
    }

    /// The client sends nothing more. What it has sent is taken and answered all the same.
    pub fn end(&mut self) {
        self.ended = true;
    }

    /// Takes no more requests; ends when what was said is read.
    pub fn close(&mut self) {
        self.closing = true;
        self.input = Vec::new();
    }

    /// What waits to be written.
    pub fn output(&self) -> &[u8] {
        &self.output
    }

    /// So much of it was.
    pub fn written(&mut self, bytes: usize) {
        self.output.drain(..bytes);
    }

    /// Nothing will come of this client any more.
    pub fn is_over(&self) -> bool {
        let nothing_left = self.closing || (self.ended && self.input.is_empty());
        nothing_left && self.output.is_empty() && self.in_flight == 0
    }

    /// Nothing is under way for it.
    pub fn is_idle(&self) -> bool {
        self.in_flight == 0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_come_out_whole_however_they_come_in() {
        let mut lines = Lines::default();
        for byte in b"one\ntwo\n" {
            lines.push(&[*byte]);
        }
        assert_eq!(lines.take(), Next::Line(b"one".to_vec()));
        assert_eq!(lines.take(), Next::Line(b"two".to_vec()));
        assert_eq!(lines.take(), Next::Nothing);
    }

    #[test]
    fn a_line_may_have_its_length_and_no_more() {
        let mut lines = Lines::default();
        lines.push(&[b'x'; LINE_BYTES]);
        assert_eq!(lines.take(), Next::Nothing);
        lines.push(b"\n");
        assert_eq!(lines.take(), Next::Line(vec![b'x'; LINE_BYTES]));
        lines.push(&[b'x'; LINE_BYTES + 1]);
        assert_eq!(lines.take(), Next::TooLong);
    }

    #[test]
    fn who_does_not_read_is_not_read_from() {
        let mut lines = Lines::default();
        lines.say(&"x".repeat(OUTPUT_BYTES));
        assert!(!lines.wants_input());
        lines.push(b"more\n");
        assert_eq!(lines.take(), Next::Nothing);
        lines.written(2);
        assert!(lines.wants_input());
        assert_eq!(lines.take(), Next::Line(b"more".to_vec()));
    }

    #[test]
    fn requests_under_way_are_bounded() {
        let mut lines = Lines::default();
        lines.push(&b"x\n".repeat(IN_FLIGHT + 1));
        for _ in 0..IN_FLIGHT {
            assert!(matches!(lines.take(), Next::Line(_)));
        }
        assert_eq!((lines.take(), lines.wants_input()), (Next::Nothing, false));
        lines.answer("y");
        assert!(matches!(lines.take(), Next::Line(_)));
    }

    #[test]
    fn a_closing_client_gets_its_answers_first() {
        let mut lines = Lines::default();
        lines.push(b"x\n");
        lines.take();
        lines.close();
        assert!(!lines.is_over());
        lines.answer("y");
        assert!(!lines.is_over());
        lines.written(2);
        assert!(lines.is_over());
    }

    #[test]
    fn who_has_sent_all_is_answered_all() {
        let mut lines = Lines::default();
        lines.push(&b"x\n".repeat(IN_FLIGHT + 2));
        lines.push(b"last, without an end");
        lines.end();
        for _ in 0..IN_FLIGHT {
            assert!(matches!(lines.take(), Next::Line(_)));
        }
        assert_eq!((lines.take(), lines.wants_input()), (Next::Nothing, false));
        for _ in 0..2 {
            lines.answer("y");
            assert_eq!(lines.take(), Next::Line(b"x".to_vec()));
        }
        assert_eq!(lines.take(), Next::Nothing);
        lines.answer("y");
        assert_eq!(lines.take(), Next::Line(b"last, without an end".to_vec()));
        for _ in 0..IN_FLIGHT {
            assert!(!lines.is_over());
            lines.answer("y");
        }
        assert_eq!((lines.take(), lines.is_over()), (Next::Nothing, false));
        lines.written(lines.output().len());
        assert!(lines.is_over());
        // Of a line that is too long the end is not waited for either.
        let mut lines = Lines::default();
        lines.push(&[b'x'; LINE_BYTES + 1]);
        lines.end();
        assert_eq!(lines.take(), Next::TooLong);
    }
}
