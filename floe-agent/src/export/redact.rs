//! Redaction: what must not leave is taken out of spans, log records and resources before any sink gets them.

use std::borrow::Cow;
use std::sync::{Arc, LazyLock, Mutex, PoisonError};

use aho_corasick::{AhoCorasick, AhoCorasickKind};
use opentelemetry::trace::Status;
use opentelemetry::{Array, KeyValue, StringValue, Value};
use opentelemetry_proto::tonic::common::v1::{AnyValue, any_value};
use opentelemetry_sdk::Resource;
use regex::{Captures, Regex};

use super::sql;
use crate::trace::{FinishedLog, FinishedSpan};

/// What stands where something was taken out.
const MASK: &str = "***";
/// Words that announce a secret.
const WORDS: &str = "password|passwd|passphrase|pwd|secret|secret_key|access_key|accesskey|account_key|private_key|token|\
                     api_key|api-key|apikey|authorization|credential|credentials";
/// Resources that are remembered in their redacted form.
const RESOURCES: usize = 256;

/// What may be found in a text, and what announces it. Two letters beyond ASCII are an `s` and a `k` to regular expressions.
const SUSPICIOUS: [(&str, Found); 11] = [
    ("://", Found { url: true, ..Found::NOTHING }),
    ("pass", Found::WORD),
    ("pwd", Found::WORD),
    ("secret", Found::WORD),
    ("key", Found::WORD),
    ("token", Found::WORD),
    ("authorization", Found::WORD),
    ("credential", Found::WORD),
    ("bearer", Found { bearer: true, ..Found::NOTHING }),
    ("\u{17f}", Found::ANYTHING),
    ("\u{212a}", Found::ANYTHING),
];
/// Nearly every text has none of these, and is done with after one pass.
static SCAN: LazyLock<AhoCorasick> = LazyLock::new(|| {
    let words = SUSPICIOUS.map(|(word, _)| word);
    let scan = AhoCorasick::builder().ascii_case_insensitive(true).kind(Some(AhoCorasickKind::DFA)).build(words);
    scan.expect("words of this file")
});
/// `scheme://user:password@`, `scheme://token@`.
static URL: LazyLock<Regex> = LazyLock::new(|| regex(r"(?i)\b([a-z][a-z0-9+.-]*://)[^\s/?#@]+@"));
/// `password=...`, `"token": "..."`, `Authorization: Bearer ...`.
static ASSIGNED: LazyLock<Regex> = LazyLock::new(|| {
    regex(&format!(
        r#"(?i)((?:{WORDS})\\?["']?\s*[=:]\s*)(\\"[^"\\]*(?:\\")?|"(?:[^"\\]|\\.)*"?|'[^']*'?|(?:(?:bearer|basic|token)\s+)?[^\s"'`,;&)}}\]]+)"#
    ))
});
/// `Bearer ...` anywhere.
static BEARER: LazyLock<Regex> = LazyLock::new(|| regex(r"(?i)\b(bearer\s+)[a-z0-9._~+/-]{8,}=*"));
/// An option whose value is the next argument.
static OPTION: LazyLock<Regex> = LazyLock::new(|| regex(&format!(r"(?i)^--?[\w.-]*(?:{WORDS})$")));
/// The name of an attribute that is a secret.
static NAME: LazyLock<Regex> = LazyLock::new(|| regex(&format!(r"(?i)(?:^|[._-])(?:{WORDS})$")));

fn regex(pattern: &str) -> Regex {
    Regex::new(pattern).expect("a pattern of this file")
}

/// Which of the expressions above can match a text.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Found {
    url: bool,
    word: bool,
    bearer: bool,
}

impl Found {
    const NOTHING: Self = Self { url: false, word: false, bearer: false };
    const WORD: Self = Self { word: true, ..Self::NOTHING };
    const ANYTHING: Self = Self { url: true, word: true, bearer: true };

    fn within(text: &str) -> Self {
        // No word begins with the end of another kind of word, so that none hides another.
        SCAN.find_iter(text).fold(Self::NOTHING, |all, found| {
            let (_, Self { url, word, bearer }) = SUSPICIOUS[found.pattern().as_usize()];
            Self { url: all.url || url, word: all.word || word, bearer: all.bearer || bearer }
        })
    }
}

/// What to take out.
#[derive(Clone, Debug)]
pub struct RedactionRules {
    /// Names of attributes whose values are taken out; `*` at the end stands for any rest.
    pub attributes: Vec<String>,
    /// What matches is taken out; of patterns with groups, only the groups.
    pub patterns: Vec<Regex>,
    /// Literals in `db.query.text` are replaced by `?`.
    pub mask_sql: bool,
    /// Characters of a value; the rest is cut.
    pub max_length: usize,
}

impl Default for RedactionRules {
    fn default() -> Self {
        Self { attributes: Vec::new(), patterns: Vec::new(), mask_sql: true, max_length: 8192 }
    }
}

/// Takes secrets out of what passes.
#[derive(Debug)]
pub struct Redactor {
    rules: RedactionRules,
    /// Resources as they came, and without secrets.
    resources: Mutex<Vec<(Arc<Resource>, Arc<Resource>)>>,
}

/// A text without credentials in URLs and without values that are called secrets.
pub fn redact_text(text: &str) -> String {
    built_in(text).into_owned()
}

fn built_in(text: &str) -> Cow<'_, str> {
    let found = Found::within(text);
    let mut text = Cow::Borrowed(text);
    if found.url {
        replace(&mut text, &URL, &|found| format!("{}{MASK}@", &found[1]));
    }
    if found.word {
        replace(&mut text, &ASSIGNED, &assigned);
    }
    if found.bearer {
        replace(&mut text, &BEARER, &|found| format!("{}{MASK}", &found[1]));
    }
    text
}

fn assigned(found: &Captures<'_>) -> String {
    let (name, value) = (&found[1], &found[2]);
    // The quotes stay, so that what is around can still be read.
    let quote = value.trim_start_matches('\\').chars().next().filter(|c| matches!(c, '"' | '\'')).map(String::from);
    let quote = quote.unwrap_or_default();
    let slash = if value.starts_with('\\') { "\\" } else { "" };
    format!("{name}{slash}{quote}{MASK}{slash}{quote}")
}

fn replace(text: &mut Cow<'_, str>, regex: &Regex, with: &dyn Fn(&Captures<'_>) -> String) {
    if let Cow::Owned(changed) = regex.replace_all(text, |found: &Captures<'_>| with(found)) {
        *text = Cow::Owned(changed);
    }
}

impl Redactor {
    /// Takes out what these rules say, and what is always taken out.
    pub fn new(rules: RedactionRules) -> Self {
        Self { rules, resources: Mutex::default() }
    }

    /// Redacts a span.
    pub fn span(&self, finished: &mut FinishedSpan) {
        let FinishedSpan { resource, span, sampled: _ } = finished;
        if let Some(redacted) = self.resource(resource) {
            *resource = redacted;
        }
        if let Cow::Owned(name) = self.text(&span.name) {
            span.name = name.into();
        }
        self.attributes(&mut span.attributes);
        for event in &mut span.events.events {
            self.attributes(&mut event.attributes);
        }
        for link in &mut span.links.links {
            self.attributes(&mut link.attributes);
        }
        if let Status::Error { description } = &mut span.status
            && let Cow::Owned(redacted) = self.text(description)
        {
            *description = redacted.into();
        }
    }

    /// Redacts a log record.
    pub fn log(&self, finished: &mut FinishedLog) {
        let FinishedLog { resource, scope: _, record } = finished;
        if let Some(redacted) = self.resource(resource) {
            *resource = redacted;
        }
        self.any_value(record.body.as_mut());
        for attribute in &mut record.attributes {
            self.named(&attribute.key, attribute.value.as_mut());
        }
    }

    /// The redacted form of a resource, if it is another one.
    fn resource(&self, resource: &Arc<Resource>) -> Option<Arc<Resource>> {
        let mut known = self.resources.lock().unwrap_or_else(PoisonError::into_inner);
        let found = if let Some(at) = known.iter().position(|(original, _)| Arc::ptr_eq(original, resource)) {
            at
        } else {
            if known.len() >= RESOURCES {
                known.remove(0);
            }
            let attributes = resource.iter().map(|(key, value)| KeyValue::new(key.clone(), value.clone()));
            let mut redacted: Vec<KeyValue> = attributes.collect();
            let original = redacted.clone();
            self.attributes(&mut redacted);
            let redacted = if redacted == original {
                Arc::clone(resource)
            } else {
                let schema = resource.schema_url().unwrap_or_default().to_owned();
                Arc::new(Resource::builder_empty().with_schema_url(redacted, schema).build())
            };
            known.push((Arc::clone(resource), redacted));
            known.len() - 1
        };
        let (original, redacted) = &known[found];
        (!Arc::ptr_eq(original, redacted)).then(|| Arc::clone(redacted))
    }

    fn attributes(&self, attributes: &mut [KeyValue]) {
        let dialect = |attributes: &[KeyValue]| {
            let system = attributes.iter().find(|kv| kv.key.as_str() == "db.system.name");
            sql::Dialect::of(system.map(|kv| kv.value.as_str()).as_deref())
        };
        for at in 0..attributes.len() {
            let name = attributes[at].key.as_str();
            if self.is_secret(name) {
                attributes[at].value = MASK.into();
                continue;
            }
            let is_sql = self.rules.mask_sql && matches!(name, "db.query.text" | "db.statement");
            if is_sql && let Value::String(text) = &attributes[at].value {
                let masked = sql::mask(text.as_str(), dialect(attributes));
                attributes[at].value = masked.into();
            }
            match &mut attributes[at].value {
                Value::String(text) => {
                    if let Cow::Owned(redacted) = self.text(text.as_str()) {
                        *text = redacted.into();
                    }
                }
                Value::Array(Array::String(texts)) => self.arguments(texts),
                _ => {}
            }
        }
    }

    /// Texts of a list; a command line is one, and there the value of an option is the next text.
    fn arguments(&self, texts: &mut [StringValue]) {
        let mut secret = false;
        for text in texts {
            let is_option = text.as_str().starts_with('-') && OPTION.is_match(text.as_str());
            if secret && !is_option {
                *text = MASK.into();
            } else if let Cow::Owned(redacted) = self.text(text.as_str()) {
                *text = redacted.into();
            }
            secret = is_option;
        }
    }

    fn is_secret(&self, name: &str) -> bool {
        let matches = |rule: &String| match rule.strip_suffix('*') {
            Some(begin) => name.starts_with(begin),
            None => name == rule,
        };
        self.rules.attributes.iter().any(matches) || Found::within(name).word && NAME.is_match(name)
    }

    fn text<'a>(&self, text: &'a str) -> Cow<'a, str> {
        let mut text = built_in(text);
        for pattern in &self.rules.patterns {
            replace(&mut text, pattern, &|found| {
                let whole = found.get(0).map_or(0..0, |whole| whole.range());
                let mut out = String::new();
                let mut done = whole.start;
                let all = found.get(0).map_or("", |whole| whole.as_str());
                for group in found.iter().skip(1).flatten() {
                    if group.start() < done {
                        continue;
                    }
                    out.push_str(&all[done - whole.start..group.start() - whole.start]);
                    out.push_str(MASK);
                    done = group.end();
                }
                if done == whole.start {
                    return MASK.to_owned();
                }
                out.push_str(&all[done - whole.start..]);
                out
            });
        }
        if text.len() > self.rules.max_length
            && let Some((end, _)) = text.char_indices().nth(self.rules.max_length)
        {
            match &mut text {
                Cow::Owned(text) => text.truncate(end),
                Cow::Borrowed(whole) => text = Cow::Owned(whole[..end].to_owned()),
            }
        }
        text
    }

    fn named(&self, name: &str, value: Option<&mut AnyValue>) {
        if self.is_secret(name) {
            if let Some(value) = value {
                value.value = Some(any_value::Value::StringValue(MASK.to_owned()));
            }
            return;
        }
        self.any_value(value);
    }

    fn any_value(&self, value: Option<&mut AnyValue>) {
        match value.and_then(|value| value.value.as_mut()) {
            Some(any_value::Value::StringValue(text)) => {
                if let Cow::Owned(redacted) = self.text(text) {
                    *text = redacted;
                }
            }
            Some(any_value::Value::ArrayValue(array)) => {
                for value in &mut array.values {
                    self.any_value(Some(value));
                }
            }
            Some(any_value::Value::KvlistValue(list)) => {
                for entry in &mut list.values {
                    self.named(&entry.key, entry.value.as_mut());
                }
            }
            _ => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use opentelemetry::trace::Event;
    use proptest::prelude::*;

    use super::*;
    use crate::export::tree::tests::{at, span};
    use crate::trace::ProcessFacts;
    use crate::units::{Epoch, Pid};

    fn attribute(rules: RedactionRules, name: &'static str, value: &str) -> String {
        let mut finished = span(1, 1, 0, "s", 0, 1);
        finished.span.attributes = vec![KeyValue::new(name, value.to_owned())];
        Redactor::new(rules).span(&mut finished);
        finished.span.attributes[0].value.as_str().into_owned()
    }

    #[test]
    fn credentials_in_urls_and_values_that_are_called_secrets_are_taken_out() {
        for (text, redacted) in [
            ("postgresql://me:pa55@db:5432/x", "postgresql://***@db:5432/x"),
            ("git+https://ghp_abc@github.com/a/b", "git+https://***@github.com/a/b"),
            ("see https://docs.x.org/a?b=c", "see https://docs.x.org/a?b=c"),
            ("connect(host=db password=s3cret user=x)", "connect(host=db password=*** user=x)"),
            (r#"{"token": "a b\"c", "n": 1}"#, r#"{"token": "***", "n": 1}"#),
            ("api-key: 'x y', b", "api-key: '***', b"),
            ("Authorization: Bearer abc.def", "Authorization: ***"),
            ("aws_secret_access_key=AKIA/x", "aws_secret_access_key=***"),
            ("with Bearer eyJhbGciOi.J9 sent", "with Bearer *** sent"),
            ("max_tokens=5, the token was wrong", "max_tokens=5, the token was wrong"),
            ("?sig=1&access_token=abc&x=2", "?sig=1&access_token=***&x=2"),
            (r#"{\"password\": \"hunter2\"}"#, r#"{\"password\": \"***\"}"#),
            ("PASSWORD=\"unterminated", "PASSWORD=\"***\""),
            ("passecret=x", "passecret=***"),
            // Letters beyond ASCII that are an s and a k in another case.
            ("pa\u{17f}\u{17f}word=x", "pa\u{17f}\u{17f}word=***"),
            ("to\u{212a}en=x", "to\u{212a}en=***"),
        ] {
            assert_eq!(redact_text(text), redacted);
            assert_eq!(attribute(RedactionRules::default(), "x", text), redacted);
        }
    }

    proptest! {
        /// The scan for words saves work, and changes nothing.
        #[test]
        fn what_the_scan_passes_over_the_expressions_pass_over_too(
            parts in proptest::collection::vec(proptest::sample::select(vec![
                "pass", "word", "wd", "phrase", "pwd", "secret", "_", "key", "access", "api-", "token", "Authorization", "BEARER ",
                "credential", "s", "://", "a", "@", "=", ": ", "\"", "'", " ", "abcdefgh", "\u{17f}", "\u{212a}", "K", "\\",
            ]), 0..8)
        ) {
            let text = parts.concat();
            let mut all = Cow::Borrowed(&*text);
            replace(&mut all, &URL, &|found| format!("{}{MASK}@", &found[1]));
            replace(&mut all, &ASSIGNED, &assigned);
            replace(&mut all, &BEARER, &|found| format!("{}{MASK}", &found[1]));
            prop_assert_eq!(built_in(&text), all);
            prop_assert_eq!(Redactor::new(RedactionRules::default()).is_secret(&text), NAME.is_match(&text));
        }
    }

    #[test]
    fn attributes_that_are_named_like_secrets_or_in_the_rules_are_taken_out() {
        let rules = || RedactionRules { attributes: vec!["shop.card".into(), "user.*".into()], ..Default::default() };
        assert_eq!(attribute(rules(), "shop.card", "1234"), "***");
        assert_eq!(attribute(rules(), "shop.cards", "1234"), "1234");
        assert_eq!(attribute(rules(), "user.mail", "a@b"), "***");
        assert_eq!(attribute(rules(), "db.password", "x"), "***");
        assert_eq!(attribute(rules(), "http.request.header.x-api-key", "x"), "***");
        assert_eq!(attribute(rules(), "dagster.step_key", "orders"), "orders");
        assert_eq!(attribute(rules(), "gen_ai.usage.tokens", "5"), "5");
    }

    #[test]
    fn patterns_take_out_what_they_match_or_only_their_groups() {
        let rules =
            |pattern: &str| RedactionRules { patterns: vec![Regex::new(pattern).unwrap()], ..Default::default() };
        assert_eq!(attribute(rules(r"\b\d{4}-\d{4}\b"), "x", "card 1234-5678."), "card ***.");
        assert_eq!(attribute(rules(r"iban (\w+) of (\w+)!"), "x", "iban DE12 of me!"), "iban *** of ***!");
    }

    #[test]
    fn sql_literals_are_masked_unless_the_raw_text_is_wanted() {
        let sql = "select * from t where a = 'x'";
        assert_eq!(attribute(RedactionRules::default(), "db.query.text", sql), "select * from t where a = ?");
        let raw = RedactionRules { mask_sql: false, ..Default::default() };
        assert_eq!(attribute(raw, "db.query.text", sql), sql);
    }

    #[test]
    fn long_values_are_cut_between_characters() {
        let rules = RedactionRules { max_length: 3, ..Default::default() };
        assert_eq!(attribute(rules.clone(), "x", "äöüß"), "äöü");
        assert_eq!(attribute(rules, "x", "äöü"), "äöü");
    }

    #[test]
    fn nothing_of_a_span_is_forgotten() {
        let secret = "password=hunter2";
        let mut finished = span(1, 1, 0, "s", 0, 1);
        finished.span.name = secret.into();
        finished.span.status = Status::error(secret);
        finished.span.attributes = vec![KeyValue::new("a", Value::Array(Array::String(vec![secret.into()])))];
        let event = vec![KeyValue::new("exception.message", secret)];
        finished.span.events.events.push(Event::new("exception", at(1), event, 0));
        let facts = ProcessFacts {
            command_line: ["x", "--password", "hunter2", "--db-token=hunter2", "y", "psql://a:hunter2@b"]
                .map(String::from)
                .into(),
            ..ProcessFacts::unknown(Pid(1), Epoch(1))
        };
        finished.resource = Arc::new(facts.resource());
        let redactor = Redactor::new(RedactionRules::default());
        for _ in 0..2 {
            let mut one = finished.clone();
            redactor.span(&mut one);
            let json = serde_json::to_string(&crate::export::request([one])).unwrap();
            assert!(!json.contains("hunter2"), "{json}");
            assert!(json.contains("psql://***@b") && json.contains("--db-token=***"), "{json}");
        }
    }

    #[test]
    fn log_records_are_redacted_too() {
        let text = |text: &str| Some(AnyValue { value: Some(any_value::Value::StringValue(text.into())) });
        let mut log = FinishedLog {
            resource: span(1, 1, 0, "s", 0, 1).resource,
            scope: opentelemetry::InstrumentationScope::default(),
            record: opentelemetry_proto::tonic::logs::v1::LogRecord { body: text("token=abc"), ..Default::default() },
        };
        Redactor::new(RedactionRules::default()).log(&mut log);
        assert_eq!(log.record.body, text("token=***"));
    }
}
