"""What each recipe saves, and how far its pictures are from the exact ones, with the demo model and captions of its held-out file.

    python bench/recipes.py --binary target/release/darkroom-worker --sheet sheet.png

Every picture is drawn by `darkroom-worker generate`. Speed is processor time of whole pictures, which counts on a machine that
other programs use too: one `darkroom-worker bench --on-demand` for each recipe, all taking turns, so that a machine whose speed
drifts is slow for all of them alike. Pictures are compared with the exact one of the same caption and seed, and with the caption
itself by the demo's pixel rule. The safety checker is left out, since it would black out some pictures of both.

Needs numpy and Pillow, and nothing of torch. An interrupt (Ctrl-C) ends the drawing and compares what there is by then.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "demo"))
from training import held_out  # noqa: E402
from training.pixel_rule import score  # noqa: E402

# Name, and the options that are not those of the exact picture: the checkpoint's PNDM with 50 steps, guidance 7.5.
RECIPES = {
    "exact": [],
    "DPM++ 25": ["--scheduler", "dpmpp_2m_karras", "--num-inference-steps", "25"],
    "DPM++ 20": ["--scheduler", "dpmpp_2m_karras", "--num-inference-steps", "20"],
    "guided 0-0.6": ["--guidance-stop", "0.6"],
    "guided 0.1-0.7": ["--guidance-start", "0.1", "--guidance-stop", "0.7"],
    "cache 2": ["--cache-interval", "2"],
    "cache 3": ["--cache-interval", "3"],
    "cache 5": ["--cache-interval", "5"],
}
# A pixel counts as changed when one of its colors is more than so many 255ths off: less is hard to see.
STEP = 16


def parse():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--binary", required=True, type=Path, help="our darkroom-worker")
    parser.add_argument("--model", type=Path, default=ROOT / "demo/model")
    parser.add_argument("--captions", type=int, default=24, help="how many of demo/held_out.csv, from the first")
    parser.add_argument("--rounds", type=int, default=5, help="timed pictures of each recipe")
    parser.add_argument("--sheet", type=Path, help="write a PNG with one row a caption, one column a recipe")
    parser.add_argument("--sheet-rows", type=int, default=8)
    parser.add_argument("--json", type=Path, help="write the result here")
    return parser.parse_args()


def without_checker(model, folder):
    """A folder with the same model, but for its safety checker."""
    for entry in model.iterdir():
        if entry.is_dir() and entry.name not in ("safety_checker", "feature_extractor"):
            (folder / entry.name).symlink_to(entry.resolve())
    index = json.loads((model / "model_index.json").read_text())
    index |= {"safety_checker": [None, None], "feature_extractor": [None, None], "requires_safety_checker": False}
    (folder / "model_index.json").write_text(json.dumps(index))
    return folder


class Contestant:
    """One recipe's program, which draws a picture for each line that it is sent."""

    def __init__(self, binary, model, options):
        # `bench` has its own default scheduler and number of steps; clap refuses an option twice.
        exact = {"--scheduler": "pndm", "--num-inference-steps": "50"}
        both = exact | dict(zip(options[::2], options[1::2]))
        command = [binary, "--log", "error", "bench", "--on-demand", "--model", model]
        command += [word for pair in both.items() for word in pair]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        assert self.process.stdout.readline() == "ready\n", "the program did not start"

    def call(self):
        """Processor seconds of one whole picture, and its denoising steps."""
        self.process.stdin.write("\n")
        self.process.stdin.flush()
        answer = json.loads(self.process.stdout.readline())
        return answer["cpu_seconds"], answer["num_steps"]

    def end(self):
        self.process.stdin.close()
        self.process.wait()


def time_all(args, model):
    """For each recipe its steps, and its processor time in each round by that of the exact picture in the same round."""
    contestants = {name: Contestant(args.binary, model, options) for name, options in RECIPES.items()}
    steps = {name: contestant.call()[1] for name, contestant in contestants.items()}  # and warm
    rounds = []
    for number in range(args.rounds):
        rounds.append({name: contestant.call()[0] for name, contestant in contestants.items()})
        print(f"timed round {number + 1} of {args.rounds}", file=sys.stderr)
    for contestant in contestants.values():
        contestant.end()
    return {
        name: dict(
            steps=steps[name],
            cpu_seconds=statistics.median(times[name] for times in rounds),
            ratios=sorted(times["exact"] / times[name] for times in rounds),
        )
        for name in RECIPES
    }


def draw(args, model, row, options, folder):
    """The picture of a caption, `(height, width, 3)` uint8."""
    output = folder / "picture.png"
    command = [args.binary, "--log", "error", "generate", "--model", model, "--prompt", row["prompt"], "--seed", row["seed"],
               "--output", output, *options]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return np.asarray(Image.open(output).convert("RGB"))


def psnr(picture, exact):
    error = np.mean((picture.astype(np.float64) - exact) ** 2)
    return float("inf") if error == 0 else 10 * np.log10(255**2 / error)


def compare(pictures, scenes):
    """How one recipe's pictures differ from the exact ones, and whether they show what their captions say."""
    results = {}
    for name, drawn in pictures.items():
        exact = pictures["exact"]
        changed = [np.mean(np.abs(a.astype(int) - b).max(-1) > STEP) for a, b in zip(drawn, exact)]
        scores = [score(scene, picture) for scene, picture in zip(scenes, drawn)]
        right = [s["colors"] and s["shape_and_place"] for s in scores]
        results[name] = dict(
            psnr_median=float(np.median([psnr(a, b) for a, b in zip(drawn, exact)])),
            psnr_worst=float(min(psnr(a, b) for a, b in zip(drawn, exact))),
            changed_mean=float(np.mean(changed)),
            changed_worst=float(max(changed)),
            right=sum(right),
            colors=sum(s["colors"] for s in scores),
            shape_and_place=sum(s["shape_and_place"] for s in scores),
        )
    return results


def write_sheet(path, pictures, rows):
    """Rows are captions, columns recipes, their names above."""
    height, width = pictures["exact"][0].shape[:2]
    gap, head = 4, 16
    sheet = Image.new("RGB", (len(RECIPES) * (width + gap) - gap, head + rows * (height + gap) - gap), "white")
    pen = ImageDraw.Draw(sheet)
    for column, (name, drawn) in enumerate(pictures.items()):
        pen.text((column * (width + gap) + 4, 2), name, fill="black")
        for row, picture in enumerate(drawn[:rows]):
            sheet.paste(Image.fromarray(picture), (column * (width + gap), head + row * (height + gap)))
    # 128 colors are enough to look at flat shapes, and a third of the bytes.
    sheet.quantize(128, dither=Image.Dither.NONE).save(path, optimize=True)


def main():
    args = parse()
    captions = held_out.read(ROOT / "demo/held_out.csv")[: args.captions]
    scenes = [scene for _, scene in captions]
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        (folder / "model").mkdir()
        model = without_checker(args.model, folder / "model")
        speed = time_all(args, model)
        pictures = {name: [] for name in RECIPES}
        try:
            for number, (row, _) in enumerate(captions):
                drawn = {name: draw(args, model, row, options, folder) for name, options in RECIPES.items()}
                for name, picture in drawn.items():
                    pictures[name].append(picture)
                print(f"drawn {number + 1} of {len(captions)} captions", file=sys.stderr)
        except KeyboardInterrupt:
            print("interrupted: the captions drawn so far are compared", file=sys.stderr)
    count = len(pictures["exact"])
    results = compare(pictures, scenes[:count])
    print(f"{count} captions; time is processor time of whole pictures, {args.rounds} rounds")
    print(f"{'recipe':15}{'UNet calls':>11}{'seconds':>9}{'times as fast':>21}{'PSNR':>7}{'worst':>7}{'changed':>9}{'worst':>8}"
          f"{'colors':>8}{'shape+place':>12}{'all right':>10}")
    for name in RECIPES:
        timed, found = speed[name], results[name]
        ratios = timed["ratios"]
        faster = f"{statistics.median(ratios):.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f})"
        print(f"{name:15}{timed['steps']:11}{timed['cpu_seconds']:9.2f}{faster:>21}{found['psnr_median']:7.1f}"
              f"{found['psnr_worst']:7.1f}{found['changed_mean']:9.1%}{found['changed_worst']:8.1%}{found['colors']:8}"
              f"{found['shape_and_place']:12}{found['right']:10}")
    if args.sheet:
        write_sheet(args.sheet, pictures, min(args.sheet_rows, count))
    if args.json:
        args.json.write_text(json.dumps({name: speed[name] | results[name] for name in RECIPES}, indent=2) + "\n")


if __name__ == "__main__":
    main()
