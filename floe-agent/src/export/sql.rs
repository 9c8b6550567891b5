//! SQL without its literals, as the semantic conventions ask of `db.query.text`.
//!
//! The text may be cut, or of any dialect: this finds literals and comments, and understands nothing else.

/// What differs between databases in how literals are written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Dialect {
    /// `"..."` is a text, not a name.
    double_quotes: bool,
    /// A backslash in a text makes the next character part of it.
    backslashes: bool,
    /// `#` begins a comment; `'''` and `"""` are quotes.
    hash: bool,
}

impl Dialect {
    /// By `db.system.name`; standard SQL if that is not known.
    pub(super) fn of(system: Option<&str>) -> Self {
        let system = system.unwrap_or_default().to_ascii_lowercase();
        let is = |names: &[&str]| names.iter().any(|name| system.contains(name));
        Self {
            double_quotes: is(&["bigquery", "mysql", "mariadb", "spark", "databricks", "hive"]),
            backslashes: is(&[
                "bigquery",
                "mysql",
                "mariadb",
                "spark",
                "databricks",
                "hive",
                "snowflake",
                "clickhouse",
            ]),
            hash: is(&["bigquery", "mysql", "mariadb"]),
        }
    }
}

/// Replaces literals by `?` and leaves comments out.
pub(super) fn mask(sql: &str, dialect: Dialect) -> String {
    let bytes = sql.as_bytes();
    let mut out = String::with_capacity(sql.len());
    let mut at = 0;
    while at < bytes.len() {
        let rest = &sql[at..];
        let byte = bytes[at];
        let next = match byte {
            b'\'' => Some(at + quoted(rest, '\'', dialect, false)),
            b'"' if dialect.double_quotes => Some(at + quoted(rest, '"', dialect, false)),
            b'"' | b'`' => {
                let length = quoted(rest, byte as char, Dialect { backslashes: false, ..dialect }, false);
                out.push_str(&rest[..length]);
                at += length;
                continue;
            }
            b'$' => dollars(rest).map(|length| at + length),
            b'0'..=b'9' => Some(at + number(rest)),
            b'.' if bytes.get(at + 1).is_some_and(u8::is_ascii_digit) && !ends_in_word(&out) => Some(at + number(rest)),
            _ => None,
        };
        if let Some(next) = next {
            out.push('?');
            at = next;
            continue;
        }
        if rest.starts_with("--") || dialect.hash && byte == b'#' {
            at += rest.find('\n').unwrap_or(rest.len());
        } else if rest.starts_with("/*") {
            at += comment(rest);
            if !out.ends_with(char::is_whitespace) && !out.is_empty() {
                out.push(' ');
            }
        } else if byte.is_ascii_alphabetic() || byte == b'_' || byte >= 0x80 {
            let length = rest.find(|c: char| !c.is_alphanumeric() && c != '_' && c != '$').unwrap_or(rest.len()).max(1);
            let word = &rest[..length];
            at += length;
            match bytes.get(at) {
                // E'...', N'...', X'...', r"...": the letters belong to the literal.
                Some(b'\'') if is_prefix(word) => {
                    let escapes = word.eq_ignore_ascii_case("e");
                    at += quoted(&sql[at..], '\'', dialect, escapes);
                    out.push('?');
                }
                Some(b'"') if dialect.double_quotes && is_prefix(word) => {
                    at += quoted(&sql[at..], '"', dialect, false);
                    out.push('?');
                }
                _ => out.push_str(word),
            }
        } else {
            // A character that begins nothing; ASCII.
            out.push(byte as char);
            at += 1;
        }
    }
    out.truncate(out.trim_end().len());
    let begin = out.len() - out.trim_start().len();
    out.split_off(begin)
}

fn ends_in_word(text: &str) -> bool {
    text.ends_with(|c: char| c.is_alphanumeric() || matches!(c, '_' | '"' | '`' | ']' | ')'))
}

fn is_prefix(word: &str) -> bool {
    ["e", "n", "x", "b", "r", "br", "rb", "u"].iter().any(|prefix| word.eq_ignore_ascii_case(prefix))
}

/// Length of a quoted text, its quotes included; to the end if it is cut.
fn quoted(text: &str, quote: char, dialect: Dialect, escapes: bool) -> usize {
    let triple = [quote; 3].iter().collect::<String>();
    if dialect.hash && dialect.double_quotes && text.starts_with(&triple) && text.len() > 3 {
        return text[3..].find(&triple).map_or(text.len(), |end| end + 6);
    }
    let mut characters = text.char_indices().skip(1).peekable();
    while let Some((at, character)) = characters.next() {
        if character == '\\' && (dialect.backslashes || escapes) {
            characters.next();
        } else if character == quote {
            // Twice is once in the text.
            if characters.next_if(|(_, next)| *next == quote).is_none() {
                return at + quote.len_utf8();
            }
        }
    }
    text.len()
}

/// Length of `$$...$$` or `$tag$...$tag$`; `None` for `$1`.
fn dollars(text: &str) -> Option<usize> {
    let tag = text[1..].find(|c: char| !c.is_alphanumeric() && c != '_')? + 1;
    if !text[tag..].starts_with('$') || text[1..].starts_with(|c: char| c.is_ascii_digit()) {
        return None;
    }
    let delimiter = &text[..=tag];
    let body = &text[delimiter.len()..];
    Some(body.find(delimiter).map_or(text.len(), |end| end + 2 * delimiter.len()))
}

fn number(text: &str) -> usize {
    let bytes = text.as_bytes();
    let mut at = 0;
    while let Some(byte) = bytes.get(at) {
        let sign =
            matches!(byte, b'+' | b'-') && at > 0 && matches!(bytes[at - 1], b'e' | b'E') && !text.starts_with("0x");
        if byte.is_ascii_alphanumeric() || matches!(byte, b'.' | b'_') || sign {
            at += 1;
        } else {
            break;
        }
    }
    at
}

/// Length of a comment; they can be nested in some databases, where not nesting would leave text behind.
fn comment(text: &str) -> usize {
    let (mut depth, mut at) = (0, 0);
    let bytes = text.as_bytes();
    while at + 1 < bytes.len() {
        match &bytes[at..at + 2] {
            b"/*" => (depth, at) = (depth + 1, at + 2),
            b"*/" => {
                (depth, at) = (depth - 1, at + 2);
                if depth == 0 {
                    return at;
                }
            }
            _ => at += 1,
        }
    }
    // Not closed: the first end is the end, else all of it.
    text.find("*/").map_or(text.len(), |end| end + 2)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn standard(sql: &str) -> String {
        mask(sql, Dialect::of(Some("postgresql")))
    }

    #[test]
    fn literals_become_question_marks_and_names_stay() {
        for (sql, masked) in [
            (
                r#"select "a b", t1.x2 from "db"."s".t where n = 'O''Brien' and k in (1, -2.5e-3, .5)"#,
                r#"select "a b", t1.x2 from "db"."s".t where n = ? and k in (?, -?, ?)"#,
            ),
            ("select date '2026-01-01', x::varchar(10)", "select date ?, x::varchar(?)"),
            (
                "/* {\"app\": \"dbt\"} */\ncreate table t as (\n  select 1 -- one\n)",
                "create table t as (\n  select ? \n)",
            ),
            ("select E'a\\'b', N'x', x'0a', nx'y'", "select ?, ?, ?, nx?"),
            ("select $$a'b$$, $t$ $$ $t$, $1", "select ?, ?, $?"),
            ("insert into t values ('cut off", "insert into t values (?"),
            ("select 'C:\\', 'secret'", "select ?, ?"),
            ("select 0x1F, 1_000, 1e10", "select ?, ?, ?"),
            ("select ä.ö from ü where x = 'é'", "select ä.ö from ü where x = ?"),
            ("a /* x /* y */ z */ b", "a  b"),
            ("a /* cut", "a"),
            ("select t.1", "select t.?"),
            ("", ""),
        ] {
            assert_eq!(standard(sql), masked, "{sql}");
        }
    }

    #[test]
    fn dialects_differ_in_quotes_and_backslashes() {
        let bigquery = Dialect::of(Some("gcp.bigquery"));
        assert_eq!(mask(r#"select "a", `b`.c, 'it\'s', r"x" # d"#, bigquery), "select ?, `b`.c, ?, ?");
        assert_eq!(mask(r#"select """a"b""", 1"#, bigquery), "select ?, ?");
        assert_eq!(mask(r#"select "a", 'it\'s'"#, Dialect::of(Some("snowflake"))), r#"select "a", ?"#);
    }

    #[test]
    fn whatever_is_cut_where_ever_no_text_gets_out() {
        let sql =
            r#"select 'secret1', "name" /* 'secret2' */ from t where a = $$secret3$$ and b = E'\'secret4' -- secret5"#;
        for end in 0..=sql.len() {
            let masked = standard(&sql[..end]);
            assert!(!masked.contains("secret"), "{masked}");
        }
    }
}
