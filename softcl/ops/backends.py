"""Which backend runs a call: the fastest that can, or the one asked for, with every reason kept.

A backend is one module ``softcl/ops/<name>.py`` with two functions:

    unsupported(call) -> None, or one clause that says why this call cannot run here
    run(call) -> the call's results, as its `empty_results` lists them

``softcl/ops/reference.py`` is their specification. Backends never import each other; what they
share is in ``softcl/ops/algebra.py``.
"""

from __future__ import annotations

import functools
import importlib
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from types import ModuleType

import torch

from softcl import native
from softcl.errors import UnsupportedBackendError
from softcl.ops import trial, tune
from softcl.ops.call import Call

# Name -> the device types on which backend="auto" tries it, in this order; None: on all. "cuda"
# comes first for the calls of CUDA_AT_LEAST_AS_FAST.
BACKENDS: dict[str, tuple[str, ...] | None] = {
    "triton": ("cuda",),
    "cuda": (),
    "cpu": ("cpu",),
    "reference": None,
}

# Backends written as one fused pass: what `--fused` demands.
FUSED_BACKENDS = tuple(name for name in BACKENDS if name != "reference")


@dataclass(frozen=True)
class Measured:
    """Calls for which bench/ has shown backend "cuda" to be at least as fast as "triton".

    Attributes:
        capability: compute capability of the GPU.
        operation: "queue_statistics" or "soft_contrastive".
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
        (N, D), K = call.query.shape, call.queue.shape[0]
        sizes = ((self.N, N), (self.K, K), (self.D, D))
        return (
            call.operation == self.operation
            and call.query.dtype == call.queue.dtype == self.dtype
            and all(least <= size <= most for (least, most), size in sizes)
            and capability_of(call.query.device) == self.capability
        )


# Empty: the kernels of "cuda" have not yet run on a GPU, so nothing is measured. They run where
# they are asked for by name, and where `python -m softcl.doctor --tune` found them as fast.
CUDA_AT_LEAST_AS_FAST: tuple[Measured, ...] = ()


@functools.cache
def capability_of(device: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device)


def preference(call: Call) -> Iterator[str]:
    """The backends that backend="auto" tries for ``call``, in this order."""
    device = call.query.device.type
    if device == "cuda":
        if any(row.covers(call) for row in CUDA_AT_LEAST_AS_FAST) or tune.prefers_cuda(call):
            yield "cuda"
    for name, types in BACKENDS.items():
        if types is None or device in types:
            yield name


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


def reason_against(name: str, call: Call) -> str | None:
    """Why backend="auto" does not take a backend for ``call``, or None."""
    reason = load_backend(name).unsupported(call)
    if reason is None and call.query.device.type == "cuda":
        return trial.reason_against(name, call)
    return reason


def choose(call: Call) -> BackendChoice:
    """The backend that runs ``call``.

    Raises:
        ValueError: ``call.backend`` is not "auto" and names no backend.
        UnsupportedBackendError: the backend asked for cannot run this call.
    """
    backend = call.backend
    if backend == "auto":
        reasons: dict[str, str] = {}
        for name in preference(call):
            reason = reason_against(name, call)
            if reason is None:
                passed_over = "; ".join(f"{k}: {v}" for k, v in reasons.items())
                first = f"the first choice for tensors on {call.query.device.type}"
                return BackendChoice(name, reasons, passed_over or first)
            reasons[name] = reason
        raise UnsupportedBackendError(
            "no backend runs this call: " + "; ".join(f"{k}: {v}" for k, v in reasons.items())
        )
    check_backend_name(backend)
    reason = load_backend(backend).unsupported(call)
    if reason is not None:
        raise UnsupportedBackendError(f"backend {backend!r} cannot run this call: {reason}")
    return BackendChoice(backend, {}, "asked for by name")


def load_chosen(call: Call) -> ModuleType:
    """The module of the backend that `choose` names, without its words where the first runs."""
    if call.backend == "auto":
        first = next(preference(call))
        if reason_against(first, call) is None:
            return load_backend(first)
    choice = choose(call)
    if call.backend == "auto" and call.query.device.type == "cpu":
        _tell_of_missing_module(choice.name)
    return load_backend(choice.name)


@functools.cache
def _tell_of_missing_module(backend: str) -> None:
    """Once, at the first call that does without it: results are the same, and come later."""
    module, reason = native.load()
    if module is None:
        warnings.warn(f"softcl runs {backend}: {reason}; {native.advice()}", stacklevel=2)


def check_backend_name(backend: str) -> None:
    if backend != "auto" and backend not in BACKENDS:
        names = ", ".join(repr(name) for name in ("auto", *BACKENDS))
        raise ValueError(f"backend must be one of {names}, got {backend!r}")
