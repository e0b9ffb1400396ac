"""``python -m softcl.train``: train a backbone without labels, and show how good it has become.

Under torchrun every process runs all of this; the first one alone writes and prints.
"""

from __future__ import annotations

import argparse
import collections
import json
import os
import sys
import textwrap
from collections.abc import Sequence
from typing import Any

from softcl.command import (
    CommandParser,
    carry_out,
    did_you_mean,
    report_for,
    text_width,
)
from softcl.distributed.world import number_from
from softcl.errors import ConfigError, FlagError, PeerError, flag_name, shortened
from softcl.files import read_file, user_path
from softcl.methods import METHODS
from softcl.train import run_settings
from softcl.train.config import Setting, TrainConfig, default_values, method_settings, settings_of
from softcl.train.parts import keep_freed_pages

_METAVARS = {int: "N", float: "X", str: "TEXT"}
# Of where and how far a run went, not of what it is: --config leaves them in their file.
_OF_ONE_RUN = ("out", "overwrite", "resume", "dry_run", "max_steps", "show_views")

PROG = "softcl.train"


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; every expected failure is one line on stderr.

    Returns:
        0 done, 1 could not run, 2 wrong flags, 130 stopped by Ctrl-C, 143 by SIGTERM.
    """
    keep_freed_pages()

    def command() -> int:
        return run_settings(parse_flags(sys.argv[1:] if argv is None else argv)).exit_code

    return carry_out(PROG, command, report=_report)


def _report(error: BaseException, message: str, code: int) -> int:
    """`report_for`, once where every process has the same to say."""
    try:
        alone = number_from(os.environ, "WORLD_SIZE", 1) == 1
        rank = 0 if alone else number_from(os.environ, "RANK", 0)
    except PeerError:  # which is what is reported
        rank = 0
    if rank > 0 and (getattr(error, "reported", False) or code in (2, 130)):
        return code
    return report_for(PROG)(f"process {rank}: {message}" if rank > 0 else message, code)


# ---------------------------------------------------------------------------------------- flags


def parse_flags(argv: Sequence[str]) -> dict[str, Any]:
    """The settings given on the command line, by name; no other is in the result.

    Raises:
        ConfigError: for a flag that does not exist or whose value cannot be read.
        SystemExit: 0 after --help.
    """
    path, method = _value_of("--config", argv), _value_of("--method", argv)
    stored = {} if path is None else read_config(path)
    parser = build_parser(method or stored.get("method", TrainConfig.method))
    print_help(parser, argv)
    given = vars(parser.read(argv))
    given.pop("config", None)
    return {**stored, **given}


def _value_of(flag: str, argv: Sequence[str]) -> str | None:
    """The value of a flag that decides what the others are."""
    for place, word in enumerate(argv):
        if word.startswith(f"{flag}="):
            return word.partition("=")[2]
        if word == flag and place + 1 < len(argv):
            return argv[place + 1]
    return None


def build_parser(method: str) -> CommandParser:
    """The flags of a run with this method.

    Those of the other methods are read too, without help, so that their refusal can say whose they
    are.
    """
    parser = CommandParser(
        PROG,
        "[flags]",
        "Train a backbone without labels, by contrast against a memory queue. "
        "Without flags: ASCL on the generated set 'shapes', on whatever device there is.",
        argument_default=argparse.SUPPRESS,
        add_help=False,
    )
    method = method if method in METHODS else TrainConfig.method
    groups: dict[str, Any] = {}
    known = settings_of(method)
    for rules in known.values():
        if rules.group not in groups:
            title = f"method {method}" if rules.group == "method" else rules.group
            groups[rules.group] = parser.add_argument_group(title)
        options = _argument(rules, _help_of(rules, method))
        groups[rules.group].add_argument(flag_name(rules.name), **options)
    for other in METHODS:
        for name, rules in method_settings(other).items():
            if name not in known:
                known[name] = rules
                parser.add_argument(flag_name(name), **_argument(rules, argparse.SUPPRESS))
    # Not of the configuration: where its values come from, and where to read about them.
    group = parser.add_argument_group("other")
    text = "take settings from a JSON or YAML file, as a run's config.json; flags replace them"
    group.add_argument("--config", metavar="FILE", help=text)
    group.add_argument("-h", "--help", metavar="GROUP", help="one group of flags, or all")
    return parser


def _argument(rules: Setting, text: str) -> dict[str, Any]:
    if rules.kind is bool:
        negatable = rules.default is None
        action = argparse.BooleanOptionalAction if negatable else "store_true"
        return dict(action=action, help=text, dest=rules.name)
    metavar = rules.metavar or ("NAME" if rules.choices else _METAVARS[rules.kind])
    return dict(type=rules.kind, metavar=metavar, help=text, dest=rules.name)


def _help_of(rules: Setting, method: str) -> str:
    """What a setting means, and its default; where that depends on the data, for each kind."""
    text = rules.help.replace("{methods}", ", ".join(METHODS))
    values = default_values(method, rules.name)
    if rules.default is not None and rules.kind is not bool:
        text += f" (default: {rules.default})"
    elif values and rules.name != "image_size":
        (usual, _), *_ = collections.Counter(values.values()).most_common(1)
        others = [f"{data} {_short(v)}" for data, v in values.items() if v != usual]
        text += f" (default: {'; '.join([_short(usual), *others])})"
    return text.replace("%", "%%")


def _short(value: Any) -> str:
    if isinstance(value, bool):
        return "on" if value else "off"
    return f"{value:g}" if isinstance(value, float) else str(value)


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
    groups = {group.title.split(" ")[0]: group for group in parser._action_groups[2:]}
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
        raise FlagError(
            f"--help {shortened(wanted)}: must be one of {', '.join(groups)}, all{hint}"
        )
    else:
        print(_overview(parser, groups))
    raise SystemExit(0)


def _overview(parser: CommandParser, groups: dict[str, Any]) -> str:
    """All flags by name, on one screen."""
    width = text_width()
    lines = [parser.format_usage().strip(), "", *textwrap.wrap(parser.description, width), ""]
    indent = max(map(len, groups)) + 4
    for name, group in groups.items():
        flags = " ".join(_spelling(action) for action in group._group_actions)
        wrapped = textwrap.wrap(flags, width - indent, break_on_hyphens=False)
        heads = [f"  {name}", *[""] * (len(wrapped) - 1)]
        lines += [f"{head:<{indent}}{rest}" for head, rest in zip(heads, wrapped, strict=True)]
    method = groups["method"].title.split(" ")[1]
    text = f"These are the flags of {method}. '--method snclr --help method' tells what a group's "
    text += "flags mean, with their defaults; '--help all' tells all."
    return "\n".join([*lines, "", *textwrap.wrap(text, width)])


def _spelling(action: argparse.Action) -> str:
    """The flag's name, with its negative form where it has one."""
    return "/".join(name for name in action.option_strings if name.startswith("--"))


def read_config(path: str) -> dict[str, Any]:
    """The settings in a JSON or YAML file, but for those of one run; None left out.

    Raises:
        ConfigError: the file cannot be read or holds no settings.
    """
    try:
        content = _parsed(read_file(user_path(path)).decode())
    except OSError as error:
        raise ConfigError("config", path, error.strerror or str(error)) from error
    except RecursionError as error:
        raise ConfigError("config", path, "nested too deeply") from error
    except ValueError as error:
        raise ConfigError("config", path, f"not a JSON or YAML file ({error})") from error
    values = content.get("config", content) if isinstance(content, dict) else None
    if not isinstance(values, dict):
        raise ConfigError("config", path, "holds no settings")
    return {str(k): v for k, v in values.items() if v is not None and k not in _OF_ONE_RUN}


def _parsed(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError as error:
        try:
            import yaml
        except ImportError:
            raise error from None
    try:
        content = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ValueError(" ".join(str(error).split())) from error
    if not isinstance(content, dict):
        return content
    holder = content.get("config", content)
    return {k: _number(v) for k, v in holder.items()} if isinstance(holder, dict) else content


def _number(value: Any) -> Any:
    """YAML reads 1e-3, without a point, as a word."""
    try:
        return float(value) if isinstance(value, str) and "e" in value.lower() else value
    except ValueError:
        return value


if __name__ == "__main__":
    sys.exit(main())
