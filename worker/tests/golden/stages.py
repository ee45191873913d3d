"""Golden tensors of single stages: text encoder, UNet and its blocks, VAE decoder, image processor, safety checker."""

import inspect
from types import SimpleNamespace

import numpy as np
import torch
from diffusers.pipelines.stable_diffusion.safety_checker import cosine_distance

from checkpoints import test_images

PROMPTS = [
    "a photograph of an astronaut riding a horse",
    "",
    "A painting of a squirrel eating a burger",
    "Hello,   World!!  It's 2022",
    "naïve café — “quotes” 漢字 🙂",
    "&lt;b&gt; &amp;",
    "a<|endoftext|>b",
    "<|startoftext|>x <|endoftext|>",
    "tab\tnew\nline\u00a0no-break  end ",
    "cafe\u0301 A\u030angstro\u0308m",
    "ΑΣ straße İstanbul ﬁ ½ Ⅷ",
    "we'll they've I'm DON'T 100% 3D v1.5",
    "   ",
    "zero\u200bwidth \ufeffmark ñ\u0303",
    "@" * 3 + " @" * 74,
    "@ " * 75,
    "@ " * 76,
    "a very long prompt about the northern lights above a cozy cabin, " * 12,
]


def tokens(tokenizer) -> list[dict]:
    """Ids padded to 77 as StableDiffusionPipeline.encode_prompt makes them, and the text that it says was removed."""
    rows = []
    for prompt in PROMPTS:
        ids = tokenizer(prompt, padding="max_length", max_length=77, truncation=True).input_ids
        untruncated = tokenizer(prompt, padding="longest").input_ids
        removed = tokenizer.batch_decode([untruncated[76:-1]])[0] if len(untruncated) > 77 else ""
        rows.append({"prompt": prompt, "input_ids": ids, "untruncated_length": len(untruncated), "removed": removed})
    return rows


def flatten(prefix: str, value) -> dict[str, torch.Tensor]:
    if isinstance(value, torch.Tensor):
        return {prefix: value.detach().clone().contiguous()}
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, (tuple, list)):
        return {k: v for i, item in enumerate(value) for k, v in flatten(f"{prefix}.{i}", item).items()}
    return {}


def record(model, names: list[str], run) -> dict[str, torch.Tensor]:
    """Runs `run()` and returns `<module>.in.<parameter>` and `<module>.out` of the named modules, first call each."""
    taken, handles = {}, []
    for name in names:
        module = model.get_submodule(name)

        def hook(module, args, kwargs, output, name=name):
            if any(key.startswith(f"{name}.") and key[len(name) + 1 :].split(".")[0] in ("in", "out") for key in taken):
                return
            bound = inspect.signature(module.forward).bind(*args, **kwargs)
            for parameter, value in bound.arguments.items():
                taken.update(flatten(f"{name}.in.{parameter}", value))
            taken.update(flatten(f"{name}.out", output))

        handles.append(module.register_forward_hook(hook, with_kwargs=True))
    run()
    for handle in handles:
        handle.remove()
    return taken


def text_encoder(parts: SimpleNamespace) -> dict[str, torch.Tensor]:
    ids = torch.tensor([row["input_ids"] for row in tokens(parts.tokenizer)])
    names = ["embeddings", "encoder.layers.0", "encoder.layers.0.self_attn", "encoder.layers.0.mlp"]
    taken = record(parts.text_encoder, names, lambda: parts.text_encoder(ids[:2]))
    return {"input_ids": ids, "last_hidden_state": parts.text_encoder(ids)[0]} | {
        f"blocks.{key}": value for key, value in taken.items() if value.is_floating_point() and "mask" not in key}


def unet(parts: SimpleNamespace) -> dict[str, torch.Tensor]:
    model, generator = parts.unet, torch.Generator().manual_seed(100)
    width = model.config.cross_attention_dim
    randn = lambda *shape: torch.randn(*shape, generator=generator)
    sample, states = randn(2, 4, 16, 8), randn(2, 77, width)
    blocks = [name for name, _ in model.named_children() if name in ("conv_in", "time_embedding", "mid_block", "conv_out")]
    blocks += [f"{side}.{i}" for side in ("down_blocks", "up_blocks") for i in range(len(getattr(model, side)))]
    last = len(model.up_blocks) - 1
    if parts.name == "small":
        blocks += ["down_blocks.0.resnets.0", "down_blocks.0.resnets.1", "down_blocks.1.resnets.0",
                   "down_blocks.0.downsamplers.0", "down_blocks.1.attentions.0",
                   "down_blocks.1.attentions.0.transformer_blocks.0",
                   "down_blocks.1.attentions.0.transformer_blocks.0.attn2",
                   "down_blocks.1.attentions.0.transformer_blocks.0.ff", "up_blocks.0.upsamplers.0",
                   f"up_blocks.{last}.resnets.2"]
    taken = record(model, blocks, lambda: model(sample, 481, states))
    golden = {f"blocks.{key}": value for key, value in taken.items()}
    timesteps = torch.tensor([0.0, 1.0, 2.0, 500.0, 981.0, 999.0, 946.4211, 52.578903, 0.55], dtype=torch.float32)
    golden |= {"time_proj.timesteps": timesteps, "time_proj.out": model.time_proj(timesteps)}
    golden |= {"time_embedding.out": model.time_embedding(model.time_proj(timesteps))}
    golden |= {"sample": sample, "encoder_hidden_states": states, "output_timesteps": timesteps}
    for i, timestep in enumerate(timesteps):
        golden[f"output.{i}"] = model(sample, timestep, states).sample
    for height, width in ((9, 13), (7, 10), (32, 32)):
        odd = randn(1, 4, height, width)
        golden |= {f"sample_{height}x{width}": odd, f"output_{height}x{width}": model(odd, 321, states[:1]).sample}
    return golden


def vae(parts: SimpleNamespace) -> dict[str, torch.Tensor]:
    model, generator = parts.vae, torch.Generator().manual_seed(101)
    latents = torch.randn(2, 4, 6, 4, generator=generator) * 0.9
    blocks = ["post_quant_conv", "decoder.conv_in", "decoder.mid_block", "decoder.mid_block.attentions.0",
              "decoder.mid_block.resnets.0", "decoder.up_blocks.0", "decoder.up_blocks.0.upsamplers.0"]
    taken = record(model, blocks, lambda: model.decode(latents[:1]))
    odd = torch.randn(1, 4, 5, 7, generator=generator)
    return {f"blocks.{key}": value for key, value in taken.items()} | {
        "latents": latents, "image": model.decode(latents).sample, "latents_5x7": odd, "image_5x7": model.decode(odd).sample}


def safety_scores(checker, pixel_values: torch.Tensor) -> dict[str, torch.Tensor]:
    """What StableDiffusionSafetyChecker.forward computes and keeps to itself, by its own steps."""
    pooled = checker.vision_model(pixel_values)[1]
    embeds = checker.visual_projection(pooled)
    special = cosine_distance(embeds, checker.special_care_embeds).float().numpy()
    cosine = cosine_distance(embeds, checker.concept_embeds).float().numpy()
    special_scores, concept_scores = np.zeros_like(special), np.zeros_like(cosine)
    for i in range(len(embeds)):
        adjustment = 0.0
        for k in range(special.shape[1]):
            score = round(special[i][k] - checker.special_care_embeds_weights[k].item() + adjustment, 3)
            special_scores[i][k] = score
            if score > 0:
                adjustment = 0.01
        for k in range(cosine.shape[1]):
            concept_scores[i][k] = round(cosine[i][k] - checker.concept_embeds_weights[k].item() + adjustment, 3)
    verdicts = (concept_scores > 0).any(axis=1)
    _, forward = checker(pixel_values, [np.ones(1) for _ in verdicts])
    assert forward == verdicts.tolist()
    return {"pooled": pooled, "image_embeds": embeds, "special_cosines": torch.from_numpy(special),
            "concept_cosines": torch.from_numpy(cosine), "special_care_scores": torch.from_numpy(special_scores),
            "concept_scores": torch.from_numpy(concept_scores),
            "has_nsfw_concept": torch.tensor(verdicts, dtype=torch.uint8)}


def safety_checker(parts: SimpleNamespace) -> dict[str, torch.Tensor]:
    size = parts.feature_extractor.crop_size["height"]
    images = test_images(size)
    pixel_values = parts.feature_extractor(images, return_tensors="pt").pixel_values
    golden = {f"images.{i}": torch.from_numpy(image) for i, image in enumerate(images)}
    # The crop before /255 and normalization, (height, width, 3) in uint8. At 224, where a picture is large, a wide, a
    # tall and an enlarged one must do, and the f32 values are `tiny`'s affair.
    for i, image in enumerate(images):
        if size > 100 and i not in (1, 2, 5):
            continue
        crop = parts.feature_extractor(image, do_rescale=False, do_normalize=False, return_tensors="np").pixel_values[0]
        golden[f"crops.{i}"] = torch.from_numpy(crop.transpose(1, 2, 0).astype(np.uint8).copy())
    for i in range(len(images) if size < 100 else 0):
        golden[f"pixel_values.{i}"] = pixel_values[i].contiguous()
    scores = safety_scores(parts.safety_checker, pixel_values)
    assert scores["has_nsfw_concept"].tolist() == [0, 1, 1, 0, 0, 0], scores
    taken = record(parts.safety_checker, ["vision_model.embeddings", "vision_model.encoder.layers.0"],
                   lambda: parts.safety_checker.vision_model(pixel_values[:1]))
    blocks = {f"blocks.{key}": value for key, value in taken.items() if "pixel_values" not in key and "mask" not in key}
    return golden | scores | blocks
