//! A run's progress for Kubeflow Trainer (KEP-2779): where it starts a job's pods it states in their environment where a job tells its
//! progress, and shows it in the status of its TrainJob.

use std::{
    env,
    path::{Path, PathBuf},
    time::Duration,
};

use anyhow::{Context, ensure};
use chrono::{SecondsFormat, Utc};
use serde_json::{Value, json};
use tokio::{sync::watch, task::JoinHandle, time::MissedTickBehavior};
use tracing::{info, warn};

/// The least time between two messages.
const EVERY: Duration = Duration::from_secs(5);
/// The timeout of a message.
const PATIENCE: Duration = Duration::from_secs(10);

/// What is told.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Progress {
    /// Finished iterations, and those of the whole run.
    pub iteration: u64,
    /// See `iteration`.
    pub iterations: u64,
    /// Whether the run has succeeded: before that there is something left to do.
    pub done: bool,
    /// Seconds until the end, as far as known.
    pub remaining_seconds: Option<f64>,
    /// Names and values.
    pub metrics: Vec<(&'static str, f64)>,
}

impl Progress {
    fn body(&self) -> Value {
        let done = (self.iteration * 100).checked_div(self.iterations).unwrap_or(0).min(99);
        let percentage = if self.done { 100 } else { done };
        let finite = self.metrics.iter().filter(|(_, value)| value.is_finite());
        let metrics: Vec<_> =
            finite.map(|(name, value)| json!({ "name": name, "value": format!("{value:.6}") })).collect();
        let mut status = json!({
            "progressPercentage": percentage,
            "metrics": metrics,
            "lastUpdatedTime": Utc::now().to_rfc3339_opts(SecondsFormat::Secs, true),
        });
        if let Some(seconds) = self.remaining_seconds.filter(|seconds| seconds.is_finite()) {
            status["estimatedRemainingSeconds"] = (seconds.max(0.0) as u64).into();
        }
        json!({ "trainerStatus": status })
    }
}

/// Where progress is told.
#[derive(Debug)]
struct Server {
    url: String,
    /// The file of the token, which is replaced before it expires.
    token: PathBuf,
    client: reqwest::Client,
}

impl Server {
    /// The one that the environment names; none outside of Kubeflow.
    fn from_environment() -> anyhow::Result<Option<Self>> {
        let Ok(url) = env::var("KUBEFLOW_TRAINER_SERVER_URL") else { return Ok(None) };
        let file = |name: &'static str| {
            env::var_os(name).map(PathBuf::from).with_context(|| format!("{name} is not set"))
        };
        let token = file("KUBEFLOW_TRAINER_SERVER_TOKEN")?;
        Self::new(url, token, &file("KUBEFLOW_TRAINER_SERVER_CA_CERT")?).map(Some)
    }

    /// One whose certificate an authority has signed that the file `authority` holds.
    fn new(url: String, token: PathBuf, authority: &Path) -> anyhow::Result<Self> {
        let place = authority.display().to_string();
        let pem = std::fs::read(authority).with_context(|| place.clone())?;
        let certificates = reqwest::Certificate::from_pem_bundle(&pem).with_context(|| place.clone())?;
        ensure!(!certificates.is_empty(), "{place} holds no certificate");
        // The client uses the process's TLS; an error means that the storage has installed it already.
        let _ = rustls::crypto::ring::default_provider().install_default();
        let client = reqwest::Client::builder().timeout(PATIENCE).tls_certs_only(certificates).build()?;
        Ok(Self { url, token, client })
    }

    async fn tell(&self, progress: &Progress) -> anyhow::Result<()> {
        let token = tokio::fs::read_to_string(&self.token).await;
        let token = token.with_context(|| self.token.display().to_string())?;
        let message = self.client.post(&self.url).bearer_auth(token.trim());
        let message = message.header("content-type", "application/json").body(progress.body().to_string());
        message.send().await?.error_for_status()?;
        Ok(())
    }
}

/// Tells progress in the background.
pub struct Teller {
    progress: watch::Sender<Progress>,
    task: JoinHandle<()>,
}

impl Teller {
    /// Starts where the environment names a server; a server that cannot be used is logged, and nothing is told.
    #[must_use]
    pub fn start() -> Option<Self> {
        let server = Server::from_environment()
            .inspect_err(|error| warn!("Kubeflow is not told the progress: {error:#}"))
            .ok()??;
        info!(url = server.url, "Kubeflow is told the progress");
        Some(Self::telling(server))
    }

    fn telling(server: Server) -> Self {
        let (progress, mut changes) = watch::channel(Progress::default());
        let task = tokio::spawn(async move {
            let mut interval = tokio::time::interval(EVERY);
            interval.set_missed_tick_behavior(MissedTickBehavior::Delay);
            let mut failing = false;
            // The last value comes too: the wait fails once it has been seen and nothing can come after it.
            while changes.changed().await.is_ok() {
                interval.tick().await;
                let now = changes.borrow_and_update().clone();
                match server.tell(&now).await {
                    Ok(()) => failing = false,
                    Err(error) => {
                        if !failing {
                            warn!("Kubeflow was not told the progress, and will be with the next: {error:#}");
                        }
                        failing = true;
                    }
                }
            }
        });
        Self { progress, task }
    }

    /// Tells this soon, unless something newer comes before.
    pub fn tell(&self, progress: Progress) {
        self.progress.send_replace(progress);
    }

    /// Tells the last progress and ends.
    pub async fn finish(self) {
        drop(self.progress);
        // It panics nowhere; what could not be told is logged.
        let _ = self.task.await;
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use rustls::{
        ServerConfig,
        pki_types::{PrivateKeyDer, PrivatePkcs8KeyDer},
    };
    use tokio::{
        io::{AsyncReadExt, AsyncWriteExt},
        net::TcpListener,
    };
    use tokio_rustls::TlsAcceptor;

    use super::*;

    /// Answers two requests over TLS, and returns their texts.
    async fn two_requests(listener: TcpListener, tls: TlsAcceptor) -> Vec<String> {
        let mut requests = Vec::new();
        for _ in 0..2 {
            let mut stream = tls.accept(listener.accept().await.unwrap().0).await.unwrap();
            let mut request = Vec::new();
            while !request.ends_with(b"}}") {
                assert!(stream.read_buf(&mut request).await.unwrap() > 0, "a whole request");
            }
            stream
                .write_all(b"HTTP/1.1 200 OK\r\ncontent-length: 0\r\nconnection: close\r\n\r\n")
                .await
                .unwrap();
            stream.shutdown().await.unwrap();
            requests.push(String::from_utf8(request).unwrap());
        }
        requests
    }

    #[tokio::test]
    async fn progress_is_told_over_tls_with_the_token_of_the_moment() {
        let made = rcgen::generate_simple_self_signed(vec!["localhost".to_owned()]).unwrap();
        let key = PrivateKeyDer::from(PrivatePkcs8KeyDer::from(made.signing_key.serialize_der()));
        let tls = ServerConfig::builder_with_provider(Arc::new(rustls::crypto::ring::default_provider()))
            .with_safe_default_protocol_versions()
            .unwrap()
            .with_no_client_auth()
            .with_single_cert(vec![made.cert.der().clone()], key)
            .unwrap();
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let port = listener.local_addr().unwrap().port();
        let folder = tempfile::tempdir().unwrap();
        let (token, authority) = (folder.path().join("token"), folder.path().join("ca.crt"));
        std::fs::write(&authority, made.cert.pem()).unwrap();
        let url = format!("https://localhost:{port}/apis/status");
        let server = Server::new(url, token.clone(), &authority).unwrap();
        let answering = tokio::spawn(two_requests(listener, TlsAcceptor::from(Arc::new(tls))));
        std::fs::write(&token, "first\n").unwrap();
        server.tell(&Progress { iteration: 1, iterations: 4, ..Progress::default() }).await.unwrap();
        std::fs::write(&token, "second\n").unwrap();
        let teller = Teller::telling(server);
        // Of what comes at once the newest is told; nothing comes after the last.
        for iteration in [1, 2, 4] {
            teller.tell(Progress { iteration, iterations: 4, done: iteration == 4, ..Progress::default() });
        }
        teller.finish().await;
        let requests = answering.await.unwrap();
        for (request, (token, percentage)) in requests.iter().zip([("first", 25), ("second", 100)]) {
            let (head, body) = request.split_once("\r\n\r\n").unwrap();
            let (request, body) =
                (head.to_lowercase() + "\r\n", serde_json::from_str::<Value>(body).unwrap());
            assert_eq!(body["trainerStatus"]["progressPercentage"], percentage);
            assert!(request.starts_with("post /apis/status http/1.1\r\n"), "{request}");
            assert!(request.contains(&format!("authorization: bearer {token}\r\n")), "{request}");
        }
    }

    #[test]
    fn a_message_has_whole_numbers_and_text() {
        let progress = Progress {
            iteration: 333,
            iterations: 1000,
            done: false,
            remaining_seconds: Some(12.7),
            metrics: vec![("generator_loss", 0.5), ("fid", f64::NAN)],
        };
        let status = &progress.body()["trainerStatus"];
        assert_eq!(status["progressPercentage"], 33);
        assert_eq!(status["estimatedRemainingSeconds"], 12);
        assert_eq!(status["metrics"], json!([{ "name": "generator_loss", "value": "0.500000" }]));
        assert!(chrono::DateTime::parse_from_rfc3339(status["lastUpdatedTime"].as_str().unwrap()).is_ok());
        let almost = Progress { iteration: 1000, ..progress };
        assert_eq!(almost.body()["trainerStatus"]["progressPercentage"], 99);
        assert_eq!(Progress { done: true, ..almost }.body()["trainerStatus"]["progressPercentage"], 100);
        assert!(Progress::default().body()["trainerStatus"].get("estimatedRemainingSeconds").is_none());
    }
}
