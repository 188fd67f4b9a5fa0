//! Estimates the memory that a U-Net keeps for its backward pass, from the architecture alone. It counts what
//! libtorch's operations save: a convolution or linear layer its input, a normalization its input, attention its query,
//! key, value and output, a product both factors.

use super::UNetConfig;

/// A pass through a U-Net with gradient.
#[derive(Clone, Copy, Debug)]
pub struct Pass {
    /// Number of samples; a guided pass has twice as many.
    pub samples: i64,
    /// Height and width of the latents.
    pub sides: [i64; 2],
    /// Tokens of a prompt.
    pub tokens: i64,
    /// Whether weights take gradients; else only the input does.
    pub trained: bool,
    /// Whether blocks are computed again in the backward pass.
    pub again: bool,
    /// Whether what trains are adapters with dropout, of the usual layers.
    pub dropout: bool,
}

/// Elements of the network's data type.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Kept {
    /// Kept from the forward pass until the backward pass.
    pub elements: i64,
    /// The most at a time of the backward pass: what is kept up to a block, the temporaries of its step, and the inside of a block
    /// that is computed again. The backward pass begins with the last block; what is kept behind a block is free by its step.
    pub peak: i64,
}

/// Sums over a pass.
struct Sum<'a> {
    config: &'a UNetConfig,
    pass: Pass,
    kept: Kept,
}

impl UNetConfig {
    /// The elements that a pass keeps.
    #[must_use]
    pub fn kept(&self, pass: Pass) -> Kept {
        let mut sum = Sum { config: self, pass, kept: Kept::default() };
        sum.whole();
        Kept { peak: sum.kept.peak.max(sum.kept.elements), ..sum.kept }
    }
}

impl Sum<'_> {
    fn whole(&mut self) {
        let config = self.config;
        let channels = &config.block_out_channels;
        let last = channels.len() - 1;
        let mut sides = self.pass.sides;
        // The input, and the output of the first convolution.
        self.keep(self.image(config.in_channels, sides) + self.image(channels[0], sides));
        let mut skips = vec![channels[0]];
        let mut inputs = channels[0];
        let mut levels = vec![sides];
        for (level, outputs) in channels.iter().copied().enumerate() {
            for index in 0..config.layers_per_block.at(level) as usize {
                let attends = config.attends_down(level).then(|| (level, config.layers_down(level, index)));
                self.step(inputs, outputs, sides, attends);
                inputs = outputs;
                skips.push(outputs);
            }
            if level < last {
                sides = sides.map(|side| (side + 1) / 2);
                self.keep(self.image(outputs, sides) + self.dropped(self.image(outputs, levels[level])));
                skips.push(outputs);
            }
            levels.push(sides);
        }
        if config.mid_block_type.is_some() {
            let attends = config.layers_middle().map(|layers| (last, layers));
            self.step(inputs, inputs, sides, attends);
            if attends.is_some() {
                self.step(inputs, inputs, sides, None);
            }
        }
        for (place, level) in (0..=last).rev().enumerate() {
            let outputs = channels[level];
            for index in 0..=config.layers_per_block.at(level) as usize {
                let merged = inputs + skips.pop().unwrap_or(0);
                self.keep(self.image(merged, sides));
                let attends = config.attends_up(place).then(|| (level, config.layers_up(place, index)));
                self.step(merged, outputs, sides, attends);
                inputs = outputs;
            }
            if level > 0 {
                sides = levels[level - 1];
                // Repeated pixels, which the next convolution keeps, and its output.
                self.keep(2 * self.image(outputs, sides) + self.dropped(self.image(outputs, sides)));
            }
        }
        // Normalized, and after the activation.
        self.keep(2 * self.image(channels[0], sides));
    }

    /// A residual block, followed by attention where `attends` has a level and a number of transformer blocks.
    fn step(&mut self, inputs: i64, outputs: i64, sides: [i64; 2], attends: Option<(usize, i64)>) {
        let image = |channels| self.image(channels, sides);
        // Normalized and activated, before each convolution; the output of the first one.
        let inside = 2 * image(inputs) + 3 * image(outputs);
        let shortcut = if inputs == outputs { 0 } else { image(inputs) };
        let dropped = self.dropped(image(inputs) + image(outputs) + shortcut);
        self.block(inside + dropped, image(outputs));
        if let Some((level, layers)) = attends {
            let (inside, output) = self.attention(level, layers, outputs, sides);
            self.block(inside, output);
        }
    }

    /// The elements that a transformer keeps inside, and its output.
    fn attention(&self, level: usize, layers: i64, channels: i64, sides: [i64; 2]) -> (i64, i64) {
        let sequence = self.image(channels, sides);
        let text = self.pass.samples * self.pass.tokens * channels;
        let heads = self.config.attention_head_dim.at(level);
        // The log-sum-exp of attention, fp32; of two attentions.
        let sums = 2 * 2 * self.pass.samples * heads * sides[0] * sides[1];
        // Query, key, value and output of self-attention, query and output of attention to the text, the sums after
        // them, the gate's halves, the activated half, the output.
        let attended = 4 + 2 + 2 + 8 + 4 + 1;
        // Inputs of linear layers: normalized three times, and the gated product.
        let inputs = if self.pass.trained { 3 + 4 } else { 0 };
        let layer = (attended + inputs) * sequence + 2 * text + sums;
        // Those of query, key, value and output, of query and output, and of the gated projections; key and value of the text.
        let dropped = self.dropped(2 * sequence + layers * ((4 + 2 + 1 + 4) * sequence + text));
        // Normalized, and projected; the output.
        (2 * sequence + layers * layer + dropped, sequence)
    }

    /// What adapters with dropout keep besides, where their inputs have so many elements: a mask and what it leaves.
    fn dropped(&self, inputs: i64) -> i64 {
        if self.pass.dropout && self.pass.trained { 2 * inputs } else { 0 }
    }

    /// Adds a block that keeps `inside` elements and has this output.
    fn block(&mut self, inside: i64, output: i64) {
        let again = if self.pass.again { inside } else { 0 };
        self.keep(inside - again + output);
        // The gradients of its output and of its input.
        self.kept.peak = self.kept.peak.max(self.kept.elements + again + 2 * output);
    }

    fn keep(&mut self, elements: i64) {
        self.kept.elements += elements;
    }

    fn image(&self, channels: i64, sides: [i64; 2]) -> i64 {
        self.pass.samples * channels * sides[0] * sides[1]
    }
}
