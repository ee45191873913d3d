"""The pool that the text encoder and the UNet learn from: scenes, latents and shape maps, made once."""

import torch
from diffusers import AutoencoderKL

from training.pictures import draw_scene, rng_for
from training.vae import to_tensor, training_scene

POOL = 8000
BATCH = 16


def scene_and_rng(index):
    """The pool's scene `index`; its picture is drawn with the generator's next numbers."""
    rng = rng_for("pool", index)
    return training_scene(rng), rng


@torch.no_grad()
def train(rank, args):
    """Encode the pool; each process takes each n-th batch and writes its own file."""
    vae = AutoencoderKL.from_pretrained(f"{args.model}/vae", variant="fp16", torch_dtype=torch.float32)
    # Channels last and small batches: twice as fast on a CPU.
    vae = vae.to(args.device, memory_format=torch.channels_last).eval()
    indices, latents, maps = [], [], []
    starts = range(rank * BATCH, POOL, args.processes * BATCH)
    for count, start in enumerate(starts):
        block = range(start, min(start + BATCH, POOL))
        drawn = [draw_scene(*scene_and_rng(index)) for index in block]
        sample = to_tensor(torch.stack([torch.from_numpy(picture) for picture, _ in drawn]), args.device)
        with torch.autocast(args.device, torch.bfloat16, enabled=args.bf16):
            mean = vae.encode(sample).latent_dist.mean.float()
        indices.extend(block)
        latents.append((mean * vae.config.scaling_factor).half().cpu())
        maps.extend(torch.from_numpy(shape_map).to(torch.uint8) for _, shape_map in drawn)
        if count % 20 == 0 and rank == 0:
            print(f"latents {start} of {POOL}", flush=True)
    pool = dict(indices=torch.tensor(indices), latents=torch.cat(latents).contiguous(), maps=torch.stack(maps))
    torch.save(pool, f"{args.work}/latents-{rank}.pt")


def load(args):
    """Indices, latents `(pool, 4, 16, 16)` and shape maps `(pool, 16, 16)`, in the order of the files."""
    parts = [torch.load(f"{args.work}/latents-{rank}.pt", weights_only=True) for rank in range(args.processes)]
    return tuple(torch.cat([part[key] for part in parts]) for key in ("indices", "latents", "maps"))
