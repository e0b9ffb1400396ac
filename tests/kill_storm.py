"""A run killed again and again with SIGKILL, and continued each time, against one left in peace.

    python tests/kill_storm.py --kills 50

Every run is `--resume auto` in a forked child. One in four is killed while it starts, the others a
random time after they wrote a checkpoint. After every kill the newest checkpoint, if there is one,
must be whole. Then the run goes on to its end, and its weights,
queue, optimiser state and log must be those of the run that was never killed, to the last bit.
Prints one line per kill and exits with 1 if anything differs. tests/test_kill_storm.py runs a short
one.
"""

from __future__ import annotations

import argparse
import os
import random
import signal
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import timm  # noqa: E402, F401  (once, not in every child)
import torch  # noqa: E402
import torch.utils.tensorboard  # noqa: E402, F401
from PIL import Image  # noqa: E402
from run_comparison import assert_same_run  # noqa: E402

from softcl.data import (
    make_shapes,  # noqa: E402
    sets,  # noqa: E402
)
from softcl.train.__main__ import main as train  # noqa: E402
from softcl.train.checkpoint import read_checkpoint  # noqa: E402


def make_images(root: Path) -> None:
    """96 + 24 small PNG files in the classes of `shapes`."""
    for split, count in (("train", 96), ("test", 24)):
        images = make_shapes(count, split)
        for number, (pixels, label) in enumerate(zip(images.images, images.labels, strict=True)):
            path = root / split / images.classes[int(label)]
            path.mkdir(parents=True, exist_ok=True)
            image = Image.fromarray(pixels.permute(1, 2, 0).numpy())
            image.save(path / f"{number:03d}.png")


def start(flags: list[str], lazy: bool) -> int:
    """Run the training command in a forked child; its process id."""
    child = os.fork()
    if child:
        return child
    quiet = os.open(os.devnull, os.O_WRONLY)
    os.dup2(quiet, 1)
    if lazy:
        sets._default_memory_limit = lambda: 0  # decode on demand, with worker threads
    os._exit(train(flags))


def finish(flags: list[str], lazy: bool) -> None:
    """Run to the end."""
    _, status = os.waitpid(start(flags, lazy), 0)
    if os.waitstatus_to_exitcode(status) != 0:
        raise SystemExit(f"a run ended with exit code {os.waitstatus_to_exitcode(status)}")


def wait_for_another(newest: Path, before: int) -> None:
    """Until `newest` was written again, a minute at most."""
    for _ in range(6000):
        if newest.exists() and newest.stat().st_mtime_ns != before:
            return
        time.sleep(0.01)
    raise SystemExit("no checkpoint was written within a minute")


def storm(folder: Path, kills: int, seed: int, workers: int, longest: float) -> bool:
    make_images(folder / "images")
    line = "--batch-size 16 --queue-size 64 --num-splits 2 --arch resnet_tiny --projection-dim 16 "
    line += f"--projector-hidden 32 --device cpu --checkpoint-every 1 --epochs {3 + 2 * kills} "
    line += "--knn-every 2 --log-every 5 --lr 0.05"
    flags = ["--data", str(folder / "images"), *line.split()]
    if workers:
        flags += ["--workers", str(workers)]
    lazy = workers > 0
    killed, whole = folder / "killed", folder / "whole"
    chooser = random.Random(seed)
    for number in range(kills):
        newest = killed / "last.pt"
        before = newest.stat().st_mtime_ns if newest.exists() else 0
        child = start([*flags, "--resume", "auto", "--out", str(killed)], lazy)
        if number % 4 != 3:
            wait_for_another(newest, before)
        wait = longest * chooser.random()
        time.sleep(wait)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        step = read_checkpoint(newest)["step"] if newest.exists() else "none yet"
        print(f"kill {number + 1} after {wait:.2f} s: checkpoint whole, step {step}", flush=True)
    finish([*flags, "--resume", "auto", "--out", str(killed)], lazy)
    finish([*flags, "--out", str(whole)], lazy)
    try:
        assert_same_run(whole, killed)
    except AssertionError as error:
        print(error)
        return False
    return True


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=0, help="threads that decode; 0: resident")
    parser.add_argument("--longest", type=float, default=0.3, help="seconds until a kill at most")
    options = parser.parse_args()
    torch.set_num_threads(1)  # a forked child must not inherit a pool of threads
    with tempfile.TemporaryDirectory() as folder:
        rest = (options.kills, options.seed, options.workers, options.longest)
        equal = storm(Path(folder), *rest)
    print("equal to the last bit" if equal else "DIFFERENT from the run left in peace")
    return 0 if equal else 1


if __name__ == "__main__":
    sys.exit(main())
