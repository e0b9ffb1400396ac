"""What a run measures of its student every few epochs: k-NN, and quality without labels."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from softcl.evaluation.features import PIECE, eval_mode, extract, sampled
from softcl.evaluation.quality import RANKME_LIMIT, alignment, rankme, uniformity
from softcl.evaluation.recalibration import recalibrated
from softcl.train.folder import numbers_of
from softcl.train.images import crop_order
from softcl.train.online import OnlineProbe
from softcl.train.parts import Parts
from softcl.train.pictures import choose_queries, nearest
from softcl.train.step import derived_seed, query_spread
from softcl.train.weights import untrained_encoder

PAIRS = 2048  # images whose two views are compared
NAMES = {"knn_top1": "k-NN", "rankme": "RankMe"}  # what may choose the best checkpoint

Rows = tuple[Tensor, Tensor]  # unit rows of the queries and of the bank


class Evaluation:
    """The measures of one run, of the same images and the same views at every epoch.

    RankMe is of at most RANKME_LIMIT images of the bank, seen whole; alignment and uniformity are
    of PAIRS training images in the method's first two views.

    Attributes:
        chooses: the measure by which the best checkpoint is chosen, a key of NAMES.
    """

    def __init__(self, parts: Parts, probe: OnlineProbe | None = None) -> None:
        self.parts, self.knn, self.probe = parts, parts.knn, probe
        self.chooses = "knn_top1" if self.knn.labelled else "rankme"
        self._sample = sampled(len(self.knn.bank_indices), RANKME_LIMIT)

    def rows(self, encoder: nn.Module) -> tuple[Rows, dict[str, float]]:
        """Unit rows of the queries and of the bank; RankMe, and what the online probe reaches."""
        knn = self.knn
        with eval_mode(encoder):
            queries, bank = knn.features(encoder.features, normalize=False)
        found = {"rankme": rankme(bank[self._sample.to(bank.device)])}
        if self.probe is not None and knn.labelled:
            labels = knn.queries.labels[knn.query_indices].to(queries.device)
            found["probe_top1"] = self.probe.accuracy(queries, labels)
        return (F.normalize(queries, dim=1), F.normalize(bank, dim=1)), found

    def measure(self, encoder: nn.Module) -> tuple[dict[str, Any], Rows | None]:
        """The numbers of a row of metrics.jsonl; with labels also the rows that they come from."""
        knn = self.knn
        if knn.labelled:
            rows, found = self.rows(encoder)
            found |= {"knn_top1": knn.accuracy(*rows), "knn_purity": knn.purity(*rows)}
            spread = query_spread(rows[0])
        else:  # no more images than RankMe takes
            indices = knn.bank_indices[self._sample]
            with eval_mode(encoder):
                bank = extract(
                    knn.bank, indices, encoder.features, knn.size, knn.device, normalize=False
                )
            rows, found, spread = None, {"rankme": rankme(bank)}, query_spread(bank)
        first, second = self.view_rows(encoder)
        found |= {
            "alignment": alignment(first, second),
            "uniformity": (uniformity(first) + uniformity(second)) / 2,
            "feature_spread": float(spread),
        }
        return found, rows

    def baselines(self, student: nn.Module) -> dict[str, Any]:
        """What pixels and first weights are worth; `student` is as it was before the first step.

        They are num_neighbors; untrained_neighbors, the rows for the picture; untrained_rankme; and
        with labels the accuracies untrained and pixels. Where the backbone has weights from
        elsewhere, also pretrained and pretrained_rankme. Batch norms of random weights have the
        statistics of the images.
        """
        knn, pretrained = self.knn, self.parts.pretrained is not None
        random = untrained_encoder(self.parts.config, knn.device) if pretrained else student
        with recalibrated(random, knn.bank, knn.size, knn.device):
            rows, measured = self.rows(random)
        found = {"num_neighbors": knn.num_neighbors, "untrained_rankme": measured["rankme"]}
        if knn.labelled:
            found["untrained"] = knn.accuracy(*rows)
            found["pixels"] = knn.pixel_accuracy()
        if pretrained:
            rows, measured = self.rows(student)
            found["pretrained_rankme"] = measured["rankme"]
            if knn.labelled:
                found["pretrained"] = knn.accuracy(*rows)
        nearest_ones = nearest(rows[0][choose_queries(knn).to(knn.device)], rows[1])
        return found | {"untrained_neighbors": nearest_ones.tolist()}

    def are_baselines(self, stored: dict[str, Any]) -> bool:
        """Whether a file holds the baselines of this run's evaluation, undamaged."""
        if stored.get("num_neighbors") != self.knn.num_neighbors:
            return False
        names = ["untrained_rankme", *(["untrained", "pixels"] if self.knn.labelled else [])]
        if self.parts.pretrained is not None:
            names += ["pretrained_rankme", *(["pretrained"] if self.knn.labelled else [])]
        numbers = numbers_of(stored)
        if any(numbers.get(name) is None for name in names):
            return False
        try:
            rows = torch.tensor(stored["untrained_neighbors"])
        except (KeyError, TypeError, ValueError, RuntimeError):
            return False
        wanted = (len(choose_queries(self.knn)), torch.int64)
        found = (len(rows) if rows.dim() == 2 else 0, rows.dtype)
        return found == wanted and bool(((rows >= 0) & (rows < len(self.knn.bank_indices))).all())

    @torch.no_grad()
    def view_rows(self, encoder: nn.Module) -> Rows:
        """Unit rows (n, F) of training images in the method's first two views."""
        images, seed, device = self.parts.images, self.parts.config.seed, self.knn.device
        names = [*self.parts.views, *self.parts.views][:2]  # of a method with one view, that twice
        views = {name: self.parts.views[name] for name in names}
        rows: tuple[list[Tensor], list[Tensor]] = [], []
        with eval_mode(encoder):
            for number, indices in enumerate(sampled(len(images), PAIRS).split(PIECE)):
                if images.files is None:
                    seen = dict.fromkeys(names, images.batch(indices))
                    cropped = False
                else:
                    seen = images.read(crop_order(indices, views, seed, number))
                    cropped = True
                for place, name in enumerate(names):
                    purpose = derived_seed(seed, number, f"evaluation {place}")
                    generator = torch.Generator(device).manual_seed(purpose)
                    made = views[name](seen[name].to(device), generator, cropped=cropped)
                    made = made.contiguous(memory_format=torch.channels_last)
                    rows[place].append(F.normalize(encoder.features(made).float(), dim=1))
        return torch.cat(rows[0]), torch.cat(rows[1])


def describe_quality(numbers: dict[str, Any]) -> str:
    """The numbers in words, for the line of an epoch."""
    words = [f"k-NN {numbers['knn_top1']:.1%}"] if "knn_top1" in numbers else []
    words += [f"probe {numbers['probe_top1']:.1%}"] if "probe_top1" in numbers else []
    words.append(f"RankMe {numbers['rankme']:.1f}")
    words.append(f"alignment {numbers['alignment']:.3f}")
    words.append(f"uniformity {numbers['uniformity']:.2f}")
    return "  ".join(words)


def describe_ranks(baselines: Mapping[str, Any], trained: float | None = None) -> str:
    """RankMe of the first weights, before training or beside what it has reached."""
    ranks = f"untrained backbone {baselines['untrained_rankme']:.1f}"
    if "pretrained_rankme" in baselines:
        ranks += f", first weights {baselines['pretrained_rankme']:.1f}"
    if trained is None:
        return f"RankMe     before training: {ranks}"
    return f"RankMe     {ranks}, trained {trained:.1f}"
