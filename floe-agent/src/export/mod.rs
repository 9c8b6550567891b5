//! Where finished spans go: terminal, files, OTLP.
