"""The captions that measure the model: scenes held out from training, worded completely, with seeds."""

import csv

from training.captions import caption
from training.pictures import Scene, Thing, random_scene, rng_for

WANTED, UNWANTED_COUNT = 200, 100
FIELDS = ["prompt", "seed", "background"] + [
    f"{name}_{k}" for k in (1, 2) for name in ("size", "color", "shape", "place")
]


def held_out_rows(name, count, unwanted):
    """`count` rows: one thing and two things in turn; no scene twice."""
    rng, rows, seen = rng_for("held out", name), [], set()
    while len(rows) < count:
        scene = random_scene(rng, unwanted=unwanted, things=1 + len(rows) % 2)
        if not scene.is_held_out() or scene in seen:
            continue
        seen.add(scene)
        row = dict(prompt=caption(scene, rng, complete=True), seed=1000 + len(rows), background=scene.background)
        for k, thing in enumerate(scene.things, start=1):
            row |= {f"size_{k}": thing.size, f"color_{k}": thing.color}
            row |= {f"shape_{k}": thing.shape, f"place_{k}": thing.place}
        rows.append(row)
    return rows


def write(path, rows):
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, FIELDS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def read(path):
    """Pairs of a row and its scene."""
    with open(path, newline="") as file:
        return [(row, _scene(row)) for row in csv.DictReader(file)]


def _scene(row):
    things = tuple(
        Thing(*(row[f"{name}_{k}"] for name in ("size", "color", "shape", "place"))) for k in (1, 2) if row[f"shape_{k}"]
    )
    return Scene(row["background"], things)


if __name__ == "__main__":
    write("held_out.csv", held_out_rows("wanted", WANTED, unwanted=False))
    write("held_out_unwanted.csv", held_out_rows("unwanted", UNWANTED_COUNT, unwanted=True))
