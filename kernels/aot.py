"""Ahead-of-time compilation of the streaming kernel and the views', for any architecture.

What the machine code shows is what decides whether a tile is worth timing: registers, spills and
shared memory, tensor-core instructions, and values that change threads inside the loop.
"""

from __future__ import annotations

import math
import os
import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from . import plan, stream, views
from .launch import as_constants, compile_options
from .tiles import Tile

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_86": GPUTarget("cuda", 86, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
POINTERS = {torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.float16: "*fp16"}

# The matrix instructions of each architecture, in PTX or in AMD's assembly: its own, and what it
# falls back to for tiles of few rows.
TENSOR_CORES = {
    "sm_80": (r"\bmma\.sync",),
    "sm_86": (r"\bmma\.sync",),
    "sm_90": (r"\bwgmma\.mma_async", r"\bmma\.sync"),
    "sm_100": (r"\btcgen05\.mma\b", r"\bmma\.sync"),
    "gfx942": (r"\bv_mfma_",),
}


@dataclass(frozen=True)
class Compiled:
    """One compilation of the streaming kernel.

    Attributes:
        plan: what it was compiled for.
        registers: per thread.
        spilled: bytes of registers per thread (AMD: registers) that went to local memory.
        shared_memory: bytes per program.
        tensor_memory: columns per program, on architectures that have it.
        tensor_products: matrix instructions in the code.
        native: they are the architecture's own.
        conversions: tiles that pass through shared memory inside the loop after they were loaded:
            operands made there, and changes of layout other than to a left operand from registers.
        loop: machine code of the loop over the tiles; not for AMD.
    """

    plan: plan.Plan
    registers: int
    spilled: int
    shared_memory: int
    tensor_memory: int
    tensor_products: int
    native: bool
    conversions: int
    loop: list[str]

    @property
    def loop_stores(self) -> int:
        """Stores to shared memory in the loop."""
        return self.count(r"^(?!@!PT)(.* )?STS\b")

    def count(self, pattern: str) -> int:
        """Instructions of the loop that have the pattern."""
        return sum(bool(re.search(pattern, x)) for x in self.loop)

    @property
    def wgmma_products(self) -> float:
        """Products of a tile as large as (rows, D) by (D, BLOCK_K), of the loop's wgmma."""
        shapes = re.findall(r"\bHGMMA\.(\d+)x(\d+)x(\d+)", "\n".join(self.loop))
        c = self.plan.config
        rows = c.BLOCK_N * (2 if c.LAYOUT == stream.STACKED.value else 1)
        made = sum(math.prod(map(int, shape)) for shape in shapes) * self.plan.num_warps // 4
        return made / (rows * c.BLOCK_K * c.D)


def compile_stream(
    work: plan.Work, target: str, tile: Tile | None = None, *, num_multiprocessors: int = 132
) -> Compiled:
    """Compile the streaming kernel as a call ``work`` on ``target`` would, and read the result."""
    how = plan.make_plan(work, target, num_multiprocessors, tile)
    kernel = triton.compile(
        source(work, how.config),
        target=TARGETS[target],
        options=compile_options(how.num_warps, how.config.NUM_STAGES, how.max_registers),
    )
    if "amdgcn" in kernel.asm:
        code = kernel.asm["amdgcn"]
        registers, spilled = (
            int(re.search(rf"\.vgpr_{name}:\s+(\d+)", code)[1]) for name in ("count", "spill_count")
        )
        loop: list[str] = []
    else:
        code = kernel.asm["ptx"]
        registers, spilled, loop = read_cubin(kernel.asm["cubin"])
    products = [len(re.findall(instruction, code)) for instruction in TENSOR_CORES[target]]
    return Compiled(
        plan=how,
        registers=registers,
        spilled=spilled,
        shared_memory=kernel.metadata.shared,
        tensor_memory=getattr(kernel.metadata, "tmem_size", None) or 0,
        tensor_products=max(products),
        native=products[0] > 0,
        conversions=count_conversions(loop_of(kernel.asm["ttgir"]), tile_size(how)),
        loop=loop,
    )


def ptxas_says(work: plan.Work, target: str) -> str:
    """What NVIDIA's assembler tells of the streaming kernel: registers, spills, and warnings such
    as C7515, of products that it has made wait for each other."""
    how = plan.make_plan(work, target, 132)
    kernel = triton.compile(
        source(work, how.config),
        target=TARGETS[target],
        options=compile_options(how.num_warps, how.config.NUM_STAGES, how.max_registers),
    )
    with tempfile.TemporaryDirectory() as folder:
        ptx = Path(folder, "kernel.ptx")
        ptx.write_text(kernel.asm["ptx"])
        command = [triton.knobs.nvidia.ptxas.path, "-v", "-arch=sm_90a", ptx, "-o", "/dev/null"]
        return subprocess.run(command, capture_output=True, text=True, check=True).stderr


def source(work: plan.Work, config: stream.Config) -> ASTSource:
    """The kernel with the types that a call gives it; tensors are aligned to 16 bytes."""
    rows, fp32 = POINTERS[work.row_dtype], "*fp32"
    types = {
        "first_ptr": rows,
        "second_ptr": rows,
        "queue_ptr": POINTERS[work.queue_dtype],
        "excluded_ptr": "*i64",
        "unit_ptr": rows,
        "parts_ptr": "*bf16",
        "sums_ptr": fp32,
        "means_ptr": fp32,
        "maxima_ptr": fp32,
        "ranks_ptr": "*i32",
        "N": "i32",
        "K": "i32",
        "first_scale": "fp32",
        "second_scale": "fp32",
        "tiles_per_split": "i32",
        "chunk_quads": "i32",
        "C": "constexpr",
    }
    pointers = [i for i, kind in enumerate(types.values()) if kind.startswith("*")]
    aligned = {(i,): [["tt.divisibility", 16]] for i in pointers}
    return ASTSource(stream.stream_kernel, types, {"C": as_constants(config)}, aligned)


def compile_view(target: str, side: int, size: int, colors: bool) -> tuple[int, int]:
    """Compile the kernel of the views, images `side` px wide to `size`: registers, bytes spilled.

    On NVIDIA's architectures.
    """
    types = {
        "images_ptr": "*u8",
        "table_ptr": "*fp32",
        "constants_ptr": "*fp32",
        "view_ptr": "*fp32",
        "H": "i32",
        "W": "i32",
    }
    names = ("COLORS", "SIZE", "TAPS", "BLOCK")
    values = views.constants_for(side, side, size, colors)
    types |= dict.fromkeys(names, "constexpr")
    aligned = {(i,): [["tt.divisibility", 16]] for i in range(4)}
    made = ASTSource(views.view_kernel, types, dict(zip(names, values, strict=True)), aligned)
    options = {"num_warps": views.warps_for(values[-1])}
    kernel = triton.compile(made, target=TARGETS[target], options=options)
    registers, spilled, _ = read_cubin(kernel.asm["cubin"])
    return registers, spilled


def loop_of(ttgir: str) -> str:
    """The loop over the tiles in Triton's IR: the one that multiplies."""
    lines = ttgir.splitlines()
    loops = []
    for start, line in enumerate(lines):
        if " scf.for " in line:
            closing = line[: len(line) - len(line.lstrip())] + "}"
            end = next(i for i in range(start, len(lines)) if lines[i].startswith(closing))
            loops.append("\n".join(lines[start:end]))
    return next(loop for loop in loops if re.search(r"dot|mma", loop.split("\n", 1)[1]))


def tile_size(how: plan.Plan) -> int:
    """Numbers in a tile of cosines, or a piece of the queue's: what is smaller belongs to a row."""
    rows = 2 if how.config.LAYOUT == stream.STACKED.value else 1
    return how.config.BLOCK_K * min(rows * how.config.BLOCK_N, how.config.PIECE)


def count_conversions(loop: str, smallest: int) -> int:
    made = re.findall(r"ttg\.local_alloc %.*?\(tensor<([\dx]+)x\w+, ", loop)
    moved = re.findall(r"ttg\.convert_layout .*-> tensor<([\dx]+)x\w+, #(?!ttg\.dot_op)", loop)
    return sum(math.prod(map(int, shape.split("x"))) >= smallest for shape in made + moved)


def read_cubin(cubin: bytes) -> tuple[int, int, list[str]]:
    """Registers, bytes of stack, and the machine code of the loop that multiplies."""
    usage, assembly = (cuobjdump(cubin, flag) for flag in ("-res-usage", "-sass"))
    registers, stack = map(int, re.search(r"REG:(\d+) STACK:(\d+)", usage).groups())
    listing = re.findall(r"^\s+/\*([0-9a-f]+)\*/\s+(.*?);", assembly, re.MULTILINE)
    code = {int(address, 16): instruction for address, instruction in listing}
    loop: list[str] = []
    for end, instruction in code.items():
        jump = re.search(r"\bBRA\b.*?0x([0-9a-f]+)", instruction)
        if not jump:
            continue
        inside = [x for address, x in code.items() if int(jump[1], 16) <= address <= end]
        if len(inside) > len(loop) and any(re.search(r"\b(H|HG|UTC\w*)MMA\b", x) for x in inside):
            loop = inside
    return registers, stack, loop


def cuobjdump(cubin: bytes, flag: str) -> str:
    """The output of Triton's own copy of the CUDA tool."""
    import triton.backends.nvidia as nvidia

    tool = os.path.join(os.path.dirname(nvidia.__file__), "bin", "cuobjdump")
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        return subprocess.run(
            [tool, flag, file.name], capture_output=True, text=True, check=True
        ).stdout
