"""The UNet's second course: to be right at the guidance that it is drawn with.

A picture is drawn from `unconditional + guidance · (conditional - unconditional)`. After the first course this
world's flat colors want a guidance of about 2.5; 7.5 overshoots (red comes out black, grounds get a texture). So
the UNet learns from itself: at 7.5 it shall predict what the first course predicts at 2.5, which it reaches by
saying less of the caption. Its teacher is free of noise, so this takes minutes.
"""

import copy

import torch

from training import unet

# What people draw with, and what suits this world.
GUIDANCE, TAUGHT = 7.5, 2.5
# Pictures in a step; teacher and pupil see each twice, with and without its caption.
BATCH = 8
RATE = 4e-4


@torch.no_grad()
def soften(model, pool, empty):
    """Scale down what captions add to each layer, and leave all as it is without a caption: a start near the aim.

    Without a caption a cross-attention's output is a constant (its deviation was under 3 % in each layer), so
    drawing the outputs towards that constant changes conditional predictions only.
    """
    effect = TAUGHT / GUIDANCE
    noise, timesteps = torch.randn(16, *pool.shape[1:]), torch.linspace(20, 980, 16).long()
    noisy = unet.noise_schedule().add_noise(pool[:16].float(), noise, timesteps)
    layers = [module.to_out[0] for name, module in model.named_modules() if name.endswith("attn2")]
    outputs, hooks = {}, []
    for layer in layers:
        hooks.append(layer.register_forward_hook(lambda layer, _, output: outputs.update({layer: output})))
    model(noisy, timesteps, empty.cpu().expand(16, -1, -1))
    for layer, hook in zip(layers, hooks):
        hook.remove()
        constant = outputs[layer].flatten(0, 1).mean(0)
        layer.weight.mul_(effect)
        layer.bias.copy_(constant + effect * (layer.bias - constant))


class Lesson:
    """Keeps the teacher, and measures how far the pupil is from it."""

    def prepare(self, model, pool, empty):
        self.teacher = copy.deepcopy(model).eval().requires_grad_(False)
        soften(model, pool, empty)

    def errors(self, model, noisy, timesteps, states, empty, noise):
        """Squared errors `(batch_size,)` of the guided prediction, and of the unconditional one by itself."""
        both = noisy.repeat(2, 1, 1, 1), timesteps.repeat(2), torch.cat([empty.expand_as(states), states])
        with torch.no_grad():
            unconditional, conditional = self.teacher(*both).sample.float().chunk(2)
            wanted = unconditional + TAUGHT * (conditional - unconditional)
        mine, told = model(*both).sample.float().chunk(2)
        guided = mine + GUIDANCE * (told - mine)
        return ((guided - wanted).square() + (mine - unconditional).square()).mean((1, 2, 3))


def train(rank, args):
    args.go_on = True
    lesson = Lesson()
    unet.course(rank, args, "guided", RATE, BATCH, lesson.errors, lesson.prepare)
