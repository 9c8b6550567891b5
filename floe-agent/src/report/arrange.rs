//! The spans of each trace in the order of their rows: depth first, siblings by start. Also what each span did itself,
//! and the critical path: what the trace's duration consists of.

use std::collections::{HashMap, HashSet};

use super::read::{Span, SpanId, Spans, TraceId};

/// A trace.
pub(super) struct Trace<'a> {
    pub(super) id: TraceId,
    /// When its first span began.
    pub(super) start: u64,
    /// When its last span ended.
    pub(super) end: u64,
    /// Its spans, each before its children.
    pub(super) rows: Vec<Row<'a>>,
}

/// A span and its place.
pub(super) struct Row<'a> {
    pub(super) span: &'a Span,
    /// Of a root: 0.
    pub(super) depth: u32,
    /// How many of the rows after it are below it.
    pub(super) below: u32,
    /// Nanoseconds in which none of its children ran.
    pub(super) own: u64,
    /// It has a parent that is not in the files.
    pub(super) orphan: bool,
    /// Its parts of the critical path, last first: from and to.
    pub(super) critical: Vec<(u64, u64)>,
}

/// Traces by start, and how many spans were there twice.
pub(super) fn arrange(spans: &Spans) -> (Vec<Trace<'_>>, usize) {
    let mut of_trace: HashMap<TraceId, Vec<&Span>> = HashMap::new();
    let mut known = HashSet::new();
    let mut repeated = 0;
    for span in &spans.all {
        // A request that was sent again, or a file that is given twice.
        if known.insert((span.trace, span.id)) {
            of_trace.entry(span.trace).or_default().push(span);
        } else {
            repeated += 1;
        }
    }
    let mut traces: Vec<_> = of_trace.into_iter().map(|(id, spans)| trace(id, &spans)).collect();
    traces.sort_by_key(|trace| (trace.start, trace.id));
    (traces, repeated)
}

/// The children of each span, by start, and the tops.
struct Family {
    children: Vec<Vec<usize>>,
    tops: Vec<usize>,
}

impl Family {
    fn of(spans: &[&Span]) -> Self {
        let index: HashMap<SpanId, usize> = spans.iter().enumerate().map(|(index, span)| (span.id, index)).collect();
        let parents: Vec<Option<usize>> =
            spans.iter().map(|span| span.parent.and_then(|parent| index.get(&parent).copied())).collect();
        let mut family = Self { children: vec![Vec::new(); spans.len()], tops: Vec::new() };
        let cut = circles(&parents);
        for (index, parent) in parents.iter().enumerate() {
            match parent {
                Some(parent) if !cut.contains(&index) => family.children[*parent].push(index),
                _ => family.tops.push(index),
            }
        }
        let order = |list: &mut Vec<usize>| {
            list.sort_by_key(|index| (spans[*index].start, u64::MAX - spans[*index].end, *index));
        };
        family.children.iter_mut().for_each(order);
        order(&mut family.tops);
        family
    }
}

/// One span of each circle of parents, which only broken data has: it is made a top.
fn circles(parents: &[Option<usize>]) -> HashSet<usize> {
    let mut found = HashSet::new();
    // The walk that came by here; each span is walked over once.
    let mut walks = vec![0; parents.len()];
    for start in 0..parents.len() {
        let mut next = Some(start);
        while let Some(at) = next.filter(|at| walks[*at] == 0) {
            walks[at] = start + 1;
            next = parents[at];
        }
        found.extend(next.filter(|at| walks[*at] == start + 1));
    }
    found
}

fn trace<'a>(id: TraceId, spans: &[&'a Span]) -> Trace<'a> {
    let family = Family::of(spans);
    let mut critical = critical_path(spans, &family);
    let mut rows: Vec<Row<'a>> = Vec::with_capacity(spans.len());
    let mut place: Vec<(usize, u32)> = family.tops.iter().rev().map(|top| (*top, 0)).collect();
    while let Some((index, depth)) = place.pop() {
        let (span, children) = (spans[index], &family.children[index]);
        rows.push(Row {
            span,
            depth,
            below: 0,
            own: own_time(span, children.iter().map(|child| spans[*child])),
            orphan: span.parent.is_some() && depth == 0,
            critical: std::mem::take(&mut critical[index]),
        });
        place.extend(children.iter().rev().map(|child| (*child, depth + 1)));
    }
    // A row ends where the next one that is not deeper begins.
    let mut open: Vec<usize> = Vec::new();
    for index in 0..=rows.len() {
        let depth = rows.get(index).map_or(0, |row| row.depth);
        while let Some(last) = open.pop_if(|last| rows[*last].depth >= depth) {
            rows[last].below = (index - last - 1) as u32;
        }
        open.push(index);
    }
    let start = spans.iter().map(|span| span.start).min().unwrap_or_default();
    let end = spans.iter().map(|span| span.end).max().unwrap_or_default();
    Trace { id, start, end, rows }
}

/// The time of a span in which no child ran. The children are ordered by start.
fn own_time<'a>(span: &Span, children: impl Iterator<Item = &'a Span>) -> u64 {
    let (mut own, mut at) = (0, span.start);
    for child in children {
        own += child.start.min(span.end).saturating_sub(at);
        at = at.max(child.end.min(span.end));
    }
    own + span.end.saturating_sub(at)
}

/// A step of [`critical_path`]: whose part it is (`None`: above the tops), its children that have not been looked at, until
/// when.
struct Walk {
    index: Option<usize>,
    left: Vec<usize>,
    until: u64,
    /// No child has been found yet: one that runs on after its parent counts until the parent's end.
    first: bool,
}

/// The parts of each span on the critical path. Seen from the end: a span waited for the child that ended last; before
/// that one began, for the child that had ended last by then, and so on. What is between them is the span's own part.
fn critical_path(spans: &[&Span], family: &Family) -> Vec<Vec<(u64, u64)>> {
    let mut parts = vec![Vec::new(); spans.len()];
    let last_first = |list: &[usize]| {
        let mut list = list.to_vec();
        list.sort_by_key(|index| (spans[*index].end, spans[*index].start));
        list
    };
    let end = family.tops.iter().map(|top| spans[*top].end).max().unwrap_or_default();
    let mut walks = vec![Walk { index: None, left: last_first(&family.tops), until: end, first: true }];
    while let Some(walk) = walks.last_mut() {
        let begin = walk.index.map_or(0, |index| spans[index].start);
        let mut next = None;
        while let Some(child) = walk.left.pop() {
            let span = spans[child];
            let ended = if walk.first { span.end.min(walk.until) } else { span.end };
            if ended <= walk.until && span.start < walk.until && span.start >= begin {
                next = Some((child, ended));
                break;
            }
        }
        let index = walk.index;
        if let Some((child, ended)) = next {
            if let Some(index) = index.filter(|_| ended < walk.until) {
                parts[index].push((ended, walk.until));
            }
            walk.until = spans[child].start;
            walk.first = false;
            let left = last_first(&family.children[child]);
            walks.push(Walk { index: Some(child), left, until: ended, first: true });
        } else {
            if let Some(index) = index.filter(|_| begin < walk.until) {
                parts[index].push((begin, walk.until));
            }
            walks.pop();
        }
    }
    parts
}

#[cfg(test)]
mod tests {
    use super::*;

    fn span(id: u8, parent: u8, start: u64, end: u64) -> Span {
        let id_of = |id: u8| [0, 0, 0, 0, 0, 0, 0, id];
        Span {
            trace: [1; 16],
            id: id_of(id),
            parent: (parent != 0).then(|| id_of(parent)),
            name: id.to_string(),
            kind: 1,
            start,
            end,
            status: 0,
            message: String::new(),
            attributes: Vec::new(),
            events: Vec::new(),
            links: Vec::new(),
            resource: 0,
        }
    }

    fn spans(list: &[(u8, u8, u64, u64)]) -> Spans {
        let mut spans = Spans::default();
        spans.all.extend(list.iter().map(|(id, parent, start, end)| span(*id, *parent, *start, *end)));
        spans
    }

    /// Name, depth, rows below, own time of each row.
    fn rows(list: &[(u8, u8, u64, u64)]) -> Vec<(String, u32, u32, u64)> {
        let spans = spans(list);
        let (traces, _) = arrange(&spans);
        traces[0].rows.iter().map(|row| (row.span.name.clone(), row.depth, row.below, row.own)).collect()
    }

    /// The critical path, first part first.
    fn path(list: &[(u8, u8, u64, u64)]) -> Vec<(String, u64, u64)> {
        let spans = spans(list);
        let (traces, _) = arrange(&spans);
        let parts =
            traces[0].rows.iter().flat_map(|row| row.critical.iter().map(|part| (row.span.name.clone(), *part)));
        let mut path: Vec<_> = parts.map(|(name, (from, to))| (name, from, to)).collect();
        path.sort_by_key(|(_, from, _)| *from);
        path
    }

    fn row(name: &str, depth: u32, below: u32, own: u64) -> (String, u32, u32, u64) {
        (name.to_owned(), depth, below, own)
    }

    #[test]
    fn rows_are_depth_first_and_siblings_by_start() {
        let list = [(4, 2, 30, 40), (3, 1, 50, 60), (1, 0, 0, 100), (2, 1, 20, 45), (5, 2, 21, 25)];
        assert_eq!(
            rows(&list),
            [row("1", 0, 4, 65), row("2", 1, 2, 11), row("5", 2, 0, 4), row("4", 2, 0, 10), row("3", 1, 0, 10)]
        );
    }

    #[test]
    fn own_time_counts_children_that_overlap_once_and_only_within_the_span() {
        assert_eq!(rows(&[(1, 0, 10, 20), (2, 1, 12, 16), (3, 1, 14, 18), (4, 1, 19, 30)])[0].3, 3);
        assert_eq!(rows(&[(1, 0, 10, 20), (2, 1, 0, 30)])[0].3, 0);
    }

    #[test]
    fn a_span_without_its_parent_is_a_top_and_marked() {
        let spans = spans(&[(1, 9, 5, 6), (2, 0, 0, 3)]);
        let (traces, _) = arrange(&spans);
        let orphans: Vec<_> = traces[0].rows.iter().map(|row| (row.span.name.as_str(), row.orphan)).collect();
        assert_eq!(orphans, [("2", false), ("1", true)]);
    }

    #[test]
    fn a_circle_of_parents_is_cut_and_nothing_is_lost() {
        for list in [
            &[(1, 1, 0, 1)][..],
            &[(1, 2, 0, 9), (2, 3, 1, 8), (3, 1, 2, 7)],
            &[(4, 1, 3, 4), (1, 2, 0, 9), (2, 3, 1, 8), (3, 1, 2, 7), (5, 3, 2, 3)],
        ] {
            assert_eq!(rows(list).len(), list.len(), "{list:?}");
        }
    }

    #[test]
    fn a_span_that_was_written_twice_counts_once() {
        let spans = spans(&[(1, 0, 0, 1), (1, 0, 0, 1)]);
        let (traces, repeated) = arrange(&spans);
        assert_eq!((traces[0].rows.len(), repeated), (1, 1));
    }

    #[test]
    fn the_critical_path_is_what_the_duration_consists_of() {
        // 2 and 3 at once, 3 is longer; then 4.
        let list = [(1, 0, 0, 100), (2, 1, 10, 40), (3, 1, 10, 50), (4, 1, 60, 90)];
        let part = |name: &str, from, to| (name.to_owned(), from, to);
        assert_eq!(
            path(&list),
            [part("1", 0, 10), part("3", 10, 50), part("1", 50, 60), part("4", 60, 90), part("1", 90, 100)]
        );
    }

    #[test]
    fn the_critical_path_goes_through_children_that_outlive_their_parent_and_over_several_roots() {
        let part = |name: &str, from, to| (name.to_owned(), from, to);
        assert_eq!(path(&[(1, 0, 0, 50), (2, 1, 20, 80)]), [part("1", 0, 20), part("2", 20, 50)]);
        assert_eq!(path(&[(1, 0, 0, 50), (2, 0, 60, 80)]), [part("1", 0, 50), part("2", 60, 80)]);
    }

    #[test]
    fn a_chain_of_many_thousands_is_no_deep_recursion() {
        let mut deep = Spans::default();
        for number in 1..=50_000_u64 {
            let mut one = span(1, 0, number, 1_000_000 - number);
            one.id = number.to_be_bytes();
            one.parent = (number > 1).then(|| (number - 1).to_be_bytes());
            deep.all.push(one);
        }
        let (traces, _) = arrange(&deep);
        assert_eq!(traces[0].rows.last().map(|row| row.depth), Some(49_999));
    }
}
