"""The numbers of a run between two lines of its log."""

from __future__ import annotations

import math
import time
from typing import Any

import torch
from torch import Tensor

from softcl.training.step import MEASURES

FIRST_STEPS = 50  # each has a line of its own


class Diverged(RuntimeError):
    """The loss is no longer a finite number."""


class Meter:
    """Collects the measures of each step and makes them into rows.

    Measures stay on the device until a row is due. On a GPU the host looks at each loss one step
    late, when the next step has been launched, so that it never waits for an idle device. The rows
    depend on the steps alone, not on where a run was interrupted: what is pending goes into the
    checkpoint.

    Args:
        every: steps per row after the first FIRST_STEPS.
        batch_size: N.
    """

    def __init__(self, every: int, batch_size: int) -> None:
        self.every, self.batch_size = every, batch_size
        self._pending: list[tuple[int, float, Tensor]] = []  # step, lr, measures (5,)
        self._watched: tuple[int, Tensor, Any] | None = None  # step, its loss's copy, its arrival
        self._since, self._waited = time.perf_counter(), 0.0
        self._timed_steps = 0
        self.images_per_s = self.data_wait = math.nan
        self.loss = math.nan

    def add(self, step: int, lr: float, measures: Tensor) -> None:
        """Record a step and check its loss; on a GPU that of the step before.

        Raises:
            Diverged: naming the step.
        """
        self._pending.append((step, lr, measures))
        self._timed_steps += 1
        if measures.device.type == "cpu":
            _check_loss(step, float(measures[0]))
        else:
            self._watch(step, *_copy_to_host(measures[0]))

    def _watch(self, step: int, loss: Tensor, arrival: Any) -> None:
        """Check the loss that was on its way to the host during the last step."""
        watched, self._watched = self._watched, (step, loss, arrival)
        if watched is not None:
            before, loss, arrival = watched
            arrival.synchronize()
            _check_loss(before, float(loss))

    def due(self, step: int, last_step: int) -> bool:
        """Whether rows are due after this many steps."""
        if self._pending and self._pending[0][2].device.type == "cpu" and step <= FIRST_STEPS:
            return True
        return step % self.every == 0 or step == last_step

    def rows(self, waited: float) -> list[dict[str, Any]]:
        """The rows that are due, emptied out of the meter.

        Args:
            waited: seconds spent waiting for data since the run started.

        Raises:
            Diverged: naming the first step whose loss is not finite.
        """
        if not self._pending:
            return []
        values = self._values()
        self._measure_speed(waited)
        early = [row for row in values if row["step"] <= FIRST_STEPS]
        late = [row for row in values if row["step"] > FIRST_STEPS]
        rows = [*early, _mean(late)] if late else early
        self.loss = rows[-1]["loss"]
        self._pending.clear()
        for row in rows:
            row.update(images_per_s=self.images_per_s, data_wait=self.data_wait)
        return rows

    def _values(self) -> list[dict[str, Any]]:
        table = torch.stack([measures for _, _, measures in self._pending]).tolist()
        values = []
        for (step, lr, _), measures in zip(self._pending, table, strict=True):
            _check_loss(step, measures[0])
            values.append({"step": step, "lr": lr, **dict(zip(MEASURES, measures, strict=True))})
        return values

    def check(self) -> None:
        """Look at the pending losses (before a checkpoint is written).

        Raises:
            Diverged: as `rows`.
        """
        if self._pending:
            self._values()

    def _measure_speed(self, waited: float) -> None:
        seconds = max(time.perf_counter() - self._since, 1e-9)
        self.images_per_s = self._timed_steps * self.batch_size / seconds
        self.data_wait = min((waited - self._waited) / seconds, 1.0)
        self.restart(waited)

    def restart(self, waited: float) -> None:
        """Measure the speed from now on."""
        self._since, self._waited, self._timed_steps = time.perf_counter(), waited, 0

    def skip(self, seconds: float) -> None:
        """Leave the last `seconds`, spent on something else than training, out of the speed."""
        self._since += seconds

    def state_dict(self) -> dict[str, Any]:
        pending = [(step, lr, measures.tolist()) for step, lr, measures in self._pending]
        return {"pending": pending}

    def load_state_dict(self, state: dict[str, Any], device: torch.device) -> None:
        self._pending = [
            (step, lr, torch.tensor(measures, device=device))
            for step, lr, measures in state["pending"]
        ]


def _copy_to_host(value: Tensor) -> tuple[Tensor, torch.cuda.Event]:
    """A copy under way to the host, and the event after which it is there."""
    copy = torch.empty(value.shape, dtype=value.dtype, pin_memory=True)
    copy.copy_(value, non_blocking=True)
    arrival = torch.cuda.Event()
    arrival.record()
    return copy, arrival


def _check_loss(step: int, loss: float) -> None:
    if not math.isfinite(loss):
        raise Diverged(f"the loss of step {step} is {loss}")


def _mean(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """One row for several steps: the last step and rate, the means of the measures."""
    mean = {name: math.fsum(row[name] for row in rows) / len(rows) for name in MEASURES}
    return {"step": rows[-1]["step"], "lr": rows[-1]["lr"], **mean}
