//! A Postgres server for the tests, and one database for each.
//!
//! With `DATABASE_URL` set, databases are made on that server and dropped after each test. Otherwise the first test
//! starts a server of its own, reached by a Unix socket, so that no port can be taken. A shell watches over it: it
//! waits for the end of its input, which comes when this process ends in whatever way, and then stops the server and
//! removes its folder.

use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use schema::PgCatalog;
use secrecy::SecretString;
use sqlx::postgres::{PgConnectOptions, PgPoolOptions};
use sqlx::{ConnectOptions, Connection, PgConnection, PgPool};
use tokio::sync::OnceCell;

/// The application name of connections that no catalog has opened.
pub const TEST_ITSELF: &str = "test";
const TEMPLATE: &str = "darkroom_template";
/// Postgres refuses to run as root; then it runs as this user, `nobody`.
const UNPRIVILEGED: u32 = 65534;
const START_TIMEOUT: Duration = Duration::from_secs(60);

static SERVER: OnceCell<TestServer> = OnceCell::const_new();
static DATABASES: AtomicU32 = AtomicU32::new(0);

struct TestServer {
    /// Where databases are created and dropped from.
    admin: PgConnectOptions,
    /// The database that others are copies of, on a server of our own.
    template: Option<&'static str>,
    /// Holds the other end of the watching shell's input.
    _shell: Option<Child>,
}

/// A database of one test.
pub struct TestDatabase {
    options: PgConnectOptions,
    drop_with: Option<PgConnectOptions>,
}

impl TestServer {
    async fn start() -> Self {
        if let Ok(url) = std::env::var("DATABASE_URL") {
            return Self { admin: url.parse().unwrap(), template: None, _shell: None };
        }
        let folder = std::env::temp_dir().join(format!("darkroom-schema-test-{}", std::process::id()));
        let shell = start_postgres(&folder);
        let admin =
            PgConnectOptions::new_without_pgpass().socket(&folder).username("postgres").database("postgres");
        let mut connection = wait_until_ready(&admin).await;
        sqlx::query(&format!("CREATE DATABASE {TEMPLATE}")).execute(&mut connection).await.unwrap();
        connection.close().await.unwrap();
        let template = PgCatalog::connect(&url(&admin.clone().database(TEMPLATE)), 1).await.unwrap();
        template.migrate().await.unwrap();
        // Nobody may be connected to a template while it is copied.
        template.close().await;
        Self { admin, template: Some(TEMPLATE), _shell: Some(shell) }
    }
}

/// The newest Postgres that Debian has installed.
fn postgres_bin() -> PathBuf {
    let versions = std::fs::read_dir("/usr/lib/postgresql").expect("PostgreSQL is installed: make deps");
    let newest = versions
        .filter_map(|entry| entry.ok()?.file_name().to_str()?.parse::<u32>().ok())
        .filter(|version| Path::new(&format!("/usr/lib/postgresql/{version}/bin/postgres")).exists())
        .max()
        .expect("PostgreSQL is installed: make deps");
    PathBuf::from(format!("/usr/lib/postgresql/{newest}/bin"))
}

fn start_postgres(folder: &Path) -> Child {
    let _ = std::fs::remove_dir_all(folder); // There is one only if an earlier process had this id.
    std::fs::create_dir(folder).unwrap();
    std::fs::set_permissions(folder, std::fs::Permissions::from_mode(0o777)).unwrap();
    // Being root shows in who owns what we create.
    let is_root = std::os::unix::fs::MetadataExt::uid(&std::fs::metadata(folder).unwrap()) == 0;
    let user = if is_root {
        format!("setpriv --reuid={UNPRIVILEGED} --regid={UNPRIVILEGED} --clear-groups")
    } else {
        String::new()
    };
    let script = format!(
        "trap '' INT TERM HUP
         cd '{folder}'
         {user} '{bin}/initdb' -D data -U postgres -A trust -E UTF8 --locale=C.UTF-8 --no-sync >initdb.log 2>&1
         {user} '{bin}/postgres' -D data -c listen_addresses= -c unix_socket_directories='{folder}' \\
             -c max_connections=300 -c fsync=off >postgres.log 2>&1 &
         cat >/dev/null
         kill -INT $!
         wait
         cd / && rm -rf '{folder}'",
        folder = folder.display(),
        bin = postgres_bin().display(),
    );
    Command::new("sh").arg("-c").arg(script).stdin(Stdio::piped()).spawn().unwrap()
}

async fn wait_until_ready(admin: &PgConnectOptions) -> PgConnection {
    let start = Instant::now();
    loop {
        match admin.connect().await {
            Ok(connection) => return connection,
            Err(error) if start.elapsed() > START_TIMEOUT => panic!("Postgres does not start: {error}"),
            Err(_) => tokio::time::sleep(Duration::from_millis(20)).await,
        }
    }
}

fn url(options: &PgConnectOptions) -> SecretString {
    options.to_url_lossy().to_string().into()
}

impl TestDatabase {
    /// A new, migrated database.
    pub async fn create() -> Self {
        let server = SERVER.get_or_init(TestServer::start).await;
        let database = Self::create_from(server.template.unwrap_or("template1")).await;
        if server.template.is_none() {
            let catalog = PgCatalog::connect(&database.url(), 1).await.unwrap();
            catalog.migrate().await.unwrap();
            catalog.close().await;
        }
        database
    }

    /// A new database without any tables.
    pub async fn create_empty() -> Self {
        Self::create_from("template1").await
    }

    async fn create_from(template: &str) -> Self {
        let server = SERVER.get_or_init(TestServer::start).await;
        let number = DATABASES.fetch_add(1, Ordering::Relaxed);
        let name = format!("darkroom_test_{}_{number}", std::process::id());
        let mut connection = server.admin.connect().await.unwrap();
        sqlx::query(&format!("CREATE DATABASE {name} TEMPLATE {template}"))
            .execute(&mut connection)
            .await
            .unwrap();
        connection.close().await.unwrap();
        let drop_with = server.template.is_none().then(|| server.admin.clone());
        Self { options: server.admin.clone().database(&name), drop_with }
    }

    pub fn url(&self) -> SecretString {
        url(&self.options)
    }

    /// Connections for the test itself, called [`TEST_ITSELF`].
    pub async fn pool(&self) -> PgPool {
        let options = self.options.clone().application_name(TEST_ITSELF);
        PgPoolOptions::new().max_connections(40).connect_with(options).await.unwrap()
    }
}

impl Drop for TestDatabase {
    fn drop(&mut self) {
        let Some(admin) = self.drop_with.take() else { return };
        let name = self.options.get_database().unwrap_or_default().to_owned();
        // The test's own runtime cannot be waited on from here.
        let dropped = std::thread::spawn(move || {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
            runtime.block_on(async {
                let mut connection = admin.connect().await.unwrap();
                sqlx::query(&format!("DROP DATABASE {name} WITH (FORCE)"))
                    .execute(&mut connection)
                    .await
                    .unwrap();
            });
        });
        let _ = dropped.join(); // A database left behind on somebody's server is not worth failing a test for.
    }
}
