"""The slim AutoencoderKL: trained on drawn pictures, first on crops (cheap), then whole."""

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL

from training import loop
from training.pictures import draw_scene, random_scene, rng_for

POOL = 3000


def new_vae():
    return AutoencoderKL(
        block_out_channels=(16, 32, 32, 32),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=1,
        norm_num_groups=4,
        latent_channels=4,
        sample_size=128,
    )


def training_scene(rng, **kind):
    """A random scene that is not held out."""
    while True:
        scene = random_scene(rng, **kind)
        if not scene.is_held_out():
            return scene


def to_tensor(pictures, device="cpu"):
    """Pictures, uint8 `(batch_size, height, width, 3)`, as `(batch_size, 3, height, width)` in [-1, 1]."""
    sample = torch.as_tensor(pictures, device=device).permute(0, 3, 1, 2).contiguous()
    return sample.float() / 127.5 - 1


def train(rank, args):
    torch.manual_seed(100 + rank)
    rng = rng_for("vae", rank)
    pool = [draw_scene(training_scene(rng, unwanted=k % 7 == 0), rng)[0] for k in range(POOL)]
    pool = torch.stack([torch.from_numpy(picture) for picture in pool])
    torch.manual_seed(7)
    vae = new_vae().to(args.device)
    torch.manual_seed(100 + rank)
    optimizer = torch.optim.AdamW(vae.parameters(), weight_decay=1e-4, betas=(0.9, 0.98))
    state, step, elapsed = loop.load_state(f"{args.work}/vae.pt"), 0, 0.0
    if state:
        vae.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        step, elapsed = state["step"], state["elapsed"]
    schedule = loop.Schedule(args.minutes, 3e-3, elapsed)
    progress = loop.Progress("vae", rank)
    parameters = list(vae.parameters())
    while schedule.update(optimizer, step):
        # Crops for the first four fifths of the time; whole pictures teach the middle attention its true size.
        whole = schedule.progress > 0.8
        batch = pool[torch.randint(POOL, (2 if whole else 4,))]
        background = to_tensor(batch[:, :1, :1], args.device)
        if not whole:
            top, left = torch.randint(0, 65, (2,)).tolist()
            batch = batch[:, top : top + 64, left : left + 64]
        sample = to_tensor(batch, args.device)
        with torch.autocast(args.device, torch.bfloat16, enabled=args.bf16):
            posterior = vae.encode(sample).latent_dist
            decoded = vae.decode(posterior.sample()).sample.float()
        # Shapes cover little of the picture but are what it is about. No shape reaches the first pixel.
        weight = 1 + 5 * ((sample - background).abs().amax(1, keepdim=True) > 0.05)
        difference = decoded - sample
        # Absolute error keeps flat areas flat and edges sharp; the square pulls in the far-off corners.
        l1, square = (weight * difference.abs()).mean(), (weight * difference.square()).mean()
        kl = posterior.kl().float().mean() / posterior.mean[0].numel()
        loss = l1 + square + 3e-4 * kl
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        step += 1
        loop.average_parameters(parameters, step)
        progress.add(step, schedule, len(batch) * args.processes, l1=l1.detach(), square=square.detach(), kl=kl.detach())
        if rank == 0 and step % 200 == 0:
            _save(vae, optimizer, step, schedule, args)
    if rank == 0:
        _save(vae, optimizer, step, schedule, args)
        finish(vae, pool, args)


def _save(vae, optimizer, step, schedule, args):
    state = dict(model=vae.state_dict(), optimizer=optimizer.state_dict(), step=step, elapsed=schedule.elapsed)
    loop.save_state(f"{args.work}/vae.pt", **state)


@torch.no_grad()
def finish(vae, pool, args):
    """Compute the scaling factor (latents get unit variance) and write the model folder."""
    latents = vae.encode(to_tensor(pool[:256], args.device)).latent_dist.sample()
    vae.register_to_config(scaling_factor=round(1 / latents.std().item(), 5))
    decoded = vae.decode(latents[:64]).sample
    error = F.l1_loss(decoded, to_tensor(pool[:64], args.device)).item() * 127.5
    means = [round(m, 3) for m in (latents.mean((0, 2, 3)) * vae.config.scaling_factor).tolist()]
    print(f"vae scaling_factor {vae.config.scaling_factor} channel means {means} error {error:.2f} of 255", flush=True)
    loop.save_f16(vae, f"{args.model}/vae")
