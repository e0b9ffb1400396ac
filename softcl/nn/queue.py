"""The memory queue: the last K keys of the teacher, kept as unit rows in a ring."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import torch

from softcl.nn import enqueue  # noqa: F401  (defines torch.ops.softcl.enqueue)
from softcl.nn.arguments import as_int

STORAGE_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class Ring(torch.nn.Module):
    """Base of the queues: ``pointer`` in [0, size) and ``filled`` in [0, size].

    torch.compile takes an int that a module holds for a constant and compiles anew whenever it has
    changed. So the pointer is a tensor, which ``softcl::enqueue`` reads and moves unseen, and the
    fill count is the length of a tensor without elements: a length may vary from call to call, and
    ``rows[:filled]`` then has it too. Both stay on the CPU, wherever the rows are.
    """

    size: int
    _pointer: torch.Tensor  # () int64
    _fill: torch.Tensor  # (filled, 0)

    def __init__(self) -> None:
        super().__init__()
        self._pointer = torch.zeros((), dtype=torch.int64, device="cpu")
        self._set_filled(0)

    @property
    def pointer(self) -> int:
        """The row that the next key goes to."""
        return int(self._pointer)

    @pointer.setter
    def pointer(self, value: int) -> None:
        value = as_int("pointer", value, least=0)
        if value >= self.size:
            raise ValueError(f"pointer must be below the queue's size {self.size}, got {value}")
        self._pointer.fill_(value)

    @property
    def filled(self) -> int:
        """Number of rows that may take part in a loss."""
        return self._fill.shape[0]

    @filled.setter
    def filled(self, value: int) -> None:
        value = as_int("filled", value, least=0)
        if value > self.size:
            raise ValueError(f"filled must be at most the queue's size {self.size}, got {value}")
        self._set_filled(value)

    def _set_filled(self, value: int) -> None:
        self._fill = torch.empty((value, 0), device="cpu")


class MemoryQueue(Ring):
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
    host wait, so it comes when ``refused`` is next read (saving the state reads it); so it does
    inside torch.compile.

    A compiled step may call ``enqueue`` (fullgraph=True too) and read ``filled``: it is compiled
    two or three times while the queue fills, not once per step. A CUDA graph cannot hold it.

    A queue made on the meta device has no rows. ``to_empty(device=...)`` draws them, and so does
    ``reset_parameters``, which starts any queue afresh; ``load_state_dict(state, assign=True)``
    takes over those of the state.

    Args:
        size: K >= 1, number of rows.
        dim: D >= 1, dimension of a key.
        dtype: storage type, torch.float32, torch.bfloat16 or torch.float16. Keys are normalised in
            float64, then rounded to fp32 and to the storage type.
        init: "random" or "empty", see above.
        seed: seed of the initial rows.
        device: where ``rows`` lives; ``module.to()`` moves it later, to another storage type too.
            Of other types float64 alone is taken, to compare with.

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
        size, dim = as_int("size", size, least=1), as_int("dim", dim, least=1)
        if dtype not in STORAGE_DTYPES:
            raise ValueError(f"dtype must be float32, bfloat16 or float16, got {dtype}")
        if init not in ("random", "empty"):
            raise ValueError(f'init must be "random" or "empty", got {init!r}')
        try:
            device = None if device is None else torch.device(device)
        except (RuntimeError, TypeError) as error:
            raise ValueError(f"device must be a device of PyTorch, got {device!r}") from error
        self._seed = as_seed(seed)
        self._starts_full = init == "random"
        self.register_buffer("rows", torch.empty(size, dim, dtype=dtype, device=device))
        counter = torch.zeros((), dtype=torch.int64, device=self.rows.device)
        self.register_buffer("refused_rows", counter, persistent=False)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Start afresh: the initial rows, drawn from the seed, and no key enqueued.

        On the meta device there is nothing to draw.
        """
        if not self.rows.is_meta:
            generator = torch.Generator().manual_seed(self._seed)
            rows = torch.randn(
                self.size, self.dim, generator=generator, dtype=torch.float32, device="cpu"
            )
            rows /= rows.norm(dim=1, keepdim=True)
            with torch.no_grad():
                self.rows.copy_(rows)
        self.refused_rows.zero_()
        self.pointer = 0
        self.filled = self.size if self._starts_full else 0
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
        count = 0 if self.rows.is_meta else int(self.refused_rows)
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
            TypeError: keys is no floating-point tensor, or normalize no bool.
            ValueError: keys is not (N, D) or lies on another device than the queue.
            RuntimeError: a CUDA graph is being captured, or the queue is on the meta device.
        """
        self._check(keys, normalize)
        with torch.no_grad():
            torch.ops.softcl.enqueue.default(
                keys.detach(), self.rows, self.refused_rows, self._pointer, normalize
            )
        compiling = torch.compiler.is_compiling()
        # One branch while compiling: a second one would be compiled once the queue is full.
        if compiling or self.filled < self.size:
            self._set_filled(min(self.size, self.filled + keys.shape[0]))
        if not compiling and self.rows.device.type == "cpu":
            self._count_refused()

    def _check(self, keys: torch.Tensor, normalize: bool) -> None:
        if not isinstance(keys, torch.Tensor):
            raise TypeError(f"keys must be a tensor, got {type(keys).__name__}")
        if not keys.is_floating_point():
            raise TypeError(f"keys must be floating-point, got {keys.dtype}")
        if keys.ndim != 2 or keys.shape[1] != self.dim:
            raise ValueError(f"keys must have shape (N, {self.dim}), got {tuple(keys.shape)}")
        if keys.device != self.rows.device:
            raise ValueError(f"keys are on {keys.device}, the queue is on {self.rows.device}")
        if self.rows.is_meta:
            raise RuntimeError(
                "MemoryQueue.enqueue: the queue is on the meta device and has no rows; "
                "to_empty(device=...) gives it some"
            )
        if not isinstance(normalize, bool):
            raise TypeError(f"normalize must be True or False, got {normalize!r}")

    def _apply(
        self, function: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True
    ) -> MemoryQueue:
        """What every ``module.to()`` and its like come down to."""
        before = dict(self._buffers)
        super()._apply(function, recurse)
        if self.rows.dtype not in (*STORAGE_DTYPES, torch.float64):
            dtype = self.rows.dtype
            self._buffers.update(before)
            raise TypeError(
                f"dtype of a MemoryQueue must be float32, bfloat16 or float16, got {dtype}"
            )
        if self.refused_rows.dtype != torch.int64:  # module.type() converts every buffer
            self.refused_rows = before["refused_rows"].to(self.rows.device)
        if before["rows"].is_meta and not self.rows.is_meta:  # to_empty(): memory as it was found
            self.reset_parameters()
        return self

    def get_extra_state(self) -> torch.Tensor:
        state = [self.pointer, self.filled, self.refused]
        return torch.tensor(state, dtype=torch.int64, device="cpu")  # whatever torch.device() says

    def set_extra_state(self, state: torch.Tensor) -> None:
        self.pointer, self.filled, refused = state.tolist()
        self._set_refused(refused)

    def _set_refused(self, count: int) -> None:
        """Of a loaded queue."""
        if self.refused_rows.device != self.rows.device:  # the rows are those of the state
            self.refused_rows = torch.zeros_like(self.refused_rows, device=self.rows.device)
        self.refused_rows.fill_(count)
        self._warned = count > 0  # the run that refused them was told

    def _load_from_state_dict(
        self, state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
    ) -> None:
        """Load rows and counters together, or neither: a half-loaded queue would go unnoticed."""
        names = [prefix + "rows", prefix + "_extra_state"]
        if not all(name in state_dict for name in names):
            missing_keys.extend(name for name in names if name not in state_dict)
            return
        rows, state = (state_dict[name] for name in names)
        assign = local_metadata.get("assign_to_params_buffers", False)
        reason = refuse_rows(rows, tuple(self.rows.shape)) or refuse_state(state, self.size)
        reason = reason or self._refuse_assignment(rows, assign)
        if reason is not None:
            error_msgs.append(f"{prefix.rstrip('.') or 'MemoryQueue'}: {reason}")
            return
        if assign:  # no parameter, and as the backends read it
            state_dict = {**state_dict, names[0]: rows.detach().contiguous()}
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )

    def _refuse_assignment(self, rows: torch.Tensor, assign: bool) -> str | None:
        """Why these saved rows cannot be assigned, or copied without ``assign``, or None."""
        if assign and rows.dtype not in STORAGE_DTYPES:
            return f"the saved rows must be float32, bfloat16 or float16, got {rows.dtype}"
        if self.rows.is_meta and not assign:
            return "a queue on the meta device can be loaded with assign=True alone"
        return None


def as_seed(seed: int) -> int:
    """``seed`` as PyTorch's generators take it.

    Raises:
        TypeError, ValueError: it is no integer, or not one of 64 bits.
    """
    seed = as_int("seed", seed)
    if not -(1 << 63) <= seed < 1 << 64:
        raise ValueError(f"seed must fit in 64 bits, got {seed}")
    return seed


def refuse_rows(rows: torch.Tensor, shape: tuple[int, int]) -> str | None:
    """Why saved rows cannot be those of a queue of this shape, or None."""
    if not isinstance(rows, torch.Tensor):
        return f"the saved rows must be a tensor, got {type(rows).__name__}"
    if tuple(rows.shape) != shape:
        return f"the saved queue has shape (size, dim) = {tuple(rows.shape)}, this one {shape}"
    if rows.is_meta or not rows.is_floating_point():
        return f"the saved rows must be numbers in memory, got {rows.dtype} on {rows.device}"
    if not rows.isfinite().all():
        return "the saved queue has non-finite rows"
    return None


def refuse_state(state: torch.Tensor, size: int) -> str | None:
    """Why a saved extra state cannot be that of a queue of this size, or None."""
    integers = isinstance(state, torch.Tensor) and state.dtype == torch.int64
    if not integers or state.shape != (3,):
        return f"the saved queue state must be [pointer, filled, refused], got {state!r}"
    pointer, filled, refused = state.tolist()
    if not (0 <= pointer < size and 0 <= filled <= size and refused >= 0):
        return f"the saved [pointer, filled, refused] = {state.tolist()} is out of range"
    return None
