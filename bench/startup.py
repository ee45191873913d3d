"""How long the worker takes until it could take its first denoising step, beside the time that only reading its files takes.

    python3 bench/startup.py BINARY FOLDER [ROUNDS]

The two take turns. First with files that are not in memory (the page cache is asked to forget them, which it may refuse),
then with files that are.
"""

import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

binary, folder, rounds = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]) if len(sys.argv) > 3 else 3
files = sorted(folder.rglob("*.safetensors"))
CHUNK = 8 << 20


def forget() -> None:
    for file in files:
        handle = os.open(file, os.O_RDONLY)
        os.fsync(handle)
        os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(handle)


def read() -> float:
    start, buffer = time.perf_counter(), bytearray(CHUNK)
    for file in files:
        with open(file, "rb", buffering=0) as handle:
            while handle.readinto(buffer):
                pass
    return time.perf_counter() - start


def start_worker() -> float:
    start = time.perf_counter()
    command = [binary, "--log", "warn", "bench", "--on-demand", "--model", str(folder)]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "ready\n"
    seconds = time.perf_counter() - start
    process.kill()
    process.wait()
    return seconds


for cold in (True, False):
    reading, starting = [], []
    for _ in range(rounds):
        for seconds, measure in ((reading, read), (starting, start_worker)):
            if cold:
                forget()
            seconds.append(measure())
    ratios = [b / a for a, b in zip(reading, starting)]
    print(f"{'cold' if cold else 'warm'}: reading {sum(file.stat().st_size for file in files) / 1e9:.2f} GB takes "
          f"{statistics.median(reading):.2f} s, starting {statistics.median(starting):.2f} s; ratio "
          f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})", flush=True)
