//! The domain `sha256_hex` lets digests in and nothing else.

use crate::support::TestDatabase;

#[tokio::test]
async fn a_digest_is_64_lower_case_hexadecimal_digits() {
    let database = TestDatabase::create().await;
    let pool = database.pool().await;
    let good = "0123456789abcdef".repeat(4);
    let with = |at: usize, c: &str| format!("{}{c}{}", &good[..at], &good[at + 1..]);
    let mut values = vec![
        (good.clone(), true),
        ("0".repeat(64), true),
        ("f".repeat(64), true),
        (String::new(), false),
        (good[..63].to_owned(), false),
        (format!("{good}0"), false),
        (good.repeat(2), false),
        (good.to_uppercase(), false),
        (format!("{good}\n"), false),
        (format!("\n{good}"), false),
        (format!("{}\n", &good[..63]), false),
        (format!("{good}\n{good}"), false),
        (format!(" {}", &good[..63]), false),
        // 64 bytes, 64 characters, and digits of another script.
        ("é".repeat(32), false),
        ("é".repeat(64), false),
        ("٣".repeat(64), false),
    ];
    for at in [0, 31, 63] {
        values
            .extend(["g", "A", "F", "/", ":", "`", "-", " ", "\n", "\t", "é"].map(|c| (with(at, c), false)));
    }
    for (value, is_digest) in values {
        // What the domain said before migration 0015, which rows of that time have been through.
        let before = "SELECT $1 ~ '^[0-9a-f]{64}$'";
        let before: bool = sqlx::query_scalar(before).bind(&value).fetch_one(&pool).await.unwrap();
        assert_eq!(before, is_digest, "{value:?}");
        let cast = sqlx::query("SELECT $1::text::sha256_hex").bind(&value).execute(&pool).await;
        let refused = cast.err().map(crate::support::rule_of);
        assert_eq!(refused.as_deref(), (!is_digest).then_some("sha256_hex_check"), "{value:?}");
    }
    let absent = sqlx::query("SELECT NULL::text::sha256_hex").execute(&pool).await;
    assert!(absent.is_ok(), "a flagged picture has no digest");
}
