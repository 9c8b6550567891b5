//! The two requests to the Kubernetes API, and what they answer. Answers are bounded, and what is not as expected is a failure.

use std::{
    collections::BTreeMap,
    error::Error,
    fmt,
    fs::File,
    io::Read as _,
    path::PathBuf,
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use percent_encoding::{NON_ALPHANUMERIC, utf8_percent_encode};
use reqwest::{Response, StatusCode, Url};
use serde::Deserialize;
use thiserror::Error;

use super::KubernetesSettings;
use crate::process::container::is_dns_name;

/// Time for a connection.
const CONNECT: Duration = Duration::from_secs(5);
/// Time for a page of the list.
const PATIENCE: Duration = Duration::from_mins(1);
/// How long the server is asked to keep a watch open. A bookmark comes about every minute.
const WATCH: Duration = Duration::from_secs(290);
/// Pods in a page of the list.
const PAGE: usize = 500;
/// Most bytes of a page, of a change, and of what comes with a refusal.
const MAX_PAGE: usize = 64 << 20;
const MAX_CHANGE: usize = 8 << 20;
const MAX_REFUSAL: usize = 64 << 10;
/// Largest token that is read.
const MAX_TOKEN: u64 = 64 << 10;

/// A pod, as far as it is of interest.
#[derive(Debug, Default, Deserialize)]
#[serde(default)]
pub(super) struct PodObject {
    pub(super) metadata: Metadata,
    pub(super) spec: Spec,
    pub(super) status: PodStatus,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default, rename_all = "camelCase")]
pub(super) struct Metadata {
    pub(super) uid: String,
    pub(super) name: String,
    pub(super) namespace: String,
    pub(super) resource_version: String,
    pub(super) labels: BTreeMap<String, String>,
    pub(super) annotations: BTreeMap<String, String>,
    pub(super) owner_references: Vec<Owner>,
}

#[derive(Debug, Deserialize)]
pub(super) struct Owner {
    pub(super) kind: String,
    pub(super) name: String,
    #[serde(default)]
    pub(super) controller: bool,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default, rename_all = "camelCase")]
pub(super) struct Spec {
    pub(super) node_name: Option<String>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default, rename_all = "camelCase")]
pub(super) struct PodStatus {
    pub(super) start_time: Option<String>,
}

#[derive(Debug, Deserialize)]
struct PodList {
    metadata: ListMetadata,
    /// Go writes an empty list as null, if nobody has made one.
    items: Option<Vec<PodObject>>,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
struct ListMetadata {
    resource_version: String,
    #[serde(default)]
    r#continue: String,
}

/// One line of a watch.
#[derive(Debug, Deserialize)]
#[serde(tag = "type", content = "object", rename_all = "UPPERCASE")]
pub(super) enum Change {
    Added(PodObject),
    Modified(PodObject),
    Deleted(PodObject),
    /// Nothing changed up to the version that it has.
    Bookmark(PodObject),
    Error(Refusal),
}

/// What the API says with an error.
#[derive(Debug, Default, Deserialize)]
#[serde(default)]
pub(super) struct Refusal {
    code: u16,
    message: String,
}

/// Why a request brought nothing, or no more.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Failure {
    /// The server does not remember what came after the version that was asked for.
    TooOld,
    /// There was no answer, or its end is missing.
    Broken(String),
    /// The answer was a no.
    Refused(String),
    /// The answer was not understood.
    Odd(String),
}

impl Failure {
    fn broken(error: reqwest::Error) -> Self {
        let error = error.without_url();
        let mut innermost: &dyn Error = &error;
        while let Some(source) = innermost.source() {
            innermost = source;
        }
        Self::Broken(innermost.to_string())
    }
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::TooOld => f.write_str("the server does not remember enough"),
            Self::Broken(why) | Self::Refused(why) | Self::Odd(why) => f.write_str(why),
        }
    }
}

/// The Kubernetes API cannot be used as configured.
#[derive(Debug, Error)]
#[error("kubernetes: {0}")]
pub struct ApiError(String);

/// A way to the API.
#[derive(Debug)]
pub struct Api {
    client: reqwest::Client,
    pods: Url,
    token: PathBuf,
}

impl Api {
    /// As configured, or as the environment of a pod tells. `None`, with the reason, if the agent is in no pod that may ask; an error
    /// if the configuration cannot be meant.
    pub fn find(
        settings: &KubernetesSettings,
        variable: impl Fn(&str) -> Option<String>,
    ) -> Result<Result<Self, String>, ApiError> {
        if !settings.watch_pods {
            return Ok(Err("`kubernetes: {watch_pods: false}`".into()));
        }
        let wanted = settings.server.is_some();
        let server = match &settings.server {
            Some(server) => server.clone(),
            None => match variable("KUBERNETES_SERVICE_HOST") {
                Some(host) => {
                    let port = variable("KUBERNETES_SERVICE_PORT").unwrap_or_else(|| "443".into());
                    let host = if host.contains(':') { format!("[{host}]") } else { host };
                    format!("https://{host}:{port}")
                }
                None => return Ok(Err("the agent does not run in a pod".into())),
            },
        };
        let Some(node) = settings.node.clone().or_else(|| variable("K8S_NODE_NAME")) else {
            let why = "the name of the node is not known: set `kubernetes.node` or K8S_NODE_NAME";
            return if wanted { Err(ApiError(why.into())) } else { Ok(Err(why.into())) };
        };
        if !is_dns_name(&node) {
            return Err(ApiError(format!("`{node}` is not the name of a node")));
        }
        if !wanted && !settings.token_file.exists() {
            return Ok(Err(format!("there is no {}", settings.token_file.display())));
        }
        match Self::new(&server, &node, settings) {
            Err(error) if !wanted => Ok(Err(error.0)),
            made => made.map(Ok),
        }
    }

    fn new(server: &str, node: &str, settings: &KubernetesSettings) -> Result<Self, ApiError> {
        let bad = |why: &dyn fmt::Display| ApiError(format!("`{server}` is not the address of an API server: {why}"));
        let base = Url::parse(server).map_err(|error| bad(&error))?;
        // What the server's path may be, proxies for instance, stays in front.
        let path = format!("{}/api/v1/pods?fieldSelector=spec.nodeName%3D{node}", base.as_str().trim_end_matches('/'));
        let pods = Url::parse(&path).map_err(|error| bad(&error))?;
        // Others may have chosen one already; ours is the only one there is.
        let _ = rustls::crypto::ring::default_provider().install_default();
        let mut builder = reqwest::Client::builder()
            .user_agent(concat!("floe-agent/", env!("CARGO_PKG_VERSION")))
            .connect_timeout(CONNECT)
            .tcp_keepalive(Duration::from_secs(30))
            .no_proxy()
            // The token is for nobody else.
            .redirect(reqwest::redirect::Policy::none());
        match pods.scheme() {
            "https" => {
                let file = settings.ca_file.display();
                let pem = std::fs::read(&settings.ca_file).map_err(|e| ApiError(format!("cannot read {file}: {e}")))?;
                let certificates = reqwest::Certificate::from_pem_bundle(&pem)
                    .ok()
                    .filter(|certificates| !certificates.is_empty())
                    .ok_or_else(|| ApiError(format!("{file} holds no certificate")))?;
                builder = builder.tls_certs_only(certificates);
            }
            "http" => {}
            other => return Err(bad(&format!("{other} is neither http nor https"))),
        }
        let client = builder.build().map_err(|error| ApiError(error.to_string()))?;
        Ok(Self { client, pods, token: settings.token_file.clone() })
    }

    /// What is asked for, whatever else is said with it.
    #[cfg(test)]
    pub(super) fn address(&self) -> String {
        self.pods.to_string()
    }

    async fn get(&self, more: &str) -> Result<Response, Failure> {
        let mut token = String::new();
        File::open(&self.token)
            .and_then(|file| file.take(MAX_TOKEN).read_to_string(&mut token))
            .map_err(|error| Failure::Refused(format!("cannot read {}: {error}", self.token.display())))?;
        let mut url = self.pods.clone();
        url.set_query(Some(&format!("{}&{more}", self.pods.query().unwrap_or_default())));
        let request = self.client.get(url).bearer_auth(token.trim());
        let mut response = request.send().await.map_err(Failure::broken)?;
        let status = response.status();
        if status.is_success() {
            return Ok(response);
        }
        let body = body(&mut response, MAX_REFUSAL).await.unwrap_or_default();
        let Refusal { message, .. } = serde_json::from_slice(&body).unwrap_or_default();
        Err(refusal(status.as_u16(), &message))
    }

    /// All pods of the node, and the version that the list is of. The newest there is, or any.
    pub(super) async fn list(&self, newest: bool) -> Result<(Vec<PodObject>, String), Failure> {
        let mut all = Vec::new();
        let mut from = if newest { String::new() } else { "&resourceVersion=0".into() };
        loop {
            let page = async {
                let mut response = self.get(&format!("limit={PAGE}{from}")).await?;
                body(&mut response, MAX_PAGE).await
            };
            let page = tokio::time::timeout(PATIENCE, page).await;
            let page = page.map_err(|_| Failure::Broken(format!("no answer within {PATIENCE:?}")))??;
            let list: PodList =
                serde_json::from_slice(&page).map_err(|e| Failure::Odd(format!("no list of pods: {e}")))?;
            all.extend(list.items.unwrap_or_default());
            if list.metadata.r#continue.is_empty() || all.len() > super::MAX_PODS {
                return Ok((all, list.metadata.resource_version));
            }
            from = format!("&continue={}", utf8_percent_encode(&list.metadata.r#continue, NON_ALPHANUMERIC));
        }
    }

    /// What changes from this version on, which goes along, until the server ends the watch.
    pub(super) async fn watch(&self, version: &mut String, mut tell: impl FnMut(Change)) -> Result<(), Failure> {
        let silent = || Failure::Broken("the watch is silent".into());
        let seconds = WATCH.as_secs();
        let from = utf8_percent_encode(version, NON_ALPHANUMERIC);
        let more = format!("watch=1&allowWatchBookmarks=true&timeoutSeconds={seconds}&resourceVersion={from}");
        let mut response = tokio::time::timeout(PATIENCE, self.get(&more)).await.map_err(|_| silent())??;
        let mut waiting: Vec<u8> = Vec::new();
        loop {
            let chunk = tokio::time::timeout(WATCH + PATIENCE, response.chunk()).await.map_err(|_| silent())?;
            let Some(chunk) = chunk.map_err(Failure::broken)? else { return Ok(()) };
            let before = waiting.len();
            waiting.extend_from_slice(&chunk);
            let mut done = 0;
            while let Some(end) = memchr::memchr(b'\n', &waiting[done.max(before)..]) {
                let end = done.max(before) + end;
                let line = &waiting[done..end];
                done = end + 1;
                if line.trim_ascii().is_empty() {
                    continue;
                }
                let change: Change =
                    serde_json::from_slice(line).map_err(|e| Failure::Odd(format!("no change of a pod: {e}")))?;
                match &change {
                    Change::Error(Refusal { code, message }) => return Err(refusal(*code, message)),
                    Change::Added(pod) | Change::Modified(pod) | Change::Deleted(pod) | Change::Bookmark(pod) => {
                        if !pod.metadata.resource_version.is_empty() {
                            version.clone_from(&pod.metadata.resource_version);
                        }
                    }
                }
                tell(change);
            }
            waiting.drain(..done);
            if waiting.len() > MAX_CHANGE {
                return Err(Failure::Odd(format!("a change of more than {MAX_CHANGE} bytes")));
            }
        }
    }
}

fn refusal(code: u16, message: &str) -> Failure {
    if code == StatusCode::GONE.as_u16() {
        return Failure::TooOld;
    }
    let message: String = message.chars().filter(|c| !c.is_control()).take(200).collect();
    Failure::Refused(if message.is_empty() { format!("HTTP {code}") } else { format!("HTTP {code}: {message}") })
}

/// All of an answer.
async fn body(response: &mut Response, limit: usize) -> Result<Vec<u8>, Failure> {
    let mut all = Vec::new();
    while let Some(chunk) = response.chunk().await.map_err(Failure::broken)? {
        all.extend_from_slice(&chunk);
        if all.len() > limit {
            return Err(Failure::Odd(format!("an answer of more than {limit} bytes")));
        }
    }
    Ok(all)
}

/// Between half of it and all of it: the agents of a cluster are not to come back all at once.
pub(super) fn jitter(pause: Duration) -> Duration {
    let nanos = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().subsec_nanos();
    pause / 2 + (pause / 2).mul_f64(f64::from(nanos % 1_000_000) / 1e6)
}
