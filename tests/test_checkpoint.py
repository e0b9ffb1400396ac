"""Checkpoints: whole or refused, and the old one survives every failed write."""

from __future__ import annotations

import errno
import os
import random
import resource
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import pytest
import torch

from softcl.train import checkpoint
from softcl.train.checkpoint import (
    CheckpointError,
    name_too,
    put_back,
    read_checkpoint,
    read_newest,
    replace_file,
    write_checkpoint,
)

ROOT = Path(__file__).resolve().parents[1]  # a fresh interpreter finds softcl from here


def make_state(step: int, rows: int = 64) -> dict:
    generator = torch.Generator().manual_seed(step)
    return {
        "step": step,
        "config": {"method": "ascl", "lr": 0.03},
        "queue": {"rows": torch.randn(rows, 16, generator=generator)},
        "half": torch.randn(7, generator=generator).bfloat16(),
    }


def test_round_trip_is_bit_exact(tmp_path: Path):
    path = tmp_path / "last.pt"
    state = make_state(3)
    write_checkpoint(path, state)
    loaded = read_checkpoint(path)
    assert loaded["step"] == 3 and loaded["config"] == state["config"]
    assert torch.equal(loaded["queue"]["rows"], state["queue"]["rows"])
    assert torch.equal(loaded["half"], state["half"])
    assert os.listdir(tmp_path) == ["last.pt"]
    # An ordinary archive, too.
    assert torch.load(path, weights_only=True)["step"] == 3
    with zipfile.ZipFile(path) as archive:
        assert archive.testzip() is None
        assert archive.comment.startswith(b"softcl-sha256:")


def test_every_damage_is_detected(tmp_path: Path):
    path = tmp_path / "last.pt"
    write_checkpoint(path, make_state(1))
    good = path.read_bytes()
    chooser = random.Random(0)
    places = [0, 1, len(good) - 1, len(good) - 65, len(good) - 79, len(good) - 80, len(good) - 81]
    places += [chooser.randrange(len(good)) for _ in range(200)]
    for place in places:
        bad = bytearray(good)
        bad[place] ^= 1 << chooser.randrange(8)
        path.write_bytes(bad)
        with pytest.raises(CheckpointError, match="last.pt"):
            read_checkpoint(path)
    for length in [0, 1, 79, 80, 81, *(chooser.randrange(len(good)) for _ in range(200))]:
        path.write_bytes(good[:length])
        with pytest.raises(CheckpointError, match="last.pt"):
            read_checkpoint(path)
    path.write_bytes(good + b"\0")
    with pytest.raises(CheckpointError):
        read_checkpoint(path)
    path.write_bytes(good)
    assert read_checkpoint(path)["step"] == 1


def test_missing_and_foreign_files_are_named(tmp_path: Path):
    with pytest.raises(CheckpointError, match=r"absent\.pt: cannot read: No such file"):
        read_checkpoint(tmp_path / "absent.pt")
    foreign = tmp_path / "foreign.pt"
    torch.save({"step": 1}, foreign)
    with pytest.raises(CheckpointError, match=r"foreign\.pt: it has no checksum"):
        read_checkpoint(foreign)


class _Evil:
    def __reduce__(self):
        return (os.system, ("echo must not run",))


def test_arbitrary_objects_are_not_unpickled(tmp_path: Path, capfd: pytest.CaptureFixture):
    path = tmp_path / "evil.pt"
    write_checkpoint(path, {"step": 1, "extra": _Evil()})
    with pytest.raises(CheckpointError, match=r"evil\.pt: cannot load"):
        read_checkpoint(path)
    assert "must not run" not in capfd.readouterr().out


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_failed_write_keeps_the_old_checkpoint(tmp_path: Path, monkeypatch, call: str):
    path = tmp_path / "last.pt"
    write_checkpoint(path, make_state(1))

    def refuse(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(checkpoint.os, call, refuse)
    with pytest.raises(CheckpointError, match="No space left on device; the checkpoint before it"):
        write_checkpoint(path, make_state(2))
    with pytest.raises(OSError, match=r"No space left on device: '.*config\.json'"):
        replace_file(tmp_path / "config.json", b"{}")
    monkeypatch.undo()
    assert read_checkpoint(path)["step"] == 1
    assert os.listdir(tmp_path) == ["last.pt"]


def test_write_cut_short_by_the_system_keeps_the_old_checkpoint(tmp_path: Path):
    """A real short write: the system stops the process's files at 20 kB, as a full disk would."""
    path = tmp_path / "last.pt"
    write_checkpoint(path, make_state(1))
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    previous = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))
        with pytest.raises(CheckpointError, match="File too large; the checkpoint before"):
            write_checkpoint(path, make_state(2, rows=4096))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, previous)
    assert read_checkpoint(path)["step"] == 1
    assert os.listdir(tmp_path) == ["last.pt"]


def steps_in(folder: Path) -> dict[str, int]:
    return {path.name: read_checkpoint(path)["step"] for path in folder.iterdir()}


@pytest.mark.parametrize("links", [True, False])
def test_the_one_before_and_the_best_are_kept(tmp_path: Path, monkeypatch, links: bool):
    if not links:

        def refuse(*_):
            raise OSError(errno.EPERM, "Operation not permitted")

        monkeypatch.setattr(checkpoint.os, "link", refuse)
    last, best = tmp_path / "last.pt", tmp_path / "best.pt"
    for step in range(1, 6):
        write_checkpoint(last, make_state(step))
        if step in (2, 3):
            for _ in range(2):  # marking twice changes nothing
                name_too(last, best)
    assert steps_in(tmp_path) == {"last.pt": 5, "last-1.pt": 4, "best.pt": 3}


def test_the_newest_whole_checkpoint_is_read(tmp_path: Path):
    for step in (1, 2):
        write_checkpoint(tmp_path / "last.pt", make_state(step))
    assert read_newest(tmp_path)[0] == tmp_path / "last.pt"
    (tmp_path / "last.pt").write_bytes(b"junk")
    path, content, (reason,) = read_newest(tmp_path)
    assert path.name == "last-1.pt" and content["step"] == 1 and "last.pt: it has no" in reason
    put_back(tmp_path, path)
    assert read_checkpoint(tmp_path / "last.pt")["step"] == 1
    assert (tmp_path / "set-aside.pt").read_bytes() == b"junk"
    (tmp_path / "last.pt").unlink()
    (tmp_path / "last-1.pt").write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"last-1\.pt: it has no checksum"):
        read_newest(tmp_path)


_WRITER = """
import sys
from pathlib import Path
import torch
from softcl.train.checkpoint import write_checkpoint
path, step = Path(sys.argv[1]), 0
while True:
    step += 1
    write_checkpoint(path, {"step": step, "rows": torch.full((20000, 16), float(step))})
    print(step, flush=True)
"""


def test_killed_writer_leaves_a_whole_checkpoint(tmp_path: Path):
    path = tmp_path / "last.pt"
    command = [sys.executable, "-c", _WRITER, str(path)]
    chooser = random.Random(1)
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        process.stdout.readline()
        time.sleep(0.05 + 0.1 * chooser.random())
        process.send_signal(signal.SIGKILL)
        process.wait(timeout=60)
    state = read_checkpoint(path)
    assert torch.equal(state["rows"], torch.full((20000, 16), float(state["step"])))


def test_replace_file_leaves_no_temporary_file_when_interrupted(tmp_path: Path, monkeypatch):
    path = tmp_path / "config.json"
    replace_file(path, b"old")

    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(checkpoint.os, "fsync", interrupt)
    with pytest.raises(KeyboardInterrupt):
        replace_file(path, b"new")
    monkeypatch.undo()
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["config.json"]
