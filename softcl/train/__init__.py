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
folder        what is on disk, who may write there, how a run goes on
checkpoint    how it gets there whole
parallel      what changes among several processes, and how they stop
optim         the optimisers, and what changes by plan from step to step
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from softcl.command import ConfigError, from_flag, need, report_for
from softcl.data import DataError
from softcl.distributed import ALONE, PeerError, World
from softcl.distributed.world import number_from
from softcl.files import user_path
from softcl.train.config import TrainConfig, own_settings
from softcl.train.folder import (
    RESULT,
    VIEWS,
    RunFolder,
    StoredRun,
    read_json,
    read_run,
    settle_auto,
    settle_restart,
)
from softcl.train.images import fingerprint
from softcl.train.log import record
from softcl.train.loop import Run
from softcl.train.parallel import StopRequest, StopVote, check_same_settings
from softcl.train.parts import Parts, RunError, assemble
from softcl.train.pictures import draw_views
from softcl.train.step import Diverged

__all__ = ["Fitted", "fit"]

EXTRAS = ("timm", "torchvision", "PIL", "rich", "tensorboard", "filelock")  # of softcl[train]
RUNS = Path("runs")


@dataclass(frozen=True)
class Fitted:
    """What came of a run.

    Attributes:
        exit_code: 0 done, 130 stopped by Ctrl-C, 143 by SIGTERM; then `resume=folder` goes on.
        folder: of the run; None after a dry run.
        result: the content of result.json; None where the run did not reach its end.
    """

    exit_code: int
    folder: Path | None = None
    result: dict[str, Any] | None = None


def fit(**given: Any) -> Fitted:
    """Train as ``python -m softcl.train`` does: a setting for each of its flags, by name.

    Under torchrun every process calls it; the first one alone writes and prints.

    Raises:
        ConfigError: a setting that cannot be used.
        RunError, RunFolderError, CheckpointError, WeightsError, DataError, PeerError, ImportError:
            the run cannot start or go on; the message is one line.
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
    if stored is not None and stored.finished:
        world.on_main_process(lambda: print(f"{stored.folder}: finished, nothing to resume"))
        fitted = Fitted(0, stored.folder, read_json(stored.folder / RESULT))
    else:
        config = TrainConfig.of(**given) if stored is None else stored.config
        fitted = start(config, stored, world)
    world.close()
    return fitted


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


def start(config: TrainConfig, stored: StoredRun | None = None, world: World = ALONE) -> Fitted:
    """A new run, or a stored one from its checkpoint on, by any number of processes."""
    out = None if config.out is None else user_path(config.out)
    if stored is None and out is not None:
        with from_flag("out"):
            world.on_main_process(lambda: RunFolder.check_free(out, overwrite=config.overwrite))
    parts = assemble(config, world, None if stored is None else stored.content)
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
        data = os.path.basename(os.path.realpath(user_path(config.data.partition(":")[0])))
        return RunFolder.create_next(RUNS, f"{config.method}-{data}")

    # Only now, when everything else is known to work, is a run that is to be overwritten removed.
    with first_opens(open_folder, world) as (path, folder), Run(parts, path, folder) as run:
        run.begin(None if stored is None else stored.content)
        return carry_out(run)


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


def show_plan(parts: Parts) -> Fitted:
    """--dry-run: every setting as it would be, as config.json has it, and no run is written."""
    config = parts.config

    def show() -> None:
        print(json.dumps(record(parts, config), indent=2))
        if config.show_views is not None:
            size, count = config.image_size, config.show_views
            draw_views(Path(VIEWS), parts.images, parts.views, size, count, config.seed)

    parts.world.on_main_process(show)
    return Fitted(0)


def carry_out(run: Run) -> Fitted:
    """Train, evaluate and write everything."""
    result = None
    try:
        with StopRequest() as stop:
            vote = StopVote(run.world, stop)
            run.train(vote)
            run.save()
            exit_code = vote.settle()
            if run.state.step == run.total_steps and exit_code is None:
                result = run.finish()
            else:
                run.say_stopped()
            return Fitted(vote.settle() or 0, run.path, result)
    except PeerError as error:
        raise PeerError(f"{error}; {run.last_checkpoint()}") from error
    except Diverged as error:
        raise RunError(f"{error}; {run.last_checkpoint()}") from error
    except OSError as error:
        path = error.filename or run.path
        raise RunError(f"{path}: {error.strerror or error}; {run.last_checkpoint()}") from error
