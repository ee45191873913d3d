//! A TCP relay between one process and one server, which can be broken in the ways that networks break.

use std::net::{Ipv4Addr, SocketAddr};
use std::sync::Arc;
use std::sync::atomic::{AtomicI64, AtomicU64, Ordering};
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;
use tokio::task::JoinHandle;

/// No limit on the bytes that a process may send.
const UNLIMITED: i64 = i64::MAX;

/// What the relay does with what comes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Mode {
    /// Passes everything on.
    Pass,
    /// Resets new connections; those that stand go on.
    Refuse,
    /// Takes new connections and all bytes and passes nothing on: a partition, or a peer that is gone without a word.
    /// What was taken arrives when the mode ends, as what TCP sends again does.
    Stall,
    /// Passes requests on and keeps the answers: the server has done it, and the process does not know.
    HoldAnswers,
    /// Passes everything on, so much later.
    Slow(Duration),
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Direction {
    Request,
    Answer,
}

impl Mode {
    fn passes(self, direction: Direction) -> bool {
        match self {
            Self::Pass | Self::Refuse | Self::Slow(_) => true,
            Self::Stall => false,
            Self::HoldAnswers => direction == Direction::Request,
        }
    }
}

/// A relay on a port of its own. Dropping it closes the port; connections that stand end with their peers.
pub struct Proxy {
    address: SocketAddr,
    shared: Arc<Shared>,
    accepting: JoinHandle<()>,
}

struct Shared {
    mode: watch::Sender<Mode>,
    /// Counts the cuts: whoever sees it change resets its connection.
    cuts: watch::Sender<u64>,
    /// Pieces that are held back now.
    held: AtomicU64,
    /// Bytes that may still be sent to the server before everything is cut.
    allowance: AtomicI64,
}

impl Shared {
    /// Waits until `direction` is open, counted as held meanwhile; the mode that opened it.
    async fn await_passing(&self, mode: &mut watch::Receiver<Mode>, direction: Direction) -> Mode {
        let _held = (!mode.borrow().passes(direction)).then(|| Held::new(&self.held));
        // It fails only when the sender is gone, which `self` holds.
        mode.wait_for(|mode| mode.passes(direction)).await.map_or(Mode::Pass, |mode| *mode)
    }
}

/// A piece that is held back; dropping it, also by a cut, ends that.
struct Held<'a>(&'a AtomicU64);

impl<'a> Held<'a> {
    fn new(count: &'a AtomicU64) -> Self {
        count.fetch_add(1, Ordering::Relaxed);
        Self(count)
    }
}

impl Drop for Held<'_> {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

impl Proxy {
    /// A relay to `upstream` that passes everything on.
    pub async fn start(upstream: SocketAddr) -> Proxy {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await.expect("a free port");
        let address = listener.local_addr().expect("a bound port");
        let shared = Arc::new(Shared {
            mode: watch::Sender::new(Mode::Pass),
            cuts: watch::Sender::new(0),
            held: AtomicU64::new(0),
            allowance: AtomicI64::new(UNLIMITED),
        });
        let accepting = tokio::spawn(accept(listener, upstream, shared.clone()));
        Proxy { address, shared, accepting }
    }

    /// Where it listens.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// From now on.
    pub fn set(&self, mode: Mode) {
        self.shared.mode.send_replace(mode);
    }

    /// Resets every connection that stands, as a router that forgot them does.
    pub fn cut(&self) {
        self.shared.cuts.send_modify(|cuts| *cuts += 1);
    }

    /// The server is gone: connections are reset, and new ones too.
    pub fn down(&self) {
        self.set(Mode::Refuse);
        self.cut();
    }

    /// Cuts everything once so many more bytes were sent to the server.
    pub fn cut_after(&self, bytes: u32) {
        self.shared.allowance.store(bytes.into(), Ordering::Relaxed);
    }

    /// Passes everything on again.
    pub fn heal(&self) {
        self.shared.allowance.store(UNLIMITED, Ordering::Relaxed);
        self.set(Mode::Pass);
    }

    /// How many pieces are held back now: above zero, somebody has run into the fault.
    pub fn held(&self) -> u64 {
        self.shared.held.load(Ordering::Relaxed)
    }
}

impl Drop for Proxy {
    fn drop(&mut self) {
        self.accepting.abort();
        self.cut();
    }
}

async fn accept(listener: TcpListener, upstream: SocketAddr, shared: Arc<Shared>) {
    loop {
        // An accept that fails was the client's doing.
        let Ok((client, _)) = listener.accept().await else { continue };
        if *shared.mode.borrow() == Mode::Refuse {
            reset(&client);
            continue;
        }
        tokio::spawn(carry(client, upstream, shared.clone()));
    }
}

/// Carries one connection until both sides are done with it or it is cut.
async fn carry(mut client: TcpStream, upstream: SocketAddr, shared: Arc<Shared>) {
    let mut cuts = shared.cuts.subscribe();
    let connected = async {
        shared.await_passing(&mut shared.mode.subscribe(), Direction::Request).await;
        TcpStream::connect(upstream).await
    };
    let connected = tokio::select! {
        connected = connected => connected,
        _ = cuts.changed() => return reset(&client),
    };
    let Ok(mut server) = connected else { return reset(&client) };
    // An error means that the peer is gone already, which the first read tells too.
    let _ = (client.set_nodelay(true), server.set_nodelay(true));
    let was_cut = {
        let (client_read, client_write) = client.split();
        let (server_read, server_write) = server.split();
        let requests = pump(client_read, server_write, Direction::Request, &shared);
        let answers = pump(server_read, client_write, Direction::Answer, &shared);
        tokio::select! {
            // First, so that what was held back does not slip out when the link is cut and healed at once.
            biased;
            _ = cuts.changed() => true,
            _ = async { tokio::join!(requests, answers) } => false,
        }
    };
    if was_cut {
        reset(&client);
        reset(&server);
    }
}

async fn pump(
    mut from: impl AsyncRead + Unpin,
    mut to: impl AsyncWrite + Unpin,
    direction: Direction,
    shared: &Shared,
) {
    let mut mode = shared.mode.subscribe();
    let mut buffer = vec![0; 64 * 1024];
    loop {
        let length = from.read(&mut buffer).await.unwrap_or(0);
        let now = shared.await_passing(&mut mode, direction).await;
        if let Mode::Slow(delay) = now {
            tokio::time::sleep(delay).await;
        }
        if length == 0 || to.write_all(&buffer[..length]).await.is_err() {
            break;
        }
        let spent = i64::try_from(length).unwrap_or(UNLIMITED);
        if direction == Direction::Request
            && shared.allowance.load(Ordering::Relaxed) != UNLIMITED
            && shared.allowance.fetch_sub(spent, Ordering::Relaxed) <= spent
        {
            shared.cuts.send_modify(|cuts| *cuts += 1);
        }
    }
    // The other side may be gone; it is told if it is not.
    let _ = to.shutdown().await;
}

/// Makes closing `stream` a reset instead of a goodbye.
fn reset(stream: &TcpStream) {
    // Fails only on a socket that is gone already.
    let _ = stream.set_zero_linger();
}
