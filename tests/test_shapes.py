"""The generated set: reproducible, balanced, of independent factors, not easy for raw pixels."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import softcl.data
from softcl.data import STATISTICS, DataError, contact_sheet, load_dataset, make_shapes
from softcl.data.figures import FIGURES, PATTERNS
from softcl.data.shapes import CLASSES, render

FACTORS = {"shape": 10, "texture": 5, "color": 8, "size": 4, "position": 9}


@pytest.fixture(scope="module")
def train():
    return make_shapes(10_000)


@pytest.fixture(scope="module")
def test():
    return make_shapes(2000, "test")


def test_form(train):
    assert train.images.shape == (10_000, 3, 32, 32) and train.images.dtype == torch.uint8
    assert train.resident and len(train) == 10_000
    assert train.labels.dtype == torch.int64 and train.classes == CLASSES and len(CLASSES) == 10
    assert set(train.factors) == set(FACTORS)
    assert torch.equal(train.factors["shape"], train.labels)
    for name, number in FACTORS.items():
        values = train.factors[name]
        assert values.dtype == torch.int64 and values.min() == 0 and values.max() == number - 1


def test_an_image_does_not_depend_on_the_size_of_the_set(train):
    for number in (1, 7, 600):
        part = make_shapes(number)
        assert torch.equal(part.images, train.images[:number])
        for name in FACTORS:
            assert torch.equal(part.factors[name], train.factors[name][:number])
    index = np.array([4321, 17, 9999])
    images, factors = render(0, "train", index)
    assert torch.equal(torch.from_numpy(images), train.images[index])
    assert torch.equal(torch.from_numpy(factors["color"]), train.factors["color"][index])


def test_splits_and_seeds_share_no_image(train, test):
    def set_of(images: torch.Tensor) -> set[bytes]:
        return {image.numpy().tobytes() for image in images}

    training = set_of(train.images)
    assert len(training) == 10_000
    assert not training & set_of(test.images)
    assert not training & set_of(make_shapes(500, seed=1).images)


def test_the_pixels_are_those_written_down(train):
    # The last digit of a cosine may differ from machine to machine, and so a pixel by one level.
    means = train.images[:4].double().mean((1, 2, 3))
    torch.testing.assert_close(means, torch.tensor(MEANS, dtype=torch.float64), atol=0.01, rtol=0)


MEANS = [122.1546, 122.1904, 102.8799, 128.2048]


def test_classes_are_balanced_and_factors_uniform(train):
    assert (torch.bincount(train.labels) == 1000).all()
    for name, number in FACTORS.items():
        counts = torch.bincount(train.factors[name], minlength=number).double()
        expected = 10_000 / number
        # At most 8 degrees of freedom: chi-square exceeds 32 with probability 1e-4.
        assert ((counts - expected) ** 2 / expected).sum() < 32


def test_factors_are_independent(train):
    names = list(FACTORS)
    for i, first in enumerate(names):
        for second in names[:i]:
            a, b = FACTORS[first], FACTORS[second]
            pairs = train.factors[first] * b + train.factors[second]
            counts = torch.bincount(pairs, minlength=a * b).double().view(a, b)
            expected = counts.sum(1, keepdim=True) * counts.sum(0) / counts.sum()
            freedom = (a - 1) * (b - 1)
            chi_square = ((counts - expected) ** 2 / expected).sum()
            assert chi_square < freedom + 4.5 * (2 * freedom) ** 0.5, (first, second)


def test_statistics_are_the_measured_ones(train):
    pixels = train.images.float() / 255
    mean, std = STATISTICS["shapes"]
    assert train.mean == mean and train.std == std
    torch.testing.assert_close(pixels.mean((0, 2, 3)), torch.tensor(mean), atol=0.005, rtol=0)
    torch.testing.assert_close(pixels.std((0, 2, 3)), torch.tensor(std), atol=0.005, rtol=0)


def nearest_neighbor_accuracy(bank, queries, k: int) -> float:
    """Weighted vote of the k most similar images by the cosine of their raw pixels."""
    first, second = (
        torch.nn.functional.normalize(s.images.flatten(1).float(), dim=1) for s in (queries, bank)
    )
    similarity, index = (first @ second.T).topk(k, dim=1)
    votes = torch.zeros(len(queries), 10)
    votes.scatter_add_(1, bank.labels[index], torch.exp(similarity / 0.1))
    return (votes.argmax(1) == queries.labels).float().mean().item()


@pytest.mark.parametrize("k", [5, 200])
def test_raw_pixels_do_not_tell_the_class(train, test, k):
    accuracy = nearest_neighbor_accuracy(train, test, k)
    assert 0.1 < accuracy < 0.3


def grid(side: int = 64) -> tuple[np.ndarray, np.ndarray]:
    axis = ((np.arange(side) + 0.5) / side * 2.4 - 1.2).astype(np.float32)
    return axis[None, None, :] + np.zeros((1, side, 1), np.float32), axis[None, :, None] + np.zeros(
        (1, 1, side), np.float32
    )


def test_figures_differ_and_fill_their_frame():
    x, y = grid()
    masks = {name: (figure(x, y) < 0)[0] for name, figure in FIGURES.items()}
    for name, mask in masks.items():
        area = mask.mean() * 2.4**2
        assert 0.8 < area < 2.6, name
        assert not mask[0].any() and not mask[-1].any(), name
        assert not mask[:, 0].any() and not mask[:, -1].any(), name
        for other in masks:
            if other != name:
                shared = (mask & masks[other]).sum() / (mask | masks[other]).sum()
                assert shared < 0.9, (name, other)


@pytest.mark.parametrize("name", FIGURES)
def test_distances_never_grow_faster_than_the_distance(name):
    # A slope above 1 would make an edge sharper than the pixels it covers.
    x, y = grid()
    distance = FIGURES[name](x, y)[0]
    step = 2.4 / 64
    for axis in (0, 1):
        assert np.abs(np.diff(distance, axis=axis)).max() <= step * 1.001
    assert (distance[0] > 0).all() and (distance[:, -1] > 0).all()


@pytest.mark.parametrize("name", PATTERNS)
def test_patterns_use_both_colors(name):
    x, y = grid()
    share = np.clip(PATTERNS[name](x, y), 0, 1)
    if name == "plain":
        assert (share == 0).all()
    else:
        assert share.min() == 0 and share.max() == 1 and 0.1 < share.mean() < 0.9


def test_specifications():
    data = load_dataset("shapes:30")
    assert len(data) == 30 and torch.equal(data.images, make_shapes(30).images)
    assert len(load_dataset("shapes:30", "test")) == 2000
    both = load_dataset("shapes:30", "all")
    assert len(both) == len(both.labels) == len(both.factors["color"]) == 2030
    assert torch.equal(both.images[30:], make_shapes(2000, "test").images)
    for bad in ("shapes:", "shapes:0", "shapes:-5", "shapes:many", "shapes:1.5"):
        with pytest.raises(DataError, match=bad):
            load_dataset(bad)


def test_errors():
    with pytest.raises(ValueError, match="number must be at least 1, got 0"):
        make_shapes(0)
    with pytest.raises(ValueError, match="split must be one of train, test, got 'val'"):
        make_shapes(3, "val")


def test_contact_sheet(tmp_path):
    image_module = pytest.importorskip("PIL.Image")
    images = make_shapes(5).images
    path = tmp_path / "sheet.png"
    contact_sheet(images, path, columns=3, enlarge=2)
    sheet = np.asarray(image_module.open(path))
    assert sheet.shape == (2 * 66 + 2, 3 * 66 + 2, 3)
    assert (sheet[2:66:2, 68:132:2] == images[1].permute(1, 2, 0).numpy()).all()
    mean, std = (0.5, 0.4, 0.3), (0.2, 0.3, 0.4)
    normalised = images.float() / 255 - torch.tensor(mean).view(3, 1, 1)
    normalised /= torch.tensor(std).view(3, 1, 1)
    contact_sheet(normalised, path, columns=3, enlarge=2, mean=mean, std=std)
    assert (np.asarray(image_module.open(path)) == sheet).all()
    with pytest.raises(ValueError, match="images must have shape"):
        contact_sheet(images[0], path)


def test_importing_softcl_does_not_import_the_data_package():
    code = "import sys, softcl; sys.exit('softcl.data' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_data_package_needs_torch_and_numpy_and_knows_no_loss():
    code = (
        "import sys, softcl.data\n"
        "sys.exit(', '.join({'PIL', 'torchvision', 'timm'} & set(sys.modules)) or 0)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
    for path in Path(softcl.data.__file__).parent.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and node.module.split(".")[0] == "softcl":
                known = node.module.startswith(("softcl.data", "softcl.kernels"))
                native = [name.name for name in node.names] == ["_C"]  # raw pointers, no loss
                assert known or native, f"{path.name}: {node.module}"
            elif isinstance(node, ast.Import):
                assert not any(name.name.startswith("softcl") for name in node.names), path.name
