//! The guard campaign: each guard of a promise is taken out of a copy of the tree, one after the other, and the tests that
//! are there for it have to fail. A test that passes without its guard looks at nothing.

mod table;

use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use anyhow::{Context, Result, bail, ensure};

pub use table::GUARDS;

/// The version of the copy's crates. Cargo tells them from the tree's by it: else it would take what it built of a mutant
/// for the tree's own.
const VERSION: &str = "0.0.0-guards";
/// The crates that have it.
const CRATES: [&str; 4] = ["schema", "scheduler", "worker", "fleet-tests"];
/// The features that all of the workspace's tests are built with.
const FEATURES: &str = "worker/failpoints,scheduler/failpoints";
/// A mutant may wait for what never comes; its tests have deadlines of their own below this.
const SECONDS: &str = "900";

/// One guard and how it is removed.
#[derive(Debug)]
pub struct Guard {
    /// The promise that it holds, as README numbers them.
    pub promise: &'static str,
    /// What it is, for people.
    pub what: &'static str,
    /// What removes it: where a promise is held twice, by a query and a constraint, both.
    pub cuts: &'static [Cut],
    /// Where its tests are.
    pub target: Target,
    /// The tests that have to fail without it.
    pub tests: &'static [&'static str],
}

/// A piece of a file and what stands there instead.
#[derive(Debug)]
pub struct Cut {
    /// The file, from the root of the tree.
    pub file: &'static str,
    /// The piece, which stands in it once.
    pub text: &'static str,
    /// What replaces it.
    pub replacement: &'static str,
}

/// A test program.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Target {
    /// `schema/tests/it`, on a real Postgres.
    Schema,
    /// `worker/tests/in_memory`.
    WorkerInMemory,
    /// `worker/tests/pipeline.rs`.
    WorkerPipeline,
    /// `worker/tests/company.rs`.
    WorkerCompany,
    /// The unit tests of the scheduler.
    Scheduler,
}

impl Target {
    /// All of them.
    pub const ALL: [Target; 5] = [
        Target::Schema,
        Target::WorkerInMemory,
        Target::WorkerPipeline,
        Target::WorkerCompany,
        Target::Scheduler,
    ];

    /// What cargo has to be told. `schema` alone is built much faster than with all that could depend on it.
    fn arguments(self) -> Vec<&'static str> {
        let workspace = ["--workspace", "--features", FEATURES];
        match self {
            Target::Schema => vec!["-p", "schema", "--features", "failpoints", "--test", "it"],
            Target::WorkerInMemory => [&workspace[..], &["--test", "in_memory"]].concat(),
            Target::WorkerPipeline => [&workspace[..], &["--test", "pipeline"]].concat(),
            Target::WorkerCompany => [&workspace[..], &["--test", "company"]].concat(),
            Target::Scheduler => [&workspace[..], &["--lib"]].concat(),
        }
    }
}

/// How a mutant fared.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fate {
    /// Every test failed.
    Caught,
    /// Some test passed: it does not look at this guard.
    Survived,
}

impl Cut {
    /// The file's text without the guard.
    ///
    /// # Errors
    /// When the piece does not stand there exactly once: the code has moved on, and the table has to follow.
    pub fn applied_to(&self, text: &str) -> Result<String> {
        let found = text.matches(self.text).count();
        ensure!(found == 1, "{}: stands there {found} times, not once: {}", self.file, self.text);
        Ok(text.replace(self.text, self.replacement))
    }
}

/// A copy of the tree that may be broken, and the folder that cargo builds into.
#[derive(Debug)]
pub struct Scratch {
    root: PathBuf,
    copy: PathBuf,
    target: PathBuf,
}

impl Scratch {
    /// Copies the tree at `root`, all that git knows or would take in, without the demo model.
    ///
    /// The copy lies in the target folder and builds into it: what is not ours is not compiled anew. It has no `.cargo` of
    /// its own, whose path to libtorch would be another.
    ///
    /// # Errors
    /// When git or the file system fails.
    pub fn of(root: &Path) -> Result<Scratch> {
        let target = std::env::var_os("CARGO_TARGET_DIR").map_or_else(|| root.join("target"), PathBuf::from);
        let copy = target.join("guards");
        let listed = Command::new("git")
            .args(["ls-files", "-z", "--cached", "--others", "--exclude-standard"])
            .current_dir(root)
            .output()
            .context("git lists the tree's files")?;
        ensure!(listed.status.success(), "git ls-files: {}", String::from_utf8_lossy(&listed.stderr));
        for file in String::from_utf8(listed.stdout)?.split('\0').filter(|file| !file.is_empty()) {
            let from = root.join(file);
            if file.starts_with(".cargo/") || file.starts_with("demo/model/") || !from.is_file() {
                continue;
            }
            let to = copy.join(file);
            let mut bytes = std::fs::read(&from).with_context(|| format!("cannot read {file}"))?;
            if matches!(file, "Cargo.toml" | "Cargo.lock") {
                bytes = renumbered(&String::from_utf8(bytes)?).into_bytes();
            }
            // What is the same keeps its time, so that a second campaign does not compile everything again.
            if std::fs::read(&to).is_ok_and(|before| before == bytes) {
                continue;
            }
            std::fs::create_dir_all(to.parent().context("a file lies in a folder")?)?;
            std::fs::write(&to, bytes).with_context(|| format!("cannot write {file}"))?;
        }
        Ok(Scratch { root: root.to_owned(), copy, target })
    }

    /// Runs `tests` of `target` in the copy.
    fn test(&self, target: Target, tests: &[&str]) -> Result<Output> {
        let libtorch =
            std::env::var_os("LIBTORCH").map_or_else(|| self.root.join(".deps/libtorch"), PathBuf::from);
        let output = Command::new("timeout")
            .args([SECONDS, "cargo", "test", "--locked"])
            .args(target.arguments())
            .args(["--no-fail-fast", "--", "--exact"])
            .args(tests)
            .current_dir(&self.copy)
            .env("CARGO_TARGET_DIR", &self.target)
            .env("LIBTORCH", libtorch)
            .env("LIBTORCH_CXX11_ABI", "1")
            .output()
            .context("cargo can be run")?;
        let errors = String::from_utf8_lossy(&output.stderr);
        ensure!(!errors.contains("could not compile"), "{target:?} does not compile:\n{errors}");
        Ok(output)
    }

    /// Sees all tests of `guards`, which are `target`'s, pass while every guard is in its place.
    ///
    /// # Errors
    /// When one does not, or is not there.
    pub fn check_that_all_pass(&self, target: Target, guards: &[&Guard]) -> Result<()> {
        let mut tests: Vec<&str> = guards.iter().flat_map(|guard| guard.tests).copied().collect();
        tests.sort_unstable();
        tests.dedup();
        let output = self.test(target, &tests)?;
        let told = String::from_utf8_lossy(&output.stdout);
        for test in tests {
            ensure!(told.contains(&format!("test {test} ... ok")), "{test} does not pass as it is:\n{told}");
        }
        Ok(())
    }

    /// Takes `guard` out, runs its tests, and puts it back.
    ///
    /// # Errors
    /// When it is not where the table says, or the rest does not compile without it.
    pub fn without(&self, guard: &Guard) -> Result<Fate> {
        let mut whole: Vec<(PathBuf, String)> = Vec::new();
        for cut in guard.cuts {
            let path = self.copy.join(cut.file);
            let text = std::fs::read_to_string(&path).with_context(|| format!("cannot read {}", cut.file))?;
            std::fs::write(&path, cut.applied_to(&text)?)?;
            whole.push((path, text));
        }
        let output = self.test(guard.target, guard.tests);
        // The latest first: a file that was cut twice becomes what it was before the first.
        for (path, text) in whole.into_iter().rev() {
            std::fs::write(path, text)?;
        }
        let output = output?;
        let told = String::from_utf8_lossy(&output.stdout);
        let mut fate = Fate::Caught;
        for test in guard.tests {
            if told.contains(&format!("test {test} ... ok")) {
                fate = Fate::Survived;
            } else if !told.contains(&format!("test {test} ... FAILED")) {
                bail!("{test} neither passed nor failed:\n{told}{}", String::from_utf8_lossy(&output.stderr));
            }
        }
        Ok(fate)
    }

    /// Builds the tree's own programs again: those of the last mutant lie where they belong.
    ///
    /// # Errors
    /// When cargo fails.
    pub fn restore_programs(&self) -> Result<()> {
        let status = Command::new("cargo")
            .args(["build", "--quiet", "--locked", "--workspace", "--bins", "--features", FEATURES])
            .current_dir(&self.root)
            .env("CARGO_TARGET_DIR", &self.target)
            .status()
            .context("cargo can be run")?;
        ensure!(status.success(), "the tree's own programs could not be built again");
        Ok(())
    }
}

/// `Cargo.toml` or `Cargo.lock` with [`VERSION`] as the version of our own crates.
fn renumbered(text: &str) -> String {
    let mut is_ours = false;
    let lines = text.lines().map(|line| {
        is_ours = match line {
            "[workspace.package]" => true,
            _ if line.starts_with("name = ") => {
                CRATES.iter().any(|name| line == format!("name = \"{name}\""))
            }
            _ if line.starts_with('[') => false,
            _ => is_ours,
        };
        if is_ours && line.starts_with("version = ") {
            format!("version = \"{VERSION}\"")
        } else {
            line.to_owned()
        }
    });
    lines.map(|line| line + "\n").collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_our_own_crates_are_renumbered() {
        let lock = "[[package]]\nname = \"schema\"\nversion = \"0.1.0\"\n\n[[package]]\nname = \"serde\"\nversion = \"0.1.0\"\n";
        let renumbered = renumbered(lock);
        assert_eq!(renumbered.matches(VERSION).count(), 1);
        assert!(renumbered.contains("name = \"serde\"\nversion = \"0.1.0\""), "{renumbered}");
    }

    #[test]
    fn a_text_that_stands_there_twice_is_refused() {
        let cut = Cut { file: "x", text: "a", replacement: "b" };
        assert_eq!(cut.applied_to("cat").unwrap(), "cbt");
        assert!(cut.applied_to("dog").is_err() && cut.applied_to("banana").is_err());
    }
}
