"""The compiled CPU backend: one fused pass in C++, on AVX2, AVX-512 or portable vectors.

Sums are float32 whatever the inputs (float32, bfloat16 or float16 in any mix). The work is
O(N K D) and the memory O(N (D + k)) besides the outputs. Results are the same bits for the same
inputs and the same ``torch.get_num_threads()``.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from softcl.ops import native
from softcl.ops.call import Call


@functools.cache
def _isa_refused() -> str | None:
    """Why SOFTCL_CPU_ISA cannot be obeyed, or None."""
    module, _ = native.load()
    try:
        module.isa()
    except ValueError as error:
        return str(error)
    return None


def unsupported(call: Call) -> str | None:
    """Why this backend cannot run ``call``, or None."""
    if call.query.device.type != "cpu":
        return f"the tensors are on {call.query.device.type}"
    module, reason = native.load()
    if module is None:
        return reason
    return native.unsupported_types(call) or _isa_refused()


def run(call: Call) -> tuple[Tensor, ...]:
    """The results of the call, as its `empty_results` lists them."""
    module, _ = native.load()
    results = call.empty_results()
    module.cpu_run(num_threads=torch.get_num_threads(), **native.fields_of(call, results))
    return tuple(results.values())
