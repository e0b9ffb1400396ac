"""`softcl.train.fit` with the caller's own networks, data and functions."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from softcl import errors
from softcl.data import ImageSet, image_set_of
from softcl.train import Moment, fit
from softcl.train.checkpoint import load_backbone
from softcl.train.folder import read_metrics

NUMBERS = dict(
    epochs=2, batch_size=16, queue_size=32, num_splits=1, projection_dim=8, projector_hidden=16,
    device="cpu",
)  # fmt: skip


def network() -> nn.Module:
    torch.manual_seed(3)
    layers = nn.Conv2d(3, 8, 3, 2, 1, bias=False), nn.BatchNorm2d(8), nn.ReLU()
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten())


def pixels(count: int = 64, side: int = 16) -> np.ndarray:
    """(M, H, W, 3), with a bright row at the top in every second image."""
    images = np.random.default_rng(0).integers(0, 100, (count, side, side, 3), dtype=np.uint8)
    images[::2, :4] = 255
    return images


class Items:
    """A data set of given items; an exception among them is raised."""

    def __init__(self, items: list) -> None:
        self.items = items

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int):
        item = self.items[index]
        if isinstance(item, Exception):
            raise item
        return item


@pytest.fixture(autouse=True)
def own_folder(tmp_path: Path, monkeypatch, one_thread) -> None:
    monkeypatch.chdir(tmp_path)


def weights_of(module: nn.Module) -> list[Tensor]:
    return list(module.state_dict().values())


def assert_same(one: nn.Module, other: nn.Module) -> None:
    for a, b in zip(weights_of(one), weights_of(other), strict=True):
        assert torch.equal(a, b)


def test_a_module_is_trained_in_a_copy_and_comes_back():
    own, moments = network(), []
    images = torch.from_numpy(pixels().transpose(0, 3, 1, 2).copy())
    run = fit(
        data=images, backbone=own, **NUMBERS, out="run",
        on_step=lambda m: moments.append((m.step, m.loss)),
        on_epoch=lambda m: moments.append((m.epoch, m.measures["query_spread"])),
    )  # fmt: skip
    assert_same(own, network())
    assert type(run.backbone) is nn.Sequential and not run.backbone.training
    assert not torch.equal(run.backbone[0].weight, own[0].weight)
    assert run.backbone(torch.zeros(1, 3, 16, 16)).shape == (1, 8)
    assert run.folder == Path("run") and run.exit_code == 0 and run.knn is None
    assert run.history == read_metrics(Path("run/metrics.jsonl"))
    assert [place for place, _ in moments] == [1, 2, 3, 4, 1.0, 5, 6, 7, 8, 2.0]
    steps = [loss for place, loss in moments if isinstance(place, int)]
    assert steps == pytest.approx([row["loss"] for row in run.history if "loss" in row])


def test_an_image_set_and_a_data_set_of_its_images_train_alike():
    """With labels, so that there is a k-NN; and as the command would from a name."""
    labels = torch.arange(64) % 2
    half, images = (0.485, 0.456, 0.406), pixels()
    given = ImageSet(
        torch.from_numpy(images.transpose(0, 3, 1, 2).copy()), labels, ["0", "1"],
        half, (0.229, 0.224, 0.225), "given",
    )  # fmt: skip
    one = fit(data=given, backbone=network(), **NUMBERS)
    items = [
        (Image.fromarray(image), int(label)) for image, label in zip(images, labels, strict=True)
    ]
    two = fit(data=Items(items), eval_data=given, backbone=network(), **NUMBERS)
    assert one.knn is not None and two.knn is not None and one.folder != two.folder
    assert two.knn == two.result["knn_top1"]
    assert_same(one.backbone, two.backbone)
    assert given.images.shape == (64, 3, 16, 16) and given.files is None


def test_a_name_is_a_backbone_too(folder: Path):
    run = fit(data=folder, backbone="resnet_tiny", **NUMBERS)
    assert run.result["step"] == 16 and run.backbone.num_features == 192
    assert fit(resume=run.folder).backbone.num_features == 192


def test_a_function_that_raises_leaves_a_run_to_go_on_with():
    whole = fit(data=pixels(), backbone=network(), **NUMBERS)

    def stumble(moment: Moment) -> None:
        moment.backbone.eval()
        if moment.step == 3:
            raise KeyError("oh")

    with pytest.raises(errors.CallbackError) as refusal:
        fit(data=pixels(), backbone=network(), **NUMBERS, out="run", on_step=stumble)
    assert str(refusal.value).startswith("on_step raised KeyError: 'oh', after step 3; the last ")
    assert "last.pt, of step 3" in str(refusal.value) and "\n" not in str(refusal.value)
    assert isinstance(refusal.value.__cause__, KeyError)
    with pytest.raises(errors.ConfigError, match=r"data=<ndarray> \(--data\): was an object"):
        fit(resume="run")
    with pytest.raises(errors.ConfigError, match=r"backbone=<Sequential> \(--arch\): was an obj"):
        fit(resume="run", data=pixels())
    with pytest.raises(errors.DataError, match="not the images that run was trained on"):
        fit(resume="run", data=pixels(48), backbone=network())
    with pytest.raises(errors.CheckpointError, match="its backbone <Sequential> was a module"):
        load_backbone(Path("run"))
    run = fit(resume="run", data=pixels(), backbone=network())
    assert_same(run.backbone, whole.backbone)
    again = fit(resume="run", data=pixels(), backbone=network())  # finished: only read
    assert_same(again.backbone, whole.backbone)
    assert again.history == run.history


def test_an_interrupt_saves_and_a_second_one_raises(capsys):
    def interrupt(moment: Moment) -> None:
        if moment.step == 2:
            os.kill(os.getpid(), signal.SIGINT)

    before = signal.getsignal(signal.SIGINT)
    run = fit(data=pixels(), backbone=network(), **NUMBERS, out="run", on_step=interrupt)
    assert run.exit_code == 130 and run.result is None and signal.getsignal(signal.SIGINT) is before
    assert "go on with: softcl.train.fit(resume='run', ...)" in capsys.readouterr().out
    assert [row["step"] for row in run.history] == [1, 2] and run.backbone is not None

    def twice(moment: Moment) -> None:
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        fit(resume="run", data=pixels(), backbone=network(), on_step=twice)
    assert signal.getsignal(signal.SIGINT) is before


MAPS = nn.Conv2d(3, 8, 3)


class Pair(nn.Module):
    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        return images, images


WRONG = [
    (dict(backbone=MAPS), r"backbone=<Conv2d> \(--arch\): gives \(2, 8, 14, 14\) for two images"),
    (dict(backbone=Pair()), r"backbone=<Pair> \(--arch\): gives a tuple; it must give one tensor"),
    (dict(backbone=nn.Linear(4, 4)), r"<Linear> .*: cannot take 16 px images: RuntimeError: mat1"),
    (dict(backbone=7), r"backbone=7 \(--arch\): must be a name or a torch.nn.Module"),
    (dict(backbone="resnet_tiny", arch="resnet18"), "give one"),
    (dict(on_step="print"), r"on_step='print' .*: must be a function of one argument"),
    (dict(epoch=3), r"epoch=3 \(--epoch\): unknown setting; did you mean epochs\?"),
    (dict(batch_size=400), r"batch_size=400 \(--batch-size\): larger than the data"),
    (dict(split="train"), r"split=train .*: does not apply to data that is given as an object"),
    (dict(data=Items([])), "<Items>: holds no images"),
    (dict(data=Items([3] * 64)), "<Items>: item 0 cannot be read: an item is a int, not an image"),
    (dict(data=Items([torch.randn(3, 16, 16)] * 64)), "before any normalisation"),
    (dict(data=Items([pixels(1)[0]] * 60 + [ValueError("a\nb")] * 4)), "4 of 64 images cannot be"),
    (dict(data=iter([1])), "<list_iterator>: must be a path, uint8 images, an ImageSet, or a data"),
    (dict(data=torch.zeros(64, 3, 16, 16)), r"<Tensor>: images must be uint8 of shape \(M, 3, H,"),
    (dict(data="nowhere", backbone=None), "nowhere"),
    (dict(out="/proc/none/run"), "/proc/none"),
]


@pytest.mark.parametrize(("given", "message"), WRONG)
def test_what_cannot_be_used_is_refused_in_one_line(given: dict, message: str, tmp_path: Path):
    with pytest.raises(errors.SoftclError, match=message) as refusal:
        fit(**{"data": pixels(), "backbone": network(), **NUMBERS, **given})
    assert "\n" not in str(refusal.value)
    assert list(tmp_path.iterdir()) == []


# ---- image sets of objects ----


@pytest.mark.parametrize(
    "item",
    [
        lambda image: image,
        lambda image: torch.from_numpy(image).permute(2, 0, 1),
        lambda image: torch.from_numpy(image).permute(2, 0, 1) / 255,  # torchvision's ToTensor
        lambda image: Image.fromarray(image),
        lambda image: {"image": Image.fromarray(image), "label": np.int64(1)},
        lambda image: (Image.fromarray(image).convert("RGBA"), torch.tensor(1)),
    ],
)
def test_items_of_every_kind_are_the_same_pixels(item):
    images = pixels(4)
    made = image_set_of(Items([item(image) for image in images]))
    assert torch.equal(made.images, torch.from_numpy(images).permute(0, 3, 1, 2))
    with_labels = isinstance(item(images[0]), (dict, tuple))
    assert (made.labels is not None) == with_labels


def test_items_of_many_sizes_are_cropped_from_whole_images():
    sizes = [(40, 60), (30, 30), (80, 50)]
    made = image_set_of(Items([np.zeros((*size, 3), np.uint8) for size in sizes]), image_size=24)
    assert made.images.shape == (3, 3, 24, 24) and made.files is not None
    assert made.labels is None and made.classes == []


def test_labels_that_a_data_set_lists_are_not_read_from_its_items():
    data = Items([pixels(1)[0]] * 4)
    data.targets, data.classes = [0, 1, 1, 0], ["cat", "dog"]
    made = image_set_of(data)
    assert made.labels.tolist() == [0, 1, 1, 0] and made.classes == ["cat", "dog"]


def test_one_unreadable_item_in_a_hundred_is_left_out():
    items = [(image, number % 3) for number, image in enumerate(pixels(120))]
    items[7] = OSError("torn")
    made = image_set_of(Items(items))
    assert len(made) == 119 and made.skipped == ["item 7: OSError: torn"]
    assert made.labels.tolist() == [n % 3 for n in range(120) if n != 7]


# ---- README ----


def test_the_lines_of_the_readme_run(folder: Path, capsys):
    pytest.importorskip("torchvision")
    text = (Path(__file__).parent.parent / "docs" / "training.md").read_text()
    code = text.partition("## From Python")[2].partition("```python\n")[2].partition("```")[0]
    assert "fit(" in code and "epochs=50," in code
    short = "epochs=1, batch_size=32, queue_size=64, num_splits=1, device='cpu',"
    Path("photos").symlink_to(folder / "train")
    names: dict = {}
    exec(code.replace("epochs=50,", short), names)
    assert names["features"](torch.zeros(1, 3, 16, 16)).shape == (1, 512)
    assert names["run"].knn is not None and "\n1.0 " in capsys.readouterr().out
