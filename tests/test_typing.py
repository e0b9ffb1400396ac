"""Types for those who import softcl: every public signature is annotated, and mypy agrees."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

MODULES = (
    "softcl", "softcl.data", "softcl.distributed", "softcl.errors", "softcl.methods",
    "softcl.methods.losses", "softcl.nn", "softcl.train",
)  # fmt: skip

PROGRAM = """
import torch
from torch import nn

from softcl import LabelRule, errors, queue_statistics, soft_contrastive_loss
from softcl.methods.losses import ASCLLoss, SEEDLoss
from softcl.nn import MemoryQueue
from softcl.train import Moment, Run, fit


def on_step(moment: Moment) -> None:
    print(f"{moment.step} {moment.loss:.3f} {moment.measures['loss']}")


def train(network: nn.Module) -> float:
    try:
        run: Run = fit(data="photos", backbone=network, on_step=on_step, epochs=3)
    except errors.SoftclError as error:
        raise SystemExit(str(error)) from error
    best = run.knn
    return best if best is not None else float(run.history[-1]["loss"])


rows = torch.nn.functional.normalize(torch.randn(8, 16), dim=1)
queue = MemoryQueue(32, 16)
loss: torch.Tensor = ASCLLoss(num_neighbors=3)(rows, rows, queue)
loss = loss + SEEDLoss()(rows, rows, queue)
queue.enqueue(rows)
lse: torch.Tensor = queue_statistics(rows, queue.rows, 0.1).lse
rule = LabelRule(positive=0.5, mean=0.5)
found = soft_contrastive_loss(rows, rows, rows, rule, temperature=0.1, teacher_temperature=0.1)
"""


def public_functions() -> Iterator[tuple[str, Any]]:
    """Functions, and of classes `__init__`, `forward` and what has no underscore in front."""
    for name in MODULES:
        module = importlib.import_module(name)
        for word in module.__all__:
            value = getattr(module, word)
            if inspect.isfunction(value):
                yield f"{name}.{word}", value
            if not inspect.isclass(value) or not value.__module__.startswith("softcl"):
                continue
            for method, function in vars(value).items():
                if inspect.isfunction(function) and (
                    not method.startswith("_") or method == "__init__"
                ):
                    yield f"{name}.{word}.{method}", function


@pytest.mark.parametrize(("name", "function"), list(public_functions()))
def test_a_public_signature_is_annotated(name: str, function: Any):
    if hasattr(function, "__wrapped__"):
        function = function.__wrapped__
    annotated = function.__annotations__
    signature = inspect.signature(function)
    missing = [x for x in signature.parameters if x not in ("self", "cls") and x not in annotated]
    assert not missing, missing
    assert name.endswith("__init__") or "return" in annotated, "its result"


def test_a_program_passes_mypy_strict(tmp_path: Path):
    if importlib.util.find_spec("mypy") is None:
        pytest.skip("mypy is not installed")
    program = tmp_path / "program.py"
    program.write_text(PROGRAM)
    done = subprocess.run(
        [sys.executable, "-m", "mypy", "--strict", "--follow-imports=silent",
         f"--cache-dir={tmp_path / 'cache'}", str(program)],
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
