//! Bad input: exit code 2 and one line that says what was tried, why not, and what to do.

use std::ffi::OsString;
use std::fs;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::time::Duration;

use floe_tests::{Agent, Finished, Run, can_trace, for_each, one_of, program, refused, skip};
use tempfile::TempDir;

fn floe_agent(words: &[&str]) -> Run {
    Run::new(Agent::binary()).args(words)
}

/// Exit code 2, nothing on standard output, one line that begins with the agent's name and contains all of these.
#[track_caller]
fn refuses(finished: &Finished, wanted: &[&str]) {
    let said = finished.err();
    assert_eq!(finished.code(), 2, "{finished}");
    assert_eq!(finished.out(), "", "{finished}");
    assert_eq!(said.lines().count(), 1, "one line was expected: {finished}");
    assert!(said.starts_with("floe-agent: "), "{finished}");
    for word in wanted {
        assert!(said.contains(word), "`{word}` was expected: {finished}");
    }
}

/// A command that leaves a file, which shows that it ran.
struct Marker(TempDir);

impl Marker {
    fn new() -> Self {
        Self(tempfile::tempdir().expect("a temporary folder can be made"))
    }

    fn path(&self) -> PathBuf {
        self.0.path().join("it-ran")
    }

    /// `exec` with these options and a command that leaves the file.
    fn exec(&self, options: &[&str]) -> Run {
        Run::new(Agent::binary()).arg("exec").args(options).args(["--", "/usr/bin/touch"]).arg(self.path())
    }

    #[track_caller]
    fn did_not_run(&self) {
        assert!(!self.path().exists(), "the command ran although the agent refused");
    }
}

#[test]
fn attaching_to_a_process_that_does_not_exist() {
    let Some(_alone) = can_trace() else { return };
    let gone = Run::new("/bin/true").start();
    let pid = gone.pid().to_string();
    gone.wait();
    refuses(&floe_agent(&["attach", &pid]).run(), &[&pid, "no such process"]);
}

#[test]
fn attaching_to_a_process_that_is_not_python() {
    let Some(_alone) = can_trace() else { return };
    let other = Run::new("/bin/sleep").arg("60").start();
    let pid = other.pid().to_string();
    refuses(&floe_agent(&["attach", &pid]).run(), &[&pid, "Python"]);
}

#[test]
fn interpreters_that_are_refused_are_named_and_run_untraced() {
    let Some(_alone) = can_trace() else { return };
    let refused = refused();
    if refused.is_empty() {
        skip("there is no debug, free-threaded or too old CPython");
        return;
    }
    for_each(refused, |interpreter| {
        let why = format!("3.{}", interpreter.minor);
        let why = if interpreter.minor < 8 { why.as_str() } else { interpreter.refused.unwrap_or_default() };
        let script = "import sys; print('ready', flush=True); sys.stdin.read(); sys.exit(5)";
        let mut program = interpreter.script(script).start();
        program.wait_for_output("ready");
        let pid = program.pid().to_string();
        refuses(&floe_agent(&["attach", &pid]).run(), &[&pid, why]);
        program.close_input();
        assert_eq!(program.wait().code(), 5);

        let outcome = Agent::new().probe("os:getenv").exec(&interpreter.script(script));
        assert_eq!(outcome.finished.expect(5), "ready\n");
        assert!(outcome.finished.err().contains(why), "the agent does not say why: {}", outcome.finished);
        assert_eq!(outcome.spans.len(), 0, "{outcome}");
    });
}

#[test]
fn options_and_values_that_are_not_known() {
    for (words, wanted) in [
        (&["exec", "--no-such-option", "--", "true"][..], "--no-such-option"),
        (&["attach"], "PID"),
        (&["attach", "not-a-number"], "not-a-number"),
        (&["attach", "-5"], "-5"),
        (&["exec"], "COMMAND"),
        (&["exec", "--"], "COMMAND"),
        (&["no-such-command"], "no-such-command"),
        (&["exec", "--output", "spans.csv", "--", "true"], "spans.csv"),
        (&["exec", "--otlp", "not a url", "--", "true"], "not a url"),
        (&["exec", "--otlp", "ftp://localhost:4317", "--", "true"], "ftp://localhost:4317"),
    ] {
        let finished = floe_agent(words).run();
        assert!(finished.code() == 2 && finished.out().is_empty(), "{words:?}: {finished}");
        assert!(finished.err().contains(wanted), "`{wanted}` was expected: {finished}");
    }
}

#[test]
fn a_probe_that_cannot_be_read_says_where_and_the_command_does_not_run() {
    for (probe, wanted) in [
        ("no-colon", ":"),
        ("m:f(x=arg0", ")"),
        ("m:f(x)", "`x`"),
        ("m:f(x=nonsense)", "nonsense"),
        ("m:f(x=arg0, x=arg1)", "twice"),
        ("m:f(thread.id=arg0)", "reserved"),
        ("", ":"),
    ] {
        let marker = Marker::new();
        refuses(&marker.exec(&["--probe", probe]).run(), &[wanted]);
        marker.did_not_run();
    }
}

#[test]
fn an_output_that_cannot_be_written_is_said_before_the_command_runs() {
    let Some(_alone) = can_trace() else { return };
    for file in ["/no/such/folder/spans.jsonl", "/proc/spans.jsonl"] {
        let marker = Marker::new();
        refuses(&marker.exec(&["--output", file]).run(), &[file]);
        marker.did_not_run();
    }
    let marker = Marker::new();
    refuses(&marker.exec(&["--pack", "/no/such/pack.yaml"]).run(), &["/no/such/pack.yaml"]);
    marker.did_not_run();
}

#[test]
fn a_command_that_is_not_found() {
    let Some(_alone) = can_trace() else { return };
    refuses(&floe_agent(&["exec", "--", "/no/such/command"]).run(), &["/no/such/command"]);
    refuses(&floe_agent(&["exec", "--", "no-such-command-anywhere"]).run(), &["no-such-command-anywhere"]);
    refuses(&floe_agent(&["exec", "--", "/etc/passwd"]).run(), &["/etc/passwd"]);
}

#[test]
fn a_probe_that_does_not_resolve_is_said_and_the_others_work() {
    let Some(_alone) = can_trace() else { return };
    for_each([one_of(&[12]), one_of(&[11])], |interpreter| {
        let agent = Agent::new().probes(&[
            "idle_target:work(t.n=arg0)",
            "idle_target:no_such_function",
            "idle_target:NoClass.method",
            "never_imported:f",
        ]);
        let outcome = agent.exec(&interpreter.program("idle.py"));
        outcome.finished.expect(0);
        let said = outcome.finished.err();
        assert!(said.contains("no_such_function") && said.contains("NoClass"), "{}", outcome.finished);
        assert_eq!(outcome.named("work").count(), 20, "{outcome}");
    });
}

#[test]
fn an_endpoint_that_cannot_be_reached_loses_spans_and_nothing_else() {
    let Some(_alone) = can_trace() else { return };
    let interpreter = one_of(&[12, 11]);
    // The second one accepts nothing and answers nothing.
    for endpoint in ["http://127.0.0.1:1", "http://192.0.2.1:4317"] {
        let agent = Agent::new().option("--otlp").option(endpoint).probe("idle_target:work(t.n=arg0)");
        let outcome = agent.limit(Duration::from_mins(1)).exec(&interpreter.program("idle.py"));
        assert_eq!(outcome.finished.expect(0), "ready\n");
        let said = outcome.finished.err();
        let lost = said.lines().any(|line| line.contains(endpoint) && line.contains("lost") && line.contains("20"));
        assert!(lost, "the loss of 20 spans is not reported: {}", outcome.finished);
        assert_eq!(outcome.named("work").count(), 20, "the file gets the spans all the same: {outcome}");
        assert!(outcome.finished.took < Duration::from_secs(25), "{}", outcome.finished);
    }
}

/// A copy of the agent that everybody may run.
fn copy_for_everybody(folder: &Path) -> PathBuf {
    let copy = folder.join("floe-agent");
    fs::copy(Agent::binary(), &copy).expect("the agent can be copied");
    for path in [folder, &copy] {
        fs::set_permissions(path, fs::Permissions::from_mode(0o755)).expect("they are ours");
    }
    copy
}

#[test]
fn without_privileges_the_missing_capability_is_named() {
    let Some(_alone) = can_trace() else { return };
    let folder = tempfile::tempdir().expect("a temporary folder can be made");
    let copy = copy_for_everybody(folder.path());
    let nobody = ["--reuid=65534", "--regid=65534", "--clear-groups", "--inh-caps=-all"];
    let run = Run::new("setpriv").args(nobody).arg(&copy).args(["exec", "--", "true"]);
    refuses(&run.folder(Path::new("/")).run(), &["CAP_"]);

    for capability in ["sys_admin", "sys_ptrace", "bpf", "perfmon", "dac_read_search"] {
        let name = format!("CAP_{}", capability.to_uppercase());
        let spans = folder.path().join(format!("{capability}.jsonl"));
        let mut words: Vec<OsString> =
            vec![format!("--bounding-set=-{capability}").into(), "--inh-caps=-all".into(), copy.clone().into()];
        words.extend(["exec".into(), "--no-packs".into(), "--output".into(), spans.clone().into()]);
        words.extend(["--probe".into(), "idle_target:work".into(), "--".into()]);
        words.extend([one_of(&[12]).path.clone().into(), "-B".into(), program("idle.py").into()]);
        let finished = Run::new("setpriv").args(words).run();
        if finished.code() == 2 {
            refuses(&finished, &[&name]);
        } else {
            // It can do without.
            assert_eq!(finished.expect(0), "ready\n");
            let text = fs::read_to_string(&spans).unwrap_or_default();
            assert!(text.contains("\"work\""), "without {name} it neither traces nor says so: {finished}");
        }
    }
}

#[test]
fn without_btf_or_bpf_it_says_so() {
    let Some(_alone) = can_trace() else { return };
    let agent = Agent::binary().display().to_string();
    let hide = format!("mount -t tmpfs none /sys/kernel/btf && exec '{agent}' exec -- true");
    let hidden = Run::new("unshare").args(["--mount", "--propagation", "private", "/bin/sh", "-c", &hide]).run();
    if hidden.code() == 1 || hidden.code() == 32 {
        skip(&format!("BTF cannot be hidden here: {}", hidden.err().trim()));
    } else {
        refuses(&hidden, &["BTF"]);
    }
    let without = one_of(&[12, 11]).program("without_bpf.py").arg(&agent).args(["exec", "--", "true"]).run();
    refuses(&without, &["bpf"]);
}
