//! `key=value,key=value`: what `--disk` and `--net` say, in pieces.

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
    fn a_comma_splits_and_two_are_one() {
        assert_eq!(items("a,b,,c,"), ["a", "b,c", ""]);
        assert_eq!(items(""), [""]);
    }
}
