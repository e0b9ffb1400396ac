"""A training run: its steps, its log, its checkpoints, its evaluations."""

from __future__ import annotations

import dataclasses
import time
from typing import Any

import torch

from softcl.data import ImageSet
from softcl.training.baselines import baselines_of, in_words
from softcl.training.build import Parts, fingerprint
from softcl.training.config import identity_hash
from softcl.training.describe import record, versions
from softcl.training.diagnose import first_damaged, first_non_finite
from softcl.training.feed import BatchFeed
from softcl.training.interrupt import StopVote
from softcl.training.meter import Diverged, Meter
from softcl.training.parallel import average_buffers
from softcl.training.picture import choose_queries, draw_neighbors, nearest
from softcl.training.progress import Progress, Status, clock
from softcl.training.resume import FORMAT
from softcl.training.run_folder import CONFIG, PICTURE, RESULT, SKIPPED, RunFolder
from softcl.training.schedules import learning_rate, teacher_momentum
from softcl.training.speed import begin_step
from softcl.training.step import Images, query_spread, train_step
from softcl.training.view_sheet import SHEET, draw_views
from softcl.training.views import build_views

COLLAPSED = 0.05  # spread of the student's directions below which a run is warned about


class Run:
    """One run, from its first step or from a checkpoint (`load`) to its end.

    Args:
        parts: what it is made of, at step 0.
        folder: where it writes.
        progress: where it shows itself.
    """

    def __init__(self, parts: Parts, folder: RunFolder, progress: Progress) -> None:
        self.parts, self.folder, self.progress = parts, folder, progress
        self.state, self.knn, self.backend = parts.state, parts.knn, parts.backend
        self.world = parts.world
        self.device, images = parts.knn.device, parts.images
        self.config = config = dataclasses.replace(
            parts.config, out=str(folder.path), overwrite=False, resume=None
        )
        self.fingerprint = fingerprint(images)
        self.images = _resident_on(images, self.device)
        self.views = build_views(self.state.method, images, config.image_size, config.view_kernel)
        feed = (self.images, config.batch_size, config.seed, self.device, self.world, self.views)
        self.feed = BatchFeed(*feed)
        self.meter = Meter(config.log_every, config.batch_size)
        self.total_steps = config.epochs * self.feed.steps_per_epoch
        self.baselines: dict[str, Any] = {}
        self.accuracy: float | None = None
        self.best_accuracy, self.best_step = -1.0, -1
        self._warned_of_collapse = False
        self._listed = 0  # unreadable images in skipped.txt
        self.evaluated_step = self.saved_step = -1
        self._final_features: tuple[torch.Tensor, torch.Tensor] | None = None
        self._seconds_before, self._started = 0.0, time.perf_counter()
        self._first_step = self.state.step

    # ------------------------------------------------------------------------------------ steps

    def train(self, vote: StopVote) -> None:
        """Steps until the end, --max-steps or a request to stop; logs, evaluates, saves."""
        self._first_step = self.state.step
        self._loop_started = time.perf_counter()
        self.meter.restart(self.feed.waited)
        last = min(self.total_steps, self.config.max_steps or self.total_steps)
        self._evaluate_if_due()  # a run stopped between an epoch's last step and its evaluation
        for images in self.feed.batches(self.state.step, last):
            self._one_step(images)
            if self.meter.due(self.state.step, self.total_steps):
                self._log(last)
            if vote.asked():
                return
            self._evaluate_if_due()
            if self._checkpoint_is_due():
                self.save()

    def _diverged(self, images: Images, what: str) -> Diverged:
        seed = self.config.seed
        tensor = first_non_finite(self.state, images, self.views, seed)
        return Diverged(f"{what}: {tensor}")

    def _one_step(self, images: Images) -> None:
        config, state = self.config, self.state
        begin_step(config)
        lr = learning_rate(
            state.step,
            peak=config.lr,
            steps_per_epoch=self.feed.steps_per_epoch,
            epochs=config.epochs,
            warmup_epochs=config.warmup_epochs,
        )
        for group in state.optimizer.param_groups:
            group["lr"] = lr
        momentum = teacher_momentum(
            state.step,
            start=state.method.momentum,
            schedule=config.momentum_schedule,
            total_steps=self.total_steps,
        )
        try:
            with self.world.watching(f"in step {state.step + 1}"):
                measures = train_step(
                    state,
                    images,
                    self.views,
                    seed=config.seed,
                    backend=self.backend.name,
                    momentum=momentum,
                    accumulate=config.accumulate,
                    clip_norm=config.clip_norm,
                )
        except ValueError as error:
            if "finite" not in str(error):  # the operator's word for such rows
                raise
            what = f"step {state.step + 1} failed ({error})"
            raise self._diverged(images, what) from error
        try:
            self.meter.add(state.step, lr, measures)
        except Diverged as error:
            raise self._diverged(images, str(error)) from error

    def _log(self, last: int) -> None:
        for row in self.meter.rows(self.feed.waited):
            row["epoch"] = row["step"] / self.feed.steps_per_epoch
            self.folder.log(row)
            self._warn_of_collapse(row)
        done, left = self.state.step - self._first_step, last - self.state.step
        pace = (time.perf_counter() - self._loop_started) / max(done, 1)
        self.progress.show(
            Status(
                step=self.state.step,
                steps=self.total_steps,
                epoch=(self.state.step - 1) // self.feed.steps_per_epoch + 1,
                epochs=self.config.epochs,
                loss=self.meter.loss,
                lr=self.state.optimizer.param_groups[0]["lr"],
                images_per_s=self.meter.images_per_s,
                data_wait=self.meter.data_wait,
                seconds_left=pace * left,
            )
        )

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

    def measure_baselines(self) -> None:
        """k-NN of raw pixels and of the untrained backbone, once per run (kept in its folder)."""
        self.world.first(self._measure_baselines)
        self.meter.restart(self.feed.waited)

    def _measure_baselines(self) -> None:
        state = self.state
        self.baselines = baselines_of(self.folder, state.student, self.knn, state.step)
        self.progress.say(in_words(self.baselines))

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
        """k-NN of the student as it is; logged and printed."""
        if not self.knn.labelled:
            return
        paused = time.perf_counter()
        self._settle_buffers()
        self.accuracy = self.world.first(self._evaluate)
        if self.accuracy > self.best_accuracy:
            self.best_accuracy, self.best_step = self.accuracy, self.state.step
        self.evaluated_step = self.state.step
        self.meter.skip(time.perf_counter() - paused)

    def _settle_buffers(self) -> None:
        """Running statistics of all the processes, before they are used or kept."""
        average_buffers((self.state.student, self.state.teacher, self.state.heads), self.world)

    def _evaluate(self) -> float:
        features = self.knn.encoder_features(self.state.student)
        accuracy = self.knn.accuracy(*features)
        if self.state.step == self.total_steps:
            self._final_features = features
        epoch = self.state.step / self.feed.steps_per_epoch
        self.folder.log(
            {
                "step": self.state.step,
                "epoch": epoch,
                "knn_top1": accuracy,
                "knn_purity": self.knn.purity(*features),
                "feature_spread": float(query_spread(features[0])),
                "seconds": self.seconds(),
            }
        )
        self.progress.say(
            f"epoch {epoch:g}/{self.config.epochs}  loss {self.meter.loss:.4f}  "
            f"k-NN {accuracy:.1%}  after {clock(self.seconds())}"
        )
        return accuracy

    def finish(self) -> None:
        """The picture and the final numbers, after the last step."""
        self._settle_buffers()
        refused = sum(queue.refused for queue in self.state.queues.values())
        self.world.first(lambda: self._finish(refused))

    def _finish(self, refused: int) -> None:
        picture = self._draw_picture()
        result = {
            "step": self.state.step,
            "knn_top1": self.accuracy,
            "knn_best": self.best_accuracy if self.best_step >= 0 else None,
            "knn_best_step": self.best_step if self.best_step >= 0 else None,
            "knn_neighbors": self.knn.num_neighbors,
            "knn_pixels": self.baselines.get("pixels"),
            "knn_untrained": self.baselines.get("untrained"),
            "loss": self.meter.loss,
            "seconds": self.seconds(),
            "backend": self.backend.name,
            "refused_keys": refused,
        }
        self.progress.close()
        if self.accuracy is not None:
            self.progress.say(in_words(self.baselines, self.accuracy))
        self.progress.say(f"picture    {picture}")
        self.progress.say(f"done       in {clock(self.seconds())}, in {self.folder.path}")
        self.folder.write_json(RESULT, result)

    def _draw_picture(self) -> str:
        places = choose_queries(self.knn)
        if self._final_features is None:
            self._final_features = self.knn.encoder_features(self.state.student)
        queries, bank = self._final_features
        trained = nearest(queries[places.to(self.device)], bank)
        untrained = torch.tensor(self.baselines["untrained_neighbors"])
        path = self.folder.path / PICTURE
        panels = [("nearest after training", trained), ("nearest before training", untrained)]
        draw_neighbors(path, self.knn, places, panels)
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
        started = time.perf_counter()
        self._settle_buffers()
        self._list_skipped()
        self.meter.check()
        damaged = first_damaged(self.state)
        if damaged is not None:
            raise Diverged(f"after step {self.state.step} {damaged} is not finite")
        content = {
            "format": FORMAT,
            **self.state.state_dict(),
            "config": self.config.to_dict(),
            "config_hash": identity_hash(self.config),
            "fingerprint": self.fingerprint,
            "normalisation": [list(self.images.mean), list(self.images.std)],
            "meter": self.meter.state_dict(),
            "accuracy": self.accuracy,
            "best": [self.best_accuracy, self.best_step],
            "evaluated_step": self.evaluated_step,
            "seconds": self.seconds(),
            "versions": versions(),
        }
        self.world.first(lambda: self._write(content))
        self.saved_step = self.state.step
        self.meter.skip(time.perf_counter() - started)

    def _write(self, content: dict[str, Any]) -> None:
        self.folder.write_checkpoint(content, keep=self.config.keep_checkpoints)
        if self.best_step == self.state.step:
            self.folder.mark_best()

    def load(self, content: dict[str, Any]) -> None:
        """Go on from the content of a checkpoint of the same configuration."""
        self.state.load_state_dict(content)
        self.meter.load_state_dict(content["meter"], self.device)
        self.accuracy, self.evaluated_step = content["accuracy"], content["evaluated_step"]
        self.best_accuracy, self.best_step = content["best"]
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
        return f"the last checkpoint is {self.folder.checkpoint}, of step {self.saved_step}"

    def say_stopped(self) -> None:
        self.progress.close()
        self.progress.say(
            f"stopped    at step {self.state.step} of {self.total_steps}; go on with: "
            f"python -m softcl.train --resume {self.folder.path}"
        )

    def write_config(self) -> None:
        """config.json, and skipped.txt if images were unreadable."""
        self.folder.write_json(CONFIG, record(self))
        self._list_skipped()

    def show_views(self) -> None:
        """views.png, where it was asked for."""
        config = self.config
        if config.show_views is None or not self.world.is_first:
            return
        path = self.folder.path / SHEET
        images = self.parts.images
        draw_views(path, images, self.views, config.image_size, config.show_views, config.seed)
        self.progress.say(f"views      {path}")

    def _list_skipped(self) -> None:
        """skipped.txt, of all processes; images decoded on demand are found while they are read."""
        skipped = dict.fromkeys(sum(self.world.all_of(self.images.skipped), []))
        if len(skipped) > self._listed:
            self._listed = len(skipped)
            self.folder.write_text(SKIPPED, "".join(f"{line}\n" for line in skipped))

    def close(self) -> None:
        self.progress.close()
        self.folder.close()


def _resident_on(images: ImageSet, device: torch.device) -> ImageSet:
    """The set with its pixels on the device, where they take at most a quarter of its memory."""
    if not images.resident or device.type != "cuda":
        return images
    free, _ = torch.cuda.mem_get_info(device)
    return images.to(device) if images.images.numel() < free // 4 else images
