//! The prompts of a text-to-image model, as its conditions.

use std::{collections::BTreeMap, path::Path, rc::Rc};

use anyhow::{Context, ensure};
use potstill_models::{
    Condition, Embedded, TextCondition,
    diffusers::{TextConditioner, Tokenizer, Tokens},
};
use potstill_spec::{PromptsSpec, RunSpec};
use potstill_storage::digest::hexadecimal;
use potstill_torch_ext::upload;
use sha2::{Digest, Sha256};
use tch::{Device, Kind, Tensor};

use super::row_cache::RowCache;
use crate::{
    data::prompt_file::{Read, read_prompts},
    process::work,
};

/// The source of a text-to-image model's prompts.
pub enum Wanted<'a> {
    /// Those of a file.
    File(&'a PromptsSpec),
    /// A file for the evaluation: `data` and `column`; all else as in the specification of the training's prompts.
    Evaluation {
        /// The specification of the training's prompts.
        like: &'a PromptsSpec,
        /// As [`PromptsSpec::data`].
        data: &'a str,
        /// As [`PromptsSpec::column`].
        column: &'a str,
    },
    /// The given prompts.
    These(Vec<String>),
}

impl<'a> Wanted<'a> {
    /// The prompts of a run's evaluation, where the specification has some.
    pub fn evaluation(spec: &'a RunSpec) -> Option<Self> {
        let (like, e) = (spec.prompts.as_ref()?, &spec.evaluation);
        let column = e.prompts_column.as_ref().unwrap_or(&like.column);
        Some(Self::Evaluation { like, data: e.prompts.as_deref()?, column })
    }
}

/// Prompts, and how they become conditions.
pub struct Prompts {
    /// The number of prompts.
    count: i64,
    /// Number of the first caption of a real image: `count`, or 0 where the captions are the prompts.
    first_caption: i64,
    /// The class of each prompt, where the file has classes; used for class agreement.
    labels: Option<Vec<i64>>,
    /// SHA-256 of texts and labels.
    digest: String,
    embedder: Embedder,
    null: Rc<Embedded>,
    /// SDXL's micro-conditioning of the generated images, [1, 6].
    sizes: Option<Tensor>,
}

enum Embedder {
    /// Computes embeddings when they are needed.
    Encoders { conditioner: Rc<TextConditioner>, tokens: Tokens },
    /// Embeddings are on disk and the text encoders are released. The prompts, without captions, are kept for their
    /// tokens.
    Cache { cache: RowCache, tokenizer: Rc<Tokenizer>, texts: Vec<String> },
}

/// The content of a file of prompts, and its use, before any embedding.
struct Material {
    /// The prompts, followed by the captions.
    texts: Vec<String>,
    count: usize,
    first_caption: usize,
    labels: Option<Vec<i64>>,
    digest: String,
    /// The embeddings on disk, where they are cached.
    cache: Option<RowCache>,
    sizes: Option<Tensor>,
}

impl Material {
    /// Reads the prompts, and fills the cache if there is one.
    fn new(
        wanted: Wanted<'_>,
        captions: Vec<String>,
        conditioner: &TextConditioner,
        image: [i64; 2],
        model: Option<&str>,
    ) -> anyhow::Result<Self> {
        let (read, like) = match wanted {
            Wanted::These(texts) => (Read { texts, labels: None }, None),
            Wanted::File(spec) => match &spec.data {
                Some(data) => {
                    let read = read_prompts(data, &spec.column);
                    (read.with_context(|| format!("prompts.data {data}"))?, Some(spec))
                }
                None => (Read { texts: vec![], labels: None }, Some(spec)),
            },
            Wanted::Evaluation { like, data, column } => {
                let read = read_prompts(data, column);
                (read.with_context(|| format!("evaluation.prompts {data}"))?, Some(like))
            }
        };
        let Read { mut texts, labels } = read;
        // Without prompts of their own, generated samples use the captions.
        let first_caption = texts.len();
        texts.extend(captions);
        let count = if first_caption == 0 { texts.len() } else { first_caption };
        ensure!(count > 0, "there are no prompts");
        if like.is_some() {
            tracing::info!(prompts = count, "prompts loaded");
        }
        let digest = digest(&texts[..count], labels.as_deref());
        let sizes = conditioner.pooled_width().map(|_| {
            let original = like.and_then(|spec| spec.original_size);
            let original = original.map_or(image, |sides| sides.map(i64::from));
            let crop = like.map_or([0, 0], |spec| spec.crop.map(i64::from));
            let numbers = [original[0], original[1], crop[0], crop[1], image[0], image[1]];
            Tensor::from_slice(&numbers).to_kind(Kind::Float).unsqueeze(0)
        });
        let cache = match like.and_then(|spec| spec.cache.as_deref()) {
            Some(folder) => {
                let model =
                    model.context("the model's folder was not hashed, so the cache cannot name it")?;
                let all: Vec<&str> = texts.iter().map(String::as_str).collect();
                let cache = embed_all(folder, model, &all, conditioner);
                Some(cache.with_context(|| format!("prompts.cache {}", folder.display()))?)
            }
            None => None,
        };
        Ok(Self { texts, count, first_caption, labels, digest, cache, sizes })
    }
}

fn digest(texts: &[String], labels: Option<&[i64]>) -> String {
    let mut hasher = Sha256::new();
    for text in texts {
        hasher.update((text.len() as u64).to_le_bytes());
        hasher.update(text);
    }
    labels.into_iter().flatten().for_each(|label| hasher.update(label.to_le_bytes()));
    hexadecimal(&hasher.finalize())
}

impl Prompts {
    /// Reads and tokenizes the prompts, the captions of real images, and the prompts of the evaluation if they differ.
    /// `image` is height and width of the generated images; `model` names the model, for the cache.
    ///
    /// # Errors
    /// A file is missing, empty, or malformed; the cache cannot be written.
    pub fn new(
        wanted: Wanted<'_>,
        captions: Vec<String>,
        evaluation: Option<Wanted<'_>>,
        conditioner: TextConditioner,
        image: [i64; 2],
        model: Option<&str>,
    ) -> anyhow::Result<(Self, Option<Self>)> {
        let training = Material::new(wanted, captions, &conditioner, image, model)?;
        let evaluation =
            evaluation.map(|wanted| Material::new(wanted, vec![], &conditioner, image, model)).transpose()?;
        let null = Rc::new(conditioner.null()?);
        // Both have a cache, or neither has one. With a cache the encoders are released.
        let (encoders, tokenizer) = match training.cache.is_some() {
            true => {
                let tokenizer = conditioner.into_tokenizer().context("the model has no tokenizer")?;
                (None, Some(Rc::new(tokenizer)))
            }
            false => (Some(Rc::new(conditioner)), None),
        };
        let finish = |material: Material| -> anyhow::Result<Self> {
            let Material { mut texts, count, first_caption, labels, digest, cache, sizes } = material;
            let embedder = match (cache, &tokenizer, &encoders) {
                (Some(cache), Some(tokenizer), _) => {
                    texts.truncate(count);
                    Embedder::Cache { cache, tokenizer: Rc::clone(tokenizer), texts }
                }
                (_, _, encoders) => {
                    let conditioner = Rc::clone(encoders.as_ref().context("there are no text encoders")?);
                    let all: Vec<&str> = texts.iter().map(String::as_str).collect();
                    let tokens = all.chunks(TOKENIZED_AT_A_TIME).map(|texts| {
                        work::complete();
                        conditioner.tokenize(texts)
                    });
                    let tokens = Tokens::joined(&tokens.collect::<Result<Vec<_>, _>>()?)
                        .context("there are no prompts")?;
                    Embedder::Encoders { conditioner, tokens }
                }
            };
            let (count, first_caption) = (count as i64, first_caption as i64);
            let null = Rc::clone(&null);
            Ok(Self { count, first_caption, labels, digest, embedder, null, sizes })
        };
        Ok((finish(training)?, evaluation.map(finish).transpose()?))
    }

    /// The number of prompts, without captions.
    pub fn len(&self) -> i64 {
        self.count
    }

    /// The class of each prompt, where the file has classes.
    pub fn labels(&self) -> Option<&[i64]> {
        self.labels.as_deref()
    }

    /// SHA-256 of texts and classes, without captions.
    pub fn digest(&self) -> &str {
        &self.digest
    }

    /// Tokens of these prompts, as the model's first tokenizer gives them, int64 [N, tokens] on the host.
    ///
    /// # Errors
    /// The tokenizer's error.
    ///
    /// # Panics
    /// When an index is out of range.
    pub fn tokens(&self, indices: &[i64]) -> anyhow::Result<Tensor> {
        let (distinct, places) = distinct(indices);
        let tokens = match &self.embedder {
            Embedder::Encoders { tokens, .. } => tokens.rows(&distinct).first(),
            Embedder::Cache { tokenizer, texts, .. } => {
                let texts: Vec<&str> = distinct.iter().map(|index| texts[*index as usize].as_str()).collect();
                tokenizer.encode(&texts)?
            }
        };
        Ok(tokens.index_select(0, &places))
    }

    /// The condition of real images with these captions: the micro-conditioning is that of generated images.
    ///
    /// # Panics
    /// When an index is out of range.
    pub fn condition_of(&self, captions: &[i64], device: Device) -> Condition {
        let captions: Vec<i64> = captions.iter().map(|caption| self.first_caption + caption).collect();
        self.condition(&captions, device)
    }

    /// The condition of samples for these prompts. A prompt that occurs several times is embedded once.
    ///
    /// # Panics
    /// When an index is out of range.
    pub fn condition(&self, indices: &[i64], device: Device) -> Condition {
        let sizes = self.sizes.as_ref().map(|sizes| sizes.expand([indices.len() as i64, 6], true));
        let (distinct, places) = distinct(indices);
        let embedded = match &self.embedder {
            Embedder::Encoders { conditioner, tokens } => conditioner.embed_tokens(&tokens.rows(&distinct)),
            Embedder::Cache { cache, .. } => Embedded {
                states: cache.rows("states", &distinct).expect("every row was written with its states"),
                pooled: cache.rows("pooled", &distinct),
            },
        };
        let texts = embedded.map(|x| upload(&x.index_select(0, &upload(&places, x.device())), device));
        let null = match self.null.states.device() == device {
            true => Rc::clone(&self.null),
            false => Rc::new(self.null.map(|x| upload(x, device))),
        };
        Condition::Text(TextCondition::new(texts, null, sizes.map(|sizes| upload(&sizes, device))))
    }
}

/// The distinct numbers, ascending, and for each given number its index among them, int64.
pub(super) fn distinct(indices: &[i64]) -> (Vec<i64>, Tensor) {
    let mut places: BTreeMap<i64, i64> = indices.iter().map(|index| (*index, 0)).collect();
    for (place, known) in (0..).zip(places.values_mut()) {
        *known = place;
    }
    let order: Vec<i64> = indices.iter().map(|index| places[index]).collect();
    (places.into_keys().collect(), Tensor::from_slice(&order))
}

/// Texts that are tokenized at a time.
const TOKENIZED_AT_A_TIME: usize = 4096;

/// Texts that are embedded at a time for the cache.
const EMBEDDED_AT_A_TIME: usize = 8;

fn embed_all(
    folder: &Path,
    digest: &str,
    texts: &[&str],
    conditioner: &TextConditioner,
) -> anyhow::Result<RowCache> {
    let identity = std::iter::once(digest.as_bytes()).chain(texts.iter().map(|text| text.as_bytes()));
    RowCache::open(folder, identity, texts.len(), |rows| {
        let (mut states, mut pooled) = (Vec::new(), Vec::new());
        for texts in texts[rows].chunks(EMBEDDED_AT_A_TIME) {
            let embedded = conditioner.embed(texts)?;
            states.push(embedded.states);
            pooled.extend(embedded.pooled);
            work::complete();
        }
        let pooled = (!pooled.is_empty()).then(|| ("pooled", Tensor::cat(&pooled, 0)));
        Ok([("states", Tensor::cat(&states, 0))].into_iter().chain(pooled).collect())
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_asked_for_twice_is_made_once() {
        let (numbers, places) = distinct(&[7, 2, 7, 9]);
        assert_eq!(numbers, [2, 7, 9]);
        assert_eq!(Vec::<i64>::try_from(places).unwrap(), [1, 0, 1, 2]);
    }
}
