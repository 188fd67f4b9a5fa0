//! An invitation: all that is needed to connect to a coordinator.

use std::{fs, io::Write, os::unix::fs::OpenOptionsExt, path::Path, time::Duration};

use hyper_util::rt::TokioIo;
use potstill_proto::{MAX_MESSAGE_BYTES, wire::coordinator_client::CoordinatorClient};
use rustls::pki_types::ServerName;
use serde::{Deserialize, Serialize};
use tokio::{
    io::{AsyncRead, AsyncWrite},
    net::TcpStream,
    time::timeout,
};
use tokio_rustls::TlsConnector;
use tonic::{
    Request, Status,
    metadata::{Ascii, MetadataValue},
    service::{Interceptor, interceptor::InterceptedService},
    transport::{Channel, Endpoint, Uri},
};
use tower::service_fn;

use crate::{AccessError, Fingerprint};

/// Version of an invitation's format.
const VERSION: u32 = 1;

/// All that is needed to connect to a coordinator. It holds a secret, its token.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Invitation {
    version: u32,
    /// The run.
    pub run_id: String,
    /// The coordinator's `host:port`.
    pub address: String,
    /// SHA-256 of its certificate; absent where it serves without TLS.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub certificate: Option<String>,
    /// The token of one role; absent where the coordinator lets everybody in.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub token: Option<String>,
}

impl std::fmt::Debug for Invitation {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Invitation to run {} at {}", self.run_id, self.address)
    }
}

/// How long a connection waits.
#[derive(Clone, Copy, Debug)]
pub struct Patience {
    /// For the connection itself, with its handshake.
    pub connect: Duration,
    /// A connection that is silent for the first of these is probed, and given up without an answer within the second.
    pub keep_alive: Option<(Duration, Duration)>,
}

/// A connection whose calls carry a token.
pub type Authorized = InterceptedService<Channel, Bearer>;

impl Invitation {
    /// An invitation without TLS and without a token.
    #[must_use]
    pub fn insecure(run_id: &str, address: &str) -> Self {
        Self::new(run_id, address, None, None)
    }

    pub(crate) fn new(
        run_id: &str,
        address: &str,
        certificate: Option<String>,
        token: Option<String>,
    ) -> Self {
        let (run_id, address) = (run_id.to_owned(), address.to_owned());
        Self { version: VERSION, run_id, address, certificate, token }
    }

    /// An invitation to a coordinator in this process or whose secrets are known.
    #[must_use]
    pub fn to(run_id: &str, address: &str, certificate: Fingerprint, token: String) -> Self {
        Self::new(run_id, address, Some(certificate.to_string()), Some(token))
    }

    /// Reads its text. `place` is for the message.
    ///
    /// # Errors
    /// [`AccessError::Unusable`].
    pub fn parse(text: &str, place: &str) -> Result<Self, AccessError> {
        let unusable = |problem: String| AccessError::Unusable { place: place.to_owned(), problem };
        let invitation: Self =
            serde_json::from_str(text).map_err(|e| unusable(format!("it is no invitation: {e}")))?;
        if invitation.version != VERSION {
            let found = invitation.version;
            return Err(unusable(format!(
                "it is in version {found} of the format; this Potstill reads version {VERSION}"
            )));
        }
        if invitation.certificate.is_some() != invitation.token.is_some() {
            return Err(unusable("it has a token without a certificate, or the other way around".to_owned()));
        }
        Ok(invitation)
    }

    /// Its text: JSON on one line.
    #[must_use]
    pub fn to_text(&self) -> String {
        // Strings and numbers alone: there is nothing that JSON could not hold.
        serde_json::to_string(self).unwrap_or_default()
    }

    /// Writes or replaces a file that only its owner can read.
    ///
    /// # Errors
    /// [`AccessError::Unusable`]: the file cannot be written.
    pub fn write(&self, path: &Path) -> Result<(), AccessError> {
        let unusable = |problem: &str| AccessError::Unusable {
            place: path.display().to_string(),
            problem: problem.to_owned(),
        };
        if fs::symlink_metadata(path).is_ok_and(|there| !there.is_file()) {
            return Err(unusable("it is there and is no file"));
        }
        let draft = path.with_extension(format!("{}.part", std::process::id()));
        let written = || {
            let mut file = fs::OpenOptions::new().write(true).create_new(true).mode(0o600).open(&draft)?;
            writeln!(file, "{}", self.to_text())?;
            fs::rename(&draft, path)
        };
        written()
            .map_err(|e| AccessError::Unusable { place: path.display().to_string(), problem: e.to_string() })
    }

    /// Connects.
    ///
    /// # Errors
    /// [`AccessError::Unreachable`]: nothing listens there, or it is another coordinator; [`AccessError::Unusable`].
    pub async fn connect(&self, patience: Patience) -> Result<CoordinatorClient<Authorized>, AccessError> {
        let address = &self.address;
        let unusable = |problem: String| AccessError::Unusable { place: address.clone(), problem };
        let mut endpoint = Endpoint::from_shared(format!("http://{address}"))
            .map_err(|_| unusable("it is not an address; expected host:port".to_owned()))?;
        if let Some((idle, answer)) = patience.keep_alive {
            endpoint = endpoint
                .http2_keep_alive_interval(idle)
                .keep_alive_timeout(answer)
                .keep_alive_while_idle(true);
        }
        let tls = match &self.certificate {
            None => None,
            Some(text) => {
                let fingerprint: Fingerprint = text.parse().map_err(unusable)?;
                let config = fingerprint.client().map_err(|e| unusable(e.to_string()))?;
                Some(TlsConnector::from(config))
            }
        };
        let bearer = Bearer::new(self.token.as_deref()).map_err(unusable)?;
        let to = address.clone();
        let connector = service_fn(move |_: Uri| {
            let (address, tls) = (to.clone(), tls.clone());
            async move {
                let stream = TcpStream::connect(&address).await?;
                stream.set_nodelay(true)?;
                let stream: Box<dyn Stream> = match tls {
                    None => Box::new(stream),
                    Some(tls) => Box::new(tls.connect(server_name()?, stream).await?),
                };
                std::io::Result::Ok(TokioIo::new(stream))
            }
        });
        let unreachable = |problem: String| AccessError::Unreachable { address: address.clone(), problem };
        let connecting = timeout(patience.connect, endpoint.connect_with_connector(connector));
        let channel = match connecting.await {
            Ok(Ok(channel)) => channel,
            Ok(Err(error)) => return Err(unreachable(root_cause(&error))),
            Err(_) => return Err(unreachable(format!("no answer within {} s", patience.connect.as_secs()))),
        };
        Ok(CoordinatorClient::with_interceptor(channel, bearer)
            .max_decoding_message_size(MAX_MESSAGE_BYTES)
            .max_encoding_message_size(MAX_MESSAGE_BYTES))
    }
}

/// A name for the handshake, which must have one. The certificate is not compared with it.
fn server_name() -> std::io::Result<ServerName<'static>> {
    ServerName::try_from("potstill").map_err(std::io::Error::other)
}

fn root_cause(error: &dyn std::error::Error) -> String {
    let mut cause = error;
    while let Some(deeper) = cause.source() {
        cause = deeper;
    }
    match cause.to_string() {
        text if text.contains("ApplicationVerificationFailure") => {
            "it has another certificate than this run's coordinator: another program, or another coordinator, listens there".to_owned()
        }
        text => text,
    }
}

/// Adds the token to each call.
#[derive(Clone)]
pub struct Bearer(Option<MetadataValue<Ascii>>);

impl Bearer {
    fn new(token: Option<&str>) -> Result<Self, String> {
        let value = |token: &str| MetadataValue::try_from(format!("Bearer {token}"));
        let value = token.map(value).transpose().map_err(|_| "its token is not readable".to_owned())?;
        Ok(Self(value.map(|mut value| {
            value.set_sensitive(true);
            value
        })))
    }
}

impl Interceptor for Bearer {
    fn call(&mut self, mut request: Request<()>) -> Result<Request<()>, Status> {
        if let Some(value) = &self.0 {
            request.metadata_mut().insert("authorization", value.clone());
        }
        Ok(request)
    }
}

/// A connection, with or without TLS.
trait Stream: AsyncRead + AsyncWrite + Send + Unpin {}

impl<S: AsyncRead + AsyncWrite + Send + Unpin> Stream for S {}
