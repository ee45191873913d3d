"""Train the demo model, part by part: `python train.py --help`."""

import argparse
import importlib
import os

# Large tensors come and go each step; giving their pages back to the system each time costs more than half
# of the run time on some machines. The allocator reads this at process start, hence the second start.
ALLOCATOR = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": "100000000000", "MALLOC_TOP_PAD_": "268435456"}

# Part -> (minutes of training, module), in the order in which they build on each other. The minutes are those
# of the published weights; README.md says what of them was learned in a wider world.
PARTS = {
    "assemble": (0, "assemble"),
    "tokenizer": (0, "tokenizer"),
    "vae": (14, "vae"),
    "latents": (0, "latents"),
    "text": (13, "text"),
    "unet": (106, "unet"),
    "guided": (9, "guided"),
    "decoder": (14, "decoder"),
    "safety": (35, "safety"),
}


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("part", choices=[*PARTS, "all"])
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--processes", type=int, default=2, help="CPU processes with one thread each")
    parser.add_argument("--minutes", type=float, help="training time of this part; default: as published")
    parser.add_argument("--model", default="model", help="folder of the finished weights")
    parser.add_argument("--work", default="work", help="folder for resume files and the latents")
    parser.add_argument("--rate", type=float, default=1e-3, help="peak learning rate of the UNet and the safety checker")
    parser.add_argument("--go-on", action="store_true", help="UNet and safety checker: begin with the weights in --model, not random ones")
    parser.add_argument("--f32", dest="bf16", action="store_false", help="train without bfloat16")
    args = parser.parse_args()
    if args.device != "cpu":
        args.processes = 1
    asked = args.minutes
    for part in PARTS if args.part == "all" else [args.part]:
        minutes, module = PARTS[part]
        args.minutes = minutes if asked is None else asked
        module = importlib.import_module(f"training.{module}")
        from training import loop

        loop.launch(module.train, args)


if __name__ == "__main__":
    if "MALLOC_MMAP_MAX_" not in os.environ:
        import sys

        os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, **ALLOCATOR, "OMP_NUM_THREADS": "1"})
    main()
