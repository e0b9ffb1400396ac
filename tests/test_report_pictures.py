"""The pictures of ``python -m softcl.report``, against answers known beforehand."""

from __future__ import annotations

import html
import json
import re
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch

from softcl.data import load_dataset
from softcl.embed import main as embed
from softcl.nn import build_backbone
from softcl.report import main
from softcl.reporting import maps
from softcl.reporting.attention import class_attention, draw_attention, has_class_token
from softcl.reporting.neighbors import confusion, draw_confusion, draw_neighbors
from softcl.reporting.samples import Part, Sample, Sets, read_sets, sample_run
from softcl.reporting.views import DRAWS, IMAGES, draw_views
from softcl.train.checkpoint import Stored, load_backbone
from softcl.train.config import TrainConfig


def sample_of(query_labels: list[int], bank_labels: list[int], angles: list[list[float]]) -> Sample:
    """Rows on a circle at the angles (of queries, of the bank)."""
    parts = []
    for labels, places in zip((query_labels, bank_labels), angles, strict=True):
        turned = torch.tensor(places)
        rows = torch.stack([turned.cos(), turned.sin()], dim=1)
        shown = torch.zeros(3, 8, 8, dtype=torch.uint8)
        parts.append(Part(rows, torch.tensor(labels), lambda place, shown=shown: shown + place))
    return Sample("made", *parts, ["cat", "dog", "<owl>"], 1)


@pytest.fixture
def made() -> Sample:
    """Of 5 queries 3 have the nearest row of their class; a dog and an owl are taken for cats."""
    queries, bank = [0.0, 0.1, 1.0, 0.2, 2.0], [0.05, 1.1, 2.1]
    return sample_of([0, 0, 1, 1, 2], [0, 1, 0], [queries, bank])


def test_confusion_is_counted_by_class(made: Sample):
    assert confusion(made).tolist() == [[2, 0, 0], [1, 1, 0], [1, 0, 0]]
    figure = draw_confusion(made)
    assert "Right: 60.0% of 5" in figure.caption
    rows = re.findall("<tr><td>(.*?)</td><td>(.*?)</td><td>(.*?)</td></tr>", figure.panels[1])
    assert rows == [("dog → cat", "1", "50%"), ("&lt;owl&gt; → cat", "1", "100%")]


def test_neighbours_say_whether_the_class_is_the_same(made: Sample):
    figure = draw_neighbors(made)
    (table,) = figure.panels
    lines = [re.findall('class="(right|wrong)"', line) for line in table.split("</tr>")[1:-1]]
    # The first cat, dog and owl; nearest first.
    assert lines == [
        ["right", "wrong", "right"],
        ["right", "wrong", "wrong"],
        ["wrong", "wrong", "wrong"],
    ]
    assert "3 of 9 neighbours" in figure.caption
    assert f'title="cat, {np.cos(0.05):.2f}"' in table and "<small>&lt;owl&gt;</small>" in table


def test_attention_is_that_of_the_last_block():
    torch.manual_seed(0)
    backbone = build_backbone("moco3_vit_tiny", 16).eval()
    assert has_class_token(backbone) and not has_class_token(build_backbone("resnet_tiny", 16))
    attention, seen = backbone.blocks[-1].attn, []
    torch.nn.init.normal_(attention.qkv.weight)
    views = torch.rand(2, 3, 16, 16)
    handle = attention.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    with torch.no_grad():
        expected = backbone(views)
    handle.remove()
    found = class_attention(backbone, views)
    rows, columns = backbone.patch_embed.grid_size
    assert found.shape == (2, 3, rows, columns)
    query, key, _ = attention.qkv(seen[0]).view(2, -1, 3, 3, 64).permute(2, 0, 3, 1, 4)
    weights = (query[:, :, :1] @ key.transpose(-1, -2) / 8).softmax(-1)[:, :, 0, 1:]
    torch.testing.assert_close(found.flatten(2), weights, rtol=1e-4, atol=1e-6)
    with torch.no_grad():  # nothing is left behind
        torch.testing.assert_close(backbone(views), expected, rtol=0, atol=0)


def test_attention_is_shown_for_the_first_heads(folder: Path):
    images = load_dataset(str(folder), "test")
    config = TrainConfig.of(data=str(folder), image_size=16, arch="moco3_vit_small")
    backbone = build_backbone("moco3_vit_small", 16).eval()
    stored = Stored(Path("best.pt"), backbone, config, {})
    figure = draw_attention(stored, Sets(images, images), torch.device("cpu"))
    assert figure.panels[0].count("<img") == 6 * (1 + 1 + 6)
    assert "The first 6 of 12 heads." in figure.caption


def test_views_are_the_methods_own(whole: Path):
    config = load_backbone(whole).config
    figure = draw_views(config, read_sets(config))
    heads = re.findall("<th>(.*?)</th>", figure.panels[0])
    assert heads == ["image", *["query", "key"] * DRAWS]
    tiles = re.findall('src="(.*?)"', figure.panels[0])
    assert len(tiles) == IMAGES * len(heads) and len(set(tiles)) > IMAGES * len(heads) - 3


def test_images_are_held_out_where_there_is_no_test_set(tmp_path: Path):
    pixels = np.random.default_rng(0).integers(0, 255, (40, 8, 8, 3), dtype=np.uint8)
    np.save(tmp_path / "pixels.npy", pixels)
    config = TrainConfig.of(data=str(tmp_path / "pixels.npy"), image_size=8, arch="resnet_tiny")
    sets = read_sets(config)
    stored = Stored(Path("best.pt"), build_backbone("resnet_tiny", 8).eval(), config, {})
    sample = sample_run("run", stored, sets, torch.device("cpu"))
    shown = [part.show(0).permute(1, 2, 0).numpy() for part in (sample.queries, sample.bank)]
    assert (shown[0] == pixels[0]).all() and (shown[1] == pixels[1]).all()
    assert (len(sample.queries.rows), len(sample.bank.rows)) == (4, 36) and not sample.labelled
    assert 'class="' not in draw_neighbors(sample).panels[0].partition(">")[2]  # nor marks


# ------------------------------------------------------------------------- features in a file


@pytest.mark.parametrize("suffix", [".npz", ".safetensors"])
def test_a_file_of_features(whole: Path, folder: Path, tmp_path: Path, capsys, suffix: str):
    file, out = tmp_path / f"rows{suffix}", tmp_path / "page"
    given = ["--data", str(folder), "--device", "cpu"]
    assert embed([str(whole), *given, "--out", str(file)]) == 0
    capsys.readouterr()
    assert main([str(file), "--map", "pca", "--out", str(out)]) == 0
    assert "note" not in capsys.readouterr().out
    page = (out / "index.html").read_text()
    assert re.findall("<h3>(.*?)</h3>", page) == [
        "Nearest neighbours",
        "Confusion of classes by k-NN",
        "Map of the features",
    ]
    assert page.count("<img") == 4 * 9  # a query of each class
    assert re.search(r'title="train/class\d/\d+.png, class\d, 0.\d\d"', page)


def test_features_of_anybody(tmp_path: Path, capsys):
    rows = np.random.default_rng(0).normal(size=(40, 5)).astype(np.float32)
    names = np.array([f"<{number}>" for number in range(40)])
    np.savez(tmp_path / "own.npz", features=rows, paths=names)
    assert main([str(tmp_path / "own.npz"), "--map", "pca", "--out", str(tmp_path)]) == 0
    assert "own.npz: neighbours by name, without their images" in capsys.readouterr().out
    page = (tmp_path / "index.html").read_text()
    unit = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    cosines = unit[10] @ unit.T
    cosines[::10] = -2  # looked at, not among the neighbours
    nearest = f"{names[cosines.argmax()]}, {cosines.max():.2f}"
    line = next(line for line in page.split("<tr>") if html.escape("<10>") in line)
    assert line.index(html.escape(nearest)) < line.index("</td><td>", line.index("</td><td>") + 1)


def test_files_that_hold_no_features(tmp_path: Path, capsys):
    np.savez(tmp_path / "other.npz", numbers=np.zeros(3))
    np.savez(tmp_path / "nan.npz", features=np.full((9, 2), np.nan, np.float32))
    (tmp_path / "broken.npz").write_bytes(b"PK")
    reasons = {"other": "holds no features", "broken": "cannot be read", "nan": "not finite"}
    for name, reason in reasons.items():
        assert main([str(tmp_path / f"{name}.npz"), "--out", str(tmp_path)]) == 1
        line = capsys.readouterr().err
        assert f"{name}.npz: " in line and reason in line and len(line.splitlines()) == 1


def test_pixels_without_names_are_not_taken_for_others(tmp_path: Path, capsys):
    rows = np.random.default_rng(0).normal(size=(40, 5)).astype(np.float32)
    names = np.array(list(map(str, range(40))))
    about = np.array(json.dumps({"data": "shapes:100"}))  # 2,100 images with the test set's
    np.savez(tmp_path / "part.npz", features=rows, paths=names, metadata=about)
    assert main([str(tmp_path / "part.npz"), "--map", "none", "--out", str(tmp_path)]) == 0
    assert "without their images" in capsys.readouterr().out


# ----------------------------------------------------------------------------------------- maps


def test_umap_is_an_extra(tmp_path: Path, monkeypatch, capsys):
    np.savez(tmp_path / "rows.npz", features=np.eye(40, dtype=np.float32))
    command = [str(tmp_path / "rows.npz"), "--map", "umap", "--out", str(tmp_path)]
    monkeypatch.setattr(maps.importlib.util, "find_spec", lambda name: None)
    assert main(command) == 2
    assert 'pip install "softcl[umap]"' in capsys.readouterr().err
    monkeypatch.undo()

    class Fake:
        def __init__(self, **options: object) -> None:
            assert options["n_neighbors"] == 3 and options["random_state"] == 0

        def fit_transform(self, rows: np.ndarray) -> np.ndarray:
            return rows[:, :2]

    module = types.ModuleType("umap")
    module.UMAP = Fake
    monkeypatch.setitem(sys.modules, "umap", module)
    big = np.eye(8, dtype=np.float32)
    monkeypatch.setattr(maps, "_UMAP_NEIGHBORS", 3)
    assert (maps.project(big, "umap") == big[:, :2]).all()


@pytest.mark.parametrize("way", ["pca", "tsne"])
def test_features_that_have_collapsed_have_a_map(way: str, recwarn):
    places = maps.project(np.full((40, 3), 0.5, np.float32), way)
    assert places.shape == (40, 2) and np.isfinite(places).all()
    assert not recwarn.list


def test_classes_have_colours_of_their_own():
    for count in (3, 10, 40, 100):
        assert len(set(maps.class_tones(count))) == count
