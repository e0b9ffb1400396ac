"""The memory queue: the last K keys of the teacher, kept as unit rows in a ring."""

from __future__ import annotations

import warnings

import torch
from torch import nn

from softcl.nn.enqueue import enqueue

STORAGE_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class MemoryQueue(nn.Module):
    """First-in first-out store of K unit rows of dimension D, the negatives of a contrastive loss.

    ``rows`` is a (K, D) buffer written as a ring: the next key goes to row ``pointer``, which then
    moves on by one and wraps at K. A batch may have any number N >= 0 of keys, larger than K too;
    the result is that of enqueuing its keys one by one. ``rows`` is never copied or replaced by
    ``enqueue``: hand it to the operator as it is, and enqueue after the loss.

    Both initial states hold the same random unit rows (Gaussian rows, normalised), drawn on the CPU
    from ``seed`` alone, so they do not depend on the device.

    ``filled`` is the number of rows that may take part in a loss; these are ``rows[:filled]``.
        init="random"   filled == K from the start. The random rows count as keys until they are
                        overwritten, as in MoCo and ASCL.
        init="empty"    filled == 0 at first, and min(K, keys enqueued so far) later.
    A refused key uses its slot up, so it counts in ``filled`` as well; its slot holds a unit row
    (an older key or a random row) either way.

    Refused keys. A key with a NaN or an infinity, or with a norm below 1e-12, has no direction. It
    is not written: its slot keeps the row it held, ``refused`` counts it, and one warning is given
    per queue. On the CPU the warning comes at once; on other devices looking at once would make the
    host wait, so it comes when ``refused`` is next read (saving the state reads it).

    Args:
        size: K >= 1, number of rows.
        dim: D >= 1, dimension of a key.
        dtype: storage type, torch.float32, torch.bfloat16 or torch.float16. Keys are normalised in
            float64, then rounded to fp32 and to the storage type.
        init: "random" or "empty", see above.
        seed: seed of the initial rows.
        device: where ``rows`` lives; ``module.to()`` moves it later.

    The state_dict holds ``rows`` and an extra state, the CPU int64 tensor [pointer, filled,
    refused]. Loading a queue of another shape, or one with non-finite rows, is an error and changes
    nothing.

    Raises:
        ValueError, TypeError: an argument is out of its range; the message names it and its value.
    """

    rows: torch.Tensor  # (K, D)
    refused_rows: torch.Tensor  # () int64; a tensor, so that counting needs no synchronisation

    def __init__(
        self,
        size: int,
        dim: int,
        *,
        dtype: torch.dtype = torch.float32,
        init: str = "random",
        seed: int = 0,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        for name, value in (("size", size), ("dim", dim), ("seed", seed)):
            if isinstance(value, bool) or not isinstance(value, int):
                raise TypeError(f"{name} must be an int, got {value!r}")
        for name, value in (("size", size), ("dim", dim)):
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        if dtype not in STORAGE_DTYPES:
            raise ValueError(f"dtype must be float32, bfloat16 or float16, got {dtype}")
        if init not in ("random", "empty"):
            raise ValueError(f'init must be "random" or "empty", got {init!r}')
        generator = torch.Generator().manual_seed(seed)
        rows = torch.randn(size, dim, generator=generator)
        rows /= rows.norm(dim=1, keepdim=True)
        self.register_buffer("rows", rows.to(device=device, dtype=dtype))
        counter = torch.zeros((), dtype=torch.int64, device=self.rows.device)
        self.register_buffer("refused_rows", counter, persistent=False)
        self.pointer = 0
        self.filled = size if init == "random" else 0
        self._warned = False

    @property
    def size(self) -> int:
        """K, the number of rows."""
        return self.rows.shape[0]

    @property
    def dim(self) -> int:
        """D, the dimension of a key."""
        return self.rows.shape[1]

    @property
    def refused(self) -> int:
        """Number of keys refused so far. On a CUDA device reading it waits for the device."""
        return self._count_refused()

    def _count_refused(self) -> int:
        count = int(self.refused_rows)
        if count and not self._warned:
            self._warned = True
            warnings.warn(
                f"MemoryQueue refused {count} key(s) that are not finite or are zero; "
                "the slots keep the rows they held (counted in .refused, warned once)",
                RuntimeWarning,
                stacklevel=3,
            )
        return count

    def extra_repr(self) -> str:
        return f"size={self.size}, dim={self.dim}, dtype={self.rows.dtype}, filled={self.filled}"

    def enqueue(self, keys: torch.Tensor, normalize: bool = True) -> None:
        """Write keys (N, D) over the N oldest rows.

        With ``normalize`` each key is divided by its norm first; without it the keys must already
        be unit rows and are stored as they are. No gradient is recorded, and on a CUDA device the
        host does not wait.

        Raises:
            TypeError: keys is no floating-point tensor.
            ValueError: keys is not (N, D) or lies on another device than the queue.
        """
        self._check(keys)
        count = keys.shape[0]
        with torch.no_grad():
            enqueue(keys.detach(), self.rows, self.refused_rows, self.pointer, normalize)
        self.pointer = (self.pointer + count) % self.size
        self.filled = min(self.size, self.filled + count)
        if self.rows.device.type == "cpu":
            self._count_refused()

    def _check(self, keys: torch.Tensor) -> None:
        if not isinstance(keys, torch.Tensor):
            raise TypeError(f"keys must be a tensor, got {type(keys).__name__}")
        if not keys.is_floating_point():
            raise TypeError(f"keys must be floating-point, got {keys.dtype}")
        if keys.ndim != 2 or keys.shape[1] != self.dim:
            raise ValueError(f"keys must have shape (N, {self.dim}), got {tuple(keys.shape)}")
        if keys.device != self.rows.device:
            raise ValueError(f"keys are on {keys.device}, the queue is on {self.rows.device}")

    def get_extra_state(self) -> torch.Tensor:
        return torch.tensor([self.pointer, self.filled, self.refused], dtype=torch.int64)

    def set_extra_state(self, state: torch.Tensor) -> None:
        self.pointer, self.filled, refused = (int(value) for value in state)
        self.refused_rows.fill_(refused)
        self._warned = refused > 0  # the run that refused them was told

    def _load_from_state_dict(
        self, state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
    ) -> None:
        """Load rows and counters together, or neither: a half-loaded queue would go unnoticed."""
        reason = self._refuse_state(
            state_dict.get(prefix + "rows"), state_dict.get(prefix + "_extra_state")
        )
        if reason is not None:
            error_msgs.append(f"{prefix.rstrip('.') or 'MemoryQueue'}: {reason}")
            return
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )

    def _refuse_state(self, rows: torch.Tensor | None, state: torch.Tensor | None) -> str | None:
        """Why this saved state cannot be loaded, or None; missing entries are not checked here."""
        if rows is not None:
            if rows.shape != self.rows.shape:
                saved, here = tuple(rows.shape), tuple(self.rows.shape)
                return f"the saved queue has shape (size, dim) = {saved}, this one {here}"
            if not rows.isfinite().all():
                return "the saved queue has non-finite rows"
        if state is not None:
            if not isinstance(state, torch.Tensor) or state.shape != (3,):
                return f"the saved queue state must be [pointer, filled, refused], got {state!r}"
            pointer, filled, refused = state.tolist()
            if not (0 <= pointer < self.size and 0 <= filled <= self.size and refused >= 0):
                return f"the saved [pointer, filled, refused] = {state.tolist()} is out of range"
        return None
