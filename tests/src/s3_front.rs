//! An HTTP front before the S3 server that answers, delays and mangles as bad days of an object store do.
//!
//! Headers pass unchanged, the signed `Host` among them, so the server behind it checks the client's own signature.

use std::convert::Infallible;
use std::net::{Ipv4Addr, SocketAddr};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use anyhow::{Result, bail};
use bytes::Bytes;
use http_body_util::combinators::BoxBody;
use http_body_util::{BodyExt, Full, StreamBody};
use hyper::body::{Frame, Incoming};
use hyper::{Method, Request, Response};
use hyper_util::rt::TokioIo;
use tokio::net::{TcpListener, TcpStream};
use tokio::task::JoinHandle;

use crate::link::{Wall, authority};

type Body = BoxBody<Bytes, std::io::Error>;

/// What is done to a request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum S3Fault {
    /// Answered with this status; the server never sees it.
    Status(u16),
    /// Whatever would write is answered as MinIO answers when its disks are full.
    StorageFull,
    /// Answered so much later.
    Delay(Duration),
    /// The server gets half of the body, then the connection ends.
    Truncate,
    /// The server gets the body with one byte changed.
    Corrupt,
    /// The server does it, and the answer is lost.
    LoseAnswer,
}

impl S3Fault {
    /// Whether a request of this kind can meet it at all.
    fn meets(self, method: &Method) -> bool {
        self != Self::StorageFull || matches!(*method, Method::PUT | Method::POST)
    }
}

/// A running front.
pub struct S3Front {
    address: SocketAddr,
    shared: Arc<Shared>,
    accepting: JoinHandle<()>,
}

struct Shared {
    upstream: SocketAddr,
    /// The fault, and how many of a hundred requests it strikes.
    fault: Mutex<Option<(S3Fault, u64)>>,
    requests: AtomicU64,
    injected: AtomicU64,
}

impl S3Front {
    /// A front before the S3 server at `url` that passes everything on.
    pub async fn start(url: &str) -> S3Front {
        let (_, upstream) = authority(url);
        let upstream = upstream.parse().unwrap_or_else(|_| panic!("{upstream}: HOST:PORT"));
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await.expect("a free port");
        let address = listener.local_addr().expect("a bound port");
        let (requests, injected) = (AtomicU64::new(0), AtomicU64::new(0));
        let shared = Arc::new(Shared { upstream, fault: Mutex::default(), requests, injected });
        let accepting = tokio::spawn(accept(listener, shared.clone()));
        S3Front { address, shared, accepting }
    }

    /// The variable and its value that send a process this way.
    pub fn env(&self) -> (&'static str, String) {
        (Wall::S3.variable(), self.url())
    }

    /// Where it answers.
    pub fn url(&self) -> String {
        format!("http://{}", self.address)
    }

    /// From now on `percent` of a hundred requests meet `fault`, evenly spread.
    pub fn set(&self, fault: S3Fault, percent: u64) {
        *self.shared.fault.lock().expect("nothing panics under this lock") = Some((fault, percent));
    }

    /// Passes everything on again.
    pub fn heal(&self) {
        *self.shared.fault.lock().expect("nothing panics under this lock") = None;
    }

    /// How many requests have met a fault, ever.
    pub fn injected(&self) -> u64 {
        self.shared.injected.load(Ordering::Relaxed)
    }
}

impl Drop for S3Front {
    fn drop(&mut self) {
        self.accepting.abort();
    }
}

impl Shared {
    /// The fault that this request meets, if any.
    fn draw(&self, method: &Method) -> Option<S3Fault> {
        let fault = *self.fault.lock().expect("nothing panics under this lock");
        if fault.is_some_and(|(fault, _)| !fault.meets(method)) {
            return None;
        }
        let number = self.requests.fetch_add(1, Ordering::Relaxed);
        let (fault, percent) = fault?;
        // 37 has no factor in common with 100, so any hundred requests in a row meet it exactly `percent` times.
        let struck = number.wrapping_mul(37) % 100 < percent;
        struck.then(|| {
            self.injected.fetch_add(1, Ordering::Relaxed);
            fault
        })
    }
}

async fn accept(listener: TcpListener, shared: Arc<Shared>) {
    loop {
        // An accept that fails was the client's doing.
        let Ok((stream, _)) = listener.accept().await else { continue };
        let shared = shared.clone();
        tokio::spawn(async move {
            let service = hyper::service::service_fn(|request| answer(request, &shared));
            let server = hyper::server::conn::http1::Builder::new();
            // A connection that ends badly is often what was asked for.
            let _ = server.serve_connection(TokioIo::new(stream), service).await;
        });
    }
}

/// Answers one request; an error ends the connection without an answer.
async fn answer(request: Request<Incoming>, shared: &Shared) -> Result<Response<Body>> {
    let fault = shared.draw(request.method());
    let (head, body) = request.into_parts();
    let body = body.collect().await?.to_bytes();
    match fault {
        None => forward(Request::from_parts(head, whole(body)), shared).await,
        Some(S3Fault::Status(status)) => {
            let code = if status == 503 { "SlowDown" } else { "InternalError" };
            let text = format!("<Error><Code>{code}</Code><Message>a test's doing</Message></Error>");
            let text = if head.method == Method::HEAD { String::new() } else { text };
            Ok(Response::builder().status(status).body(whole(text.into()))?)
        }
        Some(S3Fault::StorageFull) => {
            let text = "<Error><Code>XMinioStorageFull</Code><Message>Storage backend has reached its minimum free drive \
                        threshold. Please delete a few objects to proceed.</Message></Error>";
            Ok(Response::builder().status(507).body(whole(text.into()))?)
        }
        Some(S3Fault::Delay(delay)) => {
            tokio::time::sleep(delay).await;
            forward(Request::from_parts(head, whole(body)), shared).await
        }
        Some(S3Fault::Corrupt) => {
            let mut bytes = body.to_vec();
            if let Some(middle) = bytes.len().checked_div(2).filter(|_| !bytes.is_empty()) {
                bytes[middle] ^= 1;
            }
            forward(Request::from_parts(head, whole(bytes.into())), shared).await
        }
        Some(S3Fault::Truncate) => {
            let half = body.slice(..body.len() / 2);
            let broken = std::io::Error::from(std::io::ErrorKind::ConnectionAborted);
            let pieces = futures::stream::iter([Ok(Frame::data(half)), Err(broken)]);
            // Fails, since the body does; the client is to see no answer whatever the server says.
            let _ = forward(Request::from_parts(head, BodyExt::boxed(StreamBody::new(pieces))), shared).await;
            bail!("the upload was broken off")
        }
        Some(S3Fault::LoseAnswer) => {
            // Whatever the server says is lost.
            let _ = forward(Request::from_parts(head, whole(body)), shared).await;
            bail!("the answer was lost")
        }
    }
}

async fn forward(request: Request<Body>, shared: &Shared) -> Result<Response<Body>> {
    let stream = TcpStream::connect(shared.upstream).await?;
    let (mut client, connection) = hyper::client::conn::http1::handshake(TokioIo::new(stream)).await?;
    // Its errors are the request's too.
    let connection = tokio::spawn(connection);
    let answered = async {
        let (head, body) = client.send_request(request).await?.into_parts();
        let body = body.collect().await?.to_bytes();
        anyhow::Ok(Response::from_parts(head, whole(body)))
    };
    let answered = answered.await;
    connection.abort();
    answered
}

fn whole(bytes: Bytes) -> Body {
    Full::new(bytes).map_err(|never: Infallible| match never {}).boxed()
}
