"""The defaults say what the sources that they name have, where they differ in kind from others."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import nn

from softcl.data import RECIPES
from softcl.nn import SplitBatchNorm2d, build_head
from softcl.train.config import TrainConfig, defaults_of
from softcl.train.parts import build_state


def state_of(method: str, data: str, **changes):
    """A run's state with a method's defaults, in small."""
    defaults = defaults_of(method)[data]
    numbers = dataclasses.replace(
        defaults.method, queue_size=16, projector_hidden=8, projection_dim=8, **changes
    )
    config = TrainConfig.of(
        method=method, arch="resnet_tiny", image_size=16, batch_size=16, lr=0.1, optimizer="sgd",
        weight_decay=0.0, sgd_momentum=0.9, decay_norms=True, **dataclasses.asdict(numbers),
    )  # fmt: skip
    return build_state(config, numbers, torch.device("cpu"))


def splits_of(module: nn.Module) -> set[int]:
    norms = [m for m in module.modules() if isinstance(m, nn.BatchNorm2d)]
    return {m.num_splits if isinstance(m, SplitBatchNorm2d) else 1 for m in norms}


@pytest.mark.parametrize(
    "method, data, student, teacher",
    [("sce", "cifar10", 1, 8), ("sce", "cifar100", 1, 8), ("moco", "cifar10", 8, 8)],
)
def test_batch_norm_is_split_where_the_source_splits_it(method, data, student, teacher):
    state = state_of(method, data)
    assert (splits_of(state.student), splits_of(state.teacher)) == ({student}, {teacher})
    assert state.method.shuffles
    names = [sorted(net.state_dict()) for net in (state.student, state.teacher)]
    assert names[0] == names[1]  # so that checkpoints and the average go on as they were
    plain = state_of(method, data, num_splits=1)
    assert splits_of(plain.student) == splits_of(plain.teacher) == {1}


def test_numbers_that_are_easily_taken_for_others():
    sce, msf = defaults_of("sce"), defaults_of("msf")
    assert {sce[data].method.form for data in ("cifar10", "cifar100", "imagenet")} == {"code"}
    assert {msf[data].method.num_neighbors for data in ("cifar10", "tiny-imagenet")} == {6}
    assert msf["imagenet"].method.num_splits == 4
    first, second = (
        RECIPES[getattr(sce["imagenet"].method, f"{who}_view")] for who in ("student", "teacher")
    )
    assert first.scale == second.scale == (0.2, 1.0) and (first.flip, second.flip) == (0.5, 0.0)
    notebook = RECIPES[defaults_of("moco")["cifar10"].method.student_view]
    assert notebook.scale == (0.08, 1.0) and notebook.blur == 0.0


def test_sces_predictor_has_no_bias_and_no_norm_at_its_end():
    method = defaults_of("sce")["imagenet"].method
    head = build_head(8, 16, 8, norm=method.predictor_norm)
    assert [type(part).__name__ for part in head] == ["Linear", "BatchNorm1d", "ReLU", "Linear"]
    assert all(part.bias is None for part in head if isinstance(part, nn.Linear))
