//! Checks a model's folder against its row before anything is drawn with it.

use std::fs::File;
use std::io::{self, Read};
use std::path::{Path, PathBuf};

use schema::{Model, ModelComponent, Sha256Digest};
use sha2::{Digest, Sha256};

/// Why a folder does not hold the registered model.
#[derive(Debug, thiserror::Error)]
pub enum ModelFilesError {
    /// A registered file cannot be read.
    #[error("the model's file {} cannot be read", path.display())]
    Unreadable {
        /// The file.
        path: PathBuf,
        /// Why not.
        source: io::Error,
    },
    /// A file is not the registered one.
    #[error(
        "the model's file {} is not the registered one: it should have SHA-256 {registered} and {registered_bytes} bytes, \
         but has {found} and {found_bytes}\nhint: register changed weights under another name with `darkroom models add`",
        path.display()
    )]
    OtherFile {
        /// The file.
        path: PathBuf,
        /// Its digest in the model's row.
        registered: Sha256Digest,
        /// Its size in the model's row.
        registered_bytes: u64,
        /// Its digest.
        found: Sha256Digest,
        /// Its size.
        found_bytes: u64,
    },
}

/// Reads every registered file of the model in `folder` and compares it with the row. With all files equal, so is the row's
/// `weights_sha256`, which is a digest over their digests. Takes as long as the disk does.
pub fn verify(model: &Model, folder: &Path) -> Result<(), ModelFilesError> {
    model.components.iter().try_for_each(|component| verify_file(component, &folder.join(&component.path)))
}

fn verify_file(component: &ModelComponent, path: &Path) -> Result<(), ModelFilesError> {
    let unreadable = |source| ModelFilesError::Unreadable { path: path.to_owned(), source };
    let (found, found_bytes) = File::open(path).and_then(digest).map_err(unreadable)?;
    if (found, found_bytes) == (component.sha256, component.size_bytes) {
        return Ok(());
    }
    Err(ModelFilesError::OtherFile {
        path: path.to_owned(),
        registered: component.sha256,
        registered_bytes: component.size_bytes,
        found,
        found_bytes,
    })
}

fn digest(mut file: File) -> io::Result<(Sha256Digest, u64)> {
    let mut hasher = Sha256::new();
    let mut buffer = vec![0; 1 << 20];
    let mut size_bytes = 0;
    loop {
        match file.read(&mut buffer)? {
            0 => break,
            read => {
                hasher.update(&buffer[..read]);
                size_bytes += read as u64;
            }
        }
    }
    let digest: [u8; 32] = hasher.finalize().into();
    Ok((digest.into(), size_bytes))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn component(path: &str, bytes: &[u8]) -> ModelComponent {
        ModelComponent {
            path: path.to_owned(),
            sha256: Sha256Digest::of(bytes),
            size_bytes: bytes.len() as u64,
        }
    }

    #[test]
    fn the_registered_bytes_pass_and_others_are_named() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("unet.safetensors");
        std::fs::write(&path, b"weights").unwrap();
        assert!(verify_file(&component("unet.safetensors", b"weights"), &path).is_ok());
        let error = verify_file(&component("unet.safetensors", b"other weights"), &path).unwrap_err();
        assert!(error.to_string().contains("unet.safetensors is not the registered one"), "{error}");
        let error = verify_file(&component("vae.safetensors", b""), &folder.path().join("vae.safetensors"))
            .unwrap_err();
        assert!(matches!(error, ModelFilesError::Unreadable { .. }));
    }
}
