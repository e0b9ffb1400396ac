"""The parts of a run, made from its configuration: device, images, networks, optimiser, backend."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from softcl.data import DataError, ImageSet, find_format, load_dataset, training_split
from softcl.data.kernels import kernel_missing
from softcl.distributed import ALONE, ShardedQueue, World
from softcl.evaluation import KNN, NUM_NEIGHBORS
from softcl.methods.method import Method
from softcl.nn import (
    Encoder,
    MemoryQueue,
    build_backbone,
    build_head,
    make_teacher,
)
from softcl.ops import FUSED_BACKENDS, BackendChoice, UnsupportedBackendError, choose_backend
from softcl.training.config import ConfigError, TrainConfig, did_you_mean
from softcl.training.optimizers import build_optimizer
from softcl.training.parallel import (
    Trained,
    average_gradients,
    divide_splits,
    splits_fit,
    synchronise_norms,
)
from softcl.training.settings import check_method_flags, fill, recipe_size
from softcl.training.speed import check_speed, settle_speed, speed_up
from softcl.training.step import TrainState, derived_seed
from softcl.training.views import build_views, side_of


class RunError(RuntimeError):
    """A run that cannot start or go on; the message is one line."""


@dataclass
class Parts:
    """What a run is made of, at step 0.

    Attributes:
        config: every open setting filled.
        defaults: the name of the defaults that filled it.
        images: training set.
        evaluation: a line about the images of the k-NN evaluation.
        state: networks, queues, optimiser.
        backend: of the operator, for every step.
        knn: evaluation.
        world: the processes that train together.
    """

    config: TrainConfig
    defaults: str
    images: ImageSet
    evaluation: str
    state: TrainState
    backend: BackendChoice
    knn: KNN
    world: World = ALONE


def assemble(config: TrainConfig, world: World = ALONE) -> Parts:
    """Make the parts; what is quick to refuse is refused before the images are read.

    Raises:
        ConfigError, DataError, RunError: as the functions below.
    """
    check_method_flags(config)
    check_arch(config.arch)
    device = resolve_device(config.device, world)
    check_speed(config, device)
    images, bank, queries, evaluation = load_images(config)
    config, method, defaults = fill(config, images, view_side(images, config))
    config = settle_speed(config, device)
    build_views(method, images, config.image_size)
    missing = kernel_missing(device) if config.view_kernel else None
    if missing is not None:
        raise ConfigError("view_kernel", "", missing)
    check_processes(config, method, world)
    state = build_state(config, method, device, world)
    backend = choose_run_backend(config, state, device)
    knn = build_knn(config, bank, queries, device)
    return Parts(config, defaults, images, evaluation, state, backend, knn, world)


def check_processes(config: TrainConfig, method: Method, world: World) -> None:
    """Refuse a batch, splits or queues that cannot be divided among the processes.

    Raises:
        ConfigError: naming the flag.
    """
    W, splits = world.size, method.num_splits
    if W == 1:
        return
    if not splits_fit(splits, world):
        reason = f"must divide the {W} processes, or be a multiple of them (split batch norm)"
        raise ConfigError("num_splits", splits, reason)
    own, parts = max(splits // W, 1), config.accumulate * W
    if config.batch_size % (parts * own) or config.batch_size < 2 * parts * own:
        divided = f"{W} processes" + (f" x --accumulate {config.accumulate}" * (parts > W))
        divided += f" x {own} splits each" * (own > 1)
        reason = f"must be a multiple of {divided}, with two images for each"
        raise ConfigError("batch_size", config.batch_size, reason)
    if config.queue_sharding and method.queues() and min(method.queues().values()) < W:
        reason = f"less than a row for each of {W} processes (--queue-sharding)"
        raise ConfigError("queue_size", method.queue_size, reason)


def resolve_device(name: str, world: World = ALONE) -> torch.device:
    """The device that `name` means; "auto" is the first CUDA device, or else the CPU.

    Among several processes "auto" and "cuda" are the device of the process's number on its machine.

    Raises:
        ConfigError: there is no such device.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
        if world.size == 1:
            return torch.device(name)
    if name == "cuda" and world.size > 1:
        name = f"cuda:{world.local_rank}"
    try:
        device = torch.device(name)
    except RuntimeError:
        device = None
    if device is None or device.type not in ("cpu", "cuda"):
        hint = did_you_mean(name, ("auto", "cpu", "cuda"))
        raise ConfigError("device", name, f"must be auto, cpu, cuda or cuda:N{hint}")
    if device.type == "cuda":
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if count == 0:
            raise ConfigError("device", name, "this machine has no CUDA device that torch can use")
        if (device.index or 0) >= count:
            raise ConfigError("device", name, f"there are {count} CUDA devices, counted from 0")
    return device


def check_arch(name: str | None) -> None:
    """Refuse an unknown backbone before any image is read.

    Raises:
        ConfigError: with the nearest known name.
    """
    if name is None:
        return
    import timm

    from softcl.nn.backbones import ALIASES, OWN_RESNETS

    own = (*OWN_RESNETS, *ALIASES)
    if name not in own and not timm.is_model(name.split(".")[0]):
        hint = did_you_mean(name, [*own, *timm.list_models()])
        raise ConfigError("arch", name, f"unknown backbone{hint}")


def load_images(config: TrainConfig) -> tuple[ImageSet, ImageSet, ImageSet, str]:
    """Training images, bank and queries of the k-NN evaluation, and a line about the latter.

    The bank is the training set; where that has images without labels beside the labelled ones
    (STL-10), the labelled ones. Without a test split the queries are the bank itself, of which KNN
    holds images out.

    Raises:
        DataError: the training images, or the images of --eval-data, cannot be read.
    """
    options = {"image_size": config.image_size, "workers": config.workers}
    own = {"data_format": config.data_format}
    try:
        split = config.split or training_split(config.data, config.data_format)
        train = load_dataset(config.data, split, **own, **options)
    except DataError as error:
        hint = "" if Path(config.data).exists() else did_you_mean(config.data, ["shapes"])
        raise DataError(f"{error}{hint}") from error
    if config.whole_images is False:
        train.files = None
    if config.image_size is None:  # to be stored in one size with the training images
        options["image_size"] = train.size[1]
    bank = train
    if split in ("unlabeled", "train+unlabeled"):
        bank = load_dataset(config.data, "train", **own, **options)
    try:
        if config.eval_data is not None:
            queries = load_dataset(config.eval_data, _labelled_split(config.eval_data), **options)
        else:
            queries = load_dataset(config.data, "test", **own, **options)
    except DataError as error:
        if config.eval_data is not None:
            raise
        return train, bank, bank, f"every tenth training image ({error})"
    queries.files = None  # seen whole
    return train, bank, queries, queries.describe()


def _labelled_split(spec: str) -> str:
    """The split of --eval-data: its test images if it is divided, else all of it."""
    if spec.startswith("shapes") and not Path(spec).is_dir():
        return "test"
    path = Path(spec).expanduser()
    if find_format(path).format in ("cifar", "stl10", "tiny-imagenet"):
        return "test"
    divided = any((path / name).is_dir() for name in ("test", "val"))
    return "test" if divided else "all"


def view_side(images: ImageSet, config: TrainConfig) -> int:
    """Side of the views: the one asked for, or that of the images.

    Where the method's recipe for these very images has a smaller one, that: STL-10's 96 px are
    trained on at 64.
    """
    if config.image_size is not None:
        return config.image_size
    own = images.size[1]
    recipe = recipe_size(config.method, images)
    return own if recipe is None else min(own, recipe)


def fingerprint(images: ImageSet) -> str:
    """Changes when images are added or removed or their classes change (not their pixels)."""
    digest = hashlib.sha256(json.dumps([len(images), images.classes]).encode())
    if images.labels is not None:
        digest.update(images.labels.cpu().numpy().tobytes())
    return digest.hexdigest()


def build_state(
    config: TrainConfig, method: Method, device: torch.device, world: World = ALONE
) -> TrainState:
    """Networks, queues and optimiser at step 0: a function of the configuration alone.

    Raises:
        ConfigError: the backbone is unknown or cannot take images of this size.
    """
    torch.manual_seed(derived_seed(config.seed, "init"))
    try:
        backbone = build_backbone(config.arch, config.image_size)
    except ValueError as error:
        raise ConfigError("arch", config.arch, str(error)) from error
    check_crops(config, method, backbone)
    projector = build_head(
        backbone.num_features, method.projector_hidden, method.projection_dim,
        layers=method.projector_layers, norm=method.projector_norm,
    )  # fmt: skip
    student: nn.Module = Encoder(backbone, projector)
    student = divide_splits(student, method.num_splits, world)
    student = student.to(device).train()
    heads = build_heads(method).to(device).train()
    optimizer = build_optimizer(
        nn.ModuleDict({"student": student, "heads": heads}),
        config.optimizer,
        lr=config.lr,
        weight_decay=config.weight_decay,
        momentum=config.sgd_momentum,
        decay_norms=config.decay_norms,
    )
    queues = build_queues(config, method, world).to(device)
    teacher = make_teacher(student) if method.teacher_sees() else nn.Identity()
    state = TrainState(method, student, teacher, queues, optimizer, heads, world=world)
    if not world.alone and device.type == "cuda":
        synchronise_norms((student, teacher, heads), method.num_splits, world)
    speed_up(config, state)  # before DDP lays out the gradients
    if not world.alone:
        trained = Trained(student, heads)
        state.parallel = average_gradients(trained, world, accumulate=config.accumulate)
    return state


def build_queues(config: TrainConfig, method: Method, world: World) -> nn.ModuleDict:
    """The method's queues, whole in each process or divided; the same rows either way."""
    queues = {}
    for name, rows in method.queues().items():
        size, seed = (rows, method.projection_dim), derived_seed(config.seed, name)
        if config.queue_sharding and not world.alone:
            queues[name] = ShardedQueue(*size, world, seed=seed)
        else:
            queues[name] = MemoryQueue(*size, seed=seed)
    return nn.ModuleDict(queues)


@torch.no_grad()
def check_crops(config: TrainConfig, method: Method, backbone: nn.Module) -> None:
    """Refuse a backbone that takes images of one size alone where a method has smaller views.

    Raises:
        ConfigError: naming the backbone and the first such size.
    """
    sides = {side_of(view, config.image_size) for view in method.views().values()}
    training = backbone.training
    backbone.eval()
    for side in sorted(sides - {config.image_size}):
        try:
            backbone(torch.zeros(1, 3, side, side))
        except (RuntimeError, ValueError, AssertionError) as error:
            reason = f"cannot take the method's crops of {side} px"
            raise ConfigError("arch", config.arch, reason) from error
    backbone.train(training)


def build_heads(method: Method) -> nn.ModuleDict:
    """The predictor, and what else a method trains besides the student."""
    heads = nn.ModuleDict(method.heads())
    if method.predictor_hidden > 0:
        heads["predictor"] = build_head(
            method.projection_dim, method.predictor_hidden, method.projection_dim,
            norm=method.predictor_norm,
        )  # fmt: skip
    return heads


def build_knn(config: TrainConfig, train: ImageSet, queries: ImageSet, device: torch.device) -> KNN:
    """The k-NN evaluation.

    Raises:
        ConfigError: --knn-k exceeds the bank.
        DataError: the two sets have labels of different classes.
    """
    if queries.labels is not None and train.labels is not None and queries.classes != train.classes:
        other = sorted(set(queries.classes) ^ set(train.classes))
        named = f" ({other[0]!r} is in one of the two)" if other else " (another order)"
        raise DataError(f"{queries.name}: its classes are not those of {train.name}{named}")
    wanted = NUM_NEIGHBORS if config.knn_k is None else config.knn_k
    knn = KNN(train, queries, config.image_size, device, wanted)
    if config.knn_k is not None and knn.num_neighbors < config.knn_k:
        reason = f"more than the {knn.num_neighbors} images that can vote"
        raise ConfigError("knn_k", config.knn_k, reason)
    return knn


def choose_run_backend(
    config: TrainConfig, state: TrainState, device: torch.device
) -> BackendChoice:
    """The backend of every step of a run.

    Raises:
        RunError: none runs that the configuration allows, with each one's reason.
    """
    method = state.method
    sizes = [queue.size for queue in state.queues.values()] or [config.batch_size]
    query = torch.empty(config.batch_size, method.projection_dim, device=device)
    rows = torch.empty(max(sizes), method.projection_dim, device=device)
    options = dict(
        rule=method.rule(),
        temperature=method.temperature,
        teacher_temperature=getattr(method, "teacher_temperature", method.temperature),
        num_neighbors=getattr(method, "num_neighbors", 0),
        excluded=torch.empty(0, dtype=torch.int64, device=device) if method.excludes else None,
    )
    try:
        choice = choose_backend(query, rows, backend=config.wanted_backend, **options)
    except UnsupportedBackendError as error:
        raise RunError(f"--backend {config.wanted_backend}: {error}") from error
    if config.fused and choice.name not in FUSED_BACKENDS:
        reasons = "; ".join(f"{name}: {reason}" for name, reason in choice.reasons.items())
        raise RunError(f"--fused: no fused backend runs here ({reasons})")
    return choice
