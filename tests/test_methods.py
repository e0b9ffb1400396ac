"""Every method's loss and gradients against its formula written out; identities; plug-ins."""

from __future__ import annotations

import dataclasses
import importlib

import pytest
import torch
from dense_methods import CASES, SMALL, D, K, N, dense_loss, label_rule, labels_of
from torch import Tensor, nn

from softcl import AdaptiveSoftLabels, queue_statistics
from softcl.methods import (
    ASCL,
    METHODS,
    MSF,
    SCE,
    SNCLR,
    Batch,
    Defaults,
    Method,
    MoCo,
    ReCo,
    ReSSL,
    losses,
)
from softcl.methods.mixing import cutmix, mixup
from softcl.nn import MemoryQueue
from softcl.testing import (
    GRADIENT_TOLERANCE,
    KINDS,
    LSE_TOLERANCE,
    available_backends,
    make_problem,
    relative_error,
)

FUSED = [
    name
    for name in available_backends(make_problem(2, 3, 4), AdaptiveSoftLabels(1))
    if name != "reference"
]


def make_batch(
    method: Method, kind: str = "random", dtype: torch.dtype = torch.float64, backend: str = "auto"
) -> tuple[Batch, list[Tensor]]:
    """Raw vectors of any length for every view, queues, heads; and the leaves with a gradient.

    All vectors lie around the same centres where the kind has any.
    """
    p = make_problem(8 * N, 2 * K, D, kind=kind, dtype=torch.float64, seed=3)
    lengths = torch.linspace(0.5, 3.0, N, dtype=torch.float64)[:, None]
    leaves: list[Tensor] = []

    def raw(rows: Tensor, number: int, gradient: bool) -> Tensor:
        vectors = (rows[N * number : N * number + N] * lengths).to(dtype)
        if gradient:
            leaves.append(vectors.requires_grad_())
        return vectors

    student = {x: raw(p.query, i, True) for i, x in enumerate(method.student_sees())}
    predicted = student
    if method.predictor_hidden:
        predicted = {x: raw(p.query, 3 + i, True) for i, x in enumerate(method.student_sees())}
    teacher = {x: raw(p.key, i, False) for i, x in enumerate(method.teacher_sees())}
    queues = {name: p.queue[K * i : K * i + K].to(dtype) for i, name in enumerate(method.queues())}
    torch.manual_seed(0)
    heads = nn.ModuleDict(method.heads()).to(dtype)
    leaves.extend(heads.parameters())
    order = torch.randperm(N, generator=torch.Generator().manual_seed(1))
    notes = {"order": order, "share": 0.37}
    return Batch(student, predicted, teacher, queues, heads, notes, backend), leaves


def value_and_gradients(rows: Tensor, leaves: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
    weights = torch.linspace(0.5, 2.0, len(rows), dtype=torch.float64)
    found = torch.autograd.grad((rows.double() * weights).sum(), leaves, allow_unused=True)
    return rows.detach(), [
        torch.zeros_like(leaf) if g is None else g for g, leaf in zip(found, leaves, strict=True)
    ]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", CASES)
def test_loss_and_gradients_equal_the_formula(name, kind):
    method = CASES[name]
    batch, leaves = make_batch(method, kind, backend="reference")
    rows, gradients = value_and_gradients(method.loss(batch).rows, leaves)
    expected, wanted = value_and_gradients(dense_loss(method, batch), leaves)
    torch.testing.assert_close(rows, expected, rtol=1e-10, atol=1e-11)
    for gradient, want in zip(gradients, wanted, strict=True):
        torch.testing.assert_close(gradient, want, rtol=1e-10, atol=1e-10)
    assert sum(float(g.abs().sum()) > 0 for g in wanted) >= 1


def test_some_labels_are_clipped_in_these_batches():
    """Otherwise nothing above would cover ASCL's min(1, .)."""
    method = CASES["ascl 5"]
    batch, _ = make_batch(method, "clustered")
    t = nn.functional.normalize(batch.teacher["key"], dim=1)
    y = labels_of(label_rule(method), t, batch.rows(), method.teacher_temperature)
    assert (y[:, 1:] == y[:, :1]).any() and (y[:, 1:] < y[:, :1]).any()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("name", "backend"),
    [(name, to) for to in FUSED for name in CASES],
)
def test_fused_backends_keep_their_promise(name, kind, backend):
    """Against the formula in float64 on the same float32 inputs, within the operator's bounds.

    On clustered rows twice those, as for the operator itself.
    """
    scale = 1.0 if kind == "random" else 2.0
    method = CASES[name]
    batch, leaves = make_batch(method, kind, torch.float32, backend)
    rows, gradients = value_and_gradients(method.loss(batch).rows, leaves)
    expected, wanted = value_and_gradients(dense_loss(method, batch), leaves)
    assert relative_error(rows, expected) <= scale * LSE_TOLERANCE
    largest = max(float(want.abs().max()) for want in wanted)
    for gradient, want in zip(gradients, wanted, strict=True):
        assert (
            float((gradient - want).abs().max())
            <= scale * GRADIENT_TOLERANCE[torch.float32] * largest
        )


@pytest.mark.parametrize("name", [name for name in CASES if name != "snclr threshold"])
def test_half_precision_vectors_sum_in_float32(name):
    """As under autocast: bfloat16 vectors of a network, a float32 loss, gradients in bfloat16.

    A vector's rounding, 2^-9 of each entry, moves a cosine by some 1e-3 and a logit by ten times
    that. (SNCLR's threshold is left out: it jumps.)
    """
    method = CASES[name]
    batch, leaves = make_batch(method, "random", torch.bfloat16)
    batch.heads.float()
    queues = {x: nn.functional.normalize(rows.float(), dim=1) for x, rows in batch.queues.items()}
    batch = dataclasses.replace(batch, queues=queues)
    rows = method.loss(batch).rows
    assert rows.dtype == torch.float32
    torch.testing.assert_close(rows.double(), dense_loss(method, batch), rtol=0.03, atol=0.1)
    vectors = [leaf for leaf in leaves if leaf.dtype == torch.bfloat16]
    found = torch.autograd.grad(rows.sum(), vectors, allow_unused=True)
    assert any(g is not None and g.dtype == torch.bfloat16 for g in found)
    assert all(g is None or bool(g.isfinite().all()) for g in found)


def test_in_batch_relations_need_the_option():
    assert CASES["sce keys"].excludes and CASES["ressl keys"].excludes
    assert not CASES["sce paper"].excludes and not CASES["ressl"].excludes
    method = ASCL(form="byol", **SMALL)
    assert method.excludes and method.queues() == {} and not method.shuffles
    assert not ASCL(form="byol", labels="normal", **SMALL).excludes
    assert method.predictor_hidden == 512


# ---- identities ----


def rows_of(method: Method, batch: Batch) -> Tensor:
    return method.loss(batch).rows


@pytest.mark.parametrize("kind", KINDS)
def test_methods_whose_numbers_leave_moco_are_moco(kind):
    moco = MoCo(**SMALL)
    batch, _ = make_batch(moco, kind)
    expected = dense_loss(moco, batch)
    reco = ReCo(temperature=0.1, global_weight=0.0, local_weight=0.0, **SMALL)
    assert reco.views().keys() == moco.views().keys() and reco.queues() == moco.queues()
    for method in (
        ASCL(num_neighbors=0, **SMALL),
        SCE(positive_weight=1.0, **SMALL),
        SCE(positive_weight=1.0, form="code", **SMALL),
        reco,
    ):
        torch.testing.assert_close(rows_of(method, batch), expected, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("form", ["paper", "code"])
def test_snclr_without_neighbors_is_infonce_over_the_keys(form):
    method = SNCLR(form=form, num_neighbors=0, **SMALL)
    batch, _ = make_batch(method)
    expected = 0.0
    for view, other in (("first", "second"), ("second", "first")):
        z, t = (nn.functional.normalize(x, dim=1) for x in (batch.predicted[view],
                                                            batch.teacher[other]))  # fmt: skip
        logits = z @ t.T / method.temperature
        expected = expected + nn.functional.cross_entropy(logits, torch.arange(N), reduction="none")
    factor = 2 * method.temperature if form == "code" else 1.0
    torch.testing.assert_close(rows_of(method, batch), factor * expected)


@pytest.mark.parametrize("numbers", [{}, {"use_keys": True}, {"form": "byol"}], ids=str)
@pytest.mark.parametrize("kind", [MoCo, ReSSL, SCE, ASCL, MSF])
def test_symmetric_is_the_mean_of_the_two_directions(kind, numbers):
    if not numbers.keys() <= kind.__dataclass_fields__.keys() or (
        kind is SCE and "form" in numbers
    ):
        pytest.skip("not a choice of this method")
    small = {**SMALL, "predictor_hidden": 0} if kind is MSF else SMALL
    both, one = kind(symmetric=True, **numbers, **small), kind(**numbers, **small)
    batch, _ = make_batch(both)
    swap = {"query": "key", "key": "query"}
    mirrored = Batch(
        {swap[x]: rows for x, rows in batch.student.items()},
        {swap[x]: rows for x, rows in batch.predicted.items()},
        {swap[x]: rows for x, rows in batch.teacher.items()},
        batch.queues,
    )
    expected = (rows_of(one, batch).mean() + rows_of(one, mirrored).mean()) / 2
    torch.testing.assert_close(rows_of(both, batch).mean(), expected)
    if both.queues():
        keys = both.keys(batch)["queue"]
        assert torch.equal(keys, torch.cat([batch.teacher["key"], batch.teacher["query"]]))


def test_one_crop_of_several_is_the_single_crop():
    several, one = ReSSL(crops=3, **SMALL), ReSSL(**SMALL)
    batch, _ = make_batch(several)
    torch.testing.assert_close(rows_of(several, batch)[:N], rows_of(one, batch))
    views = several.views()
    assert views["query"].share == 1.0 and views["query 2"].share == pytest.approx(192 / 224)
    last = ReSSL(crops=5).views()["query 5"]
    assert last.scale == pytest.approx((0.0857, 0.4286), abs=1e-4)


def test_the_weights_of_snclrs_code_carry_gradient():
    method = CASES["snclr code"]
    batch, _ = make_batch(method)
    (gradient,) = torch.autograd.grad(rows_of(method, batch).sum(), batch.student["first"])
    assert float(gradient.abs().max()) > 1e-4


def test_msf_counts_its_own_key_when_it_is_enqueued_first():
    queue = MemoryQueue(K, D)
    key = torch.randn(N, D, generator=torch.Generator().manual_seed(0))
    queue.enqueue(key)
    unit = nn.functional.normalize(key, dim=1)
    found = queue_statistics(unit, queue.rows, 1.0, num_neighbors=1).neighbor_indices
    assert torch.equal(found[:, 0], torch.arange(N))
    assert METHODS["msf"].enqueue == "before" and METHODS["moco"].enqueue == "after"


# ---- parts of a batch ----


@dataclasses.dataclass(frozen=True)
class PartOfTwo(Batch):
    """What process `rank` of two has that take turns with the rows; it keeps what it would give."""

    rank: int = 0
    others: list[Tensor] | None = None
    given: list[Tensor] = dataclasses.field(default_factory=list)

    def all_gather(self, rows: Tensor, queue: Tensor | None = None) -> Tensor:
        self.given.append(rows.detach())
        other = rows if self.others is None else self.others[len(self.given) - 1]
        pair = (rows, other) if self.rank == 0 else (other, rows)
        return super().all_gather(torch.stack(pair, 1).flatten(0, 1), queue)

    def row_indices(self, rows: Tensor) -> Tensor:
        return 2 * super().row_indices(rows) + self.rank


@pytest.mark.parametrize("name", ["snclr code", "nnclr 3", "ascl byol", "ressl keys", "sce keys"])
def test_parts_of_a_batch_have_the_losses_of_the_whole(name):
    """The set that SNCLR, NNCLR and the relations inside a batch look at is everyone's."""
    method = CASES[name]
    batch, _ = make_batch(method, "clustered")
    whole = rows_of(method, batch).view(-1, N)

    def part(rank: int, others: list[Tensor] | None = None) -> tuple[Tensor, list[Tensor]]:
        vectors = [
            {x: rows[rank::2] for x, rows in views.items()}
            for views in (batch.student, batch.predicted, batch.teacher)
        ]
        mine = PartOfTwo(*vectors, batch.queues, batch.heads, rank=rank, others=others)
        return rows_of(method, mine).view(-1, N // 2), mine.given

    for rank in (0, 1):
        alone, _ = part(rank)
        _, others = part(1 - rank)
        rows, _ = part(rank, others)
        torch.testing.assert_close(rows, whole[:, rank::2], rtol=1e-11, atol=1e-11)
        assert not torch.allclose(alone, rows)


# ---- mixing ----


def test_cutmix_pastes_one_box_and_tells_what_is_left():
    images, others = torch.zeros(3, 2, 16, 20), torch.ones(3, 2, 16, 20)
    shares = []
    for seed in range(200):
        generator = torch.Generator().manual_seed(seed)
        mixed, share = cutmix(images, others, generator)
        assert torch.equal(mixed[0], mixed[2]) and bool(((mixed == 0) | (mixed == 1)).all())
        assert share == pytest.approx(1 - float(mixed[0, 0].mean()), abs=1e-6)
        rows, columns = mixed[0, 0].any(1).nonzero(), mixed[0, 0].any(0).nonzero()
        if len(rows):  # a filled rectangle
            area = (rows[-1] - rows[0] + 1) * (columns[-1] - columns[0] + 1)
            assert float(area) == float(mixed[0, 0].sum())
        shares.append(share)
    # A uniform share, but for the boxes that the border clips.
    assert 0.5 < sum(shares) / 200 < 0.8 and min(shares) < 0.3 and max(shares) > 0.95
    assert not images.any()


def test_mixup_is_a_mean():
    generator = torch.Generator().manual_seed(4)
    mixed, share = mixup(torch.zeros(2, 1, 4, 4), torch.ones(2, 1, 4, 4), generator)
    torch.testing.assert_close(mixed, torch.full_like(mixed, 1 - share))
    assert 0 < share < 1


# ---- pages and recipes ----


@pytest.mark.parametrize("name", METHODS)
def test_a_page_is_frozen_documented_and_has_recipes(name):
    kind = METHODS[name]
    module = importlib.import_module(kind.__module__)
    with pytest.raises(dataclasses.FrozenInstanceError):
        kind().momentum = 0.5
    documented = "".join(parent.__doc__ or "" for parent in kind.__mro__)
    for field in dataclasses.fields(kind):
        assert field.name in documented, field.name
    assert "arXiv" in module.__doc__ and "loss" in module.__doc__
    assert len(open(module.__file__).read().splitlines()) < 200
    assert {"cifar10", "imagenet", "shapes"} <= set(module.DEFAULTS)
    for data, defaults in module.DEFAULTS.items():
        assert isinstance(defaults, Defaults) and type(defaults.method) is kind, data
        method = defaults.method
        assert set(method.student_sees()) | set(method.teacher_sees()) <= set(method.views()) | {
            "mixed"
        }
        assert defaults.batch_size % method.num_splits == 0


@pytest.mark.parametrize(
    ("kind", "numbers", "message"),
    [
        (SCE, {"form": "exact"}, "form must be one of .* got 'exact'"),
        (SCE, {"positive_weight": -0.1}, "positive_weight must be at least 0 and finite"),
        (SCE, {"positive_weight": 1.5}, r"positive_weight must be a number in \[0, 1\]"),
        (SNCLR, {"num_neighbors": 9000}, r"num_neighbors must be in \[0, queue_size=4096\]"),
        (SNCLR, {"positiveness_scale": 0.0}, "positiveness_scale must be above 0, got 0.0"),
        (SNCLR, {"threshold": True}, "threshold belongs to the code form"),
        (ReCo, {"mix": "blend"}, "mix must be one of .* got 'blend'"),
        (ReCo, {"global_temperature": 0.0}, "global_temperature must be positive"),
        (ReSSL, {"crops": 6}, r"crops must be in \[1, 5\], got 6"),
        (ReSSL, {"crops": 2, "symmetric": True}, "symmetric needs one crop"),
        (MoCo, {"projector_layers": 0}, r"projector_layers must be in \[1, 8\], got 0"),
    ],
)
def test_wrong_numbers(kind, numbers, message):
    with pytest.raises(ValueError, match=message):
        kind(**numbers)


# ---- plug-ins ----


def test_every_method_has_a_plug_in():
    plugs = {getattr(losses, name).method_class for name in losses.__all__ if name != "MethodLoss"}
    assert plugs == set(METHODS.values())


def plug_in_call(name: str, method: Method, batch: Batch, **options) -> Tensor:
    kind = getattr(losses, type(method).__name__ + "Loss")
    numbers = {
        field.name: getattr(method, field.name)
        for field in dataclasses.fields(method)
        if field.name != "queue_size"
    }
    criterion = kind(**numbers, backend="reference", **options)
    student, predicted, teacher = (
        tuple(x.values()) for x in (batch.student, batch.predicted, batch.teacher)
    )
    if name.startswith("snclr"):
        criterion.attention.load_state_dict(batch.heads.state_dict())
        return criterion.double()(student, predicted, teacher, batch.rows())
    if name.startswith("nnclr"):
        return criterion(student, predicted, batch.rows())
    if name.startswith("reco"):
        notes = batch.notes
        weak = batch.rows("weak queue")
        return criterion(*predicted, *teacher, notes["order"], notes["share"], batch.rows(), weak)
    if name in ("ressl 3 crops", "ressl keys"):
        return criterion(torch.cat(predicted), *teacher, batch.rows())
    if method.symmetric:
        keys = tuple(batch.teacher[view] for view in ("query", "key"))
        return criterion(predicted, keys, batch.queues.get("queue"))
    return criterion(*predicted, *teacher, batch.queues.get("queue"))


@pytest.mark.parametrize("name", CASES)
def test_a_plug_in_is_its_method(name):
    method = CASES[name]
    batch, _ = make_batch(method, "clustered")
    rows = plug_in_call(name, method, batch, reduction="none")
    torch.testing.assert_close(rows, dense_loss(method, batch), rtol=1e-10, atol=1e-11)
    mean = plug_in_call(name, method, batch)
    torch.testing.assert_close(mean, rows.mean())
    torch.testing.assert_close(plug_in_call(name, method, batch, reduction="sum"), rows.sum())


def test_plug_ins_name_what_is_missing():
    a, b = torch.ones(4, D), torch.ones(4, D)
    with pytest.raises(ValueError, match="queue is missing"):
        losses.SCELoss()(a, b)
    with pytest.raises(ValueError, match="queue is empty"):
        losses.MSFLoss()(a, b, MemoryQueue(8, D, init="empty"))
    with pytest.raises(ValueError, match="weak_queue is missing"):
        losses.ReCoLoss(queue=MemoryQueue(8, D))(a, a, b, b, torch.arange(4), 0.5)
    with pytest.raises(ValueError, match="reduction must be one of"):
        losses.MoCoLoss(reduction="average")
    with pytest.raises(TypeError, match="neighbors"):
        losses.MoCoLoss(neighbors=3)


def test_gradients_reach_the_students_vectors_alone():
    for name in ("sce paper", "msf", "snclr code", "nnclr", "reco"):
        batch, _ = make_batch(CASES[name])
        teacher = {x: rows.clone().requires_grad_() for x, rows in batch.teacher.items()}
        tracked = dataclasses.replace(batch, teacher=teacher)
        plug_in_call(name, CASES[name], tracked).backward()
        assert all(rows.grad is None for rows in teacher.values())
        assert any(rows.grad is not None for rows in batch.predicted.values())
