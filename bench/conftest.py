"""Options of the benchmarks, the machine's ceilings, and the table printed at the end.

pytest bench/ --benchmark-only                     the quick shapes, every contender
pytest bench/ --benchmark-only --full              every shape and rule (hours)
pytest bench/ --benchmark-only --shapes main --rule adaptive_soft --backend cpu --peer eager
"""

from __future__ import annotations

import functools

import pytest
import torch

from bench.table import Row, format_tables

_ROWS = pytest.StashKey[list[Row]]()


def pytest_addoption(parser):
    group = parser.getgroup("softcl")
    group.addoption("--full", action="store_true", help="every shape and every rule")
    group.addoption(
        "--shapes", choices=("quick", "main", "grid"), help="named set of shapes (default: quick)"
    )
    for name in ("rule", "backend", "peer"):
        group.addoption(
            f"--{name}", action="append", help=f"only this {name}; may be repeated; 'none' for none"
        )
    group.addoption("--threads", type=int, help="threads (default: what torch takes)")


def pytest_configure(config):
    config.stash[_ROWS] = []
    if config.getoption("--threads"):
        torch.set_num_threads(config.getoption("--threads"))


@pytest.fixture
def report(request):
    """Takes the rows of the table."""
    return request.config.stash[_ROWS].append


@functools.lru_cache(maxsize=1)
def measured_ceilings(group: str) -> tuple[float, float] | None:
    """Multiply-adds and exponentials per second of all threads, measured anew for each group."""
    try:
        from softcl import _C
    except ImportError:
        return None
    return _C.cpu_ceilings(torch.get_num_threads(), 0.6)


@pytest.fixture
def ceilings():
    return measured_ceilings


def pytest_terminal_summary(terminalreporter, config):
    rows = config.stash[_ROWS]
    if rows:
        terminalreporter.write_line("")
        for line in format_tables(rows):
            terminalreporter.write_line(line)
