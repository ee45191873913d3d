//! Rebuilds the crate when a migration appears: `sqlx::migrate!` only watches those it has seen.

fn main() {
    println!("cargo:rerun-if-changed=../migrations");
}
