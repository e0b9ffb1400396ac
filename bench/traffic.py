"""How many bytes a step moves: formulas, which tests hold against the bytes that were counted.

Given for one of W processes, as payload received from the others; every process sends as much. n
query rows, as many keys, and D dimensions; b bytes per entry of a vector (4, or 2 for bfloat16), f
per entry of a sum (4; 8 for float64); k nearest rows that the label rule reads, w that it weighs.

    loss over a sharded queue, forward:
        (W - 1) [ 2 n D b                         queries and keys to every part
                  + n (1 + D) f                   lse and mean of the student's softmax
                  + 8 n                           the rank of the positive, for diagnostics
                  + n (2 f + k (f + 8))           lse, entropy; nearest logits and rows
                  + n D f                         mean of the teacher's softmax
                  + n (w (8 + f) + D f)           weights to where the rows are, their sum back
                  + 8 n ]                         places of excluded rows
        each line where the rule and the arguments need it
    backward: nothing
    keys into a sharded queue:                    at most n D b; none where the key is at home
    keys into a replicated queue:                 (W - 1) n D b
    gradients of P parameters in float32, ring:   8 P (W - 1) / W

A replicated loss moves nothing. Per process a sharded queue keeps ceil(K / W) rows and works
4 (W n) (K / W) D flop per softmax, as much as n rows against a whole queue do; its buffers are the
W parts above, sent and received.
"""

from __future__ import annotations

from softcl.labels import LabelRule


def sharded_loss(
    rule: LabelRule,
    processes: int,
    queries: int,
    dim: int,
    *,
    vector_bytes: int = 4,
    sum_bytes: int = 4,
    gradient: bool = True,
    diagnostics: bool = True,
) -> int:
    """Bytes that one forward pass of the loss receives in one process."""
    n, k, f, weighted = queries, rule.num_neighbors, sum_bytes, rule.num_weighted
    total = 2 * n * dim * vector_bytes
    total += n * (1 + gradient * dim) * f + diagnostics * 8 * n
    if rule.needs_softmax:
        total += 2 * n * f
    if rule.needs_mean:
        total += n * dim * f
    total += n * k * (f + 8)
    if weighted > 0:
        total += n * (weighted * (8 + f) + dim * f)
    return (processes - 1) * total


def sharded_enqueue(processes: int, keys: int, dim: int, *, key_bytes: int = 4) -> int:
    """Most bytes that keys into a sharded queue bring to one process."""
    return keys * dim * key_bytes if processes > 1 else 0


def replicated_enqueue(processes: int, keys: int, dim: int, *, key_bytes: int = 4) -> int:
    """Bytes that keys into a replicated queue bring to one process."""
    return (processes - 1) * keys * dim * key_bytes


def gradients(processes: int, parameters: int) -> int:
    """Bytes of a ring all-reduce of float32 gradients, in one process."""
    return 8 * parameters * (processes - 1) // processes
