"""Index arithmetic of the Hopper kernel: swizzled boxes, matrix descriptors, accumulators, shapes.

The expected values are written from the PTX ISA ("Asynchronous Warpgroup Level Matrix Shared Memory
Layout", "Matrix Descriptor Format", "Matrix Fragments for wgmma.mma_async.m64nNk16").
"""

from __future__ import annotations

import pytest
from cuda_host import load_host_module

TILE = 5 * 1024  # where a tile begins, in these tests


@pytest.fixture(scope="module")
def host():
    return load_host_module()


def swizzled(address):
    """128-byte swizzle: the 16-byte piece of a 128-byte line, exclusive or the line modulo 8."""
    line, piece, byte = address // 128, address // 16 % 8, address % 16
    return line * 128 + (piece ^ line % 8) * 16 + byte


def decode(descriptor):
    """Start address, leading and stride byte offset."""
    assert descriptor >> 62 == 1  # 128-byte swizzle
    assert descriptor >> 49 & 7 == 0  # the pattern begins at multiples of 1024
    return tuple((descriptor >> shift & 0x3FFF) * 16 for shift in (0, 16, 32))


@pytest.mark.parametrize("rows", [64, 128])
@pytest.mark.parametrize("columns", [64, 256])
def test_boxes_fill_a_tile(host, rows, columns):
    places = {}
    for row in range(rows):
        for column in range(columns):
            places[host.box_offset(rows, row, column)] = (row, column)
    assert sorted(places) == list(range(0, rows * columns * 2, 2))
    # As one copy of 64 columns leaves it.
    for row in range(rows):
        for column in (0, 9, 63):
            assert host.box_offset(rows, row, column) == swizzled(row * 128 + column * 2)
            box = host.box_offset(rows, row, columns - 64 + column)
            assert box == (columns // 64 - 1) * rows * 128 + swizzled(row * 128 + column * 2)


@pytest.mark.parametrize("rows", [64, 128])
def test_descriptors_name_the_elements(host, rows):
    """Address by address what the hardware reads, against where the element lies."""
    for k in range(16):  # D = 256
        start, _, stride = decode(host.row_descriptor(TILE, rows, k))
        for n in range(rows):
            for j in (0, 1, 7, 8, 15):
                # ((8,m),(T,2k)):((8T,SBO),(1,T)), K-major
                address = swizzled(start + n // 8 * stride + n % 8 * 128 + j * 2)
                assert address - TILE == host.box_offset(rows, n, 16 * k + j)
    for k in range(rows // 16):
        start, leading, stride = decode(host.column_descriptor(TILE, rows, k))
        for d in range(0, 256, 3):
            for j in range(16):
                # ((T,8,m),(8,k)):((1,T,LBO),(8T,SBO)), MN-major
                address = swizzled(
                    start + d // 64 * leading + d % 64 * 2 + j // 8 * stride + j % 8 * 128
                )
                assert address - TILE == host.box_offset(rows, 16 * k + j, d)


def test_accumulators_are_fragments(host):
    """Two neighbouring eights of an accumulator's columns are one first operand (64, 16), in the
    order in which the kernel packs them: register i holds elements 2 (i % 2), + 1 of eight i // 2.
    """
    seen = set()
    for lane in range(32):
        group, thread = lane // 4, lane % 4
        for register in range(4):
            for half in range(2):
                # Of A, with a[0..7] in four registers: rows g, g + 8, columns 2t, 2t + 1, + 8.
                a = 2 * register + half
                row = group + (8 if a // 2 % 2 else 0)
                column = 2 * thread + a % 2 + (8 if a >= 4 else 0)
                eight, element = register // 2, register % 2 * 2 + half
                assert row == host.accumulator_row(lane, element)
                assert column == 8 * eight + host.accumulator_column(lane, element)
                seen.add((row, column))
    assert len(seen) == 16 * 16


def test_lanes_take_a_tile_apart_without_bank_conflicts(host):
    """Two passes of a warp cover eight lines of 64 columns; every access of eight neighbouring
    lanes, 16 bytes each, to fp32 or to parts, fills all 32 banks."""
    where = {
        (lane, half): (host.split_line(lane, half), host.split_piece(lane))
        for lane in range(32)
        for half in range(2)
    }
    assert sorted(where.values()) == [(line, piece) for line in range(8) for piece in range(8)]
    for half in range(2):
        # One pass reads and writes the same lines, so that none waits for another warp's reads.
        assert len({where[lane, half][0] for lane in range(32)}) == 4
        for first in range(0, 32, 8):
            lanes = [where[lane, half] for lane in range(first, first + 8)]
            written = {swizzled(line * 128 + piece * 16) // 16 % 8 for line, piece in lanes}
            read = {swizzled(line * 128 + piece % 4 * 32) // 16 % 8 for line, piece in lanes}
            assert written == read == set(range(8))
            assert len({piece // 4 for _, piece in lanes}) == 1  # all from one half of the columns
    for line in (0, 5, 63):
        for byte in (0, 16, 127):
            assert host.line_offset(line, byte) == swizzled(line * 128 + byte)


@pytest.mark.parametrize("parts", [1, 2])
@pytest.mark.parametrize("dim", [64, 128, 256])
@pytest.mark.parametrize(("paired", "mean_rows"), [(0, 0), (0, 1), (1, 0), (1, 1), (1, 2)])
def test_shapes_fit(host, dim, paired, mean_rows, parts):
    if parts == 2 and dim == 256:
        pytest.skip("not on this kernel")
    kernel_type = 0 if parts == 2 else 1
    rows, tile_rows, shared_bytes = host.hopper_shape(dim, bool(paired), mean_rows, kernel_type)
    assert rows == (64 if paired and mean_rows > 0 else 128)
    assert tile_rows in (64, 128) and shared_bytes <= 227 << 10
    # The accumulators of products and means, two parts of weights, of 240 registers.
    means = dim // 2 if mean_rows > 0 else 0
    if parts == 2:  # of 232; beside the means two sums of products, then weights and a sum of means
        both = 2 if paired and mean_rows == 0 else 1
        assert means + tile_rows // 2 * both * (1 + (dim > 64)) <= 192
        assert means + means + (tile_rows // 2 if mean_rows > 0 else 0) <= 192
        return
    assert means + tile_rows // 2 * (2 if mean_rows > 0 else 1 + paired) <= 192


@pytest.mark.parametrize("queue_size", [1, 129, 65536, 1 << 20, 64 << 17])
def test_splits_cover_the_queue(host, queue_size):
    for dim in (64, 256):
        for num_neighbors in (0, 5, 1024):
            for mean_rows in (0, 2):
                tile = host.hopper_shape(dim, True, mean_rows)[1]
                splits, tiles_per_split, chunk_shift, chunks, _ = host.plan(
                    4096, queue_size, dim, True, mean_rows, num_neighbors, 132, hopper=True
                )
                tiles = -(-queue_size // tile)
                assert (splits - 1) * tiles_per_split < tiles <= splits * tiles_per_split
                # No chunk belongs to two splits.
                if num_neighbors > 0 and splits > 1:
                    assert tiles_per_split * (tile // 32) % (1 << chunk_shift) == 0
                if mean_rows > 0 and num_neighbors == 0:
                    assert tiles_per_split * tile <= max(1 << 14, queue_size // 64) + tile
