//! The table of the guard campaign keeps up with the code, also where the campaign itself (`make guards`) is not run.

use std::path::Path;

use fleet_tests::guards::GUARDS;

#[test]
fn every_guard_stands_where_the_table_says() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap();
    for guard in GUARDS {
        assert!(!guard.cuts.is_empty() && !guard.tests.is_empty(), "{}", guard.what);
        for cut in guard.cuts {
            let text = std::fs::read_to_string(root.join(cut.file)).unwrap();
            let without = cut.applied_to(&text).unwrap_or_else(|error| panic!("{}: {error}", guard.what));
            assert_ne!(without, text, "{}", guard.what);
        }
    }
}

#[test]
fn every_promise_that_is_kept_by_code_has_a_guard_in_the_table() {
    for promise in ["P1", "P2", "P3", "P4", "P5", "P7", "P8"] {
        assert!(GUARDS.iter().any(|guard| guard.promise == promise), "{promise}");
    }
}
