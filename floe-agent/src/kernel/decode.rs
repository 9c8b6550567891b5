//! Bytes of the ring buffers to typed events. Pure; a record that does not fit its type is an error, never a panic.

use bytemuck::{AnyBitPattern, try_pod_read_unaligned};
use floe_ebpf::{CallEnter, CallReturn, Field, Header, ProcessEvent, Urgent, enter_flags, event, outcome, value};
use thiserror::Error;

use super::event::{Event, FieldValue, Outcome, Stamp, Value};
use crate::units::{BootNanos, Epoch, Pid, ProbeId, Tid, UserAddr};

/// A record that cannot be decoded. It means that the programs and the agent do not fit together.
#[derive(Clone, Copy, Debug, Error, PartialEq, Eq)]
#[error(
    "a record of {len} bytes from the kernel does not decode ({what}); the eBPF object does not belong to this agent"
)]
pub struct DecodeError {
    /// What is wrong.
    pub what: &'static str,
    /// Length of the record.
    pub len: usize,
}

fn head<T: AnyBitPattern>(bytes: &[u8]) -> Result<(T, &[u8]), DecodeError> {
    let error = DecodeError { what: "shorter than its head", len: bytes.len() };
    let (head, rest) = bytes.split_at_checked(size_of::<T>()).ok_or(error)?;
    Ok((try_pod_read_unaligned(head).map_err(|_| error)?, rest))
}

fn stamp(header: &Header) -> Stamp {
    Stamp {
        pid: Pid(header.tgid),
        tid: Tid(header.tid),
        epoch: Epoch(header.epoch),
        time: BootNanos(header.time),
        lost: header.lost,
    }
}

/// Decodes a record of the ring buffer `EVENTS`.
pub fn decode(bytes: &[u8]) -> Result<Event, DecodeError> {
    let (header, _) = head::<Header>(bytes)?;
    let stamp = stamp(&header);
    match header.kind {
        event::ENTER => {
            let (record, rest) = head::<CallEnter>(bytes)?;
            Ok(Event::Enter {
                stamp,
                probe: ProbeId(record.probe),
                depth: record.depth,
                recursion: record.flags & enter_flags::RECURSION != 0,
                object: UserAddr(record.object),
                fields: fields(rest, record.fields)?,
            })
        }
        event::RETURN => {
            let (record, rest) = head::<CallReturn>(bytes)?;
            Ok(Event::Return {
                stamp,
                call: BootNanos(record.call),
                probe: ProbeId(record.probe),
                outcome: if record.outcome == outcome::RAISED { Outcome::Raised } else { Outcome::Returned },
                object: UserAddr(record.object),
                fields: fields(rest, record.fields)?,
            })
        }
        event::FORK => {
            let (record, _) = head::<ProcessEvent>(bytes)?;
            Ok(Event::Fork { stamp, child: Pid(record.other), child_epoch: Epoch(record.other_epoch) })
        }
        event::EXEC => Ok(Event::Exec { stamp }),
        event::THREAD => {
            let (record, _) = head::<ProcessEvent>(bytes)?;
            Ok(Event::Thread { stamp, child: Tid(record.other) })
        }
        event::EXIT => {
            let (record, _) = head::<ProcessEvent>(bytes)?;
            Ok(Event::Exit { stamp, process_ended: record.other != 0, code: record.code as u32 })
        }
        _ => Err(DecodeError { what: "unknown kind", len: bytes.len() }),
    }
}

/// Decodes a record of the ring buffer `URGENT`.
pub fn decode_urgent(bytes: &[u8]) -> Result<Urgent, DecodeError> {
    Ok(head::<Urgent>(bytes)?.0)
}

/// The captured fields behind a record's head.
fn fields(bytes: &[u8], len: u32) -> Result<Vec<FieldValue>, DecodeError> {
    let error = |what| DecodeError { what, len: bytes.len() };
    let rest = bytes.get(..len as usize).ok_or_else(|| error("fewer bytes than its fields"))?;
    let mut reader = Reader { rest, len: bytes.len() };
    let mut fields = Vec::new();
    while let Some((field, payload)) = reader.next()? {
        if let Some((value, cut)) = reader.value(field, payload, 0)? {
            fields.push(FieldValue { field: field.field, value, cut });
        }
    }
    Ok(fields)
}

/// Most lists within each other: two of a pack's path, and what a path object is made of.
const MAX_DEPTH: usize = 3;

/// Reads fields; those of lists are many fields that make one value.
struct Reader<'a> {
    rest: &'a [u8],
    len: usize,
}

/// Values of an item of a list: one, or in dicts a key and a value; fewer if they could not be read.
type Item = Vec<(Value, bool)>;

impl<'a> Reader<'a> {
    fn error(&self, what: &'static str) -> DecodeError {
        DecodeError { what, len: self.len }
    }

    fn next(&mut self) -> Result<Option<(Field, &'a [u8])>, DecodeError> {
        if self.rest.len() < size_of::<Field>() {
            return Ok(None);
        }
        let (field, behind) = head::<Field>(self.rest)?;
        let payload = behind.get(..field.len as usize).ok_or_else(|| self.error("a field longer than the record"))?;
        self.rest = behind.get((field.len as usize).next_multiple_of(4)..).unwrap_or(&[]);
        Ok(Some((field, payload)))
    }

    /// The value that a field is or begins, and whether something of it is missing. Nothing if a part that must be known
    /// is not.
    fn value(&mut self, field: Field, payload: &[u8], depth: usize) -> Result<Option<(Value, bool)>, DecodeError> {
        let cut = field.cut != 0;
        let value = match field.kind {
            value::UTF8 | value::LATIN1 | value::UCS2 | value::UCS4 => {
                Value::Str { text: text(field.kind, payload), cut }
            }
            value::INT => Value::Int(i64::from_le_bytes(eight(payload).ok_or_else(|| self.error("a short int"))?)),
            value::FLOAT => {
                Value::Float(f64::from_le_bytes(eight(payload).ok_or_else(|| self.error("a short float"))?))
            }
            value::BOOL => Value::Bool(payload.first() == Some(&1)),
            value::NONE => Value::None,
            value::UUID => Value::Str { text: uuid(payload).ok_or_else(|| self.error("a short UUID"))?, cut: false },
            value::DATETIME | value::DATE => {
                Value::Str { text: datetime(payload).ok_or_else(|| self.error("a short date"))?, cut: false }
            }
            value::LIST | value::JOIN | value::MAP | value::RAW_PATH | value::PATH_PARTS => {
                return self.list(field.kind, payload, depth);
            }
            _ => return Err(self.error("a field of unknown kind")),
        };
        Ok(Some((value, cut)))
    }

    /// What a list makes: its items follow.
    fn list(&mut self, kind: u8, payload: &[u8], depth: usize) -> Result<Option<(Value, bool)>, DecodeError> {
        if depth >= MAX_DEPTH {
            return Err(self.error("lists nested too deep"));
        }
        let mut items: Vec<Item> = Vec::new();
        // Unless it ends as it should.
        let mut cut = true;
        while let Some((field, payload)) = self.next()? {
            match field.kind {
                value::ITEM => items.push(Vec::new()),
                value::END => {
                    cut = field.cut != 0;
                    break;
                }
                _ => {
                    let value = self.value(field, payload, depth + 1)?;
                    let item = items.last_mut().ok_or_else(|| self.error("a list without items"))?;
                    item.extend(value);
                }
            }
        }
        Ok(match kind {
            value::LIST => {
                let known: Vec<_> = items.iter_mut().filter_map(Vec::pop).collect();
                cut |= known.len() < items.len() || known.iter().any(|(_, cut)| *cut);
                Some((Value::List(known.into_iter().map(|(value, _)| value).collect()), cut))
            }
            value::MAP => {
                let mut entries = Vec::new();
                for item in items {
                    match <[_; 2]>::try_from(item) {
                        Ok([(Value::Str { text, cut: false }, _), (value, value_cut)]) => {
                            cut |= value_cut;
                            entries.push((text, value));
                        }
                        _ => cut = true,
                    }
                }
                Some((Value::Map(entries), cut))
            }
            _ => {
                let texts: Option<Vec<_>> = items.into_iter().map(|mut item| item.pop().and_then(as_text)).collect();
                texts.map(|texts| {
                    cut |= texts.iter().any(|(_, cut)| *cut);
                    let texts: Vec<_> = texts.into_iter().map(|(text, _)| text).collect();
                    let text = match kind {
                        value::JOIN => {
                            let end = payload.iter().position(|&b| b == 0).unwrap_or(payload.len());
                            texts.join(&String::from_utf8_lossy(&payload[..end]))
                        }
                        value::RAW_PATH => posix_path(&texts),
                        _ => path_of_parts(&texts),
                    };
                    (Value::Str { text, cut }, cut)
                })
            }
        })
    }
}

/// A simple value as `str` gives it.
fn as_text((value, cut): (Value, bool)) -> Option<(String, bool)> {
    match value {
        Value::Str { text, .. } => Some((text, cut)),
        Value::Int(int) => Some((int.to_string(), cut)),
        Value::Bool(true) => Some(("True".into(), cut)),
        Value::Bool(false) => Some(("False".into(), cut)),
        // Python's `str` of a float is not Rust's.
        Value::Float(_) | Value::None | Value::List(_) | Value::Map(_) => None,
    }
}

/// `str` of a `PurePosixPath` that was made of these (3.12 on): as `_load_parts`, `_parse_path` and `_format_parsed_parts`
/// in Lib/pathlib.py.
fn posix_path(raw: &[String]) -> String {
    // os.path.join: what begins with a slash drops what is before.
    let first = raw.iter().rposition(|part| part.starts_with('/')).unwrap_or(0);
    let joined = raw[first..].iter().fold(String::new(), |path, part| {
        let slash = if path.is_empty() || path.ends_with('/') { "" } else { "/" };
        path + slash + part
    });
    let slashes = joined.chars().take_while(|&c| c == '/').count();
    // POSIX lets exactly two slashes mean something else than one.
    let root = match slashes {
        0 => "",
        2 => "//",
        _ => "/",
    };
    let tail: Vec<_> = joined.split('/').filter(|part| !part.is_empty() && *part != ".").collect();
    if root.is_empty() && tail.is_empty() { ".".to_owned() } else { format!("{root}{}", tail.join("/")) }
}

/// The same of its parts (3.8 to 3.11): the root, if there is one, is the first.
fn path_of_parts(parts: &[String]) -> String {
    match parts {
        [] => ".".to_owned(),
        [root, tail @ ..] if root.starts_with('/') => format!("{root}{}", tail.join("/")),
        parts => parts.join("/"),
    }
}

/// `str` of a UUID from the digits of its int.
fn uuid(payload: &[u8]) -> Option<String> {
    let digits = payload.get(..20)?.as_chunks::<4>().0;
    let number =
        digits.iter().rev().fold(0_u128, |number, digit| number << 30 | u128::from(u32::from_le_bytes(*digit)));
    let hex = format!("{number:032x}");
    Some(format!("{}-{}-{}-{}-{}", &hex[..8], &hex[8..12], &hex[12..16], &hex[16..20], &hex[20..]))
}

/// `str` of a `datetime` or `date`.
fn datetime(payload: &[u8]) -> Option<String> {
    let [high, low, month, day] = *payload.first_chunk()?;
    let date = format!("{:04}-{month:02}-{day:02}", u16::from_be_bytes([high, low]));
    let Some(&[hour, minute, second, a, b, c, _, _]) = payload.get(4..).and_then(<[u8]>::first_chunk) else {
        return Some(date);
    };
    let micros = match u32::from_be_bytes([0, a, b, c]) {
        0 => String::new(),
        micros => format!(".{micros:06}"),
    };
    let offset = i32::from_le_bytes(*payload.get(12..)?.first_chunk()?);
    let (sign, seconds) = (if offset < 0 { '-' } else { '+' }, offset.unsigned_abs());
    let zone = match (offset, seconds % 60) {
        (i32::MIN, _) => String::new(),
        (_, 0) => format!("{sign}{:02}:{:02}", seconds / 3600, seconds / 60 % 60),
        (_, rest) => format!("{sign}{:02}:{:02}:{rest:02}", seconds / 3600, seconds / 60 % 60),
    };
    Some(format!("{date} {hour:02}:{minute:02}:{second:02}{micros}{zone}"))
}

fn eight(payload: &[u8]) -> Option<[u8; 8]> {
    payload.get(..8)?.try_into().ok()
}

/// Text in one of CPython's representations (PEP 393). Lone surrogates, which a str may hold, become U+FFFD.
fn text(kind: u8, payload: &[u8]) -> String {
    match kind {
        value::LATIN1 => payload.iter().map(|&b| char::from(b)).collect(),
        value::UCS2 => payload
            .chunks_exact(2)
            .map(|c| char::from_u32(u32::from(u16::from_le_bytes([c[0], c[1]]))).unwrap_or(char::REPLACEMENT_CHARACTER))
            .collect(),
        value::UCS4 => payload
            .chunks_exact(4)
            .map(|c| {
                char::from_u32(u32::from_le_bytes([c[0], c[1], c[2], c[3]])).unwrap_or(char::REPLACEMENT_CHARACTER)
            })
            .collect(),
        _ => String::from_utf8_lossy(payload).into_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn record(fields: &[u8]) -> Vec<u8> {
        let header = Header { kind: event::ENTER, flags: 0, lost: 2, tgid: 7, tid: 8, epoch: 3, time: 99 };
        let enter = CallEnter { header, probe: 5, depth: 1, fields: fields.len() as u32, flags: 0, object: 64 };
        let mut bytes = bytemuck::bytes_of(&enter).to_vec();
        bytes.extend_from_slice(fields);
        bytes
    }

    fn field(number: u8, kind: u8, payload: &[u8]) -> Vec<u8> {
        let field = Field { field: number, kind, cut: 0, reserved: 0, len: payload.len() as u32 };
        let mut bytes = bytemuck::bytes_of(&field).to_vec();
        bytes.extend_from_slice(payload);
        bytes.resize(bytes.len().next_multiple_of(4), 0);
        bytes
    }

    #[test]
    fn an_enter_record_with_every_kind_of_value_decodes() {
        let mut bytes = field(0, value::UTF8, b"abc");
        bytes.extend(field(1, value::LATIN1, &[0xe9]));
        bytes.extend(field(2, value::UCS2, &[0xac, 0x20]));
        bytes.extend(field(3, value::UCS4, &[0x00, 0xf6, 0x01, 0x00]));
        bytes.extend(field(4, value::INT, &(-5i64).to_le_bytes()));
        bytes.extend(field(5, value::FLOAT, &1.5f64.to_le_bytes()));
        bytes.extend(field(6, value::BOOL, &1u64.to_le_bytes()));
        bytes.extend(field(7, value::NONE, &[]));
        let Event::Enter { stamp, probe, object, fields, .. } = decode(&record(&bytes)).expect("decodes") else {
            panic!("not an enter event");
        };
        assert_eq!((stamp.pid, stamp.tid, stamp.lost, probe), (Pid(7), Tid(8), 2, ProbeId(5)));
        assert_eq!(object, UserAddr(64));
        let text = |text: &str| Value::Str { text: text.into(), cut: false };
        let values: Vec<_> = fields.into_iter().map(|f| f.value).collect();
        assert_eq!(
            values,
            [
                text("abc"),
                text("é"),
                text("€"),
                text("😀"),
                Value::Int(-5),
                Value::Float(1.5),
                Value::Bool(true),
                Value::None
            ]
        );
    }

    fn marker(kind: u8, cut: bool) -> Vec<u8> {
        let field = Field { field: 1, kind, cut: cut.into(), reserved: 0, len: 0 };
        bytemuck::bytes_of(&field).to_vec()
    }

    /// A list of these items, each the fields that were captured of it.
    fn list(kind: u8, separator: [u8; 4], items: &[Vec<u8>], cut: bool) -> Vec<u8> {
        let mut bytes = field(1, kind, &separator);
        for item in items {
            bytes.extend(marker(value::ITEM, false));
            bytes.extend(item);
        }
        bytes.extend(marker(value::END, cut));
        bytes
    }

    fn decoded(bytes: &[u8]) -> Vec<(Value, bool)> {
        let Ok(Event::Enter { fields, .. }) = decode(&record(bytes)) else { panic!("does not decode") };
        fields.into_iter().map(|field| (field.value, field.cut)).collect()
    }

    fn s(text: &str) -> Value {
        Value::Str { text: text.into(), cut: false }
    }

    #[test]
    fn lists_texts_of_lists_and_dicts_are_one_value() {
        let text = |text: &str| field(1, value::UTF8, text.as_bytes());
        let int = |int: i64| field(1, value::INT, &int.to_le_bytes());
        let ab = [text("a"), text("b")];
        assert_eq!(decoded(&list(value::LIST, *b"\0\0\0\0", &ab, false)), [(Value::List(vec![s("a"), s("b")]), false)]);
        assert_eq!(decoded(&list(value::LIST, *b"\0\0\0\0", &[], false)), [(Value::List(vec![]), false)]);
        assert_eq!(decoded(&list(value::JOIN, *b"/\0\0\0", &ab, false)), [(s("a/b"), false)]);
        assert_eq!(decoded(&list(value::JOIN, *b" -> ", &[text("a"), int(5)], false)), [(s("a -> 5"), false)]);
        let joined = |text: &str| {
            list(
                value::JOIN,
                *b"/\0\0\0",
                &text.split('/').map(|part| field(1, value::UTF8, part.as_bytes())).collect::<Vec<_>>(),
                false,
            )
        };
        assert_eq!(
            decoded(&list(value::LIST, *b"\0\0\0\0", &[joined("a/b"), joined("c")], false)),
            [(Value::List(vec![s("a/b"), s("c")]), false)]
        );
        let entries = [[text("k"), int(1)].concat(), [text("l"), text("x")].concat()];
        assert_eq!(
            decoded(&list(value::MAP, *b"\0\0\0\0", &entries, false)),
            [(Value::Map(vec![("k".into(), Value::Int(1)), ("l".into(), s("x"))]), false)]
        );
        // What comes behind is not part of it.
        let behind = [list(value::LIST, *b"\0\0\0\0", &ab[..1], false), int(7)].concat();
        assert_eq!(decoded(&behind), [(Value::List(vec![s("a")]), false), (Value::Int(7), false)]);
    }

    #[test]
    fn what_is_missing_in_a_list_is_marked_and_a_text_with_a_missing_part_is_absent() {
        let text = |text: &str| field(1, value::UTF8, text.as_bytes());
        let gap = [text("a"), vec![], text("b")];
        assert_eq!(decoded(&list(value::LIST, *b"\0\0\0\0", &gap, false)), [(Value::List(vec![s("a"), s("b")]), true)]);
        assert_eq!(decoded(&list(value::JOIN, *b"/\0\0\0", &gap, false)), []);
        assert_eq!(decoded(&list(value::RAW_PATH, *b"\0\0\0\0", &gap, false)), []);
        assert_eq!(decoded(&list(value::LIST, *b"\0\0\0\0", &gap[..1], true)), [(Value::List(vec![s("a")]), true)]);
        // The record was full before the list ended.
        let mut open = list(value::LIST, *b"\0\0\0\0", &gap[..1], false);
        open.truncate(open.len() - size_of::<Field>());
        assert_eq!(decoded(&open), [(Value::List(vec![s("a")]), true)]);
        let cut = Field { field: 1, kind: value::UTF8, cut: 1, reserved: 0, len: 4 };
        let long = [bytemuck::bytes_of(&cut), b"long"].concat();
        let beginning = Value::Str { text: "long".into(), cut: true };
        assert_eq!(
            decoded(&list(value::LIST, *b"\0\0\0\0", std::slice::from_ref(&long), false)),
            [(Value::List(vec![beginning]), true)]
        );
        // A dict's entry without a text as key, or without its value.
        let entries = [[field(1, value::INT, &[0; 8]), text("x")].concat(), text("k"), [text("l"), text("y")].concat()];
        assert_eq!(
            decoded(&list(value::MAP, *b"\0\0\0\0", &entries, false)),
            [(Value::Map(vec![("l".into(), s("y"))]), true)]
        );
    }

    #[test]
    fn paths_are_what_python_makes_of_their_pieces() {
        let path = |raw: &[&str]| posix_path(&raw.iter().map(|&part| part.to_owned()).collect::<Vec<_>>());
        for (raw, expected) in [
            (&[][..], "."),
            (&[""], "."),
            (&["."], "."),
            (&["a", "b"], "a/b"),
            (&["a/./b//c/"], "a/b/c"),
            (&["a", "/b", "c"], "/b/c"),
            (&["/"], "/"),
            (&["/", "z"], "/z"),
            (&["a/", "", "z"], "a/z"),
            (&["//a"], "//a"),
            (&["///a"], "/a"),
            (&["a", "../b"], "a/../b"),
            (&["a", ""], "a"),
        ] {
            assert_eq!(path(raw), expected, "{raw:?}");
        }
        let parts = |parts: &[&str]| path_of_parts(&parts.iter().map(|&part| part.to_owned()).collect::<Vec<_>>());
        assert_eq!(parts(&[]), ".");
        assert_eq!(parts(&["/"]), "/");
        assert_eq!(parts(&["/", "a", "b"]), "/a/b");
        assert_eq!(parts(&["//", "a"]), "//a");
        assert_eq!(parts(&["a", "b"]), "a/b");
    }

    #[test]
    fn uuids_and_dates_are_what_str_gives() {
        let mut digits = 0x1234_5678_9abc_def0_0fed_cba9_8765_4321_u128;
        let mut payload = Vec::new();
        for _ in 0..5 {
            payload.extend((digits as u32 & 0x3fff_ffff).to_le_bytes());
            digits >>= 30;
        }
        assert_eq!(uuid(&payload).unwrap(), "12345678-9abc-def0-0fed-cba987654321");
        let date = [0x07, 0xe8, 2, 29];
        assert_eq!(datetime(&date).unwrap(), "2024-02-29");
        let at = |micros: [u8; 3], offset: i32| {
            datetime(&[&date[..], &[23, 5, 9], &micros, &[0, 0], &offset.to_le_bytes()].concat()).unwrap()
        };
        assert_eq!(at([0, 0, 0], i32::MIN), "2024-02-29 23:05:09");
        assert_eq!(at([0, 1, 0], 0), "2024-02-29 23:05:09.000256+00:00");
        assert_eq!(at([0, 0, 0], -19800), "2024-02-29 23:05:09-05:30");
        assert_eq!(at([0, 0, 0], 3601), "2024-02-29 23:05:09+01:00:01");
    }

    #[test]
    fn no_cut_of_a_record_makes_the_decoder_panic() {
        let inner = list(value::JOIN, *b"/\0\0\0", &[field(1, value::UTF8, b"x")], false);
        let mut fields = field(0, value::UTF8, b"some text");
        fields.extend(list(value::LIST, *b"\0\0\0\0", &[inner], true));
        fields.extend(field(2, value::UUID, &[7; 20]));
        fields.extend(field(3, value::DATETIME, &[7; 16]));
        let bytes = record(&fields);
        for len in 0..bytes.len() {
            let _ = decode(&bytes[..len]);
        }
        for i in 0..bytes.len() {
            for byte in [0, 0x7f, 0xff] {
                let mut bytes = bytes.clone();
                bytes[i] = byte;
                let _ = decode(&bytes);
            }
        }
    }
}
