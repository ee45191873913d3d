//! JSON lines: one object a line; blank lines are skipped.
use schema::{JobSpec, SpecField};
use serde_json::Value;

use super::text::numbered;
use super::{InputFault, PromptFile, PromptLine, Trouble, field_name};

pub(super) fn read(bytes: &[u8]) -> PromptFile {
    let mut file = PromptFile::default();
    for (line, bytes) in numbered(bytes) {
        if bytes.trim_ascii().is_empty() {
            continue;
        }
        match object(bytes) {
            Ok(spec) => file.lines.push(PromptLine { line, spec }),
            Err(troubles) => file.faults.extend(troubles.into_iter().map(|trouble| InputFault { line, trouble })),
        }
    }
    file
}

fn object(bytes: &[u8]) -> Result<JobSpec, Vec<Trouble>> {
    let text = std::str::from_utf8(bytes).map_err(|error| vec![Trouble::not_utf8(bytes, error)])?;
    let object = match serde_json::from_str(text) {
        Ok(Value::Object(object)) => object,
        Ok(other) => return Err(vec![Trouble::NotAnObject { reason: format!("it is {}", kind(&other)) }]),
        Err(error) => {
            // Its line is always 1, since it saw only this one.
            let reason = error.to_string().replace(" at line 1 column ", " at column ");
            return Err(vec![Trouble::NotAnObject { reason }]);
        }
    };
    let mut spec = JobSpec::default();
    let mut troubles = Vec::new();
    let mut seen: Vec<SpecField> = Vec::new();
    for (name, value) in &object {
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
    if troubles.is_empty() { Ok(spec) } else { Err(troubles) }
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
    use super::*;

    #[test]
    fn objects_become_specs() {
        let file = read(b"{\"prompt\":\"a\",\"seed\":4294967295,\"cfg\":7,\"steps\":null}\r\n\n{\"text\":\"b\"}\n");
        assert_eq!(file.faults, []);
        assert_eq!(file.lines[0].spec.seed, Some(4_294_967_295));
        assert_eq!(file.lines[0].spec.guidance_scale, Some(7.0));
        assert_eq!(file.lines[1], PromptLine { line: 3, spec: JobSpec { prompt: "b".into(), ..JobSpec::default() } });
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
        insta::assert_snapshot!(faults.join("\n"), @"");
    }
}
