"""Command-line flags derived from TrainConfig, refused in at most three lines with a suggestion."""

from __future__ import annotations

import argparse
import dataclasses
import json
import re
import shutil
import sys
import textwrap
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

from softcl.training.config import (
    ConfigError,
    TrainConfig,
    did_you_mean,
    field_names,
    flag_name,
    value_type,
)

_OTHER = "other"
_METAVARS = {int: "N", float: "X", str: "TEXT"}


class _Formatter(argparse.HelpFormatter):
    """Help that uses the terminal's width up to 100 columns."""

    def __init__(self, prog: str) -> None:
        columns = shutil.get_terminal_size((100, 24)).columns
        super().__init__(prog, max_help_position=28, width=min(columns, 100) - 1)


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
        known = [name for action in self._actions for name in action.option_strings]
        for word in argv:
            name = word.split("=", 1)[0]
            if re.match(r"--?[A-Za-z]", name) and name not in known:
                fixed = "--" + name.lstrip("-").replace("_", "-")
                hint = f"; did you mean {fixed}?" if fixed in known else did_you_mean(fixed, known)
                raise FlagError(f"unknown flag {name}{hint}")


class FlagError(ConfigError):
    """A flag that does not exist or cannot be read."""

    def __init__(self, line: str) -> None:
        ValueError.__init__(self, line)
        self.field = ""


def _readable(message: str) -> str:
    """argparse's message, told like the others: ``--flag value: reason``."""
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
        known = choice[2].replace("'", "").split(", ")
        return f"{flag} {choice[1]}: must be one of {choice[2]}{did_you_mean(choice[1], known)}"
    return f"{flag}: {reason}"


def build_parser() -> argparse.ArgumentParser:
    parser = CommandParser(
        "softcl.train",
        "[flags]",
        "Train a backbone without labels, by contrast against a memory queue. "
        "Without flags: ASCL on the generated set 'shapes', on whatever device there is.",
        argument_default=argparse.SUPPRESS,
        add_help=False,
    )
    groups: dict[str, Any] = {}
    for field in dataclasses.fields(TrainConfig):
        name = field.metadata["group"]
        if name not in groups:
            groups[name] = parser.add_argument_group(name)
        groups[name].add_argument(flag_name(field.name), **_argument(field))
    # Not of the configuration: where its values come from, and where to read about them.
    other = parser.add_argument_group(_OTHER)
    other.add_argument(
        "--config",
        metavar="FILE",
        help="take settings from a run's config.json; flags beside it replace them",
    )
    other.add_argument("-h", "--help", metavar="GROUP", help="one group of flags, or all")
    return parser


def _argument(field: dataclasses.Field) -> dict[str, Any]:
    kind, rule = value_type(field), field.metadata
    text = rule["help"].replace("%", "%%")
    if kind is bool:
        negatable = field.default is None
        action = argparse.BooleanOptionalAction if negatable else "store_true"
        return dict(action=action, help=text, dest=field.name)
    if field.default is not None:
        text += f" (default: {field.default})"
    metavar = rule["metavar"] or _METAVARS[kind]
    return dict(type=kind, metavar=metavar, help=text, dest=field.name)


def parse_flags(argv: Sequence[str]) -> dict[str, Any]:
    """The fields given on the command line, by name; no other field is in the result.

    Raises:
        ConfigError: for a flag that does not exist or whose value cannot be read.
        SystemExit: 0 after --help.
    """
    parser = build_parser()
    print_help(parser, argv)
    given = vars(parser.read(argv))
    stored = read_config(Path(given.pop("config"))) if "config" in given else {}
    return {**stored, **given}


def print_help(parser: CommandParser, argv: Sequence[str]) -> None:
    """Where help is asked for, show it and stop: every flag's name, or a group with its texts.

    Raises:
        ConfigError: there is no such group.
        SystemExit: 0 after help was shown.
    """
    place = next((i for i, word in enumerate(argv) if word in ("-h", "--help")), None)
    if place is None:
        return
    wanted = argv[place + 1] if place + 1 < len(argv) else ""
    groups = {group.title.split(" ")[0]: group for group in _groups(parser)}
    if wanted == "all":
        parser.print_help()
    elif wanted in groups:
        formatter = parser._get_formatter()
        formatter.start_section(groups[wanted].title)
        formatter.add_arguments(groups[wanted]._group_actions)
        formatter.end_section()
        print(formatter.format_help(), end="")
    elif wanted and not wanted.startswith("-"):
        hint = did_you_mean(wanted, groups)
        raise FlagError(f"--help {wanted}: must be one of {', '.join(groups)}, all{hint}")
    else:
        print(_overview(parser, groups))
    raise SystemExit(0)


def _groups(parser: argparse.ArgumentParser) -> list[Any]:
    return [group for group in parser._action_groups if group._group_actions]


def _overview(parser: CommandParser, groups: dict[str, Any]) -> str:
    """All flags by name, on one screen."""
    width = min(shutil.get_terminal_size((100, 24)).columns, 100) - 1
    lines = [parser.format_usage().strip(), "", *textwrap.wrap(parser.description, width), ""]
    indent = max(map(len, groups)) + 4
    for name, group in groups.items():
        flags = " ".join(_spelling(action) for action in group._group_actions)
        wrapped = textwrap.wrap(flags, width - indent, break_on_hyphens=False)
        heads = [f"  {name}", *[""] * (len(wrapped) - 1)]
        lines += [f"{head:<{indent}}{rest}" for head, rest in zip(heads, wrapped, strict=True)]
    example = f"python -m {parser.prog} --help data"
    text = f"'{example}' tells what a group's flags mean, '--help all' all of them."
    return "\n".join([*lines, "", *textwrap.wrap(text, width)])


def _spelling(action: argparse.Action) -> str:
    """The flag's name, with its negative form where it has one."""
    names = [name for name in action.option_strings if name.startswith("--")]
    return "/".join(names)


def read_config(path: Path) -> dict[str, Any]:
    """The settings in a run's config.json, but for where it was written; None left out.

    Raises:
        ConfigError: the file cannot be read or has a setting that this version does not have.
    """
    try:
        content = json.loads(path.expanduser().read_text())
    except OSError as error:
        raise FlagError(f"--config {path}: {error.strerror or error}") from error
    except ValueError as error:
        raise FlagError(f"--config {path}: not a JSON file ({error})") from error
    values = content.get("config", content) if isinstance(content, dict) else None
    if not isinstance(values, dict):
        raise FlagError(f"--config {path}: holds no settings")
    known = field_names()
    for name in values:
        if name not in known:
            raise FlagError(f"--config {path}: unknown setting {name}{did_you_mean(name, known)}")
    place = ("out", "overwrite", "resume", "dry_run", "max_steps", "show_views")
    return {k: v for k, v in values.items() if v is not None and k not in place}


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


report = report_for("softcl.train")
