//! Who runs the servers, and how they die with us.
//!
//! PostgreSQL refuses to run as root, and RabbitMQ has no reason to: when `darkroom` is root, both run as `nobody`
//! (uid 65534), otherwise as the user itself. Every child is started through `setpriv`, which drops the user first and
//! sets the parent-death signal after (the kernel clears that signal when the user changes, so the order matters).
use std::ffi::OsStr;
use std::fs;
use std::os::unix::fs::{MetadataExt, PermissionsExt, chown};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use nix::sys::signal::Signal;
use nix::unistd::geteuid;
use tokio::process::Command;

/// `nobody` and `nogroup` on Debian, the highest 16-bit id but one on every Linux.
const NOBODY: u32 = 65_534;

/// Child processes get this search path and nothing else of ours, so that a user's `RABBITMQ_*` or `PG*` settings,
/// meant for another server, do not reach the local one.
const SEARCH_PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

/// The user that PostgreSQL and RabbitMQ run as.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ServerUser {
    /// The user who started `darkroom`.
    Myself,
    /// uid 65534, because the user is root.
    Nobody,
}

impl ServerUser {
    /// `Nobody` for root, else `Myself`.
    pub fn choose() -> Self {
        if geteuid().is_root() { Self::Nobody } else { Self::Myself }
    }

    /// A command that runs `program` as this user, in a process group of its own (so that a Ctrl-C at the terminal
    /// reaches us alone and we stop the children in order), with an almost empty environment, and that gets
    /// `death_signal` should this process die without a word.
    ///
    /// The kernel ties that signal to the *thread* that forks: spawn from the main thread.
    pub fn command(self, program: impl AsRef<OsStr>, death_signal: Signal) -> Command {
        let mut command = self.command_in_our_environment(program, death_signal);
        command.env_clear().env("PATH", SEARCH_PATH).env("LANG", "C.UTF-8").env("LC_ALL", "C.UTF-8");
        command
    }

    /// Like [`command`](Self::command), but with our whole environment: for programs of our own.
    pub fn command_in_our_environment(self, program: impl AsRef<OsStr>, death_signal: Signal) -> Command {
        let mut command = Command::new("setpriv");
        if self == Self::Nobody {
            command.arg(format!("--reuid={NOBODY}")).arg(format!("--regid={NOBODY}")).arg("--clear-groups");
        }
        let name = death_signal.as_str().trim_start_matches("SIG");
        command.arg(format!("--pdeathsig={name}")).arg("--").arg(program);
        command.process_group(0).kill_on_drop(true);
        command
    }

    /// Creates `folder`, private to this user.
    pub fn create_private_folder(self, folder: &Path) -> Result<()> {
        fs::create_dir_all(folder)
            .with_context(|| format!("cannot create the folder {}", folder.display()))?;
        self.own(folder, 0o700)
    }

    /// Writes `text` to `path`, readable by this user alone. The mode is set before the text is written.
    pub fn write_private_file(self, path: &Path, text: &str, mode: u32) -> Result<()> {
        let context = || format!("cannot write {}", path.display());
        let folder = path.parent().unwrap_or(Path::new("."));
        let file = tempfile::NamedTempFile::new_in(folder).with_context(context)?;
        fs::write(file.path(), text).with_context(context)?;
        self.own(file.path(), mode)?;
        file.persist(path).with_context(context)?;
        Ok(())
    }

    /// Gives `path` to this user with `mode`.
    fn own(self, path: &Path, mode: u32) -> Result<()> {
        let context = || format!("cannot set owner and mode of {}", path.display());
        if self == Self::Nobody {
            chown(path, Some(NOBODY), Some(NOBODY)).with_context(context)?;
        }
        fs::set_permissions(path, fs::Permissions::from_mode(mode)).with_context(context)
    }

    /// The first folder on the way to `folder` that this user may not enter, with its mode; `None` if all is open.
    /// Folders that do not exist yet will be created by us and are no obstacle.
    pub fn obstacle_to(self, folder: &Path) -> Option<(PathBuf, u32)> {
        if self == Self::Myself {
            return None;
        }
        let mut ancestors: Vec<&Path> = folder.ancestors().collect();
        ancestors.reverse();
        ancestors.into_iter().find_map(|ancestor| {
            let metadata = fs::metadata(ancestor).ok()?;
            let mode = metadata.mode() & 0o7777;
            let may_enter = mode & 0o001 != 0 || (metadata.uid() == NOBODY && mode & 0o100 != 0);
            (!may_enter).then(|| (ancestor.to_owned(), mode))
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_closed_folder_on_the_way_is_named() {
        let folder = tempfile::tempdir().unwrap();
        let closed = folder.path().join("closed");
        fs::create_dir(&closed).unwrap();
        for path in [closed.as_path(), folder.path()] {
            fs::set_permissions(path, fs::Permissions::from_mode(0o700)).unwrap();
        }
        let obstacle = ServerUser::Nobody.obstacle_to(&closed.join("data/below"));
        // Of several obstacles the outermost is the one to report.
        assert_eq!(obstacle, Some((folder.path().to_owned(), 0o700)));
        fs::set_permissions(folder.path(), fs::Permissions::from_mode(0o711)).unwrap();
        assert_eq!(ServerUser::Nobody.obstacle_to(&closed.join("data")), Some((closed.clone(), 0o700)));
        fs::set_permissions(&closed, fs::Permissions::from_mode(0o711)).unwrap();
        assert_eq!(ServerUser::Nobody.obstacle_to(&closed.join("data")), None);
        assert_eq!(ServerUser::Myself.obstacle_to(&closed), None);
    }

    #[test]
    fn the_command_drops_the_user_before_it_sets_the_death_signal() {
        let command = ServerUser::Nobody.command("/bin/true", Signal::SIGINT);
        let arguments: Vec<_> =
            command.as_std().get_args().map(|argument| argument.to_string_lossy()).collect();
        assert_eq!(
            arguments,
            ["--reuid=65534", "--regid=65534", "--clear-groups", "--pdeathsig=INT", "--", "/bin/true"]
        );
        let command = ServerUser::Myself.command("/bin/true", Signal::SIGTERM);
        assert_eq!(command.as_std().get_args().next().unwrap(), "--pdeathsig=TERM");
    }
}
