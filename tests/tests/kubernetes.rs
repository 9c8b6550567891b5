//! Pods of the node, as the Kubernetes API tells them: rules by labels and annotations, resource attributes, Dagster's runs.

use std::{fs, net::TcpListener, path::Path, thread, time::Duration};

use floe_tests::{Agent, KubernetesApi, Node, Run, Running, can_trace, join_group, one_of, pod, program, skip};
use rustix::process::Signal;
use serde_json::{Value, json};

const RUN: &str = "1c9bfa5c-7b7d-4c5e-9a58-2b3d6f0e8a11";

fn agent() -> Agent {
    Agent::new().probe("node_target:work(t.n=arg0)")
}

fn uid(digit: char) -> String {
    let of = |count: usize| digit.to_string().repeat(count);
    format!("{}-{}-{}-{}-{}", of(8), of(4), of(4), of(4), of(12))
}

/// The job in a control group as the kubelet names them.
fn in_pod(folder: &Path, uid: &str) -> Run {
    let group = join_group(folder, &format!("kubepods/burstable/pod{uid}/{}", "c".repeat(64)));
    let interpreter = one_of(&[12, 11, 10]).path.display();
    let place = folder.display();
    let job = program("node_job.py");
    let script =
        format!("set -e; mount -t tmpfs none {place}; {group}exec {interpreter} -B {} 3000 0.05", job.display());
    Run::new("unshare").args(["--mount", "sh", "-c", &script])
}

fn end(process: Running) {
    process.signal(Signal::KILL);
    process.wait();
}

#[test]
fn rules_attributes_and_runs_come_from_the_pods_of_the_node() {
    let Some(_alone) = can_trace() else { return };
    let folder = tempfile::tempdir().expect("a temporary folder can be made");
    let place = folder.path().join("place");
    fs::create_dir(&place).expect("it can be made");
    let attempt = in_pod(&place, &uid('f')).start();
    thread::sleep(Duration::from_millis(300));
    let mut attempt = attempt;
    if attempt.has_ended() {
        skip(&format!("no control groups of version 2: {}", attempt.error().trim()));
        return;
    }
    end(attempt);

    let etl = json!({"team": "etl", "dagster/run-id": RUN, "other": "x"});
    let off = json!({"floe.dev/trace": "off"});
    let api = KubernetesApi::start([
        pod(&uid('a'), &etl, &json!({})),
        pod(&uid('b'), &json!({"team": "web"}), &json!({})),
        pod(&uid('c'), &etl, &off),
    ]);
    let rules = "discovery: {instrument: [{k8s_pod_labels: {team: etl}}], \
                 exclude_instrument: [{k8s_pod_annotations: {floe.dev/trace: 'off'}}]}\n";
    let before = in_pod(&place, &uid('a')).start_ready();
    let token = folder.path().join("token");
    fs::write(&token, KubernetesApi::token()).expect("it can be written");
    let mut node = Node::start(&agent(), &format!("{rules}{}", api.settings(&token.to_string_lossy())));
    node.wait_until("the pods are known", |node| node.metric("floe_agent_pods") > 2.5);
    node.wait_until("who ran before is traced", |node| node.spans_of(before.pid()) > 2);

    let [a, b, c, later] = ['a', 'b', 'c', 'd'].map(|digit| in_pod(&place, &uid(digit)).start_ready());
    node.wait_until("a pod of the rule is traced", |node| node.spans_of(a.pid()) > 2);
    // Those that are not were looked at before this one was.
    node.wait_until("all were looked at", |node| node.metric("floe_agent_processes_seen_total") > 3.5);
    assert_eq!([&b, &c, &later].map(|process| node.spans_of(process.pid())), [0, 0, 0]);

    api.change("ADDED", pod(&uid('d'), &etl, &json!({})));
    node.wait_until("a pod that is known later is traced then", |node| node.spans_of(later.pid()) > 2);
    assert_eq!([&b, &c].map(|process| node.spans_of(process.pid())), [0, 0]);
    api.change("DELETED", pod(&uid('d'), &etl, &json!({})));
    node.wait_until("it is forgotten", |node| node.metric("floe_agent_pods") < 3.5);

    let (pid_before, pid) = (before.pid(), a.pid());
    [before, a, b, c, later].into_iter().for_each(end);
    let outcome = node.stop();
    outcome.nothing_lost();
    for pid in [pid_before, pid] {
        let span = outcome.named("work").find(|span| span.pid == pid).expect("it was traced");
        assert_eq!(span.trace, RUN.replace('-', ""), "{outcome}");
        let text = |name: &str| span.resource.get(name).and_then(Value::as_str);
        for (name, expected) in [
            ("k8s.pod.uid", Some(uid('a').as_str())),
            ("k8s.pod.name", Some(format!("pod-{}", uid('a')).as_str())),
            ("k8s.namespace.name", Some("data")),
            ("k8s.node.name", Some("node-1")),
            ("k8s.job.name", Some("nightly")),
            ("k8s.pod.start_time", Some("2026-01-02T03:04:05Z")),
            ("k8s.pod.label.dagster/run-id", Some(RUN)),
            ("k8s.pod.label.other", None),
        ] {
            assert_eq!(text(name), expected, "{name}: {:?}", span.resource);
        }
    }
    let asked = api.asked();
    assert!(asked.iter().all(|line| line.contains("fieldSelector=spec.nodeName%3Dnode-1")), "{asked:?}");
}

#[test]
fn the_agent_traces_while_the_api_is_not_there_does_not_answer_or_refuses() {
    let Some(_alone) = can_trace() else { return };
    let interpreter = one_of(&[12, 11, 10]);
    let silent = TcpListener::bind("127.0.0.1:0").expect("there is a free port");
    let silent = silent.local_addr().map(|address| (silent, address)).expect("it is bound");
    let nobody = TcpListener::bind("127.0.0.1:0").and_then(|listener| listener.local_addr()).expect("there is a port");
    let refusing = KubernetesApi::start([]);
    let folder = tempfile::tempdir().expect("a temporary folder can be made");
    let token = folder.path().join("token");
    fs::write(&token, "another").expect("it can be written");
    let token = token.to_string_lossy();
    let other = |address| format!("kubernetes: {{server: 'http://{address}', node: n1, token_file: '{token}'}}\n");
    for (settings, fails) in [(other(silent.1), false), (other(nobody), true), (refusing.settings(&token), true)] {
        let rules = "discovery: {instrument: [{modules: [node_target]}]}\n";
        let mut node = Node::start(&agent(), &format!("{rules}{settings}"));
        let short = interpreter.program("node_job.py").args(["3", "0"]).start();
        let pid = short.pid();
        short.wait().expect(0);
        node.wait_until("it is traced", |node| node.spans_of(pid) == 3);
        node.wait_until("failures are counted", |node| {
            !fails || node.metric("floe_agent_kubernetes_failures_total") > 0.0
        });
        assert_eq!(node.get("/readyz").0, 200);
        let outcome = node.stop();
        let said = outcome.finished.err();
        assert_eq!(said.matches("cannot be read from the Kubernetes API").count(), usize::from(fails), "{said}");
    }
}
