//! One run is one trace, in each way to launch a Dagster run, with dbt inside.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::env;
use std::fs;
use std::time::Duration;

use floe_tests::dagster::Instance;
use floe_tests::dbt::{Project, node_logs};
use floe_tests::{Agent, Outcome, Run, Span, can_trace, fixture, programs, say};
use serde_json::Value;

const LIMIT: Duration = Duration::from_mins(5);

/// Spans that are once in a run of `launches.py`, and their parents.
const ONCE: [(&str, &str); 20] = [
    ("dagster.step.payments", "run"),
    ("dagster.asset.payments", "dagster.step.payments"),
    ("dagster.asset_check.stg_payments.unique_stg_payments_payment_id", "dagster.asset.payments"),
    ("dagster.asset_check.stg_payments.not_null_stg_payments_payment_id", "dagster.asset.payments"),
    (
        "dagster.asset_check.stg_payments.accepted_values_stg_payments_method__card__transfer__coupon",
        "dagster.asset.payments",
    ),
    ("dbt.build", "dagster.asset.payments"),
    ("dbt.manifest", "dbt.build"),
    ("dbt.manifest.load", "dbt.manifest"),
    ("dbt.graph", "dbt.build"),
    ("dbt.operation.jaffle-on-run-start-0", "dbt.build"),
    ("dbt.operation.jaffle-on-run-start-1", "dbt.build"),
    ("dbt.operation.jaffle-on-run-end-0", "dbt.build"),
    ("dbt.operation.jaffle-on-run-end-1", "dbt.build"),
    ("dbt.seed.raw_payments", "dbt.build"),
    ("dbt.model.stg_payments", "dbt.build"),
    ("dbt.test.unique_stg_payments_payment_id", "dbt.build"),
    ("dbt.test.not_null_stg_payments_payment_id", "dbt.build"),
    ("dbt.test.accepted_values_stg_payments_method__card__transfer__coupon", "dbt.build"),
    ("dagster.step.report", "run"),
    ("dagster.asset.report", "dagster.step.report"),
];
/// Nodes and hooks with the two phases.
const NODES: [&str; 9] = [
    "dbt.operation.jaffle-on-run-start-0",
    "dbt.operation.jaffle-on-run-start-1",
    "dbt.operation.jaffle-on-run-end-0",
    "dbt.operation.jaffle-on-run-end-1",
    "dbt.seed.raw_payments",
    "dbt.model.stg_payments",
    "dbt.test.unique_stg_payments_payment_id",
    "dbt.test.not_null_stg_payments_payment_id",
    "dbt.test.accepted_values_stg_payments_method__card__transfer__coupon",
];
/// What sends statements; one may have to begin a transaction first.
const STATEMENTS: [&str; 3] = ["sql", "dbt.build", "dbt.execute"];

/// A project of dbt that Dagster can load, and an instance that does.
struct Shop {
    project: Project,
    instance: Instance,
}

impl Shop {
    /// On the newest interpreter that has an environment.
    fn new() -> Option<Self> {
        let bin = programs("FLOE").into_iter().next_back()?;
        let project = Project::copy();
        project.dbt(&bin, &["parse"]).run().expect(0);
        let instance = Instance::new(&bin).variable("SHOP_DBT", project.path());
        Some(Self { project, instance })
    }

    /// The newest run, as Dagster recorded it.
    #[track_caller]
    fn run(&self) -> Value {
        let run = self.instance.recorded()["runs"][0].clone();
        assert_eq!(run["status"], "SUCCESS", "{run:#}");
        run
    }

    /// Checks the logs of dbt in this run.
    #[track_caller]
    fn check_logs(&self, outcome: &Outcome) {
        let folders = fs::read_dir(self.project.path().join("target")).expect("dagster-dbt made it");
        let named = folders.map(|entry| entry.expect("it can be read").path());
        let of_runs =
            named.filter(|path| path.file_name().is_some_and(|name| name.to_string_lossy().starts_with("payments-")));
        let [folder] = &of_runs.collect::<Vec<_>>()[..] else { panic!("one command of dbt was expected") };
        let about_nodes = node_logs(&folder.join("dbt.log"), outcome);
        let nodes = NODES.iter().filter(|name| !name.starts_with("dbt.operation.")).count();
        assert!(about_nodes >= 2 * nodes, "{about_nodes} records about nodes");
    }

    /// Creates a run of `in_pods`, which `node.py` then can start.
    fn launch(&self) {
        let settings = self.instance.path().join("dagster.yaml");
        let known = fs::read_to_string(&settings).expect("it is in the fixture");
        let launcher = "run_launcher: {module: pods, class: Launcher}\n\
            run_coordinator: {module: dagster._core.run_coordinator, class: DefaultRunCoordinator}\n";
        fs::write(&settings, known + launcher).expect("the folder is ours");
        self.in_pods("dagster", &["job", "launch", "-f", "launches.py", "-j", "in_pods"]).run().expect(0);
    }

    /// A command that can import `pods.py`, and find `dagster` as in an image.
    fn in_pods(&self, program: &str, words: &[&str]) -> Run {
        let path = format!("{}:{}", self.instance.bin().display(), env::var("PATH").unwrap_or_default());
        self.instance.command(program, words).variable("PYTHONPATH", self.instance.path()).variable("PATH", path)
    }
}

/// The spans of a trace by their names and those of their parents, and how often.
type Tree = BTreeMap<(String, String), usize>;

/// Checks that spans are one tree, below the run.
#[track_caller]
fn tree(spans: &[&Span], run: &Value) -> Tree {
    let text = |name: &str| run[name].as_str().expect("it is a text");
    let trace = text("run_id").replace('-', "");
    let by_id: HashMap<&str, &Span> = spans.iter().map(|span| (span.id.as_str(), *span)).collect();
    assert_eq!(by_id.len(), spans.len(), "ids are unique");
    let name = |span: &Span| match span.kind {
        3 => "sql".to_owned(),
        _ if span.name == format!("dagster.run.{}", text("job")) => "run".to_owned(),
        _ => span.name.clone(),
    };
    let mut tree = Tree::new();
    for span in spans {
        assert_eq!(span.trace, trace, "{span:?}");
        assert!(span.get("floe.incomplete").is_none(), "{span:?}");
        let parent = span
            .parent
            .as_deref()
            .map(|id| by_id.get(id).unwrap_or_else(|| panic!("{}: its parent {id} is not there", span.name)));
        *tree.entry((name(span), parent.map_or_else(String::new, |parent| name(parent)))).or_default() += 1;
        // To the root.
        let (mut at, mut steps) = (*span, 0);
        while let Some(parent) = &at.parent {
            (at, steps) = (by_id[parent.as_str()], steps + 1);
            assert!(steps < 100, "{}: a circle", span.name);
        }
        assert_eq!(name(at), "run");
    }
    tree
}

/// The table as a tree.
fn expected(run: &Value) -> Tree {
    let events = run["events"].as_array().expect("a list").iter();
    let resources = events.filter(|event| event["type"] == "RESOURCE_INIT_STARTED").count();
    let once = ONCE.iter().map(|pair| (*pair, 1));
    let phases = NODES.iter().flat_map(|node| [(("dbt.compile", *node), 1), (("dbt.execute", *node), 1)]);
    let others = [
        (("run", ""), 1),
        (("dagster.resources.init", "run"), resources),
        (("dagster.io_manager.handle_output", "dagster.step.report"), 1),
    ];
    let all = once.chain(phases).chain(others).chain(STATEMENTS.iter().map(|parent| (("sql", *parent), 1)));
    all.map(|((name, parent), count)| ((name.to_owned(), parent.to_owned()), count)).collect()
}

/// Checks that the spans are the run as the table has it.
#[track_caller]
fn check(spans: &[&Span], run: &Value) {
    let mut found = tree(spans, run);
    // How many statements a node needs is dbt's own business.
    for ((name, _), count) in &mut found {
        if name == "sql" {
            *count = 1;
        }
    }
    let expected = expected(run);
    let differs: Vec<_> = found.iter().filter(|(pair, count)| expected.get(pair) != Some(count)).collect();
    let missing: Vec<_> = expected.iter().filter(|(pair, count)| found.get(pair) != Some(count)).collect();
    assert!(differs.is_empty() && missing.is_empty(), "there is {differs:#?}\nexpected was {missing:#?}");
    // It only waits for the other asset, and reads nothing.
    let upstream = one(spans, "dagster.step.payments");
    for name in ["dagster.step.report", "dagster.asset.report"] {
        assert_eq!(one(spans, name).links, [(upstream.trace.clone(), upstream.id.clone())], "{name}");
    }
}

/// The one span of this name.
#[track_caller]
fn one<'a>(spans: &[&'a Span], name: &str) -> &'a Span {
    let found: Vec<_> = spans.iter().filter(|span| span.name == name).collect();
    let [span] = found[..] else { panic!("{} spans `{name}`", found.len()) };
    span
}

fn all(outcome: &Outcome) -> Vec<&Span> {
    outcome.spans.iter().collect()
}

#[test]
fn a_run_in_one_process_is_one_tree_down_to_the_statements_of_dbt() {
    let Some(_alone) = can_trace() else { return };
    let Some(shop) = Shop::new() else { return };
    let outcome = shop.instance.traced(&["job", "execute", "-f", "launches.py", "-j", "in_one_process"], 0);
    check(&all(&outcome), &shop.run());
    let spans = all(&outcome);
    assert_eq!(one(&spans, "dagster.step.payments").pid, one(&spans, "dagster.run.in_one_process").pid);
    assert_ne!(one(&spans, "dbt.build").pid, one(&spans, "dagster.step.payments").pid);
    // In the order of Dagster's sets, which is another one each time.
    let keys = one(&spans, "dagster.asset.payments").get("dagster.asset_keys").and_then(Value::as_array);
    let keys: BTreeSet<_> = keys.expect("a list").iter().filter_map(Value::as_str).collect();
    assert_eq!(keys, BTreeSet::from(["raw_payments", "stg_payments"]));
    shop.check_logs(&outcome);
}

#[test]
fn steps_in_processes_of_their_own_are_in_the_tree_of_their_run() {
    let Some(_alone) = can_trace() else { return };
    let Some(shop) = Shop::new() else { return };
    let outcome = shop.instance.traced(&["job", "execute", "-f", "launches.py", "-j", "in_many_processes"], 0);
    check(&all(&outcome), &shop.run());
    let spans = all(&outcome);
    let run = one(&spans, "dagster.run.in_many_processes").pid;
    let steps = ["dagster.step.payments", "dagster.step.report"].map(|name| one(&spans, name).pid);
    assert!(steps[0] != steps[1] && !steps.contains(&run));
    shop.check_logs(&outcome);
}

#[test]
fn runs_and_steps_in_containers_are_one_tree() {
    let Some(_alone) = can_trace() else { return };
    let Some(shop) = Shop::new() else { return };
    shop.launch();
    let node = shop.in_pods("python", &["node.py", "", "3"]);
    let outcome = Agent::with_packs().limit(LIMIT).exec(&node);
    outcome.finished.expect(0);
    outcome.nothing_lost();
    check(&all(&outcome), &shop.run());
    shop.check_logs(&outcome);
}

#[test]
fn two_agents_that_never_talk_see_the_same_tree() {
    let Some(_alone) = can_trace() else { return };
    let Some(shop) = Shop::new() else { return };
    shop.launch();
    // The second agent is there before the first step is.
    let mut steps = Agent::with_packs().limit(LIMIT).start(&shop.in_pods("python", &["node.py", "step-", "2"]));
    steps.agent.close_input();
    let run = Agent::with_packs().limit(LIMIT).exec(&shop.in_pods("python", &["node.py", "run", "1"]));
    let steps = steps.wait();
    for outcome in [&run, &steps] {
        outcome.finished.expect(0);
        outcome.nothing_lost();
        assert!(!outcome.spans.is_empty());
    }
    check(&run.spans.iter().chain(&steps.spans).collect::<Vec<_>>(), &shop.run());
}

#[test]
fn compilation_orchestration_and_dbt_of_one_process_tree_or_one_run_id_are_one_trace() {
    let Some(_alone) = can_trace() else { return };
    let Some(shop) = Shop::new() else { return };
    let floe = fixture("floe");
    let compile = "floe platform compile --spec customer-orders/floe.yaml --manifest manifest.yaml --output out.json";
    let run = "dagster job execute -f launches.py -j in_one_process";
    let script = format!("(cd {} && {compile}) && {run}; exit $?", floe.path().display());
    let all_of_it = || shop.in_pods("/bin/sh", &["-c", &script]);
    let agent = || Agent::with_packs().limit(LIMIT);

    // One process tree: the shell is the root, and the run's id that of the trace.
    let tree = agent().option("--set").option("correlation.programs=sh").exec(&all_of_it());
    tree.finished.expect(0);
    tree.nothing_lost();
    let trace = shop.run()["run_id"].as_str().expect("a text").replace('-', "");
    // One run id.
    let given = agent().exec(&all_of_it().variable("FLOE_RUN_ID", "release 7"));
    given.finished.expect(0);
    for (outcome, trace) in [(&tree, Some(trace)), (&given, None)] {
        let spans = all(outcome);
        let trace = trace.unwrap_or_else(|| spans[0].trace.clone());
        for span in &spans {
            assert_eq!(span.trace, trace, "{}\n{outcome}", span.name);
        }
        for name in
            ["floe.compile", "floe.compile.stage6", "dagster.run.in_one_process", "dbt.build", "dbt.model.stg_payments"]
        {
            one(&spans, name);
        }
    }
    let spans = all(&tree);
    let roots: Vec<_> = spans.iter().filter(|span| span.parent.is_none()).collect();
    let [root] = roots[..] else { panic!("{} roots\n{tree}", roots.len()) };
    assert_eq!(root.int("process.exit.code"), Some(0), "the shell is the root\n{tree}");
    for span in &spans {
        assert!(span.id == root.id || ancestors(span, &spans).any(|above| above.id == root.id), "{}", span.name);
    }
}

#[test]
fn a_run_that_a_schedule_launches_under_dagster_dev_is_a_tree_and_its_request_leads_to_it() {
    let Some(_alone) = can_trace() else { return };
    let Some(shop) = Shop::new() else { return };
    let ticks = |recorded: &Value, name: &str| -> Vec<Value> {
        let ticks = recorded["ticks"].as_array().into_iter().flatten();
        ticks.filter(|tick| tick["name"] == name).cloned().collect()
    };
    let outcome = shop.instance.dev("launches.py", |recorded| {
        recorded["runs"][0]["status"] == "SUCCESS" && !ticks(recorded, "never").is_empty()
    });
    let recorded = shop.instance.recorded();
    let run = shop.run();
    let trace = run["run_id"].as_str().expect("a text").replace('-', "");
    let spans: Vec<&Span> = outcome.spans.iter().filter(|span| span.trace == trace).collect();
    check(&spans, &run);
    let elsewhere = outcome.spans.iter().filter(|span| span.trace != trace);
    let strangers: Vec<_> = elsewhere.filter(|span| span.get("dagster.run_id").is_some()).collect();
    assert!(strangers.is_empty(), "{strangers:#?}");
    shop.check_logs(&outcome);

    let root = one(&spans, "dagster.run.in_one_process");
    assert_eq!(root.text("dagster.schedule_name"), Some("once"));
    let request = one(&all(&outcome), "dagster.run_request.once");
    assert_eq!(request.links, [(root.trace.clone(), root.id.clone())]);
    assert_eq!(request.text("dagster.requested_run_id"), run["run_id"].as_str());
    assert_eq!(request.text("dagster.run_key"), Some("first"));
    for (name, status) in [("once", "SUCCESS"), ("never", "SKIPPED")] {
        let tick = ticks(&recorded, name).into_iter().find(|tick| tick["status"] == status).expect("a tick");
        let named = format!("dagster.schedule.{name}");
        let mut evaluations = outcome
            .named(&named)
            .filter(|span| span.get("dagster.skip_reason").unwrap_or(&Value::Null) == &tick["skip_reason"]);
        let evaluation = evaluations.next().unwrap_or_else(|| panic!("no span of {tick}\n{outcome}"));
        assert_eq!(evaluation.text("dagster.cron_schedule"), Some("* * * * *"));
        let keys = tick["run_keys"].as_array().filter(|keys| !keys.is_empty());
        assert_eq!(evaluation.get("dagster.run_keys").and_then(Value::as_array), keys);
        assert_eq!(evaluation.int("dagster.run_requests").unwrap_or(0), keys.map_or(0, |keys| keys.len() as i64));
    }
}

#[test]
fn twenty_runs_at_once_do_not_mix() {
    let Some(_alone) = can_trace() else { return };
    let Some(bin) = programs("FLOE").into_iter().next_back() else { return };
    let instance = Instance::new(&bin);
    let many = instance.command("python", &["-c", "import many; many.main(4, 5)"]);
    let agent = Agent::with_packs().probe("working:work(test.run=arg0, test.where=arg1)").limit(LIMIT);
    let outcome = agent.exec(&many);
    let printed = outcome.finished.expect(0);
    outcome.nothing_lost();
    let runs: Vec<&str> = printed.lines().filter(|line| line.len() == 36).collect();
    assert_eq!(runs.len(), 20, "{printed}");
    let mut seen = 0;
    for run in runs {
        let trace = run.replace('-', "");
        let spans: Vec<&Span> = outcome.spans.iter().filter(|span| span.trace == trace).collect();
        tree(&spans, &serde_json::json!({ "run_id": run, "job": "small" }));
        for name in ["dagster.run_id", "test.run"] {
            let strangers: Vec<_> = spans.iter().filter(|span| span.text(name).is_some_and(|of| of != run)).collect();
            assert!(strangers.is_empty(), "{strangers:#?}");
        }
        let mut links = spans.iter().flat_map(|span| &span.links);
        assert!(links.all(|(to, _)| *to == trace), "runs have nothing to do with each other");
        let places: Vec<(&str, Option<&str>)> = ["dagster.step.first", "dagster.step.second"]
            .iter()
            .flat_map(|step| {
                let step = one(&spans, step);
                let below = |span: &&&Span| ancestors(span, &spans).any(|above| above.id == step.id);
                let worked = spans.iter().filter(below).filter(|span| span.get("test.where").is_some());
                worked.map(|span| (step.name.as_str(), span.text("test.where"))).collect::<Vec<_>>()
            })
            .collect();
        let mut places = places;
        places.sort_unstable();
        let (first, second) = ("dagster.step.first", "dagster.step.second");
        assert_eq!(
            places,
            [(first, Some("step")), (first, Some("thread")), (second, Some("process")), (second, Some("thread"))]
        );
        seen += spans.len();
    }
    say(&format!("{seen} spans in 20 traces"));
    assert_eq!(seen, outcome.spans.len(), "spans in other traces\n{outcome}");
}

/// The spans around a span.
fn ancestors<'a>(span: &'a Span, spans: &'a [&'a Span]) -> impl Iterator<Item = &'a Span> {
    let parent = |span: &&'a Span| spans.iter().copied().find(|above| Some(&above.id) == span.parent.as_ref());
    std::iter::successors(parent(&span), parent)
}
