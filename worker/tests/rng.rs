//! Noise against `torch.randn` (`tests/golden/noise.safetensors`), bit for bit.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::collections::BTreeMap;
use std::path::Path;

use tch::{Kind, Tensor};
use worker::diffusion::rng::{Generator, RngError, randn_tensor};

fn golden() -> BTreeMap<String, Tensor> {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/noise.safetensors");
    Tensor::read_safetensors(path).unwrap().into_iter().collect()
}

fn kind_of(dtype: &str) -> Kind {
    match dtype {
        "f32" => Kind::Float,
        "f16" => Kind::Half,
        "bf16" => Kind::BFloat16,
        dtype => panic!("unknown dtype {dtype}"),
    }
}

/// Every element as its bits, so that zeros of different sign differ.
fn bits(tensor: &Tensor) -> Vec<i64> {
    let kind = if tensor.kind() == Kind::Float { Kind::Int } else { Kind::Int16 };
    Vec::try_from(tensor.view_dtype(kind).to_kind(Kind::Int64).flatten(0, -1)).unwrap()
}

fn assert_same_bits(name: &str, drawn: &Tensor, expected: &Tensor) {
    assert_eq!(drawn.size(), expected.size(), "{name}");
    assert_eq!(drawn.kind(), expected.kind(), "{name}");
    let (drawn, expected) = (bits(drawn), bits(expected));
    let different = drawn.iter().zip(&expected).filter(|(a, b)| a != b).count();
    assert_eq!(different, 0, "{name}: {different} of {} elements differ", drawn.len());
}

#[test]
fn randn_equals_torch_bit_for_bit() {
    let mut compared = 0;
    for (name, expected) in golden() {
        let parts: Vec<&str> = name.split('.').collect();
        let Ok(seed) = parts[0].parse() else { continue };
        let shape: Vec<i64> = parts[2].split('x').map(|side| side.parse().unwrap()).collect();
        let drawn = Generator::new(seed).randn(&shape, kind_of(parts[1])).unwrap();
        assert_same_bits(&name, &drawn, &expected);
        compared += 1;
    }
    assert!(compared > 90, "only {compared} draws were compared");
}

/// A draw of fewer than 16 elements leaves half a pair behind, which the next such draw takes, whatever came between.
#[test]
fn successive_draws_of_one_generator_equal_torch() {
    let mut generator = Generator::new(3);
    let draws: BTreeMap<String, Tensor> =
        golden().into_iter().filter(|(name, _)| name.starts_with("sequence.")).collect();
    assert_eq!(draws.len(), 6);
    for (name, expected) in draws {
        let parts: Vec<&str> = name.split('.').collect();
        let drawn = generator.randn(&[parts[3].parse().unwrap()], kind_of(parts[2])).unwrap();
        assert_same_bits(&name, &drawn, &expected);
    }
}

#[test]
fn only_the_low_32_bits_of_a_seed_matter() {
    for (seed, same) in [(0, 1 << 32), (5, 5 + (1 << 33)), (u64::from(u32::MAX), u64::MAX)] {
        let draw = |seed| Generator::new(seed).randn(&[40], Kind::Float).unwrap();
        assert_same_bits("low 32 bits", &draw(seed), &draw(same));
    }
}

#[test]
fn a_batch_is_its_pictures_one_by_one() {
    // 3 · 3 · 3 elements take the path of the last 16: one draw for the whole batch would give other noise.
    let seeds = [7, 8, 9];
    let mut generators = seeds.map(Generator::new);
    let batch = randn_tensor(&[3, 3, 3, 3], &mut generators, Kind::Float).unwrap();
    for (i, seed) in seeds.into_iter().enumerate() {
        let single = Generator::new(seed).randn(&[1, 3, 3, 3], Kind::Float).unwrap();
        assert_same_bits("picture of a batch", &batch.narrow(0, i as i64, 1), &single);
    }
}

#[test]
fn faults_are_named() {
    let error = randn_tensor(&[2, 4, 8, 8], &mut [Generator::new(0)], Kind::Float).unwrap_err();
    assert_eq!(
        error.to_string(),
        "`generators` must have one generator per picture of the batch, 2, but has 1"
    );
    assert!(matches!(Generator::new(0).randn(&[4], Kind::Int), Err(RngError::UnsupportedKind(Kind::Int))));
    assert!(Generator::new(0).randn(&[-1, 4], Kind::Float).is_err());
    assert_eq!(Generator::new(0).randn(&[0], Kind::Float).unwrap().size(), [0]);
}
