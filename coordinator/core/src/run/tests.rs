//! Each rule as events and the actions they lead to.

use std::{collections::BTreeSet, num::NonZeroU32, time::Duration};

use potstill_proto::{
    PROTOCOL,
    cursor::{Cursor, Generation, Phase},
    message::{Assignment, FromWorker, Hello, Place, Request, Source, ToWorker},
    scores::{Evaluation, Scores, Subject},
    wire,
};

use super::{Core, Setup, fixtures::hello};
use crate::{
    Action, ClientId, Event, StreamId, Tick, Uncommitted,
    ledger::CommittedCheckpoint,
    observation::{Observation, Outcome},
    record::Record,
    terms::{Division, Terms, Timeouts},
};

const DEAD: u64 = 1000;
const MOMENT: u64 = 25;
const WAIT: u64 = 5000;
const ITERATIONS: u64 = 4;

fn setup(min: u32, max: u32) -> Setup {
    let terms = Terms {
        iterations: ITERATIONS,
        micro_batches: 4,
        micro_batch: 2,
        min_workers: min,
        max_workers: max,
        timeouts: Timeouts::new(Duration::from_millis(DEAD), Duration::from_millis(WAIT)),
        scored: false,
        collapse_share: 0.25,
        division: Division::Whole,
        stop_after_failures: None,
        straggler_factor: 1.5,
        replace_stragglers: false,
    };
    Setup {
        coordinator: "c".into(),
        address: "here:1".into(),
        certificate: None,
        run_id: "run".into(),
        terms,
        specification: "toml".into(),
        storage_url: "memory:///".into(),
        history: Vec::new(),
        checkpoints: Vec::new(),
        ranks_may_live: true,
        from_teacher: false,
    }
}

/// A core and the clock it is shown.
struct World {
    core: Core,
    now: u64,
}

impl World {
    fn new(setup: Setup) -> Self {
        let mut world = Self { core: Core::new(setup), now: 100 };
        world.step(Event::Started);
        world
    }

    /// A world in which `n` workers, on streams 0 to n−1, train in generation 1.
    fn training(n: u64, max: u32) -> Self {
        let mut world = Self::new(setup(1, max));
        for stream in 0..n {
            world.attach(stream);
        }
        if n < u64::from(max) {
            world.pass(DEAD - 1, n);
            world.later(1);
        }
        assert_eq!(world.core.generation, Generation(1));
        assert_eq!(world.core.status().state(), wire::RunState::Training);
        world
    }

    fn step(&mut self, event: Event) -> Vec<Action> {
        let mut actions = Vec::new();
        self.core.step(Tick(self.now), event, &mut actions);
        actions
    }

    /// A fresh worker attaches and has loaded what the run reads.
    fn attach(&mut self, stream: u64) -> Vec<Action> {
        self.attach_with(stream, hello(&format!("w{stream}")))
    }

    fn attach_with(&mut self, stream: u64, hello: Hello) -> Vec<Action> {
        let mut actions = self.step(Event::Attached { stream: StreamId(stream), hello });
        actions.extend(self.says(stream, FromWorker::Ready));
        actions
    }

    fn close(&mut self, stream: u64) -> Vec<Action> {
        self.step(Event::Closed { stream: StreamId(stream), reason: "connection reset".into() })
    }

    fn says(&mut self, stream: u64, message: FromWorker) -> Vec<Action> {
        self.step(Event::Received { stream: StreamId(stream), message })
    }

    fn later(&mut self, millis: u64) -> Vec<Action> {
        self.now += millis;
        self.step(Event::Timer)
    }

    /// Lets time pass while the first `n` workers send heartbeats.
    fn pass(&mut self, millis: u64, n: u64) {
        let end = self.now + millis;
        while self.now < end {
            self.now = end.min(self.now + DEAD / 10);
            for stream in 0..n {
                self.says(stream, heartbeat(0, Cursor::default()));
            }
        }
    }

    fn report(&mut self, stream: u64, iteration: u64) -> Vec<Action> {
        let generation = self.core.generation.0;
        let rank = self.core.rank(StreamId(stream)).unwrap();
        let world = self.core.steps.world_size();
        self.says(stream, FromWorker::StepReport(report(generation, iteration, rank, world)))
    }

    fn receipt(&mut self, stream: u64, iteration: u64) -> Vec<Action> {
        let generation = self.core.generation.0;
        let rank = self.core.rank(StreamId(stream)).unwrap();
        let receipt = wire::ShardReceipt { generation, iteration, rank, bytes: 5, ..Default::default() };
        self.says(stream, FromWorker::ShardReceipt(receipt))
    }

    fn finish(&mut self, stream: u64, iteration: u64) -> Vec<Action> {
        let generation = self.core.generation;
        self.says(stream, FromWorker::Finished { generation, cursor: Cursor::boundary(iteration) })
    }

    fn yields(&mut self, stream: u64, iteration: u64) -> Vec<Action> {
        let generation = self.core.generation;
        self.says(stream, FromWorker::Yielded { generation, cursor: Cursor::boundary(iteration) })
    }

    fn committed(&mut self, iteration: u64) -> Vec<Action> {
        self.step(Event::CommitAnswered { iteration, result: Ok(format!("m{iteration}")) })
    }
}

fn heartbeat(generation: u64, cursor: Cursor) -> FromWorker {
    FromWorker::Heartbeat {
        generation: Generation(generation),
        cursor,
        progress: 0,
        activity: "training".into(),
        waiting: false,
    }
}

fn report(generation: u64, iteration: u64, rank: u32, world: u32) -> wire::StepReport {
    let share = potstill_proto::micro_batches::MicroBatches::share(4, rank, world);
    wire::StepReport {
        generation,
        iteration,
        first_micro_batch: share.first,
        micro_batches: share.count,
        samples: share.count * 2,
        ..Default::default()
    }
}

fn collective_failed(generation: u64, iteration: u64) -> FromWorker {
    FromWorker::CollectiveFailed {
        generation: Generation(generation),
        cursor: Cursor::boundary(iteration),
        error: "connection reset by peer".into(),
    }
}

fn stop() -> Event {
    Event::StopRequested { reason: "Ctrl-C".into() }
}

fn assignments(actions: &[Action]) -> Vec<(u64, Assignment)> {
    actions
        .iter()
        .filter_map(|action| match action {
            Action::Send { stream, message: ToWorker::Assignment(a) } => Some((stream.0, a.clone())),
            _ => None,
        })
        .collect()
}

fn places(actions: &[Action]) -> Vec<(u64, u64, u32)> {
    assignments(actions).iter().map(|(stream, a)| (*stream, a.generation.0, a.rank)).collect()
}

fn source(actions: &[Action]) -> Source {
    assignments(actions).first().expect("assignments").1.source.clone()
}

fn abandoned(actions: &[Action]) -> Vec<u64> {
    actions
        .iter()
        .filter_map(|action| match action {
            Action::Send { stream, message: ToWorker::Abandon { .. } } => Some(stream.0),
            _ => None,
        })
        .collect()
}

fn requests(actions: &[Action]) -> Vec<(u64, Request)> {
    actions
        .iter()
        .filter_map(|action| match action {
            Action::Send { stream, message: ToWorker::Request { what, .. } } => Some((stream.0, *what)),
            _ => None,
        })
        .collect()
}

fn outcome(actions: &[Action]) -> Option<Outcome> {
    actions.iter().find_map(|action| match action {
        Action::End(outcome) => Some(outcome.clone()),
        _ => None,
    })
}

fn failure(actions: &[Action]) -> String {
    match outcome(actions) {
        Some(Outcome::Failed { reason }) => reason,
        other => panic!("{other:?} from {actions:?}"),
    }
}

fn told(actions: &[Action]) -> Vec<&ToWorker> {
    actions
        .iter()
        .filter_map(|action| match action {
            Action::Send { message, .. } => Some(message),
            _ => None,
        })
        .collect()
}

fn commits(actions: &[Action]) -> Vec<u64> {
    actions
        .iter()
        .filter_map(|action| match action {
            Action::Commit(checkpoint) => Some(checkpoint.iteration),
            _ => None,
        })
        .collect()
}

// ------------------------------------------------------------------------------------------------ attaching

#[test]
fn a_worker_is_welcomed_or_refused_with_a_reason() {
    let mut world = World::new(setup(2, 2));
    let actions = world.attach(0);
    let [ToWorker::Welcome { specification, heartbeat_millis: 100, .. }] = told(&actions)[..] else {
        panic!("{actions:?}")
    };
    assert_eq!(specification, "toml");

    let mut other_protocol = hello("a");
    other_protocol.protocol = PROTOCOL + 1;
    let mut other_run = hello("b");
    other_run.run_id = "another".into();
    for (stream, hello, says) in [(1, other_protocol, "protocol"), (2, other_run, "\"another\"")] {
        let stream = StreamId(stream);
        let actions = world.step(Event::Attached { stream, hello });
        let [ToWorker::Refused { reason }] = told(&actions)[..] else { panic!("{actions:?}") };
        assert!(reason.contains(says), "{reason}");
        assert_eq!(actions.last(), Some(&Action::Close { stream }));
    }
    assert_eq!(world.core.status().members.len(), 1);
}

#[test]
fn a_run_that_ended_sends_late_workers_home() {
    let mut world = World::training(1, 1);
    world.step(Event::WorkersUnavailable { reason: "no GPU".into() });
    let actions = world.attach(7);
    assert!(matches!(told(&actions)[..], [ToWorker::Stop { success: false, .. }]), "{actions:?}");
    assert_eq!(actions.last(), Some(&Action::Close { stream: StreamId(7) }));
}

// ------------------------------------------------------------------------------------------------ forming

#[test]
fn the_first_generation_forms_at_once_when_all_are_there() {
    let mut world = World::new(setup(2, 2));
    assert_eq!(places(&world.attach(0)), []);
    let actions = world.attach(1);
    assert_eq!(places(&actions), [(0, 1, 0), (1, 1, 1)]);
    assert_eq!(source(&actions), Source::Fresh);
    let persisted =
        actions.iter().position(|a| matches!(a, Action::Persist(Record::GenerationOpened { .. })));
    let sent =
        actions.iter().position(|a| matches!(a, Action::Send { message: ToWorker::Assignment(_), .. }));
    assert!(persisted.unwrap() < sent.unwrap());
}

#[test]
fn the_first_generation_waits_a_while_for_more_than_the_minimum() {
    let mut world = World::new(setup(1, 3));
    world.attach(0);
    world.attach(1);
    world.pass(DEAD - 1, 2);
    assert_eq!(world.core.status().state(), wire::RunState::Waiting);
    assert_eq!(places(&world.later(1)), [(0, 1, 0), (1, 1, 1)]);
}

#[test]
fn too_few_workers_for_too_long_ends_the_run() {
    let mut world = World::new(setup(2, 2));
    let actions = world.attach(0);
    let waiting = actions.iter().any(|a| {
        matches!(a, Action::Observe(Observation::Waiting { have: 1, need: 2, reason }) if reason.contains("5.0 s"))
    });
    assert!(waiting, "{actions:?}");
    assert_eq!(world.core.next_deadline(), Some(Tick(100 + DEAD / 3)));
    world.pass(WAIT - 1, 1);
    let reason = failure(&world.later(1));
    assert!(reason.contains("1 of the 2 workers") && reason.contains("5.0 s"), "{reason}");
}

#[test]
fn generations_go_on_from_the_journal() {
    let mut setup = setup(1, 1);
    setup.history = vec![
        Record::RunStarted {
            coordinator: "b".into(),
            run_id: "run".into(),
            address: String::new(),
            certificate: None,
        },
        Record::GenerationOpened {
            generation: Generation(6),
            members: vec!["old".into()],
            source: Source::Fresh,
            start: 0,
            repeats: 0,
            reason: "the run starts".into(),
        },
    ];
    setup.ranks_may_live = false;
    setup.checkpoints = vec![CommittedCheckpoint { iteration: 2, manifest_key: "m2".into() }];
    let mut world = World::new(setup);
    let actions = world.attach(0);
    assert_eq!(places(&actions), [(0, 7, 0)]);
    assert_eq!(source(&actions), Source::Checkpoint { manifest_key: "m2".into() });
    assert_eq!(world.core.status().iteration, 2);
}

#[test]
fn a_worker_that_brings_state_is_the_source() {
    let mut setup = setup(2, 2);
    setup.history = journal(1);
    setup.ranks_may_live = false;
    let mut world = World::new(setup);
    let mut brings = hello("w0");
    let cursor = Cursor { iteration: 3, phase: Phase::Generator };
    brings.held = Some(cursor);
    world.attach(1);
    let actions = world.attach_with(9, brings);
    // It comes first among those that had no rank.
    assert_eq!(places(&actions), [(9, 7, 0), (1, 7, 1)]);
    assert_eq!(source(&actions), Source::Peer { rank: 0 });
}

#[test]
fn a_worker_that_loads_and_makes_progress_is_coming() {
    let mut world = World::new(setup(2, 2));
    world.attach(0);
    world.step(Event::Attached { stream: StreamId(1), hello: hello("slow") });
    let beats = |world: &mut World, millis: u64, moves: bool| {
        let (end, mut actions) = (world.now + millis, Vec::new());
        while world.now < end {
            world.now = end.min(world.now + DEAD / 10);
            actions.extend(world.says(0, heartbeat(0, Cursor::default())));
            let (generation, cursor) = (Generation(0), Cursor::default());
            let progress = if moves { world.now } else { 7 };
            let activity = "embedding prompts".into();
            let message = FromWorker::Heartbeat { generation, cursor, progress, activity, waiting: false };
            actions.extend(world.says(1, message));
        }
        actions
    };
    assert!(outcome(&beats(&mut world, 5 * WAIT, true)).is_none());
    let status = world.core.status();
    assert!(status.reason.contains("1 of 2 workers, and 1 that load"), "{}", status.reason);
    // From its last progress on, it is awaited as long as any other.
    assert!(outcome(&beats(&mut world, WAIT - DEAD, false)).is_none());
    let reason = failure(&beats(&mut world, 2 * DEAD, false));
    for part in ["1 of the 2 workers", "slow", "is embedding prompts, without progress for 5.0 s"] {
        assert!(reason.contains(part), "{part}: {reason}");
    }
}

#[test]
fn workers_that_die_while_they_load_are_not_awaited_for_ever() {
    let mut world = World::new(setup(1, 1));
    let mut actions = Vec::new();
    for n in 0..100 {
        world.step(Event::Attached { stream: StreamId(n), hello: hello(&format!("w{n}")) });
        world.now += DEAD / 2;
        let (generation, cursor) = (Generation(0), Cursor::default());
        let (progress, activity) = (n + 1, "loading".into());
        actions.extend(
            world.says(n, FromWorker::Heartbeat { generation, cursor, progress, activity, waiting: false }),
        );
        actions.extend(world.close(n));
        if outcome(&actions).is_some() {
            break;
        }
    }
    let reason = failure(&actions);
    assert!(reason.contains("were lost while they loaded"), "{reason}");
}

#[test]
fn the_student_is_not_scored_twice_after_the_same_iteration() {
    let mut setup = setup(1, 2);
    setup.terms.scored = true;
    let mut world = World::new(setup);
    world.attach(0);
    world.attach(1);
    for iteration in 0..2 {
        world.report(0, iteration);
        world.report(1, iteration);
    }
    world.says(0, FromWorker::Evaluation(scored(Subject::Student, 2, None)));
    world.close(1);
    let actions = world.later(MOMENT);
    let of = |actions: &[Action]| assignments(actions)[0].1.existing.evaluated;
    assert_eq!(of(&actions), Some(2));
    // All that had this state are gone: what is computed again is another state, and is scored again.
    world.close(0);
    world.later(MOMENT);
    let actions = world.attach(2);
    assert_eq!(of(&actions), None);
}

/// An evaluation by the first generation in which only diversity was measured.
fn scored(subject: Subject, iteration: u64, diversity: Option<f64>) -> Evaluation {
    let scores = Scores { diversity, ..Scores::default() };
    Evaluation { generation: Generation(1), iteration, subject, scores }
}

#[test]
fn the_teacher_is_scored_once_in_a_run() {
    let mut setup = setup(1, 2);
    setup.terms.scored = true;
    let mut world = World::new(setup);
    world.attach(0);
    let actions = world.attach(1);
    assert!(assignments(&actions).iter().all(|(_, a)| a.evaluate_teacher));
    let evaluation = scored(Subject::Teacher, 0, None);
    assert!(world.says(1, FromWorker::Evaluation(evaluation)).iter().all(|a| matches!(a, Action::Log(_))));
    let actions = world.says(0, FromWorker::Evaluation(evaluation));
    let [Action::Persist(Record::Evaluated(_)), Action::Observe(Observation::Evaluated(_))] = actions[..]
    else {
        panic!("{actions:?}")
    };
    world.close(1);
    let actions = world.later(MOMENT);
    assert!(assignments(&actions).iter().all(|(_, a)| !a.evaluate_teacher));
}

#[test]
fn a_student_whose_diversity_collapses_ends_the_run_and_keeps_what_was_saved() {
    let mut setup = setup(1, 1);
    setup.terms.scored = true;
    setup.terms.collapse_share = 0.5;
    let student =
        |iteration, diversity| FromWorker::Evaluation(scored(Subject::Student, iteration, diversity));
    let teacher = scored(Subject::Teacher, 0, Some(6.0));
    let failure = |actions: &[Action]| {
        actions.iter().find_map(|action| match action {
            Action::End(Outcome::Failed { reason }) => Some(reason.clone()),
            _ => None,
        })
    };
    let mut world = World::new(setup.clone());
    world.attach(0);
    world.says(0, FromWorker::Evaluation(teacher));
    for (iteration, diversity) in [(0, Some(1.0)), (1, Some(3.1)), (2, None)] {
        assert_eq!(failure(&world.says(0, student(iteration, diversity))), None);
    }
    let reason = failure(&world.says(0, student(3, Some(2.9)))).unwrap();
    for part in ["collapsed", "iteration 3", "2.900", "3.000", "no older checkpoint"] {
        assert!(reason.contains(part), "{reason}");
    }
    assert!(world.receipt(0, 3).is_empty(), "what has collapsed is not committed");

    // A resumed run knows the teacher from its journal.
    setup.history = vec![Record::Evaluated(teacher.into())];
    setup.checkpoints = vec![CommittedCheckpoint { iteration: 2, manifest_key: "m2".into() }];
    let mut world = World::new(setup);
    world.attach(0);
    let reason = failure(&world.says(0, student(3, Some(2.9)))).unwrap();
    assert!(reason.contains("the newest checkpoint, of iteration 2"), "{reason}");
}

// ------------------------------------------------------------------------------------------------ failures

#[test]
fn a_death_abandons_at_once_and_the_survivors_word_opens_the_next_generation() {
    let mut world = World::training(3, 3);
    for stream in 0..3 {
        world.report(stream, 0);
    }
    let actions = world.close(0);
    assert_eq!(abandoned(&actions), [1, 2]);
    assert_eq!(places(&actions), []);
    assert_eq!(places(&world.says(1, collective_failed(1, 1))), []);
    let actions = world.says(2, collective_failed(1, 2));
    assert_eq!(places(&actions), [(1, 2, 0), (2, 2, 1)]);
    // Stream 2 had come further than was known before.
    assert_eq!(source(&actions), Source::Peer { rank: 1 });
}

#[test]
fn what_a_survivor_completed_before_the_end_still_counts() {
    let mut world = World::training(2, 2);
    world.close(1);
    assert_eq!(world.report(0, 0), []);
    assert_eq!(world.receipt(0, 1), []);
    let actions = world.says(0, collective_failed(1, 1));
    let iteration = actions.iter().find_map(|a| match a {
        Action::Observe(Observation::Iteration(totals)) => Some((totals.iteration, totals.world_size)),
        _ => None,
    });
    assert_eq!(iteration, Some((0, 2)));
    assert_eq!(world.core.status().iteration, 1);
}

#[test]
fn survivors_need_not_answer() {
    let mut world = World::training(2, 2);
    world.report(0, 0);
    world.report(1, 0);
    assert_eq!(abandoned(&world.close(1)), [0]);
    assert_eq!(world.core.next_deadline(), Some(Tick(world.now + MOMENT)));
    let actions = world.later(MOMENT);
    assert_eq!(places(&actions), [(0, 2, 0)]);
    assert_eq!(source(&actions), Source::Peer { rank: 0 });
}

#[test]
fn a_silent_worker_is_dead_after_the_failure_timeout() {
    let mut world = World::training(2, 2);
    world.pass(DEAD - 1, 1);
    assert_eq!(world.core.status().members[1].liveness(), wire::Liveness::Unknown);
    let actions = world.later(1);
    assert_eq!(abandoned(&actions), [0]);
    assert!(actions.contains(&Action::Close { stream: StreamId(1) }));
    let lost = actions.iter().find_map(|a| match a {
        Action::Observe(Observation::Lost { worker, reason }) => Some(format!("{worker}: {reason}")),
        _ => None,
    });
    assert_eq!(lost.unwrap(), "w1 (host, process 7, cpu), rank 1: no heartbeat for 1.0 s");
}

#[test]
fn a_failed_collective_waits_for_the_death_that_explains_it() {
    let mut world = World::training(3, 3);
    let actions = world.says(0, collective_failed(1, 0));
    assert_eq!(abandoned(&actions), [1, 2]);
    assert_eq!(places(&world.says(2, collective_failed(1, 0))), []);
    assert_eq!(places(&world.later(MOMENT)), []);
    assert_eq!(places(&world.close(1)), [(0, 2, 0), (2, 2, 1)]);
}

#[test]
fn a_failed_collective_that_nothing_explains_is_tried_again_with_all() {
    let mut world = World::training(2, 2);
    world.says(0, collective_failed(1, 0));
    assert_eq!(places(&world.says(1, collective_failed(1, 0))), [(0, 2, 0), (1, 2, 1)]);
    // Now one of them does not answer, but sends heartbeats.
    world.says(0, collective_failed(2, 0));
    world.pass(DEAD - 1, 2);
    assert_eq!(places(&world.later(1)), [(0, 3, 0), (1, 3, 1)]);
}

#[test]
fn collectives_that_never_work_end_the_run_when_it_has_waited_for_long() {
    let mut world = World::training(1, 1);
    let (since, mut generation) = (world.now, 1);
    let reason = loop {
        let mut actions = world.says(0, collective_failed(generation, 0));
        if outcome(&actions).is_some() {
            break failure(&actions);
        }
        if places(&actions).is_empty() {
            assert!(generation >= 3, "the first ones are tried again at once");
            world.pass(DEAD - 1, 1);
            actions = world.later(1);
        }
        generation += 1;
        assert_eq!(places(&actions), [(0, generation, 0)]);
    };
    assert!(world.now - since >= WAIT, "{} ms", world.now - since);
    assert!(reason.contains("8 generations in a row") && reason.contains("reset by peer"), "{reason}");
}

#[test]
fn a_state_that_was_being_overwritten_is_no_source() {
    let mut world = World::training(3, 3);
    for stream in 0..3 {
        world.report(stream, 0);
    }
    world.report(2, 1);
    world.close(1);
    world.says(0, collective_failed(1, 1));
    let actions = world.says(2, collective_failed(1, 2));
    assert_eq!(source(&actions), Source::Peer { rank: 1 });
    // Stream 0 was taking stream 2's state when that died; it still reports iteration 1.
    world.says(0, heartbeat(2, Cursor::boundary(1)));
    assert_eq!(places(&world.close(2)), []);
    // Without its report a state would be lost, so the coordinator waits longer.
    assert_eq!(places(&world.later(MOMENT)), []);
    let mut silent = Vec::new();
    for _ in 0..10 {
        world.now += DEAD / 10;
        silent.extend(world.says(0, heartbeat(2, Cursor::boundary(1))));
    }
    assert_eq!(source(&silent), Source::Fresh);
}

#[test]
fn a_state_that_survived_whole_is_a_source_although_it_was_behind() {
    let mut world = World::training(3, 3);
    for stream in 0..3 {
        world.report(stream, 0);
    }
    world.report(2, 1);
    world.close(1);
    world.says(0, collective_failed(1, 1));
    world.says(2, collective_failed(1, 2));
    world.close(2);
    assert_eq!(source(&world.says(0, collective_failed(2, 1))), Source::Peer { rank: 0 });
    assert_eq!(world.core.status().iteration, 1);
}

#[test]
fn what_an_old_generation_says_changes_nothing() {
    let mut world = World::training(2, 2);
    world.close(1);
    world.later(MOMENT);
    let before = world.core.status();
    for message in [
        FromWorker::StepReport(report(1, 0, 0, 2)),
        FromWorker::ShardReceipt(wire::ShardReceipt { generation: 1, iteration: 1, ..Default::default() }),
        FromWorker::ShardFailed(wire::ShardFailed { generation: 1, iteration: 4, ..Default::default() }),
        FromWorker::Evaluation(scored(Subject::Student, 0, None)),
        FromWorker::Finished { generation: Generation(1), cursor: Cursor::boundary(ITERATIONS) },
        FromWorker::Failed { generation: Generation(1), error: "late".into() },
        collective_failed(1, 3),
    ] {
        let actions = world.says(0, message);
        assert!(matches!(actions[..], [Action::Log(_)]), "{actions:?}");
    }
    // A message on a closed stream is ignored.
    assert_eq!(world.says(1, FromWorker::Failed { generation: Generation(1), error: "late".into() }), []);
    assert_eq!(world.core.status(), before);
}

#[test]
fn below_the_minimum_the_run_waits_and_a_newcomer_gets_the_survivors_state() {
    let mut world = World::new(setup(2, 2));
    world.attach(0);
    world.attach(1);
    for stream in 0..2 {
        world.report(stream, 0);
    }
    world.close(0);
    let actions = world.says(1, collective_failed(1, 1));
    assert!(
        actions.iter().any(|a| matches!(a, Action::Observe(Observation::Waiting { have: 1, need: 2, .. })))
    );
    let actions = world.attach(2);
    assert_eq!(places(&actions), [(1, 2, 0), (2, 2, 1)]);
    assert_eq!(source(&actions), Source::Peer { rank: 0 });
}

#[test]
fn a_newcomer_joins_when_there_is_room_and_stands_by_when_there_is_not() {
    let mut world = World::training(1, 2);
    let actions = world.attach(1);
    // The rank is not interrupted: it yields at the next boundary.
    assert!(abandoned(&actions).is_empty());
    assert_eq!(requests(&actions), [(0, Request::Yield)]);
    world.report(0, 0);
    let actions = world.yields(0, 1);
    assert_eq!(places(&actions), [(0, 2, 0), (1, 2, 1)]);
    assert_eq!(source(&actions), Source::Peer { rank: 0 });
    assert!(abandoned(&world.attach(2)).is_empty());
    // The standby's death changes nothing; a member's promotes the next standby.
    assert!(abandoned(&world.close(2)).is_empty());
    world.attach(3);
    world.close(0);
    assert_eq!(places(&world.says(1, collective_failed(2, 0))), [(1, 3, 0), (3, 3, 1)]);
}

#[test]
fn a_newcomer_that_fails_is_sent_away_and_the_others_go_on() {
    // While it loads what the run reads.
    let mut world = World::training(2, 3);
    world.report(0, 0);
    world.report(1, 0);
    world.step(Event::Attached { stream: StreamId(2), hello: hello("w2") });
    let error = "no such folder".to_owned();
    let actions = world.says(2, FromWorker::Failed { generation: Generation(0), error: error.clone() });
    assert!(abandoned(&actions).is_empty() && outcome(&actions).is_none(), "{actions:?}");
    assert!(matches!(told(&actions)[..], [ToWorker::Stop { success: false, .. }]), "{actions:?}");
    assert_eq!(world.core.status().members.len(), 2);
    // In its first generation.
    world.attach(3);
    world.yields(0, 1);
    assert_eq!(world.yields(1, 1).iter().filter(|a| matches!(a, Action::Persist(_))).count(), 1);
    let actions = world.says(3, FromWorker::Failed { generation: Generation(2), error });
    assert!(outcome(&actions).is_none(), "{actions:?}");
    world.says(0, collective_failed(2, 1));
    assert_eq!(places(&world.says(1, collective_failed(2, 1))), [(0, 3, 0), (1, 3, 1)]);
}

#[test]
fn why_workers_failed_before_they_had_a_place_is_said_when_there_are_too_few() {
    let mut world = World::new(setup(1, 1));
    world.step(Event::Attached { stream: StreamId(0), hello: hello("w0") });
    let error = "the teacher has no tensor x".to_owned();
    assert!(outcome(&world.says(0, FromWorker::Failed { generation: Generation(0), error })).is_none());
    assert!(world.core.status().reason.contains("no tensor x"), "{}", world.core.status().reason);
    let actions = world.step(Event::WorkersUnavailable { reason: "the worker agent exited".into() });
    let reason = failure(&actions);
    assert!(reason.contains("w0") && reason.contains("no tensor x"), "{reason}");
}

#[test]
fn a_newcomer_that_cannot_reach_the_others_is_left_out_for_longer_and_longer() {
    let mut world = World::training(2, 3);
    let mut iteration = 0;
    world.report(0, 0);
    world.report(1, 0);
    world.attach(2);
    let mut pauses = Vec::new();
    for _ in 0..3 {
        iteration += 1;
        world.yields(0, iteration);
        let placed = places(&world.yields(1, iteration));
        assert_eq!(placed.iter().map(|(stream, ..)| *stream).collect::<Vec<_>>(), [0, 1, 2]);
        let generation = world.core.generation.0;
        // Its group never forms: the ranks wait for each other.
        let actions = heartbeats(&mut world, 4 * DEAD + DEAD, &[], &[0, 1, 2]);
        assert_eq!(abandoned(&actions), [0, 1, 2]);
        let mut actions = Vec::new();
        for stream in 0..3 {
            actions.extend(world.says(stream, collective_failed(generation, iteration)));
        }
        assert_eq!(places(&actions).iter().map(|(stream, ..)| *stream).collect::<Vec<_>>(), [0, 1]);
        let named = |a: &Action| matches!(a, Action::Log(text) if text.contains("w2") && text.contains("go on without it"));
        assert!(actions.iter().any(named), "{actions:?}");
        world.report(0, iteration);
        world.report(1, iteration);
        // The others train on until it can try again.
        let since = world.now;
        while requests(&heartbeats(&mut world, DEAD / 10, &[0, 1, 2], &[])).is_empty() {
            assert!(world.now < since + 100 * DEAD);
        }
        pauses.push((world.now - since) / DEAD);
    }
    assert!(pauses.windows(2).all(|pair| pair[1] >= 2 * pair[0] - 1), "{pauses:?}");
}

fn sliced(mut setup: Setup) -> Setup {
    setup.terms.division = Division::Slices;
    setup
}

fn incomplete_at(generation: Generation, cursor: Cursor) -> FromWorker {
    FromWorker::StateIncomplete { generation, cursor, error: "a slice is gone".into() }
}

/// Two of them may be both holders of a slice.
#[test]
fn of_several_newcomers_of_a_sliced_run_one_is_left_out_at_a_time() {
    for sharded in [false, true] {
        let mut world = World::training(2, 4);
        world.core.terms.division = if sharded { Division::Slices } else { Division::Whole };
        world.report(0, 0);
        world.report(1, 0);
        world.attach(2);
        world.attach(3);
        world.yields(0, 1);
        assert_eq!(places(&world.yields(1, 1)).len(), 4);
        let actions = heartbeats(&mut world, 5 * DEAD, &[], &[0, 1, 2, 3]);
        assert_eq!(abandoned(&actions), [0, 1, 2, 3]);
        let generation = world.core.generation.0;
        let mut actions = Vec::new();
        for stream in 0..4 {
            actions.extend(world.says(stream, collective_failed(generation, 1)));
        }
        let placed: Vec<_> = places(&actions).iter().map(|(stream, ..)| *stream).collect();
        assert_eq!(placed, if sharded { vec![0, 1, 3] } else { vec![0, 1] });
    }
}

/// One of many newcomers is the cause: it is left out before another is left out again.
#[test]
fn newcomers_of_a_sliced_run_are_left_out_in_turn() {
    let mut world = World::training(2, 5);
    world.core.terms.division = Division::Slices;
    world.report(0, 0);
    world.report(1, 0);
    (2..5).for_each(|stream| {
        world.attach(stream);
    });
    world.yields(0, 1);
    assert_eq!(places(&world.yields(1, 1)).len(), 5);
    // No generation gets on. Each newcomer can be given a place again before the next one is left out.
    let actions = heartbeats(&mut world, 30 * DEAD, &[], &[0, 1, 2, 3, 4]);
    let left_out = |action: &Action| match action {
        Action::Log(text) if text.contains("go on without it") => {
            (2..5).find(|stream| text.contains(&format!("with worker w{stream} ")))
        }
        _ => None,
    };
    let left_out: Vec<u64> = actions.iter().filter_map(left_out).collect();
    assert_eq!(left_out[..3], [2, 3, 4], "{left_out:?}");
}

#[test]
fn an_earlier_state_that_the_ranks_can_put_together_is_gone_on_with() {
    let mut world = World::new(sliced(setup(2, 3)));
    for stream in 0..3 {
        world.attach(stream);
    }
    for iteration in 0..3 {
        (0..3).for_each(|stream| drop(world.report(stream, iteration)));
    }
    // One rank has made a step that only it knows of, and is gone before the others take over its slices.
    world.close(0);
    world.says(1, collective_failed(1, 3));
    let actions = world.says(2, collective_failed(1, 4));
    assert_eq!((source(&actions), world.core.generation), (Source::Peer { rank: 1 }, Generation(2)));
    world.says(1, incomplete_at(Generation(2), Cursor::boundary(3)));
    let actions = world.says(2, incomplete_at(Generation(2), Cursor::default()));
    assert_eq!((source(&actions), world.core.generation), (Source::Peer { rank: 0 }, Generation(3)));
    let start = world.core.start.cursor;
    assert_eq!(start, Cursor::boundary(3), "the state that was not found is not expected again");
}

#[test]
fn where_every_rank_holds_the_whole_state_one_rank_speaks_for_itself_alone() {
    let mut world = World::training(2, 2);
    for stream in 0..2 {
        world.report(stream, 0);
    }
    let lie = incomplete_at(Generation(1), Cursor::default());
    assert_eq!(abandoned(&world.says(0, lie)), [1]);
    let actions = world.says(1, collective_failed(1, 1));
    assert_eq!(source(&actions), Source::Peer { rank: 1 }, "the other rank's state counts");
}

#[test]
fn a_state_whose_slices_died_is_given_up_at_once_and_no_newcomer_is_blamed() {
    let mut world = World::new(sliced(setup(2, 2)));
    world.attach(0);
    world.attach(1);
    for iteration in 0..3 {
        world.report(0, iteration);
        world.report(1, iteration);
        if iteration == 1 {
            world.receipt(0, 2);
            world.receipt(1, 2);
            world.committed(2);
        }
    }
    world.close(0);
    world.says(1, collective_failed(1, 3));
    let actions = world.attach(2);
    assert_eq!((source(&actions), world.core.generation), (Source::Peer { rank: 0 }, Generation(2)));
    let incomplete = || incomplete_at(Generation(2), Cursor::default());
    assert!(abandoned(&world.says(2, incomplete())).is_empty(), "the other rank is about to say so itself");
    // A heartbeat that names the old state may arrive on either side of the survivor's own word.
    world.says(1, heartbeat(2, Cursor::boundary(3)));
    let actions = world.says(1, incomplete());
    assert_eq!(places(&actions), [(1, 3, 0), (2, 3, 1)]);
    assert_eq!(source(&actions), Source::Checkpoint { manifest_key: "m2".into() });
}

#[test]
fn ranks_that_met_and_found_their_state_incomplete_do_not_end_a_row_of_failures() {
    let mut world = World::new(sliced(setup(1, 3)));
    for stream in 0..3 {
        world.attach(stream);
    }
    let stuck = |world: &mut World| {
        let generation = world.core.generation.0;
        let since = world.now;
        while abandoned(&heartbeats(world, DEAD / 10, &[], &[0, 1, 2])).is_empty() {
            assert!(world.now < since + 10 * DEAD, "ranks that all wait are told to leave");
        }
        (0..3).flat_map(|stream| world.says(stream, collective_failed(generation, 0))).collect::<Vec<_>>()
    };
    assert_eq!(places(&stuck(&mut world)).len(), 3);
    assert_eq!(places(&stuck(&mut world)).len(), 3);
    let generation = world.core.generation;
    let incomplete = || incomplete_at(generation, Cursor::default());
    let opened: Vec<_> = (0..3).flat_map(|stream| world.says(stream, incomplete())).collect();
    assert_eq!(places(&opened).len(), 3, "at once, and with all");
    let left_out = |a: &Action| matches!(a, Action::Log(text) if text.contains("is tried without worker"));
    assert!(stuck(&mut world).iter().any(left_out), "the third failure to meet");
}

#[test]
fn what_a_worker_reports_after_it_was_taken_for_lost_counts() {
    let mut world = World::training(2, 2);
    for stream in 0..2 {
        world.report(stream, 0);
    }
    world.close(0);
    world.says(1, collective_failed(1, 0));
    // It attaches again, and only then finds that its group is over.
    let hello = Hello { place: Some(Place { generation: Generation(1), rank: 0 }), ..hello("w0") };
    world.attach_with(7, hello);
    world.says(7, collective_failed(1, 1));
    assert_eq!(world.core.members.get(StreamId(7)).unwrap().held, Some(Cursor::boundary(1)));
}

#[test]
fn a_heartbeat_does_not_bring_back_a_state_that_its_worker_has_lost() {
    let mut world = World::training(2, 3);
    for stream in 0..2 {
        world.report(stream, 0);
    }
    world.attach(2);
    world.yields(0, 1);
    assert_eq!(source(&world.yields(1, 1)), Source::Peer { rank: 0 });
    world.says(0, collective_failed(2, 0));
    world.says(0, heartbeat(2, Cursor::boundary(1)));
    assert_eq!(world.core.members.get(StreamId(0)).unwrap().held, None);
}

#[test]
fn a_worker_cannot_claim_the_place_of_another() {
    let mut world = World::training(2, 2);
    let claimed = Hello { place: Some(Place { generation: Generation(1), rank: 1 }), ..hello("stranger") };
    let actions = world.attach_with(7, claimed);
    assert_eq!(abandoned(&actions), [7]);
    let report = report(1, 0, 1, 2);
    let actions = world.says(7, FromWorker::StepReport(report));
    assert!(matches!(&actions[..], [Action::Log(text)] if text.starts_with("ignored")), "{actions:?}");
}

#[test]
fn a_state_that_a_worker_cannot_hold_is_not_believed() {
    let mut world = World::training(2, 2);
    let beyond = Hello { held: Some(Cursor::boundary(ITERATIONS + 1)), ..hello("w1") };
    let actions = world.step(Event::Attached { stream: StreamId(8), hello: beyond });
    assert!(matches!(told(&actions)[..], [ToWorker::Refused { .. }]), "{actions:?}");
    // It never had a place, so that no state of this run can be its own.
    let never = Hello { held: Some(Cursor::boundary(ITERATIONS)), ..hello("liar") };
    world.attach_with(9, never);
    assert_eq!(world.core.members.get(StreamId(9)).unwrap().held, None);
    for iteration in 0..2 {
        for stream in 0..2 {
            world.report(stream, iteration);
        }
    }
    let actions = world.receipt(0, ITERATIONS + 1);
    assert!(matches!(&actions[..], [Action::Log(text)] if text.starts_with("ignored")), "{actions:?}");
}

#[test]
fn a_worker_that_cannot_go_on_ends_the_run() {
    let mut world = World::training(2, 2);
    let error = "the loss is not finite".into();
    let actions = world.says(1, FromWorker::Failed { generation: Generation(1), error });
    let reason = failure(&actions);
    assert!(reason.contains("w1") && reason.contains("not finite"), "{reason}");
    assert_eq!(told(&actions).len(), 2);
    assert!(told(&actions).iter().all(|m| matches!(m, ToWorker::Stop { success: false, .. })));
    assert!(matches!(actions[0], Action::Persist(Record::Ended { .. })));
    assert_eq!(world.core.next_deadline(), None);
}

// ------------------------------------------------------------------------------------------------ steps, checkpoints

#[test]
fn an_iteration_is_observed_when_all_ranks_have_reported_it() {
    let mut world = World::training(2, 2);
    assert_eq!(world.report(1, 0), []);
    let actions = world.report(0, 0);
    let [Action::Observe(Observation::Iteration(totals))] = &actions[..] else { panic!("{actions:?}") };
    assert_eq!((totals.iteration, totals.samples, totals.world_size), (0, 8, 2));
}

#[test]
fn an_iteration_computed_otherwise_than_assigned_ends_the_run() {
    let mut world = World::training(2, 2);
    let reason = failure(&world.says(1, FromWorker::StepReport(report(1, 0, 0, 2))));
    assert!(reason.contains("iteration 0") && reason.contains("rank 1 of 2"), "{reason}");
}

#[test]
fn a_checkpoint_is_committed_once_all_its_shards_are_durable() {
    let mut world = World::training(2, 2);
    assert_eq!(commits(&world.receipt(0, 2)), [0; 0]);
    assert_eq!(commits(&world.receipt(1, 2)), [2]);
    let actions = world.committed(2);
    assert!(matches!(&actions[0], Action::Persist(Record::Committed { iteration: 2, .. })));
    assert_eq!(actions[1], Action::Observe(Observation::Committed { iteration: 2, bytes: 10 }));
    assert!(told(&actions).iter().all(|m| matches!(m, ToWorker::Committed { iteration: 2 })));
    assert_eq!(world.core.status().committed_iteration, Some(2));
}

#[test]
fn a_checkpoint_that_fails_stops_nothing_unless_it_is_the_last() {
    let mut world = World::training(2, 2);
    let failed = |iteration| {
        let key = "a/rank-001".into();
        let error = "disk full".into();
        FromWorker::ShardFailed(wire::ShardFailed { generation: 1, iteration, rank: 1, key, error })
    };
    let actions = world.says(1, failed(2));
    let [Action::Observe(Observation::CheckpointFailed { iteration: 2, reason })] = &actions[..] else {
        panic!("{actions:?}")
    };
    assert_eq!(reason, "rank 1 could not write a/rank-001: disk full");
    let reason = failure(&world.says(1, failed(ITERATIONS)));
    assert!(reason.contains("a/rank-001: disk full"), "{reason}");
}

#[test]
fn a_manifest_that_cannot_be_written_ends_a_run_that_stops_there() {
    let mut world = World::training(1, 1);
    world.step(stop());
    world.receipt(0, 2);
    let result = Err(Uncommitted { reason: "403".into(), ..Default::default() });
    assert_eq!(outcome(&world.step(Event::CommitAnswered { iteration: 2, result })), None);
    let reason = failure(&world.finish(0, 2));
    assert!(reason.contains("403"), "{reason}");
}

// ------------------------------------------------------------------------------------------------ the end

#[test]
fn the_run_succeeds_when_all_have_finished_and_the_last_checkpoint_exists() {
    let mut world = World::training(2, 2);
    world.finish(0, ITERATIONS);
    world.receipt(0, ITERATIONS);
    world.receipt(1, ITERATIONS);
    assert_eq!(outcome(&world.finish(1, ITERATIONS)), None);
    assert_eq!(world.core.status().state(), wire::RunState::Finishing);
    // Its workers are needed no more while the manifest is written.
    assert!(abandoned(&world.close(1)).is_empty());
    let actions = world.committed(ITERATIONS);
    assert_eq!(outcome(&actions), Some(Outcome::Succeeded { iteration: ITERATIONS }));
    let stops = told(&actions);
    assert!(matches!(stops.last(), Some(ToWorker::Stop { success: true, .. })));
    assert_eq!(world.core.status().state(), wire::RunState::Succeeded);
}

#[test]
fn a_request_to_stop_reaches_this_generation_and_the_next() {
    let mut world = World::training(2, 2);
    let asked = |actions: &[Action]| {
        told(actions)
            .iter()
            .filter(|m| matches!(m, ToWorker::Request { what: Request::CheckpointAndStop, .. }))
            .count()
    };
    assert_eq!(asked(&world.step(stop())), 2);
    world.close(0);
    assert_eq!(asked(&world.later(MOMENT)), 1);
    world.receipt(1, 1);
    world.finish(1, 1);
    let actions = world.committed(1);
    assert_eq!(outcome(&actions), Some(Outcome::Stopped { iteration: 1, reason: "Ctrl-C".into() }));
}

#[test]
fn a_request_to_stop_while_nothing_trains_ends_the_run_at_once() {
    let mut waiting = setup(2, 2);
    waiting.checkpoints = vec![CommittedCheckpoint { iteration: 3, manifest_key: "m3".into() }];
    let mut world = World::new(waiting);
    world.attach(0);
    let Some(Outcome::Stopped { iteration: 3, reason }) = outcome(&world.step(stop())) else { panic!() };
    assert!(reason.contains("newest checkpoint is of iteration 3"), "{reason}");

    let mut world = World::new(setup(2, 2));
    world.attach(0);
    world.attach(1);
    world.step(stop());
    world.close(0);
    let Some(Outcome::Stopped { iteration: 0, .. }) = outcome(&world.later(MOMENT)) else { panic!() };
}

#[test]
fn a_lost_journal_ends_the_coordinator_and_leaves_the_workers_to_its_successor() {
    let mut world = World::training(2, 2);
    let actions = world.step(Event::JournalLost { reason: "another coordinator took over".into() });
    assert_eq!(failure(&actions), "another coordinator took over");
    assert_eq!(told(&actions), Vec::<&ToWorker>::new());
    assert!(!actions.iter().any(|a| matches!(a, Action::Persist(_))));
    assert!(actions.contains(&Action::Close { stream: StreamId(1) }));
}

// ------------------------------------------------------------------------------------------------ hanging

/// Lets time pass while two workers, or as many as are named, send heartbeats and only those in `moving` make progress.
fn heartbeats(world: &mut World, millis: u64, moving: &[u64], waiting: &[u64]) -> Vec<Action> {
    let (end, mut actions) = (world.now + millis, Vec::new());
    let count = moving.iter().chain(waiting).max().map_or(2, |last| last + 1).max(2);
    while world.now < end {
        world.now = end.min(world.now + DEAD / 10);
        for stream in 0..count {
            let message = FromWorker::Heartbeat {
                generation: world.core.generation,
                cursor: Cursor::boundary(1),
                progress: if moving.contains(&stream) { world.now } else { 1 },
                activity: "training".into(),
                waiting: waiting.contains(&stream),
            };
            actions.extend(world.says(stream, message));
        }
    }
    actions
}

#[test]
fn a_rank_that_hangs_is_named_and_started_again() {
    let mut world = World::training(2, 2);
    // The other waits for it, and does not move either: it is not at fault.
    let actions = heartbeats(&mut world, 6 * DEAD, &[], &[0]);
    let restarted: Vec<_> = actions
        .iter()
        .filter_map(|a| match a {
            Action::Send { stream, message: ToWorker::Restart { reason } } => Some((stream.0, reason)),
            _ => None,
        })
        .collect();
    let [(1, reason)] = restarted[..] else { panic!("{restarted:?}") };
    assert!(
        reason.contains("rank hung: heartbeats arrive, no progress for 4.") && reason.contains("iteration 1"),
        "{reason}"
    );
    assert_eq!(abandoned(&actions), [0]);
    assert!(actions.contains(&Action::Close { stream: StreamId(1) }));
    assert_eq!(places(&actions), [(0, 2, 0)]);
}

#[test]
fn ranks_that_all_wait_for_each_other_form_a_new_group() {
    let mut world = World::training(2, 2);
    let actions = heartbeats(&mut world, 5 * DEAD, &[], &[0, 1]);
    assert_eq!(abandoned(&actions), [0, 1]);
    assert!(!actions.iter().any(|a| matches!(a, Action::Close { .. })), "no rank is at fault");
}

#[test]
fn a_rank_that_makes_progress_is_left_alone() {
    let mut world = World::training(2, 2);
    let actions = heartbeats(&mut world, 20 * DEAD, &[0, 1], &[]);
    assert!(abandoned(&actions).is_empty());
    assert_eq!(world.core.generation, Generation(1));
}

/// Lets time pass until the only rank is taken to hang at this work.
fn hang(world: &mut World, stream: u64, work: &str) -> Vec<Action> {
    let mut actions = Vec::new();
    while world.core.rank(StreamId(stream)).is_some() && outcome(&actions).is_none() {
        let (generation, cursor) = (world.core.generation, Cursor::default());
        let activity = work.to_owned();
        let beat = FromWorker::Heartbeat { generation, cursor, progress: 1, activity, waiting: false };
        world.now += DEAD / 10;
        actions.extend(world.says(stream, beat));
    }
    actions
}

#[test]
fn ranks_that_hang_at_the_same_work_again_and_again_end_the_run() {
    let mut world = World::training(1, 1);
    for n in 0..4 {
        assert!(outcome(&hang(&mut world, n, "training")).is_none());
        world.attach(n + 1);
    }
    let reason = failure(&hang(&mut world, 4, "training"));
    for part in ["hung 5 times", "training", "w4", "no progress for 4.", "cluster.failure_timeout"] {
        assert!(reason.contains(part), "{part}: {reason}");
    }
}

#[test]
fn hangs_at_different_work_or_with_iterations_between_do_not_add_up() {
    let mut world = World::training(1, 1);
    for n in 1..=12u64 {
        if n.is_multiple_of(4) {
            world.report(n - 1, 0);
        }
        let work = if n.is_multiple_of(2) { "one" } else { "the other" };
        assert!(outcome(&hang(&mut world, n - 1, work)).is_none());
        world.attach(n);
    }
    assert_eq!(world.core.status().state(), wire::RunState::Training);
}

#[test]
fn a_complete_run_does_not_fail_for_its_pictures() {
    let mut world = World::training(1, 1);
    for iteration in 0..ITERATIONS {
        world.report(0, iteration);
    }
    world.receipt(0, ITERATIONS);
    world.committed(ITERATIONS);
    let mut actions = Vec::new();
    for n in 1..=3 {
        world.close(n - 1);
        world.later(MOMENT);
        actions = world.attach(n);
        let [(_, assignment)] = &assignments(&actions)[..] else { panic!("no assignment {n}") };
        assert_eq!(assignment.existing.saved, Some(ITERATIONS), "it is not written again");
    }
    assert!(outcome(&actions).is_none());
    world.close(3);
    world.later(MOMENT);
    let actions = world.attach(4);
    assert_eq!(outcome(&actions), Some(Outcome::Succeeded { iteration: ITERATIONS }));
}

// ------------------------------------------------------------------------------------------------ stragglers

/// Iterations in which worker 1 takes three times as long as the others.
fn slow_iterations(world: &mut World, iterations: std::ops::Range<u64>) -> Vec<Action> {
    let mut actions = Vec::new();
    for iteration in iterations {
        for stream in [0, 1] {
            let rank = world.core.rank(StreamId(stream)).unwrap();
            let mut report = report(world.core.generation.0, iteration, rank, 2);
            let compute = if stream == 1 { 6.0 } else { 2.0 };
            report.seconds = Some(wire::StepSeconds { compute, ..Default::default() });
            actions.extend(world.says(stream, FromWorker::StepReport(report)));
        }
    }
    actions
}

fn straggling(replace: bool) -> World {
    let mut setup = setup(1, 2);
    setup.terms.replace_stragglers = replace;
    setup.terms.iterations = 1000;
    let mut world = World::new(setup);
    (0..3).for_each(|stream| drop(world.attach(stream)));
    world
}

#[test]
fn a_rank_for_which_the_others_wait_is_named_with_figures() {
    let mut world = straggling(false);
    let actions = slow_iterations(&mut world, 0..40);
    let named: Vec<_> = actions
        .iter()
        .filter_map(|action| match action {
            Action::Observe(Observation::Straggler { worker, straggles, seconds, median }) => {
                Some((worker.as_str(), *straggles, *seconds, *median))
            }
            _ => None,
        })
        .collect();
    let [(worker, true, 3.0, 1.0)] = named[..] else { panic!("{named:?}") };
    assert!(worker.starts_with("w1") && worker.ends_with("rank 1"), "{worker}");
    let status = world.core.status();
    assert!(status.members[1].straggles && !status.members[0].straggles);
    assert_eq!((status.members[1].compute_seconds, status.members[2].compute_seconds), (Some(3.0), None));
    assert!(requests(&actions).is_empty(), "it keeps its place");
}

#[test]
fn a_spare_takes_the_place_of_a_straggler_where_the_run_wants_it() {
    let mut world = straggling(true);
    let actions = slow_iterations(&mut world, 0..30);
    assert_eq!(requests(&actions), [(0, Request::Yield), (1, Request::Yield)]);
    world.yields(0, 30);
    let actions = world.yields(1, 30);
    let ranks: Vec<u64> = assignments(&actions).iter().map(|(stream, _)| *stream).collect();
    assert_eq!(ranks, [0, 2]);
    // It is a spare itself: it takes the next place that is free.
    world.pass(WAIT / 2, 3);
    world.close(2);
    let actions = world.later(MOMENT);
    let ranks: Vec<u64> = assignments(&actions).iter().map(|(stream, _)| *stream).collect();
    assert_eq!(ranks, [0, 1]);
}

#[test]
fn a_spare_that_comes_later_takes_the_place_too() {
    let mut world = straggling(true);
    world.close(2);
    assert!(requests(&slow_iterations(&mut world, 0..30)).is_empty(), "there is no spare");
    assert_eq!(requests(&world.attach(3)), [(0, Request::Yield), (1, Request::Yield)]);
}

#[test]
fn a_successor_sees_stragglers_too() {
    let mut setup = setup(1, 2);
    setup.terms.iterations = 1000;
    setup.history = journal(2);
    let mut world = World::new(setup);
    for n in 0..2u32 {
        world.attach_with(n.into(), returning(n.into(), n, 3));
    }
    let actions = slow_iterations(&mut world, 3..33);
    let named = |action: &Action| matches!(action, Action::Observe(Observation::Straggler { .. }));
    assert_eq!(actions.iter().filter(|action| named(action)).count(), 1);
}

// ------------------------------------------------------------------------------------------------ a successor

/// The journal after `world`'s coordinator opened its first generation.
fn journal(members: u64) -> Vec<Record> {
    vec![
        Record::RunStarted {
            coordinator: "b".into(),
            run_id: "run".into(),
            address: String::new(),
            certificate: None,
        },
        Record::GenerationOpened {
            generation: Generation(6),
            members: (0..members).map(|n| format!("w{n}")).collect(),
            source: Source::Fresh,
            start: 0,
            repeats: 0,
            reason: "the run starts".into(),
        },
    ]
}

fn successor(members: u64, max: u32) -> World {
    let mut setup = setup(1, max);
    setup.history = journal(members);
    World::new(setup)
}

fn returning(n: u64, rank: u32, iteration: u64) -> Hello {
    Hello {
        held: Some(Cursor::boundary(iteration)),
        place: Some(Place { generation: Generation(6), rank }),
        ..hello(&format!("w{n}"))
    }
}

#[test]
fn when_all_ranks_come_back_to_a_new_coordinator_nothing_changes() {
    let mut world = successor(2, 2);
    assert_eq!(world.core.status().state(), wire::RunState::Waiting);
    world.attach_with(5, returning(1, 1, 3));
    let actions = world.attach_with(6, returning(0, 0, 2));
    assert!(places(&actions).is_empty() && abandoned(&actions).is_empty(), "{actions:?}");
    assert_eq!(
        (world.core.status().state(), world.core.generation),
        (wire::RunState::Training, Generation(6))
    );
    // They send again what the old coordinator may not have counted: each iteration counts once.
    for iteration in 0..2 {
        assert_eq!(world.report(6, iteration), []);
        let actions = world.report(5, iteration);
        assert!(matches!(actions[..], [Action::Observe(Observation::Iteration(_))]), "{actions:?}");
    }
    assert_eq!(world.report(5, 2), []);
    assert_eq!(world.core.status().iteration, 2);
    assert_eq!(world.core.status().repeated_iterations, 0);
}

/// A worker of the first generation that comes back on a new stream: it holds iteration `held`.
fn returning_from_first(rank: u32, held: u64) -> Hello {
    Hello {
        held: Some(Cursor::boundary(held)),
        place: Some(Place { generation: Generation(1), rank }),
        ..hello(&format!("w{rank}"))
    }
}

/// Two ranks that have done two iterations, and a spare; then the coordinator hears of nothing but broken streams.
fn all_lost(deaf: bool) -> (World, Vec<Action>) {
    let mut world = World::training(3, 2);
    for iteration in 0..2 {
        world.report(0, iteration);
        world.report(1, iteration);
    }
    if deaf {
        world.step(Event::Deaf { millis: 15_000 });
    }
    world.close(0);
    let mut actions = world.close(1);
    actions.extend(world.later(MOMENT));
    (world, actions)
}

#[test]
fn ranks_that_a_coordinator_lost_while_it_did_not_listen_are_waited_for() {
    let (mut world, actions) = all_lost(true);
    assert!(places(&actions).is_empty(), "the spare holds nothing of it: {actions:?}");
    let status = world.core.status();
    assert!(status.reason.contains("0 of the 2 ranks"), "{}", status.reason);
    world.attach_with(7, returning_from_first(1, 3));
    let actions = world.attach_with(8, returning_from_first(0, 2));
    assert!(places(&actions).is_empty() && abandoned(&actions).is_empty(), "{actions:?}");
    assert_eq!(world.core.status().state(), wire::RunState::Training);
    // They send their reports again: what was counted counts once.
    assert!(matches!(world.report(8, 1)[..], [Action::Log(_)]));
    assert_eq!(world.report(8, 2), []);
    assert!(matches!(world.report(7, 2)[..], [Action::Observe(Observation::Iteration(_))]));
    assert_eq!((world.core.status().iteration, world.core.status().repeated_iterations), (3, 0));
}

#[test]
fn those_that_do_not_come_back_are_waited_for_once() {
    let (mut world, _) = all_lost(true);
    let mut actions = Vec::new();
    for _ in 0..12 {
        world.now += DEAD / 10;
        actions.extend(world.says(2, heartbeat(0, Cursor::default())));
    }
    let opened = assignments(&actions);
    assert!(matches!(&opened[..], [(2, a)] if a.source == Source::Fresh), "{opened:?}");
    assert_eq!(world.core.status().repeated_iterations, 2);
}

#[test]
fn ranks_that_certainly_died_are_not_waited_for() {
    let (_, actions) = all_lost(false);
    assert_eq!(places(&actions), [(2, 2, 0)]);
}

#[test]
fn reports_of_iterations_that_a_checkpoint_covers_are_not_counted_again() {
    let mut setup = setup(1, 2);
    setup.history = journal(2);
    setup.checkpoints = vec![CommittedCheckpoint { iteration: 2, manifest_key: "m2".into() }];
    let mut world = World::new(setup);
    world.attach_with(5, returning(0, 0, 3));
    world.attach_with(6, returning(1, 1, 3));
    // One of them has not received the commit of the checkpoint.
    assert!(matches!(world.report(5, 0)[..], [Action::Log(_)]));
    assert!(matches!(world.report(5, 1)[..], [Action::Log(_)]));
    assert_eq!(world.report(5, 2), []);
    assert!(matches!(world.report(6, 2)[..], [Action::Observe(Observation::Iteration(_))]));
    assert_eq!(world.core.status().iteration, 3);
}

#[test]
fn ranks_that_do_not_come_back_in_time_are_lost_and_the_others_go_on() {
    let mut world = successor(3, 3);
    world.attach_with(5, returning(0, 0, 2));
    world.attach_with(6, returning(2, 2, 3));
    let beat = |world: &mut World| {
        for stream in [5, 6] {
            world.says(stream, heartbeat(6, Cursor::boundary(2)));
        }
    };
    world.now += DEAD - 1;
    beat(&mut world);
    assert_eq!(world.core.status().state(), wire::RunState::Waiting);
    let actions = world.later(1);
    assert_eq!(abandoned(&actions), [5, 6]);
    world.says(5, collective_failed(6, 2));
    let actions = world.says(6, collective_failed(6, 3));
    assert_eq!(places(&actions), [(5, 7, 0), (6, 7, 1)]);
    assert_eq!(source(&actions), Source::Peer { rank: 1 });
}

#[test]
fn a_collective_that_failed_meanwhile_is_told_on_return() {
    let mut world = successor(2, 2);
    world.attach_with(5, returning(0, 0, 2));
    world.says(5, collective_failed(6, 2));
    let actions = world.attach_with(6, returning(1, 1, 3));
    assert_eq!(abandoned(&actions), [6]);
    let actions = world.says(6, collective_failed(6, 3));
    assert_eq!(places(&actions), [(5, 7, 0), (6, 7, 1)]);
    assert_eq!(source(&actions), Source::Peer { rank: 1 });
}

#[test]
fn a_worker_that_was_taken_for_lost_comes_back_as_a_joiner_with_its_state() {
    let mut world = World::training(2, 2);
    world.report(0, 0);
    world.report(1, 0);
    world.close(1);
    let actions = world.says(0, collective_failed(1, 1));
    assert_eq!(places(&actions), [(0, 2, 0)]);
    let back = Hello {
        held: Some(Cursor::boundary(1)),
        place: Some(Place { generation: Generation(1), rank: 1 }),
        ..hello("w1")
    };
    let actions = world.attach_with(7, back);
    assert_eq!(abandoned(&actions), [7], "its old generation is over");
    assert_eq!(requests(&actions), [(0, Request::Yield)]);
}

#[test]
fn a_worker_may_come_back_before_its_old_stream_is_seen_to_be_gone() {
    let mut world = World::training(2, 2);
    let back = Hello { place: Some(Place { generation: Generation(1), rank: 1 }), ..hello("w1") };
    let actions = world.attach_with(7, back);
    assert!(actions.contains(&Action::Close { stream: StreamId(1) }));
    assert_eq!(world.core.status().members.len(), 2);
    // The old stream's end no longer concerns any worker.
    assert_eq!(world.close(1), []);
}

// ------------------------------------------------------------------------------------------------ leaving

#[test]
fn a_worker_that_leaves_saves_first_and_the_others_go_on() {
    let mut world = World::training(2, 2);
    let actions = world.says(1, FromWorker::Leaving { reason: "SIGTERM".into() });
    assert_eq!(requests(&actions), [(0, Request::CheckpointAndYield), (1, Request::CheckpointAndYield)]);
    assert_eq!(world.says(1, FromWorker::Leaving { reason: "SIGTERM".into() }), []);
    for stream in [0, 1] {
        world.report(stream, 0);
    }
    world.receipt(0, 1);
    assert_eq!(commits(&world.receipt(1, 1)), [1]);
    world.yields(0, 1);
    let actions = world.yields(1, 1);
    let stopped = actions.iter().any(|a| {
        matches!(a, Action::Send { stream: StreamId(1), message: ToWorker::Stop { success: true, .. } })
    });
    assert!(stopped, "{actions:?}");
    assert_eq!(places(&actions), [(0, 2, 0)]);
    assert_eq!(source(&actions), Source::Peer { rank: 0 });
    // The checkpoint exists although its generation is over.
    let actions = world.committed(1);
    assert!(matches!(actions[0], Action::Persist(Record::Committed { iteration: 1, .. })));
}

#[test]
fn when_all_leave_a_successor_starts_from_what_they_saved() {
    let mut world = World::training(1, 1);
    world.says(0, FromWorker::Leaving { reason: "SIGTERM".into() });
    world.report(0, 0);
    world.receipt(0, 1);
    world.yields(0, 1);
    // It stays until the manifest is there.
    let actions = world.committed(1);
    assert!(actions.iter().any(|a| {
        matches!(a, Action::Send { message: ToWorker::Stop { success: true, reason }, .. } if reason.contains("iteration 1 is saved"))
    }));
    assert_eq!(source(&world.attach(1)), Source::Checkpoint { manifest_key: "m1".into() });
}

#[test]
fn a_standby_that_leaves_is_let_go_at_once() {
    let mut world = World::training(1, 1);
    world.attach(1);
    let actions = world.says(1, FromWorker::Leaving { reason: "SIGTERM".into() });
    assert!(matches!(told(&actions)[..], [ToWorker::Stop { success: true, .. }]), "{actions:?}");
    assert!(requests(&actions).is_empty());
}

// ------------------------------------------------------------------------------------------------ checkpoints on demand

#[test]
fn a_checkpoint_on_demand_is_answered_when_it_exists() {
    let mut world = World::training(1, 1);
    let client = ClientId(4);
    let actions = world.step(Event::CheckpointRequested { client });
    assert_eq!(requests(&actions), [(0, Request::Checkpoint)]);
    world.report(0, 0);
    world.receipt(0, 1);
    let actions = world.committed(1);
    assert!(actions.contains(&Action::Answer { client, result: Ok(1) }), "{actions:?}");
    assert!(actions.contains(&Action::Retain { in_use: BTreeSet::from([1]), up_to: 1 }));
}

#[test]
fn a_checkpoint_on_demand_is_refused_when_nothing_trains() {
    let mut world = World::new(setup(1, 1));
    let actions = world.step(Event::CheckpointRequested { client: ClientId(1) });
    assert!(
        matches!(&actions[..], [Action::Answer { result: Err(why), .. }] if why.contains("nothing is training"))
    );
}

#[test]
fn so_many_failed_checkpoints_in_a_row_end_the_run_if_it_is_so_configured() {
    let mut setup = setup(1, 1);
    setup.terms.stop_after_failures = NonZeroU32::new(2);
    let mut world = World::new(setup);
    world.attach(0);
    let failed = |iteration| {
        FromWorker::ShardFailed(wire::ShardFailed {
            generation: 1,
            iteration,
            rank: 0,
            key: "k".into(),
            error: "503".into(),
        })
    };
    assert!(outcome(&world.says(0, failed(1))).is_none());
    assert!(outcome(&world.says(0, failed(1))).is_none(), "the same checkpoint");
    let reason = failure(&world.says(0, failed(2)));
    assert!(reason.contains("2 checkpoints in a row") && reason.contains("503"), "{reason}");
}

/// A run with these checkpoints, whose worker was told to start from the newest of them.
fn with_checkpoints(iterations: &[u64], workers: u64, from_teacher: bool) -> World {
    let mut setup = setup(1, u32::try_from(workers).unwrap());
    let committed = |iteration: &u64| CommittedCheckpoint {
        iteration: *iteration,
        manifest_key: format!("m{iteration}"),
    };
    setup.checkpoints = iterations.iter().map(committed).collect();
    setup.from_teacher = from_teacher;
    let mut world = World::new(setup);
    for stream in 0..workers {
        world.attach(stream);
    }
    world
}

fn cannot_read(generation: u64, manifest_key: &str) -> FromWorker {
    FromWorker::CheckpointDamaged {
        generation: Generation(generation),
        manifest_key: manifest_key.into(),
        error: "rank-000: its SHA-256 is x".into(),
    }
}

fn verified(manifest_key: &str, result: Result<Option<String>, String>) -> Event {
    Event::Verified { manifest_key: manifest_key.into(), result }
}

#[test]
fn a_checkpoint_is_damaged_when_the_coordinator_finds_it_so() {
    let mut world = with_checkpoints(&[1, 2], 1, false);
    let actions = world.says(0, cannot_read(1, "m2"));
    assert!(actions.contains(&Action::Verify { manifest_key: "m2".into() }), "{actions:?}");
    assert!(places(&actions).is_empty());
    assert!(places(&world.later(MOMENT)).is_empty(), "nothing is decided before the coordinator has read it");
    let actions = world.step(verified("m2", Ok(Some("rank-000: its SHA-256 is x".into()))));
    assert!(actions.iter().any(|a| matches!(a, Action::Log(text) if text.contains("m2 is damaged"))));
    assert_eq!(source(&actions), Source::Checkpoint { manifest_key: "m1".into() });
}

#[test]
fn a_worker_that_does_not_see_the_storage_is_sent_away_and_condemns_nothing() {
    let mut world = with_checkpoints(&[1, 2], 2, false);
    world.says(1, cannot_read(1, "m2"));
    world.says(0, collective_failed(1, 0));
    let actions = world.step(verified("m2", Ok(None)));
    let stopped = actions.iter().find_map(|action| match action {
        Action::Send { stream, message: ToWorker::Stop { success: false, reason } } => {
            Some((stream.0, reason))
        }
        _ => None,
    });
    let (stream, reason) = stopped.unwrap();
    assert_eq!(stream, 1);
    assert!(reason.contains("w1") && reason.contains("does not see the run's storage"), "{reason}");
    assert_eq!(places(&actions), [(0, 2, 0)]);
    assert_eq!(source(&actions), Source::Checkpoint { manifest_key: "m2".into() });
}

#[test]
fn a_worker_that_writes_its_shards_elsewhere_is_sent_away() {
    let mut world = World::training(2, 2);
    for iteration in 0..2 {
        world.report(0, iteration);
        world.report(1, iteration);
    }
    world.receipt(0, 2);
    assert_eq!(commits(&world.receipt(1, 2)), [2]);
    let failed = |unseen: &[u32]| Event::CommitAnswered {
        iteration: 2,
        result: Err(Uncommitted {
            reason: "it is missing".into(),
            unseen: unseen.iter().copied().collect(),
            manifest_key: None,
        }),
    };
    let actions = world.step(failed(&[1]));
    let stopped =
        |a: &Action| matches!(a, Action::Send { stream: StreamId(1), message: ToWorker::Stop { .. } });
    assert!(actions.iter().any(stopped), "{actions:?}");
    assert_eq!(places(&world.says(0, collective_failed(1, 2))), [(0, 2, 0)]);
    // Where no shard is seen, the coordinator's own access may be at fault.
    let mut world = World::training(2, 2);
    world.receipt(0, 2);
    world.receipt(1, 2);
    let actions = world.step(failed(&[0, 1]));
    assert!(matches!(actions[..], [Action::Observe(Observation::CheckpointFailed { .. })]), "{actions:?}");
}

#[test]
fn at_the_start_each_worker_is_left_out_in_turn() {
    let mut world = World::training(3, 3);
    let mut tried = Vec::new();
    for generation in 1..7 {
        let ranks: Vec<u64> = (0..3).filter(|n| world.core.rank(StreamId(*n)).is_some()).collect();
        let mut actions = Vec::new();
        for stream in &ranks {
            actions.extend(world.says(*stream, collective_failed(generation, 0)));
        }
        if places(&actions).is_empty() {
            world.pass(DEAD - 1, 3);
            actions = world.later(1);
        }
        tried.push(places(&actions).iter().map(|(stream, ..)| *stream).collect::<Vec<_>>());
    }
    assert_eq!(tried[..2], [[0, 1, 2], [0, 1, 2]], "{tried:?}");
    let left_out: BTreeSet<u64> =
        tried.iter().flat_map(|placed| (0..3).filter(|n| !placed.contains(n))).collect();
    assert_eq!(left_out.len(), 3, "{tried:?}");
}

#[test]
fn when_no_worker_sees_the_storage_the_run_waits_for_one_that_does() {
    let mut world = with_checkpoints(&[2], 1, false);
    world.says(0, cannot_read(1, "m2"));
    world.step(verified("m2", Ok(None)));
    assert_eq!(world.core.status().state(), wire::RunState::Waiting);
    let reason = failure(&world.later(WAIT));
    assert!(reason.contains("does not see the run's storage"), "{reason}");
    let mut world = with_checkpoints(&[2], 1, false);
    world.says(0, cannot_read(1, "m2"));
    let reason = failure(&world.step(verified("m2", Err("503 Slow Down".into()))));
    assert!(reason.contains("m2") && reason.contains("503 Slow Down"), "{reason}");
}

#[test]
fn a_manifest_whose_answer_was_lost_is_tried_when_no_other_checkpoint_is_left() {
    let mut world = with_checkpoints(&[2], 1, false);
    world.report(0, 2);
    assert_eq!(commits(&world.receipt(0, 3)), [3]);
    let reason = "connection reset by peer".into();
    let result = Err(Uncommitted { reason, manifest_key: Some("m3".into()), ..Default::default() });
    world.step(Event::CommitAnswered { iteration: 3, result });
    world.close(0);
    let m2 = Source::Checkpoint { manifest_key: "m2".into() };
    assert_eq!(source(&world.attach(1)), m2);
    let generation = world.core.generation.0;
    world.says(1, cannot_read(generation, "m2"));
    let actions = world.step(verified("m2", Ok(Some("a shard is missing".into()))));
    assert_eq!(source(&actions), Source::Checkpoint { manifest_key: "m3".into() });
    world.says(1, cannot_read(generation + 1, "m3"));
    let reason = failure(&world.step(verified("m3", Ok(Some("it is missing".into())))));
    assert!(reason.contains("--from-teacher"), "{reason}");
}

#[test]
fn a_run_that_had_a_checkpoint_does_not_start_from_the_teacher_unless_it_is_told_to() {
    let lost = |from_teacher| {
        let mut world = with_checkpoints(&[2], 1, from_teacher);
        world.says(0, cannot_read(1, "m2"));
        world.step(verified("m2", Ok(Some("it is missing".into()))))
    };
    let reason = failure(&lost(false));
    assert!(reason.contains("--from-teacher"), "{reason}");
    assert_eq!(source(&lost(true)), Source::Fresh);
    // The same where the journal alone knows of a checkpoint.
    let mut setup = setup(1, 1);
    setup.history = vec![Record::Committed { iteration: 2, manifest_key: "m2".into() }];
    let mut world = World::new(setup);
    assert!(failure(&world.attach(0)).contains("--from-teacher"));
}
