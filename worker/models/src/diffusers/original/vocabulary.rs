//! The vocabulary of CLIP's tokenizer, which is the same for all its text encoders and which a single file does not hold.

use std::{
    io::{self, Read},
    path::Path,
};

use flate2::read::GzDecoder;
use serde_json::{Map, Value};

/// The pairs that its tokenizer joins, in their order, one a line: OpenAI's `bpe_simple_vocab_16e6.txt`, of which CLIP uses the
/// first 48,894.
const MERGES: &[u8] = include_bytes!("clip_merges.txt.gz");

/// Writes `vocab.json` and `merges.txt`.
///
/// # Errors
/// The files cannot be written.
pub(crate) fn write(folder: &Path) -> io::Result<()> {
    let mut merges = String::new();
    GzDecoder::new(MERGES).read_to_string(&mut merges)?;
    std::fs::write(folder.join("vocab.json"), Value::Object(vocabulary(&merges)).to_string())?;
    std::fs::write(folder.join("merges.txt"), format!("#version: 0.2\n{merges}"))
}

/// Token → index: the bytes, the bytes at a word's end, the pairs, and the two marks.
fn vocabulary(merges: &str) -> Map<String, Value> {
    let bytes = byte_characters();
    let ends = bytes.iter().map(|byte| format!("{byte}</w>"));
    let pairs = merges.lines().map(|line| line.replace(' ', ""));
    let marks = ["<|startoftext|>", "<|endoftext|>"].map(str::to_owned);
    let tokens = bytes.iter().map(char::to_string).chain(ends).chain(pairs).chain(marks);
    tokens.enumerate().map(|(index, token)| (token, index.into())).collect()
}

/// The character that stands for each byte in GPT-2's vocabularies: printable bytes first, which stand for themselves; then
/// the others, as the characters from 256 on.
pub(crate) fn byte_characters() -> Vec<char> {
    let printable = |byte: &u8| matches!(byte, b'!'..=b'~' | 0xa1..=0xac | 0xae..=0xff);
    let own = (0..=u8::MAX).filter(printable).map(char::from);
    let others = (0..=u8::MAX).filter(|byte| !printable(byte)).zip(256_u32..);
    own.chain(others.filter_map(|(_, code)| char::from_u32(code))).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::diffusers::Tokenizer;

    /// Tokens by `open_clip_torch` 3.3.0, `SimpleTokenizer()(text)`, without padding.
    #[test]
    fn texts_become_the_tokens_of_the_public_tokenizer() {
        let folder = tempfile::tempdir().unwrap();
        write(folder.path()).unwrap();
        let tokenizer = Tokenizer::load(folder.path(), 77).unwrap();
        assert_eq!(tokenizer.vocabulary(), 49408);
        for (text, expected) in TOKENS {
            let ids = Vec::<i64>::try_from(tokenizer.encode(&[text]).unwrap().view([-1])).unwrap();
            assert_eq!(&ids[..expected.len()], *expected, "{text}");
            assert!(ids[expected.len()..].iter().all(|id| *id == 49407), "{text}: {ids:?}");
        }
    }

    const TOKENS: &[(&str, &[i64])] = &[
        (
            "a photo of an astronaut riding a horse on mars",
            &[49406, 320, 1125, 539, 550, 18376, 6765, 320, 4558, 525, 7496, 49407],
        ),
        (
            "Ünïcode café, 3.14 & don't!  Zürich — naïve",
            &[
                49406, 6522, 77, 35689, 3217, 15304, 267, 274, 269, 272, 275, 261, 847, 713, 256, 89, 6522,
                4021, 2005, 1097, 35689, 563, 49407,
            ],
        ),
        ("a cat 🐈 / 猫", &[49406, 320, 2368, 2074, 486, 270, 163, 234, 360, 49407]),
        (
            "supercalifragilisticexpialidocious 12345",
            &[49406, 1642, 2857, 13093, 2076, 5868, 26850, 835, 639, 38466, 272, 273, 274, 275, 276, 49407],
        ),
    ];
}
