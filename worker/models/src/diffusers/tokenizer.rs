//! CLIP's byte-level BPE (2103.00020), through the `tokenizers` library.

use std::path::Path;

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

use crate::weights::LoadError;

/// Texts → tokens: a fixed number for each text, truncated or padded.
pub struct Tokenizer {
    inner: Inner,
    tokens: usize,
}

const START: &str = "<|startoftext|>";
const END: &str = "<|endoftext|>";
/// Words, contractions, single digits and runs of punctuation: no token of CLIP extends over more than one.
const PIECES: &str =
    r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+";

impl Tokenizer {
    /// A tokenizer from a folder with `vocab.json` and `merges.txt`. `tokens` is the number of tokens for each text.
    ///
    /// # Errors
    /// A file that is missing or malformed, or a vocabulary without CLIP's start and end tokens.
    pub fn load(folder: &Path, tokens: usize) -> Result<Self, LoadError> {
        let failed =
            |problem: String| LoadError::Folder(format!("tokenizer {}: {problem}", folder.display()));
        let path = |name: &str| {
            let path = folder.join(name);
            match path.is_file() {
                true => Ok(path.display().to_string()),
                false => {
                    Err(failed(format!("{name} is missing; a CLIP tokenizer has vocab.json and merges.txt")))
                }
            }
        };
        let library = |e: tokenizers::Error| failed(e.to_string());
        let bpe = BPE::from_file(&path("vocab.json")?, &path("merges.txt")?)
            .unk_token(END.to_owned())
            .end_of_word_suffix("</w>".to_owned())
            .build()
            .map_err(library)?;
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

/// The padding token that the folder names: `"<|endoftext|>"` for SD 1.5 and SDXL's first tokenizer, `"!"` for the others.
fn padding(folder: &Path) -> Result<Option<String>, String> {
    for name in ["special_tokens_map.json", "tokenizer_config.json"] {
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
