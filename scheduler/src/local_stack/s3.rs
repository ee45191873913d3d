//! The local S3 server, inside this process: signatures are checked, pictures are plain files below the data folder.
//!
//! `s3s-fs` takes `If-None-Match: *` but lets several of simultaneous PUTs win; the fleet does not rely on it, because
//! keys are content-addressed and a row decides which object counts.
use std::fs;
use std::path::Path;

use anyhow::{Context, Result};
use hyper_util::rt::{TokioExecutor, TokioIo};
use hyper_util::server::conn::auto::Builder;
use s3s::auth::SimpleAuth;
use s3s::service::{S3Service, S3ServiceBuilder};
use s3s_fs::FileSystem;
use secrecy::ExposeSecret;
use tokio::net::TcpListener;
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use tracing::{debug, warn};

use super::credentials::{Credentials, NAME};

/// A running S3 server.
#[derive(Debug)]
pub struct S3Server {
    task: JoinHandle<()>,
    shutdown: CancellationToken,
}

impl S3Server {
    /// Serves `folder` on 127.0.0.1:`port`, with the bucket `darkroom` in it.
    pub async fn start(folder: &Path, port: u16, credentials: &Credentials) -> Result<Self> {
        let bucket = folder.join(NAME);
        fs::create_dir_all(&bucket)
            .with_context(|| format!("cannot create the bucket {}", bucket.display()))?;
        let file_system = FileSystem::new(folder)
            .map_err(|error| anyhow::anyhow!("cannot serve {} as S3: {error:?}", folder.display()))?;
        let mut service = S3ServiceBuilder::new(file_system);
        service.set_auth(SimpleAuth::from_single(
            credentials.s3_access_key_id.as_str(),
            credentials.s3_secret_access_key.expose_secret(),
        ));
        let listener = TcpListener::bind(("127.0.0.1", port))
            .await
            .with_context(|| format!("cannot listen on 127.0.0.1:{port} for S3"))?;
        let shutdown = CancellationToken::new();
        let task = tokio::spawn(serve(listener, service.build(), shutdown.clone()));
        debug!(server = "s3", "Started the S3 server on port {port}");
        Ok(Self { task, shutdown })
    }

    /// Waits until the server ends by itself, which it should not.
    pub async fn exited(&mut self) {
        if let Err(error) = (&mut self.task).await {
            warn!(error = format!("{error:#}"), "The S3 server failed");
        }
    }

    /// Takes no new connection, lets the open ones finish their request, and ends.
    pub async fn stop(self) -> Result<()> {
        self.shutdown.cancel();
        self.task.await.context("the S3 server failed")
    }
}

async fn serve(listener: TcpListener, service: S3Service, shutdown: CancellationToken) {
    let connections = TaskTracker::new();
    loop {
        let accepted = tokio::select! {
            accepted = listener.accept() => accepted,
            () = shutdown.cancelled() => break,
        };
        let stream = match accepted {
            Ok((stream, _)) => stream,
            // Out of file descriptors, most likely: others will close theirs.
            Err(error) => {
                warn!(error = format!("{error:#}"), "The S3 server cannot accept a connection");
                tokio::task::yield_now().await;
                continue;
            }
        };
        let (service, shutdown) = (service.clone(), shutdown.clone());
        connections.spawn(async move {
            let builder = Builder::new(TokioExecutor::new());
            let mut connection = std::pin::pin!(builder.serve_connection(TokioIo::new(stream), service));
            let ended = tokio::select! {
                ended = connection.as_mut() => ended,
                () = shutdown.cancelled() => {
                    connection.as_mut().graceful_shutdown();
                    connection.await
                }
            };
            if let Err(error) = ended {
                debug!(%error, "An S3 connection ended badly");
            }
        });
    }
    connections.close();
    connections.wait().await;
}
