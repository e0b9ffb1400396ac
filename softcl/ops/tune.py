"""Triton timed against cuda on this machine, for what ``backend="auto"`` then prefers here.

``python -m softcl.doctor --tune`` calls `tune`. Each backend is tried and timed in a process of its
own. What cuda was at least as fast at is kept in the user's cache, under the machine that it was
measured on (softcl/trust.py), and read once by each process.
"""

from __future__ import annotations

import functools
import itertools
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator

import torch

from softcl import trust
from softcl.labels import AdaptiveSoftLabels
from softcl.ops.call import Call, LossCall, StatisticsCall

FILE = "preferences.json"
PAIR = ("triton", "cuda")  # what is preferred without a measurement, and what may be faster
OPERATIONS = ("soft_contrastive", "queue_statistics")
DTYPES = ("bfloat16", "float32")
N, K, D = (256, 1024, 4096), (4096, 65536), (128, 256)
ROUNDS, CALLS = 7, 10
SECONDS = 600.0  # for one backend, compilation included

Point = tuple[str, str, int, int, int]  # operation, dtype, N, K, D


def points() -> list[Point]:
    return list(itertools.product(OPERATIONS, DTYPES, N, K, D))


def tune(device: str) -> Iterator[str]:
    """Time both backends, keep what was found, and say it line by line.

    Raises:
        RuntimeError: a backend does not run at all on this device, and why.
    """
    first, second = PAIR
    found = zip(*(_in_own_process(device, name) for name in PAIR), strict=True)
    won = []
    for point, (usual, other) in zip(points(), found, strict=True):
        operation, dtype, n, k, d = point
        both = f"{first} {_words(usual)}, {second} {_words(other)}"
        yield f"{operation} {dtype} N={n} K={k} D={d}: {both}"
        if isinstance(other, float) and (isinstance(usual, str) or other <= usual):
            won.append(point)
    store(torch.device(device), won)
    yield f"auto prefers {second} for {len(won)} of {len(points())} kinds of call here"


def _words(found: float | str) -> str:
    return found if isinstance(found, str) else f"{found * 1e6:,.0f} us"


def _in_own_process(device: str, backend: str) -> list[float | str]:
    words = json.dumps({"device": device, "backend": backend, "points": points()})
    try:
        found = subprocess.run(
            [sys.executable, "-c", "from softcl.ops import tune; tune.main()", words],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=SECONDS,
            env=trust.environment(),
        )
    except subprocess.TimeoutExpired:
        raise RuntimeError(f"{backend} did not come back within {SECONDS:.0f} s") from None
    if found.returncode != 0:
        raise RuntimeError(f"{backend}: {trust.last_line(found)}")
    return json.loads(found.stdout.splitlines()[-1])


def main() -> None:
    wanted = json.loads(sys.argv[1])
    found = [measured(wanted["device"], wanted["backend"], *point) for point in wanted["points"]]
    print(json.dumps(found))


def measured(
    device: str, backend: str, operation: str, dtype: str, n: int, k: int, d: int
) -> float | str:
    """Seconds of one call, the median of ROUNDS; or why it does not run, in words."""
    from softcl.ops import trial
    from softcl.ops.backends import load_backend

    call = make_call(device, operation, getattr(torch, dtype), n, k, d)
    module = load_backend(backend)
    reason = module.unsupported(call)
    if reason is not None:
        return reason
    try:
        trial.run(device, **trial.facts_of(backend, call))
        module.run(call)
        rounds = []
        for _ in range(ROUNDS):
            started = time.perf_counter()
            for _ in range(CALLS):
                module.run(call)
            if device != "cpu":
                torch.cuda.synchronize(device)
            rounds.append((time.perf_counter() - started) / CALLS)
    except Exception as error:  # whatever a broken backend raises is the finding
        return " ".join(f"{type(error).__name__}: {error}".split())[:200]
    return statistics.median(rounds)


def make_call(device: str, operation: str, dtype: torch.dtype, n: int, k: int, d: int) -> Call:
    """What training asks for: ASCL's rule with its gradient, or ten neighbours and the sums."""
    generator = torch.Generator(device).manual_seed(0)
    query, key, queue = (
        torch.nn.functional.normalize(
            torch.randn(rows, d, generator=generator, device=device), dim=1
        ).to(dtype)
        for rows in (n, n, k)
    )
    if operation == "queue_statistics":
        return StatisticsCall(query, queue, 0.1, 10, True)
    return LossCall(
        query, key, queue, AdaptiveSoftLabels(5), 0.1, 0.05,
        positive=True, normalize=False, excluded=None, gradient=True, diagnostics=False,
    )  # fmt: skip


# -------------------------------------------------------------------------------------- preferences


def store(device: torch.device, won: Iterable[Point]) -> None:
    """Keep the kinds of call for which cuda is preferred on this device, in place of older ones."""
    trust.keep(FILE, trust.machine(device), [list(point) for point in won])


@functools.cache
def _preferred(device: torch.device) -> frozenset[Point]:
    try:
        return frozenset(tuple(point) for point in trust.kept(FILE).get(trust.machine(device), ()))
    except TypeError:  # not ours
        return frozenset()


def prefers_cuda(call: Call) -> bool:
    """Whether cuda was at least as fast here for calls of the next larger size that was timed."""
    preferred = _preferred(call.query.device)
    if not preferred or call.query.dtype != call.queue.dtype:
        return False
    dtype = str(call.query.dtype).removeprefix("torch.")
    (rows, width), length = call.query.shape, call.queue.shape[0]
    sizes = (_next(N, rows), _next(K, length), width)
    return (call.operation, dtype, *sizes) in preferred


def _next(sizes: tuple[int, ...], size: int) -> int:
    """The least of the timed sizes that is not below ``size``; the largest for those beyond."""
    return next((timed for timed in sizes if timed >= size), sizes[-1])
