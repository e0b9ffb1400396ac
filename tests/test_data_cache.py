"""What was decoded is kept: found again, never stale, never wrong, and never in the way."""

from __future__ import annotations

import os
import resource
import shutil
import signal
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from kept_sets import entries, fails, read
from run_comparison import assert_same_run

from softcl.data import ImageSet, cache, decode, load_dataset
from softcl.data.cache import Cache, Entry, stamps
from softcl.evaluation.knn import KNN
from softcl.train.__main__ import main

Image = pytest.importorskip("PIL.Image")


@pytest.fixture(autouse=True)
def settled(monkeypatch):
    """Files that were written a moment ago may be kept."""
    monkeypatch.setattr(cache, "SETTLED", 0.0)


@pytest.fixture
def images(folder: Path, tmp_path: Path) -> Path:
    """A copy that a test may change."""
    return shutil.copytree(folder, tmp_path / "images")


def decodes(monkeypatch) -> list:
    """A list with one entry for each file that is decoded from now on."""
    calls, real = [], decode.decode

    def counted(*arguments):
        calls.append(arguments)
        return real(*arguments)

    monkeypatch.setattr(decode, "decode", counted)
    return calls


def test_second_start_decodes_nothing_and_has_the_same_pixels(images, tmp_path, monkeypatch):
    kept = tmp_path / "kept"
    fresh, first = read(images, "off"), read(images, kept)
    calls = decodes(monkeypatch)
    second = read(images, kept)
    assert not calls
    for other in (first, second):
        assert torch.equal(fresh.images, other.images) and torch.equal(fresh.labels, other.labels)
        assert (fresh.classes, fresh.notes, fresh.size) == (other.classes, other.notes, other.size)
    assert not read(images, kept, image_size=8).images.shape == fresh.images.shape
    assert len(calls) == len(fresh)  # another size is another entry
    assert len(entries(kept)) == 2


def test_training_has_the_same_bits_with_and_without(flags, tmp_path, monkeypatch):
    for out, where in (("none", "off"), ("first", "kept"), ("second", "kept")):
        calls = decodes(monkeypatch)
        assert main([*flags, "--out", out, "--cache", where]) == 0
        assert bool(calls) == (out != "second")
    assert_same_run(tmp_path / "none", tmp_path / "first")
    assert_same_run(tmp_path / "none", tmp_path / "second")


def test_what_is_written_into_the_pixels_stays_here(images, tmp_path):
    first = read(images, tmp_path / "kept").images
    before = first.clone()
    first.zero_()
    assert torch.equal(read(images, tmp_path / "kept").images, before)


# ------------------------------------------------------------------------------------- never stale


@pytest.mark.parametrize("change", ["same size and time", "added", "removed", "replaced"])
def test_a_changed_file_is_read_again(images, tmp_path, change):
    kept, file = tmp_path / "kept", images / "train" / "class0" / "003.png"
    read(images, kept)
    before, pixels = file.stat(), np.asarray(Image.open(file))
    if change == "same size and time":
        file.write_bytes(file.read_bytes()[:-1] + b"?")
        os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    elif change == "added":
        shutil.copy(file, file.with_name("0030.png"))
    elif change == "removed":
        file.unlink()
    else:
        Image.fromarray(255 - pixels).save(tmp_path / "new.png")
        os.replace(tmp_path / "new.png", file)
    stale = [path.stat().st_ino for path in entries(kept)]
    again, fresh = read(images, kept), read(images, "off")
    assert torch.equal(again.images, fresh.images) and torch.equal(again.labels, fresh.labels)
    assert [path.stat().st_ino for path in entries(kept)] != stale


def test_files_that_change_are_not_kept(images, tmp_path, monkeypatch):
    monkeypatch.setattr(cache, "SETTLED", 60.0)  # the copy is younger
    read(images, tmp_path / "young")
    assert not entries(tmp_path / "young")
    monkeypatch.setattr(cache, "SETTLED", 0.0)
    real = decode.LazyImages.read_all

    def changing(self):
        found = real(self)
        (images / "train" / "class0" / "003.png").touch()
        return found

    monkeypatch.setattr(decode.LazyImages, "read_all", changing)
    read(images, tmp_path / "changing")
    assert not entries(tmp_path / "changing")


def test_unreadable_files_are_known_again(images, tmp_path, monkeypatch):
    monkeypatch.setattr(decode, "UNREADABLE_LIMIT", 0.05)
    kept = tmp_path / "kept"
    (images / "train" / "class0" / "003.png").write_bytes(b"junk")
    first = read(images, kept)
    calls = decodes(monkeypatch)
    second = read(images, kept)
    assert not calls and len(second) == len(first) == 127
    assert second.skipped == first.skipped and len(first.skipped) == 1
    assert torch.equal(first.images, second.images) and torch.equal(first.labels, second.labels)


def test_what_could_not_be_read_for_the_moment_is_tried_again(images, tmp_path, monkeypatch):
    monkeypatch.setattr(decode, "UNREADABLE_LIMIT", 0.05)
    real = decode.decode

    def failing(file, *rest):
        if str(file).endswith("class0/003.png"):
            raise OSError(5, "Input/output error")
        return real(file, *rest)

    monkeypatch.setattr(decode, "decode", failing)
    assert len(read(images, tmp_path / "kept")) == 127
    monkeypatch.setattr(decode, "decode", real)
    assert len(read(images, tmp_path / "kept")) == 128


# ------------------------------------------------------------------------------------- never wrong


def damage(file: Path, kind: str) -> None:
    content = bytearray(file.read_bytes())
    if kind == "a bit":
        content[len(content) // 2] ^= 1
    elif kind == "the header":
        content[40:60] = b"\xff" * 20
    elif kind == "cut":
        del content[len(content) // 2 :]
    elif kind == "empty":
        content.clear()
    elif kind == "foreign":
        content[:] = b"\x89PNG" + bytes(100)
    file.write_bytes(content)


@pytest.mark.parametrize("kind", ["a bit", "the header", "cut", "empty", "foreign"])
def test_a_damaged_entry_is_one_line_and_made_anew(images, tmp_path, monkeypatch, kind):
    kept = tmp_path / "kept"
    fresh = read(images, kept).images.clone()
    (file,) = entries(kept)
    damage(file, kind)
    again = read(images, kept)
    assert torch.equal(again.images, fresh)
    (line,) = [note for note in again.notes if note.startswith("cache: ")]
    assert str(kept) in line and file.name in line and "\n" not in line
    calls = decodes(monkeypatch)
    assert torch.equal(read(images, kept).images, fresh) and not calls


def test_an_entry_of_another_set_is_not_believed(images, tmp_path):
    kept = tmp_path / "kept"
    fresh = read(images, kept).images.clone()
    (file,) = entries(kept)
    load_dataset(str(images), "test", cache=kept)
    (other,) = set(entries(kept)) - {file}
    shutil.copy(other, file)
    assert torch.equal(read(images, kept).images, fresh)


def made(value: int, paths: list[str]) -> Entry:
    return Entry({"value": value}, {"rows": np.full(50_000, value)}, stamps(paths))


def test_fifty_kills_while_writing(tmp_path):
    """A writer that dies, each time some bytes further, leaves nothing or all of it."""
    source = tmp_path / "source"
    source.write_bytes(b"x")
    paths, store = [str(source)], Cache(tmp_path / "kept")

    def get(make) -> Entry:
        return store.get("index", 0, make, lambda meta: paths)

    for number in range(50):
        child = os.fork()
        if child == 0:
            signal.signal(signal.SIGXFSZ, signal.SIG_DFL)  # kills at so many bytes of the file
            resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
            resource.setrlimit(resource.RLIMIT_FSIZE, (100 + 8200 * number, resource.RLIM_INFINITY))
            get(lambda: made(1, paths))
            os._exit(0)
        status = os.waitpid(child, 0)[1]
        entry = get(lambda: made(2, paths)._replace(stamps=None))
        whole = os.WIFEXITED(status)
        assert whole or os.WTERMSIG(status) == signal.SIGXFSZ
        assert (entry.arrays["rows"] == (1 if whole else 2)).all() and not store.notes
    assert whole  # the last one


def test_of_two_at_a_time_one_makes_it(tmp_path):
    source, calls = tmp_path / "source", []
    source.write_bytes(b"x")
    paths = [str(source)]

    def slow() -> Entry:
        calls.append(1)
        time.sleep(0.2)
        return made(1, paths)

    def get() -> None:
        found.append(Cache(tmp_path / "kept").get("index", 0, slow, lambda meta: paths))

    found: list[Entry] = []
    threads = [threading.Thread(target=get) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(calls) == 1 and len(found) == 4
    assert all((entry.arrays["rows"] == 1).all() for entry in found)


def test_who_does_not_let_go_is_not_waited_for_for_ever(tmp_path, monkeypatch):
    monkeypatch.setattr(cache, "PATIENCE", 0.2)
    source = tmp_path / "source"
    source.write_bytes(b"x")
    store, nested = Cache(tmp_path / "kept"), []

    def get(make) -> Entry:
        return store.get("index", 0, make, lambda meta: [str(source)])

    def holding() -> Entry:
        nested.append(get(lambda: made(2, [str(source)])))
        return made(1, [str(source)])

    assert get(holding).meta["value"] == 1 and nested[0].meta["value"] == 2
    assert get(fails).meta["value"] == 1  # what is kept


# --------------------------------------------------------------------------------- never in the way


def lines(found: ImageSet) -> list[str]:
    return [note for note in found.notes if note.startswith("cache: ")]


def test_a_folder_that_cannot_be_written_is_one_line(images, tmp_path):
    (tmp_path / "file").write_bytes(b"")
    found = read(images, tmp_path / "file" / "kept")
    (line,) = lines(found)
    assert line == f"cache: {tmp_path / 'file' / 'kept'}: nothing is kept: Not a directory"
    assert torch.equal(found.images, read(images, "off").images)


def test_a_full_disk_is_one_line(images, tmp_path):
    """A file may have no more than 64 KiB: what is written ends in the middle."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, limits[1]))
    try:
        found = read(images, tmp_path / "kept")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    (line,) = lines(found)
    assert line == f"cache: {tmp_path / 'kept'}: nothing is kept: File too large"
    assert torch.equal(found.images, read(images, "off").images)
    assert not entries(tmp_path / "kept") and not list((tmp_path / "kept").glob(".*"))


def test_half_of_what_the_disk_has_stays_free(images, tmp_path, monkeypatch):
    monkeypatch.setattr(
        cache.shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(9, 9, 150000)
    )
    (line,) = lines(read(images, tmp_path / "kept"))
    assert "half of what the disk has free" in line and not entries(tmp_path / "kept")


def test_the_limit_removes_what_was_not_used_for_longest(images, tmp_path, monkeypatch):
    kept = tmp_path / "kept"
    for size in (8, 10, 12):
        read(images, kept, image_size=size)
        time.sleep(0.01)
    old = {path.stat().st_size: path for path in entries(kept)}
    read(images, kept, image_size=8)  # used again
    remains = kept / ".pixels-x.tmp"  # of a process that was killed
    remains.write_bytes(b"")
    os.utime(remains, (0, 0))
    (kept / "mine.txt").write_bytes(bytes(10**6))
    monkeypatch.setattr(cache, "LIMIT", sum(old) + 10_000)
    read(images, kept, image_size=9)
    left = entries(kept)
    assert old[sorted(old)[0]] in left and old[sorted(old)[2]] in left and len(left) == 3
    assert not remains.exists() and (kept / "mine.txt").exists()
    monkeypatch.setattr(cache, "LIMIT", 1000)
    (line,) = lines(read(images, kept, image_size=11))
    assert "limit" in line and entries(kept) == left


def test_default_place_and_off(images, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    read(images, None)  # the tests' SOFTCL_CACHE=off
    assert not (tmp_path / "home").exists()
    monkeypatch.delenv("SOFTCL_CACHE")
    read(images, "off")
    assert not (tmp_path / "home").exists()
    read(images, None)
    assert len(entries(tmp_path / "home" / "softcl" / "images")) == 1


# ------------------------------------------------------------------------------------ the baseline


def test_pixel_baseline_reads_few_images(monkeypatch):
    size, limit = 400, 100
    monkeypatch.setattr("softcl.evaluation.knn.PIXEL_BANK_LIMIT", limit)
    pixels = torch.randint(0, 256, (size, 3, 8, 8), dtype=torch.uint8)
    constants = ((0.5,) * 3, (0.25,) * 3)
    bank = ImageSet(pixels, torch.arange(size) % 2, ["a", "b"], *constants, "bank")
    queries = ImageSet(pixels[:50], torch.arange(50) % 2, ["a", "b"], *constants, "queries")
    read_of, real = [], ImageSet.batch

    def counted(self, indices):
        read_of.append((self.name, len(indices)))
        return real(self, indices)

    monkeypatch.setattr(ImageSet, "batch", counted)
    assert 0.0 <= KNN(bank, queries, 8, torch.device("cpu")).pixel_accuracy() <= 1.0
    assert sum(count for name, count in read_of if name == "bank") == limit
