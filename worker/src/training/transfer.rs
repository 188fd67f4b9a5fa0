//! State from peers: the rank that is furthest broadcasts its cursor and its state to the others. Where each rank holds
//! a slice of the state, every slice comes from a rank that holds it.

use potstill_c10d::{Error, ProcessGroup, Work};
use potstill_distill::state::{COUNTERS, Slice, State, Trained};
use potstill_proto::cursor::{Cursor, Phase};
use tch::{Device, Kind, Tensor, no_grad};

use super::claims::Claim;

/// Replaces the state and the cursor of all ranks by those of rank `root`.
///
/// # Errors
/// A collective failed. The state may then be a mixture of the two and must not be used.
pub fn broadcast(
    group: &ProcessGroup,
    root: usize,
    state: &mut State,
    cursor: Cursor,
) -> Result<Cursor, Error> {
    let sent = Tensor::from_slice(&numbers(cursor)).to_device(group.device());
    let mut works = vec![group.broadcast(&sent, root)?];
    // Tensors on another device than the group's are sent as copies.
    let travelling: Vec<Tensor> =
        state.parts().iter().map(|part| part.values.to_device(group.device())).collect();
    for values in &travelling {
        works.push(group.broadcast(values, root)?);
    }
    for work in works {
        work.wait(None)?;
    }
    group.settle()?;
    for (part, values) in state.parts().iter().zip(&travelling) {
        if part.values.device() != values.device() {
            no_grad(|| part.values.shallow_clone().copy_(values));
        }
    }
    state.settle();
    Ok(cursor_of(&Vec::try_from(sent.to_device(Device::Cpu)).unwrap_or_default()))
}

/// Starts to set the weights of all ranks to those of the ranks' slices, where they are held.
///
/// # Errors
/// The collective failed.
pub fn gather_weights(group: &ProcessGroup, trained: &Trained) -> Result<Option<Work>, Error> {
    let gather = |(own, all): (Tensor, Tensor)| group.all_gather_into(&all, &own);
    trained.gathered().map(gather).transpose()
}

/// The elements of G_ema from all ranks, on every rank, fp32, on the device of the networks.
///
/// # Errors
/// The collective failed.
pub fn gather_average(group: &ProcessGroup, state: &State) -> Result<Tensor, Error> {
    let flat = state.generator.network().parameters().flat();
    let own = state.average().to_device(flat.device());
    let slice = state.layout().slice;
    if slice.world == 1 {
        return Ok(own);
    }
    let (numel, width) = (flat.numel() as i64, slice.width(flat.numel() as i64));
    let all = Tensor::zeros([width * slice.world as i64], (own.kind(), own.device()));
    let place = all.narrow(0, width * slice.rank as i64, width);
    no_grad(|| place.narrow(0, 0, own.size()[0]).copy_(&own));
    group.all_gather_into(&all, &place)?.wait(None)?;
    group.settle()?;
    Ok(all.narrow(0, 0, numel))
}

/// The claims of all ranks.
///
/// # Errors
/// The collective failed.
pub fn exchange_claims(group: &ProcessGroup, claim: &Claim) -> Result<Vec<Claim>, Error> {
    let own = Tensor::from_slice(&claim.numbers()).to_device(group.device());
    let (work, claims) = group.all_gather(&own)?;
    work.wait(None)?;
    group.settle()?;
    let numbers = |claim: &Tensor| Vec::try_from(claim.to_device(Device::Cpu)).unwrap_or_default();
    Ok(claims.iter().map(|claim| Claim::of(&numbers(claim))).collect())
}

/// Fills the slices of `state`, which has the layout of this generation, from those that the ranks hold of an earlier one.
/// `senders`: the rank that sends each of them. `held`: what this rank holds, if it can be sent.
///
/// # Errors
/// A collective failed; `state` must not be used then.
pub fn reshard(
    group: &ProcessGroup,
    senders: &[usize],
    held: Option<&State>,
    state: &State,
) -> Result<(), Error> {
    let (device, me) = (group.device(), group.member().rank);
    let targets = state.all_parts();
    for (rank, sender) in senders.iter().enumerate() {
        let slice = Slice { rank, world: senders.len() };
        let own = held.filter(|_| *sender == me).and_then(|held| held.parts_of_slice(slice));
        for part in state.parts() {
            // Values that are not sliced are the same on all ranks: they come with the first slice.
            let range = match part.name == COUNTERS {
                true if rank > 0 => continue,
                true => 0..part.whole(),
                false => slice.range(part.whole()),
            };
            if range.is_empty() {
                continue;
            }
            let found = own.iter().flatten().find(|own| own.name == part.name);
            let values = match found {
                Some(own) => own.values.to_device(device),
                None => Tensor::empty([range.end - range.start], (Kind::Float, device)),
            };
            group.broadcast(&values, *sender)?.wait(None)?;
            for target in targets.iter().filter(|target| target.name == part.name) {
                let wanted = target.held();
                let (from, to) = (range.start.max(wanted.start), range.end.min(wanted.end));
                if from < to {
                    let found = values.narrow(0, from - range.start, to - from);
                    no_grad(|| target.values.narrow(0, from - wanted.start, to - from).copy_(&found));
                }
            }
        }
    }
    group.settle()
}

fn numbers(cursor: Cursor) -> [i64; 2] {
    [cursor.iteration as i64, i64::from(cursor.phase == Phase::Generator)]
}

fn cursor_of(numbers: &[i64]) -> Cursor {
    let phase = if numbers[1] == 0 { Phase::FakeScore } else { Phase::Generator };
    Cursor { iteration: numbers[0] as u64, phase }
}
