"""``softcl COMMAND``, also ``python -m softcl COMMAND``: the commands, under one name.

``softcl train --epochs 50`` is ``python -m softcl.train --epochs 50``, and so for the others.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence

from softcl.errors import FlagError

# Imported when they are called: `softcl doctor` must run where timm is missing.
COMMANDS = {
    "train": ("softcl.train.__main__", "train a backbone without labels"),
    "evaluate": ("softcl.evaluate", "measure a backbone on labelled images"),
    "finetune": ("softcl.finetune", "train a whole backbone on few labels"),
    "detect": ("softcl.detect", "train a detector on a backbone"),
    "embed": ("softcl.embed", "write the features of images, and their neighbours"),
    "export": ("softcl.export", "write a backbone for other programs"),
    "report": ("softcl.report", "compare runs on one page"),
    "doctor": ("softcl.doctor", "tell what works on this machine"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command that the first word names, with the rest as its arguments.

    Returns:
        Its exit code; 2 where there is no such command.
    """
    from softcl.command import did_you_mean, report_for

    words = list(sys.argv[1:] if argv is None else argv)
    if not words or words[0] in ("-h", "--help"):
        print(overview())
        return 0
    if words[0] == "--version":
        import softcl

        print(f"softcl {softcl.__version__}")
        return 0
    name, rest = words[0], words[1:]
    if name not in COMMANDS:
        known = f"must be one of {', '.join(COMMANDS)}{did_you_mean(name, COMMANDS)}"
        return report_for("softcl")(str(FlagError(f"{name}: {known}")), 2)
    return importlib.import_module(COMMANDS[name][0]).main(rest)


def overview() -> str:
    """What there is, one command a line."""
    width = max(map(len, COMMANDS))
    lines = [f"  {name:<{width}}  {text}" for name, (_, text) in COMMANDS.items()]
    end = "'softcl COMMAND --help' lists the flags of one."
    return "\n".join(["usage: softcl COMMAND [flags]", "", *lines, "", end])


if __name__ == "__main__":
    sys.exit(main())
