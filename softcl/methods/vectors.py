"""What a loss module was given, sorted by view, and refused in one line where it does not fit."""

from __future__ import annotations

import dataclasses
import numbers
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from softcl.distributed import ShardedQueue, ShardedRows, World
from softcl.methods.method import Method
from softcl.nn import MemoryQueue
from softcl.ops.call import (
    all_finite,
    check_rows,
    check_rows_like,
    explain_non_finite,
    shape_of,
    values_are_at_hand,
)


def vectors_of(method: Method, argument: str, given: Any, sees: tuple[str, ...]) -> dict[str, Any]:
    """The vectors of the views `sees`, in their order, each by the name that messages give it.

    One view: a tensor, "query". Several: a tuple in the order of ``method.views()``, "query[0]" and
    "query[1]"; or, as one view may be, a mapping by view. No view: None.
    """
    views = ", ".join(sees)
    if isinstance(given, Mapping):
        if set(given) != set(sees):
            raise ValueError(f"{argument} must be of the views {views}, got {', '.join(given)}")
        return {f"{argument}[{view!r}]": given[view] for view in sees}
    several = isinstance(given, (tuple, list))
    if not sees:
        if given is not None:
            raise ValueError(f"{argument} must be None: {type(method).__name__} sees no view there")
        return {}
    may_swap = any(field.name == "symmetric" for field in dataclasses.fields(method))
    hint = " without symmetric=True" if may_swap else ""
    if len(sees) == 1:
        if several:
            raise TypeError(f"{argument} must be one tensor{hint}, got {_shown(given)}")
        return {argument: given}
    hint = " with symmetric=True" if getattr(method, "symmetric", False) else ""
    if not several:
        raise TypeError(f"{argument} must be a tuple{hint}, of {views}, got {_shown(given)}")
    order = [view for view in method.views() if view in sees]
    order += [view for view in sees if view not in order]
    if len(given) != len(order):
        wanted = f"{len(order)} tensors{hint}, of {', '.join(order)}"
        raise ValueError(f"{argument} must be {wanted}, got {_shown(given)}")
    places = {view: place for place, view in enumerate(order)}
    return {f"{argument}[{places[view]}]": given[places[view]] for view in sees}


def _shown(given: Any) -> str:
    if isinstance(given, Tensor):
        return f"a tensor of shape {shape_of(given)}"
    if isinstance(given, (tuple, list)):
        return f"a {type(given).__name__} of {len(given)}"
    return type(given).__name__


def check_same(vectors: Mapping[str, Tensor]) -> None:
    """Refuse what are not matrices (N, D) of one shape on one device."""
    (first, like), *rest = vectors.items()
    check_rows(first, like)
    for name, rows in rest:
        check_rows_like(name, rows, like, first)
        if rows.shape != like.shape:
            raise ValueError(
                f"{name} must have {first}'s shape {shape_of(like)}, got {shape_of(rows)}"
            )


def check_finite(vectors: Mapping[str, Tensor]) -> None:
    """Refuse NaN and infinity, where looking for them waits for no device."""
    if not all(all_finite(rows) for rows in vectors.values() if values_are_at_hand(rows)):
        explain_non_finite(**vectors)


def check_queue(name: str, queue: Any, like_name: str, like: Tensor) -> None:
    """Refuse a queue without rows, or of another dimension than the vectors."""
    if isinstance(queue, (MemoryQueue, ShardedQueue)):
        if queue.filled == 0:
            raise ValueError(f"{name} is empty: enqueue keys first, or make it with init='random'")
        queue = queue.rows
    rows = queue.local if isinstance(queue, ShardedRows) else queue
    if not isinstance(rows, Tensor):
        raise TypeError(f"{name} must be a MemoryQueue or a tensor, got {type(queue).__name__}")
    check_rows_like(name, rows, like, like_name)


def check_order(order: Any, like: Tensor, world: World) -> None:
    """Refuse what does not name one image of the batch for each row."""
    count = like.shape[0] * world.size
    if not isinstance(order, Tensor):
        raise TypeError(f"order must be a tensor, got {type(order).__name__}")
    if order.dtype != torch.int64 or order.shape != like.shape[:1]:
        raise ValueError(
            f"order must be int64 of shape ({like.shape[0]},), "
            f"got {order.dtype} of shape {shape_of(order)}"
        )
    if values_are_at_hand(order) and not 0 <= int(order.min()) <= int(order.max()) < count:
        worst = int(order.min()) if int(order.min()) < 0 else int(order.max())
        raise ValueError(f"order must be of images 0 to {count - 1}, got {worst}")


def check_share(share: Any) -> None:
    """Refuse what is no share of an image; of a tensor without looking at its value."""
    if isinstance(share, Tensor) and share.dim() == 0:
        return
    if isinstance(share, bool) or not isinstance(share, numbers.Real):
        raise TypeError(f"share must be a number, got {_shown(share)}")
    if not 0.0 <= share <= 1.0:
        raise ValueError(f"share must be in [0, 1], got {share}")
