"""Options of the benchmarks, and the table printed at the end.

pytest bench/ --benchmark-only                     the quick shapes, every contender
pytest bench/ --benchmark-only --full              every shape, rule and dtype (hours)
pytest bench/ --benchmark-only --shapes main --rule adaptive_soft-5 --backend cpu --peer eager
pytest bench/ --benchmark-only --device cuda --benchmark-json results.json

On a CUDA device the timer waits for the device before it reads the clock, so times include the
host's share; bench/gpu_table.py replays CUDA graphs and leaves it out.
"""

from __future__ import annotations

import pytest
import torch

from bench import contenders
from bench.ceilings import measured
from bench.machine import conditions
from bench.shapes import RULES
from bench.table import Row, format_tables
from bench.timing import cuda_time
from softcl.ops.backends import BACKENDS

_ROWS = pytest.StashKey[list[Row]]()


def pytest_addoption(parser):
    group = parser.getgroup("softcl")
    group.addoption("--full", action="store_true", help="every shape and every rule")
    group.addoption(
        "--shapes", choices=("quick", "main", "grid"), help="named set of shapes (default: quick)"
    )
    known = {"rule": RULES, "backend": BACKENDS, "peer": contenders.PEERS}
    for name, choices in known.items():
        group.addoption(
            f"--{name}",
            action="append",
            choices=(*choices, "none"),
            help=f"only this {name}; may be repeated; 'none' for none",
        )
    group.addoption(
        "--dtype",
        action="append",
        choices=("float32", "bfloat16", "float16"),
        help="of rows and queue; may be repeated (default: float32 on the CPU, bfloat16 on CUDA)",
    )
    group.addoption(
        "--device",
        choices=("cpu", "cuda"),
        default="cuda" if torch.cuda.is_available() else "cpu",
        help="where to run (default: a CUDA device if there is one)",
    )
    group.addoption("--threads", type=int, help="threads (default: what torch takes)")


def pytest_configure(config):
    config.stash[_ROWS] = []
    if config.getoption("--threads"):
        torch.set_num_threads(config.getoption("--threads"))


def pytest_collection_modifyitems(config, items):
    if config.getoption("--device") != "cuda":
        return
    for item in items:
        options = {"timer": cuda_time}
        closest = item.get_closest_marker("benchmark")
        if closest is not None:
            options |= closest.kwargs
        item.add_marker(pytest.mark.benchmark(**options), append=False)  # the closest counts


def pytest_benchmark_update_machine_info(config, machine_info):
    """What a figure depends on, into every file of results."""
    machine_info["softcl"] = conditions(config.getoption("--device"))


def pytest_benchmark_update_json(config, output_json):
    """What did not run, and why: pytest-benchmark writes down only what did."""
    rows = [row for row in config.stash[_ROWS] if row.note]
    output_json["not_run"] = [[row.group, row.contender, row.note] for row in rows]


@pytest.fixture(scope="session")
def device(request) -> str:
    return request.config.getoption("--device")


@pytest.fixture
def report(request):
    """Takes the rows of the table."""
    return request.config.stash[_ROWS].append


@pytest.fixture
def ceilings(device):
    return lambda group: measured(group, device)


def pytest_terminal_summary(terminalreporter, config):
    rows = config.stash[_ROWS]
    if rows:
        terminalreporter.write_line("")
        for line in format_tables(rows):
            terminalreporter.write_line(line)
