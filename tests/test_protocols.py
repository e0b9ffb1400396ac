"""Published probes and votes: Euclidean k-NN, top-5, protocols with views made in every epoch."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from softcl.data import make_shapes
from softcl.data.views import PaddedCrop
from softcl.evaluate import main
from softcl.evaluation import checks, knn_predict
from softcl.evaluation import knn as knn_module
from softcl.evaluation.knn import euclidean_neighbors
from softcl.evaluation.probe import PROTOCOLS, Labelled, sgd_probe, top_accuracies


def rows_of(count: int, dim: int, seed: int) -> torch.Tensor:
    return torch.randn(count, dim, generator=torch.Generator().manual_seed(seed)) + 100.0


@pytest.mark.parametrize("k", [1, 5])
def test_euclidean_vote_is_scikit_learns(k: int, monkeypatch):
    """Of rows far from the origin, where single precision would lose their differences."""
    from sklearn.neighbors import KNeighborsClassifier

    monkeypatch.setattr(knn_module, "_DISTANCE_PIECE", 37)
    monkeypatch.setattr(knn_module, "_PIECE", 16)
    queries, bank = rows_of(50, 8, 0), rows_of(200, 8, 1)
    labels = torch.arange(200) % 7
    known = KNeighborsClassifier(k, algorithm="brute").fit(bank.double().numpy(), labels.numpy())
    found = knn_predict(queries, bank, labels, 7, num_neighbors=k, distance="euclidean")
    assert np.array_equal(found.numpy(), known.predict(queries.double().numpy()))
    distances, rows = euclidean_neighbors(queries, bank, k)
    wanted, places = known.kneighbors(queries.double().numpy())
    assert np.allclose(distances.numpy(), wanted, atol=1e-6)
    assert np.array_equal(rows.numpy(), places)


def test_equal_distances_go_by_lowest_row_and_other_distances_are_refused():
    bank = torch.tensor([[1.0], [0.0], [1.0], [0.0]])
    distances, rows = euclidean_neighbors(torch.tensor([[0.5]]), bank, 4)
    assert rows.tolist() == [[0, 1, 2, 3]] and distances.tolist() == [[0.5] * 4]
    with pytest.raises(ValueError, match="distance must be one of cosine, euclidean, got 'cos'"):
        knn_predict(bank, bank, torch.zeros(4, dtype=torch.int64), 1, distance="cos")


@pytest.mark.parametrize("k", [1, 3, 64, 150])
def test_the_nearest_of_many_equal_distances_are_the_lowest_rows(k: int, monkeypatch):
    """Against the definition in float64, sorted as a whole; five values make ties everywhere."""
    monkeypatch.setattr(knn_module, "_DISTANCE_PIECE", 64)
    generator = torch.Generator().manual_seed(0)
    queries, bank = (torch.randint(0, 5, (n, 1), generator=generator).float() for n in (9, 150))
    wanted = (queries - bank.T).double().abs().sort(dim=1, stable=True)
    distances, rows = euclidean_neighbors(queries, bank, k)
    assert torch.equal(rows, wanted.indices[:, :k])
    assert torch.allclose(distances, wanted.values[:, :k])


def test_rows_that_are_not_finite_are_refused_wherever_they_lie(monkeypatch):
    monkeypatch.setattr(checks, "values_are_at_hand", lambda rows: False)  # as of a GPU's
    bank = torch.tensor([[1.0], [float("nan")]])
    with pytest.raises(ValueError, match="bank has 1 row"):
        euclidean_neighbors(torch.ones(1, 1), bank, 1)


def test_top5_needs_more_than_five_classes():
    ranked = torch.tensor([[0, 1, 2, 3, 4], [5, 6, 7, 8, 9], [1, 0, 2, 3, 4]])
    labels = torch.tensor([0, 9, 9])
    assert top_accuracies(ranked, labels, 10) == pytest.approx({"top1": 1 / 3, "top5": 2 / 3})
    assert set(top_accuracies(ranked, labels, 5)) == {"top1"}


# ---- Protocols ----


@pytest.mark.parametrize("name", list(PROTOCOLS))
def test_a_step_of_each_protocol(name: str):
    """Two epochs of one batch, written out: the weights start from N(0, 0.01) by the seed."""
    protocol, generator = PROTOCOLS[name], torch.Generator().manual_seed(3)
    rows, labels = 0.01 * torch.randn(20, 4, generator=generator), torch.arange(20) % 3
    given = [(rows, labels)]
    found = sgd_probe(lambda epoch: given, Labelled(rows, labels), 3, epochs=2, protocol=protocol)
    weight = 0.01 * torch.randn(3, 4, generator=torch.Generator().manual_seed(0))
    values = [weight.requires_grad_(), torch.zeros(3, requires_grad=True)]
    moved = [0.0, 0.0]
    for rate in (protocol.rate, 0.1 * protocol.rate):  # the first drop is after 60 of 100 epochs
        scores = rows @ values[0].T + values[1]
        gradients = torch.autograd.grad(F.cross_entropy(scores, labels), values)
        with torch.no_grad():
            for place, (value, g) in enumerate(zip(values, gradients, strict=True)):
                moved[place] = 0.9 * moved[place] + g
                value -= rate * (g + 0.9 * moved[place] if protocol.nesterov else moved[place])
    scores = rows @ values[0].T + values[1]
    assert found["top1"] == pytest.approx(float((scores.argmax(1) == labels).float().mean()))


def test_padded_crops_are_places_of_the_padded_image():
    """Each view is one of the 81 places of the image padded by black, mirrored or not."""
    images = make_shapes(12).images
    view = PaddedCrop(32, (0.5, 0.4, 0.3), (0.2, 0.3, 0.4))
    made = view(images, torch.Generator().manual_seed(0))
    mean, std = (torch.tensor(x).view(3, 1, 1) for x in (view.mean, view.std))
    pixels = ((made * std + mean) * 255).round().to(torch.uint8)
    seen = set()
    for image, found in zip(images, pixels, strict=True):
        padded = F.pad(image, (4, 4, 4, 4))
        places = {
            (top, left, mirrored)
            for top in range(9)
            for left in range(9)
            for mirrored in (False, True)
            for crop in [padded[:, top : top + 32, left : left + 32]]
            if torch.equal(crop.flip(2) if mirrored else crop, found)
        }
        assert len(places) == 1
        seen |= places
    assert len(seen) > 8 and {mirrored for *_, mirrored in seen} == {False, True}


@pytest.mark.parametrize("name", ["ascl", "sce"])
def test_the_command_makes_views_in_every_epoch(
    whole: Path, tmp_path: Path, capsys, one_thread, name
):
    out = tmp_path / "found.json"
    line = [str(whole), "--measure", "sgd", "--measure", "knn", "--epochs", "3", "--device", "cpu"]
    line += ["--protocol", name, "--lr", "0.1", "--knn-distance", "euclidean", "--out", str(out)]
    assert main(line) == 0
    augmented = json.loads(out.read_text())
    assert augmented["sgd"]["protocol"] == name and augmented["sgd"]["stored"] is False
    assert augmented["knn"]["distance"] == "euclidean"
    assert "votes by distance" in capsys.readouterr().out
    assert main(line) == 0
    again = json.loads(out.read_text())
    assert again["sgd"]["top1"] == augmented["sgd"]["top1"]  # the seed decides all of it
    assert again["sgd"]["train_top1"] == augmented["sgd"]["train_top1"]
    assert main([*line, "--stored"]) == 0
    stored = json.loads(out.read_text())["sgd"]
    assert stored["stored"] is True and stored["train_top1"] != augmented["sgd"]["train_top1"]


def test_stored_goes_with_a_protocol(whole: Path, capsys):
    assert main([str(whole), "--stored"]) == 2
    assert "--stored: goes with --protocol" in capsys.readouterr().err
