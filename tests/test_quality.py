"""Effective rank, alignment and uniformity: against float64, and in a run without labels."""

from __future__ import annotations

import itertools
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from softcl.evaluation import alignment, rankme, uniformity
from softcl.train.__main__ import main
from softcl.train.checkpoint import read_checkpoint


def rankme_of(rows: np.ndarray) -> float:
    """The paper's formula, by the singular values themselves."""
    values = np.linalg.svd(rows.astype(np.float64), compute_uv=False)
    shares = values / values.sum() + 1e-7
    return float(np.exp(-(shares * np.log(shares)).sum()))


SPECTRA = {
    "flat": lambda k: np.ones_like(k),
    "power law": lambda k: 1 / (k + 1),
    "steep": lambda k: np.exp(-k),
    "few": lambda k: (k < 3) * 1.0,
}


@pytest.mark.parametrize("spectrum", SPECTRA)
@pytest.mark.parametrize("shape", [(500, 40), (30, 200), (5000, 16)])
def test_rankme_is_that_of_float64_singular_values(spectrum: str, shape: tuple[int, int]):
    chooser, least = np.random.default_rng(0), min(shape)
    left, _ = np.linalg.qr(chooser.normal(size=(shape[0], least)))
    right, _ = np.linalg.qr(chooser.normal(size=(shape[1], least)))
    values = SPECTRA[spectrum](np.arange(least, dtype=np.float64))
    rows = torch.tensor(100 * (left * values) @ right.T, dtype=torch.float32)
    assert rankme(rows) == pytest.approx(rankme_of(rows.numpy()), rel=2e-6)
    assert rankme(1e-3 * rows) == pytest.approx(rankme(rows), rel=1e-6)  # of no scale


def test_rankme_of_what_is_known():
    assert rankme(torch.eye(8)) == pytest.approx(8, rel=1e-5)
    assert rankme(torch.ones(50, 8)) == pytest.approx(1, rel=1e-4)  # collapsed
    assert rankme(torch.zeros(50, 8)) == 1.0
    # Not centred: what all rows share is a direction like another.
    assert rankme(torch.eye(8) + 100) < 1.5
    with pytest.raises(ValueError, match="rows must be finite"):
        rankme(torch.full((4, 2), torch.nan))
    with pytest.raises(ValueError, match="rows must be a matrix"):
        rankme(torch.ones(4))


def test_alignment_and_uniformity_are_means_over_pairs():
    first, second = (F.normalize(torch.randn(2500, 5), dim=1) for _ in range(2))
    squares = ((first.double() - second.double()) ** 2).sum(1)
    assert alignment(first, second) == pytest.approx(float(squares.mean()), rel=1e-12)
    few = first[:40].double()
    pairs = [float((-2 * (x - y).square().sum()).exp()) for x, y in itertools.combinations(few, 2)]
    assert uniformity(few.float()) == pytest.approx(np.log(np.mean(pairs)), rel=1e-5)
    distances = torch.pdist(first.double())  # several pieces
    expected = float((-2 * distances**2).exp().mean().log())
    assert uniformity(first) == pytest.approx(expected, rel=1e-5)
    assert uniformity(first[:1].repeat(9, 1)) == pytest.approx(0, abs=1e-5)
    assert uniformity(torch.eye(7)) == pytest.approx(-4)
    with pytest.raises(ValueError, match="one shape"):
        alignment(first, second[:3])
    with pytest.raises(ValueError, match="at least 2"):
        uniformity(first[:1])


@pytest.fixture
def plain(folder: Path, tmp_path: Path) -> Path:
    """The training images without their labels."""
    target = tmp_path / "plain"
    target.mkdir()
    for number, path in enumerate(sorted((folder / "train").rglob("*.png"))):
        shutil.copyfile(path, target / f"{number}.png")
    return target


def test_without_labels_rankme_chooses_the_best_checkpoint(flags, plain: Path, tmp_path, capsys):
    line = [*flags, "--data", str(plain), "--out", "run", "--epochs", "3", "--knn-every", "1"]
    assert main(line) == 0
    told = capsys.readouterr().out
    rows = [json.loads(row) for row in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    ranks = {row["step"]: row["rankme"] for row in rows if "rankme" in row}
    result = json.loads((tmp_path / "run/result.json").read_text())
    best = max(ranks, key=ranks.get)
    assert len(ranks) == 3 and len(set(ranks.values())) == 3
    assert (result["best_by"], result["best_step"], result["best"]) == ("RankMe", best, ranks[best])
    stored = read_checkpoint(tmp_path / "run/best.pt")
    assert (stored["step"], stored["best_by"]) == (best, "RankMe")
    assert f"best.pt: by RankMe, of epoch {best // 4}" in told
    assert f"RankMe {ranks[4]:.1f}  alignment" in told
    assert not any("knn_top1" in row for row in rows)


def test_with_labels_both_are_measured_and_knn_chooses(whole: Path):
    rows = [json.loads(row) for row in (whole / "metrics.jsonl").read_text().splitlines()]
    measured = [row for row in rows if "knn_top1" in row]
    assert len(measured) == 2
    for row in measured:
        assert 1 < row["rankme"] <= 128 and 0 < row["alignment"] < 4 and row["uniformity"] < 0
    result = json.loads((whole / "result.json").read_text())
    assert result["best_by"] == "k-NN" and result["rankme"] == measured[-1]["rankme"]
    baselines = json.loads((whole / "baselines.json").read_text())
    assert 1 < baselines["untrained_rankme"] <= 128


def test_the_measures_are_of_the_same_images_and_views_each_time(whole: Path, monkeypatch):
    from softcl.train.config import TrainConfig
    from softcl.train.evaluation import Evaluation
    from softcl.train.parts import assemble

    config = read_checkpoint(whole / "last.pt")["config"]
    parts = assemble(TrainConfig.of(**config))
    evaluation = Evaluation(parts)
    found, rows = evaluation.measure(parts.state.student)
    torch.rand(3)
    again, _ = evaluation.measure(parts.state.student)
    assert found == again
    assert found["rankme"] == pytest.approx(
        rankme_of(
            parts.knn.features(parts.state.student.eval().features, normalize=False)[1].numpy()
        ),
        rel=1e-5,
    )
    first, second = evaluation.view_rows(parts.state.student)
    assert first.shape == second.shape == (128, parts.state.student.backbone.num_features)
    assert not torch.equal(first, second)
    assert found["alignment"] == pytest.approx(alignment(first, second))
    torch.testing.assert_close(rows[1].norm(dim=1), torch.ones(128))


def test_a_resumed_run_knows_its_best(flags, plain: Path, tmp_path: Path):
    line = [*flags, "--data", str(plain), "--knn-every", "1"]
    assert main([*line, "--out", "whole"]) == 0
    assert main([*line, "--out", "part", "--max-steps", "5"]) == 0
    assert main(["--resume", "part"]) == 0
    results = [
        json.loads((tmp_path / name / "result.json").read_text()) for name in ("whole", "part")
    ]
    for result in results:
        del result["seconds"]
    assert results[0] == results[1]
