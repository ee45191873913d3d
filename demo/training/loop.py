"""What every training loop here shares: several processes, progress lines, resuming.

The processes have one thread each and average their weights every few steps: on a shared machine this is
several times faster than one process with several threads, which waits for the slowest thread in each
single operation.
"""

import math
import os
import time
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

# Steps between two averages of the processes' weights.
SYNC = 10


def launch(train, args):
    """Run `train(rank, args)` in `args.processes` processes, or here on a GPU."""
    if args.device != "cpu" or args.processes == 1:
        return train(0, args)
    os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
    os.environ["MASTER_PORT"] = str(20000 + os.getpid() % 20000)
    mp.spawn(_enter, args=(train, args), nprocs=args.processes)


def _enter(rank, train, args):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=args.processes)
    train(rank, args)
    dist.destroy_process_group()


def average_parameters(parameters, step):
    """Make all processes' weights equal at each `SYNC`-th step; True when it is one.

    In between each process learns from its own batches (local SGD), so none waits for the other.
    """
    if step % SYNC:
        return False
    if dist.is_initialized():
        flat = torch.cat([p.data.flatten() for p in parameters])
        dist.all_reduce(flat)
        flat /= dist.get_world_size()
        offset = 0
        for p in parameters:
            p.data.copy_(flat[offset : offset + p.numel()].view_as(p))
            offset += p.numel()
    return True


class Schedule:
    """Stops after a training time, and gives the learning rate for it: warm-up, then a cosine to zero.

    Time and not steps, because the same command has to fit slow and fast machines; the process's processor
    time, so that work beside it does not shorten the training. The first process decides, so that all stop at
    the same step.
    """

    def __init__(self, minutes, peak, elapsed=0.0, warmup=60):
        self.seconds, self.peak, self.warmup = minutes * 60, peak, warmup
        self.elapsed, self.last = elapsed, time.process_time()
        self.progress = 0.0

    def update(self, optimizer, step):
        """Set the learning rate; False when the time is over."""
        now = time.process_time()
        self.elapsed, self.last = self.elapsed + now - self.last, now
        if step % SYNC == 0:
            progress = torch.tensor(min(1.0, self.elapsed / self.seconds))
            if dist.is_initialized():
                dist.broadcast(progress, 0)
            self.progress = float(progress)
        cosine = 0.5 * (1 + math.cos(math.pi * self.progress))
        rate = self.peak * min(1.0, (step + 1) / self.warmup) * max(cosine, 0.02)
        for group in optimizer.param_groups:
            group["lr"] = rate
        return self.progress < 1.0


class Progress:
    """One line every few seconds: where we are, how fast, how long still."""

    def __init__(self, name, rank, every=20):
        self.name, self.rank, self.every = name, rank, every
        self.last, self.count, self.sums, self.steps = time.time(), 0, {}, 0

    def add(self, step, schedule, pictures, **values):
        self.count, self.steps = self.count + pictures, self.steps + 1
        for key, value in values.items():
            self.sums[key] = self.sums.get(key, 0.0) + float(value)
        now = time.time()
        if self.rank == 0 and now - self.last > self.every:
            numbers = " ".join(f"{k} {v / self.steps:.4f}" for k, v in self.sums.items())
            left = max(0.0, schedule.seconds - schedule.elapsed)
            rate = self.count / (now - self.last)
            print(f"{self.name} step {step} {numbers} {rate:.0f} pictures/s ETA {left / 60:.1f} min", flush=True)
            self.last, self.count, self.sums, self.steps = now, 0, {}, 0


def save_state(path, **state):
    """Write a resume file so that a kill in the middle leaves the old one whole."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    torch.save(state, f"{path}.part")
    os.replace(f"{path}.part", path)


def load_state(path):
    return torch.load(path, weights_only=True) if Path(path).exists() else None


def save_f16(model, folder):
    """`save_pretrained` as the fp16 variant, from a copy: training goes on in f32."""
    import copy

    copy.deepcopy(model).half().save_pretrained(folder, variant="fp16", safe_serialization=True)
    # The library makes weight files readable for their owner only.
    for path in Path(folder).glob("*.safetensors"):
        path.chmod(0o644)
