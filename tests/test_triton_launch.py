"""Launches as a GPU would see them: a driver that loads nothing stands in for it."""

from __future__ import annotations

import os
from types import SimpleNamespace

import pytest
import torch
from loss_calls import run_loss

triton = pytest.importorskip("triton", reason="triton is not installed")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("the interpreter launches nothing", allow_module_level=True)
from triton.backends.compiler import GPUTarget  # noqa: E402

from softcl.kernels import enqueue, launch  # noqa: E402
from softcl.labels import AdaptiveSoftLabels, HardLabels, LabelRule  # noqa: E402
from softcl.ops import triton as backend  # noqa: E402
from softcl.ops.call import StatisticsCall  # noqa: E402
from softcl.testing import Problem, make_problem  # noqa: E402


@pytest.fixture
def launches(monkeypatch):
    """Kernel, grid and arguments of every launch, on a pretended H100."""
    seen = []

    class Launcher:
        def __init__(self, src, metadata):
            self.name = metadata.name

        def __call__(self, x, y, z, stream, function, packed, metadata, enter, leave, *arguments):
            seen.append((self.name, (x, y, z), arguments))

    driver = SimpleNamespace(
        get_current_target=lambda: GPUTarget("cuda", 90, 32),
        get_current_device=lambda: 0,
        get_current_stream=lambda device: 7,
        launcher_cls=Launcher,
        utils=SimpleNamespace(
            load_binary=lambda *a: (1, 2, 255, 0, 1024),
            unload_module=lambda module: None,
            get_device_properties=lambda device: {"max_shared_mem": 227 << 10},
        ),
    )
    kept = triton.runtime.driver._active
    triton.runtime.driver.set_active(driver)
    monkeypatch.setattr(backend, "target_of", lambda device: ("sm_90", 132))
    monkeypatch.setattr(launch, "_compiled", {})
    yield seen
    # Kernels compiled for the driver that goes must be neither unloaded nor launched by the next.
    for compiled in launch._compiled.values():
        compiled.module = None
    for module in ("stream", "select", "finish", "enqueue"):
        kernels = __import__(f"softcl.kernels.{module}", fromlist=["x"])
        for value in vars(kernels).values():
            if isinstance(value, triton.JITFunction):
                value.device_caches.clear()
    triton.runtime.driver._active = kept


def plain(arguments):
    """Numbers, and of tensors what a kernel depends on."""
    return [(x.dtype, x.shape) if isinstance(x, torch.Tensor) else x for x in arguments]


@pytest.mark.parametrize(
    ("rule", "names"),
    [
        (HardLabels(), ["stream_kernel", "finish_kernel"]),
        (AdaptiveSoftLabels(5), ["stream_kernel", "select_kernel", "finish_kernel"]),
    ],
    ids=["hard", "adaptive_soft"],
)
def test_two_or_three_launches_the_same_again(launches, rule, names):
    """The second call goes past the compiler, with the very arguments of the first."""
    p = make_problem(40, 500, 64, dtype=torch.bfloat16)
    for _ in range(2):
        run_loss(backend, p, rule, normalize=True)
    assert [name for name, *_ in launches] == names * 2
    assert len(launch._compiled) == len(names)
    for first, again in zip(launches[: len(names)], launches[len(names) :], strict=True):
        assert first[:2] == again[:2]
        assert plain(first[2]) == plain(again[2])
        assert len(first[2]) > 10 and isinstance(first[2][-1], tuple)


def test_numbers_of_a_rule_compile_nothing(launches):
    """Which terms a rule has does; those that cannot matter do not."""
    p = make_problem(40, 500, 64, dtype=torch.bfloat16)
    terms = dict(confident_mean=2.0, clip=True, num_neighbors=5)
    run_loss(backend, p, LabelRule(**terms))
    compiled = len(launch._compiled)
    for other in (dict(positive=0.3), dict(mean=0.7), dict(confident_mean=1e200)):
        run_loss(backend, p, LabelRule(**terms | other))
    assert len(launch._compiled) == compiled
    numbers = [arguments[-6:-1] for name, _, arguments in launches if name == "finish_kernel"]
    assert numbers[0] == (0.25, 0.0, 0.5, 0.0, 0.0)  # a quarter of them
    assert len(set(numbers)) == 4 and all(0.5 <= max(x) < 1.0 for x in numbers)
    run_loss(backend, p, LabelRule(**terms, teacher_positive="zero"))
    assert len(launch._compiled) == compiled + 1


@pytest.mark.parametrize("num_neighbors", [5, pytest.param(1, marks=pytest.mark.long)])
def test_a_queue_that_fills_compiles_twice_at_most(launches, num_neighbors):
    """Each kernel, from the first batch in the queue to the last."""
    p = make_problem(40, 1 << 16, 32, dtype=torch.bfloat16)
    for filled in [*range(256, 4096, 256), *range(4096, (1 << 16) + 1, 4096)]:
        young = Problem(p.query, p.key, p.queue[:filled])
        run_loss(backend, young, AdaptiveSoftLabels(num_neighbors))
    names = [key[0] for key in launch._compiled]
    assert set(names) == {"stream_kernel", "select_kernel", "finish_kernel"}
    assert max(names.count(name) for name in names) <= 2, names


def test_what_a_compilation_depends_on(launches):
    """Another alignment, dtype or constant compiles anew; another number of keys does not."""
    queue, refused = torch.zeros(64, 32), torch.zeros((), dtype=torch.int64)
    keys = torch.ones(9 * 32 + 1)
    for rows in (keys[:256].view(8, 32), keys[:128].view(4, 32)):
        enqueue.launch(rows, queue, refused, 0, True)
    assert len(launch._compiled) == 1
    enqueue.launch(keys[1:257].view(8, 32), queue, refused, 0, True)
    assert len(launch._compiled) == 2
    enqueue.launch(keys[:256].view(8, 32).bfloat16(), queue, refused, 0, True)
    enqueue.launch(keys[:256].view(8, 32), queue, refused, 0, False)
    assert len(launch._compiled) == 4
    assert [grid for _, grid, _ in launches] == [(1, 1, 1)] * 5


def test_a_tensor_of_two_gigabytes_is_another_compilation_on_amd(monkeypatch):
    """Whose compiler gives smaller ones 32-bit offsets; elsewhere size plays no part."""

    class Storage:
        def __init__(self, size):
            self.size = lambda: size

    class Sized(torch.Tensor):
        def untyped_storage(self):
            return Storage(self.bytes)

    compiled = []
    module = SimpleNamespace(function=0, packed_metadata=0, run=lambda *arguments: None)

    class Kernel:
        __name__ = "kernel"

        def __getitem__(self, grid):
            def compile_and_run(*arguments, **options):
                compiled.append(grid)
                return module

            return compile_and_run

    driver = SimpleNamespace(get_current_device=lambda: 0, get_current_stream=lambda device: 7)
    monkeypatch.setattr(launch.triton.runtime.driver, "_active", driver)
    monkeypatch.setattr(launch, "INTERPRET", SimpleNamespace(value=False))
    for is_amd, expected in ((True, 2), (False, 1)):
        compiled.clear()
        monkeypatch.setattr(launch, "IS_AMD", is_amd)
        monkeypatch.setattr(launch, "_compiled", {})
        for size in (1 << 20, 1 << 31, 1 << 20, 1 << 32):
            rows = torch.zeros(4).as_subclass(Sized)
            rows.bytes = size
            launch.launch(Kernel(), (1, 1), (rows,), (), num_warps=4)
        assert len(compiled) == expected


def test_an_amd_gpu_without_tiles_is_declined_by_name(monkeypatch):
    monkeypatch.setattr(torch.version, "hip", "7.0")
    on_gpu = SimpleNamespace(device=torch.device("cuda:0"), shape=(4, 8), dtype=torch.float32)
    call = StatisticsCall(on_gpu, on_gpu, 0.1, 0, True)
    for name, declined in (("gfx1100", True), ("gfx1201", True), ("gfx942", False)):
        monkeypatch.setattr(backend, "amd_name", lambda index, name=name: name)
        reason = backend.unsupported(call)
        assert (reason is not None) == declined
        assert not declined or name in reason
