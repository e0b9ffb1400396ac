"""Precision, compilation, CUDA graphs: options that keep the training curve; what they refuse."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from run_comparison import assert_same_run
from torch import nn

from softcl.methods import ASCL
from softcl.nn import Encoder, MemoryQueue, Projector, SplitBatchNorm2d, make_teacher
from softcl.train import parts
from softcl.train.__main__ import main
from softcl.train.checkpoint import read_checkpoint
from softcl.train.config import ConfigError, TrainConfig
from softcl.train.folder import read_metrics
from softcl.train.log import describe_speed
from softcl.train.parts import check_speed, settle_speed, speed_up
from softcl.train.step import TrainState, train_step

CPU = torch.device("cpu")
STEPS = 12


class Backbone(nn.Sequential):
    """Convolution, split batch norm, pooling: small enough to be compiled in seconds."""

    def __init__(self, splits: int) -> None:
        super().__init__(
            nn.Conv2d(3, 8, 3, stride=2, padding=1, bias=False),
            SplitBatchNorm2d(8, splits),
            nn.ReLU(inplace=True),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
        )


def make_state(device: torch.device = CPU, splits: int = 2, **settings) -> TrainState:
    method = ASCL(queue_size=64, projection_dim=8, num_splits=splits, **settings)
    torch.manual_seed(0)
    student = Encoder(Backbone(splits), Projector(8, 16, 8)).to(device)
    optimizer = torch.optim.SGD(student.parameters(), lr=0.05, momentum=0.9)
    queues = nn.ModuleDict({"queue": MemoryQueue(64, 8)}).to(device)
    return TrainState(method, student, make_teacher(student), queues, optimizer)


def view(images: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    noise = torch.randn(images.shape, generator=generator, device=images.device)
    return images.float() / 64 - 2 + 0.1 * noise


def curve(state: TrainState, config: TrainConfig) -> list[float]:
    """The losses of some steps as `config` has them computed."""
    device = next(state.student.parameters()).device
    speed_up(config, state)
    losses = []
    for step in range(STEPS):
        generator = torch.Generator().manual_seed(step % 4)
        images = torch.randint(0, 256, (16, 3, 8, 8), generator=generator, dtype=torch.uint8)
        views = {name: view for name in state.method.views()}
        measures = train_step(state, images.to(device), views, seed=3, backend="reference")
        losses.append(float(measures[0]))
    return losses


def assert_same_curve(got: list[float], expected: list[float], first: float, last: float) -> None:
    """Equal to `first` in the first step; rounding then grows from step to step, to `last`."""
    assert got[0] == pytest.approx(expected[0], rel=first)
    assert got == pytest.approx(expected, rel=last)
    assert max(expected) - min(expected) > 20 * last * max(expected), "the curve moves no further"


def test_compiled_networks_give_the_same_curve():
    if parts._compiler() is None:
        pytest.skip("there is no C++ compiler")
    plain = settle_speed(TrainConfig(precision="fp32"), ASCL(), CPU)
    expected = curve(make_state(), plain)
    state = make_state()
    names = list(state.state_dict()["student"])
    got = curve(state, dataclasses.replace(plain, compile=True))
    assert state.student._compiled_call_impl is not None
    assert state.teacher._compiled_call_impl is not None
    assert_same_curve(got, expected, first=1e-6, last=1e-5)
    assert list(state.state_dict()["student"]) == names


def test_bf16_gives_the_same_curve_within_its_rounding():
    expected = curve(make_state(), TrainConfig(precision="fp32"))
    state = make_state()
    seen = []
    state.student.backbone[0].register_forward_hook(lambda *given: seen.append(given[2].dtype))
    got = curve(state, TrainConfig(precision="bf16"))
    assert set(seen) == {torch.bfloat16}  # else the test compares nothing
    assert all(p.dtype == torch.float32 for p in state.student.parameters())
    assert got != expected
    assert_same_curve(got, expected, first=1e-3, last=2e-3)


def test_channels_last_gives_the_same_curve():
    expected = curve(make_state(splits=1), TrainConfig())
    state = make_state(splits=1)
    got = curve(state, TrainConfig(channels_last=True))
    weight = state.student.backbone[0].weight
    assert weight.is_contiguous(memory_format=torch.channels_last)
    assert_same_curve(got, expected, first=1e-6, last=1e-5)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("changes", [{"compile": True}, {"cuda_graph": True}], ids=str)
@pytest.mark.parametrize("symmetric", [False, True])
def test_compiled_and_graphed_on_a_gpu(changes: dict, symmetric: bool):
    device = torch.device("cuda")
    plain = settle_speed(TrainConfig(precision="fp32"), ASCL(num_splits=2), device)
    expected = curve(make_state(device, symmetric=symmetric), plain)
    state = make_state(device, symmetric=symmetric)
    got = curve(state, dataclasses.replace(plain, **changes))
    assert_same_curve(got, expected, first=1e-4, last=1e-2)


# -------------------------------------------------------------------------------------- whole runs


def test_a_run_in_bf16_resumes_bit_exact_and_says_what_it_is(
    flags: list[str], tmp_path: Path, capsys
):
    flags = [*flags, "--knn-every", "0"]
    assert main([*flags, "--out", "full"]) == 0
    assert "networks   fp32\n" in capsys.readouterr().out
    flags += ["--precision", "bf16"]
    assert main([*flags, "--out", "whole"]) == 0
    assert "networks   bf16\n" in capsys.readouterr().out
    assert main([*flags, "--out", "parts", "--max-steps", "3"]) == 0
    assert main(["--resume", "parts"]) == 0
    assert_same_run(tmp_path / "whole", tmp_path / "parts")
    full, half = (
        [row["loss"] for row in read_metrics(tmp_path / run / "metrics.jsonl") if "loss" in row]
        for run in ("full", "whole")
    )
    assert half != full and half == pytest.approx(full, rel=0.02)
    state = read_checkpoint(tmp_path / "whole/last.pt")
    assert all(x.dtype != torch.bfloat16 for x in state["student"].values())
    config = json.loads((tmp_path / "whole/config.json").read_text())["config"]
    assert config["precision"] == "bf16" and config["channels_last"] is False


def test_defaults_of_the_cpu_words_and_refusals(monkeypatch):
    with pytest.raises(ConfigError, match="--cuda-graph: needs a CUDA device, and this run is on"):
        check_speed(TrainConfig(cuda_graph=True), CPU)
    monkeypatch.setattr(parts, "_compiler", lambda: None)
    with pytest.raises(ConfigError, match="--compile: torch.compile needs a C\\+\\+ compiler"):
        check_speed(TrainConfig(compile=True), CPU)
    config = settle_speed(TrainConfig(), ASCL(), CPU)
    assert (config.precision, config.channels_last) == ("fp32", False)
    assert describe_speed(config) == "fp32"
    fast = dataclasses.replace(config, precision="bf16", channels_last=True, cuda_graph=True)
    assert describe_speed(fast) == "bf16, channels last, compiled, in CUDA graphs"
