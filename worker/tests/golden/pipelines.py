"""Golden runs of diffusers' StableDiffusionPipeline: initial latents, latents after steps, pictures, verdicts."""

from types import SimpleNamespace

import diffusers
import numpy as np
import torch
from diffusers import StableDiffusionPipeline

from checkpoints import PNDM_CONFIG
from stages import safety_scores

# Our names of the noise schedulers, with diffusers' class and what is set besides the checkpoint's own config.
KINDS = {
    "pndm": ("PNDMScheduler", {}),
    "ddim": ("DDIMScheduler", {}),
    "euler": ("EulerDiscreteScheduler", {}),
    "euler_a": ("EulerAncestralDiscreteScheduler", {}),
    "dpmpp_2m": ("DPMSolverMultistepScheduler", {}),
    "dpmpp_2m_karras": ("DPMSolverMultistepScheduler", {"use_karras_sigmas": True}),
    "unipc": ("UniPCMultistepScheduler", {}),
    "lms": ("LMSDiscreteScheduler", {}),
}
PROMPT, NEGATIVE = "a small red circle on a blue background", "blurry, low quality"
SECOND = ("two yellow triangles beside a purple star", "")


def scheduler_of(kind: str, config: dict):
    """The class's `from_config` on the checkpoint's JSON; the pipeline's constructor then patches it."""
    name, overrides = KINDS[kind]
    return getattr(diffusers, name).from_config(config, **overrides)


def runs(name: str) -> list[dict]:
    """Every run by its parameters, in the words that the Rust test reads from <name>-stages/pipeline.json."""
    # `tiny` has 2 pixels to a latent cell, `small` has 8.
    side, non_square = (32, (24, 40)) if name == "tiny" else (64, (72, 104))
    default = {"scheduler": "pndm", "prompts": [PROMPT], "negative_prompts": [NEGATIVE], "seeds": [42],
               "num_inference_steps": 8, "guidance_scale": 7.5, "height": side, "width": side, "dtype": "f32"}
    both = {"prompts": [PROMPT, SECOND[0]], "negative_prompts": [NEGATIVE, SECOND[1]], "seeds": [42, 7]}
    listed = {kind: {"scheduler": kind} for kind in KINDS} | {
        "pndm_50": {"num_inference_steps": 50},
        "guidance_1": {"guidance_scale": 1.0},
        "non_square": {"height": non_square[0], "width": non_square[1], "scheduler": "dpmpp_2m"},
        "two_prompts": both | {"scheduler": "euler_a"},
        "two_prompts_pndm": both,
        "default_size": {"height": None, "width": None, "scheduler": "ddim"},
        "bf16": {"dtype": "bf16"}, "f16": {"dtype": "f16", "scheduler": "euler_a"},
    }
    return [{"name": run} | default | changes for run, changes in listed.items()]


def pixels(images) -> torch.Tensor:
    return torch.from_numpy(np.stack([np.asarray(image) for image in images]))


def run_pipeline(parts: SimpleNamespace, run: dict) -> dict[str, torch.Tensor]:
    dtype = {"f32": torch.float32, "bf16": torch.bfloat16, "f16": torch.float16}[run["dtype"]]
    config = PNDM_CONFIG | ({} if parts.old else {"clip_sample": False})
    pipe = StableDiffusionPipeline(
        vae=parts.vae, text_encoder=parts.text_encoder, tokenizer=parts.tokenizer, unet=parts.unet,
        scheduler=scheduler_of(run["scheduler"], config), safety_checker=parts.safety_checker,
        feature_extractor=parts.feature_extractor)
    pipe.to(dtype=dtype).set_progress_bar_config(disable=True)
    generators = [torch.Generator().manual_seed(seed) for seed in run["seeds"]]
    for key in ("height", "width"):
        run[key] = run[key] or pipe.unet.config.sample_size * pipe.vae_scale_factor
    noise = [torch.randn(1, 4, run["height"] // pipe.vae_scale_factor, run["width"] // pipe.vae_scale_factor,
                         generator=torch.Generator().manual_seed(seed), dtype=dtype) for seed in run["seeds"]]
    after = []
    output = pipe(
        run["prompts"], negative_prompt=run["negative_prompts"], generator=generators, height=run["height"],
        width=run["width"], num_inference_steps=run["num_inference_steps"], guidance_scale=run["guidance_scale"],
        callback_on_step_end=lambda pipe, i, t, kept: after.append(kept["latents"].clone()) or {})
    image = pipe.vae.decode(after[-1] / pipe.vae.config.scaling_factor).sample
    unchecked = pipe.image_processor.postprocess(image, output_type="pil")
    values = pipe.feature_extractor(unchecked, return_tensors="pt").pixel_values.to(dtype)
    scores = safety_scores(pipe.safety_checker, values)
    assert scores["has_nsfw_concept"].bool().tolist() == output.nsfw_content_detected
    steps = len(after)
    kept = range(steps) if steps < 12 else [0, 1, 2, 9, 19, 29, 39, steps - 1]
    if run["name"] == "default_size":
        kept = [steps - 1]
    golden = {"initial_latents": torch.cat(noise) * pipe.scheduler.init_noise_sigma,
              "timesteps": pipe.scheduler.timesteps.double(), "pixels": pixels(unchecked),
              "checked_pixels": pixels(output.images)} | {f"latents.{i}": after[i] for i in kept}
    if run["name"] in ("pndm", "non_square", "two_prompts"):
        golden["image"] = image
    wanted = ("image_embeds", "special_care_scores", "concept_scores", "has_nsfw_concept")
    golden |= {key: scores[key] for key in wanted}
    pipe.to(dtype=torch.float32)
    return {f"{run['name']}.{key}": value.contiguous() for key, value in golden.items()}
