//! From events to spans: assembly, parents, ids.
