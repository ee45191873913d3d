//! Bringing a database up to date, and what is said when it is not, or not there.

use schema::{CatalogError, PgCatalog};

use crate::support::TestDatabase;

#[tokio::test]
async fn an_empty_database_is_migrated_once() {
    let database = TestDatabase::create_empty().await;
    let catalog = PgCatalog::connect(&database.url(), 2).await.unwrap();
    let before = catalog.migration_status().await.unwrap();
    assert!(before.applied.is_empty() && !before.is_current());
    assert_eq!(before.pending[0], (1, "words".into()));

    let error = catalog.models().await.unwrap_err();
    assert!(matches!(error, CatalogError::NotMigrated(_)), "{error:?}");
    insta::assert_snapshot!(error, @r"
    the catalog's tables are not those that this build expects
    hint: run `darkroom migrate`
    ");

    // Two processes at once.
    let (one, two) = tokio::join!(catalog.migrate(), catalog.migrate());
    for found in [one.unwrap(), two.unwrap()] {
        // The later one may look while the other is at it, but never sees more or less than all of them.
        assert_eq!(found.applied.len() + found.pending.len(), before.pending.len(), "{found:?}");
    }
    let after = catalog.migration_status().await.unwrap();
    assert!(after.is_current());
    assert_eq!(after.applied.len(), before.pending.len());
    assert!(catalog.migrate().await.unwrap().is_current());
    assert!(catalog.models().await.unwrap().is_empty());
}

#[tokio::test]
async fn a_later_builds_database_still_serves_and_a_changed_one_does_not() {
    let database = TestDatabase::create().await;
    let catalog = PgCatalog::connect(&database.url(), 2).await.unwrap();
    let pool = database.pool().await;
    let later = "INSERT INTO _sqlx_migrations (version, description, success, checksum, execution_time)
                 VALUES (9999, 'later', true, ''::bytea, 0)";
    sqlx::query(later).execute(&pool).await.unwrap();
    let status = catalog.migrate().await.unwrap();
    assert_eq!(status.unknown, [9999]);
    assert!(status.is_current());
    sqlx::query("UPDATE _sqlx_migrations SET checksum = '' WHERE version = 1").execute(&pool).await.unwrap();
    let error = catalog.migrate().await.unwrap_err();
    assert!(matches!(error, CatalogError::NotMigrated(_)), "{error:?}");
}

#[tokio::test]
async fn a_server_that_is_not_there_is_told_apart_from_a_wrong_address() {
    let nowhere = "postgres://nobody@127.0.0.1:1/nothing?connect_timeout=1".to_owned().into();
    let error = PgCatalog::connect(&nowhere, 1).await.unwrap_err();
    assert!(matches!(error, CatalogError::Unreachable(_)) && error.is_transient(), "{error:?}");
    let error = PgCatalog::connect(&"not a url".to_owned().into(), 1).await.unwrap_err();
    assert!(matches!(error, CatalogError::Misconfigured(_)) && !error.is_transient(), "{error:?}");
    insta::assert_snapshot!(error, @r"
    the catalog's address or credentials are wrong
    hint: check DATABASE_URL
    ");
    let database = TestDatabase::create_empty().await;
    let missing = secrecy::ExposeSecret::expose_secret(&database.url()).replace("darkroom_test", "no_such");
    let error = PgCatalog::connect(&missing.into(), 1).await.unwrap_err();
    assert!(matches!(error, CatalogError::Misconfigured(_)), "{error:?}");
}
