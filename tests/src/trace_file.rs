//! Reads what `darkroom-worker run --trace` wrote.

use std::path::Path;

use serde::Deserialize;

/// One trace event, as far as it matters here.
#[derive(Debug, Deserialize)]
struct Event {
    name: String,
    ph: String,
    ts: f64,
    #[serde(default)]
    dur: f64,
    #[serde(default)]
    id: String,
    args: Arguments,
}

#[derive(Debug, Deserialize)]
struct Arguments {
    #[serde(default)]
    pictures: u32,
}

/// One span, in seconds since the trace began.
#[derive(Debug, Clone, PartialEq)]
pub struct Span {
    /// Its stage.
    pub name: String,
    /// Pictures that it holds.
    pub pictures: u32,
    /// When it began.
    pub from: f64,
    /// When it ended.
    pub to: f64,
}

/// How busy the engine's thread was between its first call and the end of its last.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct EngineShare {
    /// Pictures in all calls.
    pub pictures: u32,
    /// Seconds within calls.
    pub busy: f64,
    /// Seconds from the first call's start to the last one's end.
    pub window: f64,
}

impl EngineShare {
    /// Pictures a second while it draws: what the pipeline does without a fleet around it.
    pub fn bare_rate(&self) -> f64 {
        f64::from(self.pictures) / self.busy
    }

    /// Of the time, how much it drew: the fleet's rate over the bare one.
    pub fn ratio(&self) -> f64 {
        self.busy / self.window
    }
}

/// The spans of a trace file, in the order of their starts. Begin and end events with one name and id are one span.
///
/// # Panics
/// If the file is not such a trace.
pub fn read(path: &Path) -> Vec<Span> {
    let text = std::fs::read_to_string(path).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
    // A worker that was killed could not close the array.
    let text = text.trim_end().trim_end_matches(',');
    let closed = if text.ends_with(']') { text.to_owned() } else { format!("{text}]") };
    let events: Vec<Event> =
        serde_json::from_str(&closed).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
    let mut open = std::collections::HashMap::new();
    let mut spans = Vec::new();
    for Event { name, ph, ts, dur, id, args } in events {
        let (from, to) = match ph.as_str() {
            "X" => (ts, ts + dur),
            "b" => {
                open.insert((name, id), ts);
                continue;
            }
            "e" => match open.remove(&(name.clone(), id)) {
                Some(from) => (from, ts),
                None => continue,
            },
            _ => continue,
        };
        spans.push(Span { name, pictures: args.pictures, from: from / 1e6, to: to / 1e6 });
    }
    spans.sort_by(|a, b| a.from.total_cmp(&b.from));
    spans
}

/// What the engine's thread did.
///
/// # Panics
/// If it did nothing.
pub fn engine_share(spans: &[Span]) -> EngineShare {
    let calls: Vec<&Span> = spans.iter().filter(|span| span.name == "generate").collect();
    let (first, last) = (calls.first().expect("a call"), calls.last().expect("a call"));
    EngineShare {
        pictures: calls.iter().map(|call| call.pictures).sum(),
        busy: calls.iter().map(|call| call.to - call.from).sum(),
        window: last.to - first.from,
    }
}

/// The median of a stage's lengths in seconds; 0 if it does not occur.
pub fn median_of(spans: &[Span], name: &str) -> f64 {
    crate::median(spans.iter().filter(|span| span.name == name).map(|span| span.to - span.from).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_share_is_of_the_time_between_first_and_last_call() {
        let call = |from: f64, to: f64| Span { name: "generate".to_owned(), pictures: 2, from, to };
        let put = Span { name: "put".to_owned(), pictures: 1, from: 0.0, to: 100.0 };
        let share = engine_share(&[put, call(1.0, 2.0), call(2.0, 3.0), call(4.0, 5.0)]);
        assert_eq!(share, EngineShare { pictures: 6, busy: 3.0, window: 4.0 });
        assert!((share.ratio() - 0.75).abs() < 1e-9 && (share.bare_rate() - 2.0).abs() < 1e-9);
    }

    #[test]
    fn a_trace_without_its_end_is_read() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let text = r#"[
{"name":"process_name","ph":"M","ts":0,"args":{"name":"darkroom-worker"}},
{"name":"put","ph":"b","ts":1000000,"id":"m/0","args":{"pictures":1}},
{"name":"put","ph":"b","ts":1000000,"id":"m/1","args":{"pictures":1}},
{"name":"put","ph":"e","ts":3000000,"id":"m/0","args":{"pictures":1}}"#;
        std::fs::write(file.path(), text).unwrap();
        assert_eq!(read(file.path()), [Span { name: "put".to_owned(), pictures: 1, from: 1.0, to: 3.0 }]);
    }
}
