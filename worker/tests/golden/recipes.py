"""Golden runs of the recipes that leave out work: the plain loop over diffusers' own UNet, blocks and PNDMScheduler.

    python recipes.py      # writes <checkpoint>-stages/recipes.{json,safetensors} from the checkpoints that are there
"""

import json
from pathlib import Path

import torch
from safetensors.torch import save_file

import checkpoints
import pipelines

HERE = Path(__file__).parent


def runs(name: str) -> list[dict]:
    default = next(run for run in pipelines.runs(name) if run["name"] == "pndm")
    listed = {
        "guidance_interval": {"guidance_interval": [0.2, 0.7]},
        "cache_3": {"cache_interval": 3},
        "both": {"guidance_interval": [0.0, 0.5], "cache_interval": 3},
        "cache_2_euler": {"cache_interval": 2, "scheduler": "euler"},
    }
    return [default | {"name": run} | changes for run, changes in listed.items()]


class Unet:
    """A UNet that can run its outermost layer alone: DeepCache with branch 0."""

    def __init__(self, unet):
        self.unet, self.last = unet, unet.up_blocks[-1]
        # What the layer before the last gives is the first half of what the last ResNet is given.
        self.last.resnets[-1].register_forward_pre_hook(self.keep)

    def keep(self, module, inputs):
        self.deep = inputs[0][:, : inputs[0].shape[1] - self.unet.conv_in.out_channels].clone()

    def whole(self, sample, timestep, states):
        return self.unet(sample, timestep, encoder_hidden_states=states).sample

    def outermost(self, sample, timestep, states):
        unet, deep = self.unet, self.deep
        temb = unet.time_embedding(unet.time_proj(timestep.expand(sample.shape[0])).to(sample.dtype))
        hidden = self.last.resnets[-1](torch.cat([deep, unet.conv_in(sample)], dim=1), temb)
        self.deep = deep
        if hasattr(self.last, "attentions"):
            hidden = self.last.attentions[-1](hidden, encoder_hidden_states=states).sample
        return unet.conv_out(unet.conv_act(unet.conv_norm_out(hidden)))


def embed(parts, prompt: str) -> torch.Tensor:
    ids = parts.tokenizer(prompt, padding="max_length", max_length=77, truncation=True, return_tensors="pt").input_ids
    return parts.text_encoder(ids)[0]


def run_recipe(parts, unet: Unet, run: dict) -> dict[str, torch.Tensor]:
    start, stop = run.get("guidance_interval", [0.0, 1.0])
    interval = run.get("cache_interval", 1)
    config = pipelines.PNDM_CONFIG | ({} if parts.old else {"clip_sample": False})
    # The pipeline's constructor patches the scheduler's config; so is it done here.
    scheduler = pipelines.StableDiffusionPipeline(
        vae=parts.vae, text_encoder=parts.text_encoder, tokenizer=parts.tokenizer, unet=parts.unet,
        scheduler=pipelines.scheduler_of(run["scheduler"], config), safety_checker=None, feature_extractor=None,
        requires_safety_checker=False).scheduler
    scheduler.set_timesteps(run["num_inference_steps"])
    negative, positive = embed(parts, run["negative_prompts"][0]), embed(parts, run["prompts"][0])
    factor = 2 ** (len(parts.vae.config.block_out_channels) - 1)
    shape = (1, 4, run["height"] // factor, run["width"] // factor)
    latents = torch.randn(shape, generator=torch.Generator().manual_seed(run["seeds"][0]))
    latents = latents * scheduler.init_noise_sigma
    count, golden, samples = len(scheduler.timesteps), {}, None
    for i, timestep in enumerate(scheduler.timesteps):
        guided = int(start * count) <= i < int(stop * count)
        states = torch.cat([negative, positive]) if guided else positive
        given = scheduler.scale_model_input(latents, timestep).repeat(len(states), 1, 1, 1)
        # What was kept for another number of samples is of no use, until the next whole step.
        samples = len(states) if i % interval == 0 else samples if samples == len(states) else None
        predict = unet.whole if i % interval == 0 or samples is None else unet.outermost
        noise = predict(given, timestep, states)
        if guided:
            uncond, text = noise.chunk(2)
            noise = uncond + run["guidance_scale"] * (text - uncond)
        latents = scheduler.step(noise, timestep, latents).prev_sample
        golden[f"{run['name']}.latents.{i}"] = latents.clone().contiguous()
    return golden


@torch.no_grad()
def write(parts) -> None:
    listed, unet = runs(parts.name), Unet(parts.unet)
    tensors = {key: value for run in listed for key, value in run_recipe(parts, unet, run).items()}
    folder = HERE / f"{parts.name}-stages"
    save_file(tensors, folder / "recipes.safetensors")
    (folder / "recipes.json").write_text(json.dumps(listed, indent=1) + "\n")


def main() -> None:
    torch.set_num_threads(1)
    for name, old in (("tiny", False), ("small", True)):
        write(checkpoints.load_checkpoint(HERE / name, old))


if __name__ == "__main__":
    main()
