//! The servers one by one, asked for what a picture needs of them and nothing else.

use std::sync::Arc;
use std::time::{Duration, Instant};

use aws_sdk_s3::primitives::ByteStream;
use futures::StreamExt;
use futures::future::join_all;
use futures::stream::{self, FuturesUnordered};
use lapin::options::{
    BasicAckOptions, BasicConsumeOptions, BasicPublishOptions, BasicQosOptions, ConfirmSelectOptions,
    QueueDeclareOptions,
};
use lapin::types::{AMQPValue, FieldTable};
use lapin::{BasicProperties, Connection, ConnectionProperties};
use schema::{
    BatchId, CompletedJob, JobId, JobMessage, Lease, MicrobatchId, MicrobatchKey, Model, ModelName,
    NewWorker, NoiseScheduler, ObjectKey, PgCatalog, PriorityBand, QueueArgument, Recipe, Sha256Digest,
    StageTimings, StoredObject, WorkerId, job_queue,
};

use crate::cpu;
use crate::fleet::Fleet;

/// Messages whose confirms are awaited together, as the relay does.
const CHUNK: usize = 1_000;
/// Objects under way at once for one worker, as its completer allows.
pub const PUTS_OF_A_WORKER: usize = 16;
/// Far longer than any lease here is needed.
const LEASE: Duration = Duration::from_secs(600);

/// How much, and how it is cut.
#[derive(Debug, Clone, Copy)]
pub struct Size {
    /// Pictures.
    pub jobs: u32,
    /// Worker processes.
    pub workers: u32,
    /// The most pictures in a microbatch.
    pub microbatch: u32,
}

/// Pictures a second of `jobs` since `started`.
fn rate(jobs: usize, started: Instant) -> f64 {
    jobs as f64 / started.elapsed().as_secs_f64()
}

/// The batch's jobs, in order.
pub async fn job_ids(fleet: &Fleet, batch_id: &str) -> Vec<JobId> {
    let jobs: i64 = fleet.count(&format!("SELECT count(*) FROM jobs WHERE batch_id = '{batch_id}'")).await;
    let batch_id: BatchId = batch_id.parse().expect("a batch's id");
    (0..jobs as u32).map(|ordinal| JobId::of(batch_id, ordinal)).collect()
}

/// Publishes one message a job to an own quorum queue with confirms, then consumes and acknowledges them as `size.workers`
/// workers: messages a second for each.
pub async fn broker(fleet: &Fleet, job_ids: &[JobId], size: Size) -> (f64, f64) {
    let url = &fleet.servers().addresses().amqp_url;
    let connect = || Connection::connect(url, ConnectionProperties::default());
    let connection = connect().await.expect("the broker answers");
    let channel = connection.create_channel().await.expect("a channel");
    channel.confirm_select(ConfirmSelectOptions::default()).await.expect("confirms");
    let model: ModelName = format!("bench-{}", uuid::Uuid::new_v4().simple()).parse().expect("a slug");
    let declaration = job_queue(&model, PriorityBand::Normal);
    let queue = declaration.name.as_str();
    let mut arguments = FieldTable::default();
    for (name, value) in &declaration.arguments {
        let value = match *value {
            QueueArgument::Text(text) => AMQPValue::LongString(text.into()),
            QueueArgument::Integer(number) => AMQPValue::LongLongInt(number),
        };
        arguments.insert((*name).into(), value);
    }
    let durable = QueueDeclareOptions::durable();
    channel.queue_declare(queue.into(), durable, arguments).await.expect("a queue");

    let microbatch_key = MicrobatchKey {
        width: 64,
        height: 64,
        num_inference_steps: 2,
        noise_scheduler: NoiseScheduler::Pndm,
        classifier_free_guidance: true,
        recipe: Recipe::EXACT,
    };
    let message = |job_id| JobMessage { job_id, microbatch_key, microbatch_limit: None }.encode();
    let bodies: Vec<Vec<u8>> = job_ids.iter().map(|job_id| message(*job_id)).collect();
    let started = Instant::now();
    for chunk in bodies.chunks(CHUNK) {
        let mut confirms = Vec::with_capacity(chunk.len());
        for body in chunk {
            let options = BasicPublishOptions { mandatory: true, ..BasicPublishOptions::default() };
            let properties =
                BasicProperties::default().with_delivery_mode(2).with_content_type("application/json".into());
            let sent = channel.basic_publish("".into(), queue.into(), options, body, properties).await;
            confirms.push(sent.expect("a message is sent"));
        }
        for confirm in join_all(confirms).await {
            confirm.expect("a message is confirmed");
        }
    }
    let published = rate(job_ids.len(), started);

    // As the worker's.
    let prefetch = schema::prefetch(u16::try_from(size.microbatch).expect("a small number"));
    let mut consumers = Vec::new();
    for _ in 0..size.workers {
        let connection = connect().await.expect("the broker answers");
        let channel = connection.create_channel().await.expect("a channel");
        channel.basic_qos(prefetch, BasicQosOptions::default()).await.expect("a prefetch");
        consumers.push((connection, channel));
    }
    let started = Instant::now();
    let mut deliveries = Vec::new();
    for (_, channel) in &consumers {
        let options = BasicConsumeOptions::default();
        let consumer = channel.basic_consume(queue.into(), "".into(), options, FieldTable::default()).await;
        deliveries.push(consumer.expect("a consumer"));
    }
    let mut deliveries = stream::select_all(deliveries);
    for _ in job_ids {
        let delivery = deliveries.next().await.expect("a delivery").expect("a good one");
        delivery.acker.ack(BasicAckOptions::default()).await.expect("an ack is sent");
    }
    let consumed = rate(job_ids.len(), started);
    for (connection, _) in consumers {
        connection.close(200, "OK".into()).await.expect("a good end");
    }
    connection.close(200, "OK".into()).await.expect("a good end");
    (published, consumed)
}

/// Puts `bytes` under one key a job, with the request that the worker sends and as many at once: objects a second.
pub async fn puts(fleet: &Fleet, job_ids: &[JobId], bytes: &[u8], size: Size) -> f64 {
    use base64::Engine as _;
    let s3 = fleet.s3().await;
    let bucket = &fleet.servers().addresses().s3_bucket;
    let (digest, batch_id) = (Sha256Digest::of(bytes), BatchId::generate());
    let put = |ordinal: usize| {
        let key = ObjectKey::new(batch_id, ordinal as u32, &digest).to_string();
        // As the worker does for each picture.
        let checksum = base64::engine::general_purpose::STANDARD.encode(Sha256Digest::of(bytes).as_bytes());
        let request = s3.put_object().bucket(bucket).key(key).content_type("image/png");
        let request = request.checksum_sha256(checksum).if_none_match("*");
        let request = request.body(ByteStream::from(bytes.to_vec()));
        tokio::spawn(async move { request.send().await.map(drop) })
    };
    let at_once = PUTS_OF_A_WORKER * size.workers as usize;
    let started = Instant::now();
    let mut puts = stream::iter(0..job_ids.len()).map(put).buffer_unordered(at_once);
    while let Some(stored) = puts.next().await {
        stored.expect("no panic").expect("an object is stored");
    }
    rate(job_ids.len(), started)
}

/// How often leases are looked at to see what one time costs.
const LOOKS: u32 = 400;

/// Holds the jobs' leases and looks at them as a worker does each second: Postgres' milliseconds of processor time a look.
pub async fn leases(fleet: &Fleet, job_ids: &[JobId]) -> f64 {
    let (catalog, model) = connect(fleet, 1).await;
    let worker_id = register(&catalog, &model).await;
    // As long as a worker's, so that a look extends no more often.
    let lease = Duration::from_secs(60);
    let claimed = catalog.claim_if_available(job_ids, worker_id, MicrobatchId::generate(), lease).await;
    let leases: Vec<Lease> = claimed.expect("jobs are claimed").iter().map(|job| job.lease).collect();
    let postgres = fleet.servers().postgres_pid().expect("Postgres runs").as_raw() as u32;
    let before = cpu::tree_seconds(postgres);
    for _ in 0..LOOKS {
        let held = catalog.extend_leases_if_held(&leases, worker_id, lease).await.expect("an answer");
        assert_eq!(held.len(), leases.len(), "all are held");
    }
    let used = cpu::tree_seconds(postgres) - before;
    catalog.close().await;
    used * 1e3 / f64::from(LOOKS)
}

async fn connect(fleet: &Fleet, connections: u32) -> (PgCatalog, Model) {
    let url = fleet.database_url().to_owned().into();
    let catalog = PgCatalog::connect(&url, connections).await.expect("Postgres answers");
    let name: ModelName = fleet.model().parse().expect("a slug");
    let model = catalog.model_by_name(&name).await.expect("an answer").expect("the model is registered");
    (catalog, model)
}

async fn register(catalog: &PgCatalog, model: &Model) -> WorkerId {
    let worker_id = WorkerId::generate();
    let worker = NewWorker {
        worker_id,
        name: "bench".to_owned(),
        host: "bench".to_owned(),
        model_id: model.model_id,
        pipeline: "solid-color".to_owned(),
        device: "cpu".to_owned(),
        dtype: "f32".to_owned(),
        version: "0".to_owned(),
        lease_seconds: 120,
        max_microbatch: 8,
    };
    catalog.register_worker(&worker).await.expect("a worker is registered");
    worker_id
}

/// Claims and completes the jobs with the worker's two statements, a microbatch at a time and a microbatch of each worker at
/// once: pictures a second.
pub async fn claim_and_complete(fleet: &Fleet, job_ids: &[JobId], size: Size) -> f64 {
    let (catalog, model) = connect(fleet, 2 * size.workers).await;
    let mut workers = Vec::new();
    for _ in 0..size.workers {
        workers.push(register(&catalog, &model).await);
    }
    let mut microbatches = job_ids.chunks(size.microbatch as usize).zip(workers.iter().cycle());
    let work = |(job_ids, worker_id): (&[JobId], &WorkerId)| {
        let (job_ids, worker_id, catalog) = (job_ids.to_vec(), *worker_id, catalog.clone());
        tokio::spawn(async move {
            let claimed =
                catalog.claim_if_available(&job_ids, worker_id, MicrobatchId::generate(), LEASE).await;
            let claimed = claimed.expect("jobs are claimed");
            assert_eq!(claimed.len(), job_ids.len(), "all are available");
            let drawn: Vec<CompletedJob> = claimed
                .iter()
                .map(|job| completed(job.lease, job.batch_id, job.ordinal, worker_id, model.weights_sha256))
                .collect();
            let recorded = catalog.complete_if_leased(&drawn).await.expect("pictures are recorded");
            assert!(recorded.iter().all(Result::is_ok), "every lease is held");
        })
    };
    let started = Instant::now();
    let mut under_way: FuturesUnordered<_> =
        microbatches.by_ref().take(2 * size.workers as usize).map(work).collect();
    while let Some(ended) = under_way.next().await {
        ended.expect("no panic");
        under_way.extend(microbatches.next().map(work));
    }
    let rate = rate(job_ids.len(), started);
    catalog.close().await;
    rate
}

fn completed(
    lease: Lease,
    batch_id: BatchId,
    ordinal: u32,
    worker_id: WorkerId,
    weights_sha256: Sha256Digest,
) -> CompletedJob {
    let sha256 = Sha256Digest::of(lease.job_id.to_string().as_bytes());
    let object_key = ObjectKey::new(batch_id, ordinal, &sha256);
    CompletedJob {
        lease,
        worker_id,
        object: Some(StoredObject { bucket: "pictures".to_owned(), object_key, sha256, size_bytes: 1_000 }),
        safety: None,
        prompt_truncated: false,
        weights_sha256,
        device: "cpu".to_owned(),
        dtype: "f32".to_owned(),
        noise_dtype: "f32".to_owned(),
        recipe: Recipe::EXACT,
        engine: None,
        timings: StageTimings { encode_ms: 0.1, upload_ms: 1.0, ..StageTimings::default() },
    }
}

/// Writes the batch's image rows once more into a table without triggers and foreign keys, `size.microbatch` rows a commit:
/// rows a second. What Postgres could do if it checked nothing.
pub async fn bare_rows(fleet: &Fleet, batch_id: &str, size: Size) -> f64 {
    let pool = fleet.pool();
    let table = format!("bare_{}", uuid::Uuid::new_v4().simple());
    let create = format!("CREATE TABLE {table} (LIKE images INCLUDING INDEXES)");
    sqlx::query(&create).execute(pool).await.expect("a table is made");
    let ids = "SELECT image_id FROM images WHERE batch_id = $1::uuid ORDER BY image_id";
    let ids: Vec<uuid::Uuid> =
        sqlx::query_scalar(ids).bind(batch_id).fetch_all(pool).await.expect("the rows");
    let insert = Arc::new(format!("INSERT INTO {table} SELECT * FROM images WHERE image_id = ANY ($1)"));
    let started = Instant::now();
    let write = |ids: &[uuid::Uuid]| {
        let (insert, ids) = (insert.clone(), ids.to_vec());
        async move { sqlx::query(&insert).bind(ids).execute(pool).await.map(drop) }
    };
    let mut writes = stream::iter(ids.chunks(size.microbatch as usize).map(write)).buffer_unordered(4);
    while let Some(written) = writes.next().await {
        written.expect("rows are written");
    }
    rate(ids.len(), started)
}
