//! Where the settings come from: a flag, its environment variable, or the local stack's environment file, in this
//! order. The only file that reads the environment.
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use nix::unistd::{User, geteuid};
use secrecy::SecretString;

use crate::local_stack::data_dir;
use crate::local_stack::env_file::Endpoints;

/// Settings that every command shares.
#[derive(Clone, Debug, clap::Args)]
pub struct GlobalArgs {
    /// Folder of the local stack: server data, pictures, logs, passwords.
    ///
    /// By default `.darkroom` in the current folder; for root in a folder that other users cannot enter, a folder in
    /// /var/tmp named after the current one. The other commands look here for the stack that `darkroom up` started.
    #[arg(long, env = "DARKROOM_DATA_DIR", global = true, value_name = "DIR", help_heading = "Connections")]
    pub data_dir: Option<PathBuf>,

    /// PostgreSQL, as postgres://USER:PASSWORD@HOST:PORT/DATABASE. By default the local stack's.
    #[arg(
        long,
        env = "DATABASE_URL",
        hide_env_values = true,
        global = true,
        value_name = "URL",
        help_heading = "Connections"
    )]
    pub database_url: Option<SecretString>,

    /// RabbitMQ, as amqp:// or amqps://USER:PASSWORD@HOST:PORT/VHOST. By default the local stack's.
    #[arg(
        long,
        env = "AMQP_URL",
        hide_env_values = true,
        global = true,
        value_name = "URL",
        help_heading = "Connections"
    )]
    pub amqp_url: Option<SecretString>,

    /// Bucket for the pictures. If set, the standard AWS variables (AWS_ENDPOINT_URL, AWS_REGION, AWS_PROFILE,
    /// AWS_ACCESS_KEY_ID ...) tell the rest; if not, the local stack's bucket is used and they do not matter.
    #[arg(long, env = "S3_BUCKET", global = true, value_name = "NAME", help_heading = "Connections")]
    pub s3_bucket: Option<String>,

    /// Which log lines to show: a level, or targets with levels such as `scheduler=debug,warn`.
    ///
    /// By default `info` for `up` and `serve` and `warn` elsewhere. Prompts appear at `debug` only.
    #[arg(long, env = "DARKROOM_LOG", global = true, value_name = "FILTER", help_heading = "Output")]
    pub log: Option<String>,

    /// How log lines look: `pretty` for people, `json` for machines. They go to standard error.
    #[arg(
        long,
        env = "DARKROOM_LOG_FORMAT",
        global = true,
        default_value = "pretty",
        value_name = "FORMAT",
        help_heading = "Output"
    )]
    pub log_format: LogFormat,

    /// Print data as JSON on standard output, one document a line.
    #[arg(long, global = true, help_heading = "Output")]
    pub json: bool,
}

/// How log lines look.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum LogFormat {
    /// For people.
    Pretty,
    /// One JSON object a line.
    Json,
}

/// Which bucket, and how to reach it.
#[derive(Clone, Debug)]
pub struct S3Settings {
    /// The bucket.
    pub bucket: String,
    /// Where the server and the credentials come from.
    pub access: S3Access,
}

/// Where the S3 server and the credentials come from.
#[derive(Clone, Debug)]
pub enum S3Access {
    /// The standard AWS environment: variables, profiles, instance roles.
    Environment {
        /// Whether it names another server than Amazon's.
        custom_endpoint: bool,
    },
    /// The local stack.
    LocalStack {
        /// The server, `http://…`.
        endpoint_url: String,
        /// The region to sign for.
        region: String,
        /// The access key id.
        access_key_id: String,
        /// The secret access key.
        secret_access_key: SecretString,
    },
}

impl S3Settings {
    /// The bucket of the local stack at `endpoints`.
    pub fn of_local_stack(endpoints: &Endpoints) -> Self {
        Self {
            bucket: endpoints.s3_bucket.clone(),
            access: S3Access::LocalStack {
                endpoint_url: endpoints.aws_endpoint_url.clone(),
                region: endpoints.aws_region.clone(),
                access_key_id: endpoints.aws_access_key_id.clone(),
                secret_access_key: endpoints.aws_secret_access_key.clone(),
            },
        }
    }
}

/// The shared settings, resolved as far as a command asks for them.
#[derive(Clone, Debug)]
pub struct Settings {
    arguments: GlobalArgs,
    data_dir: PathBuf,
    local_stack: Option<Endpoints>,
}

impl Settings {
    /// Finds the data folder and reads the environment file in it, if there is one.
    ///
    /// # Errors
    /// If the file is there and cannot be read.
    pub fn resolve(arguments: GlobalArgs) -> Result<Self> {
        let data_dir = data_dir::locate(arguments.data_dir.as_deref())?;
        // The file of a stack that nothing is asked from must not be in the way, even if it is unreadable.
        let needs_it =
            arguments.database_url.is_none() || arguments.amqp_url.is_none() || arguments.s3_bucket.is_none();
        let local_stack = if needs_it { Endpoints::read(&data_dir::env_file(&data_dir))? } else { None };
        Ok(Self { arguments, data_dir, local_stack })
    }

    /// The data folder, which need not exist.
    pub fn data_dir(&self) -> &Path {
        &self.data_dir
    }

    /// PostgreSQL's URL.
    ///
    /// # Errors
    /// If neither a setting nor a local stack tells it.
    pub fn database_url(&self) -> Result<SecretString> {
        let local = self.local_stack.as_ref().map(|endpoints| &endpoints.database_url);
        self.arguments
            .database_url
            .as_ref()
            .or(local)
            .cloned()
            .with_context(|| self.nothing_tells("DATABASE_URL"))
    }

    /// Whether the database is the local stack's, found by its environment file.
    pub fn uses_local_database(&self) -> bool {
        self.arguments.database_url.is_none() && self.local_stack.is_some()
    }

    /// RabbitMQ's URL.
    ///
    /// # Errors
    /// If neither a setting nor a local stack tells it.
    pub fn amqp_url(&self) -> Result<SecretString> {
        let local = self.local_stack.as_ref().map(|endpoints| &endpoints.amqp_url);
        self.arguments.amqp_url.as_ref().or(local).cloned().with_context(|| self.nothing_tells("AMQP_URL"))
    }

    /// The bucket and how to reach it.
    ///
    /// # Errors
    /// If neither a setting nor a local stack tells it.
    pub fn s3(&self) -> Result<S3Settings> {
        if let Some(bucket) = &self.arguments.s3_bucket {
            let is_set = |name| std::env::var_os(name).is_some_and(|value| !value.is_empty());
            let custom_endpoint = is_set("AWS_ENDPOINT_URL") || is_set("AWS_ENDPOINT_URL_S3");
            return Ok(S3Settings {
                bucket: bucket.clone(),
                access: S3Access::Environment { custom_endpoint },
            });
        }
        let local = self.local_stack.as_ref().with_context(|| self.nothing_tells("S3_BUCKET"))?;
        Ok(S3Settings::of_local_stack(local))
    }

    fn nothing_tells(&self, variable: &str) -> String {
        format!(
            "{variable} is not set, and no local stack runs with its data in {}\n\
             hint: start one with `darkroom up`, or set {variable}",
            self.data_dir.display()
        )
    }
}

/// Who acts: `configured`, or the name of the user who runs this program.
///
/// # Errors
/// If that user has no name.
pub fn principal(configured: Option<String>) -> Result<String> {
    if let Some(principal) = configured {
        return Ok(principal);
    }
    if let Some(user) = std::env::var("USER").ok().filter(|user| !user.is_empty()) {
        return Ok(user);
    }
    let user = User::from_uid(geteuid()).ok().flatten();
    user.map(|user| user.name).context("this user has no name\nhint: say who you are by --principal")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn arguments(data_dir: &Path) -> GlobalArgs {
        GlobalArgs {
            data_dir: Some(data_dir.to_owned()),
            database_url: None,
            amqp_url: None,
            s3_bucket: None,
            log: None,
            log_format: LogFormat::Pretty,
            json: false,
        }
    }

    #[test]
    fn what_nothing_tells_is_an_error_with_two_ways_out() {
        let folder = tempfile::tempdir().unwrap();
        let settings = Settings::resolve(arguments(folder.path())).unwrap();
        let error = settings.amqp_url().unwrap_err().to_string();
        let error = error.replace(&folder.path().display().to_string(), "DIR");
        insta::assert_snapshot!(error, @"
        AMQP_URL is not set, and no local stack runs with its data in DIR
        hint: start one with `darkroom up`, or set AMQP_URL
        ");
    }

    #[test]
    fn a_setting_wins_over_the_local_stack() {
        use secrecy::ExposeSecret;
        let folder = tempfile::tempdir().unwrap();
        std::fs::write(
            folder.path().join("env"),
            "export DATABASE_URL='postgres://local'\nexport AMQP_URL='amqp://local'\nexport S3_BUCKET='local'\n\
             export AWS_ENDPOINT_URL='http://local'\nexport AWS_REGION='r'\nexport AWS_ACCESS_KEY_ID='k'\n\
             export AWS_SECRET_ACCESS_KEY='s'\n",
        )
        .unwrap();
        let set = GlobalArgs { database_url: Some("postgres://set".into()), ..arguments(folder.path()) };
        let settings = Settings::resolve(set).unwrap();
        assert_eq!(settings.database_url().unwrap().expose_secret(), "postgres://set");
        assert_eq!(settings.amqp_url().unwrap().expose_secret(), "amqp://local");
        assert!(matches!(settings.s3().unwrap().access, S3Access::LocalStack { .. }));

        let set = GlobalArgs { s3_bucket: Some("mine".into()), ..arguments(folder.path()) };
        let s3 = Settings::resolve(set).unwrap().s3().unwrap();
        assert_eq!(s3.bucket, "mine");
        assert!(matches!(s3.access, S3Access::Environment { .. }));
    }
}
