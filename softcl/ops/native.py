"""What calls into softcl._C have in common: the module, and a call as fields of its C++ record.

A kernel gets addresses and sizes by name; 0 is the address of what is absent or not wanted.
"""

from __future__ import annotations

import dataclasses
import functools
from types import ModuleType

import torch
from torch import Tensor  # torch first: its OpenMP runtime then serves softcl._C too

from softcl.labels import TEACHER_POSITIVES, LabelRule
from softcl.ops.call import Call, LossCall

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


_TENSORS = ("query", "key", "queue", "excluded")
# Fields that say what is wanted: C++ sees it by which results have an address.
_WANTED = ("sums", "gradient", "diagnostics", "backend", "num_neighbors")


def fields_of(call: Call, results: dict[str, Tensor]) -> dict[str, object]:
    """``call`` and its results as the fields of struct Call in csrc/include/softcl/call.h."""
    rule = (
        rule_fields(call.rule)
        if isinstance(call, LossCall)
        else {"num_neighbors": call.num_neighbors}
    )
    fields = dict(zip(call._fields, call, strict=True), rule=rule)
    for name in _WANTED:
        fields.pop(name, None)
    for name in _TENSORS:
        if name in fields:
            tensor = fields[name]
            fields[name] = 0 if tensor is None else tensor.data_ptr()
    for name, result in results.items():
        fields[name] = result.data_ptr()
    fields["num_queries"], fields["dim"] = call.query.shape
    fields["queue_size"] = call.queue.shape[0]
    fields["vector_type"] = ELEMENT_TYPES[call.query.dtype]
    fields["queue_type"] = ELEMENT_TYPES[call.queue.dtype]
    return fields


@functools.lru_cache(maxsize=256)
def rule_fields(rule: LabelRule) -> dict[str, object]:
    fields = {field.name: getattr(rule, field.name) for field in dataclasses.fields(rule)}
    fields["teacher_positive"] = TEACHER_POSITIVES.index(rule.teacher_positive)
    return fields
