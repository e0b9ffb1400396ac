"""Whole runs of the training command on tiny images: what they write, and how they end."""

from __future__ import annotations

import errno
import importlib.util
import json
import math
import os
import shutil
import signal
from pathlib import Path

import pytest
from run_comparison import assert_same_run

from softcl.errors import ConfigError
from softcl.ops import BackendChoice
from softcl.train import checkpoint, fit, loop, parts, step
from softcl.train.__main__ import main
from softcl.train.checkpoint import read_checkpoint
from softcl.train.folder import read_metrics


def test_a_run_writes_what_it_promises(whole: Path):
    names = {path.name for path in whole.iterdir() if not path.name.startswith("events.")}
    assert names == {
        *("config.json", "metrics.jsonl", "last.pt", "last-1.pt", "best.pt", "baselines.json"),
        *("result.json", "neighbors.png", ".lock"),
    }
    config = json.loads((whole / "config.json").read_text())
    assert config["config"]["queue_size"] == 64 and config["config"]["temperature"] == 0.1
    rows = [json.loads(line) for line in (whole / "metrics.jsonl").read_text().splitlines()]
    steps = [row for row in rows if "loss" in row]
    assert [row["step"] for row in steps] == list(range(1, 9))
    assert steps[0]["lr"] == 0.0 and steps[2]["lr"] == 0.05
    for row in steps:
        assert math.isfinite(row["loss"]) and 0 <= row["confidence"] <= 1
        assert 0 <= row["entropy"] <= math.log(64) + 1e-5 and 0 <= row["positive_top1"] <= 1
        assert row["images_per_s"] > 0 and 0 <= row["data_wait"] <= 1
    evaluations = [row for row in rows if "knn_top1" in row]
    assert [row["step"] for row in evaluations] == [4, 8]
    result = json.loads((whole / "result.json").read_text())
    assert result["knn_top1"] == evaluations[-1]["knn_top1"] and result["step"] == 8
    shares = json.loads((whole / "baselines.json").read_text())
    assert 0 <= shares["untrained"] <= 1 and 0 <= shares["pixels"] <= 1
    state = read_checkpoint(whole / "last.pt")
    assert state["step"] == 8 and state["queues"]["queue.rows"].shape == (64, 16)


def test_a_run_tells_what_it_is(flags: list[str], capsys):
    assert main([*flags, "--out", "run", "--max-steps", "1"]) == 0
    text = capsys.readouterr().out
    for line in ("backend    ", "before training: raw pixels ", "untrained backbone ", "stopped "):
        assert line in text
    assert "\x1b" not in text and "\r" not in text  # plain lines without a terminal


def test_the_python_entry_returns_and_raises(flags: list[str], folder: Path, whole: Path):
    shutil.copytree(whole, "run")
    finished = fit(resume="run")
    assert finished.result == json.loads((whole / "result.json").read_text())
    refusal = r"threshold=True \(--threshold\): does not apply to method ascl"
    with pytest.raises(ConfigError, match=refusal):
        fit(data=str(folder), threshold=True)


def test_tensorboard_events_hold_the_metrics(flags: list[str], tmp_path: Path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    assert main([*flags, "--out", "run", "--max-steps", "3"]) == 0
    stored = (tmp_path / "run/last.pt").read_bytes()
    assert main(["--resume", "run", "--max-steps", "5"]) == 0
    # As if killed before the second checkpoint: the steps 4 and 5 come again.
    (tmp_path / "run/last.pt").write_bytes(stored)
    assert main(["--resume", "run"]) == 0
    events = EventAccumulator(str(tmp_path / "run"))
    events.Reload()
    assert {"loss", "lr", "knn_top1", "confidence"} <= set(events.Tags()["scalars"])
    losses = [row["loss"] for row in read_metrics(tmp_path / "run/metrics.jsonl") if "loss" in row]
    assert [event.value for event in events.Scalars("loss")] == pytest.approx(losses)


def test_resume_is_bit_exact_in_the_middle_of_an_epoch(flags, tmp_path: Path, monkeypatch):
    monkeypatch.setattr(step, "FIRST_STEPS", 2)  # then a row after every third step
    flags = [*flags, "--log-every", "3"]
    assert main([*flags, "--out", "whole"]) == 0
    assert main([*flags, "--out", "parts", "--max-steps", "4"]) == 0
    assert read_checkpoint(tmp_path / "parts/last.pt")["step"] == 4
    assert main(["--resume", "parts", "--max-steps", "5"]) == 0
    # From the checkpoint file too, and over lines that were logged after it.
    with open(tmp_path / "parts/metrics.jsonl", "a") as file:
        file.write('{"step": 7, "loss": 1.0}\n{"step": 8, "lo')
    assert main(["--resume", "parts/last.pt"]) == 0
    assert_same_run(tmp_path / "whole", tmp_path / "parts")
    rows = read_metrics(tmp_path / "parts/metrics.jsonl")
    assert [row["step"] for row in rows if "loss" in row] == [1, 2, 3, 6, 8]


OTHER_WAYS = [
    "--optimizer lars --no-decay-norms --lr 0.5 --accumulate 4",
    "--optimizer adamw --clip-norm 0.5 --momentum-schedule cosine",
]


@pytest.mark.parametrize("line", OTHER_WAYS)
def test_resume_is_bit_exact_whatever_the_optimizer(flags: list[str], tmp_path: Path, line: str):
    line += " --knn-every 0 --max-steps 6 --checkpoint-every 3 --out whole"
    assert main([*flags, *line.split()]) == 0
    shutil.copytree("whole", "parts")
    assert main(["--resume", "parts/last-1.pt", "--max-steps", "6"]) == 0
    assert_same_run(tmp_path / "whole", tmp_path / "parts")


@pytest.mark.parametrize("number, code", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_saves_after_the_step(
    flags: list[str], whole: Path, tmp_path: Path, monkeypatch, capfd, number: int, code: int
):
    original = loop.train_step

    def step_with_signal(state, *rest, **options):
        if state.step == 3:  # the fourth step, at an epoch's end: its evaluation is still to come
            os.kill(os.getpid(), number)
        return original(state, *rest, **options)

    before = signal.getsignal(number)
    with monkeypatch.context() as patch:
        patch.setattr(loop, "train_step", step_with_signal)
        assert main([*flags, "--out", "parts"]) == code
    assert signal.getsignal(number) is before
    captured = capfd.readouterr()
    assert "finishing the step and saving" in captured.err
    assert "python -m softcl.train --resume parts" in captured.out
    assert read_checkpoint(tmp_path / "parts/last.pt")["step"] == 4
    assert main(["--resume", "parts"]) == 0
    assert_same_run(whole, tmp_path / "parts")


def test_divergence_stops_with_the_step_and_the_checkpoint(flags, tmp_path: Path, capsys):
    assert main([*flags, "--lr", "1e25", "--checkpoint-every", "1", "--out", "run"]) == 1
    error = capsys.readouterr().err
    assert len(error.splitlines()) == 1 and "Traceback" not in error
    step = read_checkpoint(tmp_path / "run/last.pt")["step"]
    assert f"step {step + 1} " in error or f"the loss of step {step + 1} is" in error
    assert f"the last checkpoint is run/last.pt, of step {step}" in error


def test_a_full_disk_keeps_the_old_checkpoint(flags, tmp_path: Path, monkeypatch, capsys):
    original, calls = checkpoint.os.fsync, []

    def fail_later(descriptor: int) -> None:
        calls.append(os.readlink(f"/proc/self/fd/{descriptor}"))
        if sum("last.pt" in name for name in calls) > 1:
            raise OSError(errno.ENOSPC, "No space left on device")
        original(descriptor)

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint.os, "fsync", fail_later)
        assert main([*flags, "--out", "run", "--checkpoint-every", "3"]) == 1
    assert capsys.readouterr().err == (
        "softcl.train: run/last.pt: cannot write: No space left on device; "
        "the checkpoint before it is kept\n"
    )
    assert read_checkpoint(tmp_path / "run/last.pt")["step"] == 3
    assert not list((tmp_path / "run").glob(".*.tmp"))


def test_finished_and_foreign_folders_are_left_alone(flags, whole: Path, tmp_path: Path, capsys):
    shutil.copytree(whole, tmp_path / "run")
    before = {path: path.read_bytes() for path in (tmp_path / "run").iterdir()}
    assert main([*flags, "--out", "run"]) == 1
    assert "run: holds a finished run; name another --out or add --overwrite" in (
        capsys.readouterr().err
    )
    assert main(["--resume", "run"]) == 0
    assert "run: finished, nothing to resume" in capsys.readouterr().out
    # An overwriting run that cannot start has not touched the old one either.
    assert main([*flags, "--out", "run", "--overwrite", "--batch-size", "4096"]) == 2
    assert {path: path.read_bytes() for path in (tmp_path / "run").iterdir()} == before

    other = tmp_path / "other"
    other.mkdir()
    (other / "thesis.tex").write_text("years of work")
    for extra in ([], ["--overwrite"]):
        assert main([*flags, "--out", "other", *extra]) == 1
        assert "other: holds other files and no run" in capsys.readouterr().err
    assert (other / "thesis.tex").read_text() == "years of work"

    (tmp_path / "run/notes.txt").write_text("mine")
    assert main([*flags, "--epochs", "1", "--max-steps", "1", "--out", "run", "--overwrite"]) == 0
    assert (tmp_path / "run/notes.txt").read_text() == "mine"
    assert not (tmp_path / "run/result.json").exists()
    assert main([*flags, "--out", "run"]) == 1
    assert "run: holds an unfinished run; continue it with --resume run" in capsys.readouterr().err


def test_without_out_each_run_gets_a_new_folder(flags: list[str], tmp_path: Path):
    for _ in range(2):
        assert main([*flags, "--epochs", "1", "--max-steps", "1"]) == 0
    first, second = sorted(path.name for path in (tmp_path / "runs").iterdir())
    assert first.startswith("ascl-") and (first[-3:], second[-3:]) == ("-01", "-02")


def test_resume_refuses_another_run(flags: list[str], tmp_path: Path, folder: Path, capsys):
    assert main([*flags, "--out", "run", "--max-steps", "2"]) == 0
    for given, message in (
        ("--lr 0.1", "--lr 0.1: the run to resume has --lr 0.05"),
        ("--queue-size 32", "--queue-size 32: the run to resume has --queue-size 64"),
        ("--mix mixup", "--mix mixup: does not apply to method ascl (but to reco)"),
    ):
        assert main(["--resume", "run", *given.split()]) == 2
        assert message in capsys.readouterr().err
    # The same values may be repeated.
    assert main([*flags, "--resume", "run", "--max-steps", "3"]) == 0

    path = tmp_path / "run/config.json"
    content = json.loads(path.read_text())
    content["config"]["temperature"] = 0.3
    path.write_text(json.dumps(content))
    assert main(["--resume", "run"]) == 1
    error = capsys.readouterr().err
    assert "config.json: has --temperature 0.3, but the checkpoint was made with 0.1" in error
    path.unlink()

    (folder / "train/class0/extra.png").write_bytes((folder / "train/class0/000.png").read_bytes())
    try:
        assert main(["--resume", "run"]) == 1
        assert "not the images that run was trained on" in capsys.readouterr().err
    finally:
        (folder / "train/class0/extra.png").unlink()


BAD_PATHS = {
    "--resume nowhere": "nowhere: cannot read: No such file or directory",
    "--resume empty": "empty: holds no run to resume (no last.pt)",
    "--data nowhere": "nowhere",
    "--data empty": "empty",
    "--data file.txt": "file.txt",
    "--data shape": "shape: no such file or folder; did you mean shapes?",
    "--data shapes:0": "shapes:0",
    "--data shapes:256 --eval-data nowhere": "nowhere",
    "--data shapes:256 --out file.txt": "file.txt: is a file",
    "--data shapes:256 --out file.txt/run": "file.txt",
}


def test_bad_paths_are_named_in_one_line(tmp_path: Path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "file.txt").write_text("x")
    for line, message in BAD_PATHS.items():
        assert main([*line.split(), "--device", "cpu"]) == 1, line
        error = capsys.readouterr().err
        assert message in error and len(error.splitlines()) == 1, line
    assert sorted(path.name for path in tmp_path.iterdir()) == ["empty", "file.txt"]


def test_fused_stops_with_the_reasons(flags: list[str], tmp_path: Path, monkeypatch, capsys):
    reasons = {"triton": "no CUDA device", "cpu": "softcl._C is not built"}
    choice = BackendChoice("reference", reasons)
    monkeypatch.setattr(parts, "choose_backend", lambda *_, **__: choice)
    assert main([*flags, "--out", "run", "--fused"]) == 1
    error = capsys.readouterr().err
    assert "no fused backend runs here (triton: no CUDA device; cpu: softcl._C is" in error
    assert not (tmp_path / "run").exists()


def test_no_fused_runs_the_reference(flags: list[str], tmp_path: Path, capsys):
    assert main([*flags, "--out", "run", "--no-fused", "--max-steps", "1"]) == 0
    assert "backend    reference" in capsys.readouterr().out
    assert json.loads((tmp_path / "run/config.json").read_text())["backend"]["name"] == "reference"
    # A resumed run computes as before, unless told otherwise.
    assert main(["--resume", "run", "--max-steps", "2"]) == 0
    assert "backend    reference" in capsys.readouterr().out


def test_missing_extras_are_named(monkeypatch, capsys):
    original, absent = importlib.util.find_spec, ("timm", "PIL")
    monkeypatch.setattr(
        "softcl.command.importlib.util.find_spec",
        lambda name: None if name in absent else original(name),
    )
    assert main([]) == 1
    line = 'softcl.train: training needs timm, pillow: pip install "softcl[train]"\n'
    assert capsys.readouterr().err == line


def test_images_without_labels_train_without_knn(flags, folder: Path, tmp_path: Path, capsys):
    plain = tmp_path / "plain"
    plain.mkdir()
    for number, path in enumerate(sorted((folder / "train").rglob("*.png"))):
        (plain / f"{number}.png").write_bytes(path.read_bytes())
    assert main([*flags, "--data", str(plain), "--out", "run", "--epochs", "1"]) == 0
    assert "not measured: no labels; --eval-data names labelled" in capsys.readouterr().out
    assert json.loads((tmp_path / "run/result.json").read_text())["knn_top1"] is None
    assert (tmp_path / "run/neighbors.png").exists()
    line = [*flags, "--data", str(plain), "--out", "judged", "--epochs", "1"]
    assert main([*line, "--eval-data", str(folder / "test")]) == 0
    assert "every tenth image, of" in capsys.readouterr().out
    assert json.loads((tmp_path / "judged/result.json").read_text())["knn_top1"] is not None


def test_eval_data_is_a_set_of_its_own(flags: list[str], folder: Path, capsys):
    line = [*flags, "--data", str(folder / "train"), "--dry-run", "--eval-data"]
    assert main([*line, str(folder / "test")]) == 0
    assert "32 images" in json.loads(capsys.readouterr().out)["evaluation"]
    assert main([*line, "shapes"]) == 1
    assert "its classes are not those of" in capsys.readouterr().err


def test_a_runs_config_file_repeats_it(flags: list[str], whole: Path, tmp_path: Path):
    assert main(["--config", str(whole / "config.json"), "--out", "second"]) == 0
    assert_same_run(whole, tmp_path / "second")


def test_a_dry_run_shows_every_setting_and_writes_nothing(flags: list[str], tmp_path, capsys):
    assert main([*flags, "--dry-run", "--out", "run"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert plan["config"]["lr"] == 0.05 and plan["config"]["temperature"] == 0.1
    assert "128 images" in plan["images"] and plan["backend"]
    assert list(tmp_path.iterdir()) == []


def test_views_are_shown(flags: list[str], tmp_path: Path, capsys):
    from PIL import Image

    line = [*flags, "--student-view", "byol_second", "--show-views", "5"]
    assert main([*line, "--dry-run"]) == 0
    assert main([*line, "--max-steps", "1", "--out", "run"]) == 0
    assert "views      run/views.png" in capsys.readouterr().out
    assert (tmp_path / "views.png").read_bytes() == (tmp_path / "run/views.png").read_bytes()
    with Image.open(tmp_path / "views.png") as sheet:
        # 3 columns (image, student's, teacher's) and 5 rows of 96 pixels, two apart.
        assert sheet.size == (3 * 98 + 2, 5 * 98 + 2)
