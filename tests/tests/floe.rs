//! Real floe products: the spans are what floe's artifacts and its own log say about the compilation.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use floe_tests::dagster::Instance;
use floe_tests::{Agent, Outcome, Run, Span, Status, can_trace, fixture, programs, say};
use serde_json::Value;

const STAGES: [&str; 6] = ["load", "validate", "resolve", "enforce", "compile", "generate"];

/// A compilation under the agent.
struct Compilation {
    outcome: Outcome,
    spec: PathBuf,
    manifest: PathBuf,
    output: PathBuf,
    artifacts: Option<Value>,
    /// floe's log: one JSON object a line.
    log: Vec<Value>,
}

impl Compilation {
    fn run(bin: &Path, product: &str, manifest: &str, code: i32) -> Self {
        let folder = fixture("floe");
        // floe resolves what it is given.
        let folder_path = fs::canonicalize(folder.path()).expect("it is there");
        let (spec, manifest) = (folder_path.join(product).join("floe.yaml"), folder_path.join(manifest));
        let output = folder_path.join("target/compiled_artifacts.json");
        let run = Run::new(bin.join("floe"))
            .args(["platform", "compile", "--spec"])
            .arg(&spec)
            .arg("--manifest")
            .arg(&manifest)
            .arg("--output")
            .arg(&output)
            .folder(&folder_path)
            .limit(Duration::from_mins(5));
        let outcome = Agent::with_packs().limit(Duration::from_mins(5)).exec(&run);
        outcome.finished.expect(code);
        outcome.nothing_lost();
        let texts = outcome.finished.out() + &outcome.finished.err();
        let log = texts.lines().filter_map(|line| serde_json::from_str(line).ok()).collect();
        let artifacts = fs::read_to_string(&output).ok();
        let artifacts = artifacts.map(|text| serde_json::from_str(&text).expect("floe writes JSON"));
        say(&format!(
            "floe compile {product}: {} spans, {:.0} s",
            outcome.spans.len(),
            outcome.finished.took.as_secs_f64()
        ));
        Self { outcome, spec, manifest, output, artifacts, log }
    }

    /// The only span with this name.
    #[track_caller]
    fn span(&self, name: &str) -> &Span {
        let found: Vec<_> = self.outcome.spans.iter().filter(|span| span.name == name).collect();
        let [span] = found[..] else { panic!("{} spans `{name}`\n{}", found.len(), self.outcome) };
        span
    }

    fn has(&self, name: &str) -> bool {
        self.outcome.spans.iter().any(|span| span.name == name)
    }

    /// Lines of floe's log.
    fn logged(&self, event: &str) -> impl Iterator<Item = &Value> {
        self.log.iter().filter(move |line| line["event"] == event)
    }

    /// What holds for every compilation, and the span of the compilation.
    #[track_caller]
    fn check(&self) -> &Span {
        for span in &self.outcome.spans {
            assert_eq!(span.get("floe.incomplete"), None, "{span:?}");
            assert_eq!(span.trace, self.outcome.spans[0].trace, "one trace");
        }
        let (command, root) = (self.span("floe platform compile"), self.span("floe.compile"));
        assert_eq!((command.parent.as_ref(), root.parent.as_ref()), (None, Some(&command.id)));
        assert_eq!(root.text("floe.spec_path"), self.spec.to_str());
        assert_eq!(root.text("floe.manifest_path"), self.manifest.to_str());
        assert_eq!(command.text("floe.output_path"), self.output.to_str());
        assert_eq!(command.text("floe.output_format"), Some("json"));
        // The stages that floe says it has finished, in its order.
        for line in self.logged("compilation_stage_complete") {
            let stage = line["stage"].as_str().expect("a name").to_lowercase();
            let number = STAGES.iter().position(|known| *known == stage).expect("a known stage") + 1;
            let span = self.span(&format!("floe.compile.stage{number}"));
            assert_eq!(span.parent.as_ref(), Some(&root.id), "{span:?}");
            assert_eq!(span.text("floe.compile.stage"), Some(stage.as_str()));
            assert_eq!(span.get("compile.stage"), Some(&line["stage"]), "floe's own attribute");
            assert_eq!(span.status, Status::Unset);
            let (took, said) = ((span.end - span.start) as f64 / 1e6, line["duration_ms"].as_f64().expect("a number"));
            assert!((took - said).abs() < f64::max(20.0, said * 0.1), "{stage}: {took} ms, floe says {said} ms");
            for (logged, attribute) in [
                ("compute_plugin", "compile.compute_plugin"),
                ("orchestrator_plugin", "compile.orchestrator_plugin"),
                ("model_count", "compile.model_count"),
                ("dry_run", "enforcement.dry_run"),
                ("profile_name", "compile.profile_name"),
                ("version", "compile.artifacts_version"),
            ] {
                assert_eq!(span.get(attribute), line.get(logged), "{attribute} of {stage}");
            }
        }
        let begun: Vec<_> = self.logged("compilation_stage_start").collect();
        let spans: Vec<_> = self.outcome.with("floe.compile.stage").collect();
        assert_eq!(spans.len(), begun.len(), "a span for each stage that began");
        let name = self.logged("compilation_stage_complete").find_map(|line| line["product_name"].as_str());
        assert_eq!(root.text("floe.product.name"), name);
        root
    }

    /// Enforcement after the compilation, as floe logs it.
    fn check_enforcement(&self) {
        let mut said = self.logged("enforcement_completed").filter(|line| line["component"] == "run_enforce_stage");
        let Some(line) = said.next() else {
            assert!(!self.has("compile.enforce_post_compile"));
            return;
        };
        let span = self.span("compile.enforce_post_compile");
        assert_eq!(span.parent.as_ref(), Some(&self.span("floe.compile").id));
        for (attribute, logged) in [
            ("enforcement.level", "enforcement_level"),
            ("enforcement.dry_run", "dry_run"),
            ("enforcement.passed", "passed"),
            ("enforcement.violation_count", "violation_count"),
            ("enforcement.error_count", "error_count"),
            ("enforcement.warning_count", "warning_count"),
            ("enforcement.duration_ms", "duration_ms"),
        ] {
            assert_eq!(span.get(attribute), line.get(logged), "{attribute}");
        }
        assert_eq!(self.span("governance.policies").parent.as_ref(), Some(&span.id));
    }
}

/// The exception event of a span: type, message and stack trace.
#[track_caller]
fn exception(span: &Span) -> (&str, &str, &str) {
    let events: Vec<_> = span.events.iter().filter(|event| event.name == "exception").collect();
    let [event] = events[..] else { panic!("{} exceptions of {span:?}", events.len()) };
    let text = |name: &str| event.attributes.get(name).and_then(Value::as_str).unwrap_or_default();
    (text("exception.type"), text("exception.message"), text("exception.stacktrace"))
}

#[test]
fn a_compilation_is_traced_stage_by_stage() {
    let Some(_alone) = can_trace() else { return };
    for (index, bin) in programs("FLOE").iter().enumerate() {
        let products = [("customer-orders", "manifest.yaml"), ("regional-sales", "manifest-plain.yaml")];
        // One of them on every interpreter is enough.
        for (product, manifest) in products.into_iter().skip(index.min(1)) {
            let compilation = Compilation::run(bin, product, manifest, 0);
            let root = compilation.check();
            compilation.check_enforcement();
            let artifacts = compilation.artifacts.as_ref().expect("floe writes artifacts");
            assert_eq!(compilation.logged("compilation_stage_complete").count(), 6);
            let resource = &artifacts["observability"]["telemetry"]["resource_attributes"];
            for (attribute, value) in [
                ("floe.artifacts_version", &artifacts["version"]),
                ("floe.product.name", &artifacts["metadata"]["product_name"]),
                ("floe.product.version", &artifacts["metadata"]["product_version"]),
                ("floe.version", &artifacts["metadata"]["floe_version"]),
                ("floe.namespace", &resource["floe_namespace"]),
                ("floe.mode", &resource["floe_mode"]),
            ] {
                assert_eq!(root.get(attribute), Some(value), "{attribute}");
            }
            assert_eq!(root.status, Status::Unset);
            let profile = compilation.span("compute.generate_profile");
            let said = &artifacts["dbt_profiles"][product];
            let target = said["target"].as_str().expect("a target");
            assert_eq!(profile.text("compute.engine"), said["outputs"][target]["type"].as_str());
            // floe tells no more of the path.
            let path = Path::new(said["outputs"][target]["path"].as_str().expect("a path"));
            assert_eq!(profile.text("compute.db_path").map(Path::new), path.file_name().map(Path::new));
            assert_eq!(profile.text("compute.target"), None, "floe names none");
            assert_eq!(profile.parent.as_ref(), Some(&compilation.span("floe.compile.stage5").id));
        }
    }
}

#[test]
fn a_compilation_that_fails_says_where_and_why() {
    let Some(_alone) = can_trace() else { return };
    let Some(bin) = programs("FLOE").pop() else { return };
    let compilation = Compilation::run(&bin, "customer-orders", "manifest-incomplete.yaml", 7);
    let root = compilation.check();
    let summary = compilation.logged("compilation_failed").next().expect("floe says so")["error_summary"].clone();
    let summary = summary.as_str().expect("a text");
    let failed = compilation.span("floe.compile.stage3");
    for span in [root, failed] {
        let (kind, message, stack) = exception(span);
        assert_eq!((kind, message), ("floe_core.compilation.errors.CompilationException", summary), "{span:?}");
        assert!(stack.starts_with("Traceback (most recent call last):\n"), "{stack}");
        assert!(stack.contains("in resolve_plugins\n"), "{stack}");
        assert!(matches!(span.status, Status::Error(_)), "{span:?}");
    }
    // `[RESOLVE] E201: Required plugin 'compute' not found in platform manifest`
    let text = |name: &str| root.text(name).unwrap_or_default();
    let (stage, code, message) = (text("floe.error.stage"), text("floe.error.code"), text("floe.error.message"));
    assert_eq!(format!("[{stage}] {code}: {message}"), summary);
    // What is only known when all has gone well is absent; what was known before is there.
    for name in ["floe.artifacts_version", "floe.version", "floe.namespace", "floe.mode"] {
        assert_eq!(root.get(name), None, "{name}");
    }
    assert_eq!(root.text("floe.product.version"), Some("1.0.0"));
    assert_eq!(failed.get("compile.compute_plugin"), None);
    assert!(!compilation.has("floe.compile.stage4") && compilation.artifacts.is_none());
}

#[test]
fn a_policy_that_is_violated_fails_the_enforcement_and_the_compilation() {
    let Some(_alone) = can_trace() else { return };
    let Some(bin) = programs("FLOE").pop() else { return };
    let compilation = Compilation::run(&bin, "product-events", "manifest-strict.yaml", 7);
    let root = compilation.check();
    compilation.check_enforcement();
    let enforcement = compilation.span("compile.enforce_post_compile");
    for span in [root, enforcement] {
        let (kind, message, stack) = exception(span);
        assert!(kind.ends_with("PolicyEnforcementError"), "{kind}");
        assert!(message.starts_with("Policy enforcement failed with 3 errors"), "{message}");
        assert!(stack.contains("in run_enforce_stage\n"), "{stack}");
    }
    // It is another exception than floe's `CompilationException`.
    assert!(root.with_prefix("floe.error.").is_empty());
    assert_eq!(compilation.span("floe.compile.stage5").status, Status::Unset);
    assert!(!compilation.has("floe.compile.stage6"));
}

#[test]
fn a_compiled_product_runs_in_dagster_and_floes_calls_of_dbt_are_the_parents_of_dbt() {
    let Some(_alone) = can_trace() else { return };
    let Some(bin) = programs("FLOE").pop() else { return };
    let folder = fixture("floe");
    let path = fs::canonicalize(folder.path()).expect("it is there");
    let project = path.join("customer-orders");
    // Where floe's own loader looks for it.
    let compile = Run::new(bin.join("floe"))
        .args(["platform", "compile", "--spec", "floe.yaml", "--manifest", "../manifest.yaml"])
        .args(["--output", "compiled_artifacts.json"])
        .folder(&project)
        .limit(Duration::from_mins(5));
    compile.run().expect(0);
    let instance = Instance::new(&bin).variable("PRODUCT", &project);
    // The warehouse's path is relative.
    fs::create_dir(instance.path().join("target")).expect("the folder is ours");
    let assets = path.join("assets.py");
    let words = ["asset", "materialize", "--select", "*", "-f", assets.to_str().expect("a text")];
    let outcome = instance.traced(&words, 0);
    let run = &instance.recorded()["runs"][0];
    let trace = run["run_id"].as_str().expect("a text").replace('-', "");

    let only = |name: &str, parent: &Span| {
        let found = outcome.named(name).filter(|span| span.parent.as_deref() == Some(&parent.id));
        let [span] = found.collect::<Vec<_>>()[..] else { panic!("not one `{name}` below {}\n{outcome}", parent.name) };
        span.clone()
    };
    let materialised = run["events"].as_array().expect("a list").iter();
    let materialised: Vec<&str> = materialised
        .filter(|event| event["type"] == "ASSET_MATERIALIZATION")
        .filter_map(|event| event["asset_key"].as_str())
        .collect();
    assert_eq!(materialised, ["bronze_orders", "silver_orders", "rebuilt"]);
    for asset in materialised {
        let of_asset = outcome.spans.iter().find(|span| span.name == format!("dagster.asset.{asset}"));
        let of_asset = of_asset.unwrap_or_else(|| panic!("no span of {asset}\n{outcome}"));
        let floe = only("floe.dbt.run", of_asset);
        assert_eq!(floe.text("dbt.command"), Some("run"));
        assert_eq!(floe.text("dbt.target"), Some("dev"));
        assert_eq!(floe.text("dbt.project_dir"), project.to_str());
        let profiles = floe.text("dbt.profiles_dir").expect("floe wrote it");
        assert!(Path::new(profiles).join("profiles.yml").exists(), "{profiles}");
        let rebuilt = asset == "rebuilt";
        assert_eq!(floe.text("dbt.select"), Some(asset).filter(|_| !rebuilt));
        assert_eq!(floe.text("dbt.exclude"), Some("silver_orders").filter(|_| rebuilt));
        assert_eq!(floe.get("dbt.full_refresh"), Some(&Value::Bool(rebuilt)));
        // What floe says of its span when dbt has run.
        assert_eq!(floe.int("dbt.models_run"), Some(1), "{floe:?}");
        let dbt = only("dbt.run", &floe);
        assert_eq!(dbt.text("dbt.project_name"), Some("customer_orders"));
        let model = only(&format!("dbt.model.{}", if rebuilt { "bronze_orders" } else { asset }), &dbt);
        assert_eq!(model.text("dbt.status"), Some("success"));
        for span in [of_asset, &floe, &dbt, &model] {
            assert_eq!(span.trace, trace, "{span:?}");
        }
    }
}
