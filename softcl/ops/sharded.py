"""Both operators over a queue that no process holds all of.

Every process has n queries and a part of the queue (`ShardedRows`). All the vectors visit every
part, in whatever backend runs there, and what a part knows about a vector goes back to the vector's
owner, which merges the W parts (softcl/ops/merge.py) and finishes as the reference does:

    vectors   n rows                 -> every process     queries and keys, as unit rows
    student   lse, mean, rank        -> the owners        under way while the teacher's pass runs
    teacher   lse, H, mean, k best   -> the owners        only what the label rule reads
    neighbors indices and weights    -> every process     for rules that add nearest rows, and
              their weighted sum     -> the owners        ... back

The gradient is known then, to the owner: the backward pass of the loss exchanges nothing. The bytes
are in :mod:`softcl.distributed.traffic`. Results do not depend on the number of processes beyond
rounding, and are the same in every run.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor
from torch.nn.functional import pad

from softcl.distributed.shards import ShardedRows
from softcl.labels import LabelRule
from softcl.ops import reference
from softcl.ops.merge import merge_neighbors, merge_sums

_NO_ROW = 1 << 62  # stands after every row where a part has too few


def without_autocast(function):
    """Run ``function`` in the dtypes of its tensors, as the operators on one process are."""

    @functools.wraps(function)
    def run(*args, **options):
        device = next(x.device.type for x in args if isinstance(x, Tensor))
        with torch.autocast(device_type=device, enabled=False):
            return function(*args, **options)

    return run


def local_rows(queue: Tensor | ShardedRows, **vectors: Tensor) -> Tensor:
    """The queue, or this process's part of it; processes with batches of other lengths are told."""
    if not isinstance(queue, ShardedRows):
        return queue
    for name, rows in vectors.items():
        queue.world.check_rows(name, rows.shape[0])
    return queue.local


@without_autocast
def queue_statistics(
    vectors: Tensor,  # (n, D), of this process
    rows: ShardedRows,
    temperature: float,
    num_neighbors: int,
    *,
    sums: bool,
    backend: str,
    excluded: Tensor | None = None,  # (n,)
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """What the operator of that name returns, for this process's vectors over all the rows.

    Differentiable in the vectors and in the local rows, also with respect to what other processes
    make of them: gradients travel the same ways back.
    """
    world = rows.world
    gathered = world.gather(vectors).flatten(0, 1)  # (W n, D)
    lse, mean, entropy, logits, indices = _local(
        gathered, rows, temperature, num_neighbors, sums, backend, _excluded_here(excluded, rows)
    )
    if num_neighbors > 0:
        indices = world.exchange(_by_owner(indices, world.size))  # (W, n, k)
    if not sums:
        nearest = _merge_lists(world.exchange(_by_owner(logits, world.size)), indices)
        return lse[:0], mean[:0], entropy[:0], *nearest
    numbers = torch.cat([lse[:, None], entropy[:, None], mean, logits], 1)
    numbers = world.exchange(_by_owner(numbers, world.size))  # (W, n, 2 + D + k)
    lse, entropy, mean, logits = numbers.split((1, 1, mean.shape[1], num_neighbors), 2)
    sums_of_all = merge_sums(lse.squeeze(2), mean, entropy.squeeze(2))
    lse, mean, entropy = (x.to(numbers.dtype) for x in sums_of_all)
    if num_neighbors == 0:
        return lse, mean, entropy, logits[0], indices[: len(vectors)]
    return lse, mean, entropy, *_merge_lists(logits, indices)


def _excluded_here(excluded: Tensor | None, rows: ShardedRows) -> Tensor | None:
    """Of every process's vectors (W n,) the excluded row's place in the local rows, or -1."""
    if excluded is None:
        return None
    world = rows.world
    places = world.gather(excluded).flatten()
    return torch.where(
        (places >= 0) & (places % world.size == world.rank), places // world.size, -1
    )


def _local(gathered, rows, temperature, num_neighbors, sums, backend, excluded):
    """Statistics of all vectors over the local rows, indices those of the whole.

    Raises:
        ValueError: a row is excluded, and a part has too few rows besides it.
    """
    k = min(num_neighbors, len(rows.local))
    if excluded is not None and len(rows.local) < max(k, 1) + 1:
        raise ValueError(
            f"excluded needs parts of more than {max(k, 1)} rows, got {len(rows.local)} of {rows}"
        )
    lse, mean, entropy, logits, indices = torch.ops.softcl.queue_statistics(
        gathered, rows.local, temperature, k, sums, backend, excluded
    )
    missing = num_neighbors - k
    indices = pad(indices * rows.world.size + rows.world.rank, (0, missing), value=_NO_ROW)
    return lse, mean, entropy, pad(logits, (0, missing), value=-torch.inf), indices


def _by_owner(x: Tensor, size: int) -> Tensor:
    return x.view(size, -1, *x.shape[1:])


def _merge_lists(logits: Tensor, indices: Tensor) -> tuple[Tensor, Tensor]:  # (W, n, k) each
    k = logits.shape[2]
    return merge_neighbors(*(x.transpose(0, 1).flatten(1) for x in (logits, indices)), k)


class _WithGradient(torch.autograd.Function):
    """The loss (n,), whose gradient in the query (n, D) is known."""

    @staticmethod
    def forward(ctx, query, loss, dquery):
        ctx.save_for_backward(dquery)
        ctx.dtype = query.dtype
        return loss.view_as(loss)

    @staticmethod
    def backward(ctx, dloss):
        (dquery,) = ctx.saved_tensors
        return (dloss[:, None] * dquery).to(ctx.dtype), None, None


@without_autocast
def soft_contrastive(
    query: Tensor,  # (V n, D), of this process
    key: Tensor,  # (n, D)
    rows: ShardedRows,
    rule: LabelRule,
    temperature: float,
    teacher_temperature: float,
    *,
    positive: bool,
    normalize: bool,
    diagnostics: bool,
    queries_per_key: int,
    virtual_logit: bool,
    backend: str,
    excluded: Tensor | None = None,  # (V n,)
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """loss (V n,), confidence, entropy, positive_rank and neighbor_indices of this process's rows.

    What was not asked for, or what the rule does not compute, is None.
    """
    gradient = query.requires_grad and torch.is_grad_enabled()
    if excluded is not None and queries_per_key > 1:  # what a query leaves out, its key does
        key, queries_per_key = key.repeat(queries_per_key, 1), 1
    with torch.no_grad():
        dtype = reference.sum_dtype(query, rows.local)
        z, t, norm = query.to(dtype), key.to(dtype), None
        if normalize:
            z, norm = reference.unit_rows(query, dtype)
            t, _ = reference.unit_rows(key, dtype)
        pass_ = _Pass(z.to(query.dtype), t.to(key.dtype), rows, backend, excluded)
        finish_student = pass_.start_student(temperature, gradient, diagnostics)
        labels = pass_.label_mean(rule, t, teacher_temperature, virtual_logit)
        lse, expected, rank = finish_student()
        confidence, entropy, neighbors, label_mean = (
            None if x is None else x.repeat(queries_per_key, *[1] * (x.dim() - 1)) for x in labels
        )
        loss, dquery = reference.finish(
            z, t.repeat(queries_per_key, 1), norm, lse, expected, label_mean, temperature, positive
        )
        confidence, entropy = (None if x is None else x.to(dtype) for x in (confidence, entropy))
    if gradient:
        loss = _WithGradient.apply(query, loss, dquery)
    if not diagnostics:
        return loss, None, None, None, None
    return loss, confidence, entropy, rank, neighbors


class _Pass:
    """One visit of every part of the queue by the unit rows z (V n, D) and t (n, D).

    ``excluded`` (n,) is of t, and of z where there is one for every t.
    """

    def __init__(
        self,
        z: Tensor,
        t: Tensor,
        rows: ShardedRows,
        backend: str,
        excluded: Tensor | None = None,
    ) -> None:
        self.excluded, self.all_excluded = excluded, _excluded_here(excluded, rows)
        self.rows, self.world, self.backend = rows, rows.world, backend
        self.z, self.t = z, t
        gathered = self.world.gather(torch.cat([z, t]))  # (W, V n + n, D)
        self.all_z, self.all_t = (x.flatten(0, 1) for x in gathered.split((len(z), len(t)), 1))

    def start_student(self, temperature: float, gradient: bool, diagnostics: bool):
        """The student's half: lse (V n,), mean and rank, once what is returned is called.

        One call of the fused operator gives all three: with hard labels and no positive, its loss
        is lse - z.t / temperature and its gradient (mean - t) / temperature.
        """
        positives = self.all_t.view(self.world.size, -1, self.all_t.shape[1])
        positives = positives.repeat(1, len(self.z) // len(self.t), 1).flatten(0, 1)
        loss, dquery, _, _, rank, _ = torch.ops.softcl.soft_contrastive(
            self.all_z, positives, self.rows.local, "hard", 0, 1.0, temperature, 1.0,
            False, False, gradient, diagnostics, self.backend, self.all_excluded,
        )  # fmt: skip
        columns = [loss[:, None], dquery] if gradient else [loss[:, None]]
        numbers = self._start(torch.cat(columns, 1))
        ranks = self._start(rank) if diagnostics else None
        dtype = loss.dtype

        def finish() -> tuple[Tensor, Tensor | None, Tensor | None]:
            values, t = numbers(), self.t.repeat(len(self.z) // len(self.t), 1).to(dtype)
            own = reference.row_dot(self.z.to(dtype), t) / temperature
            mean = t + values[:, :, 1:] * temperature if gradient else None
            lse, mean, _ = merge_sums(values[:, :, 0] + own, mean, None)
            return lse, mean, None if ranks is None else ranks().sum(0)

        return finish

    def label_mean(
        self, rule: LabelRule, t: Tensor, teacher_temperature: float, virtual_logit: bool
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor]:
        """The teacher's half: confidence, entropy, neighbours and the label mean (n, D)."""
        k = rule.num_neighbors
        t = t.to(reference.scalar_dtype(t))
        if not (rule.needs_softmax or k > 0):
            return None, None, None, t
        lse, mean, entropy, logits, indices = _local(
            self.all_t, self.rows, teacher_temperature, k, rule.needs_softmax, self.backend,
            self.all_excluded,
        )  # fmt: skip
        columns = [lse[:, None], entropy[:, None]] if rule.needs_softmax else []
        columns += [mean] * rule.needs_mean + [logits]
        numbers = self._start(torch.cat(columns, 1))
        neighbors = self._start(indices)() if k else None
        numbers = numbers()  # (W, n, 2 + D + k) at most
        logits = numbers[:, :, numbers.shape[2] - k :]
        lse = mean = confidence = entropy = None
        if rule.needs_softmax:
            mean = numbers[:, :, 2 : 2 + t.shape[1]] if rule.needs_mean else None
            lse, mean, entropy = merge_sums(numbers[:, :, 0], mean, numbers[:, :, 1])
            confidence = reference.confidence_of(entropy, len(self.rows), self.excluded)
        if virtual_logit:
            leak = torch.sigmoid(-lse)[:, None]  # see softcl/ops/compose.py
            mean = leak * t + (1.0 - leak) * mean
        logits, neighbors = _merge_lists(logits, neighbors) if k else (logits[0], None)

        def neighbor_sum(weights: Tensor | None) -> Tensor:
            # One neighbour's label c q is never clipped at 1: its weight here is 0.
            if k == 0 or (k == 1 and weights is not None):
                return torch.zeros_like(t)
            if weights is None:
                weights = torch.ones_like(logits)
            return self.rows.weighted_sum(neighbors, weights.to(logits.dtype)).to(t.dtype)

        label_mean = reference.label_mean_of(
            rule, t, lse, mean, confidence, logits.to(t.dtype), neighbor_sum
        )
        return confidence, entropy, neighbors, label_mean

    def _start(self, x: Tensor):
        return self.world.start_exchange(_by_owner(x, self.world.size))


@torch.no_grad()
@without_autocast
def label_mean(
    rule: LabelRule,
    key: Tensor,  # (n, D), of this process
    rows: ShardedRows,
    teacher_temperature: float,
    *,
    normalize: bool,
    virtual_logit: bool,
    backend: str,
    excluded: Tensor | None = None,  # (n,)
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """mean (n, D), confidence, entropy and neighbor_indices, as `softcl.label_mean`."""
    dtype = reference.sum_dtype(key, rows.local)
    t = reference.unit_rows(key, dtype)[0] if normalize else key.to(dtype)
    pass_ = _Pass(t[:0].to(key.dtype), t.to(key.dtype), rows, backend, excluded)
    confidence, entropy, neighbors, mean = pass_.label_mean(
        rule, t, teacher_temperature, virtual_logit
    )
    numbers = (None if x is None else x.to(dtype) for x in (mean, confidence, entropy))
    return *numbers, neighbors
