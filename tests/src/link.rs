//! One process's way to one server, which a test can break without breaking anybody else's.

use std::net::SocketAddr;
use std::ops::Deref;

use crate::fleet::Fleet;
use crate::proxy::Proxy;

/// A server, as one process sees it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Wall {
    /// Postgres.
    Postgres,
    /// RabbitMQ.
    Broker,
    /// S3.
    S3,
}

impl Wall {
    /// The environment variable by which a process finds it.
    pub fn variable(self) -> &'static str {
        match self {
            Self::Postgres => "DATABASE_URL",
            Self::Broker => "AMQP_URL",
            Self::S3 => "AWS_ENDPOINT_URL",
        }
    }
}

/// A relay to a server, and the setting that sends a process through it.
pub struct Link {
    proxy: Proxy,
    variable: &'static str,
    url: String,
}

impl Link {
    /// A way to one of `fleet`'s servers.
    pub async fn to(fleet: &Fleet, wall: Wall) -> Link {
        let addresses = fleet.servers().addresses();
        let url = match wall {
            Wall::Postgres => fleet.database_url(),
            Wall::Broker => &addresses.amqp_url,
            Wall::S3 => &addresses.aws_endpoint_url,
        };
        Link::through(wall, url).await
    }

    /// A way to the server at `url`.
    pub async fn through(wall: Wall, url: &str) -> Link {
        let (start, authority) = authority(url);
        let upstream: SocketAddr = authority.parse().unwrap_or_else(|_| panic!("{authority}: HOST:PORT"));
        let proxy = Proxy::start(upstream).await;
        let (before, after) = (&url[..start], &url[start + authority.len()..]);
        Link { url: format!("{before}{}{after}", proxy.address()), proxy, variable: wall.variable() }
    }

    /// The same, with a query added to the URL, such as `heartbeat=2`.
    pub fn with_query(mut self, query: &str) -> Link {
        let separator = if self.url.contains('?') { '&' } else { '?' };
        self.url = format!("{}{separator}{query}", self.url);
        self
    }

    /// The variable and its value that send a process this way.
    pub fn env(&self) -> (&'static str, String) {
        (self.variable, self.url.clone())
    }
}

impl Deref for Link {
    type Target = Proxy;

    fn deref(&self) -> &Proxy {
        &self.proxy
    }
}

/// Where a URL's `HOST:PORT` begins, and itself.
pub fn authority(url: &str) -> (usize, &str) {
    let after_scheme = url.find("://").map_or(0, |at| at + 3);
    let end = url[after_scheme..].find(['/', '?']).map_or(url.len(), |at| after_scheme + at);
    let start = url[after_scheme..end].rfind('@').map_or(after_scheme, |at| after_scheme + at + 1);
    (start, &url[start..end])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_authority_is_what_stands_between_password_and_path() {
        for (url, expected) in [
            ("postgres://u:p@127.0.0.1:5432/fleet?sslmode=disable", "127.0.0.1:5432"),
            ("amqp://u:p%40@127.0.0.1:5672/%2f", "127.0.0.1:5672"),
            ("http://127.0.0.1:9000", "127.0.0.1:9000"),
        ] {
            let (start, found) = authority(url);
            assert_eq!(found, expected);
            assert_eq!(&url[start..start + found.len()], expected);
        }
    }
}
