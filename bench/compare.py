"""Our worker beside diffusers, eager and compiled, on the same weights in the same run, taking turns.

    bench/run.sh                                  # everything, from the built binary (see there)
    python bench/compare.py --binary target/release/darkroom-worker --size small

First it checks that all of them make the same pictures from the same seeds; only then are they timed, A B C A B C, so
that a machine whose speed drifts is slow for all of them alike. A ratio above 1 says that ours is faster. Besides the
wall clock there is processor time, which counts on a machine that other programs use too; on a GPU only the wall clock
says anything.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

# No network: all that is loaded is on this machine, and a look at a hub would only cost time.
os.environ.setdefault("HF_HUB_OFFLINE", "1")

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")

import diffusers  # noqa: E402
import numpy as np  # noqa: E402
import torch  # noqa: E402
from diffusers import AutoencoderKL, PNDMScheduler, StableDiffusionPipeline, UNet2DConditionModel  # noqa: E402
from diffusers.pipelines.stable_diffusion import StableDiffusionSafetyChecker  # noqa: E402
from safetensors.torch import load_file  # noqa: E402
from transformers import CLIPConfig, CLIPImageProcessorPil, CLIPTextConfig, CLIPTextModel, CLIPTokenizer  # noqa: E402

DTYPES = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}
# How far outputs may be apart: latents as the largest difference by the largest value, pixels in 255ths. In half
# precision rounding differs from kernel to kernel and 50 steps amplify it: there the mean difference counts.
F32_LATENTS, F32_PIXELS, HALF_LATENTS_MEAN = 1e-3, 2, 0.1


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--binary", required=True, help="our darkroom-worker")
    parser.add_argument("--before", help="another darkroom-worker, such as one from before a change, to compare as well")
    parser.add_argument("--size", default="small", choices=["tiny", "small", "full"], help="of the model that is made")
    parser.add_argument("--model", help="a folder with the model: made there if it is empty, used if it is not")
    parser.add_argument("--device", default="cpu", help="cpu, cuda or cuda:N")
    parser.add_argument("--dtype", default="f32", choices=DTYPES)
    parser.add_argument("--threads", type=int, default=1, help="of the CPU, for all contestants")
    parser.add_argument("--batch-size", type=int, default=1)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--guidance-scale", type=float, default=7.5)
    parser.add_argument("--width", type=int)
    parser.add_argument("--height", type=int)
    parser.add_argument("--denoise-only", action="store_true", help="stop each call after its last denoising step")
    parser.add_argument("--rounds", type=int, default=5, help="measured calls of each contestant")
    parser.add_argument("--warmup", type=int, default=1, help="calls of each before, the first of which is compared")
    parser.add_argument("--skip", nargs="*", default=[], choices=["eager", "compile"])
    parser.add_argument("--json", help="write the result here")
    return parser.parse_args()


class Worker:
    """Our program, which makes one call for each line that it is sent."""

    def __init__(self, binary: str, folder: Path, args: argparse.Namespace):
        self.outputs = Path(tempfile.mkdtemp()) / "outputs.safetensors"
        command = [binary, "--log", "warn", "bench", "--on-demand", "--model", folder, "--device", args.device,
                   "--dtypes", args.dtype, "--cpu-threads", args.threads, "--batch-sizes", args.batch_size,
                   "--num-inference-steps", args.steps, "--guidance-scale", args.guidance_scale,
                   "--outputs", self.outputs]
        for name in ("width", "height"):
            if getattr(args, name):
                command += [f"--{name}", getattr(args, name)]
        if args.denoise_only:
            command += ["--denoise-only"]
        self.process = subprocess.Popen([str(part) for part in command], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                                        text=True, bufsize=1)
        if self.process.stdout.readline() != "ready\n":
            sys.exit(f"{binary} did not start")

    def call(self) -> dict:
        self.process.stdin.write("\n")
        self.process.stdin.flush()
        line = self.process.stdout.readline()
        if not line:
            sys.exit(f"darkroom-worker ended with {self.process.wait()}")
        return json.loads(line)

    def images(self) -> tuple[np.ndarray, np.ndarray]:
        tensors = load_file(self.outputs)
        return tensors["latents"].numpy(), tensors["pixels"].numpy()


class Diffusers:
    """The same calls by StableDiffusionPipeline."""

    def __init__(self, folder: Path, args: argparse.Namespace, compiled: bool):
        self.args, self.pipe = args, load_pipeline(folder, args)
        on_gpu = args.device.startswith("cuda")
        if compiled:
            # What diffusers' guide for speed recommends on a GPU; on a CPU tuning takes many minutes and gains nothing.
            options = {"mode": "max-autotune", "fullgraph": True} if on_gpu else {}
            if on_gpu:
                self.pipe.unet.to(memory_format=torch.channels_last)
                self.pipe.vae.to(memory_format=torch.channels_last)
            self.pipe.unet = torch.compile(self.pipe.unet, **options)
            self.pipe.vae.decode = torch.compile(self.pipe.vae.decode, **options)

    def call(self) -> dict:
        args, denoised = self.args, [0.0, 0.0]
        start, cpu_start = time.perf_counter(), time.process_time()

        def on_step(pipe, index, timestep, kept):
            if index == pipe.num_timesteps - 1:
                self.latents = kept["latents"].float().cpu().numpy()
                denoised[:] = time.perf_counter() - start, time.process_time() - cpu_start
            return {}

        prompts = [f"benchmark picture number {index}" for index in range(args.batch_size)]
        generators = [torch.Generator().manual_seed(index) for index in range(args.batch_size)]
        output = self.pipe(prompts, generator=generators, num_inference_steps=args.steps, width=args.width,
                           height=args.height, guidance_scale=args.guidance_scale, callback_on_step_end=on_step,
                           output_type="latent" if args.denoise_only else "pil")
        self.pixels = np.zeros(0) if args.denoise_only else np.stack([np.asarray(image) for image in output.images])
        return {"seconds": time.perf_counter() - start, "cpu_seconds": time.process_time() - cpu_start,
                "denoised_seconds": denoised[0], "denoised_cpu_seconds": denoised[1]}

    def images(self) -> tuple[np.ndarray, np.ndarray]:
        return self.latents, self.pixels


def load_pipeline(folder: Path, args: argparse.Namespace) -> StableDiffusionPipeline:
    """Built part by part: the files have no VAE encoder, which from_pretrained would fill with noise and complain of."""
    read = lambda name: json.loads((folder / name / "config.json").read_text())

    def filled(model, name: str, stem: str):
        missing, unexpected = model.load_state_dict(load_file(folder / name / f"{stem}.safetensors"), strict=False)
        missing = [key for key in missing if not key.startswith(("encoder.", "quant_conv.")) and "position_ids" not in key]
        assert not missing and not unexpected, (name, missing[:5], unexpected[:5])
        return model.eval().requires_grad_(False)

    stem = "diffusion_pytorch_model"
    text_config = {key: value for key, value in read("text_encoder").items() if key != "architectures"}
    checker_config = {key: value for key, value in read("safety_checker").items() if key != "architectures"}
    pipe = StableDiffusionPipeline(
        unet=filled(UNet2DConditionModel.from_config(read("unet")), "unet", stem),
        vae=filled(AutoencoderKL.from_config(read("vae")), "vae", stem),
        text_encoder=filled(CLIPTextModel(CLIPTextConfig(**text_config)), "text_encoder", "model"),
        safety_checker=filled(StableDiffusionSafetyChecker(CLIPConfig(**checker_config)), "safety_checker", "model"),
        feature_extractor=CLIPImageProcessorPil.from_pretrained(folder / "feature_extractor"),
        tokenizer=CLIPTokenizer.from_pretrained(folder / "tokenizer"),
        scheduler=PNDMScheduler.from_pretrained(folder / "scheduler"))
    pipe.set_progress_bar_config(disable=True)
    return pipe.to(torch.device(args.device), DTYPES[args.dtype])


def make_model(args: argparse.Namespace) -> Path:
    """The model's folder; our program writes it, so that the weights are the ones that it draws itself."""
    folder = Path(args.model or tempfile.mkdtemp())
    if not (folder / "unet/diffusion_pytorch_model.safetensors").exists():
        command = [args.binary, "--log", "warn", "bench", "--size", args.size, "--save-model", folder, "--save-only"]
        subprocess.run([str(part) for part in command], check=True, stdout=subprocess.DEVNULL)
    return folder


def differences(ours, theirs) -> dict:
    (latents, pixels), (their_latents, their_pixels) = ours, theirs
    latents, their_latents = latents.astype(np.float64), their_latents.astype(np.float64)
    apart = np.abs(latents - their_latents)
    # Without pixels, there is nothing apart.
    pixels_apart = np.append(np.abs(pixels.ravel().astype(int) - their_pixels.ravel().astype(int)), 0)
    return {"latents_max": apart.max() / np.abs(their_latents).max(),
            "latents_mean": apart.mean() / np.abs(their_latents).mean(),
            "pixels_max": int(pixels_apart.max()), "pixels_mean": float(pixels_apart.mean())}


def agree(found: dict, dtype: str) -> bool:
    if dtype == "f32":
        return found["latents_max"] <= F32_LATENTS and found["pixels_max"] <= F32_PIXELS
    return found["latents_mean"] <= HALF_LATENTS_MEAN


def spread(values: list[float]) -> dict:
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def main() -> None:
    args = parse()
    torch.set_num_threads(args.threads)
    torch.set_grad_enabled(False)
    folder = make_model(args)
    contestants = {"darkroom": Worker(args.binary, folder, args)}
    if args.before:
        contestants["before"] = Worker(args.before, folder, args)
    for name in ("eager", "compile"):
        if name not in args.skip:
            contestants[name] = Diffusers(folder, args, compiled=name == "compile")

    result = {"arguments": vars(args), "machine": platform.machine(), "processor": processor(), "torch": torch.__version__,
              "diffusers": diffusers.__version__, "agreement": {}, "contestants": {}, "ratios": {}}
    if args.device.startswith("cuda"):
        result["gpu"] = torch.cuda.get_device_name(args.device)
    for call in range(max(args.warmup, 1)):
        for name, contestant in contestants.items():
            contestant.call()
            if call > 0 or name == "darkroom":
                continue
            found = differences(contestants["darkroom"].images(), contestant.images())
            result["agreement"][name] = found
            print(f"darkroom and {name}: latents differ by {found['latents_max']:.1e} of their largest value, "
                  f"pixels by at most {found['pixels_max']}", flush=True)
            if not agree(found, args.dtype):
                sys.exit("the outputs do not agree: there is nothing to time")

    calls = {name: [] for name in contestants}
    for _ in range(args.rounds):
        for name, contestant in contestants.items():
            calls[name].append(contestant.call())
    for name, measured in calls.items():
        figures = {key: spread([call[key] for call in measured])
                   for key in ("seconds", "cpu_seconds", "denoised_seconds", "denoised_cpu_seconds")}
        result["contestants"][name] = figures
        print(f"{name:9} {figures['seconds']['median']:9.3f} s a call, {figures['cpu_seconds']['median']:9.3f} s of CPU")
    for name in list(contestants)[1:]:
        result["ratios"][name] = {}
        for key, words in (("seconds", "wall clock"), ("cpu_seconds", "CPU time"),
                           ("denoised_cpu_seconds", "CPU time until denoised")):
            ratio = spread([theirs[key] / ours[key] for ours, theirs in zip(calls["darkroom"], calls[name])])
            result["ratios"][name][key] = ratio
            print(f"{name} / darkroom, {words}: {ratio['median']:.3f} ({ratio['min']:.3f} to {ratio['max']:.3f})")
    if args.json:
        Path(args.json).write_text(json.dumps(result, indent=1) + "\n")


def processor() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    return next((line.split(": ")[1] for line in lines if line.startswith("model name")), platform.processor())


if __name__ == "__main__":
    main()
