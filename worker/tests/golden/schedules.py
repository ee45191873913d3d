"""Golden noise, and golden timesteps, sigmas and trajectories of diffusers' schedulers under a dummy model."""

import numpy as np
import torch
from diffusers import StableDiffusionPipeline

from checkpoints import PNDM_CONFIG
from pipelines import KINDS, scheduler_of

DTYPES = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}


def noise() -> dict[str, torch.Tensor]:
    """torch.randn of CPU generators, as `<seed>.<dtype>.<shape>`; `sequence.*` are draws of one generator in turn."""
    draw = lambda seed, dtype, *shape: torch.randn(
        *shape, generator=torch.Generator().manual_seed(seed), dtype=DTYPES[dtype])
    golden = {}
    for seed in (0, 1, 42, 1234, 2**32 + 5):
        for dtype in DTYPES:
            for shape in ((1, 4, 8, 8), (15,), (1,), (16,), (17,), (31,)):
                golden[f"{seed}.{dtype}.{'x'.join(map(str, shape))}"] = draw(seed, dtype, *shape)
        golden[f"{seed}.f32.1x4x64x64"] = draw(seed, "f32", 1, 4, 64, 64)
    for seed, dtype, side in ((0, "f16", 64), (42, "f16", 64), (0, "bf16", 64), (42, "bf16", 64), (0, "f32", 65),
                              (42, "f16", 65)):
        golden[f"{seed}.{dtype}.1x4x{side}x{side}"] = draw(seed, dtype, 1, 4, side, side)
    # A short draw keeps half a pair for the next short draw, whatever is drawn between.
    generator = torch.Generator().manual_seed(3)
    for i, (dtype, count) in enumerate((("f32", 3), ("f32", 40), ("f16", 5), ("f32", 16), ("bf16", 1), ("f32", 700))):
        golden[f"sequence.{i}.{dtype}.{count}"] = torch.randn(count, generator=generator, dtype=DTYPES[dtype])
    return golden


def cases() -> list[dict]:
    """Schedules by kind, config, number of steps and dtype, as the Rust test reads them from schedulers.json."""
    listed = []

    def add(kind, steps, change=None, dtype="f32", note="v1", start=0):
        listed.append({"name": f"{kind}.{steps}.{dtype}.{note}", "kind": kind, "num_inference_steps": steps,
                       "start": start, "dtype": dtype, "config": PNDM_CONFIG | (change or {})})

    for kind in KINDS:
        for steps in (1, 2, 4, 20, 30, 50):
            add(kind, steps)
        add(kind, 999)
        for dtype in ("f16", "bf16"):
            add(kind, 20, dtype=dtype)
            add(kind, 8, {"prediction_type": "v_prediction"}, dtype, "v_prediction")
        for spacing in ("leading", "linspace", "trailing"):
            add(kind, 9, {"timestep_spacing": spacing}, note=spacing)
        add(kind, 10, {"prediction_type": "v_prediction"}, note="v_prediction")
        add(kind, 10, {"beta_schedule": "linear", "beta_start": 0.0001, "beta_end": 0.02}, note="linear")
        add(kind, 10, {"beta_schedule": "squaredcos_cap_v2"}, note="cosine")
        betas = np.linspace(0.001, 0.3, 100).tolist()
        add(kind, 10, {"trained_betas": betas, "num_train_timesteps": 100}, note="trained")
        add(kind, 13, {"steps_offset": 0, "clip_sample": True, "num_train_timesteps": 500}, note="patched")
        # As image-to-image begins; PNDM then takes its second call for the one that repeats the first, which it is not.
        add(kind, 12, start=5, note="middle")
        bare = {key: None for key in ("set_alpha_to_one", "skip_prk_steps", "steps_offset")}
        add(kind, 10, bare, note="bare")
    for kind in ("pndm", "ddim"):
        add(kind, 10, {"set_alpha_to_one": True}, note="alpha_one")
    for kind in ("euler", "unipc", "lms"):
        add(kind, 12, {"use_karras_sigmas": True}, note="karras")
    for kind in ("euler", "dpmpp_2m", "dpmpp_2m_karras", "unipc"):
        add(kind, 12, {"final_sigmas_type": "sigma_min"}, note="sigma_min")
        add(kind, 20, {"final_sigmas_type": "sigma_min"}, note="sigma_min")
    for kind in ("dpmpp_2m", "unipc"):
        change = {"lower_order_final": False, "final_sigmas_type": "sigma_min"}
        add(kind, 12, change, note="lower_order_final")
        add(kind, 12, {"solver_type": "bh2"}, note="bh2")
    add("dpmpp_2m", 12, {"solver_type": "heun"}, note="heun")
    change = {"lower_order_final": False, "euler_at_final": True, "final_sigmas_type": "sigma_min"}
    add("dpmpp_2m", 12, change, note="euler_at_final")
    for steps in (4, 10):
        add("pndm", steps, {"skip_prk_steps": False}, note="prk")
    return listed


def patched(kind: str, config: dict):
    """The scheduler as it is after StableDiffusionPipeline's constructor took it."""
    config = {key: value for key, value in config.items() if value is not None}
    parts = dict.fromkeys(("vae", "text_encoder", "tokenizer", "unet", "safety_checker", "feature_extractor"))
    pipe = StableDiffusionPipeline(scheduler=scheduler_of(kind, config), requires_safety_checker=False, **parts)
    return pipe.scheduler


def dummy_model(sample: torch.Tensor, t: float) -> torch.Tensor:
    """The model of diffusers' own scheduler tests."""
    return sample * t / (t + 1)


def trajectory(case: dict) -> dict[str, torch.Tensor]:
    scheduler, dtype = patched(case["kind"], case["config"]), DTYPES[case["dtype"]]
    scheduler.set_timesteps(case["num_inference_steps"])
    generators = [torch.Generator().manual_seed(seed) for seed in (10, 11)]
    sample = torch.cat([torch.randn(1, 2, 3, 3, generator=generator, dtype=dtype) for generator in generators])
    original = torch.linspace(-2, 2, sample.numel()).reshape(sample.shape).to(dtype)
    golden = {"timesteps": scheduler.timesteps.double(), "init_noise_sigma": torch.tensor(scheduler.init_noise_sigma)}
    if hasattr(scheduler, "sigmas"):
        golden["sigmas"] = scheduler.sigmas
    index = min(3, len(scheduler.timesteps) - 1)
    if hasattr(scheduler, "set_begin_index"):
        scheduler.set_begin_index(index)
    golden["noisy"] = scheduler.add_noise(original, sample, scheduler.timesteps[index : index + 1])
    if hasattr(scheduler, "set_begin_index"):
        # Not by value: a schedule that opens with one timestep twice would begin at its second step.
        scheduler.set_begin_index(case["start"])
    sample, after = sample * scheduler.init_noise_sigma, []
    for t in scheduler.timesteps[case["start"] :]:
        model_output = dummy_model(scheduler.scale_model_input(sample, t), t.item())
        extra = {"generator": generators} if case["kind"] == "euler_a" else {}
        sample = scheduler.step(model_output, t, sample, **extra).prev_sample
        after.append(sample)
    # Each step of the short schedules, some and the last of the long ones.
    stride = 1 if len(after) < 25 else 7 if len(after) < 60 else 200
    golden["samples"] = torch.stack(after[::stride] + after[-1:])
    assert golden["samples"].isfinite().all(), case["name"]
    return {f"{case['name']}.{key}": value.contiguous() for key, value in golden.items()}


def schedules() -> tuple[list[dict], dict[str, torch.Tensor]]:
    """The cases and, by their names, their tensors."""
    golden = {}
    for case in cases():
        golden |= trajectory(case)
    return cases(), golden
