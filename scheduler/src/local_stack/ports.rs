//! The local stack's ports: chosen once, remembered in the data folder, changed only when somebody else sits on one.
use std::fs;
use std::net::{Ipv4Addr, TcpListener};
use std::path::Path;

use anyhow::{Context, Result, bail};
use rand::RngExt;
use serde::{Deserialize, Serialize};

use super::server_user::ServerUser;

/// Where ports are looked for: above the ports that services usually have, and below 32768, where Linux by default
/// begins to take the source ports of outgoing connections. A port from that range could be taken at the next start.
const RANGE: std::ops::Range<u16> = 20_000..32_000;

/// How often a free port is looked for before giving up: a machine where this fails has bigger worries.
const TRIES: usize = 1_000;

/// One port on 127.0.0.1 for each listener of the stack. Zero, before they are chosen, means none yet.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Ports {
    /// PostgreSQL.
    pub postgres: u16,
    /// RabbitMQ for clients.
    pub amqp: u16,
    /// RabbitMQ's management interface over HTTP.
    pub management: u16,
    /// RabbitMQ's metrics for Prometheus.
    pub prometheus: u16,
    /// Erlang distribution, which RabbitMQ's command line tools use.
    pub distribution: u16,
    /// The stack's own Erlang port mapper.
    pub epmd: u16,
    /// The S3 server.
    pub s3: u16,
}

impl Ports {
    /// Reads the remembered ports from `file` and replaces those that are missing or taken; writes them back if they
    /// changed.
    pub fn remembered_or_chosen(file: &Path) -> Result<Self> {
        let remembered: Self = match fs::read_to_string(file) {
            Ok(text) => serde_json::from_str(&text).with_context(|| {
                format!("{} is not the list of ports that `darkroom up` writes", file.display())
            })?,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => Self::default(),
            Err(error) => return Err(error).with_context(|| format!("cannot read {}", file.display())),
        };
        let mut ports = remembered;
        // Listeners are held until all ports are chosen, so that no port is chosen twice.
        let mut held = Vec::new();
        for port in ports.each() {
            let listener = match listen(*port) {
                Some(listener) if *port != 0 => listener,
                _ => free_port()?,
            };
            *port = listener.local_addr()?.port();
            held.push(listener);
        }
        if ports != remembered {
            let text = serde_json::to_string_pretty(&ports)?;
            ServerUser::Myself.write_private_file(file, &text, 0o600)?;
        }
        Ok(ports)
    }

    fn each(&mut self) -> [&mut u16; 7] {
        let Self { postgres, amqp, management, prometheus, distribution, epmd, s3 } = self;
        [postgres, amqp, management, prometheus, distribution, epmd, s3]
    }
}

fn listen(port: u16) -> Option<TcpListener> {
    TcpListener::bind((Ipv4Addr::LOCALHOST, port)).ok()
}

fn free_port() -> Result<TcpListener> {
    for _ in 0..TRIES {
        if let Some(listener) = listen(rand::rng().random_range(RANGE)) {
            return Ok(listener);
        }
    }
    bail!("no free port on 127.0.0.1 between {} and {} after {TRIES} tries", RANGE.start, RANGE.end)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ports_are_distinct_and_remembered_and_only_a_taken_one_moves() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("ports.json");
        let mut first = Ports::remembered_or_chosen(&file).unwrap();
        let distinct: std::collections::BTreeSet<_> = first.each().into_iter().collect();
        assert_eq!(distinct.len(), 7);

        let squatter = listen(first.amqp).unwrap();
        let second = Ports::remembered_or_chosen(&file).unwrap();
        assert_ne!(second.amqp, first.amqp);
        assert_eq!(Ports { amqp: first.amqp, ..second }, first);
        drop(squatter);
        assert_eq!(Ports::remembered_or_chosen(&file).unwrap(), second);
    }

    #[test]
    fn a_spoiled_file_is_named() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("ports.json");
        fs::write(&file, "not json").unwrap();
        let error = Ports::remembered_or_chosen(&file).unwrap_err();
        assert!(error.to_string().contains("ports.json is not the list of ports"), "{error:#}");
    }
}
