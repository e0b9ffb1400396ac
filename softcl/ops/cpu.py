"""The compiled CPU backend: one fused pass in C++, on AVX2, AVX-512 or portable vectors.

Sums are float32 whatever the inputs (float32, bfloat16 or float16 in any mix). The work is
O(N K D) and the memory O(N (D + k)) besides the outputs. Results are the same bits for the same
inputs and the same ``torch.get_num_threads()``.
"""

from __future__ import annotations

import torch
from torch import Tensor

from softcl import native
from softcl.ops.call import Call, fields_of, unsupported_types


def unsupported(call: Call) -> str | None:
    """Why this backend cannot run ``call``, or None."""
    if call.query.device.type != "cpu":
        return f"the tensors are on {call.query.device.type}"
    module, reason = native.load_for_cpu()
    return reason if module is None else unsupported_types(call)


def run(call: Call) -> tuple[Tensor, ...]:
    """The results of the call, as its `empty_results` lists them."""
    module, _ = native.load()
    results = call.empty_results()
    module.cpu_run(num_threads=torch.get_num_threads(), **fields_of(call, results))
    return tuple(results.values())
