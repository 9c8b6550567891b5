//! Version ranges of packs, as `>=1.8,<1.13`.

use std::cmp::Ordering;
use std::fmt;

use thiserror::Error;

/// A range of versions.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct VersionRange {
    text: String,
    bounds: Vec<(Operator, Vec<u64>)>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Operator {
    Less,
    LessOrEqual,
    Equal,
    GreaterOrEqual,
    Greater,
}

/// A range that cannot be read.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
#[error("version range `{0}`: expected bounds such as `>=1.8,<1.13`")]
pub struct VersionRangeError(String);

impl VersionRange {
    /// Parses a range: bounds with `<`, `<=`, `==`, `>=`, `>`, separated by commas; all must hold.
    pub fn parse(text: &str) -> Result<Self, VersionRangeError> {
        const OPERATORS: [(&str, Operator); 5] = [
            ("<=", Operator::LessOrEqual),
            (">=", Operator::GreaterOrEqual),
            ("==", Operator::Equal),
            ("<", Operator::Less),
            (">", Operator::Greater),
        ];
        let fail = || VersionRangeError(text.to_owned());
        let mut bounds = Vec::new();
        for bound in text.split(',').map(str::trim) {
            let (sign, operator) = OPERATORS.iter().find(|(sign, _)| bound.starts_with(sign)).ok_or_else(fail)?;
            let numbers: Result<Vec<u64>, _> = bound[sign.len()..].trim().split('.').map(str::parse).collect();
            bounds.push((*operator, numbers.map_err(|_| fail())?));
        }
        Ok(Self { text: text.to_owned(), bounds })
    }

    /// Whether it contains `version`; `None` if that is not a version. A pre-release counts as its release.
    pub fn contains(&self, version: &str) -> Option<bool> {
        let numbers = release(version)?;
        Some(self.bounds.iter().all(|(operator, bound)| {
            let order = compare(&numbers, bound);
            match operator {
                Operator::Less => order == Ordering::Less,
                Operator::LessOrEqual => order != Ordering::Greater,
                Operator::Equal => order == Ordering::Equal,
                Operator::GreaterOrEqual => order != Ordering::Less,
                Operator::Greater => order == Ordering::Greater,
            }
        }))
    }
}

impl fmt::Display for VersionRange {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.text)
    }
}

/// The leading numbers: `1.10.0b2` is `[1, 10, 0]`.
fn release(version: &str) -> Option<Vec<u64>> {
    let mut numbers = Vec::new();
    for part in version.trim().split('.') {
        let digits = &part[..part.len() - part.trim_start_matches(|c: char| c.is_ascii_digit()).len()];
        match digits.parse() {
            Ok(number) => numbers.push(number),
            Err(_) => break,
        }
        if digits.len() < part.len() {
            break;
        }
    }
    (!numbers.is_empty()).then_some(numbers)
}

/// Compares release numbers; missing ones are 0.
fn compare(left: &[u64], right: &[u64]) -> Ordering {
    let at = |numbers: &[u64], index| numbers.get(index).copied().unwrap_or(0);
    (0..left.len().max(right.len()))
        .map(|index| at(left, index).cmp(&at(right, index)))
        .find(|order| order.is_ne())
        .unwrap_or(Ordering::Equal)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_range_contains_its_versions_and_no_others() {
        let range = VersionRange::parse(">=1.8, <1.13").unwrap();
        for (version, inside) in
            [("1.8.0", true), ("1.8", true), ("1.12.6", true), ("1.7.17", false), ("1.13.0", false), ("2.0.0a1", false)]
        {
            assert_eq!(range.contains(version), Some(inside), "{version}");
        }
        assert_eq!(range.contains("1.10.0b2"), Some(true));
        assert_eq!(range.contains("unknown"), None);
        assert_eq!(range.to_string(), ">=1.8, <1.13");
    }

    #[test]
    fn a_bad_range_is_refused() {
        for text in ["1.8", ">=x", "", ">=1.8,"] {
            assert!(VersionRange::parse(text).is_err(), "{text}");
        }
    }
}
