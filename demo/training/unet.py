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
# Captions of one picture.
WORDINGS = 2


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


class States:
    """Token states of the pool's captions, kept once made: to make them costs half as much as the UNet's step."""

    def __init__(self, args):
        self.tokens, self.device, self.kept = tokenizer.load(args), args.device, {}
        encoder = CLIPTextModel.from_pretrained(f"{args.model}/text_encoder", variant="fp16", torch_dtype=torch.float32)
        self.encoder = encoder.to(args.device).eval().requires_grad_(False)
        self.hidden = encoder.config.hidden_size
        self.empty = self.encode([""])

    def encode(self, words):
        """States `(batch_size, 77, hidden_size)`."""
        return self.encoder(tokenizer.encode(self.tokens, words).to(self.device)).last_hidden_state

    def __call__(self, indices, rng):
        """States of one of a few captions for each of the pool's scenes `indices`."""
        keys = [(index, rng.randrange(WORDINGS)) for index in indices]
        new = [key for key in dict.fromkeys(keys) if key not in self.kept]
        if new:
            words = [caption(latents.scene_and_rng(key[0])[0], rng_for("wording", *key)) for key in new]
            self.kept.update(zip(new, self.encode(words).half()))
        return torch.stack([self.kept[key] for key in keys]).float()


def noise_errors(unet, noisy, timesteps, states, empty, noise):
    """Squared errors of the noise `(batch_size,)`; now and then without the caption."""
    dropped = torch.rand(len(noisy), 1, 1, device=noisy.device) < DROPPED
    noise_pred = unet(noisy, timesteps, torch.where(dropped, empty, states)).sample.float()
    return (noise_pred - noise).square().mean((1, 2, 3))


def train(rank, args):
    course(rank, args, "unet", args.rate, BATCH, noise_errors)


def course(rank, args, name, rate, batch, errors_of, prepare=None):
    """Train with the errors that `errors_of` finds; the second course (`guided.py`) has its own.

    `prepare` may change weights from --model before the first step.
    """
    indices, pool, _ = latents.load(args)
    states = States(args)
    torch.manual_seed(13)
    unet = new_unet(states.hidden).to(args.device)
    average = new_unet(states.hidden).to(args.device).requires_grad_(False)
    average.load_state_dict(unet.state_dict())
    optimizer = torch.optim.AdamW(unet.parameters(), weight_decay=1e-2, betas=(0.9, 0.99), fused=True)
    state, step, elapsed = loop.load_state(f"{args.work}/{name}.pt"), 0, 0.0
    if args.go_on and not state:
        begun = UNet2DConditionModel.from_pretrained(f"{args.model}/unet", variant="fp16", torch_dtype=torch.float32)
        if prepare:
            prepare(begun, pool, states.empty)
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
    rng = rng_for(name, rank, step)
    alphas_cumprod = noise_schedule().alphas_cumprod.to(args.device)
    schedule = loop.Schedule(args.minutes, rate, elapsed, warmup=100)
    progress = loop.Progress(name, rank)
    # Two things are more to learn than one, so they come twice as often as the pool has them.
    weights = torch.tensor([float(len(latents.scene_and_rng(int(index))[0].things)) for index in indices])
    parameters = list(unet.parameters())
    while schedule.update(optimizer, step):
        chosen = torch.multinomial(weights, batch)
        sample = pool[chosen].to(args.device).float()
        noise = torch.randn_like(sample)
        timesteps = spread_timesteps(batch).to(args.device)
        alpha = alphas_cumprod[timesteps].view(-1, 1, 1, 1)
        noisy = alpha.sqrt() * sample + (1 - alpha).sqrt() * noise
        with torch.autocast(args.device, torch.bfloat16, enabled=args.bf16):
            told = states(indices[chosen].tolist(), rng)
            errors = errors_of(unet, noisy, timesteps, told, states.empty, noise)
        loss = (errors * weigh((alpha / (1 - alpha)).flatten())).mean()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        step += 1
        if loop.average_parameters(parameters, step):
            update_average(average, unet, step)
        late = errors.detach()[batch * 3 // 4 :].mean()
        progress.add(step, schedule, batch * args.processes, loss=loss.detach(), late=late)
        if rank == 0 and step % 100 == 0:
            _save(name, unet, average, optimizer, step, schedule, args)
    if rank == 0:
        _save(name, unet, average, optimizer, step, schedule, args)


def _save(name, unet, average, optimizer, step, schedule, args):
    weights = dict(model=unet.state_dict(), average=average.state_dict())
    state = dict(optimizer=optimizer.state_dict(), step=step, elapsed=schedule.elapsed)
    loop.save_state(f"{args.work}/{name}.pt", **weights, **state)
    loop.save_f16(average, f"{args.model}/unet")
