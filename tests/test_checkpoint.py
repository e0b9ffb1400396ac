"""Checkpoints: whole or refused, and the old one survives every failed write."""

from __future__ import annotations

import errno
import os
import random
import signal
import subprocess
import sys
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


def refuse(*_):
    raise OSError(errno.ENOSPC, "No space left on device")


def test_round_trip_is_bit_exact(tmp_path: Path):
    path, state = tmp_path / "last.pt", make_state(3)
    write_checkpoint(path, state)
    # An ordinary archive, too.
    for loaded in (read_checkpoint(path), torch.load(path, weights_only=True)):
        assert loaded["step"] == 3 and loaded["config"] == state["config"]
        assert torch.equal(loaded["queue"]["rows"], state["queue"]["rows"])
        assert torch.equal(loaded["half"], state["half"])
    with zipfile.ZipFile(path) as archive:
        assert archive.testzip() is None and archive.comment.startswith(b"softcl-sha256:")
    assert os.listdir(tmp_path) == ["last.pt"]


def test_every_damage_is_detected(tmp_path: Path):
    path = tmp_path / "last.pt"
    write_checkpoint(path, make_state(1))
    good, chooser = path.read_bytes(), random.Random(0)
    end = len(good)
    places = [0, 1, end - 1, end - 65, end - 79, end - 80, end - 81]
    places += [chooser.randrange(end) for _ in range(200)]
    damaged = [good[:at] + bytes([good[at] ^ 1 << at % 8]) + good[at + 1 :] for at in places]
    damaged += [good[:at] for at in (0, 1, 79, 80, 81, *places[7:])] + [good + b"\0"]
    for data in damaged:
        path.write_bytes(data)
        with pytest.raises(CheckpointError, match="last.pt"):
            read_checkpoint(path)
    path.write_bytes(good)
    assert read_checkpoint(path)["step"] == 1


class _Evil:
    def __reduce__(self):
        return (os.system, ("echo must not run",))


def test_what_is_no_checkpoint_is_named_and_not_run(tmp_path: Path, capfd: pytest.CaptureFixture):
    torch.save({"step": 1}, tmp_path / "foreign.pt")
    write_checkpoint(tmp_path / "evil.pt", {"step": 1, "extra": _Evil()})
    for name, reason in (
        ("absent.pt", "cannot read: No such file"),
        ("foreign.pt", "it has no checksum"),
        ("evil.pt", "cannot load"),
    ):
        with pytest.raises(CheckpointError, match=f"{name}: {reason}"):
            read_checkpoint(tmp_path / name)
    assert "must not run" not in capfd.readouterr().out


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_failed_write_keeps_the_old_checkpoint(tmp_path: Path, monkeypatch, call: str):
    path = tmp_path / "last.pt"
    write_checkpoint(path, make_state(1))
    monkeypatch.setattr(checkpoint.os, call, refuse)
    with pytest.raises(CheckpointError, match="No space left on device; the checkpoint before it"):
        write_checkpoint(path, make_state(2))
    with pytest.raises(OSError, match=r"No space left on device: '.*config\.json'"):
        replace_file(tmp_path / "config.json", b"{}")

    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(checkpoint.os, call, interrupt)
    with pytest.raises(KeyboardInterrupt):
        replace_file(path, b"new")
    monkeypatch.undo()
    assert read_checkpoint(path)["step"] == 1
    assert os.listdir(tmp_path) == ["last.pt"]


@pytest.mark.parametrize("links", [True, False])
def test_the_one_before_and_the_best_are_kept(tmp_path: Path, monkeypatch, links: bool):
    if not links:
        monkeypatch.setattr(checkpoint.os, "link", refuse)
    last, best = tmp_path / "last.pt", tmp_path / "best.pt"
    for step in range(1, 6):
        write_checkpoint(last, make_state(step))
        if step in (2, 3):
            for _ in range(2):  # marking twice changes nothing
                name_too(last, best)
    steps = {path.name: read_checkpoint(path)["step"] for path in tmp_path.iterdir()}
    assert steps == {"last.pt": 5, "last-1.pt": 4, "best.pt": 3}


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
    command = [sys.executable, "-c", _WRITER, str(tmp_path / "last.pt")]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        for _ in range(3):
            process.stdout.readline()
        process.send_signal(signal.SIGKILL)
        process.wait(timeout=60)
    for path in (tmp_path / "last.pt", tmp_path / "last-1.pt"):
        state = read_checkpoint(path)
        assert torch.equal(state["rows"], torch.full((20000, 16), float(state["step"])))
