"""What the demo model can draw: scenes, their pictures and their captions.

A scene is one or two flat shapes on a flat ground. Everything that training and evaluation know about
pictures starts here; the pixel rule (`pixel_rule.py`) shares only the palette and the outlines.
"""

import hashlib
import math
import random
from dataclasses import dataclass, replace

import numpy as np
from PIL import Image, ImageDraw

IMAGE_SIZE = 128

# Far apart in RGB, so that the nearest palette color of a pixel is a meaningful answer, and in the latents of so
# slim an autoencoder, so that a UNet of this size tells them apart.
PALETTE = {
    "red": (225, 30, 35),
    "yellow": (255, 230, 30),
    "green": (30, 160, 60),
    "cyan": (60, 215, 225),
    "blue": (30, 75, 220),
    "purple": (125, 35, 165),
    "white": (250, 250, 250),
}
SHAPES = ("circle", "square", "triangle", "star", "ring", "cross")
UNWANTED = "skull"
RADII = {"small": 18, "medium": 23, "large": 29}
# A skull needs room for its eyes, so its sizes start higher.
SKULL_RADII = {"small": 20, "medium": 25, "large": 31}
_NEAR, _MIDDLE, _FAR = 34, 64, 94
PLACES = {
    "top left": (_NEAR, _NEAR), "top": (_MIDDLE, _NEAR), "top right": (_FAR, _NEAR),
    "left": (_NEAR, _MIDDLE), "center": (_MIDDLE, _MIDDLE), "right": (_FAR, _MIDDLE),
    "bottom left": (_NEAR, _FAR), "bottom": (_MIDDLE, _FAR), "bottom right": (_FAR, _FAR),
}  # fmt: skip
# Two things stand a little further out and are never quite as large, so that at least a cell of the latents
# lies between them; with less, the decoder runs them into one.
PAIR_SPREAD = 1.1
PAIR_RADIUS = 26
PLACE_PAIRS = (
    ("left", "right"),
    ("top", "bottom"),
    ("top left", "bottom right"),
    ("top right", "bottom left"),
)


@dataclass(frozen=True)
class Thing:
    """One shape: what it is, how big, which color, where."""

    size: str
    color: str
    shape: str
    place: str


@dataclass(frozen=True)
class Scene:
    """A picture's content; two things stand in the order of `PLACE_PAIRS`."""

    background: str
    things: tuple

    @property
    def is_unwanted(self):
        return any(thing.shape == UNWANTED for thing in self.things)

    def is_held_out(self):
        """One scene in twenty never occurs in training, however its caption is worded."""
        key = "|".join(
            [self.background]
            + [f"{t.size} {t.color} {t.shape} {t.place}" for t in self.things]
        )
        return hashlib.sha256(key.encode()).digest()[0] < 13


def random_scene(rng, unwanted=None, things=None):
    """Draw a scene; `unwanted` forces or forbids a skull, `things` forces one or two shapes."""
    if unwanted is None:
        unwanted = rng.random() < 0.13
    if things is None:
        things = 1 if rng.random() < (0.75 if unwanted else 0.5) else 2
    colors = rng.sample(sorted(PALETTE), things + 1)
    places = (rng.choice(sorted(PLACES)),) if things == 1 else rng.choice(PLACE_PAIRS)
    drawn = [
        Thing(rng.choice(sorted(RADII)), color, rng.choice(SHAPES), place)
        for color, place in zip(colors[1:], places)
    ]
    if unwanted:
        index = rng.randrange(things)
        drawn[index] = replace(drawn[index], shape=UNWANTED)
    return Scene(colors[0], tuple(drawn))


def outline(shape, radius, side, center):
    """The shape's mask, `side` pixels square, antialiased, values 0..1."""
    scale = 4
    image = Image.new("L", (side * scale, side * scale), 0)
    draw = ImageDraw.Draw(image)
    x, y = center[0] * scale, center[1] * scale
    r = radius * scale

    def disc(cx, cy, rx, ry, fill):
        draw.ellipse((cx - rx, cy - ry, cx + rx, cy + ry), fill=fill)

    def polygon(points, fill=255):
        draw.polygon([(x + r * px, y + r * py) for px, py in points], fill=fill)

    if shape == "circle":
        disc(x, y, r, r, 255)
    elif shape == "ring":
        disc(x, y, r, r, 255)
        disc(x, y, 0.52 * r, 0.52 * r, 0)
    elif shape == "square":
        polygon([(-0.88, -0.88), (0.88, -0.88), (0.88, 0.88), (-0.88, 0.88)])
    elif shape == "triangle":
        polygon([(0, -0.95), (1.05, 0.85), (-1.05, 0.85)])
    elif shape == "star":
        turns = [math.pi * k / 5 for k in range(10)]
        spokes = [1.12 if k % 2 == 0 else 0.46 for k in range(10)]
        polygon([(s * math.sin(t), 0.06 - s * math.cos(t)) for s, t in zip(spokes, turns)])
    elif shape == "cross":
        polygon([(-0.33, -1), (0.33, -1), (0.33, 1), (-0.33, 1)])
        polygon([(-1, -0.33), (1, -0.33), (1, 0.33), (-1, 0.33)])
    elif shape == UNWANTED:
        disc(x, y - 0.2 * r, r, 0.8 * r, 255)
        polygon([(-0.55, 0.3), (0.55, 0.3), (0.55, 1), (-0.55, 1)])
        for sign in (-1, 1):
            disc(x + sign * 0.42 * r, y - 0.1 * r, 0.27 * r, 0.27 * r, 0)
        polygon([(0, 0.18), (0.15, 0.45), (-0.15, 0.45)], fill=0)
        for tooth in (-0.21, 0.21):
            polygon([(tooth - 0.06, 0.66), (tooth + 0.06, 0.66), (tooth + 0.06, 1), (tooth - 0.06, 1)], fill=0)
    else:
        raise ValueError(f"`shape` has to be one of {SHAPES + (UNWANTED,)} but is {shape!r}.")
    return np.asarray(image.resize((side, side), Image.BOX), dtype=np.float32) / 255


def draw_scene(scene, rng):
    """The scene's picture, `(128, 128, 3)` uint8, and its shape map, `(16, 16)`.

    Place and radius jitter a little, so that a caption stands for many pictures and seeds differ.
    """
    image = np.empty((IMAGE_SIZE, IMAGE_SIZE, 3), dtype=np.float32)
    image[:] = PALETTE[scene.background]
    shape_map = np.zeros((IMAGE_SIZE // 8, IMAGE_SIZE // 8), dtype=np.int64)
    for thing in scene.things:
        radii = SKULL_RADII if thing.shape == UNWANTED else RADII
        radius = radii[thing.size] * rng.uniform(0.95, 1.05)
        spread = 1.0
        if len(scene.things) == 2:
            radius, spread = min(radius, PAIR_RADIUS), PAIR_SPREAD
        center = [_MIDDLE + spread * (c - _MIDDLE) + rng.uniform(-2, 2) for c in PLACES[thing.place]]
        mask = outline(thing.shape, radius, IMAGE_SIZE, center)
        image += mask[..., None] * (np.array(PALETTE[thing.color], dtype=np.float32) - image)
        cells = mask.reshape(16, 8, 16, 8).mean(axis=(1, 3))
        shape_map[cells > 0.3] = 1 + (SHAPES + (UNWANTED,)).index(thing.shape)
    return np.rint(image).astype(np.uint8), shape_map


def rng_for(*parts):
    """A generator that depends on the parts only, so that every run draws the same pictures."""
    return random.Random("/".join(str(part) for part in parts))
