"""The peers of the search for neighbours: who else returns the k nearest unit rows, exactly.

    torch          a matrix product and torch.topk, in blocks of rows
    faiss          IndexFlatIP
    scikit-learn   NearestNeighbors(algorithm="brute"), Euclidean, which unit rows rank as cosines

A peer is made of a bank and takes (vectors, k); it returns similarities (N, k) and indices (N, k).
Its index counts as set up: only the search is timed. faiss and scikit-learn bring OpenMP runtimes
of their own, so each peer runs in a process of its own (see memory.py).
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable

import torch
from torch import Tensor

# Peer -> the module that it needs.
MODULES = {"torch": "torch", "faiss": "faiss", "scikit-learn": "sklearn"}
PEERS = tuple(MODULES)

BLOCK_ELEMENTS = 1 << 23  # of a block of similarities: 32 MB in float32

Search = Callable[[Tensor, int], tuple[Tensor, Tensor]]


def absent(peer: str, device: str) -> str | None:
    """Why the peer cannot run here, or None."""
    if device != "cpu" and peer != "torch":
        return "not run: for CPUs"
    if importlib.util.find_spec(MODULES[peer]) is None:
        return f"not run: {MODULES[peer]} is not installed"
    return None


def make_search(peer: str, bank: Tensor) -> Search:
    return {"torch": _torch, "faiss": _faiss, "scikit-learn": _scikit_learn}[peer](bank)


def _torch(bank: Tensor) -> Search:
    def search(vectors, k):
        size = max(32, BLOCK_ELEMENTS // len(bank))
        blocks = [torch.topk(rows @ bank.T, k, dim=1) for rows in vectors.split(size)]
        return torch.cat([b.values for b in blocks]), torch.cat([b.indices for b in blocks])

    return search


def _faiss(bank: Tensor) -> Search:
    import faiss

    faiss.omp_set_num_threads(torch.get_num_threads())
    index = faiss.IndexFlatIP(bank.shape[1])
    index.add(bank.numpy())

    def search(vectors, k):
        similarities, indices = index.search(vectors.numpy(), k)
        return torch.from_numpy(similarities), torch.from_numpy(indices)

    return search


def _scikit_learn(bank: Tensor) -> Search:
    from sklearn.neighbors import NearestNeighbors

    index = NearestNeighbors(algorithm="brute", metric="euclidean", n_jobs=torch.get_num_threads())
    index.fit(bank.numpy())

    def search(vectors, k):
        distances, indices = index.kneighbors(vectors.numpy(), n_neighbors=k)
        return torch.from_numpy(1.0 - distances**2 / 2.0), torch.from_numpy(indices)

    return search
