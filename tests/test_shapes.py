"""The generated set: reproducible, balanced, not easy for raw pixels; and what `data` imports."""

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
from softcl.data.shapes import CLASSES, FIGURES, PATTERNS, render


@pytest.fixture(scope="module")
def train():
    return make_shapes(4000)


def test_form(train):
    assert train.images.shape == (4000, 3, 32, 32) and train.images.dtype == torch.uint8
    assert train.resident and len(train) == 4000
    assert train.labels.dtype == torch.int64 and train.classes == CLASSES and len(CLASSES) == 10
    assert (torch.bincount(train.labels) == 400).all()
    mean, std = STATISTICS["shapes"]
    assert train.mean == mean and train.std == std
    pixels = train.images.float() / 255
    torch.testing.assert_close(pixels.mean((0, 2, 3)), torch.tensor(mean), atol=0.005, rtol=0)
    torch.testing.assert_close(pixels.std((0, 2, 3)), torch.tensor(std), atol=0.005, rtol=0)


def test_an_image_does_not_depend_on_the_size_of_the_set(train):
    for number in (1, 7, 600):
        part = make_shapes(number)
        assert torch.equal(part.images, train.images[:number])
        assert torch.equal(part.labels, train.labels[:number])
    index = np.array([3321, 17, 3999])
    assert torch.equal(torch.from_numpy(render(0, "train", index)), train.images[index])


def test_splits_and_seeds_share_no_image(train):
    def set_of(images: torch.Tensor) -> set[bytes]:
        return {image.numpy().tobytes() for image in images}

    training = set_of(train.images)
    assert len(training) == 4000
    assert not training & set_of(make_shapes(500, "test").images)
    assert not training & set_of(make_shapes(500, seed=1).images)


def test_the_pixels_are_those_written_down(train):
    # The last digit of a cosine may differ from machine to machine, and so a pixel by one level.
    means = train.images[:4].double().mean((1, 2, 3))
    torch.testing.assert_close(means, torch.tensor(MEANS, dtype=torch.float64), atol=0.01, rtol=0)


MEANS = [122.1546, 122.1904, 102.8799, 128.2048]


def test_raw_pixels_do_not_tell_the_class(train):
    """By a weighted vote of the k most similar images, by the cosine of their pixels."""
    test = make_shapes(1000, "test")
    first, second = (
        torch.nn.functional.normalize(s.images.flatten(1).float(), dim=1) for s in (test, train)
    )
    for k in (5, 200):
        similarity, index = (first @ second.T).topk(k, dim=1)
        votes = torch.zeros(len(test), 10)
        votes.scatter_add_(1, train.labels[index], torch.exp(similarity / 0.1))
        assert 0.1 < float((votes.argmax(1) == test.labels).float().mean()) < 0.3


def grid(side: int = 64) -> tuple[np.ndarray, np.ndarray]:
    axis = ((np.arange(side) + 0.5) / side * 2.4 - 1.2).astype(np.float32)
    x, y = np.meshgrid(axis, axis)
    return x[None], y[None]


def test_figures_differ_and_fill_their_frame():
    distances = {name: figure(*grid())[0] for name, figure in FIGURES.items()}
    for name, distance in distances.items():
        # A slope above 1 would make an edge sharper than the pixels it covers.
        assert all(np.abs(np.diff(distance, axis=k)).max() <= 2.4 / 64 * 1.001 for k in (0, 1))
        mask = distance < 0
        assert 0.8 < mask.mean() * 2.4**2 < 2.6, name
        assert not mask[[0, -1]].any() and not mask[:, [0, -1]].any(), name
        for other in distances:
            shared = (mask & (distances[other] < 0)).sum() / (mask | (distances[other] < 0)).sum()
            assert (shared < 0.9) == (other != name), (name, other)


def test_patterns_use_both_colors():
    for name, pattern in PATTERNS.items():
        share = np.clip(pattern(*grid()), 0, 1)
        if name == "plain":
            assert (share == 0).all()
        else:
            assert share.min() == 0 and share.max() == 1 and 0.1 < share.mean() < 0.9, name


def test_specifications_and_errors():
    data = load_dataset("shapes:30")
    assert len(data) == 30 and torch.equal(data.images, make_shapes(30).images)
    test, both = load_dataset("shapes:30", "test"), load_dataset("shapes:30", "all")
    assert len(test) == 2000 and len(both) == len(both.labels) == 2030
    assert torch.equal(both.images[30:], test.images)
    for bad in ("shapes:", "shapes:0", "shapes:-5", "shapes:many", "shapes:1.5"):
        with pytest.raises(DataError, match=bad):
            load_dataset(bad)
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


def test_the_data_package_needs_torch_and_numpy_and_knows_no_loss():
    code = (
        "import sys, softcl\n"
        "assert 'softcl.data' not in sys.modules\n"
        "import softcl.data\n"
        "sys.exit(', '.join({'PIL', 'torchvision', 'timm', 'pyarrow'} & set(sys.modules)) or 0)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
    for path in Path(softcl.data.__file__).parent.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and node.module.split(".")[0] == "softcl":
                # Beside itself what knows no loss: pointers, verdicts, copies, files, errors.
                known = "data kernels errors files memory native trust __version__".split()
                parts = {*node.module.split(".")[1:2]} or {name.name for name in node.names}
                assert parts <= set(known), f"{path.name}: {node.module}"
            elif isinstance(node, ast.Import):
                assert not any(name.name.startswith("softcl") for name in node.names), path.name
