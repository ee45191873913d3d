//! The local stack's own passwords and keys: random, made once, kept in one file that only its owner reads.
use std::fs;
use std::path::Path;

use anyhow::{Context, Result};
use rand::distr::{Alphanumeric, SampleString};
use secrecy::{ExposeSecret, SecretString};
use serde::{Deserialize, Serialize};

use super::server_user::ServerUser;

/// The user name at PostgreSQL and RabbitMQ, and the name of the database and the bucket.
pub const NAME: &str = "darkroom";

/// Letters in a password: 32 of 62 signs are 190 bits.
const LENGTH: usize = 32;

/// The passwords and keys of one data folder.
#[derive(Clone, Debug)]
pub struct Credentials {
    /// Password of the database user.
    pub postgres_password: SecretString,
    /// Password of the broker user.
    pub rabbitmq_password: SecretString,
    /// What Erlang nodes and tools show each other.
    pub erlang_cookie: SecretString,
    /// The S3 access key id; public by nature, but random too.
    pub s3_access_key_id: String,
    /// The S3 secret access key.
    pub s3_secret_access_key: SecretString,
}

/// The file's form. Plain strings live only while it is read or written.
#[derive(Serialize, Deserialize)]
struct Stored {
    postgres_password: String,
    rabbitmq_password: String,
    erlang_cookie: String,
    s3_access_key_id: String,
    s3_secret_access_key: String,
}

impl Credentials {
    /// Reads the credentials in `file`, or makes them and writes the file with mode 0600.
    pub fn remembered_or_made(file: &Path) -> Result<Self> {
        let stored = match fs::read_to_string(file) {
            Ok(text) => serde_json::from_str(&text).with_context(|| {
                format!("{} is not the credentials file that `darkroom up` writes", file.display())
            })?,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
                let stored = Stored {
                    postgres_password: random(),
                    rabbitmq_password: random(),
                    erlang_cookie: random(),
                    s3_access_key_id: format!("DR{}", &random()[..18]),
                    s3_secret_access_key: random(),
                };
                let text = serde_json::to_string_pretty(&stored)?;
                ServerUser::Myself.write_private_file(file, &text, 0o600)?;
                stored
            }
            Err(error) => return Err(error).with_context(|| format!("cannot read {}", file.display())),
        };
        Ok(Self {
            postgres_password: stored.postgres_password.into(),
            rabbitmq_password: stored.rabbitmq_password.into(),
            erlang_cookie: stored.erlang_cookie.into(),
            s3_access_key_id: stored.s3_access_key_id,
            s3_secret_access_key: stored.s3_secret_access_key.into(),
        })
    }

    /// `postgres://…` for the database on `port`.
    pub fn database_url(&self, port: u16) -> SecretString {
        let password = self.postgres_password.expose_secret();
        format!("postgres://{NAME}:{password}@127.0.0.1:{port}/{NAME}").into()
    }

    /// `amqp://…` for the broker on `port`, default virtual host.
    pub fn amqp_url(&self, port: u16) -> SecretString {
        let password = self.rabbitmq_password.expose_secret();
        format!("amqp://{NAME}:{password}@127.0.0.1:{port}/%2f").into()
    }

    /// `http://…` for the broker's management interface on `port`, with the user's name and password in it.
    pub fn management_url(&self, port: u16) -> SecretString {
        let password = self.rabbitmq_password.expose_secret();
        format!("http://{NAME}:{password}@127.0.0.1:{port}").into()
    }
}

fn random() -> String {
    Alphanumeric.sample_string(&mut rand::rng(), LENGTH)
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    #[test]
    fn credentials_are_private_random_and_remembered() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("credentials.json");
        let first = Credentials::remembered_or_made(&file).unwrap();
        assert_eq!(fs::metadata(&file).unwrap().permissions().mode() & 0o777, 0o600);
        let again = Credentials::remembered_or_made(&file).unwrap();
        assert_eq!(first.postgres_password.expose_secret(), again.postgres_password.expose_secret());
        assert_ne!(first.postgres_password.expose_secret(), first.rabbitmq_password.expose_secret());
        assert!(!format!("{first:?}").contains(first.postgres_password.expose_secret()));
    }
}
