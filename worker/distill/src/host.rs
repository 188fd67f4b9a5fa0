//! Vectors in the host's memory that belong to a network on a GPU. They are worked on in pieces: while one is worked on, the next one
//! is on its way.

use std::ops::Range;

use potstill_torch_ext::upload;
use tch::{Cuda, Device, Tensor, no_grad};

/// Elements of a piece: 64 MiB of fp32.
pub const PIECE: i64 = 1 << 24;

/// Calls `work` with each piece of a flat vector in the host's memory, and the elements that it is.
pub fn for_each_piece(vector: &Tensor, piece: i64, mut work: impl FnMut(Range<i64>, &Tensor)) {
    let numel = vector.numel() as i64;
    let fetch = |start: i64| {
        let range = start..(start + piece).min(numel);
        (start < numel).then(|| (range.clone(), download(&part(vector, &range))))
    };
    let mut next = fetch(0);
    wait(vector.device());
    while let Some((range, here)) = next {
        next = fetch(range.end);
        work(range, &here);
        wait(vector.device());
    }
}

/// Sets a flat vector to the values of one in the host's memory, of another data type perhaps, piece by piece.
pub fn copy_in_pieces(to: &Tensor, from: &Tensor, piece: i64) {
    let numel = to.numel() as i64;
    no_grad(|| {
        for start in (0..numel).step_by(piece as usize) {
            let range = start..(start + piece).min(numel);
            part(to, &range).copy_(&upload(&part(from, &range).to_kind(to.kind()), to.device()));
        }
    });
}

/// Elements of a flat vector.
pub fn part(vector: &Tensor, range: &Range<i64>) -> Tensor {
    vector.narrow(0, range.start, range.end - range.start)
}

/// A copy in the host's memory, which is there after [`wait`].
fn download(tensor: &Tensor) -> Tensor {
    match tensor.device() {
        // Into page-locked memory.
        Device::Cuda(_) => tensor.to_device_(Device::Cpu, tensor.kind(), true, false),
        _ => tensor.to_device(Device::Cpu),
    }
}

fn wait(device: Device) {
    if let Device::Cuda(index) = device {
        Cuda::synchronize(index as i64);
    }
}

#[cfg(test)]
mod tests {
    use tch::Kind;

    use super::*;

    #[test]
    fn pieces_are_the_whole_in_their_order() {
        for (numel, piece) in [(10, 4), (8, 4), (3, 4), (0, 4)] {
            let vector = Tensor::arange(numel, (Kind::Float, Device::Cpu));
            let (mut end, copy) = (0, Tensor::zeros([numel], (Kind::BFloat16, Device::Cpu)));
            for_each_piece(&vector, piece, |range, values| {
                assert!(range.start == end && values.equal(&part(&vector, &range)));
                end = range.end;
            });
            assert_eq!(end, numel);
            copy_in_pieces(&copy, &vector, piece);
            assert!(copy.equal(&vector.to_kind(Kind::BFloat16)));
        }
    }
}
