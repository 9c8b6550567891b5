//! A Kubernetes API server as the agent knows it: the pods of a node, and what changes among them.

use std::{
    collections::BTreeMap,
    io::{BufRead as _, BufReader, Write as _},
    net::{SocketAddr, TcpListener, TcpStream},
    sync::{Arc, Condvar, Mutex},
    thread,
};

use serde_json::{Value, json};

/// What a service account's token must be.
const TOKEN: &str = "token-of-the-test";

/// The server. Its threads end with the test.
pub struct KubernetesApi {
    address: SocketAddr,
    state: Arc<(Mutex<State>, Condvar)>,
}

#[derive(Default)]
struct State {
    pods: BTreeMap<String, Value>,
    /// All that ever changed; the version of a list is how many these were.
    changes: Vec<Value>,
    /// Request lines.
    asked: Vec<String>,
}

/// A pod with these labels and annotations.
pub fn pod(uid: &str, labels: &Value, annotations: &Value) -> Value {
    json!({
        "kind": "Pod",
        "metadata": {
            "uid": uid, "name": format!("pod-{uid}"), "namespace": "data", "labels": labels, "annotations": annotations,
            "ownerReferences": [{"kind": "Job", "name": "nightly", "controller": true}],
        },
        "spec": {"nodeName": "node-1", "containers": [{"name": "main"}]},
        "status": {"phase": "Running", "startTime": "2026-01-02T03:04:05Z"},
    })
}

impl KubernetesApi {
    /// Starts one with these pods.
    pub fn start(pods: impl IntoIterator<Item = Value>) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").expect("there is a free port");
        let address = listener.local_addr().expect("it is bound");
        let this = Self { address, state: Arc::default() };
        for pod in pods {
            this.change("ADDED", pod);
        }
        let state = this.state.clone();
        thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                let state = state.clone();
                // A client that goes away in the middle ends this one connection.
                thread::spawn(move || answer(stream, &state).unwrap_or_default());
            }
        });
        this
    }

    /// What the agent's configuration says about it: with the token in this file.
    pub fn settings(&self, token_file: &str) -> String {
        format!("kubernetes: {{server: 'http://{}', node: node-1, token_file: '{token_file}'}}\n", self.address)
    }

    /// The token that it accepts.
    pub fn token() -> &'static str {
        TOKEN
    }

    /// A pod is `ADDED`, `MODIFIED` or `DELETED`.
    pub fn change(&self, kind: &str, mut pod: Value) {
        let mut state = self.state.0.lock().expect("no server thread panics");
        let uid = pod["metadata"]["uid"].as_str().expect("a pod has a uid").to_owned();
        pod["metadata"]["resourceVersion"] = (state.changes.len() + 1).to_string().into();
        if kind == "DELETED" {
            state.pods.remove(&uid);
        } else {
            state.pods.insert(uid, pod.clone());
        }
        state.changes.push(json!({"type": kind, "object": pod}));
        self.state.1.notify_all();
    }

    /// Request lines so far.
    pub fn asked(&self) -> Vec<String> {
        self.state.0.lock().expect("no server thread panics").asked.clone()
    }
}

fn answer(mut stream: TcpStream, (state, changed): &(Mutex<State>, Condvar)) -> std::io::Result<()> {
    let mut lines = BufReader::new(stream.try_clone()?).lines().map_while(Result::ok);
    let request = lines.next().unwrap_or_default();
    let authorized =
        lines.take_while(|line| !line.is_empty()).any(|line| line == format!("authorization: Bearer {TOKEN}"));
    let mut state = state.lock().expect("no server thread panics");
    state.asked.push(request.clone());
    if !authorized {
        return write!(
            stream,
            "HTTP/1.1 401 Unauthorized\r\nconnection: close\r\n\r\n{{\"message\":\"Unauthorized\"}}"
        );
    }
    write!(stream, "HTTP/1.1 200 OK\r\nconnection: close\r\n\r\n")?;
    if !request.contains("watch=1") {
        let items: Vec<_> = state.pods.values().cloned().collect();
        let version = state.changes.len().to_string();
        let list = json!({"kind": "PodList", "metadata": {"resourceVersion": version}, "items": items});
        return write!(stream, "{list}");
    }
    let version = request.rsplit_once("resourceVersion=").and_then(|(_, rest)| rest.split(' ').next()?.parse().ok());
    let mut seen: usize = version.unwrap_or(0);
    loop {
        while let Some(change) = state.changes.get(seen) {
            writeln!(stream, "{change}")?;
            seen += 1;
        }
        state = changed.wait(state).expect("no server thread panics");
    }
}
