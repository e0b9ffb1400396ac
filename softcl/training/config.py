"""The configuration of a training run: one frozen dataclass, and what its values must satisfy.

Every field is a flag of ``python -m softcl.train`` (softcl/flags.py derives them from here). A run
stores its configuration, defaults filled in, in its folder and in its checkpoints. A field that is
None is filled from the method's defaults; a field that the method does not have is refused.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import hashlib
import json
import math
import types
import typing
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from softcl.data import FORMATS, SPLITS


class ConfigError(ValueError):
    """A value that a run cannot use: one line naming the flag, its value and the reason."""

    def __init__(self, field: str, value: Any, reason: str) -> None:
        self.field = field
        super().__init__(f"{flag_name(field)} {value}".rstrip() + f": {reason}")


def flag_name(field: str) -> str:
    return "--" + field.replace("_", "-")


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """``; did you mean X?`` for the known word nearest to `word`, or an empty string."""
    near = difflib.get_close_matches(word, list(known), n=1, cutoff=0.6)
    return f"; did you mean {near[0]}?" if near else ""


def _flag(
    group: str,
    default: Any = None,
    *,
    help: str,
    at_least: float | None = None,
    above: float | None = None,
    at_most: float | None = None,
    may_change: bool = False,
    choices: tuple[str, ...] | None = None,
    metavar: str | None = None,
) -> Any:
    """A field of the configuration.

    Args:
        group, help: the heading of --help under which it stands, and its line there.
        default: None where the method or the data decide.
        at_least, above, at_most: its range.
        may_change: a resumed run may have another value, because it changes neither the model nor
            the order of its computations (a few, like the device, may change the last bits).
    """
    metadata = dict(group=group, help=help, at_least=at_least, above=above, at_most=at_most)
    metadata.update(may_change=may_change, choices=choices, metavar=metavar)
    return dataclasses.field(default=default, metadata=metadata)


_DATA, _MODEL, _METHOD = "data", "model", "method (defaults: the method's own)"
_OPTIM, _RUN, _EVAL = "optimisation", "run", "evaluation and logs"


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """What ``python -m softcl.train`` does. None: the method's default, or chosen at the start."""

    # fmt: off
    data: str = _flag(_DATA, "shapes", metavar="SPEC",
        help="'shapes', 'shapes:N' (N generated images) or a path: see --data-format")
    data_format: str = _flag(_DATA, "auto", metavar="NAME", choices=FORMATS,
        help="auto, shapes, cifar, stl10, tiny-imagenet, tar, parquet or folder (of images)")
    split: str | None = _flag(_DATA, metavar="NAME", choices=SPLITS,
        help="images to train on (default: train; STL-10: train+unlabeled)")
    eval_data: str | None = _flag(_DATA, metavar="SPEC",
        help="labelled images for k-NN, any kind (default: the test split of --data)")
    image_size: int | None = _flag(_DATA, at_least=8, at_most=4096,
        help="side of the views in pixels (default: the images' own; STL-10: 64)")
    whole_images: bool | None = _flag(_DATA,
        help="random crops of the whole image files (default), or of their centred squares")
    workers: int | None = _flag(_DATA, at_least=0, at_most=256, may_change=True,
        help="threads that decode images (default: one per core, at most 16); 0: none")

    arch: str | None = _flag(_MODEL, metavar="NAME",
        help="backbone: resnet_tiny, resnet18, resnet50 or any other timm name")
    projection_dim: int | None = _flag(_MODEL, at_least=1, at_most=65536,
        help="D, the length of the vectors compared")
    projector_layers: int | None = _flag(_MODEL, at_least=1, at_most=8,
        help="linear layers of the projector")
    projector_hidden: int | None = _flag(_MODEL, at_least=1, at_most=1 << 20,
        help="width of the projector's hidden layers")
    projector_norm: str | None = _flag(_MODEL, metavar="NAME",
        help="batch norm of the projector: none, hidden, all or plain (as MoCo v3)")
    predictor_hidden: int | None = _flag(_MODEL, at_least=0, at_most=1 << 20,
        help="width of the predictor's hidden layer; 0: no predictor")
    predictor_norm: str | None = _flag(_MODEL, metavar="NAME",
        help="batch norm of the predictor, as --projector-norm")
    num_splits: int | None = _flag(_MODEL, at_least=1,
        help="split batch norm: parts of a batch normalised apart; 1: plain")

    method: str = _flag(_METHOD, "ascl", metavar="NAME",
        help="ascl, snclr, reco, moco, ressl, sce, nnclr or msf")
    form: str | None = _flag(_METHOD, metavar="NAME",
        help="ascl: moco or byol; snclr, sce: paper or code")
    labels: str | None = _flag(_METHOD, metavar="NAME",
        help="ascl: soft, ahcl, hard or normal labels")
    num_neighbors: int | None = _flag(_METHOD, at_least=0,
        help="ascl, snclr, nnclr, msf: nearest rows that share a label")
    positive_weight: float | None = _flag(_METHOD, at_least=0.0, at_most=1.0,
        help="sce: the positive's share of the labels")
    global_weight: float | None = _flag(_METHOD, at_least=0.0,
        help="reco: weight of the global relation")
    local_weight: float | None = _flag(_METHOD, at_least=0.0,
        help="reco: weight of the local relation")
    mix: str | None = _flag(_METHOD, metavar="NAME",
        help="reco: cutmix or mixup")
    crops: int | None = _flag(_METHOD, at_least=1,
        help="ressl: strong views for the student, at most 5")
    symmetric: bool | None = _flag(_METHOD,
        help="moco, ressl, sce, ascl, msf: both views through both encoders, or not")
    use_keys: bool | None = _flag(_METHOD,
        help="sce, ressl: relations to the batch's other keys too, or not")
    student_view: str | None = _flag(_METHOD, metavar="NAME",
        help="recipe of the student's view")
    teacher_view: str | None = _flag(_METHOD, metavar="NAME",
        help="recipe of the teacher's view")
    queue_size: int | None = _flag(_METHOD, at_least=1,
        help="K, rows of the memory queue")
    temperature: float | None = _flag(_METHOD, above=0.0, at_most=100.0,
        help="of the student")
    teacher_temperature: float | None = _flag(_METHOD, above=0.0, at_most=100.0,
        help="of the teacher, for the labels")
    global_temperature: float | None = _flag(_METHOD, above=0.0, at_most=100.0,
        help="reco: of the student in the global relation")
    momentum: float | None = _flag(_METHOD, at_least=0.0, at_most=1.0,
        help="of the teacher: share of it kept at each step")

    epochs: int | None = _flag(_OPTIM, at_least=1,
        help="passes over the data")
    batch_size: int | None = _flag(_OPTIM, at_least=2,
        help="N, images in a step")
    lr: float | None = _flag(_OPTIM, above=0.0,
        help="peak learning rate")
    optimizer: str | None = _flag(_OPTIM, metavar="NAME", choices=("sgd", "lars", "adamw"),
        help="sgd, lars or adamw; another than the method's comes with MoCo v3's lr and decay")
    sgd_momentum: float | None = _flag(_OPTIM, at_least=0.0, at_most=1.0,
        help="of SGD and LARS")
    weight_decay: float | None = _flag(_OPTIM, at_least=0.0,
        help="of the optimiser")
    decay_norms: bool | None = _flag(_OPTIM,
        help="weight decay on biases and norms too, or not")
    clip_norm: float | None = _flag(_OPTIM, above=0.0,
        help="largest norm of the gradient (default: no limit)")
    accumulate: int = _flag(_OPTIM, 1, at_least=1,
        help="parts of a batch computed one after the other, for one step")
    momentum_schedule: str | None = _flag(_OPTIM, metavar="NAME", choices=("constant", "cosine"),
        help="of the teacher's momentum: constant, or cosine to 1")
    warmup_epochs: float | None = _flag(_OPTIM, at_least=0.0,
        help="linear warm-up, then cosine to 0; may be a fraction")
    seed: int = _flag(_OPTIM, 1228, at_least=0, at_most=(1 << 63) - 1,
        help="of everything random")

    fused: bool | None = _flag(_RUN, may_change=True,
        help="demand a fused backend, or plain PyTorch (default: the fastest that runs)")
    precision: str | None = _flag(_RUN, metavar="NAME", choices=("fp32", "bf16"),
        help="of student and teacher (default: bf16 on GPUs that have it)")
    compile: bool = _flag(_RUN, False, may_change=True,
        help="torch.compile of student and teacher")
    cuda_graph: bool = _flag(_RUN, False, may_change=True,
        help="the same, with CUDA graphs")
    channels_last: bool | None = _flag(_RUN, may_change=True,
        help="memory format of the networks (default: on GPUs, without split batch norm)")
    view_kernel: bool | None = _flag(_RUN, may_change=True,
        help="views by one kernel each, or by PyTorch (default: the kernel where one runs)")
    backend: str = _flag(_RUN, "auto", may_change=True, metavar="NAME",
        choices=("auto", "cuda", "triton", "cpu", "reference"),
        help="auto, cuda, triton, cpu or reference")
    device: str = _flag(_RUN, "auto", may_change=True, metavar="NAME",
        help="auto, cpu, cuda or cuda:N")
    queue_sharding: bool | None = _flag(_RUN, may_change=True,
        help="of several processes each keeps a part of the queue, or all of it (default)")
    out: str | None = _flag(_RUN, may_change=True, metavar="FOLDER",
        help="run folder (default: a new one under runs/)")
    overwrite: bool = _flag(_RUN, False, may_change=True,
        help="delete the run that --out holds and start over")
    resume: str | None = _flag(_RUN, may_change=True, metavar="RUN",
        help="continue a run: its folder, a checkpoint, or auto: the run in --out if there is one")
    dry_run: bool = _flag(_RUN, False, may_change=True,
        help="print the configuration with every default filled in, and stop")
    max_steps: int | None = _flag(_RUN, at_least=1, may_change=True,
        help="stop after so many steps in all; the schedule stays that of --epochs")
    checkpoint_every: int | None = _flag(_RUN, at_least=0, may_change=True,
        help="steps between checkpoints (default: an epoch); 0: only at the end")
    keep_checkpoints: int = _flag(_RUN, 2, at_least=1, at_most=1000, may_change=True,
        help="newest checkpoints to keep, besides the best")

    knn_every: int | None = _flag(_EVAL, at_least=0, may_change=True,
        help="epochs between k-NN evaluations (default: five a run); 0: only at the end")
    knn_k: int | None = _flag(_EVAL, at_least=1, at_most=4096, may_change=True,
        help="neighbours that vote (default: 200, or fewer on a small set)")
    show_views: int | None = _flag(_EVAL, at_least=1, at_most=256, may_change=True,
        help="write views.png: so many images and what the networks see of them")
    log_every: int = _flag(_EVAL, 10, at_least=1, may_change=True,
        help="steps per line of metrics.jsonl; the first 50 have one each")
    # fmt: on

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if value is not None:
                _check_value(field, value)
        _check_fused(self)
        if self.overwrite and self.resume is not None:
            raise ConfigError("overwrite", "", "cannot be combined with --resume")

    @property
    def wanted_backend(self) -> str:
        """The backend asked for; "auto" where none was named."""
        return "reference" if self.fused is False else self.backend

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> TrainConfig:
        """Rebuild a stored configuration.

        Raises:
            ConfigError: for a field that this version does not have, or a value out of range.
        """
        known = field_names()
        for name, value in values.items():
            if name not in known:
                raise ConfigError(name, value, f"unknown setting{did_you_mean(name, known)}")
        return cls(**values)


def field_names() -> list[str]:
    return [field.name for field in dataclasses.fields(TrainConfig)]


def value_type(field: dataclasses.Field) -> type:
    """int, float, str or bool: the type of a field, None left out."""
    annotation = _annotations()[field.name]
    if isinstance(annotation, types.UnionType):
        return next(part for part in typing.get_args(annotation) if part is not type(None))
    return annotation


@functools.cache
def _annotations() -> dict[str, Any]:
    return typing.get_type_hints(TrainConfig)


def _check_value(field: dataclasses.Field, value: Any) -> None:
    rule, kind = field.metadata, value_type(field)
    wrong_type = not isinstance(value, (int, float) if kind is float else kind)
    if wrong_type or (isinstance(value, bool) and kind is not bool):
        raise ConfigError(field.name, repr(value), f"must be of type {kind.__name__}")
    if rule["choices"] and value not in rule["choices"]:
        hint = did_you_mean(value, rule["choices"])
        raise ConfigError(field.name, value, f"must be one of {', '.join(rule['choices'])}{hint}")
    if kind in (int, float):
        _check_range(field.name, value, rule)
    elif kind is str and not value:
        raise ConfigError(field.name, "''", "must not be empty")


def _check_range(name: str, value: float, rule: Mapping[str, Any]) -> None:
    if not math.isfinite(value):
        raise ConfigError(name, value, "must be a finite number")
    if rule["at_least"] is not None and value < rule["at_least"]:
        raise ConfigError(name, value, f"must be at least {_plain(rule['at_least'])}")
    if rule["above"] is not None and value <= rule["above"]:
        raise ConfigError(name, value, f"must be above {_plain(rule['above'])}")
    if rule["at_most"] is not None and value > rule["at_most"]:
        raise ConfigError(name, value, f"must be at most {_plain(rule['at_most'])}")


def _plain(number: float) -> str:
    return str(number) if isinstance(number, int) else f"{number:g}"


def _check_fused(config: TrainConfig) -> None:
    if config.fused is True and config.backend == "reference":
        raise ConfigError("fused", "", "backend reference is not fused; leave one of the two out")
    if config.fused is False and config.backend not in ("auto", "reference"):
        reason = "means --backend reference; leave one of the two out"
        raise ConfigError("backend", config.backend, f"--no-fused {reason}")


# The settings that decide what a run computes: a resumed run must have the same.
IDENTITY = tuple(
    field.name for field in dataclasses.fields(TrainConfig) if not field.metadata["may_change"]
)


def identity_hash(config: TrainConfig) -> str:
    """SHA-256 over the settings that decide what a run computes."""
    values = {name: getattr(config, name) for name in IDENTITY}
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def first_difference(stored: TrainConfig, given: TrainConfig) -> str | None:
    """The first setting in which `given` would compute something else than `stored`."""
    for name in IDENTITY:
        if getattr(stored, name) != getattr(given, name):
            return name
    return None
