//! The broker's version, read off the greeting that it sends before anybody logs in.
//!
//! lapin reads the server's properties and tells nobody, so this opens a connection of its own, reads one frame and hangs up; the
//! broker's log calls that a closed connection. The file stands in both programs, word for word: they share no crate that
//! may know lapin, and `tests/it/tidy.rs` compares the two.
use std::io;

use futures::{AsyncReadExt, AsyncWriteExt};
use lapin::protocol::connection::AMQPMethod;
use lapin::protocol::{AMQPClass, parse_class};
use lapin::runtime::default_runtime;
use lapin::tcp::AMQPUriTcpExt;
use lapin::types::AMQPValue;
use lapin::uri::AMQPUri;
use schema::BrokerVersion;

/// What a client of AMQP 0-9-1 says first.
const PROTOCOL_HEADER: &[u8; 8] = b"AMQP\x00\x00\x09\x01";
/// Type, channel and size.
const FRAME_HEADER_BYTES: usize = 7;
/// RabbitMQ's greeting has some 500.
const MAX_GREETING_BYTES: u32 = 64 * 1024;

/// The version of the server behind `uri`. Waits as long as the server does.
pub(super) async fn broker_version(uri: &AMQPUri) -> io::Result<BrokerVersion> {
    let runtime = default_runtime().map_err(io::Error::other)?;
    let mut stream = uri.connect_async(&runtime).await?;
    stream.write_all(PROTOCOL_HEADER).await?;
    stream.flush().await?;
    let mut header = [0; FRAME_HEADER_BYTES];
    stream.read_exact(&mut header).await?;
    let [_type, _, _, size @ ..] = header;
    let size = u32::from_be_bytes(size);
    if size > MAX_GREETING_BYTES {
        return Err(io::Error::other("it does not speak AMQP 0-9-1"));
    }
    let mut payload = vec![0; size as usize];
    stream.read_exact(&mut payload).await?;
    version_in(&payload)
}

fn version_in(payload: &[u8]) -> io::Result<BrokerVersion> {
    let Ok((_, AMQPClass::Connection(AMQPMethod::Start(start)))) = parse_class(payload) else {
        return Err(io::Error::other("it does not greet as an AMQP 0-9-1 server does"));
    };
    let text = |name: &str| match start.server_properties.inner().get(name) {
        Some(AMQPValue::LongString(text)) => text.to_string(),
        _ => String::new(),
    };
    let product = text("product");
    if product != "RabbitMQ" {
        return Err(io::Error::other(format!("it is no RabbitMQ but calls itself `{product}`")));
    }
    text("version").parse().map_err(io::Error::other)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Connection.Start with these properties, as RabbitMQ encodes it.
    fn greeting(properties: &[(&str, &str)]) -> Vec<u8> {
        let mut table = Vec::new();
        for (name, value) in properties {
            table.push(u8::try_from(name.len()).unwrap());
            table.extend(name.as_bytes());
            table.push(b'S');
            table.extend(u32::try_from(value.len()).unwrap().to_be_bytes());
            table.extend(value.as_bytes());
        }
        let mut payload = vec![0, 10, 0, 10, 0, 9];
        payload.extend(u32::try_from(table.len()).unwrap().to_be_bytes());
        payload.extend(table);
        for text in ["PLAIN AMQPLAIN", "en_US"] {
            payload.extend(u32::try_from(text.len()).unwrap().to_be_bytes());
            payload.extend(text.as_bytes());
        }
        payload
    }

    #[test]
    fn the_greeting_tells_the_version() {
        let rabbit = greeting(&[("product", "RabbitMQ"), ("version", "3.10.8")]);
        assert_eq!(version_in(&rabbit).unwrap().to_string(), "3.10.8");
    }

    #[test]
    fn another_server_is_told_apart() {
        let other = version_in(&greeting(&[("product", "OtherMQ"), ("version", "9.9.9")])).unwrap_err();
        assert!(other.to_string().contains("OtherMQ"), "{other}");
        for payload in [&b""[..], b"HTTP/1.1 400", &greeting(&[("product", "RabbitMQ")])] {
            assert!(version_in(payload).is_err(), "{payload:?}");
        }
    }
}
