"""``python -m softcl.train``: train a backbone without labels, and show how good it has become.

Under torchrun every process runs all of this; the first one alone writes and prints. The order of
things, in softcl/training/: flags.py -> configuration (config.py, settings.py) ->
images, networks, backend (build.py) -> steps (run.py, step.py) -> run folder (run_folder.py); and
softcl/evaluation/ for the k-NN score.
"""

from __future__ import annotations

import importlib.util
import json
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from softcl.data import DataError
from softcl.data.kernels import describe_kernel
from softcl.distributed import ALONE, PeerError, World
from softcl.training.allocator import keep_freed_pages
from softcl.training.build import Parts, RunError, assemble, fingerprint
from softcl.training.checkpoint import CheckpointError
from softcl.training.config import ConfigError, TrainConfig
from softcl.training.describe import describe, device_name, versions
from softcl.training.flags import parse_flags, report
from softcl.training.interrupt import StopRequest, StopVote
from softcl.training.meter import Diverged
from softcl.training.progress import SilentProgress, make_progress
from softcl.training.resume import StoredRun, read_run, settle_auto, settle_restart
from softcl.training.run import Run
from softcl.training.run_folder import Onlooker, RunFolder, RunFolderError
from softcl.training.view_sheet import SHEET, draw_views
from softcl.training.views import build_views

EXTRAS = ("timm", "torchvision", "PIL", "rich", "tensorboard")  # of softcl[train]
RUNS = Path("runs")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; every expected failure is one line on stderr.

    Returns:
        0 done, 1 could not run, 2 wrong flags, 130 stopped by Ctrl-C, 143 by SIGTERM.
    """
    keep_freed_pages()
    world = ALONE
    try:
        given = parse_flags(sys.argv[1:] if argv is None else argv)
        config = TrainConfig(**given)
        require_extras()
        world = join(config)
        given = world.first(lambda: settle_auto(settle_restart(given, os.environ)))
        config = TrainConfig(**given)
        if config.resume is None:
            code = start(config, world)
        else:
            code = resume(world.first(lambda: read_run(given)), world)
        world.close()
        return code
    except ConfigError as error:
        return _report(error, str(error), 2)
    except (RunError, RunFolderError, CheckpointError, DataError, PeerError) as error:
        return _report(error, str(error), 1)
    except OSError as error:
        path = f"{error.filename}: " if error.filename else ""
        return _report(error, f"{path}{error.strerror or error}", 1)
    except KeyboardInterrupt as error:  # before the first step: nothing to save yet
        return _report(error, "stopped before the first step", 130)


def join(config: TrainConfig) -> World:
    """The processes of this run: those that torchrun started, or this one alone.

    Raises:
        ConfigError: a machine has more processes than devices.
        PeerError: the others cannot be reached.
    """
    cuda = config.device != "cpu" and torch.cuda.is_available()
    local = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    if cuda and local > max(torch.cuda.device_count(), 1):
        reason = f"{local} processes on a machine with {torch.cuda.device_count()} CUDA devices"
        raise ConfigError("device", config.device, reason)
    world = World.start(cuda)
    world.even = True  # a step's batch is divided evenly, and the images left over are dropped
    return world


def _report(error: BaseException, message: str, code: int) -> int:
    """`report`, once where every process has the same to say."""
    rank = int(os.environ.get("RANK", "0"))
    if rank > 0 and (getattr(error, "told", False) or code in (2, 130)):
        return code
    return report(f"process {rank}: {message}" if rank > 0 else message, code)


def require_extras() -> None:
    missing = [name for name in EXTRAS if importlib.util.find_spec(name) is None]
    if missing:
        named = ", ".join("pillow" if name == "PIL" else name for name in missing)
        raise RunError(f'training needs {named}: pip install "softcl[train]"')


def start(config: TrainConfig, world: World = ALONE) -> int:
    """A new run."""
    out = None if config.out is None else Path(config.out).expanduser()
    if out is not None:
        world.first(lambda: RunFolder.check_free(out, overwrite=config.overwrite))
    parts = assemble(config, world)
    if config.dry_run:
        return world.first(lambda: show_plan(parts))

    def create() -> RunFolder:
        if out is not None:
            return RunFolder.create(out, overwrite=config.overwrite)
        data = Path(config.data.partition(":")[0]).expanduser().resolve().name
        return RunFolder.create_next(RUNS, f"{config.method}-{data}")

    # Only now, when everything else is known to work, is a run that is to be overwritten removed.
    with folder_of_first(create, world) as folder:
        run = Run(parts, folder, make_progress() if world.is_first else SilentProgress())
        describe(run)
        run.write_config()
        run.show_views()
        run.measure_baselines()
        return carry_out(run)


def folder_of_first(make: Callable[[], RunFolder], world: World) -> RunFolder:
    """The run's folder, made by the first process; the others look on."""
    made: list[RunFolder] = []

    def make_and_name() -> Path:
        made.append(make())
        return made[0].path

    path = world.first(make_and_name)
    return made[0] if made else Onlooker(path)


def show_plan(parts: Parts) -> int:
    """--dry-run: every setting as it would be, as config.json has it, and nothing is written."""
    content = {
        "config": parts.config.to_dict(),
        "defaults": parts.defaults,
        "images": parts.images.describe(),
        "evaluation": parts.evaluation,
        "backend": str(parts.backend),
        "views": describe_kernel(parts.knn.device, parts.config.view_kernel),
        "device": device_name(parts.knn.device),
        "versions": versions(),
    }
    print(json.dumps(content, indent=2))
    if parts.config.show_views is not None:
        config, path = parts.config, Path(SHEET)
        size, method = config.image_size, parts.state.method
        views = build_views(method, parts.images, size, config.view_kernel)
        draw_views(path, parts.images, views, size, config.show_views, config.seed)
    return 0


def resume(stored: StoredRun, world: World = ALONE) -> int:
    """A run continued from a checkpoint, by any number of processes."""
    if stored.finished:
        world.first(lambda: print(f"{stored.folder}: finished, nothing to resume"))
        return 0
    parts = assemble(stored.config, world)
    if fingerprint(parts.images) != stored.content["fingerprint"]:
        reason = f"not the images that {stored.folder} was trained on"
        raise DataError(f"{stored.config.data}: {reason}")
    if stored.config.dry_run:
        return world.first(lambda: show_plan(parts))
    for line in stored.warnings if world.is_first else ():
        report(f"warning: {line}; going on from {stored.checkpoint}", 0)

    def reopen() -> RunFolder:
        return RunFolder.reopen(stored.folder, stored.content["step"], stored.checkpoint)

    with folder_of_first(reopen, world) as folder:
        run = Run(parts, folder, make_progress() if world.is_first else SilentProgress())
        describe(run)
        run.measure_baselines()
        run.load(stored.content)
        run.progress.say(f"resumed    at step {run.state.step} of {run.total_steps}")
        return carry_out(run)


def carry_out(run: Run) -> int:
    """Train, evaluate and write everything; the exit code."""
    try:
        with StopRequest() as stop:
            vote = StopVote(run.world, stop)
            run.train(vote)
            run.save()
            exit_code = vote.settle()
            if run.state.step == run.total_steps and exit_code is None:
                run.finish()
            else:
                run.say_stopped()
            return vote.settle() or 0
    except PeerError as error:
        raise PeerError(f"{error}; {run.last_checkpoint()}") from error
    except Diverged as error:
        raise RunError(f"{error}; {run.last_checkpoint()}") from error
    except OSError as error:
        path = error.filename or run.folder.path
        raise RunError(f"{path}: {error.strerror or error}; {run.last_checkpoint()}") from error
    finally:
        run.close()


if __name__ == "__main__":
    sys.exit(main())
