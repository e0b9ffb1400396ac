"""The tile table of the streaming kernel: tile sizes by architecture, shape of the work and D.

A row of the table is what one program does at a time (see stream.py). Tiles are chosen here, by
look-up, and never by timing at import or at the first call: the same call runs the same code on
every machine of a kind. `bench/tune_triton.py` times candidates on the GPU at hand and prints rows.

No row has been timed yet. They are what ahead-of-time compilation leaves of the candidates that
arithmetic suggests; tests/test_triton_aot.py holds them to it. Up to D = 256 none spills a register
on sm_90 and sm_100, but for a few of fp32 at D = 256. SOFTCL_AOT=table names those that do
elsewhere: most of D = 512, up to 128 bytes at D = 1024, and sm_80's where a queue of 32 bits, or of
fp16 with bf16 rows, is taken apart. The arithmetic:

Rows. A program multiplies 64 rows or more, what one wgmma takes. As keys and values are one tile, a
queue row brings 2 D bytes for 4 D FLOP per row, so 64 rows ask of L2 what attention asks with 128:
16 bytes per clock and multiprocessor of the 32 or more that it gives. tcgen05 runs at half its rate
below 128 rows, mma.sync gives each warp 16, and Triton sets its warps side by side over the rows,
so that every row's sums stay in one warp, only where there are at least D of them.
Warps. Four warps per 64 rows hold sums (64, D) in D / 2 registers per thread, and cosines and
weights (64, BLOCK_K) in BLOCK_K. With two programs on a multiprocessor the products of one run
under the softmax of the other, which one program of eight warps in step does not give.
BLOCK_K. As wide as the registers allow without a spill: 128 for D <= 64, 64 at 128, 32 at 256.
STACKED tiles (both kinds of rows get both products) where labels are dense, and where PAIRED ones
(two products for student rows, one for teacher rows) have no room for both operands.
Stages. Three where shared memory still holds two programs, else two. One (mixed labels, bf16,
D = 256, sm_90) where the addresses of a second would spill: the other program covers the wait.
fp32 rows. A tile's mean is a sum beside that of the split (sums.py): two pieces halve it.
Pieces. A queue that is not bf16 is taken apart in registers. At D = 256 in fp32 the sums leave it
no room (128 of 255 registers on sm_90), so there a tile is loaded, taken apart and multiplied in
pieces of 64 columns or 128, which wait in shared memory as bf16 for the second product. On sm_90
the rows are 128, with eight warps: 16 queue rows are then four numbers a thread and piece. Rows in
fp32 fill shared memory beside an fp32 queue (192 KB of them): one stage, and two pieces, which take
fewer addresses.
D > 512. The sums of 32 rows, or of 16 beside fp32's tile, are what registers hold at D = 1024. Rows
and tile come in pieces and do not stay (stream.py), so shared memory does not grow with D: the same
tiles everywhere but for searches in fp32. Each piece of the second product is waited for by itself,
once for 64 queue rows; smaller pieces than 64 columns would leave warps without any.
tcgen05.mma. Triton gives every product that is added to a sum a copy of it in tensor memory, of
BLOCK_D of the 512 columns, and cosines and weights need some too. At D = 256 two copies leave no
room: only mixed bf16 labels, with one product, and searches have it; hard ones share their row with
the statistics, which take two. The others take mma.sync.
"""

from __future__ import annotations

import itertools
import re
from dataclasses import dataclass


@dataclass(frozen=True)
class Tile:
    """One row of the table.

    Attributes:
        block_n: samples per program; the products have block_n rows, 2 block_n if ``stacked``.
        block_k: queue rows per tile.
        num_warps, num_stages: warps per program, tiles in flight (their pieces for D > 512).
        programs_per_sm: how many fit on one multiprocessor (registers, shared memory).
        pieces: of D, in which a queue tile is multiplied and added, one after the other.
        stacked: student and teacher rows in one tile.
    """

    block_n: int
    block_k: int
    num_warps: int
    num_stages: int
    programs_per_sm: int
    pieces: int = 1
    stacked: bool = False


def parse(table: str) -> dict[tuple[str, str], tuple[Tile, ...]]:
    """(kind, precision) -> tiles by D, from lines "kind precision tile tile ..." of tiles
    "block_n x block_k / num_warps / num_stages / programs_per_sm", "/ pieces" after it where there
    are several, and an "s" before a stacked one."""
    rows = {}
    for kind, precision, *cells in map(str.split, table.strip().splitlines()):
        rows[kind, precision] = tuple(
            Tile(*map(int, re.split("[x/]", cell.lstrip("s"))), stacked=cell.startswith("s"))
            for cell in cells
        )
    return rows


# Up to which D each of a row's tiles serves.
WIDTHS = (64, 128, 256, 512, 1024)

# Rows and tile of a program fit beside its sums up to this D; see stream.py.
WIDEST_KEPT = 512

# Bytes of shared memory that a program can have, by target.
SHARED_MEMORY = {
    "sm_80": 163 << 10,
    "sm_86": 99 << 10,
    "sm_90": 227 << 10,
    "sm_100": 227 << 10,
    "gfx942": 64 << 10,
}

# By target: the tiles of each kind and precision of plan.Work, for D up to 64, 128, 256, 512, 1024.
# "heavy" rows serve the modes that plan.Work.heavy names, and "both" rows fp32 rows with an fp32
# queue, where these take other tiles than the rest.
TABLE = {
    "sm_80": parse("""
search bf16  128x64/4/3/2   128x64/8/3/1   64x64/4/2/1    64x32/8/2/1    128x128/8/3/1/16
search fp16  64x64/4/2/2    64x32/4/2/2    64x32/8/2/1    32x32/8/2/1    128x64/8/3/1/16
search fp32  64x32/4/2/2    32x32/4/2/2    32x16/8/2/1    16x16/8/1/1    64x64/4/2/2/32
single bf16  64x64/4/3/2    128x32/8/3/1   64x32/8/2/1    32x32/8/2/1    32x64/8/3/1/16
single fp16  64x64/4/2/2    64x32/8/2/1    32x32/8/2/1    32x16/8/2/1    32x64/8/3/1/16
single fp32  64x32/4/2/1    32x32/4/2/2    32x16/8/2/1    16x16/8/1/1    16x64/8/2/1/16
mixed  bf16  64x64/4/3/2    128x32/8/3/1   64x32/8/2/1    s16x32/8/2/1   32x64/8/3/1/16
mixed  fp16  64x32/4/2/2    s32x32/8/2/1   s16x32/8/2/1   s16x16/8/2/1   32x64/8/3/1/16
mixed  fp32  s32x32/4/2/1   s16x32/4/2/2   s16x16/8/2/1   s16x16/8/1/1   16x64/8/2/1/16
dense  bf16  s32x64/4/3/2   s64x32/8/3/1   s32x32/8/2/1   s16x32/8/2/1   s16x64/8/3/1/16
dense  fp16  s32x64/4/2/2   s32x32/8/2/1   s16x32/8/2/1   s16x16/8/2/1   s16x64/8/3/1/16
dense  fp32  s32x32/4/2/1   s16x32/4/2/2   s16x16/8/2/1   s16x16/8/1/1   s8x64/8/2/1/16
"""),
    "sm_90": parse("""
search bf16  128x128/4/3/2  128x64/4/3/2   64x64/4/2/2    64x64/4/2/1    128x128/8/3/1/16
search fp16  64x64/4/3/2    64x64/4/2/2    64x32/4/2/2    64x32/4/2/1    128x64/8/3/1/16
search fp32  64x32/4/2/2    64x32/4/2/2    64x16/4/2/1    16x16/4/1/1    128x64/8/3/1/16
single bf16  64x128/4/3/2   64x128/4/2/2   64x32/4/3/2    32x32/8/2/1    32x64/8/3/1/16
single fp16  64x64/4/3/2    64x32/4/2/2    64x16/4/3/1    32x16/8/2/1    32x64/8/3/1/16
single fp32  64x32/4/3/2    64x32/4/2/2/2  128x16/8/2/1/2 32x16/8/1/1    16x64/8/2/1/16
mixed  bf16  64x128/4/3/2   64x64/4/3/2    64x32/4/1/2    s16x32/8/2/1   32x64/8/3/1/16
mixed  fp16  64x64/4/3/2    64x32/4/2/2    s32x16/4/2/2   s16x16/8/2/1   32x64/8/3/1/16
mixed  fp32  s32x32/4/2/2   s32x32/4/2/2/2 s64x16/8/2/1/2 s16x16/8/1/1   16x64/8/2/1/16
dense  bf16  s32x64/4/3/2   s32x64/4/3/2   s32x32/4/3/2   s16x32/8/2/1   s16x64/8/3/1/16
dense  fp16  s32x64/4/3/2   s32x32/4/3/2   s32x16/4/1/2   s16x16/8/2/1   s16x64/8/3/1/16
dense  fp32  s32x32/4/2/2   s32x32/4/2/2/2 s64x16/8/2/1/2 s16x16/8/1/1   s8x64/8/2/1/16
single both-fp32 64x32/4/3/2    64x32/4/2/2/2  128x16/8/1/1/2 32x16/8/1/1    16x64/8/2/1/16
mixed  both-fp32 s32x32/4/2/2   s32x32/4/2/2/2 s64x16/8/1/1/2 s16x16/8/1/1   16x64/8/2/1/16
dense  both-fp32 s32x32/4/2/2   s32x32/4/2/2/2 s64x16/8/1/1/2 s16x16/8/1/1   s8x64/8/2/1/16
heavy-single bf16 64x128/4/3/2   64x64/4/3/2    64x32/4/3/2    32x32/8/2/1    32x64/8/3/1/16
"""),
    "sm_100": parse("""
search bf16  128x128/8/3/1  128x64/8/3/1   128x64/8/2/1   128x32/8/2/1   128x128/8/3/1/16
search fp16  128x64/8/2/1   128x32/8/2/1   64x32/4/2/1    64x16/4/2/1    128x64/8/3/1/16
search fp32  32x32/4/2/2    32x16/4/2/2    64x32/8/2/1    32x16/8/1/1    128x64/8/3/1/16
single bf16  128x64/8/3/1   128x64/8/3/1   32x32/4/2/2    32x32/8/2/1    32x64/8/3/1/16
single fp16  64x32/8/2/1    64x32/8/2/1    16x32/8/2/1    32x16/8/2/1    32x64/8/3/1/16
single fp32  32x16/4/2/2    32x16/8/2/1    32x16/8/2/1/4  32x16/8/1/1    16x64/8/2/1/16
mixed  bf16  128x64/8/3/1   128x64/8/3/1   128x32/8/2/1   s16x32/8/2/1   s16x64/8/3/1/16
mixed  fp16  64x32/8/2/1    64x32/8/2/1    s8x32/8/2/1    s16x16/8/2/1   s16x64/8/3/1/16
mixed  fp32  64x32/8/2/1    s16x16/8/2/1   s16x16/8/2/1/4 s16x16/8/1/1   s8x64/8/2/1/16
dense  bf16  s64x32/8/3/1   s32x64/8/3/1   s16x32/4/2/2   s16x32/8/2/1   s16x64/8/3/1/16
dense  fp16  s32x32/8/2/1   s32x32/8/2/1   s8x32/8/2/1    s16x16/8/2/1   s16x64/8/3/1/16
dense  fp32  s32x32/8/2/1   s16x16/8/2/1   s16x16/8/2/1/4 s16x16/8/1/1   s8x64/8/2/1/16
heavy-single bf16 64x64/8/3/1    64x32/8/3/1    32x32/4/2/2    32x32/8/2/1    32x64/8/3/1/16
heavy-mixed  bf16 64x32/8/3/1    64x32/8/3/1    64x32/8/2/1    s16x32/8/2/1   s16x64/8/3/1/16
"""),
    "gfx942": parse("""
search bf16  128x64/4/2/1   64x64/4/2/1    64x32/4/2/1    32x32/4/2/1    64x64/4/2/1/16
search fp16  64x64/4/2/1    64x32/4/2/1    32x32/4/2/1    32x16/4/2/1    64x64/4/2/1/16
search fp32  64x32/4/2/1    32x32/4/2/1    32x16/4/2/1    16x16/4/1/1    64x64/4/2/1/16
single bf16  64x64/4/2/1    64x64/4/2/1    64x32/4/2/1    32x32/4/2/1    16x64/4/1/1/16
single fp16  64x64/4/2/1    64x32/4/2/1    32x32/4/2/1    32x16/4/2/1    16x64/4/1/1/16
single fp32  64x32/4/2/1    32x32/4/2/1    32x16/4/1/1    16x16/4/1/1    16x64/4/1/1/16
mixed  bf16  64x64/4/2/1    64x64/4/2/1    32x32/4/2/1    16x32/4/2/1    16x64/4/1/1/16
mixed  fp16  64x32/4/2/1    32x32/4/2/1    32x32/4/2/1    16x16/4/2/1    16x64/4/1/1/16
mixed  fp32  s32x32/4/2/1   s16x32/4/2/1   s16x16/4/1/1   s8x16/4/1/1    16x64/4/1/1/16
dense  bf16  s32x64/4/2/1   s32x64/4/2/1   s32x32/4/2/1   s16x32/4/2/1   s8x64/4/1/1/16
dense  fp16  s32x32/4/2/1   s32x32/4/2/1   s16x32/4/2/1   s16x16/4/2/1   s8x64/4/1/1/16
dense  fp32  s32x32/4/2/1   s16x32/4/2/1   s16x16/4/1/1   s8x16/4/1/1    s8x64/4/1/1/16
"""),
}

# The same instructions as sm_80 with less shared memory: other tiles where sm_80's do not fit.
TABLE["sm_86"] = TABLE["sm_80"] | parse("""
search bf16  128x64/4/3/1   128x32/8/3/1   64x32/4/2/1    32x32/8/2/1    128x128/8/3/1/16
search fp32  64x32/4/2/2    32x32/4/2/1    32x16/8/2/1    16x16/8/1/1    64x64/4/2/2/32
single fp16  64x64/4/2/1    64x32/8/2/1    32x32/8/2/1    32x16/8/2/1    32x64/8/3/1/16
single fp32  64x32/4/2/1    32x32/4/2/1    32x16/8/2/1    16x16/8/1/1    16x64/8/2/1/16
mixed  bf16  64x64/4/3/1    128x32/8/2/1   64x32/8/2/1    s16x16/8/2/1   32x64/8/3/1/16
mixed  fp32  s32x32/4/2/1   s16x32/4/2/1   s16x16/8/2/1   s8x16/8/1/1    16x64/8/2/1/16
dense  fp16  s32x64/4/2/1   s32x32/8/2/1   s16x32/8/2/1   s16x16/8/2/1   s16x64/8/3/1/16
dense  fp32  s32x32/4/2/1   s16x32/4/2/1   s16x16/8/2/1   s8x16/8/1/1    s8x64/8/2/1/16
""")

# Serves Triton's interpreter, where time goes by the number of operations, not by their size.
INTERPRETER = Tile(32, 64, 4, 1, 1)


def find_tile(target: str, kind: str, precision: str, D: int, heavy: bool = False) -> Tile:
    """The tile of ``target`` for a kind of work and a precision (see plan.Work) and D <= 1024.

    ``heavy``: see plan.Work.
    """
    if target == "interpreter":
        return INTERPRETER
    table = TABLE[target]
    kinds = (f"heavy-{kind}", kind) if heavy else (kind,)
    precisions = dict.fromkeys((precision, precision.removeprefix("both-")))
    rows = (table.get((kind, x)) for x, kind in itertools.product(precisions, kinds))
    return next(row for row in rows if row)[sum(width < D for width in WIDTHS)]


# AMD's GPUs with 512 registers for each of 64 lanes. On gfx11 and gfx12, with fewer, gfx942's tiles
# spill by the thousand, and there are no others yet.
AMD_TARGETS = ("gfx90a", "gfx940", "gfx941", "gfx942", "gfx950")


def target_name(architecture: tuple[int, int] | str, shared_memory: int | None = None) -> str:
    """The table's target for a GPU: its own architecture's, or the nearest that fits.

    ``architecture`` is CUDA's compute capability or AMD's name ("gfx942:sramecc+:xnack-");
    ``shared_memory`` the bytes that a program can have, in which GPUs of one generation differ:
    8.6 and 8.9 have 99 KB, 8.0 has 163. Newer ones than are known here take sm_100's tiles, or what
    fits; those of AMD_TARGETS take gfx942's.
    """
    if isinstance(architecture, str):
        return "gfx942"
    own = {8: "sm_80", 9: "sm_90", 12: "sm_86"}.get(architecture[0], "sm_100")
    if shared_memory is None or shared_memory >= SHARED_MEMORY[own]:
        return own
    return "sm_80" if shared_memory >= SHARED_MEMORY["sm_80"] else "sm_86"
