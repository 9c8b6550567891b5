//! Values of every type, in every place that a path can lead to, in every layout: right or absent, and absent only where
//! it must be.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;

use floe_tests::{Agent, Outcome, Status, can_trace, for_each, interpreters};
use serde_json::Value;

const PROBES: [&str; 17] = [
    "capture_target:value(t.case=arg0, t.v=arg1)",
    "capture_target:attributes(t.case=arg0, t.first=arg1.first, t.second=arg1.second, t.last=arg1.last)",
    "capture_target:item(t.case=arg0, t.zero=arg1[0], t.one=arg1[1], t.three=arg1[3])",
    "capture_target:key(t.case=arg0, t.k=arg1['k'], t.other=arg1['other'])",
    "capture_target:path(t.case=arg0, t.inner=arg1.inner.name, t.item=arg1.items[1].name, t.key=arg1.table['k'].name)",
    "capture_target:items(t.case=arg0, t.all=arg1[*], t.behind=globals['BEHIND'])",
    "capture_target:nested(t.case=arg0, t.names=arg1[*].name, t.parts=join('/', arg1[*].parts[*]))",
    "capture_target:joined(t.case=arg0, t.v=join('/', arg1[*]))",
    "capture_target:entries(t.case=arg0, t.d=dict(arg1))",
    "capture_target:length(t.case=arg0, t.v=len(arg1))",
    "capture_target:type_name(t.case=arg0, t.v=type(arg1))",
    "capture_target:keyword(t.case=arg0, t.v=kwargs['x'])",
    "capture_target:either(t.case=arg(0, 'case'), t.v=arg(1, 'x'))",
    "capture_target:a_global(t.case=arg0, t.setting=globals['SETTING'], t.number=globals['NUMBER'], t.missing=globals['NO'])",
    "capture_target:returned(t.case=arg0, t.v=return, t.first=return.first, t.item=return[0])",
    "capture_target:raised(t.case=arg0, t.type=type(exception), t.arg=exception.args[0], t.detail=exception.detail)",
    "capture_target:failing(t.case=arg0, t.type=type(exception))",
];

/// Longer texts than the command line can ask for.
const PACK: &str = "\
pack: capture
probes:
  - name: long_text
    target: capture_target:long_text
    span: {name: long_text}
    attributes: {t.case: arg0, t.v: {path: arg1, max: 4095}}
";

/// Repetitions of each case in the program.
const REPETITIONS: usize = 3;

type Cases = BTreeMap<String, BTreeMap<String, BTreeMap<String, Value>>>;

#[test]
fn a_captured_value_is_the_value_at_the_call_in_every_layout() {
    let Some(_alone) = can_trace() else { return };
    for_each(interpreters(), |interpreter| {
        let folder = tempfile::tempdir().expect("a temporary folder can be made");
        let file = folder.path().join("cases.json");
        let pack = folder.path().join("capture.yaml");
        fs::write(&pack, PACK).expect("the folder can be written to");
        let outcome = Agent::new()
            .probes(&PROBES)
            .option("--pack")
            .option(&pack)
            .exec(&interpreter.program("capture.py").arg(&file));
        outcome.finished.expect(0);
        outcome.nothing_lost();
        let cases = fs::read_to_string(&file).expect("the program wrote its cases");
        let cases: Cases = serde_json::from_str(&cases).expect("the file is JSON");
        compare(&outcome, &cases);
        for span in outcome.named("failing") {
            let Status::Error(message) = &span.status else { panic!("no error: {span:?}") };
            assert!(message.contains("ValueError: invalid literal for int()"), "{span:?}");
        }
    });
}

fn compare(outcome: &Outcome, cases: &Cases) {
    let mut wrong = BTreeSet::new();
    let mut met: BTreeMap<(&str, &str), usize> = BTreeMap::new();
    for span in &outcome.spans {
        let Some(case) = span.text("t.case") else {
            wrong.insert(format!("{}: a span without its case", span.name));
            continue;
        };
        let Some(values) = cases.get(&span.name).and_then(|of_function| of_function.get(case)) else {
            wrong.insert(format!("{}: an unknown case `{case}`", span.name));
            continue;
        };
        *met.entry((&span.name, case)).or_default() += 1;
        for (name, expected) in values {
            let name = format!("t.{name}");
            if let Err(problem) = judge(expected, span.get(&name), span.get("floe.truncated"), &name) {
                wrong.insert(format!("{} of `{case}`, {name}: {problem}", span.name));
            }
        }
        let allowed = |name: &String| name == "case" || values.contains_key(name);
        for (name, value) in span.with_prefix("t.").iter().filter(|(name, _)| !allowed(name)) {
            wrong.insert(format!("{} of `{case}`, t.{name}: is {value}, must be absent", span.name));
        }
    }
    for (function, of_function) in cases {
        for case in of_function.keys() {
            let spans = met.get(&(function.as_str(), case.as_str())).copied().unwrap_or(0);
            if spans != REPETITIONS {
                wrong.insert(format!("{function} of `{case}`: {spans} spans instead of {REPETITIONS}"));
            }
        }
    }
    let lines: Vec<_> = wrong.iter().take(60).map(String::as_str).collect();
    assert!(wrong.is_empty(), "{} values are wrong:\n  {}\n{outcome}", wrong.len(), lines.join("\n  "));
}

fn judge(expected: &Value, captured: Option<&Value>, truncated: Option<&Value>, name: &str) -> Result<(), String> {
    let (kind, value) = expected.as_object().and_then(|object| object.iter().next()).expect("one kind of expectation");
    match (kind.as_str(), captured) {
        ("optional", None) => Ok(()),
        ("exactly", None) if value.is_null() => Ok(()),
        ("exactly" | "optional", Some(captured)) if same(value, captured) => Ok(()),
        ("cut", Some(captured)) => {
            let (whole, part) = (value.as_str().expect("a str"), captured.as_str().unwrap_or_default());
            let marked = truncated.and_then(Value::as_array).is_some_and(|names| names.contains(&Value::from(name)));
            if part.chars().count() < 60 || !whole.starts_with(part) {
                Err(format!("is `{part}`, not a beginning of the long str"))
            } else if !marked {
                Err(format!("is cut, but floe.truncated is {truncated:?}"))
            } else {
                Ok(())
            }
        }
        ("part", Some(captured)) if same(value, captured) => {
            let marked = truncated.and_then(Value::as_array).is_some_and(|names| names.contains(&Value::from(name)));
            if marked { Ok(()) } else { Err(format!("is not marked in floe.truncated: {truncated:?}")) }
        }
        (_, captured) => {
            let captured = captured.map_or("absent".to_owned(), Value::to_string);
            Err(format!(
                "is {captured}, must be {}",
                if value.is_null() { "absent".to_owned() } else { value.to_string() }
            ))
        }
    }
}

/// Equal, and of the same type.
fn same(expected: &Value, captured: &Value) -> bool {
    match (expected, captured) {
        (Value::Number(one), Value::Number(other)) => {
            one.is_f64() == other.is_f64() && (one == other || one.as_f64() == other.as_f64() && one.is_f64())
        }
        _ => expected == captured,
    }
}
