"""The k-NN evaluation, the picture of neighbours, and what they leave untouched."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

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
