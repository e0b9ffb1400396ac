"""What methods and their loss modules take, and the line with which they refuse the rest."""

from __future__ import annotations

import copy
from collections.abc import Callable

import numpy as np
import pytest
import torch
from dense_methods import D, K, N
from torch import nn
from torch.nn.functional import normalize

from softcl.methods import ASCL, MSF, NNCLR, SNCLR, Method, MoCo, ReCo
from softcl.methods.losses import (
    ASCLLoss,
    MoCoLoss,
    MSFLoss,
    NNCLRLoss,
    ReCoLoss,
    ReSSLLoss,
    SCELoss,
    SNCLRLoss,
)
from softcl.nn import MemoryQueue

ROWS = torch.randn(6, N, D, generator=torch.Generator().manual_seed(0))
U, V, W, X, Y, Z = ROWS
QUEUE = normalize(torch.randn(K, D, generator=torch.Generator().manual_seed(1)), dim=1)
NAN = U.where(torch.arange(N)[:, None] != 3, torch.nan)
ORDER = torch.arange(N).flip(0)


# ---- kinds of numbers ----


@pytest.mark.parametrize(
    "make", [np.float32, np.float64, np.array, torch.tensor], ids=lambda x: x.__name__
)
def test_numbers_of_any_kind_are_numbers(make: Callable):
    method = SNCLR(temperature=make(0.25), positiveness_scale=make(2.0), form="code")
    assert type(method.temperature) is type(method.positiveness_scale) is float
    assert (method.temperature, method.positiveness_scale) == (0.25, 2.0)
    criterion = MoCoLoss()
    criterion.temperature = make(0.25)
    assert torch.equal(criterion(U, V, QUEUE), MoCoLoss(temperature=0.25)(U, V, QUEUE))


@pytest.mark.parametrize(
    "make", [np.int64, np.uint8, np.array, torch.tensor], ids=lambda x: x.__name__
)
def test_integers_of_any_kind_are_integers(make: Callable):
    method = ASCL(num_neighbors=make(3), queue_size=make(24), temperature=make(1))
    assert type(method.num_neighbors) is type(method.queue_size) is int
    assert method.num_neighbors == 3 and type(method.temperature) is float
    assert SNCLR(form="code", threshold=np.bool_(True)).threshold is True


@pytest.mark.parametrize(
    ("kind", "given", "message"),
    [
        (MoCo, {"temperature": True}, "temperature must be a number, got True"),
        (MoCo, {"temperature": np.bool_(True)}, "temperature must be a number"),
        (MoCo, {"temperature": "0.1"}, "temperature must be a number, got '0.1'"),
        (MoCo, {"temperature": None}, "temperature must be a number, got None"),
        (MoCo, {"temperature": torch.ones(1)}, r"a number, got a tensor of shape \(1,\) on cpu"),
        (MoCo, {"temperature": torch.ones((), device="meta")}, r"a number, got .* on meta"),
        (MoCo, {"temperature": nn.Parameter(torch.ones(()))}, "got a tensor that requires grad"),
        (MoCo, {"momentum": True}, "momentum must be a number, got True"),
        (ASCL, {"num_neighbors": True}, "num_neighbors must be an integer, got True"),
        (ASCL, {"num_neighbors": 2.0}, "num_neighbors must be an integer, got 2.0"),
        (ReCo, {"queue_size": False}, "queue_size must be an integer, got False"),
        (MoCo, {"symmetric": 1}, "symmetric must be True or False, got 1"),
        (SNCLR, {"form": "code", "threshold": 0.1}, "threshold must be True or False, got 0.1"),
        (MoCo, {"student_view": 3}, "student_view must be a word, got 3"),
    ],
)
def test_other_values_are_refused(kind: type[Method], given: dict, message: str):
    with pytest.raises(TypeError, match=message):
        kind(**given)


@pytest.mark.parametrize("kind", [MSF, NNCLR])
def test_a_mean_over_no_neighbors_is_refused(kind: type[Method]):
    with pytest.raises(ValueError, match="num_neighbors must be at least 1: .* got 0"):
        kind(num_neighbors=0)


# ---- what forward refuses ----

SNCLR_CALL = ((U, V), (W, X), (Y, Z), QUEUE)
REFUSED = {
    "a pair for one view": (
        lambda: MoCoLoss()((U, V), (W, X), QUEUE),
        "query must be one tensor without symmetric=True, got a tuple of 2",
    ),
    "a pair of keys": (
        lambda: ASCLLoss()(U, (W, X), QUEUE),
        "key must be one tensor without symmetric=True, got a tuple of 2",
    ),
    "a tensor for two views": (
        lambda: SCELoss(symmetric=True)(U, V, QUEUE),
        r"query must be a tuple with symmetric=True, of query, key, got a tensor of shape \(8, 6\)",
    ),
    "two views in a tensor": (
        lambda: MoCoLoss(symmetric=True)(ROWS[:2], ROWS[2:4], QUEUE),
        r"query must be a tuple with symmetric=True, .* got a tensor of shape \(2, 8, 6\)",
    ),
    "three views": (
        lambda: MoCoLoss(symmetric=True)((U, V, W), (X, Y), QUEUE),
        "query must be 2 tensors with symmetric=True, of query, key, got a tuple of 3",
    ),
    "one key": (
        lambda: MoCoLoss(symmetric=True)((U, V), (X,), QUEUE),
        "key must be 2 tensors with symmetric=True, of query, key, got a tuple of 1",
    ),
    "a tensor of projections": (
        lambda: NNCLRLoss()(U, (V, W), QUEUE),
        r"projections must be a tuple, of query, key, got a tensor of shape \(8, 6\)",
    ),
    "three predictions": (
        lambda: NNCLRLoss()((U, V), (U, V, W), QUEUE),
        "predictions must be 2 tensors, of query, key, got a tuple of 3",
    ),
    "one key of snclr": (
        lambda: SNCLRLoss(form="code")((U, V), (U, V), [U], QUEUE),
        "keys must be 2 tensors, of first, second, got a list of 1",
    ),
    "a batch of one": (
        lambda: ASCLLoss(form="byol")(U[:1], V[:1]),
        "query must have at least 2 rows in the byol form .* got 1",
    ),
    "more neighbours than others": (
        lambda: ASCLLoss(form="byol", num_neighbors=8)(U, V),
        "query must have at least 9 rows in the byol form with num_neighbors=8, .* got 8",
    ),
    "another projection_dim": (
        lambda: SNCLRLoss()(*SNCLR_CALL),
        r"projections must have the attention's projection_dim=128, got shape \(8, 6\)",
    ),
    "an attention in half": (
        lambda: SNCLRLoss(projection_dim=D).half()(*SNCLR_CALL),
        "projections must have the attention's dtype torch.float16, got torch.float32",
    ),
    "an attention in double": (
        lambda: SNCLRLoss(projection_dim=D).double()(*SNCLR_CALL),
        "projections must have the attention's dtype torch.float64, got torch.float32",
    ),
    "fewer keys": (
        lambda: MoCoLoss()(U, V[:3], QUEUE),
        r"key must have query's shape \(8, 6\), got \(3, 6\)",
    ),
    "fewer keys of msf": (
        lambda: MSFLoss()(U, V[:1], QUEUE),
        r"key must have query's shape \(8, 6\), got \(1, 6\)",
    ),
    "fewer keys of byol": (
        lambda: ASCLLoss(form="byol")(U, V[:3]),
        r"key must have query's shape \(8, 6\), got \(3, 6\)",
    ),
    "another dimension of the key": (
        lambda: ASCLLoss()(U, V[:, :4], QUEUE),
        r"key must have query's dimension D=6, got shape \(8, 4\)",
    ),
    "views of two sizes": (
        lambda: SCELoss(symmetric=True)((U, V[:3]), (W, X), QUEUE),
        r"query\[1\] must have query\[0\]'s shape \(8, 6\), got \(3, 6\)",
    ),
    "predictions of another size": (
        lambda: SNCLRLoss(form="code")((U, V), (W, X[:2]), (Y, Z), QUEUE),
        r"predictions\[1\] must have projections\[0\]'s shape \(8, 6\), got \(2, 6\)",
    ),
    "fewer mixed": (
        lambda: ReCoLoss()(U, V[:2], W, X, ORDER, 0.5, QUEUE, QUEUE),
        r"mixed must have query's shape \(8, 6\), got \(2, 6\)",
    ),
    "fewer weak keys": (
        lambda: ReCoLoss()(U, V, W, X[:2], ORDER, 0.5, QUEUE, QUEUE),
        r"weak_key must have query's shape \(8, 6\), got \(2, 6\)",
    ),
    "crops that do not divide": (
        lambda: ReSSLLoss(crops=3)(torch.cat([U, V]), W, QUEUE),
        r"query must have crops=3 times key's 8 rows, got shape \(16, 6\)",
    ),
    "another device": (
        lambda: MSFLoss()(U, V.to("meta"), QUEUE),
        "key is on meta, but query is on cpu",
    ),
    "no tensor": (
        lambda: MoCoLoss()(U.numpy(), V, QUEUE),
        "query must be a tensor, got ndarray",
    ),
    "no tensor in a pair": (
        lambda: NNCLRLoss()((U, None), (V, W), QUEUE),
        r"projections\[1\] must be a tensor, got NoneType",
    ),
    "no mixed": (
        lambda: ReCoLoss()(U, None, W, X, ORDER, 0.5, QUEUE, QUEUE),
        "mixed must be a tensor, got NoneType",
    ),
    "integers": (
        lambda: SNCLRLoss(form="code")((U.long(), V), (W, X), (Y, Z), QUEUE),
        r"projections\[0\] must be a floating-point tensor, got dtype torch.int64",
    ),
    "one vector": (
        lambda: MSFLoss()(U[0], V[0], QUEUE),
        r"query must be a matrix of row vectors, got shape \(6,\)",
    ),
    "nan in a key of msf": (
        lambda: MSFLoss()(U, NAN, QUEUE),
        r"key has 1 row\(s\) that are not finite, the first is row 3",
    ),
    "infinity in a projection": (
        lambda: NNCLRLoss()((U, NAN / 0.0), (V, W), QUEUE),
        r"projections\[1\] has 8 row\(s\) that are not finite, the first is row 0",
    ),
    "nan in a prediction": (
        lambda: SNCLRLoss(form="code")((U, V), (W, NAN), (Y, Z), QUEUE),
        r"predictions\[1\] has 1 row\(s\) that are not finite, the first is row 3",
    ),
    "an empty batch": (
        lambda: NNCLRLoss()((U[:0],) * 2, (U[:0],) * 2, QUEUE),
        r"projections\[0\] must not be empty, got shape \(0, 6\)",
    ),
    "no queue": (
        lambda: MoCoLoss()(U, V, [QUEUE]),
        "queue must be a MemoryQueue or a tensor, got list",
    ),
    "another dimension of the queue": (
        lambda: MSFLoss()(U, V, QUEUE[:, :4]),
        r"queue must have query's dimension D=6, got shape \(24, 4\)",
    ),
    "another dimension of the weak queue": (
        lambda: ReCoLoss()(U, V, W, X, ORDER, 0.5, QUEUE, MemoryQueue(K, 4)),
        r"weak_queue must have query's dimension D=6, got shape \(24, 4\)",
    ),
    "no order": (
        lambda: ReCoLoss()(U, V, W, X, None, 0.5, QUEUE, QUEUE),
        "order must be a tensor, got NoneType",
    ),
    "an order beyond the batch": (
        lambda: ReCoLoss()(U, V, W, X, ORDER + 1, 0.5, QUEUE, QUEUE),
        "order must be of images 0 to 7, got 8",
    ),
    "a short order": (
        lambda: ReCoLoss()(U, V, W, X, ORDER[:3], 0.5, QUEUE, QUEUE),
        r"order must be int64 of shape \(8,\), got torch.int64 of shape \(3,\)",
    ),
    "a share above one": (
        lambda: ReCoLoss()(U, V, W, X, ORDER, 1.5, QUEUE, QUEUE),
        r"share must be in \[0, 1\], got 1.5",
    ),
    "no share": (
        lambda: ReCoLoss()(U, V, W, X, ORDER, None, QUEUE, QUEUE),
        "share must be a number, got NoneType",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_forward_names_the_argument(name: str):
    call, message = REFUSED[name]
    with pytest.raises((TypeError, ValueError), match=f"^{message}$") as refusal:
        call()
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_an_attention_of_the_vectors_precision_works(dtype: torch.dtype):
    criterion = SNCLRLoss(projection_dim=D)
    expected = criterion(*SNCLR_CALL)
    vectors = [tuple(x.to(dtype) for x in pair) for pair in SNCLR_CALL[:3]]
    found = copy.deepcopy(criterion).to(dtype)(*vectors, QUEUE)
    assert found.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    torch.testing.assert_close(found.float(), expected, rtol=0.02, atol=0.05)


@pytest.mark.parametrize("weight", ["global_weight", "local_weight"])
def test_reco_asks_for_what_its_terms_need(weight: str):
    criterion = ReCoLoss(**{weight: 0.0})
    whole = criterion(U, V, W, X, ORDER, 0.5, QUEUE, QUEUE)
    if weight == "global_weight":
        found = criterion(U, V, W, None, ORDER, 0.5, QUEUE)
    else:
        found = criterion(U, None, W, X, None, None, QUEUE, QUEUE)
    assert torch.equal(found, whole)
