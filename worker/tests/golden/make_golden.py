"""Makes the checkpoints and golden files beside it, from diffusers' and transformers' real classes on the CPU.

    python3 -m venv venv && venv/bin/pip install -r requirements.txt && venv/bin/python make_golden.py

Deterministic: seeded weights, one thread. README.md says what is in the files; VERSIONS.json what made them.
"""

import copy
import importlib.metadata
import json
import platform
import shutil
import warnings
from pathlib import Path

import torch
from safetensors.torch import save_file

import blocks
import checkpoints
import pipelines
import recipes
import schedules
import stages

HERE = Path(__file__).parent


def write_tensors(path: Path, tensors: dict[str, torch.Tensor]) -> None:
    path.parent.mkdir(exist_ok=True)
    # A tensor saved under two names must not share memory.
    save_file({key: value.detach().clone().contiguous() for key, value in tensors.items()}, path)


def write_json(path: Path, value) -> None:
    path.write_text(json.dumps(value, indent=1, ensure_ascii=False) + "\n")


def write_versions() -> None:
    pinned = [line.split("==")[0] for line in (HERE / "requirements.txt").read_text().splitlines() if "==" in line]
    write_json(HERE / "VERSIONS.json", {
        "python": platform.python_version(), **{name: importlib.metadata.version(name) for name in pinned},
        "machine": platform.machine(), "torch_cpu_capability": torch.backends.cpu.get_cpu_capability()})


def write_checkpoint(built, folder: Path):
    """Writes the checkpoint and reads it back, so that the goldens come from what is on disk."""
    shutil.rmtree(folder, ignore_errors=True)
    checkpoints.save_checkpoint(built, folder)
    parts = checkpoints.load_checkpoint(folder, built.old)
    assert checkpoints.same_weights(built, parts)
    return parts


def run_all(parts, runs: list[dict]) -> dict[str, torch.Tensor]:
    # Each run has a copy of its own: a run in half precision rounds the weights for good.
    return {key: value for run in runs for key, value in pipelines.run_pipeline(copy.deepcopy(parts), run).items()}


@torch.no_grad()
def main() -> None:
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    write_versions()
    write_tensors(HERE / "noise.safetensors", schedules.noise())
    cases, trajectories = schedules.schedules()
    write_json(HERE / "schedulers.json", cases)
    write_tensors(HERE / "schedulers.safetensors", trajectories)
    write_tensors(HERE / "blocks.safetensors", blocks.blocks())
    for build in (checkpoints.build_tiny, checkpoints.build_small):
        built = build()
        folder, golden = HERE / built.name, HERE / f"{built.name}-stages"
        shutil.rmtree(golden, ignore_errors=True)
        parts = write_checkpoint(built, folder)
        runs = pipelines.runs(built.name)
        # The checker's thresholds come from the pictures, and the pictures do not depend on the checker: two passes.
        tensors = run_all(parts, runs)
        pictures = [image.numpy() for run in runs for image in tensors[f"{run['name']}.pixels"]]
        checkpoints.choose_concepts(built, pictures)
        parts = write_checkpoint(built, folder)
        write_tensors(golden / "pipeline.safetensors", run_all(parts, runs))
        write_json(golden / "pipeline.json", runs)
        for stage in (stages.text_encoder, stages.unet, stages.vae, stages.safety_checker):
            write_tensors(golden / f"{stage.__name__}.safetensors", stage(parts))
        write_json(golden / "tokens.json", stages.tokens(parts.tokenizer))
        recipes.write(parts)


if __name__ == "__main__":
    main()
