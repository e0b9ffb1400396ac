"""Heads: projectors and predictors."""

from __future__ import annotations

from torch import nn

from softcl.nn.arguments import as_int


class Projector(nn.Sequential):
    """Linear(in_dim, hidden_dim), ReLU, Linear(hidden_dim, out_dim); no batch norm.

    The head of MoCo v2 and ASCL (arXiv 2207.11163, released code). Its output is not normalised:
    the operator does that with ``normalize=True``.

    Raises:
        TypeError, ValueError: a width is no int, or below 1; the message names it.
    """

    def __init__(self, in_dim: int, hidden_dim: int, out_dim: int) -> None:
        in_dim = as_int("in_dim", in_dim, least=1)
        hidden_dim = as_int("hidden_dim", hidden_dim, least=1)
        out_dim = as_int("out_dim", out_dim, least=1)
        super().__init__(
            nn.Linear(in_dim, hidden_dim), nn.ReLU(inplace=True), nn.Linear(hidden_dim, out_dim)
        )


HEAD_NORMS = ("none", "hidden", "unbiased", "all", "plain")


def build_head(
    in_dim: int, hidden_dim: int, out_dim: int, *, layers: int = 2, norm: str = "none"
) -> nn.Sequential:
    """A projector or predictor: ``layers`` linear layers with a ReLU between them.

    Args:
        hidden_dim: width between the layers; unused for one layer.
        norm: its batch norm. "none"; "hidden", between each hidden layer and its ReLU; "unbiased",
            as "hidden" with linear layers without bias (SCE's predictor); "all", after the last
            layer too; "plain", as "all" with linear layers without bias and the last batch norm
            without weight and bias (MoCo v3).

    Raises:
        TypeError: a width or the number of layers is no int.
        ValueError: it is below 1, or ``norm`` is unknown.
    """
    if norm not in HEAD_NORMS:
        raise ValueError(f"norm must be one of {', '.join(HEAD_NORMS)}, got {norm!r}")
    layers = as_int("layers", layers, least=1)
    if norm == "none" and layers == 2:
        return Projector(in_dim, hidden_dim, out_dim)
    in_dim, out_dim = as_int("in_dim", in_dim, least=1), as_int("out_dim", out_dim, least=1)
    if layers > 1:
        hidden_dim = as_int("hidden_dim", hidden_dim, least=1)
    widths = [in_dim, *[hidden_dim] * (layers - 1), out_dim]
    head = nn.Sequential()
    for number, (before, after) in enumerate(zip(widths[:-1], widths[1:], strict=True), start=1):
        last = number == layers
        head.append(nn.Linear(before, after, bias=norm not in ("unbiased", "plain")))
        if norm in ("all", "plain") or (norm in ("hidden", "unbiased") and not last):
            head.append(nn.BatchNorm1d(after, affine=not (last and norm == "plain")))
        if not last:
            head.append(nn.ReLU(inplace=True))
    return head
