//! Ids that are computed, so that processes and agents that never talk agree on them.
//!
//! `docs/correlation.md` describes the derivation for others; a test runs the program that stands there.

use opentelemetry::trace::{SpanId, TraceId};
use sha2::{Digest as _, Sha256};

/// The key of a run's own span: the root of its trace.
pub const RUN: &str = "run";

/// The trace of a run. A UUID is its 128 bits; any other text is hashed.
pub fn trace_id(run_id: &str) -> TraceId {
    let id = uuid_bytes(run_id).filter(|bytes| *bytes != [0; 16]).unwrap_or_else(|| hash(&["floe.trace", run_id]));
    TraceId::from_bytes(id)
}

/// The span of a thing in a trace, for instance `step/load_orders/0`. The same thing may happen again in the trace:
/// `occurrence` counts from 0.
pub fn span_id(trace: TraceId, key: &str, occurrence: u32) -> SpanId {
    let trace = trace.to_string();
    SpanId::from_bytes(match occurrence {
        0 => hash(&["floe.span", &trace, key]),
        again => hash(&["floe.span", &trace, key, &again.to_string()]),
    })
}

/// The ids of a span that a program exports itself, as UUIDs write them: the second one's lower half is the span's.
pub(super) fn external(trace: &str, span: &str) -> Option<(TraceId, SpanId)> {
    let trace = TraceId::from_bytes(uuid_bytes(trace)?);
    let span = SpanId::from_bytes(*uuid_bytes(span)?.last_chunk()?);
    (trace != TraceId::INVALID && span != SpanId::INVALID).then_some((trace, span))
}

/// The first bytes of the SHA-256 of the parts, joined by zero bytes. Never all zero: that is no valid id.
fn hash<const N: usize>(parts: &[&str]) -> [u8; N] {
    let digest = Sha256::digest(parts.join("\0").as_bytes());
    let mut id = [0; N];
    id.copy_from_slice(&digest[..N]);
    if id == [0; N] {
        id[N - 1] = 1;
    }
    id
}

/// The bits of a UUID: 32 hexadecimal digits, with or without the four dashes.
fn uuid_bytes(text: &str) -> Option<[u8; 16]> {
    let mut digits = [0; 32];
    match text.len() {
        32 => digits.copy_from_slice(text.as_bytes()),
        36 => {
            let mut groups = text.split('-');
            let mut at = 0;
            for length in [8, 4, 4, 4, 12] {
                let group = groups.next().filter(|group| group.len() == length)?;
                digits[at..at + length].copy_from_slice(group.as_bytes());
                at += length;
            }
        }
        _ => return None,
    }
    // `from_str_radix` would take a sign.
    let text = str::from_utf8(&digits).ok().filter(|text| text.bytes().all(|b| b.is_ascii_hexdigit()))?;
    u128::from_str_radix(text, 16).ok().map(u128::to_be_bytes)
}

/// Whether a text is a UUID.
pub(crate) fn is_uuid(text: &str) -> bool {
    uuid_bytes(text).is_some()
}

#[cfg(test)]
mod tests {
    use std::io::Write as _;
    use std::process::{Command, Stdio};

    use proptest::prelude::*;

    use super::*;

    const DOCUMENT: &str = include_str!("../../../docs/correlation.md");

    #[test]
    fn the_bits_of_a_uuid_are_the_trace() {
        for text in [
            "1c9bfa5c-7b7d-4c5e-9a58-2b3d6f0e8a11",
            "1C9BFA5C-7B7D-4C5E-9A58-2B3D6F0E8A11",
            "1c9bfa5c7b7d4c5e9a582b3d6f0e8a11",
        ] {
            assert_eq!(trace_id(text).to_string(), "1c9bfa5c7b7d4c5e9a582b3d6f0e8a11");
        }
    }

    #[test]
    fn what_is_no_uuid_is_hashed() {
        let texts = [
            "",
            "5",
            "00000000-0000-0000-0000-000000000000",
            "1c9bfa5c-7b7d4-c5e-9a58-2b3d6f0e8a11",
            "1c9bfa5c-7b7d-4c5e-9a58-2b3d6f0e8a1",
            "+c9bfa5c-7b7d-4c5e-9a58-2b3d6f0e8a11",
            "1c9bfa5c7b7d4c5e9a582b3d6f0e8ä1",
        ];
        let ids: std::collections::HashSet<_> = texts.iter().map(|text| trace_id(text)).collect();
        assert_eq!(ids.len(), texts.len());
        assert!(!ids.contains(&TraceId::INVALID));
    }

    #[test]
    fn another_occurrence_and_another_trace_are_other_spans() {
        let (one, two) = (trace_id("1"), trace_id("2"));
        let ids = [
            span_id(one, "k", 0),
            span_id(one, "k", 1),
            span_id(one, "k", 2),
            span_id(two, "k", 0),
            span_id(one, "l", 0),
        ];
        assert_eq!(ids.iter().collect::<std::collections::HashSet<_>>().len(), ids.len());
    }

    /// The indented block of the document that contains `mark`.
    fn block(mark: &str) -> String {
        let blocks = DOCUMENT.split("\n\n").filter(|block| block.contains(mark));
        let block =
            blocks.into_iter().find(|block| block.lines().all(|line| line.is_empty() || line.starts_with("    ")));
        block.expect(mark).lines().flat_map(|line| [line.strip_prefix("    ").unwrap_or(""), "\n"]).collect()
    }

    #[test]
    fn the_vectors_in_the_documentation_hold() {
        let rows: Vec<Vec<&str>> = DOCUMENT
            .lines()
            .skip_while(|line| !line.starts_with("| Run id |"))
            .skip(2)
            .take_while(|line| line.starts_with('|'))
            .map(|line| line.trim_matches('|').split('|').map(|cell| cell.trim().trim_matches('`')).collect())
            .collect();
        assert!(rows.len() >= 4);
        for row in rows {
            let [run, trace, key, occurrence, span] = row.try_into().unwrap();
            assert_eq!(trace_id(run).to_string(), trace, "{run}");
            assert_eq!(span_id(trace_id(run), key, occurrence.parse().unwrap()).to_string(), span, "{key}");
        }
    }

    #[test]
    fn the_program_in_the_documentation_computes_the_same() {
        let program = block("def trace_id")
            + "import sys\nfor line in sys.stdin:\n    run, key, n = line.rstrip('\\n').split('\\t')\n    trace = trace_id(run)\n    print(trace, span_id(trace, key, int(n)))\n";
        let cases = [
            ("1C9BFA5C-7b7d-4c5e-9a58-2b3d6f0e8a11", "run", 0),
            ("scheduled__2026-05-01", "step/load/0", 0),
            ("00000000-0000-0000-0000-000000000000", "asset/a/b", 1),
            ("1c9bfa5c-7b7d4-c5e-9a58-2b3d6f0e8a11", "node/model.shop.örders", 2),
            ("", "", 0),
        ];
        let mut child = Command::new("python3")
            .args(["-X", "utf8", "-c", &program])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .expect("python3 is needed for this test");
        let mut input = child.stdin.take().unwrap();
        for (run, key, n) in cases {
            writeln!(input, "{run}\t{key}\t{n}").unwrap();
        }
        drop(input);
        let output = child.wait_with_output().unwrap();
        let expected: Vec<String> = cases
            .iter()
            .map(|(run, key, n)| {
                let trace = trace_id(run);
                format!("{trace} {}", span_id(trace, key, *n))
            })
            .collect();
        assert_eq!(String::from_utf8(output.stdout).unwrap().lines().collect::<Vec<_>>(), expected);
    }

    proptest! {
        #[test]
        fn every_text_gives_a_valid_trace_and_always_the_same(run in any::<String>(), key in any::<String>(), n: u32) {
            let trace = trace_id(&run);
            prop_assert_ne!(trace, TraceId::INVALID);
            prop_assert_eq!(trace, trace_id(&run));
            prop_assert_ne!(span_id(trace, &key, n.min(u32::MAX - 1)), SpanId::INVALID);
        }

        #[test]
        fn every_uuid_but_the_nil_one_is_its_bits(bits in 1u128..) {
            let simple = format!("{bits:032x}");
            let dashed =
                [&simple[..8], &simple[8..12], &simple[12..16], &simple[16..20], &simple[20..]].join("-");
            prop_assert_eq!(trace_id(&simple).to_string(), simple.clone());
            prop_assert_eq!(trace_id(&dashed.to_uppercase()).to_string(), simple);
        }
    }
}
