"""Both operators over a queue that no process holds all of.

Every process has n queries and a part of the queue (`ShardedRows`). All the vectors visit every
part, in whatever backend runs there, and what a part knows about a vector goes back to the vector's
owner, which merges the W parts and finishes as the reference does (softcl/ops/algebra.py):

    vectors   n rows                 -> every process     queries and keys, as unit rows
    student   lse, mean, rank        -> the owners        under way while the teacher's pass runs
    teacher   lse, H, mean, k best   -> the owners        only what the label rule reads
    neighbors indices and weights    -> every process     for rules that add nearest rows, and
              their weighted sum     -> the owners        ... back

The gradient is known then, to the owner: the backward pass of the loss exchanges nothing. Results
do not depend on the number of processes beyond rounding, and are the same in every run.
"""

from __future__ import annotations

import sys

import torch
from torch import Tensor
from torch.nn.functional import pad

from softcl.distributed.shards import ShardedRows
from softcl.labels import HardLabels
from softcl.ops import algebra, library, register_rows
from softcl.ops.algebra import merge_neighbors, merge_sums
from softcl.ops.call import Call, LossCall, StatisticsCall, sum_dtype
from softcl.ops.library import read_temperatures

_NO_ROW = 1 << 62  # stands after every row where a part has too few


def local_rows(queue: ShardedRows, **vectors: Tensor) -> Tensor:
    """This process's part of the queue; processes with batches of other lengths are told."""
    for name, rows in vectors.items():
        queue.world.check_rows(name, rows.shape[0])
    return queue.local


def weighted_sum(queue: ShardedRows, indices: Tensor, weights: Tensor) -> Tensor:
    """sum_j weights_nj row_(indices_nj), (n, D), of one's own weights (n, w), first w indices."""
    return queue.weighted_sum(indices[:, : weights.shape[1]], weights)


def run(call: Call) -> tuple[Tensor, ...]:
    """The results of a call, in the dtypes of its tensors, as the operators on one process are."""
    call = read_temperatures(call)
    with torch.autocast(device_type=call.query.device.type, enabled=False):
        return _Loss.apply(*call) if isinstance(call, LossCall) else queue_statistics(call)


def queue_statistics(call: StatisticsCall) -> tuple[Tensor, ...]:
    """The statistics of this process's vectors (n, D) over all the rows.

    Differentiable in the vectors and in the local rows, also with respect to what other processes
    make of them: gradients travel the same ways back.
    """
    rows, k = call.queue, call.num_neighbors
    world = rows.world
    gathered = world.all_gather(call.query).flatten(0, 1)  # (W n, D)
    lse, mean, entropy, logits, indices = _local(
        call._replace(query=gathered, excluded=_excluded_here(call.excluded, rows))
    )
    if k > 0:
        indices = world.exchange(_by_owner(indices, world.size))  # (W, n, k)
    if not call.sums:
        nearest = _merge_lists(world.exchange(_by_owner(logits, world.size)), indices)
        return lse[:0], mean[:0], entropy[:0], *nearest
    numbers = torch.cat([lse[:, None], entropy[:, None], mean, logits], 1)
    numbers = world.exchange(_by_owner(numbers, world.size))  # (W, n, 2 + D + k)
    lse, entropy, mean, logits = numbers.split((1, 1, mean.shape[1], k), 2)
    sums_of_all = merge_sums(lse.squeeze(2), mean, entropy.squeeze(2))
    lse, mean, entropy = (x.to(numbers.dtype) for x in sums_of_all)
    if k == 0:
        return lse, mean, entropy, logits[0], indices[: len(call.query)]
    return lse, mean, entropy, *_merge_lists(logits, indices)


def _excluded_here(excluded: Tensor | None, rows: ShardedRows) -> Tensor | None:
    """Of every process's vectors (W n,) the excluded row's place in the local rows, or -1."""
    if excluded is None:
        return None
    world = rows.world
    places = world.all_gather(excluded).flatten()
    return torch.where(
        (places >= 0) & (places % world.size == world.rank), places // world.size, -1
    )


def _local(call: StatisticsCall) -> tuple[Tensor, ...]:
    """Statistics of all vectors over the local rows, indices those of the whole.

    Raises:
        ValueError: a row is excluded, and a part has too few rows besides it.
    """
    rows = call.queue
    k = min(call.num_neighbors, len(rows.local))
    if call.excluded is not None and len(rows.local) < max(k, 1) + 1:
        raise ValueError(
            f"excluded needs parts of more than {max(k, 1)} rows, got {len(rows.local)} of {rows}"
        )
    lse, mean, entropy, logits, indices = library.run(
        call._replace(queue=rows.local, num_neighbors=k)
    )
    missing = call.num_neighbors - k
    indices = pad(indices * rows.world.size + rows.world.rank, (0, missing), value=_NO_ROW)
    return lse, mean, entropy, pad(logits, (0, missing), value=-torch.inf), indices


def _by_owner(x: Tensor, size: int) -> Tensor:
    return x.view(size, -1, *x.shape[1:])


def _merge_lists(logits: Tensor, indices: Tensor) -> tuple[Tensor, Tensor]:  # (W, n, k) each
    k = logits.shape[2]
    return merge_neighbors(*(x.transpose(0, 1).flatten(1) for x in (logits, indices)), k)


class _Loss(library.LossFunction):
    """The loss, with the derivatives that it has where one process holds the queue."""

    @staticmethod
    def forward(*arguments):
        return soft_contrastive(LossCall(*arguments))


@torch.no_grad()
def soft_contrastive(call: LossCall) -> tuple[Tensor, ...]:
    """This process's rows' loss, gradient and diagnostics, as `LossCall` lists them."""
    query, rows, rule = call.query, call.queue, call.rule
    results = call.empty_results()
    dtype = sum_dtype(query, rows.local)
    z, t, norm = query.to(dtype), call.key.to(dtype), None
    if call.normalize:
        z, norm = algebra.unit_rows(query, dtype)
        t, _ = algebra.unit_rows(call.key, dtype)
    units = torch.stack([z.to(query.dtype), t.to(query.dtype)])
    all_z, all_t = (x.flatten(0, 1) for x in rows.world.all_gather(units).unbind(1))  # (W n, D)
    excluded = _excluded_here(call.excluded, rows)
    finish_student = _start_student(call, z, t, all_z, all_t, excluded)
    labels = _Labels(call, t, all_t, excluded)
    lse, expected, rank = finish_student()
    results["loss"], dquery = algebra.finish(
        z, t, norm, lse, expected, labels.mean, call.temperature, call.positive
    )
    if call.gradient:
        results["dquery"] = dquery
    if call.diagnostics:
        results["positive_rank"] = rank
        if rule.num_neighbors > 0:
            results["neighbor_indices"] = labels.neighbors
        if rule.needs_softmax:
            results["confidence"] = labels.confidence.to(dtype)
            results["entropy"] = labels.entropy.to(dtype)
    return tuple(results.values())


def _start_student(call: LossCall, z: Tensor, t: Tensor, all_z: Tensor, all_t: Tensor, excluded):
    """The student's half: lse (n,), mean (n, D) and rank, once what is returned is called.

    One call of the fused operator gives all three: with hard labels and no positive, its loss
    is lse - z.t / temperature and its gradient (mean - t) / temperature.
    """
    world, temperature = call.queue.world, call.temperature
    half = call._replace(
        query=all_z, key=all_t, queue=call.queue.local, rule=HardLabels(),
        teacher_temperature=1.0, positive=False, normalize=False, excluded=excluded,
    )  # fmt: skip
    loss, dquery, _, _, rank, _ = library.run(half)
    columns = [loss[:, None], dquery] if call.gradient else [loss[:, None]]
    numbers = world.start_exchange(_by_owner(torch.cat(columns, 1), world.size))
    ranks = world.start_exchange(_by_owner(rank, world.size)) if call.diagnostics else None

    def finish() -> tuple[Tensor, Tensor | None, Tensor | None]:
        values = numbers()
        own = algebra.row_dot(z, t) / temperature
        mean = t + values[:, :, 1:] * temperature if call.gradient else None
        lse, mean, _ = merge_sums(values[:, :, 0] + own, mean, None)
        return lse, mean, None if ranks is None else ranks().sum(0)

    return finish


class _Labels:
    """The teacher's half: confidence, entropy, neighbours and the label mean (n, D)."""

    def __init__(self, call: LossCall, t: Tensor, all_t: Tensor, excluded: Tensor | None) -> None:
        rule, rows = call.rule, call.queue
        world, k = rows.world, rule.num_neighbors
        t = t.to(algebra.scalar_dtype(t))
        self.mean = t
        self.confidence = self.entropy = self.neighbors = None
        if not rule.needs_softmax and k == 0:
            return
        lse, mean, entropy, logits, indices = _local(
            StatisticsCall(
                all_t, rows, call.teacher_temperature, k, rule.needs_softmax, excluded,
                call.backend,
            )
        )  # fmt: skip
        columns = [lse[:, None], entropy[:, None]] if rule.needs_softmax else []
        columns += [mean] * rule.needs_mean + [logits]
        numbers = world.start_exchange(_by_owner(torch.cat(columns, 1), world.size))
        self.neighbors = world.exchange(_by_owner(indices, world.size)) if k else None
        numbers = numbers()  # (W, n, 2 + D + k) at most
        logits = numbers[:, :, numbers.shape[2] - k :]
        lse = mean = None
        if rule.needs_softmax:
            mean = numbers[:, :, 2 : 2 + t.shape[1]] if rule.needs_mean else None
            lse, mean, self.entropy = merge_sums(numbers[:, :, 0], mean, numbers[:, :, 1])
            self.confidence = algebra.confidence_of(self.entropy, len(rows), call.excluded)
        logits, self.neighbors = _merge_lists(logits, self.neighbors) if k else (logits[0], None)

        def neighbor_sum(weights: Tensor) -> Tensor:
            return weighted_sum(rows, self.neighbors, weights.to(numbers.dtype)).to(t.dtype)

        self.mean = algebra.label_mean_of(
            rule, t, call.teacher_temperature, lse, mean, self.confidence, logits.to(t.dtype),
            neighbor_sum,
        )  # fmt: skip


register_rows(ShardedRows, sys.modules[__name__])
