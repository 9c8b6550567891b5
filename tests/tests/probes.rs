//! `floe-agent probes`: what it says of processes and environments. It needs no BPF.

use floe_tests::{Agent, Finished, Interpreter, Run, for_each, interpreters, one_of};
use serde_json::Value;

fn probes(words: &[&str]) -> Finished {
    Run::new(Agent::binary()).arg("probes").args(words).run()
}

/// The verdicts of `probes check --json`, by function.
fn verdicts(finished: &Finished) -> Vec<(String, String)> {
    let checked: Value = serde_json::from_str(&finished.out()).expect("it prints JSON");
    let text = |probe: &Value, name: &str| probe[name].as_str().expect("it is a text").to_owned();
    let probes = checked["probes"].as_array().expect("it has probes");
    probes.iter().map(|probe| (text(probe, "target"), text(probe, "verdict"))).collect()
}

const CHECK: [&str; 11] = [
    "check",
    "--json",
    "--no-packs",
    "--probe",
    "idle_target:work",
    "--probe",
    "idle_target:nothing",
    "--probe",
    "no_such_module:f",
    "--probe",
    "json.decoder:JSONDecoder.decode",
];

fn expected(verdicts: [&str; 4]) -> Vec<(String, String)> {
    let targets = ["idle_target:work", "idle_target:nothing", "no_such_module:f", "json.decoder:JSONDecoder.decode"];
    targets.iter().zip(verdicts).map(|(target, verdict)| ((*target).to_owned(), verdict.to_owned())).collect()
}

#[test]
fn a_process_is_checked_by_reading_it() {
    for_each(interpreters(), |interpreter: &Interpreter| {
        let mut program = interpreter.program("idle.py").start();
        program.wait_for_output("ready");
        let pid = program.pid().to_string();
        let mut words = CHECK.to_vec();
        words.push(&pid);
        let checked = probes(&words);
        checked.expect(1);
        // What a process has not imported does not apply to it.
        assert_eq!(
            verdicts(&checked),
            expected(["resolves", "fails", "does_not_apply", "does_not_apply"]),
            "{checked}"
        );
        program.close_input();
        program.wait().expect(0);
    });
}

#[test]
fn an_environment_is_checked_by_importing_what_the_probes_name() {
    for_each(interpreters(), |interpreter: &Interpreter| {
        let programs = floe_tests::program("idle_target.py");
        let run = Run::new(Agent::binary()).arg("probes").args(CHECK).arg(&interpreter.path);
        let checked = run.folder(programs.parent().expect("it is in a folder")).run();
        checked.expect(1);
        assert_eq!(verdicts(&checked), expected(["resolves", "fails", "fails", "resolves"]), "{checked}");
    });
    let python = one_of(&[12, 11]).path.display().to_string();
    let fits = probes(&["check", "--no-packs", "--probe", "json.decoder:JSONDecoder.decode", &python]);
    assert!(fits.expect(0).contains("1 of the 1 probes that apply resolve"), "{fits}");
}

#[test]
fn what_cannot_be_checked_is_one_line() {
    for (target, why) in [
        ("4194303", "there is no such process"),
        ("1", "cannot check process 1: "),
        ("/etc", "there is no bin/python3 in it"),
        ("/bin/true", "it ended while it imported modules, or is no Python"),
    ] {
        let checked = probes(&["check", target]);
        assert_eq!(checked.code(), 2, "{checked}");
        let error = checked.err();
        assert!(error.contains(why) && error.trim_end().lines().count() == 1, "{checked}");
    }
}

#[test]
fn probes_are_listed_and_shown() {
    let listed = probes(&["list"]).expect(0);
    assert!(listed.lines().any(|line| line.starts_with("dbt ") && line.contains("dbt.task.base:")), "{listed}");
    let shown = probes(&["show", "command"]).expect(0);
    assert!(shown.contains("dbt.cli.requires:postflight.<locals>.wrapper") && shown.contains("dbt.command"), "{shown}");
    assert_eq!(probes(&["show", "nothing"]).code(), 2);
    let schema: Value = serde_json::from_str(&probes(&["schema"]).expect(0)).expect("it is JSON");
    assert!(schema["properties"]["probes"].is_object(), "{schema}");
}

#[test]
fn a_reader_that_stops_early_is_no_error() {
    // The reader is gone when the first line is written.
    let cut = Run::shell(&format!("{{ sleep 0.5; '{}' probes list; }} | true", Agent::binary().display())).run();
    cut.expect(0);
    assert_eq!(cut.err(), "");
}
