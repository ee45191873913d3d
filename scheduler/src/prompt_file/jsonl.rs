//! JSON lines: one object a line; blank lines are skipped.
use schema::{JobSpec, SpecField};
use serde_json::{Map, Value};

use super::text::numbered;
use super::{PromptFile, Trouble, field_name};

pub(super) fn read(bytes: &[u8]) -> PromptFile {
    let mut file = PromptFile::default();
    for (line, bytes) in numbered(bytes) {
        if bytes.trim_ascii().is_empty() {
            continue;
        }
        let (spec, troubles) = match object(bytes) {
            Ok(object) => fields(&object),
            Err(trouble) => (JobSpec::default(), vec![trouble]),
        };
        file.push(line, spec, troubles);
    }
    file
}

fn object(bytes: &[u8]) -> Result<Map<String, Value>, Trouble> {
    let text = std::str::from_utf8(bytes).map_err(|error| Trouble::not_utf8("the line", bytes, error))?;
    match serde_json::from_str(text) {
        Ok(Value::Object(object)) => Ok(object),
        Ok(other) => Err(Trouble::NotAnObject { reason: format!("it is {}", kind(&other)) }),
        Err(error) => {
            // Its line is always 1, since it saw only this one.
            let reason = error.to_string().replace(" at line 1 column ", " at column ");
            Err(Trouble::NotAnObject { reason: format!("reading it fails: {reason}") })
        }
    }
}

/// What the object says as far as it can be read, and what cannot.
fn fields(object: &Map<String, Value>) -> (JobSpec, Vec<Trouble>) {
    let mut spec = JobSpec::default();
    let mut troubles = Vec::new();
    let mut seen: Vec<SpecField> = Vec::new();
    for (name, value) in object {
        match field_name::field(name) {
            None => troubles.push(Trouble::UnknownField { name: name.clone() }),
            Some(field) if seen.contains(&field) => {
                troubles.push(Trouble::RepeatedField { field: field.as_str(), name: name.clone() });
            }
            Some(field) => {
                seen.push(field);
                troubles.extend(spec.set_json(field, value).err().map(Trouble::Value));
            }
        }
    }
    (spec, troubles)
}

fn kind(value: &Value) -> &'static str {
    match value {
        Value::Null => "null",
        Value::Bool(_) => "true or false",
        Value::Number(_) => "a number",
        Value::String(_) => "a text",
        Value::Array(_) => "an array",
        Value::Object(_) => "an object",
    }
}

#[cfg(test)]
mod tests {
    use super::super::PromptLine;
    use super::*;

    #[test]
    fn objects_become_specs() {
        let file =
            read(b"{\"prompt\":\"a\",\"seed\":4294967295,\"cfg\":7,\"steps\":null}\r\n\n{\"text\":\"b\",\"guidance_start\":0,\"guidance_stop\":0.7,\"cache_interval\":3}\n");
        assert_eq!(file.faults, []);
        assert_eq!(file.lines[0].spec.seed, Some(4_294_967_295));
        assert_eq!(file.lines[0].spec.guidance_scale, Some(7.0));
        assert_eq!(
            file.lines[1],
            PromptLine {
                line: 3,
                spec: JobSpec {
                    prompt: "b".into(),
                    guidance_start: Some(0.0),
                    guidance_stop: Some(0.7),
                    cache_interval: Some(3),
                    ..JobSpec::default()
                }
            }
        );
    }

    #[test]
    fn every_fault_is_told() {
        let text = concat!(
            "{\"prompt\":\"a\",\"seed\":\"7\",\"width\":512.5}\n",
            "[1,2]\n",
            "{\"prompt\":\"a\" \"seed\":1}\n",
            "{\"prompt\":\"a\",\"text\":\"b\"}\n",
            "{\"prompt\":\"a\",\"model\":\"x\",\"Seeed\":1}\n",
            "{\"prompt\":{\"a\":1},\"guidance_scale\":1e400}\n",
        );
        let faults: Vec<_> = read(text.as_bytes()).faults.iter().map(ToString::to_string).collect();
        insta::assert_snapshot!(faults.join("\n"), @r#"
        1: `seed` has to be a whole number from 0 to 4294967295 (the noise generator keeps 32 bits), but is "7"
        1: `width` has to be a multiple of 8, from 64 to 2048, but is 512.5
        2: a line has to be one JSON object, but it is an array
        3: a line has to be one JSON object, but reading it fails: expected `,` or `}` at column 15
        4: the field `prompt` comes twice, the second time as "text"
        5: no job has a field "Seeed"; did you mean `seed`?
        5: no job has a field "model"; the fields are prompt, negative_prompt, seed, num_inference_steps, guidance_scale, width, height, scheduler, guidance_start, guidance_stop, cache_interval, client_ref
        6: a line has to be one JSON object, but reading it fails: number out of range at column 40
        "#);
    }
}
