"""``python -m softcl.evaluate`` and its measures: probes, retrieval, backbones from checkpoints."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import softcl.evaluate as evaluate_module
from softcl.evaluate import describe, main
from softcl.evaluation.features import central
from softcl.evaluation.probe import (
    PENALTIES,
    TOLERANCE,
    Labelled,
    fit_logistic,
    lbfgs_probe,
    sgd_probe,
)
from softcl.evaluation.retrieval import retrieval_precision
from softcl.methods import METHODS
from softcl.train.__main__ import main as train
from softcl.train.checkpoint import load_backbone, read_checkpoint
from softcl.train.config import TrainConfig
from softcl.train.parts import build_state


def blobs(count: int, seed: int, spread: float = 0.5, classes: int = 4) -> Labelled:
    """Gaussian rows around a centre for each class; the centres do not depend on the seed."""
    centers = torch.randn(classes, 12, generator=torch.Generator().manual_seed(99))
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(count) % classes
    return Labelled(centers[labels] + spread * torch.randn(count, 12, generator=generator), labels)


@pytest.mark.parametrize("probe", [sgd_probe, lbfgs_probe])
def test_probes_learn_what_is_there_and_nothing_else(probe):
    options = {"epochs": 10, "rate": 0.1} if probe is sgd_probe else {}
    assert probe(blobs(400, 0), blobs(200, 1), 4, **options)["top1"] > 0.97
    train = blobs(400, 0)
    shuffled = Labelled(train.rows, train.labels[torch.randperm(400)])
    assert probe(shuffled, blobs(200, 1), 4, **options)["top1"] < 0.6
    first, again = (probe(train, blobs(200, 1, 2.0), 4, **options) for _ in range(2))
    assert first == again


def test_logistic_regression_is_at_its_minimum():
    train = blobs(150, 0, 2.0)
    weights, _ = fit_logistic(train.rows.double(), train.labels, 4, 1e-2, 200, None)

    def loss(w: Tensor) -> Tensor:
        scores = train.rows.double() @ w[:-1] + w[-1]
        return F.cross_entropy(scores, train.labels) + 0.005 * w[:-1].square().sum()

    gradient = torch.autograd.functional.jacobian(loss, weights)
    assert float(gradient.abs().max()) < 1e-4
    from sklearn.linear_model import LogisticRegression

    known = LogisticRegression(C=1 / (1e-2 * 150), tol=1e-8, max_iter=1000)
    known.fit(train.rows.double().numpy(), train.labels.numpy())
    torch.testing.assert_close(weights[:-1].T, torch.from_numpy(known.coef_), rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize("spread", [0.5, 2.0])
@pytest.mark.parametrize("penalty", PENALTIES)
def test_logistic_regression_is_as_good_as_scikit_learns(penalty: float, spread: float):
    train = blobs(150, 0, spread)
    rows = train.rows.double()
    scale = torch.logspace(0, -2, 12, dtype=torch.float64)  # badly conditioned
    rows = rows * scale

    def objective(w: Tensor) -> float:
        data = F.cross_entropy(rows @ w[:-1] + w[-1], train.labels)
        return float(data + 0.5 * penalty * w[:-1].square().sum())

    from sklearn.linear_model import LogisticRegression

    known = LogisticRegression(C=1 / (penalty * 150), tol=1e-10, max_iter=20_000)
    known.fit(rows.numpy(), train.labels.numpy())
    best = torch.from_numpy(known.coef_).T, torch.from_numpy(known.intercept_)[None]
    found, excess = fit_logistic(rows, train.labels, 4, penalty, 1000, None)
    assert objective(found) - objective(torch.cat(best)) < 1e-5 and excess <= TOLERANCE
    # Too few iterations, and that is told.
    hasty, excess = fit_logistic(rows, train.labels, 4, penalty, 2, None)
    assert excess > TOLERANCE and objective(hasty) - objective(torch.cat(best)) <= excess


def test_a_probe_that_did_not_converge_says_so():
    found = lbfgs_probe(blobs(150, 0, 2.0), blobs(50, 1), 4, iterations=2)
    assert "not converged: objective within" in describe("lbfgs", {**found, "seconds": 1.0})
    found = lbfgs_probe(blobs(150, 0, 2.0), blobs(50, 1), 4)
    assert "converged" not in describe("lbfgs", {**found, "seconds": 1.0})


def test_the_best_epoch_is_reported_beside_the_last():
    found = sgd_probe(blobs(100, 0, 3.0), blobs(100, 1, 3.0), 4, epochs=20, rate=1.0)
    assert found["best_top1"] >= found["top1"] and 1 <= found["best_epoch"] <= 20


@pytest.mark.parametrize("probe", [sgd_probe, lbfgs_probe])
@pytest.mark.parametrize(
    ("train", "test", "classes", "message"),
    [
        (([0, 1, 2, 3], 4), ([0], 4), 3, r"train.labels must be in .*num_classes=3\), got 3"),
        (([0, 1, -1], 4), ([0], 4), 2, r"train.labels must be in .*num_classes=2\), got -1"),
        (([0, 1, 1], 4), ([0, 2], 4), 2, r"test.labels must be in .*num_classes=2\), got 2"),
        (([0, 1, 1], 4), ([0, 1], 5), 2, r"test.rows must have train.rows's dimension 4, got"),
        (([0, 1, 1], 4), ([0, 1], 4), 0, "num_classes must be at least 1, got 0"),
    ],
)
def test_sets_that_do_not_fit_a_probe_are_refused(probe, train, test, classes, message):
    sets = [Labelled(torch.ones(len(x), F), torch.tensor(x)) for x, F in (train, test)]
    with pytest.raises(ValueError, match=message) as refusal:
        probe(*sets, classes)
    assert "\n" not in str(refusal.value)


def test_unusable_numbers_of_a_probe_are_named():
    rows = torch.randn(8, 3)
    some = Labelled(rows, torch.arange(8) % 2)
    for call, message in (
        (lambda: sgd_probe(some, some, 2, epochs=0), "epochs must be at least 1, got 0"),
        (lambda: sgd_probe(some, some, 2, rate=-1.0), "rate must be positive and finite, got -1"),
        (lambda: lbfgs_probe(some, some, 2, iterations=0), "iterations must be at least 1, got 0"),
        (lambda: Labelled(rows, torch.arange(7)), r"labels must have shape \(8,\), got \(7,\)"),
        (lambda: Labelled(rows[0], torch.arange(3)), r"rows must be a matrix of row vectors"),
        (
            lambda: lbfgs_probe(Labelled(rows[:1], some.labels[:1]), some, 2),
            "train.rows must be 2 or more: a tenth is held out, got 1",
        ),
        (
            lambda: sgd_probe(some, Labelled(rows.double(), some.labels), 2),
            "test.rows must have train.rows' dtype torch.float32, got torch.float64",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            call()


@pytest.mark.parametrize("probe", [sgd_probe, lbfgs_probe])
def test_a_probe_takes_rows_in_double_and_labels_in_bytes(probe):
    train, test = blobs(60, 0), blobs(60, 1)
    train, test = (Labelled(x.rows.double(), x.labels.to(torch.uint8)) for x in (train, test))
    assert probe(train, test, 4)["top1"] > 0.8


def test_unusable_arguments_of_retrieval_are_named():
    rows, labels = F.normalize(torch.randn(8, 3), dim=1), torch.arange(8) % 2
    for changes, message in (
        ({"query_labels": labels[:3]}, r"query_labels must have shape \(8,\), got \(3,\)"),
        ({"bank_labels": labels[:3]}, r"bank_labels must have shape \(8,\), got \(3,\)"),
        ({"depths": (0, 1)}, "depths must be at least 1, got 0"),
        ({"bank": rows[:, :2]}, r"bank must have queries's dimension 3, got \(8, 2\)"),
    ):
        given = {"queries": rows, "query_labels": labels, "bank": rows, "bank_labels": labels}
        with pytest.raises(ValueError, match=message):
            retrieval_precision(**{**given, **changes})


def test_retrieval_precision_is_the_share_of_the_class():
    generator = torch.Generator().manual_seed(0)
    bank = F.normalize(torch.randn(60, 5, generator=generator), dim=1)
    queries = F.normalize(torch.randn(7, 5, generator=generator), dim=1)
    bank_labels, labels = torch.arange(60) % 3, torch.arange(7) % 3
    found = retrieval_precision(queries, labels, bank, bank_labels, bank_piece=13)
    assert list(found) == ["precision_at_1", "precision_at_5", "precision_at_10", "precision_at_50"]
    for name, value in found.items():
        depth = int(name.rpartition("_")[2])
        nearest = (queries.double() @ bank.double().T).topk(depth, dim=1).indices
        expected = (bank_labels[nearest] == labels[:, None]).double().mean()
        assert value == pytest.approx(float(expected), abs=1e-6)


@pytest.fixture
def run(flags: list[str], tmp_path: Path, capsys) -> Path:
    assert train([*flags, "--out", "run"]) == 0
    capsys.readouterr()
    return tmp_path / "run"


def test_a_backbone_comes_back_as_it_was(run: Path):
    content = read_checkpoint(run / "best.pt")
    config = TrainConfig.of(**content["config"])
    for network in ("student", "teacher"):
        stored = load_backbone(run, network)
        assert stored.path == run / "best.pt" and not stored.backbone.training
        images = torch.randn(3, 3, 16, 16, generator=torch.Generator().manual_seed(0))
        state = build_state(config, METHODS[config.method](**config.numbers), torch.device("cpu"))
        state.student.load_state_dict(content[network])
        with torch.no_grad():
            expected = state.student.eval().features(images)
        assert torch.equal(stored.backbone(images), expected)


def test_the_command_measures_prints_and_writes(run: Path, tmp_path: Path, capsys):
    line = [str(run), "--epochs", "5", "--lr", "0.1", "--device", "cpu", "--out", "found.json"]
    assert main(line) == 0
    text = capsys.readouterr().out
    for word in ("k-NN       top-1", "SGD top-1", "L-BFGS top-1", "retrieval  precision @1"):
        assert word in text
    found = json.loads((tmp_path / "found.json").read_text())
    assert found["train"]["images"] == 128 and found["test"]["images"] == 32
    assert found["knn"]["num_neighbors"] == 128 and 0 <= found["knn"]["top1"] <= 1
    # The driver's own last evaluation had the same features, bank and votes.
    best = read_checkpoint(run / "best.pt")
    assert found["step"] == best["step"]
    assert found["knn"]["top1"] == pytest.approx(best["accuracy"], abs=1e-6)
    assert found["lbfgs"]["top1"] > 0.3 and found["retrieval"]["precision_at_1"] > 0.25


def test_other_sets_other_checkpoints_and_one_measure(run: Path, folder: Path, capsys):
    other = ["--data", "shapes:300", "--measure", "knn", "--limit", "100", "--device", "cpu"]
    assert main([str(run / "last.pt"), *other, "--network", "teacher"]) == 0
    text = capsys.readouterr().out
    assert "last.pt, step 8, teacher" in text and "shapes (test)" in text and "linear" not in text
    assert main([str(run), "--test-data", "shapes"]) == 1
    assert "its classes are not those of" in capsys.readouterr().err


def test_classes_without_images_to_learn_from_are_told(
    run: Path, folder: Path, tmp_path: Path, capsys
):
    shutil.copytree(folder, tmp_path / "few")
    for file in (tmp_path / "few" / "train" / "class2").iterdir():
        file.unlink()
    line = [str(run), "--epochs", "2", "--device", "cpu", "--knn-k", "500", "--out", "found.json"]
    assert main([*line, "--data", str(tmp_path / "few")]) == 0
    told = "warning    8 of 32 test images are of classes that have no image to learn from"
    assert told in capsys.readouterr().out
    found = json.loads((tmp_path / "found.json").read_text())
    assert found["knn"]["num_neighbors"] == 96 and found["lbfgs"]["top1"] <= 0.75
    assert main([*line, "--measure", "knn"]) == 0
    assert "warning" not in capsys.readouterr().out


WRONG = [
    ("", "RUN", 2),
    ("run --measur knn", "unknown flag --measur; did you mean --measure?", 2),
    ("run --measure kn", "must be one of", 2),
    ("run --knn-k 0", "--knn-k 0: must be at least 1", 2),
    ("run --lr -1", "--lr -1.0: must be above 0", 2),
    ("run --device gpu", "--device gpu: must be auto, cpu, cuda", 2),
    ("nowhere", "nowhere: cannot read: No such file", 1),
    ("run --data nowhere", "nowhere: no such file or folder", 1),
    ("run/config.json", "config.json: it has no checksum", 1),
]


def test_wrong_calls_are_told_in_three_lines(run: Path, capsys):
    for line, message, code in WRONG:
        flags = line.split() if "--device" in line else [*line.split(), "--device", "cpu"]
        assert main(flags) == code
        error = capsys.readouterr().err
        assert message in error and len(error.splitlines()) <= 3, line


@pytest.mark.parametrize("share, side", [(1.0, 256), (0.875, 224), (0.5, 128)])
def test_the_centre_is_what_pillow_crops(share: float, side: int):
    import numpy as np
    from PIL import Image

    pixels = torch.randint(0, 256, (1, 3, 256, 301), generator=torch.Generator().manual_seed(0))
    pixels = pixels.to(torch.uint8)
    image = Image.fromarray(pixels[0].permute(1, 2, 0).numpy())
    left, top = (301 - side) // 2, (256 - side) // 2
    expected = np.array(image.crop((left, top, left + side, top + side)))
    found = central(pixels, share)
    if share == 1.0:
        assert found is pixels
    else:
        assert np.array_equal(found[0].permute(1, 2, 0).numpy(), expected)


def test_the_share_that_is_seen(run: Path, tmp_path: Path, capsys, monkeypatch):
    seen = []
    original = evaluate_module.extract

    def noted(images, indices, function, size, device, **options):
        seen.append((tuple(images.images.shape[-2:]), size, options["crop_share"]))
        return original(images, indices, function, size, device, **options)

    monkeypatch.setattr(evaluate_module, "extract", noted)
    line = [str(run), "--measure", "knn", "--device", "cpu", "--limit", "8", "--out", "x.json"]
    for more, expected in (
        ([], ((16, 16), 16, 1.0)),  # the images are no larger
        (["--crop-share", "0.5"], ((16, 16), 16, 0.5)),
        (["--image-size", "224"], ((16, 16), 224, 0.875)),
    ):
        seen.clear()
        assert main([*line, *more]) == 0
        assert seen == [expected] * 2
        assert json.loads((tmp_path / "x.json").read_text())["crop_share"] == expected[2]
    assert main([*line, "--crop-share", "1.5"]) == 2
    assert "--crop-share 1.5: must be at most 1" in capsys.readouterr().err
