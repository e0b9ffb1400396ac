"""A linear classifier that is trained beside a run (--online-probe), and changes nothing of it.

It learns from the features that the student's backbone makes of its first view of a batch; they
are detached, so that no gradient of it reaches the backbone. SGD with momentum 0.9, no weight
decay, and a rate of 0.1 that falls along a half cosine to 0, as solo-learn trains its own beside
every method. Methods that mix images keep their labels, which are then of the first of two images.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from softcl.data import ImageSet
from softcl.errors import ConfigError
from softcl.memory import moved
from softcl.train.config import TrainConfig
from softcl.train.step import TrainState, derived_seed

RATE, MOMENTUM = 0.1, 0.9


def check_online_probe(config: TrainConfig, images: ImageSet) -> None:
    """Refuse an online probe that has nothing to learn from, or cannot see the features.

    Raises:
        ConfigError: naming the flag.
    """
    if not config.online_probe:
        return
    if images.labels is None:
        raise ConfigError("online_probe", "", f"needs labels, and {images.name} has none")
    if config.compile or config.cuda_graph:
        reason = "does not see the features of a compiled network; leave --compile out"
        raise ConfigError("online_probe", "", reason)


class OnlineProbe:
    """The classifier of one run.

    Args:
        state: of the run, whose student's backbone it listens to.
        images: the training set, with labels; -1 where an image has none.
        total_steps: of the run.
    """

    def __init__(
        self,
        state: TrainState,
        images: ImageSet,
        total_steps: int,
        seed: int,
        device: torch.device,
    ) -> None:
        self.state, self.total_steps = state, total_steps
        self.labels = images.labels.to(device)
        backbone = state.student.backbone
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(derived_seed(seed, "online probe"))
            self.classifier = nn.Linear(backbone.num_features, len(images.classes)).to(device)
        parameters = self.classifier.parameters()
        self.optimizer = torch.optim.SGD(parameters, lr=RATE, momentum=MOMENTUM)
        self._seen: list[Tensor] = []  # in this step, a part of the batch and a view after another
        backbone.register_forward_hook(self._listen)

    def _listen(self, backbone: nn.Module, _: Any, features: Tensor) -> None:
        if backbone.training and torch.is_grad_enabled():
            self._seen.append(features.detach())

    def step(self, indices: Tensor) -> None:
        """Learn from the features of this step, of the images `indices` (n,) of this process."""
        views = len(self.state.method.student_sees())
        rows = torch.cat(self._seen[::views]).float()
        self._seen.clear()
        labels = self.labels[moved(indices, self.labels.device)]
        progress = min(self.state.step / self.total_steps, 1.0)
        self.optimizer.param_groups[0]["lr"] = RATE * (1.0 + math.cos(math.pi * progress)) / 2
        losses = F.cross_entropy(self.classifier(rows), labels, ignore_index=-1, reduction="sum")
        self.optimizer.zero_grad(set_to_none=True)
        (losses / (labels >= 0).sum().clamp(min=1)).backward()
        world = self.state.world
        if not world.alone:
            for parameter in self.classifier.parameters():
                parameter.grad.copy_(world.all_reduce(parameter.grad) / world.size)
        self.optimizer.step()

    @torch.no_grad()
    def accuracy(self, rows: Tensor, labels: Tensor) -> float:
        """Top-1 of feature rows (N, F), as the backbone makes them in evaluation mode."""
        return float((self.classifier(rows).argmax(1) == labels).float().mean())

    def state_dict(self) -> dict[str, Any]:
        return {
            "classifier": self.classifier.state_dict(),
            "optimizer": self.optimizer.state_dict(),
        }

    def load_state_dict(self, stored: dict[str, Any]) -> None:
        self.classifier.load_state_dict(stored["classifier"])
        self.optimizer.load_state_dict(stored["optimizer"])
