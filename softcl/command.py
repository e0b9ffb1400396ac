"""What the commands share: flags by argparse, and errors of three lines with a suggestion.

argparse: the libraries that make flags of dataclasses (tyro, jsonargparse) know neither help by
groups nor flags that depend on the value of another one.
"""

from __future__ import annotations

import argparse
import contextlib
import difflib
import importlib.util
import math
import os
import re
import shlex
import shutil
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn

from softcl.errors import (
    LONGEST_VALUE,
    ConfigError,
    FlagError,
    SoftclError,
    flag_name,
    shortened,
)
from softcl.files import user_path

LONGEST_LINE = 1000
LARGEST = (1 << 63) - 1  # of whole numbers: what sizes of tensors and seeds are
LARGEST_FLOAT = 3.4e38  # of other numbers: what float32 holds


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """``; did you mean X?`` for the known word nearest to `word`, or an empty string."""
    if len(word) > LONGEST_VALUE:
        return ""
    near = difflib.get_close_matches(word, list(known), n=1, cutoff=0.6)
    return f"; did you mean {near[0]}?" if near else ""


def must_be_one_of(field: str, value: Any, known: Iterable[str]) -> ConfigError:
    """The refusal of a word that is none of the known ones."""
    known = list(known)
    reason = f"must be one of {', '.join(known)}{did_you_mean(str(value), known)}"
    return ConfigError(field, value, reason)


def check_range(
    field: str,
    value: float,
    *,
    at_least: float | None = None,
    above: float | None = None,
    at_most: float | None = None,
) -> None:
    """Refuse a number that is not finite or out of its range.

    Raises:
        ConfigError: naming the flag and the value.
    """
    if isinstance(value, float) and not math.isfinite(value):
        raise ConfigError(field, value, "must be a finite number")
    if at_most is None:
        at_most = LARGEST if isinstance(value, int) else LARGEST_FLOAT
    if at_least is not None and value < at_least:
        raise ConfigError(field, value, f"must be at least {_plain(at_least)}")
    if above is not None and value <= above:
        raise ConfigError(field, value, f"must be above {_plain(above)}")
    if at_most is not None and value > at_most:
        raise ConfigError(field, value, f"must be at most {_plain(at_most)}")


def check_ranges(options: argparse.Namespace, **bounds: tuple[float | None, float | None]) -> None:
    """Refuse numbers among the options, those that were given, below or above their bounds.

    Raises:
        ConfigError: naming the first such flag.
    """
    for name, (least, most) in bounds.items():
        value = getattr(options, name)
        if value is not None:
            check_range(name, value, at_least=least, at_most=most)


def _plain(number: float) -> str:
    return str(number) if isinstance(number, int) else f"{number:g}"


def check_path(field: str, text: str) -> Path:
    """The path that a flag names.

    Raises:
        ConfigError: it cannot be one.
    """
    try:
        return user_path(text)
    except OSError as error:
        raise ConfigError(field, text, error.strerror) from error


def need(what: str, *modules: str) -> None:
    """Refuse to go on without modules that the extra `train` brings.

    Raises:
        ImportError: naming those that are missing, and the extra.
    """
    missing = [name for name in modules if importlib.util.find_spec(name) is None]
    if missing:
        named = {"PIL": "pillow", "sklearn": "scikit-learn"}
        listed = ", ".join(named.get(name, name) for name in missing)
        raise ImportError(f'{what} needs {listed}: pip install "softcl[train]"')


def invocation(prog: str) -> str:
    """What to type to call one of the commands: as it was called, or with this Python."""
    script = os.path.abspath(sys.argv[0])
    if os.path.basename(script) == "softcl":  # the console script
        on_path = os.path.abspath(shutil.which("softcl") or "") == script
        typed = "softcl" if on_path else shlex.quote(script)
        return f"{typed} {prog.removeprefix('softcl.')}"
    python = os.path.abspath(sys.executable)
    for name in ("python", "python3"):
        if os.path.abspath(shutil.which(name) or "") == python:
            return f"{name} -m {prog}"
    near = os.path.relpath(python)
    return f"{shlex.quote(python if near.startswith(os.pardir) else near)} -m {prog}"


def text_width() -> int:
    """Columns that help may take: the terminal's, up to 100; words need 40."""
    return min(max(shutil.get_terminal_size((100, 24)).columns, 41), 100) - 1


class _Formatter(argparse.HelpFormatter):
    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=28, width=text_width())


class CommandParser(argparse.ArgumentParser):
    """argparse, with its errors turned into ConfigError lines, and suggestions for wrong flags.

    Args:
        prog: the module that is run.
        line: its arguments, for the usage line.
        description: of the command.
    """

    def __init__(self, prog: str, line: str, description: str, **options: Any) -> None:
        super().__init__(
            prog=prog,
            usage=f"{invocation(prog)} {line}",
            description=description,
            formatter_class=_Formatter,
            allow_abbrev=False,
            **options,
        )

    def error(self, message: str) -> NoReturn:
        raise FlagError(_readable(message))

    def read(self, argv: Sequence[str]) -> argparse.Namespace:
        """The values of a command line.

        Raises:
            ConfigError: for a flag that does not exist or whose value cannot be read.
            SystemExit: 0 after --help.
        """
        self._refuse_unknown(argv)
        values, rest = self.parse_known_args(list(argv))
        for name, value in vars(values).items():
            if value == []:  # what argparse makes of --flag=--
                raise FlagError(f"{flag_name(name)}: needs a value")
        if rest:
            raise FlagError(f"unexpected {shortened(rest[0])!r}: every value follows a flag")
        return values

    def _refuse_unknown(self, argv: Sequence[str]) -> None:
        """Name the first unknown flag (argparse would report a missing value elsewhere first)."""
        known = {name: action for action in self._actions for name in action.option_strings}
        shown = [name for name, action in known.items() if action.help != argparse.SUPPRESS]
        for word in argv:
            name = word.split("=", 1)[0]
            if re.match(r"--?[A-Za-z]", name) and name not in known:
                fixed = "--" + name.lstrip("-").replace("_", "-")
                hint = f"; did you mean {fixed}?" if fixed in known else did_you_mean(fixed, shown)
                raise FlagError(f"unknown flag {shortened(name)}{hint}")


def _readable(message: str) -> str:
    """argparse's message, worded like the others: ``--flag value: reason``."""
    match = re.fullmatch(r"argument (--[\w-]+)[^:]*: (.*)", message, flags=re.DOTALL)
    if match is None:
        return message
    flag, reason = match.groups()
    invalid = re.fullmatch(r"invalid (\w+) value: '(.*)'", reason, flags=re.DOTALL)
    if invalid is not None:
        kind = {"int": "a whole number", "float": "a number"}.get(invalid[1], invalid[1])
        return f"{flag} {shortened(invalid[2])}: must be {kind}"
    if reason.startswith("expected one argument"):
        return f"{flag}: needs a value"
    if reason.startswith("ignored explicit argument"):
        return f"{flag}: takes no value"
    choice = re.fullmatch(r"invalid choice: '(.*?)' \(choose from (.*)\)", reason, flags=re.DOTALL)
    if choice is not None:
        return str(must_be_one_of(flag[2:], choice[1], choice[2].replace("'", "").split(", ")))
    return f"{flag}: {reason}"


# ------------------------------------------------------------------------------- how a command ends


@contextlib.contextmanager
def from_flag(field: str) -> Iterator[None]:
    """Context whose errors are told with the name of the flag that they come from."""
    try:
        yield
    except Exception as error:
        if not isinstance(error, ConfigError) and not hasattr(error, "flag"):
            error.flag = flag_name(field)
        raise


def reason_of(error: BaseException) -> str:
    """An error in a line, with the flag that it comes from."""
    reason = str(error)
    if isinstance(error, OSError) and error.strerror:
        reason = error.strerror
        if error.filename:
            reason = f"{shortened(error.filename)}: {reason}"
    flag = getattr(error, "flag", None)
    return reason if flag is None else f"{flag} {reason}"


def report_for(prog: str) -> Callable[[str, int], int]:
    """The function that says on stderr, in one line, why a command ends, and returns its code.

    For wrong flags, code 2, a second line says where to read more.
    """

    def report(message: str, code: int) -> int:
        # Longer than what is cut already, whose end is a word's.
        words = (shortened(word, 2 * LONGEST_VALUE) for word in message.split())
        line = shortened(f"{prog}: {' '.join(words)}", LONGEST_LINE)
        print("".join(c if c.isprintable() else repr(c)[1:-1] for c in line), file=sys.stderr)
        if code == 2:
            print(f"'{invocation(prog)} --help' lists the flags", file=sys.stderr)
        return code

    return report


def carry_out(
    prog: str,
    command: Callable[[], int | None],
    report: Callable[[BaseException, str, int], int] | None = None,
) -> int:
    """Run a command; every expected failure is one line on stderr.

    Args:
        command: returns its exit code, or None for 0.
        report: says why it ends, and returns the code; None for `report_for`.

    Returns:
        The exit code: 0 done, 1 could not run, 2 wrong flags, 130 stopped by Ctrl-C, 141 nobody
        reads what it prints.
    """

    def tell(error: BaseException, message: str, code: int) -> int:
        if report is not None:
            return report(error, message, code)
        return report_for(prog)(message, code)

    if hasattr(sys.stdout, "reconfigure"):  # names of files that are no text can be printed
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        try:
            return command() or 0
        finally:  # of what --help prints too, which stops by itself
            sys.stdout.flush()
    except ConfigError as error:
        return tell(error, str(error), 2)
    except BrokenPipeError:
        # Or Python, which flushes at its end, would complain.
        with contextlib.suppress(OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except (SoftclError, ImportError, OSError) as error:
        return tell(error, reason_of(error), 1)
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        return tell(error, f"out of memory ({str(error).strip() or 'no more to be had'})", 1)
    except KeyboardInterrupt as error:
        return tell(error, "stopped", 130)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory was refused: by Python, or by PyTorch, on any device."""
    words = ("can't allocate memory", "not enough memory", "out of memory")
    return isinstance(error, MemoryError) or any(word in str(error) for word in words)
