"""Every failure that softcl expects, as an exception whose message is one line.

    try:
        run = softcl.train.fit(data="photos", epochs=50)
    except softcl.errors.SoftclError as error:
        print(error)

The functions of the library (``softcl.ops``, ``softcl.nn``, ``softcl.methods``) raise TypeError and
ValueError besides, as PyTorch does: for a tensor of the wrong shape, say.
"""

from __future__ import annotations

from typing import Any

__all__ = [
    "CallbackError",
    "CheckpointError",
    "ConfigError",
    "DataError",
    "Diverged",
    "ExportError",
    "FlagError",
    "PeerError",
    "RunError",
    "RunFolderError",
    "SoftclError",
    "UnsupportedBackendError",
    "WeightsError",
]

LONGEST_VALUE = 200  # characters of a value that are shown
_ARGUMENTS = {"arch": "backbone"}  # of `fit`, where they are not called as the flags are


class SoftclError(Exception):
    """Any of the errors below."""


class ConfigError(SoftclError, ValueError):
    """A value that a command or a function cannot use: the flag, its value and the reason.

    Attributes:
        field, value, reason: the setting; the parts of the message.
    """

    def __init__(self, field: str, value: Any, reason: str) -> None:
        self.field, self.value, self.reason = field, value, reason
        super().__init__(f"{flag_name(field)} {shortened(value)}".rstrip() + f": {reason}")

    def as_argument(self) -> ConfigError:
        """The same in the words of Python, the argument first."""
        if not self.field:
            return self
        error = ConfigError(self.field, self.value, self.reason)
        argument = _ARGUMENTS.get(self.field, self.field)
        value = "" if self.value == "" else f"={shortened(self.value)}"
        error.args = (f"{argument}{value} ({flag_name(self.field)}): {self.reason}",)
        return error


class FlagError(ConfigError):
    """A flag that does not exist or cannot be read."""

    def __init__(self, line: str) -> None:
        ValueError.__init__(self, line)
        self.field = ""


class DataError(SoftclError):
    """Images that cannot be read; the message names the path."""


class WeightsError(SoftclError, RuntimeError):
    """Weights that cannot be used; the message begins with their spec."""


class RunError(SoftclError, RuntimeError):
    """A run that cannot start or go on."""


class RunFolderError(RunError):
    """The folder of a run cannot be used; the message names its path and what to do."""


class CheckpointError(RunError):
    """A checkpoint cannot be written or read; the message names the path and the reason."""


class Diverged(RunError):
    """The loss is no longer a finite number."""


class CallbackError(RunError):
    """A function given to `softcl.train.fit` raised; `__cause__` is what."""


class PeerError(RunError):
    """Another process of the run failed, or cannot be reached."""


class ExportError(SoftclError, RuntimeError):
    """A backbone that cannot be written in the format asked for."""


class UnsupportedBackendError(SoftclError, RuntimeError):
    """No backend can run a call, or the one asked for cannot."""


def flag_name(field: str) -> str:
    """The flag of a setting."""
    return "--" + field.replace("_", "-")


def shortened(value: Any, most: int = LONGEST_VALUE) -> str:
    """A value in words, cut where it is longer than anybody reads."""
    try:
        text = str(value)
    except ValueError:  # Python writes no number of more than 4300 digits
        text = f"a number of {value.bit_length()} bits"
    return text if len(text) <= most else f"{text[:most]}..."
