"""A second course for the VAE's decoder: sharper edges, on latents that stay as they are.

The UNet learns from the encoder's latents, so the encoder is frozen by then; the decoder may go on learning
beside it. A little noise on the latents prepares it for the UNet's, which are never quite right.
"""

import torch
from diffusers import AutoencoderKL

from training import latents, loop
from training.pictures import draw_scene, rng_for
from training.vae import to_tensor

PICTURES = 4000
BATCH = 3
NOISE = 0.05


def train(rank, args):
    indices, pool, _ = latents.load(args)
    share = torch.arange(len(pool))[rank :: args.processes][: PICTURES // args.processes]
    pictures = [torch.from_numpy(draw_scene(*latents.scene_and_rng(int(indices[k])))[0]) for k in share]
    pictures, pool = torch.stack(pictures), pool[share].float()
    vae = AutoencoderKL.from_pretrained(f"{args.model}/vae", variant="fp16", torch_dtype=torch.float32)
    vae.to(args.device)
    parameters = [*vae.decoder.parameters(), *vae.post_quant_conv.parameters()]
    optimizer = torch.optim.AdamW(parameters, weight_decay=1e-4, betas=(0.9, 0.98))
    state, step, elapsed = loop.load_state(f"{args.work}/decoder.pt"), 0, 0.0
    if state:
        vae.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        step, elapsed = state["step"], state["elapsed"]
    torch.manual_seed(500 + rank + step)
    schedule = loop.Schedule(args.minutes, 2e-3, elapsed)
    progress = loop.Progress("decoder", rank)
    while schedule.update(optimizer, step):
        chosen = torch.randint(len(pool), (BATCH,))
        sample = to_tensor(pictures[chosen], args.device)
        noisy = pool[chosen] + NOISE * torch.rand(BATCH, 1, 1, 1) * torch.randn(BATCH, *pool.shape[1:])
        with torch.autocast(args.device, torch.bfloat16, enabled=args.bf16):
            decoded = vae.decode(noisy.to(args.device) / vae.config.scaling_factor).sample.float()
        # No shape reaches the first pixel, so it tells the background; shapes count more, as in `vae.py`.
        weight = 1 + 5 * ((sample - sample[:, :, :1, :1]).abs().amax(1, keepdim=True) > 0.05)
        difference = decoded - sample
        l1, square = (weight * difference.abs()).mean(), (weight * difference.square()).mean()
        optimizer.zero_grad(set_to_none=True)
        (l1 + square).backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        step += 1
        loop.average_parameters(parameters, step)
        progress.add(step, schedule, BATCH * args.processes, l1=l1.detach(), square=square.detach())
        if rank == 0 and step % 100 == 0:
            _save(vae, optimizer, step, schedule, args)
    if rank == 0:
        _save(vae, optimizer, step, schedule, args)


def _save(vae, optimizer, step, schedule, args):
    state = dict(model=vae.state_dict(), optimizer=optimizer.state_dict(), step=step, elapsed=schedule.elapsed)
    loop.save_state(f"{args.work}/decoder.pt", **state)
    loop.save_f16(vae, f"{args.model}/vae")
