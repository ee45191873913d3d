//! Rows in the format of `COPY … WITH (FORMAT binary)`: <https://www.postgresql.org/docs/15/sql-copy.html>.

use uuid::Uuid;

/// Signature, flags and the length of an empty header extension.
const HEADER: &[u8] = b"PGCOPY\n\xff\r\n\0\0\0\0\0\0\0\0\0";
/// The field count of the row that is none: the end.
const TRAILER: i16 = -1;

/// A buffer of binary rows. Each row is [`begin_row`](Self::begin_row) and then its fields in the order of the columns.
pub(super) struct BinaryRows {
    bytes: Vec<u8>,
}

impl BinaryRows {
    /// An empty buffer, starting with the header.
    pub(super) fn new() -> Self {
        Self { bytes: HEADER.to_vec() }
    }

    /// How many bytes wait to be sent.
    pub(super) fn len(&self) -> usize {
        self.bytes.len()
    }

    /// Takes the bytes that wait to be sent.
    pub(super) fn take(&mut self) -> Vec<u8> {
        std::mem::take(&mut self.bytes)
    }

    /// Starts a row of `field_count` fields.
    pub(super) fn begin_row(&mut self, field_count: i16) {
        self.bytes.extend_from_slice(&field_count.to_be_bytes());
    }

    /// Ends the copy.
    pub(super) fn finish(&mut self) {
        self.bytes.extend_from_slice(&TRAILER.to_be_bytes());
    }

    /// A field of raw bytes. At most [`MAX_PROMPT_CHARS`](crate::limits::MAX_PROMPT_CHARS) characters get here.
    fn field(&mut self, value: &[u8]) {
        let length = i32::try_from(value.len()).expect("a valid spec's texts are far shorter than 2 GiB");
        self.bytes.extend_from_slice(&length.to_be_bytes());
        self.bytes.extend_from_slice(value);
    }

    fn null(&mut self) {
        self.bytes.extend_from_slice(&(-1_i32).to_be_bytes());
    }

    pub(super) fn uuid(&mut self, value: Uuid) {
        self.field(value.as_bytes());
    }

    pub(super) fn smallint(&mut self, value: i16) {
        self.field(&value.to_be_bytes());
    }

    pub(super) fn integer(&mut self, value: i32) {
        self.field(&value.to_be_bytes());
    }

    pub(super) fn optional_integer(&mut self, value: Option<i32>) {
        match value {
            Some(value) => self.integer(value),
            None => self.null(),
        }
    }

    pub(super) fn bigint(&mut self, value: i64) {
        self.field(&value.to_be_bytes());
    }

    pub(super) fn real(&mut self, value: f32) {
        self.field(&value.to_be_bytes());
    }

    pub(super) fn double(&mut self, value: f64) {
        self.field(&value.to_be_bytes());
    }

    /// A text, or a word of an SQL enum.
    pub(super) fn text(&mut self, value: &str) {
        self.field(value.as_bytes());
    }

    pub(super) fn optional_text(&mut self, value: Option<&str>) {
        match value {
            Some(value) => self.text(value),
            None => self.null(),
        }
    }
}
