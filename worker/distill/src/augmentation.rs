//! EDM's data augmentation (2206.00364, appendix F.2): flips, scalings, rotations, stretches and shifts. The network
//! gets the transforms of an image as labels, so that it learns from augmented images and generates none.
//!
//! SiD and SiDA (2404.04057, 2410.14919) augment the samples from which the fake score learns, generated and real
//! samples each with draws of their own; the generator phase augments nothing.
//!
//! Flips move whole pixels. All the rest is one affine map per image, and one resampling at twice the resolution: the
//! image continues by reflection, a wavelet's low-pass filter doubles the resolution, the map is sampled bilinearly,
//! and the same filter halves the resolution (2006.06676, appendix B). Reflection and filters are linear maps of rows
//! and columns, so each is computed as one product with a matrix.
//!
//! The resampling computes in f64: fp32 coordinates alone are off by so much that an image of 64×64 pixels of noise
//! would be off by 4e-5.

use std::f64::consts::PI;

use potstill_torch_ext::upload;
use tch::{Device, Kind, Tensor, no_grad};

use crate::random::Stream;

/// Numbers that describe an image's transforms to a network.
pub const LABELS: i64 = 9;

/// The factor of a scaling or a stretch is 2 to the power of this times a normal number.
const LOG2_SCALE: f64 = 0.2;

/// A shift is this share of width or height times a normal number.
const SHIFT: f64 = 0.125;

/// The low-pass filter: Daubechies' least asymmetric one with 6 vanishing moments (sym6), computed by spectral
/// factorization. Its sum is √2, and it is orthogonal to itself shifted by any even number, so that doubling and
/// halving the resolution changes nothing.
const FILTER: [f64; 12] = [
    0.015404109327044824,
    0.0034907120842221626,
    -0.11799011114852002,
    -0.04831174258569806,
    0.49105594192797375,
    0.787641141028651,
    0.3379294217281658,
    -0.07263752278637658,
    -0.02106029251237085,
    0.04472490177078139,
    0.0017677118642540077,
    -0.00780070832503238,
];

const TAPS: i64 = FILTER.len() as i64;

/// The filter's tap at its peak: where a pixel lies on the lattice of twice the resolution.
const PEAK: i64 = 5;

/// Pixels that a filter reaches to each side.
const REACH: i64 = TAPS / 4;

/// The distribution of the transforms.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Augmentation {
    /// Probability of each kind of transform by itself, within [0, 1]: 0.12 for CIFAR-10, 0.15 for FFHQ and AFHQ
    /// (2206.00364, appendix F). A flip occurs in half of these cases. Flips left to right do not depend on it: half of
    /// all images have one.
    pub probability: f64,
}

impl Augmentation {
    /// The transforms of `count` images, which depend on the stream alone. How many numbers are drawn depends on
    /// `count` alone; their order is part of the trajectory and never changes.
    pub fn draw(&self, stream: &mut Stream, count: i64) -> Transforms {
        let flip_x = stream.uniform(count);
        let flip_y = stream.uniform(count);
        let scale = stream.normal_scalars(count);
        let scaled = stream.uniform(count);
        let rotation = stream.uniform(count);
        let rotated = stream.uniform(count);
        let stretch = stream.normal_scalars(count);
        let axis = stream.uniform(count);
        let stretched = stream.uniform(count);
        let oblique = stream.uniform(count);
        let shift = [stream.normal_scalars(count), stream.normal_scalars(count)];
        let shifted = stream.uniform(count);
        let angle = |uniform: f64| (2.0 * uniform - 1.0) * PI;
        let when = |chosen: bool, value: f64| if chosen { value } else { 0.0 };
        let p = self.probability;
        let transforms = (0..flip_x.len()).map(|i| Transform {
            flip_x: flip_x[i] < 0.5,
            flip_y: flip_y[i] < 0.5 * p,
            scale: when(scaled[i] < p, scale[i]),
            rotation: when(rotated[i] < p, angle(rotation[i])),
            stretch: when(stretched[i] < p, stretch[i]),
            stretch_axis: when(oblique[i] < 0.5, angle(axis[i])),
            shift: [when(shifted[i] < p, shift[0][i]), when(shifted[i] < p, shift[1][i])],
        });
        Transforms(transforms.collect())
    }
}

/// The transforms of one image, in the order of the fields. The default changes nothing.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Transform {
    /// A flip left to right.
    pub flip_x: bool,
    /// A flip top to bottom.
    pub flip_y: bool,
    /// An enlargement by 2^(0.2·`scale`) about the center.
    pub scale: f64,
    /// A counter-clockwise rotation about the center, in radians.
    pub rotation: f64,
    /// A stretch by 2^(0.2·`stretch`) along an axis, and by its inverse across it.
    pub stretch: f64,
    /// The axis of the stretch: counter-clockwise from the horizontal one, in radians.
    pub stretch_axis: f64,
    /// A shift to the right and downwards, in eighths of the width and of the height.
    pub shift: [f64; 2],
}

impl Transform {
    /// The labels for a network. All are 0 exactly when the image is unchanged.
    #[must_use]
    pub fn labels(&self) -> [f64; LABELS as usize] {
        let Self { scale, rotation, stretch, stretch_axis, shift, .. } = *self;
        [
            f64::from(u8::from(self.flip_x)),
            f64::from(u8::from(self.flip_y)),
            scale,
            rotation.cos() - 1.0,
            rotation.sin(),
            stretch * stretch_axis.cos(),
            stretch * stretch_axis.sin(),
            shift[0],
            shift[1],
        ]
    }

    /// Whether there is another transform than flips.
    fn resamples(&self) -> bool {
        self.scale != 0.0 || self.rotation != 0.0 || self.stretch != 0.0 || self.shift != [0.0, 0.0]
    }

    /// The origin in the image of a pixel of the result, without the flips. Both positions are in pixels, right and
    /// down from the center of an image of these sides.
    fn origin(&self, width: i64, height: i64) -> Affine {
        if !self.resamples() {
            return Affine::IDENTITY;
        }
        let along = (LOG2_SCALE * self.stretch).exp2();
        let back = [-self.shift[0] * SHIFT * width as f64, -self.shift[1] * SHIFT * height as f64];
        let shrink = (-LOG2_SCALE * self.scale).exp2();
        // y points downwards, so a positive angle of `rotation` is clockwise, and these are the inverses.
        Affine::shift(back)
            .then(Affine::rotation(self.stretch_axis))
            .then(Affine::scale([along.recip(), along]))
            .then(Affine::rotation(-self.stretch_axis))
            .then(Affine::rotation(self.rotation))
            .then(Affine::scale([shrink, shrink]))
    }
}

/// The transforms of the images of a batch, one [`Transform`] each.
#[derive(Clone, Debug, PartialEq)]
pub struct Transforms(pub Vec<Transform>);

impl Transforms {
    /// Augments images [N, C, H, W] of any floating kind. Returns them in their kind, and the labels, fp32 [N,
    /// [`LABELS`]], for [`Condition::augmented`](potstill_models::Condition::augmented). No gradients flow through it.
    ///
    /// Images that are only flipped, or unchanged, keep their exact values. How far the images are continued by
    /// reflection depends on the whole batch, as in the public code; beyond it they are 0, which affects little of an
    /// image.
    ///
    /// # Panics
    /// When `images` has another number of dimensions or of images.
    pub fn apply(&self, images: &Tensor) -> (Tensor, Tensor) {
        let &[count, _, height, width] = images.size().as_slice() else {
            panic!("images have 4 dimensions, these have {}", images.dim())
        };
        assert_eq!(count, self.0.len() as i64, "each image has one transform");
        no_grad(|| {
            let images = self.flipped(images, 3, |transform| transform.flip_x);
            let images = self.flipped(&images, 2, |transform| transform.flip_y);
            (self.resampled(&images, width, height), self.labels(images.device()))
        })
    }

    fn labels(&self, device: Device) -> Tensor {
        let labels: Vec<f64> = self.0.iter().flat_map(Transform::labels).collect();
        upload(&Tensor::from_slice(&labels).view([-1, LABELS]).to_kind(Kind::Float), device)
    }

    fn flipped(&self, images: &Tensor, dimension: i64, flips: impl Fn(&Transform) -> bool) -> Tensor {
        let flips: Vec<bool> = self.0.iter().map(flips).collect();
        if !flips.contains(&true) {
            return images.detach();
        }
        let flips = upload(&Tensor::from_slice(&flips).view([-1, 1, 1, 1]), images.device());
        images.flip([dimension]).where_self(&flips, images)
    }

    fn resampled(&self, images: &Tensor, width: i64, height: i64) -> Tensor {
        let device = images.device();
        let chosen: Vec<usize> = (0..self.0.len()).filter(|i| self.0[*i].resamples()).collect();
        if chosen.is_empty() {
            return images.shallow_clone();
        }
        let indices: Vec<i64> = chosen.iter().map(|i| *i as i64).collect();
        let indices = upload(&Tensor::from_slice(&indices), device);
        let origins: Vec<Affine> = self.0.iter().map(|transform| transform.origin(width, height)).collect();
        let [columns, rows] = Axis::around([width, height], &origins);
        let coordinates: Vec<f64> =
            chosen.iter().flat_map(|i| normalised(&origins[*i], &columns, &rows)).collect();
        let coordinates = upload(&Tensor::from_slice(&coordinates).view([-1, 2, 3]), device);

        let pixels = images.index_select(0, &indices).to_kind(Kind::Double);
        let fine = rows.doubling(device).matmul(&pixels).matmul(&columns.doubling(device).tr());
        let size = [indices.numel() as i64, pixels.size()[1], rows.lattice(), columns.lattice()];
        let grid = Tensor::affine_grid_generator(&coordinates, size, false);
        let (bilinear, zeros) = (0, 0);
        let fine = fine.grid_sampler(&grid, bilinear, zeros, false);
        let result = rows.halving(device).matmul(&fine).matmul(&columns.halving(device).tr());
        images.index_copy(0, &indices, &result.to_kind(images.kind()))
    }
}

/// x ↦ `linear`·x + `offset`.
#[derive(Clone, Copy)]
struct Affine {
    linear: [[f64; 2]; 2],
    offset: [f64; 2],
}

impl Affine {
    const IDENTITY: Self = Self { linear: [[1.0, 0.0], [0.0, 1.0]], offset: [0.0, 0.0] };

    fn shift(offset: [f64; 2]) -> Self {
        Self { offset, ..Self::IDENTITY }
    }

    fn scale([x, y]: [f64; 2]) -> Self {
        Self { linear: [[x, 0.0], [0.0, y]], ..Self::IDENTITY }
    }

    /// From the first axis towards the second one.
    fn rotation(angle: f64) -> Self {
        let (sine, cosine) = angle.sin_cos();
        Self { linear: [[cosine, -sine], [sine, cosine]], ..Self::IDENTITY }
    }

    fn apply(&self, [x, y]: [f64; 2]) -> [f64; 2] {
        [0, 1].map(|i| self.linear[i][0] * x + self.linear[i][1] * y + self.offset[i])
    }

    /// This map first, then the next one.
    fn then(self, next: Self) -> Self {
        let product = |i: usize, j: usize| {
            next.linear[i][0] * self.linear[0][j] + next.linear[i][1] * self.linear[1][j]
        };
        Self { linear: [0, 1].map(|i| [product(i, 0), product(i, 1)]), offset: next.apply(self.offset) }
    }
}

/// One dimension of the images: their side in pixels, and by how many pixels they are continued before and after it.
struct Axis {
    side: i64,
    before: i64,
    after: i64,
}

impl Axis {
    /// Columns and rows that hold the origins of all pixels of all images, and the additional reach of the filters, as
    /// far as one reflection allows.
    fn around(sides: [i64; 2], origins: &[Affine]) -> [Self; 2] {
        let centre = sides.map(|side| (side - 1) as f64 / 2.0);
        let corners = [[-1.0, -1.0], [1.0, -1.0], [1.0, 1.0], [-1.0, 1.0]];
        let corners = corners.map(|[x, y]| [x * centre[0], y * centre[1]]);
        let reached: Vec<[f64; 2]> =
            origins.iter().flat_map(|origin| corners.map(|corner| origin.apply(corner))).collect();
        [0, 1].map(|i| {
            let margin = |sign: f64| {
                let farthest = reached.iter().map(|point| sign * point[i]).fold(f64::MIN, f64::max);
                let margin = farthest - centre[i] + (2 * REACH) as f64;
                margin.clamp(0.0, (sides[i] - 1) as f64).ceil() as i64
            };
            Self { side: sides[i], before: margin(-1.0), after: margin(1.0) }
        })
    }

    /// Pixels with the continuation.
    fn padded(&self) -> i64 {
        self.before + self.side + self.after
    }

    /// Samples of the result at twice the resolution that the filter needs for its pixels.
    fn lattice(&self) -> i64 {
        2 * self.side + TAPS - 2
    }

    /// From an image to its continuation at twice the resolution, f64 [2·padded, side]: sample 2i is at pixel i.
    fn doubling(&self, device: Device) -> Tensor {
        let (side, samples) = (self.side as usize, 2 * self.padded() as usize);
        let mut matrix = vec![0.0; samples * side];
        for pixel in 0..self.padded() {
            let source = reflected(pixel - self.before, self.side) as usize;
            for (tap, weight) in FILTER.iter().enumerate() {
                let sample = 2 * pixel + tap as i64 - PEAK;
                if (0..samples as i64).contains(&sample) {
                    matrix[sample as usize * side + source] += weight;
                }
            }
        }
        upload(&Tensor::from_slice(&matrix).view([samples as i64, self.side]), device)
    }

    /// From the result at twice the resolution to its pixels, f64 [side, lattice]: pixel i is at sample 2i + [`PEAK`].
    fn halving(&self, device: Device) -> Tensor {
        let lattice = self.lattice() as usize;
        let mut matrix = vec![0.0; self.side as usize * lattice];
        for pixel in 0..self.side as usize {
            let start = pixel * lattice + 2 * pixel;
            matrix[start..start + FILTER.len()].copy_from_slice(&FILTER);
        }
        upload(&Tensor::from_slice(&matrix).view([self.side, -1]), device)
    }

    /// From libtorch's coordinate of a sample of the result, which is −1 and 1 at the lattice's edges, half a sample
    /// beyond its first and last one, to its position in pixels from the center: factor and offset.
    fn to_position(&self) -> (f64, f64) {
        // Sample k is at pixel (k − PEAK)/2, and its coordinate is (2k + 1)/lattice − 1.
        let lattice = self.lattice() as f64;
        (lattice / 4.0, (lattice - 1.0) / 4.0 - PEAK as f64 / 2.0 - (self.side - 1) as f64 / 2.0)
    }

    /// From a position in pixels from the center to libtorch's coordinate in the continued image at twice the
    /// resolution: factor and offset.
    fn to_coordinate(&self) -> (f64, f64) {
        // Pixel i is at sample 2(i + before), and the coordinate of sample k is (2k + 1)/samples − 1.
        let samples = 2.0 * self.padded() as f64;
        let centre = (self.side - 1) as f64 / 2.0 + self.before as f64;
        (4.0 / samples, (4.0 * centre + 1.0) / samples - 1.0)
    }
}

/// The pixel of 0 .. `side` that a reflection about the centers of the outermost pixels has at `index`.
fn reflected(index: i64, side: i64) -> i64 {
    let last = side - 1;
    last - (last - index.abs()).abs()
}

/// An origin as the first two rows of a matrix between libtorch's normalized coordinates.
fn normalised(origin: &Affine, columns: &Axis, rows: &Axis) -> [f64; 6] {
    let [from, to] = [Axis::to_position, Axis::to_coordinate].map(|map| {
        let ((x, offset_x), (y, offset_y)) = (map(columns), map(rows));
        Affine::scale([x, y]).then(Affine::shift([offset_x, offset_y]))
    });
    let Affine { linear: [x, y], offset } = from.then(*origin).then(to);
    [x[0], x[1], offset[0], y[0], y[1], offset[1]]
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The properties that define this filter, independent of how its numbers were computed (Daubechies, Ten Lectures
    /// on Wavelets, chapters 6 and 8).
    #[test]
    fn the_filter_is_orthonormal_and_has_six_vanishing_moments() {
        for shift in 0..6 {
            let product: f64 = FILTER[2 * shift..].iter().zip(&FILTER).map(|(a, b)| a * b).sum();
            assert!((product - f64::from(u8::from(shift == 0))).abs() < 1e-15, "{shift}: {product}");
        }
        for moment in 0..6 {
            let alternating = FILTER.iter().enumerate().map(|(i, weight)| {
                let position = i as f64 - PEAK as f64;
                if i % 2 == 0 { weight * position.powi(moment) } else { -weight * position.powi(moment) }
            });
            assert!(alternating.sum::<f64>().abs() < 1e-11, "moment {moment}");
        }
        assert!((FILTER.iter().sum::<f64>() - 2f64.sqrt()).abs() < 1e-15);
        assert_eq!(
            FILTER.iter().position(|w| *w == FILTER.iter().copied().fold(0.0, f64::max)),
            Some(PEAK as usize)
        );
    }

    #[test]
    fn a_reflection_repeats_no_edge() {
        let got: Vec<i64> = (-3..7).map(|i| reflected(i, 4)).collect();
        assert_eq!(got, [3, 2, 1, 0, 1, 2, 3, 2, 1, 0]);
        assert_eq!(reflected(0, 1), 0);
    }
}
