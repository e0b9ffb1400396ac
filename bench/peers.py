"""The peers: what else computes these losses with PyTorch, each as good as its idea allows.

    eager       the formula as the papers print it, every N x K matrix written out
    compiled    the same through torch.compile
    chunked     blocks of rows through in-place operations and the analytic gradient
    attention   PyTorch's fused attention on stacked rows [z / tau_s; t / tau_t], keys = values =
                queue, for the sums; a product and torch.topk in blocks of rows for neighbours
    flex        the same through FlexAttention, compiled, on CUDA devices
    flash-attn  the same through the package flash-attn, on CUDA devices, where it is installed
    linear-ce   hard labels: torch.nn.functional.linear_cross_entropy over the queue
    lightly     hard labels: lightly's NTXentLoss with the queue as its memory bank

A peer takes (query, key, queue, rule, temperature, teacher_temperature, positive) and returns the
losses (N,), with a gradient for the query. Same formulas as :mod:`softcl.labels`.
"""

from __future__ import annotations

import functools
import importlib.util
import math
from collections.abc import Callable

import torch
from torch import Tensor

from bench.shapes import is_hard
from softcl.labels import LabelRule
from softcl.ops import algebra

# Elements of a block of logits of "chunked" and of the search of "attention": 32 MB in float32, the
# fastest of 1 to 32 MB on two cores of an EPYC; a GPU wants larger ones.
BLOCK_ELEMENTS = {"cpu": 1 << 23, "cuda": 1 << 26}


def dense_labels(
    teacher_logits: Tensor,  # (N, K) t . Q_j / teacher_temperature
    own: Tensor,  # (N, 1) t . t / teacher_temperature
    rule: LabelRule,
) -> tuple[Tensor, Tensor]:
    """Labels of the positive (N, 1) and of the queue rows (N, K); each row sums to one.

    As softcl.testing.dense_labels, without its sort of whole rows and the sums that a rule does
    not need.
    """
    n, K = rule.num_neighbors, teacher_logits.shape[1]
    positive, mass, weight = torch.full_like(own, rule.positive), rule.mean, rule.neighbor
    soft = teacher_logits.softmax(1) if rule.needs_softmax else None
    if rule.confident_mean > 0.0 or (rule.confident_neighbor > 0.0 and n > 0):
        entropy = -torch.special.xlogy(soft, soft).sum(1, keepdim=True)
        confidence = (1.0 - entropy / math.log(K)).clamp(0.0, 1.0)
        mass = mass + rule.confident_mean * confidence
        weight = weight + rule.confident_neighbor * confidence
    total = rule.positive + mass
    if rule.teacher_positive is not None:
        own = own if rule.teacher_positive == "self" else torch.zeros_like(own)
        lse = teacher_logits.logsumexp(1, keepdim=True)
        positive = positive + mass * torch.sigmoid(own - lse)
        mass = mass * torch.sigmoid(lse - own)
    if rule.clip and rule.needs_mean and n > 0:
        labels = mass * soft
        if rule.num_weighted < n:  # no row but the n nearest can have a label above the positive's
            labels = labels.clamp(max=rule.positive)
        else:
            nearest = teacher_logits.topk(n, dim=1).indices
            clipped = labels.gather(1, nearest).clamp(max=rule.positive)
            labels = labels.scatter(1, nearest, clipped)
        total = positive + labels.sum(1, keepdim=True)
        return positive / total, labels / total
    if rule.adds_neighbors:
        total = total + n * weight
    labels = mass / total * soft if rule.needs_mean else torch.zeros_like(teacher_logits)
    if rule.adds_neighbors:
        nearest = teacher_logits.topk(n, dim=1).indices
        weight = torch.as_tensor(weight / total).to(labels).expand(len(labels), n)
        labels = labels.scatter_add(1, nearest, weight)
    return positive / total, labels


def self_logit(key: Tensor, rule: LabelRule, teacher_temperature: float) -> Tensor:
    """t . t / teacher_temperature (N, 1), of which no rule but one needs the value."""
    if rule.teacher_positive != "self":
        return torch.zeros_like(key[:, :1])
    return (key * key).sum(1, keepdim=True) / teacher_temperature


def eager(query, key, queue, rule, temperature, teacher_temperature, positive=True):
    logits = query @ queue.T / temperature
    if positive:
        logits = torch.cat([(query * key).sum(1, keepdim=True) / temperature, logits], 1)
    log_p = logits.log_softmax(1)
    if is_hard(rule):
        return -log_p[:, 0]
    with torch.no_grad():
        own = self_logit(key, rule, teacher_temperature)
        first, rest = dense_labels(key @ queue.T / teacher_temperature, own, rule)
        labels = torch.cat([first, rest], 1) if positive else rest
    return -(labels * log_p).sum(1)


@functools.cache
def _compiled(rule: LabelRule, positive: bool) -> Callable[..., Tensor]:
    def loss(query, key, queue, temperature, teacher_temperature):
        return eager(query, key, queue, rule, temperature, teacher_temperature, positive)

    return torch.compile(loss, dynamic=False)


def compiled(query, key, queue, rule, temperature, teacher_temperature, positive=True):
    return _compiled(rule, positive)(query, key, queue, temperature, teacher_temperature)


class _KnownGradient(torch.autograd.Function):
    """The losses (N,), whose gradient for the query (N, D) is known already."""

    @staticmethod
    def forward(ctx, query, loss, dquery):
        ctx.save_for_backward(dquery)
        return loss

    @staticmethod
    def backward(ctx, dloss):
        (dquery,) = ctx.saved_tensors
        return dloss[:, None] * dquery, None, None


def chunked(query, key, queue, rule, temperature, teacher_temperature, positive=True):
    z, t = query.detach(), key
    loss = z.new_empty(len(z))
    dquery = torch.empty_like(z)
    for rows in _row_blocks(z, queue):
        p = torch.mm(z[rows], queue.T).div_(temperature)  # (block, K) logits, then softmax
        own = (z[rows] * t[rows]).sum(1, keepdim=True).div_(temperature)
        lse = p.logsumexp(1, keepdim=True)
        if positive:
            lse = torch.logaddexp(lse, own)
        p.sub_(lse)
        if is_hard(rule):
            first, log_likelihood = torch.ones_like(own), 0.0
            difference = p.exp_()
        else:
            teacher_logits = torch.mm(t[rows], queue.T).div_(teacher_temperature)
            first, y = dense_labels(
                teacher_logits, self_logit(t[rows], rule, teacher_temperature), rule
            )
            log_likelihood = torch.einsum("nk,nk->n", y, p)
            difference = p.exp_().sub_(y)
        gradient = difference @ queue
        if positive:
            loss[rows] = -(log_likelihood + (first * (own - lse)).squeeze(1))
            gradient += ((own - lse).exp_() - first) * t[rows]
        else:
            loss[rows] = -log_likelihood
        dquery[rows] = gradient.div_(temperature)
    return _KnownGradient.apply(query, loss, dquery)


def attention(
    query, key, queue, rule, temperature, teacher_temperature, positive=True, statistics=None
):
    z, t = query.detach().float(), key.float()  # few; the sums over the queue stay in its dtype
    statistics = statistics or _attention_statistics
    rows = [z / temperature]
    if rule.needs_softmax:
        rows.append(t / teacher_temperature)
    lse, mean = statistics(torch.cat(rows), queue)
    (lse, teacher_lse), (mean, teacher_mean) = ((x[: len(z)], x[len(z) :]) for x in (lse, mean))
    confidence = None
    if rule.needs_softmax:
        entropy = teacher_lse - (t * teacher_mean).sum(1) / teacher_temperature
        confidence = algebra.confidence_of(entropy, len(queue))
    neighbor_logits, neighbors = _search(key, queue, rule.num_neighbors)
    neighbor_logits /= teacher_temperature
    label_mean = algebra.label_mean_of(
        rule, t, teacher_temperature, teacher_lse, teacher_mean, confidence, neighbor_logits,
        lambda weights: algebra.weighted_sum(queue, neighbors, weights),
    )  # fmt: skip
    own = (z * t).sum(1) / temperature
    total = torch.logaddexp(lse, own) if positive else lse
    expected = mean * (lse - total).exp()[:, None]
    if positive:
        expected = expected + t * (own - total).exp()[:, None]
    loss = total - (z * label_mean).sum(1) / temperature
    return _KnownGradient.apply(query, loss, (expected - label_mean) / temperature)


def _attention_statistics(rows: Tensor, queue: Tensor) -> tuple[Tensor, Tensor]:
    """lse (M,) and mean (M, D) of the softmax of rows . Q_j."""
    q, kv = rows.to(queue.dtype)[None, None], queue[None, None]
    aten = torch.ops.aten
    if rows.is_cuda:
        mean, lse = aten._scaled_dot_product_flash_attention(q, kv, kv, scale=1.0)[:2]
    else:
        mean, lse = aten._scaled_dot_product_flash_attention_for_cpu(q, kv, kv, scale=1.0)
    return lse.reshape(-1).float(), mean[0, 0].float()


@functools.cache
def _compiled_flex_attention():
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=False)


def _flex_statistics(rows: Tensor, queue: Tensor) -> tuple[Tensor, Tensor]:
    q, kv = rows.to(queue.dtype)[None, None], queue[None, None]
    mean, lse = _compiled_flex_attention()(q, kv, kv, scale=1.0, return_lse=True)
    return lse.reshape(-1).float(), mean[0, 0].float()


def _flash_attn_statistics(rows: Tensor, queue: Tensor) -> tuple[Tensor, Tensor]:
    from flash_attn import flash_attn_func

    q, kv = rows.to(queue.dtype)[None, :, None], queue[None, :, None]
    mean, lse, _ = flash_attn_func(q, kv, kv, softmax_scale=1.0, return_attn_probs=True)
    return lse.reshape(-1).float(), mean[0, :, 0].float()


def linear_ce(query, key, queue, rule, temperature, teacher_temperature, positive=True):
    # Cross-entropy with the class 0 is lse - z . Q_0 / temperature: the positive then joins.
    logits = query / temperature
    target = torch.zeros(len(query), dtype=torch.int64, device=query.device)
    entropy = torch.nn.functional.linear_cross_entropy(logits, queue, target, reduction="none")
    lse = entropy.float() + (logits * queue[0]).sum(1)
    own = (query * key).sum(1) / temperature
    return torch.logaddexp(lse, own) - own


def lightly(query, key, queue, rule, temperature, teacher_temperature, positive=True):
    loss = _ntxent(temperature)
    loss.memory_bank.bank = queue.T
    # Without the update of the bank, which lightly makes in the same call.
    loss.memory_bank.forward = lambda output, **_: (output, queue.T)
    return loss(query, key)


@functools.cache
def _ntxent(temperature: float):
    from lightly.loss import NTXentLoss

    loss = NTXentLoss(temperature=temperature, memory_bank_size=(1, 1))
    loss.cross_entropy.reduction = "none"
    return loss


def _search(t: Tensor, queue: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k largest t . Q_j of every row and their places: (N, k), (N, k)."""
    found = [
        torch.topk(t[rows] @ queue.T, k, dim=1) if k else t[rows, :0].topk(0, dim=1)
        for rows in _row_blocks(t, queue)
    ]
    return torch.cat([x.values for x in found]).float(), torch.cat([x.indices for x in found])


def _row_blocks(rows: Tensor, queue: Tensor):
    size = max(32, BLOCK_ELEMENTS[rows.device.type] // len(queue))
    for start in range(0, len(rows), size):
        yield slice(start, start + size)


# "eager" in a process whose malloc gives its pages back, see memory.py.
AS_IT_COMES = "eager as it comes"

PEERS: dict[str, Callable[..., Tensor]] = {
    "eager": eager,
    "compiled": compiled,
    "chunked": chunked,
    "attention": attention,
    "flex": functools.partial(attention, statistics=_flex_statistics),
    "flash-attn": functools.partial(attention, statistics=_flash_attn_statistics),
    "linear-ce": linear_ce,
    "lightly": lightly,
}


def absent(peer: str, device: str, rule: LabelRule) -> str | None:
    """Why a peer cannot run here, or None."""
    if peer in ("linear-ce", "lightly") and not is_hard(rule):
        return "not run: knows hard labels alone"
    if peer in ("flex", "flash-attn") and device != "cuda":
        return "not run: for CUDA devices"
    if peer == "linear-ce" and not hasattr(torch.nn.functional, "linear_cross_entropy"):
        return f"not run: torch {torch.__version__} does not have it"
    module = {"flash-attn": "flash_attn", "lightly": "lightly"}.get(peer)
    if module and importlib.util.find_spec(module) is None:
        return f"not run: {module} is not installed"
    return None
