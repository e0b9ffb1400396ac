"""Enqueue: normalise keys, round them, and write them into a ring of rows, refusing bad ones.

The same operation as csrc/include/softcl/enqueue.h, whose CPU code runs where it is built, and as
kernels/enqueue.py, which runs on GPUs where Triton is installed; PyTorch otherwise.

``torch.ops.softcl.enqueue`` is the operation as PyTorch knows it: its schema says what it changes,
and torch.compile calls it without looking inside.
"""

from __future__ import annotations

import functools
import importlib.util
import os
from types import ModuleType

import torch

from softcl import native, trust
from softcl.native import ELEMENT_TYPES

SMALLEST_NORM = 1e-12  # below it the operator's normalisation no longer gives unit rows

LIBRARY = torch.library.Library("softcl", "FRAGMENT")
LIBRARY.define(
    "enqueue(Tensor keys, Tensor(a!) rows, Tensor(b!) refused, Tensor(c!) pointer, bool normalize) "
    "-> ()",
    # torch.compile(mode="reduce-overhead") then leaves it out of its CUDA graphs.
    tags=(torch.Tag.cudagraph_unsafe,),
)


def enqueue(
    keys: torch.Tensor,  # (N, D)
    rows: torch.Tensor,  # (K, D)
    refused: torch.Tensor,  # () int64, where the rows are
    pointer: torch.Tensor,  # () int64, on the CPU
    normalize: bool,
) -> None:
    """`write` the keys from row ``pointer`` on, and move it on by N, mod K.

    Raises:
        RuntimeError: a CUDA graph is being captured. The host moves the pointer, and takes no part
            in a replay: every replay would write the same rows.
    """
    refuse_capture("MemoryQueue")
    start = int(pointer)
    write(keys, rows, refused, start, normalize)
    pointer.fill_((start + keys.shape[0]) % rows.shape[0])


def refuse_capture(kind: str) -> None:
    if torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            f"{kind}.enqueue cannot be captured in a CUDA graph, whose replays would all write the "
            "same rows: enqueue after the replay, outside the graph"
        )


LIBRARY.impl("enqueue", enqueue, "CompositeExplicitAutograd")
torch.library.register_fake("softcl::enqueue", lambda *arguments: None, lib=LIBRARY)


def write(
    keys: torch.Tensor,  # (N, D)
    rows: torch.Tensor,  # (K, D)
    refused: torch.Tensor,  # () int64
    pointer: int,
    normalize: bool,
) -> None:
    """Write key i to row (pointer + i) mod K, one after the other; add refused keys to ``refused``.

    A key with a NaN, an infinity or a norm below 1e-12 is refused: its row stays. With
    ``normalize`` keys are divided by their norms, in float64 (in Triton in float32, scaled so that
    no square overflows or vanishes); otherwise they are judged as they are stored, because 1e5 is
    infinite in float16. rows and refused change in place; the host waits for no device.
    """
    known = keys.dtype in ELEMENT_TYPES and rows.dtype in ELEMENT_TYPES and len(keys) > 0
    module = native.load()[0] if rows.device.type == "cpu" else None
    kernel = kernel_for(keys, rows) if known and module is None else None
    if known and module:
        enqueue_native(module, keys, rows, refused, pointer, normalize)
    elif kernel:
        enqueue_triton(kernel, keys, rows, refused, pointer, normalize)
    else:
        enqueue_torch(keys, rows, refused, pointer, normalize)


def enqueue_native(
    module: ModuleType,
    keys: torch.Tensor,
    rows: torch.Tensor,
    refused: torch.Tensor,
    pointer: int,
    normalize: bool,
) -> None:
    """The compiled CPU code, on contiguous keys that do not overlap the rows."""
    keys = keys.contiguous()
    if keys.untyped_storage().data_ptr() == rows.untyped_storage().data_ptr():
        keys = keys.clone()
    refused += module.cpu_enqueue(
        keys=keys.data_ptr(),
        queue=rows.data_ptr(),
        num_keys=keys.shape[0],
        queue_size=rows.shape[0],
        dim=rows.shape[1],
        pointer=pointer,
        key_type=ELEMENT_TYPES[keys.dtype],
        queue_type=ELEMENT_TYPES[rows.dtype],
        normalize=normalize,
    )
    # PyTorch did not see the write: without this a backward that needs the old rows would not fail.
    torch.autograd.graph.increment_version(rows)


def _runs_triton(device: torch.device) -> bool:
    """On GPUs that Triton compiles for; in its interpreter on the CPU."""
    if device.type == "cpu":
        return os.environ.get("TRITON_INTERPRET", "0") == "1"
    if device.type != "cuda":
        return False
    return torch.version.hip is not None or torch.cuda.get_device_capability(device) >= (8, 0)


@functools.cache
def _triton() -> ModuleType | None:
    if importlib.util.find_spec("triton") is None:
        return None
    from softcl.kernels import enqueue as kernel

    return kernel


def enqueue_triton(
    kernel: ModuleType,
    keys: torch.Tensor,
    rows: torch.Tensor,
    refused: torch.Tensor,
    pointer: int,
    normalize: bool,
) -> None:
    """The Triton kernel, on contiguous keys that do not overlap the rows."""
    keys = keys.contiguous()
    if keys.untyped_storage().data_ptr() == rows.untyped_storage().data_ptr():
        keys = keys.clone()
    if rows.device.type == "cuda":
        with torch.cuda.device(rows.device):  # Triton launches on the current device
            kernel.launch(keys, rows, refused, pointer, normalize)
    else:
        kernel.launch(keys, rows, refused, pointer, normalize)
    torch.autograd.graph.increment_version(rows)  # as above


def enqueue_torch(
    keys: torch.Tensor,
    rows: torch.Tensor,
    refused: torch.Tensor,
    pointer: int,
    normalize: bool,
) -> None:
    """Plain PyTorch, any device."""
    # In pieces of K keys, which all start at the pointer: a refused key in a later piece leaves the
    # row of the earlier piece.
    for keys_of_piece in keys.split(rows.shape[0]):
        piece, accepted = _round(keys_of_piece, rows.dtype, normalize)
        refused += (~accepted).sum()
        before_end = min(len(piece), rows.shape[0] - pointer)
        for start, run in ((pointer, slice(before_end)), (0, slice(before_end, None))):
            held = rows[start : start + len(piece[run])]
            held.copy_(torch.where(accepted[run], piece[run], held))


def _round(
    keys: torch.Tensor, dtype: torch.dtype, normalize: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """The rows that keys become, (N, D) of dtype, and which are accepted, (N, 1)."""
    # In float64, where no finite float32 row has an infinite norm.
    wide = (keys if normalize else keys.to(dtype)).double()
    norms = torch.linalg.vector_norm(wide, dim=1, keepdim=True)
    accepted = (norms >= SMALLEST_NORM) & norms.isfinite()  # a NaN fails both
    if normalize:
        wide = wide * norms.reciprocal()
    return wide.float().to(dtype), accepted


# ------------------------------------------------------------------------------------------- trial


def kernel_for(keys: torch.Tensor, rows: torch.Tensor) -> ModuleType | None:
    """The Triton kernel where it runs and, on a GPU, was right once (softcl/trust.py)."""
    kernel = _triton() if _runs_triton(rows.device) else None
    if kernel is None or rows.device.type == "cpu":
        return kernel
    reason = trust.reason_against(
        "softcl.nn.enqueue:try_kernel",
        "the enqueue kernel",
        rows.device,
        D=rows.shape[1],
        key_dtype=str(keys.dtype).removeprefix("torch."),
        row_dtype=str(rows.dtype).removeprefix("torch."),
    )
    return kernel if reason is None else None


def try_kernel(device: str, D: int, key_dtype: str, row_dtype: str) -> None:
    """Enqueue keys over the ring's end, a bad one among them, with the kernel and with PyTorch.

    Raises:
        AssertionError: the two differ by more than a rounding.
        Exception: the kernel fails.
    """
    generator = torch.Generator().manual_seed(0)
    keys = torch.randn(48, D, generator=generator)
    keys[5, 0] = torch.nan
    keys = keys.to(device, getattr(torch, key_dtype))
    rows = torch.zeros(64, D, dtype=getattr(torch, row_dtype), device=device)
    results = []
    for function in (functools.partial(enqueue_triton, _triton()), enqueue_torch):
        ring, refused = rows.clone(), torch.zeros((), dtype=torch.int64, device=device)
        for normalize in (True, False):
            function(keys, ring, refused, 32, normalize)
        results.append((ring.double().cpu(), int(refused)))
    (found, counted), (expected, known) = results
    assert counted == known, f"{counted} keys were refused in place of {known}"
    error = float((found - expected).abs().max())
    assert error <= 0.01, f"rows are off by {error:.2e}"
