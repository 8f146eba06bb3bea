//! `key=value,key=value`: what `--disk` and `--net` say, in pieces.

use crate::machine::memory::parse_bytes;

/// A rate, as `rate=10M` (bytes a second) or `iops=500` say it.
pub fn rate(text: &str) -> Option<u64> {
    parse_bytes(text).ok().filter(|rate| *rate > 0)
}

/// The same of operations.
pub fn operations(text: &str) -> Option<u64> {
    // parse takes a sign.
    let digits = text.bytes().all(|byte| byte.is_ascii_digit());
    text.parse().ok().filter(|rate| digits && *rate > 0)
}

/// Splits at single commas; two of them stand for one.
pub fn items(text: &str) -> Vec<String> {
    let mut items = vec![String::new()];
    let mut characters = text.chars().peekable();
    while let Some(character) = characters.next() {
        if character == ',' && characters.next_if_eq(&',').is_none() {
            items.push(String::new());
        } else {
            items.last_mut().expect("never empty").push(character);
        }
    }
    items
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rates_are_above_zero() {
        assert_eq!(
            (rate("10M"), rate("1"), rate("0"), rate("fast")),
            (Some(10 << 20), Some(1), None, None)
        );
        assert_eq!(
            (
                operations("500"),
                operations("+5"),
                operations("0"),
                operations("")
            ),
            (Some(500), None, None, None)
        );
    }

    #[test]
    fn a_comma_splits_and_two_are_one() {
        assert_eq!(items("a,b,,c,"), ["a", "b,c", ""]);
        assert_eq!(items(""), [""]);
    }
}
