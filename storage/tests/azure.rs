//! Tests against Azure's Blob service over the wire: Azurite, which each test starts. Without it (`scripts/test.sh` installs it
//! where there is Node) each test fails, unless `POTSTILL_TEST_WITHOUT` names it.

#![allow(clippy::unwrap_used, reason = "a test may panic")]

mod contract;

use std::{
    env,
    io::{BufRead, BufReader},
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    thread,
};

use futures::future::join_all;
use object_store::{
    ClientOptions,
    azure::{AzureAccessKey, AzureAuthorizer, AzureCredential},
    client::{HttpConnector, HttpRequest, HttpRequestBody, ReqwestConnector},
};
use potstill_storage::{Error, Root, Run};
use potstill_tests::lacks;

/// What scripts/tests/run.py installs.
const VERSION: &str = "3.35.0";
/// The account that every Azurite has, with the key that Microsoft publishes for it.
const ACCOUNT: &str = "devstoreaccount1";
const KEY: &str = "Eby8vdM02xNOcqFlqUwJPLlmEtlCDXJ1OUzFT50uSRZ6IFsuFq2UVErCz4I6tq/K1SZFPTOtr/KBHBeksoGMGw==";

/// Azurite with an empty container, in memory. It ends when this value is dropped.
struct Server {
    child: Child,
    /// URL of the account.
    url: String,
    /// Folder for the files that it writes even so.
    _folder: tempfile::TempDir,
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn installed() -> Option<PathBuf> {
    let repository = Path::new(env!("CARGO_MANIFEST_DIR")).join("..");
    let folders =
        [".venv/azurite/node_modules/.bin", "node_modules/.bin"].map(|folder| repository.join(folder));
    let path = env::var_os("PATH").unwrap_or_default();
    let found = folders.into_iter().chain(env::split_paths(&path)).map(|folder| folder.join("azurite-blob"));
    found.into_iter().find(|program| program.is_file())
}

impl Server {
    /// `None` where Azurite is not installed and need not be.
    async fn start(test: &str) -> Option<Self> {
        let Some(program) = installed() else {
            lacks("azurite", test, &format!("npm install --prefix .venv/azurite azurite@{VERSION}"));
            return None;
        };
        let folder = tempfile::tempdir().unwrap();
        let mut child = Command::new(program.canonicalize().unwrap())
            .args(["--blobHost", "127.0.0.1", "--blobPort", "0"])
            .args(["--inMemoryPersistence", "--silent", "--disableTelemetry"])
            .current_dir(folder.path())
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        let mut log = BufReader::new(child.stdout.take().unwrap());
        let mut line = String::new();
        let address = loop {
            line.clear();
            assert!(log.read_line(&mut line).unwrap() > 0, "the server ended");
            if let Some((_, address)) = line.split_once("listens on ") {
                break address.trim().to_owned();
            }
        };
        // Its further output must be read, or it would block.
        thread::spawn(move || std::io::copy(&mut log, &mut std::io::sink()));
        let server = Self { child, url: format!("{address}/{ACCOUNT}"), _folder: folder };
        server.make_container().await;
        Some(server)
    }

    /// `object_store` cannot create containers, but it can sign the request.
    async fn make_container(&self) {
        let mut request = HttpRequest::new(HttpRequestBody::empty());
        *request.method_mut() = "PUT".parse().unwrap();
        *request.uri_mut() = format!("{}/container?restype=container", self.url).parse().unwrap();
        request.headers_mut().insert("content-length", "0".parse().unwrap());
        let credential = AzureCredential::AccessKey(AzureAccessKey::try_new(KEY).unwrap());
        AzureAuthorizer::new(&credential, ACCOUNT).try_authorize(&mut request).unwrap();
        // Opening a root installs it; this client is made without one.
        let _ = rustls::crypto::ring::default_provider().install_default();
        let options = ClientOptions::new().with_allow_http(true);
        let client = ReqwestConnector::default().connect(&options).unwrap();
        assert_eq!(client.execute(request).await.unwrap().status(), 201);
    }

    /// A root in the container, opened by its URL as in use.
    fn root(&self) -> Root {
        let variables = [
            ("AZURE_STORAGE_ENDPOINT", self.url.as_str()),
            ("AZURE_ALLOW_HTTP", "true"),
            ("AZURE_STORAGE_ACCOUNT_NAME", ACCOUNT),
            ("AZURE_STORAGE_ACCOUNT_KEY", KEY),
        ];
        let variables = variables.map(|(name, value)| (name.to_owned(), value.to_owned()));
        Root::open_with("az://container/some/where", variables).unwrap()
    }
}

fn run(root: &Root) -> Run {
    root.run(&"one".parse().unwrap())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_container_passes_the_probe_and_of_many_writers_one_wins() {
    let Some(server) = Server::start("a_container_passes_the_probe_and_of_many_writers_one_wins").await
    else {
        return;
    };
    let root = server.root();
    assert_eq!(root.url(), "az://container/some/where");
    root.probe().await.unwrap();
    let run = run(&root);
    for key in ["a/0", "a/1", "a/2", "a/3", "a/4"] {
        let answers = join_all((0..16).map(|writer| {
            let run = run.clone();
            tokio::spawn(async move { run.create(key, format!("writer {writer}").into()).await })
        }));
        let answers: Vec<_> = answers.await.into_iter().map(Result::unwrap).collect();
        let won: Vec<usize> = (0..16).filter(|&writer| answers[writer].is_ok()).collect();
        let [winner] = won[..] else { panic!("{key}: {won:?} have won") };
        for error in answers.into_iter().filter_map(Result::err) {
            assert!(matches!(error, Error::AlreadyExists { .. }), "{error}");
        }
        let winner = format!("writer {winner}");
        assert_eq!(run.get(key).await.unwrap().unwrap(), winner);
        // Creating the same content again succeeds.
        run.create(key, winner.into()).await.unwrap();
    }
}

#[tokio::test]
async fn a_container_keeps_a_run() {
    let Some(server) = Server::start("a_container_keeps_a_run").await else { return };
    contract::is_kept_by(&server.root()).await;
}
