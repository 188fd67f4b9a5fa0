//! State from peers: the rank that is furthest broadcasts its cursor and its state to the others. Where each rank holds
//! a slice of the state, every slice comes from a rank that holds it.

use potstill_c10d::{Error, ProcessGroup};
use potstill_distill::state::{COUNTERS, Part, Slice, State, Trained};
use potstill_proto::cursor::{Cursor, Phase};
use tch::{Device, Kind, Tensor, no_grad};

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

/// Sets the weights of all ranks to those of the ranks' slices.
///
/// # Errors
/// The collective failed.
pub fn gather_weights(group: &ProcessGroup, trained: &Trained) -> Result<(), Error> {
    let (own, all) = trained.gathered();
    group.all_gather_into(&all, &own)?.wait(None)
}

/// The elements of G_ema from all ranks, on every rank, fp32.
///
/// # Errors
/// The collective failed.
pub fn gather_average(group: &ProcessGroup, state: &State) -> Result<Tensor, Error> {
    let average = state.average();
    let slice = state.layout().slice;
    if slice.world == 1 {
        return Ok(average);
    }
    let numel = state.generator.network().parameters().flat().numel() as i64;
    let width = slice.width(numel);
    let all = Tensor::zeros([width * slice.world as i64], (Kind::Float, average.device()));
    let own = all.narrow(0, width * slice.rank as i64, width);
    no_grad(|| own.narrow(0, 0, average.size()[0]).copy_(&average));
    group.all_gather_into(&all, &own)?.wait(None)?;
    group.settle()?;
    Ok(all.narrow(0, 0, numel))
}

/// Fills the slices of `state`, which has the layout of this generation, from the slices that the ranks hold of an
/// earlier one: `held`, with its cursor. `None`: no rank holds some slice that is needed. All ranks return the same.
///
/// # Errors
/// A collective failed; `state` must not be used then.
pub fn reshard(
    group: &ProcessGroup,
    root: usize,
    mut held: Option<&mut State>,
    cursor: Cursor,
    state: &mut State,
) -> Result<Option<Cursor>, Error> {
    let device = group.device();
    let slice = match &held {
        Some(held) if !held.torn => held.layout().slice,
        _ => Slice { rank: 0, world: 0 },
    };
    let [iteration, phase] = numbers(cursor);
    let claim = Tensor::from_slice(&[iteration, phase, slice.rank as i64, slice.world as i64]);
    let (work, claims) = group.all_gather(&claim.to_device(device))?;
    work.wait(None)?;
    let claims: Vec<Vec<i64>> =
        claims.iter().map(|claim| Vec::try_from(claim.to_device(Device::Cpu)).unwrap_or_default()).collect();
    let (wanted, me) = (&claims[root], group.member().rank);
    let world = wanted[3] as usize;
    let serves = |claim: &[i64]| (&claim[..2], claim[3]) == (&wanted[..2], wanted[3]);
    // Memory of weights that both states share is about to change.
    if let Some(held) = held.as_mut().filter(|_| !serves(&claims[me])) {
        held.torn = true;
    }
    let holder = |rank: usize| claims.iter().position(|claim| serves(claim) && claim[2] as usize == rank);
    let parts = state.parts();
    let sources: Vec<(Slice, Option<usize>)> =
        (0..world).map(|rank| (Slice { rank, world }, holder(rank))).collect();
    let whole = |part: &Part| part.entries.iter().map(|entry| entry.numel()).sum::<i64>();
    let needed = |slice: &Slice| parts.iter().any(|part| !slice.range(whole(part)).is_empty());
    if world == 0 || sources.iter().any(|(slice, holder)| holder.is_none() && needed(slice)) {
        return Ok(None);
    }
    let own = held.as_deref().map(State::parts);
    for (index, part) in parts.iter().enumerate() {
        for (slice, holder) in &sources {
            let Some(holder) = *holder else { continue };
            // Values that are not sliced are the same on all ranks: they come from the holder of the first slice.
            let range = match part.name == COUNTERS {
                true if slice.rank > 0 => continue,
                true => 0..whole(part),
                false => slice.range(whole(part)),
            };
            if range.is_empty() {
                continue;
            }
            let values = match &own {
                Some(own) if holder == me => own[index].values.to_device(device),
                _ => Tensor::empty([range.end - range.start], (Kind::Float, device)),
            };
            group.broadcast(&values, holder)?.wait(None)?;
            let wanted = part.held();
            let (from, to) = (range.start.max(wanted.start), range.end.min(wanted.end));
            if from < to {
                let found = values.narrow(0, from - range.start, to - from);
                no_grad(|| part.values.narrow(0, from - wanted.start, to - from).copy_(&found));
            }
        }
    }
    let cursor = cursor_of(wanted);
    publish(group, state)?;
    Ok(Some(cursor))
}

/// Updates the networks' weights from new values of the parts.
///
/// # Errors
/// A collective failed.
pub fn publish(group: &ProcessGroup, state: &mut State) -> Result<(), Error> {
    state.settle();
    if state.layout().slice.world > 1 {
        gather_weights(group, &state.generator)?;
        gather_weights(group, &state.fake_score)?;
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
