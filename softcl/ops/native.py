"""What calls into softcl._C have in common: the module, and a call as fields of its C++ record.

A kernel gets addresses and sizes by name; 0 is the address of what is absent or not wanted.
"""

from __future__ import annotations

import functools
from types import ModuleType

import torch
from torch import Tensor  # torch first: its OpenMP runtime then serves softcl._C too

from softcl.labels import TEACHER_POSITIVES, LabelRule
from softcl.ops.call import Call

# The values of ElementType in csrc/include/softcl/element_type.h.
ELEMENT_TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}


@functools.cache
def load() -> tuple[ModuleType | None, str]:
    """The compiled module, or None and why it cannot be used."""
    try:
        from softcl import _C
    except ImportError as error:
        return None, f"softcl._C is not built ({error})"
    return _C, ""


def unsupported_types(call: Call) -> str | None:
    for name, rows in (("vectors", call.query), ("queue", call.queue)):
        if rows.dtype not in ELEMENT_TYPES:
            return f"the {name} are {rows.dtype}, not float32, bfloat16 or float16"
    return None


# Fields that say what is wanted: C++ sees it by which results have an address.
_WANTED = frozenset({"sums", "gradient", "diagnostics", "backend", "num_neighbors"})


def fields_of(call: Call, results: dict[str, Tensor]) -> dict[str, object]:
    """``call`` and its results as the fields of struct Call in csrc/include/softcl/call.h."""
    n, d = call.query.shape
    fields: dict[str, object] = {
        "vector_type": ELEMENT_TYPES[call.query.dtype],
        "queue_type": ELEMENT_TYPES[call.queue.dtype],
        "num_queries": n,
        "queue_size": call.queue.shape[0],
        "dim": d,
        "rule": {"num_neighbors": call.num_neighbors},
    }
    for name, value in zip(call._fields, call, strict=True):
        if isinstance(value, Tensor):
            fields[name] = value.data_ptr()
        elif isinstance(value, LabelRule):
            fields[name] = rule_fields(value)
        elif value is not None and name not in _WANTED:
            fields[name] = value
    for name, result in results.items():
        fields[name] = result.data_ptr()
    return fields


@functools.lru_cache(maxsize=256)
def rule_fields(rule: LabelRule) -> dict[str, object]:
    fields = dict(vars(rule))
    fields["teacher_positive"] = TEACHER_POSITIVES.index(rule.teacher_positive)
    return fields
