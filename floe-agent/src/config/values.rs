//! Texts as values: durations, sizes, ratios, lists, maps; and what was expected if they are not.

use std::time::Duration;

use super::keys::Kind;

/// A duration: `500ms`, `10s`, `5m`, `1h`. A number alone is milliseconds where OpenTelemetry says so.
pub fn duration(text: &str, milliseconds: bool) -> Option<Duration> {
    let text = text.trim();
    let digits = text.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(text.len());
    let (number, unit) = text.split_at(digits);
    let number: f64 = number.parse().ok()?;
    let seconds = match unit.trim() {
        "ms" => number / 1e3,
        "s" => number,
        "m" | "min" => number * 60.0,
        "h" => number * 3600.0,
        "" if milliseconds => number / 1e3,
        "" if number == 0.0 => 0.0,
        _ => return None,
    };
    Duration::try_from_secs_f64(seconds).ok()
}

/// Bytes: `1048576`, `64MiB`, `64M`.
pub fn size(text: &str) -> Option<usize> {
    let text = text.trim();
    let digits = text.find(|c: char| !c.is_ascii_digit()).unwrap_or(text.len());
    let (number, unit) = text.split_at(digits);
    let shift = match unit.trim() {
        "" | "B" => 0,
        "KiB" | "K" | "k" => 10,
        "MiB" | "M" => 20,
        "GiB" | "G" => 30,
        _ => return None,
    };
    number.parse::<usize>().ok()?.checked_mul(1 << shift)
}

/// A number from 0 to 1.
pub fn ratio(text: &str) -> Option<f64> {
    text.trim().parse().ok().filter(|ratio| (0.0..=1.0).contains(ratio))
}

/// `true` or `false`, in any case.
pub fn boolean(text: &str) -> Option<bool> {
    match text.trim().to_ascii_lowercase().as_str() {
        "true" => Some(true),
        "false" => Some(false),
        _ => None,
    }
}

/// `a=b,c=d`, percent-encoded, as OpenTelemetry's variables have it.
pub fn map(text: &str) -> Option<Vec<(String, String)>> {
    let decode = |text: &str| {
        percent_encoding::percent_decode_str(text.trim()).decode_utf8().ok().map(std::borrow::Cow::into_owned)
    };
    let entries = text.split(',').map(str::trim).filter(|entry| !entry.is_empty());
    entries
        .map(|entry| {
            let (name, value) = entry.split_once('=')?;
            Some((decode(name).filter(|name| !name.is_empty())?, decode(value)?))
        })
        .collect()
}

/// Why a text is no value of this kind: what was expected.
pub fn check(kind: Kind, text: &str, milliseconds: bool) -> Result<(), String> {
    let (fits, expected) = match kind {
        Kind::Text | Kind::List | Kind::Map => return Ok(()),
        Kind::Bool => (boolean(text).is_some(), "`true` or `false`".to_owned()),
        Kind::Count => {
            (text.trim().parse::<usize>().is_ok_and(|count| count > 0), "a whole number from 1 on".to_owned())
        }
        Kind::Ratio | Kind::Ratios => (ratio(text).is_some(), "a number from 0 to 1".to_owned()),
        Kind::Duration if milliseconds => (duration(text, true).is_some(), "milliseconds".to_owned()),
        Kind::Duration => {
            (duration(text, false).is_some(), "a duration such as `500ms`, `10s`, `5m` or `1h`".to_owned())
        }
        Kind::Size => (size(text).is_some(), "a size such as `65536` or `64MiB`".to_owned()),
        Kind::Choice(choices) => (choices.contains(&text.trim()), format!("one of {}", choices.join(", "))),
    };
    if fits { Ok(()) } else { Err(expected) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn durations_have_a_unit_except_where_opentelemetry_means_milliseconds() {
        assert_eq!(duration("500ms", false), Some(Duration::from_millis(500)));
        assert_eq!(duration("1.5s", false), Some(Duration::from_millis(1500)));
        assert_eq!(duration("1h", false), Some(Duration::from_hours(1)));
        assert_eq!(duration("10", false), None);
        assert_eq!(duration("10000", true), Some(Duration::from_secs(10)));
        for wrong in ["", "s", "-1s", "1 day", "1.2.3s"] {
            assert_eq!(duration(wrong, true), None, "{wrong}");
        }
    }

    #[test]
    fn sizes_ratios_and_maps() {
        assert_eq!(size("64MiB"), Some(64 << 20));
        assert_eq!(size("1024"), Some(1024));
        assert_eq!((size("-1"), size("1.5M"), size("1X")), (None, None, None));
        assert_eq!((ratio("0.1"), ratio("1"), ratio("1.1"), ratio("x")), (Some(0.1), Some(1.0), None, None));
        let entries = map("api-key=a%2Cb, x = y=z ,,").unwrap();
        assert_eq!(entries, [("api-key".into(), "a,b".into()), ("x".into(), "y=z".into())]);
        assert_eq!(map("nothing"), None);
        assert_eq!(map("=a"), None);
    }
}
