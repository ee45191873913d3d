//! A bucket in memory that can be away for some requests, or for good.

use std::collections::BTreeMap;
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};

use schema::{ObjectKey, Sha256Digest};
use worker::object_store::{ObjectStore, StoreError, Stored};

use crate::worker_under_test::{Event, EventLog};

#[derive(Debug)]
pub struct MemoryStore {
    pub objects: Mutex<BTreeMap<ObjectKey, Vec<u8>>>,
    /// So many requests fail before one succeeds.
    pub failures_left: AtomicUsize,
    log: EventLog,
}

impl MemoryStore {
    pub fn new(log: EventLog) -> Self {
        Self { objects: Mutex::default(), failures_left: AtomicUsize::new(0), log }
    }
}

impl ObjectStore for MemoryStore {
    fn bucket(&self) -> &str {
        "pictures"
    }

    async fn put_if_absent(
        &self,
        key: &ObjectKey,
        bytes: &[u8],
        sha256: &Sha256Digest,
    ) -> Result<Stored, StoreError> {
        let failing =
            self.failures_left.fetch_update(Ordering::SeqCst, Ordering::SeqCst, |left| left.checked_sub(1));
        if failing.is_ok() {
            self.log.push(Event::StoreFailed);
            return Err(StoreError::Unavailable { key: key.clone(), source: "away for the test".into() });
        }
        assert_eq!(*sha256, Sha256Digest::of(bytes), "the checksum is that of the bytes");
        self.log.push(Event::Stored(key.ordinal()));
        match self.objects.lock().unwrap().insert(key.clone(), bytes.to_vec()) {
            None => Ok(Stored::Written),
            Some(before) => {
                assert_eq!(before, bytes, "a key names its bytes");
                Ok(Stored::AlreadyThere)
            }
        }
    }
}
