//! One prompt a line, as CompVis' `txt2img.py --from-file` reads it. Every line is a prompt, also one that begins
//! with `#`: prompts do.
use schema::JobSpec;

use super::{InputFault, PromptFile, PromptLine, Trouble};

pub(super) fn read(bytes: &[u8]) -> PromptFile {
    let mut file = PromptFile::default();
    for (line, bytes) in numbered(bytes) {
        match std::str::from_utf8(bytes) {
            Ok(text) if text.trim().is_empty() => {}
            Ok(text) => {
                file.lines.push(PromptLine {
                    line,
                    spec: JobSpec { prompt: text.to_owned(), ..JobSpec::default() },
                });
            }
            Err(error) => {
                file.faults.push(InputFault { line, trouble: Trouble::not_utf8("the line", bytes, error) })
            }
        }
    }
    file
}

/// The lines of `bytes` with their numbers from 1, without their ends (`\n` or `\r\n`).
pub(super) fn numbered(bytes: &[u8]) -> impl Iterator<Item = (u32, &[u8])> {
    (1..).zip(bytes.split(|&byte| byte == b'\n').map(|line| line.strip_suffix(b"\r").unwrap_or(line)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_are_prompts_and_blank_ones_are_skipped() {
        let file = read("a cat\r\n\n  \n# not a comment, è\nlast".as_bytes());
        let lines: Vec<_> = file.lines.iter().map(|line| (line.line, line.spec.prompt.as_str())).collect();
        assert_eq!(lines, [(1, "a cat"), (4, "# not a comment, è"), (5, "last")]);
        assert_eq!(file.faults, []);
    }

    #[test]
    fn a_line_that_is_not_utf8_is_named() {
        let file = read(b"good\nb\xFFd\n\xC3");
        let faults: Vec<_> = file.faults.iter().map(ToString::to_string).collect();
        assert_eq!(
            faults,
            [
                "2: text has to be UTF-8, but byte 2 of the line is 0xff",
                "3: text has to be UTF-8, but byte 1 of the line is 0xc3"
            ]
        );
    }
}
