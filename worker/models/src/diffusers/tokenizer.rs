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
    models::bpe::BPE,
    normalizers::{self, replace::ReplacePattern},
    pre_tokenizers::{self, split::SplitPattern},
    processors::roberta::RobertaProcessing,
};

use crate::weights::{LoadError, failed_download};

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
        let failed =
            |problem: String| LoadError::Folder(format!("tokenizer {}: {problem}", folder.display()));
        let library = |e: tokenizers::Error| failed(e.to_string());
        let bpe = pairs(folder).map_err(failed)?;
        let mut inner = Inner::new(bpe);
        let id = |inner: &Inner, token: &str| {
            inner.token_to_id(token).ok_or_else(|| {
                failed(format!(
                    "the vocabulary has no {token:?}: this is not the tokenizer of a CLIP text encoder"
                ))
            })
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
        for (number, token) in added(folder).map_err(failed)? {
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

/// The vocabulary and the pairs that are merged: from two files of their own, or from those of the whole tokenizer.
fn pairs(folder: &Path) -> Result<BPE, String> {
    let path = |name: &str| folder.join(name).display().to_string();
    let is_there = |name: &str| folder.join(name).is_file();
    if is_there(VOCABULARY) && is_there(MERGES) {
        let builder = BPE::from_file(&path(VOCABULARY), &path(MERGES));
        let builder = builder.unk_token(END.to_owned()).end_of_word_suffix(SUFFIX.to_owned());
        return builder.build().map_err(|error| error.to_string());
    }
    if is_there(WHOLE) {
        let whole = json(folder, WHOLE)?;
        let model = whole.get("model").cloned().unwrap_or_default();
        let has_pairs = model["merges"].as_array().is_some_and(|merges| !merges.is_empty());
        if model["end_of_word_suffix"] != SUFFIX || !has_pairs {
            let problem = "is not the tokenizer of a CLIP text encoder";
            return Err(format!("{WHOLE} {problem}: it has no words that end with {SUFFIX:?}"));
        }
        // As transformers' own class for CLIP reads it: vocabulary and pairs alone, all else is fixed.
        let model = serde_json::json!({
            "type": "BPE", "vocab": model["vocab"], "merges": model["merges"], "unk_token": END,
            "end_of_word_suffix": SUFFIX, "continuing_subword_prefix": "", "dropout": null, "fuse_unk": false,
            "byte_fallback": false, "ignore_merges": false,
        });
        // The library reads from text only.
        return serde_json::from_str(&model.to_string()).map_err(|error| format!("{WHOLE}: {error}"));
    }
    let missing = if is_there(VOCABULARY) { MERGES } else { VOCABULARY };
    Err(format!(
        "{missing} is missing; a CLIP tokenizer has {VOCABULARY} and {MERGES}, or {WHOLE}, which has both"
    ))
}

fn json(folder: &Path, name: &str) -> Result<Value, String> {
    let text = std::fs::read_to_string(folder.join(name)).map_err(|error| format!("{name}: {error}"))?;
    if let Some(problem) = failed_download(text.as_bytes()) {
        return Err(format!("{name} {problem}"));
    }
    serde_json::from_str(&text).map_err(|error| format!("{name}: {error}"))
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
        let Ok(text) = std::fs::read_to_string(folder.join(name)) else { continue };
        let value: Value = serde_json::from_str(&text).map_err(|e| format!("{name}: {e}"))?;
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
