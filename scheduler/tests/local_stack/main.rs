//! The program `darkroom` against the real servers that it starts itself: RabbitMQ, PostgreSQL and S3 from their
//! packages, in a folder of the test's own.
#![allow(clippy::unwrap_used, reason = "clippy.toml allows it in test functions; this is for their helpers")]
mod harness;

use std::time::Duration;

use aws_sdk_s3::Client;
use aws_sdk_s3::config::{BehaviorVersion, Credentials, Region};
use aws_sdk_s3::primitives::ByteStream;
use harness::{Folder, Up, eventually};
use nix::sys::signal::Signal;
use scheduler::amqp::{self, AmqpQueue};
use scheduler::local_stack::server_process::ProcessIdentity;
use scheduler::queue::{OutgoingMessage, PublishOutcome, Queue};
use schema::{PgCatalog, PriorityBand, job_queue};
use serde_json::Value;

fn s3(stack: &Value, secret: &str) -> Client {
    let text = |name: &str| stack[name].as_str().unwrap().to_owned();
    let config = aws_sdk_s3::Config::builder()
        .behavior_version(BehaviorVersion::latest())
        .endpoint_url(text("aws_endpoint_url"))
        .region(Region::new(text("aws_region")))
        .credentials_provider(Credentials::new(text("aws_access_key_id"), secret, None, None, "test"))
        .force_path_style(true)
        .build();
    Client::from_conf(config)
}

fn message(body: &str) -> OutgoingMessage {
    OutgoingMessage { body: body.as_bytes().to_vec(), traceparent: Some("00-0-0-00".to_owned()) }
}

/// One long test, because starting the servers is most of its time.
#[tokio::test]
async fn servers_answer_and_keep_their_data_over_restarts_and_crashes() {
    let folder = Folder::new();
    let up = Up::start(&folder, &["--servers-only", "--stop-with-stdin"]);
    let stack = up.description.clone();
    let text = |name: &str| stack[name].as_str().unwrap().to_owned();

    // PostgreSQL asks for the password.
    let catalog = PgCatalog::connect(&text("database_url").into(), 2).await.unwrap();
    catalog.migrate().await.unwrap();
    let wrong = text("database_url").replacen("postgres://darkroom:", "postgres://darkroom:not", 1);
    assert!(PgCatalog::connect(&wrong.into(), 1).await.is_err());
    catalog.close().await;

    // S3 checks signatures, and an object is a plain file.
    let client = s3(&stack, &text("aws_secret_access_key"));
    let put =
        client.put_object().bucket("darkroom").key("v1/a/b.png").body(ByteStream::from_static(b"pixels"));
    put.send().await.unwrap();
    let file = folder.data_dir().join("s3/darkroom/v1/a/b.png");
    assert_eq!(std::fs::read(&file).unwrap(), b"pixels");
    let stranger = s3(&stack, "wrong").get_object().bucket("darkroom").key("v1/a/b.png").send().await;
    assert!(stranger.is_err(), "a wrong secret key must be refused");

    // RabbitMQ: confirmed, counted, returned when there is no queue.
    let queue = AmqpQueue::start(&text("amqp_url").into()).unwrap();
    queue.connected().await;
    let declaration = job_queue(&"demo".parse().unwrap(), PriorityBand::Normal);
    assert_eq!(queue.ready_count(&declaration.name).await.unwrap(), None);
    let returned = queue.publish(&declaration.name, &[message("lost")]).await.unwrap();
    assert_eq!(returned, [PublishOutcome::Returned]);
    queue.declare(&declaration).await.unwrap();
    queue.declare(&declaration).await.unwrap();
    let messages: Vec<_> = (0..500).map(|number| message(&number.to_string())).collect();
    let outcomes = queue.publish(&declaration.name, &messages).await.unwrap();
    assert_eq!(outcomes, vec![PublishOutcome::Confirmed; 500]);
    eventually("the queue holds 500 messages", async || {
        queue.ready_count(&declaration.name).await.unwrap() == Some(500)
    })
    .await;
    assert!(
        !amqp::answers(&text("amqp_url").replacen("amqp://darkroom:", "amqp://darkroom:not", 1).into()).await
    );

    // A broker that stops or dies is started again, and our connection finds back to it by itself. It stops in order
    // first: RabbitMQ 3.10 writes down only half a second later that a new queue exists, and a broker killed before
    // that forgets the queue's messages, confirmed or not.
    for signal in [Signal::SIGTERM, Signal::SIGKILL] {
        let rabbitmq = folder.child("rabbitmq");
        rabbitmq.signal(signal).unwrap();
        assert!(rabbitmq.gone_within(Duration::from_secs(60)).await);
        eventually("the broker is back with its messages", async || {
            matches!(queue.ready_count(&declaration.name).await, Ok(Some(500)))
        })
        .await;
    }
    let outcomes = queue.publish(&declaration.name, &[message("after")]).await.unwrap();
    assert_eq!(outcomes, [PublishOutcome::Confirmed]);
    queue.close().await;

    // Closing standard input stops everything.
    let children = folder.children();
    assert_eq!(children.len(), 3, "{children:?}");
    up.stop_by_stdin().await;
    assert!(children.iter().all(|child| !child.runs()), "a child outlived a good stop");
    assert!(!folder.data_dir().join("env").exists(), "a stack that is gone must not be found");

    // The next run has the same ports, passwords and data. This one is killed.
    let up = Up::start(&folder, &["--servers-only"]);
    for name in ["database_url", "amqp_url", "aws_endpoint_url", "aws_secret_access_key"] {
        assert_eq!(up.description[name], stack[name], "{name}");
    }
    let queue = AmqpQueue::start(&text("amqp_url").into()).unwrap();
    queue.connected().await;
    assert_eq!(queue.ready_count(&declaration.name).await.unwrap(), Some(501));
    queue.close().await;
    let catalog = PgCatalog::connect(&text("database_url").into(), 1).await.unwrap();
    assert!(catalog.migration_status().await.unwrap().is_current());
    catalog.close().await;
    let children = folder.children();
    up.kill().await;
    for child in &children {
        assert!(child.gone_within(Duration::from_secs(60)).await, "{child:?} outlived a killed `up`");
    }
    let unanswered = folder.run(&["batches"]);
    assert_eq!(unanswered.code, 1);
    assert!(unanswered.stderr.contains("hint: start it again with `darkroom up`"), "{}", unanswered.stderr);

    // And the one after it starts all the same, and stops at SIGTERM.
    let up = Up::start(&folder, &["--servers-only", "--stop-with-stdin"]);
    let children = folder.children();
    up.stop_by_signal().await;
    assert!(children.iter().all(|child| !child.runs()), "a child outlived a good stop");
}

/// The commands of one batch's life, as far as it goes without a worker.
#[tokio::test]
async fn a_batch_is_submitted_published_and_cancelled() {
    let folder = Folder::new();
    let up = Up::start(&folder, &["--json", "--workers", "0", "--republish-after", "1"]);
    let model = folder.write_model();
    let licence = folder.write("LICENCE", "Demo licence\n\nBe kind.\n");
    let prompts = folder.write("prompts.csv", "prompt,seed\na cat,1\na dog,\n\"a bird, flying\",3\n");
    let (model, licence, prompts) =
        (model.to_str().unwrap(), licence.to_str().unwrap(), prompts.to_str().unwrap());

    let added = folder.run(&["models", "add", "demo", model, "--licence", licence, "--json"]).success_json();
    assert_eq!((&added["was_known"], &added["licence_name"]), (&false.into(), &"Demo licence".into()));
    let again = folder.run(&["models", "add", "demo", model, "--licence", licence, "--json"]).success_json();
    assert_eq!(again["was_known"], true);
    assert_eq!(folder.run(&["models", "list", "--json"]).success_json()[0]["default_width"], 128);

    // Faults: all of them, nothing written, exit code 2.
    let faulty = folder.write("faulty.csv", "prompt,width\na,500\n,64\nb,wide\n");
    let refused = folder.run(&["submit", faulty.to_str().unwrap(), "--principal", "ann"]);
    assert_eq!(refused.code, 2);
    assert_eq!(
        refused.stderr.lines().filter(|line| line.contains("faulty.csv:")).count(),
        3,
        "{}",
        refused.stderr
    );
    assert!(refused.stderr.contains("faulty.csv:2: `width` has to be"), "{}", refused.stderr);

    // The licence rule.
    let submit = ["submit", prompts, "--principal", "ann", "--idempotency-key", "k1", "--json"];
    let refused = folder.run(&submit);
    assert_eq!(refused.code, 1);
    assert!(refused.stderr.contains("darkroom licence accept demo --principal ann"), "{}", refused.stderr);
    let shown = folder.run(&["licence", "show", "demo", "--json"]).success_json();
    let digest = shown["text_sha256"].as_str().unwrap();
    assert_eq!(
        folder.run(&["licence", "accept", "demo", "--principal", "ann", "--yes", "000000000000"]).code,
        2
    );
    let no_answer = folder.run(&["licence", "accept", "demo", "--principal", "ann"]);
    assert_eq!(no_answer.code, 1);
    assert!(no_answer.stderr.contains("Be kind."), "{}", no_answer.stderr);
    folder.run(&["licence", "accept", "demo", "--principal", "ann", "--yes", digest]).success();

    // A second scheduler does no harm.
    let mut second = folder.command(&["serve"]).spawn().unwrap();

    // One key, one batch.
    assert_eq!(folder.run(&[&submit[..], &["--dry-run"]].concat()).success_json()["job_count"], 3);
    assert_eq!(folder.run(&["batches", "--json"]).success_json(), serde_json::json!([]));
    let submitted = folder.run(&submit).success_json();
    assert_eq!((&submitted["job_count"], &submitted["replayed"]), (&3.into(), &false.into()));
    let replayed = folder.run(&submit).success_json();
    assert_eq!((&replayed["batch_id"], &replayed["replayed"]), (&submitted["batch_id"], &true.into()));
    assert_eq!(folder.run(&[&submit[..], &["--num-images-per-prompt", "2"]].concat()).code, 1);

    // The relay publishes it without being asked.
    let text = |name: &str| up.description[name].as_str().unwrap().to_owned();
    let queue = AmqpQueue::start(&text("amqp_url").into()).unwrap();
    queue.connected().await;
    let declaration = job_queue(&"demo".parse().unwrap(), PriorityBand::Normal);
    eventually("the relay has published 3 jobs", async || {
        queue.ready_count(&declaration.name).await.unwrap() == Some(3)
    })
    .await;
    let second_id = ProcessIdentity::of(i32::try_from(second.id()).unwrap()).unwrap();
    second_id.signal(Signal::SIGTERM).unwrap();
    assert!(second.wait().unwrap().success());
    assert_eq!(queue.ready_count(&declaration.name).await.unwrap(), Some(3), "each job was published once");

    // And again after the broker has lost everything.
    folder.delete_queue(&text("amqp_url"), &declaration.name).await;
    eventually("the republisher has noticed", async || {
        matches!(queue.ready_count(&declaration.name).await, Ok(Some(3)))
    })
    .await;
    queue.close().await;

    // By name, by id, by its beginning, as the latest; unfinished, cancelled, fetched.
    let id = submitted["batch_id"].as_str().unwrap();
    for name in ["prompts", id, &id[..18], "latest"] {
        assert_eq!(folder.run(&["status", name, "--json"]).success_json()["available"], 3, "{name}");
    }
    assert_eq!(folder.run(&["status", "nonesuch"]).code, 1);
    assert_eq!(folder.run(&["cancel", "latest", "--job", "0", "--json"]).success_json()["cancelled"], 1);
    assert_eq!(folder.run(&["cancel", "latest", "--job", "9"]).code, 1);
    let overview = folder.run(&["status", "--json"]).success_json();
    assert_eq!(overview["unfinished_batches"][0]["final_count"], 1);
    assert_eq!(folder.run(&["cancel", "latest", "--json"]).success_json()["cancelled"], 2);
    let watched = folder.run(&["watch", "latest", "--json"]).success_json();
    assert_eq!(watched["cancelled"], 3);
    let (output, sheet) = (folder.path().join("pictures"), folder.path().join("sheet.png"));
    let (output, sheet) = (output.to_str().unwrap(), sheet.to_str().unwrap());
    let fetched = folder
        .run(&["fetch", "latest", "--output", output, "--contact-sheet", sheet, "--json"])
        .success_json();
    assert_eq!(fetched["report"]["without_picture"], 3);
    assert!(image::open(sheet).unwrap().width() > 500);

    // `down` stops it.
    assert_eq!(folder.run(&["down", "--json"]).success_json()["stopped"], true);
    up.ended().await;
    let refused = folder.run(&["batches"]);
    assert_eq!(refused.code, 1);
    assert!(refused.stderr.contains("hint: start one with `darkroom up`"), "{}", refused.stderr);
}
