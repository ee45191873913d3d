//! `darkroom submit`
use std::io::Read;
use std::path::Path;

use anyhow::{Context, Result, bail};
use schema::failpoint;
use schema::{Model, ModelName, NewBatch, NewJob, PgCatalog, SpecDefaults, SubmitError, SubmittedBatch};
use serde_json::json;

use super::{connect, counted, no_such_model};
use crate::cli::SubmitArgs;
use crate::config::{self, Settings};
use crate::prompt_file::{InputFault, PromptFile, PromptFormat, Repetition};
use crate::submission;
use crate::terminal::{Terminal, UsageError, printable};

/// Faults to print; a file in the wrong format has one a line.
const TOLD_FAULTS: usize = 50;
/// Repeated lines to name.
const TOLD_REPETITIONS: usize = 5;

pub(super) async fn run(arguments: SubmitArgs, settings: &Settings, terminal: Terminal) -> Result<()> {
    let principal = config::principal(arguments.who.principal.clone())?;
    let source_name = source_name(&arguments.file);
    let bytes = read(&arguments.file)?;
    let format = arguments.format.unwrap_or_else(|| PromptFormat::of_name(&arguments.file));
    let file = format.read(&bytes);

    let catalog = connect(settings).await?;
    let model = model(&catalog, arguments.model.as_ref()).await?;
    let defaults = arguments.defaults.over(model.spec_defaults());
    check_defaults(&defaults)?;
    let repetitions = file.repetitions();
    let jobs = checked_jobs(file, &defaults, &arguments, &source_name, terminal)?;
    warn_of(&repetitions, &source_name, terminal);

    let new = NewBatch {
        name: arguments.name.clone().unwrap_or_else(|| batch_name(&arguments.file)),
        principal,
        model: model.name.clone(),
        // Without a key of the user's every submission is a new batch.
        idempotency_key: arguments
            .idempotency_key
            .clone()
            .unwrap_or_else(|| uuid::Uuid::new_v4().to_string()),
        source_name,
        defaults,
        band: arguments.priority,
        max_attempts: arguments.max_attempts,
        traceparent: None,
    };
    if arguments.dry_run {
        return dry_run(&catalog, &model, &new, &jobs, terminal).await;
    }
    let submitted = catalog.submit_batch(&new, &jobs).await.map_err(explain)?;
    failpoint::reached("submit::after_commit");
    show(&new, &submitted, terminal)
}

fn show(new: &NewBatch, submitted: &SubmittedBatch, terminal: Terminal) -> Result<()> {
    let SubmittedBatch { batch_id, job_count, replayed } = submitted;
    let data = json!({
        "batch_id": batch_id, "name": new.name, "model": new.model, "principal": new.principal,
        "job_count": job_count, "idempotency_key": new.idempotency_key, "replayed": replayed,
    });
    terminal.show(&data, || {
        let verb = if *replayed { "submitted before:" } else { "submitted" };
        format!(
            "{verb} batch {} with {} for model {}\n  {batch_id}\n  follow it with `darkroom watch {batch_id}`",
            printable(&new.name),
            counted(*job_count, "job"),
            new.model,
        )
    })
}

async fn dry_run(
    catalog: &PgCatalog,
    model: &Model,
    new: &NewBatch,
    jobs: &[NewJob],
    terminal: Terminal,
) -> Result<()> {
    let accepted = catalog.valid_acceptance(&new.principal, model.licence_id).await?.is_some();
    let data = json!({
        "name": new.name, "model": new.model, "principal": new.principal, "job_count": jobs.len(),
        "licence_accepted": accepted, "defaults": new.defaults,
    });
    terminal.show(&data, || {
        let mut text = format!(
            "would submit batch {} with {} for model {}; nothing was written",
            printable(&new.name),
            counted(jobs.len() as u64, "job"),
            new.model
        );
        if !accepted {
            let command = accept_command(&new.model, &new.principal);
            text.push_str(&format!(
                "\n{} has yet to accept the model's licence: {command}",
                printable(&new.principal)
            ));
        }
        text
    })
}

/// The jobs of the file, or all its faults on the terminal.
fn checked_jobs(
    file: PromptFile,
    defaults: &SpecDefaults,
    arguments: &SubmitArgs,
    source_name: &str,
    terminal: Terminal,
) -> Result<Vec<NewJob>> {
    let PromptFile { lines, mut faults, faulty_lines } = file;
    let jobs =
        |lines| submission::jobs(lines, defaults, arguments.defaults.seed, arguments.num_images_per_prompt);
    faults.extend(jobs(&faulty_lines).err().into_iter().flatten());
    let jobs = jobs(&lines).unwrap_or_else(|more| {
        faults.extend(more);
        Vec::new()
    });
    if faults.is_empty() {
        return Ok(jobs);
    }
    faults.sort_by_key(|fault| fault.line);
    Err(refuse(&faults, source_name, terminal)?.into())
}

fn refuse(faults: &[InputFault], source_name: &str, terminal: Terminal) -> Result<UsageError> {
    if terminal.json {
        let told = &faults[..faults.len().min(TOLD_FAULTS)];
        terminal.show(
            &json!({ "file": source_name, "fault_count": faults.len(), "faults": told }),
            String::new,
        )?;
    } else {
        for fault in faults.iter().take(TOLD_FAULTS) {
            terminal.tell(&printable(&format!("{source_name}:{fault}")));
        }
        if faults.len() > TOLD_FAULTS {
            terminal.tell(&format!("... and {} more", faults.len() - TOLD_FAULTS));
        }
    }
    let count = counted(faults.len() as u64, "fault");
    Ok(UsageError(format!("{count} in {}; nothing was submitted", printable(source_name))))
}

/// A default that is wrong would otherwise be told once for every line.
fn check_defaults(defaults: &SpecDefaults) -> Result<()> {
    defaults.validate().map_err(|faults| {
        let faults: Vec<_> = faults.iter().map(ToString::to_string).collect();
        UsageError(format!("the batch's defaults are wrong: {}", faults.join("; "))).into()
    })
}

fn warn_of(repetitions: &[Repetition], source_name: &str, terminal: Terminal) {
    for Repetition { line, first } in repetitions.iter().take(TOLD_REPETITIONS) {
        let source_name = printable(source_name);
        terminal
            .tell(&format!("warning: {source_name}:{line}: the same prompt and settings as line {first}"));
    }
    if repetitions.len() > TOLD_REPETITIONS {
        terminal
            .tell(&format!("warning: ... and {} more repeated lines", repetitions.len() - TOLD_REPETITIONS));
    }
}

/// The model that is asked for, or the only one there is.
async fn model(catalog: &PgCatalog, name: Option<&ModelName>) -> Result<Model> {
    if let Some(name) = name {
        return catalog.model_by_name(name).await?.ok_or_else(|| no_such_model(name));
    }
    let mut models = catalog.models().await?;
    match models.len() {
        0 => bail!(
            "no model is registered\nhint: register one with `darkroom models add NAME DIR --licence FILE`"
        ),
        1 => Ok(models.remove(0)),
        _ => {
            let names: Vec<_> = models.iter().map(|model| model.name.as_str()).collect();
            Err(UsageError(format!("--model has to name one of {}", names.join(", "))).into())
        }
    }
}

/// The licence rule's error says exactly how to accept, for this very principal.
fn explain(error: SubmitError) -> anyhow::Error {
    match error {
        SubmitError::LicenceNotAccepted { principal, model, licence_name, text_sha256, .. } => {
            anyhow::anyhow!(
                "{} has not accepted {licence_name}, the licence of model {model} (SHA-256 {text_sha256}); nothing was \
             submitted\nhint: read and accept it with `{}`",
                printable(&principal),
                accept_command(&model, &principal)
            )
        }
        other => other.into(),
    }
}

fn accept_command(model: &ModelName, principal: &str) -> String {
    // In quotes where a shell would take it apart.
    let is_plain = |character: char| character.is_ascii_alphanumeric() || "@._-+".contains(character);
    let principal = printable(principal);
    if principal.chars().all(is_plain) {
        format!("darkroom licence accept {model} --principal {principal}")
    } else {
        format!("darkroom licence accept {model} --principal '{}'", principal.replace('\'', r"'\''"))
    }
}

fn read(file: &Path) -> Result<Vec<u8>> {
    if file == Path::new("-") {
        let mut bytes = Vec::new();
        std::io::stdin().read_to_end(&mut bytes).context("cannot read standard input")?;
        return Ok(bytes);
    }
    std::fs::read(file).map_err(|error| UsageError(format!("cannot read {}: {error}", file.display())).into())
}

/// What the batch's record and the faults call the source.
fn source_name(file: &Path) -> String {
    if file == Path::new("-") { "-".to_owned() } else { file.display().to_string() }
}

fn batch_name(file: &Path) -> String {
    match file.file_stem() {
        Some(stem) if file != Path::new("-") => stem.to_string_lossy().into_owned(),
        _ => "standard input".to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use schema::{LicenceId, Sha256Digest};

    use super::*;

    #[test]
    fn the_licence_error_says_exactly_how_to_accept() {
        let error = explain(SubmitError::LicenceNotAccepted {
            principal: "ann".to_owned(),
            model: "demo".parse().unwrap(),
            licence_id: LicenceId::generate(),
            licence_name: "CreativeML Open RAIL-M".to_owned(),
            text_sha256: Sha256Digest::of(b""),
        });
        insta::assert_snapshot!(crate::terminal::describe_error(&error), @"
        error: ann has not accepted CreativeML Open RAIL-M, the licence of model demo (SHA-256 e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855); nothing was submitted
        hint: read and accept it with `darkroom licence accept demo --principal ann`
        ");
        let command = accept_command(&"demo".parse().unwrap(), "ann o'hara");
        assert_eq!(command, r"darkroom licence accept demo --principal 'ann o'\''hara'");
    }

    #[test]
    fn sources_and_batches_are_named_after_the_file() {
        assert_eq!(batch_name(Path::new("dir/prompts.v2.csv")), "prompts.v2");
        assert_eq!(batch_name(Path::new("-")), "standard input");
        assert_eq!(source_name(Path::new("dir/prompts.csv")), "dir/prompts.csv");
    }

    #[test]
    fn a_wrong_default_is_told_once() {
        let defaults =
            SpecDefaults { width: 500, ..SpecDefaults::of_model(512, 512, schema::NoiseScheduler::Pndm) };
        let error = check_defaults(&defaults).unwrap_err();
        assert!(error.is::<UsageError>());
        insta::assert_snapshot!(error, @"the batch's defaults are wrong: `width` has to be a multiple of 8, from 64 to 2048, but is 500");
    }
}
