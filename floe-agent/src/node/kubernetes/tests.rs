//! Against API servers that behave in every way there is. What a request is, and what is answered, is written out.

use std::{
    collections::VecDeque,
    net::SocketAddr,
    path::Path,
    sync::{Arc, Mutex},
};

use rustls::pki_types::pem::PemObject as _;
use tokio::{
    io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _},
    net::TcpListener,
    task::JoinHandle,
};

use super::*;
use crate::export::otlp_tests::{authority, eventually, free_port};

/// Short ones.
const QUICK: (Duration, Duration) = (Duration::from_millis(10), Duration::from_millis(40));

/// What the server does with one request.
#[derive(Clone)]
enum Answer {
    /// Status and body, and the connection ends.
    Body(u16, String),
    /// The same, and then nothing more: the watch stays open.
    Open(String),
    /// The connection ends without a word.
    Nothing,
}

/// A server that answers one request after the other as it is told, and the last one for ever.
#[derive(Clone)]
struct Server {
    answers: Arc<Mutex<VecDeque<Answer>>>,
    /// Request line and token of each request.
    asked: Arc<Mutex<Vec<(String, String)>>>,
}

impl Server {
    fn new(answers: &[Answer]) -> Self {
        Self { answers: Arc::new(Mutex::new(answers.iter().cloned().collect())), asked: Arc::default() }
    }

    async fn start(answers: &[Answer]) -> (Self, SocketAddr) {
        let server = Self::new(answers);
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        server.clone().serve(listener);
        (server, address)
    }

    fn serve(self, listener: TcpListener) {
        tokio::spawn(async move {
            while let Ok((stream, _)) = listener.accept().await {
                tokio::spawn(self.clone().connection(stream));
            }
        });
    }

    async fn connection(self, mut stream: impl AsyncRead + AsyncWrite + Unpin) {
        let mut head = Vec::new();
        while !head.ends_with(b"\r\n\r\n") {
            if stream.read_buf(&mut head).await.unwrap_or(0) == 0 {
                return;
            }
        }
        let head = String::from_utf8(head).unwrap();
        let token = head.lines().find_map(|line| line.strip_prefix("authorization: Bearer ")).unwrap_or_default();
        let path = head.split(' ').nth(1).unwrap_or_default();
        self.asked.lock().unwrap().push((path.to_owned(), token.to_owned()));
        let answer = {
            let mut answers = self.answers.lock().unwrap();
            if answers.len() > 1 { answers.pop_front() } else { answers.front().cloned() }
        };
        match answer.unwrap() {
            Answer::Body(status, body) => {
                let _ = stream
                    .write_all(format!("HTTP/1.1 {status} X\r\nconnection: close\r\n\r\n{body}").as_bytes())
                    .await;
                let _ = stream.shutdown().await;
            }
            Answer::Open(body) => {
                let _ = stream.write_all(format!("HTTP/1.1 200 X\r\nconnection: close\r\n\r\n{body}").as_bytes()).await;
                std::future::pending::<()>().await;
            }
            Answer::Nothing => {}
        }
    }

    fn asked(&self) -> Vec<String> {
        self.asked.lock().unwrap().iter().map(|(path, _)| path.clone()).collect()
    }
}

fn pod(uid: &str, version: &str, team: &str) -> String {
    format!(
        r#"{{"kind":"Pod","metadata":{{"uid":"{uid}","name":"etl-{uid}","namespace":"data","resourceVersion":"{version}",
            "labels":{{"team":"{team}"}}}},"spec":{{"nodeName":"n1","containers":[{{"name":"x"}}]}},"status":{{"phase":"Running"}}}}"#
    )
    .replace('\n', " ")
}

fn list(version: &str, next: &str, pods: &[String]) -> Answer {
    let (kind, items) = ("PodList", pods.join(","));
    let body = format!(
        r#"{{"kind":"{kind}","metadata":{{"resourceVersion":"{version}","continue":"{next}"}},"items":[{items}]}}"#
    );
    Answer::Body(200, body)
}

fn change(kind: &str, object: &str) -> String {
    format!("{{\"type\":\"{kind}\",\"object\":{object}}}\n")
}

fn settings(folder: &Path, server: &str) -> KubernetesSettings {
    std::fs::write(folder.join("token"), "first\n").unwrap();
    KubernetesSettings {
        server: Some(server.to_owned()),
        node: Some("n1".into()),
        token_file: folder.join("token"),
        ca_file: folder.join("ca.crt"),
        ..KubernetesSettings::default()
    }
}

/// A watch on such a server, for as long as the task is not dropped.
struct Watching {
    pods: Arc<KnownPods>,
    task: JoinHandle<()>,
    folder: tempfile::TempDir,
}

impl Watching {
    fn at(server: &str) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let settings = settings(folder.path(), server);
        Self::with(folder, &settings)
    }

    fn with(folder: tempfile::TempDir, settings: &KubernetesSettings) -> Self {
        let api = Api::find(settings, |_| None).unwrap().unwrap();
        let pods = Arc::new(KnownPods::default());
        let known = pods.clone();
        let task = tokio::spawn(async move { watch_with(&api, &known, QUICK).await });
        Self { pods, task, folder }
    }

    fn team(&self, uid: &str) -> Option<String> {
        self.pods.pod(uid)?.labels.get("team").cloned()
    }
}

impl Drop for Watching {
    fn drop(&mut self) {
        self.task.abort();
    }
}

#[tokio::test]
async fn pods_are_listed_in_pages_and_followed_from_there_on() {
    let changes = [
        change("ADDED", &pod("c", "21", "x")),
        change("MODIFIED", &pod("a", "22", "y")),
        change("DELETED", &pod("b", "23", "x")),
        change("BOOKMARK", r#"{"kind":"Pod","metadata":{"resourceVersion":"30"}}"#),
    ];
    let (server, address) = Server::start(&[
        list("20", "a/b", &[pod("a", "10", "x")]),
        list("20", "", &[pod("b", "11", "x")]),
        Answer::Body(200, changes.concat()),
        Answer::Open(change("ADDED", &pod("d", "31", "z"))),
    ])
    .await;
    let watching = Watching::at(&format!("http://{address}/proxy/"));
    eventually(|| watching.team("d").is_some()).await;
    let teams = ["a", "b", "c"].map(|uid| watching.team(uid));
    assert_eq!(teams, [Some("y".to_owned()), None, Some("x".to_owned())]);
    let prefix = "/proxy/api/v1/pods?fieldSelector=spec.nodeName%3Dn1&";
    let watch = "watch=1&allowWatchBookmarks=true&timeoutSeconds=290&resourceVersion=";
    let expected = [
        format!("{prefix}limit=500&resourceVersion=0"),
        format!("{prefix}limit=500&continue=a%2Fb"),
        format!("{prefix}{watch}20"),
        format!("{prefix}{watch}30"),
    ];
    assert_eq!(server.asked(), expected);
    assert_eq!((watching.pods.count(), watching.pods.failures()), (3, 0));
    let pod = watching.pods.pod("a").unwrap();
    assert_eq!((pod.name.as_str(), pod.namespace.as_str(), pod.node.as_deref()), ("etl-a", "data", Some("n1")));
}

#[tokio::test]
async fn a_token_that_is_replaced_is_used_for_the_next_request() {
    let unauthorized = Answer::Body(401, r#"{"kind":"Status","code":401,"message":"Unauthorized"}"#.into());
    let (server, address) = Server::start(&[unauthorized]).await;
    let watching = Watching::at(&format!("http://{address}"));
    eventually(|| watching.pods.failures() > 0).await;
    std::fs::write(watching.folder.path().join("token"), "second").unwrap();
    *server.answers.lock().unwrap() = [list("1", "", &[pod("a", "1", "x")]), Answer::Open(String::new())].into();
    eventually(|| watching.team("a").is_some()).await;
    let tokens: Vec<_> = server.asked.lock().unwrap().iter().map(|(_, token)| token.clone()).collect();
    assert_eq!((tokens[0].as_str(), tokens.last().unwrap().as_str()), ("first", "second"));
}

#[tokio::test]
async fn a_version_that_is_too_old_begins_with_a_new_list() {
    let expired = r#"{"kind":"Status","code":410,"reason":"Expired","message":"too old resource version"}"#;
    for gone in [Answer::Body(410, expired.into()), Answer::Body(200, change("ERROR", expired))] {
        let (server, address) = Server::start(&[
            list("5", "", &[pod("a", "1", "x"), pod("b", "2", "x")]),
            gone,
            list("90", "", &[pod("b", "80", "y")]),
            Answer::Open(change("ADDED", &pod("c", "91", "x"))),
        ])
        .await;
        let watching = Watching::at(&format!("http://{address}"));
        eventually(|| watching.team("c").is_some()).await;
        assert_eq!((watching.team("a"), watching.team("b").as_deref()), (None, Some("y")), "all is as in the new list");
        let asked = server.asked();
        assert!(asked[2].ends_with("limit=500"), "the newest, not any that is at hand: {asked:?}");
        assert!(asked[3].ends_with("resourceVersion=90"), "{asked:?}");
        assert_eq!(watching.pods.failures(), 0, "it is no failure");
    }
}

#[tokio::test]
async fn what_is_known_stays_known_while_the_api_fails_and_it_is_asked_again() {
    let mut long = change("ADDED", &pod("long", "9", &"x".repeat(9 << 20)));
    long.pop();
    for (trouble, again) in [
        (Answer::Nothing, false),
        (Answer::Body(500, "<html>".into()), false),
        (Answer::Body(403, r#"{"message":"pods is forbidden"}"#.into()), false),
        (Answer::Body(302, String::new()), false),
        (Answer::Body(200, change("ERROR", r#"{"code":500,"message":"etcd"}"#)), false),
        // It may have been a change.
        (Answer::Body(200, "garbage\n".into()), true),
        (Answer::Body(200, change("ADDED", "7")), true),
        (Answer::Body(200, long), true),
    ] {
        let next = Answer::Open(change("ADDED", &pod("b", "6", "x")));
        let mut answers = vec![list("5", "", &[pod("a", "1", "x")]), trouble];
        if again {
            answers.push(list("5", "", &[pod("a", "1", "x")]));
        }
        answers.push(next);
        let (server, address) = Server::start(&answers).await;
        let watching = Watching::at(&format!("http://{address}"));
        eventually(|| watching.pods.failures() > 0).await;
        assert!(watching.team("a").is_some());
        eventually(|| watching.team("b").is_some()).await;
        assert_eq!(watching.pods.failures(), 1);
        assert_eq!(server.asked().len(), answers.len());
    }
}

#[tokio::test]
async fn an_api_that_comes_later_is_found() {
    let address = free_port().await;
    let watching = Watching::at(&format!("http://{address}"));
    eventually(|| watching.pods.failures() > 1).await;
    assert_eq!(watching.pods.count(), 0);
    let listener = TcpListener::bind(address).await.unwrap();
    Server::new(&[list("5", "", &[pod("a", "1", "x")]), Answer::Open(String::new())]).serve(listener);
    eventually(|| watching.team("a").is_some()).await;
}

#[tokio::test]
async fn a_server_that_ends_watches_at_once_is_not_asked_without_end() {
    let (server, address) = Server::start(&[list("5", "", &[]), Answer::Body(200, String::new())]).await;
    let watching = Watching::at(&format!("http://{address}"));
    eventually(|| server.asked().len() > 3).await;
    let (before, began) = (server.asked().len() as u32, Instant::now());
    tokio::time::sleep(Duration::from_millis(100)).await;
    let asked = server.asked().len() as u32 - before;
    assert!(asked <= began.elapsed().div_duration_f64(QUICK.0 / 2) as u32 + 1, "{asked} requests");
    assert_eq!(watching.pods.failures(), 0);
}

#[tokio::test]
async fn only_a_server_of_the_service_accounts_authority_is_talked_to() {
    let (ca, certificate, key) = authority();
    let (other, ..) = authority();
    let certificate = rustls::pki_types::CertificateDer::from_pem_slice(certificate.as_bytes()).unwrap();
    let key = rustls::pki_types::PrivateKeyDer::from_pem_slice(key.as_bytes()).unwrap();
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let tls = rustls::ServerConfig::builder_with_provider(provider).with_safe_default_protocol_versions().unwrap();
    let tls = tls.with_no_client_auth().with_single_cert(vec![certificate], key).unwrap();
    let acceptor = tokio_rustls::TlsAcceptor::from(Arc::new(tls));
    let server = Server::new(&[list("5", "", &[pod("a", "1", "x")]), Answer::Open(String::new())]);
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let url = format!("https://localhost:{}", listener.local_addr().unwrap().port());
    let serving = server.clone();
    tokio::spawn(async move {
        while let Ok((stream, _)) = listener.accept().await {
            if let Ok(stream) = acceptor.accept(stream).await {
                tokio::spawn(serving.clone().connection(stream));
            }
        }
    });
    let with_authority = |pem: &str| {
        let folder = tempfile::tempdir().unwrap();
        std::fs::write(folder.path().join("ca.crt"), pem).unwrap();
        let settings = settings(folder.path(), &url);
        Watching::with(folder, &settings)
    };
    let refusing = with_authority(&other);
    eventually(|| refusing.pods.failures() > 1).await;
    assert_eq!(server.asked(), [""; 0], "the token did not leave");
    let watching = with_authority(&ca);
    eventually(|| watching.team("a").is_some()).await;
}

#[test]
fn the_api_is_found_as_a_pod_finds_it() {
    let folder = tempfile::tempdir().unwrap();
    let (ca, ..) = authority();
    let found = |change: &dyn Fn(&mut KubernetesSettings), variables: &[(&str, &str)]| {
        let mut settings = KubernetesSettings { server: None, node: None, ..settings(folder.path(), "") };
        change(&mut settings);
        let variable =
            |name: &str| variables.iter().find(|(known, _)| *known == name).map(|(_, value)| (*value).to_owned());
        Api::find(&settings, variable).map(|found| found.map(|api| api.address()))
    };
    let pod = [("KUBERNETES_SERVICE_HOST", "10.0.0.1"), ("KUBERNETES_SERVICE_PORT", "6443"), ("K8S_NODE_NAME", "n1")];
    let why = |change: &dyn Fn(&mut KubernetesSettings), variables| found(change, variables).unwrap().unwrap_err();

    assert!(why(&|_| {}, &pod).contains("ca.crt"), "works without, but says why");
    std::fs::write(folder.path().join("ca.crt"), "no certificate").unwrap();
    assert!(why(&|_| {}, &pod).contains("holds no certificate"));
    std::fs::write(folder.path().join("ca.crt"), ca).unwrap();
    let address = "https://10.0.0.1:6443/api/v1/pods?fieldSelector=spec.nodeName%3Dn1";
    assert_eq!(found(&|_| {}, &pod).unwrap().unwrap(), address);
    let six = [("KUBERNETES_SERVICE_HOST", "fd00::1"), ("K8S_NODE_NAME", "n1")];
    assert!(found(&|_| {}, &six).unwrap().unwrap().starts_with("https://[fd00::1]/api"));
    let own = |settings: &mut KubernetesSettings| settings.node = Some("own".into());
    assert!(found(&own, &pod).unwrap().unwrap().ends_with("%3Down"));

    assert!(why(&|_| {}, &[]).contains("not run in a pod"));
    assert!(why(&|_| {}, &pod[..2]).contains("K8S_NODE_NAME"));
    assert!(why(&|settings| settings.watch_pods = false, &pod).contains("watch_pods"));
    assert!(why(&|settings| settings.token_file = "/no/token".into(), &pod).contains("/no/token"));

    for (server, node, word) in
        [("nowhere", "n1", "nowhere"), ("ftp://x", "n1", "ftp"), ("http://x", "n1&limit=1", "n1&limit=1")]
    {
        let error =
            found(&|settings| (settings.server, settings.node) = (Some(server.into()), Some(node.into())), &pod);
        assert!(error.unwrap_err().to_string().contains(word));
    }
    let nameless = found(&|settings| settings.server = Some("http://x".into()), &[]);
    assert!(nameless.unwrap_err().to_string().contains("K8S_NODE_NAME"));
}

#[test]
fn a_pod_is_what_it_says_within_bounds() {
    let object: PodObject = serde_json::from_str(
        r#"{"metadata":{"uid":"u","name":"dagster-run-1","namespace":"data",
            "labels":{"dagster/run-id":"1c9bfa5c-7b7d-4c5e-9a58-2b3d6f0e8a11"},"annotations":{"short":"a","long":"LONG"},
            "ownerReferences":[{"kind":"Other","name":"o"},{"kind":"Job","name":"dagster-run","controller":true}]},
            "spec":{"nodeName":"n1"},"status":{"startTime":"2026-01-02T03:04:05Z"}}"#
            .replace("LONG", &"x".repeat(MAX_TEXT))
            .as_str(),
    )
    .unwrap();
    let (uid, pod) = Pod::of(object);
    assert_eq!((uid.as_str(), pod.dagster_run()), ("u", Some("1c9bfa5c-7b7d-4c5e-9a58-2b3d6f0e8a11")));
    assert_eq!(pod.annotations.keys().collect::<Vec<_>>(), ["short"]);
    let attributes: Vec<_> =
        pod.attributes().into_iter().map(|attribute| format!("{}={}", attribute.key, attribute.value)).collect();
    let expected = [
        "k8s.namespace.name=data",
        "k8s.pod.name=dagster-run-1",
        "k8s.node.name=n1",
        "k8s.pod.start_time=2026-01-02T03:04:05Z",
        "k8s.job.name=dagster-run",
    ];
    assert_eq!(attributes, expected);

    let pods = KnownPods::default();
    for n in 0..MAX_PODS + 10 {
        pods.put(serde_json::from_str(&format!(r#"{{"metadata":{{"uid":"{n}"}}}}"#)).unwrap());
    }
    assert_eq!(pods.count(), MAX_PODS as u64);
}
