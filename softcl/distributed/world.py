"""The processes of a run, and the few exchanges that softcl needs of them.

Every exchange is one that the others join with the same shapes and in the same order. What each
process then receives from the others is counted, in bytes, in ``World.received``.
"""

from __future__ import annotations

import contextlib
import os
import re
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import timedelta
from typing import Any, TypeVar

import torch
from torch import Tensor

from softcl.errors import PeerError
from softcl.memory import moved

T = TypeVar("T")

# A process that does not answer for so long has failed. One that was killed is noticed at once.
PATIENCE = timedelta(seconds=50)
# What the first process does alone (k-NN, checkpoints) may take hours: it says so often that it is
# still there.
BEAT = timedelta(seconds=5)
# What torchrun sets, besides WORLD_SIZE, for the processes to find each other.
_NEEDED = ("RANK", "MASTER_ADDR", "MASTER_PORT")


def number_from(environment: Mapping[str, str], name: str, default: int) -> int:
    """A number that torchrun sets.

    Raises:
        PeerError: it is none.
    """
    text = environment.get(name, str(default))
    if not re.fullmatch(r"\d{1,9}", text):
        raise PeerError(f"{name} must be a whole number, got {text[:200]!r} (torchrun sets it)")
    return int(text)


def _await_rendezvous(address: str, port: int) -> None:
    """Until somebody listens there: the engine would tell of each of its attempts in pages.

    Raises:
        PeerError: nobody does.
    """
    last = time.monotonic() + PATIENCE.total_seconds()
    while True:
        try:
            with socket.create_connection((address, port), max(last - time.monotonic(), 1.0)):
                return
        except (OSError, UnicodeError, OverflowError) as error:
            if time.monotonic() >= last or not isinstance(error, OSError):
                raise PeerError(
                    f"nobody listens at MASTER_ADDR {address} MASTER_PORT {port} ({error}): "
                    "process 0 must run there, and the port be open"
                ) from error
            time.sleep(0.2)


class World:
    """The W processes of a run, of which this one is number ``rank``.

    Make one with `start` (under torchrun), or with `joined` in a program that has initialised
    ``torch.distributed`` itself; without either it is ``ALONE``.

    Attributes:
        rank, size: of this process, 0 <= rank < size; their number W.
        alone: no engine takes part. A world of one process that has an engine is not alone: it goes
            the ways of many, and what they cost can be measured on a machine with one device.
        local_rank: the number of this process on its machine.
        received: bytes of payload received from the other processes, by kind of exchange.
        even: the caller vouches that all processes pass equally many rows. Otherwise they compare
            their numbers first, and different ones are an error in each process and no hang.
    """

    def __init__(self, rank: int = 0, size: int = 1, local_rank: int = 0, group: Any = None):
        self.rank, self.size, self.local_rank = rank, size, local_rank
        self.alone = size == 1 and group is None
        self.received: Counter[str] = Counter()
        self.even = False
        self._host = group  # of the CPUs, for objects and for waits
        self._owns_engine = False

    @classmethod
    def start(cls, cuda: bool, environment: Mapping[str, str] = os.environ) -> World:
        """Join the processes that torchrun started; ALONE where it started one or none.

        Raises:
            PeerError: the others cannot be reached.
        """
        size = number_from(environment, "WORLD_SIZE", 1)
        if size == 1:
            return ALONE
        import torch.distributed as dist

        local_rank = number_from(environment, "LOCAL_RANK", 0)
        if dist.is_initialized():
            return cls.joined(local_rank)
        absent = [name for name in _NEEDED if not environment.get(name)]
        rank = number_from(environment, "RANK", 0)
        if absent or rank >= size:
            what = f"{absent[0]} is not set" if absent else f"RANK is {rank}"
            raise PeerError(f"WORLD_SIZE is {size} but {what}: start with torchrun, or unset it")
        if cuda:
            torch.cuda.set_device(local_rank)
        if rank > 0 or environment.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
            port = number_from(environment, "MASTER_PORT", 0)
            _await_rendezvous(environment["MASTER_ADDR"], port)
        with _telling(f"process {rank} of {size}", "to start"):
            store, rank, size = next(iter(dist.rendezvous("env://", timeout=PATIENCE)))
            # torchrun may keep its store when it starts the processes again: the addresses in it
            # are then those of processes that are gone.
            attempt = environment.get("TORCHELASTIC_RESTART_COUNT", "0")
            store = dist.PrefixStore(f"softcl/{attempt}", store)
            backend = "nccl" if cuda else "gloo"
            dist.init_process_group(
                backend, store=store, rank=rank, world_size=size, timeout=PATIENCE
            )
            world = cls.joined(local_rank)
        world._owns_engine = True
        return world

    @classmethod
    def joined(cls, local_rank: int | None = None) -> World:
        """The world of an initialised ``torch.distributed``, whoever initialised it."""
        import torch.distributed as dist

        host = dist.new_group(backend="gloo", timeout=PATIENCE)
        if local_rank is None:
            local_rank = number_from(os.environ, "LOCAL_RANK", 0)
        return cls(dist.get_rank(), dist.get_world_size(), local_rank, host)

    def close(self) -> None:
        """Leave; nothing can be exchanged any more."""
        if self._owns_engine:
            import torch.distributed as dist

            self._owns_engine = False
            dist.destroy_process_group()

    def __repr__(self) -> str:
        return f"process {self.rank} of {self.size}"

    @property
    def is_main_process(self) -> bool:
        """Whether this is the process that writes and prints."""
        return self.rank == 0

    # ----------------------------------------------------------------------------- tensors

    def all_gather(self, x: Tensor) -> Tensor:
        """x (n, ...) of every process, (W, n, ...); differentiable, see `exchange`."""
        return x[None] if self.alone else _Gather.apply(x, self)

    def exchange(self, x: Tensor) -> Tensor:
        """x (W, n, ...), whose part w goes to process w -> (W, n, ...), whose part w came from it.

        Differentiable. The gradient of a row that was sent comes back from where it went; that of
        one that was gathered is summed over the processes, in their order.
        """
        return x if self.alone else _Exchange.apply(x, self)

    def start_exchange(self, x: Tensor) -> Callable[[], Tensor]:
        """`exchange` begun, without gradient: what is returned waits for it and gives the result.

        Computation meanwhile runs beside it.
        """
        if self.alone:
            return lambda: x
        import torch.distributed as dist

        x = x.detach().contiguous()
        result = torch.empty_like(x)
        with _telling(str(self), "to exchange"):
            work = dist.all_to_all_single(_raw(result), _raw(x), async_op=True)
        self._count("exchange", x[0].nbytes * (self.size - 1))

        def finish() -> Tensor:
            with _telling(str(self), "to exchange"):
                work.wait()
            return result

        return finish

    def all_gather_rows(self, x: Tensor) -> Tensor:
        """x (n, ...) of every process -> all (W n, ...) in the batch's order; differentiable."""
        if self.alone:
            return x
        self.check_rows("x", len(x))
        return self.all_gather(x).transpose(0, 1).flatten(0, 1)

    def row_indices(self, count: int, device: torch.device | str | None = None) -> Tensor:
        """The places (n,) of this process's n rows among all of the batch's."""
        return torch.arange(count, device=device) * self.size + self.rank

    def distribute(self, x: Tensor, wanted: Sequence[Tensor]) -> Tensor:
        """Rows of what all hold together, to where they are wanted; no gradient.

        Args:
            x: (n, ...), of which row l is row l W + rank of the whole.
            wanted: for each process the rows of the whole that it gets, int64 on the CPU; the same
                in every process.
        """
        if self.alone:
            return x[moved(wanted[0], x.device)]
        self.check_rows("x", len(x))
        import torch.distributed as dist

        sent = [rows[rows % self.size == self.rank] // self.size for rows in wanted]
        sources = wanted[self.rank] % self.size
        counts = torch.bincount(sources, minlength=self.size).tolist()
        outgoing = x.detach()[moved(torch.cat(sent), x.device)]
        arrived = x.new_empty((len(sources), *x.shape[1:]))
        with _telling(str(self), "to distribute rows"):
            dist.all_to_all_single(
                _raw_rows(arrived), _raw_rows(outgoing), counts, [len(rows) for rows in sent]
            )
        self._count("distribute", (len(sources) - counts[self.rank]) * x[:1].nbytes)
        # They came sorted by source.
        return arrived[moved(sources.argsort(stable=True).argsort(), x.device)]

    def permute(self, x: Tensor, order: Tensor) -> Tensor:
        """x[order] where x (n, ...) is a part of the whole and order (W n,) is on the CPU."""
        return self.distribute(x, [order[rank :: self.size] for rank in range(self.size)])

    def all_reduce(self, x: Tensor) -> Tensor:
        """The sum of x over the processes, in every process, in x itself."""
        if not self.alone:
            import torch.distributed as dist

            with _telling(str(self), "to sum"):
                dist.all_reduce(x)
            self._count("sum", 2 * x.nbytes * (self.size - 1) // self.size)
        return x

    def check_rows(self, name: str, count: int) -> None:
        """Refuse batches of different lengths, unless they are vouched for.

        Raises:
            ValueError: in every process, naming each one's number of rows.
        """
        if self.alone or self.even:
            return
        counts = self.all_gather_object(count)
        if len(set(counts)) > 1:
            raise ValueError(f"{name} must have as many rows in every process, got {counts}")

    def _count(self, kind: str, bytes_received: int) -> None:
        self.received[kind] += bytes_received

    # ------------------------------------------------------------------------------ on the host

    def on_main_process(self, function: Callable[[], T]) -> T:
        """What ``function`` returns in the first process, in all of them; its errors too.

        However long it takes, the others wait, while the first process is there; the function may
        exchange nothing with them. An error comes with ``reported = True`` in the other processes:
        the first one reports it.
        """
        if self.alone:
            return function()
        outcome: list[Any] = [None, None]
        failed: Exception | None = None

        def alone() -> None:
            nonlocal failed
            try:
                outcome[0] = function()
            except Exception as error:
                failed = error
                outcome[1] = (type(error), error.args, vars(error))

        self.together(alone if self.is_main_process else lambda: None)
        import torch.distributed as dist

        with _telling(str(self), "for the first"):
            dist.broadcast_object_list(outcome, 0, group=self._host)
        if failed is not None:
            raise failed
        if outcome[1] is not None:
            # Made without its __init__, whose arguments need not be the error's.
            kind, arguments, fields = outcome[1]
            error = kind.__new__(kind, *arguments)
            error.args = arguments
            vars(error).update(fields, reported=True)
            raise error
        return outcome[0]

    def together(self, function: Callable[[], T]) -> T:
        """What ``function`` returns here, when those of all processes have ended.

        However long one takes, the others wait while it is there: a thread says so every BEAT. The
        function may exchange nothing.

        Raises:
            PeerError: a process is gone.
        """
        if self.alone:
            return function()
        import torch.distributed as dist

        ended, lost = threading.Event(), []

        def beat() -> None:
            try:
                all_ended = False
                while not all_ended:
                    flag = torch.tensor([int(ended.wait(BEAT.total_seconds()))])
                    dist.all_reduce(flag, dist.ReduceOp.MIN, group=self._host)
                    all_ended = bool(flag)
            except RuntimeError as error:
                lost.append(error)

        thread = threading.Thread(target=beat, daemon=True)
        thread.start()
        try:
            return function()
        finally:
            ended.set()
            thread.join()
            if lost:
                with _telling(str(self), "for the others"):
                    raise lost[0]

    def all_gather_object(self, value: T) -> list[T]:
        """The small value of every process, by rank."""
        if self.alone:
            return [value]
        import torch.distributed as dist

        values: list[Any] = [None] * self.size
        with _telling(str(self), "to compare"):
            dist.all_gather_object(values, value, group=self._host)
        return values

    def start_max(self, value: int) -> Callable[[], int]:
        """The largest value of any process, begun: what is returned waits for it."""
        if self.alone:
            return lambda: value
        import torch.distributed as dist

        box = torch.tensor([value])
        with _telling(str(self), "to agree"):
            work = dist.all_reduce(box, dist.ReduceOp.MAX, group=self._host, async_op=True)

        def finish() -> int:
            with _telling(str(self), "to agree"):
                work.wait()
            return int(box)

        return finish

    def collect(self, x: Tensor) -> list[Tensor] | None:
        """x, of one shape everywhere, of every process on the first one's CPU; None elsewhere."""
        if self.alone:
            return [x.cpu()]
        import torch.distributed as dist

        x = x.detach().cpu().contiguous()
        parts = [torch.empty_like(x) for _ in range(self.size)] if self.is_main_process else None
        raw = None if parts is None else [_raw(part) for part in parts]
        with _telling(str(self), "to collect"):
            dist.gather(_raw(x), raw, 0, group=self._host)
        return parts

    def wait(self) -> None:
        """Until every process is here."""
        self.start_max(0)()

    @contextlib.contextmanager
    def watching(self, what: str) -> Iterator[None]:
        """Turn the engine's own errors inside into `PeerError` (DDP exchanges by itself)."""
        if self.alone:
            yield
            return
        with _telling(str(self), what):
            yield


ALONE = World()


@contextlib.contextmanager
def _telling(who: str, what: str) -> Iterator[None]:
    """One line in place of the engine's many, where it is the engine that failed."""
    try:
        yield
    except PeerError:
        raise
    except RuntimeError as error:
        text = str(error).strip().splitlines()
        # Without the place in the engine's sources, and without its advice.
        reason = re.sub(r"^\[\S*\]\s*", "", text[0] if text else "?").split(". ")[0]
        words = ("gloo", "nccl", "connection", "timed out", "timeout", "store", "socket")
        if not any(word in str(error).lower() for word in words):
            raise
        raise PeerError(
            f"{who} waited {what} and another one failed or does not answer ({reason})"
        ) from error


def _raw(x: Tensor) -> Tensor:
    """The bytes of a contiguous tensor: engines differ in the dtypes that they know."""
    return x.view(-1).view(torch.uint8)


def _raw_rows(x: Tensor) -> Tensor:
    return x.view(len(x), x.shape[1:].numel()).view(torch.uint8)


def _gather(x: Tensor, world: World) -> Tensor:
    import torch.distributed as dist

    # Since torch 2.14 the function has another name; the old one warns.
    gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
    x = x.detach().contiguous()
    result = x.new_empty((world.size, *x.shape))
    with _telling(str(world), "to gather"):
        gather(_raw(result), _raw(x))
    world._count("gather", x.nbytes * (world.size - 1))
    return result


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, world):
        ctx.world = world
        return _gather(x, world)

    @staticmethod
    def backward(ctx, gradient):  # (W, n, ...)
        return ctx.world.start_exchange(gradient)().sum(0), None


class _Exchange(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, world):
        ctx.world = world
        return world.start_exchange(x)()

    @staticmethod
    def backward(ctx, gradient):
        return ctx.world.start_exchange(gradient)(), None
