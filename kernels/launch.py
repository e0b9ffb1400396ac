"""Launching: a kernel that was launched before is launched again without asking the compiler.

Triton's own path compares types, options and globals at every call, which costs more than the rest
of a call together. What a compilation depends on here is short: its constants, and the dtype and
the 16-byte alignment of every tensor, for AMD also whether it is below 2 GiB. Integers are not
specialised on, and fit in 32 bits.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .numerics import INTERPRET

IS_AMD = torch.version.hip is not None

_compiled: dict[tuple, object] = {}


def as_constants(value):
    """A kernel's compile-time argument, every field of a tuple as a compile-time value.

    Triton 3.6 hands the fields to the kernel as they are, where 3.8 wraps them: a number among the
    sizes of a shape, or as the end of a loop, would not compile.
    """
    if not isinstance(value, tuple):
        return value
    fields = (x if isinstance(x, tl.constexpr) else tl.constexpr(x) for x in value)
    return type(value)(*fields)


def compile_options(num_warps: int, num_stages: int, max_registers: int | None) -> dict:
    """Triton's names for them."""
    options = {"num_warps": num_warps, "num_stages": num_stages}
    return options if max_registers is None else {**options, "maxnreg": max_registers}


def launch(
    kernel,
    grid: tuple[int, int],
    arguments: tuple,
    constants: tuple,
    *,
    num_warps: int,
    num_stages: int = 1,
    max_registers: int | None = None,
) -> None:
    """Launch ``kernel(*arguments, *constants)`` on the current device and stream.

    ``constants`` are its compile-time arguments, which come last. ``max_registers`` of a thread are
    for NVIDIA's compiler. Nothing waits for the device.
    """
    if INTERPRET.value:
        kernel[grid](*arguments, *constants)
        return
    driver = triton.runtime.driver.active
    device = driver.get_current_device()
    tensors = tuple([(x.dtype, x.data_ptr() & 15 == 0) for x in arguments if isinstance(x, Tensor)])
    if IS_AMD:  # whose compiler takes 32-bit offsets where they reach all of a tensor
        tensors += tuple(
            [x.untyped_storage().size() < 2**31 for x in arguments if isinstance(x, Tensor)]
        )
    key = (kernel.__name__, constants, num_warps, num_stages, max_registers, device, tensors)
    compiled = _compiled.get(key)
    if compiled is None:
        options = compile_options(num_warps, num_stages, max_registers)
        _compiled[key] = kernel[grid](*arguments, *map(as_constants, constants), **options)
        return
    stream = driver.get_current_stream(device)
    compiled.run(
        *grid, 1, stream, compiled.function, compiled.packed_metadata, None, None, None,
        *arguments, *constants,
    )  # fmt: skip
