//! TLS by rustls: system roots, a file of authorities, or a client's own certificate.

use std::io;
use std::path::Path;
use std::sync::Arc;

use tokio_rustls::TlsConnector;
use tokio_rustls::rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use tokio_rustls::rustls::client::{WebPkiServerVerifier, verify_server_name};
use tokio_rustls::rustls::crypto::{CryptoProvider, ring};
use tokio_rustls::rustls::pki_types::pem::PemObject;
use tokio_rustls::rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName, UnixTime};
use tokio_rustls::rustls::server::ParsedCertificate;
use tokio_rustls::rustls::{
    CertificateError, ClientConfig, DigitallySignedStruct, Error as TlsError, RootCertStore, SignatureScheme,
};

use super::url::Tls;
use crate::store::StoreError;

/// Reads the certificates. Does not touch the network.
pub fn connector(tls: &Tls) -> Result<TlsConnector, StoreError> {
    let provider = Arc::new(ring::default_provider());
    let mut roots = RootCertStore::empty();
    let mut pinned = Vec::new();
    match &tls.ca {
        Some(path) => {
            for certificate in certificates(path)? {
                roots.add(certificate.clone()).map_err(|error| unusable(path, &error.to_string()))?;
                pinned.push(certificate);
            }
        }
        None => {
            let found = rustls_native_certs::load_native_certs();
            roots.add_parsable_certificates(found.certs);
            if roots.is_empty() {
                return Err(StoreError::bad_config(
                    "this system has no certificates of authorities: name a file with ca=/path.pem",
                ));
            }
        }
    }
    let inner = WebPkiServerVerifier::builder_with_provider(Arc::new(roots), Arc::clone(&provider))
        .build()
        .map_err(|error| StoreError::bad_config(format!("the authorities' certificates are of no use: {error}")))?;
    let verifier = Arc::new(Verifier { inner, pinned, provider: Arc::clone(&provider) });
    let config = ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .map_err(|error| StoreError::bad_config(error.to_string()))?
        .dangerous()
        .with_custom_certificate_verifier(verifier);
    let config = match &tls.identity {
        None => config.with_no_client_auth(),
        Some((certificate, key)) => {
            let chain = certificates(certificate)?;
            let secret = PrivateKeyDer::from_pem_file(key).map_err(|error| unusable(key, &error.to_string()))?;
            config
                .with_client_auth_cert(chain, secret)
                .map_err(|error| unusable(key, &format!("it does not go with the certificate: {error}")))?
        }
    };
    Ok(TlsConnector::from(Arc::new(config)))
}

fn certificates(path: &Path) -> Result<Vec<CertificateDer<'static>>, StoreError> {
    let read = CertificateDer::pem_file_iter(path).and_then(|found| found.collect::<Result<Vec<_>, _>>());
    let certificates = read.map_err(|error| unusable(path, &error.to_string()))?;
    match certificates.is_empty() {
        true => Err(unusable(path, "it holds no certificate (PEM)")),
        false => Ok(certificates),
    }
}

fn unusable(path: &Path, why: &str) -> StoreError {
    StoreError::bad_config(format!("the certificate file {} cannot be used: {why}", path.display()))
}

/// What went wrong with TLS, in words that say what to change.
pub fn explain(error: &io::Error, host: &str) -> StoreError {
    let Some(tls) = error.get_ref().and_then(|inner| inner.downcast_ref::<TlsError>()) else {
        // A server without TLS takes our greeting for a query of an unknown version, and may hang up.
        return match error.kind() {
            io::ErrorKind::UnexpectedEof | io::ErrorKind::ConnectionReset => StoreError::bad_config(
                "the server hung up during TLS: it may want a client's certificate (cert= and key=), or have no TLS there",
            ),
            _ => StoreError::unreachable(format!("the connection broke during TLS: {error}")),
        };
    };
    StoreError::bad_config(match tls {
        TlsError::InvalidMessage(_) => {
            "what answers there does not speak TLS: leave tls=1 and ca= out of the store URL, or name its TLS port"
                .to_string()
        }
        TlsError::InvalidCertificate(
            CertificateError::NotValidForName | CertificateError::NotValidForNameContext { .. },
        ) => {
            format!("the server's certificate is for another host, not for {host}: {tls}")
        }
        TlsError::InvalidCertificate(CertificateError::UnknownIssuer) => {
            "the server's certificate is not signed by an authority known here: name its authority with ca=/path.pem"
                .to_string()
        }
        TlsError::AlertReceived(_) => {
            format!("the server refused TLS (it may want a client's certificate: cert= and key=): {tls}")
        }
        other => format!("TLS failed: {other}"),
    })
}

/// The usual checks; and a server whose very certificate is in the `ca` file is trusted as well.
///
/// RethinkDB's manual has people sign a server's certificate with itself, and such a certificate is an
/// authority's, which the usual checks refuse as a server's own.
#[derive(Debug)]
struct Verifier {
    inner: Arc<WebPkiServerVerifier>,
    pinned: Vec<CertificateDer<'static>>,
    provider: Arc<CryptoProvider>,
}

impl ServerCertVerifier for Verifier {
    fn verify_server_cert(
        &self,
        certificate: &CertificateDer<'_>,
        chain: &[CertificateDer<'_>],
        name: &ServerName<'_>,
        stapled: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, TlsError> {
        match self.inner.verify_server_cert(certificate, chain, name, stapled, now) {
            Err(TlsError::InvalidCertificate(CertificateError::Other(_) | CertificateError::UnknownIssuer))
                if self.pinned.iter().any(|pinned| pinned == certificate) =>
            {
                verify_server_name(&ParsedCertificate::try_from(certificate)?, name)?;
                Ok(ServerCertVerified::assertion())
            }
            verdict => verdict,
        }
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, TlsError> {
        self.inner.verify_tls12_signature(message, certificate, signature)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, TlsError> {
        self.inner.verify_tls13_signature(message, certificate, signature)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.provider.signature_verification_algorithms.supported_schemes()
    }
}
