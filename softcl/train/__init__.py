"""Training: ``python -m softcl.train``, or `fit` from Python.

    from softcl.train import fit
    fit(data="shapes", method="snclr", epochs=2, out="run")

__main__      the command: flags, help, errors
config        the settings, of which flags are made; defaults: what they leave open
images        image sets, views and batches
parts         everything a run is made of
step          one training step, and the state that it changes
loop          steps, evaluations, checkpoints; here: how a run starts and goes on
log           rows, lines and diagnoses; pictures: two PNG files
given         objects of Python's in place of settings
folder        what is on disk, who may write there, how a run goes on
checkpoint    how it gets there whole
parallel      what changes among several processes, and how they stop
online        a classifier beside the run
optim         the optimisers, and what changes by plan from step to step
"""

from __future__ import annotations

import contextlib
import copy
import json
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from softcl.command import from_flag, need, reason_of, report_for
from softcl.distributed import ALONE, World
from softcl.distributed.world import number_from
from softcl.errors import ConfigError, DataError, Diverged, PeerError, RunError
from softcl.files import user_path
from softcl.train.checkpoint import backbone_weights, load_backbone
from softcl.train.config import TrainConfig, own_settings
from softcl.train.folder import (
    METRICS,
    RESULT,
    VIEWS,
    RunFolder,
    StoredRun,
    read_json,
    read_metrics,
    read_run,
    settle_auto,
    settle_restart,
)
from softcl.train.given import NOTHING, Callback, Given, Moment, sort_arguments
from softcl.train.images import fingerprint
from softcl.train.log import record
from softcl.train.loop import Loop
from softcl.train.parallel import StopRequest, StopVote, check_same_settings
from softcl.train.parts import Parts, assemble
from softcl.train.pictures import draw_views

__all__ = ["Moment", "Run", "fit"]

EXTRAS = ("timm", "torchvision", "PIL", "rich", "tensorboard", "filelock")  # of softcl[train]
RUNS = Path("runs")


@dataclass(frozen=True)
class Run:
    """What came of a run.

    Attributes:
        exit_code: 0 done, 130 stopped by Ctrl-C, 143 by SIGTERM; then `resume=folder` goes on.
        folder: of the run; None after a dry run.
        result: the content of result.json; None where the run did not reach its end.
        backbone: the student's, in evaluation mode, on the run's device: images (N, 3, S, S),
            normalised -> features (N, F); None after a dry run.
    """

    exit_code: int
    folder: Path | None = None
    result: dict[str, Any] | None = None
    backbone: nn.Module | None = None

    @property
    def history(self) -> list[dict[str, Any]]:
        """The rows of metrics.jsonl: of steps (loss, lr, ...) and of evaluations (knn_top1)."""
        if self.folder is None or not (self.folder / METRICS).exists():
            return []
        return read_metrics(self.folder / METRICS)

    @property
    def knn(self) -> float | None:
        """k-NN accuracy at the last evaluation; None without labels."""
        return next((row["knn_top1"] for row in self.history[::-1] if "knn_top1" in row), None)


def fit(
    *,
    data: Any = None,
    method: str | None = None,
    backbone: str | nn.Module | None = None,
    teacher: str | nn.Module | None = None,
    eval_data: Any = None,
    on_step: Callback | None = None,
    on_epoch: Callback | None = None,
    **numbers: Any,
) -> Run:
    """Train as ``python -m softcl.train`` does; Ctrl-C saves, and ``resume=run.folder`` goes on.

    Under torchrun every process calls it; the first one alone writes and prints.

    Args:
        data: what --data takes; or an object: uint8 images (M, 3, H, W), an ``ImageSet``, or a data
            set of images, with labels or without (`softcl.data.image_set_of`).
        method: a name of ``softcl.methods.METHODS``; "ascl" if not said.
        backbone: a name, as --arch takes it, or any module from (N, 3, S, S) to (N, F). The module
            is copied; ``Run.backbone`` is the trained copy.
        teacher: of method "seed": what --teacher takes, or a module as ``backbone``.
        eval_data: labelled images for k-NN, as ``data``.
        on_step, on_epoch: called with a `Moment` after each. Where one raises, the run is saved.
        numbers: any other flag by its name, such as epochs, lr, temperature, out, resume.

    Raises:
        softcl.errors.ConfigError: a setting that cannot be used.
        softcl.errors.SoftclError: the run cannot start or go on; the message is one line.
    """
    try:
        settings, given = sort_arguments(
            dict(
                data=data, method=method, backbone=backbone, teacher=teacher, eval_data=eval_data,
                on_step=on_step, on_epoch=on_epoch, **numbers,
            )
        )  # fmt: skip
        return run_settings(settings, given, interactive=True)
    except ConfigError as error:
        raise error.as_argument() from error
    except OSError as error:
        raise RunError(reason_of(error)) from error


def run_settings(
    given: dict[str, Any], objects: Given = NOTHING, *, interactive: bool = False
) -> Run:
    """A run of these settings: what the command and `fit` share.

    Args:
        interactive: a second Ctrl-C raises KeyboardInterrupt in place of ending the process.
    """
    given = {name: value for name, value in given.items() if value is not None}
    if "resume" in given:  # of which method is not known yet
        own = own_settings()
        config = TrainConfig(**{name: value for name, value in given.items() if name in own})
    else:
        config = TrainConfig.of(**given)
    need("training", *EXTRAS)
    world = join(config)
    check_same_settings(given, world)
    given = world.on_main_process(lambda: settle_auto(settle_restart(given, os.environ)))
    stored = None
    if "resume" in given:
        with from_flag("resume"):
            stored = world.on_main_process(lambda: read_run(given))
            if stored is not None:
                objects.check_complete(stored.config)
    if stored is not None and stored.finished:
        world.on_main_process(lambda: print(f"{stored.folder}: finished, nothing to resume"))
        run = finished(stored, objects)
    else:
        config = TrainConfig.of(**given) if stored is None else stored.config
        run = start(config, stored, world, objects, interactive=interactive)
    world.close()
    return run


def finished(stored: StoredRun, objects: Given) -> Run:
    """What came of a run that is at its end."""
    if objects.backbone is None:
        backbone = load_backbone(stored.folder).backbone
    else:
        backbone = copy.deepcopy(objects.backbone)
        backbone.load_state_dict(backbone_weights(stored.content["student"]))
    return Run(0, stored.folder, read_json(stored.folder / RESULT), backbone.eval())


def join(config: TrainConfig) -> World:
    """The processes of this run: those that torchrun started, or this one alone.

    Raises:
        ConfigError: a machine has more processes than devices.
        PeerError: the others cannot be reached.
    """
    cuda = config.device != "cpu" and torch.cuda.is_available()
    local = number_from(os.environ, "LOCAL_WORLD_SIZE", 1)
    if cuda and local > max(torch.cuda.device_count(), 1):
        reason = f"{local} processes on a machine with {torch.cuda.device_count()} CUDA devices"
        raise ConfigError("device", config.device, reason)
    world = World.start(cuda)
    world.even = True  # a step's batch is divided evenly, and the images left over are dropped
    return world


def start(
    config: TrainConfig,
    stored: StoredRun | None = None,
    world: World = ALONE,
    objects: Given = NOTHING,
    *,
    interactive: bool = False,
) -> Run:
    """A new run, or a stored one from its checkpoint on, by any number of processes."""
    out = None if config.out is None else user_path(config.out)
    if stored is None and out is not None:
        with from_flag("out"):
            world.on_main_process(lambda: RunFolder.check_free(out, overwrite=config.overwrite))
    content = None if stored is None else stored.content
    parts = assemble(config, world, content, objects)
    if stored is not None and fingerprint(parts.images) != stored.content["fingerprint"]:
        reason = f"not the images that {stored.folder} was trained on"
        raise DataError(f"{config.data}: {reason}")
    if config.dry_run:
        return show_plan(parts)

    def open_folder() -> RunFolder:
        if stored is not None:
            for line in stored.warnings:
                report_for("softcl.train")(f"warning: {line}; going on from {stored.checkpoint}", 0)
            return RunFolder.reopen(stored.folder, stored.content["step"], stored.checkpoint)
        if out is not None:
            return RunFolder.create(out, overwrite=config.overwrite)
        data = config.data.strip("<>").partition(":")[0]
        data = os.path.basename(os.path.realpath(user_path(data)))
        return RunFolder.create_next(RUNS, f"{config.method}-{data}")

    # Only now, when everything else is known to work, is a run that is to be overwritten removed.
    with first_opens(open_folder, world) as (path, folder), Loop(parts, path, folder) as loop:
        loop.begin(None if stored is None else stored.content)
        return carry_out(loop, interactive=interactive)


@contextlib.contextmanager
def first_opens(
    make: Callable[[], RunFolder], world: World
) -> Iterator[tuple[Path, RunFolder | None]]:
    """The path of the run's folder, and in the first process the folder itself."""
    made: list[RunFolder] = []

    def make_and_name() -> Path:
        made.append(make())
        return made[0].path

    path = world.on_main_process(make_and_name)
    try:
        yield path, made[0] if made else None
    finally:
        for folder in made:
            folder.close()


def show_plan(parts: Parts) -> Run:
    """--dry-run: every setting as it would be, as config.json has it, and no run is written."""
    config = parts.config

    def show() -> None:
        print(json.dumps(record(parts, config), indent=2))
        if config.show_views is not None:
            size, count = config.image_size, config.show_views
            draw_views(Path(VIEWS), parts.images, parts.views, size, count, config.seed)

    parts.world.on_main_process(show)
    return Run(0)


def carry_out(loop: Loop, *, interactive: bool = False) -> Run:
    """Train, evaluate and write everything."""
    result = None
    try:
        with StopRequest(interactive=interactive) as stop:
            vote = StopVote(loop.world, stop)
            loop.train(vote)
            loop.save()
            exit_code = vote.settle()
            if loop.state.step == loop.total_steps and exit_code is None:
                result = loop.finish()
            else:
                loop.say_stopped()
            backbone = loop.state.student.backbone.eval()
            return Run(vote.settle() or 0, loop.path, result, backbone)
    except PeerError as error:
        raise PeerError(f"{error}; {loop.last_checkpoint()}") from error
    except Diverged as error:
        raise RunError(f"{error}; {loop.last_checkpoint()}") from error
    except OSError as error:
        path = error.filename or loop.path
        raise RunError(f"{path}: {error.strerror or error}; {loop.last_checkpoint()}") from error
