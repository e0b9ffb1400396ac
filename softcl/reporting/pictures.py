"""All that needs the checkpoint or the images of a run, made as far as they are there."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch

from softcl.detect import PICTURE, RESULT
from softcl.errors import SoftclError
from softcl.reporting.attention import draw_attention, has_class_token
from softcl.reporting.figures import Figure
from softcl.reporting.maps import map_features
from softcl.reporting.neighbors import draw_confusion, draw_neighbors
from softcl.reporting.runs import RunData
from softcl.reporting.samples import Sample, Sets, read_embedding, read_sets, sample_run
from softcl.reporting.views import draw_views
from softcl.train.checkpoint import load_backbone
from softcl.train.config import TrainConfig
from softcl.train.folder import numbers_of, read_json

_WIDEST = 1000  # pixels of a stored picture


@dataclass
class Pictures:
    """Makes the figures of runs and of files, one after the other.

    Attributes:
        ways: to project the features.
        limit: images that are looked at.
        notes: what could not be made, and why, in a line each.
    """

    ways: list[str]
    limit: int
    device: torch.device
    notes: list[str] = field(default_factory=list)
    _read: dict[tuple, Sets] = field(default_factory=dict)

    def of_run(self, run: RunData) -> list[Figure]:
        print(f"pictures   of {run.name}", flush=True)
        return [*self._of_images(run), *_detections(run)]

    def _of_images(self, run: RunData) -> list[Figure]:
        stored = self._tried(f"{run.name}: no features", partial(load_backbone, run.path))
        config = stored.config if stored is not None else self._config(run)
        sets = None
        if config is not None:
            sets = self._tried(f"{run.name}: no images", partial(self._sets, config))
        if sets is None:
            return _stored_picture(run)
        figures = [self._tried(f"{run.name}: no views", partial(draw_views, config, sets))]
        if stored is not None:
            sets = sets.normalised(stored.content.get("normalisation"))
            make = partial(sample_run, run.name, stored, sets, self.device, self.limit)
            figures += self._of_sample(self._tried(f"{run.name}: no features", make))
            if has_class_token(stored.backbone):
                draw = partial(draw_attention, stored, sets, self.device)
                figures.append(self._tried(f"{run.name}: no attention", draw))
        return [figure for figure in figures if figure is not None]

    def of_file(self, path: Path) -> list[Figure]:
        """Those of a file of features.

        Raises:
            DataError, OSError: it is none.
        """
        print(f"pictures   of {path.name}", flush=True)
        sample, note = read_embedding(path, self.limit)
        if note is not None:
            self.notes.append(note)
        return self._of_sample(sample)

    def _of_sample(self, sample: Sample | None) -> list[Figure]:
        if sample is None:
            return []
        makers = [partial(draw_neighbors, sample)]
        if sample.labelled:
            makers.append(partial(draw_confusion, sample))
        if self.ways:
            makers.append(partial(map_features, sample, self.ways))
        figures = [self._tried(f"{sample.name}: a picture is missing", make) for make in makers]
        return [figure for figure in figures if figure is not None]

    def _tried(self, what: str, make: Callable) -> object | None:
        try:
            return make()
        except (SoftclError, OSError, ImportError) as error:
            self.notes.append(f"{what} ({error})")
            return None

    def _sets(self, config: TrainConfig) -> Sets:
        names = ("data", "eval_data", "split", "data_format", "image_size", "workers")
        key = tuple(getattr(config, name) for name in names)
        if key not in self._read:
            self._read[key] = read_sets(config)
        return self._read[key]

    def _config(self, run: RunData) -> TrainConfig | None:
        """That of a run whose backbone cannot be built, if it is whole."""
        try:
            config = TrainConfig.of(**run.config)
        except (SoftclError, TypeError):
            return None
        return None if config.image_size is None else config


def _stored_picture(run: RunData) -> list[Figure]:
    """The neighbours that the run itself has drawn, where its images are gone."""
    if run.picture is None:
        return []
    caption = "As the run drew them: test images and the nearest training images."
    return _inlined(run.picture, "neighbors", "Nearest neighbours", run.name, caption)


def _detections(run: RunData) -> list[Figure]:
    """What detectors found that softcl.detect trained in folders of the run's."""
    figures = []
    for picture in sorted(run.path.glob(f"*/{PICTURE}")):
        result = read_json(picture.with_name(RESULT)) or {}
        scores = result.get("scores")
        words = [
            f"{kind}: AP {100 * its['AP']:.1f}, AP50 {100 * its['AP50']:.1f}"
            for kind, its in (scores.items() if isinstance(scores, dict) else ())
            if isinstance(its, dict) and {"AP", "AP50"} <= numbers_of(its).keys()
        ]
        caption = f"{picture.parent.name}, by softcl.detect. {'; '.join(words)}"
        figures += _inlined(picture, "detections", "Detections", run.name, caption)
    return figures


def _inlined(path: Path, kind: str, title: str, name: str, caption: str) -> list[Figure]:
    """A picture on the disk, made smaller; none where it cannot be read."""
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(path) as stored:
            image = stored.convert("RGB")
    except (OSError, UnidentifiedImageError):
        return []
    image.thumbnail((_WIDEST, _WIDEST))
    stream = io.BytesIO()
    image.save(stream, format="JPEG", quality=85)
    data = base64.b64encode(stream.getvalue()).decode()
    words = html.escape(f"{title} of {name}")
    picture = f'<img class="wide" alt="{words}" src="data:image/jpeg;base64,{data}">'
    return [Figure(kind, title, caption, [picture])]
