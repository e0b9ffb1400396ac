"""Damaged files of a run stop neither --resume nor a report; a damaged checkpoint is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from softcl import evaluate, export, report
from softcl.train.__main__ import main
from softcl.train.checkpoint import ENTRIES, read_checkpoint, write_checkpoint
from softcl.train.folder import read_json, read_metrics, read_run_config

FILES = ("metrics.jsonl", "config.json", "baselines.json")
DAMAGE = {
    "a byte that is no text": lambda old: old[:40] + b"\xff" + old[40:],
    "nothing": lambda old: b"",
    "deep nesting": lambda old: b'{"config": ' + b"[" * 100_000,
    "wrong types": lambda old: json.dumps(
        {"step": [], "config": {"lr": []}, "num_neighbors": {}, "untrained": "x", "knn_top1": []}
    ).encode(),
    "numbers beyond": lambda old: b'{"step": %s, "config": {"lr": 1e999}}' % (b"9" * 400),
    "a list": lambda old: b"[]",
}


@pytest.fixture(scope="module")
def half(folder: Path, tmp_path_factory) -> Path:
    """A run that was stopped after 4 of its 8 steps."""
    from conftest import RUN

    run = tmp_path_factory.mktemp("half") / "run"
    line = ["--data", str(folder), *RUN, "--max-steps", "4", "--out", str(run)]
    assert main([*line, "--knn-every", "1"]) == 0
    return run


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_run_goes_on_and_is_reported(damage: str, half: Path, whole, tmp_path, capsys):
    run = tmp_path / "run"
    shutil.copytree(half, run)
    for name in FILES:
        (run / name).write_bytes(DAMAGE[damage]((run / name).read_bytes()))
    assert report.main([str(run), "--map", "none"]) == 0
    assert main(["--resume", str(run)]) == 0
    capsys.readouterr()
    assert report.main([str(run), "--map", "pca"]) == 0
    assert "note" not in capsys.readouterr().out
    page = (run / "report/index.html").read_text()
    assert "resnet_tiny at 16 px" in page
    ends = [read_checkpoint(path / "last.pt") for path in (run, whole)]
    assert ends[0]["step"] == 8 and ends[0]["accuracy"] == ends[1]["accuracy"]
    assert read_run_config(run / "config.json").lr == 0.05
    assert read_json(run / "baselines.json") == read_json(whole / "baselines.json")
    assert {row["step"] for row in read_metrics(run / "metrics.jsonl")} >= {5, 6, 7, 8}


@pytest.mark.parametrize("name", ENTRIES)
def test_a_sealed_checkpoint_that_lacks_an_entry_is_refused(name: str, whole, tmp_path, capsys):
    content = read_checkpoint(whole / "last.pt")
    path = tmp_path / "last.pt"
    write_checkpoint(path, {key: value for key, value in content.items() if key != name})
    calls = [lambda: main(["--resume", str(tmp_path)])]
    if name in ("step", "config", "student"):
        calls.append(lambda: evaluate.main([str(path), "--device", "cpu"]))
        calls.append(lambda: export.main([str(path), str(tmp_path / "out.safetensors")]))
    for call in calls:
        assert call() == 1
        error = capsys.readouterr().err
        assert f"{path}: not a training checkpoint (without {name!r})" in error
        assert len(error.splitlines()) == 1
    for other in (7, "x", []):
        if isinstance(other, ENTRIES[name]):
            continue
        write_checkpoint(path, {**content, name: other})
        assert main(["--resume", str(path)]) == 1
        assert len(capsys.readouterr().err.splitlines()) == 1


def test_a_checkpoint_that_does_not_fit_is_refused(half: Path, tmp_path: Path, capsys):
    content = read_checkpoint(half / "last.pt")
    for name, other in (
        ("student", {"backbone.conv1.weight": 3}),
        ("optimizer", {"state": 1}),
        ("best", []),
        ("config", {1: 2}),
        ("config", {**content["config"], "epochs": "x"}),
        ("config", {**content["config"], "unheard": 1}),
    ):
        run = tmp_path / "run"
        shutil.copytree(half, run)
        write_checkpoint(run / "last.pt", {**content, name: other})
        assert main(["--resume", str(run)]) == 1, name
        error = capsys.readouterr().err
        assert len(error.splitlines()) == 1 and str(run) in error, error
        shutil.rmtree(run)
