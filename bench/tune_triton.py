"""Times candidate tiles on the GPU at hand and prints rows for the table in kernels/tiles.py.

    python bench/tune_triton.py --kinds dense --precisions bf16 --widths 128
    python bench/tune_triton.py                                    every row
    python bench/tune_triton.py --every-tile                       and every tile, which takes hours
    TRITON_INTERPRET=1 python bench/tune_triton.py --dry-run       two candidates on the CPU

Candidates differ from the table's tile in one way, or, with --every-tile, in any. Each is compiled
ahead of time first, seconds apiece: one that spills, or does not fit, is not timed. The others run
the streaming kernel alone, at the shape of --shape, in turns; the fastest median is printed, with
how much the tile in the table would lose to it. Rows and queue have one dtype: the fp32 row that
comes out is a both-fp32 one where the table has those.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import torch  # noqa: E402

from softcl.kernels import plan, stream, tiles  # noqa: E402
from softcl.kernels.tiles import Tile  # noqa: E402
from softcl.ops import triton as backend  # noqa: E402
from softcl.testing import make_problem  # noqa: E402

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
ROUNDS = 9


def work_of(kind: str, precision: str, N: int, K: int, D: int) -> plan.Work:
    """The commonest call of a kind; of a "heavy-" one, with a running maximum."""
    heavy, kind = kind.startswith("heavy-"), kind.removeprefix("heavy-")
    loss = dict(has_key=True, normalize=True)
    mode = {
        "search": dict(softmax=False, mean=False, num_neighbors=10),
        "single": loss,
        "mixed": dict(loss, teacher_softmax=True, num_neighbors=5),
        "dense": dict(loss, teacher_softmax=True, teacher_mean=True, num_neighbors=5),
    }[kind]
    coldest = 0.01 if heavy else 0.05
    return plan.Work(N, K, D, DTYPES[precision], DTYPES[precision], **mode, coldest=coldest)


def candidates(kind: str, precision: str, wide: bool):
    """Tiles worth a look; two programs on a multiprocessor where they have four warps."""
    widths = {"bf16": (32, 64, 128), "fp16": (16, 32, 64), "fp32": (16, 32, 64)}[precision]
    splits = (1,) if precision == "bf16" else (1, 2, 4)
    heights = (32, 64, 128)
    if wide:
        splits, heights = (4, 8, 16), (16, *heights)
    for rows, block_k, (warps, programs), stages, pieces in itertools.product(
        heights, widths, ((4, 1), (4, 2), (8, 1)), (1, 2, 3, 4), splits
    ):
        rest = block_k, warps, stages, programs, pieces
        if kind.removeprefix("heavy-") in ("mixed", "dense"):
            yield Tile(rows // 2, *rest, stacked=True)
        if rows > 32 or wide or kind == "search":
            yield Tile(rows, *rest)


def ways_apart(a: Tile, b: Tile) -> int:
    """In how many ways two tiles differ. Warps go with the programs that share a processor."""

    def ways(tile):
        rows = tile.block_n * (1 + tile.stacked)
        warps = tile.num_warps, tile.programs_per_sm
        return rows, tile.stacked, tile.block_k, warps, tile.num_stages, tile.pieces

    return sum(x != y for x, y in zip(ways(a), ways(b), strict=True))


def fits(work: plan.Work, target: str, tile: Tile, shared_per_sm: int) -> bool:
    """It compiles, spills no more than the table's do, and its programs share a multiprocessor."""
    from softcl.kernels import aot

    try:
        found = aot.compile_stream(work, target, tile)
    except Exception:  # Triton has many ways to say that a shape cannot be compiled
        return False
    programs = tile.programs_per_sm
    return (
        found.spilled <= (128 if work.D > tiles.WIDEST_KEPT else 0)
        and found.tensor_products > 0
        and found.shared_memory <= tiles.SHARED_MEMORY[target]
        and programs * (found.shared_memory + 1024) <= shared_per_sm
        and programs * found.tensor_memory <= 512
    )


def timer_of(work: plan.Work, tile: Tile, device: str):
    """A function that runs the streaming kernel once and returns microseconds."""
    target, processors = backend.target_of(torch.device(device, 0))
    how = plan.make_plan(work, target, processors, tile)
    p = make_problem(work.N, work.K, work.D, dtype=work.row_dtype, device=device)
    second = p.key if work.has_key else None
    scale = plan.LOG2_E / work.coldest

    def run() -> float:
        if device == "cpu":
            start = time.perf_counter()
            stream.launch(p.query, second, p.queue, scale, scale, how)
            return (time.perf_counter() - start) * 1e6
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        for _ in range(5):
            stream.launch(p.query, second, p.queue, scale, scale, how)
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) * 200

    return run


def tune(work: plan.Work, shortlist: list[Tile], device: str) -> list[tuple[float, Tile]]:
    """(median microseconds, tile), fastest first; candidates take turns."""
    timers = {}
    for tile in shortlist:
        try:
            timers[tile] = timer_of(work, tile, device)
            timers[tile]()
        except Exception as error:  # one that cannot run is no candidate
            print(f"  {as_cell(tile)}: {type(error).__name__}", file=sys.stderr)
            timers.pop(tile, None)
    samples = {tile: [] for tile in timers}
    for _ in range(1 if device == "cpu" else ROUNDS):
        for tile, run in timers.items():
            samples[tile].append(run())
    medians = ((statistics.median(times), tile) for tile, times in samples.items())
    return sorted(medians, key=lambda result: result[0])


def as_cell(tile: Tile) -> str:
    sizes = f"{tile.block_n}x{tile.block_k}/{tile.num_warps}/{tile.num_stages}"
    pieces = f"/{tile.pieces}" if tile.pieces > 1 else ""
    return f"{'s' if tile.stacked else ''}{sizes}/{tile.programs_per_sm}{pieces}"


def best_cell(
    kind: str, precision: str, D: int, shape: tuple[int, int], device: str, most_ways: int
) -> str:
    """Time one place of the table; the cell to write there."""
    work = work_of(kind, precision, *shape, D)
    target, _ = backend.target_of(torch.device(device, 0))
    current = tiles.find_tile(target, work.kind, work.precision, D, work.heavy)
    if device == "cpu":
        shortlist = [current, Tile(16, 32, 4, 1, 1)]
    else:
        properties = torch.cuda.get_device_properties(0)
        shared = properties.shared_memory_per_multiprocessor
        every = candidates(kind, precision, D > tiles.WIDEST_KEPT)
        near = (x for x in every if ways_apart(x, current) <= most_ways)
        shortlist = [current, *(x for x in near if fits(work, target, x, shared))]
    results = tune(work, list(dict.fromkeys(shortlist)), device)
    (fastest, tile), times = results[0], {tile: t for t, tile in results}
    loss = times.get(current, float("nan")) / fastest - 1
    print(
        f"{kind} {precision} D={D}: {as_cell(tile)} {fastest:.1f} us of {len(results)} tiles; "
        f"the table's {as_cell(current)} takes {100 * loss:.0f} % more",
        file=sys.stderr,
    )
    return as_cell(tile)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    kinds = ("search", "single", "mixed", "dense")
    every = (*kinds, *(f"heavy-{kind}" for kind in kinds[1:]))
    parser.add_argument("--kinds", nargs="+", choices=every, default=kinds)
    parser.add_argument("--precisions", nargs="+", choices=tuple(DTYPES), default=tuple(DTYPES))
    parser.add_argument("--widths", nargs="+", type=int, choices=tiles.WIDTHS, default=tiles.WIDTHS)
    parser.add_argument("--shape", nargs=2, type=int, default=(4096, 65536), metavar=("N", "K"))
    parser.add_argument("--every-tile", action="store_true", help="not only the table's neighbours")
    parser.add_argument("--dry-run", action="store_true", help="two candidates on the CPU")
    arguments = parser.parse_args()
    device, shape = ("cpu", (20, 70)) if arguments.dry_run else ("cuda", tuple(arguments.shape))
    most_ways = 6 if arguments.every_tile else 1
    if device == "cuda" and not torch.cuda.is_available():
        sys.exit("tune_triton: no GPU here; --dry-run tries the script itself")
    for kind, precision in itertools.product(arguments.kinds, arguments.precisions):
        place = kind, precision
        cells = [best_cell(*place, D, shape, device, most_ways) for D in arguments.widths]
        print(f"{kind:<6} {precision}  " + " ".join(f"{cell:<14}" for cell in cells).rstrip())


if __name__ == "__main__":
    main()
