//! `DATA_DIR/env`: how to connect to the running local stack, as shell exports. People source it; our own commands
//! read it when the environment names no servers.
use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::path::Path;

use anyhow::{Context, Result, bail};
use secrecy::{ExposeSecret, SecretString};

use super::server_user::ServerUser;

/// The region that the local S3 server signs for; any would do.
const REGION: &str = "us-east-1";

/// How to reach the servers of one local stack.
#[derive(Clone, Debug)]
pub struct Endpoints {
    /// `DATABASE_URL`.
    pub database_url: SecretString,
    /// `AMQP_URL`.
    pub amqp_url: SecretString,
    /// `S3_BUCKET`.
    pub s3_bucket: String,
    /// `AWS_ENDPOINT_URL`.
    pub aws_endpoint_url: String,
    /// `AWS_REGION`.
    pub aws_region: String,
    /// `AWS_ACCESS_KEY_ID`.
    pub aws_access_key_id: String,
    /// `AWS_SECRET_ACCESS_KEY`.
    pub aws_secret_access_key: SecretString,
}

impl Endpoints {
    /// The S3 part points at 127.0.0.1:`port`.
    pub fn local_endpoint(port: u16) -> (String, String) {
        (format!("http://127.0.0.1:{port}"), REGION.to_owned())
    }

    /// Names and values of the environment variables, secrets in the clear: for child processes and the file.
    pub fn variables(&self) -> [(&'static str, &str); 7] {
        [
            ("DATABASE_URL", self.database_url.expose_secret()),
            ("AMQP_URL", self.amqp_url.expose_secret()),
            ("S3_BUCKET", &self.s3_bucket),
            ("AWS_ENDPOINT_URL", &self.aws_endpoint_url),
            ("AWS_REGION", &self.aws_region),
            ("AWS_ACCESS_KEY_ID", &self.aws_access_key_id),
            ("AWS_SECRET_ACCESS_KEY", self.aws_secret_access_key.expose_secret()),
        ]
    }

    /// Writes the file at `path`, mode 0600.
    pub fn write(&self, path: &Path) -> Result<()> {
        let mut text = String::from(
            "# Written by `darkroom up`; holds passwords. `source` it to point psql, aws and other tools at the local\n\
             # stack. The commands of darkroom read it by themselves when DATABASE_URL, AMQP_URL and S3_BUCKET are unset.\n",
        );
        for (name, value) in self.variables() {
            writeln!(text, "export {name}='{value}'")?;
        }
        ServerUser::Myself.write_private_file(path, &text, 0o600)
    }

    /// Reads the file at `path`; `None` if there is none, that is, if no local stack runs.
    pub fn read(path: &Path) -> Result<Option<Self>> {
        match std::fs::read_to_string(path) {
            Ok(text) => Self::parse(&text)
                .map(Some)
                .with_context(|| format!("cannot use the file {}", path.display())),
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(error).with_context(|| format!("cannot read {}", path.display())),
        }
    }

    fn parse(text: &str) -> Result<Self> {
        let mut values = BTreeMap::new();
        for (index, line) in text.lines().enumerate() {
            let line = line.trim();
            if line.is_empty() || line.starts_with('#') {
                continue;
            }
            let assignment = line.strip_prefix("export ").unwrap_or(line).split_once('=');
            let Some((name, value)) = assignment else {
                bail!("line {} is not `export NAME='value'`", index + 1);
            };
            values.insert(name.trim(), value.trim().trim_matches('\''));
        }
        let mut take = |name: &str| {
            let value = values.remove(name).filter(|value| !value.is_empty());
            value.map(str::to_owned).with_context(|| format!("{name} is missing"))
        };
        Ok(Self {
            database_url: take("DATABASE_URL")?.into(),
            amqp_url: take("AMQP_URL")?.into(),
            s3_bucket: take("S3_BUCKET")?,
            aws_endpoint_url: take("AWS_ENDPOINT_URL")?,
            aws_region: take("AWS_REGION")?,
            aws_access_key_id: take("AWS_ACCESS_KEY_ID")?,
            aws_secret_access_key: take("AWS_SECRET_ACCESS_KEY")?.into(),
        })
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    fn endpoints() -> Endpoints {
        Endpoints {
            database_url: "postgres://darkroom:p@127.0.0.1:1/darkroom".into(),
            amqp_url: "amqp://darkroom:p@127.0.0.1:2/%2f".into(),
            s3_bucket: "darkroom".into(),
            aws_endpoint_url: "http://127.0.0.1:3".into(),
            aws_region: "us-east-1".into(),
            aws_access_key_id: "DRx".into(),
            aws_secret_access_key: "s".into(),
        }
    }

    #[test]
    fn the_file_is_private_and_reads_back() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("env");
        endpoints().write(&path).unwrap();
        assert_eq!(std::fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
        let read = Endpoints::read(&path).unwrap().unwrap();
        assert_eq!(read.variables(), endpoints().variables());
        assert!(Endpoints::read(&folder.path().join("missing")).unwrap().is_none());
    }

    #[test]
    fn a_shell_understands_the_file() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("env");
        endpoints().write(&path).unwrap();
        let script = format!(". {} && printf %s \"$AMQP_URL\"", path.display());
        let output = std::process::Command::new("sh").arg("-c").arg(script).output().unwrap();
        assert_eq!(String::from_utf8(output.stdout).unwrap(), "amqp://darkroom:p@127.0.0.1:2/%2f");
    }

    #[test]
    fn what_is_missing_is_named() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("env");
        std::fs::write(&path, "export DATABASE_URL='x'\n").unwrap();
        let error = format!("{:#}", Endpoints::read(&path).unwrap_err());
        assert!(error.ends_with("env: AMQP_URL is missing"), "{error}");
        std::fs::write(&path, "what is this\n").unwrap();
        let error = format!("{:#}", Endpoints::read(&path).unwrap_err());
        assert!(error.ends_with("line 1 is not `export NAME='value'`"), "{error}");
    }
}
