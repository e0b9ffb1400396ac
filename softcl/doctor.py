"""``python -m softcl.doctor``: what this machine runs, and whether it computes the right numbers.

Versions and devices; for every backend whether it works on each device, and if not, why; then a
self-check of those that do, against the formulas in float64, under the tolerances of
`softcl.testing`. Needs torch and numpy alone.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import itertools
import json
import os
import platform
import random
import sys
import time
from collections.abc import Iterator, Sequence
from typing import Any

import torch

import softcl
from softcl import native
from softcl.command import CommandParser, carry_out, check_range
from softcl.labels import AdaptiveSoftLabels, LabelRule
from softcl.ops import (
    BACKENDS,
    UnsupportedBackendError,
    choose_backend,
    queue_statistics,
    soft_contrastive_loss,
    tune,
)
from softcl.testing import (
    ENTROPY_TOLERANCE,
    KINDS,
    LSE_TOLERANCE,
    RULES,
    Problem,
    assert_loss_close,
    assert_neighbors_close,
    fitting,
    gradient_error,
    loss_oracle,
    make_problem,
    relative_error,
    rule_name,
    statistics_oracle,
)

SECONDS = 5.0  # of self-check for each backend and device
PACKAGES = {
    "the operator": ("torch", "numpy", "triton"),
    "training": (
        "timm",
        "torchvision",
        "pillow",
        "safetensors",
        "tensorboard",
        "rich",
        "scikit-learn",
        "matplotlib",
    ),
    "optional": ("pyarrow", "onnx", "onnxscript", "pytest"),
}
# Ragged on purpose: one row, one column, widths that fill no vector register or tile.
SHAPES = ((17, 1000, 128), (1, 1, 1), (33, 257, 64), (5, 4096, 256), (64, 700, 96))
# On a GPU also what training asks for, and a long queue: other tiles, more splits.
GPU_SHAPES = (*SHAPES, (256, 65536, 128), (1024, 16384, 128), (16, 1 << 20, 128))
DTYPES = (
    (torch.float32, torch.float32),
    (torch.bfloat16, torch.bfloat16),
    (torch.float32, torch.bfloat16),
)


PROG = "softcl.doctor"


def build_parser() -> CommandParser:
    parser = CommandParser(PROG, "[flags]", __doc__.splitlines()[0].partition(": ")[2])
    add = parser.add_argument
    # fmt: off
    add("--json", action="store_true", help="print one JSON object instead")
    add("--seconds", type=float, default=SECONDS, metavar="X",
        help=f"of self-check for each backend that runs (default: {SECONDS:g}); 0: none")
    add("--tune", action="store_true",
        help="time triton against cuda on each GPU, and keep what backend auto then prefers there")
    # fmt: on
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Print the findings.

    Returns:
        0 if every backend that runs passed its self-check, else 1; 2 for wrong flags.
    """
    return carry_out(PROG, lambda: examine_all(sys.argv[1:] if argv is None else argv))


def examine_all(argv: Sequence[str]) -> int:
    options = build_parser().read(argv)
    check_range("seconds", options.seconds, at_least=0)
    found = {
        "softcl": softcl.__version__,
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "packages": {kind: versions_of(names) for kind, names in PACKAGES.items()},
        "cpu": describe_cpu(),
        "native": describe_native(),
        "devices": describe_devices(),
    }
    if not options.json:
        print_machine(found)
    found["backends"] = []
    for name, device in itertools.product(BACKENDS, device_names()):
        row = examine(name, device, options.seconds)
        found["backends"].append(row)
        if not options.json:
            print_backend(row)
    if options.tune:
        found["tune"] = []
        for line in tuning():
            found["tune"].append(line)
            if not options.json:
                print(f"tune       {line}", flush=True)
    if options.json:
        print(json.dumps(found, indent=2))
    return 1 if any(row.get("failure") for row in found["backends"]) else 0


# ------------------------------------------------------------------------------------ the machine


def versions_of(names: Sequence[str]) -> dict[str, str | None]:
    """Installed versions; None for what is absent."""
    versions: dict[str, str | None] = {}
    for name in names:
        try:
            # torch's own word says which build it is, such as +cpu.
            found = torch.__version__ if name == "torch" else importlib.metadata.version(name)
            versions[name] = str(found)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = None
    return versions


def describe_cpu() -> str:
    """The processor's name and the cores and threads that this process may use."""
    name = platform.processor() or platform.machine()
    try:
        with open("/proc/cpuinfo") as file:
            lines = (line.partition(":")[2].strip() for line in file if "model name" in line)
            name = next(lines, name)
    except OSError:  # not Linux
        pass
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return f"{name}, {cores} cores, {torch.get_num_threads()} torch threads"


def describe_native() -> str:
    """The compiled module in one clause."""
    try:
        from softcl import _C
    except ImportError as error:
        return f"not built ({error}); {native.advice()}"
    try:
        isa = f"runs {_C.isa()} of {', '.join(_C.available_isas())}"
    except ValueError as error:  # SOFTCL_CPU_ISA names something that this processor lacks
        isa = str(error)
    cuda = "with CUDA" if _C.has_cuda() else "without CUDA"
    if _C.has_cuda() and not _C.cuda_device_count():
        cuda += f" ({_C.cuda_no_device_reason()})"
    return f"{isa}, {cuda}"


def device_names() -> list[str]:
    """The devices that torch can use, CPU first."""
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    return ["cpu", *(f"cuda:{index}" for index in range(count))]


def describe_devices() -> dict[str, str]:
    """Device -> what it is; where there is no GPU, "cuda" -> why torch has none."""
    found = {"cpu": f"{torch.get_num_threads()} threads"}
    for name in device_names()[1:]:
        properties = torch.cuda.get_device_properties(name)
        capability = ".".join(map(str, torch.cuda.get_device_capability(name)))
        memory = properties.total_memory / 2**30
        found[name] = f"{properties.name}, {memory:.0f} GiB, compute capability {capability}"
    if len(found) == 1:
        built = torch.version.cuda or torch.version.hip
        found["cuda"] = "none found by torch" if built else "torch is built without it"
    return found


# ----------------------------------------------------------------------------------- the backends


def examine(name: str, device: str, seconds: float) -> dict[str, Any]:
    """Whether a backend works on a device, why not, and the outcome of its self-check.

    Returns:
        backend, device, works; reason where it does not work; else checks, seconds and, if a check
        failed, failure.
    """
    row: dict[str, Any] = {"backend": name, "device": device, "works": False}
    problem = make_problem(*SHAPES[0], device=device)
    try:
        choice = choose_backend(problem.query, problem.queue, rule=AdaptiveSoftLabels(1))
        choose_backend(problem.query, problem.queue, rule=AdaptiveSoftLabels(1), backend=name)
    except UnsupportedBackendError as error:
        return {**row, "reason": str(error).partition("cannot run this call: ")[2] or str(error)}
    row.update(works=True, chosen=choice.name == name)
    spent, checks = 0.0, 0
    try:
        for case in cases(SHAPES if device == "cpu" else GPU_SHAPES):
            if spent >= seconds:
                break
            if device != "cpu":  # what has to be compiled does not count
                loss_and_gradient(name, device, *case)
            started = time.perf_counter()
            check_one(name, device, *case)
            spent, checks = spent + time.perf_counter() - started, checks + 1
    except Exception as error:  # whatever a broken backend raises is the finding
        row["failure"] = f"{type(error).__name__}: {' '.join(str(error).split())}; at {words(case)}"
    return {**row, "checks": checks, "seconds": spent}


Case = tuple[LabelRule, tuple[int, int, int], tuple[torch.dtype, torch.dtype], str]


def cases(shapes: Sequence[tuple[int, int, int]] = SHAPES) -> Iterator[Case]:
    """Every rule, shape, dtype and kind of data, so mixed that a short check sees each of them."""
    table = list(itertools.product(shapes, DTYPES, KINDS))
    random.Random(0).shuffle(table)
    for turn in range(len(RULES)):
        for place, (shape, dtypes, kind) in enumerate(table, turn):
            yield fitting(RULES[place % len(RULES)], shape[1]), shape, dtypes, kind


def words(case: Case) -> str:
    rule, (N, K, D), dtypes, kind = case
    types = " and ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
    return f"{rule_name(rule)}, N={N}, K={K}, D={D}, {types}, {kind} rows"


def loss_and_gradient(
    backend: str,
    device: str,
    rule: LabelRule,
    shape: tuple[int, int, int],
    dtypes: tuple[torch.dtype, torch.dtype],
    kind: str,
) -> tuple[Problem, torch.Tensor, torch.Tensor]:
    problem = make_problem(*shape, kind=kind, dtype=dtypes[0], queue_dtype=dtypes[1], device=device)
    query = problem.query.detach().clone().requires_grad_()
    loss = soft_contrastive_loss(
        query,
        problem.key,
        problem.queue,
        rule,
        temperature=0.1,
        teacher_temperature=0.05,
        reduction="none",
        backend=backend,
    )
    loss.sum().backward()
    return problem, loss, query.grad


def check_one(backend: str, device: str, *case: Any) -> None:
    """Loss, gradient, statistics and neighbours of one problem against the formulas in float64.

    Raises:
        AssertionError: a result is out of tolerance.
    """
    rule, shape, dtypes, kind = case
    problem, loss, gradient = loss_and_gradient(backend, device, *case)
    oracle = loss_oracle(problem, rule)
    # As in the tests: clustered rows have few large labels, so a rounding of one is not averaged
    # out; and a gradient that comes back in half precision carries its own rounding.
    scale = 1.0 if kind == "random" else 2.0
    if dtypes[0] == torch.float32:
        assert_loss_close(loss, gradient, oracle, dtypes[0], scale=scale)
    else:
        assert_loss_close(loss, None, oracle, dtypes[0], scale=scale)
        error = gradient_error(gradient, oracle.dquery, 0.1)
        assert error <= 2**-8, f"gradient is off by {error:.2e}"
    check_statistics(backend, problem, min(7, shape[1]))


def check_statistics(backend: str, problem: Problem, k: int) -> None:
    vectors, queue = problem.key, problem.queue
    found = queue_statistics(vectors, queue, 0.1, num_neighbors=k, backend=backend)
    exact = statistics_oracle(vectors, queue, 0.1)
    for name, tolerance in (("lse", LSE_TOLERANCE), ("entropy", ENTROPY_TOLERANCE)):
        error = relative_error(getattr(found, name), getattr(exact, name))
        assert error <= tolerance, f"{name} is off by {error:.2e}"
    assert_neighbors_close(
        found.neighbor_logits, found.neighbor_indices, vectors, queue, temperature=0.1
    )


def tuning() -> Iterator[str]:
    gpus = device_names()[1:]
    if not gpus:
        yield "no GPU here"
    for device in gpus:
        try:
            yield from tune.tune(device)
        except RuntimeError as error:
            yield f"{device}: {error}"


# ---------------------------------------------------------------------------------------- output


def print_machine(found: dict[str, Any]) -> None:
    print(f"softcl     {found['softcl']}, Python {found['python']}, {found['system']}")
    for kind, versions in found["packages"].items():
        line = ", ".join(f"{name} {version or 'absent'}" for name, version in versions.items())
        print(f"{'packages' if kind == 'the operator' else '':<10} {kind}: {line}")
    print(f"cpu        {found['cpu']}")
    print(f"native     {found['native']}")
    for name, what in found["devices"].items():
        print(f"device     {name}: {what}")


def print_backend(row: dict[str, Any]) -> None:
    place = f"backend    {row['backend']:<10} {row['device']:<7}"
    if not row["works"]:
        print(f"{place} no: {row['reason']}", flush=True)
        return
    chosen = "works, the one that auto takes" if row["chosen"] else "works"
    if row.get("failure"):
        print(f"{place} WRONG: {row['failure']}", flush=True)
    elif row["checks"]:
        line = f"{row['checks']} checks passed in {row['seconds']:.1f} s"
        print(f"{place} {chosen}; {line}", flush=True)
    else:
        print(f"{place} {chosen}; not checked", flush=True)


if __name__ == "__main__":
    sys.exit(main())
