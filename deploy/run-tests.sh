#!/usr/bin/env bash
# Everything that CI runs, in the order that fails fastest.
set -euo pipefail
cd "$(dirname "$0")/.."
step() { printf '\n== %s\n' "$*"; }

step "format";  cargo fmt --all --check
# With the points at which tests kill processes. One set of features throughout, so that nothing is compiled twice.
features=(--features worker/failpoints,scheduler/failpoints)

step "clippy";  cargo clippy --locked --workspace --all-targets "${features[@]}" -- -D warnings
step "docs";    RUSTDOCFLAGS="-D warnings" cargo doc --locked --workspace "${features[@]}" --no-deps --document-private-items
step "build";   cargo build --locked --workspace --all-targets "${features[@]}"
step "test";    cargo test --locked --workspace "${features[@]}" --no-fail-fast
# The same plan each time, so that a failure can be repeated; `make chaos` draws another each time.
step "chaos";   CHAOS_SECONDS=${CHAOS_SECONDS:-60} CHAOS_SEED=${CHAOS_SEED:-11} "${CARGO_TARGET_DIR:-target}/debug/chaos"
