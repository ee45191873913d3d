"""The text encoder: it learns to say, from a caption, what is where in the picture.

A throw-away reader looks at the token states by cross-attention, as the UNet will, and predicts for each
cell of the latents its color and its shape. The encoder is then frozen: the UNet's slow training starts
with states from which the layout can be read off.
"""

import torch
import torch.nn.functional as F
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel

from training import loop, tokenizer
from training.captions import caption
from training.pictures import SHAPES, draw_scene, rng_for
from training.vae import training_scene

HIDDEN = 128
BATCH = 16
# Longer than any caption. The encoder is causal, so leaving out the padding changes nothing before it.
TOKENS = 40
POOL = 5000


def new_text_encoder(tokens):
    config = CLIPTextConfig(
        vocab_size=len(tokens),
        hidden_size=HIDDEN,
        intermediate_size=4 * HIDDEN,
        num_hidden_layers=4,
        num_attention_heads=4,
        max_position_embeddings=77,
        hidden_act="quick_gelu",
        projection_dim=HIDDEN,
        bos_token_id=tokens.bos_token_id,
        eos_token_id=tokens.eos_token_id,
        pad_token_id=tokens.pad_token_id,
    )
    return CLIPTextModel(config)


class Reader(nn.Module):
    """Layout from token states: 8×8 queries, each for 2×2 cells of the latents."""

    def __init__(self, layers=2):
        super().__init__()
        self.outputs = 3 + 1 + len(SHAPES) + 1
        self.queries = nn.Parameter(torch.randn(64, HIDDEN) * 0.5)
        layer = dict(dim_feedforward=2 * HIDDEN, dropout=0.0, batch_first=True, norm_first=True)
        self.layers = nn.ModuleList(nn.TransformerDecoderLayer(HIDDEN, 4, **layer) for _ in range(layers))
        self.head = nn.Linear(HIDDEN, self.outputs * 4)

    def forward(self, states):
        """States `(batch_size, 77, hidden_size)` to `(batch_size, outputs, 16, 16)`."""
        cells = self.queries.expand(len(states), -1, -1)
        for layer in self.layers:
            cells = layer(cells, states)
        cells = self.head(cells).transpose(1, 2).unflatten(2, (8, 8))
        return F.pixel_shuffle(cells, 2)


def draw_pool(rng):
    """Scenes, their pictures at one pixel per latent cell `(POOL, 3, 16, 16)`, and their shape maps."""
    scenes = [training_scene(rng) for _ in range(POOL)]
    drawn = [draw_scene(scene, rng) for scene in scenes]
    pictures = torch.stack([torch.from_numpy(picture) for picture, _ in drawn]).permute(0, 3, 1, 2)
    colors = torch.cat([F.avg_pool2d(part.float(), 8) for part in pictures.split(500)]) / 127.5 - 1
    return scenes, colors, torch.stack([torch.from_numpy(shape_map) for _, shape_map in drawn])


def train(rank, args):
    tokens = tokenizer.load(args)
    scenes, colors, maps = draw_pool(rng_for("text pool", rank))
    torch.manual_seed(11)
    model = nn.ModuleDict(dict(encoder=new_text_encoder(tokens), reader=Reader())).to(args.device)
    if args.device == "cpu":
        # The fused attention kernel's backward pass is slow for heads this small.
        model["encoder"].set_attn_implementation("eager")
    torch.manual_seed(200 + rank)
    rng = rng_for("text", rank)
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=1e-2, betas=(0.9, 0.98))
    state, step, elapsed = loop.load_state(f"{args.work}/text.pt"), 0, 0.0
    if state:
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        step, elapsed = state["step"], state["elapsed"]
    schedule = loop.Schedule(args.minutes, 1.5e-3, elapsed, warmup=100)
    progress = loop.Progress("text", rank)
    parameters = list(model.parameters())
    while schedule.update(optimizer, step):
        chosen = torch.randint(POOL, (BATCH,))
        words = [caption(scenes[index], rng) for index in chosen.tolist()]
        ids = tokenizer.encode(tokens, words)[:, :TOKENS].to(args.device)
        wanted, shapes = colors[chosen].to(args.device), maps[chosen].to(args.device)
        with torch.autocast(args.device, torch.bfloat16, enabled=args.bf16):
            predicted = model["reader"](model["encoder"](ids).last_hidden_state).float()
        square = F.mse_loss(predicted[:, :3], wanted)
        layout = F.cross_entropy(predicted[:, 3:], shapes)
        optimizer.zero_grad(set_to_none=True)
        (square + layout).backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        step += 1
        loop.average_parameters(parameters, step)
        progress.add(step, schedule, BATCH * args.processes, square=square.detach(), layout=layout.detach())
        if rank == 0 and step % 100 == 0:
            _save(model, optimizer, step, schedule, args)
    if rank == 0:
        _save(model, optimizer, step, schedule, args)


def _save(model, optimizer, step, schedule, args):
    state = dict(model=model.state_dict(), optimizer=optimizer.state_dict(), step=step, elapsed=schedule.elapsed)
    loop.save_state(f"{args.work}/text.pt", **state)
    loop.save_f16(model["encoder"], f"{args.model}/text_encoder")
