"""SEED: its labels at the coldest teachers, and a teacher that is frozen."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from dense_methods import seed_loss
from torch import Tensor, nn
from torch.nn.functional import normalize

from softcl import DistillationLabels, errors
from softcl.methods import SEED, Batch
from softcl.nn import build_backbone
from softcl.testing import (
    GRADIENT_TOLERANCE,
    LSE_TOLERANCE,
    available_backends,
    make_problem,
    relative_error,
)
from softcl.train import fit, step
from softcl.train.__main__ import main
from softcl.train.checkpoint import load_backbone, read_checkpoint
from softcl.train.config import TrainConfig
from softcl.train.parts import assemble
from softcl.train.teacher import FrozenTeacher
from softcl.train.weights import load_pretrained

BACKENDS = available_backends(make_problem(2, 3, 4), DistillationLabels())


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("temperature", [0.01, 1e-3, 1e-4])
@pytest.mark.parametrize("dim", [128, 384, 1024])
def test_cold_teachers_of_any_width(dim: int, temperature: float, backend: str):
    """Half of the queue's first rows are near the keys, one is a key itself: labels are shared."""
    generator = torch.Generator().manual_seed(dim)
    query, key = (torch.randn(12, dim, generator=generator) for _ in range(2))
    queue = torch.randn(70, dim, generator=generator)
    near = temperature**0.5  # t . Q_j is then 1 less about half the temperature
    queue[:6] = normalize(key[:6], dim=1) + near * normalize(queue[:6], dim=1)
    queue[6] = key[6]
    queue = normalize(queue, dim=1)
    method = SEED(teacher_temperature=temperature, projection_dim=dim)

    def found(dtype: torch.dtype, loss):
        leaf = query.to(dtype).requires_grad_()
        batch = Batch(
            {"query": leaf},
            {"query": leaf},
            {"query": key.to(dtype)},
            {"queue": queue.to(dtype)},
            backend=backend,
        )
        rows = loss(batch)
        return rows.detach(), torch.autograd.grad(rows.sum(), leaf)[0]

    rows, gradient = found(torch.float32, lambda batch: method.loss(batch).rows)
    expected, wanted = found(torch.float64, lambda batch: seed_loss(method, batch))
    assert relative_error(rows, expected) <= LSE_TOLERANCE
    # A logit d / temperature is rounded by 2^-24 / temperature, and so is what the labels share.
    rounding = 2.0**-24 / temperature
    bound = (GRADIENT_TOLERANCE[torch.float32] + 4 * rounding) * float(wanted.abs().max())
    assert float((gradient - wanted).abs().max()) <= bound
    unit = normalize(key.double(), dim=1)
    labels = (unit @ queue.double().T / temperature - 1 / temperature).exp()
    assert float(labels[:6].diagonal().min()) > 0.1  # the neighbours take part


# ---- a run ----


NUMBERS = dict(
    method="seed", epochs=2, batch_size=16, queue_size=32, projector_hidden=16, device="cpu"
)


def network(width: int) -> nn.Module:
    """With batch norm whose stored statistics are not those of any batch, and drop-out."""
    torch.manual_seed(width)
    norm = nn.BatchNorm2d(width)
    norm.running_mean.fill_(0.3)
    layers = nn.Conv2d(3, width, 3, 2, 1, bias=False), norm, nn.ReLU(), nn.Dropout(0.5)
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten())


@pytest.fixture
def images(tmp_path, monkeypatch, one_thread) -> Tensor:
    monkeypatch.chdir(tmp_path)
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (64, 3, 16, 16), generator=generator, dtype=torch.uint8)


def test_the_teacher_is_frozen_and_its_features_are_queued(images: Tensor, monkeypatch):
    teacher, seen = network(20), []
    original = step.encode

    def watched(state, views, generators, backend):
        batch = original(state, views, generators, backend)
        with torch.no_grad():
            seen.append((state.teacher, batch.teacher["query"], teacher.eval()(views["query"])))
        return batch

    monkeypatch.setattr(step, "encode", watched)
    run = fit(data=images, backbone=network(8), teacher=teacher.train(), **NUMBERS, out="run")
    assert len(seen) == 8
    for _, found, expected in seen:  # of the same view, in evaluation mode
        torch.testing.assert_close(found, expected)
    frozen = seen[-1][0]
    assert all(not p.requires_grad for p in frozen.parameters()) and not frozen.training
    for a, b in zip(
        frozen.backbone.state_dict().values(), network(20).state_dict().values(), strict=True
    ):
        assert torch.equal(a, b)
    content = read_checkpoint(run.folder / "last.pt")
    assert content["queues"]["queue.rows"].shape == (32, 20)
    unit = normalize(torch.cat([rows for _, rows, _ in seen[-2:]]), dim=1)
    torch.testing.assert_close(content["queues"]["queue.rows"], unit, rtol=0, atol=1e-6)
    config = content["config"]
    assert config["projection_dim"] == 20 and config["teacher"] == "<Sequential>"
    assert list(content["teacher"]) == ["digest"]  # the weights are where they came from


def test_a_run_goes_on_with_its_own_teacher_alone(images: Tensor):
    networks = dict(data=images, backbone=network(8), teacher=network(20))
    whole = fit(**networks, **NUMBERS)
    fit(**networks, **NUMBERS, out="run", max_steps=3)
    other = network(20)
    other[0].weight.data.mul_(2)
    with pytest.raises(errors.RunError, match="--teacher: not the weights that the run was start"):
        fit(resume="run", **{**networks, "teacher": other})
    parts = fit(resume="run", **networks)
    for a, b in zip(
        parts.backbone.state_dict().values(), whole.backbone.state_dict().values(), strict=True
    ):
        assert torch.equal(a, b)


def test_a_teacher_sees_views_as_it_was_trained():
    pixels = torch.rand(4, 3, 8, 8)
    views, own = ((0.5, 0.4, 0.3), (0.2, 0.3, 0.4)), ((0.1, 0.2, 0.3), (0.5, 0.6, 0.7))
    made, wanted = (
        (pixels - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)
        for mean, std in (views, own)
    )
    teacher = FrozenTeacher(network(8), views, own)
    expected = network(8).eval()(wanted)
    torch.testing.assert_close(teacher(made), expected, rtol=1e-5, atol=1e-6)
    assert not torch.allclose(FrozenTeacher(network(8))(made), expected, atol=1e-3)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({}, r"teacher \(--teacher\): method seed needs the frozen network that it learns from"),
        (dict(teacher=nn.Conv2d(3, 8, 3)), r"teacher=<Conv2d> \(--teacher\): gives \(2, 8, 14"),
        (dict(teacher=network(8), projection_dim=9), r"projection_dim=9 .*: the teacher's featu"),
        (dict(teacher=network(8), method="moco"), r"<Sequential> .*: does not apply to method mo"),
        (dict(teacher="nowhere.pth"), r"--teacher nowhere\.pth: "),
        (dict(teacher=network(8), momentum=0.9), r"momentum=0.9 .*: does not apply to method seed"),
    ],
)
def test_what_a_teacher_cannot_be(images: Tensor, given: dict, message: str, tmp_path: Path):
    with pytest.raises(errors.SoftclError, match=message) as refusal:
        fit(data=images, backbone=network(8), **{**NUMBERS, **given})
    assert "\n" not in str(refusal.value) and list(tmp_path.iterdir()) == []


def test_a_run_teaches_another_by_the_command(
    whole: Path, flags: list[str], tmp_path: Path, capsys
):
    line = "--method seed --num-splits 1 --queue-size 64 --out run --max-steps 6"
    own = [*flags[: flags.index("--queue-size")], "--lr", "0.05", "--device", "cpu"]
    assert main([*own, "--projector-hidden", "32", "--teacher", str(whole), *line.split()]) == 0
    shown = capsys.readouterr().out
    assert "projection dim 192" in " ".join(shown.split())
    assert f"teacher    {whole / 'best.pt'}: " in shown and ", frozen, 192 features" in shown
    content = read_checkpoint(tmp_path / "run/last.pt")
    assert content["queues"]["queue.rows"].shape == (64, 192)
    stored = load_pretrained(str(whole), 16)
    parts = assemble(TrainConfig.of(**content["config"]))
    frozen = parts.state.teacher
    for a, b in zip(
        frozen.backbone.state_dict().values(), stored.backbone.state_dict().values(), strict=True
    ):
        assert torch.equal(a, b)
    assert main(["--resume", "run"]) == 0  # the weights are read again
    with pytest.raises(errors.CheckpointError, match=f"the frozen teacher .* it is {whole}"):
        load_backbone(tmp_path / "run", "teacher")
    assert "done" in capsys.readouterr().out
    assert main([*flags, "--teacher", str(whole), "--out", "other"]) == 2
    expected = "does not apply to method ascl (but to seed)"
    assert f"--teacher {whole}: {expected}" in capsys.readouterr().err


def test_the_commands_of_the_readme_run(whole: Path, flags: list[str], tmp_path: Path):
    text = (Path(__file__).parent.parent / "docs" / "training.md").read_text()
    section = text.partition("## A teacher")[2].partition("\n`--method seed`")[0]
    torch.save(build_backbone("resnet_tiny", 16).state_dict(), "weights.pth")
    words = {"FOLDER": flags[1], "runs/NAME": str(whole)}
    short = "--epochs 1 --batch-size 32 --queue-size 64 --max-steps 1 --device cpu".split()
    lines = [line.split() for line in section.splitlines() if "python -m" in line]
    assert len(lines) == 2
    for place, (_, _, module, *line) in enumerate(lines):
        own = [*(words.get(word, word) for word in line), *short, "--out", f"run{place}"]
        own += [] if "--arch" in own else ["--arch", "resnet_tiny"]
        assert module == "softcl.train" and main(own) == 0, line
