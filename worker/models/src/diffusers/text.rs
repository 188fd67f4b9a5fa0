//! Prompts → the conditions of a U-Net.

use tch::{Kind, Tensor};

use super::{text_encoder::TextEncoder, tokenizer::Tokenizer};
use crate::{denoiser::Embedded, weights::LoadError};

/// A text encoder and its tokenizer.
pub(crate) struct Reader {
    pub tokenizer: Tokenizer,
    pub encoder: TextEncoder,
}

/// A model's text encoders: one for SD 1.x and 2.x, two for SDXL.
pub struct TextConditioner {
    readers: Vec<Reader>,
    /// SDXL's base model takes zeros for an empty text.
    zeros_for_empty: bool,
}

/// Prompts as tokens, for each of a model's encoders.
pub struct Tokens(
    /// int32 [N, tokens] each.
    Vec<Tensor>,
);

impl Tokens {
    /// The tokens of some of the prompts.
    #[must_use]
    pub fn rows(&self, indices: &[i64]) -> Self {
        let indices = Tensor::from_slice(indices);
        Self(self.0.iter().map(|ids| ids.index_select(0, &indices)).collect())
    }

    /// Prompts one after the other; of no prompts nothing.
    #[must_use]
    pub fn joined(parts: &[Self]) -> Option<Self> {
        let first = parts.first()?;
        let joined =
            |encoder: usize| Tensor::cat(&parts.iter().map(|part| &part.0[encoder]).collect::<Vec<_>>(), 0);
        Some(Self((0..first.0.len()).map(joined).collect()))
    }

    /// The tokens of the first encoder, int64 [N, tokens].
    ///
    /// # Panics
    /// When there are no encoders.
    pub fn first(&self) -> Tensor {
        self.0[0].to_kind(Kind::Int64)
    }
}

impl TextConditioner {
    pub(crate) fn new(readers: Vec<Reader>, zeros_for_empty: bool) -> Self {
        Self { readers, zeros_for_empty }
    }

    /// Prompts → tokens.
    ///
    /// # Errors
    /// The tokenizer's error.
    pub fn tokenize(&self, texts: &[&str]) -> Result<Tokens, LoadError> {
        let encode = |reader: &Reader| Ok(reader.tokenizer.encode(texts)?.to_kind(Kind::Int));
        Ok(Tokens(self.readers.iter().map(encode).collect::<Result<_, LoadError>>()?))
    }

    /// [`embed_tokens`](Self::embed_tokens) of prompts.
    ///
    /// # Errors
    /// The tokenizer's error.
    pub fn embed(&self, texts: &[&str]) -> Result<Embedded, LoadError> {
        Ok(self.embed_tokens(&self.tokenize(texts)?))
    }

    /// SD: the last states of the only encoder. SDXL (2307.01952, section 2.1): the penultimate states of both, side by side, and
    /// the second one's projected pooled output. No gradients are recorded.
    ///
    /// # Panics
    /// When the tokens are of another model.
    #[must_use]
    pub fn embed_tokens(&self, tokens: &Tokens) -> Embedded {
        assert_eq!(tokens.0.len(), self.readers.len(), "one row of tokens for each encoder");
        let said: Vec<_> = self
            .readers
            .iter()
            .zip(&tokens.0)
            .map(|(reader, ids)| reader.encoder.encode(&ids.to_kind(Kind::Int64)))
            .collect();
        match &said[..] {
            [one] => Embedded { states: one.last.shallow_clone(), pooled: None },
            all => {
                let states: Vec<&Tensor> = all.iter().map(|one| &one.penultimate).collect();
                let pooled = all.last().map(|last| last.pooled.shallow_clone());
                Embedded { states: Tensor::cat(&states, -1), pooled }
            }
        }
    }

    /// The embeddings of the empty text.
    ///
    /// # Errors
    /// The tokenizer's error.
    pub fn null(&self) -> Result<Embedded, LoadError> {
        let empty = self.embed(&[""])?;
        if self.zeros_for_empty && empty.pooled.is_some() {
            return Ok(Embedded {
                states: empty.states.zeros_like(),
                pooled: empty.pooled.map(|pooled| pooled.zeros_like()),
            });
        }
        Ok(empty)
    }

    /// The tokenizer of the first encoder, alone; the encoders are released.
    #[must_use]
    pub fn into_tokenizer(self) -> Option<Tokenizer> {
        self.readers.into_iter().next().map(|reader| reader.tokenizer)
    }

    /// Parameters of all encoders.
    #[must_use]
    pub fn size(&self) -> i64 {
        self.readers.iter().map(|reader| reader.encoder.size()).sum()
    }

    /// Width of the states.
    #[must_use]
    pub fn width(&self) -> i64 {
        self.readers.iter().map(|reader| reader.encoder.config().hidden_size).sum()
    }

    /// Width of the pooled output, where there is one.
    #[must_use]
    pub fn pooled_width(&self) -> Option<i64> {
        match &self.readers[..] {
            [_] => None,
            all => all.last().map(|last| last.encoder.config().projection_dim),
        }
    }
}
