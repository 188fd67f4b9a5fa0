//! Tests against S3 over the wire: moto's server, which this test starts. Without it (`scripts/test.sh` installs it) each
//! test fails, unless `POTSTILL_TEST_WITHOUT` names it.

#![allow(clippy::unwrap_used, reason = "a test may panic")]

use std::{
    collections::BTreeSet,
    io::{BufRead, BufReader, Read, Write},
    net::{SocketAddr, TcpListener, TcpStream},
    num::NonZeroU64,
    path::Path,
    process::{Child, Command, Stdio},
    sync::Arc,
    thread,
};

use bytes::Bytes;
use object_store::{ObjectStore, aws::AmazonS3Builder};
use potstill_storage::{
    Error, Root, Run,
    checkpoint::Manifest,
    journal::Journal,
    layout,
    retention::{Policy, Swept},
};
use potstill_tests::lacks;

/// moto's server with an empty bucket. It ends when this value is dropped.
struct Server {
    child: Child,
    address: SocketAddr,
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl Server {
    /// `None` where moto is not installed and need not be.
    fn start(test: &str) -> Option<Self> {
        let python = Path::new(env!("CARGO_MANIFEST_DIR")).join("../.venv/bin/python");
        let installed =
            Command::new(&python).args(["-c", "import moto.server"]).stderr(Stdio::null()).status();
        if !installed.is_ok_and(|status| status.success()) {
            lacks("moto", test, "pip install -r requirements-test.txt");
            return None;
        }
        let address = TcpListener::bind(("127.0.0.1", 0)).unwrap().local_addr().unwrap();
        let mut child = Command::new(python)
            .args(["-m", "moto.server", "-H", "127.0.0.1", "-p", &address.port().to_string()])
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        let mut log = BufReader::new(child.stderr.take().unwrap());
        let mut line = String::new();
        while !line.contains("Running on") {
            line.clear();
            assert!(log.read_line(&mut line).unwrap() > 0, "the server ended");
        }
        // Its further output must be read, or it would block.
        thread::spawn(move || std::io::copy(&mut log, &mut std::io::sink()));
        let mut stream = TcpStream::connect(address).unwrap();
        let request =
            "PUT /bucket HTTP/1.1\r\nHost: localhost\r\nContent-Length: 0\r\nConnection: close\r\n\r\n";
        stream.write_all(request.as_bytes()).unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).unwrap();
        assert!(answer.starts_with("HTTP/1.1 200"), "{answer}");
        Some(Self { child, address })
    }

    fn root(&self) -> Root {
        root_at(self.address)
    }
}

fn root_at(address: SocketAddr) -> Root {
    // A root installs it when it is opened; this store is made without one.
    let _ = rustls::crypto::ring::default_provider().install_default();
    let store = AmazonS3Builder::new()
        .with_bucket_name("bucket")
        .with_endpoint(format!("http://{address}"))
        .with_allow_http(true)
        .with_region("us-east-1")
        .with_access_key_id("id")
        .with_secret_access_key("secret")
        .build()
        .unwrap();
    let store: Arc<dyn ObjectStore> = Arc::new(store);
    Root::in_store(store, "s3://bucket")
}

fn run(root: &Root) -> Run {
    root.run(&"one".parse().unwrap())
}

#[tokio::test]
async fn a_bucket_passes_the_probe_and_the_first_write_stays() {
    let Some(server) = Server::start("a_bucket_passes_the_probe_and_the_first_write_stays") else { return };
    let root = server.root();
    root.probe().await.unwrap();
    let run = run(&root);
    run.create("a/b", "first".into()).await.unwrap();
    run.create("a/b", "first".into()).await.unwrap();
    let error = run.create("a/b", "second".into()).await.unwrap_err();
    assert!(matches!(error, Error::AlreadyExists { .. }), "{error}");
    assert_eq!(run.get("a/b").await.unwrap().unwrap(), "first");
}

#[tokio::test]
async fn two_coordinators_cannot_both_write_the_next_record() {
    let Some(server) = Server::start("two_coordinators_cannot_both_write_the_next_record") else { return };
    let run = run(&server.root());
    let (mut one, _) = Journal::open(&run).await.unwrap();
    one.append("one, 0".into()).await.unwrap();
    let (mut two, records) = Journal::open(&run).await.unwrap();
    assert_eq!(records, ["one, 0"]);
    two.append("two, 1".into()).await.unwrap();
    assert!(matches!(one.append("one, 1".into()).await, Err(Error::Fenced { .. })));
    let (_, records) = Journal::open(&run).await.unwrap();
    assert_eq!(records, ["one, 0", "two, 1"]);
}

#[tokio::test]
async fn checkpoints_come_back_whole_and_old_ones_go() {
    let Some(server) = Server::start("checkpoints_come_back_whole_and_old_ones_go") else { return };
    let run = run(&server.root());
    // The first is uploaded in parts.
    let large: Bytes = (0..20_u32 << 20).map(|n| (n % 251) as u8).collect();
    for (iteration, bytes) in [(10, large.clone()), (20, "small".into()), (30, "small".into())] {
        let key = layout::shard_key(iteration, "g1", 0, 1);
        let shard = run.write_shard(&key, 0, bytes).await.unwrap().shard;
        run.commit(&Manifest::new(iteration, 1, vec![shard])).await.unwrap();
    }
    let (whole, damaged) = run.survey().await.unwrap();
    assert_eq!((whole.len(), damaged.len()), (3, 0));
    assert!(run.read_shard(&whole[0].shards[0]).await.unwrap() == large);

    let orphan = layout::shard_key(15, "g1", 0, 2);
    run.write_shard(&orphan, 0, "left behind".into()).await.unwrap();
    let policy = Policy { keep_last: Some(1), keep_every: NonZeroU64::new(20) };
    let swept = run.sweep(policy, &BTreeSet::new(), 30).await.unwrap();
    assert_eq!(swept, Swept { checkpoints: vec![10], orphans: 1 });
    assert_eq!(run.checkpoints().await.unwrap(), [20, 30]);
}

/// Forwards requests without the condition for a create-only write, as a store that ignores it would see them.
fn without_condition(server: SocketAddr) -> SocketAddr {
    let listener = TcpListener::bind(("127.0.0.1", 0)).unwrap();
    let address = listener.local_addr().unwrap();
    thread::spawn(move || {
        for client in listener.incoming() {
            let client = client.unwrap();
            thread::spawn(move || pass_on(client, server));
        }
    });
    address
}

fn pass_on(client: TcpStream, server: SocketAddr) -> std::io::Result<()> {
    let mut answers = client.try_clone()?;
    let mut requests = BufReader::new(client);
    let mut upstream = TcpStream::connect(server)?;
    let mut replies = upstream.try_clone()?;
    thread::spawn(move || std::io::copy(&mut replies, &mut answers));
    loop {
        let mut length = 0;
        loop {
            let mut line = String::new();
            if requests.read_line(&mut line)? == 0 {
                return Ok(());
            }
            let lower = line.to_ascii_lowercase();
            if let Some(value) = lower.strip_prefix("content-length:") {
                length = value.trim().parse().unwrap_or(0);
            }
            if !lower.starts_with("if-none-match:") {
                upstream.write_all(line.as_bytes())?;
            }
            if line == "\r\n" {
                break;
            }
        }
        let mut body = vec![0; length];
        requests.read_exact(&mut body)?;
        upstream.write_all(&body)?;
    }
}

#[tokio::test]
async fn a_server_that_ignores_the_condition_is_refused() {
    let Some(server) = Server::start("a_server_that_ignores_the_condition_is_refused") else { return };
    let error = root_at(without_condition(server.address)).probe().await.unwrap_err();
    assert!(matches!(&error, Error::NotConditional { .. }), "{error}");
    assert!(error.to_string().contains("If-None-Match"), "{error}");
}
