"""Everything a run is made of: images, networks, queues, optimiser, backend, evaluation."""

from __future__ import annotations

import ctypes
import dataclasses
import importlib.util
import os
import platform
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from softcl.command import LARGEST, did_you_mean
from softcl.data import ImageSet
from softcl.data.views import kernel_missing
from softcl.distributed import ALONE, ShardedQueue, World
from softcl.errors import ConfigError, DataError, RunError, UnsupportedBackendError
from softcl.evaluation import KNN, NUM_NEIGHBORS
from softcl.methods.method import Method
from softcl.nn import Encoder, MemoryQueue, build_backbone, build_head, make_teacher
from softcl.nn.pretrained import Pretrained, likely_arch
from softcl.ops import FUSED_BACKENDS, BackendChoice, choose_backend
from softcl.train.config import TrainConfig
from softcl.train.defaults import fill
from softcl.train.given import NOTHING, Given, copied_backbone
from softcl.train.images import (
    BatchFeed,
    build_views,
    check_same_images,
    load_images,
    make_resident,
    side_of,
    view_side,
)
from softcl.train.loggers import check_logger
from softcl.train.online import check_online_probe
from softcl.train.optim import build_optimizer
from softcl.train.parallel import (
    average_gradients,
    divide_splits,
    splits_fit,
    synchronise_norms,
)
from softcl.train.step import Trained, TrainState, Transform, derived_seed
from softcl.train.teacher import build_teacher, check_teacher, fit_to_teacher
from softcl.train.weights import (
    fit_first_weights,
    freeze,
    normalise_as,
    read_first_weights,
)

PRECISIONS = {"fp32": None, "bf16": torch.bfloat16}  # what autocast takes
_COMPILERS = ("g++", "clang++", "c++")
# Of glibc's malloc.h.
_M_TRIM_THRESHOLD, _M_MMAP_MAX, _LARGEST_INT = -1, -4, 2**31 - 1


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
        views: what makes each of the method's views.
        feed: the batches, in their order.
        world: the processes that train together.
        pretrained: the backbone with the weights of --init, in a run that starts.
        given: objects and functions of the caller's.
    """

    config: TrainConfig
    defaults: str
    images: ImageSet
    evaluation: str
    state: TrainState
    backend: BackendChoice
    knn: KNN
    views: dict[str, Transform]
    feed: BatchFeed
    world: World = ALONE
    pretrained: Pretrained | None = None
    given: Given = NOTHING


def assemble(
    config: TrainConfig,
    world: World = ALONE,
    content: Mapping[str, Any] | None = None,
    given: Given = NOTHING,
) -> Parts:
    """Make the parts; what is quick to refuse is refused before the images are read.

    Args:
        content: of the checkpoint that the run goes on from, which has its weights.

    Raises:
        ConfigError, DataError, WeightsError, RunError: as the functions below.
    """
    if given.backbone is None:
        check_arch(config.arch)
    check_teacher(config)
    check_logger(config.log)
    device = resolve_device(config.device, world)
    check_speed(config, device)
    if given.backbone is not None and config.init is not None:
        raise ConfigError("init", config.init, "does not apply to a backbone given as a module")
    weights = None
    if config.init is not None and content is None:
        weights = read_first_weights(config.init)
        config = config.changed(arch=config.arch or weights.arch or likely_arch(weights))
    # Processes may take differently long, from disks of their own.
    images, bank, queries, evaluation = world.together(lambda: load_images(config, given))
    check_same_images(images, config.data, world)
    check_online_probe(config, images)
    given_dim = config.numbers.get("projection_dim")
    config, method, defaults = fill(config, images, view_side(images, config))
    config = settle_speed(config, method, device)
    pretrained = None if weights is None else fit_first_weights(weights, config)
    if config.init is not None:
        if pretrained is None:
            normalisation = content["normalisation"]
        else:
            normalisation = (pretrained.mean, pretrained.std)
        normalise_as((images, bank, queries), *normalisation)
        if queries is not bank:
            evaluation = queries.describe()
    teacher = build_teacher(config, method, images, given)
    if teacher is not None:
        config, method = fit_to_teacher(config, method, teacher, given_dim)
    views = build_views(method, images, config.image_size, config.view_kernel)
    missing = kernel_missing(device) if config.view_kernel else None
    if missing is not None:
        raise ConfigError("view_kernel", "", missing)
    check_processes(config, method, world)
    check_memory(config, method, device, world)
    backbone = None if pretrained is None else pretrained.backbone
    if given.backbone is not None:
        backbone = copied_backbone(given.backbone, config.image_size)
    state = build_state(config, method, device, world, backbone, teacher)
    backend = choose_run_backend(config, state, device)
    knn = build_knn(config, bank, queries, device)
    make_resident(images, device)
    feed = BatchFeed(images, config.batch_size, config.seed, device, world, views)
    return Parts(
        config, defaults, images, evaluation, state, backend, knn, views, feed, world,
        pretrained, given,
    )  # fmt: skip


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


def build_state(
    config: TrainConfig,
    method: Method,
    device: torch.device,
    world: World = ALONE,
    backbone: nn.Module | None = None,
    teacher: nn.Module | None = None,
) -> TrainState:
    """Networks, queues and optimiser at step 0: a function of the configuration and the networks.

    Args:
        backbone: the student's; None for a random one.
        teacher: one that is frozen; None for a copy of the student.

    Raises:
        ConfigError: the backbone is unknown or cannot take images of this size, or has no part that
            is to be frozen.
    """
    torch.manual_seed(derived_seed(config.seed, "init"))
    try:
        if backbone is None:
            backbone = build_backbone(config.arch, config.image_size)
    except ValueError as error:
        raise ConfigError("arch", config.arch, str(error)) from error
    check_crops(config, method, backbone)
    projector = build_head(
        backbone.num_features, method.projector_hidden, method.projection_dim,
        layers=method.projector_layers, norm=method.projector_norm,
    )  # fmt: skip
    student: nn.Module = Encoder(backbone, projector)
    student = divide_splits(student, method.student_splits, world)
    student = student.to(device).train()
    freeze(config, student)
    heads = build_heads(method).to(device).train()
    optimizer = build_optimizer(
        nn.ModuleDict({"student": student, "heads": heads}),
        config.optimizer,
        lr=config.lr,
        weight_decay=config.weight_decay,
        momentum=config.sgd_momentum,
        decay_norms=config.decay_norms,
        layer_decay=config.layer_decay,
    )
    queues = build_queues(config, method, world).to(device)
    if teacher is None and method.teacher_sees():
        teacher = divide_splits(make_teacher(student), method.num_splits, world)
        freeze(config, teacher)
    teacher = nn.Identity() if teacher is None else teacher.to(device)
    state = TrainState(method, student, teacher, queues, optimizer, heads, world=world)
    if not world.alone and device.type == "cuda":
        synchronise_norms((student, heads), method.student_splits, world)
        synchronise_norms((teacher,), method.num_splits, world)
    speed_up(config, state)  # before DDP lays out the gradients
    if not world.alone:
        trained = Trained(student, heads)
        state.parallel = average_gradients(trained, world, accumulate=config.accumulate)
    return state


def check_memory(config: TrainConfig, method: Method, device: torch.device, world: World) -> None:
    """Refuse queues that are larger than the memory of the device.

    Raises:
        ConfigError: naming the flag and the bytes.
    """
    parts = world.size if config.queue_sharding else 1
    wanted = sum(method.queues().values()) * method.projection_dim * 4 // parts  # float32
    if device.type == "cuda":
        memory = torch.cuda.get_device_properties(device).total_memory
    else:
        memory = machine_memory()
    if wanted > memory:
        reason = f"takes {wanted:,} bytes, and {device.type} has {memory:,}"
        raise ConfigError("queue_size", method.queue_size, reason)


def machine_memory() -> int:
    """Bytes of memory that this machine has; of one that does not tell, as many as there can be."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (ValueError, OSError, AttributeError):
        return LARGEST


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


# ---------------------------------------------------------------------------------------- speed


def check_speed(config: TrainConfig, device: torch.device) -> None:
    """Refuse what the device or the machine cannot do.

    Raises:
        ConfigError: naming the flag.
    """
    is_gpu = device.type == "cuda"
    if config.cuda_graph and not is_gpu:
        raise ConfigError("cuda_graph", "", "needs a CUDA device, and this run is on the CPU")
    if config.compile or config.cuda_graph:
        flag = "cuda_graph" if config.cuda_graph else "compile"
        if is_gpu and importlib.util.find_spec("triton") is None:
            raise ConfigError(flag, "", "torch.compile needs triton on a GPU")
        if not is_gpu and _compiler() is None:
            raise ConfigError(flag, "", "torch.compile needs a C++ compiler, and there is none")


def settle_speed(config: TrainConfig, method: Method, device: torch.device) -> TrainConfig:
    """Fill what the flags leave open about speed: bf16 on GPUs that have it, channels last on GPUs.

    But not with split batch norm, which would copy there and back at every layer.
    """
    is_gpu, filled = device.type == "cuda", {}
    if config.precision is None:
        in_hardware = is_gpu and torch.cuda.is_bf16_supported(including_emulation=False)
        filled["precision"] = "bf16" if in_hardware else "fp32"
    if config.channels_last is None:
        filled["channels_last"] = is_gpu and method.num_splits == 1
    return dataclasses.replace(config, **filled)


def _compiler() -> str | None:
    named = os.environ.get("CXX")
    return next(filter(None, map(shutil.which, filter(None, (named, *_COMPILERS)))), None)


def speed_up(config: TrainConfig, state: TrainState) -> None:
    """Make the networks of a run compute as a settled configuration says, in place.

    bf16 is autocast's: weights stay float32, and projections leave the networks in float32. All but
    the precision change the last bits alone; names and values of parameters stay.
    """
    networks = [state.student, *([state.teacher] if state.method.teacher_sees() else ())]
    for network in networks:
        network.precision = PRECISIONS[config.precision or "fp32"]
        if config.channels_last:
            network.to(memory_format=torch.channels_last)
        if config.compile or config.cuda_graph:
            # In place, the call alone: Encoder.features, which evaluation takes, is not compiled.
            mode = "reduce-overhead" if config.cuda_graph else "default"
            network.compile(dynamic=False, mode=mode)


def keep_freed_pages() -> bool:
    """Tell glibc's malloc to keep freed memory; call it before the large tensors are made.

    It maps every large block afresh and returns it to the kernel when it is freed, so that each
    temporary tensor on the CPU would be paid for in page faults.

    Returns:
        True where it was done, False under another C library.
    """
    if platform.libc_ver()[0] != "glibc":
        return False
    try:
        libc = ctypes.CDLL(None)
        # mallopt returns 1 on success.
        kept = libc.mallopt(_M_MMAP_MAX, 0) == 1
        return libc.mallopt(_M_TRIM_THRESHOLD, _LARGEST_INT) == 1 and kept
    except (OSError, AttributeError):
        return False
