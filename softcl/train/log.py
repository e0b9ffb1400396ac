"""What a run tells: rows of numbers, and lines on the terminal."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import platform
import sys
import textwrap
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, TextIO

import torch

import softcl
from softcl.data.views import describe_kernel
from softcl.train.config import TrainConfig
from softcl.train.folder import CONFIG, METRICS, RunFolder, finite
from softcl.train.loggers import Logger, TensorBoard, open_logger
from softcl.train.parts import Parts
from softcl.train.teacher import FrozenTeacher


class MetricsLog:
    """metrics.jsonl of a run folder, and the same numbers for TensorBoard and other loggers.

    A line has ``step`` (steps done), ``epoch`` and either the numbers of a training step (loss, lr,
    images_per_s, data_wait, confidence, ...) or an evaluation (knn_top1). NaN, which JSON lacks, is
    written as null. A line goes out in one write, so a killed process leaves whole lines.

    Raises:
        OSError: naming the file, in every method but `close`.
    """

    def __init__(self, folder: RunFolder, settings: Mapping[str, Any]) -> None:
        self._folder, self._path = folder, folder.path / METRICS
        self._file = os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        self._events = TensorBoard(folder.path, settings, folder.resumed_at)
        self._other: Logger | None = None

    def open_other(
        self, name: str, settings: Mapping[str, Any], failed: Callable[[str], None]
    ) -> None:
        """Send everything to another logger too, until it fails: then `failed` is told in a line.

        Raises:
            RunError: it cannot start.
        """
        created = (self._folder.read_json(CONFIG) or {}).get("created")
        own = repr(created or self._folder.path.resolve())  # a run may have moved
        identity = hashlib.sha256(own.encode()).hexdigest()[:16]
        self._other_name, self._other_failed = name, failed
        self._other = open_logger(name, self._folder.path, settings, identity)

    def _tell_other(self, what: str, *arguments: Any) -> None:
        """A logger that fails in the middle, its network gone, is left out from there on."""
        if self._other is None:
            return
        try:
            getattr(self._other, what)(*arguments)
        except Exception as error:
            self._other = None
            line = (str(error).splitlines() or [""])[0]
            reason = f"{type(error).__name__}: {line}; going on without it"
            self._other_failed(f"warning    --log {self._other_name}: {reason}")

    def add(self, row: Mapping[str, Any]) -> None:
        row = finite(row)
        line = (json.dumps(row) + "\n").encode()
        try:
            written = os.write(self._file, line)
            if written != len(line):  # the disk is full: the rest fails, and says so
                os.write(self._file, line[written:])
        except OSError as error:
            raise OSError(error.errno, error.strerror, str(self._path)) from error
        self._events.numbers(row)
        self._tell_other("numbers", row)

    def picture(self, path: Path) -> None:
        """A picture that was written into the folder."""
        self._events.picture(path.stem, path)
        self._tell_other("picture", path.stem, path)

    def flush(self) -> None:
        """Events are written by a thread: with a checkpoint, they must be on the disk too."""
        self._events.flush()

    def close(self) -> None:
        os.close(self._file)
        self._events.close()
        self._tell_other("close")


# ------------------------------------------------------------------------------------- terminal

PLAIN_SECONDS = 10.0  # between two plain lines


def clock(seconds: float) -> str:
    """1:05, or 2:01:05 from an hour on."""
    minutes, rest = divmod(int(seconds + 0.5), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


class PlainProgress:
    """A line every ten seconds: for log files, pipes and batch systems. No stream: no lines."""

    def __init__(self, stream: TextIO | None) -> None:
        self.stream = stream
        self._shown = time.monotonic()

    def say(self, line: str) -> None:
        if self.stream is not None:
            print(line, file=self.stream, flush=True)

    def show(self, step: int, steps: int, epoch: str, numbers: str) -> None:
        now = time.monotonic()
        if now - self._shown >= PLAIN_SECONDS or step >= steps:
            self._shown = now
            self.say(f"epoch {epoch}  step {step}/{steps}  {numbers}")

    def close(self) -> None:
        pass


class BarProgress:
    """A bar at the bottom of the terminal, with the numbers beside it."""

    def __init__(self, stream: TextIO) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, TextColumn
        from rich.progress import Progress as RichProgress

        self._console = Console(file=stream, highlight=False)
        self._bar = RichProgress(
            TextColumn("epoch {task.fields[epoch]}"),
            BarColumn(bar_width=20),
            TextColumn("{task.percentage:>3.0f}%"),
            TextColumn("{task.fields[numbers]}"),
            console=self._console,
            transient=True,
            refresh_per_second=4,
        )
        self._task: int | None = None

    def say(self, line: str) -> None:
        self._console.print(line, markup=False, soft_wrap=True)

    def show(self, step: int, steps: int, epoch: str, numbers: str) -> None:
        if self._task is None:
            self._bar.start()
            self._task = self._bar.add_task("", total=steps, epoch=epoch, numbers="")
        self._bar.update(self._task, completed=step, epoch=epoch, numbers=numbers)

    def close(self) -> None:
        if self._task is not None:
            self._bar.stop()
            self._task = None


def make_progress(stream: TextIO | None = None) -> PlainProgress | BarProgress:
    """A bar if `stream` (standard output) is a terminal that can move its cursor, else lines."""
    stream = sys.stdout if stream is None else stream
    if not stream.isatty():
        return PlainProgress(stream)
    bar = BarProgress(stream)
    return PlainProgress(stream) if bar._console.is_dumb_terminal else bar


# ------------------------------------------------------------------------------------- in words


def versions() -> dict[str, str]:
    return {
        "softcl": softcl.__version__,
        "torch": str(torch.__version__),  # a subclass of str, which weights_only refuses
        "python": platform.python_version(),
    }


def device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return f"{device} ({torch.cuda.get_device_name(device)})"
    return f"cpu, {torch.get_num_threads()} threads"


def describe(parts: Parts, path: Path) -> Iterator[str]:
    """What will run: the data, the settings and where each default comes from, the backend."""
    config, state, world, images = parts.config, parts.state, parts.world, parts.images
    backbone = state.student.backbone
    trained = [*state.student.parameters(), *state.heads.parameters()]
    parameters = sum(p.numel() for p in trained)
    device = device_name(parts.knn.device)
    yield f"softcl     {softcl.__version__}, torch {torch.__version__}, {device}"
    yield f"data       {images.describe()}"
    yield from (f"           {note}" for note in images.notes)
    yield from (f"           skipped {line}" for line in images.skipped[:3])
    yield f"evaluation {parts.evaluation}"
    yield (
        f"model      {config.arch} at {config.image_size} px ({backbone.stem_rule}), "
        f"{backbone.num_features} features, {parameters / 1e6:.2f} M parameters"
    )
    if parts.pretrained is not None:
        first, *rest = parts.pretrained.describe()
        yield f"weights    {first}"
        yield from (f"           {line}" for line in rest)
    if isinstance(state.teacher, FrozenTeacher):
        features = state.method.projection_dim
        first, *rest = state.teacher.notes or [config.teacher]
        yield f"teacher    {first}, frozen, {features} features"
        yield from (f"           {line}" for line in rest)
    yield f"networks   {describe_speed(config)}"
    yield f"views      {describe_kernel(parts.knn.device, config.view_kernel)}"
    yield f"method     {config.method} (defaults of {parts.defaults!r})"
    numbers = ((k.replace("_", " "), v) for k, v in dataclasses.asdict(state.method).items())
    words = (f"{k} {v:g}" if isinstance(v, float) else f"{k} {v}" for k, v in numbers)
    # A number stays beside its name: textwrap does not break at a no-break space.
    text = ", ".join(word.replace(" ", "\xa0") for word in words)
    yield from (f"           {x}".replace("\xa0", " ") for x in textwrap.wrap(text, 85))
    yield (
        f"training   {config.epochs} epochs of {parts.feed.steps_per_epoch} steps, "
        f"batch {config.batch_size}, {config.optimizer}, lr {config.lr:g} after "
        f"{config.warmup_epochs:g} epochs of warm-up, weight decay {config.weight_decay:g}, "
        f"seed {config.seed}"
    )
    longest = max((queue.size for queue in state.queues.values()), default=0)
    if longest > len(images):
        yield (
            f"warning    --queue-size {longest} is more than the {len(images)} images: the queue "
            "holds some of them several times, as the teacher was at other steps"
        )
    yield f"backend    {parts.backend}"
    if world.size > 1:
        share = config.batch_size // world.size
        kept = "each keeps a part of the queue" if config.queue_sharding else "each keeps the queue"
        yield f"processes  {world.size}, {share} images of a batch each; {kept}"
    yield f"run        {path}"


def record(parts: Parts, config: TrainConfig) -> dict[str, Any]:
    """The content of config.json: the settings, and what they come to on this machine."""
    device = parts.knn.device
    pretrained = parts.pretrained
    return {
        "created": time.time(),
        "config": config.to_dict(),
        "weights": None if pretrained is None else list(pretrained.describe()),
        "defaults": parts.defaults,
        "images": parts.images.describe(),
        "notes": [*parts.images.notes, *parts.images.skipped],
        "evaluation": parts.evaluation,
        "backend": {"name": parts.backend.name, "passed_over": parts.backend.reasons},
        "views": describe_kernel(device, config.view_kernel),
        "device": device_name(device),
        "versions": versions(),
    }


def describe_speed(config: TrainConfig) -> str:
    """How the networks are computed."""
    words = [config.precision or "fp32"]
    words += ["channels last"] * bool(config.channels_last)
    if config.compile or config.cuda_graph:
        words.append("compiled, in CUDA graphs" if config.cuda_graph else "compiled")
    return ", ".join(words)


def describe_baselines(baselines: Mapping[str, Any], trained: float | None = None) -> str:
    """The k-NN of pixels and first weights, before training or beside what it has reached."""
    if "pixels" not in baselines:
        return "k-NN       not measured: no labels; --eval-data names labelled images"
    shares = (
        f"raw pixels {baselines['pixels']:.1%}, untrained backbone {baselines['untrained']:.1%}"
    )
    if "pretrained" in baselines:
        shares += f", first weights {baselines['pretrained']:.1%}"
    if trained is None:
        return f"k-NN       before training: {shares}"
    return f"k-NN       {shares}, trained {trained:.1%}"
