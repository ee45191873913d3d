//! A store in memory, for the tests of those who read one.
use std::collections::BTreeMap;
use std::sync::atomic::{AtomicUsize, Ordering};

use schema::Sha256Digest;

use super::{ListPage, ListedObject, ObjectHead, ObjectStore, StoreError};

/// One bucket, whatever its name.
#[derive(Default)]
pub struct FakeStore {
    pub objects: BTreeMap<String, Vec<u8>>,
    pub reads: AtomicUsize,
    /// Whether it forgets the digest that an object was stored with, as some servers do.
    pub keeps_no_digest: bool,
}

impl FakeStore {
    fn find(&self, bucket: &str, key: &str) -> Result<&Vec<u8>, StoreError> {
        let missing = || StoreError::NotFound { bucket: bucket.to_owned(), key: key.to_owned() };
        self.objects.get(key).ok_or_else(missing)
    }
}

impl ObjectStore for FakeStore {
    async fn get(&self, bucket: &str, key: &str) -> Result<Vec<u8>, StoreError> {
        self.reads.fetch_add(1, Ordering::Relaxed);
        self.find(bucket, key).cloned()
    }

    async fn head(&self, bucket: &str, key: &str) -> Result<ObjectHead, StoreError> {
        let bytes = self.find(bucket, key)?;
        let sha256 = (!self.keeps_no_digest).then(|| Sha256Digest::of(bytes));
        Ok(ObjectHead { size_bytes: bytes.len() as u64, sha256 })
    }

    async fn list(&self, _bucket: &str, prefix: &str, _page: Option<&str>) -> Result<ListPage, StoreError> {
        let objects = self.objects.iter().filter(|(key, _)| key.starts_with(prefix)).map(|(key, bytes)| {
            ListedObject { key: key.clone(), size_bytes: bytes.len() as u64, last_modified: None }
        });
        Ok(ListPage { objects: objects.collect(), next: None })
    }

    /// Its bucket cannot be written through a shared reference; nobody who is tested with it deletes.
    async fn delete(&self, bucket: &str, _key: &str) -> Result<(), StoreError> {
        Err(StoreError::Failed { bucket: bucket.to_owned(), reason: "it is read-only".to_owned() })
    }
}
