"""A training run from its start, or from a checkpoint, to its end: steps, evaluations, saves."""

from __future__ import annotations

import shlex
import time
from pathlib import Path
from typing import Any

import torch

from softcl.command import invocation
from softcl.data.views import Images
from softcl.errors import CallbackError, CheckpointError, Diverged
from softcl.files import name_too
from softcl.train.checkpoint import BEST, LAST, write_checkpoint
from softcl.train.evaluation import NAMES, Evaluation, Rows, describe_quality, describe_ranks
from softcl.train.folder import (
    BASELINES,
    CONFIG,
    FORMAT,
    PICTURE,
    RESULT,
    SKIPPED,
    VIEWS,
    RunFolder,
    numbers_of,
    read_run_config,
)
from softcl.train.given import Callback, Moment
from softcl.train.images import fingerprint
from softcl.train.log import (
    MetricsLog,
    PlainProgress,
    clock,
    describe,
    describe_baselines,
    make_progress,
    record,
    versions,
)
from softcl.train.online import OnlineProbe
from softcl.train.parallel import StopVote, average_buffers
from softcl.train.parts import Parts
from softcl.train.pictures import choose_queries, draw_neighbors, draw_views, nearest
from softcl.train.step import (
    Meter,
    first_damaged,
    learning_rate,
    moved_temperatures,
    teacher_momentum,
    train_step,
)

COLLAPSED = 0.05  # spread of the student's directions below which a run is warned about


class Loop:
    """One run, from its first step or from a checkpoint (`load`) to its end.

    Args:
        parts: what it is made of, at step 0.
        path: where it writes.
        folder: the same, in the process that does; None in the others.
    """

    def __init__(self, parts: Parts, path: Path, folder: RunFolder | None) -> None:
        self.parts, self.path, self.folder = parts, path, folder
        self.state, self.knn, self.backend = parts.state, parts.knn, parts.backend
        self.world, self.feed = parts.world, parts.feed
        self.config = config = parts.config.changed(out=str(path), overwrite=None, resume=None)
        self.progress = PlainProgress(None) if folder is None else make_progress()
        self.log = None if folder is None else MetricsLog(folder, config.to_dict())
        self.meter = Meter(config.log_every, config.batch_size)
        self.total_steps = config.epochs * self.feed.steps_per_epoch
        self.probe = None
        if config.online_probe:
            about = (parts.images, self.total_steps, config.seed, self.knn.device)
            self.probe = OnlineProbe(self.state, *about)
        self.evaluation = Evaluation(parts, self.probe)
        self.method, self.final_temperatures = self.state.method, config.final_temperatures
        self.baselines: dict[str, Any] = {}
        self.accuracy: float | None = None
        self.quality: dict[str, Any] = {}  # of the last evaluation
        self.best_value, self.best_step = -1.0, -1  # of what the evaluation chooses by
        self.evaluated_step = self.saved_step = -1
        self._warned_of_collapse = False
        self._listed = 0  # unreadable images in skipped.txt
        self._final_features: Rows | None = None
        self._seconds_before, self._started = 0.0, time.perf_counter()
        self._first_step = self.state.step

    def __enter__(self) -> Loop:
        return self

    def __exit__(self, *_: object) -> None:
        self.progress.close()
        if self.log is not None:
            self.log.close()

    def begin(self, content: dict[str, Any] | None) -> None:
        """Tell what the run is; go on from the content of a checkpoint, if there is one."""
        for line in describe(self.parts, self.path):
            self.progress.say(line)
        if self.folder is not None and (
            content is None or read_run_config(self.path / CONFIG) is None
        ):
            self.folder.write_json(CONFIG, record(self.parts, self.config))
        if content is None:
            self._list_skipped()
        self.world.on_main_process(self._open_logger)
        if content is None:
            self._show_views()
        self.world.on_main_process(self._measure_baselines)
        if content is not None:
            self.load(content)
            self.progress.say(f"resumed    at step {self.state.step} of {self.total_steps}")

    def _open_logger(self) -> None:
        if self.config.log is not None:
            settings = self.config.to_dict()
            self.log.open_other(self.config.log, settings, self.progress.say)

    # ------------------------------------------------------------------------------------ steps

    def train(self, vote: StopVote) -> None:
        """Steps until the end, --max-steps or a request to stop; logs, evaluates, saves."""
        self._first_step = self.state.step
        self._loop_started = time.perf_counter()
        self.meter.restart(self.feed.waited)
        last = min(self.total_steps, self.config.max_steps or self.total_steps)
        self._evaluate_if_due()  # a run stopped between an epoch's last step and its evaluation
        for images in self.feed.batches(self.state.step, last):
            with self.world.watching(f"in step {self.state.step + 1}"):
                self._one_step(images)
            if self.meter.due(self.state.step, self.total_steps):
                self._show(last)
            self._call(self.parts.given.on_step)
            if vote.asked():
                return
            self._evaluate_if_due()
            if self._checkpoint_is_due():
                self.save()
            if self.state.step % self.feed.steps_per_epoch == 0:
                self._call(self.parts.given.on_epoch)

    def _call(self, function: Callback | None) -> None:
        """Tell a function of the caller's where the run stands.

        Raises:
            CallbackError: it raised; this step is saved.
        """
        if function is None:
            return
        state, student = self.state, self.state.student
        moment = Moment(
            step=state.step,
            total_steps=self.total_steps,
            epoch=state.step / self.feed.steps_per_epoch,
            lr=max(group["lr"] for group in state.optimizer.param_groups),
            knn=self.accuracy,
            backbone=student.backbone,
            _measures=self.meter.measures,
        )
        training = student.training
        try:
            function(moment)
        except Exception as error:
            if self.world.alone:  # the others would wait for this one's part in it
                self.save()
            name = "on_step" if function is self.parts.given.on_step else "on_epoch"
            line = (str(error).splitlines() or [""])[0]
            reason = f"{name} raised {type(error).__name__}: {line}, after step {state.step}"
            raise CallbackError(f"{reason}; {self.last_checkpoint()}") from error
        finally:
            student.train(training)

    def _diverged(self, what: str) -> Diverged:
        found = first_damaged(self.state, gradients=True)
        return Diverged(f"{what}: {found or 'gradients and parameters are finite'}")

    def _one_step(self, images: Images) -> None:
        config, state = self.config, self.state
        if config.cuda_graph:  # what the last step's graphs returned is no longer needed
            torch.compiler.cudagraph_mark_step_begin()
        lr = learning_rate(
            state.step,
            peak=config.lr,
            steps_per_epoch=self.feed.steps_per_epoch,
            epochs=config.epochs,
            warmup_epochs=config.warmup_epochs,
            schedule=config.lr_schedule,
        )
        if self.final_temperatures:
            progress = state.step / self.total_steps
            state.method = moved_temperatures(self.method, self.final_temperatures, progress)
        for group in state.optimizer.param_groups:
            group["lr"] = lr * group.get("lr_scale", 1.0)
        momentum = teacher_momentum(
            state.step,
            start=state.method.momentum,
            schedule=state.method.momentum_schedule,
            total_steps=self.total_steps,
        )
        try:
            measures = train_step(
                state,
                images,
                self.parts.views,
                seed=config.seed,
                backend=self.backend.name,
                momentum=momentum,
                accumulate=config.accumulate,
                clip_norm=config.clip_norm,
            )
        except ValueError as error:
            if "finite" not in str(error):  # the operator's word for such rows
                raise
            raise self._diverged(f"step {state.step + 1} failed ({error})") from error
        if self.probe is not None:
            self.probe.step(self.feed.indices(state.step - 1))
        try:
            self.meter.add(state.step, measures)
        except Diverged as error:
            raise self._diverged(str(error)) from error

    def _show(self, last: int) -> None:
        """The numbers of this step, in the log and on the terminal; `last` step of this part."""
        row = self.meter.row(self.feed.waited)
        lr = max(group["lr"] for group in self.state.optimizer.param_groups)
        row |= {"lr": lr, "epoch": self.state.step / self.feed.steps_per_epoch}
        if self.log is not None:
            self.log.add(row)
        self._warn_of_collapse(row)
        done, left = self.state.step - self._first_step, last - self.state.step
        pace = (time.perf_counter() - self._loop_started) / max(done, 1)
        epoch = f"{(self.state.step - 1) // self.feed.steps_per_epoch + 1}/{self.config.epochs}"
        numbers = (
            f"loss {row['loss']:.4f}  lr {lr:.4f}  {row['images_per_s']:,.0f} images/s  "
            f"data wait {row['data_wait']:.0%}  ETA {clock(pace * left)}"
        )
        self.progress.show(self.state.step, self.total_steps, epoch, numbers)

    def _warn_of_collapse(self, row: dict[str, Any]) -> None:
        """Once, when the student's outputs all point the same way; again after a recovery."""
        spread = row["query_spread"]
        if spread >= 2 * COLLAPSED:
            self._warned_of_collapse = False
        if spread < COLLAPSED and not self._warned_of_collapse:
            self._warned_of_collapse = True
            self.progress.say(
                f"warning    collapse: at step {row['step']} the student's outputs point the same "
                f"way (spread {spread:.3f}; 1 would fill the sphere)"
            )

    # ------------------------------------------------------------------------------- evaluation

    def _measure_baselines(self) -> None:
        """What pixels and first weights are worth, once per run (kept in its folder)."""
        stored = self.folder.read_json(BASELINES)
        if stored is None or not self.evaluation.are_baselines(stored):
            stored = self.evaluation.baselines(self.state.student)
            self.folder.write_json(BASELINES, stored)
        self.baselines = stored
        for line in (describe_baselines(stored), describe_ranks(stored)):
            self.progress.say(line)

    def _evaluate_if_due(self) -> None:
        epoch, within = divmod(self.state.step, self.feed.steps_per_epoch)
        every = self.config.knn_every
        if every is None:
            every = max(1, self.config.epochs // 5)
        if self.state.step == 0 or within or self.state.step == self.evaluated_step:
            return
        if self.state.step == self.total_steps or (every and epoch % every == 0):
            self.evaluate()

    def evaluate(self) -> None:
        """k-NN and quality of the student as it is; logged and printed."""
        paused = time.perf_counter()
        self._settle_buffers()
        self.quality = self.world.on_main_process(self._evaluate)
        self.accuracy = self.quality.get("knn_top1")
        value = self.quality[self.evaluation.chooses]
        if value > self.best_value:
            self.best_value, self.best_step = value, self.state.step
        self.evaluated_step = self.state.step
        self.meter.skip(time.perf_counter() - paused)

    def _settle_buffers(self) -> None:
        """Running statistics of all the processes, before they are used or kept."""
        average_buffers((self.state.student, self.state.teacher, self.state.heads), self.world)

    def _evaluate(self) -> dict[str, Any]:
        found, rows = self.evaluation.measure(self.state.student)
        if self.state.step == self.total_steps:
            self._final_features = rows
        epoch = self.state.step / self.feed.steps_per_epoch
        place = {"step": self.state.step, "epoch": epoch, "seconds": self.seconds()}
        self.log.add(place | found)
        self.progress.say(
            f"epoch {epoch:g}/{self.config.epochs}  loss {self.meter.loss:.4f}  "
            f"{describe_quality(found)}  after {clock(self.seconds())}"
        )
        return found

    def finish(self) -> dict[str, Any]:
        """The picture and the final numbers, after the last step."""
        self._settle_buffers()
        refused = sum(queue.refused for queue in self.state.queues.values())
        return self.world.on_main_process(lambda: self._finish(refused))

    def _finish(self, refused: int) -> dict[str, Any]:
        picture = self._draw_picture()
        result = {
            "step": self.state.step,
            "knn_top1": self.accuracy,
            "probe_top1": self.quality.get("probe_top1"),
            **{name: self.quality.get(name) for name in ("rankme", "alignment", "uniformity")},
            "best": self.best_value,
            "best_step": self.best_step,
            "best_by": NAMES[self.evaluation.chooses],
            "knn_neighbors": self.knn.num_neighbors,
            "knn_pixels": self.baselines.get("pixels"),
            "knn_untrained": self.baselines.get("untrained"),
            "knn_pretrained": self.baselines.get("pretrained"),
            "loss": self.meter.loss,
            "seconds": self.seconds(),
            "backend": self.backend.name,
            "refused_keys": refused,
        }
        self.progress.close()
        if self.accuracy is not None:
            self.progress.say(describe_baselines(self.baselines, self.accuracy))
            if self.accuracy < self.baselines["untrained"]:
                self.progress.say(
                    "warning    training has made the features worse than the untrained backbone's"
                )
        self.progress.say(describe_ranks(self.baselines, self.quality["rankme"]))
        best = self.best_step / self.feed.steps_per_epoch
        chosen = f"by {NAMES[self.evaluation.chooses]}, of epoch {best:g}"
        self.progress.say(f"best       {self.path / BEST}: {chosen}")
        self.progress.say(f"picture    {picture}")
        self.progress.say(f"done       in {clock(self.seconds())}, in {self.path}")
        self.folder.write_json(RESULT, result)
        return result

    def _draw_picture(self) -> str:
        places = choose_queries(self.knn)
        if self._final_features is None:
            self._final_features = self.knn.encoder_features(self.state.student)
        queries, bank = self._final_features
        trained = nearest(queries[places.to(self.knn.device)], bank)
        untrained = torch.tensor(self.baselines["untrained_neighbors"])
        path = self.path / PICTURE
        panels = [("nearest after training", trained), ("nearest before training", untrained)]
        draw_neighbors(path, self.knn, places, panels)
        self.log.picture(path)
        return str(path)

    # ------------------------------------------------------------------------------- state, time

    def _checkpoint_is_due(self) -> bool:
        every = self.config.checkpoint_every
        if every is None:
            every = self.feed.steps_per_epoch
        improved = self.best_step == self.state.step
        return every > 0 and (self.state.step % every == 0 or improved)

    def save(self) -> None:
        """Write the checkpoint of this step, unless it is there already. All processes call it.

        Raises:
            CheckpointError: the disk refuses; the checkpoint before it is kept.
            Diverged: the loss is not finite; nothing is written.
        """
        if self.saved_step == self.state.step:
            return
        started, images = time.perf_counter(), self.parts.images
        self._settle_buffers()
        self._list_skipped()
        self.meter.check()
        damaged = first_damaged(self.state)
        if damaged is not None:
            raise Diverged(f"after step {self.state.step} {damaged}")
        content = {
            "format": FORMAT,
            **self.state.state_dict(),
            "config": self.config.to_dict(),
            "fingerprint": fingerprint(images),
            "normalisation": [list(images.mean), list(images.std)],
            "accuracy": self.accuracy,
            "quality": self.quality,
            "best": [self.best_value, self.best_step],
            "best_by": NAMES[self.evaluation.chooses],
            "evaluated_step": self.evaluated_step,
            "seconds": self.seconds(),
            "versions": versions(),
        }
        if self.probe is not None:
            content["online_probe"] = self.probe.state_dict()
        self.world.on_main_process(lambda: self._write(content))
        self.saved_step = self.state.step
        self.meter.skip(time.perf_counter() - started)

    def _write(self, content: dict[str, Any]) -> None:
        self.log.flush()
        write_checkpoint(self.path / LAST, content)
        if self.best_step == self.state.step:
            name_too(self.path / LAST, self.path / BEST)

    def load(self, content: dict[str, Any]) -> None:
        """Go on from the content of a checkpoint of the same configuration.

        Raises:
            CheckpointError: what is in it does not fit.
        """
        try:
            self.state.load_state_dict(content)
            if self.probe is not None:
                self.probe.load_state_dict(content["online_probe"])
            self.best_value, self.best_step = content["best"]
        except (AttributeError, KeyError, RuntimeError, TypeError, ValueError) as error:
            reason = " ".join(str(error).split())
            raise CheckpointError(f"{self.path}: its checkpoint does not fit: {reason}") from error
        self.accuracy, self.evaluated_step = content["accuracy"], content["evaluated_step"]
        self.quality = numbers_of(content.get("quality"))
        self._seconds_before = content["seconds"]
        self._started = time.perf_counter()
        self.saved_step = self.state.step

    def seconds(self) -> float:
        """Wall time of the run, its earlier parts included."""
        return self._seconds_before + time.perf_counter() - self._started

    def last_checkpoint(self) -> str:
        """Where to go on from, in words."""
        if self.saved_step < 0:
            return "there is no checkpoint yet"
        return f"the last checkpoint is {self.path / LAST}, of step {self.saved_step}"

    def say_stopped(self) -> None:
        self.progress.close()
        again = f"{invocation('softcl.train')} --resume {shlex.quote(str(self.path))}"
        if self.parts.given.settings:  # which the command cannot give
            again = f"softcl.train.fit(resume={str(self.path)!r}, ...), with the same objects"
        place = f"at step {self.state.step} of {self.total_steps}"
        self.progress.say(f"stopped    {place}; go on with: {again}")

    def _show_views(self) -> None:
        """views.png, where it was asked for."""
        config, parts, path = self.config, self.parts, self.path / VIEWS
        if config.show_views is not None and self.folder is not None:
            size, count = config.image_size, config.show_views
            draw_views(path, parts.images, parts.views, size, count, config.seed)
            self.log.picture(path)
            self.progress.say(f"views      {path}")

    def _list_skipped(self) -> None:
        """skipped.txt, of all processes; images decoded on demand are found while they are read."""
        skipped = dict.fromkeys(sum(self.world.all_gather_object(self.parts.images.skipped), []))
        if len(skipped) > self._listed and self.folder is not None:
            self._listed = len(skipped)
            self.folder.write_text(SKIPPED, "".join(f"{line}\n" for line in skipped))
