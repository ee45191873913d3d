//! Rebuilds the crate when a migration appears: `sqlx::migrate!` only watches those it has seen.

#[expect(clippy::print_stdout, reason = "this is how a build script talks to cargo")]
fn main() {
    println!("cargo:rerun-if-changed=../migrations");
}
