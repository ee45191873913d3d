//! CSV: the first line names the columns, each further record is one prompt.
use csv::ByteRecord;
use schema::{JobSpec, SpecField};

use super::{InputFault, PromptFile, PromptLine, Trouble, field_name};

pub(super) fn read(bytes: &[u8]) -> PromptFile {
    let mut file = PromptFile::default();
    let mut lines = LineCounter { bytes, counted: 0, line: 1 };
    // `flexible`, so that a line with too many cells is our fault with its number and not the reader's end.
    let mut reader = csv::ReaderBuilder::new().has_headers(false).flexible(true).from_reader(bytes);
    let mut record = ByteRecord::new();
    let mut columns: Option<Vec<Option<SpecField>>> = None;
    // Reading from memory cannot fail, and any record of bytes is well-formed, so an error is the end.
    while reader.read_byte_record(&mut record).unwrap_or(false) {
        let line = lines.line_of(&record);
        let Some(columns) = &columns else {
            match header(&record) {
                Ok(fields) => columns = Some(fields),
                Err(troubles) => {
                    // Without columns no cell means anything, so the rest would only be noise.
                    file.faults.extend(troubles.into_iter().map(|trouble| InputFault { line, trouble }));
                    return file;
                }
            }
            continue;
        };
        match row(columns, &record) {
            Ok(spec) => file.lines.push(PromptLine { line, spec }),
            Err(troubles) => file.faults.extend(troubles.into_iter().map(|trouble| InputFault { line, trouble })),
        }
    }
    file
}

/// The field of each column.
fn header(record: &ByteRecord) -> Result<Vec<Option<SpecField>>, Vec<Trouble>> {
    let mut troubles = Vec::new();
    let mut columns: Vec<Option<SpecField>> = Vec::new();
    for cell in record {
        let name = match std::str::from_utf8(cell) {
            Ok(name) => name,
            Err(error) => {
                troubles.push(Trouble::not_utf8(cell, error));
                continue;
            }
        };
        let field = field_name::field(name);
        match field {
            Some(field) if columns.contains(&Some(field)) => {
                troubles.push(Trouble::RepeatedField { field: field.as_str(), name: name.to_owned() });
            }
            Some(_) => {}
            None => troubles.push(Trouble::UnknownField { name: name.to_owned() }),
        }
        columns.push(field);
    }
    if !columns.contains(&Some(SpecField::Prompt)) {
        let names: Vec<_> = record.iter().map(|cell| format!("{:?}", String::from_utf8_lossy(cell))).collect();
        // First, because it explains the others: most likely there is no header at all.
        troubles.insert(0, Trouble::NoPromptColumn { columns: names.join(", ") });
    }
    if troubles.is_empty() { Ok(columns) } else { Err(troubles) }
}

fn row(columns: &[Option<SpecField>], record: &ByteRecord) -> Result<JobSpec, Vec<Trouble>> {
    if record.len() != columns.len() {
        return Err(vec![Trouble::CellCount { expected: columns.len(), found: record.len() }]);
    }
    let mut spec = JobSpec::default();
    let mut troubles = Vec::new();
    for (&field, cell) in columns.iter().zip(record) {
        let Some(field) = field else { continue };
        match std::str::from_utf8(cell) {
            Ok(text) => troubles.extend(spec.set(field, text).err().map(Trouble::Value)),
            Err(error) => troubles.push(Trouble::not_utf8(cell, error)),
        }
    }
    if troubles.is_empty() { Ok(spec) } else { Err(troubles) }
}

/// Tells the line of a record. The reader's own count starts a record at the end of the one before, so blank lines in
/// between would be charged to the wrong one.
struct LineCounter<'a> {
    bytes: &'a [u8],
    counted: usize,
    line: u32,
}

impl LineCounter<'_> {
    fn line_of(&mut self, record: &ByteRecord) -> u32 {
        let start = record.position().map_or(0, |position| usize::try_from(position.byte()).unwrap_or(usize::MAX));
        let rest = self.bytes.get(start..).unwrap_or_default();
        let blank = rest.iter().take_while(|&&byte| byte == b'\n' || byte == b'\r').count();
        let end = (start + blank).min(self.bytes.len()).max(self.counted);
        let passed = self.bytes[self.counted..end].iter().filter(|&&byte| byte == b'\n').count();
        self.line = self.line.saturating_add(u32::try_from(passed).unwrap_or(u32::MAX));
        self.counted = end;
        self.line
    }
}

#[cfg(test)]
mod tests {
    use schema::NoiseScheduler;

    use super::*;

    fn faults(text: &str) -> String {
        read(text.as_bytes()).faults.iter().map(ToString::to_string).collect::<Vec<_>>().join("\n")
    }

    #[test]
    fn cells_become_fields_and_blank_cells_are_left_out() {
        let file = read(
            b"Prompt,seed,steps,cfg_scale,W,height,scheduler,neg,custom_id\r\n\
              \"a \"\"red\"\" cat, sitting\",7,20,7.5,512,768,euler_a,dog,row-1\r\n\
              \r\n\
              \"two\nlines\",,,,,,,,\r\n\
              last,,,,,,,,\r\n",
        );
        assert_eq!(file.faults, []);
        assert_eq!(file.lines.iter().map(|line| line.line).collect::<Vec<_>>(), [2, 4, 6]);
        assert_eq!(
            file.lines[0].spec,
            JobSpec {
                prompt: "a \"red\" cat, sitting".into(),
                negative_prompt: Some("dog".into()),
                seed: Some(7),
                num_inference_steps: Some(20),
                guidance_scale: Some(7.5),
                width: Some(512),
                height: Some(768),
                noise_scheduler: Some(NoiseScheduler::EulerA),
                client_ref: Some("row-1".into()),
            }
        );
        assert_eq!(file.lines[1].spec, JobSpec { prompt: "two\nlines".into(), ..JobSpec::default() });
    }

    #[test]
    fn every_fault_of_every_line_is_told() {
        insta::assert_snapshot!(
            faults("prompt,seed,width,scheduler\na,-1,wide,ddim\nb,1\nc,1.5,,k_euler\nd,2,64,ddim\n"), @"");
    }

    #[test]
    fn a_bad_header_is_told_once() {
        insta::assert_snapshot!(faults("promt,seed,category,Steps,ddim_steps\na,1,x,2,3\n"), @"");
        insta::assert_snapshot!(faults("a red cat\na blue dog, sitting\n"), @"");
    }

    #[test]
    fn bytes_that_are_not_utf8_are_told_by_cell() {
        let file = read(b"prompt,neg\n\xFF,b\xFE\n");
        let faults: Vec<_> = file.faults.iter().map(ToString::to_string).collect();
        insta::assert_snapshot!(faults.join("\n"), @"");
    }
}
