//! Split a text into pieces. No token crosses the border of a piece.
//!
//! The split pattern of the project and its variants, which differ only in the length of digit groups, have a
//! hand-written scanner. It gives exactly the matches of the regular expression, without backtracking and in linear
//! time. Every other pattern goes through `fancy-regex`; text that such a pattern does not match is skipped.

use crate::unicode::{decode, Classes, ASCII, HIGH, LETTER, NUMBER, OTHER, SPACE};

const BEFORE_DIGITS: &str = r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}{1,";
const AFTER_DIGITS: &str = r"}| ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+";

/// The default pattern: GPT-4's, with groups of up to three digits.
pub const DEFAULT_PATTERN: &str =
    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+";

#[derive(Clone)]
pub enum Splitter {
    Scanner { max_digits: usize },
    Regex(Box<fancy_regex::Regex>),
}

impl Splitter {
    /// An error says what is wrong with the pattern.
    pub fn new(pattern: &str) -> Result<Splitter, String> {
        if pattern.is_empty() {
            return Err("the split pattern is empty; leave it out for the default one".into());
        }
        let digits = pattern.strip_prefix(BEFORE_DIGITS).and_then(|rest| rest.strip_suffix(AFTER_DIGITS));
        if let Some(&[d @ b'1'..=b'9']) = digits.map(str::as_bytes) {
            return Ok(Splitter::Scanner { max_digits: usize::from(d - b'0') });
        }
        Splitter::regex(pattern)
    }

    /// A splitter that uses `fancy-regex`, even for a pattern that the scanner supports.
    pub fn regex(pattern: &str) -> Result<Splitter, String> {
        let regex = fancy_regex::Regex::new(pattern).map_err(|e| format!("invalid split pattern {pattern:?}: {e}"))?;
        Ok(Splitter::Regex(Box::new(regex)))
    }

    /// Calls `piece(start, end)` for every piece of the text, in order. An error means that the regular expression
    /// failed.
    #[inline(always)]
    pub fn pieces(&self, text: &str, mut piece: impl FnMut(usize, usize)) -> Result<(), String> {
        match self {
            Splitter::Scanner { max_digits } => scan(text.as_bytes(), *max_digits, piece),
            Splitter::Regex(regex) => {
                for found in regex.find_iter(text) {
                    let found = found
                        .map_err(|e| format!("the split pattern gave up on a text of {} bytes: {e}", text.len()))?;
                    if found.start() < found.end() {
                        piece(found.start(), found.end());
                    }
                }
            }
        }
        Ok(())
    }

    /// Splits a text into parts of about `size` bytes, so that one long text keeps several threads busy. The pieces of
    /// the parts are the pieces of the text: in the scanned patterns, a newline before an ASCII letter always ends a
    /// piece, since no alternative continues from a newline to a letter, and none looks back. With other patterns the
    /// text is one part.
    pub fn parts<'t>(&self, text: &'t str, size: usize) -> Vec<&'t str> {
        let mut parts = Vec::new();
        let mut rest = text;
        if let Splitter::Scanner { .. } = self {
            while rest.len() > size {
                let bytes = rest.as_bytes();
                let Some(cut) = (size..bytes.len()).find(|&i| bytes[i - 1] == b'\n' && bytes[i].is_ascii_alphabetic())
                else {
                    break;
                };
                parts.push(&rest[..cut]);
                rest = &rest[cut..];
            }
        }
        parts.push(rest);
        parts
    }
}

/// Returns the class and the length in bytes of the character at `i`.
#[inline(always)]
fn class_at(classes: &Classes, text: &[u8], i: usize) -> (u8, usize) {
    match ASCII[text[i] as usize] {
        HIGH => {
            let (code, width) = decode(text, i);
            (classes.of(code), width)
        }
        class => (class, 1),
    }
}

/// Returns the end of the run of letters from `i` on; ASCII is processed eight bytes at a time.
#[inline(always)]
fn letters_end(classes: &Classes, text: &[u8], mut i: usize) -> usize {
    const ONES: u64 = 0x0101_0101_0101_0101;
    const TOP: u64 = 0x80 * ONES;
    loop {
        while let Some(window) = text.get(i..i + 8) {
            let bytes = u64::from_le_bytes(window.try_into().unwrap());
            // the top bit of each byte becomes 1 where the byte is an ASCII letter: lower-cased, from 'a' to 'z'
            let lower = (bytes | (0x20 * ONES)) & !TOP;
            let letters = (lower + (0x80 - b'a' as u64) * ONES) & !(lower + (0x7f - b'z' as u64) * ONES) & !bytes & TOP;
            if letters != TOP {
                i += (letters ^ TOP).trailing_zeros() as usize / 8;
                break;
            }
            i += 8;
        }
        // the byte that stopped the loop above, or one of the last seven of the text
        match text.get(i) {
            None => return i,
            Some(&b) => match ASCII[b as usize] {
                LETTER => i += 1,
                HIGH => {
                    let (code, width) = decode(text, i);
                    if classes.of(code) != LETTER {
                        return i;
                    }
                    i += width;
                }
                _ => return i,
            },
        }
    }
}

/// The matches of the scanned pattern. Its alternatives, in order: (1) endings like `'s`, (2) letters, with at most one
/// character before them that is no letter, number or line end, (3) numbers, (4) other characters, with at most one
/// blank before them and any line ends after them, (5) white space up to its last line end, (6) white space except its
/// last character, where something follows, (7) white space. One of them matches at every position, so the pieces cover
/// the whole text.
#[inline(always)]
fn scan(text: &[u8], max_digits: usize, mut piece: impl FnMut(usize, usize)) {
    let classes = Classes::get();
    let n = text.len();
    let mut i = 0;
    while i < n {
        let first = text[i];
        let (class, width) = class_at(classes, text, i);
        let next = i + width;
        let end = match class {
            LETTER => letters_end(classes, text, next),
            NUMBER => numbers_end(classes, text, next, max_digits - 1),
            _ => {
                let (next_class, next_width) = if next < n { class_at(classes, text, next) } else { (HIGH, 0) };
                let ending = if first == b'\'' { contraction(&text[next..]) } else { 0 };
                if ending > 0 {
                    next + ending
                } else if next_class == LETTER && first != b'\n' && first != b'\r' {
                    letters_end(classes, text, next + next_width)
                } else if class == OTHER {
                    others_end(classes, text, next)
                } else if first == b' ' && next_class == OTHER {
                    others_end(classes, text, next + next_width)
                } else {
                    space_end(classes, text, i)
                }
            }
        };
        piece(i, end);
        i = end;
    }
}

/// Returns how many bytes after an apostrophe belong to it: `(?i:[sdmt]|ll|ve|re)`; where case is ignored, ſ (U+017F)
/// is an s.
#[inline(always)]
fn contraction(rest: &[u8]) -> usize {
    let lower = |k: usize| rest.get(k).map_or(0, u8::to_ascii_lowercase);
    match (lower(0), lower(1)) {
        (b's' | b'd' | b'm' | b't', _) => 1,
        (b'l', b'l') | (b'v' | b'r', b'e') | (0xc5, 0xbf) => 2,
        _ => 0,
    }
}

fn numbers_end(classes: &Classes, text: &[u8], mut i: usize, more: usize) -> usize {
    for _ in 0..more {
        if i >= text.len() {
            break;
        }
        match class_at(classes, text, i) {
            (NUMBER, width) => i += width,
            _ => break,
        }
    }
    i
}

fn others_end(classes: &Classes, text: &[u8], mut i: usize) -> usize {
    while i < text.len() {
        match class_at(classes, text, i) {
            (OTHER, width) => i += width,
            _ => break,
        }
    }
    while i < text.len() && (text[i] == b'\n' || text[i] == b'\r') {
        i += 1;
    }
    i
}

/// End of a piece of white space that begins at `start`.
fn space_end(classes: &Classes, text: &[u8], start: usize) -> usize {
    let mut i = start;
    let mut last = start; // where the last character of the run begins
    let mut after_line_end = 0;
    while i < text.len() {
        let (class, width) = class_at(classes, text, i);
        if class != SPACE {
            break;
        }
        last = i;
        i += width;
        if text[last] == b'\n' || text[last] == b'\r' {
            after_line_end = i;
        }
    }
    if after_line_end > 0 {
        after_line_end
    } else if i == text.len() || last == start {
        i
    } else {
        last
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn cut(splitter: &Splitter, text: &str) -> Vec<(usize, usize)> {
        let mut pieces = Vec::new();
        splitter.pieces(text, |start, end| pieces.push((start, end))).unwrap();
        pieces
    }

    fn both(digits: usize) -> (Splitter, Splitter) {
        let pattern = format!("{BEFORE_DIGITS}{digits}{AFTER_DIGITS}");
        let scanner = Splitter::new(&pattern).unwrap();
        assert!(matches!(scanner, Splitter::Scanner { max_digits } if max_digits == digits));
        (scanner, Splitter::regex(&pattern).unwrap())
    }

    #[test]
    fn the_scanner_knows_the_default_pattern_and_no_other() {
        assert!(matches!(Splitter::new(DEFAULT_PATTERN), Ok(Splitter::Scanner { max_digits: 3 })));
        assert!(matches!(Splitter::new(&DEFAULT_PATTERN.replace("{1,3}", "{1,10}")), Ok(Splitter::Regex(_))));
        assert!(matches!(Splitter::new(r"\w+"), Ok(Splitter::Regex(_))));
        assert!(Splitter::new("(").is_err() && Splitter::new("").is_err());
    }

    #[test]
    fn every_character_of_unicode_is_cut_as_by_the_regular_expression() {
        for digits in [2, 3] {
            let (scanner, regex) = both(digits);
            for c in (0..=0x10_ffff).filter_map(char::from_u32) {
                let text = format!("'{c}a {c}{c}\n{c} \u{a0}'{c}l");
                assert_eq!(cut(&scanner, &text), cut(&regex, &text), "{c:?}");
            }
        }
    }

    #[test]
    fn random_texts_are_cut_as_by_the_regular_expression() {
        let alphabet: Vec<char> =
            "'''sSdtlLvVeErR  \t\r\n\n  09a-.!<é日½\u{3000}\u{17f}\u{212a}\u{301}\u{85}\u{2028}\u{1f600}\u{7f}\0"
                .chars()
                .collect();
        let mut seed = 1u64;
        let mut random = |below: usize| {
            seed = seed.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
            (seed >> 33) as usize % below
        };
        let splitters: Vec<_> = (1..5).map(both).collect();
        for round in 0..60_000 {
            let (scanner, regex) = &splitters[round % 4];
            let length = random(40);
            let text: String = (0..length).map(|_| alphabet[random(alphabet.len())]).collect();
            assert_eq!(cut(scanner, &text), cut(regex, &text), "{text:?}");
        }
    }

    #[test]
    fn a_long_text_cut_into_parts_has_the_same_pieces() {
        let (scanner, regex) = both(2);
        let text = "One line\nTwo\n\n  three \n\n\n'four' \nfive!\n\n\nSix\r\nseven\n 8\n".repeat(50);
        for size in [1, 7, 30, 100, 5000] {
            let parts = scanner.parts(&text, size);
            assert_eq!(parts.concat(), text);
            assert!(size > text.len() || parts.len() > 1);
            let pieces: Vec<&str> =
                parts.iter().flat_map(|part| cut(&scanner, part).into_iter().map(|(s, e)| &part[s..e])).collect();
            let whole: Vec<&str> = cut(&scanner, &text).into_iter().map(|(s, e)| &text[s..e]).collect();
            assert_eq!(pieces, whole);
        }
        assert_eq!(regex.parts(&text, 1).len(), 1);
    }

    #[test]
    fn a_megabyte_of_one_character_takes_linear_time() {
        let (scanner, _) = both(2);
        for (c, pieces) in [(" ", 1), ("a", 1), ("\n", 1), (".", 1), ("7", 500_000)] {
            assert_eq!(cut(&scanner, &c.repeat(1_000_000)).len(), pieces);
        }
        assert_eq!(cut(&scanner, &(" ".repeat(1_000_000) + "a")).len(), 2);
    }
}
