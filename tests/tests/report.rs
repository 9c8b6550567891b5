//! `floe-agent report`, seen in a real browser.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use floe_tests::dbt::{Project, environment};
use floe_tests::{Agent, Browser, Finished, Run, can_trace, keys, say};
use serde_json::{Value, json};
use tempfile::TempDir;

const SECOND: u64 = 1_000_000_000;
/// When everything begins, in nanoseconds since 1970.
const ZERO: u64 = 1_790_000_000 * SECOND;

fn attributes(pairs: &[(&str, Value)]) -> Value {
    let wrapped = |value: &Value| match value {
        Value::String(text) => json!({ "stringValue": text }),
        Value::Bool(value) => json!({ "boolValue": value }),
        Value::Number(number) if number.is_i64() => json!({ "intValue": number.to_string() }),
        number => json!({ "doubleValue": number }),
    };
    pairs.iter().map(|(key, value)| json!({ "key": key, "value": wrapped(value) })).collect()
}

/// A span: trace, id, parent, name, from and to in milliseconds.
fn span(trace: u64, id: u64, parent: u64, name: &str, [from, to]: [u64; 2]) -> Value {
    json!({
        "traceId": format!("{trace:032x}"), "spanId": format!("{id:016x}"),
        "parentSpanId": if parent == 0 { String::new() } else { format!("{parent:016x}") },
        "name": name, "kind": 1,
        "startTimeUnixNano": (ZERO + from * 1_000_000).to_string(), "endTimeUnixNano": (ZERO + to * 1_000_000).to_string(),
    })
}

/// The same with more fields.
fn with(mut span: Value, fields: &Value) -> Value {
    for (name, value) in fields.as_object().expect("fields") {
        span[name] = value.clone();
    }
    span
}

/// A line of a file.
fn line(service: &str, pid: u64, spans: &[Value]) -> String {
    let resource = attributes(&[("service.name", service.into()), ("process.pid", pid.into())]);
    json!({ "resourceSpans": [{ "resource": { "attributes": resource }, "scopeSpans": [{ "spans": spans }] }] })
        .to_string()
        + "\n"
}

/// A folder with a page.
struct Page {
    folder: TempDir,
    finished: Finished,
}

impl Page {
    /// The page of a file with this in it.
    fn of(text: &str) -> Self {
        let page = Self::made(&[text]);
        page.finished.expect(0);
        page
    }

    fn made(files: &[&str]) -> Self {
        let folder = tempfile::tempdir().expect("a temporary folder can be made");
        let mut run = Run::new(Agent::binary()).arg("report").folder(folder.path());
        for (number, text) in files.iter().enumerate() {
            let name = format!("spans-{number}.jsonl");
            fs::write(folder.path().join(&name), text).expect("the folder is ours");
            run = run.arg(name);
        }
        let finished = run.args(["--output", "trace.html"]).run();
        Self { folder, finished }
    }

    fn path(&self) -> PathBuf {
        self.folder.path().join("trace.html")
    }
}

/// Two services; the load fails because of a query below it; a second trace that it links to.
fn shop() -> String {
    let exception = attributes(&[
        ("exception.type", "duckdb.BinderException".into()),
        ("exception.message", "column \"amout\" not found".into()),
        (
            "exception.stacktrace",
            "Traceback (most recent call last):\n  File \"load.py\", line 3, in load\n    run(sql)".into(),
        ),
    ]);
    let failed = |message: &str| json!({ "status": { "code": 2, "message": message } });
    let query = with(
        span(1, 4, 3, "SELECT shop.orders", [420, 460]),
        &json!({
            "kind": 3, "status": { "code": 2, "message": "BinderException: column \"amout\" not found" },
            "attributes": attributes(&[("db.query.text", "select amout from shop.orders".into()), ("db.rows", 7.into())]),
            "events": [{ "timeUnixNano": (ZERO + 455_000_000).to_string(), "name": "exception", "attributes": exception }],
        }),
    );
    let linked = json!({ "links": [{ "traceId": format!("{:032x}", 2), "spanId": format!("{:016x}", 9) }] });
    line(
        "shop",
        11,
        &[
            with(span(1, 1, 0, "shop.run", [0, 1000]), &failed("load failed")),
            span(1, 2, 1, "shop.extract", [10, 400]),
            with(with(span(1, 3, 1, "shop.load", [410, 980]), &failed("load failed")), &linked),
        ],
    ) + &line("warehouse", 12, &[query])
        + &line(
            "shop",
            13,
            &[
                span(2, 9, 0, "shop.plan", [2000, 2300]),
                with(
                    span(2, 10, 9, "shop.part", [2010, 2020]),
                    &json!({ "attributes": attributes(&[("shop.number", 42.into())]) }),
                ),
            ],
        )
}

fn names(browser: &Browser) -> Vec<String> {
    browser.wait_for("new Promise(done => requestAnimationFrame(() => requestAnimationFrame(() => done(true))))");
    let mut rows = browser.eval("Array.from(document.querySelectorAll('.row'), row => [parseInt(row.style.top), row.querySelector('.label').textContent])");
    let rows = rows.as_array_mut().expect("a list");
    rows.sort_by_key(|row| row[0].as_i64());
    rows.iter().map(|row| row[1].as_str().expect("a name").to_owned()).collect()
}

#[test]
fn what_failed_is_what_one_sees_first_and_nothing_is_loaded() {
    let Some(browser) = Browser::start() else { return };
    let page = Page::of(&shop());
    browser.open(&page.path(), "");
    assert_eq!(names(&browser), ["shop.run", "shop.extract", "shop.load", "SELECT shop.orders"]);
    assert_eq!(browser.text("#name"), "shop.run");
    assert!(browser.text("#facts").contains("1.00 s") && browser.text("#facts").contains("3 errors"));
    assert_eq!(browser.texts(".row.failed .mark"), ["✗", "✗", "✗"]);
    let details = browser.text("#details");
    assert_eq!(browser.text("#details h3"), "SELECT shop.orders", "the failure that the others came from");
    for part in [
        "duckdb.BinderException",
        "column \"amout\" not found",
        "Traceback",
        "line 3, in load",
        "warehouse",
        "client",
        "select amout",
    ] {
        assert!(details.contains(part), "{part} in {details}");
    }
    assert_eq!(browser.texts(".trace b"), ["shop.run", "shop.plan"]);
    let requests = browser.requests();
    let own = format!("file://{}", page.path().canonicalize().expect("it is there").display());
    assert_eq!(requests.iter().filter(|address| *address != "about:blank").collect::<Vec<_>>(), [&own]);
    assert_eq!(browser.complaints(), Vec::<String>::new());
}

#[test]
fn errors_and_matches_can_be_filtered_for() {
    let Some(browser) = Browser::start() else { return };
    let page = Page::of(&shop());
    browser.open(&page.path(), "");
    browser.click("#errors");
    assert_eq!(names(&browser), ["shop.run", "shop.load", "SELECT shop.orders"]);
    assert_eq!(browser.texts(".trace b"), ["shop.run"]);
    browser.click("#errors");
    for (query, found, trace, rows) in [
        ("extract", "1 match", "shop.run", &["shop.run", "shop.extract"][..]),
        ("AMOUT from", "1 match", "shop.run", &["shop.run", "shop.load", "SELECT shop.orders"]),
        ("\"amout from\"", "1 match", "shop.run", &["shop.run", "shop.load", "SELECT shop.orders"]),
        ("number=42", "1 match", "shop.plan", &["shop.plan", "shop.part"]),
        ("rows=\"7\"", "1 match", "shop.run", &["shop.run", "shop.load", "SELECT shop.orders"]),
        ("pid=\"12\"", "1 match", "shop.run", &["shop.run", "shop.load", "SELECT shop.orders"]),
        ("shop >350ms -load", "1 match", "shop.run", &["shop.run", "shop.extract"]),
        ("Traceback", "1 match", "shop.run", &["shop.run", "shop.load", "SELECT shop.orders"]),
    ] {
        browser.eval("document.getElementById('query').value = ''");
        browser.type_into("#query", query);
        browser.wait_for(&format!("location.hash.includes(new URLSearchParams({{ q: {query:?} }}).toString())"));
        assert_eq!(browser.text("#found"), found, "{query}");
        assert_eq!(
            (browser.text("#name"), names(&browser)),
            (trace.to_owned(), rows.iter().map(|&row| row.to_owned()).collect()),
            "{query}"
        );
    }
    browser.eval("document.getElementById('query').value = ''");
    browser.type_into("#query", "nowhere");
    browser.wait_for("document.getElementById('found').textContent === 'nothing found'");
    assert!(names(&browser).is_empty() && browser.text("#rows .none").contains("Esc"));
    browser.type_into("#query", keys::ESCAPE);
    assert_eq!(names(&browser).len(), 4, "the filter is gone");
    assert_eq!(browser.complaints(), Vec::<String>::new());
}

#[test]
fn hostile_values_stay_text() {
    let Some(browser) = Browser::start() else { return };
    let evil = "</script><script>window.owned = 1</script><img src=x onerror=\"window.owned = 2\"><!--{script}\u{1b}[31m\u{202e}";
    let pairs = attributes(&[(evil, evil.into()), ("url", "javascript:window.owned=3".into())]);
    let event = json!({ "timeUnixNano": ZERO.to_string(), "name": evil, "attributes": pairs });
    let fields = json!({ "attributes": pairs, "events": [event], "status": { "code": 2, "message": evil } });
    let page = Page::of(&line(evil, 1, &[with(span(1, 1, 0, evil, [0, 9]), &fields)]));
    browser.open(&page.path(), &format!("q={evil}"));
    browser.open(&page.path(), "");
    let shown =
        "</script><script>window.owned = 1</script><img src=x onerror=\"window.owned = 2\"><!--{script}‹U+202E›";
    assert_eq!(names(&browser), [shown]);
    assert!(browser.text("#details").contains(shown));
    assert_eq!(
        browser.eval("[typeof window.owned, document.images.length, document.scripts.length, document.links.length]"),
        json!(["undefined", 0, 2, 0])
    );
    assert_eq!(browser.complaints(), Vec::<String>::new());
    // Even if there were a way in: the policy runs nothing and loads nothing.
    browser.eval("(() => { const s = document.createElement('script'); s.textContent = 'window.owned = 4'; document.body.append(s); \
        const i = new Image(); i.src = 'http://127.0.0.1:9/x.png'; document.body.append(i); })()");
    browser.wait_for("true");
    assert_eq!(browser.eval("typeof window.owned"), "undefined");
    let complaints = browser.complaints();
    assert!(complaints.iter().any(|text| text.contains("script-src")), "{complaints:?}");
}

#[test]
fn keys_move_fold_and_follow_errors() {
    let Some(browser) = Browser::start() else { return };
    let page = Page::of(&shop());
    browser.open(&page.path(), "");
    let press = |keys: &str| browser.type_into("#rows", keys);
    let selected = || browser.text(".row[aria-selected=true] .label");
    press(keys::HOME);
    assert_eq!(selected(), "shop.run");
    press(keys::DOWN);
    assert_eq!((selected(), browser.text("#details h3")), ("shop.extract".into(), "shop.extract".into()));
    press("j");
    assert_eq!(selected(), "shop.load");
    press(keys::LEFT);
    assert_eq!(names(&browser), ["shop.run", "shop.extract", "shop.load"]);
    assert_eq!(browser.text(".row .hidden.bad"), "+1");
    press(keys::RIGHT);
    assert_eq!(names(&browser).len(), 4);
    press("c");
    assert_eq!(names(&browser).len(), 3);
    press("x");
    press(keys::END);
    assert_eq!(selected(), "SELECT shop.orders");
    press("e");
    assert_eq!(selected(), "shop.run", "the next error, from the start again");
    press("ee");
    assert_eq!(selected(), "SELECT shop.orders");
    press("E");
    assert_eq!(selected(), "shop.load");
    press(keys::ENTER);
    assert!(browser.texts("#details h3").is_empty());
    press("n");
    assert_eq!(
        (browser.text("#name"), names(&browser)),
        ("shop.plan".into(), vec!["shop.plan".into(), "shop.part".into()])
    );
    press("?");
    assert!(browser.text("#keys").contains("next, previous error"));
    assert_eq!(browser.complaints(), Vec::<String>::new());
}

#[test]
fn a_stretch_of_time_can_be_chosen_and_is_kept_in_the_address() {
    let Some(browser) = Browser::start() else { return };
    let page = Page::of(&shop());
    browser.open(&page.path(), "");
    browser.drag("#overview", 0.1, 0.3);
    assert_eq!(names(&browser), ["shop.run", "shop.extract"]);
    assert!(browser.text("#status").contains("2 of 4 spans"), "{}", browser.text("#status"));
    let fragment = browser.eval("location.hash.slice(1)");
    browser.open(&page.path(), fragment.as_str().expect("a text"));
    assert_eq!(names(&browser), ["shop.run", "shop.extract"]);
    browser.type_into("#rows", keys::ESCAPE);
    assert_eq!(names(&browser).len(), 4);
    browser.type_into("#rows", &format!("{}jz", keys::HOME));
    let width = browser.eval("parseFloat(document.querySelector('.row[aria-selected=true] .span').style.width)");
    assert!(width.as_f64().is_some_and(|width| width > 85.0), "the bar fills the view: {width}");
}

#[test]
fn links_lead_to_the_other_trace() {
    let Some(browser) = Browser::start() else { return };
    let page = Page::of(&shop());
    browser.open(&page.path(), &format!("trace={:032x}&span={:016x}", 1, 3));
    assert_eq!(browser.text("#details h3"), "shop.load");
    let link = browser.eval(
        "Array.from(document.querySelectorAll('#details .link')).findIndex(e => e.textContent === '→ link: shop.plan')",
    );
    assert!(link.as_i64().is_some_and(|index| index >= 0), "{}", browser.text("#details"));
    browser.eval(
        "Array.from(document.querySelectorAll('#details .link')).find(e => e.textContent.startsWith('→')).click()",
    );
    assert_eq!((browser.text("#name"), browser.text("#details h3")), ("shop.plan".into(), "shop.plan".into()));
}

#[test]
fn log_records_are_shown_with_their_span_and_can_be_searched() {
    let Some(browser) = Browser::start() else { return };
    let record = |trace: u64, id: u64, at: u64, level: &str, text: &str| {
        json!({
            "timeUnixNano": (ZERO + at * 1_000_000).to_string(), "severityText": level, "body": { "stringValue": text },
            "traceId": format!("{trace:032x}"), "spanId": format!("{id:016x}"),
            "attributes": attributes(&[("dbt.event", "E017".into())]),
        })
    };
    let records = [
        record(1, 2, 60, "WARN", "<b>second</b>\nline"),
        record(1, 2, 20, "INFO", "first of the extraction"),
        record(1, 99, 30, "INFO", "of a span that is nowhere"),
        record(7, 2, 30, "INFO", "of another trace"),
    ];
    let scope = json!({ "scope": { "name": "dbt.log" }, "logRecords": records });
    let logs = json!({ "resourceLogs": [{ "scopeLogs": [scope] }] }).to_string();
    let page = Page::of(&format!("{}{logs}\n{logs}\n", shop()));
    assert!(page.finished.err().contains("2 traces, 6 spans, 3 errors, 3 log records ("), "{}", page.finished.err());
    browser.open(&page.path(), &format!("trace={:032x}&span={:016x}", 1, 2));
    assert_eq!(browser.text("#details h3"), "shop.extract");
    assert_eq!(browser.texts("#details .log > b"), ["INFO", "WARN"], "by time, each once");
    assert_eq!(browser.texts("#details .log > div"), ["first of the extraction", "<b>second</b>\nline"]);
    assert_eq!(browser.texts("#details .log > span"), ["+10.0 ms dbt.log", "+50.0 ms dbt.log"]);
    assert_eq!(browser.texts("#details .log table"), ["dbt.eventE017"; 2]);
    browser.open(&page.path(), &format!("trace={:032x}&span={:016x}", 1, 1));
    assert_eq!(browser.texts("#details .log > div"), ["of a span that is nowhere"], "the trace's root has it");
    browser.open(&page.path(), "q=extraction");
    assert_eq!((browser.text("#found"), browser.text("#details h3")), ("1 match".into(), "shop.extract".into()));
    assert_eq!(browser.complaints(), Vec::<String>::new());
}

/// 20,000 spans as a large run has them: nodes in parallel, each with many queries; a few that fail; and another 2,000 traces.
fn many() -> (String, u64) {
    let mut text = String::new();
    let mut id = 1;
    let mut spans = vec![span(1, 1, 0, "dbt.build", [0, 400_000])];
    let mut count = 1;
    for node in 0..900_u64 {
        id += 1;
        let (parent, from) = (id, 100 + node / 4 * 1700);
        let length = 400 + node * 37 % 1200;
        let failed = json!({ "code": if node % 300 == 299 { 2 } else { 0 }, "message": if node % 300 == 299 { "no such table" } else { "" } });
        let facts = attributes(&[
            ("dbt.unique_id", format!("model.shop.model_{node}").into()),
            ("dbt.status", if node % 300 == 299 { "error" } else { "success" }.into()),
            ("dbt.relative_path", format!("models/marts/model_{node}.sql").into()),
            ("thread.id", (1000 + node % 4).into()),
        ]);
        spans.push(with(
            span(1, id, 1, &format!("dbt.model.model_{node}"), [from, from + length]),
            &json!({ "attributes": facts, "status": failed }),
        ));
        for query in 0..19 {
            id += 1;
            let begin = from + length * query / 20;
            let facts = attributes(&[
                (
                    "db.query.text",
                    format!(
                        "create table model_{node} as select * from source_{query} where day > current_date - {query}"
                    )
                    .into(),
                ),
                ("db.system.name", "duckdb".into()),
                ("db.response.returned_rows", (node * query).into()),
            ]);
            let name = ["SELECT source", "CREATE TABLE model", "BEGIN", "COMMIT"][(query % 4) as usize];
            spans.push(with(
                span(1, id, parent, name, [begin, begin + length / 21]),
                &json!({ "kind": 3, "attributes": facts }),
            ));
        }
        count += 20;
        if spans.len() > 500 {
            text += &line("jaffle", 4711, &spans);
            spans.clear();
        }
    }
    for trace in 0..1999_u64 {
        spans.push(span(trace + 10, trace + 100_000, 0, "Cart.add", [trace * 200, trace * 200 + 3]));
        count += 1;
    }
    (text + &line("jaffle", 4711, &spans), count)
}

#[test]
fn twenty_thousand_spans_stay_usable() {
    let Some(browser) = Browser::start() else { return };
    let (text, count) = many();
    assert_eq!(count, 20_000);
    let begun = Instant::now();
    let page = Page::of(&text);
    let made = begun.elapsed();
    let size = fs::metadata(page.path()).expect("it was written").len();
    let begun = Instant::now();
    browser.open(&page.path(), &format!("trace={:032x}", 1));
    let opened = begun.elapsed();
    assert_eq!(browser.text("#errors"), "✗ 3 errors");
    assert!(browser.text("#facts").contains("18,001 spans"), "{}", browser.text("#facts"));
    browser.type_into("#rows", "x");
    browser.wait_for("document.getElementById('status').textContent.includes('all 18,001 spans')");
    let in_page = "document.querySelectorAll('.row').length";
    assert!(browser.eval(in_page).as_u64().is_some_and(|rows| rows < 100), "only what is in sight is in the page");
    // Each step of work with the page until it has been drawn, in milliseconds.
    let timed = |work: &str| {
        let script = format!(
            "(async () => {{ const begun = performance.now(); {work}; await new Promise(next => requestAnimationFrame(() => setTimeout(next))); \
             return performance.now() - begun; }})()"
        );
        browser.eval(&script).as_f64().expect("a number")
    };
    let key = |key: &str| {
        format!(
            "document.getElementById('rows').dispatchEvent(new KeyboardEvent('keydown', {{ key: '{key}', bubbles: true }}))"
        )
    };
    let scrolled = timed("document.getElementById('rows').scrollTop = 200000");
    browser.wait_for("Array.from(document.querySelectorAll('.row'), row => parseInt(row.style.top)).some(top => Math.abs(top - 200000) < 500)");
    let moved = timed(&key("ArrowDown"));
    let folded = timed(&key("c"));
    let unfolded = timed(&key("x"));
    let zoomed = timed(&key("z"));
    let all = timed(&key("0"));
    let query = "const query = document.getElementById('query'); query.value = 'source_18 model_777'; query.dispatchEvent(new Event('input')); \
        await new Promise(next => setTimeout(next, 150))";
    // Typing is waited for until there is a pause of 150 ms.
    let searched = timed(query) - 150.0;
    assert_eq!(browser.text("#found"), "1 match");
    assert_eq!(names(&browser), ["dbt.build", "dbt.model.model_777", "BEGIN"]);
    assert_eq!(browser.complaints(), Vec::<String>::new());
    say(&format!(
        "20,000 spans: {:.1} MB, made in {:.1} s, opened in {:.1} s; scroll {scrolled:.0} ms, move {moved:.0} ms, fold all {folded:.0} ms, unfold all \
         {unfolded:.0} ms, zoom {zoomed:.0} and {all:.0} ms, search {searched:.0} ms",
        size as f64 / 1e6,
        made.as_secs_f64(),
        opened.as_secs_f64()
    ));
}

#[test]
fn many_spans_are_folded_but_not_what_leads_to_an_error() {
    let Some(browser) = Browser::start() else { return };
    let (text, _) = many();
    let page = Page::of(&text);
    browser.open(&page.path(), &format!("trace={:032x}", 1));
    assert!(
        browser.text("#status").contains(" 901 of 18,001 spans")
            || browser.text("#status").starts_with("901 of 18,001 spans"),
        "{}",
        browser.text("#status")
    );
    assert_eq!(browser.text("#details h3"), "dbt.model.model_299");
    assert_eq!(browser.texts(".row .hidden").first().map(String::as_str), Some("+19"));
}

#[test]
fn a_dbt_build_in_which_a_model_fails_is_shown_node_by_node() {
    let Some(browser) = Browser::start() else { return };
    let Some(_alone) = can_trace() else { return };
    let Some(bin) = environment() else { return };
    let project = Project::copy();
    let spans = project.path().join("spans.jsonl");
    let agent = Agent::with_packs().option("--output").option(&spans).limit(Duration::from_mins(3));
    agent.exec(&project.dbt(&bin, &["build", "--vars", "sql_error: true"])).finished.expect(1);
    let text = fs::read_to_string(&spans).expect("the agent wrote it");
    let page = Page::of(&text);
    browser.open(&page.path(), "");
    assert_eq!(browser.text("#name"), "dbt.build");
    assert_eq!(browser.text("#details h3"), "CREATE jaffle", "the statement of the model that fails");
    assert!(browser.text("#details .problem").contains("no_such_column"), "{}", browser.text("#details"));
    let results = project.artifact("run_results.json");
    for result in results["results"].as_array().expect("dbt writes results") {
        let (id, status) = (result["unique_id"].as_str().expect("a text"), result["status"].as_str().expect("a text"));
        browser.open(&page.path(), &format!("q=unique_id=\"{id}\" dbt.status=\"{status}\"").replace(' ', "+"));
        assert_eq!(browser.text("#found"), "1 match", "{id}");
        let row = names(&browser).pop().expect("a row");
        let name = id.split('.').nth(2).expect("ids have three parts");
        assert!(
            row.starts_with("dbt.") && row.contains(name.trim_end_matches(|c: char| c.is_ascii_digit())),
            "{row} is {id}"
        );
    }
    assert_eq!(browser.complaints(), Vec::<String>::new());
}

#[test]
fn bad_lines_are_skipped_and_named() {
    let good = shop();
    let page = Page::made(&[&format!("{good}nonsense\n{{}}\n"), &good[..good.len() - 20]]);
    page.finished.expect(0);
    let error = page.finished.err();
    let [first, second, third] = &error.lines().collect::<Vec<_>>()[..] else { panic!("{error}") };
    assert_eq!(
        *first,
        "floe-agent: skipped spans-0.jsonl, line 4: not OTLP/JSON: expected ident, column 2, and 1 more lines of that file"
    );
    assert_eq!(
        *second,
        "floe-agent: skipped spans-1.jsonl, line 3: the line is cut off; is the file still being written?"
    );
    assert!(third.starts_with("floe-agent: trace.html: 2 traces, 6 spans, 3 errors ("), "{third}");
    let html = fs::read_to_string(page.path()).expect("it was written");
    assert!(html.contains("spans-0.jsonl, line 4"), "the page says so too");
}

#[test]
fn what_cannot_be_drawn_is_refused_with_a_reason() {
    let refused = |page: &Page, reason: &str| {
        page.finished.expect(2);
        assert_eq!(page.finished.err().trim_end(), reason);
        assert!(!page.path().exists());
    };
    let expected = "expected OTLP/JSON lines, as `floe-agent exec --output FILE.jsonl` writes them";
    refused(
        &Page::made(&["{\n  \"x\": 1\n}\n"]),
        &format!("floe-agent: spans-0.jsonl, line 1: not OTLP/JSON: EOF while parsing an object, column 1; {expected}"),
    );
    refused(&Page::made(&["\n"]), "floe-agent: there are no spans in spans-0.jsonl; was something traced?");
    let report =
        |words: &[&str], folder: &Path| Run::new(Agent::binary()).arg("report").args(words).folder(folder).run();
    let folder = tempfile::tempdir().expect("a temporary folder can be made");
    let missing = report(&["no.jsonl", "-o", "x.html"], folder.path());
    missing.expect(2);
    assert_eq!(
        missing.err().trim_end(),
        "floe-agent: cannot read spans from no.jsonl: No such file or directory (os error 2)"
    );
    fs::write(folder.path().join("x.jsonl"), shop()).expect("the folder is ours");
    let same = report(&["x.jsonl", "-o", "./x.jsonl"], folder.path());
    same.expect(2);
    assert_eq!(
        same.err().trim_end(),
        "floe-agent: --output ./x.jsonl: this is one of the files to read; choose another name"
    );
    assert_eq!(fs::read_to_string(folder.path().join("x.jsonl")).expect("it is there"), shop());
    let nowhere = report(&["x.jsonl", "-o", "no/x.html"], folder.path());
    nowhere.expect(2);
    assert!(nowhere.err().starts_with("floe-agent: cannot write the report to no/x.html: "), "{}", nowhere.err());
}

#[test]
fn spans_can_come_from_standard_input_and_the_page_go_to_standard_output() {
    let run = Run::new(Agent::binary())
        .args(["report", "-", "-o", "-"])
        .input(shop().as_bytes())
        .limit(Duration::from_secs(20))
        .run();
    let html = run.expect(0);
    assert!(html.starts_with("<!doctype html>") && html.contains("SELECT shop.orders"));
    assert!(run.err().starts_with("floe-agent: the report: 2 traces, 6 spans, 3 errors"), "{}", run.err());
}
