//! The one folder below which everything of the local stack lies: server data, pictures, logs, passwords.
//!
//! All commands agree on where it is by the same rule ([`locate`]), so that `darkroom submit` finds what
//! `darkroom up` started without being told.
use std::fs::{self, File};
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use anyhow::{Context, Result, bail};
use nix::fcntl::{Flock, FlockArg};
use nix::unistd::geteuid;
use sha2::{Digest, Sha256};

use super::server_user::ServerUser;

/// The default's name in the current folder.
const DEFAULT_NAME: &str = ".darkroom";

/// Where the default moves to if the servers' user cannot enter the current folder: unlike /tmp, it outlives a reboot.
const FALLBACK_PARENT: &str = "/var/tmp";

/// A data folder that this process has to itself, until the last clone is dropped.
#[derive(Clone, Debug)]
pub struct DataDir {
    root: PathBuf,
    /// Who runs PostgreSQL and RabbitMQ below it.
    pub server_user: ServerUser,
    /// Held while the stack runs; the kernel lets go of it when the process ends, however it ends.
    _lock: Arc<Flock<File>>,
}

/// Where the data folder is: `configured`, or `.darkroom` in the current folder. When root stands in a folder that
/// uid 65534 cannot enter, such as one below /root, the default is a folder in /var/tmp named after the current one.
///
/// # Errors
/// If the current folder cannot be read.
pub fn locate(configured: Option<&Path>) -> Result<PathBuf> {
    let here = std::env::current_dir().context("cannot tell the current folder")?;
    Ok(match configured {
        Some(path) => here.join(path),
        None if ServerUser::choose().obstacle_to(&here).is_none() => here.join(DEFAULT_NAME),
        None => fallback_for(&here),
    })
}

/// If the default moved away from the current folder, leaves a link to `root` where it would have been, so that
/// `.darkroom/env` is there for people and scripts in either case.
pub fn link_from_here(root: &Path) {
    let Ok(here) = std::env::current_dir() else { return };
    if root == fallback_for(&here) {
        // The commands do without it, so it does not matter if something else has the name.
        let _ = std::os::unix::fs::symlink(root, here.join(DEFAULT_NAME));
    }
}

/// The environment file in the data folder `root`.
pub fn env_file(root: &Path) -> PathBuf {
    root.join("env")
}

/// The process id file in the data folder `root`.
pub fn pid_file(root: &Path) -> PathBuf {
    root.join("up.json")
}

fn fallback_for(here: &Path) -> PathBuf {
    let digest = Sha256::digest(here.as_os_str().as_encoded_bytes());
    Path::new(FALLBACK_PARENT).join(format!("darkroom-{}", hex::encode(&digest[..4])))
}

impl DataDir {
    /// Creates the folder if it is missing, checks that it is ours and that the servers' user can reach it, and
    /// locks it.
    ///
    /// # Errors
    /// If the folder belongs to somebody else, cannot be entered, or another `darkroom up` uses it.
    pub fn open(root: &Path) -> Result<Self> {
        let server_user = ServerUser::choose();
        fs::create_dir_all(root)
            .with_context(|| format!("cannot create the data folder {}", root.display()))?;
        // A link too, because in a folder like /var/tmp anybody may have made it.
        let owners = [fs::symlink_metadata(root)?.uid(), fs::metadata(root)?.uid()];
        let root = root.canonicalize().with_context(|| format!("cannot resolve {}", root.display()))?;
        if let Some(owner) = owners.into_iter().find(|&owner| owner != geteuid().as_raw()) {
            bail!(
                "the data folder {} belongs to uid {}, but this is uid {}\nhint: choose another by --data-dir",
                root.display(),
                owner,
                geteuid()
            );
        }
        // Root's servers run as another user, who has to pass through but needs to list nothing.
        let mode = if server_user == ServerUser::Nobody { 0o711 } else { 0o700 };
        fs::set_permissions(&root, fs::Permissions::from_mode(mode))
            .with_context(|| format!("cannot set the mode of {}", root.display()))?;
        if let Some((obstacle, mode)) = server_user.obstacle_to(&root) {
            bail!(
                "the data folder {} cannot be reached by uid 65534, who runs PostgreSQL and RabbitMQ when you are root: \
                 {} has mode {mode:04o}\nhint: choose a folder that everyone may enter, such as --data-dir {}",
                root.display(),
                obstacle.display(),
                fallback_for(&root).display()
            );
        }
        let lock =
            File::create(root.join("lock")).context("cannot create the lock file in the data folder")?;
        let lock = Flock::lock(lock, FlockArg::LockExclusiveNonblock).map_err(|(_, error)| {
            anyhow::anyhow!(
                "another `darkroom up` uses the data folder {} ({error})\n\
                 hint: stop it with `darkroom down`, or choose another folder by --data-dir",
                root.display()
            )
        })?;
        let data_dir = Self { root, server_user, _lock: Arc::new(lock) };
        ServerUser::Myself.create_private_folder(&data_dir.objects())?;
        ServerUser::Myself.create_private_folder(&data_dir.logs())?;
        server_user.create_private_folder(&data_dir.postgres())?;
        server_user.create_private_folder(&data_dir.rabbitmq())?;
        Ok(data_dir)
    }

    /// The folder itself, absolute.
    pub fn root(&self) -> &Path {
        &self.root
    }

    /// PostgreSQL's folder.
    pub fn postgres(&self) -> PathBuf {
        self.root.join("postgres")
    }

    /// RabbitMQ's folder.
    pub fn rabbitmq(&self) -> PathBuf {
        self.root.join("rabbitmq")
    }

    /// The S3 server's folder: one folder a bucket, one plain file an object.
    pub fn objects(&self) -> PathBuf {
        self.root.join("s3")
    }

    /// What servers and workers print.
    pub fn logs(&self) -> PathBuf {
        self.root.join("log")
    }

    /// The passwords, mode 0600.
    pub fn credentials(&self) -> PathBuf {
        self.root.join("credentials.json")
    }

    /// The remembered ports.
    pub fn ports(&self) -> PathBuf {
        self.root.join("ports.json")
    }

    /// The child processes that run now, or ran when we were killed.
    pub fn children(&self) -> PathBuf {
        self.root.join("children.json")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn open_folder() -> tempfile::TempDir {
        let folder = tempfile::tempdir().unwrap();
        fs::set_permissions(folder.path(), fs::Permissions::from_mode(0o711)).unwrap();
        folder
    }

    #[test]
    fn one_data_folder_serves_one_stack() {
        let folder = open_folder();
        let root = folder.path().join("data");
        let first = DataDir::open(&root).unwrap();
        let error = DataDir::open(&root).unwrap_err().to_string();
        assert!(error.contains("another `darkroom up` uses the data folder"), "{error}");
        assert!(error.contains("hint: stop it with `darkroom down`"), "{error}");
        drop(first);
        DataDir::open(&root).unwrap();
    }

    #[test]
    fn a_folder_of_somebody_else_is_refused() {
        let folder = open_folder();
        let link = folder.path().join("link");
        std::os::unix::fs::symlink(folder.path().join("data"), &link).unwrap();
        fs::create_dir(folder.path().join("data")).unwrap();
        DataDir::open(&link).unwrap();
        if geteuid().is_root() {
            std::os::unix::fs::lchown(&link, Some(65_534), None).unwrap();
            let error = DataDir::open(&link).unwrap_err().to_string();
            assert!(error.contains("belongs to uid 65534, but this is uid 0"), "{error}");
        }
    }

    #[test]
    fn the_fallback_depends_on_the_current_folder_alone() {
        assert_eq!(fallback_for(Path::new("/root/a")), fallback_for(Path::new("/root/a")));
        assert_ne!(fallback_for(Path::new("/root/a")), fallback_for(Path::new("/root/b")));
        assert!(fallback_for(Path::new("/root/a")).starts_with(FALLBACK_PARENT));
    }
}
