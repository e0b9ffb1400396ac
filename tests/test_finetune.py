"""``python -m softcl.finetune``: which labels are taken, what is trained, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from softcl import finetune
from softcl.data import ImageSet, batch_indices, load_dataset, make_shapes
from softcl.errors import DataError
from softcl.evaluation.subsets import choose, hold_out, read_amount
from softcl.finetune import Rates, Task, main
from softcl.train.weights import load_pretrained

SHORT = ["--epochs", "2", "--device", "cpu"]


def labelled(counts: list[int]) -> ImageSet:
    """A set with so many images of each class, in turn."""
    labels = torch.cat([torch.full((n,), label) for label, n in enumerate(counts)])
    labels = labels[torch.randperm(len(labels), generator=torch.Generator().manual_seed(1))]
    images = torch.zeros(len(labels), 3, 8, 8, dtype=torch.uint8)
    names = [f"c{label}" for label in range(len(counts))]
    return ImageSet(images, labels, names, (0.5,) * 3, (0.2,) * 3, "set")


# ---- Subsets ----


def test_a_share_is_balanced_nested_and_one_at_least():
    images = labelled([200, 100, 30])
    one, ten = (choose(images, read_amount(text), seed=0) for text in ("1%", "10%"))
    assert images.labels[ten].bincount().tolist() == [20, 10, 3]
    assert images.labels[one].bincount().tolist() == [2, 1, 1]
    assert set(one.tolist()) < set(ten.tolist()) and ten.tolist() == sorted(ten.tolist())
    assert not torch.equal(choose(images, read_amount("10%"), seed=1), ten)
    assert len(choose(images, read_amount("100%"), seed=0)) == 330


def test_a_subset_is_the_same_on_every_machine():
    """These numbers must never change: others name their subsets by them."""
    images = labelled([20, 20])
    images.labels = torch.arange(40) % 2
    assert choose(images, read_amount("2-per-class"), seed=0).tolist() == [19, 32, 38, 39]


def test_a_class_without_images_or_with_too_few_is_named():
    with pytest.raises(DataError, match="class 'c1' has 3 images, not 5"):
        choose(labelled([9, 3]), read_amount("5-per-class"), seed=0)
    with pytest.raises(DataError, match="no image of class 'c1'"):
        choose(labelled([9, 0]), read_amount("50%"), seed=0)


def test_a_list_is_read_back(folder: Path, tmp_path: Path):
    images, file = load_dataset(str(folder), "train"), tmp_path / "labels.txt"
    chosen = choose(images, read_amount("10%"), seed=0)
    names = [images.names[place] for place in chosen.tolist()]
    assert all((folder / "train" / name).exists() or (folder / name).exists() for name in names)
    file.write_text("".join(f"{name}\n" for name in reversed(names)))
    assert torch.equal(choose(images, read_amount(str(file)), seed=5), chosen)
    file.write_text("nowhere.png\n")
    with pytest.raises(DataError, match="lists 'nowhere.png'"):
        choose(images, read_amount(str(file)), seed=0)


def test_held_out_labels_are_of_every_class():
    labels = labelled([2, 10, 40]).labels
    rest, held = hold_out(labels, 0.2, seed=0)
    assert sorted([*rest.tolist(), *held.tolist()]) == list(range(52))
    assert labels[held].bincount().tolist() == [1, 2, 8]
    with pytest.raises(ValueError, match="two images or more"):
        hold_out(torch.tensor([0, 1, 1]), 0.2, seed=0)


# ---- Training ----


def small_task(batch_size: int = 8) -> Task:
    part = make_shapes(40)
    return Task(part, part, 32, 1.0, batch_size, torch.device("cpu"), 0)


class Tiny(nn.Module):
    num_features = 4

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 4)

    def forward(self, images):
        return self.layer(images.mean((2, 3)))


def test_steps_are_those_of_sgd_with_two_rates(monkeypatch, one_thread):
    """Against the recipe written out: Nesterov momentum, no decay, rates divided by 5 twice."""
    task = small_task(20)
    seen = []
    real = finetune.labelled_views

    def kept(*arguments):
        for views, labels in real(*arguments):
            seen.append((views, labels))
            yield views, labels

    monkeypatch.setattr(finetune, "labelled_views", kept)
    torch.manual_seed(0)
    network = finetune.Network(Tiny(), 10)
    start = {name: value.clone().double() for name, value in network.state_dict().items()}
    order = [batch_indices(40, 20, 0, *divmod(step, 2)) for step in range(10)]
    finetune.train(network, task, Rates(0.3, 0.7, epochs=5))
    values = {name: value.requires_grad_() for name, value in start.items()}
    momentum = {name: 0.0 for name in values}
    for step, indices in enumerate(order):
        views, labels = seen[step]
        assert torch.equal(labels, task.train.labels[indices])
        x = views.double().mean((2, 3)) @ values["backbone.layer.weight"].T
        scores = (x + values["backbone.layer.bias"]) @ values["head.weight"].T + values["head.bias"]
        loss = F.cross_entropy(scores, labels)
        gradients = torch.autograd.grad(loss, list(values.values()))
        drop = 0.2 ** ((step // 2 >= 3) + (step // 2 >= 4))
        with torch.no_grad():
            for (name, value), g in zip(values.items(), gradients, strict=True):
                momentum[name] = 0.9 * momentum[name] + g
                value -= (0.7 if "head" in name else 0.3) * drop * (g + 0.9 * momentum[name])
    for name, value in network.state_dict().items():
        assert torch.allclose(value.double(), values[name], atol=1e-5), name


def test_top1_and_top5_by_hand(one_thread):
    class Known(nn.Module):
        def forward(self, images):
            scores = torch.zeros(len(images), 10)
            scores[:, :5] = torch.tensor([5.0, 4.0, 3.0, 2.0, 1.0])
            return scores

    task = small_task()
    found = finetune.judge(Known(), task.test, task)
    labels = task.test.labels
    assert found["top1"] == pytest.approx(float((labels == 0).float().mean()))
    assert found["top5"] == pytest.approx(float((labels < 5).float().mean()))


# ---- The command ----


def test_a_run_beside_random_weights(whole: Path, folder: Path, tmp_path: Path, capsys, one_thread):
    out, saved, listed = (tmp_path / name for name in ("ft.json", "ft.safetensors", "labels.txt"))
    line = [str(whole), "--data", str(folder), "--labels", "8-per-class", *SHORT]
    files = ["--out", str(out), "--save", str(saved), "--write-labels", str(listed)]
    assert main([*line, *files]) == 0
    first = json.loads(out.read_text())
    assert [row["weights"] for row in first["results"]] == [str(whole), "random"]
    assert first["images"] == 32 and len(listed.read_text().splitlines()) == 32
    assert all(0.0 <= row["top1"] <= 1.0 and "top5" not in row for row in first["results"])
    assert f"{whole}: top-1 {first['results'][0]['top1']:.2%}" in capsys.readouterr().out
    # The same again, from the list that was written, to the last bit.
    again = tmp_path / "again.json"
    line[4] = str(listed)
    assert main([*line, "--no-random", "--out", str(again)]) == 0
    repeated = json.loads(again.read_text())["results"][0]
    assert repeated["train_loss"] == first["results"][0]["train_loss"]
    # What was saved is a backbone for --init.
    loaded = load_pretrained(str(saved))
    assert set(loaded.unused) == {"head.weight", "head.bias"} and not loaded.missing
    run = load_pretrained(str(whole)).backbone.state_dict()
    changed = [k for k, v in loaded.backbone.state_dict().items() if not torch.equal(v, run[k])]
    assert "conv1.weight" in changed


@pytest.mark.parametrize(
    ("amount", "told"),
    [
        ("1%", "labels     1% is less than one image of 4 of 4 classes; one of each is taken"),
        ("10%", None),
        ("1-per-class", None),
    ],
)
def test_a_share_below_one_image_is_told(whole, folder, capsys, one_thread, amount, told):
    line = [str(whole), "--data", str(folder), "--labels", amount, "--no-random", *SHORT]
    assert main(line) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [x for x in lines if x.startswith("labels ")] == ([told] if told else [])


def test_the_line_of_the_page_runs(whole, folder, tmp_path, monkeypatch, one_thread):
    text = (
        (Path(__file__).parent.parent / "docs" / "training.md")
        .read_text()
        .partition("## Few labels")[2]
    )
    line = next(x for x in text.splitlines() if "softcl.finetune runs/NAME" in x).split()[3:]
    line[line.index("runs/NAME")], line[line.index("shapes")] = str(whole), str(folder)
    monkeypatch.chdir(tmp_path)
    assert main([*line, *SHORT]) == 0
    assert len((tmp_path / "labels.txt").read_text().splitlines()) == 12  # 3 of 32 in 4 classes
    assert len(json.loads((tmp_path / "scores.json").read_text())["results"]) == 2


def test_sweep_chooses_on_held_out_labels(whole, folder, tmp_path, monkeypatch, one_thread):
    monkeypatch.setattr(finetune, "SWEPT_RATES", (1e-9, 0.05))
    monkeypatch.setattr(finetune, "SWEPT_EPOCHS", (6,))
    out = tmp_path / "ft.json"
    line = [str(whole), "--data", str(folder), "--labels", "16-per-class", "--sweep", "--no-random"]
    assert main([*line, "--device", "cpu", "--out", str(out)]) == 0
    (row,) = json.loads(out.read_text())["results"]
    tried = {pair["backbone"]: pair["held_out_top1"] for pair in row["sweep"]}
    assert set(tried) == {1e-9, 0.05}
    assert tried[row["rates"]["backbone"]] == max(tried.values())


@pytest.mark.parametrize(
    ("flags", "code", "message"),
    [
        (["--labels", "0%"], 2, "--labels 0%: must be a share"),
        (["--labels", "none.txt"], 2, "--labels none.txt: must be a share"),
        (["--labels", "99-per-class"], 1, "--labels"),
        (["--sweep", "--lr-head", "1"], 2, "--lr-head 1.0: is what --sweep chooses"),
        (["--labels", "1-per-class", "--sweep"], 1, "each class needs two images or more"),
        (["--labels", "8-per-class", "--batch-size", "33"], 2, "larger than the 32 images"),
        (["--lr-backbone", "1e30", "--labels", "100%"], 1, "try lower rates"),
    ],
)
def test_refusals_in_one_line(whole, folder, capsys, one_thread, flags, code, message):
    assert (
        main([str(whole), "--data", str(folder), "--no-random", "--device", "cpu", *flags]) == code
    )
    error = capsys.readouterr().err.splitlines()
    assert message in error[0] and len(error) == (2 if code == 2 else 1)


def test_images_without_labels_are_refused(whole, folder, tmp_path, capsys):
    for file in (folder / "train" / "class0").glob("*.png"):
        (tmp_path / file.name).write_bytes(file.read_bytes())
    assert main([str(whole), "--data", str(tmp_path), "--device", "cpu"]) == 1
    assert "no labels" in capsys.readouterr().err
