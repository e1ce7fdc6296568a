//! The class of each character: letter (`\p{L}`), number (`\p{N}`) or white space (`\s`). The table is built at first
//! use from those of the `regex-syntax` crate, so that the scanner and the regular expressions use the same version of
//! Unicode.

use regex_syntax::hir::{Class, HirKind};
use std::sync::OnceLock;

pub const OTHER: u8 = 0;
pub const LETTER: u8 = 1;
pub const NUMBER: u8 = 2;
pub const SPACE: u8 = 3;

/// Classes by code point, in blocks of 256; equal blocks are stored once.
pub struct Classes {
    block_of: [u8; 0x1100],
    blocks: Vec<[u8; 256]>,
}

impl Classes {
    pub fn get() -> &'static Classes {
        static CLASSES: OnceLock<Classes> = OnceLock::new();
        CLASSES.get_or_init(Classes::build)
    }

    fn build() -> Classes {
        let mut flat = vec![OTHER; 0x11_0000];
        for (pattern, class) in [(r"\p{L}", LETTER), (r"\p{N}", NUMBER), (r"\s", SPACE)] {
            let hir = regex_syntax::parse(pattern).expect("a fixed pattern");
            let HirKind::Class(Class::Unicode(ranges)) = hir.kind() else { unreachable!("a class of characters") };
            for range in ranges.iter() {
                flat[range.start() as usize..=range.end() as usize].fill(class);
            }
        }
        let mut classes = Classes { block_of: [0; 0x1100], blocks: Vec::new() };
        for (page, block) in flat.chunks_exact(256).enumerate() {
            let found = classes.blocks.iter().position(|other| other == block);
            let index = found.unwrap_or_else(|| {
                classes.blocks.push(block.try_into().unwrap());
                classes.blocks.len() - 1
            });
            classes.block_of[page] = index.try_into().expect("fewer than 256 distinct blocks");
        }
        classes
    }

    /// Returns the class of a code point below 0x110000.
    #[inline(always)]
    pub fn of(&self, code: u32) -> u8 {
        self.blocks[self.block_of[(code >> 8) as usize] as usize][(code & 0xff) as usize]
    }
}

/// Classes of the ASCII bytes. Bytes from 0x80 on are `HIGH`: decode the character and look it up in `Classes`.
pub const HIGH: u8 = 4;
pub const ASCII: [u8; 256] = {
    let mut table = [OTHER; 256];
    let mut b = 0;
    while b < 256 {
        table[b] = match b as u8 {
            b'a'..=b'z' | b'A'..=b'Z' => LETTER,
            b'0'..=b'9' => NUMBER,
            b' ' | b'\t'..=b'\r' => SPACE,
            0x80..=0xff => HIGH,
            _ => OTHER,
        };
        b += 1;
    }
    table
};

/// Returns the code point and the length in bytes of the character at `text[i]`, a byte from 0x80 on, in valid UTF-8.
#[inline(always)]
pub fn decode(text: &[u8], i: usize) -> (u32, usize) {
    let at = |k: usize| u32::from(text.get(i + k).copied().unwrap_or(0) & 0x3f);
    let first = u32::from(text[i]);
    if first < 0xe0 {
        ((first & 0x1f) << 6 | at(1), 2)
    } else if first < 0xf0 {
        ((first & 0x0f) << 12 | at(1) << 6 | at(2), 3)
    } else {
        // the mask keeps invalid bytes inside the table
        (((first & 0x07) << 18 | at(1) << 12 | at(2) << 6 | at(3)) % 0x11_0000, 4)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ascii_table_and_decoding_agree_with_the_classes() {
        let classes = Classes::get();
        for code in 0..128u32 {
            assert_eq!(ASCII[code as usize], classes.of(code), "{code}");
        }
        for c in (0x80..=0x10_ffff).filter_map(char::from_u32) {
            let mut buffer = [0; 4];
            let text = c.encode_utf8(&mut buffer).as_bytes();
            assert_eq!(decode(text, 0), (c as u32, text.len()));
        }
        assert_eq!(classes.of('é' as u32), LETTER);
        assert_eq!(classes.of('½' as u32), NUMBER);
        assert_eq!(classes.of(0x3000), SPACE);
        assert_eq!(classes.of('€' as u32), OTHER);
    }
}
