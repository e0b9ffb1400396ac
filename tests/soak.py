"""A long run watched from outside: its memory must not grow, nor the number of its open files.

    python tests/soak.py --minutes 20

Trains on small PNG files that two threads decode on demand, with everything that happens seldom
made to happen often: a log line every step, k-NN every epoch, a checkpoint every twelve steps. Once
a second the resident memory and the open files of the process are read from /proc (Linux alone).
The first quarter of the time, half a minute at least, counts as warming up. Prints a line a minute
and the verdict; exits with 1 if memory grew by 1 MB a minute or more, or files were left open.
tests/test_soak.py tests the verdict.
"""

from __future__ import annotations

import argparse
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

LARGEST_SLOPE = 1.0  # MB per minute
# In the child: the images do not count as small enough to be held in memory.
TRAIN = """
import sys
from softcl.data import sets
from softcl.train.__main__ import main
sets._default_memory_limit = lambda: 0
sys.exit(main(sys.argv[1:]))
"""
FLAGS = "--workers 2 --batch-size 8 --queue-size 64 --num-splits 2 --arch resnet_tiny --device cpu "
FLAGS += "--projection-dim 16 --projector-hidden 32 --epochs 1000000 --knn-every 1 --log-every 1 "
FLAGS += "--checkpoint-every 12 --lr 0.01"


@dataclass(frozen=True)
class Sample:
    """What the process held at one moment."""

    seconds: float
    rss: float  # MB
    files: int


def sample(process: int, started: float) -> Sample:
    status = Path(f"/proc/{process}/status").read_text()
    rss = next(int(x.split()[1]) for x in status.splitlines() if x.startswith("VmRSS"))
    files = len(os.listdir(f"/proc/{process}/fd"))
    return Sample(time.monotonic() - started, rss / 1024, files)


def slope(samples: list[Sample]) -> float:
    """Growth of memory in MB per minute, by least squares."""
    minutes = [s.seconds / 60 for s in samples]
    return statistics.linear_regression(minutes, [s.rss for s in samples]).slope


def files_left(samples: list[Sample]) -> int:
    """Files open at the end and not at the beginning; those open for a moment do not count."""
    third = max(1, len(samples) // 3)
    first, last = samples[:third], samples[-third:]
    return min(s.files for s in last) - min(s.files for s in first)


def watch(process: subprocess.Popen, minutes: float) -> list[Sample]:
    started, samples = time.monotonic(), []
    while (now := time.monotonic() - started) < 60 * minutes:
        if process.poll() is not None:
            raise SystemExit(f"the run ended by itself, with exit code {process.returncode}")
        samples.append(sample(process.pid, started))
        if int(now) % 60 == 0:
            print(f"{now / 60:4.0f} min  {samples[-1].rss:7.1f} MB  {samples[-1].files} files")
            sys.stdout.flush()
        time.sleep(1.0 - now % 1.0)
    return samples


def verdict(samples: list[Sample], minutes: float) -> bool:
    warm = max(30.0, 15 * minutes)
    samples = [s for s in samples if s.seconds >= warm]
    if len(samples) < 10:
        raise SystemExit("too short: nothing is left after warming up")
    growth, left = slope(samples), files_left(samples)
    print(f"memory grew by {growth:.3f} MB per minute, {left} files were left open")
    return growth < LARGEST_SLOPE and left <= 0


def main() -> int:
    from kill_storm import make_images

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=20.0)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        make_images(Path(folder) / "images")
        line = ["--data", f"{folder}/images", "--out", f"{folder}/run", *FLAGS.split()]
        with open(f"{folder}/output", "wb") as output:
            command = [sys.executable, "-c", TRAIN, *line]
            process = subprocess.Popen(command, cwd=ROOT, stdout=output, stderr=output)
        try:
            samples = watch(process, options.minutes)
            process.send_signal(signal.SIGTERM)
            code = process.wait(timeout=120)
        finally:
            process.kill()
        steps = len(Path(f"{folder}/run/metrics.jsonl").read_text().splitlines())
        print(f"{steps} lines of metrics.jsonl in {options.minutes:g} minutes, exit code {code}")
        if code != 128 + signal.SIGTERM:
            print(Path(f"{folder}/output").read_text()[-2000:])
            return 1
    return 0 if verdict(samples, options.minutes) else 1


if __name__ == "__main__":
    sys.exit(main())
