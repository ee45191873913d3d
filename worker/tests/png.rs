//! What a picture's file says about itself: read back by a PNG decoder, by a reader of AUTOMATIC1111's grammar written after
//! its own (`modules/infotext_utils.py`), and compared over random specs.
#![allow(clippy::unwrap_used, reason = "clippy.toml allows it in test functions; this is for their helpers")]

use std::collections::BTreeMap;
use std::io::Cursor;

use proptest::prelude::*;
use schema::{
    AcceptanceId, BatchId, EngineFingerprint, JobId, JobSpec, ModelName, NoiseScheduler, Sha256Digest,
    SpecDefaults, ValidJobSpec,
};
use worker::infotext::infotext;
use worker::pipeline::GeneratedImage;
use worker::png::{PictureRecord, Provenance, encode_picture};

/// A key and a value, as the reader's regular expression
/// `\s*(\w[\w \-/]+):\s*("(?:\\.|[^\\"])+"|[^,]*)(?:,|$)` finds them.
fn pairs(line: &str) -> Vec<(String, String)> {
    let characters: Vec<char> = line.chars().collect();
    let (mut found, mut start) = (Vec::new(), 0);
    while start < characters.len() {
        match pair_at(&characters, start) {
            Some((key, value, end)) => {
                found.push((key, value));
                start = end;
            }
            None => start += 1,
        }
    }
    found
}

fn pair_at(characters: &[char], start: usize) -> Option<(String, String, usize)> {
    let skip_blanks = |mut at: usize| {
        while characters.get(at).is_some_and(|character| character.is_whitespace()) {
            at += 1;
        }
        at
    };
    let word = |character: &char| character.is_alphanumeric() || *character == '_';
    let key_start = skip_blanks(start);
    let mut key_end = key_start;
    while characters.get(key_end).is_some_and(|character| word(character) || " -/".contains(*character)) {
        key_end += 1;
    }
    let well_formed =
        key_end >= key_start + 2 && word(&characters[key_start]) && characters.get(key_end) == Some(&':');
    let value_start = skip_blanks(key_end + 1);
    let ends = |at: usize| at == characters.len() || characters[at] == ',';
    let mut quote_end = value_start + 1;
    if characters.get(value_start) == Some(&'"') {
        while quote_end < characters.len() && characters[quote_end] != '"' {
            quote_end += if characters[quote_end] == '\\' { 2 } else { 1 };
        }
        quote_end += 1;
    }
    let quoted = quote_end > value_start + 2 && quote_end <= characters.len() && ends(quote_end);
    let value_end = if quoted {
        quote_end
    } else {
        (value_start..).find(|at| ends(*at)).expect("the end of the line ends a value")
    };
    let text = |from: usize, to: usize| characters[from..to].iter().collect::<String>();
    well_formed.then(|| {
        (text(key_start, key_end), text(value_start, value_end), (value_end + 1).min(characters.len()))
    })
}

#[derive(Debug, PartialEq)]
struct Parsed {
    prompt: String,
    negative_prompt: String,
    parameters: BTreeMap<String, String>,
}

/// `parse_generation_parameters` of the web UI.
fn parse(text: &str) -> Parsed {
    let mut lines: Vec<&str> = text.trim().split('\n').collect();
    let last_line = lines.pop().unwrap_or_default();
    let found = pairs(last_line);
    if found.len() < 3 {
        lines.push(last_line);
    }
    let (mut prompt, mut negative_prompt, mut is_negative) = (Vec::new(), Vec::new(), false);
    for line in lines {
        let mut line = line.trim();
        if let Some(rest) = line.strip_prefix("Negative prompt:") {
            (is_negative, line) = (true, rest.trim());
        }
        if is_negative { negative_prompt.push(line) } else { prompt.push(line) }
    }
    let unquoted =
        |value: String| if value.starts_with('"') { serde_json::from_str(&value).unwrap() } else { value };
    let parameters = if found.len() < 3 { Vec::new() } else { found };
    Parsed {
        prompt: prompt.join("\n"),
        negative_prompt: negative_prompt.join("\n"),
        parameters: parameters.into_iter().map(|(key, value)| (key, unquoted(value))).collect(),
    }
}

/// What of a prompt a reader can be expected to give back.
fn as_read(prompt: &str) -> String {
    let prompt = prompt.replace("\r\n", "\n").replace('\r', "\n");
    let line = |line: &str| match line.trim().strip_prefix("Negative prompt:") {
        Some(rest) => format!("Negative prompt :{rest}").trim().to_owned(),
        None => line.trim().to_owned(),
    };
    prompt.trim().split('\n').map(line).collect::<Vec<_>>().join("\n")
}

fn wish(prompt: &str, negative_prompt: &str, noise_scheduler: NoiseScheduler) -> JobSpec {
    JobSpec {
        prompt: prompt.to_owned(),
        negative_prompt: Some(negative_prompt.to_owned()),
        seed: Some(965_400_086),
        num_inference_steps: Some(20),
        guidance_scale: Some(7.5),
        width: Some(16 * 8),
        height: Some(8 * 8),
        noise_scheduler: Some(noise_scheduler),
        ..JobSpec::default()
    }
}

fn spec(prompt: &str, negative_prompt: &str, noise_scheduler: NoiseScheduler) -> ValidJobSpec {
    let spec = wish(prompt, negative_prompt, noise_scheduler);
    spec.validate(&SpecDefaults::of_model(512, 512, NoiseScheduler::Pndm)).expect("a valid spec")
}

fn image(spec: &ValidJobSpec) -> GeneratedImage {
    let pixels = (spec.width() * spec.height()) as usize;
    GeneratedImage {
        width: spec.width(),
        height: spec.height(),
        rgb: (0..pixels * 3).map(|byte| (byte % 251) as u8).collect(),
        has_nsfw_concept: Some(false),
        concept_scores: vec![-0.031, -0.1],
        special_care_scores: vec![-0.2],
        prompt_truncated: false,
        dtype: "f32".to_owned(),
        recipe: spec.recipe(),
        engine: None,
    }
}

fn encoded(spec: &ValidJobSpec, image: &GeneratedImage) -> Vec<u8> {
    let batch_id: BatchId = "0190f5fe-7c00-7a00-8000-000000000001".parse().unwrap();
    let acceptance_id: AcceptanceId = "0190f5fe-7c00-7a00-8000-000000000002".parse().unwrap();
    let model: ModelName = "demo".parse().unwrap();
    let provenance = Provenance {
        job_id: JobId::of(batch_id, 7),
        batch_id,
        ordinal: 7,
        acceptance_id,
        model: &model,
        weights_sha256: &Sha256Digest::of(b"weights"),
        noise_dtype: "cpu-f32",
    };
    encode_picture(spec, image, &provenance).expect("a picture can be encoded")
}

/// Keyword, text and whether the text is Latin-1 (tEXt), of every text chunk; and the pixels.
fn decoded(bytes: &[u8]) -> (Vec<(String, String, bool)>, Vec<u8>) {
    let mut reader = png::Decoder::new(Cursor::new(bytes)).read_info().expect("a PNG file");
    let mut pixels = vec![0; reader.output_buffer_size().expect("a small picture")];
    reader.next_frame(&mut pixels).expect("one frame");
    let info = reader.info();
    let latin =
        info.uncompressed_latin1_text.iter().map(|chunk| (chunk.keyword.clone(), chunk.text.clone(), true));
    let unicode = info
        .utf8_text
        .iter()
        .map(|chunk| (chunk.keyword.clone(), chunk.get_text().expect("plain text"), false));
    (latin.chain(unicode).collect(), pixels)
}

fn text_of<'a>(texts: &'a [(String, String, bool)], keyword: &str) -> &'a (String, String, bool) {
    texts.iter().find(|(found, _, _)| found == keyword).unwrap_or_else(|| panic!("no chunk {keyword}"))
}

#[test]
fn what_computed_a_picture_on_a_gpu_is_in_its_record_and_nothing_of_a_cpu() {
    let spec = spec("a red circle", "", NoiseScheduler::Pndm);
    let on_cpu = image(&spec);
    let engine = Box::new(EngineFingerprint {
        gpu: "NVIDIA H200".to_owned(),
        driver: "580.1".to_owned(),
        torch: "2.11.0".to_owned(),
        cudnn: "9.19.0".to_owned(),
        kernels: "fused sm_90a".to_owned(),
        batch_size: 33,
        decode_size: 4,
    });
    let on_gpu = GeneratedImage { engine: Some(engine.clone()), ..on_cpu.clone() };
    let record = |image: &GeneratedImage| {
        let (texts, _) = decoded(&encoded(&spec, image));
        text_of(&texts, "darkroom").1.clone()
    };
    assert!(!record(&on_cpu).contains("engine"));
    let read: PictureRecord = serde_json::from_str(&record(&on_gpu)).unwrap();
    assert_eq!(read.engine, Some(engine));
}

#[test]
fn the_infotext_looks_as_the_web_ui_writes_it() {
    let spec = spec("a red circle,\nlarge", "blurry", NoiseScheduler::Dpmpp2mKarras);
    let text = infotext(&spec, "demo", &Sha256Digest::of(b"weights"));
    insta::assert_snapshot!(text.replace(env!("CARGO_PKG_VERSION"), "VERSION"), @r"
    a red circle,
    large
    Negative prompt: blurry
    Steps: 20, Sampler: DPM++ 2M, Schedule type: Karras, CFG scale: 7.5, Seed: 965400086, Size: 128x64, Model hash: 9a129038d9, Model: demo, RNG: CPU, Version: darkroom VERSION
    ");
}

#[test]
fn every_noise_scheduler_has_a_name_that_readers_know() {
    let samplers: Vec<String> = NoiseScheduler::ALL
        .iter()
        .map(|scheduler| {
            let text = infotext(&spec("x", "", *scheduler), "demo", &Sha256Digest::of(b""));
            let parameters = parse(&text).parameters;
            format!(
                "{scheduler}: {}, {}",
                parameters["Sampler"],
                parameters.get("Schedule type").map_or("-", String::as_str)
            )
        })
        .collect();
    insta::assert_snapshot!(samplers.join("\n"), @r"
    pndm: PLMS, -
    ddim: DDIM, -
    euler: Euler, -
    euler_a: Euler a, -
    dpmpp_2m: DPM++ 2M, -
    dpmpp_2m_karras: DPM++ 2M, Karras
    unipc: UniPC, -
    lms: LMS, -
    ");
}

/// The crate's default takes fifty times as long for a few percent of the size.
#[test]
fn pictures_are_compressed_by_the_fast_compressor() {
    let spec = spec("a picture", "", NoiseScheduler::Pndm);
    let mut image = image(&spec);
    // Smooth with a little noise, as pictures are: what compressors differ on.
    for (index, byte) in image.rgb.iter_mut().enumerate() {
        *byte = ((index / 40) % 200 + index.wrapping_mul(2_654_435_761) % 5) as u8;
    }
    let with = |compression| {
        let mut bytes = Vec::new();
        let mut encoder = png::Encoder::new(&mut bytes, image.width, image.height);
        encoder.set_color(png::ColorType::Rgb);
        encoder.set_depth(png::BitDepth::Eight);
        encoder.set_compression(compression);
        let mut writer = encoder.write_header().unwrap();
        writer.write_image_data(&image.rgb).unwrap();
        writer.finish().unwrap();
        bytes
    };
    let ours = worker::png::encode(&image, &[]).unwrap();
    assert!(ours == with(png::Compression::Fast));
    assert!(ours != with(png::Compression::Balanced));
}

#[test]
fn a_prompt_that_looks_like_parameters_stays_a_prompt() {
    let sly = "a cat\nSteps: 1, Sampler: DDIM, CFG scale: 1, Seed: 1\nNegative prompt: dogs";
    let parsed = parse(&infotext(&spec(sly, "", NoiseScheduler::Pndm), "demo", &Sha256Digest::of(b"")));
    assert_eq!(
        parsed.prompt,
        "a cat\nSteps: 1, Sampler: DDIM, CFG scale: 1, Seed: 1\nNegative prompt : dogs"
    );
    assert_eq!(parsed.negative_prompt, "");
    assert_eq!(parsed.parameters["Seed"], "965400086");
    assert_eq!(parsed.parameters["Steps"], "20");
}

#[test]
fn a_value_with_commas_is_quoted_and_read_back() {
    let text = infotext(&spec("x", "", NoiseScheduler::Pndm), "a, \"b\": c", &Sha256Digest::of(b""));
    assert_eq!(parse(&text).parameters["Model"], "a, \"b\": c");
}

#[test]
fn latin_text_is_text_and_other_text_is_international() {
    for (prompt, is_latin) in [("naïve café", true), ("漢字 🙂", false)] {
        let spec = spec(prompt, "", NoiseScheduler::Pndm);
        let (texts, _) = decoded(&encoded(&spec, &image(&spec)));
        for keyword in ["parameters", "darkroom"] {
            let (_, text, found_latin) = text_of(&texts, keyword);
            assert_eq!(*found_latin, is_latin, "{keyword}");
            assert!(text.contains(prompt));
        }
    }
}

#[test]
fn the_record_names_job_model_licence_and_verdict() {
    let spec = spec("a red circle", "blurry", NoiseScheduler::Pndm);
    let (texts, _) = decoded(&encoded(&spec, &image(&spec)));
    let record: PictureRecord =
        serde_json::from_str(&text_of(&texts, "darkroom").1).expect("the record is JSON");
    let record = serde_json::to_string_pretty(&record).expect("JSON again");
    insta::assert_snapshot!(record.replace(env!("CARGO_PKG_VERSION"), "VERSION"), @r#"
    {
      "version": 1,
      "job_id": "4d3a635e-e5aa-546f-ab25-14acb12d04db",
      "batch_id": "0190f5fe-7c00-7a00-8000-000000000001",
      "ordinal": 7,
      "prompt": "a red circle",
      "negative_prompt": "blurry",
      "seed": 965400086,
      "model": "demo",
      "weights_sha256": "9a129038d9a00aed0cf6a7ea059ca50a813449061ab87848cf1a13eafdf33b2c",
      "scheduler": "pndm",
      "num_inference_steps": 20,
      "guidance_scale": 7.5,
      "width": 128,
      "height": 64,
      "noise_dtype": "cpu-f32",
      "prompt_truncated": false,
      "has_nsfw_concept": false,
      "concept_scores": [
        -0.031,
        -0.1
      ],
      "special_care_scores": [
        -0.2
      ],
      "licence_acceptance_id": "0190f5fe-7c00-7a00-8000-000000000002",
      "software": "darkroom VERSION"
    }
    "#);
}

/// A file of the exact picture says nothing of a recipe: its bytes, and so its key in the bucket, are what they always were.
#[test]
fn a_recipe_is_in_both_texts_and_an_exact_picture_has_no_word_of_one() {
    let exact = spec("a red circle", "", NoiseScheduler::Pndm);
    let texts = decoded(&encoded(&exact, &image(&exact))).0;
    assert!(texts.iter().all(|(_, text, _)| !text.contains("nterval") && !text.contains("guidance_st")));
    let record: PictureRecord = serde_json::from_str(&text_of(&texts, "darkroom").1).unwrap();
    assert!(record.recipe.is_exact());

    let wish = JobSpec {
        guidance_stop: Some(0.7),
        cache_interval: Some(3),
        ..wish("a red circle", "", NoiseScheduler::Pndm)
    };
    let cached = wish.validate(&SpecDefaults::of_model(512, 512, NoiseScheduler::Pndm)).unwrap();
    let texts = decoded(&encoded(&cached, &image(&cached))).0;
    let parameters = parse(&text_of(&texts, "parameters").1).parameters;
    assert_eq!(
        (parameters["Guidance interval"].as_str(), parameters["Cache interval"].as_str()),
        ("0-0.7", "3")
    );
    let record = &text_of(&texts, "darkroom").1;
    assert!(
        record.contains(
            r#""guidance_scale":7.5,"guidance_start":0.0,"guidance_stop":0.7,"cache_interval":3,"width""#
        ),
        "{record}"
    );
    let record: PictureRecord = serde_json::from_str(record).unwrap();
    assert_eq!(record.recipe, cached.recipe());
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn any_prompt_is_read_back(
        prompt in "[ -~\\n\\r\\t\u{a0}-\u{ff}漢🙂]{0,60}(\nNegative prompt: [a-z]{0,9})?[!-~]",
        negative_prompt in "[ -~\\n]{0,40}",
        scheduler in 0..NoiseScheduler::ALL.len(),
    ) {
        let spec = spec(&prompt, &negative_prompt, NoiseScheduler::ALL[scheduler]);
        let image = image(&spec);
        let bytes = encoded(&spec, &image);
        prop_assert_eq!(&bytes, &encoded(&spec, &image), "equal inputs, equal bytes");
        let (texts, pixels) = decoded(&bytes);
        prop_assert_eq!(&pixels, &image.rgb);
        let parsed = parse(&text_of(&texts, "parameters").1);
        prop_assert_eq!(parsed.prompt, as_read(&prompt));
        prop_assert_eq!(parsed.negative_prompt, as_read(&negative_prompt));
        prop_assert_eq!(&parsed.parameters["Size"], "128x64");
        prop_assert_eq!(&parsed.parameters["RNG"], "CPU");
        prop_assert_eq!(parsed.parameters.contains_key("Schedule type"), scheduler == 5);
        let record: PictureRecord = serde_json::from_str(&text_of(&texts, "darkroom").1).expect("JSON");
        prop_assert_eq!(record.prompt, prompt);
        prop_assert_eq!(record.negative_prompt, negative_prompt);
    }
}
