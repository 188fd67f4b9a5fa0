//! CLIP's byte-level BPE (2103.00020), through the `tokenizers` library.

use std::{
    collections::{BTreeMap, BTreeSet},
    path::Path,
};

use serde_json::Value;
use tch::Tensor;
use tokenizers::{
    AddedToken, NormalizerWrapper, PaddingDirection, PaddingParams, PaddingStrategy, PostProcessorWrapper,
    PreTokenizerWrapper, SplitDelimiterBehavior, Tokenizer as Inner, TruncationParams,
    models::bpe::{BPE, Vocab},
    normalizers::{self, replace::ReplacePattern},
    pre_tokenizers::{self, split::SplitPattern},
    processors::roberta::RobertaProcessing,
};

use super::original::vocabulary::byte_characters;
use crate::weights::{self, LoadError};

/// Texts → tokens: a fixed number for each text, truncated or padded.
pub struct Tokenizer {
    inner: Inner,
    tokens: usize,
}

const VOCABULARY: &str = "vocab.json";
const MERGES: &str = "merges.txt";
const WHOLE: &str = "tokenizer.json";
const ADDED: &str = "added_tokens.json";
const CONFIGURATION: &str = "tokenizer_config.json";
const SUFFIX: &str = "</w>";
const FOREIGN: &str = "so that it is not the tokenizer of a CLIP text encoder";
const INCOMPLETE: &str = "a file is incomplete or another model's; download the tokenizer again";
const START: &str = "<|startoftext|>";
const END: &str = "<|endoftext|>";
/// Words, contractions, single digits and runs of punctuation: no token of CLIP extends over more than one.
const PIECES: &str =
    r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+";

impl Tokenizer {
    /// A tokenizer from a folder with `vocab.json` and `merges.txt`, or with `tokenizer.json` alone, as transformers writes it since
    /// its version 5; with the tokens that were added to its vocabulary. `tokens` is the number of tokens for each text.
    ///
    /// # Errors
    /// A file that is missing or malformed, a vocabulary without CLIP's start and end tokens, or an added token whose number does
    /// not follow on the others.
    pub fn load(folder: &Path, tokens: usize) -> Result<Self, LoadError> {
        let failed = |problem: String| LoadError::Folder(format!("tokenizer: {problem}")).in_file(folder);
        let library = |e: tokenizers::Error| failed(e.to_string());
        let added = added(folder).map_err(failed)?;
        let bpe = Pairs::read(folder).and_then(|pairs| {
            pairs.check(&added.values().map(|token| token.content.as_str()).collect())?;
            pairs.bpe()
        });
        let mut inner = Inner::new(bpe.map_err(failed)?);
        let id = |inner: &Inner, token: &str| {
            inner
                .token_to_id(token)
                .ok_or_else(|| failed(format!("the vocabulary has no {token:?}, {FOREIGN}")))
        };
        let (start, end) = (id(&inner, START)?, id(&inner, END)?);
        let pad = padding(folder).map_err(failed)?.unwrap_or_else(|| END.to_owned());
        let spaces =
            normalizers::Replace::new(ReplacePattern::Regex(r"\s+".to_owned()), " ").map_err(library)?;
        inner
            .with_normalizer(Some(normalizers::Sequence::new(vec![
                NormalizerWrapper::NFC(normalizers::NFC),
                NormalizerWrapper::Replace(spaces),
                NormalizerWrapper::Lowercase(normalizers::Lowercase),
            ])))
            .map_err(library)?;
        let pieces = pre_tokenizers::split::Split::new(
            SplitPattern::Regex(PIECES.to_owned()),
            SplitDelimiterBehavior::Removed,
            true,
        )
        .map_err(library)?;
        let bytes = pre_tokenizers::byte_level::ByteLevel::new(false, true, true);
        inner.with_pre_tokenizer(Some(pre_tokenizers::sequence::Sequence::new(vec![
            PreTokenizerWrapper::Split(pieces),
            PreTokenizerWrapper::ByteLevel(bytes),
        ])));
        let marks = RobertaProcessing::new((END.to_owned(), end), (START.to_owned(), start))
            .trim_offsets(false)
            .add_prefix_space(false);
        inner.with_post_processor(Some(PostProcessorWrapper::Roberta(marks)));
        // The padding token too: with SDXL's second tokenizer, whose padding token it is, "!" is never part of a word.
        inner
            .add_special_tokens([START, END, &pad].map(|mark| AddedToken::from(mark, true)))
            .map_err(library)?;
        let known: BTreeSet<String> =
            inner.get_added_tokens_decoder().into_values().map(|token| token.content).collect();
        for (number, token) in added {
            if known.contains(&token.content) {
                continue;
            }
            let content = token.content.clone();
            match token.special {
                true => inner.add_special_tokens([token]),
                false => inner.add_tokens([token]),
            }
            .map_err(library)?;
            if id(&inner, &content)? != number {
                return Err(failed(format!(
                    "the added token {content:?} is number {number}, but {} tokens come before it",
                    id(&inner, &content)?
                )));
            }
        }
        let pad_id = id(&inner, &pad)?;
        inner
            .with_truncation(Some(TruncationParams { max_length: tokens, ..TruncationParams::default() }))
            .map_err(library)?;
        inner.with_padding(Some(PaddingParams {
            strategy: PaddingStrategy::Fixed(tokens),
            direction: PaddingDirection::Right,
            pad_id,
            pad_token: pad,
            ..PaddingParams::default()
        }));
        Ok(Self { inner, tokens })
    }

    /// The number of tokens of a text that a folder's configuration asks for, if it has one.
    #[must_use]
    pub fn asked_length(folder: &Path) -> Option<usize> {
        let asked = json(folder, CONFIGURATION).ok()?.get("model_max_length")?.as_u64()?;
        // What has no limit is written as a very large number.
        usize::try_from(asked).ok().filter(|length| *length < 1 << 20)
    }

    /// One more than the greatest token.
    #[must_use]
    pub fn vocabulary(&self) -> i64 {
        self.inner.get_vocab(true).into_values().max().map_or(0, |id| i64::from(id) + 1)
    }

    /// Tokens, int64 [N, tokens].
    ///
    /// # Errors
    /// The library's error.
    pub fn encode(&self, texts: &[&str]) -> Result<Tensor, LoadError> {
        let mut ids = Vec::with_capacity(texts.len() * self.tokens);
        for text in texts {
            let encoding = self
                .inner
                .encode_fast(*text, true)
                .map_err(|e| LoadError::Folder(format!("cannot tokenize {text:?}: {e}")))?;
            ids.extend(encoding.get_ids().iter().map(|id| i64::from(*id)));
        }
        Ok(Tensor::from_slice(&ids).view([texts.len() as i64, self.tokens as i64]))
    }
}

/// The vocabulary and the pairs that are merged.
struct Pairs {
    /// Where they are from, for messages.
    names: [&'static str; 2],
    /// Token → number.
    vocabulary: Vocab,
    merges: Vec<(String, String)>,
}

impl Pairs {
    /// From two files of their own, or from that of the whole tokenizer.
    fn read(folder: &Path) -> Result<Self, String> {
        let is_there = |name: &str| folder.join(name).is_file();
        if is_there(VOCABULARY) && is_there(MERGES) {
            let names = [VOCABULARY, MERGES];
            let vocabulary = numbers(VOCABULARY, json(folder, VOCABULARY)?)?;
            let text = weights::text(&folder.join(MERGES)).map_err(|error| named(MERGES, error))?;
            let lines = (1..).zip(text.lines());
            let merges = lines.filter(|(_, line)| !line.starts_with("#version") && !line.is_empty());
            let merges = merges.map(|(number, line)| {
                pair(line).ok_or_else(|| {
                    format!("{MERGES}, line {number} is {line:?}, not two tokens: {INCOMPLETE}")
                })
            });
            return Ok(Self { names, vocabulary, merges: merges.collect::<Result<_, _>>()? });
        }
        if is_there(WHOLE) {
            let mut whole = json(folder, WHOLE)?;
            let model = whole.get_mut("model").map(Value::take).unwrap_or_default();
            let merges = model["merges"].as_array().filter(|merges| !merges.is_empty());
            let Some(merges) = merges.filter(|_| model["end_of_word_suffix"] == SUFFIX) else {
                return Err(format!("{WHOLE} has no words that end with {SUFFIX:?}, {FOREIGN}"));
            };
            let merges = merges.iter().map(|merge| {
                // One text with a space in older files.
                let found = match merge.as_str() {
                    Some(line) => pair(line),
                    None => serde_json::from_value(merge.clone()).ok(),
                };
                found.ok_or_else(|| format!("{WHOLE}: `merges` has {merge}, not two tokens"))
            });
            let merges = merges.collect::<Result<_, _>>()?;
            return Ok(Self {
                names: [WHOLE; 2],
                vocabulary: numbers(WHOLE, model["vocab"].clone())?,
                merges,
            });
        }
        let missing = if is_there(VOCABULARY) { MERGES } else { VOCABULARY };
        Err(format!(
            "{missing} is missing; a CLIP tokenizer has {VOCABULARY} and {MERGES}, or {WHOLE}, which has both"
        ))
    }

    /// Checks that nothing is missing: the vocabulary consists of the bytes, the bytes at a word's end, what pairs are merged to, and
    /// the two marks, with the numbers from 0 on; and `added` ones, which some programs write there too. With fewer pairs, words would
    /// become other tokens.
    fn check(&self, added: &BTreeSet<&str>) -> Result<(), String> {
        let [vocabulary, merges] = self.names;
        let tokens = self.vocabulary.len();
        for mark in [START, END] {
            if !self.vocabulary.contains_key(mark) {
                return Err(format!("{vocabulary} has no {mark:?}, {FOREIGN}"));
            }
        }
        let taken: BTreeSet<u32> = self.vocabulary.values().copied().collect();
        let free = (0..).zip(&taken).find_map(|(number, found)| (number != *found).then_some(number));
        let gap = free.or_else(|| (taken.len() < tokens).then_some(taken.len() as u32));
        if let Some(number) = gap {
            return Err(format!(
                "{vocabulary} has {tokens} tokens, which must have the numbers from 0 to {}, but none has {number}: {INCOMPLETE}",
                tokens - 1
            ));
        }
        let bytes = byte_characters();
        let bytes: BTreeSet<String> = bytes
            .iter()
            .map(char::to_string)
            .chain(bytes.iter().map(|byte| format!("{byte}{SUFFIX}")))
            .collect();
        let missing = bytes.iter().filter(|byte| !self.vocabulary.contains_key(*byte)).count();
        if missing > 0 {
            return Err(format!(
                "{vocabulary} lacks {missing} of the {} tokens of single bytes: {INCOMPLETE}",
                bytes.len()
            ));
        }
        let made: BTreeSet<String> =
            self.merges.iter().map(|(left, right)| format!("{left}{right}")).collect();
        let is_made = |token: &&String| made.contains(*token);
        let apart = |token: &str| [START, END].contains(&token) || added.contains(token);
        let wanted = |token: &&String| !apart(token) && !bytes.contains(*token);
        let (wanted, unmade) = self.vocabulary.keys().filter(wanted).partition::<Vec<_>, _>(is_made);
        let unknown = made.iter().filter(|token| !self.vocabulary.contains_key(*token)).count();
        if !unmade.is_empty() || unknown > 0 {
            return Err(format!(
                "{vocabulary} has {tokens} tokens, so that {merges} must have {} pairs, one for each token but {} of single bytes and \
                 2 marks; it has {}, without pairs for {} of these tokens, and {unknown} for others: {INCOMPLETE}",
                wanted.len() + unmade.len(),
                bytes.len(),
                self.merges.len(),
                unmade.len()
            ));
        }
        Ok(())
    }

    /// The library's model, as transformers' own class for CLIP reads it: vocabulary and pairs alone, all else is fixed.
    fn bpe(self) -> Result<BPE, String> {
        let builder = BPE::builder().vocab_and_merges(self.vocabulary, self.merges);
        let builder = builder.unk_token(END.to_owned()).end_of_word_suffix(SUFFIX.to_owned());
        builder.build().map_err(|error| error.to_string())
    }
}

fn numbers(name: &str, vocabulary: Value) -> Result<Vocab, String> {
    serde_json::from_value(vocabulary).map_err(|error| format!("{name} has no numbers by tokens: {error}"))
}

fn pair(line: &str) -> Option<(String, String)> {
    let (left, right) = line.split_once(' ')?;
    (!left.is_empty() && !right.is_empty() && !right.contains(' '))
        .then(|| (left.to_owned(), right.to_owned()))
}

fn json(folder: &Path, name: &str) -> Result<Value, String> {
    weights::json(&folder.join(name)).map_err(|error| named(name, error))
}

/// An error by the file's name alone: the folder is said once for all of them.
fn named(name: &str, error: LoadError) -> String {
    match error {
        LoadError::InFile { source, .. } => format!("{name} {source}"),
        LoadError::Unreadable { source, .. } => format!("{name}: {source}"),
        other => other.to_string(),
    }
}

/// The tokens that the folder adds to the vocabulary, by their numbers, as transformers finds them: those of its configuration, or
/// else those of a file of their own and of the whole tokenizer.
fn added(folder: &Path) -> Result<BTreeMap<u32, AddedToken>, String> {
    let read = |name: &str| match folder.join(name).is_file() {
        true => json(folder, name),
        false => Ok(Value::Null),
    };
    let mut found = BTreeMap::new();
    let mut add = |name: &str, number: Option<u32>, value: &Value| {
        let content = value["content"].as_str().or(value.as_str());
        let (Some(number), Some(content)) = (number, content) else {
            return Err(format!("{name} has an added token without a number or a text: {value}"));
        };
        let flag = |key: &str, default: bool| value[key].as_bool().unwrap_or(default);
        let special = flag("special", false);
        let token = AddedToken::from(content.to_owned(), special)
            .single_word(flag("single_word", false))
            .lstrip(flag("lstrip", false))
            .rstrip(flag("rstrip", false))
            .normalized(flag("normalized", !special));
        found.insert(number, token);
        Ok(())
    };
    let configuration = read(CONFIGURATION)?;
    if !configuration.is_null() && !configuration.is_object() {
        return Err(format!("{CONFIGURATION} is no object"));
    }
    for side in ["padding_side", "truncation_side"] {
        if configuration[side].as_str().is_some_and(|side| side != "right") {
            return Err(format!("{CONFIGURATION}: `{side}` is {}; supported: right", configuration[side]));
        }
    }
    match &configuration["added_tokens_decoder"] {
        Value::Null => {}
        Value::Object(tokens) => {
            for (number, token) in tokens {
                add(CONFIGURATION, number.parse().ok(), token)?;
            }
            return Ok(found);
        }
        _ => return Err(format!("{CONFIGURATION}: `added_tokens_decoder` is no object")),
    }
    let legacy = read(ADDED)?;
    if !legacy.is_null() && !legacy.is_object() {
        return Err(format!("{ADDED} is no object"));
    }
    if let Some(tokens) = legacy.as_object() {
        for (content, number) in tokens {
            let number = number.as_u64().and_then(|number| u32::try_from(number).ok());
            add(ADDED, number, &Value::from(content.as_str()))?;
        }
    }
    for token in read(WHOLE)?["added_tokens"].as_array().into_iter().flatten() {
        let number = token["id"].as_u64().and_then(|number| u32::try_from(number).ok());
        add(WHOLE, number, token)?;
    }
    Ok(found)
}

/// The padding token that the folder names: `"<|endoftext|>"` for SD 1.5 and SDXL's first tokenizer, `"!"` for the others.
fn padding(folder: &Path) -> Result<Option<String>, String> {
    for name in ["special_tokens_map.json", CONFIGURATION] {
        if !folder.join(name).is_file() {
            continue;
        }
        let value = json(folder, name)?;
        match &value["pad_token"] {
            Value::String(token) => return Ok(Some(token.clone())),
            Value::Object(token) => {
                return Ok(token.get("content").and_then(Value::as_str).map(str::to_owned));
            }
            _ => {}
        }
    }
    Ok(None)
}
