//! Inputs for decoders: valid ones with edits, which reach further into a decoder than random bytes do.
//!
//! A test states what holds for every input: an error or a value, no panic, and memory within the limit of the test
//! program's allocator. `POTSTILL_FUZZ_CASES` sets the number of inputs of each test. proptest keeps an input that fails,
//! made as small as it can, in a file beside the test, and tries it first from then on.

use proptest::{prelude::*, sample::Index, test_runner::FileFailurePersistence};

/// The most that a decoder's test program may hold, in bytes: far above what any of the inputs needs.
pub const MEMORY: usize = 2 << 30;

/// The configuration of a test, with `usual` inputs.
///
/// # Panics
/// `POTSTILL_FUZZ_CASES` is no number.
#[must_use]
pub fn cases(usual: u32) -> ProptestConfig {
    let cases = std::env::var("POTSTILL_FUZZ_CASES").map_or(usual, |text| text.parse().expect("a number"));
    ProptestConfig {
        cases,
        failure_persistence: Some(Box::new(FileFailurePersistence::WithSource("regressions"))),
        max_shrink_iters: 20_000,
        ..ProptestConfig::default()
    }
}

#[derive(Clone, Debug)]
enum Edit {
    Flip {
        at: Index,
        bit: u8,
    },
    Set {
        at: Index,
        byte: u8,
    },
    Insert {
        at: Index,
        bytes: Vec<u8>,
    },
    Remove {
        at: Index,
        length: usize,
    },
    Repeat {
        at: Index,
        length: usize,
        times: usize,
    },
    /// Replaces a run of digits, in texts.
    Number {
        at: Index,
        number: &'static str,
    },
    /// Replaces eight bytes, in binary formats.
    Word {
        at: Index,
        word: u64,
    },
    /// Goes on with another seed.
    Splice {
        at: Index,
        seed: Index,
        from: Index,
    },
    Truncate {
        at: Index,
    },
}

fn edit() -> impl Strategy<Value = Edit> {
    let at = any::<Index>;
    let numbers = [
        "0",
        "-1",
        "1e999",
        "-0",
        "0.5",
        "18446744073709551615",
        "9223372036854775807",
        "-9223372036854775808",
        "4294967296",
        "99999999999999999999999",
        "NaN",
        "\"\"",
        "null",
        "[]",
        "{}",
        "[[[[[[[[",
    ];
    let words = [0, 1, 0x7f, 0xff, 0x7fff_ffff, 0x8000_0000, u64::MAX, u64::MAX / 2, 1 << 40, 1 << 62];
    prop_oneof![
        (at(), 0..8u8).prop_map(|(at, bit)| Edit::Flip { at, bit }),
        (at(), any::<u8>()).prop_map(|(at, byte)| Edit::Set { at, byte }),
        (at(), prop::collection::vec(any::<u8>(), 1..9)).prop_map(|(at, bytes)| Edit::Insert { at, bytes }),
        (at(), 1..40usize).prop_map(|(at, length)| Edit::Remove { at, length }),
        (at(), 1..40usize, 1..20usize).prop_map(|(at, length, times)| Edit::Repeat { at, length, times }),
        (at(), prop::sample::select(numbers.to_vec())).prop_map(|(at, number)| Edit::Number { at, number }),
        (at(), prop::sample::select(words.to_vec())).prop_map(|(at, word)| Edit::Word { at, word }),
        (at(), at(), at()).prop_map(|(at, seed, from)| Edit::Splice { at, seed, from }),
        at().prop_map(|at| Edit::Truncate { at }),
    ]
}

/// One of the seeds, with up to six edits.
pub fn edited(seeds: Vec<Vec<u8>>) -> impl Strategy<Value = Vec<u8>> {
    (any::<Index>(), prop::collection::vec(edit(), 0..7)).prop_map(move |(seed, edits)| {
        let mut bytes = seeds[seed.index(seeds.len())].clone();
        for edit in &edits {
            apply(edit, &mut bytes, &seeds);
        }
        bytes
    })
}

/// The same for a decoder of texts.
pub fn edited_text(seeds: Vec<Vec<u8>>) -> impl Strategy<Value = String> {
    edited(seeds).prop_map(|bytes| String::from_utf8_lossy(&bytes).into_owned())
}

fn apply(edit: &Edit, bytes: &mut Vec<u8>, seeds: &[Vec<u8>]) {
    let length_of = bytes.len();
    let place = |at: &Index| at.index(length_of + 1);
    let range = |at: &Index, length: usize| place(at)..(place(at) + length).min(length_of);
    match edit {
        Edit::Flip { at, bit } => {
            if let Some(byte) = bytes.get_mut(place(at)) {
                *byte ^= 1 << bit;
            }
        }
        Edit::Set { at, byte } => {
            if let Some(found) = bytes.get_mut(place(at)) {
                *found = *byte;
            }
        }
        Edit::Insert { at, bytes: new } => {
            let at = place(at);
            bytes.splice(at..at, new.iter().copied());
        }
        Edit::Remove { at, length } => {
            bytes.drain(range(at, *length));
        }
        Edit::Repeat { at, length, times } => {
            let range = range(at, *length);
            let part = bytes[range.clone()].repeat(*times);
            bytes.splice(range, part);
        }
        Edit::Number { at, number } => {
            let start = place(at);
            let Some(first) = bytes[start..].iter().position(u8::is_ascii_digit).map(|n| start + n) else {
                return;
            };
            let digits = bytes[first..].iter().take_while(|byte| byte.is_ascii_digit()).count();
            bytes.splice(first..first + digits, number.bytes());
        }
        Edit::Word { at, word } => {
            let range = range(at, 8);
            let word = word.to_le_bytes();
            let length = range.len();
            bytes[range].copy_from_slice(&word[..length]);
        }
        Edit::Splice { at, seed, from } => {
            let other = &seeds[seed.index(seeds.len())];
            bytes.truncate(place(at));
            bytes.extend_from_slice(&other[from.index(other.len() + 1)..]);
        }
        Edit::Truncate { at } => bytes.truncate(place(at)),
    }
}
