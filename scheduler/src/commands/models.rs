//! `darkroom models add | list`
use anyhow::{Context, Result};
use indicatif::{ProgressBar, ProgressStyle};
use schema::NewModel;
use serde_json::json;

use super::{connect, counted};
use crate::cli::{ModelsAddArgs, ModelsCommand};
use crate::config::Settings;
use crate::model_folder::{self, ModelFolder};
use crate::terminal::{Terminal, table};

/// Digits of a digest that tell two apart for a person.
const SHORT_DIGEST: usize = 12;

pub(super) async fn run(command: ModelsCommand, settings: &Settings, terminal: Terminal) -> Result<()> {
    match command {
        ModelsCommand::Add(arguments) => add(arguments, settings, terminal).await,
        ModelsCommand::List => list(settings, terminal).await,
    }
}

async fn add(arguments: ModelsAddArgs, settings: &Settings, terminal: Terminal) -> Result<()> {
    // Everything that can be wrong with the folder comes before hashing it, which takes a while.
    let model = ModelFolder::read(&arguments.folder)?;
    let (first_line, licence_text) = model_folder::licence(arguments.licence.as_deref(), &model.folder)?;
    let licence_name = arguments.licence_name.unwrap_or(first_line);
    let catalog = connect(settings).await?;

    let bar = ProgressBar::new(model.size_bytes()).with_style(
        ProgressStyle::with_template("hashing {bar:30} {bytes}/{total_bytes} {bytes_per_sec}, {eta} left")?
            .progress_chars("=> "),
    );
    let (model, components) = {
        let bar = bar.clone();
        tokio::task::spawn_blocking(move || {
            let components = model.hash(|bytes| bar.inc(bytes))?;
            anyhow::Ok((model, components))
        })
        .await??
    };
    bar.finish_and_clear();
    let folder = model.folder.to_str().context("the model's folder has to have a UTF-8 path")?.to_owned();
    let new = NewModel {
        name: arguments.name,
        folder,
        components,
        licence_name,
        licence_text,
        default_width: model.default_width,
        default_height: model.default_height,
        default_noise_scheduler: model.default_noise_scheduler,
    };
    let added = catalog.add_model(&new).await?;
    let data =
        json!({ "model": added.model, "was_known": added.was_known, "licence_name": new.licence_name });
    terminal.show(&data, || {
        let verb = if added.was_known { "already registered" } else { "registered" };
        let checker = if model.has_safety_checker { "with" } else { "WITHOUT" };
        format!(
            "{verb} model {}: {} × {} pixels, {}, {checker} a safety checker\n  {}, weights {}\n  licence: {}\n",
            new.name,
            new.default_width,
            new.default_height,
            new.default_noise_scheduler,
            counted(new.components.len() as u64, "file"),
            &new.weights_sha256().to_string()[..SHORT_DIGEST],
            new.licence_name,
        )
    })
}

async fn list(settings: &Settings, terminal: Terminal) -> Result<()> {
    let models = connect(settings).await?.models().await?;
    terminal.show(&models, || {
        if models.is_empty() {
            return "no models yet; register one with `darkroom models add NAME DIR --licence FILE`\n"
                .to_owned();
        }
        let rows = models.iter().map(|model| {
            [
                model.name.to_string(),
                format!("{}x{}", model.default_width, model.default_height),
                model.default_noise_scheduler.to_string(),
                model.weights_sha256.to_string()[..SHORT_DIGEST].to_owned(),
                model.folder.clone(),
            ]
        });
        table(["name", "size", "scheduler", "weights", "folder"], rows)
    })
}
