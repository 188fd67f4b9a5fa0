//! The run's page and its numbers for Prometheus, over HTTP: what the coordinator shows to a browser, for those who may see the status.
//!
//! `page.html`, `page.css` and `page.js` are the page, which needs nothing from elsewhere; what it shows comes from the monitor.
//!
//! On a loopback address it is served without TLS, since browsers accept no certificate there that no authority has signed; elsewhere
//! with the coordinator's. A browser shows the token once in the address (`/?token=…`) and keeps it as a cookie; other clients send it
//! as `authorization: Bearer …`.

use std::{collections::BTreeSet, convert::Infallible, io, net::SocketAddr, sync::Arc, time::Duration};

use axum::{
    Router,
    extract::{ConnectInfo, Path, Query, Request, State, connect_info::Connected},
    http::{HeaderMap, HeaderValue, StatusCode, header},
    middleware::{self, Next},
    response::{
        IntoResponse, Redirect, Response,
        sse::{self, KeepAlive, Sse},
    },
    routing::get,
    serve::{IncomingStream, Listener},
};
use futures::{Stream, StreamExt, stream};
use potstill_access::{JoinKey, bearer};
use potstill_proto::wire::StatusReply;
use potstill_server::{
    Asking, Running, Security,
    address::advertised,
    listener::{self, Connection, Peer},
};
use potstill_storage::{
    Run,
    layout::{self, PICTURES},
};
use serde::Deserialize;
use tokio::{
    net::{TcpListener, TcpSocket},
    sync::{broadcast, mpsc},
    task::JoinSet,
    time::MissedTickBehavior,
};
use tracing::warn;

use crate::{
    monitor::{
        feed::{Feed, Message, Saved},
        prometheus::{self, Prometheus},
    },
    status::RunStatus,
};

/// Connections that may wait to be accepted.
const BACKLOG: u32 = 64;
/// Connections at a time: readers, and what collects the metrics.
const CONNECTIONS: usize = 256;
/// How often a page is told the status, and how often even if it has not changed.
const STATUS: Duration = Duration::from_secs(1);
const REPEAT: u32 = 10;
/// How often the storage is asked for pictures and checkpoints, while a page is open.
const STORED: Duration = Duration::from_secs(10);
/// Members on the page.
const MEMBERS: usize = 1000;
/// How long pages have to receive the run's end.
const FAREWELL: Duration = Duration::from_secs(2);
/// The page loads what it comes with, and nothing else.
const POLICY: &str = "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; \
     base-uri 'none'; form-action 'none'; frame-ancestors 'none'";

/// An address on which the page will be served.
pub struct Bound {
    listener: TcpListener,
    /// As others reach it: `http://host:port/`.
    pub url: String,
    tls: bool,
}

/// Takes the address.
///
/// # Errors
/// It is taken already, or is none of this machine.
pub fn bind(address: SocketAddr, security: &Security) -> io::Result<Bound> {
    let socket = if address.is_ipv4() { TcpSocket::new_v4()? } else { TcpSocket::new_v6()? };
    socket.set_reuseaddr(true)?;
    socket.bind(address)?;
    let listener = socket.listen(BACKLOG)?;
    let address = listener.local_addr()?;
    let tls = !address.ip().is_loopback() && *security != Security::Insecure;
    let scheme = if tls { "https" } else { "http" };
    Ok(Bound { listener, url: format!("{scheme}://{}/", advertised(address)), tls })
}

/// What the requests are answered from.
struct Shared {
    run: Run,
    feed: Arc<Feed>,
    prometheus: Arc<Prometheus>,
    asking: Asking,
    key: Option<JoinKey>,
    secure: bool,
}

/// A page that is being served. Dropping it ends it at once.
pub struct Web {
    shared: Arc<Shared>,
    tasks: JoinSet<()>,
}

impl Bound {
    /// Serves the page of a run that `running` coordinates.
    #[must_use]
    pub fn serve(self, run: Run, feed: Arc<Feed>, prometheus: Arc<Prometheus>, running: &Running) -> Web {
        let tls = running.tls.as_ref().filter(|_| self.tls).map(|tls| {
            let mut tls = rustls::ServerConfig::clone(tls);
            tls.alpn_protocols = vec![b"http/1.1".to_vec()];
            Arc::new(tls)
        });
        let shared = Arc::new(Shared {
            run,
            feed,
            prometheus,
            asking: running.asking(),
            key: running.join_key.clone(),
            secure: tls.is_some(),
        });
        let (accepted, connections) = mpsc::channel(1);
        let (address, answering) = (running.address, Arc::clone(&shared));
        let mut tasks = JoinSet::new();
        tasks.spawn(listener::accept(self.listener, tls, accepted, CONNECTIONS));
        tasks.spawn(keep_current(Arc::clone(&shared)));
        tasks.spawn(async move {
            let service = router(answering).into_make_service_with_connect_info::<Visitor>();
            if let Err(error) = axum::serve(Accepted { connections, address }, service).await {
                warn!(%error, "the page is no longer served");
            }
        });
        Web { shared, tasks }
    }
}

impl Web {
    /// Tells the pages that the run is over, and stops.
    pub async fn end(mut self) {
        // Their streams end with the last message; what is slow is left.
        let told = async {
            if self.shared.feed.is_read() {
                refresh_stored(&self.shared).await;
            }
            self.shared.feed.end();
            while self.shared.feed.is_read() {
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
        };
        let _ = tokio::time::timeout(FAREWELL, told).await;
        self.tasks.shutdown().await;
    }
}

/// The connections that the listener has accepted.
struct Accepted {
    connections: mpsc::Receiver<io::Result<Connection>>,
    address: SocketAddr,
}

impl Listener for Accepted {
    type Io = Connection;
    type Addr = SocketAddr;

    async fn accept(&mut self) -> (Connection, SocketAddr) {
        loop {
            match self.connections.recv().await {
                Some(Ok(connection)) => {
                    let address = connection.peer().address;
                    return (connection, address);
                }
                Some(Err(error)) => warn!(%error, "a connection to the page failed"),
                None => std::future::pending().await,
            }
        }
    }

    fn local_addr(&self) -> io::Result<SocketAddr> {
        Ok(self.address)
    }
}

/// What a request knows of its connection.
#[derive(Clone)]
struct Visitor(Peer);

impl Connected<IncomingStream<'_, Accepted>> for Visitor {
    fn connect_info(stream: IncomingStream<'_, Accepted>) -> Self {
        Self(stream.io().peer())
    }
}

fn router(shared: Arc<Shared>) -> Router {
    let fixed = |kind: &'static str, text: &'static str| {
        get(move || async move { ([(header::CONTENT_TYPE, kind)], text) })
    };
    Router::new()
        .route("/", get(page))
        .route("/page.css", fixed("text/css; charset=utf-8", include_str!("page.css")))
        .route("/page.js", fixed("text/javascript; charset=utf-8", include_str!("page.js")))
        .route("/favicon.ico", get(|| async { StatusCode::NO_CONTENT }))
        .route("/stream", get(stream_of))
        .route("/pictures/{name}", get(picture))
        .route("/metrics", get(metrics))
        .layer(middleware::from_fn_with_state(Arc::clone(&shared), guarded))
        .with_state(shared)
}

/// The name of the cookie: cookies do not tell ports apart, and there may be a page of another run.
fn cookie(run: &Run) -> String {
    format!("potstill-{}", run.id())
}

#[derive(Deserialize)]
struct Shown {
    token: Option<String>,
}

/// Lets a request in that shows a token, and sets the headers of every answer.
async fn guarded(
    State(shared): State<Arc<Shared>>,
    ConnectInfo(Visitor(peer)): ConnectInfo<Visitor>,
    Query(shown): Query<Shown>,
    request: Request,
    next: Next,
) -> Response {
    let name = cookie(&shared.run);
    let known = |token: &str| shared.key.as_ref().is_none_or(|key| key.role_of(token).is_some());
    let mut answer = match shown.token {
        Some(token) if known(&token) => {
            peer.let_in();
            let secure = if shared.secure { "; Secure" } else { "" };
            let kept = format!("{name}={token}; Path=/; HttpOnly; SameSite=Strict{secure}");
            // Out of the address, so that it is in no history and in no picture of the screen.
            match HeaderValue::from_str(&kept) {
                Ok(kept) => ([(header::SET_COOKIE, kept)], Redirect::to("/")).into_response(),
                Err(_) => StatusCode::BAD_REQUEST.into_response(),
            }
        }
        None if shared.key.is_none() || token(request.headers(), &name).is_some_and(known) => {
            peer.let_in();
            next.run(request).await
        }
        _ => {
            let text = format!(
                "This page needs a token of the run: `potstill page {}` prints the address that has it.\n\
                 Programs send it as \"authorization: Bearer TOKEN\".\n",
                shared.run.id()
            );
            (StatusCode::UNAUTHORIZED, [(header::WWW_AUTHENTICATE, "Bearer")], text).into_response()
        }
    };
    let headers = answer.headers_mut();
    headers.insert(header::CONTENT_SECURITY_POLICY, HeaderValue::from_static(POLICY));
    headers.insert(header::X_CONTENT_TYPE_OPTIONS, HeaderValue::from_static("nosniff"));
    headers.insert(header::REFERRER_POLICY, HeaderValue::from_static("no-referrer"));
    // A picture is replaced where training has gone back.
    headers.insert(header::CACHE_CONTROL, HeaderValue::from_static("no-store"));
    answer
}

/// The token of a request.
fn token<'a>(headers: &'a HeaderMap, cookie: &str) -> Option<&'a str> {
    let text = |name: header::HeaderName| headers.get_all(name).into_iter().filter_map(|v| v.to_str().ok());
    if let Some(token) = text(header::AUTHORIZATION).find_map(bearer) {
        return Some(token);
    }
    let cookies = text(header::COOKIE).flat_map(|cookies| cookies.split(';'));
    cookies.filter_map(|pair| pair.trim().split_once('=')).find(|(name, _)| *name == cookie).map(|(_, v)| v)
}

async fn page() -> Response {
    ([(header::CONTENT_TYPE, "text/html; charset=utf-8")], include_str!("page.html")).into_response()
}

async fn picture(State(shared): State<Arc<Shared>>, Path(name): Path<String>) -> Response {
    let Some(iteration) = name.strip_suffix(".png").and_then(|number| number.parse().ok()) else {
        return StatusCode::NOT_FOUND.into_response();
    };
    match shared.run.get(&layout::picture_key(iteration)).await {
        Ok(Some(png)) => ([(header::CONTENT_TYPE, "image/png")], png).into_response(),
        Ok(None) => StatusCode::NOT_FOUND.into_response(),
        Err(error) => (StatusCode::BAD_GATEWAY, error.to_string()).into_response(),
    }
}

async fn metrics(State(shared): State<Arc<Shared>>) -> Response {
    let Some(status) = shared.asking.status(0).await else {
        return StatusCode::SERVICE_UNAVAILABLE.into_response();
    };
    match shared.prometheus.text(&status, shared.feed.readers()) {
        Ok(text) => ([(header::CONTENT_TYPE, prometheus::MEDIA_TYPE)], text).into_response(),
        Err(error) => (StatusCode::INTERNAL_SERVER_ERROR, error.to_string()).into_response(),
    }
}

async fn stream_of(State(shared): State<Arc<Shared>>) -> Response {
    refresh_status(&shared, false).await;
    refresh_stored(&shared).await;
    let (first, messages) = shared.feed.subscribe();
    let events = stream::iter(first).chain(following(messages)).map(|message| {
        let event = sse::Event::default().event(message.name).data(&*message.data);
        Ok::<_, Infallible>(event)
    });
    Sse::new(events).keep_alive(KeepAlive::default()).into_response()
}

/// The messages until the run has ended, or until the reader is too far behind: it comes again, for a new snapshot.
fn following(messages: Option<broadcast::Receiver<Message>>) -> impl Stream<Item = Message> {
    stream::unfold(messages, async |messages| {
        let mut messages = messages?;
        let message = messages.recv().await.ok()?;
        let more = (message.name != "end").then_some(messages);
        Some((message, more))
    })
}

/// Tells open pages what changes without an observation.
async fn keep_current(shared: Arc<Shared>) {
    let mut statuses = tokio::time::interval(STATUS);
    let mut stored = tokio::time::interval(STORED);
    statuses.set_missed_tick_behavior(MissedTickBehavior::Delay);
    stored.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let mut count = 0_u32;
    loop {
        tokio::select! {
            _ = statuses.tick() => if shared.feed.is_read() {
                count = count.wrapping_add(1);
                refresh_status(&shared, count.is_multiple_of(REPEAT)).await;
            },
            _ = stored.tick() => if shared.feed.is_read() {
                refresh_stored(&shared).await;
            },
        }
    }
}

async fn refresh_status(shared: &Shared, repeat: bool) {
    let Some(mut status) = shared.asking.status(0).await else { return };
    while status.members.len() < MEMBERS.min(status.member_count as usize) {
        let Some(StatusReply { members, .. }) = shared.asking.status(status.members.len() as u32).await
        else {
            return;
        };
        if members.is_empty() {
            break;
        }
        status.members.extend(members);
    }
    status.members.sort_by_key(|member| (member.rank.is_none(), member.rank));
    let members = status.member_count;
    shared.feed.status(&RunStatus::from(status), members, repeat);
}

async fn refresh_stored(shared: &Shared) {
    let run = &shared.run;
    let listed = async {
        let pictures = run.list(PICTURES).await?;
        let pictures: BTreeSet<_> =
            pictures.into_iter().filter_map(|(key, _)| layout::picture_iteration(&key)).collect();
        let left = run.checkpoints().await?;
        let mut read = Vec::new();
        for iteration in shared.feed.unknown(&left) {
            // It may have been removed since.
            if let Ok(manifest) = run.manifest(&layout::manifest_key(iteration)).await {
                let bytes = manifest.shards.iter().map(|shard| shard.bytes).sum();
                read.push(Saved { iteration, bytes, time: None });
            }
        }
        Ok::<_, potstill_storage::Error>((left, read, pictures))
    };
    match listed.await {
        Ok((left, read, pictures)) => shared.feed.stored(&left, read, pictures),
        Err(error) => warn!(%error, "the page's pictures and checkpoints may be out of date"),
    }
}
