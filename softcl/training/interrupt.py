"""Ctrl-C and SIGTERM: asked once, a run finishes its step and saves; asked twice, it exits."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable
from types import FrameType

from softcl.distributed import World

EXIT_CODES = {signal.SIGINT: 130, signal.SIGTERM: 143}  # 128 + the signal's number


class StopRequest:
    """Context that turns SIGINT and SIGTERM into a request to stop.

    Attributes:
        exit_code: None until a signal comes, then 130 (Ctrl-C) or 143 (SIGTERM).

    Python delivers signals to the main thread alone; elsewhere nothing is changed.
    """

    def __init__(self) -> None:
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
        if self.exit_code is not None:
            # At once: no clean-up. A checkpoint being written leaves the one before it.
            os.write(2, b"\nsoftcl.train: stopped at once\n")
            os._exit(EXIT_CODES[number])
        self.exit_code = EXIT_CODES[number]
        os.write(2, b"\nsoftcl.train: finishing the step and saving; once more to exit at once\n")


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
