//! Names of a real dbt resolve from outside. Needs virtual environments with dbt-core: `FLOE_TEST_DBT_VENVS`, paths
//! separated by colons; skips, and says so, without.

use std::io::{BufRead as _, BufReader, Write as _};
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Instant;

use floe_agent::python::identify::{Interpreter, locate};
use floe_agent::python::memory::{CachedMemory, ProcessMemory};
use floe_agent::python::resolve::Resolver;
use floe_agent::units::Pid;

const SCRIPT: &str = "
import gc, json, sys
import dbt.cli.main, dbt.cli.requires, dbt.version, dbt.task.run, dbt.adapters.sql.connections
def gc_probe(): pass
wrapped = {c.co_name: c for c in dbt.cli.requires.postflight.__code__.co_consts if hasattr(c, 'co_name')}
code = wrapped['wrapper']
ids = [id(o) for o in gc.get_objects() if type(o) is type(gc_probe) and o.__code__ is code]
print(json.dumps({'wrappers': ids, 'version': dbt.version.__version__}), flush=True)
sys.stdin.readline()
";

#[test]
fn names_of_a_real_dbt_resolve() {
    let Ok(venvs) = std::env::var("FLOE_TEST_DBT_VENVS") else {
        eprintln!("SKIPPED: FLOE_TEST_DBT_VENVS names no virtual environments with dbt");
        return;
    };
    for venv in venvs.split(':').filter(|venv| !venv.is_empty()) {
        let mut child = Command::new(Path::new(venv).join("bin/python"))
            .args(["-c", SCRIPT])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let mut line = String::new();
        BufReader::new(child.stdout.take().unwrap())
            .read_line(&mut line)
            .unwrap();
        let said: serde_json::Value = serde_json::from_str(&line).unwrap();
        let pid = Pid(child.id());
        let located = locate(pid, &[]).unwrap();
        let memory = CachedMemory::new(ProcessMemory::new(pid));
        let begin = Instant::now();
        let interpreter = Interpreter::verify(&memory, &located.file, located.bias).unwrap();
        let verified = begin.elapsed();
        interpreter.gate(&memory, &located.file).unwrap();
        let modules = interpreter.modules(&memory, interpreter.main).unwrap();
        let resolver = Resolver::new(interpreter.heap(&memory), modules);

        memory.clear();
        let begin = Instant::now();
        let found = resolver
            .resolve(
                "dbt.cli.requires",
                "postflight.<locals>.wrapper",
                &["dbt.cli.main"],
            )
            .unwrap();
        let searched = begin.elapsed();
        let mut functions: Vec<u64> = found.iter().map(|found| found.function.0).collect();
        let mut expected: Vec<u64> = said["wrappers"]
            .as_array()
            .unwrap()
            .iter()
            .map(|id| id.as_u64().unwrap())
            .collect();
        functions.sort_unstable();
        expected.sort_unstable();
        assert_eq!(functions, expected, "{venv}");
        assert!(functions.len() >= 13, "{venv}: {}", functions.len());

        memory.clear();
        let begin = Instant::now();
        let direct = [
            ("dbt.task.run", "ModelRunner.execute"),
            ("dbt.task.runnable", "GraphRunnableTask.run"),
            ("dbt.task.base", "BaseRunner.compile_and_execute"),
            ("dbt.compilation", "Compiler.compile_node"),
            ("dbt.parser.manifest", "ManifestLoader.get_full_manifest"),
            (
                "dbt.adapters.sql.connections",
                "SQLConnectionManager.add_query",
            ),
            ("dbt_common.events.event_manager", "EventManager.fire_event"),
            ("contextlib", "_GeneratorContextManager.__exit__"),
            ("dbt.cli.main", "dbtRunner.invoke"),
        ];
        for (module, qualname) in direct {
            let found = resolver
                .resolve(module, qualname, &[])
                .unwrap_or_else(|e| panic!("{venv}: {qualname}: {e}"));
            assert!(found[0].exact, "{venv}: {qualname}");
        }
        let each = begin.elapsed() / direct.len() as u32;
        // A click command: the body behind a chain of decorators.
        let build = resolver
            .resolve("dbt.cli.main", "build", &[])
            .unwrap()
            .remove(0);
        assert!(
            build.exact && build.filename.ends_with("dbt/cli/main.py"),
            "{venv}: {build:?}"
        );
        assert_eq!(
            resolver
                .module_attribute_str("dbt.version", "__version__")
                .unwrap(),
            said["version"]
        );
        eprintln!(
            "{venv}: CPython {}, {} wrappers, verified in {verified:?}, searched in {searched:?}, {each:?} each",
            interpreter.version(),
            functions.len()
        );
        let _ = writeln!(child.stdin.take().unwrap());
        child.wait().unwrap();
    }
}
