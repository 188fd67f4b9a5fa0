//! What ranks hold of a sliced state at the start of a generation, and which of it they take over.
//!
//! All ranks exchange their claims and come to the same decision. Each slice has two holders; a rank whose group failed
//! before it made a step that others made can make it now, from the sums that they know.

use potstill_distill::{gradient::Sums, state::Slice};
use potstill_proto::cursor::{Cursor, Generation, Phase};

/// Slices of one cut of the state.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Cut {
    /// The generation that cut the state so.
    pub generation: Generation,
    /// The slice that the rank owns in it.
    pub slice: Slice,
    /// The slice that it holds a copy of.
    pub copy: Option<Slice>,
    /// Whether these are the slices that the new generation wants of this rank.
    pub fits: bool,
}

/// What one rank holds.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Claim {
    /// The cursor of its state.
    pub cursor: Cursor,
    /// The cuts that it holds slices of: one, or two after a takeover that was not completed. Empty: nothing.
    pub cuts: Vec<Cut>,
    /// The cursor that its prepared step leads to.
    pub prepared: Option<Cursor>,
    /// The sums of the step that led to its cursor.
    pub made: Option<Sums>,
}

/// What all ranks take over.
#[derive(Clone, Debug, PartialEq)]
pub struct Decision {
    /// The state's cursor.
    pub cursor: Cursor,
    /// The cut whose slices are sent.
    pub generation: Generation,
    /// The rank that sends each slice.
    pub senders: Vec<usize>,
    /// Whether each rank holds the slices already that it is to hold.
    pub fits: bool,
    /// The sums of the step that led to the cursor, for ranks that have only prepared it.
    pub made: Option<Sums>,
}

/// Numbers of a cut, and of a claim, as they travel.
const OF_CUT: usize = 6;
const CUTS: usize = 2;
/// Length of a claim as numbers.
pub const NUMBERS: usize = 9 + CUTS * OF_CUT;

fn of_cursor(cursor: Cursor) -> [f64; 2] {
    [cursor.iteration as f64, f64::from(u8::from(cursor.phase == Phase::Generator))]
}

fn to_cursor(numbers: &[f64]) -> Cursor {
    let phase = if numbers[1] == 0.0 { Phase::FakeScore } else { Phase::Generator };
    Cursor { iteration: numbers[0] as u64, phase }
}

impl Claim {
    /// As numbers, which fp64 holds exactly.
    pub fn numbers(&self) -> Vec<f64> {
        let mut numbers = of_cursor(self.cursor).to_vec();
        numbers.push(f64::from(u8::from(self.prepared.is_some())));
        numbers.extend(of_cursor(self.prepared.unwrap_or_default()));
        let made = self.made.unwrap_or_default();
        numbers.push(f64::from(u8::from(self.made.is_some())));
        numbers.extend([made.squares, made.non_finite, made.clipped_squares]);
        for cut in self.cuts.iter().take(CUTS) {
            let copy = cut.copy.map_or(-1.0, |copy| copy.rank as f64);
            let Slice { rank, world } = cut.slice;
            numbers.extend([1.0, cut.generation.0 as f64, rank as f64, world as f64, copy]);
            numbers.push(f64::from(u8::from(cut.fits)));
        }
        numbers.resize(NUMBERS, 0.0);
        numbers
    }

    /// From its [numbers](Self::numbers).
    pub fn of(numbers: &[f64]) -> Self {
        let (claim, cuts) = numbers.split_at(NUMBERS - CUTS * OF_CUT);
        let cuts = cuts.chunks(OF_CUT).filter(|cut| cut[0] != 0.0).map(|cut| {
            let world = cut[3] as usize;
            let slice = |rank: f64| Slice { rank: rank as usize, world };
            Cut {
                generation: Generation(cut[1] as u64),
                slice: slice(cut[2]),
                copy: (cut[4] >= 0.0).then(|| slice(cut[4])),
                fits: cut[5] != 0.0,
            }
        });
        let made = Sums { squares: claim[6], non_finite: claim[7], clipped_squares: claim[8] };
        Self {
            cursor: to_cursor(&claim[..2]),
            cuts: cuts.collect(),
            prepared: (claim[2] != 0.0).then(|| to_cursor(&claim[3..5])),
            made: (claim[5] != 0.0).then_some(made),
        }
    }

    fn cut(&self, generation: Generation) -> Option<&Cut> {
        self.cuts.iter().find(|cut| cut.generation == generation)
    }

    /// Whether the rank holds slices of a cut of the state at `cursor`, or can make the one step that leads there.
    pub fn reaches(&self, decision: &Decision) -> bool {
        let steps = decision.made.is_some() && self.prepared == Some(decision.cursor);
        self.cut(decision.generation).is_some() && (self.cursor == decision.cursor || steps)
    }
}

/// The furthest state of which every slice is there that `needed` says is not empty. Of several cuts of it that which all
/// ranks hold already as they are to hold it, or else the one whose slices have the most holders, or else the newest.
/// `None`: of each state that a rank holds, a slice is lost.
pub fn decide(claims: &[Claim], needed: impl Fn(Slice) -> bool) -> Option<Decision> {
    let of_claim = |claim: &Claim| {
        let cursor = claim.cursor;
        claim.cuts.iter().map(move |cut| (cursor, cut.generation, cut.slice.world)).collect::<Vec<_>>()
    };
    let mut states: Vec<(Cursor, Generation, usize)> = claims.iter().flat_map(of_claim).collect();
    states.sort_unstable();
    states.dedup();
    let whole = states.into_iter().filter_map(|(cursor, generation, world)| {
        let (decision, holders) = whole(claims, cursor, generation, world, &needed)?;
        Some(((cursor, decision.fits, holders, generation), decision))
    });
    whole.max_by_key(|(rank, _)| *rank).map(|(_, decision)| decision)
}

/// A state as one cut has it, if every slice is there, and the number of ranks that hold the slice with the fewest. Sums are
/// of one cut: another one's are of other steps.
fn whole(
    claims: &[Claim],
    cursor: Cursor,
    generation: Generation,
    world: usize,
    needed: impl Fn(Slice) -> bool,
) -> Option<(Decision, usize)> {
    let holders = || claims.iter().filter(|claim| claim.cut(generation).is_some());
    let made = holders().filter(|claim| claim.cursor == cursor).find_map(|claim| claim.made);
    let mut decision = Decision { cursor, generation, senders: vec![], fits: false, made };
    let reaching = || (0..).zip(claims).filter(|(_, claim)| claim.reaches(&decision));
    let of_cut = || reaching().filter_map(|(rank, claim)| Some((rank, claim.cut(generation)?)));
    let (mut senders, mut fewest) = (vec![], usize::MAX);
    for rank in 0..world {
        let slice = Slice { rank, world };
        let owners = || of_cut().filter(|(_, cut)| cut.slice == slice).map(|(sender, _)| sender);
        let keepers = || of_cut().filter(|(_, cut)| cut.copy == Some(slice)).map(|(sender, _)| sender);
        senders.push(match owners().chain(keepers()).next() {
            Some(sender) => sender,
            // Nothing is sent of an empty slice.
            None if !needed(slice) => 0,
            None => return None,
        });
        if needed(slice) {
            fewest = fewest.min(owners().count() + keepers().count());
        }
    }
    let fits = of_cut().filter(|(_, cut)| cut.fits).count() == claims.len();
    (decision.senders, decision.fits) = (senders, fits);
    Some((decision, fewest))
}

#[cfg(test)]
mod tests {
    use super::*;

    const SUMS: Sums = Sums { squares: 0.1, non_finite: 0.0, clipped_squares: 0.3 };

    fn at(iteration: u64, generation: u64, own: usize, world: usize) -> Claim {
        let slice = |rank| Slice { rank, world };
        let copy = (world > 1).then(|| slice((own + world - 1) % world));
        let cut = Cut { generation: Generation(generation), slice: slice(own), copy, fits: false };
        Claim { cursor: Cursor::boundary(iteration), cuts: vec![cut], prepared: None, made: None }
    }

    fn decided(claims: &[Claim]) -> Option<(u64, u64, Vec<usize>)> {
        let decision = decide(claims, |_| true)?;
        Some((decision.cursor.iteration, decision.generation.0, decision.senders))
    }

    #[test]
    fn claims_survive_the_journey() {
        let mut claim = at(1 << 40, 7, 2, 3);
        claim.prepared = Some(Cursor { iteration: 3, phase: Phase::Generator });
        claim.made = Some(SUMS);
        claim.cuts.push(Cut { fits: true, copy: None, ..claim.cuts[0] });
        assert_eq!(Claim::of(&claim.numbers()), claim);
        assert_eq!(Claim::of(&Claim::default().numbers()), Claim::default());
        assert_eq!(claim.numbers().len(), NUMBERS);
    }

    #[test]
    fn any_one_of_three_may_die_and_no_two() {
        let all = [at(5, 1, 0, 3), at(5, 1, 1, 3), at(5, 1, 2, 3)];
        assert_eq!(decided(&all), Some((5, 1, vec![0, 1, 2])));
        for dead in 0..3 {
            let mut claims = all.to_vec();
            claims[dead] = Claim::default();
            let keeper = (dead + 1) % 3;
            let senders = (0..3).map(|rank| if rank == dead { keeper } else { rank }).collect();
            assert_eq!(decided(&claims), Some((5, 1, senders)));
            claims[keeper] = Claim::default();
            assert_eq!(decided(&claims), None);
        }
        assert_eq!(decided(&[Claim::default()]), None);
    }

    #[test]
    fn a_rank_that_has_only_prepared_a_step_counts_where_another_has_made_it() {
        let mut behind = at(5, 1, 0, 2);
        behind.cuts[0].copy = None;
        let mut ahead = at(6, 1, 1, 2);
        ahead.cuts[0].copy = None;
        let claims = |behind: &Claim, ahead: &Claim| [behind.clone(), ahead.clone()];
        assert_eq!(decided(&claims(&behind, &ahead)), None);
        behind.prepared = Some(Cursor::boundary(6));
        assert_eq!(decided(&claims(&behind, &ahead)), None, "its sums are not known");
        ahead.made = Some(SUMS);
        let decision = decide(&claims(&behind, &ahead), |_| true).unwrap();
        assert_eq!((decision.cursor.iteration, decision.made), (6, Some(SUMS)));
    }

    #[test]
    fn a_further_state_that_is_not_whole_does_not_count() {
        // One that was cut off comes back with a step that the others do not have, and they have gone on in another cut.
        let stale = at(9, 1, 2, 3);
        assert_eq!(decided(&[at(5, 3, 0, 2), at(5, 3, 1, 2), stale.clone()]), Some((5, 3, vec![0, 1])));
        assert_eq!(decided(&[stale, at(5, 3, 0, 3)]), None);
        // Sums of a step of another cut do not help.
        let mut behind = at(5, 3, 0, 2);
        behind.prepared = Some(Cursor::boundary(6));
        let other = Claim { made: Some(SUMS), ..at(6, 2, 0, 2) };
        assert_eq!(decided(&[behind.clone(), other]), Some((6, 2, vec![1, 1])));
        let other = Claim { made: Some(SUMS), ..at(6, 2, 0, 3) };
        assert_eq!(decided(&[behind, other]), Some((5, 3, vec![0, 0])));
    }

    #[test]
    fn of_two_cuts_the_safer_one_is_gone_on_with() {
        let both = |old: Claim, new: Claim| Claim { cuts: [old.cuts, new.cuts].concat(), ..old };
        // Rank 1 of the old cut is dead; one has taken over the new slices, the other has not.
        let claims = [both(at(5, 1, 0, 3), at(5, 2, 0, 2)), at(5, 1, 2, 3)];
        assert_eq!(decided(&claims), Some((5, 2, vec![0, 0])), "each slice has one holder: the newest");
        let claims = [both(at(5, 1, 0, 3), at(5, 2, 0, 4)), at(5, 1, 2, 3)];
        assert_eq!(decided(&claims), Some((5, 1, vec![0, 1, 1])), "the other is not whole");
        // A fourth rank died before all had the new cut: of that two slices have one holder.
        let claims: Vec<Claim> = (0..3).map(|rank| both(at(5, 1, rank, 3), at(5, 2, rank, 4))).collect();
        assert_eq!(decided(&claims), Some((5, 1, vec![0, 1, 2])));
    }

    #[test]
    fn an_earlier_state_of_the_same_cut_counts_where_the_furthest_is_not_whole() {
        let mut ahead = at(6, 1, 0, 3);
        ahead.made = Some(SUMS);
        // Their prepared steps are gone.
        let claims = [ahead, at(5, 1, 1, 3), at(5, 1, 2, 3)];
        assert_eq!(decided(&claims), Some((5, 1, vec![1, 1, 2])));
    }

    #[test]
    fn nothing_is_sent_where_all_hold_what_they_want() {
        let mut claims = [at(5, 1, 0, 2), at(5, 1, 1, 2)];
        assert!(!decide(&claims, |_| true).unwrap().fits);
        claims.iter_mut().for_each(|claim| claim.cuts[0].fits = true);
        assert!(decide(&claims, |_| true).unwrap().fits);
        claims[1] = Claim::default();
        assert!(!decide(&claims, |_| true).unwrap().fits);
    }
}
