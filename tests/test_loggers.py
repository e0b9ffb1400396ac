"""--log: what wandb and MLflow are told, by stand-ins and, where they are installed, offline."""

from __future__ import annotations

import importlib.util
import sys
import types
from collections.abc import Iterator
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from softcl.train import loggers
from softcl.train.__main__ import main
from softcl.train.folder import read_metrics


def install(monkeypatch, name: str, **content: Any) -> None:
    module = types.ModuleType(name)
    module.__spec__ = ModuleSpec(name, None)
    module.__dict__.update(content)
    monkeypatch.setitem(sys.modules, name, module)


class Page:
    """A run of wandb, as far as softcl uses one; it fails from the so-many-th row on."""

    def __init__(self, fails_at: int | None = None) -> None:
        self.rows: list[dict] = []
        self.finished, self.fails_at = 0, fails_at

    def define_metric(self, name: str, step_metric: str) -> None:
        assert (name, step_metric) == ("*", "step")

    def log(self, row: dict) -> None:
        if len(self.rows) == self.fails_at:
            raise ConnectionError("no route to host\nand more")
        self.rows.append(row)

    def finish(self) -> None:
        self.finished += 1


@pytest.fixture
def pages(monkeypatch) -> dict[str, Any]:
    made: dict[str, Any] = {"starts": [], "page": Page()}
    install(
        monkeypatch,
        "wandb",
        init=lambda **options: made["starts"].append(options) or made["page"],
        Image=lambda path: ("picture", path),
    )
    return made


def numbers(path: Path) -> list[dict]:
    """The rows of metrics.jsonl as loggers get them."""
    rows = read_metrics(path / "metrics.jsonl")
    return [{"step": row["step"], **loggers.numbers_of(row)} for row in rows]


def test_wandb_has_the_numbers_the_pictures_and_the_settings(pages, flags, tmp_path: Path):
    line = [*flags, "--out", "run", "--log", "wandb", "--show-views", "4", "--max-steps", "5"]
    assert main(line) == 0 and main(["--resume", "run"]) == 0
    first, again = pages["starts"]
    assert first["id"] == again["id"] and first["resume"] == "allow"
    assert first["project"] == "softcl" and first["config"]["queue_size"] == 64
    rows = [row for row in pages["page"].rows if "step" in row]
    assert rows == numbers(tmp_path / "run")
    assert {"loss", "lr", "step"} <= set(rows[0]) and any("knn_top1" in row for row in rows)
    pictures = [row for row in pages["page"].rows if "step" not in row]
    views, neighbors = (str(Path("run") / name) for name in ("views.png", "neighbors.png"))
    assert pictures == [{"views": ("picture", views)}, {"neighbors": ("picture", neighbors)}]
    assert pages["page"].finished == 2


def test_a_logger_that_fails_in_the_middle_is_left_out(pages, flags, tmp_path: Path, capsys):
    pages["page"] = Page(fails_at=3)
    assert main([*flags, "--out", "run", "--log", "wandb"]) == 0
    warnings = [line for line in capsys.readouterr().out.splitlines() if "--log" in line]
    reason = "ConnectionError: no route to host; going on without it"
    assert warnings == [f"warning    --log wandb: {reason}"]
    assert len(numbers(tmp_path / "run")) == 10  # nothing is lost


def test_a_logger_that_cannot_start_or_is_missing_is_one_line(flags, monkeypatch, capsys):
    def refuse(**_: Any) -> None:
        raise OSError("api key\nis missing")

    install(monkeypatch, "wandb", init=refuse)
    assert main([*flags, "--out", "run", "--log", "wandb"]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    reason = "--log wandb: cannot start (OSError: api key); WANDB_MODE=offline keeps it on the disk"
    assert line == f"softcl.train: {reason}"
    nothing = SimpleNamespace(util=SimpleNamespace(find_spec=lambda name: None))
    monkeypatch.setattr(loggers, "importlib", nothing)
    with pytest.raises(loggers.ConfigError, match=r'not installed: pip install "softcl\[mlflow\]"'):
        loggers.check_logger("mlflow")
    loggers.check_logger(None)


class Records:
    """MLflow's client, as far as softcl uses it."""

    def __init__(self) -> None:
        self.experiments: dict[str, str] = {}
        self.runs: list[SimpleNamespace] = []

    def __call__(self) -> Records:
        return self

    def get_experiment_by_name(self, name: str) -> SimpleNamespace | None:
        number = self.experiments.get(name)
        return None if number is None else SimpleNamespace(experiment_id=number)

    def create_experiment(self, name: str) -> str:
        self.experiments[name] = str(len(self.experiments))
        return self.experiments[name]

    def search_runs(self, numbers: list[str], filter_string: str, max_results: int) -> list:
        wanted = filter_string.split("'")[1]
        return [run for run in self.runs if run.tags["softcl_run"] == wanted][:max_results]

    def create_run(self, number: str, run_name: str, tags: dict[str, str]) -> SimpleNamespace:
        info = SimpleNamespace(run_id=str(len(self.runs)))
        run = SimpleNamespace(
            info=info, name=run_name, tags=tags, metrics=[], params=[], files=[], states=[]
        )
        self.runs.append(run)
        return run

    def log_batch(self, run: str, metrics=(), params=()) -> None:
        assert len(params) <= 100
        self.runs[int(run)].metrics += metrics
        self.runs[int(run)].params += params

    def log_artifact(self, run: str, path: str) -> None:
        self.runs[int(run)].files.append(path)

    def set_terminated(self, run: str, status: str = "FINISHED") -> None:
        self.runs[int(run)].states.append(status)


def test_mlflow_has_one_record_of_a_run_and_its_resumption(flags, tmp_path: Path, monkeypatch):
    records = Records()
    pair = SimpleNamespace
    install(monkeypatch, "mlflow")
    install(
        monkeypatch,
        "mlflow.entities",
        Metric=lambda key, value, timestamp, step: (step, key, value),
        Param=lambda key, value: pair(key=key, value=value),
    )
    install(monkeypatch, "mlflow.tracking", MlflowClient=records)
    assert main([*flags, "--out", "run", "--log", "mlflow", "--max-steps", "5"]) == 0
    assert main(["--resume", "run"]) == 0
    (run,) = records.runs
    assert run.name == "run" and run.states == ["FINISHED", "RUNNING", "FINISHED"]
    assert {"queue_size", "lr", "method"} <= {param.key for param in run.params}
    expected = {
        (row["step"], key, value)
        for row in numbers(tmp_path / "run")
        for key, value in row.items()
        if key != "step"
    }
    assert set(run.metrics) == expected and run.files == [str(Path("run/neighbors.png"))]


def test_tensorboard_has_the_pictures_and_the_settings(flags, tmp_path: Path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    assert main([*flags, "--out", "run", "--show-views", "4"]) == 0
    events = EventAccumulator(str(tmp_path / "run"))
    events.Reload()
    assert {"views", "neighbors"} <= set(events.Tags()["images"])
    assert "settings/text_summary" in events.Tags()["tensors"]
    (settings,) = events.Tensors("settings/text_summary")
    assert b"| queue_size | 64 |" in settings.tensor_proto.string_val[0]


@pytest.fixture
def offline(monkeypatch, tmp_path: Path) -> Iterator[None]:
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    yield


@pytest.mark.parametrize("name", loggers.LOGGERS)
def test_the_real_ones_run_offline(name: str, flags, tmp_path: Path, offline):
    if importlib.util.find_spec(name) is None:
        pytest.skip(f"{name} is not installed")
    assert main([*flags, "--out", "run", "--log", name, "--max-steps", "3"]) == 0
    if name == "wandb":
        assert list((tmp_path / "run/wandb").glob("offline-run-*"))
    else:
        from mlflow.tracking import MlflowClient

        (run,) = MlflowClient().search_runs(["1"])
        losses = [row["loss"] for row in numbers(tmp_path / "run") if "loss" in row]
        assert run.data.metrics["loss"] == pytest.approx(losses[-1])
