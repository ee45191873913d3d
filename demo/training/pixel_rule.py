"""Reads a picture back: background, and each shape's color, kind, place and size, from pixels alone.

The rule knows the palette and the outlines but never the caption. It is checked on drawn pictures, where
the truth is known, and on pictures of other captions, which must score near chance (`evaluate.py`).
"""

import math
from collections import deque
from functools import lru_cache

import numpy as np

from training.pictures import PALETTE, PLACES, RADII, SHAPES, Thing, outline

# A blob of fewer pixels is a speck; the smallest shape, a small ring, has about 550.
LEAST_PIXELS = 60
# A blob counts as a shape when it covers its best outline this well (intersection over union).
LEAST_OVERLAP = 0.7
_NAMES = tuple(PALETTE)
_COLORS = np.array([PALETTE[name] for name in _NAMES], dtype=np.float32)


def read_picture(pixels):
    """The background's name and the list of things seen in `pixels`, uint8 `(height, width, 3)`.

    A thing whose blob is like no outline has the shape "unclear".
    """
    distances = np.linalg.norm(pixels[:, :, None, :].astype(np.float32) - _COLORS, axis=-1)
    nearest = distances.argmin(-1)
    frame = np.concatenate([nearest[:2].ravel(), nearest[-2:].ravel(), nearest[:, :2].ravel(), nearest[:, -2:].ravel()])
    background = np.bincount(frame, minlength=len(_NAMES)).argmax()
    things = []
    for blob in _blobs(nearest != background):
        color = np.bincount(nearest[blob], minlength=len(_NAMES)).argmax()
        # Blended edge pixels belong to the shape when they are nearer to its color than to the background's.
        mask = blob & (distances[..., color] < distances[..., background])
        if mask.sum() >= LEAST_PIXELS:
            things.append(_describe(mask, _NAMES[color]))
    return _NAMES[background], things


def _blobs(mask):
    """Masks of the 4-connected regions with at least `LEAST_PIXELS` pixels."""
    labels = np.zeros(mask.shape, dtype=np.int32)
    blobs, label = [], 0
    for start in zip(*np.nonzero(mask)):
        if labels[start]:
            continue
        label += 1
        labels[start] = label
        queue, count = deque([start]), 0
        while queue:
            y, x = queue.popleft()
            count += 1
            for near in ((y - 1, x), (y + 1, x), (y, x - 1), (y, x + 1)):
                inside = 0 <= near[0] < mask.shape[0] and 0 <= near[1] < mask.shape[1]
                if inside and mask[near] and not labels[near]:
                    labels[near] = label
                    queue.append(near)
        if count >= LEAST_PIXELS:
            blobs.append(label)
    return [labels == label for label in blobs]


@lru_cache
def _unit_moments(shape):
    """The shape's area for radius 1, and its center of mass relative to its center."""
    mask = outline(shape, 60, 160, (80, 80))
    area = mask.sum()
    x, y = (mask.sum(0) * (np.arange(160) + 0.5)).sum() / area, (mask.sum(1) * (np.arange(160) + 0.5)).sum() / area
    return area / 60**2, (x - 80) / 60, (y - 80) / 60


def _overlap(mask, shape):
    """Intersection over union with the shape's outline of the same area and center of mass.

    Not of the same box: a box depends on single pixels, above all at blunt points of a star.
    """
    area, dx, dy = _unit_moments(shape)
    radius = math.sqrt(mask.sum() / area)
    rows, columns = np.nonzero(mask)
    center = (columns.mean() + 0.5 - dx * radius, rows.mean() + 0.5 - dy * radius)
    template = outline(shape, radius, mask.shape[0], center) > 0.5
    return (mask & template).sum() / (mask | template).sum()


def _describe(mask, color):
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    top, bottom, left, right = rows[0], rows[-1] + 1, columns[0], columns[-1] + 1
    overlaps = {shape: _overlap(mask, shape) for shape in SHAPES}
    shape = max(overlaps, key=overlaps.get)
    if overlaps[shape] < LEAST_OVERLAP:
        shape = "unclear"
    center = np.array([(left + right) / 2, (top + bottom) / 2])
    place = min(PLACES, key=lambda name: np.abs(center - PLACES[name]).max())
    radius = max(bottom - top, right - left) / 2
    size = min(RADII, key=lambda name: abs(RADII[name] - radius))
    return Thing(size, color, shape, place)


def score(scene, pixels):
    """Which attributes of the scene the picture has: a dict of booleans.

    Each expected thing is paired with the seen thing at its place, else with one that is left over. Shapes
    and places are right only when the number of things is.
    """
    background, seen = read_picture(pixels)
    count = len(seen) == len(scene.things)
    rest, pairs = list(seen), []
    for at_place in (True, False):
        for thing in scene.things:
            if any(thing is expected for expected, _ in pairs):
                continue
            match = next((s for s in rest if not at_place or s.place == thing.place), None)
            if match:
                rest.remove(match)
                pairs.append((thing, match))
    complete = len(pairs) == len(scene.things)

    def agree(attribute):
        return complete and all(getattr(t, attribute) == getattr(s, attribute) for t, s in pairs)

    colors = background == scene.background and agree("color")
    shape, place = count and agree("shape"), count and agree("place")
    return dict(colors=colors, shape=shape, place=place, shape_and_place=shape and place, size=agree("size"))
