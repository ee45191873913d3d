"""The UNet: learns to predict the noise in latents, given a caption's token states."""

import torch
from diffusers import DDPMScheduler, UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor
from transformers import CLIPTextModel

from training import latents, loop, tokenizer
from training.captions import caption
from training.pictures import rng_for

BATCH = 16
# Captions dropped in training, so that the UNet also knows pictures without one and guidance works.
DROPPED = 0.1


def new_unet(hidden):
    return UNet2DConditionModel(
        sample_size=16,
        in_channels=4,
        out_channels=4,
        block_out_channels=(48, 96, 128, 128),
        layers_per_block=1,
        cross_attention_dim=hidden,
        attention_head_dim=2,
        norm_num_groups=16,
        down_block_types=("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
        up_block_types=("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
    )


def noise_schedule():
    return DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", num_train_timesteps=1000)


def spread_timesteps(count):
    """Random timesteps, one from each of `count` equally likely stretches: less noisy gradients than free ones.

    Late ones are likelier (density as t^(2/3)): that is where the caption decides colors, shapes and places.
    """
    return (((torch.arange(count) + torch.rand(count)) / count) ** 0.6 * 1000).long().clamp(max=999)


def weigh(snr):
    """Weights of the squared errors of the noise, by signal-to-noise ratio.

    Little noise counts less (min-SNR, Hang et al., 2023, gamma 5): it is easy and would take all the
    capacity. Much noise counts more, as if the error were measured on the picture: there the caption decides
    colors and places, and these make next to no difference to the noise.
    """
    return (snr.clamp(max=5) / snr) * (1 + 1 / snr).clamp(max=40)


@torch.no_grad()
def update_average(average, model, step):
    """Exponential moving average of the weights; short memory at first."""
    decay = min(0.98, (1 + step) / (100 + step))
    for mean, value in zip(average.parameters(), model.parameters()):
        mean.lerp_(value, 1 - decay)


def train(rank, args):
    tokens = tokenizer.load(args)
    indices, pool, _ = latents.load(args)
    encoder = CLIPTextModel.from_pretrained(f"{args.model}/text_encoder", variant="fp16", torch_dtype=torch.float32)
    encoder = encoder.to(args.device).eval().requires_grad_(False)
    torch.manual_seed(13)
    unet = new_unet(encoder.config.hidden_size).to(args.device)
    average = new_unet(encoder.config.hidden_size).to(args.device).requires_grad_(False)
    average.load_state_dict(unet.state_dict())
    optimizer = torch.optim.AdamW(unet.parameters(), weight_decay=1e-2, betas=(0.9, 0.99), fused=True)
    state, step, elapsed = loop.load_state(f"{args.work}/unet.pt"), 0, 0.0
    if args.go_on and not state:
        begun = UNet2DConditionModel.from_pretrained(f"{args.model}/unet", variant="fp16", torch_dtype=torch.float32)
        unet.load_state_dict(begun.state_dict())
        average.load_state_dict(begun.state_dict())
    if state:
        unet.load_state_dict(state["model"])
        average.load_state_dict(state["average"])
        optimizer.load_state_dict(state["optimizer"])
        step, elapsed = state["step"], state["elapsed"]
    if args.device == "cpu":
        # Plain matrix products: the fused kernel's backward pass is slow for heads this small.
        unet.set_attn_processor(AttnProcessor())
    torch.manual_seed(300 + rank + step)
    rng = rng_for("unet", rank, step)
    alphas_cumprod = noise_schedule().alphas_cumprod.to(args.device)
    schedule = loop.Schedule(args.minutes, args.rate, elapsed, warmup=200)
    progress = loop.Progress("unet", rank)
    # Two things are more to learn than one, so they come twice as often as the pool has them.
    weights = torch.tensor([float(len(latents.scene_and_rng(int(index))[0].things)) for index in indices])
    parameters = list(unet.parameters())
    while schedule.update(optimizer, step):
        chosen = torch.multinomial(weights, BATCH)
        words = [caption(latents.scene_and_rng(int(index))[0], rng) for index in indices[chosen]]
        words = ["" if rng.random() < DROPPED else text for text in words]
        sample = pool[chosen].to(args.device).float()
        noise = torch.randn_like(sample)
        timesteps = spread_timesteps(BATCH).to(args.device)
        alpha = alphas_cumprod[timesteps].view(-1, 1, 1, 1)
        noisy = alpha.sqrt() * sample + (1 - alpha).sqrt() * noise
        with torch.autocast(args.device, torch.bfloat16, enabled=args.bf16):
            states = encoder(tokenizer.encode(tokens, words).to(args.device)).last_hidden_state
            noise_pred = unet(noisy, timesteps, states).sample.float()
        errors = (noise_pred - noise).square().mean((1, 2, 3))
        loss = (errors * weigh((alpha / (1 - alpha)).flatten())).mean()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        step += 1
        if loop.average_parameters(parameters, step):
            update_average(average, unet, step)
        late = errors.detach()[BATCH * 3 // 4 :].mean()
        progress.add(step, schedule, BATCH * args.processes, loss=loss.detach(), late=late)
        if rank == 0 and step % 100 == 0:
            _save(unet, average, optimizer, step, schedule, args)
    if rank == 0:
        _save(unet, average, optimizer, step, schedule, args)


def _save(unet, average, optimizer, step, schedule, args):
    weights = dict(model=unet.state_dict(), average=average.state_dict())
    state = dict(optimizer=optimizer.state_dict(), step=step, elapsed=schedule.elapsed)
    loop.save_state(f"{args.work}/unet.pt", **weights, **state)
    loop.save_f16(average, f"{args.model}/unet")
