//! Measures how long a generation takes to form: many workers attach at once over gRPC, and each waits for its place.
//!
//! `form_generation [--insecure] [WORKERS…]` starts a coordinator in this process and all workers' streams in a child process, a hundred to
//! a connection, and prints for each number of workers the seconds from the first attach to the last assignment, and the
//! coordinator's own CPU time. Then a tenth of the workers is lost, and the next generation is timed too.

#![allow(clippy::unwrap_used, reason = "a measurement may panic")]

use std::{
    io::{BufRead, BufReader},
    process::{Command, Stdio},
    time::{Duration, Instant},
};

use futures::future::join_all;
use potstill_access::{Authorized, Invitation, Patience, WorkerSecret};
use potstill_proto::{
    PROTOCOL,
    cursor::{Cursor, Generation},
    message::{FromWorker, Hello, ToWorker, WorkerId, proven},
    wire::{self, coordinator_client::CoordinatorClient},
};
use potstill_server::{self as server, Options, Resume, Security};
use potstill_spec::RunSpec;
use potstill_storage::Root;
use tokio::sync::{mpsc, watch};
use tokio_stream::wrappers::ReceiverStream;
use tonic::Streaming;

/// Streams on one connection: what HTTP/2 servers commonly allow at a time.
const STREAMS: usize = 100;
const RUN: &str = "form";

fn main() {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
    if let [flag, invitation, workers] = &arguments[..]
        && flag == "--workers-at"
    {
        return runtime.block_on(attach_all(invitation, workers.parse().unwrap()));
    }
    let insecure = arguments.first().is_some_and(|first| first == "--insecure");
    let counts: Vec<usize> =
        arguments.iter().skip(usize::from(insecure)).map(|count| count.parse().unwrap()).collect();
    println!("{:>8}  {:>12}  {:>14}  {:>12}", "workers", "first, s", "after loss, s", "CPU, s");
    for count in counts {
        runtime.block_on(measure(count, insecure));
    }
}

async fn measure(count: usize, insecure: bool) {
    let folder = std::env::temp_dir().join(format!("potstill-form-{}", std::process::id()));
    std::fs::create_dir_all(&folder).unwrap();
    let weights = folder.join("teacher.safetensors");
    std::fs::write(&weights, b"weights").unwrap();
    let mut spec = RunSpec::default();
    spec.teacher.weights = Some(weights);
    let workers = u32::try_from(count).unwrap();
    spec.distillation.micro_batch = 1;
    spec.distillation.global_batch = workers;
    // The first generation needs all of them, the second what is left.
    spec.cluster.max_workers = workers;
    spec.cluster.min_workers = workers - workers / 10;
    spec.cluster.failure_timeout = Duration::from_millis(60000);
    spec.validate().unwrap();
    let running = server::start(Options {
        listen: "127.0.0.1:0".parse().unwrap(),
        spec,
        run_id: RUN.parse().unwrap(),
        storage: Root::open("memory://").unwrap(),
        resume: Resume::Never,
        from_teacher: false,
        security: if insecure { Security::Insecure } else { Security::Own },
        page: String::new(),
        ranks_may_live: true,
    })
    .await
    .unwrap();

    let before = cpu_seconds();
    let mut child = Command::new(std::env::current_exe().unwrap())
        .args(["--workers-at", &running.invitation.to_text(), &count.to_string()])
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let output = BufReader::new(child.stdout.take().unwrap());
    let seconds: Vec<String> =
        tokio::task::spawn_blocking(move || output.lines().map(Result::unwrap).collect()).await.unwrap();
    child.wait().unwrap();
    println!("{count:>8}  {:>12}  {:>14}  {:>12.2}", seconds[0], seconds[1], cpu_seconds() - before);
    std::fs::remove_dir_all(folder).unwrap();
}

fn cpu_seconds() -> f64 {
    let stat = std::fs::read_to_string("/proc/self/stat").unwrap();
    let after_name = stat.rsplit_once(')').unwrap().1;
    let fields: Vec<u64> =
        after_name.split_whitespace().skip(11).take(2).map(|f| f.parse().unwrap()).collect();
    // In clock ticks, a hundred to the second on Linux.
    (fields[0] + fields[1]) as f64 / 100.0
}

/// A worker that only takes its places and computes nothing.
struct Worker {
    outgoing: mpsc::Sender<wire::WorkerMessage>,
    incoming: Streaming<wire::CoordinatorMessage>,
}

impl Worker {
    async fn attach(mut client: CoordinatorClient<Authorized>, index: usize) -> Self {
        let (outgoing, messages) = mpsc::channel(8);
        let name = format!("w{index:06}");
        let hello = Hello {
            protocol: PROTOCOL,
            worker: WorkerId(WorkerSecret::id_of(name.as_bytes())),
            run_id: RUN.into(),
            host: "host".into(),
            pid: 1,
            device: "cuda:0".into(),
            held: None,
            place: None,
        };
        outgoing.send(proven(hello, name.as_bytes())).await.unwrap();
        outgoing.send(FromWorker::Ready.into()).await.unwrap();
        let incoming = client.attach(ReceiverStream::new(messages)).await.unwrap().into_inner();
        Self { outgoing, incoming }
    }

    /// Waits for a place, and abandons generations that it is told to abandon.
    async fn assigned(&mut self) {
        loop {
            let message = self.incoming.message().await.unwrap().unwrap();
            match ToWorker::try_from(message).unwrap() {
                ToWorker::Assignment(_) => return,
                ToWorker::Abandon { generation, .. } => {
                    let left = FromWorker::CollectiveFailed {
                        generation,
                        cursor: Cursor::default(),
                        error: "reset".into(),
                    };
                    self.outgoing.send(left.into()).await.unwrap();
                }
                _ => {}
            }
        }
    }

    async fn send_heartbeats(&self) {
        let heartbeat = FromWorker::Heartbeat {
            generation: Generation(1),
            cursor: Cursor::default(),
            progress: 1,
            activity: "training".into(),
            waiting: false,
        };
        self.outgoing.send(heartbeat.into()).await.unwrap();
    }
}

async fn attach_all(invitation: &str, count: usize) {
    let connections = count.div_ceil(STREAMS);
    let invitation = Invitation::parse(invitation, "the command line").unwrap();
    let patience = Patience { connect: Duration::from_secs(60), keep_alive: None };
    let clients = join_all((0..connections).map(|_| invitation.connect(patience))).await;
    let clients: Vec<_> = clients.into_iter().map(Result::unwrap).collect();

    let started = Instant::now();
    let (lose, lost) = watch::channel(false);
    let (tell, mut told) = mpsc::unbounded_channel();
    for index in 0..count {
        let (client, tell, mut lost) = (clients[index / STREAMS].clone(), tell.clone(), lost.clone());
        tokio::spawn(async move {
            let mut worker = Worker::attach(client, index).await;
            worker.assigned().await;
            worker.send_heartbeats().await;
            tell.send(()).unwrap();
            lost.changed().await.unwrap();
            if index % 10 == 9 {
                return;
            }
            worker.assigned().await;
            tell.send(()).unwrap();
            // Runs until the process ends: a stream that ends counts as a lost worker.
            std::future::pending::<()>().await;
        });
    }
    for _ in 0..count {
        told.recv().await.unwrap();
    }
    println!("{:.3}", started.elapsed().as_secs_f64());
    tokio::time::sleep(Duration::from_millis(200)).await;

    let started = Instant::now();
    lose.send(true).unwrap();
    for _ in 0..count - count / 10 {
        told.recv().await.unwrap();
    }
    println!("{:.3}", started.elapsed().as_secs_f64());
}
