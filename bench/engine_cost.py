"""What PyTorch's engine costs a run of one process: the ways of many processes, with W = 1.

    python bench/engine_cost.py                    NCCL on a GPU, gloo on the CPU
    python bench/engine_cost.py --arch resnet_tiny --batch-size 64

A single process never starts ``torch.distributed``. Here one does: gradients go through DDP's
buckets, keys, measures and the teacher's shuffle through exchanges with nobody, and the queue is
replicated or, in the last row, sharded. Whole training steps of the three are timed in turn, so
that all meet the same machine, after their losses were compared. Exits with 1 where the engine with
a replicated queue costs more than 3 %.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from softcl.data import ImageSet, make_shapes  # noqa: E402
from softcl.distributed import ALONE, World  # noqa: E402
from softcl.train.config import TrainConfig  # noqa: E402
from softcl.train.defaults import fill  # noqa: E402
from softcl.train.images import build_views  # noqa: E402
from softcl.train.parts import (
    build_state,  # noqa: E402
    keep_freed_pages,  # noqa: E402
)
from softcl.train.step import train_step  # noqa: E402

LIMIT = 1.03
TOLERANCE = 1e-4  # of the first step's loss; on GPUs the shuffles differ, and so do the splits
ROWS = ("no engine", "engine", "engine, queue sharded")


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    on_gpu = torch.cuda.is_available()
    parser.add_argument("--device", default="cuda" if on_gpu else "cpu", choices=("cpu", "cuda"))
    parser.add_argument("--arch", default="resnet18")
    parser.add_argument("--batch-size", type=int, default=256 if on_gpu else 64)
    parser.add_argument("--rounds", type=int, default=100 if on_gpu else 20)
    parser.add_argument("--warmup", type=int, default=3)
    return parser.parse_args(argv)


class Steps:
    """Whole steps of one world on a batch of images."""

    def __init__(self, options: argparse.Namespace, world: World, sharded: bool) -> None:
        device = torch.device(options.device)
        images: ImageSet = make_shapes(options.batch_size)
        config = TrainConfig.of(
            arch=options.arch, batch_size=options.batch_size, epochs=200, num_splits=1,
            queue_sharding=sharded,
        )  # fmt: skip
        self.config, method, _ = fill(config, images, 32)
        self.state = build_state(self.config, method, device, world)
        self.views = build_views(method, images, 32)
        self.batch = images.batch(torch.arange(options.batch_size)).to(device)

    def __call__(self) -> tuple[float, float]:
        """Seconds and loss of one step."""
        start = time.perf_counter()
        measures = train_step(
            self.state, self.batch, self.views, seed=self.config.seed, backend="auto"
        )
        loss = float(measures[0])  # waits for the device
        return time.perf_counter() - start, loss


def main(argv: list[str] | None = None) -> int:
    options = parse(argv)
    keep_freed_pages()
    engine = "nccl" if options.device == "cuda" else "gloo"
    dist.init_process_group(engine, store=dist.HashStore(), rank=0, world_size=1)
    try:
        world = World.joined(0)
        world.even = True
        return compare(options, engine, world)
    finally:
        dist.destroy_process_group()


def compare(options: argparse.Namespace, engine: str, world: World) -> int:
    contenders = [
        Steps(options, ALONE, False), Steps(options, world, False), Steps(options, world, True),
    ]  # fmt: skip
    losses = [steps()[1] for steps in contenders]
    for name, loss in zip(ROWS, losses, strict=True):
        if abs(loss - losses[0]) > TOLERANCE * abs(losses[0]):
            print(f"{name}: the first loss is {loss}, without the engine {losses[0]}")
            return 1
    times: list[list[float]] = [[] for _ in contenders]
    for _ in range(options.warmup + options.rounds):
        for place, steps in enumerate(contenders):
            times[place].append(steps()[0])
    medians = [statistics.median(row[options.warmup :]) for row in times]
    # Of each round's own pair: what drifts from round to round touches both.
    ratios = [statistics.median(x / y for x, y in zip(row, times[0], strict=True)) for row in times]
    print(f"{options.arch}, batch {options.batch_size}, {options.device}, engine {engine}, W 1, "
          f"torch {torch.__version__}, {options.rounds} rounds")  # fmt: skip
    for name, seconds, ratio in zip(ROWS, medians, ratios, strict=True):
        print(f"{name:<22} {1e3 * seconds:9.2f} ms  {ratio:.3f}")
    return int(ratios[1] > LIMIT)


if __name__ == "__main__":
    sys.exit(main())
