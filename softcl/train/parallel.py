"""What changes in a run of several processes: gradients, batch norm, the teacher's shuffle, stops.

The batch of --batch-size images is divided among the processes, image i going to process i % W. A
step then computes what one process would compute (softcl/distributed), with one exception: plain
batch norm sees a process's own images on CPUs, where PyTorch has no synchronised one.
"""

from __future__ import annotations

import inspect
import os
import signal
import threading
from collections.abc import Callable, Iterable, Mapping
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn

from softcl.distributed import World
from softcl.errors import ConfigError
from softcl.nn import SplitBatchNorm2d, convert_split_batch_norm


def check_same_settings(given: Mapping[str, Any], world: World) -> None:
    """Refuse processes that were started with different flags: those of the first one would count.

    Raises:
        ConfigError: in every process, naming the first such flag.
    """
    plain = {name: x for name, x in given.items() if isinstance(x, (bool, int, float, str))}
    everywhere = world.all_gather_object(plain)
    for name in sorted(set().union(*everywhere)):
        values = [its.get(name) for its in everywhere]
        for rank, value in enumerate(values):
            if value != values[0]:
                first, other = ("nothing" if x is None else x for x in (values[0], value))
                reason = f"process 0 was given {first}, process {rank} {other}"
                raise ConfigError(name, "", reason)


def average_gradients(trained: nn.Module, world: World, *, accumulate: int = 1) -> nn.Module:
    """DDP around what is trained: the mean of the processes' gradients after each backward pass.

    The graph is the same in every step, so buckets are filled and sent in a fixed order; gradients
    live in the buckets. Buffers stay each process's own, see `average_buffers`. Where a step is
    accumulated of several parts, the graph is not declared static: DDP cannot then leave out the
    exchange of the first parts (``no_sync``).
    """
    if world.alone:
        return trained
    from torch.nn.parallel import DistributedDataParallel

    on_cuda = next(trained.parameters()).is_cuda
    options = inspect.signature(DistributedDataParallel).parameters
    # Renamed in torch 2.14, where the old name warns.
    buffers = "forward_sync_buffers" if "forward_sync_buffers" in options else "broadcast_buffers"
    return DistributedDataParallel(
        trained,
        device_ids=[world.local_rank] if on_cuda else None,
        gradient_as_bucket_view=True,
        static_graph=accumulate == 1,
        **{buffers: False},
    )


def divide_splits(student: nn.Module, num_splits: int, world: World) -> nn.Module:
    """Split batch norm whose splits are divided among the processes.

    With W processes and S splits, S a multiple of W, each process has S / W of them, and they are
    the same groups of images as in one process. With W a multiple of S a process has (at most) one.
    """
    own = num_splits // world.size
    return convert_split_batch_norm(student, own) if own > 1 else student


def splits_fit(num_splits: int, world: World) -> bool:
    """Whether the splits can be divided among the processes, or the processes among them."""
    return num_splits % world.size == 0 or world.size % num_splits == 0


def synchronise_norms(modules: Iterable[nn.Module], num_splits: int, world: World) -> None:
    """Give batch norm the statistics of all the processes that share a split; CUDA alone.

    2-D batch norm is shared by the processes of its split (none, where each process has splits of
    its own), 1-D batch norm, which is never split, by all. Parameters and buffers stay the same
    tensors, so that an optimiser made before stays valid.
    """
    import torch.distributed as dist
    from timm.layers import convert_sync_batchnorm

    group = None
    if num_splits > 1 and world.size > num_splits:
        members = [list(range(s, world.size, num_splits)) for s in range(num_splits)]
        groups = [dist.new_group(ranks) for ranks in members]  # every process makes all of them
        group = groups[world.rank % num_splits]

    def convert(norm: nn.Module) -> nn.Module:
        if isinstance(norm, nn.BatchNorm1d):
            return convert_sync_batchnorm(norm)
        if not isinstance(norm, nn.BatchNorm2d) or isinstance(norm, SplitBatchNorm2d):
            return norm
        return norm if num_splits == world.size else convert_sync_batchnorm(norm, group)

    for module in modules:
        for parent in list(module.modules()):
            for name, child in list(parent.named_children()):
                if isinstance(child, (nn.BatchNorm1d, nn.BatchNorm2d)):
                    setattr(parent, name, convert(child))


@torch.no_grad()
def average_buffers(modules: Iterable[nn.Module], world: World) -> None:
    """Make running statistics the processes' mean: what one process with all splits would have.

    They follow each step's statistics linearly, so it does not matter when this is done.
    """
    if world.alone:
        return
    buffers = [b for module in modules for b in module.buffers() if b.is_floating_point()]
    if not buffers:
        return
    mean = world.all_reduce(torch.cat([b.flatten() for b in buffers])) / world.size
    for buffer, part in zip(buffers, mean.split([b.numel() for b in buffers]), strict=True):
        buffer.copy_(part.view(buffer.shape))


@torch.no_grad()
def shuffled_among(
    world: World, teacher: nn.Module, images: Tensor, generator: torch.Generator
) -> Tensor:
    """`softcl.nn.shuffled` for a batch that is divided among processes.

    The images change places across processes, as in MoCo, and each travels to one process alone.
    The generator is on the CPU, and the same in all of them.
    """
    order = torch.randperm(len(images) * world.size, generator=generator)
    return world.permute(teacher(world.permute(images, order)), order.argsort())


# --------------------------------------------------------------------------------------- stops

EXIT_CODES = {signal.SIGINT: 130, signal.SIGTERM: 143}  # 128 + the signal's number


class StopRequest:
    """Context that turns SIGINT and SIGTERM into a request to stop.

    Attributes:
        exit_code: None until a signal comes, then 130 (Ctrl-C) or 143 (SIGTERM).

    Python delivers signals to the main thread alone; elsewhere nothing is changed.

    Args:
        interactive: a second signal raises KeyboardInterrupt, where it would end the process.
        prog: who says so.
    """

    def __init__(self, *, interactive: bool = False, prog: str = "softcl.train") -> None:
        self.interactive, self.prog = interactive, prog.encode()
        self.exit_code: int | None = None
        self._previous: dict[int, object] = {}

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is threading.main_thread():
            for number in EXIT_CODES:
                self._previous[number] = signal.signal(number, self._ask)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _ask(self, number: int, _frame: FrameType | None) -> None:
        if self.exit_code is not None and self.interactive:
            raise KeyboardInterrupt
        if self.exit_code is not None:
            # At once: no clean-up. A checkpoint being written leaves the one before it.
            os.write(2, b"\n%s: stopped at once\n" % self.prog)
            os._exit(EXIT_CODES[number])
        self.exit_code = EXIT_CODES[number]
        words = b"finishing the step and saving; once more to exit at once"
        os.write(2, b"\n%s: %s\n" % (self.prog, words))


class StopVote:
    """When the processes of a run stop: as soon as one is asked to, all after the same step.

    Each step's vote is counted in the next step, so that nobody waits for it.
    """

    def __init__(self, world: World, stop: StopRequest) -> None:
        self.world, self.stop = world, stop
        self._counted: Callable[[], int] | None = None

    def asked(self) -> bool:
        """Whether to stop after this step. Every process calls it after each step."""
        if self.world.alone:
            return self.stop.exit_code is not None
        before, self._counted = self._counted, self.world.start_max(self.stop.exit_code or 0)
        return before is not None and before() > 0

    def settle(self) -> int | None:
        """The exit code that all agree on, None to go on to the end."""
        if self.world.alone:
            return self.stop.exit_code
        if self._counted is not None:
            self._counted()
            self._counted = None
        return self.world.start_max(self.stop.exit_code or 0)() or None
