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
    /// Whether fp32 weights compute in mixed precision: normalizations then take and give fp32.
    pub mixed: bool,
}

/// Elements of the data type in which products are computed; one in fp32 counts as two where that is a lower precision.
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
        self.keep(self.image(config.in_channels, sides) + self.wide(self.image(channels[0], sides)));
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
                self.keep(
                    self.wide(self.image(outputs, sides)) + self.dropped(self.image(outputs, levels[level])),
                );
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
                // In mixed precision the residual block's shortcut keeps it, and its normalization a copy.
                let copies = if self.pass.mixed { 3 } else { 1 };
                self.keep(copies * self.image(merged, sides));
                let attends = config.attends_up(place).then(|| (level, config.layers_up(place, index)));
                self.step(merged, outputs, sides, attends);
                inputs = outputs;
            }
            if level > 0 {
                sides = levels[level - 1];
                // Repeated pixels, which the next convolution keeps, and its output.
                let image = self.image(outputs, sides);
                self.keep(image + self.wide(image) + self.dropped(image));
            }
        }
        // Normalized, and after the activation.
        let image = self.image(channels[0], sides);
        self.keep(self.wide(image) + image);
    }

    /// A residual block, followed by attention where `attends` has a level and a number of transformer blocks.
    fn step(&mut self, inputs: i64, outputs: i64, sides: [i64; 2], attends: Option<(usize, i64)>) {
        let image = |channels| self.image(channels, sides);
        // Normalized and activated, before each convolution; the output of the first one.
        let inside =
            self.wide(image(inputs)) + image(inputs) + 2 * self.wide(image(outputs)) + image(outputs);
        let shortcut = if inputs == outputs { 0 } else { image(inputs) };
        let dropped = self.dropped(image(inputs) + image(outputs) + shortcut);
        self.block(inside + dropped, self.wide(image(outputs)));
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
        // Query, key, value and output of self-attention, query and output of attention to the text, the gate's halves, the
        // activated half.
        let attended = 4 + 2 + 8 + 4;
        // The sums after both attentions, and the output.
        let normalized = self.wide(3 * sequence);
        // Inputs of linear layers: normalized three times, and the gated product.
        let inputs = if self.pass.trained { 3 + 4 } else { 0 };
        let layer = (attended + inputs) * sequence + normalized + 2 * text + sums;
        // Those of query, key, value and output, of query and output, and of the gated projections; key and value of the text.
        let dropped = self.dropped(2 * sequence + layers * ((4 + 2 + 1 + 4) * sequence + text));
        // Normalized, and projected; the output.
        (self.wide(sequence) + sequence + layers * layer + dropped, self.wide(sequence))
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

    /// Elements that are fp32 in mixed precision.
    fn wide(&self, elements: i64) -> i64 {
        if self.pass.mixed { 2 * elements } else { elements }
    }

    fn image(&self, channels: i64, sides: [i64; 2]) -> i64 {
        self.pass.samples * channels * sides[0] * sides[1]
    }
}
