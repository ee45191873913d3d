//! The local RabbitMQ: one private node with its own port mapper, bound to loopback, with the management interface
//! and the Prometheus metrics on.
use std::path::Path;
use std::time::Duration;

use anyhow::{Result, bail};
use nix::sys::signal::Signal;
use secrecy::{ExposeSecret, SecretString};
use tokio::net::TcpStream;
use tokio::process::Command;

use super::credentials::{Credentials, NAME};
use super::data_dir::DataDir;
use super::ports::Ports;
use super::server_process::{ChildrenFile, ServerProcess};
use crate::amqp;

/// The real scripts. The wrappers in /usr/sbin insist on root or the user `rabbitmq`.
const PROGRAMS: &str = "/usr/lib/rabbitmq/bin";

/// Where an Erlang installation has its port mapper.
const PORT_MAPPERS: [&str; 3] = ["/usr/bin/epmd", "/usr/local/bin/epmd", "/usr/lib/erlang/bin/epmd"];

/// Constant, because the node's data folder is named after it; each stack has a port mapper of its own, so names of
/// different stacks do not meet.
const NODE_NAME: &str = "darkroom@localhost";

/// A start takes 5 to 8 s on two idle cores, and several times that while they compile.
const READY_LIMIT: Duration = Duration::from_secs(180);

/// The programs and the data folder of the local RabbitMQ.
#[derive(Debug)]
pub struct RabbitMq {
    port_mapper: &'static Path,
    data_dir: DataDir,
    ports: Ports,
}

impl RabbitMq {
    /// Finds the installed RabbitMQ and its Erlang port mapper.
    pub fn find(data_dir: &DataDir, ports: Ports) -> Result<Self> {
        const HINT: &str =
            "hint: run `make deps`, or `apt-get install rabbitmq-server` (its own service need not run)";
        if !Path::new(PROGRAMS).join("rabbitmq-server").exists() {
            bail!("RabbitMQ is not installed: no {PROGRAMS}/rabbitmq-server\n{HINT}");
        }
        let Some(port_mapper) = PORT_MAPPERS.map(Path::new).into_iter().find(|path| path.exists()) else {
            bail!("Erlang's port mapper is not installed: none of {PORT_MAPPERS:?}\n{HINT}");
        };
        Ok(Self { port_mapper, data_dir: data_dir.clone(), ports })
    }

    /// Writes the configuration. The password in it counts at the first boot only, when the user is created.
    pub fn configure(&self, credentials: &Credentials) -> Result<()> {
        let user = self.data_dir.server_user;
        let folder = self.data_dir.rabbitmq();
        for name in ["home", "mnesia", "log"] {
            user.create_private_folder(&folder.join(name))?;
        }
        let cookie = credentials.erlang_cookie.expose_secret();
        user.write_private_file(&folder.join("home/.erlang.cookie"), cookie, 0o400)?;
        user.write_private_file(
            &folder.join("enabled_plugins"),
            "[rabbitmq_management,rabbitmq_prometheus].\n",
            0o600,
        )?;
        user.write_private_file(&folder.join("rabbitmq.conf"), &configuration(self.ports, credentials), 0o600)
    }

    /// Starts the port mapper. It is a child of ours, because the node would otherwise start one that outlives it.
    pub async fn start_port_mapper(&self, children: &ChildrenFile) -> Result<ServerProcess> {
        let mut command = self.data_dir.server_user.command(self.port_mapper, Signal::SIGKILL);
        command.args(["-address", "127.0.0.1", "-port", &self.ports.epmd.to_string()]);
        let log = self.data_dir.logs().join("epmd.log");
        let mut process = ServerProcess::spawn("epmd", command, Signal::SIGTERM, &log, children)?;
        let address = ("127.0.0.1", self.ports.epmd);
        process.wait_until_ready(READY_LIMIT, async || TcpStream::connect(address).await.is_ok()).await?;
        Ok(process)
    }

    /// Starts the node and waits until a client can log in at `url`.
    pub async fn start(&self, url: &SecretString, children: &ChildrenFile) -> Result<ServerProcess> {
        let log = self.data_dir.logs().join("rabbitmq.log");
        let mut process = ServerProcess::spawn("rabbitmq", self.command(), Signal::SIGTERM, &log, children)?;
        process.wait_until_ready(READY_LIMIT, async || amqp::answers(url).await).await?;
        Ok(process)
    }

    fn command(&self) -> Command {
        let folder = self.data_dir.rabbitmq();
        let program = Path::new(PROGRAMS).join("rabbitmq-server");
        let mut command = self.data_dir.server_user.command(program, Signal::SIGTERM);
        command
            // Tells the script to become the node instead of waiting for it as a parent.
            .env("RUNNING_UNDER_SYSTEMD", "true")
            .env("HOME", folder.join("home"))
            .env("RABBITMQ_NODENAME", NODE_NAME)
            .env("RABBITMQ_CONF_ENV_FILE", "/dev/null")
            .env("RABBITMQ_CONFIG_FILE", folder.join("rabbitmq.conf"))
            .env("RABBITMQ_ADVANCED_CONFIG_FILE", folder.join("advanced.config"))
            .env("RABBITMQ_MNESIA_BASE", folder.join("mnesia"))
            .env("RABBITMQ_LOG_BASE", folder.join("log"))
            .env("RABBITMQ_LOGS", folder.join("log/node.log"))
            .env("RABBITMQ_ENABLED_PLUGINS_FILE", folder.join("enabled_plugins"))
            .env("RABBITMQ_PID_FILE", folder.join("pid"))
            .env("RABBITMQ_GENERATED_CONFIG_DIR", folder.join("gen"))
            .env("RABBITMQ_SCHEMA_DIR", folder.join("schema"))
            .env("RABBITMQ_DIST_PORT", self.ports.distribution.to_string())
            .env("ERL_EPMD_PORT", self.ports.epmd.to_string())
            .env("ERL_EPMD_ADDRESS", "127.0.0.1")
            // Without the busy-wait switches an idle node keeps a core warm that the worker could use.
            .env(
                "RABBITMQ_SERVER_ADDITIONAL_ERL_ARGS",
                "-kernel inet_dist_use_interface {127,0,0,1} -start_epmd false +sbwt none +sbwtdcpu none +sbwtdio none",
            );
        command
    }
}

/// The node's configuration file.
fn configuration(ports: Ports, credentials: &Credentials) -> String {
    let password = credentials.rabbitmq_password.expose_secret();
    format!(
        "listeners.tcp.1 = 127.0.0.1:{amqp}\n\
         management.tcp.ip = 127.0.0.1\n\
         management.tcp.port = {management}\n\
         prometheus.tcp.ip = 127.0.0.1\n\
         prometheus.tcp.port = {prometheus}\n\
         default_user = {NAME}\n\
         default_pass = {password}\n\
         default_user_tags.administrator = true\n\
         log.console = false\n\
         vm_memory_high_watermark.absolute = 2GiB\n\
         disk_free_limit.absolute = 200MB\n",
        amqp = ports.amqp,
        management = ports.management,
        prometheus = ports.prometheus,
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_listener_is_on_loopback() {
        let folder = tempfile::tempdir().unwrap();
        let credentials = Credentials::remembered_or_made(&folder.path().join("credentials.json")).unwrap();
        let ports = Ports { amqp: 1, management: 2, prometheus: 3, ..Ports::default() };
        let text = configuration(ports, &credentials);
        let password = credentials.rabbitmq_password.expose_secret();
        insta::assert_snapshot!(text.replace(password, "PASSWORD"), @"
        listeners.tcp.1 = 127.0.0.1:1
        management.tcp.ip = 127.0.0.1
        management.tcp.port = 2
        prometheus.tcp.ip = 127.0.0.1
        prometheus.tcp.port = 3
        default_user = darkroom
        default_pass = PASSWORD
        default_user_tags.administrator = true
        log.console = false
        vm_memory_high_watermark.absolute = 2GiB
        disk_free_limit.absolute = 200MB
        ");
    }
}
