//! The coordinator's certificate, and TLS for its connections.

use std::{path::PathBuf, sync::Arc};

use potstill_access::Fingerprint;
use rcgen::{CertificateParams, KeyPair};
use rustls::{
    ServerConfig,
    crypto::ring,
    pki_types::{CertificateDer, PrivateKeyDer, PrivatePkcs8KeyDer, pem::PemObject},
};

use crate::StartError;

/// How a coordinator shows who it is, and whom it lets in.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Security {
    /// With a certificate of its own, made at its start; who has the run's join key is let in.
    Own,
    /// The same with a certificate of the site.
    Site {
        /// The file with the certificate and those that follow it to the site's root, PEM.
        certificate: PathBuf,
        /// The file with its private key, PEM.
        key: PathBuf,
    },
    /// Without TLS; everybody is let in.
    Insecure,
}

/// A certificate with its private key.
pub struct Identity {
    /// What callers compare the certificate with.
    pub fingerprint: Fingerprint,
    /// TLS for the server's side.
    pub tls: Arc<ServerConfig>,
}

impl Identity {
    /// The one that `security` asks for; none without TLS.
    ///
    /// # Errors
    /// [`StartError::Certificate`]: a file cannot be read, or key and certificate do not belong together.
    pub fn of(security: &Security) -> Result<Option<Self>, StartError> {
        match security {
            Security::Insecure => Ok(None),
            Security::Own => {
                let failed = |error: rcgen::Error| StartError::Certificate(error.to_string());
                let key = KeyPair::generate().map_err(failed)?;
                let certificate = CertificateParams::new(vec!["potstill".to_owned()])
                    .and_then(|parameters| parameters.self_signed(&key))
                    .map_err(failed)?;
                let private = PrivatePkcs8KeyDer::from(key.serialize_der());
                Self::new(vec![certificate.der().clone()], private.into()).map(Some)
            }
            Security::Site { certificate, key } => {
                let unreadable = |path: &PathBuf, error: &dyn std::fmt::Display| {
                    StartError::Certificate(format!("{}: {error}", path.display()))
                };
                let chain = CertificateDer::pem_file_iter(certificate)
                    .and_then(Iterator::collect::<Result<Vec<_>, _>>)
                    .map_err(|error| unreadable(certificate, &error))?;
                if chain.is_empty() {
                    return Err(unreadable(certificate, &"there is no certificate in it"));
                }
                let private = PrivateKeyDer::from_pem_file(key).map_err(|error| unreadable(key, &error))?;
                Self::new(chain, private).map(Some)
            }
        }
    }

    fn new(chain: Vec<CertificateDer<'static>>, key: PrivateKeyDer<'static>) -> Result<Self, StartError> {
        let failed = |error: rustls::Error| StartError::Certificate(error.to_string());
        let fingerprint = Fingerprint::of(&chain[0]);
        let mut tls = ServerConfig::builder_with_provider(Arc::new(ring::default_provider()))
            .with_protocol_versions(&[&rustls::version::TLS13])
            .map_err(failed)?
            .with_no_client_auth()
            .with_single_cert(chain, key)
            .map_err(failed)?;
        tls.alpn_protocols = vec![b"h2".to_vec()];
        Ok(Self { fingerprint, tls: Arc::new(tls) })
    }
}
