"""Where the numbers and pictures of a run go besides its folder: TensorBoard, wandb, MLflow."""

from __future__ import annotations

import importlib.util
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from softcl.errors import ConfigError, RunError

LOGGERS = ("wandb", "mlflow")
PROJECT = "softcl"  # or what WANDB_PROJECT and MLFLOW_EXPERIMENT_NAME say
_NOT_NUMBERS = ("step", "epoch", "seconds")


class Logger(Protocol):
    """What each of them can."""

    def numbers(self, row: Mapping[str, Any]) -> None:
        """A row of metrics.jsonl."""

    def picture(self, name: str, path: Path) -> None:
        """A PNG file of the run's folder."""

    def flush(self) -> None:
        """Nothing may be lost from here on."""

    def close(self) -> None:
        """The end of this part of the run."""


def numbers_of(row: Mapping[str, Any]) -> dict[str, float]:
    """The measures in a row, without those that the step has none of."""
    return {k: v for k, v in row.items() if k not in _NOT_NUMBERS and v is not None}


class TensorBoard:
    """Events in the run's folder; from `resumed_at` on they replace what older files say."""

    def __init__(self, path: Path, settings: Mapping[str, Any], resumed_at: int | None) -> None:
        from torch.utils.tensorboard import SummaryWriter

        purge = None if resumed_at is None else resumed_at + 1
        self._events = SummaryWriter(str(path), purge_step=purge)
        self._step = 0
        if resumed_at is None:
            lines = [f"| {name} | {value} |" for name, value in settings.items()]
            self._events.add_text("settings", "\n".join(["| setting | |", "|---|---|", *lines]), 0)

    def numbers(self, row: Mapping[str, Any]) -> None:
        self._step = row["step"]
        for name, value in numbers_of(row).items():
            self._events.add_scalar(name, value, self._step)

    def picture(self, name: str, path: Path) -> None:
        import numpy as np
        from PIL import Image

        with Image.open(path) as image:
            pixels = np.asarray(image.convert("RGB"))
        self._events.add_image(name, pixels, self._step, dataformats="HWC")

    def flush(self) -> None:
        self._events.flush()

    def close(self) -> None:
        try:
            self._events.close()
        except OSError:  # after a failed write its thread still holds bytes that the disk refuses
            pass


class WandB:
    """Weights & Biases. A resumed run goes on with its own page, found by the folder's id."""

    def __init__(self, path: Path, settings: Mapping[str, Any], identity: str) -> None:
        import wandb

        self._wandb = wandb
        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", PROJECT),
            name=path.name,
            id=identity,
            dir=str(path),
            config=dict(settings),
            resume="allow",
        )
        # Of their own accord steps may only rise, and after a crash some come again.
        self._run.define_metric("*", step_metric="step")

    def numbers(self, row: Mapping[str, Any]) -> None:
        self._run.log({"step": row["step"], **numbers_of(row)})

    def picture(self, name: str, path: Path) -> None:
        self._run.log({name: self._wandb.Image(str(path))})

    def flush(self) -> None:
        pass

    def close(self) -> None:
        self._run.finish()


class MLflow:
    """MLflow, where MLFLOW_TRACKING_URI says. A resumed run goes on with its own record."""

    def __init__(self, path: Path, settings: Mapping[str, Any], identity: str) -> None:
        from mlflow.entities import Metric, Param
        from mlflow.tracking import MlflowClient

        self._metric, self._client = Metric, MlflowClient()
        name = os.environ.get("MLFLOW_EXPERIMENT_NAME", PROJECT)
        experiment = self._client.get_experiment_by_name(name)
        number = experiment.experiment_id if experiment else self._client.create_experiment(name)
        tag = f"tags.softcl_run = '{identity}'"
        found = self._client.search_runs([number], filter_string=tag, max_results=1)
        if found:
            self._id = found[0].info.run_id
            self._client.set_terminated(self._id, "RUNNING")
            return
        run = self._client.create_run(number, run_name=path.name, tags={"softcl_run": identity})
        self._id = run.info.run_id
        params = [Param(key, str(value)[:500]) for key, value in settings.items()]
        for start in range(0, len(params), 100):  # of one request
            self._client.log_batch(self._id, params=params[start : start + 100])

    def numbers(self, row: Mapping[str, Any]) -> None:
        now, step = int(time.time() * 1000), row["step"]
        metrics = [self._metric(k, float(v), now, step) for k, v in numbers_of(row).items()]
        self._client.log_batch(self._id, metrics=metrics)

    def picture(self, name: str, path: Path) -> None:
        self._client.log_artifact(self._id, str(path))

    def flush(self) -> None:
        pass

    def close(self) -> None:
        self._client.set_terminated(self._id)


def check_logger(name: str | None) -> None:
    """Refuse a logger that is not installed.

    Raises:
        ConfigError: with the line that installs it.
    """
    if name is not None and importlib.util.find_spec(name) is None:
        raise ConfigError("log", name, f'is not installed: pip install "softcl[{name}]"')


def open_logger(name: str, path: Path, settings: Mapping[str, Any], identity: str) -> Logger:
    """The logger of that name.

    Raises:
        RunError: it cannot start; the line says how to do without a network.
    """
    kind, offline = {
        "wandb": (WandB, "WANDB_MODE=offline keeps it on the disk"),
        "mlflow": (MLflow, "without MLFLOW_TRACKING_URI it is kept on the disk"),
    }[name]
    try:
        return kind(path, settings, identity)
    except Exception as error:  # of many kinds, each library's own
        line = (str(error).splitlines() or [""])[0]
        reason = f"{type(error).__name__}: {line}"
        raise RunError(f"--log {name}: cannot start ({reason}); {offline}") from error
