//! NOTHING FOR THE REST: what is not traced pays nothing; what is traced pays for imports and armed calls only.

use std::fs;
use std::os::unix::fs::symlink;
use std::path::Path;

use floe_tests::{Agent, Interpreter, Run, can_trace, for_each, interpreters, program, skip};
use serde_json::Value;
use tempfile::TempDir;

/// A copy of an interpreter's files, so that no other process of this machine has them.
struct Private {
    folder: TempDir,
    interpreter: Interpreter,
}

impl Private {
    fn copy(interpreter: &Interpreter) -> Self {
        let question = "import sys, sysconfig\n\
            maps = [line.split(None, 5)[5].strip() for line in open('/proc/self/maps') if 'libpython' in line]\n\
            print(sysconfig.get_paths()['stdlib'], *maps[:1])";
        let answer = interpreter.script(question).run().expect(0);
        let (stdlib, library) = answer.trim().split_once(' ').unwrap_or((answer.trim(), ""));
        let folder = tempfile::tempdir().expect("a temporary folder can be made");
        let name = format!("python3.{}", interpreter.minor);
        for child in ["bin", "lib"] {
            fs::create_dir(folder.path().join(child)).expect("the folder is ours");
        }
        let path = folder.path().join("bin").join(&name);
        fs::copy(&interpreter.path, &path).expect("an interpreter can be copied");
        symlink(stdlib, folder.path().join("lib").join(&name)).expect("the folder is ours");
        if let Some(file) = Path::new(library).file_name() {
            fs::copy(library, folder.path().join("lib").join(file)).expect("a library can be copied");
        }
        Self { interpreter: Interpreter { path, ..interpreter.clone() }, folder }
    }

    /// A program, after one that does nothing: with it the agent gets to know the interpreter file.
    fn program(&self, options: &str, name: &str, arguments: &str) -> Run {
        let (python, pause, program) = (self.interpreter.path.display(), program("pause.py"), program(name));
        let (pause, program) = (pause.display(), program.display());
        let script = format!("'{python}' -S -I -B '{pause}'; exec '{python}' -B {options} '{program}' {arguments}");
        self.here(Run::shell(&script))
    }

    /// With the libraries of the copy.
    fn here(&self, run: Run) -> Run {
        run.variable("LD_LIBRARY_PATH", self.folder.path().join("lib"))
    }
}

#[test]
fn a_process_that_is_not_selected_has_one_probe_hit_in_its_life() {
    let Some(_alone) = can_trace() else { return };
    for_each(interpreters(), |interpreter| {
        let private = Private::copy(interpreter);
        let agent = Agent::new().probe("idle_target:work(t.n=arg0)");
        let mut tracing = agent.start(&private.program("", "idle.py", ""));
        tracing.agent.wait_for_output("ready");
        let rest = private.here(private.interpreter.program("evals.py")).run();
        assert_eq!(rest.expect(0), "4999950000 5\n");
        tracing.agent.close_input();
        let outcome = tracing.wait();
        outcome.finished.expect(0);
        assert_eq!(outcome.named("work").count(), 20, "{outcome}");
        for (counter, hits) in [("run_main_hits_not_selected", 1), ("gate_hits_not_selected", 0), ("calls", 20)] {
            assert_eq!(outcome.counter(counter), hits, "{counter} of {outcome}");
        }
    });
}

#[test]
fn the_hits_of_a_selected_process_are_its_imports_and_its_armed_calls() {
    let Some(_alone) = can_trace() else { return };
    for_each(interpreters(), |interpreter| {
        let private = Private::copy(interpreter);
        let programs = program("hits.py").parent().expect("it is in a folder").display().to_string();
        let run = private.program("-S -I", "hits.py", &format!("'{programs}'"));
        let agent = Agent::new().probes(&[
            "unharmed_target:outer",
            "unharmed_target:inner",
            "unharmed_target:quick(t.n=arg0)",
            "unharmed_target:recurse",
        ]);
        let outcome = agent.exec(&run);
        let counted: Value = serde_json::from_str(&outcome.finished.expect(0)).expect("the program prints JSON");
        let (modules, calls) = (counted["modules"].as_u64(), counted["calls"].as_u64());
        outcome.nothing_lost();
        assert_eq!(Some(outcome.counter("calls")), calls, "{outcome}");
        assert_eq!(Some(outcome.counter("returns")), calls, "{outcome}");
        assert_eq!(Some(outcome.counter("loader_hits")), modules, "{outcome}");
        assert_eq!(
            outcome.counter("gate_hits"),
            outcome.counter("loader_hits") + outcome.counter("calls"),
            "{outcome}"
        );
        assert_eq!(outcome.spans.len() as u64, outcome.counter("calls"), "{outcome}");
        for counter in ["unknown_functions", "functions_with_other_code", "missed_returns", "calls_too_deep"] {
            assert_eq!(outcome.counter(counter), 0, "{counter} of {outcome}");
        }
    });
}

#[test]
fn a_program_that_raises_its_recursion_limit_recurses_as_deep_as_untraced() {
    let Some(_alone) = can_trace() else { return };
    // Up to 3.10 every call needs C stack, so that no program can go that deep.
    let able: Vec<_> = interpreters().into_iter().filter(|interpreter| interpreter.minor >= 11).collect();
    if able.is_empty() {
        skip("there is no CPython from 3.11 on");
        return;
    }
    for_each(able, |interpreter| {
        for when in ["before", "after", "inside", "thread"] {
            let run = interpreter.program("deep.py").arg(when);
            let untraced = run.run();
            assert_eq!(untraced.code(), 0, "{untraced}");
            let outcome =
                Agent::new().probes(&["unharmed_target:around", "unharmed_target:quick(t.n=arg0)"]).exec(&run);
            let traced = (outcome.finished.code(), outcome.finished.out());
            assert_eq!(traced, (0, untraced.out()), "{when}: {}", outcome.finished);
            // On 3.11, a limit that is raised first leaves nothing that could be seen; the agent says so.
            let said = outcome.finished.err().contains("calls from Python to Python are not seen");
            assert!(said || outcome.named("quick").count() >= 1, "{when}: no call was seen: {outcome}");
            assert!(!said || interpreter.minor == 11, "{when}: {outcome}");
        }
    });
}
