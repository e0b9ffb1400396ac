"""What a step costs among W processes: bytes by formula, and seconds at a given link speed.

    python bench/scaling.py --processes 2 8 32 --gigabytes 25
    python bench/scaling.py --gflops 195 --gigabytes 1.25 --queries 256   # long queues
    torchrun --nproc-per-node=2 bench/scaling.py --queries 256 --rows 4096     # counted, on gloo

The first prints the model of bench/traffic.py; computation that runs beside an
exchange would hide some of it. The second takes a measured rate of the loss and prints, for queues
of up to 100 M rows, bytes and seconds on one device, and from how many on the exchange of a sharded
loss takes longer than its work. The third runs the exchanges of a step and prints the bytes that
each process counted and, for all of them together, what went through the loopback device.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))

import softcl  # noqa: E402
from bench import traffic  # noqa: E402
from bench.shapes import Shape, loss_cost  # noqa: E402
from softcl.distributed import ShardedQueue, World  # noqa: E402
from softcl.labels import AdaptiveSoftLabels, HardLabels  # noqa: E402

RULES = {"ascl 5": AdaptiveSoftLabels(5), "ascl 1": AdaptiveSoftLabels(1), "moco": HardLabels()}
STEPS = 5
QUEUES = (65536, 131072, 1 << 20, 100_000_000)
# N x K matrices that live at once in eager PyTorch, float32: bench_memory.py measures it (matrices
# in the extra information).
EAGER_MATRICES = 6


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2, 4, 8, 32])
    parser.add_argument("--queries", type=int, default=128, help="n, rows of one process")
    parser.add_argument("--rows", type=int, default=65536, help="K, of the whole queue")
    parser.add_argument("--dim", type=int, default=128)
    parser.add_argument("--parameters", type=float, default=23.5e6, help="P (ResNet-50: 23.5e6)")
    parser.add_argument("--entry-bytes", type=int, default=2, help="of a vector and of the queue")
    parser.add_argument("--gigabytes", type=float, default=25.0, help="a second into a process")
    parser.add_argument("--gflops", type=float, help="rate of the loss, 1e9 a second (measured)")
    return parser.parse_args()


def show_model(options: argparse.Namespace) -> None:
    n, dim, b = options.queries, options.dim, options.entry_bytes
    print(f"n {n}, K {options.rows}, D {dim}, {b} bytes an entry, {options.gigabytes} GB/s")
    print(f"{'W':>5} {'queue MB':>9} {'what':<22} {'MB received':>12} {'ms':>8}")
    for W in options.processes:
        parts = {
            "gradients": traffic.gradients(W, int(options.parameters)),
            "keys, replicated": traffic.replicated_enqueue(W, n, dim, key_bytes=b),
            "keys, sharded": traffic.sharded_enqueue(W, n, dim, key_bytes=b),
        }
        for name, rule in RULES.items():
            parts[f"loss, sharded: {name}"] = traffic.sharded_loss(rule, W, n, dim, vector_bytes=b)
        held = -(-options.rows // W) * dim * b / 1e6
        for name, size in parts.items():
            ms = size / options.gigabytes / 1e6
            print(f"{W:>5} {held:>9.1f} {name:<22} {size / 1e6:>12.3f} {ms:>8.3f}")


def show_queues(options: argparse.Namespace) -> None:
    """Of ASCL with several neighbours, whose traffic grows with n as its work does: n cancels."""
    n, dim, b, rule = options.queries, options.dim, options.entry_bytes, RULES["ascl 5"]
    print(f"N {n}, D {dim}, queue {b} bytes an entry, {options.gflops} Gflop/s, "
          f"{options.gigabytes} GB/s")  # fmt: skip
    print(f"{'K':>11} {'queue GB':>9} {'loss s':>10} {'eager GB':>9} {'exchange binds from W':>22}")
    for rows in QUEUES:
        seconds = loss_cost(Shape(n, rows, dim), rule).flop / options.gflops / 1e9
        received = traffic.sharded_loss(rule, 2, n, dim, vector_bytes=b)  # from each other process
        # (W - 1) received / link > seconds of n rows against the whole queue
        binds = int(1 + seconds * options.gigabytes * 1e9 / received) + 1
        eager = EAGER_MATRICES * 4 * n * rows / 1e9
        held = rows * dim * b / 1e9
        print(f"{rows:>11,} {held:>9.3f} {seconds:>10.3g} {eager:>9.2f} {binds:>22,}")


def through_loopback() -> int | None:
    """Bytes that the loopback device has carried so far; None where that cannot be read."""
    try:
        lines = Path("/proc/net/dev").read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) for line in lines if line.strip().startswith("lo:")), None)


def count(options: argparse.Namespace, world: World) -> None:
    n, dim, W = options.queries, options.dim, world.size
    queue = ShardedQueue(options.rows, dim, world)
    generator = torch.Generator().manual_seed(world.rank)
    query, key = (torch.randn(n, dim, generator=generator) for _ in range(2))
    query.requires_grad_()
    for name, rule in RULES.items():
        world.wait()
        world.received.clear()
        before = through_loopback()
        for _ in range(STEPS):
            loss, _ = softcl.soft_contrastive_loss(
                query, key, queue.rows, rule, temperature=0.1, teacher_temperature=0.05,
                normalize=True, diagnostics=True,
            )  # fmt: skip
            loss.backward()
        world.wait()
        after = through_loopback()
        counted = world.received.total() / STEPS
        formula = traffic.sharded_loss(rule, W, n, dim)
        if world.is_main_process:
            carried = "" if before is None else f", loopback {(after - before) / STEPS / W:,.0f}"
            print(f"{name:<8} W {W}: counted {counted:,.0f}, formula {formula:,}{carried} bytes "
                  "per process and step")  # fmt: skip
        assert counted == formula


def main() -> None:
    options = parse()
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return show_queues(options) if options.gflops else show_model(options)
    torch.set_num_threads(1)
    world = World.start(cuda=False)
    world.even = True
    count(options, world)
    world.close()


if __name__ == "__main__":
    main()
