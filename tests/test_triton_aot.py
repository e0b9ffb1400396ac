"""Every tile of the table, compiled ahead of time for its architecture; no GPU takes part.

A run compiles dense labels' bf16 tile for D = 128 on every architecture, and a few on sm_90, there
for D = 1024 too; one with --long all tiles for D = 128, on sm_90 and sm_100 those for D = 256 of
bf16 and of dense labels in fp32, and dense labels' for D = 1024 on every architecture; each for the
work that fills the most registers.
SOFTCL_AOT=table in the environment compiles all tiles, for all dtypes of their precision (half an
hour on one core), SOFTCL_AOT=full all modes too: hours, or minutes for a part of it, such as
-k sm_90-single. Both report bytes spilled where they are allowed, as expected failures (-rx).
"""

from __future__ import annotations

import os
from itertools import product

import pytest
import torch
from loss_calls import some_long

pytest.importorskip("triton", reason="triton is not installed")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("the interpreter compiles nothing", allow_module_level=True)
from softcl.kernels import aot, tiles  # noqa: E402
from softcl.kernels.plan import Work  # noqa: E402
from softcl.kernels.queue_tile import IN_FP16, IN_PARTS  # noqa: E402
from softcl.kernels.stream import PAIRED  # noqa: E402

LEVEL = os.environ.get("SOFTCL_AOT", "")
F, B, H = torch.float32, torch.bfloat16, torch.float16
DTYPES = {
    "bf16": [(B, B), (H, H)],
    "fp16": [(H, B), (B, H)],
    "fp32": [(B, F), (F, F), (F, B), (H, F), (F, H)],
    "both-fp32": [(F, F)],
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
# Their own products read shared memory and tensor memory; they are held to no spills up to D = 256.
WARPGROUPS = ("sm_90", "sm_100")


def works(kind, row_dtype, queue_dtype, D):
    """What a tile is used for, the heaviest of every mode first."""
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
    }[kind.removeprefix("heavy-")]
    temperatures = (0.05,) if kind == "search" else (0.01, 0.05)
    for mode in modes:
        for excluded, K, coldest in product((True, False), (65537, 65536), temperatures):
            yield Work(
                4096, K, D, row_dtype, queue_dtype, **mode, excluded=excluded, coldest=coldest
            )


def in_short_run(target, kind, precision, width):
    if width == 1024:
        return (target, kind, precision) in [("sm_90", "dense", "bf16"), ("sm_86", "dense", "bf16")]
    if width != 128:
        return False
    if (kind, precision) == ("dense", "bf16"):
        return True
    few = [("search", "bf16"), ("single", "fp16"), ("mixed", "fp32"), ("dense", "both-fp32")]
    return target == "sm_90" and (kind, precision) in few


def in_long_run(target, kind, precision, width):
    if width == 256 and target in WARPGROUPS:
        return precision == "bf16" or kind == "dense" and "fp32" in precision
    if width == 1024:
        return kind == "dense"
    return width == 128 and target != "sm_86"


def cases():
    for target, table in tiles.TABLE.items():
        for (kind, precision), width in product(table, tiles.WIDTHS):
            case = target, kind, precision, width
            if LEVEL or in_long_run(*case):
                marks = () if LEVEL or in_short_run(*case) else pytest.mark.long
                yield pytest.param(*case, id="-".join(map(str, case)), marks=marks)


@pytest.mark.parametrize(("target", "kind", "precision", "width"), list(cases()))
def test_tile(target, kind, precision, width):
    tile = tiles.TABLE[target][kind, precision][tiles.WIDTHS.index(width)]
    every = (
        [work for work in works(kind, *dtypes, width) if tile_of(target, work) is tile]
        for dtypes in DTYPES[precision]
    )
    every = [some if LEVEL == "full" else some[:1] for some in every if some]
    spilled = {}
    for work in sum(every if LEVEL else every[:1], []):
        assert work.kind == kind.removeprefix("heavy-")
        assert work.precision.removeprefix("both-") == precision.removeprefix("both-")
        compiled = aot.compile_stream(work, target)
        check(compiled, target, tile, work)
        spilled[work] = compiled.spilled
    worst = max(spilled, key=spilled.get)
    report = f"{spilled[worst]} bytes spilled: {worst}"
    if target in WARPGROUPS and width <= 256:
        # fp32 rows sum a tile's means beside the others: at D = 256 a few numbers have no room.
        most = 88 if width == 256 and "fp32" in precision else 0
        assert spilled[worst] <= most, report
    elif width == 1024 and LEVEL != "full":
        # Sums of half the registers, which 255 of a thread do not quite hold beside the rest.
        assert spilled[worst] <= 128, report
    elif LEVEL and spilled[worst]:
        pytest.xfail(report)


def tile_of(target, work):
    return tiles.find_tile(target, work.kind, work.precision, work.D, work.heavy)


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
    if nvidia and work.D <= 256:
        config = compiled.plan.config
        expected = most_conversions(config, compiled.native and target in WARPGROUPS)
        assert compiled.conversions <= expected, f"{compiled.conversions} conversions: {work}"
        if target == "sm_90" and expected == 0:
            # Chunk maxima that change threads: more where many neighbours want short chunks.
            most = 1 if work.num_neighbors <= 16 else 2
            assert compiled.loop_stores <= most, f"{compiled.loop_stores} stores: {work}"


def most_conversions(config, from_shared_memory):
    """Tiles written to shared memory in the loop, after they were loaded.

    A queue that is taken apart is written again in parts, and one that was not loaded ahead is
    written at all. Cosines and weights stay where they are if products take their right operand
    from shared memory and the left one from registers or tensor memory (wgmma, tcgen05.mma).
    mma.sync takes both from registers: weights that other warps hold, the tile turned around.
    """
    parts, pieces = config.QUEUE_PARTS, config.PIECES
    if from_shared_memory:
        as_it_is = parts == 1 or config.NATIVE_FP16
        made = parts * pieces if parts > 1 and not config.NATIVE_FP16 else 0
        if config.WEIGHTS == IN_FP16.value and config.FIRST_MEAN and not config.NATIVE_FP16:
            made += pieces  # the queue in fp16
        return made + int(config.NUM_STAGES == 1 and as_it_is)
    weight_parts = 3 if config.WEIGHTS == IN_PARTS.value else 1
    return weight_parts + (min(parts, 2) * pieces if parts > 1 else 0)


def own_products(work):
    """Modes with tcgen05.mma: tensor memory holds their sums once for every product added."""
    if work.precision == "bf16":
        return work.D <= (256 if work.kind == "mixed" else 128)
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
            for precision, D in [("bf16", 1), ("fp16", 64), ("fp32", 65), ("bf16", 1024)]:
                tile = tiles.find_tile(target, kind, precision, D)
                assert kind in ("mixed", "dense") or not tile.stacked
    row = tiles.TABLE["sm_90"]["dense", "bf16"]
    for D, place in ((64, 0), (65, 1), (128, 1), (129, 2), (257, 3), (513, 4), (1024, 4)):
        assert tiles.find_tile("sm_90", "dense", "bf16", D) is row[place]


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


KINDS_OF_WORK = {
    "dense": dict(has_key=True, teacher_softmax=True, teacher_mean=True, num_neighbors=5),
    "mixed": dict(has_key=True, num_neighbors=5),
    "hard": dict(has_key=True),
    "statistics": dict(entropy=True, num_neighbors=10),
}


@pytest.mark.parametrize(
    ("kind", "dtype", "width", "heavy"),
    some_long(
        list(product(KINDS_OF_WORK, (B, H), (64, 128, 256), (False, True))),
        [
            (kind, x, 128, False) for kind, x in [("dense", B), ("dense", H), ("mixed", B)]
        ].__contains__,
    ),
    ids=str,
)
def test_products_of_a_tile(kind, dtype, width, heavy):
    """On Hopper two for the rows of both kinds, which makes 8 N K D; one softmax less is two less.

    No warning of ptxas (C7515 makes every wgmma wait for the one before it), and no spill.
    """
    work = Work(
        4096, 65536 + heavy, width, dtype, dtype, **KINDS_OF_WORK[kind],
        excluded=heavy, coldest=0.02 if heavy else 0.1,
    )  # fmt: skip
    assert work.heavy >= heavy
    compiled = aot.compile_stream(work, "sm_90")
    paired = compiled.plan.config.LAYOUT == PAIRED.value
    assert compiled.wgmma_products == (3.0 if paired else 2.0)
    said = aot.ptxas_says(work, "sm_90")
    assert "C75" not in said and "warning" not in said, said
    assert " 0 bytes spill stores" in said


@pytest.mark.parametrize("target", ["sm_80", "sm_90"])
@pytest.mark.parametrize(
    ("side", "size", "colors"), [(32, 32, True), (32, 32, False), (96, 64, True), (256, 224, True)]
)
def test_view_kernel(target, side, size, colors):
    registers, spilled = aot.compile_view(target, side, size, colors)
    assert spilled == 0
    assert registers <= 128, f"{registers} registers leave room for one program of 8 warps alone"
