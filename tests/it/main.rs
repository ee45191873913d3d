//! Fleet tests.
