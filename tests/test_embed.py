"""``python -m softcl.embed``: rows, neighbours and near-duplicates of a folder, in every format."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional as F

import softcl.embed
from softcl.data import center_view, load_dataset
from softcl.embed import main
from softcl.evaluation.neighbors import near_duplicates
from softcl.train.checkpoint import load_backbone


def read(file: Path) -> tuple[dict, dict]:
    """The columns and the metadata of a table, by the library that it is written for."""
    if file.suffix == ".npz":
        table = dict(np.load(file))
        return table, json.loads(str(table.pop("metadata")))
    if file.suffix == ".safetensors":
        from safetensors import safe_open

        with safe_open(file, "np") as stored:
            table = {key: stored.get_tensor(key) for key in stored.keys()}
            metadata = stored.metadata()
        table["paths"] = np.array(json.loads(bytes(table["paths"])))
        plain = ("weights", "arch", "data")
        return table, {k: v if k in plain else json.loads(v) for k, v in metadata.items()}
    parquet = pytest.importorskip("pyarrow.parquet")
    table = parquet.read_table(file)
    columns = {name: np.array(table[name].to_pylist()) for name in table.column_names}
    metadata = {k.decode(): json.loads(v) for k, v in table.schema.metadata.items()}
    return columns, metadata


def expected_rows(run: Path, folder: Path) -> tuple[torch.Tensor, torch.Tensor, list[str]]:
    """Features by the network itself, labels and paths, of the folder's training images."""
    stored, images = load_backbone(run), load_dataset(str(folder), "train")
    mean, std = stored.content["normalisation"]
    pixels = images.batch(torch.arange(len(images)))
    with torch.no_grad():
        rows = stored.backbone(center_view(pixels, 16, tuple(mean), tuple(std)))
    paths = sorted(p.relative_to(folder / "train") for p in (folder / "train").rglob("*.png"))
    return rows, images.labels, [str(path) for path in paths]


@pytest.mark.parametrize("suffix", [".npz", ".safetensors", ".parquet"])
def test_rows_paths_and_labels(whole: Path, folder: Path, tmp_path: Path, one_thread, suffix: str):
    if suffix == ".parquet":
        pytest.importorskip("pyarrow")
    file = tmp_path / f"features{suffix}"
    line = [str(whole), "--data", str(folder), "--split", "train", "--device", "cpu"]
    assert main([*line, "--out", str(file), "--batch-size", "50"]) == 0
    table, metadata = read(file)
    rows, labels, paths = expected_rows(whole, folder)
    np.testing.assert_allclose(table["features"], rows.numpy(), rtol=1e-4, atol=1e-5)
    assert table["features"].dtype == np.float32 or suffix == ".parquet"
    assert [path.split("train/")[-1] for path in table["paths"].tolist()] == paths
    assert table["labels"].tolist() == labels.tolist()
    assert metadata["classes"] == [f"class{i}" for i in range(4)]
    assert (metadata["arch"], metadata["image_size"]) == ("resnet_tiny", 16)
    assert [path.name for path in tmp_path.iterdir()] == [file.name]


def test_nearest_images_and_near_duplicates(whole: Path, folder: Path, tmp_path: Path, one_thread):
    copy, file = tmp_path / "images", tmp_path / "features.npz"
    shutil.copytree(folder / "train", copy)
    for name in ("a", "b"):
        shutil.copy(copy / "class1" / "003.png", copy / "class2" / f"{name}.png")
    line = [str(whole), "--data", str(copy), "--neighbors", "5", "--duplicates", "0.99999"]
    assert main([*line, "--device", "cpu", "--out", str(file)]) == 0
    table, _ = read(file)
    rows = F.normalize(torch.from_numpy(table["features"]).double(), dim=1)
    cosines = (rows @ rows.T).fill_diagonal_(-2)
    best = cosines.topk(5, dim=1).values
    np.testing.assert_allclose(table["similarities"], best.numpy(), atol=1e-5)
    found = cosines.gather(1, torch.from_numpy(table["neighbors"]))
    np.testing.assert_allclose(found.numpy(), best.numpy(), atol=1e-5)
    copies = [n for n, path in enumerate(table["paths"]) if path.endswith(("a.png", "b.png"))]
    original = [n for n, path in enumerate(table["paths"]) if path.endswith("class1/003.png")]
    members = np.nonzero(table["groups"] >= 0)[0].tolist()
    assert members == sorted(copies + original) and table["groups"].max() == 0
    listed = (tmp_path / "features.npz.duplicates.tsv").read_text().splitlines()
    assert listed == [f"0\t{table['paths'][n]}" for n in members]


def test_many_equal_images_are_no_neighbours_of_themselves():
    from softcl.evaluation.neighbors import nearest_of_each

    rows = np.ones((7, 4), np.float32)
    rows[0] = [1, -1, 1, -1]
    neighbors, similarities = np.zeros((7, 2), np.int64), np.zeros((7, 2), np.float32)
    nearest_of_each(rows, np.empty_like(rows), neighbors, similarities, torch.device("cpu"))
    assert not (neighbors == np.arange(7)[:, None]).any()
    assert near_duplicates(neighbors, similarities, 0.9).tolist() == [-1, 0, 0, 0, 0, 0, 0]


def test_groups_are_chains_in_the_order_of_their_rows():
    neighbors = np.array([[3], [2], [1], [4], [3], [0]])
    similarities = np.array([[0.5], [0.9], [0.9], [0.95], [0.95], [0.9]])
    groups = near_duplicates(neighbors, similarities, 0.9)
    assert groups.tolist() == [0, 1, 1, 2, 2, 0]


def test_a_stopped_command_goes_on(
    whole: Path, folder: Path, tmp_path: Path, monkeypatch, capsys, one_thread
):
    seen = []

    def stopping(images, order, *, device):
        for place, (indices, pixels) in enumerate(original(images, order, device=device)):
            if place == stop:
                raise KeyboardInterrupt
            seen.extend(indices.tolist())
            yield indices, pixels

    original, stop = softcl.embed.batches, 3
    monkeypatch.setattr(softcl.embed, "batches", stopping)
    line = [str(whole), "--data", str(folder), "--batch-size", "16", "--device", "cpu", "--out"]
    assert main([*line, str(tmp_path / "a.npz")]) == 130
    assert "softcl.embed: stopped; the same command goes on" in capsys.readouterr().err
    assert not (tmp_path / "a.npz").exists()
    stop = -1
    assert main([*line, str(tmp_path / "a.npz")]) == 0
    assert "resumed    at image 48 of 160" in capsys.readouterr().out
    assert seen == list(range(160))
    assert main([*line, str(tmp_path / "b.npz")]) == 0
    found, expected = read(tmp_path / "a.npz")[0], read(tmp_path / "b.npz")[0]
    for name, column in expected.items():
        assert np.array_equal(found[name], column), name
    # What another network left is not gone on from.
    stop = 2
    assert main([*line, str(tmp_path / "c.npz"), "--network", "teacher"]) == 130
    stop = -1
    assert main([*line, str(tmp_path / "c.npz")]) == 0
    assert np.array_equal(read(tmp_path / "c.npz")[0]["features"], expected["features"])


def test_an_unreadable_image_has_no_row(whole: Path, folder: Path, tmp_path: Path, one_thread):
    copy, file = tmp_path / "images", tmp_path / "features.npz"
    shutil.copytree(folder, copy)
    (copy / "train" / "class0" / "001.png").write_bytes(b"nothing")
    line = [str(whole), "--data", str(copy), "--device", "cpu", "--batch-size", "16"]
    assert main([*line, "--out", str(file)]) == 0
    table, _ = read(file)
    assert len(table["features"]) == len(table["paths"]) == len(table["labels"]) == 159
    assert not [path for path in table["paths"] if path.endswith("train/class0/001.png")]
    rows, _, paths = expected_rows(whole, folder)
    at = [path.split("train/")[-1] for path in table["paths"].tolist()].index("class0/002.png")
    expected = rows[paths.index("class0/002.png")].numpy()
    np.testing.assert_allclose(table["features"][at], expected, rtol=1e-4, atol=1e-5)


def test_one_command_at_a_time_writes_a_file(whole: Path, folder: Path, tmp_path: Path, capsys):
    from filelock import FileLock

    (tmp_path / "a.npz.parts").mkdir()
    line = [str(whole), "--data", str(folder), "--device", "cpu", "--out", str(tmp_path / "a.npz")]
    with FileLock(tmp_path / "a.npz.parts" / ".lock"):
        assert main(line) == 1
    assert capsys.readouterr().err.endswith("a.npz.parts: another process writes there\n")
    assert main(line) == 0


def test_features_that_are_not_finite_are_refused(
    whole: Path, folder: Path, tmp_path: Path, capsys
):
    weights = load_backbone(whole).backbone.state_dict()
    weights["bn1.weight"][3] = float("nan")
    torch.save(weights, tmp_path / "a.pth")
    line = [str(tmp_path / "a.pth"), "--data", str(folder), "--image-size", "16"]
    assert main([*line, "--device", "cpu", "--out", str(tmp_path / "a.npz")]) == 1
    assert "a.pth: gives features that are not finite, of images 0 and" in capsys.readouterr().err


def test_wrong_calls_are_one_line(whole: Path, folder: Path, tmp_path: Path, capsys):
    run, data, out = str(whole), str(folder), str(tmp_path / "x.npz")
    for line, message, code in (
        ([run, "--data", data], "required: --out", 2),
        ([run, "--data", data, "--out", "x.csv"], "--out x.csv: must end with .npz, .safeten", 2),
        ([run, "--data", data, "--out", out, "--neighbors", "160"], "--neighbors 160: there", 2),
        ([run, "--data", data, "--out", out, "--duplicates", "2"], "--duplicates 2.0: must be", 2),
        ([run, "--data", "nowhere", "--out", out], "nowhere: no such file or folder", 1),
        (["nowhere.pth", "--data", data, "--out", out], "nowhere.pth: cannot read: No such", 1),
        ([run, "--data", data, "--out", "no/x.npz"], "no/x.npz: No such file", 1),
        ([run, "--data", data, "--out", out, "--arch", "resnet18"], "not the weights of resn", 1),
    ):
        assert main([*line, "--device", "cpu"]) == code, line
        error = capsys.readouterr().err.splitlines()
        assert message in error[0] and len(error) == code, (line, error)
    assert list(tmp_path.iterdir()) == []
