//! What to probe: packs, their schema, and their compilation to capture plans.
