"""``python -m softcl.train``: train a backbone without labels, and show how good it has become.

The order of things, in softcl/training/: flags.py -> configuration (config.py, settings.py) ->
images, networks, backend (build.py) -> steps (run.py, step.py) -> run folder (run_folder.py); and
softcl/evaluation/ for the k-NN score.
"""

from __future__ import annotations

import importlib.util
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from softcl.data import DataError
from softcl.training.allocator import keep_freed_pages
from softcl.training.build import Parts, RunError, assemble, build_views, fingerprint
from softcl.training.checkpoint import CheckpointError
from softcl.training.config import ConfigError, TrainConfig
from softcl.training.flags import parse_flags, report
from softcl.training.interrupt import StopRequest
from softcl.training.meter import Diverged
from softcl.training.progress import make_progress
from softcl.training.resume import StoredRun, read_run, settle_auto
from softcl.training.run import Run, describe, device_name, versions
from softcl.training.run_folder import RunFolder, RunFolderError
from softcl.training.view_sheet import SHEET, draw_views

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
        given = settle_auto(given)
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
    if config.out is not None:
        RunFolder.check_free(Path(config.out).expanduser(), overwrite=config.overwrite)
    parts = assemble(config)
    if config.dry_run:
        return show_plan(parts)
    # Only now, when everything else is known to work, is a run that is to be overwritten removed.
    if config.out is not None:
        folder = RunFolder.create(Path(config.out).expanduser(), overwrite=config.overwrite)
    else:
        data = Path(config.data.partition(":")[0]).expanduser().resolve().name
        folder = RunFolder.create_next(RUNS, f"{config.method}-{data}")
    with folder:
        run = Run(parts, folder, make_progress())
        describe(run)
        run.write_config()
        run.show_views()
        run.measure_baselines()
        return carry_out(run)


def show_plan(parts: Parts) -> int:
    """--dry-run: every setting as it would be, as config.json has it, and nothing is written."""
    content = {
        "config": parts.config.to_dict(),
        "defaults": parts.defaults,
        "images": parts.images.describe(),
        "evaluation": parts.evaluation,
        "backend": str(parts.backend),
        "device": device_name(parts.knn.device),
        "versions": versions(),
    }
    print(json.dumps(content, indent=2))
    if parts.config.show_views is not None:
        config, path = parts.config, Path(SHEET)
        views = build_views(parts.state.method, parts.images, config.image_size)
        draw_views(path, parts.images, views, config.image_size, config.show_views, config.seed)
    return 0


def resume(stored: StoredRun) -> int:
    """A run continued from a checkpoint."""
    if stored.finished:
        print(f"{stored.folder}: finished, nothing to resume")
        return 0
    parts = assemble(stored.config)
    if fingerprint(parts.images) != stored.content["fingerprint"]:
        reason = f"not the images that {stored.folder} was trained on"
        raise DataError(f"{stored.config.data}: {reason}")
    if stored.config.dry_run:
        return show_plan(parts)
    for line in stored.warnings:
        report(f"warning: {line}; going on from {stored.checkpoint}", 0)
    with RunFolder.reopen(stored.folder, stored.content["step"], stored.checkpoint) as folder:
        run = Run(parts, folder, make_progress())
        describe(run)
        run.measure_baselines()
        run.load(stored.content)
        run.progress.say(f"resumed    at step {run.state.step} of {run.total_steps}")
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
    except OSError as error:
        path = error.filename or run.folder.path
        raise RunError(f"{path}: {error.strerror or error}; {run.last_checkpoint()}") from error
    finally:
        run.close()


if __name__ == "__main__":
    sys.exit(main())
