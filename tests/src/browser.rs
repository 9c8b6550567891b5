//! A real browser: Chromium without a window, driven through WebDriver.

use std::env;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use serde_json::{Value, json};
use tempfile::TempDir;
use ureq::Agent;

use crate::http;
use crate::run::{Run, Running};
use crate::skip::skip;

/// How long a condition is waited for.
const PATIENCE: Duration = Duration::from_secs(30);

/// Keys, as WebDriver writes them.
pub mod keys {
    /// Arrow down.
    pub const DOWN: &str = "\u{e015}";
    /// Arrow left.
    pub const LEFT: &str = "\u{e012}";
    /// Arrow right.
    pub const RIGHT: &str = "\u{e014}";
    /// Enter.
    pub const ENTER: &str = "\u{e007}";
    /// Escape.
    pub const ESCAPE: &str = "\u{e00c}";
    /// Home.
    pub const HOME: &str = "\u{e011}";
    /// End.
    pub const END: &str = "\u{e010}";
}

/// A browser with one page.
pub struct Browser {
    client: Agent,
    /// Address of the session.
    session: String,
    _driver: Running,
    _profile: TempDir,
}

impl Browser {
    /// Starts one; says so if there is none, or panics if one is required.
    #[track_caller]
    pub fn start() -> Option<Self> {
        let (Some(chromium), Some(chromedriver)) = (program("chromium"), program("chromedriver")) else {
            let reason = "there is no browser: install Debian's packages chromium and chromium-driver";
            assert!(env::var_os("FLOE_REQUIRE_BROWSER").is_none_or(|value| value != "1"), "{reason}");
            skip(reason);
            return None;
        };
        let mut driver = Run::new(chromedriver).arg("--port=0").limit(Duration::from_mins(10)).start();
        driver.wait_for_output("started successfully on port ");
        let port = || {
            let output = driver.output();
            let (_, rest) = output.split_once("started successfully on port ")?;
            let (port, _) = rest.split_once('.')?;
            port.parse::<u16>().ok()
        };
        let port = until("a port of chromedriver", port);
        let profile = tempfile::tempdir().expect("a temporary folder can be made");
        let arguments = [
            "--headless",
            "--no-sandbox",
            "--disable-gpu",
            "--disable-quic",
            "--disable-dev-shm-usage",
            "--no-first-run",
            "--disable-background-networking",
            "--disable-component-update",
            "--disable-sync",
            "--window-size=1440,900",
            "--force-color-profile=srgb",
            &format!("--user-data-dir={}", profile.path().display()),
        ];
        let options = json!({ "binary": chromium, "args": arguments });
        let wanted = json!({ "capabilities": { "alwaysMatch": {
            "browserName": "chrome", "goog:chromeOptions": options,
            "goog:loggingPrefs": { "browser": "ALL", "performance": "ALL" },
        }}});
        let client = http::client();
        let url = format!("http://127.0.0.1:{port}/session");
        let (status, answer) = http::answer(client.post(&url).send(wanted.to_string())).expect("chromedriver answers");
        let Some(id) = answer["value"]["sessionId"].as_str() else { panic!("no browser: {status} {answer}") };
        let browser = Self { client, session: format!("{url}/{id}"), _driver: driver, _profile: profile };
        // What Chromium opens by itself is not of interest.
        browser.command("url", &json!({ "url": "about:blank" }));
        browser.requests();
        browser.complaints();
        Some(browser)
    }

    #[track_caller]
    fn command(&self, name: &str, body: &Value) -> Value {
        let url = format!("{}/{name}", self.session);
        let (status, mut answer) =
            http::answer(self.client.post(&url).send(body.to_string())).expect("chromedriver answers");
        assert!(status == 200, "{name} {body}: {}", answer["value"]["message"]);
        answer["value"].take()
    }

    /// Opens a file; what follows the `#` of its address may be given.
    #[track_caller]
    pub fn open(&self, file: &Path, fragment: &str) {
        // A new fragment alone would not load the page again.
        self.command("url", &json!({ "url": "about:blank" }));
        let file = file.canonicalize().expect("the page is there");
        self.command("url", &json!({ "url": format!("file://{}#{fragment}", file.display()) }));
    }

    /// What an expression of JavaScript is.
    #[track_caller]
    pub fn eval(&self, expression: &str) -> Value {
        self.command("execute/sync", &json!({ "script": format!("return ({expression});"), "args": [] }))
    }

    /// The texts of the elements of a selector.
    #[track_caller]
    pub fn texts(&self, selector: &str) -> Vec<String> {
        let texts = self.eval(&format!("Array.from(document.querySelectorAll({selector:?}), e => e.textContent)"));
        texts.as_array().expect("a list").iter().filter_map(Value::as_str).map(str::to_owned).collect()
    }

    /// The text of the only element of a selector.
    #[track_caller]
    pub fn text(&self, selector: &str) -> String {
        let mut texts = self.texts(selector);
        assert_eq!(texts.len(), 1, "{selector}: {texts:?}");
        texts.remove(0)
    }

    /// Waits until an expression is true.
    #[track_caller]
    pub fn wait_for(&self, expression: &str) {
        let deadline = Instant::now() + PATIENCE;
        while self.eval(expression) != true {
            assert!(Instant::now() < deadline, "this does not come true: {expression}");
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    fn element(&self, selector: &str) -> String {
        let found = self.command("element", &json!({ "using": "css selector", "value": selector }));
        let id = found.as_object().and_then(|object| object.values().next()).and_then(Value::as_str);
        id.expect("WebDriver gives an id").to_owned()
    }

    /// Clicks on the first element of a selector.
    #[track_caller]
    pub fn click(&self, selector: &str) {
        let element = self.element(selector);
        self.command(&format!("element/{element}/click"), &json!({}));
    }

    /// Types into the first element of a selector.
    #[track_caller]
    pub fn type_into(&self, selector: &str, text: &str) {
        let element = self.element(selector);
        self.command(&format!("element/{element}/value"), &json!({ "text": text }));
    }

    /// Presses the mouse on an element, moves it, and lets it go: from and to are shares of the element's width.
    #[track_caller]
    pub fn drag(&self, selector: &str, from: f64, to: f64) {
        let area = self.eval(&format!(
            "(r => [r.left, r.top, r.width, r.height])(document.querySelector({selector:?}).getBoundingClientRect())"
        ));
        let number = |index: usize| area[index].as_f64().expect("a number");
        let x = |share: f64| (number(0) + number(2) * share).round();
        let y = (number(1) + number(3) / 2.0).round();
        let go = |share: f64| json!({ "type": "pointerMove", "duration": 20, "x": x(share), "y": y });
        let actions = [
            go(from),
            json!({ "type": "pointerDown", "button": 0 }),
            go(f64::midpoint(from, to)),
            go(to),
            json!({ "type": "pointerUp", "button": 0 }),
        ];
        self.command("actions", &json!({ "actions": [{ "type": "pointer", "id": "mouse", "actions": actions }] }));
    }

    /// Messages of the console that are warnings or errors.
    pub fn complaints(&self) -> Vec<String> {
        let log = self.command("se/log", &json!({ "type": "browser" }));
        let entries = log.as_array().expect("a list").iter();
        let bad = entries.filter(|entry| ["WARNING", "SEVERE"].iter().any(|level| entry["level"] == *level));
        bad.map(|entry| entry["message"].to_string()).collect()
    }

    /// The addresses that were asked for since this was called last.
    pub fn requests(&self) -> Vec<String> {
        let log = self.command("se/log", &json!({ "type": "performance" }));
        let messages = log.as_array().expect("a list").iter().filter_map(|entry| entry["message"].as_str());
        let messages = messages.filter_map(|text| serde_json::from_str::<Value>(text).ok());
        let sent = messages.filter(|message| message["message"]["method"] == "Network.requestWillBeSent");
        let address = |message: Value| message["message"]["params"]["request"]["url"].as_str().map(str::to_owned);
        sent.filter_map(address).collect()
    }
}

impl Drop for Browser {
    fn drop(&mut self) {
        // Chromium is in a process group of its own: it ends with its session.
        let _ = self.client.delete(&self.session).call();
    }
}

fn program(name: &str) -> Option<PathBuf> {
    env::split_paths(&env::var_os("PATH")?).map(|folder| folder.join(name)).find(|file| file.is_file())
}

#[track_caller]
fn until<T>(what: &str, attempt: impl Fn() -> Option<T>) -> T {
    let deadline = Instant::now() + PATIENCE;
    loop {
        if let Some(found) = attempt() {
            return found;
        }
        assert!(Instant::now() < deadline, "no {what}");
        std::thread::sleep(Duration::from_millis(5));
    }
}
