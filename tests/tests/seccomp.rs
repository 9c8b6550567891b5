//! The seccomp profile of `deploy/`: the agent does all that it does under a filter made of that very file.

use std::{fs, path::PathBuf, thread, time::Duration};

use floe_tests::{Agent, KubernetesApi, Node, Run, can_trace, interpreters, pod};
use rustix::process::Signal;
use serde_json::{Value, json};

const RULES: &str = "discovery: {instrument: [{modules: [node_target]}]}\nkill_switch: {file: '{folder}/stop'}\n";

fn launcher() -> [String; 2] {
    let profile = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../deploy/seccomp.json");
    [env!("CARGO_BIN_EXE_under-seccomp").to_owned(), profile.to_string_lossy().into_owned()]
}

#[test]
fn the_filter_kills_what_is_not_in_the_profile() {
    let [launcher, profile] = launcher();
    assert_eq!(Run::new(&launcher).args([&profile, "/bin/true"]).run().code(), 0);
    let forbidden = Run::new(&launcher).args([&profile, "unshare", "--user", "/bin/true"]).run();
    assert_eq!(forbidden.code(), 128 + Signal::SYS.as_raw(), "{forbidden}");
}

#[test]
fn the_agent_needs_no_system_call_that_is_not_in_the_profile() {
    let Some(_alone) = can_trace() else { return };
    let [launcher, profile] = launcher();
    // What fails in a child of the agent's own, such as the trial of return probes, is a warning.
    let checks = |run: Run| {
        let doctor: Value = serde_json::from_str(&run.run().expect(0)).expect("doctor prints JSON");
        let checks = doctor["checks"].as_array().expect("there are checks").iter();
        checks.map(|check| (check["name"].to_string(), check["level"].to_string())).collect::<Vec<_>>()
    };
    let under = Run::new(&launcher).arg(&profile).arg(Agent::binary()).args(["doctor", "--json"]);
    assert_eq!(checks(under), checks(Run::new(Agent::binary()).args(["doctor", "--json"])));

    for (protocol, endpoint) in [("grpc", "http://localhost:9"), ("http/protobuf", "https://no-such-host.invalid:4318")]
    {
        let protocol = format!("OTEL_EXPORTER_OTLP_PROTOCOL={protocol}");
        let api = KubernetesApi::start([pod("a", &json!({}), &json!({}))]);
        let agent = Agent::new()
            .probe("node_target:work(t.n=arg0, t.r=return)")
            .option("--otlp")
            .option(endpoint)
            .option("--output")
            .option("console=all");
        let running: Vec<_> =
            interpreters().into_iter().map(|i| i.program("node_job.py").args(["3000", "0.05"]).start_ready()).collect();
        let words = ["env", protocol.as_str(), launcher.as_str(), profile.as_str()];
        let config = format!("{RULES}{}", api.settings("{folder}/token"));
        let mut node = Node::start_with(&agent, &words, &config);
        fs::write(node.file("token"), KubernetesApi::token()).expect("it can be written");
        for process in &running {
            node.wait_until("who ran before is traced", |node| node.spans_of(process.pid()) > 2);
        }
        for interpreter in interpreters() {
            let short = interpreter.program("node_job.py").args(["3", "0"]).start();
            let pid = short.pid();
            short.wait().expect(0);
            node.wait_until("who starts is traced", |node| node.spans_of(pid) == 3);
        }
        node.wait_until("the pods are known", |node| node.metric("floe_agent_pods") > 0.5);
        fs::write(node.file("stop"), "").expect("it can be made");
        node.wait_until("it is stopped", |node| node.get("/readyz").0 == 503);
        fs::remove_file(node.file("stop")).expect("it is there");
        node.wait_until("it goes on", |node| node.get("/readyz").0 == 200);
        node.configure("discovery: {instrument: [{user: nobody}]}\n");
        node.wait_until("all are let go of", |node| node.metric("floe_agent_functions") < 1.0);
        // Exports are tried again.
        thread::sleep(Duration::from_secs(2));
        for process in running {
            process.signal(Signal::KILL);
            process.wait();
        }
        node.stop();
    }
}
