"""The two operators as PyTorch knows them: schema, fake shapes, gradient, autocast, vmap.

    softcl::queue_statistics    the softmax statistics of a queue; gradient by a second operator
    softcl::soft_contrastive    the loss of every label rule and, in the same pass, its gradient

Both are opaque to ``torch.compile`` (no graph break, any dynamic shape, temperatures that change).
The backend is chosen inside, at run time. Under autocast they run in the dtypes of their inputs and
sum in float32, as they do without it: nothing is cast.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from softcl.labels import LabelRule
from softcl.ops import algebra
from softcl.ops.backends import load_chosen
from softcl.ops.call import Call, LossCall, StatisticsCall, check_temperature

LIBRARY = torch.library.Library("softcl", "DEF")


def run(call: Call) -> tuple[Tensor, ...]:
    """The results of a call, recorded for the backward pass."""
    if not torch.compiler.is_compiling() and torch._C._are_functorch_transforms_active():
        # torch.func looks for the gradient before it gets to the dispatcher.
        return _FUNCTIONS[type(call)].apply(*pack(call))
    return getattr(torch.ops.softcl, call.operation)(*pack(call))


def _implementation(kind: type[Call]):
    def implementation(*arguments):
        call = read(unpack(kind, arguments))
        return load_chosen(call).run(call)

    return implementation


def _fake(kind: type[Call]):
    def fake(*arguments):
        return tuple(unpack(kind, arguments).empty_results().values())

    return fake


# ------------------------------------------------------------------------------- arguments

# Temperatures travel as tensors, so that one that changes every step is no constant of a
# compiled graph; a rule as its numbers.
_SCHEMA_TYPES = {
    "Tensor": "Tensor",
    "Tensor | None": "Tensor?",
    "LabelRule": "float[]",
    "float": "Tensor",
    "int": "SymInt",
    "bool": "bool",
    "str": "str",
}


def schema(kind: type[Call]) -> str:
    """The operator's parameters as torch.library writes them, in the order of the fields."""
    types = kind.__annotations__.items()
    return ", ".join(f"{_SCHEMA_TYPES[annotation(t)]} {name}" for name, t in types)


def annotation(hint) -> str:
    """A field's annotation as it was written."""
    return getattr(hint, "__forward_arg__", hint)


_ONE = torch.ones(1, dtype=torch.float64)  # of one dimension: a 0-dim tensor becomes a symbol
_scalars: dict[float, Tensor] = {}


def scalar(value: float | Tensor, like: Tensor) -> Tensor:
    """A number as a tensor of one element on the CPU; a tensor is one already."""
    if isinstance(value, Tensor):
        return value
    if torch.compiler.is_compiling():
        # A product keeps a number that changes from becoming a constant of the graph.
        return _ONE * value
    found = _scalars.get(value)
    if found is None or type(like) is not Tensor:  # fake tensors take no part in the cache
        found = torch.full((), value, dtype=torch.float64)
        if type(found) is Tensor and len(_scalars) < 64:
            _scalars[value] = found
    return found


def pack(call: Call) -> tuple:
    """The operator's arguments."""
    query = call.query
    if isinstance(call, StatisticsCall):
        return (*call[:2], scalar(call.temperature, query), *call[3:])
    return (
        *call[:3],
        call.rule.to_numbers(),
        scalar(call.temperature, query),
        scalar(call.teacher_temperature, query),
        *call[6:],
    )


def unpack(kind: type[Call], arguments: tuple) -> Call:
    """The call of an operator's arguments. Temperatures stay tensors: a fake one has no value."""
    if kind is StatisticsCall:
        return StatisticsCall(*arguments)
    return LossCall(*arguments[:3], LabelRule.from_numbers(arguments[3]), *arguments[4:])


def read_temperatures(call: Call) -> Call:
    """The call with its temperatures as numbers, checked once more."""
    return type(call)(*_read(call, _TEMPERATURES[type(call)], ()))


def read(call: Call) -> Call:
    """The call as a backend gets it: temperatures that are numbers, and contiguous tensors."""
    kind = type(call)
    return kind(*_read(call, _TEMPERATURES[kind], _TENSORS[kind]))


def _read(call: Call, temperatures: list[int], tensors: list[int]) -> list:
    values = list(call)
    for place in temperatures:
        values[place] = value = float(values[place])
        check_temperature(call._fields[place], value)
    for place in tensors:
        if values[place] is not None:
            values[place] = values[place].contiguous()
    return values


def _places(names: tuple[str, ...]) -> dict[type, list[int]]:
    return {
        kind: [place for place, name in enumerate(kind._fields) if name in names]
        for kind in (StatisticsCall, LossCall)
    }


_TENSORS = _places(("query", "key", "queue", "excluded"))
_TEMPERATURES = _places(("temperature", "teacher_temperature"))


# ----------------------------------------------------------------------------------------- gradient


class _Statistics(torch.autograd.Function):
    """Gradient of softcl::queue_statistics; see `algebra.statistics_backward`."""

    @staticmethod
    def forward(*arguments):
        return _below_autograd("queue_statistics", arguments)

    @staticmethod
    def setup_context(ctx, inputs, output):
        call = StatisticsCall(*inputs)
        lse, mean, entropy, _, neighbor_indices = output
        ctx.mark_non_differentiable(neighbor_indices)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(
            call.query, call.queue, call.temperature, lse, mean, entropy, neighbor_indices,
            call.excluded,
        )  # fmt: skip
        ctx.sums = call.sums

    @staticmethod
    def backward(ctx, dlse, dmean, dentropy, dneighbor_logits, _):
        query, queue, temperature, *saved, excluded = ctx.saved_tensors
        if not ctx.sums:  # outputs without rows can have gradients without rows
            dlse = dmean = dentropy = None
        gradients = (dlse, dmean, dentropy, dneighbor_logits)
        if all(g is None for g in gradients):
            return (None,) * len(StatisticsCall._fields)
        with_queue = ctx.needs_input_grad[1]
        dquery, dqueue = torch.ops.softcl.queue_statistics_backward(
            query, queue, temperature, *saved, *gradients, excluded, with_queue
        )
        dquery = _first_derivative(dquery, query)
        dqueue = _first_derivative(dqueue, queue).to(queue.dtype) if with_queue else None
        rest = (None,) * (len(StatisticsCall._fields) - 2)
        return dquery.to(query.dtype), dqueue, *rest

    @staticmethod
    def vmap(*arguments):
        _refuse_vmap("queue_statistics")

    @staticmethod
    def jvp(ctx, *tangents):
        raise RuntimeError(
            "queue_statistics has no forward-mode derivative: use torch.func.grad, vjp or jacrev"
        )


class LossFunction(torch.autograd.Function):
    """Gradient of softcl::soft_contrastive, known since its forward pass: nothing is visited again.

    What torch.library.register_autograd would make of these functions reads the schema anew at
    every call, which takes longer than everything else in Python together.
    """

    @staticmethod
    def forward(*arguments):
        return _below_autograd("soft_contrastive", arguments)

    @staticmethod
    def setup_context(ctx, inputs, output):
        _, dquery, *rest = output
        ctx.mark_non_differentiable(dquery, *rest)
        ctx.set_materialize_grads(False)
        query = inputs[0]
        ctx.save_for_backward(dquery, query)
        if torch.autograd.forward_ad._current_level >= 0:
            ctx.save_for_forward(dquery)
        ctx.dtype = query.dtype

    @staticmethod
    def backward(ctx, dloss, *_):
        rest = (None,) * (len(LossCall._fields) - 1)
        if dloss is None:
            return None, *rest
        dquery, query = ctx.saved_tensors
        if dquery.dim() != 2:
            raise RuntimeError("soft_contrastive was called with gradient=False: none was kept")
        return _first_derivative(dloss[:, None] * dquery, query).to(ctx.dtype), *rest

    @staticmethod
    def vmap(*arguments):
        _refuse_vmap("soft_contrastive_loss")

    @staticmethod
    def jvp(ctx, tangent, *_):
        (dquery,) = ctx.saved_tensors
        dloss = None if tangent is None else algebra.row_dot(tangent.to(dquery.dtype), dquery)
        return None if dloss is None else dloss.to(dquery.dtype), *(None,) * 5


class _FirstDerivative(torch.autograd.Function):
    """A gradient as it is; differentiated again with respect to its vectors it is an error."""

    @staticmethod
    def forward(gradient, vectors):
        return gradient.view_as(gradient)

    @staticmethod
    def setup_context(ctx, inputs, output):
        pass

    @staticmethod
    def backward(ctx, dgradient):
        if ctx.needs_input_grad[1]:
            _FirstDerivative.refuse()
        return dgradient, None

    @staticmethod
    def jvp(ctx, dgradient, dvectors):
        if dvectors is not None:
            _FirstDerivative.refuse()
        return dgradient

    @staticmethod
    def vmap(info, in_dims, gradient, vectors):
        return _FirstDerivative.apply(gradient, vectors), in_dims[0]

    @staticmethod
    def refuse() -> None:
        raise RuntimeError("softcl's operators have a first derivative only")


def _refuse_vmap(name: str):
    raise RuntimeError(f"{name} has no vmap: its rows are a batch already, so stack yours as rows")


_FUNCTIONS = {StatisticsCall: _Statistics, LossCall: LossFunction}


def _in_one(function: type[torch.autograd.Function]) -> type[torch.autograd.Function]:
    """The function with its context set up in ``forward``: torch.func needs the two apart, but then
    every call takes 15 us to read the signature of ``forward``."""

    class InOne(function):
        @staticmethod
        def forward(ctx, *arguments):
            output = function.forward(*arguments)
            function.setup_context(ctx, arguments, output)
            return output

        setup_context = staticmethod(torch.autograd.Function.setup_context)

    return InOne


def _first_derivative(gradient: Tensor, vectors: Tensor) -> Tensor:
    # Grad mode is on inside a backward only under create_graph=True and torch.func.
    return _FirstDerivative.apply(gradient, vectors) if torch.is_grad_enabled() else gradient


def _below_autograd(name: str, arguments: tuple):
    with torch._C._AutoDispatchBelowAutograd():
        return _operator(name)(*arguments)


@functools.cache
def _operator(name: str):
    return getattr(torch.ops.softcl, name).default


def _autograd(name: str, function: type[torch.autograd.Function], differentiable: int):
    """The operator's place in autograd: the first ``differentiable`` arguments have a gradient."""

    function = _in_one(function)

    def autograd(*arguments):
        recorded = torch.is_grad_enabled() and any(
            [x.requires_grad for x in arguments[:differentiable]]
        )
        if recorded or torch.autograd.forward_ad._current_level >= 0:
            return function.apply(*arguments)
        return _below_autograd(name, arguments)

    return autograd


# ------------------------------------------------------------------------------------ registrations


def _register(name: str, parameters: str, results: int, implementation, fake) -> None:
    tensors = ", ".join(["Tensor"] * results)
    LIBRARY.define(f"{name}({parameters}) -> ({tensors})")
    LIBRARY.impl(name, implementation, "CompositeExplicitAutograd")
    torch.library.register_fake(f"softcl::{name}", fake, lib=LIBRARY)

    def without_autocast(*arguments):
        with torch.autocast(device_type=arguments[0].device.type, enabled=False):
            return _operator(name)(*arguments)

    for device in ("CPU", "CUDA"):
        LIBRARY.impl(name, without_autocast, f"Autocast{device}")


def _register_differentiable(kind: type[Call], results: int, differentiable: int) -> None:
    name = kind.operation
    _register(name, schema(kind), results, _implementation(kind), _fake(kind))
    LIBRARY.impl(name, _autograd(name, _FUNCTIONS[kind], differentiable), "Autograd")

    torch.library.register_vmap(f"softcl::{name}", _FUNCTIONS[kind].vmap, lib=LIBRARY)


def _statistics_backward_fake(query, queue, temperature, lse, mean, *rest):
    with_queue = rest[-1]
    return mean.new_empty(query.shape), mean.new_empty(queue.shape if with_queue else (0,))


def _statistics_backward(query, queue, temperature, *rest):
    return algebra.statistics_backward(query, queue, float(temperature), *rest)


_register_differentiable(StatisticsCall, results=5, differentiable=2)
_register_differentiable(LossCall, results=6, differentiable=1)
_register(
    "queue_statistics_backward",
    "Tensor query, Tensor queue, Tensor temperature, Tensor lse, Tensor mean, Tensor entropy, "
    "Tensor neighbor_indices, Tensor? dlse, Tensor? dmean, Tensor? dentropy, "
    "Tensor? dneighbor_logits, Tensor? excluded, bool with_queue",
    2,
    _statistics_backward,
    _statistics_backward_fake,
)
