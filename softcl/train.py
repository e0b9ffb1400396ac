"""``python -m softcl.train``: train a backbone without labels, and show how good it has become.

The order of things: flags (softcl/flags.py) -> configuration (config.py, settings.py) -> images,
networks, backend (build.py) -> steps (step.py) -> k-NN (evaluate.py) -> run folder (run_folder.py).
"""

from __future__ import annotations

import dataclasses
import importlib.util
import sys
from collections.abc import Sequence
from pathlib import Path

from softcl import build
from softcl.allocator import keep_freed_pages
from softcl.build import RunError
from softcl.checkpoint import CheckpointError
from softcl.config import ConfigError, TrainConfig
from softcl.data import DataError
from softcl.flags import parse_flags, report
from softcl.interrupt import StopRequest
from softcl.meter import Diverged
from softcl.progress import make_progress
from softcl.resume import StoredRun, read_run
from softcl.run import Run, describe
from softcl.run_folder import RunFolder, RunFolderError
from softcl.settings import check_method_flags, fill, method_class

EXTRAS = ("timm", "torchvision", "PIL", "rich", "tensorboard")  # of softcl[train]
RUNS = Path("runs")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; every expected failure is one line on stderr.

    Returns:
        0 done, 1 could not run, 2 wrong flags, 130 stopped by Ctrl-C, 143 by SIGTERM.
    """
    keep_freed_pages()
    try:
        given = parse_flags(sys.argv[1:] if argv is None else argv)
        config = TrainConfig(**given)
        require_extras()
        return start(config) if config.resume is None else resume(read_run(given))
    except ConfigError as error:
        return report(str(error), 2)
    except (RunError, RunFolderError, CheckpointError, DataError) as error:
        return report(str(error), 1)
    except OSError as error:
        path = f"{error.filename}: " if error.filename else ""
        return report(f"{path}{error.strerror or error}", 1)
    except KeyboardInterrupt:  # before the first step: nothing to save yet
        return report("stopped before the first step", 130)


def require_extras() -> None:
    missing = [name for name in EXTRAS if importlib.util.find_spec(name) is None]
    if missing:
        named = ", ".join("pillow" if name == "PIL" else name for name in missing)
        raise RunError(f'training needs {named}: pip install "softcl[train]"')


def start(config: TrainConfig) -> int:
    """A new run."""
    method_class(config.method)
    check_method_flags(config)
    build.check_arch(config.arch)
    device = build.resolve_device(config.device)
    if config.out is not None:
        RunFolder.check_free(Path(config.out).expanduser(), overwrite=config.overwrite)
    images, queries, line = build.load_images(config)
    config, method, defaults = fill(config, images, build.image_side(images, config))
    state = build.build_state(config, method, device)
    backend = build.choose_run_backend(config, state)
    knn = build.build_knn(config, images, queries, device)
    if config.out is None:
        stem = f"{config.method}-{images.name.split(' ')[0].strip('./').replace('/', '-')}"
        folder = RunFolder.create_next(RUNS, stem)
        config = dataclasses.replace(config, out=str(folder.path))
    else:
        folder = RunFolder.create(Path(config.out).expanduser(), overwrite=config.overwrite)
    run = Run(config, folder, images, state, knn, backend, make_progress())
    describe(run, defaults, line)
    run.write_config()
    run.measure_baselines()
    return carry_out(run)


def resume(stored: StoredRun) -> int:
    """A run continued from a checkpoint."""
    config = stored.config
    if stored.finished:
        print(f"{stored.folder}: finished, nothing to resume")
        return 0
    build.check_arch(config.arch)
    device = build.resolve_device(config.device)
    images, queries, line = build.load_images(config)
    if build.fingerprint(images) != stored.content["fingerprint"]:
        raise DataError(f"{config.data}: not the images that {stored.folder} was trained on")
    config, method, defaults = fill(config, images, build.image_side(images, config))
    state = build.build_state(config, method, device)
    backend = build.choose_run_backend(config, state)
    knn = build.build_knn(config, images, queries, device)
    folder = RunFolder.reopen(stored.folder, stored.content["step"])
    config = dataclasses.replace(config, out=str(folder.path), resume=None)
    run = Run(config, folder, images, state, knn, backend, make_progress())
    describe(run, defaults, line)
    run.measure_baselines()
    run.load(stored.content)
    run.progress.say(f"resumed    at step {state.step} of {run.total_steps}")
    return carry_out(run)


def carry_out(run: Run) -> int:
    """Train, evaluate and write everything; the exit code."""
    try:
        with StopRequest() as stop:
            run.train(stop)
            run.save()
            if run.state.step == run.total_steps and stop.exit_code is None:
                run.finish()
            else:
                run.say_stopped()
        return stop.exit_code or 0
    except Diverged as error:
        raise RunError(f"{error}; {run.last_checkpoint()}") from error
    finally:
        run.close()


if __name__ == "__main__":
    sys.exit(main())
