//! S3 over the wire: moto's server, which this test starts. Without it (`scripts/test.sh` installs it) the
//! test fails, unless `POTSTILL_TEST_WITHOUT` names it.

#![allow(clippy::unwrap_used, reason = "a test may panic")]

mod contract;

use std::{
    io::{BufRead, BufReader, Read, Write},
    net::{SocketAddr, TcpListener, TcpStream},
    path::Path,
    process::{Child, Command, Stdio},
    sync::Arc,
    thread,
};

use object_store::{ObjectStore, aws::AmazonS3Builder};
use potstill_storage::Root;
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
        // A root installs it when it is opened; this store is made without one.
        let _ = rustls::crypto::ring::default_provider().install_default();
        let store = AmazonS3Builder::new()
            .with_bucket_name("bucket")
            .with_endpoint(format!("http://{}", self.address))
            .with_allow_http(true)
            .with_region("us-east-1")
            .with_access_key_id("id")
            .with_secret_access_key("secret")
            .build()
            .unwrap();
        let store: Arc<dyn ObjectStore> = Arc::new(store);
        Root::in_store(store, "s3://bucket")
    }
}

#[tokio::test]
async fn a_bucket_keeps_a_run() {
    let Some(server) = Server::start("a_bucket_keeps_a_run") else { return };
    contract::is_kept_by(&server.root()).await;
}
