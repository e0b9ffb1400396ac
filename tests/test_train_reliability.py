"""What a run survives: damage, a second process, numbers that fail; and what it says then."""

from __future__ import annotations

import contextlib
import errno
import json
import math
import shutil
import subprocess
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from filelock import FileLock
from run_comparison import assert_same_run

import softcl.train
from softcl.evaluation import KNN
from softcl.train import evaluation, loop
from softcl.train.__main__ import main
from softcl.train.checkpoint import read_checkpoint
from softcl.train.folder import RunFolder, read_metrics
from softcl.train.step import Diverged, Meter, first_damaged


def damage(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 3] ^= 1
    path.write_bytes(data)


def test_a_damaged_checkpoint_gives_way_to_the_one_before_it(flags, whole, tmp_path, capsys):
    line = [*flags, "--checkpoint-every", "2", "--out", "parts", "--max-steps", "6"]
    assert main(line) == 0
    damage(tmp_path / "parts/last.pt")
    capsys.readouterr()
    assert main(["--resume", "parts"]) == 0
    captured = capsys.readouterr()
    assert captured.err == (
        "softcl.train: warning: parts/last.pt: its checksum does not match its content (damaged); "
        "going on from parts/last-1.pt\n"
    )
    assert "resumed    at step 4 of 8" in captured.out
    assert_same_run(whole, tmp_path / "parts")
    names = [path.name for path in (tmp_path / "parts").glob("*.pt")]
    assert sorted(names) == ["best.pt", "last-1.pt", "last.pt", "set-aside.pt"]
    # Where none is whole, the newest is the one that is spoken of.
    for path in (tmp_path / "parts").glob("last*.pt"):
        damage(path)
    assert main(["--resume", "parts"]) == 1
    assert "parts/last.pt: its checksum" in capsys.readouterr().err


def test_best_is_the_checkpoint_of_the_highest_accuracy(flags, tmp_path, monkeypatch):
    scores = iter([0.5, 0.25, 0.75, 0.75, 0.5])
    monkeypatch.setattr(KNN, "accuracy", lambda *_: next(scores))
    assert main([*flags, "--epochs", "3", "--knn-every", "1", "--out", "run"]) == 0
    # The first two are the baselines; the tie of epoch 2 does not replace epoch 1.
    rows = [row for row in read_metrics(tmp_path / "run/metrics.jsonl") if "knn_top1" in row]
    assert [row["knn_top1"] for row in rows] == [0.75, 0.75, 0.5]
    best = read_checkpoint(tmp_path / "run/best.pt")
    assert best["step"] == 4 and best["accuracy"] == 0.75 and best["best"] == [0.75, 4]
    assert read_checkpoint(tmp_path / "run/last.pt")["best"] == [0.75, 4]


def test_the_untrained_backbone_is_measured_recalibrated(flags, whole, tmp_path, monkeypatch):
    # Batch norms set to a constant: every image then has the features of every other.
    @contextlib.contextmanager
    def constant(encoder, images, size, device):
        norms = [norm for norm in encoder.modules() if isinstance(norm, torch.nn.BatchNorm2d)]
        for norm in norms:
            norm.running_var.fill_(1e30)
        yield encoder
        for norm in norms:
            norm.running_var.fill_(1)

    monkeypatch.setattr(evaluation, "recalibrated", constant)
    assert main([*flags, "--out", "run", "--max-steps", "1"]) == 0
    found = (path / "baselines.json" for path in (whole, Path("run")))
    right, flat = (json.loads(path.read_text()) for path in found)
    assert right["pixels"] == flat["pixels"]
    assert right["untrained_neighbors"] != flat["untrained_neighbors"]


def test_resume_auto_starts_continues_and_ends(flags, whole, tmp_path, capsys):
    assert main([*flags, "--resume", "auto"]) == 2
    assert "--resume auto: needs --out" in capsys.readouterr().err
    line = [*flags, "--resume", "auto", "--out", "auto"]
    assert main([*line, "--max-steps", "2"]) == 0
    # Killed before the first checkpoint: it starts over.
    for path in (tmp_path / "auto").glob("*.pt"):
        path.unlink()
    assert main([*line, "--max-steps", "3"]) == 0
    assert "resumed" not in capsys.readouterr().out
    assert [row["step"] for row in read_metrics(tmp_path / "auto/metrics.jsonl")] == [1, 2, 3]
    assert main([*line, "--max-steps", "5"]) == 0
    assert "resumed    at step 3" in capsys.readouterr().out
    assert main(line) == 0
    assert_same_run(whole, tmp_path / "auto")
    assert main(line) == 0
    assert "auto: finished, nothing to resume" in capsys.readouterr().out
    # Another configuration is another run.
    assert main([*line, "--lr", "0.01"]) == 2
    assert "the run to resume has --lr 0.05" in capsys.readouterr().err


# ------------------------------------------------------------------------------------------ numbers


def poison_after(step: int, monkeypatch, change) -> None:
    """Let `change(state)` happen behind the run's back, after so many steps."""
    original = loop.train_step

    def poisoned(state, *rest, **options):
        measures = original(state, *rest, **options)
        if state.step == step:
            change(state)
        return measures

    monkeypatch.setattr(loop, "train_step", poisoned)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_numbers_that_fail_are_named_within_two_steps(flags, tmp_path, monkeypatch, capsys, value):
    def change(state):
        state.student.backbone.layer2[0].conv1.weight.data[0, 0, 0, 0] = value

    poison_after(5, monkeypatch, change)
    assert main([*flags, "--checkpoint-every", "3", "--out", "run"]) == 1
    error = capsys.readouterr().err
    assert len(error.splitlines()) == 1 and "step 6 " in error
    assert "parameter backbone.layer2.0.conv1.weight of the student is not finite" in error
    assert "the last checkpoint is run/last.pt, of step 4" in error
    assert read_checkpoint(tmp_path / "run/last.pt")["step"] == 4  # after an evaluation


def test_a_checkpoint_with_such_numbers_is_not_written(flags, tmp_path, monkeypatch, capsys):
    def change(state):
        state.teacher.projector[2].bias.data[1] = math.nan

    poison_after(4, monkeypatch, change)
    assert main([*flags, "--checkpoint-every", "2", "--knn-every", "0", "--out", "run"]) == 1
    error = capsys.readouterr().err
    assert "after step 4 parameter projector.2.bias of the teacher is not finite" in error
    assert read_checkpoint(tmp_path / "run/last.pt")["step"] == 2


def test_a_gradient_is_named_before_what_it_broke():
    state = SimpleNamespace(**{who: torch.nn.Linear(3, 2) for who in ("student", "teacher")})
    state.heads = torch.nn.ModuleDict()
    assert first_damaged(state) is None
    state.student.weight.grad = torch.full((2, 3), math.nan)
    state.student.weight.data.fill_(math.nan)
    assert first_damaged(state) == "parameter weight of the student is not finite"
    assert first_damaged(state, gradients=True) == "the gradient of weight is not finite"


def test_where_looking_costs_the_loss_is_checked_one_step_late():
    class Arrival:
        def synchronize(self) -> None:
            arrived.append(True)

    arrived: list[bool] = []
    watcher = Meter(every=100, batch_size=4)
    losses = [1.0, 2.0, math.nan, 3.0]
    watcher._watch(1, torch.tensor(losses[0]), Arrival())
    assert arrived == []  # nothing is waited for in the first step
    watcher._watch(2, torch.tensor(losses[1]), Arrival())
    watcher._watch(3, torch.tensor(losses[2]), Arrival())
    with pytest.raises(Diverged, match="the loss of step 3 is nan"):
        watcher._watch(4, torch.tensor(losses[3]), Arrival())
    assert len(arrived) == 3


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_gpus_loss_is_checked_one_step_late():
    watcher = Meter(every=100, batch_size=4)
    for step in (1, 2):
        loss = math.nan if step == 2 else 1.0
        watcher.add(step, torch.tensor([loss, 0.0, 0.0, 0.0, 1.0], device="cuda"))
    with pytest.raises(Diverged, match="the loss of step 2 is nan"):
        watcher.add(3, torch.ones(5, device="cuda"))


def test_collapse_is_warned_of_once(flags, monkeypatch, capsys):
    original, spreads = loop.train_step, [0.9, 0.04, 0.03, 0.5, 0.01, 0.02, 0.9, 0.9]

    def collapsing(state, *rest, **options):
        measures = original(state, *rest, **options)
        measures[4] = spreads[state.step - 1]
        return measures

    monkeypatch.setattr(loop, "train_step", collapsing)
    assert main([*flags, "--out", "run"]) == 0
    lines = [x for x in capsys.readouterr().out.splitlines() if x.startswith("warning    collapse")]
    assert len(lines) == 2
    assert "collapse: at step 2 " in lines[0] and "spread 0.040" in lines[0]
    assert "collapse: at step 5 " in lines[1]


# -------------------------------------------------------------------------------------------- disk


def test_a_disk_that_is_full_and_then_is_not(flags, whole, tmp_path, capsys):
    """A real tmpfs with room for one checkpoint and a half, and then for more."""
    place = tmp_path / "small"
    place.mkdir()
    room = (whole / "last.pt").stat().st_size * 3 // 2
    mount = ["mount", "-t", "tmpfs", "-o", f"size={room}", "tmpfs", str(place)]
    try:
        mounted = subprocess.run(mount, capture_output=True).returncode == 0
    except OSError:
        mounted = False
    if not mounted:
        pytest.skip("mounting a tmpfs is not allowed here")
    try:
        assert main([*flags, "--checkpoint-every", "3", "--out", "small/run"]) == 1
        error = capsys.readouterr().err
        assert len(error.splitlines()) == 1 and "No space left on device" in error
        assert "last.pt: cannot write" in error and "the checkpoint before it is kept" in error
        assert read_checkpoint(place / "run/last.pt")["step"] == 3
        assert not list((place / "run").glob(".*.tmp"))
        subprocess.run(["mount", "-o", f"remount,size={6 * room}", str(place)], check=True)
        assert main(["--resume", "small/run"]) == 0
        assert_same_run(whole, place / "run")
    finally:
        subprocess.run(["umount", str(place)], check=True)


# ------------------------------------------------------------------------------------------- locks


def test_two_processes_do_not_write_to_one_folder(flags, tmp_path, monkeypatch, capsys):
    assert main([*flags, "--out", "run", "--max-steps", "2"]) == 0
    before = {path: path.read_bytes() for path in (tmp_path / "run").iterdir()}
    # A lock belongs to an open file: as good as another process.
    with FileLock(tmp_path / "run/.lock"):
        for line in (["--resume", "run"], [*flags, "--out", "run", "--overwrite"]):
            capsys.readouterr()
            assert main(line) == 1
            assert "run: another process is writing to this run" in capsys.readouterr().err
    assert {path: path.read_bytes() for path in (tmp_path / "run").iterdir()} == before

    def fail(_self):
        raise OSError(5, "Input/output error")

    # Whatever ends a run lets go of its folder.
    with monkeypatch.context() as patch:
        patch.setattr(softcl.train.loop.Loop, "_measure_baselines", fail)
        assert main(["--resume", "run"]) == 1
    with FileLock(tmp_path / "run/.lock", timeout=0):
        pass
    assert main(["--resume", "run"]) == 0


def test_a_folder_without_locks_still_works(tmp_path, monkeypatch):
    def refuse(_self):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(FileLock, "acquire", refuse)
    with RunFolder.create(tmp_path / "run") as made:
        made.write_json("config.json", {})
    shutil.rmtree(tmp_path / "run")
