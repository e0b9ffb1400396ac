"""The method that CONTRIBUTING.md writes out: a file, a line in METHODS, and it trains."""

from __future__ import annotations

import dataclasses
import importlib.util
import math
import re
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from test_methods_step import batch_of, make_state, noisy
from torch.nn.functional import cross_entropy, normalize

from softcl.methods import METHODS, Batch
from softcl.methods.losses import MethodLoss
from softcl.nn import MemoryQueue
from softcl.train.config import TrainConfig
from softcl.train.defaults import fill
from softcl.train.step import train_step

CONTRIBUTING = Path(__file__).resolve().parents[1] / "CONTRIBUTING.md"
SMALL = dict(queue_size=24, projection_dim=6, projector_hidden=12, num_splits=1)


def example() -> str:
    """The section's block of Python, to the letter."""
    section = CONTRIBUTING.read_text().partition("## Adding a method")[2].partition("\n## ")[0]
    (code,) = re.findall(r"```python\n(.*?)```", section, flags=re.DOTALL)
    return code


@pytest.fixture
def near(tmp_path: Path, monkeypatch) -> ModuleType:
    """The file, and its line in METHODS."""
    path = tmp_path / "near.py"
    path.write_text(example())
    spec = importlib.util.spec_from_file_location("near", path)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "near", module)
    spec.loader.exec_module(module)
    monkeypatch.setitem(METHODS, "near", module.Near)
    return module


def test_the_example_trains(near):
    state = make_state(near.Near(**SMALL))
    before = [p.clone() for p in state.student.parameters()]
    views = {view: noisy for view in state.method.views()}
    for number in range(4):
        measures = train_step(state, batch_of(number), views, seed=0, backend="auto")
        assert bool(torch.isfinite(measures[:3]).all()), "loss, confidence, entropy"
    assert state.step == 4 and state.queues["queue"].pointer == 4 * 8 % 24
    assert not any(map(torch.equal, before, state.student.parameters()))


def test_the_example_is_its_formula(near):
    method = near.Near(trust=0.8, num_neighbors=3, **SMALL)
    generator = torch.Generator().manual_seed(0)
    vectors = torch.randn(2, 8, 6, generator=generator, dtype=torch.float64)
    queue = normalize(torch.randn(24, 6, generator=generator, dtype=torch.float64), dim=1)
    z, t = normalize(vectors, dim=2)
    d = t @ queue.T
    q = (d / method.teacher_temperature).softmax(1)
    c = 1 + torch.special.xlogy(q, q).sum(1, keepdim=True) / math.log(24)
    near_rows = torch.zeros_like(d).scatter(1, d.topk(3, dim=1).indices, 1.0)
    labels = torch.cat([torch.full((8, 1), 0.5), 0.25 * q + 0.8 * c * near_rows], 1)
    logits = torch.cat([(z * t).sum(1, keepdim=True), z @ queue.T], 1) / method.temperature
    expected = cross_entropy(logits, labels / labels.sum(1, keepdim=True), reduction="none")
    query, key = ({name: rows} for name, rows in zip(("query", "key"), vectors, strict=True))
    rows = method.loss(Batch(query, query, key, {"queue": queue})).rows
    torch.testing.assert_close(rows, expected, rtol=1e-10, atol=1e-11)


def test_the_example_has_settings(near):
    from softcl.data import ImageSet

    pixels = torch.zeros(4096, 3, 32, 32, dtype=torch.uint8)
    images = ImageSet(pixels, None, [], (0.5,) * 3, (0.5,) * 3, "shapes", statistics="shapes")
    config, method, name = fill(TrainConfig.of(method="near", num_neighbors=3), images, 32)
    assert method == near.Near(**{**dataclasses.asdict(near.DEFAULTS["shapes"].method),
                                  "num_neighbors": 3})  # fmt: skip
    assert name == "shapes" and method.queue_size == 512


def test_the_example_has_a_loss_module(near):
    generator = torch.Generator().manual_seed(0)
    query, key = torch.randn(2, 8, 6, generator=generator)
    queue, query = MemoryQueue(24, 6), query.requires_grad_()
    criterion = MethodLoss(near.Near, trust=0.25)
    loss = criterion(query, key, queue)
    loss.backward()
    assert float(query.grad.abs().max()) > 0 and queue.pointer == 0
    batch = Batch({"query": query}, {"query": query}, {"key": key}, {"queue": queue})
    torch.testing.assert_close(loss, near.Near(trust=0.25).loss(batch).rows.mean())
    with pytest.raises(ValueError, match=r"trust must be in \[0, 1\], got 1.5"):
        criterion.trust = 1.5
    assert criterion.trust == 0.25
