"""The configuration of a training run: frozen dataclasses, of which every flag is made.

`TrainConfig` has what every run has; the numbers of the chosen method are the fields of its own
dataclass in `softcl.methods`. A run stores both, defaults filled in, in its folder and in its
checkpoints. What is not given comes from the method's defaults for the data
(`softcl.train.defaults`).
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
import inspect
import re
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from softcl.command import check_path, check_range, did_you_mean, must_be_one_of
from softcl.data import FORMATS, SPLITS
from softcl.errors import ConfigError, flag_name
from softcl.methods import METHODS, Defaults, Method
from softcl.train.loggers import LOGGERS
from softcl.train.optim import OPTIMIZERS


@dataclass(frozen=True)
class Setting:
    """One setting of a run, which is one flag.

    Attributes:
        name, kind: of the field; its type, None left out.
        default: None where the method or the data decide.
        group, help: the heading of --help under which it stands, and its line there.
        at_least, above, at_most: its range; of a method's numbers the method itself knows it.
        choices: the words it may be.
        may_change: a resumed run may have another value, because it changes neither the model nor
            the order of its computations (a few, like the device, may change the last bits).
    """

    name: str
    kind: type
    default: Any
    group: str
    help: str
    at_least: float | None = None
    above: float | None = None
    at_most: float | None = None
    choices: tuple[str, ...] = ()
    may_change: bool = False
    metavar: str | None = None


def setting(group: str, default: Any = None, **rules: Any) -> Any:
    """A field of the configuration; the rules are those of `Setting`."""
    return field(default=default, metadata={"group": group, **rules})


_PATHS = ("SPEC", "FOLDER", "RUN")  # metavars of settings that are paths, or may be
LR_SCHEDULES = ("cosine", "constant", "steps")
MOVING = ("temperature", "teacher_temperature")  # numbers of methods that a run may move
_DATA, _MODEL, _METHOD = "data", "model", "method"
_OPTIM, _RUN, _EVAL = "optimisation", "run", "evaluation"
# How the numbers of a method begin that are of the model.
_OF_MODEL = ("projection_", "projector_", "predictor_", "num_splits", "split_student")


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """What ``python -m softcl.train`` does. None: the method's default, or chosen at the start.

    `of` takes the method's numbers beside the fields, as flags and files do.

    Attributes:
        numbers: those of the method that are given; once the run has started, all of them.
    """

    # fmt: off
    data: str = setting(_DATA, "shapes", metavar="SPEC",
        help="'shapes', 'shapes:N' (N generated images) or a path: see --data-format")
    data_format: str = setting(_DATA, "auto", metavar="NAME", choices=FORMATS,
        help="auto, shapes, cifar, stl10, tiny-imagenet, tar, parquet or folder (of images)")
    split: str | None = setting(_DATA, metavar="NAME", choices=SPLITS,
        help="images to train on (default: train; STL-10: train+unlabeled)")
    eval_data: str | None = setting(_DATA, metavar="SPEC",
        help="labelled images for k-NN, any kind (default: the test split of --data)")
    image_size: int | None = setting(_DATA, at_least=8, at_most=4096,
        help="side of the views in pixels (default: the images' own; STL-10: 64)")
    whole_images: bool | None = setting(_DATA,
        help="random crops of the whole image files (default), or of their centred squares")
    shuffle: str = setting(_DATA, "exact", metavar="NAME", choices=("exact", "shards"),
        help="exact, or shards: tar and parquet files a few at a time, as a slow disk needs it")
    workers: int | None = setting(_DATA, at_least=0, at_most=256, may_change=True,
        help="threads that decode images (default: one per core, at most 16); 0: none")
    cache: str | None = setting(_DATA, may_change=True, metavar="FOLDER",
        help="where decoded images are kept (default: the user's cache folder), or off")

    arch: str | None = setting(_MODEL, metavar="NAME",
        help="backbone: resnet_tiny, resnet18, resnet50 or any other timm name")
    init: str | None = setting(_MODEL, metavar="SPEC",
        help="first weights of the backbone: a file, a run, an export, or timm:NAME[.TAG]")
    freeze: str | None = setting(_MODEL, metavar="PARTS",
        help="parts of the backbone that are not trained: stem,layer1 or stem,blocks.0")

    teacher: str | None = setting(_MODEL, metavar="SPEC",
        help="frozen teacher of method seed: a file, a run, an export, or timm:NAME[.TAG]")

    method: str = setting(_METHOD, "ascl", metavar="NAME",
        help="one of {methods}; each has flags of its own")

    epochs: int | None = setting(_OPTIM, at_least=1,
        help="passes over the data")
    batch_size: int | None = setting(_OPTIM, at_least=2,
        help="N, images in a step")
    lr: float | None = setting(_OPTIM, above=0.0,
        help="peak learning rate")
    optimizer: str | None = setting(_OPTIM, metavar="NAME", choices=OPTIMIZERS,
        help="sgd, lars or adamw; another than the method's comes with MoCo v3's lr and decay")
    sgd_momentum: float | None = setting(_OPTIM, at_least=0.0, at_most=1.0,
        help="of SGD and LARS")
    weight_decay: float | None = setting(_OPTIM, at_least=0.0,
        help="of the optimiser")
    decay_norms: bool | None = setting(_OPTIM,
        help="weight decay on biases and norms too, or not")
    layer_decay: float | None = setting(_OPTIM, above=0.0, at_most=1.0,
        help="each layer of the backbone learns so much slower than the next (default: no)")
    clip_norm: float | None = setting(_OPTIM, above=0.0,
        help="largest norm of the gradient (default: no limit)")
    accumulate: int = setting(_OPTIM, 1, at_least=1,
        help="parts of a batch computed one after the other, for one step")
    warmup_epochs: float | None = setting(_OPTIM, at_least=0.0,
        help="linear warm-up, then cosine to 0; may be a fraction")
    lr_schedule: str = setting(_OPTIM, "cosine", metavar="NAME", choices=LR_SCHEDULES,
        help="after the warm-up: cosine to 0, constant, or steps: a tenth at 0.6 and 0.8 of it all")
    final_temperature: float | None = setting(_OPTIM, above=0.0,
        help="to which --temperature moves on a half cosine (default: it stays)")
    final_teacher_temperature: float | None = setting(_OPTIM, above=0.0,
        help="the same of --teacher-temperature")
    seed: int = setting(_OPTIM, 1228, at_least=0,
        help="of everything random")

    fused: bool | None = setting(_RUN, may_change=True,
        help="demand a fused backend, or plain PyTorch (default: the fastest that runs)")
    precision: str | None = setting(_RUN, metavar="NAME", choices=("fp32", "bf16"),
        help="of student and teacher (default: bf16 on GPUs that have it)")
    compile: bool = setting(_RUN, False, may_change=True,
        help="torch.compile of student and teacher")
    cuda_graph: bool = setting(_RUN, False, may_change=True,
        help="the same, with CUDA graphs")
    channels_last: bool | None = setting(_RUN, may_change=True,
        help="memory format of the networks (default: on GPUs, without split batch norm)")
    view_kernel: bool | None = setting(_RUN, may_change=True,
        help="views by one kernel each, or by PyTorch (default: the kernel where one runs)")
    backend: str = setting(_RUN, "auto", may_change=True, metavar="NAME",
        choices=("auto", "cuda", "triton", "cpu", "reference"),
        help="auto, cuda, triton, cpu or reference")
    device: str = setting(_RUN, "auto", may_change=True, metavar="NAME",
        help="auto, cpu, cuda or cuda:N")
    queue_sharding: bool | None = setting(_RUN, may_change=True,
        help="of several processes each keeps a part of the queue, or all of it (default)")
    out: str | None = setting(_RUN, may_change=True, metavar="FOLDER",
        help="run folder (default: a new one under runs/)")
    overwrite: bool = setting(_RUN, False, may_change=True,
        help="delete the run that --out holds and start over")
    resume: str | None = setting(_RUN, may_change=True, metavar="RUN",
        help="continue a run: its folder, a checkpoint, or auto: the run in --out if there is one")
    dry_run: bool = setting(_RUN, False, may_change=True,
        help="print the configuration with every default filled in, and stop")
    max_steps: int | None = setting(_RUN, at_least=1, may_change=True,
        help="stop after so many steps in all; the schedule stays that of --epochs")
    checkpoint_every: int | None = setting(_RUN, at_least=0, may_change=True,
        help="steps between checkpoints (default: an epoch); 0: only at the end")

    knn_every: int | None = setting(_EVAL, at_least=0, may_change=True,
        help="epochs between k-NN evaluations (default: five a run); 0: only at the end")
    knn_k: int | None = setting(_EVAL, at_least=1, at_most=4096, may_change=True,
        help="neighbours that vote (default: 200, or fewer on a small set)")
    online_probe: bool = setting(_EVAL, False,
        help="train a linear classifier beside the run, on detached features; needs labels")
    show_views: int | None = setting(_EVAL, at_least=1, at_most=256, may_change=True,
        help="write views.png: so many images and what the networks see of them")
    log: str | None = setting(_EVAL, may_change=True, metavar="NAME", choices=LOGGERS,
        help="numbers and pictures to wandb or mlflow too, beside TensorBoard's files")
    log_every: int = setting(_EVAL, 10, at_least=1, may_change=True,
        help="steps per line of metrics.jsonl; the first 50 have one each")
    # fmt: on

    numbers: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name, rules in own_settings().items():
            value = getattr(self, name)
            if value is not None:
                check_value(rules, value)
        check_numbers(self.method, self.numbers)
        for name in self.final_temperatures:
            if name not in method_settings(self.method):
                reason = f"method {self.method} has no {flag_name(name)}"
                raise ConfigError(f"final_{name}", self.final_temperatures[name], reason)
        if self.fused is True and self.backend == "reference":
            reason = "backend reference is not fused; leave one of the two out"
            raise ConfigError("fused", "", reason)
        if self.fused is False and self.backend not in ("auto", "reference"):
            reason = "--no-fused means --backend reference; leave one of the two out"
            raise ConfigError("backend", self.backend, reason)
        if self.overwrite and self.resume is not None:
            raise ConfigError("overwrite", "", "cannot be combined with --resume")

    @classmethod
    def of(cls, **settings: Any) -> TrainConfig:
        """From settings by name, the method's numbers among them; those that are None are left out.

        Raises:
            ConfigError: for a setting that there is not, or that this method has not, or a value
                out of range.
        """
        own = own_settings()
        given = {name: value for name, value in settings.items() if value is not None}
        numbers = {name: value for name, value in given.items() if name not in own}
        rest = {name: value for name, value in given.items() if name in own}
        return cls(**rest, numbers=numbers)

    def to_dict(self) -> dict[str, Any]:
        """All settings by name, as `of` takes them: what config.json holds."""
        return {**{name: getattr(self, name) for name in own_settings()}, **self.numbers}

    def changed(self, **settings: Any) -> TrainConfig:
        """With other values of some settings; None for the default."""
        return TrainConfig.of(**{**self.to_dict(), **settings})

    @property
    def wanted_backend(self) -> str:
        """The backend asked for; "auto" where none was named."""
        return "reference" if self.fused is False else self.backend

    @property
    def final_temperatures(self) -> dict[str, float]:
        """Where the method's temperatures end that move, by the names of its numbers."""
        ends = {name: getattr(self, f"final_{name}") for name in MOVING}
        return {name: end for name, end in ends.items() if end is not None}

    def identity(self) -> dict[str, Any]:
        """The settings that decide what a run computes: a resumed run must have the same."""
        own = {n: getattr(self, n) for n, rules in own_settings().items() if not rules.may_change}
        return {**own, **self.numbers}


# ------------------------------------------------------------------------------------- settings


@functools.cache
def own_settings() -> dict[str, Setting]:
    """The settings that every run has, by name."""
    hints = typing.get_type_hints(TrainConfig)
    return {
        f.name: Setting(f.name, _without_none(hints[f.name]), f.default, **f.metadata)
        for f in dataclasses.fields(TrainConfig)
        if f.metadata
    }


def method_settings(method: str) -> dict[str, Setting]:
    """The numbers of a method, by name, explained as its dataclass explains them."""
    return _number_settings(method_class(method))


@functools.cache
def _number_settings(kind: type[Method]) -> dict[str, Setting]:
    hints, texts, choices = typing.get_type_hints(kind), _attribute_texts(kind), kind.choices()
    found = {}
    for f in dataclasses.fields(kind):
        group = _MODEL if f.name.startswith(_OF_MODEL) else _METHOD
        known = tuple(choices.get(f.name, ()))
        text = texts.get(f.name, "")
        plain = _without_none(hints[f.name])
        found[f.name] = Setting(f.name, plain, None, group, text, choices=known)
    return found


def settings_of(method: str) -> dict[str, Setting]:
    """Every setting of a run with this method."""
    return {**own_settings(), **method_settings(method)}


def method_class(name: str) -> type[Method]:
    """The dataclass of a method.

    Raises:
        ConfigError: there is no such method.
    """
    if name not in METHODS:
        raise must_be_one_of("method", name, METHODS)
    return METHODS[name]


def defaults_of(method: str) -> dict[str, Defaults]:
    """A method's published settings, by the name of the data."""
    return importlib.import_module(method_class(method).__module__).DEFAULTS


def default_values(method: str, name: str) -> dict[str, Any]:
    """What a method's defaults have for a setting, for each kind of data; empty where nothing."""
    found = {}
    for data, defaults in defaults_of(method).items():
        for holder in (defaults.method, defaults):
            if name != "method" and name in {f.name for f in dataclasses.fields(holder)}:
                found[data] = getattr(holder, name)
                break
    return found


def _without_none(annotation: Any) -> type:
    if isinstance(annotation, types.UnionType):
        return next(part for part in typing.get_args(annotation) if part is not types.NoneType)
    return annotation


def _attribute_texts(kind: type) -> dict[str, str]:
    """What the docstrings of a class and of its bases say under "Attributes:", by name."""
    texts: dict[str, str] = {}
    for base in kind.__mro__:
        lines = inspect.cleandoc(base.__doc__ or "").partition("Attributes:\n")[2].splitlines()
        entries: list[list[str]] = []
        for line in lines:
            if re.match(r" {4}\w[\w, ]*: ", line):
                entries.append([line.strip()])
            elif entries and line.startswith(" " * 8):
                entries[-1].append(line.strip())
        for entry in entries:
            names, _, text = " ".join(entry).partition(": ")
            for name in names.split(", "):
                texts.setdefault(name, text.rstrip("."))
    return texts


# --------------------------------------------------------------------------------------- checks


def check_value(rules: Setting, value: Any) -> None:
    """Refuse a value of the wrong type, out of its range or not among its choices.

    Raises:
        ConfigError: naming the setting and the value.
    """
    name, kind = rules.name, rules.kind
    wrong_type = not isinstance(value, (int, float) if kind is float else kind)
    if wrong_type or (isinstance(value, bool) and kind is not bool):
        raise ConfigError(name, repr(value), f"must be of type {kind.__name__}")
    if rules.choices and value not in rules.choices:
        raise must_be_one_of(name, value, rules.choices)
    if kind is str and not value:
        raise ConfigError(name, "''", "must not be empty")
    if rules.metavar in _PATHS:
        check_path(name, value)
    if kind in (int, float):
        bounds = dict(at_least=rules.at_least, above=rules.above, at_most=rules.at_most)
        check_range(name, value, **bounds)


def check_numbers(method: str, numbers: Mapping[str, Any]) -> None:
    """Refuse numbers that a method does not have, and those that fit none of its defaults.

    Raises:
        ConfigError: naming the number.
    """
    known = method_settings(method)
    for name, value in numbers.items():
        if name not in known:
            owners = [other for other in METHODS if name in method_settings(other)]
            hint = did_you_mean(name, settings_of(method))
            reason = f"does not apply to method {method} (but to {', '.join(owners)})"
            raise ConfigError(name, value, reason if owners else f"unknown setting{hint}")
        check_value(known[name], value)
    refused = None
    for defaults in defaults_of(method).values():
        try:
            dataclasses.replace(defaults.method, **numbers)
            return
        except ValueError as error:
            refused = error
    if refused is not None:
        raise refusal(method, refused, numbers)


def refusal(method: str, error: ValueError, numbers: Mapping[str, Any]) -> ConfigError:
    """A method's own words about one of its numbers, given or not, as a ConfigError."""
    match = re.fullmatch(r"(\w+) (.*?)(, got (.*))?", str(error), flags=re.DOTALL)
    if match is None or match[1] not in method_settings(method):
        return ConfigError("method", method, str(error))
    value = numbers.get(match[1], match[4] or "")
    repeated = match[4] in (str(value), repr(value))
    return ConfigError(match[1], value, match[2] + ("" if repeated else match[3] or ""))
