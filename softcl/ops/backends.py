"""Which backend runs a call: the fastest that can, or the one asked for, with every reason kept.

A backend is one module ``softcl/ops/<name>.py`` with three functions:

    unsupported(call) -> None, or one clause that says why this call cannot run here
    queue_statistics(vectors, queue, temperature, num_neighbors, *, sums)
    soft_contrastive(query, key, queue, rule, temperature, teacher_temperature, *,
                     positive, normalize, gradient, diagnostics)

``softcl/ops/reference.py`` is the specification of the last two: same arguments, same results.
Backends never import each other.

An option that not every backend has is a keyword argument of the last two and a name in the
module's constant ``OPTIONS``. A backend without that constant, or without the name in it, never
sees the argument: `choose` passes it over, with the reason. So far:

    excluded    (N,) int64, a queue row for each vector that takes no part in its sums; -1 for none
"""

from __future__ import annotations

import functools
import importlib
from dataclasses import dataclass
from types import ModuleType

import torch
from torch import Tensor

from softcl.labels import LabelRule

BACKENDS = ("triton", "cuda", "cpu", "reference")

# Backends written as one fused pass: what `--fused` demands.
FUSED_BACKENDS = ("triton", "cuda", "cpu")

# Device type -> backends in the order in which backend="auto" tries them. "cuda" comes before them
# for the calls of CUDA_AT_LEAST_AS_FAST.
PREFERENCE = {
    "cpu": ("cpu", "reference"),
    "cuda": ("triton", "reference"),
}


class UnsupportedBackendError(RuntimeError):
    """An explicitly chosen backend cannot run this call; the message says why."""


@dataclass(frozen=True)
class Call:
    """What a backend needs to know to accept or decline a call.

    Attributes:
        operation: "queue_statistics" or "soft_contrastive".
        device: where all tensors lie.
        vector_dtype: dtype of the vectors, or of query and key.
        queue_dtype: dtype of the queue.
        N, K, D: rows of the vectors, rows of the queue, their common dimension.
        num_neighbors: how many neighbours are asked for.
        temperature: the smallest temperature in use; unit rows bound the logits by its inverse.
        options: names of the options in use, see the module's text.
    """

    operation: str
    device: torch.device
    vector_dtype: torch.dtype
    queue_dtype: torch.dtype
    N: int
    K: int
    D: int
    num_neighbors: int
    temperature: float
    options: frozenset[str] = frozenset()

    @classmethod
    def of_statistics(
        cls,
        vectors: Tensor,
        queue: Tensor,
        temperature: float,
        num_neighbors: int,
        options: frozenset[str] = frozenset(),
    ) -> Call:
        return cls(
            "queue_statistics",
            vectors.device,
            vectors.dtype,
            queue.dtype,
            vectors.shape[0],
            queue.shape[0],
            vectors.shape[1],
            num_neighbors,
            temperature,
            options,
        )

    @classmethod
    def of_loss(
        cls,
        query: Tensor,
        queue: Tensor,
        rule: LabelRule,
        temperature: float,
        teacher_temperature: float,
        options: frozenset[str] = frozenset(),
    ) -> Call:
        coldest = min(temperature, teacher_temperature) if rule.needs_softmax else temperature
        return cls(
            "soft_contrastive",
            query.device,
            query.dtype,
            queue.dtype,
            query.shape[0],
            queue.shape[0],
            query.shape[1],
            rule.num_neighbors,
            coldest,
            options,
        )


@dataclass(frozen=True)
class Measured:
    """Calls for which bench/ has shown backend "cuda" to be at least as fast as "triton".

    Attributes:
        capability: compute capability of the GPU.
        operation: as in :class:`Call`.
        dtype: of the vectors and of the queue.
        N, K, D: smallest and largest of each; between two measured sizes both hold.
        source: the file in bench/results with the two times.
    """

    capability: tuple[int, int]
    operation: str
    dtype: torch.dtype
    N: tuple[int, int]
    K: tuple[int, int]
    D: tuple[int, int]
    source: str

    def covers(self, call: Call) -> bool:
        sizes = ((self.N, call.N), (self.K, call.K), (self.D, call.D))
        return (
            call.operation == self.operation
            and call.vector_dtype == call.queue_dtype == self.dtype
            and all(least <= size <= most for (least, most), size in sizes)
            and capability_of(call.device) == self.capability
        )


# Empty: the kernels of "cuda" have not yet run on a GPU, so nothing is measured. They run where
# they are asked for by name.
CUDA_AT_LEAST_AS_FAST: tuple[Measured, ...] = ()


@functools.cache
def capability_of(device: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device)


def preference(call: Call) -> tuple[str, ...]:
    """The backends that backend="auto" tries for ``call``, in this order."""
    names = PREFERENCE.get(call.device.type, ("reference",))
    if call.device.type == "cuda" and any(row.covers(call) for row in CUDA_AT_LEAST_AS_FAST):
        return ("cuda", *names)
    return names


@dataclass(frozen=True)
class BackendChoice:
    """The backend of a call, why it runs and, for each one passed over before it, the reason.

    Attributes:
        name: the backend that runs.
        reasons: backend -> why it was passed over, in order of preference; empty if the first ran
            or if the backend was asked for by name.
        why: what made it the one, in a few words. ``str(choice)`` gives name and why.
    """

    name: str
    reasons: dict[str, str]
    why: str = ""

    def __str__(self) -> str:
        return f"{self.name} ({self.why})" if self.why else self.name


@functools.cache
def load_backend(name: str) -> ModuleType:
    """The module of one backend, imported at its first use."""
    return importlib.import_module(f"softcl.ops.{name}")


def options_of(name: str) -> frozenset[str]:
    """The options of a backend, beyond what every backend does."""
    return frozenset(getattr(load_backend(name), "OPTIONS", ()))


def reason_against(name: str, call: Call) -> str | None:
    """Why a backend cannot run ``call``, or None."""
    lacking = call.options - options_of(name)
    if lacking:
        return f"it does not have the option {', '.join(sorted(lacking))}"
    return load_backend(name).unsupported(call)


def choose(call: Call, backend: str = "auto") -> BackendChoice:
    """The backend that runs ``call``.

    Raises:
        ValueError: ``backend`` is not "auto" and names no backend.
        UnsupportedBackendError: the backend asked for cannot run this call.
    """
    if backend == "auto":
        reasons: dict[str, str] = {}
        for name in preference(call):
            reason = reason_against(name, call)
            if reason is None:
                passed_over = "; ".join(f"{k}: {v}" for k, v in reasons.items())
                first = f"the first choice for tensors on {call.device.type}"
                return BackendChoice(name, reasons, passed_over or first)
            reasons[name] = reason
        raise UnsupportedBackendError(
            "no backend runs this call: " + "; ".join(f"{k}: {v}" for k, v in reasons.items())
        )
    check_backend_name(backend)
    reason = reason_against(backend, call)
    if reason is not None:
        raise UnsupportedBackendError(f"backend {backend!r} cannot run this call: {reason}")
    return BackendChoice(backend, {}, "asked for by name")


def check_backend_name(backend: str) -> None:
    if backend != "auto" and backend not in BACKENDS:
        names = ", ".join(repr(name) for name in ("auto", *BACKENDS))
        raise ValueError(f"backend must be one of {names}, got {backend!r}")
