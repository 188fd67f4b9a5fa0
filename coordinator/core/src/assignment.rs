//! Which worker gets which rank in a generation, and where its state comes from.

use std::{cmp::Reverse, num::NonZeroU32};

use potstill_proto::{
    cursor::{Cursor, Generation},
    message::{Assignment, Existing, Partners, Replica, Source},
    micro_batches::MicroBatches,
};

use crate::{
    StreamId,
    ledger::CommittedCheckpoint,
    membership::{Member, Members},
    terms::Division,
};

/// Where a generation starts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Start {
    /// The state it starts from.
    pub cursor: Cursor,
    /// False when the source is a peer, which may be further than its last message said: then `cursor` is a lower
    /// bound.
    pub exact: bool,
}

/// A generation before it is opened.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Plan {
    /// Its members by rank.
    pub ranks: Vec<StreamId>,
    /// Where its state comes from.
    pub source: Source,
    /// Where it starts.
    pub start: Start,
    /// Each rank's partners; empty where there is nothing to share.
    pub partners: Vec<Partners>,
    /// Each rank's place in groups that hold all slices; empty where there are not several.
    pub replicas: Vec<Replica>,
}

/// The ranks by their hosts, one host after the other.
fn by_host(hosts: &[&str]) -> Vec<usize> {
    let mut ranks: Vec<usize> = (0..hosts.len()).collect();
    ranks.sort_by_key(|rank| hosts[*rank]);
    ranks
}

/// Places of ranks on these hosts in groups of at least `smallest`: the ranks of a host are in the same group, as far as group
/// and host are equally large. Empty where there is only one group.
#[must_use]
pub fn replicas(hosts: &[&str], smallest: NonZeroU32) -> Vec<Replica> {
    let ranks = u32::try_from(hosts.len()).unwrap_or(u32::MAX);
    let groups = Replica::count(ranks, smallest);
    if groups < 2 {
        return vec![];
    }
    let slices = ranks / groups;
    let mut replicas = vec![Replica { number: 0, slice: 0, slices }; hosts.len()];
    for (place, rank) in (0..).zip(by_host(hosts)) {
        replicas[rank] = Replica { number: place / slices, slice: place % slices, slices };
    }
    replicas
}

/// Partners of ranks on these hosts: each slice is copied to a rank on another host, as far as no host has more than half
/// of the ranks. Empty for one rank.
#[must_use]
pub fn partners(hosts: &[&str]) -> Vec<Partners> {
    let world = hosts.len();
    if world < 2 {
        return vec![];
    }
    // Hosts one after the other: the rank that is as far behind as the largest host has ranks is on another one.
    let by_host = by_host(hosts);
    let largest = by_host.chunk_by(|a, b| hosts[*a] == hosts[*b]).map(<[usize]>::len).max().unwrap_or(1);
    let shift = if largest < world { largest } else { 1 };
    let number = |rank: usize| u32::try_from(rank).unwrap_or(u32::MAX);
    let mut partners = vec![Partners { copies: 0, copied_by: 0 }; world];
    for (place, rank) in by_host.iter().enumerate() {
        let keeper = by_host[(place + shift) % world];
        partners[*rank].copied_by = number(keeper);
        partners[keeper].copies = number(*rank);
    }
    partners
}

/// The furthest state that a rank of the newest generation may hold which has not said what it holds: as far as any rank of
/// that generation, or as any member where the state came from a peer that may have been further than it had said.
fn may_hold(members: &Members, (generation, start): (Generation, Start)) -> Option<Cursor> {
    let of_it = |member: &Member| member.place.is_some_and(|place| place.generation == generation);
    let counts = |member: &Member| !start.exact || of_it(member);
    let held =
        members.iter().filter(|(_, member)| counts(member)).filter_map(|(_, member)| member.held).max();
    held.max(Some(start.cursor).filter(|cursor| *cursor > Cursor::default()))
}

/// Chooses at most `max_workers` of the members that can be given a place. The order of ranks: first the members that
/// had a rank, by that rank; then those that hold the furthest state; then all others by id. The state is that of the
/// member that is furthest, so that no finished step is lost, unless the newest checkpoint is beyond it. `opened` is the
/// newest generation, and where it started.
#[must_use]
pub fn plan(
    members: &Members,
    max_workers: u32,
    newest: Option<&CommittedCheckpoint>,
    division: Division,
    opened: (Generation, Start),
) -> Plan {
    let mut candidates: Vec<_> = members
        .eligible()
        .map(|(stream, m)| (m.place.map_or(u32::MAX, |p| p.rank), Reverse(m.held), m.id(), stream))
        .collect();
    let most = max_workers as usize;
    if division.is_sliced() && candidates.len() > most {
        // All that hold slices of the furthest state are needed.
        let unheard = may_hold(members, opened);
        let held = |stream: &StreamId, held: Option<Cursor>| {
            let member = members.get(*stream).filter(|member| member.is_unheard(opened.0));
            member.map_or(held, |_| held.max(unheard))
        };
        candidates
            .sort_by_key(|(rank, Reverse(cursor), id, stream)| (Reverse(held(stream, *cursor)), *rank, *id));
        candidates.truncate(most);
    }
    candidates.sort();
    // One that holds the furthest state is always among them.
    if let Some(furthest) = candidates.iter().map(|candidate| candidate.1.0).max().flatten()
        && let Some(first) = candidates.iter().position(|candidate| candidate.1.0 == Some(furthest))
        && first >= most
    {
        let holder = candidates.remove(first);
        candidates.insert(most.saturating_sub(1), holder);
    }
    candidates.truncate(most);

    let saved = newest.map_or(Cursor::default(), |c| Cursor::boundary(c.iteration));
    // The lowest of the ranks that are furthest.
    let furthest = (0u32..).zip(&candidates).filter_map(|(rank, c)| Some((c.1.0?, Reverse(rank)))).max();
    let (source, start) = match (furthest, newest) {
        (Some((cursor, Reverse(rank))), _) if cursor >= saved => {
            (Source::Peer { rank }, Start { cursor, exact: false })
        }
        (_, Some(checkpoint)) => {
            let manifest_key = checkpoint.manifest_key.clone();
            (Source::Checkpoint { manifest_key }, Start { cursor: saved, exact: true })
        }
        (_, None) => (Source::Fresh, Start { cursor: saved, exact: true }),
    };
    let ranks: Vec<StreamId> = candidates.into_iter().map(|c| c.3).collect();
    let host = |stream: &StreamId| members.get(*stream).map_or("", |member| member.hello.host.as_str());
    let hosts: Vec<&str> = ranks.iter().map(host).collect();
    let replicas = match division {
        Division::SlicesInGroups(smallest) => replicas(&hosts, smallest),
        _ => vec![],
    };
    let partners = match division.is_sliced() && replicas.is_empty() {
        true => partners(&hosts),
        false => vec![],
    };
    Plan { ranks, source, start, partners, replicas }
}

impl Plan {
    /// The number of ranks.
    #[must_use]
    pub fn world_size(&self) -> u32 {
        u32::try_from(self.ranks.len()).unwrap_or(u32::MAX)
    }

    /// Each rank's assignment, in the order of ranks.
    pub fn assignments(
        &self,
        generation: Generation,
        micro_batches: u32,
        evaluate_teacher: bool,
        existing: Existing,
    ) -> impl Iterator<Item = (StreamId, Assignment)> {
        let world_size = self.world_size();
        (0u32..).zip(&self.ranks).map(move |(rank, stream)| {
            let assignment = Assignment {
                generation,
                rank,
                world_size,
                micro_batches: MicroBatches::share(micro_batches, rank, world_size),
                source: self.source.clone(),
                evaluate_teacher,
                existing,
                start: self.start.cursor,
                partners: self.partners.get(rank as usize).copied(),
                replica: self.replicas.get(rank as usize).copied(),
            };
            (*stream, assignment)
        })
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use potstill_proto::{cursor::Phase, message::Place};

    use super::*;
    use crate::{Tick, run::fixtures::hello, terms::Timeouts};

    /// Members given as (id, rank in an earlier generation, held iteration).
    fn members(of: &[(&str, Option<u32>, Option<u64>)]) -> Members {
        let mut members = Members::new(Timeouts::new(Duration::from_secs(10), Duration::from_secs(300)));
        for (n, (id, rank, held)) in (0..).zip(of) {
            members.attach(Tick(0), StreamId(n), hello(id), None);
            members.set_ready(StreamId(n));
            let member = members.get_mut(StreamId(n)).unwrap();
            member.place = rank.map(|rank| Place { generation: Generation(1), rank });
            member.hold(Cursor::boundary(held.unwrap_or(0)));
        }
        members
    }

    fn names(members: &Members, plan: &Plan) -> Vec<String> {
        plan.ranks.iter().map(|s| members.get(*s).unwrap().id().to_string()).collect()
    }

    /// A plan after a generation whose state came from a peer.
    fn planned(
        members: &Members,
        most: u32,
        newest: Option<&CommittedCheckpoint>,
        division: Division,
    ) -> Plan {
        let start = Start { cursor: Cursor::default(), exact: false };
        let newest_generation =
            members.iter().filter_map(|(_, m)| m.place).map(|place| place.generation).max();
        plan(members, most, newest, division, (newest_generation.unwrap_or_default(), start))
    }

    fn checkpoint(iteration: u64) -> CommittedCheckpoint {
        CommittedCheckpoint { iteration, manifest_key: format!("m{iteration}") }
    }

    #[test]
    fn earlier_ranks_come_first_then_the_furthest_then_ids() {
        let members = members(&[
            ("d", None, None),
            ("c", None, None),
            ("b", None, Some(4)),
            ("z", Some(1), Some(4)),
            ("y", Some(3), Some(4)),
        ]);
        assert_eq!(names(&members, &planned(&members, 5, None, Division::Whole)), ["z", "y", "b", "c", "d"]);
        assert_eq!(names(&members, &planned(&members, 3, None, Division::Whole)), ["z", "y", "b"]);
    }

    #[test]
    fn one_that_holds_the_furthest_state_always_has_a_place() {
        let members = members(&[("a", Some(0), Some(1)), ("b", Some(1), None), ("c", None, Some(5))]);
        let plan = planned(&members, 2, None, Division::Whole);
        assert_eq!(
            (names(&members, &plan), plan.source),
            (vec!["a".into(), "c".into()], Source::Peer { rank: 1 })
        );
    }

    #[test]
    fn the_state_comes_from_the_furthest_the_newest_checkpoint_or_the_teacher() {
        let source = |members: &Members, newest: Option<u64>| {
            let newest = newest.map(checkpoint);
            let plan = planned(members, 8, newest.as_ref(), Division::Whole);
            (plan.source, plan.start.cursor.iteration, plan.start.exact)
        };
        let none = members(&[("a", None, None), ("b", None, None)]);
        assert_eq!(source(&none, None), (Source::Fresh, 0, true));
        assert_eq!(source(&none, Some(5)), (Source::Checkpoint { manifest_key: "m5".into() }, 5, true));
        let some = members(&[("a", Some(0), Some(6)), ("b", Some(1), Some(7)), ("c", Some(2), Some(7))]);
        assert_eq!(source(&some, Some(5)), (Source::Peer { rank: 1 }, 7, false));
        assert_eq!(source(&some, Some(7)), (Source::Peer { rank: 1 }, 7, false));
        assert_eq!(source(&some, Some(8)), (Source::Checkpoint { manifest_key: "m8".into() }, 8, true));
    }

    #[test]
    fn a_phase_counts_as_further() {
        let mut members = members(&[("a", Some(0), Some(6)), ("b", Some(1), None)]);
        members.get_mut(StreamId(1)).unwrap().hold(Cursor { iteration: 6, phase: Phase::Generator });
        assert_eq!(planned(&members, 2, None, Division::Whole).source, Source::Peer { rank: 1 });
    }

    #[test]
    fn assignments_share_the_micro_batches() {
        let members = members(&[("a", None, None), ("b", None, None), ("c", None, None)]);
        let plan = planned(&members, 2, None, Division::Whole);
        let assigned: Vec<_> = plan.assignments(Generation(4), 5, true, Existing::default()).collect();
        let shares: Vec<_> = assigned.iter().map(|(_, a)| (a.rank, a.micro_batches.indices())).collect();
        assert_eq!(shares, [(0, 0..3), (1, 3..5)]);
        for (_, a) in &assigned {
            assert_eq!((a.generation, a.world_size, a.evaluate_teacher), (Generation(4), 2, true));
        }
    }

    #[test]
    fn a_slice_is_copied_to_another_host_wherever_that_is_possible() {
        for (hosts, on_the_same) in [
            (vec!["a", "b"], 0),
            (vec!["a", "a", "b", "b"], 0),
            (vec!["a", "b", "a", "b"], 0),
            (vec!["a", "a", "a", "b", "b", "c"], 0),
            (vec!["c", "b", "b", "a", "c"], 0),
            (vec!["a", "a", "a"], 3),
            (vec!["a", "a", "a", "b"], 2),
        ] {
            let partners = partners(&hosts);
            for (rank, of) in partners.iter().enumerate() {
                assert_ne!(of.copies as usize, rank);
                assert_eq!(partners[of.copies as usize].copied_by as usize, rank, "{hosts:?}");
            }
            let same =
                partners.iter().enumerate().filter(|(rank, of)| hosts[of.copies as usize] == hosts[*rank]);
            assert_eq!(same.count(), on_the_same, "{hosts:?}");
        }
        assert!(partners(&["a"]).is_empty());
    }

    #[test]
    fn groups_are_equal_and_those_of_hosts_where_they_can_be() {
        let smallest = |ranks| NonZeroU32::new(ranks).unwrap();
        for (ranks, size, expected) in [
            (8, 4, 2),
            (8, 8, 1),
            (7, 4, 1),
            (12, 4, 3),
            (10, 4, 2),
            (9, 2, 3),
            (4, 1, 4),
            (3, 5, 1),
            (1, 1, 1),
        ] {
            assert_eq!(Replica::count(ranks, smallest(size)), expected, "{ranks} in groups of {size}");
        }
        let places = |hosts: &[&str], size| -> Vec<_> {
            let replicas = replicas(hosts, smallest(size));
            replicas.iter().map(|of| (of.number, of.slice)).collect()
        };
        assert_eq!(places(&["b", "a", "a", "b"], 2), [(1, 0), (0, 0), (0, 1), (1, 1)]);
        assert_eq!(places(&["a", "a", "b"], 2), []);
        assert_eq!(places(&["a", "a", "a", "b"], 2), [(0, 0), (0, 1), (1, 0), (1, 1)]);
    }

    #[test]
    fn all_that_hold_slices_of_the_furthest_state_come_before_others_with_a_rank() {
        let members = members(&[
            ("a", Some(0), Some(1)),
            ("b", Some(1), Some(1)),
            ("c", Some(3), Some(5)),
            ("d", Some(2), Some(5)),
        ]);
        assert_eq!(names(&members, &planned(&members, 2, None, Division::Whole)), ["a", "d"]);
        assert_eq!(names(&members, &planned(&members, 2, None, Division::Slices)), ["d", "c"]);
        assert_eq!(names(&members, &planned(&members, 3, None, Division::Slices)), ["a", "d", "c"]);
    }

    #[test]
    fn a_rank_that_has_not_said_yet_what_it_holds_is_not_pushed_out_by_older_states() {
        let mut members = members(&[
            ("old", Some(0), Some(5)),
            ("older", Some(1), Some(4)),
            ("silent", Some(2), None),
            ("new", None, None),
        ]);
        let place = Place { generation: Generation(2), rank: 2 };
        let member = members.get_mut(StreamId(2)).unwrap();
        (member.place, member.unheard) = (Some(place), true);
        assert_eq!(names(&members, &planned(&members, 2, None, Division::Slices)), ["old", "silent"]);
        // Once it has said that it holds nothing, those that hold slices come first.
        members.get_mut(StreamId(2)).unwrap().left(Cursor::default());
        assert_eq!(names(&members, &planned(&members, 2, None, Division::Slices)), ["old", "older"]);
    }

    #[test]
    fn a_holder_that_was_cut_off_comes_before_ranks_that_said_that_they_hold_nothing() {
        let members = members(&[("a", Some(0), None), ("b", Some(1), None), ("back", None, Some(5))]);
        let plan = planned(&members, 2, None, Division::Slices);
        assert_eq!(names(&members, &plan), ["a", "back"]);
        assert_eq!(plan.source, Source::Peer { rank: 1 });
    }

    #[test]
    fn ranks_that_started_from_a_checkpoint_hold_no_more_than_it_unless_one_of_them_said_so() {
        let mut members = members(&[
            ("a", Some(0), None),
            ("b", Some(1), None),
            ("back", None, Some(7)),
            ("also-back", None, Some(7)),
        ]);
        for rank in 0..2 {
            members.get_mut(StreamId(rank)).unwrap().unheard = true;
        }
        let start = Start { cursor: Cursor::boundary(4), exact: true };
        let chosen = |members: &Members| {
            names(members, &plan(members, 2, None, Division::Slices, (Generation(1), start)))
        };
        assert_eq!(chosen(&members), ["also-back", "back"]);
        members.get_mut(StreamId(1)).unwrap().hold(Cursor::boundary(8));
        assert_eq!(chosen(&members), ["a", "b"]);
    }
}
