"""Comparing runs: what two run folders must have in common."""

from __future__ import annotations

from pathlib import Path

import torch

from softcl.train.checkpoint import read_checkpoint
from softcl.train.folder import read_metrics

TIMED = ("images_per_s", "data_wait", "seconds")


def assert_same(first, second, path: str = "") -> None:
    """Nested states are equal to the last bit."""
    assert type(first) is type(second), path
    if isinstance(first, dict):
        assert first.keys() == second.keys(), path
        for key in first:
            assert_same(first[key], second[key], f"{path}/{key}")
    elif isinstance(first, list | tuple):
        assert len(first) == len(second), path
        for i, (a, b) in enumerate(zip(first, second, strict=True)):
            assert_same(a, b, f"{path}/{i}")
    elif isinstance(first, torch.Tensor):
        assert first.dtype == second.dtype and torch.equal(first, second), path
    else:
        assert first == second or first != first, path


def assert_same_run(first: Path, second: Path) -> None:
    """Weights, queue, optimiser and every logged number agree to the last bit."""
    a, b = read_checkpoint(first / "last.pt"), read_checkpoint(second / "last.pt")
    for name in ("step", "student", "teacher", "queues", "heads", "optimizer", "accuracy"):
        assert_same(a[name], b[name], name)
    rows = [
        [{k: v for k, v in row.items() if k not in TIMED} for row in read_metrics(path)]
        for path in (first / "metrics.jsonl", second / "metrics.jsonl")
    ]
    assert rows[0] == rows[1]
