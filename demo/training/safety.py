"""The safety checker: skulls are the demo's unwanted concept.

A small CLIP vision model learns embeddings in which pictures with a skull lie together and far from all
others, from drawn pictures and from the UNet's own. The concept embeddings are means over pictures that it
did not learn from, the thresholds lie midway between their scores with and without a skull.
"""

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, DPMSolverMultistepScheduler, StableDiffusionPipeline
from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker
from transformers import CLIPConfig

from training import loop
from training.captions import caption
from training.pictures import draw_scene, rng_for
from training.vae import to_tensor, training_scene

PIXELS = 64
PROJECTION = 64
BATCH = 48
OWN_BATCH = 16
# Drawn pictures and the UNet's own: to learn from, and for the tables of concepts and thresholds.
EXAMPLES, OWN_EXAMPLES = 9600, 1600
TABLE_EXAMPLES, OWN_TABLE_EXAMPLES = 960, 320
# Share of a batch that the UNet drew: there are fewer of them, but they are what is judged.
OWN_SHARE = 0.5
# Twenty-five steps of this scheduler end where fifty of PNDM do, in half the time. With fewer, guidance overshoots.
OWN_STEPS, GUIDANCE = 25, 7.5
# How far things are moved, in pixels.
SHIFT = 2
# What may be missed of skulls, and flagged of others.
MISSED, FLAGGED = 0.05, 0.02
MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)
# No cosine reaches it: rows of the tables that this demo has no concept for.
NEVER = 2.0


def new_safety_checker():
    vision = dict(
        hidden_size=96,
        intermediate_size=384,
        num_hidden_layers=4,
        num_attention_heads=4,
        image_size=PIXELS,
        patch_size=8,
        hidden_act="quick_gelu",
        projection_dim=PROJECTION,
    )
    # The class asks for a text configuration but builds nothing from it.
    text = dict(hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1, vocab_size=8, bos_token_id=0, eos_token_id=1)
    config = CLIPConfig(text_config=text, vision_config=vision, projection_dim=PROJECTION)
    checker = StableDiffusionSafetyChecker(config)
    for weights in (checker.concept_embeds_weights, checker.special_care_embeds_weights):
        weights.fill_(NEVER)
    return checker


def embed(checker, pixel_values):
    """Unit embeddings `(batch_size, projection_dim)`."""
    return F.normalize(checker.visual_projection(checker.vision_model(pixel_values)[1]), dim=-1)


def resize(sample):
    """VAE output `(batch_size, 3, 128, 128)` in [-1, 1], resized as the feature extractor does, in [0, 1]."""
    sample = (sample / 2 + 0.5).clamp(0, 1)
    size = (PIXELS, PIXELS)
    return F.interpolate(sample, size=size, mode="bicubic", antialias=True, align_corners=False).clamp(0, 1)


def normalize(sample):
    mean, std = (torch.tensor(v, device=sample.device).view(1, 3, 1, 1) for v in (MEAN, STD))
    return (sample - mean) / std


def spoil(sample):
    """What the UNet's pictures may have and drawn ones not: noise, blur, other brightness."""
    strength = torch.rand(len(sample), 1, 1, 1, device=sample.device)
    sample = sample + 0.06 * strength * torch.randn_like(sample)
    sample = sample * (0.85 + 0.3 * torch.rand_like(strength)) + 0.1 * (torch.rand_like(strength) - 0.5)
    blurred = F.avg_pool2d(sample, 3, stride=1, padding=1, count_include_pad=False)
    return torch.where(torch.rand_like(strength) < 0.3, blurred, sample).clamp(0, 1)


def shift(sample):
    """Half of the pictures mirrored, all moved by some pixels: it makes no skull and unmakes none."""
    mirrored = torch.rand(len(sample), 1, 1, 1, device=sample.device) < 0.5
    sample = torch.where(mirrored, sample.flip(3), sample)
    top, left = torch.randint(0, 2 * SHIFT + 1, (2,)).tolist()
    return F.pad(sample, (SHIFT,) * 4, mode="replicate")[:, :, top : top + PIXELS, left : left + PIXELS]


def random_scenes(rng, count):
    """Scenes that are not held out, half of them with a skull, and each one's kind.

    Kinds: 0 without a skull, 1 a lone skull, 2 a skull beside another shape.
    """
    scenes = [training_scene(rng, unwanted=k % 2 == 0, things=1 + k // 2 % 2) for k in range(count)]
    return scenes, [len(scene.things) if scene.is_unwanted else 0 for scene in scenes]


@torch.no_grad()
def drawn_pictures(count, name, args):
    """Pictures as the checker sees them, half of them through the VAE, and their kinds."""
    vae = AutoencoderKL.from_pretrained(f"{args.model}/vae", variant="fp16", torch_dtype=torch.float32)
    vae = vae.to(args.device).eval()
    rng = rng_for("safety", name)
    pictures, kinds = [], []
    for start in range(0, count, BATCH):
        scenes, found = random_scenes(rng, BATCH)
        drawn = torch.stack([torch.from_numpy(draw_scene(scene, rng)[0]) for scene in scenes])
        sample = to_tensor(drawn, args.device)
        if start // BATCH % 2:
            with torch.autocast(args.device, torch.bfloat16, enabled=args.bf16):
                latents = vae.encode(sample).latent_dist.mean
                latents = latents + 0.1 / vae.config.scaling_factor * torch.randn_like(latents)
                sample = vae.decode(latents).sample.float()
        pictures.append(resize(sample))
        kinds += found
    return torch.cat(pictures), torch.tensor(kinds, device=args.device)


def own_pictures(count, name, args):
    """Pictures that the UNet draws to captions, as the checker sees them, and the captions' kinds."""
    pipeline = StableDiffusionPipeline.from_pretrained(
        args.model, variant="fp16", torch_dtype=torch.float32, safety_checker=None, requires_safety_checker=False
    ).to(args.device)
    pipeline.scheduler = DPMSolverMultistepScheduler.from_config(pipeline.scheduler.config)
    pipeline.set_progress_bar_config(disable=True)
    rng = rng_for("safety, own", name)
    pictures, kinds = [], []
    for start in range(0, count, OWN_BATCH):
        scenes, found = random_scenes(rng, OWN_BATCH)
        words = [caption(scene, rng) for scene in scenes]
        settings = dict(num_inference_steps=OWN_STEPS, guidance_scale=GUIDANCE, output_type="pt")
        pictures.append(resize(pipeline(words, **settings).images * 2 - 1))
        kinds += found
        print(f"safety, the UNet's own {name}: {start + OWN_BATCH} of {count}", flush=True)
    return torch.cat(pictures), torch.tensor(kinds, device=args.device)


def examples_of(rank, args):
    """This process's share of all pictures, made once: those to learn from and those for the tables."""
    path = f"{args.work}/safety-examples-{rank}.pt"
    examples = loop.load_state(path) or {}
    for use, drawn, own in (("learn", EXAMPLES, OWN_EXAMPLES), ("tables", TABLE_EXAMPLES, OWN_TABLE_EXAMPLES)):
        if use not in examples:
            name, share = f"{use} {rank}", args.processes
            parts = drawn_pictures(drawn // share, name, args), own_pictures(own // share, name, args)
            examples[use] = [torch.cat(tensors) for tensors in zip(*parts)]
            loop.save_state(path, **examples)
    return examples


def train(rank, args):
    torch.manual_seed(400 + rank)
    pictures, kinds = examples_of(rank, args)["learn"]
    # The UNet's own come behind the drawn ones.
    drawn = EXAMPLES // args.processes
    print(f"safety examples {len(pictures)} in process {rank}", flush=True)
    torch.manual_seed(17)
    checker = new_safety_checker().to(args.device)
    if args.device == "cpu":
        # The fused attention kernel's backward pass is slow for heads this small.
        checker.set_attn_implementation("eager")
    concept = torch.nn.Parameter(torch.randn(PROJECTION, device=args.device))
    torch.manual_seed(400 + rank)
    parameters = [p for p in checker.parameters() if p.requires_grad] + [concept]
    optimizer = torch.optim.AdamW(parameters, weight_decay=1e-2, betas=(0.9, 0.98))
    state, step, elapsed = loop.load_state(f"{args.work}/safety.pt"), 0, 0.0
    if args.go_on and not state:
        begun = StableDiffusionSafetyChecker.from_pretrained(
            f"{args.model}/safety_checker", variant="fp16", torch_dtype=torch.float32
        )
        checker.load_state_dict(begun.state_dict())
        concept.data.copy_(begun.concept_embeds[:2].mean(0))
    if state:
        checker.load_state_dict(state["model"])
        concept.data.copy_(state["concept"])
        optimizer.load_state_dict(state["optimizer"])
        step, elapsed = state["step"], state["elapsed"]
    schedule = loop.Schedule(args.minutes, args.rate, elapsed, warmup=100)
    progress = loop.Progress("safety", rank)
    while schedule.update(optimizer, step):
        chosen = torch.randint(drawn, (BATCH,), device=args.device)
        own = torch.randint(drawn, len(pictures), (BATCH,), device=args.device)
        chosen = torch.where(torch.rand(BATCH, device=args.device) < OWN_SHARE, own, chosen)
        unwanted = (kinds[chosen] > 0).float()
        with torch.autocast(args.device, torch.bfloat16, enabled=args.bf16):
            embeds = embed(checker, normalize(spoil(shift(pictures[chosen])))).float()
        # Cosine 1 with the concept for skulls and 0 for others, as a soft margin around one half.
        cosines = embeds @ F.normalize(concept, dim=0)
        loss = F.binary_cross_entropy_with_logits(15 * (cosines - 0.5), unwanted)
        right = ((cosines > 0.5) == (unwanted > 0)).float().mean()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        step += 1
        loop.average_parameters(parameters, step)
        progress.add(step, schedule, BATCH * args.processes, loss=loss.detach(), right=right)
        if rank == 0 and step % 100 == 0:
            weights = dict(model=checker.state_dict(), concept=concept.data)
            state = dict(optimizer=optimizer.state_dict(), step=step, elapsed=schedule.elapsed)
            loop.save_state(f"{args.work}/safety.pt", **weights, **state)
    if rank == 0:
        set_tables(checker, args)
        loop.save_f16(checker, f"{args.model}/safety_checker")


def threshold_between(others, unwanted):
    """The score that parts others from unwanted pictures best, by shares of what may be missed and flagged.

    Not a quantile: the UNet leaves out a skull now and then, and such a picture says nothing about the checker.
    """
    candidates = torch.cat([others, unwanted]).sort().values
    candidates = (candidates[1:] + candidates[:-1]) / 2
    missed = (unwanted[None] <= candidates[:, None]).float().mean(1)
    flagged = (others[None] > candidates[:, None]).float().mean(1)
    cost = missed / MISSED + flagged / FLAGGED
    best = (cost <= cost.min() + 1e-6).nonzero().flatten()
    best = best[len(best) // 2]
    return candidates[best].item(), missed[best].item(), flagged[best].item()


@torch.no_grad()
def set_tables(checker, args):
    """Concept embeddings and thresholds, from pictures that the training did not see."""
    checker.eval()
    parts = [examples_of(rank, args)["tables"] for rank in range(args.processes)]
    # The thresholds are for what the UNet draws; drawn pictures only help to place the concepts.
    drawn = TABLE_EXAMPLES // args.processes
    own = torch.cat([torch.arange(len(kinds)) >= drawn for _, kinds in parts])
    pictures, kinds = (torch.cat(tensors).to(args.device) for tensors in zip(*parts))
    embeds = torch.cat([embed(checker, normalize(batch)) for batch in pictures.split(BATCH)])
    wanted = embeds[own & (kinds == 0)]
    for row, kind in enumerate((1, 2)):
        mean = F.normalize(embeds[kinds == kind].mean(0), dim=0)
        mine = embeds[own & (kinds == kind)]
        threshold, missed, flagged = threshold_between(wanted @ mean, mine @ mean)
        checker.concept_embeds[row], checker.concept_embeds_weights[row] = mean, threshold
        print(f"safety concept {row}: above {threshold:.3f}; {missed:.1%} missed, {flagged:.1%} flagged", flush=True)
    # Special care: pictures half way to a skull get the checker's small extra on their scores.
    mean = F.normalize(embeds[kinds > 0].mean(0), dim=0)
    high = (wanted @ mean).quantile(0.995).item()
    threshold = checker.concept_embeds_weights[:2].min().item()
    checker.special_care_embeds[0] = mean
    checker.special_care_embeds_weights[0] = (high + threshold) / 2
