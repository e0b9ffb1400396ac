"""Which GPU backend backend="auto" takes: the one that bench/ has shown to be the faster."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from softcl import HardLabels
from softcl.ops import backends, trial, tune
from softcl.ops.backends import Measured, choose
from softcl.ops.call import LossCall, StatisticsCall

ROOT = Path(__file__).resolve().parent.parent
ROW = Measured(
    capability=(9, 0),
    operation="soft_contrastive",
    dtype=torch.bfloat16,
    N=(256, 4096),
    K=(4096, 65536),
    D=(128, 128),
    source="bench/results/none.md",
)


def rows(count: int, D: int, dtype: torch.dtype) -> SimpleNamespace:
    """What a choice reads of a tensor on a GPU."""
    return SimpleNamespace(shape=(count, D), dtype=dtype, device=torch.device("cuda", 0))


def make_call(
    N=1024, K=65536, D=128, vector_dtype=torch.bfloat16, queue_dtype=torch.bfloat16,
    operation="soft_contrastive", backend="auto",
):  # fmt: skip
    query, queue = rows(N, D, vector_dtype), rows(K, D, queue_dtype)
    if operation == "queue_statistics":
        return StatisticsCall(query, queue, 0.1, 0, True, None, backend)
    return LossCall(
        query, query, queue, HardLabels(), 0.1, 0.1, True, True, None, True, False, backend
    )


@pytest.fixture
def gpu(monkeypatch):
    """A GPU of capability 9.0 on which every backend runs every call; what `cuda` says against it
    can be set."""
    against = {"cuda": None}
    monkeypatch.setattr(
        backends,
        "load_backend",
        lambda name: SimpleNamespace(unsupported=lambda call: against.get(name)),
    )
    monkeypatch.setattr(backends, "capability_of", lambda device: (9, 0))
    monkeypatch.setattr(trial, "reason_against", lambda name, call: None)
    monkeypatch.setattr(tune, "prefers_cuda", lambda call: False)
    return against


def test_cuda_is_not_chosen_without_a_measurement(gpu):
    assert choose(make_call()).name == "triton"
    assert choose(make_call(backend="cuda")).name == "cuda"


def test_every_measurement_has_its_source():
    for row in backends.CUDA_AT_LEAST_AS_FAST:
        assert (ROOT / row.source).is_file()


def test_cuda_is_chosen_where_it_was_measured(gpu, monkeypatch):
    monkeypatch.setattr(backends, "CUDA_AT_LEAST_AS_FAST", (ROW,))
    for sizes in ({}, {"N": 256, "K": 4096}, {"N": 4096}):
        assert choose(make_call(**sizes)).name == "cuda"
    for other in (
        {"N": 255},
        {"K": 65537},
        {"D": 64},
        {"queue_dtype": torch.float32},
        {"vector_dtype": torch.float16, "queue_dtype": torch.float16},
        {"operation": "queue_statistics"},
    ):
        assert choose(make_call(**other)).name == "triton"
    monkeypatch.setattr(backends, "capability_of", lambda device: (8, 0))
    assert choose(make_call()).name == "triton"


def test_the_next_one_runs_where_cuda_cannot(gpu, monkeypatch):
    monkeypatch.setattr(backends, "CUDA_AT_LEAST_AS_FAST", (ROW,))
    gpu["cuda"] = "softcl._C is built without CUDA"
    choice = choose(make_call())
    assert choice.name == "triton"
    assert choice.reasons == {"cuda": "softcl._C is built without CUDA"}
