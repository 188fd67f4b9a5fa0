//! A run's numbers for MLflow, by its REST API (2.0), where the environment names a tracking server as MLflow's own client reads it:
//! `MLFLOW_TRACKING_URI`, `MLFLOW_EXPERIMENT_ID` or `MLFLOW_EXPERIMENT_NAME`, `MLFLOW_TRACKING_TOKEN`, or
//! `MLFLOW_TRACKING_USERNAME` and `MLFLOW_TRACKING_PASSWORD`.
//!
//! A run of Potstill is one run of MLflow, also after a resume: its tag says which. `metrics.jsonl` stays the source.

use std::{env, time::Duration};

use anyhow::{Context, bail, ensure};
use potstill_core::observation::Outcome;
use reqwest::StatusCode;
use serde_json::{Value, json};
use tokio::{
    sync::mpsc::{UnboundedReceiver, UnboundedSender, unbounded_channel},
    task::JoinHandle,
};
use tracing::{info, warn};

use super::{metrics::Row, scalars, unix_time};

/// The timeout of a request.
const PATIENCE: Duration = Duration::from_secs(10);
/// The pause before a request is sent again.
const PAUSE: Duration = Duration::from_secs(5);
/// The API's limits on one `runs/log-batch`.
const METRICS: usize = 1000;
const PARAMETERS: usize = 100;
/// Characters of a parameter that every version keeps.
const CHARACTERS: usize = 500;
/// The tag that names a run of Potstill.
const TAG: &str = "potstill.run";

/// The tracking server.
struct Server {
    url: String,
    client: reqwest::Client,
    token: Option<String>,
    user: Option<(String, String)>,
    experiment: Experiment,
}

enum Experiment {
    Id(String),
    Name(String),
}

fn set(name: &str) -> Option<String> {
    env::var(name).ok().filter(|value| !value.is_empty())
}

impl Server {
    /// The one that the environment names.
    fn from_environment() -> anyhow::Result<Option<Self>> {
        let Some(url) = set("MLFLOW_TRACKING_URI") else { return Ok(None) };
        let experiment = match (set("MLFLOW_EXPERIMENT_ID"), set("MLFLOW_EXPERIMENT_NAME")) {
            (Some(id), _) => Experiment::Id(id),
            (None, Some(name)) => Experiment::Name(name),
            // MLflow's own, which always exists.
            (None, None) => Experiment::Id("0".to_owned()),
        };
        let user = set("MLFLOW_TRACKING_USERNAME")
            .map(|user| (user, set("MLFLOW_TRACKING_PASSWORD").unwrap_or_default()));
        Self::new(&url, set("MLFLOW_TRACKING_TOKEN"), user, experiment).map(Some)
    }

    fn new(
        url: &str,
        token: Option<String>,
        user: Option<(String, String)>,
        experiment: Experiment,
    ) -> anyhow::Result<Self> {
        ensure!(
            url.starts_with("http://") || url.starts_with("https://"),
            "MLFLOW_TRACKING_URI is not the http:// or https:// address of a tracking server"
        );
        // The client uses the process's TLS; an error means that the storage has installed it already.
        let _ = rustls::crypto::ring::default_provider().install_default();
        let client = reqwest::Client::builder().timeout(PATIENCE).build()?;
        Ok(Self { url: url.trim_end_matches('/').to_owned(), client, token, user, experiment })
    }

    /// The answer to a request; `None` where what it names does not exist.
    async fn call(&self, what: &str, body: Option<Value>) -> anyhow::Result<Option<Value>> {
        let url = format!("{}/api/2.0/mlflow/{what}", self.url);
        let request = match body {
            Some(body) => {
                let request = self.client.post(&url).header("content-type", "application/json");
                request.body(body.to_string())
            }
            None => self.client.get(&url),
        };
        let request = match (&self.token, &self.user) {
            (Some(token), _) => request.bearer_auth(token),
            (None, Some((user, password))) => request.basic_auth(user, Some(password)),
            (None, None) => request,
        };
        let answer = request.send().await.map_err(reqwest::Error::without_url)?;
        let (status, text) = (answer.status(), answer.text().await.unwrap_or_default());
        if status == StatusCode::NOT_FOUND {
            return Ok(None);
        }
        ensure!(status.is_success(), "{what}: {status}: {}", text.chars().take(300).collect::<String>());
        Ok(Some(serde_json::from_str(&text).with_context(|| format!("{what}: the answer is not JSON"))?))
    }

    async fn send(&self, what: &str, body: Value) -> anyhow::Result<Value> {
        match self.call(what, Some(body)).await? {
            Some(answer) => Ok(answer),
            None => bail!("{what}: 404: not there, or this is not a tracking server"),
        }
    }

    /// The id of the experiment, which is made if it is not there.
    async fn experiment(&self) -> anyhow::Result<String> {
        let name = match &self.experiment {
            Experiment::Id(id) => return Ok(id.clone()),
            Experiment::Name(name) => name,
        };
        let query: String = url::form_urlencoded::byte_serialize(name.as_bytes()).collect();
        let what = format!("experiments/get-by-name?experiment_name={query}");
        if let Some(found) = self.call(&what, None).await? {
            return text(&found["experiment"]["experiment_id"]);
        }
        text(&self.send("experiments/create", json!({ "name": name })).await?["experiment_id"])
    }

    /// The id of MLflow's run for this one: the one that is there already, or a new one.
    async fn run(&self, about: &About) -> anyhow::Result<String> {
        let experiment = self.experiment().await?;
        let filter = format!("tags.`{TAG}` = '{}'", about.place);
        let search = json!({ "experiment_ids": [experiment], "filter": filter, "max_results": 1 });
        let found = self.send("runs/search", search).await?;
        let found = &found["runs"][0];
        let id = match found.is_null() {
            false => {
                let id = text(&found["info"]["run_id"])?;
                self.send("runs/update", json!({ "run_id": id, "status": "RUNNING" })).await?;
                id
            }
            true => {
                let tags = json!([{ "key": TAG, "value": about.place }]);
                let made = json!({
                    "experiment_id": experiment, "run_name": about.name, "start_time": millis(), "tags": tags,
                });
                text(&self.send("runs/create", made).await?["run"]["info"]["run_id"])?
            }
        };
        // What a run was started with is not changed; it may not have arrived.
        if found["data"]["params"].as_array().is_some_and(|params| !params.is_empty()) {
            return Ok(id);
        }
        for parameters in about.parameters.chunks(PARAMETERS) {
            let params: Vec<_> =
                parameters.iter().map(|(key, value)| json!({ "key": key, "value": value })).collect();
            self.send("runs/log-batch", json!({ "run_id": id, "params": params })).await?;
        }
        Ok(id)
    }
}

fn text(value: &Value) -> anyhow::Result<String> {
    Ok(value.as_str().context("the answer has no id")?.to_owned())
}

fn millis() -> i64 {
    (unix_time::now() * 1000.0) as i64
}

/// What MLflow is told of a run once.
struct About {
    /// Its name.
    name: String,
    /// Its folder in the storage, without quotes, which the filter of a search cannot hold.
    place: String,
    /// Its specification: dotted keys and values.
    parameters: Vec<(String, String)>,
}

/// Keys and values of a specification, flat.
fn parameters(specification: &str) -> Vec<(String, String)> {
    fn add(found: &mut Vec<(String, String)>, key: &str, value: &toml::Value) {
        match value {
            toml::Value::Table(table) => {
                for (name, value) in table {
                    let key = if key.is_empty() { name.clone() } else { format!("{key}.{name}") };
                    add(found, &key, value);
                }
            }
            other => {
                let text = other.as_str().map_or_else(|| other.to_string(), str::to_owned);
                found.push((key.to_owned(), text.chars().take(CHARACTERS).collect()));
            }
        }
    }
    let mut found = vec![];
    if let Ok(table) = toml::from_str::<toml::Table>(specification) {
        add(&mut found, "", &toml::Value::Table(table));
    }
    found
}

enum News {
    Metrics(Vec<Value>),
    Ended(&'static str),
}

/// Tells MLflow about a run in the background.
pub struct Tracker {
    news: UnboundedSender<News>,
    task: JoinHandle<()>,
}

impl Tracker {
    /// Starts where the environment names a server; one that cannot be used is logged, and told nothing. `place` is the run's
    /// folder.
    #[must_use]
    pub fn start(name: &str, place: &str, specification: &str) -> Option<Self> {
        let server = Server::from_environment()
            .inspect_err(|error| warn!("MLflow is told nothing: {error:#}"))
            .ok()??;
        info!("MLflow is told this run's numbers");
        let (name, place) = (name.to_owned(), place.replace('\'', ""));
        Some(Self::telling(server, About { name, place, parameters: parameters(specification) }))
    }

    fn telling(server: Server, about: About) -> Self {
        let (news, told) = unbounded_channel();
        Self { news, task: tokio::spawn(tell(server, about, told)) }
    }

    /// Tells a row of metrics.
    pub fn row(&self, row: &Row) {
        let (iteration, _, numbers) = scalars::of(row);
        let metric = |(key, value): (String, f64)| json!({ "key": key, "value": value, "timestamp": millis(), "step": iteration });
        let finite = numbers.into_iter().filter(|(_, value)| value.is_finite());
        // An error means that the task has ended, which happens only at the end.
        let _ = self.news.send(News::Metrics(finite.map(metric).collect()));
    }

    /// Tells the end, unless another coordinator has the run, and waits until everything is told, at most for the time of a
    /// request.
    pub async fn finish(self, outcome: Option<&Outcome>) {
        let status = outcome.map(|outcome| match outcome {
            Outcome::Succeeded { .. } => "FINISHED",
            Outcome::Stopped { .. } => "KILLED",
            Outcome::Failed { .. } => "FAILED",
        });
        if let Some(status) = status {
            let _ = self.news.send(News::Ended(status));
        }
        drop(self.news);
        if tokio::time::timeout(PATIENCE, self.task).await.is_err() {
            warn!("MLflow was not told everything before the end");
        }
    }
}

/// Sends everything, in order; what fails is sent again.
async fn tell(server: Server, about: About, mut news: UnboundedReceiver<News>) {
    let mut failing = false;
    let mut run = None;
    let mut pending = Vec::new();
    let mut open = true;
    while open || !pending.is_empty() {
        if pending.is_empty() {
            open = news.recv_many(&mut pending, METRICS).await > 0;
            continue;
        }
        match send(&server, &about, &mut run, &mut pending).await {
            Ok(()) => failing = false,
            Err(error) => {
                if !failing {
                    warn!("MLflow was not told the newest numbers, and will be later: {error:#}");
                }
                failing = true;
                tokio::time::sleep(PAUSE).await;
            }
        }
    }
}

/// Sends what is pending, and takes away what was sent.
async fn send(
    server: &Server,
    about: &About,
    run: &mut Option<String>,
    pending: &mut Vec<News>,
) -> anyhow::Result<()> {
    let id = match run {
        Some(id) => id.clone(),
        None => run.insert(server.run(about).await?).clone(),
    };
    while let Some(first) = pending.first() {
        let sent = match first {
            News::Ended(status) => {
                let ended = json!({ "run_id": id, "status": status, "end_time": millis() });
                server.send("runs/update", ended).await?;
                1
            }
            News::Metrics(_) => {
                let (mut metrics, mut rows) = (vec![], 0);
                for news in pending.iter() {
                    match news {
                        News::Metrics(more) if rows == 0 || metrics.len() + more.len() <= METRICS => {
                            metrics.extend(more.iter().cloned());
                            rows += 1;
                        }
                        _ => break,
                    }
                }
                server.send("runs/log-batch", json!({ "run_id": id, "metrics": metrics })).await?;
                rows
            }
        };
        pending.drain(..sent);
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::sync::{Arc, Mutex};

    use axum::{Router, extract::State, http::Uri};
    use potstill_proto::scores::Subject;

    use super::*;
    use crate::monitor::{
        fixtures::{evaluation, spec, totals},
        metrics::Metrics,
    };

    type Requests = Arc<Mutex<Vec<(String, Value)>>>;

    /// A tracking server that knows one run, once that is made, and answers the first batch of metrics with an error.
    async fn answer(State(requests): State<Requests>, uri: Uri, body: String) -> (StatusCode, String) {
        let what = uri.path().trim_start_matches("/api/2.0/mlflow/").to_owned();
        let asked: Value = serde_json::from_str(&body).unwrap_or_default();
        let mut requests = requests.lock().unwrap();
        let made = requests.iter().any(|(what, _)| what == "runs/create");
        let batches = requests.iter().filter(|(_, asked)| asked["metrics"].is_array()).count();
        let fails = asked["metrics"].is_array() && batches == 0;
        let answer = match what.as_str() {
            "experiments/get-by-name" => return (StatusCode::NOT_FOUND, "{}".to_owned()),
            "experiments/create" => json!({ "experiment_id": "7" }),
            "runs/search" if made => json!({ "runs": [{ "info": { "run_id": "r1" } }] }),
            "runs/create" => json!({ "run": { "info": { "run_id": "r1" } } }),
            _ => json!({}),
        };
        requests.push((what, asked));
        let status = if fails { StatusCode::SERVICE_UNAVAILABLE } else { StatusCode::OK };
        (status, answer.to_string())
    }

    async fn serve() -> (String, Requests) {
        let requests = Requests::default();
        let router = Router::new().fallback(answer).with_state(Arc::clone(&requests));
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let url = format!("http://{}", listener.local_addr().unwrap());
        tokio::spawn(async move { axum::serve(listener, router).await });
        (url, requests)
    }

    fn tracker(url: &str) -> Tracker {
        let server = Server::new(url, None, None, Experiment::Name("sid runs".to_owned())).unwrap();
        let specification = spec(40).to_toml().unwrap();
        let about = About {
            name: "r".to_owned(),
            place: "/data/runs/r".to_owned(),
            parameters: parameters(&specification),
        };
        Tracker::telling(server, about)
    }

    #[tokio::test]
    async fn a_run_is_one_run_of_mlflow_also_when_it_is_resumed() {
        let (url, requests) = serve().await;
        let mut metrics = Metrics::new(&spec(40));
        let first = tracker(&url);
        first.row(&Row::Evaluation(metrics.evaluation(&evaluation(Subject::Teacher, 0, 3.0), 0.5)));
        for iteration in 0..10 {
            if let Some(row) = metrics.iteration(totals(iteration), 1.0) {
                first.row(&Row::Iteration(row.clone()));
            }
        }
        tokio::time::pause();
        first.finish(Some(&Outcome::Failed { reason: "power".to_owned() })).await;
        let second = tracker(&url);
        second.row(&Row::Evaluation(metrics.evaluation(&evaluation(Subject::Student, 10, 5.0), 2.0)));
        second.finish(Some(&Outcome::Succeeded { iteration: 40 })).await;
        // Another coordinator has the run: what it says of the end counts.
        tracker(&url).finish(None).await;

        let requests = requests.lock().unwrap();
        let of = |what: &str| -> Vec<&Value> {
            requests.iter().filter(|(name, _)| name == what).map(|(_, asked)| asked).collect()
        };
        assert_eq!(of("experiments/create")[0]["name"], "sid runs");
        assert_eq!(of("runs/create").len(), 1);
        assert_eq!(of("runs/create")[0]["tags"][0], json!({ "key": TAG, "value": "/data/runs/r" }));
        assert_eq!(of("runs/search")[1]["filter"], "tags.`potstill.run` = '/data/runs/r'");
        let batches = of("runs/log-batch");
        let parameters: Vec<&Value> =
            batches.iter().filter_map(|batch| batch["params"].as_array()).flatten().collect();
        let iterations = json!({ "key": "distillation.iterations", "value": "40" });
        assert!(parameters.contains(&&iterations), "{parameters:?}");
        let told: Vec<&Value> =
            batches.iter().filter_map(|batch| batch["metrics"].as_array()).flatten().collect();
        // The first batch was answered with an error, and came again.
        let number = |key: &str, step: u64| {
            let of_key = told.iter().filter(|metric| metric["key"] == key && metric["step"] == step);
            of_key.map(|metric| metric["value"].as_f64().unwrap()).collect::<Vec<_>>()
        };
        assert_eq!(number("teacher/fid", 0), [3.0, 3.0]);
        assert_eq!(number("student/fid", 10), [5.0]);
        assert_eq!(number("loss/generator", 10).len(), 2);
        let ends: Vec<&Value> = of("runs/update").iter().map(|update| &update["status"]).collect();
        assert_eq!(ends, ["FAILED", "RUNNING", "FINISHED"]);
    }

    #[test]
    fn what_is_no_server_is_named() {
        let experiment = || Experiment::Id("0".to_owned());
        let refused = |url: &str| Server::new(url, None, None, experiment()).err().map(|e| e.to_string());
        assert!(refused("file:///mlruns").unwrap().contains("MLFLOW_TRACKING_URI"));
        assert!(refused("databricks").is_some());
        assert!(refused("https://mlflow.example.org/").is_none());
    }
}
