//! The walls of the design, held by reading the source: who may import what, how large a file may grow, what may
//! not be printed. A wall that is only written down is a wall until the first hurry.
use std::fs;
use std::path::{Path, PathBuf};

/// The checkout's root.
fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .parent()
        .expect("the tests crate lies in the workspace")
        .to_path_buf()
}

/// Every Rust source below `folder`, relative to the root, with its text.
fn sources(folder: &str) -> Vec<(String, String)> {
    let mut found = Vec::new();
    let mut folders = vec![root().join(folder)];
    while let Some(folder) = folders.pop() {
        for entry in fs::read_dir(&folder).unwrap_or_else(|error| panic!("{}: {error}", folder.display())) {
            let path = entry.unwrap().path();
            if path.is_dir() {
                folders.push(path);
            } else if path.extension().is_some_and(|extension| extension == "rs") {
                let name = path.strip_prefix(root()).unwrap().to_string_lossy().into_owned();
                found.push((name, fs::read_to_string(&path).unwrap()));
            }
        }
    }
    assert!(!found.is_empty(), "no sources below {folder}: this test would pass by looking at nothing");
    found.sort();
    found
}

/// The part of a source that ships: without comments, and without what follows `#[cfg(test)] mod`.
fn shipped(text: &str) -> String {
    let mut lines = Vec::new();
    let mut rest = text.lines().peekable();
    while let Some(line) = rest.next() {
        if line.trim_start().starts_with("#[cfg(test)]")
            && rest.peek().is_some_and(|next| next.contains("mod "))
        {
            break;
        }
        let code = line.trim_start();
        if !code.starts_with("//") {
            lines.push(line);
        }
    }
    lines.join("\n")
}

/// Whether `code` names `crate_name` as a path's first segment (`use lapin…`, `lapin::`).
fn imports(code: &str, crate_name: &str) -> bool {
    code.match_indices(crate_name).any(|(start, _)| {
        let before = code[..start].chars().next_back();
        let after = &code[start + crate_name.len()..];
        let starts_word =
            before.is_none_or(|c| !(c.is_alphanumeric() || c == '_' || c == '"' || c == '.' || c == ':'));
        starts_word && (after.starts_with("::") || after.starts_with(';') || after.starts_with(" as "))
    })
}

/// The files below `folders` that import `crate_name`.
fn importers(folders: &[&str], crate_name: &str) -> Vec<String> {
    folders
        .iter()
        .flat_map(|folder| sources(folder))
        .filter(|(_, text)| imports(&shipped(text), crate_name))
        .map(|(name, _)| name)
        .collect()
}

const CRATES: [&str; 3] = ["schema/src", "scheduler/src", "worker/src"];

#[test]
fn the_reader_of_imports_sees_what_it_should() {
    assert!(imports("use lapin::Channel;", "lapin"));
    assert!(imports("let x = lapin::Connection::connect();", "lapin"));
    assert!(!imports("let x = my_lapin::y();", "lapin"));
    assert!(!imports("// see crate::lapin_notes", "lapin"));
    assert!(!shipped("fn a() {}\n#[cfg(test)]\nmod tests {\n use lapin::x;\n}").contains("lapin"));
}

#[test]
fn each_outside_protocol_is_spoken_by_one_room_in_a_binary() {
    // A room is `name.rs` and what lies in `name/`.
    let rooms = |crate_name: &str, room: &str| {
        let importers = importers(&CRATES, crate_name);
        let strangers: Vec<_> = importers
            .iter()
            .filter(|name| {
                !name.ends_with(&format!("/src/{room}.rs")) && !name.contains(&format!("/src/{room}/"))
            })
            .collect();
        assert!(strangers.is_empty(), "{crate_name} belongs to {room}, but these import it: {strangers:?}");
        for binary in ["scheduler", "worker"] {
            assert!(importers.contains(&format!("{binary}/src/{room}.rs")), "{binary} and {crate_name}");
        }
    };
    rooms("lapin", "amqp");
    rooms("aws_sdk_s3", "object_store");
    rooms("aws_config", "object_store");
    let strangers: Vec<_> =
        importers(&CRATES, "sqlx").into_iter().filter(|name| !name.starts_with("schema/")).collect();
    assert!(strangers.is_empty(), "SQL lives in schema, but these import sqlx: {strangers:?}");
    let strangers: Vec<_> = importers(&CRATES, "s3s_fs")
        .into_iter()
        .filter(|name| !name.starts_with("scheduler/src/local_stack"))
        .collect();
    assert!(strangers.is_empty(), "the S3 server belongs to the local stack: {strangers:?}");
}

#[test]
fn what_stands_in_two_places_is_equal_word_for_word() {
    let read = |name: &str| fs::read_to_string(root().join(name)).unwrap();
    // They may share no crate that knows lapin.
    assert!(
        read("scheduler/src/amqp/greeting.rs") == read("worker/src/amqp/greeting.rs"),
        "change both, or neither: scheduler/src/amqp/greeting.rs and worker/src/amqp/greeting.rs"
    );
}

#[test]
fn the_model_code_is_a_leaf() {
    for (name, text) in sources("worker/src").into_iter().filter(|(name, _)| name.contains("/diffusion")) {
        let code = shipped(&text);
        for foreign in
            ["tokio", "tokio_util", "lapin", "sqlx", "aws_sdk_s3", "schema", "futures", "clap", "anyhow"]
        {
            assert!(!imports(&code, foreign), "{name} imports {foreign}, but worker/src/diffusion is a leaf");
        }
        for path in code.match_indices("crate::").map(|(start, _)| &code[start + 7..]) {
            assert!(
                path.starts_with("diffusion"),
                "{name} reaches out of the leaf: crate::{}",
                &path[..40.min(path.len())]
            );
        }
    }
    for wall in ["tch", "tokenizers"] {
        let strangers: Vec<_> = importers(&CRATES, wall)
            .into_iter()
            .filter(|name| !name.starts_with("worker/src/diffusion"))
            .collect();
        assert!(
            strangers.is_empty(),
            "{wall} belongs to worker/src/diffusion, but these import it: {strangers:?}"
        );
    }
}

#[test]
fn scheduler_and_worker_meet_only_in_schema() {
    assert!(importers(&["scheduler/src"], "worker").is_empty());
    assert!(importers(&["worker/src"], "scheduler").is_empty());
    for foreign in ["scheduler", "worker", "lapin", "tch", "aws_sdk_s3", "clap"] {
        assert_eq!(
            importers(&["schema/src"], foreign),
            Vec::<String>::new(),
            "schema knows nothing of {foreign}"
        );
    }
}

#[test]
fn the_environment_is_read_in_one_place_a_binary() {
    for (name, text) in CRATES.iter().flat_map(|folder| sources(folder)) {
        let reads = shipped(&text).contains("env::var");
        let allowed = name.ends_with("/config.rs");
        assert!(!reads || allowed, "{name} reads the environment; settings come in by config.rs");
    }
}

#[test]
fn files_stay_small() {
    let large: Vec<_> = CRATES
        .iter()
        .chain(&["tests/src", "tests/it"])
        .flat_map(|folder| sources(folder))
        .filter(|(name, text)| text.lines().count() > 500 && !name.ends_with("unet_2d_blocks.rs"))
        .map(|(name, text)| format!("{name}: {} lines", text.lines().count()))
        .collect();
    assert!(large.is_empty(), "split these: {large:?}");
}

#[test]
fn no_rooms_without_a_purpose() {
    for (name, _) in CRATES.iter().flat_map(|folder| sources(folder)) {
        let stem = Path::new(&name).file_stem().unwrap().to_string_lossy().into_owned();
        assert_ne!(stem, "mod", "{name}: modules are foo.rs beside foo/");
        for vague in ["common", "utils", "util", "core", "types", "helpers", "misc"] {
            assert_ne!(stem, vague, "{name}: name the room by what it is for");
        }
    }
}

#[test]
fn no_type_in_the_job_scheduler_is_called_scheduler() {
    for (name, text) in sources("scheduler/src") {
        for kind in ["struct Scheduler ", "enum Scheduler ", "trait Scheduler "] {
            assert!(!shipped(&text).contains(kind), "{name}: `Scheduler` is a noise scheduler's name");
        }
    }
}
