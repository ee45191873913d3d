//! The names by which people's files call the fields of a job.
use schema::SpecField;

/// Names that files in the wild use, beside our own: CompVis' and A1111's settings, the columns of DrawBench and
/// COCO, OpenAI's batch files. Compared in lower case with `_` for spaces and hyphens.
const ALIASES: &[(&str, SpecField)] = &[
    ("prompts", SpecField::Prompt),
    ("text", SpecField::Prompt),
    ("caption", SpecField::Prompt),
    ("neg", SpecField::NegativePrompt),
    ("negative", SpecField::NegativePrompt),
    ("steps", SpecField::NumInferenceSteps),
    ("step", SpecField::NumInferenceSteps),
    ("ddim_steps", SpecField::NumInferenceSteps),
    ("cfg", SpecField::GuidanceScale),
    ("cfg_scale", SpecField::GuidanceScale),
    ("guidance", SpecField::GuidanceScale),
    ("scale", SpecField::GuidanceScale),
    ("w", SpecField::Width),
    ("h", SpecField::Height),
    ("sampler", SpecField::NoiseScheduler),
    ("noise_scheduler", SpecField::NoiseScheduler),
    ("id", SpecField::ClientRef),
    ("custom_id", SpecField::ClientRef),
];

/// The field called `name`.
pub fn field(name: &str) -> Option<SpecField> {
    let name = name.trim().to_lowercase().replace([' ', '-'], "_");
    let own = SpecField::ALL.iter().copied().find(|field| field.as_str() == name);
    own.or_else(|| ALIASES.iter().find(|(alias, _)| *alias == name).map(|&(_, field)| field))
}

/// Our own names, for a message.
pub fn known() -> String {
    SpecField::ALL.iter().map(|field| field.as_str()).collect::<Vec<_>>().join(", ")
}

/// The field whose name `name` was probably meant to be: at most two letters off, and less than half of it.
pub fn closest(name: &str) -> Option<&'static str> {
    let name: Vec<char> = name.trim().to_lowercase().chars().take(40).collect();
    SpecField::ALL
        .iter()
        .map(|field| (distance(&name, field.as_str()), field.as_str()))
        .min()
        .filter(|&(distance, known)| distance <= 2 && distance * 2 < known.len())
        .map(|(_, known)| known)
}

/// Levenshtein's distance: insertions, deletions and replacements from `name` to `known`.
fn distance(name: &[char], known: &str) -> usize {
    let mut row: Vec<usize> = (0..=name.len()).collect();
    for (i, letter) in known.chars().enumerate() {
        let mut diagonal = row[0];
        row[0] = i + 1;
        for (j, &other) in name.iter().enumerate() {
            let replaced = diagonal + usize::from(other != letter);
            diagonal = row[j + 1];
            row[j + 1] = replaced.min(row[j] + 1).min(diagonal + 1);
        }
    }
    row[name.len()]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_in_the_wild_are_understood() {
        for (name, expected) in [
            ("prompt", SpecField::Prompt),
            ("Prompts", SpecField::Prompt),
            (" Negative Prompt ", SpecField::NegativePrompt),
            ("CFG scale", SpecField::GuidanceScale),
            ("num-inference-steps", SpecField::NumInferenceSteps),
            ("custom_id", SpecField::ClientRef),
            ("H", SpecField::Height),
        ] {
            assert_eq!(field(name), Some(expected), "{name}");
        }
        assert_eq!(field("category"), None);
        assert_eq!(field(""), None);
    }

    #[test]
    fn slips_are_guessed_and_strangers_are_not() {
        assert_eq!(closest("promt"), Some("prompt"));
        assert_eq!(closest("widht"), Some("width"));
        assert_eq!(closest("sed"), Some("seed"));
        assert_eq!(closest("guidance_scal"), Some("guidance_scale"));
        assert_eq!(closest("category"), None);
        assert_eq!(closest("x"), None);
    }
}
