"""The two operators as PyTorch knows them: schema, fake shapes, gradient, autocast.

    softcl::queue_statistics    the softmax statistics of a queue; gradient by a second op
    softcl::soft_contrastive    the loss of every label rule and, in the same pass, its gradient

Both are opaque to ``torch.compile`` (no graph break, any dynamic shape). The backend is chosen
inside, at run time. Under autocast they run in the dtypes of their inputs and sum in float32, as
they do without it: nothing is cast.
"""

from __future__ import annotations

import torch

from softcl.labels import make_rule
from softcl.ops import reference
from softcl.ops.backends import Call, choose, load_backend

LIBRARY = torch.library.Library("softcl", "DEF")

LIBRARY.define(
    "queue_statistics(Tensor vectors, Tensor queue, float temperature, SymInt num_neighbors, "
    "bool sums, str backend) -> (Tensor, Tensor, Tensor, Tensor, Tensor)"
)
LIBRARY.define(
    "queue_statistics_backward(Tensor vectors, Tensor queue, float temperature, Tensor lse, "
    "Tensor mean, Tensor entropy, Tensor neighbor_indices, Tensor? dlse, Tensor? dmean, "
    "Tensor? dentropy, Tensor? dneighbor_logits) -> Tensor"
)
LIBRARY.define(
    "soft_contrastive(Tensor query, Tensor key, Tensor queue, str rule, SymInt num_neighbors, "
    "float positive_weight, float temperature, float teacher_temperature, bool positive, "
    "bool normalize, bool gradient, bool diagnostics, str backend) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)"
)


def _without_autocast(device: torch.device):
    return torch.autocast(device_type=device.type, enabled=False)


# -------------------------------------------------------------------------------- queue_statistics


def _queue_statistics(vectors, queue, temperature, num_neighbors, sums, backend):
    call = Call.of_statistics(vectors, queue, temperature, num_neighbors)
    module = load_backend(choose(call, backend).name)
    return module.queue_statistics(
        vectors.contiguous(), queue.contiguous(), temperature, num_neighbors, sums=sums
    )


def _queue_statistics_fake(vectors, queue, temperature, num_neighbors, sums, backend):
    n, d = vectors.shape
    dtype = reference.sum_dtype(vectors, queue)
    return (
        vectors.new_empty((n if sums else 0,), dtype=dtype),
        vectors.new_empty((n if sums else 0, d), dtype=dtype),
        vectors.new_empty((n if sums else 0,), dtype=dtype),
        vectors.new_empty((n, num_neighbors), dtype=dtype),
        vectors.new_empty((n, num_neighbors), dtype=torch.int64),
    )


def _queue_statistics_backward(vectors, queue, temperature, *saved_and_gradients):
    return reference.queue_statistics_backward(vectors, queue, temperature, *saved_and_gradients)


def _queue_statistics_backward_fake(vectors, queue, temperature, lse, mean, *rest):
    return vectors.new_empty(vectors.shape, dtype=mean.dtype)


def _save_statistics(ctx, inputs, output):
    vectors, queue, temperature, _, sums, _ = inputs
    lse, mean, entropy, _, neighbor_indices = output
    ctx.mark_non_differentiable(neighbor_indices)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(vectors, queue, lse, mean, entropy, neighbor_indices)
    ctx.temperature, ctx.sums = temperature, sums


def _differentiate_statistics(ctx, dlse, dmean, dentropy, dneighbor_logits, _):
    _refuse_second_derivative()
    vectors, queue, *saved = ctx.saved_tensors
    if not ctx.sums:  # outputs without rows can have gradients without rows
        dlse = dmean = dentropy = None
    if all(g is None for g in (dlse, dmean, dentropy, dneighbor_logits)):
        return (None,) * 6
    dvectors = torch.ops.softcl.queue_statistics_backward(
        vectors, queue, ctx.temperature, *saved, dlse, dmean, dentropy, dneighbor_logits
    )
    return dvectors.to(vectors.dtype), *(None,) * 5


# -------------------------------------------------------------------------------- soft_contrastive


def _soft_contrastive(
    query,
    key,
    queue,
    rule,
    num_neighbors,
    positive_weight,
    temperature,
    teacher_temperature,
    positive,
    normalize,
    gradient,
    diagnostics,
    backend,
):
    label_rule = make_rule(rule, num_neighbors, positive_weight)
    call = Call.of_loss(query, queue, label_rule, temperature, teacher_temperature)
    module = load_backend(choose(call, backend).name)
    return module.soft_contrastive(
        query.contiguous(),
        key.contiguous(),
        queue.contiguous(),
        label_rule,
        temperature,
        teacher_temperature,
        positive=positive,
        normalize=normalize,
        gradient=gradient,
        diagnostics=diagnostics,
    )


def _soft_contrastive_fake(
    query,
    key,
    queue,
    rule,
    num_neighbors,
    positive_weight,
    temperature,
    teacher_temperature,
    positive,
    normalize,
    gradient,
    diagnostics,
    backend,
):
    label_rule = make_rule(rule, num_neighbors, positive_weight)
    n, d = query.shape
    dtype = reference.sum_dtype(query, queue)
    shown = n if diagnostics and label_rule.needs_softmax else 0
    return (
        query.new_empty((n,), dtype=dtype),
        query.new_empty((n, d) if gradient else (0,), dtype=dtype),
        query.new_empty((shown,), dtype=dtype),
        query.new_empty((shown,), dtype=dtype),
        query.new_empty((n if diagnostics else 0,), dtype=torch.int64),
        query.new_empty((n, label_rule.num_neighbors if diagnostics else 0), dtype=torch.int64),
    )


def _save_gradient(ctx, inputs, output):
    _, dquery, confidence, entropy, positive_rank, neighbor_indices = output
    ctx.mark_non_differentiable(dquery, confidence, entropy, positive_rank, neighbor_indices)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(dquery)
    ctx.dtype = inputs[0].dtype
    ctx.gradient = inputs[10]


def _scale_gradient(ctx, dloss, *_):
    # The gradient is known since the forward pass: nothing is visited again.
    _refuse_second_derivative()
    if dloss is None:
        return (None,) * 13
    if not ctx.gradient:
        raise RuntimeError("soft_contrastive was called with gradient=False: no gradient was kept")
    (dquery,) = ctx.saved_tensors
    return ((dloss[:, None] * dquery).to(ctx.dtype), *(None,) * 12)


def _refuse_second_derivative() -> None:
    # Grad mode is on inside a backward only under create_graph=True.
    if torch.is_grad_enabled():
        raise RuntimeError(
            "softcl's operators have a first derivative only: create_graph=True is not supported"
        )


# ----------------------------------------------------------------------------------- registrations


def _register(name, run, fake) -> None:
    LIBRARY.impl(name, run, "CompositeExplicitAutograd")
    torch.library.register_fake(f"softcl::{name}", fake, lib=LIBRARY)
    op = getattr(torch.ops.softcl, name).default

    def run_without_autocast(*args):
        with _without_autocast(args[0].device):
            return op(*args)

    for device in ("CPU", "CUDA"):
        LIBRARY.impl(name, run_without_autocast, f"Autocast{device}")


_register("queue_statistics", _queue_statistics, _queue_statistics_fake)
_register(
    "queue_statistics_backward",
    _queue_statistics_backward,
    _queue_statistics_backward_fake,
)
_register("soft_contrastive", _soft_contrastive, _soft_contrastive_fake)

torch.library.register_autograd(
    "softcl::queue_statistics",
    _differentiate_statistics,
    setup_context=_save_statistics,
    lib=LIBRARY,
)
torch.library.register_autograd(
    "softcl::soft_contrastive",
    _scale_gradient,
    setup_context=_save_gradient,
    lib=LIBRARY,
)
