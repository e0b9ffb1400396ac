"""What the commands share: flags by argparse, and errors of three lines with a suggestion.

argparse: the libraries that make flags of dataclasses (tyro, jsonargparse) know neither help by
groups nor flags that depend on the value of another one.
"""

from __future__ import annotations

import argparse
import difflib
import re
import shutil
import sys
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NoReturn

from softcl.errors import ConfigError, FlagError


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """``; did you mean X?`` for the known word nearest to `word`, or an empty string."""
    near = difflib.get_close_matches(word, list(known), n=1, cutoff=0.6)
    return f"; did you mean {near[0]}?" if near else ""


def must_be_one_of(field: str, value: Any, known: Iterable[str]) -> ConfigError:
    """The refusal of a word that is none of the known ones."""
    known = list(known)
    reason = f"must be one of {', '.join(known)}{did_you_mean(str(value), known)}"
    return ConfigError(field, value, reason)


def text_width() -> int:
    """Columns that help may take: the terminal's, up to 100."""
    return min(shutil.get_terminal_size((100, 24)).columns, 100) - 1


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
            usage=f"python -m {prog} {line}",
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
        if rest:
            raise FlagError(f"unexpected {rest[0]!r}: every value follows a flag")
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
                raise FlagError(f"unknown flag {name}{hint}")


def _readable(message: str) -> str:
    """argparse's message, worded like the others: ``--flag value: reason``."""
    match = re.fullmatch(r"argument (--[\w-]+)[^:]*: (.*)", message, flags=re.DOTALL)
    if match is None:
        return message
    flag, reason = match.groups()
    invalid = re.fullmatch(r"invalid (\w+) value: '(.*)'", reason, flags=re.DOTALL)
    if invalid is not None:
        kind = {"int": "a whole number", "float": "a number"}.get(invalid[1], invalid[1])
        return f"{flag} {invalid[2]}: must be {kind}"
    if reason.startswith("expected one argument"):
        return f"{flag}: needs a value"
    if reason.startswith("ignored explicit argument"):
        return f"{flag}: takes no value"
    choice = re.fullmatch(r"invalid choice: '(.*?)' \(choose from (.*)\)", reason, flags=re.DOTALL)
    if choice is not None:
        return str(must_be_one_of(flag[2:], choice[1], choice[2].replace("'", "").split(", ")))
    return f"{flag}: {reason}"


def report_for(prog: str) -> Callable[[str, int], int]:
    """The function that says on stderr, in one line, why a command ends, and returns its code.

    For wrong flags, code 2, a second line says where to read more.
    """

    def report(message: str, code: int) -> int:
        print(f"{prog}: {' '.join(message.split())}", file=sys.stderr)
        if code == 2:
            print(f"'python -m {prog} --help' lists the flags", file=sys.stderr)
        return code

    return report
