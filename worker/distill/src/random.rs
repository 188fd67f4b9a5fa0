//! Random numbers without state: a stream of numbers is named by its use, and depends on nothing else.
//!
//! A micro-batch's noise, noise levels, labels and dropout depend only on (seed, iteration, phase, micro-batch index),
//! so a run follows the same trajectory at any world size, and there is no generator state to save. The numbers are drawn
//! on the host with ChaCha8, whose output is the same on every platform, and copied to the device.

use potstill_torch_ext::upload;
use rand::{Rng, RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;
use rand_distr::StandardNormal;
use tch::{Device, Tensor};

/// The use of a stream. The discriminants are part of the trajectory: they never change.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub enum Purpose {
    /// The fake-score phase of a distillation iteration.
    FakeScorePhase = 0,
    /// The generator phase of a distillation iteration.
    GeneratorPhase = 1,
    /// Training a teacher on real data.
    TeacherTraining = 2,
    /// Samples of evaluations; iteration counts the generator's steps, index chunks of samples.
    Evaluation = 3,
    /// Numbers that all micro-batches of an iteration share; index 0.
    Iteration = 4,
    /// Samples of `potstill sample`; iteration counts the generator's steps, index images.
    Sampling = 5,
    /// First values of adapters; index 0 is the fake score, 1 the generator.
    Adapters = 6,
    /// The caption of a real image that has several; index counts the images.
    Captions = 7,
}

/// The stream of random numbers for one micro-batch (or one chunk of samples).
pub struct Stream {
    rng: ChaCha8Rng,
    device: Device,
}

impl Stream {
    /// The stream of (seed, iteration, purpose, index); `index` is the micro-batch's. The four are concatenated to
    /// ChaCha's 256-bit key, so that different names cannot share a stream.
    #[must_use]
    pub fn new(seed: u64, iteration: u64, purpose: Purpose, index: u32, device: Device) -> Self {
        let mut key = [0u8; 32];
        key[..8].copy_from_slice(&seed.to_le_bytes());
        key[8..16].copy_from_slice(&iteration.to_le_bytes());
        key[16..20].copy_from_slice(&(purpose as u32).to_le_bytes());
        key[20..24].copy_from_slice(&index.to_le_bytes());
        Self { rng: ChaCha8Rng::from_seed(key), device }
    }

    /// Independent N(0, 1) numbers, fp32, of the given shape.
    pub fn normal(&mut self, shape: &[i64]) -> Tensor {
        let numbers: Vec<f32> = (&mut self.rng)
            .sample_iter(StandardNormal)
            .take(shape.iter().product::<i64>() as usize)
            .collect();
        upload(&Tensor::from_slice(&numbers).reshape(shape), self.device)
    }

    /// `count` numbers from U[0, 1), fp64.
    pub fn uniform(&mut self, count: i64) -> Vec<f64> {
        (0..count).map(|_| self.rng.random::<f64>()).collect()
    }

    /// `count` numbers from N(0, 1), fp64.
    pub fn normal_scalars(&mut self, count: i64) -> Vec<f64> {
        (&mut self.rng).sample_iter(StandardNormal).take(count as usize).collect()
    }

    /// `count` integers from U{0 .. below}, int64 on the host.
    pub fn integers(&mut self, count: i64, below: i64) -> Vec<i64> {
        (0..count).map(|_| self.rng.random_range(0..below)).collect()
    }

    /// A seed for libtorch's own generator, from which dropout draws. libtorch's CPU generator keeps only 32 bits of a
    /// seed; that is enough for masks, and all other numbers do not use it.
    pub fn dropout_seed(&mut self) -> i64 {
        (self.rng.next_u64() >> 1) as i64
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn draw(seed: u64, iteration: u64, purpose: Purpose, index: u32) -> Vec<f32> {
        let mut stream = Stream::new(seed, iteration, purpose, index, Device::Cpu);
        Vec::try_from(stream.normal(&[4, 2]).reshape([-1])).unwrap()
    }

    #[test]
    fn a_stream_is_its_name() {
        let base = draw(1, 2, Purpose::FakeScorePhase, 3);
        assert_eq!(base, draw(1, 2, Purpose::FakeScorePhase, 3));
        for other in [
            draw(2, 2, Purpose::FakeScorePhase, 3),
            draw(1, 3, Purpose::FakeScorePhase, 3),
            draw(1, 2, Purpose::GeneratorPhase, 3),
            draw(1, 2, Purpose::FakeScorePhase, 4),
        ] {
            assert_ne!(base, other);
        }
    }

    /// Checkpoints outlive builds: a library update that changed the numbers would silently change resumed runs.
    #[test]
    fn the_numbers_never_change() {
        let mut stream = Stream::new(7, 11, Purpose::GeneratorPhase, 5, Device::Cpu);
        let normals: Vec<f32> = Vec::try_from(stream.normal(&[3])).unwrap();
        let got = (normals, stream.uniform(1)[0], stream.integers(4, 10));
        let expected = (vec![-0.09853032, 0.58907145, -0.83992374], 0.7363211464366894, vec![1, 9, 7, 7]);
        assert_eq!(got, expected);
    }

    #[test]
    fn normals_have_the_right_moments() {
        let mut stream = Stream::new(0, 0, Purpose::Evaluation, 0, Device::Cpu);
        let x = stream.normal(&[200_000]);
        assert!(x.mean(None).double_value(&[]).abs() < 0.01);
        assert!((x.std(true).double_value(&[]) - 1.0).abs() < 0.01);
    }
}
