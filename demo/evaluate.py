"""Measure the demo model on captions held out from training: `python evaluate.py --help`."""

import argparse
import csv
import json
import multiprocessing
import os
import sys
import time
from pathlib import Path

import numpy as np
from PIL import Image

from train import ALLOCATOR
from training import held_out
from training.pictures import draw_scene, rng_for
from training.pixel_rule import score

BATCH = 20


def draw(job):
    """Pictures `(batch_size, 128, 128, 3)` uint8 of the rows, and the safety checker's verdicts on them."""
    import torch
    from diffusers import StableDiffusionPipeline
    from diffusers.utils import logging

    rows, args = job
    torch.set_num_threads(args.threads)
    logging.set_verbosity_error()
    pipeline = StableDiffusionPipeline.from_pretrained(args.model, variant="fp16", torch_dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    pipeline.to(args.device)
    verdicts, check = [], pipeline.run_safety_checker

    def check_but_show(image, device, dtype):
        # Flagged pictures come back black; the rule needs to see what was drawn.
        _, flagged = check(image.clone(), device, dtype)
        verdicts.extend(flagged)
        return image, None

    pipeline.run_safety_checker = check_but_show
    output = pipeline(
        [row["prompt"] for row in rows],
        negative_prompt=[row.get("negative_prompt", "") for row in rows],
        num_inference_steps=args.steps,
        guidance_scale=args.guidance,
        generator=[torch.Generator().manual_seed(int(row["seed"])) for row in rows],
    )
    return [np.asarray(image) for image in output.images], verdicts


def draw_all(rows, args):
    """`draw` for many rows in several processes, with progress."""
    jobs = [(rows[start : start + BATCH], args) for start in range(0, len(rows), BATCH)]
    pictures, verdicts, started = [], [], time.time()
    with multiprocessing.get_context("spawn").Pool(args.processes) as pool:
        for drawn, flagged in pool.imap(draw, jobs):
            pictures += drawn
            verdicts += flagged
            rate = len(pictures) / (time.time() - started)
            left = (len(rows) - len(pictures)) / rate
            print(f"drawn {len(pictures)} of {len(rows)}, {rate:.2f} pictures/s, ETA {left:.0f} s", file=sys.stderr)
    return pictures, verdicts


def judge(pictures, args):
    """The safety checker's verdicts on finished pictures, as the pipeline comes to them."""
    import torch
    from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker
    from transformers import CLIPImageProcessor

    checker = StableDiffusionSafetyChecker.from_pretrained(f"{args.model}/safety_checker", variant="fp16").float()
    extractor = CLIPImageProcessor.from_pretrained(f"{args.model}/feature_extractor")
    pixel_values = extractor([Image.fromarray(p) for p in pictures], return_tensors="pt").pixel_values
    return checker(images=[np.zeros((1, 1, 3))] * len(pictures), clip_input=torch.as_tensor(pixel_values))[1]


def drawn_before(args):
    """Wanted and unwanted pictures of the run before, each with verdicts of today's checker."""
    kept = np.load(f"{args.out}/pictures.npz")
    return [(list(kept[name]), judge(kept[name], args)) for name in ("wanted", "unwanted")]


def sheet(pictures, path, columns):
    """All pictures on one, row by row."""
    pictures = [np.pad(p, ((2, 2), (2, 2), (0, 0)), constant_values=128) for p in pictures]
    pictures += [np.full_like(pictures[0], 128)] * (-len(pictures) % columns)
    lines = [np.concatenate(pictures[k : k + columns], axis=1) for k in range(0, len(pictures), columns)]
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.concatenate(lines)).save(path)


def shares(scores):
    return {key: round(float(np.mean([s[key] for s in scores])), 4) for key in scores[0]}


def measure(args):
    """Everything the README states, as a dict."""
    wanted = held_out.read("held_out.csv")[: args.limit]
    unwanted = held_out.read("held_out_unwanted.csv")[: args.limit]
    scenes = [scene for _, scene in wanted]
    rng = rng_for("rule check")
    truth = [draw_scene(scene, rng)[0] for scene in scenes]
    if args.again:
        (pictures, flagged), (skulls, caught) = drawn_before(args)
    else:
        pictures, flagged = draw_all([row for row, _ in wanted], args)
        skulls, caught = draw_all([row for row, _ in unwanted], args)
        Path(args.out).mkdir(parents=True, exist_ok=True)
        np.savez_compressed(f"{args.out}/pictures.npz", wanted=pictures, unwanted=skulls)
    scores = [score(scene, picture) for scene, picture in zip(scenes, pictures)]
    for name, images in (("held_out", pictures), ("unwanted", skulls)):
        sheet(images, f"{args.out}/{name}.png", 20)
    for (row, _), result in zip(wanted, scores):
        if not (result["colors"] and result["shape_and_place"]):
            print(f"missed: {row['prompt']} {[key for key, right in result.items() if not right]}", file=sys.stderr)
    # Each picture against the next caption but one (so one thing meets one thing): what guessing would get.
    others = scenes[2:] + scenes[:2]
    return dict(
        captions=len(scenes),
        model=shares(scores),
        one_thing=shares([s for s, scene in zip(scores, scenes) if len(scene.things) == 1]),
        two_things=shares([s for s, scene in zip(scores, scenes) if len(scene.things) == 2]),
        rule_on_drawn_pictures=shares([score(scene, picture) for scene, picture in zip(scenes, truth)]),
        other_captions=shares([score(scene, picture) for scene, picture in zip(others, pictures)]),
        unwanted_captions=len(unwanted),
        unwanted_caught=round(float(np.mean(caught)), 4),
        others_flagged=round(float(np.mean(flagged)), 4),
    )


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="model")
    parser.add_argument("--out", default="work/evaluation", help="folder for the sheets and the JSON")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--threads", type=int, default=1, help="threads of each process")
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--guidance", type=float, default=7.5)
    parser.add_argument("--limit", type=int, help="only the first captions, for a quick look")
    parser.add_argument("--again", action="store_true", help="measure the pictures of the run before, with today's checker")
    parser.add_argument("--prompts", help="draw this CSV file (prompt,negative_prompt,seed) and measure nothing")
    args = parser.parse_args()
    if args.prompts:
        with open(args.prompts, newline="") as file:
            rows = list(csv.DictReader(file))
        pictures, verdicts = draw_all(rows, args)
        sheet(pictures, f"{args.out}/prompts.png", 6)
        print(f"flagged: {[row['prompt'] for row, flagged in zip(rows, verdicts) if flagged]}")
        return
    results = measure(args)
    Path(args.out, "results.json").write_text(json.dumps(results, indent=2) + "\n")
    names = ["model", "one_thing", "two_things", "rule_on_drawn_pictures", "other_captions"]
    print(f"{'':24}" + "".join(f"{key:>17}" for key in results["model"]))
    for name in names:
        print(f"{name:24}" + "".join(f"{value:17.1%}" for value in results[name].values()))
    print(f"safety checker: {results['unwanted_caught']:.1%} of {results['unwanted_captions']} unwanted caught, ", end="")
    print(f"{results['others_flagged']:.1%} of {results['captions']} others flagged")


if __name__ == "__main__":
    # For the processes that draw: they read it at their start.
    os.environ.update(ALLOCATOR, OMP_NUM_THREADS="1")
    main()
