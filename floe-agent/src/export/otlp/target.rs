//! Where and how to send: one endpoint per signal.

use std::fmt;
use std::path::PathBuf;
use std::time::Duration;

use reqwest::Url;
use reqwest::header::{HeaderMap, HeaderName, HeaderValue};
use thiserror::Error;

/// An encoding of OTLP and what carries it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Protocol {
    /// gRPC.
    Grpc,
    /// Protobuf over HTTP.
    HttpProtobuf,
    /// JSON over HTTP.
    HttpJson,
}

impl Protocol {
    /// As `OTEL_EXPORTER_OTLP_PROTOCOL` names it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Grpc => "grpc",
            Self::HttpProtobuf => "http/protobuf",
            Self::HttpJson => "http/json",
        }
    }
}

/// An endpoint that cannot be used.
#[derive(Debug, Error)]
#[error("OTLP endpoint `{url}` ({origin}): {problem}")]
pub struct TargetError {
    /// As it was given.
    pub url: String,
    /// The option, variable or line that it comes from.
    pub origin: String,
    /// What is wrong and what was expected.
    pub problem: String,
}

/// Headers of every request. Values that come from files are read anew each time: tokens are renewed.
#[derive(Clone, Default)]
pub struct Headers {
    fixed: HeaderMap,
    files: Vec<(HeaderName, String, PathBuf)>,
}

impl Headers {
    /// Adds a header; an earlier one of this name is replaced.
    pub fn set(&mut self, name: &str, value: &str) -> Result<(), String> {
        let header = parse_name(name)?;
        let value = parse_value(name, value)?;
        self.files.retain(|(known, ..)| *known != header);
        self.fixed.insert(header, value);
        Ok(())
    }

    /// Adds a header whose value is a prefix and the content of a file.
    pub fn set_from_file(&mut self, name: &str, prefix: &str, file: PathBuf) -> Result<(), String> {
        let header = parse_name(name)?;
        self.fixed.remove(&header);
        self.files.retain(|(known, ..)| *known != header);
        self.files.push((header, prefix.to_owned(), file));
        Ok(())
    }

    /// The headers as they are now.
    pub(super) fn resolve(&self) -> Result<HeaderMap, String> {
        let mut headers = self.fixed.clone();
        for (name, prefix, file) in &self.files {
            let text = std::fs::read_to_string(file)
                .map_err(|error| format!("cannot read the header `{name}` from {}: {error}", file.display()))?;
            headers.insert(name.clone(), parse_value(name.as_str(), &format!("{prefix}{}", text.trim()))?);
        }
        Ok(headers)
    }
}

fn parse_name(name: &str) -> Result<HeaderName, String> {
    HeaderName::from_bytes(name.as_bytes()).map_err(|_| format!("`{name}` cannot be the name of a header"))
}

fn parse_value(name: &str, value: &str) -> Result<HeaderValue, String> {
    let mut value = HeaderValue::from_str(value)
        .map_err(|_| format!("the value of the header `{name}` has characters that no header may have"))?;
    value.set_sensitive(true);
    Ok(value)
}

impl fmt::Debug for Headers {
    /// Values are secrets.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_set().entries(self.fixed.keys()).entries(self.files.iter().map(|(name, ..)| name)).finish()
    }
}

/// A certificate and its key, as PEM.
type Pair = (Vec<u8>, Vec<u8>);

/// Where one signal goes.
#[derive(Clone, Debug)]
pub struct Endpoint {
    /// The URL; for HTTP with its path.
    pub url: String,
    /// The option, variable or line that it comes from.
    pub origin: String,
    /// How.
    pub protocol: Protocol,
    /// With which headers.
    pub headers: Headers,
    /// Whether bodies are compressed.
    pub gzip: bool,
    /// Time for one request.
    pub timeout: Duration,
    /// File of the certificates that are trusted, instead of the system's.
    pub certificate: Option<PathBuf>,
    /// Files of the client's certificate and its key.
    pub client: Option<(PathBuf, PathBuf)>,
}

impl Endpoint {
    /// An endpoint with nothing special. Fails if it is no URL that OTLP can be sent to.
    pub fn new(url: &str, origin: &str, protocol: Protocol) -> Result<Self, TargetError> {
        let endpoint = Self {
            url: url.to_owned(),
            origin: origin.to_owned(),
            protocol,
            headers: Headers::default(),
            gzip: false,
            timeout: Duration::from_secs(10),
            certificate: None,
            client: None,
        };
        endpoint.check()?;
        Ok(endpoint)
    }

    pub(crate) fn error(&self, problem: String) -> TargetError {
        TargetError { url: self.shown(), origin: self.origin.clone(), problem }
    }

    fn check(&self) -> Result<(), TargetError> {
        let Some((scheme, rest)) = self.url.split_once("://") else {
            let host = if self.url.is_empty() { "localhost:4317" } else { &self.url };
            return Err(self.error(format!("expected a URL such as `http://{host}`")));
        };
        if !matches!(scheme, "http" | "https") {
            return Err(self.error(format!("expected a URL such as `http://{rest}`, not `{scheme}`")));
        }
        let url = Url::parse(&self.url).ok().filter(|url| url.host_str().is_some_and(|host| !host.is_empty()));
        if url.is_none() {
            return Err(self.error("it is not a URL; expected one such as `http://localhost:4317`".to_owned()));
        }
        Ok(())
    }

    /// The URL without credentials.
    pub fn shown(&self) -> String {
        match Url::parse(&self.url) {
            Ok(mut url) if url.password().is_some() || !url.username().is_empty() => {
                let _ = url.set_password(None);
                let _ = url.set_username("");
                url.to_string()
            }
            _ => self.url.clone(),
        }
    }

    pub(super) fn is_tls(&self) -> bool {
        self.url.starts_with("https://")
    }

    /// The certificates that are trusted.
    pub(super) fn ca(&self) -> Result<Option<Vec<u8>>, TargetError> {
        self.certificate.as_ref().map(|file| self.read(file, "certificate")).transpose()
    }

    /// The client's certificate and key.
    pub(super) fn identity(&self) -> Result<Option<Pair>, TargetError> {
        let Some((certificate, key)) = &self.client else {
            return Ok(None);
        };
        Ok(Some((self.read(certificate, "client certificate")?, self.read(key, "client key")?)))
    }

    fn read(&self, file: &PathBuf, what: &str) -> Result<Vec<u8>, TargetError> {
        let bytes = std::fs::read(file)
            .map_err(|error| self.error(format!("cannot read the {what} {}: {error}", file.display())))?;
        let pem = b"-----BEGIN ";
        if !bytes.windows(pem.len()).any(|window| window == pem) {
            return Err(self.error(format!("the {what} {} is not a PEM file", file.display())));
        }
        Ok(bytes)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_endpoint_that_is_no_url_is_refused_with_one_that_would_do() {
        for (url, problem) in [
            (
                "localhost:4317",
                "OTLP endpoint `localhost:4317` (--otlp): expected a URL such as `http://localhost:4317`",
            ),
            ("grpc://x:1", "expected a URL such as `http://x:1`, not `grpc`"),
            ("http://", "it is not a URL"),
            ("http://a b", "it is not a URL"),
            ("", "expected a URL"),
        ] {
            let error = Endpoint::new(url, "--otlp", Protocol::Grpc).expect_err(url).to_string();
            assert!(error.contains(problem), "{error}");
        }
    }

    #[test]
    fn credentials_are_not_shown() {
        let endpoint = Endpoint::new("http://me:secret@host:1/", "x", Protocol::HttpJson).unwrap();
        assert_eq!(endpoint.shown(), "http://host:1/");
        let mut headers = Headers::default();
        headers.set("Authorization", "Bearer secret").unwrap();
        assert_eq!(format!("{headers:?}"), r#"{"authorization"}"#);
        assert!(headers.set("a b", "c").is_err());
        assert!(headers.set("a", "b\nc").unwrap_err().contains("`a`"));
    }

    #[test]
    fn a_header_from_a_file_is_read_each_time() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("token");
        let mut headers = Headers::default();
        headers.set("authorization", "old").unwrap();
        headers.set_from_file("authorization", "Bearer ", file.clone()).unwrap();
        assert!(headers.resolve().unwrap_err().contains("cannot read the header `authorization`"));
        for token in ["one", "two"] {
            std::fs::write(&file, format!("{token}\n")).unwrap();
            assert_eq!(headers.resolve().unwrap()["authorization"], format!("Bearer {token}"));
        }
    }
}
