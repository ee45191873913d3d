use proptest::prelude::*;
use serde_json::json;

use super::*;

fn defaults() -> SpecDefaults {
    SpecDefaults::of_model(512, 512, NoiseScheduler::Pndm)
}

fn spec() -> JobSpec {
    JobSpec { prompt: "a red circle".into(), seed: Some(7), ..JobSpec::default() }
}

/// The faults of `spec`, one a line.
fn faults(spec: &JobSpec) -> String {
    let faults = spec.validate(&defaults()).expect_err("the spec is at fault");
    faults.iter().map(ToString::to_string).collect::<Vec<_>>().join("\n")
}

#[test]
fn what_is_left_out_comes_from_the_defaults() {
    let valid = spec().validate(&defaults()).unwrap();
    assert_eq!((valid.width(), valid.height(), valid.num_inference_steps()), (512, 512, 50));
    assert_eq!((valid.guidance_scale(), valid.noise_scheduler()), (7.5, NoiseScheduler::Pndm));
    assert_eq!((valid.prompt(), valid.negative_prompt(), valid.seed()), ("a red circle", "", 7));
    assert!(!valid.seed_was_drawn());

    let batch_defaults = SpecDefaults { negative_prompt: "blurry".into(), ..defaults() };
    assert_eq!(spec().validate(&batch_defaults).unwrap().negative_prompt(), "blurry");
    let own = JobSpec { negative_prompt: Some(String::new()), ..spec() };
    assert_eq!(own.validate(&batch_defaults).unwrap().negative_prompt(), "");
}

#[test]
fn a_missing_seed_is_drawn() {
    let without = JobSpec { seed: None, ..spec() };
    let seeds: Vec<u32> = (0..8).map(|_| without.validate(&defaults()).unwrap().seed()).collect();
    assert!(seeds.iter().any(|seed| *seed != seeds[0]), "eight equal draws of 32 bits: {seeds:?}");
    assert!(without.validate(&defaults()).unwrap().seed_was_drawn());
    assert_eq!(without.validate(&defaults()).unwrap().without_drawn_seed().seed(), 0);
    assert_eq!(spec().validate(&defaults()).unwrap().without_drawn_seed().seed(), 7);
}

#[test]
fn all_faults_are_told_at_once() {
    let spec = JobSpec {
        prompt: " \n".into(),
        negative_prompt: Some("a\0b".into()),
        seed: Some(4_294_967_296),
        num_inference_steps: Some(1000),
        guidance_scale: Some(f32::NAN),
        width: Some(500),
        height: Some(2056),
        noise_scheduler: None,
        guidance_start: Some(-0.1),
        guidance_stop: Some(f64::NAN),
        cache_interval: Some(0),
        client_ref: Some("x".repeat(201)),
    };
    insta::assert_snapshot!(faults(&spec), @r#"
    `prompt` has to be text of 1 to 10000 characters, not all of them blank, but is blank
    `negative_prompt` has to be free of NUL characters, but is "a\0b"
    `client_ref` has to be text of at most 200 characters, but is 201 characters long
    `seed` has to be a whole number from 0 to 4294967295 (the noise generator keeps 32 bits), but is 4294967296
    `num_inference_steps` has to be a whole number from 1 to 999, but is 1000
    `guidance_scale` has to be a number from 0 to 50, but is NaN
    `width` has to be a multiple of 8, from 64 to 2048, but is 500
    `height` has to be a multiple of 8, from 64 to 2048, but is 2056
    `guidance_start` has to be a fraction of the steps, from 0 to 1, but is -0.1
    `guidance_stop` has to be a fraction of the steps, from 0 to 1, but is NaN
    `cache_interval` has to be a whole number of steps, from 1 to 999, but is 0
    "#);
}

#[test]
fn the_edges_are_where_the_messages_say() {
    let good = [
        JobSpec { seed: Some(0), ..spec() },
        JobSpec { seed: Some(4_294_967_295), ..spec() },
        JobSpec { num_inference_steps: Some(1), ..spec() },
        JobSpec { num_inference_steps: Some(999), ..spec() },
        JobSpec { guidance_scale: Some(0.0), ..spec() },
        JobSpec { guidance_scale: Some(50.0), ..spec() },
        JobSpec { width: Some(64), height: Some(2048), ..spec() },
        JobSpec { guidance_start: Some(1.0), guidance_stop: Some(1.0), ..spec() },
        JobSpec { guidance_stop: Some(0.0), ..spec() },
        JobSpec { cache_interval: Some(999), ..spec() },
        JobSpec { width: Some(2048), height: Some(1024), ..spec() },
        JobSpec { prompt: "é".repeat(10_000), ..spec() },
    ];
    for spec in good {
        assert!(spec.validate(&defaults()).is_ok(), "{spec:?}");
    }
    let bad = [
        JobSpec { num_inference_steps: Some(0), ..spec() },
        JobSpec { guidance_scale: Some(-0.1), ..spec() },
        JobSpec { guidance_scale: Some(50.1), ..spec() },
        JobSpec { guidance_scale: Some(f32::INFINITY), ..spec() },
        JobSpec { width: Some(56), ..spec() },
        JobSpec { height: Some(60), ..spec() },
        JobSpec { width: Some(2048), height: Some(1032), ..spec() },
        JobSpec { guidance_stop: Some(1.1), ..spec() },
        JobSpec { guidance_start: Some(0.7), guidance_stop: Some(0.2), ..spec() },
        JobSpec { cache_interval: Some(1000), ..spec() },
        JobSpec { prompt: "é".repeat(10_001), ..spec() },
    ];
    let told: Vec<String> = bad.iter().map(faults).collect();
    insta::assert_snapshot!(told.join("\n"), @r#"
    `num_inference_steps` has to be a whole number from 1 to 999, but is 0
    `guidance_scale` has to be a number from 0 to 50, but is -0.1
    `guidance_scale` has to be a number from 0 to 50, but is 50.1
    `guidance_scale` has to be a number from 0 to 50, but is inf
    `width` has to be a multiple of 8, from 64 to 2048, but is 56
    `height` has to be a multiple of 8, from 64 to 2048, but is 60
    `width × height` has to be at most 2097152 pixels, but is 2048 × 1032 = 2113536
    `guidance_stop` has to be a fraction of the steps, from 0 to 1, but is 1.1
    `guidance_stop` has to be at least `guidance_start` (0.7), but is 0.2
    `cache_interval` has to be a whole number of steps, from 1 to 999, but is 1000
    `prompt` has to be text of 1 to 10000 characters, not all of them blank, but is 10001 characters long
    "#);
}

#[test]
fn cells_are_read_as_their_field() {
    let mut spec = JobSpec::default();
    for (field, text) in [
        (SpecField::Prompt, "a red circle, large"),
        (SpecField::Seed, " 7 "),
        (SpecField::NumInferenceSteps, "20"),
        (SpecField::GuidanceScale, "7.5"),
        (SpecField::NoiseScheduler, "euler_a"),
        (SpecField::GuidanceStop, " 0.7 "),
        (SpecField::CacheInterval, "3"),
        (SpecField::Width, ""),
        (SpecField::ClientRef, "row 1"),
    ] {
        spec.set(field, text).unwrap();
    }
    let expected = JobSpec {
        prompt: "a red circle, large".into(),
        seed: Some(7),
        num_inference_steps: Some(20),
        guidance_scale: Some(7.5),
        noise_scheduler: Some(NoiseScheduler::EulerA),
        guidance_stop: Some(0.7),
        cache_interval: Some(3),
        client_ref: Some("row 1".into()),
        ..JobSpec::default()
    };
    assert_eq!(spec, expected);
}

#[test]
fn cells_that_cannot_be_read_are_told_with_the_whole_rule() {
    let told: Vec<String> = [
        (SpecField::Width, "-512"),
        (SpecField::Height, "512px"),
        (SpecField::Seed, "-1"),
        (SpecField::Seed, "99999999999999999999"),
        (SpecField::NumInferenceSteps, "20.5"),
        (SpecField::GuidanceScale, "high"),
        (SpecField::NoiseScheduler, "k_euler"),
        (SpecField::GuidanceStart, "half"),
        (SpecField::CacheInterval, "2.5"),
    ]
    .into_iter()
    .map(|(field, text)| JobSpec::default().set(field, text).unwrap_err().to_string())
    .collect();
    insta::assert_snapshot!(told.join("\n"), @r#"
    `width` has to be a multiple of 8, from 64 to 2048, but is "-512"
    `height` has to be a multiple of 8, from 64 to 2048, but is "512px"
    `seed` has to be a whole number from 0 to 4294967295 (the noise generator keeps 32 bits), but is "-1"
    `seed` has to be a whole number from 0 to 4294967295 (the noise generator keeps 32 bits), but is "99999999999999999999"
    `num_inference_steps` has to be a whole number from 1 to 999, but is "20.5"
    `guidance_scale` has to be a number from 0 to 50, but is "high"
    `scheduler` has to be one of pndm, ddim, euler, euler_a, dpmpp_2m, dpmpp_2m_karras, unipc, lms, but is "k_euler"
    `guidance_start` has to be a fraction of the steps, from 0 to 1, but is "half"
    `cache_interval` has to be a whole number of steps, from 1 to 999, but is "2.5"
    "#);
}

#[test]
fn json_values_have_to_have_the_fields_type() {
    let mut spec = JobSpec::default();
    spec.set_json(SpecField::Prompt, &json!("a red circle")).unwrap();
    spec.set_json(SpecField::Seed, &json!(7)).unwrap();
    spec.set_json(SpecField::GuidanceScale, &json!(7)).unwrap();
    spec.set_json(SpecField::Width, &json!(null)).unwrap();
    assert_eq!((spec.prompt.as_str(), spec.seed, spec.guidance_scale), ("a red circle", Some(7), Some(7.0)));
    let told: Vec<String> = [
        (SpecField::Prompt, json!(7)),
        (SpecField::Seed, json!("7")),
        (SpecField::Seed, json!(1e3)),
        (SpecField::Width, json!([512])),
        (SpecField::NoiseScheduler, json!("k_euler")),
    ]
    .into_iter()
    .map(|(field, value)| JobSpec::default().set_json(field, &value).unwrap_err().to_string())
    .collect();
    insta::assert_snapshot!(told.join("\n"), @r#"
    `prompt` has to be text of 1 to 10000 characters, not all of them blank, but is 7
    `seed` has to be a whole number from 0 to 4294967295 (the noise generator keeps 32 bits), but is "7"
    `seed` has to be a whole number from 0 to 4294967295 (the noise generator keeps 32 bits), but is 1000.0
    `width` has to be a multiple of 8, from 64 to 2048, but is [512]
    `scheduler` has to be one of pndm, ddim, euler, euler_a, dpmpp_2m, dpmpp_2m_karras, unipc, lms, but is "k_euler"
    "#);
}

#[test]
fn fields_are_known_by_their_names() {
    for &field in SpecField::ALL {
        assert_eq!(field.as_str().parse(), Ok(field));
    }
    insta::assert_snapshot!(
        "promt".parse::<SpecField>().unwrap_err(),
        @"`promt` is not a field of a job; it has to be one of prompt, negative_prompt, seed, num_inference_steps, guidance_scale, width, height, scheduler, guidance_start, guidance_stop, cache_interval, client_ref"
    );
}

#[test]
fn bad_defaults_are_told_once() {
    assert_eq!(defaults().validate(), Ok(()));
    let faults = SpecDefaults { width: 100, ..defaults() }.validate().unwrap_err();
    insta::assert_snapshot!(faults[0], @"`width` has to be a multiple of 8, from 64 to 2048, but is 100");
}

#[test]
fn long_values_are_cut() {
    let fault = JobSpec::default().set(SpecField::Seed, &"9".repeat(1000)).unwrap_err();
    assert!(fault.to_string().len() < 250, "{fault}");
}

#[test]
fn a_valid_spec_is_read_back_by_the_same_rules() {
    let valid = spec().validate(&defaults()).unwrap();
    let json = serde_json::to_string(&valid).unwrap();
    assert_eq!(serde_json::from_str::<ValidJobSpec>(&json).unwrap(), valid);
    let bad = json.replace("\"width\":512", "\"width\":500");
    insta::assert_snapshot!(
        serde_json::from_str::<ValidJobSpec>(&bad).unwrap_err(),
        @"`width` has to be a multiple of 8, from 64 to 2048, but is 500"
    );
}

#[test]
fn nobody_gets_a_recipe_who_did_not_ask_for_one() {
    assert_eq!(spec().validate(&defaults()).unwrap().recipe(), Recipe::EXACT);
    let mended = Recipe { guidance_stop: 0.8, cache_interval: 3, ..Recipe::EXACT };
    let of_batch = SpecDefaults { recipe: mended, ..defaults() };
    assert_eq!(spec().validate(&of_batch).unwrap().recipe(), mended);
    // A line wins over its batch, field by field, also to have the exact picture again.
    let line = JobSpec { cache_interval: Some(1), ..spec() };
    assert_eq!(line.validate(&of_batch).unwrap().recipe(), Recipe { cache_interval: 1, ..mended });
    let exact = JobSpec { guidance_stop: Some(1.0), guidance_start: Some(-0.0), ..line };
    assert!(exact.validate(&of_batch).unwrap().recipe().is_exact(), "negative zero is zero");
}

/// A batch's digest is taken over these bytes: with others, a submission repeated after an upgrade would be a conflict.
#[test]
fn an_exact_spec_is_written_as_before_there_were_recipes() {
    let json = |spec: JobSpec| serde_json::to_string(&spec.validate(&defaults()).unwrap()).unwrap();
    insta::assert_snapshot!(json(spec()), @r#"{"prompt":"a red circle","negative_prompt":"","seed":7,"num_inference_steps":50,"guidance_scale":7.5,"width":512,"height":512,"noise_scheduler":"pndm","client_ref":null}"#);
    let cached = JobSpec { guidance_stop: Some(0.7), cache_interval: Some(3), ..spec() };
    assert_eq!(
        serde_json::from_str::<ValidJobSpec>(&json(cached.clone())).unwrap(),
        cached.validate(&defaults()).unwrap()
    );
    insta::assert_snapshot!(json(cached), @r#"{"prompt":"a red circle","negative_prompt":"","seed":7,"num_inference_steps":50,"guidance_scale":7.5,"width":512,"height":512,"noise_scheduler":"pndm","guidance_start":0.0,"guidance_stop":0.7,"cache_interval":3,"client_ref":null}"#);
}

#[test]
fn a_recipe_is_part_of_what_a_microbatch_shares() {
    let key = |spec: JobSpec| spec.validate(&defaults()).unwrap().microbatch_key();
    assert_eq!(key(spec()).to_string(), "512x512/50/pndm/cfg");
    let cached = key(JobSpec { cache_interval: Some(3), ..spec() });
    let guided = key(JobSpec { guidance_start: Some(0.1), guidance_stop: Some(0.7), ..spec() });
    assert_eq!(cached.to_string(), "512x512/50/pndm/cfg/0-1/3");
    assert_eq!(guided.to_string(), "512x512/50/pndm/cfg/0.1-0.7/1");
    assert!(cached != guided && cached != key(spec()) && guided != key(spec()));
}

#[test]
fn guidance_of_one_or_less_is_none() {
    let key = |guidance_scale| {
        let spec = JobSpec { guidance_scale: Some(guidance_scale), ..spec() };
        spec.validate(&defaults()).unwrap().microbatch_key().to_string()
    };
    assert_eq!(key(1.0), "512x512/50/pndm/plain");
    assert_eq!(key(1.01), "512x512/50/pndm/cfg");
}

proptest! {
    /// Whatever the numbers are: a spec passes exactly when it keeps every rule, and then keeps what it was given.
    #[test]
    fn a_spec_passes_exactly_when_it_keeps_every_rule(
        prompt in "[ a-z\u{0}]{0,4}",
        seed in prop_oneof![0_u64..10, 4_294_967_290_u64..4_294_967_300, any::<u64>()],
        steps in prop_oneof![0_u32..3, 997_u32..1002, any::<u32>()],
        guidance in prop_oneof![-1.0_f32..60.0, any::<f32>()],
        width in prop_oneof![(0_u32..300).prop_map(|eights| eights * 8), 0_u32..2100, any::<u32>()],
        height in prop_oneof![(0_u32..300).prop_map(|eights| eights * 8), 0_u32..2100, any::<u32>()],
        (guidance_start, guidance_stop) in (-0.1..1.1, prop_oneof![-0.1..1.1, any::<f64>()]),
        cache_interval in prop_oneof![0_u32..3, 997_u32..1002, any::<u32>()],
    ) {
        let spec = JobSpec {
            prompt: prompt.clone(),
            seed: Some(seed),
            num_inference_steps: Some(steps),
            guidance_scale: Some(guidance),
            width: Some(width),
            height: Some(height),
            guidance_start: Some(guidance_start),
            guidance_stop: Some(guidance_stop),
            cache_interval: Some(cache_interval),
            ..JobSpec::default()
        };
        let side_is_good = |side: u32| side.is_multiple_of(8) && (64..=2048).contains(&side);
        let is_good = !prompt.trim().is_empty()
            && !prompt.contains('\0')
            && seed < 1 << 32
            && (1..1000).contains(&steps)
            && (0.0..=50.0).contains(&guidance)
            && side_is_good(width)
            && side_is_good(height)
            && u64::from(width) * u64::from(height) <= 2_097_152
            && 0.0 <= guidance_start
            && guidance_start <= guidance_stop
            && guidance_stop <= 1.0
            && (1..1000).contains(&cache_interval);
        match spec.validate(&defaults()) {
            Ok(valid) => {
                prop_assert!(is_good, "{:?}", spec);
                prop_assert_eq!(u64::from(valid.seed()), seed);
                prop_assert_eq!((valid.width(), valid.height()), (width, height));
                prop_assert_eq!((valid.num_inference_steps(), valid.guidance_scale()), (steps, guidance));
                prop_assert_eq!(valid.recipe(), Recipe { guidance_start, guidance_stop, cache_interval });
            }
            Err(faults) => {
                prop_assert!(!is_good, "{:?}", faults);
                prop_assert!(!faults.is_empty());
            }
        }
    }

    #[test]
    fn no_cell_makes_the_reader_panic(field in prop::sample::select(SpecField::ALL), text: String) {
        let mut spec = spec();
        if spec.set(field, &text).is_ok() {
            let _ = spec.validate(&defaults());
        }
    }
}
