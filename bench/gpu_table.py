"""Checks one of our backends on the GPU at hand, then times it beside its peers.

    python bench/gpu_table.py [--backend triton] [--out FOLDER] [--budget SECONDS]
                                                            writes <gpu>-triton.json and .md
    python bench/gpu_table.py --backend cuda --small        one small call of every kind
    TRITON_INTERPRET=1 python bench/gpu_table.py --dry-run  tiny shapes on the CPU

A process runs one of them: what one breaks on the device is then not taken for the other's fault.

Every row is held to the float64 oracle, to the same bits over 20 runs and to a CUDA graph's replay
before it is timed; what is wrong is said in its place, is not timed, and makes the exit status 1.
Times are forward and gradient, medians of rounds in which the contenders take turns, each a CUDA
graph of 20 calls that go round copies of the inputs larger than L2 together.
"""

from __future__ import annotations

import argparse
import functools
import importlib.metadata
import json
import math
import os
import statistics
import sys
import time
from dataclasses import asdict, dataclass, field
from datetime import date
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parent.parent), str(Path(__file__).parent)]

import torch  # noqa: E402
from graph_timing import CALLS, capture, python_time, timer_of  # noqa: E402
from peers import PEERS, absent  # noqa: E402

import softcl  # noqa: E402
from bench.ceilings import product_rate  # noqa: E402
from softcl.nn import MemoryQueue  # noqa: E402
from softcl.testing import (  # noqa: E402
    Problem,
    assert_loss_close,
    assert_neighbors_close,
    loss_oracle,
    make_problem,
)

RULES = {
    "top-k": softcl.AdaptiveNeighborLabels(5),
    "dense": softcl.AdaptiveSoftLabels(5),
    "hard": softcl.HardLabels(),
}
PRODUCTS = {"top-k": 6, "dense": 8, "hard": 4, "search": 2}  # FLOP / (N K D)
TEMPERATURES = 0.1, 0.05
DETERMINISM_RUNS = 20
ROUNDS = 7
OURS = ("triton", "cuda")


@dataclass
class Row:
    """One line of the table: a shape, what is computed, and what came out, in microseconds."""

    N: int
    K: int
    D: int
    kind: str  # of RULES, or "search": the 10 nearest rows alone
    target: float = math.nan
    times: dict[str, float | str] = field(default_factory=dict)
    python: float = math.nan  # host time of one call of ours
    floor: float = math.nan  # at the measured rate of a large bf16 product
    graph: bool = True  # our calls were timed in a CUDA graph
    wrong: bool = False  # our results are

    @property
    def flop(self) -> int:
        return PRODUCTS[self.kind] * self.N * self.K * self.D


ROWS = [
    Row(256, 4096, 128, "top-k", 20),
    Row(256, 4096, 128, "dense", 20),
    Row(256, 65536, 128, "top-k", 50),
    Row(256, 65536, 128, "dense", 55),
    Row(1024, 65536, 128, "top-k", 140),
    Row(1024, 65536, 128, "dense", 180),
    Row(4096, 65536, 128, "top-k", 520),
    Row(4096, 65536, 128, "dense", 620),
    Row(4096, 65536, 128, "hard"),
    Row(16384, 100000, 128, "search", 1300),
    Row(4096, 65536, 256, "top-k", 950),
    Row(4096, 65536, 256, "dense", 1250),
    Row(4096, 1048576, 128, "top-k", 10000),
    Row(4096, 1048576, 128, "dense", 10000),
]
DRY_ROWS = [Row(3, 70, 16, kind) for kind in ("top-k", "dense", "hard", "search")]

# torch.compile takes 10 to 30 seconds a shape: only where the table is decided.
COMPILED_SHAPES = {(1024, 65536, 128), (4096, 65536, 128)}


# ------------------------------------------------------------------------------------------ inputs


def inputs_of(row: Row, device: str, copies: int) -> list[Problem]:
    """Unit rows, bf16 on a GPU; made on the device, since a million rows take long on the host."""
    if device == "cpu":
        return [make_problem(row.N, row.K, row.D, seed=i) for i in range(copies)]
    generator = torch.Generator(device=device).manual_seed(0)

    def unit(rows: int) -> torch.Tensor:
        x = torch.randn(rows, row.D, generator=generator, device=device)
        return torch.nn.functional.normalize(x, dim=1).bfloat16()

    return [Problem(unit(row.N), unit(row.N), unit(row.K)) for _ in range(copies)]


def copies_for(row: Row, device: str) -> int:
    """So many that together they are three times as large as L2, up to one for each call."""
    if device == "cpu":
        return 2
    l2 = torch.cuda.get_device_properties(0).L2_cache_size
    return max(1, min(CALLS, math.ceil(3 * l2 / (2 * row.D * (row.K + 2 * row.N)))))


def contenders_of(row: Row, device: str, backend: str) -> dict:
    """Name -> step(problem) that computes losses and gradient, or neighbours; ours is the first."""
    if row.kind == "search":
        return {backend: lambda p: search(p, backend), "matmul + topk": search_in_blocks}
    own = functools.partial(ours, backend=backend)
    steps = {backend: lambda p: loss_step(own, p, RULES[row.kind])}
    for name, peer in PEERS.items():
        if absent(name, device, RULES[row.kind]):
            continue
        if name == "compiled" and (device == "cpu" or (row.N, row.K, row.D) not in COMPILED_SHAPES):
            continue
        steps[name] = lambda p, peer=peer: loss_step(peer, p, RULES[row.kind])
    return steps


def ours(query, key, queue, rule, temperature, teacher_temperature, *, backend):
    return softcl.soft_contrastive_loss(
        query, key, queue, rule,
        temperature=temperature, teacher_temperature=teacher_temperature,
        reduction="none", backend=backend,
    )  # fmt: skip


def loss_step(loss_rows, p: Problem, rule):
    """Losses (N,) and gradient of their sum (N, D)."""
    query = p.query.detach().requires_grad_()
    rows = loss_rows(query, p.key, p.queue, rule, *TEMPERATURES)
    (gradient,) = torch.autograd.grad(rows.sum(), query)
    return rows.detach(), gradient


def search(p: Problem, backend: str):
    found = softcl.queue_statistics(
        p.query, p.queue, 1.0, num_neighbors=10, sums=False, backend=backend
    )
    return found.neighbor_logits, found.neighbor_indices


def search_in_blocks(p: Problem, block: int = 2048):
    found = [torch.topk(rows @ p.queue.T, 10) for rows in p.query.split(block)]
    return torch.cat([x.values for x in found]), torch.cat([x.indices for x in found])


# ------------------------------------------------------------------------------------------ checks


def check(row: Row, step, p: Problem, device: str) -> None:
    """The oracle on the first rows, equal bits run after run, and the same from a graph."""
    first = step(p)
    some = Problem(p.query[:64], p.key[:64], p.queue)
    if row.kind == "search":
        assert_neighbors_close(*(x[:64] for x in first), some.query, some.queue, 1.0)
    else:
        oracle = loss_oracle(some, RULES[row.kind])
        # The gradient of half-precision rows comes back in their dtype: half a unit of its last
        # bit, 2^-9 of an entry, is more than the 1e-3 of the largest that is promised before it.
        scale = 1.0 if p.query.dtype == torch.float32 else 3.0
        assert_loss_close(first[0][:64], None, oracle, torch.float32)
        assert_loss_close(first[0][:64], first[1][:64], oracle, p.query.dtype, scale=scale)
    for _ in range(1 if device == "cpu" else DETERMINISM_RUNS):
        for x, y in zip(first, step(p), strict=True):
            assert torch.equal(x, y), "other bits in another run"
    if device != "cpu":
        out, graph = capture(lambda: step(p))
        for x in out:
            x.zero_()
        graph.replay()
        for x, y in zip(first, out, strict=True):
            assert torch.equal(x, y), "other bits from a CUDA graph"


# ------------------------------------------------------------------------------------------ timing


def measure(row: Row, device: str, backend: str, rate: float, rounds: int) -> None:
    """Fill ``row.times``: contenders take turns, medians count; one that has no room says so."""
    problems = inputs_of(row, device, copies_for(row, device))
    timers, steps = {}, contenders_of(row, device, backend)
    hot = f"{backend}, L2 hot"  # on the same inputs again and again
    try:
        check(row, steps[backend], problems[0], device)
        if len(problems) > 1:  # else there is nothing to go round
            steps[hot] = steps[backend]
    except Exception as error:  # the others are still worth timing
        row.times[backend] = f"wrong: {(str(error) or repr(error)).splitlines()[0]}"
        row.wrong = True
        del steps[backend]
    for name, step in steps.items():
        try:
            timers[name], how = timer_of(step, problems[:1] if name == hot else problems, device)
            row.graph = row.graph and (how == "graph" or name != backend)
        except torch.OutOfMemoryError:
            row.times[name] = "out of memory"
        except Exception as error:  # a peer's
            row.times[name] = f"failed: {(str(error) or repr(error)).splitlines()[0]}"
        if device != "cpu":
            torch.cuda.empty_cache()
    samples = {name: [] for name in timers}
    for _ in range(rounds):
        for name in list(timers):
            try:
                samples[name].append(timers[name]())
            except torch.OutOfMemoryError:
                row.times[name] = "out of memory"
                del timers[name]
    row.times |= {name: statistics.median(samples[name]) for name in timers}
    if row.N * row.K <= 1 << 20 and backend in steps:
        row.python = python_time(steps[backend], problems[0], device)
    row.floor = row.flop / rate * 1e6


# ----------------------------------------------------------------------------------------- results


def versions(device: str, backend: str) -> dict[str, str]:
    gpu = "CPU, interpreted" if device == "cpu" else torch.cuda.get_device_name()
    return {
        "gpu": gpu,
        "backend": backend,
        "date": date.today().isoformat(),
        "torch": torch.__version__,
        "triton": importlib.metadata.version("triton"),
        "cuda": str(torch.version.cuda),
    }


def markdown(rows: list[Row], about: dict[str, str], rate: float) -> str:
    backend = about["backend"]
    names = list(dict.fromkeys(name for row in rows for name in row.times if name != backend))
    head = f"N, K, D|labels|{backend}, us|target|floor|% of floor|python, us".split("|") + names
    lines = [
        f"# {about['gpu']}: {backend}",
        "",
        ", ".join(f"{key} {value}" for key, value in about.items() if key != "gpu")
        + f"; a large bf16 product runs at {rate / 1e12:.0f} TFLOP/s.",
        f"Forward and gradient, bf16; contenders as multiples of {backend}'s time.",
        "",
        "| " + " | ".join(head) + " |",
        "|" + "---|" * len(head),
    ]
    for row in rows:
        own = row.times.get(backend, math.nan)
        numeric = isinstance(own, float)
        cells = [f"{row.N}, {row.K}, {row.D}", row.kind]
        cells += [f"{own:.1f}" if numeric else str(own), number(row.target), f"{row.floor:.1f}"]
        cells += [f"{100 * row.floor / own:.0f}" if numeric else "", number(row.python)]
        for name in names:
            other = row.times.get(name, "")
            ratio = numeric and isinstance(other, float)
            alone = f"{other:.1f} us" if isinstance(other, float) else str(other)
            cells.append(f"{other / own:.2f}x" if ratio else alone)
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def number(value: float) -> str:
    return "" if math.isnan(value) else f"{value:.0f}"


def write(out: Path, rows: list[Row], about: dict[str, str], rate: float, left_out: int) -> Path:
    out.mkdir(parents=True, exist_ok=True)
    name = f"{about['gpu']} {about['backend']}"
    stem = name.lower().replace(" ", "-").replace(",", "").replace("/", "-")
    text = markdown(rows, about, rate)
    if left_out:
        text += f"\n{left_out} rows were left out: the time was up.\n"
    (out / f"{stem}.md").write_text(text)
    table = [{k: v for k, v in asdict(row).items() if v == v} for row in rows]
    result = {"about": about, "product_flop_per_s": rate, "rows": table, "left_out": left_out}
    (out / f"{stem}.json").write_text(json.dumps(result, indent=1) + "\n")
    return out / f"{stem}.md"


def small(device: str, backend: str) -> None:
    """One small call of every kind, in every dtype: what a sanitizer watches."""
    tiny = device == "cpu"
    N, K = (3, 90) if tiny else (37, 1000)
    for dtype in (torch.bfloat16,) if tiny else (torch.bfloat16, torch.float32, torch.float16):
        p = make_problem(N, K, 64, dtype=dtype, device=device)
        for rule in RULES.values():
            loss_step(functools.partial(ours, backend=backend), p, rule)
        softcl.queue_statistics(p.query, p.queue, 0.01, num_neighbors=70, backend=backend)
        queue = MemoryQueue(50, 64, dtype=dtype, device=device)
        queue.enqueue(p.key)
        assert queue.refused == 0
    print(f"small calls of {backend}: done")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    default = Path(__file__).parent / "results"
    parser.add_argument("--out", type=Path, default=Path(os.environ.get("OUT", default)))
    parser.add_argument("--backend", choices=OURS, default="triton")
    parser.add_argument("--budget", type=float, default=240.0, help="seconds for the whole table")
    parser.add_argument("--small", action="store_true", help="a few small calls, nothing timed")
    parser.add_argument("--dry-run", action="store_true", help="tiny shapes on the CPU")
    arguments = parser.parse_args()
    deadline = time.monotonic() + arguments.budget
    device = "cpu" if arguments.dry_run else "cuda"
    if device == "cuda" and not torch.cuda.is_available():
        sys.exit("gpu_table: no GPU here; --dry-run tries the script itself")
    backend = arguments.backend
    if arguments.small:
        return small(device, backend)
    rate = product_rate(device)
    rows = DRY_ROWS if arguments.dry_run else ROWS
    done: list[Row] = []
    for row in rows:
        if time.monotonic() > deadline:
            break
        measure(row, device, backend, rate, 1 if arguments.dry_run else ROUNDS)
        done.append(row)
        print(f"{row.N}, {row.K}, {row.D} {row.kind}: {row.times}", flush=True)
        # What is known is kept, whatever becomes of the next row.
        written = write(arguments.out, done, versions(device, backend), rate, len(rows) - len(done))
    print(written.read_text())
    print(f"gpu_table: wrote {written}")
    for row in done:
        if row.wrong:
            said = row.times[backend]
            print(f"gpu_table: {row.N}, {row.K}, {row.D} {row.kind}: {said}", file=sys.stderr)
    sys.exit(any(row.wrong for row in done))


if __name__ == "__main__":
    main()
