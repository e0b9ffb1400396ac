"""The list of a set's images: few bytes for each, kept, and never stale."""

from __future__ import annotations

import io
import os
import shutil
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import torch
from kept_sets import entries, fails, read, tar_of

from softcl.data import batch_indices, cache, columns, packed
from softcl.data import folder as folder_format

Image = pytest.importorskip("PIL.Image")


@pytest.fixture(autouse=True)
def settled(monkeypatch):
    """Files that were written a moment ago may be kept."""
    monkeypatch.setattr(cache, "SETTLED", 0.0)


@pytest.fixture
def images(folder: Path, tmp_path: Path) -> Path:
    """A copy that a test may change."""
    return shutil.copytree(folder, tmp_path / "images")


@pytest.mark.parametrize("kind", ["folder", "tar"])
def test_a_kept_listing_is_the_same(kind, images, tmp_path, monkeypatch):
    if kind == "tar":
        images = tar_of(tmp_path / "shards", 3, 20)
    fresh = read(images, "off", memory_limit=0)
    read(images, tmp_path / "kept", memory_limit=0)
    monkeypatch.setattr(packed, "_containers", fails)
    monkeypatch.setattr(folder_format, "walk", fails)
    found = read(images, tmp_path / "kept", memory_limit=0)
    rows = torch.arange(len(fresh))
    assert torch.equal(fresh.batch(rows), found.batch(rows))
    assert torch.equal(fresh.labels, found.labels) and fresh.classes == found.classes
    assert list(fresh.images.listing.files) == list(found.images.listing.files)


@pytest.mark.parametrize("change", ["folder", "table", "shard", "shards", "link"])
def test_a_listing_that_changed_is_made_again(change, images, tmp_path):
    kept = tmp_path / "kept"
    rows = "file_name,label\ntrain/class0/003.png,1\ntrain/class0/004.png,2\n"
    if change in ("shard", "shards"):
        images = tar_of(tmp_path / "shards", 2, 4)
    if change == "table":
        (images / "metadata.csv").write_text(rows)
    if change == "link":
        (images / "train" / "class0" / "link.png").symlink_to(tmp_path / "target.png")
    read(images, kept, memory_limit=0)
    if change == "folder":
        shutil.copytree(images / "train" / "class0", images / "train" / "new" / "below")
    elif change == "table":
        (images / "metadata.csv").write_text(rows.replace("004", "005"))
    elif change == "link":
        shutil.copy(images / "train" / "class0" / "003.png", tmp_path / "target.png")
    elif change == "shards":
        shutil.copy(images / "train-00.tar", images / "train-02.tar")
    else:
        other = tar_of(tmp_path / "other", 2, 5)
        (images / "train-01.tar").write_bytes((other / "train-01.tar").read_bytes())
    again, fresh = read(images, kept, memory_limit=0), read(images, "off", memory_limit=0)
    assert list(again.images.listing.files) == list(fresh.images.listing.files)
    assert torch.equal(again.labels, fresh.labels) and again.notes == fresh.notes


def test_a_listing_that_names_no_sources_is_not_kept(images, tmp_path, monkeypatch):
    real = folder_format.walk
    monkeypatch.setattr(folder_format, "walk", lambda *given: real(*given[:4]))
    read(images, tmp_path / "kept", memory_limit=0)
    assert not entries(tmp_path / "kept", "index")


def test_the_same_folder_by_another_relative_path(images, tmp_path, monkeypatch):
    for place in (images.parent, images, images / "train"):
        monkeypatch.chdir(place)
        found = read(Path(os.path.relpath(images)), tmp_path / "kept", memory_limit=0)
        assert len(found.batch(torch.arange(4))) == 4 and not found.skipped


@pytest.mark.parametrize("kind", ["folder", "tar"])
def test_a_listing_takes_few_bytes_an_image(kind, tmp_path):
    """Of sets of two sizes the difference: the rest is the same for all."""

    def most(shards: int) -> int:
        root = tar_of(tmp_path / f"{shards}", shards, 500)
        if kind == "folder":
            for shard in root.glob("*.tar"):
                (root / "images" / shard.stem).mkdir(parents=True)
                for number in range(500):
                    (root / "images" / shard.stem / f"{number:05d}.ppm").touch()
            root = root / "images"
        list_them = packed.list_tar if kind == "tar" else folder_format.list_folder
        tracemalloc.start()
        listing = list_them(root)
        taken = listing.only(np.arange(0, len(listing.files), 2))
        used = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert 2 * len(taken.files) == len(listing.files) == 500 * shards
        return used

    most(1)
    assert (most(9) - most(3)) / 3000 < 150


def test_groups_of_parquet_rows_are_shards(tmp_path, monkeypatch):
    """In their order each group is read once or little more; in an exact one nearly every time."""
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    file = io.BytesIO()
    Image.new("RGB", (4, 4)).save(file, "PPM")
    table = pyarrow.table({"image": [file.getvalue()] * 1000})
    for number in range(2):
        parquet.write_table(table, tmp_path / f"train-{number}.parquet", row_group_size=20)
    found = read(tmp_path, tmp_path / "kept", memory_limit=0, workers=0)
    found = read(tmp_path, tmp_path / "kept", memory_limit=0, workers=0)
    assert found.listing.shards() == tuple(range(0, 2000, 20))
    calls, real = [], parquet.ParquetFile.read_row_group
    counted = lambda self, *given, **more: calls.append(1) or real(self, *given, **more)  # noqa: E731
    monkeypatch.setattr(parquet.ParquetFile, "read_row_group", counted)
    found.batch(batch_indices(2000, 2000, 0, 0, 0, found.listing.shards()))
    assert 80 < len(calls) < 150  # a few are still held
    calls.clear()
    found.batch(batch_indices(2000, 2000, 0, 0, 0))
    assert len(calls) > 1500


def test_columns_hold_any_names_and_words():
    names = ["a", "", "é" * 300, "\udcff.png", "b/c"]
    column = columns.Names.of(names)
    assert list(column) == names and [column[i] for i in range(5)] == names
    taken = column.take(np.array([3, 1, 3]))
    assert list(taken) == [names[3], names[1], names[3]] and len(taken) == 3
    assert list(columns.Names.of(())) == [] and list(columns.Words.of(())) == []
    words = columns.Words.of(["x", None, "x", 3, None])
    assert list(words) == ["x", None, "x", 3, None] and words.values == ["x", None, 3]
    assert list(words.take(np.array([4, 0]))) == [None, "x"]
