"""Index arithmetic of the CUDA kernels: swizzle, chunks of columns, splits of the queue."""

from __future__ import annotations

import pytest
from cuda_host import load_host_module


@pytest.fixture(scope="module")
def host():
    return load_host_module()


@pytest.mark.parametrize("dim", [64, 128, 256])
def test_pieces_fill_a_tile_without_bank_conflicts(host, dim):
    pieces = dim // 8
    places = [host.piece_offset(dim, r, c) for r in range(64) for c in range(pieces)]
    assert sorted(places) == list(range(0, 64 * dim * 2, 16))
    # ldmatrix reads one piece of eight rows at a time, from rows 0, 8, ..: all 32 banks.
    for first in range(0, 64, 8):
        for piece in range(pieces):
            lines = [host.piece_offset(dim, first + r, piece) // 16 % 8 for r in range(8)]
            assert sorted(lines) == list(range(8))


@pytest.mark.parametrize("dim", [64, 128, 256])
def test_pieces_from_the_first_one(host, dim):
    for tile in (0, 128, 5 * 128):
        for row in range(64):
            for first in (0, 1):
                address = tile + host.piece_offset(dim, row, first)
                for distance in range(0, dim // 8, 2):
                    want = tile + host.piece_offset(dim, row, first + distance)
                    assert host.piece_after(address, distance) == want


@pytest.mark.parametrize("chunk_shift", [0, 1, 2, 4])
def test_chunks_partition_the_columns(host, chunk_shift):
    steps = 32
    columns = 8 << chunk_shift
    chunks = 4 * steps >> chunk_shift
    seen = []
    for chunk in range(chunks):
        own = [host.chunk_column(chunk, i, chunk_shift) for i in range(columns)]
        assert own == sorted(own)
        seen += own
        # A chunk's columns are those that one thread holds: lane % 4 names it in every step.
        for column in own:
            lane = column % 8 // 2
            assert host.chunk_of(column // 32, lane, chunk_shift) == chunk
    assert sorted(seen) == list(range(32 * steps))


@pytest.mark.parametrize("multiprocessors", [1, 108, 132])
@pytest.mark.parametrize("num_neighbors", [0, 1, 10, 64, 1024])
@pytest.mark.parametrize("queue_size", [1, 63, 64, 65, 4096, 65536, 100000, 1 << 20, 1 << 30])
def test_splits_cover_the_queue(host, queue_size, num_neighbors, multiprocessors):
    for dim in (64, 128, 256):
        for num_rows in (1, 256, 4096):
            splits, tiles_per_split, chunk_shift, chunks, filled = host.plan(
                num_rows, queue_size, dim, True, 2, num_neighbors, multiprocessors
            )
            tile = 32 if dim == 256 else 64
            tiles = -(-queue_size // tile)
            assert (splits - 1) * tiles_per_split < tiles <= splits * tiles_per_split
            assert splits <= 64
            if num_neighbors == 0:
                assert chunks == 0
                continue
            assert chunks == 4 * -(-tiles * (tile // 32) >> chunk_shift) <= 8192 + 64
            # The filled ones come first, and no others hold a column.
            first = [host.chunk_column(chunk, 0, chunk_shift) for chunk in range(chunks)]
            assert [column < queue_size for column in first].index(True) == 0
            assert sum(column < queue_size for column in first) == filled
            # No chunk belongs to two splits.
            assert splits == 1 or tiles_per_split * (tile // 32) % (1 << chunk_shift) == 0


def test_splits_fill_a_gpu_of_few_rows(host):
    """N=256 on 132 multiprocessors: four row blocks, and splits that occupy most of the slots."""
    splits, *_ = host.plan(256, 65536, 128, True, 2, 5, 132)
    assert 4 * splits >= 132


def test_splits_are_for_the_blocks_that_shared_memory_allows(host):
    """One block of 80 KB (D = 128) on a multiprocessor of 100 KB, two on one of 164 KB."""
    small, large = (
        host.plan(4096, 65536, 128, True, 1, 0, 108, shared_bytes=kilobytes << 10)
        for kilobytes in (100, 164)
    )
    rows = 4096 // 64
    waves = [-(-rows * splits[0] // slots) for splits, slots in ((small, 108), (large, 216))]
    # A last wave that is nearly full, of as many blocks as there are slots.
    for splits, slots, count in zip((small, large), (108, 216), waves, strict=True):
        assert rows * splits[0] > 0.85 * slots * count
    assert small[0] != large[0]
