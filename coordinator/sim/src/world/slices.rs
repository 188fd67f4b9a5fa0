//! States that are held in slices: which of them the ranks of a generation can put together.

use std::collections::{BTreeMap, BTreeSet};

use potstill_proto::message::{Assignment, FromWorker, Replica, Source};

use super::World;
use crate::{
    process::{Process, Slices, Stage},
    state::State,
};

/// Each cut of a state that processes hold slices of, with those slices that have a holder among them.
fn cuts<'a>(ranks: impl Iterator<Item = &'a Process>, state: State) -> BTreeMap<u64, (u32, Vec<u32>)> {
    let mut cuts: BTreeMap<u64, (u32, Vec<u32>)> = BTreeMap::new();
    for slices in ranks.filter(|of| of.reaches(state)).flat_map(|of| &of.slices) {
        let (_, held) = cuts.entry(slices.generation).or_insert((slices.count, vec![]));
        held.push(slices.own);
        held.extend(slices.copy);
    }
    cuts
}

/// The newest generation whose slices of a state are all held by these processes, if there is one.
pub fn complete<'a, I: Iterator<Item = &'a Process>>(ranks: impl Fn() -> I, state: State) -> Option<u64> {
    let whole = |(count, held): &(u32, Vec<u32>)| (0..*count).all(|slice| held.contains(&slice));
    cuts(ranks(), state).into_iter().rfind(|(_, cut)| whole(cut)).map(|(generation, _)| generation)
}

impl World {
    /// The ranks of a generation compare what they hold: it starts from the furthest state of which all slices are there,
    /// if that is as far as the assignment expects.
    pub(super) fn find_slices(&mut self, generation: u64) {
        let members = self.groups[&generation].members.clone();
        let ranks = || members.iter().map(|member| &self.processes[*member]);
        let Some(place) = ranks().find_map(|of| of.place.as_ref()) else { return };
        if !matches!(place.source, Source::Peer { .. }) {
            return;
        }
        let states = || ranks().filter_map(|of| of.state);
        let whole = states().filter_map(|state| Some((state, complete(ranks, state)?)));
        let whole = whole.max_by_key(|(state, cut)| (state.cursor, *cut));
        let incomplete = whole.is_none_or(|(state, _)| state.cursor < place.start);
        let known = |state: &State| !self.given_up.contains(&state.lineage);
        let furthest = states().filter(known).max_by_key(|state| state.cursor);
        if let Some(state) =
            furthest.filter(|state| whole.is_none_or(|(whole, _)| whole.cursor < state.cursor))
        {
            let newest = ranks().flat_map(|of| &of.slices).map(|slices| slices.generation).max();
            let its_newest = cuts(ranks(), state).into_keys().next_back();
            let lost = newest.filter(|_| newest == its_newest);
            if let Some(lost) = lost.and_then(|cut| self.lost_slice(state, cut, &members)) {
                return self.breaks(format!("generation {generation} misses {lost}"));
            }
        }
        if whole.is_none() {
            // The older states that others hold are given up with it.
            let states = self.processes.iter().filter_map(|of| of.state);
            self.given_up.extend(states.map(|state| state.lineage));
        }
        let group = self.groups.entry(generation).or_default();
        (group.source, group.incomplete) = (whole.map(|(state, _)| state), incomplete);
        group.cut = whole.map(|(_, cut)| cut);
    }

    /// A rank leaves its group, since the slices of the state that it expects are not there; `earlier`: those of this one
    /// are.
    pub(super) fn cannot_put_together(&mut self, process: usize, earlier: Option<State>) {
        let generation = self.processes[process].generation();
        let cursor = earlier.map(|state| state.cursor).unwrap_or_default();
        let error = "a slice of the state is gone".to_owned();
        let message = FromWorker::StateIncomplete { generation, cursor, error };
        if earlier.is_none() {
            return self.loses_its_state(process, message);
        }
        self.is_gone(process);
        self.processes[process].enter(Stage::Idle);
        self.says(process, message);
    }

    /// A slice of a cut that all its ranks have taken over, which is lost although it has only one holder, or one of its
    /// holders is among these processes.
    fn lost_slice(&self, state: State, cut: u64, members: &[usize]) -> Option<String> {
        let (holders, count) = (self.holders.get(&cut)?, self.groups.get(&cut)?.members.len());
        let loaded: BTreeSet<usize> = holders.iter().map(|(_, holder)| *holder).collect();
        if loaded.len() < count {
            return None;
        }
        let has = |holder: usize, slice| {
            let of = &self.processes[holder];
            of.reaches(state) && of.slices.iter().any(|held| held.generation == cut && held.has(slice))
        };
        let here = |holder: &usize| members.contains(holder) && self.processes[*holder].alive;
        (0..count as u32).find_map(|slice| {
            let of_it = || holders.iter().filter(move |(held, _)| *held == slice).map(|(_, holder)| *holder);
            if of_it().any(|holder| here(&holder) && has(holder, slice)) {
                return None;
            }
            let forgot = of_it().find(|holder| here(holder));
            match (forgot, of_it().count()) {
                (Some(holder), _) => {
                    Some(format!("slice {slice} of generation {cut}, which w{holder} has held"))
                }
                (None, 1) if count > 1 => {
                    Some(format!("slice {slice} of generation {cut}, which one rank held"))
                }
                _ => None,
            }
        })
    }

    /// A rank makes the step that another is known to have made, or gives up what it holds of another state.
    pub(super) fn catches_up(&mut self, process: usize, generation: u64) {
        let source = self.groups[&generation].source;
        let of = &mut self.processes[process];
        match source.filter(|source| of.reaches(*source)) {
            Some(source) => of.state = Some(source),
            None => of.forget(),
        }
        of.prepared = false;
    }

    /// A rank has taken over the slices of its place.
    pub(super) fn takes_slices(&mut self, process: usize, place: &Assignment) {
        if !self.scenario.sliced {
            return;
        }
        let copy = place.partners.map(|partners| partners.copies);
        let whole = Replica { number: 0, slice: place.rank, slices: place.world_size };
        let Replica { slice: own, slices: count, .. } = place.replica.unwrap_or(whole);
        let slices = Slices { generation: place.generation.0, count, own, copy };
        // What the others take theirs from is kept until all have them.
        let cut = self.groups[&place.generation.0].cut;
        let of = &mut self.processes[process];
        of.slices.retain(|slices| Some(slices.generation) == cut);
        of.slices.push(slices);
        let holders = self.holders.entry(place.generation.0).or_default();
        holders.extend([Some(own), copy].into_iter().flatten().map(|slice| (slice, process)));
    }
}
