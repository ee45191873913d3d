//! CSV: the first line names the columns, each further record is one prompt.
use csv::ByteRecord;
use schema::{JobSpec, SpecField};

use super::{InputFault, PromptFile, Trouble, field_name};

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
        let (spec, troubles) = row(columns, &record);
        file.push(line, spec, troubles);
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
                troubles.push(Trouble::not_utf8("a column's name", cell, error));
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
        let names: Vec<_> =
            record.iter().map(|cell| format!("{:?}", String::from_utf8_lossy(cell))).collect();
        // First, because it explains the others: most likely there is no header at all.
        troubles.insert(0, Trouble::NoPromptColumn { columns: names.join(", ") });
    }
    if troubles.is_empty() { Ok(columns) } else { Err(troubles) }
}

/// What the record says as far as it can be read, and what cannot.
fn row(columns: &[Option<SpecField>], record: &ByteRecord) -> (JobSpec, Vec<Trouble>) {
    if record.len() != columns.len() {
        // Which cell belongs to which column is anybody's guess.
        let trouble = Trouble::CellCount { expected: columns.len(), found: record.len() };
        return (JobSpec::default(), vec![trouble]);
    }
    let mut spec = JobSpec::default();
    let mut troubles = Vec::new();
    for (&field, cell) in columns.iter().zip(record) {
        let Some(field) = field else { continue };
        match std::str::from_utf8(cell) {
            Ok(text) => troubles.extend(spec.set(field, text).err().map(Trouble::Value)),
            Err(error) => troubles.push(Trouble::not_utf8(format_args!("`{field}`"), cell, error)),
        }
    }
    (spec, troubles)
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
        let start =
            record.position().map_or(0, |position| usize::try_from(position.byte()).unwrap_or(usize::MAX));
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
            b"Prompt,seed,steps,cfg_scale,W,height,scheduler,Guidance stop,cache-interval,neg,custom_id\r\n\
              \"a \"\"red\"\" cat, sitting\",7,20,7.5,512,768,euler_a,0.7,3,dog,row-1\r\n\
              \r\n\
              \"two\nlines\",,,,,,,,,,\r\n\
              last,,,,,,,,,,\r\n",
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
                guidance_stop: Some(0.7),
                cache_interval: Some(3),
                client_ref: Some("row-1".into()),
                ..JobSpec::default()
            }
        );
        assert_eq!(file.lines[1].spec, JobSpec { prompt: "two\nlines".into(), ..JobSpec::default() });
    }

    #[test]
    fn every_fault_of_every_line_is_told() {
        insta::assert_snapshot!(
            faults("prompt,seed,width,scheduler\na,-1,wide,ddim\nb,1\nc,1.5,,k_euler\nd,2,64,ddim\n"), @r#"
        2: `seed` has to be a whole number from 0 to 4294967295 (the noise generator keeps 32 bits), but is "-1"
        2: `width` has to be a multiple of 8, from 64 to 2048, but is "wide"
        3: a line has to have 4 cells like the first line, but this one has 2
        4: `seed` has to be a whole number from 0 to 4294967295 (the noise generator keeps 32 bits), but is "1.5"
        4: `scheduler` has to be one of pndm, ddim, euler, euler_a, dpmpp_2m, dpmpp_2m_karras, unipc, lms, but is "k_euler"
        "#);
    }

    #[test]
    fn a_bad_header_is_told_once() {
        insta::assert_snapshot!(faults("promt,seed,category,Steps,ddim_steps\na,1,x,2,3\n"), @r#"
        1: a column `prompt` has to be in the first line, but it has "promt", "seed", "category", "Steps", "ddim_steps"; for one prompt a line without a header use --format text
        1: no job has a field "promt"; did you mean `prompt`?
        1: no job has a field "category"; the fields are prompt, negative_prompt, seed, num_inference_steps, guidance_scale, width, height, scheduler, guidance_start, guidance_stop, cache_interval, client_ref
        1: the field `num_inference_steps` comes twice, the second time as "ddim_steps"
        "#);
        insta::assert_snapshot!(faults("a red cat\na blue dog, sitting\n"), @r#"
        1: a column `prompt` has to be in the first line, but it has "a red cat"; for one prompt a line without a header use --format text
        1: no job has a field "a red cat"; the fields are prompt, negative_prompt, seed, num_inference_steps, guidance_scale, width, height, scheduler, guidance_start, guidance_stop, cache_interval, client_ref
        "#);
    }

    #[test]
    fn bytes_that_are_not_utf8_are_told_by_cell() {
        let file = read(b"prompt,neg\n\xFF,b\xFE\n");
        let faults: Vec<_> = file.faults.iter().map(ToString::to_string).collect();
        insta::assert_snapshot!(faults.join("\n"), @"
        2: text has to be UTF-8, but byte 1 of `prompt` is 0xff
        2: text has to be UTF-8, but byte 2 of `negative_prompt` is 0xfe
        ");
    }
}
