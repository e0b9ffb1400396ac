"""Every tile of the table, compiled ahead of time for its architecture; no GPU takes part.

The default run compiles the tiles for D = 128 on every architecture, and for bf16 those for D = 256
on sm_90 and sm_100, each for the work that fills the most registers. SOFTCL_AOT=full in the
environment compiles all tiles, for all dtypes of their precision, and all modes: hours on one core,
minutes for a part of it, such as -k sm_90-single. A tile of SPILLS is then reported as an expected
failure, with its bytes, and one that spills no more fails until it is taken off.
"""

from __future__ import annotations

import os

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("the interpreter compiles nothing", allow_module_level=True)
from softcl.kernels import aot, tiles  # noqa: E402
from softcl.kernels.plan import Work  # noqa: E402

FULL = os.environ.get("SOFTCL_AOT") == "full"
F, B, H = torch.float32, torch.bfloat16, torch.float16
DTYPES = {
    "bf16": [(B, B)],
    "fp16": [(H, H), (H, B), (B, H)],
    "fp32": [(F, F), (B, F), (F, B), (H, F), (F, H)],
}

# Bytes of shared memory and 32-bit registers of a multiprocessor (AMD: of a compute unit).
SHARED_PER_SM = {
    "sm_80": 164 << 10,
    "sm_86": 100 << 10,
    "sm_90": 228 << 10,
    "sm_100": 228 << 10,
    "gfx942": 64 << 10,
}
REGISTERS_PER_SM = 1 << 16
TENSOR_MEMORY = 512  # columns

# (target, kind, precision, width) of the tiles for D <= 256 on sm_90 and sm_100 that spill in some
# of their modes; kernels/tiles.py says why.
SPILLS = {
    (target, kind, "fp32", 256)
    for target in ("sm_90", "sm_100")
    for kind in ("single", "mixed", "dense")
}


def works(kind, row_dtype, queue_dtype, D):
    """What a tile is used for; the first is the heaviest."""
    cold = kind.startswith("cold-")
    kind = kind.removeprefix("cold-")
    loss = dict(has_key=True, normalize=True, ranks=True)
    modes = {
        "search": [dict(softmax=False, mean=False, num_neighbors=10)],
        "single": [
            dict(entropy=True, num_neighbors=10),
            dict(entropy=True, num_neighbors=300),
            loss,
            dict(loss, mean=False),
        ],
        "mixed": [
            dict(loss, teacher_softmax=True, num_neighbors=5),
            dict(loss, num_neighbors=5),
            dict(loss, teacher_softmax=True, teacher_mean=True, mean=False, num_neighbors=5),
        ],
        "dense": [
            dict(loss, teacher_softmax=True, teacher_mean=True, num_neighbors=5),
            dict(has_key=True, teacher_softmax=True, teacher_mean=True),
        ],
    }[kind]
    for mode in modes:
        for coldest in (0.01,) if cold else (0.05, 0.01) if kind != "search" else (0.05,):
            for K in (65536, 65537):
                yield Work(4096, K, D, row_dtype, queue_dtype, **mode, coldest=coldest)


def cases():
    for target, table in tiles.TABLE.items():
        for (kind, precision), row in table.items():
            for width in tiles.WIDTHS[: len(row)]:
                hopper = target in ("sm_90", "sm_100")
                wide = width == 256 and hopper and precision == "bf16"
                if FULL or (width == 128 and target != "sm_86") or wide:
                    yield pytest.param(
                        target, kind, precision, width, id=f"{target}-{kind}-{precision}-{width}"
                    )


@pytest.mark.parametrize(("target", "kind", "precision", "width"), list(cases()))
def test_tile(target, kind, precision, width):
    tile = tiles.TABLE[target][kind, precision][tiles.WIDTHS.index(width)]
    spilled = {}
    for row_dtype, queue_dtype in DTYPES[precision] if FULL else DTYPES[precision][:1]:
        every = list(works(kind, row_dtype, queue_dtype, width))
        every = [w for w in every if tile_of(target, w) is tile]
        for work in every if FULL else every[:1]:
            assert (work.kind, work.precision) == (kind.removeprefix("cold-"), precision)
            compiled = aot.compile_stream(work, target)
            check(compiled, target, tile, work)
            spilled[work] = compiled.spilled
    if target not in ("sm_90", "sm_100") or width > 256:
        return
    worst = max(spilled, key=spilled.get)
    if (target, kind, precision, width) not in SPILLS:
        assert spilled[worst] == 0, f"{spilled[worst]} bytes spilled: {worst}"
    elif FULL:
        assert spilled[worst] > 0, "it spills no more: take it off SPILLS"
        modes = sum(x > 0 for x in spilled.values())
        pytest.xfail(f"{modes} of {len(spilled)} modes spill; {spilled[worst]} bytes: {worst}")


def tile_of(target, work):
    return tiles.find_tile(target, work.kind, work.precision, work.D, work.cold)


def check(compiled, target, tile, work):
    nvidia = target.startswith("sm")
    shared, registers = compiled.shared_memory, compiled.registers
    assert shared <= tiles.SHARED_MEMORY[target], f"{shared} bytes of shared memory: {work}"
    assert compiled.tensor_memory <= TENSOR_MEMORY, f"{compiled.tensor_memory} columns: {work}"
    assert compiled.tensor_products > 0, f"no tensor-core instruction: {work}"
    if target == "sm_90" and work.D <= 256 or target == "sm_100" and own_products(work):
        assert compiled.native, f"neither wgmma nor tcgen05.mma: {work}"
    # 1 KB per program is the system's.
    programs = tile.programs_per_sm
    assert programs * (shared + 1024 * nvidia) <= SHARED_PER_SM[target] + 1024, work
    if nvidia:
        assert programs * tile.num_warps * 32 * registers <= REGISTERS_PER_SM, work
    if target == "sm_90" and work.D <= 256:
        # Only a tile that is cut into parts is written again, and one that was not loaded ahead
        # is written at all; weights and cosines stay where they are.
        config = compiled.plan.config
        expected = config.QUEUE_PARTS if work.precision != "bf16" else int(config.NUM_STAGES == 1)
        assert compiled.conversions <= expected, f"{compiled.conversions} conversions: {work}"
        assert expected > 0 or compiled.loop_stores <= 1, f"{compiled.loop_stores} stores: {work}"


def own_products(work):
    """Modes with tcgen05.mma: tensor memory holds their sums once for every product added."""
    if work.precision == "bf16":
        return work.D <= 128 or work.kind == "mixed"
    return work.D <= 128 and work.precision == "fp16" and work.kind != "search"


@pytest.mark.parametrize(
    ("architecture", "shared_memory", "target"),
    [
        ((8, 0), 163 << 10, "sm_80"),
        ((8, 6), 99 << 10, "sm_86"),
        ((8, 7), 163 << 10, "sm_80"),
        ((8, 9), 99 << 10, "sm_86"),
        ((9, 0), 227 << 10, "sm_90"),
        ((9, 0), None, "sm_90"),
        ((10, 3), 227 << 10, "sm_100"),
        ((12, 0), 99 << 10, "sm_86"),
        ((13, 0), 300 << 10, "sm_100"),
        ((13, 0), 99 << 10, "sm_86"),
        ("gfx942:sramecc+:xnack-", None, "gfx942"),
        ("gfx90a", 64 << 10, "gfx942"),
    ],
    ids=str,
)
def test_target_of_a_gpu(architecture, shared_memory, target):
    assert tiles.target_name(architecture, shared_memory) == target


def test_every_call_finds_a_tile():
    for target in tiles.TABLE:
        for kind in ("search", "single", "mixed", "dense"):
            for precision, D in [("bf16", 1), ("fp16", 64), ("fp32", 65), ("bf16", 512)]:
                tile = tiles.find_tile(target, kind, precision, D)
                assert kind in ("mixed", "dense") or not tile.stacked
    widest = [tiles.find_tile("sm_90", "dense", "bf16", D) for D in (64, 65, 128, 129, 256, 257)]
    assert widest[1] == widest[2] and widest[3] == widest[4] and len(set(widest)) == 4


def test_addresses_take_64_bits():
    """A tile's place in a queue beyond 2^31 numbers: its product is taken in 64 bits."""
    import re

    import triton

    work = next(works("single", B, B, 128))
    how = aot.plan.make_plan(work, "sm_90", 132)
    kernel = triton.compile(
        aot.source(work, how.config),
        target=aot.TARGETS["sm_90"],
        options={"num_warps": how.num_warps, "num_stages": how.config.NUM_STAGES},
    )
    code = kernel.asm["ttir"]

    size = how.config.BLOCK_K * how.config.D
    names = re.findall(rf"(%\S+) = arith\.constant {size} : i64", code)
    assert names and any(re.search(rf"arith\.muli %\S+, {name} : i64", code) for name in names)


@pytest.mark.parametrize("target", ["sm_80", "sm_90"])
@pytest.mark.parametrize(
    ("side", "size", "colors"), [(32, 32, True), (32, 32, False), (96, 64, True), (256, 224, True)]
)
def test_view_kernel(target, side, size, colors):
    registers, spilled = aot.compile_view(target, side, size, colors)
    assert spilled == 0
    assert registers <= 128, f"{registers} registers leave room for one program of 8 warps alone"
