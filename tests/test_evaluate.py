"""The k-NN evaluation, the picture of neighbours, and what they leave untouched."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import softcl
from softcl.data import ImageSet
from softcl.evaluation import KNN, eval_mode, extract, knn_predict, nearest_rows, thinned, vote
from softcl.evaluation import knn as knn_module
from softcl.evaluation.features import sampled
from softcl.train.pictures import choose_queries, draw_neighbors, nearest

CPU = torch.device("cpu")


def unit_rows(count: int, dim: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return F.normalize(torch.randn(count, dim, generator=generator), dim=1)


def image_set(count: int, classes: int, seed: int, labelled: bool = True) -> ImageSet:
    """Images whose class is their brightness, with noise."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(count) % classes
    base = (labels + 1).view(-1, 1, 1, 1) * (200 // classes)
    noise = torch.randint(0, 40, (count, 3, 8, 8), generator=generator)
    pattern = torch.zeros(count, 3, 8, 8, dtype=torch.int64)
    pattern[torch.arange(count), :, labels % 8] = 100
    images = (base + noise + pattern).clamp(max=255).to(torch.uint8)
    names = [f"class {i}" for i in range(classes)]
    half = (0.5, 0.5, 0.5)
    if not labelled:
        return ImageSet(images, None, [], half, half, "test")
    return ImageSet(images, labels, names, half, half, "test")


def predict_densely(queries, bank, labels, classes, k, temperature):
    """Literal formula, in float64."""
    cosines = queries.double() @ bank.double().T  # (N, M)
    values, indices = cosines.topk(k, dim=1)
    votes = torch.zeros(len(queries), classes, dtype=torch.float64)
    for row in range(len(queries)):
        for value, index in zip(values[row], indices[row], strict=True):
            votes[row, labels[index]] += torch.exp(value / temperature)
    return votes


@pytest.mark.parametrize("k, temperature", [(1, 0.1), (7, 0.1), (50, 0.07), (101, 1.0)])
def test_prediction_is_the_weighted_vote(k: int, temperature: float):
    queries, bank = unit_rows(37, 12, 0), unit_rows(101, 12, 1)
    labels = torch.arange(101) % 5
    votes = predict_densely(queries, bank, labels, 5, k, temperature)
    ordered = votes.sort(1, descending=True).values
    clear = ordered[:, 0] - ordered[:, 1] > 1e-4 * ordered[:, 0]
    assert clear.float().mean() > 0.9
    found = knn_predict(queries, bank, labels, 5, num_neighbors=k, temperature=temperature)
    assert torch.equal(found[clear], votes.argmax(1)[clear])


def test_vote_cannot_overflow_and_breaks_ties_by_lowest_class():
    logits = torch.tensor([[1000.0, 1000.0, 999.0], [-1000.0, -1000.0, -1000.0]])
    labels = torch.tensor([[3, 1, 3], [2, 2, 0]])
    assert vote(logits, labels, 4).tolist() == [3, 2]
    assert vote(torch.zeros(1, 2), torch.tensor([[2, 1]]), 4).tolist() == [1]


def test_classes_are_ranked_by_their_votes():
    queries, bank = unit_rows(37, 12, 0), unit_rows(101, 12, 1)
    labels = torch.arange(101) % 5
    votes = predict_densely(queries, bank, labels, 7, 50, 0.1)  # classes 5 and 6 have none
    wanted = votes.sort(dim=1, descending=True, stable=True)
    clear = (wanted.values[:, :4] - wanted.values[:, 1:5]).amin(1) > 1e-4 * wanted.values[:, 0]
    assert clear.float().mean() > 0.8
    options = dict(num_neighbors=50, temperature=0.1)
    ranked = knn_predict(queries, bank, labels, 7, top=7, **options)
    assert torch.equal(ranked[clear], wanted.indices[clear])
    assert torch.equal(ranked[:, 0], knn_predict(queries, bank, labels, 7, **options))
    assert torch.equal(ranked[:, :3], knn_predict(queries, bank, labels, 7, top=3, **options))


def test_ties_and_classes_without_votes_are_ranked_by_class():
    labels = torch.tensor([[4, 2, 2, 4], [5, 5, 5, 1]])
    # In the second row the last neighbour's weight is rounded to 0, and is a vote all the same.
    logits = torch.tensor([[0.0, 0.0, 0.0, 0.0], [0.0, -1.0, -2.0, -1000.0]])
    assert vote(logits, labels, 6, top=6).tolist() == [[2, 4, 0, 1, 3, 5], [5, 1, 0, 2, 3, 4]]
    assert vote(logits, labels, 6).tolist() == [2, 5]


def test_few_rows_all_vote_and_numbers_of_numpy_are_numbers():
    queries, bank = unit_rows(9, 12, 0), unit_rows(40, 12, 1)
    labels = torch.arange(40) % 5
    found = knn_predict(queries, bank, labels, 5)
    assert torch.equal(found, knn_predict(queries, bank, labels, 5, num_neighbors=40))
    again = knn_predict(
        queries, bank, labels.to(torch.uint8), np.int64(5), num_neighbors=np.int32(40),
        temperature=np.float32(0.1),
    )  # fmt: skip
    assert torch.equal(found, again)
    assert softcl.knn_predict is knn_predict


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"num_classes": 4}, ValueError, r"bank_labels must be in \[0, num_classes=4\), got 4"),
        ({"bank_labels": torch.arange(40) - 1}, ValueError, "bank_labels must be in .* got -1"),
        ({"bank_labels": torch.zeros(40)}, TypeError, "bank_labels must be integers, got .*32"),
        ({"bank_labels": torch.ones(40) > 0}, TypeError, "must be integers, got dtype torch.bool"),
        ({"bank_labels": [0] * 40}, TypeError, "bank_labels must be a tensor, got list"),
        ({"bank_labels": torch.arange(39)}, ValueError, r"have shape \(40,\), got \(39,\)"),
        ({"bank_labels": torch.ones(40, 1).long()}, ValueError, r"shape \(40,\), got \(40, 1\)"),
        ({"num_classes": 0}, ValueError, "num_classes must be at least 1, got 0"),
        ({"num_classes": 5.0}, TypeError, "num_classes must be an integer, got 5.0"),
        ({"num_classes": True}, TypeError, "num_classes must be an integer, got True"),
        ({"num_neighbors": 0}, ValueError, "num_neighbors must be between 1 and .*40 rows, got 0"),
        ({"num_neighbors": 41}, ValueError, "between 1 and the bank's 40 rows, got 41"),
        ({"num_neighbors": 1.5}, TypeError, "num_neighbors must be an integer, got 1.5"),
        ({"temperature": 0.0}, ValueError, "temperature must be positive and finite, got 0.0"),
        ({"temperature": True}, TypeError, "temperature must be a number, got True"),
        ({"top": 0}, ValueError, "top must be between 1 and num_classes=5, got 0"),
        ({"top": 6}, ValueError, "top must be between 1 and num_classes=5, got 6"),
        ({"bank_piece": 0}, ValueError, "bank_piece must be at least 1, got 0"),
        ({"features": torch.ones(12)}, ValueError, r"features must be a matrix .* got shape \(12,"),
        ({"features": [1.0]}, TypeError, "features must be a tensor, got list"),
        ({"bank": torch.ones(40, 3)}, ValueError, r"bank must have features's dimension 12, got"),
        ({"bank": torch.ones(0, 12)}, ValueError, "bank must not be empty"),
        ({"bank": torch.ones(40, 12).log().log(), "bank_piece": 8}, ValueError, "bank has 40 row"),
        ({"features": torch.full((2, 12), torch.nan)}, ValueError, r"features has 2 row\(s\) that"),
    ],
)  # fmt: skip
def test_an_unusable_argument_of_the_vote_is_named(changes: dict, error: type, message: str):
    given = {"features": unit_rows(9, 12, 0), "bank": unit_rows(40, 12, 1), "num_classes": 5,
             "bank_labels": torch.arange(40) % 5, **changes}  # fmt: skip
    with pytest.raises(error, match=message) as refusal:
        knn_predict(**given)
    assert "\n" not in str(refusal.value)


def test_unusable_votes_and_neighbors_are_named():
    rows = unit_rows(6, 4, 0)
    with pytest.raises(ValueError, match=r"neighbor_labels must be in .*num_classes=3\), got 3"):
        vote(torch.zeros(1, 2), torch.tensor([[1, 3]]), 3)
    with pytest.raises(ValueError, match=r"neighbor_labels must have shape \(1, 2\), got \(2,\)"):
        vote(torch.zeros(1, 2), torch.tensor([1, 3]), 4)
    with pytest.raises(ValueError, match="top must be between 1 and num_classes=4, got 5"):
        vote(torch.zeros(1, 2), torch.tensor([[1, 3]]), 4, top=5)
    with pytest.raises(ValueError, match="num_neighbors must be between 1 and .* 6 rows, got 7"):
        nearest_rows(rows, rows, 7)


def test_queries_go_in_pieces(monkeypatch):
    queries, bank = unit_rows(23, 8, 0), unit_rows(40, 8, 1)
    labels = torch.arange(40) % 3
    whole = knn_predict(queries, bank, labels, 3, num_neighbors=5)
    sizes = []
    original = knn_module.queue_statistics

    def spy(vectors, *rest, **options):
        sizes.append(len(vectors))
        return original(vectors, *rest, **options)

    monkeypatch.setattr(knn_module, "_PIECE", 10)
    monkeypatch.setattr(knn_module, "queue_statistics", spy)
    assert torch.equal(knn_predict(queries, bank, labels, 3, num_neighbors=5), whole)
    assert sizes == [10, 10, 3]


@pytest.mark.parametrize("k", [1, 5, 40])
@pytest.mark.parametrize("piece", [1, 7, 39, 40, 100])
def test_a_bank_in_pieces_gives_the_same_neighbors(k: int, piece: int):
    queries, bank = unit_rows(9, 8, 0), unit_rows(40, 8, 1)
    bank[20:30] = bank[:10]  # ties across pieces: the lowest row wins
    whole = nearest_rows(queries, bank, k)
    pieces = nearest_rows(queries, bank, k, bank_piece=piece)
    torch.testing.assert_close(whole[0], pieces[0])
    assert torch.equal(whole[1], pieces[1])
    exact = (queries @ bank.T / 0.1).sort(dim=1, descending=True, stable=True)
    torch.testing.assert_close(pieces[0], exact.values[:, :k])


def test_purity_counts_neighbors_of_the_same_class():
    bank, queries = image_set(60, 3, 0), image_set(30, 3, 1)
    knn = KNN(bank, queries, 8, CPU, num_neighbors=10)
    rows = knn.features(lambda images: images.flatten(1))
    assert knn.purity(*rows) == 1.0
    bank.labels = torch.where(torch.arange(60) % 6 < 3, bank.labels, (bank.labels + 1) % 3)
    assert 0.0 < knn.purity(*rows) < 1.0


def test_accuracy_of_separable_and_of_shuffled_classes():
    bank, queries = image_set(60, 3, 0), image_set(30, 3, 1)
    knn = KNN(bank, queries, 8, CPU, num_neighbors=10)
    assert knn.pixel_accuracy() == 1.0
    bank.labels = (bank.labels + 1) % 3
    assert knn.pixel_accuracy() == 0.0


def test_without_a_test_set_a_tenth_is_held_out():
    images = image_set(100, 2, 0)
    knn = KNN(images, images, 8, CPU, num_neighbors=200)
    assert len(knn.query_indices) == 10 and len(knn.bank_indices) == 90
    assert not set(knn.query_indices.tolist()) & set(knn.bank_indices.tolist())
    assert knn.num_neighbors == 90


def test_large_sets_are_thinned_evenly():
    assert thinned(5, 10).tolist() == [0, 1, 2, 3, 4]
    places = thinned(1_000_003, 1000)
    gaps = places.diff()
    assert len(places) == 1000 and places[0] == 0 and places[-1] < 1_000_003
    assert gaps.min() >= 1000 and gaps.max() <= 1001


def test_a_sample_has_every_class_of_a_set_whose_classes_take_turns():
    labels = torch.arange(2000) % 10
    places = sampled(2000, 500)
    assert len(places.unique()) == 500 and torch.equal(places, places.sort().values)
    assert torch.bincount(labels[places], minlength=10).min() > 30
    assert torch.equal(places, sampled(2000, 500)) and sampled(3, 10).tolist() == [0, 1, 2]


def test_features_are_unit_rows_of_the_whole_image():
    images = image_set(11, 3, 0)
    rows = extract(images, torch.arange(11), lambda x: x.flatten(1), 8, CPU)
    pixels = (images.images.float() / 255 - 0.5) / 0.5
    torch.testing.assert_close(rows, F.normalize(pixels.flatten(1), dim=1))


def test_evaluation_leaves_the_encoder_as_it_was():
    encoder = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Dropout(), nn.Flatten())
    encoder.train()
    encoder[2].eval()
    encoder.features = encoder.forward
    before = {name: value.clone() for name, value in encoder.state_dict().items()}
    images = image_set(20, 2, 0)
    knn = KNN(images, images, 8, CPU)
    first, again = knn.encoder_features(encoder), knn.encoder_features(encoder)
    assert torch.equal(first[0], again[0]) and torch.equal(first[1], again[1])
    assert [m.training for m in encoder] == [True, True, False, True] and encoder.training
    assert all(torch.equal(before[name], value) for name, value in encoder.state_dict().items())
    assert not first[0].requires_grad


def test_eval_mode_is_left_after_an_error():
    module = nn.Dropout()
    with pytest.raises(RuntimeError), eval_mode(module):
        assert not module.training
        raise RuntimeError
    assert module.training


@pytest.mark.parametrize("labelled", [True, False])
def test_picture_shows_queries_and_their_neighbors(tmp_path: Path, labelled: bool):
    from PIL import Image

    bank, queries = image_set(40, 4, 0, labelled), image_set(20, 4, 1, labelled)
    knn = KNN(bank, queries, 8, CPU)
    places = choose_queries(knn)
    if labelled:
        assert queries.labels[knn.query_indices[places]].tolist() == [0, 1, 2, 3]
    rows, bank_rows = knn.features(lambda pixels: pixels.flatten(1))
    found = nearest(rows[places], bank_rows)
    if labelled:
        assert (bank.labels[knn.bank_indices[found]] == torch.arange(4).view(-1, 1)).all()
    path = tmp_path / "neighbors.png"
    draw_neighbors(path, knn, places, [("one", found), ("two", found.flip(1))])
    with Image.open(path) as picture:
        colours = picture.convert("RGB").getcolors(1 << 20)
        assert picture.width > 1000 and picture.height > 60 * len(places)
    # A border of (72^2 - 64^2) pixels around each of the 17 images of a row.
    border = 17 * (72**2 - 64**2)
    framed = [count for count, colour in colours if count >= border and max(colour) < 255]
    assert len(framed) == (4 if labelled else 1)
