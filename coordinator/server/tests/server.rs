//! The coordinator as its workers see it: a real gRPC client over loopback, and storage in memory.

#![allow(clippy::unwrap_used)] // A panic here is a failed test.

use std::{
    collections::BTreeSet,
    net::SocketAddr,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use futures::stream::BoxStream;
use object_store::{
    CopyOptions, GetOptions, GetResult, ListResult, MultipartUpload, ObjectMeta, ObjectStore,
    PutMultipartOptions, PutOptions, PutPayload, PutResult, memory::InMemory, path::Path as ObjectPath,
};
use potstill_access::{Authorized, Invitation, Locator, Patience, Role, WorkerSecret};
use potstill_core::observation::{Observation, Outcome};
use potstill_proto::{
    PROTOCOL,
    cursor::{Cursor, Generation},
    message::{Assignment, FromWorker, Hello, Place, Request, Source, ToWorker, WorkerId, proven},
    micro_batches::MicroBatches,
    wire::{self, coordinator_client::CoordinatorClient, worker_message::Kind},
};
use potstill_server::{
    self as server, Options,
    Resume::{self, Always, Auto, Never},
    Running, Security, StartError,
    client::Client,
};
use potstill_spec::RunSpec;
use potstill_storage::{
    Root, RunId,
    checkpoint::{Shard, Written},
    journal::Journal,
    layout,
};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    sync::mpsc,
};
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Code, Status, Streaming};

const ITERATIONS: u64 = 2;
const SAMPLES: u32 = 8;
const MICRO_BATCHES: u32 = 4;

/// A run of its own: its storage, its teacher and its specification.
struct Lab {
    _folder: tempfile::TempDir,
    storage: Root,
    spec: RunSpec,
}

impl Lab {
    fn new(workers: u32) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let weights = folder.path().join("teacher.safetensors");
        std::fs::write(&weights, b"weights").unwrap();
        let mut spec = RunSpec::default();
        spec.teacher.weights = Some(weights);
        spec.distillation.iterations = ITERATIONS;
        spec.distillation.global_batch = SAMPLES;
        spec.distillation.micro_batch = SAMPLES / MICRO_BATCHES;
        spec.cluster.min_workers = workers;
        spec.cluster.max_workers = workers;
        spec.cluster.failure_timeout = Duration::from_millis(60000);
        spec.validate().unwrap();
        let storage = Root::open("memory://").unwrap();
        Self { _folder: folder, storage, spec }
    }

    fn options(&self, resume: Resume) -> Options {
        Options {
            listen: SocketAddr::from(([127, 0, 0, 1], 0)),
            spec: self.spec.clone(),
            run_id: run_id(),
            storage: self.storage.clone(),
            resume,
            from_teacher: false,
            security: Security::Own,
            page: String::new(),
            ranks_may_live: true,
        }
    }

    async fn start(&self, resume: Resume) -> Running {
        server::start(self.options(resume)).await.unwrap()
    }

    async fn status(&self, running: &Running) -> wire::StatusReply {
        let mut client = connect(&running.invitation).await;
        client.status(wire::StatusRequest { first_member: 0 }).await.unwrap().into_inner()
    }

    /// What the storage says of the coordinator.
    fn locator(&self, role: Role) -> Locator {
        Locator::Storage { run: self.storage.run(&run_id()), role, address: None, insecure: false }
    }

    async fn connect_as(&self, role: Role) -> CoordinatorClient<Authorized> {
        connect(&self.locator(role).find().await.unwrap()).await
    }

    async fn refused(&self, resume: Resume) -> StartError {
        match server::start(self.options(resume)).await {
            Ok(_) => panic!("it started"),
            Err(error) => error,
        }
    }

    /// Trains a run to its end and leaves its checkpoint.
    async fn train(&self, resume: Resume) -> Outcome {
        let mut running = self.start(resume).await;
        let mut worker = Worker::attach(&running, "a").await;
        let assignment = worker.assignment().await;
        let first = match &assignment.source {
            Source::Fresh => 0,
            Source::Checkpoint { manifest_key } => {
                assert!(self.storage.run(&run_id()).get(manifest_key).await.unwrap().is_some());
                ITERATIONS
            }
            source => panic!("{source:?}"),
        };
        for iteration in first..self.spec.distillation.iterations {
            worker.reports(&assignment, iteration).await;
        }
        worker.saves_and_finishes(self, &assignment, self.spec.distillation.iterations).await;
        worker.stopped().await;
        running.outcome().await
    }
}

fn run_id() -> RunId {
    "test-run".parse().unwrap()
}

async fn connect(invitation: &Invitation) -> CoordinatorClient<Authorized> {
    invitation.connect(Patience { connect: Duration::from_secs(10), keep_alive: None }).await.unwrap()
}

/// A worker that computes nothing.
struct Worker {
    id: String,
    outgoing: mpsc::Sender<wire::WorkerMessage>,
    incoming: Streaming<wire::CoordinatorMessage>,
}

impl Worker {
    /// Opens a stream and sends `first`.
    async fn open(running: &Running, first: wire::WorkerMessage) -> Self {
        let mut client = connect(&running.invitation).await.max_encoding_message_size(usize::MAX);
        let (outgoing, messages) = mpsc::channel(64);
        outgoing.send(first).await.unwrap();
        let incoming = client.attach(ReceiverStream::new(messages)).await.unwrap().into_inner();
        Self { id: String::new(), outgoing, incoming }
    }

    async fn attach(running: &Running, id: &str) -> Self {
        let mut worker = Self::open(running, said(hello(id), id)).await;
        worker.id = id.into();
        match worker.next().await {
            ToWorker::Welcome { specification, .. } => {
                let spec = RunSpec::from_toml(&specification).unwrap();
                assert!(spec.teacher.weights.unwrap().is_absolute() && spec.teacher.sha256.is_some());
            }
            other => panic!("{other:?}"),
        }
        worker.say(FromWorker::Ready).await;
        worker
    }

    /// Attaches again, after its stream was lost, with the place that it has.
    async fn come_back(running: &Running, id: &str, place: &Assignment, iteration: u64) -> Self {
        let mut hello = hello(id);
        hello.held = Some(Cursor::boundary(iteration));
        hello.place = Some(Place { generation: place.generation, rank: place.rank });
        let mut worker = Self::open(running, said(hello, id)).await;
        worker.id = id.into();
        assert!(matches!(worker.next().await, ToWorker::Welcome { .. }));
        worker.say(FromWorker::Ready).await;
        worker
    }

    async fn next(&mut self) -> ToWorker {
        self.incoming.message().await.unwrap().expect("the stream ended").try_into().unwrap()
    }

    /// How the coordinator ends this stream, whatever messages come before.
    async fn ending(&mut self) -> Option<Status> {
        loop {
            match self.incoming.message().await {
                Ok(Some(_)) => {}
                Ok(None) => return None,
                Err(status) => return Some(status),
            }
        }
    }

    async fn assignment(&mut self) -> Assignment {
        loop {
            if let ToWorker::Assignment(assignment) = self.next().await {
                return assignment;
            }
        }
    }

    async fn stopped(&mut self) -> (bool, String) {
        loop {
            if let ToWorker::Stop { success, reason } = self.next().await {
                return (success, reason);
            }
        }
    }

    async fn say(&self, message: impl Into<wire::WorkerMessage>) {
        self.outgoing.send(message.into()).await.unwrap();
    }

    async fn reports(&self, assignment: &Assignment, iteration: u64) {
        let share = assignment.micro_batches;
        let samples = share.count * SAMPLES / MICRO_BATCHES;
        self.say(FromWorker::StepReport(wire::StepReport {
            generation: assignment.generation.0,
            iteration,
            first_micro_batch: share.first,
            micro_batches: share.count,
            samples,
            generator_loss_sum: f64::from(samples) * 0.5,
            ..Default::default()
        }))
        .await;
    }

    async fn saves_and_finishes(&self, lab: &Lab, assignment: &Assignment, iteration: u64) {
        self.saves(lab, assignment, iteration).await;
        let generation = assignment.generation;
        self.say(FromWorker::Finished { generation, cursor: Cursor::boundary(iteration) }).await;
    }

    async fn saves(&self, lab: &Lab, assignment: &Assignment, iteration: u64) {
        let Assignment { rank, world_size, generation, .. } = *assignment;
        let key = layout::shard_key(iteration, &generation.store_prefix(), rank, world_size);
        let bytes = bytes::Bytes::from_static(b"state");
        let Written { shard, e_tag } =
            lab.storage.run(&run_id()).write_shard(&key, rank, bytes).await.unwrap();
        self.receipt(generation, iteration, shard, e_tag).await;
    }

    async fn receipt(&self, generation: Generation, iteration: u64, shard: Shard, e_tag: Option<String>) {
        let Shard { rank, key, bytes, sha256 } = shard;
        let generation = generation.0;
        let receipt = wire::ShardReceipt { generation, iteration, rank, key, bytes, sha256, e_tag };
        self.say(FromWorker::ShardReceipt(receipt)).await;
    }
}

/// A hello with its proof: a worker's secret is its name here.
fn said(hello: Hello, name: &str) -> wire::WorkerMessage {
    proven(hello, name.as_bytes())
}

fn hello(name: &str) -> Hello {
    Hello {
        protocol: PROTOCOL,
        worker: WorkerId(WorkerSecret::id_of(name.as_bytes())),
        run_id: run_id().to_string(),
        host: "localhost".into(),
        pid: 1,
        device: "cpu".into(),
        held: None,
        place: None,
    }
}

async fn observed<T>(running: &mut Running, mut what: impl FnMut(Observation) -> Option<T>) -> T {
    loop {
        if let Some(found) = what(running.observations.recv().await.expect("the run ended")) {
            return found;
        }
    }
}

// ------------------------------------------------------------------------------------------------ a run

#[tokio::test]
async fn two_workers_train_a_run_to_its_end() {
    let lab = Lab::new(2);
    let mut running = lab.start(Never).await;
    let (mut a, mut b) = (Worker::attach(&running, "a").await, Worker::attach(&running, "b").await);
    let (first, second) = (a.assignment().await, b.assignment().await);
    assert_eq!((first.rank, second.rank, first.world_size), (0, 1, 2));
    assert_eq!(first.source, Source::Fresh);
    assert_eq!(second.micro_batches, MicroBatches { first: 2, count: 2 });

    for iteration in 0..ITERATIONS {
        a.reports(&first, iteration).await;
        b.reports(&second, iteration).await;
        let totals = observed(&mut running, |observation| match observation {
            Observation::Iteration(totals) => Some(totals),
            _ => None,
        })
        .await;
        assert_eq!((totals.iteration, totals.samples, totals.generator_loss), (iteration, SAMPLES, 0.5));
    }
    let status = lab.status(&running).await;
    assert_eq!(
        (status.state(), status.iteration, status.members.len()),
        (wire::RunState::Training, ITERATIONS, 2)
    );

    a.saves_and_finishes(&lab, &first, ITERATIONS).await;
    b.saves_and_finishes(&lab, &second, ITERATIONS).await;
    for worker in [&mut a, &mut b] {
        assert!(worker.stopped().await.0);
        assert_eq!(worker.ending().await.map(|s| s.code()), None);
    }
    assert_eq!(running.outcome().await, Outcome::Succeeded { iteration: ITERATIONS });
    assert_eq!(lab.storage.run(&run_id()).checkpoints().await.unwrap(), [ITERATIONS]);
}

#[tokio::test]
async fn a_worker_that_dies_is_replaced_in_a_new_generation() {
    let lab = Lab::new(2);
    let running = lab.start(Never).await;
    let (mut a, mut b) = (Worker::attach(&running, "a").await, Worker::attach(&running, "b").await);
    let (first, second) = (a.assignment().await, b.assignment().await);
    a.reports(&first, 0).await;
    b.reports(&second, 0).await;
    drop(b);
    let ToWorker::Abandon { generation, reason } = a.next().await else { panic!() };
    assert_eq!(generation, first.generation);
    let lost = format!("worker {} (localhost, process 1, cpu), rank 1 is lost", WorkerSecret::id_of(b"b"));
    assert!(reason.contains(&lost), "{reason}");
    let error = "connection reset".into();
    a.say(FromWorker::CollectiveFailed { generation, cursor: Cursor::boundary(1), error }).await;

    let mut c = Worker::attach(&running, "c").await;
    let (survivor, newcomer) = (a.assignment().await, c.assignment().await);
    assert_eq!(survivor.generation, generation.next());
    assert_eq!((survivor.rank, newcomer.rank), (0, 1));
    assert_eq!(newcomer.source, Source::Peer { rank: 0 });
}

#[tokio::test]
async fn what_an_old_generation_says_changes_nothing() {
    let lab = Lab::new(1);
    let mut running = lab.start(Never).await;
    let mut a = Worker::attach(&running, "a").await;
    let old = a.assignment().await;
    let failed = FromWorker::CollectiveFailed {
        generation: old.generation,
        cursor: Cursor::default(),
        error: "reset".into(),
    };
    a.say(failed.clone()).await;
    let new = a.assignment().await;
    // A zombie of the old generation would save, finish and fail the run.
    a.reports(&old, 0).await;
    a.saves_and_finishes(&lab, &old, ITERATIONS).await;
    a.say(failed).await;
    a.say(FromWorker::Failed { generation: old.generation, error: "late".into() }).await;
    for iteration in 0..ITERATIONS {
        a.reports(&new, iteration).await;
    }
    a.saves_and_finishes(&lab, &new, ITERATIONS).await;
    assert!(a.stopped().await.0);
    assert_eq!(running.outcome().await, Outcome::Succeeded { iteration: ITERATIONS });
}

#[tokio::test]
async fn a_run_can_be_stopped_and_failed_from_outside() {
    let lab = Lab::new(1);
    let mut running = lab.start(Never).await;
    let mut a = Worker::attach(&running, "a").await;
    let assignment = a.assignment().await;
    running.stop("SIGTERM".into());
    assert!(matches!(a.next().await, ToWorker::Request { .. }));
    a.reports(&assignment, 0).await;
    a.saves_and_finishes(&lab, &assignment, 1).await;
    assert_eq!(a.stopped().await, (true, "SIGTERM".into()));
    assert_eq!(running.outcome().await, Outcome::Stopped { iteration: 1, reason: "SIGTERM".into() });

    let lab = Lab::new(1);
    let mut running = lab.start(Never).await;
    running.fail("no such device".into());
    assert_eq!(running.outcome().await, Outcome::Failed { reason: "no such device".into() });
}

#[tokio::test]
async fn too_few_workers_for_too_long_is_an_error() {
    let mut lab = Lab::new(2);
    lab.spec.cluster.failure_timeout = Duration::from_millis(100);
    lab.spec.cluster.wait_timeout = Duration::from_millis(100);
    let mut running = lab.start(Never).await;
    let Outcome::Failed { reason } = running.outcome().await else { panic!() };
    assert!(reason.contains("0 of the 2 workers"), "{reason}");
}

#[tokio::test]
async fn a_silent_worker_is_given_up() {
    let mut lab = Lab::new(1);
    lab.spec.cluster.failure_timeout = Duration::from_millis(100);
    let running = lab.start(Never).await;
    let mut a = Worker::attach(&running, "a").await;
    let _silence = a.outgoing.clone();
    assert!(a.ending().await.is_none());
}

// ------------------------------------------------------------------------------------------------ bad streams

#[tokio::test]
async fn bad_streams_end_with_a_reason_and_disturb_no_member() {
    let lab = Lab::new(1);
    let running = lab.start(Never).await;
    let mut good = Worker::attach(&running, "good").await;
    let assignment = good.assignment().await;

    let heartbeat = Kind::Heartbeat(wire::Heartbeat::default());
    let huge = Kind::Hello(wire::Hello { worker_id: "x".repeat(2 << 20), ..Default::default() });
    for (first, code, says) in [
        (None, Code::InvalidArgument, "not a Hello"),
        (Some(heartbeat.clone()), Code::InvalidArgument, "not a Hello"),
        (Some(huge), Code::OutOfRange, "too large"),
    ] {
        let mut worker = Worker::open(&running, wire::WorkerMessage { kind: first }).await;
        let status = worker.ending().await.unwrap();
        assert_eq!(status.code(), code);
        assert!(status.message().contains(says), "{status:?}");
    }
    for (kind, says) in [
        (None, "empty"),
        (Some(heartbeat), "no cursor"),
        (Some(Kind::Failed(wire::Failed { error: "x".repeat(2 << 20), generation: 1 })), "too large"),
    ] {
        let mut worker = Worker::attach(&running, "bad").await;
        worker.say(wire::WorkerMessage { kind }).await;
        let status = worker.ending().await.unwrap();
        assert!(status.message().contains(says), "{status:?}");
    }

    let mut garbage = tokio::net::TcpStream::connect(running.address).await.unwrap();
    garbage.write_all(&[0xff; 4096]).await.unwrap();
    // The coordinator ends the stream; a reset counts as an end too.
    let _ = garbage.read_to_end(&mut Vec::new()).await;

    // No member was disturbed.
    good.reports(&assignment, 0).await;
    assert_eq!(lab.status(&running).await.generation, assignment.generation.0);
}

#[tokio::test]
async fn a_worker_of_another_run_is_refused() {
    let lab = Lab::new(1);
    let running = lab.start(Never).await;
    let mut stranger = hello("a");
    stranger.run_id = "another".into();
    let mut worker = Worker::open(&running, said(stranger, "a")).await;
    let ToWorker::Refused { reason } = worker.next().await else { panic!() };
    assert!(reason.contains("\"another\""), "{reason}");
    assert!(worker.ending().await.is_none());
}

// ------------------------------------------------------------------------------------------------ who is let in

#[tokio::test]
async fn each_role_may_do_its_part_and_strangers_nothing() {
    let lab = Lab::new(1);
    let running = lab.start(Never).await;
    let known = lab.locator(Role::Viewer).find().await.unwrap();
    let (mut stranger, mut forged) = (known.clone(), known.clone());
    stranger.token = None;
    forged.token = Some(format!("operator.{}", "0".repeat(64)));
    let worker = running.invitation.clone();
    let operator = lab.locator(Role::Operator).find().await.unwrap();
    let code = |result: Result<(), Status>| result.err().map(|status| status.code());
    use Code::{FailedPrecondition, PermissionDenied, Unauthenticated};
    for (invitation, status, checkpoint) in [
        (&stranger, Some(Unauthenticated), Some(Unauthenticated)),
        (&forged, Some(Unauthenticated), Some(Unauthenticated)),
        (&known, None, Some(PermissionDenied)),
        (&worker, None, Some(PermissionDenied)),
        // It is let in; nothing is training that could be saved.
        (&operator, None, Some(FailedPrecondition)),
    ] {
        let mut client = connect(invitation).await;
        let asked = client.status(wire::StatusRequest { first_member: 0 }).await;
        assert_eq!(code(asked.map(drop)), status, "{invitation:?}");
        let asked = client.checkpoint(wire::CheckpointRequest {}).await;
        assert_eq!(code(asked.map(drop)), checkpoint, "{invitation:?}");
        if invitation != &operator {
            let asked = client.cancel(wire::CancelRequest { reason: String::new() }).await;
            assert_eq!(code(asked.map(drop)), checkpoint, "{invitation:?}");
        }
        let attached = client.attach(tokio_stream::pending()).await.map(drop);
        assert_eq!(code(attached).is_none(), invitation == &worker, "{invitation:?}");
    }
    assert_eq!(lab.status(&running).await.member_count, 0);
}

#[tokio::test]
async fn a_coordinator_with_another_certificate_is_not_spoken_to() {
    let (lab, other) = (Lab::new(1), Lab::new(1));
    let (running, elsewhere) = (lab.start(Never).await, other.start(Never).await);
    let mut confused = running.invitation.clone();
    confused.address.clone_from(&elsewhere.invitation.address);
    let patience = Patience { connect: Duration::from_secs(10), keep_alive: None };
    let error = confused.connect(patience).await.unwrap_err().to_string();
    assert!(error.contains("another certificate"), "{error}");
}

#[tokio::test]
async fn a_worker_cannot_take_another_ones_id() {
    let lab = Lab::new(1);
    let running = lab.start(Never).await;
    let mut a = Worker::attach(&running, "a").await;
    let assignment = a.assignment().await;
    let mut thief = Worker::open(&running, proven(hello("a"), b"another secret")).await;
    let status = thief.ending().await.unwrap();
    assert_eq!(status.code(), Code::PermissionDenied);
    a.reports(&assignment, 0).await;
    assert_eq!(lab.status(&running).await.member_count, 1);
}

#[tokio::test]
async fn a_site_may_give_its_certificate_or_do_without_tls() {
    let lab = Lab::new(1);
    let folder = tempfile::tempdir().unwrap();
    let files = ["certificate.pem", "key.pem"].map(|name| folder.path().join(name));
    let made = rcgen::generate_simple_self_signed(["coordinator.site".to_owned()]).unwrap();
    std::fs::write(&files[0], made.cert.pem()).unwrap();
    std::fs::write(&files[1], made.signing_key.serialize_pem()).unwrap();
    let [certificate, key] = files;
    let site = Security::Site { certificate: certificate.clone(), key: key.clone() };
    let running = server::start(Options { security: site, ..lab.options(Never) }).await.unwrap();
    lab.status(&running).await;
    lab.connect_as(Role::Viewer).await;
    drop(running);

    let wrong = Security::Site { certificate: key, key: certificate };
    let error = server::start(Options { security: wrong, ..lab.options(Always) }).await.err().unwrap();
    assert!(matches!(error, StartError::Certificate(_)) && error.is_of_usage(), "{error}");

    let open = Options { security: Security::Insecure, ..lab.options(Always) };
    let running = server::start(open).await.unwrap();
    lab.status(&running).await;
    let error = lab.locator(Role::Viewer).find().await.unwrap_err().to_string();
    assert!(error.contains("--insecure"), "{error}");
}

#[tokio::test]
async fn ranks_find_each_other_through_their_streams() {
    let lab = Lab::new(2);
    let running = lab.start(Never).await;
    let (mut a, mut b) = (Worker::attach(&running, "a").await, Worker::attach(&running, "b").await);
    let generation = a.assignment().await.generation.0;
    b.assignment().await;
    let mut request = wire::StoreRequest { generation, id: 1, keys: vec!["x".into()], ..Default::default() };
    request.set_operation(wire::StoreOperation::Get);
    a.say(wire::WorkerMessage { kind: Some(Kind::StoreRequest(request.clone())) }).await;
    request.set_operation(wire::StoreOperation::Set);
    request.value = b"value".to_vec();
    b.say(wire::WorkerMessage { kind: Some(Kind::StoreRequest(request)) }).await;
    let reply = a.incoming.message().await.unwrap().unwrap().kind;
    let value = b"value".to_vec();
    let expected = wire::StoreReply { id: 1, value, ..Default::default() };
    assert_eq!(reply, Some(wire::coordinator_message::Kind::StoreReply(expected)));
}

// ------------------------------------------------------------------------------------------------ starting

#[tokio::test]
async fn a_run_that_exists_is_only_continued_on_request() {
    let mut lab = Lab::new(1);
    assert!(matches!(lab.refused(Always).await, StartError::NothingToResume { .. }));
    assert_eq!(lab.train(Never).await, Outcome::Succeeded { iteration: ITERATIONS });

    let error = lab.refused(Never).await.to_string();
    assert!(error.contains("test-run exists; give --resume"), "{error}");
    let error = lab.refused(Always).await.to_string();
    assert!(error.contains("already complete (2 iterations); raise distillation.iterations"), "{error}");

    lab.spec.distillation.iterations = ITERATIONS + 1;
    assert_eq!(lab.train(Always).await, Outcome::Succeeded { iteration: ITERATIONS + 1 });
    let served = lab.storage.run(&run_id()).specification().await.unwrap().unwrap();
    assert_eq!(RunSpec::from_toml(&served).unwrap().distillation.iterations, ITERATIONS + 1);
}

#[tokio::test]
async fn a_run_without_a_checkpoint_begins_again() {
    let lab = Lab::new(1);
    drop(lab.start(Never).await);
    assert_eq!(lab.train(Always).await, Outcome::Succeeded { iteration: ITERATIONS });
}

#[tokio::test]
async fn a_run_may_be_started_or_gone_on_with_by_the_same_command() {
    let mut lab = Lab::new(1);
    assert_eq!(lab.train(Auto).await, Outcome::Succeeded { iteration: ITERATIONS });
    lab.spec.distillation.iterations = ITERATIONS + 1;
    assert_eq!(lab.train(Auto).await, Outcome::Succeeded { iteration: ITERATIONS + 1 });
}

#[tokio::test]
async fn a_run_whose_checkpoints_are_all_damaged_does_not_begin_again_in_silence() {
    let lab = Lab::new(1);
    lab.train(Never).await;
    let run = lab.storage.run(&run_id());
    run.put(&layout::manifest_key(ITERATIONS), "{".into()).await.unwrap();
    let error = lab.refused(Always).await.to_string();
    assert!(
        error.contains("nothing to resume") && error.contains("(1 are damaged, 1 were committed)"),
        "{error}"
    );
}

#[tokio::test]
async fn a_run_is_not_resumed_with_other_values() {
    let mut lab = Lab::new(1);
    lab.train(Never).await;
    lab.spec.distillation.iterations = ITERATIONS + 1;
    lab.spec.distillation.seed = 5;
    lab.spec.distillation.alpha = 1.0;
    std::fs::write(lab.spec.teacher.weights.as_ref().unwrap(), b"other weights").unwrap();
    let error = lab.refused(Always).await.to_string();
    for says in ["distillation.seed: 0 there, 5 here", "distillation.alpha", "teacher.sha256"] {
        assert!(error.contains(says), "{error}");
    }
}

#[tokio::test]
async fn the_teachers_file_is_read_and_compared() {
    let mut lab = Lab::new(1);
    lab.spec.teacher.sha256 = Some("00".into());
    assert!(matches!(lab.refused(Never).await, StartError::OtherTeacher { .. }));
    lab.spec.teacher.weights = Some("/nowhere/teacher.safetensors".into());
    let error = lab.refused(Never).await.to_string();
    assert!(error.contains("/nowhere/teacher.safetensors"), "{error}");
    // Neither left a run behind.
    assert!(lab.storage.run(&run_id()).specification().await.unwrap().is_none());
}

#[tokio::test]
async fn an_address_in_use_is_named() {
    let taken = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let lab = Lab::new(1);
    let mut options = lab.options(Never);
    options.listen = taken.local_addr().unwrap();
    let Err(error) = server::start(options).await else { panic!() };
    let error = error.to_string();
    assert!(error.contains(&taken.local_addr().unwrap().to_string()) && error.contains("in use"), "{error}");
}

#[tokio::test]
async fn a_coordinator_whose_run_was_taken_over_stops_without_touching_it() {
    let mut lab = Lab::new(1);
    lab.train(Never).await;
    lab.spec.distillation.iterations = ITERATIONS + 1;
    let mut old = lab.start(Always).await;
    let mut worker = Worker::attach(&old, "a").await;
    worker.assignment().await;
    // Another one, which did not find this one, writes its first record.
    let run = lab.storage.run(&run_id());
    let (mut journal, _) = Journal::open(&run).await.unwrap();
    journal.append("another".into()).await.unwrap();
    // Its next record, or its next look at the journal, shows the old coordinator that another one owns the run.
    let Outcome::Failed { reason } = old.outcome().await else { panic!() };
    assert!(reason.contains("another coordinator has taken over"), "{reason}");
    // Its worker is sent no message that it would act on.
    assert!(worker.ending().await.is_none());
}

#[tokio::test]
async fn a_run_that_is_being_served_is_not_taken_over() {
    let lab = Lab::new(1);
    let old = lab.start(Never).await;
    let error = lab.refused(Always).await.to_string();
    assert!(error.contains(&old.address.to_string()) && error.contains("is being served"), "{error}");
}

// ------------------------------------------------------------------------------------------------ storage

#[tokio::test]
async fn a_checkpoint_is_committed_only_when_its_shards_are_where_the_coordinator_looks() {
    let lab = Lab::new(2);
    let mut running = lab.start(Never).await;
    let (mut a, mut b) = (Worker::attach(&running, "a").await, Worker::attach(&running, "b").await);
    let (first, second) = (a.assignment().await, b.assignment().await);
    for iteration in 0..ITERATIONS {
        a.reports(&first, iteration).await;
        b.reports(&second, iteration).await;
    }
    // The second one writes to a disk of its own.
    let elsewhere = Root::open("memory://").unwrap();
    let key = layout::shard_key(ITERATIONS, &second.generation.store_prefix(), 1, 2);
    let written = elsewhere.run(&run_id()).write_shard(&key, 1, "state".into()).await.unwrap();
    b.receipt(second.generation, ITERATIONS, written.shard, written.e_tag).await;
    a.saves_and_finishes(&lab, &first, ITERATIONS).await;
    let (success, reason) = b.stopped().await;
    assert!(
        !success && reason.contains(&format!("worker {} (localhost", WorkerSecret::id_of(b"b"))),
        "{reason}"
    );
    assert!(reason.contains("rank-001-of-002.safetensors is damaged: it is missing"), "{reason}");
    assert_eq!(lab.storage.run(&run_id()).checkpoints().await.unwrap(), [] as [u64; 0]);
    let failed = observed(&mut running, |observation| match observation {
        Observation::CheckpointFailed { iteration, reason } => Some((iteration, reason)),
        _ => None,
    })
    .await;
    assert!(failed.0 == ITERATIONS && failed.1.contains("it is missing"), "{failed:?}");
    // The other one keeps its state, and saves it again with a worker that sees the storage.
    let ToWorker::Abandon { generation, .. } = a.next().await else { panic!() };
    let cursor = Cursor::boundary(ITERATIONS);
    a.say(FromWorker::CollectiveFailed { generation, cursor, error: "abandoned".into() }).await;
    let mut c = Worker::attach(&running, "c").await;
    let (first, second) = (a.assignment().await, c.assignment().await);
    assert_eq!(first.source, Source::Peer { rank: 0 });
    a.saves_and_finishes(&lab, &first, ITERATIONS).await;
    c.saves_and_finishes(&lab, &second, ITERATIONS).await;
    assert!(c.stopped().await.0);
    assert_eq!(running.outcome().await, Outcome::Succeeded { iteration: ITERATIONS });
}

#[tokio::test]
async fn one_ranks_word_condemns_no_checkpoint() {
    let mut lab = Lab::new(1);
    lab.train(Never).await;
    lab.spec.distillation.iterations = ITERATIONS + 1;
    let running = lab.start(Always).await;
    let mut blind = Worker::attach(&running, "blind").await;
    let Assignment { generation, source, .. } = blind.assignment().await;
    let Source::Checkpoint { manifest_key } = source else { panic!("{source:?}") };
    let error = format!("{manifest_key} is missing");
    blind.say(FromWorker::CheckpointDamaged { generation, manifest_key: manifest_key.clone(), error }).await;
    let (success, reason) = blind.stopped().await;
    assert!(!success && reason.contains("does not see the run's storage"), "{reason}");
    let mut sighted = Worker::attach(&running, "sighted").await;
    assert_eq!(sighted.assignment().await.source, Source::Checkpoint { manifest_key });
}

/// A store that fails while it is told to.
#[derive(Debug)]
struct Unsteady {
    inner: InMemory,
    fails: AtomicBool,
}

impl std::fmt::Display for Unsteady {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "unsteady")
    }
}

impl Unsteady {
    fn answer(&self) -> object_store::Result<()> {
        match self.fails.load(Ordering::SeqCst) {
            // The kind that the store's client does not repeat, so that the test needs no patience.
            true => Err(object_store::Error::PermissionDenied { path: String::new(), source: "503".into() }),
            false => Ok(()),
        }
    }
}

#[async_trait::async_trait]
impl ObjectStore for Unsteady {
    async fn put_opts(
        &self,
        location: &ObjectPath,
        payload: PutPayload,
        options: PutOptions,
    ) -> object_store::Result<PutResult> {
        self.answer()?;
        self.inner.put_opts(location, payload, options).await
    }

    async fn put_multipart_opts(
        &self,
        location: &ObjectPath,
        options: PutMultipartOptions,
    ) -> object_store::Result<Box<dyn MultipartUpload>> {
        self.answer()?;
        self.inner.put_multipart_opts(location, options).await
    }

    async fn get_opts(&self, location: &ObjectPath, options: GetOptions) -> object_store::Result<GetResult> {
        self.answer()?;
        self.inner.get_opts(location, options).await
    }

    fn delete_stream(
        &self,
        locations: BoxStream<'static, object_store::Result<ObjectPath>>,
    ) -> BoxStream<'static, object_store::Result<ObjectPath>> {
        self.inner.delete_stream(locations)
    }

    fn list(&self, prefix: Option<&ObjectPath>) -> BoxStream<'static, object_store::Result<ObjectMeta>> {
        self.inner.list(prefix)
    }

    async fn list_with_delimiter(&self, prefix: Option<&ObjectPath>) -> object_store::Result<ListResult> {
        self.inner.list_with_delimiter(prefix).await
    }

    async fn copy_opts(
        &self,
        from: &ObjectPath,
        to: &ObjectPath,
        options: CopyOptions,
    ) -> object_store::Result<()> {
        self.inner.copy_opts(from, to, options).await
    }
}

#[tokio::test]
async fn while_the_storage_fails_the_ranks_are_held_and_the_status_says_so() {
    let mut lab = Lab::new(1);
    let store = Arc::new(Unsteady { inner: InMemory::new(), fails: AtomicBool::new(false) });
    lab.storage = Root::in_store(store.clone(), "memory://");
    let mut running = lab.start(Never).await;
    let mut a = Worker::attach(&running, "a").await;
    let first = a.assignment().await;
    a.reports(&first, 0).await;
    store.fails.store(true, Ordering::SeqCst);
    let cursor = Cursor::boundary(1);
    let generation = first.generation;
    a.say(FromWorker::CollectiveFailed { generation, cursor, error: "reset".into() }).await;
    // The next generation cannot be recorded; the status is answered meanwhile.
    let waits = loop {
        let status = lab.status(&running).await;
        if status.reason.contains("waiting for the storage") {
            break status;
        }
    };
    assert_eq!(waits.members.len(), 1);
    store.fails.store(false, Ordering::SeqCst);
    let again = a.assignment().await;
    assert_eq!((again.generation.0, again.source.clone()), (2, Source::Peer { rank: 0 }));
    a.reports(&again, 1).await;
    a.saves_and_finishes(&lab, &again, ITERATIONS).await;
    assert!(a.stopped().await.0);
    assert_eq!(running.outcome().await, Outcome::Succeeded { iteration: ITERATIONS });
}

#[tokio::test]
async fn the_status_of_many_members_comes_in_pages() {
    let mut lab = Lab::new(1);
    lab.spec.cluster.max_workers = 1;
    let running = lab.start(Never).await;
    let mut workers = Vec::new();
    for n in 0..450 {
        let name = format!("w{n}");
        let mut hello = hello(&name);
        hello.host = "h".repeat(200);
        let mut worker = Worker::open(&running, said(hello, &name)).await;
        assert!(matches!(worker.next().await, ToWorker::Welcome { .. }));
        workers.push(worker);
    }
    let mut client = Client::of(&lab.locator(Role::Viewer)).await.unwrap();
    let status = client.status().await.unwrap();
    let names: BTreeSet<_> = status.members.iter().map(|member| member.worker_id.clone()).collect();
    assert_eq!((status.members.len(), names.len(), status.member_count), (450, 450, 450));
}

// ------------------------------------------------------------------------------------------------ a successor

#[tokio::test]
async fn workers_come_back_to_a_successor_and_nothing_changes() {
    let lab = Lab::new(2);
    let old = lab.start(Never).await;
    let (mut a, mut b) = (Worker::attach(&old, "a").await, Worker::attach(&old, "b").await);
    let (first, second) = (a.assignment().await, b.assignment().await);
    a.reports(&first, 0).await;
    b.reports(&second, 0).await;
    drop(old);
    for worker in [&mut a, &mut b] {
        worker.ending().await;
    }

    let mut running = lab.start(Always).await;
    // They send again what the old coordinator may not have received.
    let a = Worker::come_back(&running, "a", &first, 1).await;
    let mut b = Worker::come_back(&running, "b", &second, 2).await;
    for iteration in 0..ITERATIONS {
        a.reports(&first, iteration).await;
        b.reports(&second, iteration).await;
    }
    a.saves_and_finishes(&lab, &first, ITERATIONS).await;
    b.saves_and_finishes(&lab, &second, ITERATIONS).await;
    // Not an assignment: the generation continues.
    assert!(matches!(b.next().await, ToWorker::Committed { iteration: ITERATIONS }));
    assert_eq!(running.outcome().await, Outcome::Succeeded { iteration: ITERATIONS });
}

// ------------------------------------------------------------------------------------------------ requests

#[tokio::test]
async fn a_checkpoint_on_demand_is_answered_when_it_exists() {
    let lab = Lab::new(1);
    let mut running = lab.start(Never).await;
    let mut client = lab.connect_as(Role::Operator).await;
    let refused = client.checkpoint(wire::CheckpointRequest {}).await.unwrap_err();
    assert!(refused.message().contains("nothing is training"), "{refused:?}");

    let mut a = Worker::attach(&running, "a").await;
    let assignment = a.assignment().await;
    let asking = tokio::spawn(async move { client.checkpoint(wire::CheckpointRequest {}).await });
    assert!(matches!(a.next().await, ToWorker::Request { what: Request::Checkpoint, .. }));
    a.reports(&assignment, 0).await;
    a.saves(&lab, &assignment, 1).await;
    assert_eq!(asking.await.unwrap().unwrap().into_inner().iteration, 1);

    let mut client = lab.connect_as(Role::Operator).await;
    client.cancel(wire::CancelRequest { reason: "enough".into() }).await.unwrap();
    let what = loop {
        if let ToWorker::Request { what, .. } = a.next().await {
            break what;
        }
    };
    assert_eq!(what, Request::CheckpointAndStop);
    a.reports(&assignment, 1).await;
    a.saves_and_finishes(&lab, &assignment, 2).await;
    assert_eq!(running.outcome().await, Outcome::Succeeded { iteration: 2 });
}

#[tokio::test]
async fn the_end_does_not_wait_for_a_worker_that_stays() {
    let lab = Lab::new(1);
    let mut running = lab.start(Never).await;
    let worker = Worker::attach(&running, "a").await;
    running.fail("enough".into());
    tokio::time::timeout(Duration::from_secs(60), running.outcome()).await.unwrap();
    drop(worker);
}
