//! Tests what a run shows while it trains: its page, to a real browser and to strangers, `/metrics`, and what Kubeflow is told.

#![allow(clippy::unwrap_used, reason = "a test may panic")]

use std::{
    collections::BTreeSet,
    fs,
    io::{Read, Write},
    net::TcpStream,
    path::Path,
    process::{Command, Stdio},
    time::Duration,
};

use nix::sys::signal::Signal;
use potstill_tests::{Cluster, Process, browser, lacks, repository, text, worker_pid};

/// The most that an answer may take.
const PATIENCE: Duration = Duration::from_secs(60);

/// An HTTP answer.
struct Answer {
    status: u16,
    head: String,
    body: String,
}

/// One request; `headers` end with a line break each. A stream is read up to its end.
fn get(host: &str, path: &str, headers: &str) -> Answer {
    let mut stream = TcpStream::connect(host).unwrap();
    stream.set_read_timeout(Some(PATIENCE)).unwrap();
    write!(stream, "GET {path} HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n{headers}\r\n").unwrap();
    let mut bytes = Vec::new();
    stream.read_to_end(&mut bytes).unwrap();
    let answer = String::from_utf8_lossy(&bytes).into_owned();
    let (head, body) = answer.split_once("\r\n\r\n").expect("a whole answer");
    let status = head.split(' ').nth(1).unwrap().parse().unwrap();
    Answer { status, head: head.to_lowercase(), body: body.to_owned() }
}

/// A run that goes on until it is asked to stop, and the host and token of its page.
struct Shown {
    launch: Process,
    host: String,
    token: String,
}

fn start(cluster: &Cluster, run: &str) -> Shown {
    let sets = ["distillation.iterations=1000000", "evaluation.every=10", "checkpoint.every=10"];
    let mut launch = Process::start(cluster.launch(run, 2, &sets, &[]));
    launch.until(&["checkpoint committed", "iteration=10"]);
    shown(cluster, run, launch)
}

fn shown(cluster: &Cluster, run: &str, launch: Process) -> Shown {
    let output = cluster.about("page", run).output().unwrap();
    let address = text(&output.stdout);
    let (host, token) =
        address.trim().strip_prefix("http://").and_then(|rest| rest.split_once("/?token=")).expect(&address);
    assert!(token.starts_with("viewer."), "{token}");
    Shown { launch, host: host.to_owned(), token: token.to_owned() }
}

impl Shown {
    fn with_token(&self, path: &str) -> Answer {
        get(&self.host, path, &format!("Authorization: Bearer {}\r\n", self.token))
    }

    /// A metric's value, by its name and labels.
    fn metric(&self, name: &str) -> Option<f64> {
        let text = self.with_token("/metrics").body;
        text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(' ')?.parse().ok())
    }

    fn stop(self) -> String {
        self.launch.signal(Signal::SIGINT);
        let (code, said) = self.launch.end();
        assert_eq!(code, Some(75), "{said}");
        said
    }
}

#[test]
fn the_page_and_the_metrics_are_for_those_with_a_token() {
    let cluster = Cluster::default();
    let shown = start(&cluster, "shown");
    for path in ["/", "/page.js", "/stream", "/metrics", "/pictures/0.png", "/nothing"] {
        for headers in
            ["", "Authorization: Bearer viewer.00\r\n", "Cookie: potstill-shown=viewer.00; a=b\r\n"]
        {
            let refused = get(&shown.host, path, headers);
            assert_eq!(refused.status, 401, "{path}");
            assert!(refused.body.contains("potstill page shown"), "{}", refused.body);
        }
    }
    assert_eq!(get(&shown.host, "/?token=viewer.00", "").status, 401);

    // A browser keeps the token as a cookie, and the address loses it.
    let answer = get(&shown.host, &format!("/?token={}", shown.token), "");
    assert_eq!(answer.status, 303);
    assert!(answer.head.contains("location: /\r\n"), "{}", answer.head);
    assert!(answer.head.contains("httponly; samesite=strict"), "{}", answer.head);
    let cookie = format!("Cookie: other=1; potstill-shown={}\r\n", shown.token);
    let page = get(&shown.host, "/", &cookie);
    assert_eq!(page.status, 200);
    assert!(page.head.contains("content-security-policy: default-src 'none'"), "{}", page.head);
    assert_eq!(shown.with_token("/pictures/0.png").status, 200);
    assert_eq!(shown.with_token("/pictures/7.png").status, 404);
    assert_eq!(shown.with_token("/pictures/..%2Fjoin.key").status, 404);
    assert_eq!(shown.with_token("/join.key").status, 404);

    // A stream that is open at the run's end gets it; nothing of what is written contains the token.
    let (host, token) = (shown.host.clone(), shown.token.clone());
    let reader = std::thread::spawn({
        let (host, token) = (host.clone(), token.clone());
        move || get(&host, "/stream", &format!("Authorization: Bearer {token}\r\n"))
    });
    while shown.metric("potstill_page_readers") != Some(1.0) {}
    let said = shown.stop();
    assert!(!said.contains(&token), "the log has the token");
    let stream = reader.join().unwrap();
    let names: Vec<_> = stream.body.lines().filter_map(|line| line.strip_prefix("event: ")).collect();
    assert_eq!((names.first(), names.last()), (Some(&"snapshot"), Some(&"end")), "{names:?}");
    assert!(names.contains(&"checkpoint") && names.contains(&"event"), "{names:?}");
    let snapshot = stream.body.lines().find_map(|line| line.strip_prefix("data: ")).unwrap();
    let snapshot: serde_json::Value = serde_json::from_str(snapshot).unwrap();
    assert_eq!(snapshot["status"]["run"], "shown");
    assert_eq!(snapshot["status"]["members"].as_array().unwrap().len(), 2);
    assert!(snapshot["rows"].as_array().unwrap().iter().any(|row| row["kind"] == "iteration"));
    assert!(snapshot["pictures"].as_array().unwrap().iter().any(|iteration| *iteration == 10));
    assert_eq!(snapshot["checkpoints"][0]["iteration"], 10);
    assert!(snapshot["checkpoints"][0]["bytes"].as_u64().unwrap() > 0);
}

#[test]
fn a_rank_that_stays_slow_is_named_with_figures() {
    let cluster = Cluster::default();
    let mut command =
        cluster.unscored("launch", "dragged", 2, &["distillation.iterations=1000000"], &["--spares", "1"]);
    let once = cluster.storage().join("once");
    command.env("POTSTILL_FAULT", format!("drag:forward:3:1:{}", once.display()));
    let mut launch = Process::start(command);
    let line = launch.until(&["the others wait for this rank", "rank 1"]);
    let figure = |name: &str| -> f64 {
        let value = line.split(&format!("{name}=")).nth(1).and_then(|rest| rest.split_whitespace().next());
        value.and_then(|value| value.parse().ok()).unwrap_or_else(|| panic!("no {name} in {line}"))
    };
    assert!(figure("seconds") > 1.5 * figure("median"), "{line}");

    let status = cluster.about("status", "dragged").arg("--json").output().unwrap();
    let status: serde_json::Value = serde_json::from_slice(&status.stdout).unwrap();
    let named: Vec<_> =
        status["members"].as_array().unwrap().iter().filter(|it| it["straggles"] == true).collect();
    assert_eq!(named.len(), 1, "{status}");
    assert_eq!(i64::from(worker_pid(&line)), named[0]["pid"], "{status}");
    assert!(named[0]["compute_seconds"].as_f64().unwrap() > 0.0, "{status}");
    let table = text(&cluster.about("status", "dragged").output().unwrap().stdout);
    assert!(table.contains(" s, slow"), "{table}");

    let shown = shown(&cluster, "dragged", launch);
    assert_eq!(shown.metric("potstill_stragglers_total"), Some(1.0));
    // It keeps its place: the run has not asked for another.
    assert!(!shown.stop().contains("generation=2"));
}

/// What comes out is what Prometheus reads, and what the dashboard asks for comes out.
#[test]
fn the_dashboard_asks_for_metrics_that_exist() {
    let cluster = Cluster::default();
    let shown = start(&cluster, "counted");
    let answer = shown.with_token("/metrics");
    assert!(
        answer.head.contains("content-type: application/openmetrics-text; version=1.0.0"),
        "{}",
        answer.head
    );
    assert!(answer.body.ends_with("# EOF\n"), "{}", answer.body);
    let status = cluster.about("status", "counted").arg("--json").output().unwrap();
    let status: serde_json::Value = serde_json::from_slice(&status.stdout).unwrap();
    assert_eq!(status["page"], format!("http://{}/", shown.host));
    assert!(shown.metric("potstill_iterations_total").unwrap() >= 10.0);
    assert_eq!(shown.metric("potstill_images_total").unwrap() % 8.0, 0.0, "the global batch is 8");
    for (name, value) in [
        ("potstill_workers{state=\"rank\"}", 2.0),
        ("potstill_workers{state=\"standby\"}", 0.0),
        ("potstill_generations_total{reason=\"start\"}", 1.0),
        ("potstill_state{state=\"training\"}", 1.0),
        ("potstill_state{state=\"failed\"}", 0.0),
        ("potstill_storage_retries_total", 0.0),
    ] {
        assert_eq!(shown.metric(name), Some(value), "{name} in {}", answer.body);
    }
    let committed = shown.metric("potstill_checkpoint_bytes_total").unwrap();
    assert!(committed > 1e5 && shown.metric("potstill_checkpoint_commit_seconds_count").unwrap() >= 1.0);

    // A lost rank is a generation with that reason, and a recovery that took its time.
    let pid = status["members"][0]["pid"].as_i64().unwrap();
    potstill_tests::kill(i32::try_from(pid).unwrap(), Signal::SIGKILL);
    while shown.metric("potstill_recovery_seconds_count").unwrap_or(0.0) < 1.0 {}
    assert!(shown.metric("potstill_generations_total{reason=\"worker-lost\"}").unwrap() >= 1.0);

    let text = shown.with_token("/metrics").body;
    let names: BTreeSet<&str> = text
        .lines()
        .filter(|line| !line.starts_with('#'))
        .filter_map(|line| line.split([' ', '{']).next())
        .collect();
    let dashboard =
        fs::read_to_string(repository().join("scripts/monitoring/grafana-dashboard.json")).unwrap();
    let dashboard: serde_json::Value = serde_json::from_str(&dashboard).unwrap();
    let mut asked = BTreeSet::new();
    for panel in dashboard["panels"].as_array().unwrap() {
        for target in panel["targets"].as_array().into_iter().flatten() {
            let query = target["expr"].as_str().unwrap();
            let words = query.split(|c: char| !c.is_ascii_alphanumeric() && c != '_');
            asked.extend(words.filter(|word| word.starts_with("potstill_")).map(str::to_owned));
        }
    }
    assert!(asked.len() > 10, "{asked:?}");
    for name in &asked {
        assert!(names.contains(name.as_str()), "{name} is asked for and is not in {names:?}");
    }
    shown.stop();
}

#[test]
fn a_real_browser_follows_a_run_to_its_end() {
    let Some(browser) = browser() else {
        return lacks("chromium", "a_real_browser_follows_a_run_to_its_end", "no Chromium on PATH");
    };
    let cluster = Cluster::default();
    let shown = start(&cluster, "watched");
    let (profile, picture) = (tempfile::tempdir().unwrap(), cluster.storage().join("page.png"));
    let page = Command::new(browser)
        .args(["--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"])
        .args(["--disable-background-networking", "--disable-component-update", "--disable-sync"])
        // Virtual time stands still while the stream is open: the browser waits for the run's end, and draws then.
        .args(["--virtual-time-budget=2000", "--window-size=1600,1500", "--hide-scrollbars", "--dump-dom"])
        .arg(format!("--user-data-dir={}", profile.path().display()))
        .arg(format!("--screenshot={}", picture.display()))
        .arg(format!("http://{}/?token={}", shown.host, shown.token))
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    while shown.metric("potstill_page_readers") != Some(1.0) {}
    // What happens while it is open arrives.
    let reached = shown.metric("potstill_committed_iteration").unwrap();
    while shown.metric("potstill_committed_iteration").unwrap() < reached + 20.0 {}
    shown.stop();
    let output = page.wait_with_output().unwrap();
    let dom = text(&output.stdout);
    for part in [
        "id=\"state-word\">stopped<",
        "The run has ended; this page no longer updates.",
        "<path class=\"line",
        "<img alt=\"Samples of the student",
        "checkpoint of iteration",
    ] {
        assert!(dom.contains(part), "{part} is not in {dom}");
    }
    let pixels = image::open(&picture).unwrap().to_rgb8();
    let colours: BTreeSet<_> = pixels.pixels().map(|pixel| pixel.0).collect();
    assert!(colours.len() > 50, "the page is blank");
    if let Some(folder) = std::env::var_os("POTSTILL_PICTURES") {
        fs::copy(&picture, Path::new(&folder).join("page.png")).unwrap();
    }
}

#[test]
fn a_run_that_is_complete_ends_well_when_it_is_started_again() {
    let cluster = Cluster::default();
    cluster.succeed("again", 1, &["distillation.iterations=2"], &[]);
    let again = cluster.run_to_end("again", 1, &["distillation.iterations=2"], &["--resume=auto"]);
    assert_eq!(again.status.code(), Some(0), "{}", text(&again.stderr));
    assert!(text(&again.stderr).contains("already complete (2 iterations)"), "{}", text(&again.stderr));
    // Asked to continue it, there is nothing to do, and the user may have meant another run.
    let again = cluster.run_to_end("again", 1, &["distillation.iterations=2"], &["--resume"]);
    assert_eq!(again.status.code(), Some(2), "{}", text(&again.stderr));
}
