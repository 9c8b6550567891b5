//! What a pack looks like in its file. The texts here are also the descriptions of the JSON schema.

use std::borrow::Cow;
use std::fmt;
use std::marker::PhantomData;

use opentelemetry::Value;
use opentelemetry::trace::SpanKind;
use schemars::{JsonSchema, Schema, SchemaGenerator, json_schema};
use serde::de::value::MapAccessDeserializer;
use serde::de::{Error, MapAccess, SeqAccess, Visitor};
use serde::{Deserialize, Deserializer};
use serde_saphyr::Spanned;

use super::probe::{Moment, Read, Role};

pub(super) type Text = Spanned<String>;

/// Probes for one framework or application: which functions to watch, and what to make of their calls.
#[derive(Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
#[schemars(title = "floe-agent probe pack")]
pub(super) struct PackYaml {
    /// Its name. A pack in a file replaces the built-in pack of the same name.
    pub(super) pack: String,
    /// The versions of a package that it was verified with.
    pub(super) versions: Option<VersionsYaml>,
    /// The probes.
    #[serde(default)]
    pub(super) probes: Vec<ProbeYaml>,
}

#[derive(Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub(super) struct VersionsYaml {
    /// The package, as pip names it.
    pub(super) distribution: String,
    /// The module that knows the version.
    pub(super) module: String,
    /// Its attribute with the version, a str.
    pub(super) attribute: String,
    /// A range, as `>=1.8,<1.13`.
    #[schemars(with = "String")]
    pub(super) supported: Text,
}

#[derive(Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub(super) struct ProbeYaml {
    /// Unique in the pack.
    #[schemars(with = "String")]
    pub(super) name: Text,
    /// What the calls become.
    #[serde(default)]
    pub(super) kind: KindYaml,
    /// The function: `package.module:Class.method`; `<locals>` is allowed.
    #[schemars(with = "String")]
    pub(super) target: Text,
    /// The target is a method of a base class: watch every override of it in a subclass too.
    #[serde(default)]
    pub(super) implementations: bool,
    /// A call is the moment to look for new implementations, before it goes on.
    #[serde(default)]
    pub(super) scan: bool,
    /// Modules in whose contents the function is searched, where that is not the target's own.
    #[serde(default)]
    #[schemars(with = "Vec<String>")]
    pub(super) found_in: Vec<Text>,
    /// Versions of the pack's package that have the function, as `>=1.9`.
    #[schemars(with = "Option<String>")]
    pub(super) versions: Option<Text>,
    /// The span. Not with `kind: event`.
    pub(super) span: Option<SpanYaml>,
    /// What is captured.
    #[serde(default)]
    #[schemars(with = "std::collections::BTreeMap<String, Sources>")]
    pub(super) attributes: Ordered<Spanned<Sources>>,
    /// When the span is an error although nothing was raised, and what it says.
    pub(super) status: Option<StatusYaml>,
    /// The exception that captured values describe.
    pub(super) exception: Option<ExceptionYaml>,
    /// `kind: pair`: what ends the span.
    #[serde(default)]
    pub(super) end: Vec<EndYaml>,
    /// `kind: event`: when it happens. Not given: when all its attributes are known.
    pub(super) at: Option<Moment>,
    /// `kind: event`: a template for the id of the run that the process works for from here on.
    #[schemars(with = "Option<String>")]
    pub(super) run: Option<Text>,
    /// `kind: event`: the call is a log record.
    pub(super) log: Option<LogYaml>,
    /// `kind: event`: a template for the key of a span: log records that are written during the call are that span's.
    #[schemars(with = "Option<String>")]
    pub(super) logs_of: Option<Text>,
    /// `kind: event`: the span that it is about: `command` (default), `innermost`, or the id of a span of this pack.
    #[schemars(with = "Option<String>")]
    pub(super) on: Option<Text>,
    /// `kind: event`: the call is an event of that span.
    pub(super) event: Option<EventYaml>,
    /// `kind: event`: an attribute of that span whose name is captured.
    pub(super) dynamic: Option<DynamicYaml>,
    /// `kind: event`: links of that span.
    #[serde(default)]
    pub(super) links: Vec<LinkYaml>,
    /// `kind: event`: what the call means, by its attributes. Every rule that fits is carried out, in this order.
    #[serde(default)]
    pub(super) rules: Vec<RuleYaml>,
}

#[derive(Clone, Copy, Default, Deserialize, JsonSchema, PartialEq, Eq)]
#[serde(rename_all = "lowercase")]
pub(super) enum KindYaml {
    /// A span for each call.
    #[default]
    Call,
    /// A span for the `with` block of the context manager that the call returns (`@contextlib.contextmanager`).
    ContextManager,
    /// A span from this call to another one.
    Pair,
    /// No span of its own: tells something of a span, or begins and ends spans by rules.
    Event,
}

#[derive(Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub(super) struct SpanYaml {
    /// What rules of this pack call it; the probe's name if not given.
    #[schemars(with = "Option<String>")]
    pub(super) id: Option<Text>,
    /// A template for its name, or several: the first whose attributes are all there counts, else the last. A missing
    /// attribute is left out with the separator before it.
    #[schemars(with = "Templates")]
    pub(super) name: Spanned<Templates>,
    /// Its part in the trace.
    #[serde(default)]
    pub(super) role: Role,
    /// OpenTelemetry's kind of span.
    #[serde(default)]
    pub(super) kind: SpanKindYaml,
    /// A template for what identifies it in its trace: what ends it may then come in another thread, and links can
    /// name it.
    #[schemars(with = "Option<String>")]
    pub(super) key: Option<Text>,
    /// A template for the id of the run that it is part of: its trace is that of the run.
    #[schemars(with = "Option<String>")]
    pub(super) run: Option<Text>,
    /// A template for the key of its parent, where that is not the span around it.
    #[schemars(with = "Option<String>")]
    pub(super) parent: Option<Text>,
    /// Only calls whose attributes have one of these values at the beginning; `*` is any value.
    #[serde(default)]
    #[schemars(with = "std::collections::BTreeMap<String, Vec<String>>")]
    pub(super) when: Ordered<Spanned<Vec<String>>>,
    /// No calls whose attributes have one of these values at the beginning; `*` is any value.
    #[serde(default)]
    #[schemars(with = "std::collections::BTreeMap<String, Vec<String>>")]
    pub(super) unless: Ordered<Spanned<Vec<String>>>,
    /// The span has no length.
    #[serde(default)]
    pub(super) instant: bool,
    /// The program exports the span itself, with these ids: it is not exported again, and is the parent of what is in it.
    pub(super) external: Option<ExternalYaml>,
    /// Templates for the names that the span has if the program exports it itself: where one so called begins in it, this one
    /// is left out.
    #[schemars(with = "Option<Templates>")]
    pub(super) exported_as: Option<Spanned<Templates>>,
    /// Attributes that it takes over from the open spans around it.
    #[serde(default)]
    #[schemars(with = "Vec<String>")]
    pub(super) inherit: Vec<Text>,
    /// Its links to other spans.
    #[serde(default)]
    pub(super) links: Vec<LinkYaml>,
    /// `kind: call`: the name of an event of this pack. A span that ends in a call of that event's function is complete only when
    /// that call is over: rules that are `on` it still find it until then.
    #[schemars(with = "Option<String>")]
    pub(super) waits_for: Option<Text>,
}

#[derive(Clone, Copy, Default, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub(super) enum SpanKindYaml {
    #[default]
    Internal,
    Client,
    Server,
    Producer,
    Consumer,
}

impl From<SpanKindYaml> for SpanKind {
    fn from(kind: SpanKindYaml) -> Self {
        match kind {
            SpanKindYaml::Internal => Self::Internal,
            SpanKindYaml::Client => Self::Client,
            SpanKindYaml::Server => Self::Server,
            SpanKindYaml::Producer => Self::Producer,
            SpanKindYaml::Consumer => Self::Consumer,
        }
    }
}

#[derive(Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub(super) struct ExternalYaml {
    /// A template for its trace id, 32 hexadecimal digits; dashes do not count.
    #[schemars(with = "String")]
    pub(super) trace: Text,
    /// A template for its span id: the last 16 hexadecimal digits count.
    #[schemars(with = "String")]
    pub(super) span: Text,
}

#[derive(Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub(super) struct LinkYaml {
    /// An attribute with one or several values; `{value}` in the key is each of them.
    #[schemars(with = "Option<String>")]
    pub(super) each: Option<Text>,
    /// A template for the id of the run that the other span is part of, where it may be another one.
    #[schemars(with = "Option<String>")]
    pub(super) run: Option<Text>,
    /// A template for the key of the other span, or several: the first whose attributes are all there.
    #[schemars(with = "Templates")]
    pub(super) key: Spanned<Templates>,
    /// Without `run`: the span is there also if this agent has not seen it.
    #[serde(default)]
    pub(super) unseen: bool,
}

#[derive(Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub(super) struct StatusYaml {
    /// The attribute that tells the outcome.
    #[schemars(with = "Option<String>")]
    pub(super) from: Option<Text>,
    /// Its values that mean an error; `*` is any value.
    #[serde(default)]
    pub(super) error: Vec<String>,
    /// The attribute with the message.
    #[schemars(with = "Option<String>")]
    pub(super) message: Option<Text>,
    /// Templates for the message of a call that raised; the first whose attributes are all there counts.
    #[serde(default)]
    #[schemars(with = "Vec<String>")]
    pub(super) raised: Vec<Text>,
}

#[derive(Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub(super) struct ExceptionYaml {
    /// The exception itself, read with its stack trace: the one that leaves the call, or the one that comes in, as the argument
    /// behind the first or as the arguments of an `__exit__`. The templates are for where it could not be read. With `kind: event`;
    /// with `kind: pair` it is `argument`, of the calls that end the span.
    pub(super) from: Option<Read>,
    /// A template for its type, or several: the first whose attributes are all there counts. Without a type there is
    /// no exception.
    #[serde(rename = "type")]
    #[schemars(with = "Option<Templates>")]
    pub(super) kind: Option<Spanned<Templates>>,
    /// The same for its message. A message that begins with the type, as Python prints it, loses that beginning.
    #[schemars(with = "Option<Templates>")]
    pub(super) message: Option<Spanned<Templates>>,
    /// The same for its stack trace.
    #[schemars(with = "Option<Templates>")]
    pub(super) stacktrace: Option<Spanned<Templates>>,
}

#[derive(Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub(super) struct EndYaml {
    /// The function that ends the span, or `return`: the return of the call that began it.
    #[schemars(with = "String")]
    pub(super) target: Text,
    /// Versions of the pack's package that have the function.
    #[schemars(with = "Option<String>")]
    pub(super) versions: Option<Text>,
    /// Modules in whose contents the function is searched.
    #[serde(default)]
    #[schemars(with = "Vec<String>")]
    pub(super) found_in: Vec<Text>,
    /// What is captured there.
    #[serde(default)]
    #[schemars(with = "std::collections::BTreeMap<String, Sources>")]
    pub(super) attributes: Ordered<Spanned<Sources>>,
    /// Whether the span ends when that call begins or when it ends.
    pub(super) at: Option<Moment>,
    /// Only calls whose attributes have one of these values; `*` is any value.
    #[serde(default)]
    #[schemars(with = "std::collections::BTreeMap<String, Vec<String>>")]
    pub(super) when: Ordered<Spanned<Vec<String>>>,
    /// No calls whose attributes have one of these values; `*` is any value.
    #[serde(default)]
    #[schemars(with = "std::collections::BTreeMap<String, Vec<String>>")]
    pub(super) unless: Ordered<Spanned<Vec<String>>>,
}

#[derive(Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub(super) struct RuleYaml {
    /// Calls whose attributes have one of these values; `*` is any value.
    #[serde(default)]
    #[schemars(with = "std::collections::BTreeMap<String, Vec<String>>")]
    pub(super) when: Ordered<Spanned<Vec<String>>>,
    /// No calls whose attributes have one of these values; `*` is any value.
    #[serde(default)]
    #[schemars(with = "std::collections::BTreeMap<String, Vec<String>>")]
    pub(super) unless: Ordered<Spanned<Vec<String>>>,
    /// A template for the id of the run that the process works for from here on.
    #[schemars(with = "Option<String>")]
    pub(super) run: Option<Text>,
    /// A span begins. It needs an `id` and, if it is to end in a later call, a `key`.
    pub(super) begin: Option<SpanYaml>,
    /// The span with this id and the same key ends.
    #[schemars(with = "Option<String>")]
    pub(super) end: Option<Text>,
    /// It is told of an open span: `command`, `innermost`, or the id of a span of this pack, with the same key.
    #[schemars(with = "Option<String>")]
    pub(super) on: Option<Text>,
    /// The captured attributes that the span gets. Not given: all, or none with `event`.
    #[schemars(with = "Option<Vec<String>>")]
    pub(super) attributes: Option<Vec<Text>>,
    /// More attributes that it gets: `const` and `template`.
    #[serde(default)]
    #[schemars(with = "std::collections::BTreeMap<String, Sources>")]
    pub(super) set: Ordered<Spanned<Sources>>,
    /// An event of the span.
    pub(super) event: Option<EventYaml>,
    /// An exception of the span.
    pub(super) exception: Option<ExceptionYaml>,
    /// The status of the span.
    pub(super) status: Option<StatusYaml>,
    /// An attribute whose name is captured.
    pub(super) dynamic: Option<DynamicYaml>,
    /// More links of the span.
    #[serde(default)]
    pub(super) links: Vec<LinkYaml>,
}

#[derive(Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub(super) struct EventYaml {
    /// A template for its name.
    #[schemars(with = "String")]
    pub(super) name: Text,
    /// The captured attributes that it has. Not given: all.
    #[schemars(with = "Option<Vec<String>>")]
    pub(super) attributes: Option<Vec<Text>>,
}

#[derive(Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub(super) struct LogYaml {
    /// The attribute with the message.
    #[schemars(with = "String")]
    pub(super) body: Text,
    /// The attributes with what is put into the message at its `%s`, `%d` and so on.
    #[serde(default)]
    #[schemars(with = "Vec<String>")]
    pub(super) arguments: Vec<Text>,
    /// The attribute with the level: a number of Python's `logging`, or a name.
    #[schemars(with = "String")]
    pub(super) level: Text,
    /// A template for the name of the logger.
    #[schemars(with = "String")]
    pub(super) logger: Text,
    /// The attribute with the name of the event.
    #[schemars(with = "Option<String>")]
    pub(super) event: Option<Text>,
}

#[derive(Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub(super) struct DynamicYaml {
    /// The attribute with the name.
    #[schemars(with = "String")]
    pub(super) name: Text,
    /// The attribute with the value.
    #[schemars(with = "String")]
    pub(super) value: Text,
    /// What the name must begin with. Not given: anything.
    #[serde(default)]
    pub(super) prefixes: Vec<String>,
}

#[derive(Default, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub(super) struct SourceYaml {
    /// Where the value is: `self.name`, `arg(1, 'sql')`, `return['rows']`, ...
    pub(super) path: Option<String>,
    /// When it is read. Not given: at the beginning, if it is there then.
    pub(super) at: Option<Moment>,
    /// Longest text, in bytes of its representation in memory.
    pub(super) max: Option<u32>,
    /// Values to replace. `null`: then the attribute is absent. `"*"`: all other values.
    #[serde(default)]
    #[schemars(with = "std::collections::BTreeMap<String, Option<Scalar>>")]
    pub(super) values: Ordered<Option<Scalar>>,
    /// This value, where no path gave one.
    #[serde(rename = "const")]
    pub(super) constant: Option<Scalar>,
    /// A text of other attributes, where no path gave a value and all of them are there.
    pub(super) template: Option<String>,
    /// The item of this attribute, where no path gave a value and it is a list of one.
    pub(super) only: Option<String>,
    /// The first word of the SQL statement in this attribute, where no path gave a value.
    pub(super) sql_operation: Option<String>,
    /// An integer to add to the integer that the template gives.
    pub(super) add: Option<i64>,
}

/// A path, `{path: ...}`, `{const: ...}`, `{template: ...}`, `{only: ...}`, or a list of these: the last that has a value wins.
pub(super) struct Sources(pub(super) Vec<SourceYaml>);

impl<'de> Deserialize<'de> for Sources {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_any(SourcesVisitor)
    }
}

impl JsonSchema for Sources {
    fn schema_name() -> Cow<'static, str> {
        "Sources".into()
    }

    fn json_schema(generator: &mut SchemaGenerator) -> Schema {
        let source = generator.subschema_for::<SourceYaml>();
        json_schema!({
            "description": "Where a value comes from: a path, or more about it, or a list of these: the last that has a value wins.",
            "anyOf": [
                { "type": "string" },
                source,
                { "type": "array", "items": { "anyOf": [{ "type": "string" }, source] } },
            ],
        })
    }
}

struct SourcesVisitor;

impl<'de> Visitor<'de> for SourcesVisitor {
    type Value = Sources;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a path, `{path: ..., at: enter | exit, max: bytes}`, `{const: ...}`, `{template: ...}`, `{only: ...}`, or a list of these")
    }

    fn visit_str<E: Error>(self, path: &str) -> Result<Sources, E> {
        Ok(Sources(vec![SourceYaml { path: Some(path.to_owned()), ..SourceYaml::default() }]))
    }

    fn visit_map<A: MapAccess<'de>>(self, map: A) -> Result<Sources, A::Error> {
        SourceYaml::deserialize(MapAccessDeserializer::new(map)).map(|source| Sources(vec![source]))
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<Sources, A::Error> {
        let mut sources = Vec::new();
        while let Some(Sources(more)) = seq.next_element()? {
            sources.extend(more);
        }
        Ok(Sources(sources))
    }
}

/// One template or several.
pub(super) struct Templates(pub(super) Vec<String>);

impl<'de> Deserialize<'de> for Templates {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct TemplatesVisitor;
        impl<'de> Visitor<'de> for TemplatesVisitor {
            type Value = Templates;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a template or a list of templates")
            }

            fn visit_str<E: Error>(self, text: &str) -> Result<Templates, E> {
                Ok(Templates(vec![text.to_owned()]))
            }

            fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<Templates, A::Error> {
                let mut templates = Vec::new();
                while let Some(text) = seq.next_element()? {
                    templates.push(text);
                }
                Ok(Templates(templates))
            }
        }
        deserializer.deserialize_any(TemplatesVisitor)
    }
}

impl JsonSchema for Templates {
    fn schema_name() -> Cow<'static, str> {
        "Templates".into()
    }

    fn json_schema(_: &mut SchemaGenerator) -> Schema {
        json_schema!({ "anyOf": [{ "type": "string" }, { "type": "array", "items": { "type": "string" } }] })
    }
}

/// A text, a number, or true or false.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Scalar(pub(super) Value);

impl<'de> Deserialize<'de> for Scalar {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct ScalarVisitor;
        impl Visitor<'_> for ScalarVisitor {
            type Value = Scalar;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a text, a number, true or false")
            }

            fn visit_bool<E: Error>(self, value: bool) -> Result<Scalar, E> {
                Ok(Scalar(Value::Bool(value)))
            }

            fn visit_i64<E: Error>(self, value: i64) -> Result<Scalar, E> {
                Ok(Scalar(Value::I64(value)))
            }

            fn visit_u64<E: Error>(self, value: u64) -> Result<Scalar, E> {
                i64::try_from(value).map(|value| Scalar(Value::I64(value))).map_err(E::custom)
            }

            fn visit_f64<E: Error>(self, value: f64) -> Result<Scalar, E> {
                Ok(Scalar(Value::F64(value)))
            }

            fn visit_str<E: Error>(self, value: &str) -> Result<Scalar, E> {
                Ok(Scalar(Value::from(value.to_owned())))
            }
        }
        deserializer.deserialize_any(ScalarVisitor)
    }
}

impl JsonSchema for Scalar {
    fn schema_name() -> Cow<'static, str> {
        "Scalar".into()
    }

    fn json_schema(_: &mut SchemaGenerator) -> Schema {
        json_schema!({ "type": ["string", "number", "boolean"] })
    }
}

/// A mapping in the order of the file.
pub(super) struct Ordered<V>(pub(super) Vec<(String, V)>);

impl<V> Default for Ordered<V> {
    fn default() -> Self {
        Self(Vec::new())
    }
}

impl<'de, V: Deserialize<'de>> Deserialize<'de> for Ordered<V> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct OrderedVisitor<V>(PhantomData<V>);
        impl<'de, V: Deserialize<'de>> Visitor<'de> for OrderedVisitor<V> {
            type Value = Ordered<V>;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a mapping by attribute names")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Ordered<V>, A::Error> {
                let mut entries = Vec::new();
                while let Some(entry) = map.next_entry()? {
                    entries.push(entry);
                }
                Ok(Ordered(entries))
            }
        }
        deserializer.deserialize_map(OrderedVisitor(PhantomData))
    }
}
