#!/usr/bin/env bash
# Everything that CI runs, in the order that fails fastest.
set -euo pipefail
cd "$(dirname "$0")/.."
step() { printf '\n== %s\n' "$*"; }

step "format";  cargo fmt --all --check
step "clippy";  cargo clippy --locked --workspace --all-targets -- -D warnings
step "docs";    RUSTDOCFLAGS="-D warnings" cargo doc --locked --workspace --no-deps --document-private-items
step "build";   cargo build --locked --workspace --all-targets
step "test";    cargo test --locked --workspace --no-fail-fast
