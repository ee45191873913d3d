//! Where the time of each microbatch goes, as a file that Perfetto and `chrome://tracing` open. Off unless asked for.
//!
//! The format is Chrome's trace events, a JSON array of one object a line. What the engine's threads and the claimer do, one
//! thing after the other, are lines of their own, so that one sees what overlaps; everything else hangs below its microbatch, because several are
//! under way at once. Spans name microbatches and stages and how many pictures they hold: no prompts, no seeds, no jobs.
//!
//! Stages only send: one thread of its own writes, so nobody waits for a disk. A process that is killed leaves an array without
//! its closing bracket, which both viewers read.

use std::fs::File;
use std::io::{self, BufWriter, Write};
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError, mpsc};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use schema::MicrobatchId;
use serde::Serialize;

use crate::pipeline::StageTimes;

/// What a microbatch, or one of its pictures, goes through, in order.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Stage {
    /// From its oldest message's arrival until it is formed.
    Consume,
    /// Claiming its jobs.
    Claim,
    /// From its claim until the engine's thread takes it.
    WaitForEngine,
    /// In the engine's first thread: everything, or all up to the last denoising step where a second finishes.
    Generate,
    /// Of that, embedding the prompts.
    Text,
    /// Of that, the denoising steps.
    Denoise,
    /// From its last denoising step until the engine's second thread takes it.
    WaitForDecoder,
    /// In the engine's second thread: what is left.
    Finish,
    /// Latents to pixels, of whichever of the two does it.
    Decode,
    /// The safety checker, likewise.
    Safety,
    /// One picture to PNG.
    Encode,
    /// One object to the bucket.
    Put,
    /// The transaction that records its pictures.
    Complete,
    /// Settling its messages.
    Ack,
}

/// On whose line a stage is drawn.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Line {
    Engine,
    Decoder,
    Claimer,
    Microbatch,
}

impl Stage {
    /// As the viewers show it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Consume => "consume",
            Self::Claim => "claim",
            Self::WaitForEngine => "wait for engine",
            Self::Generate => "generate",
            Self::Text => "text",
            Self::Denoise => "denoise",
            Self::WaitForDecoder => "wait for decoder",
            Self::Finish => "finish",
            Self::Decode => "decode",
            Self::Safety => "safety",
            Self::Encode => "encode",
            Self::Put => "put",
            Self::Complete => "complete",
            Self::Ack => "ack",
        }
    }

    fn line(self) -> Line {
        match self {
            Self::Generate | Self::Text | Self::Denoise | Self::Decode | Self::Safety => Line::Engine,
            Self::Finish => Line::Decoder,
            Self::Claim => Line::Claimer,
            _ => Line::Microbatch,
        }
    }
}

/// One stage of one microbatch, or of one picture of it.
#[derive(Debug, Clone, Copy)]
pub struct Span {
    /// Which stage.
    pub stage: Stage,
    /// Of which microbatch.
    pub microbatch_id: MicrobatchId,
    /// Of which of its pictures, if of one alone.
    pub picture: Option<usize>,
    /// How many pictures it holds.
    pub pictures: usize,
    /// When it began.
    pub from: Instant,
    /// When it ended.
    pub to: Instant,
}

/// Takes spans; clones write to the same file. Without a file it does nothing.
#[derive(Debug, Clone, Default)]
pub struct Trace(Option<Arc<Open>>);

#[derive(Debug)]
struct Open {
    spans: mpsc::Sender<Message>,
    /// Taken by whoever closes the file.
    writer: Mutex<Option<JoinHandle<io::Result<()>>>>,
}

#[derive(Debug)]
enum Message {
    Span(Span, Line),
    End,
}

impl Trace {
    /// Writes to a new file at `path`, times counted from now.
    ///
    /// # Errors
    /// If it cannot be made, or no thread can be started.
    pub fn to_file(path: &Path) -> io::Result<Self> {
        let (spans, received) = mpsc::channel();
        let (file, origin) = (BufWriter::new(File::create(path)?), Instant::now());
        let writer = std::thread::Builder::new().name("trace".to_owned());
        let writer = writer.spawn(move || write(file, origin, &received))?;
        Ok(Self(Some(Arc::new(Open { spans, writer: Mutex::new(Some(writer)) }))))
    }

    /// Notes a span.
    pub fn span(&self, span: Span) {
        self.span_on(span, span.stage.line());
    }

    fn span_on(&self, span: Span, line: Line) {
        if let Some(open) = &self.0 {
            // The writer is gone when the disk is full; `close` tells.
            let _ = open.spans.send(Message::Span(span, line));
        }
    }

    /// Notes what one call of the engine, or a half of it, was made of. Its stages are laid end to end from its start, by the
    /// lengths that the pipeline measured.
    pub fn generated(&self, call: Span, times: StageTimes) {
        if self.0.is_none() {
            return;
        }
        self.span(call);
        let stages = [
            (Stage::Text, times.text_encoder),
            (Stage::Denoise, times.denoise),
            (Stage::Decode, times.vae),
            (Stage::Safety, times.safety),
        ];
        let mut from = call.from;
        for (stage, duration) in stages.into_iter().filter(|(_, duration)| *duration > Duration::ZERO) {
            self.span_on(Span { stage, from, to: from + duration, ..call }, call.stage.line());
            from += duration;
        }
    }

    /// Ends the file. What is noted later is dropped.
    ///
    /// # Errors
    /// If it could not be written, at any time.
    pub fn close(&self) -> io::Result<()> {
        let Some(open) = &self.0 else { return Ok(()) };
        // A writer that is gone already says why below.
        let _ = open.spans.send(Message::End);
        let writer = open.writer.lock().unwrap_or_else(PoisonError::into_inner).take();
        writer.map_or(Ok(()), |writer| {
            writer.join().unwrap_or_else(|_| Err(io::Error::other("the trace's writer died")))
        })
    }
}

/// One trace event; see "Trace Event Format" in Chromium's documentation.
#[derive(Serialize)]
struct Event<'a> {
    name: &'a str,
    cat: &'a str,
    ph: &'a str,
    /// Microseconds since the trace began.
    ts: f64,
    #[serde(skip_serializing_if = "Option::is_none")]
    dur: Option<f64>,
    pid: u32,
    tid: u32,
    /// What belongs together among events of phases `b` and `e`.
    #[serde(skip_serializing_if = "Option::is_none")]
    id: Option<&'a str>,
    args: Arguments<'a>,
}

#[derive(Serialize)]
struct Arguments<'a> {
    #[serde(skip_serializing_if = "Option::is_none")]
    name: Option<&'a str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    microbatch: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pictures: Option<usize>,
}

const ENGINE_TID: u32 = 1;
const DECODER_TID: u32 = 2;
const CLAIMER_TID: u32 = 3;
const MICROBATCHES_TID: u32 = 4;

fn write(mut file: BufWriter<File>, origin: Instant, spans: &mpsc::Receiver<Message>) -> io::Result<()> {
    let pid = std::process::id();
    let names = [
        ("process_name", 0, "darkroom-worker"),
        ("thread_name", ENGINE_TID, "engine"),
        ("thread_name", DECODER_TID, "decoder"),
        ("thread_name", CLAIMER_TID, "claimer"),
        ("thread_name", MICROBATCHES_TID, "microbatches"),
    ];
    let mut separator = "[\n";
    for (kind, tid, name) in names {
        let args = Arguments { name: Some(name), microbatch: None, pictures: None };
        let named = Event { name: kind, cat: "", ph: "M", ts: 0.0, dur: None, pid, tid, id: None, args };
        line(&mut file, &mut separator, &named)?;
    }
    while let Ok(Message::Span(span, line_of)) = spans.recv() {
        let ts = microseconds(span.from.saturating_duration_since(origin));
        let dur = microseconds(span.to.saturating_duration_since(span.from));
        let args = || Arguments {
            name: None,
            microbatch: Some(span.microbatch_id.to_string()),
            pictures: Some(span.pictures),
        };
        let name = span.stage.name();
        let event =
            |ph, tid, ts, dur, id| Event { name, cat: "darkroom", ph, ts, dur, pid, tid, id, args: args() };
        let mut whole = |tid| line(&mut file, &mut separator, &event("X", tid, ts, Some(dur), None));
        match line_of {
            Line::Engine => whole(ENGINE_TID)?,
            Line::Decoder => whole(DECODER_TID)?,
            Line::Claimer => whole(CLAIMER_TID)?,
            Line::Microbatch => {
                let id = match span.picture {
                    Some(picture) => format!("{}/{picture}", span.microbatch_id),
                    None => span.microbatch_id.to_string(),
                };
                let id = Some(id.as_str());
                line(&mut file, &mut separator, &event("b", MICROBATCHES_TID, ts, None, id))?;
                line(&mut file, &mut separator, &event("e", MICROBATCHES_TID, ts + dur, None, id))?;
            }
        }
    }
    file.write_all(b"\n]\n")?;
    file.flush()
}

fn line(file: &mut impl Write, separator: &mut &'static str, event: &Event<'_>) -> io::Result<()> {
    file.write_all(separator.as_bytes())?;
    *separator = ",\n";
    serde_json::to_writer(file, event).map_err(io::Error::from)
}

fn microseconds(duration: Duration) -> f64 {
    duration.as_secs_f64() * 1e6
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::Value;

    #[test]
    fn a_closed_trace_is_json_with_a_span_for_each_stage_it_was_told_of() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("trace.json");
        let trace = Trace::to_file(&path).unwrap();
        let (from, microbatch_id) = (Instant::now(), MicrobatchId::generate());
        let ms = Duration::from_millis;
        let call = Span {
            stage: Stage::Generate,
            microbatch_id,
            picture: None,
            pictures: 2,
            from,
            to: from + ms(10),
        };
        trace.generated(call, StageTimes { denoise: ms(6), vae: ms(3), ..StageTimes::default() });
        trace.span(Span { stage: Stage::Put, picture: Some(1), ..call });
        trace.close().unwrap();
        trace.span(call);
        let events: Vec<Value> = serde_json::from_slice(&std::fs::read(&path).unwrap()).unwrap();
        let spans: Vec<&Value> = events.iter().filter(|event| event["ph"] != "M").collect();
        let names: Vec<&str> = spans.iter().map(|event| event["name"].as_str().unwrap()).collect();
        assert_eq!(
            names,
            ["generate", "denoise", "decode", "put", "put"],
            "stages that took no time are left out"
        );
        assert_eq!(spans[0]["args"]["microbatch"], microbatch_id.to_string());
        let end = |span: &Value| span["ts"].as_f64().unwrap() + span["dur"].as_f64().unwrap();
        assert!((end(spans[1]) - spans[2]["ts"].as_f64().unwrap()).abs() < 1e-3, "stages follow one another");
        assert!(end(spans[2]) <= end(spans[0]), "and lie within their call");
        assert_eq!((&spans[3]["ph"], &spans[4]["ph"]), (&Value::from("b"), &Value::from("e")));
        assert_eq!(spans[3]["id"], spans[4]["id"]);
    }

    #[test]
    fn what_the_second_thread_does_has_a_line_of_its_own() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("trace.json");
        let trace = Trace::to_file(&path).unwrap();
        let (from, microbatch_id) = (Instant::now(), MicrobatchId::generate());
        let to = from + Duration::from_millis(5);
        let span = |stage| Span { stage, microbatch_id, picture: None, pictures: 1, from, to };
        let (denoise, vae) = (Duration::from_millis(4), Duration::from_millis(3));
        trace.generated(span(Stage::Generate), StageTimes { denoise, ..StageTimes::default() });
        trace.generated(span(Stage::Finish), StageTimes { vae, ..StageTimes::default() });
        trace.close().unwrap();
        let events: Vec<Value> = serde_json::from_slice(&std::fs::read(&path).unwrap()).unwrap();
        let line_of = |name: &str| events.iter().find(|event| event["name"] == name).unwrap()["tid"].clone();
        assert_eq!((line_of("generate"), line_of("finish")), (ENGINE_TID.into(), DECODER_TID.into()));
        assert_eq!((line_of("denoise"), line_of("decode")), (ENGINE_TID.into(), DECODER_TID.into()));
    }

    #[test]
    fn without_a_file_nothing_happens() {
        Trace::default().close().unwrap();
    }
}
