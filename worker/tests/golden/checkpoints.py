"""Two checkpoints of random weights in the diffusers folder layout, from the real classes.

`tiny` has the sizes (and the weights) of diffusers' own fast pipeline tests, f32 files, and key names as transformers 5
writes them. `small` has Stable Diffusion v1's structure at narrow width, f16 files, and the key names, JSON forms and
gaps of the files that early v1 checkpoints have.
"""

import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, PNDMScheduler, UNet2DConditionModel
from diffusers.pipelines.stable_diffusion import StableDiffusionSafetyChecker
from safetensors.torch import load_file, save_file
from transformers import CLIPConfig, CLIPImageProcessorPil, CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from tokenizer import VOCAB_SIZE, write_tokenizer

# scheduler/scheduler_config.json of Stable Diffusion v1-5, first revision.
PNDM_CONFIG = {
    "_class_name": "PNDMScheduler", "_diffusers_version": "0.6.0", "beta_end": 0.012, "beta_schedule": "scaled_linear",
    "beta_start": 0.00085, "num_train_timesteps": 1000, "set_alpha_to_one": False, "skip_prk_steps": True,
    "steps_offset": 1, "trained_betas": None,
}
# feature_extractor/preprocessor_config.json of v1-5, old and new form.
MEAN, STD = [0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711]


def preprocessor_config(size: int, old: bool) -> dict:
    shared = {"do_center_crop": True, "do_convert_rgb": True, "do_normalize": True, "do_resize": True,
              "image_mean": MEAN, "image_std": STD, "resample": 3}
    if old:
        return shared | {"crop_size": size, "size": size, "feature_extractor_type": "CLIPFeatureExtractor"}
    return shared | {"crop_size": {"height": size, "width": size}, "size": {"shortest_edge": size},
                     "do_rescale": True, "rescale_factor": 1 / 255, "image_processor_type": "CLIPImageProcessor"}


def seeded(build):
    torch.manual_seed(0)
    return build().eval().requires_grad_(False)


def text_config(**sizes) -> CLIPTextConfig:
    # bos, eos and pad are wrong on purpose, as in v1-5.
    return CLIPTextConfig(bos_token_id=0, eos_token_id=2, pad_token_id=1, vocab_size=VOCAB_SIZE, **sizes)


def build_tiny() -> SimpleNamespace:
    unet = seeded(lambda: UNet2DConditionModel(
        sample_size=32, in_channels=4, out_channels=4, block_out_channels=(4, 8), layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=8, norm_num_groups=2))
    vae = seeded(lambda: AutoencoderKL(
        block_out_channels=[4, 8], down_block_types=["DownEncoderBlock2D"] * 2, up_block_types=["UpDecoderBlock2D"] * 2,
        latent_channels=4, norm_num_groups=2))
    text_encoder = seeded(lambda: CLIPTextModel(text_config(
        hidden_size=8, intermediate_size=16, num_attention_heads=2, num_hidden_layers=2)))
    # These sums were taken from diffusers' fast tests' components elsewhere: the initialization is reproducible.
    for model, total in ((unet, 259.70618), (vae, 163.44859), (text_encoder, 40.64089)):
        assert abs(sum(p.double().sum() for p in model.parameters()).item() - total) < 1e-3
    return SimpleNamespace(name="tiny", unet=unet, vae=vae, text_encoder=text_encoder, old=False, image_size=32,
                           safety_checker=build_safety_checker(32, 8, 16, 32, 2, 2, 12))


def build_small() -> SimpleNamespace:
    unet = seeded(lambda: UNet2DConditionModel(
        sample_size=16, in_channels=4, out_channels=4, block_out_channels=(16, 32, 48, 48), layers_per_block=2,
        down_block_types=["CrossAttnDownBlock2D"] * 3 + ["DownBlock2D"],
        up_block_types=["UpBlock2D"] + ["CrossAttnUpBlock2D"] * 3,
        cross_attention_dim=32, attention_head_dim=8, norm_num_groups=8))
    vae = seeded(lambda: AutoencoderKL(
        block_out_channels=[16, 32, 32, 32], down_block_types=["DownEncoderBlock2D"] * 4,
        up_block_types=["UpDecoderBlock2D"] * 4, layers_per_block=2, latent_channels=4, norm_num_groups=8))
    text_encoder = seeded(lambda: CLIPTextModel(text_config(
        hidden_size=32, intermediate_size=64, num_attention_heads=4, num_hidden_layers=3)))
    # Gains: with default weights the output hardly depends on prompt and timestep.
    gained = ("attn2.to_v.weight", "attn2.to_out.0.weight", "time_embedding.linear_2.weight", "time_emb_proj.weight")
    for name, parameter in unet.named_parameters():
        if name.endswith(gained):
            parameter.mul_(4)
    unet.conv_out.weight.mul_(2)
    vae.decoder.conv_out.weight.mul_(2)
    for name, parameter in text_encoder.named_parameters():
        if name.endswith("weight") and ("mlp" in name or "proj" in name):
            parameter.mul_(4)
    small = SimpleNamespace(name="small", unet=unet, vae=vae, text_encoder=text_encoder, old=True, image_size=224,
                            safety_checker=build_safety_checker(224, 32, 32, 64, 4, 3, 16))
    for model in (unet, vae, text_encoder, small.safety_checker):
        model.half().float()  # The files are f16; what is computed here starts from the same values.
    return small


def build_safety_checker(image, patch, hidden, intermediate, heads, layers, projection) -> StableDiffusionSafetyChecker:
    config = CLIPConfig(projection_dim=projection, vision_config={
        "image_size": image, "patch_size": patch, "hidden_size": hidden, "intermediate_size": intermediate,
        "num_attention_heads": heads, "num_hidden_layers": layers, "projection_dim": projection})
    checker = seeded(lambda: StableDiffusionSafetyChecker(config))
    # Gains: with default weights all pictures have nearly one embedding.
    for name, parameter in checker.vision_model.named_parameters():
        if name.endswith("weight") and parameter.ndim > 1:
            parameter.mul_(8)
    return checker


def test_images(size: int) -> list[np.ndarray]:
    """Six pictures (height, width, 3) in uint8, square, wide, tall, to be scaled up and down to `size`."""
    shapes = [(size, size), (2 * size // 3, size + 7), (size + 9, size // 2), (size + 1, size), (41, 41), (23, 67)]
    random, images = np.random.RandomState(7), []
    for number, (height, width) in enumerate(shapes):
        y, x = np.mgrid[0:height, 0:width]
        waves = [np.sin((x * (c + 1) + y * (number - 2)) * 0.11 + c) + np.cos(y * 0.07 * (number + c)) for c in range(3)]
        image = 128 + 50 * np.stack(waves, axis=-1) + (number - 2) * 24 + random.normal(0, 6 * number, (height, width, 3))
        images.append(image.round().clip(0, 255).astype(np.uint8))
    return images


def choose_concepts(parts: SimpleNamespace, pictures: list[np.ndarray]) -> None:
    """Concepts and thresholds that take the test images through every branch of the checker, and that flag some of the
    pipelines' `pictures`, none of them narrowly."""
    checker, images = parts.safety_checker, test_images(parts.image_size)
    extractor = CLIPImageProcessorPil(**preprocessor_config(parts.image_size, False))
    pixel_values = extractor(images + pictures, return_tensors="pt").pixel_values
    embeds = F.normalize(checker.visual_projection(checker.vision_model(pixel_values)[1]))
    torch.manual_seed(1)
    concepts, specials = torch.randn(17, embeds.shape[1]), torch.randn(3, embeds.shape[1])
    concepts[4], concepts[16], concepts[9], concepts[7] = embeds[1], embeds[2], embeds[3], embeds[5]
    concepts[12] = embeds[len(images) + 3]
    specials[0], specials[1], specials[2] = embeds[4], embeds[2], F.normalize(embeds[2] + 0.3 * embeds[0], dim=0)
    cosines, special_cosines = embeds @ F.normalize(concepts).T, embeds @ F.normalize(specials).T
    weights, special_weights = cosines.max(dim=0).values + 0.05, special_cosines.max(dim=0).values + 0.05
    weights[4] = cosines[1, 4] - 0.02  # Image 1 is flagged.
    weights[16] = cosines[2, 16] + 0.005  # Image 2 is flagged by special care's 0.01 alone ...
    special_weights[1] = special_cosines[2, 1] - 0.02  # ... which this special concept switches on,
    special_weights[2] = special_cosines[2, 2] + 0.005  # so that a later one triggers too.
    special_weights[0] = special_cosines[4, 0] - 0.02  # Image 4 has special care only, and is not flagged.
    weights[9] = cosines[3, 9] + 0.005  # Image 3 has no special care and is not flagged.
    weights[7] = cosines[5, 7] - 0.0004  # Image 5 is over by what rounding to 3 decimals removes: not flagged.
    # Concept 12 parts the pipelines' pictures where they leave the widest gap, above all test images.
    ordered = cosines[:, 12].sort().values
    ordered = ordered[ordered >= cosines[: len(images), 12].max()]
    widest = (ordered[1:] - ordered[:-1]).argmax()
    weights[12] = (ordered[widest] + ordered[widest + 1]) / 2
    margins = (cosines[len(images) :] - weights).max(dim=1).values.abs()
    assert margins.min() > 0.02, margins
    checker.concept_embeds.copy_(concepts), checker.special_care_embeds.copy_(specials)
    checker.concept_embeds_weights.copy_(weights), checker.special_care_embeds_weights.copy_(special_weights)
    if parts.old:
        checker.half().float()


def write_json(path: Path, value: dict) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value, indent=2) + "\n")


def old_vae_key(key: str) -> str:
    for new, old in (("to_q", "query"), ("to_k", "key"), ("to_v", "value"), ("to_out.0", "proj_attn")):
        key = key.replace(f"mid_block.attentions.0.{new}.", f"mid_block.attentions.0.{old}.")
    return key


def rewrite(path: Path, target: Path, rename, extra: dict) -> None:
    state = {rename(key): value.half().contiguous() for key, value in load_file(path).items()}
    path.unlink()
    save_file(state | extra, target, metadata={"format": "pt"})


def save_checkpoint(parts: SimpleNamespace, folder: Path) -> None:
    """Writes the checkpoint, then (for `small`) gives its files their old names and spellings."""
    for name in ("unet", "vae", "text_encoder", "safety_checker"):
        getattr(parts, name).save_pretrained(folder / name, safe_serialization=True)
    write_tokenizer(folder / "tokenizer")
    write_json(folder / "scheduler/scheduler_config.json", PNDM_CONFIG | ({} if parts.old else {"clip_sample": False}))
    write_json(folder / "feature_extractor/preprocessor_config.json", preprocessor_config(parts.image_size, parts.old))
    write_json(folder / "model_index.json", {
        "_class_name": "StableDiffusionPipeline", "_diffusers_version": "0.6.0" if parts.old else "0.42.1",
        "feature_extractor": ["transformers", "CLIPFeatureExtractor" if parts.old else "CLIPImageProcessor"],
        "safety_checker": ["stable_diffusion", "StableDiffusionSafetyChecker"],
        "scheduler": ["diffusers", "PNDMScheduler"], "text_encoder": ["transformers", "CLIPTextModel"],
        "tokenizer": ["transformers", "CLIPTokenizer"], "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"]})
    if not parts.old:
        return
    position_ids = lambda count: torch.arange(count).unsqueeze(0)
    patches = (224 // 32) ** 2 + 1
    rewrite(folder / "text_encoder/model.safetensors", folder / "text_encoder/model.fp16.safetensors",
            lambda key: f"text_model.{key}", {"text_model.embeddings.position_ids": position_ids(77)})
    rewrite(folder / "safety_checker/model.safetensors", folder / "safety_checker/model.fp16.safetensors",
            lambda key: key.replace("vision_model.", "vision_model.vision_model.", 1),
            {"vision_model.vision_model.embeddings.position_ids": position_ids(patches)})
    weights = "diffusion_pytorch_model.safetensors"
    for name, rename in (("unet", lambda key: key), ("vae", old_vae_key)):
        rewrite(folder / name / weights, folder / name / "diffusion_pytorch_model.fp16.safetensors", rename, {})
    # The first revisions have no scaling_factor: its default rules.
    config = json.loads((folder / "vae/config.json").read_text())
    del config["scaling_factor"]
    write_json(folder / "vae/config.json", config)


def load_checkpoint(folder: Path, old: bool) -> SimpleNamespace:
    """Reads the files back with the real classes, so that the goldens come from what is on disk."""
    # `variant` is for the files named *.fp16.safetensors; the values are computed with in f32.
    options = {"torch_dtype": torch.float32, "variant": "fp16" if old else None}
    read = lambda kind, name: kind.from_pretrained(folder / name, **options).eval().requires_grad_(False)
    return SimpleNamespace(
        name=folder.name, old=old,
        unet=read(UNet2DConditionModel, "unet"), vae=read(AutoencoderKL, "vae"),
        text_encoder=read(CLIPTextModel, "text_encoder"),
        safety_checker=read(StableDiffusionSafetyChecker, "safety_checker"),
        tokenizer=CLIPTokenizer.from_pretrained(folder / "tokenizer"),
        scheduler=PNDMScheduler.from_pretrained(folder / "scheduler"),
        feature_extractor=CLIPImageProcessorPil.from_pretrained(folder / "feature_extractor"))


def same_weights(built: SimpleNamespace, loaded: SimpleNamespace) -> bool:
    pairs = [(getattr(built, name).state_dict(), getattr(loaded, name).state_dict())
             for name in ("unet", "vae", "text_encoder", "safety_checker")]
    return all(a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a) for a, b in pairs)
